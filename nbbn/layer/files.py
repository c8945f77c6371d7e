"""Arrays by name and a description of them in one file, which is there as a whole or not at all."""

import io
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

_DESCRIPTION = "nbbn"  # where it is: a key of safetensors' metadata, an array of text among those of an .npz


def write(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], description: Mapping[str, Any]) -> None:
    """Write a .safetensors or .npz file. The description is JSON.

    Raises: ValueError for another suffix; ModuleNotFoundError without safetensors; OSError.
    """
    target, text = _checked(path), json.dumps(description)
    if target.suffix == ".npz":
        buffer = io.BytesIO()
        everything: Any = {_DESCRIPTION: np.array(text), **arrays}
        np.savez(buffer, **everything)
        replace(target, buffer.getvalue())
    else:
        from safetensors.numpy import save

        replace(target, save(dict(arrays), metadata={_DESCRIPTION: text}))


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the description. Nothing in the file is run: no pickle.

    Raises: ValueError for another suffix, or if write() did not write this file; ModuleNotFoundError without
        safetensors; OSError.
    """
    source = _checked(path)
    try:
        arrays, text = _from_npz(source) if source.suffix == ".npz" else _from_safetensors(source)
        return arrays, dict(json.loads(text))
    except (ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise ValueError(f"{os.fspath(path)} is no file of layer.save(), or damaged: {error!r}") from error


def replace(target: Path, content: bytes) -> None:
    """Make this the content of a file. Whoever opens it finds the old content or the new one, also after a crash."""
    target = target.resolve()  # a link stays one
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def _checked(path: str | os.PathLike[str]) -> Path:
    checked = Path(path)
    if checked.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"path must end in .safetensors or .npz; received {os.fspath(path)!r}")
    if checked.suffix == ".safetensors":
        try:
            import safetensors  # noqa: F401
        except ImportError as error:
            message = (
                f"{os.fspath(path)}: .safetensors needs the package safetensors, which is not installed; .npz does not"
            )
            raise ModuleNotFoundError(message, name="safetensors") from error
    return checked


def _from_npz(source: Path) -> tuple[dict[str, np.ndarray], str]:
    with source.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        arrays = dict(file)
    return arrays, str(arrays.pop(_DESCRIPTION))


def _from_safetensors(source: Path) -> tuple[dict[str, np.ndarray], str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(source, framework="np") as file:
            return {n: file.get_tensor(n) for n in file.keys()}, file.metadata()[_DESCRIPTION]  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from error
