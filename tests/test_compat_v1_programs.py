"""Whole TensorFlow 1 programs: templates, loops, the gradient of the functional form, scopes and collections."""

import inspect
import threading
import warnings
from functools import partial

import numpy as np
import pytest

import nbbn.compat.v1 as tf1
from nbbn.compat.v1 import AUTO_REUSE, GraphKeys, get_collection, variable_scope
from tests.helpers.concurrency import in_threads
from tests.helpers.v1_examples import X2, X, bn, names, run_updates, scopes


def two_layers(x, training=False, **options):
    return bn(bn(x, training=training), training=training, **options)


# --- templates --------------------------------------------------------------------------------------------------------


def test_a_template_makes_variables_once():
    net = tf1.make_template("net", two_layers)
    assert (net.variables, net.trainable_variables, net.variable_scope) == ([], [], None)
    for training in (True, False, True):
        net(X, training=training)
    assert scopes() == ["net/batch_normalization", "net/batch_normalization_1"]
    assert len(get_collection(GraphKeys.UPDATE_OPS)) == 8
    assert (net.name, net.func, net.variable_scope.name) == ("net", two_layers, "net")
    assert [v.name for v in net.variables] == [v.name for v in net.global_variables] == names()
    assert [v.name for v in net.trainable_variables] == names(GraphKeys.TRAINABLE_VARIABLES)


def test_a_template_is_what_its_function_is():
    """Its arguments, those given beforehand, and whatever it returns."""
    net = tf1.make_template("net", lambda *args, **kwargs: (args, kwargs), a=1, b=2)
    assert net(3, b=4, c=5) == ((3,), {"a": 1, "b": 4, "c": 5})


def test_a_template_trains_what_it_infers_with():
    net = tf1.make_template("net", partial(bn, momentum=0.0))
    net(X, training=True)
    run_updates()
    np.testing.assert_allclose(net(X), (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-3), rtol=1e-5, atol=1e-6)


def test_variables_of_a_template_are_those_below_its_scope():
    """And not those of a scope whose name begins alike, or matches as a regular expression."""
    for name in ("a.c", "abc", "a.c_d"):
        tf1.make_template(name, bn)(X)
    net = tf1.make_template("n", bn, unique_name_="a.c")
    with variable_scope(tf1.get_variable_scope(), reuse=True):
        net(X)
    assert {v.name.split("/")[0] for v in net.variables} == {"a.c"}


def test_two_templates_in_one():
    inner = tf1.make_template("inner", bn)
    net = tf1.make_template("net", lambda x: inner(inner(two_layers(x))))
    for _ in range(2):
        net(X)
    inner(X)
    assert scopes() == ["net/batch_normalization", "net/batch_normalization_1", "net/inner/batch_normalization"]


def test_layer_objects_in_a_template():
    """Made in each call, or once before."""
    kept = tf1.layers.BatchNormalization(name="kept")
    net = tf1.make_template("net", lambda x: kept(tf1.layers.BatchNormalization()(x)))
    for _ in range(3):
        net(X)
    assert scopes() == ["net/batch_normalization", "net/kept"]


def test_a_later_call_makes_no_variables():
    net = tf1.make_template("net", lambda x, name: bn(x, name=name))
    net(X, "one")
    with pytest.raises(ValueError, match=r"net/two/gamma.*template after its first call"):
        net(X, "two")
    net(X, "one")
    assert scopes() == ["net/one"]


def test_a_first_call_that_fails_can_be_repeated():
    def function(x, second):
        return bn(x, name="one") + bn(second, name="two")

    net = tf1.make_template("net", function)
    for wrong in (X.astype(int), "no array"):
        with pytest.raises(TypeError):
            net(X, wrong)
    net(X, X)
    net(X, X2)
    assert scopes() == ["net/one", "net/two"]


def test_variables_that_were_there_stay_refused():
    """unique_name_ of an existing scope: no call of the template has made what is there."""
    bn(X, name="net/batch_normalization")
    net = tf1.make_template("other", bn, unique_name_="net")
    for _ in range(2):
        with pytest.raises(ValueError, match="exist already"):
            net(X)


