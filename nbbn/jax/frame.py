"""XLA's call frame, as compiled code reads it: what a program passes to a function of another language.

The offsets are those of the structs in xla/ffi/api/c_api.h, version 0.3, on a machine with pointers of 8 bytes. XLA
asks each function that is registered for its version, and refuses one that it does not serve.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils

INT32, INT64, BYTE = ir.IntType(32), ir.IntType(64), ir.IntType(8)
POINTER = BYTE.as_pointer()

VERSION = 0, 3
# XLA_FFI_CallFrame; where its arguments, results and attributes keep their pointers
EXTENSION, API, ARGUMENTS, RESULTS, ATTRIBUTES = 8, 16, 72, 112, 160
# XLA_FFI_Extension_Base, XLA_FFI_Metadata_Extension, XLA_FFI_Metadata
EXTENSION_TYPE, METADATA, MAJOR, MINOR = 8, 24, 24, 28
METADATA_TYPE = 1
# XLA_FFI_Buffer, XLA_FFI_Array, XLA_FFI_Api
DATA, DIMENSIONS, ARRAY_DATA, CREATE_ERROR = 24, 40, 16, 48
# XLA_FFI_Error_Create_Args: its size, its fields, the code of an internal error
ERROR_SIZE, MESSAGE, CODE, INTERNAL = 28, 16, 24, 13


class Buffer:
    """An array of the program, dense and in C order."""

    def __init__(self, builder: Any, address: Any) -> None:
        self._builder, self._dimensions = builder, load(builder, address, DIMENSIONS, POINTER)
        self.data = load(builder, address, DATA, POINTER)

    def size(self, dimension: int) -> Any:
        return load(self._builder, self._dimensions, 8 * dimension, INT64)


class Frame:
    """The call frame at an address, an LLVM integer."""

    def __init__(self, builder: Any, address: Any) -> None:
        self._builder, self._start = builder, builder.inttoptr(address, POINTER)

    def argument(self, i: int) -> Buffer:
        return Buffer(self._builder, self._entry(ARGUMENTS, i))

    def result(self, i: int) -> Buffer:
        return Buffer(self._builder, self._entry(RESULTS, i))

    def attribute(self, i: int, n: int) -> list[Any]:
        """The first n integers of an array of int64, the i-th attribute in the order of their names."""
        data = load(self._builder, self._entry(ATTRIBUTES, i), ARRAY_DATA, POINTER)
        return [load(self._builder, data, 8 * k, INT64) for k in range(n)]

    def _entry(self, table: int, i: int) -> Any:
        return load(self._builder, load(self._builder, self._start, table, POINTER), 8 * i, POINTER)

    def answer_query(self) -> Any:
        """Write the version, if XLA only asks for it. Returns: whether it does."""
        b = self._builder
        extension = load(b, self._start, EXTENSION, POINTER)
        asks = b.alloca(ir.IntType(1))
        b.store(ir.Constant(ir.IntType(1), 0), asks)
        with b.if_then(cgutils.is_not_null(b, extension)):
            kind = load(b, extension, EXTENSION_TYPE, INT32)
            with b.if_then(b.icmp_unsigned("==", kind, INT32(METADATA_TYPE))):
                metadata = load(b, extension, METADATA, POINTER)
                for offset, number in zip((MAJOR, MINOR), VERSION, strict=True):
                    store(b, metadata, offset, INT32(number))
                b.store(ir.Constant(ir.IntType(1), 1), asks)
        return b.load(asks)

    def error(self, message: str) -> Any:
        """The address of a new error with this message, as an LLVM integer."""
        b = self._builder
        arguments = b.bitcast(b.alloca(ir.ArrayType(INT64, 4)), POINTER)
        text = b.bitcast(
            cgutils.global_constant(b, "message", cgutils.make_bytearray(message.encode() + b"\0")), POINTER
        )
        fields = (0, INT64(ERROR_SIZE)), (8, INT64(0)), (MESSAGE, text), (CODE, INT32(INTERNAL))
        for offset, value in fields:
            store(b, arguments, offset, value)
        create = ir.FunctionType(POINTER, [POINTER]).as_pointer()
        found = b.call(load(b, load(b, self._start, API, POINTER), CREATE_ERROR, create), [arguments])
        return b.ptrtoint(found, INT64)


def load(builder: Any, start: Any, offset: int, kind: Any) -> Any:
    return builder.load(builder.bitcast(builder.gep(start, [INT64(offset)]), kind.as_pointer()))


def store(builder: Any, start: Any, offset: int, value: Any) -> None:
    builder.store(value, builder.bitcast(builder.gep(start, [INT64(offset)]), value.type.as_pointer()))
