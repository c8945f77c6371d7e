"""Mean and variance of a dask array, of its blocks: python docs/examples/dask/moments.py

A block has all columns, and some of the rows. Its moments are small; only they go from one worker to another.
"""

import operator

import dask
import dask.array as da
import numpy as np

import nbbn


def moments(block):
    """A function, and no method of one object: dask may compute a task twice."""
    return nbbn.Moments().update(block)


def tree(array):
    """A delayed nbbn.Moments of all blocks, merged two by two, in the same order whoever computes them."""
    parts = [dask.delayed(moments)(block) for block in array.to_delayed().ravel()]
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=False)
        parts = [dask.delayed(operator.add)(*pair) for pair in pairs] + parts[len(parts) & ~1 :]
    return parts[0]


def by_map_blocks(array):
    """The same without a tree: the moments of the blocks are an array of objects, which are merged here."""

    def as_block(block):
        found = np.empty((1, 1), object)
        found[0, 0] = moments(block)
        return found

    parts = array.map_blocks(as_block, chunks=(1, 1), dtype=object, meta=np.empty((0, 0), object))
    return sum(parts.compute().ravel(), nbbn.Moments())


if __name__ == "__main__":
    x = np.random.default_rng(0).normal(1000, 1, (100_000, 16)).astype(np.float32)
    array, exact = da.from_array(x, chunks=(10_000, -1)), x.var(axis=0, dtype=np.float64)
    for name, variance in (
        ("tree", tree(array).compute().variance()),
        ("map_blocks", by_map_blocks(array).variance()),
        ("dask.array.var", array.var(axis=0).compute()),
    ):
        print(f"{name}: the variance is off by {abs(variance / exact - 1).max():.0e}")
