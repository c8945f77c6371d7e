"""nbbn.jax under JAX's transformations, on several devices."""

import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nbbn.jax import batch_norm, initial_state, norm

pytestmark = pytest.mark.frameworks

jax.config.update("jax_num_cpu_devices", 4)  # before JAX starts: this file has a process of its own
RNG = np.random.default_rng(3)
SHAPE = 8, 5


def normal(*shape, dtype=np.float32):
    return (RNG.normal(size=shape) * 2 + 3).astype(dtype)


def problem(*shape):
    shape = shape or SHAPE
    return normal(*shape), normal(shape[-1]), normal(shape[-1]), initial_state(shape[-1])


def plain(x, scale, bias, epsilon=1e-5):
    """As people write it."""
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / jnp.sqrt(x.var(axes) + epsilon) * scale + bias


def nbbn_y(x, scale, bias, **options):
    return batch_norm(x, scale, bias, initial_state(x.shape[-1]), training=True, **options)[0]


def close(found, expected, tolerance=2e-5):
    """Sums of float32 in another order."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        most = max(1.0, float(np.abs(np.asarray(b)).max()))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * most)


def equal(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


# -- one program -------------------------------------------------------------------------------------------------------


def test_without_jit_and_with_it():
    x, scale, bias, state = problem()
    run = partial(batch_norm, training=True)
    equal(jax.jit(run)(x, scale, bias, state), run(x, scale, bias, state))


@pytest.mark.parametrize("shape", [SHAPE, (64, 16, 16, 32)])
def test_vmap(shape):
    """Over inputs, over parameters, and over a gradient."""
    xs, scales, biases = normal(3, *shape), normal(3, shape[-1]), normal(3, shape[-1])
    each = [nbbn_y(x, s, b) for x, s, b in zip(xs, scales, biases, strict=True)]
    equal(jax.jit(jax.vmap(nbbn_y))(xs, scales, biases), jnp.stack(each))
    same_input = jax.vmap(nbbn_y, in_axes=(None, 0, 0))(xs[0], scales, biases)
    equal(same_input, jnp.stack([nbbn_y(xs[0], s, b) for s, b in zip(scales, biases, strict=True)]))
    gradient = jax.grad(lambda x, s, b: (nbbn_y(x, s, b) ** 3).mean(), (0, 1, 2))
    found = jax.jit(jax.vmap(gradient))(xs, scales, biases)
    for i in range(3):
        equal([f[i] for f in found], jax.jit(gradient)(xs[i], scales[i], biases[i]))


def test_vmap_over_a_schedule():
    """Of momenta, which are values of the program then."""
    x, _, _, state = problem()
    run = lambda momentum: batch_norm(x, None, None, state, training=True, momentum=momentum)[1]["mean"]  # noqa: E731
    momenta = jnp.array([0.0, 0.5, 1.0])
    close(jax.vmap(run)(momenta), momenta[:, None] * state["mean"] + (1 - momenta)[:, None] * x.mean(0))


def test_scan():
    xs, scale, bias, state = normal(4, *SHAPE), *problem()[1:]

    def step(state, x):
        y, state = batch_norm(x, scale, bias, state, training=True, momentum=0.9)
        return state, y

    last, ys = jax.jit(partial(jax.lax.scan, step))(state, xs)
    for x, y in zip(xs, ys, strict=True):
        state, expected = step(state, x)
        equal(y, expected)
    equal(last, state)


def test_a_gradient_through_scan_and_remat():
    """A network of three layers with the same weights, each of which is computed again for its gradient."""
    x, scale, bias, _ = problem()

    def network(layer, x, scale, bias):
        def step(x, _):
            return jnp.tanh(layer(x, scale, bias)), None

        return (jax.lax.scan(step, x, None, length=3)[0] ** 2).sum()

    expected = jax.grad(partial(network, plain), (0, 1, 2))(x, scale, bias)
    for layer in (nbbn_y, jax.checkpoint(nbbn_y)):
        close(jax.jit(jax.grad(partial(network, layer), (0, 1, 2)))(x, scale, bias), expected, 2e-4)  # ill-conditioned


def test_donated_arguments():
    x, scale, bias, state = problem()
    expected = batch_norm(x, scale, bias, state, training=True)
    run = jax.jit(partial(batch_norm, training=True), donate_argnums=(0, 3))
    given, own = jnp.array(x), jax.tree.map(jnp.array, state)
    equal(run(given, scale, bias, own), expected)
    assert given.is_deleted()
    assert own["mean"].is_deleted()


def test_second_derivatives_under_vmap_and_scan():
    xs, scale, bias = normal(2, *SHAPE), *problem()[1:3]

    def curvature(layer, x):
        slope = lambda x: (jax.grad(lambda x: (layer(x, scale, bias) ** 3).mean())(x) ** 2).sum()  # noqa: E731
        return jax.grad(slope)(x)

    expected = jnp.stack([curvature(plain, x) for x in xs])
    close(jax.jit(jax.vmap(partial(curvature, nbbn_y)))(xs), expected, 1e-4)  # third powers of float32
    close(jax.lax.map(partial(curvature, nbbn_y), xs), expected, 1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 4e-3), ("bfloat16", 3e-2), ("float64", 1e-12)])
def test_dtypes(dtype, tolerance):
    """Statistics and parameters are float32 for 16 bits, whose rounding is what differs; float64 with x64."""
    with jax.enable_x64(dtype == "float64"):
        own = "float64" if dtype == "float64" else "float32"
        x, scale, bias = (normal(*shape).astype(dtype) for shape in (SHAPE, SHAPE[1:], SHAPE[1:]))
        x = jnp.asarray(x)
        run = jax.jit(partial(batch_norm, training=True))
        state = initial_state(SHAPE[-1], dtype=own)
        y, new = run(x, scale, bias, state)
        assert y.dtype == dtype
        assert new["mean"].dtype == own
        wide = np.asarray(x, np.float64)
        close(y.astype(own), plain(wide, np.asarray(scale, np.float64), np.asarray(bias, np.float64)), tolerance)
        close(new["mean"], 0.01 * wide.mean(0), 1e-12 if own == "float64" else 1e-6)
        dx, dscale = jax.jit(jax.grad(lambda x, s: (run(x, s, bias, state)[0].astype(own) ** 2).sum(), (0, 1)))(
            x, scale
        )
        assert (dx.dtype, dscale.dtype) == (dtype, scale.dtype)
        assert batch_norm(x, scale, bias, state, training=False)[0].dtype == dtype


def test_a_float64_state_of_a_float32_input():
    with jax.enable_x64(True):
        x, scale, bias, _ = problem()
        _, new = batch_norm(jnp.asarray(x), scale, bias, initial_state(5, dtype=np.float64), training=True)
        close(new["mean"], 0.01 * x.astype(np.float64).mean(0), 1e-12)


@pytest.mark.parametrize("shape", [SHAPE, (300, 600)])
def test_float64_in_a_callback(shape):
    """Which JAX runs in a thread of its own where it is worth it: x64 is not enabled there."""
    with jax.enable_x64(True):
        x, dy = normal(*shape, dtype=np.float64), normal(*shape, dtype=np.float64)
        state = initial_state(shape[-1], dtype=np.float64)

        @partial(jax.jit, static_argnums=2)
        def run(x, dy, ffi):
            y, pullback, new_state = jax.vjp(
                lambda x: batch_norm(x, None, None, state, training=True, ffi=ffi), x, has_aux=True
            )
            return y, new_state, pullback(dy)

        equal(run(x, dy, False), run(x, dy, True))


def test_x64_changes_no_bit():
    x, scale, bias, _ = problem()
    run = jax.jit(jax.value_and_grad(lambda x: nbbn_y(x, scale, bias).sum()))
    expected = run(x)
    with jax.enable_x64(True):
        equal(run(jnp.asarray(x)), expected)


def test_numbers_of_the_program():
    """Momenta and clips of a schedule give what the same numbers give as constants, to float32's rounding of them."""
    x, scale, bias, _ = problem()
    state = initial_state(5, renorm=True)
    numbers = {"momentum": 0.75, "renorm_momentum": 0.5, "rmin": 0.5, "rmax": 1.25, "dmax": 0.25}  # exact in float32

    def run(momentum, renorm_momentum, **clips):
        others = {"renorm": True, "renorm_clipping": clips, "renorm_momentum": renorm_momentum}
        return batch_norm(x, scale, bias, state, training=True, momentum=momentum, **others)

    expected = run(**numbers)
    equal(jax.jit(run)(**numbers), expected)
    with jax.enable_x64(True):
        equal(jax.jit(run)(**numbers), expected)


