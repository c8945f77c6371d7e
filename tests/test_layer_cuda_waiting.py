"""Calls on a GPU, or in Numba's simulator, that bring nothing to the host and wait for nothing.

The results are those of the same calls on the CPU.
"""

from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import pytest
from ml_dtypes import bfloat16

import nbbn
from nbbn import nn

pytest.importorskip("numba_cuda", reason="needs the extra cuda")
from numba import cuda

if not cuda.is_available():
    pytest.skip("needs a GPU, or NUMBA_ENABLE_CUDASIM=1", allow_module_level=True)

from nbbn.arrays import numba_cuda
from nbbn.engine.cuda import engine
from tests.helpers.on_gpu import FEW_THREADS, Pair, agree, device, few_threads, gradients_agree, host, new_layer


def waits(*arguments):
    raise AssertionError("this waits for the GPU")


@contextmanager
def without_waiting():
    """What waits raises."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("to_host", "from_host", "read"):
            patch.setattr(numba_cuda, name, waits)
        yield


class Twin(Pair):
    """A Pair that has been called once, which makes what stays."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.check(update_statistics=False)

    def agrees(self, beside=None, x=None):
        """In a training call with what is given beside the input, and in its gradient. Returns: both gradients.

        beside: pairs of what the layer on the CPU gets, and the one on the GPU.
        """
        x, dy, beside = self.array(2.0) if x is None else x, self.array(), beside or {}
        y, pullback = self.cpu.vjp(x, training=True, **{name: own for name, (own, _) in beside.items()})
        expected, there, dy_there = pullback(dy), device(x), device(dy)
        with without_waiting():
            given = {name: own for name, (_, own) in beside.items()}
            found, pullback_there = self.gpu.vjp(there, training=True, **given)
            gradients = pullback_there(dy_there)
        agree(found, y, "y")
        gradients_agree(gradients, expected)
        for one, other in zip(self.gpu.get_weights(), self.cpu.get_weights(), strict=True):
            agree(one, other, "weights")
        return gradients, expected


def test_that_what_waits_is_seen():
    x, layer = device(np.ones((4, 3), np.float32)), new_layer()
    with without_waiting(), pytest.raises(AssertionError, match="this waits"):
        layer(x)


# -- adjustments -------------------------------------------------------------------------------------------------------

IMAGE = (3, 4, 2, 5)
SHAPES = {
    "sample": ((3, 1, 1, 1), (3, 1, 1, 1)),
    "sample and channel": ((3, 4, 1, 1), (3, 4, 1, 1)),
    "channel": ((1, 4, 1, 1), (4, 1, 1)),
    "pixel": ((2, 5), (1, 1, 2, 1)),
    "element": (IMAGE, IMAGE),
    "all": ((1,), ()),
    "every other dimension": ((3, 1, 2, 1), (1, 4, 1, 5)),
}


def adjusting(shapes, on_gpu=False):
    """What gives an adjustment, always the same."""
    rng = np.random.default_rng(7)
    pair = [rng.normal(1, 0.5, shape).astype(np.float32) for shape in shapes]
    there = [device(a) for a in pair] if on_gpu else pair
    return lambda shape: there


