"""Layers on a GPU, or in Numba's simulator, beside the same layers on the CPU."""

import numpy as np
from numba import cuda

import nbbn

# Either side is within a dozen roundings of the exact result, or within one of a 16-bit float.
BOUNDS = {np.dtype(np.float64): 1e-12, np.dtype(np.float32): 2e-5, np.dtype(np.float16): 4e-3}


# The simulator's threads are Python's: a block has a few.
FEW_THREADS = {"threads": 8, "columns": 4, "vectors": 1, "applied": 2}


def few_threads(layer, **choices):
    nbbn.force(layer, thresholds=FEW_THREADS, **choices)
    return layer


def new_layer(*arguments, **options):
    return few_threads(nbbn.BatchNormalization(*arguments, **options))


def host(value):
    return value.copy_to_host() if hasattr(value, "copy_to_host") else value


def device(value):
    return None if value is None else cuda.to_device(value)


def agree(found, expected, name):
    found = np.asarray(host(found))
    assert found.dtype == expected.dtype, name
    bound = BOUNDS.get(expected.dtype, 4e-2)
    np.testing.assert_allclose(found.astype(float), expected.astype(float), rtol=bound, atol=bound, err_msg=name)


def gradients_agree(found, expected):
    for name in expected._fields:
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        pairs = [] if one is None else zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
        for a, b in pairs:
            agree(a, b, name)


class Pair:
    """The same layer twice, and calls of both that must agree."""

    def __init__(self, shape, axis, dtype=np.float32, residual=False, **options):
        self.cpu, self.gpu = nbbn.BatchNormalization(axis=axis, **options), new_layer(axis, **options)
        self.rng, self.shape, self.dtype, self.residual = np.random.default_rng(0), shape, dtype, residual

    def array(self, mean=0.0):
        return self.rng.normal(mean, 1.5, self.shape).astype(self.dtype)

    def check(self, training=True, mask=None, update_statistics=True):
        x, dy, residual = self.array(2.0), self.array(), self.array() if self.residual else None
        options = {"training": training, "mask": mask, "update_statistics": update_statistics}
        y, pullback = self.cpu.vjp(x, residual=residual, **options)
        found, pullback_on_gpu = self.gpu.vjp(device(x), residual=device(residual), **options)
        agree(found, y, "y")
        gradients_agree(pullback_on_gpu(device(dy)), pullback(dy))
        for name, one, other in zip(
            self.cpu._variables.names, self.gpu.get_weights(), self.cpu.get_weights(), strict=True
        ):
            agree(one, other, name)
        return self
