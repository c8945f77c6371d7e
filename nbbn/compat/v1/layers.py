"""tf.compat.v1.layers: the layer that lives in a graph of named variables, and its functional form."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from nbbn.call.gradients import Gradients
from nbbn.compat.v1.graph import (
    GraphKeys,
    Reuse,
    Scope,
    Variable,
    add_to_collection,
    default_graph,
    variable_scope,
)
from nbbn.compat.v1.keras.layers import BatchNormalization as KerasBatchNormalization
from nbbn.compat.v1.keras.layers import Update
from nbbn.layer.layer import BatchNormalization as BatchNormalizationV2
from nbbn.regularizers import loss
from nbbn.state.shapes import Shapes
from nbbn.state.variables import PARAMETERS, PARTS, Variables

_BASE_NAME = "batch_normalization"
_V2_SIGNATURE = inspect.signature(BatchNormalizationV2)


class _Loss:
    """A regularization loss in its collection: its value now, when called."""

    def __init__(self, variable: Variable, regularizer: Any) -> None:
        self.name, self._variable, self._regularizer = variable.name, variable, regularizer

    def __call__(self) -> float:
        return loss(self._regularizer, self._variable.numpy())


class BatchNormalization(KerasBatchNormalization):
    """tf.compat.v1.layers.BatchNormalization: the V1 layer with variables in the default graph.

    Its variables are created in, or with reuse taken from, a variable scope of its name at the first call. Updates
    are recorded in the collection UPDATE_OPS too.

    Args: those of nbbn.BatchNormalization, and
        _reuse: True takes existing variables, AUTO_REUSE creates what does not exist; needs a name.
        _scope: the scope's name, which is then not made unique.
    Raises: ValueError if variables of that name exist already without reuse, do not exist with reuse=True, or have
        another shape; for reuse without a name.
    """

    _is_kept = True  # by whoever has made it

    def __init__(self, *args: Any, _reuse: Reuse = None, _scope: str | None = None, **kwargs: Any) -> None:
        name = _V2_SIGNATURE.bind(*args, **kwargs).arguments.get("name", _scope)
        if _reuse and name is None:
            raise ValueError(f"reuse={_reuse!r} needs a name for the layer; received name=None")
        self._scope_argument, self._reuse = _scope, _reuse
        self._has_name, self._base_name = name is not None, _BASE_NAME if name is None else str(name)
        self._began = default_graph().loops.made
        self._scope: Scope | None = None
        super().__init__(*args, **kwargs)

    def _unique_name(self) -> str:
        graph = default_graph()
        with graph.lock:
            name = graph.layer_names.unique(_BASE_NAME)
            graph.layer_names.used.add(name)
        return name

    @property
    def scope_name(self) -> str:
        """The name of the variable scope that holds the variables. Raises: ValueError before it is known."""
        if self._scope is None:
            raise ValueError("the scope of a layer without a name is known after the first call or build()")
        return self._scope.name

    def _make_variables(self, shapes: Shapes) -> Variables:
        graph = default_graph()
        wanted = super()._make_variables(shapes)
        name, reuse = self._scope_argument or self._base_name, self._reuse
        # Layer objects of one name get scopes of their own, unless they reuse.
        is_new = self._scope_argument is None and not reuse
        opened = variable_scope(None, name) if is_new else variable_scope(name, reuse=reuse)
        with graph.lock, opened as scope:
            self._scope = scope
            existing = graph.variables.get(scope.name)
            if existing is None:
                if scope.reuse is True:
                    raise ValueError(
                        f"there are no variables {_listed(scope, wanted)}, and none are made with reuse=True or by a "
                        "template after its first call"
                    )
                self._collect(scope, wanted)
                graph.variables[scope.name] = wanted
                return wanted
            _check_reuse(scope, existing, wanted)
            return existing

    def _collect(self, scope: Scope, variables: Variables) -> None:
        # Of layers that were made together and are called one by one, nothing is lost.
        if not self._has_name and self._began == default_graph().loops.made:
            default_graph().loops.notice(self._is_trained_once, self._is_kept)
        regularizers = {"gamma": self.gamma_regularizer, "beta": self.beta_regularizer}
        for name in variables.names:
            variable = Variable(f"{scope.name}/{name}:0", variables)
            add_to_collection(GraphKeys.GLOBAL_VARIABLES, variable)
            if name in PARAMETERS and self.trainable:
                add_to_collection(GraphKeys.TRAINABLE_VARIABLES, variable)
            if regularizers.get(name) is not None:
                add_to_collection(GraphKeys.REGULARIZATION_LOSSES, _Loss(variable, regularizers[name]))

    def _is_trained_once(self) -> bool:
        return len(self._updates) == len(PARTS) and any(update.done for update in self._updates)

    @property
    def _update_prefix(self) -> str:
        return self.scope_name

    def _add_update(self, update: Update) -> None:
        super()._add_update(update)
        add_to_collection(GraphKeys.UPDATE_OPS, update)


def _listed(scope: Scope, variables: Variables) -> str:
    return ", ".join(f"{scope.name}/{n}" for n in variables.names)


def _check_reuse(scope: Scope, existing: Variables, wanted: Variables) -> None:
    if not scope.reuse:
        raise ValueError(
            f"variables {_listed(scope, existing)} exist already; pass reuse=True or AUTO_REUSE to share them"
        )
    if existing.names != wanted.names:
        raise ValueError(
            f"the options need the variables {_listed(scope, wanted)}; those there are {_listed(scope, existing)}"
        )
    for label, what in (("shape", "params"), ("dtype", "dtype")):
        has, needs = getattr(existing.shapes, what), getattr(wanted.shapes, what)
        if has != needs:
            raise ValueError(f"variables of {scope.name} have {label} {has}; this input needs {label} {needs}")


class _Call(BatchNormalization):
    """The layer of one call of the functional form: nobody keeps it, its variables are found by their name alone."""

    _is_kept = False


def _call(method: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """A method of the layer for the arguments of the functional form."""
    options = {k: v for k, v in arguments.items() if k not in ("inputs", "training", "reuse")}
    layer = _Call(**options, _reuse=arguments["reuse"], _scope=arguments["name"])
    return method(layer, arguments["inputs"], training=arguments["training"])


def batch_normalization(
    inputs: Any,
    axis: Any = -1,
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
    training: bool = False,
    trainable: bool = True,
    name: str | None = None,
    reuse: Reuse = None,
    renorm: bool = False,
    renorm_clipping: Any = None,
    renorm_momentum: float | Callable[[], float] = 0.99,
    fused: bool | None = None,
    virtual_batch_size: int | None = None,
    adjustment: Any = None,
) -> Any:
    """tf.compat.v1.layers.batch_normalization: the normalized `inputs`; the arguments are those of the layer.

    In training two updates of the moving statistics are added to the collection UPDATE_OPS; run them:

        for update in get_collection(GraphKeys.UPDATE_OPS):
            update.run()

    Args:
        training: normalize with the batch's statistics. name: of the variable scope; a unique one if it is None, so
            that every call has variables of its own: use make_template() in a loop.
        reuse: True takes the variables of that name, AUTO_REUSE creates or takes them.
    """
    return _call(BatchNormalization.__call__, locals())


@functools.wraps(batch_normalization, assigned=())
def batch_normalization_vjp(*args: Any, **kwargs: Any) -> tuple[Any, Callable[..., Gradients]]:
    """batch_normalization() and its gradient: the normalized `inputs`, and a function from dy to Gradients.

    Args: those of batch_normalization().
    Returns: what BatchNormalization.vjp does: y and pullback. pullback(dy) has the gradients `inputs`, `gamma` and
        `beta`; the last two belong to the variables of these names, which are among trainable_variables().
    """
    arguments = inspect.signature(batch_normalization).bind(*args, **kwargs)
    arguments.apply_defaults()
    y, pullback = _call(BatchNormalization.vjp, arguments.arguments)
    return y, pullback
