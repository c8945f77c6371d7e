"""The benchmarks of a GPU, as far as they can be seen without one. Nothing here asserts a time."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("benchmarks", reason="the benchmarks belong to a clone, and are not in the source distribution")
from benchmarks import problem as cpu_problem
from benchmarks.__main__ import main
from benchmarks.cases import ITEM_SIZES, MODES, Case, select
from benchmarks.cuda import bounds, host, peers, report, suite, timing
from benchmarks.cuda.cases import CASES, launches, least_bytes
from benchmarks.cuda.problem import Problem, check
from benchmarks.problem import WrongResult
from benchmarks.timing import Effort
from nbbn import BatchNormalization
from nbbn.arrays import availability

ROOT = Path(__file__).parents[1]
L2 = 50 << 20
GIGABYTE = 1e9
ROWS, PLANES = Case("rows", (6, 5, 4, 8)), Case("planes", (6, 8, 5, 4), 1)
DENSE = Case("dense", (24, 8))


@pytest.fixture
def torch():
    module = pytest.importorskip("torch", reason="PyTorch holds the arrays (extra: bench)")
    enabled = module.is_grad_enabled()
    yield module
    module.set_grad_enabled(enabled)


# -- cases -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_case_is_consistent(case):
    assert case.dtype in ITEM_SIZES
    assert len(case.kept) == 1
    assert case.channels * case.per_channel == math.prod(case.shape)
    assert case.plain_batch_norm
    assert case.modes == MODES


def test_named_shapes():
    assert CASES["resnet1-nchw"].shape == (256, 64, 112, 112)
    assert CASES["resnet5-nhwc-float16"].shape == (256, 7, 7, 2048)
    assert {c.dtype for c in CASES.values()} == {"float16", "bfloat16", "float32"}
    assert [c.name for c in select(["resnet4-*"], CASES)] == [
        "resnet4-nchw",
        "resnet4-nchw-float16",
        "resnet4-nhwc",
        "resnet4-nhwc-float16",
    ]


@pytest.mark.parametrize(
    ("name", "arrays"),
    [
        ("resnet1-nchw", (2, 3, 5)),  # r + w; 2r + w; 4r + w
        ("resnet1-nhwc", (2, 3, 5)),
        ("dense-65536x128", (2, 3, 5)),  # 32 MiB each: two of them do not fit
        ("small-nchw", (2, 2, 3)),  # 6 MiB
    ],
)
def test_least_bytes(name, arrays):
    case = CASES[name]
    assert tuple(least_bytes(case, mode, L2) // case.bytes for mode in MODES) == arrays


# -- problems and who solves them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [ROWS, PLANES, DENSE], ids=lambda c: c.name)
@pytest.mark.parametrize("mode", MODES)
def test_expected_is_what_the_tests_reference_says(torch, case, mode):
    """The one that the benchmarks of the CPU use."""
    problem, reference = Problem(case, torch, "cpu"), cpu_problem.Problem(case)
    for name in ("gamma", "beta", "mean", "variance"):
        setattr(reference, name, getattr(problem, name))
    reference.x, reference.dy = problem.x.numpy(), problem.dy.numpy()
    right = reference.expected(mode)
    found = problem.expected(mode)
    assert found.keys() == right.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value.numpy(), right[name], rtol=1e-12, atol=1e-12)  # float64, in another order


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", [ROWS, PLANES, DENSE], ids=lambda c: c.name)
@pytest.mark.parametrize("mode", MODES)
def test_pytorch_solves_the_problem(torch, case, mode, dtype):
    problem = Problem(Case(case.name, case.shape, case.axis, dtype), torch, "cpu")
    forms = peers.torch_forms(problem, mode)
    assert {"eager", "native"} <= forms.keys()
    assert ("module" in forms) == (mode != "backward")
    expected = problem.expected(mode)
    for contender in forms.values():
        found = contender.read(contender.call())
        assert found.keys() == expected.keys() - {"biased_variance"}
        check(found, expected, problem.case)


@pytest.mark.parametrize("mode", MODES)
def test_jax_solves_the_problem(torch, mode):
    pytest.importorskip("jax", reason="needs JAX (extra: bench)")
    problem = Problem(PLANES, torch, "cpu")
    (contender,) = peers.jax_forms(problem, mode).values()
    assert contender.waits
    assert check(contender.read(contender.call()), problem.expected(mode), PLANES) > 0


def _right(torch):
    problem = Problem(ROWS, torch, "cpu")
    return problem.expected("training")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {}, "there is no result"),
        (lambda f: {"y": f["y"] * 0}, "y is 0 instead of"),
        (lambda f: {"y": f["y"] * math.nan}, "y is nan instead of"),
        (lambda f: {"y": f["y"].permute(0, 3, 1, 2)}, r"y has shape \(6, 8, 5, 4\); expected \(6, 5, 4, 8\)"),
        (lambda f: {"variance": f["biased_variance"]}, "variance is"),
    ],
)
def test_wrong_results_are_found(torch, change, message):
    right = _right(torch)
    assert check(right, right, ROWS) == 0
    with pytest.raises(WrongResult, match=message):
        check(change(right), right, ROWS)


def _forms(result):
    return {"ordinary": timing.Contender(lambda: result, lambda r: r)}


def test_who_is_wrong_or_fails_is_left_out_with_the_reason(torch, monkeypatch):
    problem = Problem(ROWS, torch, "cpu")
    right = problem.expected("inference")

    def broken(problem, mode):
        raise RuntimeError("no | compiler\nand a long trace")

    monkeypatch.setattr(peers, "nbbn_forms", lambda problem, mode: _forms(right))
    others = {"torch": lambda problem, mode: _forms({"y": right["y"] * 0}), "jax": broken}
    entrants, left_out = suite.enter(problem, "inference", others)
    assert entrants.keys() == {"nbbn/ordinary"}
    assert entrants["nbbn/ordinary"].error == 0
    assert left_out["jax"] == "RuntimeError: no / compiler"
    assert left_out["torch/ordinary"].startswith("wrong result: y is 0 instead of")


def test_nbbn_with_wrong_numbers_ends_the_run(torch, monkeypatch):
    problem = Problem(ROWS, torch, "cpu")
    wrong = {"y": problem.x.double()}
    monkeypatch.setattr(peers, "nbbn_forms", lambda problem, mode: _forms(wrong))
    with pytest.raises(WrongResult, match=r"rows inference: .*nbbn/ordinary.*wrong result: y is"):
        suite.enter(problem, "inference", {})


DRY_RUN = """
import sys
import torch
from numba import cuda
from benchmarks.cases import Case, MODES
from benchmarks.cuda import peers
from benchmarks.cuda.problem import Problem, check

