"""What every target's stages must do: the same bodies for each of them, on small inputs that many chunks share."""

import numpy as np
import pytest
from ml_dtypes import bfloat16

from nbbn.kernels import channel
from tests.oracle.compiled import interpreted_unless
from tests.oracle.contract import (
    BOTH_LOOPS,
    CLIPS,
    EVERY_WAY,
    EVERY_WAY_AND_DTYPE,
    GROUPED,
    OPTIONS,
    PLANES_COMPILED,
    ROWS_COMPILED,
    RUNS,
    WAYS,
    Problem,
    all_results,
    bits,
    check_sizes,
    check_skipping,
    check_strided_output,
    over_ways,
    strided,
)
from tests.oracle.conversions import DTYPES as HALVES
from tests.oracle.conversions import check_every_value, check_rounding
from tests.oracle.targets import TARGETS


@pytest.fixture(params=TARGETS)
def target(request):
    return TARGETS[request.param][0]


@pytest.fixture(params=TARGETS)
def conversion(request):
    return TARGETS[request.param][1]


# --- the steps against the oracle ------------------------------------------------


@EVERY_WAY_AND_DTYPE
def test_training(target, way, dtype):
    problem = Problem(way.shape, dtype)
    problem.check_training(way.make(target, problem.options))


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for kind in TARGETS for name in WAYS[kind]])
def test_the_ways_run_what_their_names_say(name, kind):
    """Or the tests here would test little."""
    way = WAYS[kind][name]
    problem = Problem(way.shape, np.float32)
    run = way.make(TARGETS[kind][0], problem.options)
    all_results(run, problem)
    assert run.kernels() == [(step, *RUNS[kind][name], False) for step in ("train", "backward")]


@BOTH_LOOPS
@pytest.mark.parametrize("mode", OPTIONS)
def test_training_with_options(target, way, mode):
    problem = Problem(way.shape, np.float32, **OPTIONS[mode])
    problem.check_training(way.make(target, problem.options))


@over_ways(ways=GROUPED)
@pytest.mark.parametrize("size", [2, 3, 6])
def test_virtual_batches_in_every_way(target, way, size):
    for one_pass in (True, False):
        problem = Problem(way.shape, np.float32, virtual_batch_size=size)
        problem.check_training(way._replace(one_pass=one_pass).make(target, problem.options))


@BOTH_LOOPS
@pytest.mark.parametrize(
    ("weights", "adjustment", "dtype"),
    [(True, False, np.float64), (False, True, np.float64)],
    ids=["weights", "adjustment"],
)
def test_training_with_operands(target, way, weights, adjustment, dtype):
    """With renorm, too, in test_residual_and_relu_with_operands."""
    problem = Problem(way.shape, dtype, weights, adjustment)
    problem.check_training(way.make(target, problem.options))


@ROWS_COMPILED
def test_training_with_both_operands(target, way):
    problem = Problem(way.shape, bfloat16, True, True)
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


@PLANES_COMPILED
def test_residual_and_relu_with_operands(target, way):
    """All that can follow the normalization, in one element: relu((x_hat * a + b) * gamma + beta + residual)."""
    problem = Problem(way.shape, np.float32, True, True, True, activation="relu", renorm=True, renorm_clipping=CLIPS)
    problem.check_training(way.make(target, problem.options))


@over_ways("rows")
@pytest.mark.parametrize(
    ("residual", "activation"), [(True, None), (False, "relu")], ids=["residual alone", "relu alone"]
)
def test_residual_or_relu(target, way, residual, activation):
    problem = Problem(way.shape, np.float32, residual=residual, activation=activation)
    problem.check_training(way.make(target, problem.options))


@EVERY_WAY_AND_DTYPE
def test_inference(target, way, dtype):
    problem = Problem(way.shape, dtype)
    problem.check_output_of_inference(way.make(target, problem.options))


@over_ways("planes")
def test_gradient_of_inference_in_planes(target, way):
    problem = Problem(way.shape, bfloat16)
    problem.check_inference(way.make(target, problem.options))


@over_ways("rows")
def test_gradient_of_inference_in_rows(target, way):
    problem = Problem(way.shape, np.float32)
    problem.check_inference(way.make(target, problem.options))


