"""From arrays to kernels: mode x dtype x layout x size -> one compiled call.

The Dispatcher allocates, finds the canonical view that all arrays of a call share, chooses the schedule and whether
it is worth several threads, and turns the options into numbers that the channel stage reads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from nbbn import dtypes
from nbbn.kernels.cpu import channel
from nbbn.kernels.cpu.steps import Step, compiled
from nbbn.layout import Layout, Sizes, collapse, contiguous_strides, copy_order, grid, layout, resolve_axis
from nbbn.options import Options
from nbbn.runtime import parallel_region, thread_limit

# From here on a second core saves more than a parallel region costs: 2 us when the cores are idle, but a scheduler's
# time slice when they are not (libgomp's threads spin until the last one arrives), which a small call must not risk.
PARALLEL_ELEMENTS = 1 << 17
_MAX_PLANS = 512  # plans are small; a server with endless shapes must not collect them for ever

Array = np.ndarray


@dataclass(frozen=True)
class Force:
    """Choices made by hand, for tests and measurements; None leaves them to the Dispatcher.

    schedule: "planes" or "rows". parallel: use the thread pool (where it is free) or not.
    """

    schedule: str | None = None
    parallel: bool | None = None

    def __post_init__(self) -> None:
        if self.schedule not in (None, "planes", "rows"):
            raise ValueError(f"schedule must be 'planes', 'rows' or None; received {self.schedule!r}")


@dataclass
class Plan:
    """How one step runs on arrays of one shape, dtype and memory layout."""

    step: str
    dtype: np.dtype
    view: Sizes
    strides: list[Sizes | None]  # per array, of its canonical view; None where that is a reshape
    contiguous: bool  # whether the arrays of `dtype` are, in that view
    copied: Sizes | None  # the order of dimensions of contiguous copies, where no canonical view exists
    schedule: str
    parallel: bool
    absent: tuple[int, ...]  # the positions of the arguments that are None
    grid: Sizes = field(init=False)
    shape: Sizes = field(init=False)
    _kernels: dict[bool, Step] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.grid = grid(self.view)
        self.shape = self.view[:3] if self.schedule == "planes" else self.view

    def kernel(self, parallel: bool) -> Step:
        if parallel not in self._kernels:
            types = dtypes.carrier(self.dtype), dtypes.statistic(self.dtype)
            self._kernels[parallel] = compiled(self.step, self.schedule, parallel, *types, self.contiguous, self.absent)
        return self._kernels[parallel]

    def run(self, *arguments: Any) -> None:
        if self.parallel:
            with parallel_region() as granted:
                self.kernel(granted)(*arguments)
        else:
            self.kernel(False)(*arguments)

    def views(self, arrays: Sequence[Array | None]) -> list[Array | None]:
        """The arrays in the shape and carrier dtype of the kernels."""
        last = len(arrays) - 1  # the output, which alone is written
        return [None if a is None else self._view(a, self.strides[i], i == last) for i, a in enumerate(arrays)]

    def _view(self, array: Array, strides: Sizes | None, writeable: bool) -> Array:
        carrier = dtypes.carrier(array.dtype)
        if carrier is not array.dtype:
            array = array.view(carrier)
        if strides is None:
            return array.reshape(self.shape)
        return as_strided(array, self.shape, strides[: len(self.shape)], writeable=writeable)

    def __str__(self) -> str:
        r0, k0, r1, k1 = self.view
        b0, b1, bk = self.grid
        threads = f"up to {thread_limit()}" if self.parallel else "1"
        memory = "contiguous" if self.contiguous else "strided, read in place"
        if self.copied is not None:
            memory = f"no canonical view: copied in the order of dimensions {self.copied}"
        return "\n".join(
            (
                f"step          {self.step}",
                f"dtype         {self.dtype.name}; statistics {dtypes.statistic(self.dtype).name}, sums in float64",
                f"view          R0={r0} K0={k0} R1={r1} K1={k1} ({memory})",
                f"schedule      {self.schedule}",
                f"chunks        {-(-r0 // b0) * -(-r1 // b1)} per statistic, {b0} x {b1} values x {bk} statistics each",
                f"threads       {threads}",
            )
        )


class Dispatcher:
    """Runs the steps of batch normalization for one set of options.

    Parameters are (2, C) arrays [gamma, beta]; the state is (2, C) [mean, variance], with renorm (5, C)
    [mean, variance, stddev, renorm_mean, renorm_stddev]; what a gradient needs is `saved`, (5, G * C) float64
    [count, mean, 1/sigma, r, d]. C counts the combinations of the kept axes, in their order.
    """

    def __init__(self, options: Options, force: Force | None = None) -> None:
        self.options = options
        self.force = force or Force()
        self._plans: dict[Any, Plan] = {}
        self._axis: dict[int, Sizes] = {}
        self._hyper: dict[tuple[int, np.dtype], Array] = {}
        self._epsilon = np.array([options.epsilon])

    def __reduce__(self) -> tuple[Any, ...]:
        return Dispatcher, (self.options, self.force)

    def axis(self, rank: int) -> Sizes:
        """The kept axes of an input of this rank, ascending and not negative."""
        if rank not in self._axis:
            self._axis[rank] = resolve_axis(self.options.resolved_axis(), rank)
        return self._axis[rank]

    def layout(self, shape: Sizes, training: bool) -> Layout:
        """Raises: ValueError if a virtual batch cannot divide the batch of a training call."""
        size = self.options.virtual_batch_size
        if size is None or not training:
            return layout(shape, self.axis(len(shape)))
        if shape[0] % size != 0:
            raise ValueError(
                f"virtual_batch_size={size} must divide the batch in training; received a batch of {shape[0]} samples"
            )
        return layout(shape, self.axis(len(shape)), size)

    def hyper(self, shape: Sizes, dtype: np.dtype) -> Array:
        """The numbers that the channel stage reads, in a new array; momentum is 0 where the options have none."""
        key = (len(shape), dtype)
        if key not in self._hyper:
            values = self._new_hyper(*key)
            if any(callable(v) for v in (self.options.renorm_clipping or {}).values()):
                return values
            self._hyper[key] = values
        return self._hyper[key].copy()

    def _new_hyper(self, rank: int, dtype: np.dtype) -> Array:
        o = self.options
        clips = o.clip_values()
        values = np.empty(7)
        values[channel.EPSILON] = o.epsilon
        values[channel.MOMENTUM] = 0.0 if o.momentum is None else o.momentum
        values[channel.BESSEL] = o.bessel(rank, dtype)
        values[channel.RENORM_MOMENTUM] = o.renorm_momentum
        values[channel.RMIN], values[channel.RMAX], values[channel.DMAX] = clips["rmin"], clips["rmax"], clips["dmax"]
        return values

    def train(
        self,
        x: Array,
        params: Array,
        state: Array,
        hyper: Array,
        *,
        weights: Array | None = None,
        adjustment: tuple[Array, Array] | None = None,
        out: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """Normalize with the statistics of `x`; returns y, the new state and saved. `state` itself is left alone.

        weights and both of `adjustment` broadcast against x, in the statistics' dtype.
        """
        lay = self.layout(x.shape, training=True)
        y = np.empty_like(x, subok=False) if out is None else out
        saved = np.zeros((5, lay.groups * lay.channels))
        new_state = np.empty_like(state)
        if x.size == 0:
            saved[channel.RSTD] = 1
            return y, state.copy(), saved
        operands = _spread(x, weights, adjustment)
        self._run("train", lay, [x], operands, [params, state, hyper], y, [new_state, saved])
        return y, new_state, saved

    def infer(self, x: Array, params: Array, state: Array, out: Array | None = None) -> Array:
        """Normalize with the moving statistics."""
        y = np.empty_like(x, subok=False) if out is None else out
        if x.size == 0:
            return y
        lay = self.layout(x.shape, training=False)
        self._run("infer", lay, [x], [], [params, state, self._epsilon], y, [])
        return y

    def saved_of(self, state: Array) -> Array:
        """What a gradient needs after inference: statistics that are constants, which is what a count of 0 says."""
        saved = np.zeros((5, state.shape[1]))
        saved[channel.BATCH_MEAN] = state[channel.MEAN]
        with np.errstate(divide="ignore", invalid="ignore"):  # the output has the same infinity or NaN
            saved[channel.RSTD] = 1 / np.sqrt(state[channel.VARIANCE] + np.float64(self.options.epsilon))
        saved[channel.R] = 1
        return saved

    def backward(
        self,
        dy: Array,
        x: Array,
        params: Array,
        saved: Array,
        *,
        training: bool,
        weights: Array | None = None,
        adjustment: tuple[Array, Array] | None = None,
    ) -> tuple[Array, Array]:
        """The gradients of x, and of gamma and beta as one (2, C) array."""
        lay = self.layout(x.shape, training)
        dx, dparams = np.empty_like(x, subok=False), np.zeros_like(params)
        if x.size == 0:
            return dx, dparams
        if training:
            operands = _spread(x, weights, adjustment)
            self._run("backward", lay, [x, dy], operands, [params, saved], dx, [dparams])
        else:
            self._run("frozen_backward", lay, [x, dy], [], [params, saved], dx, [dparams])
        return dx, dparams

    def moments(self, x: Array, weights: Array | None = None) -> Array:
        """Count, mean and biased variance as a (3, C) float64 array. `x` is not empty."""
        lay = self.layout(x.shape, training=False)
        saved = np.zeros((5, lay.channels))
        self._run("moments", lay, [x], [weights], [], None, [saved])
        return saved[:3]

    def _run(
        self,
        step: str,
        lay: Layout,
        elements: list[Array],
        operands: list[Array | None],
        before: list[Array],
        output: Array | None,
        after: list[Array],
    ) -> None:
        """One step. `elements` and `output` have the input's dtype, `operands` the statistics'; all have its shape."""
        inputs = [*elements, *operands]
        target = output
        if output is not None and any(_overlaps(output, a) for a in inputs if a is not None):
            target = np.empty_like(elements[0], subok=False)
        plan = self.plan(step, lay, elements, operands, target)
        arrays = [*inputs, target]
        if plan.copied is not None:
            ordered = [None if a is None else _in_order(a, lay, plan.copied) for a in inputs]
            arrays = [None if a is None else np.ascontiguousarray(a) for a in ordered]
            arrays.append(None if target is None else np.empty([lay.sizes[i] for i in plan.copied], target.dtype))
        *views, result = plan.views(arrays)
        plan.run(*views, *before, plan.grid, *(() if output is None else (result,)), *after)
        if output is None:
            return
        assert target is not None
        if plan.copied is not None:
            _in_order(target, lay, plan.copied, writeable=True)[...] = arrays[-1]
        if target is not output:
            output[...] = target

    def plan(
        self, step: str, lay: Layout, elements: list[Array], operands: list[Array | None], output: Array | None
    ) -> Plan:
        """The plan for a step on arrays of one shape, the first of which decides the order in memory."""
        arrays = [*elements, *operands, output]
        key = (step, lay, elements[0].dtype, *[None if a is None else a.strides for a in arrays])
        found = self._plans.get(key)
        if found is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            found = self._plans[key] = self._new_plan(step, lay, elements, operands, output)
        return found

    def _new_plan(
        self, step: str, lay: Layout, elements: list[Array], operands: list[Array | None], output: Array | None
    ) -> Plan:
        present = [a for a in (*elements, output, *operands) if a is not None]
        view, strides, copied = _canonical_view(lay, present)
        dense = [_is_dense(s, view, a.itemsize) for a, s in zip(present, strides, strict=True)]
        reshaped = [d and (copied is not None or a.flags.c_contiguous) for a, d in zip(present, dense, strict=True)]
        by_array = {id(a): None if r else s for a, s, r in zip(present, strides, reshaped, strict=True)}
        schedule = self.force.schedule or ("planes" if view[3] == 1 else "rows")
        if schedule == "planes" and view[3] != 1:
            raise ValueError(f"schedule 'planes' needs K1 = 1; this input's view is [R0, K0, R1, K1] = {list(view)}")
        large = math.prod(view) >= PARALLEL_ELEMENTS if self.force.parallel is None else self.force.parallel
        return Plan(
            step=step,
            dtype=elements[0].dtype,
            view=view,
            strides=[by_array.get(id(a)) for a in (*elements, *operands, output)],
            contiguous=all(dense[: len(elements) + (output is not None)]),
            copied=copied,
            schedule=schedule,
            parallel=large and thread_limit() > 1,
            absent=tuple(i for i, a in enumerate((*elements, *operands)) if a is None),
        )


def _canonical_view(lay: Layout, arrays: list[Array]) -> tuple[Sizes, list[Sizes], Sizes | None]:
    """The canonical shape, each array's strides in it, and the order of dimensions if they must be copied first."""
    found = collapse(lay.sizes, lay.kept, [lay.split(a.strides) for a in arrays])
    if found is not None:
        return *found, None
    order = copy_order(lay.sizes, lay.kept)
    sizes, kept = tuple(lay.sizes[i] for i in order), tuple(lay.kept[i] for i in order)
    found = collapse(sizes, kept, [contiguous_strides(sizes, a.itemsize) for a in arrays])
    assert found is not None  # copy_order() chose an order that has a view
    return *found, order


def _is_dense(strides: Sizes, sizes: Sizes, itemsize: int) -> bool:
    dense = contiguous_strides(sizes, itemsize)
    return all(a == b for a, b, size in zip(strides, dense, sizes, strict=True) if size != 1)


def _spread(x: Array, weights: Array | None, adjustment: tuple[Array, Array] | None) -> list[Array | None]:
    """The operands in the shape of x, without taking its memory."""
    return [None if v is None else np.broadcast_to(v, x.shape) for v in (weights, *(adjustment or (None, None)))]


def _overlaps(output: Array, array: Array) -> bool:
    """Whether writing `output` could change elements of `array` still to be read; the very same memory is fine."""
    if not np.may_share_memory(output, array):
        return False
    same_start = output.__array_interface__["data"][0] == array.__array_interface__["data"][0]
    return not (same_start and output.strides == array.strides and output.dtype == array.dtype)


def _in_order(array: Array, lay: Layout, order: Sizes, writeable: bool = False) -> Array:
    """A view of `array` with the dimensions of the layout, transposed."""
    return as_strided(array, lay.sizes, lay.split(array.strides), writeable=writeable).transpose(order)