FEW_THREADS = {"threads": 8, "columns": 4, "vectors": 1, "applied": 2}


class Simulated(Problem):
    "The arrays that nbbn is given are of the simulator's device; its results come back to PyTorch."

    def given(self, name):
        setattr(self, name, cuda.to_device(getattr(self, name).numpy()))


for case in (Case("rows", (4, 3, 2, 8)), Case("planes", (4, 3, 8), 1)):
    for mode in MODES:
        problem = Simulated(case, torch, "cpu")
        expected = problem.expected(mode)
        problem.given("x"), problem.given("dy")
        for form, contender in peers.nbbn_forms(problem, mode, thresholds=FEW_THREADS).items():
            found = contender.read(contender.call())
            found = {n: v if torch.is_tensor(v) else torch.tensor(v.copy_to_host()) for n, v in found.items()}
            print(case.name, mode, form, sorted(found), check(found, expected, case) < 1e-4)
"""


def test_nbbn_solves_the_problem_in_the_simulator(torch):
    if find_spec("numba_cuda") is None:
        pytest.skip("needs numba-cuda (extra: cuda)")
    done = subprocess.run(
        [sys.executable, "-c", DRY_RUN],
        cwd=ROOT,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = {"inference": "['y']", "training": "['mean', 'variance', 'y']", "backward": "['dbeta', 'dgamma', 'dx']"}
    expected = [
        f"{case} {mode} {form} {results[mode]} True"
        for case in ("rows", "planes")
        for mode in MODES
        for form in ("ordinary", "preallocated")
    ]
    assert done.stdout.splitlines() == expected


# -- timing ------------------------------------------------------------------------------------------------------------


class RecordingDevice:
    """Writes down what happens; an event's time is the number of things that happened before it, in milliseconds."""

    def __init__(self):
        self.log = []

    def flush(self):
        self.log.append("flush")

    def synchronize(self):
        self.log.append("synchronize")

    def event(self):
        return RecordingEvent(self)

    def contender(self, name, waits=False):
        return timing.Contender(lambda: self.log.append(name), dict, waits)


