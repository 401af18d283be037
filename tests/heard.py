"""What several tests need around running trials: a reporter that remembers, results without timings, work without training."""

import time

from sweeps.study.trial_types import TrialConfig, TrialResult

TIMINGS = ("seconds", "seconds_per_edit", "train_seconds", "evaluate_seconds", "capability_seconds")
ENDLESS = 10**7
"""Epochs."""


class Heard:
    """A reporter that remembers, and does something after each result."""

    def __init__(self, then=lambda result: None):
        self.results: list[TrialResult] = []
        self.deaths: list[TrialConfig] = []
        self.most_running = 0
        self.notes: list[str] = []
        self.then = then

    def note(self, text):
        self.notes.append(text)

    def started(self, running):
        self.most_running = max(self.most_running, running)

    def retried(self, config, cause):
        assert cause and "\n" not in cause
        self.deaths.append(config)

    def finished(self, result, running):
        self.results.append(result)
        self.then(result)

    @property
    def by_id(self):
        assert len({result.config.id for result in self.results}) == len(self.results)
        return {result.config.id: result for result in self.results}


def comparable(result):
    """Everything of a result that must not depend on when and where it was computed."""
    metrics = {name: value for name, value in result.metrics.items() if name not in TIMINGS}
    return result.status, metrics, result.epoch_losses, result.outcomes


def sleep_or_finish(config):
    """Work of a trial that takes no time, or all of it: a worker for it starts without PyTorch, in half the time."""
    while config.epochs == ENDLESS:
        time.sleep(1)
    return TrialResult(config, "done", None, {"reliability": 1.0})
