"""A layer on arrays of a library whose adapter takes those of the host for a GPU's: in Numba's simulator memory is the
host's. Run by test_adapters.py in a process of its own."""

import functools
import importlib
import sys

import numpy as np

import nbbn
from nbbn import nn
from nbbn.core import dtypes
from tests.test_adapters import Capsules, Exporter, cupy_stand_in

# A simulated thread costs a millisecond: blocks of a few, and so several of them.
SMALL = {"threads": 8, "columns": 4, "vectors": 1, "applied": 8}
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}  # a few roundings; one of a value up to 4, rounded differently


def adapted(name):
    """The library's adapter, with the host in the place of the GPU; what makes its arrays, and a NumPy array of one."""
    if name in ("DLPack", "interface"):
        library = importlib.import_module("nbbn.arrays.interface")
        kind = Capsules if name == "DLPack" else Exporter
        return library, lambda a: kind(a.copy()), lambda a: a.host if isinstance(a, kind) else library.to_host(a)
    if name == "cupy":
        sys.modules["cupy"] = cupy_stand_in()
    library = importlib.import_module(f"nbbn.arrays.{name}")
    framework = importlib.import_module(name)
    kind = {"torch": "Tensor", "cupy": "ndarray", "jax": "Array"}[name]
    library.is_device_array = lambda value: isinstance(value, getattr(framework, kind))
    library.is_host_array = lambda value: False
    library.stream = lambda device: 0
    if name == "torch":
        library._device = lambda number: framework.device("cpu")
        library._pinned = lambda tensor: tensor  # there is no driver to ask for pinned memory
    if name == "jax":
        library._order = lambda array: array.block_until_ready()  # there is no stream to wait in
    if name == "cupy":
        framework.ndarray.__module__ = "cupy"
    return library, lambda a: library.from_host(a, 0), library.to_host


def layer_with(thresholds, axis=1, **options):
    layer = nbbn.BatchNormalization(axis, **options)
    nbbn.force(layer, thresholds=thresholds)
    return layer


def run(library, make, to_host, dtype):
    """Every result of a layer's calls, as NumPy arrays: those of the library's arrays, and those of NumPy's."""
    rng = np.random.default_rng(0)
    x = rng.normal(2, 1, (4, 2, 3, 4)).astype(dtypes.resolve(dtype))
    deep = rng.normal(2, 1, (2, 2, 3, 2, 2)).astype(x.dtype)
    mask = rng.random((4, 3, 4)) > 0.3
    result = type(library.empty((1,), x.dtype, 0))
    for give, take, kind, thresholds in ((make, to_host, result, SMALL), (np.copy, np.asarray, np.ndarray, {})):
        layer = layer_with(thresholds, momentum=0.5, activation="relu")
        found = {}
        y, pullback = layer.vjp(give(x), training=True, residual=give(x[::-1].copy()), mask=mask)
        gradients = pullback(give(x))
        for array in (y, gradients.inputs, gradients.gamma, layer.moving_mean):
            assert isinstance(array, kind), f"{kind.__name__} expected; received {type(array).__name__}"
        found |= {"y": y, "dx": gradients.inputs, "dgamma": gradients.gamma, "dresidual": gradients.residual}
        for call in ("second", "third"):  # which take the short way
            y, pullback = layer.vjp(give(x), training=True, residual=give(x[::-1].copy()))
            gradients = pullback(give(x))
            found |= {f"{call} {n}": g for n, g in gradients._asdict().items() if g is not None} | {f"{call} y": y}
            found[f"{call} inference"] = layer(give(x))
        assert {key[0] for key, step in layer._dispatcher.bound.items() if step} == {"train", "backward", "infer"}
        found |= {"mean": layer.moving_mean, "inference": layer(give(x))}
        # Five alternating runs, which are copied, and a virtual batch.
        found["copied"] = layer_with(thresholds, axis=[1, 3], momentum=0.5)(give(deep), training=True)
        found["virtual"] = layer_with(thresholds, virtual_batch_size=2)(give(x), training=True)
        # What the library's arrays say of the elements, and the gradients of an adjustment.
        found["masked"] = layer_with(thresholds, momentum=0.5)(give(x), training=True, mask=give(mask))
        pair = give(x[:, :, :1, :1].astype(np.float32)), give(x[0].astype(np.float64))
        layer = layer_with(thresholds, -1, adjustment=lambda shape, pair=pair: pair)
        found["sequences"], pullback = layer.vjp(give(x), training=True, lengths=give(np.array([2, 0, 1, 2])))
        found["da"], found["db"] = pullback(give(x)).adjustment
        assert isinstance(found["da"], kind)
        ragged = layer_with(thresholds, virtual_batch_size=3, ragged="last", virtual_batch_order="contiguous")
        found["ragged"] = ragged(give(x), training=True)
        options = functools.partial(nbbn.Options, momentum=0.0, epsilon=0.0, bessel_correction=False)
        force = nbbn.Force(thresholds=thresholds)
        nn._dispatcher = lambda axis, options=options, force=force, **_: nbbn.Dispatcher(options(axis), force)
        found["moments"] = nn.weighted_moments(give(x), [0, 2], give(mask[:, None]))[1]
        assert isinstance(found["moments"], kind)
        if library.__name__ != "nbbn.arrays.jax":  # whose arrays do not change
            out = give(x)
            assert layer(give(x), out=out) is out
            found["out"] = out
        results = {name: take(value).astype(np.float64) for name, value in found.items()}
        results |= {f"weight {i}": w for i, w in enumerate(layer.get_weights())}
        yield results


def main(name, dtype):
    found, expected = run(*adapted(name), dtype)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        bound = TOLERANCES["float32" if key.startswith("weight") or key == "mean" else dtype]
        np.testing.assert_allclose(value, expected[key], rtol=bound, atol=bound, err_msg=key)
    print(f"{len(found)} results agree")