class RecordingEvent:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.device.log.append("event")
        self.at = len(self.device.log)

    def elapsed_time(self, later):
        return later.at - self.at


def test_every_call_is_timed_alone_after_a_flush():
    device = RecordingDevice()
    contenders = {"a": device.contender("a"), "b": device.contender("b")}
    samples = timing.measure(contenders, Effort(rounds=2, seconds=0), device)
    a, b = (["flush", "event", name, "event"] for name in "ab")
    assert device.log == [*"aabb", *a, *b, "synchronize", *b, *a, "synchronize"]
    assert [(s.median, s.rounds, s.calls) for s in samples.values()] == [(2e-3, 2, 1)] * 2


def test_who_waits_is_timed_by_the_clock():
    device = RecordingDevice()
    samples = timing.measure({"a": device.contender("a", waits=True)}, Effort(rounds=2, seconds=0), device)
    assert device.log == ["a", "a", *["flush", "synchronize", "a", "synchronize"] * 2]
    assert samples["a"].median > 0


def test_calls_in_a_row(monkeypatch):
    monkeypatch.setattr(timing, "CALLS", 3)
    device = RecordingDevice()
    samples = timing.measure_calls({"a": device.contender("a")}, Effort(rounds=2, seconds=0), device)
    assert device.log == ["a", "synchronize", "a", "a", "a", "synchronize"] * 2
    assert samples["a"].calls == 3


# -- bounds and reports ------------------------------------------------------------------------------------------------

TIMES = {
    "nbbn/ordinary": 1.0,
    "nbbn/preallocated": 0.8,
    "torch/eager": 2.0,
    "torch/native": 1.2,
    "torch/compile": 1.6,
    "torch/module": 0.4,
    "jax/ordinary": 3.0,
    "yardstick/copy": 0.5,
}


def _sample(seconds):
    return {"median": seconds, "lower": seconds, "upper": seconds, "rounds": 2, "calls": 1}


def _report(names=CASES, times=TIMES):
    contenders = {name: _sample(t) for name, t in times.items()}
    results = []
    for name in names:
        case = CASES[name]
        for mode in MODES:
            least = least_bytes(case, mode, L2)
            facts = {"case": name, "mode": mode, "bytes": case.bytes, "least_bytes": least, "launches": 2}
            limit = times.get("yardstick/copy", 0.5) * least / (2 * case.bytes)
            calls = contenders if case.bytes <= suite.SMALL else {}
            results.append(
                facts | {"limit": limit, "contenders": contenders, "calls": calls, "left_out": {"jax/x": "a reason"}}
            )
    gpu = {"name": "A GPU", "compute_capability": "9.0", "multiprocessors": 132, "memory": 80 << 30, "l2_cache": L2}
    gpu |= {"driver": "1", "cuda": "13.0", "cudnn": 9}
    facts = dict.fromkeys(("cpu", "cores", "system", "nbbn", "commit", "python", "date"), "x")
    found = {"machine": facts | {"versions": {"torch": "2"}, "gpu": gpu}, "effort": {}, "results": results}
    return found | {"bounds": bounds.rows(found)}


# bound: its ratio, whether it is met, of how many cases it speaks
RATIOS = {
    "256 MiB and more: copy's time for the fewest bytes / inference": (0.5 / 0.8, False),
    "… / training forward": (0.75 / 0.8, True),
    "… / backward": (1.25 / 0.8, True),
    "the fastest of PyTorch's ways / nbbn": (0.4 / 0.8, False),
    "… training forward and backward together": (0.4 / 0.8, False),
    "1 MiB and more that fit in L2: training forward / copy": (0.8 / 0.5, False),
    "(32, 64), one of many calls in a row / torch.nn.BatchNorm1d": (1.0 / 0.4, False),
}


def test_bounds():
    rows = _report()["bounds"]
    assert {row["bound"] for row in rows} == set(RATIOS) == {b.text for b in bounds.BOUNDS}
    for row in rows:
        ratio, met = RATIOS[row["bound"]]
        assert row["ratio"] == pytest.approx(ratio)
        assert row["met"] is met


