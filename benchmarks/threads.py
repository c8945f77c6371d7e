"""One number of threads for everybody. Most libraries look at the environment once, when they are imported."""

import os

_ASKED = "NBBN_BENCHMARK_THREADS"
_VARIABLES = (
    "NBBN_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "OMP_NUM_THREADS",  # PyTorch
    "MKL_NUM_THREADS",
    "NPROC",  # XLA, for JAX
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
    _ASKED,
)


def environment(threads: int) -> dict[str, str]:
    """What must be set before the first import, for this many threads. Raises: ValueError for none."""
    if threads < 1:
        raise ValueError(f"--threads must be at least 1; received {threads}")
    return dict.fromkeys(_VARIABLES, str(threads))


def asked() -> int:
    """For the libraries that are told by a call; 0 for what they take by default."""
    return int(os.environ.get(_ASKED, "0"))
