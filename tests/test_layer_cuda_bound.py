"""On a GPU, too, a call like an earlier one takes a bound step, the short way; it must be the same in all but time."""

import pickle

import numpy as np
import pytest

import nbbn

pytest.importorskip("numba_cuda", reason="needs the extra cuda")
from numba import cuda

if not cuda.is_available():
    pytest.skip("needs a GPU, or NUMBA_ENABLE_CUDASIM=1", allow_module_level=True)

from nbbn.engine.cuda.engine import CudaEngine
from nbbn.engine.cuda.launching import Launch
from tests.helpers.engines import forgetful
from tests.helpers.on_gpu import device, few_threads, host, new_layer

RNG = np.random.default_rng(3)
X, X2, DY = (RNG.normal(1, 2, (4, 6)).astype(np.float32) for _ in range(3))


@pytest.fixture
def general(monkeypatch):
    """The names of the steps that have been found and run in the general way."""
    names, launch = [], CudaEngine._launch
    monkeypatch.setattr(
        CudaEngine, "_launch", lambda self, plan, step: names.append(step.name) or launch(self, plan, step)
    )
    return names


def twin_of(layer):
    """A copy that never takes the short way, with the same choices."""
    return forgetful(pickle.loads(pickle.dumps(layer)))


def bits(found):
    return [None if a is None else (host(a).dtype, host(a).shape, host(a).tobytes()) for a in found]


def step(layer, x, dy, residual, **options):
    """Everything that calls of a layer return, and its weights."""
    beside = {} if residual is None else {"residual": device(residual)}
    y, pullback = layer.vjp(device(x), training=True, **beside, **options)
    found = pullback(device(dy))
    inference = layer(device(x), **beside)
    return bits([y, found.inputs, found.gamma, found.beta, found.residual, inference, *layer.get_weights()])


CASES = {
    "dense": ((4, 6), -1, {}, False),
    "image": ((2, 3, 2, 2), 1, {}, True),
    "several axes": ((2, 3, 2, 2), [1, 3], {}, False),
    "ghost": ((4, 6), -1, {"virtual_batch_size": 2}, False),
    "relu": ((4, 6), -1, {"activation": "relu"}, True),
    "renorm": ((4, 6), -1, {"renorm": True, "renorm_clipping": {"rmax": 2.0}}, False),
    "debias": ((4, 6), -1, {"debias": True, "skip_nonfinite": True}, False),
    "without gamma": ((4, 6), -1, {"scale": False}, True),
}


@pytest.mark.parametrize("one_pass", [True, False], ids=["one launch", "two launches"])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, np.float32) for case in CASES), ("dense", np.float64), ("relu", np.float16)],
    ids=lambda v: v if isinstance(v, str) else np.dtype(v).name,
)
def test_the_same_bits_and_the_same_state(case, dtype, one_pass, general):
    shape, axis, options, residual = CASES[case]
    layer = few_threads(nbbn.BatchNormalization(axis, momentum=0.5, **options), one_pass=one_pass)
    xs = [RNG.normal(1, 2, shape).astype(dtype) for _ in range(4)]
    added = xs[3] if residual else None
    step(layer, xs[0], xs[1], added)
    twin = twin_of(layer)
    for x in xs[1:3]:
        general.clear()
        found = step(layer, x, xs[0], added)
        assert general == []
        assert found == step(twin, x, xs[0], added)
        assert general == ["train", "backward", "infer"]


def test_a_dense_input_in_another_order(general):
    layer, xs = new_layer(1), [np.asfortranarray(RNG.normal(size=(2, 4, 3)).astype(np.float32)) for _ in range(3)]
    step(layer, xs[0], xs[1], None)
    twin = twin_of(layer)
    general.clear()
    found = step(layer, xs[1], xs[2], None)
    assert general == []
    assert found == step(twin, xs[1], xs[2], None)
    assert layer(device(xs[1])).strides == xs[1].strides


