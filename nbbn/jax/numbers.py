"""The numbers of a training step, which may be values of the program: momenta, and the bounds of r and d."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nbbn.core.options import Numbers
from nbbn.engine.dispatcher import Dispatcher
from nbbn.jax.crossing import FLOAT64, as_pairs, pairs
from nbbn.kernels import channel

_PLACES = {
    "momentum": channel.MOMENTUM,
    "renorm_momentum": channel.RENORM_MOMENTUM,
    "rmin": channel.RMIN,
    "rmax": channel.RMAX,
    "dmax": channel.DMAX,
}


def is_in_program(value: Any) -> bool:
    """Whether a number is an array of JAX: its value cannot be looked at."""
    return isinstance(value, jax.Array)


_OUTSIDE_TRAINING = {"rmax": math.inf, "dmax": math.inf}  # numbers that all others go with


def is_compiling() -> bool:
    """Whether a program is being traced, which keeps whatever is no value of its own."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)


def now(name: str, value: Any, training: bool) -> Any:
    """A number, or what a callable gives for this call; outside training it need not give any, and is not called.

    Raises: ValueError where a program that is being compiled would keep it.
    """
    if not callable(value):
        return value
    if not training:
        return _OUTSIDE_TRAINING.get(name, 0.0)
    found = value()
    if is_compiling() and not isinstance(found, jax.core.Tracer):
        raise ValueError(
            f"{name} must be a scalar of the program, or a callable that gives one, where JAX compiles it: it would "
            f"keep a number of Python's for ever; received {found!r}"
        )
    return found


def hyper_values(dispatcher: Dispatcher, rank: int, dtype: np.dtype, numbers: Mapping[str, Any]) -> list[Any]:
    """What the middle stage reads, (8,). rank, dtype: of the input. numbers: of Numbers."""
    varying = {name: value for name, value in numbers.items() if is_in_program(value)}
    fixed = Numbers(0.0, 0.0)._replace(**{n: v for n, v in numbers.items() if n not in varying})
    found: list[Any] = dispatcher.hyper(rank, dtype, fixed).tolist()
    for name, value in varying.items():
        found[_PLACES[name]] = value
    if "momentum" in varying:
        found[channel.BATCH_WEIGHT] = 1.0 - varying["momentum"]
    return found


def hyper(values: list[Any]) -> Any:
    """The same as it crosses."""
    if not any(map(is_in_program, values)):
        return pairs(np.array(values))
    with jax.enable_x64(True):
        wide = [jax.lax.convert_element_type(v, FLOAT64) if is_in_program(v) else np.float64(v) for v in values]
        if is_in_program(values[channel.MOMENTUM]):  # not rounded to the dtype of the momentum
            wide[channel.BATCH_WEIGHT] = 1.0 - wide[channel.MOMENTUM]
        return as_pairs(jnp.stack(wide))
