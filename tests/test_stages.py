"""The five stages one by one, reduce, finish, apply, reduce_gradient and apply_gradient, with an exchange between them:
the same results as the whole steps, and of several parts of a batch those of all of it."""

import copy
import functools
import itertools
import re

import numpy as np
import pytest
from ml_dtypes import bfloat16

import nbbn
from nbbn.arrays import place_of
from nbbn.core import rules
from nbbn.kernels import channel
from tests.oracle.compiled import interpreted_unless
from tests.oracle.contract import (
    BOTH_LOOPS,
    CLIPS,
    EVERY_WAY,
    GROUPED,
    OPTIONS,
    PLANES,
    PLANES_COMPILED,
    ROWS_COMPILED,
    THRESHOLDS,
    WAYS,
    Problem,
    all_results,
    bits,
    check_skipping,
    check_strided_output,
    over_ways,
    over_ways_and_dtypes,
    strided,
)
from tests.oracle.targets import TARGETS


@pytest.fixture(params=TARGETS)
def target(request):
    return TARGETS[request.param][0]


class Passing:
    """An exchange that returns what it gets, and notes that it was asked."""

    def __init__(self):
        self.calls = []

    def merge(self, moments):
        return self._pass("merge", moments)

    def add(self, sums):
        return self._pass("add", sums)

    def _pass(self, name, array):
        assert array.dtype == np.float64
        self.calls.append((name, array.shape, place_of(array).name))
        return array

    @property
    def names(self):
        return [name for name, _, _ in self.calls]


STAGES = ["reduce", "apply", "reduce_gradient", "apply_gradient"]  # that have elements


def check_stages(target, way, problem, same_bits=True):
    """Fail unless the stages agree with the oracle, and are what runs; and with the whole steps, if to the bit.

    On a CPU one pass has the bits of two, and test_kernels.py compiles it. A GPU adds in another order in one launch.
    """
    exchange = Passing()
    run = way.make(target, problem.options, exchange=exchange)
    problem.check_training(run)
    assert exchange.names == ["merge", "add"]
    assert [step for step, _, _, _ in run.kernels()] == STAGES
    if same_bits:
        whole = (way if target.kind == "cpu" else way.twice()).make(target, problem.options)
        assert all_results(run, problem) == all_results(whole, problem)
        assert [step for step, _, _, _ in whole.kernels()] == ["train", "backward"]


# --- the stages and the whole steps ------------------------------------------------------


# On a CPU every pair is six kernels. Stages are the whole steps' loops, which test_kernels.py sees with every dtype: so
# all loops here are with float32, and each dtype is with planes or rows.
PAIRS = [
    *((name, np.float32) for name in WAYS["cpu"]),
    ("planes", np.float16),
    ("rows", bfloat16),
    *((name, np.float64) for name in ("planes", "rows")),
]


@over_ways_and_dtypes(cpu=PAIRS)
def test_every_dtype(target, way, dtype):
    check_stages(target, way, Problem(way.shape, dtype))


@BOTH_LOOPS
@pytest.mark.parametrize("mode", OPTIONS)
def test_options(target, way, mode):
    """Ghost batches, renorm with clips, cumulative averages among them."""
    check_stages(target, way, Problem(way.shape, np.float32, **OPTIONS[mode]))


@over_ways(ways=GROUPED)
def test_virtual_batches_in_every_way(target, way):
    check_stages(target, way, Problem(way.shape, np.float32, virtual_batch_size=3))


@EVERY_WAY
def test_residual_and_relu(target, way):
    check_stages(target, way, Problem(way.shape, np.float32, residual=True, activation="relu"))


@BOTH_LOOPS
@pytest.mark.parametrize(
    ("weights", "adjustment", "dtype"),
    [(True, False, np.float64), (False, True, np.float64)],
    ids=["weights", "adjustment"],
)
def test_operands(target, way, weights, adjustment, dtype):
    interpreted_unless(target.kind != "cpu" or weights or way.schedule == "rows")
    check_stages(target, way, Problem(way.shape, dtype, weights, adjustment))


