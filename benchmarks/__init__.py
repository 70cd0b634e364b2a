"""Benchmarks: results are checked against the oracle before they are timed, and written as JSON."""
