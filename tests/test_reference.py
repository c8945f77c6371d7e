"""The oracle itself: gradients against finite differences, facts against numbers worked out by hand."""

import numpy as np
import pytest

from tests.oracle.reference import Reference, fused_eligible, parameter_shape, synchronized_gradients

# Central differences with step h: the truncation error h^2 * f'''/6 and the rounding error 1e-16 * |f| / h
# are both near 1e-10 for the O(1..100) losses here.
STEP = 1e-5
TOLERANCE = 1e-7

CLIPS = [None, {}, {"rmax": 1.1}, {"rmin": 0.9}, {"dmax": 0.2}, {"rmax": 1.5, "rmin": 0.7, "dmax": 0.5}]


def make(shape, seed=0, **options):
    """A layer with random parameters and state, x, dy."""
    rng = np.random.default_rng(seed)
    layer = Reference(**options).build(shape)
    layer.set_weights([rng.uniform(0.5, 1.5, layer.parameter_shape) for _ in layer.get_weights()])
    x = rng.normal(0.5, 2.0, shape)
    return layer, x, rng.normal(size=shape)


def numeric_gradient(function, value):
    """d function / d value, element by element."""
    gradient = np.zeros_like(value)
    for index in np.ndindex(value.shape):
        keep = value[index]
        value[index] = keep + STEP
        above = function()
        value[index] = keep - STEP
        below = function()
        value[index] = keep
        gradient[index] = (above - below) / (2 * STEP)
    return gradient


def check_training_gradients(layer, x, dy, mask=None, residual=None):
    adjustment = layer.adjustment
    a, b = [np.ones(()), np.zeros(())] if adjustment is None else adjustment(x.shape)
    layer.adjustment = None if adjustment is None else lambda shape: (a, b)
    step = layer.training(x, mask, update_statistics=False, residual=residual)
    found = step.gradients(dy)

    def output():
        return layer.output(x, mask, step.r, step.d, a, b, 0.0 if residual is None else residual)

    def loss():
        return np.sum(output() * dy)

    np.testing.assert_allclose(output(), step.y, rtol=1e-13, atol=1e-13)  # two roundings apart
    for name, value, gradient in [
        ("inputs", x, found.inputs),
        ("gamma", layer.gamma, found.gamma),
        ("beta", layer.beta, found.beta),
    ]:
        np.testing.assert_allclose(gradient, numeric_gradient(loss, value), TOLERANCE, TOLERANCE, err_msg=name)
    if residual is None:
        assert found.residual is None
    else:
        np.testing.assert_allclose(found.residual, numeric_gradient(loss, residual), TOLERANCE, TOLERANCE)
    if adjustment is None:
        assert found.adjustment is None
    else:
        for value, gradient in zip((a, b), found.adjustment, strict=True):
            assert gradient.shape == value.shape
            np.testing.assert_allclose(gradient, numeric_gradient(loss, value), TOLERANCE, TOLERANCE)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((5, 3), -1),
        ((5, 3), 0),
        ((4, 3, 2), 1),
        ((3, 2, 2, 3), 1),
        ((3, 2, 2, 3), [1, 3]),
        ((2, 2, 2, 1, 3), -1),
    ],
)
def test_gradients_plain(shape, axis):
    check_training_gradients(*make(shape, axis=axis))


@pytest.mark.parametrize("clip", CLIPS)
def test_gradients_renorm(clip):
    check_training_gradients(*make((4, 2, 3), renorm=True, renorm_clipping=clip))


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [((3,), (3,)), ((4, 1, 1), (4, 1, 1)), ((), (1, 2, 1)), ((4, 2, 3), (1, 1, 3)), ((4, 1, 3), (2, 3))],
)
def test_gradients_adjustment(a_shape, b_shape, renorm):
    rng = np.random.default_rng(5)
    pair = rng.uniform(0.5, 1.5, a_shape), rng.normal(size=b_shape)
    pair = np.asarray(pair[0]), np.asarray(pair[1])
    check_training_gradients(*make((4, 2, 3), renorm=renorm, adjustment=lambda shape: pair))


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [((6, 3), -1), ((6, 2, 3), 1), ((6, 2, 3), [1, 2])])
def test_gradients_virtual_batch(shape, axis, renorm):
    check_training_gradients(*make(shape, axis=axis, virtual_batch_size=3, renorm=renorm))


