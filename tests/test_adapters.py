"""What nbbn asks of the array libraries, as far as it can be seen without a GPU.

The adapters see CPU tensors, which have the same attributes, or stand-ins. That kernels find what the adapters say is
for tests/gpu.
"""

import ctypes
import importlib
import sys
import warnings
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import nbbn
from nbbn.arrays import availability, dlpack, libraries
from nbbn.arrays.device import wrap
from nbbn.arrays.gpu import device_place, find_library
from nbbn.arrays.libraries import find_on_host
from nbbn.core.layout import contiguous_strides
from tests.helpers.processes import run as run_process

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64)]
EVERY_FLOAT = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
needs_numba_cuda = pytest.mark.skipif(find_spec("numba_cuda") is None, reason="needs numba-cuda (extra: cuda)")


def values(shape, dtype=np.float32):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


# -- stand-ins ---------------------------------------------------------------------------------------------------------


class CupyArray(np.ndarray):
    """A NumPy array with the attributes of CuPy's that differ."""

    data = property(lambda self: SimpleNamespace(ptr=self.ctypes.data))
    device = property(lambda self: CupyDevice(0))


class CupyDevice:
    entered = 0  # how many are the current device now

    def __init__(self, number):
        self.id = number

    def __enter__(self):
        CupyDevice.entered += 1

    def __exit__(self, *error):
        CupyDevice.entered -= 1


def cupy_stand_in():
    def allocating(function):
        def call(*args, **kwargs):
            assert CupyDevice.entered, "memory would come from whichever device is current"
            return function(*args, **kwargs).view(CupyArray)

        return call

    def array(value, order, blocking=False):
        module.waited = blocking
        return np.array(value, order=order)

    module = ModuleType("cupy")
    module.ndarray = CupyArray
    for name in ("empty", "empty_like"):
        setattr(module, name, allocating(getattr(np, name)))
    module.array = allocating(array)
    module.asnumpy = lambda a: np.array(a)
    module.broadcast_to = lambda a, shape: np.broadcast_to(a, shape, subok=True)
    stream = SimpleNamespace(ptr=77)
    module.cuda = SimpleNamespace(Device=CupyDevice, get_current_stream=lambda device: stream)
    return module


@pytest.fixture
def cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", cupy_stand_in())
    monkeypatch.delitem(sys.modules, "nbbn.arrays.cupy", raising=False)
    yield importlib.import_module("nbbn.arrays.cupy")
    sys.modules.pop("nbbn.arrays.cupy", None)  # it knows the stand-in


@pytest.fixture
def torch(monkeypatch):
    module = pytest.importorskip("torch", reason="needs PyTorch (extra: bench)")
    adapter = importlib.import_module("nbbn.arrays.torch")
    monkeypatch.setattr(adapter, "_device", lambda number: module.device("cpu"))
    monkeypatch.setattr(adapter, "_pinned", lambda tensor: tensor)  # there is no driver to ask for pinned memory
    return adapter


@pytest.fixture
def jax(monkeypatch):
    pytest.importorskip("jax", reason="needs JAX (extra: bench)")
    adapter = importlib.import_module("nbbn.arrays.jax")
    monkeypatch.setattr(adapter, "_order", lambda array: array.block_until_ready())  # there is no stream to wait in
    return adapter


@pytest.fixture(params=["torch", "cupy", "jax"])
def library(request):
    return request.getfixturevalue(request.param)


# -- what all adapters do ----------------------------------------------------------------------------------------------


@EVERY_FLOAT
def test_an_array_is_described(library, dtype):
    array = library.from_host(values((2, 3, 4), dtype), 0)
    found = wrap(array, library)
    assert (found.shape, found.dtype, found.device) == ((2, 3, 4), dtype, 0)
    assert type(found.shape) is tuple
    assert found.strides == contiguous_strides((2, 3, 4), dtype.itemsize)
    memory = (ctypes.c_char * (24 * dtype.itemsize)).from_address(found.address)
    np.testing.assert_array_equal(np.frombuffer(memory, dtype), values((24,), dtype))
    host = library.to_host(array)
    assert host.dtype == dtype
    np.testing.assert_array_equal(host, values((2, 3, 4), dtype))


def test_an_address_by_itself(library):
    for array in (library.empty((3, 5), FLOATS[2], 0), library.empty_like(library.from_host(values((2, 3)), 0))):
        assert library.address(array) == wrap(array, library).address


