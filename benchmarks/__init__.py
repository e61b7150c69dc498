"""Benchmarks: `python run.py bench NAME` runs one and keeps its figures."""

import tools  # noqa: F401  registers the repository as the package membrane
