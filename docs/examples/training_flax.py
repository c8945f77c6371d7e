"""Train a classifier of digits in Flax on batches that are no fair samples: each has two neighbouring digits only."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import nbbn.flax

STEPS, BATCH, RATE = 1000, 32, 0.01

plain = nn.BatchNorm
renorm = partial(nbbn.flax.BatchNorm, renorm=True)


class Network(nn.Module):
    norm: Callable = renorm  # the one line: `plain` is Flax's own

    @nn.compact
    def __call__(self, x, training, clipping=None):
        bounds = {} if clipping is None else {"renorm_clipping": clipping}
        for width in (100, 100):
            x = nn.Dense(width, use_bias=False)(x)
            x = nn.relu(self.norm(use_running_average=not training)(x, **bounds))
        return nn.Dense(10)(x)


def clips(progress):
    """The bounds of r and d: plain batch normalization at first, then more and more of the moving statistics."""
    rmax = jnp.interp(progress, jnp.array([0.04, 0.3]), jnp.array([1.0, 3.0]))
    return {"rmax": rmax, "rmin": 1 / rmax, "dmax": jnp.interp(progress, jnp.array([0.04, 0.2]), jnp.array([0.0, 5.0]))}


def train(norm, seed=0):
    """The accuracy on images that are new, with the moving statistics."""
    rng = np.random.default_rng(seed)
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    images, labels = ((images - 5) / 6).astype(np.float32)[order], labels[order]
    (new_images, train_images), (new_labels, train_labels) = np.split(images, [800]), np.split(labels, [800])

    network = Network(norm)
    variables = network.init(jax.random.key(seed), train_images[:2], training=True)
    velocity = jax.tree.map(jnp.zeros_like, variables["params"])

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(variables, velocity, x, label, progress):
        def loss(params):
            bounds = None if norm is plain else clips(progress)
            given = variables | {"params": params}
            scores, stats = network.apply(given, x, training=True, clipping=bounds, mutable=["batch_stats"])
            return -jax.nn.log_softmax(scores)[jnp.arange(len(label)), label].mean(), stats

        gradients, stats = jax.grad(loss, has_aux=True)(variables["params"])
        velocity = jax.tree.map(lambda v, g: 0.9 * v - RATE * g, velocity, gradients)
        return {"params": jax.tree.map(jnp.add, variables["params"], velocity), **stats}, velocity

    for i in range(STEPS):
        digit = 2 * rng.integers(5)
        chosen = np.concatenate([rng.choice(np.flatnonzero(train_labels == digit + k), BATCH // 2) for k in (0, 1)])
        variables, velocity = step(variables, velocity, train_images[chosen], train_labels[chosen], i / STEPS)
    scores = network.apply(variables, new_images, training=False)
    return float((scores.argmax(axis=1) == new_labels).mean())


if __name__ == "__main__":
    print(f"flax.linen.BatchNorm: {train(plain):.3f}")
    print(f"nbbn.flax.BatchNorm with renorm: {train(renorm):.3f}")
