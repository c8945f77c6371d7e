"""Train one model on several processes: mpiexec -n 2 python docs/examples/distributed.py

Each rank has a part of every batch of 64. Batch normalization sees all of it, so the number of ranks changes nothing
but the time that a step takes.
"""

import numpy as np
from mpi4py import MPI

import nbbn

comm = MPI.COMM_WORLD
rng = np.random.default_rng(0)  # the same on all ranks: so are the data, and the first weights


def spirals(count):
    """Points (count, 2) on two spirals, and which of the two they are on."""
    label = rng.integers(0, 2, count)
    angle = rng.uniform(1, 9, count)
    points = angle[:, None] * np.stack([np.cos(angle + np.pi * label), np.sin(angle + np.pi * label)], axis=1)
    return points + rng.normal(0, 0.2, points.shape), label


points, labels = spirals(4096)
hidden, scores = rng.normal(0, 1, (2, 64)), rng.normal(0, 0.1, (64, 2))
norm = nbbn.SyncBatchNormalization(momentum=0.9, activation="relu", dtype="float64", group=nbbn.sync.mpi(timeout=60))
norm.build((None, 64))
weights = [hidden, scores, norm.gamma, norm.beta]
speeds = [np.zeros_like(w) for w in weights]

for _ in range(1024):
    batch = rng.integers(0, len(points), 64)
    mine = batch[comm.rank :: comm.size]  # as many or as few as there are; an empty part would do, too
    x, label = points[mine], labels[mine]
    y, pullback = norm.vjp(x @ hidden, training=True)  # one exchange: statistics of all 64
    logits = y @ scores
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(len(label)), label] -= 1
    dy = p / len(batch)  # the loss is the mean over the whole batch: a rank has its share of the sum
    found = pullback(dy @ scores.T)  # one exchange more
    gradients = [x.T @ found.inputs, y.T @ dy, found.gamma, found.beta]
    for weight, speed, gradient in zip(weights, speeds, gradients, strict=True):
        total = np.empty_like(gradient)
        comm.Allreduce(gradient, total)  # the sum over the ranks
        speed[:] = 0.9 * speed - 0.05 * total
        weight += speed

right = (norm(points @ hidden) @ scores).argmax(axis=1) == labels  # inference: no exchange
checksums = comm.allgather([float(w.sum()) for w in norm.get_weights()])
if comm.rank == 0:
    same = all(one == checksums[0] for one in checksums)
    print(f"{comm.size} ranks, accuracy {right.mean():.2f}, the same weights on all: {same}", flush=True)
