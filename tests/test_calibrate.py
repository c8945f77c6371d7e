"""What python -m benchmarks calibrate and block draw, decide and print. Nothing here asserts a time."""

import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("benchmarks", reason="the benchmarks belong to a clone, and are not in the source distribution")
import nbbn
from benchmarks import block, machine
from benchmarks.__main__ import main
from benchmarks.calibrate import points, report, suite
from benchmarks.calibrate.points import CROSSING, DTYPE, READER, SUBJECTS, Inputs
from benchmarks.cases import Case
from benchmarks.peers import nbbn as own
from benchmarks.problem import Problem, WrongResult
from benchmarks.timing import Effort
from nbbn.engine.cpu.schedule import PARALLEL, Thresholds
from nbbn.kernels.cpu.lanes import LINE
from nbbn.runtime import last_level_cache, likely_layer

ROOT = Path(__file__).parents[1]
needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="needs PyTorch (extra: bench)")
ONCE = Effort(rounds=2, seconds=0, lead_in=0, sample=0)


# -- points ------------------------------------------------------------------------------------------------------------


def test_every_subject_is_a_threshold():
    names = set(Thresholds._fields)
    assert SUBJECTS.keys() <= names
    # The first three keep sums and waits small beside what the others are about; the rest is the machine's.
    assert names - SUBJECTS.keys() == {"max_tasks", "chunk_rows", "tiles_per_thread", "threads", "cache"}


@pytest.mark.parametrize("name", SUBJECTS)
def test_candidates_are_other_values(name):
    values = SUBJECTS[name].candidates
    assert all(v > 0 for v in values)
    assert len(set(values)) == len(values)
    assert name == CROSSING or points.present(name) not in values


def test_what_a_threshold_is_now():
    assert points.present("short_plane") == Thresholds().short_plane
    assert points.present(CROSSING) == PARALLEL[likely_layer()]


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_seed_draws_the_same_inputs(name):
    drawn = points.draw(name, SUBJECTS[name], 8, seed=3)
    assert drawn == points.draw(name, SUBJECTS[name], 8, seed=3)
    assert drawn != points.draw(name, SUBJECTS[name], 8, seed=4)
    assert all(c.per_channel >= 2 and c.dtype == DTYPE for c in drawn)
    if SUBJECTS[name].inputs[0].run is None:
        sizes = [math.prod(c.shape) for c in drawn]
        assert sizes[-1] > 2 * sizes[0]


@pytest.mark.parametrize("name", SUBJECTS)
def test_candidates_change_the_schedule_of_what_is_drawn(name):
    """Otherwise nothing is measured: on two threads, and with a cache that is known."""
    machine_has, subject = {"threads": 2, "cache": last_level_cache()}, SUBJECTS[name]
    changing = set()
    for case in points.draw(name, subject, 40, seed=5):
        view = {1: (*case.shape, 1), (1, 3): case.shape}.get(case.axis, (1, 1, *case.shape))
        for mode in subject.modes:
            base = suite.schedule(view, mode.removesuffix(READER), machine_has)
            for value in subject.candidates:
                if suite.schedule(view, mode.removesuffix(READER), {**machine_has, name: value}) != base:
                    changing.add(value)
    assert changing == set(subject.candidates) - {points.present(name)}


def test_sizes_in_caches():
    inputs = Inputs((1.0, 2.0), channels=(64, 64), of_cache=True)
    for at, caches in ((0.0, 1), (1.0, 2)):
        assert 2 * inputs.draw(np.random.default_rng(0), at).bytes == pytest.approx(
            caches * last_level_cache(), rel=0.01
        )


@pytest.mark.parametrize("whole", [True, False])
def test_runs_of_whole_lines_and_others(whole):
    rng = np.random.default_rng(0)
    for ranges in (
        {"batch": (1, 4), "run": (16, 4096)},
        {"batch": (1, 4), "channels": (2, 50)},
        {"channels": (3, 300)},
    ):
        inputs = Inputs((1e5, 1e5), whole_lines=whole, **ranges)
        assert all((inputs.draw(rng, 0.5).shape[-1] * 4 % LINE == 0) == whole for _ in range(50))


@pytest.mark.parametrize("case", [Case("", (4, 8, 100), 1), Case("", (300, 48)), Case("", (16, 12, 5), 1)])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_schedule_is_the_one_that_runs(case, mode):
    layer, x = own.layer_for(problem := Problem(case)), problem.x
    plan = nbbn.explain(layer, x, training=mode == "training")
    assert suite.schedule(plan.view, mode, {}) == plan.schedule


