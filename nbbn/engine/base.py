"""What an engine is: the stages of batch normalization on arrays of one kind, each for itself and in one call.

An engine gets Arrays that have been checked, and numbers. It allocates results, finds the canonical view that the
arrays of a step share, and has a plan for each geometry. The two kinds of engines, engine/cpu and engine/cuda, do not
know each other.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from nbbn.arrays import Array, Place, place_of
from nbbn.core import dtypes
from nbbn.core.layout import Layout, Part, Sizes, collapse, contiguous_strides, copied_parts, copy_order
from nbbn.core.options import Options
from nbbn.kernels.channel import GRADIENT_ROWS, MOMENT_ROWS, OUTPUT_ROWS, SAVED_ROWS

MAX_PLANS = 512  # plans are small; a server with endless shapes must not collect them for ever
_FLOAT64 = np.dtype(np.float64)


@dataclass(frozen=True)
class Force:
    """Choices made by hand, for tests and measurements; None leaves them to the engine.

    schedule: "planes" or "rows". parallel: use the thread pool (where it is free) or not; CPU only. one_pass: reduce
    and apply tile by tile, on a GPU in one launch, where that is possible, or not. thresholds: by the names of the
    engine's Thresholds. max_plans: how many geometries are remembered.

    Raises: ValueError for another schedule.
    """

    schedule: str | None = None
    parallel: bool | None = None
    one_pass: bool | None = None
    thresholds: Mapping[str, Any] = field(default_factory=dict)
    max_plans: int = MAX_PLANS

    def __post_init__(self) -> None:
        if self.schedule not in (None, "planes", "rows"):
            raise ValueError(f"schedule must be 'planes', 'rows' or None; received {self.schedule!r}")
        for name in ("parallel", "one_pass"):
            if getattr(self, name) not in (None, True, False):
                raise ValueError(f"{name} must be True, False or None; received {getattr(self, name)!r}")


class Operands(NamedTuple):
    """What may stand beside the input of a step. residual: shape and dtype of the input. weights, a and b (of an
    adjustment) broadcast against it, in the statistics' dtype. lengths: (N,) int64, in the place of weights: so many
    steps of each sample count."""

    residual: Array | None = None
    weights: Array | None = None
    a: Array | None = None
    b: Array | None = None
    lengths: Array | None = None

    @property
    def views(self) -> dict[str, Array | None]:
        """What there is for each element."""
        return {"residual": self.residual, "weights": self.weights, "a": self.a, "b": self.b}

    @property
    def adjusted(self) -> bool:
        return self.a is not None


NOTHING = Operands()


class Batch(NamedTuple):
    """What a step is about: an input as the layout sees it, what stands beside it, and where to write the result, which
    may share memory with any of them; None for a new array."""

    lay: Layout
    x: Array
    operands: Operands = NOTHING
    out: Array | None = None

    @property
    def place(self) -> Place:
        return place_of(self.x)

    def result(self) -> Array:
        """The array for the result."""
        return self.place.empty_like(self.x) if self.out is None else self.out


class Step(NamedTuple):
    """One step to be run.

    views: arrays of the input's shape, the input first; None stands for one that is not there. numbers: the small
    arrays. out: whether the result is the caller's, which may share memory with an input; the others are new.
    """

    name: str
    lay: Layout
    views: dict[str, Array | None]
    numbers: dict[str, Any]
    out: bool = False

    @property
    def x(self) -> Array:
        return self.views["x"]

    @property
    def state_dtype(self) -> np.dtype:
        """That of the statistics where there is no state."""
        state = self.numbers.get("state")
        return dtypes.statistic(self.x.dtype) if state is None else state.dtype


class BoundStep(Protocol):
    """A step with everything decided that the geometry of its arrays decides, see Dispatcher.bind().

    mask_shape: of what the weights are made of; None without. gradient: of a training step, the step for its gradient,
    once there is one. Every method that runs it takes None for a residual, or for an output, that is not there; whether
    there is a residual is fixed. The output is what the user gets; all others are Arrays.
    """

    mask_shape: Sizes | None
    gradient: Any

    def fits(self, owner: Any, x: Array, out: Any, residual: Any, dy: Any = None) -> bool:
        """Whether the step can be run for `owner` on `x`, which has the geometry that it is known by, beside the others
        that are not None, with `out` for its result. If not, somebody else has to find out why."""

    def infer(self, x: Array, residual: Array | None, out: Array | None, params: Array, state: Array) -> Any:
        """The output."""

    def train(
        self,
        x: Array,
        residual: Array | None,
        out: Array | None,
        params: Array,
        state: Array,
        weights: Array | None,
        new_state: Array | None,
    ) -> tuple[Any, Array, Array]:
        """The output, the new state and saved. new_state: where to write it; None for a new array."""

    def backward(
        self, dy: Array, x: Array, residual: Array | None, out: Array | None, saved: Array, weights: Array | None
    ) -> tuple[Array, Array, Array | None]:
        """The gradients of x, of gamma and beta as one (2, C) array, and of the residual, if there is one."""


_RESULTS = ("y", "dx", "dz")  # among the views
# The small arrays that are made of a batch's parts. All others of theirs have a column for each statistic.
_MADE_OF_PARTS = {"reduce": ("moments",), "reduce_gradient": ("sums", "dparams")}


class Engine(ABC):
    """The stages and their fast forms, for one set of options.

    Parameters are (2, C) arrays [gamma, beta]. The state is (2, C) [mean, variance], with renorm (5, C) [mean,
    variance, stddev, renorm_mean, renorm_stddev], and two rows longer for debiased averages. The state
    has a dtype of its own, float32 or float64. Moments are (4, G * C) float64 [count, mean, m2, squares], where with
    weights count is their sum and squares that of their squares; `saved`, (9, G * C) float64, is what a gradient needs,
    and begins with the moments. C counts the combinations of the kept axes in their order, G the groups of a virtual
    batch.
    """

    def __init__(self, options: Options, force: Force) -> None:
        self.options, self.force = options, force
        self.plans: dict[Any, Any] = {}
        # None is a type to the kernels: what is not asked for is not compiled.
        self.relu = True if options.activation == "relu" else None
        self.renorm = True if options.renorm else None
        self.debias = True if options.is_debiased else None
        self.skip = True if options.skip_nonfinite else None

    # -- the five stages -----------------------------------------------------------------------------------------------

    def reduce(self, batch: Batch) -> Array:
        """The moments."""
        moments = batch.place.empty((MOMENT_ROWS, batch.lay.statistics), _FLOAT64)
        views = {"x": batch.x, "weights": batch.operands.weights}
        self._run(Step("reduce", batch.lay, views, {"moments": moments}))
        return moments

    def finish(
        self, moments: Array, params: Array, state: Array, hyper: np.ndarray, adjusted: bool
    ) -> tuple[Array, Array, Array]:
        """The new state, saved, and the coefficients of the output, of moments, or of `saved`, which has them."""
        place, statistics = place_of(params), moments.shape[1]
        new_state, saved = place.empty(state.shape, state.dtype), place.empty((SAVED_ROWS, statistics), _FLOAT64)
        coefficients = place.empty((OUTPUT_ROWS[adjusted], statistics), params.dtype)
        numbers = {"moments": moments, "params": params, "state": state, "hyper": hyper}
        numbers |= {"new_state": new_state, "saved": saved, "coefficients": coefficients}
        self._run_middle("finish", numbers, adjusted)
        return new_state, saved, coefficients

    def apply(self, batch: Batch, coefficients: Array) -> Array:
        """The output."""
        y, o = batch.result(), batch.operands
        views = {"x": batch.x, "residual": o.residual, "a": o.a, "b": o.b, "y": y}
        self._run(Step("apply", batch.lay, views, {"coefficients": coefficients}, batch.out is not None))
        return y

    def reduce_gradient(self, batch: Batch, dy: Array, saved: Array) -> tuple[Array, Array]:
        """The sums of the gradient, and the gradients of gamma and beta, which are made of these very sums."""
        lay, o, dparams = batch.lay, batch.operands, self._empty_dparams(batch)
        sums = batch.place.empty((GRADIENT_ROWS[o.adjusted], lay.statistics), _FLOAT64)
        views = {"x": batch.x, "dy": dy, **o.views}
        self._run(Step("reduce_gradient", lay, views, {"saved": saved, "sums": sums, "dparams": dparams}))
        return sums, dparams

    def apply_gradient(
        self, batch: Batch, dy: Array, saved: Array, sums: Array, wants_dz: bool
    ) -> tuple[Array, Array | None]:
        """dx, and dz: what the activation lets through of dy, if it is wanted and there is an activation.

        sums: of all that share the statistics.
        """
        views, dx, dz = self._gradient_views(batch, dy, wants_dz)
        numbers = {"saved": saved, "sums": sums, "dparams": self._empty_dparams(batch)}
        self._run(Step("apply_gradient", batch.lay, views, numbers, batch.out is not None))
        return dx, dz

    # -- the fast forms of the same ------------------------------------------------------------------------------------

    def train(
        self, batch: Batch, params: Array, state: Array, hyper: np.ndarray, new_state: Array | None
    ) -> tuple[Array, Array, Array]:
        """reduce, finish and apply: the output, the new state and saved. new_state: where to write it."""
        lay, place = batch.lay, batch.place
        if lay.parts:
            own_state, saved, coefficients = self.finish(
                self.reduce(batch), params, state, hyper, batch.operands.adjusted
            )
            return self.apply(batch, coefficients), own_state, saved
        y = batch.result()
        new_state = place.empty(state.shape, state.dtype) if new_state is None else new_state
        saved = place.empty((SAVED_ROWS, lay.statistics), _FLOAT64)
        numbers = {"params": params, "state": state, "hyper": hyper, "new_state": new_state, "saved": saved}
        views = {"x": batch.x, **batch.operands.views, "y": y}
        self._run(Step("train", lay, views, numbers, batch.out is not None))
        return y, new_state, saved

    def infer(self, batch: Batch, params: Array, state: Array, hyper: np.ndarray) -> Array:
        """The output that the moving statistics make."""
        y = batch.result()
        views = {"x": batch.x, "residual": batch.operands.residual, "y": y}
        numbers = {"params": params, "state": state, "hyper": hyper}
        self._run(Step("infer", batch.lay, views, numbers, batch.out is not None))
        return y

    def freeze(self, params: Array, state: Array, hyper: np.ndarray) -> Array:
        """What a gradient needs after inference: statistics that are constants, which is what a count of 0 says."""
        saved = place_of(params).empty((SAVED_ROWS, params.shape[1]), _FLOAT64)
        self._run_middle("freeze", {"hyper": hyper, "params": params, "state": state, "saved": saved}, False)
        return saved

    def backward(
        self, batch: Batch, dy: Array, saved: Array, training: bool, wants_dz: bool
    ) -> tuple[Array, Array, Array | None]:
        """reduce_gradient and apply_gradient: dx, the gradients of gamma and beta, and dz."""
        if batch.lay.parts:
            sums, own_dparams = self.reduce_gradient(batch, dy, saved)
            own_dx, own_dz = self.apply_gradient(batch, dy, saved, sums, wants_dz)
            return own_dx, own_dparams, own_dz
        name, dparams = "backward", self._empty_dparams(batch)
        numbers, (views, dx, dz) = {"saved": saved, "dparams": dparams}, self._gradient_views(batch, dy, wants_dz)
        if not (training or self.relu or batch.operands.weights is not None):
            name, views = "frozen_backward", {"x": batch.x, "dy": dy, "dx": dx}
        self._run(Step(name, batch.lay, views, numbers, batch.out is not None))
        return dx, dparams, dz

    @abstractmethod
    def adjustment_gradients(self, batch: Batch, dz: Array, saved: Array) -> tuple[Array, Array]:
        """da = dz * gamma * (x_hat * r + d) and db = dz * gamma, summed to the shapes of a and b.

        dz: the gradient of the output before its activation.
        """

    def _empty_dparams(self, batch: Batch) -> Array:
        return batch.place.empty((2, batch.lay.channels), dtypes.statistic(batch.x.dtype))

    def _gradient_views(self, batch: Batch, dy: Array, wants_dz: bool) -> tuple[dict[str, Any], Array, Array | None]:
        dx = batch.result()
        dz = batch.place.empty_like(batch.x) if wants_dz and self.relu else None
        return {"x": batch.x, "dy": dy, **batch.operands.views, "dx": dx, "dz": dz}, dx, dz

    # -- running a step ------------------------------------------------------------------------------------------------

    def _run(self, step: Step) -> None:
        views, place = step.views, place_of(step.x)
        for name in ("weights", "a", "b"):
            operand = views.get(name)
            if operand is not None and operand.shape != step.x.shape:
                views[name] = place.broadcast(operand, step.x.shape)
        if step.out:
            name = "y" if "y" in views else "dx"
            out: Any = views[name]
            inputs = [a for n, a in views.items() if a is not None and n not in _RESULTS and place.overlap(out, a)]
            same = (place.address(out), out.strides, out.dtype)
            # It may have parts of an input in other places.
            if any((place.address(a), a.strides, a.dtype) != same for a in inputs):
                beside = place.empty_like(out)
                self._run(step._replace(views=views | {name: beside}, out=False))
                place.write(out, beside, step.x.shape, tuple(range(step.x.ndim)))
                return
        if step.lay.parts:
            self._run_on_parts(step)
            return
        plan = self.plan(step)
        if plan.copied is None:
            self._launch(plan, step)
        else:
            self._run_on_copies(step, plan.copied)

    def _run_on_parts(self, step: Step) -> None:
        """The same on each part of the batch, with its columns of the small arrays."""
        steps = self.of_parts(step)
        if any(self.plan(s).copied is not None for s in steps):
            self._run_on_copies(step, Copied(*copied_parts(step.lay)))
            return
        place, lay = place_of(step.x), step.lay
        made = _MADE_OF_PARTS.get(step.name, ())
        for part, own in zip(lay.parts, steps, strict=True):
            columns = slice(part.group * lay.channels, (part.group + part.lay.groups) * lay.channels)
            theirs = {n: place.cut(a, slice(None), columns) for n, a in step.numbers.items() if n != "dparams"}
            numbers = {n: place.empty(a.shape, a.dtype) for n, a in theirs.items()}
            for name in numbers.keys() - made:
                place.put(numbers[name], theirs[name])
            if (total := step.numbers.get("dparams")) is not None:  # which all parts have in common
                numbers["dparams"] = total if part is lay.parts[0] else place.empty(total.shape, total.dtype)
            self._run(own._replace(numbers=numbers))
            for name in numbers.keys() & made:
                if name != "dparams":
                    place.put(theirs[name], numbers[name])
                elif numbers[name] is not total:
                    place.add(total, numbers[name])

    def of_parts(self, step: Step) -> list[Step]:
        """The step on each part of a batch, yet without its small arrays."""
        place = place_of(step.x)

        def views(part: Part) -> dict[str, Array | None]:
            sizes, there = part.lay.sizes, step.views.items()
            return {n: a if a is None else place.part(a, part.start, sizes, part.split(a.strides)) for n, a in there}

        return [step._replace(lay=part.lay, views=views(part), numbers={}) for part in step.lay.parts]

    def _run_on_copies(self, step: Step, copied: "Copied") -> None:
        """The same on contiguous copies, as there is no canonical view."""
        place, sizes, order = place_of(step.x), step.lay.sizes, copied.order
        there = {n: a for n, a in step.views.items() if a is not None}
        copies = {n: place.copy(a, sizes, order) for n, a in there.items() if n not in _RESULTS}
        ordered = tuple(sizes[i] for i in order)
        results = {n: place.empty(ordered, a.dtype) for n, a in there.items() if n in _RESULTS}
        self._run(step._replace(lay=copied.lay, views=step.views | copies | results, out=False))
        for name, result in results.items():
            place.write(there[name], result, sizes, order)

    def plan(self, step: Step) -> Any:
        """The plan for a step on arrays of one geometry; the input decides the order in memory."""
        key = step.name, step.lay, *self._key(step)
        found = self.plans.get(key)
        if found is None:
            if len(self.plans) >= self.force.max_plans:
                self.plans.clear()
            found = self.plans[key] = self._new_plan(step)
        return found

    @abstractmethod
    def lie_as_results(self, x: Array, beside: Sequence[Array | None]) -> bool:
        """Whether the arrays of a step that are there lie as a bound step for `x` will find them."""

    @abstractmethod
    def bind(self, step: Step, owner: Any, mask_shape: Sizes | None) -> BoundStep | None:
        """The step for other arrays like these, if it runs on them as they lie.

        owner: the variables that it is for.
        """

    @abstractmethod
    def _key(self, step: Step) -> tuple[Any, ...]:
        """What else a plan depends on."""

    @abstractmethod
    def _new_plan(self, step: Step) -> Any:
        """How the step runs. Its attribute `copied` is not None if that needs copies."""

    @abstractmethod
    def _launch(self, plan: Any, step: Step) -> None:
        """Run the step's kernels."""

    @abstractmethod
    def _run_middle(self, name: str, numbers: dict[str, Any], adjusted: bool) -> None:
        """Run a step that has small arrays only."""