@over_ways("planes", "rows", "short planes")
def test_inference_and_its_gradient_with_residual_and_relu(target, way):
    problem = Problem(way.shape, np.float32, residual=True, activation="relu")
    problem.check_inference(way.make(target, problem.options))


@over_ways("planes")
def test_weighted_moments(target, way):
    check_moments(target, way, weights=True)


@over_ways("rows", "few channels", "wide rows")
def test_moments(target, way):
    check_moments(target, way, weights=False)


def check_moments(target, way, weights):
    problem = Problem(way.shape, np.float64, weights)
    found = way.make(target, problem.options).reduce(problem.x, problem.weights)
    w = np.ones(way.shape) if problem.weights is None else problem.weights
    count = w.sum((0, 2))
    mean = (w * problem.x).sum((0, 2)) / count
    variance = (w * (problem.x - mean[:, None, :]) ** 2).sum((0, 2)) / count
    found[2] /= found[0]
    expected = [v.ravel() for v in (count, mean, variance, (w**2).sum((0, 2)))]
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-14)


# --- values ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, which computes in the simulator
@BOTH_LOOPS
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_channel(target, way, value):
    """First, where sums take their shift from, and later; the other channels do not change by a bit."""
    problem = Problem(way.shape, np.float32)
    run = way.make(target, problem.options)
    expected = run.train(problem.x, problem.params, problem.state)
    others = np.ones((way.shape[1], way.shape[3]), bool)
    others[1, 0] = False
    for r1 in (0, way.shape[2] - 1):
        problem.x[:, 1, :, 0] = 1
        problem.x[0, 1, r1, 0] = value
        y, new_state, saved = run.train(problem.x, problem.params, problem.state)
        dx, dparams, _ = run.backward(problem.dy, problem.x, saved)
        for found, before in zip((new_state, saved), expected[1:], strict=True):
            np.testing.assert_array_equal(found[:, others.ravel()], before[:, others.ravel()])
        apart = np.broadcast_to(others[:, None], way.shape)
        np.testing.assert_array_equal(y[apart], expected[0][apart])
        assert np.isnan(new_state[1, ~others.ravel()]).all()
        assert np.isnan(y[:, 1, :, 0]).all()
        assert np.isnan(dx[:, 1, :, 0]).all()
        assert np.isfinite(dparams[:, others.ravel()]).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@ROWS_COMPILED
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_can_be_skipped(target, way, value):
    check_skipping(target, way, value)


@BOTH_LOOPS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("decades", [2, 14, 30])
def test_moments_of_weights_of_any_size(target, way, dtype, decades):
    """The lighter a value, the farther away it is, and the lightest ones come first: each has about the same part in
    the variance. On a CPU the sums lose 10 bits of float64 at most; on a GPU shifts change a hundred times on the way
    through 30 decades, each time with the roundings of sums of the variance's size.
    """
    rng = np.random.default_rng(decades)
    problem = Problem(way.shape, dtype, weights=True)
    power = np.linspace(0, 1, problem.x.size).reshape(way.shape) * decades
    problem.x = (rng.normal(3, 1, way.shape) * 10 ** ((decades - power) / 2)).astype(dtype)
    problem.weights = (rng.uniform(0.5, 1, way.shape) * 10 ** (power - decades)).astype(dtype)
    found = way.make(target, problem.options).reduce(problem.x, problem.weights)
    x, w = problem.x.astype(np.longdouble), problem.weights.astype(np.longdouble)
    count = w.sum((0, 2))
    mean = (w * x).sum((0, 2)) / count
    m2 = (w * (x - mean[:, None]) ** 2).sum((0, 2))
    squares = (w * w).sum((0, 2))
    deviation = np.sqrt(m2 / count)
    for row, expected in ((channel.COUNT, count), (channel.M2, m2), (channel.SQUARES, squares)):
        np.testing.assert_allclose(found[row], expected.ravel().astype(float), rtol=1e-11)
    error = np.abs(found[channel.BATCH_MEAN] - mean.ravel()) / deviation.ravel()
    assert error.max() < 1e-11


