"""The benchmarks measure what they say. Nothing here asserts a time."""

import gc
import json
import math
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("benchmarks", reason="the benchmarks belong to a clone, and are not in the source distribution")
from benchmarks import bounds, machine, report, suite, timing, yardsticks
from benchmarks.__main__ import main
from benchmarks.cases import CASES, ITEM_SIZES, MODES, Case, select
from benchmarks.peers import OWN, PEERS, CannotDo, Contender, find, load
from benchmarks.problem import MOMENTUM, Problem, WrongResult, check
from tests.helpers.benchmarks import run_benchmarks

ROOT = Path(__file__).parents[1]
TINY = CASES["dense-32x64"]
ONCE = timing.Effort(rounds=2, seconds=0, lead_in=0, sample=0)
CACHE = 32 << 20


# -- cases -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_case_is_consistent(case):
    assert set(case.modes) <= set(MODES)
    assert case.modes
    assert case.dtype in ITEM_SIZES
    assert case.channels * case.per_channel == math.prod(case.shape)
    assert case.shape[0] % case.options.get("virtual_batch_size", 1) == 0
    assert case.fused in ("", "relu", "residual")
    if case.plain is not None:
        plain = CASES[case.plain]
        assert plain.shape == case.shape
        assert set(case.modes) <= set(plain.modes)
        assert (plain.plain, plain.dtype, plain.options, plain.fused) == (None, "float32", {}, "")


def test_both_layouts_hold_the_same_values():
    for name, case in CASES.items():
        if name.startswith("resnet") and "-nchw" in name:
            twin = CASES[name.replace("-nchw", "-nhwc")]
            assert (twin.channels, twin.per_channel, twin.dtype) == (case.channels, case.per_channel, case.dtype)
            assert twin.channels_last
            assert not case.channels_last


def test_named_shapes():
    assert CASES["resnet1-nchw"].shape == (32, 64, 112, 112)
    assert CASES["resnet5-nhwc"].shape == (32, 7, 7, 2048)
    assert {len(c.shape) for c in CASES.values()} == {2, 3, 4, 5}
    assert {c.dtype for c in CASES.values()} == set(ITEM_SIZES)
    assert CASES["resnet2-axis13"].channels == 256 * 56


MEGABYTE = 1 << 20
SMALL = Case("small", (256, 1024))  # 1 MiB
PLANES = Case("planes", (64, 64, 128, 128), 1)  # 256 MiB, 4 MiB per channel
ROWS = Case("rows", (64, 128, 128, 64))
WIDE = Case("wide", (64, 2, 128, 4096), 1)  # 256 MiB, 128 MiB per channel


@pytest.mark.parametrize(
    ("case", "mode", "arrays"),
    [
        (SMALL, "inference", 2),
        (SMALL, "training", 2),
        (SMALL, "backward", 3),
        (PLANES, "inference", 2),
        (PLANES, "training", 2),
        (PLANES, "backward", 3),
        (ROWS, "inference", 2),
        (ROWS, "training", 3),
        (ROWS, "backward", 5),
        (WIDE, "training", 3),
        (WIDE, "backward", 5),
    ],
)
def test_least_bytes(case, mode, arrays):
    assert case.least_bytes(mode, CACHE) == arrays * case.bytes


@pytest.mark.parametrize(
    ("fused", "mode", "arrays"),
    [
        ("relu", "inference", 2),
        ("relu", "training", 3),
        ("relu", "backward", 5),
        ("residual", "inference", 3),  # x and the residual in, y out
        ("residual", "training", 4),  # and x once more
        ("residual", "backward", 8),  # x, dy and y in, twice; two gradients out
    ],
)
def test_least_bytes_of_fused_rows(fused, mode, arrays):
    case = Case("rows", ROWS.shape, fused=fused)
    assert case.least_bytes(mode, CACHE) == arrays * case.bytes


def test_limit_is_the_fastest_copys_time_per_byte():
    times = {yardsticks.COPYTO: 2.0, "yardstick/streamed": 1.0}
    assert yardsticks.limit(times, least_bytes=300, array_bytes=100) == (1.5, "yardstick/streamed")


def test_select():
    assert select([]) == list(CASES.values())
    assert [c.name for c in select(["resnet1-*"])] == ["resnet1-nchw", "resnet1-nhwc"]
    with pytest.raises(ValueError, match=r"no case matches 'resnet2-nchv'; nearest: resnet2-nchw"):
        select(["resnet1-*", "resnet2-nchv"])
    with pytest.raises(ValueError, match=r"no case matches '%'; there are: resnet1-nchw, .*single5-nhwc"):
        select(["%"])


# -- problems and their results ----------------------------------------------------------------------------------------


