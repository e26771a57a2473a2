"""Measurements of powerd itself: `python -m benchmarks`; what ran on the simulated driver says so."""
