"""How fast nbbn is, against other libraries and against the memory: `python -m benchmarks`, from a clone."""
