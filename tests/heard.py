"""What several tests need around running trials: a reporter that remembers, workers by their processes, results without timings."""

import psutil

from sweeps.study.trial_types import TrialConfig, TrialResult

TIMINGS = ("seconds", "seconds_per_edit", "train_seconds", "evaluate_seconds", "capability_seconds")


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


def trial_workers():
    """Processes of this test's Ray that run trials."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "TrialWorker.train" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            pass
    return found
