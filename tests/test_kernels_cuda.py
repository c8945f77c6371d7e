"""What is about a GPU's schedules: sums in float32, the width of an access, chunks, families, counters, copies."""

import math

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tests.oracle import agreement
from tests.oracle.contract import GROUPED, WAYS, Problem, all_results, bits, small
from tests.oracle.targets import TARGETS

if "cuda" not in TARGETS:
    pytest.skip("neither a GPU nor Numba's simulator of one (NUMBA_ENABLE_CUDASIM=1)", allow_module_level=True)

from nbbn.arrays import numba_cuda
from nbbn.arrays.gpu import device_place
from nbbn.engine.base import Operands
from nbbn.engine.cuda.schedule import Thresholds, choose
from nbbn.kernels import channel
from nbbn.kernels.cuda.tasks import divide, division
from tests.oracle.targets_cuda import Cuda, DeviceMemory, to_host

WAYS_ON_GPU = pytest.mark.parametrize("way", WAYS["cuda"].values(), ids=WAYS["cuda"])
FLOAT32 = np.finfo(np.float32).eps


def schedule_of(run):
    """Of the one step that has run."""
    (schedule,) = run.schedules()
    return schedule


# --- sums in float32 -----------------------------------------------------------------------


class Float32Terms(agreement.Terms):
    """Bounds for sums of 16 elements in float32, each thread's about a value of its own, that are added up in float64.

    A sum of 16 squares of rounded differences is off by 9 roundings of float32 at most, relative to squares about that
    value: which the distance of the farthest value counts in units of the deviation. FEW is more than 9.
    """

    def __init__(self, step, dtype):
        super().__init__(step, dtype)
        distance = 0.0 if step.frozen else float(np.max(step.x_hat**2, initial=0, where=step.w > 0))
        self.sum_share = FLOAT32 / np.finfo(agreement.state_dtype(dtype)).eps
        self.unit = agreement.FEW * FLOAT32 * (1 + distance)


class Float32Problem(Problem):
    def check_statistics(self, saved, step):
        terms = Float32Terms(step, np.float32)
        expected = np.broadcast_to(step.mean, step.W.shape), np.broadcast_to(1 / step.sigma, step.W.shape)
        scale = np.abs(expected[0]).max() + step.sigma.max()
        m2 = step.W * step.var
        np.testing.assert_allclose(saved[channel.BATCH_MEAN], expected[0].ravel(), rtol=0, atol=terms.unit * scale)
        np.testing.assert_allclose(saved[channel.RSTD], expected[1].ravel(), rtol=terms.unit)
        np.testing.assert_allclose(saved[channel.M2], m2.ravel(), rtol=terms.unit)


@pytest.mark.parametrize("dtype", [np.float16, bfloat16, np.float32], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("name", ["wide planes", "short planes", "rows", "wide rows"])
def test_sums_in_float32(name, dtype, monkeypatch):
    way = WAYS["cuda"][name]
    monkeypatch.setattr(agreement, "Terms", Float32Terms)
    problem = Float32Problem(way.shape, dtype)
    problem.check_training(way.make(Cuda, problem.options, sums="float32"))


@pytest.mark.parametrize("operands", [{"weights": True}, {"adjustment": True}], ids=str)
def test_sums_in_float32_with_operands(operands, monkeypatch):
    monkeypatch.setattr(agreement, "Terms", Float32Terms)
    for way in (WAYS["cuda"]["short planes"], WAYS["cuda"]["rows"]):
        problem = Float32Problem(way.shape, np.float32, **operands)
        problem.check_training(way.make(Cuda, problem.options, sums="float32"))


@pytest.mark.parametrize("shape", [(1, 1, 1500, 1), (300, 2, 3, 1), (1, 1, 400, 3)], ids=["planes", "short", "rows"])
@pytest.mark.parametrize("first", [None, 0.0, 2e4], ids=["data", "zero", "outlier"])
def test_a_large_mean_keeps_the_variance(shape, first):
    """1e4 deviations from 0, in float32, to 1e-5: whatever value a thread's sums are about.

    What is far away is a part of the variance, and a larger one than the rounding of the other values' distances to it.
    """
    x = np.random.default_rng(0).normal(1e4, 1, shape).astype(np.float32)
    if first is not None:
        x[0, :, 0] = first
    count, mean, m2, _ = small(Cuda, {"axis": (1, 3)}, sums="float32").reduce(x)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 2)).ravel(), rtol=1e-7)
    np.testing.assert_allclose(m2 / count, exact.var((0, 2)).ravel(), rtol=1e-5)


