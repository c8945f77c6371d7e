"""From arrays on a GPU to kernels: the Dispatcher's steps, one or two launches each, without waiting for any."""

import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nbbn.dispatcher import Dispatcher, canonical_view
from nbbn.gpu import schedule
from nbbn.gpu.arrays import DeviceArray, Library, wrap
from nbbn.gpu.launching import launch
from nbbn.gpu.schedule import Schedule, choose
from nbbn.kernels.cuda import steps
from nbbn.kernels.cuda.blocks import Variant
from nbbn.layout import Layout, Sizes
from nbbn.options import Options

_MAX_PLANS = 512
_NOTHING = (0,) * 5  # the view of an array that is not there
_ALIGNMENT = 16
_WRITTEN = ("y", "dx", "dresidual")
# Compute capabilities with half as much float64 as float32, or more: there, sums in float64 cost nothing beside memory.
_FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}

Array = DeviceArray


@dataclass(frozen=True)
class Plan:
    """How one step runs on arrays of one shape, dtype and memory layout."""

    shape: Sizes
    strides: dict[str, Sizes]
    copied: Sizes | None
    schedule: Schedule
    variant: Variant

    def __str__(self) -> str:
        s, v, (r0, k0, r1, k1) = self.schedule, self.variant, self.schedule.place(self.shape)
        loops = "statistics side by side" if s.rows else "values side by side"
        reduction = "by the block that applies" if s.one_launch else f"{s.chunks} chunks of each statistic"
        copied = "" if self.copied is None else f" (copied in the order of dimensions {self.copied})"
        statistic = (
            f"statistics {v.statistic.name}, sums in {'float64' if v.sums == np.float64 else 'float32, then float64'}"
        )
        return "\n".join(
            (
                f"dtype         {v.dtype.name}; {statistic}",
                f"view          R0={r0} K0={k0} R1={r1} K1={k1}{copied}",
                f"schedule      {loops}; {v.width} elements in one access; blocks of {s.block[0]}x{s.block[1]} threads",
                f"reduction     {reduction}",
            )
        )


@dataclass(frozen=True)
class Call:
    """What a step is to do.

    names: of the kernel that does everything in one launch, where there is one, then of those that take turns. arrays:
    by the names of steps.VIEWS. memory: by the places of steps. activate: with the activation. frozen: the statistics
    are constants.
    """

    names: tuple[str, ...]
    lay: Layout
    arrays: dict[str, Array | None]
    memory: dict[int, Array]
    activate: bool = True
    frozen: bool = False

    @property
    def x(self) -> Array:
        found = self.arrays["x"]
        assert found is not None
        return found


