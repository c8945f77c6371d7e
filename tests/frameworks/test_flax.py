"""nbbn.flax against Flax's own modules, in random configurations; what nbbn adds, against nbbn.jax."""

import copy
import pickle
import re
import runpy
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization

import nbbn.flax
from nbbn.jax import batch_norm, initial_state

pytestmark = pytest.mark.frameworks


def close(found, expected, tolerance):
    """Relative to the largest value: Flax's sums are float32."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max(initial=0.0)))


# The rounding of a result in this dtype, which may fall to either side; in float32 that of Flax's sums, too.
ROUNDING = {"float32": 2e-5, "bfloat16": 2.0**-6, "float16": 2.0**-9}

GRADIENT = 4  # Flax's gradient of a 16-bit input is a sum of several that are rounded each
jax.config.update("jax_disable_most_optimizations", True)  # compiling is what takes the time here


class Configuration:
    """Drawn at random: the module's arguments, an input, a mask, the gradient of the output."""

    def __init__(self, seed, several_axes):
        rng = np.random.default_rng(seed)
        rank = int(rng.integers(1, 5))
        shape = tuple(int(n) for n in rng.integers(2, 9, rank))
        count = int(rng.integers(1, rank)) if several_axes and rank > 1 and rng.random() < 0.3 else 1
        axes = tuple(int(a) - (rank if rng.random() < 0.5 else 0) for a in rng.permutation(rank)[:count])
        kinds = list(ROUNDING)
        self.input, self.param, dtype = (kinds[min(int(rng.exponential(0.7)), 2)] for _ in range(3))
        self.arguments = {
            "axis": axes if count > 1 else axes[0],
            "momentum": float(rng.random()),
            "epsilon": float(10.0 ** rng.uniform(-5, 0)),
            "use_scale": bool(rng.random() < 0.8),
            "use_bias": bool(rng.random() < 0.8),
            "dtype": None if rng.random() < 0.5 else jnp.dtype(dtype),
            "param_dtype": jnp.dtype(self.param),
            "use_fast_variance": False,
            "scale_init": nn.initializers.normal(1.0),
            "bias_init": nn.initializers.normal(1.0),
        }
        self.x = jnp.asarray(rng.normal(1, 2, shape), self.input)
        self.shape, self.channels = shape, shape[axes[0]]
        self.mask = None
        if rank > 1 and rng.random() < 0.3:
            # At least one value of each statistic counts: without any Flax's are NaN.
            self.mask = jnp.asarray((rng.random(shape) < 0.7) | (np.indices(shape).sum(0) % 2 == 0))
        self.dy = rng.normal(size=shape).astype(np.float32)

    def tolerance(self, *outputs):
        kinds = {self.input, self.param, *(np.dtype(y.dtype).name for y in outputs)}
        return max(ROUNDING[kind] for kind in kinds)


LINEN = {"flax": nn.BatchNorm, "nbbn": nbbn.flax.linen.BatchNorm}
NNX = {"flax": nnx.BatchNorm, "nbbn": nbbn.flax.nnx.BatchNorm}


@pytest.mark.parametrize("seed", range(128))
def test_linen(seed):
    c = Configuration(seed, several_axes=True)
    found = {}
    for whose, kind in LINEN.items():
        module = kind(**c.arguments)

        def loss(params, x, variables, module=module):
            given = variables | {"params": params} if params else variables
            y, new = module.apply(given, x, use_running_average=False, mask=c.mask, mutable=["batch_stats"])
            return (y.astype(jnp.float32) * c.dy).sum(), (y, new)

        @jax.jit
        def run(key, x, module=module, loss=loss):
            variables = module.init(key, x, use_running_average=False)
            variables = jax.tree.map(lambda v: v + v.dtype.type(0.25), variables)
            gradients, (y, new) = jax.grad(loss, (0, 1), has_aux=True)(variables.get("params", {}), x, variables)
            inference = module.apply(variables | new, x, use_running_average=True)
            return {"y": y, "new": new, "gradients": gradients, "inference": inference, "first": variables}

        found[whose] = run(jax.random.key(seed), c.x)
    ours, theirs = found["nbbn"], found["flax"]
    close(ours["first"], theirs["first"], 0)
    close((ours["y"], ours["inference"]), (theirs["y"], theirs["inference"]), c.tolerance(theirs["y"]))
    close(ours["new"], theirs["new"], 2e-6)
    close(ours["gradients"], theirs["gradients"], GRADIENT * c.tolerance(theirs["y"]))