@pytest.mark.parametrize("light", [0.0, 1e-10])
def test_a_large_mean_keeps_the_variance_without_the_first_value(light):
    """A thread's sums are about a value that has half of the greatest weight at least."""
    x = np.random.default_rng(0).normal(1e4, 1, (1, 1, 400, 1)).astype(np.float32)
    weights = np.ones(x.shape, np.float32)
    weights[:, :, ::3], x[:, :, ::3] = light, 0
    count, _, m2, _ = small(Cuda, {"axis": (1, 3)}, sums="float32").reduce(x, weights)
    exact, w = x.astype(np.float64), weights.astype(np.float64)
    mean = np.average(exact, weights=w)
    np.testing.assert_allclose(count, w.sum(), rtol=1e-7)
    np.testing.assert_allclose(m2 / count, np.average((exact - mean) ** 2, weights=w), rtol=1e-5)


# --- schedules -----------------------------------------------------------------------------


def test_the_ways_are_wide_and_cut():
    """Or the tests of all targets would test little here."""
    found = {}
    for name, way in WAYS["cuda"].items():
        run = way.make(Cuda, {"axis": (1, 3)})
        problem = Problem(way.shape, np.float32)
        run.train(problem.x, problem.params, problem.state)
        found[name] = schedule_of(run)
    assert {name for name, s in found.items() if s.width == 4} == {"wide planes", "wide rows"} | {
        "short planes",
        "short planes, two passes",
    }
    assert {name for name, s in found.items() if s.width == 1} == {"planes", "rows", "rows, two passes"}
    assert all((s.reduce.chunks == 1) == s.one_launch for s in found.values())
    assert all(s.apply.chunks * s.apply.tiles > 1 for s in found.values())
    assert any(s.reduce.groups > 1 for s in found.values())


@pytest.mark.parametrize("shape", [(1, 1, 150, 1), (9, 2, 6, 1), (2, 2, 5, 7), (1, 1, 20, 24)], ids=str)
def test_larger_blocks(shape):
    """Whose sums are trees of several levels, and whose rows are longer."""
    for one_launch in (True, False):
        problem = Problem(shape, np.float32)
        problem.check_training(small(Cuda, problem.options, one_pass=one_launch, threads=32, columns=4))


@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 2}], ids=["plain", "groups of a batch"])
@pytest.mark.parametrize("group", [1, 3, 4, 16, 100])
@pytest.mark.parametrize("shape", [(8, 2, 50, 1), (8, 2, 2, 9), (40, 2, 3, 3)], ids=["planes", "rows", "many rows"])
def test_chunks_are_added_up_in_groups(shape, group, options):
    """By the last block of each, and then the groups by the last one of a family; whatever a group's size is."""
    problem = Problem(shape, np.float32, **options)
    run = small(Cuda, problem.options, one_pass=False, blocks=200, max_chunks=200, vectors=1, group=group)
    problem.check_training(run)
    for schedule in run.schedules():
        assert schedule.reduce.chunks >= 2
        assert schedule.reduce.groups == -(-schedule.reduce.chunks // group)


@pytest.mark.parametrize("operands", [{}, {"weights": True, "adjustment": True}], ids=["plain", "operands"])
@pytest.mark.parametrize(
    "shape", [(6, 2, 8, 1), (2, 2, 20, 1), (6, 2, 2, 3), (1, 1, 5, 8)], ids=["short planes", "planes", "rows", "wide"]
)
def test_one_launch_and_two_agree(shape, operands):
    """Other sums, in another order: float64 rounding in the statistics, a few units in float32."""
    problem = Problem(shape, np.float32, **operands)
    found = []
    for one_launch in (True, False):
        run = small(Cuda, problem.options, one_pass=one_launch)
        y, new_state, saved = run.train(problem.x, problem.params, problem.state, **problem.operands)
        gradients = run.backward(problem.dy, problem.x, saved, **problem.operands)
        assert [one for _, _, one, _ in run.kernels()] == [one_launch] * 2
        found.append((saved, y, new_state, *gradients))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-13, atol=1e-13)
    for one, two in zip(found[0][1:], found[1][1:], strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "families"),
    [("planes", 2), ("rows", 2), ("tiles that are not of one group", 1), ("one tile per group", 1)],
)
def test_families(name, families):
    """Tiles that have the same channels in different groups: a block, or the last of several, finishes them together.

    Where tiles have parts of two groups, all of them are one family, and one launch is not possible.
    """
    way = GROUPED["cuda"][name]
    problem = Problem(way.shape, np.float32, virtual_batch_size=2)
    run = small(Cuda, problem.options, one_pass=True)
    problem.check_training(run)
    found = run.schedules()
    assert {s.reduce.families for s in found} == {families}
    assert {s.one_launch for s in found} == {name != "tiles that are not of one group"}


