"""The names that the TensorFlow 1 faces give, and what they reuse."""

import copy
import pickle

import numpy as np
import pytest

import nbbn.compat.v1 as tf1
from nbbn.compat.v1 import AUTO_REUSE, GraphKeys, get_collection, variable_scope
from tests.helpers.v1_examples import X, bn, names, run_updates, scopes, values

# --- names ------------------------------------------------------------------------------


def test_variables_and_their_names():
    bn(X, name="bn")
    assert names() == ["bn/gamma:0", "bn/beta:0", "bn/moving_mean:0", "bn/moving_variance:0"]
    assert names(GraphKeys.TRAINABLE_VARIABLES) == ["bn/gamma:0", "bn/beta:0"]


def test_variables_of_renorm():
    bn(X, name="bn", renorm=True, center=False)
    kinds = ["gamma", "moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev"]
    assert sorted(names()) == sorted(f"bn/{kind}:0" for kind in kinds)


def test_default_names():
    for _ in range(3):
        bn(X)
    assert scopes() == ["batch_normalization", "batch_normalization_1", "batch_normalization_2"]


def test_default_names_are_counted_in_each_scope():
    with variable_scope("a"):
        bn(X)
        bn(X)
    with variable_scope("b"):
        bn(X)
    bn(X)
    expected = ["a/batch_normalization", "a/batch_normalization_1", "b/batch_normalization", "batch_normalization"]
    assert scopes() == expected


def test_a_default_name_avoids_the_names_that_were_given():
    bn(X, name="batch_normalization")
    bn(X)
    with variable_scope("batch_normalization_2"):
        pass
    bn(X)
    assert scopes() == ["batch_normalization", "batch_normalization_1", "batch_normalization_3"]


def test_scopes_nest():
    with variable_scope("a") as a, variable_scope("b") as b:
        bn(X, name="bn")
        assert (a.name, b.name) == ("a", "a/b")
    assert scopes() == ["a/b/bn"]


def test_a_scope_can_be_entered_again():
    """As an object it is absolute; its layers are those that it has, so they need reuse."""
    with variable_scope("a") as a:
        bn(X, name="one")
    with variable_scope("b"), variable_scope(a):
        bn(X, name="two")
    with variable_scope(a, reuse=True):
        bn(X, name="one")
    assert scopes() == ["a/one", "a/two"]


def test_reopening_a_scope_counts_default_names_anew():
    """In TensorFlow too: the second one meets the first one's variables."""
    with variable_scope("a"):
        bn(X)
    with variable_scope("a"), pytest.raises(ValueError, match="a/batch_normalization/gamma"):
        bn(X)
    with variable_scope("a", reuse=True):
        bn(X)
    assert scopes() == ["a/batch_normalization"]


def test_default_name_of_a_scope():
    found = []
    for _ in range(2):
        with variable_scope(None, "block") as scope:
            found.append(scope.name)
    assert found == ["block", "block_1"]


def test_a_scope_without_a_name():
    with pytest.raises((TypeError, ValueError), match="default_name"), variable_scope(None):
        pass
    with pytest.raises(ValueError, match="reuse"), variable_scope(None, "block", reuse=True):
        pass


def test_an_exception_closes_the_scope():
    with pytest.raises(KeyError), variable_scope("a"):
        raise KeyError
    bn(X, name="bn")
    assert scopes() == ["bn"]


def test_layer_objects_have_names_of_their_own():
    """Also with the same name given: two layers are two layers."""
    layers = [tf1.layers.BatchNormalization(name="bn") for _ in range(2)]
    for layer in layers:
        layer(X)
    assert scopes() == ["bn", "bn_1"]
    assert [layer.scope_name for layer in layers] == ["bn", "bn_1"]


def test_scope_name_is_not_known_before_the_first_call():
    layer = tf1.layers.BatchNormalization()
    with pytest.raises(ValueError, match="scope"):
        _ = layer.scope_name
    layer(X)
    assert layer.scope_name == "batch_normalization"


def test_reset_forgets_names_and_collections():
    bn(X, training=True, gamma_regularizer="l2")
    tf1.reset_default_graph()
    for key in ("GLOBAL_VARIABLES", "TRAINABLE_VARIABLES", "UPDATE_OPS", "REGULARIZATION_LOSSES"):
        assert get_collection(getattr(GraphKeys, key)) == []
    bn(X)
    assert scopes() == ["batch_normalization"]


def test_reset_inside_a_scope():
    with variable_scope("a"), pytest.raises(AssertionError, match="a"):
        tf1.reset_default_graph()


# --- reuse -----------------------------------------------------------------------------------


