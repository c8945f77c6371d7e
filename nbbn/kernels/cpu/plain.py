"""What traced functions are made of (lanes.py), on NumPy's arrays: llvm/ says what each of these does."""

import numpy as np

from nbbn.kernels.cpu.llvm import BLOCK, HALF, LANES

minimum, choose, is_any = min, np.where, np.any


def drop(condition, x):
    return np.where(condition, np.zeros_like(x), x)


def splat(number):
    return None if number is None else np.asarray(number)


def wide(vector):
    return None if vector is None else vector.astype(np.float64)


def first(vector, n):
    return vector if n is None else np.where(np.arange(LANES) < n, vector, 0.0)


def load(array, i, n=None):
    if array is None or array.ndim == 0:
        return array
    found = np.zeros(LANES, np.float32 if array.itemsize == 2 else array.dtype)
    n = LANES if n is None else n
    found[:n] = array[i : i + n]
    return found


def store(array, i, vector, n=None):
    if array is not None:
        n = LANES if n is None else n
        array[i : i + n] = np.broadcast_to(vector, LANES)[:n]


def number(array, *index):
    return np.asarray(array[index])


def whole(array, i):
    return int(array[i])


def load_half(array, i):
    return array[i : i + HALF]


def add_halves(array, i, vector, is_first):
    vector = np.broadcast_to(vector, LANES)
    array[i : i + HALF] = (0.0 if is_first else array[i : i + HALF]) + (vector[:HALF] + vector[HALF:])


def write_total(array, index, vector):
    vector = vector if vector.ndim else np.broadcast_to(vector, LANES)
    while vector.size > 1:
        vector = vector[: vector.size // 2] + vector[vector.size // 2 :]
    array[index] = vector[0]


def part(array, place, begin, end):
    if isinstance(array, (tuple, list)):
        return [part(a, place, begin, end) for a in array]
    if array is None:
        return None
    if end <= array.shape[-1]:
        return array[(*place, slice(begin, end))]
    start = place[-1] * array.shape[-1]
    return array[tuple(place[:-1])].reshape(-1)[start + begin : start + end]


def either(condition, a, b):
    return a if condition else b


def local(like, beside):
    return None if beside is None else np.empty(BLOCK + LANES, like.dtype)


def fence():
    pass


def over(begin, end, body, sums=()):
    for i in range(begin, end, LANES):
        sums = body(i, None if i + LANES <= end else end - i, sums)
    return sums


def over_columns(begin, end, body, sums=()):
    for i in range(begin, end, LANES):
        sums = body(lambda offset=0, i=i: slice(i + offset, min(i + LANES, end) + offset), sums)
    return sums


def each(begin, end, step, body, sums=()):
    for i in range(begin, end, step):
        sums = body(i, sums)
    return sums


def when(condition, body, otherwise=None):
    if condition:
        body()
    elif otherwise is not None:
        otherwise()


def again(body):
    while body():
        pass


def to_border(array, asked=None):
    return 0


def write_run(targets, results, streamed, coefficients):
    def write(i, n, _):
        for target, vector in zip(targets, results(i, n), strict=True):
            store(target, i, vector, n)

    over(0, next(t.size for t in targets if t is not None), write)
