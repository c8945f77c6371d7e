"""What is about the CPU's schedules: streaming, tiles, threads, machine code."""

import math
import platform

import numba
import numpy as np
import pytest
from ml_dtypes import bfloat16

from nbbn.kernels.cpu.floats import HALF_INSTRUCTIONS
from nbbn.kernels.cpu.lanes import BLOCK
from nbbn.kernels.cpu.planes import MOST
from nbbn.runtime import thread_limit
from tests.helpers.processes import check as check_process
from tests.oracle.agreement import check, output
from tests.oracle.contract import (
    EVERY_DTYPE,
    GROUPED,
    PLANES,
    ROWS,
    WAYS,
    Problem,
    Way,
    all_results,
    bits,
    check_strided_output,
    small,
)
from tests.oracle.targets import Cpu


@pytest.fixture
def target():
    return Cpu


SHARES = {"streamed": 0.0, "direct": math.inf, "in place": math.inf}  # of the last-level cache
EVERY_STORE = pytest.mark.parametrize("store", SHARES)


# --- large runs and small ones ---------------------------------------------------------------


@EVERY_STORE
@EVERY_DTYPE
def test_inference_in_the_order_of_memory(target, store, dtype):
    """Planes of any length at any place in a line of memory, with many and with few of them in a task."""
    thresholds = {"write_elements": BLOCK, "streamed_share": SHARES[store]}
    fused = {"residual": True, "activation": "relu"} if dtype == np.float32 else {}
    for k0, r1 in ((1, 1), (1, 5000), (3, 2), (700, 7), (2, BLOCK - 1), (3, BLOCK), (2, BLOCK + 1), (5, 300)):
        problem = Problem((2, k0, r1, 1), dtype, **fused)
        for start in (0, 1, 5):
            out = np.empty(problem.x.size + start, dtype)[start:].reshape(problem.x.shape)
            if store == "in place":
                out[...] = problem.x
                problem.x = out
            run = Way(None, problem.x.shape).make(target, problem.options, **thresholds)
            problem.check_output_of_inference(run, out)
            assert run.kernels() == [("infer", "planes", False, store == "streamed")]