@pytest.mark.parametrize("one_launch", [True, False])
@pytest.mark.parametrize("renorm", [True, False])
@pytest.mark.parametrize("shape", [(20, 2, 6, 1), (20, 1, 1, 8)], ids=["planes", "rows"])
def test_more_groups_than_a_block_has_threads(shape, renorm, one_launch):
    """A thread has one statistic after the other, and one of them their channel."""
    problem = Problem(shape, np.float32, virtual_batch_size=2, renorm=renorm)
    run = small(Cuda, problem.options, one_pass=one_launch, threads=4)
    problem.check_training(run)
    assert {s.one_launch for s in run.schedules()} == {one_launch}


def test_a_division_is_a_product_and_a_shift():
    """Of numbers below 2^31; near multiples of the divisor, where it would go wrong first."""
    rng, most, plain = np.random.default_rng(0), (1 << 31) - 1, getattr(divide, "py_func", divide)
    powers = [(1 << bits) + d for bits in range(1, 31) for d in (-1, 0, 1)]
    for divisor in [*powers, most, *rng.integers(1, most, 500).tolist(), *range(1, 100)]:
        near = [k * divisor + d for k in (0, 1, most // divisor) for d in (-1, 0, 1)]
        for number in [*near, most, *rng.integers(0, most, 20).tolist()]:
            if 0 <= number <= most:
                assert plain(number, divisor, division(divisor)) == divmod(number, divisor)


# --- memory --------------------------------------------------------------------------------


def at_offset(x, elements):
    """The same values, `elements` elements beyond an aligned address."""
    memory = np.zeros(x.size + 16, x.dtype)
    first = -memory.ctypes.data % 16 // x.itemsize + elements
    found = memory[first : first + x.size].reshape(x.shape)
    found[...] = x
    return found


@pytest.mark.parametrize(("elements", "width"), [(0, 4), (1, 1), (2, 2), (3, 1), (4, 4)])
@pytest.mark.parametrize("shape", [(2, 2, 8, 1), (1, 1, 3, 8)], ids=["planes", "rows"])
def test_what_is_not_aligned_is_read_in_smaller_pieces(shape, elements, width):
    problem = Problem(shape, np.float32)
    problem.x, problem.dy = at_offset(problem.x, 0), at_offset(problem.dy, elements)
    run = small(Cuda, problem.options)
    problem.check_training(run)
    train, backward = (schedule.width for schedule in run.schedules())
    assert (train, backward) == (4, width)


@pytest.mark.parametrize(
    ("part", "width"),
    [(np.s_[:, :, :, :8], 4), (np.s_[:, :, :, 1:9], 1), (np.s_[:, :, :, 2:10], 2), (np.s_[:, :, :, ::2], 1)],
    ids=["aligned", "odd", "even", "every other"],
)
@pytest.mark.parametrize("pitch", [16, 18], ids=["aligned rows", "even rows"])
def test_parts_of_rows(part, width, pitch):
    """Every row begins where the ones before it leave it."""
    problem = Problem((1, 1, 3, 8), np.float32)
    rows = at_offset(np.zeros((1, 1, 3, pitch), np.float32), 0)
    target = rows[:, :, :, :16][part]
    target[...] = problem.x
    problem.x = target
    run = small(Cuda, problem.options)
    run.reduce(problem.x)
    assert schedule_of(run).width == min(width, {16: 4, 18: 2}[pitch])
    problem.check_training(run)


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"virtual_batch_size": 2}], ids=str)
def test_five_runs_of_dimensions_are_copied(options):
    """Reduced, kept, reduced, kept, reduced: no canonical view; strided arrays, and operands, too."""
    shape = (4, 2, 2, 3, 2)
    problem = Problem(shape, np.float32, weights=True, adjustment=not options, residual=True, **options)
    run = small(Cuda, problem.options)
    problem.check_training(run)
    assert any(plan.copied is not None for plan in run.engine.plans.values())