# -- decisions ---------------------------------------------------------------------------------------------------------


def _results(*ratios, **more):
    return [{"ratios": r, "others": None, **more} for r in ratios]


@pytest.mark.parametrize(
    ("ratios", "value"),
    [
        ([{2: 0.9}, {2: 0.95}], 2),
        ([{2: 0.98}, {2: 0.975}], None),  # less than 3 %
        ([{2: 0.5}, {2: 1.11}], None),  # one shape gets more than 10 % worse
        ([{2: 0.5}, {2: 1.10}], 2),
        ([{2: 0.9, 4: 0.8}], 4),
        ([{2: 0.9, 4: 0.7}, {2: 0.9, 4: 1.2}], 2),  # the better one on the whole has a loser
        ([{2: 0.9, 4: 0.92}, {}, {4: 0.9}], 4),  # saves more, in more of the inputs
        ([{}, {}], None),
        ([], None),
    ],
)
def test_what_would_be_changed(ratios, value):
    chosen = report.change(report.candidates((2, 4), _results(*ratios)))
    assert (chosen and chosen.value) == value


def test_candidates_are_judged_where_they_change_anything():
    (found,) = report.candidates((2, 4), _results({2: 0.5}, {}, {2: 2.0}))
    assert found == (2, 2, pytest.approx(1), 0.5, 2.0)


def _crossing(present, times):
    """times: serial over parallel by size."""
    return [
        {"threshold": CROSSING, "mode": "inference", "shape": (size,), "others": None}
        | {"ratios": {1 << 30: ratio} if size >= present else {1: 1 / ratio}}
        for size, ratio in times.items()
    ]


@pytest.mark.parametrize(
    ("times", "says"),
    [
        ({1 << 13: 0.5, 1 << 15: 1.2, 1 << 18: 1.8}, "Parallel is faster from 32,768 elements on."),
        ({1 << 13: 1.5, 1 << 15: 0.9, 1 << 18: 1.8}, "Parallel is faster from 262,144 elements on."),
        ({1 << 13: 0.5, 1 << 18: 0.9}, "Serial is faster up to the end."),
    ],
)
def test_crossing(times, says):
    lines = list(report.size_table(1 << 17, _crossing(1 << 17, times)))
    assert lines[-1] == says
    assert f"| from 8,192 | 1 | {times[1 << 13]:.2f} |" in lines


def test_one_thread_has_no_crossing():
    assert list(report.size_table(1 << 17, _results({}, shape=(5,)))) == []


def test_tables():
    found = [
        {"threshold": "tile_elements", "mode": "training", "shape": (4, 4), "ratios": {16384: 0.9}, "others": 0.5},
        {"threshold": "streamed_share", "mode": "training", "shape": (4, 4), "ratios": {math.inf: 1.5}, "others": 0.0},
        *_crossing(1 << 17, {1 << 13: 0.5, 1 << 18: 2.0}),
    ]
    thresholds = {
        "tile_elements": {"present": 65536, "candidates": (16384,)},
        "streamed_share": {"present": 1.25, "candidates": (math.inf,)},
        "streamed_run": {"present": 4096, "candidates": (512,)},
        CROSSING: {"present": 1 << 17, "candidates": (1, 1 << 30)},
    }
    facts = machine.describe({}) | {"threading_layer": "omp"}
    text = report.tables(
        {"machine": facts, "seed": 7, "memory": "kept", "thresholds": thresholds, "results": found},
    )
    for line in (
        "tile_elements, now 65,536 (1 of 1 measurements *):",
        "| 16,384 | 1 | 0.900 | 0.90 | 0.90 |",
        "| never | 1 | 1.500 | 1.50 | 1.50 |",
        "No candidate changes anything on this machine.",
        "| tile_elements | 65,536 | 16,384 (0.900, worst 0.90) (1 of 1 measurements *) |",
        "| streamed_share | 1.25 | stays |",
        'PARALLEL["omp"], now 131,072:',
        "Parallel is faster from 262,144 elements on.",
    ):
        assert line in text.splitlines()


# -- runs --------------------------------------------------------------------------------------------------------------


