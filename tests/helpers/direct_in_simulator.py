"""One rank of layers whose moments do not leave the GPU: PyTorch's tensors of the host in the place of a GPU's, gloo in
that of NCCL. Run by test_sync_direct.py, as a process for each rank, in Numba's simulator."""

import numpy as np
import torch
import torch.distributed as dist

import nbbn
from tests.helpers.adapters_in_simulator import SMALL, adapted
from tests.helpers.ranks import each_rank, refused, same

LENGTHS = {2: [3, 5], 3: [3, 0, 5]}
CASES = {
    "plain": {},
    "renorm": {"renorm": True},
    "adjustment": {"adjustment": True},
    "virtual batch": {"virtual_batch_size": 4},
}


def made(group, options):
    adjusted = {"adjustment": lambda shape: (np.full(5, 2.0), np.ones(5))} if "adjustment" in options else {}
    layer = nbbn.SyncBatchNormalization(**{"momentum": 0.5, **options, **adjusted}, group=group)
    nbbn.force(layer, thresholds=SMALL)
    return layer


def check(group, library, options, brought):
    """Two steps, against one layer on the whole batch."""
    lengths = LENGTHS[group.size]
    whole_options = dict(options)
    if "virtual_batch_size" in options:
        lengths = [4 if n else 0 for n in lengths]
        whole_options["virtual_batch_size"] = sum(lengths)
    first = sum(lengths[: group.rank])
    part = slice(first, first + lengths[group.rank])
    layer, whole = made(group, options), made(None, whole_options)
    nbbn.force(whole)
    for seed in range(2):
        rng = np.random.default_rng(seed)
        x, dy = rng.normal(3, 2, (sum(lengths), 5)), rng.normal(size=(sum(lengths), 5))
        brought.clear()
        y, pullback = layer.vjp(library.from_host(x[part], 0), training=True)
        found = pullback(library.from_host(dy[part], 0))
        assert brought[0] == layer._variables.state.shape  # for its checksum
        rest = [shape for shape in brought[1:] if "adjustment" not in options or shape == (4, 5)]
        assert rest == [], f"moments or sums on the host: {rest}"
        expected, whole_pullback = whole.vjp(x, training=True)
        same(library.to_host(y), expected[part])
        same(library.to_host(found.inputs), whole_pullback(dy).inputs[part])
        for name in layer.get_state():
            same(library.to_host(getattr(layer, name)), getattr(whole, name))
    state = library.to_host(layer._variables.state.owner).tobytes()
    bits = group.all_gather(np.frombuffer(state, np.uint8).astype(np.float64))
    assert (bits == bits[0]).all()


def failures(group, library):
    """They are heard of before a number leaves its GPU, so nobody waits for one."""
    layer, x = made(group, {}), np.random.default_rng(0).normal(size=(4, 5))
    tensor = library.from_host(x, 0)
    calls = [lambda: layer(tensor, training=True, mask=np.ones(7)), lambda: layer(tensor, training=True)]
    for _ in range(2):
        refused(layer, each_rank(group, calls), "rank 0 could not take part", None)
    layer(tensor, training=True)
    layer = made(group, {}) if group.rank else nbbn.SyncBatchNormalization(momentum=0.5, group=group)
    refused(layer, lambda: layer(each_rank(group, [x, tensor]), training=True), "what their arrays are", None)


def main():
    library, _, to_host = adapted("torch")
    dist.init_process_group("gloo")
    group, brought = nbbn.sync.torch(timeout=60), []

    def noted(array):
        brought.append(tuple(array.shape))
        return to_host(array)

    library.to_host = noted
    assert not group.takes(torch.zeros(1))  # gloo takes what has come to the host
    group._is_direct = True
    for options in CASES.values():
        check(group, library, options, brought)
    failures(group, library)
    if group.rank == 0:
        print(f"{len(CASES)} cases agree")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
