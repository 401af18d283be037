"""A study of thousands of trials: does its driver slow down or grow, and how long do resuming and reporting take?

    python -m tests.benchmarks.long_grid [--trials 2000] [--folder DIR] [--profile]

The trials are those of a tiny random model, so that what is measured is the platform. The study is run in two halves by
the same call, as after an interruption, then once more with nothing left to do. Prints one JSON line for every hundred trials
(seconds of the clock, processor seconds and memory of the driver, results that wait for the store) and one for each
phase. The store is an SQLite file in the folder; with one given, the same command goes on.
"""

import argparse
import cProfile
import json
import os
import pstats
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil

from analysis.stats.table import done
from sweeps.answer import StudyState, answer_of, foresee, read_state
from sweeps.commands.progress import Progress
from sweeps.study.estimate import Forecast
from sweeps.study.reader import load_study
from sweeps.study.resolve import prepare
from sweeps.study.trial_types import TrialResult
from sweeps.sweep import run_sweep
from sweeps.tracking.outbox import Outbox, open_outbox
from sweeps.tracking.study_run import find_tracker
from tests.conftest import write_study
from tests.tiny import tiny_model, tiny_tokenizer

T = TypeVar("T")
EVERY = 100


class Meter(Progress):
    """The command's own progress, with a line of measurements after every hundredth trial."""

    def __init__(self, forecast: Forecast, state: StudyState, outbox: Outbox):
        super().__init__(forecast.prepared.study.name, forecast, done(state.results)["trial_id"])
        self._outbox = outbox
        self._process = psutil.Process()
        self._mark = self._now()

    def note(self, text: str) -> None:
        """A line a trial is what the command prints; here it would hide the measurements."""

    def _now(self) -> tuple[float, float]:
        spent = self._process.cpu_times()
        return time.monotonic(), spent.user + spent.system

    def finished(self, result: TrialResult, running: int) -> None:
        super().finished(result, running)
        if (self.done + self.failed) % EVERY == 0:
            clock, processor = self._now()
            say(
                trials=self.done,
                failed=self.failed,
                seconds=clock - self._mark[0],
                driver_cpu_seconds=processor - self._mark[1],
                driver_mib=self._process.memory_info().rss / 2**20,
                waiting=len(self._outbox),
            )
            self._mark = self._now()


def say(**numbers: Any) -> None:
    rounded = {name: round(value, 2) if isinstance(value, float) else value for name, value in numbers.items()}
    print(json.dumps(rounded), flush=True)


def timed(phase: str, work: Callable[[], T], **more: Callable[[T], Any]) -> T:
    began = time.monotonic()
    value = work()
    say(phase=phase, seconds=time.monotonic() - began, **{name: measure(value) for name, measure in more.items()})
    return value


def long_study(folder: Path, trials: int) -> Path:
    """Three layers, two modules and two seeds of a random model, and as many learning rates as make up the number."""
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rates = [float(f"{0.001 * 1.01**step:.5g}") for step in range(-(-trials // 12))]
    space = {"layer": "all", "module": ["mlp_down", "attn"], "batch_size": 2, "learning_rate": rates, "seed": [0, 1]}
    return write_study(folder, folder / "model", name="long-grid", capability__limit=2, space=space, epochs=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--profile", action="store_true", help="where the driver's main thread spends its time")
    options = parser.parse_args()
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="long-grid-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    file, uri = long_study(folder, options.trials), f"sqlite:///{folder / 'mlflow.db'}"

    def run(*overrides: str):
        prepared = timed("plan", lambda: prepare(load_study(str(file), overrides)), trials=lambda p: p.plan.count)
        forecast = timed("forecast", lambda: foresee(prepared, uri), trials=lambda f: f.estimate.trials)
        outbox = open_outbox(prepared.id, uri)
        return run_sweep(prepared, uri, show=lambda state: Meter(forecast, state, outbox))

    profile = cProfile.Profile()
    if options.profile:
        profile.enable()
    half = options.trials // 2
    timed("first half", lambda: run(f"budget.trials={half}"), done=lambda sweep: sweep.state.done)
    timed("second half, resumed", run, done=lambda sweep: sweep.state.done)
    profile.disable()
    timed("the same command again", run, done=lambda sweep: sweep.state.done, left=lambda sweep: sweep.state.left)
    prepared = prepare(load_study(str(file)))
    tracker = find_tracker(uri, prepared.study.name, prepared.id)
    state = timed("status", lambda: read_state(prepared, tracker), done=lambda state: state.done)
    timed("report", lambda: answer_of(state, tracker), mib=lambda answer: len(answer.report_html) / 2**20)
    if options.profile:
        pstats.Stats(profile, stream=sys.stdout).sort_stats("cumulative").print_stats(60)


if __name__ == "__main__":
    main()
