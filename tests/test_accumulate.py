"""Training calls in halves, with messages that somebody else carries, and accumulate(), where calls count as one."""

import contextlib
import copy
import pickle

import numpy as np
import pytest

import nbbn
from nbbn.compat import v1
from nbbn.sync import SyncError
from tests.helpers.rank_cases import CASES, LENGTHS, Batch
from tests.helpers.ranks import DY, Plain, X, bits, check_same_bits, make, on_ranks, same
from tests.oracle.reference import Reference

WHOLE, WHOLE_DY = X.reshape(-1, 5), DY.reshape(-1, 5)  # four parts of 12


def whole_of(count=48, **options):
    """The oracle after a call on the first samples, and what that returned."""
    layer = Reference(**{"momentum": 0.5, **options}, dtype="float64").build((count, 5))
    return layer, layer(WHOLE[:count], True)


def check_state(layer, whole):
    for name in whole.weight_names:
        same(getattr(layer, name), getattr(whole, name))


# -- TrainingStep -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("name", ["plain", "bessel", "renorm", "weights", "adjustment", "residual and relu"])
def test_steps_of_parts_are_one_of_the_whole(name, kind):
    """As the exchange of SyncBatchNormalization: here one place holds all messages."""
    case, lengths = CASES[name], LENGTHS[kind][3]
    batch, ends = Batch(case, 12, 0), np.cumsum(lengths)
    parts = [slice(end - n, end) for end, n in zip(ends, lengths, strict=True)]
    options = {"momentum": 0.5, **case.options}
    whole = Reference(**options, dtype="float64", adjustment=(lambda s: (batch.a, batch.b)) if case.adjusted else None)
    result = whole.build(batch.x.shape)(batch.x, True, batch.mask, residual=batch.residual)
    expected = result.gradients(batch.dy)
    layers, steps = [], []
    for part in parts:
        own = {"adjustment": lambda s, part=part: (batch.a[part], batch.b)} if case.adjusted else {}
        layers.append(nbbn.BatchNormalization(**options, **own))
        x, mask, residual = (batch.part(n, part) for n in ("x", "mask", "residual"))
        steps.append(layers[-1].start(x, mask, residual=residual))
    before = [bits(layer) for layer in layers]
    gathered = np.stack([step.message for step in steps])
    assert gathered.dtype == np.float64
    assert gathered.shape == (3, 4 * 5)
    assert [bits(layer) for layer in layers] == before
    outputs = [step.finish(gathered) for step in steps]
    same(np.concatenate(outputs), result.y)
    for layer in layers:
        check_state(layer, whole)
        assert bits(layer) == bits(layers[0])
    gathered = np.stack([step.pull(batch.dy[part]) for step, part in zip(steps, parts, strict=True)])
    assert gathered.shape == (3, (4 if case.adjusted else 2) * 5)
    found = [step.pulled(gathered) for step in steps]
    same(np.concatenate([f.inputs for f in found]), expected.inputs)
    same(sum(f.gamma for f in found), expected.gamma)
    same(sum(f.beta for f in found), expected.beta)
    if case.residual:
        same(np.concatenate([f.residual for f in found]), expected.residual)
    if case.adjusted:
        same(np.concatenate([f.adjustment[0] for f in found]), expected.adjustment[0])
        same(sum(f.adjustment[1] for f in found), expected.adjustment[1])


def test_steps_with_virtual_batches():
    """Group g of all parts is one group; an empty part takes however many there are."""
    whole, result = whole_of(24, virtual_batch_size=4)  # two parts of 12, with 6 groups of 2 each
    layers = [nbbn.BatchNormalization(momentum=0.5, virtual_batch_size=2) for _ in range(3)]
    parts = [WHOLE[:12], WHOLE[:0], WHOLE[12:24]]
    steps = [layer.start(part) for layer, part in zip(layers, parts, strict=True)]
    assert [step.message.size for step in steps] == [4 * 6 * 5, 0, 4 * 6 * 5]
    gathered = np.stack([steps[0].message, np.zeros(120), steps[2].message])
    same(np.concatenate([step.finish(gathered) for step in steps]), result.y)
    for layer in layers:
        check_state(layer, whole)
    dys = [WHOLE_DY[:12], WHOLE_DY[:0], WHOLE_DY[12:24]]
    gathered = np.stack([step.pull(dy) for step, dy in zip(steps, dys, strict=True)])
    found = np.concatenate([step.pulled(gathered).inputs for step in steps])
    same(found, result.gradients(WHOLE_DY[:24]).inputs)


