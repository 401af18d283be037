"""Progress of trials on standard error: a line for each trial."""

import math
import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from analysis.stats.formats import by_format
from analysis.stats.table import FRACTIONS, setting_text
from analysis.stats.wording import number, percent, seconds
from sweeps.commands.console import notice
from sweeps.study.trial_types import TrialConfig, TrialResult

if TYPE_CHECKING:
    from sweeps.select.policy import Rung
    from sweeps.study.estimate import Forecast

TOLD_METRICS = (*FRACTIONS, "capability")


class Progress:
    """A reporter (`sweeps.run.dispatch`) that says every trial, and every rung of a selection, in one line."""

    def __init__(self, name: str, forecast: "Forecast | None" = None, earlier: Collection[str] = ()):
        """name: the study's name. forecast: that of a sweep, for the number of trials and the time left; a selection plans
        rung by rung and has none. earlier: ids of the trials that are already done, which it says."""
        self.running = 0
        self.failed_ids: set[str] = set()
        self.finished_ids = set(earlier)  # a trial whose worker died may be reported twice
        kept = self.planned = len(self.finished_ids)
        self.pace, self._deadline = None, math.inf
        if forecast is not None:
            plan, budget = forecast.prepared.plan, forecast.prepared.study.budget
            self.planned = max(kept, min(plan.count, budget.trials or plan.count))
            self.pace = Pace(forecast, self.finished_ids, self.planned - kept)
            self._deadline = forecast.made + 60 * (budget.minutes or math.inf)
        if kept:
            self.note(f"{name}: {kept} of {self.planned} trials are already finished and are kept")

    def note(self, text: str) -> None:
        notice(text)

    def rung(self, rung: "Rung", open_runs: int, left: float) -> None:
        """A rung of a selection begins; `open_runs` of its runs are not done yet. left: seconds that the budget still lasts."""
        self.planned += open_runs
        known = len(rung.runs) - open_runs
        text = f"{rung.name}: {rung.why}" + (f" ({known} already known)" if known else "")
        if open_runs:
            text += f"; about {seconds(left)} of the budget remain"
            text += "" if self.planned > open_runs else " (--budget-share or --budget-minutes sets it)"
        self.note(text)

    def started(self, running: int) -> None:
        self.running = running

    def retried(self, config: TrialConfig, cause: str) -> None:
        self.note(f"{_trial(config)}: its worker died; trying again ({cause})")

    def finished(self, result: TrialResult, running: int) -> None:
        self.running = running
        if self.pace:
            self.pace.finished(result)
        self.failed_ids.discard(result.config.id)
        (self.failed_ids if result.status == "failed" else self.finished_ids).add(result.config.id)
        left = self.seconds_left()
        said = f"[{self.done + self.failed}/{self.planned}] {_trial(result.config)}: {_outcome(result)}"
        self.note(said + (f"; about {seconds(left)} left" if left else ""))

    @property
    def done(self) -> int:
        return len(self.finished_ids)

    @property
    def failed(self) -> int:
        return len(self.failed_ids)

    def seconds_left(self) -> float | None:
        """Time left at the pace of this run's trials, capped by the budget; None after the last trial or without a forecast."""
        left = self.pace and self.pace.seconds_left(self.planned - self.done - self.failed, self.running)
        return left and min(left, max(0.0, self._deadline - time.monotonic()))


class Pace:
    """Time left: the expected seconds of the open trials, scaled by how long finished ones took against their forecast."""

    def __init__(self, forecast: "Forecast", done: Collection[str], most: int):
        """done: ids of the trials that are not open. most: how many of the open ones will be run."""
        self._forecast = forecast
        trials = [trial for trial in forecast.prepared.plan.trials if trial.id not in done]
        self._open = {trial.id: forecast.seconds(trial) for trial in trials[:most]}
        self._at_once = 1
        # The forecast counts as one finished trial, because a worker's first trial warms it up and is slow.
        self._taken = self._expected = forecast.estimate.seconds_per_trial

    def finished(self, result: TrialResult) -> None:
        expected = self._open.pop(result.config.id, None) or self._forecast.seconds(result.config)
        if "seconds" in result.metrics:
            self._taken += result.metrics["seconds"]
            self._expected += expected

    def seconds_left(self, open_trials: int, running: int) -> float | None:
        """Time left for `open_trials`, of which the `running` ones count as half done. None when none are open."""
        if open_trials <= 0:
            return None
        self._at_once = max(self._at_once, running)
        work = sum(self._open.values()) or open_trials * self._forecast.estimate.seconds_per_trial
        return self._taken / self._expected * work * (1 - running / open_trials / 2) / min(self._at_once, open_trials)


def _trial(config: TrialConfig) -> str:
    return f"{config.position}, {setting_text(config.to_dict())}, seed {config.seed}"


def _outcome(result: TrialResult) -> str:
    if result.status == "failed":
        return f"failed: {result.error}"
    if result.metrics.get("diverged"):
        return "diverged"
    found = [f"{name} {percent(result.metrics[name])}" for name in TOLD_METRICS if name in result.metrics]
    if formats := by_format(result.metrics, "reliability"):
        found[0] += f" ({', '.join(f'{name} {percent(share)}' for name, share in formats.items())})"
    if "drift_kl" in result.metrics:
        found.append(f"drift {number(result.metrics['drift_kl'])}")
    return ", ".join(found)
