"""Every kind of bad input: the error's type, a message that names the argument and what was received, and a
layer that is afterwards what it was."""

from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

import nbbn

SHAPE = (6, 4, 2, 3)


def ones(shape: tuple[int, ...] = SHAPE, dtype: Any = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


def check_message(error: pytest.ExceptionInfo[Exception], fragments: tuple[str, ...]) -> None:
    for fragment in fragments:
        assert fragment in str(error.value), f"{fragment!r} is not in {str(error.value)!r}"


def numbered(rows: list[tuple[Any, ...]]) -> list[str]:
    """Ids of rows whose first column is a dict of options: its keys and the row's number."""
    return [f"{i} {' '.join(row[0])}" for i, row in enumerate(rows)]


# --- construction -----------------------------------------------------------

CONSTRUCTION = [
    # axis
    ({"axis": 1.5}, TypeError, ("axis", "1.5", "int")),
    ({"axis": "channels"}, TypeError, ("axis", "channels", "int")),
    ({"axis": None}, TypeError, ("axis", "None", "int")),
    ({"axis": [1, 2.0]}, TypeError, ("axis", "2.0", "int")),
    ({"axis": [1, "2"]}, TypeError, ("axis", "'2'", "int")),
    ({"axis": True}, TypeError, ("axis", "True", "int")),
    ({"axis": []}, ValueError, ("axis", "[]")),
    ({"axis": ()}, ValueError, ("axis", "()")),
    # virtual batches
    ({"virtual_batch_size": 0}, ValueError, ("virtual_batch_size", "0", "positive")),
    ({"virtual_batch_size": -2}, ValueError, ("virtual_batch_size", "-2", "positive")),
    ({"virtual_batch_size": 2.5}, TypeError, ("virtual_batch_size", "2.5", "integer")),
    ({"virtual_batch_size": "4"}, TypeError, ("virtual_batch_size", "'4'", "integer")),
    (
        {"virtual_batch_size": 2, "adjustment": lambda s: (1, 0)},
        ValueError,
        ("virtual_batch_size", "adjustment"),
    ),
    # renorm
    (
        {"renorm": True, "renorm_clipping": {"rmaximum": 2}},
        ValueError,
        ("renorm_clipping", "rmaximum", "rmax"),
    ),
    ({"renorm": True, "renorm_clipping": {1: 2}}, ValueError, ("renorm_clipping", "1", "rmax")),
    ({"renorm": True, "renorm_clipping": {"rmax": 0.5, "rmin": 2}}, ValueError, ("rmax", "0.5", "rmin", "2")),
    ({"renorm": True, "renorm_clipping": {"dmax": -1}}, ValueError, ("dmax", "-1")),
    ({"renorm": True, "renorm_clipping": {"rmax": -0.5}}, ValueError, ("rmax", "-0.5")),
    ({"renorm": True, "renorm_clipping": {"rmax": float("nan")}}, ValueError, ("rmax", "nan")),
    ({"renorm": True, "renorm_clipping": {"rmax": "2"}}, TypeError, ("rmax", "'2'")),
    ({"renorm": True, "renorm_clipping": 2}, TypeError, ("renorm_clipping", "2", "dict")),
    # fused
    ({"fused": True, "renorm": True}, ValueError, ("fused", "renorm")),
    ({"fused": True, "virtual_batch_size": 2}, ValueError, ("fused", "virtual_batch_size")),
    ({"fused": True, "adjustment": lambda s: (1, 0)}, ValueError, ("fused", "adjustment")),
    ({"fused": True, "axis": [1, 3]}, ValueError, ("fused", "axis", "[1, 3]")),
    ({"fused": True, "axis": 2}, ValueError, ("fused", "axis", "2")),
    ({"fused": True, "dtype": "float64"}, ValueError, ("fused", "float64", "float32")),
    # dtype and adjustment
    ({"dtype": "int32"}, TypeError, ("dtype", "int32", "float32")),
    ({"dtype": "complex64"}, TypeError, ("dtype", "complex64", "float32")),
    ({"dtype": "float31"}, TypeError, ("dtype", "float31", "float32")),
    ({"adjustment": 2.0}, TypeError, ("adjustment", "2.0", "callable")),
    # activation
    ({"activation": "tanh"}, ValueError, ("activation", "'tanh'", "'relu'", "None")),
    ({"activation": "RELU"}, ValueError, ("activation", "'RELU'", "'relu'", "None")),
    ({"activation": True}, ValueError, ("activation", "True", "'relu'", "None")),
    ({"activation": abs}, ValueError, ("activation", "abs", "'relu'", "None")),
    ({"activation": ["relu"]}, ValueError, ("activation", "['relu']", "'relu'", "None")),
]


@pytest.mark.parametrize(("options", "error", "fragments"), CONSTRUCTION, ids=numbered(CONSTRUCTION))
def test_construction(options, error, fragments):
    with pytest.raises(error) as caught:
        nbbn.BatchNormalization(**options)
    check_message(caught, fragments)


# --- build ------------------------------------------------------------------

BUILD = [
    ({"axis": 4}, SHAPE, ValueError, ("axis", "4", "rank 4")),
    ({"axis": -5}, SHAPE, ValueError, ("axis", "-5", "rank 4")),
    ({"axis": [1, 7]}, SHAPE, ValueError, ("axis", "7", "rank 4")),
    ({"axis": [1, 1]}, SHAPE, ValueError, ("axis", "[1, 1]")),
    ({"axis": [3, -1]}, SHAPE, ValueError, ("axis", "[3, -1]")),
    ({"axis": 0, "virtual_batch_size": 2}, SHAPE, ValueError, ("axis", "0", "virtual_batch_size")),
    (
        {"axis": [-4, 1], "virtual_batch_size": 2},
        SHAPE,
        ValueError,
        ("axis", "[-4, 1]", "virtual_batch_size"),
    ),
    ({"fused": True}, (6, 3), ValueError, ("fused", "rank", "2")),
    ({"fused": True}, (6, 4, 3), ValueError, ("fused", "rank", "3")),
    ({"fused": True, "axis": -2}, SHAPE, ValueError, ("fused", "axis", "-2")),
    ({"fused": True, "axis": 3}, (6, 4, 2, 3, 2), ValueError, ("fused", "axis", "3", "rank 5")),
]


@pytest.mark.parametrize(("options", "shape", "error", "fragments"), BUILD, ids=numbered(BUILD))
@pytest.mark.parametrize("how", ["build", "call"])
def test_build(options, shape, error, fragments, how):
    """fused=True may be refused at construction already, where the axis fits no rank."""
    layers = []

    def attempt() -> None:
        layers.append(nbbn.BatchNormalization(**options))
        if how == "build":
            layers[0].build(shape)
        else:
            layers[0](ones(shape), training=True)

    with pytest.raises(error) as caught:
        attempt()
    check_message(caught, fragments)
    assert not any(layer.built for layer in layers)


@pytest.mark.parametrize(("axis", "shape"), [(-1, (None, 4, None)), (1, (2, None, 3)), ([1, 2], (None, 4, None))])
def test_build_with_an_unknown_feature_dimension(axis, shape):
    layer = nbbn.BatchNormalization(axis=axis)
    with pytest.raises(ValueError, match="axis") as caught:
        layer.build(shape)
    check_message(caught, (str(shape),))
    assert not layer.built
    layer.build((None, 4, 3))
    assert layer.built


def test_build_of_a_scalar():
    layer = nbbn.BatchNormalization()
    with pytest.raises(ValueError, match=r"\(\)"):
        layer.build(())
    assert not layer.built


def test_fused_with_float64_input():
    layer = nbbn.BatchNormalization(fused=True)
    with pytest.raises(ValueError, match="fused") as caught:
        layer(ones(dtype=np.float64), training=True)
    check_message(caught, ("float64", "float32"))
    assert not layer.built
    layer(ones(), training=True)
    with pytest.raises(ValueError, match="fused"):
        layer(ones(dtype=np.float64), training=True)


# --- calls ------------------------------------------------------------------

FLOATS = ("float16", "bfloat16", "float32", "float64")

INPUTS = [
    (np.float32(1), (TypeError, ValueError), ("inputs", "()")),
    (np.array(1.0), (TypeError, ValueError), ("inputs", "()")),
    (np.ones(SHAPE, np.int32), TypeError, ("inputs", "int32", *FLOATS)),
    (np.ones(SHAPE, np.uint8), TypeError, ("inputs", "uint8", *FLOATS)),
    (np.ones(SHAPE, bool), TypeError, ("inputs", "bool", *FLOATS)),
    (np.ones(SHAPE, np.complex64), TypeError, ("inputs", "complex64", *FLOATS)),
    (np.full(SHAPE, None), TypeError, ("inputs", "object", *FLOATS)),
    (np.full(SHAPE, "1"), TypeError, ("inputs", "str", *FLOATS)),
    (np.ones(SHAPE[1:], np.float32), ValueError, ("inputs", "built", str(SHAPE[1:]))),
    (np.ones((6, 4, 3), np.float32), ValueError, ("inputs", "built", str((6, 4, 3)))),
    (np.ones((6, 4, 2, 5), np.float32), ValueError, ("inputs", "built", "3", str((6, 4, 2, 5)))),
]

MASKS = [
    (np.ones((6, 5), bool), ValueError, ("mask", "(6, 5)", "(6, 4, 2)", str(SHAPE))),
    (np.ones((7, 4, 2, 3), bool), ValueError, ("mask", "(7, 4, 2, 3)", str(SHAPE))),
    (np.ones((1, *SHAPE), bool), ValueError, ("mask", str((1, *SHAPE)), str(SHAPE))),
    (-np.ones(SHAPE[:3]), ValueError, ("mask", "-1", "negative")),
    (np.full(SHAPE[:3], np.nan), ValueError, ("mask", "nan")),
    (np.full(SHAPE[:3], np.inf), ValueError, ("mask", "inf")),
    (np.ones(SHAPE[:3], np.complex64), TypeError, ("mask", "complex64", "bool")),
    (np.full(SHAPE[:3], "yes"), TypeError, ("mask", "str", "bool")),
    # batch first, or the full rank: what fits the trailing dimensions alone fits neither
    (np.ones(2, bool), ValueError, ("mask", "(2,)", "leading", "(6, 4, 2)", "4 dimensions", str(SHAPE))),
    (np.ones((4, 2), bool), ValueError, ("mask", "(4, 2)", "leading", "(6, 4, 2)", "4 dimensions", str(SHAPE))),
]


def read_only() -> np.ndarray:
    array = ones()
    array.flags.writeable = False
    return array


OUTS = [
    (ones((6, 4, 2, 2)), ValueError, ("out", "(6, 4, 2, 2)", str(SHAPE))),
    (ones(dtype=np.float64), ValueError, ("out", "float64", "float32")),
    (ones(dtype=np.float16), ValueError, ("out", "float16", "float32")),
    (read_only(), ValueError, ("out", "read-only")),
    ([1.0], TypeError, ("out", "list", "array")),
]

RESIDUALS = [
    (ones((6, 4, 2, 1)), ValueError, ("residual", "(6, 4, 2, 1)", str(SHAPE))),
    (ones((3,)), ValueError, ("residual", "(3,)", str(SHAPE))),
    (1.0, ValueError, ("residual", "()", str(SHAPE))),
    (ones(dtype=np.int32), TypeError, ("residual", "int32", "float32")),
    (ones(dtype=bool), TypeError, ("residual", "bool", "float32")),
    (ones(dtype=np.complex64), TypeError, ("residual", "complex64", "float32")),
    ("zeros", TypeError, ("residual", "'zeros'", "float32")),
    (np.ma.masked_array(ones()), TypeError, ("residual", "masked")),
]

CALLS = [
    *[({"inputs": x}, error, fragments) for x, error, fragments in INPUTS],
    *[({"mask": mask}, error, fragments) for mask, error, fragments in MASKS],
    *[({"out": out}, error, fragments) for out, error, fragments in OUTS],
    *[({"residual": residual}, error, fragments) for residual, error, fragments in RESIDUALS],
]


class Unchanged:
    """A layer that has taken one step, and its twin: whatever fails in between, their next step is the same.

    A cumulative average (momentum None) shows a step that was counted though it failed.
    """

    def __init__(self, **options: Any) -> None:
        options = {"momentum": None, **options}
        rng = np.random.default_rng(0)
        first, self.second = (rng.normal(size=SHAPE).astype(np.float32) for _ in range(2))
        self.layer, self.twin = (nbbn.BatchNormalization(**options) for _ in range(2))
        for layer in (self.layer, self.twin):
            layer(first, training=True)
        self.before = self.layer.get_weights()

    def check(self) -> None:
        for old, new in zip(self.before, self.layer.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)
        y, y_twin = (layer(self.second, training=True) for layer in (self.layer, self.twin))
        np.testing.assert_array_equal(y, y_twin)
        for one, two in zip(self.layer.get_weights(), self.twin.get_weights(), strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(("arguments", "error", "fragments"), CALLS, ids=numbered(CALLS))
@pytest.mark.parametrize("method", ["__call__", "vjp"])
def test_call(arguments, error, fragments, method):
    unchanged = Unchanged()
    with pytest.raises(error) as caught:
        getattr(unchanged.layer, method)(**{"inputs": ones(), "training": True, **arguments})
    check_message(caught, fragments)
    unchanged.check()


@pytest.mark.parametrize("x", [x for x, _, _ in INPUTS[:8]], ids=range(8))
@pytest.mark.parametrize("training", [True, False])
def test_first_call(x, training):
    """A layer that was not built stays so."""
    layer = nbbn.BatchNormalization()
    with pytest.raises((TypeError, ValueError)):
        layer(x, training=training)
    assert not layer.built
    layer(ones())
    assert layer.built


@pytest.mark.parametrize(("mask", "error"), [(m, e) for m, e, _ in MASKS], ids=range(len(MASKS)))
def test_first_call_with_a_bad_mask(mask, error):
    layer = nbbn.BatchNormalization()
    with pytest.raises(error):
        layer(ones(), training=True, mask=mask)
    assert not layer.built


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("residual", "error"), [(r, e) for r, e, _ in RESIDUALS], ids=range(len(RESIDUALS)))
def test_first_call_with_a_bad_residual(residual, error, training):
    layer = nbbn.BatchNormalization()
    with pytest.raises(error):
        layer(ones(), training=training, residual=residual)
    assert not layer.built


def test_rank_of_the_input_is_that_of_the_build():
    layer = nbbn.BatchNormalization(axis=1)
    layer.build((None, 4))
    with pytest.raises(ValueError, match="inputs") as caught:
        layer(ones((6, 4, 2)))
    check_message(caught, ("built", "(6, 4, 2)"))


@pytest.mark.parametrize("axis", [1, [1, 3]])
def test_dimension_of_the_input_is_that_of_the_build(axis):
    layer = nbbn.BatchNormalization(axis=axis)
    layer(ones())
    with pytest.raises(ValueError, match="inputs") as caught:
        layer(ones((6, 5, 2, 3)))
    check_message(caught, ("built", "4", "(6, 5, 2, 3)"))
    assert layer(ones((2, 4, 7, 3))).shape == (2, 4, 7, 3)


@pytest.mark.parametrize("samples", [7, 1])
def test_virtual_batch_that_does_not_divide(samples):
    unchanged = Unchanged(virtual_batch_size=3)
    with pytest.raises(ValueError, match="virtual_batch_size") as caught:
        unchanged.layer(ones((samples, 4, 2, 3)), training=True)
    check_message(caught, ("3", str(samples)))
    unchanged.check()
    assert unchanged.layer(ones((samples, 4, 2, 3))).shape[0] == samples


@pytest.mark.parametrize(
    ("late", "error", "fragments"),
    [
        ({"rmax": lambda: 0.5, "rmin": lambda: 2.0}, ValueError, ("rmax", "0.5", "rmin", "2.0")),
        ({"dmax": lambda: -3.0}, ValueError, ("dmax", "-3.0")),
        ({"rmax": lambda: "big"}, TypeError, ("rmax", "'big'")),
        ({"rmax": lambda: 1 / 0}, ZeroDivisionError, ()),
    ],
    ids=["rmax < rmin", "dmax < 0", "no number", "raises"],
)
def test_clip_values_that_turn_bad_later(late, error, fragments):
    good = {"rmax": 3.0, "rmin": 0.1, "dmax": 5.0}
    now = dict.fromkeys(late, False)
    clipping = {key: (lambda key=key: late[key]() if now[key] else good[key]) for key in late}
    unchanged = Unchanged(renorm=True, renorm_clipping=clipping)
    now = dict.fromkeys(late, True)
    with pytest.raises(error) as caught:
        unchanged.layer(ones(), training=True)
    check_message(caught, fragments)
    now = dict.fromkeys(late, False)
    unchanged.check()


@pytest.mark.parametrize(
    ("bad", "error", "fragments"),
    [
        (lambda shape: (np.ones((5,)), 0.0), ValueError, ("adjustment", "(5,)", str(SHAPE))),
        (lambda shape: (1.0, np.ones((2, *SHAPE))), ValueError, ("adjustment", str((2, *SHAPE)), str(SHAPE))),
        (lambda shape: 1.0, (TypeError, ValueError), ("adjustment", "pair", "float")),
        (lambda shape: (1.0, 2.0, 3.0), (TypeError, ValueError), ("adjustment", "pair")),
        (lambda shape: (1j, 0.0), TypeError, ("adjustment", "complex128")),
        (lambda shape: 1 / 0, ZeroDivisionError, ()),
    ],
    ids=["shape of a", "shape of b", "no pair", "three", "complex", "raises"],
)
def test_adjustment_that_cannot_be_used(bad, error, fragments):
    now = [lambda shape: (1.0, 0.0)]
    unchanged = Unchanged(adjustment=lambda shape: now[0](shape))
    now[0] = bad
    with pytest.raises(error) as caught:
        unchanged.layer(ones(), training=True)
    check_message(caught, fragments)
    now[0] = lambda shape: (1.0, 0.0)
    unchanged.check()


@pytest.mark.parametrize(
    ("dy", "error", "fragments"),
    [
        (ones((6, 4, 2)), ValueError, ("dy", "(6, 4, 2)", str(SHAPE))),
        (ones((1, 1, 1, 3)), ValueError, ("dy", "(1, 1, 1, 3)", str(SHAPE))),
        (np.ones(SHAPE, np.complex64), TypeError, ("dy", "complex64")),
        (np.full(SHAPE, None), TypeError, ("dy", "object")),
    ],
    ids=range(4),
)
@pytest.mark.parametrize("training", [True, False])
def test_gradient_of_the_output(dy, error, fragments, training):
    layer = nbbn.BatchNormalization()
    _, pullback = layer.vjp(ones(), training=training)
    before = layer.get_weights()
    with pytest.raises(error) as caught:
        pullback(dy)
    check_message(caught, fragments)
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert pullback(ones()).inputs.shape == SHAPE


# --- weights ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda w: w[:3], ("set_weights", "4", "seen_mean", "3")),
        (lambda w: w[:5], ("set_weights", "4", "seen_mean", "5")),
        (lambda w: [], ("set_weights", "4", "0")),
        (lambda w: [2 * w[0], 2 * w[1], 2 * w[2], np.ones(4)], ("moving_variance", "(4,)", "(3,)")),
        (lambda w: [2 * w[0], 2 * w[1], np.ones((1, 3)), w[3]], ("moving_mean", "(1, 3)", "(3,)")),
        (lambda w: [2 * w[0], 1.0, w[2], w[3]], ("beta", "()", "(3,)")),
    ],
    ids=["too few", "too many", "none", "last shape", "rank", "scalar"],
)
def test_set_weights(change, fragments):
    """All or none: the weights before the bad one are not set either."""
    unchanged = Unchanged()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the fragments are the match
        unchanged.layer.set_weights(change(unchanged.before))
    check_message(caught, fragments)
    unchanged.check()


