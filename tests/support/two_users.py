"""Merges in a directory that another user can write, who leads them to files of the user who merges.

A program that runs as root under tests/support/faults.c, and plays both users. What does not hold is written to a file as JSON: for
each attack a list of lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faulty import PAUSE, SCALE, Action, Case, Found, Models, Outcome, Shim, forked, tree
from small_chunks import RECORD_EVERY_CHUNK

VICTIM, OTHER = 4001, 4002
CASES = [
    Case(kind, old, resume)
    for kind in ("directory", "file")
    for old, resume in ((False, False), (True, False), (False, True))
]
_HANGS_S = 10


class Scene:
    """A place that both may write, and the victim's home, which nobody else can enter."""

    def __init__(self, folder: Path) -> None:
        os.umask(0o022)
        self.models = Models(folder)
        self.place, self.home = self.models.place, folder / "home"
        folder.chmod(0o755)
        self._make_home()
        self.kept = self._home()

    def _make_home(self) -> None:
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir()
        (self.home / "precious.bin").write_bytes(b"P" * 160_152)
        (self.home / "precious.json").write_text("{}")
        for path in (self.home, *self.home.iterdir()):
            os.chown(path, VICTIM, VICTIM)
        self.home.chmod(0o700)

    def _home(self) -> dict[str, object]:
        return {"": oct(self.home.stat().st_mode), **tree(self.home)}

    def lead(self, case: Case) -> Lead:
        return Lead(self.place, self.home, self.models.output(case.kind))

    def restore(self, case: Case, mode: int) -> None:
        self.models.restore(case)
        for path in self.place.rglob("*"):
            os.chown(path, VICTIM, VICTIM)
        self.place.chmod(mode)

    def merge(self, case: Case) -> Outcome:
        """Merge as the victim, in a process of its own."""
        signal.alarm(_HANGS_S)
        os.setgroups([])
        os.setgid(VICTIM)
        os.setuid(VICTIM)
        return self.models.merge(case, SCALE)

    def judge(self, found: Found, where: str, outcome: Outcome, *, is_output_his: bool = False) -> None:
        """Collect what must not be, whatever the other did.

        Args:
            found: Collects it.
            where: What the other did.
            outcome: What the victim's merge said.
            is_output_his: Whether the other may have replaced what had been published.
        """
        found.expect(self._home() == self.kept, where, f"the victim's home was changed ({outcome})")
        found.expect(outcome.status in (0, 1, 2), where, f"hung or crashed: {outcome}")
        found.expect(
            "\n" not in outcome.said and bool(outcome.said) == bool(outcome.status), where, str(outcome)
        )
        if outcome.status == 0 and not is_output_his:
            output = self.models.output(found.case.kind)
            links = [path for path in (output, *output.rglob("*")) if path.is_symlink()]
            state, _ = found.state(where)
            found.expect(state == "new" and not links, where, f"status 0, but the output is {state}, {links}")
        if self._home() != self.kept:
            self._make_home()


class Lead:
    """What the other user makes in the place; each call gives him another path that he owns."""

    def __init__(self, place: Path, home: Path, output: Path) -> None:
        self.place, self.home, self.output = place, home, output
        self.staging = place / f".{output.name}.negmerge"
        # That of a directory is in it, where only the victim can write.
        self.manifest = place / f"{output.name}.negmerge.json" if output.suffix else None

    def make(self, path: Path, what: str) -> None:
        match what:
            case "a link to a file":
                path.symlink_to(self.home / "precious.bin")
            case "a link to a manifest":
                path.symlink_to(self.home / "precious.json")
            case "a link to a folder":
                path.symlink_to(self.home)
            case "a link to a new file":
                path.symlink_to(self.home / "made-by-the-other")
            case "a link to nowhere":
                path.symlink_to("/nonexistent/x")
            case "a link to itself":
                path.symlink_to(path.name)
            case "a FIFO":
                os.mkfifo(path, 0o666)
                path.chmod(0o666)
            case "a socket":
                with socket.socket(socket.AF_UNIX) as made:
                    made.bind(str(path))
            case "a directory":
                path.mkdir()
                path.chmod(0o777)
            case "a file":
                path.write_bytes(b"[]")
                path.chmod(0o666)
            case "links":
                path.mkdir()
                for name in ("lock", "journal-0", "exchange", "rank-1.json", "file", "moved", "probe"):
                    self.make(path / name, "a link to a file")
                for name in ("former", "from", "to"):
                    self.make(path / name, "a link to a folder")
                (path / "output").mkdir()
                for name in ("base.safetensors", "model-00001-of-00002.safetensors", "config.json"):
                    self.make(path / "output" / name, "a link to a file")
                self.make(path / "output" / "assets", "a link to a folder")
                self.make(path / "output" / "negmerge.json", "a link to a manifest")
                for folder in (path, path / "output"):
                    folder.chmod(0o777)
            case _:
                raise AssertionError(what)


