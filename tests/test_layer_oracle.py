"""The layer against the oracle, over random configurations, dtypes and memory layouts."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from ml_dtypes import finfo

import nbbn
from tests.oracle import compiled
from tests.oracle.agreement import FEW, Terms, check, check_gradients, check_step, gradients, output
from tests.oracle.compiled import interpreted, variants_of
from tests.oracle.reference import Reference, feature_axes, fused_eligible
from tests.oracle.strategies import CONTIGUOUS, DTYPES, FORMS, Case, arrange, cases

# The first call of each combination of dtype and layout compiles.
PROFILE = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

PLAIN = Case(
    shape=(4, 3, 2, 5),
    dtype=np.float32,
    options={"axis": 1, "epsilon": 1e-3, "momentum": 0.5},
    adjustment_shapes=None,
    mask=None,
    form="C",
    dy_form="C",
    seed=0,
)


def layer_of(case: Case) -> nbbn.BatchNormalization:
    """A built layer with the case's weights."""
    layer = nbbn.BatchNormalization(**case.options, adjustment=case.adjustment())
    layer(np.zeros(case.shape, case.dtype))
    layer.set_weights(case.weights(case.reference()))
    return layer


def oracle_of(case: Case) -> Reference:
    oracle = case.reference()
    oracle.set_weights(case.weights(oracle))
    return oracle


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def check_same(name: str, one: np.ndarray, two: np.ndarray, bound: np.ndarray) -> None:
    """Both are within `bound` and a rounding of the dtype of each other."""
    two_exact = two.astype(np.float64)
    check(name, one, two_exact, bound + 0.5 * float(finfo(two.dtype).eps) * np.abs(two_exact), two.dtype)


def follow(case: Case) -> None:
    """Three steps of training, then inference, each forward and backward."""
    layer, oracle = layer_of(case), oracle_of(case)
    for step in range(3):
        x, dy, mask = case.batch(step)
        inputs = [a for a in (x, dy, mask) if a is not None]
        before = [bits(a) for a in inputs]
        check_step(layer, oracle, x, dy, mask, training=True)
        assert [bits(a) for a in inputs] == before, "an input was modified"
    x, dy, _ = case.batch(3)
    # Inference takes any number of samples, whatever the virtual batch.
    fixed = 0 in feature_axes(case.options["axis"], len(case.shape))
    samples = slice(None) if fixed else slice(0, max(1, len(x) - 1))
    check_step(layer, oracle, x[samples], dy[samples], training=None)


@given(case=cases())
@settings(PROFILE, max_examples=300)
def test_layer(case):
    follow(case)


def test_every_pair_of_options_is_compiled():
    """In planes or in rows, and each option in both."""
    columns = list(zip(*compiled.PLANES, *compiled.ROWS, strict=True))
    for one, two in itertools.combinations(columns, 2):
        assert len(set(zip(one, two, strict=True))) == len(set(one)) * len(set(two))
    for one, two in zip(zip(*compiled.PLANES, strict=True), zip(*compiled.ROWS, strict=True), strict=True):
        assert set(one) == set(two)
    assert {v.dtype for v in compiled.PLANES} == set(DTYPES)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("axis", [0, -1, [1, 3], *interpreted(1)])
