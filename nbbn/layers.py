"""The layer: weights, state, config. What it computes is the Dispatcher's."""

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from nbbn import constraints, dtypes, folding, initializers, regularizers
from nbbn.dispatcher import Dispatcher
from nbbn.kernels import channel
from nbbn.layout import Sizes, resolve_axis
from nbbn.operands import Array, as_adjustment, as_input, as_residual, as_weights, check_out
from nbbn.options import Options
from nbbn.placement import Placed
from nbbn.pullback import Gradients, Record, pull_back
from nbbn.variables import PARAMETERS, PARTS, STATISTICS, Shapes, Variables

_INITIALIZERS = ("beta_initializer", "gamma_initializer", "moving_mean_initializer", "moving_variance_initializer")
_REGULARIZERS = ("beta_regularizer", "gamma_regularizer")
_CONSTRAINTS = ("beta_constraint", "gamma_constraint")
# What other frameworks put into a config and what has no effect here.
_FOREIGN_KEYS = ("batch_input_shape", "build_input_shape", "synchronized")


_named = itertools.count()


def _variable(name: str) -> property:
    """The attribute of a layer for one of its variables; None where it has no such variable."""

    def get(self: "BatchNormalization") -> Array | None:
        v = self._variables
        return None if v is None or name not in v.names else v[name]

    def assign(self: "BatchNormalization", value: Any) -> None:
        v = self._built_variables(f"setting {name}")
        if name not in v.names:
            raise AttributeError(f"{self.name} has no {name}")
        v.assign({name: v.check(name, value)})

    return property(get, assign)


