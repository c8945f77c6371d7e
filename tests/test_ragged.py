"""Virtual batches of any batch size, and of contiguous samples."""

import copy
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nbbn
from nbbn.core import layout
from tests.oracle.agreement import check, gated_as, gradients, output, saturated, state, state_dtype
from tests.oracle.compiled import DTYPES, INTERPRETED
from tests.oracle.contract import THRESHOLDS
from tests.oracle.reference import spread_mask
from tests.oracle.strategies import cases

PROFILE = settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
CHOICES = [("last", "interleaved"), ("last", "contiguous"), ("spread", "interleaved"), ("spread", "contiguous")]


def groups_of(samples, size, ragged, order):
    """The samples of each group, from the definition."""
    everything = np.arange(samples)
    if ragged == "spread":
        many = -(-samples // size)
        if order == "contiguous":
            return np.array_split(everything, many)
        return [everything[g::many] for g in range(many)]
    whole = samples // size
    full, rest = everything[: whole * size], everything[whole * size :]
    found = [*full.reshape(whole, size)] if order == "contiguous" else [full[g::whole] for g in range(whole)]
    return [*found, rest] if rest.size else found


@pytest.mark.parametrize(
    ("ragged", "order", "expected"),
    [
        ("last", "interleaved", [[0, 2, 4, 6], [1, 3, 5, 7], [8, 9]]),
        ("last", "contiguous", [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]),
        ("spread", "interleaved", [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]),
        ("spread", "contiguous", [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]),
    ],
)
def test_members(ragged, order, expected):
    lay = layout.layout((10, 3), (1,), 4, ragged, order == "contiguous")
    assert [list(range(10)[s]) for s in lay.members()] == expected


@pytest.mark.parametrize(("ragged", "order"), CHOICES)
def test_every_batch_is_cut_as_defined(ragged, order):
    for samples in range(1, 30):
        for size in range(1, 12):
            lay = layout.layout((samples, 2), (1,), size, ragged, order == "contiguous")
            expected = groups_of(samples, size, ragged, order)
            assert [list(range(samples)[s]) for s in lay.members()] == [list(g) for g in expected]
            assert lay.groups == len(expected)
            sizes = [len(g) for g in expected]
            assert max(sizes) <= size
            assert ragged == "last" or max(sizes) - min(sizes) <= 1


def test_what_divides_is_one_step():
    """Also where the groups are contiguous, and where several sizes come out as one."""
    for lay in (
        layout.layout((8, 5, 3), (2,), 4, "last", False),
        layout.layout((8, 5, 3), (2,), 4, "error", True),
        layout.layout((9, 5, 3), (2,), 4, "spread", True),  # three of three
        layout.layout((3, 5, 3), (2,), 4, "last", False),  # one
    ):
        assert not lay.parts


# -- the oracle ------------------------------------------------------------------------------------------------------


def padded(groups):
    """Where each sample goes in an interleaved batch whose groups are all as large as the largest: its size, places."""
    many, size = len(groups), max(len(g) for g in groups)
    places = np.empty(sum(len(g) for g in groups), int)
    for g, members in enumerate(groups):
        places[members] = np.arange(len(members)) * many + g
    return size, places


@st.composite
def ragged_cases(draw):
    epilogue = draw(st.booleans()) and INTERPRETED
    case = draw(cases(DTYPES, epilogue).filter(lambda c: "virtual_batch_size" in c.options))
    size, samples = draw(st.integers(1, 5)), draw(st.integers(1, 13))
    options = {**case.options, "trainable": True, "virtual_batch_size": size}
    return replace(case, shape=(samples, *case.shape[1:]), options=options)


@PROFILE
@given(ragged_cases(), st.sampled_from(CHOICES))
def test_agrees_with_the_oracle(case, choice):
    """What is left to fill the smaller groups up is there, and masked, for the oracle."""
    follow(case, *choice)


def follow(case, ragged, order):
    samples, dtype = case.shape[0], case.dtype
    groups = groups_of(samples, case.options["virtual_batch_size"], ragged, order)
    size, places = padded(groups)
    layer = nbbn.BatchNormalization(**case.options, ragged=ragged, virtual_batch_order=order)
    whole = (size * len(groups), *case.shape[1:])
    oracle = replace(case, shape=whole, options={**case.options, "virtual_batch_size": size}).reference()
    layer(np.zeros(case.shape, dtype))
    layer.set_weights(case.weights(oracle))
    oracle.set_weights(case.weights(oracle))
    for step in range(2):
        (x, dy, mask), residual = case.batch(step), case.residual(step)

        def pad(values, whole=whole):
            found = np.zeros(whole)
            found[places] = values
            return found

        before = [w.copy() for w in oracle.get_weights()]
        weights = pad(spread_mask(mask, case.shape, oracle.features))
        found = oracle(pad(x), True, weights, residual=None if residual is None else pad(residual))
        y, pullback = layer.vjp(x, training=True, mask=mask, residual=residual)
        check("y", y, found.y[places], output(found, dtype)[places], dtype)
        gate = found.y.copy()
        gate[places] = y
        found = gated_as(found, gate, dtype)
        stored = state_dtype(dtype)
        for name, old, value in zip(oracle.weight_names, before, oracle.get_weights(), strict=True):
            bound = state(name, old, value, found, dtype)
            check(name, layer.get_state()[name], saturated(value, stored), bound, stored)
        grads, expected, bounds = pullback(dy), found.gradients(pad(dy)), gradients(found, pad(dy), dtype)
        check("dx", grads.inputs, expected.inputs[places], bounds.inputs[places], dtype)
        for name in ("gamma", "beta"):
            if getattr(expected, name) is not None:
                check(name, getattr(grads, name), getattr(expected, name), getattr(bounds, name), stored)
        if residual is not None:
            np.testing.assert_array_equal(grads.residual, np.where(found.gate[places], dy, np.zeros((), dtype)))
        oracle.set_weights([layer.get_state()[name] for name in oracle.weight_names])


# -- the layer -------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
X, DY, RESIDUAL = (RNG.normal(1, 2, (10, 3, 5)).astype(np.float32) for _ in range(3))
EVERY_CHOICE = pytest.mark.parametrize(("ragged", "order"), CHOICES)


def layer_of(ragged, order, **options):
    options = {"axis": 1, "momentum": 0.5, "virtual_batch_size": 4, **options}
    return nbbn.BatchNormalization(**options, ragged=ragged, virtual_batch_order=order)


def pulled(layer, x, dy, out=None, gradient_out=None, **operands):
    y, pullback = layer.vjp(x, training=True, out=out, **operands)
    return [y.copy(), *(g for g in pullback(dy, out=gradient_out) if g is not None)]


@pytest.mark.parametrize("choices", [{}, {"parallel": False}, {"parallel": True}, {"one_pass": False}], ids=str)
@pytest.mark.parametrize("with_operands", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [((12, 5, 23), 1), ((12, 3, 7), 1), ((12, 2, 7, 5), [1, 3]), ((12, 40), 1)])
def test_contiguous_groups_have_the_bits_of_others(shape, axis, with_operands, choices):
    """Wherever in memory the samples of a group lie, in whatever order tasks run. Several of all that there can be."""
    rng = np.random.default_rng(0)
    x, dy, residual = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
    given = {"mask": rng.random(shape[0]) < 0.7, "residual": residual} if with_operands else {}
    apart = np.arange(12).reshape(4, 3).T.ravel()  # sample v of group g from place 3 g + v to 4 v + g

    def results(order, places):
        layer = nbbn.BatchNormalization(
            axis, virtual_batch_size=3, virtual_batch_order=order, activation="relu" if with_operands else None
        )
        layer.build(shape)
        nbbn.force(layer, thresholds=small, **choices)
        batch = {name: value[places] for name, value in given.items()}
        y, pullback = layer.vjp(x[places], training=True, **batch)
        found, gradients = np.empty((2, *shape), np.float32), pullback(dy[places])
        found[0, places], found[1, places] = y, gradients[0]
        return [found, *gradients[1:3], *layer.get_weights()]

    small = {**THRESHOLDS["cpu"], "tile_elements": 200}
    expected = results("interleaved", apart)
    for one, two in zip(results("contiguous", np.arange(12)), expected, strict=True):
        np.testing.assert_array_equal(one, two)


@EVERY_CHOICE
def test_outputs_may_be_given(ragged, order):
    layer = layer_of(ragged, order, activation="relu")
    expected = pulled(layer, X, DY, residual=RESIDUAL, update_statistics=False)
    dy = DY.copy()
    found = pulled(layer, X, dy, np.empty_like(X), dy, residual=RESIDUAL, update_statistics=False)
    assert found[1] is dy
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    for name, into in (("the input", X.copy()), ("the residual", RESIDUAL.copy())):
        x = into if name == "the input" else X
        residual = into if name == "the residual" else RESIDUAL
        y = layer(x, training=True, residual=residual, out=into, update_statistics=False)
        assert y is into
        np.testing.assert_array_equal(y, expected[0], err_msg=name)
    memory = np.zeros((11, 3, 5), np.float32)  # an output that has parts of the input in other places
    memory[:10] = X
    layer(memory[:10], training=True, residual=RESIDUAL, out=memory[1:], update_statistics=False)
    np.testing.assert_array_equal(memory[1:], expected[0])


@EVERY_CHOICE
def test_calls_agree_with_their_halves(ragged, order):
    whole, halves = layer_of(ragged, order, renorm=True), layer_of(ragged, order, renorm=True)
    expected = pulled(whole, X, DY)
    step = halves.start(X)
    y = step.finish(step.message[None])
    found = [y, *(g for g in step.pulled(step.pull(DY)[None]) if g is not None)]
    for a, b in zip([*found, *halves.get_weights()], [*expected, *whole.get_weights()], strict=True):
        np.testing.assert_array_equal(a, b)


def test_each_group_weighs_the_same():
    x = np.array([[0.0], [2.0], [4.0], [6.0], [10.0]])  # groups (0, 2), (4, 6), (10)
    layer = layer_of("last", "contiguous", axis=-1, virtual_batch_size=2, momentum=0.0)
    layer(x, training=True)
    assert layer.moving_mean.item() == (1 + 5 + 10) / 3
    assert layer.moving_variance.item() == (1 + 1 + 0) / 3


@EVERY_CHOICE
def test_inference_and_empty_batches(ragged, order):
    layer = layer_of(ragged, order)
    layer(X, training=True)
    plain = nbbn.BatchNormalization(axis=1, momentum=0.5)
    plain.build(X.shape)
    plain.set_weights([w.ravel() for w in layer.get_weights()])
    np.testing.assert_array_equal(layer(X), plain(X))
    before = [w.copy() for w in layer.get_weights()]
    y, pullback = layer.vjp(X[:0], training=True)
    assert y.shape == pullback(DY[:0]).inputs.shape == (0, 3, 5)
    for a, b in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


@EVERY_CHOICE
def test_configs_and_copies(ragged, order, tmp_path):
    layer = layer_of(ragged, order)
    layer(X, training=True)
    config = layer.get_config()
    assert config["ragged"] == layer.ragged == ragged
    assert config.get("virtual_batch_order", "interleaved") == layer.virtual_batch_order == order
    layer.save(tmp_path / "layer.npz")
    for other in (nbbn.load(tmp_path / "layer.npz"), copy.deepcopy(layer)):
        assert other.get_config() == config
        np.testing.assert_array_equal(other(X, training=True), layer(X, training=True, update_statistics=False))


def test_a_default_is_in_no_config():
    config = nbbn.BatchNormalization(virtual_batch_size=4).get_config()
    assert not {"ragged", "virtual_batch_order"} & set(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ragged": "first", "virtual_batch_size": 2}, r"ragged must be one of 'error', 'last', 'spread'.*'first'"),
        ({"ragged": None, "virtual_batch_size": 2}, r"ragged must be one of .* received None"),
        ({"ragged": "last"}, r"ragged='last' needs a virtual_batch_size"),
        ({"virtual_batch_order": "sorted", "virtual_batch_size": 2}, r"virtual_batch_order must be one of .*'sorted'"),
        ({"virtual_batch_order": "contiguous"}, r"virtual_batch_order='contiguous' needs a virtual_batch_size"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        nbbn.BatchNormalization(**options)


def test_an_error_by_default():
    layer = nbbn.BatchNormalization(axis=1, virtual_batch_size=4, virtual_batch_order="contiguous")
    with pytest.raises(ValueError, match=r"virtual_batch_size=4 must divide .*ragged.* 10 samples"):
        layer(X, training=True)
    assert not layer.built


def test_synchronized():
    """Group g of a rank is merged with group g of the other, whatever their sizes."""
    other = np.concatenate([X[3:], X[:4]])  # 11 samples: three groups, too
    halves = []

    def rank(group, x):
        layer = nbbn.SyncBatchNormalization(
            axis=1, virtual_batch_size=4, ragged="last", virtual_batch_order="contiguous", momentum=0.5, group=group
        )
        halves.append((group.rank, layer(x, training=True), layer.get_weights()))

    groups = nbbn.sync.threads(2)
    workers = [threading.Thread(target=rank, args=pair) for pair in zip(groups, (X, other), strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    (_, y, weights), (_, z, same) = sorted(halves, key=lambda half: half[0])
    for a, b in zip(weights, same, strict=True):
        np.testing.assert_array_equal(a, b)
    means = []
    for g, members in enumerate(groups_of(10, 4, "last", "contiguous")):
        theirs = groups_of(11, 4, "last", "contiguous")[g]
        together = np.concatenate([X[members], other[theirs]]).astype(float)
        means.append(together.mean((0, 2), keepdims=True))
        expected = (together - means[-1]) / np.sqrt(together.var((0, 2), keepdims=True) + 1e-3)
        np.testing.assert_allclose(np.concatenate([y[members], z[theirs]]), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weights[2].ravel(), 0.5 * np.mean(means, 0).ravel(), rtol=1e-6)


def test_explain_tells_of_each_part():
    text = str(nbbn.explain(layer_of("last", "interleaved"), X, training=True))
    assert text.count("step          reduce") == 2


def test_interleaved_groups_that_have_a_view_only_one_by_one():
    """Channels between reduced dimensions, and groups that are large enough for a step of their own."""
    x = np.random.default_rng(0).normal(size=(4, 64, 3, 70))
    layer = nbbn.BatchNormalization(axis=2, virtual_batch_size=2, dtype="float64")
    y = layer(x, training=True)
    for group in (slice(0, None, 2), slice(1, None, 2)):
        own = x[group]
        mean, variance = own.mean((0, 1, 3), keepdims=True), own.var((0, 1, 3), keepdims=True)
        np.testing.assert_allclose(y[group], (own - mean) / np.sqrt(variance + 1e-3), rtol=0, atol=1e-12)