_LINKS = (
    "a link to a file",
    "a link to a folder",
    "a link to a new file",
    "a link to nowhere",
    "a link to itself",
)
_OTHERS = ("a FIFO", "a socket", "a directory", "a file")
_NAMES = ("lock", "output", "journal-0", "exchange", "former", "rank-1.json")


def prepared(lead: Lead) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield what the other made before the victim merges."""
    for what in (*_LINKS, *_OTHERS, "links"):
        yield f"the staging directory is {what}", lambda what=what: lead.make(lead.staging, what)
        if lead.manifest:
            yield f"the manifest is {what}", lambda what=what: lead.make(lead.manifest, what)
        yield f"the output is {what}", lambda what=what: lead.make(lead.output, what)
    for mode in (0o777, 0o755, 0o700):
        for name in _NAMES:
            for what in (*_LINKS, *_OTHERS):

                def make(mode: int = mode, name: str = name, what: str = what) -> None:
                    lead.staging.mkdir()
                    lead.staging.chmod(0o777)
                    if name != "lock":
                        lead.make(lead.staging / "lock", "a file")
                    lead.make(lead.staging / name, what)
                    lead.staging.chmod(mode)

                yield f"a staging directory of mode {mode:o} with {name}, {what}", make


def swapped(lead: Lead) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield what the other does at one moment of the merge."""

    def swap_hidden(what: str) -> None:
        for path in list(lead.place.iterdir()):
            if path.name.startswith(".") and not path.name.startswith(".stolen"):
                path.rename(path.with_name(f".stolen{path.name}"))
                lead.make(path, what)

    def swap(path: Path, what: str) -> None:
        if os.path.lexists(path):
            path.rename(path.with_name(f".stolen.{path.name}"))
        lead.make(path, what)

    for what in ("links", "a link to a folder", "a directory"):
        yield f"hidden names become {what}", lambda what=what: swap_hidden(what)
    for what in ("a link to a file", "a link to a folder", "a FIFO"):
        yield f"the output becomes {what}", lambda what=what: swap(lead.output, what)
    for what in ("a link to a manifest", "a FIFO") if lead.manifest else ():
        yield f"the manifest becomes {what}", lambda what=what: swap(lead.manifest, what)


def as_other(task: Callable[[], None]) -> None:
    """Do something as the other user, who may be refused it."""
    os.setegid(OTHER)
    os.seteuid(OTHER)
    try:
        task()
    except OSError:
        pass
    finally:
        os.seteuid(0)
        os.setegid(0)


def paused(shim: Shim, merge: Callable[[], Any], at_call: Callable[[int], None]) -> Outcome:
    """Run a merge in a process, and a function before each of its calls."""
    own, others = socket.socketpair()

    def run() -> Any:
        own.close()
        shim.arm(Action(PAUSE, others.fileno()))
        return merge()

    wait = forked(run)
    others.close()
    number = 0
    while own.recv(1):
        number += 1
        at_call(number)
        own.send(b"1")
    own.close()
    return Outcome(*wait())


def before_the_merge(scene: Scene, shim: Shim, case: Case, sticky: bool) -> list[str]:
    found = Found(scene.models, case)
    for description, make in prepared(scene.lead(case)):
        scene.restore(case, 0o1777 if sticky else 0o777)
        as_other(make)
        scene.judge(found, description, Outcome(*forked(lambda: scene.merge(case))()))
    return found.lines


