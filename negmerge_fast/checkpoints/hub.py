"""Names of models of the Hugging Face hub (`org/name`, `org/name@revision`), and its cache on disk.

What is in the cache is taken from there, without a network and without huggingface_hub. That fetches the rest, if it is installed.
A path that exists always wins.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..core.errors import InputError
from .contents import may_be_weights

# Compiled when they are used: most paths are neither.
_NAME = (
    r"(?a:(?P<name>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95})(@(?P<revision>[\w.+-]+(/[\w.+-]+)*))?)"
)
# A file that is not there is none of the hub.
_FILES = (".safetensors", ".npy", ".json", ".jsonl", ".pt", ".pth", ".bin", ".ckpt", ".tar", ".git")
MAIN = "main"

_SNAPSHOT = r"(?:.*/)?models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)"
_SHARD = r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<tail>\.[a-z]+)"
_MAX_INDEX_BYTES = 100_000_000

# Of a folder, the first of these that is there is loaded: a file, or an index and its shards.
_USUAL = (
    "model.safetensors", "model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors", "delta.safetensors", "delta.safetensors.index.json",
)  # fmt: skip
_USUAL_TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json", "diffusion_pytorch_model.bin")
_TORCH = (".bin", ".pt", ".pth", ".ckpt", ".tar")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
# Files that name folders with weights, and folders without weights that a model has.
_NAMING_PARTS = ("modules.json", "model_index.json", "router_config.json")
_WITHOUT_WEIGHTS = "additional_chat_templates"
_MAX_TOLD = 4


class Found(NamedTuple):
    """Where a checkpoint is. note: what a user should know of how it was found, if anything."""

    path: Path
    note: str | None = None


def resolve(path: str | os.PathLike[str]) -> Path:
    """Return where a checkpoint is. The arguments and errors are those of find."""
    return find(path).path


def find(path: str | os.PathLike[str]) -> Found:
    """Find a checkpoint.

    Args:
        path: A path; the root of a cache of the hub that holds one model; or, as text, the name of a model of the hub. A name is looked for
            in the cache and, unless HF_HUB_OFFLINE is set, fetched into it by huggingface_hub.

    Returns:
        The folder of a revision, or else the path as it is: whoever opens it says what is wrong with it.

    Raises:
        InputError: If a cache holds several models, or what a name names is not there and cannot be fetched.
        OSError: If the cache cannot be written.
    """
    if os.path.lexists(path):
        snapshot = _in_cache(Path(path))
        return (
            Found(snapshot, f"{Path(path)}: {name_of(snapshot) or snapshot}")
            if snapshot
            else Found(Path(path))
        )
    match = re.fullmatch(_NAME, path) if isinstance(path, str) and not path.endswith(_FILES) else None
    if match is None or "--" in match["name"] or ".." in match[0]:
        return Found(Path(path))
    return _named(match["name"], match["revision"] or MAIN, str(path))


def name_of(path: Path) -> str | None:
    """What the hub calls the snapshot at a path: `org/name@revision`. None if it is no snapshot of the hub's cache."""
    match = re.fullmatch(_SNAPSHOT, str(path)) if "models--" in str(path) else None
    return f"{match['org']}/{match['name']}@{match['revision']}" if match else None


def cache_folder() -> Path:
    """The folder of the hub's cache, by the environment, as huggingface_hub has it."""
    environment = os.environ
    home = environment.get("HF_HOME") or os.path.join(
        environment.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "huggingface"
    )
    folder = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(os.path.expanduser(folder or os.path.join(home, "hub"))))


def _named(name: str, revision: str, given: str) -> Found:
    folder = cache_folder() / f"models--{name.replace('/', '--')}"
    snapshot = _cached(folder, revision)
    missing = ["all weights"] if snapshot is None else list(_missing(folder, snapshot))
    if snapshot and not missing:
        return Found(snapshot, f"{given}: revision {snapshot.name} in the cache")
    try:
        snapshot = _fetch(name, revision, given, folder.parent)
        return Found(snapshot, f"{given}: revision {snapshot.name}")
    except InputError as error:
        lacking = _listed(missing)
        if snapshot is None:
            others = _cached_revisions(folder)
            held = f", which has {_listed([f'{name}@{each}' for each in others])}" if others else ""
            raise InputError(f"{error}; not in the cache {folder.parent}{held}") from None
        if any(map(_is_weights, missing)):
            raise InputError(f"{error}; in the cache {snapshot} is without {lacking}") from None
        return Found(snapshot, f"{given}: revision {snapshot.name} in the cache, without {lacking}")


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _MAX_TOLD} more" if len(names) > _MAX_TOLD else ""
    return ", ".join(names[:_MAX_TOLD]) + rest


