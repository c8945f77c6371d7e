"""Hypothesis strategies: layer configurations, inputs, masks and memory layouts.

A `Case` is a whole experiment in a few plain values, so that a failing example can be read and typed in
again; its arrays come from a generator seeded with them.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from tests.oracle.compiled import EVERY_VARIANT, INTERPRETED, ROWS, VARIANTS
from tests.oracle.reference import Reference, feature_axes, fused_eligible

DTYPES = [np.float16, bfloat16, np.float32, np.float64]

FORMS = [
    "C",
    "Fortran",
    "channels last in memory",
    "channels first in memory",
    "every second element",
    "reversed",
    "read-only",
    "broadcast",
]

CONTIGUOUS = ["C", "read-only"]
STRIDED = [form for form in FORMS if form not in CONTIGUOUS]

FAMILIES = ["plain", "renorm", "virtual", "virtual renorm", "adjustment", "adjustment renorm"]


def arrange(values: NDArray[Any], form: str) -> NDArray[Any]:
    """`values` in another memory layout; "broadcast" repeats the first sample with stride 0."""
    if form == "Fortran":
        return np.asfortranarray(values)
    if form == "channels last in memory":
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(values, 1, -1)), -1, 1)
    if form == "channels first in memory":
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(values, -1, 1)), 1, -1)
    if form == "every second element":
        wide = np.zeros([2 * n for n in values.shape], values.dtype)
        view = wide[(..., *[slice(None, None, 2)] * values.ndim)]
        view[...] = values
        return view
    if form == "reversed":
        backwards = (..., *[slice(None, None, -1)] * values.ndim)
        return np.ascontiguousarray(values[backwards])[backwards]
    if form == "broadcast":
        return np.broadcast_to(values[:1], values.shape)
    values = np.ascontiguousarray(values)
    values.flags.writeable = form != "read-only"
    return values


@dataclass(frozen=True)
class Case:
    """One configuration and its data. residual_form: the memory layout of the residual; None is none.

    `mask` is None or (kind, form): kind "bool" or "weights"; form "plain" (the dimensions that are not
    features), "leading" (without the last of them), "thin" (with ones in them) or "full" (the input's
    shape).
    """

    shape: tuple[int, ...]
    dtype: Any
    options: dict[str, Any]
    adjustment_shapes: tuple[tuple[int, ...], tuple[int, ...]] | None
    mask: tuple[str, str] | None
    form: str
    dy_form: str
    seed: int
    residual_form: str | None = None

    def adjustment(self) -> Any:
        """The adjustment function, or None. Eighths are exact in every dtype."""
        if self.adjustment_shapes is None:
            return None
        rng = np.random.default_rng(self.seed)
        dtype = np.float64 if self.dtype is np.float64 else np.float32
        a, b = (np.asarray(rng.integers(4, 16, s) / 8, dtype) for s in self.adjustment_shapes)
        return lambda shape: (a, b)

    def reference(self) -> Reference:
        dtype = np.dtype(self.dtype).name
        return Reference(**self.options, adjustment=self.adjustment(), dtype=dtype).build(self.shape)

    def weights(self, reference: Reference) -> list[NDArray[Any]]:
        """Random parameters (of both signs) and state in TensorFlow's order.

        A deviation of 0.25 is below the square root of the largest epsilon, where renorm's floor begins.
        """
        rng = np.random.default_rng([self.seed, 1])
        dtype = np.float64 if self.dtype is np.float64 else np.float32
        return [
            (rng.uniform(0.25, 2, reference.parameter_shape) * sign).astype(dtype)
            for name in reference.weight_names
            for sign in [
                rng.choice([-1, 1], reference.parameter_shape) if name in ("gamma", "beta", "moving_mean") else 1
            ]
        ]

    def batch(self, step: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """x, dy and mask of one step; each channel has a mean and a scale of its own."""
        rng = np.random.default_rng([self.seed, 2, step])
        channel = [1] * len(self.shape)
        for i in feature_axes(self.options["axis"], len(self.shape)):
            channel[i] = self.shape[i]
        x = rng.uniform(-2, 2, channel) + rng.uniform(0.5, 2, channel) * rng.normal(size=self.shape)
        dy = rng.normal(size=self.shape)
        return (
            arrange(x.astype(self.dtype), self.form),
            arrange(dy.astype(self.dtype), self.dy_form),
            self._mask(rng),
        )

    def residual(self, step: int) -> NDArray[Any] | None:
        """About as large as the normalized input, so that an activation lets half of the sums through."""
        if self.residual_form is None:
            return None
        values = np.random.default_rng([self.seed, 3, step]).normal(size=self.shape)
        return arrange(values.astype(self.dtype), self.residual_form)

    def _mask(self, rng: np.random.Generator) -> NDArray[Any] | None:
        if self.mask is None:
            return None
        kind, form = self.mask
        features = feature_axes(self.options["axis"], len(self.shape))
        plain = tuple(n for i, n in enumerate(self.shape) if i not in features)
        shapes = {
            "plain": plain,
            "leading": plain[:-1],
            "thin": tuple(1 if i % 2 else n for i, n in enumerate(plain)),
            "full": self.shape,
        }
        valid = rng.random(shapes[form]) < 0.75
        if kind == "bool":
            return np.asarray(valid)
        return np.asarray(valid * rng.integers(1, 16, shapes[form]) / 8, np.float32)


@st.composite
def shapes(draw: Any, empty: bool = True) -> tuple[int, ...]:
    """Rank 2 to 5, mostly small sizes, 1 among them; rarely an empty dimension."""
    rank = draw(st.integers(2, 5))
    sizes = st.integers(1, 4) if rank > 3 else st.sampled_from([1, 2, 3, 4, 5, 8, 17])
    shape = draw(st.lists(sizes, min_size=rank, max_size=rank))
    if empty and draw(st.integers(0, 19)) == 0:
        shape[draw(st.integers(0, rank - 1))] = 0
    return tuple(shape)


@st.composite
def axes(draw: Any, rank: int, batch_axis: bool) -> int | list[int]:
    """One axis or several, negative or positive; the batch axis only where it is legal."""
    candidates = list(range(0 if batch_axis else 1, rank))
    common = st.sampled_from([-1, 1])
    one = st.sampled_from(candidates + [i - rank for i in candidates])
    if rank == 2:
        return draw(st.one_of(common, one))
    several = st.lists(st.sampled_from(candidates), min_size=1, max_size=rank - 1, unique=True)
    return draw(st.one_of(common, one, several))


@st.composite
def clippings(draw: Any) -> dict[str, float] | None:
    bounds = {"rmax": st.sampled_from([1.0, 1.25, 3.0]), "rmin": st.sampled_from([0.0, 0.5, 1.0])}
    return draw(st.none() | st.fixed_dictionaries({}, optional={**bounds, "dmax": st.sampled_from([0.0, 0.5])}))


@st.composite
def cases(draw: Any, dtypes: list[Any] = DTYPES, epilogue: bool = False, every: bool = False) -> Case:
    """Legal configurations only; with `epilogue` all of them have a residual and an activation.

    every: all combinations of options, for tests that run no kernels; else those of compiled.py. To the loops a virtual
    batch is a shape, and to the middle stage, which tests of all targets see with all options, an average is one.
    """
    every = every or INTERPRETED
    variants = [v for v in (EVERY_VARIANT if every else VARIANTS) if v.dtype in dtypes]
    kinds = {(v.renorm, v.adjusted) for v in variants}
    families = [f for f in FAMILIES if ("renorm" in f, "adjustment" in f) in kinds]
    family = draw(st.sampled_from(families if every else [f for f in families if f != "virtual renorm"]))
    kind = "renorm" in family, "adjustment" in family
    variant = draw(st.sampled_from([v for v in variants if (v.renorm, v.adjusted) == kind]))
    dtype, _, masked, _, strided = variant
    forms = (FORMS if every else STRIDED) if strided else CONTIGUOUS
    shape = draw(shapes())
    options: dict[str, Any] = {}
    if "virtual" in family:
        options["virtual_batch_size"] = draw(st.integers(1, 4))
        shape = (options["virtual_batch_size"] * min(shape[0], 4), *shape[1:])
    if variant in ROWS and not every:
        shape, options["axis"] = (*shape[:-1], max(shape[-1], 2)), -1
    else:
        options["axis"] = draw(axes(len(shape), "virtual" not in family))
    options["epsilon"] = draw(st.sampled_from([1e-3, 1e-5, 0.25]))
    options["center"] = draw(st.booleans())
    options["scale"] = draw(st.booleans())
    options["trainable"] = draw(st.sampled_from([True, True, True, False]))
    unbiased = [] if "renorm" in family else [True]
    options["bessel_correction"] = draw(st.sampled_from([None, None, False, *unbiased]))
    masks = st.tuples(st.sampled_from(["bool", "weights"]), st.sampled_from(["plain", "leading", "thin", "full"]))
    mask = draw(masks) if masked else None
    # A cumulative average counts the layer's steps: a statistic without valid elements in one is not drawn.
    momenta = [0.0, 0.5, 0.99, 1.0] + ([None] if mask is None and every else [])
    options["momentum"] = draw(st.sampled_from(momenta))
    if "renorm" in family:
        options["renorm"] = True
        options["renorm_momentum"] = draw(st.sampled_from([0.0, 0.9, 1.0]))
        options["renorm_clipping"] = draw(clippings())
    adjustment_shapes = draw(adjustment_pairs(shape)) if "adjustment" in family else None
    if epilogue:
        options["activation"] = "relu"
    eligible = family == "plain" and fused_eligible(len(shape), options["axis"], np.dtype(dtype).name)
    options["fused"] = draw(st.sampled_from([None, False, True] if eligible else [None, False]))
    return Case(
        shape=shape,
        dtype=dtype,
        options=options,
        adjustment_shapes=adjustment_shapes,
        mask=mask,
        form=draw(st.sampled_from(forms)),
        dy_form=draw(st.sampled_from(forms)),
        seed=draw(st.integers(0, 2**16)),
        residual_form=draw(st.sampled_from(forms)) if epilogue else None,
    )


@st.composite
def adjustment_pairs(draw: Any, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes that broadcast against `shape`, of its rank or lower."""

    def one() -> tuple[int, ...]:
        kept = [n if draw(st.booleans()) else 1 for n in shape]
        return tuple(kept[draw(st.integers(0, len(shape))) :])

    return one(), one()


