"""Compiling ahead, into the kernel cache, what calls will need."""

import logging
import sys
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any

from nbbn.core.layout import Sizes
from nbbn.deploy.needed import Kernel, Kernels, kernels
from nbbn.kernels.cpu.compiling import compiled
from nbbn.layer.layer import BatchNormalization, as_layers
from nbbn.runtime import LOGGER, cache_folder, find_cache

MODES: dict[str, dict[str, bool]] = {
    "inference": {},
    "training": {"training": True},
    "gradients": {"training": True, "gradients": True},
}
# (axis, shape): channels first, channels last and dense, each for one thread and for several. As kernels do not depend
# on a shape, but on the schedule that it gets, these are those of most calls on contiguous arrays.
DEFAULT_CALLS: tuple[tuple[Any, Sizes], ...] = (
    (1, (1, 64, 28, 28)),
    (1, (32, 64, 56, 56)),
    (-1, (1, 28, 28, 64)),
    (-1, (32, 56, 56, 64)),
    (-1, (32, 64)),
    (-1, (1024, 1024)),
)


def warmup(
    layers: BatchNormalization | Sequence[BatchNormalization],
    shapes: Sequence[int] | Sequence[Sequence[int]],
    *,
    dtype: Any = "float32",
    training: bool = False,
    gradients: bool = False,
    mask: Any = None,
    residual: bool = False,
    lengths: Any = None,
) -> None:
    """Compile into the kernel cache what `layer(x, training=...)` needs for contiguous inputs of these shapes.

    Nothing is computed, no layer is built or changed, and Numba's thread pool is not started: children that the process
    forks afterwards can use one of their own.

    Args:
        layers: one layer or several. shapes: one shape or several. One layer gets every shape, one shape is for every
            layer; otherwise there is one shape per layer.
        dtype: of the inputs; a layer with a dtype of its own has that one.
        gradients: also what the pullback of `layer.vjp(x, training=...)` needs.
        mask: one like those of the calls; its shape matters, its values do not.
        residual: whether the calls have one. lengths: some like those of the calls.
    Raises: TypeError, ValueError as the calls would, and for what is no layer or shape; RuntimeError if the cache is
        off.
    """
    if cache_folder() is None:
        raise RuntimeError(_why_off())
    found: Kernels = {}
    for layer, shape in _pairs(layers, shapes):
        found |= kernels(
            layer,
            shape,
            dtype=dtype,
            training=training,
            gradients=gradients,
            mask=mask,
            residual=residual,
            lengths=lengths,
        )
    for kernel in found:
        compiled(*kernel)


def _pairs(layers: Any, shapes: Any) -> list[tuple[BatchNormalization, Sequence[int]]]:
    layers = as_layers(layers)
    if not isinstance(shapes, Sequence) or isinstance(shapes, str) or not shapes:
        raise ValueError(f"shapes must be a shape or a list of shapes; received {shapes!r}")
    shapes = list(shapes) if isinstance(shapes[0], Sequence) else [shapes]
    count = max(len(layers), len(shapes))
    layers, shapes = (v * count if len(v) == 1 else v for v in (layers, shapes))
    if len(layers) != len(shapes):
        raise ValueError(f"shapes must be as many as the layers, {len(layers)}; received {len(shapes)}: {shapes!r}")
    return list(zip(layers, shapes, strict=True))


def _why_off() -> str:
    return f"there is no kernel cache ({find_cache()[1]}): what is compiled now would be lost"


def run(
    shapes: list[Sizes] | None,
    axis: int | list[int] | None,
    dtypes: list[str],
    modes: list[str],
    activation: str | None,
    residual: bool,
    renorm: bool,
) -> int:
    """The command. Returns the exit code: 1 if there is no cache to fill, 2 for calls that are not possible."""
    folder = cache_folder()
    if folder is None:
        print(_why_off(), file=sys.stderr)
        return 1
    LOGGER.addHandler(logging.NullHandler())  # the progress is shown below
    start = perf_counter()
    calls = DEFAULT_CALLS if shapes is None else [(-1 if axis is None else axis, shape) for shape in shapes]
    found: Kernels = {}
    try:
        if shapes is None and axis is not None:
            raise ValueError(f"axis is that of --shape, which is missing; received {axis!r}")
        for axis_of_call, shape in calls:
            layer = BatchNormalization(axis=axis_of_call, activation=activation, renorm=renorm)
            for dtype in dtypes:
                for mode in modes:
                    found |= kernels(layer, shape, dtype=dtype, residual=residual, **MODES[mode])
    except (ImportError, MemoryError, TypeError, ValueError) as error:
        print(f"python -m nbbn warmup: {error}", file=sys.stderr)
        return 2
    # This process had those kernels from the cache that Numba's dispatcher counts as hits.
    made: list[Any] = [compiled(*kernel) for kernel in _with_progress(list(found))]
    cached = sum(bool(kernel.stats.cache_hits) for kernel in made)
    if len(list(folder.glob("*.kernel"))) < len(found):
        print(f"kernels could not be written to {folder}: is the disk full?", file=sys.stderr)
        return 1
    print(f"kernels: {len(found)}, already cached: {cached}, seconds: {perf_counter() - start:.1f}, folder: {folder}")
    return 0


def _with_progress(found: list[Kernel]) -> Iterator[Kernel]:
    try:
        from tqdm import tqdm
    except ImportError:
        for i, kernel in enumerate(found, 1):
            print(f"{i}/{len(found)}: {kernel[0]}, {kernel[1]}", file=sys.stderr)
            yield kernel
    else:
        yield from tqdm(found, unit=" kernels", leave=False, disable=None)
