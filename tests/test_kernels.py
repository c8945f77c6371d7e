"""What every target's stages must do: the same bodies for each of them, on small inputs that many chunks share."""

import math
import platform
from typing import NamedTuple

import numba
import numpy as np
import pytest
from agreement import check, gated_as, gradients, output, state, state_dtype
from conversions import DTYPES as HALVES
from conversions import check_every_value, check_rounding
from ml_dtypes import bfloat16
from processes import check as check_process
from reference import Reference
from targets import TARGETS

from nbbn import dtypes, schedule
from nbbn.kernels.cpu import memory
from nbbn.kernels.cpu.memory import BLOCK, copy_block
from nbbn.kernels.cpu.scalars import HALF_INSTRUCTIONS
from nbbn.runtime import thread_limit

DTYPES = [np.float16, bfloat16, np.float32, np.float64]
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)


class Way(NamedTuple):
    """A schedule, a canonical shape [R0, K0, R1, K1], and whether it is one pass where both are possible."""

    schedule: str
    shape: tuple[int, int, int, int]
    one_pass: bool = False

    def make(self, target, options, parallel=False):
        return target(options, self.schedule, parallel, self.one_pass)


# With the thresholds of small_thresholds(): whole chunks and parts of them, whole tiles and parts.
PLANES, ROWS = Way("planes", (6, 3, 7, 1), True), Way("rows", (6, 3, 7, 19))
SHORT_PLANES, FEW_CHANNELS = Way("rows", (6, 3, 7, 1), True), Way("rows", (6, 3, 8, 5), True)
WAYS = {
    "planes": PLANES,
    "planes, two passes": PLANES._replace(one_pass=False),
    "rows": ROWS,
    "rows of planes": Way("rows", (6, 3, 13, 1)),
    "short planes": SHORT_PLANES,
    "short planes, two passes": SHORT_PLANES._replace(one_pass=False),
    "few channels": FEW_CHANNELS,
    "few channels, two passes": FEW_CHANNELS._replace(one_pass=False),
}
# What runs, whatever was asked for: loops, one pass.
RUNS = {
    "planes": ("planes", True),
    "planes, two passes": ("planes", False),
    "rows": ("rows", False),
    "rows of planes": ("rows", False),
    "short planes": ("folded", True),
    "short planes, two passes": ("folded", False),
    "few channels": ("folded", True),
    "few channels, two passes": ("folded", False),
}
EVERY_WAY = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
BOTH_LOOPS = pytest.mark.parametrize("way", [PLANES, ROWS], ids=["planes", "rows"])
# Every pair is a kernel that takes seconds to compile: folded rows are the rows' loops with another look-up.
DTYPES_OF_WAYS = [
    *((name, np.float32) for name in WAYS),
    *((name, dtype) for name in ("planes", "rows") for dtype in (np.float16, bfloat16, np.float64)),
    ("short planes", np.float16),
    ("few channels", np.float16),
]
EVERY_WAY_AND_DTYPE = pytest.mark.parametrize(
    ("way", "dtype"), [(WAYS[n], d) for n, d in DTYPES_OF_WAYS], ids=[f"{n} {np.dtype(d)}" for n, d in DTYPES_OF_WAYS]
)

CLIPS = {"rmax": 1.5, "rmin": 0.7, "dmax": 0.5}
OPTIONS = {
    "plain": {},
    "bessel": {"bessel_correction": True},
    "momentum 0": {"momentum": 0.0},
    "momentum 1": {"momentum": 1.0},
    "renorm": {"renorm": True},
    "renorm clipped": {"renorm": True, "renorm_clipping": CLIPS, "renorm_momentum": 0.8},
    "virtual": {"virtual_batch_size": 2},
    "virtual renorm": {"virtual_batch_size": 3, "renorm": True, "renorm_clipping": CLIPS},
}


@pytest.fixture(params=TARGETS)
def target(request):
    return TARGETS[request.param][0]


@pytest.fixture(params=TARGETS)
def scalars(request):
    return TARGETS[request.param][1]


