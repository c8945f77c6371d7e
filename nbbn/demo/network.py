"""A small classifier with batch normalization and its gradients, in NumPy."""

from itertools import chain, pairwise
from typing import Any

import numpy as np

import nbbn

Array = np.ndarray


class Network:
    """Perceptron with batch normalization and ReLU after every hidden product, trained by SGD with momentum.

    Args:
        sizes: width of the input, of every hidden layer, and of the output.
        dtype: of all parameters.
        options: of every nbbn.BatchNormalization.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        sizes: tuple[int, ...] = (64, 100, 100, 10),
        dtype: str = "float32",
        **options: Any,
    ) -> None:
        self.weights = [rng.normal(0, np.sqrt(2 / m), (m, n)).astype(dtype) for m, n in pairwise(sizes)]
        self.bias = np.zeros(sizes[-1], dtype)
        self.norms = [nbbn.BatchNormalization(dtype=dtype, **options) for _ in sizes[1:-1]]
        for norm, width in zip(self.norms, sizes[1:-1], strict=True):
            norm.build((None, width))
        self.parameters = [*self.weights, self.bias, *(p for norm in self.norms for p in (norm.gamma, norm.beta))]
        self._velocities = [np.zeros_like(p) for p in self.parameters]

    def logits(self, x: Array, training: bool = False) -> Array:
        """(N, classes); training=True uses the statistics of x. Leaves the moving statistics alone."""
        for w, norm in zip(self.weights, self.norms, strict=False):
            x = np.maximum(norm(x @ w, training=training, update_statistics=False), 0)
        scores: Array = x @ self.weights[-1] + self.bias
        return scores

    def loss_and_gradients(self, x: Array, labels: Array) -> tuple[float, list[Array]]:
        """Cross-entropy in training mode, and its gradients in the order of `parameters`."""
        tape = []
        for w, norm in zip(self.weights, self.norms, strict=False):
            y, pullback = norm.vjp(x @ w, training=True)
            tape.append((x, w, y, pullback))
            x = np.maximum(y, 0)
        loss, dy = cross_entropy(x @ self.weights[-1] + self.bias, labels)
        dweights: list[Array] = [x.T @ dy]
        dnorms: list[Any] = []
        dx = dy @ self.weights[-1].T
        for x, w, y, pullback in reversed(tape):
            grads = pullback(dx * (y > 0))
            dweights.insert(0, x.T @ grads.inputs)
            dnorms.insert(0, (grads.gamma, grads.beta))
            dx = grads.inputs @ w.T
        return loss, [*dweights, dy.sum(axis=0), *chain(*dnorms)]

    def step(self, x: Array, labels: Array, learning_rate: float, momentum: float = 0.9) -> None:
        _, gradients = self.loss_and_gradients(x, labels)
        for parameter, velocity, gradient in zip(self.parameters, self._velocities, gradients, strict=True):
            velocity *= momentum
            velocity -= learning_rate * gradient
            parameter += velocity


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """The mean cross-entropy of softmax(logits), and its gradient with respect to the logits."""
    z = logits - logits.max(axis=1, keepdims=True)  # exp() of a large logit would overflow
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    rows = np.arange(len(labels))
    gradient = np.exp(log_p)
    gradient[rows, labels] -= 1
    return -float(log_p[rows, labels].mean()), gradient / logits.dtype.type(len(labels))
