"""Moments that do not leave the GPU between ranks, in Numba's simulator: tests/helpers/direct_in_simulator.py."""

import importlib.util

import pytest

from nbbn.sync import torch_group
from tests.test_sync_processes import over_gloo

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("n", [2, 3])
def test_moments_that_stay_on_the_device(n):
    """One rank of three has no data."""
    if importlib.util.find_spec("numba_cuda") is None:
        pytest.skip("numba-cuda is missing (extra: cuda)")
    results = over_gloo(n, "-W", "error", "-m", "tests.helpers.direct_in_simulator", NUMBA_ENABLE_CUDASIM="1")
    assert [code for code, _, _ in results] == [0] * n, "\n".join(err for _, _, err in results)
    assert results[0][1] == "4 cases agree\n"


class Work:
    """A message of NCCL of which the other side comes at the `n`-th look."""

    def __init__(self, n):
        self.looks, self.n, self.waited = 0, n, False

    def is_completed(self):
        self.looks += 1
        return self.looks >= self.n

    def wait(self):
        self.waited = True


def test_waiting_for_a_message_of_nccl():
    """Its own wait() is for the stream: it comes when the others are there, or never."""
    work = Work(5)
    torch_group._poll(work, 20)
    assert work.waited
    work = Work(float("inf"))
    with pytest.raises(RuntimeError, match="some were missing for"):
        torch_group._poll(work, 0.05)
    assert not work.waited
