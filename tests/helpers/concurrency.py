"""Functions in threads that change places often."""

import sys
import threading


def in_threads(functions):
    """Run all functions at once; fail with what any of them raised, or if one hangs."""
    errors, barrier = [], threading.Barrier(len(functions))

    def guarded(function):
        barrier.wait()
        try:
            function()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=guarded, args=(f,), daemon=True) for f in functions]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
        assert not any(t.is_alive() for t in threads), "a thread hangs"
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


def in_threads_beside(work, watch):
    """Run work() once and, in two other threads, watch() again and again until it has ended. Fails as in_threads()."""
    ended = threading.Event()

    def once():
        try:
            work()
        finally:
            ended.set()

    def again():
        while not ended.is_set():
            watch()

    in_threads([once, again, again])
