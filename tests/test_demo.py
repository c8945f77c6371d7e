"""The demo's pieces, and its claim: what it prints must show what it says."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import nbbn
from nbbn import demo
from nbbn.demo import report
from nbbn.demo.network import Network, cross_entropy
from nbbn.demo.scenarios import SCENARIOS, Clips, neighbours_batch, random_batch, sorted_batch
from nbbn.demo.training import TEST_IMAGES, Digits, Result, split, train
from nbbn.runtime import parallel_region

IID, NON_IID, TINY, LARGE = SCENARIOS
SMALL = (5, 6, 4, 3)  # sizes of a network for gradients

needs_extra = pytest.mark.skipif(demo.missing_extra() is not None, reason=f"{demo.missing_extra()}")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As the demo runs; the tests pass without it, but take minutes where other processes want the cores."""
    with parallel_region() if demo.missing_extra() else demo.one_thread():
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def blobs():
    """Images as easy as the digits are, without scikit-learn."""
    rng = np.random.default_rng(1)
    labels = rng.integers(10, size=TEST_IMAGES + 1000)
    centres = rng.normal(size=(10, 64))
    return Digits((centres[labels] + rng.normal(size=(labels.size, 64))).astype(np.float32), labels)


class TestBatches:
    LABELS = np.random.default_rng(2).integers(10, size=997)

    def test_random(self, rng):
        batch = random_batch(32)(rng, self.LABELS)
        assert batch.shape == (32,)
        assert 0 <= batch.min() <= batch.max() < self.LABELS.size

    def test_neighbours(self, rng):
        pairs = set()
        for _ in range(50):
            labels = self.LABELS[neighbours_batch(32)(rng, self.LABELS)]
            values, counts = np.unique(labels, return_counts=True)
            assert counts.tolist() == [16, 16]
            pairs.add(tuple(values.tolist()))
        assert pairs == {(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)}

    def test_sorted(self, rng):
        batch = sorted_batch(800)(rng, self.LABELS)
        assert np.unique(batch).size == 800
        labels = self.LABELS[batch]
        assert (np.diff(labels) >= 0).all()
        groups = labels.reshape(8, 100)  # [virtual_batch_size, G]: column g is group g, as n mod G says
        assert min(np.unique(group).size for group in groups.T) >= 7
        blocks = labels.reshape(100, 8)  # what contiguous groups would be
        assert max(np.unique(block).size for block in blocks) <= 2


class TestClips:
    @pytest.mark.parametrize(
        ("progress", "rmax", "dmax"), [(0, 1, 0), (0.04, 1, 0), (0.12, 1 + 2 * 8 / 26, 2.5), (0.3, 3, 5), (1, 3, 5)]
    )
    def test_ramp(self, progress, rmax, dmax):
        clips = Clips()
        clips.progress = progress
        # Sums and quotients of a few float64.
        assert (clips.rmax(), clips.dmax()) == pytest.approx((rmax, dmax), rel=1e-14, abs=1e-14)
        assert clips.rmin() == 1 / clips.rmax()

    def test_the_layer_reads_them_at_each_step(self, rng):
        clips = Clips()
        plain, renorm = (Network(np.random.default_rng(0), **IID.options(m, clips)) for m in ("plain", "renorm"))
        x = rng.normal(3, 2, (8, 64)).astype(np.float32)
        assert np.array_equal(plain.logits(x, training=True), renorm.logits(x, training=True))
        clips.progress = 1.0
        assert not np.allclose(plain.logits(x, training=True), renorm.logits(x, training=True), rtol=0.1)


class TestNetwork:
    def differences(self, function, array, h=1e-6):
        """The gradient of function() with respect to array, by central differences."""
        gradient = np.zeros_like(array)
        for i in np.ndindex(array.shape):
            value = array[i]
            array[i] = value + h
            above = function()
            array[i] = value - h
            gradient[i] = (above - function()) / (2 * h)
            array[i] = value
        return gradient

    @pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 4}], ids=["plain", "ghost"])
    def test_gradients(self, rng, options):
        network = Network(rng, SMALL, dtype="float64", **options)
        for norm in network.norms:
            norm.gamma[...] = rng.uniform(0.5, 2, norm.gamma.shape)
            norm.beta[...] = rng.normal(size=norm.beta.shape)
        x, labels = rng.normal(size=(12, 5)), rng.integers(3, size=12)
        _, gradients = network.loss_and_gradients(x, labels)
        assert len(gradients) == len(network.parameters) == 8
        for parameter, gradient in zip(network.parameters, gradients, strict=True):
            expected = self.differences(lambda: network.loss_and_gradients(x, labels)[0], parameter)
            # The differences are right to h^2 and to 1e-16 / h, both about 1e-10.
            np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)

    def test_cross_entropy(self, rng):
        logits, labels = rng.normal(size=(7, 3)), rng.integers(3, size=7)
        loss, gradient = cross_entropy(logits, labels)
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        assert loss == pytest.approx(-np.log(p[np.arange(7), labels]).mean(), rel=1e-13)
        expected = self.differences(lambda: cross_entropy(logits, labels)[0], logits)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)

    def test_cross_entropy_of_large_logits(self):
        loss, gradient = cross_entropy(np.array([[1e4, 0.0]], np.float32), np.array([1]))
        assert loss == 1e4
        assert gradient.tolist() == [[1, -1]]
        assert gradient.dtype == np.float32

    def test_step(self, rng):
        """SGD with momentum, written out for one parameter."""
        network = Network(rng, SMALL)
        x, labels = rng.normal(size=(12, 5)).astype(np.float32), rng.integers(3, size=12)
        position, velocity = network.weights[0].copy(), 0
        for _ in range(3):
            _, gradients = network.loss_and_gradients(x, labels)
            network.step(x, labels, learning_rate=0.1, momentum=0.5)
            velocity = 0.5 * velocity - 0.1 * gradients[0]
            position = position + velocity
        # Three float32 roundings of each value, in another order.
        np.testing.assert_allclose(network.weights[0], position, rtol=1e-5, atol=1e-6)

    def test_logits_leave_the_state_alone(self, rng):
        network = Network(rng, SMALL)
        network.logits(rng.normal(size=(12, 5)).astype(np.float32), training=True)
        assert all((norm.moving_mean == 0).all() for norm in network.norms)


