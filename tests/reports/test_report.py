"""Reports: pages that need nothing else, their pictures, and the directory that they are in."""

from __future__ import annotations

import io
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report_models import WRONG, save_llama

import negmerge_fast as nm
from negmerge_fast.core.errors import InputError
from negmerge_fast.reports import api, counting, findings, pictures
from negmerge_fast.reports.findings import Point, outliers, percent, read_points, retain_floor, sentences
from negmerge_fast.reports.names import (
    MAX_KINDS,
    by_layer,
    model_labels,
    shortened,
    split_layer,
    without_common_prefix,
)
from negmerge_fast.reports.statistics import ConsensusStatistics, consensus_statistics

POINTS = [Point(0.0, 0.9, 0.98), Point(0.5, 0.4, 0.97), Point(1.0, None, 0.9), Point(1.5, 0.1, None)]
ALL = {
    "consensus.png",
    "models.png",
    "layers.png",
    "magnitudes.png",
    "scales.png",
    "index.html",
    "statistics.json",
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> ConsensusStatistics:
    base, *models = save_llama(tmp_path_factory.mktemp("llama"))
    return consensus_statistics(base, models)


@pytest.fixture(scope="module")
def files(counted: ConsensusStatistics) -> dict[str, bytes]:
    return api.render(counted, POINTS)


class Page(HTMLParser):
    """Tags with their attributes, and text."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", list[str]()
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs)), "an attribute is given twice"
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for each, attributes in self.tags if each == tag]


def check_page(html: str) -> Page:
    """A page is whole, asks for nothing outside of it, and tells its pictures in words."""
    page = Page(html)
    assert not re.search(r"https?:|file:|//[a-z]|@import|javascript:", html)
    references = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("href", "src", "xlink:href", "srcset", "action", "data", "poster")
    ]
    assert references
    for value in [*references, *re.findall(r"url\(\s*['\"]?([^)'\"]*)", html)]:
        assert value and (value.startswith("data:") or value.startswith("#")), value
    assert not {"script", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert not [name for name, count in ids.items() if count > 1]
    assert {str(value)[1:] for value in references if value and value.startswith("#")} <= set(ids)
    assert len(page.all("figure")) == len(page.all("svg"))
    for figure in page.all("figure"):
        assert figure["role"] == "img" and len(str(figure["aria-label"])) > 20
    assert "nan" not in [word.lower() for word in re.findall(r"\w+", page.text)]
    return page


def test_a_report_has_a_page_and_its_pictures(files: dict[str, bytes], counted: ConsensusStatistics) -> None:
    assert set(files) == ALL
    page = check_page(files["index.html"].decode())
    assert len(page.all("svg")) == 5
    for told in (
        "Consensus of 5 models",
        WRONG,
        percent(counted.consensus_ratio),
        "self_attn.q_proj.weight",
        "forget",
    ):
        assert told in page.text
    assert json.loads(files["statistics.json"]) == json.loads(counted.to_json())
    for name in ALL - {"index.html", "statistics.json"}:
        with Image.open(io.BytesIO(files[name])) as image:
            assert image.format == "PNG" and image.width == 8 * 150
            assert len(image.convert("RGB").getcolors(1 << 24)) > 10, "something is drawn"


def test_a_page_has_the_colours_of_light_dark_and_print(files: dict[str, bytes]) -> None:
    html = files["index.html"].decode()
    style, _, rest = html.partition("</style>")
    assert "@media screen and (prefers-color-scheme: dark)" in style and "@media print" in style
    used = set(re.findall(r"var\(--(\w+)\)", rest))
    assert used >= {"ink", "muted", "grid", "blue", "orange", "grey", "red", "font"}
    for name in used:
        assert f"--{name}:" in style
    assert not set(re.findall(r"#[0-9a-f]{6}", rest)) & {*pictures.COLOURS.values(), "#000000"}


def test_same_statistics_give_the_same_files(files: dict[str, bytes], counted: ConsensusStatistics) -> None:
    assert api.render(counted, POINTS) == files


def test_a_model_that_stands_out_is_told_of(counted: ConsensusStatistics) -> None:
    """Also one that did not train the embeddings, which are a large part of this small model."""
    assert outliers(counted) == [1, 2]
    assert counted.models[2].endswith(WRONG)
    (wrong, is_warning), (lazy, _) = sentences(counted)[:2]
    assert is_warning and wrong.startswith(f"Model 3, {WRONG}, stands out: without it ")
    assert "; in most of these its difference has the other sign." in wrong
    assert (
        lazy.startswith("Model 2, ft-1, stands out: ")
        and "; in most of these its difference is exactly zero." in lazy
    )
    equal = replace(counted, dissent=(counted.dissent or [])[:1] * 5)
    assert outliers(equal) == []
    assert outliers(replace(counted, elements=10**6)) == [], "few of many elements"
    silent = [told for told, _ in sentences(counted) if "model.embed_tokens.weight" in told]
    assert silent == [
        "1 of 11 tensors agree nowhere, and have differences of exactly zero: model.embed_tokens.weight. "
        "Perhaps a model did not train them."
    ]


def small(**changes: Any) -> ConsensusStatistics:
    """Statistics of two models and one tensor, with changes."""
    counts = [0] * (len(counting.EDGES) + 1)
    counts[100] = 3
    tensor = {"name": "w", "elements": 10, "agreed": 3, "nonfinite": 0, "vetoed_by_zero": 1}
    prefixes = [
        {"models": k, **dict.fromkeys(counting.OF_PREFIX, 0), "agreed": 12 // (k + 1)} for k in (1, 2)
    ]
    return ConsensusStatistics(**{
        "source": "models", "base": "base", "models": ["a", "b"], "model_count": 2, "min_agreement": 1.0, "elements": 10,
        "agreed": 3, "consensus_ratio": 0.3, "nonfinite": 0, "vetoed_by_zero": 1, "notes": [], "prefixes": prefixes,
        "dissent": [dict.fromkeys(counting.OF_MODEL, 1)] * 2,
        "magnitudes": {"edges": list(counting.EDGES), "counts": counts}, "tensors": [tensor], **changes,
    })  # fmt: skip


def test_names_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of tensors and files may be anything: nothing of them is markup, mathematics or a control character."""
    odd = [
        "<script>alert(1)</script>",
        "$\\frac{",
        "a\x1b[31mb\udc80",
        "x" * 5000,
        "'\"&amp;",
        "http" + "s://x",
        "模型.3.权重",
        "",
    ]
    tensor = small().tensors[0]
    found = small(
        base="<b>", models=["/m/" + odd[0], "/m/" + odd[2] + odd[1]], notes=["<i>note</i>"],
        tensors=[{**tensor, "name": name} for name in odd],
    )  # fmt: skip
    files = api.render(found)
    html = files["index.html"].decode()
    assert all(character.isprintable() or character == "\n" for character in html)
    page = check_page(html.replace("https://x", ""))
    assert len(html) < 400_000
    assert {"script", "i", "b", "frac"}.isdisjoint(tag for tag, _ in page.tags)
    assert "<i>note</i>" in page.text and "$\\frac{" in page.text


@pytest.mark.parametrize(
    "changes, drawn",
    [
        ({"prefixes": None, "dissent": None, "magnitudes": None}, {"layers"}),
        ({"prefixes": None, "dissent": None, "models": []}, {"layers", "magnitudes"}),
        ({"tensors": [], "elements": 0, "agreed": 0, "magnitudes": None}, {"consensus", "models"}),
        ({"vetoed_by_zero": None, "nonfinite": None, "notes": ["a note"], "min_agreement": 0.75}, {"consensus", "models", "layers", "magnitudes"}),
        (
            {"models": ["a"], "model_count": 1, "prefixes": small().prefixes and small().prefixes[:1], "dissent": [dict.fromkeys(counting.OF_MODEL, 0)]},  # type: ignore[index]
            {"layers", "magnitudes"},
        ),
    ],
    ids=["report", "delta", "nothing", "unknown", "one model"],
)  # fmt: skip
def test_what_is_not_known_is_not_drawn(changes: dict[str, Any], drawn: set[str]) -> None:
    files = api.render(small(**changes))
    assert set(files) == {*(f"{name}.png" for name in drawn), "index.html", "statistics.json"}
    page = check_page(files["index.html"].decode()) if drawn else None
    assert page is not None
    assert ("75 % of the models had to agree" in page.text) == ("min_agreement" in changes)


def test_many_models_tensors_and_layers() -> None:
    n = 120
    tensor = small().tensors[0]
    names = [f"model.layers.{layer}.k{kind}.weight" for layer in range(25) for kind in range(50)]
    dissent = [{**dict.fromkeys(counting.OF_MODEL, 0), "sole_by_sign": k % 7} for k in range(n)]
    dissent[77] = {**dict.fromkeys(counting.OF_MODEL, 10)}
    found = small(
        models=[f"/runs/{k}/checkpoint" for k in range(n)], model_count=n, dissent=dissent,
        prefixes=[{"models": k + 1, **dict.fromkeys(counting.OF_PREFIX, 0)} for k in range(n)],
        tensors=[{**tensor, "name": name} for name in names],
    )  # fmt: skip
    files = api.render(found)
    page = check_page(files["index.html"].decode())
    assert "The 1,000 with most elements" in page.text
    assert "77/checkpoint" in page.text and "11 other kinds" in page.text
    assert len(files["index.html"]) < 1_500_000


def test_names_are_split_into_layers_and_kinds() -> None:
    assert split_layer("model.layers.7.mlp.experts.3.up_proj.weight") == (
        7,
        "model.layers.*.mlp.experts.*.up_proj.weight",
    )
    assert split_layer("lm_head.weight") == (None, "lm_head.weight")
    assert split_layer("layer1.0.conv1.weight") == (0, "layer1.*.conv1.weight")
    assert split_layer("0.weight") == (0, "*.weight")
    assert split_layer("a.١.b") == (None, "a.١.b"), "a digit of another script"
    assert split_layer("") == (None, "")


def test_tensors_are_summed_by_layer_and_kind() -> None:
    def tensor(name: str, agreed: int, elements: int) -> dict[str, Any]:
        return {"name": name, "agreed": agreed, "elements": elements}

    found = by_layer([
        tensor("embed", 1, 4), tensor("h.1.w", 1, 2), tensor("h.0.w", 1, 4), tensor("h.0.e.0.u", 1, 4), tensor("h.0.e.1.u", 3, 4),
        tensor("h.0.empty", 0, 0),
    ])  # fmt: skip
    assert found.layers == [None, 0, 1]
    assert found.kinds == ["h.*.w", "h.*.e.*.u", "embed"]
    assert found.ratios == [[None, 0.25, 0.5], [None, 0.5, None], [0.25, None, None]]
    assert by_layer([tensor("embed", 1, 4), tensor("head", 1, 2)]) == (
        [None],
        ["embed", "head"],
        [[0.25], [0.5]],
    )
    many = by_layer([tensor(f"h.0.k{k}", 1, k + 2) for k in range(MAX_KINDS + 5)])
    assert (len(many.kinds), many.kinds[-1]) == (MAX_KINDS, "6 other kinds")
    assert many.ratios[-1] == [6 / sum(range(2, 8))]


def test_names_are_short() -> None:
    assert without_common_prefix(["m.layers.*.a.weight", "m.layers.*.b.weight", "m.embed"]) == [
        "a.weight",
        "b.weight",
        "m.embed",
    ]
    assert without_common_prefix(["*.weight", "*.bias"]) == ["weight", "bias"]
    assert without_common_prefix(["*.weight", "embed"]) == ["*.weight", "embed"]
    assert model_labels(["/a/x", "/b/y/"], 2) == ["x", "y"]
    assert model_labels(["/a/last", "/b/last"], 2) == ["a/last", "b/last"]
    assert model_labels([], 2) == ["model 1", "model 2"]
    assert shortened("abcdefghij", 7) == "abc…hij"
    assert shortened("a\nb", 9) == "a\\nb"
    assert [percent(x) for x in (0, 1e-5, 0.0123, 0.5, 1)] == [
        "0 %",
        "0.001 %",
        "1.23 %",
        "50.0 %",
        "100.0 %",
    ]


def test_scores_of_a_scale_on_several_lines_are_one_point(tmp_path: Path) -> None:
    """A bracket search with two functions writes each score on a line of its own."""
    path = tmp_path / "points.jsonl"
    path.write_text('{"scale": 1, "retain": 0.9}\n{"scale": 1, "forget": 0.2}\n')
    assert read_points(path) == [(1, 0.2, 0.9)]


def test_an_axis_without_dissent_has_readable_numbers() -> None:
    dissent = [dict.fromkeys(counting.OF_MODEL, 0) for _ in small().models]
    drawn = pictures.draw(small(dissent=dissent))
    (figure,) = (picture.figure for picture in drawn if picture.name == "models")
    assert [axes.get_xlim() for axes in figure.axes] == [(0, 0.01)] * 2


def test_points_are_read(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    path.write_text(
        '{"format": 1}\n{"scale": 1, "forget": 0.2, "retain": 0.9}\n\n{"scale": 0, "forget": 0.8, "retain": 1.0, "seconds": 2}\n'
        '{"scale": 2, "retain": null}\n{"scale": 1, "forget": 0.3, "retain": 0.9}\n'
    )
    found = read_points(path)
    assert found == [(0, 0.8, 1.0), (1, 0.3, 0.9), (2, None, None)]
    assert retain_floor(found) == 0.95
    assert retain_floor(found[1:]) is None
    for line, told in (
        ("[1]", "line 1 is a JSON list, expected an object"),
        ('{"scale": "1"}', "line 1: {'scale': '1'}, expected numbers as scale, forget and retain"),
        ('{"scale": null}', "line 1: {'scale': None}, expected numbers"),
        ('{"scale": 1, "forget": true}', "line 1: "),
        ('{"scale": 1, "forget": NaN}', "line 1 is not JSON"),
        ('{"scale": 1, "forget": 1e999}', "line 1: "),
        ("", "no points, expected lines of JSON with scale, forget and retain"),
    ):
        path.write_text(line)
        with pytest.raises(InputError, match="^" + re.escape(f"{path}: {told}")):
            read_points(path)


def test_a_report_is_written_whole_and_replaced_only_if_asked(
    files: dict[str, bytes], counted: ConsensusStatistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "render", lambda *_: files)
    out = tmp_path / "out"
    assert nm.write_report(counted, out) == out / "index.html"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(InputError, match=r"out: exists, expected no such path \(or --overwrite\)"):
        nm.write_report(counted, out)
    (out / "scales.png").unlink()
    nm.write_report(counted, out, overwrite=True)
    assert {path.name for path in out.iterdir()} == ALL
    (out / "mine.txt").touch()
    with pytest.raises(InputError, match=r"out: has 'mine\.txt', expected a report to replace"):
        nm.write_report(counted, out, overwrite=True)
    assert (out / "mine.txt").exists()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(out)
    for path, told in (
        ("empty", r"empty: has no index\.html, expected a report"),
        ("file", "file: not a directory"),
        ("link", "link: not a directory"),
        ("no/out", "no: no such directory, expected one to hold out"),
        ("file/out", "file: no such directory"),
    ):
        with pytest.raises(InputError, match=told):
            nm.write_report(counted, tmp_path / path, overwrite=True)
    with pytest.raises(InputError, match="output: 3, expected a path"):
        nm.write_report(counted, 3)  # type: ignore[arg-type]


def test_a_report_that_cannot_be_moved_leaves_the_former(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    api.publish(files, out)
    rename = api.os.rename

    def fail(source: Any, destination: Any) -> None:
        if Path(source).name == "report":
            raise OSError(28, "No space left on device")
        rename(source, destination)

    monkeypatch.setattr(api.os, "rename", fail)
    with pytest.raises(OSError, match="No space left"):
        api.publish({"index.html": b""}, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_a_library_that_is_missing_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(pictures, "as_svg", lambda _: "")
    monkeypatch.setattr(pictures, "as_png", lambda _: b"")
    with pytest.raises(InputError, match=rf"a report needs {missing}: pip install 'negmerge_fast\[report\]'"):
        api.render(small())


def test_the_median_of_the_means_is_in_its_bin() -> None:
    edges = counting.EDGES
    middle = findings.median_magnitude(small())
    assert middle is not None and edges[99] < middle < edges[100]
    assert findings.median_magnitude(small(magnitudes=None)) is None
