"""Where the ranks of a SyncBatchNormalization do not make the same call: each failure ends on all of them, with a layer
that is as it was. Threads, forked children and copies of a layer do not take each other's messages."""

import copy
import gc
import pickle
import random
import threading
import time

import numpy as np
import pytest

import nbbn
from nbbn.sync import SyncError, exchange
from nbbn.sync.header import VERSION, Header
from nbbn.sync.header import check as compare
from tests.helpers.processes import check
from tests.helpers.rank_failures import FAILURES, a_rank_that_does_not_come
from tests.helpers.ranks import (
    DY,
    PATIENCE,
    Plain,
    X,
    bits,
    check_same_bits,
    make,
    on_ranks,
    refused,
    same,
    threads,
    works,
)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_every_failure_is_one_of_all_ranks(failure, n):
    function, *arguments = failure
    on_ranks(threads(n), function, *arguments)


@pytest.mark.parametrize("n", [2, 3])
def test_failures_where_layers_share_the_messages_of_a_group(n):
    """As those of a group without duplicate() do."""
    for name in ("unlike epsilon", "unlike channels in a call", "bad mask later", "forward meets pullback"):
        function, *arguments = FAILURES[name]
        on_ranks([Plain(group) for group in threads(n)], function, *arguments)


@pytest.mark.parametrize("n", [2, 3])
def test_a_rank_that_does_not_come(n):
    impatient = [nbbn.sync.threads(n, timeout=0.3) for _ in range(2)]

    def run(group):
        own = [groups[group.rank] for groups in impatient]
        a_rank_that_does_not_come(group, own, f"not all {n} threads of the group came within 0.3 s")

    on_ranks(threads(n), run)


def test_an_extra_call():
    """Nobody can tell it from one that is late."""
    impatient = nbbn.sync.threads(2, timeout=0.3)

    def run(group):
        layer = make(impatient[group.rank])
        works(group, layer)
        if group.rank:
            refused(layer, lambda: layer(X[1], training=True), "not all 2 threads")
        group.all_gather(np.zeros(1))
        refused(layer, lambda: layer(X[group.rank], training=True), "not all 2 threads|has lost the other ranks")
        layer.group = threads_of_late[group.rank]
        works(group, layer)

    threads_of_late = threads(2)
    on_ranks(threads(2), run)


class Strange:
    """A group of two ranks of which the other one does not exist."""

    rank, size = 0, 2

    def __init__(self, function):
        self.all_gather = function


