"""`lengths` of padded sequences are the mask that they stand for, of which the sums read what counts."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16

import nbbn
from nbbn.engine import dispatcher
from tests.helpers.engines import watch
from tests.oracle.agreement import check_step
from tests.oracle.compiled import DTYPES, INTERPRETED
from tests.oracle.reference import feature_axes
from tests.oracle.strategies import cases

PROFILE = settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
RNG = np.random.default_rng(0)
X, DY = (RNG.normal(3, 2, (6, 7, 3)).astype(np.float32) for _ in range(2))
LENGTHS = np.array([0, 7, 3, 3, 0, 5])


def mask_of(lengths, shape, axis=-1):
    """Of the input's rank, straight from the definition."""
    features = feature_axes(axis, len(shape))
    steps = next(i for i in range(1, len(shape)) if i not in features)
    mask = np.zeros(shape, bool)
    for n, length in enumerate(lengths):
        np.moveaxis(mask[n], steps - 1, 0)[:length] = True
    return mask


class WithLengths:
    """A layer that is called with lengths in the place of a mask."""

    def __init__(self, layer, lengths):
        self._layer, self._lengths = layer, lengths

    def vjp(self, x, mask, **options):
        return self._layer.vjp(x, lengths=self._lengths, **options)

    def get_state(self):
        return self._layer.get_state()


@st.composite
def cases_with_lengths(draw):
    def fits(case):
        features = feature_axes(case.options["axis"], len(case.shape))
        return 0 not in features and len(features) < len(case.shape) - 1

    case = draw(cases(DTYPES, epilogue=draw(st.booleans()) and INTERPRETED).filter(fits))
    features = feature_axes(case.options["axis"], len(case.shape))
    most = next(n for i, n in enumerate(case.shape) if i and i not in features)
    lengths = draw(st.lists(st.integers(0, most), min_size=case.shape[0], max_size=case.shape[0]))
    return case, lengths


@PROFILE
@given(cases_with_lengths())
def test_agrees_with_the_oracle(drawn):
    case, lengths = drawn
    before, dispatcher.OWN_REDUCTION = dispatcher.OWN_REDUCTION, 0  # also of small groups
    try:
        layer, oracle = nbbn.BatchNormalization(**case.options, adjustment=case.adjustment()), case.reference()
        layer(np.zeros(case.shape, case.dtype))
        layer.set_weights(case.weights(oracle))
        oracle.set_weights(case.weights(oracle))
        mask = mask_of(lengths, case.shape, case.options["axis"])
        for step in range(2):
            x, dy, _ = case.batch(step)
            x = np.array(x)
            options = {} if case.residual_form is None else {"residual": case.residual(step)}
            check_step(WithLengths(layer, lengths), oracle, x, dy, mask, **options)
    finally:
        dispatcher.OWN_REDUCTION = before


def calls_agree(x, dy, lengths, axis, **options):
    """y, gradients and weights of a call with lengths, and of one with the mask."""
    found, expected = [], []
    for results, what in ((found, {"lengths": lengths}), (expected, {"mask": mask_of(lengths, x.shape, axis)})):
        layer = nbbn.BatchNormalization(axis=axis, momentum=0.5, **options)
        for _ in range(2):
            y, pullback = layer.vjp(x, training=True, **what)
        results += [y, *(g for g in pullback(dy)[:3]), *layer.get_weights()]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        bound = 1e-12 if a.dtype == np.float64 else 1e-5  # a few roundings: both sum in float64, in other orders
        np.testing.assert_allclose(a, b, rtol=bound, atol=bound)


SHAPES = [
    ((6, 7, 3), -1),
    ((6, 3, 7), 1),
    ((6, 3, 7, 4), 1),
    ((6, 7, 4, 3), -1),
    ((6, 4, 7, 3), [1, 3]),
    ((6, 7, 3, 4), 2),  # no view has the steps of a sample together: a mask
    ((40, 90, 5), -1),  # several chunks
    ((40, 5, 90), 1),
    ((5, 30, 4100), -1),  # several tiles
]


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("own", [0, 1 << 40])
def test_virtual_batches(shape, axis, own, monkeypatch):
    monkeypatch.setattr(dispatcher, "OWN_REDUCTION", own)
    rng = np.random.default_rng(1)
    dtype = np.float64 if shape == SHAPES[0][0] else np.float32  # one with more digits to agree in
    x, dy = (rng.normal(mean, 1, shape).astype(dtype) for mean in (2, 0))
    lengths = rng.integers(0, shape[1 if axis != 1 and axis != [1, 3] else 2] + 1, shape[0])
    calls_agree(x, dy, lengths, axis)
    calls_agree(x, dy, lengths, axis, virtual_batch_size=4, ragged="spread", renorm=True)
    calls_agree(x, dy, lengths, axis, virtual_batch_size=4, ragged="last", virtual_batch_order="contiguous")


