"""A group of processes, by torch.distributed."""

import datetime
from typing import Any

import numpy as np

from nbbn.sync.group import OneProcess, SyncError, check_timeout


class TorchGroup(OneProcess):
    """The ranks of a process group; see torch().

    Where that is all processes it has a process group of its own, for all layers: one for each layer would take three
    threads and five files. transport: the process group that has the messages.
    """

    def __init__(self, process_group: Any, timeout: float | None) -> None:
        import torch.distributed as dist

        super().__init__()
        self._dist = dist
        ranks, backend = dist.get_process_group_ranks(process_group), dist.get_backend(process_group)
        self._timeout = None if timeout is None else datetime.timedelta(seconds=timeout)
        self.transport = process_group
        if len(ranks) == dist.get_world_size():
            # For some of the processes PyTorch would need the others, too, or, with use_local_synchronization, that all
            # of them have equally many groups.
            try:
                self.transport = dist.new_group(backend=backend, timeout=self._timeout)
            except RuntimeError as error:
                raise SyncError(f"the {len(ranks)} ranks could not make a process group: {error}") from error
        self.rank, self.size = dist.get_rank(self.transport), len(ranks)
        self._device = "cuda" if backend == "nccl" else "cpu"  # NCCL knows arrays of a GPU only

    def all_gather(self, values: np.ndarray) -> np.ndarray:
        """Raises: SyncError if torch.distributed fails: if a rank is gone, or does not come in time."""
        import torch

        self.check_process()
        mine = torch.from_numpy(np.array(values, np.float64)).to(self._device)
        found = torch.empty((self.size, mine.numel()), dtype=torch.float64, device=self._device)
        try:
            work = self._dist.all_gather([*found], mine, group=self.transport, async_op=True)
            work.wait() if self._timeout is None else work.wait(self._timeout)
        except RuntimeError as error:
            raise SyncError(f"the {self.size} ranks of the process group did not come together: {error}") from error
        result: np.ndarray = found.cpu().numpy()
        return result


def torch(process_group: Any = None, timeout: float | None = None) -> TorchGroup:
    """The group of a process group of torch.distributed: gloo for arrays of the host, NCCL for those of a GPU. All its
    ranks have to ask for it.

    Args:
        process_group: None is the default one. timeout: seconds that a rank waits for the others; None is what
            torch.distributed waits.
    Raises: ImportError without PyTorch; TypeError, ValueError for what is no process group, or no number of seconds;
        what torch.distributed raises where no process group is initialized.
    """
    import torch.distributed as dist

    if not (process_group is None or isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(f"process_group must be one of torch.distributed, or None; received {process_group!r}")
    timeout = None if timeout is None else check_timeout(timeout)
    return TorchGroup(dist.group.WORLD if process_group is None else process_group, timeout)
