"""The gate with a GPU: ``python -m benchmarks.device``; ``docs/gpu.md`` says how to call it.

Needs torch, triton, pytest and pytest-benchmark, and the packages that the package itself imports.
"""
