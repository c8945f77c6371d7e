"""What every target's stages must do: the same bodies for each of them, on small inputs that many chunks share."""

import numba
import numpy as np
import pytest
from agreement import check, gradients, output, state, state_dtype
from conversions import DTYPES as HALVES
from conversions import check_every_value, check_rounding
from ml_dtypes import bfloat16
from processes import check as check_process
from reference import Reference
from targets import TARGETS

from nbbn import layout
from nbbn.kernels.cpu.scalars import HALF_INSTRUCTIONS
from nbbn.runtime import thread_limit

DTYPES = [np.float16, bfloat16, np.float32, np.float64]
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)

# Schedule and canonical shape [R0, K0, R1, K1].
SCHEDULES = [("planes", (6, 3, 7, 1)), ("rows", (6, 3, 7, 5)), ("rows", (6, 3, 7, 1))]
EVERY_SCHEDULE = pytest.mark.parametrize(
    ("schedule", "shape"), SCHEDULES, ids=lambda v: v if isinstance(v, str) else f"K1={v[3]}"
)
BOTH_SCHEDULES = pytest.mark.parametrize(
    ("schedule", "shape"), SCHEDULES[:2], ids=lambda v: v if isinstance(v, str) else ""
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


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Several chunks per statistic and several tiles of K1, as large inputs have them."""
    monkeypatch.setattr(layout, "CHUNK_ELEMENTS", 16)
    monkeypatch.setattr(layout, "TILE_CHANNELS", 4)


def bits(array):
    return np.ascontiguousarray(array).tobytes()


class Problem:
    """Arrays for one call, and what the oracle makes of them. The kept axes are 1 and 3."""

    def __init__(self, shape, dtype, weights=False, adjustment=False, **options):
        rng = np.random.default_rng(0)
        self.dtype, self.stored = np.dtype(dtype), state_dtype(dtype)
        self.options = {"axis": (1, 3), "momentum": 0.9, "bessel_correction": False, **options}
        self.x = (rng.normal(size=(1, *shape[1:])) + rng.normal(size=shape)).astype(dtype)
        self.dy = rng.normal(size=shape).astype(dtype)
        self.weights = self.adjustment = None
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
        return {"weights": self.weights, "adjustment": self.adjustment}

    def check_training(self, run):
        """Run a step forward and backward; fail unless all that comes back agrees with the oracle."""
        before = [w.copy() for w in self.oracle.get_weights()]
        step = self.oracle(self.x, training=True, mask=self.weights)
        copies = [bits(a) for a in (self.x, self.params, self.state)]
        y, new_state, saved = run.train(self.x, self.params, self.state, **self.operands)
        assert [bits(a) for a in (self.x, self.params, self.state)] == copies, "an input was changed"
        check("y", y, step.y, output(step, self.dtype), self.dtype)
        self.check_state(new_state, before, step)
        self.check_saved(saved, step)
        dx, dparams = run.backward(self.dy, self.x, self.params, saved, **self.operands)
        self.check_gradients(dx, dparams, step)

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

    def check_gradients(self, dx, dparams, step):
        expected, bound = step.gradients(self.dy), gradients(step, self.dy, self.dtype)
        check("dx", dx, expected.inputs, bound.inputs, self.dtype)
        for name, row in zip(("gamma", "beta"), dparams, strict=True):
            value, limit = getattr(expected, name), getattr(bound, name)
            check(f"d{name}", row, value.ravel(), limit.ravel(), self.stored)


# --- the steps against the oracle ------------------------------------------------


@EVERY_DTYPE
@EVERY_SCHEDULE
def test_training(target, schedule, shape, dtype):
    problem = Problem(shape, dtype)
    problem.check_training(target(problem.options, schedule, parallel=False))


@BOTH_SCHEDULES
@pytest.mark.parametrize("mode", OPTIONS)
def test_training_with_options(target, schedule, shape, mode):
    problem = Problem(shape, np.float32, **OPTIONS[mode])
    problem.check_training(target(problem.options, schedule, parallel=False))


@BOTH_SCHEDULES
@pytest.mark.parametrize(
    ("weights", "adjustment", "dtype"),
    [(True, False, np.float64), (False, True, bfloat16), (True, True, np.float32)],
    ids=["weights", "adjustment", "both"],
)
def test_training_with_operands(target, schedule, shape, weights, adjustment, dtype):
    for options in ({}, {"renorm": True, "renorm_clipping": CLIPS}):
        problem = Problem(shape, dtype, weights, adjustment, **options)
        problem.check_training(target(problem.options, schedule, parallel=False))


@BOTH_SCHEDULES
def test_weighted_virtual_batches(target, schedule, shape):
    for options in ({}, {"renorm": True}):
        problem = Problem(shape, np.float64, weights=True, virtual_batch_size=2, **options)
        problem.check_training(target(problem.options, schedule, parallel=False))


@EVERY_DTYPE
@EVERY_SCHEDULE
def test_inference(target, schedule, shape, dtype):
    problem = Problem(shape, dtype)
    run = target(problem.options, schedule, parallel=False)
    step = problem.oracle(problem.x)
    y = run.infer(problem.x, problem.params, problem.state)
    check("y", y, step.y, output(step, problem.dtype), problem.dtype)


@pytest.mark.parametrize(
    ("schedule", "shape", "dtype"), [(*SCHEDULES[0], bfloat16), (*SCHEDULES[1], np.float32)], ids=["planes", "rows"]
)
def test_gradient_of_inference(target, schedule, shape, dtype):
    problem = Problem(shape, dtype)
    run = target(problem.options, schedule, parallel=False)
    found = run.frozen_backward(problem.dy, problem.x, problem.params, problem.state)
    problem.check_gradients(*found, problem.oracle(problem.x))


@pytest.mark.parametrize(
    ("schedule", "shape", "weights"), [(*SCHEDULES[0], True), (*SCHEDULES[1], False)], ids=["planes weighted", "rows"]
)
def test_moments(target, schedule, shape, weights):
    problem = Problem(shape, np.float64, weights)
    found = target(problem.options, schedule, parallel=False).moments(problem.x, problem.weights)
    w = np.ones(shape) if problem.weights is None else problem.weights
    count = w.sum((0, 2))
    mean = (w * problem.x).sum((0, 2)) / count
    variance = (w * (problem.x - mean[:, None, :]) ** 2).sum((0, 2)) / count
    np.testing.assert_allclose(found, [v.ravel() for v in (count, mean, variance)], rtol=1e-13, atol=1e-14)


# --- weights -----------------------------------------------------------------------


@BOTH_SCHEDULES
def test_weights_of_one_change_no_bit_of_the_state(target, schedule, shape):
    """As float64 sums: with and without a product by 1 they round alike."""
    problem = Problem(shape, np.float64)
    run = target(problem.options, schedule, parallel=False)
    plain = run.train(problem.x, problem.params, problem.state)
    weighted = run.train(problem.x, problem.params, problem.state, weights=np.ones(shape))
    for one, two in zip(plain, weighted, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-14, atol=1e-14)


@BOTH_SCHEDULES
def test_what_has_no_weight_may_be_nan(target, schedule, shape):
    problem = Problem(shape, np.float64, weights=True)
    run = target(problem.options, schedule, parallel=False)
    expected = run.train(problem.x, problem.params, problem.state, weights=problem.weights)
    problem.x[problem.weights == 0] = np.nan
    y, new_state, saved = run.train(problem.x, problem.params, problem.state, weights=problem.weights)
    np.testing.assert_allclose(new_state, expected[1], rtol=1e-14)
    np.testing.assert_allclose(saved, expected[2], rtol=1e-14)
    np.testing.assert_array_equal(np.isnan(y), problem.weights == 0)


@BOTH_SCHEDULES
def test_a_statistic_without_weight_keeps_its_state(target, schedule, shape):
    for options in ({}, {"renorm": True}):
        problem = Problem(shape, np.float64, weights=True, **options)
        problem.weights[:, 1] = 0
        kept = np.zeros((shape[1], shape[3]), bool)
        kept[1] = True
        run = target(problem.options, schedule, parallel=False)
        _, new_state, _ = run.train(problem.x, problem.params, problem.state, weights=problem.weights)
        np.testing.assert_array_equal(new_state[:, kept.ravel()], problem.state[:, kept.ravel()])
        assert (new_state != problem.state)[:, ~kept.ravel()].all()


# --- memory --------------------------------------------------------------------------


def strided(x):
    """The same values with gaps, backwards, in a larger array of other values."""
    wide = np.full([2 * n for n in x.shape], 77, x.dtype)
    wide[::2, ::2, ::2, ::2] = x[::-1, :, ::-1]
    return wide[::2, ::2, ::2, ::2][::-1, :, ::-1]


@BOTH_SCHEDULES
def test_strided_arrays(target, schedule, shape):
    problem = Problem(shape, np.float32)
    problem.x, problem.dy = strided(problem.x), strided(problem.dy)
    problem.check_training(target(problem.options, schedule, parallel=False))


@BOTH_SCHEDULES
def test_strided_output_leaves_the_gaps_alone(target, schedule, shape):
    problem = Problem(shape, np.float32)
    run = target(problem.options, schedule, parallel=False)
    out = strided(np.zeros(shape, np.float32))
    y, _, _ = run.train(problem.x, problem.params, problem.state, out=out)
    assert y is out
    expected, _, _ = run.train(problem.x, problem.params, problem.state)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    everything = out.base
    while everything.base is not None:
        everything = everything.base
    assert (everything == 77).sum() == everything.size - out.size


@EVERY_DTYPE
@BOTH_SCHEDULES
def test_in_place(target, schedule, shape, dtype):
    problem = Problem(shape, dtype)
    run = target(problem.options, schedule, parallel=False)
    expected = run.train(problem.x, problem.params, problem.state)
    x = problem.x.copy()
    found = run.train(x, problem.params, problem.state, out=x)
    assert found[0] is x
    assert [bits(a) for a in found] == [bits(a) for a in expected]
    y = run.infer(problem.x, problem.params, problem.state)
    x = problem.x.copy()
    assert bits(run.infer(x, problem.params, problem.state, x)) == bits(y)
    assert bits(x) == bits(y)


# --- the same bits ----------------------------------------------------------------------

MIXED_SHAPES = {
    "planes": [(6, 3, 7, 1), (1, 2, 100, 1), (40, 1, 3, 1), (1, 1, 1, 1)],
    "rows": [(6, 3, 7, 5), (1, 1, 100, 9), (40, 1, 1, 3), (2, 2, 30, 17), (1, 1, 2, 33)],
}


def all_results(run, problem):
    y, new_state, saved = run.train(problem.x, problem.params, problem.state, **problem.operands)
    gradients = run.backward(problem.dy, problem.x, problem.params, saved, **problem.operands)
    return [bits(r) for r in (y, new_state, saved, *gradients)]


# A choice: every pair costs seconds to compile, in parallel above all.
@pytest.mark.parametrize(
    ("schedule", "dtype", "operands"),
    [
        ("planes", np.float32, False),
        ("rows", np.float32, False),
        ("rows", np.float16, False),
        ("planes", np.float32, True),
    ],
    ids=["planes", "rows", "rows float16", "planes with operands"],
)
def test_serial_and_parallel_give_the_same_bits(target, schedule, dtype, operands):
    for shape in MIXED_SHAPES[schedule]:
        problem = Problem(shape, dtype, weights=operands, adjustment=operands)
        serial = all_results(target(problem.options, schedule, parallel=False), problem)
        assert all_results(target(problem.options, schedule, parallel=True), problem) == serial, shape


@pytest.mark.parametrize("schedule", MIXED_SHAPES)
def test_every_number_of_threads_gives_the_same_bits(target, schedule):
    if thread_limit() < 2:
        pytest.skip("this machine, or NBBN_NUM_THREADS, allows one thread only")
    previous = numba.get_num_threads()
    try:
        for shape in MIXED_SHAPES[schedule]:
            problem = Problem(shape, np.float32)
            found = set()
            for threads in range(1, thread_limit() + 1):
                numba.set_num_threads(threads)
                found.add(tuple(all_results(target(problem.options, schedule, parallel=True), problem)))
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
    """Large enough for several chunks of the usual size."""
    threads = ("1", "2")
    found = {check_process(FINGERPRINT, NBBN_NUM_THREADS=n, PYTHONHASHSEED="0") for n in threads}
    assert len(found) == 1


@pytest.mark.parametrize("shape", [(6, 3, 7, 1), (1, 1, 100, 1), (40, 1, 3, 1)], ids=str)
def test_schedules_agree(target, shape):
    """Other sums, in another order: float64 rounding in the statistics, half a unit in y."""
    problem = Problem(shape, np.float32)
    planes, rows = (
        target(problem.options, s, parallel=False).train(problem.x, problem.params, problem.state)
        for s in ("planes", "rows")
    )
    np.testing.assert_allclose(planes[0], rows[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(planes[2], rows[2], rtol=1e-14, atol=1e-14)


def test_repeated_calls_give_the_same_bits(target):
    problem = Problem((6, 3, 7, 5), np.float32)
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
