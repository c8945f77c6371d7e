"""Flax's own tests, with nbbn's classes in the place of Flax's: `python flax_conformance.py FOLDER`.

FOLDER: `tests` of Flax's source archive, of the version that is installed; its wheel has none.
"""

import importlib.util
import sys
import unittest
from pathlib import Path

import flax.linen
import flax.nnx
from conformance import run

import nbbn.flax

# By the file: what tests are called that have to do with batch normalization.
FILES = {
    "linen/linen_test.py": "batch_norm",
    "linen/summary_test.py": "",
    "nnx/nn/normalization_test.py": "",
    "nnx/integration_test.py": "",
    "nnx/module_test.py": "",
    "nnx/bridge/wrappers_test.py": "",
}
UNABLE = {
    "test_batch_norm_complex": "complex inputs are refused",
    "test_module_summary": "XLA does not count the operations of a kernel, so the sum of a module's is unknown",
}

flax.linen.BatchNorm = nbbn.flax.linen.BatchNorm
flax.nnx.BatchNorm = nbbn.flax.nnx.BatchNorm


def is_unable(test, error):
    return any(test._testMethodName.startswith(name) for name in UNABLE)


def tests_of(folder: Path) -> unittest.TestSuite:
    suite, loader = unittest.TestSuite(), unittest.TestLoader()
    for name, part in FILES.items():
        spec = importlib.util.spec_from_file_location(name.replace("/", "_").removesuffix(".py"), folder / name)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        loader.testNamePatterns = [f"*{part}*"]
        suite.addTests(loader.loadTestsFromModule(module))
    return suite


if __name__ == "__main__":
    run(tests_of(Path(sys.argv[1])), is_unable)
