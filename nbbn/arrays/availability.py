"""Whether kernels can run on a GPU here, and what is missing if not."""

import os
from importlib.util import find_spec

import numba


def missing() -> str | None:
    """What is missing, and what to do about it; None where a GPU can be used."""
    simulated = numba.config.ENABLE_CUDASIM  # by Numba itself, which needs no other package for it
    if not simulated and find_spec("numba_cuda") is None:
        return 'numba-cuda is not installed: pip install "nbbn[cuda]"'
    try:
        from numba import cuda
    except ImportError as error:
        return f"numba-cuda cannot be imported ({error})"
    if cuda.is_available():
        return None
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES is empty, which hides every GPU"
    try:
        count = len(cuda.gpus)
    except Exception as error:  # whatever the driver's absence makes of it
        return f"there is no working CUDA driver ({' '.join(str(error).split()).rstrip(': ')})"
    return f"the CUDA driver sees {count} GPUs, and Numba can use none"


def require(what: str, device: int = 0) -> None:
    """Raises: RuntimeError that says why `what` cannot be had."""
    why = missing()
    if why is None:
        from numba import cuda

        count = len(cuda.gpus)
        why = None if device < count else f"there are {count}, cuda:0 the first; received number {device}"
    if why is not None:
        raise RuntimeError(f"{what} needs a GPU: {why}")