# -- how a layer is called -------------------------------------------------------------------------------------------

# What is no array of the case's shape and dtype in one of FORMS; some of it is accepted, the rest is an error.
ODD_FORMS = [
    "a list",
    "another byte order",
    "another dtype",
    "another rank",
    "another shape",
    "integers",
    "masked",
    "one sample less",
    "subclass",
    "unaligned",
]
MASK_FORMS = ["C", "Fortran", "every second element", "reversed"]
OUTS = [
    "another dtype",
    "another shape",
    "a list",
    "broadcast",
    "every second element",
    "Fortran",
    "in place",
    "new",
    "overlapping",
    "overlapping the other",
    "read-only",
    "the other",
    "unaligned",
]


def odd(values: NDArray[Any], form: str) -> Any:
    """`values` in one of FORMS or ODD_FORMS."""
    if form == "a list":
        return values.tolist()
    if form == "another byte order":
        return values.astype(values.dtype.newbyteorder()) if values.dtype.name != "bfloat16" else values
    if form == "another dtype":
        return values.astype(np.float64 if values.dtype != np.float64 else np.float32)
    if form == "another rank":
        return values[np.newaxis]
    if form == "another shape":
        return np.concatenate([values, values], -1)
    if form == "integers":
        return values.astype(np.int32)
    if form == "masked":
        return np.ma.masked_array(values)
    if form == "one sample less":
        return values[:-1]
    if form == "subclass":
        return values.view(np.recarray)
    if form == "unaligned":
        memory = np.zeros(values.nbytes + 1, np.uint8)
        view = memory[1:].view(values.dtype).reshape(values.shape)
        view[...] = values
        return view
    return arrange(values, form)


