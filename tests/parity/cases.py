"""Random configurations that TensorFlow and nbbn both define, and the arrays they are called with."""

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from tests.oracle.reference import feature_axes, fused_eligible, parameter_shape
from tests.parity.tf_side import numpy_dtype, parameter_dtype

SEED = 20240607
DTYPES = ("float16", "bfloat16", "float32", "float64")
FLAVOURS = (
    "",
    "",
    "",
    "renorm",
    "virtual",
    "virtual renorm",
    "adjustment",
    "adjustment renorm",
    "mask",
    "mask renorm",
    "mask adjustment",
    "mask adjustment renorm",
)
CLIPPINGS = (
    None,
    {},
    {"rmax": 1.5},
    {"rmin": 0.75},
    {"dmax": 0.25},
    {"rmax": 2.0, "rmin": 0.5},
    {"rmax": 1.25, "dmax": 0.5},
    {"rmin": 1.0, "dmax": 1.0},
    {"rmax": 3.0, "rmin": 0.25, "dmax": 5.0},
    {"rmax": 1.0, "rmin": 1.0, "dmax": 0.0},
)
ADJUSTMENTS = ("channel", "example", "element", "scalar")
MASKS = ("full", "broadcast", "weights")
# TensorFlow keeps 1 - momentum as float32 even for a float64 layer: exact only for these.
FLOAT64_MOMENTA = (0.0, 0.5, 0.75, 0.875, 1.0)
MOMENTA = (0.0, 0.3, 0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Case:
    """One configuration of a layer and of its calls."""

    seed: int
    version: str
    dtype: str
    shape: tuple[int, ...]
    axis: int | list[int]
    momentum: float
    epsilon: float
    center: bool
    scale: bool
    renorm: bool
    renorm_clipping: dict[str, float] | None
    renorm_momentum: float
    fused: bool | None
    trainable: bool
    virtual_batch_size: int | None
    adjustment: str | None
    mask: str | None

    @property
    def options(self) -> dict[str, Any]:
        """Constructor arguments; the adjustment, which differs between the two sides, is left out."""
        calls_only = ("seed", "version", "shape", "adjustment", "mask")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in calls_only}

    @property
    def features(self) -> tuple[int, ...]:
        return feature_axes(self.axis, len(self.shape))

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Shape with which a statistic broadcasts against the input."""
        return tuple(n if i in self.features else 1 for i, n in enumerate(self.shape))

    @property
    def eligible(self) -> bool:
        return fused_eligible(
            len(self.shape),
            self.axis,
            self.dtype,
            renorm=self.renorm,
            virtual_batch_size=self.virtual_batch_size,
            adjustment=self.adjustment,
        )


# --- configurations ------------------------------------------------------------


def draw_cases(count: int, seed: int = SEED) -> list[Case]:
    """`count` configurations, flavours and dtypes in turn."""
    rng = np.random.default_rng(seed)
    return [draw_case(rng, i) for i in range(count)]


def draw_case(rng: np.random.Generator, number: int) -> Case:
    flavour = FLAVOURS[number % len(FLAVOURS)].split()
    dtype = DTYPES[number // len(FLAVOURS) % len(DTYPES)]
    renorm, masked, virtual = "renorm" in flavour, "mask" in flavour, "virtual" in flavour
    if renorm and dtype == "float64":
        dtype = "float32"  # TensorFlow's renorm fails in float64
    version = pick(rng, ("V1", "V2", "V2"))
    shape, virtual_batch_size = draw_shape(rng, virtual)
    momenta = FLOAT64_MOMENTA if dtype == "float64" else MOMENTA
    axis = pick(rng, (-1, len(shape) - 1)) if masked else draw_axis(rng, len(shape), virtual)
    options: dict[str, Any] = {
        "seed": number,
        "version": version,
        "dtype": dtype,
        "shape": shape,
        "axis": axis,
        "momentum": pick(rng, momenta),
        "epsilon": draw_epsilon(rng, math.prod(shape) // math.prod(parameter_shape(shape, axis))),
        "center": bool(rng.random() < 0.8),
        "scale": bool(rng.random() < 0.8),
        "renorm": renorm,
        "renorm_clipping": pick(rng, CLIPPINGS) if renorm else None,
        "renorm_momentum": pick(rng, momenta),
        # A V1 layer that is frozen while it renormalizes is a deviation with a test of its own.
        "trainable": bool(rng.random() < 0.85) or (version == "V1" and renorm),
        "virtual_batch_size": virtual_batch_size,
        "adjustment": pick(rng, ADJUSTMENTS) if "adjustment" in flavour else None,
        "mask": pick(rng, MASKS) if masked else None,
    }
    return Case(**options, fused=draw_fused(rng, Case(**options, fused=None)))


def pick(rng: np.random.Generator, values: Any) -> Any:
    """One of the values, as it is (Generator.choice would make NumPy scalars of them)."""
    return values[rng.integers(len(values))]


def draw_shape(rng: np.random.Generator, virtual: bool) -> tuple[tuple[int, ...], int | None]:
    """An input shape of rank 2 to 5, and a virtual batch size that divides the batch."""
    rank = int(rng.integers(2, 6))
    rest = tuple(int(n) for n in rng.integers(1, 5 if rank > 3 else 7, size=rank - 1))
    if not virtual:
        return (int(rng.integers(3, 9)), *rest), None
    virtual_batch_size = int(rng.integers(1, 5))
    return (virtual_batch_size * int(rng.integers(1, 4)), *rest), virtual_batch_size


def draw_axis(rng: np.random.Generator, rank: int, virtual: bool) -> int | list[int]:
    """One axis or several, counted from either end; not the batch when there are virtual batches."""
    candidates = range(1 if virtual else 0, rank)
    if rank == 2 or rng.random() < 0.65:
        axis = pick(rng, (1, rank - 1, rank - 1, pick(rng, candidates)))
        return pick(rng, (axis, axis - rank, [axis - rank]))
    chosen = rng.choice(candidates, size=int(rng.integers(2, rank)), replace=False)
    return [int(axis) - pick(rng, (0, rank)) for axis in chosen]


def draw_epsilon(rng: np.random.Generator, reduced: int) -> float:
    """Large for statistics of few values: their variance may be near 0, and its last digits do not survive TensorFlow's
    moving average, which forms old - (old - new) * 1 even for momentum 0.
    """
    return pick(rng, (1e-5, 1e-3, 0.1)) if reduced > 6 else 0.1


def draw_fused(rng: np.random.Generator, case: Case) -> bool | None:
    """A value of `fused` that both sides accept and that lets a mask count."""
    if case.mask and case.eligible:
        return False
    if case.version == "V1" or case.eligible:
        return pick(rng, (None, True, False))
    # For axis -4 of rank 4 and fused=None tf_keras raises: a deviation with a test of its own.
    batch_axis_from_the_end = len(case.shape) == 4 and case.axis in (-4, [-4])
    return False if batch_axis_from_the_end else pick(rng, (None, False))


# --- arrays ------------------------------------------------------------


@dataclass(frozen=True)
class Arrays:
    """Input, upstream gradient and mask of one call."""

    x: np.ndarray
    dy: np.ndarray
    mask: np.ndarray | None


def draw_weights(case: Case) -> list[np.ndarray]:
    """Non-trivial parameters and state in TensorFlow's order."""
    rng = np.random.default_rng([case.seed, 1])
    shape = parameter_shape(case.shape, case.axis, case.virtual_batch_size)
    parameters = [rng.uniform(-1.5, 1.5, shape)] * case.scale + [rng.normal(size=shape)] * case.center
    state = [rng.normal(size=shape), rng.uniform(0.5, 2, shape)]
    if case.renorm:
        # A tenth of the standard deviations is below sqrt(epsilon), where the division has its floor.
        renorm_stddev = rng.uniform(0.5, 1.5, shape) * (rng.random(shape) > 0.1)
        state += [rng.uniform(0.5, 1.5, shape), rng.normal(size=shape), renorm_stddev]
    return [w.astype(parameter_dtype(case.dtype)) for w in parameters + state]


