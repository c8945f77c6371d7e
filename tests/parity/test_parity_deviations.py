"""Where nbbn deliberately does something else than tf_keras: each test shows both.

The first half of a test pins TensorFlow's behaviour, so that a TensorFlow which changes it is noticed.
"""

import warnings

import numpy as np
import pytest

import nbbn
from nbbn.compat import v1
from tests.parity.tf_side import LAYERS, tf, tf2

pytestmark = pytest.mark.parity

KerasV1, KerasV2 = LAYERS["V1"], LAYERS["V2"]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def masked_means(x: np.ndarray, mask: np.ndarray, axis: int) -> np.ndarray:
    return np.array([channel[mask].mean() for channel in np.moveaxis(x.astype(np.float64), axis, 0)])


def assert_same_weights(after: list[np.ndarray], before: list[np.ndarray]) -> None:
    for new, old in zip(after, before, strict=True):
        np.testing.assert_array_equal(new, old)


def test_deviation_inference_with_virtual_batches_takes_any_batch(rng: np.random.Generator) -> None:
    """With TensorFlow 2 behaviour off, tf_keras splits the batch at inference too and fails; nbbn never does."""
    x = rng.normal(size=(6, 3)).astype(np.float32)
    theirs, ours = KerasV2(virtual_batch_size=4), nbbn.BatchNormalization(virtual_batch_size=4)
    theirs.build(x.shape)
    tf2.disable()
    try:
        with pytest.raises(tf.errors.InvalidArgumentError, match="multiple of 12"):
            theirs(x, training=False)
    finally:
        tf2.enable()
    # One rounding more or less: with the initial state this is x / sqrt(1 + epsilon).
    np.testing.assert_allclose(ours(x, training=False), theirs(x, training=False), rtol=1e-6)


def test_deviation_mask_works_for_every_axis(rng: np.random.Generator) -> None:
    """tf_keras appends the feature dimension to the mask wherever it is: wrong, or an error, for axis=1."""
    x = rng.normal(size=(4, 3, 3)).astype(np.float32)
    mask = rng.random((4, 3)) < 0.6
    right = masked_means(x, mask, axis=1)

    theirs = KerasV2(axis=1, momentum=0.0)
    theirs(x, training=True, mask=mask)
    assert np.abs(theirs.moving_mean.numpy() - right).max() > 0.05
    with pytest.raises(tf.errors.InvalidArgumentError, match="Incompatible shapes"):
        KerasV2(axis=1)(np.ones((4, 3, 5), np.float32), training=True, mask=np.ones((4, 5), bool))

    ours = nbbn.BatchNormalization(axis=1, momentum=0.0)
    ours(x, training=True, mask=mask)
    # A float32 sum of a dozen values of size 1.
    np.testing.assert_allclose(ours.moving_mean, right, atol=1e-6)