def test_a_step_of_one():
    """The same bits as a call, whichever layer it is of: with a group, too, which is not asked."""
    for kind in (nbbn.BatchNormalization, nbbn.SyncBatchNormalization):
        layer, other = (kind(momentum=0.5, fused=False) for _ in range(2))
        y, pullback = layer.vjp(X[0], True)
        step = other.start(X[0])
        np.testing.assert_array_equal(step.finish(step.message[None]), y)
        assert bits(other) == bits(layer)
        found = step.pulled(step.pull(DY[0])[None])
        for one, two in zip(found[:3], pullback(DY[0])[:3], strict=True):
            np.testing.assert_array_equal(one, two)


def test_out_of_a_step():
    layer, y, dx = nbbn.BatchNormalization(), np.empty((12, 5)), np.empty((12, 5))
    step = layer.start(X[0], out=y)
    assert step.finish(step.message[None]) is y
    assert step.pulled(step.pull(DY[0], out=dx)[None]).inputs is dx
    expected, pullback = nbbn.BatchNormalization().vjp(X[0], True)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(dx, pullback(DY[0]).inputs)


def test_a_step_that_is_given_up():
    """It has changed nothing, and a call in between has its say."""
    layer = make(None)
    layer(X[0], training=True)
    before = bits(layer)
    step = layer.start(X[1])
    assert bits(layer) == before
    layer(X[2], training=True)
    step.finish(step.message[None])
    other = make(None)
    for i in (0, 2, 1):
        other(X[i], training=True)
    assert bits(other) == bits(layer)
    silent = layer.start(X[3], update_statistics=False)
    silent.finish(silent.message[None])
    assert bits(other) == bits(layer)


def test_steps_out_of_their_order():
    layer = make(None)
    step = layer.start(X[0])
    gathered = step.message[None]
    with pytest.raises(RuntimeError, match=r"pull\(\) needs finish\(\) first"):
        step.pull(DY[0])
    with pytest.raises(RuntimeError, match=r"pulled\(\) needs pull\(dy\) first"):
        step.pulled(gathered)
    step.finish(gathered)
    before = bits(layer)
    with pytest.raises(RuntimeError, match="this step is finished: it is one training call"):
        step.finish(gathered)
    with pytest.raises(RuntimeError, match=r"pulled\(\) needs pull\(dy\) first"):
        step.pulled(gathered)
    assert bits(layer) == before


GATHERED = {
    "float32": (lambda m: m[None].astype(np.float32), TypeError, "dtype float64; received float32"),
    "integers": (lambda m: np.zeros((1, m.size), int), TypeError, "received int64"),
    "objects": (lambda m: [None], TypeError, "received object"),
    "one row": (lambda m: m, ValueError, r"shape \(parts, \d+\), a message in each row; received \(\d+,\)"),
    "no row": (lambda m: np.empty((0, m.size)), ValueError, r"received \(0, "),
    "a short row": (lambda m: m[None, :-1], ValueError, "shape .*a message in each row"),
    "two in a row": (lambda m: np.concatenate([m, m])[None], ValueError, "shape .*a message in each row"),
    "three dimensions": (lambda m: m[None, None], ValueError, "shape .*a message in each row"),
}


@pytest.mark.parametrize(("change", "kind", "message"), GATHERED.values(), ids=GATHERED)
def test_what_is_no_message(change, kind, message):
    layer = make(None)
    step = layer.start(X[0])
    before = bits(layer)
    with pytest.raises(kind, match=f"gathered must have .*{message}"):
        step.finish(change(step.message))
    assert bits(layer) == before
    step.finish(step.message[None])
    sums = step.pull(DY[0])
    with pytest.raises(kind, match=f"gathered must have .*{message}"):
        step.pulled(change(sums))
    assert step.pulled(sums[None]).inputs.shape == (12, 5)


