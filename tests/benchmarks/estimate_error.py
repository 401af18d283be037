"""How far off is what `locft sweep` says a study will take?

    python -m tests.benchmarks.estimate_error quickstart "pipeline-check edits.limit=40" [--folder DIR]

Each argument is a study with overrides in the form of `--set`, run for real by the command, all in one fresh store. Before it runs,
it is estimated twice: from timed steps with an empty store, and from the earlier trials where the studies before it left
some. The clock runs from when the command says what it expects to its end; memory is the proportional set size of the
command and all that it starts, at its highest; disk is what the cache (hidden states, weights) and the store grew by. The
model is taken from the cache, where it should be. Prints one JSON line a study; the load of the machine is in it, since
other work disturbs all of it. Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from locft.cache import cache_folder
from sweeps.answer import foresee, read_state
from sweeps.study.estimate import Forecast, trial_seconds
from sweeps.study.plan import PreparedStudy
from sweeps.study.reader import load_study
from sweeps.study.resolve import prepare
from sweeps.tracking.study_run import find_tracker

ANNOUNCED = "to run: "
"""The line with which the command says what it expects begins so."""
SECONDS = 0.5
"""Between two looks at the memory."""


class MemoryPeak(threading.Thread):
    """The most bytes that a process and its children took together, until the process ends."""

    def __init__(self, process: int):
        super().__init__(daemon=True)
        self.process = psutil.Process(process)
        self.bytes = 0
        self.parts: dict[str, int] = {}
        """MiB by name of the process, at that moment."""

    def run(self) -> None:
        while self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE:
            now: dict[str, int] = {}
            for process in [self.process, *self.process.children(recursive=True)]:
                try:
                    name = process.name() if process.pid != self.process.pid else "driver"
                    now[name] = now.get(name, 0) + process.memory_full_info().pss
                except psutil.Error:
                    continue  # it has just ended
            if sum(now.values()) > self.bytes:
                self.bytes, self.parts = sum(now.values()), {name: size // 2**20 for name, size in now.items()}
            time.sleep(SECONDS)


def expected(forecast: Forecast) -> dict[str, Any]:
    found, costs, gib = forecast.estimate, forecast.costs, 2**30
    trials, alone = forecast.prepared.plan.trials, replace(costs, evaluate=0.0, capability=0.0)
    training = [trial_seconds(trial, forecast.prepared.facts, alone, None) for trial in trials]
    return {
        "source": found.source,
        "seconds": [round(value) for value in (found.seconds_low, found.seconds, found.seconds_high)],
        "trials_seconds": round(sum(map(forecast.seconds, trials))),
        "training_seconds": round(sum(training)),
        "unedited_seconds": round(costs.unedited(forecast.prepared.facts)),
        "memory_gib": [round(value / gib, 2) for value in (found.memory_bytes_low, found.memory_bytes_high)],
        "disk_gib": [round(value / gib, 3) for value in (found.disk_bytes_low, found.disk_bytes_high)],
    }


def size(folder: Path) -> int:
    """Bytes on disk of what is in a folder, links left out."""
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def measured(study: str, overrides: list[str], prepared: PreparedStudy, folder: Path) -> dict[str, Any]:
    """What the command takes; of its trials, the sum of what each took."""
    options = [part for override in overrides for part in ("--set", override)]
    command = [sys.executable, "-c", "from sweeps.commands.cli import main; main()", "sweep", study, *options, "--json"]
    before = size(folder)
    process = subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    memory, began = MemoryPeak(process.pid), time.monotonic()
    memory.start()
    for line in process.stderr:
        print(line, end="", file=sys.stderr, flush=True)
        if line.startswith(ANNOUNCED):
            began = time.monotonic()
    if process.wait():
        raise SystemExit(f"the command failed with exit code {process.returncode}")
    seconds = time.monotonic() - began
    memory.join()
    results = read_state(prepared, find_tracker(store(folder), prepared.study.name, prepared.id)).results
    grown = {"cache": folder / "cache", "runs": folder / "mlruns"}
    return {
        "seconds": round(seconds),
        "trials_seconds": round(results["seconds"].sum()),
        "training_seconds": round(results["train_seconds"].sum()),
        "memory_gib": round(memory.bytes / 2**30, 2),
        "memory_mib_of": memory.parts,
        "disk_gib": round((size(folder) - before) / 2**30, 3),
        "disk_mib_of": {name: size(place) // 2**20 for name, place in grown.items()},
    }


def store(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="+", metavar="STUDY", help='a study, or "STUDY field=value field=value"')
    parser.add_argument("--folder", type=Path, help="for store and cache; default a temporary one")
    options = parser.parse_args()
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="estimate-"))).resolve()
    (folder / "cache" / "locft").mkdir(parents=True)
    models = cache_folder() / "models"
    (folder / "cache" / "locft" / "models").symlink_to(models)
    os.environ |= {"XDG_CACHE_HOME": str(folder / "cache"), "XDG_STATE_HOME": str(folder / "state")}
    for argument in options.studies:
        study, *overrides = argument.split()
        prepared = prepare(load_study(study, overrides))
        loads = [round(os.getloadavg()[0], 1)]
        forecasts = [foresee(prepared, f"sqlite:///{folder / 'absent.db'}")]
        if (folder / "mlflow.db").exists():
            forecasts.append(foresee(prepared, store(folder)))
        said = [expected(forecast) for forecast in forecasts]
        truth = measured(study, overrides, prepared, folder)
        loads.append(round(os.getloadavg()[0], 1))
        ratios = [round(truth["seconds"] / each["seconds"][1], 2) for each in said]
        line = {"study": argument, "expected": said, "truth": truth, "ratio": ratios, "load": loads}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
