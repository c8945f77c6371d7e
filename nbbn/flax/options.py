"""What both kinds of modules pass on to nbbn.jax.batch_norm()."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

# Of Flax, and of nbbn, by the names that modules and the function have for them.
_NAMES = (
    *("momentum", "epsilon", "axis_index_groups", "renorm", "renorm_momentum", "virtual_batch_size", "ragged"),
    *("virtual_batch_order", "bessel_correction", "activation", "debias", "skip_nonfinite", "ffi"),
)


def options_of(module: Any) -> dict[str, Any]:
    """Those of a module that do not depend on the call."""
    axis = module.axis if isinstance(module.axis, int) else tuple(module.axis)
    return {"axis": axis} | {name: getattr(module, name) for name in _NAMES}


def called(options: dict[str, Any]) -> dict[str, Any]:
    """These options, with what callables give now: for statistics that nobody keeps."""

    def number(value: Any) -> Any:
        return value() if callable(value) else value

    clips = options["renorm_clipping"]
    clips = {n: number(v) for n, v in clips.items()} if isinstance(clips, Mapping) else clips
    return options | {n: number(options[n]) for n in ("momentum", "renorm_momentum")} | {"renorm_clipping": clips}


def mask_for(x: Any, mask: Any) -> Any:
    """Flax's meaning of a mask, that it broadcasts against the input, before nbbn's, that one of fewer dimensions
    stands for the leading ones."""
    if mask is None:
        return None
    shape = jnp.shape(mask)
    aligned = (*(1,) * (x.ndim - len(shape)), *shape)
    fits = len(aligned) == x.ndim and all(n in (1, full) for n, full in zip(aligned, x.shape, strict=True))
    return jnp.reshape(mask, aligned) if fits else mask
