"""nbbn.jax: every option against the layer, and against float64 formulas; derivatives; errors."""

import jax
import numpy as np
import pytest
from jax.test_util import check_grads

import nbbn
from nbbn.jax import batch_norm, initial_state, norm
from tests.frameworks.cases import CASES, RNG, normal
from tests.frameworks.jax_problems import NAMES, close, problem

pytestmark = pytest.mark.frameworks

EVERY_CASE = pytest.mark.parametrize("case", CASES)


@pytest.mark.parametrize("ffi", [True, False])
@EVERY_CASE
def test_training_is_the_layers(case, ffi):
    x, scale, bias, state, dy, layer, options, operands = problem(case)

    def run(x, scale, bias, residual):
        others = operands if residual is None else operands | {"residual": residual}
        return batch_norm(x, scale, bias, state, training=True, ffi=ffi, **options, **others)

    @jax.jit
    def both(x, scale, bias, residual):
        y, pullback, new_state = jax.vjp(run, x, scale, bias, residual, has_aux=True)
        return y, new_state, pullback(dy)

    y, new_state, found = both(x, scale, bias, operands.get("residual"))
    expected, pullback = layer.vjp(x, training=True, **operands)
    gradients = pullback(dy)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    # The kernels are the same, so the same bits.
    np.testing.assert_array_equal(y, expected)
    for name, value in new_state.items():
        np.testing.assert_array_equal(np.ravel(value), np.ravel(getattr(layer, NAMES[name])), err_msg=name)
        assert value.shape == state[name].shape
    np.testing.assert_array_equal(found[0], gradients.inputs)
    np.testing.assert_array_equal(np.ravel(found[1]), np.ravel(gradients.gamma))
    np.testing.assert_array_equal(np.ravel(found[2]), np.ravel(gradients.beta))
    if "residual" in operands:
        np.testing.assert_array_equal(found[3], gradients.residual)


@EVERY_CASE
def test_training_without_kernels(case, monkeypatch):
    """In XLA's operations, as on platforms that have no kernels: the same to float32's rounding of its sums."""
    x, scale, bias, state, dy, _, options, operands = problem(case)

    def run(x, scale, bias, residual):
        others = operands if residual is None else operands | {"residual": residual}
        return batch_norm(x, scale, bias, state, training=True, **options, **others)

    def both(x, scale, bias, residual):
        y, pullback, new_state = jax.vjp(run, x, scale, bias, residual, has_aux=True)
        return y, new_state, pullback(dy)

    given = x, scale, bias, operands.get("residual")
    expected = jax.jit(both)(*given)
    monkeypatch.setattr(norm, "has_kernels", lambda lay: False)
    found = jax.jit(lambda *given: both(*given))(*given)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        close(a, b, scale=4.0)


LARGE = {
    "rows": ((64, 16, 16, 64), {}, {}),
    "planes": ((64, 64, 16, 16), {"axis": 1}, {}),
    "renorm": ((64, 16, 16, 64), {"renorm": True, "renorm_clipping": {"rmax": 1.5, "dmax": 0.5}}, {}),
    "several axes": ((64, 16, 16, 64), {"axis": (1, 3)}, {}),
    "mask": ((64, 16, 16, 64), {}, {"mask": RNG.random((64, 16)) < 0.7}),
}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", LARGE)
def test_a_large_output_is_the_layers(name, compiled):
    """Far from 0, where a formula that multiplies first loses the digits. Of its last bits XLA decides in the forward
    pass of a gradient."""
    shape, options, operands = LARGE[name]
    x = normal(*shape) + np.float32(1000)
    layer = nbbn.BatchNormalization(epsilon=1e-5, bessel_correction=False, **options)
    expected = layer(x, training=True, **operands)
    features = tuple(shape[i] for i in np.atleast_1d(options.get("axis", -1)))
    state = initial_state(features, renorm="renorm" in options)
    run = lambda x: batch_norm(x, None, None, state, training=True, **options, **operands)  # noqa: E731
    np.testing.assert_array_equal(run(x)[0], expected)  # no gradient: the kernel
    y, _, new_state = jax.vjp(jax.jit(run) if compiled else run, x, has_aux=True)
    close(y, expected)
    for statistic, value in new_state.items():
        np.testing.assert_array_equal(np.ravel(value), np.ravel(getattr(layer, NAMES[statistic])))


def test_a_large_output_is_not_kept_for_its_gradient():
    """XLA fuses it with what follows, and computes it anew: there are the input, and what the gradient goes through."""
    x, kernel = normal(64, 16, 16, 64), normal(64, 64)

    def loss(x):
        y, _ = batch_norm(2 * x, None, None, initial_state(64), training=True)
        return (jax.nn.relu(y) @ kernel).std()

    needed = jax.jit(jax.grad(loss)).lower(x).compile().memory_analysis().temp_size_in_bytes
    assert needed < 2.5 * x.nbytes