# --- The cache on disk -------------------------------------------------------------------------------------------


def _cached(folder: Path, revision: str) -> Path | None:
    """The snapshot of a revision: a branch, a tag or a commit."""
    for commit in (revision, _ref(folder, revision)):
        if commit and "/" not in commit and (folder / "snapshots" / commit).is_dir():
            return folder / "snapshots" / commit
    return None


def _ref(folder: Path, revision: str) -> str:
    try:
        return (folder / "refs" / revision).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _cached_revisions(folder: Path) -> list[str]:
    try:
        return sorted(each.name for each in os.scandir(folder / "snapshots") if each.is_dir())
    except OSError:
        return []


def _in_cache(path: Path) -> Path | None:
    """The one snapshot in a folder of the cache: of a model, its snapshots, or the root. None if the folder is something else."""
    try:
        names = set(os.listdir(path))
    except (OSError, ValueError):  # no folder, or one that cannot be read
        return None
    if path.name == "snapshots" and {"refs", "blobs"} & set(_names(path.parent)):
        return _in_cache(path.parent)
    if any(may_be_weights(name) for name in names):
        return None
    if "snapshots" in names and {"refs", "blobs"} & names:
        return _only_revision(path)
    models = [
        name for name in sorted(names) if name.startswith("models--") and _cached_revisions(path / name)
    ]
    if len(models) > 1:
        listed = _listed([name.removeprefix("models--").replace("--", "/", 1) for name in models])
        raise InputError(f"{path}: a cache of the hub with {len(models)} models, expected one of {listed}")
    if models:
        return _only_revision(path / models[0])
    return _in_cache(path / "hub") if "hub" in names else None


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _only_revision(folder: Path) -> Path | None:
    """The snapshot of a model that its name alone means: of the branch main, or the only one."""
    revisions, current = _cached_revisions(folder), _ref(folder, MAIN)
    if current in revisions:
        return folder / "snapshots" / current
    if len(revisions) > 1:
        listed = _listed([str(folder / "snapshots" / each) for each in revisions])
        raise InputError(
            f"{folder}: a cache of the hub with {len(revisions)} revisions, expected one of {listed}"
        )
    return folder / "snapshots" / revisions[0] if revisions else None


def _missing(folder: Path, snapshot: Path) -> Iterator[str]:
    """What of a snapshot is not in the cache, as far as its files tell, and the list of them that huggingface_hub keeps."""
    held = {
        os.path.relpath(os.path.join(at, name), snapshot)
        for at, _, names in os.walk(snapshot)
        for name in names
        if os.path.exists(os.path.join(at, name))  # links may lead to nothing
    }
    listed = _tree(folder / "trees" / f"{snapshot.name}.json")
    expected = (
        files_to_fetch(listed)
        if listed
        else [name for each in sorted(held) for name in _shards(snapshot, each)]
    )
    yield from (name for name in dict.fromkeys(expected) if name not in held)
    if not any(map(_is_weights, held)):
        yield "all weights"


def _tree(path: Path) -> list[str]:
    try:
        files = _read_json(path)["files"]
        return [name for name in files if isinstance(name, str)]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []


def _read_json(path: Path) -> dict[str, dict[str, str]]:
    with open(path, "rb") as file:
        found: dict[str, dict[str, str]] = json.loads(file.read(_MAX_INDEX_BYTES))
        return found


