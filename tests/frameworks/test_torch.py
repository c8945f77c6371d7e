"""nbbn.torch's modules and function against PyTorch's own, on PyTorch's own samples, and against nbbn's layer."""

import copy
import io
import itertools
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import nbbn
import nbbn.torch

pytestmark = pytest.mark.frameworks

KINDS = {
    nn.BatchNorm1d: nbbn.torch.BatchNorm1d,
    nn.BatchNorm2d: nbbn.torch.BatchNorm2d,
    nn.BatchNorm3d: nbbn.torch.BatchNorm3d,
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INFOS = [info for info in module_db if info.module_cls in KINDS]
EVERY_INFO = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.module_cls.__name__)


def tolerance(dtype):
    """PyTorch sums in the dtype of parameters where that is a 16-bit one: two or three of its digits."""
    return {"rtol": 5e-2, "atol": 5e-2} if dtype.itemsize == 2 else {}


def rounding(dtype):
    """Beside float32, where PyTorch's own 16-bit gradients can be ten times as far from it: two roundings."""
    return {"rtol": 2**-7, "atol": 2**-7} if dtype.itemsize == 2 else {}


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def run(module, x, dy, *beside):
    """The output, and the gradients of what is differentiable."""
    x, *beside = (leaf(t) for t in (x, *beside))
    y = module(x, *beside)
    y.backward(dy)
    found = [y.detach(), x.grad, *(t.grad for t in beside), *(p.grad for p in module.parameters())]
    module.zero_grad()
    return found


# -- PyTorch's samples ----------------------------------------------------------------------------------------------


@EVERY_INFO
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_of_modules(info, training, dtype):
    samples = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=training)
    assert len(samples) >= 6
    for sample in samples:
        args, kwargs, (x,) = sample.constructor_input.args, sample.constructor_input.kwargs, sample.forward_input.args
        ours, theirs = (c(*args, **kwargs).to(dtype).train(training) for c in (KINDS[info.module_cls], info.module_cls))
        wide = torch.float32 if dtype.itemsize == 2 else dtype
        theirs = theirs.to(wide)
        for _ in range(2):  # a module may call the first input otherwise than one like an earlier one
            dy = torch.randn_like(x)
            found, right = run(ours, x, dy), run(theirs, x.to(wide), dy.to(wide))
            assert {t.dtype for t in found} == {dtype}
            assert_close(found, right, check_dtype=False, **rounding(dtype))
            assert_close(ours.state_dict(), theirs.state_dict(), check_dtype=False, **rounding(dtype))


@EVERY_INFO
def test_samples_of_errors(info):
    samples = info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True)
    assert samples
    for sample in samples:
        made = sample.module_error_input.constructor_input
        module = KINDS[info.module_cls](*made.args, **made.kwargs)
        with pytest.raises(sample.error_type, match=re.escape(sample.error_regex)):
            module(*sample.module_error_input.forward_input.args)


def test_samples_of_the_function():
    infos = [op for op in op_db if op.name == "nn.functional.batch_norm" and op.dtypes]
    samples = [(s, dtype) for op in infos for dtype in op.dtypes for s in op.sample_inputs("cpu", dtype)]
    assert len(samples) >= 40
    for sample, dtype in samples:
        found = []
        for function in (nbbn.torch.functional.batch_norm, nn.functional.batch_norm):
            x, args, kwargs = copy.deepcopy((sample.input, sample.args, sample.kwargs))
            leaves = [x, *(kwargs.get(n) for n in ("weight", "bias")), *args[2:4]]
            leaves = [t.requires_grad_() for t in leaves if isinstance(t, torch.Tensor)]
            y = function(x, *args, **kwargs)
            gradients = torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
            found.append((y, gradients, [t for t in args[:2] if t is not None]))
        assert_close(*found, **tolerance(dtype))


# -- like torch.nn's ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"track_running_stats": False}, {"bias": False}, {"momentum": None}, {"momentum": 0.9}],
    ids=str,
)
@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4)])
def test_steps_are_pytorchs(options, shape):
    ours, theirs = (c(3, **options) for c in (nbbn.torch.BatchNorm1d, nn.BatchNorm1d))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for _ in range(3):
        x, dy = torch.randn(2, *shape)
        assert_close(run(ours, x, dy), run(theirs, x, dy))
        with torch.no_grad():
            assert_close(ours(x), theirs(x))
    assert_close(ours.state_dict(), theirs.state_dict())
    ours.eval(), theirs.eval()
    assert_close(run(ours, x, dy), run(theirs, x, dy))
    with torch.no_grad():
        assert_close(ours(x), theirs(x))
    with torch.inference_mode():
        assert_close(ours(x), theirs(x))


