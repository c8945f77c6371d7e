"""The machine code of the CUDA kernels, as far as it can be read without a GPU."""

import os
import re
from importlib.util import find_spec

import numpy as np
import pytest
from ml_dtypes import bfloat16

if find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed (extra: cuda)", allow_module_level=True)
if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("Numba's simulator compiles nothing", allow_module_level=True)

from numba.cuda import types

from nbbn.engine.cuda.schedule import Thresholds
from nbbn.kernels.cuda.blocks import Variant
from nbbn.kernels.cuda.channel import AHEAD, MOMENTS_AHEAD
from nbbn.kernels.cuda.steps import VIEWS
from tests.helpers.ptx import (
    ACCESS,
    WIDE_LOAD,
    WIDE_STORE,
    compiled,
    element_loops,
    innermost,
    loops,
    ptx_of,
    resources,
)
from tests.helpers.sass import machine_code, nvdisasm, waits
from tests.oracle.targets_cuda import conversion

THREADS = Thresholds().threads
FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
DTYPES = [np.dtype(d) for d in (np.float16, bfloat16, np.float32, np.float64)]
APPLYING = ("normalize", "infer", "input_gradient")  # the others reduce, too
ONE_LAUNCH = ("train", "backward")
MOMENTS = ("reduce", "train_reduce", "train")
COUNTING = ("reduce", "train_reduce", "sum_gradient", "backward_reduce")  # whose last block does more
OPERANDS = {"adjustment": True, "residual": True, "relu": True}


