"""What is said of wrong arguments at compile time, as numba.TypingError."""

from typing import Any

from numba import types
from numba.core.errors import TypingError

FLOATS = types.float32, types.float64


def is_absent(kind: Any) -> bool:
    """Whether an argument is None, which has to be known when a function is compiled."""
    kind = kind.value if isinstance(kind, types.Omitted) else kind
    return kind is None or isinstance(kind, types.NoneType)


def is_constant(kind: Any, of: type) -> bool:
    """Whether it is a value of this Python type, known when a function is compiled."""
    return isinstance(getattr(kind, "literal_value", getattr(kind, "value", kind)), of)


def constant(name: str, kind: Any, accepted: tuple[Any, ...]) -> Any:
    """The value of an argument that decides what is compiled."""
    value: Any = kind.value if isinstance(kind, types.Omitted) else getattr(kind, "literal_value", kind)
    value = None if isinstance(kind, types.NoneType) else value
    if value not in accepted:
        received = f"a value of type {kind} that only a call tells" if isinstance(value, types.Type) else repr(value)
        raise TypingError(f"{name} must be a constant, one of {', '.join(map(repr, accepted))}; received {received}")
    return value


def check_array(name: str, kind: Any, dtype: Any = None, rank: int | None = None, written: bool = False) -> None:
    """Raises: TypingError unless it is an array of float32 or float64, or of this dtype and rank."""
    dtypes = FLOATS if dtype is None else (dtype,)
    accepted = f"{'an' if rank is None else f'a {rank}-dimensional'} array of {' or '.join(map(str, dtypes))}"
    if not isinstance(kind, types.Array) or kind.dtype not in dtypes:
        raise TypingError(f"{name} must be {accepted}; received {kind}")
    if kind.ndim != rank if rank is not None else kind.ndim == 0:
        raise TypingError(f"{name} must be {accepted} with at least one dimension; received {kind}")
    if not kind.aligned:
        raise TypingError(f"{name} must be aligned in memory; received {kind}")
    if written and not kind.mutable:
        raise TypingError(f"{name} is written to and must not be read-only; received {kind}")


def check_operand(name: str, kind: Any, x: Any, dtype: Any = None, written: bool = False) -> None:
    """The same for an array with the shape of x, or None."""
    if not is_absent(kind):
        check_array(name, kind, x.dtype if dtype is None else dtype, x.ndim, written)


def check_axis(kind: Any) -> None:
    if not (isinstance(kind, types.Integer) or is_constant(kind, int)):
        raise TypingError(f"axis must be an integer; received {kind}")


def check_number(name: str, kind: Any) -> None:
    value = kind.value if isinstance(kind, types.Omitted) else kind
    if not isinstance(value, (int, float, types.Integer, types.Float, types.Boolean)):
        raise TypingError(f"{name} must be a number; received {kind}")


def statistic(x: Any) -> Any:
    return types.float64 if x.dtype == types.float64 else types.float32


def check_common(x: Any, axis: Any, out: Any, residual: Any, activation: Any) -> Any:
    """Returns: True or None, whether there is an activation."""
    check_array("x", x)
    check_axis(axis)
    check_operand("out", out, x, written=True)
    check_operand("residual", residual, x)
    return True if constant("activation", activation, (None, "relu")) else None


def check_channels(x: Any, gamma: Any, beta: Any, mean: Any, variance: Any, written: bool) -> None:
    for name, kind in (("gamma", gamma), ("beta", beta)):
        if not is_absent(kind):
            check_array(name, kind, statistic(x), 1)
    if is_absent(mean) and is_absent(variance) and written:
        return
    check_array("moving_mean", mean, None, 1, written)
    check_array("moving_variance", variance, mean.dtype, 1, written)


def check_options(x: Any, weights: Any, virtual_batch_size: Any) -> None:
    check_operand("weights", weights, x, statistic(x))
    kind = virtual_batch_size
    if not (is_absent(kind) or isinstance(kind, types.Integer) or is_constant(kind, int)):
        raise TypingError(f"virtual_batch_size must be an integer or None; received {kind}")


def check_renorm(renorm: Any, mean: Any) -> None:
    if is_absent(renorm):
        return
    if not isinstance(renorm, types.BaseTuple) or len(renorm) != 3 or is_absent(mean):
        accepted = "None or (moving_stddev, renorm_mean, renorm_stddev), beside moving_mean and moving_variance"
        raise TypingError(f"renorm must be {accepted}; received {renorm}")
    for name, kind in zip(("moving_stddev", "renorm_mean", "renorm_stddev"), renorm, strict=True):
        check_array(f"{name} of renorm", kind, mean.dtype, 1, written=True)
