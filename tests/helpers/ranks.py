"""Ranks that are threads, and what a test of any rank needs; a transport's group stands for its own rank's view.

Functions that take a `group` are those of one rank. They run in threads and in processes alike: what ranks tell each
other about a test goes by the group, too.
"""

import hashlib

import numpy as np
import pytest

import nbbn
from nbbn.sync import SyncError
from tests.helpers.concurrency import in_threads
from tests.oracle.reference import Reference

PATIENCE = 20  # seconds: more than any of these takes, less than the 60 after which a thread counts as hanging


def threads(n):
    return nbbn.sync.threads(n, timeout=PATIENCE)


class Silent:
    """A group that nobody may ask for anything."""

    rank, size = 0, 2

    def all_gather(self, values):
        raise AssertionError("a message")


def on_ranks(groups, function, *arguments):
    """What function(group, *arguments) returned on each rank. An error of one rank leaves the others waiting, which
    then raise SyncError: so the first other error is raised."""
    found, errors = [None] * len(groups), [None] * len(groups)

    def run(rank):
        try:
            found[rank] = function(groups[rank], *arguments)
        except BaseException as error:
            errors[rank] = error

    in_threads([lambda rank=rank: run(rank) for rank in range(len(groups))])
    raised = [error for error in errors if error is not None]
    for error in [*(e for e in raised if not isinstance(e, SyncError)), *raised]:
        raise error
    return found


class Plain:
    """A group with nothing but what it must have. several: whether others send by the same one."""

    def __init__(self, group, several=False):
        self.rank, self.size, self._group = group.rank, group.size, group
        if several:
            self.transport = group

    def all_gather(self, values):
        return self._group.all_gather(values)


def same(found, expected, bound=1e-12):
    np.testing.assert_allclose(found, expected, rtol=bound, atol=bound)


def gathered(group, values):
    """(size, n) float64: those of all ranks."""
    return group.all_gather(np.ascontiguousarray(values, np.float64).ravel())


def bits(layer):
    return None if layer._variables is None else layer._variables.state.tobytes()


def check_same_bits(group, layer):
    """Fail unless all ranks have the same state. Returns: a digest of it."""
    digest = hashlib.sha256(bits(layer)).digest()
    found = group.all_gather(np.frombuffer(digest, np.uint32).astype(np.float64))
    assert (found == found[0]).all()
    return digest.hex()[:16]


X = np.random.default_rng(1).normal(2, 3, (4, 12, 5))  # of each rank
DY = np.random.default_rng(2).normal(size=X.shape)


def make(group, **options):
    return nbbn.SyncBatchNormalization(**{"momentum": 0.5, "dtype": None, **options}, group=group)


def refused(layer, call, message, *after):
    """The SyncError of call(), which has changed nothing. after: the state then, where that is another one."""
    after = after or (bits(layer),)
    with pytest.raises(SyncError, match=message) as found:
        call()
    assert (bits(layer),) == after
    return found.value


def works(group, layer):
    """Fail unless the next call, and its pullback, are right, and all ranks have the same state then."""
    x, dy = (a[: group.size].reshape(-1, 5) for a in (X, DY))
    y, pullback = layer.vjp(X[group.rank], True)
    whole = Reference(epsilon=layer.epsilon).build(x.shape)(x, True, update_statistics=False)
    part = slice(12 * group.rank, 12 * group.rank + 12)
    same(y, whole.y[part])
    same(pullback(DY[group.rank]).inputs, whole.gradients(dy).inputs[part])
    check_same_bits(group, layer)


def each_rank(group, values):
    """The i-th value on rank i, the last one on all that follow."""
    return values[min(group.rank, len(values) - 1)]
