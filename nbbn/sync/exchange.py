"""The messages of one layer: what is gathered for a training call, and for its pullback."""

import itertools
import weakref
from typing import Any, NoReturn

import numpy as np

from nbbn.arrays import Array, place_of
from nbbn.runtime import StateLock
from nbbn.sync.group import Group, SyncError
from nbbn.sync.header import Header, check

# How many numbers go with the header. So every first message is as long as any other, whatever call of whatever layer
# it is of; what does not fit follows when the headers have been compared. 8 KB take no longer than the header alone.
FIRST = 1024


class Turns:
    """What the layers of a transport have in common: a number for each, and a lock for those that share messages."""

    def __init__(self, transport: Any = None) -> None:
        self.transport, self.numbers, self.lock = transport, itertools.count(), StateLock()


_turns: dict[int, Turns] = {}  # by the id of the transport, which need not be hashable


def _turns_of(transport: Any) -> Turns:
    """They last as long as the transport, so that numbers go on where all of its layers are gone on one rank."""
    found = _turns.get(id(transport))
    if found is None:
        try:
            weakref.finalize(transport, _turns.pop, id(transport), None).atexit = False
            found = Turns()
        except TypeError:  # no weak references to these: it is kept, so that no other one ever has its id
            found = Turns(transport)
        found = _turns.setdefault(id(transport), found)
    return found


class Exchange:
    """What one layer sends to its group. calls: how many training calls all ranks have finished.

    lock: held from a call's first message to its end. turns: given for what is no layer: it sends by the group itself,
    and has no number among the layers.
    """

    def __init__(self, group: Group, turns: Turns | None = None) -> None:
        self.group, self.calls = group, 0
        self._channel: Any = group.duplicate() if turns is None and hasattr(group, "duplicate") else group
        turns = turns or _turns_of(getattr(group, "transport", group))
        self._layer, self.lock = next(turns.numbers), turns.lock if self._channel is group else StateLock()
        self._broken: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Lost, ()

    def gather(self, header: Header, own: Array | None, cause: Exception | None = None) -> Array:
        """The numbers (size, R, groups * C) of all ranks, of one's own (R, groups * C): moments, or the sums of a
        gradient. On the host, or where they lie if the group can do so. own: None where this rank cannot take part, for
        a cause.

        Raises: SyncError if one of them cannot, if they do not make the same call, or if the group fails.
        """
        takes = getattr(self._channel, "takes", None)
        direct = not (own is None or isinstance(own, np.ndarray) or takes is None) and takes(own.owner)
        header = header._replace(layer=self._layer, status=float(own is None), direct=float(direct))
        fields, rows = np.array(header, np.float64), 0 if own is None else own.shape[0]
        numbers = np.zeros(0) if own is None or direct else place_of(own).to_host(own).ravel()
        try:
            if self._broken is not None:
                raise SyncError(f"an earlier call of this layer has lost the other ranks: {self._broken}")
            first = self._all_gather(np.concatenate([fields, _padded(numbers[:FIRST], FIRST)]))
            statistics = check(first[:, : fields.size]) * int(header.channels)
            if direct:
                return self._gathered_there(own, statistics)
            size = rows * statistics
            found = first[:, fields.size : fields.size + size]
            if size > FIRST:
                rest = self._all_gather(_padded(numbers[FIRST:], size - FIRST))
                found = np.concatenate([found, rest], axis=1)
        except SyncError as error:
            if cause is None:
                raise  # it may have a cause of its own
            raise error from cause
        except BaseException as error:  # nobody knows what the others have got of this message
            self._broken = repr(error)
            raise
        return found.reshape(len(found), rows, statistics)

    def _gathered_there(self, own: Any, statistics: int) -> Array:
        """The same of an array that the group gathers where it lies."""
        place, rows = place_of(own), own.shape[0]
        if own.size == 0:  # an empty virtual batch does not know how many the others have
            own = place.from_host(np.zeros((rows, statistics)))
        found: Any = place.empty((self.group.size, rows, statistics), own.dtype)
        try:
            self._channel.gather_into(found.owner, own.owner)
        except Exception as error:
            self._broken = str(error)
            raise
        return found

    def _all_gather(self, values: np.ndarray) -> np.ndarray:
        """Raises: SyncError if the group fails, or returns something else than it must."""
        rank, size = self.group.rank, self.group.size
        try:
            found = np.asarray(self._channel.all_gather(values))
            if found.dtype != np.float64 or found.shape != (size, values.size):
                raise SyncError(
                    f"all_gather() must return shape {(size, values.size)} and dtype float64; received "
                    f"{found.shape} and {found.dtype.name}"
                )
            if found[rank].tobytes() != values.tobytes():
                raise SyncError(f"all_gather() must return what rank {rank} sent in row {rank}, which has other values")
        except SyncError as error:
            self._broken = str(error)
            raise
        except Exception as error:
            self._broken = f"all_gather() has failed: {error!r}"
            raise SyncError(self._broken) from error
        return found


class Lost:
    """The exchange of a copied layer: a group does not travel, and a layer without one would be another one."""

    lock = StateLock()
    group, calls = None, 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Lost, ()

    def gather(self, header: Header, own: Array | None, cause: Exception | None = None) -> NoReturn:
        message = "a copy of a layer has no group: set its attribute `group`, to None for a layer by itself"
        raise SyncError(message) from cause


def _padded(numbers: np.ndarray, size: int) -> np.ndarray:
    """With zeros at their end: an empty virtual batch does not know how many the others have."""
    found = np.zeros(size)
    found[: numbers.size] = numbers
    return found
