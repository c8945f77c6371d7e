"""What is said while kernels are compiled: a log line for each, and one hint for whoever waits at a terminal."""

import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from numba import types

from nbbn.core.dtypes import CARRIERS

LOGGER = logging.getLogger("nbbn")
PATIENCE = 2.0  # seconds of compiling, in this process, before the hint

_FLOATS = {carrier.name: name for name, carrier in CARRIERS.items()}
_spent = 0.0
_has_hinted = False


@contextmanager
def compiling(place: str) -> Iterator[None]:
    """Around a compilation, whose result will be in `place`: after PATIENCE seconds of these, the hint.

    A program that has configured logging can show the lines of the log, and gets no hint.
    """
    global _spent
    waiter, start = None, perf_counter()
    if not _has_hinted and not LOGGER.hasHandlers() and is_terminal(sys.stderr):
        waiter = threading.Timer(max(0.0, PATIENCE - _spent), _hint, [place])
        waiter.daemon = True
        waiter.start()
    try:
        yield
    finally:
        _spent += perf_counter() - start
        if waiter is not None:
            waiter.cancel()
            waiter.join()  # a fork finds no thread of this package's


def is_terminal(stream: Any) -> bool:
    """Whether somebody may be watching."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # None, what a program has put in its place, or closed
        return False


def _hint(place: str) -> None:
    global _has_hinted
    _has_hinted = True
    silence = "logging.getLogger('nbbn').addHandler(logging.NullHandler()) hides this line"
    print(f"nbbn is compiling kernels, which takes some seconds; {place}. {silence}", file=sys.stderr)


def in_short(function: Callable[..., Any], signature: Any) -> str:
    """The arrays among a kernel's arguments, by their dtype."""
    found: dict[str, list[str]] = {}
    for name, kind in zip(inspect.signature(function).parameters, signature.args, strict=True):
        if hasattr(kind, "dtype") and not isinstance(kind, types.BaseTuple):
            found.setdefault(_FLOATS.get(str(kind.dtype), str(kind.dtype)), []).append(name)
    return "; ".join(f"{dtype} {', '.join(names)}" for dtype, names in found.items())
