"""What a config of Keras says in nbbn's terms. Keras 3 and tf_keras write nearly the same and mean different things."""

from collections.abc import Mapping
from typing import Any

# What Keras puts into a config and what has no effect here.
_WITHOUT_EFFECT = ("batch_input_shape", "build_input_shape")


def unwrap(config: Mapping[str, Any], class_name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constructor's arguments, and what is known of the input, from a layer's config or a serialized layer.

    A serialized layer is {"module": …, "class_name": …, "config": …, "build_config": …}; configs in old files have
    neither the first nor the last.

    Raises: TypeError for what is no dict; ValueError if a layer of another kind was serialized.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a dict; received {type(config).__name__}")
    if not isinstance(config.get("config"), Mapping):
        return _arguments(config, _names_modules(config)), {}
    found, inner = str(config.get("class_name")), config["config"]
    if found != class_name and "BatchNormalization" not in found:
        raise ValueError(f"config must be that of a BatchNormalization; received one of class_name {found!r}")
    by_keras = "module" not in config or _names_modules(inner)
    return _arguments(inner, by_keras), dict(config.get("build_config") or {})


def _names_modules(config: Mapping[str, Any]) -> bool:
    """Whether the initializers say where they come from: Keras's do, nbbn's do not."""
    initializer = config.get("gamma_initializer")
    return isinstance(initializer, Mapping) and "module" in initializer


def _arguments(config: Mapping[str, Any], by_keras: bool) -> dict[str, Any]:
    found = {k: v for k, v in config.items() if k not in _WITHOUT_EFFECT}
    dtype, axis = found.get("dtype"), found.get("axis")
    if isinstance(dtype, Mapping):  # a serialized policy
        found["dtype"] = dtype["config"]["name"]
    if isinstance(found.get("dtype"), str):  # float32 parameters for 16-bit inputs are what "mixed" means
        found["dtype"] = found["dtype"].removeprefix("mixed_")
    if not by_keras:
        return found
    policy = str(dtype.get("class_name")) if isinstance(dtype, Mapping) else ""
    if "synchronized" in config or policy.endswith("DTypePolicy"):
        # Keras 3 never corrects; tf_keras does what bessel_correction=None does.
        return {"bessel_correction": False} | found
    if found.get("virtual_batch_size") is not None and isinstance(axis, list | tuple) and min(axis, default=0) > 1:
        # With a virtual batch tf_keras's build() makes a list of the axes, and counts the dimension that it inserts.
        found["axis"] = [a - 1 for a in axis]
    return found
