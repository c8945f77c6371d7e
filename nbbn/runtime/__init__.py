"""What keeps the host process alive and quick: threads, forks and compiled kernels on disk."""

from nbbn.runtime.cache import (
    cache_folder,
    code_hash,
    compile_kernel,
    entry_point,
    find_cache,
    kept_where,
    load_kernel,
    save_kernel,
)
from nbbn.runtime.machine import last_level_cache
from nbbn.runtime.plain import PLAIN, intrinsic, run_by_python
from nbbn.runtime.progress import LOGGER, compiling
from nbbn.runtime.threadpool import likely_layer, start_pool
from nbbn.runtime.threads import StateLock, limit_in_words, parallel_region, region, thread_limit

__all__ = [
    "LOGGER",
    "PLAIN",
    "StateLock",
    "cache_folder",
    "code_hash",
    "compile_kernel",
    "compiling",
    "entry_point",
    "find_cache",
    "intrinsic",
    "kept_where",
    "last_level_cache",
    "likely_layer",
    "limit_in_words",
    "load_kernel",
    "parallel_region",
    "region",
    "run_by_python",
    "save_kernel",
    "start_pool",
    "thread_limit",
]
