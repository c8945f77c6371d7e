"""Options together: a layer, or the ranks of a group, against formulas in float64, over calls of every kind.

What has tests of its own (shapes, schedules, dtypes of 16 bits) is left out, so that there are few kernels.
"""

import copy
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nbbn
from tests.oracle.compiled import INTERPRETED

STEPS, CHANNELS, EPSILON = 4, 3, 1e-2
RENORM_MOMENTUM, CLIPS = 0.8, {"rmin": 0.5, "rmax": 2.0, "dmax": 0.7}


def momentum():
    return 0.75


def groups_of(samples, options):
    """The samples of each group."""
    size, numbers = options.get("virtual_batch_size"), np.arange(samples)
    if size is None or not samples:
        return [numbers] if size is None else []
    interleaved = options["virtual_batch_order"] == "interleaved"
    if options["ragged"] == "spread":
        count = -(-samples // size)
        return [numbers[g::count] for g in range(count)] if interleaved else np.array_split(numbers, count)
    count = samples // size
    whole, rest = numbers[: count * size], numbers[count * size :]
    found = [whole[g::count] if interleaved else whole[g * size : (g + 1) * size] for g in range(count)]
    return [*found, rest] if len(rest) else found


def moments(x, w):
    """Weight, mean, and variance without and with Bessel's correction, of (values, C) with weights of 0 and more."""
    total, x = w.sum(0), np.where(w > 0, x, 0.0)
    some = np.where(total > 0, total, 1.0)
    mean = (w * x).sum(0) / some
    m2 = np.where(w > 0, w * (x - mean) ** 2, 0.0).sum(0)
    divisor = total - (w**2).sum(0) / some
    return total, mean, m2 / some, m2 / np.where(divisor <= 1e-12 * some, some, divisor)


def averages(groups):
    """How many groups have a value, and the plain averages over these of their mean and variances."""
    present = np.array([m[0] > 0 for m in groups]).reshape(-1, CHANNELS)
    count = present.sum(0)
    sums = (np.where(present, [m[i] for m in groups], 0.0).sum(0) for i in (1, 2, 3))
    return count, *(s / np.where(count > 0, count, 1) for s in sums)


def moved(old, new, k):
    """A moving average. With a weight of 0 nothing of the old value is left, be it NaN."""
    return np.where(k == 0, new, old - (old - new) * (1 - k))


@dataclass
class Model:
    """The state that a layer with these options must have, and what it must do to it."""

    options: dict
    state: dict = field(default_factory=dict)

    def __post_init__(self):
        self.reset()

    def reset(self):
        zeros, ones = np.zeros(CHANNELS), np.ones(CHANNELS)
        self.state = {"moving_mean": zeros, "moving_variance": ones}
        if self.options["renorm"]:
            self.state |= {"moving_stddev": ones, "renorm_mean": zeros, "renorm_stddev": ones}
        if self.options["debias"] or self.options["momentum"] is None:
            self.state |= {"seen_mean": zeros, "seen_variance": zeros}

    def outputs(self, inputs):
        """Of each rank, of (x, w, groups of samples); the moments of the groups, over all ranks."""
        found = [
            moments(*(np.concatenate([a[i][g[k]].reshape(-1, CHANNELS) for *a, g in inputs if g]) for i in (0, 1)))
            for k in range(max(len(g) for *_, g in inputs))
        ]
        r, d = 1.0, 0.0
        if self.options["renorm"] and found:
            _, mean, variance, _ = averages(found)
            divisor = np.maximum(self.state["renorm_stddev"], np.sqrt(EPSILON))
            # as the bounds are meant: NaN comes through
            r = np.clip(np.sqrt(variance + EPSILON) / divisor, CLIPS["rmin"], CLIPS["rmax"])
            d = np.clip((mean - self.state["renorm_mean"]) / divisor, -CLIPS["dmax"], CLIPS["dmax"])
        results = []
        for x, _, groups in inputs:
            y = np.empty(x.shape)
            for members, (_, mean, variance, _) in zip(groups, found, strict=False):
                y[members] = (x[members] - mean) / np.sqrt(variance + EPSILON) * r + d
            results.append(y)
        return results, found

    def update(self, groups):
        """One step of the averages, with the moments of these groups."""
        k, old = self.options["momentum"], self.state
        k = k() if callable(k) else k
        count, mean, biased, unbiased = averages(groups)
        variance = unbiased if self.options["bessel_correction"] else biased
        changes = count > 0
        if self.options["skip_nonfinite"]:
            changes = changes & np.isfinite(mean) & np.isfinite(variance)
        new = {}
        if "seen_mean" in old:
            kept, own = (old["seen_mean"], 1.0) if k is None else (k * old["seen_mean"], 1 - k)
            new["seen_mean"] = new["seen_variance"] = kept + own
            k = kept / (kept + own)
        new["moving_mean"] = moved(old["moving_mean"], mean, k)
        new["moving_variance"] = moved(old["moving_variance"], variance, k)
        if self.options["renorm"]:
            sigma = np.sqrt(biased + EPSILON)
            for name, value in (("renorm_mean", mean), ("renorm_stddev", sigma)):
                new[name] = moved(old[name], value, RENORM_MOMENTUM)
            new["moving_stddev"] = moved(old["moving_stddev"], sigma, k)
            new["moving_variance"] = np.maximum(np.where(changes, new["moving_stddev"], 1.0) ** 2 - EPSILON, 0)
        self.state = {name: np.where(changes, new[name], value) for name, value in old.items()}

    def population(self, calls):
        """The statistics of all values of these calls, of each the x and w of all ranks."""
        if self.options["skip_nonfinite"]:
            calls = [(x, np.where((~np.isfinite(x) & (w > 0)).any(0), 0.0, w)) for x, w in calls]
        total, mean, variance, _ = moments(*(np.concatenate(parts) for parts in zip(*calls, strict=True)))
        seen = sum((w > 0).any(0).astype(float) for _, w in calls) if self.options["momentum"] is None else 1.0
        sigma = np.sqrt(variance + EPSILON)
        new = {"moving_mean": mean, "renorm_mean": mean, "moving_stddev": sigma, "renorm_stddev": sigma}
        new |= {"moving_variance": variance, "seen_mean": seen, "seen_variance": seen}
        self.state = {name: np.where(total > 0, new[name], old) for name, old in self.state.items()}


def draw_input(rng, samples, nonfinite):
    """x, the weight of each of its values, and the arguments that say so."""
    x, chosen = rng.normal(rng.choice([0, 5]), 2, (samples, STEPS, CHANNELS)), rng.choice(["all", "mask", "lengths"])
    if nonfinite and samples:
        x[rng.integers(samples), rng.integers(STEPS), rng.integers(CHANNELS)] = rng.choice([np.nan, np.inf])
    weights, arguments = np.ones((samples, STEPS)), {}
    if chosen == "mask":
        weights = rng.integers(0, 3, (samples, STEPS)) / 2
        arguments = {"mask": weights}
    elif chosen == "lengths":
        lengths = rng.integers(0, STEPS + 1, samples)
        weights = (np.arange(STEPS) < lengths[:, None]).astype(float)
        arguments = {"lengths": lengths}
    return x, np.broadcast_to(weights[..., None], x.shape), arguments


def close(found, wanted, what=""):
    """Whether a mean with an infinite value is infinite or NaN depends on how the values are divided."""
    found, wanted = (np.where(np.isfinite(a), a, np.nan) for a in (found, wanted))
    # some hundred roundings of values that are divided by deviations of 0.1
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9, err_msg=what)


