"""What python -m benchmarks survey draws and what it makes of its measurements. Nothing here asserts a time."""

import json
import math
from collections import Counter
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("benchmarks", reason="the benchmarks belong to a clone, and are not in the source distribution")
from benchmarks import machine, threads
from benchmarks.__main__ import main
from benchmarks.cases import MODES, Case
from benchmarks.peers import Contender
from benchmarks.problem import WrongResult
from benchmarks.survey import bounds, points, report, suite
from benchmarks.survey.points import FLOAT32, GROUPS, HALF, LAYOUTS, OPTIONS, READ, SURVEY_MODES
from benchmarks.timing import Effort, burst
from tests.helpers.benchmarks import run_benchmarks

ONCE = Effort(rounds=2, seconds=0, lead_in=0, sample=0)
DRAWN = points.draw(160, seed=3)


# -- points ------------------------------------------------------------------------------------------------------------


def test_a_seed_draws_the_same_points():
    assert points.draw(160, seed=3) == DRAWN
    assert points.draw(20, seed=3) == DRAWN[:20]
    assert points.draw(160, seed=4) != DRAWN


def test_points_keep_to_their_ranges():
    for case in DRAWN:
        assert case.bytes <= 40_000_000
        groups = case.shape[0] // case.options.get("virtual_batch_size", case.shape[0])
        assert case.per_channel // groups >= 2
        assert 3 <= case.shape[case.kept[0]] <= 2048
        if len(case.shape) == 2:
            assert case.shape[0] <= 65536
            continue
        assert case.shape[0] <= 128
        space = [n for i, n in enumerate(case.shape) if i not in (0, 1 if case.kept[0] == 1 else len(case.shape) - 1)]
        assert math.prod(space[-2:]) <= 112 * 112
        assert space[-1] == space[-2] if len(space) > 1 else True


def test_points_are_spread_over_their_ranges():
    """On a logarithmic scale: a tenth at least is in each half of the decades."""
    images = [case for case in DRAWN if points.group(case) == FLOAT32 and len(case.shape) == 4]
    for values, middle in (
        ([c.shape[0] for c in images], 11),
        ([c.channels for c in images], 78),
        ([c.per_channel for c in images], 1500),
        ([c.bytes for c in images], 1_000_000),
    ):
        small = np.mean([v < middle for v in values])
        assert 0.1 < small < 0.9


def test_classes_layouts_and_variants_all_occur():
    groups = Counter(map(points.group, DRAWN))
    assert groups.keys() == set(GROUPS)
    assert groups[FLOAT32] == 107  # two of three
    assert groups[HALF] >= 10
    assert min(groups.values()) >= 5
    layouts = Counter(points.layout(c) for c in DRAWN if points.group(c) == FLOAT32)
    assert layouts.keys() == set(LAYOUTS)
    assert max(layouts.values()) - min(layouts.values()) <= 1
    rest = [c for c in DRAWN if points.group(c) != FLOAT32]
    assert {len(c.shape) for c in rest} == {2, 3, 4, 5}
    assert {c.dtype for c in rest} == {"float16", "bfloat16", "float32", "float64"}
    assert {c.fused for c in rest} == {"", "relu", "residual"}
    assert any(c.kept == (1, 3) for c in rest)
    assert any("virtual_batch_size" in c.options for c in rest)


def test_virtual_batches_divide_the_batch():
    sizes = [(c.shape[0], c.options["virtual_batch_size"]) for c in DRAWN if c.options]
    assert sizes
    assert all(n % size == 0 and 2 <= size < n for n, size in sizes)


def test_modes():
    """A read follows where NumPy's is quick, and where there is a peer."""
    for case in DRAWN:
        readable = case.dtype in ("float32", "float64") and points.group(case) != OPTIONS
        assert case.modes == (SURVEY_MODES if readable else MODES)


def test_plain():
    case = points.plain(Case("", (8, 3, 4, 4), (1, 3), options={"virtual_batch_size": 2}))
    assert (case.shape, case.axis, case.options) == ((8, 3, 4, 4), 1, {})