@pytest.mark.parametrize("forced", [{"parallel": False}, {"parallel": True}, {"schedule": "rows"}], ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((40, 90, 50), -1), ((40, 50, 90), 1)], ids=str)
def test_threads_change_no_bit(shape, axis, forced):
    x = np.random.default_rng(1).normal(2, 1, shape).astype(np.float32)
    lengths = np.random.default_rng(2).integers(0, 91, 40)
    layers = [nbbn.BatchNormalization(axis=axis, momentum=0.0) for _ in range(2)]
    nbbn.force(layers[1], **forced)
    y, z = (layer(x, training=True, lengths=lengths) for layer in layers)
    if "schedule" in forced:
        np.testing.assert_allclose(y, z, rtol=1e-5, atol=1e-6)  # another order
    else:
        np.testing.assert_array_equal(y, z)
        np.testing.assert_array_equal(layers[0].get_weights()[2:], layers[1].get_weights()[2:])


@pytest.mark.parametrize("form", ["as it is", "Fortran", "every second", "backwards"])
def test_memory_layouts(form):
    x = X
    if form == "Fortran":
        x = np.asfortranarray(X)
    elif form == "every second":
        x = np.repeat(np.repeat(X, 2, 1), 2, 2)[:, ::2, ::2]
    elif form == "backwards":
        x = np.ascontiguousarray(X[:, ::-1])[:, ::-1]
    calls_agree(x, DY, LENGTHS, -1)


# -- what is excluded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "dtype"),
    [(-1, np.float32), (1, np.float32), (-1, bfloat16), (1, np.float16), (1, np.float64)],
    ids=lambda v: {-1: "rows", 1: "planes"}[v] if isinstance(v, int) else np.dtype(v).name,
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # 1e30 in float16
def test_excluded_elements_are_not_read(axis, dtype):
    """Whatever they are: no bit of what counts depends on them, and there is no step that reads a mask."""
    x = np.ascontiguousarray(np.moveaxis(X, -1, axis)).astype(dtype)
    mask = mask_of(LENGTHS, x.shape, axis)
    found = []
    for beyond in (0, np.nan, np.inf, 1e30):
        layer = nbbn.BatchNormalization(axis=axis, momentum=0.5)
        steps = watch(layer)
        y = layer(np.where(mask, x, np.asarray(beyond, dtype)), training=True, lengths=LENGTHS)
        assert steps == ["reduce_sequences", "apply"]
        found.append([y[mask], *layer.get_weights()])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(a, b)


def test_gradients_of_what_is_excluded():
    x = np.where(mask_of(LENGTHS, X.shape), X, np.float32(np.nan))
    _, pullback = nbbn.BatchNormalization().vjp(x, training=True, lengths=LENGTHS)
    found = pullback(DY)
    assert all(np.isfinite(g).all() for g in (found.inputs, found.gamma, found.beta))
    assert (found.inputs[np.isnan(x)] == 0).all()


def test_nothing_at_all():
    layer = nbbn.BatchNormalization(momentum=0.0)
    y, pullback = layer.vjp(X, training=True, lengths=[0] * 6)
    assert np.isfinite([y, pullback(DY).inputs]).all()
    np.testing.assert_array_equal(layer.moving_mean, np.zeros(3))
    np.testing.assert_array_equal(layer.moving_variance, np.ones(3))
    assert layer(X[:0], training=True, lengths=[]).shape == (0, 7, 3)


