"""A layer in a file, and from a config."""

import os
from collections.abc import Mapping
from typing import Any, Self

from nbbn.layer import files
from nbbn.layer.keras_config import unwrap
from nbbn.layer.weights import Weighted


class Saved(Weighted):
    """A layer that can be made again from what it tells of itself."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A layer from get_config(), or from that of a layer of Keras 3 or tf_keras.

        Bessel's correction is what that library would do: Keras 3 never corrects. A whole serialized layer,
        {"class_name": …, "config": …, "build_config": …}, is taken too, and is built where its input's shape is known.

        Raises: ValueError for a layer of another kind; TypeError, ValueError for what the constructor does not accept.
        """
        arguments, build = unwrap(config, cls.__name__)
        layer = cls(**arguments)
        if build.get("input_shape") is not None:
            layer.build(build["input_shape"], build.get("dtype"))
        return layer

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the layer to a file: its config, and get_state() where it is built.

        An existing file is replaced at once, when the new one is complete. Callables (an adjustment, a momentum or
        clips that are functions, initializers and the like of your own) are not saved, or by their name alone: load()
        takes them as arguments.

        Args:
            path: ending in .safetensors, which needs the package safetensors, or in .npz.
        Raises: ValueError for another ending; ModuleNotFoundError without safetensors; OSError.
        """
        variables = self._variables
        described: dict[str, Any] = {**self._class(), "config": self.get_config()}
        if variables is not None:
            known = variables.shapes
            shape = [known.features.get(i) for i in range(known.rank)]
            described["build_config"] = {"input_shape": shape, "dtype": known.dtype.name}
        files.write(path, {} if variables is None else variables.values(), described)

    @classmethod
    def load(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """The layer that save() has written to this file. Nothing in the file is run.

        Args:
            path: ending in .safetensors or .npz.
            options: arguments of the constructor, in place of those in the file.
        Raises: FileNotFoundError; ModuleNotFoundError without safetensors; ValueError if it is no such file, if a layer
            of another class is in it, or if its state does not fit.
        """
        state, described = files.read(path)
        if not isinstance(described.get("config"), Mapping):
            raise ValueError(f"{os.fspath(path)} is no file of layer.save(), or damaged: it has no config")
        wanted, found = cls._class(), {k: described.get(k) for k in ("module", "class_name")}
        if found != wanted:
            their, our = (".".join(filter(None, map(str, c.values()))) for c in (found, wanted))
            raise ValueError(f"{os.fspath(path)} has a {their}: call the load() of that class; received {our}")
        layer = cls.from_config({**described, "config": {**described["config"], **options}})
        if layer.built:
            try:
                layer.set_state(state)
            except ValueError as error:
                raise ValueError(f"{os.fspath(path)}: {error}") from error
        return layer

    @classmethod
    def _class(cls) -> dict[str, str]:
        """How files name the class: nbbn's by where users find it, others, whose modules may move, by name alone."""
        module = "nbbn" if cls.__module__ in ("nbbn.layer.layer", "nbbn.sync.layer") else cls.__module__
        return {"module": module if module.startswith("nbbn") else "", "class_name": cls.__name__}
