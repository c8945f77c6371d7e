"""population_statistics(): against NumPy in float64, of all values that a layer has got."""

import contextlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

import nbbn
from nbbn.compat import v1
from nbbn.sync.group import SyncError
from tests.helpers.processes import check

EPSILON = 1e-3
# Moments and state are float64 here. In float32, a state is rounded once.
EXACT, ROUNDED = 1e-12, np.finfo(np.float32).eps


def data(*shape, seed=0, mean=3.0):
    return np.random.default_rng(seed).normal(mean, 2.0, shape)


def training(*layers):
    """The forward function of layers one after another."""

    def forward(x):
        for layer in layers:
            x = layer(x, training=True)
        return x

    return forward


def uneven(x):
    """Batches of 4, and one of 1 or 2 or 3 where some are left; some samples are far from the others."""
    return np.split(x, range(4, len(x), 4))


X = data(42, 5) * np.linspace(1, 3, 42)[:, None]  # so that batches differ


def check_state(layer, x, axis=0, tolerance=EXACT, variance=None):
    expected = x.var(axis) if variance is None else variance
    np.testing.assert_allclose(layer.moving_mean.ravel(), x.mean(axis).ravel(), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(layer.moving_variance.ravel(), expected.ravel(), rtol=tolerance)


def same(layer, before):
    return all(np.array_equal(a, b) for a, b in zip(layer.get_weights(), before, strict=True))


# --- one layer ------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 2, "ragged": "last"}], ids=str)
def test_skip_nonfinite_leaves_out_a_batch_of_a_channel(momentum, options):
    x, layer = X.copy(), nbbn.BatchNormalization(momentum=momentum, debias=True, skip_nonfinite=True, **options)
    x[6, 1], x[41, 2] = np.nan, np.inf  # in the second batch of eleven, and in the last one
    nbbn.population_statistics(layer, uneven(x), training(layer))
    kept = np.delete(X, range(4, 8), axis=0)[:, 1], X[:40, 2]
    for channel, values in ((0, X[:, 0]), (1, kept[0]), (2, kept[1])):
        np.testing.assert_allclose(layer.moving_mean.ravel()[channel], values.mean(), rtol=EXACT)
        np.testing.assert_allclose(layer.moving_variance.ravel()[channel], values.var(), rtol=EXACT)
    calls = [11, 10, 10, 11, 11] if momentum is None else [1] * 5
    np.testing.assert_array_equal(layer.seen_mean.ravel(), calls)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("momentum", [0.99, 0.0, 1.0, None])
def test_all_values_are_one_population(dtype, momentum):
    x, layer = X.astype(dtype), nbbn.BatchNormalization(momentum=momentum)
    layer(x[:3], training=True)
    gamma = layer.gamma.copy()
    nbbn.population_statistics(layer, uneven(x), training(layer))
    check_state(layer, x.astype(np.float64), tolerance=EXACT if dtype is np.float64 else ROUNDED)
    np.testing.assert_array_equal(layer.gamma, gamma)
    assert layer.momentum == momentum
    assert layer.trainable


def test_a_mean_of_batch_variances_is_another_number():
    """Why there is this function: with batches of 4, it lacks a quarter of the variance."""
    x = data(400, 3)
    layer, averaging = (nbbn.BatchNormalization(momentum=momentum) for momentum in (0.99, None))
    nbbn.population_statistics(layer, uneven(x), training(layer))
    for batch in uneven(x):
        averaging(batch, training=True)
    lacking = 1 - averaging.moving_variance / layer.moving_variance
    assert (lacking > 0.15).all()
    np.testing.assert_allclose(averaging.moving_mean, layer.moving_mean, rtol=1e-12)


def test_it_may_build_the_layer():
    layer = nbbn.BatchNormalization(axis=1)
    x = data(6, 3, 4, 5)
    nbbn.population_statistics([layer], uneven(x), training(layer))
    check_state(layer, x, (0, 2, 3))


@pytest.mark.parametrize("shape", [(12, 4, 3), (12, 3, 4, 2)])
@pytest.mark.parametrize("axis", [-1, 1, [1, -1]])
def test_axes(shape, axis):
    layer, x = nbbn.BatchNormalization(axis=axis), data(*shape)
    nbbn.population_statistics(layer, uneven(x), training(layer))
    kept = {a % len(shape) for a in np.atleast_1d(axis)}
    check_state(layer, x, tuple({*range(len(shape))} - kept))


@pytest.mark.parametrize("virtual", [None, 2])
@pytest.mark.parametrize("layer_has_it", [None, True])
def test_bessels_correction_is_the_arguments(virtual, layer_has_it):
    x = X[:40]
    layer = nbbn.BatchNormalization(virtual_batch_size=virtual, bessel_correction=layer_has_it)
    nbbn.population_statistics(layer, uneven(x), training(layer))
    check_state(layer, x)
    nbbn.population_statistics(layer, uneven(x), training(layer), bessel_correction=True)
    check_state(layer, x, variance=x.var(0, ddof=1))


@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 2}, {"momentum": None}], ids=str)
def test_renorm(options):
    """Section 3 of the rules, as after one step with momentum 0 on all of the data."""
    x = X[:40]
    layer = nbbn.BatchNormalization(renorm=True, renorm_clipping={"rmax": lambda: 3.0}, **options)
    layer(x[:4], training=True)
    nbbn.population_statistics(layer, uneven(x), training(layer))
    check_state(layer, x)
    sigma = np.sqrt(x.var(0) + EPSILON)
    for name, expected in (("moving_stddev", sigma), ("renorm_stddev", sigma), ("renorm_mean", x.mean(0))):
        np.testing.assert_allclose(getattr(layer, name).ravel(), expected, rtol=EXACT, err_msg=name)
    if not options:
        whole = nbbn.BatchNormalization(renorm=True, momentum=0.0, renorm_momentum=0.0)
        whole(x, training=True)
        for a, b in zip(layer.get_weights(), whole.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=EXACT)
    with pytest.raises(ValueError, match="not possible with renorm"):
        nbbn.population_statistics(layer, uneven(x), training(layer), bessel_correction=True)


