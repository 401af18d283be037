"""What a study of ten positions costs with each part of the engine switched off.

    python -m tests.benchmarks.kernel_evidence [--isa native avx2] [--repeats 2] [--only VARIANT ...]

Trains `mlp_down` of ten layers of smollm2-135m and measures each result, as the trials of a study do: one PyTorch
thread, and for each run a new process with no stored hidden states. The variants take turns, each between two runs with
all parts. AVX2 is emulated: PyTorch, oneDNN and MKL are told to use nothing newer.

Prints the median processor seconds of each stage and their ratio to the mean of the two runs with all parts: median
(range). The row "nothing" compares those runs among themselves: a ratio within its range is noise. The JSON lines are
single runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from locft.cache import cache_folder
from locft.data.requests import load_edits
from locft.data.suites import load_suite
from locft.engine import model_views, tail_engine
from locft.engine.tail_engine import TailEngine
from locft.model.models import load_model, model_folder
from locft.model.positions import TuningPosition
from locft.model.precision import training_precision
from locft.process import describe_machine
from locft.train.pipelines import TrainingSettings
from locft.workbench import Workbench
from tests.benchmarks.machine_speed import peak_memory

MODEL = "smollm2-135m"
ISAS = {
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
VARIANTS = ("nothing", "kernel", "coarse", "bfloat16")
"""What a run is without: fused layers with their norms and attention, coarse scoring, training in bfloat16."""
NEEDS_BFLOAT16 = {"coarse", "bfloat16"}  # without effect where the CPU multiplies float32 as fast


def run_study(options: argparse.Namespace, variant: str) -> dict:
    """Processor seconds of each stage, summed over the positions; peak memory; what the edits achieved."""
    time.perf_counter = time.process_time  # also where the workbench measures: other processes disturb it less
    torch.set_num_threads(1)
    if variant == "kernel":
        model_views.fuse_layers = lambda model: None
    if variant == "coarse":
        tail_engine.coarse_pays = lambda model: False
    precision = "float32" if variant == "bfloat16" else training_precision("cpu")
    settings = TrainingSettings(batch_size=10, learning_rate=4e-3, epochs=options.epochs, precision=precision)
    edits = load_edits(options.edits, limit=options.limit)
    suite, loaded = load_suite("probes", limit=options.items), load_model(MODEL, device="cpu")
    started = time.perf_counter()
    bench = Workbench.prepare(loaded, edits, suite, options.prose, engine=partial(TailEngine, layers=options.layers))
    seconds = {"prepare": time.perf_counter() - started, "train": 0.0, "edit": 0.0, "capability": 0.0}
    found = []
    for layer in options.layers:
        began = time.perf_counter()
        training = bench.train(TuningPosition(layer, "mlp_down"), settings)
        seconds["train"] += time.perf_counter() - began
        found.append({**bench.measure(training.delta).metrics, "steps": training.steps})
        seconds["edit"] += found[-1]["evaluate_seconds"]
        seconds["capability"] += found[-1]["capability_seconds"]
    numbers = {**seconds, "total": time.perf_counter() - started, "peak MiB": peak_memory() / 2**20}
    means = {n: statistics.fmean(f[n] for f in found) for n in ("steps", "reliability", "locality", "capability")}
    return {"numbers": numbers, "means": means, "precision": precision, **describe_machine()}


def in_new_process(variant: str, isa: str, cache: Path, options: argparse.Namespace) -> dict:
    """Run one variant with the user's models and with what `cache` keeps per machine, but without stored hidden
    states."""
    with tempfile.TemporaryDirectory(dir=cache) as home:
        Path(home, "locft").mkdir()
        for folder in (cache_folder() / "models", cache / "fingerprints", cache / "precision", cache / "weights"):
            folder.mkdir(exist_ok=True)
            Path(home, "locft", folder.name).symlink_to(folder)
        environment = {**os.environ, **ISAS[isa], "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": home}
        child = ["-m", "tests.benchmarks.kernel_evidence", "--child", variant, json.dumps(vars(options))]
        output = subprocess.check_output([sys.executable, *child], env=environment, text=True)
    return json.loads(output.splitlines()[-1])


def print_table(isa: str, runs: list[tuple[str, dict[str, float]]]) -> None:
    """Median seconds, and ratios to the mean of the runs with all parts before and after."""
    columns = list(runs[0][1])
    print(f"\n| {isa}, without | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|")
    for variant in dict.fromkeys(name for name, _ in runs):
        own, step = [i for i, (name, _) in enumerate(runs) if name == variant], 2 if variant == "nothing" else 1
        near = [i for i in own if step <= i < len(runs) - step]
        cells = []
        for c in columns:
            ratios = [2 * runs[i][1][c] / (runs[i - step][1][c] + runs[i + step][1][c]) for i in near]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-"
            cells.append(f"{statistics.median(runs[i][1][c] for i in own):.1f}: {ratio}")
        print(f"| {variant} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(run_study(argparse.Namespace(**json.loads(sys.argv[3])), sys.argv[2])))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", nargs="+", choices=ISAS, default=list(ISAS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=VARIANTS[1:], default=VARIANTS[1:])
    parser.add_argument("--edits", default="atlas")
    parser.add_argument("--limit", type=int, default=24, help="edits")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--items", type=int, default=25, help="of each task of the capability suite")
    parser.add_argument("--prose", type=int, default=512, help="tokens")
    parser.add_argument("--layers", nargs="+", type=int, default=list(range(2, 30, 3)))
    options = parser.parse_args()
    model_folder(MODEL)  # into the user's cache, if it is not there
    with tempfile.TemporaryDirectory() as cache:
        for isa in options.isa:
            small = argparse.Namespace(**{**vars(options), "layers": options.layers[-1:], "epochs": 1})
            first = in_new_process("nothing", isa, Path(cache), small)  # fills the cache
            print(f"\n{isa}: {first['cpu']}, {first['instructions']}; {first['precision']}")
            variants = [v for v in options.only if first["precision"] == "bfloat16" or v not in NEEDS_BFLOAT16]
            runs = []
            for variant in ("nothing", *(v for one in variants * options.repeats for v in (one, "nothing"))):
                run = in_new_process(variant, isa, Path(cache), options)
                runs.append((variant, run["numbers"]))
                print(json.dumps({"isa": isa, "without": variant, **run}), file=sys.stderr, flush=True)
            print_table(isa, runs)


if __name__ == "__main__":
    main()
