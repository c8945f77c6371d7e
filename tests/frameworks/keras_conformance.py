"""Keras's own tests of BatchNormalization, with nbbn's class in the place of Keras's: `python keras_conformance.py`."""

import unittest

import keras.src.layers
from conformance import run
from keras.src.layers.normalization import batch_normalization_test

import nbbn.keras

keras.src.layers.BatchNormalization = nbbn.keras.BatchNormalization


def is_unable(test, error):
    """This backend has no fit()."""
    return error[0] is NotImplementedError and "fit not implemented" in str(error[1])


if __name__ == "__main__":
    run(unittest.defaultTestLoader.loadTestsFromModule(batch_normalization_test), is_unable)
