"""The cases as nbbn.jax gets them, beside nbbn's own layer."""

import numpy as np

import nbbn
from tests.frameworks.cases import CASES, RNG, normal

NAMES = {
    "mean": "moving_mean",
    "var": "moving_variance",
    "stddev": "moving_stddev",
    "renorm_mean": "renorm_mean",
    "renorm_stddev": "renorm_stddev",
    "seen_mean": "seen_mean",
    "seen_var": "seen_variance",
}


def problem(case, dtype=np.float32):
    """The input, scale, bias and a state that is not the first one; the layer with the same."""
    shape, options, operands = CASES[case]
    x, dy = normal(*shape).astype(dtype), normal(*shape).astype(dtype)
    layer = nbbn.BatchNormalization(**{"bessel_correction": False, "epsilon": 1e-5} | options)
    if options.get("renorm"):
        layer = nbbn.BatchNormalization(**{"epsilon": 1e-5} | options)
    layer(normal(*shape).astype(dtype), training=True, **operands)
    values = [v + RNG.random(v.shape).astype(v.dtype) for v in layer.get_weights()]
    layer.set_weights(values)
    variables = {name.rsplit("/", 1)[-1]: np.array(getattr(layer, name)) for name in layer._variables.names}
    axis = nbbn.Dispatcher(nbbn.Options(axis=options.get("axis", -1))).axis(len(shape))
    features = tuple(shape[i] for i in axis)
    named = {n: variables[v].reshape(features) for n, v in NAMES.items() if v in variables}
    scale, bias = (variables[n].reshape(features) for n in ("gamma", "beta"))
    return x, scale, bias, named, dy, layer, options, operands


def close(found, expected, dtype=np.float32, scale=1.0):
    """To float32's rounding of sums of a few hundred terms; a 16-bit result has the rounding of its dtype."""
    tolerance = {"float64": 1e-10, "float32": 2e-5, "float16": 2e-3, "bfloat16": 2e-2}[np.dtype(dtype).name]
    found, expected = (np.asarray(a, np.float64) for a in (found, expected))
    most = max(1.0, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=0, atol=tolerance * most * scale)
