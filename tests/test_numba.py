"""nbbn.numba in compiled functions: the Dispatcher's bits, whatever the geometry; errors; Numba's own cache."""

import math
from functools import lru_cache, wraps

import numba
import numpy as np
import pytest
from numba import types

import nbbn
from nbbn import numba as bn
from nbbn.engine.base import Operands, Step
from nbbn.numba import functions, planning
from nbbn.runtime import PLAIN
from tests.helpers.processes import check

pytestmark = pytest.mark.skipif(PLAIN, reason="NUMBA_DISABLE_JIT is set: nothing is compiled")
SERIAL, ANY = nbbn.Force(parallel=False), nbbn.Force()


def array(dtype, rank, layout="A", readonly=False):
    return types.Array(dtype, rank, layout, readonly=readonly)


def only(*signature, **options):
    """numba.njit for one signature, compiled at the first call: all cases go through few functions."""

    def decorate(function):
        dispatcher = numba.njit(**options)(function)

        @lru_cache(maxsize=1)
        def compiled():
            dispatcher.compile(signature)
            dispatcher.disable_compile()
            return dispatcher

        @wraps(function)
        def call(*arguments):
            return compiled()(*arguments)

        call.py_func = function
        return call

    return decorate


X, F = array(types.float32, 3, "C"), array(types.float32, 1, "C")
INT, FLOAT = types.int64, types.float64
SAVED = array(types.float64, 2, "C")


@only(X, F, F, F, F, INT, FLOAT, FLOAT, X)
def dense_train(x, gamma, beta, mean, variance, axis, epsilon, momentum, out):
    return bn.batch_norm_train(x, gamma, beta, mean, variance, axis, epsilon, momentum, out=out)


@only(X, F, F, F, F, INT, FLOAT)
def dense_infer(x, gamma, beta, mean, variance, axis, epsilon):
    return bn.batch_norm_infer(x, gamma, beta, mean, variance, axis=axis, epsilon=epsilon)


@only(X, X, SAVED, INT)
def dense_backward(dy, x, saved, axis):
    return bn.batch_norm_backward(dy, x, saved, axis)


def sizes(rng, rank, most=100_000):
    """A shape of up to so many elements: of each kind of schedule, of one and of several chunks."""
    while True:
        shape = rng.choice([1, 2, 3, 5, 8, 16, 17, 33, 49, 64, 65, 100, 300, 1000, 5000], size=rank)
        if shape.prod() <= most:
            return tuple(int(n) for n in shape)


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def rows(rng, channels, dtype=np.float32):
    return rng.normal(1, 1, (2, channels)).astype(dtype), rng.random((2, channels)).astype(dtype)


@pytest.mark.parametrize("force", [SERIAL, ANY], ids=["serial", "default"])
def test_dense_arrays_have_the_dispatchers_bits(force):
    rng = np.random.default_rng(0)
    for _ in range(150):
        shape, axis = sizes(rng, 3), int(rng.integers(-3, 3))
        epsilon, momentum = float(rng.choice([1e-3, 1e-5])), float(rng.choice([0.0, 0.9, 1.0]))
        x, dy = rng.normal(3, 2, (2, *shape)).astype(np.float32)
        params, state = rows(rng, shape[axis])
        options = nbbn.Options(axis=axis, epsilon=epsilon, momentum=momentum, bessel_correction=False)
        run = nbbn.Dispatcher(options, force)
        y, new_state, saved = run.train(x, params, state)
        own = state.copy()
        assert_same(dense_train(x, *params, *own, axis, epsilon, momentum, np.empty_like(x)), (y, saved))
        assert_same(own, new_state)
        assert_same([dense_infer(x, *params, *state, axis, epsilon)], [run.infer(x, params, state)])
        dx, dparams, _ = run.backward(dy, x, saved, training=True)
        assert_same(dense_backward(dy, x, saved, axis), (dx, *dparams))


S, D = array(types.float64, 4), array(types.float64, 1)


