"""Derivatives through nbbn.torch, of any order, and the transformations of torch.func, against torch.nn."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vjp, vmap
from torch.testing import assert_close

import nbbn.torch

pytestmark = [
    pytest.mark.frameworks,
    # said by torch.func about PyTorch's own operators
    pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

OPTIONS = {
    "plain": {},
    "relu": {"activation": "relu"},
    # r and d are constants for the gradient, and so they must be for finite differences: they are at their bounds.
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 1.3, "rmin": 1.3, "dmax": 0.0}},
    "renorm and relu": {
        **{"renorm": True, "activation": "relu"},
        "renorm_clipping": {"rmax": 0.8, "rmin": 0.8, "dmax": 0.0},
    },
    "ghost": {"virtual_batch_size": 3},
    "ragged ghost": {"virtual_batch_size": 4, "ragged": "last"},
}


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("mode", ["training", "eval"])
@pytest.mark.parametrize("beside", ["nothing", "residual", "mask"])
def test_gradcheck_and_gradgradcheck(name, mode, beside):
    torch.manual_seed(3)
    module = nbbn.torch.BatchNorm1d(2, dtype=torch.float64, **OPTIONS[name]).train(mode == "training")
    module.momentum, module.renorm_momentum = 0.0, 0.0  # each evaluation of gradcheck has the same state
    mask = torch.tensor([1.0, 2, 0.5, 1, 0, 3], dtype=torch.float64) if beside == "mask" else None

    def call(x, weight, bias, *residual):
        return functional_call(module, {"weight": weight, "bias": bias}, (x, *residual), {"mask": mask})

    args = double(6, 2), double(2), double(2), *([double(6, 2)] if beside == "residual" else [])
    assert gradcheck(call, args)
    assert gradgradcheck(call, args)


def test_the_operators_second_derivative():
    """Of the registered form, which is taken where something stands beside the input."""
    from nbbn.torch.settings import as_text, numbers

    text, given = as_text(1, activation="relu"), numbers(0.0, 0.0, None)

    def call(x, weight, bias, residual):
        return torch.ops.nbbn.batch_norm(
            x, weight, bias, residual, None, None, None, [], None, given, text, 1e-5, True
        )[0]

    torch.manual_seed(4)
    args = double(5, 2), double(2), double(2), double(5, 2)
    assert gradcheck(call, args)
    assert gradgradcheck(call, args)


def test_the_operators_second_derivative_of_an_adjustment():
    from nbbn.torch.settings import as_text, numbers

    text, given = as_text(1, activation="relu"), numbers(0.0, 0.0, None)
    mask = torch.tensor([1.0, 2, 0, 1, 1], dtype=torch.float64)[:, None]

    def call(x, weight, bias, a, b):
        return torch.ops.nbbn.batch_norm(x, weight, bias, None, mask, a, b, [], None, given, text, 1e-5, True)[0]

    torch.manual_seed(4)
    args = double(5, 2), double(2), double(2), double(5, 1), double(1, 2)
    assert gradcheck(call, args)
    assert gradgradcheck(call, args)


def test_a_residual_that_was_computed_from_the_input():
    """A formula for the one must not follow the other."""
    ours = nbbn.torch.BatchNorm1d(3, activation="relu")
    theirs = nn.BatchNorm1d(3)
    found = []
    for call in (lambda x: ours(x, 2 * x), lambda x: (theirs(x) + 2 * x).relu()):
        torch.manual_seed(5)
        x = torch.randn(6, 3, requires_grad=True)
        (dx,) = torch.autograd.grad((call(x) ** 2).sum(), x, create_graph=True)
        found.append((dx, *torch.autograd.grad((dx**2).sum(), x)))
    assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_third_derivative():
    """Against PyTorch's elementary operations: torch.nn's own is wrong from the third on, as it takes the statistics
    that it has saved for constants."""
    module = nbbn.torch.BatchNorm1d(2, dtype=torch.float64)

    def reference(x):
        return (x - x.mean(0)) / (x.var(0, correction=0) + module.eps).sqrt() * module.weight + module.bias

    x, weights = double(5, 2), torch.arange(1.0, 11.0, dtype=torch.float64).reshape(5, 2)
    found = []
    for call in (module, reference):
        value = (call(x) ** 3).sum()
        for _ in range(3):
            (dx,) = torch.autograd.grad(value, x, create_graph=True)
            value = (dx * weights).sum()
        found.append(dx)
    assert_close(*found)


# -- torch.func -----------------------------------------------------------------------------------------------------


def pair(**options):
    """Without num_batches_tracked, which torch.nn's cannot count inside grad()."""
    found = [c(4, **options) for c in (nbbn.torch.BatchNorm1d, nn.BatchNorm1d)]
    for module in found:
        module.num_batches_tracked = None
    return found