@ROWS_COMPILED
def test_both_operands(target, way):
    check_stages(target, way, Problem(way.shape, bfloat16, True, True))


@over_ways("short planes", "few channels")
def test_operands_of_rows_that_are_longer_without_them(target, way):
    """On a CPU, where a stage that has no operand beside its input may take the values in another order."""
    for weights, dtype in ((False, np.float64), (True, bfloat16)):  # kernels of the tests above
        problem = Problem(way.shape, dtype, weights, adjustment=True)
        check_stages(target, way, problem, same_bits=weights or target.kind == "cuda")


@PLANES_COMPILED
def test_all_that_can_stand_beside_an_input(target, way):
    """And renorm, which is the middle stage's alone."""
    options = {"activation": "relu", "renorm": True, "renorm_clipping": CLIPS}
    check_stages(target, way, Problem(way.shape, np.float32, True, True, True, **options))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, which computes in the simulator
@over_ways("planes")
def test_what_is_not_finite_can_be_skipped(target, way):
    check_skipping(target, way, np.nan, exchange=Passing())


# --- memory ------------------------------------------------------------------------------


@ROWS_COMPILED
def test_strided_arrays(target, way):
    problem = Problem(way.shape, np.float32, residual=True, activation="relu")
    problem.x, problem.dy, problem.residual = map(strided, (problem.x, problem.dy, problem.residual))
    check_stages(target, way, problem)


@BOTH_LOOPS
def test_strided_output_leaves_the_gaps_alone(target, way):
    problem = Problem(way.shape, np.float32)
    expected, _, _ = way.make(target, problem.options).train(problem.x, problem.params, problem.state)
    check_strided_output(way.make(target, problem.options, exchange=Passing()), problem, expected)


@BOTH_LOOPS
def test_in_place(target, way):
    """The output in the place of the input, or of the residual; dx in that of dy."""
    problem = Problem(way.shape, np.float32, residual=True, activation="relu")
    run = way.make(target, problem.options, exchange=Passing())
    expected = all_results(run, problem)
    for place in ("x", "residual"):
        given = {"x": problem.x.copy(), "residual": problem.residual.copy()}
        found = run.train(**given, params=problem.params, state=problem.state, out=given[place])
        assert found[0] is given[place]
        assert [bits(a) for a in found] == expected[:3]
    dy, saved = problem.dy.copy(), found[2]
    found = run.backward(dy, problem.x, saved, out=dy, residual=problem.residual)
    assert found[0] is dy
    assert [bits(a) for a in found] == expected[3:]


def test_five_runs_of_dimensions_are_copied(target):
    """Reduced, kept, reduced, kept, reduced: no canonical view."""
    problem = Problem((4, 2, 2, 3, 2), np.float32, residual=True, activation="relu")
    exchange = Passing()
    run = target(problem.options, thresholds=THRESHOLDS[target.kind], exchange=exchange)
    problem.check_training(run)
    assert exchange.names == ["merge", "add"]
    copied = [plan.copied is not None for plan in run.engine.plans.values()]
    assert copied == [True, False] * 4


# --- stage by stage ----------------------------------------------------------------------


@BOTH_LOOPS
def test_finish_makes_of_moments_what_the_whole_step_makes(target, way):
    """And of what is saved, which begins with them."""
    for options in ({}, {"renorm": True, "renorm_clipping": CLIPS}, {"virtual_batch_size": 3}, {"momentum": None}):
        problem = Problem(way.shape, np.float32, **options)
        run = (way if target.kind == "cpu" else way.twice()).make(target, problem.options)
        y, new_state, saved = run.train(problem.x, problem.params, problem.state)
        moments = run.reduce(problem.x)
        assert bits(moments) == bits(saved[: channel.MOMENT_ROWS])
        for given in (moments, saved):
            found = run.finish(given, problem.params, problem.state, like=problem.x)
            assert [bits(a) for a in found[:2]] == [bits(new_state), bits(saved)]
        coefficients = found[2]
        assert coefficients.dtype == problem.stored
        groups = saved.shape[1] // problem.params.shape[1]
        if groups == 1:
            mean, scale, shift = coefficients.reshape(3, 1, way.shape[1], 1, way.shape[3])
            np.testing.assert_allclose((problem.x - mean) * scale + shift, y, rtol=1e-6, atol=1e-6)