@only(S, D, D, D, D, INT, S)
def strided_train(x, gamma, beta, mean, variance, axis, residual):
    return bn.batch_norm_train(x, gamma, beta, mean, variance, axis, residual=residual, activation="relu")


@only(S, D, D, D, D, INT, S)
def strided_infer(x, gamma, beta, mean, variance, axis, out):
    return bn.batch_norm_infer(x, gamma, beta, mean, variance, axis, out=out)


@only(S, S, SAVED, INT, S)
def strided_backward(dy, x, saved, axis, residual):
    return bn.batch_norm_backward(dy, x, saved, axis, residual=residual, activation="relu")


def with_strides(rng, values):
    """An array with these values that lies in some other way: transposed, reversed, or with gaps."""
    rank, steps = values.ndim, rng.integers(1, 3, size=values.ndim) if rng.integers(2) else [1] * values.ndim
    order, margin = rng.permutation(rank) if rng.integers(2) else np.arange(rank), rng.integers(0, 2)
    larger = [n * s + margin * int(rng.integers(0, 2)) for n, s in zip(values.shape, steps, strict=True)]
    memory = np.zeros([larger[i] for i in order]).transpose(np.argsort(order))
    view = memory[tuple(slice(0, n * s, s) for n, s in zip(values.shape, steps, strict=True))]
    if not rng.integers(3):
        view = view[::-1]
    view[...] = values
    return view


@pytest.mark.parametrize("force", [SERIAL, ANY], ids=["serial", "default"])
def test_arrays_in_any_order_have_the_dispatchers_bits(force):
    rng = np.random.default_rng(1)
    for _ in range(200):
        shape, axis = sizes(rng, 4), int(rng.integers(-4, 4))
        like_x = rng.normal(1, 2, (3, *shape))
        x, dy, residual = (with_strides(rng, a) for a in like_x) if rng.integers(3) else like_x
        params, state = rows(rng, shape[axis], np.float64)
        run = nbbn.Dispatcher(nbbn.Options(axis=axis, bessel_correction=False, activation="relu"), force)
        y, new_state, saved = run.train(x, params, state, Operands(residual))
        own = state.copy()
        found = strided_train(x, *params, *own, axis, residual)
        assert_same(found, (y, saved))
        assert_same(own, new_state)
        backward = run.backward(dy, x, saved, Operands(residual), training=True, wants_dz=True)
        dx, dparams, dz = backward
        assert_same(strided_backward(dy, x, saved, axis, residual), (dx, *dparams, dz))
        out = with_strides(rng, x)
        run = nbbn.Dispatcher(nbbn.Options(axis=axis), force)
        found = strided_infer(x, *params, *state, axis, out).copy()
        assert_same([found], [run.infer(x, params, state, out=out)])


# -- options -----------------------------------------------------------------------------------------------------------


C4, C1, READ = array(types.float64, 4, "C"), array(types.float64, 1, "C"), array(types.float64, 4, readonly=True)


@only(C4, *[C1] * 4, *[D] * 3, INT, READ)
def train_with_options(x, gamma, beta, mean, variance, stddev, renorm_mean, renorm_stddev, axis, weights):
    renorm = stddev, renorm_mean, renorm_stddev
    return bn.batch_norm_train(
        x, None, beta, mean, variance, axis, renorm=renorm, rmax=1.5, dmax=0.5, virtual_batch_size=2, weights=weights
    )


@only(C4, C4, SAVED, INT, READ)
def backward_with_options(dy, x, saved, axis, weights):
    return bn.batch_norm_backward(dy, x, saved, axis, virtual_batch_size=2, weights=weights)


