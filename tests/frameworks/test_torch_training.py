"""nbbn.torch in what surrounds a module: processes, mixed precision, checkpointing, accumulation, conversion."""

import copy
import functools
import os
import runpy
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval
from torch.optim.swa_utils import update_bn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import nbbn
import nbbn.torch

pytest.importorskip("benchmarks", reason="the benchmarks belong to a clone, and are not in the source distribution")
from benchmarks.frameworks import suite
from benchmarks.frameworks import torch as benchmark
from tests.helpers.ranks import on_ranks

pytestmark = pytest.mark.frameworks

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs/examples/torch_digits.py"


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


# -- processes ------------------------------------------------------------------------------------------------------

# Each rank has half of a batch; what all have together is compared with one process that has the whole batch.
RANK = """
import copy, os, torch, torch.distributed as dist
from torch import nn
from torch.testing import assert_close
import nbbn.torch
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
x, dy = torch.randn(2, 8, 3, 5, 5)
x[:4] += 3
mine = slice(4 * rank, 4 * rank + 4)
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
alone = copy.deepcopy(net)
ours = nbbn.torch.SyncBatchNorm.convert_sync_batchnorm(nbbn.torch.convert(net, activation="relu"))
assert type(ours[1]) is nbbn.torch.SyncBatchNorm and ours[1].activation == "relu"
parallel = nn.parallel.DistributedDataParallel(ours)
for _ in range(2):
    y, expected = parallel(x[mine]), alone(x)
    assert_close(y, expected[mine])
    y.pow(2).sum().backward(), expected.pow(2).sum().backward()
    for p, q in zip(ours.parameters(), alone.parameters(), strict=True):
        assert_close(2 * p.grad, q.grad, rtol=1e-4, atol=1e-4)  # DDP averages
    parallel.zero_grad(), alone.zero_grad()
    assert_close(ours.state_dict(), alone.state_dict())
plain = nbbn.torch.convert(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
parallel, reference = nn.parallel.DistributedDataParallel(plain), copy.deepcopy(plain)
parallel(torch.ones(3, 4) * torch.arange(3.0)[:, None] * (rank + 1)).sum().backward()
if rank == 0:
    reference(torch.ones(3, 4) * torch.arange(3.0)[:, None])
    assert_close(plain.state_dict(), reference.state_dict())
try:
    ours[1](x[mine] if rank else x[mine, :2])
except nbbn.sync.SyncError as error:
    assert "could not take part" in str(error)
else:
    raise AssertionError("no SyncError")
print("done", rank)
dist.destroy_process_group()
"""


def test_distributed_data_parallel():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, "-c", RANK]
    ranks = [subprocess.Popen(command, env={**env, "RANK": str(r)}, cwd=ROOT, **pipes) for r in range(2)]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(outputs)