@pytest.mark.parametrize(
    "options",
    [{}, {"renorm": True}, {"virtual_batch_size": 2}, {"virtual_batch_size": 2, "renorm": True}, {"axis": 1}],
    ids=str,
)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("full_rank", [False, True])
def test_gradients_mask(options, weighted, full_rank):
    rng = np.random.default_rng(7)
    shape = (6, 4, 3)
    plain = tuple(n for i, n in enumerate(shape) if i != options.get("axis", 2))
    mask = rng.random(shape if full_rank else plain) < 0.7
    mask = mask * rng.uniform(0.5, 2.0, mask.shape) if weighted else mask
    check_training_gradients(*make(shape, **options), mask=mask)


PAIR = np.full((4, 1, 1), 1.25), np.array([0.5, -0.25, 0.0])


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"axis": 1},
        {"axis": [1, 2]},
        {"renorm": True},
        {"virtual_batch_size": 2},
        {"adjustment": lambda shape: PAIR},
    ],
    ids=lambda o: ", ".join(o) or "plain",
)
def test_gradients_residual_and_activation(options, with_residual, activation):
    layer, x, dy = make((4, 2, 3), activation=activation, **options)
    layer.beta -= 1.0
    residual = np.random.default_rng(1).normal(size=x.shape) if with_residual else None
    step = layer.training(x, update_statistics=False, residual=residual)
    if activation is not None:
        assert np.abs(step.z).min() > 100 * STEP, "no element may cross 0, where there is no derivative"
        assert 0 < step.gate.sum() < step.gate.size
    check_training_gradients(layer, x, dy, residual=residual)


def test_gradients_inference_with_residual_and_activation():
    layer, x, dy = make((4, 3, 2), axis=1, activation="relu")
    residual = np.random.default_rng(1).normal(-1.0, 1.0, x.shape)
    step = layer(x, residual=residual)
    assert np.abs(step.z).min() > 100 * STEP
    assert 0 < step.gate.sum() < step.gate.size
    found = step.gradients(dy)

    def loss():
        return np.sum(layer(x, residual=residual).y * dy)

    for value, gradient in [(x, found.inputs), (layer.gamma, found.gamma), (residual, found.residual)]:
        np.testing.assert_allclose(gradient, numeric_gradient(loss, value), TOLERANCE, TOLERANCE)


def test_activation_worked_by_hand():
    layer = Reference(epsilon=0.0, activation="relu").build((4, 1))
    step = layer(np.array([[-2.0], [0.0], [3.0], [np.nan]]), residual=np.array([[1.0], [-0.0], [-1.0], [1.0]]))
    np.testing.assert_array_equal(step.y, [[0], [0], [2], [np.nan]])
    np.testing.assert_array_equal(np.signbit(step.y[:2]), [[False], [False]])
    np.testing.assert_array_equal(step.gradients(np.full((4, 1), 5.0)).residual, [[0], [0], [5], [5]])


def test_gradients_inference():
    layer, x, dy = make((4, 3, 2), axis=1, renorm=True)
    found = layer(x, training=False).gradients(dy)

    def loss():
        return np.sum(layer(x).y * dy)

    for value, gradient in [(x, found.inputs), (layer.gamma, found.gamma), (layer.beta, found.beta)]:
        np.testing.assert_allclose(gradient, numeric_gradient(loss, value), TOLERANCE, TOLERANCE)


def test_absent_parameters_have_no_gradient():
    layer, x, dy = make((4, 3), center=False, scale=False)
    found = layer(x, training=True).gradients(dy)
    assert found.gamma is None
    assert found.beta is None
    assert layer.weight_names == ["moving_mean", "moving_variance"]
    np.testing.assert_allclose(layer(x, training=True).y.mean(0), 0, atol=1e-14)


def test_synchronized_gradients_add_up():
    layer, x, dy = make((7, 2, 3))
    whole = layer.training(x, update_statistics=False).gradients(dy)
    parts = synchronized_gradients(layer, [x[:2], x[2:3], x[3:]], [dy[:2], dy[2:3], dy[3:]])
    np.testing.assert_allclose(np.concatenate([p.inputs for p in parts]), whole.inputs)
    np.testing.assert_allclose(sum(p.gamma for p in parts), whole.gamma)
    np.testing.assert_allclose(sum(p.beta for p in parts), whole.beta)


