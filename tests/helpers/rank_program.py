"""One rank of a test over MPI or torch.distributed: python -m tests.helpers.rank_program TRANSPORT WHAT."""

import json
import os
import signal
import sys
import time
from functools import partial

import numpy as np

import nbbn
from nbbn.sync import SyncError
from tests.helpers.rank_cases import check_every_case
from tests.helpers.rank_failures import a_rank_that_does_not_come, check_every_failure
from tests.helpers.ranks import X, make, refused, works

LIMIT = 60  # seconds that ranks wait for each other in calls that are to succeed


class Mpi:
    def __init__(self):
        from mpi4py import MPI

        self.world = MPI.COMM_WORLD
        self.rank, self.size = self.world.rank, self.world.size

    def group(self, n, timeout):
        """Of the first n ranks; None for the others."""
        comm = self.world.Split(int(self.rank < n), self.rank)
        return nbbn.sync.mpi(None if n == self.size else comm, timeout) if self.rank < n else None

    def end(self):
        pass  # mpi4py does


class Gloo:
    def __init__(self):
        import torch.distributed as dist

        dist.init_process_group("gloo")
        self._dist, self._made = dist, []
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def group(self, n, timeout):
        made = self._dist.new_group(list(range(n)))
        return nbbn.sync.torch(None if n == self.size else made, timeout) if self.rank < n else None

    def again(self, n, timeout):
        """A group of the same process group each time."""
        if not self._made:
            self._made.append(self._dist.new_group(list(range(n))))
        return nbbn.sync.torch(self._made[0], timeout) if self.rank < n else None

    def end(self):
        self._dist.destroy_process_group()


def everything(transport):
    """All options and all failures, on all ranks, and on ever fewer of them. Returns: the digests of the states."""
    found = {}
    sizes = range(transport.size, 1, -1)
    groups = {n: [transport.group(n, timeout) for timeout in (LIMIT, 1.0, 1.0)] for n in sizes}
    for n, (group, *impatient) in groups.items():
        if group is not None:
            found |= {f"{n}, {name}, {kind}": digest for (name, kind), digest in check_every_case(group).items()}
            check_every_failure(group)
            a_rank_that_does_not_come(group, impatient)
    return found


def late(transport):
    """One rank comes when the others have given up: it may find what they had sent. Then a new layer works, and the
    processes end."""
    group, *impatient = (transport.group(transport.size, timeout) for timeout in (LIMIT, 1.0, 1.0))
    for later in (False, True):
        layer = make(impatient[later])
        if later:
            works(group, layer)
        call = partial(outcome, layer, X[group.rank])
        outcomes = [call()] if group.rank else []
        group.all_gather(np.zeros(1))  # rank 0 comes when the others have given up
        while len(outcomes) < 2:
            outcomes.append(call())
        assert outcomes[1] == "SyncError"
        assert group.rank == 0 or outcomes[0] == "SyncError"
        group.all_gather(np.zeros(1))
    works(group, make(group))
    return outcomes


def outcome(layer, x):
    try:
        layer(x, training=True)
    except SyncError:
        return "SyncError"
    return "done"


def sharing(transport):
    """Two groups of some of the processes send by one: layers that meet hear of it."""
    groups = [transport.again(2, LIMIT) for _ in range(2)]
    if transport.rank < 2:
        layers = [make(group) for group in groups]
        for layer, order in zip(
            layers[:: -1 if transport.rank else 1], ("0: 0, rank 1: 1", "0: 1, rank 1: 0"), strict=True
        ):
            refused(layer, partial(layer, X[transport.rank], True), rf"which layer .*\(rank {order}\)")
        for layer in layers:
            works(groups[0], layer)
    return "done"


def killed(transport):
    """The last rank dies in the middle."""
    group = transport.group(transport.size, 5.0)
    layer = make(group)
    works(group, layer)
    if group.rank == group.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    message = "did not come together|not all 3 ranks of the communicator came"
    refused(layer, lambda: layer(X[group.rank], training=True), message)
    assert time.monotonic() - start < 30
    layer.group = None
    layer(X[group.rank], training=True)
    print("survived", flush=True)
    os._exit(0)  # without goodbyes to those that are gone


if __name__ == "__main__":
    transport = {"mpi": Mpi, "gloo": Gloo}[sys.argv[1]]()
    result = {"everything": everything, "late": late, "sharing": sharing, "killed": killed}[sys.argv[2]](transport)
    if transport.rank == 0:
        print(json.dumps(result), flush=True)
    transport.end()
