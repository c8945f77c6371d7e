"""What one layer was asked for: checked once, at construction, and the two choices that follow from it.

Those are Bessel's correction, where TensorFlow's answer depends on which of its paths would run, and the numbers that
may be callables, which are read at each training step: the momenta and the clip values of renorm.
"""

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from nbbn.core.layout import Sizes, resolve_axis

CLIP_KEYS = ("rmax", "rmin", "dmax")
EPSILON = "a finite number of at least 0"  # what is accepted
MOMENTUM = "a number from 0 to 1 (the weight of the old value)"
Momentum = float | Callable[[], float]
# Each beginning with TensorFlow's.
VIRTUAL_BATCH_CHOICES = {"ragged": ("error", "last", "spread"), "virtual_batch_order": ("interleaved", "contiguous")}
_FUSED_AXES = {4: (1, 3), 5: (1, 4)}


class Numbers(NamedTuple):
    """What one training step reads of the options that may be callables. A bound that is missing is none."""

    momentum: float | None
    renorm_momentum: float
    rmin: float = 0.0
    rmax: float = math.inf
    dmax: float = math.inf


@dataclass(frozen=True)
class Options:
    """The options that decide what is computed. Raises TypeError or ValueError that name the argument and its value."""

    axis: int | tuple[int, ...] = -1
    momentum: Momentum | None = 0.99
    epsilon: float = 1e-3
    renorm: bool = False
    renorm_clipping: Mapping[str, float | Callable[[], float]] | None = None
    renorm_momentum: Momentum = 0.99
    fused: bool | None = None
    virtual_batch_size: int | None = None
    adjustment: Callable[[tuple[int, ...]], tuple[Any, Any]] | None = None
    bessel_correction: bool | None = None
    dtype: np.dtype | None = None
    activation: str | None = None
    ragged: str = "error"
    virtual_batch_order: str = "interleaved"
    debias: bool = False
    skip_nonfinite: bool = False
    strict_fused: bool = field(default=True, repr=False)  # TensorFlow 2; version 1 ignores what cannot be fused

    def __post_init__(self) -> None:
        if isinstance(self.renorm_clipping, Mapping):  # a copy: what the caller does with his is not seen
            object.__setattr__(self, "renorm_clipping", dict(self.renorm_clipping))
        object.__setattr__(self, "axis", parse_axis(self.axis))
        for name in ("renorm", "debias", "skip_nonfinite"):
            object.__setattr__(self, name, boolean(name, getattr(self, name)))
        for name in ("fused", "bessel_correction"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, boolean(name, value, "True, False or None"))
        if isinstance(self.activation, str) and self.activation == "linear":  # Keras's name for none
            object.__setattr__(self, "activation", None)
        self._check()
        kinds = {"momentum": float, "epsilon": float, "renorm_momentum": float, "virtual_batch_size": int}
        for name, kind in kinds.items():
            value = getattr(self, name)
            object.__setattr__(self, name, value if value is None or callable(value) else kind(value))

    def _check(self) -> None:
        if self.momentum is not None and not callable(self.momentum):
            check_number("momentum", self.momentum, 1.0, f"{MOMENTUM}, a callable that gives one, or None")
        if not callable(self.renorm_momentum):
            check_number("renorm_momentum", self.renorm_momentum, 1.0, f"{MOMENTUM}, or a callable that gives one")
        check_number("epsilon", self.epsilon, math.inf, EPSILON)
        self._check_virtual_batch()
        if self.renorm_clipping is not None:
            check_clipping(self.renorm_clipping)
        if self.activation is not None and not (isinstance(self.activation, str) and self.activation == "relu"):
            raise ValueError(f"activation must be 'relu', 'linear' or None; received {self.activation!r}")
        if self.adjustment is not None and not callable(self.adjustment):
            raise TypeError(f"adjustment must be a callable of the input's shape; received {self.adjustment!r}")
        if self.renorm and self.bessel_correction:
            raise ValueError("bessel_correction=True is not possible with renorm=True: it has no unbiased statistics")
        self.check_fused()

    def _check_virtual_batch(self) -> None:
        size = self.virtual_batch_size
        for name, values in VIRTUAL_BATCH_CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in values:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, values))}; received {value!r}")
            if size is None and value != values[0]:
                raise ValueError(f"{name}={value!r} needs a virtual_batch_size; received None")
        if size is None:
            return
        if isinstance(size, bool) or not isinstance(size, numbers.Integral):
            raise TypeError(f"virtual_batch_size must be a positive integer or None; received {size!r}")
        if size <= 0:
            raise ValueError(f"virtual_batch_size must be a positive integer; received {size}")
        if self.adjustment is not None:
            raise ValueError(f"adjustment cannot be combined with virtual_batch_size; received {size}")

    @cached_property
    def is_constant(self) -> bool:
        """Whether every call finds the same values: no option is a callable, nor holds one."""

        def varies(value: Any) -> bool:
            held = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
            return callable(value) or any(map(varies, held))

        return not any(varies(getattr(self, f.name)) for f in fields(self))

    @property
    def is_debiased(self) -> bool:
        """Whether the moving averages owe nothing to their initial values, for which the state keeps their weight.

        Averages with equal weights, momentum=None, do so anyway.
        """
        return self.debias or self.momentum is None

    def resolved_axis(self) -> tuple[int, ...]:
        return (self.axis,) if isinstance(self.axis, int) else self.axis

    def kept_axes(self, rank: int) -> Sizes:
        """The kept axes of an input of this rank, ascending and not negative.

        Raises: ValueError if one is out of range or occurs twice, or is the batch that is cut into virtual ones.
        """
        kept = resolve_axis(self.resolved_axis(), rank)
        if self.virtual_batch_size is not None and 0 in kept:
            given = self.axis if isinstance(self.axis, int) else list(self.axis)
            raise ValueError(
                f"axis must not include the batch dimension 0 with virtual_batch_size; received axis={given}"
            )
        return kept

    def fused_obstacle(self, rank: int | None = None, dtype: np.dtype | None = None) -> str | None:
        """Why TensorFlow's fused path could not run, or None. What is not known yet (rank, dtype) is no obstacle."""
        axis = self.resolved_axis()
        if self.renorm:
            return "renorm=True"
        if self.virtual_batch_size is not None:
            return f"virtual_batch_size={self.virtual_batch_size}"
        if self.adjustment is not None:
            return "an adjustment"
        if len(axis) != 1:
            return f"several axes: axis={list(axis)}"
        if dtype is not None and dtype.name == "float64":
            return "dtype float64 (it must be float16, bfloat16 or float32)"
        ranks = _FUSED_AXES if rank is None else {rank: _FUSED_AXES.get(rank, ())}
        if not any(-r <= axis[0] < r and axis[0] % r in allowed for r, allowed in ranks.items()):
            shape = "" if rank is None else f" of an input of rank {rank}"
            return f"axis={axis[0]}{shape} (it must be 1 or 3 for rank 4, 1 or 4 for rank 5)"
        return None

    def check_fused(self, rank: int | None = None, dtype: np.dtype | None = None) -> None:
        """Raises: ValueError if fused=True was asked for and cannot be, with the reason."""
        if not (self.fused and self.strict_fused):
            return
        obstacle = self.fused_obstacle(rank, dtype if dtype is not None else self.dtype)
        if obstacle is not None:
            raise ValueError(f"fused=True is not possible with {obstacle}")

    def bessel(self, rank: int, dtype: np.dtype) -> bool:
        """Whether the moving variance is the unbiased one."""
        if self.bessel_correction is not None:
            return self.bessel_correction
        return self.fused is not False and self.fused_obstacle(rank, dtype) is None

    def numbers(self) -> Numbers:
        """The momenta and the bounds of r and d now; callables are called, each once.

        Raises: TypeError, ValueError for what they must not give, with the name of the option.
        """
        given = {k: v() if callable(v) else v for k, v in (self.renorm_clipping or {}).items()}
        bounds = check_clip_values(given)
        renorm_momentum = _momentum_now("renorm_momentum", self.renorm_momentum)
        momentum = None if self.momentum is None else _momentum_now("momentum", self.momentum)
        return Numbers(momentum, renorm_momentum, **bounds)


