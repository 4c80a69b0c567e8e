"""Benchmarks: `kernels.py` measures kernels, `bench.py` whole engines side by side."""