def test_bad_input_of_a_step():
    layer = make(None)
    for bad, kind in (("x", TypeError), (np.float64(3), ValueError)):
        with pytest.raises(kind):
            layer.start(bad)
        assert not layer.built
    for arguments in ({"mask": np.ones(7)}, {"residual": X[0][:3]}, {"out": X[0][:3]}, {"out": X[0]}):
        with pytest.raises(ValueError, match=r"mask|residual|out"):
            layer.start(X[0], **arguments)
        assert not layer.built
    with pytest.raises(TypeError, match="update_statistics"):
        layer.start(X[0], update_statistics="no")
    step = layer.start(X[0])
    step.finish(step.message[None])
    with pytest.raises(ValueError, match="dy must have the output's shape"):
        step.pull(DY[0][:3])
    step.pull(DY[0])


def test_a_frozen_layer_has_no_steps():
    layer = nbbn.BatchNormalization(trainable=False, name="frozen")
    with pytest.raises(ValueError, match=r"start\(\) is for training, and frozen is not trainable: call it"):
        layer.start(X[0])
    first = v1.keras.layers.BatchNormalization(trainable=False)  # which normalizes with its batch nevertheless
    step = first.start(X[0])
    np.testing.assert_array_equal(step.finish(step.message[None]), nbbn.BatchNormalization()(X[0], training=True))
    assert first.updates == []


# -- accumulate, each call with its own statistics --------------------------------------------------------------------

ACCUMULATED = {
    "plain": {},
    "bessel": {"bessel_correction": True},
    "cumulative": {"momentum": None},
    "renorm": {"renorm": True, "renorm_momentum": 0.6},
    "renorm and cumulative": {"renorm": True, "momentum": None},
}


@pytest.mark.parametrize("options", ACCUMULATED.values(), ids=ACCUMULATED)
@pytest.mark.parametrize("lengths", [(12, 12, 12, 12), (1, 30, 0, 17), (48,)], ids=str)
def test_moving_statistics_are_those_of_the_whole(options, lengths):
    """For several batches, one after the other; outputs and gradients are each call's own."""
    layer = nbbn.BatchNormalization(**{"momentum": 0.5, **options})
    whole = Reference(**{"momentum": 0.5, **options}, dtype="float64").build(WHOLE.shape)
    ends = np.cumsum(lengths)
    for scale in (1.0, 3.0):
        with nbbn.accumulate(layer) as batch:
            for i, (end, n) in enumerate(zip(ends, lengths, strict=True)):
                batch.micro_batch(i)
                x, dy = scale * WHOLE[end - n : end], WHOLE_DY[end - n : end]
                y, pullback = layer.vjp(x, training=True)
                if n:
                    part = Reference(**{**options, "momentum": 0.5}, dtype="float64").build(x.shape)
                    for name in ("renorm_mean", "renorm_stddev") if layer.renorm else ():
                        setattr(part, name, getattr(whole, name))
                    one = part(x, True)
                    same(y, one.y)
                    same(pullback(dy).inputs, one.gradients(dy).inputs)
        whole(scale * WHOLE, True)
        check_state(layer, whole)


def test_masks_and_virtual_batches_of_calls():
    """With weights every value counts as much as it does in one call; ghosts are those of each call."""
    weights = np.random.default_rng(0).random((48, 5))
    layer, whole = make(None), Reference(momentum=0.5).build(WHOLE.shape)
    with nbbn.accumulate([layer]):
        for i in range(4):
            layer(X[i], training=True, mask=weights[12 * i : 12 * i + 12])
    whole(WHOLE, True, weights)
    check_state(layer, whole)
    # Two calls of 12, in groups of 4: 3 and 3. One call of 24 has these 6 if samples lie group by group.
    ghosts, whole = make(None, virtual_batch_size=4), Reference(momentum=0.5, virtual_batch_size=4).build((24, 5))
    with nbbn.accumulate(ghosts):
        for i in range(2):
            ghosts(X[i], training=True)
        ghosts(X[0][:0], training=True)
    whole(np.concatenate([X[i].reshape(4, 3, 5) for i in range(2)], axis=1).reshape(24, 5), True)
    check_state(ghosts, whole)


def test_until_the_end_nothing_changes():
    layer = make(None)
    layer.build((None, 5), "float64")
    before = bits(layer)
    with nbbn.accumulate(layer):
        for x in X[:2]:
            for _ in range(2):  # the second one takes the bound step
                layer(x, training=True)
                assert bits(layer) == before
    assert bits(layer) != before
    before = bits(layer)
    with nbbn.accumulate(layer):
        layer(X[0])
        layer(X[0], training=True, update_statistics=False)
        layer(X[0][:0], training=True)
    assert bits(layer) == before


