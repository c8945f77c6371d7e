"""What nbbn.keras refuses, and second derivatives."""

import keras
import numpy as np
import pytest

from nbbn.keras import BatchNormalization
from tests.frameworks.cases import RNG, normal
from tests.frameworks.keras_backend import BACKEND, DATA, MARKS, TRAINABLE, array, network, only

pytestmark = MARKS


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"axis": 1.5}, TypeError, "axis must be an int .*received 1.5"),
        ({"axis": []}, ValueError, "axis must name at least one dimension"),
        ({"momentum": 1.5}, ValueError, "momentum must be .*received 1.5"),
        ({"momentum": "high"}, TypeError, "momentum must be .*received 'high'"),
        ({"renorm_momentum": -1}, ValueError, "renorm_momentum must be .*received -1"),
        ({"activation": "gelu"}, ValueError, "activation must be 'relu', 'linear' or None; received 'gelu'"),
        ({"virtual_batch_size": 0}, ValueError, "virtual_batch_size must be a positive integer; received 0"),
        ({"ragged": "last"}, ValueError, "ragged='last' needs a virtual_batch_size"),
        ({"adjustment": 3}, TypeError, "adjustment must be a callable"),
        ({"renorm": True, "bessel_correction": True}, ValueError, "bessel_correction=True is not possible"),
        ({"renorm": "yes"}, TypeError, "renorm must be True or False; received 'yes'"),
        ({"synchronized": True}, ValueError, "synchronized must be False"),
        ({"renorm": True, "renorm_clipping": {"rmax": lambda: 1.0, "max": 2}}, ValueError, "max"),
        ({"renorm_clipping": [1]}, TypeError, "renorm_clipping must be a dict"),
        ({"ghosts": 3}, (TypeError, ValueError), "ghosts"),
    ],
)
def test_arguments(options, error, message):
    with pytest.raises(error, match=message):
        BatchNormalization(**options)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"axis": 3}, (8, 4), "axis must be between -2 and 1 for an input of rank 2; received 3"),
        ({"axis": [1, -1]}, (8, 4), "axis must not name a dimension twice"),
        ({"axis": [0, 1], "virtual_batch_size": 4}, (8, 4), "axis must not include the batch dimension 0"),
    ],
)
def test_shapes_to_build_for(options, shape, message):
    with pytest.raises(ValueError, match=message):
        BatchNormalization(**options)(normal(*shape), training=True)


def test_a_feature_axis_of_unknown_size():
    with pytest.raises(ValueError, match="the size of dimension 2, a feature axis, must be known"):
        BatchNormalization()(keras.Input((4, None)))


@only("torch", "tensorflow", "numpy")  # JAX's values are not looked at
@pytest.mark.parametrize("length", [6, -1])
def test_lengths_that_no_sample_has(length):
    layer = BatchNormalization()
    with pytest.raises(Exception, match=f"lengths must be from 0 to 5, .* from .*{length}"):  # TensorFlow has its own
        layer(normal(2, 5, 3), training=True, lengths=np.array([3, length]))
    assert not array(layer.moving_mean).any()


CALLS = {
    "mask": ({}, {"mask": np.ones(3, bool)}, "mask must"),
    "mask of a wrong rank": ({}, {"mask": np.ones((8, 4, 1, 1), bool)}, "mask must"),
    "residual": ({}, {"residual": np.ones((8, 3), np.float32)}, "residual must have the input's shape"),
    "both": ({}, {"mask": np.ones(8, bool), "lengths": np.ones(8, int)}, "mask and lengths both say what counts"),
    "lengths": ({}, {"lengths": np.ones(8, int)}, "lengths need an input with"),
    "ghost": ({"virtual_batch_size": 3}, {}, "virtual_batch_size=3 must divide the batch"),
    "no pair": ({"adjustment": lambda shape: 1.0}, {}, "adjustment must .*pair"),
    "pair": ({"adjustment": lambda shape: (np.ones(3), np.ones(3))}, {}, "must broadcast against the input's shape"),
    "schedule": ({"momentum": lambda: 2.0}, {}, "momentum must be .*2.0"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_that_are_not_possible(case):
    """A message that names the argument; nothing has changed. TensorFlow wraps what a function of NumPy raises."""
    options, operands, message = CALLS[case]
    layer = BatchNormalization(**options)
    layer.build((8, 4))
    before, errors = layer.get_weights(), [ValueError, TypeError]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        errors.append(tf.errors.InvalidArgumentError)
    with pytest.raises(tuple(errors), match=message):
        layer(normal(8, 4), training=True, **operands)
    for one, other in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_options_that_cannot_change():
    layer = BatchNormalization()
    layer.build((8, 4))
    layer.momentum = None
    with pytest.raises(ValueError, match="cannot change once the layer is built"):
        layer(normal(8, 4), training=True)
    layer.momentum = 0.5
    layer(normal(8, 4), training=True)


@only("jax")
def test_numbers_of_callables_do_not_freeze_in_compiled_programs():
    model = network(BatchNormalization, momentum=lambda: 0.5)
    with pytest.raises(ValueError, match=r"callables for momenta .* must give a keras.Variable"):
        model.train_on_batch(*DATA)
    eager = network(BatchNormalization, eager=True, momentum=lambda: 0.5)
    eager.train_on_batch(*DATA)


@TRAINABLE
def test_a_schedule_of_a_variable_in_a_compiled_program():
    momentum = keras.Variable(1.0, trainable=False, name="momentum")

    def scheduled():
        layer = BatchNormalization(momentum=lambda: momentum)
        layer.schedule = momentum  # a weight of the layer
        return layer

    model = network(scheduled)
    for value in (1.0, 0.0):
        momentum.assign(value)
        model.train_on_batch(*DATA)
        assert (abs(array(model.layers[2].moving_mean)).max() > 1e-3) == (value == 0.0)


@only("tensorflow")
def test_second_derivatives_raise():
    import tensorflow as tf

    layer, x = BatchNormalization(), tf.constant(normal(8, 4))
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = tf.reduce_sum(layer(x, training=True) ** 3)
        (dx,) = inner.gradient(y, [x])
    with pytest.raises(NotImplementedError, match="no second derivatives with TensorFlow"):
        outer.gradient(dx, x)


@only("torch")
def test_second_derivatives_of_torch():
    import torch

    layer = BatchNormalization(dtype="float64")
    layer.build((None, 3))
    x = torch.tensor(normal(6, 3, dtype=np.float64), requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x, training=True), (x,))


@only("jax")
def test_second_derivatives_of_jax():
    import jax
    from jax.test_util import check_grads

    layer = BatchNormalization()
    layer.build((None, 3))
    values = [[v.value for v in vs] for vs in (layer.trainable_variables, layer.non_trainable_variables)]
    x = jax.numpy.asarray(RNG.normal(size=(6, 3)), np.float32)
    check_grads(lambda x: layer.stateless_call(*values, x, training=True)[0], (x,), 2, ["rev"], rtol=0.05, atol=0.05)
