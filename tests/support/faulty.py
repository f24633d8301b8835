"""Merges that are killed, fail or are interrupted at each call that changes the file system, and what is found afterwards.

A program that runs under tests/support/faults.c. It imports all that a merge needs once and forks a process for each merge. What
does not hold is written to a file as JSON: for each case a list of lines.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import disk
import numpy as np
from small_chunks import RECORD_EVERY_CHUNK

import negmerge_fast as nm
from negmerge_fast.cli import commands, main  # noqa: F401  what a command imports
from negmerge_fast.streaming import api  # noqa: F401  what a merge imports

NONE, KILL_BEFORE, KILL_AFTER, KILL_GROUP, FAIL, SIGNAL, PAUSE = range(7)
KILLED = 77
SCALE, OLD_SCALE = 0.9, 0.3
_TIMEOUT_S = 60
# Of a process that answers, is killed, hangs, or is stopped by a signal before it has begun.
_ENDS = (0, KILLED, -signal.SIGKILL, -signal.SIGALRM, 130, 143)

# What a folder holds: the bytes of files, None of folders, by their paths.
Tree = dict[str, bytes | None]


class Case(NamedTuple):
    """A kind of merge.

    Attributes:
        kind: "directory" or "file".
        old: Whether there is an older output, which is replaced.
        resume: Whether --resume is given.
        exchange: Whether the file system can exchange directories.
    """

    kind: str
    old: bool = False
    resume: bool = False
    exchange: bool = True

    def __str__(self) -> str:
        words = [self.kind, "overwrite" if self.old else "new", "resume" if self.resume else ""]
        return " ".join(filter(None, [*words, "" if self.exchange else "without-exchange"]))


CASES = [
    Case(kind, old, resume)
    for kind in ("directory", "file")
    for old in (False, True)
    for resume in (False, True)
]
CASES += [Case("directory", True, resume, exchange=False) for resume in (False, True)]


class Action(NamedTuple):
    """What is done at a call; `is_command`: by the command line, or by a call of the library."""

    what: int
    value: int = 0
    is_command: bool = False


NOTHING = Action(NONE)
ACTIONS = {
    "killed before": Action(KILL_BEFORE),
    "killed after": Action(KILL_AFTER),
    "disk full at": Action(FAIL, errno.ENOSPC),
    "input/output error at": Action(FAIL, errno.EIO),
    "Ctrl-C after": Action(SIGNAL, signal.SIGINT),
    "SIGTERM after": Action(SIGNAL, signal.SIGTERM, is_command=True),
}


class Shim:
    """tests/support/faults.c, in this process and in those that it forks."""

    def __init__(self, folder: Path) -> None:
        self._library = ctypes.CDLL(None)
        self._library.fault_call.restype = ctypes.c_char_p
        self._library.fault_watch(os.fsencode(folder))

    def arm(self, action: Action = NOTHING, at: int = 0) -> None:
        self._library.fault_arm(action.what, at, action.value)

    def without_exchange(self) -> None:
        self._library.fault_without_exchange(1)

    def record(self, descriptor: int) -> None:
        self._library.fault_record(descriptor)

    @property
    def calls(self) -> int:
        """How many calls the last process made that was armed."""
        return int(self._library.fault_count())

    @property
    def call(self) -> str:
        """The call at which something was done."""
        return re.sub(r"\.negmerge-\w+", ".negmerge-*", self._library.fault_call().decode())


class Outcome(NamedTuple):
    status: int
    said: str = ""


class Models:
    """The inputs, and the place of the output beside them.

    Attributes:
        place: The folder of the output.
        old, new: What merges leave there, by their kind.
        given: The inputs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.place = folder / "models", folder / "place"
        _make_models(self.folder)
        self.given = tree(self.folder)
        self.place.mkdir()
        self.old, self.new = (
            {kind: self._merged(Case(kind), scale) for kind in ("directory", "file")}
            for scale in (OLD_SCALE, SCALE)
        )

    def _merged(self, case: Case, scale: float) -> Tree:
        self.clear()
        outcome = self.merge(case, scale)
        assert outcome.status == 0, outcome
        return tree(self.place)

    def clear(self) -> None:
        for path in self.place.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def restore(self, case: Case) -> None:
        """Make the place what it is before a merge."""
        self.clear()
        write_tree(self.place, self.before(case))

    def before(self, case: Case) -> Tree:
        return self.old[case.kind] if case.old else {}

    def output(self, kind: str) -> Path:
        return self.place / ("out" if kind == "directory" else "out.safetensors")

    def paths(self, kind: str) -> list[Path]:
        suffix = "" if kind == "directory" else ".safetensors"
        return [self.folder / f"{name}{suffix}" for name in ("base", "ft-0", "ft-1")]

    def merge(self, case: Case, scale: float = SCALE) -> Outcome:
        """Merge by a call of the library."""
        base, *models = self.paths(case.kind)
        try:
            nm.merge_checkpoints(
                base,
                models,
                self.output(case.kind),
                scale=scale,
                threads=1,
                resume=case.resume,
                overwrite=case.old,
            )
        except nm.InputError as error:
            return Outcome(2, str(error))
        except KeyboardInterrupt:
            return Outcome(130)
        except Exception as error:
            known = isinstance(error, (OSError, RuntimeError))
            return Outcome(1 if known else -1, f"{type(error).__name__}: {error}")
        return Outcome(0)

    def command(self, case: Case, *more: str) -> Outcome:
        """Merge by the command line, in this process."""
        options = ["--resume"] * case.resume + ["--overwrite"] * case.old
        sys.argv = ["negmerge", "merge", *map(str, self.paths(case.kind)), "-o", str(self.output(case.kind))]
        sys.argv += ["--scale", str(SCALE), "--threads", "1", "--quiet", *options, *more]
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main.main()
        except SystemExit as stopped:
            return Outcome(int(stopped.code or 0), err.getvalue())
        except BaseException:
            return Outcome(-1, traceback.format_exc())
        raise AssertionError


