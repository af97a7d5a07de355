"""The papers' tables on the data at hand; ``python -m benchmarks.tables --help``."""
