"""Memory is lent again when nothing refers to it any more, never before, and no more of it waits than allowed."""

import gc
import os
import pickle
import sys
import textwrap
import threading
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from nbbn import buffers
from tests.helpers.concurrency import in_threads
from tests.helpers.processes import check, run

SIZE = buffers.SMALLEST
SHAPE = (SIZE // 4 // 256, 256)  # of float32: exactly SIZE bytes


@pytest.fixture
def pool(monkeypatch):
    """A pool of the test's own, in place of the process's."""
    found = buffers.BlockPool(16 * SIZE)
    cached = lru_cache(maxsize=1)(lambda: found)
    cached()
    monkeypatch.setattr(buffers, "block_pool", cached)
    return found


def address(array):
    return array.ctypes.data


# --- when memory is used again ----------------------------------------------------------------------------------------

HOLDERS = {
    "the array": lambda y: y,
    "a slice": lambda y: y[3:5],
    "the transpose": lambda y: y.T,
    "an empty view": lambda y: y[:0],
    "another dtype": lambda y: y.view(np.int32),
    "a subclass": lambda y: y.view(np.recarray),
    "memoryview": memoryview,
    "frombuffer": np.frombuffer,
    "DLPack": np.from_dlpack,
    "an iterator": iter,
    "base": lambda y: y.base,
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_is_used_again_after_the_last_reference(pool, holder):
    y = buffers.empty(SHAPE, np.float32)
    first = address(y)
    held = HOLDERS[holder](y)
    del y
    assert pool.idle() == 0
    assert address(buffers.empty(SHAPE, np.float32)) != first
    pool.clear()
    del held
    assert pool.idle() == SIZE
    assert address(buffers.empty(SHAPE, np.float32)) == first


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_tensors_hold_the_memory():
    code = """
        import numpy as np, torch
        from nbbn import buffers
        for to_tensor in (torch.from_numpy, torch.from_dlpack, torch.as_tensor):
            y = buffers.empty((1024, 1024), np.float32)
            size = y.nbytes
            row = to_tensor(y)[3]
            del y
            assert buffers.block_pool().idle() == 0, to_tensor
            del row
            assert buffers.block_pool().idle() == size, to_tensor
            buffers.clear()
    """
    check(textwrap.dedent(code))


def test_a_slice_in_another_thread_holds_the_memory(pool):
    y = buffers.empty(SHAPE, np.float32)
    may_end = threading.Event()
    thread = threading.Thread(target=lambda row: may_end.wait(30), args=(y[0],))
    thread.start()
    del y
    assert pool.idle() == 0
    may_end.set()
    thread.join()
    del thread
    assert pool.idle() == SIZE


def test_a_cycle_of_garbage_holds_the_memory_until_its_finalizers_have_run(pool):
    """They may read the array; the garbage collector runs all of a cycle's finalizers, in no order, before it ends."""
    seen = []

    class Cycle:
        def __init__(self, y):
            self.me, self.all = self, (y, y.base, y.base.base)

        def __del__(self):
            seen.append(pool.idle())

    Cycle(buffers.empty(SHAPE, np.float32))
    gc.collect()
    assert seen == [0]
    assert pool.idle() == SIZE


# --- which memory -----------------------------------------------------------------------------------------------------


def lend_and_return(pool, sizes):
    """The addresses of blocks of these sizes, all lent at once and then returned in this order."""
    lent = [pool.lend(size) for size in sizes]
    addresses = [address(a) for a in lent]
    while lent:
        del lent[0]
    return addresses


def test_the_smallest_block_that_fits_is_taken():
    pool, unit = buffers.BlockPool(16 * SIZE), SIZE // 16
    a18, a16, a17 = lend_and_return(pool, [18 * unit, 16 * unit, 17 * unit])
    assert [address(a) for a in [pool.lend(16 * unit) for _ in range(3)]] == [a16, a17, a18]


def test_no_more_than_an_eighth_is_wasted():
    pool = buffers.BlockPool(16 * SIZE)
    (nine,) = lend_and_return(pool, [9 * SIZE // 8])
    too_small = pool.lend(SIZE - 1)
    assert address(too_small) != nine
    assert address(pool.lend(SIZE)) == nine


def test_a_block_that_is_too_small_is_not_taken():
    pool = buffers.BlockPool(16 * SIZE)
    lend_and_return(pool, [SIZE])
    assert pool.lend(SIZE + 1).nbytes > SIZE
    assert pool.idle() == 2 * SIZE + 1


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("extra", [0, 1, 63])
def test_memory_is_aligned_to_cache_lines(pool, dtype, extra):
    for _ in range(2):  # new, and used again
        y = buffers.empty((SIZE + extra,), dtype)
        assert address(y) % 64 == 0
        del y


# --- how much waits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "kept"), [(3 * SIZE, 3), (3 * SIZE - 1, 2)])
def test_the_oldest_blocks_go_first(limit, kept):
    pool = buffers.BlockPool(limit)
    addresses = lend_and_return(pool, [SIZE] * 5)
    assert pool.idle() == kept * SIZE
    assert [address(a) for a in [pool.lend(SIZE) for _ in range(kept)]] == addresses[-kept:]


def test_one_large_block_replaces_several_small_ones():
    pool = buffers.BlockPool(3 * SIZE)
    lend_and_return(pool, [SIZE, SIZE, SIZE, 2 * SIZE])
    assert pool.idle() == 3 * SIZE
    large = pool.lend(2 * SIZE)
    assert pool.idle() == 3 * SIZE - large.nbytes == SIZE


def test_a_block_over_the_limit_is_freed_and_displaces_nothing():
    pool = buffers.BlockPool(3 * SIZE)
    lend_and_return(pool, [SIZE, 4 * SIZE])
    assert pool.idle() == SIZE


def test_clear_frees_what_waits_and_nothing_else(pool):
    y = buffers.empty(SHAPE, np.float32)
    y.fill(7)
    lend_and_return(pool, [SIZE])
    buffers.clear()
    assert pool.idle() == 0
    assert (y == 7).all()
    del y
    assert pool.idle() == SIZE


def test_where_memory_is_scarce_the_waiting_blocks_are_freed(pool, monkeypatch):
    lend_and_return(pool, [SIZE])
    allocate = np.empty

    def scarce(*arguments):
        if pool.idle():
            raise MemoryError
        return allocate(*arguments)

    monkeypatch.setattr(np, "empty", scarce)
    assert buffers.empty((SIZE,), np.float32).nbytes == 4 * SIZE
    assert pool.idle() == 4 * SIZE


# --- what users see ---------------------------------------------------------------------------------------------------


def test_below_the_smallest_size_arrays_own_their_memory(pool):
    x = np.zeros(SIZE - 1, np.uint8)
    assert buffers.empty(x.shape, x.dtype).flags.owndata
    assert buffers.empty_like(x).flags.owndata
    assert not buffers.empty_like(np.zeros(SIZE, np.uint8)).flags.owndata


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_an_array_in_recycled_memory_is_ordinary(pool, dtype):
    shape = (3, SIZE // 4)
    y = buffers.empty(shape, dtype)
    assert (type(y), y.shape, y.dtype) == (np.ndarray, shape, dtype)
    assert y.flags.c_contiguous
    assert y.flags.writeable
    y[...] = 3
    copies = [y.copy(), pickle.loads(pickle.dumps(y))]
    del y
    assert pool.idle() > 0  # no copy refers to it
    buffers.empty(shape, dtype)[...] = 5
    assert all((c == 3).all() and c.dtype == dtype for c in copies)


strided = st.lists(
    st.tuples(st.integers(1, 4), st.sampled_from([-48, -12, -8, -4, 0, 4, 8, 12, 48])), min_size=1, max_size=5
)


@given(strided)
@example([(3, 16), (1, 48), (4, 4)])  # C- and Fortran-contiguous, with a stride that says otherwise and is never used
@example([(3, 4), (1, 48), (4, 12)])
def test_empty_like_has_the_strides_of_numpy(dimensions):
    """In any order, contiguous or not, with equal, zero and negative strides."""
    shape, strides = zip(*dimensions, strict=True)
    middle = np.zeros(512, np.float32)[256:]
    x = as_strided(middle, shape, strides)
    expected = np.empty_like(x, subok=False)
    with mock.patch.object(buffers, "SMALLEST", 1):
        y = buffers.empty_like(x)
    assert not y.flags.owndata
    assert (y.shape, y.dtype, y.strides) == (expected.shape, expected.dtype, expected.strides)


@pytest.mark.parametrize("shape", [(3, 4), SHAPE])
def test_empty_like_of_a_subclass_is_an_array(pool, shape):
    assert type(buffers.empty_like(np.zeros(shape, np.float32).view(np.recarray))) is np.ndarray


# --- the limit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "limit"), [(None, 256 << 20), ("0", 0), ("", 0), ("1048576", 1 << 20), ("007", 7)])
def test_the_limit_comes_from_the_environment(monkeypatch, asked, limit):
    monkeypatch.delenv("NBBN_RECYCLE_BYTES", raising=False)
    if asked is not None:
        monkeypatch.setenv("NBBN_RECYCLE_BYTES", asked)
    assert buffers.block_pool.__wrapped__().limit == limit


@pytest.mark.parametrize("asked", ["-1", "1e6", "256 MiB", "1.5", "\N{SUPERSCRIPT TWO}", "\N{ARABIC-INDIC DIGIT ONE}"])
def test_a_limit_that_is_no_number_of_bytes_is_refused(monkeypatch, asked):
    monkeypatch.setenv("NBBN_RECYCLE_BYTES", asked)
    with pytest.raises(ValueError, match=f"NBBN_RECYCLE_BYTES must be a whole number.*'{asked}'"):
        buffers.block_pool.__wrapped__()


@pytest.mark.parametrize("asked", [None, "0", ""])
def test_recycling_can_be_switched_off(asked):
    code = "from nbbn import buffers; print(buffers.empty((1 << 22,), 'f4').flags.owndata)"
    assert check(code, NBBN_RECYCLE_BYTES=asked).strip() == str(asked is not None)


def test_a_bad_limit_is_no_matter_before_a_large_array_is_needed():
    code = """
        import numpy as np
        from nbbn import buffers
        buffers.empty((3,), np.float32)
        buffers.clear()
        try:
            buffers.empty((1 << 22,), np.float32)
        except ValueError as error:
            print(error)
    """
    assert "received 'much'" in check(textwrap.dedent(code), NBBN_RECYCLE_BYTES="much")


# --- threads, interruptions, forks, the end ---------------------------------------------------------------------------


def test_threads_never_share_memory_and_keep_the_limit():
    pool = buffers.BlockPool(6 * SIZE)

    def work(number):
        rng = np.random.default_rng(number)
        held = []
        for step in range(300):
            block = pool.lend(SIZE + int(rng.integers(SIZE // 4)))
            stamps = block[: 64 * 8].view(np.int64)
            stamps[...] = number * 1000 + step
            held.append((stamps, number * 1000 + step))
            del block, stamps
            if len(held) > rng.integers(4):
                stamps, expected = held.pop(0)
                assert (stamps == expected).all()

    in_threads([lambda n=n: work(n) for n in range(6)])
    assert 0 < pool.idle() <= 6 * SIZE


@contextmanager
def at_line(number, action):
    """Do `action` before the line with this number among those that run in the module; yields a list of them."""
    lines = []

    def trace(frame, event, argument):
        if frame.f_code.co_filename != buffers.__file__:
            return None
        if event == "line":
            lines.append(frame.f_lineno)
            if len(lines) == number:
                action()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


def test_memory_may_come_and_go_between_any_two_lines():
    """As it does when a signal's handler or a finalizer interrupts the pool's functions, or another thread runs."""
    number, ran = 0, [0]
    while number < len(ran) or number == 0:
        number += 1
        pool = buffers.BlockPool(2 * SIZE)
        lend_and_return(pool, [SIZE] * 2)
        others = [pool.lend(SIZE)]

        def interrupt(pool=pool, others=others):
            others.append(pool.lend(SIZE))
            others.append(pool.lend(SIZE))
            del others[0]

        with at_line(number, interrupt) as ran:
            y = pool.lend(SIZE)
            others.append(pool.lend(SIZE))
            del others[0]
        live = [address(a) for a in (y, *others)]
        assert len(set(live)) == len(live), f"two live arrays share memory after an interruption at {ran[number - 1 :]}"
        assert pool.idle() <= pool.limit
    assert number > 20


def test_an_exception_between_any_two_lines_leaves_a_pool_that_works():
    """KeyboardInterrupt, which a signal's handler may raise anywhere."""

    def interrupt():
        raise KeyboardInterrupt

    number, interrupted = 0, True
    while interrupted:
        number += 1
        pool = buffers.BlockPool(2 * SIZE)
        lend_and_return(pool, [SIZE] * 2)
        interrupted = False
        try:
            with at_line(number, interrupt):
                y = pool.lend(SIZE)
        except KeyboardInterrupt:
            interrupted = True
            y = pool.lend(SIZE)
        z = pool.lend(SIZE)
        assert address(y) != address(z)
        del y, z
        assert pool.idle() == 2 * SIZE
    assert number > 5


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@needs_fork
def test_a_forked_child_has_the_arrays_and_none_of_the_waiting_memory():
    code = """
        import os
        import numpy as np
        from nbbn import buffers
        pool = buffers.block_pool()
        y, z = (buffers.empty((1 << 20,), np.float32) for _ in range(2))
        y.fill(7)
        del z
        waiting = pool.idle()
        pid = os.fork()
        if pid == 0:
            good = pool.idle() == 0 and (y == 7).all()
            y.fill(8)
            del y
            buffers.empty((1 << 20,), np.float32).fill(9)
            os._exit(0 if good and pool.idle() == waiting else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert pool.idle() == waiting > 0 and (y == 7).all()
    """
    check(textwrap.dedent(code))


@needs_fork
def test_forks_while_threads_lend_and_return():
    code = """
        import os, signal, threading
        import numpy as np
        from nbbn import buffers
        stop = False

        def work():
            while not stop:
                y = buffers.empty((1 << 18,), np.float32)
                y[0] = 1

        threads = [threading.Thread(target=work) for _ in range(4)]
        for t in threads:
            t.start()
        for _ in range(100):
            pid = os.fork()
            if pid == 0:
                signal.alarm(20)  # a child that hangs ends with an error
                for _ in range(3):
                    buffers.empty((1 << 18,), np.float32)[0] = 2
                os._exit(0 if 0 < buffers.block_pool().idle() <= buffers.block_pool().limit else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        stop = True
        for t in threads:
            t.join()
    """
    check(textwrap.dedent(code))


def test_the_interpreters_end_is_silent():
    """With arrays in globals, in a cycle, in the waiting pool, and in a daemon thread that goes on."""
    code = """
        import threading
        import numpy as np
        from nbbn import buffers
        y = buffers.empty((1 << 20,), np.float32)
        cycle = [buffers.empty((1 << 20,), np.float32)]
        cycle.append(cycle)
        buffers.empty((1 << 19,), np.float32)

        def work():
            while True:
                buffers.empty((1 << 19,), np.float32)

        threading.Thread(target=work, daemon=True).start()
    """
    for _ in range(3):
        done = run(textwrap.dedent(code))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