LAYOUTS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "flipped by batch": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "negated": lambda x: torch._neg_view(-x),
    "expanded": lambda x: x[:1].expand(*x.shape),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("relu", [False, True])
def test_memory_formats(name, relu):
    x, residual, dy = torch.randn(3, 6, 4, 5, 3)
    theirs, ours = nn.BatchNorm2d(4), nbbn.torch.BatchNorm2d(4, activation="relu" if relu else None)

    def plain(x, residual):
        y = theirs(x) + residual
        return y.relu() if relu else y

    for order in LAYOUTS.values():  # of the residual and of the gradient
        for _ in range(2):
            a, b = (leaf(LAYOUTS[name](x)) for _ in "ab")
            # leaf() copies: what is tested must not be a copy
            given = LAYOUTS[name](a) if name != "expanded" else a
            ra, rb = (leaf(order(residual)) for _ in "ab")
            y, expected = ours(given, ra), plain(LAYOUTS[name](b) if name != "expanded" else b, rb)
            y.backward(order(dy)), expected.backward(order(dy))
            assert_close((y, a.grad, ra.grad), (expected, b.grad, rb.grad))
            assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-5, atol=1e-5)
    assert_close(ours.state_dict(), theirs.state_dict())
    if name == "channels last":
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_tensors_may_be_replaced():
    """What is kept of a module's tensors is only good while they are where they were."""
    ours, theirs = nbbn.torch.BatchNorm1d(4), nn.BatchNorm1d(4)

    def same():
        x, dy = torch.randn(2, 6, 4, dtype=ours.weight.dtype)
        assert_close(run(ours, x, dy), run(theirs, x, dy))
        assert_close(ours.state_dict(), theirs.state_dict())

    changes = [
        lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
        lambda m: m.double(),
        lambda m: m.float(),
        lambda m: setattr(m, "momentum", 0.5),
        lambda m: setattr(m, "eps", 0.1),
        lambda m: setattr(m, "weight", nn.Parameter(torch.arange(4.0))),
        lambda m: setattr(m.bias, "data", torch.arange(4.0)),
        lambda m: setattr(m, "running_var", torch.arange(8.0)[::2] + 1),
        lambda m: m.reset_parameters(),
        lambda m: setattr(m, "bias", None),
    ]
    same()
    for change in changes:
        change(ours), change(theirs)
        same()


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parametrized_weights():
    x, dy = torch.randn(2, 6, 4)
    found = []
    for kind in (nbbn.torch.BatchNorm1d, nn.BatchNorm1d):
        module = kind(4)
        module(x)
        parametrize.register_parametrization(module, "weight", Doubled())
        found.append(run(module, x, dy))
    assert_close(*found)


def test_modules_of_inference_mode():
    with torch.inference_mode():
        ours, theirs = nbbn.torch.BatchNorm1d(3), nn.BatchNorm1d(3)
        for _ in range(3):
            x = torch.randn(5, 3)
            assert_close(ours(x), theirs(x))
        assert_close(ours.state_dict(), theirs.state_dict())


def test_what_autograd_says():
    """Of a second backward pass, and of an input that was changed."""
    module, x = nbbn.torch.BatchNorm1d(3), torch.randn(5, 3, requires_grad=True)
    for _ in range(2):
        y = module(x)
        y.sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            y.sum().backward()
        changed = x * 1
        y = module(changed)
        changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        torch.relu_(module(x)).sum().backward()


@pytest.mark.parametrize("operands", [{}, {"mask": torch.ones(5, dtype=torch.bool)}], ids=["alone", "mask"])
@pytest.mark.parametrize("order", [1, 2])
def test_a_bias_that_was_changed(operands, order):
    """No gradient depends on it, as in torch.nn, unless there is an activation."""
    x, dy = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)

    def derivatives(module, change):
        own = x.clone().requires_grad_()
        y = module(own, **(operands if isinstance(module, nbbn.torch.BatchNorm1d) else {}))
        with torch.no_grad():
            module.bias.add_(change)
        wanted = own, module.weight, module.bias
        first = torch.autograd.grad(y, wanted, dy, create_graph=order == 2)
        return first if order == 1 else torch.autograd.grad(sum((g**3).sum() for g in first), wanted[:2])

    ours, theirs = nbbn.torch.BatchNorm1d(3, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64)
    for change in (0, 1):
        assert_close(derivatives(ours, change), derivatives(theirs, change))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        derivatives(nbbn.torch.BatchNorm1d(3, dtype=torch.float64, activation="relu"), 1)


def test_versions_of_buffers_grow():
    """So autograd finds out that what it has kept was changed."""
    module = nbbn.torch.BatchNorm1d(3)
    x = torch.randn(4, 3)
    for _ in range(2):
        before = [t._version for t in module.buffers()]
        kept = (module.running_mean * module.weight).sum()
        module(x)
        assert all(t._version > v for t, v in zip(module.buffers(), before, strict=True))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept.backward()


