"""The layer on a GPU, or in Numba's simulator, against the layer on the CPU, whose tests are the oracle's."""

import numpy as np
import pytest
from ml_dtypes import bfloat16

import nbbn
from nbbn.state.variables import COUNTS

pytest.importorskip("numba_cuda", reason="needs the extra cuda")
from numba import cuda

if not cuda.is_available():
    pytest.skip("needs a GPU, or NUMBA_ENABLE_CUDASIM=1", allow_module_level=True)

from nbbn.arrays import numba_cuda
from nbbn.arrays.device import DeviceArray
from nbbn.core.layout import contiguous_strides
from nbbn.core.options import Options
from nbbn.engine.cuda.launching import Launch
from nbbn.engine.dispatcher import Dispatcher
from tests.helpers.on_gpu import Pair, agree, device, few_threads, gradients_agree, host, new_layer

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
    "debias renorm": ((4, 3), -1, {"debias": True, "renorm": True}),
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


def test_a_schedule_of_momenta_is_asked_at_each_training_call():
    momenta = {0: iter([0.25, 0.5]), 1: iter([0.25, 0.5])}
    pair = Pair((4, 3), -1)
    pair.cpu.momentum, pair.gpu.momentum = (lambda: next(momenta[0])), (lambda: next(momenta[1]))
    pair.check().check().check(training=False)
    for asked in momenta.values():
        assert next(asked, None) is None


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, which computes in the simulator
def test_what_is_not_finite_can_be_skipped_in_a_layer():
    """And the statistics go back to their beginning where they lie."""
    pair = Pair((4, 3), -1, renorm=True, momentum=None, skip_nonfinite=True).check()
    x = pair.array()
    x[1, 2] = np.nan
    before, state = pair.gpu.get_state(), pair.gpu._variables.state.address
    pair.cpu(x, training=True), pair.gpu(device(x), training=True)
    assert [n for n, w in pair.gpu.get_state().items() if w[2] != before[n][2]] == []
    pair.check().check(training=False)
    for layer in (pair.cpu, pair.gpu):
        layer.reset_statistics()
    new = nbbn.BatchNormalization(renorm=True, momentum=None)
    new.build((4, 3))
    for one, other in zip(pair.gpu.get_weights()[2:], new.get_weights()[2:], strict=True):
        np.testing.assert_array_equal(one, other)
    assert pair.gpu._variables.state.address == state
    pair.check()


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
    blocks, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda self, *a: blocks.append(self.blocks) or run(self, *a))
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
        "dtype         float32; statistics float32, sums in float32, then float64",
        "view          R0=4 K0=3 R1=8 K1=1",
        "schedule      values side by side; 4 elements in one access; blocks of 2x4 threads",
        "reduction     by the block that applies",
    ]
    assert not layer.built


@pytest.mark.parametrize(
    ("shape", "options", "wide"),
    [
        ((1 << 20, 64), {}, False),
        ((1 << 30, 2), {}, True),
        ((4, 2, 1 << 30), {"axis": 1}, True),
        # the rows of one slice are few, but they are counted through all slices
        (((1 << 31) + (1 << 17), 2, 2), {"virtual_batch_size": 1 << 16, "virtual_batch_order": "contiguous"}, True),
    ],
    ids=["small", "many rows", "long planes", "slices"],
)
def test_indices_have_64_bits_where_32_are_too_few(shape, options, wide):
    """Nothing is computed: there is no such memory, and the simulator's indices have no limit."""
    dtype = np.dtype(np.float16)
    x = DeviceArray(None, numba_cuda, 1 << 20, shape, contiguous_strides(shape, dtype.itemsize), dtype, 0)
    dispatcher = Dispatcher(Options(**{"axis": 1, **options}))
    assert dispatcher.explain(x, "train").variant.wide is wide


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


# -- virtual batches of several sizes, and lengths ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis", "ragged", "order"),
    [
        ((5, 2, 3), 1, "last", "interleaved"),
        ((5, 3, 2), -1, "spread", "contiguous"),
        ((5, 2, 2, 2, 2), [1, 3], "spread", "interleaved"),  # copied
        ((5, 2, 3), 1, "last", "contiguous"),  # slices, of planes
        ((4, 2, 3, 2), [1, 3], "error", "contiguous"),  # and of rows
    ],
)
def test_ragged_virtual_batches(shape, axis, ragged, order):
    options = {"virtual_batch_size": 2, "ragged": ragged, "virtual_batch_order": order, "activation": "relu"}
    Pair(shape, axis, residual=True, **options).check()


def test_slices_of_channels():
    """The first axis and another one are features."""
    Pair((3, 4, 2, 5), [0, 2], residual=True, activation="relu").check()


@pytest.mark.parametrize("on_gpu", [False, True])
def test_lengths(on_gpu):
    pair = Pair((3, 2, 4), 1)
    x, dy, lengths = pair.array(2.0), pair.array(), np.array([4, 0, 1])
    y, pullback = pair.cpu.vjp(x, training=True, lengths=lengths)
    found, pullback_on_gpu = pair.gpu.vjp(device(x), training=True, lengths=device(lengths) if on_gpu else lengths)
    agree(found, y, "y")
    gradients_agree(pullback_on_gpu(device(dy)), pullback(dy))
    agree(pair.gpu.get_weights()[3], pair.cpu.get_weights()[3], "moving_variance")


def test_operands_that_lie_elsewhere_than_before():
    """Eight 16-bit elements are one access, and their float32 operands 32 bytes: the plan of operands that lie at a
    multiple of 32 is none for others. (The simulator fails where a GPU would fault.)"""
    memory = cuda.to_device(np.ones(64, np.float32))
    start = -memory.__cuda_array_interface__["data"][0] % 32 // 4 if hasattr(memory, "__cuda_array_interface__") else 0
    layer, x = new_layer(-1), device(np.ones((2, 8), np.float16))
    for offset in (start, start + 4):
        layer(x, training=True, mask=memory[offset : offset + 16].reshape(2, 8))