@BOTH_LOOPS
def test_moments_where_the_first_value_is_far_from_all_others(target, way):
    """Sums are about it, and so lose as many digits as there are values."""
    problem = Problem(way.shape, np.float32)
    problem.x[0, :, 0] += 1e4 * problem.x.std()
    found = way.make(target, problem.options).reduce(problem.x)
    x = problem.x.astype(np.float64)
    mean, m2 = x.mean((0, 2)).ravel(), (x.var((0, 2)) * found[channel.COUNT, 0]).ravel()
    np.testing.assert_allclose(found[channel.BATCH_MEAN], mean, rtol=1e-12)
    np.testing.assert_allclose(found[channel.M2], m2, rtol=1e-12)


@over_ways()
@pytest.mark.parametrize("weights", ["weights", "and an adjustment"])
def test_what_a_mask_excludes_may_be_anything(target, way, weights):
    """An excluded NaN or infinity has no part in any sum: all others get what they get beside an ordinary number whose
    output nobody uses."""
    # On a CPU two passes have the loops of one; a mask beside an adjustment is in rows and, with all else, in planes.
    compiled = way.one_pass and way.schedule == "rows"
    interpreted_unless(weights == "weights" or target.kind != "cpu" or compiled)
    problem = Problem(way.shape, np.float32, weights=True, adjustment=weights != "weights")
    out = problem.weights == 0
    assert out.any()
    problem.dy[out] = 0
    run = way.make(target, problem.options)
    expected = all_results(run, problem)
    y, new_state, saved = run.train(problem.x, problem.params, problem.state, **problem.operands)
    dx, dparams, _ = run.backward(problem.dy, problem.x, saved, **problem.operands)
    spoilt, dy = problem.x.copy(), problem.dy.copy()
    spoilt[out] = np.resize([np.nan, np.inf, -np.inf], out.sum())
    dy[out] = np.resize([np.nan, 1.0], out.sum())
    y2, new_state2, saved2 = run.train(spoilt, problem.params, problem.state, **problem.operands)
    dx2, dparams2, _ = run.backward(dy, spoilt, saved2, **problem.operands)
    assert (bits(new_state2), bits(saved2), bits(dparams2)) == (bits(new_state), bits(saved), bits(dparams))
    assert bits(y2[~out]) == bits(y[~out])
    assert bits(dx2[~out]) == bits(dx[~out])
    np.testing.assert_array_equal(dx2[out], 0)
    assert expected == all_results(run, problem)


@BOTH_LOOPS
@pytest.mark.parametrize("mode", ["plain", "renorm clipped", "cumulative"])
def test_a_state_keeps_its_own_dtype(target, way, mode):
    """A float32 input moves a float64 state by what float64 makes of its moments, and momentum 1 by nothing."""
    chosen = {"plain": ("planes", "rows"), "renorm clipped": ("planes",), "cumulative": ("rows",)}[mode]
    interpreted_unless(target.kind != "cpu" or way.schedule in chosen)
    problem = Problem(way.shape, np.float32, **OPTIONS[mode])
    state = problem.state.astype(np.float64) + np.pi / 1e9
    assert (state.astype(np.float32) != state).any()
    run = way.make(target, problem.options)
    y, found, _ = run.train(problem.x, problem.params, state)
    assert found.dtype == np.float64
    wide = way.make(target, problem.options).train(
        problem.x.astype(np.float64), problem.params.astype(np.float64), state
    )
    np.testing.assert_allclose(found, wide[1], rtol=1e-13)
    if mode == "plain":
        np.testing.assert_allclose(y, wide[0], rtol=0, atol=1e-5)
        kept = way.make(target, {**problem.options, "momentum": 1.0}).train(problem.x, problem.params, state)[1]
        assert bits(kept) == bits(state)
        state[0] = 1e6 + 1 / 3  # float32 would lose a hundredth, which belongs to the shift
        shifted = run.infer((problem.x + np.float32(1e6)), problem.params, state)
        wide = run.infer(problem.x.astype(np.float64) + 1e6, problem.params.astype(np.float64), state)
        np.testing.assert_allclose(shifted, wide, rtol=0, atol=0.3)