# --- moving statistics ------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis", "options", "ratio"),
    [
        ((2, 3, 3, 4), -1, {}, 18 / 17),
        ((2, 3, 4, 5), 1, {}, 40 / 39),
        ((2, 2, 3, 2, 3), -1, {}, 24 / 23),
        ((6, 4), -1, {}, 1),
        ((6, 2, 4), -1, {}, 1),
        ((2, 3, 3, 4), 2, {}, 1),
        ((2, 3, 3, 4), [1, 3], {}, 1),
        ((2, 3, 3, 4), -1, {"fused": False}, 1),
        ((2, 3, 3, 4), -1, {"fused": True}, 18 / 17),
        ((2, 3, 3, 4), -1, {"fused": True, "version": 1}, 18 / 17),
        ((2, 3, 3, 4), 2, {"fused": True, "version": 1}, 1),
        ((2, 3, 3, 4), -1, {"dtype": "float64"}, 1),
        ((2, 3, 3, 4), -1, {"bessel_correction": False}, 1),
        ((6, 4), -1, {"bessel_correction": True}, 6 / 5),
        ((6, 4), -1, {"bessel_correction": True, "virtual_batch_size": 3}, 3 / 2),
        ((1, 4), -1, {"bessel_correction": True}, 1),
    ],
    ids=str,
)
def test_bessel(shape, axis, options, ratio):
    layer, x, _ = make(shape, axis=axis, momentum=0, **options)
    step = layer(x, training=True)
    biased = step.var if layer.virtual_batch_size is None else step.var.mean(1, keepdims=True)
    np.testing.assert_allclose(layer.moving_variance.ravel(), ratio * biased.ravel(), rtol=1e-14)


def test_fused_true_must_be_eligible_in_version_2():
    with pytest.raises(ValueError, match="fused"):
        Reference(fused=True).build((4, 3))(np.ones((4, 3)), training=True)
    assert fused_eligible(5, -4, "bfloat16")
    assert not fused_eligible(4, -2, "float32")


def test_momentum_zero_copies_one_freezes_none_averages():
    rng = np.random.default_rng(3)
    batches = rng.normal(size=(3, 8, 2))
    layers = {k: Reference(momentum=k).build((8, 2)) for k in (0, 1, 0.5, None)}
    for batch in batches:
        for layer in layers.values():
            layer(batch, training=True)
    means = batches.mean(1)
    np.testing.assert_allclose(layers[0].moving_mean, means[2])
    np.testing.assert_array_equal(layers[1].moving_mean, [0, 0])
    np.testing.assert_allclose(layers[0.5].moving_mean, means[0] / 8 + means[1] / 4 + means[2] / 2)
    np.testing.assert_allclose(layers[None].moving_mean, means.mean(0))
    np.testing.assert_allclose(layers[None].moving_variance, batches.var(1).mean(0))


@pytest.mark.parametrize("momenta", [[0.9] * 4, [0.5, 0.0, 0.75, 0.9], [1.0, 0.5, 1.0, 0.9]], ids=str)
def test_debiased_averages(momenta):
    """Of the batches alone, each with the weight that an average of them and nothing else would give it."""
    rng = np.random.default_rng(3)
    batches, layer = rng.normal(size=(4, 8, 2)), Reference(debias=True).build((8, 2))
    layer.moving_mean += 1
    weights = np.zeros(4)
    for t, (batch, momentum) in enumerate(zip(batches, momenta, strict=True)):
        layer.momentum = momentum
        layer(batch, training=True)
        weights *= momentum
        weights[t] = 1 - momentum
        expected = np.average(batches.mean(1), 0, weights) if weights.any() else [1, 1]
        np.testing.assert_allclose(layer.moving_mean, expected, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(layer.seen, weights.sum())
    np.testing.assert_allclose(layer.moving_variance, np.average(batches.var(1), 0, weights), rtol=1e-12)


def test_debiased_averages_with_one_momentum_are_those_of_adam():
    batches, m = np.random.default_rng(3).normal(size=(5, 8, 2)), 0.9
    layer, biased = Reference(debias=True, momentum=m).build((8, 2)), Reference(momentum=m).build((8, 2))
    for t, batch in enumerate(batches, 1):
        layer(batch, training=True), biased(batch, training=True)
        np.testing.assert_allclose(layer.moving_mean, biased.moving_mean / (1 - m**t), rtol=1e-12)


def test_trainable_false():
    x = np.random.default_rng(0).normal(3, 2, size=(8, 2))
    v1 = Reference(trainable=False, version=1).build(x.shape)
    v2 = Reference(trainable=False).build(x.shape)
    np.testing.assert_allclose(v1(x, training=True).y.mean(0), 0, atol=1e-14)
    np.testing.assert_allclose(v2(x, training=True).y, x / np.sqrt(1 + 1e-3))
    for layer in (v1, v2):
        np.testing.assert_array_equal(layer.moving_mean, [0, 0])


def test_one_value_per_statistic():
    layer, x, dy = make((1, 3), momentum=0, bessel_correction=True)
    step = layer(x, training=True)
    np.testing.assert_array_equal(step.y, [layer.beta])
    np.testing.assert_array_equal(step.gradients(dy).inputs, np.zeros((1, 3)))
    np.testing.assert_array_equal(layer.moving_variance, np.zeros(3))


@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"virtual_batch_size": 3}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("shape", [(0, 2, 3), (6, 0, 3), (6, 2, 0)])
def test_empty_batch(shape, options):
    layer, x, dy = make(shape, **options)
    before = [w.copy() for w in layer.get_weights()]
    step = layer(x, training=True)
    assert step.y.shape == shape
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    gradients = step.gradients(dy)
    assert gradients.inputs.shape == shape
    np.testing.assert_array_equal(gradients.gamma, np.zeros(layer.parameter_shape))
    assert not layer.seen.any()