def test_an_exception_leaves_out_the_update():
    layer = make(None)
    layer.build((None, 5), "float64")
    before = bits(layer)

    def fail():
        with nbbn.accumulate(layer):
            layer(X[0], training=True)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert bits(layer) == before
    layer(X[0], training=True)  # as usual
    assert bits(layer) != before


def test_a_call_that_is_repeated_for_a_token():
    layer, whole = make(None), Reference(momentum=0.5).build((24, 5))
    with nbbn.accumulate(layer) as batch:
        for token in ("a", ("b", 1)):
            for _ in range(3):
                batch.micro_batch(token)
                layer(X[int(token != "a")], training=True)
    whole(WHOLE[:24], True)
    check_state(layer, whole)
    every, whole = make(None), Reference(momentum=0.5).build((24, 5))
    with nbbn.accumulate(every):  # without tokens each call counts
        for _ in range(2):
            every(X[0], training=True)
    whole(np.concatenate([X[0], X[0]]), True)
    check_state(every, whole)


def test_nested_and_used_again():
    layer, other = make(None, name="one"), make(None, name="two")
    outer = nbbn.accumulate([layer, other])
    with outer:
        layer(X[0], training=True)
        with pytest.raises(RuntimeError, match="the layers one are in another accumulate"), nbbn.accumulate(layer):
            raise AssertionError("never")
        with pytest.raises(RuntimeError, match="for one batch"), outer:
            raise AssertionError("never")
        layer(X[1], training=True)
    same(layer.moving_mean, 0.5 * WHOLE[:24].mean(0))
    with pytest.raises(RuntimeError, match=r"accumulate\(\) is for one batch: call it again for the next one"), outer:
        raise AssertionError("never")
    with nbbn.accumulate([other]):
        other(X[1], training=True)
    same(other.moving_mean, 0.5 * X[1].mean(0))
    for wrong in ([layer, 3], [None], {"a": layer}, 5, None):
        with pytest.raises(TypeError, match=r"layers must be nbbn.BatchNormalization layers; received"):
            nbbn.accumulate(wrong)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("cls", [nbbn.BatchNormalization, v1.layers.BatchNormalization])
def test_a_copy_takes_no_part(cls, copied):
    """A checkpoint that is written between two micro-batches is a layer like any other."""
    layer = cls(momentum=0.0)
    with nbbn.accumulate(layer):
        layer(X[0], training=True)
        checkpoint = copied(layer)
    checkpoint(X[1], training=True)
    for update in checkpoint.updates:
        update()
    same(checkpoint.moving_mean, X[1].mean(0))


def test_a_token_that_no_set_can_hold():
    layer = make(None)
    with nbbn.accumulate(layer) as batch, pytest.raises(TypeError, match=r"token must be hashable.* received \[1\]"):
        batch.micro_batch([1])


def test_several_layers_one_of_them_twice():
    """A layer that occurs twice in a network has one update, of both its calls."""
    one, two, none = (make(None) for _ in range(3))
    with nbbn.accumulate([one, two, one, none]) as batch:
        for i in range(2):
            batch.micro_batch(i)
            one(two(X[i], training=True), training=True)
    for layer in (one, two):
        assert layer.moving_variance.min() > 0.4
    same(two.moving_mean, 0.5 * WHOLE[:24].mean(0))
    parts = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3) for x in X[:2]]
    same(one.moving_variance, 0.5 + 0.5 * np.concatenate(parts).var(0))
    assert not none.built


@pytest.mark.parametrize("dtype", [None, "float64"])
def test_layers_of_tensorflow_1(dtype):
    """They record one pair of updates, at the end, which are run as usual."""
    layer = v1.keras.layers.BatchNormalization(momentum=0.5, dtype=dtype)
    whole, _ = whole_of()
    with nbbn.accumulate(layer):
        for x in X:
            layer(x, training=True)
        assert layer.updates == []
    assert [update.name.split("/", 1)[1] for update in layer.updates] == [
        "moving_mean/update",
        "moving_variance/update",
    ]
    np.testing.assert_array_equal(layer.moving_mean, np.zeros(5))
    for update in layer.updates:
        update.run()
    check_state(layer, whole)
    assert layer.updates == []