def test_counts_are_of_training_calls():
    """One more call is then one of twelve: the average goes on."""
    layer = nbbn.BatchNormalization(momentum=None)
    layer(X, training=True)
    nbbn.population_statistics(layer, uneven(X), training(layer))
    assert layer.seen_mean.tolist() == layer.seen_variance.tolist() == [11.0] * 5
    layer(X + 1, training=True)
    np.testing.assert_allclose(layer.moving_mean, X.mean(0) + 1 / 12, rtol=EXACT)


def test_masks_and_what_no_batch_has_a_value_of():
    layer = nbbn.BatchNormalization(momentum=None)
    weights = np.random.default_rng(1).uniform(0.5, 2, X.shape)
    weights[:, 2] = 0
    weights[4:8, 1] = 0
    layer(X, training=True)
    before = {n: getattr(layer, n).copy() for n in ("moving_mean", "moving_variance", "seen_mean")}
    poisoned = np.where(weights > 0, X, np.nan)
    batches = list(zip(uneven(poisoned), uneven(weights), strict=True))
    nbbn.population_statistics(layer, batches, lambda b: layer(b[0], training=True, mask=b[1]))
    for c in (0, 1, 3, 4):
        mean = np.average(X[:, c], weights=weights[:, c])
        np.testing.assert_allclose(layer.moving_mean[c], mean, rtol=EXACT)
        spread = np.average((X[:, c] - mean) ** 2, weights=weights[:, c])
        np.testing.assert_allclose(layer.moving_variance[c], spread, rtol=EXACT)
    assert layer.seen_mean.tolist() == [11, 10, 1, 11, 11]
    for name, old in before.items():
        assert getattr(layer, name)[2] == old[2]