@pytest.mark.parametrize("name", ["momentum", "renorm_momentum", "dmax"])
def test_a_callable_is_read_in_each_call(name):
    """A program would keep its number; it may give a scalar of the program, and inference needs none."""
    x, scale, bias, _ = problem()
    state = initial_state(5, renorm=True)

    def run(value, training=True):
        given = {"renorm_clipping": {"dmax": value}} if name == "dmax" else {name: value}
        return batch_norm(x, scale, bias, state, training=training, renorm=True, **given)

    schedule, outside = {"now": 0.25}, jnp.float32(0.25)
    for now in (0.25, 0.5):
        schedule["now"] = now
        equal(run(lambda: schedule["now"]), run(now))
        equal(jax.jit(lambda number: run(lambda: number))(now), run(now))
    with pytest.raises(ValueError, match=rf"{name}.* would keep .* received 0.5"):
        jax.jit(lambda: run(lambda: schedule["now"]))()
    with pytest.raises(ValueError, match=rf"{name}.* would keep .* received Array"):
        jax.jit(lambda: run(lambda: outside))()
    equal(jax.jit(lambda: run(lambda: 1 / 0, training=False))(), run(0.5, training=False))
    with pytest.raises(ValueError, match=r"received .*-1"):
        run(lambda: -1)


