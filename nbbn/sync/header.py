"""What ranks tell each other before their numbers, so that what does not belong together is never merged."""

import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from nbbn.arrays import Array, place_of
from nbbn.core import dtypes
from nbbn.core.options import Numbers
from nbbn.engine.dispatcher import Dispatcher
from nbbn.sync.group import SyncError

VERSION = 1
FORWARD, BACKWARD = 0, 1
NEVER, NOW, LATER, AGAIN = range(4)
_WORDS: dict[str, dict[int, str]] = {
    "stage": {FORWARD: "a training call", BACKWARD: "a pullback"},
    "dtype": dict(enumerate(dtypes.NAMES)),
    "direct": {0: "of the host", 1: "of a GPU, for NCCL"},
    "update": {NEVER: "False", NOW: "True", LATER: "after accumulate()", AGAIN: "a micro-batch that has had its call"},
}
# What a user calls what he cannot guess.
_NAMES = {
    "version": "nbbn's version of messages",
    "layer": "which layer of the group it is",
    "call": "which call of the layer it is",
    "groups": "the number of virtual batches",
    "update": "update_statistics",
    "options": "axis, rank, renorm, activation, debias, skip_nonfinite or what virtual batches are (a checksum)",
    "direct": "what their arrays are",
    "state": "the moving statistics before the call (a checksum)",
}


class Header(NamedTuple):
    """The beginning of each message, as float64.

    layer: the how many-th of its group. call: the number of the training call, also in its pullback. status: 1 if this
    rank cannot take part. dtype: of the input. groups: of a virtual batch; 0 if there is no sample and it cannot tell.
    update: whether, and when, the moving statistics are. epsilon to dmax: the numbers of this training call. options: a
    checksum of all others. direct: 1 if the numbers follow from where they lie, and not by the host. state: a checksum
    of the moving statistics before a training call.
    """

    version: float = VERSION
    layer: float = 0
    call: float = 0
    stage: float = FORWARD
    status: float = 0
    dtype: float = 0
    groups: float = 0
    channels: float = 0
    update: float = 1
    epsilon: float = 0
    momentum: float = 0
    bessel_correction: float = 0
    renorm_momentum: float = 0
    rmin: float = 0
    rmax: float = 0
    dmax: float = 0
    options: float = 0
    direct: float = 0
    state: float = 0


_SHAPING = {"channels", "dtype"}
_STATUS, _GROUPS = Header._fields.index("status"), Header._fields.index("groups")
# As Dispatcher.hyper() begins.
NUMBERS = Header._fields[Header._fields.index("epsilon") : Header._fields.index("dmax") + 1]


def input_header(dispatcher: Dispatcher, x: Array) -> Header:
    """Of any call with an input."""
    lay = dispatcher.layout(x.shape, training=True)
    return Header(dtype=dtype_number(x.dtype), groups=lay.groups, channels=lay.channels)


def training_header(
    dispatcher: Dispatcher, x: Array, numbers: Numbers | None, adjusted: bool, state: Array, update: int
) -> Header:
    """Of a training call; the arguments are those of the Dispatcher. update: NEVER, NOW, LATER or AGAIN."""
    o, hyper = dispatcher.options, dispatcher.hyper(x.ndim, x.dtype, numbers)[: len(NUMBERS)]
    return input_header(dispatcher, x)._replace(
        update=update,
        **dict(zip(NUMBERS, hyper, strict=True)),
        options=checksum(
            *(o.axis, x.ndim, o.renorm, o.activation, adjusted),
            *(o.virtual_batch_size, o.ragged, o.virtual_batch_order),
            *(o.momentum is None, o.debias, o.skip_nonfinite),
        ),
        state=checksum_of(place_of(state).to_host(state)),
    )


@lru_cache(maxsize=8)
def dtype_number(dtype: np.dtype) -> int:
    return dtypes.NAMES.index(dtype.name)


def checksum(*values: Any) -> int:
    """A number that tells values apart by what they print."""
    return zlib.crc32(repr(values).encode())


def checksum_of(array: np.ndarray) -> int:
    """A number that tells arrays apart by their bytes."""
    return zlib.crc32(np.ascontiguousarray(array).data)


def check(headers: np.ndarray) -> int:
    """How many groups the statistics have, of the headers (size, fields) of all ranks.

    Raises: SyncError if a rank cannot take part, or if they differ in anything but groups where these are not known.
    """
    if headers[0, _STATUS] == 0 and (headers == headers[0]).all():
        return int(headers[0, _GROUPS])
    failed = [rank for rank, row in enumerate(headers) if row[_STATUS] != 0]
    if failed:
        who = f"rank {failed[0]}" if len(failed) == 1 else f"the ranks {', '.join(map(str, failed))}"
        raise SyncError(f"{who} could not take part; what it was is raised there, and nothing has changed anywhere")
    differences: dict[str, str] = {}
    for name, column in zip(Header._fields, headers.T, strict=True):
        known = column[column > 0] if name == "groups" else column
        if known.size and (known != known[0]).any():
            differences[name] = f"{_NAMES.get(name, name)} ({_each(name, column)})"
    if differences.keys() & _SHAPING:  # other channels or dtypes have other states
        differences.pop("state", None)
    if differences:
        raise SyncError(f"the ranks do not make the same call: they differ in {'; '.join(differences.values())}")
    return int(headers[:, _GROUPS].max())


def _each(name: str, column: Sequence[float]) -> str:
    """What each rank sent."""
    words = _WORDS.get(name, {})
    values = [float(v) for v in column]
    texts = [words[int(v)] if v in words else repr(v).removesuffix(".0") for v in values]  # all the digits they have
    return ", ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))