@EVERY_CASE
def test_inference_is_the_layers(case):
    x, scale, bias, state, _, layer, options, operands = problem(case)
    added = {n: a for n, a in operands.items() if n == "residual"}
    run = jax.jit(lambda x: batch_norm(x, scale, bias, state, training=False, **options, **operands))
    y, same = run(x)
    close(y, layer(x, training=False, **added))
    for name, value in same.items():
        np.testing.assert_array_equal(value, state[name])


def test_the_first_state():
    assert {n: (float(v[0]), v.shape, v.dtype.name) for n, v in initial_state(3).items()} == {
        "mean": (0, (3,), "float32"),
        "var": (1, (3,), "float32"),
    }
    all_of_it = initial_state((2, 3), renorm=True, debias=True)
    assert list(all_of_it) == list(NAMES)
    assert {v.shape for v in all_of_it.values()} == {(2, 3)}
    layer = nbbn.BatchNormalization(renorm=True, debias=True)
    layer(normal(4, 3))
    for name, value in initial_state(3, renorm=True, debias=True).items():
        np.testing.assert_array_equal(value, getattr(layer, NAMES[name]))


# -- derivatives -------------------------------------------------------------------------------------------------------

SECOND = {
    "plain": {},
    "channels first": {"axis": 1},
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 1.2, "rmin": 0.8, "dmax": 0.3}},
    "ghost": {"virtual_batch_size": 2},
    "ghost, ragged": {"virtual_batch_size": 3, "ragged": "spread"},
    "relu": {"activation": "relu"},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SECOND)
def test_derivatives_of_both_orders(name, training):
    options = SECOND[name]
    with jax.enable_x64(True):
        x, residual = normal(8, 3, 4, dtype=np.float64), normal(8, 3, 4, dtype=np.float64) - 3
        channels = x.shape[options.get("axis", -1)]
        state = initial_state(channels, renorm="renorm" in options, dtype=np.float64)
        state["mean"] = state["mean"] + 3.1

        def y(x, scale, bias, residual):
            found, _ = batch_norm(x, scale, bias, state, training=training, residual=residual, epsilon=0.1, **options)
            return found * np.linspace(1, 2, found.size).reshape(found.shape)

        arguments = x, RNG.random(channels) + 1, RNG.random(channels), residual
        check_grads(jax.jit(y), arguments, order=2, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_derivatives_with_a_mask_and_an_adjustment():
    with jax.enable_x64(True):
        x, a, b = (normal(8, 3, dtype=np.float64) for _ in range(3))
        mask = RNG.random((8, 1))

        def y(x, scale, bias, a, b):
            others = {"adjustment": (a, b[:1]), "mask": mask, "epsilon": 0.1}
            return batch_norm(x, scale, bias, initial_state(3), training=True, **others)[0] ** 2

        check_grads(jax.jit(y), (x, np.ones(3), np.ones(3), a, b), order=2, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_an_adjustment_is_the_layers():
    x, dy, a, b = (normal(8, 3) for _ in range(4))
    layer = nbbn.BatchNormalization(adjustment=lambda shape: (a, b[:1]), renorm=True, epsilon=1e-5)
    expected, pullback = layer.vjp(x, training=True)
    gradients = pullback(dy)

    def y(x, a, b):
        state, scale = initial_state(3, renorm=True), np.ones(3, np.float32)
        return batch_norm(x, scale, None, state, training=True, adjustment=(a, b), renorm=True)[0]

    found, pullback = jax.vjp(jax.jit(y), x, a, b[:1])
    dx, da, db = pullback(dy)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(dx, gradients.inputs)
    close(da, gradients.adjustment[0])
    close(db, gradients.adjustment[1])


def test_nothing_goes_through_the_state():
    x, state = normal(8, 3), initial_state(3)

    def moved(x, mean):
        y, new = batch_norm(x, None, None, state | {"mean": mean}, training=True)
        return y.sum() * 0 + new["mean"].sum()

    for found in jax.grad(moved, (0, 1))(x, state["mean"]):
        np.testing.assert_array_equal(found, 0)


def test_inference_is_differentiated_by_xla():
    """In its statistics, too, and forward."""
    x = normal(8, 3)
    state = {"mean": normal(3), "var": RNG.random(3).astype(np.float32) + 1}
    y = lambda x, state: batch_norm(x, None, None, state, training=False)[0]  # noqa: E731
    check_grads(y, (x, state), order=2, modes=["fwd", "rev"], atol=2e-2, rtol=2e-2)  # float32's differences