def small_thresholds(monkeypatch):
    """Several chunks per statistic and several tiles of K1, and rows of all kinds, as large inputs have them."""
    values = {"CHUNK_ELEMENTS": 16, "CHUNK_ROWS": 1, "TILE_COLUMNS": 16, "SHORT_PLANE": 12, "FOLDED_ELEMENTS": 0}
    for name, value in values.items():
        monkeypatch.setattr(schedule, name, value)


@pytest.fixture(autouse=True)
def _small_thresholds(monkeypatch):
    small_thresholds(monkeypatch)


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
        found = run.backward(self.dy, self.x, self.params, saved, **self.operands)
        self.check_gradients(*found, gated_as(step, y, self.dtype))
        assert [bits(a) for a in inputs] == copies, "an input was changed"

    def check_inference(self, run):
        """The same with the moving statistics."""
        step = self.oracle(self.x, residual=self.residual)
        y = run.infer(self.x, self.params, self.state, residual=self.residual)
        check("y", y, step.y, output(step, self.dtype), self.dtype)
        found = run.frozen_backward(self.dy, self.x, self.params, self.state, residual=self.residual)
        self.check_gradients(*found, gated_as(step, y, self.dtype))

    def check_state(self, found, before, step):
        assert found.shape == self.state.shape
        names, values = self.oracle.weight_names[2:], self.oracle.get_weights()[2:]
        for name, row, old, new in zip(names, found, before[2:], values, strict=True):
            bound = state(name, old, new, step, self.dtype)
            check(name, row, new.ravel(), bound.ravel(), self.stored)

    def check_saved(self, saved, step):
        """Count, mean, 1 / sigma, r and d are float64, whatever the input: rounding of a dozen operations."""
        expected = [step.W, step.mean, 1 / step.sigma, step.r, step.d]
        assert saved.dtype == np.float64
        for name, row, value in zip(("count", "mean", "rstd", "r", "d"), saved, expected, strict=True):
            full = np.broadcast_to(value, step.W.shape)
            np.testing.assert_allclose(row.ravel(), full.ravel(), rtol=1e-13, atol=1e-13, err_msg=name)

    def check_gradients(self, dx, dparams, dz, step):
        expected, bound = step.gradients(self.dy), gradients(step, self.dy, self.dtype)
        check("dx", dx, expected.inputs, bound.inputs, self.dtype)
        for name, row in zip(("gamma", "beta"), dparams, strict=True):
            value, limit = getattr(expected, name), getattr(bound, name)
            check(f"d{name}", row, value.ravel(), limit.ravel(), self.stored)
        gated = np.where(step.gate, self.dy, np.zeros((), self.dtype))
        np.testing.assert_array_equal(dz, gated, strict=True)


# --- the steps against the oracle ------------------------------------------------


@EVERY_WAY_AND_DTYPE
def test_training(target, way, dtype):
    problem = Problem(way.shape, dtype)
    problem.check_training(way.make(target, problem.options))


@pytest.mark.parametrize("name", WAYS)
def test_the_ways_run_what_their_names_say(name):
    """Or the tests here would test little."""
    way = WAYS[name]
    problem = Problem(way.shape, np.float32)
    run = way.make(TARGETS["cpu"][0], problem.options)
    all_results(run, problem)
    assert run.kernels() == [(step, *RUNS[name], False) for step in ("train", "backward")]


@BOTH_LOOPS
@pytest.mark.parametrize("mode", OPTIONS)
def test_training_with_options(target, way, mode):
    problem = Problem(way.shape, np.float32, **OPTIONS[mode])
    problem.check_training(way.make(target, problem.options))


# The statistics of all groups of a channel are in tiles that one pass takes together.
GROUPED = {
    "planes": Way("planes", (6, 3, 7, 1), True),
    "short planes": Way("rows", (6, 4, 4, 1), True),
    "one tile per group": Way("rows", (12, 2, 8, 2), True),
    "tiles that hold parts of two groups": Way("rows", (12, 3, 5, 1), True),
    "few channels": Way("rows", (12, 1, 8, 3), True),
}


