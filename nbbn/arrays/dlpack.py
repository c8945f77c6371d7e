"""What is in a DLPack capsule: the structures of dlpack.h, of version 1 and of those before it."""

import ctypes
from typing import Any

import numpy as np

from nbbn.core import dtypes
from nbbn.core.layout import Sizes

CUDA = 2  # kDLCUDA


class _Tensor(ctypes.Structure):
    """DLTensor. strides: in elements, or NULL for a C-contiguous array."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned. The older DLManagedTensor begins with its DLTensor."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex"}
_BOOL = 6

_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.argtypes, _is_valid.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_int
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.argtypes, _pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p


def describe(capsule: Any) -> tuple[int, Sizes, Sizes, np.dtype, int]:
    """Address, shape, strides in bytes or (), dtype and the device's number. The capsule is left as it is, and unused:
    who made it frees it.

    Raises: TypeError for what is no such capsule, and for a dtype that NumPy has no equal of.
    """
    tensor = _tensor(capsule)
    dtype = _dtype(tensor)
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple([s * dtype.itemsize for s in tensor.strides[: tensor.ndim]]) if tensor.strides else ()
    return (tensor.data or 0) + tensor.byte_offset, shape, strides, dtype, tensor.device_id


def _tensor(capsule: Any) -> _Tensor:
    if _is_valid(capsule, b"dltensor"):
        return _Tensor.from_address(_pointer(capsule, b"dltensor"))
    if _is_valid(capsule, b"dltensor_versioned"):
        found = _Versioned.from_address(_pointer(capsule, b"dltensor_versioned"))
        if found.major != 1:
            raise TypeError(f"a DLPack capsule must be of version 1 or before; received {found.major}.{found.minor}")
        tensor: _Tensor = found.tensor
        return tensor
    raise TypeError(f"__dlpack__() must return an unused capsule 'dltensor'; received {capsule!r}")


def _dtype(tensor: _Tensor) -> np.dtype:
    if tensor.code == _BOOL and tensor.bits == 8 and tensor.lanes == 1:
        return np.dtype(np.bool_)
    name = f"{_KINDS.get(tensor.code)}{tensor.bits}"
    if tensor.lanes != 1 or tensor.code not in _KINDS:
        raise TypeError(f"NumPy has no dtype for DLPack's ({tensor.code}, {tensor.bits} bits, {tensor.lanes} lanes)")
    return dtypes.resolve(name) if name == "bfloat16" else np.dtype(name)