def test_expected_statistics_follow_their_definition():
    problem = Problem(TINY)
    expected = problem.expected("training")
    x = problem.x.astype(np.float64)
    for name, ddof in (("variance", 1), ("biased_variance", 0)):
        moved = MOMENTUM * problem.variance.astype(np.float64) + (1 - MOMENTUM) * x.var(axis=0, ddof=ddof)
        np.testing.assert_allclose(expected[name], moved, rtol=1e-12)  # float64, in another order
    np.testing.assert_allclose(problem.batch[0], x.mean(axis=0), rtol=1e-6)  # rounded to float32


def test_rounding_decides_no_relu():
    """So a contender may compute it in any order."""
    problem = Problem(Case("relu", (4096, 64), fused="relu"))
    z = problem.expected("training")["y"]
    near = (z > 0) & (z < 4e-4)  # float32 knows z to 1e-6
    assert near.any()
    assert not problem.dy[near].any()
    assert np.count_nonzero(problem.dy) > 0.99 * problem.dy.size


def _wrong(**changed):
    found = dict(Problem(TINY).expected("training")) | changed
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "there is no result"),
        (_wrong(y=np.zeros((32, 64))), "y is 0 instead of"),
        (_wrong(y=np.full((32, 64), np.nan)), "y is nan instead of"),
        (_wrong(y=np.zeros((64, 32))), r"y has shape \(64, 32\); expected \(32, 64\)"),
        (_wrong(mean=_wrong()["mean"] * 1.01), "mean is"),
        (_wrong(variance=_wrong()["biased_variance"]), "variance is"),
    ],
)
def test_wrong_results_are_found(found, message):
    with pytest.raises(WrongResult, match=message):
        check(found, Problem(TINY).expected("training"), TINY)


def test_a_wrong_last_element_is_found():
    expected = Problem(TINY).expected("training")
    y = expected["y"].copy()
    assert check({"y": y}, expected, TINY) == 0
    y[-1, -1] += 0.01
    with pytest.raises(WrongResult, match="flat index 2047"):
        check({"y": y}, expected, TINY)


def _stub(**forms):
    """A peer whose forms return these results."""

    def prepare(problem, mode):
        return {form: Contender(lambda: None, lambda _, r=results: r) for form, results in forms.items()}

    return SimpleNamespace(version=lambda: "0", prepare=prepare)


def _plan(**peers):
    return suite.Plan([TINY], ("training",), peers, ONCE)


def test_a_peer_with_wrong_numbers_is_refused(tmp_path):
    right = {"y": Problem(TINY).expected("training")["y"]}
    stub = _stub(ordinary={"y": np.zeros((32, 64))}, preallocated=right)
    (result,) = suite.run(_plan(stub=stub), tmp_path / "out.json")["results"]
    assert "stub/preallocated" in result["contenders"]
    assert "stub/ordinary" not in result["contenders"]
    assert result["left_out"]["stub/ordinary"].startswith("wrong result: y is 0 instead of ")


def test_nbbn_with_wrong_numbers_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "load", lambda name: _stub(ordinary={"y": np.zeros((32, 64))}))
    with pytest.raises(WrongResult, match=r"dense-32x64 training: .*y is 0 instead of"):
        suite.run(_plan(), tmp_path / "out.json")


def test_a_peer_that_cannot_says_why(tmp_path):
    def prepare(problem, mode):
        raise CannotDo("it has no training")

    stub = SimpleNamespace(version=lambda: "0", prepare=prepare)
    (result,) = suite.run(_plan(stub=stub), tmp_path / "out.json")["results"]
    assert result["left_out"] == {"stub": "it has no training"}


# -- timing ------------------------------------------------------------------------------------------------------------


def test_every_contender_has_its_turn_in_rotated_order():
    order = []
    calls = {name: lambda n=name: order.append(n) for name in "abc"}
    samples = timing.measure(calls, timing.Effort(rounds=3, seconds=0, lead_in=0, sample=0))
    assert list(samples) == ["a", "b", "c"]
    assert {s.rounds for s in samples.values()} == {3}
    assert {s.calls for s in samples.values()} == {1}
    assert all(s.lower <= s.median <= s.upper for s in samples.values())
    # Each turn is a call that leads in and one that is timed.
    assert "".join(order[-18:]) == "aabbcc" + "bbccaa" + "ccaabb"


def test_short_calls_are_repeated_within_a_sample():
    samples = timing.measure({"pass": lambda: None}, timing.Effort(rounds=2, seconds=0, lead_in=0, sample=1e-3))
    assert samples["pass"].calls > 100  # a call that does nothing takes less than 10 us