@pytest.mark.parametrize("seed", range(128))
def test_nnx(seed):
    c = Configuration(1000 + seed, several_axes=False)
    found = {}
    for whose, kind in NNX.items():
        module = kind(c.channels, rngs=nnx.Rngs(seed), **c.arguments)
        graph, params, rest = nnx.split(module, nnx.Param, ...)

        def loss(params, x, rest, graph=graph):
            module = nnx.merge(graph, params, rest, copy=True)
            y = module(x, mask=c.mask)
            new = nnx.state(module)
            module.eval()
            return (y.astype(jnp.float32) * c.dy).sum(), {"y": y, "new": new, "inference": module(x)}

        gradients, made = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, c.x, rest)
        made["gradients"] = nnx.to_pure_dict(gradients[0]), gradients[1]
        made["new"], made["first"] = nnx.to_pure_dict(made["new"]), nnx.to_pure_dict(nnx.state(module))
        found[whose] = made
    ours, theirs = found["nbbn"], found["flax"]
    close(ours["first"], theirs["first"], 0)
    tolerance = max(c.tolerance(theirs["y"]), ROUNDING[np.dtype(theirs["y"].dtype).name])
    close((ours["y"], ours["inference"]), (theirs["y"], theirs["inference"]), 2 * tolerance)
    close(ours["new"], theirs["new"], 2e-6 if tolerance < 1e-3 else tolerance)
    close(ours["gradients"], theirs["gradients"], GRADIENT * tolerance)


# -- in the place of Flax's --------------------------------------------------------------------------------------------

X = np.random.default_rng(2).normal(3, 2, (8, 6, 4)).astype(np.float32)


class Network(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, training):
        x = nn.Dense(5)(x)
        x = self.norm(use_running_average=not training)(x)
        return nn.Dense(2)(nn.relu(x))


def test_checkpoints_go_both_ways():
    """Paths and names of all variables are Flax's: the class is called BatchNorm, too."""
    networks = {name: Network(kind) for name, kind in LINEN.items()}
    variables = networks["flax"].init(jax.random.key(0), X, True)
    data = serialization.to_bytes(variables)
    own = serialization.from_bytes(networks["nbbn"].init(jax.random.key(1), X, True), data)
    y, new = networks["nbbn"].apply(own, X, True, mutable=["batch_stats"])
    expected, theirs = networks["flax"].apply(variables, X, True, mutable=["batch_stats"])
    close((y, new), (expected, theirs), 2e-5)
    close(networks["flax"].apply(own | new, X, False), networks["nbbn"].apply(variables | theirs, X, False), 2e-5)


def test_modules_are_flaxs_own():
    module = nbbn.flax.BatchNorm(renorm=True, renorm_clipping={"rmax": 2.0})
    assert nbbn.flax.BatchNorm is nbbn.flax.linen.BatchNorm
    assert isinstance(module, nn.BatchNorm)
    assert module.clone() == module == pickle.loads(pickle.dumps(module))
    assert hash(module) == hash(module.copy())
    other = nbbn.flax.nnx.BatchNorm(4, rngs=nnx.Rngs(0), renorm=True)
    assert isinstance(other, nnx.BatchNorm)
    other(X)
    same = copy.deepcopy(other)
    np.testing.assert_array_equal(same(X), other(X))
    np.testing.assert_array_equal(same.renorm_stddev[...], other.renorm_stddev[...])


def test_nothing_moves_while_a_module_is_initialized():
    module = nbbn.flax.BatchNorm(use_running_average=False, axis_name="not there")
    stats = module.init(jax.random.key(0), X)["batch_stats"]
    np.testing.assert_array_equal(stats["mean"], 0)
    np.testing.assert_array_equal(stats["var"], 1)


def test_a_module_with_a_callable_is_initialized_in_any_way():
    """Nobody keeps the statistics of these calls, so the number may be Python's."""
    clips = {"rmax": lambda: 2.0}
    module = nbbn.flax.BatchNorm(False, momentum=lambda: 0.9, renorm=True, renorm_clipping=clips)
    key = jax.random.key(0)
    expected = module.init(key, X)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(module.init)(key, X), expected)
    shapes = jax.eval_shape(module.init, key, X)
    jax.tree.map(lambda found, one: np.testing.assert_equal(found.shape, one.shape), shapes, expected)
    assert "batch_stats" in module.tabulate(key, X)


def test_statistics_must_be_mutable():
    module = nbbn.flax.BatchNorm(use_running_average=False)
    with pytest.raises(Exception, match="batch_stats"):
        module.apply(module.init(jax.random.key(0), X), X)


