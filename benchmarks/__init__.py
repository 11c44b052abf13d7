"""Measurements, each with its alternative in the same run. `python -m benchmarks` runs all of them."""
