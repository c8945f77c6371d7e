"""The layer: Keras's, but for what it does in training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import initializers, ops
from keras.src.backend import get_keras_mask  # what a Masking layer has left on a tensor; Keras exports nothing for it

from nbbn.core.layout import Sizes, resolve_axis
from nbbn.core.options import Momentum, Options, boolean
from nbbn.keras import asked
from nbbn.keras.asked import FIXED, Beside, without_callables


def _trainer() -> Callable[[Any, Any, Beside], Any]:
    """Training by the backend of this process. Raises: RuntimeError for one that trains nothing."""
    name = keras.backend.backend()
    if name == "torch":
        from nbbn.keras.on_torch import train as on_torch

        return on_torch
    if name == "jax":
        from nbbn.keras.on_jax import train as on_jax

        return on_jax
    if name == "tensorflow":
        from nbbn.keras.on_tensorflow import train as on_tensorflow

        return on_tensorflow
    if name == "numpy":
        from nbbn.keras.on_numpy import train as on_numpy

        return on_numpy
    raise RuntimeError(f"Keras's backend must be torch, jax, tensorflow or numpy; it is {name}")


_train = _trainer()


@keras.saving.register_keras_serializable(package="nbbn")
class BatchNormalization(keras.layers.BatchNormalization):
    """keras.layers.BatchNormalization with nbbn's kernels in training, and nbbn's options.

    Args:
        axis to renorm_momentum: as in Keras: momentum is the weight of the OLD value, and the moving variance is the
            biased one. axis may also be a list of ints: their combinations have statistics of their own, and weights
            have the input's rank, with 1 in every reduced dimension. momentum may also be None, which averages all
            batches alike; momenta and the values of renorm_clipping may be callables without arguments, read at each
            training call. A callable gives a number or a keras.Variable; a program that JAX compiles is told what a
            callable says in its first call alone, so there it has to be a keras.Variable of the model.
        virtual_batch_size, ragged, virtual_batch_order: ghost batches, as of nbbn.BatchNormalization.
        adjustment: callable of the input's shape that returns a pair (a, b) of tensors or numbers; in training x_hat
            becomes x_hat * a + b. They have gradients. A config leaves it out.
        activation: "relu" makes the output max(y, 0), after a residual is added; None or "linear" is none.
        bessel_correction: whether the moving variance is the unbiased one. None is Keras's choice, False.
        debias: moving statistics that owe nothing to their initial values.
        skip_nonfinite: a batch that is not finite in a channel leaves the moving statistics of that channel alone.
        **kwargs: of keras.layers.Layer. synchronized=True is a ValueError: each replica has its own statistics.

    With momentum=None or debias there are two more weights, seen_mean and seen_variance: the weight of the batches in
    each average.

    Raises: TypeError, ValueError for arguments that are not possible; the message names the argument and its value.
    """

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        momentum: Momentum | None = 0.99,
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
        renorm_momentum: Momentum = 0.99,
        synchronized: bool = False,
        *,
        virtual_batch_size: int | None = None,
        ragged: str = "error",
        virtual_batch_order: str = "interleaved",
        adjustment: Callable[[tuple[int, ...]], tuple[Any, Any]] | None = None,
        activation: str | None = None,
        bessel_correction: bool | None = None,
        debias: bool = False,
        skip_nonfinite: bool = False,
        **kwargs: Any,
    ) -> None:
        if synchronized:
            raise ValueError(
                "synchronized must be False: each replica has its own statistics; received synchronized=True"
            )
        is_mapping = isinstance(renorm_clipping, Mapping)
        super().__init__(
            momentum=0.99,
            epsilon=epsilon,
            center=boolean("center", center),
            scale=boolean("scale", scale),
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            moving_mean_initializer=moving_mean_initializer,
            moving_variance_initializer=moving_variance_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            renorm=boolean("renorm", renorm),
            renorm_clipping=without_callables(renorm_clipping) if is_mapping else None,
            **kwargs,
        )
        options = Options(
            axis=axis,  # type: ignore[arg-type]  # Options takes any sequence and stores a tuple
            momentum=momentum,
            epsilon=epsilon,
            renorm=renorm,
            renorm_clipping=renorm_clipping,
            renorm_momentum=renorm_momentum,
            virtual_batch_size=virtual_batch_size,
            ragged=ragged,
            virtual_batch_order=virtual_batch_order,
            adjustment=adjustment,
            activation=activation,
            bessel_correction=False if bessel_correction is None else bessel_correction,
            debias=debias,
            skip_nonfinite=skip_nonfinite,
            fused=False,
        )
        for name in ("momentum", "renorm_momentum", "renorm_clipping", "adjustment", *FIXED):
            setattr(self, name, getattr(options, name))
        self.axis = list(options.axis) if isinstance(options.axis, tuple) else options.axis
        self.moving_stddev = self.renorm_mean = self.renorm_stddev = None
        self.seen_mean = self.seen_variance = None
        self._built_with: tuple[str, ...] = ()
        if keras.backend.backend() == "tensorflow":
            self.supports_jit = False  # XLA has no operation that calls NumPy

    # -- weights -------------------------------------------------------------------------------------------------------

    def kept(self, rank: int) -> Sizes:
        """The feature axes of an input of this rank. Raises: ValueError if it has not all of them."""
        return resolve_axis(self.axis if isinstance(self.axis, (list, tuple)) else (self.axis,), rank)

    def build(self, input_shape: Sizes) -> None:
        kept = self.kept(len(input_shape))
        for i in kept:
            if input_shape[i] is None:
                raise ValueError(
                    f"the size of dimension {i}, a feature axis, must be known; received shape {tuple(input_shape)}"
                )
        if self.virtual_batch_size is not None and 0 in kept:
            raise ValueError(
                f"axis must not include the batch dimension 0 with virtual_batch_size; received axis={self.axis}"
            )
        several = len(kept) > 1
        sizes = [n if i in kept else 1 for i, n in enumerate(input_shape) if several or i in kept]
        for name in self._weight_names():
            trainable = name in ("gamma", "beta")
            its = {k: getattr(self, f"{name}_{k}") for k in ("regularizer", "constraint")} if trainable else {}
            weight = self.add_weight(
                shape=tuple(sizes),
                name=name,
                initializer=self._initializer(name),
                trainable=trainable,
                autocast=False,
                **its,
            )
            setattr(self, name, weight)
        self._built_with = tuple(self._state_names())
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes={i: input_shape[i] for i in kept})
        self._reduction_axes = [i for i in range(len(input_shape)) if i not in kept]

    def _weight_names(self) -> list[str]:
        given = [name for name, there in (("gamma", self.scale), ("beta", self.center)) if there]
        return given + self._state_names()

    def _state_names(self) -> list[str]:
        """In the order of the state's rows."""
        renorm = ["moving_stddev", "renorm_mean", "renorm_stddev"] if self.renorm else []
        seen = ["seen_mean", "seen_variance"] if self.debias or self.momentum is None else []
        return ["moving_mean", "moving_variance", *renorm, *seen]

    def _initializer(self, name: str) -> Any:
        """Keras's rules: deviations begin with the root of what variances begin with."""
        if name.startswith("seen"):
            return initializers.get("zeros")
        if name == "renorm_mean":
            return _clone(self.moving_mean_initializer)
        if name.endswith("stddev"):
            variance = _clone(self.moving_variance_initializer)
            return lambda shape, dtype=None: ops.sqrt(variance(shape, dtype=dtype))
        return getattr(self, f"{name}_initializer")

    @property
    def state(self) -> list[Any]:
        """The variables of the moving statistics. Raises: ValueError if options that change them have been changed."""
        names = self._state_names()
        if names != list(self._built_with):
            raise ValueError(
                "renorm and debias, and whether momentum is None, cannot change once the layer is built; received "
                f"renorm={self.renorm}, debias={self.debias}, momentum={self.momentum}"
            )
        return [getattr(self, name) for name in names]

    # -- calls ---------------------------------------------------------------------------------------------------------

    def call(
        self, inputs: Any, training: bool | None = None, mask: Any = None, residual: Any = None, lengths: Any = None
    ) -> Any:
        """The normalized input.

        Args:
            inputs, training: as in Keras; a layer that is not trainable is in inference.
            mask: in training, bool or real weights >= 0 of what is in the batch's statistics. With fewer dimensions
                than the input it stands for the leading ones that are no feature axes; else it broadcasts. None takes
                the mask that the input has from a layer before, which stands for its leading dimensions.
            residual: tensor of the input's shape that is added to the normalized input, before the activation.
            lengths: (N,) integers in the place of a mask: so many steps of each sample count.
        Raises: ValueError, TypeError; the moving statistics are then as they were.
        """
        if residual is not None:
            _check_like(residual, inputs)
        if training and self.trainable:
            if mask is not None and lengths is not None:
                raise ValueError("mask and lengths both say what counts: pass one of them; received both")
            added = None if residual is None else ops.cast(residual, self.compute_dtype)
            beside = Beside(self._mask(mask, inputs, lengths), lengths, added, self.adjustment)
            return _train(self, ops.cast(inputs, self.compute_dtype), beside)
        outputs = super().call(inputs, training=False) if isinstance(self.axis, int) else self._infer(inputs)
        if residual is not None:
            outputs = outputs + ops.cast(residual, self.compute_dtype)
        return ops.relu(outputs) if self.activation is not None else outputs

    def _infer(self, inputs: Any) -> Any:
        """The output with the moving statistics, which broadcast against the input, of several axes."""
        dtype = keras.backend.result_type(inputs.dtype, "float32")
        x, mean, variance = (ops.cast(a, dtype) for a in (inputs, self.moving_mean, self.moving_variance))
        factor = ops.rsqrt(variance + self.epsilon)
        if self.gamma is not None:
            factor = factor * ops.cast(self.gamma, dtype)
        y = (x - mean) * factor
        if self.beta is not None:
            y = y + ops.cast(self.beta, dtype)
        return ops.cast(y, self.compute_dtype)

    def _mask(self, mask: Any, inputs: Any, lengths: Any) -> Any:
        """The mask with a meaning of its own: one that the input has been given by a layer before says which positions
        of the leading dimensions count, whatever the axis is."""
        found = get_keras_mask(inputs)
        if lengths is not None or (mask is None and found is None):
            return None
        if mask is not None and mask is not found:
            return ops.convert_to_tensor(mask)
        rank, missing = len(inputs.shape), len(inputs.shape) - len(found.shape)
        if all(i >= len(found.shape) for i in self.kept(rank)):
            return found
        return ops.reshape(found, (*ops.shape(found), *(1,) * missing))

    # -- configs -------------------------------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Keras's, and the options of nbbn that are set; callables are left out, with a warning."""
        return {**super().get_config(), **asked.config(self)}


def _clone(initializer: Any) -> Any:
    """One that gives the same values again where it is random."""
    if isinstance(initializer, initializers.Initializer):
        return initializer.__class__.from_config(initializer.get_config())
    return initializer


def _check_like(residual: Any, inputs: Any) -> None:
    """Raises: ValueError for another shape than the input's, as far as shapes are known."""
    shapes = tuple(residual.shape), tuple(inputs.shape)
    if len(shapes[0]) != len(shapes[1]) or any(None not in p and p[0] != p[1] for p in zip(*shapes, strict=True)):
        raise ValueError(f"residual must have the input's shape {shapes[1]}; received {shapes[0]}")
