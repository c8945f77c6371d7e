"""What initializers, regularizers and constraints share: names, configs and argument checks."""

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

KERAS = ("keras", "tf_keras", "tensorflow")


def defined_by(module: object, roots: tuple[str, ...]) -> bool:
    """True if the dotted module name `module` lies in one of the packages `roots`."""
    return isinstance(module, str) and module.partition(".")[0] in roots


def number(name: str, value: object, *, low: float = -math.inf, finite: bool = True) -> float:
    """value as a float.

    Raises: ValueError if it is not a real number, is NaN, lies below `low`, or is infinite where `finite`.
    """
    if isinstance(value, int | float | np.integer | np.floating):
        real = float(value)
        if real >= low and not (finite and math.isinf(real)):  # false for NaN
            return real
    kind = "a finite number" if finite else "a number"
    bound = f" >= {low:g}" if low > -math.inf else ""
    raise ValueError(f"{name} must be {kind}{bound}, received {value!r}.")


def integers(name: str, value: object) -> list[int]:
    """value as a list.

    Raises: ValueError if it is not a sequence of integers.
    """
    if isinstance(value, Sequence) and all(isinstance(one, int | np.integer) for one in value):
        return [int(one) for one in value]
    raise ValueError(f"{name} must be None or integers, received {value!r}.")


def floating(w: npt.ArrayLike) -> npt.NDArray[Any]:
    """w as an array, which must be a floating one (ml_dtypes' types, of kind "V", included).

    Raises: TypeError if its dtype is not floating.
    """
    array = np.asarray(w)
    if array.dtype.kind not in "fV":
        raise TypeError(f"w must be an array of a floating dtype, received dtype {array.dtype}.")
    return array


class Configurable:
    """An object that its constructor's arguments describe.

    Each argument is kept in the attribute of its name, in a JSON-serializable form.
    """

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as a new dict of JSON-serializable values."""
        return {name: copy.deepcopy(getattr(self, name)) for name in inspect.signature(type(self)).parameters}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The object that get_config() described; `config` is not changed."""
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Configurable) or type(self) is not type(other):
            return NotImplemented
        return self.get_config() == other.get_config()

    def __hash__(self) -> int:
        return hash(type(self))  # configs hold lists, and objects that compare equal must hash alike

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


class Registry:
    """Objects of one kind by the names that configs use for them.

    Args:
        kind: what an error message calls them.
        base: their common class.
        namespace: each concrete subclass of `base` here is known by every public name that it has here.
        aliases: further names; the value may be a function that makes the object.
        optional: whether None is accepted, and is None.
    """

    def __init__(
        self,
        kind: str,
        base: type,
        namespace: Mapping[str, object],
        aliases: Mapping[str, Callable[..., Any]],
        optional: bool = False,
    ) -> None:
        self._kind, self._optional = kind, optional
        public = {name: c for name, c in namespace.items() if isinstance(c, type) and not name.startswith("_")}
        classes = {name: c for name, c in public.items() if issubclass(c, base) and not inspect.isabstract(c)}
        self._makers: dict[str, object] = {**classes, **aliases}

    def get(self, identifier: object, argument: str | None = None) -> Any:
        """The object for a name, config dict, class (called without arguments) or callable (kept as it is).

        argument: what an error message calls it.

        Raises: ValueError for an unknown name, a malformed or foreign config, and anything else.
        """
        argument = argument or self._kind
        if identifier is None and self._optional:
            return None
        if isinstance(identifier, str):
            return self._make(identifier, {}, argument)
        if isinstance(identifier, Mapping):
            return self._from_dict(identifier, argument)
        found: object = identifier() if isinstance(identifier, type) else identifier
        if not callable(found):
            raise ValueError(
                f"{argument} must be a name, a config dict with the keys class_name and config, "
                f"an object, a class or a callable, received {identifier!r}."
            )
        return found

    def serialize(self, component: object) -> dict[str, Any] | str | None:
        """{"class_name", "config"}, as TensorFlow's Keras reads it, of an object that has get_config(), else its name;
        None for None.

        Raises: ValueError for an object with neither, or with a name that is another's here.
        """
        if component is None:
            return None
        if hasattr(component, "get_config") and not isinstance(component, type):
            return {"class_name": type(component).__name__, "config": component.get_config()}
        name = getattr(component, "__name__", None)
        if not isinstance(name, str) or not name.isidentifier():  # a lambda's is none
            raise ValueError(f"{self._kind} must have get_config() or a name to be serialized, received {component!r}.")
        is_numpys = defined_by(getattr(component, "__module__", None), ("numpy",))  # whose ones and zeros are the same
        if self._makers.get(name, component) is not component and not is_numpys:
            raise ValueError(
                f"{self._kind} must have a name of its own to be serialized, received {component!r}: {name!r} is known."
            )
        return name

    def _from_dict(self, identifier: Mapping[str, Any], argument: str) -> Callable[..., Any]:
        name, config = identifier.get("class_name"), identifier.get("config", {})
        if not isinstance(name, str):
            raise ValueError(f"{argument} config must name a class_name, received {dict(identifier)!r}.")
        # Keras tells a user's own Zeros, or a function, from the built-in class by nothing but the module.
        if "module" in identifier and not defined_by(identifier["module"], (*KERAS, "nbbn")):
            raise ValueError(
                f"{argument} must be passed as the object or function itself if its module is foreign, "
                f"received {dict(identifier)!r}."
            )
        if not isinstance(config, Mapping):
            raise ValueError(f"config of {argument} {name!r} must be a dict, received {config!r}.")
        return self._make(name, config, argument)

    def _make(self, name: str, config: Mapping[str, Any], argument: str) -> Callable[..., Any]:
        if name not in self._makers:
            raise ValueError(
                f"{argument} must be one of the names {', '.join(sorted(self._makers))}, or the object or function "
                f"itself, received {name!r}."
            )
        maker: Any = self._makers[name]
        try:
            made: Callable[..., Any] = maker.from_config(config) if hasattr(maker, "from_config") else maker(**config)
        except TypeError as error:
            known = ", ".join(inspect.signature(maker).parameters)
            keys = f"have none but the keys {known}" if known else "be empty"
            raise ValueError(f"config of {argument} {name!r} must {keys}, received {dict(config)!r}.") from error
        return made
