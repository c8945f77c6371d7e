"""A layer's calls on arrays that are on a GPU, and their gradients."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from nbbn import dtypes
from nbbn.dispatcher import Dispatcher
from nbbn.gpu.arrays import DeviceArray, as_device_array, find_library, wrap
from nbbn.gpu.dispatcher import DeviceDispatcher, empty, empty_like
from nbbn.gpu.variables import DeviceVariables, to_host
from nbbn.kernels import channel
from nbbn.layout import Sizes
from nbbn.operands import as_adjustment, as_weights
from nbbn.options import Options
from nbbn.pullback import Gradients, Record, compute_gradients
from nbbn.variables import PARTS, Shapes


class Layer(Protocol):
    """What is needed of a BatchNormalization."""

    name: str
    scale: bool
    center: bool

    @property
    def options(self) -> Options: ...

    def _check_input(self, x: Any) -> Shapes: ...

    def _uses_batch(self, training: bool | None) -> bool: ...

    def _hyper(self, x: Any) -> np.ndarray: ...

    def _device_variables(self, shapes: Shapes, x: DeviceArray) -> DeviceVariables: ...

    def _device_dispatcher(self) -> DeviceDispatcher: ...


class DeviceRecord(NamedTuple):
    """What a forward pass leaves behind: a Record of DeviceArrays."""

    x: DeviceArray
    params: DeviceArray
    state: DeviceArray
    saved: DeviceArray | None = None
    new_state: DeviceArray | None = None
    residual: DeviceArray | None = None
    weights: DeviceArray | None = None
    adjustment: tuple[DeviceArray, DeviceArray] | None = None
    frozen: bool = False  # whether the statistics were those of the state

    def counted(self) -> np.ndarray:
        assert self.saved is not None
        counts = to_host(self.saved.owner)[channel.COUNT]
        return np.asarray(counts.reshape(-1, self.params.shape[1]).any(axis=0))


def forward(
    layer: Layer,
    inputs: Any,
    training: bool | None,
    mask: Any,
    update: bool,
    out: Any,
    residual: Any,
    keep: bool,
) -> tuple[Any, DeviceRecord]:
    """The output, an array of the input's library, and its record; one to be kept has parameters of its own."""
    x = as_device_array(inputs, "inputs")
    if x.ndim == 0:
        raise ValueError("inputs must have at least one dimension; received a scalar of shape ()")
    if layer.options.dtype is not None:
        x = x.astype(layer.options.dtype)
    shapes = layer._check_input(x)
    target = None if out is None else _as_out(out, x)
    added = None if residual is None else _as_like(residual, x, "residual", "the input's")
    if keep:
        _refuse_overlap(target, [x, added])
    batch = layer._uses_batch(training)
    dispatcher, dtype = layer._device_dispatcher(), dtypes.statistic(x.dtype)
    if batch:
        dispatcher.layout(x.shape, training=True)  # raises where a virtual batch does not fit
    weights, adjustment = _operands(layer, x, mask, tuple(shapes.features), dtype) if batch else (None, None)
    hyper = layer._hyper(x) if batch else None
    variables = layer._device_variables(shapes, x)
    params = variables.params.astype(dtype)
    if x.size == 0:
        return (target or empty_like(x)).owner, DeviceRecord(x, params, variables.state)
    if hyper is None:
        state = variables.state.astype(dtype)
        y = dispatcher.infer(x, params, state, residual=added, out=target)
        if not keep:
            return y.owner, DeviceRecord(x, params, state)
        kept = empty(x, params.shape, dtype)
        saved = dispatcher.saved_of(state, params, kept)
        return y.owner, DeviceRecord(x, kept, state, saved, residual=added, frozen=True)
    copy = empty(x, params.shape, dtype) if keep else None
    # The lock makes the update one step of a sequence: threads that train one layer lose none.
    with variables.lock if update else contextlib.nullcontext():
        state = variables.state.astype(dtype)
        in_place, seen = update and state is variables.state, None
        if in_place and layer.options.momentum is None:
            hyper, seen = dispatcher.hyper(x.ndim, x.dtype), variables.seen
        y, new_state, saved = dispatcher.train(
            x,
            params,
            state,
            hyper,
            residual=added,
            weights=weights,
            adjustment=adjustment,
            out=target,
            new_state=state if in_place else None,
            copy=copy,
            seen=seen,
        )
        record = DeviceRecord(x, copy or params, state, saved, new_state, added, weights, adjustment)
        if update and not in_place:
            _update(variables, record, layer.options)
    return y.owner, record


def _update(variables: DeviceVariables, record: DeviceRecord, options: Options) -> None:
    """What cannot be done in place, with the host's help. The caller holds the lock."""
    assert record.new_state is not None
    if options.momentum is None:
        variables.absorb(record.new_state, record.counted(), PARTS, options)
    else:
        variables.write(variables.state, to_host(record.new_state.owner))


