"""Several training calls of modules that count as one batch."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nbbn.accumulation import Accumulation
from nbbn.arrays import place_of
from nbbn.core.options import Numbers
from nbbn.engine.dispatcher import Dispatcher
from nbbn.runtime import StateLock
from nbbn.torch import ops
from nbbn.torch.modules import Normalization
from nbbn.torch.settings import as_numbers, dispatcher
from nbbn.torch.tensors import array_of, tensor_of


def accumulate(module: nn.Module) -> Accumulation:
    """Let several training calls of a network count as one batch for the running statistics of its nbbn modules.

        with nbbn.torch.accumulate(network) as batch:
            for i, (x, target) in enumerate(micro_batches):
                batch.micro_batch(i)
                loss(network(x), target).backward()

    Each call is normalized with its own statistics. The running statistics, and num_batches_tracked, have one update at
    the end, with the statistics of all values together; after an exception there is none.

    Args:
        module: a network, or one module.
    Raises: TypeError for what is no module; ValueError if nothing in it is nbbn's; RuntimeError at the beginning if one
        is in another accumulate().
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module; received {type(module).__name__}")
    found = [m for m in module.modules() if isinstance(m, Normalization) and m.running_mean is not None]
    if not found:
        raise ValueError("accumulate() needs a network with modules of nbbn.torch; received one without: see convert()")
    layers: Any = [_Layer(m) for m in found]
    return Accumulation(layers)


class _Layer:
    """A module as an Accumulation sees a layer."""

    def __init__(self, module: Normalization) -> None:
        self._module, self.name = module, type(module).__name__
        self.virtual_batch_size = module.virtual_batch_size
        self._taker: Any = None

    @property
    def _dispatcher(self) -> Dispatcher:
        return dispatcher(self._module._text, self._module.eps)

    @property
    def _collector(self) -> Any:
        return self._module._collector

    @_collector.setter
    def _collector(self, collector: Any) -> None:
        self._taker = collector
        self._module._collector = None if collector is None else self._take

    def _take(self, saved: Tensor, x: Tensor, given: list[float]) -> None:
        count = self._module.num_batches_tracked if self._module.momentum is None else None
        numbers = as_numbers(given, None if count is None else int(count))
        self._taker.take(self, array_of(saved), array_of(x), numbers)

    def start(self, *args: Any, **kwargs: Any) -> None:
        """Raises: TypeError."""
        raise TypeError("start() is for layers of NumPy arrays: call the module")

    def _shared_moments(self, *args: Any) -> None:
        """Nothing: no step has started."""

    def _built_variables(self, what: str) -> Any:
        state = self._module.state_tensors()
        x, channels = state[0], self._module.num_features
        params = array_of(ops.parameters(x, self._module.weight, self._module.bias, channels))
        kept = array_of(ops.packed_state(x, state, channels, len(state)))
        return SimpleNamespace(lock=StateLock(), place=place_of(kept), params=params, state=kept)

    def _update(self, variables: Any, new_state: Any, saved: Any, inputs: np.ndarray, numbers: Numbers | None) -> None:
        with torch.no_grad():
            ops.unpack_state(self._module.state_tensors(), tensor_of(new_state))
            if self._module.num_batches_tracked is not None:
                self._module.num_batches_tracked.add_(1)
