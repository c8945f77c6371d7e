"""How the arrays of a step cross the border of a JAX program.

float64 arrays between the stages (moments, saved, sums, hyper) cross as pairs of uint32: without JAX's x64 mode there
is no float64 in a program. Parameters and states are tuples of rows (C,) in a program.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nbbn.jax.work import Arrays, Shape
from nbbn.kernels.cpu.compiling import ARGUMENTS

FLOAT64 = np.dtype(np.float64)


def call_back(
    function: Callable[[Any, Any], None], given: Arrays, made: Arrays, common: frozenset[Any] = frozenset()
) -> dict[str, Any]:
    """What a Python function writes. It gets two dicts of NumPy arrays, those it reads and those it writes, in which
    parameters and states are arrays (rows, C).

    JAX makes arrays of its own of them, in a thread where x64 may not be enabled: so every float64 array crosses as
    pairs.
    """
    operands = {name: together(a) for name, a in given.items()}
    results = {name: together_across(name, a) for name, a in made.items()}
    wide = {name for name, a in (operands | results).items() if a.dtype == FLOAT64}

    def of_host(name: str, array: np.ndarray) -> np.ndarray:
        return array.view(FLOAT64)[..., 0] if name in wide or crosses_as_pairs(name) else array

    def on_host(*buffers: Any) -> tuple[np.ndarray, ...]:
        read = {n: of_host(n, np.asarray(b)) for n, b in zip(operands, buffers, strict=True)}
        written = {n: np.empty(s.shape, s.dtype) for n, s in crossing.items()}
        function(read, {n: of_host(n, a) for n, a in written.items()})
        return tuple(written.values())

    crossing = {n: Shape((*s.shape, 2), np.uint32) if n in wide else s for n, s in results.items()}
    flat = varying_alike([as_pairs(a) if n in wide else a for n, a in operands.items()])
    found = jax.pure_callback(on_host, tuple(crossing.values()), *flat, vmap_method="sequential")
    axes = _axes(flat[0])
    kept = {"new_state": axes - common}
    arrays = (as_float64(a) if n in wide else a for n, a in zip(results, found, strict=True))
    cast = [_vary_over(kept.get(n, axes), a) for n, a in zip(results, arrays, strict=True)]
    return {n: tuple(a) if isinstance(made[n], tuple) else a for n, a in zip(results, cast, strict=True)}


def varying_alike(arrays: Any) -> Any:
    """A tree of arrays that vary over the same axes of a shard_map, as it sees them: calls know no other types."""
    leaves, tree = jax.tree.flatten(arrays)
    every: frozenset[Any] = frozenset().union(*map(_axes, leaves))
    return jax.tree.unflatten(tree, [_vary_over(every, leaf) for leaf in leaves])


def _vary_over(axes: frozenset[Any], array: Any) -> Any:
    missing = tuple(sorted(axes - _axes(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def _axes(array: Any) -> frozenset[Any]:
    found: frozenset[Any] = jax.typeof(array).mat.varying
    return found


def varying(shape: Any, operands: list[Any], common: frozenset[Any] = frozenset()) -> Any:
    """The shape of a result that varies over the same axes as the operands, but for the common ones."""
    kind = jax.typeof(operands[0]).mat
    if not kind.varying:
        return shape
    mesh = jax.sharding.NamedSharding(jax.sharding.get_abstract_mesh(), jax.sharding.PartitionSpec())
    kind = kind.update(varying=kind.varying - common)
    return Shape(shape.shape, shape.dtype, sharding=mesh, manual_axis_type=kind)


def pairs(array: np.ndarray) -> np.ndarray:
    """A float64 array of the host as it crosses."""
    return np.ascontiguousarray(array)[..., None].view(np.uint32)


def as_pairs(array: Any) -> Any:
    """The same in a program, of a float64 array made where x64 is enabled."""
    return jax.lax.bitcast_convert_type(array, np.uint32)


def as_float64(array: Any) -> Any:
    """The other way, where x64 is enabled."""
    return jax.lax.bitcast_convert_type(array, FLOAT64)


def of_pairs(array: Any, dtype: np.dtype) -> Any:
    """Pairs as numbers of a dtype of the program."""
    with jax.enable_x64(True):
        return jax.lax.convert_element_type(as_float64(array), dtype)


def crosses_as_pairs(name: str) -> bool:
    return ARGUMENTS[name].startswith("d")


def across(name: str, shape: Any) -> Any:
    """The shape of an array as it crosses."""
    return Shape((*shape.shape, 2), np.uint32) if crosses_as_pairs(name) else shape


def together(value: Any) -> Any:
    """An array, or rows as one."""
    return jnp.stack(value) if isinstance(value, tuple) else value


def together_across(name: str, made: Any) -> Any:
    """The shape of what is written, of rows as one array."""
    if isinstance(made, tuple):
        return Shape((len(made), *made[0].shape), made[0].dtype)
    return across(name, made)
