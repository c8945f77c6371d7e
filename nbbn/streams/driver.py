"""CUDA's driver, and the context in which it is asked."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

from nbbn.kernels.cuda.target import SIMULATED

_AS_IT_IS = nullcontext()


@lru_cache(maxsize=1)
def driver() -> Any:
    from cuda.bindings import driver as found

    return found


def checked(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the driver has answered. Raises: RuntimeError for an error."""
    code = answer[0]
    if code:
        raise RuntimeError(f"CUDA's driver reports {getattr(code, 'name', code)}")
    return answer[1:]


def primary_context(device: int) -> AbstractContextManager[None]:
    """The device's primary context, which all libraries use, is current in this thread; so stream 0 is its own.

    One that was current before is so again afterwards. A thread that had none keeps this one: memory that a library
    takes from its pool makes none current.
    """
    if SIMULATED:
        return _AS_IT_IS
    (before,) = checked(driver().cuCtxGetCurrent())
    primary = _primary(device)
    return _AS_IT_IS if int(before) == primary else _switched(int(before), primary)


@contextmanager
def _switched(before: int, primary: int) -> Iterator[None]:
    checked(driver().cuCtxSetCurrent(primary))
    try:
        yield
    finally:
        if before:
            checked(driver().cuCtxSetCurrent(before))


@lru_cache(maxsize=64)
def _primary(device: int) -> int:
    (number,) = checked(driver().cuDeviceGet(device))
    (context,) = checked(driver().cuDevicePrimaryCtxRetain(number))
    return int(context)