@dataclass(frozen=True)
class Call:
    """How a layer is called, in plain values.

    mask: one of MASK_FORMS. form, residual, dy: one of FORMS or ODD_FORMS, or "the input" itself; None is none. out,
    gradient_out: one of OUTS, where "in place" is in the input (of the gradient: in dy), and "the other" in the
    residual (of the gradient: in the input); None is none. gradients: how many times the pullback of vjp() is called;
    None is a call without vjp().
    """

    training: Any
    mask: str | None
    update: bool
    form: str
    residual: str | None
    out: str | None
    gradients: int | None
    dy: str | None
    gradient_out: str | None


def _mostly(often: Any, rarely: Any) -> Any:
    """Four times in five one of `often`."""
    return st.integers(0, 4).flatmap(lambda i: st.sampled_from(often if i else rarely))


def calls() -> st.SearchStrategy[Call]:
    """Legal calls and others, mostly such as an earlier call can have prepared."""
    made = st.builds(
        Call,
        training=_mostly([True, True, False], [None, 1, 0, np.True_, np.False_, "yes", 1.0]),
        mask=_mostly([None], MASK_FORMS),
        update=_mostly([True], [False]),
        form=_mostly(["C"], FORMS + ODD_FORMS),
        residual=_mostly([None, "C"], [*FORMS, *ODD_FORMS, "the input"]),
        out=_mostly([None, "new"], OUTS),
        gradients=st.sampled_from([None, None, 1, 1, 1, 2, 0]),
        dy=_mostly(["C"], [*FORMS, *ODD_FORMS, "the input", None]),
        gradient_out=_mostly([None, "new"], OUTS),
    )
    return st.builds(_in_order, made, _mostly(["C"], ["Fortran"]))


def _in_order(call: Call, form: str) -> Call:
    """The call with arrays in this order where they are in C's."""
    orders = {"C": form, "new": form if form in OUTS else "new"}
    names = "form", "residual", "out", "dy", "gradient_out"
    return replace(call, **{name: orders.get(getattr(call, name), getattr(call, name)) for name in names})


@st.composite
def layer_options(draw: Any, case: Case) -> dict[str, Any]:
    """The options of a layer for the case: those of the oracle's case, and what the oracle need not know of."""
    options = {**case.options, "adjustment": case.adjustment()}
    options["activation"] = draw(st.sampled_from([None, "relu"]))
    if draw(st.integers(0, 3)) == 0:
        options["momentum"] = None
    if not options["fused"]:
        options["dtype"] = draw(_mostly([None], ["float16", "bfloat16", "float32", "float64"]))
    clips = options.get("renorm_clipping")
    if clips and draw(st.booleans()):
        asked = {k: (lambda value=v: value) for k, v in clips.items() if draw(st.booleans())}
        options["renorm_clipping"] = {**clips, **asked}
        if draw(st.integers(0, 4)) == 0:
            options["renorm_clipping"] |= {"rmin": lambda: 4.0}  # above every rmax
    return options
