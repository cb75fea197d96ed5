"""Benchmarks from the same specs as the tests: `python -m benchmarks.run --help`, `python -m benchmarks.plot --help`."""
