"""What a user's mypy makes of nbbn, in strict mode: mypy --strict user.py, where nbbn is installed and not beside it.

Each `type: ignore` is an error that a user must get: strict mode complains about one that is not needed.
"""

from collections.abc import Callable
from typing import Any, assert_type

import numpy as np
import numpy.typing as npt

import nbbn
import nbbn.compat.v1 as tf1
from nbbn import BatchNormalization, Gradients, constraints, initializers, nn, regularizers

x: npt.NDArray[np.float32] = np.ones((32, 64), np.float32)

layer = BatchNormalization(
    axis=[1, -1],
    momentum=None,
    gamma_initializer=initializers.RandomNormal(1.0, 0.02, seed=0),
    beta_regularizer=regularizers.L2(1e-4),
    gamma_constraint=constraints.NonNeg(),
    renorm=True,
    renorm_clipping={"rmax": 3, "dmax": lambda: 5.0},
    adjustment=lambda shape: (np.ones(shape[-1]), 0.0),
    activation="relu",
)
assert_type(layer, BatchNormalization)
layer.build((None, 64))
y, pullback = layer.vjp(x, training=True, mask=x > 0, residual=x)
assert_type(pullback, Callable[..., Gradients])
gradients = pullback(y, out=np.empty_like(x))
assert_type(gradients, Gradients)
assert_type(layer(x), Any)  # an array of the input's library
assert_type(layer.fold(), tuple[np.ndarray, np.ndarray])
assert_type(nbbn.fold_into(x, None, layer), tuple[np.ndarray, np.ndarray])
assert_type(layer.get_weights(), list[Any])
assert_type(layer.losses, list[float])
assert_type(layer.count_params(), int)
assert_type(layer.built, bool)
assert_type(layer.device, str)
assert_type(layer.to("cpu"), BatchNormalization)
assert_type(layer.get_config(), dict[str, Any])
assert_type(BatchNormalization.from_config(layer.get_config()), BatchNormalization)
assert_type(layer.regularization_gradients(), Gradients)
assert_type(nn.moments(x, axes=[0]), tuple[np.ndarray, np.ndarray])
assert_type(nn.fused_batch_norm(x, x[0], x[0]), tuple[np.ndarray, np.ndarray, np.ndarray])
assert_type(regularizers.L1L2(0.1, 0.1)(x), float)
assert_type(nbbn.__version__, str)
nbbn.warmup([layer, layer], (32, 64), training=True, gradients=True)
nbbn.force(layer, parallel=False)
nbbn.buffers.clear()


class Mine(BatchNormalization):
    """A subclass keeps its type."""


assert_type(Mine.from_config({}), Mine)

with tf1.variable_scope("scope", reuse=tf1.AUTO_REUSE):
    tf1.layers.batch_normalization(x, training=True, name="bn")
for update in tf1.get_collection(tf1.GraphKeys.UPDATE_OPS):
    update.run()

BatchNormalization(momentum="0.9")  # type: ignore[arg-type]
BatchNormalization(activate="relu")  # type: ignore[call-arg]
BatchNormalization(adjustment=lambda: 1)  # type: ignore[arg-type, misc]
layer.vjp(x, training="yes")  # type: ignore[arg-type]
nbbn.warmup(x, (32, 64))  # type: ignore[arg-type]
print(gradients.input)  # type: ignore[attr-defined]
print(nbbn.BatchNormalisation)  # type: ignore[attr-defined]
