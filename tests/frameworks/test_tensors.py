"""PyTorch's tensors on the CPU in the place of NumPy's arrays: what comes in is read where it lies, what goes out is a
tensor. Expected values are those of the same call with NumPy's arrays, which other tests compare with the oracle."""

import ml_dtypes
import numpy as np
import pytest

import nbbn

torch = pytest.importorskip("torch", reason="needs PyTorch (extra: frameworks)")
pytestmark = pytest.mark.frameworks

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
EVERY_FLOAT = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPE = (6, 4, 5, 3)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(2).add(1).to(dtype)


def host(tensor):
    """A copy as a NumPy array."""
    if tensor.dtype is torch.bfloat16:
        return tensor.float().numpy().astype(ml_dtypes.bfloat16)
    return np.array(tensor.numpy())


def check(tensor, expected):
    """A tensor with the bits of NumPy's result."""
    assert type(tensor) is torch.Tensor
    assert not tensor.requires_grad
    assert str(tensor.dtype) == f"torch.{expected.dtype.name}"
    np.testing.assert_array_equal(host(tensor), expected)


@pytest.mark.parametrize(("dtype", "activation"), [*((d, None) for d in DTYPES), (torch.bfloat16, "relu")], ids=str)
def test_a_call_and_its_gradient(dtype, activation):
    """Three times: a first call, one that finds a bound step, and one whose gradient finds one run different code."""
    x, residual, dy = (random(8, 5, dtype=dtype, seed=s) for s in range(3))
    ours, numpys = (nbbn.BatchNormalization(momentum=0.5, activation=activation) for _ in range(2))
    for given in (None, residual) * 3:
        added = None if given is None else host(given)
        check(ours(x, residual=given), numpys(host(x), residual=added))
        y, pullback = ours.vjp(x, training=True, residual=given)
        expected, expected_pullback = numpys.vjp(host(x), training=True, residual=added)
        check(y, expected)
        gradients, expected = pullback(dy), expected_pullback(host(dy))
        for one, other in zip(gradients, expected, strict=True):
            if other is None:
                assert one is None
            else:
                check(one, other)
    np.testing.assert_array_equal(ours.moving_mean, numpys.moving_mean)


@EVERY_FLOAT
def test_out(dtype):
    x, dy = random(8, 5, dtype=dtype), random(8, 5, dtype=dtype, seed=1)
    ours, numpys = nbbn.BatchNormalization(), nbbn.BatchNormalization()
    for _ in range(3):
        out, dx = torch.empty_like(x), torch.empty_like(x)
        y, pullback = ours.vjp(x, training=True, out=out)
        expected, expected_pullback = numpys.vjp(host(x), training=True)
        assert y is out
        check(out, expected)
        assert pullback(dy, out=dx).inputs is dx
        check(dx, expected_pullback(host(dy)).inputs)
        assert ours(x, out=out) is out
        check(out, numpys(host(x)))


def test_out_that_does_not_fit_is_refused():
    x, layer = random(8, 5), nbbn.BatchNormalization()
    with pytest.raises(
        ValueError, match=r"out must have the shape \(8, 5\) and dtype float32.*received shape \(5, 8\)"
    ):
        layer(x, out=torch.empty(5, 8))
    with pytest.raises(ValueError, match="received a broadcast array"):
        layer(x, out=torch.empty(5).expand(8, 5))
    with pytest.raises(ValueError, match=r"out must not share memory with inputs"):
        layer.vjp(x, training=True, out=x)


def test_the_input_is_read_where_it_lies():
    """And not changed; results are memory of their own."""
    x = random(64, 32, 16)
    before, layer = x.clone(), nbbn.BatchNormalization()
    y, pullback = layer.vjp(x, training=True)
    dx = pullback(torch.ones_like(x)).inputs
    assert torch.equal(x, before)
    assert len({t.data_ptr() for t in (x, y, dx)}) == 3
    assert np.shares_memory(nbbn.arrays.view(x), x.numpy())


