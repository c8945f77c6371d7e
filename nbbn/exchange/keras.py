"""Layers in the files of Keras 3 and tf_keras: .keras, .weights.h5 and older .h5, with h5py and without Keras."""

import io
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nbbn.exchange.layers import build, choose, shapes_of
from nbbn.layer.files import replace
from nbbn.layer.keras_config import unwrap
from nbbn.layer.layer import BatchNormalization
from nbbn.state.variables import COUNTS

_CONFIG, _WEIGHTS = "config.json", "model.weights.h5"  # in a .keras file, which is a zip


class _Stored(NamedTuple):
    """A layer in a file: its serialized form, None where there are weights only, and its datasets in Keras's order."""

    serialized: Mapping[str, Any] | None
    weights: list[Any]


def from_keras(
    path: str | os.PathLike[str], name: str | None = None, *, ndim: int | None = None, **options: Any
) -> BatchNormalization:
    """A layer from a file of Keras 3 or tf_keras.

    Args:
        path: .keras, .weights.h5 or .h5, of model.save() or model.save_weights().
        name: of the layer; "block/bn" for that in the model "block". None is the only one. In a .weights.h5 file layers
            are named and numbered by their class: "batch_normalization_1" is the second.
        ndim: the rank of the inputs, where the file does not say their shape.
        options: of BatchNormalization, in place of those in the file. A file of weights has none; the defaults are then
            those of a new layer, for .weights.h5 one of Keras 3: bessel_correction=False.
    Raises: ValueError if it is no such file, if no such layer is in it, or for options that do not fit;
        ModuleNotFoundError without h5py; OSError.
    """
    import h5py

    members = _read(path)
    with h5py.File(io.BytesIO(members[_WEIGHTS]), "r") as file:
        stored = _find(file, members, name, path)
        weights = [np.array(w) for w in stored.weights]
    if stored.serialized is None:
        corrects = {"bessel_correction": False} if os.fspath(path).endswith(".weights.h5") else {}
        layer = BatchNormalization(**corrects | options)
    else:
        arguments, known = unwrap(stored.serialized, BatchNormalization.__name__)
        layer = BatchNormalization(**arguments | options)
        if known.get("input_shape") is not None:
            layer.build(known["input_shape"])
    build(layer, weights[-1], ndim)
    layer.set_weights(weights)
    return layer


def to_keras(layer: BatchNormalization, path: str | os.PathLike[str], name: str | None = None) -> None:
    """Put the layer's weights in the place of those of a layer in an existing file, which is replaced at once.

    A layer of a running model needs no file: `keras_layer.set_weights(layer.get_weights())`.

    Args:
        path, name: as for from_keras().
    Raises: ValueError if it is no such file, if no such layer is in it, or if it has other weights, other shapes or
        another epsilon, than this; ModuleNotFoundError without h5py; OSError.
    """
    import h5py

    shapes_of(layer, "to_keras()")
    members = _read(path)
    buffer = io.BytesIO(members[_WEIGHTS])
    weights = {n: w for n, w in layer.get_state().items() if n not in COUNTS}
    with h5py.File(buffer, "r+") as file:
        stored = _find(file, members, name, path)
        for option, has in {} if stored.serialized is None else stored.serialized["config"].items():
            if option in ("center", "scale", "epsilon") and has != (given := getattr(layer, option)):
                raise ValueError(f"the layer in {os.fspath(path)} has {option}={has}; received one with {given}")
        shapes, ours = ([w.shape for w in ws] for ws in (stored.weights, weights.values()))
        if shapes != ours:
            raise ValueError(
                f"the layer in {os.fspath(path)} has weights {shapes}; received {ours} ({', '.join(weights)})"
            )
        for dataset, weight in zip(stored.weights, weights.values(), strict=True):
            dataset[...] = weight
    replace(Path(path), _packed(members | {_WEIGHTS: buffer.getvalue()}))


def _read(path: str | os.PathLike[str]) -> dict[str, bytes]:
    """The members of a .keras file; of another, the file as its weights."""
    content = Path(path).read_bytes()
    if content[:8] == b"\x89HDF\r\n\x1a\n":
        return {_WEIGHTS: content}
    members = {}
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {n: archive.read(n) for n in archive.namelist()}
    if not {_CONFIG, _WEIGHTS} <= set(members):
        raise ValueError(f"path must be a .keras or .h5 file of Keras; {os.fspath(path)} is not")
    return members


def _packed(members: Mapping[str, bytes]) -> bytes:
    """The other way."""
    if _CONFIG not in members:
        return members[_WEIGHTS]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _find(file: Any, members: Mapping[str, bytes], name: str | None, path: str | os.PathLike[str]) -> _Stored:
    model = json.loads(members.get(_CONFIG) or file.attrs.get("model_config", "{}"))
    root = file.get("model_weights", file)
    find = _by_weight_names if "layer_names" in root.attrs else _by_groups
    found = dict(find(root, model))
    return found[choose(found, name, os.fspath(path))]


def _serialized_layers(model: Mapping[str, Any], name: str = "", group: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every batch normalization of a serialized model and of those in it: its path by names, its group in a file of
    weights, its serialized form. Groups are named and numbered by class."""
    used: Counter[str] = Counter()
    for layer in dict(model.get("config", {})).get("layers", ()):
        kind = re.sub("(?<=[a-z])(?=[A-Z])", "_", layer["class_name"]).lower()
        own_group = f"{group}layers/{kind}_{used[kind]}" if used[kind] else f"{group}layers/{kind}"
        used[kind] += 1
        own_name = f"{name}{layer['config']['name']}"
        if "BatchNormalization" in layer["class_name"]:
            yield own_name, own_group, layer
        yield from _serialized_layers(layer, f"{own_name}/", f"{own_group}/")


def _by_groups(root: Any, model: Mapping[str, Any]) -> Iterator[tuple[str, _Stored]]:
    """Layers by name, of a file whose groups are named by class and whose weights are numbered."""

    def weights_of(group: Any) -> list[Any]:
        return [group[str(i)] for i in range(len(group))]

    described = list(_serialized_layers(model))
    for name, group, layer in described:
        yield name, _Stored(layer, weights_of(root[f"{group}/vars"]))
    if described:
        return
    groups: list[str] = []
    root.visit(lambda path: groups.append(path) if path.endswith("/vars") else None)
    for path in groups:
        weights = weights_of(root[path])
        if 2 <= len(weights) <= 7 and len({w.shape for w in weights}) == 1:  # what batch normalization can have
            yield re.sub("(^|/)layers/", r"\1", path.removesuffix("/vars")), _Stored(None, weights)


def _by_weight_names(root: Any, model: Mapping[str, Any]) -> Iterator[tuple[str, _Stored]]:
    """Layers by name, of a file with one group per layer of the model, whose attributes list the names of weights;
    those of a model in the model begin with the layer's own name, or with all names on the path to it."""
    serialized = {name: layer for name, _, layer in _serialized_layers(model)}
    for group in map(_text, root.attrs["layer_names"]):
        scopes: dict[str, list[Any]] = {}
        for weight in map(_text, root[group].attrs["weight_names"]):
            scopes.setdefault(weight.rpartition("/")[0], []).append(weight)
        for scope, weights in scopes.items():
            if any(w.rpartition("/")[2].startswith("moving_mean") for w in weights):
                inside = scope.removeprefix(f"{group}/")
                name = group if group in serialized or scope == group else f"{group}/{inside}"
                yield name, _Stored(serialized.get(name), [root[group][w] for w in weights])


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
