"""Engines and dispatchers that show which way a call has taken, and kernels that cost nothing."""

import hashlib
from dataclasses import fields
from types import SimpleNamespace

import numpy as np

from nbbn import Dispatcher
from nbbn.engine.cpu.engine import CpuEngine
from nbbn.engine.cpu.plan import Plan
from nbbn.kernels.cpu.compiling import WRITES, names_of


class Forgetful(Dispatcher):
    """Never keeps a bound step: every call is a first one."""

    def bind(self, *args):
        pass


class CountingEngine(CpuEngine):
    """Notes the steps that were found and run in the general way."""

    def __init__(self, options, force):
        super().__init__(options, force)
        self.steps = []

    def _launch(self, plan, step):
        self.steps.append(step.name)
        super()._launch(plan, step)


def watch(layer, kind=CountingEngine):
    """The names of the steps that `layer` runs in the general way from now on; call it before the first call."""
    dispatcher = layer._dispatcher
    engine = kind(dispatcher.options, dispatcher.force)
    dispatcher.use(engine)
    return engine.steps


def forgetful(layer):
    """Make a layer one that never takes the short way; returns it."""
    layer._dispatcher = Forgetful(layer.options, layer._dispatcher.force)
    return layer


# -- kernels that cost nothing ----------------------------------------------------------------------------------------


class ImaginedEngine(CountingEngine):
    """Runs functions in the place of kernels, which would have to be compiled: thousands of them, for all options.

    What such a function writes is random and depends on every bit that it is given, and on which kernel it stands for.
    So two calls have equal results if they run the same kernels with the same arguments, and only then. What a kernel
    could not take, or would get wrong, is an error.
    """

    def _new_plan(self, step):
        plan = super()._new_plan(step)
        return ImaginedPlan(**{f.name: getattr(plan, f.name) for f in fields(Plan) if f.init})

    def _run_middle(self, name, numbers, adjusted):
        variant, arguments = self.middle(name, numbers, adjusted)
        imagined(variant)(*arguments)


class ImaginedPlan(Plan):
    def kernel(self):
        return imagined(self.variant())


def imagined(variant):
    """The function for what compiled(*variant) is, with as much of its face as nbbn needs."""
    step = variant[0]
    names, written = names_of(step), WRITES[step]
    parts = [sorted(part) if isinstance(part, frozenset) else part for part in variant]

    def kernel(*arguments):
        given = dict(zip(names, arguments, strict=True))
        _check(given, written)
        digest = hashlib.blake2b(repr(parts).encode())
        for name, value in given.items():
            if name == "pool":  # whoever computes them, results are the same
                continue
            if isinstance(value, np.ndarray):
                digest.update(f"{name} {value.shape} {value.dtype}".encode())
                value = b"" if name in written else value.tobytes()
            digest.update(value if isinstance(value, bytes) else f"{name} {value}".encode())
        rng = np.random.default_rng(int.from_bytes(digest.digest()[:8], "little"))
        for target in (given[name] for name in sorted(written) if given[name] is not None):
            target[...] = _random(rng, target)

    kernel.overloads = {None: SimpleNamespace(entry_point=kernel)}
    return kernel


def _check(given, written):
    """Memory is aligned; a result is written where something is read only if both are the same elements."""
    arrays = {name: value for name, value in given.items() if isinstance(value, np.ndarray)}
    for name, array in arrays.items():
        if not array.flags.aligned:
            raise TypeError(f"{name} is not aligned")
        for result in written & arrays.keys() - {name}:
            target = arrays[result]
            same = array.ctypes.data == target.ctypes.data and array.strides == target.strides
            if np.may_share_memory(array, target) and (name in written or not same):
                raise TypeError(f"{result} overlaps {name}")


def _random(rng, like):
    """Numbers from 0 to 1, as the kernels' arrays hold them: in strided views 16-bit floats are integers."""
    if like.dtype == np.uint16:
        return rng.random(like.shape, np.float32).astype(np.float16).view(np.uint16)
    if like.dtype == np.int16:
        return rng.integers(0x3C00, 0x3F80, like.shape, np.int16)
    if like.dtype.itemsize == 2:
        return rng.random(like.shape, np.float32).astype(like.dtype)
    return rng.random(like.shape, like.dtype)