@pytest.mark.parametrize("way", GROUPED.values(), ids=GROUPED)
@pytest.mark.parametrize("size", [2, 3, 6])
def test_virtual_batches_in_every_way(target, way, size):
    found = []
    for one_pass in (True, False):
        problem = Problem(way.shape, np.float32, virtual_batch_size=size)
        run = way._replace(one_pass=one_pass).make(target, problem.options)
        problem.check_training(run)
        found.append(all_results(run, problem))
    assert found[0] == found[1]


@BOTH_LOOPS
@pytest.mark.parametrize(
    ("weights", "adjustment", "dtype"),
    [(True, False, np.float64), (False, True, bfloat16), (True, True, np.float32)],
    ids=["weights", "adjustment", "both"],
)
def test_training_with_operands(target, way, weights, adjustment, dtype):
    for options in ({}, {"renorm": True, "renorm_clipping": CLIPS}):
        problem = Problem(way.shape, dtype, weights, adjustment, **options)
        problem.check_training(way.make(target, problem.options))


@BOTH_LOOPS
def test_weighted_virtual_batches(target, way):
    for options in ({}, {"renorm": True}):
        problem = Problem(way.shape, np.float64, weights=True, virtual_batch_size=2, **options)
        problem.check_training(way.make(target, problem.options))


@EVERY_WAY
def test_residual_and_relu(target, way):
    problem = Problem(way.shape, np.float32, residual=True, activation="relu")
    problem.check_training(way.make(target, problem.options))


@BOTH_LOOPS
def test_residual_and_relu_with_operands(target, way):
    """All that can follow the normalization, in one element: relu((x_hat * a + b) * gamma + beta + residual)."""
    problem = Problem(way.shape, np.float32, True, True, True, activation="relu", renorm=True, renorm_clipping=CLIPS)
    problem.check_training(way.make(target, problem.options))


@pytest.mark.parametrize(
    ("residual", "activation"), [(True, None), (False, "relu")], ids=["residual alone", "relu alone"]
)
def test_residual_or_relu(target, residual, activation):
    problem = Problem(ROWS.shape, np.float16, residual=residual, activation=activation)
    problem.check_training(ROWS.make(target, problem.options))


@EVERY_WAY_AND_DTYPE
def test_inference(target, way, dtype):
    check_output_of_inference(Problem(way.shape, dtype), way, target)


def check_output_of_inference(problem, way, target, out=None):
    run = way.make(target, problem.options)
    step = problem.oracle(problem.x, residual=problem.residual)
    y = run.infer(problem.x, problem.params, problem.state, residual=problem.residual, out=out)
    check("y", y, step.y, output(step, problem.dtype), problem.dtype)
    return run