def _momentum_now(name: str, value: Momentum) -> float:
    if not callable(value):
        return value
    found = value()
    check_number(name, found, 1.0, f"a callable that gives {MOMENTUM}")
    return float(found)


def check_clipping(clipping: Any) -> None:
    """Raises: TypeError, ValueError for what is no dict of bounds, or of callables that give them."""
    if not isinstance(clipping, Mapping):
        raise TypeError(f"renorm_clipping must be a dict with keys among {CLIP_KEYS}; received {clipping!r}")
    unknown = sorted(set(clipping) - set(CLIP_KEYS), key=str)
    if unknown:
        raise ValueError(f"renorm_clipping accepts the keys {CLIP_KEYS}; received {unknown} in {dict(clipping)!r}")
    check_clip_values({k: v for k, v in clipping.items() if not callable(v)})


def check_clip_values(given: Mapping[str, Any]) -> dict[str, float]:
    """The bounds among them, as numbers.

    Raises: TypeError for a value that is no number, ValueError for bounds that no value can meet.
    """
    for key, value in given.items():
        if value is not None and not _is_number(value):
            raise TypeError(
                f"renorm_clipping[{key!r}] must be a number or a callable that gives one; received {value!r}"
            )
    bounds = {k: float(v) for k, v in given.items() if v is not None}
    if not (bounds.get("rmin", 0.0) <= bounds.get("rmax", math.inf) and bounds.get("dmax", math.inf) >= 0):
        raise ValueError(f"renorm_clipping must have rmin <= rmax and dmax >= 0; received {dict(given)!r}")
    return bounds