# -- several devices, and mapped axes ----------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 1.5, "dmax": 0.2}},
    "Bessel": {"bessel_correction": True},
    "relu": {"activation": "relu"},
}


def test_sharding():
    """A program over two devices gets the statistics of the whole batch: the arrays are brought together."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*names)) for names in (("data",), ()))
    x, scale, bias, state = problem(64, 16)
    run = jax.jit(jax.value_and_grad(lambda x, s, b: (nbbn_y(x, s, b) ** 3).mean(), (0, 1, 2)))
    expected = run(x, scale, bias)
    found = run(jax.device_put(x, rows), *jax.device_put((scale, bias), everywhere))
    close(found, expected)
    y, new = jax.jit(partial(batch_norm, training=True))(jax.device_put(x, rows), scale, bias, state)
    equal((y, new), batch_norm(x, scale, bias, state, training=True))


def shared(x, scale, bias, state, mask, **options):
    """The output and the gradients of the sum of all outputs' cubes, of one member of the axis "i"."""

    def loss(x, scale, bias):
        y, new = batch_norm(x, scale, bias, state, training=True, axis_name="i", mask=mask, **options)
        return (y**3).sum(), (y, new)

    (_, found), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
    return found, gradients


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("how", ["vmap", "pmap", "shard_map"])
@pytest.mark.parametrize("name", OPTIONS)
def test_an_axis_shares_statistics(name, how, kernels, monkeypatch):
    """Two members are one batch, in which every value counts the same, although they have different masks. With kernels
    and, as on other platforms, without them."""
    monkeypatch.setattr(norm, "has_kernels", lambda lay: kernels)
    options = OPTIONS[name]
    xs, scale, bias, _ = problem(2, *SHAPE)
    masks = np.array([[1, 1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 0, 0, 1, 0]], bool)
    state = initial_state(5, renorm="renorm" in options)
    run = partial(shared, **options)
    if how == "shard_map":
        mesh, own = Mesh(np.array(jax.devices()[:2]), ("i",)), PartitionSpec("i")

        @partial(jax.shard_map, mesh=mesh, in_specs=(own, own), out_specs=own, check_vma=False)
        def mapped(x, mask):
            return jax.tree.map(lambda a: a[None], run(x[0], scale, bias, state, mask[0]))

        (y, new), (dx, dscale, dbias) = jax.jit(mapped)(xs, masks)
    else:
        mapped = {"vmap": lambda f, **kw: jax.jit(jax.vmap(f, **kw)), "pmap": jax.pmap}[how]
        (y, new), (dx, dscale, dbias) = mapped(run, axis_name="i", in_axes=(0, None, None, None, 0))(
            xs, scale, bias, state, masks
        )

    def loss(x, scale, bias):
        y, new = batch_norm(x, scale, bias, state, training=True, mask=masks.reshape(-1), **options)
        return (y**3).sum(), (y, new)

    whole = xs.reshape(-1, 5)
    (_, (expected, expected_state)), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(whole, scale, bias)
    close(y.reshape(-1, 5), expected)
    for key, value in new.items():
        close(value[0], expected_state[key])
        equal(value[0], value[1])
    close(dx.reshape(-1, 5), gradients[0])
    close((dscale.sum(0), dbias.sum(0)), gradients[1:])


