"""What keeps the host process alive and quick: threads, forks and compiled kernels on disk."""

from nbbn.runtime.cache import cache_folder, compile_kernel, entry_point
from nbbn.runtime.machine import last_level_cache
from nbbn.runtime.threadpool import start_pool
from nbbn.runtime.threads import StateLock, parallel_region, thread_limit

__all__ = [
    "StateLock",
    "cache_folder",
    "compile_kernel",
    "entry_point",
    "last_level_cache",
    "parallel_region",
    "start_pool",
    "thread_limit",
]
