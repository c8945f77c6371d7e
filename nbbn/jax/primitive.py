"""A step as an operation of a program. It becomes calls of a platform's kernels when the program is compiled for it, so
a program may be made on one platform and run on another, and no kernel is compiled that does not run."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir, xla

from nbbn.jax import on_cpu, on_cuda
from nbbn.jax.crossing import across, varying, varying_alike
from nbbn.jax.work import Arrays, Work

# What runs a step, by the platform: of what the step reads and the shapes of what it writes it makes what is written.
PLATFORMS: dict[str, Callable[[Work, Arrays, Arrays], Arrays]] = {"cpu": on_cpu.run, "cuda": on_cuda.run}


def call(work: Work, given: Arrays, made: Arrays, common: frozenset[Any] = frozenset()) -> dict[str, Any]:
    """What a step writes.

    given: what it reads. made: the shapes of what it writes. common: the axes of a shard_map over which the new state
    is the same although the moments that it is made of are taken to vary.
    """
    leaves, reads = jax.tree.flatten(dict(given))
    operands = varying_alike(leaves)
    shapes, writes = jax.tree.flatten(dict(made))
    results = [
        varying(across(n, shape), operands, common if n == "new_state" else frozenset())
        for n, rows in sorted(made.items())
        for shape in jax.tree.leaves(rows)
    ]
    written = _step.bind(*operands, work=work, reads=reads, writes=writes, shapes=tuple(shapes), results=tuple(results))
    found: dict[str, Any] = jax.tree.unflatten(writes, written)
    return found


def _types(*_: Any, results: tuple[Any, ...], **params: Any) -> list[Any]:
    return [jax.typeof(shape) for shape in results]


def _one_after_the_other(
    operands: tuple[Any, ...], dims: tuple[int | None, ...], **params: Any
) -> tuple[list[Any], list[int]]:
    """The step under vmap."""
    mapped = {i: jnp.moveaxis(a, d, 0) for i, (a, d) in enumerate(zip(operands, dims, strict=True)) if d is not None}

    def one(_: None, own: dict[int, Any]) -> tuple[None, list[Any]]:
        return None, _step.bind(*(own.get(i, a) for i, a in enumerate(operands)), **params)

    _, made = jax.lax.scan(one, None, mapped)
    return made, [0] * len(made)


def _lowering(platform: str) -> Any:
    def run(*operands: Any, work: Work, reads: Any, writes: Any, shapes: tuple[Any, ...], **params: Any) -> list[Any]:
        given, made = jax.tree.unflatten(reads, operands), jax.tree.unflatten(writes, shapes)
        written: list[Any] = jax.tree.leaves(PLATFORMS[platform](work, given, made))
        return written

    return mlir.lower_fun(run, multiple_results=True)


_step: Any = Primitive("nbbn_step")
_step.multiple_results = True
_step.def_abstract_eval(_types)
_step.def_impl(partial(xla.apply_primitive, _step))
batching.primitive_batchers[_step] = _one_after_the_other
for _platform in PLATFORMS:
    mlir.register_lowering(_step, _lowering(_platform), platform=_platform)