@pytest.mark.parametrize(("one_pass", "launches"), [(True, 1), (False, 2)])
def test_what_a_repeated_call_does(one_pass, launches, monkeypatch, general):
    """One launch for inference, one or two for training and its gradient; no plan, and no memory but results and one
    scratch."""
    layer, x, dy = few_threads(nbbn.BatchNormalization(), one_pass=one_pass), device(X), device(DY)
    layer(x), layer.vjp(x, training=True)[1](dy)
    engine = layer._dispatcher.engine(layer._variables.params)
    assert len(engine.plans) == 3, "binding plans nothing"
    plans, library, done, run = dict(engine.plans), layer._variables.place.library, [], Launch.run

    def note(what, function):
        return lambda *given: done.append(what) or function(*given)

    monkeypatch.setattr(Launch, "run", note("launch", run))
    for name in ("empty", "empty_like", "from_host", "to_host", "astype"):
        monkeypatch.setattr(library, name, note(name, getattr(library, name)))
    general.clear()
    y = layer(x)
    assert done == ["empty_like", "launch"]
    done.clear()
    _, pullback = layer.vjp(x, training=True)
    assert done == ["empty_like", "empty", "empty"] + ["launch"] * launches  # y, saved, scratch
    done.clear()
    pullback(dy)
    assert done == ["empty_like", "empty", "empty"] + ["launch"] * launches  # dx, those of the parameters, scratch
    done.clear()
    assert layer(x, out=y) is y
    assert done == ["launch"]
    assert general == []
    assert engine.plans == plans


def misaligned(x):
    """The same numbers one element further on."""
    memory = device(np.empty(x.size + 1, x.dtype))[1:].reshape(x.shape)
    memory[:] = device(x)
    return memory


