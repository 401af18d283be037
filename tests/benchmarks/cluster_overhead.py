"""What the platform adds to a trial, and how well more nodes are used: trials of known duration on 1, 2 and 3 nodes.

    python -m tests.benchmarks.cluster_overhead [--seconds 3] [--per-worker 20] [--nodes 1,2,3]

A trial sleeps; everything else is real: a Ray cluster of as many nodes with one worker each beside a head (`tests/ray_nodes`),
the runner, the recorder with its files, and an MLflow server. Every worker first runs a trial that is not counted (it starts the process).
Printed is one JSON object a number of nodes: `overhead_ms`, the time between the end of a trial on a worker and the beginning of
the next one there (median, and the tenth and ninetieth percentile); `efficiency`, the share of the workers' time from the first counted
beginning to the last end that trials took; `recorded_ms`, what a trial costs the driver's store (its time over trials, beside the trials).
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

from tests.conftest import write_study
from tests.heard import Heard
from tests.ray_nodes import Nodes
from tests.tiny import tiny_model, tiny_tokenizer

WARM_UP = 1
"""Trials of each worker that are not counted."""


def sleep(config, seconds: float):
    """A trial on a worker: it says when and where it ran."""
    from sweeps.study.trial_types import TrialResult

    began = time.time()
    time.sleep(seconds)
    metrics = {
        "reliability": 1.0,
        "began": began,
        "seconds": seconds,
        "ended": time.time(),
        "process": float(os.getpid()),
    }
    outcomes = tuple({"edit_id": str(n), "kind": "reliability", "prompt": "x" * 60, "got": "y"} for n in range(100))
    return TrialResult(config, "done", None, metrics, (1.0,) * 25, outcomes)


def measured(metrics: list[dict[str, float]], seconds: float) -> dict[str, float]:
    by_worker: dict[float, list[dict[str, float]]] = defaultdict(list)
    for entry in sorted(metrics, key=lambda entry: entry["began"]):
        by_worker[entry["process"]].append(entry)
    kept = [entries[WARM_UP:] for entries in by_worker.values() if len(entries) > WARM_UP]
    gaps = [1000 * (b["began"] - a["ended"]) for entries in kept for a, b in itertools.pairwise(entries)]
    begin = max(entries[0]["began"] for entries in kept)  # all of them are at work
    end = min(entries[-1]["ended"] for entries in kept)
    inside = [max(0.0, min(e["ended"], end) - max(e["began"], begin)) for entries in kept for e in entries]
    tenths = statistics.quantiles(gaps, n=10)
    return {
        "trials": len(metrics),
        "workers": len(kept),
        "overhead_ms": round(statistics.median(gaps), 1),
        "overhead_ms_10": round(tenths[0], 1),
        "overhead_ms_90": round(tenths[-1], 1),
        "share_of_a_trial": round(statistics.mean(gaps) / (1000 * seconds), 4),
        "efficiency": round(sum(inside) / (len(kept) * (end - begin)), 4),
    }


def run(nodes: int, per_worker: int, seconds: float, folder: Path) -> dict[str, float]:
    from sweeps.commands import ui
    from sweeps.run.runner import run_trials
    from sweeps.session import study_session
    from sweeps.study.reader import load_study
    from sweeps.study.resolve import prepare

    study = prepare(
        load_study(str(write_study(folder, folder / "model", name=f"overhead-{nodes}", resources__concurrent="auto")))
    )
    trials = [replace(study.plan.trials[0], seed=seed) for seed in range(nodes * (per_worker + WARM_UP))]
    heard = Heard()
    with Nodes() as cluster, ui.running(f"sqlite:///{folder / 'mlflow.db'}", None) as (server, _):
        for _ in range(nodes):
            cluster.add()
        os.environ.update(cluster.environment)
        with study_session(study, server, "", address=cluster.address) as session:
            room, tracker = session.start_ray(), session.open_run()
            began = time.monotonic()
            spent = time.process_time()
            with session.recorder(heard) as recorder:
                ending = run_trials(
                    trials,
                    partial(sleep, seconds=seconds),
                    resources=study.study.resources,
                    room=room,
                    reporter=recorder,
                )
            wall, spent = time.monotonic() - began, time.process_time() - spent
        assert ending == "complete" and len(tracker.load_results(curves=False)) == len(trials)
    found = measured([result.metrics for result in heard.results], seconds)
    ideal = len(trials) * seconds / nodes
    return {"nodes": nodes, **found, "driver_cpu_ms": round(1000 * spent / len(trials), 1),
            "wall_seconds": round(wall, 1), "ideal_seconds": round(ideal, 1)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--per-worker", type=int, default=20)
    parser.add_argument("--nodes", default="1,2,3")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_STATE_HOME"] = f"{folder}/state"
        tiny_model().save_pretrained(f"{folder}/model")
        tiny_tokenizer().save_pretrained(f"{folder}/model")
        for count in map(int, options.nodes.split(",")):
            print(json.dumps(run(count, options.per_worker, options.seconds, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
