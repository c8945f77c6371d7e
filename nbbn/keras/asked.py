"""What a layer was asked for: the options that say what is computed, and the numbers of a step.

Both are read from the attributes at each call, as those of Keras's layers may be changed.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np

from nbbn.core.options import MOMENTUM, VIRTUAL_BATCH_CHOICES, Numbers, check_clip_values, check_number

FIXED = (
    *("epsilon", "renorm", "virtual_batch_size", "ragged", "virtual_batch_order"),
    *("activation", "bessel_correction", "debias", "skip_nonfinite"),
)


class Beside(NamedTuple):
    """What stands beside the input of a training call: tensors, or None. adjustment: the callable."""

    mask: Any = None
    lengths: Any = None
    residual: Any = None
    adjustment: Callable[..., Any] | None = None


def fixed(layer: Any) -> dict[str, Any]:
    """The options that are the same in each call, but for `axis`, `momentum` and `adjustment`."""
    return {name: getattr(layer, name) for name in FIXED}


def numbers(layer: Any, as_number: Callable[[Any], Any] = lambda value: value) -> dict[str, Any]:
    """The momenta and the bounds of renorm for this call; callables are called, each once.

    as_number: what to make of what a callable has given, which may be a keras.Variable.
    """

    def now(value: Any) -> Any:
        return as_number(value()) if callable(value) else value

    bounds = layer.renorm_clipping if layer.renorm else None
    return {
        "momentum": now(layer.momentum),
        "renorm_momentum": now(layer.renorm_momentum) if layer.renorm else 0.0,
        "renorm_clipping": None if bounds is None else {name: now(value) for name, value in bounds.items()},
    }


def checked_numbers(layer: Any) -> Numbers:
    """The same as floats. Raises: TypeError, ValueError for what a callable must not give."""
    given = numbers(layer, _as_float)
    for name in ("momentum", "renorm_momentum"):
        if given[name] is not None:
            check_number(name, given[name], 1.0, f"{MOMENTUM}, or a callable that gives one")
    return Numbers(given["momentum"], given["renorm_momentum"], **check_clip_values(given["renorm_clipping"] or {}))


def _as_float(value: Any) -> Any:
    return float(keras.ops.convert_to_numpy(value)) if isinstance(value, keras.Variable) else value


def without_callables(clipping: Mapping[str, Any] | None) -> dict[str, float] | None:
    """The bounds that are numbers. An infinite one is none: JSON knows no infinity."""
    if clipping is None:
        return None
    return {k: v for k, v in clipping.items() if v is not None and not callable(v) and np.isfinite(v)}


def config(layer: Any) -> dict[str, Any]:
    """What get_config() has beside Keras's keys, or in their place: the options of nbbn that are set.

    Callables cannot be serialized: they are left out with a warning, and from_config() takes the default.
    """
    found: dict[str, Any] = {"axis": list(layer.axis) if isinstance(layer.axis, (list, tuple)) else layer.axis}
    found |= {"renorm_clipping": without_callables(layer.renorm_clipping)}
    found |= {k: getattr(layer, k) for k in ("momentum", "renorm_momentum")}
    found |= {k: getattr(layer, k) for k in ("virtual_batch_size", "activation") if getattr(layer, k) is not None}
    found |= {k: getattr(layer, k) for k, known in VIRTUAL_BATCH_CHOICES.items() if getattr(layer, k) != known[0]}
    found |= {k: True for k in ("bessel_correction", "debias", "skip_nonfinite") if getattr(layer, k)}
    left_out = [] if layer.adjustment is None else ["adjustment"]
    for name in ("momentum", "renorm_momentum"):
        if callable(found[name]):
            found[name] = 0.99
            left_out.append(name)
    if any(map(callable, (layer.renorm_clipping or {}).values())):
        left_out.append("callables of renorm_clipping")
    for what in left_out:
        message = f"the config of {layer.name} leaves out the {what}, which cannot be serialized"
        warnings.warn(message, stacklevel=3)
    return found
