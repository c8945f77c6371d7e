"""nbbn.jax and nbbn.flax on a GPU: the CUDA kernels in programs of XLA, beside the CPU's."""

import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from tests.frameworks.cases import CASES, normal


@pytest.fixture(scope="module")
def jax():
    module = pytest.importorskip("jax", reason="needs a JAX with CUDA")
    if module.default_backend() != "gpu":
        pytest.skip("needs a JAX that sees the GPU")
    return module


def on(jax, platform, function, *arguments):
    """The results of a program on the first device of a platform, in NumPy's arrays."""
    device = jax.devices(platform)[0]
    found = jax.jit(function)(*jax.device_put(arguments, device))
    assert {d for a in jax.tree.leaves(found) for d in a.devices()} == {device}
    return jax.tree.map(np.asarray, found)


def agree(jax, function, *arguments, tolerance=2e-5):
    """The same on both, to float32's rounding of its sums."""
    found, expected = on(jax, "cuda", function, *arguments), on(jax, "cpu", function, *arguments)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        most = max(1.0, np.abs(b.astype(np.float64)).max(initial=0.0))
        np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), rtol=0, atol=tolerance * most)


def calls(jax, function, *arguments):
    """The kernels that a program for the GPU calls."""
    return re.findall(r"custom_call @nbbn_cuda_([a-z_]+)\(", jax.jit(function).lower(*arguments).as_text())


def loss(x, scale, bias, state, options):
    from nbbn.jax import batch_norm

    y, new = batch_norm(x, scale, bias, state, training=True, **options)
    return (y.astype(np.float32) ** 3).mean(), (y, new)


def both(jax, *features, **options):
    """A training call with its gradients, and what it gets beside the input."""
    from nbbn.jax import initial_state

    state = initial_state(features, **{n: options[n] for n in ("renorm", "momentum", "debias") if n in options})
    step = jax.grad(partial(loss, options=options), (0, 1, 2), has_aux=True)
    return step, (normal(*features), normal(*features), state)


@pytest.mark.parametrize("case", CASES)
def test_every_option(jax, case):
    shape, options, operands = CASES[case]
    axes = sorted(a % len(shape) for a in np.atleast_1d(options.get("axis", -1)))
    step, others = both(jax, *(shape[a] for a in axes), **options, **operands)
    agree(jax, step, normal(*shape), *others, tolerance=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes(jax, dtype):
    with jax.enable_x64(dtype == "float64"):
        step, others = both(jax, 64, activation="relu")
        x = normal(32, 28, 28, 64).astype(jax.numpy.dtype(dtype))
        assert calls(jax, step, x, *others) == ["train", "backward"]
        agree(jax, step, x, *others, tolerance={"float16": 4e-3, "bfloat16": 3e-2, "float64": 1e-6}[dtype])


@pytest.mark.parametrize("shape", [(8, 5), (64, 28, 28, 64), (4096, 512)])
def test_transformations(jax, shape):
    """vmap, scan, remat, second derivatives."""
    step, (scale, bias, state) = both(jax, shape[-1])
    xs = normal(3, *shape)
    value = lambda x: loss(x, scale, bias, state, {})[0]  # noqa: E731
    agree(jax, jax.vmap(lambda x: step(x, scale, bias, state)), xs, tolerance=1e-4)
    agree(jax, jax.grad(lambda xs: jax.lax.scan(lambda s, x: (s + jax.checkpoint(value)(x), None), 0.0, xs)[0]), xs)
    agree(jax, jax.grad(lambda x: (jax.grad(value)(x) ** 2).sum()), xs[0], tolerance=1e-4)


def test_the_order_of_the_stream_is_kept(jax):
    """What a step reads has been written, and nobody writes over it: many steps in a row, with donated arrays."""
    from nbbn.jax import batch_norm, initial_state

    x = normal(64, 28, 28, 64)
    run = jax.jit(partial(batch_norm, training=True, momentum=0.5), donate_argnums=(0, 3))

    def steps(device):
        y, state = jax.device_put((x, initial_state(64)), device)
        scale, bias = jax.device_put((np.ones(64, np.float32), np.zeros(64, np.float32)), device)
        for _ in range(20):
            y, state = run(y * 1.5 + 1, scale, bias, state)
        return y, state

    found, expected = (steps(jax.devices(platform)[0]) for platform in ("cuda", "cpu"))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_same_bits_each_time(jax):
    step, others = both(jax, 64)
    x = normal(64, 28, 28, 64)
    first, second = (on(jax, "cuda", step, x, *others) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_call_does_not_wait(jax):
    """It returns while the GPU is busy with what came before."""
    from nbbn.jax import batch_norm, initial_state

    run = jax.jit(partial(batch_norm, training=True))
    busy = jax.jit(lambda a: jax.lax.fori_loop(0, 200, lambda _, a: a @ a * 1e-4, a))
    a, scale, state = jax.numpy.ones((8192, 8192)), jax.numpy.ones(64), initial_state(64)
    jax.block_until_ready(run(busy(a)[:64, :64], scale, scale, state))  # compiles
    before = busy(a)
    y, _ = run(before[:64, :64], scale, scale, state)
    assert not before.is_ready()
    assert not y.is_ready()
    jax.block_until_ready(y)


def test_flax(jax):
    """Both modules, in a training step that jit compiles."""
    linen, nnx = pytest.importorskip("flax.linen"), pytest.importorskip("flax.nnx")
    import nbbn.flax

    x = normal(32, 14, 14, 64)
    module = nbbn.flax.linen.BatchNorm(use_running_average=False, momentum=0.9)
    assert isinstance(module, linen.BatchNorm)
    variables = jax.tree.map(np.asarray, module.init(jax.random.key(0), x))
    apply = lambda variables, x: module.apply(variables, x, mutable=["batch_stats"])  # noqa: E731
    assert calls(jax, apply, variables, x) == ["train"]
    agree(jax, apply, variables, x)

    def train(x):
        layer = nbbn.flax.nnx.BatchNorm(64, rngs=nnx.Rngs(0))
        return layer(x, use_running_average=False), layer.mean[...]

    agree(jax, train, x)


ENDS = """
import jax, numpy as np
from functools import partial
from nbbn.jax import batch_norm, initial_state
run = jax.jit(partial(batch_norm, training=True))
x = np.ones((256, 56, 56, 64), np.float32)
for _ in range(20):
    run(x, None, None, initial_state(64))
"""


def test_a_process_ends_while_programs_run(jax):
    for _ in range(3):
        subprocess.run([sys.executable, "-c", ENDS], check=True, timeout=300)


def test_a_failure_is_an_error_of_the_program(jax, monkeypatch):
    from nbbn.jax import batch_norm, initial_state, on_cuda

    def fail(*arguments):
        raise MemoryError("there is none")

    run = jax.jit(partial(batch_norm, training=True))
    x = normal(8, 5)
    expected, _ = run(x, None, None, initial_state(5))
    with monkeypatch.context() as patch:
        patch.setattr(on_cuda, "_run_step", fail)
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="MemoryError: there is none"):
            jax.block_until_ready(run(x, None, None, initial_state(5)))
    np.testing.assert_array_equal(run(x, None, None, initial_state(5))[0], expected)