def test_calls_that_do_not_count():
    layer = nbbn.BatchNormalization()

    def forward(x):
        layer(x[:0], training=True)
        layer(x - 7, training=True, update_statistics=False)
        layer(x * 5)
        layer.start(x).finish(layer.start(x).message[None])

    nbbn.population_statistics(layer, uneven(X), forward)
    check_state(layer, X)


def test_a_layer_that_is_called_twice_has_the_values_of_both_calls():
    layer = nbbn.BatchNormalization(momentum=None)
    forward = lambda x: (layer(x, training=True), layer(x + 9, training=True))  # noqa: E731
    nbbn.population_statistics([layer, layer], uneven(X), forward, sequential=True)
    check_state(layer, np.concatenate([X, X + 9]))
    assert (layer.seen_mean == 22).all()


def test_what_a_state_cannot_hold_is_its_largest_number():
    layer = nbbn.BatchNormalization(dtype="float32")
    x = np.array([[1e300], [-1e300], [1e300]]).astype(np.float64)
    with np.errstate(over="ignore"):
        batches = [x[:2] * 1e-262, x[2:] * 1e-262]  # 1e38: its square is no float32
    nbbn.population_statistics(layer, batches, training(layer))
    assert layer.moving_variance == np.finfo(np.float32).max


# --- networks ------------------------------------------------------


def network(**options):
    """Two layers with what is not linear between them: else the second one's input would hardly depend on the first."""
    layers = [nbbn.BatchNormalization(activation="relu", **options), nbbn.BatchNormalization(**options)]
    return layers, training(*layers)


@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"momentum": None}, {"virtual_batch_size": 2}], ids=str)
@pytest.mark.parametrize("make", [list, lambda b: lambda: iter(b)], ids=["again", "callable"])
def test_sequential_does_not_depend_on_the_batches(options, make):
    x, found = X[:40], []
    for size in (4, 20):
        layers, forward = network(**options)
        batches = make(np.split(x, 40 // size))
        nbbn.population_statistics(layers, batches, forward, sequential=True)
        y = np.maximum((x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON), 0)
        check_state(layers[0], x)
        check_state(layers[1], y)
        np.testing.assert_allclose(layers[0](x), y, rtol=EXACT, atol=EXACT)  # what inference will do
        assert all(layer.trainable and layer._FREEZES and layer._collector is None for layer in layers)
        found.append(layers[1].moving_variance.ravel())
    np.testing.assert_allclose(*found, rtol=EXACT)


def test_in_one_pass_later_layers_see_statistics_of_batches():
    """The consequence: with batches of 4 that differ, the variance of the second layer's input is another one."""
    (first, second), forward = network()
    nbbn.population_statistics([first, second], uneven(X), forward)
    check_state(first, X)
    each = [np.maximum((b - b.mean(0)) / np.sqrt(b.var(0) + EPSILON), 0) for b in uneven(X)]
    check_state(second, np.concatenate(each))
    one_pass = second.moving_variance
    nbbn.population_statistics([first, second], uneven(X), forward, sequential=True)
    difference = abs(one_pass / second.moving_variance - 1)
    assert difference.max() > 0.3
    assert difference.min() > 0.01


def test_sequential_with_layers_of_tensorflow_1():
    """They normalize with the batch also when they are not trainable, and record updates."""
    layers = [v1.layers.BatchNormalization(), v1.layers.BatchNormalization()]
    nbbn.population_statistics(layers, uneven(X), training(*layers), sequential=True)
    check_state(layers[0], X)
    check_state(layers[1], (X - X.mean(0)) / np.sqrt(X.var(0) + EPSILON))
    assert [layer.updates for layer in layers] == [[], []]
    assert not any(layer._FREEZES for layer in layers)
    layers[0].trainable = False
    np.testing.assert_allclose(layers[0](X, training=True).mean(0), 0, atol=1e-12)


def test_layers_that_are_not_named_train_as_usual():
    (first, second), forward = network()
    nbbn.population_statistics(second, uneven(X), forward)
    usual = nbbn.BatchNormalization()
    for batch in uneven(X):
        usual(batch, training=True)
    np.testing.assert_array_equal(first.moving_mean, usual.moving_mean)


# --- errors ------------------------------------------------------


class Stop(Exception):
    pass


def failing(forward, when):
    """The function, which raises Stop in this call."""
    calls = itertools.count(1)

    def forward_or_stop(x):
        if next(calls) == when:
            raise Stop
        forward(x)

    return forward_or_stop


@pytest.mark.parametrize(("sequential", "when"), [(False, 1), (False, 11), (True, 4), (True, 12), (True, 22)])
@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"momentum": None}], ids=str)
def test_after_an_error_all_is_as_before(sequential, when, options):
    """Wherever it happens: in the first pass or, when one layer has its statistics, in the second."""
    layers, forward = network(**options)
    forward(X)
    before = [layer.get_weights() for layer in layers]
    with pytest.raises(Stop):
        nbbn.population_statistics(layers, uneven(X), failing(forward, when), sequential=sequential)
    assert all(map(same, layers, before))
    assert all(layer.trainable and layer._collector is None for layer in layers)
    forward(X)
    assert not any(map(same, layers, before))


