"""Keras's train_on_batch with nbbn's layer and with Keras's own, on the backend of this process."""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

import nbbn.keras
from benchmarks.frameworks.cases import Case
from benchmarks.timing import Call

NORMS = {"nbbn": nbbn.keras.BatchNormalization, "keras": keras.layers.BatchNormalization}
MakeLayers = Callable[[type], list[Any]]


def cases(quick: bool, bound: float | None) -> Iterator[Case]:
    """quick: fewer channels. bound: see Case."""
    channels, rng = 16 if quick else 64, np.random.default_rng(0)
    labels = rng.integers(10, size=32)
    images, rows = rng.normal(size=(32, 28, 28, 1)).astype(np.float32), rng.normal(size=(32, 64)).astype(np.float32)
    networks: dict[str, tuple[np.ndarray, MakeLayers]] = {
        f"CNN, batch normalization of (32, 28, 28, {channels})": (images, lambda norm: _cnn(norm, channels)),
        "dense network, two of (32, 64)": (rows, _dense),
    }
    for name, (x, layers) in networks.items():
        calls = {who: _trained(layers(norm), x, labels) for who, norm in NORMS.items()}
        yield Case(f"train_on_batch, {name}", calls, "keras", bound)


def _cnn(norm: type, channels: int) -> list[Any]:
    convolution = keras.layers.Conv2D(channels, 3, padding="same", use_bias=False)
    return [convolution, norm(), keras.layers.ReLU(), keras.layers.GlobalAveragePooling2D()]


def _dense(norm: type) -> list[Any]:
    return [layer for _ in range(2) for layer in (keras.layers.Dense(64), norm(), keras.layers.ReLU())]


def _trained(layers: list[Any], x: np.ndarray, labels: np.ndarray) -> Call:
    model = keras.Sequential([keras.Input(x.shape[1:]), *layers, keras.layers.Dense(10)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return lambda: model.train_on_batch(x, labels)
