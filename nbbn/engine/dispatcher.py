"""Mode x target x dtype x layout x size -> which engine runs, in which form, with which numbers.

The Dispatcher turns options into the numbers that the middle stage reads: this is where Bessel's choice, and the
momenta and clips of this step, enter. It runs a step in the engine's fast form; whoever has the statistics of several
inputs takes the stages, and merges what is between them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.lib.stride_tricks import as_strided

from nbbn.arrays import Array, Place, place_of
from nbbn.core import dtypes
from nbbn.core.layout import Layout, Sizes, layout, steps_dimension, strides_of_results
from nbbn.core.options import Momentum, Numbers, Options
from nbbn.engine.base import NOTHING, Batch, BoundStep, Engine, Force, Operands, PartPlans, Step
from nbbn.engine.cpu.engine import CpuEngine
from nbbn.engine.cpu.moments import add_sums, merge_moments
from nbbn.kernels import channel

# Elements of a group of a virtual batch, at least, for a reduction of its own, where there are lengths: that costs
# 17 us, and saves 0.26 ns per element of what weights cost.
OWN_REDUCTION = 1 << 16


class Dispatcher:
    """Runs the steps of batch normalization for one set of options, on NumPy arrays and on arrays of a GPU.

    Parameters, state and saved are as in Engine; rows of parameters and of the state may lie apart (arrays/host.py).
    operands: see Operands. An empty input changes no state.

    Args:
        force: choices made by hand.
    """

    def __init__(self, options: Options, force: Force | None = None) -> None:
        self.options = options
        self.force = force or Force()
        self.state_rows = (5 if options.renorm else 2) + (2 if options.is_debiased else 0)
        self._engines: dict[str, Engine] = {}
        self._axis: dict[int, Sizes] = {}
        self._hyper: dict[tuple[int, np.dtype], np.ndarray] = {}
        self.bound: dict[tuple[Any, ...], BoundStep | None] = {}  # see bind()

    def __reduce__(self) -> tuple[Any, ...]:
        return Dispatcher, (self.options, self.force)

    def changed(self, **momenta: Momentum | None) -> Self:
        """The same with another momentum or renorm_momentum. Those are numbers that a step is told, so engines and
        their plans stay; whoever runs a step of this one meanwhile is told the numbers of before.

        Raises: TypeError, ValueError for what Options does not accept.
        """
        found = type(self)(replace(self.options, **momenta), self.force)  # type: ignore[arg-type]
        if found.state_rows == self.state_rows:
            found._engines = self._engines
        return found

    # -- what the options mean for an input ----------------------------------------------------------------------------

    def axis(self, rank: int) -> Sizes:
        """The kept axes of an input of this rank, ascending and not negative."""
        if rank not in self._axis:
            self._axis[rank] = self.options.kept_axes(rank)
        return self._axis[rank]

    def layout(self, shape: Sizes, training: bool) -> Layout:
        """Raises: ValueError if a virtual batch that is not ragged cannot divide the batch of a training call."""
        o, axis = self.options, self.axis(len(shape))
        size = o.virtual_batch_size if training else None
        if size is None:
            return layout(shape, axis)
        if o.ragged == "error" and shape[0] % size != 0:
            raise ValueError(
                f"virtual_batch_size={size} must divide the batch in training, unless ragged is 'last' or 'spread'; "
                f"received a batch of {shape[0]} samples"
            )
        return layout(shape, axis, size, o.ragged, o.virtual_batch_order == "contiguous")

    def steps(self, rank: int) -> int:
        """The dimension that `lengths` are about. Raises: ValueError if an input of this rank has none."""
        axis = self.axis(rank)
        return steps_dimension(tuple(i in axis for i in range(rank)))

    def weighted(self, x: Array, operands: Operands) -> Operands:
        """Operands with the weights that their lengths stand for: 1 for the first steps of each sample, else 0."""
        if operands.lengths is None:
            return operands
        steps, place = self.steps(x.ndim), place_of(x)
        shape = tuple(n if i in (0, steps) else 1 for i, n in enumerate(x.shape))
        weights = place.first_steps(operands.lengths, x.shape[steps], dtypes.statistic(x.dtype))
        return operands._replace(weights=place.broadcast(place.reshape(weights, shape), x.shape), lengths=None)

    def hyper(self, rank: int, dtype: np.dtype, numbers: Numbers | None = None) -> np.ndarray:
        """The numbers (8,) float64 that the middle stage reads: epsilon, momentum, whether with Bessel's correction,
        renorm_momentum, rmin, rmax, dmax, and the weight of a batch in debiased averages.

        rank, dtype: of the input. numbers: those of this step; None asks the options.
        """
        if numbers is not None:
            return self._new_hyper(rank, dtype, numbers)
        found = self._hyper.get((rank, dtype))
        if found is None:
            found = self._new_hyper(rank, dtype, self.options.numbers())
            if self.options.is_constant:
                self._hyper[rank, dtype] = found
        return found

    def _new_hyper(self, rank: int, dtype: np.dtype, numbers: Numbers) -> np.ndarray:
        values = np.empty(channel.HYPER_SIZE)
        momentum, values[channel.RENORM_MOMENTUM] = numbers.momentum, numbers.renorm_momentum
        values[channel.EPSILON], values[channel.BESSEL] = self.options.epsilon, self.options.bessel(rank, dtype)
        values[channel.MOMENTUM] = 1.0 if momentum is None else momentum  # nothing is forgotten
        values[channel.BATCH_WEIGHT] = 1.0 if momentum is None else 1.0 - momentum
        values[channel.RMIN], values[channel.RMAX], values[channel.DMAX] = numbers.rmin, numbers.rmax, numbers.dmax
        return values

    def engine(self, array: Array) -> Engine:
        """The engine for an Array. Raises: RuntimeError where there is no GPU for one of a GPU."""
        kind = "cpu" if isinstance(array, np.ndarray) else "cuda"
        found = self._engines.get(kind)
        if found is None:
            if kind == "cpu":
                found = CpuEngine(self.options, self.force)
            else:
                from nbbn.engine.cuda.engine import CudaEngine

                found = CudaEngine(self.options, self.force)
            self._engines[kind] = found
        return found

    def use(self, engine: CpuEngine) -> None:
        """Let another engine run what is on the host."""
        self._engines["cpu"] = engine
        self.bound.clear()  # the steps of the engine before

    # -- steps ---------------------------------------------------------------------------------------------------------

    def train(
        self,
        x: Array,
        params: Array,
        state: Array,
        operands: Operands = NOTHING,
        *,
        numbers: Numbers | None = None,
        out: Array | None = None,
        in_place: bool = False,
    ) -> tuple[Array, Array, Array]:
        """Normalize with the statistics of `x`: the output, the new state and saved.

        numbers: the momenta and clips of this step; None asks the options. in_place: write the new state over the old
        one.
        """
        batch, engine = self._batch(x, True, operands, out), self.engine(x)
        place, own, hyper = batch.place, _params(params, batch), self.hyper(x.ndim, x.dtype, numbers)
        own_state = _state(state, batch, self.state_rows)
        target = state if in_place and own_state is state else None
        if x.size and batch.operands.lengths is not None:
            moments = self.reduce(x, lengths=batch.operands.lengths)
            new_state, saved, coefficients = engine.finish(moments, own, own_state, hyper, operands.adjusted)
            return engine.apply(batch, coefficients), new_state, saved
        if x.size:
            return engine.train(batch, own, own_state, hyper, target)
        saved = np.zeros((channel.SAVED_ROWS, batch.lay.statistics))
        saved[channel.RSTD] = 1
        return batch.result(), state, place.send(saved)

    def infer(
        self, x: Array, params: Array, state: Array, *, residual: Array | None = None, out: Array | None = None
    ) -> Array:
        """Normalize with the moving statistics."""
        batch = self._batch(x, False, Operands(residual), out)
        own, own_state = _params(params, batch), _state(state, batch, max(2, state.shape[0]))
        return self.engine(x).infer(batch, own, own_state, self._epsilon) if x.size else batch.result()

    def freeze(self, params: Array, state: Array, dtype: np.dtype | None = None) -> Array:
        """What a gradient needs after inference of an input of `dtype`, by default that of the parameters: saved."""
        place, own = place_of(params), params.dtype if dtype is None else dtypes.statistic(dtype)
        _check("params", params, 2, params.shape[-1])
        _check("state", state, max(2, state.shape[0]), params.shape[-1])
        return self.engine(params).freeze(
            _by_rows(params, own, place), _by_rows(state, state.dtype, place), self._epsilon
        )

    @cached_property
    def _epsilon(self) -> np.ndarray:
        """What inference reads: nothing that may be a callable, which need not have an answer outside training."""
        return self._new_hyper(0, np.dtype(np.float64), Numbers(0.0, 0.0))

    def backward(
        self,
        dy: Array,
        x: Array,
        saved: Array,
        operands: Operands = NOTHING,
        *,
        training: bool,
        out: Array | None = None,
        wants_dz: bool = False,
    ) -> tuple[Array, Array, Array | None]:
        """The gradients of x, of gamma and beta as one (2, C) array, and, if it is wanted, dz: that of what the
        activation gets. Without an activation dz is dy."""
        batch, engine = self._batch(x, training, operands, out, dy), self.engine(x)
        _check("saved", saved, channel.SAVED_ROWS, batch.lay.statistics)
        if not x.size:
            return batch.result(), _zeros(batch, 2, batch.lay.channels), dy if wants_dz else None
        dx, dparams, dz = engine.backward(batch, dy, saved, training, wants_dz)
        return dx, dparams, dy if wants_dz and dz is None else dz

    def adjustment_gradients(self, x: Array, saved: Array, operands: Operands, dz: Array) -> tuple[Array, Array]:
        """The gradients of an adjustment's a and b, in their shapes. dz: see backward()."""
        batch, a, b = self._batch(x, True, operands, None, dz), operands.a, operands.b
        assert a is not None
        assert b is not None
        if not x.size:
            return batch.place.send(np.zeros(a.shape, a.dtype)), batch.place.send(np.zeros(b.shape, b.dtype))
        _check("saved", saved, channel.SAVED_ROWS, batch.lay.statistics)
        return self.engine(x).adjustment_gradients(batch, dz, saved)

    # -- the stages ----------------------------------------------------------------------------------------------------

    def reduce(
        self, x: Array, weights: Array | None = None, *, lengths: Array | None = None, training: bool = True
    ) -> Array:
        """The moments of `x`; training=False ignores a virtual batch. An empty input has a count of 0.

        lengths: see Operands; on the host elements beyond them are not read.
        """
        batch = self._batch(x, training, Operands(weights=weights, lengths=lengths), None)
        if not x.size:
            return _zeros(batch, channel.MOMENT_ROWS, batch.lay.statistics, np.dtype(np.float64))
        found = None if batch.operands.lengths is None else self._reduce_sequences(batch)
        if found is None:
            return self.engine(x).reduce(batch._replace(operands=self.weighted(x, batch.operands)))
        return found

    def _reduce_sequences(self, batch: Batch) -> Array | None:
        """The moments where lengths say what counts, group by group; None where that is for weights."""
        if batch.lay.groups > 1 and batch.x.size < batch.lay.groups * OWN_REDUCTION:
            return None
        engine, x, axis, parts = self.engine(batch.x), batch.x, self.axis(batch.x.ndim), []
        lengths: Any = batch.operands.lengths
        assert isinstance(engine, CpuEngine)
        _check("lengths", lengths, x.shape[0])
        most = x.shape[self.steps(x.ndim)]
        if not (lengths.min() >= 0 and lengths.max() <= most):  # kernels would read beside the array
            raise ValueError(f"lengths must be from 0 to {most}; received {lengths.min()} to {lengths.max()}")
        for group in batch.lay.members():
            own = x[group]
            part = engine.reduce_sequences(Batch(layout(own.shape, axis), own), lengths[group])
            if part is None:
                return None
            parts.append(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def merge_moments(self, parts: Array) -> Array:
        """The moments (4, S) of several inputs together, (P, 4, S) float64: merged where they are, in their order.
        On the host it may be of inputs of a device, too."""
        if isinstance(parts, np.ndarray):
            return merge_moments(parts)
        engine: Any = self.engine(parts)
        merged: Array = engine.merge_moments(parts)
        return merged

    def add_sums(self, parts: Array) -> Array:
        """The sums (R, S) of the gradient of several inputs, (P, R, S) float64, likewise."""
        if isinstance(parts, np.ndarray):
            return add_sums(parts)
        engine: Any = self.engine(parts)
        added: Array = engine.add_sums(parts)
        return added

    def finish(
        self,
        moments: Array,
        params: Array,
        state: Array,
        *,
        rank: int,
        dtype: np.dtype,
        adjusted: bool = False,
        numbers: Numbers | None = None,
    ) -> tuple[Array, Array, Array]:
        """The new state, saved and the coefficients of the output, of moments, or of saved, which begins with them.

        rank, dtype: of the input, which decide about Bessel's correction. numbers: as of train().
        """
        _check("params", params, 2, channels := params.shape[-1])
        _check("state", state, self.state_rows, channels)
        _check("moments", moments, max(channel.MOMENT_ROWS, moments.shape[0]), moments.shape[-1])
        own = _by_rows(params, dtypes.statistic(dtype), place_of(params))
        own_state = _by_rows(state, dtypes.statistic(state.dtype), place_of(state))
        hyper = self.hyper(rank, dtype, numbers)
        return self.engine(params).finish(_float64(moments), own, own_state, hyper, adjusted)

    def apply(self, x: Array, coefficients: Array, operands: Operands = NOTHING, *, out: Array | None = None) -> Array:
        """The output."""
        batch = self._batch(x, True, operands, out)
        if not x.size:
            return batch.result()
        _check("coefficients", coefficients, channel.OUTPUT_ROWS[operands.adjusted], batch.lay.statistics)
        return self.engine(x).apply(batch, coefficients)

    def reduce_gradient(self, dy: Array, x: Array, saved: Array, operands: Operands = NOTHING) -> tuple[Array, Array]:
        """The sums of the gradient, and the gradients of gamma and beta that this input has, as one (2, C) array."""
        batch = self._batch(x, True, operands, None, dy)
        if not x.size:  # an empty virtual batch does not know its groups
            sums = _zeros(batch, channel.GRADIENT_ROWS[operands.adjusted], saved.shape[1], np.dtype(np.float64))
            return sums, _zeros(batch, 2, batch.lay.channels)
        _check("saved", saved, channel.SAVED_ROWS, batch.lay.statistics)
        return self.engine(x).reduce_gradient(batch, dy, saved)

    def apply_gradient(
        self,
        dy: Array,
        x: Array,
        saved: Array,
        sums: Array,
        operands: Operands = NOTHING,
        *,
        out: Array | None = None,
        wants_dz: bool = False,
    ) -> tuple[Array, Array | None]:
        """dx and dz of the sums of all that share the statistics, see backward()."""
        batch = self._batch(x, True, operands, out, dy)
        if not x.size:
            return batch.result(), dy if wants_dz else None
        _check("saved", saved, channel.SAVED_ROWS, batch.lay.statistics)
        _check("sums", sums, channel.GRADIENT_ROWS[operands.adjusted], batch.lay.statistics)
        dx, dz = self.engine(x).apply_gradient(batch, dy, saved, _float64(sums), wants_dz)
        return dx, dy if wants_dz and dz is None else dz

    # -- the short way -------------------------------------------------------------------------------------------------

    def bind(
        self,
        name: str,
        x: Array,
        residual: bool,
        beside: Sequence[Array | None],
        owner: Any,
        weights: Array | None = None,
        mask_shape: Sizes | None = None,
    ) -> None:
        """Keep the step that has just run, for inputs like `x` beside which there is nothing but weights, and arrays
        that lie as results do, if the geometry of the input decides all about it; None if not.

        residual: whether there is one. beside: the arrays of that step, which has been of another kind where they lie
        in another way. owner: whose parameters and state the step will get. weights: of a mask of `mask_shape`, which
        decides about theirs.
        """
        if not (x.size and self.options.is_constant):
            return
        key = bound_key(name, x, residual, mask_shape)
        if len(key) > _CONTIGUOUS and weights is not None:  # which may lie in any order
            return
        known = self.bound.get(key)
        if known is None and key in self.bound:
            return
        if self.layout(x.shape, name != "infer").parts:  # several steps
            return
        if dtypes.statistic(x.dtype) != owner.params.dtype:
            return
        if isinstance(x, np.ndarray) and not (owner.params.flags.c_contiguous and owner.params.flags.aligned):
            return  # general steps get a copy
        if known is None or not known.fits(owner, x, None, None):
            known = self._new_bound(key, x, owner, weights) if self.engine(x).lie_as_results(x, beside) else None
        if known is None:
            return
        forward = self.bound.get(("train", *key[1:]))
        if name == "backward" and forward is not None:
            forward.gradient = known

    def on_memory(
        self, name: str, x: np.ndarray, residual: bool, numbers: Numbers | None = None
    ) -> Callable[..., None] | None:
        """The step "train", "infer" or "backward" for arrays of the geometry of `x`, as a function of memory: its large
        arrays may be given by their addresses. For whoever keeps what a call needs, and allocates its results.

        x: any array with the shape, strides and dtype of the inputs; all large arrays lie like it. residual: whether
        there is one. numbers: of these steps; None asks the options. Returns: a function of LAST_ARGUMENTS[name], in
        that order, which checks nothing; None where the geometry does not decide all about a call, or the large arrays
        are not dense.
        """
        if not x.size or self.layout(x.shape, name != "infer").parts:
            return None
        engine = self.engine(x)
        assert isinstance(engine, CpuEngine)
        hyper = self.hyper(x.ndim, x.dtype, numbers) if name == "train" else self._epsilon
        return engine.on_memory(self._plain_step(name, x, residual)._replace(numbers={"hyper": hyper}))

    def _new_bound(self, key: Any, x: Array, owner: Any, weights: Array | None) -> BoundStep | None:
        (name, residual, _, _, mask_shape, *_), engine = key, self.engine(x)
        step = self._plain_step(name, x, residual)
        if weights is not None:
            step.views["weights"] = np.broadcast_to(weights, x.shape)
        hyper = self.hyper(x.ndim, x.dtype) if name == "train" else self._epsilon
        if len(self.bound) >= self.force.max_plans:
            self.bound.clear()
        found = self.bound[key] = engine.bind(step._replace(numbers={"hyper": hyper}), owner, mask_shape)
        return found

    def _batch(self, x: Array, training: bool, operands: Operands, out: Array | None, dy: Array | None = None) -> Batch:
        """Raises: ValueError for an array that has not the input's shape."""
        for name, array in (("residual", operands.residual), ("out", out), ("dy", dy)):
            if array is not None:
                _check(name, array, *x.shape)
        if dy is not None or not isinstance(x, np.ndarray):  # only the CPU's reduce() knows lengths
            operands = self.weighted(x, operands)
        return Batch(self.layout(x.shape, training), x, operands, out)

    def _plain_step(self, name: str, x: Array, residual: bool = False) -> Step:
        """A step beside whose input there is a residual at most; all other arrays lie as results do."""
        like = x
        if isinstance(x, np.ndarray) and not x.flags.c_contiguous:
            strides = strides_of_results(x.shape, x.strides, x.itemsize)
            like = as_strided(np.empty(1, x.dtype), x.shape, strides)  # nobody looks into it
        operands = Operands(like if residual else None).views
        views: dict[str, Array | None] = {"x": x, "residual": operands["residual"], "y": like}
        if name == "train":
            views = {"x": x, **operands, "y": like}
        elif name == "reduce":
            views = {"x": x, "weights": None}
        elif name == "backward":
            relu = self.options.activation is not None
            views = {"x": x, "dy": like, **operands, "dx": like, "dz": like if residual and relu else None}
        return Step(name, self.layout(x.shape, name != "infer"), views, {})

    def explain(self, x: Array, step: str) -> Any:
        """How a step on `x` would run, "train", "infer" or "reduce": a plan, to be printed."""
        engine, planned = self.engine(x), self._plain_step(step, x)
        if not planned.lay.parts:
            return engine.plan(planned)
        steps = engine.of_parts(planned._replace(name="reduce", views={"x": x, "weights": None}))
        return PartPlans(engine.plan(s) for s in steps)


_CONTIGUOUS = 5  # parts of a key where nothing is said of an order


def bound_key(name: str, x: Array, residual: bool, mask_shape: Sizes | None) -> tuple[Any, ...]:
    """By what Dispatcher.bound knows a step."""
    key = name, residual, x.shape, x.dtype, mask_shape
    if not isinstance(x, np.ndarray):
        return *key, x.strides, x.device, x.library
    return key if x.flags.c_contiguous else (*key, x.strides)


def _check(name: str, array: Array, *shape: int) -> None:
    """Raises: ValueError for another shape: kernels would read and write beside the array."""
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}; received {array.shape}")


