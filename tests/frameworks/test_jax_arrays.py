"""JAX's arrays on the CPU in the place of NumPy's: results are JAX's arrays, as they are on a GPU."""

import numpy as np
import pytest

import nbbn

jax = pytest.importorskip("jax", reason="needs JAX (extra: frameworks)")
pytestmark = pytest.mark.frameworks

DTYPES = ["float16", "bfloat16", "float32", "float64"]


def random(*shape, dtype="float32", seed=0):
    with jax.enable_x64(True):
        return jax.numpy.asarray(np.random.default_rng(seed).normal(1, 2, shape), dtype=dtype)


def check(array, expected):
    assert isinstance(array, jax.Array)
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(array), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_call_and_its_gradient(dtype):
    """float64 stays float64, whatever JAX is set to."""
    x, residual, dy = (random(8, 5, dtype=dtype, seed=s) for s in range(3))
    ours, numpys = (nbbn.BatchNormalization(momentum=0.5) for _ in range(2))
    for given in (None, residual) * 3:
        added = None if given is None else np.asarray(given)
        check(ours(x, residual=given), numpys(np.asarray(x), residual=added))
        y, pullback = ours.vjp(x, training=True, residual=given, mask=jax.numpy.arange(8) != 3)
        expected, expected_pullback = numpys.vjp(np.asarray(x), training=True, residual=added, mask=np.arange(8) != 3)
        check(y, expected)
        for one, other in zip(pullback(dy), expected_pullback(np.asarray(dy)), strict=True):
            if other is None:
                assert one is None
            else:
                check(one, other)


def test_results_are_nobody_elses_memory():
    """JAX's arrays never change, whatever later calls write."""
    x, layer = random(8, 5), nbbn.BatchNormalization()
    results = []
    for _ in range(4):
        y, pullback = layer.vjp(x, training=True)
        results.append([np.array(a) for a in (y, *pullback(x)[:3])] + [y, *pullback(x)[:3]])
    for *copies, y, dx, dgamma, dbeta in results:
        for one, other in zip(copies, (y, dx, dgamma, dbeta), strict=True):
            np.testing.assert_array_equal(one, other)


def test_there_is_no_out():
    x = random(8, 5)
    with pytest.raises(ValueError, match="out must be writable memory of its own; received a read-only"):
        nbbn.BatchNormalization()(x, out=x)


def test_a_result_can_meet_arrays_of_all_devices():
    """It is not committed to a device."""
    x = jax.device_put(random(8, 5), jax.devices("cpu")[0])
    assert not nbbn.BatchNormalization()(x).committed


def test_halves_functions_and_weights():
    x, row = random(8, 5), random(5)
    layer = nbbn.BatchNormalization()
    step = layer.start(x)
    check(step.finish(step.message[np.newaxis]), nbbn.BatchNormalization()(np.asarray(x), training=True))
    check(nbbn.nn.moments(x, [0])[0], nbbn.nn.moments(np.asarray(x), [0])[0])
    layer.gamma = row
    np.testing.assert_array_equal(layer.gamma, np.asarray(row))
    assert nbbn.Moments().update(x) == nbbn.Moments().update(np.asarray(x))


def test_a_tracer_has_no_memory():
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.jit(nbbn.BatchNormalization())(random(8, 5))
