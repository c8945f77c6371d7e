"""How one step runs on arrays of one shape, dtype and memory layout: which kernel, on which views."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from nbbn import dtypes
from nbbn.kernels.cpu.memory import STREAMED
from nbbn.kernels.cpu.steps import Step, compiled
from nbbn.kernels.tasks import STORE
from nbbn.layout import Sizes
from nbbn.runtime import parallel_region, thread_limit
from nbbn.schedule import Schedule

Array = np.ndarray


@dataclass
class Plan:
    step: str
    dtype: np.dtype
    view: Sizes
    strides: list[Sizes | None]  # per array, of its canonical view; None where that is a reshape
    contiguous: bool  # whether the arrays of `dtype` are, in that view
    copied: Sizes | None  # the order of dimensions of contiguous copies, where no canonical view exists
    schedule: Schedule
    absent: tuple[int, ...]  # the positions of the arguments that are None
    carrier: np.dtype | None = field(init=False)  # what the arrays of `dtype` are viewed as
    _kernels: dict[bool, Step] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        carrier = dtypes.carrier(self.dtype)
        self.carrier = None if carrier is self.dtype else carrier

    @property
    def parallel(self) -> bool:
        return self.schedule.parallel

    def variant(self, parallel: bool) -> tuple[Any, ...]:
        """What compiled() is to be asked for."""
        types = dtypes.carrier(self.dtype), dtypes.statistic(self.dtype)
        s = self.schedule
        return self.step, s.loops, s.one_pass, parallel, *types, self.contiguous, self.absent

    def kernel(self, parallel: bool) -> Step:
        if parallel not in self._kernels:
            self._kernels[parallel] = compiled(*self.variant(parallel))
        return self._kernels[parallel]

    def run(self, *arguments: Any) -> None:
        if self.schedule.parallel:
            elements = math.prod(self.view) if True in self._kernels else None  # that call compiles
            with parallel_region(elements) as granted:
                self.kernel(granted)(*arguments)
        else:
            self.kernel(False)(*arguments)

    def views(self, arrays: Sequence[Array | None], outputs: int) -> list[Array | None]:
        """The arrays, of which the last ones are written, in the shape and carrier dtype of the kernels."""
        shape, last = self.schedule.shape, len(arrays) - outputs
        views: list[Array | None] = []
        for i, array in enumerate(arrays):
            if array is None:
                views.append(None)
                continue
            if self.carrier is not None and array.dtype == self.dtype:
                array = array.view(self.carrier)
            strides = self.strides[i]
            if strides is None:
                views.append(array.reshape(shape))
            else:
                views.append(as_strided(array, shape, strides[: len(shape)], writeable=i >= last))
        return views

    def __str__(self) -> str:
        r0, k0, r1, k1 = self.view
        s = self.schedule
        values, chunks = s.values
        memory = "contiguous" if self.contiguous else "strided, read in place"
        if self.copied is not None:
            memory = f"no canonical view: copied in the order of dimensions {self.copied}"
        passes = "one, tile by tile" if s.one_pass else "two" if self.step in ("train", "backward") else "one"
        store = "past the caches" if s.grid[STORE] == STREAMED else "through the caches"
        return "\n".join(
            (
                f"step          {self.step}",
                f"dtype         {self.dtype.name}; statistics {dtypes.statistic(self.dtype).name}, sums in float64",
                f"view          R0={r0} K0={k0} R1={r1} K1={k1} ({memory})",
                f"schedule      {s.loops} {'x'.join(map(str, s.shape))}; passes: {passes}; results written {store}",
                f"chunks        {chunks} of {-(-values // chunks)} of {values} values",
                f"threads       {f'up to {thread_limit()}' if s.parallel else '1'}",
            )
        )
