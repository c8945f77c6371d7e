"""How one step runs on arrays of one shape, dtype and memory layout: which kernel, on which views."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from nbbn.core import dtypes
from nbbn.core.layout import Sizes
from nbbn.engine.base import Copied
from nbbn.engine.cpu.schedule import Schedule
from nbbn.kernels.cpu.compiling import ARGUMENTS, compiled, names_of
from nbbn.kernels.cpu.steps import Step
from nbbn.runtime import PLAIN, entry_point, limit_in_words, region, thread_limit

Array = np.ndarray
OPERANDS = ("weights", "a", "b")  # have the statistics' dtype; all other views have the input's
_FLOAT64, _INT64 = np.dtype(np.float64), np.dtype(np.int64)


def check_arrays(arrays: Mapping[str, Any], dtype: np.dtype, state: np.dtype) -> None:
    """Kernels take the memory of their arrays as it is, by the names of their arguments.

    Raises: TypeError for what is no NumPy array, and for a dtype, ValueError for an order in memory, that a kernel for
        inputs of `dtype` would misread.
    """
    known = {"X": dtype, "S": dtypes.statistic(dtype), "t": state, "d": _FLOAT64, "i": _INT64}
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{name} must be a NumPy array; received {type(array).__name__}")
        kind = ARGUMENTS[name]
        expected = known[kind] if kind in known else known["S" if kind[0] == "s" else kind[0]]
        if array.dtype != expected:
            raise TypeError(f"{name} must have dtype {expected.name}; received {array.dtype.name}")
        if kind in ("X", "S"):
            continue
        # Kernels find a row of parameters or of the state by its stride: rows may lie apart.
        followed = array[0] if kind in ("s2", "t2") else array
        if not (followed.flags.c_contiguous and array.flags.aligned):
            raise ValueError(f"{name} must be C-contiguous and aligned; received strides {array.strides}")


def _as_it_is(array: Array) -> Array:
    return array


def _in_carrier(in_shape: Callable[[Array], Array], carrier: np.dtype, array: Array) -> Array:
    return in_shape(array.view(carrier))


@dataclass
class Plan:
    """state: the dtype of the state. strides: by name, of each array's canonical view; None where that is a reshape.
    transposed: sizes and an order of dimensions that lead to that view without a copy; None where there are none.
    contiguous: whether the arrays of `dtype` are, in that view. constants: the arguments that are the same in every
    call; None for what is not there.
    """

    step: str
    dtype: np.dtype
    state: np.dtype
    view: Sizes
    strides: dict[str, Sizes | None]
    transposed: tuple[Sizes, Sizes] | None
    contiguous: bool
    copied: Copied | None
    schedule: Schedule
    constants: dict[str, Any]
    carrier: np.dtype | None = field(init=False)  # what the arrays of `dtype` are viewed as
    names: tuple[str, ...] = field(init=False)
    elements: int = field(init=False)
    _compiled: Step | None = field(init=False, default=None, repr=False)
    _views: dict[str, Callable[[Array], Array]] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        carrier = dtypes.carrier(self.dtype)
        self.carrier = None if PLAIN or carrier is self.dtype else carrier  # plain Python needs no stand-in
        self.names, self.elements = names_of(self.step), math.prod(self.view)

    def variant(self) -> tuple[Any, ...]:
        """What compiled() is to be asked for."""
        types = dtypes.carrier(self.dtype), dtypes.statistic(self.dtype), self.state
        s, absent = self.schedule, frozenset(name for name, value in self.constants.items() if value is None)
        return self.step, s.loops, s.one_pass, *types, self.contiguous, absent

    def kernel(self) -> Step:
        return compiled(*self.variant())

    def run(self, views: Mapping[str, Array | None], numbers: Mapping[str, Any]) -> None:
        """Run the step. views: arrays of the input's shape; numbers: the small arrays. Raises: see check_arrays()."""
        there = {name: array for name, array in views.items() if array is not None}
        check_arrays({**numbers, **there}, self.dtype, self.state)
        arguments = {**self.constants, **numbers, **{n: self.view_of(n)(a) for n, a in there.items()}}
        given = [arguments[name] for name in self.names[1:]]  # all but the pool
        self._shared(*given) if self.schedule.parallel else self._entry()(0, *given)

    def bind(self, constants: Mapping[str, Any], given: tuple[str, ...]) -> Callable[..., None]:
        """The step as a function of the arguments `given`, in that order; the others are the constants.

        It does not look at the types of its arguments, which have to be those of the calls that the plan is for.

        Raises: TypeError unless `given` are the step's last arguments.
        """
        first = len(self.names) - len(given)
        if self.names[first:] != given:
            raise TypeError(f"{self.step} ends with the arguments {self.names[first:]}; received {given}")
        known = {**self.constants, **constants}
        bound = [known[name] for name in self.names[1:first]]
        return partial(self._shared, *bound) if self.schedule.parallel else partial(self._entry(), 0, *bound)

    def view_of_weights(self) -> Callable[[Array], Array]:
        """What makes the canonical view of contiguous weights, which have size 1 where they are the same for all."""
        shape, strides = self.schedule.shape, self.strides["weights"]
        if strides is None:
            return lambda weights: weights.reshape(shape)
        steps = strides[: len(shape)]
        return lambda weights: np.ndarray(shape, weights.dtype, weights, strides=steps)

    def _entry(self) -> Step:
        if self._compiled is None:
            self._compiled = entry_point(self.kernel())
        return self._compiled

    def _shared(self, *arguments: Any) -> None:
        """Run the step with the threads of the pool, if that is free."""
        run = self._compiled or self._entry()
        for pool in region(self.elements):
            run(pool, *arguments)

    def view_of(self, name: str) -> Callable[[Array], Array]:
        """What brings an array that is there into the shape and carrier dtype of the kernels."""
        found = self._views.get(name)
        if found is None:
            found, carrier = self._in_shape(name), self.carrier
            if name not in OPERANDS and self.contiguous and not PLAIN:
                found = _as_it_is  # its memory is what the kernel takes
            elif name not in OPERANDS and carrier is not None:
                found = partial(_in_carrier, found, carrier)
            self._views[name] = found
        return found

    def _in_shape(self, name: str) -> Callable[[Array], Array]:
        shape, strides = self.schedule.shape, self.strides[name]
        if strides is None:
            return lambda array: array.reshape(shape)
        if self.transposed is not None:  # as_strided() takes ten times as long
            sizes, order = self.transposed
            return lambda array: array.reshape(sizes).transpose(order).reshape(shape)
        own = strides[: len(shape)]  # of what is only read
        return lambda array: as_strided(array, shape, own, writeable=False)

    def _threads(self) -> str:
        if thread_limit() == 1:
            return limit_in_words()
        return f"{'up to' if self.schedule.parallel else '1; with more work up to'} {limit_in_words()}"

    def __str__(self) -> str:
        r0, k0, r1, k1 = self.view
        s, apart = self.schedule, self.schedule.grid.r0_apart
        slices = f" ({r0 // apart} slices)" if apart else ""
        values, chunks = s.values
        memory = "contiguous" if self.contiguous else "strided, read in place"
        if self.copied is not None:
            memory = f"no canonical view: copied in the order of dimensions {self.copied.order}"
        passes = "one, tile by tile" if s.one_pass else "two" if self.step in ("train", "backward") else "one"
        store = "past the caches" if s.grid.streamed else "through the caches"
        return "\n".join(
            (
                f"step          {self.step}",
                f"dtype         {self.dtype.name}; statistics {dtypes.statistic(self.dtype).name}, sums in float64",
                f"view          R0={r0}{slices} K0={k0} R1={r1} K1={k1} ({memory})",
                f"schedule      {s.loops} {'x'.join(map(str, s.shape))}; passes: {passes}; results written {store}",
                f"chunks        {chunks} of {-(-values // chunks)} of {values} values",
                f"threads       {self._threads()}",
            )
        )