@pytest.mark.parametrize("on_gpu", [False, True], ids=["of the host", "of the GPU"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_gradients_of_an_adjustment(shapes, on_gpu):
    """They are arrays of the GPU, whatever gave the adjustment."""
    pair = Pair(IMAGE, 1, renorm=True)
    pair.cpu = nbbn.BatchNormalization(1, renorm=True, adjustment=adjusting(shapes))
    pair.gpu = new_layer(1, renorm=True, adjustment=adjusting(shapes, on_gpu))
    pair.check(update_statistics=False)
    gradients, _ = Twin.agrees(pair)
    for found, shape in zip(gradients.adjustment, shapes, strict=True):
        assert found.shape == shape
        assert hasattr(found, "copy_to_host")


@pytest.mark.parametrize("dtype", [np.float16, bfloat16, np.float64], ids=["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("axis", [1, -1, [1, 3]], ids=str)
def test_gradients_of_an_adjustment_by_axis_and_dtype(axis, dtype):
    shapes = (3, 1, 1, 1), (1, 4, 1, 1)
    Twin(IMAGE, axis, dtype=dtype, adjustment=adjusting(shapes), residual=False, activation="relu").agrees()


@pytest.mark.parametrize("lengths", [False, True], ids=["mask", "lengths"])
def test_what_is_left_out_is_no_part_of_an_adjustments_gradient(lengths):
    pair = Twin((3, 4, 5), 1, adjustment=adjusting(((3, 1, 1), (1, 4, 1))))
    x, counts = pair.array(), np.array([5, 0, 2])
    mask = np.arange(5) < counts[:, None]
    x[np.broadcast_to(~mask[:, None], x.shape)] = np.nan
    beside = {"lengths": (counts, counts)} if lengths else {"mask": (mask, mask)}
    gradients, _ = pair.agrees(beside, x)
    assert np.isfinite(host(gradients.adjustment[0])).all()


def test_an_adjustments_gradient_of_an_empty_batch():
    layer = new_layer(adjustment=lambda shape: (np.ones((1, 3)), np.ones(3)))
    y, pullback = layer.vjp(device(np.empty((0, 3), np.float32)), training=True)
    for found, shape in zip(pullback(y).adjustment, ((1, 3), (3,)), strict=True):
        np.testing.assert_array_equal(host(found), np.zeros(shape))


# -- what counts -------------------------------------------------------------------------------------------------------

MASK = np.array([[1, 0], [1, 1], [0, 1], [1, 1]])


@pytest.mark.parametrize("dtype", [bool, np.int64, np.uint8, np.float16, bfloat16, np.float64], ids=str)
@pytest.mark.parametrize("put", [np.array, device], ids=["of the host", "of the GPU"])
def test_masks_of_any_dtype(put, dtype):
    mask = MASK.astype(dtype)
    Twin((4, 2, 3), -1).agrees({"mask": (mask, put(mask))})


def test_a_mask_whose_memory_has_gaps():
    memory = np.zeros((4, 2, 2), bool)
    memory[..., 0] = MASK
    Twin((4, 2, 3), -1).agrees({"mask": (memory[..., 0], device(memory)[..., 0])})


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8], ids=str)
@pytest.mark.parametrize("put", [np.array, device], ids=["of the host", "of the GPU"])
def test_lengths(put, dtype):
    lengths = np.array([4, 0, 1], dtype)
    Twin((3, 2, 4), 1).agrees({"lengths": (lengths, put(lengths))})
    Twin((3, 4, 2), -1, virtual_batch_size=2, ragged="last").agrees({"lengths": (lengths, put(lengths))})


def test_lengths_on_the_gpu_that_are_beyond():
    """Nobody looks at them: less than none is none, and more than all is all."""
    Twin((3, 2, 4), 1).agrees({"lengths": (np.array([4, 0, 1]), device(np.array([9, -3, 1])))})
    with pytest.raises(TypeError, match="lengths must be integers; received dtype float64"):
        new_layer(1)(device(np.ones((3, 2, 4), np.float32)), training=True, lengths=device(np.ones(3)))
    with pytest.raises(ValueError, match=r"lengths must have shape \(3,\), one for each sample; received \(2,\)"):
        new_layer(1)(device(np.ones((3, 2, 4), np.float32)), training=True, lengths=device(np.ones(2, int)))


# -- groups of several sizes, numbers of a step, casts -----------------------------------------------------------------


@pytest.mark.parametrize("order", ["interleaved", "contiguous"])
@pytest.mark.parametrize(("shape", "axis"), [((5, 2, 3), 1), ((5, 3, 2), -1), ((5, 2, 2, 2, 2), [1, 3])], ids=str)
def test_groups_of_several_sizes(shape, axis, order):
    for ragged in ("last", "spread"):
        Twin(shape, axis, virtual_batch_size=2, ragged=ragged, virtual_batch_order=order, renorm=True).agrees()


def test_a_schedule(monkeypatch):
    """Values that are new each time do not wait once as many are kept as there may be."""
    monkeypatch.setattr(engine, "MAX_KEPT", 0)
    pair = Pair((4, 3), -1, renorm=True)
    for layer in (pair.cpu, pair.gpu):
        momenta = iter(np.linspace(0.1, 0.9, 9))
        layer.momentum = lambda momenta=momenta: next(momenta)
    pair.check()
    for _ in range(3):
        Twin.agrees(pair)


def test_updates_of_tensorflow_1():
    from nbbn.compat.v1.keras.layers import BatchNormalization

    pair = Pair((4, 3), -1, renorm=True)
    pair.cpu, pair.gpu = BatchNormalization(renorm=True), few_threads(BatchNormalization(renorm=True))
    for _ in range(2):
        x = pair.array(2.0)
        pair.cpu(x, training=True), pair.gpu(device(x), training=True)
        address = pair.gpu._variables.state.address
        for update in pair.cpu.updates:
            update.run()
        first, second = pair.gpu.updates
        with without_waiting():
            first.run()
        agree(pair.gpu.moving_mean, pair.cpu.moving_mean, "moving_mean")
        with without_waiting():
            second.run()
        for one, other in zip(pair.gpu.get_weights(), pair.cpu.get_weights(), strict=True):
            agree(one, other, "weights")
        assert pair.gpu._variables.state.address == address


def test_casts():
    """Of the input, of the statistics, and of the gradients."""
    pixels = np.arange(12, dtype=np.uint8).reshape(4, 3)
    pair = Pair((4, 3), -1, dtype=np.uint8)
    pair.cpu, pair.gpu = nbbn.BatchNormalization(dtype="float32"), new_layer(dtype="float32")
    pair.dtype = np.float32
    pair.check()
    Twin.agrees(pair, x=pixels)
    pair = Pair((4, 3), -1).check()
    pair.dtype = np.float64
    pair.check(update_statistics=False)
    Twin.agrees(pair)


# -- nbbn.nn -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """The dispatchers of nbbn.nn, those for arrays of the GPU with few threads."""
    own = nn._dispatcher.__wrapped__

    class Either:
        def __init__(self, *arguments, **options):
            self.cpu = own(*arguments, **options)
            self.gpu = nbbn.Dispatcher(self.cpu.options, nbbn.Force(thresholds=FEW_THREADS))

        def __getattr__(self, name):
            def call(array, *arguments, **options):
                run = self.cpu if isinstance(array, (np.ndarray, int)) else self.gpu
                return getattr(run, name)(array, *arguments, **options)

            return call

    monkeypatch.setattr(nn, "_dispatcher", lru_cache(Either))


def same(function, x, *arguments, **options):
    """The results of a function of nbbn.nn on the CPU, and on the GPU with what stands beside `x` on either."""
    expected = function(x, *arguments, **options)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for put in (lambda a: a, lambda a: device(a) if isinstance(a, np.ndarray) else a):
        beside = [put(a) for a in arguments]
        function(device(x), *beside, **options)  # makes what stays
        there = device(x)
        with without_waiting():
            found = function(there, *beside, **options)
        for one, other in zip(found if isinstance(found, tuple) else (found,), expected, strict=True):
            assert hasattr(one, "copy_to_host")
            assert one.shape == other.shape
            agree(one, other, function.__name__)


RNG = np.random.default_rng(3)
X = RNG.normal(2, 1, (3, 4, 2, 5)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float16, np.float64], ids=lambda d: d.__name__)
@pytest.mark.parametrize("axes", [(0, 2, 3), (1, 3), (0, 1, 2, 3)], ids=str)
def test_moments(few, axes, dtype):
    x, axes = X[:2, :3, :, :3].astype(dtype), list(axes)
    same(nn.moments, x, axes)
    same(nn.weighted_moments, x, axes, RNG.integers(0, 3, (3, 1, 3)), keepdims=True)
    same(nn.weighted_moments, x, axes, np.zeros((3,), bool))
    same(nn.moments, x[:0], axes)


CHANNELS = [RNG.uniform(0.5, 2, 4) for _ in range(4)]
OPERANDS = {
    "channels": [a.reshape(4, 1, 1) for a in CHANNELS],
    "numbers": [1.0, 2.0, None, None],
    "more dimensions": [np.ones((2, 1, 4, 1, 1)), np.full((4, 1, 5), 2), 3, None],
}


@pytest.mark.parametrize("operands", OPERANDS.values(), ids=OPERANDS)
def test_batch_normalization(few, operands):
    same(nn.batch_normalization, X, *operands, 1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_fused_batch_norm(few, training):
    scale, offset, mean, variance = CHANNELS
    options = {"data_format": "NCHW", "is_training": training}
    same(
        nn.fused_batch_norm,
        X,
        scale,
        offset,
        mean,
        variance,
        exponential_avg_factor=0.25 if training else 1.0,
        **options,
    )
    dy = RNG.normal(size=X.shape).astype(X.dtype)
    there = device(dy)
    expected = nn.fused_batch_norm_grad(dy, X, scale, mean, variance, **options)
    nn.fused_batch_norm_grad(there, device(X), scale, mean, variance, **options)
    x = device(X)
    with without_waiting():
        found = nn.fused_batch_norm_grad(there, x, scale, mean, variance, **options)
    for one, other in zip(found, expected, strict=True):
        agree(one, other, "gradient")