GARBAGE = {
    "shape": (lambda v: np.stack([v, v, v]), r"must return shape \(2, \d+\) and dtype float64; received \(3, "),
    "dtype": (lambda v: np.stack([v, v]).astype(np.float32), "received .* and float32"),
    "nothing": (lambda v: None, r"received \(\) and object"),
    "transposed": (lambda v: np.stack([v, v]).T, r"received \(\d+, 2\)"),
    "zeros": (lambda v: np.zeros((2, len(v))), "what rank 0 sent in row 0, which has other values"),
    "another order": (lambda v: np.stack([v + 1, v]), "what rank 0 sent in row 0"),
    "an error": (lambda v: 1 // 0, r"all_gather\(\) has failed: ZeroDivisionError"),
}


@pytest.mark.parametrize(("function", "message"), GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("later", [False, True])
def test_groups_that_return_garbage(function, message, later):
    group = Strange(lambda values: np.stack([values, values]))
    layer = make(group)
    if later:
        layer(X[0], training=True)
    group.all_gather = function
    error = refused(layer, lambda: layer(X[0], training=True), message)
    assert isinstance(error.__cause__, ZeroDivisionError) == ("ZeroDivision" in message)
    assert layer.built == later
    group.all_gather = lambda values: np.stack([values, values])
    refused(layer, lambda: layer(X[0], training=True), "an earlier call of this layer has lost the other ranks: ")
    layer.group = group
    layer(X[0], training=True)


def test_an_interruption_is_none_of_this_layers_errors():
    """It goes through, and nobody knows how far the message has got."""

    def interrupted(values):
        raise KeyboardInterrupt

    layer = make(Strange(interrupted))
    with pytest.raises(KeyboardInterrupt):
        layer(X[0], training=True)
    assert not layer.built
    refused(layer, lambda: layer(X[0], training=True), "lost the other ranks: KeyboardInterrupt")


def test_what_is_no_process_group():
    pytest.importorskip("torch.distributed")
    with pytest.raises(TypeError, match=r"process_group must be one of torch\.distributed, or None; received 5"):
        nbbn.sync.torch(5)
    with pytest.raises(ValueError, match=r"timeout must be a finite number of seconds, at least 0; received -1"):
        nbbn.sync.torch(timeout=-1)


def test_what_is_no_group():
    for group in (object(), 3, threading):
        with pytest.raises(TypeError, match=r"group must have rank, size and all_gather\(\); received .* without"):
            nbbn.SyncBatchNormalization(group=group)
    for n, kind in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ("2", TypeError)):
        with pytest.raises(kind, match="n must be a positive integer; received"):
            nbbn.sync.threads(n)
    for timeout, kind in (("1", TypeError), (None, TypeError), (-1, ValueError), (np.nan, ValueError)):
        with pytest.raises(kind, match="timeout must be a finite number of seconds, at least 0; received"):
            nbbn.sync.threads(2, timeout)
    with pytest.raises(ValueError, match="fused must be False or None"):
        nbbn.SyncBatchNormalization(axis=1, fused=True)
    with pytest.raises(ValueError, match="synchronized must be True or None"):
        nbbn.SyncBatchNormalization(synchronized=False)


def groups_of_layers(kind, group):
    """For each of two layers."""
    own = Plain(group)
    return [own, own] if kind == "one" else [Plain(group, several=True) for _ in range(2)]


@pytest.mark.parametrize("kind", ["one", "several"])
def test_layers_that_share_messages_and_meet_each_other(kind):
    """Of one group, and of several that send by one transport."""

    def run(group):
        layers = [make(own) for own in groups_of_layers(kind, group)]
        for later in (False, True):
            one, other = layers[:: -1 if group.rank else 1]
            for layer, order in ((one, "0: 0, rank 1: 1"), (other, "0: 1, rank 1: 0")):
                refused(layer, lambda la=layer: la(X[group.rank], training=True), rf"which layer .*\(rank {order}\)")
                assert layer.built == later
            for layer in layers:
                works(group, layer)

    on_ranks(threads(2), run)


def test_groups_are_not_kept():
    """Nor mixed up with a later one in the same memory."""
    gc.collect()
    before = len(exchange._turns)
    for _ in range(10):
        make(threads(1)[0])
    gc.collect()
    assert len(exchange._turns) == before


class Slotted:
    """A group that has no weak references."""

    __slots__ = ("group", "rank", "size")

    def __init__(self, group):
        self.rank, self.size, self.group = group.rank, group.size, group

    def all_gather(self, values):
        return self.group.all_gather(values)


def test_a_group_without_weak_references():
    def run(group):
        own = Slotted(group)
        for _ in range(2):
            works(group, make(own))

    on_ranks(threads(2), run)


def in_two_threads(group, layers, rounds):
    """Train two layers at once, each in a thread of its own. Returns: what refused them."""
    refusals, start = [], threading.Barrier(2)

    def train(layer):
        rng, done = random.Random(group.rank), 0
        start.wait(PATIENCE)
        while done < rounds:
            try:
                layer(X[group.rank], training=True)
                done += 1
            except SyncError as error:  # they have met the other layer
                refusals.append(str(error))
                time.sleep(rng.random() / 1000)

    pool = [threading.Thread(target=train, args=(layer,), daemon=True) for layer in layers]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    return refusals


@pytest.mark.parametrize("own_messages", [True, False])
def test_two_layers_in_two_threads_at_once(own_messages):
    """With messages of its own a layer meets no other. Where they share them, what does not belong together is refused
    and nothing is lost."""
    alone = nbbn.BatchNormalization(momentum=0.5)
    whole = X[:2].reshape(-1, 5)
    for _ in range(10):
        alone(whole, training=True)

    def run(group):
        layers = [make(group if own_messages else Plain(group))]
        layers.append(make(layers[0].group))
        refusals = in_two_threads(group, layers, 10)
        assert not (own_messages and refusals)
        assert all("which layer of the group" in refusal for refusal in refusals)
        for layer in layers:
            same(layer.moving_variance, alone.moving_variance)

    on_ranks(threads(2), run)


def test_one_layer_in_two_threads_at_once():
    """Forward passes of one layer are one sequence: those of all ranks are as many, in whatever thread."""

    def run(group):
        layer = make(group)
        assert in_two_threads(group, [layer, layer], 10) == []
        return check_same_bits(group, layer)

    assert len(set(on_ranks(threads(2), run))) == 1


def test_a_forked_child():
    """Its messages would be its parent's. It hears so also where a thread of the parent was in a call."""
    code = """
import os, signal, threading, time, warnings
import numpy as np, nbbn
warnings.simplefilter("ignore")  # of Python, about forks where there are threads
groups, x = nbbn.sync.threads(2, timeout=20), np.ones((4, 3))
layers = [nbbn.SyncBatchNormalization(group=g) for g in groups]
waiting = threading.Thread(target=layers[0], args=(x, True), daemon=True)
waiting.start()
while not any(meeting.barrier.n_waiting for meeting in groups[0]._meetings.values()):
    time.sleep(0.01)
child = os.fork()
if not child:
    signal.alarm(10)
    for layer in layers:
        try:
            layer(x, training=True)
        except nbbn.sync.SyncError as error:
            assert "needs a group of its own" in str(error), error
        else:
            os._exit(3)
        assert layer(x).shape == x.shape
        layer.group = None
        layer(x, training=True)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
layers[1](x, training=True)
waiting.join(20)
assert not waiting.is_alive()
assert (layers[0].moving_mean == layers[1].moving_mean).all()
"""
    check(code)


def copied_by(how, layer):
    return pickle.loads(pickle.dumps(layer)) if how == "pickle" else copy.deepcopy(layer)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_a_copy_has_lost_its_group(how):
    def run(group):
        layer = make(group)
        works(group, layer)
        twin = copied_by(how, copied_by(how, layer))
        assert twin.group is None
        assert bits(twin) == bits(layer)
        refused(twin, lambda: twin(X[0], training=True), "a copy of a layer has no group: set its attribute `group`")
        np.testing.assert_array_equal(twin(X[0]), layer(X[0]))
        twin.group = group
        works(group, twin)
        works(group, layer)
        assert bits(twin) == bits(layer)
        alone = copied_by(how, make(None))
        alone(X[0], training=True)

    on_ranks(threads(2), run)


def test_another_version_of_messages():
    """Whatever else it means by them."""
    headers = np.array([Header(), Header(version=VERSION + 1, channels=5)])
    with pytest.raises(SyncError, match=rf"nbbn's version of messages \(rank 0: {VERSION}, rank 1: {VERSION + 1}\)"):
        compare(headers)
    assert compare(np.array([Header(groups=3), Header(groups=3)])) == 3


def test_a_group_may_be_set_later():
    def run(group):
        layer = nbbn.SyncBatchNormalization(momentum=0.5)
        layer(X[0], training=True)  # the same on all ranks
        layer.group = group
        assert layer.group is group
        works(group, layer)
        layer.group = group  # once more: with other messages
        works(group, layer)

    on_ranks(threads(2), run)


def test_a_pullback_is_of_the_group_of_its_call():
    """Whatever group the layer has got since then."""

    def run(group):
        x, dy = (a[: group.size].reshape(-1, 5) for a in (X, DY))
        part = slice(12 * group.rank, 12 * group.rank + 12)
        layer, whole = make(group), nbbn.BatchNormalization()
        _, pullback = layer.vjp(X[group.rank], True)
        layer.group = None
        same(pullback(DY[group.rank]).inputs, whole.vjp(x, True)[1](dy).inputs[part])
        _, pullback = layer.vjp(X[group.rank], True)
        layer.group = group
        same(pullback(DY[group.rank]).inputs, whole.vjp(X[group.rank], True)[1](DY[group.rank]).inputs)

    on_ranks(threads(2), run)


def test_other_states_when_a_group_is_set():
    def run(group):
        layer = nbbn.SyncBatchNormalization(momentum=0.5)
        layer(X[group.rank], training=True)
        layer.group = group
        refused(layer, lambda: layer(X[group.rank], training=True), "the moving statistics before the call")
        layer.moving_mean, layer.moving_variance = np.zeros(5), np.ones(5)
        works(group, layer)

    on_ranks(threads(2), run)


def test_a_rank_that_cannot_complete_is_left_behind():
    """Its state is that of before the call, and all hear of it in the next one, rather than go on with other states."""

    def run(group):
        layer = make(group)
        works(group, layer)
        if group.rank:
            layer(X[1], training=True)
        else:
            before, layer._update = bits(layer), None  # no function
            with pytest.raises(TypeError):
                layer(X[0], training=True)
            assert bits(layer) == before
            del layer._update
        for _ in range(2):
            refused(layer, lambda: layer(X[group.rank], training=True), r"which call .*\(rank 0: 2, rank 1: 3\)")

    on_ranks(threads(2), run)