OTHERS = {  # inputs that the short way leaves to the general one
    "misaligned": misaligned,
    "with gaps": lambda x: device(np.repeat(x, 2, axis=1))[:, ::2],
    "another order": lambda x: device(np.asfortranarray(x)),
    "another dtype": lambda x: device(x.astype(np.float64)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_inputs(kind, general):
    layer = new_layer(momentum=0.5)
    step(layer, X, DY, None)
    twin, make, steps = twin_of(layer), OTHERS[kind], dict(layer._dispatcher.bound)
    general.clear()
    found, expected = (one(make(X2), training=True) for one in (layer, twin))
    assert general == ["train"] * 2
    assert bits([found, *layer.get_weights()]) == bits([expected, *twin.get_weights()])
    assert {key: layer._dispatcher.bound[key] for key in steps} == steps, "none has taken another's place"


@pytest.mark.parametrize("kind", OTHERS)
def test_other_arrays_beside_the_input(kind, general):
    layer, make = new_layer(momentum=0.5, activation="relu"), OTHERS[kind]
    step(layer, X, DY, X2)
    twin = twin_of(layer)
    general.clear()
    found = [one.vjp(device(X), training=True, residual=make(X2)) for one in (layer, twin)]
    assert general == ["train"] * 2
    (y, pullback), (expected, pullback_of_twin) = found
    assert bits([y]) == bits([expected])
    general.clear()
    assert bits(pullback(make(DY))[:3]) == bits(pullback_of_twin(make(DY))[:3])
    assert general == ["backward"] * 2


def test_an_output_in_the_place_of_an_input(general):
    layer = new_layer()
    expected = host(layer(device(X), residual=device(X2)))
    for name in ("inputs", "residual"):
        given = {"inputs": device(X), "residual": device(X2)}
        general.clear()
        assert layer(**given, out=given[name]) is given[name]
        assert general == ["infer"]
        assert host(given[name]).tobytes() == expected.tobytes()
    memory = device(np.zeros(28, np.float32))
    x = memory[:24].reshape(4, 6)
    x[:] = device(X)
    overlapping = memory[4:].reshape(4, 6)
    layer(x)
    general.clear()
    y = layer(x, out=overlapping)
    assert general == ["infer"]
    assert host(y).tobytes() == host(layer(device(X))).tobytes()


ERRORS = {
    "shape of out": ({"out": np.zeros((2, 6), np.float32)}, ValueError, "out must have the shape"),
    "dtype of out": ({"out": np.zeros((4, 6))}, ValueError, "dtype float32 of the result"),
    "shape of residual": ({"residual": np.zeros((4, 2), np.float32)}, ValueError, "residual must have the input's"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_are_those_of_a_first_call(arguments, error, message):
    layer = new_layer()
    step(layer, X, DY, None), step(layer, X, DY, X2)
    before = bits(layer.get_weights())
    with pytest.raises(error, match=message):
        layer(device(X), training=True, **{name: device(a) for name, a in arguments.items()})
    with pytest.raises(TypeError, match="residual must be on the GPU"):
        layer(device(X), training=True, residual=X)
    x = device(X)
    with pytest.raises(ValueError, match="out must not share memory with inputs"):
        layer.vjp(x, training=True, out=x)
    assert bits(layer.get_weights()) == before
    _, pullback = layer.vjp(x, training=True)
    pullback(device(DY))
    for dy, fault, what in ((DY, TypeError, "dy must be on the GPU"), (device(DY[:2]), ValueError, "dy must have")):
        with pytest.raises(fault, match=what):
            pullback(dy)
    with pytest.raises(ValueError, match="out must not share memory with the input"):
        pullback(device(DY), out=x)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_mask_goes_the_general_way(on_gpu, general):
    layer, mask = new_layer(momentum=0.5), np.array([True, False, True, True])
    for x in (X, X2, X):
        step(layer, x, DY, None)
        general.clear()
        found = layer(device(x), training=True, mask=device(mask) if on_gpu else mask)
        assert general == ["train"]
        expected = nbbn.BatchNormalization(momentum=0.5)(x, training=True, mask=mask)
        np.testing.assert_allclose(host(found), expected, rtol=1e-5, atol=1e-5)


def test_whoever_leaves_the_statistics_alone(general):
    layer = new_layer()
    step(layer, X, DY, None)
    before, state = bits(layer.get_weights()), layer._variables.state
    general.clear()
    layer(device(X2), training=True, update_statistics=False)
    assert bits(layer.get_weights()) == before
    layer(device(X2), training=True)
    assert layer._variables.state is state, "it is changed in its place"
    assert bits(layer.get_weights()) != before
    assert general == []


def test_whoever_collects_moments(general):
    """The state stays, and the moments are those of the call."""
    layer, twin = new_layer(momentum=0.5), new_layer(momentum=0.5)
    for one in (layer, twin):
        one(device(X), training=True)
    general.clear()
    with nbbn.accumulate(layer):
        layer(device(X2), training=True)
    assert general == []
    twin(device(X2), training=True)
    for one, other in zip(layer.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_layer_that_has_been_moved(general):
    """Its step is for variables that it no longer has."""
    layer = new_layer(momentum=0.5)
    step(layer, X, DY, None)
    twin = twin_of(layer)
    layer.to("cpu").to("cuda")
    general.clear()
    found = step(layer, X2, DY, None)
    assert general == ["train", "backward", "infer"]
    assert found == step(twin, X2, DY, None)
    general.clear()
    assert step(layer, X, DY, None) == step(twin, X, DY, None)
    assert general == ["train", "backward", "infer"], "of the twin"


def test_options_that_have_been_changed(general):
    layer = new_layer(momentum=0.5)
    step(layer, X, DY, None)
    layer.momentum = 0.25
    for x in (X, X2):
        twin = twin_of(layer)
        general.clear()
        found = step(layer, x, DY, None)
        assert general == ([] if x is X2 else ["train", "backward", "infer"])
        assert found == step(twin, x, DY, None)
    layer.momentum = lambda: 0.75  # is asked in every call
    for x in (X, X2):
        general.clear()
        step(layer, x, DY, None)
        assert general == ["train", "backward", "infer"]


def test_weights_that_have_been_set(general):
    layer = new_layer()
    step(layer, X, DY, None)
    layer.set_weights([w + 1 for w in layer.get_weights()])
    twin = twin_of(layer)
    general.clear()
    found = step(layer, X2, DY, None)
    assert general == []
    assert found == step(twin, X2, DY, None)
