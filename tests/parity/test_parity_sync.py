"""SyncBatchNormalization against tf_keras's layer with synchronized=True, on replicas of MirroredStrategy.

Where theirs is right, both agree; where it fails, a test shows both sides, so that another TensorFlow is noticed.
"""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import nbbn
from tests.helpers.processes import TESTS
from tests.helpers.ranks import on_ranks

pytest.importorskip("tensorflow", reason="the parity tests compare with TensorFlow")
pytest.importorskip("tf_keras", reason="the parity tests compare with Keras 2 (tf_keras)")

pytestmark = pytest.mark.parity

RNG = np.random.default_rng(0)


def arrays(
    shapes: list[tuple[int, ...]], mean: float = 1.0, dtype: type = np.float32
) -> list[list[dict[str, np.ndarray]]]:
    """x and dy of two steps on some replicas, with a mean of their own."""
    return [
        [
            {"x": RNG.normal(mean + rank, 1 + step, shape).astype(dtype), "dy": RNG.normal(size=shape).astype(dtype)}
            for rank, shape in enumerate(shapes)
        ]
        for step in range(2)
    ]


def masked(
    steps: list[list[dict[str, np.ndarray]]], excluded: float | None = None
) -> list[list[dict[str, np.ndarray]]]:
    """With two of three samples, or steps; the others can be NaN."""
    for step in steps:
        for part in step:
            part["mask"] = np.arange(part["x"][..., 0].size).reshape(part["x"].shape[:-1]) % 3 > 0
            if excluded is not None:
                part["x"][~part["mask"]] = excluded
    return steps