def test_five_runs_of_dimensions_of_inference_in_place():
    problem = Problem((2, 2, 2, 3, 2), np.float32)
    run = small(Cuda, problem.options)
    _, y = problem.check_output_of_inference(run)
    x = problem.x.copy()
    assert bits(run.infer(x, problem.params, problem.state, out=x)) == bits(y) == bits(x)


# --- what the launches of a step leave behind ------------------------------------------------


@WAYS_ON_GPU
def test_memory_that_a_step_gets_may_hold_anything(way, monkeypatch):
    """Blocks count themselves, and the counters belong to the call: what it gets is made zero, each time."""
    problem = Problem(way.shape, np.float32)
    expected = all_results(way.twice().make(Cuda, problem.options), problem)

    def full(shape, dtype, device):
        memory = np.full(math.prod(shape) * dtype.itemsize, 0x7F, np.uint8)
        return numba_cuda.from_host(memory.view(dtype).reshape(shape), device)

    monkeypatch.setattr(numba_cuda, "empty", full)
    assert all_results(way.twice().make(Cuda, problem.options), problem) == expected


@pytest.mark.parametrize("training", [True, False])
def test_a_gradient_gets_the_parameters_of_its_step(training):
    """Also if those of the layer, which are changed in their place, are others by then."""
    problem = Problem(WAYS["cuda"]["rows"].shape, np.float32, residual=True, activation="relu")
    run, memory = small(Cuda, problem.options), DeviceMemory()
    x, dy, params, state, residual = map(
        memory.view, (problem.x, problem.dy, problem.params, problem.state, problem.residual)
    )
    operands = Operands(residual)
    saved = run.dispatcher.train(x, params, state, operands)[2] if training else run.dispatcher.freeze(params, state)
    expected = run.dispatcher.backward(dy, x, saved, operands, training=training)
    device_place(numba_cuda, 0).write(params, memory.view(np.full_like(problem.params, 7)), params.shape, (0, 1))
    assert (to_host(params) == 7).all()
    found = run.dispatcher.backward(dy, x, saved, operands, training=training)
    assert [bits(to_host(a)) for a in found[:2]] == [bits(to_host(a)) for a in expected[:2]]
    np.testing.assert_array_equal(to_host(saved)[[channel.USED_GAMMA, channel.USED_BETA]], problem.params)


# --- one launch or two --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("families", "elements", "one"),
    [
        (1, 8192, True),
        (1, 16384, False),
        (64, 16384, True),
        (64, 32768, False),
        (128, 65536, True),
        (512, 65536, True),
        (512, 131072, False),
    ],
)
def test_one_launch_where_no_multiprocessor_waits_long_for_another(families, elements, one):
    schedule = choose((1, families, elements, 1), 1, 1, 4, [], Thresholds())
    assert schedule.one_launch == one
    assert choose((1, families, elements, 1), 1, 1, 4, [], Thresholds(), one_launch=not one).one_launch != one
