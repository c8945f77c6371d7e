"""nbbn.compat.v1 beside TensorFlow 1's layers in a graph: names, sharing, collections, updates, values.

tf_keras's legacy layers build a graph of placeholders that a session runs; nbbn's compute at once. Each test writes its
program once, for both: `Side` hides the difference.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nbbn.compat import v1
from tests.parity.tf_side import batch_normalization_v1, legacy, parameter_dtype, tf, tf_keras

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.*batch_normalization. is deprecated"),
]

tf1 = tf.compat.v1
KEYS = ("GLOBAL_VARIABLES", "TRAINABLE_VARIABLES", "UPDATE_OPS", "REGULARIZATION_LOSSES")
# A few roundings of float32 values of size 5 on each side.
TOLERANCE = 1e-5


class TensorFlow:
    """The program's view of TensorFlow 1: graph, session, placeholders that know their values."""

    variable_scope, AUTO_REUSE = staticmethod(tf1.variable_scope), tf1.AUTO_REUSE
    make_template, get_variable_scope = staticmethod(tf1.make_template), staticmethod(tf1.get_variable_scope)
    layers, keras = legacy, SimpleNamespace(layers=batch_normalization_v1)

    def __init__(self) -> None:
        self.feeds: dict[Any, np.ndarray] = {}
        self.session = tf1.Session()

    def input(self, x: np.ndarray) -> Any:
        placeholder = tf1.placeholder(x.dtype, x.shape)
        self.feeds[placeholder] = x
        return placeholder

    def collection(self, key: str) -> list[Any]:
        return tf1.get_collection(getattr(tf1.GraphKeys, key))

    def values(self, tensors: Any) -> Any:
        if not isinstance(tensors, list):
            return self.values([tensors])[0]
        return [self.session.run(t, self.feeds) for t in tensors]

    def run(self, updates: list[Any]) -> None:
        """All at once: each update of a renorm layer alone would move renorm_mean and renorm_stddev again."""
        self.session.run(updates, self.feeds)

    def assign(self, variable: Any, value: np.ndarray) -> None:
        self.session.run(tf1.assign(variable, value))

    def initialize(self) -> None:
        self.session.run(tf1.global_variables_initializer())


class Nbbn:
    """The same for nbbn, where inputs are arrays and outputs are values."""

    variable_scope, AUTO_REUSE = staticmethod(v1.variable_scope), v1.AUTO_REUSE
    make_template, get_variable_scope = staticmethod(v1.make_template), staticmethod(v1.get_variable_scope)
    layers, keras = v1.layers, v1.keras

    def input(self, x: np.ndarray) -> np.ndarray:
        return x

    def collection(self, key: str) -> list[Any]:
        return v1.get_collection(getattr(v1.GraphKeys, key))

    def values(self, tensors: Any) -> Any:
        return [np.asarray(t) for t in tensors] if isinstance(tensors, list) else np.asarray(tensors)

    def run(self, updates: list[Any]) -> None:
        for update in updates:
            update.run()

    def initialize(self) -> None:
        pass

    def assign(self, variable: Any, value: np.ndarray) -> None:
        variable.assign(value)


Program = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def graph() -> Iterator[None]:
    v1.reset_default_graph()
    with tf.Graph().as_default():
        yield
    v1.reset_default_graph()


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(17).normal(1, 2, size=(6, 3)).astype(np.float32)


def summary(side: Any) -> dict[str, Any]:
    """The names of the variables, and how many updates and losses were collected."""
    names = {key: [variable.name for variable in side.collection(key)] for key in KEYS[:2]}
    return names | {key: len(side.collection(key)) for key in KEYS[2:]}


def assert_same_summary(program: Program) -> None:
    """The program leaves the same variables and collections, and returns the same."""
    theirs, ours = TensorFlow(), Nbbn()
    assert program(ours) == program(theirs)
    assert summary(ours) == summary(theirs)


def assert_same_values(program: Program) -> None:
    """The arrays that the program returns agree, and so do all variables afterwards."""
    theirs, ours = TensorFlow(), Nbbn()
    expected, actual = program(theirs), program(ours)
    assert len(actual) == len(expected)
    for mine, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=TOLERANCE)
        assert mine.dtype == other.dtype
    assert summary(ours)["GLOBAL_VARIABLES"] == summary(theirs)["GLOBAL_VARIABLES"]
    for mine, other in zip(ours.collection("GLOBAL_VARIABLES"), theirs.collection("GLOBAL_VARIABLES"), strict=True):
        value = theirs.values(other)
        np.testing.assert_allclose(mine.numpy(), value, rtol=0, atol=TOLERANCE, err_msg=mine.name)
        assert mine.numpy().dtype == value.dtype


# --- names, collections, sharing ------------------------------------------------------------


def functional(side: Any, x: np.ndarray, **options: Any) -> Any:
    return side.layers.batch_normalization(side.input(x), **options)


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


# --- layer objects ------------------------------------------------------------


def test_layer_object(x: np.ndarray) -> None:
    """Its name, its variables' scope, and what belongs to which inputs."""
    regularizer = tf_keras.regularizers.L2(0.5)
    other = x + 1

    def program(side: Any) -> list[Any]:
        layer = side.layers.BatchNormalization(gamma_regularizer=regularizer)
        first, second = side.input(x), side.input(other)
        layer(first, training=True)
        layer(second, training=True)
        layer.apply(second, training=False)
        return [
            layer.scope_name,
            len(layer.updates),
            len(layer.get_updates_for(first)),
            len(layer.get_updates_for(second)),
            len(layer.get_updates_for(None)),
            len(layer.losses),
            len(layer.get_losses_for(None)),
            len(layer.get_losses_for(first)),
        ]

    assert_same_summary(program)


