"""Statistics that several processes, or threads, share."""

from nbbn.sync.group import Group, SyncError
from nbbn.sync.mpi_group import mpi
from nbbn.sync.thread_group import threads
from nbbn.sync.torch_group import torch

__all__ = ["Group", "SyncError", "mpi", "threads", "torch"]
