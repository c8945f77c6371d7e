"""Train a classifier with batch normalization in NumPy: two spirals, Adam, minibatches of 32."""

from itertools import pairwise

import numpy as np

import nbbn

rng = np.random.default_rng(0)


def spirals(count):
    """Points (count, 2) float32 on two spirals, and which of the two they are on."""
    label = rng.integers(0, 2, count)
    angle = rng.uniform(1, 9, count)
    points = angle[:, None] * np.stack([np.cos(angle + np.pi * label), np.sin(angle + np.pi * label)], axis=1)
    return (points + rng.normal(0, 0.2, points.shape)).astype(np.float32), label


class Network:
    """Dense, batch normalization and relu, twice; then a dense layer to two scores."""

    def __init__(self, width=64):
        sizes = [2, width, width, 2]
        self.kernels = [rng.normal(0, np.sqrt(2 / m), (m, n)).astype(np.float32) for m, n in pairwise(sizes)]
        self.norms = [nbbn.BatchNormalization(momentum=0.9, activation="relu") for _ in range(2)]
        for norm in self.norms:
            norm.build((None, width))  # gamma and beta exist from here on

    def parameters(self):
        """Arrays that an optimizer changes in place."""
        return [*self.kernels, *(w for norm in self.norms for w in norm.trainable_weights)]

    def __call__(self, x):
        """The scores, with the moving statistics."""
        for kernel, norm in zip(self.kernels, self.norms, strict=False):
            x = norm(x @ kernel)
        return x @ self.kernels[-1]

    def gradients(self, x, label):
        """The loss, with the statistics of the batch, and its gradients in the order of parameters()."""
        tape = []
        for kernel, norm in zip(self.kernels, self.norms, strict=False):
            y, pullback = norm.vjp(x @ kernel, training=True)  # updates the moving statistics, too
            tape.append((x, kernel, pullback))
            x = y
        scores = x @ self.kernels[-1]
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        loss = -np.log(p[np.arange(len(label)), label]).mean()
        p[np.arange(len(label)), label] -= 1
        dy = p / len(label)
        kernels, norms = [x.T @ dy], []
        dy = dy @ self.kernels[-1].T
        for x, kernel, pullback in reversed(tape):
            found = pullback(dy)  # the gradients of the layer's input, gamma and beta
            kernels.insert(0, x.T @ found.inputs)
            norms[:0] = [found.gamma, found.beta]
            dy = found.inputs @ kernel.T
        return loss, [*kernels, *norms]


class Adam:
    def __init__(self, parameters, rate=0.01, decay=(0.9, 0.999)):
        self.parameters, self.rate, self.decay, self.steps = parameters, rate, decay, 0
        self.moments = [(np.zeros_like(p), np.zeros_like(p)) for p in parameters]

    def step(self, gradients):
        self.steps += 1
        first, second = self.decay
        rate = self.rate * np.sqrt(1 - second**self.steps) / (1 - first**self.steps)
        for p, g, (m, v) in zip(self.parameters, gradients, self.moments, strict=True):
            m += (1 - first) * (g - m)
            v += (1 - second) * (g * g - v)
            p -= rate * m / (np.sqrt(v) + 1e-8)


def accuracy(network, x, label):
    return float((network(x).argmax(axis=1) == label).mean())


train_x, train_label = spirals(2000)
test_x, test_label = spirals(1000)
network = Network()
adam = Adam(network.parameters())
for _ in range(8):
    for batch in np.split(rng.permutation(len(train_x))[:1984], 62):
        loss, gradients = network.gradients(train_x[batch], train_label[batch])
        adam.step(gradients)
print(f"accuracy on new points: {accuracy(network, test_x, test_label):.3f}")
