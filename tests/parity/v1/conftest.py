from collections.abc import Iterator

import numpy as np
import pytest

from nbbn.compat import v1
from tests.parity.tf_side import tf


@pytest.fixture(autouse=True)
def graph() -> Iterator[None]:
    v1.reset_default_graph()
    with tf.Graph().as_default():
        yield
    v1.reset_default_graph()


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(17).normal(1, 2, size=(6, 3)).astype(np.float32)
