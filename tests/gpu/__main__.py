"""All that a GPU must prove: `python tests/gpu`, on a machine that has one.

Runs the contract of all kernels, the tests of this folder, NVIDIA's compute-sanitizer where it is installed, and with
--benchmarks the benchmarks. Ends with what passed, failed and was left out; the exit code is 1 if anything failed.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # nbbn of this clone
PYTEST = [sys.executable, "-m", "pytest", "-q", "-rs"]
KERNELS = ["tests/test_kernels_cuda.py", "tests/test_kernels_cuda_elements.py"]
CONTRACT = ["tests/test_kernels.py", *KERNELS, "tests/test_stages.py", "-k", "not cpu"]
# Several processes share the GPU, of which JAX would take three quarters for each.
ENVIRONMENT = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
# What the sanitizer looks for, and in what: every kernel in small, as it is slow.
SANITIZED = {
    "memcheck": KERNELS,
    "initcheck": KERNELS,
    "racecheck": KERNELS,
    "synccheck": KERNELS,
}


def steps(benchmarks: bool) -> dict[str, list[str] | None]:
    """Name and command; None for what is not installed."""
    found: dict[str, list[str] | None] = {
        "contract": [*PYTEST, *CONTRACT],
        "machine code": [*PYTEST, "tests/test_ptx.py", "tests/test_ptx_elements.py", "tests/test_cubins.py"],
        "adapters": [*PYTEST, "tests/test_adapters.py"],
        "libraries, JAX's programs, streams, graphs, devices, sizes, parity": [*PYTEST, "tests/gpu"],
    }
    tool = shutil.which("compute-sanitizer")
    for name, files in SANITIZED.items():
        command = [tool, "--tool", name, "--error-exitcode", "3", *PYTEST, *files] if tool else None
        found[f"compute-sanitizer, {name}"] = command
    if benchmarks:
        found["benchmarks"] = [sys.executable, "-m", "benchmarks", "cuda"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/gpu", description="All that a GPU must prove.")
    parser.add_argument("--benchmarks", action="store_true", help="then measure, into benchmarks/results/cuda.json")
    chosen = parser.parse_args()
    from nbbn.arrays import availability

    missing = availability.missing()
    if missing is not None:
        parser.error(f"needs a GPU: {missing}")
    outcome = {}
    for name, command in steps(chosen.benchmarks).items():
        print(f"\n== {name}", flush=True)
        if command is None:
            outcome[name] = "left out: compute-sanitizer is not on the PATH (it comes with the CUDA toolkit)"
            continue
        code = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=False).returncode
        outcome[name] = "passed" if code == 0 else f"FAILED (exit code {code})"
    print("\n" + "\n".join(f"{name}: {result}" for name, result in outcome.items()))
    return int(any(result.startswith("FAILED") for result in outcome.values()))


if __name__ == "__main__":
    sys.exit(main())