@EVERY_FLOAT
def test_memory_is_that_library_s_own(library, dtype):
    array = library.empty((3, 5), dtype, 0)
    assert type(array) is type(library.from_host(values((2,)), 0))
    assert wrap(array, library).dtype == dtype
    like = library.empty_like(array)
    assert type(like) is type(array)
    assert (wrap(like, library).shape, wrap(like, library).dtype) == ((3, 5), dtype)
    assert wrap(like, library).address != wrap(array, library).address


def test_from_host_copies_whatever_the_memory_is_like(library):
    """Also memory that is read-only, which PyTorch warns of."""
    host = values((4, 6))
    host.flags.writeable = False
    for source in (host, host.T, host[::2, 1:]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            array = library.from_host(source, 0)
        np.testing.assert_array_equal(library.to_host(array), source)
        assert wrap(array, library).strides == contiguous_strides(source.shape, 4)


@pytest.mark.parametrize("method", ["from_host", "send"])
def test_what_comes_from_the_host_shares_nothing(library, method):
    host = values((8,))
    array = getattr(library, method)(host, 0)
    host[:] = 0
    np.testing.assert_array_equal(library.to_host(array), values((8,)))


def test_only_what_other_streams_may_use_is_waited_for(cupy, torch, monkeypatch):
    """Of PyTorch a copy waits unless its source is pinned and nobody asks it to."""
    import torch as pytorch

    cupy.from_host(values((4,)), 0)
    assert sys.modules["cupy"].waited
    cupy.send(values((4,)), 0)
    assert not sys.modules["cupy"].waited
    asked = []
    pinned = SimpleNamespace(to=lambda device, non_blocking: asked.append((device, non_blocking)))
    monkeypatch.setattr(torch, "_pinned", lambda tensor: pinned)
    torch.send(values((4,)), 0)
    assert asked == [(pytorch.device("cpu"), True)]


def test_bytes_for_scratch(library):
    assert wrap(library.empty((48,), np.dtype(np.uint8), 0), library).itemsize == 1


@pytest.mark.parametrize("dtype", [np.dtype(bool), np.dtype(np.int32), BFLOAT16], ids=str)
def test_astype_from_and_to(library, dtype):
    array = library.from_host(values((6,)), 0)
    there = library.astype(array, dtype)
    np.testing.assert_array_equal(library.to_host(there), values((6,)).astype(dtype))
    back = library.astype(there, np.dtype(np.float32))
    np.testing.assert_array_equal(library.to_host(back), values((6,)).astype(dtype).astype(np.float32))


def test_astype_copies(library):
    """The caller asks for it where it needs memory of its own."""
    array = library.from_host(values((6,)), 0)
    assert wrap(library.astype(array, np.dtype(np.float32)), library).address != wrap(array, library).address


@EVERY_FLOAT
def test_copy_of_a_permuted_split_array(library, dtype):
    """As for five alternating runs of a virtual batch, of an array that broadcasts."""
    host = values((1, 2, 3, 5), dtype)
    seen = device_place(library, 0).broadcast(wrap(library.from_host(host, 0), library), (4, 2, 3, 5))
    copy = library.copy(seen, (2, 2, 2, 3, 5), (0, 3, 1, 4, 2))
    expected = np.broadcast_to(host, (4, 2, 3, 5)).reshape(2, 2, 2, 3, 5).transpose(0, 3, 1, 4, 2)
    np.testing.assert_array_equal(library.to_host(copy), expected)
    assert wrap(copy, library).strides == contiguous_strides(expected.shape, dtype.itemsize)
    assert wrap(copy, library).address != seen.address


def test_copy_is_one_even_where_nothing_moves(library):
    """Somebody writes to it, or changes what it was made from."""
    seen = wrap(library.from_host(values((2, 3)), 0), library)
    assert wrap(library.copy(seen, (2, 3), (0, 1)), library).address != seen.address


@pytest.mark.parametrize("name", ["torch", "cupy"])
@EVERY_FLOAT
def test_assign_is_the_other_way(request, name, dtype):
    library = request.getfixturevalue(name)
    host = values((4, 2, 3), dtype)
    value = library.from_host(host.reshape(2, 2, 2, 3).transpose(1, 3, 0, 2), 0)
    target = library.empty((4, 2, 3), dtype, 0)
    library.assign(wrap(target, library), (2, 2, 2, 3), (1, 3, 0, 2), value)
    np.testing.assert_array_equal(library.to_host(target), host)


@pytest.mark.parametrize("name", ["torch", "cupy"])
def test_assign_to_strided_memory(request, name):
    """As out= may be."""
    library = request.getfixturevalue(name)
    whole = library.from_host(np.zeros((4, 2, 6), np.float32), 0)
    target = wrap(whole[:, :, ::2], library)
    value = library.from_host(values((2, 2, 3, 2)), 0)
    library.assign(target, (2, 2, 2, 3), (0, 1, 3, 2), value)
    expected = values((2, 2, 3, 2)).transpose(0, 1, 3, 2).reshape(4, 2, 3)
    np.testing.assert_array_equal(library.to_host(whole)[:, :, ::2], expected)
    assert not library.to_host(whole)[:, :, 1::2].any()


@pytest.mark.parametrize("name", ["torch", "cupy"])
def test_empty_like_keeps_the_order_of_memory(request, name):
    """Else an input in channels-last memory and its output would have no view in common."""
    library = request.getfixturevalue(name)
    array = library.from_host(values((2, 4, 5, 3)), 0)
    last = array.permute(0, 3, 1, 2) if name == "torch" else array.transpose(0, 3, 1, 2)
    assert wrap(library.empty_like(last), library).strides == wrap(last, library).strides == (240, 4, 60, 12)


def test_what_may_be_written_to(library):
    """JAX's arrays never change."""
    assert library.is_writable(library.from_host(values((2,)), 0)) == (not library.__name__.endswith("jax"))


@needs_numba_cuda
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("torch", "float32"), ("torch", "bfloat16"), *((n, "float32") for n in ("cupy", "jax", "DLPack", "interface"))],
)
def test_a_layer_in_the_simulator(name, dtype):
    """On arrays of the host, whose memory is that of the simulator's device."""
    if name in ("torch", "jax") and find_spec(name) is None:
        pytest.skip(f"needs {name} (extra: bench)")
    program = f"from tests.helpers.adapters_in_simulator import main; main({name!r}, {dtype!r})"
    done = run_process(program, "-W", "error", timeout=200, NUMBA_ENABLE_CUDASIM="1")
    assert done.returncode == 0, done.stderr
    assert "results agree" in done.stdout