def _is_number(value: Any) -> bool:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    return isinstance(value, (numbers.Real, np.floating)) and not isinstance(value, (bool, np.bool_))


def check_number(name: str, value: Any, high: float, accepted: str) -> None:
    """Raises: TypeError for what is no number, ValueError for one that is not between 0 and `high`, or infinite."""
    if not _is_number(value):
        raise TypeError(f"{name} must be {accepted}; received {value!r}")
    if not 0 <= value <= high or math.isinf(value):
        raise ValueError(f"{name} must be {accepted}; received {value!r}")


def boolean(name: str, value: Any, accepted: str = "True or False") -> bool:
    """`value` as a bool.

    Raises: TypeError unless it is a bool, of Python or NumPy, or the integer 0 or 1: a text would be true, whatever it
        says.
    """
    one = value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value
    if not isinstance(one, (int, np.integer, np.bool_)) or one not in (0, 1):
        raise TypeError(f"{name} must be {accepted}; received {value!r}")
    return bool(one)


def parse_axis(axis: Any) -> int | tuple[int, ...]:
    """`axis` as an int or a tuple of ints. Raises: TypeError as parse_ints(), ValueError if it is empty."""
    parsed = parse_ints("axis", axis)
    if parsed == ():
        raise ValueError(f"axis must name at least one dimension; received {axis!r}")
    return parsed


def parse_ints(name: str, value: Any) -> int | tuple[int, ...]:
    """`value` as an int or a tuple of ints.

    Raises: TypeError if it is neither an int nor a list, tuple, range or array of ints.
    """

    def is_int(a: Any) -> bool:
        return isinstance(a, numbers.Integral) and not isinstance(a, (bool, np.bool_))

    ints = value.tolist() if isinstance(value, np.ndarray) else value
    if is_int(ints):
        return int(ints)
    if not isinstance(ints, (list, tuple, range)) or not all(is_int(a) for a in ints):
        raise TypeError(f"{name} must be an int or a list, tuple, range or array of ints; received {value!r}")
    return tuple(int(a) for a in ints)
