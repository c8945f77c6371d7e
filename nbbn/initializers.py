"""First values of parameters and statistics: Keras's names, parameters, defaults and fan rules."""

import inspect
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from nbbn._registry import Configurable, Registry, integers, number

Array = npt.NDArray[Any]
Shape = int | Sequence[int]

# Standard deviation of a standard normal cut off at -2 and 2: sqrt(1 - 4 * pdf(2) / (2 * cdf(2) - 1)).
TRUNCATED_STDDEV = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))


class Initializer(Configurable, ABC):
    """Base class: `initializer(shape, dtype=None)` is a new array; dtype None means float32."""

    @abstractmethod
    def __call__(self, shape: Shape, dtype: npt.DTypeLike | None = None) -> Array:
        """A new array of `shape` and `dtype`."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """As Configurable.from_config; ignores the key dtype of TensorFlow 1's configs: the call decides."""
        return super().from_config({key: value for key, value in config.items() if key != "dtype"})


class Zeros(Initializer):
    """All zeros."""

    def __call__(self, shape: Shape, dtype: npt.DTypeLike | None = None) -> Array:
        return np.zeros(_as_shape(shape), _as_dtype(dtype))


class Ones(Initializer):
    """All ones."""

    def __call__(self, shape: Shape, dtype: npt.DTypeLike | None = None) -> Array:
        return np.ones(_as_shape(shape), _as_dtype(dtype))


class Constant(Initializer):
    """A given value, or given values.

    Args:
        value: a number, or an array with as many elements as the shape has (reshaped, as in TensorFlow).
    Raises: ValueError if `value` is not numeric or, when called, has another number of elements.
    """

    def __init__(self, value: npt.ArrayLike = 0.0) -> None:
        array = np.asarray(value)
        if array.dtype.kind not in "biufV" or isinstance(value, np.ma.MaskedArray):
            raise ValueError(f"value must be a number or an array of numbers, received {value!r}.")
        self.value: Any = array.astype(np.float64).tolist()

    def __call__(self, shape: Shape, dtype: npt.DTypeLike | None = None) -> Array:
        shape, values = _as_shape(shape), np.array(self.value)
        if values.ndim and values.size != math.prod(shape):
            raise ValueError(
                f"value of Constant must be a number or {math.prod(shape)} numbers for shape {shape}, "
                f"received {values.size} numbers."
            )
        values = values.reshape(shape) if values.ndim else np.full(shape, values)
        return values.astype(_as_dtype(dtype))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """As Initializer.from_config; reads Keras's form of an array too, {"class_name": "__numpy__", …}."""
        value = config.get("value")
        if isinstance(value, Mapping):
            config = {**config, "value": value["config"]["value"]}
        return super().from_config(config)


class RandomInitializer(Initializer):
    """Base class of the random ones.

    With a seed every call returns the same values (as in Keras); without, fresh ones. NumPy's global random
    state is neither read nor changed. Values are drawn in float64 and rounded to the dtype, a floating one.
    """

    seed: int | None

    @abstractmethod
    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        """A float64 array of `shape`, drawn from `rng`."""

    def __call__(self, shape: Shape, dtype: npt.DTypeLike | None = None) -> Array:
        dtype = _as_dtype(dtype)
        if dtype.kind not in "fV":
            raise TypeError(f"dtype must be floating for {self!r}, received {dtype}.")
        return np.asarray(self.sample(np.random.default_rng(self.seed), _as_shape(shape))).astype(dtype)


class RandomNormal(RandomInitializer):
    """Normal with `mean` and `stddev`. seed: None or an integer >= 0."""

    def __init__(self, mean: float = 0.0, stddev: float = 0.05, seed: int | None = None) -> None:
        self.mean = number("mean", mean)
        self.stddev = number("stddev", stddev, low=0)
        self.seed = _as_seed(seed)

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        return self.mean + self.stddev * rng.standard_normal(shape)


class TruncatedNormal(RandomNormal):
    """Normal with `mean` and `stddev` whose values beyond 2 * stddev are drawn again.

    The result's own standard deviation is therefore 0.88 * stddev.
    """

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        return self.mean + self.stddev * _truncated_normal(rng, shape)


