"""A training call and its gradient on NumPy arrays, for backends whose tensors are such, or give them to a function."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import keras
import numpy as np

from nbbn.call.operands import as_adjustment, as_lengths, as_like, as_weights
from nbbn.core import dtypes
from nbbn.core.options import Numbers, Options
from nbbn.engine.base import Operands
from nbbn.engine.dispatcher import Dispatcher
from nbbn.keras import asked
from nbbn.keras.asked import Beside

# What a call may have beside its input and the state, by name; what has a gradient comes first.
DIFFERENTIABLE = ("x", "gamma", "beta", "residual", "a", "b")
GIVEN = (*DIFFERENTIABLE, "mask", "lengths")


class Made(NamedTuple):
    """What a training call makes. saved: what the gradient needs. state: the new rows."""

    y: np.ndarray
    saved: np.ndarray
    state: tuple[np.ndarray, ...]


def dispatcher_of(layer: Any) -> Dispatcher:
    """What runs the steps of a layer."""
    axis = tuple(layer.axis) if isinstance(layer.axis, (list, tuple)) else layer.axis
    averaged = None if layer.momentum is None else 0.0  # a step is told the number
    return _dispatcher(axis=axis, momentum=averaged, fused=False, **asked.fixed(layer))


@lru_cache(maxsize=256)
def _dispatcher(**options: Any) -> Dispatcher:
    return Dispatcher(Options(**options))


def given_of(layer: Any, x: Any, beside: Beside) -> dict[str, Any]:
    """The tensors of a call, by their names in GIVEN. Raises: ValueError for an adjustment that gives no pair."""
    a = b = None
    if beside.adjustment is not None:
        pair = beside.adjustment(keras.ops.shape(x))
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"adjustment must return a pair (scale, bias); received {type(pair).__name__}")
        a, b = (keras.ops.convert_to_tensor(value, keras.backend.result_type(x.dtype, "float32")) for value in pair)
    gamma, beta = (None if v is None else v.value for v in (layer.gamma, layer.beta))
    tensors = x, gamma, beta, beside.residual, a, b, beside.mask, beside.lengths
    return {name: value for name, value in zip(GIVEN, tensors, strict=True) if value is not None}


def train(run: Dispatcher, numbers: Numbers, given: Mapping[str, np.ndarray], state: list[np.ndarray]) -> Made:
    """The output and the new state.

    given: of the names of GIVEN those that there are; gamma, beta and the rows of the state in any shape of their size.
    """
    x = given["x"]
    params, rows = _params(run, given), np.stack([_row(a) for a in state])
    y, new_rows, saved = run.train(x, params, rows, operands_of(run, given), numbers=numbers)
    new_state = tuple(new.reshape(old.shape).astype(old.dtype) for new, old in zip(new_rows, state, strict=True))
    return Made(y, saved, new_state)


def backward(
    run: Dispatcher, dy: np.ndarray, saved: np.ndarray, given: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The gradients of what is given and has one."""
    x, operands = given["x"], operands_of(run, given)
    wants_dz = operands.residual is not None or operands.adjusted
    dx, dparams, dz = run.backward(dy, x, saved, operands, training=True, wants_dz=wants_dz)
    found: dict[str, Any] = {"x": dx, "gamma": dparams[0], "beta": dparams[1], "residual": dz}
    if operands.adjusted:
        found["a"], found["b"] = run.adjustment_gradients(x, saved, operands, dz)
    return {name: found[name].reshape(a.shape).astype(a.dtype) for name, a in given.items() if name in DIFFERENTIABLE}


def operands_of(run: Dispatcher, given: Mapping[str, np.ndarray]) -> Operands:
    """Checked. Raises: TypeError, ValueError that name the argument."""
    x = given["x"]
    dtype, found = dtypes.statistic(x.dtype), Operands()
    if "residual" in given:
        found = found._replace(residual=as_like(given["residual"], x, "residual", "the input's"))
    if "mask" in given:
        found = found._replace(weights=as_weights(given["mask"], x, run.axis(x.ndim), dtype))
    if "lengths" in given:
        found = found._replace(lengths=as_lengths(given["lengths"], x, run.steps(x.ndim)))
    if "a" in given:
        a, b = as_adjustment(lambda _: (given["a"], given["b"]), x, dtype)
        found = found._replace(a=a, b=b)
    return found


def _row(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).astype(dtypes.statistic(array.dtype), copy=False)


def _params(run: Dispatcher, given: Mapping[str, np.ndarray]) -> np.ndarray:
    x = given["x"]
    channels = int(np.prod([x.shape[i] for i in run.axis(x.ndim)]))
    params = np.empty((2, channels), dtypes.statistic(x.dtype))
    params[0] = given["gamma"].reshape(-1) if "gamma" in given else 1
    params[1] = given["beta"].reshape(-1) if "beta" in given else 0
    return params
