"""Statistics of several inputs, and of several ranks, on a GPU."""

import numpy as np
import pytest

import nbbn

pytest.importorskip("numba_cuda", reason="needs the extra cuda")
from numba import cuda

if not cuda.is_available():
    pytest.skip("needs a GPU, or NUMBA_ENABLE_CUDASIM=1", allow_module_level=True)

from tests.helpers.on_gpu import FEW_THREADS, agree, device, gradients_agree, new_layer


def test_moments_of_arrays_on_the_device_and_on_the_host():
    x, weights = np.random.default_rng(0).normal(3, 2, (9, 4)), np.arange(5.0)
    found = nbbn.Moments()
    found._dispatcher = nbbn.Dispatcher(found._dispatcher.options, nbbn.Force(thresholds=FEW_THREADS))
    found.update(device(x[:4])).update(device(x[4:]), device(weights))
    found += nbbn.Moments().update(x[:2])
    expected = nbbn.Moments().update(x[:4]).update(x[4:], weights).update(x[:2])
    agree(found.count, expected.count, "count")
    agree(found.mean, expected.mean, "mean")
    agree(found.variance(1), expected.variance(1), "variance")


@pytest.mark.parametrize("options", [{"renorm": True}, {"momentum": None}, {"virtual_batch_size": 2}], ids=str)
def test_statistics_of_several_batches(options):
    """Of the population, and of batches that count as one: they end up where the variables are."""
    x = np.random.default_rng(0).normal(3, 2, (8, 3))
    for where in ("population", "accumulate"):
        weights = []
        for put in (device, np.array):
            layer = new_layer(**options) if put is device else nbbn.BatchNormalization(**options)
            batches = [put(x[:4]), put(x[4:])]
            if where == "population":
                nbbn.population_statistics(layer, batches, lambda b, layer=layer: layer(b, training=True))
            else:
                with nbbn.accumulate(layer):
                    for batch in batches:
                        layer(batch, training=True)
            assert layer.device == ("cuda:0" if put is device else "cpu")
            weights.append(layer.get_weights())
        for found, expected in zip(*weights, strict=True):
            agree(found, expected, where)


def test_after_an_error_statistics_on_the_device_are_as_before():
    """They change in their place."""
    layers = [new_layer(), new_layer()]
    forward = lambda b: layers[1](layers[0](b, training=True), training=True)  # noqa: E731
    x = np.random.default_rng(0).normal(3, 2, (8, 3))
    forward(device(x))
    before, batches = layers[0].get_weights(), [[device(x)], [device(x[:, :2].copy())]]
    with pytest.raises(ValueError, match="inputs must have the shape"):
        nbbn.population_statistics(layers, lambda: batches.pop(0), forward, sequential=True)
    assert batches == []
    for found, expected in zip(layers[0].get_weights(), before, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"virtual_batch_size": 2}], ids=str)
def test_shared_statistics(options):
    """Moments and sums go to the others by way of the host; all else stays on the device."""
    x, dy = np.random.default_rng(0).normal(3, 2, (2, 4, 3))
    on_host, on_device = (nbbn.SyncBatchNormalization(group=group, **options) for group in nbbn.sync.threads(1) * 2)
    nbbn.force(on_device, thresholds=FEW_THREADS)
    expected, pullback = on_host.vjp(x, training=True)
    found, pullback_on_device = on_device.vjp(device(x), training=True)
    agree(found, expected, "y")
    gradients_agree(pullback_on_device(device(dy)), pullback(dy))
    for one, other in zip(on_device.get_weights(), on_host.get_weights(), strict=True):
        agree(one, other, "weights")
    with pytest.raises(nbbn.sync.SyncError):
        on_device(device(x[:, :2].copy()), training=True)


def test_micro_batches_with_the_statistics_of_all():
    x, dy = np.random.default_rng(0).normal(3, 2, (2, 4, 3))
    layers = new_layer(), nbbn.BatchNormalization()
    y, pullback = layers[1].vjp(x, training=True)
    with nbbn.accumulate(layers[0]) as batch:
        steps = [batch.start(device(part)) for part in (x[:1], x[1:])]
        agree(np.concatenate([step.finish().copy_to_host() for step in steps]), y, "y")
        for step, part in zip(steps, (dy[:1], dy[1:]), strict=True):
            step.pull(device(part))
        found = np.concatenate([step.pulled().inputs.copy_to_host() for step in steps])
    agree(found, pullback(dy).inputs, "inputs")
    agree(layers[0].get_weights()[3], layers[1].get_weights()[3], "moving_variance")
