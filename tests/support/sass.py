"""Machine code of NVIDIA's GPUs as cuobjdump writes it: instructions, and the shortest paths through them."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from typing import NamedTuple


class Instruction(NamedTuple):
    """One instruction: "@P0 LDG.E.128 R4, desc[UR6][R2.64]" has the guard "@P0", the name "LDG.E.128" and the operands."""

    guard: str
    name: str
    operands: str

    @property
    def is_wide_load(self) -> bool:
        return re.match(r"LDG\.E\S*\.128", self.name) is not None

    @property
    def is_wide_store(self) -> bool:
        return re.match(r"STG\.E\S*\.128", self.name) is not None

    def registers(self) -> list[int]:
        """The numbers of the registers in the operands."""
        return [int(number) for number in re.findall(r"\bR(\d+)", self.operands)]


Code = dict[int, Instruction]


def instructions(text: str) -> Code:
    """The instructions of a kernel, by address."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", text)
    return {
        int(at, 16): Instruction(guard.strip(), name, operands.strip()) for at, guard, name, operands in found
    }


def _target(instruction: Instruction) -> int:
    return int(re.findall(r"0x([0-9a-f]+)", instruction.operands)[-1], 16)


def _successors(code: Code) -> dict[int, list[int]]:
    """What may follow each instruction. A call ends a path: what is called is not the usual one."""
    meeting: dict[str, set[int]] = {}  # where threads go from a BSYNC of a barrier
    for instruction in code.values():
        if instruction.name.startswith("BSSY"):
            barrier = re.findall(r"\bB\d+", instruction.operands)[0]
            meeting.setdefault(barrier, set()).add(_target(instruction))
    after = dict(zip(code, [*list(code)[1:], -1], strict=True))
    following: dict[int, list[int]] = {}
    for at, (guard, name, operands) in code.items():
        taken = [after[at]]
        if name.startswith("BRA"):
            conditional = guard or re.match(r"!?U?P\d", operands) or ".DIV" in name
            taken = [_target(code[at]), *(taken if conditional else [])]
        elif name.startswith("BSYNC"):
            taken = list(meeting[re.findall(r"\bB\d+", operands)[0]])
        elif name.startswith(("EXIT", "RET", "CALL", "BRX", "JMP")):
            taken = taken if guard else []
        following[at] = [each for each in taken if each in code]
    return following


def loop_with_loads(code: Code, loads: int) -> list[Instruction] | None:
    """The shortest path from a store of 16 bytes to itself that has so many loads of 16 bytes and no other such store."""
    following = _successors(code)
    found: list[list[Instruction]] = []
    for store in (at for at, instruction in code.items() if instruction.is_wide_store):
        before: dict[tuple[int, int], tuple[int, int] | None] = {(at, 0): None for at in following[store]}
        queue = deque(before)
        while queue:
            at, loaded = here = queue.popleft()
            if at == store and loaded == loads:
                path: list[Instruction] = []
                step: tuple[int, int] | None = here
                while step:
                    path.insert(0, code[step[0]])
                    step = before[step]
                found.append(path)
                break
            if code[at].is_wide_store:
                continue
            loaded += code[at].is_wide_load
            for each in following[at]:
                if loaded <= loads and (each, loaded) not in before:
                    before[each, loaded] = here
                    queue.append((each, loaded))
    return min(found, key=len, default=None)


def smallest_loop(code: Code, is_it: Callable[[list[Instruction]], bool]) -> list[Instruction] | None:
    """The shortest run of instructions from the target of a jump back to that jump that is_it says is the one."""
    found = []
    for at, instruction in code.items():
        if instruction.name.startswith("BRA") and "DIV" not in instruction.name:
            run = [each for address, each in code.items() if _target(instruction) <= address <= at]
            if is_it(run):
                found.append(run)
    return min(found, key=len, default=None)


def loads_before_use(path: list[Instruction]) -> int:
    """The number of loads of 16 bytes on a path before the first instruction that needs what one of them loaded."""
    loads, pending = 0, set[int]()
    for instruction in path:
        if instruction.is_wide_load:
            into, *_ = instruction.registers()
            pending |= set(range(into, into + 4))
            loads += 1
        elif not instruction.name.startswith("CS2R") and pending & set(instruction.registers()):
            break  # CS2R only writes: the zeros of a segment without a base
    return loads