# -- PyTorch -----------------------------------------------------------------------------------------------------------


def test_a_tensor_that_autograd_follows_is_refused(torch):
    import torch as pytorch

    x = pytorch.zeros(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"requires_grad=True must be passed as tensor.detach\(\)"):
        wrap(x, torch)
    with pytest.raises(ValueError, match="requires_grad"):
        wrap(x * 2, torch)
    assert wrap(x.detach(), torch).address == x.data_ptr()
    with pytorch.no_grad():
        assert wrap(x, torch).address == x.data_ptr()


def test_tensors_without_plain_memory_are_refused(torch):
    import torch as pytorch

    negated = pytorch.zeros(3, dtype=pytorch.complex64).conj().imag
    with pytest.raises(ValueError, match=r"is_neg\(\) True"):
        wrap(negated, torch)
    with pytest.raises(ValueError, match=r"layout torch\.sparse_coo"):
        wrap(pytorch.eye(2).to_sparse(), torch)


def test_pytorchs_current_stream(torch, monkeypatch):
    import torch as pytorch

    monkeypatch.setattr(torch, "_raw_stream", None)
    monkeypatch.setattr(pytorch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=100 + device))
    assert torch.stream(1) == 101
    monkeypatch.setattr(torch, "_raw_stream", lambda device: 200 + device)
    assert torch.stream(1) == 201


def test_tensors_of_the_host_are_no_gpus(torch):
    import torch as pytorch

    x = pytorch.arange(24, dtype=pytorch.float32).reshape(4, 6)
    for tensor in (x, pytorch.nn.Parameter(x)):
        assert find_library(tensor) is None
        assert find_on_host(tensor) is torch


# -- JAX ---------------------------------------------------------------------------------------------------------------


def test_float64_is_float64_whatever_jax_is_set_to(jax):
    """Kernels would write past the end of what JAX makes of it otherwise."""
    array = jax.empty((4,), np.dtype(np.float64), 0)
    assert array.nbytes == 32
    assert jax.empty_like(array).nbytes == 32
    assert jax.from_host(np.ones(4), 0).nbytes == 32
    assert jax.to_host(array).dtype == np.float64


def test_the_host_sees_what_changed(jax):
    """JAX keeps what np.asarray() has once brought to the host."""
    array = jax.from_host(values((4,)), 0)
    before = jax.to_host(array)
    ctypes.c_float.from_address(jax.describe(array)[0]).value = 9
    np.testing.assert_array_equal(before, values((4,)))
    np.testing.assert_array_equal(jax.to_host(array), [9, 1, 2, 3])


