"""The stages on NumPy arrays."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nbbn.core.layout import Sizes, is_contiguous, sequences_view, steps_dimension, strides_of_results
from nbbn.core.options import Options
from nbbn.engine.base import Batch, Canonical, Engine, Force, Step, canonical_view
from nbbn.engine.cpu import adjustment
from nbbn.engine.cpu.bound import LAST_ARGUMENTS, BoundStep, StridedStep
from nbbn.engine.cpu.plan import OPERANDS, Plan, check_arrays
from nbbn.engine.cpu.schedule import Thresholds, choose, of_whole_samples
from nbbn.kernels.channel import MOMENT_ROWS
from nbbn.kernels.cpu.compiling import compiled, names_of
from nbbn.runtime import PLAIN, entry_point


class CpuEngine(Engine):
    def __init__(self, options: Options, force: Force) -> None:
        super().__init__(options, force)
        self._thresholds = Thresholds(**force.thresholds)

    def lie_as_results(self, x: np.ndarray, beside: Sequence[np.ndarray | None]) -> bool:
        strides = strides_of_results(x.shape, x.strides, x.itemsize)
        dense = x.flags.c_contiguous
        return all(a is None or a.strides == strides or (dense and a.flags.c_contiguous) for a in beside)

    def bind(self, step: Step, owner: Any, mask_shape: Sizes | None) -> BoundStep | None:
        """The step for other arrays like these, if it runs on them as they lie."""
        plan: Plan = self.plan(step)
        if plan.copied is not None:
            return None
        if all(s is None for n, s in plan.strides.items() if n != "weights"):
            return BoundStep(plan, step, owner, mask_shape)
        return None if PLAIN else StridedStep(plan, step, owner, mask_shape)

    def on_memory(self, step: Step) -> Callable[..., None] | None:
        """The step as a function of memory, see Dispatcher.on_memory()."""
        plan: Plan = self.plan(step)
        if PLAIN or plan.copied is not None or not plan.contiguous:
            return None
        return plan.bind(step.numbers, LAST_ARGUMENTS[step.name])

    def reduce_sequences(self, batch: Batch, lengths: np.ndarray) -> np.ndarray | None:
        """The moments of a batch without groups of which the first `lengths` (N,) steps of each sample count, and are
        read; None where no view has the steps of a sample together."""
        x, lay = batch.x, batch.lay
        found = sequences_view(lay.sizes, lay.kept, x.strides)
        if found is None:
            return None
        moments = np.zeros((MOMENT_ROWS, lay.statistics))
        if lengths.any():
            inner = found[0][2] // lay.sizes[steps_dimension(lay.kept)]
            self._run(Step("reduce_sequences", lay, {"x": x}, {"ends": lengths * inner, "moments": moments}))
        return moments

    def adjustment_gradients(self, batch: Batch, dz: np.ndarray, saved: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return adjustment.gradients(batch, dz, saved)

    def _key(self, step: Step) -> tuple[Any, ...]:
        return step.x.dtype, step.state_dtype, *[None if a is None else a.strides for a in step.views.values()]

    def _new_plan(self, step: Step) -> Plan:
        there = {name: a for name, a in step.views.items() if a is not None}
        view, slices, strides, copied = _view(step, there)
        dense = {name: is_contiguous(view, strides[name], a.itemsize) for name, a in there.items()}
        reshaped = {n: dense[n] and (copied is not None or a.flags.c_contiguous) for n, a in there.items()}
        of_sequences, thresholds = step.name == "reduce_sequences", self._thresholds
        if of_sequences:  # of which R1 counts the steps, and a row has no more of
            thresholds = thresholds._replace(short_plane=0, short_block=0)
        data = [name for name in there if name not in OPERANDS]
        contiguous = all(dense[name] for name in data)
        schedule = choose(
            step.name,
            view,
            slices,
            step.lay.groups,
            step.x.itemsize,
            len(data),
            contiguous=contiguous,
            foldable=all(reshaped.values()) and len(data) == len(there),
            thresholds=thresholds,
            loops=self.force.schedule,
            parallel=self.force.parallel,
            one_pass=self.force.one_pass,
        )
        if of_sequences:
            schedule = of_whole_samples(schedule)
        return Plan(
            step=step.name,
            dtype=step.x.dtype,
            state=step.state_dtype,
            view=view,
            strides={name: None if reshaped[name] else strides[name] for name in there},
            transposed=None if of_sequences or copied is not None else _transposed(step),
            contiguous=contiguous,
            copied=copied,
            schedule=schedule,
            constants={
                **self._constants(step.name),
                **{n: None for n in step.views if n not in there},
                "grid": np.array(schedule.grid, np.int64),
            },
        )

    def _constants(self, name: str) -> dict[str, Any]:
        """The flags among the arguments of a step."""
        flags = {"relu": self.relu, "renorm": self.renorm, "debias": self.debias, "skip": self.skip}
        return {n: flags[n] for n in names_of(name) if n in flags}

    def _launch(self, plan: Plan, step: Step) -> None:
        plan.run(step.views, step.numbers)

    def middle(self, name: str, numbers: dict[str, Any], adjusted: bool) -> tuple[tuple[Any, ...], list[Any]]:
        """What compiled() is to be asked for, and the arguments, of a step that has small arrays only."""
        arguments = {"adjusted": True if adjusted else None, **self._constants(name), **numbers}
        names, dtype = names_of(name), numbers["params"].dtype
        state = numbers["state"].dtype
        absent = frozenset(n for n in names if arguments[n] is None)
        return (name, "planes", False, dtype, dtype, state, True, absent), [arguments[n] for n in names]

    def _run_middle(self, name: str, numbers: dict[str, Any], adjusted: bool) -> None:
        check_arrays(numbers, numbers["params"].dtype, numbers["state"].dtype)
        variant, arguments = self.middle(name, numbers, adjusted)
        entry_point(compiled(*variant))(*arguments)


def _view(step: Step, there: dict[str, Any]) -> Canonical:
    if step.name != "reduce_sequences":
        return canonical_view(step.lay, there)
    found = sequences_view(step.lay.sizes, step.lay.kept, step.x.strides)
    assert found is not None  # reduce_sequences() has asked
    return Canonical(found[0], 1, {"x": found[1]}, None)


def _transposed(step: Step) -> tuple[Sizes, Sizes]:
    """The sizes and the order of dimensions of which the canonical view is a reshape: see layout.collapse()."""
    apart = step.lay.split(step.x.strides)
    return step.lay.sizes, tuple(sorted(range(len(apart)), key=lambda i: -abs(apart[i])))
