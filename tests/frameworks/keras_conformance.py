"""Keras's own tests of BatchNormalization, with nbbn's class in the place of Keras's: `python keras_conformance.py`.

Prints the numbers of tests that passed, and of those that are not for this backend: it has no fit().
"""

import sys
import unittest

import keras.src.layers
from keras.src.layers.normalization import batch_normalization_test

import nbbn.keras

keras.src.layers.BatchNormalization = nbbn.keras.BatchNormalization


class Result(unittest.TextTestResult):
    passed = unable = 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1

    def addError(self, test, error):
        if error[0] is NotImplementedError and "fit not implemented" in str(error[1]):
            self.unable += 1
        else:
            super().addError(test, error)


if __name__ == "__main__":
    tests = unittest.defaultTestLoader.loadTestsFromModule(batch_normalization_test)
    result = unittest.TextTestRunner(resultclass=Result).run(tests)
    print(f"\npassed {result.passed}, unable {result.unable}, failed {len(result.failures) + len(result.errors)}")
    sys.exit(not result.wasSuccessful())