CASES: dict[str, tuple[int | list[int], list[list[dict[str, np.ndarray]]]]] = {
    "dense": (-1, arrays([(6, 5), (6, 5)])),
    "last": (-1, arrays([(3, 4, 2, 5), (3, 4, 2, 5)])),
    "first": (1, arrays([(3, 5, 4, 2), (3, 5, 4, 2)])),
    "uneven": (-1, arrays([(7, 5), (2, 5)])),
    "inner": (-1, arrays([(2, 4, 4, 5), (2, 1, 3, 5)])),
    "mask": (-1, masked(arrays([(6, 5), (4, 5)]))),
    "large": (-1, arrays([(64, 5), (64, 5)], mean=1e4)),
    "nan": (-1, masked(arrays([(6, 5), (6, 5)]), np.nan)),
    "mask-first": (1, masked(arrays([(6, 5, 5), (6, 5, 5)]))),
    "empty": (-1, arrays([(6, 5), (0, 5)])),
    "axes": ([1, 3], arrays([(3, 4, 2, 5), (5, 4, 2, 5)])),
    "four": (-1, arrays([(3, 5), (5, 5), (2, 5), (4, 5)])),
    "half": (-1, arrays([(6, 5), (4, 5)], dtype=np.float16)),
}
AGREE = ["dense", "last", "first", "uneven", "inner", "mask", "axes", "four", "half"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """All that their layer returned, and its statistics after each step."""
    folder, found = tmp_path_factory.mktemp("keras"), dict[str, np.ndarray]()
    for count in (2, 4):
        given: dict[str, Any] = {}
        for name, (axis, steps) in CASES.items():
            if len(steps[0]) == count:
                given |= {f"{name} axis": axis, f"{name} momentum": 0.5}
                for i, parts in enumerate(steps):
                    for rank, part in enumerate(parts):
                        given |= {f"{name} {i} {rank} {what}": value for what, value in part.items()}
        np.savez(folder / "in.npz", **given)
        program = [sys.executable, "-m", "tests.helpers.keras_replicas", str(count)]
        command = [*program, folder / "in.npz", folder / "out.npz"]
        done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        with np.load(folder / "out.npz") as file:
            found |= dict(file)
    return found


def ours(name: str) -> dict[str, np.ndarray]:
    axis, steps = CASES[name]

    def run(group: Any) -> dict[str, np.ndarray]:
        layer, found = nbbn.SyncBatchNormalization(axis=axis, momentum=0.5, group=group), {}
        for i, parts in enumerate(steps):
            part = parts[group.rank]
            y, pullback = layer.vjp(part["x"], True, part.get("mask"))
            gradients = pullback(part["dy"])
            results = {"y": y, "inputs": gradients.inputs, "gamma": gradients.gamma, "beta": gradients.beta}
            results |= {what: getattr(layer, what) for what in ("moving_mean", "moving_variance")}
            found |= {f"{name} {i} {group.rank} {what}": value for what, value in results.items()}
        return found

    found: dict[str, np.ndarray] = {}
    for results in on_ranks(nbbn.sync.threads(len(steps[0]), timeout=30), run):
        found |= results
    return found


def moments(name: str, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of all that counts on both replicas, in float64."""
    axis, steps = CASES[name]
    parts = []
    for part in steps[step]:
        x = np.moveaxis(part["x"].astype(np.float64), axis, -1)
        parts.append(x[part["mask"]] if "mask" in part else x.reshape(-1, 5))
    whole = np.concatenate(parts)
    return whole.mean(0), whole.var(0)


@pytest.mark.parametrize("name", AGREE)
def test_outputs_gradients_and_statistics(name: str, theirs: dict[str, np.ndarray]) -> None:
    """float32 on both sides, in different orders: some units of 2**-23 for numbers up to 8, gamma's sums up to 64. What
    is float16 at the end may be rounded differently then, by a unit of 2**-9 for numbers up to 4."""
    for key, value in ours(name).items():
        bound = 2**-17 if value.dtype == np.float32 else 2**-9
        np.testing.assert_allclose(value, theirs[key], rtol=0, atol=bound, err_msg=key)


def check_first_step(name: str, found: dict[str, np.ndarray]) -> None:
    """That ours are the moments of all that counts: half of them, and half of the initial state."""
    mean, variance = moments(name, 0)
    for rank in range(2):
        np.testing.assert_allclose(found[f"{name} 0 {rank} moving_mean"], mean / 2, rtol=2**-22)
        np.testing.assert_allclose(found[f"{name} 0 {rank} moving_variance"], (1 + variance) / 2, rtol=2**-22)


def test_deviation_large_means(theirs: dict[str, np.ndarray]) -> None:
    """Means of 10,000 deviations: E[x^2] - E[x]^2 has no digit left there, count, mean and m2 have all."""
    found, (mean, variance) = ours("large"), moments("large", 0)
    check_first_step("large", found)
    for rank in range(2):
        x = CASES["large"][1][0][rank]["x"]
        expected = (x - mean) / np.sqrt(variance + 1e-3)
        assert np.abs(theirs[f"large 0 {rank} y"] - expected).max() > 10
        np.testing.assert_allclose(found[f"large 0 {rank} y"], expected, rtol=0, atol=2**-20)
    assert np.abs(theirs["large 0 0 moving_variance"] - (1 + variance) / 2).max() > 0.3


def test_deviation_nan_under_a_mask(theirs: dict[str, np.ndarray]) -> None:
    assert np.isnan(theirs["nan 0 0 moving_mean"]).all()
    check_first_step("nan", ours("nan"))


def test_deviation_mask_of_another_axis(theirs: dict[str, np.ndarray]) -> None:
    """They append the feature axis to the mask, wherever it is."""
    mean, _ = moments("mask-first", 0)
    assert np.abs(theirs["mask-first 0 0 moving_mean"] - mean / 2).max() > 0.01
    check_first_step("mask-first", ours("mask-first"))


def test_deviation_an_empty_replica_keeps_up(theirs: dict[str, np.ndarray]) -> None:
    """Theirs leaves out its update of the variance, and has another state from then on."""
    found = ours("empty")
    check_first_step("empty", found)
    for name in ("moving_mean", "moving_variance"):
        np.testing.assert_array_equal(found[f"empty 1 0 {name}"], found[f"empty 1 1 {name}"])
    np.testing.assert_array_equal(theirs["empty 1 1 moving_variance"], np.ones(5))
    assert (theirs["empty 1 0 moving_variance"] != theirs["empty 1 1 moving_variance"]).any()