class BatchNormalization(Placed):
    """Batch normalization with every option of TensorFlow 1 and 2, on NumPy arrays.

        y = (x - mean) / sqrt(variance + epsilon) * gamma + beta

    In training the mean and (biased) variance are those of the batch, and moving averages of them are kept; in
    inference they are the moving averages.

    Args:
        axis: int or list of ints: the feature axes, which keep statistics of their own; all others are reduced.
        momentum: weight of the OLD value in the moving averages, 0 to 1 (PyTorch's momentum is the weight of the new
            value). None averages all training calls with equal weight.
        epsilon: added to the variance.
        center, scale: whether there is a beta, a gamma.
        beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer: Keras name,
            config, object or callable f(shape, dtype).
        beta_regularizer, gamma_regularizer: Keras name, config, object or callable; see `losses`.
        beta_constraint, gamma_constraint: likewise; applied by apply_constraints(), after an optimizer's step.
        renorm: batch renormalization (Ioffe, 2017).
        renorm_clipping: dict with any of "rmax", "rmin", "dmax": numbers, or callables without arguments read at
            each step.
        renorm_momentum: weight of the old value in the statistics that renorm normalizes with.
        fused: True demands that TensorFlow's fused kernel could do this call (ValueError otherwise), False that it
            is not; this decides about Bessel's correction only. None: whatever is possible.
        trainable: a layer that is not trainable normalizes with its moving statistics, also in training.
        virtual_batch_size: ghost batches: sample n is normalized with the samples of its group, n mod (N /
            virtual_batch_size).
        adjustment: callable of the input's shape that returns (a, b); in training x_hat becomes x_hat * a + b.
        name: a unique one is made if it is None.
        dtype: "float16", "bfloat16", "float32" or "float64": inputs are cast to it. None follows the input.
            Parameters and statistics are float32 for 16-bit dtypes.
        bessel_correction: whether the moving variance is the unbiased one. None does what TensorFlow does for this
            input: yes where its fused kernel runs (rank 4 or 5, one channel axis, not float64, none of the options
            above), else no.
        activation: "relu" makes the output max(y, 0), after a `residual` of the call is added; None is none. Neither
            costs another pass over memory.

    The attributes gamma, beta, moving_mean, moving_variance and with renorm moving_stddev, renorm_mean,
    renorm_stddev are arrays in TensorFlow's shapes: (C,) for one axis, else the input's rank with 1 in every reduced
    dimension, and with virtual batches one more 1 at index 1. gamma and beta may be changed in place; a training
    call replaces the moving statistics by new arrays, all at once, so that another thread never sees a mix.

    Raises: TypeError, ValueError for arguments that are not possible; the message names the argument and its value.
    """

    _STRICT_FUSED = True
    _FREEZES = True  # trainable=False means inference

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: Mapping[str, float | Callable[[], float]] | None = None,
        renorm_momentum: float = 0.99,
        fused: bool | None = None,
        trainable: bool = True,
        virtual_batch_size: int | None = None,
        adjustment: Callable[[tuple[int, ...]], tuple[Any, Any]] | None = None,
        name: str | None = None,
        *,
        dtype: Any = None,
        bessel_correction: bool | None = None,
        activation: str | None = None,
    ) -> None:
        options = Options(
            axis=axis,  # type: ignore[arg-type]  # Options takes any sequence and stores a tuple
            momentum=momentum,
            epsilon=epsilon,
            renorm=bool(renorm),
            renorm_clipping=renorm_clipping,
            renorm_momentum=renorm_momentum,
            fused=fused,
            virtual_batch_size=virtual_batch_size,
            adjustment=adjustment,
            bessel_correction=bessel_correction,
            activation=activation,
            dtype=None if dtype is None else dtypes.resolve(dtype),
            strict_fused=self._STRICT_FUSED,
        )
        self._dispatcher = Dispatcher(options)
        self._dtype = options.dtype
        self._is_special = options.virtual_batch_size is not None or options.adjustment is not None
        self._known: tuple[Sizes, np.dtype] | None = None  # shape and dtype of the last input, once built
        self.axis: int | list[int] = list(options.axis) if isinstance(options.axis, tuple) else options.axis
        self.center, self.scale = bool(center), bool(scale)
        self.beta_initializer = initializers.get(beta_initializer)
        self.gamma_initializer = initializers.get(gamma_initializer)
        self.moving_mean_initializer = initializers.get(moving_mean_initializer)
        self.moving_variance_initializer = initializers.get(moving_variance_initializer)
        self.beta_regularizer = regularizers.get(beta_regularizer)
        self.gamma_regularizer = regularizers.get(gamma_regularizer)
        self.beta_constraint = constraints.get(beta_constraint)
        self.gamma_constraint = constraints.get(gamma_constraint)
        self.trainable = trainable
        self.name = self._unique_name() if name is None else str(name)
        super().__init__()

    def _unique_name(self) -> str:
        n = next(_named)
        return f"batch_normalization_{n}" if n else "batch_normalization"

    # -- what was asked for ------------------------------------------------------------------------------------------

    @property
    def options(self) -> Options:
        return self._dispatcher.options

    momentum = property(lambda self: self.options.momentum)
    epsilon = property(lambda self: self.options.epsilon)
    renorm = property(lambda self: self.options.renorm)
    renorm_clipping = property(lambda self: self.options.renorm_clipping)
    renorm_momentum = property(lambda self: self.options.renorm_momentum)
    fused = property(lambda self: self.options.fused)
    virtual_batch_size = property(lambda self: self.options.virtual_batch_size)
    adjustment = property(lambda self: self.options.adjustment)
    bessel_correction = property(lambda self: self.options.bessel_correction)
    activation = property(lambda self: self.options.activation)

    @property
    def trainable(self) -> bool:
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._trainable = bool(value)

    @property
    def dtype(self) -> str | None:
        """The name of the dtype that inputs are cast to; None follows the input."""
        return None if self.options.dtype is None else self.options.dtype.name

    def __repr__(self) -> str:
        v = self._variables
        shape = f", parameters {v.shapes.params} {v.shapes.dtype.name}" if v else ""
        return f"<{type(self).__name__} {self.name}: axis={self.axis}{shape}>"

    # -- building ----------------------------------------------------------------------------------------------------

    @property
    def built(self) -> bool:
        return self._variables is not None

    def build(self, input_shape: Iterable[int | None]) -> None:
        """Create the weights for inputs of this shape; None stands for an unknown dimension. Does nothing when built.

        Raises: ValueError if an axis is out of range, occurs twice, or its dimension is unknown.
        """
        if self._variables is None:
            self._build(self._derive_shapes(tuple(input_shape), self.options.dtype or np.dtype(np.float32)))

    def _derive_shapes(self, shape: tuple[int | None, ...], dtype: np.dtype) -> Shapes:
        if not shape:
            raise ValueError(f"inputs must have at least one dimension; received shape {shape}")
        axis = resolve_axis(self.options.resolved_axis(), len(shape))
        unknown = [a for a in axis if shape[a] is None]
        if unknown:
            raise ValueError(
                f"the dimension of axis {unknown[0]} must be known to build the layer; received shape {shape}"
            )
        virtual = self.virtual_batch_size is not None
        if virtual and 0 in axis:
            raise ValueError(
                f"axis must not include the batch dimension 0 with virtual_batch_size; received axis={self.axis}"
            )
        self.options.check_fused(len(shape), dtype)
        features = {a: int(shape[a]) for a in axis}  # type: ignore[arg-type]
        if len(axis) == 1 and not virtual:
            params: Sizes = (features[axis[0]],)
        else:
            params = tuple(features.get(i, 1) for i in range(len(shape)))
            params = (params[0], 1, *params[1:]) if virtual else params
        return Shapes(len(shape), features, params, dtypes.statistic(dtype))

    def _build(self, shapes: Shapes) -> Variables:
        with self._building:
            if self._variables is None:
                self._variables = self._make_variables(shapes)
            return self._variables

    def _make_variables(self, shapes: Shapes) -> Variables:
        def initial(initializer: Any) -> Array:
            return initializers.initialize(initializer, shapes.params, shapes.dtype)

        values = {"gamma": initial(self.gamma_initializer)} if self.scale else {}
        if self.center:
            values["beta"] = initial(self.beta_initializer)
        mean, variance = initial(self.moving_mean_initializer), initial(self.moving_variance_initializer)
        values |= {"moving_mean": mean, "moving_variance": variance}
        if self.renorm:
            sigma = np.sqrt(variance)
            values |= {"moving_stddev": sigma, "renorm_mean": mean, "renorm_stddev": sigma}
        return Variables(shapes, values)

    # -- inputs ------------------------------------------------------------------------------------------------------

    def _check_input(self, x: Array) -> Shapes:
        """The shapes of this input, which are the layer's if it is built. Raises: ValueError if they do not agree."""
        if self._variables is None:
            return self._derive_shapes(x.shape, x.dtype)
        shapes = self._variables.shapes
        if self._known != (x.shape, x.dtype):
            shapes.check_input(x.shape)
            self.options.check_fused(x.ndim, x.dtype)
            self._known = x.shape, x.dtype
        return shapes

    # -- calling -----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        inputs: Any,
        training: bool | None = None,
        mask: Any = None,
        update_statistics: bool = True,
        out: Array | None = None,
        residual: Any = None,
    ) -> Array:
        """The normalized input: an array of its shape and dtype.

        Args:
            inputs: float16, bfloat16, float32 or float64 array of the rank that the layer was built for; never changed.
            training: use the batch's statistics and update the moving ones. None means False.
            mask: bool or real weights >= 0 of the elements in the batch's statistics; broadcast against the non-feature
                dimensions, or of the input's rank. Ignored in inference.
            update_statistics: False leaves the moving statistics alone.
            out: an array for the result; may be `inputs` or `residual` itself.
            residual: array of the input's shape that is added to the normalized input, before the activation.
        Raises: TypeError, ValueError; the layer is then as it was.
        """
        if type(inputs) is np.ndarray and mask is None and residual is None and update_statistics:
            y = self._repeat(inputs, training, out)
            if y is not None:
                return y
        return self._forward(inputs, training, mask, update_statistics, out, residual)[0]

    def apply(self, *args: Any, **kwargs: Any) -> Array:
        """The same as calling the layer."""
        return self(*args, **kwargs)

    def vjp(
        self,
        inputs: Any,
        training: bool | None = None,
        mask: Any = None,
        update_statistics: bool = True,
        out: Array | None = None,
        residual: Any = None,
    ) -> tuple[Array, Callable[..., Gradients]]:
        """The normalized input, and a function from the gradient of the output to Gradients.

        The function, `pullback(dy, out=None)`, may be called any number of times, from any thread; `out` takes the
        gradient of the input. It refers to `inputs` and `residual`, which must not change until then; parameters and
        statistics are those of this call.
        """
        dtype = None
        if not self._is_for_gpu(inputs):
            x = as_input(inputs)
            dtype = x.dtype
            for kept in (x, residual):
                if isinstance(out, np.ndarray) and isinstance(kept, np.ndarray) and np.may_share_memory(out, kept):
                    raise ValueError(
                        "out must not share memory with inputs or residual in vjp(), because the gradient needs them"
                    )
        y, record = self._forward(inputs, training, mask, update_statistics, out, residual, keep=True)
        return y, lambda dy, out=None: self._pull_back(dy, record, out, dtype)

    def _repeat(self, x: Array, training: bool | None, out: Array | None) -> Array | None:
        """The output, if this call is like an earlier one: _forward() without what that has found out."""
        step, variables = "train" if self._uses_batch(training) else "infer", self._variables
        if variables is None or self._on_gpu is not None:
            return None
        repeat = self._dispatcher.known(step, x, variables.shapes)
        if repeat is None or (out is not None and not repeat.takes(out, x)):
            return None
        if step == "infer":
            return repeat.infer(x, out, variables.params, variables.state)
        with variables.lock:
            y, variables.state = repeat.train(x, out, variables.params, variables.state)
        return y

    def _uses_batch(self, training: bool | None) -> bool:
        if training is None or training is False:
            return False
        if training is not True and not isinstance(training, (int, np.bool_, np.integer)):
            raise TypeError(f"training must be True, False or None; received {training!r}")
        return bool(training) and (self._trainable or not self._FREEZES)

    def _forward(
        self,
        inputs: Any,
        training: bool | None,
        mask: Any,
        update: bool,
        out: Array | None,
        residual: Any,
        keep: bool = False,
    ) -> tuple[Array, Record]:
        """The output and its record; one to be kept, for a gradient, has parameters and statistics of its own."""
        if (type(inputs) is not np.ndarray or self._on_gpu is not None) and self._is_for_gpu(inputs):
            from nbbn.gpu import calls

            found = calls.forward(self, inputs, training, mask, update, out, residual, keep)
            return cast(tuple[Array, Record], found)
        x = as_input(inputs)
        if self._dtype is not None:
            x = x.astype(self._dtype, copy=False)
        shapes = self._check_input(x)
        if out is not None:
            check_out(out, x)
        if residual is not None:
            residual = as_residual(residual, x)
        dtype = dtypes.statistic(x.dtype)
        if not self._uses_batch(training):
            variables = self._variables or self._build(shapes)
            params, state = variables.params.astype(dtype, copy=keep), variables.state.astype(dtype, copy=keep)
            y = self._dispatcher.infer(x, params, state, residual=residual, out=out)
            if residual is None and not keep:
                self._dispatcher.remember("infer", x, out, variables.shapes)
            return y, Record(x, params, state, residual=residual)
        weights = adjustment = None
        if self._is_special:
            self._dispatcher.layout(x.shape, training=True)  # raises where a virtual batch does not fit
            if self.adjustment is not None:
                adjustment = as_adjustment(self.adjustment, x.shape, dtype)
        if mask is not None:
            weights = as_weights(mask, x.shape, tuple(shapes.features), dtype)
        hyper = self._hyper(x)
        variables = self._variables or self._build(shapes)
        params = variables.params.astype(dtype, copy=keep)
        # The lock makes the update one step of a sequence: threads that train one layer lose none.
        with variables.lock if update else contextlib.nullcontext():
            state = variables.state.astype(dtype, copy=False)
            y, new_state, saved = self._dispatcher.train(
                x, params, state, hyper, residual=residual, weights=weights, adjustment=adjustment, out=out
            )
            record = Record(x, params, state, saved, new_state, residual, weights, adjustment)
            if update and x.size:
                self._update(variables, record)
        if update and self.momentum is not None and record.is_plain() and not keep:
            self._dispatcher.remember("train", x, out, variables.shapes)
        return y, record

    def _hyper(self, x: Array) -> Array:
        hyper = self._dispatcher.hyper(x.ndim, x.dtype)
        return channel.keep_batch(hyper) if self.momentum is None else hyper

    def _update(self, variables: Variables, step: Record) -> None:
        """Make the statistics after a training step those of the layer. The caller holds the lock."""
        assert step.new_state is not None
        if self.momentum is None:
            variables.absorb(step.new_state, step.counted(), PARTS, self.options)
        else:
            variables.state = step.new_state.astype(variables.shapes.dtype, copy=False)

    def _pull_back(self, dy: Any, record: Record, out: Array | None, dtype: np.dtype | None) -> Gradients:
        """dtype: of the input, as it came; None of one on a GPU."""
        assert self._variables is not None
        if dtype is None:
            from nbbn.gpu import calls

            return calls.gradients(self, dy, cast(calls.DeviceRecord, record), out, self._variables.shapes)
        shapes = self._variables.shapes
        found, dparams = pull_back(self._dispatcher, record, dy, out, shapes)
        assert found.inputs is not None
        dgamma, dbeta = dparams.astype(shapes.dtype, copy=False).reshape(2, *shapes.params)
        return found._replace(
            inputs=found.inputs.astype(dtype, copy=False),
            gamma=dgamma if self.scale else None,
            beta=dbeta if self.center else None,
        )

    # -- weights -----------------------------------------------------------------------------------------------------

    gamma = _variable("gamma")
    beta = _variable("beta")
    moving_mean = _variable("moving_mean")
    moving_variance = _variable("moving_variance")
    moving_stddev = _variable("moving_stddev")
    renorm_mean = _variable("renorm_mean")
    renorm_stddev = _variable("renorm_stddev")

    def _built_variables(self, what: str) -> Variables:
        if self._variables is None:
            raise ValueError(f"{what} needs a built layer; call build(input_shape) first")
        return self._variables

    def _weights(self, names: Iterable[str]) -> list[Array]:
        v = self._variables
        return [] if v is None else [v[n] for n in v.names if n in names]

    @property
    def weights(self) -> list[Array]:
        """gamma, beta, moving_mean, moving_variance, with renorm moving_stddev, renorm_mean, renorm_stddev, as far
        as they exist; the order and the shapes are TensorFlow's."""
        return self._weights((*PARAMETERS, *STATISTICS))

    @property
    def trainable_weights(self) -> list[Array]:
        return self._weights(PARAMETERS if self.trainable else ())

    @property
    def non_trainable_weights(self) -> list[Array]:
        return self._weights(STATISTICS if self.trainable else (*PARAMETERS, *STATISTICS))

    variables = weights
    trainable_variables = trainable_weights
    non_trainable_variables = non_trainable_weights

    def get_weights(self) -> list[Array]:
        """Copies of the weights, as NumPy arrays."""
        if self._variables is None:
            return []
        host = self._variables.on_host()
        return [host[n].copy() for n in host.names]

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set all weights, in the order and shapes of get_weights(). Raises: ValueError if they do not fit."""
        variables = self._built_variables("set_weights()")
        names = variables.names
        if len(weights) != len(names):
            raise ValueError(f"set_weights() takes {len(names)} arrays ({', '.join(names)}); received {len(weights)}")
        variables.assign({n: variables.check(n, w) for n, w in zip(names, weights, strict=True)})

    def count_params(self) -> int:
        """The number of values in all weights. Raises: ValueError if the layer is not built."""
        variables = self._built_variables("count_params()")
        return len(variables.names) * math.prod(variables.shapes.params)

    def fold(self, dtype: Any = None) -> tuple[Array, Array]:
        """scale and shift of inference, y = x * scale + shift before any activation: see nbbn.folding."""
        return folding.scale_and_shift(self, dtype)

    # -- losses, updates, constraints --------------------------------------------------------------------------------

    def _regularized(self) -> list[tuple[Any, str, Array]]:
        pairs = [(self.gamma_regularizer, "gamma"), (self.beta_regularizer, "beta")]
        return [(r, n, w) for r, n in pairs if r is not None and (w := self._on_host(n)) is not None]

    def _on_host(self, name: str) -> Array | None:
        """A weight as a NumPy array; None where there is none."""
        variables = self._variables
        return None if variables is None or name not in variables.names else variables.on_host()[name]

    @property
    def losses(self) -> list[float]:
        """The regularization losses, one per regularized weight; they depend on no input."""
        return [regularizers.loss(r, w) for r, _, w in self._regularized()]

    def get_losses_for(self, inputs: Any = None) -> list[float]:
        """The losses that depend on `inputs`; None asks for those that depend on none."""
        return self.losses if inputs is None else []

    def regularization_gradients(self) -> Gradients:
        """The gradients of the sum of `losses` with respect to gamma and beta."""
        found = {n: regularizers.gradient(r, w) for r, n, w in self._regularized()}
        return Gradients(gamma=found.get("gamma"), beta=found.get("beta"))

    def apply_constraints(self) -> None:
        """Project gamma and beta onto their constraints: call it after an optimizer's step."""
        for constraint, name in ((self.gamma_constraint, "gamma"), (self.beta_constraint, "beta")):
            weight = self._on_host(name)
            if constraint is not None and weight is not None:
                setattr(self, name, constraints.project(constraint, weight))

    @property
    def updates(self) -> list[Any]:
        """Updates that wait to be run: none here, a training call applies its own (the V1 layers record theirs)."""
        return []

    def get_updates_for(self, inputs: Any) -> list[Any]:
        return []

    # -- config ------------------------------------------------------------------------------------------------------

    def compute_output_shape(self, input_shape: Iterable[int | None]) -> tuple[int | None, ...]:
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        """What from_config() needs: Keras's keys, and those of nbbn where they are set. JSON-serializable.

        Callables (adjustment, renorm_clipping values) cannot be serialized: they are left out with a warning.
        """
        config: dict[str, Any] = {"name": self.name, "trainable": self.trainable, "dtype": self.dtype}
        config |= {"axis": list(self.axis) if isinstance(self.axis, list) else self.axis}
        config |= {"momentum": self.momentum, "epsilon": self.epsilon, "center": self.center, "scale": self.scale}
        config |= {k: initializers.serialize(getattr(self, k)) for k in _INITIALIZERS}
        config |= {k: regularizers.serialize(getattr(self, k)) for k in _REGULARIZERS}
        config |= {k: constraints.serialize(getattr(self, k)) for k in _CONSTRAINTS}
        if self.renorm:
            config |= {"renorm": True, "renorm_clipping": self._clipping_config()}
            config |= {"renorm_momentum": self.renorm_momentum}
        optional = ("virtual_batch_size", "fused", "bessel_correction", "activation")
        config |= {k: getattr(self, k) for k in optional if getattr(self, k) is not None}
        clips = (self.renorm_clipping or {}).values()
        left_out = {"adjustment": callable(self.adjustment), "callables of renorm_clipping": any(map(callable, clips))}
        for what in (name for name, present in left_out.items() if present):
            message = f"the config of {self.name} leaves out the {what}, which cannot be serialized"
            warnings.warn(message, stacklevel=2)
        return config

    def _clipping_config(self) -> dict[str, float]:
        """The bounds that are numbers; an infinite one is none, and JSON knows no infinity."""
        numbers = {k: float(v) for k, v in (self.renorm_clipping or {}).items() if v is not None and not callable(v)}
        return {k: v for k, v in numbers.items() if np.isfinite(v)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "BatchNormalization":
        """A layer from get_config(), or from that of a Keras or tf_keras layer."""
        arguments = {k: v for k, v in config.items() if k not in _FOREIGN_KEYS}
        dtype = arguments.get("dtype")
        if isinstance(dtype, Mapping):  # Keras's serialized dtype policy
            dtype = arguments["dtype"] = dtype["config"]["name"]
        if isinstance(dtype, str):  # float32 parameters for 16-bit inputs are what "mixed" means
            arguments["dtype"] = dtype.removeprefix("mixed_")
        return cls(**arguments)