def test_no_garbage_is_collected_while_something_is_timed():
    seen = []
    timing.measure({"gc": lambda: seen.append(gc.isenabled())}, ONCE)
    assert seen[-1] is False
    assert gc.isenabled()


def test_others_share_is_a_share():
    others = machine.Others()
    time.sleep(0.1)  # some ticks of the kernel's clock: of no time at all one of them is any share
    share = others.share()
    assert share is None or 0 <= share <= 1.5  # the clocks of the kernel and of the process tick differently


# -- reports -----------------------------------------------------------------------------------------------------------


def _report(times, cases=None, startup=None):
    """A report in which each contender takes as long as `times` says."""
    contenders = {name: {"median": t} for name, t in times.items()}
    results = [
        {
            "case": c.name,
            "mode": m,
            "bytes": c.bytes,
            "limit": 1.0,
            "others": 0.0,
            "contenders": contenders,
            "left_out": {"onnxruntime": "a reason"},
        }
        for c in cases or CASES.values()
        for m in c.modes
    ]
    facts = machine.describe({"torch": "2"}) | {"last_level_cache": CACHE}
    return {"machine": facts, "memory": "default", "results": results, "startup": startup or {}}


EVERYBODY = {
    "nbbn/ordinary": 1.0,
    "nbbn/preallocated": 0.5,
    "nbbn/preallocated, one thread": 1.0,
    "nbbn/plain": 0.4,
    "torch/ordinary": 4.5,
    "torch/ordinary, module": 2.0,
    "jax/preallocated": 2.5,
    "yardstick/copyto": 1.0,
}
RATIOS = {
    "larger than the last-level cache, inference / copyto": (0.5, True),
    "… training, channels first / copyto": (0.5, True),
    "… training, channels last / copyto": (0.5, True),
    "… backward / copyto": (0.5, True),
    "every case / the fastest peer in its best form": (0.25, True),
    "inputs of 64 MB and more, training: PyTorch's ordinary call / nbbn's": (4.5, False),
    "… inference": (4.5, True),
    "(32, 64), inference / torch.nn.BatchNorm1d": (0.5, True),
    "… training": (0.5, True),
    "16-bit inference / float32": (1.25, False),
    "ghost batches, renorm, axis=[1, 3] / plain": (1.25, True),
    "in the cache, 1 MB and more: one thread / all": (2.0, True),
    "larger than the last-level cache, without out= / with": (2.0, False),
}


def test_bounds():
    """Every bound speaks of some case of the suite, and compares whom it names."""
    rows = bounds.rows(_report(EVERYBODY))
    assert {row["bound"] for row in rows} == set(RATIOS) == {b.text for b in bounds.BOUNDS}
    for row in rows:
        ratio, met = RATIOS[row["bound"]]
        assert row["ratio"] == pytest.approx(ratio)
        assert row["met"] is met


def test_bounds_speak_of_the_right_cases():
    rows = bounds.rows(_report(EVERYBODY))
    named = {text: {row["case"] for row in rows if row["bound"] == text} for text in RATIOS}
    assert named["… training, channels last / copyto"] >= {"resnet1-nhwc", "dense-65536x128"}
    assert named["… training, channels first / copyto"] >= {"resnet1-nchw", "sequence-ncl", "video-ncdhw"}
    assert not named["… training, channels first / copyto"] & named["… training, channels last / copyto"]
    assert "resnet5-nchw" not in named["larger than the last-level cache, inference / copyto"]
    assert named["16-bit inference / float32"] == {
        f"resnet2-{layout}-{dtype}" for layout in ("nchw", "nhwc") for dtype in ("float16", "bfloat16")
    }
    assert named["ghost batches, renorm, axis=[1, 3] / plain"] == {
        "resnet2-nchw-ghost",
        "resnet2-nhwc-ghost",
        "resnet2-nchw-renorm",
        "resnet2-nhwc-renorm",
        "resnet2-axis13",
    }


def test_what_was_not_measured_has_no_row():
    rows = bounds.rows(_report({"yardstick/copyto": 1.0}))
    assert rows == []


def test_startup_bounds():
    rows = bounds.rows(_report({}, startup={"small": {"cold": 3.1, "warm": 0.7}}))
    assert [(row["ratio"], row["limit"], row["met"]) for row in rows] == [(3.1, 3.0, False), (0.7, 0.8, True)]


def _complete(**more):
    found = _report(EVERYBODY, **more)
    return found | {"bounds": bounds.rows(found)}


def test_tables():
    text = report.tables(_complete(cases=[TINY, CASES["resnet1-nchw"]]))
    assert "| every case / the fastest peer in its best form | ≤ 1 | 6 of 6 | 0.25 | " in text
    assert "| dense-32x64 | 1e+03 | 1e+03 | 500 | 1e+03 | 2e+03 | torch, ordinary, module | 0.25 |" in text
    assert "| onnxruntime | a reason | dense-32x64, resnet1-nchw |" in text