@pytest.mark.parametrize("store", ["direct", "in place", "streamed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_inference_in_the_order_of_memory(target, store, dtype, monkeypatch):
    """Planes of any length about blocks of any alignment, with many and with few of them in a block and in a chunk."""
    monkeypatch.setattr(schedule, "CHUNK_ELEMENTS", BLOCK)
    monkeypatch.setattr(schedule, "STREAMED_SHARE", 0.0 if store == "streamed" else math.inf)
    fused = {"residual": True, "activation": "relu"} if dtype == np.float32 else {}
    for k0, r1 in ((1, 1), (1, 5000), (3, 2), (700, 7), (2, BLOCK - 1), (3, BLOCK), (2, BLOCK + 1), (5, 300)):
        problem = Problem((2, k0, r1, 1), dtype, **fused)
        for start in (0, 1, 5):
            out = np.empty(problem.x.size + start, dtype)[start:].reshape(problem.x.shape)
            if store == "in place":
                out[...] = problem.x
                problem.x = out
            run = check_output_of_inference(problem, Way(None, problem.x.shape), target, out)
            assert run.kernels() == [("infer", "runs", False, store == "streamed")]


@pytest.mark.parametrize(("way", "dtype"), [(PLANES, bfloat16), (ROWS, np.float32)], ids=["planes", "rows"])
def test_gradient_of_inference(target, way, dtype):
    problem = Problem(way.shape, dtype)
    problem.check_inference(way.make(target, problem.options))


@pytest.mark.parametrize("way", [PLANES, ROWS, SHORT_PLANES], ids=["planes", "rows", "short planes"])
def test_inference_and_its_gradient_with_residual_and_relu(target, way):
    problem = Problem(way.shape, np.float32, residual=True, activation="relu")
    problem.check_inference(way.make(target, problem.options))


@pytest.mark.parametrize(
    ("way", "weights"), [(PLANES, True), (ROWS, False), (FEW_CHANNELS, False)], ids=["planes weighted", "rows", "few"]
)
def test_moments(target, way, weights):
    problem = Problem(way.shape, np.float64, weights)
    found = way.make(target, problem.options).moments(problem.x, problem.weights)
    w = np.ones(way.shape) if problem.weights is None else problem.weights
    count = w.sum((0, 2))
    mean = (w * problem.x).sum((0, 2)) / count
    variance = (w * (problem.x - mean[:, None, :]) ** 2).sum((0, 2)) / count
    np.testing.assert_allclose(found, [v.ravel() for v in (count, mean, variance)], rtol=1e-13, atol=1e-14)


# --- sizes ---------------------------------------------------------------------------------

# About each border: blocks of four rows and their remainder, chunks, tiles of 16 columns, runs of up to 12.
SIZES = {
    "planes": [(r0, 2, r1, 1) for r0 in (1, 2, 3, 9) for r1 in (2, 3, 7, 15, 16, 17, 33)],
    "rows": [(1, 1, rows, k1) for rows in range(1, 18) for k1 in (1, 15, 16, 17)]
    + [(r0, 2, r1, k1) for r0 in (2, 3) for r1 in (1, 3, 5) for k1 in (3, 31, 33)],
    "short planes": [(r0, k0, r1, 1) for r0 in range(4, 12) for k0 in (2, 3, 17) for r1 in (1, 5, 8, 11, 12)],
    "few channels": [(1, 1, rows, k1) for rows in (8, 9, 12, 16, 30, 64) for k1 in (1, 2, 3, 5, 7, 8)]
    + [(r0, k0, 12, 5) for r0 in (1, 2, 5) for k0 in (1, 3)],
}


@pytest.mark.parametrize("name", SIZES)
def test_every_size(target, name):
    loops, seen = WAYS[name], set()
    for shape in SIZES[name]:
        problem = Problem(shape, np.float32)
        run = loops.make(target, problem.options)
        try:
            problem.check_training(run)
        except AssertionError as error:
            raise AssertionError(f"{shape}: {error}") from error
        seen |= {loops for _, loops, _, _ in run.kernels()}
    assert RUNS[name][0] in seen


BORDERS = [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1]


@pytest.mark.parametrize("store", ["direct", "in place", "streamed"])
@pytest.mark.parametrize("n", BORDERS)
@pytest.mark.parametrize("schedule_name", ["planes", "rows"])
def test_sizes_about_a_block(target, schedule_name, n, store, monkeypatch):
    """Blocks as large as they are: of the columns of rows, and of planes that are not written directly."""
    monkeypatch.setattr(schedule, "TILE_COLUMNS", BLOCK)
    monkeypatch.setattr(schedule, "STREAMED_SHARE", 0.0 if store == "streamed" else math.inf)
    shape = (2, 2, n, 1) if schedule_name == "planes" else (1, 1, 5, n)
    problem = Problem(shape, np.float32)
    run = target(problem.options, schedule_name, parallel=False)
    step = problem.oracle(problem.x, training=True)
    x = problem.x.copy()
    y, _, saved = run.train(x, problem.params, problem.state, out=x if store == "in place" else np.empty_like(x))
    check("y", y, step.y, output(step, problem.dtype), problem.dtype)
    dy = problem.dy.copy()
    out = dy if store == "in place" else np.empty_like(dy)
    dx, dparams, _ = run.backward(dy, problem.x, problem.params, saved, out=out)
    problem.check_gradients(dx, dparams, problem.dy, step)
    assert {streamed for _, _, _, streamed in run.kernels()} == {store == "streamed"}


# --- weights -----------------------------------------------------------------------


@BOTH_LOOPS
def test_weights_of_one_change_no_bit_of_the_state(target, way):
    """As float64 sums: with and without a product by 1 they round alike."""
    problem = Problem(way.shape, np.float64)
    run = way.make(target, problem.options)
    plain = run.train(problem.x, problem.params, problem.state)
    weighted = run.train(problem.x, problem.params, problem.state, weights=np.ones(way.shape))
    for one, two in zip(plain, weighted, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-14, atol=1e-14)


@BOTH_LOOPS
def test_what_has_no_weight_may_be_nan(target, way):
    problem = Problem(way.shape, np.float64, weights=True)
    run = way.make(target, problem.options)
    expected = run.train(problem.x, problem.params, problem.state, weights=problem.weights)
    problem.x[problem.weights == 0] = np.nan
    y, new_state, saved = run.train(problem.x, problem.params, problem.state, weights=problem.weights)
    np.testing.assert_allclose(new_state, expected[1], rtol=1e-14)
    np.testing.assert_allclose(saved, expected[2], rtol=1e-14)
    np.testing.assert_array_equal(np.isnan(y), problem.weights == 0)


@BOTH_LOOPS
def test_a_statistic_without_weight_keeps_its_state(target, way):
    for options in ({}, {"renorm": True}):
        problem = Problem(way.shape, np.float64, weights=True, **options)
        problem.weights[:, 1] = 0
        kept = np.zeros((way.shape[1], way.shape[3]), bool)
        kept[1] = True
        run = way.make(target, problem.options)
        _, new_state, _ = run.train(problem.x, problem.params, problem.state, weights=problem.weights)
        np.testing.assert_array_equal(new_state[:, kept.ravel()], problem.state[:, kept.ravel()])
        assert (new_state != problem.state)[:, ~kept.ravel()].all()


# --- memory --------------------------------------------------------------------------


def strided(x):
    """The same values with gaps, backwards, in a larger array of other values."""
    wide = np.full([2 * n for n in x.shape], 77, x.dtype)
    wide[::2, ::2, ::2, ::2] = x[::-1, :, ::-1]
    return wide[::2, ::2, ::2, ::2][::-1, :, ::-1]


@BOTH_LOOPS
def test_strided_arrays(target, way):
    problem = Problem(way.shape, np.float32, residual=True, activation="relu")
    problem.x, problem.dy, problem.residual = map(strided, (problem.x, problem.dy, problem.residual))
    problem.check_training(way.make(target, problem.options))


@BOTH_LOOPS
@pytest.mark.parametrize("share", [0.0, math.inf], ids=["beyond the cache", "in the cache"])
def test_strided_output_leaves_the_gaps_alone(target, way, share, monkeypatch):
    """It is never streamed: a line of memory would have neighbours in it."""
    monkeypatch.setattr(schedule, "STREAMED_SHARE", share)
    problem = Problem(way.shape, np.float32)
    run = way.make(target, problem.options)
    out = strided(np.zeros(way.shape, np.float32))
    y, _, _ = run.train(problem.x, problem.params, problem.state, out=out)
    assert y is out
    assert not any(streamed for _, _, _, streamed in run.kernels())
    expected, _, _ = run.train(problem.x, problem.params, problem.state)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    everything = out.base
    while everything.base is not None:
        everything = everything.base
    assert (everything == 77).sum() == everything.size - out.size


@EVERY_WAY_AND_DTYPE
def test_in_place(target, way, dtype):
    problem = Problem(way.shape, dtype)
    run = way.make(target, problem.options)
    y, new_state, saved = run.train(problem.x, problem.params, problem.state)
    x = problem.x.copy()
    found = run.train(x, problem.params, problem.state, out=x)
    assert found[0] is x
    assert [bits(a) for a in found] == [bits(a) for a in (y, new_state, saved)]
    dx, dparams, _ = run.backward(problem.dy, problem.x, problem.params, saved)
    dy = problem.dy.copy()
    found = run.backward(dy, problem.x, problem.params, saved, out=dy)
    assert found[0] is dy
    assert [bits(a) for a in found[:2]] == [bits(dx), bits(dparams)]
    y = run.infer(problem.x, problem.params, problem.state)
    x = problem.x.copy()
    assert bits(run.infer(x, problem.params, problem.state, out=x)) == bits(y)
    assert bits(x) == bits(y)


@EVERY_WAY
def test_in_the_place_of_the_residual(target, way):
    problem = Problem(way.shape, np.float32, residual=True, activation="relu")
    run = way.make(target, problem.options)
    expected = run.train(problem.x, problem.params, problem.state, **problem.operands)
    residual = problem.residual.copy()
    found = run.train(problem.x, problem.params, problem.state, residual=residual, out=residual)
    assert found[0] is residual
    assert [bits(a) for a in found] == [bits(a) for a in expected]


# --- results that bypass the caches -----------------------------------------------------------

CANARY = 77
LINE = 64


def between_canaries(size, dtype, offset):
    """An array of memory that begins `offset` elements after the start of a line, and all the memory around it."""
    dtype = np.dtype(dtype)
    memory = np.zeros(size * dtype.itemsize + 4 * LINE, np.uint8)
    lines = -memory.ctypes.data % LINE
    around = memory[lines : lines + (len(memory) - lines) // dtype.itemsize * dtype.itemsize].view(dtype)
    around[...] = CANARY
    first = LINE // dtype.itemsize + offset
    return around[first : first + size], around


def offsets(dtype):
    return range(LINE // np.dtype(dtype).itemsize)


@EVERY_DTYPE
@pytest.mark.parametrize("mode", ["BUFFERED", "STREAMED"])
def test_a_block_is_written_exactly(dtype, mode):
    """At every place in a line of memory, and not a byte beside it."""

    @numba.njit
    def copy(source, target, mode):
        copy_block(source, target, mode)

    carrier, mode = dtypes.carrier(np.dtype(dtype)), getattr(memory, mode)
    for size in [*range(1, 201), BLOCK - 1, BLOCK]:
        source = np.arange(1, size + 1).astype(dtype)
        for offset in offsets(dtype):
            target, around = between_canaries(size, dtype, offset)
            copy(source.view(carrier), target.view(carrier), mode)
            assert bits(target) == bits(source), (size, offset)
            assert (around == CANARY).sum() == around.size - size + (source == CANARY).sum(), (size, offset)


@EVERY_WAY_AND_DTYPE
def test_streamed_results_are_the_same_and_have_their_place(target, way, dtype, monkeypatch):
    problem = Problem(way.shape, dtype)
    expected = all_results(way.make(target, problem.options), problem)
    monkeypatch.setattr(schedule, "STREAMED_SHARE", 0.0)
    run, size = way.make(target, problem.options), problem.x.size
    for offset in offsets(dtype):
        (y, y_around), (dx, dx_around) = (between_canaries(size, dtype, offset) for _ in range(2))
        found = all_results(run, problem, y.reshape(way.shape), dx.reshape(way.shape))
        assert found == expected
        for result, around in ((y, y_around), (dx, dx_around)):
            outside = around.size - size
            assert (around == CANARY).sum() == outside + (result == CANARY).sum(), offset
    assert {streamed for _, _, _, streamed in run.kernels()} == {True}


@pytest.mark.parametrize("way", [PLANES, ROWS, SHORT_PLANES], ids=["planes", "rows", "short planes"])
def test_all_outputs_of_a_step_are_streamed(target, way, monkeypatch):
    """The gradient of the residual beside that of the input; inference; in place."""
    problem = Problem(way.shape, np.float32, residual=True, activation="relu")
    expected = all_results(way.make(target, problem.options), problem)
    plain = way.make(target, problem.options).infer(problem.x, problem.params, problem.state, residual=problem.residual)
    monkeypatch.setattr(schedule, "STREAMED_SHARE", 0.0)
    run = way.make(target, problem.options)
    assert all_results(run, problem) == expected
    for x, residual, out in (in_place(problem, "x"), in_place(problem, "residual")):
        assert bits(run.infer(x, problem.params, problem.state, residual=residual, out=out)) == bits(plain)
    assert {streamed for _, _, _, streamed in run.kernels()} == {True}


def in_place(problem, name):
    """x and residual, of which one is the output, too."""
    copies = {"x": problem.x.copy(), "residual": problem.residual.copy()}
    return copies["x"], copies["residual"], copies[name]


# --- the same bits ----------------------------------------------------------------------

MIXED_SHAPES = {
    "planes": [(6, 3, 7, 1), (1, 2, 100, 1), (40, 1, 3, 1), (1, 1, 1, 1)],
    "rows": [(6, 3, 7, 5), (1, 1, 100, 17), (40, 1, 1, 3), (2, 2, 29, 17), (1, 1, 2, 33)],
    "short planes": [(6, 3, 7, 1), (40, 5, 3, 1), (4, 40, 12, 1)],
    "few channels": [(6, 3, 8, 5), (1, 1, 100, 3), (2, 2, 30, 7)],
}


def all_results(run, problem, out=None, gradient_out=None):
    y, new_state, saved = run.train(problem.x, problem.params, problem.state, out=out, **problem.operands)
    gradients = run.backward(problem.dy, problem.x, problem.params, saved, out=gradient_out, **problem.operands)
    return [bits(r) for r in (y, new_state, saved, *gradients)]


# One pass, parallel.
TWICE = [(False, False), (False, True)]
ONCE = [(True, False), (True, True)]
# A choice, in which every dtype and all loops are: each is two kernels that take seconds to compile.
SAME_BITS = {
    "planes": ("planes", np.float32, {}, TWICE + ONCE),
    "rows": ("rows", np.float32, {}, TWICE),
    "short planes": ("short planes", np.float32, {}, TWICE + ONCE),
    "few channels": ("few channels", np.float32, {}, TWICE + ONCE),
    "rows, float16": ("rows", np.float16, {}, TWICE),
    "rows with residual and relu, bfloat16": ("rows", bfloat16, {"residual": True, "activation": "relu"}, TWICE),
    "planes with operands, float64": ("planes", np.float64, {"weights": True, "adjustment": True}, ONCE),
}


@pytest.mark.parametrize(("name", "dtype", "operands", "modes"), SAME_BITS.values(), ids=SAME_BITS)
def test_serial_and_parallel_one_pass_and_two_give_the_same_bits(target, name, dtype, operands, modes):
    for shape in MIXED_SHAPES[name]:
        problem = Problem(shape, dtype, **operands)
        runs = [target(problem.options, WAYS[name].schedule, parallel, one_pass) for one_pass, parallel in modes]
        first, *others = (all_results(run, problem) for run in runs)
        assert all(other == first for other in others), shape


@pytest.mark.parametrize("name", ["planes", "rows"])
def test_every_number_of_threads_gives_the_same_bits(target, name):
    if thread_limit() < 2:
        pytest.skip("this machine, or NBBN_NUM_THREADS, allows one thread only")
    previous = numba.get_num_threads()
    try:
        for shape in MIXED_SHAPES[name]:
            problem = Problem(shape, np.float32)
            found = set()
            for threads in range(1, thread_limit() + 1):
                numba.set_num_threads(threads)
                found.add(tuple(all_results(target(problem.options, name, parallel=True), problem)))
            assert len(found) == 1, shape
    finally:
        numba.set_num_threads(previous)


FINGERPRINT = """
import numpy as np, nbbn
x = np.random.default_rng(0).normal(3, 1, size=(64, 3, 40, 40)).astype(np.float32)
digest = ""
for axis, shape in ((1, x.shape), (-1, (64, 40, 40, 3))):
    layer = nbbn.BatchNormalization(axis=axis, momentum=0.5)
    y, pullback = layer.vjp(x.reshape(shape), training=True)
    digest += f"{hash(tuple(a.tobytes() for a in (y, *pullback(y)[:3], *layer.weights)))} "
print(digest)
"""


def test_nbbn_num_threads_changes_no_bit():
    """Large enough for several chunks of the usual size, of planes and of few channels; four threads on any machine."""
    options = {"NUMBA_NUM_THREADS": "4", "PYTHONHASHSEED": "0"}
    found = {check_process(FINGERPRINT, NBBN_NUM_THREADS=n, timeout=120, **options) for n in ("1", "2", "4")}
    assert len(found) == 1


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(6, 3, 7, 1), (1, 1, 100, 1), (40, 1, 3, 1), (6, 3, 8, 5), (9, 40, 3, 1)], ids=str)
def test_schedules_agree(target, shape, residual, monkeypatch):
    """Other sums, in another order: float64 rounding in the statistics, half a unit in y."""
    problem = Problem(shape, np.float32, residual=residual, activation="relu" if residual else None)
    found = {}
    for name, folded in [("planes", 0), ("rows", 0), ("rows", math.inf)]:
        monkeypatch.setattr(schedule, "FOLDED_ELEMENTS", folded)
        if name == "planes" and shape[3] > 1:
            continue
        run = target(problem.options, name, parallel=False)
        found[name, folded] = run.train(problem.x, problem.params, problem.state, **problem.operands)
    first, *others = found.values()
    for other in others:
        np.testing.assert_allclose(first[0], other[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(first[2], other[2], rtol=1e-14, atol=1e-14)


def test_repeated_calls_give_the_same_bits(target):
    problem = Problem(ROWS.shape, np.float32)
    run = target(problem.options, "rows", parallel=True)
    assert len({tuple(all_results(run, problem)) for _ in range(5)}) == 1


# --- 16-bit floats -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
def test_every_16_bit_value(scalars, dtype):
    check_every_value(scalars(HALVES[dtype]))


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_to_16_bits(scalars, dtype):
    check_rounding(scalars(HALVES[dtype]))


WITHOUT_F16C = """
from conversions import DTYPES, check_every_value, check_rounding
from nbbn.kernels.cpu import scalars
from targets import CpuScalars
assert not scalars.HALF_INSTRUCTIONS
for dtype in DTYPES.values():
    check_every_value(CpuScalars(dtype))
    check_rounding(CpuScalars(dtype))
import numpy as np, nbbn
x = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float16)
print(nbbn.BatchNormalization()(x, training=True).tobytes().hex())
"""


@pytest.mark.skipif(not HALF_INSTRUCTIONS, reason="this processor has no F16C: the tests above are this one")
def test_without_f16c():
    """A processor without the half instructions: integer code, where LLVM's would call what is not there."""
    printed = check_process(WITHOUT_F16C, NUMBA_CPU_NAME="generic")
    x = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float16)
    y = np.frombuffer(bytes.fromhex(printed), np.float16).reshape(x.shape)
    exact = (x - x.mean(0, np.float64)) / np.sqrt(x.var(0, np.float64) + 1e-3)
    np.testing.assert_allclose(y, exact, rtol=2**-11, atol=2**-14)  # half a unit


# --- machine code ------------------------------------------------------------------------------

PACKED = """
import re
import numpy as np
from targets import Cpu
for schedule, shape in (("planes", (4, 3, 64, 1)), ("rows", (1, 1, 64, 70))):
    run = Cpu({"axis": (1, 3)}, schedule, parallel=False)
    x, state = np.ones(shape, np.float32), np.ones((2, shape[1] * shape[3]), np.float32)
    run.backward(x, x, state, run.train(x, state, state)[2])
    run.infer(x, state, state)
    for plan in run.dispatcher._plans.values():
        (text,) = plan.kernel(False).inspect_asm().values()
        found = set(re.findall(r"\\bv(mul|add|sub|fmadd)\\d*(p[sd])\\b.*%[yz]mm", text))
        print(schedule, plan.step, *sorted({f"{name}{kind}" for name, kind in found}))
"""


def _has_avx2():
    from llvmlite import binding

    return platform.machine().lower() in ("x86_64", "amd64") and binding.get_host_cpu_features().get("avx2", False)


@pytest.mark.skipif(not _has_avx2(), reason="the names of packed instructions are those of AVX2")
def test_loops_are_vectorized():
    """Arithmetic on elements is packed float32, and sums are packed float64."""
    lines = check_process(PACKED, NBBN_CACHE_DIR="", timeout=120).splitlines()
    assert len(lines) == 6
    for line in lines:
        _, step, *found = line.split()
        assert {"mulps", "subps", "addps"} <= set(found), line
        assert step == "infer" or {"fmaddpd", "subpd"} <= set(found), line