@pytest.mark.parametrize(
    "options",
    [{}, {"activation": "relu"}, {"renorm": True}, {"momentum": None}, {"debias": True}, {"virtual_batch_size": 2}],
    ids=str,
)
def test_threads_that_share_statistics(options):
    """As one module on the whole batch."""
    modules = [nbbn.torch.SyncBatchNorm(3, process_group=group, **options) for group in nbbn.sync.threads(2)]
    ghost = options.get("virtual_batch_size")  # group g of both ranks is one group
    alone = nbbn.torch.BatchNorm2d(3, **(options | ({"virtual_batch_size": 2 * ghost} if ghost else {})))
    parts = [slice(0, 4), slice(4, 8)] if ghost else [slice(0, 3), slice(3, 8)]
    for _ in range(2):
        x, residual, dy = torch.randn(3, 8, 3, 4, 4)
        found, failed = [None, None], []

        def rank(i, x=x, residual=residual, dy=dy, parts=parts, found=found, failed=failed):
            try:
                a, r = leaf(x[parts[i]]), leaf(residual[parts[i]])
                y = modules[i](a, r)
                y.backward(dy[parts[i]])
                found[i] = y.detach(), a.grad, r.grad
            except Exception as error:
                failed.append(error)

        threads = [threading.Thread(target=rank, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        a, r = leaf(x), leaf(residual)
        y = alone(a, r)
        y.backward(dy)
        assert_close([torch.cat(halves) for halves in zip(*found, strict=True)], [y.detach(), a.grad, r.grad])
        for name, value in alone.named_buffers():
            assert_close(modules[0].get_buffer(name), value)
            assert torch.equal(modules[0].get_buffer(name), modules[1].get_buffer(name))
    total = sum(m.weight.grad for m in modules)
    assert_close(total, alone.weight.grad, rtol=1e-4, atol=1e-4)


def test_running_statistics_that_have_parted():
    """They are refused in the next call, until they are the same again."""

    def run(group):
        module, x = nbbn.torch.SyncBatchNorm(3, process_group=group), torch.ones(4, 3)
        module(x)
        kept = copy.deepcopy(module.state_dict())
        if group.rank:
            module.reset_running_stats()
        for _ in range(2):
            with pytest.raises(nbbn.sync.SyncError, match="differ in the moving statistics before the call"):
                module(x)
        module.load_state_dict(kept)
        module(x)

    on_ranks(nbbn.sync.threads(2, timeout=20), run)


def test_a_process_alone_needs_no_group():
    module, plain = nbbn.torch.SyncBatchNorm(3), nbbn.torch.BatchNorm1d(3)
    x = torch.randn(5, 3)
    assert_close(module(x), plain(x))
    with pytest.raises(ValueError, match="at least 2D"):
        module(torch.randn(3))


# -- training -------------------------------------------------------------------------------------------------------


def test_mixed_precision():
    ours = nn.Sequential(nn.Conv2d(3, 4, 3), nbbn.torch.BatchNorm2d(4, activation="relu"), nn.Conv2d(4, 2, 1))
    theirs = nn.Sequential(copy.deepcopy(ours[0]), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), copy.deepcopy(ours[2]))
    x = torch.randn(5, 3, 6, 6)
    for _ in range(2):
        outputs = []
        for net in (ours, theirs):
            with torch.autocast("cpu", torch.bfloat16):
                outputs.append(net(x))
            outputs[-1].float().sum().backward()
        assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
        assert_close(*outputs, rtol=2e-2, atol=2e-2)  # two or three digits of bfloat16
    assert ours[1].weight.grad.dtype == torch.float32
    assert_close(ours[1].weight.grad, theirs[1][0].weight.grad, rtol=5e-2, atol=5e-2)
    assert_close(ours[1].running_var, theirs[1][0].running_var, rtol=1e-2, atol=1e-3)


CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "with a context": {
        "use_reentrant": False,
        "context_fn": functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default]),
    },
}


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"momentum": None}, {"debias": True}], ids=str)
def test_checkpointing_counts_once(name, options):
    net = nn.Sequential(nn.Linear(4, 4), nbbn.torch.BatchNorm1d(4, **options), nn.Linear(4, 3))
    plain = copy.deepcopy(net)
    for _ in range(3):
        a, b = (leaf(torch.linspace(-1, 2, 24).reshape(6, 4) ** 2) for _ in "ab")
        checkpoint(net, a, **CHECKPOINTS[name]).pow(2).sum().backward()
        plain(b).pow(2).sum().backward()
        assert_close(a.grad, b.grad)
        assert_close([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])
    assert_close(net.state_dict(), plain.state_dict())


RENORM = {
    "short way": {},
    "momentum of a callable": {"momentum": lambda: 0.1},
    "clipped and debiased": {"renorm_clipping": {"rmax": 3.0, "rmin": 1 / 3, "dmax": 5.0}, "debias": True},
    "adjustment with gradients": {"adjustment": lambda shape: (torch.ones(4, requires_grad=True), 0.0)},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("options", RENORM)
def test_checkpointing_renorm(name, options):
    """A repeated call sees the statistics that the first one saw, also if others came between."""
    net = nn.Sequential(nbbn.torch.BatchNorm1d(4, renorm=True, **RENORM[options]), nn.Tanh(), nn.Linear(4, 1))
    plain = copy.deepcopy(net)
    for _ in range(2):
        a, b = ([leaf(x) for x in parts] for parts in [torch.randn(3, 8, 4) * 10 + 20] * 2)
        sum(checkpoint(net, x, **CHECKPOINTS[name]).pow(2).sum() for x in a).backward()
        sum(plain(x).pow(2).sum() for x in b).backward()
        assert_close([x.grad for x in a], [x.grad for x in b])
        assert_close([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])
    assert_close(net.state_dict(), plain.state_dict())


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"renorm": True}, {"debias": True}], ids=str)
def test_accumulation(options):
    """Micro-batches that count as one; a call that is repeated does not count again."""
    net = nn.Sequential(nbbn.torch.BatchNorm1d(4, **options), nn.Linear(4, 1))
    whole = copy.deepcopy(net)
    for _ in range(2):
        x = torch.randn(12, 4)
        with nbbn.torch.accumulate(net) as batch:
            before = copy.deepcopy(net.state_dict())
            for i, part in enumerate(x.split(4)):
                batch.micro_batch(i)
                net(part).sum().backward()
                net(part)
            assert_close(net.state_dict(), before)
        whole(x)
        assert_close(net.state_dict(), whole.state_dict())


