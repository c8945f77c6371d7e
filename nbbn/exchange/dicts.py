"""Libraries whose layers are dicts of arrays: PyTorch, TensorFlow's checkpoints, Flax, Haiku. A table of names each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbbn.arrays import as_numpy
from nbbn.exchange.layers import along_axes, batches_seen, choose, compact, make_layer, shapes_of
from nbbn.layer.layer import BatchNormalization
from nbbn.state.variables import COUNTS, PARAMETERS, STATISTICS

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Names:
    """What a library calls the variables of a layer, after the layer's own name and a separator.

    table: their name for each of nbbn's; what nbbn does not have is there under the library's name.
    """

    table: Mapping[str, str]
    separator: str = "/"

    def join(self, name: str, theirs: str) -> str:
        return f"{name}{self.separator}{theirs}" if name else theirs

    def take(self, variables: Mapping[str, Any], name: str | None) -> Arrays:
        """The variables of one layer, by nbbn's names. Raises: TypeError for what is no mapping."""
        if not isinstance(variables, Mapping):
            raise TypeError(f"variables must be a mapping of arrays by name; received {type(variables).__name__}")
        mean, variance = self.table["moving_mean"], self.table["moving_variance"]
        ends = [n for n in variables if n == mean or n.endswith(self.separator + mean)]
        layers = [n.removesuffix(mean).removesuffix(self.separator) for n in ends]
        chosen = choose([n for n in layers if self.join(n, variance) in variables], name, "these variables")
        full = {ours: self.join(chosen, theirs) for ours, theirs in self.table.items()}
        return {ours: as_numpy(variables[key], key) for ours, key in full.items() if key in variables}

    def give(self, arrays: Mapping[str, np.ndarray], name: str) -> Arrays:
        """The other way; what has no name is left out."""
        return {self.join(name, theirs): arrays[ours] for ours, theirs in self.table.items() if ours in arrays}


# -- PyTorch ---------------------------------------------------------------------------------------------------------

_TORCH = Names(
    {
        **{"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"},
        "num_batches_tracked": "num_batches_tracked",
    },
    separator=".",
)


def from_torch(
    state_dict: Mapping[str, Any], name: str | None = None, *, ndim: int | None = None, **options: Any
) -> BatchNormalization:
    """A layer from the state_dict of a BatchNorm module, or of a model with such modules.

    Args:
        state_dict: tensors or arrays by name.
        name: of the module, such as "layer1.0.bn1"; None is the only one.
        ndim: 4 for BatchNorm2d, 5 for BatchNorm3d, 2 or 3 for BatchNorm1d.
        options: of BatchNormalization. By default those of a new module: axis=1, momentum=0.9 (PyTorch's 0.1 is the
            weight of the new value), epsilon=1e-5, bessel_correction=True. With momentum=None num_batches_tracked says
            how many batches are in the averages.
    Raises: ValueError if there is no such module, or for options that do not fit.
    """
    arrays = _TORCH.take(state_dict, name)
    tracked = arrays.pop("num_batches_tracked", None)
    corrects = None if options.get("renorm") else True  # there is no unbiased statistic in renorm
    options = {"axis": 1, "momentum": 0.9, "epsilon": 1e-5, "bessel_correction": corrects} | options
    if options["momentum"] is None and tracked is not None:
        arrays |= {n: np.full(arrays["moving_mean"].shape, tracked) for n in COUNTS}
    return make_layer(arrays, options, ndim)


def to_torch(layer: BatchNormalization, name: str = "") -> Arrays:
    """The state_dict of a BatchNorm module with this layer's weights, as NumPy arrays: weight, bias, running_mean,
    running_var (C,), num_batches_tracked ().

    A layer with either gamma or beta has both there, one of them constant, as PyTorch knows `affine` only.

    Args:
        name: of the module in the model whose state_dict it is to be a part of.
    Raises: ValueError for a layer with several feature axes, or whose channels have seen different numbers of batches.
    """
    arrays = compact(layer, "to_torch()")
    if len(layer.options.resolved_axis()) != 1:
        raise ValueError(f"to_torch() needs a layer with one feature axis; received axis={layer.axis}")
    if layer.scale or layer.center:
        mean = arrays["moving_mean"]
        arrays = {"gamma": np.ones_like(mean), "beta": np.zeros_like(mean), **arrays}
    arrays["num_batches_tracked"] = np.array(batches_seen(layer), np.int64)
    return _TORCH.give(arrays, name)


# -- TensorFlow ------------------------------------------------------------------------------------------------------

_RENORM = ("renorm_mean", "renorm_stddev")
_TENSORFLOW = Names({n: n for n in (*PARAMETERS, *STATISTICS, *COUNTS, *(f"{n}_weight" for n in _RENORM))})