def test_copies():
    module = nbbn.torch.BatchNorm1d(4, renorm=True, activation="relu")
    x = torch.randn(2, 6, 4)
    module(x[0])
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)]
    y = module(x[1])
    for other in copies:
        assert_close(other(x[1]), y)
        assert_close(other.state_dict(), module.state_dict())
    state = io.BytesIO()
    torch.save(module.state_dict(), state)
    state.seek(0)
    fresh = nbbn.torch.BatchNorm1d(4, renorm=True, activation="relu")
    fresh.load_state_dict(torch.load(state, weights_only=True))
    assert_close(fresh(x[1]), module(x[1]))


def test_renorm_goes_on_from_a_plain_state_dict():
    plain, renorm = nn.BatchNorm1d(4), nbbn.torch.BatchNorm1d(4, renorm=True)
    for _ in range(50):
        plain(torch.randn(16, 4) * 3 + 2)
    renorm.load_state_dict(plain.state_dict())
    assert_close(renorm.renorm_mean, plain.running_mean)
    assert_close(renorm.renorm_stddev, (plain.running_var + plain.eps).sqrt())
    x = torch.randn(64, 4) * 3 + 2
    renorm.requires_grad_(False)
    assert_close(renorm(x), plain.eval()(x), rtol=1e-3, atol=1e-3)  # r and d are not bounded: it is inference


def test_a_process_that_has_a_dtype_or_device_by_default():
    with torch.device("meta"):
        assert nbbn.torch.BatchNorm1d(3, renorm=True).renorm_mean.is_meta
    assert nbbn.torch.BatchNorm1d(3, dtype=torch.float64, debias=True).seen_var.dtype == torch.float64


# -- all options, against nbbn's layer ------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "relu": {"activation": "relu"},
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 1.5, "rmin": 0.7, "dmax": 0.3}, "renorm_momentum": 0.05},
    "renorm with a schedule": {
        "renorm": True,
        "renorm_clipping": {"dmax": lambda: 0.2},
        "renorm_momentum": lambda: 0.2,
    },
    "a momentum with a schedule": {"momentum": lambda: 0.25},
    "ghost": {"virtual_batch_size": 4},
    "contiguous ghost": {"virtual_batch_size": 3, "virtual_batch_order": "contiguous", "activation": "relu"},
    "ragged": {"virtual_batch_size": 5, "ragged": "spread"},
    "ghost and renorm": {"virtual_batch_size": 6, "renorm": True},
    "biased": {"bessel_correction": False},
    "debias": {"debias": True},
    "debias and renorm": {"debias": True, "renorm": True},
    "skip_nonfinite": {"skip_nonfinite": True},
}
NAMES = {
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
    "running_stddev": "moving_stddev",
    "seen_var": "seen_variance",
}


def opposite(value):
    return (lambda: 1 - value()) if callable(value) else 1 - value


def layer_like(module, options, axis):
    """nbbn's layer: its momenta are the weights of old values."""
    given = {k: opposite(v) if k.endswith("momentum") else v for k, v in {"momentum": 0.1, **options}.items()}
    given["bessel_correction"] = options.get("bessel_correction", None if options.get("renorm") else True)
    layer = nbbn.BatchNormalization(axis=axis, epsilon=module.eps, **given)
    layer.build(tuple(None if i != axis % 4 else module.num_features for i in range(4)))
    if options.get("renorm"):
        layer.renorm_momentum = opposite(options.get("renorm_momentum", 0.01))
    return layer


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("beside", [(), ("residual",), ("residual", "mask")], ids=str)
def test_options(name, axis, beside):
    options = OPTIONS[name]
    module = nbbn.torch.BatchNorm2d(4, axis=axis, **options)
    layer = layer_like(module, options, axis)
    rng = np.random.default_rng(1)
    for step in range(3):
        x, residual, dy = rng.normal(1, 2, (3, 12, 4, 4, 4)).astype(np.float32)
        if name == "skip_nonfinite" and step == 1:
            x[0, 0, 0, 0] = np.inf
        kwargs = {"residual": residual, "mask": rng.random((12, 4)) < 0.7}
        kwargs = {k: kwargs[k] for k in beside}
        expected, pullback = layer.vjp(x, training=True, **kwargs)
        gradients = pullback(dy)
        tensors = {k: torch.from_numpy(v) for k, v in kwargs.items()}
        given = torch.from_numpy(x).requires_grad_()
        if "residual" in tensors:
            tensors["residual"].requires_grad_()
        y = module(given, **tensors)
        module.zero_grad()
        y.backward(torch.from_numpy(dy))
        assert_close(y.detach().numpy(), expected, equal_nan=True)
        assert_close(given.grad.numpy(), gradients.inputs, equal_nan=True)
        for parameter, gradient in ((module.weight, gradients.gamma), (module.bias, gradients.beta)):
            assert_close(parameter.grad.numpy(), gradient.ravel(), equal_nan=True)
        if "residual" in tensors:
            assert_close(tensors["residual"].grad.numpy(), gradients.residual)
        for key, value in module.named_buffers():
            if key != "num_batches_tracked":
                assert_close(value.numpy(), getattr(layer, NAMES.get(key, key)).ravel(), equal_nan=True)
    module.eval()
    assert_close(module(torch.from_numpy(dy)).detach().numpy(), layer(dy))
    with torch.no_grad():
        assert_close(module(torch.from_numpy(dy)).numpy(), layer(dy))