def test_what_accumulate_refuses():
    net = nn.Sequential(nbbn.torch.BatchNorm1d(4))
    with pytest.raises(ValueError, match="convert"):
        nbbn.torch.accumulate(nn.BatchNorm1d(4))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        nbbn.torch.accumulate([net])
    with pytest.raises(RuntimeError, match="BatchNorm1d"), nbbn.torch.accumulate(net), nbbn.torch.accumulate(net):
        pass
    before = copy.deepcopy(net.state_dict())

    def fails():
        with nbbn.torch.accumulate(net):
            net(torch.randn(5, 4))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert_close(net.state_dict(), before)
    net(torch.randn(5, 4))
    assert net[0].num_batches_tracked == 1


def test_update_bn():
    ours = nn.Sequential(nn.Conv2d(3, 4, 3), nbbn.torch.BatchNorm2d(4))
    theirs = nn.Sequential(copy.deepcopy(ours[0]), nn.BatchNorm2d(4))
    data = [torch.randn(5, 3, 6, 6) for _ in range(3)]
    for net in (ours, theirs):
        update_bn(data, net)
    assert ours[1].num_batches_tracked == 3
    assert ours[1].momentum == 0.1
    assert_close(ours.state_dict(), theirs.state_dict())


def test_fuse_conv_bn_eval():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nbbn.torch.BatchNorm2d(4))
    x = torch.randn(5, 3, 6, 6)
    net(x)
    net.eval()
    assert_close(fuse_conv_bn_eval(*net)(x), net(x))


def test_threads_train_modules_of_their_own():
    x, failed = torch.randn(16, 8), []

    def work():
        ours, theirs = nbbn.torch.BatchNorm1d(8), nn.BatchNorm1d(8)
        for _ in range(50):
            if not torch.allclose(ours(x), theirs(x), atol=1e-5):
                failed.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


# -- conversion -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, bias=False)])
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))

    def forward(self, x):
        for norm in self.norms:
            x = norm(x)
        return self.body(x)


@pytest.mark.parametrize("fuse_relu", [False, True])
def test_convert(fuse_relu):
    net, calls = Block(), []
    net.norms[0].eval()
    plain = copy.deepcopy(net)
    net.norms[1].register_forward_hook(lambda *args: calls.append(args))
    tensors = {name: id(t) for name, t in [*net.named_parameters(), *net.named_buffers()]}
    assert nbbn.torch.convert(net, fuse_relu=fuse_relu) is net
    assert {name: id(t) for name, t in [*net.named_parameters(), *net.named_buffers()]} == tensors
    assert [type(m) for m in net.norms] == [nbbn.torch.BatchNorm2d] * 3
    assert [m.training for m in net.norms] == [False, True, True]
    assert net.body[1].activation == ("relu" if fuse_relu else None)
    assert isinstance(net.body[2], nn.Identity if fuse_relu else nn.ReLU)
    for _ in range(2):
        x = torch.randn(5, 4, 3, 3)
        a, b = leaf(x), leaf(x)
        y, expected = net(a), plain(b)
        assert_close(y, expected)
        y.pow(3).sum().backward(), expected.pow(3).sum().backward()
        assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    assert len(calls) == 2
    assert_close(net.state_dict(), plain.state_dict())


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("place", [0, 1])
def test_what_has_hooks_is_not_fused(kind, place):
    """They see the tensors that they saw."""
    net, calls = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()), []
    getattr(net[place], kind)(lambda *args: calls.append(args[-1]))
    x = torch.randn(5, 4)
    for _ in range(2):
        net(leaf(x)).pow(2).sum().backward()
        nbbn.torch.convert(net, fuse_relu=True)
    assert len(calls) == 2
    assert_close(*calls)


def test_convert_with_options():
    module = nn.BatchNorm1d(4)
    for _ in range(20):
        module(torch.randn(8, 4) + 3)
    new = nbbn.torch.convert(module, renorm=True, virtual_batch_size=4)
    assert type(new) is nbbn.torch.BatchNorm1d
    assert new.virtual_batch_size == 4
    assert_close(new.renorm_mean, module.running_mean)
    shared = nn.BatchNorm1d(4)
    net = nn.Sequential(nn.Sequential(shared, nn.ReLU()), shared)
    nbbn.torch.convert(net, fuse_relu=True)
    assert net[0][0] is net[1]
    assert net[1].activation is None  # its second place has no ReLU
    before = nn.Sequential(nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="activation"):
        nbbn.torch.convert(before, activation="gelu")
    assert type(before[0]) is nn.BatchNorm1d
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        nbbn.torch.convert([before])