def test_the_mode_must_be_known():
    with pytest.raises(ValueError, match="use_running_average"):
        nbbn.flax.BatchNorm().init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="use_running_average must be given"):
        nbbn.flax.nnx.BatchNorm(4, use_running_average=None, rngs=nnx.Rngs(0))(X)


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match=r"axis must be between -3 and 2 .* received 3"):
        nbbn.flax.BatchNorm(axis=3, use_running_average=False).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="virtual_batch_size=3 must divide"):
        nbbn.flax.nnx.BatchNorm(4, virtual_batch_size=3, rngs=nnx.Rngs(0))(X)
    wrong = pytest.raises(TypeError, match=r"renorm_clipping must be a dict with keys among .* received 3")
    with wrong:
        nbbn.flax.BatchNorm(renorm_clipping=3, use_running_average=False).init(jax.random.key(0), X)
    with wrong:
        nbbn.flax.nnx.BatchNorm(4, renorm_clipping=3, rngs=nnx.Rngs(0))(X)


# -- nbbn's options ----------------------------------------------------------------------------------------------------

OPTIONS = {
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 1.5, "dmax": 0.3}, "renorm_momentum": 0.7},
    "ghost": {"virtual_batch_size": 4},
    "contiguous ghost": {"virtual_batch_size": 3, "virtual_batch_order": "contiguous", "ragged": "last"},
    "debias": {"debias": True},
    "equal weights": {"momentum": None},
    "others": {"bessel_correction": True, "activation": "relu", "skip_nonfinite": True},
}
OPERANDS = {
    "mask": {"mask": np.arange(48).reshape(8, 6) % 3 > 0},
    "lengths": {"lengths": np.array([6, 1, 0, 3, 4, 6, 2, 5])},
    "residual": {"residual": X[::-1].copy()},
    "adjustment": {"adjustment": (X / 3, np.float32(1))},
}


def module_of(kind, **options):
    """A function of (state, input, operands) that gives the output and the new state."""
    if kind == "linen":
        module = nbbn.flax.BatchNorm(use_running_average=False, **options)

        def run(state, x, **operands):
            variables = module.init(jax.random.key(0), x)
            assert set(variables["batch_stats"]) == set(state)
            y, new = module.apply(variables | {"batch_stats": state}, x, mutable=["batch_stats"], **operands)
            return y, new["batch_stats"]
    else:

        def run(state, x, **operands):
            module = nbbn.flax.nnx.BatchNorm(x.shape[-1], rngs=nnx.Rngs(0), **options)
            nnx.update(module, nnx.state(module, nnx.BatchStat))
            for name, value in state.items():
                getattr(module, name)[...] = value
            y = module(x, **operands)
            return y, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

    return run


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_options(kind, name, operand):
    options, operands = OPTIONS[name], OPERANDS[operand]
    if "adjustment" in operands and "virtual_batch_size" in options:
        pytest.skip("nbbn has no adjustment with virtual batches")
    first = {n: options[n] for n in ("renorm", "debias", "momentum") if n in options}
    state = {n: v + 0.25 for n, v in initial_state(4, **first).items()}
    y, new = module_of(kind, **options)(state, X, **operands)
    expected, moved = batch_norm(X, None, None, state, training=True, **options, **operands)
    np.testing.assert_array_equal(y, expected)
    for key, value in moved.items():
        np.testing.assert_array_equal(new[key], value)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_bounds_that_change_while_a_program_runs(kind):
    state = initial_state(4, renorm=True)
    run = jax.jit(lambda rmax: module_of(kind, renorm=True)(state, X, renorm_clipping={"rmax": rmax})[0])
    for rmax in (1.0, 1.25):
        expected, _ = batch_norm(X, None, None, state, training=True, renorm=True, renorm_clipping={"rmax": rmax})
        np.testing.assert_array_equal(run(jnp.float32(rmax)), expected)


# -- Flax's transformations --------------------------------------------------------------------------------------------


class Layer(nn.Module):
    kind: type

    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(self.kind(use_running_average=False)(x)), None


def test_lifted_transformations():
    """A scan over two layers, each of which is computed again for its gradient; and a vmap over two of them."""
    stacked = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
    found = {}
    for name, kind in LINEN.items():
        scanned = nn.scan(nn.remat(Layer), length=2, **stacked)(kind)
        variables = scanned.init(jax.random.key(0), X, None)

        def loss(params, scanned=scanned, variables=variables):
            (y, _), new = scanned.apply(variables | {"params": params}, X, None, mutable=["batch_stats"])
            return (y**3).sum(), new

        mapped = nn.vmap(Layer, in_axes=(0, None), out_axes=0, axis_size=2, **stacked)(kind)
        several = np.stack([X, 2 * X])
        own = mapped.init(jax.random.key(0), several, None)
        (y, _), moved = mapped.apply(own, several, None, mutable=["batch_stats"])
        found[name] = jax.grad(loss, has_aux=True)(variables["params"]), y, moved
    close(found["nbbn"], found["flax"], 2e-4)  # third powers, behind two layers