# --- shapes ------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis", "virtual_batch_size", "expected"),
    [
        ((4, 3), -1, None, (3,)),
        ((4, 3, 5, 2), 1, None, (3,)),
        ((4, 3, 5, 2), [1], None, (3,)),
        ((4, 3, 5, 2), [1, 3], None, (1, 3, 1, 2)),
        ((4, 3, 5, 2), [-1, -3], None, (1, 3, 1, 2)),
        ((4, 3), -1, 2, (1, 1, 3)),
        ((4, 3, 5, 2), -1, 2, (1, 1, 1, 1, 2)),
        ((4, 3, 5, 2), 1, 2, (1, 1, 3, 1, 1)),
    ],
)
def test_parameter_shape(shape, axis, virtual_batch_size, expected):
    assert parameter_shape(shape, axis, virtual_batch_size) == expected
    layer = Reference(axis=axis, virtual_batch_size=virtual_batch_size).build(shape)
    assert layer(np.ones(shape), training=True).gradients(np.ones(shape)).gamma.shape == expected


def test_virtual_batch_groups_are_interleaved():
    rng = np.random.default_rng(11)
    x = rng.normal(size=(6, 2, 3))
    layer = Reference(virtual_batch_size=2, momentum=0).build(x.shape)
    y = layer(x, training=True).y
    groups = 6 // 2
    for group in range(groups):
        members = [n for n in range(6) if n % groups == group]
        alone = Reference().build((2, 2, 3))(x[members], training=True)
        np.testing.assert_allclose(y[members], alone.y, rtol=1e-12)
    per_group = [x[np.arange(6) % groups == g].reshape(-1, 3) for g in range(groups)]
    np.testing.assert_allclose(layer.moving_mean.ravel(), np.mean([p.mean(0) for p in per_group], axis=0))
    np.testing.assert_allclose(layer.moving_variance.ravel(), np.mean([p.var(0) for p in per_group], axis=0))


def test_virtual_batch_must_divide_in_training_only():
    layer = Reference(virtual_batch_size=4).build((8, 3))
    with pytest.raises(ValueError, match=r"4.*6"):
        layer(np.ones((6, 3)), training=True)
    np.testing.assert_allclose(layer(np.ones((6, 3))).y, np.ones((6, 3)) / np.sqrt(1.001))


# --- renorm ------------------------------------------------------------


def test_renorm_worked_by_hand():
    # mean 2, variance 1 - epsilon, so s = 1; RS = 0.5, so r = 2 and d = (2 - 1) / 0.5 = 2.
    epsilon = 0.19
    x = np.array([[2 - 0.9], [2 + 0.9]])
    layer = Reference(renorm=True, epsilon=epsilon, momentum=0.5, renorm_momentum=0.75).build((2, 1))
    layer.set_weights([[3.0], [1.0], [0.0], [1.0], [0.8], [1.0], [0.5]])
    step = layer(x, training=True)
    np.testing.assert_allclose(step.y, [[(-0.9 * 2 + 2) * 3 + 1], [(0.9 * 2 + 2) * 3 + 1]])
    np.testing.assert_allclose(layer.renorm_mean, [1 + 0.25 * (2 - 1)])
    np.testing.assert_allclose(layer.renorm_stddev, [0.5 + 0.25 * (1 - 0.5)])
    np.testing.assert_allclose(layer.moving_mean, [1.0])
    np.testing.assert_allclose(layer.moving_stddev, [0.9])
    np.testing.assert_allclose(layer.moving_variance, [0.9**2 - epsilon])


