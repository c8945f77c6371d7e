"""Where a layer's variables are, and which calls are for a GPU."""

import importlib
import re
from typing import Any, Self

import numpy as np

from nbbn.runtime import StateLock
from nbbn.variables import Shapes, Variables


class Placed:
    """A layer with variables on the host or on a GPU. Nothing of nbbn.gpu is imported before a call needs it."""

    name: str
    options: Any  # Options, as a property

    def __init__(self) -> None:
        self._variables: Variables | None = None
        self._on_gpu: Any = None  # the DeviceDispatcher of a layer whose variables are there
        self._building = StateLock()

    def _make_variables(self, shapes: Shapes) -> Variables:
        raise NotImplementedError

    def _built_variables(self, what: str) -> Variables:
        raise NotImplementedError

    @property
    def device(self) -> str:
        """Where the variables are: "cpu", or "cuda:0" and so on. Before a layer is built its first input decides."""
        variables = self._variables
        return "cpu" if variables is None or self._on_gpu is None else f"cuda:{variables.device}"  # type: ignore[attr-defined]

    def to(self, device: str) -> Self:
        """Move the variables of a built layer, by way of the host: "cpu", "cuda" or "cuda:1". Returns the layer.

        On a GPU the weights are Numba's device arrays, or, where the layer was built by a call, arrays of its input's
        library.

        Raises: ValueError for another device, or if the layer is not built; RuntimeError if there is no such GPU, with
        what is missing.
        """
        found = re.fullmatch(r"cpu|cuda(?::(\d+))?", device) if isinstance(device, str) else None
        if found is None:
            raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N'; received {device!r}")
        number = int(found[1] or 0)
        if device != "cpu":
            from nbbn.gpu import availability

            availability.require(f"to({device!r})", number)
        host = self._built_variables(f"to({device!r})").on_host()
        if device == "cpu":
            self._variables, self._on_gpu = host, None
        else:
            self._move(host, importlib.import_module("nbbn.adapters.numba_cuda"), number)
        return self

    def _move(self, host: Variables, library: Any, device: int) -> Variables:
        from nbbn.gpu.dispatcher import DeviceDispatcher
        from nbbn.gpu.variables import DeviceVariables

        moved = DeviceVariables(host, library, device)
        self._variables, self._on_gpu = moved, DeviceDispatcher(self.options)
        return moved

    def _device_variables(self, shapes: Shapes, x: Any) -> Any:
        """Those for an input on a GPU, which builds the layer there."""
        with self._building:
            if self._variables is None:
                return self._move(self._make_variables(shapes), x.library, x.device)
        if self.device != f"cuda:{x.device}":
            raise ValueError(
                f"inputs must be where the variables of {self.name} are, on {self.device}; received an array on "
                f"cuda:{x.device}: call to('cuda:{x.device}') first"
            )
        return self._variables

    def _device_dispatcher(self) -> Any:
        if self._on_gpu is None:
            from nbbn.gpu.dispatcher import DeviceDispatcher

            return DeviceDispatcher(self.options)
        return self._on_gpu

    def _is_for_gpu(self, inputs: Any) -> bool:
        """Whether a call is one for a GPU. Raises: ValueError if the variables are there and the input is not."""
        if type(inputs) is not np.ndarray:
            from nbbn.gpu import availability
            from nbbn.gpu.arrays import find_library

            if find_library(inputs) is not None:
                if self._on_gpu is None:
                    availability.require("an array on a GPU")
                return True
        if self._on_gpu is not None:
            raise ValueError(
                f"inputs must be where the variables of {self.name} are, on {self.device}; received an array of the "
                "host: call to('cpu') first"
            )
        return False
