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
from nbbn.jax import batch_norm, initial_state, norm, on_cuda, policy
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
    """No address is in it: another process makes the same program. numba.cuda is for those that run it."""
    text = lowered("cuda")
    assert _CALL.findall(text) == ["nbbn_cuda_train", "nbbn_cuda_backward"]
    code = PROGRAM + "print(lowered('cuda'), end=''); assert 'numba.cuda' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == text


def test_a_number_says_what_a_step_depends_on():
    def number(shape=(8, 4), **options):
        run = lambda x: batch_norm(x, None, None, initial_state(4), training=True, **options)[0]  # noqa: E731
        traced = jax.jit(run).trace(jax.ShapeDtypeStruct(shape, "float32"))
        return re.findall(r"step = dense<(-?\d+)>", traced.lower(lowering_platforms=("cuda",)).as_text())

    assert number() == number(momentum=0.5)  # a number of the program
    options = {"epsilon": 0.1}, {"activation": "relu"}, {"skip_nonfinite": True}, {"shape": (6, 4)}, {}
    found = [number(**o) for o in options]
    assert all(len(numbers) == 1 for numbers in found)
    assert len({numbers[0] for numbers in found}) == len(options)


def test_a_program_for_both_platforms():
    text = lowered("cpu", "cuda")
    names = _CALL.findall(text)
    assert len(names) == 4
    assert [name for name in names if name.startswith("nbbn_cuda_")] == ["nbbn_cuda_train", "nbbn_cuda_backward"]


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


class Array(ctypes.Structure):
    _fields_ = (("dtype", Int), ("size", Word), ("data", Pointer))


A_CONTEXT, AN_ERROR, XLAS_ERROR, A_STEP = 0x1000, 0x2000, 0x3000, -5


class Xla:
    """What a handler gets, and what it has asked for."""

    def __init__(self, arguments=(), results=(), fails=(), step=A_STEP):
        self.asked, self.messages, self.fails, self.kept = [], [], fails, []
        self.api = Api(ctypes.sizeof(Api))
        self.answers("XLA_FFI_Stream_Get", GetStream, lambda given: setattr(given, "stream", 0x77))
        self.answers("XLA_FFI_DeviceOrdinal_Get", GetDevice, lambda given: setattr(given, "device_ordinal", 3))
        self.answers("XLA_FFI_DeviceMemory_Allocate", Allocate, lambda given: setattr(given, "data", 0x4000))
        self.answers("XLA_FFI_DeviceMemory_Free", Free, lambda given: None)
        self.function("XLA_FFI_Error_Create", self.create_error)
        self.frame = CallFrame(ctypes.sizeof(CallFrame), None, ctypes.addressof(self.api), A_CONTEXT, 3)
        self.frame.args, self.frame.rets = self.buffers(arguments), self.buffers(results)
        number = ctypes.c_int64(step)
        array = Array(5, 1, ctypes.addressof(number))
        pointers = (Pointer * 1)(ctypes.addressof(array))
        self.frame.attrs = Attributes(ctypes.sizeof(Attributes), None, 1, None, None, ctypes.addressof(pointers))
        self.kept.append((number, array, pointers))
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


@pytest.fixture
def handle(monkeypatch):
    """Have the handler run a step in a frame. Returns: the address of an error, or 0."""
    (entry,) = on_cuda._handler().overloads.values()
    handler = Function(entry.library.get_pointer_to_function(entry.fndesc.llvm_cfunc_wrapper_name))

    def run(xla, step):
        monkeypatch.setitem(on_cuda._steps, A_STEP, ("arguments",))
        monkeypatch.setattr(on_cuda, "_run_step", lambda frame, *arguments: step(frame))
        return handler(xla.address) or 0

    return run


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


def test_what_xla_refuses_is_its_error(handle):
    xla = Xla(fails=["XLA_FFI_DeviceMemory_Allocate"])
    assert handle(xla, lambda frame: frame.allocate(256)) == XLAS_ERROR
    with pytest.raises(XlaError):
        Frame(xla.address).allocate(256)
    assert xla.messages == []


def test_exceptions_are_errors(handle):
    xla = Xla()

    def fail(frame):
        raise MemoryError("é: there is none")

    assert handle(xla, fail) == AN_ERROR
    assert xla.messages == ["nbbn: a step of batch normalization could not be run: MemoryError: é: there is none"]
    assert handle(xla, lambda frame: None) == 0


@pytest.mark.parametrize("times", [1, 5])
def test_an_interrupt_comes_later(handle, times):
    """Where Python can raise it, not in XLA. The step is run again, three times at most."""
    xla, left = Xla(), [times]

    def interrupted(frame):
        if left[0]:
            left[0] -= 1
            raise KeyboardInterrupt

    def both():
        found.append(handle(xla, interrupted))
        time.sleep(10)

    found = []
    with pytest.raises(KeyboardInterrupt):
        both()
    assert found in ([], [0 if times == 1 else AN_ERROR])  # it may come before there is a result
    assert left == [0 if times == 1 else 2]
    assert [text.rpartition(": ")[2] for text in xla.messages] == ["it was interrupted"] * (times > 1)


def test_no_step_runs_when_the_process_ends(handle):
    xla = Xla()
    policy._gate[policy._CLOSED] = 1
    try:
        assert handle(xla, lambda frame: pytest.fail("Python is asked no more")) == AN_ERROR
    finally:
        policy._gate[policy._CLOSED] = 0
    assert xla.messages == ["nbbn: a step of batch normalization could not be run: the process ends"]


def test_a_program_of_another_process(handle, monkeypatch):
    xla = Xla(step=A_STEP - 1)
    assert handle(xla, lambda frame: None) == AN_ERROR
    assert xla.messages[0].endswith("LookupError: the program has been lowered in another process, and not in this one")


def test_memory_goes_back_whatever_happens(handle):
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


def test_the_version(handle):
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