class DeviceDispatcher(Dispatcher):
    """The steps on a GPU, for one set of options: arguments and results are those of the Dispatcher, as DeviceArrays.

    The state may be updated in place (new_state=state): a stream is then the order of the training calls, and a
    captured graph of one is a training call each time that it runs.
    """

    def __init__(self, options: Options, one_launch: bool | None = None, sums: str | None = None) -> None:
        super().__init__(options)
        self.one_launch, self.sums = one_launch, sums
        self._device_plans: dict[Any, Plan] = {}
        self._device_hyper: dict[Any, Array] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return DeviceDispatcher, (self.options, self.one_launch, self.sums)

    def train(  # type: ignore[override]
        self,
        x: Array,
        params: Array,
        state: Array,
        hyper: np.ndarray,
        *,
        residual: Array | None = None,
        weights: Array | None = None,
        adjustment: tuple[Array, Array] | None = None,
        out: Array | None = None,
        new_state: Array | None = None,
        copy: Array | None = None,
        seen: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """y, the new state and saved.

        copy: what gets the parameters as they are. seen: how many batches are in the state, (2, C) float64, which makes
        the new one the average of all, each with the same weight, and is counted up; without it hyper has a momentum.
        """
        lay = self.layout(x.shape, training=True)
        y = empty_like(x) if out is None else out
        new_state = empty(x, state.shape, state.dtype) if new_state is None else new_state
        saved = empty(x, (5, lay.groups * lay.channels), np.dtype(np.float64))
        a, b = adjustment or (None, None)
        views = {"x": x, "residual": residual, "weights": weights, "a": a, "b": b, "y": y}
        memory = {
            steps.PARAMS: params,
            steps.STATE: state,
            steps.HYPER: self._hyper_on(x, hyper),
            steps.NEW_STATE: new_state,
            steps.SAVED: saved,
        }
        for place, array in ((steps.COPY, copy), (steps.SEEN, seen)):
            if array is not None:
                memory[place] = array
        self._run_step(Call(("train", "train_reduce", "normalize"), lay, views, memory), out)
        return y, new_state, saved

    def infer(  # type: ignore[override]
        self,
        x: Array,
        params: Array,
        state: Array,
        *,
        residual: Array | None = None,
        out: Array | None = None,
        activate: bool = True,
    ) -> Array:
        y = empty_like(x) if out is None else out
        lay = self.layout(x.shape, training=False)
        memory = {steps.PARAMS: params, steps.STATE: state}
        self._run_step(Call(("infer",), lay, {"x": x, "residual": residual, "y": y}, memory, activate), out)
        return y

    def backward(  # type: ignore[override]
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
        lay = self.layout(x.shape, training)
        dx = empty_like(x) if out is None else out
        dz = empty_like(x) if activated and self.options.activation else None
        dparams = empty(x, params.shape, params.dtype)
        a, b = adjustment or (None, None)
        views = {"x": x, "dy": dy, "residual": residual, "weights": weights, "a": a, "b": b, "dx": dx, "dresidual": dz}
        memory = {steps.PARAMS: params, steps.SAVED: saved, steps.DPARAMS: dparams}
        names = ("backward", "backward_reduce", "input_gradient")
        self._run_step(Call(names, lay, views, memory, frozen=not training), out)
        return dx, dparams, dy if activated and dz is None else dz

    def moments(self, x: Array, weights: Array | None = None) -> Array:  # type: ignore[override]
        """Count, mean and biased variance, and two rows more, as a (5, C) float64 array."""
        lay = self.layout(x.shape, training=False)
        saved = empty(x, (5, lay.channels), np.dtype(np.float64))
        self._run_step(Call(("moments",), lay, {"x": x, "weights": weights}, {steps.SAVED: saved}))
        return saved

    def explain(self, x: Array, training: bool) -> Plan:
        """How a call would run on `x`."""
        names = ("train" if training else "infer",)
        return self._plan(Call(names, self.layout(x.shape, training), {"x": x, "y": empty_like(x)}, {}))

    def saved_of(  # type: ignore[override]
        self, state: Array, params: Array | None = None, copy: Array | None = None
    ) -> Array:
        """What a gradient needs after inference, in whose statistics nothing is counted. copy: gets the parameters."""
        channels = state.shape[1]
        saved = empty(state, (5, channels), np.dtype(np.float64))
        addresses = [0] * steps.MEMORY_SIZE
        addresses[steps.STATE], addresses[steps.SAVED] = state.address, saved.address
        if params is not None and copy is not None:
            addresses[steps.PARAMS], addresses[steps.COPY] = params.address, copy.address
        variant = Variant(state.dtype, True, 1, state.dtype, renorm=self.options.renorm)
        threads = schedule.THREADS
        shape, grid = (1, 1, 1, channels), (1, 1, threads, 1)
        arguments = [shape, grid, tuple(addresses), channels, self.options.epsilon]
        stream, blocks = state.library.stream(state.device), -(-channels // threads)
        launch("freeze", variant, state.device, stream, blocks, (threads, 1), arguments)
        state.library.finish(state.device)
        return saved

    # -- running a step -----------------------------------------------------------------------------------------------

    def _run_step(self, call: Call, out: Array | None = None) -> None:
        """out: the result that is the caller's, which may share memory with an input."""
        x, names, lay = call.x, call.names, call.lay
        if x.size == 0:
            raise ValueError("an empty input is not for a GPU")
        if out is not None and any(_clash(out, a) for a in call.arrays.values()):
            self._run_beside(call, out)
            return
        plan = self._plan(call)
        if plan.copied is not None:
            self._run_on_copies(call, plan.copied)
            return
        schedule, shape = plan.schedule, plan.shape
        views = {name: _NOTHING if a is None else (a.address, *plan.strides[name]) for name, a in call.arrays.items()}
        addresses = [0] * steps.MEMORY_SIZE
        for place, array in call.memory.items():
            addresses[place] = array.address
        stream = x.library.stream(x.device)
        scratch = None if names == ("infer",) else self._scratch(x, plan, lay, addresses, stream)
        for name in self._launches(names, schedule):
            grid = schedule.apply if name in ("infer", "normalize", "input_gradient") else schedule.reduce
            blocks = schedule.families if name in ("train", "backward") else schedule.blocks(shape, grid)
            arguments: list[Any] = [views[v] for v in steps.VIEWS[name]]
            arguments += [shape, grid, tuple(addresses), lay.channels, self.options.epsilon]
            launch(name, plan.variant, x.device, stream, blocks, schedule.block, arguments)
        x.library.finish(x.device)
        del scratch  # not before the launches are queued

    def _launches(self, names: tuple[str, ...], schedule: Schedule) -> tuple[str, ...]:
        if len(names) == 1:
            return names
        return names[:1] if schedule.one_launch else names[1:]

    def _scratch(self, x: Array, plan: Plan, lay: Layout, addresses: list[int], stream: int) -> Any:
        """Memory for what the launches of a step tell each other; its places are written to `addresses`."""
        statistics = lay.groups * lay.channels
        sums = 4 * plan.schedule.chunks * statistics * 8
        sizes = {steps.PARTIAL: sums, steps.SHIFTS: statistics * 8, steps.COEFFICIENTS: 5 * statistics * 8}
        if addresses[steps.COPY] == 0:
            sizes[steps.COPY] = 2 * lay.channels * 8
        total = sum(-(-n // _ALIGNMENT) * _ALIGNMENT for n in sizes.values())
        memory = empty(x, (total,), np.dtype(np.uint8))
        address = memory.address
        for place, size in sizes.items():
            addresses[place] = address
            address += -(-size // _ALIGNMENT) * _ALIGNMENT
        addresses[steps.COUNTERS] = _counters(x.library, x.device, stream, plan.schedule.families)
        return memory

    def _run_beside(self, call: Call, out: Array) -> None:
        """The same with a result in memory of its own, as `out` has parts of an input in other places."""
        beside = empty(out, out.shape, out.dtype)
        self._run_step(replace(call, arrays={name: beside if a is out else a for name, a in call.arrays.items()}))
        out.library.assign(out, out.shape, tuple(range(out.ndim)), beside.owner)

    def _run_on_copies(self, call: Call, order: Sizes) -> None:
        """The same on contiguous copies, as there is no canonical view."""
        lay = call.lay
        sizes, kept = tuple(lay.sizes[i] for i in order), tuple(lay.kept[i] for i in order)
        copies: dict[str, Array | None] = {}
        for name, a in call.arrays.items():
            if a is None:
                copies[name] = None
            elif name in _WRITTEN:
                copies[name] = empty(a, sizes, a.dtype)
            else:
                copies[name] = wrap(a.library.copy(a, lay.sizes, order), a.library)
        self._run_step(replace(call, lay=Layout(sizes, kept, lay.groups, lay.channels), arrays=copies))
        for name in set(_WRITTEN) & set(copies):
            target, copy = call.arrays[name], copies[name]
            if target is not None and copy is not None:
                target.library.assign(target, lay.sizes, order, copy.owner)

    def _plan(self, call: Call) -> Plan:
        there = {name: a for name, a in call.arrays.items() if a is not None}
        x, lay = call.x, call.lay
        alignment = tuple(a.address % _ALIGNMENT for a in there.values())
        key: tuple[Any, ...] = (call.names, lay.sizes, lay.kept, lay.groups, x.dtype, x.device, alignment)
        key += (
            call.activate,
            call.frozen,
            steps.SEEN in call.memory,
            *((name, a.strides) for name, a in there.items()),
        )
        found = self._device_plans.get(key)
        if found is None:
            if len(self._device_plans) >= _MAX_PLANS:
                self._device_plans.clear()
            found = self._device_plans[key] = self._new_device_plan(call, there)
        return found

    def _new_device_plan(self, call: Call, there: dict[str, Array]) -> Plan:
        lay = call.lay
        shape, strides, copied = canonical_view(lay, list(there.values()))
        found = dict(zip(there, strides, strict=True))
        x = there["x"]
        places = [(a.address, found[name], a.itemsize) for name, a in there.items()]
        schedule = choose(shape, lay.groups, x.itemsize, places, self.one_launch)
        variant = Variant(
            dtype=x.dtype,
            rows=schedule.rows,
            short=schedule.swapped and not schedule.rows,
            width=schedule.width,
            sums=self._sums(x),
            weights="weights" in there,
            adjustment="a" in there,
            residual="residual" in there,
            relu=self.options.activation == "relu" and call.activate,
            renorm=self.options.renorm,
            cumulative=steps.SEEN in call.memory,
            dresidual="dresidual" in there,
            frozen=call.frozen,
        )
        placed = {name: schedule.place(s) for name, s in found.items()}
        return Plan(schedule.place(shape), placed, copied, schedule, variant)

    def _sums(self, x: Array) -> np.dtype:
        if self.sums is not None:
            return np.dtype(self.sums)
        return np.dtype(np.float64 if x.itemsize == 8 or _has_fast_float64(x.device) else np.float32)

    def _hyper_on(self, x: Array, hyper: np.ndarray) -> Array:
        """The numbers that the channel stage reads, copied to the device when they are new."""
        key = x.library, x.device, hyper.tobytes()
        found = self._device_hyper.get(key)
        if found is None:
            if len(self._device_hyper) >= _MAX_PLANS:
                self._device_hyper.clear()
            found = self._device_hyper[key] = wrap(x.library.from_host(hyper, x.device), x.library)
        return found


def _clash(a: Array | None, b: Array | None) -> bool:
    """Whether two arrays share memory, but not element by element."""
    if a is None or b is None or not a.overlaps(b):
        return False
    return (a.address, a.strides, a.dtype) != (b.address, b.strides, b.dtype)


def empty(like: Array, shape: Sizes, dtype: np.dtype) -> Array:
    return wrap(like.library.empty(shape, dtype, like.device), like.library)


def empty_like(x: Array) -> Array:
    return wrap(x.library.empty_like(x.owner), x.library)


_STREAMS = 64  # that have counters from the start
_all_counters: dict[Any, list[Array]] = {}
_places: dict[Any, int] = {}
_counting = threading.Lock()


def _counters(library: Library, device: int, stream: int, count: int) -> int:
    """The address of zeros for the blocks of a stream's kernels to count themselves, which leave zeros behind.

    A device's first call makes them for many streams: a graph is captured in a stream of its own, and meanwhile no
    memory can be had. They are never given back, as a kernel may still be running.
    """
    with _counting:
        place = _places.setdefault((device, stream), len(_places))
        arrays = _all_counters.setdefault((library, device), [])
        size = arrays[-1].shape[1] if arrays else 0
        if size < count or arrays[-1].shape[0] <= place:
            shape = max(_STREAMS, 2 * place), max(4096, size, 2 * count)
            arrays.append(wrap(library.from_host(np.zeros(shape, np.int32), device), library))
        return arrays[-1].address + place * arrays[-1].strides[0]


def _has_fast_float64(device: int) -> bool:
    from numba import cuda

    from nbbn.kernels.cuda.target import SIMULATED

    return SIMULATED or cuda.gpus[device].compute_capability in _FAST_FLOAT64
