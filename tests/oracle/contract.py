"""What the tests of all targets share: schedules, small problems, and what the oracle makes of them."""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from ml_dtypes import bfloat16

from nbbn.kernels import channel
from tests.oracle.agreement import check, check_seen, gated_as, gradients, output, saturated, state, state_dtype
from tests.oracle.compiled import INTERPRETED
from tests.oracle.reference import Reference
from tests.oracle.targets import TARGETS

# On a CPU: several chunks per statistic, several tiles of columns and of channels, parts of them, and rows of all
# kinds, as large inputs have them; nothing is streamed unless a test says so.
THRESHOLDS: dict[str, dict[str, Any]] = {
    "cpu": {
        "chunk_elements": 64,
        "write_elements": 64,
        "max_tasks": 32,
        "chunk_rows": 1,
        "tile_elements": 500,
        "tile_columns": 32,
        "repeated_columns": 32,
        "written_columns": 48,
        "expanded_rows": 1,
        "short_plane": 12,
        "short_batch": 0.0,
        "tiles_per_thread": 1,
        "streamed_share": math.inf,
        "streamed_run": 0,
    },
    "cuda": {"group": 2, "threads": 4, "columns": 2, "vectors": 1, "applied": 8, "max_chunks": 3},
}


def small(target, options, schedule=None, parallel=False, one_pass=None, exchange=None, **thresholds):
    """The target with THRESHOLDS. thresholds: those that are others."""
    thresholds = {**THRESHOLDS[target.kind], **thresholds}
    return target(options, schedule, parallel, one_pass, thresholds, exchange)


DTYPES = [np.float16, bfloat16, np.float32, np.float64]
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)


class Way(NamedTuple):
    """A schedule, a canonical shape [R0, K0, R1, K1], and whether it is one pass where both are possible.

    On a GPU one pass is one launch, and K1 = 1 is always planes.
    """

    schedule: str | None
    shape: tuple[int, int, int, int]
    one_pass: bool = False

    def make(self, target, options, parallel=False, exchange=None, **thresholds):
        return small(target, options, self.schedule, parallel, self.one_pass, exchange, **thresholds)

    def twice(self):
        return self._replace(one_pass=False)


# With THRESHOLDS: whole chunks, tiles and vectors, and parts of them.
PLANES, ROWS = Way("planes", (6, 5, 23, 1), True), Way("rows", (6, 2, 7, 51), True)
SHORT_PLANES, FEW_CHANNELS = Way("rows", (6, 5, 7, 1), True), Way("rows", (6, 3, 5, 8), True)
GPU_PLANES, GPU_SHORT_PLANES = Way("planes", (6, 2, 5, 1)), Way("planes", (6, 2, 8, 1), True)
GPU_ROWS = Way("rows", (6, 2, 2, 3), True)
WAYS = {
    "cpu": {
        "planes": PLANES,
        "planes, two passes": PLANES.twice(),
        "rows": ROWS,
        "rows, two passes": ROWS.twice(),
        "rows of planes": Way("rows", (6, 3, 13, 1), True),
        "short planes": SHORT_PLANES,
        "short planes, two passes": SHORT_PLANES.twice(),
        "short blocks": Way("rows", (6, 7, 2, 3), True),
        "few channels": FEW_CHANNELS,
        "few channels, two passes": FEW_CHANNELS.twice(),
        "few channels, a part of a long row": Way("rows", (1, 1, 33, 5), True),
    },
    # A GPU's simulator runs some hundred threads a second: just enough for what differs, which is the elements of one
    # access (1, or 2 to 8, by the dtype), parts of tiles, and planes that several chunks share.
    "cuda": {
        "planes": GPU_PLANES,
        "wide planes": Way("planes", (1, 1, 72, 1)),
        "short planes": GPU_SHORT_PLANES,
        "short planes, two passes": GPU_SHORT_PLANES.twice(),
        "rows": GPU_ROWS,
        "rows, two passes": GPU_ROWS.twice(),
        "wide rows": Way("rows", (1, 1, 4, 24)),
    },
}
# Of a batch of 6, or 12. The statistics of all groups of a channel are in tiles that one pass takes together, unless a
# name says that tiles do not end where groups do: there are two passes.
GROUPED = {
    "cpu": {
        "planes": Way("planes", (6, 3, 7, 1), True),
        "a part of a tile in each group": Way("planes", (12, 5, 23, 1), True),
        "rows": Way("rows", (6, 1, 2, 51), True),
        "one tile of columns per group": Way("rows", (12, 1, 1, 32), True),
        "tiles of columns across groups": Way("rows", (12, 1, 1, 19), True),
        "short planes": Way("rows", (12, 8, 4, 1), True),
        "short planes, tiles across groups": Way("rows", (12, 9, 5, 1), True),
        "short blocks": Way("rows", (12, 20, 2, 3), True),
        "short blocks, tiles across groups": Way("rows", (12, 9, 2, 3), True),
        "few channels": Way("rows", (12, 3, 11, 3), True),
        "few channels, one tile across groups": Way("rows", (12, 1, 1, 3), True),
    },
    "cuda": {
        "planes": Way("planes", (6, 2, 3, 1), True),
        "rows": Way("rows", (6, 1, 2, 3), True),
        "tiles that are not of one group": Way("rows", (6, 1, 1, 3), True),
        "one tile per group": Way("rows", (6, 1, 1, 8), True),
    },
}
# What runs, whatever was asked for: loops, one pass.
RUNS = {
    "cpu": {name: (way.schedule, way.one_pass) for name, way in WAYS["cpu"].items()},
    "cuda": {
        "planes": ("planes", False),
        "wide planes": ("planes", False),
        "short planes": ("short planes", True),
        "short planes, two passes": ("short planes", False),
        "rows": ("swapped rows", True),
        "rows, two passes": ("swapped rows", False),
        "wide rows": ("rows", False),
    },
}
# On a CPU every pair of loops and a dtype is kernels that take seconds to compile: all rows have the same.
_OTHER_DTYPES = {
    "cpu": [
        (name, dtype)
        for name in ("planes", "rows", "short planes", "few channels")
        for dtype in (np.float16, bfloat16, np.float64)
    ],
    "cuda": [(name, dtype) for name in WAYS["cuda"] for dtype in (np.float16, bfloat16, np.float64)],
}
DTYPES_OF_WAYS = {
    target: [*((name, np.float32) for name in ways), *_OTHER_DTYPES[target]] for target, ways in WAYS.items()
}


