"""Batch normalization in float64, written as literally as its formulas.

The tests' second opinion: nothing here comes from the package and nothing is fast. Every statistic keeps
its reduced dimensions, so each line reads like the rule it stands for. Names: `w` is the mask or the weights
spread over the input, `W` their sum for each statistic (the number of values when nothing is masked).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class Gradients(NamedTuple):
    """What `Step.gradients` returns; None for a parameter that does not exist."""

    inputs: Array
    gamma: Array | None
    beta: Array | None
    adjustment: tuple[Array, Array] | None
    residual: Array | None = None


def ema(value: Array, new: Array, k: float) -> Array:
    """Moving average; `k` is the weight of the old value."""
    return value - (value - new) * (1 - k)


def feature_axes(axis: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """The kept axes, resolved to 0 .. rank - 1 and sorted."""
    axes = [axis] if isinstance(axis, int) else axis
    return tuple(sorted(a % rank for a in axes))


def parameter_shape(
    shape: Sequence[int], axis: int | Sequence[int], virtual_batch_size: int | None = None
) -> tuple[int, ...]:
    """Shape of gamma, beta and every statistic for an input of this shape."""
    features = feature_axes(axis, len(shape))
    if len(features) == 1 and virtual_batch_size is None:
        return (shape[features[0]],)
    kept = [n if i in features else 1 for i, n in enumerate(shape)]
    if virtual_batch_size is not None:
        kept.insert(1, 1)
    return tuple(kept)


def fused_eligible(
    rank: int,
    axis: int | Sequence[int],
    dtype: str,
    *,
    renorm: bool = False,
    virtual_batch_size: int | None = None,
    adjustment: Any = None,
) -> bool:
    """Whether TensorFlow has a fused kernel for this configuration."""
    features = feature_axes(axis, rank)
    return (
        not renorm
        and virtual_batch_size is None
        and adjustment is None
        and len(features) == 1
        and dtype in ("float16", "bfloat16", "float32")
        and (rank, features[0]) in [(4, 1), (4, 3), (5, 1), (5, 4)]
    )


def spread_mask(mask: ArrayLike | None, shape: Sequence[int], features: Sequence[int]) -> Array:
    """`mask` as float64 weights of the input's shape; ones when there is none."""
    if mask is None:
        return np.ones(shape)
    w = np.asarray(mask, dtype=np.float64)
    if w.ndim < len(shape):
        plain = len(shape) - len(features)
        w = w.reshape(w.shape + (1,) * (plain - w.ndim))
        w = np.expand_dims(w, tuple(features))
    return np.broadcast_to(w, shape)


def sum_to(value: Array, shape: Sequence[int]) -> Array:
    """Gradient of broadcasting: the sum of `value` over what `shape` was broadcast along."""
    value = value.sum(axis=tuple(range(value.ndim - len(shape))))
    stretched = tuple(i for i, n in enumerate(shape) if n == 1 and value.shape[i] != 1)
    return value.sum(axis=stretched, keepdims=True)


