"""nbbn.torch where a program is traced: operators, torch.compile, torch.export, ONNX, torch.fx, torch.jit."""

import copy
import io

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.func import grad, vmap
from torch.library import opcheck
from torch.testing import assert_close

import nbbn.torch
from nbbn.torch.settings import as_text, numbers

pytestmark = pytest.mark.frameworks

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# What PyTorch says of parts of itself.
QUIET = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:UserWarning"),
]


def quiet(test):
    for mark in QUIET:
        test = mark(test)
    return test


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


# -- the operators --------------------------------------------------------------------------------------------------


def problem(dtype, residual=False, mask=False, adjustment=False, grads=False, rows=2, **options):
    own = dtype if dtype.itemsize > 2 else torch.float32
    x = torch.randn(4, 3, 5, dtype=dtype, requires_grad=True)
    weight, bias = (torch.randn(3, dtype=own, requires_grad=True) for _ in "ab")
    beside = [torch.rand(4, 1, 5, dtype=own) if mask else None] + [
        torch.randn(4, 1, 1, dtype=own, requires_grad=grads) if adjustment else None for _ in "ab"
    ]
    added = torch.randn(4, 3, 5, dtype=dtype, requires_grad=True) if residual else None
    state = [torch.rand(3, dtype=own) + 0.5 for _ in range(rows)]
    return x, weight, bias, added, *beside, state, None, numbers(0.1, 0.01, None), as_text(1, **options), 1e-5, True


PROBLEMS = {
    "plain": {},
    "relu with a residual": {"residual": True, "activation": "relu"},
    "residual": {"residual": True},
    "mask": {"mask": True},
    "adjustment": {"adjustment": True},
    "adjustment with gradients": {"adjustment": True, "grads": True, "activation": "relu", "mask": True},
    "renorm": {"renorm": True, "rows": 5},
    "ghost": {"virtual_batch_size": 2},
    "debias": {"debias": True, "rows": 4},
    "nobody keeps the state": {"rows": 0},
}


@quiet
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_operators(name, dtype):
    args = problem(dtype, **PROBLEMS[name])
    opcheck(torch.ops.nbbn.batch_norm.default, args)
    x, *beside, _, _, _, options, eps, _ = args
    _, saved = torch.ops.nbbn.batch_norm(*args)
    wants = beside[-1] is not None and beside[-1].requires_grad
    opcheck(torch.ops.nbbn.batch_norm_backward.default, (torch.randn_like(x), x, *beside, saved, options, eps, wants))


# -- torch.compile --------------------------------------------------------------------------------------------------


def network(**options):
    return nn.Sequential(nn.Conv2d(3, 5, 3), nbbn.torch.BatchNorm2d(5, **options), nn.Conv2d(5, 2, 3))


MODULES = [
    {},
    {"renorm": True},
    {"activation": "relu"},
    {"virtual_batch_size": 4},
    {"debias": True},
    {"momentum": None},
    {"axis": -1},
]


@quiet
@pytest.mark.parametrize("options", MODULES, ids=str)
def test_compile_has_one_graph(options):
    plain = network(**options) if "axis" not in options else nbbn.torch.BatchNorm2d(3, **options)
    other = copy.deepcopy(plain)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for batch in (8, 8, 12):  # the last one has a dynamic shape
        x = torch.randn(batch, 3, 7, 7 if "axis" not in options else 3)
        y, expected = compiled(x), plain(x)
        assert_close(y, expected)
        dy = torch.randn_like(y)
        y.backward(dy), expected.backward(dy)
    assert_close([p.grad for p in other.parameters()], [p.grad for p in plain.parameters()], rtol=1e-4, atol=1e-4)
    assert_close(other.state_dict(), plain.state_dict())
    plain.eval(), other.eval()
    assert_close(compiled(x), plain(x))