# -- accumulate, with the statistics of all ---------------------------------------------------------------------------


def exact(layer, parts, dys, **arguments):
    """y of the parts, and their gradients."""
    with nbbn.accumulate(layer) as batch:
        steps = [batch.start(part, **{k: v[i] for k, v in arguments.items()}) for i, part in enumerate(parts)]
        before = bits(layer)
        outputs = [step.finish() for step in steps]
        for step, dy in zip(steps, dys, strict=True):
            step.pull(dy)
        found = [step.pulled() for step in steps]
        assert bits(layer) == before
    return outputs, found


@pytest.mark.parametrize("options", ACCUMULATED.values(), ids=ACCUMULATED)
@pytest.mark.parametrize("cuts", [[12, 24, 36], [0, 1, 31], []], ids=str)
def test_outputs_and_gradients_of_the_whole(options, cuts):
    layer = nbbn.BatchNormalization(**{"momentum": 0.5, **options})
    whole, result = whole_of(**options)
    expected = result.gradients(WHOLE_DY)
    outputs, found = exact(layer, np.split(WHOLE, cuts), np.split(WHOLE_DY, cuts))
    same(np.concatenate(outputs), result.y)
    same(np.concatenate([f.inputs for f in found]), expected.inputs)
    same(sum(f.gamma for f in found), expected.gamma)
    same(sum(f.beta for f in found), expected.beta)
    check_state(layer, whole)


def test_the_gradient_by_differences():
    """Of the sum of all parts' losses."""
    cuts, step = [2, 7], 1e-6
    x, dy = WHOLE[:12], WHOLE_DY[:12]

    def loss(x):
        outputs, _ = exact(make(None), np.split(x, cuts), np.split(dy, cuts))
        return sum((y * g).sum() for y, g in zip(outputs, np.split(dy, cuts), strict=True))

    _, found = exact(make(None), np.split(x, cuts), np.split(dy, cuts))
    gradient = np.concatenate([f.inputs for f in found])
    for i in [(0, 0), (5, 2), (11, 4)]:
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        np.testing.assert_allclose(gradient[i], (loss(up) - loss(down)) / (2 * step), rtol=1e-6, atol=1e-8)


def test_operands_of_the_exact_form():
    weights, residual = np.random.default_rng(0).random((2, 48, 5))
    layer = make(None, activation="relu")
    whole = Reference(momentum=0.5, activation="relu").build(WHOLE.shape)
    result = whole(WHOLE, True, weights, residual=residual)
    expected = result.gradients(WHOLE_DY)
    outputs, found = exact(layer, X, DY, mask=np.split(weights, 4), residual=np.split(residual, 4))
    same(np.concatenate(outputs), result.y)
    same(np.concatenate([f.inputs for f in found]), expected.inputs)
    same(np.concatenate([f.residual for f in found]), expected.residual)
    check_state(layer, whole)


def test_the_exact_form_out_of_its_order():
    layer, other = make(None), make(None)
    with nbbn.accumulate([layer, other]) as batch, pytest.raises(ValueError, match="for one layer without virtual"):
        batch.start(X[0])
    with nbbn.accumulate(make(None, virtual_batch_size=2)) as batch, pytest.raises(ValueError, match="without virtual"):
        batch.start(X[0])
    with nbbn.accumulate(layer) as batch:
        steps = [batch.start(x) for x in X[:2]]
        with pytest.raises(RuntimeError, match=r"pull\(\) needs finish\(\) first"):
            steps[0].pull(DY[0])
        y = steps[1].finish()
        with pytest.raises(RuntimeError, match=r"start\(\) of all micro-batches comes before the first finish\(\)"):
            batch.start(X[2])
        with pytest.raises(RuntimeError, match="this step is finished"):
            steps[1].finish()
        steps[0].finish()
        with pytest.raises(
            RuntimeError, match=r"pulled\(\) needs pull\(dy\) of all micro-batches first; 2 are missing"
        ):
            steps[0].pulled()
        with pytest.raises(ValueError, match="dy must have the output's shape"):
            steps[1].pull(DY[1][:3])
        for step, dy in zip(steps, DY, strict=False):
            step.pull(dy)
        with pytest.raises(RuntimeError, match=r"pull\(\) of a micro-batch is called once"):
            steps[1].pull(DY[1])
        found = steps[1].pulled()
    whole, result = whole_of(24)
    same(y, result.y[12:])
    same(found.inputs, result.gradients(WHOLE_DY[:24]).inputs[12:])
    check_state(layer, whole)


