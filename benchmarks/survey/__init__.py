"""How fast nbbn is at shapes that nobody has chosen: `python -m benchmarks survey`, from a clone."""