@quiet
@pytest.mark.parametrize("name", ["momentum", "renorm_momentum", "dmax"])
def test_compile_reads_a_callable_at_each_call(name):
    """Also one that gives the second value, which PyTorch's compiler takes for a number that it does not know."""
    schedule = {"now": 0.0}
    given = lambda: schedule["now"]  # noqa: E731
    modules = [nbbn.torch.BatchNorm1d(3, renorm=True, renorm_clipping={"dmax": 0.5}) for _ in "ab"]
    for module in modules:
        setattr(module, *(("renorm_clipping", {"dmax": given}) if name == "dmax" else (name, given)))
    compiled, plain = torch.compile(modules[0], fullgraph=True, backend="aot_eager"), modules[1]
    for value in (0.1, 0.5, 1.0):
        schedule["now"], x = value, torch.randn(8, 3) + 5
        assert_close(compiled(x), plain(x))
        assert_close(modules[0].state_dict(), plain.state_dict())
    schedule["now"] = float("nan")
    with pytest.raises((RuntimeError, ValueError)):
        compiled(x)


@quiet
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"renorm": True}], ids=str)
@pytest.mark.parametrize("how", ["compiled", "exported"])
def test_an_adjustment_has_gradients(how, options):
    """Also one that broadcasts, and beside another one without a gradient."""

    class Adjusted(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nbbn.torch.BatchNorm1d(4, **options)

        def forward(self, x, a, b):
            self.norm.adjustment = lambda shape: (a, b)
            return self.norm(x)

    x, a, b = torch.randn(6, 4, requires_grad=True), torch.rand(6, 1, requires_grad=True), torch.rand(4)
    for operands in ((x, a, b), (x, a, b.requires_grad_())):
        plain = Adjusted()
        other = copy.deepcopy(plain)
        if how == "compiled":
            traced = torch.compile(other, fullgraph=True, backend="aot_eager")
        else:
            traced = torch.export.export(other, operands, strict=False).module()
        leaves = [t for t in operands if t.requires_grad]
        found, expected = (torch.autograd.grad(call(*operands).pow(3).sum(), leaves) for call in (traced, plain))
        assert_close(found, expected, rtol=1e-4, atol=1e-5)


@quiet
def test_inductor():
    plain = network(activation="relu")
    other = copy.deepcopy(plain)
    x = torch.randn(8, 3, 7, 7)
    y, expected = torch.compile(other, fullgraph=True)(x), plain(x)
    y.sum().backward(), expected.sum().backward()
    assert_close(y, expected)
    assert_close(other.state_dict(), plain.state_dict())


@quiet
def test_a_compiled_function_with_all_operands():
    def step(x, mean, variance, weight, residual, mask):
        return nbbn.torch.functional.batch_norm(
            x, mean, variance, weight, training=True, residual=residual, mask=mask, activation="relu"
        )

    x, residual = torch.randn(2, 6, 4)
    args = x, torch.zeros(4), torch.ones(4), torch.randn(4), residual, torch.tensor([1, 1, 0, 1, 1, 1])
    expected = copy.deepcopy(args)
    assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(*args), step(*expected))
    assert_close(args, expected)


TRANSFORMED = {
    "vmap": lambda module: vmap(lambda x: module(x)),
    "grad": lambda module: lambda x: grad(lambda x: (module(x) ** 3).sum())(x[0]),
    "vmap of grad": lambda module: vmap(grad(lambda x: (module(x) ** 3).sum())),
}


@quiet
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_compile_with_transformations_inside(name, fullgraph):
    for options in ({}, {"activation": "relu"}):
        module = nbbn.torch.BatchNorm1d(4, track_running_stats=False, **options)
        call, x = TRANSFORMED[name](module), torch.randn(3, 6, 4)
        compiled = torch.compile(call, backend="aot_eager", fullgraph=fullgraph)
        assert_close(compiled(x), call(x), rtol=1e-4, atol=1e-5)
    tracking = nbbn.torch.BatchNorm1d(4)
    with pytest.raises(Exception, match="track_running_stats=False"):  # the compiler's own kind
        torch.compile(TRANSFORMED[name](tracking), backend="aot_eager", fullgraph=True)(x)
    assert tracking.num_batches_tracked == 0