@pytest.mark.parametrize(("at_least", "worst"), [(False, "≤ 3 | 1 of 2 | 4 | b m"), (True, "≥ 3 | 1 of 2 | 2 | a m")])
def test_bounds_table_shows_the_worst(at_least, worst):
    common = {"bound": "text", "mode": "m", "limit": 3.0, "at_least": at_least}
    rows = [{"case": "a", "ratio": 2.0, "met": True, **common}, {"case": "b", "ratio": 4.0, "met": False, **common}]
    assert list(report.bounds_table({"bounds": rows}))[2:] == [f"| text | {worst} |"]


def test_update_replaces_what_is_between_the_markers(tmp_path):
    document = tmp_path / "document.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.update(document, _complete(cases=[TINY]))
    text = document.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "dense-32x64" in text
    assert "old" not in text
    document.write_text("no markers")
    with pytest.raises(ValueError, match="has no lines"):
        report.update(document, _complete(cases=[TINY]))


def test_the_documentation_can_be_updated():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert text.count(report.BEGIN) == 1
    assert report.END in text.partition(report.BEGIN)[2]


def test_draw(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib (extra: bench)")
    report.draw(_complete(), tmp_path / "picture.png")
    content = (tmp_path / "picture.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20], "big") == 1600


# -- runs --------------------------------------------------------------------------------------------------------------


def test_run_without_peers(tmp_path):
    """Nothing of the extra is needed to measure nbbn alone."""
    plan = suite.Plan([TINY], MODES, {}, ONCE)
    seen = []
    suite.run(plan, tmp_path / "a" / "out.json", lambda name, done: seen.append((name, done)))
    assert seen == [(f"dense-32x64 {mode}", i) for i, mode in enumerate(MODES)]
    assert plan.steps == len(MODES)
    found = json.loads((tmp_path / "a" / "out.json").read_text())
    _check_report(found)
    assert [r["mode"] for r in found["results"]] == list(MODES)


def _check_report(found):
    assert found.keys() == {"machine", "effort", "memory", "results", "startup", "bounds"}
    facts = found["machine"]
    assert {"cpu", "caches", "cores", "memory", "system", "date", "versions", "threading_layer"} <= facts.keys()
    for r in found["results"]:
        assert r["limit"] > 0
        assert r["least_bytes"] == CASES[r["case"]].least_bytes(r["mode"], facts["last_level_cache"])
        assert {"nbbn/ordinary", *yardsticks.NAMES} <= r["contenders"].keys()
        for name, sample in r["contenders"].items():
            assert 0 < sample["lower"] <= sample["median"] <= sample["upper"]
            assert sample["rounds"] >= 2
            assert ("error" in sample) == (not name.startswith("yardstick/"))


def test_quick_run_with_all_installed_peers(tmp_path):
    """In a process of its own, because peers start threads that the tests of forks must not meet."""
    missing = [name for name in ("matplotlib", "tqdm") if find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (extra: bench)")
    output = tmp_path / "out.json"
    arguments = ["cpu", "--quick", "--patience", "0", "--case", TINY.name, "--output", str(output)]
    printed = run_benchmarks(*arguments)
    assert "| dense-32x64" in printed
    found = json.loads(output.read_text())
    _check_report(found)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    forward = [r for r in found["results"] if r["mode"] != "backward"]
    for peer in found["machine"]["versions"].keys() & set(PEERS):
        for r in forward:
            assert any(name.startswith(f"{peer}/") for name in r["contenders"]), (peer, r["left_out"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cpu", "--case", "resnet9"], "no case matches 'resnet9'; nearest: resnet"),
        (["cpu", "--peers", "torhc"], "no peer is called 'torhc'; did you mean 'torch'?"),
        (["cpu", "--mode", "sideways"], "invalid choice: 'sideways'"),
        (["report", "missing.json"], "missing.json"),
        ([], "command"),
    ],
)
def test_command_line_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_report_command(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib (extra: bench)")
    file = tmp_path / "r.json"
    file.write_text(json.dumps(_report(EVERYBODY, cases=[TINY])))
    assert main(["report", str(file)]) == 0
    assert "| dense-32x64" in capsys.readouterr().out
    assert file.with_suffix(".png").stat().st_size > 1000
    assert json.loads(file.read_text())["bounds"]


def test_peers_are_known_by_name():
    assert load(OWN).version() == __import__("nbbn").__version__
    with pytest.raises(ValueError, match="no peer is called 'caffe'; there are: torch, jax"):
        find(["caffe"], PEERS, load)