class RandomUniform(RandomInitializer):
    """Uniform in [minval, maxval). seed: None or an integer >= 0."""

    def __init__(self, minval: float = -0.05, maxval: float = 0.05, seed: int | None = None) -> None:
        self.minval = number("minval", minval)
        self.maxval = number("maxval", maxval, low=self.minval)
        self.seed = _as_seed(seed)

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        return rng.uniform(self.minval, self.maxval, shape)


class VarianceScaling(RandomInitializer):
    """Zero mean and variance scale / max(1, n), n being the fan that `mode` names.

    Args:
        scale: a number > 0.
        mode: "fan_in", "fan_out" or "fan_avg" (their average).
        distribution: "truncated_normal" (or "normal", the same), "untruncated_normal" or "uniform".
        seed: None or an integer >= 0.
        input_axes, output_axes: the axes whose sizes multiply to the fans. With either None Keras's rule:
            both fans of a (C,) shape are C; else the last two axes, each times the product of those before.
    Source: Glorot and Bengio 2010, He et al. 2015 and LeCun et al. 1998 are the named cases; `input_axes` and
        `output_axes` are Keras 3's and absent from the config when None, so that TensorFlow's Keras reads it.
    """

    def __init__(
        self,
        scale: float = 1.0,
        mode: str = "fan_in",
        distribution: str = "truncated_normal",
        seed: int | None = None,
        input_axes: Sequence[int] | None = None,
        output_axes: Sequence[int] | None = None,
    ) -> None:
        self.scale = number("scale", scale, low=0)
        if self.scale == 0:
            raise ValueError(f"scale must be > 0, received {scale!r}.")
        self.mode = _one_of("mode", mode, ("fan_in", "fan_out", "fan_avg"))
        self.distribution = _one_of(
            "distribution",
            "truncated_normal" if distribution == "normal" else distribution,
            ("truncated_normal", "untruncated_normal", "uniform"),
        )
        self.seed = _as_seed(seed)
        self.input_axes = None if input_axes is None else integers("input_axes", input_axes)
        self.output_axes = None if output_axes is None else integers("output_axes", output_axes)

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        fan_in, fan_out = compute_fans(shape, self.input_axes, self.output_axes)
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[self.mode]
        stddev = math.sqrt(self.scale / max(1.0, fan))
        if self.distribution == "truncated_normal":
            return stddev / TRUNCATED_STDDEV * _truncated_normal(rng, shape)
        if self.distribution == "untruncated_normal":
            return stddev * rng.standard_normal(shape)
        limit = math.sqrt(3) * stddev
        return rng.uniform(-limit, limit, shape)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        return {key: value for key, value in config.items() if not (key.endswith("_axes") and value is None)}


