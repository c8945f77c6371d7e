"""The stages on arrays of a GPU, one or two launches each, without waiting for any."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from nbbn.arrays import availability, moving
from nbbn.arrays.device import DeviceArray, wrap
from nbbn.core.layout import Sizes, strides_of_results
from nbbn.core.options import Options
from nbbn.engine.base import Batch, Engine, Force, Step, canonical_view
from nbbn.engine.cuda import adjustment
from nbbn.engine.cuda.bound import BoundStep
from nbbn.engine.cuda.plan import ALIGNMENT, Plan, over_channels, plan_of
from nbbn.engine.cuda.schedule import Thresholds, choose
from nbbn.kernels.cuda import steps
from nbbn.kernels.cuda.blocks import Variant
from nbbn.kernels.cuda.memory import VECTOR_BYTES
from nbbn.streams.driver import primary_context

_BYTES = np.dtype(np.uint8)
_NARROW = 1 << 30  # sizes and strides below it leave room in 32 bits for what a block reads beyond the end
MAX_KEPT = 32  # numbers of steps that stay on the device
Array = DeviceArray


class CudaEngine(Engine):
    """Raises: RuntimeError where there is no GPU; ValueError for a forced choice that a GPU does not have."""

    def __init__(self, options: Options, force: Force) -> None:
        availability.require("an array on a GPU")
        for choice in ("parallel", "schedule"):
            if getattr(force, choice) is not None:
                raise ValueError(f"{choice} cannot be forced on a GPU; received {getattr(force, choice)!r}")
        super().__init__(options, force)
        thresholds = dict(force.thresholds)
        self._sums = thresholds.pop("sums", None)  # the dtype of the sums of a few elements
        self._thresholds = Thresholds(**thresholds)
        self._hyper: dict[Any, Array] = {}

    def adjustment_gradients(self, batch: Batch, dz: Array, saved: Array) -> tuple[Array, Array]:
        return adjustment.gradients(batch, dz, saved, self._thresholds)

    def _key(self, step: Step) -> tuple[Any, ...]:
        x, there = step.x, [(name, a) for name, a in step.views.items() if a is not None]
        elements = VECTOR_BYTES // x.itemsize  # of one access, at most; of float32 beside float16 they are 32 bytes
        places = [(n, a.strides, a.address % (elements * a.itemsize)) for n, a in there]
        return x.dtype, step.state_dtype, x.device, *places

    def _new_plan(self, step: Step) -> Plan:
        there: dict[str, Array] = {name: a for name, a in step.views.items() if a is not None}
        x, canonical = step.x, canonical_view(step.lay, there)
        (r0, k0, r1, k1), slices, strides, _ = canonical
        view = (r0 // slices, slices * k0, r1, k1)
        places = [(a.address, strides[name], a.itemsize) for name, a in there.items()]
        one = self.force.one_pass if step.name in ("train", "backward", "frozen_backward") else False
        schedule = choose(view, slices, step.lay.groups, x.itemsize, places, self._thresholds, one)
        sums: Any = np.float64 if x.itemsize == 8 else np.float32
        variant = Variant(
            dtype=x.dtype,
            rows=schedule.rows,
            short=schedule.swapped and not schedule.rows,
            width=schedule.width,
            sums=np.dtype(sums if self._sums is None else self._sums),
            threads=self._thresholds.threads,
            state=step.state_dtype,
            weights="weights" in there,
            adjustment="a" in there,
            residual="residual" in there,
            relu=self.relu is not None,
            renorm=self.options.renorm,
            debias=self.debias is not None,
            skip=self.options.skip_nonfinite,
            dz="dz" in there,
            frozen=step.name == "frozen_backward",
            wide=any(abs(n) >= _NARROW for sizes in ((r0, *view), *strides.values()) for n in sizes),
        )
        return plan_of(step, view, canonical, schedule, variant, self.options.epsilon)

    def lie_as_results(self, x: Array, beside: Sequence[Array | None]) -> bool:
        """So must the input: what a library makes of its order is known where its elements lie side by side."""
        strides = strides_of_results(x.shape, x.strides, x.itemsize)
        return all(a is None or (a.strides == strides and a.address % ALIGNMENT == 0) for a in (x, *beside))

    def bind(self, step: Step, owner: Any, mask_shape: Sizes | None) -> BoundStep | None:
        plan: Plan = self.plan(step)
        # A step that reads numbers of the host has just run: they are here, or have been there for one call alone.
        hyper = None if step.name == "backward" else self._hyper.get(self._hyper_key(step.x, step.numbers["hyper"]))
        if plan.copied is not None or (hyper is None and step.name != "backward"):
            return None
        return BoundStep(plan, step, owner, hyper)

    def _launch(self, plan: Plan, step: Step) -> None:
        x, addresses, scratch = step.x, self._addresses(step.x, step.numbers), None
        if plan.scratch is not None:
            scratch = x.library.empty((plan.scratch.size,), _BYTES, x.device)
            first = x.library.address(scratch)
            addresses |= {name: first + place for name, place in plan.scratch.parts.items()}
        views = {name: a.address for name, a in step.views.items() if a is not None}
        plan.queue(x.library.stream(x.device), views, tuple(addresses.values()))
        x.library.finish(x.device)
        del scratch  # not before the launches are queued

    def _run_middle(self, name: str, numbers: dict[str, Any], adjusted: bool) -> None:
        like, statistics = numbers["params"], numbers["saved"].shape[1]
        channels = like.shape[1]
        variant = Variant(
            dtype=like.dtype,
            rows=True,
            width=1,
            sums=like.dtype,
            threads=self._thresholds.threads,
            state=numbers["state"].dtype,
            adjustment=adjusted,
            renorm=self.options.renorm,
            debias=self.debias is not None,
            skip=self.options.skip_nonfinite,
        )
        self._run_over_channels(name, variant, like, numbers, channels, statistics)

    def merge_moments(self, parts: Array) -> Array:
        """The moments (4, S) of several inputs together: (P, 4, S), merged in their order."""
        return self._merged("merge_moments", parts, "moments")

    def add_sums(self, parts: Array) -> Array:
        """The sums (R, S) of the gradient, likewise."""
        return self._merged("add_sums", parts, "sums")

    def _merged(self, name: str, parts: Array, result: str) -> Array:
        count, rows, statistics = parts.shape
        found = wrap(parts.library.empty((rows, statistics), parts.dtype, parts.device), parts.library)
        dtype, threads, adjusted = parts.dtype, self._thresholds.threads, rows > 2  # as sums have them then
        variant = Variant(dtype, rows=True, width=1, sums=dtype, threads=threads, adjustment=adjusted)
        numbers = {"partial": parts, result: found}
        self._run_over_channels(name, variant, parts, numbers, statistics, statistics, count)
        return found

    def _run_over_channels(
        self,
        name: str,
        variant: Variant,
        like: Array,
        numbers: dict[str, Any],
        channels: int,
        statistics: int,
        parts: int = 1,
    ) -> None:
        if channels == 0:  # a grid has a block at least
            return
        launch = over_channels(name, variant, like.device, channels, statistics, self.options.epsilon, parts)
        memory = tuple(self._addresses(like, numbers).values())
        with primary_context(like.device):
            launch.run(like.library.stream(like.device), {}, memory)
        like.library.finish(like.device)

    def _addresses(self, like: Array, numbers: dict[str, Any]) -> dict[str, int]:
        """Of the small arrays, by their names in steps.MEMORY; 0 for what is not there. hyper may be on the host."""
        addresses = dict.fromkeys(steps.MEMORY, 0)
        for name, array in numbers.items():
            if isinstance(array, np.ndarray):
                array = numbers[name] = self._hyper_on(like, array)  # which is there until the launches are queued
            addresses[name] = array.address
        if addresses["coefficients"] % ALIGNMENT:
            raise ValueError(
                f"coefficients must lie at a multiple of {ALIGNMENT} bytes, as an array does that a library has made; "
                f"received the address {addresses['coefficients']}"
            )
        if not addresses["moments"]:
            addresses["moments"] = addresses["saved"]  # which begins with them
        return addresses

    def _hyper_on(self, like: Array, hyper: np.ndarray) -> Array:
        """The numbers that the middle stage reads. The first ones are copied and kept for every stream, which waits.
        Where there are always others, as of a schedule, each goes with a launch in the stream of its call."""
        key = self._hyper_key(like, hyper)
        found = self._hyper.get(key)
        if found is None:
            if len(self._hyper) < MAX_KEPT:
                found = self._hyper[key] = wrap(like.library.from_host(hyper, like.device), like.library)
            else:
                found = wrap(like.library.empty(hyper.shape, hyper.dtype, like.device), like.library)
                moving.numbers(hyper, found)
        return found

    def _hyper_key(self, like: Array, hyper: np.ndarray) -> tuple[Any, ...]:
        return like.library, like.device, hyper.tobytes()