def test_the_default_stream_waits_for_jax_and_the_host_does_not():
    """Before the kernels are queued that read or write the array. Anything else that is asked of it is an error."""
    pytest.importorskip("jax", reason="needs JAX (extra: bench)")
    adapter, asked = importlib.import_module("nbbn.arrays.jax"), []

    class OnGpu:
        shape, dtype, device = (2, 3), np.dtype(np.float32), SimpleNamespace(local_hardware_id=1)

        def __dlpack__(self, *, stream):
            asked.append(stream)

        def unsafe_buffer_pointer(self):
            asked.append("address")
            return 2**40

    assert adapter.describe(OnGpu()) == (2**40, (2, 3), (), np.float32, 1)
    assert adapter.address(OnGpu()) == 2**40
    assert asked == [1, "address"] * 2


def test_jax_arrays_of_the_host_are_no_gpus_and_tracers_are_nobodys(jax):
    import jax as framework

    x = framework.numpy.arange(6.0).reshape(2, 3)
    assert find_library(x) is None
    assert find_on_host(x) is jax
    with pytest.raises(framework.errors.TracerArrayConversionError):
        framework.jit(nbbn.BatchNormalization())(x)


# -- any other library -------------------------------------------------------------------------------------------------


class Exporter:
    """An array of a library that nobody knows, over NumPy's memory."""

    def __init__(self, host, **facts):
        self.host = host
        self.__cuda_array_interface__ = {
            "shape": host.shape,
            "typestr": host.dtype.str,
            "data": (host.ctypes.data, False),
            "version": 3,
            **facts,
        }


class Capsules:
    """The same by DLPack; `device`: what it says of where its memory is."""

    def __init__(self, host, device=(dlpack.CUDA, 0), **request):
        self.host, self.device, self.request, self.streams = host, device, request, []

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream=None):
        self.streams.append(stream)
        return self.host.__dlpack__(**self.request)


@pytest.fixture
def interface(monkeypatch):
    pytest.importorskip("numba_cuda", reason="needs numba-cuda (extra: cuda)")
    module = importlib.import_module("nbbn.arrays.interface")
    monkeypatch.setattr(module, "_device_of", lambda address: 3)
    return module


@pytest.fixture
def waited(interface, monkeypatch):
    """Streams and devices that the default stream has been made to wait for."""
    found = []
    monkeypatch.setattr(interface, "_wait_for", lambda stream, device: found.append((stream, device)))
    return found


def test_cuda_array_interface(interface):
    host = values((4, 6))[:, ::2]
    found = wrap(Exporter(host, strides=host.strides), interface)
    assert (found.address, found.shape, found.strides) == (host.ctypes.data, (4, 3), (24, 8))
    assert (found.dtype, found.device) == (np.float32, 3)


@pytest.mark.parametrize("facts", [{"strides": None}, {}, {"version": 2}, {"shape": [4, 6]}])
def test_cuda_array_interface_without_strides_is_contiguous(interface, facts):
    assert wrap(Exporter(values((4, 6)), **facts), interface).strides == (24, 4)


def test_the_stream_of_the_interface_is_waited_for(interface, waited):
    host = values((2,))
    for stream in (None, 1):  # nothing to wait for; the stream that kernels run on
        wrap(Exporter(host, stream=stream), interface)
    assert waited == []
    wrap(Exporter(host, stream=2), interface)
    wrap(Exporter(host, stream=12345), interface)
    assert waited == [(2, 3), (12345, 3)]


def test_a_mask_is_refused(interface):
    with pytest.raises(TypeError, match="received a Exporter with a mask"):
        wrap(Exporter(values((2,)), mask=Exporter(values((2,)))), interface)


def test_read_only_memory(interface):
    host = values((2,))
    assert interface.is_writable(Exporter(host))
    assert not interface.is_writable(Exporter(host, data=(host.ctypes.data, True)))


@pytest.mark.parametrize("request_", [{}, {"max_version": (1, 0)}], ids=["before version 1", "version 1"])
@pytest.mark.parametrize("dtype", [*FLOATS[::2], FLOATS[3], np.dtype(np.int8), np.dtype(bool)], ids=str)
def test_dlpack_capsules(request_, dtype):
    for host in (values((3, 4, 5), dtype), values((3, 4, 5), dtype).transpose(2, 0, 1)[1:, ::-1], values((), dtype)):
        address, shape, strides, found, device = dlpack.describe(host.__dlpack__(**request_))
        assert (address, shape, found, device) == (host.ctypes.data, host.shape, dtype, 0)
        assert (strides or contiguous_strides(shape, dtype.itemsize)) == host.strides


def test_dlpack_bfloat16_and_offsets():
    pytorch = pytest.importorskip("torch", reason="NumPy exports no bfloat16; needs PyTorch (extra: bench)")
    tensor = pytorch.arange(12, dtype=pytorch.bfloat16).reshape(3, 4)[1:, ::2]
    found = dlpack.describe(tensor.__dlpack__())
    assert found == (tensor.data_ptr(), (2, 2), (8, 4), BFLOAT16, 0)