def test_bounds_speak_of_the_right_cases():
    rows = _report()["bounds"]
    named = {text: {row["case"] for row in rows if row["bound"] == text} for text in RATIOS}
    large, cached = named["… / backward"], named["1 MiB and more that fit in L2: training forward / copy"]
    assert {"resnet1-nchw", "resnet2-nhwc-float16", "dense-262144x1024-float16"} <= large
    assert all(CASES[name].bytes >= 256 << 20 for name in large)
    assert cached == {"small-nchw", "small-nhwc", "dense-1024x1024"}
    assert named["(32, 64), one of many calls in a row / torch.nn.BatchNorm1d"] == {"dense-32x64"}
    assert named["… training forward and backward together"] == set(CASES)


def test_both_passes_together():
    """Their times are added, and not their ratios."""
    found = _report(["resnet1-nchw"])
    for r in found["results"]:
        r["contenders"] = {"torch/eager": _sample(3.0 if r["mode"] == "backward" else 1.0), "nbbn/ordinary": _sample(1)}
    (row,) = (r for r in bounds.rows(found) if "together" in r["bound"])
    assert row["ratio"] == pytest.approx(4 / 2)


def test_what_was_not_measured_has_no_row():
    assert _report(times={"nbbn/ordinary": 1.0})["bounds"] != []
    found = {row["bound"] for row in _report(times={"nbbn/ordinary": 1.0, "yardstick/copy": 1.0})["bounds"]}
    assert not any("PyTorch" in bound or "torch" in bound for bound in found)
    assert _report(times={"yardstick/copy": 1.0})["bounds"] == []


def test_tables():
    text = report.tables(_report(["resnet1-nchw", "dense-32x64"], {k: v * 1e-3 for k, v in TIMES.items()}))
    assert "A GPU (compute capability 9.0, 132 multiprocessors, 80 GiB, L2 50 MiB)" in text
    assert f"{2 * CASES['resnet1-nchw'].bytes / 0.5e-3 / GIGABYTE:.0f} GB/s" in text
    assert "| case | limit | model | copy | nbbn, `out=` | nbbn | PyTorch, eager | without cuDNN | compiled |" in text
    assert "| resnet1-nchw | 500 | 1500 | 500 | 800 | 1000 | 2000 | 1200 | 1600 | 400 | 3000 | 2.00 |" in text
    assert text.count("| dense-32x64 |") == 6  # by events and by the clock
    assert text.count("| resnet1-nchw |") == 3
    assert "| jax/x | a reason | resnet1-nchw, dense-32x64 |" in text


def test_model():
    """Bytes at the speed of the largest copy, and the shortest copy's time for each launch."""
    found = _report(["resnet1-nchw", "dense-32x64"], {"yardstick/copy": 1e-3})
    for r in found["results"]:
        r["contenders"] = {"yardstick/copy": _sample(1e-3 if r["case"] == "resnet1-nchw" else 4e-6)}
    text, large, small = report.tables(found), CASES["resnet1-nchw"].bytes, CASES["dense-32x64"].bytes
    assert f"| resnet1-nchw | 1000 | {1e3 + 8:.4g} |" in text
    assert f"| dense-32x64 | {1e3:.4g} | {1e3 * small / large + 8:.4g} |" in text


@pytest.mark.skipif(find_spec("numba_cuda") is None, reason="numba-cuda is not installed (extra: cuda)")
@pytest.mark.parametrize(("name", "found"), [("resnet1-nchw", 2), ("resnet1-nhwc", 2), ("dense-32x64", 1)])
def test_launches(name, found):
    assert [launches(CASES[name], mode) for mode in MODES] == [1, found, found]


