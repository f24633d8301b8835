"""Finds words that this code base once had for what its field has terms for; part of `make lint`.

Three tables say which words, and what to use instead. NAMES are of identifiers, since most of these words are plain English in a
sentence; PROSE is of words that nobody would use there either: comments, strings, docs and names of tests; PATHS is of files.
LEGITIMATE lists what stays, with the reason. --count prints how often each is found.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

PACKAGE = r"negmerge_fast/|kernels/|csrc/"
BENCHMARK = r"negmerge_fast/(measure|benchmark)/|bench/"
KERNELS = r"csrc/|kernels/|negmerge_fast/(reference|ops)\.py|negmerge_fast/backends/|negmerge_fast/tensors/"


class Term(NamedTuple):
    """old: of an identifier without underscores at its ends. kinds: of identifiers, all if empty. where: paths, all if empty."""

    old: str
    new: str
    kinds: str = ""
    where: str = ""


# Kinds: class, def, variable, parameter, field (of a class or of self), attribute (in use), name (in use), keyword.
_BOUND = "def variable parameter field"
_FIELD = "def field attribute"
NAMES = [
    # Bounds.
    Term(r"(.*_)?(MOST|LONGEST|FEWEST|SHORTEST|LEAST|DEEPEST)(_.*)?|k(Most|Fewest|Least|Longest|Shortest)\w*", "MAX_…, MIN_…"),
    # Addresses, and streams of a device.
    Term(r"Stream", "Operand, CudaStream", "class"),
    Term(r"Straight", "SyncStream"),
    # Callbacks, workloads, directories, arguments.
    Term(r"(.*_)?(work|works|WORK)(_(as|through))?|Work", "task, workload, staging_dir, args, process_chunk, launch"),
    Term(r"(.*_)?(look|looked|looker|looks)|Look", "flat_item, prune, poll, validator, inspect_…, on_progress, counter"),
    Term(r"(.*_)?(share|shares|SHARE|SHARING)|Shares", "partition, shard, reflink, overlap, rank-N.json, fraction"),
    Term(r"Run", "Range", where=PACKAGE),
    Term(r"runs", "ranges, counts, results"),
    Term(r"run", "range_, counts, tiles_per_program, results", "variable parameter", PACKAGE),
    Term(r"LONGEST_RUN", "MAX_TILES_PER_PROGRAM"),
    Term(r"(?!under_way)(.*_)?(way|ways|WAYS?)(_.*)?|Ways?", "placement, candidate, case"),
    Term(r"(.*_)?(room|rooms|ROOMS?)(_.*)?", "available_bytes, slots, remaining, create"),
    # Ranks, and who does what.
    Term(r"part|left|first", "slice_plan, subtract, on_rank0", "def"),
    Term(r"(.*_)?(alone|ALONE)|Alone", "SingleProcess, SINGLE, single"),
    Term(r"settled?", "on_result, flush, release_slot"),
    Term(r"Elsewhere\w*|elsewhere", "PeerError"),
    Term(r"guilty|GLANCE|NAP|PATIENCE|FAREWELL", "failed_rank, POLL_INTERVAL_S, JOIN_TIMEOUT_S"),
    Term(r"together|dead|aside|lives", "all_gather, dead_peer, is_alive", where=r"negmerge_fast/"),
    # Buffers and chunks.
    Term(r"(.*_)?(strokes?|STROKES?)(_.*)?|Strokes?", "chunk, chunk_bytes"),
    Term(r"(.*_)?(lanes?|LANES?)(_.*)?|(Device)?Lanes?", "WorkerBuffers, buffers, worker"),
    Term(r"hold", "reserve", _FIELD),
    Term(r"here|there", "host, device, current, other", where=PACKAGE),
    Term(r"lots?|Lots?", "shard, TensorGroup"),
    Term(r"windows?|WINDOWS?|Windows?", "Probe", where=PACKAGE),
    Term(r"(.*_)?(pieces?|PIECES?)(_.*)?|Pieces?", "chunk"),
    Term(r"(.*_)?members?(_.*)?|Members?", "TensorSlice, slices"),
    Term(r"Source", "ByteRange"),
    Term(r"forms?(_in)?|Forms?", "TensorSpec, spec"),
    # Data skipping, bandwidths, self-test.
    Term(r"(.*_)?unread(_.*)?|Unread", "skipping, skipped"),
    Term(r"calm|spare", "full_chunks, max_dissenters"),
    Term(r"needed", "a plain name", _FIELD, PACKAGE),
    Term(r"(.*_)?costs|Costs", "Throughput, throughput"),
    Term(r"link|reading|merging|through_gpu", "h2d_bandwidth, read_bandwidth, merge_bandwidth", _FIELD),
    Term(r"(link|reading|merging|copying)_speed", "h2d_bandwidth, read_bandwidth, merge_bandwidth, copy_bandwidth"),
    Term(r"(.*_)?(trust|distrust)(_.*)?", "selftest, needs_selftest"),
    Term(r"tried|TRIED", "needs_selftest, failures", where=PACKAGE),
    # Memory of tensors and arrays.
    Term(r"(.*_)?foreign(_.*)?|Foreign", "arrays"),
    Term(r"(is_)?sharded(_floats)?", "dtensor", where=PACKAGE),
    Term(r"overlap|table_of", "aliasing, descriptors", where=PACKAGE),
    Term(r"NUMBERS", "DTYPE_CODES"),
    # Progress on disk.
    Term(r"made_of|Made", "fingerprint"),
    Term(r"Record", "ProgressRecord"),
    Term(r"(.*_)?tally|Tally", "Progress"),
    Term(r"Done|Counted", "ChunkResult, ChunkCounts"),
    # Files and paths.
    Term(r"(.*_)?strangers?(_.*)?", "unknown_files"),
    Term(r"others", "extra_files", "field attribute"),
    Term(r"(.*_)?left_out", "skipped_files"),
    Term(r"kept", "unchanged", "field attribute", r"negmerge_fast/(plan|cli|streaming)"),
    Term(r"places?|Places?|PLACES", "destination, path, position, samples", where=PACKAGE),
    Term(r"targets?", "path, destination", _BOUND + " attribute", r"negmerge_fast/"),
    Term(r"beside", "manifest_path"),
    Term(r"visible|brief|BRIEF|ticks?|Tick", "escape, short_repr, on_progress"),
    # Kernels.
    Term(r"see(_.*)?|Seen", "accumulate, Accumulator"),
    Term(r"(n_)?(above|below)", "positive, negative", where=KERNELS),
    Term(r"(k)?[Aa]like", "same_dtype"),
    # Benchmarks.
    Term(r"Limit|limits?", "roofline", where=r"negmerge_fast/(measure|benchmark)/"),
    Term(r"(.*_)?(rivals?|RIVALS)(_.*)?", "baselines"),
    Term(r"peers?|PEERS", "baseline, BASELINES", where=BENCHMARK),
    Term(r"(.*_)?trials?(_.*)?|Trials?", "timing, selftest"),
]  # fmt: skip

PROSE = [
    Term(r"lanes?", "worker, worker's buffers"),
    Term(r"strokes?", "chunk, read"),
    Term(r"unread", "skipped, not read"),
    Term(r"tally", "progress"),
    Term(r"(?<!a )lots?(?! of)", "shard, group"),
    Term(r"pieces?", "chunk"),
    Term(r"members?", "slice"),
    Term(r"strangers?('s|s'|s)?", "unknown file"),
    Term(r"rooms|(every|each|a|which) room", "package, available bytes"),
    Term(r"windows?", "probe", where=PACKAGE),
    Term(r"distrust|trials?|failed when tried|not yet tried|tried (on|before)", "self-test, timing"),
    Term(r"(the|a|its|one|which|each) ways? (of|costs|to merge)( (a|the|its))?( \w+)?", "placement, bandwidth, candidate"),
    Term(r"way of (files|bytes)", "bandwidth, placement"),
    Term(r"left out", "skipped, not measured", where=r"negmerge_fast/|bench/|docs/|README"),
    Term(r"rivals?", "baselines"),
    Term(r"peers", "baselines", where=BENCHMARK + r"|README|docs/"),
    Term(r"farewell|glances?|naps?", "timeout, poll"),
]  # fmt: skip

PATHS = [
    Term(r"negmerge_fast/(?!core/)([^/]*/)*(costs|flat|foreign|lanes|layout|linux|overlap|rule|sharded|stream|table|trust|unread|workers)\.py", "see docs/design.md"),
    Term(r"negmerge_fast/measure/.*", "negmerge_fast/benchmark/"),
    Term(r"(tests|bench)/([^/]*/)*(test_)?(lanes|unread|sharded|sharded_ranks|foreign|parts|house|ways|strokes|peers)\.py", "the name of the module that it tests"),
]  # fmt: skip


class Legitimate(NamedTuple):
    """What stays: words, in files, on lines that look so."""

    word: str
    where: str
    line: str
    reason: str


LEGITIMATE = [
    Legitimate(r"lanes?", r"csrc/|kernels/", r"", "of a vector register: the field's word"),
    Legitimate(r"windows?", r"csrc/", r"", "of a pipeline of loads: the field's word"),
    Legitimate(r"strokes?|peers?", r"", r"(strokes|peers)\.jsonl|[\"']peers[\"']", "a committed result file and its suite"),
    Legitimate(r"strokes?|peers?|runs", r"tests/test_public\.py", r"", "names of result files, a field of the journal"),
    Legitimate(r"runs", r"bench/", r"--runs|given\.runs", "an option of a script"),
    Legitimate(r"link", r"", r"os\.link", "a hard link"),
    Legitimate(r"way", r"", r"\brow\(.*\bway=", "a field of a row"),
    Legitimate(r"max_work", r"", r"shares_memory", "an argument of numpy"),
    Legitimate(r"targets?", r"", r"data\.target", "the digits of scikit-learn's images"),
    Legitimate(r"pieces?|lots?|lanes?|strokes?|members?", r"docs/", r"^\s*(- )?members:", "an option of mkdocstrings"),
    Legitimate(r"members?", r"mkdocs\.yml", r"", "an option of mkdocstrings"),
    Legitimate(r"targets?", r"", r"target=|get_current_target", "an argument of threads and of Triton"),
    Legitimate(r"place", r"negmerge_fast/.*\.py", r"\bplace\(|import place", "an adapter on its base"),
    Legitimate(r"others", r"", r"needs_input_grad", "torch's other arguments"),
]  # fmt: skip

TEXT = {".md", ".toml", ".yml", ".yaml", ".cff"}
CPLUSPLUS = {".h", ".cpp", ".cu"}


class Found(NamedTuple):
    path: str
    line: int
    word: str
    new: str


class Rules:
    """Those of a table that apply to one file, as one pattern: few words match, and only those are asked one by one."""

    def __init__(self, terms: Iterable[Term], path: str) -> None:
        self.terms = [term for term in terms if not term.where or re.match(term.where, path)]
        self.any = re.compile("|".join(f"(?:{term.old})" for term in self.terms) or r"(?!)")

    def of(self, name: str, kind: str) -> str | None:
        """What to use instead of an identifier."""
        plain = name.strip("_")
        if not self.any.fullmatch(plain):
            return None
        fitting = (
            t for t in self.terms if (not t.kinds or kind in t.kinds.split()) and re.fullmatch(t.old, plain)
        )
        return next((term.new for term in fitting), None)

    def within(self, text: str) -> Iterator[tuple[int, str, str]]:
        """Where words stand in a text, and what to use instead."""
        for term in self.terms:
            for match in re.finditer(rf"(?<![\w/])(?:{term.old})(?![\w(]|\.\w)", text, re.IGNORECASE):
                yield match.start(), match[0], term.new


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Line, name and kind of each identifier of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.lineno, node.name, "class"
            for each in node.body:
                if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                    yield each.lineno, each.target.id, "field"
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.lineno, node.name, "def"
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg, "parameter"
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.value.lineno, node.arg, "keyword"
        elif isinstance(node, ast.Attribute):
            yield (
                node.end_lineno or node.lineno,
                node.attr,
                "field" if isinstance(node.ctx, ast.Store) else "attribute",
            )
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id, "variable" if isinstance(node.ctx, ast.Store) else "name"
        elif isinstance(node, ast.alias):
            yield node.lineno, node.name.rpartition(".")[2], "name"
            if node.asname:
                yield node.lineno, node.asname, "variable"


def python(text: str) -> tuple[list[tuple[int, str, str]], list[tuple[int, str]]]:
    """The identifiers of a module, and its prose: comments, strings and the names of its tests."""
    names, prose = [], []
    for line, name, kind in identifiers(ast.parse(text)):
        if kind == "def" and name.startswith("test_"):
            prose.append((line, name.replace("_", " ")))
        else:
            names.append((line, name, kind))
    literal = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in literal:
            prose.append((token.start[0], token.string))
    return names, prose


def cplusplus(text: str) -> tuple[list[tuple[int, str, str]], list[tuple[int, str]]]:
    names, prose = [], []
    for number, line in enumerate(text.splitlines(), 1):
        code, _, comment = line.partition("//")
        prose.append((number, comment))
        if not code.startswith("#include"):
            names += [
                (number, name, "name") for name in re.findall(r"[A-Za-z_]\w*", re.sub(r'"[^"]*"', "", code))
            ]
    return names, prose


def search(path: str, text: str) -> Iterator[Found]:
    suffix = Path(path).suffix
    names: list[tuple[int, str, str]] = []
    prose = list(enumerate(text.splitlines(), 1))
    if suffix in (".py", ".pyi"):
        names, prose = python(text)
    elif suffix in CPLUSPLUS:
        names, prose = cplusplus(text)
    of_names, of_prose = Rules(NAMES, path), Rules(PROSE, path)
    for line, name, kind in names:
        if new := of_names.of(name, kind):
            yield Found(path, line, name, new)
    for line, words in prose:
        for at, word, new in of_prose.within(words):
            yield Found(path, line + words.count("\n", 0, at), word, new)


def is_legitimate(found: Found, lines: list[str]) -> bool:
    line = lines[found.line - 1] if found.line else ""
    return any(
        re.fullmatch(each.word, found.word.strip("_"), re.IGNORECASE)
        and re.match(each.where, found.path)
        and re.search(each.line, line)
        for each in LEGITIMATE
    )


def files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    return [path for path in listed if (ROOT / path).is_file() and path != ".ci/terms.py"]


def main() -> int:
    found: set[Found] = set()
    for path in files():
        at_path = [Found(path, 0, path, term.new) for term in PATHS if re.fullmatch(term.old, path)]
        found |= {each for each in at_path if not is_legitimate(each, [])}
        if Path(path).suffix in {".py", ".pyi"} | CPLUSPLUS | TEXT or Path(path).name in (
            "Makefile",
            "CMakeLists.txt",
            "run",
        ):
            text = (ROOT / path).read_text(encoding="utf-8")
            lines = text.splitlines()
            found |= {each for each in search(path, text) if not is_legitimate(each, lines)}
    if "--count" in sys.argv[1:]:
        counts = Counter((each.word.strip("_").lower(), each.new) for each in found if each.line)
        for (word, new), count in counts.most_common():
            print(f"{count:5} {word} -> {new}")
        print(f"{sum(counts.values()):5} in all, and {sum(not each.line for each in found)} names of files")
    else:
        for each in sorted(found):
            print(
                f"{each.path}:{each.line}: {each.word} -> {each.new}"
                if each.line
                else f"{each.path} -> {each.new}"
            )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