def test_renorm_virtual_batches_and_weights_have_the_dispatchers_bits():
    rng = np.random.default_rng(2)
    clipping = {"rmax": 1.5, "dmax": 0.5}
    options = nbbn.Options(renorm=True, renorm_clipping=clipping, virtual_batch_size=2)
    # One pass and two have the same bits; these are the kernels that are called here, which saves compiling others.
    run = nbbn.Dispatcher(options, nbbn.Force(parallel=False, one_pass=False))
    for _ in range(60):
        channels = int(rng.choice([2, 3, 17, 64]))
        batch, *inner = sizes(rng, 3, most=50_000 // channels)
        shape, axis = (2 * batch, *inner, channels), -1
        x, dy = rng.normal(3, 2, (2, *shape))
        full = np.where(rng.integers(4, size=shape) > 0, rng.random(shape), 0.0)
        weights = np.broadcast_to(full[:, :1, :1, :1], shape) if rng.integers(2) else with_strides(rng, full)
        params, state = (
            np.array([np.ones(shape[axis]), rng.normal(size=shape[axis])]),
            rng.random((5, shape[axis])) + 0.5,
        )
        own = state.copy()
        y, new_state, saved = run.train(x, params, state, Operands(weights=weights))
        assert_same(train_with_options(x, *params, *own, axis, weights), (y, saved))
        assert_same(own, new_state)
        dx, dparams, _ = run.backward(dy, x, saved, Operands(weights=weights), training=True)
        assert_same(backward_with_options(dy, x, saved, axis, weights), (dx, *dparams))


def test_an_output_may_overlap_its_inputs():
    memory = np.random.default_rng(3).normal(size=(9, 2, 3, 4))
    for out in (slice(0, 8), slice(1, 9)):  # the input itself, and parts of it elsewhere
        changed = memory.copy()
        x, params, state = changed[:8], np.ones((2, 4)), np.array([np.zeros(4), np.ones(4)])
        expected = nbbn.Dispatcher(nbbn.Options()).infer(x.copy(), params, state)
        strided_infer(x, *params, *state, -1, changed[out])
        np.testing.assert_array_equal(changed[out], expected)


def test_an_empty_input_changes_nothing():
    rows = np.ones(3, np.float32)
    x = np.empty((0, 3, 2), np.float32)
    y, saved = dense_train(x, rows, rows, rows, rows, 1, 1e-3, 0.5, x)
    assert y.shape == (0, 3, 2)
    assert saved.shape == (9, 3)
    assert (rows == 1).all()


# -- the choices for compiled code -------------------------------------------------------------------------------------


def test_plans_are_those_of_the_dispatcher():
    """The second text for canonical views, and the schedule that follows, run by Python: thousands of geometries."""
    rng = np.random.default_rng(4)
    views = 0
    for _ in range(3000):
        rank = int(rng.integers(1, 5))
        shape, axis, grouped = sizes(rng, rank), int(rng.integers(rank)), bool(rng.integers(4) == 0)
        grouped = grouped and axis > 0
        samples = int(shape[0])
        group_size = next(n for n in (3, 2, 1) if samples % n == 0) if grouped else None
        names = ["x", "y"] + ["residual"] * int(rng.integers(2)) + ["weights"] * int(rng.integers(2))
        same = [strides_of(rng, shape)] * 4 if rng.integers(2) else [strides_of(rng, shape) for _ in range(4)]
        arrays = {n: np.lib.stride_tricks.as_strided(MEMORY, shape, s) for n, s in zip(names, same, strict=False)}
        run = nbbn.Dispatcher(nbbn.Options(axis=axis, virtual_batch_size=group_size), SERIAL)
        lay = run.layout(shape, True)
        if lay.parts:
            continue
        views_of_step = {n: arrays.get(n) for n in ("x", "residual", "weights", "a", "b", "y")}
        expected = run.engine(MEMORY).plan(Step("train", lay, views_of_step, {}))
        placed, plan = own_plan(arrays, axis, lay.groups if grouped else None)
        assert plan[0] == (expected.copied is None)
        if not plan[0]:
            continue
        views += 1
        assert plan[1] == expected.contiguous
        assert ("rows" if plan[2] else "planes", plan[3]) == (expected.schedule.loops, expected.schedule.grid)
        for name, strides in expected.strides.items():
            if strides is not None:
                assert tuple(placed[planning.ROW_OF[name]]) == strides
        if "weights" not in arrays and not grouped and all(a.flags.c_contiguous for a in arrays.values()):
            outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
            assert planning.plan_dense(False, outer, shape[axis], inner, 4, len(arrays), planning.CACHE) == plan
    assert views > 1000


MEMORY = np.zeros(1, np.float32)  # of arrays whose elements nobody looks at


def strides_of(rng, shape):
    order = rng.permutation(len(shape)) if rng.integers(2) else np.arange(len(shape))
    strides, step = [0] * len(shape), 4
    for i in order[::-1]:
        strides[i] = step * int(rng.choice([1, -1], p=[0.9, 0.1]))
        step *= shape[i] + int(rng.integers(10) == 0)
    if rng.integers(5) == 0:
        strides[int(rng.integers(len(shape)))] = 0
    return tuple(strides)


def own_plan(arrays, axis, groups):
    x = arrays["x"]
    geometry, strides = np.array([1, *x.shape]), np.zeros((planning.ARRAYS, x.ndim + 1), np.int64)
    for name, a in arrays.items():
        strides[planning.ROW_OF[name], 1:] = a.strides
    mask = 2 << axis
    if groups is not None:
        geometry[:2] = x.shape[0] // groups, groups
        strides[:, 0] = strides[:, 1] * groups
        mask |= 2
    there = sum(1 << planning.ROW_OF[name] for name in arrays)
    placed = np.empty((planning.ARRAYS + 1, 4), np.int64)
    numbers = groups or 1, 4, there, mask
    return placed, planning.plan_strided(False, *numbers, geometry, strides, placed, planning.CACHE)


# -- errors ------------------------------------------------------------------------------------------------------------

WRONG_TYPES = {
    "x must be an array of float32 or float64; received array.int64": {"x": np.ones((3, 2), np.int64)},
    "x must be an array of float32 or float64 with at least one dimension": {"x": np.ones((), np.float32)},
    "gamma must be a 1-dimensional array of float32": {"gamma": np.ones(2)},
    "moving_mean is written to": {"mean": np.broadcast_to(np.float32(0), 2)},
    "axis must be an integer; received float64": {"axis": 1.5},
    "momentum must be a number": {"momentum": "0.9"},
}


def given(**changed):
    one = np.ones(2, np.float32)
    usual = {"x": np.ones((3, 2), np.float32), "gamma": one, "beta": one, "mean": one, "variance": one.copy()}
    return tuple((usual | {"axis": -1, "momentum": 0.9} | changed).values())


@pytest.mark.parametrize("message", WRONG_TYPES)
def test_wrong_types_are_named_when_a_function_is_compiled(message):
    @numba.njit
    def train(x, gamma, beta, mean, variance, axis, momentum):
        return bn.batch_norm_train(x, gamma, beta, mean, variance, axis, momentum=momentum)

    with pytest.raises(numba.TypingError, match=message):
        train(*given(**WRONG_TYPES[message]))


def test_a_wrong_constant_is_named_when_a_function_is_compiled():
    @numba.njit
    def wrong_activation(x, row):
        return bn.batch_norm_infer(x, row, row, row, row, activation="tanh")

    x, row = given()[:2]
    with pytest.raises(numba.TypingError, match="activation must be a constant, one of None, 'relu'; received 'tanh'"):
        wrong_activation(x, row)


def dense_arguments(**changed):
    rows = {n: np.full(2, i, np.float32) for n, i in (("gamma", 1), ("beta", 0), ("mean", 0), ("variance", 1))}
    usual = {"x": np.ones((3, 2, 1), np.float32), **rows, "axis": 1, "epsilon": 1e-3, "momentum": 0.9, "out": None}
    return tuple((usual | {"out": usual["x"].copy()} | changed).values())


@pytest.mark.parametrize("function", [dense_train, dense_train.py_func], ids=["compiled", "python"])
@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("axis must be between -3 and 2 for an input of rank 3; received 3", {"axis": 3}),
        (r"gamma must have .*\(2,\).*received \(3,\)", {"gamma": np.ones(3, np.float32)}),
        (r"moving_variance must have .*\(2,\).*received \(1,\)", {"variance": np.ones(1, np.float32)}),
        ("epsilon must be a finite number of at least 0", {"epsilon": float("nan")}),
        ("momentum must be a number from 0 to 1", {"momentum": 1.5}),
        ("out must have the shape of x", {"out": np.ones((3, 1, 2), np.float32)}),
    ],
)
def test_wrong_values_are_named_and_change_nothing(function, message, changed):
    arguments = dense_arguments(**changed)
    before = [np.copy(a) for a in arguments]
    with pytest.raises(ValueError, match=message):
        function(*arguments)
    assert_same([np.asarray(a) for a in arguments], before)


