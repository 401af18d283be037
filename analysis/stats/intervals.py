"""Moved to `analysis.stats.table`."""

from analysis.stats.table import expected  # noqa: F401