def over_ways(*names, ways=WAYS, compiled=None):
    """A test of every target, in those of these ways that it has; in all of them where none is named.

    compiled: the only way in which a CPU's kernels are compiled for the test; the others are only interpreted.
    """
    cases = {
        f"{target}-{name}": (target, way)
        for target in TARGETS
        for name, way in ways[target].items()
        if name in names or not names
        if compiled in (None, name) or target != "cpu" or INTERPRETED
    }
    return pytest.mark.parametrize(("target", "way"), cases.values(), ids=cases, indirect=["target"])


def over_ways_and_dtypes(**pairs):
    """A test of every target in all its ways and dtypes. pairs: those of a target that is to have others."""
    cases = {
        f"{target}-{name} {np.dtype(dtype)}": (target, WAYS[target][name], dtype)
        for target in TARGETS
        for name, dtype in (DTYPES_OF_WAYS | pairs)[target]
    }
    return pytest.mark.parametrize(("target", "way", "dtype"), cases.values(), ids=cases, indirect=["target"])


EVERY_WAY = over_ways()
BOTH_LOOPS = over_ways("planes", "rows")
# Where the other loops have compiled kernels with fewer operands, or with others.
PLANES_COMPILED, ROWS_COMPILED = (over_ways("planes", "rows", compiled=name) for name in ("planes", "rows"))
EVERY_WAY_AND_DTYPE = over_ways_and_dtypes()

CLIPS = {"rmax": 1.5, "rmin": 0.7, "dmax": 0.5}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bessel": {"bessel_correction": True},
    "momentum 0": {"momentum": 0.0},
    "momentum 1": {"momentum": 1.0},
    "renorm": {"renorm": True},
    "renorm clipped": {"renorm": True, "renorm_clipping": CLIPS, "renorm_momentum": 0.8},
    "virtual": {"virtual_batch_size": 2},
    "virtual renorm": {"virtual_batch_size": 3, "renorm": True, "renorm_clipping": CLIPS},
    "cumulative": {"momentum": None},
    "cumulative renorm": {"momentum": None, "renorm": True},
    "cumulative virtual": {"momentum": None, "virtual_batch_size": 2},
    "debias": {"debias": True},
    "debias renorm": {"debias": True, "renorm": True},
    "debias momentum 1": {"debias": True, "momentum": 1.0},
}

SAVED = ("COUNT", "BATCH_MEAN", "M2", "SQUARES", "RSTD", "R", "D", "USED_GAMMA", "USED_BETA")  # of saved


def bits(array):
    return np.ascontiguousarray(array).tobytes()


