"""Memory of one, two, ... concurrent trials on one machine: what the workers share and what each adds.

    python tests/benchmarks/worker_memory.py STUDY [--workers 1,2] [--trials 3]

Each worker is a process of its own that prepares the study's workbench and runs trials, as a Ray worker does; the unedited
model was measured before, by a process that is gone. Counted is the proportional set size (a page that two processes map counts half in each), sampled while they run, so that the sum is
what the machine has to hold. Prints one JSON object. Linux only.
"""

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

FIELDS = {"resident": "Rss", "proportional": "Pss", "own": "Private_Dirty"}
SECONDS = 0.05


def run_some(study: str, baseline: dict[str, Any], first: int, step: int, count: int) -> None:
    """The work of one worker: a number of trials of the study."""
    from locft.workbench import Baseline
    from sweeps.run.trial import resident_workbench, run_trial
    from sweeps.study.reader import load_study
    from sweeps.study.resolve import prepare

    prepared = prepare(load_study(study))
    trials = prepared.plan.trials
    bench = resident_workbench(prepared.inputs, Baseline.from_dict(baseline))
    for number in range(count):
        run_trial(bench, trials[(first + number * step) % len(trials)])


def measured_baseline(study: str) -> dict[str, Any]:
    """Of the unedited model; fills the caches, which are no part of a trial."""
    from sweeps.run.trial import measure_baseline
    from sweeps.study.reader import load_study
    from sweeps.study.resolve import prepare

    return measure_baseline(prepare(load_study(study)).inputs).to_dict()


def sizes(process: int) -> dict[str, int]:
    """Mebibytes of a running process by the names of `FIELDS`."""
    lines = [line.split() for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()]
    found = {line[0].rstrip(":"): int(line[1]) // 1024 for line in lines if line[-1] == "kB"}
    return {name: found[field] for name, field in FIELDS.items()}


def measure(study: str, baseline: dict[str, Any], workers: int, count: int) -> dict[str, object]:
    context = multiprocessing.get_context("spawn")
    works = [(study, baseline, index, workers, count) for index in range(workers)]
    processes = [context.Process(target=run_some, args=work) for work in works]
    for process in processes:
        process.start()
    total, each = 0, {process.pid: dict.fromkeys(FIELDS, 0) for process in processes}
    while any(process.is_alive() for process in processes):
        now: dict[int, dict[str, int]] = {}
        for process in processes:
            try:
                now[process.pid] = sizes(process.pid)
            except (FileNotFoundError, ProcessLookupError, KeyError, IndexError):
                continue  # it has just ended
        total = max(total, sum(size["proportional"] for size in now.values()))
        for pid, size in now.items():
            each[pid] = {name: max(each[pid][name], value) for name, value in size.items()}
        time.sleep(SECONDS)
    if any(process.exitcode for process in processes):
        raise SystemExit("a worker failed")
    return {"total_mib": total, "worker_peaks_mib": list(each.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study")
    parser.add_argument("--workers", default="1,2", help="numbers of concurrent trials, with commas")
    parser.add_argument("--trials", type=int, default=3, help="of each worker, one after the other")
    options = parser.parse_args()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        baseline = pool.submit(measured_baseline, options.study).result()
    counts = [int(part) for part in options.workers.split(",")]
    print(json.dumps({str(n): measure(options.study, baseline, n, options.trials) for n in counts}, indent=1))


if __name__ == "__main__":
    main()