def _make_models(folder: Path) -> None:
    """Directories of two shards and files of one, of which the first half is the same in all versions."""
    for k, name in enumerate(("base", "ft-0", "ft-1")):
        values = np.random.default_rng(0).normal(size=40_000).astype("f4")
        values[20_000:] += k * np.random.default_rng(k).random(20_000, "f4")
        (folder / name / "assets").mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
        (folder / name / "assets" / "words.txt").write_text("one two")
        first, second = {"u": values[:2_000]}, {"v": values[2_000:]}
        shards = {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second}
        for file, tensors in shards.items():
            (folder / name / file).write_bytes(_safetensors(tensors))
        weight_map = {tensor: file for file, tensors in shards.items() for tensor in tensors}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / name / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / f"{name}.safetensors").write_bytes(_safetensors(first | second))


def _safetensors(tensors: dict[str, Any]) -> bytes:
    header, data = {}, b""
    for name, values in tensors.items():
        offsets = [len(data), len(data) + values.nbytes]
        header[name] = {"dtype": "F32", "shape": [values.size], "data_offsets": offsets}
        data += values.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def tree(folder: Path) -> Tree:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def write_tree(folder: Path, content: Tree) -> None:
    for name, data in content.items():
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)


def forked(task: Callable[[], Any], group: int | None = None) -> Callable[[], Any]:
    """Run a task in a process; returns what waits for its result, or for an outcome with the status of one that does not answer.

    Args:
        task: Returns a JSON value.
        group: The process group that it joins; 0 for a new one.
    """
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            if group is not None:
                os.setpgid(0, group)
            gc.disable()
            signal.alarm(_TIMEOUT_S)
            os.write(send, json.dumps(task()).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(send)
    if group is not None:
        with contextlib.suppress(OSError):  # the process does it, too: whichever is first
            os.setpgid(child, group or child)

    def wait() -> Any:
        with open(receive, "rb") as file:
            answer = file.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in _ENDS, f"a process ended with {status}"
        return json.loads(answer) if answer else [status, ""]

    wait.process = child  # type: ignore[attr-defined]
    return wait


class Found:
    """Collects what does not hold."""

    def __init__(self, models: Models, case: Case) -> None:
        self.models, self.case = models, case
        self.lines: list[str] = []

    def expect(self, holds: object, where: str, text: str) -> None:
        if not holds:
            self.lines.append(f"{where}: {text}")

    def state(self, where: str, *, mixed: bool = False, missing: bool = False) -> tuple[str, list[str]]:
        """Look at the place.

        Args:
            where: What was done.
            mixed: Whether a single file may lie beside another's manifest, for verify to report.
            missing: Whether there may be no output where there was one.

        Returns:
            Which output is there ("old", "new", "none" or "mixed"), and what else.
        """
        kind, found = self.case.kind, tree(self.models.place)
        output = {name: data for name, data in found.items() if not name.startswith(".")}
        left = sorted({name.split("/")[0] for name in found if name.startswith(".")})
        before, new = self.models.before(self.case), self.models.new[kind]
        if output == new:
            return "new", left
        if output == before:
            return "old" if before else "none", left
        path = self.models.output(kind)
        if not os.path.lexists(path) and (kind == "file" or not output):
            self.expect(missing or not before, where, "the old output is gone")
            self.expect(mixed or not output, where, f"a manifest without a file: {sorted(output)}")
            return "none", left
        self.expect(
            mixed and kind == "file", where, f"neither the old nor the new output: {self._differs(output)}"
        )
        try:
            nm.verify_checkpoint(path, threads=1)
        except (RuntimeError, nm.InputError):
            return "mixed", left
        self.expect(False, where, "verify finds nothing in a mixture of two outputs")
        return "mixed", left

    def _differs(self, output: Tree) -> str:
        names = ("old", self.models.before(self.case)), ("new", self.models.new[self.case.kind])
        found = [
            f"{label}: {sorted(name for name in {*output, *tree_} if output.get(name, 0) != tree_.get(name, 0))}"
            for label, tree_ in names
        ]
        new = names[1][1]
        for name in (name for name in output if name.endswith("negmerge.json") and name in new):
            held, wanted = (json.loads(each[name]) for each in (output, new))
            found += [f"{name}: {k} {held.get(k)}, not {v}" for k, v in wanted.items() if held.get(k) != v]
        return "; ".join(found)

    def again(self, where: str, between: str, outcome: Outcome | None = None) -> None:
        """Give the same command again, and look at what it did."""
        case = self.case
        signal.alarm(_TIMEOUT_S)
        outcome = outcome or self.models.merge(case)
        signal.alarm(0)
        state, left = self.state(where + ", again")
        if between == "new" and not case.old and not case.resume:
            refused = outcome.status == 2 and "exists already" in outcome.said
            self.expect(
                refused and state == "new", where, f"again: {outcome}, {state}; expected: exists already"
            )
        else:
            self.expect(
                outcome.status == 0 and state == "new", where, f"again ({between}): {outcome}, {state}"
            )
        self.expect(not left, where, f"again: left behind {left}")


def at_every_call(models: Models, shim: Shim, case: Case, action_name: str) -> list[str]:
    """Merge once for each call, with something done at it, and then again."""
    action, found = ACTIONS[action_name], Found(models, case)

    def armed(at: int, action: Action = action) -> Any:
        if not case.exchange:
            shim.without_exchange()
        shim.arm(action, at)
        return models.command(case) if action.is_command else models.merge(case)

    models.restore(case)
    outcome = Outcome(*forked(lambda: armed(0, action._replace(what=NONE)))())
    assert outcome.status == 0, outcome
    calls = shim.calls
    assert calls > 20, "the shim sees the calls"
    # What is done after a call is mostly what is done before the next one.
    step = 3 if action.what == KILL_AFTER else 1
    hits = 0
    for at in range(1, calls + 4, step):  # there may be fewer records, or more, than the first time
        models.restore(case)
        outcome = Outcome(*forked(lambda at=at: armed(at))())
        if not shim.call:
            continue
        hits += 1
        where = f"{action_name} {shim.call}"
        if action.what in (KILL_BEFORE, KILL_AFTER):
            found.expect(outcome.status == KILLED, where, f"not killed: {outcome}")
            state, _ = found.state(where, mixed=True, missing=not case.exchange)
        else:
            state = _check_ended(found, where, action, outcome)
        found.again(where, state)
    assert hits * step > calls // 2, f"{hits} hits of {calls} calls"
    return found.lines


def _check_ended(found: Found, where: str, action: Action, outcome: Outcome) -> str:
    """Look at what a merge left that failed or was interrupted."""
    state, left = found.state(where)
    ended = {128 + action.value} if action.what == SIGNAL else {0, 1}
    if action.is_command:  # it may be done when it asks for signals
        ended |= {0}
    found.expect(outcome.status in ended, where, str(outcome))
    found.expect(outcome.status or state == "new", where, f"status 0, but the output is {state}")
    found.expect(outcome.said.strip().count("\n") == 0, where, f"not one line: {outcome.said}")
    if outcome.status == 0 or not found.case.resume:
        found.expect(not left, where, f"left behind {left} ({outcome})")
    return state


def killed_again(models: Models, shim: Shim, case: Case, action_name: str) -> list[str]:
    """A merge that is killed, and the next one at some of its calls too, when it resumes or clears what the first left."""
    found = Found(models, case)

    def merge(at: int) -> Outcome:
        def armed() -> Outcome:
            if not case.exchange:
                shim.without_exchange()
            shim.arm(ACTIONS["killed before"] if at else NOTHING, at)
            return models.merge(case)

        return Outcome(*forked(armed)())

    models.restore(case)
    assert merge(0).status == 0
    calls = shim.calls
    for first in (calls // 2, calls * 9 // 10):
        models.restore(case)
        merge(first)
        while not shim.call:  # there may be fewer records than the first time
            first -= 1
            models.restore(case)
            merge(first)
        where = f"killed before {shim.call}, and {action_name}"
        left = read_modes(models.place)
        second = 1
        while True:
            models.clear()
            write_modes(models.place, left)
            merge(second)
            if not shim.call:
                break
            state, _ = found.state(f"{where} {shim.call}", mixed=True, missing=not case.exchange)
            found.again(f"{where} {shim.call}", state)
            second += 3
        assert second > 3, where
    return found.lines


def notebook(models: Models, shim: Shim, case: Case, action_name: str) -> list[str]:
    """Ctrl-C at every call, and then the same call again in the same process."""
    action, found = ACTIONS["Ctrl-C after"], Found(models, case)
    models.restore(case)
    forked(lambda: (shim.arm(), models.merge(case))[1])()
    for at in range(1, shim.calls + 1, 3):
        models.restore(case)

        def twice(at: int = at) -> Any:
            shim.arm(action, at)
            if case.exchange is False:
                shim.without_exchange()
            outcome = models.merge(case)
            if not shim.call:
                return []
            where = f"{action_name} {shim.call}"
            state = _check_ended(found, where, action, outcome)
            found.again(where, state, models.merge(case))
            return found.lines

        found.lines = forked(twice)()
    return found.lines


def with_two_ranks(models: Models, shim: Shim, case: Case, _: str) -> list[str]:
    """The same with two ranks, at a few calls of each."""
    import torch.distributed  # noqa: F401  not before: processes are forked faster without it
    from interrupted import free_port

    found = Found(models, case)

    def rank(number: int, port: int, action: Action, at: int, hit: int) -> Callable[[], Any]:
        def run() -> Any:
            os.environ.update(
                RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
            if not case.exchange:
                shim.without_exchange()
            if number == hit:
                shim.arm(action, at)
            return models.command(case)

        return run

    def ranks(action: Action, at: int, hit: int) -> list[Any]:
        models.restore(case)
        port = free_port()
        first = forked(rank(0, port, action, at, hit), group=0)
        second = forked(rank(1, port, action, at, hit), group=first.process)  # type: ignore[attr-defined]
        return [first(), second()]

    for hit, parts in ((0, 12), (1, 5)):
        ended = ranks(NOTHING, 0, hit)
        assert [outcome[0] for outcome in ended] == [0, 0], ended
        calls = shim.calls
        assert calls > 3, calls
        for part in range(1, parts + 1):
            at = calls * part // parts if hit == 0 else 1 + (calls - 1) * (part - 1) // parts
            for name, action in _of_ranks(part, hit):
                ended = ranks(action, at, hit)
                if not shim.call:
                    continue
                where = f"two ranks, rank {hit} {name} {shim.call}"
                killed = name.startswith("killed")
                state, left = found.state(where, mixed=killed, missing=killed and not case.exchange)
                statuses = [each[0] for each in ended]
                if not killed:
                    found.expect(set(statuses) <= {0, 1, 143}, where, str(ended))
                    found.expect(
                        any(statuses) or state == "new", where, f"{statuses}, but the output is {state}"
                    )
                    if not case.resume:
                        # Two that leave at the same moment may each take the other for the last.
                        both_left = state == "new" and any(statuses)
                        found.expect(not left or both_left, where, f"left behind {left} {ended}")
                found.again(where, state)
    return found.lines


def _of_ranks(part: int, hit: int) -> Iterator[tuple[str, Action]]:
    yield (
        ("killed alone before", Action(KILL_BEFORE))
        if (part + hit) % 2
        else ("killed together before", Action(KILL_GROUP))
    )
    if part % 3 == hit:
        yield "disk full at", Action(FAIL, errno.ENOSPC)
    if part % 4 == 2 - hit:
        yield "SIGTERM after", Action(SIGNAL, signal.SIGTERM)


def power_loss(models: Models, shim: Shim, case: Case, _: str) -> list[str]:
    """A loss of power after every call, and then the same command again, with and without --resume."""
    found = Found(models, case)
    models.restore(case)
    before = disk.Disk(models.place)
    with tempfile.TemporaryFile() as log:

        def record() -> Outcome:
            if not case.exchange:
                shim.without_exchange()
            shim.arm()
            shim.record(log.fileno())
            return models.merge(case)

        assert forked(record)() == [0, ""]
        log.seek(0)
        calls = disk.recorded(log.read())
    assert len(calls) > 20, "the shim sees the calls"
    seen = set()
    last = "the start"
    for at in range(len(calls) + 1):
        for description, tree_ in before.after_power_loss(seeds=15):
            key = hash(tuple(tree_.items())), at == len(calls)
            if key not in seen:
                seen.add(key)
                _check_after_power_loss(
                    found, tree_, f"power lost after {last}, {description}", ended=at == len(calls)
                )
        if at < len(calls):
            before.apply(calls[at])
            last = f"{calls[at].name} {calls[at].words[1:]} ({at})"
    assert len(seen) > len(calls) // 2
    return found.lines


def _check_after_power_loss(found: Found, content: disk.Tree, where: str, *, ended: bool) -> None:
    models, case = found.models, found.case
    for resume in (case.resume, not case.resume):
        models.clear()
        write_modes(models.place, content)
        state, _ = found.state(where, mixed=True, missing=not case.exchange)
        found.expect(state == "new" or not ended, where, f"the merge had ended, but the output is {state}")
        signal.alarm(_TIMEOUT_S)
        outcome = models.merge(case._replace(resume=resume))
        signal.alarm(0)
        after, left = found.state(where + ", again")
        told = f"again {'with' if resume else 'without'} --resume ({state}): {outcome}, {after}"
        if outcome.status == 0:
            found.expect(after == "new" and not left, where, f"{told}, {left}")
        elif state == "new" and not case.old and not resume:
            found.expect("exists already" in outcome.said and after == "new", where, told)
        else:
            refused = outcome.status == 2 and resume and "without --resume" in outcome.said
            found.expect(refused and after == state, where, told)


def read_modes(folder: Path) -> disk.Tree:
    return {name: ((folder / name).stat().st_mode & 0o7777, data) for name, data in tree(folder).items()}


def write_modes(folder: Path, content: disk.Tree) -> None:
    for name, (mode, data) in content.items():
        write_tree(folder, {name: data})
        (folder / name).chmod(mode)


KINDS = {
    **dict.fromkeys(ACTIONS, at_every_call),
    "Ctrl-C in a notebook after": notebook,
    "killed again before": killed_again,
    "power loss": power_loss,
    "two ranks": with_two_ranks,
}


def main_(folder: Path, wanted: list[tuple[str, str]], result: Path) -> None:
    warnings.simplefilter("ignore")
    exec(RECORD_EVERY_CHUNK)
    models = Models(folder)
    shim = Shim(models.place)
    by_name = {str(case): case for case in CASES}
    found = {}
    for case, action in sorted(wanted, key=lambda each: each[1] == "two ranks"):
        try:
            found[f"{case}: {action}"] = KINDS[action](models, shim, by_name[case], action)
        except Exception:
            found[f"{case}: {action}"] = [traceback.format_exc()]
        if tree(models.folder) != models.given:
            found[f"{case}: {action}"].append("an input was changed")
        result.write_text(json.dumps(found))


if __name__ == "__main__":
    main_(Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))
