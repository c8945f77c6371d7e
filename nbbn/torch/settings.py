"""What a normalization was asked for, as operators take it: a text for what is fixed, and numbers.

PyTorch's momentum is the weight of the new value, and nbbn's that of the old one: they meet here.
"""

import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from numbers import Real
from typing import Any

import torch

from nbbn.core import options as core
from nbbn.engine.dispatcher import Dispatcher

Momentum = float | Callable[[], float] | None
NEW_VALUE = "a finite number (the weight of the new value, 0 to 1)"
FIXED = (
    *("axis", "renorm", "virtual_batch_size", "ragged", "virtual_batch_order"),
    *("activation", "bessel_correction", "debias", "skip_nonfinite"),
)
UNBOUNDED = {"rmin": 0.0, "rmax": math.inf, "dmax": math.inf}


def as_text(axis: int, **options: Any) -> str:
    """The options of a call that are the same in all calls of a module. Raises: TypeError, ValueError as Options."""
    checked = core.Options(axis=axis, fused=False, **options)
    kept = {name: getattr(checked, name) for name in FIXED}
    if kept["bessel_correction"] is None:
        kept["bessel_correction"] = not checked.renorm  # PyTorch's moving variance is the unbiased one
    return json.dumps(kept)


@lru_cache(maxsize=256)
def dispatcher(options: str, eps: float) -> Dispatcher:
    """What runs the steps of these options."""
    return Dispatcher(core.Options(epsilon=eps, fused=False, **json.loads(options)))


@lru_cache(maxsize=256)
def _parsed(options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(options)
    return found


@torch.compiler.assume_constant_result
def parsed(options: str) -> dict[str, Any]:
    """The options that as_text() was given."""
    return _parsed(options)


def check_momentum(name: str, value: Any) -> None:
    """Raises: TypeError, ValueError for what is no weight of a new value, nor a callable. PyTorch's have no bounds."""
    if not callable(value):
        _check_finite(name, value, f"{NEW_VALUE}, or a callable that gives one")


def check_clipping(clipping: Any, renorm: bool) -> None:
    """Raises: TypeError, ValueError for what are no bounds of renorm, or if there is no renorm."""
    if clipping is not None:
        core.check_clipping(clipping)
    if clipping and not renorm:
        raise ValueError(f"renorm_clipping needs renorm=True; received {dict(clipping)!r}")


def numbers(momentum: Momentum, renorm_momentum: Momentum, clipping: Mapping[str, Any] | None) -> list[float]:
    """The numbers of a training step, as nbbn's Numbers: callables are called, each once.

    momentum: None for equal weights, of which the operator finds the momentum in its count.
    Raises: TypeError, ValueError for what a callable must not give.
    """
    bounds = UNBOUNDED
    if clipping:
        core.check_clipping(clipping)
        bounds = UNBOUNDED | core.check_clip_values({k: v() if callable(v) else v for k, v in clipping.items()})
    new = 0.0 if momentum is None else _now("momentum", momentum)
    return [1.0 - new, 1.0 - _now("renorm_momentum", renorm_momentum), bounds["rmin"], bounds["rmax"], bounds["dmax"]]


def as_numbers(given: list[float], count: int | None) -> core.Numbers:
    """What a step reads. count: of the batches before, where they have equal weights."""
    return core.Numbers(given[0] if count is None else count / (count + 1), *given[1:])


def _now(name: str, value: Any) -> float:
    if not callable(value):
        return float(value)
    found = value()
    _check_finite(name, found, f"a callable that gives {NEW_VALUE}")
    return float(found)


def _check_finite(name: str, value: Any, accepted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {accepted}; received {value!r}")
    if not -math.inf < float(value) < math.inf:  # torch.compile follows it, also of a number that it does not know
        raise ValueError(f"{name} must be {accepted}; received {value!r}")
