"""The layer on a GPU, or in Numba's simulator, against the layer on the CPU, whose tests are the oracle's."""

import copy
import pickle

import numpy as np
import pytest
from ml_dtypes import bfloat16

import nbbn
from nbbn.state.variables import COUNTS

pytest.importorskip("numba_cuda", reason="needs the extra cuda")
from numba import cuda

if not cuda.is_available():
    pytest.skip("needs a GPU, or NUMBA_ENABLE_CUDASIM=1", allow_module_level=True)

from nbbn.engine.cuda import engine

# Either side is within a dozen roundings of the exact result, or within one of a 16-bit float.
BOUNDS = {np.dtype(np.float64): 1e-12, np.dtype(np.float32): 2e-5, np.dtype(np.float16): 4e-3}


# The simulator's threads are Python's: a block has a few.
FEW_THREADS = {"threads": 8, "columns": 4, "vectors": 1, "applied": 2}


def few_threads(layer, **choices):
    nbbn.force(layer, thresholds=FEW_THREADS, **choices)
    return layer


def new_layer(*arguments, **options):
    return few_threads(nbbn.BatchNormalization(*arguments, **options))


def host(value):
    return value.copy_to_host() if hasattr(value, "copy_to_host") else value


def device(value):
    return None if value is None else cuda.to_device(value)


def agree(found, expected, name):
    found = np.asarray(host(found))
    assert found.dtype == expected.dtype, name
    bound = BOUNDS.get(expected.dtype, 4e-2)
    np.testing.assert_allclose(found.astype(float), expected.astype(float), rtol=bound, atol=bound, err_msg=name)


def gradients_agree(found, expected):
    for name in expected._fields:
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        pairs = [] if one is None else zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
        for a, b in pairs:
            agree(a, b, name)


class Pair:
    """The same layer twice, and calls of both that must agree."""

    def __init__(self, shape, axis, dtype=np.float32, residual=False, **options):
        self.cpu, self.gpu = nbbn.BatchNormalization(axis=axis, **options), new_layer(axis, **options)
        self.rng, self.shape, self.dtype, self.residual = np.random.default_rng(0), shape, dtype, residual

    def array(self, mean=0.0):
        return self.rng.normal(mean, 1.5, self.shape).astype(self.dtype)

    def check(self, training=True, mask=None, update_statistics=True):
        x, dy, residual = self.array(2.0), self.array(), self.array() if self.residual else None
        options = {"training": training, "mask": mask, "update_statistics": update_statistics}
        y, pullback = self.cpu.vjp(x, residual=residual, **options)
        found, pullback_on_gpu = self.gpu.vjp(device(x), residual=device(residual), **options)
        agree(found, y, "y")
        gradients_agree(pullback_on_gpu(device(dy)), pullback(dy))
        for name, one, other in zip(
            self.cpu._variables.names, self.gpu.get_weights(), self.cpu.get_weights(), strict=True
        ):
            agree(one, other, name)
        return self


CASES = {
    "NCHW": ((4, 3, 2, 4), 1, {}),
    "NHWC": ((3, 2, 2, 8), -1, {}),
    "dense float64": ((5, 3), -1, {"dtype": np.float64}),
    "dense float16": ((5, 8), -1, {"dtype": np.float16}),
    "dense bfloat16": ((5, 8), -1, {"dtype": bfloat16}),
    "two axes": ((2, 3, 2, 3), (1, 3), {}),
    "no canonical view": ((2, 3, 2, 2, 3), (1, 3), {}),
    "renorm": ((5, 3), -1, {"renorm": True, "renorm_clipping": {"rmax": 2.0}}),
    "ghost": ((6, 2, 3), -1, {"virtual_batch_size": 2}),
    "cumulative": ((4, 3), -1, {"momentum": None}),
    "cumulative renorm": ((4, 3), -1, {"momentum": None, "renorm": True}),
    "no gamma, no beta": ((4, 3), -1, {"center": False, "scale": False}),
    "bessel": ((4, 3), -1, {"bessel_correction": True}),
    "relu": ((5, 4), -1, {"activation": "relu"}),
    "residual": ((5, 4), -1, {"residual": True}),
    "residual and relu": ((5, 4), -1, {"residual": True, "activation": "relu"}),
    "adjustment": ((5, 3), -1, {"adjustment": lambda s: (np.full((s[0], 1), 1.5), np.ones((1, s[1])) / 4)}),
}


