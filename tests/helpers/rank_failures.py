"""What every transport must find: each failure runs on all ranks, and checks that its own rank gets the error."""

import contextlib
import time

import numpy as np
import pytest

import nbbn
from nbbn.sync import SyncError
from nbbn.sync.exchange import FIRST
from tests.helpers.rank_cases import everyone_is_empty
from tests.helpers.ranks import DY, X, bits, check_same_bits, each_rank, make, refused, same, works
from tests.oracle.reference import Reference

# What the layers are made with, or called with, on rank 0 and on all others; and what the error says.
UNLIKE_LAYERS = {
    "epsilon": ([{"epsilon": 1e-3}, {"epsilon": 1e-5}], r"epsilon \(rank 0: 0.001, rank 1: 1e-05"),
    "nearly epsilon": (
        [{"epsilon": 0.1}, {"epsilon": 0.1 + 1e-16}],
        r"epsilon \(rank 0: 0.1, rank 1: 0.1000000000000001",
    ),
    "momentum": ([{"momentum": 0.9}, {"momentum": 0.5}], r"momentum \(rank 0: 0.9, rank 1: 0.5"),
    "cumulative": ([{"momentum": None}, {"momentum": 0.5}], "momentum .*checksum"),
    "bessel": ([{"bessel_correction": True}, {}], r"bessel_correction \(rank 0: 1, rank 1: 0"),
    "renorm": ([{"renorm": True}, {}], "renorm"),
    "renorm_momentum": (
        [{"renorm": True}, {"renorm": True, "renorm_momentum": 0.5}],
        r"renorm_momentum \(rank 0: 0.99",
    ),
    "clips": (
        [{"renorm": True, "renorm_clipping": {"rmax": 2.0}}, {"renorm": True, "renorm_clipping": {"rmax": 3.0}}],
        r"rmax \(rank 0: 2, rank 1: 3",
    ),
    "a clip": (
        [{"renorm": True, "renorm_clipping": {"dmax": 2.0}}, {"renorm": True}],
        r"dmax \(rank 0: 2, rank 1: inf",
    ),
    "virtual_batch_size": ([{"virtual_batch_size": 2}, {"virtual_batch_size": 3}], "virtual batches .*: 6, rank 1: 4"),
    "activation": ([{"activation": "relu"}, {}], "activation"),
    "initial state": ([{"moving_mean_initializer": "ones"}, {}], "moving statistics before the call"),
}
UNLIKE_CALLS = {
    "channels": ({}, [lambda x: x, lambda x: x[:, :4]], r"channels \(rank 0: 5, rank 1: 4[^;]*$"),
    "dtype": ({}, [lambda x: x, lambda x: x.astype(np.float32)], r"dtype \(rank 0: float64, rank 1: float32[^;]*$"),
    "ghost groups": (
        {"virtual_batch_size": 2},
        [lambda x: x, lambda x: x[:8]],
        r"virtual batches .*rank 0: 6, rank 1: 4",
    ),
}


def unlike_layers(group, values, message):
    layer = make(group, **each_rank(group, values))
    for _ in range(2):  # it is not lost, but stays what it is
        error = refused(layer, lambda: layer(X[group.rank], training=True), message)
        assert "the ranks do not make the same call" in str(error)
        assert not layer.built
    works(group, make(group))


def unlike_calls(group, options, changes, message):
    """At the first call and at a later one, of one layer."""
    layer = make(group, **options)
    refused(layer, lambda: layer(each_rank(group, changes)(X[group.rank]), training=True), message)
    for _ in range(2):
        y = layer(X[group.rank], training=True)  # as it was: not built for anything else
        assert y.shape == (12, 5)
        check_same_bits(group, layer)
    if "channels" not in message:  # which a built layer knows
        refused(layer, lambda: layer(each_rank(group, changes)(X[group.rank]), training=True), message)
        layer(X[group.rank], training=True)
    check_same_bits(group, layer)


def other_axis(group):
    layer = make(group, axis=each_rank(group, [1, 2]))
    x = X[group.rank].reshape(4, 3, 5)[:, :, :3]
    refused(layer, lambda: layer(x, training=True), "axis, rank")
    works(group, make(group))


