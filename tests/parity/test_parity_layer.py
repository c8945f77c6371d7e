"""nbbn.BatchNormalization against tf_keras, live, over random configurations of all options."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

import nbbn
from nbbn.compat import v1
from tests.oracle.reference import Reference
from tests.parity.cases import DTYPES, Arrays, Case, draw_adjustment, draw_calls, draw_cases, draw_weights
from tests.parity.tf_side import LAYERS, Call, call, numpy_dtype, tf
from tests.parity.tolerance import assert_close, magnitudes, tolerance

pytestmark = pytest.mark.parity

NBBN_LAYERS = {"V1": v1.keras.layers.BatchNormalization, "V2": nbbn.BatchNormalization}
CASES = draw_cases(800)
TRAINING_STEPS = 3


def call_nbbn(layer: Any, x: np.ndarray, dy: np.ndarray, training: bool | None, mask: Any = None) -> Call:
    """The same as `tf_side.call` for nbbn: V1's recorded updates are run."""
    y, pullback = layer.vjp(x, training=training, mask=mask)
    for update in list(layer.updates):
        update.run()
    gradients = pullback(dy)
    a, b = gradients.adjustment or (None, None)
    return Call(y, gradients.inputs, gradients.gamma, gradients.beta, a, b, layer.get_weights())


