"""Whether the thresholds of nbbn/engine/cpu/schedule.py suit this machine: `python -m benchmarks calibrate`, from a
clone."""
