"""Draws the pictures beside this file, with nbbn itself: python docs/pictures/draw.py (matplotlib: extra demo).

The grids are no drawings of what should be: values have one colour if their outputs depend on the same values.
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

import nbbn

HERE = Path(__file__).parent
# Colours that stay apart for colour-blind readers (Okabe and Ito).
COLOURS = ["#56B4E9", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2", "#999999"]
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"


def main() -> None:
    mpl.use("svg")
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    same_bytes_each_time = {"svg.fonttype": "none", "svg.hashsalt": "nbbn"}
    with mpl.rc_context({**style, **same_bytes_each_time}):
        for draw in (axes, ghost, mask, renorm, adjustment, averages, bessel):
            height = 1.7 if draw in (axes, ghost, mask) else 2.4
            figure = plt.figure(figsize=(6, height), layout="constrained")
            draw(figure)
            figure.savefig(HERE / f"{draw.__name__}.svg", metadata={"Date": None, "Creator": None})
            plt.close(figure)


# -- which values share a statistic ------------------------------------------------------------------------------------


def shared(layer: nbbn.BatchNormalization, shape: tuple[int, ...], used: np.ndarray | None = None) -> np.ndarray:
    """For each value of the input the number of its statistic: the first value that counts whose gradient it changes.

    Args:
        shape: (samples, ...). used: (samples,) bool: the mask of the call.
    Returns: (channels, samples).
    """
    x = np.random.default_rng(0).normal(size=shape)
    _, pullback = layer.vjp(x, training=True, mask=used)
    counts = np.ones(shape[0], bool) if used is None else used
    ones = np.eye(x.size).reshape(-1, *shape)
    reached = np.array([(pullback(dy).inputs != 0).reshape(len(counts), -1) for dy in ones])
    return np.argmax((reached & counts[:, None]).reshape(x.size, -1), axis=1).reshape(len(counts), -1).T


def grid(ax: Any, statistics: np.ndarray, title: str, label: str, used: np.ndarray | None = None) -> None:
    colour = {s: COLOURS[i % len(COLOURS)] for i, s in enumerate(dict.fromkeys(statistics.ravel()))}
    for (row, sample), s in np.ndenumerate(statistics):
        face = colour[s] if used is None or used[sample] else "none"
        ax.add_patch(plt.Rectangle((sample, row), 0.86, 0.86, facecolor=face, edgecolor=colour[s], lw=1.2))
    rows, samples = statistics.shape
    ax.set(xlim=(-0.1, samples), ylim=(rows, -0.1), aspect="equal", xticks=[], yticks=[])
    ax.set(xlabel="samples", ylabel=label)
    ax.set_title(title, fontsize=9, family="monospace")
    ax.spines[:].set_visible(False)


def axes(figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    rows = "2 rows,\n3 channels"
    grid(left, shared(nbbn.BatchNormalization(), (10, 2, 3)), "axis=-1", rows)
    grid(right, shared(nbbn.BatchNormalization(axis=[1, 2]), (10, 2, 3)), "axis=[1, 2]", rows)


def ghost(figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    grid(left, shared(nbbn.BatchNormalization(), (12, 4)), "virtual_batch_size=None", "channels")
    grid(right, shared(nbbn.BatchNormalization(virtual_batch_size=6), (12, 4)), "virtual_batch_size=6", "channels")


def mask(figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    used = np.isin(np.arange(12), [3, 7, 8], invert=True)
    grid(left, shared(nbbn.BatchNormalization(), (12, 4)), "mask=None", "channels")
    grid(right, shared(nbbn.BatchNormalization(), (12, 4), used), "mask", "channels", used)


# -- what an option does to numbers ------------------------------------------------------------------------------------


def renorm(figure: Any) -> None:
    """The output of one and the same sample, in a sequence of small minibatches."""
    rng, sample, steps = np.random.default_rng(1), np.array([[1.5]]), range(60)
    layers = {
        "plain": (nbbn.BatchNormalization(momentum=0.9), GREY),
        "renorm=True": (nbbn.BatchNormalization(momentum=0.9, renorm=True, renorm_momentum=0.9), BLUE),
    }
    batches = [np.concatenate([sample, rng.normal(size=(3, 1))]) for _ in range(100)]
    ax = figure.subplots()
    for name, (layer, colour) in layers.items():
        outputs = [layer(batch, training=True)[0, 0] for batch in batches]
        ax.plot(steps, outputs[-len(steps) :], ".-", lw=0.8, ms=4, color=colour, label=f"training, {name}")
    ax.axhline(layer(sample)[0, 0], color=ORANGE, lw=1.5, label="inference")
    ax.set(xlabel="training step (4 samples each)", ylabel="output of one sample")
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def adjustment(figure: Any) -> None:
    """One channel of one sample in several training calls."""
    rng, x = np.random.default_rng(0), np.random.default_rng(5).normal(size=(8, 16, 1)).cumsum(axis=1)

    def noise(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        return rng.uniform(0.8, 1.2, (shape[0], 1, 1)), rng.uniform(-0.2, 0.2, (shape[0], 1, 1))

    layer, plain = nbbn.BatchNormalization(adjustment=noise), nbbn.BatchNormalization()
    ax = figure.subplots()
    for i in range(8):
        label = "eight calls with an adjustment" if i == 0 else None
        ax.plot(layer(x, training=True)[0, :, 0], color=BLUE, lw=0.7, label=label)
    ax.plot(plain(x, training=True)[0, :, 0], color=ORANGE, lw=1.8, label="without")
    ax.set(xlabel="position", ylabel="output of one sample")
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def averages(figure: Any) -> None:
    """The moving mean after each training call, for data of mean 3."""
    choices: dict[float | None, str] = {0.9: GREY, 0.99: BLUE, None: ORANGE}
    layers = {m: nbbn.BatchNormalization(momentum=m) for m in choices}
    ax, rng = figure.subplots(), np.random.default_rng(0)
    means: dict[float | None, list[float]] = {m: [] for m in layers}
    for _ in range(100):
        batch = rng.normal(3, 3, size=(16, 1))
        for momentum, layer in layers.items():
            layer(batch, training=True)
            means[momentum].append(float(layer.moving_mean[0]))
    for momentum, found in means.items():
        ax.plot(range(1, 101), found, color=choices[momentum], lw=1.2, label=f"momentum={momentum}")
    ax.axhline(3, color="black", lw=0.5, ls="--")
    ax.set(xlabel="training calls", ylabel="moving mean")
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def bessel(figure: Any) -> None:
    """The moving variance after one training call, for data of variance 1: the average of 20,000 channels."""
    ax, rng, sizes = figure.subplots(), np.random.default_rng(0), [2, 3, 4, 6, 8, 12, 16, 24, 32]
    for corrected, colour in ((True, ORANGE), (False, GREY)):
        layers = [nbbn.BatchNormalization(momentum=0.0, bessel_correction=corrected) for _ in sizes]
        for layer, m in zip(layers, sizes, strict=True):
            layer(rng.normal(size=(m, 20_000)), training=True)
        found = [layer.moving_variance.mean() for layer in layers]
        ax.plot(sizes, found, "o-", ms=3, lw=1, color=colour, label=f"bessel_correction={corrected}")
    ax.set(xlabel="values per statistic", ylabel="moving variance", ylim=(0.4, 1.1))
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


if __name__ == "__main__":
    main()
