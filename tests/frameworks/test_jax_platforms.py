"""nbbn.jax on a GPU, as far as there needs to be none: programs for one, and the handler of a call frame."""

import ctypes
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.extend
import numpy as np
import pytest
from jax import export

from nbbn.core.layout import layout
from nbbn.jax import batch_norm, initial_state, norm, on_cuda
from nbbn.jax.python_frame import Frame, XlaError

pytestmark = pytest.mark.frameworks

# -- programs ----------------------------------------------------------------------------------------------------------

PROGRAM = """
import jax, sys
from nbbn.jax import batch_norm, initial_state

def loss(x, scale, bias):
    y, state = batch_norm(x, scale, bias, initial_state(4), training=True, activation="relu")
    return (y**3).mean(), state

def lowered(*platforms):
    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((8, 4), (4,), (4,))]
    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True)).trace(*shapes).lower(lowering_platforms=platforms).as_text()
"""
_CALL = re.compile(r"custom_call @(\w+)\(")


def lowered(*platforms):
    names = {}
    exec(PROGRAM, names)
    return names["lowered"](*platforms)


def test_a_program_is_made_for_a_gpu_where_there_is_none():
    """No address is in it, and another process gives its kernels the same names."""
    text = lowered("cuda")
    names = _CALL.findall(text)
    assert [re.sub("_[0-9a-f]{24}$", "", name) for name in names] == ["nbbn_cuda_train", "nbbn_cuda_backward"]
    code = PROGRAM + "print(lowered('cuda')); assert 'numba.cuda' not in sys.modules"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert _CALL.findall(other) == names


def test_options_and_shapes_are_in_the_name():
    def name(shape=(8, 4), **options):
        run = lambda x: batch_norm(x, None, None, initial_state(4), training=True, **options)[0]  # noqa: E731
        traced = jax.jit(run).trace(jax.ShapeDtypeStruct(shape, "float32"))
        return _CALL.findall(traced.lower(lowering_platforms=("cuda",)).as_text())[0]

    assert name() == name(momentum=0.5)  # a number of the program
    assert len({name(), name((6, 4)), name(epsilon=0.1), name(activation="relu"), name(skip_nonfinite=True)}) == 5


def test_a_program_for_both_platforms():
    text = lowered("cpu", "cuda")
    names = _CALL.findall(text)
    assert len(names) == 4
    assert len([name for name in names if name.startswith("nbbn_cuda_")]) == 2


def test_shared_statistics_are_merged_by_xla():
    """There is no kernel for that on a GPU."""
    run = lambda x: batch_norm(x, None, None, initial_state(4), training=True, axis_name="i")[0]  # noqa: E731
    traced = jax.jit(jax.vmap(run, axis_name="i")).trace(jax.ShapeDtypeStruct((2, 8, 4), "float32"))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kinds = {name.split("_")[2] for name in _CALL.findall(text)}
    assert kinds == {"reduce", "finish", "apply"}
    assert "f64" in text


def test_inference_is_exported_to_a_gpu():
    run = jax.jit(lambda x: batch_norm(x, None, None, initial_state(4), training=False)[0])
    found = export.export(run, platforms=("cuda",))(jax.ShapeDtypeStruct((8, 4), "float32"))
    assert found.platforms == ("cuda",)
    assert "custom_call" not in found.mlir_module()


@pytest.mark.parametrize(
    ("backend", "platforms", "missing", "shape", "expected"),
    [
        ("cpu", ["cpu"], "numba-cuda", (8, 4), True),
        ("gpu", ["cpu", "cuda"], None, (8, 4), True),
        ("gpu", ["cpu", "cuda"], None, (7, 4), False),
        ("gpu", ["cpu", "cuda"], "numba-cuda", (8, 4), False),
        ("gpu", ["cpu", "rocm"], None, (8, 4), False),
        ("tpu", ["cpu", "tpu"], None, (8, 4), False),
    ],
    ids=["CPU", "CUDA", "a batch in parts", "without numba-cuda", "another GPU", "TPU"],
)
def test_where_there_are_kernels(monkeypatch, backend, platforms, missing, shape, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax.extend.backend, "backends", lambda: dict.fromkeys(platforms))
    monkeypatch.setattr(norm.availability, "missing", lambda: missing)
    assert norm.has_kernels(layout(shape, (1,), 2, "last")) is expected


