"""How the arrays of a step cross the border of a JAX program.

float64 arrays between the stages (moments, saved, sums, hyper) cross as pairs of uint32: without JAX's x64 mode there
is no float64 in a program. Parameters and states are tuples of rows (C,) in a program; two rows are two buffers, of
which the kernel finds the second one by a stride, and more are one.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nbbn.core.layout import Sizes
from nbbn.jax.handlers import target
from nbbn.kernels.cpu.steps import ARGUMENTS

Arrays = Mapping[str, Any]  # by the names of a kernel's arguments; a tuple stands for rows
Shape = jax.ShapeDtypeStruct
FLOAT64 = np.dtype(np.float64)


def call(
    variant: tuple[Any, ...],
    given: Arrays,
    made: Arrays,
    attributes: dict[str, np.ndarray],
    parallel: bool = False,
    common: frozenset[Any] = frozenset(),
) -> dict[str, Any]:
    """What a compiled kernel writes, called by the program itself.

    variant: what compiled() is asked for. given: what it reads. made: the shapes of what it writes. parallel: whether
    threads are to share its tasks. common: the axes of a shard_map over which the new state is the same although the
    moments that it is made of are taken to vary.
    """
    apart = frozenset(n for n, a in {**given, **made}.items() if isinstance(a, tuple) and len(a) == 2)
    found = target(variant, parallel, apart)
    operands = varying_alike([buffer for name in found.inputs for buffer in _buffers(given[name])])
    results = [
        _varying(buffer, operands, common if name == "new_state" else frozenset())
        for name in found.outputs
        for buffer in _shapes(name, made[name])
    ]
    run = jax.ffi.ffi_call(found.name, results, vmap_method="sequential")
    written = iter(run(*operands, **attributes))
    return {name: _rows(made[name], written) for name in found.outputs}


def call_back(
    function: Callable[[Any, Any], None], given: Arrays, made: Arrays, common: frozenset[Any] = frozenset()
) -> dict[str, Any]:
    """What a Python function writes. It gets two dicts of NumPy arrays, those it reads and those it writes, in which
    parameters and states are arrays (rows, C).

    JAX makes arrays of its own of them, in a thread where x64 may not be enabled: so every float64 array crosses as
    pairs.
    """
    operands = {name: _buffers(a, apart=False)[0] for name, a in given.items()}
    results = {name: _shapes(name, a, apart=False)[0] for name, a in made.items()}
    wide = {name for name, a in (operands | results).items() if a.dtype == FLOAT64}

    def of_host(name: str, array: np.ndarray) -> np.ndarray:
        return array.view(FLOAT64)[..., 0] if name in wide or _crosses_as_pairs(name) else array

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


def _varying(shape: Any, operands: list[Any], common: frozenset[Any] = frozenset()) -> Any:
    """The shape of a result that varies over the same axes as the operands, but for the common ones."""
    kind = jax.typeof(operands[0]).mat
    if not kind.varying:
        return shape
    mesh = jax.sharding.NamedSharding(jax.sharding.get_abstract_mesh(), jax.sharding.PartitionSpec())
    varying = kind.update(varying=kind.varying - common)
    return Shape(shape.shape, shape.dtype, sharding=mesh, manual_axis_type=varying)


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


def _crosses_as_pairs(name: str) -> bool:
    return ARGUMENTS[name].startswith("d")


def _buffers(value: Any, apart: bool = True) -> list[Any]:
    if not isinstance(value, tuple):
        return [value]
    return list(value) if apart and len(value) == 2 else [jnp.stack(value)]


def _shapes(name: str, made: Any, apart: bool = True) -> list[Any]:
    if not isinstance(made, tuple):
        shape: Sizes = made.shape
        return [Shape((*shape, 2), np.uint32) if _crosses_as_pairs(name) else made]
    if apart and len(made) == 2:
        return list(made)
    return [Shape((len(made), *made[0].shape), made[0].dtype)]


def _rows(made: Any, written: Any) -> Any:
    """The next result, or rows."""
    if not isinstance(made, tuple):
        return next(written)
    return (next(written), next(written)) if len(made) == 2 else tuple(next(written))