@pytest.mark.parametrize("training", [False, True])
def test_strided_tensors(training):
    whole = random(8, 6, 10, 7)
    for x in (whole[::2, :, 1:9, ::3], whole.permute(0, 3, 1, 2), whole[:1].expand(4, -1, -1, -1)):
        layer, other = nbbn.BatchNormalization(), nbbn.BatchNormalization()
        np.testing.assert_allclose(
            layer(x, training=training), other(host(x.contiguous()), training=training), rtol=1e-6, atol=1e-6
        )  # another order of memory, and so of the sums


def test_out_may_be_strided():
    x, whole, layer = random(8, 6), torch.zeros(8, 12), nbbn.BatchNormalization()
    for _ in range(2):
        out = whole[:, ::2]
        assert layer(x, training=True, out=out) is out
        check(out, nbbn.BatchNormalization()(host(x), training=True))
        assert not whole[:, 1::2].any()


@EVERY_FLOAT
def test_channels_last_stays_channels_last(dtype):
    x = random(*SHAPE, dtype=dtype).to(memory_format=torch.channels_last)
    layer = nbbn.BatchNormalization(axis=1)
    for training in (False, True):
        y, pullback = layer.vjp(x, training=training, residual=x)
        gradients = pullback(x)
        for result in (y, gradients.inputs, gradients.residual):
            assert result.is_contiguous(memory_format=torch.channels_last)
    plain = nbbn.BatchNormalization(axis=1)
    torch.testing.assert_close(plain(x), plain(x.contiguous()), rtol=0, atol=0)


def test_masks_lengths_and_adjustments():
    x, dy = random(6, 4, 3), random(6, 4, 3, seed=1)
    weights, lengths = torch.rand(6, 4).bfloat16(), torch.tensor([4, 3, 0, 1, 2, 4])
    pair = random(6, 1, 1, seed=2), random(6, 1, 1, seed=3)
    for ours, numpys in (
        ({"mask": weights > 0.5}, {"mask": (weights > 0.5).numpy()}),
        ({"mask": weights}, {"mask": host(weights)}),
        ({"lengths": lengths}, {"lengths": lengths.numpy()}),
    ):
        y, pullback = nbbn.BatchNormalization(adjustment=lambda _: pair).vjp(x, training=True, **ours)
        layer = nbbn.BatchNormalization(adjustment=lambda _: tuple(map(host, pair)))
        expected, expected_pullback = layer.vjp(host(x), training=True, **numpys)
        check(y, expected)
        gradients, expected = pullback(dy), expected_pullback(host(dy))
        check(gradients.inputs, expected.inputs)
        for one, other in zip(gradients.adjustment, expected.adjustment, strict=True):
            check(one, other)


@pytest.mark.parametrize("scalar", [2.0, np.float32(2), torch.tensor(2.0)], ids=["Python", "NumPy", "tensor"])
@pytest.mark.parametrize("x", [random(4, 3), random(0, 3)], ids=["some", "none"])
def test_gradients_of_an_adjustment_by_numbers(x, scalar):
    """Tensors without dimensions."""
    _, pullback = nbbn.BatchNormalization(adjustment=lambda _: (scalar, scalar)).vjp(x, training=True)
    assert [(type(g), g.shape) for g in pullback(x).adjustment] == [(torch.Tensor, ())] * 2


def test_integers_in_a_layer_with_a_dtype():
    x = torch.arange(24).reshape(8, 3)
    for dtype in ("float32", "bfloat16"):
        y, pullback = nbbn.BatchNormalization(dtype=dtype).vjp(x, training=True)
        check(y, nbbn.BatchNormalization(dtype=dtype)(x.numpy(), training=True))
        assert pullback(torch.ones_like(y)).inputs.dtype is y.dtype