@pytest.mark.parametrize("when", [3, 14])
def test_after_an_error_a_layer_that_was_not_built_has_its_initial_statistics(when):
    layers, forward = network()
    with pytest.raises(Stop):
        nbbn.population_statistics(layers, uneven(X), failing(forward, when), sequential=True)
    for layer in layers:
        assert (layer.moving_mean == 0).all()
        assert (layer.moving_variance == 1).all()


def built():
    layer = nbbn.BatchNormalization(name="it")
    layer.build((None, 5))
    return layer


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": 5}, TypeError, "layers must be nbbn.BatchNormalization layers; received 5"),
        ({"layers": [5]}, TypeError, "layers must be nbbn.BatchNormalization layers; received 5"),
        ({"layers": []}, ValueError, "received none"),
        ({"batches": 5}, TypeError, "batches must be an iterable.*received 5"),
        ({"batches": lambda: 5}, TypeError, "batches must be a callable that returns an iterable; it has returned 5"),
        ({"forward": 5}, TypeError, "forward must be a function of a batch; received 5"),
        ({"sequential": "yes"}, TypeError, "sequential must be"),
        ({"group": 5}, TypeError, r"group must have rank, size and all_gather\(\); received 5"),
        ({"bessel_correction": None}, TypeError, "bessel_correction must be"),
        ({"batches": []}, ValueError, "no batch had values for it"),
        ({"batches": [X[:0]]}, ValueError, "no batch had values for it"),
        ({"forward": lambda x: x}, ValueError, r"for it: forward\(batch\) must call it with training=True"),
        ({"batches": [X[:, :3]]}, ValueError, "inputs must have the shape"),
    ],
)
def test_errors(arguments, error, message):
    layer = built()
    before = layer.get_weights()
    with pytest.raises(error, match=message):
        nbbn.population_statistics(**{"layers": layer, "batches": [X], "forward": training(layer)} | arguments)
    assert same(layer, before)
    assert layer._collector is None


def test_a_layer_that_is_never_called_and_not_built():
    other = nbbn.BatchNormalization(name="other")
    with pytest.raises(ValueError, match="no batch had values for other"):
        nbbn.population_statistics([built(), other], [X], lambda x: x)


def test_frozen_layers_have_no_batch():
    layer = built()
    layer.trainable = False
    with pytest.raises(ValueError, match=r"layers must be trainable.*it is not"):
        nbbn.population_statistics(layer, [X], training(layer))


def test_batches_that_can_be_read_once():
    layers, forward = network()
    with pytest.raises(ValueError, match=r"read once for each layer with sequential=True.*received generator"):
        nbbn.population_statistics(layers, (b for b in uneven(X)), forward, sequential=True)
    nbbn.population_statistics(layers[0], (b for b in uneven(X)), training(layers[0]), sequential=True)
    check_state(layers[0], X)


