"""What layers compute, and what belongs to a layer object: updates, losses, variables."""

from typing import Any

import numpy as np
import pytest

from nbbn.compat import v1
from tests.parity.tf_side import parameter_dtype, tf, tf_keras
from tests.parity.v1.sides import (
    Nbbn,
    TensorFlow,
    assert_same_summary,
    assert_same_values,
    functional,
)

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.*batch_normalization. is deprecated"),
]

tf1 = tf.compat.v1


# --- layer objects ------------------------------------------------------------


def test_layer_object(x: np.ndarray) -> None:
    """Its name, its variables' scope, and what belongs to which inputs."""
    regularizer = tf_keras.regularizers.L2(0.5)
    other = x + 1

    def program(side: Any) -> list[Any]:
        layer = side.layers.BatchNormalization(gamma_regularizer=regularizer)
        first, second = side.input(x), side.input(other)
        layer(first, training=True)
        layer(second, training=True)
        layer.apply(second, training=False)
        return [
            layer.scope_name,
            len(layer.updates),
            len(layer.get_updates_for(first)),
            len(layer.get_updates_for(second)),
            len(layer.get_updates_for(None)),
            len(layer.losses),
            len(layer.get_losses_for(None)),
            len(layer.get_losses_for(first)),
        ]

    assert_same_summary(program)


@pytest.mark.parametrize("options", [{}, {"trainable": False}, {"renorm": True}], ids=str)
def test_keras_layer_keeps_its_updates_to_itself(x: np.ndarray, options: dict[str, Any]) -> None:
    """tf.compat.v1.keras's layer records updates, but in no collection."""

    def program(side: Any) -> list[int]:
        layer = side.keras.layers.BatchNormalization(**options)
        layer(side.input(x), training=True)
        layer(side.input(x), training=False)
        return [len(layer.updates), len(side.collection("UPDATE_OPS"))]

    theirs, ours = program(TensorFlow()), program(Nbbn())
    assert ours == theirs


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtype_of_the_variables_follows_the_input(dtype: str, x: np.ndarray) -> None:
    assert_same_summary(lambda side: functional(side, x.astype(dtype), training=True) is None)
    for variable in v1.get_collection(v1.GraphKeys.GLOBAL_VARIABLES):
        assert variable.numpy().dtype == parameter_dtype(dtype)
    for variable in tf1.global_variables():
        assert variable.dtype.base_dtype.name == parameter_dtype(dtype)


# --- values ------------------------------------------------------------


VALUES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((6, 3), {}),
    ((6, 3), {"momentum": 0.0}),
    ((6, 3), {"momentum": 1.0, "center": False}),
    ((4, 3, 2, 5), {"momentum": 0.5}),
    ((4, 3, 2, 5), {"momentum": 0.5, "fused": False, "axis": 1}),
    ((4, 3, 2, 5), {"momentum": 0.5, "axis": [1, 3], "scale": False}),
    ((6, 3), {"momentum": 0.5, "trainable": False}),
    ((6, 3), {"momentum": 0.5, "virtual_batch_size": 2}),
    ((6, 3), {"momentum": 0.5, "renorm": True, "renorm_momentum": 0.25}),
    ((6, 3), {"momentum": 0.5, "renorm": True, "renorm_clipping": {"rmax": 1.5, "rmin": 0.75, "dmax": 0.5}}),
    ((6, 3), {"momentum": 0.5, "renorm": True, "renorm_momentum": 0.25, "virtual_batch_size": 2}),
    ((6, 3), {"momentum": 0.5, "renorm": True, "trainable": False}),
    ((6, 3), {"momentum": 0.5, "moving_mean_initializer": "ones", "beta_initializer": "ones"}),
]
each_values = pytest.mark.parametrize(("shape", "options"), VALUES, ids=str)


@each_values
def test_values_of_the_functional_form(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """Three times: train, run the updates, infer with the shared variables."""

    def program(side: Any) -> list[np.ndarray]:
        def call(x: np.ndarray, training: bool) -> Any:
            return functional(side, x, training=training, name="bn", reuse=side.AUTO_REUSE, **options)

        first, *rest = batches(shape, 4)
        call(first, training=False)
        randomize(side)
        outputs = []
        for x in rest:
            known = len(side.collection("UPDATE_OPS"))
            outputs.append(side.values(call(x, training=True)))
            side.run(side.collection("UPDATE_OPS")[known:])
            outputs.append(side.values(call(x, training=False)))
        return outputs

    assert_same_values(program)


@each_values
def test_values_of_the_layer(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """The same through an object and its `updates`."""

    def program(side: Any) -> list[np.ndarray]:
        layer = side.layers.BatchNormalization(**options)
        first, *rest = batches(shape, 4)
        layer(side.input(first))
        randomize(side)
        outputs = []
        for x in rest:
            inputs = side.input(x)
            outputs.append(side.values(layer(inputs, training=True)))
            side.run(layer.get_updates_for(inputs))
            outputs.append(side.values(layer(inputs)))
        return outputs

    assert_same_values(program)


def test_state_waits_for_the_updates(x: np.ndarray) -> None:
    """Without running the updates nothing moves."""

    def program(side: Any) -> list[np.ndarray]:
        layer = side.layers.BatchNormalization(momentum=0.5)
        layer.build(x.shape)
        side.initialize()
        for _ in range(2):
            side.values(layer(side.input(x), training=True))
        return [side.values(layer(side.input(x)))]

    assert_same_values(program)
    np.testing.assert_array_equal(v1.get_collection(v1.GraphKeys.GLOBAL_VARIABLES)[2].numpy(), 0)


@pytest.mark.parametrize("center", [True, False])
def test_values_of_regularization_losses(x: np.ndarray, center: bool) -> None:
    """They are those of the variables' values now."""
    options = {
        "center": center,
        "gamma_regularizer": tf_keras.regularizers.L2(0.5),
        "beta_regularizer": tf_keras.regularizers.L1(0.25),
    }

    def program(side: Any) -> list[np.ndarray]:
        functional(side, x, **options)
        side.initialize()
        before = side.values(side.collection("REGULARIZATION_LOSSES"))
        randomize(side)
        after = side.values(side.collection("REGULARIZATION_LOSSES"))
        return [np.asarray(loss, np.float32) for loss in before + after]

    assert_same_values(program)


def randomize(side: Any) -> None:
    """Other values than the initial ones for all variables; positive, so that a standard deviation may have them."""
    rng = np.random.default_rng(23)
    side.initialize()
    for variable in side.collection("GLOBAL_VARIABLES"):
        side.assign(variable, rng.uniform(0.5, 1.5, side.values(variable).shape).astype(np.float32))


def batches(shape: tuple[int, ...], count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(19)
    return [rng.normal(1, 2, size=shape).astype(np.float32) for _ in range(count)]