@BOTH_LOOPS
def test_a_constant_channel_becomes_beta(target, way):
    """To the bit: its variance is 0, and its mean is one of its values."""
    problem = Problem(way.shape, np.float32)
    problem.x[...] = np.float32(1000.1)
    beta = problem.params[1].reshape(way.shape[1], 1, way.shape[3])
    for epsilon, rstd in ((1e-3, 1 / np.sqrt(1e-3)), (0.0, 0.0)):
        run = way.make(target, {**problem.options, "epsilon": epsilon})
        y, _, saved = run.train(problem.x, problem.params, problem.state)
        np.testing.assert_array_equal(y, np.broadcast_to(beta, way.shape))
        np.testing.assert_allclose(saved[channel.RSTD], rstd, rtol=1e-14)
        dx, dparams, _ = run.backward(problem.dy, problem.x, saved)
        assert np.isfinite(dx).all()
        np.testing.assert_array_equal(dparams[0], 0)


@BOTH_LOOPS
def test_one_value_per_statistic(target, way):
    problem = Problem((1, 1, 1, way.shape[3]), np.float32)
    problem.check_training(way.make(target, problem.options))


# --- sizes ---------------------------------------------------------------------------------

# About each border. CPU: vectors of 16, blocks of four rows and their remainder, chunks, tiles of 32 columns, runs of
# up to 12, and more statistics than have room for their sums at a time. GPU: accesses of 1, 2 and 4 elements, blocks of
# 1 to 4 threads in a line, chunks.
SIZES = {
    "cpu": {
        "planes": [(r0, 2, r1, 1) for r0 in (1, 2, 3, 9) for r1 in (2, 7, 15, 16, 17, 31, 32, 33, 100)]
        + [(1, 300, 2, 1)],
        "rows": [(1, 1, rows, k1) for rows in range(1, 18) for k1 in (1, 15, 16, 17, 48)]
        + [(r0, 2, r1, k1) for r0 in (2, 3) for r1 in (1, 3, 5) for k1 in (3, 31, 32, 33, 65)],
        "short planes": [(r0, k0, r1, 1) for r0 in range(4, 12) for k0 in (2, 3, 17) for r1 in (1, 5, 8, 11, 12)],
        "few channels": [(1, 1, rows, k1) for rows in (3, 8, 9, 12, 16, 30, 64, 101) for k1 in (1, 2, 3, 5, 7, 8)]
        + [(r0, k0, r1, 5) for r0 in (1, 2, 5) for k0 in (1, 3) for r1 in (12, 31)],
    },
    "cuda": {
        "planes": [(r0, 2, r1, 1) for r0, r1 in ((1, 2), (1, 3), (1, 15), (1, 33), (2, 18), (3, 17), (2, 40))],
        "short planes": [(r0, 2, r1, 1) for r0 in (2, 5) for r1 in (2, 4, 5, 16)],
        "short planes, two passes": [(r0, 2, r1, 1) for r0, r1 in ((2, 3), (7, 2), (9, 4), (3, 8))],
        "rows": [(1, 1, rows, k1) for rows in (1, 2, 5) for k1 in (2, 3, 5)] + [(5, 2, 2, 3), (3, 2, 3, 9)],
        "rows, two passes": [(1, 1, rows, 6) for rows in range(1, 6)] + [(2, 2, 3, 4), (4, 2, 2, 5)],
    },
}


@pytest.mark.parametrize(
    ("target", "name"), [(kind, name) for kind in TARGETS for name in SIZES[kind]], indirect=["target"]
)
def test_every_size(request, target, name):
    kind = request.node.callspec.params["target"]
    check_sizes(target, WAYS[kind][name], SIZES[kind][name], RUNS[kind][name][0])


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
@pytest.mark.parametrize("value", [np.nan, 1e200])
def test_what_has_no_weight_may_be_anything(target, way, value):
    """Also first, where sums take their shift from, and where its square is no number."""
    problem = Problem(way.shape, np.float64, weights=True)
    problem.weights[0, :, 0] = 0
    run = way.make(target, problem.options)
    expected = run.train(problem.x, problem.params, problem.state, weights=problem.weights)
    problem.x[problem.weights == 0] = value
    y, new_state, saved = run.train(problem.x, problem.params, problem.state, weights=problem.weights)
    np.testing.assert_allclose(new_state, expected[1], rtol=1e-14)
    np.testing.assert_allclose(saved, expected[2], rtol=1e-14)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(problem.x))