def gradients(layer: Layer, dy: Any, record: DeviceRecord, out: Any, shapes: Shapes) -> Gradients:
    """The pullback of a call, in arrays of the input's library; an adjustment's gradients are NumPy arrays."""
    x, dispatcher = record.x, layer._device_dispatcher()
    g = _as_like(dy, x, "dy", "the output's")
    target = None if out is None else _as_out(out, x)
    _refuse_overlap(target, [x, record.residual])
    if x.size == 0:
        zeros = np.zeros((2, *shapes.params), shapes.dtype)
        dx, dparams = empty_like(x), wrap(x.library.from_host(zeros, x.device), x.library)
        dz: DeviceArray | None = g
    else:
        activated = record.residual is not None
        if activated and target is not None and layer.options.activation is None and target.overlaps(g):
            g = g.astype(g.dtype, copy=True)  # the residual's gradient, once `out` is written
        assert record.saved is not None
        dx, dparams, dz = dispatcher.backward(
            g,
            x,
            record.params,
            record.saved,
            training=not record.frozen,
            residual=record.residual,
            weights=record.weights,
            adjustment=record.adjustment,
            out=target,
            activated=activated,
        )
    dparams = dparams.astype(shapes.dtype)
    dgamma, dbeta = (dparams.owner[i].reshape(shapes.params) for i in range(2))
    residual = None
    if record.residual is not None:
        assert dz is not None
        residual = (dz.astype(dz.dtype, copy=True) if dz is g else dz).owner
    adjustment = None if record.adjustment is None else _adjustment_gradients(layer, g, record)
    return Gradients(dx.owner, dgamma if layer.scale else None, dbeta if layer.center else None, adjustment, residual)


def _adjustment_gradients(layer: Layer, dy: DeviceArray, record: DeviceRecord) -> Any:
    """By way of the host."""
    fields = {
        name: to_host(value.owner)
        for name, value in record._asdict().items()
        if isinstance(value, DeviceArray) and name not in ("weights", "residual")
    }
    pair = tuple(to_host(a.owner) for a in record.adjustment or ())
    host = Record(**{**fields, "adjustment": pair})
    if record.residual is not None:
        host = host._replace(residual=to_host(record.residual.owner))
    return compute_gradients(Dispatcher(layer.options), host, to_host(dy.owner), None)[0].adjustment


# -- arguments ---------------------------------------------------------------------------------------------------------


def _on_its_device(array: DeviceArray, x: DeviceArray, argument: str) -> DeviceArray:
    if array.device != x.device:
        raise ValueError(f"{argument} must be on the input's GPU, cuda:{x.device}; received one on cuda:{array.device}")
    return array


def _as_like(value: Any, x: DeviceArray, argument: str, whose: str) -> DeviceArray:
    """An array of the shape and dtype of `x`, on its device."""
    array = _on_its_device(as_device_array(value, argument), x, argument)
    if array.shape != x.shape:
        raise ValueError(f"{argument} must have {whose} shape {x.shape}; received {array.shape}")
    return array.astype(x.dtype)


def _as_out(value: Any, x: DeviceArray) -> DeviceArray:
    out = _on_its_device(as_device_array(value, "out"), x, "out")
    if (out.shape, out.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"out must have the shape {x.shape} and dtype {x.dtype.name} of the result; "
            f"received shape {out.shape} and dtype {out.dtype.name}"
        )
    if not out.library.is_writable(value):
        raise ValueError(f"out must be an array that may change; received one of {type(value).__module__}")
    if out.size and any(n > 1 and s == 0 for n, s in zip(out.shape, out.strides, strict=True)):
        raise ValueError("out must be memory of its own; received a broadcast array")
    return out


def _refuse_overlap(out: DeviceArray | None, kept: list[Any]) -> None:
    if out is not None and any(a is not None and out.overlaps(a) for a in kept):
        raise ValueError("out must not share memory with the input or the residual, which the gradient needs")


def _operands(
    layer: Layer, x: DeviceArray, mask: Any, axis: Sizes, dtype: np.dtype
) -> tuple[DeviceArray | None, tuple[DeviceArray, DeviceArray] | None]:
    """Weights and adjustment, broadcast to the shape of `x`."""
    adjustment = None
    if layer.options.adjustment is not None:
        a, b = _adjustment(layer.options.adjustment, x, dtype)
        adjustment = a.broadcast_to(x.shape), b.broadcast_to(x.shape)
    if mask is None:
        return None, adjustment
    library = find_library(mask)
    if library is None:
        weights = as_weights(mask, x.shape, axis, dtype)
        one = tuple(slice(0, 1) if s == 0 else slice(None) for s in weights.strides)
        found = wrap(x.library.from_host(np.ascontiguousarray(weights[one]), x.device), x.library)
        return found.broadcast_to(x.shape), adjustment
    return _weights(_on_its_device(wrap(library.astype(mask, dtype), library), x, "mask"), x.shape, axis), adjustment


def _weights(mask: DeviceArray, shape: Sizes, axis: Sizes) -> DeviceArray:
    """A mask that is on the GPU. Its values are not looked at, which would have to wait for them."""
    reduced = [s for i, s in enumerate(shape) if i not in axis]
    sizes, strides = list(mask.shape), list(mask.strides)
    if mask.ndim <= len(reduced):
        missing = len(reduced) - mask.ndim
        sizes, strides = [1] * missing + sizes, [0] * missing + strides
        for a in axis:
            sizes.insert(a, 1)
            strides.insert(a, 0)
    try:
        return replace(mask, shape=tuple(sizes), strides=tuple(strides)).broadcast_to(shape)
    except ValueError:
        raise ValueError(
            f"mask must broadcast against the input's non-feature dimensions {tuple(reduced)} or its shape {shape}; "
            f"received shape {mask.shape}"
        ) from None


def _adjustment(adjustment: Callable[[Sizes], Any], x: DeviceArray, dtype: np.dtype) -> tuple[DeviceArray, DeviceArray]:
    """The pair for an input of this shape, from NumPy arrays or such of the GPU."""
    pair = adjustment(x.shape)
    if isinstance(pair, (tuple, list)) and len(pair) == 2 and all(find_library(v) is not None for v in pair):
        a, b = (_on_its_device(as_device_array(v, "adjustment"), x, "adjustment").astype(dtype) for v in pair)
        return a, b
    host = as_adjustment(lambda shape: pair, x.shape, dtype)
    a, b = (wrap(x.library.from_host(np.ascontiguousarray(v), x.device), x.library) for v in host)
    return a, b