def test_draw(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib (extra: bench)")
    report.draw(_report(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_report_command_knows_a_gpus_report(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib (extra: bench)")
    file, document = tmp_path / "cuda.json", tmp_path / "cuda.md"
    file.write_text(json.dumps(_report(["dense-32x64"]) | {"bounds": []}))
    document.write_text((ROOT / "docs" / "cuda.md").read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["report", str(file), "--update", str(document)]) == 0
    assert "A GPU (compute capability" in capsys.readouterr().out
    assert "| dense-32x64 |" in document.read_text(encoding="utf-8")
    assert json.loads(file.read_text())["bounds"]
    assert file.with_suffix(".png").stat().st_size > 1000


# -- the command -------------------------------------------------------------------------------------------------------


def _refusal(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_without_a_gpu_the_command_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(availability, "missing", lambda: "the driver is asleep")
    assert "python -m benchmarks cuda needs a GPU: the driver is asleep" in _refusal(["cuda"], capsys)


def test_a_pytorch_that_sees_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(availability, "require", lambda what: None)
    blind = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False), __version__="9+cpu")
    monkeypatch.setitem(sys.modules, "torch", blind)
    assert "needs a PyTorch that sees the GPU; 9+cpu sees none" in _refusal(["cuda"], capsys)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "needs PyTorch, which holds the arrays" in _refusal(["cuda"], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "resnet9"], "no case matches 'resnet9'; nearest: resnet"),
        (["--mode", "sideways"], "invalid choice: 'sideways'"),
        (["--peers", "torch,caffe"], "no peer is called 'caffe'; there are: torch, jax"),
    ],
)
def test_command_line_errors(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(suite, "find_torch", lambda: None)
    assert message in _refusal(["cuda", *arguments], capsys)


# -- what a call takes of the host -------------------------------------------------------------------------------------


@pytest.fixture
def without_gpu(torch, monkeypatch):
    pytest.importorskip("numba_cuda", reason="what leads to a launch is there with it (extra: cuda)")
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        pytest.skip("Numba's simulator has no driver")
    with host.without_gpu() as driver:
        yield driver


@pytest.mark.parametrize("form", host.FORMS)
def test_what_a_repeated_call_asks_of_the_driver(without_gpu, form):
    """As many launches as the form says, with the counters cleared where blocks count; and no switch of contexts."""
    calls, driver = host.calls(host.FORMS[form]), without_gpu
    per_step = 2 if form == "two launches" else 1
    for name, call in calls.items():
        driver.launches = driver.clears = 0
        for _ in range(3):
            call()
        steps = 1 if name == "layer(x)" else per_step
        assert (driver.launches, driver.clears) == (3 * steps, 3 * (steps - 1)), name
    assert driver.switches == 0


def test_a_repeated_call_finds_out_nothing_anew(without_gpu, monkeypatch):
    """No plan is looked for, and of memory there is that of results and one scratch."""
    from nbbn.arrays import torch as adapter
    from nbbn.engine.base import Engine

    calls, asked = host.calls(None), []
    monkeypatch.setattr(Engine, "plan", lambda *given: asked.append("plan"))
    for name in ("empty", "empty_like", "from_host", "to_host", "astype"):
        make = getattr(adapter, name)
        monkeypatch.setattr(adapter, name, lambda *given, name=name, make=make: asked.append(name) or make(*given))
    for name, call in calls.items():
        asked.clear()
        call()
        assert asked == (["empty_like"] if name == "layer(x)" else ["empty_like", "empty", "empty"]), name


def test_what_autograd_follows_is_refused_in_every_call(without_gpu, torch):
    """The short way, too, asks for what is no matter of geometry."""
    x, layer = torch.zeros(host.SHAPE), BatchNormalization()
    for _ in range(2):
        layer(x), layer.vjp(x, training=True)[1](x)
    _, pullback = layer.vjp(x, training=True)
    launches, followed = without_gpu.launches, torch.zeros(host.SHAPE, requires_grad=True)
    for call in (layer, pullback, lambda x: layer(x, training=True), lambda out: layer(x, out=out)):
        with pytest.raises(ValueError, match="autograd does not see"):
            call(followed)
    assert without_gpu.launches == launches
    with torch.no_grad():
        layer(followed)
    assert without_gpu.launches == launches + 1


def test_the_host_s_table(without_gpu, capsys):
    del without_gpu
    assert main(["cuda", "--host", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| (32, 64), float32, us of the host | one launch | two launches | general way |"
    assert [line.split("|")[1].strip() for line in lines[2:]] == [f"`{name}`" for name in host.calls(None)]
    assert all(float(cell) > 0 for line in lines[2:] for cell in line.split("|")[2:5])


def test_the_host_needs_numba_cuda(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nbbn.engine.cuda.launching", None)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(device=str))
    with pytest.raises(SystemExit):
        main(["cuda", "--host"])
    assert "needs PyTorch and numba-cuda, of any build" in capsys.readouterr().err
