"""What a layer was asked for: its options, and its config in Keras's terms."""

import warnings
from typing import Any

import numpy as np

from nbbn import constraints, initializers, regularizers
from nbbn.call.forward import Normalizer
from nbbn.core.options import Options

_INITIALIZERS = ("beta_initializer", "gamma_initializer", "moving_mean_initializer", "moving_variance_initializer")
_REGULARIZERS = ("beta_regularizer", "gamma_regularizer")
_CONSTRAINTS = ("beta_constraint", "gamma_constraint")


class Configured(Normalizer):
    """A layer that tells what it was asked for."""

    axis: int | list[int]

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

    def get_config(self) -> dict[str, Any]:
        """What from_config() needs: Keras's keys, and those of nbbn where they are set. JSON-serializable.

        Callables (adjustment, renorm_clipping values) cannot be serialized: they are left out with a warning.
        """
        o = self.options
        config: dict[str, Any] = {"name": self.name, "trainable": self.trainable, "dtype": self.dtype}
        config |= {"axis": list(self.axis) if isinstance(self.axis, list) else self.axis}
        config |= {"momentum": o.momentum, "epsilon": o.epsilon, "center": self.center, "scale": self.scale}
        config |= {k: initializers.serialize(getattr(self, k)) for k in _INITIALIZERS}
        config |= {k: regularizers.serialize(getattr(self, k)) for k in _REGULARIZERS}
        config |= {k: constraints.serialize(getattr(self, k)) for k in _CONSTRAINTS}
        if o.renorm:
            config |= {"renorm": True, "renorm_clipping": _clips_of(o), "renorm_momentum": o.renorm_momentum}
        optional = ("virtual_batch_size", "fused", "bessel_correction", "activation")
        config |= {k: getattr(o, k) for k in optional if getattr(o, k) is not None}
        clips = (o.renorm_clipping or {}).values()
        left_out = {"adjustment": callable(o.adjustment), "callables of renorm_clipping": any(map(callable, clips))}
        for what in (name for name, present in left_out.items() if present):
            message = f"the config of {self.name} leaves out the {what}, which cannot be serialized"
            warnings.warn(message, stacklevel=2)
        return config


def _clips_of(options: Options) -> dict[str, float]:
    """The bounds that are numbers; an infinite one is none, and JSON knows no infinity."""
    clips = (options.renorm_clipping or {}).items()
    numbers = {k: float(v) for k, v in clips if v is not None and not callable(v)}
    return {k: v for k, v in numbers.items() if np.isfinite(v)}