def from_tensorflow(
    variables: Mapping[str, Any], name: str | None = None, *, ndim: int | None = None, **options: Any
) -> BatchNormalization:
    """A layer from the variables of a checkpoint, of TensorFlow 1 or 2.

    Older versions of TensorFlow 1 kept `renorm_mean` and `renorm_stddev` as averages that begin at 0, beside the weight
    that is in them by now, `renorm_mean_weight` and `renorm_stddev_weight`, and had no `moving_stddev`. Here they
    become renorm_mean / renorm_mean_weight and renorm_stddev / renorm_stddev_weight; moving_stddev is
    sqrt(moving_variance + epsilon), what it would have been. Before any training, with weights of 0, they begin at
    the moving statistics.

    Args:
        variables: arrays by name, as tf.train.load_checkpoint() gives them. Those of optimizers do not matter.
        name: the layer's scope, such as "tower/bn"; None is the only one.
        ndim: the rank of the inputs; not needed with several axes or virtual batches.
        options: of BatchNormalization; by default those of a new layer, renorm=True where the variables have it.
    Raises: ValueError if there is no such layer, or for options that do not fit.
    """
    plain = {n.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE").removesuffix(":0"): v for n, v in variables.items()}
    arrays = _TENSORFLOW.take(plain, name)
    options = {"renorm": "renorm_mean" in arrays} | options
    for average in _RENORM:
        weight = arrays.pop(f"{average}_weight", np.ones(())).item()
        if not weight >= 0:
            raise ValueError(f"{average}_weight must be a number of at least 0; received {weight}")
        value = arrays.pop(average, None)
        if value is not None and weight > 0:
            arrays[average] = value.astype(np.float64) / weight
    return make_layer(arrays, options, ndim)


def to_tensorflow(layer: BatchNormalization, name: str = "") -> Arrays:
    """The layer's variables by the names and in the shapes that TensorFlow has for them, in the scope `name`."""
    shapes_of(layer, "to_tensorflow()")
    return _TENSORFLOW.give(layer.get_state(), name)


# -- Flax and Haiku --------------------------------------------------------------------------------------------------

_JAX_OPTIONS = {"epsilon": 1e-5, "bessel_correction": False}
_FLAX = Names({"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"})
_HAIKU = Names(
    {
        **{"gamma": "scale", "beta": "offset"},
        **{"moving_mean": "~/mean_ema/average", "moving_variance": "~/var_ema/average"},
    }
)
# Haiku's averages are hidden / (1 - decay ** counter). With so many steps behind it the divisor is 1.
_MANY_STEPS = np.array(2**30, np.int32)


def from_flax(
    variables: Mapping[str, Any], name: str | None = None, *, ndim: int | None = None, **options: Any
) -> BatchNormalization:
    """A layer from the variables of a Flax model.

    Args:
        variables: {"params": tree, "batch_stats": tree}, or one tree with both, as a pure dict of nnx is.
        name: the path of the layer, such as "Block_0/BatchNorm_1"; None is the only one.
        ndim: the rank of the inputs.
        options: of BatchNormalization. By default those of a new layer: momentum=0.99, epsilon=1e-5,
            bessel_correction=False.
    Raises: ValueError if there is no such layer, or for options that do not fit.
    """
    collections = [variables[c] for c in ("params", "batch_stats") if c in variables] or [variables]
    return make_layer(_FLAX.take(_flat(*collections), name), _JAX_OPTIONS | options, ndim)


def to_flax(layer: BatchNormalization, name: str = "") -> dict[str, Any]:
    """{"params": …, "batch_stats": …} for a Flax layer, or for the layer of that path in a model; NumPy arrays."""
    arrays = compact(layer, "to_flax()")
    trees: dict[str, Any] = {}
    for collection, names in {"params": PARAMETERS, "batch_stats": STATISTICS}.items():
        tree: dict[str, Any] = _FLAX.give({n: arrays[n] for n in names if n in arrays}, "")
        for step in reversed(name.split("/") if name else []):
            tree = {step: tree}
        trees[collection] = tree
    return trees


def from_haiku(
    params: Mapping[str, Any],
    state: Mapping[str, Any],
    name: str | None = None,
    *,
    ndim: int | None = None,
    **options: Any,
) -> BatchNormalization:
    """A layer from the parameters and the state of a Haiku model. The statistics are the averages, free of their bias
    towards 0; training goes on from there.

    Args:
        params, state: of hk.transform_with_state's `init` and `apply`.
        name: of the module, such as "net/~/batch_norm"; None is the only one.
        ndim: the rank of the inputs, which the variables tell.
        options: of BatchNormalization. By default momentum=0.99 (Haiku's decay_rate has no default), epsilon=1e-5,
            bessel_correction=False; axis=1 for "channels_first".
    Raises: ValueError if there is no such module, or for options that do not fit.
    """
    arrays = _HAIKU.take(_flat(params, state), name)
    return make_layer(arrays, _JAX_OPTIONS | options, arrays["moving_mean"].ndim if ndim is None else ndim)


def to_haiku(layer: BatchNormalization, name: str = "batch_norm") -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters and the state of the Haiku module `name`, as NumPy arrays. Training goes on from the averages,
    whose bias towards 0 is taken to be gone."""
    shape = along_axes(layer, "to_haiku()")
    arrays = {n: a.reshape(shape) for n, a in layer.get_state().items()}
    params = {_HAIKU.table[n]: arrays[n] for n in PARAMETERS if n in arrays}
    averages = {"mean_ema": arrays["moving_mean"], "var_ema": arrays["moving_variance"]}
    state = {f"{name}/~/{n}": {"average": a, "hidden": a, "counter": _MANY_STEPS} for n, a in averages.items()}
    return {name: params} if params else {}, state


def _flat(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves by their paths."""
    leaves: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            leaves |= {f"{key}/{n}": v for n, v in _flat(value).items()} if isinstance(value, Mapping) else {key: value}
    return leaves
