"""Kernels compiled to PTX, which needs no GPU, and what can be read in it."""

import re
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

from cuda.bindings import nvjitlink
from numba import cuda

from nbbn.kernels.cuda.blocks import Variant
from nbbn.kernels.cuda.steps import signature, steps


@lru_cache(maxsize=256)
def compiled(step: str, variant: Variant, cc: tuple[int, int]) -> str:
    """A step's kernel as PTX."""
    return ptx_of(steps(variant)[step], signature(step, variant), cc)


def ptx_of(kernel: Any, types: Any, cc: tuple[int, int]) -> str:
    device = SimpleNamespace(compute_capability=cc)  # functions that kernels call ask for the current one
    with mock.patch("numba.cuda.dispatcher.get_current_device", return_value=device):
        found, _ = cuda.compile_ptx(kernel, types, cc=cc)
    return str(found)


class Loop(NamedTuple):
    """The blocks of a loop, by their numbers, and its instructions, without predicates and operands."""

    blocks: frozenset[int]
    instructions: tuple[str, ...]

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, i) is not None for i in self.instructions)


ACCESS = r"(ld|st)\.global\."
WIDE_LOAD, WIDE_STORE = (rf"{kind}\.global\.(v4\.[bfsu]32|v2\.[bfsu]64)$" for kind in ("ld", "st"))
_LABEL = re.compile(r"(\$\w+):$")
_INSTRUCTION = re.compile(r"(@!?%p\d+\s+)?([a-z]\w*(?:\.\w+)*)\b(.*)")


@lru_cache(maxsize=256)
def loops(ptx: str) -> list[Loop]:
    """The natural loops: what can reach a branch to a block that it cannot get around."""
    blocks, successors = _flow(ptx)
    predecessors: list[list[int]] = [[] for _ in blocks]
    for n, targets in enumerate(successors):
        for target in targets:
            predecessors[target].append(n)
    dominators = _dominators(predecessors)
    found: dict[int, set[int]] = {}
    for n, targets in enumerate(successors):
        for head in targets:
            if head in dominators[n]:
                members = found.setdefault(head, {head})
                reaching = [n]
                while reaching:
                    block = reaching.pop()
                    if block not in members:
                        members.add(block)
                        reaching += predecessors[block]
    return [Loop(frozenset(m), tuple(i for n in sorted(m) for i in blocks[n])) for m in found.values()]


def _flow(ptx: str) -> tuple[list[list[str]], list[list[int]]]:
    """The instructions of each block, and which blocks come after it."""
    blocks: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    ends: set[int] = set()  # blocks that do not go on with the next one
    for line in ptx.partition("\n{")[2].splitlines():
        if label := _LABEL.match(line.strip()):
            if blocks[-1]:  # else the block begins here that comes after a jump
                blocks.append([])
            labels[label[1]] = len(blocks) - 1
        elif found := _INSTRUCTION.match(line.strip()):
            predicate, name, operands = found.groups()
            blocks[-1].append(name)
            if name.startswith("bra"):
                jumps.append((len(blocks) - 1, operands.strip(" \t;")))
            if name.startswith(("bra", "ret")):
                if not predicate:
                    ends.add(len(blocks) - 1)
                blocks.append([])
    successors = [[] if n in ends or n + 1 == len(blocks) else [n + 1] for n in range(len(blocks))]
    for block, label in jumps:
        successors[block].append(labels[label])
    return blocks, successors


def _dominators(predecessors: list[list[int]]) -> list[set[int]]:
    """For each block those that every way from the first one to it goes through."""
    everything = set(range(len(predecessors)))
    found = [{0}, *(everything for _ in predecessors[1:])]
    changed = True
    while changed:
        changed = False
        for n in range(1, len(predecessors)):
            common = set.intersection(everything, *(found[p] for p in predecessors[n])) | {n}
            if common != found[n]:
                found[n], changed = common, True
    return found


def element_loops(ptx: str) -> list[Loop]:
    """Those that read elements several at a time."""
    return [loop for loop in loops(ptx) if loop.count(WIDE_LOAD)]


def innermost(found: list[Loop]) -> list[Loop]:
    return [a for a in found if not any(b.blocks < a.blocks for b in found)]


class Linked(NamedTuple):
    """What ptxas makes of a kernel: its program, and what it tells about it."""

    cubin: bytes
    log: bytes


@lru_cache(maxsize=256)
def linked(ptx: str, cc: tuple[int, int]) -> Linked:
    options = [f"-arch=sm_{cc[0]}{cc[1]}", "-verbose", "-Xptxas=-v"]
    linker = nvjitlink.create(len(options), options)
    try:
        nvjitlink.add_data(linker, nvjitlink.InputType.PTX, ptx.encode(), len(ptx), "kernel")
        nvjitlink.complete(linker)
        log, cubin = (
            bytearray(size(linker)) for size in (nvjitlink.get_info_log_size, nvjitlink.get_linked_cubin_size)
        )
        nvjitlink.get_info_log(linker, log)
        nvjitlink.get_linked_cubin(linker, cubin)
    finally:
        nvjitlink.destroy(linker)
    return Linked(bytes(cubin), bytes(log))


class Resources(NamedTuple):
    """What a thread of a kernel gets; bytes in local memory: its stack, and spilled registers."""

    registers: int
    stack: int
    local: int


def resources(ptx: str, cc: tuple[int, int]) -> Resources:
    log = linked(ptx, cc).log
    found = re.search(rb"used (\d+) registers.*?(\d+) stack.*?(\d+) bytes lmem", log)
    assert found is not None, log
    return Resources(*map(int, found.groups()))
