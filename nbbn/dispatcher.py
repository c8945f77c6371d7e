"""From arrays to kernels: mode x dtype x layout x size -> one compiled call.

The Dispatcher allocates, finds the canonical view that all arrays of a call share, chooses the schedule and whether
it is worth several threads, and turns the options into numbers that the channel stage reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from nbbn import dtypes
from nbbn.kernels import channel
from nbbn.layout import Layout, Sizes, collapse, contiguous_strides, copy_order, layout, resolve_axis
from nbbn.options import Options
from nbbn.plan import Plan
from nbbn.repeats import Repeat
from nbbn.runtime import buffers
from nbbn.schedule import choose
from nbbn.variables import Shapes

_MAX_PLANS = 512  # plans are small; a server with endless shapes must not collect them for ever

Array = np.ndarray
Flags = tuple[bool | None, ...]  # True or None: whether there is an activation, a renorm


@dataclass(frozen=True)
class Force:
    """Choices made by hand, for tests and measurements; None leaves them to the Dispatcher.

    schedule: "planes" or "rows". parallel: use the thread pool (where it is free) or not. one_pass: reduce and apply
    tile by tile (where tiles are independent) or not.
    """

    schedule: str | None = None
    parallel: bool | None = None
    one_pass: bool | None = None

    def __post_init__(self) -> None:
        if self.schedule not in (None, "planes", "rows"):
            raise ValueError(f"schedule must be 'planes', 'rows' or None; received {self.schedule!r}")


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
        self.repeats: dict[tuple[str, Sizes, Sizes, np.dtype], Repeat] = {}  # by step, and by the input's geometry
        self._epsilon = np.array([options.epsilon])
        self._renorm = True if options.renorm else None
        self._relu = True if options.activation == "relu" else None

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

    def hyper(self, rank: int, dtype: np.dtype) -> Array:
        """The numbers that the channel stage reads, as a read-only array; momentum is 0 where the options have none."""
        found = self._hyper.get((rank, dtype))
        if found is None:
            found = self._new_hyper(rank, dtype)
            found.flags.writeable = False
            if not any(callable(v) for v in (self.options.renorm_clipping or {}).values()):
                self._hyper[rank, dtype] = found
        return found

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

    def flags(self, step: str) -> Flags:
        """What follows the outputs in the arguments of a step that normalizes."""
        return (self._relu, self._renorm) if step == "train" else (self._relu,)

    def train(
        self,
        x: Array,
        params: Array,
        state: Array,
        hyper: Array,
        *,
        residual: Array | None = None,
        weights: Array | None = None,
        adjustment: tuple[Array, Array] | None = None,
        out: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """Normalize with the statistics of `x`; returns y, the new state and saved. `state` itself is left alone.

        residual: shape and dtype of x. weights and both of `adjustment` broadcast against x, in the statistics' dtype.
        """
        lay = self.layout(x.shape, training=True)
        y = buffers.empty_like(x) if out is None else out
        if x.size == 0:
            return y, state.copy(), _saved_of_nothing(lay)
        saved, new_state = np.empty((5, lay.groups * lay.channels)), np.empty_like(state)
        operands = _spread(x, weights, adjustment)
        rest = [params, state, hyper, new_state, saved]
        self._run("train", lay, [x, residual], operands, [y], self.flags("train"), rest, out)
        return y, new_state, saved

    def infer(
        self,
        x: Array,
        params: Array,
        state: Array,
        *,
        residual: Array | None = None,
        out: Array | None = None,
        activate: bool = True,
    ) -> Array:
        """Normalize with the moving statistics; activate=False leaves out the activation."""
        y = buffers.empty_like(x) if out is None else out
        if x.size == 0:
            return y
        lay = self.layout(x.shape, training=False)
        flags = self.flags("infer") if activate else (None,)
        self._run("infer", lay, [x, residual], [], [y], flags, [params, state, self._epsilon], out)
        return y

    def known(self, step: str, x: Array, shapes: Shapes) -> Repeat | None:
        """The step that remember() has kept for inputs like `x` and variables of these very shapes."""
        repeat = self.repeats.get((step, x.shape, x.strides, x.dtype))
        return repeat if repeat is not None and repeat.shapes is shapes and x.flags.aligned else None

    def remember(self, step: str, x: Array, out: Array | None, shapes: Shapes) -> None:
        """Keep the step that has just run on `x` and what is like it, without other operands, if it can be kept.

        out: what was given for its result.
        """
        dense = x.flags.c_contiguous and (out is None or out.flags.c_contiguous)  # with others, this kernel did not run
        if not (x.size and dense and dtypes.statistic(x.dtype) == shapes.dtype) or self.known(step, x, shapes):
            return
        hyper = self._hyper.get((x.ndim, x.dtype)) if step == "train" else self._epsilon
        if hyper is None:  # of the clips, some are to be asked for at each step
            return
        lay, inputs = self.layout(x.shape, training=step != "infer"), [x, x] if step == "backward" else [x]
        operands: list[Array | None] = [] if step == "infer" else [None, None, None]
        outputs: list[Array | None] = [x, None] if step == "backward" else [x]
        plan = self.plan(step, lay, [*inputs, None], operands, outputs, self.flags(step))
        if plan.copied is not None or any(s is not None for s in plan.strides):
            return
        if len(self.repeats) >= _MAX_PLANS:
            self.repeats.clear()
        self.repeats[step, x.shape, x.strides, x.dtype] = Repeat(
            plan, x.shape, shapes, lay.groups * lay.channels, self.flags(step), hyper
        )

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
        residual: Array | None = None,
        weights: Array | None = None,
        adjustment: tuple[Array, Array] | None = None,
        out: Array | None = None,
        activated: bool = False,
    ) -> tuple[Array, Array, Array | None]:
        """The gradients of x, of gamma and beta as one (2, C) array, and of what the activation gets, if asked for.

        Without an activation the latter is dy.
        """
        lay = self.layout(x.shape, training)
        dx, dparams = buffers.empty_like(x) if out is None else out, np.zeros_like(params)
        dz = buffers.empty_like(x) if activated and self._relu else None
        if x.size:
            operands = _spread(x, weights, adjustment)
            if training or self._relu:
                rest = [params, saved, dparams]
                self._run("backward", lay, [x, dy, residual], operands, [dx, dz], (self._relu,), rest, out)
            else:
                self._run("frozen_backward", lay, [x, dy], [], [dx], (), [params, saved, dparams], out)
        return dx, dparams, dy if activated and dz is None else dz

    def moments(self, x: Array, weights: Array | None = None) -> Array:
        """Count, mean and biased variance as a (3, C) float64 array. `x` is not empty."""
        lay = self.layout(x.shape, training=False)
        saved = np.zeros((5, lay.channels))
        self._run("moments", lay, [x], [weights], [], (), [saved], None)
        return saved[:3]

    def _run(
        self,
        step: str,
        lay: Layout,
        elements: list[Array | None],
        operands: list[Array | None],
        outputs: list[Array | None],
        flags: Flags,
        rest: list[Array],
        out: Array | None,
    ) -> None:
        """One step. `elements` and `outputs` have the input's dtype, `operands` the statistics'; all have its shape.

        out: the first output if it is the caller's, which may share memory with an input; the others are new.
        """
        in_place = False
        targets = outputs
        if out is not None:
            inputs = [a for a in (*elements, *operands) if a is not None and np.may_share_memory(out, a)]
            in_place = bool(inputs)
            if not all(_same_memory(out, a) for a in inputs):
                targets = [buffers.empty_like(out) if o is out else o for o in outputs]
        plan = self.plan(step, lay, elements, operands, targets, flags, in_place)
        arrays = [*elements, *operands, *targets]
        if plan.copied is None:
            plan.run(*plan.views(arrays, len(outputs)), *flags, plan.schedule.grid, *rest)
        else:
            self._run_copied(plan, lay, arrays, len(outputs), flags, rest)
        if targets is not outputs:
            out[...] = targets[0]  # type: ignore[index]

    def _run_copied(
        self, plan: Plan, lay: Layout, arrays: list[Array | None], outputs: int, flags: Flags, rest: list[Array]
    ) -> None:
        """The same on contiguous copies, as there is no canonical view."""
        assert plan.copied is not None
        first = len(arrays) - outputs
        shape = [lay.sizes[i] for i in plan.copied]
        ordered = [None if a is None else _in_order(a, lay, plan.copied) for a in arrays[:first]]
        copies: list[Array | None] = [None if a is None else np.ascontiguousarray(a) for a in ordered]
        copies += [None if a is None else np.empty(shape, a.dtype) for a in arrays[first:]]
        plan.run(*plan.views(copies, outputs), *flags, plan.schedule.grid, *rest)
        for target, copy in zip(arrays[first:], copies[first:], strict=True):
            if target is not None:
                _in_order(target, lay, plan.copied, writeable=True)[...] = copy

    def plan(
        self,
        step: str,
        lay: Layout,
        elements: list[Array | None],
        operands: list[Array | None],
        outputs: list[Array | None],
        flags: Flags = (),
        in_place: bool = False,
    ) -> Plan:
        """The plan for a step on arrays of one shape, the first of which decides the order in memory."""
        arrays = [*elements, *operands, *outputs]
        key = (
            step,
            lay,
            elements[0].dtype,  # type: ignore[union-attr]  # the input is always there
            flags,
            in_place,
            *[None if a is None else a.strides for a in arrays],
        )
        found = self._plans.get(key)
        if found is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            found = self._plans[key] = self._new_plan(step, lay, elements, operands, outputs, flags, in_place)
        return found

    def _new_plan(
        self,
        step: str,
        lay: Layout,
        elements: list[Array | None],
        operands: list[Array | None],
        outputs: list[Array | None],
        flags: Flags,
        in_place: bool,
    ) -> Plan:
        data = [a for a in (*elements, *outputs) if a is not None]
        others = [a for a in operands if a is not None]
        view, strides, copied = canonical_view(lay, [*data, *others])
        dense = [_is_dense(s, view, a.itemsize) for a, s in zip([*data, *others], strides, strict=True)]
        reshaped = [
            d and (copied is not None or a.flags.c_contiguous) for a, d in zip([*data, *others], dense, strict=True)
        ]
        by_array = {id(a): None if r else s for a, s, r in zip([*data, *others], strides, reshaped, strict=True)}
        contiguous = all(dense[: len(data)])
        schedule = choose(
            step,
            view,
            lay.groups,
            data[0].itemsize,
            len(data),
            contiguous=contiguous,
            foldable=all(reshaped) and not others,
            in_place=in_place,
            loops=self.force.schedule,
            parallel=self.force.parallel,
            one_pass=self.force.one_pass,
        )
        arrays = [*elements, *operands, *outputs]
        return Plan(
            step=step,
            dtype=data[0].dtype,
            view=view,
            strides=[by_array.get(id(a)) for a in arrays],
            contiguous=contiguous,
            copied=copied,
            schedule=schedule,
            absent=tuple(i for i, a in enumerate((*arrays, *flags)) if a is None),
        )


def _saved_of_nothing(lay: Layout) -> Array:
    saved = np.zeros((5, lay.groups * lay.channels))
    saved[channel.RSTD] = 1
    return saved


def canonical_view(lay: Layout, arrays: Sequence[Any]) -> tuple[Sizes, list[Sizes], Sizes | None]:
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


def _same_memory(a: Array, b: Array) -> bool:
    """Whether two arrays of one shape are the same elements."""
    same_start = a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
    return same_start and a.strides == b.strides and a.dtype == b.dtype


def _in_order(array: Array, lay: Layout, order: Sizes, writeable: bool = False) -> Array:
    """A view of `array` with the dimensions of the layout, transposed."""
    return as_strided(array, lay.sizes, lay.split(array.strides), writeable=writeable).transpose(order)