class PartPlans(tuple[Any, ...]):
    """The plans for the reduction of a batch's parts."""

    def __str__(self) -> str:
        return "\n\n".join(map(str, self))


class Copied(NamedTuple):
    """The copies that a step needs: the order of the input's dimensions in them, and their layout."""

    order: Sizes
    lay: Layout


class Canonical(NamedTuple):
    """The view in which kernels get the arrays of a step.

    sizes, slices: as those of a layout.View. strides: of each array, by name. copied: the copies that must be made
    first, of which the strides are then, if any.
    """

    sizes: Sizes
    slices: int
    strides: dict[str, Sizes]
    copied: Copied | None


def canonical_view(lay: Layout, arrays: Mapping[str, Array]) -> Canonical:
    """The canonical view of some arrays."""
    copied, found = None, collapse(lay.sizes, lay.kept, [lay.split(a.strides) for a in arrays.values()])
    if found is None:
        order = copy_order(lay.sizes, lay.kept)
        sizes, kept = tuple(lay.sizes[i] for i in order), tuple(lay.kept[i] for i in order)
        copied = Copied(order, Layout(sizes, kept, lay.groups, lay.channels))
        found = collapse(sizes, kept, [contiguous_strides(sizes, a.itemsize) for a in arrays.values()])
    assert found is not None  # copy_order() chooses an order that has a view
    return Canonical(found.sizes, found.slices, dict(zip(arrays, found.strides, strict=True)), copied)