# -- timing and threads ------------------------------------------------------------------------------------------------


def test_a_burst_has_three_calls_after_its_lead_in():
    calls = []
    assert burst(lambda: calls.append(0), ONCE) > 0
    assert len(calls) == 1 + 3


def test_a_form_that_is_far_behind_is_timed_once(monkeypatch):
    taken = {"nbbn/preallocated": 9.0, "a/ordinary": 1.0, "b/ordinary": 2.9, "c/ordinary": 3.1}
    seen = Counter()

    def measured(call, effort):
        seen[call] += 1
        return taken[call]

    monkeypatch.setattr(suite, "burst", measured)
    assert suite._race({name: name for name in taken}, Effort(rounds=4, seconds=0)) == taken
    assert seen == {"nbbn/preallocated": 4, "a/ordinary": 4, "b/ordinary": 4, "c/ordinary": 1}


@pytest.mark.parametrize("form", ["given", "new"])
def test_a_read_reads_what_the_call_has_written(form):
    out, seen = np.zeros(3), []

    def call():
        seen.append(len(seen) + 1.0)
        y = out if form == "given" else np.empty(3)
        y[...] = seen[-1]
        return y

    both = suite._with_read(Contender(call, lambda y: {"y": y}))
    assert both() == seen[-1] == 3  # two calls tell the forms apart
    assert both() == seen[-1] == 4


def test_what_others_have_disturbed_is_measured_again(monkeypatch):
    shares = iter([0.5, 0.01, 0.5])
    monkeypatch.setattr(machine, "Others", lambda: SimpleNamespace(share=lambda: next(shares)))
    monkeypatch.setattr(machine, "wait_until_quiet", lambda patience: 0.0)
    results = iter("abc")
    assert machine.in_quiet(lambda: next(results), patience=60) == ("b", 0.01)
    assert machine.in_quiet(lambda: next(results), patience=0) == ("c", 0.5)


def test_threads():
    found = threads.environment(3)
    assert {"NBBN_NUM_THREADS", "NUMBA_NUM_THREADS", "OMP_NUM_THREADS"} < found.keys()
    assert set(found.values()) == {"3"}
    with pytest.raises(ValueError, match="--threads must be at least 1; received 0"):
        threads.environment(0)


def test_threads_asked(monkeypatch):
    monkeypatch.delenv("NBBN_BENCHMARK_THREADS", raising=False)
    assert threads.asked() == 0
    for name, value in threads.environment(3).items():
        monkeypatch.setenv(name, value)
    assert threads.asked() == 3


# -- reports -----------------------------------------------------------------------------------------------------------


def _result(group, mode, own, index=0, **peers):
    return {
        "case": f"{index}: {group}",
        "group": group,
        "layout": "dense",
        "mode": mode,
        "shape": [2, 3 + index],
        "dtype": "float32",
        "fused": "relu" if group == "relu / residual" else "",
        "bytes": 1000 * (index + 1),
        "contenders": {
            name.replace("_", "/"): {"seconds": t} for name, t in {"nbbn_preallocated": own, **peers}.items()
        },
        "others": 0.0,
        "left_out": {"onnxruntime": "a reason"},
    }


RESULTS = [
    # Ratios 2, 8 and 0.5: two of three ahead, their geometric mean 2.
    _result(FLOAT32, "inference", 1.0, torch_ordinary=3.0, torch_preallocated=2.0, jax_ordinary=4.0),
    _result(FLOAT32, "inference", 1.0, 1, torch_ordinary=9.0, jax_ordinary=8.0),
    _result(FLOAT32, "inference", 2.0, 2, torch_ordinary=4.0, jax_ordinary=1.0),
    _result(FLOAT32, "training", 1.0, torch_ordinary=3.0),
    # Behind JAX, ahead of PyTorch.
    _result(HALF, "inference", 1.0, torch_ordinary=1.5, jax_ordinary=0.75),
    _result(FLOAT32, READ, 1.0, torch_ordinary=0.9),
    _result(OPTIONS, "training", 1.25, nbbn_plain=1.0),
    _result("relu / residual", "backward", 1.0),  # no peer could
]