@pytest.mark.parametrize("how", ["converted", "loaded"])
@pytest.mark.parametrize("options", [{"debias": True}, {"debias": True, "renorm": True}], ids=str)
def test_debiased_averages_go_on(how, options):
    """From what a module of torch.nn has seen; a new one has seen nothing."""
    trained, new = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    for _ in range(50):
        trained(torch.randn(64, 4) + 5)
    for module in (trained, new):
        before = module.running_mean.clone()
        if how == "converted":
            ours = nbbn.torch.convert(module, **options)
        else:
            ours = nbbn.torch.BatchNorm1d(4, **options)
            ours.load_state_dict(module.state_dict())
        x = torch.randn(64, 4)
        ours(x)
        assert_close(ours.running_mean, x.mean(0) if module is new else 0.9 * before + 0.1 * x.mean(0))


def test_a_state_dict_with_a_part_of_an_option_is_incomplete():
    module = nbbn.torch.BatchNorm1d(4, renorm=True, debias=True)
    for name in ("seen_mean", "renorm_mean"):
        state = module.state_dict()
        del state[name]
        with pytest.raises(RuntimeError, match=rf"Missing key\(s\) in state_dict: \"{name}\""):
            module.load_state_dict(state)


def test_convert_again():
    """A network that has been converted can have other options; what it has not been asked for stays."""
    net = nbbn.torch.convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()), skip_nonfinite=True)
    net(torch.randn(6, 3))
    mean = net[1].running_mean
    same = net[1]
    nbbn.torch.convert(net)
    assert net[1] is same
    nbbn.torch.convert(net, renorm=True, fuse_relu=True)
    assert (net[1].renorm, net[1].skip_nonfinite, net[1].activation) == (True, True, "relu")
    assert type(net[2]) is nn.Identity
    assert net[1].running_mean is mean
    assert_close(net[1].renorm_mean, mean)
    nbbn.torch.convert(net, renorm=False)
    assert list(net[1].state_dict()) == list(nn.BatchNorm1d(4).state_dict())


def test_what_convert_refuses():
    with pytest.raises(TypeError, match=r"renorm_momentum.*received renrom"):
        nbbn.torch.convert(nn.Sequential(nn.Linear(2, 2)), renrom=True)
    with pytest.raises(ValueError, match="activation"):
        nbbn.torch.convert(nn.Sequential(nn.Linear(2, 2)), activation="gelu")
    synchronized = nn.Sequential(nbbn.torch.SyncBatchNorm(4, debias=True))
    assert nbbn.torch.convert(synchronized, debias=True) is synchronized
    with pytest.raises(ValueError, match=r"SyncBatchNorm keeps its options.*'renorm': True"):
        nbbn.torch.convert(synchronized, renorm=True)


# -- the benchmarks -------------------------------------------------------------------------------------------------


def test_every_case_of_the_benchmarks_runs():
    """Every contender computes what it says; nothing here asserts a time."""
    cases = list(benchmark.cases(quick=True))
    assert len({case.name for case in cases}) == len(cases) >= 10
    for case in cases:
        assert case.reference in case.contenders
        for call in case.contenders.values():
            call()
    found = {"torch": [{"case": "x", "times": {"nbbn": {"median": 2e-6}}, "ratios": {"nbbn": 0.5}, "bound": 1.15}]}
    assert "| x | nbbn 2.0 | nbbn 0.50 | 1.15 |" in suite.table(found)


# -- the page -------------------------------------------------------------------------------------------------------


def test_the_example(capsys):
    """One line swapped rescues the accuracy: with seeds from 0 to 5 it was 0.81 to 0.83 before, and 0.94 to 0.96."""
    threads = torch.get_num_threads()
    try:
        accuracies = runpy.run_path(str(EXAMPLE))["main"]()
    finally:
        torch.set_num_threads(threads)
    assert accuracies["torch.nn.BatchNorm1d"] < 0.84
    assert accuracies["nbbn.torch.BatchNorm1d"] > 0.9
    assert "nbbn.torch.BatchNorm1d" in capsys.readouterr().out
