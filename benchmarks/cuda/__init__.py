"""How fast nbbn is on a GPU: `python -m benchmarks cuda`, from a clone, on a machine that has one."""