class _NamedScaling(VarianceScaling):
    """VarianceScaling with the scale, mode and distribution that are the class's."""

    def __init__(
        self,
        seed: int | None = None,
        input_axes: Sequence[int] | None = None,
        output_axes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(self.scale, self.mode, self.distribution, seed, input_axes, output_axes)


class GlorotNormal(_NamedScaling):
    scale, mode, distribution = 1.0, "fan_avg", "truncated_normal"


class GlorotUniform(_NamedScaling):
    scale, mode, distribution = 1.0, "fan_avg", "uniform"


class HeNormal(_NamedScaling):
    scale, mode, distribution = 2.0, "fan_in", "truncated_normal"


class HeUniform(_NamedScaling):
    scale, mode, distribution = 2.0, "fan_in", "uniform"


class LecunNormal(_NamedScaling):
    scale, mode, distribution = 1.0, "fan_in", "truncated_normal"


class LecunUniform(_NamedScaling):
    scale, mode, distribution = 1.0, "fan_in", "uniform"


def compute_fans(
    shape: tuple[int, ...], input_axes: Sequence[int] | None = None, output_axes: Sequence[int] | None = None
) -> tuple[int, int]:
    """(fan_in, fan_out) of a parameter of `shape`; see VarianceScaling."""
    if input_axes is not None and output_axes is not None:
        return math.prod(shape[axis] for axis in input_axes), math.prod(shape[axis] for axis in output_axes)
    if len(shape) < 2:
        return math.prod(shape), math.prod(shape)
    receptive_field = math.prod(shape[:-2])
    return shape[-2] * receptive_field, shape[-1] * receptive_field


def initialize(
    initializer: object, shape: Shape, dtype: npt.DTypeLike | None = None, argument: str = "initializer"
) -> Array:
    """The array that an initializer gives for `shape`, checked.

    Args:
        initializer: anything that `get` takes. A foreign callable is called as f(shape, dtype=dtype), or as
            f(shape) where its signature has no dtype; what it returns is converted to NumPy.
        shape: of the parameter.
        dtype: of the parameter; None means float32.
        argument: what an error message calls the initializer.
    Returns: a new, writable, C-contiguous array of `shape` and `dtype`.
    Raises: ValueError if the values do not have exactly that shape; TypeError if they are not real numbers.
    """
    function, shape, dtype = get(initializer, argument), _as_shape(shape), _as_dtype(dtype)
    returned = function(shape, dtype=dtype) if _takes_dtype(function, argument) else function(shape)
    if isinstance(returned, np.ma.MaskedArray):
        raise TypeError(f"{argument} {initializer!r} must return an array without a mask, received a masked array.")
    values = np.asarray(returned)
    if values.shape != shape:
        raise ValueError(
            f"{argument} {initializer!r} must return an array of the parameter's shape {shape}, "
            f"received shape {values.shape}."
        )
    if values.dtype.kind not in "biufV":
        raise TypeError(f"{argument} {initializer!r} must return real numbers, received dtype {values.dtype}.")
    # Always a copy: a foreign function may return a read-only buffer, or one array for two parameters.
    return np.array(values, dtype=dtype, order="C", copy=True)


def _takes_dtype(function: Callable[..., Any], argument: str) -> bool:
    """Raises: TypeError for a function that can be called neither with a shape nor with a shape and a dtype."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some C functions have no signature
        return False
    takes_dtype = any(p.name == "dtype" or p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    try:
        signature.bind((), **({"dtype": None} if takes_dtype else {}))
    except TypeError as error:
        raise TypeError(
            f"{argument} {function!r} must be a function of (shape) or (shape, dtype), received one of {signature}."
        ) from error
    return takes_dtype


def _truncated_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    values = np.asarray(rng.standard_normal(shape))
    while (outside := np.abs(values) > 2).any():
        values[outside] = rng.standard_normal(int(outside.sum()))
    return values


def _as_shape(shape: Shape) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, int | np.integer) else shape
    return tuple(operator.index(size) for size in sizes)


def _as_dtype(dtype: npt.DTypeLike | None) -> np.dtype[Any]:
    return np.dtype(np.float32 if dtype is None else dtype)


def _as_seed(seed: object) -> int | None:
    if seed is not None and not (isinstance(seed, int | np.integer) and seed >= 0):
        raise ValueError(f"seed must be None or an integer >= 0, received {seed!r}.")
    return None if seed is None else int(seed)


def _one_of(name: str, value: str, accepted: tuple[str, ...]) -> str:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, received {value!r}.")
    return value


# Keras exports every class under this name as well, and configs use either.
zeros = Zeros
ones = Ones
constant = Constant
random_normal = RandomNormal
random_uniform = RandomUniform
truncated_normal = TruncatedNormal
variance_scaling = VarianceScaling
glorot_normal = GlorotNormal
glorot_uniform = GlorotUniform
he_normal = HeNormal
he_uniform = HeUniform
lecun_normal = LecunNormal
lecun_uniform = LecunUniform

_ALIASES = {"zero": Zeros, "one": Ones, "normal": RandomNormal, "uniform": RandomUniform}
_REGISTRY = Registry("initializer", Initializer, vars(), _ALIASES)
get, serialize = _REGISTRY.get, _REGISTRY.serialize
