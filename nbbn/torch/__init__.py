"""Batch normalization for PyTorch: torch.nn's modules and function with all of nbbn's options."""

from nbbn.torch import functional
from nbbn.torch.accumulation import accumulate
from nbbn.torch.convert import convert
from nbbn.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from nbbn.torch.sync import SyncBatchNorm

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "accumulate", "convert", "functional"]
