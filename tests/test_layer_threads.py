"""One layer, several threads."""

import numpy as np

from nbbn import BatchNormalization
from tests.helpers.concurrency import in_threads, in_threads_beside
from tests.helpers.layer_examples import X, assert_same, batches, gradients_of, trained

# --- several threads ------------------------------------------------------------------------------------------------


def test_threads_that_train_one_layer_lose_no_update():
    """The mean of every batch is 1: after n updates the moving mean is 1 - momentum^n, exactly n of them."""
    layer = BatchNormalization(momentum=0.99)
    x = np.ones((4, 3), np.float32)
    layer(x)

    def train():
        for _ in range(50):
            layer(x, training=True)

    in_threads([train] * 8)
    np.testing.assert_allclose(layer.moving_mean, 1 - 0.99**400, rtol=1e-5)


def test_threads_that_train_a_cumulative_average_count_every_call():
    layer = BatchNormalization(momentum=None)
    data = batches(8)

    def train(x):
        for _ in range(25):
            layer(x, training=True)

    in_threads([lambda x=x: train(x) for x in data])
    np.testing.assert_allclose(layer.moving_mean, np.mean([x.mean(0, np.float64) for x in data], 0), rtol=1e-4)


def test_threads_that_build_one_layer_build_it_once():
    """The initializer draws other values each time: all must see the same."""
    for _ in range(20):
        layer, seen = BatchNormalization(gamma_initializer="random_normal"), []

        def build(layer=layer, seen=seen):
            layer(X)
            seen.append(layer.gamma)

        in_threads([build] * 6)
        assert all(np.shares_memory(gamma, layer.gamma) for gamma in seen)


def test_inference_beside_training_sees_statistics_of_one_step():
    """Mean m and variance m^2 belong together: (0 - mean) / sqrt(variance) is -1, or they are of different steps."""
    layer = BatchNormalization(momentum=0.0, epsilon=0.0, center=False, scale=False)
    sign = np.array([[0.0], [2.0]], np.float32)  # m * sign: mean m, variance m^2
    data = [np.float32(m) * sign * np.ones(3, np.float32) for m in (1, 1000)]
    zero = np.zeros((4, 3), np.float32)
    layer(data[0], training=True)

    def train():
        for i in range(1000):
            layer(data[i % 2], training=True)

    in_threads_beside(train, lambda: np.testing.assert_allclose(layer(zero), -1, rtol=1e-5))


def test_weights_set_beside_inference_are_seen_whole():
    """Statistics that set_weights() gives together are used together."""
    layer = BatchNormalization(epsilon=0.0, center=False, scale=False)
    layer.build((None, 3))
    zero = np.zeros((4, 3), np.float32)
    ones = np.ones(3, np.float32)
    layer.set_weights([ones, ones])

    def assign():
        for i in range(2000):
            m = (1, 1000)[i % 2] * ones
            layer.set_weights([m, m * m])

    in_threads_beside(assign, lambda: np.testing.assert_allclose(layer(zero), -1, rtol=1e-5))


def test_a_pullback_beside_training():
    layer = trained()
    _, pullback = layer.vjp(X, training=True)
    expected = gradients_of(pullback)

    def train():
        for _ in range(300):
            layer(X, training=True)
            layer.gamma += 1

    in_threads_beside(train, lambda: assert_same(gradients_of(pullback), expected))


def test_layers_of_all_kinds_at_once():
    """Different kernels, some of them first compiled here, and large enough for the thread pool."""
    x = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
    expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3)

    def work(dtype):
        for _ in range(5):
            y = BatchNormalization(dtype=dtype)(x, training=True)
            np.testing.assert_allclose(y.astype(np.float64), expected, rtol=2**-10, atol=2**-10)

    in_threads([lambda d=d: work(d) for d in ("float16", "float32", "float32", "float32")])
