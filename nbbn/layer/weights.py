"""A layer's weights: where they are, getting and setting them, and what is computed from them alone."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from nbbn import constraints, initializers, regularizers
from nbbn.arrays import HOST
from nbbn.call.gradients import Gradients
from nbbn.core import dtypes
from nbbn.layer import folding
from nbbn.layer.config import Configured
from nbbn.state.shapes import Shapes, as_shape, derive_shapes
from nbbn.state.variables import COUNTS, PARAMETERS, STATISTICS, Variables, check_spreads

_STATE = (*STATISTICS, *COUNTS)


def _variable(name: str) -> property:
    """The attribute of a layer for one of its variables; None where it has no such variable."""

    def get(self: "Weighted") -> Any:
        v = self._variables
        return None if v is None or name not in v.names else v[name]

    def assign(self: "Weighted", value: Any) -> None:
        v = self._built_variables(f"setting {name}")
        if name not in v.names:
            raise AttributeError(f"{self.name} has no {name}")
        v.assign({name: v.check(name, value)})

    return property(get, assign)


class Weighted(Configured):
    """A layer with variables, on the host or on a GPU. Nothing of CUDA is imported before a call needs it."""

    @property
    def built(self) -> bool:
        return self._variables is not None

    def build(self, input_shape: Iterable[int | None], dtype: Any = None) -> None:
        """Create the weights for inputs of this shape; None stands for an unknown dimension. Does nothing when built.

        Args:
            dtype: of the inputs, where the layer has no dtype of its own; None is float32.
        Raises: TypeError, ValueError for what is no shape; ValueError if an axis is out of range, occurs twice, or its
            dimension is unknown.
        """
        shape = as_shape(input_shape)
        if self._variables is None:
            dtype = self.options.dtype or dtypes.resolve("float32" if dtype is None else dtype)
            shapes = derive_shapes(self.options, shape, dtype)
            with self._building:
                if self._variables is None:
                    self._variables = self._make_variables(shapes)

    def _make_variables(self, shapes: Shapes) -> Variables:
        """Variables with their initial values, on the host."""
        values = {n: self._initial(n, shapes) for n, has in (("gamma", self.scale), ("beta", self.center)) if has}
        return Variables(shapes, values | self._initial_statistics(shapes))

    def _initial(self, name: str, shapes: Shapes) -> np.ndarray:
        argument = f"{name}_initializer"
        return initializers.initialize(getattr(self, argument), shapes.params, shapes.dtype, argument)

    def _initial_statistics(self, shapes: Shapes) -> dict[str, np.ndarray]:
        mean, variance = self._initial("moving_mean", shapes), self._initial("moving_variance", shapes)
        values = {"moving_mean": mean, "moving_variance": variance}
        check_spreads(values)
        if self.options.renorm:
            sigma = np.sqrt(variance)
            values |= {"moving_stddev": sigma, "renorm_mean": mean, "renorm_stddev": sigma}
        if self.options.is_debiased:
            values |= {n: np.zeros(shapes.params, shapes.dtype) for n in COUNTS}
        return values

    def reset_statistics(self) -> None:
        """Set all moving statistics to what their initializers give, and the weight of the batches in them to 0.

        The initializers are asked again; gamma and beta stay. All change at once, where they are: another thread never
        sees a mix, and on a GPU the arrays stay the same. Updates that a TensorFlow 1 layer has recorded, and not run,
        are still there. Of a SyncBatchNormalization all ranks have to do it.

        Raises: ValueError if the layer is not built; what an initializer raises. The layer is then as it was.
        """
        variables = self._built_variables("reset_statistics()")
        variables.assign(self._initial_statistics(variables.shapes))

    # -- where they are ------------------------------------------------------------------------------------------------

    @property
    def device(self) -> str:
        """Where the variables are: "cpu", or "cuda:0" and so on. Before a layer is built its first input decides."""
        return HOST.name if self._variables is None else self._variables.place.name

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
        if device == "cpu":
            self._variables = self._built_variables(f"to({device!r})").on_host()
            return self
        from nbbn.arrays import availability, gpu, libraries

        number = int(found[1] or 0)
        availability.require(f"to({device!r})", number)
        place = gpu.device_place(libraries.load("numba_cuda"), number)
        self._variables = self._built_variables(f"to({device!r})").moved(place)
        return self

    # -- weights -------------------------------------------------------------------------------------------------------

    gamma = _variable("gamma")
    beta = _variable("beta")
    moving_mean = _variable("moving_mean")
    moving_variance = _variable("moving_variance")
    moving_stddev = _variable("moving_stddev")
    renorm_mean = _variable("renorm_mean")
    renorm_stddev = _variable("renorm_stddev")
    seen_mean = _variable("seen_mean")
    seen_variance = _variable("seen_variance")

    def _weights(self, names: Iterable[str]) -> list[Any]:
        v = self._variables
        return [] if v is None else [v[n] for n in v.names if n in names]

    @property
    def weights(self) -> list[Any]:
        """gamma, beta, moving_mean, moving_variance, with renorm moving_stddev, renorm_mean, renorm_stddev, as far
        as they exist; the order and the shapes are TensorFlow's. With momentum=None or debias, which TensorFlow does
        not have, seen_mean and seen_variance follow: the weight of the batches in each average."""
        return self._weights((*PARAMETERS, *_STATE))

    @property
    def trainable_weights(self) -> list[Any]:
        return self._weights(PARAMETERS if self.trainable else ())

    @property
    def non_trainable_weights(self) -> list[Any]:
        return self._weights(_STATE if self.trainable else (*PARAMETERS, *_STATE))

    variables = weights
    trainable_variables = trainable_weights
    non_trainable_variables = non_trainable_weights

    def get_weights(self) -> list[Any]:
        """Copies of the weights, as NumPy arrays."""
        return [] if self._variables is None else list(self._variables.values().values())

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set all weights, in the order and shapes of get_weights().

        With momentum=None or debias the list may end before seen_mean and seen_variance, as TensorFlow's does. They
        then stay as they are; in a new layer they are 0, and the first batch will count alone.

        A variance or deviation must not be negative, and NaN only where its mean is NaN or infinite, too: that is what
        training on such data leaves, and a checkpoint of it can be loaded. The attributes follow the same rule.

        Raises: TypeError, ValueError if they do not fit; no weight has changed then.
        """
        variables = self._built_variables("set_weights()")
        every = variables.names
        takes = f"set_weights() takes a list of {len(every)} arrays ({', '.join(every)})"
        if isinstance(weights, (Mapping, str)) or not isinstance(weights, Iterable):
            received = f"a dict with the keys {list(weights)}" if isinstance(weights, Mapping) else repr(weights)
            raise TypeError(f"{takes}; received {received}")
        weights = list(weights)
        names = every if len(weights) == len(every) else [n for n in every if n not in COUNTS]
        if len(weights) != len(names):
            shapes = [getattr(w, "shape", type(w).__name__) for w in weights]
            fewer = "" if len(names) == len(every) else f", or the first {len(names)}"
            hint = ": PyTorch's num_batches_tracked is no weight" if () in shapes else ""
            raise ValueError(f"{takes}{fewer}; received {len(weights)}, of shapes {shapes}{hint}")
        variables.assign({n: variables.check(n, w) for n, w in zip(names, weights, strict=True)})

    def get_state(self) -> dict[str, np.ndarray]:
        """Copies of all that calls have left in the layer, by name: what get_weights() has, as NumPy arrays. With the
        config it is all that a restart needs.

        Raises: ValueError if the layer is not built.
        """
        return self._built_variables("get_state()").values()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Set all variables, by the names of get_state(), at once; they are copied.

        Raises: ValueError if the layer is not built, for a name that is missing or unknown, or another shape; TypeError
            for what is not real. The layer is then as it was.
        """
        variables = self._built_variables("set_state()")
        if not isinstance(state, Mapping):
            raise TypeError(f"set_state() takes a dict as of get_state(); received {type(state).__name__}")
        missing = [n for n in variables.names if n not in state]
        unknown = [n for n in state if n not in variables.names]
        if missing or unknown:
            message = f"the state of {self.name} must be {', '.join(variables.names)}"
            raise ValueError(f"{message}; missing are {missing}, not expected {unknown}")
        variables.assign({n: variables.check(n, state[n]) for n in variables.names})

    def count_params(self) -> int:
        """The number of values in all weights. Raises: ValueError if the layer is not built."""
        variables = self._built_variables("count_params()")
        return len(variables.names) * math.prod(variables.shapes.params)

    def fold(self, dtype: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """scale and shift of inference, y = x * scale + shift before any activation: see nbbn.fold_into."""
        return folding.scale_and_shift(self, dtype)

    # -- losses, updates, constraints ----------------------------------------------------------------------------------

    def _regularized(self) -> list[tuple[Any, str, np.ndarray]]:
        pairs = [(getattr(self, f"{n}_regularizer"), n) for n in PARAMETERS]
        return [(r, n, w) for r, n in pairs if r is not None and (w := self._on_host(n)) is not None]

    def _on_host(self, name: str) -> np.ndarray | None:
        """A weight as a NumPy array; None where there is none."""
        variables = self._variables
        return None if variables is None or name not in variables.names else variables.on_host()[name]

    @property
    def losses(self) -> list[float]:
        """The regularization losses, one per regularized weight; they depend on no input."""
        return [regularizers.loss(r, w, f"{n}_regularizer") for r, n, w in self._regularized()]

    def get_losses_for(self, inputs: Any = None) -> list[float]:
        """The losses that depend on `inputs`; None asks for those that depend on none."""
        return self.losses if inputs is None else []

    def regularization_gradients(self) -> Gradients:
        """The gradients of the sum of `losses` with respect to gamma and beta."""
        found = {n: regularizers.gradient(r, w, f"{n}_regularizer") for r, n, w in self._regularized()}
        return Gradients(gamma=found.get("gamma"), beta=found.get("beta"))

    def apply_constraints(self) -> None:
        """Project gamma and beta onto their constraints: call it after an optimizer's step."""
        for name in PARAMETERS:
            constraint, weight = getattr(self, f"{name}_constraint"), self._on_host(name)
            if constraint is not None and weight is not None:
                setattr(self, name, constraints.project(constraint, weight, f"{name}_constraint"))

    @property
    def updates(self) -> list[Any]:
        """Updates that wait to be run: none here, a training call applies its own (the V1 layers record theirs)."""
        return []

    def get_updates_for(self, inputs: Any) -> list[Any]:
        return []