def test_the_input_decides_what_results_are():
    """Beside one array of NumPy's there may be tensors, and the other way round."""
    x, residual = random(8, 5), random(8, 5, seed=1)
    layer = nbbn.BatchNormalization()
    for _ in range(2):
        y, pullback = layer.vjp(host(x), training=True, residual=residual)
        assert type(y) is np.ndarray
        assert all(type(a) is np.ndarray for a in pullback(residual) if a is not None)
        y, pullback = layer.vjp(x, training=True, residual=host(residual))
        assert all(type(a) is torch.Tensor for a in (y, *pullback(host(residual))) if a is not None)
    out = torch.empty(8, 5)
    assert layer(host(x), out=out) is out
    check(out, layer(host(x)))


def test_a_call_in_halves():
    x, dy, out = random(8, 5), random(8, 5, seed=1), torch.empty(8, 5)
    whole = nbbn.BatchNormalization()
    expected, pullback = whole.vjp(host(x), training=True)
    layer = nbbn.BatchNormalization()
    step = layer.start(x)
    check(step.finish(step.message[np.newaxis]), expected)
    gradients = step.pulled(step.pull(dy)[np.newaxis])
    for one, other in zip(gradients[:3], pullback(host(dy))[:3], strict=True):
        check(one, other)
    step = layer.start(x, out=out)
    assert step.finish(step.message[np.newaxis]) is out
    step.pull(dy, out=out)


def test_accumulation():
    x, dy = random(8, 5), random(8, 5, seed=1)
    layer, whole = nbbn.BatchNormalization(), nbbn.BatchNormalization()
    with nbbn.accumulate(layer) as batch:
        parts = [batch.start(part) for part in (x[:3], x[3:])]
        y = torch.cat([part.finish() for part in parts])
        for part, upstream in zip(parts, (dy[:3], dy[3:]), strict=True):
            part.pull(upstream)
        dx = torch.cat([part.pulled().inputs for part in parts])
    expected, pullback = whole.vjp(x, training=True)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)  # merged moments have other roundings
    torch.testing.assert_close(dx, pullback(dy).inputs, rtol=1e-5, atol=1e-6)


@EVERY_FLOAT
def test_moments_and_population_statistics(dtype):
    x = random(8, 5, dtype=dtype)
    found, expected = nbbn.Moments().update(x, weights=torch.arange(8)), nbbn.Moments().update(host(x), np.arange(8))
    assert found == expected
    layer, other = nbbn.BatchNormalization(), nbbn.BatchNormalization()
    nbbn.population_statistics(layer, [x, x[:3]], lambda batch: layer(batch, training=True))
    nbbn.population_statistics(other, [host(x), host(x[:3])], lambda batch: other(batch, training=True))
    np.testing.assert_array_equal(layer.moving_variance, other.moving_variance)


def test_functions_without_state():
    nn, x, row = nbbn.nn, random(*SHAPE), random(3).abs()
    calls = {
        "moments": lambda x, row: nn.moments(x, axes=[0, 1]),
        "by keyword": lambda x, row: nn.moments(axes=[0], x=x),
        "weighted": lambda x, row: nn.weighted_moments(x, [0, 1], row),
        "batch_normalization": lambda x, row: nn.batch_normalization(x, row, row, None, row, 1e-3),
        "training": lambda x, row: nn.fused_batch_norm(x, row, row),
        "inference": lambda x, row: nn.fused_batch_norm(x, row, row, row, row, is_training=False),
        "gradient": lambda x, row: nn.fused_batch_norm_grad(x, x, row),
    }
    for call in calls.values():
        found, expected = call(x, row), call(host(x), host(row))
        for one, other in zip(*((r if isinstance(r, tuple) else (r,)) for r in (found, expected)), strict=True):
            check(one, other)
    check(nn.moments(x.bfloat16(), [0])[0], nn.moments(host(x.bfloat16()), [0])[0])


