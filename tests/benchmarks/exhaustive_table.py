"""The exhaustive table that selection policies are judged by, made by the platform itself.

    python tests/benchmarks/exhaustive_table.py --edits zsre_3k.json [--hours 2] [--only tune,level0]

Every layer x five modules of the built-in model on the first 100 edits of the file at each module's tuned learning rate
(`full`), two more seeds for the neighbourhood of its front (`seeds`), and the lower levels that a race begins with, each on
draws of edits of its own: all positions on 10 edits (`level0`, at twice the rate), and on 30 edits those that a race can
ask for there (`level1`; after `full` and `level0`).
`tune` finds the rates. `probe` writes probe.csv: the probe's scores on draws of edits from the whole file, so on
others than those of `full`, one for each replay. Each other part is a study run by `locft sweep`; what is in the tables
already is not run again, so the same command goes on.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
TABLE = HERE / "table.csv"
PROBE = HERE / "probe.csv"
PROBES = 20
"""Draws of edits that the probe looks at."""
MODULES = ("mlp_down", "mlp_up", "mlp", "attn", "layer")
LAYERS = 30
TUNED_AT = (4, 15, 26)
RATES = (0.0005, 0.001, 0.002, 0.004)
BATCH_SIZE, EPOCHS = 10, 25


@dataclass(frozen=True)
class Part:
    edits: int
    samples: tuple[int, ...]
    """Seeds of the draws of edits; 0: the first ones of the file."""
    probes: int | None
    """Capability items per task; None: all."""
    prose: int
    """Tokens of prose for drift."""
    at_once: int
    """Layers per study: after each the table is written."""


PARTS = {
    "tune": Part(40, (0,), 40, 1024, 3),
    "level0": Part(10, (1, 2, 3), 5, 512, 30),
    "full": Part(100, (0,), None, 2048, 10),
    "level1": Part(30, (1, 2), 20, 1024, 15),
    "seeds": Part(100, (0,), None, 2048, 10),
}
AXES = ["part", "sample", "layer", "module", "learning_rate", "seed"]
METRICS = [
    "reliability", "generalization", "locality", "reliability_tf", "generalization_tf", "capability_change",
    "capability_change_low", "capability_change_high", "drift_kl", "train_loss", "delta_norm", "steps", "epochs_run",
    "train_seconds", "evaluate_seconds", "capability_seconds", "diverged",
]  # fmt: skip


def study_text(
    name: str, part: Part, sample: int, module: str, layers: list[int], rates: list[float], seeds: list[int], edits: str
) -> str:
    return f"""name: table-{name}-{sample}-{module}
model: smollm2-135m
edits: {{source: {edits}, limit: {part.edits}, sample_seed: {sample or "null"}}}
capability: {{suite: probes, limit: {part.probes or "null"}, prose_tokens: {part.prose}}}
space: {{layer: {layers}, module: {module}, batch_size: {BATCH_SIZE}, learning_rate: {rates}, seed: {seeds}}}
epochs: {EPOCHS}
resources: {{cpus: 1}}
"""


def tuned(table: pd.DataFrame) -> dict[str, float]:
    """Per module the rate with the least drift among those that learn nearly as many edits as the best one.

    Both are means over the layers of `TUNED_AT`; nearly: within two points of reliability.
    """
    rates = {}
    for module, rows in table[table.part == "tune"].groupby("module"):
        mean = rows.groupby("learning_rate")[["reliability", "drift_kl"]].mean()
        learnt = mean[mean.reliability >= mean.reliability.max() - 0.02]
        rates[module] = float(learnt.drift_kl.idxmin())
    return rates


def write_probes(edits: str) -> None:
    """The probe's scores on each draw of edits that is not in the file yet."""
    from locft.data.requests import load_edits
    from locft.data.suites import load_suite
    from locft.measure.capability import encode_suite
    from locft.model.models import load_model
    from locft.model.positions import TuningPosition
    from locft.probe import probe_positions
    from locft.train.encoding import encode_edits
    from sweeps.select.selection import PROBED_EDITS

    loaded, chosen = load_model("smollm2-135m"), load_edits(edits)
    prose = encode_suite(loaded.tokenizer, load_suite("probes", limit=1), PARTS["full"].prose).prose
    positions = [TuningPosition(layer, module) for layer in range(LAYERS) for module in MODULES]
    rows = pd.read_csv(PROBE).to_dict("records") if PROBE.exists() else []
    done = {row["sample"] for row in rows}
    for sample in sorted(set(range(PROBES)) - done):
        drawn = encode_edits(loaded.tokenizer, chosen.sample(PROBED_EDITS, sample).requests)
        for scores in probe_positions(loaded, drawn, prose, positions, seed=sample):
            place = {"sample": sample, "layer": scores.position.layer, "module": scores.position.module}
            rows.append({**place, "disturbance": scores.disturbance, "gain": scores.gain})
        print(f"probe {sample + 1} of {PROBES}", flush=True)
        pd.DataFrame(rows).to_csv(PROBE, index=False, float_format="%.5g")


