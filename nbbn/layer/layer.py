"""The layer: what it was asked for, and how it is called."""

import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nbbn import constraints, initializers, regularizers
from nbbn.core import dtypes
from nbbn.core.options import Options, boolean
from nbbn.engine.dispatcher import Dispatcher
from nbbn.layer.saving import Saved
from nbbn.state.shapes import as_shape

_named: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


class BatchNormalization(Saved):
    """Batch normalization with every option of TensorFlow 1 and 2, on NumPy arrays and on those of a GPU.

        y = (x - mean) / sqrt(variance + epsilon) * gamma + beta

    In training the mean and (biased) variance are those of the batch, and moving averages of them are kept; in
    inference they are the moving averages.

    Args:
        axis: int, or list, tuple, range or array of ints: the feature axes, which keep statistics of their own; all
            others are reduced.
        momentum: weight of the OLD value in the moving averages, 0 to 1 (PyTorch's momentum is the weight of the new
            value). A callable without arguments is read once at each training call: a schedule. None averages all
            training calls with equal weight. The attribute may be set, from one number or callable to another also
            when the layer is built: the next call follows it (a captured CUDA graph does not).
        epsilon: added to the variance.
        center, scale: whether there is a beta, a gamma.
        beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer: Keras name,
            config, object or callable f(shape) or f(shape, dtype=…).
        beta_regularizer, gamma_regularizer: Keras name, config, object or callable; see `losses`.
        beta_constraint, gamma_constraint: likewise; applied by apply_constraints(), after an optimizer's step.
        renorm: batch renormalization (Ioffe, 2017).
        renorm_clipping: dict with any of "rmax", "rmin", "dmax": numbers, or callables without arguments read at
            each step. A UserWarning without renorm, which alone reads it.
        renorm_momentum: weight of the old value in the statistics that renorm normalizes with: a number, or a callable
            as for momentum. May be set, too.
        fused: True demands that TensorFlow's fused kernel could do this call (ValueError otherwise), False that it
            is not; this decides about Bessel's correction only. None: whatever is possible.
        trainable: a layer that is not trainable normalizes with its moving statistics, also in training.
        virtual_batch_size: ghost batches: sample n is normalized with the samples of its group, n mod (N /
            virtual_batch_size).
        ragged: what to do with a batch in training that virtual_batch_size does not divide. "error" is a ValueError;
            "last" makes the last group a smaller one, of the last samples; "spread" makes ceil(N / virtual_batch_size)
            groups whose sizes differ by one at most. In the moving statistics every group weighs the same.
        virtual_batch_order: "interleaved", TensorFlow's, is as above; "contiguous" groups are samples that follow each
            other, in the order of the batch.
        adjustment: callable of the input's shape that returns (a, b); in training x_hat becomes x_hat * a + b.
        name: a unique one is made if it is None.
        dtype: "float16", "bfloat16", "float32" or "float64": inputs are cast to it, also bools and integers, as those
            of images. None follows the input, which must be of such a dtype. Parameters and statistics are float32
            for 16-bit dtypes.
        bessel_correction: whether the moving variance is the unbiased one. None does what TensorFlow does for this
            input: yes where its fused kernel runs (rank 4 or 5, one channel axis, not float64, none of the options
            above), else no.
        activation: "relu" makes the output max(y, 0), after a `residual` of the call is added; None or "linear" is
            none. Neither costs another pass over memory.
        debias: moving averages that owe nothing to their initial values: the first batch counts fully, and from then on
            they are the averages of the batches alone, with the weights that momentum gives them (as Adam's). With
            momentum=None they are so anyway. Not those that renorm normalizes with: no output of training depends
            on it.
        skip_nonfinite: a batch whose mean or variance is NaN or infinite in a channel leaves the moving statistics of
            that channel as they were. Its output is what it is without. With virtual batches the average over the
            groups decides: one bad group is enough.
        synchronized: Keras's: whether replicas share statistics. False and None are this layer; True is a ValueError,
            because that needs to know with whom: see SyncBatchNormalization.

    The attributes gamma, beta, moving_mean, moving_variance and with renorm moving_stddev, renorm_mean,
    renorm_stddev are arrays in TensorFlow's shapes: (C,) for one axis, else the input's rank with 1 in every reduced
    dimension, and with virtual batches one more 1 at index 1. With momentum=None or debias there are also seen_mean and
    seen_variance, the weight of the batches in each average: their number, or, with debias, from 0 to 1. gamma and beta
    may be changed in place; a training call replaces the moving statistics by new arrays, all at once, so that another
    thread never sees a mix.

    Raises: TypeError, ValueError for arguments that are not possible; the message names the argument and its value.
    """

    _STRICT_FUSED = True
    _SYNCHRONIZED = False
    _AUTO_NAME = "batch_normalization"

    def __init__(
        self,
        axis: int | Sequence[int] | np.ndarray = -1,
        momentum: float | Callable[[], float] | None = 0.99,
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
        renorm_momentum: float | Callable[[], float] = 0.99,
        fused: bool | None = None,
        trainable: bool = True,
        virtual_batch_size: int | None = None,
        adjustment: Callable[[tuple[int, ...]], tuple[Any, Any]] | None = None,
        name: str | None = None,
        *,
        dtype: Any = None,
        bessel_correction: bool | None = None,
        activation: str | None = None,
        ragged: str = "error",
        virtual_batch_order: str = "interleaved",
        debias: bool = False,
        skip_nonfinite: bool = False,
        synchronized: bool | None = None,
    ) -> None:
        options = Options(
            axis=axis,  # type: ignore[arg-type]  # Options takes any sequence and stores a tuple
            momentum=momentum,
            epsilon=epsilon,
            renorm=renorm,
            renorm_clipping=renorm_clipping,
            renorm_momentum=renorm_momentum,
            fused=fused,
            virtual_batch_size=virtual_batch_size,
            adjustment=adjustment,
            bessel_correction=bessel_correction,
            activation=activation,
            ragged=ragged,
            virtual_batch_order=virtual_batch_order,
            debias=debias,
            skip_nonfinite=skip_nonfinite,
            dtype=None if dtype is None else dtypes.resolve(dtype),
            strict_fused=self._STRICT_FUSED,
        )
        self._dispatcher = Dispatcher(options)
        self.axis: int | list[int] = list(options.axis) if isinstance(options.axis, tuple) else options.axis
        self.center, self.scale = boolean("center", center), boolean("scale", scale)
        self.beta_initializer = initializers.get(beta_initializer, "beta_initializer")
        self.gamma_initializer = initializers.get(gamma_initializer, "gamma_initializer")
        self.moving_mean_initializer = initializers.get(moving_mean_initializer, "moving_mean_initializer")
        self.moving_variance_initializer = initializers.get(moving_variance_initializer, "moving_variance_initializer")
        self.beta_regularizer = regularizers.get(beta_regularizer, "beta_regularizer")
        self.gamma_regularizer = regularizers.get(gamma_regularizer, "gamma_regularizer")
        self.beta_constraint = constraints.get(beta_constraint, "beta_constraint")
        self.gamma_constraint = constraints.get(gamma_constraint, "gamma_constraint")
        self.synchronized = None if synchronized is None else boolean("synchronized", synchronized)
        if self.synchronized not in (None, self._SYNCHRONIZED):
            raise ValueError(
                f"synchronized must be {self._SYNCHRONIZED} or None: the layer that shares statistics, with a group of "
                f"processes, is nbbn.SyncBatchNormalization; received {synchronized!r}"
            )
        self.trainable = trainable
        self.name = self._unique_name() if name is None else str(name)
        if not options.renorm and any(v is not None for v in (options.renorm_clipping or {}).values()):
            message = f"renorm_clipping has no effect on {self.name} without renorm=True; received {renorm_clipping!r}"
            warnings.warn(message, stacklevel=2)
        super().__init__()

    def _unique_name(self) -> str:
        n = next(_named[self._AUTO_NAME])
        return f"{self._AUTO_NAME}_{n}" if n else self._AUTO_NAME

    def __repr__(self) -> str:
        v = self._variables
        shape = f", parameters {v.shapes.params} {v.shapes.dtype.name}" if v else ""
        return f"<{type(self).__name__} {self.name}: axis={self.axis}{shape}>"

    def compute_output_shape(self, input_shape: Iterable[int | None]) -> tuple[int | None, ...]:
        """The shape of the output, which is that of the input. Raises: TypeError, ValueError for what is no shape."""
        return as_shape(input_shape)


def as_layers(layers: Any) -> list[BatchNormalization]:
    """One layer or several as a list. Raises: TypeError for what is no layer."""
    found = list(layers) if isinstance(layers, Iterable) else [layers]
    for layer in found:
        if not isinstance(layer, BatchNormalization):
            raise TypeError(f"layers must be nbbn.BatchNormalization layers; received {layer!r}")
    return found