def test_the_first_call_of_a_template_in_many_threads():
    net = tf1.make_template("net", two_layers)
    start = threading.Barrier(8)

    def work():
        start.wait()
        net(X, training=True)

    in_threads([work] * 8)
    assert scopes() == ["net/batch_normalization", "net/batch_normalization_1"]
    assert len(get_collection(GraphKeys.UPDATE_OPS)) == 32


@pytest.mark.parametrize(("arguments", "error"), [((None, bn), ValueError), (("net", "bn"), TypeError)])
def test_a_template_needs_a_name_and_a_function(arguments, error):
    with pytest.raises(error, match="name_" if error is ValueError else "func_.*'bn'"):
        tf1.make_template(*arguments)


# --- loops that make new variables in each step -----------------------------------------------------------------------


def line_of(function, text):
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if text in line)


def steps_until_warned(step, limit=150):
    """How many calls of `step` it takes, and the warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = 0
        while not caught and steps < limit:
            step()
            steps += 1
        for _ in range(limit):
            step()
    (warning,) = caught  # said once
    return steps, warning


def train_forgetfully():
    bn(X, training=True)  # this line
    run_updates()


def train_two_layers():
    hidden = bn(X, training=True)  # this line
    bn(hidden, training=True)
    run_updates()


def train_an_object():
    tf1.layers.BatchNormalization()(X, training=True)  # this line
    run_updates()


def train_without_updates():
    bn(X, training=True)  # this line


def infer():
    return bn(X)  # this line


def gradients():
    return tf1.layers.batch_normalization_vjp(X)  # this line


def default_scopes():
    with variable_scope(None, "block"):
        bn(X)  # this line


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (train_forgetfully, 20),
        (train_two_layers, 20),
        (train_an_object, 20),
        (train_without_updates, 100),
        (infer, 100),
        (gradients, 100),
        (default_scopes, 100),
    ],
)
def test_a_loop_over_batches_is_noticed(step, expected):
    """At the user's line, and with what to do."""
    steps, warning = steps_until_warned(step)
    assert steps == expected
    assert (warning.filename, warning.lineno) == (__file__, line_of(step, "this line"))
    for advice in ("make_template", "reuse=AUTO_REUSE", "BatchNormalization object"):
        assert advice in str(warning.message)


def test_a_scope_that_reuses_does_not_hide_a_loop():
    """Inside one scope that stays open, unnamed layers are new ones."""
    with variable_scope("net", reuse=AUTO_REUSE):
        assert steps_until_warned(infer)[0] == 100


def block(x):
    return bn(np.maximum(x, 0), training=True)


def of_many_layers():
    """Two stages in loops, and a helper function called from many lines."""
    x = X
    for _ in range(80):
        x = block(x)
    for _ in range(80):
        x = block(x)
    return block(x) + block(x) + block(x)


def of_layer_objects():
    """Made by one line; they are kept, so nothing is lost."""
    for layer in [tf1.layers.BatchNormalization() for _ in range(150)]:
        layer(X)


def of_layer_objects_in_turn():
    """Each is trained before the next one is called."""
    x = X
    for layer in [tf1.layers.BatchNormalization() for _ in range(64)]:
        x = layer(x, training=True)
        run_updates()


def of_folds():
    for _ in range(25):
        layer = tf1.layers.BatchNormalization()
        for _ in range(5):
            layer(X, training=True)
            run_updates()


def in_a_template():
    net = tf1.make_template("net", of_many_layers)
    for _ in range(2):
        net()
        run_updates()


def by_name():
    for _ in range(150):
        bn(X, training=True, name="bn", reuse=AUTO_REUSE)
        run_updates()


def by_scope():
    for _ in range(150):
        with variable_scope("net", reuse=AUTO_REUSE):
            two_layers(X, training=True)
        run_updates()


@pytest.mark.parametrize(
    "program", [of_many_layers, of_layer_objects, of_layer_objects_in_turn, of_folds, in_a_template, by_name, by_scope]
)
def test_a_network_is_not_taken_for_a_loop(program):
    program()  # a warning is an error here


