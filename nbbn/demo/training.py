"""Training one network in one scenario with one method."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nbbn.demo.network import Array, Network
from nbbn.demo.scenarios import Clips, Scenario

TEST_IMAGES = 800
EVALUATIONS = 20


class Digits(NamedTuple):
    images: Array  # (N, 64) float32
    labels: Array  # (N,) integers 0 to 9


class Result(NamedTuple):
    """Accuracies on the test images, 0 to 1.

    curve: in inference, after each of `steps`. training_mode: at the end, with the statistics of batches that are
    composed as in training.
    """

    steps: Array
    curve: Array
    training_mode: float


def load() -> Digits:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return Digits(((images - 5) / 6).astype(np.float32), labels)  # 0 to 16 with mean 4.9, deviation 6.0


def split(digits: Digits, wrong_labels: float, rng: np.random.Generator) -> tuple[Digits, Digits]:
    """A random training set, with this share of wrong labels, and test set."""
    order = rng.permutation(len(digits.labels))
    train, test = (Digits(digits.images[i], digits.labels[i]) for i in (order[TEST_IMAGES:], order[:TEST_IMAGES]))
    wrong = round(wrong_labels * len(train.labels))
    train.labels[:wrong] = (train.labels[:wrong] + rng.integers(1, 10, wrong)) % 10
    return train, test


def train(
    scenario: Scenario, method: str, seed: int, digits: Digits, steps: int, tick: Callable[[], object] = lambda: None
) -> Result:
    """The same seed gives every method the same data, first weights and batches. `tick` is called after each step."""
    rng = np.random.default_rng(seed)
    train_set, test_set = split(digits, scenario.wrong_labels, rng)
    clips = Clips()
    network = Network(rng, **scenario.options(method, clips))
    evaluate_at = np.linspace(0, steps, EVALUATIONS + 1).round()[1:]
    curve = []
    for i in range(steps):
        clips.progress = i / steps
        batch = scenario.make_batch(rng, train_set.labels)
        network.step(train_set.images[batch], train_set.labels[batch], scenario.learning_rate)
        if i + 1 in evaluate_at:
            curve.append(accuracy(network, test_set, training=False))
        tick()
    batches = [scenario.make_batch(rng, test_set.labels) for _ in range(2 * TEST_IMAGES // batch.size)]
    as_trained = [accuracy(network, Digits(*(a[b] for a in test_set)), training=True) for b in batches]
    return Result(evaluate_at, np.array(curve), float(np.mean(as_trained)))


def accuracy(network: Network, digits: Digits, training: bool) -> float:
    return float((network.logits(digits.images, training).argmax(axis=1) == digits.labels).mean())
