"""What a layer was asked for: its options, and its config in Keras's terms."""

import warnings
from typing import Any

import numpy as np

from nbbn import constraints, initializers, regularizers
from nbbn.call.forward import Normalizer
from nbbn.core.options import VIRTUAL_BATCH_CHOICES, Momentum, Options, boolean

_INITIALIZERS = ("beta_initializer", "gamma_initializer", "moving_mean_initializer", "moving_variance_initializer")
_REGULARIZERS = ("beta_regularizer", "gamma_regularizer")
_CONSTRAINTS = ("beta_constraint", "gamma_constraint")


def _momentum(name: str) -> property:
    """An option that may change between calls, or be a callable that each training call asks."""

    def assign(self: "Configured", value: Momentum | None) -> None:
        with self._building:
            changed = self._dispatcher.changed(**{name: value})
            if getattr(changed.options, name) == getattr(self.options, name):
                return  # the dispatcher that there is has bound steps
            old = self.options.momentum
            if self._variables is not None and (changed.options.momentum is None) != (old is None):
                raise ValueError(
                    f"momentum must stay {'None' if old is None else 'a number'} once the layer is built, because "
                    f"None counts the batches in the state; received {value!r}"
                )
            self._dispatcher = changed

    return property(lambda self: getattr(self.options, name), assign)


class Configured(Normalizer):
    """A layer that tells what it was asked for."""

    axis: int | list[int]
    synchronized: bool | None

    momentum = _momentum("momentum")
    renorm_momentum = _momentum("renorm_momentum")
    epsilon = property(lambda self: self.options.epsilon)
    renorm = property(lambda self: self.options.renorm)
    renorm_clipping = property(lambda self: self.options.renorm_clipping)
    fused = property(lambda self: self.options.fused)
    virtual_batch_size = property(lambda self: self.options.virtual_batch_size)
    ragged = property(lambda self: self.options.ragged)
    virtual_batch_order = property(lambda self: self.options.virtual_batch_order)
    adjustment = property(lambda self: self.options.adjustment)
    bessel_correction = property(lambda self: self.options.bessel_correction)
    activation = property(lambda self: self.options.activation)
    debias = property(lambda self: self.options.debias)
    skip_nonfinite = property(lambda self: self.options.skip_nonfinite)

    @property
    def trainable(self) -> bool:
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._trainable = boolean("trainable", value)

    @property
    def dtype(self) -> str | None:
        """The name of the dtype that inputs are cast to; None follows the input."""
        return None if self.options.dtype is None else self.options.dtype.name

    @property
    def _left_out(self) -> list[str]:
        """Arguments that no config can hold."""
        return ["adjustment"] if callable(self.options.adjustment) else []

    def get_config(self) -> dict[str, Any]:
        """What from_config() needs: Keras's keys, and those of nbbn where they are set. JSON-serializable.

        Callables (adjustment, a momentum, renorm_clipping values, an initializer without a name) cannot be serialized:
        they are left out with a warning, and from_config() takes the default in their place.
        """
        o = self.options
        config: dict[str, Any] = {"name": self.name, "trainable": self.trainable, "dtype": self.dtype}
        config |= {"axis": list(self.axis) if isinstance(self.axis, list) else self.axis}
        config |= {"momentum": o.momentum, "epsilon": o.epsilon, "center": self.center, "scale": self.scale}
        left_out = self._left_out
        for room, names in ((initializers, _INITIALIZERS), (regularizers, _REGULARIZERS), (constraints, _CONSTRAINTS)):
            for name in names:
                try:
                    config[name] = room.serialize(getattr(self, name))
                except ValueError:
                    left_out.append(name)
        if o.renorm:
            config |= {"renorm": True, "renorm_clipping": _clips_of(o), "renorm_momentum": o.renorm_momentum}
        optional = ("virtual_batch_size", "fused", "bessel_correction", "activation")
        config |= {k: getattr(o, k) for k in optional if getattr(o, k) is not None}
        config |= {k: getattr(o, k) for k, values in VIRTUAL_BATCH_CHOICES.items() if getattr(o, k) != values[0]}
        config |= {k: True for k in ("debias", "skip_nonfinite") if getattr(o, k)}
        config |= {} if self.synchronized is None else {"synchronized": self.synchronized}
        for name in [n for n in ("momentum", "renorm_momentum") if callable(config.get(n))]:
            del config[name]
            left_out.append(name)
        if any(map(callable, (o.renorm_clipping or {}).values())):
            left_out.append("callables of renorm_clipping")
        for what in left_out:
            message = f"the config of {self.name} leaves out the {what}, which cannot be serialized"
            warnings.warn(message, stacklevel=2)
        return config


def _clips_of(options: Options) -> dict[str, float]:
    """The bounds that are numbers; an infinite one is none, and JSON knows no infinity."""
    clips = (options.renorm_clipping or {}).items()
    numbers = {k: float(v) for k, v in clips if v is not None and not callable(v)}
    return {k: v for k, v in numbers.items() if np.isfinite(v)}
