"""Arrays of every library, as they are: what comes back, and whose memory it is."""

import numpy as np
import pytest

import nbbn

SHAPE = (8, 12, 10)
X = np.random.default_rng(0).normal(3, 2, SHAPE).astype(np.float32)


class ByDlpack:
    """A tensor that shows nothing but DLPack's methods."""

    def __init__(self, tensor):
        self.tensor = tensor
        self.__dlpack_device__, self.__dlpack__ = tensor.__dlpack_device__, tensor.__dlpack__


class ByInterface:
    """A tensor that shows nothing but __cuda_array_interface__."""

    def __init__(self, tensor):
        self.tensor, self.__cuda_array_interface__ = tensor, tensor.__cuda_array_interface__


def in_torch(array):
    return pytest.importorskip("torch").tensor(array, device="cuda")


def in_numba(array):
    from numba import cuda

    return cuda.to_device(array)


def in_jax(array):
    jax = pytest.importorskip("jax", reason="needs a JAX with CUDA")
    if jax.default_backend() != "gpu":
        pytest.skip("needs a JAX that sees the GPU")
    return jax.numpy.asarray(array)


MAKERS = {
    "torch": in_torch,
    "cupy": lambda a: pytest.importorskip("cupy", reason="needs CuPy").asarray(a),
    "jax": in_jax,
    "numba": in_numba,
    "DLPack": lambda a: ByDlpack(in_torch(a)),
    "__cuda_array_interface__": lambda a: ByInterface(in_torch(a)),
}
FOREIGN = ("DLPack", "__cuda_array_interface__")


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def host(array):
    from nbbn.arrays import as_numpy

    return as_numpy(array, "array")


def trained(x, **options):
    layer = nbbn.BatchNormalization(axis=1, momentum=0.5, **options)
    y, pullback = layer.vjp(x, training=True)
    return layer, y, pullback


