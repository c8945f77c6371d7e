"""Batch renormalization and ghost batches against plain batch normalization, on the digits of scikit-learn."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nbbn.demo import report
from nbbn.demo.scenarios import SCENARIOS
from nbbn.demo.training import Result, load, train
from nbbn.runtime import parallel_region

QUICK_SHARE = 2 / 3  # of the steps


def missing_extra() -> str | None:
    """Why the packages of the extra `demo` cannot be imported, in one line; None if they can."""
    try:
        import matplotlib.figure  # noqa: F401
        import sklearn.datasets  # noqa: F401
        import threadpoolctl  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        return f"the demo needs scikit-learn, matplotlib and tqdm ({error}): pip install nbbn[demo]"
    return None


def run(output: Path, seeds: int | None = None, quick: bool = False) -> int:
    """Train every scenario with every method, print the table, save the picture. Returns the exit code."""
    missing = missing_extra()
    if missing is not None:
        print(missing, file=sys.stderr)
        return 1
    seeds = seeds or (2 if quick else 5)
    start = time.perf_counter()
    results = train_all(seeds, QUICK_SHARE if quick else 1.0)
    seconds = time.perf_counter() - start
    print(f"Test accuracy in %: mean ± standard deviation (seeds: {seeds}; seconds: {seconds:.0f})")
    print("(inference: moving statistics; training mode: the statistics of batches composed as in training)\n")
    print(*report.table(SCENARIOS, results), sep="\n")
    report.draw(SCENARIOS, results, output)
    print(f"\nThe picture is {output}. Lines: accuracy in inference; diamonds: in training mode, at the end. To see:")
    print(*report.summary(SCENARIOS, results), sep="\n")
    return 0


def train_all(seeds: int, share_of_steps: float) -> dict[tuple[str, str], list[Result]]:
    from tqdm import tqdm

    digits = load()
    steps = {s.name: round(share_of_steps * s.steps) for s in SCENARIOS}
    total = seeds * sum(steps[s.name] * len(s.methods) for s in SCENARIOS)
    results = {}
    with one_thread(), tqdm(total=total, unit=" steps", leave=False, disable=None) as bar:
        for s in SCENARIOS:
            for m in s.methods:
                bar.set_description(f"{s.name}, {m}")
                results[s.name, m] = [train(s, m, seed, digits, steps[s.name], bar.update) for seed in range(seeds)]
    return results


@contextmanager
def one_thread() -> Iterator[None]:
    """Arrays this small gain little from thread pools, and lose much where other processes want the cores."""
    import threadpoolctl

    limits = threadpoolctl.threadpool_limits(1, user_api="blas")
    with limits, parallel_region():  # who holds the pool leaves one thread to all others, here to the layers
        yield
