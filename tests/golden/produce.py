"""What the goldens pin, each value made in one place. The data files beside this module hold what the functions gave.

Everything here is known before a measurement is made or does not depend on the machine, except what is computed with a model.
That is a tiny one whose weights are drawn by Python's own generator, so that they are the same on every CPU.
"""

import getpass
import hashlib
import json
import random
import re
import signal
import socket
import sqlite3
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from mlflow import MlflowClient
from transformers import PreTrainedModel

from analysis.figures.curves import loss_info, parallel_info, pipeline_info
from analysis.figures.front import front_info
from analysis.figures.maps import heatmap_info
from analysis.stats.importance import what_matters
from analysis.stats.pareto import pareto_front
from analysis.stats.pick import recommend
from analysis.stats.table import by_setting, results_frame
from locft.data.requests import load_edits
from locft.data.suites import load_suite
from locft.model.models import LoadedModel, model_fingerprint
from locft.model.positions import TuningPosition
from locft.process import settle_vector_math
from locft.train.pipelines import TrainingSettings
from locft.workbench import Workbench
from sweeps.select.policy import survey
from sweeps.study.plan import PreparedStudy
from sweeps.study.reader import load_study, ready_studies
from sweeps.study.resolve import prepare
from sweeps.sweep import run_sweep
from sweeps.tracking.address import resolve_uri
from tests.benchmarks.policies import replayed
from tests.benchmarks.replay import HERE, SHARES, World, worlds
from tests.conftest import write_study
from tests.heard import Heard
from tests.tiny import WEIGHT_STD, tiny_model, tiny_tokenizer

FOLDER = Path(__file__).parent
OLD_STORE = FOLDER / "old_store" / "store.zip"
TIMED = re.compile(r"second|bytes|memory|disk")
"""In the names of what differs from run to run."""
PLACED = ("host", "process", "report", "tracking_uri", "run_id", "warnings", "notes", "concurrent")
"""Keys whose values depend on the machine, the place or the moment."""


def sha256(value: Any) -> str:
    """Of anything that JSON holds."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) else value.item() if hasattr(value, "item") else list(value)


# --- the model


def golden_model() -> PreTrainedModel:
    """A llama as in `tests.tiny`, with other weights: `random` draws the same ones everywhere, PyTorch does not."""
    model = tiny_model()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            draw = random.Random(name)
            values = torch.tensor([2 * draw.random() - 1 for _ in range(parameter.numel())], dtype=torch.float32)
            matrix = parameter.dim() >= 2
            parameter.copy_(values.view_as(parameter) * (1.7 * WEIGHT_STD if matrix else 0.1) + (not matrix))
    return model


def save_model(folder: Path) -> Path:
    """The golden model with its tokenizer, as a study names it."""
    golden_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# --- without a model


def edit_layouts() -> dict[str, Any]:
    """By layout, and of the built-in edits."""
    found = {}
    sources = {file.stem: (str(file), {}) for file in sorted((FOLDER / "edits").glob("*.jsonl"))}
    sources |= {"atlas": ("atlas", {}), "atlas, 10 of seed 3": ("atlas", {"limit": 10, "sample_seed": 3})}
    for name, (source, options) in sources.items():
        edits = load_edits(source, **options)
        found[name] = {
            "count": len(edits.requests),
            "findings": asdict(edits.findings),
            "fingerprint": edits.fingerprint,
            "ids": [request.id for request in edits.requests[:10]],
            "layout": edits.layout,
            "requests": sha256([_without_nothing(asdict(request)) for request in edits.requests]),
        }
    return found


def _without_nothing(request: dict[str, Any]) -> dict[str, Any]:
    """Portability came after these goldens."""
    return {key: value for key, value in request.items() if value or key != "portability"}


def capability_layouts() -> dict[str, Any]:
    """By layout, and of the built-in suite."""
    suites = {
        file.stem: load_suite(None, {"task": str(file)}) for file in sorted((FOLDER / "capability").glob("*.jsonl"))
    }
    suites |= {"probes": load_suite("probes"), "probes, 3 a task": load_suite("probes", limit=3)}
    return {
        name: {
            "chances": {task.name: task.chance for task in suite.tasks},
            "counts": {task.name: len(task.items) for task in suite.tasks},
            "fingerprint": suite.fingerprint,
            "items": sha256([asdict(item) for task in suite.tasks for item in task.items]),
        }
        for name, suite in suites.items()
    }


def survey_rungs() -> dict[str, Any]:
    """What the survey runs on the exhaustive table, by share of the grid's cost and seed; `layer.module rate seed`."""
    drawn, found = _exhaustive(), {}
    for share in SHARES:
        for seed, world in enumerate(drawn):
            rungs, _ = replayed(survey, world.task(share, seed), world.score)
            found[f"share {share}, seed {seed}"] = [
                {
                    "name": rung.name,
                    "runs": [f"{run.position} {run.learning_rate:g} {run.seed}" for run in rung.runs],
                    "why": rung.why,
                }
                for rung in rungs
            ]
    return found