def test_results_are_of_the_inputs_library(make):
    """Or Numba's, where the library cannot be asked for memory. float32: a few roundings."""
    x = make(X)
    layer, y, pullback = trained(x)
    right, expected, right_pullback = trained(X)
    kind = type(x) if not isinstance(x, (ByDlpack, ByInterface)) else type(in_numba(X))
    gradients, right_gradients = pullback(x), right_pullback(X)
    for found in (y, layer(x), gradients.inputs, gradients.gamma, layer.gamma, layer.moving_mean):
        assert isinstance(found, kind)
    np.testing.assert_allclose(host(y), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(host(layer(x)), right(X), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(host(gradients.inputs), right_gradients.inputs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(host(gradients.gamma), right_gradients.gamma, rtol=1e-5, atol=1e-4)
    for w, e in zip(layer.get_weights(), right.get_weights(), strict=True):
        assert type(w) is np.ndarray
        np.testing.assert_allclose(w, e, rtol=1e-5)
    np.testing.assert_array_equal(host(x), X)


def test_many_calls_in_a_row_keep_their_order(make):
    """Each reads what the one before has written."""
    x = make(X)
    layer, right = (nbbn.BatchNormalization(axis=1, momentum=0.5) for _ in range(2))
    y, expected = x, X
    for _ in range(10):
        y, expected = layer(y, training=True), right(expected, training=True)
    np.testing.assert_allclose(host(y), expected, rtol=1e-4, atol=1e-4)  # ten times a few roundings of float32


@pytest.mark.parametrize("name", ["torch", "cupy", "numba", *FOREIGN])
def test_out_is_written_to(name):
    x, out = MAKERS[name](X), MAKERS[name](np.zeros_like(X))
    layer = nbbn.BatchNormalization(axis=1)
    assert layer(x, out=out) is out
    expected = nbbn.BatchNormalization(axis=1)(X)
    np.testing.assert_allclose(host(out), expected, rtol=1e-5, atol=1e-5)
    assert layer(x, out=x) is x
    np.testing.assert_allclose(host(x), expected, rtol=1e-5, atol=1e-5)


def test_jaxs_arrays_do_not_change():
    x = in_jax(X)
    with pytest.raises((TypeError, ValueError), match="out"):
        nbbn.BatchNormalization(axis=1)(x, out=x)
    np.testing.assert_array_equal(host(x), X)


def test_no_view_means_a_copy(make):
    """Five alternating runs have no canonical view."""
    values = np.random.default_rng(1).normal(size=(2, 3, 4, 5, 2)).astype(np.float32)
    layer, right = (nbbn.BatchNormalization(axis=[1, 3]) for _ in range(2))
    np.testing.assert_allclose(host(layer(make(values), training=True)), right(values, training=True), atol=1e-5)


def test_memory_is_pytorchs(torch):
    """Outputs come from its allocator, and what a call needs beside them goes back there."""
    layer, x = nbbn.BatchNormalization(axis=1), in_torch(X)
    layer(x, training=True)
    before = torch.cuda.memory_allocated()
    y = layer(x, training=True)
    assert torch.cuda.memory_allocated() - before == -(-y.nbytes // 512) * 512
    del y
    assert torch.cuda.memory_allocated() == before


def test_autograd_is_not_lost_silently(torch):
    x = in_torch(X).requires_grad_()
    layer = nbbn.BatchNormalization(axis=1)
    with pytest.raises(ValueError, match=r"tensor\.detach\(\)"):
        layer(x)
    assert layer(x.detach()).requires_grad is False
    with torch.no_grad():
        layer(x)


def test_there_and_back(torch):
    x = in_torch(X)
    layer = nbbn.BatchNormalization(axis=1)
    layer(x, training=True)
    expected = layer(x).cpu().numpy()
    with pytest.raises(ValueError, match="cuda:0"):
        layer(X)
    np.testing.assert_allclose(layer.to("cpu")(X), expected, rtol=1e-5, atol=1e-5)
    assert type(layer.gamma) is np.ndarray
    assert torch.equal(layer.to("cuda")(x).cpu(), torch.from_numpy(expected))


def test_what_the_host_gives_is_taken_there(torch):
    """A mask, and an adjustment; the residual must be where the input is."""
    mask = np.random.default_rng(2).random((8, 10)) > 0.3
    for m in (mask, torch.tensor(mask, device="cuda")):
        layer, right = (nbbn.BatchNormalization(axis=1) for _ in range(2))
        y, expected = layer(in_torch(X), training=True, mask=m), right(X, training=True, mask=mask)
        np.testing.assert_allclose(y.cpu().numpy(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="residual must be on the GPU"):
        layer(in_torch(X), residual=X)


@pytest.mark.parametrize("kind", ["mask", "weights", "lengths", "adjustment", "ragged"])
def test_what_stands_beside_the_input(make, kind):
    """Of the host and of the input's library, of any dtype."""
    rng = np.random.default_rng(2)
    mask, lengths, a = rng.random((8, 10)) > 0.3, rng.integers(0, 11, 8), rng.uniform(0.5, 2, (8, 1, 1))
    for put in (np.asarray, make):
        beside = {"mask": ("mask", mask), "weights": ("mask", mask * 2), "lengths": ("lengths", lengths)}.get(kind)
        options, right_options = {}, {}
        if kind == "adjustment":
            pair = [put(v.astype(np.float32)) for v in (a, a[:1, 0])]
            options, right_options = {"adjustment": lambda s, pair=pair: pair}, {"adjustment": lambda s: (a, a[:1, 0])}
        if kind == "ragged":
            options = right_options = {"virtual_batch_size": 3, "ragged": "last"}
        found, expected = (
            nbbn.BatchNormalization(axis=1, **given).vjp(
                array, training=True, **({} if beside is None else {beside[0]: giving(beside[1])})
            )
            for given, array, giving in ((options, make(X), put), (right_options, X, np.asarray))
        )
        np.testing.assert_allclose(host(found[0]), expected[0], rtol=1e-5, atol=1e-5)
        gradients, right = found[1](make(X)), expected[1](X)
        np.testing.assert_allclose(host(gradients.inputs), right.inputs, rtol=1e-4, atol=1e-4)
        for one, other in zip(gradients.adjustment or (), right.adjustment or (), strict=True):
            np.testing.assert_allclose(host(one), other, rtol=1e-4, atol=1e-3)


def test_functions_without_state(make):
    x, ones = make(X.reshape(8, 12, 10, 1)), np.ones(12, np.float32)
    for function, arguments in (
        (nbbn.nn.moments, ([0, 2, 3],)),
        (nbbn.nn.moments, ([0, 1, 2, 3],)),
        (nbbn.nn.weighted_moments, ([0, 2, 3], np.arange(10).reshape(10, 1))),
        (nbbn.nn.batch_normalization, (2.0, 3.0, ones.reshape(12, 1, 1), None, 1e-3)),
    ):
        found, expected = function(x, *arguments), function(X.reshape(8, 12, 10, 1), *arguments)
        pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
        for one, other in pairs:
            np.testing.assert_allclose(host(one), other, rtol=1e-5, atol=1e-5)
    found = nbbn.nn.fused_batch_norm(x, ones, make(ones), data_format="NCHW")
    expected = nbbn.nn.fused_batch_norm(X.reshape(8, 12, 10, 1), ones, ones, data_format="NCHW")
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(host(one), other, rtol=1e-5, atol=1e-5)