def other_update(group):
    layer = make(group)
    update = each_rank(group, [True, False])
    call = lambda: layer(X[group.rank], training=True, update_statistics=update)  # noqa: E731
    refused(layer, call, r"update_statistics \(rank 0: True, rank 1: False")
    works(group, layer)
    refused(layer, call, r"update_statistics \(rank 0: True, rank 1: False")
    works(group, layer)


def accumulating(group):
    """One rank updates at once, the others at the end."""
    layer = make(group)
    works(group, layer)
    call = lambda: layer(X[group.rank], training=True)  # noqa: E731
    context = nbbn.accumulate(layer) if group.rank else contextlib.nullcontext()
    with context:
        refused(layer, call, r"update_statistics \(rank 0: True, rank 1: after accumulate\(\)")
    works(group, layer)


def accumulating_unlike_micro_batches(group):
    """What has had its call on one rank is new on the others."""
    layer = make(group)
    works(group, layer)
    with contextlib.suppress(SyncError), nbbn.accumulate(layer) as batch:
        batch.micro_batch(0)
        layer(X[group.rank], training=True)
        batch.micro_batch(each_rank(group, [0, 1]))
        what = r"update_statistics \(rank 0: a micro-batch that has had its call, rank 1: after accumulate\(\)"
        raise refused(layer, lambda: layer(X[group.rank], training=True), what)
    works(group, layer)


def accumulating_until_one_rank_fails(group):
    """It alone has no update at the end, which the next call finds out, and setting the state mends."""
    layer = make(group)
    works(group, layer)
    state = layer.get_state()
    with contextlib.suppress(ZeroDivisionError), nbbn.accumulate(layer):
        layer(X[group.rank], training=True)
        1 / group.rank  # 0 on one of them
    other_states(group, layer, state)


def reset_on_one_rank(group):
    layer = make(group)
    works(group, layer)
    state = layer.get_state()
    if group.rank:
        layer.reset_statistics()
    other_states(group, layer, state)


def other_states(group, layer, state):
    """The ranks refuse to go on, until they have the same state."""
    for _ in range(2):
        refused(layer, lambda: layer(X[group.rank], training=True), "differ in the moving statistics before the call")
    layer.set_state(state)
    works(group, layer)


def forward_meets_pullback(group):
    layer = make(group)
    _, pullback = layer.vjp(X[group.rank], True)
    call = each_rank(group, [lambda: layer(X[group.rank], training=True), lambda: pullback(DY[group.rank])])
    refused(layer, call, r"stage \(rank 0: a training call, rank 1: a pullback")
    works(group, layer)
    pullback(DY[group.rank])  # it is still there, for all


def pullbacks_in_another_order(group):
    layer = make(group)
    pullbacks = [layer.vjp(X[group.rank] + i, True)[1] for i in range(2)]
    one, other = each_rank(group, [pullbacks, pullbacks[::-1]])
    for pullback, numbers in ((one, "0: 1, rank 1: 2"), (other, "0: 2, rank 1: 1")):
        refused(layer, lambda p=pullback: p(DY[group.rank]), rf"which call of the layer it is \(rank {numbers}")
    for pullback in pullbacks:
        pullback(DY[group.rank])
    works(group, layer)


def raising(shape):
    raise RuntimeError("an adjustment that fails")


# What the last rank does wrong: its call, and the error that it gets as the cause.
BAD_CALLS = {
    "rank": (lambda layer, x: layer(x[0, 0], training=True), ValueError),
    "dtype": (lambda layer, x: layer(x.astype(np.complex128), training=True), TypeError),
    "no array": (lambda layer, x: layer("x", training=True), TypeError),
    "mask": (lambda layer, x: layer(x, training=True, mask=np.ones(7, bool)), ValueError),
    "mask and lengths": (lambda layer, x: layer(x, True, mask=np.ones(12), lengths=np.ones(12, int)), ValueError),
    "training": (lambda layer, x: layer(x, training="yes"), TypeError),
    "negative weights": (lambda layer, x: layer(x, training=True, mask=-np.ones(12)), ValueError),
    "update_statistics": (lambda layer, x: layer(x, training=True, update_statistics="no"), TypeError),
    "residual": (lambda layer, x: layer(x, training=True, residual=x[:3]), ValueError),
    "out": (lambda layer, x: layer(x, training=True, out=x[:3]), ValueError),
    "out of vjp": (lambda layer, x: layer.vjp(x, training=True, out=x), ValueError),
}
LATER_BAD_CALLS = {
    "shape": (lambda layer, x: layer(x[:, :4], training=True), ValueError),
    "dimensions": (lambda layer, x: layer(x[None], training=True), ValueError),
}


