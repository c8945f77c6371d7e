"""nbbn.keras on each of Keras's backends, which have a process each: Keras chooses one when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import nbbn

pytestmark = pytest.mark.frameworks

ROOT = Path(nbbn.__file__).parents[1]
HERE = Path(__file__).parent
FILES = sorted(map(str, HERE.glob("on_keras_*.py")))
BACKENDS = ("torch", "jax", "tensorflow", "numpy")
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def python(backend, *arguments, timeout=500):
    """What a process with this backend printed; fails unless it exits with 0."""
    environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-20000:]}\n{done.stderr[-5000:]}"
    return done.stdout


@EVERY_BACKEND
def test_keras_own_tests(backend):
    """All 33 of them; those that fit are not for NumPy."""
    expected = "passed 27, unable 6, failed 0" if backend == "numpy" else "passed 33, unable 0, failed 0"
    assert python(backend, str(HERE / "keras_conformance.py")).splitlines()[-1] == expected


@EVERY_BACKEND
def test_on_backend(backend):
    """on_keras_*.py; what is not for this backend is deselected there."""
    out = python(backend, "-m", "pytest", "-q", "-n", "0", "-m", "frameworks", "-rs", *FILES)
    assert " passed" in out
    assert " skipped" not in out


def test_a_file_for_somebody_without_nbbn(tmp_path):
    """Keras's layer takes the place of ours, by its registered name."""
    path = str(tmp_path / "model.keras")
    save = f"""
import keras, nbbn.keras
model = keras.Sequential([keras.Input((3,)), nbbn.keras.BatchNormalization(renorm=True)])
model.layers[0].moving_mean.assign([1.0, 2.0, 3.0])
model.save({path!r})
"""
    load = f"""
import sys, keras
known = {{"nbbn>BatchNormalization": keras.layers.BatchNormalization}}
layer = keras.models.load_model({path!r}, custom_objects=known).layers[0]
print("nbbn" in sys.modules, type(layer) is keras.layers.BatchNormalization, layer.moving_mean.numpy().tolist())
"""
    python("numpy", "-c", save)
    assert python("numpy", "-c", load).splitlines()[-1] == "False True [1.0, 2.0, 3.0]"
