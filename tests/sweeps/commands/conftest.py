"""What tests of several commands share."""

import pytest


@pytest.fixture
def few_probes(monkeypatch):
    """Five items a task where a command takes the whole built-in suite: seconds become milliseconds."""
    from locft.data import suites as benchmarks

    whole = benchmarks.load_suite

    def few(suite, tasks=None, limit=None, prose=None):
        return whole(suite, tasks, limit or 5, prose)

    monkeypatch.setattr(benchmarks, "load_suite", few)