def test_reuse_shares_the_variables():
    bn(X, name="bn", training=True, momentum=0.0)
    run_updates()
    y = bn(X, name="bn", reuse=True)
    np.testing.assert_allclose(y, (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-3), rtol=1e-5, atol=1e-6)
    assert scopes() == ["bn"]


REUSE_ERRORS = [
    ("same name", {"name": "bn"}, ("bn/gamma", "reuse")),
    ("nothing to reuse", {"name": "other", "reuse": True}, ("other/gamma", "reuse=True")),
    ("no name", {"reuse": True}, ("name", "reuse=True")),
    ("no name, auto", {"reuse": AUTO_REUSE}, ("name", "reuse=AUTO_REUSE")),
    ("no bool", {"name": "bn", "reuse": "yes"}, ("reuse", "'yes'")),
    ("other options", {"name": "bn", "reuse": True, "renorm": True}, ("bn/renorm_mean",)),
]


@pytest.mark.parametrize(("arguments", "fragments"), [e[1:] for e in REUSE_ERRORS], ids=[e[0] for e in REUSE_ERRORS])
def test_reuse_errors(arguments, fragments):
    bn(X, name="bn", training=True)
    before, updates = values(), names(GraphKeys.UPDATE_OPS)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the fragments are the match
        bn(X, training=True, **arguments)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert names(GraphKeys.UPDATE_OPS) == updates
    assert values().keys() == before.keys()


@pytest.mark.parametrize("reuse", [True, AUTO_REUSE])
def test_reuse_with_another_shape(reuse):
    bn(X, name="bn")
    with pytest.raises(ValueError, match="bn") as caught:
        bn(np.ones((8, 5), np.float32), name="bn", reuse=reuse)
    assert "(3,)" in str(caught.value)
    assert "(5,)" in str(caught.value)


def test_reuse_with_another_dtype():
    bn(X, name="bn")
    with pytest.raises(ValueError, match=r"float32.*float64"):
        bn(X.astype(np.float64), name="bn", reuse=True)


def test_auto_reuse_creates_then_shares():
    for _ in range(3):
        bn(X, name="bn", reuse=AUTO_REUSE)
    assert scopes() == ["bn"]


def test_reuse_of_the_enclosing_scope():
    with variable_scope("a", reuse=AUTO_REUSE):
        bn(X, name="bn")
        with variable_scope("b"):
            bn(X, name="bn")
        with variable_scope("b", reuse=False):  # does not switch it off
            bn(X, name="bn")
    with variable_scope("a", reuse=True), variable_scope("b"):
        bn(X, name="bn")
        with pytest.raises(ValueError, match="a/b/other/gamma"):
            bn(X, name="other")
    assert scopes() == ["a/bn", "a/b/bn"]


def test_default_names_in_a_reusing_scope():
    for _ in range(2):
        with variable_scope("a", reuse=AUTO_REUSE):
            bn(X)
            bn(X)
    assert scopes() == ["a/batch_normalization", "a/batch_normalization_1"]


def test_reuse_variables_of_a_scope():
    with variable_scope("a") as scope:
        bn(X, name="bn")
        scope.reuse_variables()
        bn(X, name="bn")
    assert scopes() == ["a/bn"]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_auto_reuse_is_one_object(duplicate):
    assert duplicate(AUTO_REUSE) is AUTO_REUSE


def test_a_layer_object_reuses():
    tf1.layers.BatchNormalization(name="bn")(X)
    layer = tf1.layers.BatchNormalization(name="bn", _reuse=True)
    layer(X)
    assert scopes() == ["bn"]
    with pytest.raises(ValueError, match="name"):
        tf1.layers.BatchNormalization(_reuse=True)


def test_calls_of_one_layer_share_its_variables():
    layer = tf1.layers.BatchNormalization()
    with variable_scope("a"):
        layer(X)
    with variable_scope("b"):
        layer(X)
    assert scopes() == ["a/batch_normalization"]


def test_assigning_a_variable_reaches_the_layer():
    layer = tf1.layers.BatchNormalization(name="bn")
    layer(X)
    (mean,) = get_collection(GraphKeys.GLOBAL_VARIABLES, "bn/moving_mean")
    mean.assign([1, 2, 3])
    np.testing.assert_array_equal(layer.moving_mean, [1, 2, 3])
    np.testing.assert_array_equal(np.asarray(mean), [1, 2, 3])
    with pytest.raises(ValueError, match=r"bn/moving_mean.*\(3,\).*\(2,\)"):
        mean.assign([1, 2])
    mean.assign(np.array([1e300, -1e300, np.inf]))  # as where a layer's own attribute is assigned
    largest = np.finfo(np.float32).max
    np.testing.assert_array_equal(layer.moving_mean, np.float32([largest, -largest, np.inf]))
