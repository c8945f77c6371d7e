"""torch.nn's modules with nbbn's options."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.fx import Proxy

from nbbn.core.options import boolean
from nbbn.torch import calls, quick
from nbbn.torch.past import Past
from nbbn.torch.settings import FIXED, Momentum, as_text, check_clipping, check_momentum, numbers
from nbbn.torch.tensors import DTYPES, align

_transformed = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_traced = torch._C._get_tracing_state
_graph_task = torch._C._current_graph_task_id

# The buffers that options add to running_mean and running_var, in the order of the state's rows.
RENORM = ("running_stddev", "renorm_mean", "renorm_stddev")
DEBIAS = ("seen_mean", "seen_var")
OPTIONS = (
    *("axis", "renorm", "renorm_clipping", "renorm_momentum", "virtual_batch_size", "ragged", "virtual_batch_order"),
    *("adjustment", "activation", "bessel_correction", "debias", "skip_nonfinite"),
)
MAX_STEPS = 256  # geometries that a module remembers


class Normalization(nn.modules.batchnorm._BatchNorm):
    """What BatchNorm1d, 2d and 3d have in common.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as in torch.nn: momentum is the
            weight of the NEW value, None the average of all batches. It may also be a callable without arguments, read
            at each training call.
        axis: the dimension of the features. -1 takes inputs whose shape has them last.
        renorm: batch renormalization. Its statistics are the buffers running_stddev, renorm_mean and renorm_stddev;
            where a state_dict has none, they are made of running_mean and running_var, as are those of debias.
        renorm_clipping: dict with any of "rmax", "rmin", "dmax": numbers, or callables read at each training call.
        renorm_momentum: weight of the new value in the statistics that renorm normalizes with.
        virtual_batch_size, ragged, virtual_batch_order: ghost batches, as of nbbn.BatchNormalization.
        adjustment: callable of the input's shape that returns a pair (a, b) of tensors or numbers; in training x_hat
            becomes x_hat * a + b. They have gradients if they require them.
        activation: "relu" makes the output max(y, 0), after a residual is added, in the same pass over memory.
        bessel_correction: whether running_var is the unbiased variance. None is PyTorch's choice, True; with renorm
            there is no such thing.
        debias: running statistics that owe nothing to their initial values. Their weights are the buffers seen_mean and
            seen_var.
        skip_nonfinite: a batch that is not finite in a channel leaves the running statistics of that channel alone.

    The keys of a state_dict are torch.nn's, unless renorm or debias add theirs.

    Raises: TypeError, ValueError for arguments that are not possible; the message names the argument and its value.
    """

    _COPIED_WITHOUT: tuple[str, ...] = ("_collector", "_views", "_steps", "_past")

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Momentum = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        axis: int = 1,
        renorm: bool = False,
        renorm_clipping: Mapping[str, float | Callable[[], float]] | None = None,
        renorm_momentum: float | Callable[[], float] = 0.01,
        virtual_batch_size: int | None = None,
        ragged: str = "error",
        virtual_batch_order: str = "interleaved",
        adjustment: Callable[[tuple[int, ...]], tuple[Any, Any]] | None = None,
        activation: str | None = None,
        bessel_correction: bool | None = None,
        debias: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(f"axis must be an int, the dimension of the features; received {axis!r}")
        if momentum is not None:
            check_momentum("momentum", momentum)
        check_momentum("renorm_momentum", renorm_momentum)
        self._text = as_text(
            axis,
            renorm=renorm,
            renorm_clipping=renorm_clipping,
            virtual_batch_size=virtual_batch_size,
            ragged=ragged,
            virtual_batch_order=virtual_batch_order,
            adjustment=adjustment,
            activation=activation,
            bessel_correction=bessel_correction,
            debias=debias,
            skip_nonfinite=skip_nonfinite,
        )
        track_running_stats = boolean("track_running_stats", track_running_stats)
        if not track_running_stats and (renorm or debias):
            raise ValueError("renorm and debias are about running statistics; received track_running_stats=False")
        check_clipping(renorm_clipping, boolean("renorm", renorm))
        affine, bias = boolean("affine", affine), boolean("bias", bias)
        more = {} if bias else {"bias": False}
        self._extra = (RENORM if renorm else ()) + (DEBIAS if debias else ())
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype, **more)
        self.axis, self.renorm, self.renorm_clipping, self.renorm_momentum = (
            axis,
            renorm,
            renorm_clipping,
            renorm_momentum,
        )
        self.virtual_batch_size, self.ragged, self.virtual_batch_order = virtual_batch_size, ragged, virtual_batch_order
        self.adjustment, self.bessel_correction = adjustment, bessel_correction
        self.activation = None if activation == "linear" else activation
        self.debias, self.skip_nonfinite = boolean("debias", debias), boolean("skip_nonfinite", skip_nonfinite)
        for name in self._extra:
            self.register_buffer(name, torch.zeros(num_features, device=device, dtype=dtype))
        self._reset_extra()
        self._forget()

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises: AttributeError for another value of an option that what the module keeps was made for; TypeError,
        ValueError for a value that __init__ refuses."""
        if name in FIXED and value != self.__dict__.get(name, value):
            own = type(self).__name__
            raise AttributeError(
                f"{name} of a {own} is fixed, {self.__dict__[name]!r}: make another; received {value!r}"
            )
        if name == "renorm_clipping":
            check_clipping(value, self.renorm)
        elif name == "renorm_momentum" or (name == "momentum" and value is not None):
            check_momentum(name, value)
        super().__setattr__(name, value)

    # -- the state -----------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Have nothing that belongs to this object alone: copies and files have none of it."""
        self._views: quick.Views | None = None
        self._steps: dict[Any, quick.Step | None] = {}
        self._past = Past()
        self._collector: Callable[..., None] | None = None  # takes moments in the place of an update (accumulation.py)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self._COPIED_WITHOUT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        self._reset_extra()

    def _reset_extra(self) -> None:
        for name in self._extra:
            if name in self._buffers:  # not yet in torch's constructor
                buffer: Any = self._buffers[name]
                buffer.fill_(1.0 if name in ("running_stddev", "renorm_stddev") else 0.0)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Renorm and debiased averages go on from the statistics of a module without them."""
        if prefix + "running_mean" in state_dict and prefix + "running_var" in state_dict:
            mean, variance = state_dict[prefix + "running_mean"], state_dict[prefix + "running_var"]
            missing = self._missing(name.removeprefix(prefix) for name in state_dict if name.startswith(prefix))
            found = {prefix + name: value for name, value in self._extra_from(mean, variance, missing).items()}
            state_dict = state_dict.copy() | found
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_from_running(self, known: Iterable[str]) -> None:
        """Let the buffers of renorm and debias, unless they are among those known, go on from running_mean and
        running_var."""
        for name, value in self._extra_from(self.running_mean, self.running_var, self._missing(known)).items():
            getattr(self, name).copy_(value)

    def _missing(self, known: Iterable[str]) -> list[str]:
        """The buffers of options of which none is known: where some are, the others are an error."""
        known = set(known)
        return [name for group in (RENORM, DEBIAS) if not known.intersection(group) for name in group]

    def _extra_from(self, mean: Any, variance: Any, names: list[str]) -> dict[str, Tensor]:
        """What these of the module's buffers are in one that has had these statistics.

        An average that is not at its initial value is all of batches, for debiased ones: its weight is 1.
        """
        stddev = (variance.double() + self.eps).sqrt().to(variance.dtype)
        seen = ((mean != 0) | (variance != 1)).to(mean.dtype)
        found = dict(zip(RENORM + DEBIAS, (stddev, mean, stddev, seen, seen), strict=True))
        return {name: found[name].clone() for name in names if name in self._extra}

    def state_tensors(self) -> list[Tensor]:
        """The running statistics in the order of the state's rows; none if they are not tracked."""
        mean, variance = self.running_mean, self.running_var
        return [] if mean is None or variance is None else [mean, variance, *(getattr(self, n) for n in self._extra)]

    def tracks(self) -> bool:
        """Whether a call changes the running statistics. As in torch.nn, they may be there and left alone in training,
        where track_running_stats was set to False later."""
        return self.training and self.track_running_stats and self.running_mean is not None

    def options(self) -> dict[str, Any]:
        """What __init__ was given behind torch.nn's arguments."""
        return {name: getattr(self, name) for name in OPTIONS}

    def extra_repr(self) -> str:
        defaults = {"axis": 1, "renorm": False, "virtual_batch_size": None, "activation": None, "debias": False}
        changed = [
            f"{name}={getattr(self, name)!r}" for name, value in defaults.items() if getattr(self, name) != value
        ]
        return ", ".join([super().extra_repr(), *changed])

    # -- calls ---------------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The normalized input.

        Args:
            input: float16, bfloat16, float32 or float64, of the ranks that torch.nn's module takes.
            residual: tensor of the input's shape that is added to the normalized input, before the activation.
            mask: in training, bool or real weights >= 0 of what is in the batch's statistics. With fewer dimensions
                than the input it stands for the leading ones without features, as (N,) or (N, T); else it broadcasts.
        Raises: TypeError, ValueError; the running statistics are then as they were.
        """
        if is_compiling():
            return self._general(input, residual, mask)
        if type(input) is Tensor and mask is None and (residual is None or type(residual) is Tensor):
            found = self._at_once(input, residual)
            if found is not None:
                return found
        elif isinstance(input, Proxy):  # a leaf of torch.fx, as torch.nn's modules are
            tracer: Any = input.tracer
            if tracer.root is self:
                raise TypeError(f"torch.fx keeps a {type(self).__name__} as it is: trace a network that holds it")
            beside = {name: value for name, value in (("residual", residual), ("mask", mask)) if value is not None}
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), beside)
        return self._general(input, residual, mask)

    def _at_once(self, x: Tensor, residual: Tensor | None) -> Tensor | None:
        """The output, by a step that an earlier call has left; None where that does not do."""
        own = self.__dict__
        if _dispatch_modes() or _transformed() or _traced() is not None or forward_ad._current_level >= 0:
            return None
        if not x.is_cpu or x.is_neg() or own["_collector"] is not None or own["adjustment"] is not None:
            return None
        if x.layout is not torch.strided or x.is_nested or not x.data_ptr():  # 0: empty, or zeros without memory
            return None
        training, buffers, parameters = own["training"], own["_buffers"], own["_parameters"]
        try:
            weight, bias, mean = parameters["weight"], parameters["bias"], buffers["running_mean"]
            tensors = weight, bias, buffers["num_batches_tracked"], mean, buffers["running_var"]
            if own["_extra"]:
                tensors += tuple([buffers[name] for name in own["_extra"]])
        except KeyError:  # torch.nn.utils.parametrize computes them
            return None
        uses_batch, stride = training or mean is None, x.stride()
        key: tuple[Any, ...]  # of what decides about a step
        key = uses_batch, residual is not None, x.shape, x.dtype, stride, own["momentum"], own["eps"]
        if own["renorm"]:
            clipping = own["renorm_clipping"]
            key += own["renorm_momentum"], clipping and tuple(clipping.items())
        steps = own["_steps"]
        step = steps[key] if key in steps else self._prepare(key, x)
        if step is None:
            return None
        if residual is not None and not (
            residual.shape == x.shape
            and residual.stride() == stride
            and residual.dtype is x.dtype
            and residual.is_cpu
            and not residual.is_neg()
            and residual.data_ptr()
        ):
            return None
        views = own["_views"]
        if views is None or views.where != quick.where(tensors) or views.params.dtype != step.statistic:
            views = self._views_of(tensors, step)
        if views is None or views.params.shape[1] != step.channels:
            return None
        if not uses_batch:
            if not is_grad_enabled():
                return quick.infer(x, residual, step, views)
            return calls.infer(x, weight, bias, residual, mean, tensors[4], own["axis"], own["eps"], own["activation"])
        update = training and own["track_running_stats"] and mean is not None and _graph_task() == -1
        past = own["_past"] if own["renorm"] and training and own["track_running_stats"] else None
        if is_grad_enabled():
            y = quick.BatchNorm.apply(x, weight, bias, residual, step, views, update, past)
        else:
            y, _ = quick.train(x, residual, step, views, update, past)
        if update:
            views.count_one()
        return y

    def _prepare(self, key: Any, x: Tensor) -> quick.Step | None:
        """The step for calls like this one, kept; None where they need more than a step, or are not possible."""
        self._check_input_dim(x)
        self.check_features(x)
        uses_batch, residual, step = key[0], key[1], None
        clipping = self.renorm_clipping or {}
        given = self.momentum, self.renorm_momentum, *clipping.values()
        simple = self.momentum is not None and not any(map(callable, given))
        if uses_batch:
            calls.check_training(x, self.axis, self.eps)
        if x.dtype in DTYPES and (simple or not uses_batch):
            read = numbers(self.momentum, self.renorm_momentum, clipping) if uses_batch else numbers(0.0, 0.0, None)
            with contextlib.suppress(ValueError):
                step = quick.Step(x, uses_batch, residual, read, self._text, self.eps)
        if len(self._steps) >= MAX_STEPS:
            self._steps.clear()
        self._steps[key] = step
        return step

    def _views_of(self, tensors: Any, step: quick.Step) -> quick.Views | None:
        try:
            found = quick.Views(tensors, step)
        except ValueError:
            return None
        self._views = found
        return found

    def check_features(self, x: Tensor) -> None:
        """Raises: ValueError unless the input has as many features as the module."""
        if not -x.dim() <= self.axis < x.dim() or x.shape[self.axis] != self.num_features:
            raise ValueError(
                f"input must have num_features={self.num_features} in dimension {self.axis}; "
                f"received shape {tuple(x.shape)}"
            )

    def _general(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        calls.check_input(x)
        self._check_input_dim(x)
        if residual is not None:
            calls.check_like(residual, x)
        weight, bias, mean, variance = self.weight, self.bias, self.running_mean, self.running_var
        if _traced() is None:  # whose sizes are tensors
            self.check_features(x)
        calls.check_parameters(x, {"weight": weight, "bias": bias, "running_mean": mean, "running_var": variance})
        if not self.training and mean is not None and variance is not None:
            return calls.infer(x, weight, bias, residual, mean, variance, self.axis, self.eps, self.activation)
        calls.check_training(x, self.axis, self.eps)
        update = self.tracks() and (is_compiling() or _graph_task() == -1)
        weights = None if mask is None else align(mask, x, self.axis)
        beside = weights, *calls.adjustment_of(self.adjustment if self.training else None, x)
        given = numbers(self.momentum, self.renorm_momentum, self.renorm_clipping)
        y, saved = calls.train(
            x,
            weight,
            bias,
            residual,
            beside,
            self.state_tensors(),
            self.num_batches_tracked,
            given,
            self._text,
            self.eps,
            update=update and self._collector is None,
            equal=self.momentum is None,
            past=self._past if self.renorm and self.tracks() and self._collector is None else None,
        )
        if self._collector is not None and update:
            self._collector(saved, x, given)
        return y


class BatchNorm1d(Normalization, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d, of (N, C) or (N, C, L), with nbbn's options; see Normalization."""


class BatchNorm2d(Normalization, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d, of (N, C, H, W), with nbbn's options; see Normalization."""


class BatchNorm3d(Normalization, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d, of (N, C, D, H, W), with nbbn's options; see Normalization."""