def during_the_merge(scene: Scene, shim: Shim, case: Case, sticky: bool) -> list[str]:
    found = Found(scene.models, case)
    scene.restore(case, 0o777)
    calls: list[str] = []
    outcome = paused(shim, lambda: scene.merge(case), lambda _: calls.append(shim.call))
    assert outcome.status == 0 and len(calls) > 20, (outcome, calls)
    for description, act in swapped(scene.lead(case)):
        is_output = not description.startswith("hidden")
        # Where only their owners rename names, and before the output is moved, one moment is like another.
        step = 6 if is_output or sticky else 1
        last = max(len(calls) - 15, 1)
        for at in (*range(1, last, step), *range(last, len(calls) + 1)):
            scene.restore(case, 0o1777 if sticky else 0o777)
            where = ""

            def at_call(number: int, at: int = at, act: Callable[[], None] = act) -> None:
                nonlocal where
                if number == at:
                    where = shim.call
                    as_other(act)

            outcome = paused(shim, lambda: scene.merge(case), at_call)
            where = f"{description} before {where} ({at})"
            scene.judge(found, where, outcome, is_output_his=is_output and not sticky)
    return found.lines


# What is private of the inputs, and which files of an output the other may read.
PRIVATE = {
    "the base's folder": lambda folder: _private(folder, 0o700, 0o644, ["base"]),
    "the models' files": lambda folder: _private(folder, 0o755, 0o600, ["ft-0", "ft-1"]),
    "one model's folder": lambda folder: _private(folder, 0o750, 0o644, ["ft-1"]),
}
_NO_MODELS_FILES = ("config.json", "words.txt", "model.safetensors.index.json")


def _private(folder: Path, directory_mode: int, file_mode: int, names: list[str]) -> list[str]:
    """Give models modes; returns the names of the files that may still be read by others."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, VICTIM, VICTIM)
        path.chmod(0o755 if path.is_dir() else 0o644)
    for name in names:
        for path in (folder / name, *(folder / name).rglob("*")):
            path.chmod(directory_mode if path.is_dir() else file_mode)
        # A single file lies in no folder of its own.
        (folder / f"{name}.safetensors").chmod(0o600)
    return [] if "base" in names else list(_NO_MODELS_FILES)


def read_by_the_other(scene: Scene, shim: Shim, case: Case, sticky: bool) -> list[str]:
    """The other reads what he can, before every call and afterwards."""
    found = Found(scene.models, case)
    for what, make in PRIVATE.items():
        scene.restore(case, 0o1777 if sticky else 0o777)
        allowed = make(scene.models.folder)
        for path in scene.place.rglob("*"):  # the older output
            path.chmod(0o700 if path.is_dir() else 0o600)

        def read(where: str, what: str = what, allowed: list[str] = allowed) -> None:
            names: list[str] = []
            as_other(lambda: names.extend(_readable(scene.place)))
            leaked = [name for name in names if name.rpartition("/")[2] not in allowed]
            found.expect(not leaked, f"{what} private, {where}", f"others may read {leaked}")

        outcome = paused(shim, lambda: scene.merge(case), lambda _: read(f"before {shim.call}"))
        found.expect(outcome.status == 0 and found.state(what)[0] == "new", what, str(outcome))
        read("afterwards")
    _private(scene.models.folder, 0o755, 0o644, [])
    for path in scene.models.folder.rglob("*.safetensors"):
        path.chmod(0o644)
    return found.lines


def _readable(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and path.open("rb").read(1):
                yield str(path.relative_to(folder))


KINDS = {
    "read by the other": read_by_the_other,
    "before the merge": before_the_merge,
    "during the merge": during_the_merge,
}


def main(folder: Path, wanted: list[tuple[str, str, bool]], result: Path) -> None:
    warnings.simplefilter("ignore")
    exec(RECORD_EVERY_CHUNK)
    scene = Scene(folder)
    shim = Shim(scene.place)
    by_name = {str(case): case for case in CASES}
    found = {}
    for case, kind, sticky in wanted:
        name = f"{case}: {kind}, {'sticky' if sticky else 'not sticky'}"
        try:
            found[name] = KINDS[kind](scene, shim, by_name[case], sticky)
        except Exception:
            found[name] = [traceback.format_exc()]
        result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))
