"""The operators, measured: `python -m benchmarks.operators`."""