class Problem:
    """Arrays for one call, and what the oracle makes of them. The kept axes are 1 and 3."""

    def __init__(self, shape, dtype, weights=False, adjustment=False, residual=False, **options):
        rng = np.random.default_rng(0)
        self.dtype, self.stored = np.dtype(dtype), state_dtype(dtype)
        self.options = {"axis": (1, 3), "momentum": 0.9, "bessel_correction": False, **options}
        self.x = (rng.normal(size=(1, *shape[1:])) + rng.normal(size=shape)).astype(dtype)
        self.dy = rng.normal(size=shape).astype(dtype)
        self.weights = self.adjustment = self.residual = None
        if residual:
            self.residual = rng.normal(size=shape).astype(dtype)
        if weights:
            self.weights = (rng.random(shape) < 0.8) * rng.integers(1, 9, shape).astype(self.stored) / 4
        if adjustment:
            self.adjustment = tuple(rng.integers(4, 16, shape).astype(self.stored) / 8 for _ in range(2))
        pair = self.adjustment
        self.oracle = Reference(**self.options, adjustment=None if pair is None else lambda s: pair).build(shape)
        values = [rng.uniform(0.5, 2, self.oracle.parameter_shape) for _ in self.oracle.weight_names]
        values[0][..., ::2] *= -1  # gamma of both signs
        rows = np.array(values).reshape(len(values), -1).astype(self.stored)
        self.params, self.state = rows[:2], rows[2:]
        self.oracle.set_weights(list(rows.reshape(-1, *self.oracle.parameter_shape)))
        self.counts = self.oracle.momentum is None or self.oracle.debias
        if self.counts:  # each channel has seen another number of batches, in mean and variance, or their weight
            seen = rng.integers(0, 4, self.oracle.parameter_shape) / (1 if self.oracle.momentum is None else 4)
            self.oracle.seen = seen
            self.state = np.concatenate([self.state, np.tile(seen.ravel(), (2, 1)).astype(self.stored)])

    @property
    def operands(self):
        return {"weights": self.weights, "adjustment": self.adjustment, "residual": self.residual}

    def check_training(self, run):
        """Run a step forward and backward; fail unless all that comes back agrees with the oracle."""
        before = [w.copy() for w in self.oracle.get_weights()]
        step = self.oracle(self.x, training=True, mask=self.weights, residual=self.residual)
        inputs = [a for a in (self.x, self.dy, self.params, self.state, self.residual) if a is not None]
        copies = [bits(a) for a in inputs]
        y, new_state, saved = run.train(self.x, self.params, self.state, **self.operands)
        check("y", y, step.y, output(step, self.dtype), self.dtype)
        self.check_state(new_state, before, step)
        self.check_saved(saved, step)
        found = run.backward(self.dy, self.x, saved, **self.operands)
        self.check_gradients(*found, gated_as(step, y, self.dtype))
        assert [bits(a) for a in inputs] == copies, "an input was changed"

    def check_output_of_inference(self, run, out=None):
        step = self.oracle(self.x, residual=self.residual)
        y = run.infer(self.x, self.params, self.state, residual=self.residual, out=out)
        check("y", y, step.y, output(step, self.dtype), self.dtype)
        return step, y

    def check_inference(self, run):
        """The same with the moving statistics."""
        step, y = self.check_output_of_inference(run)
        saved = run.freeze(self.params, self.state)
        self.check_frozen(saved, step, 1e-15 if run.kind == "cpu" else 2 * np.finfo(self.stored).eps)
        found = run.backward(self.dy, self.x, saved, training=False, residual=self.residual)
        self.check_gradients(*found, gated_as(step, y, self.dtype))

    def check_state(self, found, before, step):
        assert found.shape == self.state.shape
        names, values = self.oracle.weight_names[2:], self.oracle.get_weights()[2:]
        for name, row, old, new in zip(names, found[: len(names)], before[2:], values, strict=True):
            bound = state(name, old, new, step, self.dtype)
            check(name, row, saturated(new, self.stored).ravel(), bound.ravel(), self.stored)
        if self.counts:
            for name, row in (("seen_mean", channel.SEEN_MEAN), ("seen_variance", channel.SEEN_VARIANCE)):
                check_seen(name, found[row], self.oracle.seen.ravel())

    def check_saved(self, saved, step):
        """Everything is float64, whatever the input: rounding of a dozen operations."""
        assert saved.shape == (channel.SAVED_ROWS, step.W.size)
        assert saved.dtype == np.float64
        self.check_statistics(saved, step)
        self.check_used_parameters(saved)

    def check_statistics(self, saved, step):
        expected = {
            channel.COUNT: step.W,
            channel.BATCH_MEAN: step.mean,
            channel.M2: step.W * step.var,
            channel.SQUARES: (step.w**2).sum(axis=step.axes, keepdims=True),
            channel.RSTD: 1 / step.sigma,
            channel.R: step.r,
            channel.D: step.d,
        }
        for row, value in expected.items():
            full = np.broadcast_to(value, step.W.shape)
            scale = step.W.max() if row == channel.M2 else 1  # that of a sum
            np.testing.assert_allclose(saved[row], full.ravel(), rtol=1e-13, atol=1e-13 * scale, err_msg=SAVED[row])

    def check_used_parameters(self, saved):
        """Those of the step, as they were, for every group."""
        for row, values in zip((channel.USED_GAMMA, channel.USED_BETA), self.params, strict=True):
            expected = np.tile(values, saved.shape[1] // values.size).astype(np.float64)
            np.testing.assert_array_equal(saved[row], expected, err_msg=SAVED[row], strict=True)

    def check_frozen(self, saved, step, bound):
        """The statistics are the state's, and a count of 0 says so. bound: for the reciprocal deviation, which is that
        of the output: a GPU has it in the statistics' dtype."""
        assert saved.shape == (channel.SAVED_ROWS, self.params.shape[1])
        assert saved.dtype == np.float64
        for row, value in {
            channel.COUNT: 0,
            channel.BATCH_MEAN: self.state[channel.MEAN],
            channel.M2: 0,
            channel.SQUARES: 0,
            channel.R: 1,
            channel.D: 0,
        }.items():
            np.testing.assert_array_equal(saved[row], value, err_msg=SAVED[row])
        np.testing.assert_allclose(saved[channel.RSTD], 1 / step.sigma.ravel(), rtol=bound, err_msg="RSTD")
        self.check_used_parameters(saved)

    def check_gradients(self, dx, dparams, dz, step):
        expected, bound = step.gradients(self.dy), gradients(step, self.dy, self.dtype)
        check("dx", dx, expected.inputs, bound.inputs, self.dtype)
        for name, row in zip(("gamma", "beta"), dparams, strict=True):
            value, limit = getattr(expected, name), getattr(bound, name)
            check(f"d{name}", row, value.ravel(), limit.ravel(), self.stored)
        gated = np.where(step.gate, self.dy, np.zeros((), self.dtype))
        np.testing.assert_array_equal(dz, gated, strict=True)


def all_results(run, problem, out=None, gradient_out=None):
    y, new_state, saved = run.train(problem.x, problem.params, problem.state, out=out, **problem.operands)
    gradients = run.backward(problem.dy, problem.x, saved, out=gradient_out, **problem.operands)
    return [bits(r) for r in (y, new_state, saved, *gradients)]


def strided(x):
    """The same values with gaps, backwards, in a larger array of other values."""
    wide = np.full([2 * n for n in x.shape], 77, x.dtype)
    wide[::2, ::2, ::2, ::2] = x[::-1, :, ::-1]
    return wide[::2, ::2, ::2, ::2][::-1, :, ::-1]


def check_skipping(target, way, value, exchange=None):
    """Fail unless a value that is not finite leaves all statistics of its channel as they were, with skip_nonfinite,
    and nothing else is changed by the option. The groups of a channel share them: one bad group is enough."""
    problem = Problem(way.shape, np.float32, virtual_batch_size=2, **OPTIONS["cumulative renorm"])
    plain, skipping = (
        way.make(target, {**problem.options, "skip_nonfinite": skip}, exchange=exchange) for skip in (False, True)
    )
    problem.check_training(skipping)
    problem.x[0, 1, 0, 0] = value
    y, new_state, saved = plain.train(problem.x, problem.params, problem.state)
    bad = way.shape[3]  # the first column of the second channel
    assert np.isnan(new_state[channel.VARIANCE]).nonzero()[0].tolist() == [bad]
    new_state[:, bad] = problem.state[:, bad]
    found = skipping.train(problem.x, problem.params, problem.state)
    for one, other in zip(found, (y, new_state, saved), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def check_strided_output(run, problem, expected):
    """Fail unless a training step writes its output, and nothing in the gaps."""
    out = strided(np.zeros(problem.x.shape, np.float32))
    y, _, _ = run.train(problem.x, problem.params, problem.state, out=out)
    assert y is out
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    everything = out.base
    while everything.base is not None:
        everything = everything.base
    assert (everything == 77).sum() == everything.size - out.size


def check_sizes(target, way, shapes, loops):
    """Fail unless training agrees with the oracle at every size, and these loops were among those that ran."""
    seen = set()
    for shape in shapes:
        problem = Problem(shape, np.float32)
        run = way.make(target, problem.options)
        try:
            problem.check_training(run)
        except AssertionError as error:
            raise AssertionError(f"{shape}: {error}") from error
        seen |= {loops for _, loops, _, _ in run.kernels()}
    assert loops in seen