def copied(layer, how):
    if how == "pickle":
        return pickle.loads(pickle.dumps(layer))
    if how == "deepcopy":
        return copy.deepcopy(layer)
    given = {"momentum": layer.momentum} if callable(layer.momentum) else {}
    if how == "save":
        with TemporaryDirectory() as folder:
            path = Path(folder) / "layer.npz"
            layer.save(path)
            return type(layer).load(path, **given)
    found = type(layer).from_config(layer.get_config() | given)
    found.build((None, STEPS, CHANNELS), "float64")
    found.set_state(layer.get_state())
    return found


CALLS = ["call", "vjp", "start", "without update", "inference", "accumulate", "exact", "population"]
OTHERS = ["pickle", "deepcopy", "save", "config", "reset", "to", "frozen"]


# renorm, whether averages are debiased or cumulative, skip_nonfinite: of each pair all values, and everything where
# that compiles nothing.
PAIRS = [(False, False, False), (True, True, False), (True, False, True), (False, True, True)]
MIDDLE_STAGES = list(itertools.product((False, True), repeat=3)) if INTERPRETED else PAIRS


@st.composite
def cases(draw):
    renorm, counts, skip = draw(st.sampled_from(MIDDLE_STAGES))
    size = draw(st.sampled_from([None, 2, 3]))
    chosen = draw(st.sampled_from([0.0, 0.9, momentum, *([None] if counts else [])]))
    options = {
        "momentum": chosen,
        "renorm": renorm,
        "debias": counts and (chosen is not None or draw(st.booleans())),
        "skip_nonfinite": skip,
        "bessel_correction": False if renorm else draw(st.booleans()),
    }
    if size is not None:
        options |= {"virtual_batch_size": size, "ragged": draw(st.sampled_from(["last", "spread"]))}
        options["virtual_batch_order"] = draw(st.sampled_from(["interleaved", "contiguous"]))
    actions = draw(st.lists(st.sampled_from(CALLS + OTHERS), min_size=3, max_size=6))
    return options, draw(st.sampled_from([None, 1, 2])), actions, draw(st.integers(0, 2**32 - 1)), draw(st.booleans())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