@pytest.mark.parametrize("shape", [(4,), (6, 1), (6, 4), (1, 1, 4), (8, 1, 1)])
def test_masks_broadcast_as_flaxs(shape):
    mask = np.arange(np.prod(shape)).reshape(shape) % 3 > 0
    mask = mask if mask.size > 4 else np.ones(shape, bool)  # without any value Flax's statistics are NaN
    found = {}
    for name, kind in LINEN.items():
        module = kind(use_running_average=False)
        found[name] = module.apply(module.init(jax.random.key(0), X), X, mask=mask, mutable=["batch_stats"])
    close(found["nbbn"], found["flax"], 2e-5)


def test_masks_of_samples():
    """Do not broadcast, and so have nbbn's meaning."""
    module, mask = nbbn.flax.BatchNorm(use_running_average=False, momentum=0.0), np.arange(8) < 3
    _, new = module.apply(module.init(jax.random.key(0), X), X, mask=mask, mutable=["batch_stats"])
    np.testing.assert_allclose(new["batch_stats"]["mean"], X[:3].mean((0, 1)), rtol=1e-6)


def test_an_axis_weighs_every_value_the_same():
    """Where masks differ, Flax's averages of averages are not those of the whole batch."""
    xs, mask = np.stack([X, X[::-1] * 2]), np.stack([np.ones((8, 1, 1), bool), np.arange(8).reshape(8, 1, 1) < 2])
    means = {}
    for name, kind in LINEN.items():
        module = kind(use_running_average=False, axis_name="i", momentum=0.0)
        variables = module.init(jax.random.key(0), X)
        run = lambda x, m: module.apply(variables, x, mask=m, mutable=["batch_stats"])  # noqa: B023, E731
        means[name] = jax.vmap(run, axis_name="i")(xs, mask)[1]["batch_stats"]["mean"][0]
    expected = np.concatenate([xs[0], xs[1][:2]]).mean((0, 1))
    np.testing.assert_allclose(means["nbbn"], expected, rtol=1e-6)
    assert np.abs(np.asarray(means["flax"]) - expected).max() > 0.1


def test_nnx_trains():
    """With nnx.jit, a gradient and a second mode, as a network of Flax's modules does."""
    losses = {}
    for name, kind in NNX.items():
        model = nnx.Sequential(
            nnx.Linear(4, 5, rngs=nnx.Rngs(0)), kind(5, rngs=nnx.Rngs(1)), nnx.Linear(5, 1, rngs=nnx.Rngs(2))
        )

        @nnx.jit
        def step(model, x):
            loss, gradients = nnx.value_and_grad(lambda model: ((model(x) - x.sum(-1, keepdims=True)) ** 2).mean())(
                model
            )
            state = nnx.state(model, nnx.Param)
            nnx.update(model, jax.tree.map(lambda p, g: p - 0.01 * g, state, nnx.state(gradients)))
            return loss

        losses[name] = [float(step(model, X)) for _ in range(20)]
        model.eval()
        losses[name].append(float(model(X).sum()))
    assert losses["nbbn"][19] < 0.5 * losses["nbbn"][0]
    np.testing.assert_allclose(losses["nbbn"], losses["flax"], rtol=1e-3)


# -- the page ----------------------------------------------------------------------------------------------------------

DOCS = Path(__file__).parents[2] / "docs"


def test_the_example_is_rescued_by_renorm():
    """As the page says: by a line."""
    example = runpy.run_path(str(DOCS / "examples/training_flax.py"))
    plain, renorm = (example["train"](example[name]) for name in ("plain", "renorm"))
    assert plain < 0.87  # 0.795 where it was written; guessing has 0.1
    assert renorm > 0.92


def test_the_page_works():
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "jax.md").read_text(encoding="utf-8"), re.DOTALL)
    made = {}
    exec(code, made)
    assert made["y"].shape == made["z"].shape == (64, 8, 8, 16)
    assert set(made["state"]) == {"mean", "var"}
    np.testing.assert_allclose(made["state"]["mean"], 0.05, rtol=0.05)  # 1 % of 5
