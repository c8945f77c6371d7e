"""Names, collections and sharing: variable scopes, reuse, templates."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nbbn.compat import v1
from tests.parity.tf_side import tf_keras
from tests.parity.v1.sides import Nbbn, TensorFlow, assert_same_summary, functional

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.*batch_normalization. is deprecated"),
]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"center": False},
    {"scale": False},
    {"trainable": False},
    {"renorm": True},
    {"virtual_batch_size": 2},
    {"virtual_batch_size": 2, "renorm": True},
    {"fused": False},
    {"gamma_regularizer": tf_keras.regularizers.L2(0.5), "beta_regularizer": tf_keras.regularizers.L1(0.25)},
    {"gamma_regularizer": tf_keras.regularizers.L2(0.5), "scale": False},
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 2, 5)])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "defaults")
def test_collections_of_one_call(options: dict[str, Any], shape: tuple[int, ...], training: bool) -> None:
    x = np.ones(shape, np.float32)
    assert_same_summary(lambda side: functional(side, x, training=training, **options) is None)
    expected = 2 * training * options.get("trainable", True)
    assert len(v1.get_collection(v1.GraphKeys.UPDATE_OPS)) == expected


def test_training_defaults_to_false(x: np.ndarray) -> None:
    assert_same_summary(lambda side: functional(side, x) is None)
    assert v1.get_collection(v1.GraphKeys.UPDATE_OPS) == []


def unnamed_three_times(side: Any, x: np.ndarray) -> None:
    for _ in range(3):
        functional(side, x, training=True)


def named_beside_unnamed(side: Any, x: np.ndarray) -> None:
    functional(side, x, name="bn")
    functional(side, x)
    functional(side, x, name="other")
    functional(side, x)


def nested_scopes(side: Any, x: np.ndarray) -> list[str]:
    with side.variable_scope("outer") as outer:
        functional(side, x)
        functional(side, x)
        functional(side, x, name="bn")
        with side.variable_scope("inner") as inner:
            functional(side, x)
            functional(side, x, name="bn")
    functional(side, x)
    return [outer.name, inner.name]


def default_names_of_scopes(side: Any, x: np.ndarray) -> list[str]:
    names = []
    for _ in range(3):
        with side.variable_scope(None, "block") as scope:
            functional(side, x)
            names.append(scope.name)
    return names


def named_and_reused(side: Any, x: np.ndarray) -> None:
    functional(side, x, name="bn", training=True)
    functional(side, x, name="bn", training=True, reuse=True)


def named_and_reused_automatically(side: Any, x: np.ndarray) -> None:
    for _ in range(3):
        functional(side, x, name="bn", training=True, reuse=side.AUTO_REUSE)


def scope_opened_for_reuse(side: Any, x: np.ndarray) -> None:
    with side.variable_scope("outer"):
        functional(side, x)
        functional(side, x, name="bn")
    with side.variable_scope("outer", reuse=True):
        functional(side, x)
        functional(side, x, name="bn")
    with side.variable_scope("outer", reuse=side.AUTO_REUSE):
        functional(side, x, name="bn")
        functional(side, x, name="new")
        with side.variable_scope("inner"):
            functional(side, x, name="bn")
    with side.variable_scope("outer", reuse=side.AUTO_REUSE):
        functional(side, x, name="new")


def scope_object_entered_again(side: Any, x: np.ndarray) -> str:
    with side.variable_scope("outer") as scope:
        functional(side, x, name="bn")
    with side.variable_scope("elsewhere"), side.variable_scope(scope, reuse=True) as again:
        functional(side, x, name="bn")
        return again.name


def reuse_that_an_inner_scope_cannot_end(side: Any, x: np.ndarray) -> None:
    with side.variable_scope("outer"), side.variable_scope("inner"):
        functional(side, x, name="bn")
    with side.variable_scope("outer", reuse=True), side.variable_scope("inner", reuse=False):
        functional(side, x, name="bn", reuse=False)


def layer_objects_of_one_name(side: Any, x: np.ndarray) -> list[str]:
    """Unlike the functional form, a second object of a name gets variables of its own."""
    layers = [side.layers.BatchNormalization(name="bn") for _ in range(3)]
    for layer in layers:
        layer(side.input(x), training=True)
    return [layer.scope_name for layer in layers]


def layer_objects_that_share(side: Any, x: np.ndarray) -> list[str]:
    layers = [side.layers.BatchNormalization(name="bn", _scope="bn", _reuse=side.AUTO_REUSE) for _ in range(2)]
    for layer in layers:
        layer(side.input(x), training=True)
    return [layer.scope_name for layer in layers]


def regularized_and_shared(side: Any, x: np.ndarray) -> None:
    regularizer = tf_keras.regularizers.L2(0.5)
    functional(side, x, name="bn", gamma_regularizer=regularizer)
    functional(side, x, name="bn", gamma_regularizer=regularizer, reuse=True)


def towers_by_the_open_scope(side: Any, x: np.ndarray) -> list[Any]:
    functional(side, x)
    for i in range(2):
        with side.variable_scope(side.get_variable_scope(), reuse=i > 0):
            functional(side, x)
    with side.variable_scope("outer") as outer:
        functional(side, x)
        with side.variable_scope(outer):
            functional(side, x)
        with side.variable_scope(None, "block") as first:
            pass
        with side.variable_scope(outer), side.variable_scope(None, "block") as second:
            pass
        found = side.get_variable_scope()
    found_reuse = [found.reuse, side.get_variable_scope().reuse]
    side.get_variable_scope().reuse_variables()
    return [found.name, *found_reuse, side.get_variable_scope().reuse, first.name, second.name]


def template_of(side: Any, name: str, *more: Any, **options: Any) -> Any:
    """A template of a network of two layers."""

    def network(x: np.ndarray, training: bool = False) -> None:
        functional(side, x, training=training)
        functional(side, x, training=training)

    return side.make_template(name, network, *more, **options)


def facts_of(template: Any) -> list[Any]:
    kinds = ("variables", "trainable_variables", "global_variables")
    found = [[v.name for v in getattr(template, kind)] for kind in kinds]
    return [template.name, template.variable_scope and template.variable_scope.name, *found]


def templates(side: Any, x: np.ndarray) -> list[Any]:
    found = []
    for template in [template_of(side, "net"), template_of(side, "net", training=True)]:
        found.append(facts_of(template))
        template(x)
        with side.variable_scope("elsewhere"):
            template(x)
        found.append(facts_of(template))
    return found


def templates_in_scopes(side: Any, x: np.ndarray) -> list[Any]:
    """A template belongs to the scope where it is called first, or where it is made with create_scope_now_."""
    with side.variable_scope("made"):
        made = [template_of(side, "net"), template_of(side, "net", True), template_of(side, "net", True)]
    with side.variable_scope("called"):
        for template in made:
            template(x)
    with side.variable_scope(None, "net"):
        pass
    template_of(side, "net")(x)
    return [facts_of(template) for template in made]


def template_with_a_unique_name(side: Any, x: np.ndarray) -> list[Any]:
    template = template_of(side, "net", unique_name_="own")
    for _ in range(2):
        template(x)
    return facts_of(template)


def template_in_a_scope_that_reuses(side: Any, x: np.ndarray) -> None:
    for reuse in (False, True):
        with side.variable_scope("outer", reuse=reuse):
            template_of(side, "net")(x)


def templates_in_templates(side: Any, x: np.ndarray) -> None:
    shared = template_of(side, "shared")

    def network() -> None:
        functional(side, x)
        shared(x)
        template_of(side, "own")(x)
        side.layers.BatchNormalization()(side.input(x))

    for template in [side.make_template("one", network), side.make_template("two", network)]:
        template()
        template()
    shared(x)


@pytest.mark.parametrize(
    "program",
    [
        towers_by_the_open_scope,
        templates,
        templates_in_scopes,
        template_with_a_unique_name,
        template_in_a_scope_that_reuses,
        templates_in_templates,
        unnamed_three_times,
        named_beside_unnamed,
        nested_scopes,
        default_names_of_scopes,
        named_and_reused,
        named_and_reused_automatically,
        scope_opened_for_reuse,
        scope_object_entered_again,
        regularized_and_shared,
        reuse_that_an_inner_scope_cannot_end,
        layer_objects_of_one_name,
        layer_objects_that_share,
    ],
)
def test_names_and_sharing(program: Callable[[Any, np.ndarray], Any], x: np.ndarray) -> None:
    assert_same_summary(lambda side: program(side, x))


def same_name_twice(side: Any, x: np.ndarray) -> None:
    functional(side, x, name="bn")
    functional(side, x, name="bn")


def same_name_twice_in_a_scope(side: Any, x: np.ndarray) -> None:
    for _ in range(2):
        with side.variable_scope("outer"):
            functional(side, x, name="bn")


def unnamed_in_a_scope_opened_twice(side: Any, x: np.ndarray) -> None:
    for _ in range(2):
        with side.variable_scope("outer"):
            functional(side, x)


def reuse_of_nothing(side: Any, x: np.ndarray) -> None:
    functional(side, x, name="bn", reuse=True)


def reuse_of_nothing_by_the_scope(side: Any, x: np.ndarray) -> None:
    with side.variable_scope("outer", reuse=True):
        functional(side, x, name="bn")


def unnamed_reuse_of_nothing(side: Any, x: np.ndarray) -> None:
    functional(side, x, reuse=True)


def reuse_with_another_shape(side: Any, x: np.ndarray) -> None:
    functional(side, x, name="bn")
    functional(side, x[:, :2], name="bn", reuse=True)


def automatic_reuse_with_another_shape(side: Any, x: np.ndarray) -> None:
    functional(side, x, name="bn", reuse=side.AUTO_REUSE)
    functional(side, x[:, :2], name="bn", reuse=side.AUTO_REUSE)


def reuse_with_another_dtype(side: Any, x: np.ndarray) -> None:
    functional(side, x, name="bn")
    functional(side, x.astype(np.float64), name="bn", reuse=True)


def reuse_with_more_variables(side: Any, x: np.ndarray) -> None:
    functional(side, x, name="bn", scale=False)
    functional(side, x, name="bn", reuse=True)


def layer_that_takes_a_used_name(side: Any, x: np.ndarray) -> None:
    functional(side, x, name="bn")
    side.layers.BatchNormalization(name="bn", _scope="bn")(side.input(x))


def scope_reused_by_its_default_name(side: Any, x: np.ndarray) -> None:
    with side.variable_scope(None, "block", reuse=True):
        pass


def template_that_needs_more_later(side: Any, x: np.ndarray) -> None:
    template = side.make_template("net", lambda name: functional(side, x, name=name))
    template("one")
    template("two")


def templates_of_one_unique_name(side: Any, x: np.ndarray) -> None:
    for _ in range(2):
        template_of(side, "net", unique_name_="own")(x)


def template_without_a_name(side: Any, x: np.ndarray) -> None:
    side.make_template(None, functional)


@pytest.mark.parametrize(
    "program",
    [
        template_that_needs_more_later,
        templates_of_one_unique_name,
        template_without_a_name,
        same_name_twice,
        same_name_twice_in_a_scope,
        unnamed_in_a_scope_opened_twice,
        reuse_of_nothing,
        reuse_of_nothing_by_the_scope,
        unnamed_reuse_of_nothing,
        reuse_with_another_shape,
        automatic_reuse_with_another_shape,
        reuse_with_another_dtype,
        reuse_with_more_variables,
        layer_that_takes_a_used_name,
        scope_reused_by_its_default_name,
    ],
)
def test_refused_with_a_value_error(program: Callable[[Any, np.ndarray], Any], x: np.ndarray) -> None:
    for side in (TensorFlow(), Nbbn()):
        with pytest.raises(ValueError, match=r"(?i)variable|name|reuse"):
            program(side, x)


def test_scope_without_a_name() -> None:
    for side in (TensorFlow(), Nbbn()):
        with pytest.raises(TypeError, match="name"), side.variable_scope(None):
            pass


@pytest.mark.parametrize("automatic", [False, True])
def test_deviation_reuse_needs_a_name(x: np.ndarray, automatic: bool) -> None:
    """Without a name tf_keras reuses `batch_normalization`, whatever that is; nbbn asks for the name."""

    def program(side: Any) -> None:
        functional(side, x)
        functional(side, x, reuse=side.AUTO_REUSE if automatic else True)

    program(TensorFlow())
    with pytest.raises(ValueError, match="name"):
        program(Nbbn())
