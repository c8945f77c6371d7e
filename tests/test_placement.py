"""Asking for a GPU where there is none; with one, tests/test_layer_cuda.py."""

import inspect

import numpy as np
import pytest

import nbbn
from nbbn.arrays import HOST
from nbbn.arrays.gpu import DevicePlace
from tests.helpers.processes import check

# In a process of its own, that sees no GPU whatever machine this is.
NO_GPU = """
import sys
import numpy as np
import nbbn
from nbbn.arrays import availability
{before}
layer = nbbn.BatchNormalization()
layer.build((2, 3))
class OnGpu:
    __cuda_array_interface__ = dict(shape=(2, 3), typestr="<f4", data=(4096, False), version=3, strides=None)
for call in (lambda: layer.to("cuda"), lambda: layer.to("cuda:1"), lambda: layer(OnGpu()), lambda: layer.vjp(OnGpu())):
    try:
        call()
    except RuntimeError as error:
        print(error)
assert layer.to("cpu") is layer and layer.device == "cpu"
assert layer(np.ones((2, 3), np.float32)).shape == (2, 3)
"""


@pytest.mark.parametrize(
    ("before", "why"),
    [
        ("availability.find_spec = lambda name: None", 'numba-cuda is not installed: pip install "nbbn[cuda]"'),
        ("", None),
    ],
    ids=["without numba-cuda", "without a GPU"],
)
def test_without_a_gpu_one_clear_error(before, why):
    found = check(NO_GPU.format(before=before), CUDA_VISIBLE_DEVICES="", NUMBA_ENABLE_CUDASIM="0").splitlines()
    whats = ["to('cuda')", "to('cuda:1')", "an array on a GPU", "an array on a GPU"]
    assert [line.split(" needs a GPU: ")[0] for line in found] == whats
    reasons = {line.split(" needs a GPU: ")[1] for line in found}
    assert len(reasons) == 1
    if why is None:
        why = ("CUDA_VISIBLE_DEVICES is empty", "numba-cuda is not installed", "there is no working CUDA driver")
    assert reasons.pop().startswith(why)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cpu:0", "cuda:-1", None, 0])
def test_devices_that_do_not_exist(device):
    layer = nbbn.BatchNormalization()
    layer.build((2, 3))
    with pytest.raises(ValueError, match="device must be 'cpu', 'cuda' or 'cuda:N'; received"):
        layer.to(device)


def test_a_layer_is_built_before_it_moves():
    with pytest.raises(ValueError, match=r"to\('cpu'\) needs a built layer"):
        nbbn.BatchNormalization().to("cpu")


def test_arrays_of_the_host_that_are_not_numpys():
    """Lists, and whatever NumPy reads: they have nothing to do with a GPU."""
    layer = nbbn.BatchNormalization()

    class Readable:
        def __array__(self, dtype=None, copy=None):
            return np.ones((2, 3), np.float32)

    for inputs in ([[1.0, 2.0, 3.0]], Readable(), memoryview(np.ones((2, 3)))):
        assert layer(inputs).shape[1] == 3
    assert layer.device == "cpu"


def test_numba_cuda_is_not_imported_for_the_host():
    code = (
        "import sys, numpy as np, nbbn\nlayer = nbbn.BatchNormalization()\nlayer([[1.0, 2.0]])\nlayer(np.ones((1, 2)))"
    )
    check(code + "\nassert not [m for m in sys.modules if m.startswith('nbbn.kernels.cuda')]")


def public(kind):
    return {n: v for n, v in inspect.getmembers(kind) if not n.startswith("_")}


def test_every_place_has_the_same_face():
    """What calls, layers and engines ask of the place of an array they ask of every place, in the same words."""
    here, there = public(type(HOST)), public(DevicePlace)
    assert here.keys() == there.keys() - {"library", "device"}  # which one it is
    methods = [n for n, v in there.items() if inspect.isfunction(v)]
    assert len(methods) > 10
    for name in methods:
        ours, others = inspect.signature(getattr(HOST, name)), inspect.signature(getattr(DevicePlace(None, 0), name))
        if name != "empty_like":  # that of the host is the one that users have, nbbn.buffers.empty_like(x)
            assert ours.parameters.keys() == others.parameters.keys(), name
        kinds = [[(p.kind, p.default) for p in found.parameters.values()] for found in (ours, others)]
        assert kinds[0] == kinds[1], name
