"""nbbn.jax with the CUDA engine's kernels, in Numba's simulator: XLA's programs for the CPU run the steps of a GPU."""

from functools import partial

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs the extra cuda")
from numba.cuda import config

if not config.ENABLE_CUDASIM:
    pytest.skip("needs NUMBA_ENABLE_CUDASIM=1", allow_module_level=True)
pytest.importorskip("jax", reason="needs the extra jax")

import jax
import jax.numpy as jnp
from jax.test_util import check_grads

from nbbn.jax import batch_norm, initial_state, norm, on_cuda
from tests.frameworks.cases import CASES, normal
from tests.frameworks.jax_problems import NAMES, close, problem
from tests.helpers.jax_in_simulator import Simulated, install
from tests.helpers.processes import check

# The simulator is slow, and batches in parts are no matter of kernels on a GPU.
SMALL = [name for name in CASES if not name.startswith("large") and "ragged" not in name and "smaller" not in name]


@pytest.fixture(autouse=True)
def _gpu(monkeypatch):
    install(monkeypatch.setattr)
    norm._steps.cache_clear()
    jax.clear_caches()
    yield
    assert Simulated.memory == {}
    norm._steps.cache_clear()
    jax.clear_caches()


@pytest.mark.parametrize("case", SMALL)
def test_training_is_the_layers(case):
    """On the CPU: to float32's rounding of its sums."""
    x, scale, bias, state, dy, layer, options, operands = problem(case)

    def run(x, scale, bias, residual):
        others = operands if residual is None else operands | {"residual": residual}
        return batch_norm(x, scale, bias, state, training=True, **options, **others)

    @jax.jit
    def both(x, scale, bias, residual):
        y, pullback, new_state = jax.vjp(run, x, scale, bias, residual, has_aux=True)
        return y, new_state, pullback(dy)

    before = Simulated.allocated
    y, new_state, found = jax.block_until_ready(both(x, scale, bias, operands.get("residual")))
    assert Simulated.allocated > before  # it is these steps that have run
    expected, pullback = layer.vjp(x, training=True, **operands)
    gradients = pullback(dy)
    close(y, expected)
    for name, value in new_state.items():
        close(np.ravel(value), np.ravel(getattr(layer, NAMES[name])))
    close(found[0], gradients.inputs, scale=4.0)
    close(np.ravel(found[1]), np.ravel(gradients.gamma), scale=4.0)
    close(np.ravel(found[2]), np.ravel(gradients.beta), scale=4.0)
    if "residual" in operands:
        close(found[3], gradients.residual)


def loss(x, scale, bias, **options):
    y, new = batch_norm(x, scale, bias, initial_state(x.shape[-1]), training=True, **options)
    return (y**3).mean(), new


gradient = jax.grad(loss, (0, 1, 2), has_aux=True)


