"""What every transport must get right: calls of all ranks against one layer on the whole batch."""

from typing import Any, NamedTuple

import numpy as np

import nbbn
from nbbn.sync.exchange import FIRST
from tests.helpers.ranks import bits, check_same_bits, gathered, make, same
from tests.oracle.reference import Reference


class Case(NamedTuple):
    """options: of the layer. sample: the shape of one. mask: "bool", "weights", "lengths" or None."""

    options: dict[str, Any]
    sample: tuple[int, ...] = (5,)
    mask: str | None = None
    residual: bool = False
    adjusted: bool = False

    @property
    def virtual(self):
        return self.options.get("virtual_batch_size")


CLIPS = {"rmin": 0.5, "rmax": lambda: 1.5, "dmax": 0.4}
CASES = {
    "plain": Case({}),
    "bessel": Case({"bessel_correction": True}),
    "renorm": Case({"renorm": True, "renorm_clipping": CLIPS, "renorm_momentum": 0.6}),
    "cumulative": Case({"momentum": None}),
    "mask": Case({}, mask="bool"),
    "weights": Case({"bessel_correction": True}, mask="weights"),
    "adjustment": Case({}, adjusted=True),
    "adjustment, renorm and weights": Case({"renorm": True}, mask="weights", adjusted=True),
    "residual and relu": Case({"activation": "relu"}, residual=True),
    "virtual batch": Case({"virtual_batch_size": 2, "bessel_correction": True}),
    "virtual batch, renorm and mask": Case({"virtual_batch_size": 2, "renorm": True}, mask="bool"),
    "no parameters": Case({"scale": False, "center": False}),
    "axis 1": Case({"axis": 1}, (3, 2, 2)),
    "axis 1, mask": Case({"axis": 1}, (3, 2, 2), mask="bool"),
    "debias": Case({"debias": True}),
    "lengths": Case({"bessel_correction": True}, (4, 3), mask="lengths"),
    "lengths, axis 1": Case({"axis": 1}, (3, 4), mask="lengths"),
    "two messages": Case({}, (FIRST // 4 + 5,), adjusted=True),
    "several axes": Case({"axis": [1, 3]}, (3, 2, 2)),
}
LENGTHS = {
    "even": {2: [6, 6], 3: [4, 4, 4], 4: [3, 3, 3, 3]},
    "uneven": {2: [9, 3], 3: [7, 1, 4], 4: [1, 5, 2, 4]},
    "empty": {2: [0, 12], 3: [5, 0, 7], 4: [0, 6, 0, 6]},
}
# All ranks with data have as many virtual batches.
GHOSTS = {
    "even": {2: [4, 4], 3: [4, 4, 4], 4: [4, 4, 4, 4]},
    "uneven": {2: [4, 4], 3: [0, 0, 4], 4: [4, 0, 0, 0]},
    "empty": {2: [0, 4], 3: [4, 0, 4], 4: [0, 4, 0, 4]},
}


class Batch:
    """The arrays of one call on the whole batch."""

    def __init__(self, case, count, seed, scale=3.0, mean=2.0):
        rng = np.random.default_rng(seed)
        shape = (count, *case.sample)
        self.x, self.dy = rng.normal(mean, scale, shape), rng.normal(size=shape)
        self.residual = rng.normal(size=shape) if case.residual else None
        self.lengths, weights = None, rng.random(shape)
        self.mask = {None: None, "bool": rng.random(count) > 0.3, "weights": weights, "lengths": None}[case.mask]
        if case.mask == "lengths":
            steps = 2 if case.options.get("axis") == 1 else 1
            self.lengths = rng.integers(0, shape[steps] + 1, count)
            self.mask = np.arange(shape[steps]) < self.lengths[:, None]
        self.a, self.b = rng.normal(size=(count, *(1,) * len(case.sample))), rng.normal(size=case.sample)

    def part(self, name, part):
        value = getattr(self, name)
        return None if value is None else value[part]


def start_values(case):
    """gamma and beta (C,), with every kind of sign."""
    count = case.sample[-1] if "axis" not in case.options else 3 if case.options["axis"] == 1 else 6
    return np.linspace(-1.5, 2, count), np.linspace(1, -2, count)


def check_case(group, case, lengths, bound=1e-12):
    """Several steps of a layer whose ranks have `lengths` samples. Returns: a digest of the state."""
    first = sum(lengths[: group.rank])
    part, step = slice(first, first + lengths[group.rank]), {}
    options = {"momentum": 0.7, **case.options}
    whole_options = dict(options)
    if case.virtual:
        whole_options["virtual_batch_size"] = case.virtual * sum(n > 0 for n in lengths)
    if case.adjusted:
        options["adjustment"] = lambda shape: (step["batch"].a[part], step["batch"].b)
        whole_options["adjustment"] = lambda shape: (step["batch"].a, step["batch"].b)
    layer = nbbn.SyncBatchNormalization(**options, group=group)
    layer.build((None, *case.sample), "float64")
    whole = Reference(**whole_options, dtype="float64").build((sum(lengths), *case.sample))
    for name, value in zip(("gamma", "beta"), start_values(case), strict=True):
        setattr(whole, name, value.reshape(whole.parameter_shape))
        if getattr(layer, name) is not None:
            setattr(layer, name, value.reshape(whole.parameter_shape))
    for seed, update in enumerate([True, False, True]):
        batch = step["batch"] = Batch(case, sum(lengths), seed)
        x, mask, residual, own_lengths = (batch.part(n, part) for n in ("x", "mask", "residual", "lengths"))
        mask = None if case.mask == "lengths" else mask
        y, pullback = layer.vjp(x, True, mask, update, residual=residual, lengths=own_lengths)
        found = pullback(batch.dy[part])
        result = whole(batch.x, True, batch.mask, update, batch.residual)
        expected = result.gradients(batch.dy)
        same(y, result.y[part], bound)
        same(found.inputs, expected.inputs[part], bound)
        for name in ("gamma", "beta"):
            one, other = getattr(found, name), getattr(expected, name)
            assert (one is None) == (other is None)
            if one is not None:
                same(gathered(group, one).sum(axis=0), other.ravel(), bound)
        if case.residual:
            same(found.residual, expected.residual[part], bound)
        if case.adjusted:
            same(found.adjustment[0], expected.adjustment[0][part], bound)
            same(gathered(group, found.adjustment[1]).sum(axis=0), expected.adjustment[1].ravel(), bound)
        for name in whole.weight_names:
            same(getattr(layer, name), getattr(whole, name), bound)
        digest = check_same_bits(group, layer)
    y = layer(x)  # inference, by each rank alone
    same(y, whole(batch.x).y[part], bound)
    return digest


def check_every_case(group):
    """All options, of even, uneven and empty ranks. Returns: what the states are, for a comparison of transports."""
    found = {}
    for name, case in CASES.items():
        for kind in LENGTHS:
            lengths = (GHOSTS if case.virtual else LENGTHS)[kind][group.size]
            found[name, kind] = check_case(group, case, lengths)
    return found


def everyone_is_empty(group, options, shape):
    """At the first call, and later."""
    full = np.random.default_rng(0).normal(size=(4, *[max(n, 2) for n in shape[1:]]))
    layer = make(group, **options)
    for _ in range(2):
        y, pullback = layer.vjp(np.empty(shape), True)
        found = pullback(np.empty(shape))
        assert y.shape == found.inputs.shape == shape
        np.testing.assert_array_equal(found.gamma, np.zeros_like(layer.gamma))
    made = nbbn.BatchNormalization(**options)
    made.build(shape, "float64")
    assert bits(layer) == bits(made)
    for _ in range(2):
        y, pullback = layer.vjp(full, True)
        assert np.isfinite(pullback(y).inputs).all()
        before = bits(layer)
        _, pullback = layer.vjp(np.empty(shape), True)
        pullback(np.empty(shape))
        assert bits(layer) == before != bits(made)
        check_same_bits(group, layer)
