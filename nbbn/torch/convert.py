"""Modules of torch.nn in a network, replaced by nbbn's."""

from collections import Counter
from itertools import pairwise
from typing import Any

from torch import nn

from nbbn.torch.modules import OPTIONS, BatchNorm1d
from nbbn.torch.replacing import KINDS, Replacements, has_hooks, put, successor
from nbbn.torch.sync import SyncBatchNorm

Asked = dict[nn.Module, tuple[Any, dict[str, Any]]]  # kinds and options of successors


def convert(module: nn.Module, *, fuse_relu: bool = False, **options: Any) -> nn.Module:
    """A network in which nbbn's modules stand in the places of torch.nn's BatchNorm1d, 2d and 3d, with these options.

    Parameters and buffers stay the same objects, so optimizers and checkpoints go on as they are; hooks and training
    flags go over. Modules of other classes, subclasses too, stay.

    Args:
        module: changed in its place, unless it is such a module itself. fuse_relu: also let a BatchNorm and a ReLU that
            follows it in an nn.Sequential be one module, unless one of them has hooks; an Identity takes the ReLU's
            place. A slice of the Sequential that ends with the norm then has the ReLU, too.
        options: of nbbn.torch.BatchNorm2d behind torch.nn's arguments, for all of them; modules of nbbn keep their
            other options.
    Returns: the network.
    Raises: TypeError, ValueError as nbbn.torch.BatchNorm2d, and for a SyncBatchNorm of nbbn with other options; the
        network is then as it was.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module; received {type(module).__name__}")
    _check_options(options)
    asked: Asked = {old: (KINDS[type(old)], options) for old in module.modules() if type(old) in KINDS}
    for old in module.modules():
        if isinstance(old, SyncBatchNorm):
            _check_same(old, options)
        elif type(old) in KINDS.values() and (options or fuse_relu):
            asked[old] = type(old), old.options() | options
    fused: list[tuple[nn.Module, str]] = []
    if fuse_relu:
        places = Counter(child for parent in module.modules() for child in parent._modules.values())
        shared = {child for child, n in places.items() if n > 1}  # its other places may have no ReLU
        for parent in module.modules():
            if isinstance(parent, nn.Sequential):
                fused += _fuse(parent, shared, asked)
    new: Replacements = {old: successor(old, *how) for old, how in asked.items()}
    found = put(module, new)
    for parent, name in fused:
        parent._modules[name] = nn.Identity()
    return found


def _check_options(options: dict[str, Any]) -> None:
    """Raises: TypeError for a name that is no option, ValueError for values, also where nothing is converted."""
    unknown = sorted(options.keys() - OPTIONS)
    if unknown:
        raise TypeError(f"convert() has the options {', '.join(OPTIONS)}; received {', '.join(unknown)}")
    BatchNorm1d(1, **options)


def _check_same(module: SyncBatchNorm, options: dict[str, Any]) -> None:
    """Raises: ValueError for options that it has not."""
    other = {name: value for name, value in options.items() if getattr(module, name) != value}
    if other:
        raise ValueError(f"a SyncBatchNorm keeps its options: make it of a converted network; received {other}")


def _fuse(parent: nn.Sequential, shared: set[nn.Module], asked: Asked) -> list[tuple[nn.Module, str]]:
    """Ask the successors of modules that are not shared for the ReLU behind them. Returns: where ReLUs are no more."""
    gone, names = [], list(parent._modules)
    for first, second in pairwise(names):
        before, after = parent._modules[first], parent._modules[second]
        if before not in asked or before in shared or type(after) is not nn.ReLU:
            continue
        if not (has_hooks(before) or has_hooks(after)):
            kind, options = asked[before]
            asked[before] = kind, options | {"activation": "relu"}
            gone.append((parent, second))
    return gone
