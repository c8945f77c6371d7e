"""tf_keras's synchronized layer on replicas, MirroredStrategy on logical CPUs: a program, because TensorFlow's devices
are configured before it starts. python -m tests.helpers.keras_replicas REPLICAS IN.npz OUT.npz"""

import os
import sys

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import tensorflow as tf
import tf_keras


def train(strategy, values, name):
    """Two steps of a layer. values: "NAME axis" and "NAME momentum", and of each step and replica x, dy and mask."""
    count, is_half = strategy.num_replicas_in_sync, values[f"{name} 0 0 x"].dtype == np.float16
    with strategy.scope():
        layer = tf_keras.layers.BatchNormalization(
            axis=values[f"{name} axis"].tolist(),
            momentum=float(values[f"{name} momentum"]),
            synchronized=True,
            dtype="mixed_float16" if is_half else None,
        )

    def step(x, dy, mask):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, mask=mask)
            loss = tf.reduce_sum(y * dy)
        return y, *tape.gradient(loss, [x, *layer.trainable_weights])

    found = {}
    for i in range(2):

        def of_replicas(what, i=i):
            arrays = [values.get(f"{name} {i} {rank} {what}") for rank in range(count)]
            if arrays[0] is None:
                return None
            return strategy.experimental_distribute_values_from_function(
                lambda context: tf.constant(arrays[context.replica_id_in_sync_group])
            )

        results = strategy.run(step, args=(of_replicas("x"), of_replicas("dy"), of_replicas("mask")))
        for what, result in zip(("y", "inputs", "gamma", "beta"), results, strict=True):
            for rank, part in enumerate(strategy.experimental_local_results(result)):
                found[f"{name} {i} {rank} {what}"] = part.numpy()
        for what in ("moving_mean", "moving_variance"):
            for rank, part in enumerate(strategy.experimental_local_results(getattr(layer, what))):
                found[f"{name} {i} {rank} {what}"] = part.numpy()
    return found


if __name__ == "__main__":
    (cpu,), count = tf.config.list_physical_devices("CPU"), int(sys.argv[1])
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(count)])
    with np.load(sys.argv[2]) as file:
        values = dict(file)
    results = {}
    for name in sorted({key.split(" ")[0] for key in values}):
        results |= train(strategy, values, name)
    np.savez(sys.argv[3], **results)
