"""nbbn.torch with tensors that are not what a call expects: elsewhere in memory, of other layouts, computed."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import nbbn.torch

pytestmark = pytest.mark.frameworks


def pair(kind="BatchNorm1d", features=5, **kwargs):
    ours, theirs = getattr(nbbn.torch, kind)(features, **kwargs), getattr(nn, kind)(features, **kwargs)
    if ours.affine:
        with torch.no_grad():
            ours.weight.uniform_(0.5, 2)
            ours.bias.normal_()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


# -- the module's tensors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_that_are_switched_off_later(training):
    """As code for adversarial training does: they stay, but a training call leaves them alone."""
    ours, theirs = pair()
    x = torch.randn(2, 8, 5)
    for module in (ours, theirs):
        module(x[0])
        module.track_running_stats = False
        module.train(training)
    for _ in range(2):
        assert_close(ours(x[1]), theirs(x[1]))
        with torch.no_grad():
            assert_close(ours(x[1]), theirs(x[1]))
        assert_close(ours(x[1], mask=torch.ones(8)), theirs(x[1]))
    assert_close(ours.state_dict(), theirs.state_dict())
    for module in (ours, theirs):
        module.track_running_stats = True
        module(x[1])
    assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("name", ["weight", "running_mean"])
def test_another_view_of_the_same_memory(name):
    ours, theirs = pair()
    memory, x = torch.rand(10), torch.randn(8, 5)
    for view in (memory[:5], memory[::2], memory[:5]):
        for module in (ours, theirs):
            getattr(module, name).data = view.clone() if name == "running_mean" and module is theirs else view
            module.train(name == "weight")
        with torch.no_grad():
            assert_close(ours(x), theirs(x))


def test_a_weight_with_a_pending_sign():
    ours, theirs = pair()
    x = torch.randn(8, 5)
    for module in (ours, theirs):
        module.weight.data = torch.complex(torch.ones(5), torch.arange(5.0)).conj().imag
    assert ours.weight.is_neg()
    assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("how", ["parametrized", "a parameter"])
def test_running_statistics_that_are_no_buffers(how):
    ours, theirs = pair()
    x = torch.randn(8, 5)
    for module in (ours, theirs):
        module(x)
        if how == "parametrized":
            parametrize.register_parametrization(module, "running_mean", nn.Identity())
        else:
            mean = module.running_mean
            del module.running_mean
            module.running_mean = nn.Parameter(mean, requires_grad=False)
    for _ in range(2):
        assert_close(ours(x), theirs(x))
    ours.eval(), theirs.eval()
    assert_close(ours(x), theirs(x))


def test_features_are_counted_where_no_tensor_has_them():
    module = nbbn.torch.BatchNorm1d(5, affine=False, track_running_stats=False)
    for features in (7, 5, 7):
        if features == 5:
            module(torch.randn(4, features))
            continue
        with pytest.raises(ValueError, match=r"num_features=5 .* received shape \(4, 7\)"):
            module(torch.randn(4, features))


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_tensors_that_a_module_has_not(options, training):
    """What stands for them lives as long as what looks at it."""
    module = nbbn.torch.BatchNorm1d(16, **options).train(training)
    x = torch.randn(8, 16)
    with torch.no_grad():
        expected = module(x)
        views = module._views
        assert views.params.tolist() == [[1.0] * 16, [0.0] * 16]
        taken = [np.full(16, np.nan, np.float32) for _ in range(64)]  # memory of rows that nobody keeps
        assert views.params.tolist() == [[1.0] * 16, [0.0] * 16]
        for _ in range(4):
            assert_close(module(x), expected)
        assert len(taken) == 64


# -- what autograd keeps and brings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("relu", [False, True])
def test_kept_tensors_that_come_back_in_another_layout(relu):
    """saved_tensors_hooks may bring back the same values elsewhere in memory."""
    module = nbbn.torch.BatchNorm2d(5, activation="relu" if relu else None)
    beside = [torch.randn(4, 5, 3, 3).to(memory_format=torch.channels_last)] if relu else []
    x = torch.randn(4, 5, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    expected = torch.autograd.grad(module(x, *beside).square().sum(), x)
    for _ in range(16):  # the memory of a copy that is gone keeps its values at times
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.double().contiguous(), lambda t: t.float()):
            y = module(x, *beside)
        assert_close(torch.autograd.grad(y.square().sum(), x), expected)


def test_zeros_without_memory():
    """PyTorch's own formulas make such tensors; their address is 0."""
    ours, theirs = pair()
    x = torch.randn(8, 5, requires_grad=True)
    zeros = torch._efficientzerotensor(8, 5)
    for _ in range(2):
        for module in (ours, theirs):
            module(x).backward(zeros)
        assert_close(ours(zeros), theirs(zeros))
        with torch.no_grad():
            assert_close(ours(x, zeros), theirs(x))
    assert not x.grad.any()
    assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("beside", [{}, {"mask": torch.ones(8)}], ids=["quick", "general"])
def test_a_tensor_that_autograd_cannot_keep_changes_nothing(beside):
    module = nbbn.torch.BatchNorm1d(5)
    with torch.inference_mode():
        x = torch.randn(8, 5)
    module(x.clone())
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        module(x, **beside)
    assert_close(module.state_dict(), before, rtol=0, atol=0)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    assert module(x, **beside).shape == x.shape  # there is nothing to keep


# -- inputs ---------------------------------------------------------------------------------------------------------

INPUTS = {
    "sparse_coo": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x.to_sparse_csr(),
    "_mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.as_nested_tensor([x[:3], x[3:]]),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", INPUTS)
@pytest.mark.filterwarnings("ignore:.*(prototype|beta):UserWarning")
def test_inputs_of_other_layouts(layout, training):
    module, x = nbbn.torch.BatchNorm1d(5).train(training), torch.randn(8, 5)
    before = copy.deepcopy(module.state_dict())
    for call in (module, lambda x: nbbn.torch.functional.batch_norm(x, None, None, training=True)):
        with pytest.raises(TypeError, match=f"input must be a strided tensor.*received .*{layout}"):
            call(INPUTS[layout](x))
    assert_close(module.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_an_input_on_another_device(training):
    module, x = nbbn.torch.BatchNorm1d(5).train(training), torch.randn(8, 5, device="meta")
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="weight must be on the input's device meta; received cpu"):
        module(x)
    assert_close(module.state_dict(), before, rtol=0, atol=0)
    mean, variance = torch.zeros(5), torch.ones(5)
    with pytest.raises(ValueError, match="running_mean must be on the input's device meta; received cpu"):
        nbbn.torch.functional.batch_norm(x, mean, variance, training=training)
