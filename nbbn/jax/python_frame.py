"""XLA's call frame, as Python reads it, by the offsets of frame.py."""

import ctypes
from collections.abc import Callable
from functools import cache

from nbbn.jax import frame as at

# XLA_FFI_CallFrame: its context; the numbers of arguments and results, from the pointers to them
_CONTEXT, _COUNT = 24, -16
# XLA_FFI_Api: functions, and the sizes of what they are given
_STREAM, _STREAM_SIZE = 80, 32
_ALLOCATE, _ALLOCATE_SIZE = 120, 48
_FREE, _FREE_SIZE = 128, 40
_DEVICE, _DEVICE_SIZE = 184, 28
_ALIGNMENT = 16  # of what is allocated: the widest access of a kernel


class XlaError(Exception):
    """XLA has refused something. address: of its own error, which is to be handed on."""

    def __init__(self, address: int) -> None:
        super().__init__("XLA has refused a call")
        self.address = address


class Frame:
    """The call frame at an address, while the program waits for its handler."""

    def __init__(self, address: int) -> None:
        self._address = address

    def arguments(self) -> list[int]:
        """Where the arrays are that the step reads."""
        return self._buffers(at.ARGUMENTS)

    def results(self) -> list[int]:
        """Where those are that it writes."""
        return self._buffers(at.RESULTS)

    def stream(self) -> int:
        """The handle of the stream of the call."""
        return self._ask(_STREAM, _STREAM_SIZE, 0)

    def device(self) -> int:
        """The number of its GPU."""
        return self._ask(_DEVICE, _DEVICE_SIZE, 0)

    def allocate(self, size: int) -> int:
        """Memory of XLA's, for what is put into the stream before it is given back."""
        return self._ask(_ALLOCATE, _ALLOCATE_SIZE, size, _ALIGNMENT, 0)

    def free(self, address: int, size: int) -> None:
        self._ask(_FREE, _FREE_SIZE, size, address)

    def error(self, message: str) -> int:
        """The address of a new error."""
        text = ctypes.create_string_buffer(message.encode())
        given = (ctypes.c_int64 * 4)(at.ERROR_SIZE, 0, ctypes.addressof(text), at.INTERNAL)
        return self._function(at.CREATE_ERROR)(ctypes.addressof(given)) or 0

    def _ask(self, function: int, size: int, *fields: int) -> int:
        """The last field of what a function of XLA's is given, which may have written to it. Raises: XlaError."""
        context = _pointer(self._address + _CONTEXT)
        given = (ctypes.c_int64 * (3 + len(fields)))(size, 0, context, *fields)
        error = self._function(function)(ctypes.addressof(given))
        if error:
            raise XlaError(error)
        return given[-1]

    def _function(self, offset: int) -> Callable[[int], int | None]:
        return _function(_pointer(_pointer(self._address + at.API) + offset))

    def _buffers(self, table: int) -> list[int]:
        place = self._address + table
        count, entries = ctypes.c_int64.from_address(place + _COUNT).value, _pointer(place)
        return [_pointer(_pointer(entries + 8 * i) + at.DATA) for i in range(count)]


def _pointer(address: int) -> int:
    return ctypes.c_void_p.from_address(address).value or 0


@cache
def _function(address: int) -> Callable[[int], int | None]:
    return ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address)