FOLLOWED = {
    "inputs": lambda layer, x, w: layer(w, training=True),
    "out": lambda layer, x, w: layer(x, out=w),
    "residual": lambda layer, x, w: layer(x, residual=w),
    "residual of NumPy's": lambda layer, x, w: layer(host(x), residual=w),
    "mask": lambda layer, x, w: layer(x, training=True, mask=w),
    "dy": lambda layer, x, w: layer.vjp(x, training=True, update_statistics=False)[1](w),
    "start": lambda layer, x, w: layer.start(w),
    "Moments": lambda layer, x, w: nbbn.Moments().update(w),
    "nn, x": lambda layer, x, w: nbbn.nn.moments(w, [0]),
    "nn, an operand": lambda layer, x, w: nbbn.nn.batch_normalization(x, 0.0, 1.0, w, None, 1e-3),
}


@pytest.mark.parametrize("where", FOLLOWED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tensor_that_autograd_follows_is_refused(where, dtype):
    """Its gradient would be lost without a word."""
    layer, x = nbbn.BatchNormalization(), random(8, 5, dtype=dtype)
    for _ in range(2):  # without a bound step, and with one
        layer.vjp(x, training=True)[1](x)
        before = layer.get_weights()
        for followed in (torch.nn.Parameter(x.clone()), x.clone().requires_grad_() * 1):
            with pytest.raises(ValueError, match=r"requires_grad=True must be passed as tensor.detach.*nbbn\.torch"):
                FOLLOWED[where](layer, x, followed)
        for one, other in zip(layer.get_weights(), before, strict=True):
            np.testing.assert_array_equal(one, other)
    with torch.no_grad():
        FOLLOWED[where](layer, x, torch.nn.Parameter(x.abs()))


def test_weights_may_be_parameters():
    module = torch.nn.BatchNorm1d(5)
    with torch.no_grad():
        module.weight.uniform_()
    layer = nbbn.BatchNormalization()
    layer.build((None, 5))
    layer.set_weights([module.weight, module.bias, module.running_mean, module.running_var])
    np.testing.assert_array_equal(layer.gamma, host(module.weight.detach()))
    layer.beta = torch.nn.Parameter(torch.arange(5).bfloat16())
    np.testing.assert_array_equal(layer.beta, np.arange(5))
    assert not np.shares_memory(layer.gamma, module.weight.detach().numpy())
    layer.set_state({name: torch.nn.Parameter(torch.tensor(value)) for name, value in layer.get_state().items()})
    assert nbbn.exchange.from_torch(dict(module.named_parameters()) | dict(module.named_buffers()), ndim=2).built


def test_what_has_no_memory_to_read_is_refused():
    layer = nbbn.BatchNormalization()
    with pytest.raises(ValueError, match=r"layout torch\.sparse_coo"):
        layer(torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match=r"is_neg\(\) True"):
        layer(torch.zeros(3, 3, dtype=torch.complex64).conj().imag)
    with pytest.raises(TypeError, match=r"inputs must be an array of float16.*received dtype complex64"):
        layer(torch.zeros(3, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="at least one dimension"):
        layer(torch.tensor(1.0))


def test_empty_tensors():
    y, pullback = nbbn.BatchNormalization().vjp(torch.empty(0, 5), training=True)
    assert y.shape == pullback(y).inputs.shape == (0, 5)


def test_other_options():
    """Parts of a batch, copies where there is no view, renorm, several axes."""
    x, dy = random(7, 4, 3, 2), random(7, 4, 3, 2, seed=1)
    for options in (
        {"virtual_batch_size": 3, "ragged": "last"},
        {"axis": [1, 3], "virtual_batch_size": 7, "virtual_batch_order": "contiguous"},
        {"axis": [1, 3], "renorm": True},
    ):
        y, pullback = nbbn.BatchNormalization(**options).vjp(x, training=True)
        expected, expected_pullback = nbbn.BatchNormalization(**options).vjp(host(x), training=True)
        check(y, expected)
        for one, other in zip(pullback(dy)[:3], expected_pullback(host(dy))[:3], strict=True):
            check(one, other)