def _shards(snapshot: Path, name: str) -> list[str]:
    """The names of the shards that an index or another shard says there are."""
    if match := re.fullmatch(_SHARD, name):
        count = min(int(match["count"]), 10_000)
        return [f"{match['stem']}-{k + 1:05}-of-{match['count']}{match['tail']}" for k in range(count)]
    if not name.endswith(".index.json"):
        return []
    try:
        values = {str(value) for value in _read_json(snapshot / name)["weight_map"].values()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []  # whoever opens it says what is wrong with it
    return sorted(os.path.join(os.path.dirname(name), value) for value in values)


def _is_weights(name: str) -> bool:
    return name == "all weights" or name.endswith((".safetensors", *_TORCH))


# --- What is fetched ---------------------------------------------------------------------------------------------


def files_to_fetch(names: Iterable[str]) -> list[str]:
    """Of the names of a repository's files those that a merge reads or copies: no weights in formats that it does not load."""
    by_folder: dict[str, list[str]] = {}
    for name in names:
        if not any(part.startswith(".") for part in name.split("/")):
            folder, _, last = name.rpartition("/")
            by_folder.setdefault(folder, []).append(last)
    parts = any(name in by_folder.get("", ()) for name in _NAMING_PARTS)
    chosen = []
    for folder, held in by_folder.items():
        if folder and not parts and folder != _WITHOUT_WEIGHTS:
            continue
        # Beside folders with weights, a pipeline has the whole of it once more in other formats.
        whole = "model_index.json" in held
        weights = set() if whole else _weights(held)
        others = {name for name in held if not may_be_weights(name) and not name.endswith(".index.json")}
        chosen += [f"{folder}/{name}" if folder else name for name in held if name in weights | others]
    return chosen


def _weights(names: Sequence[str]) -> set[str]:
    """The weights of a folder and their index."""
    adapters = [name for name in _ADAPTERS if name in names][:1]
    for usual, tails in ((_USUAL, (".safetensors",)), (_USUAL_TORCH, _TORCH)):
        for name in usual:
            if name in names:
                stem = name.removesuffix(".index.json").rpartition(".")[0]
                shards = [n for n in names if (m := re.fullmatch(_SHARD, n)) and m["stem"] == stem]
                return {name, *(shards if name.endswith(".json") else ()), *adapters}
        # Other names, and variants such as model.fp16.safetensors.
        if others := [n for n in names if n.endswith((*tails, ".index.json")) and n not in _ADAPTERS]:
            held = [n for n in others if not n.endswith(".json")]
            if held and not (adapters and tails is _TORCH):  # training_args.bin lies beside adapters
                return {
                    *(n for n in others if n in held or n.rpartition(".index")[0].endswith(tails)),
                    *adapters,
                }
    return set(adapters)


def _fetch(name: str, revision: str, given: str, cache: Path) -> Path:
    """Fetch what is needed of a model. Raises InputError if that cannot be done."""
    problem = f"{given}: no such file or directory, and the hub"
    if _is_offline():
        option = "" if revision == MAIN else f" --revision {revision}"
        raise InputError(
            f"{problem} is not asked, as HF_HUB_OFFLINE is set: fetch it with `hf download {name}{option}`"
        )
    import glob

    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            f"{problem} can only be asked with huggingface_hub: pip install huggingface_hub"
        ) from None
    try:
        with _silent():
            listed = huggingface_hub.HfApi().model_info(name, revision=revision).siblings or []
            patterns = [glob.escape(each) for each in files_to_fetch(file.rfilename for file in listed)]
            if not any(map(_is_weights, patterns)):
                raise InputError(f"{problem} has no weights under this name that can be read")
            fetched = huggingface_hub.snapshot_download(
                name, revision=revision, cache_dir=str(cache), allow_patterns=patterns
            )
    except InputError:
        raise
    except Exception as error:
        raise _told(error, problem, name, revision) from None
    return Path(fetched)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep huggingface_hub from warnings, as errors are told of in a line, and from progress bars that nobody sees."""
    import logging  # where something is downloaded, not for every merge

    from huggingface_hub import utils
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity

    hidden = not sys.stderr.isatty() and not utils.are_progress_bars_disabled()
    level = get_verbosity()
    set_verbosity(logging.ERROR)
    if hidden:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        set_verbosity(level)
        if hidden:
            utils.enable_progress_bars()


def _is_offline() -> bool:
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def _told(error: Exception, problem: str, name: str, revision: str) -> Exception:
    """What a user is told of an error of huggingface_hub. Errors of the disk are theirs."""
    kind = {each.__name__ for each in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "GatedRepoError" in kind or status == 403:
        return InputError(
            f"{problem} wants its terms accepted first, at https://huggingface.co/{name}, and `hf auth login`"
        )
    if "RevisionNotFoundError" in kind:
        return InputError(f"{problem} has {name} without a revision {revision}")
    if "RepositoryNotFoundError" in kind or status in (401, 404):
        return InputError(f"{problem} has no such model, or a private one: `hf auth login`")
    if (
        isinstance(error, OSError)
        and error.errno is not None
        and not isinstance(error, ConnectionError)
        and status is None
    ):
        return error
    text = " ".join(str(error).split()) or "no reason given"
    return InputError(f"{problem} cannot be asked: {type(error).__name__}: {text[:200]}")