def test_not_within_another_one():
    layer = built()
    with nbbn.accumulate(layer), pytest.raises(RuntimeError, match=r"it are in another accumulate\(\)"):
        nbbn.population_statistics(layer, [X], training(layer))
    with pytest.raises(RuntimeError, match=r"or population_statistics\(\) already"):
        nbbn.population_statistics(layer, [X], lambda x: nbbn.population_statistics(layer, [x], training(layer)))


# --- ranks ------------------------------------------------------


def on_ranks(functions, timeout=30):
    """What each function of a group returns or raises."""
    with ThreadPoolExecutor(len(functions)) as pool:
        groups = nbbn.sync.threads(len(functions), timeout)
        futures = [pool.submit(f, g) for f, g in zip(functions, groups, strict=True)]
        return [f.exception() or f.result() for f in futures]


@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"momentum": None}, {"virtual_batch_size": 2}], ids=str)
@pytest.mark.parametrize("sequential", [False, True])
def test_ranks_have_the_statistics_of_all(options, sequential):
    """Also with different numbers of batches, and none. All have the same bits."""
    x = X[:40]
    shares = [slice(0, 12), slice(12, 12), slice(12, 16), slice(16, 40)]

    def work(share, group):
        layers, forward = network(**options)
        for layer in layers:
            layer.build((None, 5), np.float64)
        batches = uneven(x[share]) if x[share].size else []
        nbbn.population_statistics(layers, batches, forward, sequential=sequential, group=group)
        return layers

    found = on_ranks([lambda group, share=share: work(share, group) for share in shares])
    alone, forward = network(**options)
    nbbn.population_statistics(alone, uneven(x), forward, sequential=sequential)
    for layers in found:
        for layer, other, one in zip(layers, found[0], alone, strict=True):
            assert same(layer, other.get_weights())
            for a, b in zip(layer.get_weights(), one.get_weights(), strict=True):
                np.testing.assert_allclose(a, b, rtol=EXACT, atol=EXACT)


def test_a_group_is_any_object_with_its_three_names():
    group = SimpleNamespace(rank=0, size=1, all_gather=lambda values: values[None])
    layer = nbbn.BatchNormalization()
    nbbn.population_statistics(layer, uneven(X), training(layer), group=group)
    check_state(layer, X)


@pytest.mark.parametrize("when", [1, 3, 8])
def test_a_rank_that_fails(when):
    """All raise, also in the second pass (4 batches are in the first one), and all are as before."""
    layers = [network() for _ in range(2)]
    for _, forward in layers:
        forward(X)
    before = [[layer.get_weights() for layer in pair] for pair, _ in layers]

    def work(rank, group):
        forward = failing(layers[rank][1], when if rank == 1 else None)
        nbbn.population_statistics(layers[rank][0], uneven(X[:16]), forward, sequential=True, group=group)

    errors = on_ranks([lambda group, rank=rank: work(rank, group) for rank in range(2)])
    assert all(isinstance(error, SyncError) and "rank 1 could not take part" in str(error) for error in errors)
    assert isinstance(errors[1].__cause__, Stop)
    for (pair, _), states in zip(layers, before, strict=True):
        assert all(map(same, pair, states))
        assert all(layer.trainable and layer._collector is None for layer in pair)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ({"epsilon": 1e-3}, {"epsilon": 1e-5}, "a checksum"),
        ({"channels": 5}, {"channels": 4}, "channels"),
        ({"bessel": True}, {}, "a checksum"),
        ({"dtype": "float32"}, {"dtype": "float64"}, "a checksum"),
        ({"build": False, "batches": []}, {}, "rank 0 could not take part"),
    ],
)
def test_ranks_that_do_not_do_the_same(one, other, message):
    def work(group, channels=5, bessel=False, build=True, batches=(X,), **options):
        layer = nbbn.BatchNormalization(**options)
        if build:
            layer.build((None, channels))
        forward = lambda x: layer(x[:, :channels], training=True)  # noqa: E731
        nbbn.population_statistics(layer, batches, forward, bessel_correction=bessel, group=group)

    errors = on_ranks([lambda group: work(group, **one), lambda group: work(group, **other)])
    assert all(isinstance(error, SyncError) and message in str(error) for error in errors)