def test_the_exact_form_refuses_a_micro_batch_that_has_started():
    """Checkpointing has nothing to repeat here: it would be a part of the batch twice."""
    layer, whole = make(None), make(None)
    with nbbn.accumulate(layer) as batch:
        steps = []
        for i in range(2):
            batch.micro_batch(i)
            steps.append(batch.start(X[i]))
            with pytest.raises(RuntimeError, match=rf"start\(\) of micro-batch {i} was called before"):
                batch.start(X[i])
        for step in steps:
            step.finish()
    whole(WHOLE[:24], training=True)
    same(layer.moving_variance, whole.moving_variance)


# -- both, with a group -----------------------------------------------------------------------------------------------


def test_calls_of_ranks_and_of_micro_batches():
    """Two ranks, two calls each: each call has the statistics of both ranks, and the update is of all four."""
    whole, _ = whole_of()

    def run(group):
        layer = make(group)
        with nbbn.accumulate(layer) as batch:
            for i in range(2):
                batch.micro_batch(i)
                y = layer(X[2 * i + group.rank], training=True)
                both = X[2 * i : 2 * i + 2].reshape(-1, 5)
                same(y, (X[2 * i + group.rank] - both.mean(0)) / np.sqrt(both.var(0) + 1e-3))
        check_state(layer, whole)
        check_same_bits(group, layer)

    on_ranks(nbbn.sync.threads(2, timeout=20), run)


@pytest.mark.parametrize("kind", [lambda group: group, Plain])
@pytest.mark.parametrize("options", [{}, {"renorm": True}], ids=str)
def test_the_exact_form_on_ranks(options, kind):
    """The parts of all ranks are one batch, also where a rank has fewer, or empty ones first; for several batches."""
    lengths = {0: [0, 5, 7], 1: [20], 2: [10, 6]}
    whole = Reference(momentum=0.5, **options).build(WHOLE.shape)
    results = [whole(scale * WHOLE, True) for scale in (1.0, 3.0)]
    expected = [result.gradients(WHOLE_DY) for result in results]

    def run(group):
        layer = make(kind(group), **options)
        first = sum(sum(lengths[rank]) for rank in range(group.rank))
        own = slice(first, first + sum(lengths[group.rank]))
        cuts = np.cumsum(lengths[group.rank])[:-1]
        for scale, result, gradient in zip((1.0, 3.0), results, expected, strict=True):
            outputs, found = exact(layer, np.split(scale * WHOLE[own], cuts), np.split(WHOLE_DY[own], cuts))
            same(np.concatenate(outputs), result.y[own])
            same(np.concatenate([f.inputs for f in found]), gradient.inputs[own])
        check_state(layer, whole)
        check_same_bits(group, layer)
        assert layer._exchange.calls == 2

    on_ranks(nbbn.sync.threads(3, timeout=20), run)


def test_a_call_in_the_place_of_another_ranks_accumulation():
    """The numbers of calls differ then, and all hear of it in the pullback."""

    def run(group):
        layer = make(group)
        layer(X[group.rank], training=True)
        _, pullback = layer.vjp(X[group.rank], True)
        with nbbn.accumulate(layer) as batch:
            step = batch.start(X[group.rank])
            step.finish()
            step.pull(DY[group.rank])
            with pytest.raises(SyncError, match=r"which call of the layer it is \(rank 0: 2, rank 1: 3\)"):
                step.pulled() if group.rank else pullback(DY[group.rank])
            pullback(DY[group.rank])
            step.pulled()
        return bits(layer)

    assert len(set(on_ranks(nbbn.sync.threads(2, timeout=20), run))) == 1


def test_one_rank_alone_accumulates():
    def run(group):
        layer = make(group)
        layer(X[group.rank], training=True)
        before = bits(layer)
        context = nbbn.accumulate(layer) if group.rank else contextlib.nullcontext()
        with pytest.raises(SyncError, match=r"after accumulate\(\)"), context:
            layer(X[group.rank], training=True)
        assert bits(layer) == before

    on_ranks(nbbn.sync.threads(2, timeout=20), run)