def test_set_weights_before_build():
    layer = nbbn.BatchNormalization()
    with pytest.raises(ValueError, match="build"):
        layer.set_weights([np.ones(3)] * 4)
    assert not layer.built


@pytest.mark.parametrize("name", ["gamma", "beta", "moving_mean", "moving_variance"])
def test_assigning_a_weight_of_another_shape(name):
    unchanged = Unchanged()
    with pytest.raises(ValueError, match=name) as caught:
        setattr(unchanged.layer, name, np.ones(5))
    check_message(caught, ("(5,)", "(3,)"))
    unchanged.check()


def test_every_float_dtype_is_accepted():
    """The counterpart of the errors above."""
    for dtype in (np.float16, bfloat16, np.float32, np.float64):
        assert nbbn.BatchNormalization()(ones(dtype=dtype), training=True).dtype == dtype


@pytest.mark.parametrize("training", ["False", 1.0, np.ones(2, bool)])
def test_training_that_is_no_bool(training):
    """A text would be true, whatever it says."""
    with pytest.raises(TypeError, match="training"):
        nbbn.BatchNormalization()(np.ones((4, 3), np.float32), training=training)


def test_a_weight_beyond_the_range_of_the_statistics():
    """1e300 is no float32: an infinite weight would make every statistic NaN."""
    with pytest.raises(ValueError, match=r"mask.*float32.*1e\+300"):
        nbbn.BatchNormalization()(np.ones((4, 3), np.float32), training=True, mask=np.full(4, 1e300))