# --- the gradient of the functional form ------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"scale": False, "momentum": 0.5}])
def test_the_gradient_is_that_of_the_layer(training, options):
    layer = tf1.layers.BatchNormalization(**options)
    y, pullback = layer.vjp(X, training=training)
    ours, ours_back = tf1.layers.batch_normalization_vjp(X, name="bn", training=training, **options)
    np.testing.assert_array_equal(ours, y)
    for mine, other in zip(ours_back(X2), pullback(X2), strict=True):
        assert (mine is None) == (other is None)
        np.testing.assert_array_equal(mine, other)
    assert len(get_collection(GraphKeys.UPDATE_OPS, "bn")) == 2 * training
    np.testing.assert_array_equal(bn(X, name="bn", training=training, reuse=True, **options), y)


def test_the_gradient_takes_the_same_arguments():
    vjp = tf1.layers.batch_normalization_vjp
    assert inspect.signature(vjp).parameters == inspect.signature(bn).parameters
    vjp(X, -1, 0.9, name="bn")
    with pytest.raises(ValueError, match="reuse=True or AUTO_REUSE"):
        vjp(X, name="bn")
    with pytest.raises(TypeError, match="momentom"):
        vjp(X, momentom=0.5)


# --- collections and scopes -------------------------------------------------------------------------------------------


def test_variables_by_scope():
    with variable_scope("a"):
        bn(X)
    bn(X, trainable=False, name="b")
    assert [v.name for v in tf1.global_variables("b/")] == [v.name for v in tf1.global_variables()][4:]
    kinds = ["gamma", "beta"]
    assert [v.name for v in tf1.trainable_variables()] == [f"a/batch_normalization/{kind}:0" for kind in kinds]
    assert tf1.trainable_variables("b") == []
    assert tf1.trainable_variables(".*gamma") == tf1.global_variables("a/.*gamma")


def test_the_open_scope():
    root = tf1.get_variable_scope()
    assert (root.name, root.reuse) == ("", False)
    with variable_scope("a") as a, variable_scope("b", reuse=AUTO_REUSE) as b:
        assert tf1.get_variable_scope() is b
        assert (a.reuse, b.reuse) == (False, AUTO_REUSE)
    assert tf1.get_variable_scope() is root


def test_towers_share_by_the_open_scope():
    """for i in range(towers): with variable_scope(get_variable_scope(), reuse=i > 0)"""
    bn(X)
    for i in range(3):
        with variable_scope(tf1.get_variable_scope(), reuse=i > 0):
            bn(X)
    tf1.get_variable_scope().reuse_variables()
    with pytest.raises(ValueError, match="batch_normalization_2/gamma"):
        two_layers(X)
    assert scopes() == ["batch_normalization", "batch_normalization_1"]


def test_a_collection_of_ones_own():
    for value in (3, X):
        tf1.add_to_collection("mine", value)
    assert [value is expected for value, expected in zip(get_collection("mine"), (3, X), strict=True)] == [True, True]
    assert get_collection("mine", ".*") == []  # neither has a name


class MyUpdate:
    name, done = "bn/mine", False

    def run(self):
        self.done = True


def test_members_of_the_known_collections():
    """Own updates leave like the layers'; a loss is a number, or a function that gives it."""
    bn(X, name="bn", training=True, gamma_regularizer="l2")
    tf1.add_to_collection(GraphKeys.UPDATE_OPS, MyUpdate())
    tf1.add_to_collection("kept", MyUpdate())
    assert len(get_collection(GraphKeys.UPDATE_OPS, "bn")) == 3
    for update in get_collection(GraphKeys.UPDATE_OPS) + get_collection("kept"):
        update.run()
    assert get_collection(GraphKeys.UPDATE_OPS) == []
    assert len(get_collection("kept")) == 1
    for loss in (2.5, lambda: 3.5):
        tf1.add_to_collection(GraphKeys.REGULARIZATION_LOSSES, loss)
    assert get_collection(GraphKeys.REGULARIZATION_LOSSES)[1:] == [2.5, 3.5]