def _exhaustive() -> list[World]:
    """The first three draws of the probe."""
    return worlds("smollm2-zsre-plain", seeds=3)


def small_results() -> pd.DataFrame:
    """Sixty trials of four layers, three modules and both pipelines, with two seeds of some, one diverged and one failed."""
    draw, rows = random.Random(0), []
    for number in range(60):
        layer, module = (2, 5, 8, 10)[number % 4], ("mlp_down", "mlp", "attn")[number // 4 % 3]
        pipeline, seed = ("breadth_first", "depth_first")[number // 12 % 2], number // 48
        rate = (0.001, 0.004)[number // 24 % 2]
        reliability = round(min(1.0, 0.55 + 0.03 * layer + draw.random() / 5 - 0.2 * (module == "attn")), 2)
        change = round(-0.01 * (10 - layer) * (1 + 100 * rate) * draw.random(), 4)
        rows.append(
            {
                "trial_id": f"t{number:02}", "status": "done", "error": None, "retried": "killed" if number == 7 else None,
                "layers": 12, "layer": layer, "depth": layer / 11, "module": module, "pipeline": pipeline,
                "batch_size": (8, 32)[layer == 5], "learning_rate": rate, "seed": seed, "loss_average": "edit",
                "epochs": 25, "skip_below": 0.01, "stop_below": 0.01, "dtype": "float32", "precision": "float32",
                "model_fingerprint": "f" * 16, "data_fingerprint": "d" * 16, "method_version": 1,
                "reliability": reliability, "generalization": round(0.7 * reliability, 3), "locality": 0.5,
                "reliability_tf": reliability, "generalization_tf": 0.8, "locality_exact": 0.5, "n_edits": 100.0,
                "capability": 0.6 + change, "capability.facts": 0.7 + change, "capability_change": change,
                "capability_change_low": change - 0.02, "capability_change_high": change + 0.02,
                "drift_kl": round(-change * (1 + draw.random()), 5), "perplexity": 12.0, "train_loss": 0.01,
                "epoch_losses": [4.0, 1.0 + reliability, 0.25], "epochs_run": 3.0, "steps": 30.0, "train_seconds": 10.0,
                "seconds": 14.0, "seconds_per_edit": round(0.1 + draw.random() / 10, 3), "diverged": 0.0, "delta_norm": 2.0,
            }
        )  # fmt: skip
    rows[13] |= {"diverged": 1.0, "reliability": 0.0, "capability": 0.0, "capability_change": -0.6, "drift_kl": None}
    rows[26] = {name: rows[26][name] for name in list(rows[26])[:21]} | {"status": "failed", "error": "out of memory"}
    return results_frame(rows)


def figure_infos() -> dict[str, Any]:
    """What each figure of the report shows of the small table. The marked trial is given, not picked."""
    results, pick, baseline = small_results(), "t03", {"capability": 0.6}
    settings = by_setting(results)
    infos = {
        f"front, {y}": front_info(
            results, objectives=("reliability", y), baseline=baseline, pick=pick, chances={pick: 0.5}
        )
        for y in ("capability", "capability_change", "generalization")
    }
    infos |= {
        f"heatmap, {metric}": heatmap_info(results, metric, pick=pick)
        for metric in ("reliability", "capability_change", "drift_kl")
    }
    front = pareto_front(settings, ("reliability", "capability"))
    infos |= {
        "loss": loss_info(results, front=front.trial_ids, pick=pick),
        "pipeline": pipeline_info(results),
        "parallel": parallel_info(results, keep=(pick,)),
        "what matters": what_matters(results),
        "pareto front": front,
    }
    return {name: _of_json(info) for name, info in infos.items()}


def pick() -> dict[str, Any]:
    """What is recommended of the small table, at several floors, and of the exhaustive table."""
    full = pd.read_csv(HERE / "table.csv")
    full = full[full.part == "full"].assign(
        trial_id=lambda t: [f"{r.layer}.{r.module} {r.learning_rate:g} {r.seed}" for r in t.itertuples()],
        status="done", pipeline="breadth_first", batch_size=32, n_edits=100.0, layers=30,
        capability=lambda t: 0.6 + t.capability_change,
    )  # fmt: skip
    frames = {
        "small": small_results(),
        "exhaustive": results_frame(full.drop(columns=["part", "sample"]).to_dict("records")),
    }
    found = {
        f"{name}, {'no floor' if floor is None else f'floor {floor}'}": _of_json(recommend(frame, floor))
        for name, frame in frames.items()
        for floor in (None, 0.5, 0.8)
    }
    best = _exhaustive()[0].best()
    shown = {name: best[name] for name in ("reliability", "generalization", "capability_change", "drift_kl")}
    return found | {"exhaustive table": {"position": f"{best['layer']}.{best['module']}", **shown}}


def _of_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=_plain))


# --- planned studies


def planned_ids() -> dict[str, Any]:
    """Of every ready study; in a fixed precision, since `auto` depends on the CPU."""
    found = {}
    for name in ready_studies():
        prepared = prepare(load_study(name, ["precision=float32"]))
        ids = [trial.id for trial in prepared.plan.trials]
        found[name] = {
            "study": prepared.id,
            "model": prepared.facts.model_fingerprint,
            "data": prepared.facts.data_fingerprint,
            "count": prepared.plan.count,
            "first": ids[:5],
            "all": sha256(ids),
        }
    return found


# --- trials by hand


def kernels() -> str:
    """Which elementary results this CPU and this PyTorch give: where the text is the same, so should be every bit below."""
    draw = torch.tensor([random.Random(seed).random() for seed in range(97 * 64)]).view(97, 64)
    settle_vector_math()
    results = [
        draw @ draw.T,
        draw.T @ draw,
        draw[:3] @ draw.T,
        draw[0] @ draw.T,
        draw.exp(),
        draw.sin(),
        draw.softmax(1),
    ]
    results += [
        draw.sum(0),
        draw.sum(1),
        draw.rsqrt(),
        draw.sigmoid(),
        (draw @ draw.T).log_softmax(1),
        draw.pow(2).mean(-1),
    ]
    low = draw.bfloat16()
    results += [(low @ low.T).float(), torch.nn.functional.scaled_dot_product_attention(*3 * [draw.view(1, 1, 97, 64)])]
    digest = hashlib.sha256(b"".join(result.contiguous().numpy().tobytes() for result in results)).hexdigest()
    return f"{torch.backends.cpu.get_cpu_capability()} {digest[:12]}"


OTHERS = {
    "token": {"loss_average": "token"},
    "bfloat16": {"precision": "bfloat16"},
    "little": {"learning_rate": 0.0005, "epochs": 2},
    "stopped": {"epochs": 40, "skip_below": 2.0, "stop_below": 1.5},
    "to the end": {"epochs": 40, "batch_size": 3},
    "to the end, in depth": {"epochs": 40, "batch_size": 3, "pipeline": "depth_first", "seed": 1},
}
"""Settings of further trials at one position."""


def tiny_grid() -> dict[str, Any]:
    """By trial: the delta's hash, the metrics but the times, losses, steps, and each answer."""
    with _one_thread():
        model = golden_model().requires_grad_(False)
        loaded = LoadedModel("golden", model, tiny_tokenizer(), model_fingerprint(model))
        bench = Workbench.prepare(loaded, load_edits("atlas", limit=5), load_suite("probes", limit=3), 64)
        found = {}
        for layer in (0, 2):
            for module in ("mlp_down", "attn", "layer"):
                for pipeline in ("breadth_first", "depth_first"):
                    settings = TrainingSettings(pipeline=pipeline, batch_size=2, learning_rate=0.02, epochs=8)
                    found[f"{layer}.{module} {pipeline}"] = _trial(bench, TuningPosition(layer, module), settings)
        for name, changes in OTHERS.items():
            settings = TrainingSettings(**{"batch_size": 2, "learning_rate": 0.02, "epochs": 8} | changes)
            found[f"1.mlp {name}"] = _trial(bench, TuningPosition(1, "mlp"), settings)
        unedited = {
            "metrics": bench.baseline.metrics,
            "answers": [answer.text for answer in bench.baseline.locality_answers],
        }
        return {"model": loaded.fingerprint, "unedited": unedited, "trials": found}


def _trial(bench: Workbench, position: TuningPosition, settings: TrainingSettings) -> dict[str, Any]:
    training = bench.train(position, settings)
    measured = bench.measure(training.delta)
    digest = hashlib.sha256()
    for name, change in sorted(training.delta.tensors.items()):
        digest.update(f"{name} {change.dtype} {tuple(change.shape)}".encode() + change.contiguous().numpy().tobytes())
    return {
        "delta": digest.hexdigest(),
        "metrics": {name: value for name, value in measured.metrics.items() if not TIMED.search(name)}
        | {"trained_loss": training.trained_loss},
        "losses": list(training.losses),
        "steps": training.steps,
        "outcomes": [[o.edit_id, o.kind, o.got, o.correct, o.correct_tf, o.kept] for o in measured.outcomes],
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are shared out among threads, and rounded accordingly."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --- a study from end to end


def study_file(folder: Path, model: Path) -> Path:
    """Of six trials, in a fixed precision."""
    changes = {"space__module": ["mlp", "layer"], "space__layer": "all", "resources": {"cpus": 1, "concurrent": 1}}
    return write_study(folder, model, **changes, epochs=20, precision="float32")


def sweep_study(file: Path, heard: Heard):
    """Run what is open of it, in the store of the working directory."""
    return run_sweep(_prepared(file), resolve_uri(None), show=lambda _: heard)


def _prepared(file: Path) -> PreparedStudy:
    return prepare(load_study(str(file)))


def commands(call: Callable[..., dict[str, Any]], file: Path, model: Path) -> dict[str, Any]:
    """What `locft … --json` says of a study that has run. The pick's values are not among it: see `pick`."""
    said = {
        "locft plan": call("plan", file, "--set", "space.seed=[0, 1]", "--json"),
        "locft positions": call("positions", model, "--json"),
        "locft report": call("report", file, "--json"),
        "locft status": call("status", file, "--json"),
    }
    said["locft plan"]["estimate"]["source"] = "…"
    said["locft report"]["pick"] = {key: type(value).__name__ for key, value in said["locft report"]["pick"].items()}
    for name in ("locft report", "locft status"):  # what they say hangs on the pick
        said[name]["signatures"] = sorted({key for signature in said[name]["signatures"] for key in signature})
    return normalised(said, model)


def normalised(value: Any, model: Path, key: str = "") -> Any:
    """Without what depends on the machine, the place or the moment; the keys stay."""
    if TIMED.search(key) or key in PLACED:
        return "…"
    if isinstance(value, dict):
        return {name: normalised(item, model, name) for name, item in value.items()}
    if isinstance(value, list):
        return [normalised(item, model, key) for item in value]
    return value.replace(str(model), "MODEL") if isinstance(value, str) else value


LOOSE_TAGS = (
    "mlflow.note.content", "mlflow.user", "mlflow.source.name", "locft.machine", "locft.heartbeat", "locft.pick.position",
    "locft.pick.trial_ids", "mlflow.log-model.history", "locft.model_setup",
)  # fmt: skip
"""Tags whose values are of the machine, the moment, the pick, or the libraries that write a model's files. Only that they
are there is pinned."""


def mlflow_runs(folder: Path, model: Path, name: str = "tiny") -> dict[str, Any]:
    """By trial (or the study): tags, parameters, the names of metrics and files, data sets; and the experiment's tags."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name(name)
    found = {"experiment": {"tags": _tags(experiment.tags, model)}}
    for run in client.search_runs([experiment.experiment_id], max_results=1000):
        params = run.data.params
        key = f"{params['position']} seed {params['seed']}" if "position" in params else run.data.tags["locft.kind"]
        found[key] = {
            "artifacts": sorted(file.path for file in client.list_artifacts(run.info.run_id)),
            "datasets": [
                [d.dataset.name, d.dataset.digest, [t.value for t in d.tags]] for d in run.inputs.dataset_inputs
            ],
            "metrics": sorted(run.data.metrics),
            "models": len(client.get_run(run.info.run_id).inputs.model_inputs),
            "name": run.info.run_name,
            "params": params,
            "status": run.info.status,
            "tags": _tags(run.data.tags, model),
        }
    return found


def _tags(tags: dict[str, str], model: Path) -> dict[str, str]:
    """The mark of the picked trial is left out."""
    loose = {key: "…" for key in tags if key in LOOSE_TAGS}
    return {key: value.replace(str(model), "MODEL") for key, value in tags.items() if key != "locft.pick"} | loose


# --- a store of an earlier version


def trial_runs(folder: Path, name: str = "tiny") -> dict[str, dict[str, Any]]:
    """Trial id -> run id and metrics of what is finished."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name(name).experiment_id], "tags.`locft.kind` = 'trial'")
    return {
        run.data.tags["locft.trial_id"]: {"run": run.info.run_id, "metrics": run.data.metrics}
        for run in runs
        if run.info.status == "FINISHED"
    }


def make_old_store(folder: Path, model: Path) -> None:
    """Interrupt a study in this folder, the working directory, after two trials, and pack what it left, without places.

    Meant to be called once: the store is that of the version before the rebuilding.
    """
    heard = Heard(then=lambda result: signal.raise_signal(signal.SIGINT) if len(heard.results) == 2 else None)
    done = sweep_study(study_file(folder, model), heard)
    assert done.ending == "interrupted" and 2 <= done.state.done < 6
    places = {
        str(model): "@MODEL@",
        _dashed(model): "@DASHED@",
        str(folder): "@FOLDER@",
        str(FOLDER.parents[1]): "@FOLDER@",
    }
    places |= {socket.gethostname(): "@HOST@", getpass.getuser(): "@USER@"}

    def without_places(text: str) -> str:
        for place, mark in places.items():
            text = re.sub(rf"(?<!\w){re.escape(place)}(?!\w)", mark, text)
        return text

    with sqlite3.connect(folder / "mlflow.db") as store:
        files = {"mlflow.sql": "\n".join(store.iterdump())}
    for file in sorted((folder / "mlruns").rglob("*")):
        if file.suffix in (".json", ".yaml"):
            files[str(file.relative_to(folder))] = file.read_text(encoding="utf-8")
    OLD_STORE.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(OLD_STORE, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        for name, text in files.items():
            packed.writestr(zipfile.ZipInfo(name), without_places(text), zipfile.ZIP_DEFLATED)


def _dashed(model: Path) -> str:
    """As the name of MLflow's logged model has it."""
    return re.sub(r"[/:.%\"']", "-", str(model))


def unpack_old_store(folder: Path, model: Path) -> None:
    """Put the store into this folder as if its study had run there."""
    places = {"@MODEL@": str(model), "@DASHED@": _dashed(model), "@FOLDER@": str(folder)}
    with zipfile.ZipFile(OLD_STORE) as packed:
        for name in packed.namelist():
            text = re.sub("@[A-Z]+@", lambda mark: places.get(mark[0], mark[0]), packed.read(name).decode())
            if name == "mlflow.sql":
                with sqlite3.connect(folder / "mlflow.db") as store:
                    store.executescript(text)
            else:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(text, encoding="utf-8")
