"""Time and memory against size, ours and the plain one; ``python -m benchmarks.scaling``."""
