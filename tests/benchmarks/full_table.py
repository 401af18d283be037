"""Every position of a model in full, run by the selection itself: the truth that its policies are replayed against.

    python tests/benchmarks/full_table.py MODEL --edits counterfact.json --name smollm2-counterfact --every 2 \\
        --modules mlp_down,mlp,attn [--limit 40] [--set KEY=VALUE ...]

Everything is as `locft select` would do it (recipe, rate of every position), but for the budget, and there always is a probe. One
seed everywhere, a second one for what the first left on the front. Runs are kept in MLflow, so the same command goes on where it
stopped; when it ends, or is interrupted, what is done goes to tables/NAME.csv, the probe's scores to tables/NAME.probe.csv.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import moocore
import numpy as np
import pandas as pd

from analysis.stats.table import done
from locft.model.models import load_structure
from locft.model.positions import n_layers
from sweeps.commands.progress import Progress
from sweeps.select.policy import Rung, Rungs, SelectionTask, all_over, first_run
from sweeps.select.request import Selection, selection_request
from sweeps.select.selection import probe_scores, run_selection
from sweeps.tracking.address import resolve_uri

TABLES = Path(__file__).parent / "tables"
COLUMNS = [
    "layers", "layer", "module", "learning_rate", "seed", "n_edits", "reliability", "reliability.raw", "reliability.qa",
    "reliability.chat", "reliability.unseen", "generalization", "locality", "capability_change", "capability_change_low",
    "capability_change_high", "drift_kl", "train_loss", "steps", "train_seconds", "evaluate_seconds", "capability_seconds",
    "seconds", "seconds_per_edit", "diverged", "right",
]  # fmt: skip


def everything(task: SelectionTask) -> Rungs:
    """All positions at their starting rates, halving the distance between layers, then a second seed along the front."""
    runs = sorted((first_run(task, c) for c in task.candidates), key=lambda run: (scattered(run.layer), run.module))
    scores = yield from all_over((yield Rung("table", tuple(runs), f"all {len(runs)} positions")))
    known = [run for run in runs if run in scores and scores[run].comparable]
    if known:
        rows = [scores[run].row for run in known]
        points = np.array([(row["reliability"], row["generalization"], -row["drift_kl"]) for row in rows])
        front = np.flatnonzero(moocore.is_nondominated(points, maximise=True))
        yield Rung("front", tuple(replace(known[i], seed=1) for i in front), f"a second seed of {len(front)}")


def scattered(layer: int) -> float:
    """Van der Corput's sequence in base 2: any first part of it is spread evenly."""
    return int(f"{layer:016b}"[::-1], 2) / 2**16


def write(name: str, found: Selection) -> None:
    rows = done(found.results).sort_values(["layer", "module", "seed"])
    request = found.request
    scores = probe_scores(request.inputs, request.positions, request.seed)["scores"]
    probe = pd.DataFrame([{"sample": 0, **score} for score in scores])
    TABLES.mkdir(exist_ok=True)
    for table, end in ((rows[[column for column in COLUMNS if column in rows]], ""), (probe, ".probe")):
        partial = TABLES / f"{name}.partial"
        table.to_csv(partial, index=False, float_format="%.5g")
        partial.replace(TABLES / f"{name}{end}.csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--edits", required=True)
    parser.add_argument("--name", required=True, help="of the table")
    parser.add_argument("--every", type=int, default=1, help="layers, the last one always included")
    parser.add_argument("--modules", default="mlp_down,mlp,attn")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--tracking-uri")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    last = n_layers(load_structure(options.model)) - 1
    layers = sorted({*range(last, -1, -options.every)})
    places = [f"space.layer={json.dumps(layers)}", f"space.module={json.dumps(options.modules.split(','))}"]
    overrides = [*places, *options.overrides]
    request = selection_request(options.model, options.edits, overrides, limit=options.limit, share=1.0)
    uri = resolve_uri(options.tracking_uri)
    with run_selection(request, uri, reporter=Progress(options.name), policy=everything) as (found, _):
        write(options.name, found)


if __name__ == "__main__":
    main()