@pytest.mark.parametrize("ffi", [True, False])
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_knows_what_varies(check_vma, ffi):
    """The parameters and both states are the same on all devices, and their gradients are those of the whole batch."""
    mesh, rows, same = Mesh(np.array(jax.devices()[:2]), ("i",)), PartitionSpec("i"), PartitionSpec()
    x, scale, bias, state = problem(16, 5)

    @partial(jax.shard_map, mesh=mesh, in_specs=(rows, same, same, same), out_specs=(rows, same), check_vma=check_vma)
    def run(x, scale, bias, state):
        return batch_norm(x, scale, bias, state, training=True, axis_name="i", ffi=ffi)

    close(jax.jit(run)(x, scale, bias, state), batch_norm(x, scale, bias, state, training=True))
    found = jax.jit(jax.grad(lambda *given: (run(*given, state)[0] ** 3).sum(), (0, 1, 2)))(x, scale, bias)
    close(found, jax.grad(lambda *given: (nbbn_y(*given) ** 3).sum(), (0, 1, 2))(x, scale, bias))


def test_groups_of_an_axis():
    """Of pmap; JAX's vmap has none."""
    xs, scale, bias, state = problem(4, *SHAPE)

    @partial(jax.pmap, axis_name="i")
    def run(x):
        groups = [[0, 1], [2, 3]]
        return batch_norm(x, scale, bias, state, training=True, axis_name="i", axis_index_groups=groups)[0]

    close(run(xs).reshape(2, -1, 5), jnp.stack([nbbn_y(x, scale, bias) for x in xs.reshape(2, -1, 5)]))


def test_an_axis_and_ghost_batches():
    """Group g of one member and group g of the other are one group."""
    xs, scale, bias, state = problem(2, *SHAPE)
    options = {"training": True, "virtual_batch_size": 4}
    run = lambda x: batch_norm(x, scale, bias, state, axis_name="i", **options)  # noqa: E731
    y, new = jax.vmap(run, axis_name="i")(xs)
    options["virtual_batch_size"] = 8
    expected, state = batch_norm(xs.reshape(-1, 5), scale, bias, state, **options)
    close(y.reshape(-1, 5), expected)
    close(new["mean"][0], state["mean"])


def test_a_gradient_around_the_mapped_axis():
    """Of pmap. JAX's vmap forgets the axis in whatever has derivatives of its own, and says so."""
    xs, scale, bias, _ = problem(2, *SHAPE)
    layer = partial(nbbn_y, axis_name="i")
    mapped = jax.pmap(layer, axis_name="i", in_axes=(0, None, None))
    found = jax.grad(lambda *given: (mapped(*given) ** 3).sum(), (0, 1, 2))(xs, scale, bias)
    close(found, jax.grad(lambda *given: (plain(*given) ** 3).sum(), (0, 1, 2))(xs, scale, bias))
    mapped = jax.vmap(layer, axis_name="i", in_axes=(0, None, None))
    with pytest.raises(NameError, match="unbound axis name"):
        jax.grad(lambda x: mapped(x, scale, bias).sum())(xs)


def test_second_derivatives_over_an_axis():
    """Each member's derivative is that of the sum over all members, as where a psum is differentiated."""
    xs, scale, bias, _ = problem(2, *SHAPE)

    def curvature(layer, x):
        slope = lambda x: (jax.grad(lambda x: (layer(x) ** 3).sum() / 80)(x) ** 2).sum()  # noqa: E731
        return jax.grad(slope)(x)

    layer = lambda x: nbbn_y(x, scale, bias, axis_name="i")  # noqa: E731
    found = jax.jit(jax.vmap(partial(curvature, layer), axis_name="i"))(xs)
    close(found, curvature(lambda xs: plain(xs, scale, bias), xs), 1e-4)  # third powers of float32


# -- several threads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPE, (32, 28, 28, 32)])
def test_two_threads(shape):
    """Call programs with small and with parallel steps at once: nothing aborts, and all results are right."""
    x, scale, bias, _ = problem(*shape)
    run = jax.jit(jax.value_and_grad(lambda x, s, b: (nbbn_y(x, s, b) ** 2).sum(), (0, 1, 2)))
    expected, wrong, start = run(x, scale, bias), [], threading.Barrier(4)

    def work():
        start.wait()
        for _ in range(30):
            try:
                equal(run(x, scale, bias)[1], expected[1])
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


def test_two_threads_trace_the_same_call():
    """One that nobody has traced before: its kernels are registered once."""
    x, scale, bias, _ = problem(6, 7)
    options = {"activation": "relu", "skip_nonfinite": True, "debias": True, "training": True}
    found, start = [], threading.Barrier(4)

    def work():
        start.wait()
        run = jax.jit(lambda x: batch_norm(x, scale, bias, initial_state(7, debias=True), **options)[0])
        found.append(run(x))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 4
    close(found, [jnp.maximum(plain(x, scale, bias), 0)] * 4)