def test_adjustment():
    """Its gradient goes to whatever the two are made of."""
    a, b = (torch.randn(8, 1, requires_grad=True) for _ in "ab")
    module = nbbn.torch.BatchNorm1d(3, adjustment=lambda shape: (a, b))
    layer = nbbn.BatchNormalization(
        epsilon=1e-5, momentum=0.9, bessel_correction=True, adjustment=lambda shape: (a.detach(), b.detach())
    )
    x, dy = torch.randn(2, 8, 3)
    y, pullback = layer.vjp(x.numpy(), training=True)
    gradients = pullback(dy.numpy())
    x.requires_grad_()
    module(x).backward(dy)
    assert_close(module(x).detach().numpy(), y)
    assert_close(x.grad.numpy(), gradients.inputs, rtol=1e-5, atol=1e-6)
    assert_close((a.grad.numpy(), b.grad.numpy()), gradients.adjustment, rtol=1e-5, atol=1e-6)
    a.requires_grad_(False), b.requires_grad_(False)
    again = x.detach().clone().requires_grad_()
    module(again).backward(dy)
    assert_close(again.grad, x.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs_with_float32_parameters(dtype):
    """As in mixed precision; the arithmetic is float32, and what the oracle gets is rounded once."""
    module, exact = nbbn.torch.BatchNorm2d(4, activation="relu"), nn.BatchNorm2d(4).double()
    for _ in range(2):
        x, dy = torch.randn(2, 8, 4, 5, 5).to(dtype)
        a, b = leaf(x), leaf(x.double())
        y, expected = module(a), exact(b).relu()
        assert y.dtype == dtype
        y.backward(dy), expected.backward(dy.double())
        bits = {torch.bfloat16: 8, torch.float16: 11}[dtype]
        assert_close(y.double(), expected, rtol=2.0**-bits, atol=1e-6)
        assert_close(module.running_var.double(), exact.running_var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes_are_pytorchs(dtype, training):
    """What torch.nn takes for an input of this dtype is taken, and what it refuses is refused, in both modes."""
    x, taken = torch.randn(6, 4, dtype=dtype), 0
    for parameters, statistics in itertools.product(DTYPES, DTYPES):
        ours, theirs = (kind(4, dtype=parameters).train(training) for kind in (nbbn.torch.BatchNorm1d, nn.BatchNorm1d))
        for module in (ours, theirs):
            for name in ("running_mean", "running_var"):
                setattr(module, name, getattr(module, name).to(statistics))
        try:
            expected = theirs(x).dtype
        except RuntimeError:
            with pytest.raises(TypeError, match=f"for an input of {dtype}; received weight of {parameters}"):
                ours(x)
            assert not ours.num_batches_tracked
        else:
            assert ours(x).dtype == expected
            taken += 1
    assert taken == (2 if dtype.itemsize == 2 else 1)


# -- the function ---------------------------------------------------------------------------------------------------


def test_the_function_is_the_module():
    module = nbbn.torch.BatchNorm1d(3, renorm=True, debias=True, virtual_batch_size=4)
    state = [
        torch.zeros(3),
        torch.ones(3),
        torch.ones(3),
        torch.zeros(3),
        torch.ones(3),
        torch.zeros(3),
        torch.zeros(3),
    ]
    for _ in range(2):
        x = torch.randn(8, 3)
        y = nbbn.torch.functional.batch_norm(
            x, *state[:2], training=True, renorm_state=state[2:5], seen_state=state[5:], virtual_batch_size=4
        )
        assert_close(y, module(x).detach())
        assert_close(state, [t for k, t in module.named_buffers() if k != "num_batches_tracked"])


def test_an_empty_batch_changes_nothing():
    module = nbbn.torch.BatchNorm1d(4)
    before = copy.deepcopy(module.state_dict())
    x = torch.empty(0, 4, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 4)
    assert_close(module.weight.grad, torch.zeros(4))
    del before["num_batches_tracked"]
    assert_close({k: v for k, v in module.state_dict().items() if k in before}, before)
