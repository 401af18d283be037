"""Progress of trials on standard error: on a terminal a table that updates, elsewhere a line for each trial."""

import math
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from analysis.stats.formats import by_format
from analysis.stats.pareto import pareto_front
from analysis.stats.table import FRACTIONS, results_frame, setting_text
from analysis.stats.wording import number, percent, seconds
from sweeps.commands.console import table_of
from sweeps.study.trial_types import TrialConfig, TrialResult

if TYPE_CHECKING:
    from sweeps.select.policy import Rung
    from sweeps.study.estimate import Forecast

SHOWN = 6
"""Rows of the front in the table on the screen."""
SHOWN_METRICS = (*FRACTIONS, "capability")


class Progress:
    """Shows counts and the front so far: a reporter of trials (`sweeps.run.dispatch`) and of the rungs of a selection.

    A context manager, so that the screen is left tidy however the trials end.
    """

    def __init__(
        self,
        name: str,
        forecast: "Forecast | None" = None,
        earlier: Sequence[dict[str, Any]] = (),
        console: Console | None = None,
    ):
        """name: of the study. forecast: of a sweep, for the number of trials and the time left; a selection plans rung
        by rung and has none. earlier: results-table rows of the trials that are done already."""
        self.name = name
        self.console = console or Console(stderr=True)
        self.running = 0
        self.failures: dict[str, str] = {}
        self.finished_ids = {row["trial_id"] for row in earlier}  # a trial whose worker died may be reported twice
        self.resumed = self.planned = len(self.finished_ids)
        self.pace, self._deadline = None, math.inf
        if forecast is not None:
            plan, budget = forecast.prepared.plan, forecast.prepared.study.budget
            self.planned = max(self.resumed, min(plan.count, budget.trials or plan.count))
            self.pace = Pace(forecast, self.finished_ids, self.planned - self.resumed)
            self._deadline = forecast.made + 60 * (budget.minutes or math.inf)
        self._front = _front(earlier) if self.console.is_terminal else ()
        self._live = Live(console=self.console, get_renderable=self._table, refresh_per_second=2, transient=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        elif self.resumed:
            self.note(f"{self.name}: {self.resumed} of {self.planned} trials were finished before and are kept")
        return self

    def __exit__(self, *_) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def note(self, text: str) -> None:
        """Print a line, above the table on a terminal."""
        self.console.print(Text(text), soft_wrap=True)

    def rung(self, rung: "Rung", open_runs: int) -> None:
        """A rung of a selection begins, of which `open_runs` are not done yet."""
        self.planned = self.done + self.failed + open_runs
        known = len(rung.runs) - open_runs
        self.note(f"{rung.name}: {rung.why}" + (f" ({known} known already)" if known else ""))

    def started(self, running: int) -> None:
        self.running = running

    def retried(self, config: TrialConfig, cause: str) -> None:
        self.note(f"{_trial(config)}: its worker died and it is tried again ({cause})")

    def finished(self, result: TrialResult, running: int) -> None:
        self.running = running
        if self.pace:
            self.pace.finished(result)
        if result.status == "failed":
            self.failures[result.config.id] = result.error or "unknown"
        else:
            self.finished_ids.add(result.config.id)
            self.failures.pop(result.config.id, None)
            if self.console.is_terminal:
                row = result.to_row()
                self._front = _front([*(other for other in self._front if other["trial_id"] != row["trial_id"]), row])
        if not self.console.is_terminal:
            count = f"[{self.done + self.failed}/{self.planned}]"
            self.note(f"{count} {_trial(result.config)}: {_outcome(result)}{self._left('; ')}")

    @property
    def done(self) -> int:
        return len(self.finished_ids)

    @property
    def failed(self) -> int:
        return len(self.failures)

    def seconds_left(self) -> float | None:
        """At the pace of this run's trials, and no longer than the budget allows; None after the last trial."""
        left = self.pace and self.pace.seconds_left(self.planned - self.done - self.failed, self.running)
        return left and min(left, max(0.0, self._deadline - time.monotonic()))

    def _left(self, separator: str) -> str:
        left = self.seconds_left()
        return f"{separator}about {seconds(left)} left" if left else ""

    def _table(self) -> Table:
        state = f"{self.done} done, {self.running} running, {self.failed} failed of {self.planned}"
        rows = []
        for row in self._front[:SHOWN]:
            shares = (percent(row.get(metric, math.nan)) for metric in SHOWN_METRICS)
            rows.append([f"{row['layer']}.{row['module']}", _setting(row), *shares])
        for cause, count in Counter(self.failures.values()).most_common(3):
            rows.append([Text(f"{count} failed", style="red"), cause[:80]])
        return table_of(("front so far", "setting", *SHOWN_METRICS), rows, f"{self.name}: {state}{self._left(', ')}")


class Pace:
    """Time left: the expected seconds of the open trials, scaled by what the finished ones took against their own."""

    def __init__(self, forecast: "Forecast", done: Collection[str], most: int):
        """done: ids of the trials that are not open. most: of the open ones, how many will be run."""
        self._forecast = forecast
        trials = [trial for trial in forecast.prepared.plan.trials if trial.id not in done]
        self._open = {trial.id: forecast.seconds(trial) for trial in trials[:most]}
        self._at_once = 1
        # The forecast counts like one finished trial: a worker's first trial warms it up and is slow.
        self._taken = self._expected = forecast.estimate.seconds_per_trial

    def finished(self, result: TrialResult) -> None:
        expected = self._open.pop(result.config.id, None) or self._forecast.seconds(result.config)
        if "seconds" in result.metrics:
            self._taken += result.metrics["seconds"]
            self._expected += expected

    def seconds_left(self, open_trials: int, running: int) -> float | None:
        """For `open_trials`, of which those running count as half done. None when nothing is open."""
        if open_trials <= 0:
            return None
        self._at_once = max(self._at_once, running)
        work = sum(self._open.values()) or open_trials * self._forecast.estimate.seconds_per_trial
        return self._taken / self._expected * work * (1 - running / open_trials / 2) / min(self._at_once, open_trials)


def _front(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The rows on the front, the most reliable first, one for each point: thousands may be equal.

    The front after another row is that of the front before and this row.
    """
    by_id = {row["trial_id"]: row for row in rows}
    front = pareto_front(results_frame(list(by_id.values())))
    first = dict(zip(reversed(front.points), reversed(front.trial_ids), strict=True))
    return tuple(by_id[first[point]] for point in dict.fromkeys(front.points))


def _setting(values: Mapping[str, Any]) -> str:
    return f"{setting_text(values)}, seed {values['seed']}"


def _trial(config: TrialConfig) -> str:
    return f"{config.position}, {_setting(config.to_dict())}"


def _outcome(result: TrialResult) -> str:
    if result.status == "failed":
        return f"failed: {result.error}"
    if result.metrics.get("diverged"):
        return "diverged"
    found = [f"{name} {percent(result.metrics[name])}" for name in SHOWN_METRICS if name in result.metrics]
    if formats := by_format(result.metrics, "reliability"):
        found[0] += f" ({', '.join(f'{name} {percent(share)}' for name, share in formats.items())})"
    if "drift_kl" in result.metrics:
        found.append(f"drift {number(result.metrics['drift_kl'])}")
    return ", ".join(found)