@BOTH_LOOPS
def test_a_statistic_without_weight_keeps_its_state(target, way):
    for options in ({}, {"renorm": True}, {"momentum": None}):
        problem = Problem(way.shape, np.float64, weights=True, **options)
        problem.weights[:, 1] = 0
        kept = np.zeros((way.shape[1], way.shape[3]), bool)
        kept[1] = True
        run = way.make(target, problem.options)
        _, new_state, _ = run.train(problem.x, problem.params, problem.state, weights=problem.weights)
        np.testing.assert_array_equal(new_state[:, kept.ravel()], problem.state[:, kept.ravel()])
        assert (new_state != problem.state)[:, ~kept.ravel()].all()


# --- memory --------------------------------------------------------------------------


@ROWS_COMPILED
def test_strided_arrays(target, way):
    problem = Problem(way.shape, np.float32, residual=True, activation="relu")
    problem.x, problem.dy, problem.residual = map(strided, (problem.x, problem.dy, problem.residual))
    problem.check_training(way.make(target, problem.options))


@BOTH_LOOPS
def test_strided_output_leaves_the_gaps_alone(target, way):
    problem = Problem(way.shape, np.float32)
    run = way.make(target, problem.options)
    expected, _, _ = run.train(problem.x, problem.params, problem.state)
    check_strided_output(run, problem, expected)


@EVERY_WAY_AND_DTYPE
def test_in_place(target, way, dtype):
    problem = Problem(way.shape, dtype)
    run = way.make(target, problem.options)
    y, new_state, saved = run.train(problem.x, problem.params, problem.state)
    x = problem.x.copy()
    found = run.train(x, problem.params, problem.state, out=x)
    assert found[0] is x
    assert [bits(a) for a in found] == [bits(a) for a in (y, new_state, saved)]
    dx, dparams, _ = run.backward(problem.dy, problem.x, saved)
    dy = problem.dy.copy()
    found = run.backward(dy, problem.x, saved, out=dy)
    assert found[0] is dy
    assert [bits(a) for a in found[:2]] == [bits(dx), bits(dparams)]
    y = run.infer(problem.x, problem.params, problem.state)
    x = problem.x.copy()
    assert bits(run.infer(x, problem.params, problem.state, out=x)) == bits(y)
    assert bits(x) == bits(y)


@BOTH_LOOPS
@pytest.mark.parametrize("momentum", [0.9, None], ids=["moving", "cumulative"])
@pytest.mark.parametrize("renorm", [False, True], ids=["plain", "renorm"])
def test_the_state_may_change_in_place(target, way, renorm, momentum):
    """As a captured graph needs it: a step after another one goes on from its state, also where nothing counts."""
    problem = Problem(way.shape, np.float64, weights=True, momentum=momentum, renorm=renorm)
    problem.weights[:, 1] = 0
    run, state, expected = way.make(target, problem.options), problem.state.copy(), problem.state
    for _ in range(2):
        y, expected, saved = run.train(problem.x, problem.params, expected, **problem.operands)
        found = run.train(problem.x, problem.params, state, in_place=True, **problem.operands)
        assert found[1] is state
        assert [bits(a) for a in found] == [bits(a) for a in (y, expected, saved)]
    assert bits(state) != bits(problem.state)


@EVERY_WAY
def test_in_the_place_of_the_residual(target, way):
    problem = Problem(way.shape, np.float32, residual=True, activation="relu")
    run = way.make(target, problem.options)
    expected = run.train(problem.x, problem.params, problem.state, **problem.operands)
    residual = problem.residual.copy()
    found = run.train(problem.x, problem.params, problem.state, residual=residual, out=residual)
    assert found[0] is residual
    assert [bits(a) for a in found] == [bits(a) for a in expected]


# --- the same bits ----------------------------------------------------------------------


@over_ways("rows")
def test_repeated_calls_give_the_same_bits(target, way):
    problem = Problem(way.shape, np.float32)
    run = way.make(target, problem.options, parallel=True)
    assert len({tuple(all_results(run, problem)) for _ in range(5)}) == 1


# --- 16-bit floats -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
def test_every_16_bit_value(conversion, dtype):
    check_every_value(conversion(HALVES[dtype]))


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_to_16_bits(conversion, dtype):
    check_rounding(conversion(HALVES[dtype]))
