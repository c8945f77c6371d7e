"""Large output arrays whose memory is used again once nothing refers to them.

The system gives a process zeroed pages, one fault at a time, and takes them back with the array: writing a new output
takes 3 (64 MiB and more) to 20 times (1 MiB) as long as writing it again. Here such memory goes to a pool instead.

Nothing here waits for a lock, and no Python code runs in a finalizer, where a KeyboardInterrupt would be lost: the end
of an array only appends to a deque, which the next call looks through. Every change of the pool is one operation on a
dict or a deque, which the interpreter makes whole.
"""

import itertools
import math
import os
import weakref
from collections import deque
from functools import lru_cache
from typing import Any

import numpy as np

from nbbn.core.layout import Sizes, order_in_memory

__all__ = ["BlockPool", "block_pool", "clear", "empty", "empty_like"]

Array = np.ndarray

SMALLEST = 1 << 20  # bytes; lending takes 3.5 us, and a step on fewer not much more than ten times that
# Where blocks begin in their page: with a line of the cache, which a streaming store writes whole, and far from where
# other arrays begin (16 to 64). A load waits for a store before it whose address has the same last 12 bits.
_PAGE, _PLACE = 4096, 2048
_DEFAULT_LIMIT = 256 << 20  # the output and the input gradient of the largest ResNet-50 stage at batch 32


class _Block:
    """Aligned memory of `size` bytes, as NumPy's array interface describes it."""

    __slots__ = ("__array_interface__", "_memory", "size")

    def __init__(self, size: int) -> None:
        self._memory = np.empty(size + _PAGE, np.uint8)
        start = (_PLACE - self._memory.ctypes.data) % _PAGE
        self.size = size
        self.__array_interface__: dict[str, Any] = self._memory[start : start + size].__array_interface__


class _Lease:
    """What every array over a lent block refers to in the end, and nothing else does: its end is theirs."""

    __slots__ = ("__array_interface__", "__weakref__", "_block")

    def __init__(self, block: _Block) -> None:
        self._block = block
        self.__array_interface__ = block.__array_interface__


class _Loan(weakref.ref[_Lease]):
    """Holds the block of a lease beyond its end, of which it is told."""

    __slots__ = ("block", "ticket")
    block: _Block
    ticket: int


class BlockPool:
    """Blocks of memory, lent and idle, at most `limit` bytes together; the oldest are forgotten first, the idle ones
    before those that are lent."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._idle: dict[int, _Block] = {}  # by ticket, in the order in which they came
        self._lent: dict[int, _Loan] = {}
        self._ended: deque[_Loan] = deque()
        self._tickets = itertools.count()

    def lend(self, size: int) -> Array:
        """At least `size` bytes of memory, uint8, that come back when nothing refers to them, through whatever view."""
        self._collect()
        block = self._take(size) or self._allocate(size)
        lease = _Lease(block)
        if block.size <= self.limit:
            loan = _Loan(lease, self._ended.append)
            loan.block, loan.ticket = block, next(self._tickets)
            self._lent[loan.ticket] = loan
            self._forget_excess()
        return np.asarray(lease)

    def idle(self) -> int:
        """How many bytes wait to be used again."""
        self._collect()
        return sum([block.size for block in self._idle.copy().values()])

    def clear(self) -> None:
        """Free what waits to be used again."""
        self._collect()
        self._idle.clear()

    def _collect(self) -> None:
        """Make idle what has come back."""
        while self._ended:
            try:
                loan = self._ended.popleft()
            except IndexError:  # another thread was quicker
                return
            ticket: Any = getattr(loan, "ticket", None)  # an interrupt may have come before there was one
            if self._lent.pop(ticket, None) is not None:
                self._idle[next(self._tickets)] = loan.block

    def _forget_excess(self) -> None:
        idle, lent = self._idle.copy(), self._lent.copy()
        excess = sum([b.size for b in idle.values()]) + sum([loan.block.size for loan in lent.values()]) - self.limit
        for ticket, block in idle.items():
            if excess <= 0:
                return
            self._idle.pop(ticket, None)
            excess -= block.size
        for ticket, loan in lent.items():
            if excess <= 0:
                return
            self._lent.pop(ticket, None)
            excess -= loan.block.size

    def _take(self, size: int) -> _Block | None:
        """The smallest block that has `size` bytes and at most an eighth more; None if there is none."""
        most = size + size // 8
        fitting = [(block.size, ticket) for ticket, block in self._idle.copy().items() if size <= block.size <= most]
        for _, ticket in sorted(fitting):
            block = self._idle.pop(ticket, None)
            if block is not None:  # else another thread was quicker
                return block
        return None

    def _allocate(self, size: int) -> _Block:
        try:
            return _Block(size)
        except MemoryError:
            self.clear()
            return _Block(size)


@lru_cache(maxsize=1)
def block_pool() -> BlockPool:
    """The pool of this process, of at most NBBN_RECYCLE_BYTES bytes (256 MiB if unset; 0 or "" is none at all).

    Raises: ValueError if NBBN_RECYCLE_BYTES is not a whole number of bytes.
    """
    asked = os.environ.get("NBBN_RECYCLE_BYTES")
    if asked is None:
        return BlockPool(_DEFAULT_LIMIT)
    if asked and not (asked.isascii() and asked.isdecimal()):
        raise ValueError(f"NBBN_RECYCLE_BYTES must be a whole number of bytes, 0 or empty for none; received {asked!r}")
    return BlockPool(int(asked or 0))


def empty(shape: Sizes, dtype: Any) -> Array:
    """An uninitialized C-contiguous array, like np.empty's; from 1 MiB on in recycled memory, aligned to 64 bytes.

    An array in recycled memory is an ordinary one that does not own its data: flags.owndata is False, base is set,
    sys.getsizeof() counts the header alone, and resize() refuses. Its memory is used again when no array, view,
    memoryview or tensor refers to it any more. Copies and pickles are ordinary.

    Args:
        shape: of whole numbers. dtype: of plain numbers: recycled memory is not initialized for Python objects.
    Raises: ValueError if NBBN_RECYCLE_BYTES is not a whole number of bytes.
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < SMALLEST or not (pool := block_pool()).limit:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, pool.lend(size))


def empty_like(x: Array) -> Array:
    """empty() of the shape, dtype and order in memory of `x`: the strides are those of np.empty_like(x)."""
    if x.nbytes < SMALLEST:
        return np.empty_like(x, subok=False)
    if x.flags.c_contiguous:
        return empty(x.shape, x.dtype)
    order, back = order_in_memory(x.shape, x.strides, x.itemsize)
    return empty(tuple(x.shape[i] for i in order), x.dtype).transpose(back)


def clear() -> None:
    """Free the memory that waits to be used again."""
    if block_pool.cache_info().currsize:  # a forked child must not be the first to ask for the pool
        block_pool().clear()


if hasattr(os, "register_at_fork"):
    # A child that kept the blocks would make its parent copy every page that it uses again.
    os.register_at_fork(after_in_child=clear)