# -- the call frame, as xla/ffi/api/c_api.h has it ---------------------------------------------------------------------

Word, Pointer, Int = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
HEADER = Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h"


def struct(name, *fields):
    """A struct of XLA's, which begins with its size and its extensions."""
    fields = (("struct_size", Word), ("extension_start", Pointer), *fields)
    return type(name, (ctypes.Structure,), {"_fields_": fields})


CONTEXT = ("ctx", Pointer)
Version = struct("XLA_FFI_Api_Version", ("major_version", Int), ("minor_version", Int))
CreateError = struct("XLA_FFI_Error_Create_Args", ("message", ctypes.c_char_p), ("errc", Int))
GetStream = struct("XLA_FFI_Stream_Get_Args", CONTEXT, ("stream", Pointer))
GetDevice = struct("XLA_FFI_DeviceOrdinal_Get_Args", CONTEXT, ("device_ordinal", ctypes.c_int32))
Allocate = struct("XLA_FFI_DeviceMemory_Allocate_Args", CONTEXT, ("size", Word), ("alignment", Word), ("data", Pointer))
Free = struct("XLA_FFI_DeviceMemory_Free_Args", CONTEXT, ("size", Word), ("data", Pointer))
Buffer = struct("XLA_FFI_Buffer", ("dtype", Int), ("data", Pointer), ("rank", ctypes.c_int64), ("dims", Pointer))
Buffers = struct("XLA_FFI_Args", ("size", ctypes.c_int64), ("types", Pointer), ("args", Pointer))
Attributes = struct(
    "XLA_FFI_Attrs", ("size", ctypes.c_int64), ("types", Pointer), ("names", Pointer), ("attrs", Pointer)
)
CallFrame = struct(
    "XLA_FFI_CallFrame",
    *(("api", Pointer), CONTEXT, ("stage", Int), ("args", Buffers), ("rets", Buffers), ("attrs", Attributes)),
    ("future", Pointer),
)
FUNCTIONS = re.findall(r"_XLA_FFI_API_STRUCT_FIELD\((\w+)\);", HEADER.read_text())
Api = struct(
    "XLA_FFI_Api", ("api_version", Version), ("internal_api", Pointer), *((name, Pointer) for name in FUNCTIONS)
)
Function = ctypes.CFUNCTYPE(Pointer, Pointer)
A_CONTEXT, AN_ERROR, XLAS_ERROR = 0x1000, 0x2000, 0x3000


class Xla:
    """What a handler gets, and what it has asked for."""

    def __init__(self, arguments=(), results=(), fails=()):
        self.asked, self.messages, self.fails, self.kept = [], [], fails, []
        self.api = Api(ctypes.sizeof(Api))
        self.answers("XLA_FFI_Stream_Get", GetStream, lambda given: setattr(given, "stream", 0x77))
        self.answers("XLA_FFI_DeviceOrdinal_Get", GetDevice, lambda given: setattr(given, "device_ordinal", 3))
        self.answers("XLA_FFI_DeviceMemory_Allocate", Allocate, lambda given: setattr(given, "data", 0x4000))
        self.answers("XLA_FFI_DeviceMemory_Free", Free, lambda given: None)
        self.function("XLA_FFI_Error_Create", self.create_error)
        self.frame = CallFrame(ctypes.sizeof(CallFrame), None, ctypes.addressof(self.api), A_CONTEXT, 3)
        self.frame.args, self.frame.rets = self.buffers(arguments), self.buffers(results)
        self.address = ctypes.addressof(self.frame)

    def function(self, name, python):
        self.kept.append(Function(python))
        setattr(self.api, name, ctypes.cast(self.kept[-1], Pointer))

    def answers(self, name, kind, answer):
        last, _ = kind._fields_[-1]

        def function(address):
            given = kind.from_address(address)
            assert given.struct_size == getattr(kind, last).offset + getattr(kind, last).size
            assert (given.extension_start, given.ctx) == (None, A_CONTEXT)
            self.asked.append((name, *(getattr(given, field) for field, _ in kind._fields_[3:])))
            answer(given)
            return XLAS_ERROR if name in self.fails else None

        self.function(name, function)

    def create_error(self, address):
        given = CreateError.from_address(address)
        assert given.struct_size == CreateError.errc.offset + CreateError.errc.size
        assert given.errc == 13  # an internal one
        self.messages.append(given.message.decode())
        return AN_ERROR

    def buffers(self, addresses):
        made = [Buffer(ctypes.sizeof(Buffer), None, 11, address, 0, None) for address in addresses]
        pointers = (Pointer * len(made))(*map(ctypes.addressof, made))
        self.kept.append((made, pointers))
        return Buffers(ctypes.sizeof(Buffers), None, len(made), None, ctypes.addressof(pointers))