def _report(results=RESULTS):
    facts = {"machine": machine.describe({}), "memory": "default", "seed": 5, "points": 4, "asked_threads": None}
    found = {**facts, "results": results}
    return found | {"bounds": bounds.rows(found)}


def test_bounds():
    rows = [(r["limit"], r["measurements"], r["value"], r["met"]) for r in bounds.rows({"results": RESULTS})]
    assert rows == [
        (0.95, 4, 0.75, False),
        (0.85, 4, 0.5, False),
        (1.45, 3, pytest.approx(2.0), True),
        (2.6, 1, pytest.approx(3.0), True),
        (1.45, 0, None, None),
        (0.95, 1, 1.0, True),
        (0.95, 1, 0.0, False),
    ]


def test_nobody_is_ahead_of_an_equal():
    assert bounds.share_ahead([1.0, 1.01]) == 0.5


def test_group_table():
    assert list(report.group_table(_report()))[2:] == [
        "| float32 | inference | 3 | 67% | 2.00 | 0.50 |",
        "| float32 | inference + read | 1 | 0% | 0.90 | 0.90 |",
        "| float32 | training | 1 | 100% | 3.00 | 3.00 |",
        "| 16-bit | inference | 1 | 0% | 0.75 | 0.75 |",
        "| axis=[1, 3], ghost batches | training | 1 | 0% | 0.80 | 0.80 |",
    ]


def test_peer_table():
    """Each peer's fastest form; jax: 4, 8 and 0.5."""
    assert list(report.peer_table(_report()))[2:] == [
        "| torch | inference | 3 | 100% | 3.30 | 2.00 |",
        "| torch | inference + read | 1 | 0% | 0.90 | 0.90 |",
        "| torch | training | 1 | 100% | 3.00 | 3.00 |",
        "| jax | inference | 3 | 67% | 2.52 | 0.50 |",
    ]
    assert not list(report.peer_table(_report([])))


def test_worst_table():
    """Without options, which no peer has."""
    lines = list(report.worst_table(_report()))[2:]
    assert lines[0] == "| 2 x 5 | dense | float32 | inference | 2e+03 | 1e+03 | jax, ordinary | 0.50 |"
    assert [line.split(" | ")[-1] for line in lines] == ["0.50 |", "0.75 |", "0.90 |", "2.00 |", "3.00 |", "8.00 |"]
    many = [_result(FLOAT32, "inference", 1.0, i, torch_ordinary=1.0 + i) for i in range(30)]
    assert len(list(report.worst_table(_report(many)))) == 2 + 20


def test_tables():
    text = report.tables(_report())
    assert "Seed 5, 4 points, as many threads as each takes by default." in text
    assert "| onnxruntime | a reason |" in text
    assert text.endswith("| inference + read: share ahead of PyTorch | ≥ 0.95 | 1 | 0 | no |\n")
    assert "| float32, backward: geometric mean of the ratios | ≥ 1.45 | 0 | - | - |" in text