@pytest.mark.parametrize(
    "arguments",
    [{"layers": 5}, {"batches": 5}, {"forward": 5}, {"sequential": "yes"}, {"bessel_correction": None}],
    ids=str,
)
def test_a_bad_argument_of_one_rank(arguments):
    """The others need not wait for it."""

    def work(group, arguments):
        layer = built()
        arguments = {"layers": layer, "batches": [X], "forward": training(layer)} | arguments
        nbbn.population_statistics(**arguments, group=group)

    errors = on_ranks([lambda group: work(group, {}), lambda group: work(group, arguments)], timeout=5)
    assert all(isinstance(error, SyncError) and "rank 1 could not take part" in str(error) for error in errors)
    assert isinstance(errors[1].__cause__, TypeError)


def test_a_layer_of_one_rank_that_is_measured_already():
    def work(group, busy):
        layer = built()
        with nbbn.accumulate(layer) if busy else contextlib.nullcontext():
            nbbn.population_statistics(layer, [X], training(layer), group=group)

    errors = on_ranks([lambda group, busy=busy: work(group, busy) for busy in (False, True)], timeout=5)
    assert all(isinstance(error, SyncError) and "rank 1 could not take part" in str(error) for error in errors)
    assert isinstance(errors[1].__cause__, RuntimeError)


def test_no_rank_has_any_data():
    def work(group):
        nbbn.population_statistics(built(), [], len, group=group)

    errors = on_ranks([work, work])
    assert all(type(error) is ValueError and "no batch had values" in str(error) for error in errors)


def test_layers_with_a_group_of_their_own():
    """They merge in each call already, so the group would count everything once for each rank."""

    def work(group, x, given):
        layer = nbbn.SyncBatchNormalization(group=group)
        nbbn.population_statistics(
            layer, [x[:5], x[5:]], training(layer), group=group if given else None, bessel_correction=True
        )
        return layer

    one, other = on_ranks([lambda g: work(g, X[:12], False), lambda g: work(g, X[12:], False)])
    check_state(one, X, variance=X.var(0, ddof=1))
    assert same(one, other.get_weights())
    (error,) = on_ranks([lambda g: work(g, X, True)])
    assert isinstance(error, SyncError)
    assert "group must be None for layers that have one" in str(error.__cause__)


def test_virtual_batches_without_a_sample_on_any_rank():
    """They have no groups."""

    def work(group):
        layer = nbbn.SyncBatchNormalization(group=group, virtual_batch_size=2)
        nbbn.population_statistics(layer, [X[:4], X[:0], X[4:]], training(layer))
        return layer

    for layer in on_ranks([work, work]):
        check_state(layer, X)


# --- the bar ------------------------------------------------------


BAR = """
import sys, io, numpy as np, nbbn
class Screen(io.StringIO):
    isatty = lambda self: {terminal}
{before}
sys.stderr = Screen()
layer = nbbn.BatchNormalization(name="it")
nbbn.population_statistics(layer, [np.ones((2, 3))] * 4, lambda x: layer(x, training=True))
print(repr(sys.stderr.getvalue()), "tqdm" in sys.modules)
"""


@pytest.mark.parametrize(
    ("terminal", "before", "shown"),
    [
        (True, "", True),
        (False, "", False),
        (True, "sys.modules['tqdm'] = None", False),
    ],
)
def test_a_bar_where_somebody_watches(terminal, before, shown):
    pytest.importorskip("tqdm", reason="the bar is that of tqdm")
    silent = "import logging; logging.getLogger('nbbn').addHandler(logging.NullHandler())\n"
    written, loaded = check(BAR.format(terminal=terminal, before=silent + before)).rsplit(maxsplit=1)
    assert ("it:" in written and "/4 " in written) == shown
    assert (written == "''") != shown
    assert loaded == str(terminal)
