"""What a person sees while a study runs, on standard error: on a terminal a table that updates, elsewhere lines."""

import math
import time
from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from analysis.stats.pareto import pareto_front
from analysis.stats.table import results_frame
from analysis.stats.wording import number, percent, seconds
from sweeps.study.trial_types import TrialConfig, TrialResult

if TYPE_CHECKING:
    from sweeps.study.estimate import Forecast
    from sweeps.select.policy import Rung

SHOWN = 6
"""Lines of the front on the screen."""
SHOWN_METRICS = ("reliability", "generalization", "locality", "capability")


class Progress:
    """Counts and the best front so far; a context manager, so that the screen is left tidy whatever happens."""

    def __init__(self, forecast: "Forecast", earlier: Sequence[dict[str, Any]], console: Console | None = None):
        """earlier: results-table rows of the study's trials that were finished before."""
        self.console = console or Console(stderr=True)
        study, plan = forecast.prepared.study, forecast.prepared.plan
        self.finished_ids = {row["trial_id"] for row in earlier}  # a trial whose worker died may be heard of twice
        self.resumed = len(self.finished_ids)
        self.name = study.name
        self.planned = max(self.resumed, min(plan.count, study.budget.trials or plan.count))
        """Trials when the study ends: all of its plan, or as many as its budget allows."""
        self.running = 0
        self.failures: dict[str, str] = {}
        self.pace = Pace(forecast, self.finished_ids, self.planned - self.resumed)
        self._deadline = forecast.made + 60 * (study.budget.minutes or math.inf)
        self._front = _front(earlier) if self.console.is_terminal else ()
        self._live = Live(console=self.console, get_renderable=self._table, refresh_per_second=2, transient=True)

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self._live.start()
        elif self.resumed:
            self._say(f"{self.name}: {self.resumed} of {self.planned} trials were finished before and are kept")
        return self

    def __exit__(self, *_) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def note(self, text: str) -> None:
        """Something else that whoever waits should know."""
        self._say(text)

    def started(self, running: int) -> None:
        self.running = running

    def retried(self, config: TrialConfig, cause: str) -> None:
        self._say(f"{config.position} {_setting(config)}: its worker died and it is tried again ({cause})")

    def finished(self, result: TrialResult, running: int) -> None:
        self.running = running
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
            left = self.seconds_left()
            count = f"[{self.done + self.failed}/{self.planned}]"
            line = f"{count} {result.config.position} {_setting(result.config)}: {_outcome(result)}"
            self._say(line + (f"; about {seconds(left)} left" if left else ""))

    @property
    def done(self) -> int:
        return len(self.finished_ids)

    @property
    def failed(self) -> int:
        return len(self.failures)

    def seconds_left(self) -> float | None:
        """The forecast, set right by the trials of this run so far, until the budget's end; None after the last."""
        left = self.pace.seconds_left(self.planned - self.done - self.failed, self.running)
        return left and min(left, max(0.0, self._deadline - time.monotonic()))

    def _say(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def _table(self) -> Table:
        left = self.seconds_left()
        state = f"{self.done} done, {self.running} running, {self.failed} failed of {self.planned}"
        table = Table(title=Text(f"{self.name}: {state}" + (f", about {seconds(left)} left" if left else "")))
        for column in ("front so far", "setting", *SHOWN_METRICS):
            table.add_column(column, justify="right" if column in SHOWN_METRICS else "left")
        for row in self._front[:SHOWN]:
            setting = f"{row['pipeline']} b{row['batch_size']} lr {row['learning_rate']:g} s{row['seed']}"
            shown = [percent(row[name]) if name in row else "-" for name in SHOWN_METRICS]
            table.add_row(f"{row['layer']}.{row['module']}", setting, *shown)
        for cause, count in Counter(self.failures.values()).most_common(3):
            table.add_row(Text(f"{count} failed", style="red"), Text(cause[:80]))
        return table


class Pace:
    """What is left of a study: each trial's expected time, times what the finished ones took against theirs."""

    def __init__(self, forecast: "Forecast", done: Collection[str], most: int):
        """most: of the open trials so many will be run."""
        self._forecast = forecast
        trials = [trial for trial in forecast.prepared.plan.trials if trial.id not in done]
        self._open = {trial.id: forecast.seconds(trial) for trial in trials[:most]}
        self._at_once = 1
        # One trial's worth of trust in the forecast: a worker's first trial warms it up and is slow.
        self._taken = self._expected = forecast.estimate.seconds_per_trial

    def finished(self, result: TrialResult) -> None:
        expected = self._open.pop(result.config.id, None) or self._forecast.seconds(result.config)
        if "seconds" in result.metrics:
            self._taken += result.metrics["seconds"]
            self._expected += expected

    def seconds_left(self, open_trials: int, running: int) -> float | None:
        """The running ones count half. None when nothing is open."""
        if open_trials <= 0:
            return None
        self._at_once = max(self._at_once, running)
        work = sum(self._open.values()) or open_trials * self._forecast.estimate.seconds_per_trial
        return self._taken / self._expected * work * (1 - running / open_trials / 2) / min(self._at_once, open_trials)


def _front(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Of these rows those on the front, the most reliable first, and of equal ones one: thousands may be equal. With one more
    row the new front is in the old one and it."""
    by_id = {row["trial_id"]: row for row in rows}
    front = pareto_front(results_frame(list(by_id.values())))
    first = dict(zip(reversed(front.points), reversed(front.trial_ids), strict=True))
    return tuple(by_id[first[point]] for point in dict.fromkeys(front.points))


class RaceProgress:
    """A selection as lines: what a rung runs and why, and every run that finishes. A context manager."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self.left = 0
        self._status = self.console.status("")

    def __enter__(self) -> "RaceProgress":
        if self.console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *_) -> None:
        if self.console.is_terminal:
            self._status.stop()

    def note(self, text: str) -> None:
        """Something else that takes a while."""
        self._say(text)
        self._status.update(Text(text))

    def rung(self, rung: "Rung", open_runs: int) -> None:
        """A rung begins."""
        self.left = open_runs
        kept = len(rung.runs) - open_runs
        self._say(f"{rung.name}: {rung.why}" + (f" ({kept} known already)" if kept else ""))
        self._status.update(Text(f"{rung.name}: {self.left} left"))

    def started(self, running: int) -> None:
        """See `sweeps.run.dispatch.Reporter`."""

    def retried(self, config: TrialConfig, cause: str) -> None:
        self._say(f"  {config.position}: its worker died and it is tried again ({cause})")

    def finished(self, result: TrialResult, running: int) -> None:
        self.left -= 1
        config = result.config
        drift = result.metrics.get("drift_kl")
        more = "" if drift is None or result.status == "failed" else f", drift {number(drift)}"
        seed = f" seed {config.seed}" if config.seed else ""
        self._say(f"  {config.position} lr {config.learning_rate:g}{seed}: {_outcome(result)}{more}")
        self._status.update(Text(f"{self.left} left in this rung"))

    def _say(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)


def _setting(config: TrialConfig) -> str:
    return f"{config.pipeline} batch {config.batch_size} lr {config.learning_rate:g} seed {config.seed}"


def _outcome(result: TrialResult) -> str:
    if result.status == "failed":
        return f"failed: {result.error}"
    if result.metrics.get("diverged"):
        return "diverged"
    measured = [name for name in SHOWN_METRICS if name in result.metrics]
    return ", ".join(f"{name} {percent(result.metrics[name])}" for name in measured)