class TestTraining:
    def test_split(self, blobs, rng):
        numbered = Digits(np.arange(blobs.labels.size), blobs.labels)
        train_set, test_set = split(numbered, 0.2, rng)
        assert test_set.labels.size == TEST_IMAGES
        assert np.array_equal(np.sort(np.concatenate([train_set.images, test_set.images])), numbered.images)
        assert (test_set.labels == blobs.labels[test_set.images]).all()
        assert (train_set.labels != blobs.labels[train_set.images]).sum() == 200
        assert set(train_set.labels) == set(range(10))

    @pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
    def test_every_method_repeats_and_learns(self, scenario, blobs):
        for method in scenario.methods:
            first, second = (train(scenario, method, seed=3, digits=blobs, steps=40) for _ in range(2))
            assert np.array_equal(first.steps, second.steps)
            assert np.array_equal(first.curve, second.curve)
            assert first.training_mode == second.training_mode
            assert first.steps.tolist() == list(range(2, 41, 2))
            assert max(first.curve) > 0.2, method  # one in ten is chance
            assert not np.array_equal(first.curve, train(scenario, method, 4, blobs, 40).curve)

    def test_methods_get_the_same_batches(self, blobs):
        seen = {}

        def record(rng, labels):
            batch = IID.make_batch(rng, labels)
            seen.setdefault(method, []).append(batch.tolist())
            return batch

        for method in IID.methods:
            train(replace(IID, make_batch=record), method, seed=0, digits=blobs, steps=20)
        assert seen["plain"] == seen["renorm"] == seen["ghost"]

    def test_ticks(self, blobs):
        ticks = []
        train(TINY, "renorm", 0, blobs, 25, lambda: ticks.append(1))
        assert len(ticks) == 25

    def test_kernels_run_serially(self):
        """The fixture of this module is in force."""
        with parallel_region() as granted:
            assert not granted


class TestReport:
    RESULTS = {  # noqa: RUF012
        (s.name, m): [Result(np.arange(1, 21), np.full(20, a), 0.5) for a in (0.25 + 0.1 * i, 0.35 + 0.1 * i)]
        for s in SCENARIOS
        for i, m in enumerate(s.methods)
    }

    def test_percent(self):
        assert report.percent([0.5]) == " 50.0 ±  0.0"
        assert report.percent([0.25, 0.35]) == " 30.0 ±  7.1"  # sqrt(50)
        assert report.percent([1.0, 1.0]) == "100.0 ±  0.0"

    def test_table(self):
        lines = list(report.table(SCENARIOS, self.RESULTS))
        assert lines[0].split() == ["scenario", "method", "inference", "training", "mode"]
        assert lines[1].split() == ["i.i.d.", "batches", "plain", "30.0", "±", "7.1", "50.0", "±", "0.0"]
        assert lines[3].split() == ["ghost", "50.0", "±", "7.1", "50.0", "±", "0.0"]
        assert len({line.index("±") for line in lines[1:12]}) == 1
        assert max(map(len, lines)) <= 100

    def test_summary(self):
        lines = list(report.summary(SCENARIOS, self.RESULTS))
        assert lines[1].split(maxsplit=2)[2] == "plain 30.0 %, renorm 40.0 % (+10.0)"
        assert lines[3].split(maxsplit=2)[2] == "plain 30.0 %, ghost 50.0 % (+20.0)"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The finished process of the quick demo, and its picture."""
    picture = tmp_path_factory.mktemp("demo") / "x.png"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "nbbn", "demo", "--quick", "--seeds", "1", "--output", str(picture)],
        cwd=Path(nbbn.__file__).parent.parent,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        timeout=120,
        check=False,
    )
    return done, picture


@needs_extra
class TestQuick:
    def test_ends_well(self, quick):
        done, picture = quick
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""  # the progress bar is for terminals
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"The picture is {picture}. " in done.stdout

    def test_shows_what_it_claims(self, quick):
        """The margins are half of what this seed gives; sums in another order, on another processor, change that."""
        accuracy = self.read_table(quick[0].stdout)
        plain, renorm, ghost = (lambda s, m=m: accuracy[s.name, m] for m in ("plain", "renorm", "ghost"))
        for m in IID.methods:
            assert accuracy[IID.name, m]["inference"] > 95
        assert renorm(NON_IID)["inference"] > plain(NON_IID)["inference"] + 5
        assert plain(NON_IID)["training mode"] > plain(NON_IID)["inference"] + 5
        assert ghost(NON_IID)["inference"] < renorm(NON_IID)["inference"] - 5
        assert renorm(TINY)["inference"] > plain(TINY)["inference"] + 10
        assert ghost(LARGE)["inference"] > plain(LARGE)["inference"] + 1.5

    def read_table(self, text):
        row = re.compile(r"(.{20})(plain|renorm|ghost) +([\d.]+) ± +[\d.]+ +([\d.]+) ± +[\d.]+")
        accuracy, name = {}, ""
        for scenario, method, inference, training in row.findall(text):
            name = scenario.strip() or name
            accuracy[name, method] = {"inference": float(inference), "training mode": float(training)}
        assert set(accuracy) == {(s.name, m) for s in SCENARIOS for m in s.methods}
        return accuracy