@pytest.mark.parametrize(("shape", "axis", "options"), CASES.values(), ids=CASES)
def test_training_and_inference(shape, axis, options):
    pair = Pair(shape, axis, **options)
    for training in (True, True, False):
        pair.check(training=training)


def test_a_cumulative_average_counts_where_something_counts():
    """In each channel by itself, on the GPU; what is there can be taken to the host and back."""
    pair = Pair((4, 3), -1, momentum=None).check()
    mask = np.ones((4, 3), np.float32)
    mask[:, 1] = 0
    pair.check(mask=mask).check(update_statistics=False)
    for name in COUNTS:
        np.testing.assert_array_equal(host(pair.gpu._variables[name]), [2, 1, 2])
    pair.gpu.to("cpu").to("cuda")
    pair.check()
    for name in COUNTS:
        np.testing.assert_array_equal(pair.gpu._variables.on_host()[name], pair.cpu._variables[name])


def test_masks():
    mask = np.array([[1, 0], [1, 1], [0, 1], [1, 1]])
    Pair((4, 2, 3), -1).check(mask=mask.astype(bool)).check(mask=mask / 4)


def test_momenta_that_are_set_count_from_the_next_call_on():
    pair = Pair((4, 3), -1, renorm=True).check()
    for layer in (pair.cpu, pair.gpu):
        layer.momentum, layer.renorm_momentum = 0.25, 0.5
    pair.check().check()


def test_a_layer_with_a_dtype_casts_integers():
    pixels = np.arange(12, dtype=np.uint8).reshape(4, 3)
    y, pullback = nbbn.BatchNormalization(dtype="float32").vjp(pixels, training=True)
    found, pullback_on_gpu = new_layer(dtype="float32").vjp(device(pixels), training=True)
    agree(found, y, "y")
    gradients_agree(pullback_on_gpu(found), pullback(y))


def test_a_mask_on_the_gpu():
    pair = Pair((4, 2, 3), -1)
    mask, x = np.array([[1, 0], [1, 1], [0, 1], [1, 1]], np.float32), pair.array()
    agree(pair.gpu(device(x), training=True, mask=device(mask)), pair.cpu(x, training=True, mask=mask), "y")
    with pytest.raises(ValueError, match=r"mask must broadcast .* \(4, 2\) .* received shape \(3, 2\)"):
        pair.gpu(device(x), training=True, mask=device(mask[:3]))
    of_samples = mask[:, 0].copy()
    expected = pair.cpu(x, training=True, mask=of_samples)
    agree(pair.gpu(device(x), training=True, mask=device(of_samples)), expected, "y")


def test_without_an_update_the_statistics_stay():
    pair = Pair((4, 3), -1).check()
    before = pair.gpu.get_weights()
    pair.check(update_statistics=False)
    assert [a.tobytes() for a in before] == [a.tobytes() for a in pair.gpu.get_weights()]


def test_weights_change_in_their_place():
    """Or a captured graph would train what nobody reads."""
    pair = Pair((4, 3), -1).check()
    variables = pair.gpu._variables
    places = variables.params.address, variables.state.address
    pair.check()
    pair.gpu.set_weights(pair.cpu.get_weights())
    pair.gpu.gamma = np.full(3, 2.0)
    assert (variables.params.address, variables.state.address) == places
    np.testing.assert_array_equal(host(pair.gpu.gamma), np.full(3, 2.0))


@pytest.mark.parametrize("training", [False, True])
def test_a_pullback_is_that_of_its_call(training):
    """Whatever has changed since then."""
    pair = Pair((4, 3), -1).check()
    x, dy = pair.array(), pair.array()
    _, pullback = pair.gpu.vjp(device(x), training=training)
    expected = [np.asarray(host(g)) for g in pullback(device(dy))[:3]]
    pair.gpu.set_weights([w + 1 for w in pair.gpu.get_weights()])
    pair.gpu(device(3 * x), training=True)
    for found, value in zip(pullback(device(dy)), expected, strict=False):
        np.testing.assert_array_equal(host(found), value)


