"""What the demo compares: ways to compose minibatches, and ways to normalize them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbbn.demo.network import Array

# (random numbers, labels of all samples) -> indices of the samples in one batch
MakeBatch = Callable[[np.random.Generator, Array], Array]


def random_batch(size: int) -> MakeBatch:
    return lambda rng, labels: rng.integers(len(labels), size=size)


def neighbours_batch(size: int) -> MakeBatch:
    """Half each of digits 2k and 2k + 1, for a random k."""

    def make(rng: np.random.Generator, labels: Array) -> Array:
        first = 2 * rng.integers(5)
        return np.concatenate([rng.choice(np.flatnonzero(labels == first + i), size // 2) for i in (0, 1)])

    return make


def sorted_batch(size: int) -> MakeBatch:
    """Different samples, sorted by label."""

    def make(rng: np.random.Generator, labels: Array) -> Array:
        chosen = rng.permutation(len(labels))[:size]
        return chosen[np.argsort(labels[chosen], kind="stable")]

    return make


class Clips:
    """The clip values of batch renormalization while training proceeds.

    Source: Ioffe (2017): plain batch normalization (rmax = 1, dmax = 0) for 5,000 steps, then both grow, dmax to 5 by
    step 25,000 and rmax to 3 by step 40,000; here as shares of the run, as if it had 130,000.
    """

    progress = 0.0  # of the run, 0 to 1

    def _ramp(self, start: float, end: float, until: float) -> float:
        return float(np.interp(self.progress, [0.04, until], [start, end]))

    def rmax(self) -> float:
        return self._ramp(1, 3, until=0.3)

    def rmin(self) -> float:
        return 1 / self.rmax()

    def dmax(self) -> float:
        return self._ramp(0, 5, until=0.2)


@dataclass(frozen=True)
class Scenario:
    """One way to compose batches, with what suits it for all methods alike.

    batches, note: what the reader should know about the batches, about the methods.
    ghost: the virtual batch size of the method "ghost"; None leaves it out.
    remedy: the method to compare with plain batch normalization.
    averaging: momentum of the moving statistics, those of renorm included.
    wrong_labels: the share of the training labels that is replaced by wrong ones.
    """

    name: str
    batches: str
    make_batch: MakeBatch
    steps: int
    learning_rate: float
    ghost: int | None
    note: str
    remedy: str = "renorm"
    averaging: float = 0.99
    wrong_labels: float = 0.0

    @property
    def methods(self) -> tuple[str, ...]:
        return ("plain", "renorm") if self.ghost is None else ("plain", "renorm", "ghost")

    def options(self, method: str, clips: Clips) -> dict[str, Any]:
        """The arguments of BatchNormalization for a method; renorm calls the clips at each training step."""
        clipping = {"rmax": clips.rmax, "rmin": clips.rmin, "dmax": clips.dmax}
        special: dict[str, dict[str, Any]] = {
            "plain": {},
            "renorm": {"renorm": True, "renorm_clipping": clipping, "renorm_momentum": self.averaging},
            "ghost": {"virtual_batch_size": self.ghost},
        }
        return {"momentum": self.averaging, **special[method]}


SCENARIOS = (
    Scenario(
        "i.i.d. batches",
        "32 random images",
        random_batch(32),
        steps=1000,
        learning_rate=0.01,
        ghost=8,
        note="The control: here the moving statistics fit what the network was trained with.",
    ),
    Scenario(
        "non-i.i.d. batches",
        "32 images of two neighbouring digits (0 and 1, 2 and 3, ...)",
        neighbours_batch(32),
        steps=1000,
        learning_rate=0.01,
        ghost=8,
        note="A batch's own statistics tell which digits are in it, the moving ones do not; renorm trains with the "
        "moving ones. Ghost batches cannot help: a part of the batch holds no digit that the batch lacks.",
    ),
    Scenario(
        "tiny batches",
        "2 random images",
        random_batch(2),
        steps=2000,
        learning_rate=0.01,
        ghost=None,
        note="The statistics of two images are mostly noise; renorm averages them over many batches. "
        "Ghost batches would be smaller still: a group of one image has no variance.",
    ),
    Scenario(
        "large batches",
        "800 images sorted by class; 20 % of the training labels are wrong",
        sorted_batch(800),
        steps=150,
        learning_rate=0.05,
        ghost=8,
        remedy="ghost",
        averaging=0.9,
        wrong_labels=0.2,
        note="Four fifths of the training set: with statistics this exact the network learns the wrong labels by "
        "heart, which the noise of ghost batches hinders (Hoffer et al., 2017). Group n mod 100 takes every 100th "
        "image, so each mixes the classes although the batch is sorted.",
    ),
)