def _capsule(structure, name):
    """One around a structure of the tests', which has to stay alive."""
    new = ctypes.pythonapi.PyCapsule_New
    new.argtypes, new.restype = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p), ctypes.py_object
    return new(ctypes.addressof(structure), name, None)


def test_dlpack_byte_offset_and_device():
    """As of producers whose memory handle is that of a whole buffer."""
    shape = (ctypes.c_int64 * 2)(3, 4)
    tensor = dlpack._Tensor(4096, dlpack.CUDA, 5, 2, 2, 32, 1, shape, None, 640)
    assert dlpack.describe(_capsule(tensor, b"dltensor")) == (4736, (3, 4), (), np.float32, 5)


def test_dlpack_of_another_major_version_is_refused():
    """Its structures may be others."""
    managed = dlpack._Versioned(major=2, minor=1)
    with pytest.raises(TypeError, match=r"must be of version 1 or before; received 2\.1"):
        dlpack.describe(_capsule(managed, b"dltensor_versioned"))


def test_dlpack_leaves_the_capsule_to_its_maker():
    """Unused, its destructor frees what it holds; used, nobody would."""
    host = values((5,))
    before = sys.getrefcount(host)
    for _ in range(10):
        dlpack.describe(host.__dlpack__())
    assert sys.getrefcount(host) == before


@pytest.mark.parametrize("capsule", [None, 7, "x"])
def test_what_is_no_capsule_is_refused(capsule):
    with pytest.raises(TypeError, match="must return an unused capsule 'dltensor'; received"):
        dlpack.describe(capsule)


def test_dlpack_dtypes_that_numpy_lacks():
    tensor = SimpleNamespace(code=10, bits=8, lanes=1)
    with pytest.raises(TypeError, match=r"NumPy has no dtype for DLPack's \(10, 8 bits, 1 lanes\)"):
        dlpack._dtype(tensor)
    with pytest.raises(TypeError, match="4 lanes"):
        dlpack._dtype(SimpleNamespace(code=2, bits=32, lanes=4))


def test_dlpack_makes_the_default_stream_wait(interface):
    exporter = Capsules(values((2, 3)))
    found = wrap(exporter, interface)
    assert (found.address, found.shape, found.device) == (exporter.host.ctypes.data, (2, 3), 0)
    assert exporter.streams == [1]  # DLPack's number of the legacy default stream


@pytest.mark.parametrize(
    ("strides", "dense"),
    [((24, 4), True), ((4, 16), True), ((48, 4), False), ((24, 8), False), ((0, 4), False), ((-24, 4), False)],
)
def test_which_strides_an_output_takes_over(interface, strides, dense):
    assert interface._is_dense((4, 6), strides, 4) is dense


# -- finding the library -----------------------------------------------------------------------------------------------


@needs_numba_cuda
def test_others_are_found_by_what_they_export(monkeypatch):
    monkeypatch.setattr(availability, "require", lambda what: None)
    libraries.load.cache_clear()
    interface = importlib.import_module("nbbn.arrays.interface")
    assert find_library(Exporter(values((2,)))) is interface
    assert find_library(Capsules(values((2,)))) is interface
    libraries.load.cache_clear()


def test_without_a_gpu_an_array_of_one_says_what_is_missing(monkeypatch):
    libraries.load.cache_clear()
    monkeypatch.setattr(availability, "missing", lambda: "there is none")
    with pytest.raises(RuntimeError, match="an array on a GPU needs a GPU: there is none"):
        find_library(Exporter(values((2,))))


@pytest.mark.parametrize(
    "value", [1.0, [1.0], None, np.ones(2), Capsules(values((2,)), device=(1, 0))], ids=lambda v: type(v).__name__
)
def test_what_is_not_on_a_gpu(value):
    assert find_library(value) is None
    assert find_on_host(value) is None


def test_cupys_arrays_are_found(cupy):
    libraries.load.cache_clear()
    kind = type("ndarray", (CupyArray,), {"__module__": "cupy"})
    derived = type("Mine", (kind,), {"__module__": "mine"})
    for found in (kind, derived):
        assert find_library(np.ones(2).view(found)) is cupy
    libraries.load.cache_clear()


def test_nothing_is_imported_to_see_what_a_number_is():
    """A call with a list must not cost the import of a framework."""
    before = set(sys.modules)
    find_library([1.0])
    find_on_host([1.0])
    assert set(sys.modules) == before