def test_out_and_in_place():
    pair = Pair((4, 3), -1)
    x = pair.array()
    expected, out = pair.cpu(x, training=True), device(np.zeros_like(x))
    assert pair.gpu(device(x), training=True, out=out) is out
    agree(out, expected, "out")
    same = device(x)
    agree(pair.gpu(same, training=True, out=same), expected, "in place")


def test_out_that_overlaps_the_input_elsewhere():
    pair = Pair((4, 3), -1)
    memory = pair.rng.normal(size=(5, 3)).astype(np.float32)
    expected = pair.cpu(memory[:4], training=True)
    shared = device(memory)
    out = shared[1:]
    assert pair.gpu(shared[:4], training=True, out=out) is out
    agree(out, expected, "out")


def test_an_empty_batch():
    layer = new_layer()
    y, pullback = layer.vjp(device(np.empty((0, 3), np.float32)), training=True)
    assert host(y).shape == (0, 3)
    np.testing.assert_array_equal(layer.get_weights()[3], np.ones(3))
    found = pullback(device(np.empty((0, 3), np.float32)))
    assert host(found.inputs).shape == (0, 3)
    np.testing.assert_array_equal(host(found.gamma), np.zeros(3))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0)], ids=str)
def test_no_launch_without_a_block(shape, training, monkeypatch):
    """A GPU refuses it, the simulator does not."""
    blocks, launch = [], engine.launch
    monkeypatch.setattr(engine, "launch", lambda *a: blocks.append(a[4]) or launch(*a))
    layer = new_layer()
    y, pullback = layer.vjp(device(np.empty(shape, np.float32)), training=training)
    assert host(y).shape == host(pullback(y).inputs).shape == shape
    layer.vjp(device(np.ones((2, *shape[1:]), np.float32)), training=training)
    assert all(blocks)
    assert blocks or shape[1] == 0


def test_the_state_is_read_where_no_other_thread_can_change_it(monkeypatch):
    """Also where it is not updated in its place: the input's statistics have another dtype."""
    pair = Pair((4, 3), -1, momentum=0.5).check()
    variables = pair.gpu._variables

    class Lock:
        def __enter__(self):  # another thread has had it until now
            place = variables.place
            place.write(variables.state, place.from_host(np.full((2, 3), 8, np.float32)), (2, 3), (0, 1))

        def __exit__(self, *error): ...

    monkeypatch.setattr(variables, "lock", Lock())
    x = np.arange(12.0).reshape(4, 3)
    pair.gpu(device(x), training=True)
    monkeypatch.undo()
    np.testing.assert_allclose(pair.gpu.get_weights()[2], 4 + x.mean(0) / 2, rtol=1e-6)


def test_one_dtype_built_and_another_called():
    pair = Pair((4, 3), -1).check()
    pair.dtype = np.float64
    x = pair.array()
    agree(pair.gpu(device(x), training=True), pair.cpu(x, training=True), "y")
    for one, other in zip(pair.gpu.get_weights(), pair.cpu.get_weights(), strict=True):
        agree(one, other, "weights")


def test_explain():
    layer = new_layer(1)
    text = str(nbbn.explain(layer, device(np.zeros((4, 3, 2, 4), np.float32)), training=True))
    assert text.splitlines() == [
        "dtype         float32; statistics float32, sums in float64",
        "view          R0=4 K0=3 R1=8 K1=1",
        "schedule      values side by side; 4 elements in one access; blocks of 2x4 threads",
        "reduction     by the block that applies",
    ]
    assert not layer.built


# --- Force -------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_explain_is_what_runs(training):
    layer, x = new_layer(1), device(np.zeros((4, 3, 2, 4), np.float32))
    shown = nbbn.explain(layer, x, training=training)
    layer(x, training=training)
    assert list(layer._dispatcher.engine(shown).plans.values()) == [shown]


def test_one_launch_or_two_by_hand():
    """Of training and of its gradient; with other sums that agree."""
    found = {}
    for choice in (None, True, False):
        pair = Pair((4, 3, 2, 4), 1)
        few_threads(pair.gpu, one_pass=choice)
        x = device(np.zeros(pair.shape, np.float32))
        text = str(nbbn.explain(pair.gpu, x, training=True))
        assert ("by the block that applies" in text) == (choice is not False)
        assert not nbbn.explain(pair.gpu, x).schedule.one_launch, "inference reduces nothing"
        pair.check()
        plans = pair.gpu._dispatcher.engine(pair.gpu._variables.params).plans
        found[choice] = {key[0]: plan.schedule.one_launch for key, plan in plans.items()}
    assert found[None] == found[True] == {"train": True, "infer": False, "backward": True}
    assert found[False] == {"train": False, "infer": False, "backward": False}