@pytest.mark.parametrize(
    ("clip", "r", "d"),
    [
        (None, 2, 2),
        ({"rmax": 1.5}, 1.5, 2),
        ({"rmin": 3}, 3, 2),
        ({"dmax": 0.5}, 2, 0.5),
        ({"rmax": lambda: 1.0, "rmin": 1, "dmax": 0}, 1, 0),
    ],
    ids=["none", "rmax", "rmin", "dmax", "all"],
)
def test_renorm_clipping(clip, r, d):
    layer = Reference(renorm=True, renorm_clipping=clip, epsilon=0.19).build((2, 1))
    layer.set_weights([[3.0], [1.0], [0.0], [1.0], [0.8], [1.0], [0.5]])
    step = layer(np.array([[2 - 0.9], [2 + 0.9]]), training=True)
    np.testing.assert_allclose(step.r, [[r]])
    np.testing.assert_allclose(step.d, [[d]])


def test_renorm_pinned_to_one_and_zero_is_the_plain_layer():
    rng = np.random.default_rng(2)
    clip = {"rmax": 1.0, "rmin": 1.0, "dmax": 0.0}
    pinned = Reference(renorm=True, renorm_clipping=clip).build((5, 3))
    plain = Reference().build((5, 3))
    for _ in range(3):
        x, dy = rng.normal(2, 3, size=(2, 5, 3))
        one, two = pinned(x, training=True), plain(x, training=True)
        np.testing.assert_array_equal(one.y, two.y)
        np.testing.assert_array_equal(one.gradients(dy).inputs, two.gradients(dy).inputs)


def test_renorm_floor_is_for_the_division_only():
    layer = Reference(renorm=True, epsilon=0.25, renorm_momentum=1).build((2, 1))
    layer.renorm_stddev[:] = 0.1
    step = layer(np.zeros((2, 1)), training=True)
    np.testing.assert_allclose(step.r, [[0.5 / 0.5]])
    np.testing.assert_array_equal(layer.renorm_stddev, [0.1])


# --- masks ------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"fused": True}], ids=str)
def test_mask_equals_leaving_out(options):
    layer, x, _ = make((4, 2, 3, 5), **options)
    short, _, _ = make((4, 2, 3, 5), **options)
    mask = np.array([True, False, True, True])[:, None, None]
    y = layer(x, training=True, mask=mask).y
    kept = mask.ravel()
    np.testing.assert_allclose(y[kept], short(x[kept], training=True).y)
    for masked, shortened in zip(layer.get_weights(), short.get_weights(), strict=True):
        np.testing.assert_allclose(masked, shortened)


def test_integer_weights_equal_repeating():
    """But for Bessel's correction, which does not know whether a weight of 3 is three values or a good one."""
    layer, x, _ = make((4, 3), bessel_correction=False)
    repeated, _, _ = make((4, 3), bessel_correction=False)
    weights = np.array([2, 0, 1, 3])
    y = layer(x, training=True, mask=weights).y
    longer = np.repeat(np.arange(4), weights)
    np.testing.assert_allclose(y[longer], repeated(x[longer], training=True).y)
    np.testing.assert_allclose(layer.moving_variance, repeated.moving_variance)


def test_mask_aligns_with_the_axes_that_are_not_features():
    x = np.random.default_rng(1).normal(size=(3, 2, 4))
    layer = Reference(axis=1).build(x.shape)
    step = layer(x, training=True, mask=np.array([[True, False, True, True]]))
    np.testing.assert_allclose(step.mean.ravel(), x[:, :, [0, 2, 3]].mean((0, 2)))
    step = layer(x, training=True, mask=np.array([True, False, True]))  # fewer of them: samples
    np.testing.assert_allclose(step.mean.ravel(), x[[0, 2]].mean((0, 2)))


def test_statistic_without_a_valid_element_keeps_its_state():
    layer, x, _ = make((4, 3), renorm=True, momentum=0.5)
    before = [w.copy() for w in layer.get_weights()]
    mask = np.ones((4, 3), bool)
    mask[:, 1] = False
    step = layer(x, training=True, mask=mask)
    for old, new in zip(before[2:], layer.get_weights()[2:], strict=True):
        assert old[1] == new[1]
        assert (old != new).tolist() == [True, False, True]
    assert np.isfinite(step.y).all()