@pytest.mark.parametrize("results", [RESULTS, []], ids=["some", "none"])
def test_report_command(results, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib (extra: bench)")
    file = tmp_path / "r.json"
    file.write_text(json.dumps(_report(results)))
    assert main(["report", str(file)]) == 0
    assert "Seed 5" in capsys.readouterr().out
    content = file.with_suffix(".png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20], "big") == 1600


# -- runs --------------------------------------------------------------------------------------------------------------


def _small(monkeypatch, *cases):
    """These points instead of drawn ones."""
    monkeypatch.setattr(suite, "draw", lambda count, seed: list(cases))
    return suite.plan(len(cases), 5, {}, ONCE)


def test_run_without_peers(tmp_path, monkeypatch):
    """Nothing of the extra is needed; the report is complete after every point."""
    plain = Case("0: plain", (8, 4), modes=SURVEY_MODES)
    ghost = Case("1: ghost", (8, 4, 3, 3), 1, options={"virtual_batch_size": 2})
    plan, seen = _small(monkeypatch, plain, ghost), []
    found = suite.run(plan, tmp_path / "a" / "out.json", lambda name, done: seen.append((name, done)))
    assert seen[4:] == [(f"1: ghost {mode}", i) for i, mode in enumerate(MODES, 4)]
    assert len(seen) == plan.steps == 7
    assert json.loads((tmp_path / "a" / "out.json").read_text()) == json.loads(json.dumps(found))
    assert [r["mode"] for r in found["results"]] == [*SURVEY_MODES, *MODES]
    for r in found["results"]:
        names = {"nbbn/preallocated", "nbbn/plain"} if r["group"] == OPTIONS else {"nbbn/preallocated"}
        assert r["contenders"].keys() == names
        assert all(s["seconds"] > 0 for s in r["contenders"].values())
    assert "| axis=[1, 3], ghost batches | training | 1 |" in report.tables(found)


def test_peers_are_checked(tmp_path, monkeypatch):
    def prepare(problem, mode):
        right = {
            name: value.astype(np.float32) for name, value in problem.expected(mode).items() if name in ("y", "dx")
        }
        wrong = {name: value + 1 for name, value in right.items()}
        results = {"ordinary": right, "preallocated": wrong}
        return {form: Contender(lambda: None, lambda _, r=found: r) for form, found in results.items()}

    plan = _small(monkeypatch, Case("0: plain", (8, 4), modes=SURVEY_MODES))
    plan.peers["torch"] = SimpleNamespace(version=lambda: "0", prepare=prepare)
    for r in suite.run(plan, tmp_path / "out.json")["results"]:
        assert r["contenders"].keys() == {"nbbn/preallocated", "torch/ordinary"}
        assert r["left_out"]["torch/preallocated"].startswith("wrong result: ")
        assert bounds.ratio(r) > 0


def test_nbbn_with_wrong_numbers_ends_the_run(tmp_path, monkeypatch):
    plan = _small(monkeypatch, Case("0: plain", (8, 4)))
    wrong = Contender(lambda: None, lambda _: {"y": np.zeros((8, 4))})
    monkeypatch.setattr(suite.nbbn, "contender", lambda *arguments: wrong)
    with pytest.raises(WrongResult, match=r"0: plain inference: .*y is 0 instead of"):
        suite.run(plan, tmp_path / "out.json")


def _needs_extra():
    missing = [name for name in ("matplotlib", "tqdm") if find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (extra: bench)")


def test_command_draws_a_seed(tmp_path, monkeypatch, capsys):
    _needs_extra()
    monkeypatch.setattr(suite, "draw", lambda count, seed: [Case("0: plain", (8, 4))] * count)
    monkeypatch.setattr(suite.plan, "__defaults__", (ONCE,))
    output = tmp_path / "out.json"
    assert main(["survey", "--points", "1", "--peers", "", "--patience", "0", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert capsys.readouterr().out.startswith(f"seed {found['seed']}\n")
    assert (found["points"], found["asked_threads"]) == (1, None)
    assert output.with_suffix(".png").exists()


def test_command_with_all_installed_peers(tmp_path):
    """In a process of its own, because peers start threads that the tests of forks must not meet."""
    _needs_extra()
    output = tmp_path / "out.json"
    arguments = ["survey", "--seed", "1", "--points", "1", "--threads", "1", "--patience", "0", "--output", str(output)]
    printed = run_benchmarks(*arguments)
    assert "Seed 1, 1 points, threads: 1 for everybody." in printed
    found = json.loads(output.read_text())
    assert found["machine"]["threads"] == 1
    assert [r["mode"] for r in found["results"]] == list(SURVEY_MODES)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--points", "0", "--peers", ""], "--points must be at least 1; received 0"),
        (["--threads", "0"], "--threads must be at least 1; received 0"),
        (["--seed", "-1", "--peers", ""], "non-negative"),
        (["--peers", "torhc"], "no peer is called 'torhc'; did you mean 'torch'?"),
    ],
)
def test_command_line_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["survey", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