# -- who calls ---------------------------------------------------------------------------------------------------------


def test_python_calls_give_the_same():
    rng = np.random.default_rng(5)
    x, dy = rng.normal(size=(2, 6, 5, 4)).astype(np.float32)
    params, state = rows(rng, 5)
    own, other = state.copy(), state.copy()
    found = dense_train(x, *params, *own, 1, 1e-3, 0.9, x.copy())
    assert_same(dense_train.py_func(x, *params, *other, 1, 1e-3, 0.9, x.copy()), found)
    assert_same(own, other)
    assert_same(dense_backward.py_func(dy, x, found[1], 1), dense_backward(dy, x, found[1], 1))
    assert_same([dense_infer.py_func(x, *params, *own, 1, 1e-3)], [dense_infer(x, *params, *own, 1, 1e-3)])


@only(array(types.float32, 4, "C"), F, F, *[array(types.float32, 2, "C")] * 2, INT, FLOAT, FLOAT, parallel=True)
def train_all(x, gamma, beta, means, variances, axis, epsilon, momentum):
    y = np.empty_like(x)
    for i in numba.prange(x.shape[0]):
        bn.batch_norm_train(x[i], gamma, beta, means[i], variances[i], axis, epsilon, momentum, out=y[i])
    return y


def test_a_prange_loop_trains_many():
    x, (gamma, beta) = (
        np.random.default_rng(6).normal(size=(20, 7, 3, 5)).astype(np.float32),
        np.ones((2, 5), np.float32),
    )
    means, variances = np.zeros((20, 5), np.float32), np.ones((20, 5), np.float32)
    y = train_all(x, gamma, beta, means, variances, -1, 1e-3, 0.9)
    for i, own in enumerate(x):
        state = np.array([np.zeros(5), np.ones(5)], np.float32)
        expected, _ = dense_train(own, gamma, beta, *state, -1, 1e-3, 0.9, own.copy())
        assert_same((y[i], means[i], variances[i]), (expected, *state))