def variant(dtype, loops, **options):
    dtype = np.dtype(dtype)
    sums = FLOAT64 if dtype == FLOAT64 else FLOAT32
    given = {"width": 16 // dtype.itemsize, "sums": sums, "rows": loops == "rows", "short": loops == "short"}
    return Variant(dtype, threads=THREADS, **{**given, **options})


# The others are the middle stage by itself, which has no elements.
STEPS = [step for step, views in VIEWS.items() if views]
# Everything for one device; a choice for others, for other options, and for what they are together.
CASES = {
    **{
        f"{step} {dtype.name} {loops}": (step, variant(dtype, loops), (9, 0))
        for step in STEPS
        for dtype in DTYPES
        for loops in ("planes", "rows")
    },
    **{
        f"{step} {np.dtype(dtype).name} {loops} sm_{cc[0]}{cc[1]}": (step, variant(dtype, loops), cc)
        for cc in ((7, 5), (8, 0), (10, 0))
        for step, dtype, loops in (
            ("train_reduce", np.float16, "rows"),
            ("infer", np.float16, "planes"),
            ("input_gradient", bfloat16, "planes"),
        )
    },
    **{
        f"{step} {np.dtype(dtype).name} {loops} {' '.join(options)}": (step, variant(dtype, loops, **options), (9, 0))
        for step, dtype, loops, options in (
            ("reduce", bfloat16, "short", {"weights": True}),
            ("reduce", np.float32, "rows", {"weights": True}),
            ("train_reduce", np.float16, "short", {"weights": True}),
            ("train_reduce", np.float32, "rows", {"weights": True, "renorm": True}),
            ("train_reduce", np.float32, "planes", {"renorm": True, "debias": True, "skip": True}),
            ("normalize", np.float16, "planes", OPERANDS),
            ("normalize", np.float32, "rows", OPERANDS),
            ("infer", bfloat16, "rows", {"residual": True, "relu": True}),
            ("train", np.float32, "planes", {"renorm": True, **OPERANDS}),
            ("sum_gradient", np.float32, "rows", OPERANDS),
            ("sum_gradient", np.float16, "short", {"residual": True, "relu": True}),
            ("backward_reduce", np.float32, "rows", OPERANDS),
            ("input_gradient", np.float32, "planes", {"dz": True, "weights": True, **OPERANDS}),
            ("input_gradient", np.float16, "rows", {"dz": True, "residual": True, "relu": True}),
            ("input_gradient", bfloat16, "short", {"frozen": True}),
            ("train_reduce", np.float16, "rows", {"wide": True}),
            ("input_gradient", np.float32, "planes", {"wide": True}),
        )
    },
}
BELOW_FLOAT64 = {name: case for name, case in CASES.items() if case[1].dtype != FLOAT64}
ADDING = {name: case for name, case in CASES.items() if case[0] in COUNTING}
EVERY_KERNEL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@EVERY_KERNEL
def test_no_local_memory(case):
    """A thread's arrays are registers, and all of them have a place: ptxas spills none."""
    ptx = compiled(*case)
    assert not re.search(r"\.local\b", ptx)
    found = resources(ptx, case[2])
    assert (found.stack, found.local) == (0, 0)


@EVERY_KERNEL
def test_elements_are_read_and_written_16_bytes_at_a_time(case):
    step, _, _ = case
    for loop in (found := innermost(element_loops(compiled(*case)))):
        assert loop.count(ACCESS) == loop.count(WIDE_LOAD) + loop.count(WIDE_STORE)
    written = [loop for loop in found if loop.count(WIDE_STORE)]
    assert len(found) == (2 if step in ONE_LAUNCH else 1)
    assert len(written) == (1 if step in (*APPLYING, *ONE_LAUNCH) else 0)


@EVERY_KERNEL
def test_no_division_of_integers(case):
    """It takes twenty instructions, of 64 bits a hundred, and a task may be no more than 16 elements of each thread."""
    assert not re.search(r"\b(div|rem)\.[su](32|64)", compiled(*case))


@EVERY_KERNEL
def test_a_multiprocessor_has_registers_for_two_blocks(case):
    """One alone would leave it idle whenever its threads wait for each other. With an adjustment the sums of a
    gradient alone are 64 registers in rows, the coefficients 20, and what is read ahead 40: there it is one."""
    step, v, cc = case
    blocks = 1 if v.adjustment and v.rows and step in ("sum_gradient", "backward_reduce") else 2
    assert resources(compiled(*case), cc).registers * THREADS * blocks <= 1 << 16


# --- what a GPU gets ----------------------------------------------------------------------------------------------

LISTED = pytest.mark.skipif(nvdisasm() is None, reason="nvdisasm is not installed (extra: machine-code)")
ONE_ELEMENT = {2: "LDG.E.U16", 4: "LDG.E", 8: "LDG.E.64"}  # a load of it, by its size
# What finds a thread's place and its coefficients: in 16-bit rows of eight statistics, and with a gate more of each.
BEFORE_THE_FIRST_LOAD, WITH_OPERANDS = 340, 480


def inputs_of(step, v):
    """Arrays that are read for each element."""
    plain = 1 if step in ("normalize", "infer", *MOMENTS) else 2
    if v.frozen:
        plain -= 1
    return plain + v.weights + (0 if step in MOMENTS[:2] else v.residual + 2 * v.adjustment)


@LISTED
@EVERY_KERNEL
def test_a_thread_waits_for_all_its_loads_at_once(case):
    """A load takes some hundreds of clock cycles, in which others can be made; a conversion waits for its load.

    Of one kernel the assembler leaves the last of four accesses for later: 96 bytes of each thread are on their way.
    """
    step, v, cc = case
    code = machine_code(compiled(*case), cc)
    unroll = v.unroll if step in MOMENTS[:2] else v.unroll_beside
    if step == "backward_reduce" and v.dtype == FLOAT64 and not v.rows:
        unroll -= 1
    assert code.on_their_way("LDG.E.128") >= unroll * inputs_of(step, v)


@LISTED
@EVERY_KERNEL
def test_the_first_load_comes_soon(case):
    """Of threads that have little more than 16 elements to do."""
    _, v, cc = case
    code = machine_code(compiled(*case), cc)
    most = WITH_OPERANDS if v.residual or v.adjustment else BEFORE_THE_FIRST_LOAD
    assert code.before("LDG.E.128") <= most


# Instructions and ways through memory from the sums of a statistic to the coefficients of its elements, by far not all
# of which run: a division has a way of its own for numbers that are next to nothing, and there are groups of a batch.
MOST_IN_THE_MIDDLE = {"train": (400, 3), "backward": (280, 3)}


@LISTED
@pytest.mark.parametrize("cc", [(7, 5), (8, 0), (9, 0), (10, 0)], ids=str)
@pytest.mark.parametrize("loops", ["planes", "rows"])
@pytest.mark.parametrize("step", ONE_LAUNCH)
def test_a_block_waits_for_the_coefficients_alone(step, loops, cc):
    """Not for the moving statistics and the gradients of parameters, which as many threads write while others go on."""
    instructions, ways = MOST_IN_THE_MIDDLE[step]
    found = machine_code(compiled(step, variant(np.float32, loops), cc), cc).alone()
    assert len(found) <= instructions
    assert waits(found) <= ways


@LISTED
@pytest.mark.parametrize("step", ["normalize", "infer", "reduce", "train_reduce"])
@pytest.mark.parametrize("loops", ["planes", "short", "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elements_one_by_one_are_on_their_way_together(dtype, loops, step):
    """As those of planes of 7 x 7: nothing but a single one begins at a multiple of more."""
    ptx = compiled(step, variant(dtype, loops, width=1), (9, 0))
    code = machine_code(ptx, (9, 0))
    assert code.on_their_way(ONE_ELEMENT[dtype.itemsize]) >= (8 if dtype == FLOAT64 else 16)


@pytest.mark.parametrize("step", ["normalize", "input_gradient"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coefficients_are_read_16_bytes_at_a_time(step, dtype):
    v = variant(dtype, "rows")
    ptx = compiled(step, v, (9, 0)).partition("\n{")[2]
    before = re.split(WIDE_STORE[:-1], ptx)[0]
    vectors = len(re.findall(WIDE_LOAD[:-1], before))
    inputs = (1 if step == "normalize" else 2) * v.unroll_beside
    assert vectors == inputs + (3 if step == "normalize" else 4) * v.width * v.statistic.itemsize // 16
    assert len(re.findall(r"ld\.global", before)) == vectors


@pytest.mark.parametrize("case", BELOW_FLOAT64.values(), ids=BELOW_FLOAT64)
def test_float64_is_where_it_is_meant(case):
    """In loops over elements it is the sums' alone: one conversion and one addition each for as many
    elements as a thread reads at once; with weights also 12 where a thread changes its shift, a branch that few take.
    Where there are no sums and no gate, there is none anywhere."""
    step, v, _ = case
    ptx = compiled(*case)
    if step in APPLYING and not (v.relu and step == "input_gradient"):
        assert ".f64" not in ptx
    for loop in innermost(element_loops(ptx)):
        sums, shift = sums_of(step, v), 12 if v.weights and step in MOMENTS else 0
        assert loop.count(r".*\.f64") <= (0 if loop.count(WIDE_STORE) else (2 * sums + shift) * v.own)


def sums_of(step, v):
    if step in ("sum_gradient", "backward_reduce", "backward"):
        return 4 if v.adjustment else 2
    return 4 if v.weights else 2


@EVERY_KERNEL
def test_nothing_depends_on_the_order_of_threads(case):
    """The only atomic operations count blocks: those of a group of chunks, and the groups."""
    found = re.findall(r"\b(?:atom|red)\.\S+", compiled(*case))
    assert all(re.search(r"\.inc\.u32", name) for name in found), found
    assert len(found) == (2 if case[0] in COUNTING else 0)


@pytest.mark.parametrize("case", ADDING.values(), ids=ADDING)
def test_sums_of_chunks_are_on_their_way_together(case):
    """The last block adds them up one after the other: it must not wait for each load by itself."""
    together = 4 * MOMENTS_AHEAD if case[0] in ("reduce", "train_reduce") else AHEAD
    loads = [loop.count(r"ld\.global(\.\w+)*\.[bf]64") for loop in innermost(loops(compiled(*case)))]
    assert any(n >= together for n in loads)


def test_inference_and_its_gradient_have_the_same_scale():
    """So they agree about where the output is positive: both divide in float32, and round nothing else."""
    for step in ("infer", "freeze"):
        ptx = compiled(step, variant(np.float32, "rows", width=1), (9, 0))
        assert "sqrt.rn.f32" in ptx
        assert re.search(r"(div|rcp)\.rn\.f32", ptx)


MIDDLE = {
    f"{step} {dtype.name} {' '.join(options)}": (step, variant(dtype, "rows", width=1, sums=dtype, **options), (9, 0))
    for step, options in (
        ("finish", {}),
        ("finish", {"renorm": True}),
        ("finish", {"adjustment": True, "debias": True}),
        ("freeze", {}),
        ("spread_gradient", {}),
        ("spread_gradient", {"adjustment": True}),
    )
    for dtype in (FLOAT32, FLOAT64)
}


MERGING = {
    f"{step} {' '.join(options)}": (step, variant(FLOAT64, "rows", width=1, sums=FLOAT64, **options), (9, 0))
    for step, options in (("merge_moments", {}), ("add_sums", {}), ("add_sums", {"adjustment": True}))
}


def test_every_kernel_is_tested_here():
    assert {step for cases in (CASES, MIDDLE, MERGING) for step, _, _ in cases.values()} == set(VIEWS)


@pytest.mark.parametrize("case", MERGING.values(), ids=MERGING)
def test_merging(case):
    """A thread has a statistic, and loops over the parts, without any memory of its own."""
    ptx = compiled(*case)
    assert not re.search(r"\.local\b", ptx)
    assert not re.search(r"\.shared\b|\bbar(rier)?\.|\b(atom|red)\.", ptx)
    found = resources(ptx, case[2])
    assert (found.stack, found.local) == (0, 0)


@pytest.mark.parametrize("case", MIDDLE.values(), ids=MIDDLE)
def test_the_middle_stage_by_itself(case):
    """A thread has a channel: nothing in local memory, and nothing that threads of a block do together."""
    ptx = compiled(*case)
    assert not re.search(r"\.local\b", ptx)
    assert not re.search(r"\.shared\b|\bbar(rier)?\.|\b(atom|red)\.", ptx)
    assert not element_loops(ptx)
    assert re.search(r"st\.global\.[bf]64" if case[0] != "spread_gradient" else r"st\.global", ptx)
    found = resources(ptx, case[2])
    assert (found.stack, found.local) == (0, 0)


def test_float64_sums_of_float32_are_all_float64():
    """Or the test above would find nothing where there is something."""
    found = innermost(element_loops(compiled("train_reduce", variant(np.float32, "planes", sums=FLOAT64), (9, 0))))
    v = variant(np.float32, "planes")
    assert sum(loop.count(r".*\.f64") for loop in found) >= 3 * v.width * v.unroll


@pytest.mark.parametrize("width", [1, 2])
def test_narrow_accesses(width):
    """As arrays that are not aligned need them."""
    ptx = compiled("infer", variant(np.float32, "planes", width=width), (9, 0))
    assert not element_loops(ptx)
    kind = {1: r"[fbu]32", 2: r"v2\.[fbu]32"}[width]
    assert any(loop.count(rf"st\.global\.{kind}$") for loop in loops(ptx))


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_16_bit_conversions(dtype, width):
    """float16 by the hardware's instructions, bfloat16 by integer arithmetic without branches."""
    arguments = types.void(types.int64, types.int64, types.int64)
    read, write = (ptx_of(conversion(*pair, width), arguments, (9, 0)) for pair in ((dtype, FLOAT32), (FLOAT32, dtype)))
    if dtype == np.float16:
        assert "cvt.f32.f16" in read
        assert "cvt.rn.f16.f32" in write
    assert ".local" not in read + write
    assert len(re.findall(r"\bbra\b", read + write)) <= 2  # beyond the end of the array
