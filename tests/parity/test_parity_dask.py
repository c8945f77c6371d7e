"""Moments in the graphs of dask: the example of the pages."""

import runpy
import subprocess
import sys
from pathlib import Path

import dask.array as da
import numpy as np
import pytest

pytestmark = pytest.mark.parity

SCRIPT = str(Path(__file__).parents[2] / "docs/examples/dask/moments.py")
EXAMPLE = runpy.run_path(SCRIPT)
tree, by_map_blocks = EXAMPLE["tree"], EXAMPLE["by_map_blocks"]


def test_the_example_says_how_exact_it_is():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    names, errors = zip(*(line.split(": the variance is off by ") for line in done.stdout.splitlines()), strict=True)
    assert names == ("tree", "map_blocks", "dask.array.var")
    assert max(map(float, errors[:2])) < 1e-11 < 1e-7 < float(errors[2])


@pytest.fixture(params=["float32", "float64"])
def x(request):
    return np.random.default_rng(0).normal(1000, 1, (10007, 12)).astype(request.param)


def check(found, x):
    wide = x.astype(np.float64)
    assert (found.count == len(x)).all()
    np.testing.assert_allclose(found.mean, wide.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.variance(1), wide.var(0, ddof=1), rtol=1e-11)  # a mean of 1000 deviations


@pytest.mark.parametrize("scheduler", ["threads", "processes", "synchronous"])
def test_a_tree_of_delayed_blocks(x, scheduler):
    total = tree(da.from_array(x, chunks=(1000, -1)))
    found = total.compute(scheduler=scheduler, num_workers=2)
    check(found, x)
    assert found == total.compute(scheduler="synchronous")  # the tree is the order of merging


@pytest.mark.parametrize("rows", [1000, 3000, 20000])
def test_as_many_blocks_as_there_are(x, rows):
    array = da.from_array(x, chunks=(rows, -1))
    check(tree(array).compute(), x)
    check(by_map_blocks(array), x)


def test_the_variance_of_dask_is_off():
    """In float32 it merges float32 sums. Moments are float64 whatever the data are."""
    x = np.random.default_rng(0).normal(1000, 1, (100_000, 4)).astype(np.float32)
    array, exact = da.from_array(x, chunks=(10_000, -1)), x.astype(np.float64).var(0)
    assert (abs(array.var(axis=0).compute() / exact - 1) > 1e-6).any()
    np.testing.assert_allclose(by_map_blocks(array).variance(), exact, rtol=1e-11)
