"""Mode x target x dtype x layout x size -> which engine runs, in which form, with which numbers.

The Dispatcher turns options into the numbers that the middle stage reads: this is where Bessel's choice and the clips
of batch renormalization enter. It runs a step in the engine's fast form, or, where an Exchange stands between reduce
and finish, stage by stage.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np

from nbbn.arrays import Array, place_of
from nbbn.core import dtypes
from nbbn.core.layout import Layout, Sizes, layout, resolve_axis
from nbbn.core.options import UNCLIPPED, Options
from nbbn.engine.base import NOTHING, Batch, Engine, Force, Operands, Step
from nbbn.engine.cpu.bound import BoundStep
from nbbn.engine.cpu.engine import CpuEngine
from nbbn.kernels import channel


class Exchange(Protocol):
    """What stands between reduce and finish: other processes, other parts of a batch.

    Both methods get and return float64 Arrays that lie where the input does, and are called in every training step,
    also for an empty input.
    """

    def merge(self, moments: Array) -> Array:
        """The moments (4, G * C) [count, mean, m2, squares] of all that take part, from those of this input."""

    def add(self, sums: Array) -> Array:
        """The sums of the gradient (2 or 4, G * C) of all that take part, from those of this input."""


class Dispatcher:
    """Runs the steps of batch normalization for one set of options, on NumPy arrays and on arrays of a GPU.

    Parameters, state and saved are as in Engine. operands: see Operands. An empty input changes no state.

    Args:
        force: choices made by hand. exchange: merges the statistics of several inputs into one.
    """

    def __init__(self, options: Options, force: Force | None = None, exchange: Exchange | None = None) -> None:
        self.options = options
        self.force = force or Force()
        self.exchange = exchange
        self._state_rows = (5 if options.renorm else 2) + (2 if options.momentum is None else 0)
        self._engines: dict[str, Engine] = {}
        self._axis: dict[int, Sizes] = {}
        self._hyper: dict[tuple[int, np.dtype], np.ndarray] = {}
        self.bound: dict[tuple[Any, ...], BoundStep] = {}  # see bind()

    def __reduce__(self) -> tuple[Any, ...]:
        return Dispatcher, (self.options, self.force, self.exchange)

    def changed(self, **momenta: float | None) -> Self:
        """The same with another momentum or renorm_momentum. Those are numbers that a step is told, so engines and
        their plans stay; whoever runs a step of this one meanwhile is told the numbers of before.

        Raises: TypeError, ValueError for what Options does not accept.
        """
        found = type(self)(replace(self.options, **momenta), self.force, self.exchange)  # type: ignore[arg-type]
        if found._state_rows == self._state_rows:
            found._engines = self._engines
        return found

    # -- what the options mean for an input ----------------------------------------------------------------------------

    def axis(self, rank: int) -> Sizes:
        """The kept axes of an input of this rank, ascending and not negative."""
        if rank not in self._axis:
            self._axis[rank] = resolve_axis(self.options.resolved_axis(), rank)
        return self._axis[rank]

    def layout(self, shape: Sizes, training: bool) -> Layout:
        """Raises: ValueError if a virtual batch cannot divide the batch of a training call."""
        size = self.options.virtual_batch_size if training else None
        if size is not None and shape[0] % size != 0:
            raise ValueError(
                f"virtual_batch_size={size} must divide the batch in training; received a batch of {shape[0]} samples"
            )
        return layout(shape, self.axis(len(shape)), size)

    def _hyper_of(self, rank: int, dtype: np.dtype, clips: Mapping[str, float] | None = None) -> np.ndarray:
        """The numbers that the middle stage reads. clips: those of this step; None asks the options."""
        if clips is not None:
            return self._new_hyper(rank, dtype, clips)
        found = self._hyper.get((rank, dtype))
        if found is None:
            found = self._new_hyper(rank, dtype, self.options.clip_values())
            if self.options.is_constant:
                self._hyper[rank, dtype] = found
        return found

    def _new_hyper(self, rank: int, dtype: np.dtype, clips: Mapping[str, float]) -> np.ndarray:
        o, values = self.options, np.empty(7)
        values[channel.EPSILON] = o.epsilon
        values[channel.MOMENTUM] = 0.0 if o.momentum is None else o.momentum  # the state has the counts
        values[channel.BESSEL] = o.bessel(rank, dtype)
        values[channel.RENORM_MOMENTUM] = o.renorm_momentum
        values[channel.RMIN], values[channel.RMAX], values[channel.DMAX] = clips["rmin"], clips["rmax"], clips["dmax"]
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
        clips: Mapping[str, float] | None = None,
        out: Array | None = None,
        in_place: bool = False,
    ) -> tuple[Array, Array, Array]:
        """Normalize with the statistics of `x`: the output, the new state and saved.

        clips: rmin, rmax and dmax of this step; None asks the options. in_place: write the new state over the old one.
        """
        batch, engine = self._batch(x, True, operands, out), self.engine(x)
        place, own, hyper = batch.place, _params(params, batch), self._hyper_of(x.ndim, x.dtype, clips)
        own_state = _state(state, batch, self._state_rows)
        target = state if in_place and own_state is state else None
        if self.exchange is None and x.size == 0:
            saved = np.zeros((channel.SAVED_ROWS, batch.lay.statistics))
            saved[channel.RSTD] = 1
            return batch.result(), state, place.from_host(saved)
        if self.exchange is None:
            return engine.train(batch, own, own_state, hyper, target)
        # An empty input has no values, but shares the statistics.
        nothing = np.zeros((channel.MOMENT_ROWS, batch.lay.statistics))
        moments = engine.reduce(batch) if x.size else place.from_host(nothing)
        moments = _exchanged(self.exchange.merge(moments), moments)
        new_state, saved, coefficients = engine.finish(moments, own, own_state, hyper, operands.adjusted)
        y = engine.apply(batch, coefficients) if x.size else batch.result()
        if target is not None:
            place.write(target, new_state, target.shape, (0, 1))
            new_state = target
        return y, new_state, saved

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
        return self.engine(params).freeze(place.astype(params, own), state, self._epsilon)

    @cached_property
    def _epsilon(self) -> np.ndarray:
        """The numbers that inference reads: no clips, which callables need not give outside training."""
        return self._new_hyper(0, np.dtype(np.float64), UNCLIPPED)

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
        activation gets. Without an activation dz is dy. With an exchange the gradients of gamma and beta are those of
        this input alone, as an optimizer expects that adds them up."""
        batch, engine = self._batch(x, training, operands, out, dy), self.engine(x)
        _check("saved", saved, channel.SAVED_ROWS, batch.lay.statistics)
        exchange = self.exchange if training else None
        dz: Array | None = None
        if x.size == 0:
            if exchange is not None:
                nothing = np.zeros((channel.GRADIENT_ROWS[operands.adjusted], batch.lay.statistics))
                exchange.add(batch.place.from_host(nothing))
            dparams = batch.place.from_host(np.zeros((2, batch.lay.channels), dtypes.statistic(x.dtype)))
            dx = batch.result()
        elif exchange is None:
            dx, dparams, dz = engine.backward(batch, dy, saved, training, wants_dz)
        else:
            sums, dparams = engine.reduce_gradient(batch, dy, saved)
            sums = _exchanged(exchange.add(sums), sums)
            dx, dz = engine.apply_gradient(batch, dy, saved, sums, wants_dz)
        return dx, dparams, dy if wants_dz and dz is None else dz

    def reduce(self, x: Array, weights: Array | None = None, *, training: bool = True) -> Array:
        """The moments of `x`; training=False ignores a virtual batch. `x` is not empty."""
        return self.engine(x).reduce(self._batch(x, training, Operands(weights=weights), None))

    def finish(
        self,
        moments: Array,
        params: Array,
        state: Array,
        *,
        rank: int,
        dtype: np.dtype,
        adjusted: bool = False,
        clips: Mapping[str, float] | None = None,
    ) -> tuple[Array, Array, Array]:
        """The new state, saved and the coefficients of the output, of moments, or of saved, which begins with them.

        rank, dtype: of the input, which decide about Bessel's correction. clips: as of train().
        """
        _check("params", params, 2, channels := params.shape[-1])
        _check("state", state, self._state_rows, channels)
        _check("moments", moments, max(channel.MOMENT_ROWS, moments.shape[0]), moments.shape[-1])
        hyper = self._hyper_of(rank, dtype, clips)
        return self.engine(params).finish(moments, params, state, hyper, adjusted)

    # -- the short way -------------------------------------------------------------------------------------------------

    def bind(self, name: str, x: Array, residual: bool, owner: Any) -> None:
        """Keep a step for inputs like `x`, beside which there is nothing but C-contiguous arrays of the same shape and
        dtype, if the geometry of the input decides all about it.

        residual: whether there is one. owner: whose parameters and state the step will get.
        """
        if not isinstance(x, np.ndarray) or not (x.size and x.flags.c_contiguous and self.options.is_constant):
            return
        if self.exchange is not None or dtypes.statistic(x.dtype) != owner.params.dtype:
            return
        if not (owner.params.flags.c_contiguous and owner.params.flags.aligned):
            return  # general steps get a copy
        key = name, residual, x.shape, x.dtype
        known, engine = self.bound.get(key), self.engine(x)
        if known is None or not known.fits(owner, x, None, None):
            known = self._new_bound(name, x, residual, owner, engine)
        if known is None:
            return
        forward = self.bound.get(("train", *key[1:]))
        if name == "backward" and forward is not None:
            forward.gradient = known

    def _new_bound(self, name: str, x: Array, residual: bool, owner: Any, engine: Engine) -> BoundStep | None:
        assert isinstance(engine, CpuEngine)
        hyper = self._hyper_of(x.ndim, x.dtype) if name == "train" else self._epsilon
        found = engine.bind(self._plain_step(name, x, residual)._replace(numbers={"hyper": hyper}), owner)
        if found is not None:
            if len(self.bound) >= self.force.max_plans:
                self.bound.clear()
            self.bound[name, residual, x.shape, x.dtype] = found
        return found

    def _batch(self, x: Array, training: bool, operands: Operands, out: Array | None, dy: Array | None = None) -> Batch:
        """Raises: ValueError for an array that has not the input's shape."""
        for name, array in (("residual", operands.residual), ("out", out), ("dy", dy)):
            if array is not None:
                _check(name, array, *x.shape)
        return Batch(self.layout(x.shape, training), x, operands, out)

    def _plain_step(self, name: str, x: Array, residual: bool = False) -> Step:
        """A step beside whose input there is a residual at most; all arrays are like the input."""
        operands = Operands(x if residual else None)._asdict()
        views: dict[str, Array | None] = {"x": x, "residual": operands["residual"], "y": x}
        if name == "train":
            views = {"x": x, **operands, "y": x}
        elif name == "backward":
            relu = self.options.activation is not None
            views = {"x": x, "dy": x, **operands, "dx": x, "dz": x if residual and relu else None}
        return Step(name, self.layout(x.shape, name != "infer"), views, {})

    def explain(self, x: Array, training: bool) -> Any:
        """How a call on `x` would run: a plan, to be printed."""
        return self.engine(x).plan(self._plain_step("train" if training else "infer", x))


def _check(name: str, array: Array, *shape: int) -> None:
    """Raises: ValueError for another shape: kernels would read and write beside the array."""
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}; received {array.shape}")


def _params(params: Array, batch: Batch) -> Array:
    """Parameters as kernels take them. Raises: ValueError for another shape."""
    _check("params", params, 2, batch.lay.channels)
    return _contiguous(batch.place.astype(params, dtypes.statistic(batch.x.dtype)))


def _state(state: Array, batch: Batch, rows: int) -> Array:
    """A state as kernels take it, in its own dtype. Raises: ValueError for another shape."""
    _check("state", state, rows, batch.lay.channels)
    return _contiguous(batch.place.astype(state, dtypes.statistic(state.dtype)))


def _contiguous(array: Array) -> Array:
    return np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array


def _exchanged(found: Array, given: Array) -> Array:
    """What an exchange has made of an Array, as kernels take it. Raises: ValueError for another shape."""
    if found.shape != given.shape:
        raise ValueError(f"exchange must return the shape {given.shape} that it got; received {found.shape}")
    return np.ascontiguousarray(found, np.float64) if isinstance(found, np.ndarray) else found