CACHED = """
import numba, numpy as np
from nbbn.numba import batch_norm_train
@numba.njit(cache=True)
def train(x, row, mean, variance):
    return batch_norm_train(x, row, row, mean, variance)[0]
def main():
    one = np.ones(2, np.float32)
    print(train(np.eye(2, dtype=np.float32), one, one.copy(), one.copy())[0].round(3), len(train.stats.cache_hits))
"""


def test_a_function_in_numbas_cache_finds_its_kernels_in_another_process(tmp_path):
    (tmp_path / "program.py").write_text(CACHED)
    found = [check("import program; program.main()", root=tmp_path, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    assert found == ["[1.998 0.002] 0\n", "[1.998 0.002] 1\n"]


def test_without_a_compiler_functions_are_python(tmp_path):
    (tmp_path / "program.py").write_text(CACHED.replace(", len(train.stats.cache_hits)", ""))
    assert check("import program; program.main()", root=tmp_path, NUMBA_DISABLE_JIT="1") == "[1.998 0.002]\n"


@pytest.mark.parametrize("gamma", [np.full(16, 2.0, np.float32), None], ids=["gamma", "no gamma"])
def test_a_row_that_stands_for_beta_keeps_its_memory(gamma):
    params = functions._params(np.zeros((4, 16), np.float32), gamma, None, 16)
    taken = [np.full(16, np.nan, np.float32) for _ in range(64)]
    assert params.tolist() == [[1.0 if gamma is None else 2.0] * 16, [0.0] * 16]
    assert len(taken) == 64