TRANSFORMATIONS = {
    "grad": lambda call, p, x: grad(lambda p, x: (call(p, x) ** 3).sum(), argnums=(0, 1))(p, x),
    "vjp": lambda call, p, x: vjp(call, p, x)[1](x**2),
    "jvp": lambda call, p, x: jvp(lambda x: call(p, x), (x,), (2 * x + 1,)),
    "jacrev": lambda call, p, x: jacrev(call, argnums=1)(p, x),
    "hessian": lambda call, p, x: hessian(lambda x: (call(p, x) ** 3).sum())(x),
    "grad of grad": lambda call, p, x: grad(lambda x: (grad(lambda x: (call(p, x) ** 3).sum())(x) ** 2).sum())(x),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_transformations(name, training):
    modules = pair()
    torch.manual_seed(6)
    x = torch.randn(6, 4, dtype=torch.float64)
    found = []
    for module in modules:
        module.double().train(training)

        def call(p, x, module=module):
            return functional_call(module, p, (x,))

        found.append(TRANSFORMATIONS[name](call, dict(module.named_parameters()), x))
    assert_close(*found)
    assert_close(*[dict(m.named_buffers()) for m in modules])


def test_dual_numbers():
    modules = pair()
    x = torch.randn(6, 4)
    with forward_ad.dual_level():
        found = [tuple(forward_ad.unpack_dual(m(forward_ad.make_dual(x, x**2)))) for m in modules]
    assert_close(*found)
    assert_close(*[dict(m.named_buffers()) for m in modules])


@pytest.mark.parametrize("options", [{"track_running_stats": False}, {"affine": False, "track_running_stats": False}])
def test_vmap(options):
    ours, theirs = pair(**options)
    x = torch.randn(3, 6, 4)
    assert_close(vmap(ours)(x), vmap(theirs)(x))
    per_sample = [vmap(grad(lambda x, m=m: (m(x) ** 3).sum()))(x) for m in (ours, theirs)]
    assert_close(*per_sample, rtol=1e-4, atol=1e-4)


def test_vmap_over_modules():
    found = []
    for kind in (nbbn.torch.BatchNorm1d, nn.BatchNorm1d):
        torch.manual_seed(7)
        modules = [kind(4) for _ in range(3)]
        parameters, buffers = stack_module_state(modules)
        x = torch.randn(3, 6, 4)

        def call(p, b, x, module=modules[0]):
            return functional_call(module, (p, b), (x,))

        y = vmap(call)(parameters, buffers, x)
        z = vmap(call, in_dims=(0, 0, None))(parameters, buffers, x[0])
        found.append((y, z, buffers))
    assert_close(*found)


def test_statistics_without_a_batch_cannot_take_one():
    module = nbbn.torch.BatchNorm1d(4)
    before = module.running_mean.clone()
    with pytest.raises(RuntimeError, match="stack_module_state"):
        vmap(module)(torch.randn(3, 6, 4))
    assert_close(module.running_mean, before)


def test_counting_inside_grad():
    """What torch.nn's refuse: the count is not differentiable, and changes like the statistics."""
    module = nbbn.torch.BatchNorm1d(4)
    grad(lambda x: module(x).sum())(torch.randn(6, 4))
    assert module.num_batches_tracked == 1


def test_renorm_inside_grad():
    """r and d are of the statistics before the step, as outside."""
    options = {"renorm": True, "renorm_clipping": {"dmax": 0.3}}
    outside, inside = nbbn.torch.BatchNorm1d(4, **options), nbbn.torch.BatchNorm1d(4, **options)
    for _ in range(3):
        x = torch.randn(6, 4, requires_grad=True)
        (expected,) = torch.autograd.grad((outside(x) ** 3).sum(), x)
        assert_close(grad(lambda x: (inside(x) ** 3).sum())(x.detach()), expected, rtol=1e-4, atol=1e-5)
    assert_close(inside.state_dict(), outside.state_dict())


@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 3, "ragged": "last"}], ids=["whole", "ghosts"])
def test_the_second_derivative_of_an_empty_batch(options):
    module = nbbn.torch.BatchNorm1d(4, renorm=True, **options)
    x = torch.empty(0, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    assert dx.shape == (0, 4)
    dx.sum().backward()
    assert x.grad.shape == (0, 4)