# -- exported programs ----------------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    net, x = network(activation="relu").eval(), torch.randn(8, 3, 7, 7)
    dynamic = {"input": {0: torch.export.Dim("batch", min=2)}}
    program = torch.export.export(net, (x,), strict=strict, dynamic_shapes=dynamic)
    targets = [str(node.target) for node in program.graph.nodes]
    assert "aten.batch_norm.default" in targets
    assert not [t for t in targets if "nbbn" in t]
    assert_close(program.module()(x[:5]), net(x[:5]))
    trained = torch.export.export(net.train(), (x,), strict=strict)
    assert "nbbn.batch_norm.default" in [str(node.target) for node in trained.graph.nodes]
    other = copy.deepcopy(net)
    assert_close(trained.module()(x), other(x))


@quiet
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(dynamo):
    net = nn.Sequential(nn.ReLU(), nbbn.torch.BatchNorm2d(3, activation="relu")).eval()
    file = io.BytesIO()
    torch.onnx.export(net, (torch.randn(2, 3, 4, 4),), file, dynamo=dynamo, verbose=False)
    nodes = [node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node]
    assert [n for n in nodes if n != "Identity"] == ["Relu", "BatchNormalization", "Relu"]


@quiet
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("axis", [-1, 3])
def test_onnx_with_channels_last(axis, dynamo):
    module, file = nbbn.torch.BatchNorm2d(3, axis=axis).eval(), io.BytesIO()
    torch.onnx.export(module, (torch.randn(2, 4, 5, 3),), file, dynamo=dynamo, verbose=False)
    model = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(model, full_check=True)
    x = torch.randn(2, 4, 5, 3)
    (y,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    assert_close(torch.from_numpy(y), module(x))


@quiet
def test_onnx_of_training_says_what_to_do():
    net = nn.Sequential(nbbn.torch.BatchNorm2d(3))
    with (
        pytest.warns(UserWarning, match="in training mode"),
        pytest.raises(Exception, match=r"call eval\(\) on the network"),  # the exporter's own kind
    ):
        torch.onnx.export(net, (torch.randn(2, 3, 4, 4),), io.BytesIO(), verbose=False)


@quiet
def test_fx():
    """A module is a leaf, as torch.nn's are."""
    net = nn.Sequential(nn.Linear(4, 4), nbbn.torch.BatchNorm1d(4), nn.ReLU())
    traced = torch.fx.symbolic_trace(net)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 3
    x = torch.randn(6, 4)
    other = copy.deepcopy(net)
    assert_close(traced(x), other(x))
    assert_close(traced.state_dict(), other.state_dict())

    class WithResidual(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nbbn.torch.BatchNorm1d(4, activation="relu")

        def forward(self, x, mask):
            return self.norm(x, x, mask=mask)

    with pytest.raises(TypeError, match="trace a network that holds it"):
        torch.fx.symbolic_trace(nbbn.torch.BatchNorm1d(4))
    traced = torch.fx.symbolic_trace(WithResidual())
    mask = torch.tensor([1.0, 1, 1, 0, 1, 1])
    assert_close(traced(x, mask), WithResidual()(x, mask))


@quiet
@pytest.mark.parametrize("training", [True, False])
def test_jit_trace(training):
    net = nn.Sequential(nn.Linear(4, 4), nbbn.torch.BatchNorm1d(4), nn.ReLU()).train(training)
    x = torch.randn(2, 6, 4)
    traced = torch.jit.trace(net, (x[0],), check_trace=False)
    other = copy.deepcopy(net)
    assert_close(traced(x[1]), other(x[1]))
