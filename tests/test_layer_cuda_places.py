"""Where a layer is, on the host or on a GPU: what it takes there, and what goes with it."""

import copy
import pickle

import numpy as np
import pytest

import nbbn

pytest.importorskip("numba_cuda", reason="needs the extra cuda")
from numba import cuda

if not cuda.is_available():
    pytest.skip("needs a GPU, or NUMBA_ENABLE_CUDASIM=1", allow_module_level=True)

from tests.helpers.on_gpu import Pair, agree, device, few_threads, host, new_layer


def test_the_first_input_decides_and_to_moves():
    pair = Pair((4, 3), -1)
    assert pair.gpu.device == "cpu"
    pair.check()
    assert pair.gpu.device == "cuda:0"
    weights = pair.gpu.get_weights()
    assert pair.gpu.to("cpu") is pair.gpu
    assert pair.gpu.device == "cpu"
    assert [a.tobytes() for a in pair.gpu.get_weights()] == [a.tobytes() for a in weights]
    nbbn.force(pair.gpu)  # the thresholds of a GPU are none of a CPU's
    x = pair.array()
    np.testing.assert_array_equal(pair.gpu(x), pair.gpu.to("cpu")(x))
    few_threads(pair.gpu.to("cuda"))
    pair.check()


def test_mixing_says_what_to_do():
    pair = Pair((4, 3), -1).check()
    nbbn.force(pair.gpu)  # the thresholds of a GPU are none of a CPU's
    x = pair.array()
    with pytest.raises(ValueError, match=r"on cuda:0; received an array on the host: call to\('cpu'\) first"):
        pair.gpu(x)
    with pytest.raises(ValueError, match=r"on cpu; received an array on cuda:0: call to\('cuda:0'\) first"):
        pair.cpu(device(x))
    before = pair.gpu.get_weights()
    with pytest.raises(TypeError, match="residual must be on the GPU, as the input is; received ndarray"):
        pair.gpu(device(x), training=True, residual=x)
    with pytest.raises(TypeError, match="out must be on the GPU"):
        pair.gpu(device(x), training=True, out=x)
    assert [a.tobytes() for a in before] == [a.tobytes() for a in pair.gpu.get_weights()]


BAD_CALLS = {
    "shape of out": ({"out": np.zeros((2, 3), np.float32)}, ValueError, r"out must have the shape \(4, 3\)"),
    "dtype of out": ({"out": np.zeros((4, 3))}, ValueError, "dtype float32 of the result; .* dtype float64"),
    "residual": ({"residual": np.zeros((4, 2), np.float32)}, ValueError, r"residual must have the input's shape"),
    "dtype of residual": ({"residual": np.zeros((4, 3), int)}, TypeError, "residual must be an array of"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_arguments(arguments, error, message):
    layer = new_layer()
    with pytest.raises(error, match=message):
        layer(device(np.zeros((4, 3), np.float32)), training=True, **{k: device(v) for k, v in arguments.items()})
    assert not layer.built


def test_bad_inputs():
    layer = new_layer()
    with pytest.raises(TypeError, match=r"inputs must be an array of .*; received dtype int64"):
        layer(device(np.zeros((4, 3), np.int64)))
    with pytest.raises(ValueError, match="virtual_batch_size=3 must divide"):
        new_layer(virtual_batch_size=3)(device(np.zeros((4, 3), np.float32)), training=True)
    layer(device(np.zeros((4, 3), np.float32)))
    with pytest.raises(ValueError, match=r"inputs must have the shape \(any, 3\)"):
        layer(device(np.zeros((4, 2), np.float32)))
    with pytest.raises(ValueError, match=r"dy must have the output's shape \(4, 3\); received \(2, 3\)"):
        layer.vjp(device(np.zeros((4, 3), np.float32)))[1](device(np.zeros((2, 3), np.float32)))
    with pytest.raises(RuntimeError, match=r"to\('cuda:7'\) needs a GPU: there (is|are) .*received number 7"):
        layer.to("cuda:7")


def test_out_of_a_gradient_must_not_be_the_input():
    layer, x = new_layer(), device(np.ones((4, 3), np.float32))
    with pytest.raises(ValueError, match=r"out must not share memory with inputs or residual in vjp\(\)"):
        layer.vjp(x, out=x)
    _, pullback = layer.vjp(x)
    with pytest.raises(ValueError, match="out must not share memory with the input"):
        pullback(x, out=x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))], ids=["deepcopy", "pickle"])
def test_copies_stay_on_the_gpu_and_are_others(copied):
    pair = Pair((4, 3), -1).check()
    twin = copied(pair.gpu)
    assert twin.device == "cuda:0"
    before = [a.tobytes() for a in pair.gpu.get_weights()]
    assert before == [a.tobytes() for a in twin.get_weights()]
    twin(device(pair.array()), training=True)
    assert before == [a.tobytes() for a in pair.gpu.get_weights()]


def test_a_file_of_a_layer_on_the_gpu(tmp_path):
    """Its state is copied to the host, where it is loaded; back on the GPU it goes on where it was."""
    layer = new_layer(momentum=None)
    x = device(np.random.default_rng(0).normal(1, 2, size=(4, 3)).astype(np.float32))
    layer(x, training=True)
    layer.save(tmp_path / "layer.npz")
    twin = nbbn.load(tmp_path / "layer.npz")
    assert twin.device == "cpu"
    few_threads(twin.to("cuda"))
    for one in (layer, twin):
        one(x, training=True)
    assert [a.tobytes() for a in layer.get_weights()] == [a.tobytes() for a in twin.get_weights()]
    np.testing.assert_array_equal(twin.get_state()["seen_mean"], [2, 2, 2])
    layer.set_state({n: a + 1 for n, a in twin.get_state().items()})
    np.testing.assert_array_equal(host(layer.seen_variance), [3, 3, 3])


def test_folding_losses_and_constraints():
    layer = new_layer(gamma_regularizer="l2", gamma_constraint="non_neg")
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    layer(device(x), training=True)
    layer.gamma = np.array([1.0, -2.0, 3.0])
    assert layer.losses == pytest.approx([0.01 * 14])
    np.testing.assert_allclose(layer.regularization_gradients().gamma, [0.02, -0.04, 0.06], rtol=1e-6)
    layer.apply_constraints()
    np.testing.assert_array_equal(host(layer.gamma), [1, 0, 3])
    scale, shift = layer.fold()
    np.testing.assert_allclose(host(layer(device(x))), x * scale + shift, rtol=1e-5, atol=1e-6)


def test_the_layers_of_tensorflow_1():
    from nbbn.compat.v1.keras.layers import BatchNormalization

    cpu, gpu = BatchNormalization(), few_threads(BatchNormalization())
    x = np.random.default_rng(0).normal(1, 2, size=(4, 3)).astype(np.float32)
    agree(gpu(device(x), training=True), cpu(x, training=True), "y")
    np.testing.assert_array_equal(gpu.get_weights()[2], np.zeros(3))
    for layer in (cpu, gpu):
        assert len(layer.updates) == 2
        for update in layer.updates:
            update.run()
    for one, other in zip(gpu.get_weights(), cpu.get_weights(), strict=True):
        agree(one, other, "weights")
