"""A group of processes, by torch.distributed."""

import datetime
import time
from typing import Any

import numpy as np

from nbbn.sync.group import OneProcess, SyncError, check_timeout

_PAUSE = 20e-6  # seconds between two looks at a message of NCCL


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
        by_device = dict(pair.split(":") for pair in str(dist.get_backend_config(self.transport)).split(","))
        self._device = "cpu" if "cpu" in by_device else "cuda"  # NCCL knows arrays of a GPU only
        self._is_direct = by_device.get("cuda") == "nccl"

    def all_gather(self, values: np.ndarray) -> np.ndarray:
        """Raises: SyncError if torch.distributed fails: if a rank is gone, or does not come in time."""
        import torch

        mine = torch.from_numpy(np.array(values, np.float64)).to(self._device)
        found = mine.new_empty((self.size, *mine.shape))
        self._gather(found, mine, self._timeout)
        result: np.ndarray = found.cpu().numpy()
        return result

    def takes(self, array: Any) -> bool:
        """Whether gather_into() is for this array of a GPU: a tensor, where NCCL is there for such."""
        import torch

        return self._is_direct and isinstance(array, torch.Tensor)

    def gather_into(self, found: Any, mine: Any) -> None:
        """Write the tensors of all ranks to `found`, (size, *shape), without the host, which does not wait. So it is
        for ranks that have just agreed. Raises: as all_gather()."""
        self._gather(found, mine, None)

    def _gather(self, found: Any, mine: Any, timeout: datetime.timedelta | None) -> None:
        self.check_process()
        try:
            work = self._dist.all_gather([*found], mine, group=self.transport, async_op=True)
            if timeout is None:
                work.wait()
            elif self._device == "cpu":
                work.wait(timeout)
            else:
                _poll(work, timeout.total_seconds())
        except RuntimeError as error:
            raise SyncError(f"the {self.size} ranks of the process group did not come together: {error}") from error


def _poll(work: Any, timeout: float) -> None:
    """Wait for a message of NCCL, whose own wait() lets a stream wait. Raises: RuntimeError."""
    end = time.monotonic() + timeout
    while not work.is_completed():
        if time.monotonic() > end:
            raise RuntimeError(f"some were missing for {timeout} s")
        time.sleep(_PAUSE)
    work.wait()


def torch(process_group: Any = None, timeout: float | None = None) -> TorchGroup:
    """The group of a process group of torch.distributed: gloo for arrays of the host, NCCL for those of a GPU, of which
    CUDA tensors do without the host. All its ranks have to ask for it.

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
