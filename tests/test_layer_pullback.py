"""What a pullback and a call keep: their own copies of what may change, and no more than they need."""

import gc
import threading
import weakref

import numpy as np
import pytest

from nbbn import BatchNormalization
from tests.helpers.layer_examples import DY, X, assert_same, gradients_of, trained

# --- vjp -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"dtype": "float32"}], ids=str)
def test_a_pullback_is_that_of_its_call(training, options):
    """Whatever happens to the layer afterwards, in place or not."""
    layer = trained(**options)
    _, pullback = layer.vjp(X, training=training)
    expected = gradients_of(pullback)
    layer.gamma[...] = 77
    layer.beta -= 1
    assert_same(gradients_of(pullback), expected)
    layer(X * 5, training=True)
    assert_same(gradients_of(pullback), expected)
    layer.set_weights([w + 2 for w in layer.get_weights()])
    layer.trainable = False
    assert_same(gradients_of(pullback), expected)
    del layer
    gc.collect()
    assert_same(gradients_of(pullback), expected)


@pytest.mark.parametrize("training", [False, True])
def test_a_pullback_keeps_statistics_that_are_changed_in_place(training):
    """As gamma and beta: the attributes are arrays, and `layer.moving_mean *= 0` is a way to reset them."""
    layer = trained()
    _, pullback = layer.vjp(X, training=training)
    expected = gradients_of(pullback)
    layer.moving_mean *= 0
    layer.moving_variance *= 9
    assert_same(gradients_of(pullback), expected)


def test_a_pullback_keeps_the_mask():
    """Only the inputs must not change until the gradient is taken."""
    layer = trained()
    mask = np.array([1, 0, 1, 1, 1, 0, 1, 1], bool)
    _, pullback = layer.vjp(X, training=True, mask=mask)
    expected = gradients_of(pullback)
    mask[...] = True
    assert_same(gradients_of(pullback), expected)


def test_a_pullback_keeps_the_adjustment():
    pair = [np.full(X.shape, 2, np.float32), np.full(X.shape, 3, np.float32)]
    _, pullback = BatchNormalization(adjustment=lambda shape: pair).vjp(X, training=True)
    expected = gradients_of(pullback)
    for array in pair:
        array[...] = 77
    assert_same(gradients_of(pullback), expected)


def test_a_pullback_in_another_thread():
    _, pullback = trained().vjp(X, training=True)
    expected, found = gradients_of(pullback), []
    threads = [threading.Thread(target=lambda: found.append(gradients_of(pullback))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 4
    for one in found:
        assert_same(one, expected)


def test_gradients_are_the_callers():
    """Changing what one call returned changes no other."""
    _, pullback = trained().vjp(X, training=True)
    expected = gradients_of(pullback)
    for gradient in pullback(DY)[:3]:
        gradient[...] = 77
    assert_same(gradients_of(pullback), expected)


def test_gradients_of_what_does_not_exist():
    _, pullback = BatchNormalization(center=False, scale=False).vjp(X, training=True)
    gradients = pullback(DY)
    assert gradients.gamma is gradients.beta is gradients.adjustment is None


def test_the_gradient_of_the_output_may_have_another_dtype():
    _, pullback = trained().vjp(X, training=True)
    np.testing.assert_array_equal(pullback(DY.astype(np.float64)).inputs, pullback(DY).inputs)
    assert pullback(DY.astype(np.float64)).inputs.dtype == np.float32


@pytest.mark.parametrize("training", [False, True])
def test_the_gradient_of_a_float64_input_to_a_float32_layer(training):
    layer = BatchNormalization(dtype="float32")
    x = X.astype(np.float64)
    y, pullback = layer.vjp(x, training=training)
    assert y.dtype == np.float32
    assert pullback(DY).gamma.dtype == np.float32


# --- what is kept alive -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "float32"}, {"adjustment": lambda shape: (np.ones(shape), 0.0)}],
    ids=["", "dtype", "pair"],
)
def test_a_call_keeps_no_input(training, options):
    layer = BatchNormalization(**options)
    x, mask = X.copy(), np.ones(X.shape, np.float32)
    layer(x, training=training, mask=mask)
    references = [weakref.ref(x), weakref.ref(mask)]
    del x, mask
    gc.collect()
    assert [r() for r in references] == [None, None]


def test_a_pullback_keeps_its_input_until_it_goes():
    layer = BatchNormalization()
    x = X.copy()
    reference = weakref.ref(x)
    _, pullback = layer.vjp(x, training=True)
    del x
    gc.collect()
    assert reference() is not None
    del pullback
    gc.collect()
    assert reference() is None


def test_a_small_mask_is_not_blown_up():
    """One weight per sample stays that, also where the layer needs another dtype: no array of the input's size."""
    from nbbn.call.operands import as_weights

    wide = as_weights(np.ones(8, bool), np.zeros((8, 1000), np.float32), (1,), np.dtype(np.float32))
    assert wide.shape == (8, 1000)
    assert wide.strides[1] == 0