def assert_same_call(ours: Call, theirs: Call, layer: Reference, arrays: Any, training: bool, what: str) -> None:
    """`layer` is the reference with the weights from before the call."""
    step = layer(arrays.x, training=training, mask=arrays.mask, update_statistics=False)
    magnitude = magnitudes(layer, step, arrays.dy)
    for name in ("y", "inputs", "gamma", "beta", "a", "b"):
        expected, actual = getattr(theirs, name), getattr(ours, name)
        assert (actual is None) == (expected is None), f"{name}, {what}: {actual}, TensorFlow has {expected}"
        if expected is not None:
            bound = tolerance(getattr(magnitude, name), expected, layer.dtype)
            assert_close(actual, expected, bound, f"{name}, {what}")
    for name, expected, actual in zip(layer.weight_names, theirs.weights, ours.weights, strict=True):
        size = magnitude.mean if name.endswith("mean") else magnitude.variance
        bound = tolerance(np.abs(expected) + size, expected, layer.dtype)
        assert_close(actual, expected, bound, f"{name}, {what}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.seed))
def test_same_as_tensorflow(case: Case) -> None:
    """Three training steps and an inference: outputs, every weight, all gradients."""
    adjustment = draw_adjustment(case)
    tensors = None if adjustment is None else tuple(map(tf.constant, adjustment))
    theirs = LAYERS[case.version](**case.options, adjustment=tensors and (lambda shape: tensors))
    ours = NBBN_LAYERS[case.version](**case.options, adjustment=adjustment and (lambda shape: adjustment))
    reference = Reference(
        **case.options, adjustment=adjustment and (lambda shape: adjustment), version=int(case.version[1])
    ).build(case.shape)
    for layer in (theirs, ours):
        layer.build(case.shape)
    exchange_weights(case, theirs, ours)

    steps, inference = draw_calls(case, TRAINING_STEPS)
    # None means inference on both sides.
    calls = [(True, arrays) for arrays in steps] + [((False, None)[case.seed % 2], inference)]
    for number, (training, arrays) in enumerate(calls):
        reference.set_weights(theirs.get_weights())
        expected = call(theirs, arrays.x, arrays.dy, training, arrays.mask, tensors)
        actual = call_nbbn(ours, arrays.x, arrays.dy, training, arrays.mask)
        what = f"call {number} (training={training}) of {case}"
        assert_same_call(actual, expected, reference, arrays, training, what)


def exchange_weights(case: Case, theirs: Any, ours: Any) -> None:
    """Give both the same weights, every other case from nbbn to TensorFlow."""
    source, target = (theirs, ours) if case.seed % 2 else (ours, theirs)
    source.set_weights(draw_weights(case))
    target.set_weights(source.get_weights())
    for mine, other in zip(source.get_weights(), target.get_weights(), strict=True):
        assert mine.dtype == other.dtype, case
        np.testing.assert_array_equal(mine, other, err_msg=str(case))


def test_cases_reach_every_option() -> None:
    """What the random cases promise to compare is among them, several times."""
    seen = Counter()
    for case in CASES:
        mode = " ".join(
            ["renorm"] * case.renorm
            + ["virtual"] * bool(case.virtual_batch_size)
            + ["adjusted"] * bool(case.adjustment)
            + ["masked"] * bool(case.mask)
        )
        axes = [case.axis] if isinstance(case.axis, int) else case.axis
        seen.update(
            [
                ("mode", mode),
                ("dtype", mode, case.dtype),
                ("version", mode, case.version),
                ("rank", len(case.shape)),
                ("axes", len(axes)),
                ("negative axis", any(axis < 0 for axis in axes)),
                ("clipping", str(case.renorm_clipping)),
                ("adjustment", case.adjustment, case.renorm),
                ("mask", case.mask),
                ("fused", case.fused, case.version, case.eligible),
                ("weights", case.center, case.scale),
                ("momentum", case.momentum),
                ("renorm_momentum", case.renorm and case.renorm_momentum),
                ("trainable", case.version, case.trainable, mode),
            ]
        )
    renorm_in_float64 = [("dtype", m, "float64") for m in seen_modes(seen) if "renorm" in m]
    assert not any(seen[key] for key in renorm_in_float64)
    expected = [("dtype", m, d) for m in seen_modes(seen) for d in DTYPES]
    expected = [key for key in expected if key not in renorm_in_float64]
    expected += [("version", m, v) for m in seen_modes(seen) for v in LAYERS]
    expected += [("rank", r) for r in (2, 3, 4, 5)] + [("axes", n) for n in (1, 2, 3, 4)]
    expected += [("fused", f, v, True) for f in (None, True, False) for v in LAYERS]
    expected += [("fused", True, "V1", False), ("weights", False, False), ("negative axis", False)]
    expected += [("trainable", v, False, "") for v in LAYERS]
    assert len(seen_modes(seen)) == 10
    assert not [key for key in expected if seen[key] < 2]


def seen_modes(seen: Counter) -> list[str]:
    return [key[1] for key in seen if key[0] == "mode"]


@pytest.mark.parametrize("version", LAYERS)
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 2, 3)])
def test_frozen_and_thawed_between_steps(version: str, shape: tuple[int, ...]) -> None:
    """`trainable` is read at every call."""
    rng = np.random.default_rng(3)
    theirs, ours = LAYERS[version](momentum=0.5), NBBN_LAYERS[version](momentum=0.5, dtype="float32")
    reference = Reference(momentum=0.5, version=int(version[1])).build(shape)
    for layer in (theirs, ours):
        layer.build(shape)
    for trainable in (True, False, True):
        for layer in (theirs, ours, reference):
            layer.trainable = trainable
        x, dy = rng.normal(1, 2, size=(2, *shape)).astype(np.float32)
        reference.set_weights(theirs.get_weights())
        expected, actual = call(theirs, x, dy, True), call_nbbn(ours, x, dy, True)
        what = f"{version} {shape} trainable={trainable}"
        assert_same_call(actual, expected, reference, Arrays(x, dy, None), True, what)


@pytest.mark.parametrize("input_dtype", ["float64", "float16", "bfloat16"])
def test_input_is_cast_to_the_dtype_of_the_layer(input_dtype: str) -> None:
    """Output in the layer's dtype, gradient in the input's."""
    rng = np.random.default_rng(4)
    x = rng.normal(1, 2, size=(6, 3)).astype(numpy_dtype(input_dtype))
    dy = rng.normal(size=(6, 3)).astype(np.float32)
    theirs, ours = LAYERS["V2"](dtype="float32"), nbbn.BatchNormalization(dtype="float32")
    for layer in (theirs, ours):
        layer.build(x.shape)
    expected, actual = call(theirs, x, dy, True), call_nbbn(ours, x, dy, True)
    reference = Reference().build(x.shape)
    assert_same_call(actual, expected, reference, Arrays(x, dy, None), True, f"{input_dtype} into float32")
