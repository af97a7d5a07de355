"""Reports of benchmark results: Markdown, plots, comparisons; ``python -m benchmarks.report``."""
