"""nbbn.torch against torch.nn: small calls, large ones, and a network like ResNet-18."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import nbbn.torch
from benchmarks.frameworks.cases import Case

Module = Any
FORMATS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}
SMALL_BOUND, LARGE_BOUND = 1.15, 1.0


def cases(quick: bool) -> Iterator[Case]:
    """quick: smaller networks and images."""
    yield from small()
    for name, memory_format in FORMATS.items():
        yield from large(name, memory_format, (8, 64, 28, 28) if quick else (32, 64, 56, 56))
    for name, memory_format in FORMATS.items():
        yield network(name, memory_format, (2, 3, 64, 64) if quick else (8, 3, 224, 224))


def trained(module: Module, x: Any, dy: Any) -> Callable[[], None]:
    """A step forward and back, without what an optimizer does."""
    parameters = list(module.parameters())

    def call() -> None:
        module(x).backward(dy)
        x.grad = None
        for parameter in parameters:
            parameter.grad = None

    return call


def without_gradient(module: Module, x: Any) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            module(x)

    return call


def small() -> Iterator[Case]:
    x, dy = torch.randn(32, 64, requires_grad=True), torch.randn(32, 64)

    def both(name: str, make: Callable[[Module], Callable[[], Any]], training: bool) -> Case:
        modules = {"nbbn": nbbn.torch.BatchNorm1d(64), "torch.nn": nn.BatchNorm1d(64)}
        contenders = {who: make(module.train(training)) for who, module in modules.items()}
        return Case(f"(32, 64), {name}", contenders, "torch.nn", SMALL_BOUND)

    yield both("forward", lambda m: lambda: m(x), True)
    yield both("forward and backward", lambda m: trained(m, x, dy), True)
    yield both("eval", lambda m: lambda: m(x), False)
    yield both("eval without gradient", lambda m: without_gradient(m, x), False)


def large(name: str, memory_format: Any, shape: tuple[int, ...]) -> Iterator[Case]:
    x, residual, dy = (torch.randn(shape).to(memory_format=memory_format) for _ in range(3))
    x.requires_grad_()
    plain = {"nbbn": nbbn.torch.BatchNorm2d(shape[1]), "torch.nn": nn.BatchNorm2d(shape[1])}
    calls = {who: trained(module, x, dy) for who, module in plain.items()}
    yield Case(f"{shape}, {name}, forward and backward", calls, "torch.nn", LARGE_BOUND)

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nbbn.torch.BatchNorm2d(shape[1], activation="relu")

        def forward(self, x: Any) -> Any:
            return self.norm(x, residual)

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(shape[1])

        def forward(self, x: Any) -> Any:
            return (self.norm(x) + residual).relu_()

    calls = {"nbbn": trained(Fused(), x, dy), "torch.nn": trained(Apart(), x, dy)}
    yield Case(f"{shape}, {name}, with residual and relu", calls, "torch.nn", LARGE_BOUND)


class Block(nn.Module):
    """ResNet's basic block."""

    def __init__(self, norm: Callable[[int], Module], fused: bool, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(channels, out, 3, stride, 1, bias=False),
                nn.Conv2d(out, out, 3, 1, 1, bias=False),
            ]
        )
        self.norms = nn.ModuleList([norm(out), norm(out)])
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride, bias=False)
        self.fused = fused

    def forward(self, x: Any) -> Any:
        (first, second), (one, other) = self.convolutions, self.norms
        residual = self.shortcut(x)
        if self.fused:
            return other(second(one(first(x))), residual)
        return (other(second(one(first(x)).relu_())) + residual).relu_()


def resnet(norm: Callable[[int], Module], fused: bool) -> Module:
    """ResNet-18 without its classifier's classes."""
    widths = (64, 64, 128, 128, 256, 256, 512, 512)
    blocks = [
        Block(norm, fused, before, after, 1 if before == after else 2)
        for before, after in zip((64, *widths), widths, strict=False)
    ]
    first = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), norm(64), nn.Identity() if fused else nn.ReLU(inplace=True)]
    return nn.Sequential(*first, nn.MaxPool2d(3, 2, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def network(name: str, memory_format: Any, shape: tuple[int, ...]) -> Case:
    x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
    kinds: dict[str, Any] = {
        "nbbn": (nbbn.torch.BatchNorm2d, False),
        "nbbn, fused": (lambda n: nbbn.torch.BatchNorm2d(n, activation="relu"), True),
        "torch.nn": (nn.BatchNorm2d, False),
    }
    networks = {who: resnet(*kind).to(memory_format=memory_format) for who, kind in kinds.items()}
    dy = torch.randn(shape[0], 512)
    calls = {who: trained(net, x, dy) for who, net in networks.items()}
    return Case(f"ResNet-18, {shape}, {name}, forward and backward", calls, "torch.nn", LARGE_BOUND)