@pytest.mark.filterwarnings("ignore:the config of:UserWarning")  # leaves out a callable, and the group
def test_any_options_together(case):
    options, size, actions, seed, nonfinite = case
    rng, model, ranks = np.random.default_rng(seed), Model(options), range(size or 1)
    groups = [None] if size is None else nbbn.sync.threads(size, timeout=30)
    cls = nbbn.BatchNormalization if size is None else nbbn.SyncBatchNormalization
    extra = {"renorm_momentum": RENORM_MOMENTUM, "renorm_clipping": CLIPS} if options["renorm"] else {}
    layers = [cls(epsilon=EPSILON, dtype="float64", **options, **extra) for _ in ranks]

    def join():
        for layer, group in zip(layers, groups, strict=True):
            if group is not None:
                layer.group = group

    def call():
        """What each rank gets: x, weights, arguments. In virtual batches all have as many samples, or none."""
        samples = [int(rng.integers(1, 8))] * len(ranks)
        if "virtual_batch_size" not in options:
            samples = [int(n) for n in rng.integers(1, 8, len(ranks))]
        if rng.random() < 0.2:
            samples[-1] = 0
        return [draw_input(rng, n, nonfinite and rng.random() < 0.5) for n in samples]

    def expected(inputs):
        with np.errstate(all="ignore"):
            return model.outputs([(x, w, groups_of(len(x), options)) for x, w, _ in inputs])

    def everywhere(action):
        return list(pool.map(action, ranks))

    def train(action):
        inputs = call()
        wanted, found = expected(inputs)

        def on_rank(rank):
            x, _, arguments = inputs[rank]
            if action == "vjp":
                y, pullback = layers[rank].vjp(x, training=True, **arguments)
                assert pullback(y).inputs.shape == x.shape
                return y
            return layers[rank](x, training=True, update_statistics=action == "call", **arguments)

        if action == "start":
            steps = [la.start(x, **arguments) for la, (x, _, arguments) in zip(layers, inputs, strict=True)]
            longest = max(step.message.size for step in steps)
            sent = np.stack([np.pad(step.message, (0, longest - step.message.size)) for step in steps])
            results = [step.finish(sent) for step in steps]
        else:
            results = everywhere(on_rank)
        for y, right in zip(results, wanted, strict=True):
            close(y, right)
        if action != "without update" and any(len(x) for x, *_ in inputs):
            model.update(found)

    def several(action):
        calls = [call() for _ in range(int(rng.integers(1, 4)))]
        flat = [[np.concatenate([c[i].reshape(-1, CHANNELS) for c in inputs]) for i in (0, 1)] for inputs in calls]
        if not any(w.any() for _, w in flat):
            return
        together = [moments(*(np.concatenate(parts) for parts in zip(*flat, strict=True)))]
        if action == "population":
            with np.errstate(all="ignore"):
                model.population(flat)

        def on_rank(rank):
            layer = layers[rank]
            batches = [(inputs[rank][0], inputs[rank][2]) for inputs in calls]
            if action == "population":
                nbbn.population_statistics(layer, batches, lambda b: layer(b[0], training=True, **b[1]))
                return None
            with nbbn.accumulate(layer) as batch:
                if action == "accumulate":
                    return [layer(x, training=True, **arguments) for x, arguments in batches]
                return [part.finish() for part in [batch.start(x, **arguments) for x, arguments in batches]]

        if action == "population":
            everywhere(on_rank)
            return
        if action == "accumulate":
            wanted = [expected(inputs) for inputs in calls]
            if "virtual_batch_size" in options:
                together = [m for _, found in wanted for m in found]
            outputs = [[ys[rank] for ys, _ in wanted] for rank in ranks]
        else:
            joined = [(*(np.concatenate([c[r][i] for c in calls]) for i in (0, 1)), {}) for r in ranks]
            whole, _ = expected(joined)
            outputs = [np.split(y, np.cumsum([len(c[r][0]) for c in calls])[:-1]) for r, y in enumerate(whole)]
        for found, parts in zip(everywhere(on_rank), outputs, strict=True):
            for y, right in zip(found, parts, strict=True):
                close(y, right)
        model.update(together)

    with ThreadPoolExecutor(len(ranks)) as pool, np.errstate(all="ignore"):
        for layer in layers:
            layer.build((None, STEPS, CHANNELS))
        join()
        for action in actions:
            if action in ("call", "vjp", "start", "without update"):
                train(action)
            elif action in ("accumulate", "exact", "population"):
                if action != "exact" or "virtual_batch_size" not in options:
                    several(action)
            elif action in ("inference", "frozen"):
                x, _, arguments = draw_input(rng, 4, nonfinite)
                for layer in layers:
                    layer.trainable = action == "inference"
                    y = layer(x, training=action == "frozen", **arguments)
                    layer.trainable = True
                    mean, variance = model.state["moving_mean"], model.state["moving_variance"]
                    close(y, (x - mean) / np.sqrt(variance + EPSILON))
            elif action == "reset":
                model.reset()
                for layer in layers:
                    layer.reset_statistics()
            elif action == "to":
                layers = [layer.to("cpu") for layer in layers]
            else:
                layers = [copied(layer, action) for layer in layers]
                join()
            states = [layer.get_state() for layer in layers]
            for state in states:
                assert set(state) == {"gamma", "beta", *model.state}
                for name, value in model.state.items():
                    close(state[name].ravel(), value, f"{name} after {action}")
                    assert state[name].tobytes() == states[0][name].tobytes()