@pytest.mark.parametrize("options", [{}, {"trainable": False}, {"renorm": True}], ids=str)
def test_keras_layer_keeps_its_updates_to_itself(x: np.ndarray, options: dict[str, Any]) -> None:
    """tf.compat.v1.keras's layer records updates, but in no collection."""

    def program(side: Any) -> list[int]:
        layer = side.keras.layers.BatchNormalization(**options)
        layer(side.input(x), training=True)
        layer(side.input(x), training=False)
        return [len(layer.updates), len(side.collection("UPDATE_OPS"))]

    theirs, ours = program(TensorFlow()), program(Nbbn())
    assert ours == theirs


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtype_of_the_variables_follows_the_input(dtype: str, x: np.ndarray) -> None:
    assert_same_summary(lambda side: functional(side, x.astype(dtype), training=True) is None)
    for variable in v1.get_collection(v1.GraphKeys.GLOBAL_VARIABLES):
        assert variable.numpy().dtype == parameter_dtype(dtype)
    for variable in tf1.global_variables():
        assert variable.dtype.base_dtype.name == parameter_dtype(dtype)


# --- values ------------------------------------------------------------


VALUES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((6, 3), {}),
    ((6, 3), {"momentum": 0.0}),
    ((6, 3), {"momentum": 1.0, "center": False}),
    ((4, 3, 2, 5), {"momentum": 0.5}),
    ((4, 3, 2, 5), {"momentum": 0.5, "fused": False, "axis": 1}),
    ((4, 3, 2, 5), {"momentum": 0.5, "axis": [1, 3], "scale": False}),
    ((6, 3), {"momentum": 0.5, "trainable": False}),
    ((6, 3), {"momentum": 0.5, "virtual_batch_size": 2}),
    ((6, 3), {"momentum": 0.5, "renorm": True, "renorm_momentum": 0.25}),
    ((6, 3), {"momentum": 0.5, "renorm": True, "renorm_clipping": {"rmax": 1.5, "rmin": 0.75, "dmax": 0.5}}),
    ((6, 3), {"momentum": 0.5, "renorm": True, "renorm_momentum": 0.25, "virtual_batch_size": 2}),
    ((6, 3), {"momentum": 0.5, "renorm": True, "trainable": False}),
    ((6, 3), {"momentum": 0.5, "moving_mean_initializer": "ones", "beta_initializer": "ones"}),
]
each_values = pytest.mark.parametrize(("shape", "options"), VALUES, ids=str)


@each_values
def test_values_of_the_functional_form(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """Three times: train, run the updates, infer with the shared variables."""

    def program(side: Any) -> list[np.ndarray]:
        def call(x: np.ndarray, training: bool) -> Any:
            return functional(side, x, training=training, name="bn", reuse=side.AUTO_REUSE, **options)

        first, *rest = batches(shape, 4)
        call(first, training=False)
        randomize(side)
        outputs = []
        for x in rest:
            known = len(side.collection("UPDATE_OPS"))
            outputs.append(side.values(call(x, training=True)))
            side.run(side.collection("UPDATE_OPS")[known:])
            outputs.append(side.values(call(x, training=False)))
        return outputs

    assert_same_values(program)


@each_values
def test_values_of_the_layer(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """The same through an object and its `updates`."""

    def program(side: Any) -> list[np.ndarray]:
        layer = side.layers.BatchNormalization(**options)
        first, *rest = batches(shape, 4)
        layer(side.input(first))
        randomize(side)
        outputs = []
        for x in rest:
            inputs = side.input(x)
            outputs.append(side.values(layer(inputs, training=True)))
            side.run(layer.get_updates_for(inputs))
            outputs.append(side.values(layer(inputs)))
        return outputs

    assert_same_values(program)


def test_state_waits_for_the_updates(x: np.ndarray) -> None:
    """Without running the updates nothing moves."""

    def program(side: Any) -> list[np.ndarray]:
        layer = side.layers.BatchNormalization(momentum=0.5)
        layer.build(x.shape)
        side.initialize()
        for _ in range(2):
            side.values(layer(side.input(x), training=True))
        return [side.values(layer(side.input(x)))]

    assert_same_values(program)
    np.testing.assert_array_equal(v1.get_collection(v1.GraphKeys.GLOBAL_VARIABLES)[2].numpy(), 0)


@pytest.mark.parametrize("center", [True, False])
def test_values_of_regularization_losses(x: np.ndarray, center: bool) -> None:
    """They are those of the variables' values now."""
    options = {
        "center": center,
        "gamma_regularizer": tf_keras.regularizers.L2(0.5),
        "beta_regularizer": tf_keras.regularizers.L1(0.25),
    }

    def program(side: Any) -> list[np.ndarray]:
        functional(side, x, **options)
        side.initialize()
        before = side.values(side.collection("REGULARIZATION_LOSSES"))
        randomize(side)
        after = side.values(side.collection("REGULARIZATION_LOSSES"))
        return [np.asarray(loss, np.float32) for loss in before + after]

    assert_same_values(program)


def randomize(side: Any) -> None:
    """Other values than the initial ones for all variables; positive, so that a standard deviation may have them."""
    rng = np.random.default_rng(23)
    side.initialize()
    for variable in side.collection("GLOBAL_VARIABLES"):
        side.assign(variable, rng.uniform(0.5, 1.5, side.values(variable).shape).astype(np.float32))


def batches(shape: tuple[int, ...], count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(19)
    return [rng.normal(1, 2, size=shape).astype(np.float32) for _ in range(count)]