def divide(numerator: Array, denominator: Array) -> Array:
    """Quotient, 0 where the denominator is 0: a statistic without a valid element has mean and variance 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)


def activate(z: Array, activation: str | None) -> Array:
    """0 where z is not positive; NaN stays NaN."""
    return z if activation is None else np.where(z <= 0, 0.0, z)


@dataclass
class Step:
    """One forward pass: everything its backward pass needs.

    Shapes: x, w, x_hat have the viewed shape ([V, G, ...] for virtual batches, else the input's); W, mean,
    var, sigma, r, d, gamma, beta broadcast against it. a and b broadcast against the input.
    """

    x: Array
    w: Array
    W: Array
    mean: Array
    var: Array
    sigma: Array
    x_hat: Array
    r: Array | float
    d: Array | float
    d_terms: Array | float  # (|mean| + |renorm_mean|) / RS, which bounds the rounding error of d
    a: Array | None
    b: Array | None
    gamma: Array
    beta: Array
    axes: tuple[int, ...]
    frozen: bool
    center: bool
    scale: bool
    input_shape: tuple[int, ...]
    parameter_shape: tuple[int, ...]
    residual: Array | None = None
    activation: str | None = None
    gate: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if self.gate is None:
            self.gate = np.ones(self.input_shape, bool) if self.activation is None else ~(self.z <= 0)

    @property
    def adjusted(self) -> Array:
        """(x_hat * r + d) * a + b"""
        z = self.x_hat * self.r + self.d
        return z if self.a is None else z * self.a + self.b

    @property
    def z(self) -> Array:
        """What the activation gets."""
        z = (self.adjusted * self.gamma + self.beta).reshape(self.input_shape)
        return z if self.residual is None else z + self.residual

    @property
    def y(self) -> Array:
        return activate(self.z, self.activation)

    def gated(self, dy: ArrayLike) -> Array:
        """The gradient of z."""
        return np.where(self.gate, np.asarray(dy, dtype=np.float64), 0.0)

    def gradients(self, dy: ArrayLike) -> Gradients:
        """Gradients of sum(y * dy); r and d are constants."""
        dz = self.gated(dy)
        dy = dz.reshape(self.x.shape)
        a = 1.0 if self.a is None else self.a
        g = dy * self.gamma * a * self.r
        return Gradients(
            inputs=self._input_gradient(g).reshape(self.input_shape),
            gamma=self._parameter_sum(dy * self.adjusted) if self.scale else None,
            beta=self._parameter_sum(dy) if self.center else None,
            adjustment=self._adjustment_gradient(dy),
            residual=None if self.residual is None else dz,
        )

    def _input_gradient(self, g: Array) -> Array:
        if self.frozen:
            return g / self.sigma
        sum_g = g.sum(axis=self.axes, keepdims=True)
        sum_g_x_hat = (g * self.x_hat).sum(axis=self.axes, keepdims=True)
        share = divide(self.w, np.broadcast_to(self.W, self.w.shape))
        return (g - share * (sum_g + self.x_hat * sum_g_x_hat)) / self.sigma

    def _adjustment_gradient(self, dy: Array) -> tuple[Array, Array] | None:
        if self.a is None or self.b is None:
            return None
        z = self.x_hat * self.r + self.d
        return sum_to(dy * self.gamma * z, self.a.shape), sum_to(dy * self.gamma, self.b.shape)

    def _parameter_sum(self, values: Array) -> Array:
        """Sum over everything a parameter is shared by: the reduced axes and all groups."""
        return sum_to(values, self.gamma.shape).reshape(self.parameter_shape)


@dataclass
class Reference:
    """The layer: options, weights and state, all float64.

    `version` is 2 for Keras's V2 layer and 1 for TensorFlow 1's; it decides what `trainable=False` and
    `fused=True` mean. `dtype` is the compute dtype, which only the choice of Bessel's correction looks at.
    """

    axis: int | Sequence[int] = -1
    momentum: float | None = 0.99
    epsilon: float = 1e-3
    center: bool = True
    scale: bool = True
    renorm: bool = False
    renorm_clipping: dict[str, Any] | None = None
    renorm_momentum: float = 0.99
    fused: bool | None = None
    trainable: bool = True
    virtual_batch_size: int | None = None
    adjustment: Callable[[tuple[int, ...]], tuple[ArrayLike, ArrayLike]] | None = None
    bessel_correction: bool | None = None
    activation: str | None = None
    debias: bool = False
    dtype: str = "float32"
    version: int = 2

    def build(self, shape: Sequence[int]) -> "Reference":
        """Create parameters and state at TensorFlow's initial values."""
        self.rank = len(shape)
        self.features = feature_axes(self.axis, self.rank)
        self.parameter_shape = parameter_shape(shape, self.axis, self.virtual_batch_size)
        self.gamma = np.ones(self.parameter_shape)
        self.beta = np.zeros(self.parameter_shape)
        self.moving_mean = np.zeros(self.parameter_shape)
        self.moving_variance = np.ones(self.parameter_shape)
        if self.renorm:
            self.moving_stddev = np.sqrt(self.moving_variance)
            self.renorm_mean = self.moving_mean.copy()
            self.renorm_stddev = np.sqrt(self.moving_variance)
        self.seen = np.zeros(self.parameter_shape)  # the weight of the batches in the averages of each statistic
        return self

    @property
    def weight_names(self) -> list[str]:
        """Names in TensorFlow's order."""
        names = ["gamma"] * self.scale + ["beta"] * self.center + ["moving_mean", "moving_variance"]
        return names + ["moving_stddev", "renorm_mean", "renorm_stddev"] * self.renorm

    def get_weights(self) -> list[Array]:
        return [getattr(self, name) for name in self.weight_names]

    def set_weights(self, weights: Sequence[ArrayLike]) -> None:
        for name, value in zip(self.weight_names, weights, strict=True):
            setattr(self, name, np.array(value, dtype=np.float64).reshape(self.parameter_shape))

    # --- forward ------------------------------------------------------------

    def __call__(
        self,
        x: ArrayLike,
        training: bool | None = None,
        mask: ArrayLike | None = None,
        update_statistics: bool = True,
        residual: ArrayLike | None = None,
    ) -> Step:
        """One call of the layer; y and the gradients are the result's."""
        frozen = not training or (self.version == 2 and not self.trainable)
        if frozen:
            return self.inference(x, residual)
        return self.training(x, mask, update_statistics and self.trainable, residual)

    def inference(self, x: ArrayLike, residual: ArrayLike | None = None) -> Step:
        x = np.asarray(x, dtype=np.float64)
        # Any batch size: each sample is a group of its own, as TensorFlow 2 does it.
        view = (len(x), 1, *x.shape[1:]) if self.virtual_batch_size is not None else x.shape
        mean, var = self._spread(self.moving_mean), self._spread(self.moving_variance)
        sigma = np.sqrt(var + self.epsilon)
        viewed = x.reshape(view)
        return self._step(
            x=viewed,
            w=np.ones(view),
            W=np.ones_like(mean),
            mean=mean,
            var=var,
            sigma=sigma,
            x_hat=(viewed - mean) / sigma,
            r=1.0,
            d=0.0,
            d_terms=0.0,
            a=None,
            b=None,
            frozen=True,
            input_shape=x.shape,
            residual=residual,
        )

    def training(
        self,
        x: ArrayLike,
        mask: ArrayLike | None = None,
        update_statistics: bool = True,
        residual: ArrayLike | None = None,
    ) -> Step:
        x = np.asarray(x, dtype=np.float64)
        w = spread_mask(mask, x.shape, self.features)
        a = b = None
        if self.adjustment is not None:
            a, b = (np.asarray(v, dtype=np.float64) for v in self.adjustment(x.shape))
        viewed, w = self._split(x), self._split(w)
        W, mean, var = self.moments(viewed, w)
        sigma = np.sqrt(var + self.epsilon)
        r, d, d_terms = self.renorm_correction(W, mean, var) if self.renorm else (1.0, 0.0, 0.0)
        step = self._step(
            x=viewed,
            w=w,
            W=W,
            mean=mean,
            var=var,
            sigma=sigma,
            x_hat=(viewed - mean) / sigma,
            r=r,
            d=d,
            d_terms=d_terms,
            a=a,
            b=b,
            frozen=False,
            input_shape=x.shape,
            residual=residual,
        )
        if update_statistics and x.size:
            self._update(W, mean, var * self._bessel(W, (w**2).sum(axis=self._reduced_axes(), keepdims=True)))
        return step

    def output(
        self, x: Array, mask: ArrayLike | None, r: Any, d: Any, a: Any, b: Any, residual: Array | float = 0.0
    ) -> Array:
        """y of a training step for given r, d, a and b: the function whose derivative `Step.gradients` is."""
        w = self._split(spread_mask(mask, x.shape, self.features))
        viewed = self._split(x)
        _, mean, var = self.moments(viewed, w)
        x_hat = (viewed - mean) / np.sqrt(var + self.epsilon)
        y = ((x_hat * r + d) * a + b) * self._spread(self.gamma) + self._spread(self.beta)
        return activate(y.reshape(x.shape) + residual, self.activation)

    def moments(self, x: Array, w: Array) -> tuple[Array, Array, Array]:
        """W, mean and biased variance of each statistic, reduced dimensions kept."""
        axes = self._reduced_axes()
        W = w.sum(axis=axes, keepdims=True)
        mean = divide((w * x).sum(axis=axes, keepdims=True), W)
        var = divide((w * (x - mean) ** 2).sum(axis=axes, keepdims=True), W)
        return W, mean, var

    # --- renorm ------------------------------------------------------------

    def renorm_correction(self, W: Array, mean: Array, var: Array) -> tuple[Array, Array, Array]:
        """r and d, clipped, from the state before this step; and the size of d's terms."""
        mean, var = self._group_average(W, mean), self._group_average(W, var)
        renorm_mean = self._spread(self.renorm_mean)
        renorm_stddev = np.maximum(self._spread(self.renorm_stddev), np.sqrt(self.epsilon))
        r = np.sqrt(var + self.epsilon) / renorm_stddev
        d = (mean - renorm_mean) / renorm_stddev
        bounds = {k: v() if callable(v) else v for k, v in (self.renorm_clipping or {}).items()}
        rmax, rmin, dmax = bounds.get("rmax", np.inf), bounds.get("rmin", 0.0), bounds.get("dmax", np.inf)
        r = np.minimum(np.maximum(r, rmin), rmax)
        d = np.minimum(np.maximum(d, -dmax), dmax)
        return r, d, (np.abs(mean) + np.abs(renorm_mean)) / renorm_stddev

    # --- moving statistics ------------------------------------------------------------

    def counts_as_fused(self) -> bool:
        """Whether TensorFlow would run its fused kernel, and with it Bessel's correction."""
        eligible = fused_eligible(
            self.rank,
            self.axis,
            self.dtype,
            renorm=self.renorm,
            virtual_batch_size=self.virtual_batch_size,
            adjustment=self.adjustment,
        )
        if self.version == 2 and self.fused and not eligible:
            raise ValueError("fused=True is impossible here")
        return self.fused is not False and eligible

    def _bessel(self, W: Array, squares: Array) -> Array | float:
        """m / (m - 1) for m values of equal weight, W / (W - sum w^2 / W) for others; 1 where one has all weight."""
        correct = self.counts_as_fused() if self.bessel_correction is None else self.bessel_correction
        if not correct or self.renorm:
            return 1.0
        m = divide(W**2, squares)
        return np.where(m > 1 + 1e-9, m / np.where(m > 1 + 1e-9, m - 1, 1), 1.0)

    def _update(self, W: Array, mean: Array, var: Array) -> None:
        """var: with Bessel's correction."""
        k: Any = self.momentum
        if self.debias or k is None:  # a cumulative average forgets nothing, and every batch has the weight 1
            kept, own = self._spread(self.seen) * (1.0 if k is None else k), 1.0 if k is None else 1 - k
            k = np.where(kept + own > 0, divide(kept, kept + own), 1.0)
            self._store("seen", W, kept + own)
        batch_mean = self._group_average(W, mean)
        if self.renorm:
            s = np.sqrt(self._group_average(W, var) + self.epsilon)
            self._move("renorm_mean", W, batch_mean, self.renorm_momentum)
            self._move("renorm_stddev", W, s, self.renorm_momentum)
            self._move("moving_mean", W, batch_mean, k)
            self._move("moving_stddev", W, s, k)
            self._store("moving_variance", W, np.maximum(self._spread(self.moving_stddev) ** 2 - self.epsilon, 0))
        else:
            self._move("moving_mean", W, batch_mean, k)
            self._move("moving_variance", W, self._group_average(W, var), k)

    def _move(self, name: str, W: Array, new: Array, k: float | Array) -> None:
        self._store(name, W, ema(self._spread(getattr(self, name)), new, k))

    def _store(self, name: str, W: Array, new: Array) -> None:
        """Assign one state variable, where its statistic has a valid element."""
        old = self._spread(getattr(self, name))
        setattr(self, name, np.where(self._group_any(W > 0), new, old).reshape(self.parameter_shape))

    # --- shapes ------------------------------------------------------------

    def _split(self, x: Array) -> Array:
        """[N, ...] -> [V, G, ...] for virtual batches: sample n is in group n mod G."""
        V = self.virtual_batch_size
        if V is None:
            return x
        if len(x) % V:
            raise ValueError(f"virtual_batch_size {V} does not divide {len(x)}")
        return x.reshape((V, len(x) // V, *x.shape[1:]))

    def _reduced_axes(self) -> tuple[int, ...]:
        """Axes of the viewed input that are summed; the groups' axis is not."""
        if self.virtual_batch_size is None:
            return tuple(i for i in range(self.rank) if i not in self.features)
        return tuple(i for i in range(self.rank + 1) if i != 1 and i - 1 not in self.features)

    def _spread(self, v: Array) -> Array:
        """A parameter or statistic with ones in the reduced dimensions."""
        if len(self.parameter_shape) > 1:
            return v
        shape = [1] * self.rank
        shape[self.features[0]] = v.size
        return v.reshape(shape)

    def _group_average(self, W: Array, v: Array) -> Array:
        """Plain average over the groups that have a valid element."""
        if self.virtual_batch_size is None:
            return v
        valid = (W > 0).astype(np.float64)
        return divide((v * valid).sum(axis=1, keepdims=True), valid.sum(axis=1, keepdims=True))

    def _group_any(self, valid: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return valid if self.virtual_batch_size is None else valid.any(axis=1, keepdims=True)

    def _step(self, residual: ArrayLike | None, **arrays: Any) -> Step:
        return Step(
            **arrays,
            residual=None if residual is None else np.asarray(residual, dtype=np.float64),
            activation=self.activation,
            gamma=self._spread(self.gamma) if self.scale else np.ones_like(self._spread(self.gamma)),
            beta=self._spread(self.beta) if self.center else np.zeros_like(self._spread(self.beta)),
            axes=self._reduced_axes(),
            center=self.center,
            scale=self.scale,
            parameter_shape=self.parameter_shape,
        )


def synchronized_gradients(layer: Reference, shards: Sequence[ArrayLike], dys: Sequence[ArrayLike]) -> list[Gradients]:
    """Gradients on each of several ranks that share one batch: dx from sums over all ranks, the rest local.

    `layer` must not use virtual batches, an adjustment or axis 0. Its state is not changed.
    """
    cuts = np.cumsum([len(np.asarray(s)) for s in shards])[:-1]
    whole = layer.training(np.concatenate(shards), update_statistics=False)
    dx = np.split(whole.gradients(np.concatenate(dys)).inputs, cuts)
    adjusted = np.split(whole.adjusted, cuts)
    shape = whole.gamma.shape
    return [
        Gradients(
            inputs=dx_rank,
            gamma=sum_to(np.asarray(dy) * z, shape).reshape(layer.parameter_shape) if layer.scale else None,
            beta=sum_to(np.asarray(dy, dtype=np.float64), shape).reshape(layer.parameter_shape)
            if layer.center
            else None,
            adjustment=None,
        )
        for dx_rank, dy, z in zip(dx, dys, adjusted, strict=True)
    ]