def draw_calls(case: Case, training_steps: int) -> tuple[list[Arrays], Arrays]:
    """Arrays of the training steps, and of an inference whose batch is one longer where the batch is reduced."""
    rng = np.random.default_rng([case.seed, 2])
    center, spread = rng.uniform(-2, 2, case.feature_shape), rng.uniform(0.5, 2, case.feature_shape)

    def draw(shape: tuple[int, ...]) -> Arrays:
        x = center + spread * rng.normal(size=shape)
        dtype = numpy_dtype(case.dtype)
        return Arrays(x.astype(dtype), rng.normal(size=shape).astype(dtype), draw_mask(rng, case.mask, shape))

    longer = (case.shape[0] + (0 not in case.features), *case.shape[1:])
    return [draw(case.shape) for _ in range(training_steps)], draw(longer)


def draw_mask(rng: np.random.Generator, form: str | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """A mask of an input with features last; at least one element counts."""
    if form is None:
        return None
    masked = list(shape[:-1])
    if form == "broadcast":
        masked = [pick(rng, (1, n)) for n in masked]
    # Quarters are exact in every dtype: TensorFlow rounds real weights to the layer's dtype.
    mask = rng.integers(0, 9, masked) / 4 if form == "weights" else rng.random(masked) < 0.7
    mask.flat[0] = 1
    return mask


def draw_adjustment(case: Case) -> tuple[np.ndarray, np.ndarray] | None:
    """The pair (a, b) that the adjustment function returns in every training step."""
    if case.adjustment is None:
        return None
    rng = np.random.default_rng([case.seed, 3])
    shape = {
        "channel": case.shape[-1:] if case.features == (len(case.shape) - 1,) else case.feature_shape,
        "example": (case.shape[0], *(1 for _ in case.shape[1:])),
        "element": case.shape,
        "scalar": (),
    }[case.adjustment]
    a, b = rng.uniform(0.5, 1.5, shape), rng.normal(size=shape)
    return np.asarray(a, parameter_dtype(case.dtype)), np.asarray(b, parameter_dtype(case.dtype))