def plain_loss(x, scale, bias, weights=None):
    mean, variance = (jnp.average(v, 0, weights) for v in (x, x))
    variance = jnp.average((x - mean) ** 2, 0, weights)
    return (((x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias) ** 3).mean()


plain = jax.grad(plain_loss, (0, 1, 2))


def all_close(found, expected, dtype=np.float32):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        close(a, b, dtype, scale=4.0)


def test_vmap():
    """Over inputs and parameters, and over a gradient; without jit, too."""
    xs, scales, biases = normal(3, 8, 5), normal(3, 5), normal(3, 5)
    for mapped in (jax.vmap(gradient), jax.jit(jax.vmap(gradient))):
        all_close(mapped(xs, scales, biases)[0], jax.vmap(plain)(xs, scales, biases))


def test_scan_and_remat():
    xs, scale, bias = normal(3, 8, 5), normal(5), normal(5)
    layer = jax.checkpoint(lambda x: loss(x, scale, bias)[0])
    total = lambda layer, xs: jax.lax.scan(lambda sum, x: (sum + layer(x), None), 0.0, xs)[0]  # noqa: E731
    expected = jax.grad(partial(total, lambda x: plain_loss(x, scale, bias)))(xs)
    all_close(jax.jit(jax.grad(partial(total, layer)))(xs), expected)


def test_donated_arguments():
    x, state = normal(8, 5), initial_state(5)
    run = partial(batch_norm, training=True, scale=None, bias=None)
    expected = run(x, state=state)
    given = jnp.array(x)
    found = jax.jit(lambda x, state: run(x, state=state), donate_argnums=(0, 1))(given, state)
    all_close(found, expected)
    assert given.is_deleted()


def test_derivatives_of_both_orders():
    """In float64, which crosses as it is where JAX has it, and of momenta that are values of the program."""
    with jax.enable_x64(True):
        x, scale, bias = normal(6, 3, dtype=np.float64), normal(3, dtype=np.float64), normal(3, dtype=np.float64)
        a, b = normal(6, 3, dtype=np.float64), normal(3, dtype=np.float64)
        y = lambda x, s, t, a, b: loss(x, s, t, epsilon=0.1, adjustment=(a, b))[0]  # noqa: E731
        check_grads(jax.jit(y), (x, scale, bias, a, b), order=2, modes=["rev"], atol=1e-6, rtol=1e-6)
        moved = jax.jit(lambda m: loss(x, scale, bias, momentum=m)[1]["mean"])(np.float64(0.25))
        close(moved, 0.75 * x.mean(0))  # the state is float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits(dtype):
    x, scale, bias = normal(8, 6).astype(jnp.dtype(dtype)), normal(6), normal(6)
    y, _ = jax.jit(partial(batch_norm, training=True))(x, scale, bias, initial_state(6))
    wide, _ = jax.jit(partial(batch_norm, training=True))(x.astype(np.float32), scale, bias, initial_state(6))
    assert y.dtype == x.dtype
    close(y, wide, dtype)


def test_an_axis_shares_statistics():
    """The stages, and XLA's merging between them: with masks one of which leaves nothing of a member."""
    xs, scale, bias = normal(3, 8, 5), normal(5), normal(5)
    masks = np.array([[1] * 8, [1, 0, 1, 1, 0, 0, 0, 1], [0] * 8], np.float32)
    shared = lambda x, mask: loss(x, scale, bias, axis_name="i", mask=mask)  # noqa: E731
    found, new = jax.jit(jax.vmap(jax.grad(shared, has_aux=True), axis_name="i"))(xs, masks)
    weights = masks.reshape(-1)
    expected, *_ = plain(xs.reshape(-1, 5), scale, bias, weights)
    close(found.reshape(-1, 5) / 3, expected, scale=4.0)
    close(new["mean"][2], 0.01 * np.average(xs.reshape(-1, 5), 0, weights))


def test_a_step_that_fails_is_an_error_of_the_program(monkeypatch):
    def fail(*arguments):
        raise MemoryError("there is none")

    run = jax.jit(gradient)
    x, scale, bias = normal(8, 5), normal(5), normal(5)
    expected = run(x, scale, bias)
    with monkeypatch.context() as patch:
        patch.setattr(on_cuda, "_run_step", fail)
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="MemoryError: there is none"):
            jax.block_until_ready(run(x, scale, bias))
    all_close(run(x, scale, bias), expected)


ENDS = """
import jax, numpy as np, time
from tests.helpers.jax_in_simulator import install
from nbbn.jax import batch_norm, initial_state, on_cuda
install(setattr)
run_step = on_cuda._run_step
on_cuda._run_step = lambda *arguments: (time.sleep(0.1), run_step(*arguments))
run = jax.jit(lambda x: batch_norm(x, None, None, initial_state(256), training=True))
x = np.ones((64, 256), np.float32)
run(x)[0].block_until_ready()
kept = run(x)
[run(x) for _ in range(4)] and None
"""


def test_a_process_ends_while_programs_run():
    """Their steps ask Python, and JAX waits for them while Python ends."""
    assert check(ENDS) == ""
