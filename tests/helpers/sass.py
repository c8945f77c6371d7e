"""The instructions of a GPU that a kernel becomes, as nvdisasm lists them; needs no GPU."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from tests.helpers.ptx import linked


class Instruction(NamedTuple):
    """name: with what follows it after points, as LDG.E.128; without SYS, which older GPUs' lists have. operands: as
    they are written."""

    name: str
    operands: tuple[str, ...]

    @property
    def written(self) -> frozenset[int]:
        """The registers that a load fills."""
        first = int(self.operands[0].removeprefix("R"))
        size = re.search(r"\.(64|128)$", self.name)
        return frozenset(range(first, first + (int(size[1]) // 32 if size else 1)))

    @property
    def read(self) -> frozenset[int]:
        """The registers among its sources, of several that belong together the first one."""
        sources = self.operands if self.name.startswith("ST") else self.operands[1:]
        return frozenset(int(n) for operand in sources for n in re.findall(r"\bR(\d+)", operand))


def nvdisasm() -> Path | None:
    """The program of the wheel nvidia-cuda-nvdisasm; None where that is not installed."""
    try:
        files = metadata.files("nvidia-cuda-nvdisasm") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in files if f.stem == "nvdisasm"), None)


class Code(NamedTuple):
    """A kernel's instructions in their order, without the functions that it calls, and where its loops begin and end:
    at what a jump leads back to, and behind the jump."""

    instructions: tuple[Instruction, ...]
    loops: tuple[range, ...]

    def before(self, name: str) -> int:
        """How many instructions there are before the first one of this name in a loop."""
        return min(n for loop in self.loops for n in loop if self.instructions[n].name == name)

    def alone(self) -> tuple[Instruction, ...]:
        """What comes between the last barrier and the one before it."""
        *_, begin, end = (n for n, i in enumerate(self.instructions) if i.name.startswith("BAR.SYNC"))
        return self.instructions[begin + 1 : end]

    def on_their_way(self, name: str) -> int:
        """The most loads of this name that a loop makes before it needs what any of them reads."""
        return max(_on_their_way([self.instructions[n] for n in loop], name) for loop in self.loops)


def waits(instructions: Sequence[Instruction]) -> int:
    """How often these wait for memory, if a wait is for all that was asked for before."""
    found, waiting = 0, frozenset[int]()
    for instruction in instructions:
        if waiting & instruction.read:
            found, waiting = found + 1, frozenset()
        if instruction.name.startswith("LDG"):
            waiting |= instruction.written
    return found


def _on_their_way(instructions: list[Instruction], name: str) -> int:
    most, loads, waiting = 0, 0, frozenset[int]()
    for instruction in instructions:
        if waiting & instruction.read:
            loads, waiting = 0, frozenset()
        if instruction.name == name:
            loads, waiting = loads + 1, waiting | instruction.written
        most = max(most, loads)
    return most


_LINE = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"(\.L_x_\d+):")


@lru_cache(maxsize=256)
def machine_code(ptx: str, cc: tuple[int, int]) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(linked(ptx, cc).cubin)
        command = [str(nvdisasm()), "-c", str(file)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sections = re.split(r"^\s*\.section\s+", listing, flags=re.M)
    (kernel,) = (s for s in sections if s.startswith(".text.") and "STO_CUDA_ENTRY" in s)
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    loops = []
    for line in kernel.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif m := _LINE.match(line):
            found.append(Instruction(m[1].removesuffix(".SYS"), tuple(o.strip() for o in m[2].split(","))))
            target = re.search(r"\.L_x_\d+", m[2])
            if m[1] == "BRA" and target is not None and labels.get(target[0], len(found)) < len(found) - 1:
                loops.append(range(labels[target[0]], len(found)))
    return Code(tuple(found), tuple(loops))