def neighbourhood(table: pd.DataFrame) -> dict[str, list[int]]:
    """Layers per module whose full trials are near the front: little drift or much generalization for what they learn."""
    full = table[(table.part == "full") & (table.reliability >= table[table.part == "full"].reliability.max() - 0.02)]
    best = [full.nsmallest(20, "drift_kl"), full.nlargest(10, "generalization"), full.nlargest(10, "capability_change")]
    chosen = pd.concat(best)
    return {module: sorted(set(rows.layer)) for module, rows in chosen.groupby("module")}


def wanted(name: str, table: pd.DataFrame) -> dict[str, tuple[list[int], list[float], list[int]]]:
    """Module -> layers, rates and seeds of a part on one draw of edits."""
    if name == "tune":
        return {module: (list(TUNED_AT), list(RATES), [0]) for module in MODULES}
    rates = tuned(table)
    if name == "seeds":
        return {module: (layers, [rates[module]], [1, 2]) for module, layers in neighbourhood(table).items()}
    if name == "level1":  # of races, only the semifinals are run there
        places = contenders(table)
        layers = {module: sorted(layer for layer, kind in places if kind == module) for module in MODULES}
        return {module: (layers[module], [rates[module]], [0]) for module in MODULES if layers[module]}
    if name == "level0":  # a quarter of the steps: they have to be longer
        rates = {module: min(2 * rate, RATES[-1]) for module, rate in rates.items()}
    return {module: (list(range(LAYERS)), [rates[module]], [0]) for module in MODULES}


def contenders(table: pd.DataFrame) -> set[tuple[int, str]]:
    """Positions that some race can ask for at the middle level, on the draws of scouts that are there."""
    sys.path.insert(0, str(HERE.parents[1]))
    from tests.benchmarks.replay import Table, semifinalists

    world = Table(table, pd.read_csv(PROBE))
    scouted = table[table.part == "level0"].drop_duplicates(["sample", "layer", "module"]).groupby("sample").size()
    whole = scouted.index[scouted == len(MODULES) * LAYERS]
    return set().union(*(semifinalists(world, int(sample)) for sample in whole))


def run_part(name: str, samples: tuple[int, ...], edits: str, store: Path, deadline: float, most: int) -> None:
    """most: studies of each module at most, each of which spreads over the whole depth."""
    part = PARTS[name]
    for sample in samples:
        for module, (layers, rates, seeds) in wanted(name, read_table()).items():
            table = read_table()
            there = table[(table.part == name) & (table["sample"] == sample) & (table.module == module)]
            counts = there[there.learning_rate.isin(rates)].groupby("layer").size()
            missing = [layer for layer in layers if counts.get(layer, 0) < len(rates) * len(seeds)]
            studies = -(-len(missing) // part.at_once)
            for start in range(min(most, studies)):
                while (store / "pause").exists():  # somebody measures speed
                    time.sleep(2)
                if time.time() > deadline:
                    return
                text = study_text(name, part, sample, module, missing[start::studies], rates, seeds, edits)
                study = store / f"{name}-{sample}-{module}.yaml"
                study.write_text(text)
                run_study(study, store)
                append(name, sample, study, store)


def run_study(study: Path, store: Path) -> None:
    command = [
        Path(sys.executable).parent / "locft",
        "sweep",
        study,
        "--tracking-uri",
        f"sqlite:///{store / 'mlflow.db'}",
    ]
    subprocess.run(command, cwd=store, check=True)


def append(part: str, sample: int, study: Path, store: Path) -> None:
    from sweeps.answer import read_state
    from sweeps.study.reader import load_study
    from sweeps.study.resolve import prepare
    from sweeps.tracking.study_run import find_tracker

    prepared = prepare(load_study(str(study)))
    results = read_state(
        prepared, find_tracker(f"sqlite:///{store / 'mlflow.db'}", prepared.study.name, prepared.id)
    ).results
    rows = results[results.status == "done"].assign(part=part, sample=sample)
    columns = [*AXES, *(name for name in METRICS if name in rows)]
    together = pd.concat([read_table(), rows[columns]]).drop_duplicates(AXES, keep="first")
    partial = TABLE.with_suffix(".partial")
    together.sort_values(AXES).to_csv(partial, index=False, float_format="%.5g")
    partial.replace(TABLE)


def read_table() -> pd.DataFrame:
    return pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame(columns=[*AXES, *METRICS])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", required=True, help="a file of at least 3,000 edits")
    parser.add_argument("--hours", type=float, default=24.0, help="start nothing new after so many hours")
    parser.add_argument(
        "--only", default=",".join(["probe", *PARTS]), help="parts, with commas, in order; level0:1 for one draw"
    )
    parser.add_argument("--studies", type=int, default=100, help="of each module and draw at most so many")
    parser.add_argument(
        "--store", type=Path, default=Path("exhaustive"), help="folder of the studies and their MLflow store"
    )
    options = parser.parse_args()
    store = options.store.resolve()
    store.mkdir(parents=True, exist_ok=True)
    deadline = time.time() + 3600 * options.hours
    for named in options.only.split(","):
        name, _, sample = named.partition(":")
        if name == "probe":
            write_probes(options.edits)
            continue
        samples = (int(sample),) if sample else PARTS[name].samples
        run_part(name, samples, str(Path(options.edits).resolve()), store, deadline, options.studies)


if __name__ == "__main__":
    main()
