"""Modules in a network that take the places of others, with their tensors."""

from typing import Any

import torch
from torch import nn

from nbbn.torch.modules import DEBIAS, RENORM, BatchNorm1d, BatchNorm2d, BatchNorm3d, Normalization

KINDS = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d}
# Where a module keeps its hooks, which go over as they are.
_HOOKS = tuple(name for name in nn.Identity().__dict__ if "hook" in name)

Replacements = dict[nn.Module, nn.Module]


def successor(old: Any, kind: Any, options: dict[str, Any]) -> Normalization:
    """A module of this kind with the tensors, hooks and training flag of `old`."""
    like = old.running_mean if old.weight is None else old.weight
    place = {} if like is None else {"device": like.device, "dtype": like.dtype}
    has_bias = old.bias is not None or old.weight is None
    new: Normalization = kind(
        old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats, bias=has_bias, **place, **options
    )
    new._parameters.update(old._parameters)
    foreign = {*RENORM, *DEBIAS}.difference(new._buffers)  # of an option that the new one has not
    new._buffers.update({name: buffer for name, buffer in old._buffers.items() if name not in foreign})
    if new.running_mean is not None:
        with torch.no_grad():
            new.extra_from_running(old._buffers)
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]
    new.training = old.training
    return new


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in _HOOKS)


def put(module: nn.Module, new: Replacements) -> nn.Module:
    """The network, changed in its place, or what replaces it."""
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    return new.get(module, module)
