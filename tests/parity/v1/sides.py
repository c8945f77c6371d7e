"""A program written once, for TensorFlow 1 and for nbbn, and the comparison of what it leaves on both sides.

tf_keras's legacy layers build a graph of placeholders that a session runs; nbbn's compute at once. A side hides the
difference.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from nbbn.compat import v1
from tests.parity.tf_side import batch_normalization_v1, legacy, tf

tf1 = tf.compat.v1
KEYS = ("GLOBAL_VARIABLES", "TRAINABLE_VARIABLES", "UPDATE_OPS", "REGULARIZATION_LOSSES")
# A few roundings of float32 values of size 5 on each side.
TOLERANCE = 1e-5


class TensorFlow:
    """The program's view of TensorFlow 1: graph, session, placeholders that know their values."""

    variable_scope, AUTO_REUSE = staticmethod(tf1.variable_scope), tf1.AUTO_REUSE
    make_template, get_variable_scope = staticmethod(tf1.make_template), staticmethod(tf1.get_variable_scope)
    layers, keras = legacy, SimpleNamespace(layers=batch_normalization_v1)

    def __init__(self) -> None:
        self.feeds: dict[Any, np.ndarray] = {}
        self.session = tf1.Session()

    def input(self, x: np.ndarray) -> Any:
        placeholder = tf1.placeholder(x.dtype, x.shape)
        self.feeds[placeholder] = x
        return placeholder

    def collection(self, key: str) -> list[Any]:
        return tf1.get_collection(getattr(tf1.GraphKeys, key))

    def values(self, tensors: Any) -> Any:
        if not isinstance(tensors, list):
            return self.values([tensors])[0]
        return [self.session.run(t, self.feeds) for t in tensors]

    def run(self, updates: list[Any]) -> None:
        """All at once: each update of a renorm layer alone would move renorm_mean and renorm_stddev again."""
        self.session.run(updates, self.feeds)

    def assign(self, variable: Any, value: np.ndarray) -> None:
        self.session.run(tf1.assign(variable, value))

    def initialize(self) -> None:
        self.session.run(tf1.global_variables_initializer())


class Nbbn:
    """The same for nbbn, where inputs are arrays and outputs are values."""

    variable_scope, AUTO_REUSE = staticmethod(v1.variable_scope), v1.AUTO_REUSE
    make_template, get_variable_scope = staticmethod(v1.make_template), staticmethod(v1.get_variable_scope)
    layers, keras = v1.layers, v1.keras

    def input(self, x: np.ndarray) -> np.ndarray:
        return x

    def collection(self, key: str) -> list[Any]:
        return v1.get_collection(getattr(v1.GraphKeys, key))

    def values(self, tensors: Any) -> Any:
        return [np.asarray(t) for t in tensors] if isinstance(tensors, list) else np.asarray(tensors)

    def run(self, updates: list[Any]) -> None:
        for update in updates:
            update.run()

    def initialize(self) -> None:
        pass

    def assign(self, variable: Any, value: np.ndarray) -> None:
        variable.assign(value)


Program = Callable[[Any], Any]


def summary(side: Any) -> dict[str, Any]:
    """The names of the variables, and how many updates and losses were collected."""
    names = {key: [variable.name for variable in side.collection(key)] for key in KEYS[:2]}
    return names | {key: len(side.collection(key)) for key in KEYS[2:]}


def assert_same_summary(program: Program) -> None:
    """The program leaves the same variables and collections, and returns the same."""
    theirs, ours = TensorFlow(), Nbbn()
    assert program(ours) == program(theirs)
    assert summary(ours) == summary(theirs)


def assert_same_values(program: Program) -> None:
    """The arrays that the program returns agree, and so do all variables afterwards."""
    theirs, ours = TensorFlow(), Nbbn()
    expected, actual = program(theirs), program(ours)
    assert len(actual) == len(expected)
    for mine, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=TOLERANCE)
        assert mine.dtype == other.dtype
    assert summary(ours)["GLOBAL_VARIABLES"] == summary(theirs)["GLOBAL_VARIABLES"]
    for mine, other in zip(ours.collection("GLOBAL_VARIABLES"), theirs.collection("GLOBAL_VARIABLES"), strict=True):
        value = theirs.values(other)
        np.testing.assert_allclose(mine.numpy(), value, rtol=0, atol=TOLERANCE, err_msg=mine.name)
        assert mine.numpy().dtype == value.dtype


def functional(side: Any, x: np.ndarray, **options: Any) -> Any:
    return side.layers.batch_normalization(side.input(x), **options)