def test_thresholds_by_hand():
    layer, x = nbbn.BatchNormalization(1), device(np.zeros((4, 3, 2, 4), np.float32))
    nbbn.force(layer, thresholds={"threads": 16, "sums": "float32", "one_launch": 31})
    text = str(nbbn.explain(layer, x, training=True))
    assert "sums in float32, then float64" in text
    assert "blocks of 2x8 threads" in text
    assert "chunks of each statistic" in text
    nbbn.force(layer, thresholds={"threads": 16, "one_launch": 32})
    assert "by the block that applies" in str(nbbn.explain(layer, x, training=True))
    nbbn.force(layer, thresholds={"chunk_elements": 16})  # of the CPU
    with pytest.raises(TypeError, match="chunk_elements"):
        layer(x)


@pytest.mark.parametrize("choice", [{"parallel": True}, {"parallel": False}, {"schedule": "rows"}], ids=str)
def test_choices_that_a_gpu_does_not_have(choice):
    """Are refused by every call on an array of a GPU, before anything changes, and by no other."""
    layer, x = nbbn.BatchNormalization(), np.ones((4, 3), np.float32)
    nbbn.force(layer, **choice)
    ((name, value),) = choice.items()
    for call in (layer, lambda x: layer(x, training=True), layer.vjp, lambda x: nbbn.explain(layer, x)):
        with pytest.raises(ValueError, match=f"{name} cannot be forced on a GPU; received {value!r}"):
            call(device(x))
    assert not layer.built
    assert layer(x).shape == x.shape


# --- where a layer is ------------------------------------------------------------------------


def test_the_first_input_decides_and_to_moves():
    pair = Pair((4, 3), -1)
    assert pair.gpu.device == "cpu"
    pair.check()
    assert pair.gpu.device == "cuda:0"
    weights = pair.gpu.get_weights()
    assert pair.gpu.to("cpu") is pair.gpu
    assert pair.gpu.device == "cpu"
    assert [a.tobytes() for a in pair.gpu.get_weights()] == [a.tobytes() for a in weights]
    nbbn.force(pair.gpu)  # the thresholds of a GPU are none of a CPU's
    x = pair.array()
    np.testing.assert_array_equal(pair.gpu(x), pair.gpu.to("cpu")(x))
    few_threads(pair.gpu.to("cuda"))
    pair.check()


def test_mixing_says_what_to_do():
    pair = Pair((4, 3), -1).check()
    nbbn.force(pair.gpu)  # the thresholds of a GPU are none of a CPU's
    x = pair.array()
    with pytest.raises(ValueError, match=r"on cuda:0; received an array on the host: call to\('cpu'\) first"):
        pair.gpu(x)
    with pytest.raises(ValueError, match=r"on cpu; received an array on cuda:0: call to\('cuda:0'\) first"):
        pair.cpu(device(x))
    before = pair.gpu.get_weights()
    with pytest.raises(TypeError, match="residual must be on the GPU, as the input is; received ndarray"):
        pair.gpu(device(x), training=True, residual=x)
    with pytest.raises(TypeError, match="out must be on the GPU"):
        pair.gpu(device(x), training=True, out=x)
    assert [a.tobytes() for a in before] == [a.tobytes() for a in pair.gpu.get_weights()]