def test_deviation_a_mask_of_samples_counts_samples(rng: np.random.Generator) -> None:
    """tf_keras aligns a mask of fewer dimensions with the last ones: one of samples counts steps, or is an error."""
    x, mask = rng.normal(size=(4, 4, 3)).astype(np.float32), np.array([True, False, True, True])
    theirs, ours = KerasV2(momentum=0.0), nbbn.BatchNormalization(momentum=0.0)
    theirs(x, training=True, mask=mask)
    ours(x, training=True, mask=mask)
    # Float32 sums of a dozen values of size 1.
    np.testing.assert_allclose(theirs.moving_mean.numpy(), x[:, mask].mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(ours.moving_mean, x[mask].mean((0, 1)), atol=1e-6)
    assert np.abs(x[mask].mean((0, 1)) - x[:, mask].mean((0, 1))).max() > 0.05
    with pytest.raises(tf.errors.InvalidArgumentError, match="Incompatible shapes"):
        KerasV2()(np.ones((4, 5, 3), np.float32), training=True, mask=np.ones(4, bool))


def test_deviation_mask_counts_when_fused(rng: np.random.Generator) -> None:
    """tf_keras's fused path warns and ignores the mask; nbbn applies it."""
    x = rng.normal(size=(4, 3, 5, 3)).astype(np.float32)
    mask = rng.random((4, 3, 5)) < 0.6
    theirs = KerasV2(momentum=0.0, fused=True)
    with pytest.warns(UserWarning, match="Masking is not supported"):
        theirs(x, training=True, mask=mask)
    np.testing.assert_allclose(theirs.moving_mean.numpy(), x.mean((0, 1, 2)), atol=1e-6)

    ours = nbbn.BatchNormalization(momentum=0.0, fused=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(x, training=True, mask=mask)
    right = masked_means(x, mask, axis=-1)
    assert np.abs(right - x.mean((0, 1, 2))).max() > 0.01
    # A float32 sum of some dozen values of size 1.
    np.testing.assert_allclose(ours.moving_mean, right, atol=1e-6)


def test_deviation_nothing_valid_keeps_the_state(rng: np.random.Generator) -> None:
    """Without a single valid element tf_keras moves the state towards 0; nbbn leaves it."""
    x, mask = rng.normal(size=(4, 2)).astype(np.float32), np.zeros(4, bool)
    theirs, ours = KerasV2(momentum=0.5), nbbn.BatchNormalization(momentum=0.5)
    theirs(x, training=True, mask=mask)
    np.testing.assert_array_equal(theirs.moving_variance.numpy(), 0.5)
    ours(x, training=True, mask=mask)
    np.testing.assert_array_equal(ours.moving_mean, 0)
    np.testing.assert_array_equal(ours.moving_variance, 1)


@pytest.mark.parametrize("shape", [(0, 3), (0, 4, 5, 3), (4, 0, 5, 3)])
@pytest.mark.parametrize("renorm", [False, True])
def test_deviation_empty_batch_keeps_the_state(shape: tuple[int, ...], renorm: bool) -> None:
    """An empty batch makes tf_keras's state NaN; nbbn leaves it."""
    x = np.zeros(shape, np.float32)
    theirs, ours = KerasV2(momentum=0.5, renorm=renorm), nbbn.BatchNormalization(momentum=0.5, renorm=renorm)
    theirs(x, training=True)
    assert all(np.isnan(w).all() for w in theirs.get_weights()[2:])
    ours.build(shape)
    before = [w.copy() for w in ours.get_weights()]
    assert ours(x, training=True).shape == shape
    assert_same_weights(ours.get_weights(), before)


def test_deviation_config_is_the_same_before_and_after_build() -> None:
    """tf_keras resolves `axis` in place while it builds, so that its config is of another layer afterwards."""
    theirs, ours = (
        KerasV2(virtual_batch_size=2, name="bn"),
        nbbn.BatchNormalization(virtual_batch_size=2, name="bn"),
    )
    assert theirs.get_config()["axis"] == -1
    theirs.build((4, 5, 3))
    assert list(theirs.get_config()["axis"]) == [3]  # of an input of rank 3
    before = ours.get_config()
    ours.build((4, 5, 3))
    assert ours.get_config() == before
    assert before["axis"] == -1


@pytest.mark.parametrize(("shape", "fused"), [((4096, 3), None), ((64, 8, 8, 3), None), ((64, 8, 8, 3), False)])
def test_deviation_variance_at_a_large_mean(
    rng: np.random.Generator, shape: tuple[int, ...], fused: bool | None
) -> None:
    """At mean / std = 1e4 TensorFlow's float32 variance is off by 1e-5 to 3e-4; nbbn's is right to 1e-5."""
    x = (1e4 + rng.normal(size=shape)).astype(np.float32)
    reduced = tuple(range(len(shape) - 1))
    right = x.astype(np.float64).var(reduced, ddof=int(len(shape) == 4 and fused is None))
    theirs = KerasV2(momentum=0.0, fused=fused)
    ours = nbbn.BatchNormalization(momentum=0.0, fused=fused)
    theirs(x, training=True)
    ours(x, training=True)
    assert np.abs(theirs.moving_variance.numpy() / right - 1).max() > 1e-5
    np.testing.assert_allclose(ours.moving_variance, right, rtol=1e-5)


def test_deviation_renorm_in_float64(rng: np.random.Generator) -> None:
    """tf_keras compares a float64 standard deviation with a float32 sqrt(epsilon) and fails; nbbn computes."""
    x = rng.normal(1, 2, size=(8, 3))
    options = {
        "renorm": True,
        "renorm_clipping": {"rmax": 3.0, "dmax": 5.0},
        "momentum": 0.5,
        "renorm_momentum": 0.5,
    }
    with pytest.raises(tf.errors.InvalidArgumentError, match="expected to be a double tensor"):
        KerasV2(**options, dtype="float64")(x, training=True)
    theirs = KerasV2(**options, dtype="float32")
    ours = nbbn.BatchNormalization(**options, dtype="float64")
    for _ in range(3):
        expected = theirs(x.astype(np.float32), training=True).numpy()
        # float32 with values of size 10 on TensorFlow's side.
        np.testing.assert_allclose(ours(x, training=True), expected, atol=1e-5)
    for mine, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        assert mine.dtype == np.float64
        np.testing.assert_allclose(mine, other, rtol=1e-5)


def test_deviation_momentum_in_float64(rng: np.random.Generator) -> None:
    """tf_keras rounds 1 - momentum to float32 even in float64; nbbn's moving average is right to the last digits."""
    x = rng.normal(1, 2, size=(8, 3))
    right = x.mean(0) * (1 - 0.99)
    theirs, ours = (
        KerasV2(momentum=0.99, dtype="float64"),
        nbbn.BatchNormalization(momentum=0.99, dtype="float64"),
    )
    theirs(x, training=True)
    ours(x, training=True)
    error = np.abs(theirs.moving_mean.numpy() / right - 1)
    assert (error > 1e-9).all()
    assert (error < 2**-24).all()
    np.testing.assert_allclose(ours.moving_mean, right, rtol=1e-14)


@pytest.mark.parametrize("axis", [-4, [-4]])
def test_deviation_batch_axis_counted_from_the_end(rng: np.random.Generator, axis: int | list[int]) -> None:
    """tf_keras takes axis=-4 of a 4-D input for axis 1 until it is too late, and raises; axis=0 it accepts."""
    x = rng.normal(size=(3, 4, 2, 5)).astype(np.float32)
    with pytest.raises(ValueError, match="Unsupported axis"):
        KerasV2(axis=axis)(x, training=True)
    expected = KerasV2(axis=0)(x, training=True).numpy()
    # Values of size 1 in float32.
    np.testing.assert_allclose(nbbn.BatchNormalization(axis=axis)(x, training=True), expected, atol=2e-6)


def test_deviation_fused_that_cannot_be_is_refused() -> None:
    """tf_keras drops fused=True silently for axis=3 of a 5-D input; nbbn says that it cannot be had."""
    x = np.ones((2, 3, 2, 3, 2), np.float32)
    theirs = KerasV2(axis=3, fused=True)
    theirs(x, training=True)
    assert theirs.fused is False
    with pytest.raises(ValueError, match="fused"):
        nbbn.BatchNormalization(axis=3, fused=True)(x, training=True)


def test_deviation_frozen_v1_keeps_the_renorm_state(rng: np.random.Generator) -> None:
    """Run eagerly, a V1 layer with trainable=False still moves renorm_mean and renorm_stddev in tf_keras."""
    x = rng.normal(3, 2, size=(8, 3)).astype(np.float32)
    options = {"renorm": True, "renorm_momentum": 0.5, "trainable": False}
    theirs, ours = KerasV1(**options), v1.keras.layers.BatchNormalization(**options)
    for layer in (theirs, ours):
        layer.build(x.shape)
    before = [w.copy() for w in ours.get_weights()]
    expected = theirs(x, training=True).numpy()
    moved = [not np.array_equal(new, old) for new, old in zip(theirs.get_weights(), before, strict=True)]
    assert moved == [False] * 5 + [True] * 2

    # Values of size 3 in float32.
    np.testing.assert_allclose(ours(x, training=True), expected, atol=5e-6)
    for update in list(ours.updates):
        update.run()
    assert_same_weights(ours.get_weights(), before)


@pytest.mark.parametrize("dtype", [np.int32, np.bool_])
def test_deviation_integers_are_refused(dtype: type) -> None:
    """tf_keras casts integers silently; nbbn says what it received."""
    x = np.ones((4, 3), dtype)
    assert KerasV2()(x, training=True).dtype == tf.float32
    with pytest.raises(TypeError, match=np.dtype(dtype).name):
        nbbn.BatchNormalization()(x, training=True)


@pytest.mark.parametrize("clipping", [{"rmax": 0.5, "rmin": 2.0}, {"dmax": -1.0}])
def test_deviation_impossible_clipping_is_refused(clipping: dict[str, float]) -> None:
    """tf_keras clips with bounds that contradict each other; nbbn names them."""
    x = np.ones((4, 3), np.float32)
    assert np.isfinite(KerasV2(renorm=True, renorm_clipping=clipping)(x, training=True)).all()
    with pytest.raises(ValueError, match="renorm_clipping"):
        nbbn.BatchNormalization(renorm=True, renorm_clipping=clipping)(x, training=True)