def test_all_steps_are_a_call_without():
    one, other = nbbn.BatchNormalization(), nbbn.BatchNormalization()
    y, z = one(X, training=True, lengths=[7] * 6), other(X, training=True)
    np.testing.assert_allclose(y, z, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(one.moving_variance, other.moving_variance, rtol=1e-6)


def test_ignored_in_inference():
    layer = nbbn.BatchNormalization()
    np.testing.assert_array_equal(layer(X, lengths=LENGTHS), layer(X))


# -- how they are passed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple, np.int8, np.uint8, np.int64, np.uint64])
def test_any_integers(kind):
    lengths = kind(LENGTHS.tolist()) if kind in (list, tuple) else LENGTHS.astype(kind)
    expected = nbbn.BatchNormalization()(X, training=True, lengths=LENGTHS)
    np.testing.assert_array_equal(nbbn.BatchNormalization()(X, training=True, lengths=lengths), expected)


def test_they_may_change_afterwards():
    lengths = LENGTHS.copy()
    _, pullback = nbbn.BatchNormalization().vjp(X, training=True, lengths=lengths)
    expected = pullback(DY).inputs
    lengths[:] = 1
    np.testing.assert_array_equal(pullback(DY).inputs, expected)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (LENGTHS.astype(float), TypeError, r"lengths must be integers; received dtype float64"),
        (LENGTHS > 0, TypeError, r"lengths must be integers; received dtype bool"),
        ("six", TypeError, r"lengths must be integers; received 'six'"),
        (LENGTHS.astype(object), TypeError, r"lengths must be integers; received array\(.*object\)"),
        (np.ma.array(LENGTHS), TypeError, r"lengths must be a plain array; received a masked array"),
        (LENGTHS[:5], ValueError, r"lengths must have shape \(6,\), one for each sample; received \(5,\)"),
        (3, ValueError, r"lengths must have shape \(6,\).* received \(\)"),
        (LENGTHS + 1, ValueError, r"from 0 to 7, the size of dimension 1 .* from 1 to 8"),
        (LENGTHS - 1, ValueError, r"from 0 to 7, .* from -1 to 6"),
    ],
)
def test_errors(lengths, error, message):
    layer = nbbn.BatchNormalization()
    for call in (layer, layer.vjp):
        with pytest.raises(error, match=message):
            call(X, training=True, lengths=lengths)
    with pytest.raises(error, match=message):
        layer.start(X, lengths=lengths)
    assert not layer.built


@pytest.mark.parametrize(("shape", "axis"), [((6, 3), -1), ((6,), 0), ((6, 7, 3), [1, 2]), ((6, 7, 3), 0)])
def test_inputs_without_steps(shape, axis):
    with pytest.raises(ValueError, match=r"lengths need .* dimension.* received one of rank"):
        nbbn.BatchNormalization(axis=axis)(np.ones(shape), training=True, lengths=[1] * 6)


def test_not_beside_a_mask():
    layer = nbbn.BatchNormalization()
    for call in (layer, layer.vjp, layer.start):
        with pytest.raises(ValueError, match=r"mask and lengths both .* received both"):
            call(X, lengths=LENGTHS, mask=np.ones(6, bool))


@pytest.mark.parametrize("lengths", [LENGTHS + 1, LENGTHS - 1, LENGTHS[:5]])
def test_the_dispatcher_reads_nothing_beside_the_input(lengths):
    with pytest.raises(ValueError, match=r"lengths must .* received"):
        nbbn.Dispatcher(nbbn.Options()).reduce(X, lengths=lengths)


def test_halves_and_accumulation():
    whole, halves, parts = (nbbn.BatchNormalization(momentum=0.5) for _ in range(3))
    y, pullback = whole.vjp(X, training=True, lengths=LENGTHS)
    step = halves.start(X, lengths=LENGTHS)
    np.testing.assert_array_equal(step.finish(step.message[None]), y)
    np.testing.assert_allclose(step.pulled(step.pull(DY)[None]).inputs, pullback(DY).inputs, rtol=1e-5, atol=1e-6)
    with nbbn.accumulate(parts) as batch:
        started = [batch.start(X[s], lengths=LENGTHS[s]) for s in (slice(0, 2), slice(2, 6))]
        found = np.concatenate([part.finish() for part in started])
    np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-6)
    for layer in (halves, parts):
        np.testing.assert_allclose(layer.moving_variance, whole.moving_variance, rtol=1e-6)


def test_warmup_knows_the_kernels():
    from nbbn.deploy.needed import kernels

    layer = nbbn.BatchNormalization()
    names = [k[0] for k in kernels(layer, X.shape, training=True, gradients=True, lengths=LENGTHS)]
    assert names == ["reduce_sequences", "finish", "apply", "backward"]