# Of the memory that a task has for sums: of so many planes, of so many columns of short planes and of repeated rows.
BORDERS = {
    "planes": [(2, n, 2, 1) for n in (MOST - 1, MOST, MOST + 1, 2 * MOST + 1)],
    "short planes": [(4, n, 8, 1) for n in (BLOCK // 8 - 1, BLOCK // 8, BLOCK // 8 + 1)] + [(4, 300, 7, 1)],
    "few channels": [(1, 1, 9, n) for n in (BLOCK // 4, BLOCK // 2 - 1, BLOCK // 2, BLOCK // 2 + 1)],
    "rows": [(1, 1, 5, n) for n in (BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1)],
}


@EVERY_STORE
@pytest.mark.parametrize("name", BORDERS)
def test_sizes_about_the_memory_of_a_task(target, name, store):
    thresholds = {"tile_elements": 1 << 16, "tile_columns": 2 * BLOCK}
    thresholds |= {"repeated_columns": BLOCK, "written_columns": BLOCK}
    stores = set()
    for shape in BORDERS[name]:
        problem = Problem(shape, np.float32)
        run = small(target, problem.options, WAYS["cpu"][name].schedule, streamed_share=SHARES[store], **thresholds)
        step = problem.oracle(problem.x, training=True)
        x = problem.x.copy()
        y, _, saved = run.train(x, problem.params, problem.state, out=x if store == "in place" else np.empty_like(x))
        check("y", y, step.y, output(step, problem.dtype), problem.dtype)
        dy = problem.dy.copy()
        out = dy if store == "in place" else np.empty_like(dy)
        dx, dparams, _ = run.backward(dy, problem.x, saved, out=out)
        problem.check_gradients(dx, dparams, problem.dy, step)
        stores |= {streamed for _, _, _, streamed in run.kernels()}
    assert (True in stores) == (store == "streamed")  # of rows those that are whole lines


# --- results that bypass the caches -----------------------------------------------------------

CANARY = 77
LINE = 64


def between_canaries(size, dtype, offset):
    """An array of memory that begins `offset` elements after the start of a line, and all the memory around it."""
    dtype = np.dtype(dtype)
    memory = np.zeros(size * dtype.itemsize + 4 * LINE, np.uint8)
    lines = -memory.ctypes.data % LINE
    around = memory[lines : lines + (len(memory) - lines) // dtype.itemsize * dtype.itemsize].view(dtype)
    around[...] = CANARY
    first = LINE // dtype.itemsize + offset
    return around[first : first + size], around


def offsets(dtype):
    return range(LINE // np.dtype(dtype).itemsize)


# Runs with some whole vectors between their ends, wherever they begin; rows are whole lines, in which coefficients are
# copied or lie as they are; and what is cut into them.
STREAMED = {
    "planes": Way("planes", (2, 2, 101, 1), True),
    "rows": Way("rows", (1, 2, 5, 96), True),
    "long rows": Way("rows", (1, 1, 3, BLOCK + 32), True),
    "short planes": Way("rows", (4, 16, 8, 1), True),
    "few channels": Way("rows", (1, 1, 70, 16), True),
}


@EVERY_DTYPE
@pytest.mark.parametrize("name", STREAMED)
def test_streamed_results_are_the_same_and_have_their_place(target, name, dtype):
    """At every place in a line of memory, and not a byte beside it."""
    way, thresholds = STREAMED[name], {"tile_columns": 2 * BLOCK, "written_columns": 128}
    problem = Problem(way.shape, dtype)
    expected = all_results(way.make(target, problem.options, **thresholds), problem)
    run, size = way.make(target, problem.options, streamed_share=0.0, **thresholds), problem.x.size
    for offset in offsets(dtype):
        (y, y_around), (dx, dx_around) = (between_canaries(size, dtype, offset) for _ in range(2))
        found = all_results(run, problem, y.reshape(way.shape), dx.reshape(way.shape))
        assert found == expected, offset
        for result, around in ((y, y_around), (dx, dx_around)):
            outside = around.size - size
            assert (around == CANARY).sum() == outside + (result == CANARY).sum(), offset
    assert {streamed for _, _, _, streamed in run.kernels()} == {True}


def test_two_results_at_different_places_in_a_line(target):
    """The gradient of the residual begins elsewhere than that of the input: neither is written past the caches."""
    way = STREAMED["planes"]
    problem = Problem(way.shape, np.float32, residual=True, activation="relu")
    expected = all_results(way.make(target, problem.options), problem)
    run = way.make(target, problem.options, streamed_share=0.0)
    for offset in offsets(np.float32):
        dx, around = between_canaries(problem.x.size, np.float32, offset)
        assert all_results(run, problem, gradient_out=dx.reshape(way.shape)) == expected
        assert (around == CANARY).sum() == around.size - dx.size


@pytest.mark.parametrize("way", STREAMED.values(), ids=STREAMED)
def test_all_outputs_of_a_step_are_streamed(target, way):
    """The gradient of the residual beside that of the input; inference; in place."""
    problem = Problem(way.shape, np.float32, residual=True, activation="relu")
    expected = all_results(way.make(target, problem.options), problem)
    plain = way.make(target, problem.options).infer(problem.x, problem.params, problem.state, residual=problem.residual)
    run = way.make(target, problem.options, streamed_share=0.0)
    assert all_results(run, problem) == expected
    for x, residual, out in (in_place(problem, "x"), in_place(problem, "residual")):
        assert bits(run.infer(x, problem.params, problem.state, residual=residual, out=out)) == bits(plain)
    assert {streamed for _, _, _, streamed in run.kernels()} == {True}


@pytest.mark.parametrize("way", [PLANES, ROWS], ids=["planes", "rows"])
@pytest.mark.parametrize("share", [0.0, math.inf], ids=["beyond the cache", "in the cache"])
def test_strided_output_is_never_streamed(target, way, share):
    """A line of memory would have neighbours in it."""
    problem = Problem(way.shape, np.float32)
    expected, _, _ = way.make(target, problem.options).train(problem.x, problem.params, problem.state)
    run = way.make(target, problem.options, streamed_share=share)
    check_strided_output(run, problem, expected)
    assert {streamed for _, _, _, streamed in run.kernels()} == {False}


def in_place(problem, name):
    """x and residual, of which one is the output, too."""
    copies = {"x": problem.x.copy(), "residual": problem.residual.copy()}
    return copies["x"], copies["residual"], copies[name]


# --- the same bits ----------------------------------------------------------------------

MIXED_SHAPES = {
    "planes": [(6, 3, 23, 1), (1, 2, 100, 1), (40, 1, 3, 1), (1, 1, 1, 1), (3, 9, 16, 1)],
    "rows": [(6, 3, 7, 5), (1, 1, 100, 17), (40, 1, 1, 3), (2, 2, 29, 49), (1, 1, 2, 33)],
    "short planes": [(6, 3, 7, 1), (40, 5, 3, 1), (4, 40, 12, 1)],
    "few channels": [(6, 3, 8, 5), (1, 1, 100, 3), (2, 2, 30, 7)],
}


# One pass, parallel.
TWICE = [(False, False), (False, True)]
ONCE = [(True, False), (True, True)]
# A choice, in which every dtype and all loops are: each is two kernels that take seconds to compile.
SAME_BITS = {
    "planes": ("planes", np.float32, {}, TWICE + ONCE),
    "rows": ("rows", np.float32, {}, TWICE + ONCE),
    "short planes": ("short planes", np.float32, {}, TWICE + ONCE),
    "few channels": ("few channels", np.float32, {}, TWICE + ONCE),
    "rows, float16": ("rows", np.float16, {}, TWICE),
    "rows with residual and relu, bfloat16": ("rows", bfloat16, {"residual": True, "activation": "relu"}, TWICE),
    "planes with operands, float64": ("planes", np.float64, {"weights": True, "adjustment": True}, ONCE),
}


@pytest.mark.parametrize(("name", "dtype", "operands", "modes"), SAME_BITS.values(), ids=SAME_BITS)
def test_serial_and_parallel_one_pass_and_two_give_the_same_bits(target, name, dtype, operands, modes):
    for shape in MIXED_SHAPES[name]:
        problem = Problem(shape, dtype, **operands)
        schedule = WAYS["cpu"][name].schedule
        runs = [small(target, problem.options, schedule, parallel, one_pass) for one_pass, parallel in modes]
        first, *others = (all_results(run, problem) for run in runs)
        assert all(other == first for other in others), shape


@pytest.mark.parametrize("name", GROUPED["cpu"])
@pytest.mark.parametrize("size", [2, 3, 6])
def test_virtual_batches_have_the_same_bits_in_one_pass_and_two(target, name, size):
    way = GROUPED["cpu"][name]
    problem = Problem(way.shape, np.float32, virtual_batch_size=size)
    one, two = way.make(target, problem.options), way.twice().make(target, problem.options)
    assert all_results(one, problem) == all_results(two, problem)
    if size == 6:
        possible = "across groups" not in name
        assert one.kernels() == [(step, way.schedule, possible, False) for step in ("train", "backward")]


# What differs from run to run, and what stands beside the input: with weights no rows are longer than they are.
EVERYTHING = {"weights": True, "adjustment": True, "residual": True, "activation": "relu"}
TILES = {
    "planes": ("planes", [{"tile_elements": n} for n in (1, 300, 1 << 16)], {}),
    "planes with weights": ("planes", [{"tile_elements": n} for n in (1, 300, 1 << 16)], {"weights": True}),
    "rows": ("rows", [{"tile_columns": n} for n in (16, 19, 32, 1 << 12)], {}),
    "rows with weights": ("rows", [{"tile_columns": n} for n in (16, 19, 32, 1 << 12)], {"weights": True}),
    "rows with everything": ("rows", [{"tile_columns": n} for n in (16, 19, 1 << 12)], EVERYTHING),
    "short planes": ("short planes", [{"tile_columns": n} for n in (12, 16, 1 << 12)], {}),
    "short blocks": ("short blocks", [{"tile_columns": n} for n in (12, 24, 1 << 12)], {}),
    "few channels": ("few channels", [{"tile_elements": n} for n in (1, 500, 1 << 16)], {}),
}


@pytest.mark.parametrize(("name", "choices", "operands"), TILES.values(), ids=TILES)
def test_which_tile_a_statistic_is_in_changes_no_bit(target, name, choices, operands):
    """In as many chunks, which depend on the rows alone here."""
    way, chunks = WAYS["cpu"][name], {"chunk_elements": 1, "chunk_rows": 2, "max_tasks": 1 << 10}
    problem, found, tiles, numbers = Problem(way.shape, np.float32, **operands), set(), set(), set()
    for thresholds in choices:
        for one_pass in (True, False):
            run = way._replace(one_pass=one_pass).make(target, problem.options, **chunks, **thresholds)
            found.add(tuple(all_results(run, problem)))
            grids = [plan.schedule.grid for plan in run.engine.plans.values()]
            tiles |= {grid.tiles for grid in grids}
            numbers |= {grid.chunks for grid in grids}
    assert len(found) == 1
    assert len(tiles) == len(choices), "some have the same tiles"
    assert min(numbers) > 1
    assert len(numbers) == 1, "sums are made in other chunks"


@pytest.mark.parametrize("name", ["planes", "rows"])
def test_every_number_of_threads_gives_the_same_bits(target, name):
    if thread_limit() < 2:
        pytest.skip("this machine, or NBBN_NUM_THREADS, allows one thread only")
    previous = numba.get_num_threads()
    try:
        for shape in MIXED_SHAPES[name]:
            problem = Problem(shape, np.float32)
            found = set()
            for threads in range(1, thread_limit() + 1):
                numba.set_num_threads(threads)
                found.add(tuple(all_results(small(target, problem.options, name, parallel=True), problem)))
            assert len(found) == 1, shape
    finally:
        numba.set_num_threads(previous)


FINGERPRINT = """
import numpy as np, nbbn
x = np.random.default_rng(0).normal(3, 1, size=(64, 3, 40, 40)).astype(np.float32)
digest = ""
for axis, shape in ((1, x.shape), (-1, (64, 40, 40, 3))):
    layer = nbbn.BatchNormalization(axis=axis, momentum=0.5)
    y, pullback = layer.vjp(x.reshape(shape), training=True)
    digest += f"{hash(tuple(a.tobytes() for a in (y, *pullback(y)[:3], *layer.weights)))} "
print(digest)
"""


def test_nbbn_num_threads_changes_no_bit():
    """Large enough for several chunks of the usual size, of planes and of few channels; four threads on any machine."""
    options = {"NUMBA_NUM_THREADS": "4", "PYTHONHASHSEED": "0"}
    found = {check_process(FINGERPRINT, NBBN_NUM_THREADS=n, timeout=120, **options) for n in ("1", "2", "4")}
    assert len(found) == 1


PLAIN_ROWS = {"short_plane": 0, "repeated_columns": 0, "written_columns": 0}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(6, 3, 7, 1), (1, 1, 100, 1), (40, 1, 3, 1), (6, 3, 8, 5), (9, 40, 3, 1)], ids=str)
def test_schedules_agree(target, shape, residual):
    """Other sums, in another order: float64 rounding in the statistics, half a unit in y."""
    problem = Problem(shape, np.float32, residual=residual, activation="relu" if residual else None)
    found, shapes = [], set()
    for name, thresholds in [("planes", {}), ("rows", PLAIN_ROWS), ("rows", {})]:
        if name == "planes" and shape[3] > 1:
            continue
        run = small(target, problem.options, name, **thresholds)
        found.append(run.train(problem.x, problem.params, problem.state, **problem.operands))
        shapes |= {(plan.schedule.shape, plan.schedule.grid.repeats) for plan in run.engine.plans.values()}
    assert len(shapes) == len(found), "two of them are the same"
    first, *others = found
    for other in others:
        np.testing.assert_allclose(first[0], other[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(first[2], other[2], rtol=1e-14, atol=1e-14)


# --- 16-bit floats -------------------------------------------------------------------------

WITHOUT_F16C = """
from tests.oracle.conversions import DTYPES, check_every_value, check_rounding
from nbbn.kernels.cpu import floats
from tests.oracle.targets import CpuConversion
assert not floats.HALF_INSTRUCTIONS
for dtype in DTYPES.values():
    check_every_value(CpuConversion(dtype))
    check_rounding(CpuConversion(dtype))
import numpy as np, nbbn
x = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float16)
print(nbbn.BatchNormalization()(x, training=True).tobytes().hex())
"""


@pytest.mark.skipif(not HALF_INSTRUCTIONS, reason="this processor has no F16C: the tests above are this one")
def test_without_f16c():
    """A processor without the half instructions: integer code, where LLVM's would call what is not there."""
    printed = check_process(WITHOUT_F16C, NUMBA_CPU_NAME="generic")
    x = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float16)
    y = np.frombuffer(bytes.fromhex(printed), np.float16).reshape(x.shape)
    exact = (x - x.mean(0, np.float64)) / np.sqrt(x.var(0, np.float64) + 1e-3)
    np.testing.assert_allclose(y, exact, rtol=2**-11, atol=2**-14)  # half a unit


# --- machine code ------------------------------------------------------------------------------

PACKED = """
import re
import numpy as np
from nbbn.runtime import cache
from tests.oracle.targets import Cpu
cache._forget_modules = lambda kernel: None
for schedule, shape in (("planes", (4, 3, 64, 1)), ("rows", (1, 1, 64, 70))):
    run = Cpu({"axis": (1, 3)}, schedule, parallel=False)
    x, state = np.ones(shape, np.float32), np.ones((2, shape[1] * shape[3]), np.float32)
    run.backward(x, x, run.train(x, state, state)[2])
    run.infer(x, state, state)
    for plan in run.engine.plans.values():
        (text,) = plan.kernel().inspect_asm().values()
        found = set(re.findall(r"\\bv(mul|add|sub|fmadd)\\d*(p[sd])\\b.*%[yz]mm", text))
        zeroed = "zeroed" if "memset" in text else "raw"
        fenced = "fenced" if "vmovnt" in text and re.search(r"\\bmfence|\\block\\s+or", text) else "torn"
        print(schedule, plan.step, fenced, zeroed, *sorted({f"{name}{kind}" for name, kind in found}))
"""


def _has_avx2():
    from llvmlite import binding

    return platform.machine().lower() in ("x86_64", "amd64") and binding.get_host_cpu_features().get("avx2", False)


@pytest.mark.skipif(not _has_avx2(), reason="the names of packed instructions are those of AVX2")
def test_loops_are_vectorized():
    """Arithmetic on elements is packed float32, and sums are packed float64. What is streamed is fenced, and places on
    the stack, of which a task has up to 50 KB, are not filled with zeros."""
    lines = check_process(PACKED, NBBN_CACHE_DIR="", timeout=120).splitlines()
    assert len(lines) == 6
    for line in lines:
        _, step, fenced, zeroed, *found = line.split()
        assert (fenced, zeroed) == ("fenced", "raw"), line
        assert {"mulps", "subps", "addps"} <= set(found), line
        assert step == "infer" or {"fmaddpd", "subpd"} <= set(found), line