BAD_CALLS = {
    "shape of out": ({"out": np.zeros((2, 3), np.float32)}, ValueError, r"out must have the shape \(4, 3\)"),
    "dtype of out": ({"out": np.zeros((4, 3))}, ValueError, "dtype float32 of the result; .* dtype float64"),
    "residual": ({"residual": np.zeros((4, 2), np.float32)}, ValueError, r"residual must have the input's shape"),
    "dtype of residual": ({"residual": np.zeros((4, 3), int)}, TypeError, "residual must be an array of"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_arguments(arguments, error, message):
    layer = new_layer()
    with pytest.raises(error, match=message):
        layer(device(np.zeros((4, 3), np.float32)), training=True, **{k: device(v) for k, v in arguments.items()})
    assert not layer.built


def test_bad_inputs():
    layer = new_layer()
    with pytest.raises(TypeError, match=r"inputs must be an array of .*; received dtype int64"):
        layer(device(np.zeros((4, 3), np.int64)))
    with pytest.raises(ValueError, match="virtual_batch_size=3 must divide"):
        new_layer(virtual_batch_size=3)(device(np.zeros((4, 3), np.float32)), training=True)
    layer(device(np.zeros((4, 3), np.float32)))
    with pytest.raises(ValueError, match=r"inputs must have the shape \(any, 3\)"):
        layer(device(np.zeros((4, 2), np.float32)))
    with pytest.raises(ValueError, match=r"dy must have the output's shape \(4, 3\); received \(2, 3\)"):
        layer.vjp(device(np.zeros((4, 3), np.float32)))[1](device(np.zeros((2, 3), np.float32)))
    with pytest.raises(RuntimeError, match=r"to\('cuda:7'\) needs a GPU: there (is|are) .*received number 7"):
        layer.to("cuda:7")


def test_out_of_a_gradient_must_not_be_the_input():
    layer, x = new_layer(), device(np.ones((4, 3), np.float32))
    with pytest.raises(ValueError, match=r"out must not share memory with inputs or residual in vjp\(\)"):
        layer.vjp(x, out=x)
    _, pullback = layer.vjp(x)
    with pytest.raises(ValueError, match="out must not share memory with the input"):
        pullback(x, out=x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))], ids=["deepcopy", "pickle"])
def test_copies_stay_on_the_gpu_and_are_others(copied):
    pair = Pair((4, 3), -1).check()
    twin = copied(pair.gpu)
    assert twin.device == "cuda:0"
    before = [a.tobytes() for a in pair.gpu.get_weights()]
    assert before == [a.tobytes() for a in twin.get_weights()]
    twin(device(pair.array()), training=True)
    assert before == [a.tobytes() for a in pair.gpu.get_weights()]


def test_a_file_of_a_layer_on_the_gpu(tmp_path):
    """Its state is copied to the host, where it is loaded; back on the GPU it goes on where it was."""
    layer = new_layer(momentum=None)
    x = device(np.random.default_rng(0).normal(1, 2, size=(4, 3)).astype(np.float32))
    layer(x, training=True)
    layer.save(tmp_path / "layer.npz")
    twin = nbbn.load(tmp_path / "layer.npz")
    assert twin.device == "cpu"
    few_threads(twin.to("cuda"))
    for one in (layer, twin):
        one(x, training=True)
    assert [a.tobytes() for a in layer.get_weights()] == [a.tobytes() for a in twin.get_weights()]
    np.testing.assert_array_equal(twin.get_state()["seen_mean"], [2, 2, 2])
    layer.set_state({n: a + 1 for n, a in twin.get_state().items()})
    np.testing.assert_array_equal(host(layer.seen_variance), [3, 3, 3])


def test_folding_losses_and_constraints():
    layer = new_layer(gamma_regularizer="l2", gamma_constraint="non_neg")
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    layer(device(x), training=True)
    layer.gamma = np.array([1.0, -2.0, 3.0])
    assert layer.losses == pytest.approx([0.01 * 14])
    np.testing.assert_allclose(layer.regularization_gradients().gamma, [0.02, -0.04, 0.06], rtol=1e-6)
    layer.apply_constraints()
    np.testing.assert_array_equal(host(layer.gamma), [1, 0, 3])
    scale, shift = layer.fold()
    np.testing.assert_allclose(host(layer(device(x))), x * scale + shift, rtol=1e-5, atol=1e-6)


def test_the_layers_of_tensorflow_1():
    from nbbn.compat.v1.keras.layers import BatchNormalization

    cpu, gpu = BatchNormalization(), few_threads(BatchNormalization())
    x = np.random.default_rng(0).normal(1, 2, size=(4, 3)).astype(np.float32)
    agree(gpu(device(x), training=True), cpu(x, training=True), "y")
    np.testing.assert_array_equal(gpu.get_weights()[2], np.zeros(3))
    for layer in (cpu, gpu):
        assert len(layer.updates) == 2
        for update in layer.updates:
            update.run()
    for one, other in zip(gpu.get_weights(), cpu.get_weights(), strict=True):
        agree(one, other, "weights")