@BOTH_LOOPS
def test_moments_without_the_groups_of_a_virtual_batch(target, way):
    problem = Problem(way.shape, np.float64, virtual_batch_size=3)
    run = way.make(target, problem.options)
    whole, groups = run.reduce(problem.x, training=False), run.reduce(problem.x)
    assert groups.shape == (4, 2 * whole.shape[1])
    np.testing.assert_allclose(combined(*np.split(groups, 2, axis=1)), whole, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(whole[1], problem.x.mean((0, 2)).ravel(), rtol=1e-12, atol=1e-12)


# --- several parts of a batch ------------------------------------------------------------


def combined(one, other):
    """The moments of two inputs together."""
    return np.array([rules.combine(*a, *b) for a, b in zip(one.T, other.T, strict=True)]).T


TOGETHER = {"merge": combined, "add": np.add}


class Meeting:
    """An exchange of the parts of a batch that come one after the other: at first each leaves what it has, and when all
    have been there, each gets what they have together."""

    def __init__(self):
        self.left = {name: [] for name in TOGETHER}
        self.total = {}

    def merge(self, moments):
        return self._exchange("merge", moments)

    def add(self, sums):
        return self._exchange("add", sums)

    def _exchange(self, name, array):
        place = place_of(array)
        if name in self.total:
            return place.from_host(self.total[name])
        self.left[name].append(place.to_host(array).copy())
        return array

    def together(self, name, calls):
        """The results of the calls when all parts have been there."""
        for call in calls:
            call()
        self.total[name] = functools.reduce(TOGETHER[name], self.left[name])
        return [call() for call in calls]


def part_of(problem, begin, end):
    """The problem with some of its samples, and with what stands beside them, in memory of their own."""
    part = copy.copy(problem)
    for name in ("x", "dy", "residual", "weights"):
        array = getattr(problem, name)
        setattr(part, name, None if array is None else array[begin:end].copy())
    part.adjustment = problem.adjustment and tuple(a[begin:end].copy() for a in problem.adjustment)
    return part


def in_parts(target, way, problem, cuts, **options):
    """Every part's y, new state, saved, dx, dparams and dz, of Dispatchers that meet. cuts: where new parts begin.

    options: those of the parts that are not the problem's.
    """
    meeting, cuts = Meeting(), [0, *cuts, len(problem.x)]
    parts = [part_of(problem, *pair) for pair in itertools.pairwise(cuts)]
    runs = [way.make(target, {**problem.options, **options}, exchange=meeting) for _ in parts]
    forward = meeting.together(
        "merge",
        [
            functools.partial(run.train, p.x, p.params, p.state, **p.operands)
            for run, p in zip(runs, parts, strict=True)
        ],
    )
    backward = meeting.together(
        "add",
        [
            functools.partial(run.backward, p.dy, p.x, saved, **p.operands)
            for run, p, (_, _, saved) in zip(runs, parts, forward, strict=True)
        ],
    )
    return [(*one, *other) for one, other in zip(forward, backward, strict=True)]


def check_parts(found, whole):
    """Fail unless the parts' results are those of all of the batch; the gradients of gamma and beta are their sum."""
    ys, states, saved, dxs, dparams, dzs = zip(*found, strict=True)
    expected = dict(zip(("y", "new state", "saved", "dx", "dparams", "dz"), whole, strict=True))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
    for name, parts in (("y", ys), ("dx", dxs), ("dz", dzs)):
        close(np.concatenate(parts), expected[name], err_msg=name)
    for name, parts in (("new state", states), ("saved", saved)):
        assert len({bits(part) for part in parts}) == 1, f"{name} differs from part to part"
        close(parts[0], expected[name], err_msg=name)
    close(sum(dparams), expected["dparams"], err_msg="dparams")
    assert all(np.abs(part - expected["dparams"]).max() > 1e-3 for part in dparams), "dparams is local"


def whole_batch(target, way, problem, exchange=None):
    """The same of the whole batch, by its stages: the tests above show that this is the whole step."""
    run = way.make(target, problem.options, exchange=exchange or Passing())
    forward = run.train(problem.x, problem.params, problem.state, **problem.operands)
    return (*forward, *run.backward(problem.dy, problem.x, forward[2], **problem.operands))


PARTS = {
    "plain": {},
    "bessel": {"bessel_correction": True},
    "renorm": {"renorm": True, "renorm_clipping": CLIPS},
    "cumulative": {"momentum": None},
    "weights": {"weights": True},
    "adjustment": {"adjustment": True},
    "residual and relu": {"residual": True, "activation": "relu"},
}


@BOTH_LOOPS
@pytest.mark.parametrize("options", PARTS.values(), ids=PARTS)
def test_parts_of_a_batch_have_its_statistics(target, way, options):
    fused = "activation" in options or ("adjustment" in options and way.schedule == "planes")
    interpreted_unless(target.kind != "cpu" or not fused)
    problem = Problem(way.shape, np.float64, **options)
    check_parts(in_parts(target, way, problem, [4]), whole_batch(target, way, problem))


@over_ways("planes")
def test_three_parts(target, way):
    problem = Problem(way.shape, np.float64)
    problem.x[:1] += 100  # means that are far from each other
    check_parts(in_parts(target, way, problem, [1, 3]), whole_batch(target, way, problem))


@BOTH_LOOPS
def test_parts_without_any_weight(target, way):
    """Of all channels, or of one, in one part; and of one in all parts, which keeps its state."""
    problem = Problem(way.shape, np.float64, weights=True)
    problem.weights[:4], problem.weights[:, 1] = 0, 0
    found = in_parts(target, way, problem, [2, 4])
    kept = np.zeros((way.shape[1], way.shape[3]), bool)
    kept[1] = True
    expected = whole_batch(target, way, problem)
    for _, new_state, saved, *_ in found:
        np.testing.assert_array_equal(new_state[:, kept.ravel()], problem.state[:, kept.ravel()], strict=True)
        np.testing.assert_allclose(new_state, expected[1], rtol=1e-12)
        np.testing.assert_allclose(saved, expected[2], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(np.concatenate([part[3] for part in found]), expected[3], rtol=1e-12, atol=1e-12)


@BOTH_LOOPS
def test_parts_of_virtual_batches(target, way):
    """Group by group: sample n is in group n mod G in the parts and in the whole, if all parts are of one size."""
    problem = Problem((2 * way.shape[0], *way.shape[1:]), np.float64, virtual_batch_size=6)
    found = in_parts(target, way, problem, [6], virtual_batch_size=3)
    check_parts(found, whole_batch(target, way, problem))


# --- empty inputs ------------------------------------------------------------------------


EMPTY = {
    "plain": {},
    "renorm": {"renorm": True},
    "cumulative": {"momentum": None},
    "operands": {"weights": True, "adjustment": True, "residual": True, "activation": "relu"},
}


@PLANES_COMPILED
@pytest.mark.parametrize("options", EMPTY.values(), ids=EMPTY)
def test_an_empty_part_takes_part(target, way, options):
    """Whoever has no sample has the same state afterwards, and adds nothing."""
    problem = Problem(way.shape, np.float32, **options)
    alone = whole_batch(target, way, problem)
    empty, other = in_parts(target, way, problem, [0])
    assert [bits(a) for a in other] == [bits(a) for a in alone]
    assert [bits(a) for a in empty[1:3]] == [bits(a) for a in other[1:3]]
    assert empty[0].shape == empty[3].shape == empty[5].shape == (0, *way.shape[1:])
    np.testing.assert_array_equal(empty[4], np.zeros_like(problem.params), strict=True)


@over_ways("planes")
@pytest.mark.parametrize("options", EMPTY.values(), ids=EMPTY)
def test_an_empty_part_is_asked_for_numbers_of_the_usual_shape(target, way, options):
    """Zeros, float64, where the input lies."""
    problem = Problem(way.shape, np.float32, **options)
    calls = []
    for given in (problem, part_of(problem, 0, 0)):
        exchange = Passing()
        all_results(way.make(target, problem.options, exchange=exchange), given)
        calls.append(exchange.calls)
    assert calls[0] == calls[1]
    statistics, rows = problem.params.shape[1], 4 if problem.adjustment else 2
    assert [(name, shape) for name, shape, _ in calls[0]] == [("merge", (4, statistics)), ("add", (rows, statistics))]


@over_ways("planes")
@pytest.mark.parametrize("exchange", [None, Passing()], ids=["without an exchange", "among empty ones"])
@pytest.mark.parametrize("options", EMPTY.values(), ids=EMPTY)
def test_an_empty_input_changes_no_state(target, way, options, exchange):
    problem = part_of(Problem(way.shape, np.float32, **options), 0, 0)
    run = way.make(target, problem.options, exchange=exchange)
    y, new_state, saved = run.train(problem.x, problem.params, problem.state, **problem.operands)
    assert y.shape == problem.x.shape
    np.testing.assert_array_equal(new_state, problem.state, strict=True)
    np.testing.assert_array_equal(saved[: channel.MOMENT_ROWS], 0)
    dx, dparams, dz = run.backward(problem.dy, problem.x, saved, **problem.operands)
    assert dx.shape == dz.shape == problem.x.shape
    np.testing.assert_array_equal(dparams, np.zeros_like(problem.params), strict=True)


# --- what is merged ----------------------------------------------------------------------


class Changing(Passing):
    """An exchange that makes something else of one of its arrays."""

    def __init__(self, name, change):
        super().__init__()
        self.name, self.change = name, change

    def _pass(self, name, array):
        place = place_of(super()._pass(name, array))
        return place.from_host(self.change(place.to_host(array))) if name == self.name else array


@over_ways("planes")
@pytest.mark.parametrize(("name", "message"), [("merge", "coefficients"), ("add", "sums")])
def test_numbers_of_another_shape(target, way, name, message):
    """As of ghost batches of another number."""
    problem = Problem(way.shape, np.float32)
    run = way.make(target, problem.options, exchange=Changing(name, lambda a: np.tile(a, 2)))
    statistics = problem.params.shape[1]
    expected = f"{message} must have shape ({3 if name == 'merge' else 2}, {statistics}); received"
    with pytest.raises(ValueError, match=re.escape(expected)):
        run.backward(problem.dy, problem.x, run.train(problem.x, problem.params, problem.state)[2])


ORDERS = {
    "Fortran": np.asfortranarray,
    "gaps": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "backwards": lambda a: a[::-1].copy()[::-1],
    "float32": lambda a: a.astype(np.float32),
}


@pytest.mark.skipif("cpu" not in TARGETS, reason="is about NumPy arrays")
@pytest.mark.parametrize("name", ["merge", "add"])
@pytest.mark.parametrize("order", ORDERS)
def test_an_exchange_of_numpy_arrays_may_return_any(order, name):
    """Of another order in memory; of float32, from a library that knows no other, which costs the digits."""
    problem, target = Problem(PLANES.shape, np.float32), TARGETS["cpu"][0]
    expected, found = (
        whole_batch(target, PLANES, problem, exchange) for exchange in (Passing(), Changing(name, ORDERS[order]))
    )
    for one, other in zip(found, expected, strict=True):
        if order == "float32":
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
        else:
            assert bits(one) == bits(other)


class Foreign:
    """An array of some other library, as far as its shape goes."""

    shape = (4, 3)


def test_the_middle_stage_takes_arrays_of_numpy():
    """Kernels read their memory as it is: what is no such array would end the process."""
    params, state = np.ones((2, 3)), np.ones((2, 3))
    with pytest.raises(TypeError, match="moments must be a NumPy array; received Foreign"):
        nbbn.Dispatcher(nbbn.Options()).finish(Foreign(), params, state, rank=2, dtype=np.dtype(np.float64))
