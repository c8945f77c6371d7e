"""Train a classifier of digits in Keras on batches that are no fair samples: each has two neighbouring digits only."""

from functools import partial

import keras
import numpy as np
from sklearn.datasets import load_digits

import nbbn.keras

STEPS, BATCH, RATE = 1000, 32, 0.01

plain = keras.layers.BatchNormalization
renorm = partial(nbbn.keras.BatchNormalization, renorm=True)


class Clips:
    """The bounds of r and d: plain batch normalization at first, then more and more of the moving statistics."""

    def __init__(self):
        self.rmax, self.rmin, self.dmax = (keras.Variable(v, trainable=False) for v in (1.0, 1.0, 0.0))

    def follow(self, progress):
        rmax = np.interp(progress, [0.04, 0.3], [1.0, 3.0])
        self.rmax.assign(rmax), self.rmin.assign(1 / rmax)
        self.dmax.assign(np.interp(progress, [0.04, 0.2], [0.0, 5.0]))

    def of(self, layer):
        """The layer with these bounds, which become weights of it: a compiled program sees them change."""
        layer.rmax, layer.rmin, layer.dmax = self.rmax, self.rmin, self.dmax
        layer.renorm_clipping = {"rmax": lambda: self.rmax, "rmin": lambda: self.rmin, "dmax": lambda: self.dmax}
        return layer


def train(norm, seed=0):
    """The accuracy on images that are new, with the moving statistics."""
    rng = np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    images, labels = ((images - 5) / 6).astype(np.float32)[order], labels[order]
    (new_images, train_images), (new_labels, train_labels) = np.split(images, [800]), np.split(labels, [800])

    clips, model = Clips(), keras.Sequential([keras.Input((64,))])
    for _ in range(2):
        model.add(keras.layers.Dense(100, use_bias=False))
        layer = norm()  # the one line: `plain` is Keras's own
        model.add(layer if norm is plain else clips.of(layer))
        model.add(keras.layers.ReLU())
    model.add(keras.layers.Dense(10))
    model.compile(
        keras.optimizers.SGD(RATE, momentum=0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    for i in range(STEPS):
        clips.follow(i / STEPS)
        digit = 2 * rng.integers(5)
        chosen = np.concatenate([rng.choice(np.flatnonzero(train_labels == digit + k), BATCH // 2) for k in (0, 1)])
        model.train_on_batch(train_images[chosen], train_labels[chosen])
    scores = model.predict(new_images, verbose=0)
    return float((scores.argmax(axis=1) == new_labels).mean())


if __name__ == "__main__":
    print(f"keras.layers.BatchNormalization: {train(plain):.3f}")
    print(f"nbbn.keras.BatchNormalization with renorm: {train(renorm):.3f}")