def _params(params: Array, batch: Batch) -> Array:
    """Parameters as kernels take them. Raises: ValueError for another shape."""
    _check("params", params, 2, batch.lay.channels)
    return _by_rows(params, dtypes.statistic(batch.x.dtype), batch.place)


def _state(state: Array, batch: Batch, rows: int) -> Array:
    """A state as kernels take it, in its own dtype. Raises: ValueError for another shape."""
    _check("state", state, rows, batch.lay.channels)
    return _by_rows(state, dtypes.statistic(state.dtype), batch.place)


def _by_rows(array: Array, dtype: np.dtype, place: Place) -> Array:
    """With elements of this dtype that follow each other in each row. On the host rows may lie apart: what has to be
    copied is copied row by row, see arrays.host.beside()."""
    if not isinstance(array, np.ndarray):
        return place.astype(array, dtype)
    if array.dtype == dtype and array[0].flags.c_contiguous and array.flags.aligned:
        return array
    return np.array([row.astype(dtype) for row in array])


def _float64(array: Array) -> Array:
    """What stood between the stages, as kernels take it."""
    return np.ascontiguousarray(array, np.float64) if isinstance(array, np.ndarray) else array


def _zeros(batch: Batch, rows: int, columns: int, dtype: np.dtype | None = None) -> Array:
    """Zeros where a batch lies, in the statistics' dtype if no other is named."""
    return batch.place.send(np.zeros((rows, columns), dtypes.statistic(batch.x.dtype) if dtype is None else dtype))