def test_measure_times_what_differs():
    plan = suite.Plan({}, 0, effort=ONCE)
    problem = Problem(Case("", (8, 4, 12), 1))
    for mode in ("inference", "training", "backward", "training" + READER):
        found = suite.measure(problem, mode, "short_plane", (8, 11, 32), plan)["ratios"]
        assert found.keys() == {8, 11}  # both make planes of it
        assert found[8] == found[11] > 0
    assert suite.measure(problem, "training", "tile_columns", (2048,), plan)["ratios"] == {}


def test_a_candidate_that_changes_results_ends_the_run(monkeypatch):
    layer_for = own.layer_for

    def broken(problem, **choices):
        layer = layer_for(problem, **choices)
        if choices.get("thresholds", {}).get("short_plane") == 8:
            layer.set_weights([2 * w for w in layer.get_weights()])
        return layer

    monkeypatch.setattr(own, "layer_for", broken)
    with pytest.raises(WrongResult, match="instead of"):
        suite.measure(
            Problem(Case("", (8, 4, 12), 1)), "inference", "short_plane", (8,), suite.Plan({}, 0, effort=ONCE)
        )


def test_plans():
    plan = suite.plan(["short_plane", "streamed_run"], 0)
    assert plan.steps == 8 * 3 + 8 * 2
    assert suite.plan([], 0).subjects == SUBJECTS
    assert suite.plan([], 0, quick=True).steps < suite.plan([], 0).steps / 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["calibrate", "--only", "tiles"],
            "no threshold is called 'tiles'; there are: parallel_elements, tile_elements",
        ),
        (["calibrate", "--seed", "-1"], "non-negative"),
        (["block", "--layer", "gcd"], "invalid choice: 'gcd'"),
    ],
)
def test_command_line_errors(arguments, message, capsys):
    pytest.importorskip("tqdm", reason="needs tqdm (extra: bench)")
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def _run(code):
    """In a process of its own, because PyTorch starts threads that the tests of forks must not meet."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_calibrate_command(monkeypatch, capsys):
    pytest.importorskip("tqdm", reason="needs tqdm (extra: bench)")
    small = points.Subject((4, 8, 32), (Inputs((4096, 8192), batch=(4, 8), run=(3, 40)),), ("inference",))
    monkeypatch.setitem(suite.SUBJECTS, "short_plane", small)
    assert main(["calibrate", "--quick", "--only", "short_plane", "--seed", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("seed 1\n")
    now = points.present("short_plane")
    assert f"short_plane, now {now}" in out
    assert f"| short_plane | {now} | " in out


def test_block_ratios():
    norms = {block.COLD: 1.0, block.WARM: 0.5}
    parts = {
        block.OWN: {"whole": 3.0, "norms": 1.1, "convolutions": 1.8},
        block.TORCH: {"whole": 4.0, "norms": 2.0, "convolutions": 1.2},
        **{f"{block.OWN}, {how}": {"norms": n} for how, n in norms.items()},
        **{f"{block.TORCH}, {how}": {"norms": 2 * n} for how, n in norms.items()},
    }
    (*_, line) = block.ratio_table({"results": [{"shape": (1, 2, 3, 4), "times": parts, "others": 0.3}]})
    assert line == "| 1 x 2 x 3 x 4* | 1.10 | 2.20 | 1.00 | 2.00 | 1.50 | 0.75 | 3e+03 | 4e+03 |"


@needs_torch
def test_block_runs():
    code = (
        "from benchmarks import block\n"
        "from benchmarks.timing import Effort\n"
        "plan = block.Plan(shapes=((2, 3, 5, 4),), effort=Effort(rounds=2, seconds=0, lead_in=0, sample=0))\n"
        "print(block.tables(block.run(plan)))\n"
    )
    assert "| 2 x 3 x 5 x 4" in _run(code)


@needs_torch
def test_block_compares_results():
    code = (
        "from benchmarks import block, problem\n"
        "block.OwnNorm.backward = lambda self, dy: dy\n"
        "try:\n"
        "    block.run(block.Plan(shapes=((2, 3, 5, 4),)))\n"
        "except problem.WrongResult as fault:\n"
        "    print(fault)\n"
    )
    assert "differs from PyTorch's by" in _run(code)


def test_a_missing_layer_is_named(monkeypatch):
    monkeypatch.setattr(block, "start_pool", lambda: "omp")
    with pytest.raises(RuntimeError, match=r"threading layer 'tbb' here \(pip install nbbn\[tbb\]\)"):
        block.plan("tbb", True, 0)
