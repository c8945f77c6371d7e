"""What keeps the host process alive and quick: threads, forks and compiled kernels on disk."""

from nbbn.runtime.cache import cache_folder, compile_kernel
from nbbn.runtime.threads import StateLock, parallel_region, thread_limit

__all__ = ["StateLock", "cache_folder", "compile_kernel", "parallel_region", "thread_limit"]