def handle(xla, step):
    return on_cuda._handler(step)(xla.address)


@pytest.fixture(autouse=True)
def _no_gpu_at_exit(monkeypatch):
    monkeypatch.setattr(on_cuda, "_finish_at_exit", lambda: None)


def test_buffers():
    frame = Frame(Xla([16, 32, 48], [64, 80]).address)
    assert frame.arguments() == [16, 32, 48]
    assert frame.results() == [64, 80]
    assert Frame(Xla().address).arguments() == []


def test_what_a_handler_asks():
    xla = Xla()
    frame = Frame(xla.address)
    assert (frame.stream(), frame.device(), frame.allocate(256)) == (0x77, 3, 0x4000)
    frame.free(0x4000, 256)
    assert xla.asked == [
        ("XLA_FFI_Stream_Get", None),
        ("XLA_FFI_DeviceOrdinal_Get", 0),
        ("XLA_FFI_DeviceMemory_Allocate", 256, 16, None),
        ("XLA_FFI_DeviceMemory_Free", 256, 0x4000),
    ]


def test_what_xla_refuses_is_its_error():
    xla = Xla(fails=["XLA_FFI_DeviceMemory_Allocate"])
    assert handle(xla, lambda frame: frame.allocate(256)) == XLAS_ERROR
    with pytest.raises(XlaError):
        Frame(xla.address).allocate(256)
    assert xla.messages == []


def test_exceptions_are_errors():
    xla = Xla()

    def fail(frame):
        raise MemoryError("é: there is none")

    assert handle(xla, fail) == AN_ERROR
    assert xla.messages == ["nbbn: a step of batch normalization could not be run: MemoryError: é: there is none"]
    assert handle(xla, lambda frame: None) == 0


def test_an_interrupt_comes_later():
    """Where Python can raise it, not in XLA."""
    xla = Xla()

    def interrupted(frame):
        raise KeyboardInterrupt

    assert handle(xla, interrupted) == AN_ERROR
    with pytest.raises(KeyboardInterrupt):
        time.sleep(10)
    assert xla.messages == ["nbbn: a step of batch normalization could not be run: it was interrupted"]


def test_memory_goes_back_whatever_happens():
    xla = Xla()

    def fail(frame):
        with on_cuda._program.call(frame):
            memory = on_cuda._program.empty((3, 5), np.dtype(np.float64), 0)
            assert on_cuda._program.stream(0) == 0x77
            assert on_cuda._program.describe(memory) == (0x4000, (3, 5), (), np.dtype(np.float64), 0)
            raise ValueError("between")

    assert handle(xla, fail) == AN_ERROR
    assert [name for name, *_ in xla.asked][1:] == ["XLA_FFI_DeviceMemory_Allocate", "XLA_FFI_DeviceMemory_Free"]
    assert xla.asked[-1] == ("XLA_FFI_DeviceMemory_Free", 120, 0x4000)


def test_the_version():
    """That of the header that jaxlib brings."""

    class Metadata(ctypes.Structure):
        _fields_ = (("struct_size", Word), ("api_version", Version), ("traits", ctypes.c_uint32))

    class Extension(ctypes.Structure):
        _fields_ = (("struct_size", Word), ("type", Int), ("next", Pointer), ("metadata", Pointer))

    metadata = Metadata(ctypes.sizeof(Metadata))
    extension = Extension(ctypes.sizeof(Extension), 1, None, ctypes.addressof(metadata))
    xla = Xla()
    xla.frame.extension_start = ctypes.addressof(extension)
    assert handle(xla, lambda frame: pytest.fail("it is only a question")) == 0
    expected = [int(n) for n in re.findall(r"#define XLA_FFI_API_M\w+ (\d+)", HEADER.read_text())]
    assert [metadata.api_version.major_version, metadata.api_version.minor_version] == expected
    assert metadata.traits == 0
    extension.type = 2  # another one
    assert handle(xla, lambda frame: frame.device()) == 0
    assert xla.asked == [("XLA_FFI_DeviceOrdinal_Get", 0)]
