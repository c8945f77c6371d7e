"""The named cases, and the least that each must move through memory."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

MODES = ("inference", "training", "backward")
ITEM_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
STAGES = {1: (64, 112), 2: (256, 56), 3: (512, 28), 4: (1024, 14), 5: (2048, 7)}  # of ResNet-50: channels, side


@dataclass(frozen=True)
class Case:
    """One batch normalization to be timed.

    Attributes:
        shape, axis, dtype: of the input; `axis` as the layer takes it, feature axes of which keep statistics.
        options: further arguments of nbbn.BatchNormalization.
        fused: what follows in the same call: "" for nothing, "relu", or "residual" for relu(y + residual).
        plain: the name of the case that this one's time is set against, timed in the same rounds.
        modes: those of MODES that are timed.
    """

    name: str
    shape: tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)
    fused: str = ""
    plain: str | None = None
    modes: tuple[str, ...] = MODES

    @property
    def kept(self) -> tuple[int, ...]:
        """The feature axes, ascending and not negative."""
        axes = (self.axis,) if isinstance(self.axis, int) else self.axis
        return tuple(sorted(a % len(self.shape) for a in axes))

    @property
    def channels(self) -> int:
        return math.prod(self.shape[a] for a in self.kept)

    @property
    def per_channel(self) -> int:
        """How many values share a statistic, all virtual batches together."""
        return math.prod(self.shape) // self.channels

    @property
    def bytes(self) -> int:
        """Of one array of the input's shape and dtype."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]

    @property
    def channels_last(self) -> bool:
        return self.kept == (len(self.shape) - 1,)

    @property
    def plain_batch_norm(self) -> bool:
        """One channel axis and none of nbbn's options."""
        return len(self.kept) == 1 and not self.options

    def least_bytes(self, mode: str, cache: int, by_channel: bool = True) -> int:
        """The fewest bytes that `mode` must move between memory and cores, given a last-level cache of `cache` bytes.

        Inference reads x and writes y. Training reads x twice, once for the statistics, unless what is read stays in
        the cache from the one time to the other; backward does the same with x and dy. A residual is read once more
        in the forward pass. What follows in the same call needs its mask in the backward pass: the input determines
        that of a relu, with a residual y must be read too, and the residual's gradient written.

        by_channel: whether one channel is finished before the next, so that it is enough if one stays in the cache.
        """
        residual = self.fused == "residual"
        once, written = 1 + residual, 1
        if mode == "inference":
            return (once + written) * self.bytes
        statistics = 1
        if mode == "backward":
            statistics = once = 2 + residual
            written = 1 + residual
        # All arrays fit, or one channel of those that the statistics read, where a channel's values lie together.
        cached = (once + written) * self.bytes <= cache
        if by_channel and not self.channels_last:
            cached = cached or statistics * self.bytes // self.channels <= cache
        return ((0 if cached else statistics) + once + written) * self.bytes


def both_layouts(name: str, batch: int, channels: int, *space: int, **more: Any) -> Iterable[Case]:
    """The case channels first and channels last."""
    letters = "dhw"[-len(space) :] if len(space) > 1 else "l"
    yield Case(f"{name}-nc{letters}", (batch, channels, *space), 1, **more)
    yield Case(f"{name}-n{letters}c", (batch, *space, channels), -1, **more)


def _variants(case: Case) -> Iterable[Case]:
    """The options, dtypes and fusions of one shape, each to be set against the plain case."""
    option: dict[str, dict[str, Any]] = {
        "ghost": {"virtual_batch_size": 8},
        "renorm": {"renorm": True, "renorm_clipping": {"rmax": 3.0, "rmin": 1 / 3, "dmax": 5.0}},
    }
    for name, options in option.items():
        # In inference all of them are the plain layer.
        yield replace(
            case, name=f"{case.name}-{name}", options=options, plain=case.name, modes=("training", "backward")
        )
    for dtype in ("float16", "bfloat16", "float64"):
        yield replace(case, name=f"{case.name}-{dtype}", dtype=dtype, plain=case.name)
    for fused in ("relu", "residual"):
        yield replace(case, name=f"{case.name}-{fused}", fused=fused, plain=case.name)


def _cases() -> Iterable[Case]:
    for i, (channels, side) in STAGES.items():
        yield from both_layouts(f"resnet{i}", 32, channels, side, side)
    for case in both_layouts("resnet2", 32, 256, 56, 56):
        yield from _variants(case)
    yield Case("resnet2-axis13", (32, 256, 56, 56), (1, 3), plain="resnet2-nchw")
    yield from both_layouts("sequence", 32, 256, 4096)
    yield from both_layouts("video", 8, 64, 16, 56, 56)
    yield Case("rgb-nhwc", (128, 224, 224, 3))
    for rows, columns in ((65536, 128), (1024, 1024), (2048, 128), (32, 64)):
        yield Case(f"dense-{rows}x{columns}", (rows, columns))
    for i in (1, 2, 5):
        channels, side = STAGES[i]
        yield from both_layouts(f"single{i}", 1, channels, side, side, modes=("inference",))


CASES = {case.name: case for case in _cases()}


def select(patterns: Iterable[str], cases: Mapping[str, Case] = CASES) -> list[Case]:
    """Those of `cases` whose name matches any of the patterns (*, ?, [...]), all of them without a pattern.

    Raises: ValueError for a pattern that matches nothing; it names what comes near.
    """
    patterns = list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in cases):
            near = get_close_matches(pattern, cases, n=4, cutoff=0.4)
            hint = f"nearest: {', '.join(near)}" if near else f"there are: {', '.join(cases)}"
            raise ValueError(f"no case matches {pattern!r}; {hint}")
    return [c for c in cases.values() if not patterns or any(fnmatchcase(c.name, p) for p in patterns)]