def bad_call(group, call, kind, later):
    """One rank gets bad input, at the first call or at a later one."""
    layer, bad = make(group), group.size - 1
    if later:
        works(group, layer)
    own = call if group.rank == bad else lambda layer, x: layer(x, training=True)
    for _ in range(2):
        error = refused(layer, lambda: own(layer, X[group.rank].copy()), f"rank {bad} could not take part")
        assert layer.built == later
        assert (isinstance(error.__cause__, kind)) if group.rank == bad else error.__cause__ is None
    works(group, layer)


def two_bad_calls(group):
    layer = make(group)
    x = X[group.rank] if group.rank == 0 else "x"
    who = "rank 1" if group.size == 2 else f"the ranks {', '.join(map(str, range(1, group.size)))}"
    refused(layer, lambda: layer(x, training=True), f"{who} could not take part")
    works(group, layer)


def two_messages(group):
    """What does not go with the header is not sent where the headers do not agree."""
    layer, x = make(group), np.tile(X[group.rank], FIRST // 20 + 1)
    bad_calls = {"could not take part": lambda: layer(x, True, np.ones(7)), "channels": lambda: layer(x[:, :5], True)}
    for message, bad in bad_calls.items():
        refused(layer, bad if group.rank == 0 else lambda: layer(x, True), message)
    y, pullback = layer.vjp(x, True)
    assert pullback(y).inputs.shape == x.shape
    check_same_bits(group, layer)


def bad_adjustment(group):
    state = {"fails": True}

    def adjustment(shape):
        if state["fails"] and group.rank == 0:
            raise RuntimeError("an adjustment that fails")
        return np.ones(5), np.zeros(5)

    layer = make(group, adjustment=adjustment)
    for _ in range(2):
        state["fails"] = True
        error = refused(layer, lambda: layer(X[group.rank], training=True), "rank 0 could not take part")
        assert (str(error.__cause__) == "an adjustment that fails") == (group.rank == 0)
        state["fails"] = False
        works(group, layer)


def bad_virtual_batch(group):
    layer = make(group, virtual_batch_size=4)
    x = X[group.rank][: 5 if group.rank == 1 else 8]
    for _ in range(2):
        error = refused(layer, lambda: layer(x, training=True), "rank 1 could not take part")
        assert ("virtual_batch_size=4 must divide" in str(error.__cause__)) == (group.rank == 1)
        layer(X[group.rank], training=True)
        check_same_bits(group, layer)


def bad_gradient(group):
    layer, bad = make(group), group.size - 1
    for _ in range(2):
        _, pullback = layer.vjp(X[group.rank], True)
        for dy, kind in ((DY[group.rank][:3], ValueError), ("dy", TypeError), (None, TypeError)):
            own = dy if group.rank == bad else DY[group.rank]
            error = refused(layer, lambda p=pullback, dy=own: p(dy), f"rank {bad} could not take part")
            assert (isinstance(error.__cause__, kind)) if group.rank == bad else error.__cause__ is None
        pullback(DY[group.rank])
        works(group, layer)


# What the last rank does in the exact form of accumulate(), after a first start() that is right.
BAD_STARTS = {
    "shape": (lambda batch, x: batch.start(x[:, :, None]), ValueError),
    "mask and lengths": (lambda batch, x: batch.start(x, mask=np.ones(12), lengths=np.ones(12, int)), ValueError),
    "micro-batch": (lambda batch, x: (batch.micro_batch(0), batch.start(x)), RuntimeError),  # once more
}


def bad_start(group, start, kind, later):
    layer, bad = make(group), group.size - 1
    if later:
        works(group, layer)
    with nbbn.accumulate(layer) as batch:
        batch.micro_batch(0)
        first = batch.start(X[group.rank][:4])
        batch.micro_batch(1)
        call = (lambda: start(batch, X[group.rank])) if group.rank == bad else first.finish
        error = refused(layer, call, f"rank {bad} could not take part", bits(layer) if later else None)
        assert (isinstance(error.__cause__, kind)) if group.rank == bad else error.__cause__ is None
        with pytest.raises(RuntimeError, match=r"all micro-batches have to start\(\) again"):
            first.finish()
        again = batch.start(X[group.rank])
        again.finish()
        bad_pull(group, layer, again)
    works(group, layer)


def bad_pull(group, layer, step):
    """The pull() of one rank, which can be made again."""
    bad = group.size - 1
    if group.rank == bad:
        call = lambda: step.pull(DY[group.rank][:3])  # noqa: E731
    else:
        step.pull(DY[group.rank])
        call = step.pulled
    error = refused(layer, call, f"rank {bad} could not take part")
    assert (isinstance(error.__cause__, ValueError)) if group.rank == bad else error.__cause__ is None
    if group.rank == bad:
        step.pull(DY[group.rank])
    x, dy = (a[: group.size].reshape(-1, 5) for a in (X, DY))
    whole = Reference(epsilon=layer.epsilon).build(x.shape)(x, True, update_statistics=False)
    same(step.pulled().inputs, whole.gradients(dy).inputs[12 * group.rank : 12 * group.rank + 12])


def unlike_starts(group):
    """A new layer is not built for what the ranks could not do together."""
    layer = make(group)
    with contextlib.suppress(SyncError), nbbn.accumulate(layer) as batch:
        step = batch.start(each_rank(group, [X[0], X[1][:, :4]]))
        raise refused(layer, step.finish, "channels", None)
    works(group, layer)


FAILURES = {f"unlike {n}": (unlike_layers, *v) for n, v in UNLIKE_LAYERS.items()}
FAILURES |= {f"unlike {n} in a call": (unlike_calls, *v) for n, v in UNLIKE_CALLS.items()}
FAILURES |= {f"bad {n}": (bad_call, *v, False) for n, v in BAD_CALLS.items()}
FAILURES |= {f"bad {n} later": (bad_call, *v, True) for n, v in (BAD_CALLS | LATER_BAD_CALLS).items()}
FAILURES |= {f"bad {n} of a start": (bad_start, *v, False) for n, v in BAD_STARTS.items()}
FAILURES |= {f"bad {n} of a start later": (bad_start, *v, True) for n, v in BAD_STARTS.items()}
FAILURES |= {
    f.__name__.replace("_", " "): (f,)
    for f in (
        *(other_axis, other_update, accumulating, accumulating_unlike_micro_batches),
        *(
            accumulating_until_one_rank_fails,
            reset_on_one_rank,
            forward_meets_pullback,
            pullbacks_in_another_order,
            unlike_starts,
        ),
        *(two_messages, two_bad_calls, bad_adjustment, bad_virtual_batch, bad_gradient),
    )
}


def check_every_failure(group):
    for function, *arguments in FAILURES.values():
        function(group, *arguments)
    for options in ({}, {"virtual_batch_size": 2}):
        everyone_is_empty(group, options, (0, 5))


def a_rank_that_does_not_come(group, impatient, message="."):
    """impatient: two groups of the same ranks, with a short timeout. Rank 0 leaves out a first call, and a later one.

    By then a new layer works, which `group` must still be able to serve.
    """
    for later in (False, True):
        layer = make(impatient[later])
        if later:
            works(group, layer)
        if group.rank:
            start = time.monotonic()
            refused(layer, lambda layer=layer: layer(X[group.rank], training=True), message)
            assert time.monotonic() - start < 20
            assert layer.built == later
            again = "an earlier call of this layer has lost the other ranks"
            refused(layer, lambda layer=layer: layer(X[group.rank], training=True), again)
            layer.group = None
            layer(X[group.rank], training=True)  # by itself
        group.all_gather(np.zeros(1))  # rank 0 waits for the others here
    works(group, make(group))