def test_layer_masked_and_adjusted_in_every_dtype(axis, dtype):
    """The rarer kernels, which random configurations reach in some dtypes only."""
    for _, renorm, masked, adjusted, strided in variants_of(dtype, planes=axis == 0):
        case = Case(
            shape=PLAIN.shape,
            dtype=dtype,
            options={**PLAIN.options, "axis": axis, "renorm": renorm},
            adjustment_shapes=((4, 1, 1, 1), (5,)) if adjusted else None,
            mask=("weights", "full") if masked else None,
            form="every second element" if strided else "C",
            dy_form="reversed" if strided else "C",
            seed=0,
        )
        follow(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", [(7, 3), (3, 2, 3), (2, 3, 2, 3), (2, 3, 2, 2, 3)], ids=len)
def test_fused_decides_about_bessel(shape, dtype):
    """For every rank, axis and dtype: fused=None corrects where TensorFlow's kernel runs, True raises elsewhere."""
    for axis in range(-len(shape), len(shape)):
        eligible = fused_eligible(len(shape), axis, np.dtype(dtype).name)
        for fused in (None, False, True) if eligible else (None, False):
            case = replace(PLAIN, shape=shape, dtype=dtype, options={"axis": axis, "fused": fused, "momentum": 0})
            x, dy, _ = case.batch(0)
            check_step(layer_of(case), oracle_of(case), x, dy, training=True)
        if not eligible:
            with pytest.raises(ValueError, match="fused"):
                nbbn.BatchNormalization(axis=axis, fused=True).vjp(np.zeros(shape, dtype), training=True)


@pytest.mark.parametrize(
    ("shape", "axis", "virtual_batch_size"),
    [
        ((60, 5, 37, 41), 1, None),
        ((8, 40, 25, 33), -1, None),
        ((70_000, 3), -1, None),
        ((3, 1100, 90), 1, None),
        ((130, 2049), -1, None),
        ((40, 120, 3, 21), [1, 3], None),
        ((2, 3, 150_000), 1, None),
        ((64, 31, 150), 1, 16),
        ((300, 700), -1, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", [None, ("bool", "plain")], ids=["", "masked"])
def test_layer_large(shape, axis, virtual_batch_size, mask):
    """Sizes above those where work is cut into chunks and shared by threads."""
    options = {**PLAIN.options, "axis": axis, "virtual_batch_size": virtual_batch_size}
    case = replace(PLAIN, shape=shape, options=options, mask=mask)
    layer, oracle = layer_of(case), oracle_of(case)
    x, dy, weights = case.batch(0)
    check_step(layer, oracle, x, dy, weights, training=True)
    check_step(layer, oracle, x, dy)


# These compare calls of one layer with each other: what they try lies above the kernels and knows no dtype. Where they
# need kernels that no other test has, in another order of memory, they are float32's.


@given(case=cases(dtypes=[np.float32]))
@example(case=replace(PLAIN, form="channels last in memory", dy_form="C"))
@settings(PROFILE, max_examples=60)
def test_memory_layout_changes_nothing_but_the_last_digits(case):
    """The order of float64 sums may differ with the strides: a unit each for mean, scale, shift and y."""
    copied = replace(case, form="C", dy_form="C")
    x, dy, mask = case.batch(0)
    layer, layer_copied = layer_of(case), layer_of(copied)
    y, pullback = layer.vjp(x, training=True, mask=mask)
    y_copied, pullback_copied = layer_copied.vjp(np.ascontiguousarray(x), training=True, mask=mask)
    grads, grads_copied = pullback(dy), pullback_copied(np.ascontiguousarray(dy))
    step = oracle_of(case)(x, True, mask)
    share, bounds = 4 / FEW, gradients(step, dy, case.dtype)
    check_same("y", y, y_copied, share * output(step, case.dtype))
    check_same("grads.inputs", grads.inputs, grads_copied.inputs, share * bounds.inputs)
    for name in ("gamma", "beta"):
        if getattr(grads, name) is not None:
            bound = share * getattr(bounds, name)
            check_same(name, getattr(grads, name), getattr(grads_copied, name), bound)
    unit = share * Terms(step, case.dtype).unit
    for one, two in zip(layer.get_weights(), layer_copied.get_weights(), strict=True):
        check_same("state", one, two, unit * (1 + np.abs(two)))


@given(case=cases(dtypes=[np.float32]))
@settings(PROFILE, max_examples=60)
def test_ways_to_call_give_the_same_bits(case):
    """layer(x), layer.vjp(x), and both with out=, contiguous or not, are one computation."""
    x, dy, mask = case.batch(0)
    plain = layer_of(case)
    y = plain(x, training=True, mask=mask)
    for out_form in (None, "C", "every second element"):
        out = None if out_form is None else arrange(np.zeros(case.shape, case.dtype), out_form)
        called, differentiated = layer_of(case), layer_of(case)
        y_called = called(x, training=True, mask=mask, out=out)
        assert bits(y_called) == bits(y)
        y_differentiated, pullback = differentiated.vjp(x, training=True, mask=mask, out=out)
        assert bits(y_differentiated) == bits(y)
        assert out is None or (y_called is out and y_differentiated is out)
        for layer in (called, differentiated):
            assert [bits(w) for w in layer.get_weights()] == [bits(w) for w in plain.get_weights()]
        assert pullback(dy).inputs.shape == x.shape


@given(case=cases(compiled.DTYPES))
@settings(PROFILE, max_examples=60)
def test_update_statistics_false_uses_the_batch_and_keeps_the_state(case):
    x, dy, mask = case.batch(0)
    updating, keeping = layer_of(case), layer_of(case)
    before = [bits(w) for w in keeping.get_weights()]
    y, pullback = keeping.vjp(x, training=True, mask=mask, update_statistics=False)
    assert [bits(w) for w in keeping.get_weights()] == before
    assert bits(y) == bits(updating(x, training=True, mask=mask))
    check_gradients(pullback(dy), oracle_of(case)(x, True, mask), dy, case.dtype)
    # A step that was not counted does not count for a cumulative average either.
    keeping(x, training=True, mask=mask)
    assert [bits(w) for w in keeping.get_weights()] == [bits(w) for w in updating.get_weights()]


@given(case=cases(compiled.DTYPES))
@settings(PROFILE, max_examples=60)
def test_a_pullback_can_be_called_again(case):
    """Its answer is that of its own forward pass, whatever the layer does later."""
    layer = layer_of(case)
    x, dy, mask = case.batch(0)
    y, pullback = layer.vjp(x, training=True, mask=mask)
    y_bits, first = bits(y), pullback(dy)
    layer(case.batch(1)[0], training=True)
    layer.set_weights([2 * w for w in layer.get_weights()])
    second = pullback(dy)
    first, second = ([*g[:3], *(g[3] or ())] for g in (first, second))
    for one, two in zip(first, second, strict=True):
        assert (one is None) == (two is None)
        assert one is None or bits(one) == bits(two)
    assert bits(y) == y_bits


def test_gradients_are_linear_in_dy_by_exact_powers_of_two():
    """Scaling dy by 2 changes exponents only."""
    case = replace(PLAIN, dtype=np.float32)
    x, dy, _ = case.batch(0)
    _, pullback = layer_of(case).vjp(x, training=True)
    for one, two in zip(pullback(dy)[:3], pullback(2 * dy)[:3], strict=True):
        np.testing.assert_array_equal(2 * one, two)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_every_dtype_in_every_memory_layout(form, dtype):
    """Strided planes of two dtypes, and rows of the others; kernels of both are compiled for what is contiguous."""
    one = 1 if dtype in (np.float16, np.float64) else -1
    for axis in (1, -1) if form in CONTIGUOUS else (one, *interpreted(-one)):
        follow(replace(PLAIN, dtype=dtype, form=form, options={**PLAIN.options, "axis": axis}))


def test_clip_values_are_read_at_each_step():
    schedule = iter([1.0, 1.5, 3.0])
    clip = {"rmax": lambda: next(schedule), "rmin": lambda: 0.25, "dmax": 0.5}
    case = replace(PLAIN, options={**PLAIN.options, "renorm": True, "renorm_clipping": clip})
    layer, oracle = layer_of(case), oracle_of(case)
    for step, rmax in enumerate([1.0, 1.5, 3.0]):
        oracle.renorm_clipping = {"rmax": rmax, "rmin": 0.25, "dmax": 0.5}
        x, dy, _ = case.batch(step)
        check_step(layer, oracle, x, dy, training=True)
    with pytest.raises(StopIteration):
        next(schedule)


def test_trainable_can_be_switched():
    case = replace(PLAIN, options={**PLAIN.options, "momentum": None})
    layer, oracle = layer_of(case), oracle_of(case)
    for step, trainable in enumerate([True, False, True, True]):
        layer.trainable = oracle.trainable = trainable
        x, dy, _ = case.batch(step)
        check_step(layer, oracle, x, dy, training=True)


@pytest.mark.parametrize(("given_dtype", "computed"), [("float32", np.float32), ("float64", np.float64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_a_given_dtype_casts_the_input(given_dtype, computed, dtype):
    case = replace(PLAIN, dtype=dtype)
    x, dy, _ = case.batch(0)
    layer = nbbn.BatchNormalization(axis=1, dtype=given_dtype)
    y, pullback = layer.vjp(x, training=True)
    twin = nbbn.BatchNormalization(axis=1)
    y_twin, pullback_twin = twin.vjp(x.astype(computed), training=True)
    assert y.dtype == computed
    assert bits(y) == bits(y_twin)
    grads, grads_twin = pullback(dy.astype(computed)), pullback_twin(dy.astype(computed))
    assert grads.inputs.dtype == dtype
    np.testing.assert_array_equal(grads.inputs, grads_twin.inputs.astype(dtype))
    assert grads.gamma.dtype == layer.gamma.dtype == computed
