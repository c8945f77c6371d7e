"""Count, mean and variance of data that come in parts."""

import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from nbbn.arrays import place_of
from nbbn.call.operands import as_input, as_weights
from nbbn.core import dtypes
from nbbn.core.layout import Sizes
from nbbn.core.options import Options, check_number
from nbbn.engine.cpu.moments import merge_moments
from nbbn.engine.dispatcher import Dispatcher
from nbbn.kernels.channel import BATCH_MEAN, COUNT, M2, MOMENT_ROWS, SQUARES
from nbbn.state.shapes import derive_shapes

# Bytes, all little-endian: the header (what it is, version, how many axes and dimensions), these axes and dimensions as
# int64, the moments as float64, and a CRC-32 of all before.
_HEADER, _CHECKSUM = struct.Struct("<8s3H"), struct.Struct("<I")
_MAGIC, _VERSION = b"nbbnMOM\0", 1


class Moments:
    """Count, mean and variance of data that come in parts, at different times and in different processes.

        moments = nbbn.Moments()
        for part in parts:
            moments.update(part)
        moments.mean, moments.variance()

    Parts are merged as (count, mean, m2) in float64, so no digits are lost where means are large, and however the data
    are divided, the result is that of all of them: to 1e-12 relative, or 1e-16 times the number of deviations that the
    mean is away from 0, whichever is more. The same parts in the same order give the same bits, by update() and by
    merge(). NaN and infinity spoil the statistics of their own channel only.

    Objects can be pickled, copied and compared. One that has seen nothing has a count of 0, and NaN for all else; it
    changes nothing that it is merged with, so it is the initial value of a reduction. One object is for one thread at a
    time: threads have one each, and merge them.

    Args:
        axis: int, or list, tuple, range or array of ints: the feature axes, which have statistics of their own; all
            others are reduced. Data without such an axis get one: x.reshape(-1, 1).
    Raises: TypeError, ValueError for what is no axis.
    """

    def __init__(self, axis: int | Sequence[int] | np.ndarray = -1) -> None:
        self._dispatcher = Dispatcher(Options(axis=axis))  # type: ignore[arg-type]  # it takes any sequence
        self._shape: Sizes = ()  # no statistics have it: nothing is known yet
        self._moments = np.zeros((MOMENT_ROWS, 1))  # as of Engine; replaced, never changed

    @property
    def axis(self) -> int | tuple[int, ...]:
        axis = self._dispatcher.options.resolved_axis()
        return axis[0] if len(axis) == 1 else axis

    @property
    def shape(self) -> tuple[int, ...]:
        """That of every result: (C,) for one axis, else the data's rank with 1 in every reduced dimension; () before
        the first update."""
        return self._shape

    # -- what goes in --------------------------------------------------------------------------------------------------

    def update(self, x: Any, weights: Any = None) -> Self:
        """Add data. Returns: this object.

        Args:
            x: array of float16, bfloat16, float32, float64, integers or bools, on the host or on a GPU, where it is
                reduced where it lies, or lists of numbers. A memory-mapped file is read as it lies.
            weights: bool (True counts) or real weights >= 0, aligned as a layer's mask: with fewer dimensions than `x`
                they are of its leading ones that are no feature axes, else they broadcast against it. What has no
                weight may be NaN. Rounded to float32 if `x` is not float64.
        Raises: TypeError, ValueError if that is something else, or if the data have statistics of another shape than
            those before. The object is then as it was.
        """
        values = as_input(x, "x", floats=False)
        if values.dtype.name not in dtypes.NAMES:  # float32 holds all integers of 16 bits
            values = place_of(values).astype(values, np.dtype(np.float32 if values.itemsize <= 2 else np.float64))
        known = derive_shapes(self._dispatcher.options, values.shape, values.dtype)
        if weights is not None:
            weights = as_weights(weights, values, tuple(known.features), known.dtype, "weights")
        moments = self._dispatcher.reduce(values, weights)
        self._add("x", known.params, place_of(moments).to_host(moments))
        return self

    def merge(self, other: "Moments") -> Self:
        """Those of the data of both, as a new object; `a + b` is the same.

        Raises: TypeError for something else; ValueError for another axis or shape.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"other must be nbbn.Moments; received {other!r}")
        if other.axis != self.axis:
            raise ValueError(f"other must have axis={self.axis}, as what it is merged with; received {other.axis}")
        merged = type(self)(self.axis)
        merged._shape, merged._moments = self._shape, self._moments
        if other._shape:
            merged._add("other", other._shape, other._moments)
        return merged

    def __add__(self, other: Any) -> Self:
        return self.merge(other) if isinstance(other, Moments) else NotImplemented

    def _add(self, argument: str, shape: Sizes, moments: np.ndarray) -> None:
        if self._shape:
            if shape != self._shape:
                raise ValueError(f"{argument} must have statistics of shape {self._shape}, as before; received {shape}")
            moments = merge_moments(np.stack([self._moments, moments]))
        self._shape, self._moments = shape, moments

    # -- what comes out ------------------------------------------------------------------------------------------------

    @property
    def count(self) -> np.ndarray:
        """How many values each statistic is of, float64; with weights their sum."""
        return self._row(self._moments[COUNT])

    @property
    def mean(self) -> np.ndarray:
        """float64; NaN without any value."""
        return self._row(np.where(self._moments[COUNT] == 0, np.nan, self._moments[BATCH_MEAN]))

    def variance(self, ddof: float = 0) -> np.ndarray:
        """float64: the sum of the squared deviations, divided by count - ddof; NaN without any value.

        Args:
            ddof: 0 is the biased variance, which normalizes in a batch; 1 has Bessel's correction. With weights of sum
                W the divisor is W - ddof * sum(w^2) / W, which is the same for equal ones, whatever their scale is.
        Raises: TypeError, ValueError unless ddof is a finite number of at least 0. Where no more than ddof values count
            the result is NaN, or infinity, as NumPy's.
        """
        check_number("ddof", ddof, math.inf, "a finite number of at least 0")
        count, m2, squares = self._moments[[COUNT, M2, SQUARES]]
        with np.errstate(divide="ignore", invalid="ignore"):
            divisor = count - ddof * (squares / count) if ddof else count
            # Where next to all weight is one value's, the difference is what rounding has left of it.
            return self._row(m2 / np.where(divisor <= 1e-12 * count, 0, divisor))

    def std(self, ddof: float = 0) -> np.ndarray:
        """The square root of variance(ddof)."""
        found: np.ndarray = np.sqrt(self.variance(ddof))
        return found

    def _row(self, values: np.ndarray) -> np.ndarray:
        return values.reshape(self._shape).copy()

    def __eq__(self, other: Any) -> bool:
        """Whether axis, shape and all numbers are the same; NaN is the same as NaN."""
        if not isinstance(other, Moments):
            return NotImplemented
        same = self.axis == other.axis and self._shape == other._shape
        return same and np.array_equal(self._moments, other._moments, equal_nan=True)

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        count = self._moments[COUNT]
        if not count.any():
            return f"<Moments axis={self.axis}: empty>"
        counts = " to ".join(f"{n:.15g}" for n in np.unique([count.min(), count.max()]))
        return f"<Moments axis={self.axis}: shape {self._shape}, count {counts}>"

    # -- on the way ----------------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """All that is known, for from_bytes(): 32 bytes for each statistic and some more, the same on every machine."""
        axis, shape = self._dispatcher.options.resolved_axis(), self._shape
        sizes = np.array([*axis, *shape], "<i8").tobytes()
        body = _HEADER.pack(_MAGIC, _VERSION, len(axis), len(shape)) + sizes + self._moments.astype("<f8").tobytes()
        return body + _CHECKSUM.pack(zlib.crc32(body))

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """The object whose to_bytes() these are. Nothing in them is run.

        Raises: TypeError for what is no bytes; ValueError for other bytes, another version, or damaged ones.
        """
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data must be bytes, as of to_bytes(); received {type(data).__name__}")
        data = bytes(data)
        if len(data) < _HEADER.size + _CHECKSUM.size or not data.startswith(_MAGIC):
            received = f"{len(data)} bytes, which begin with {data[:8]!r}"
            raise ValueError(f"data must be of Moments.to_bytes(); received {received}")
        _, version, axes, dimensions = _HEADER.unpack_from(data)
        if version != _VERSION:
            raise ValueError(f"data must be of version {_VERSION} of Moments.to_bytes(); received version {version}")
        body, checksum = data[: -_CHECKSUM.size], _CHECKSUM.unpack_from(data, len(data) - _CHECKSUM.size)[0]
        if zlib.crc32(body) != checksum:
            raise ValueError(f"data are damaged or incomplete: of {len(data)} bytes the checksum is another one")
        sizes = np.frombuffer(body, "<i8", axes + dimensions, _HEADER.size).tolist()
        moments = np.frombuffer(body, "<f8", offset=_HEADER.size + 8 * len(sizes))
        found = cls(sizes[:axes])
        found._shape = tuple(sizes[axes:])
        found._moments = moments.astype(np.float64).reshape(MOMENT_ROWS, math.prod(found._shape))
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.to_bytes())


def _restored(kind: type[Moments], data: bytes) -> Moments:
    """What pickle calls. A class method would be taken along by its text where cloudpickle is used, as dask, Ray and
    Spark do."""
    return kind.from_bytes(data)
