"""Notices a loop that makes new variables in each step, where TensorFlow 1 would have built its graph once."""

import sys
import warnings
from collections.abc import Callable
from types import FrameType

# How many sets of variables one place in a program makes before it looks like a loop over batches. A network is often
# built in a loop, too: 64 layers in DenseNet-264, 36 blocks in ResNet-152. But then no layer's update is run before the
# next layer is made, and where one was, few are enough.
_UNTRAINED, _TRAINED = 100, 20

# Code and position in it, from the innermost frame to the outermost: the same each time that a loop comes round, and
# different for two calls of one helper function.
_Way = tuple[tuple[object, int], ...]


class Loops:
    """The places that have made variables without a name. It warns once. made: how many it has noticed."""

    def __init__(self) -> None:
        self.made = 0
        self._seen: dict[_Way, tuple[int, Callable[[], bool]]] = {}
        self._warned = False

    def notice(self, is_trained: Callable[[], bool], is_kept: bool) -> None:
        """To be called before a set of variables is made.

        is_trained: asked when this place makes the next one: whether one batch has been trained with them. is_kept:
        whether somebody has a layer with them, so that nothing is lost before that."""
        self.made += 1
        way, level = _where()
        count, predecessor_is_trained = self._seen.get(way, (0, lambda: False))
        count += 1
        self._seen[way] = count, is_trained
        if self._warned or count < _TRAINED:
            return
        if not predecessor_is_trained() and (is_kept or count < _UNTRAINED):
            return
        self._warned = True
        warnings.warn(
            f"this line has made variables for batch normalization {count} times, each with moving statistics of its "
            "own. In a loop over batches they should be made once: put the network into a function for "
            "make_template(name, function), or give the layer a name and reuse=AUTO_REUSE, or make a "
            "BatchNormalization object before the loop. Ignore this if these are the layers of one network.",
            stacklevel=level,
        )


def _where() -> tuple[_Way, int]:
    """How the program came to the caller of this function, and the stacklevel there of the first line outside nbbn."""
    frame: FrameType | None = sys._getframe(1)
    way, level, inside = [], 1, True
    while frame is not None:
        inside = inside and frame.f_globals.get("__name__", "").startswith("nbbn.")
        level += inside
        way.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(way), level
