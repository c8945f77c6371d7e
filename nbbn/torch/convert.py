"""Modules of torch.nn in a network, replaced by nbbn's."""

from collections import Counter
from itertools import pairwise
from typing import Any

from torch import nn

from nbbn.torch.replacing import KINDS, Replacements, has_hooks, put, successor


def convert(module: nn.Module, *, fuse_relu: bool = False, **options: Any) -> nn.Module:
    """A network in which nbbn's modules stand in the places of torch.nn's BatchNorm1d, 2d and 3d.

    Parameters and buffers stay the same objects, so optimizers and checkpoints go on as they are; hooks and training
    flags go over. Modules of other classes, subclasses of torch.nn's too, stay.

    Args:
        module: changed in its place, unless it is such a module itself. fuse_relu: also let a BatchNorm and a ReLU that
            follows it in an nn.Sequential be one module, unless one of them has hooks; an Identity takes the ReLU's
            place. A slice of the Sequential that ends with the norm then has the ReLU, too.
        options: of nbbn.torch.BatchNorm2d behind torch.nn's arguments, for all of them.
    Returns: the network.
    Raises: TypeError, ValueError as nbbn.torch.BatchNorm2d; the network is then as it was.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module; received {type(module).__name__}")
    new: Replacements = {}
    for old in module.modules():
        if type(old) in KINDS:
            new[old] = successor(old, KINDS[type(old)], options)
    fused: list[tuple[nn.Module, str]] = []
    if fuse_relu:
        places = Counter(child for parent in module.modules() for child in parent._modules.values())
        shared = {child for child, n in places.items() if n > 1}  # its other places may have no ReLU
        for parent in module.modules():
            if isinstance(parent, nn.Sequential):
                fused += _fuse(parent, {old for old in new if old not in shared}, new, options)
    found = put(module, new)
    for parent, name in fused:
        parent._modules[name] = nn.Identity()
    return found


def _fuse(
    parent: nn.Sequential, old: set[nn.Module], new: Replacements, options: dict[str, Any]
) -> list[tuple[nn.Module, str]]:
    """Let the successors of modules among `old` take over the ReLU behind them. Returns: where ReLUs are no more."""
    gone, names = [], list(parent._modules)
    for first, second in pairwise(names):
        before, after = parent._modules[first], parent._modules[second]
        if before in old and type(after) is nn.ReLU and not (has_hooks(before) or has_hooks(after)):
            new[before] = successor(before, KINDS[type(before)], options | {"activation": "relu"})
            gone.append((parent, second))
    return gone
