"""The commands about one model: positions, edit, apply, evaluate, bench. Registered in `sweeps.commands.cli`."""

import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from locft.errors import InputError
from sweeps.commands.console import err, new_table, out, print_json, print_metrics, print_wide, writable, write
from sweeps.commands.options import (
    EDITS,
    DeviceOption,
    DtypeOption,
    EditsOption,
    JsonOption,
    LimitOption,
    ModelArgument,
    RemoteCodeOption,
    ThreadsOption,
    UriOption,
    edits_of,
)

if TYPE_CHECKING:
    from locft.model.delta import EditDelta
    from locft.workbench import Workbench
    from sweeps.study.schema import Capability, Edits


def positions(model: ModelArgument, as_json: JsonOption = False, trust_remote_code: RemoteCodeOption = False) -> None:
    """List every tuning position of MODEL: layer, module, parameters, shapes, size."""
    from locft.model.models import load_structure
    from locft.model.positions import is_known, list_positions, no_row

    structure = load_structure(model, trust_remote_code=trust_remote_code)
    found = list_positions(structure)
    if not is_known(structure):
        err.print(Text(f"whole layers only: {no_row(structure)}"))
    if as_json:
        shapes = [dict(zip(p.names, map(list, p.shapes), strict=True)) for p in found]
        rows = [
            {"position": str(p.position), "parameters": parameters, "size": p.size}
            for p, parameters in zip(found, shapes, strict=True)
        ]
        return print_json({"model": model, "positions": rows})
    table = new_table(f"{model}: {len(found)} tuning positions", "position", "size", "parameter", "shape")
    for info in found:
        shapes = [" x ".join(map(str, shape)) for shape in info.shapes]
        table.add_row(str(info.position), f"{info.size:,}", "\n".join(info.names), "\n".join(shapes))
    print_wide(table)


def edit(
    model: ModelArgument,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the delta and its metrics.")],
    edits: Annotated[str | None, typer.Option("--edits", help=EDITS)] = None,
    position: Annotated[
        str | None,
        typer.Option("--position", help="LAYER.MODULE, such as 22.mlp_down, or the file `locft select` wrote."),
    ] = None,
    from_run: Annotated[
        str | None, typer.Option("--from-run", help="Repeat the trial of this MLflow run, but for other options given.")
    ] = None,
    pipeline: Annotated[str | None, typer.Option(help="breadth_first (default) or depth_first.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Edits per step; default 32.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of Adam; default 0.0005.")] = None,
    epochs: Annotated[int | None, typer.Option(help="At most so many; default 25.")] = None,
    loss_average: Annotated[str | None, typer.Option(help="edit (default) or token.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of the edits; default 0.")] = None,
    precision: Annotated[str | None, typer.Option(help="Of training: float32 or bfloat16; default the faster.")] = None,
    limit: LimitOption = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32 (default), bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto (default), cpu, cuda, cuda:N.")] = None,
    threads: ThreadsOption = None,
    register: Annotated[
        bool, typer.Option("--register", help="Keep the delta with its MLflow run, as the model's registered edit.")
    ] = False,
    tracking_uri: UriOption = None,
    as_json: JsonOption = False,
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Make the edits at one position; write the delta and what it does."""
    from locft.model.models import load_structure
    from locft.model.positions import TuningPosition, parameter_names
    from sweeps.tracking.address import resolve_uri
    from sweeps.tracking.registry import register_edit
    from sweeps.commands.settings import edit_settings

    given = {
        "pipeline": pipeline,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "epochs": epochs,
        "loss_average": loss_average,
        "seed": seed,
        "precision": precision,
    }
    if edits is None and limit is not None:
        raise InputError("--limit: it says how many of --edits to take, which is not given")
    named = None if edits is None else edits_of(edits, limit)
    chosen = edit_settings(position, given, dtype, named, from_run, tracking_uri)
    where = TuningPosition.parse(chosen.position)
    if register and chosen.run_id is None:
        raise InputError(
            "--register: there is no MLflow run to keep the delta with; name one by --from-run or a position file"
        )
    writable(folder / "edit.json")
    parameter_names(load_structure(model, trust_remote_code=trust_remote_code), where)
    bench = _workbench(
        model,
        chosen.edits,
        chosen.capability,
        chosen.dtype,
        device or chosen.device,
        threads or chosen.threads,
        trust_remote_code,
        chosen.model_fingerprint,
    )
    training = bench.train(where, chosen.training)
    if training.diverged:
        err.print(Text(f"the training diverged after {training.steps} steps: try a smaller --learning-rate"))
        raise typer.Exit(1)
    measured = bench.measure(training.delta, whole_answers=True)
    file = training.delta.save(folder)
    summary = {
        "model": model,
        "edits": {"source": chosen.edits.source, "count": len(bench.rows)},
        "position": chosen.position,
        "settings": dict(training.delta.settings),
        "delta": str(file),
        "seconds": round(training.seconds, 3),
        "losses": list(training.losses),
        "metrics": measured.metrics,
        "unedited": bench.baseline.metrics,
    }
    write(folder / "edit.json", json.dumps(summary, indent=2) + "\n")
    outcomes = "".join(json.dumps(asdict(outcome), ensure_ascii=False) + "\n" for outcome in measured.outcomes)
    write(folder / "outcomes.jsonl", outcomes)
    if register:
        summary["registered"] = register_edit(
            folder, chosen.run_id, model, chosen.position, measured.metrics, resolve_uri(tracking_uri)
        )
    if as_json:
        return print_json(summary)
    out.print(f"{len(bench.rows)} edits at {chosen.position} in {training.seconds:.1f} s: {file}", highlight=False)
    print_metrics(measured.metrics, bench.baseline.metrics)
    if register:
        out.print(f"Registered: {summary['registered']}", highlight=False)


def apply(
    delta: Annotated[
        str, typer.Argument(metavar="DELTA", help="A delta file, the folder `locft edit` wrote, or models:/NAME@ALIAS.")
    ],
    model: Annotated[str, typer.Option("--model", help="The unedited model it was trained on.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the edited model.")],
    dtype: DtypeOption = "float32",
    tracking_uri: UriOption = None,
    as_json: JsonOption = False,
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Write the edited model: MODEL with DELTA merged into it."""
    from locft.model.delta import merge
    from locft.model.models import load_model

    change = _delta(delta, tracking_uri)
    writable(folder / "config.json")
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"--out {folder}: the folder is not empty; name a new one")
    loaded = load_model(model, dtype=dtype, device="cpu", trust_remote_code=trust_remote_code)
    change.require_base(loaded)
    merge(loaded, change, folder)
    if as_json:
        return print_json({"model": model, "position": change.position, "folder": str(folder)})
    out.print(f"{model} edited at {change.position}: {folder}", highlight=False)


def evaluate(
    model: ModelArgument,
    edits: EditsOption,
    delta: Annotated[
        str | None, typer.Option("--delta", help="A delta, also models:/NAME@ALIAS; default: the model as it is.")
    ] = None,
    limit: LimitOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    tracking_uri: UriOption = None,
    as_json: JsonOption = False,
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Measure MODEL, or MODEL with a delta, on edits and capability probes."""
    from sweeps.study.schema import Capability

    change = _delta(delta, tracking_uri) if delta else None
    base = change.base_fingerprint if change else None
    bench = _workbench(model, edits_of(edits, limit), Capability(), dtype, device, threads, trust_remote_code, base)
    metrics = bench.measure(change).metrics if change else bench.baseline.metrics
    if as_json:
        where = change.position if change else None
        return print_json({"model": model, "position": where, "metrics": metrics, "unedited": bench.baseline.metrics})
    print_metrics(metrics, bench.baseline.metrics)


def bench(context: typer.Context) -> None:
    """Measure the engine against the plain full forward on this machine. Needs a checkout of the repository."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "tests" / "benchmarks" / "bench.py").is_file():
        raise InputError("locft bench needs a checkout of the repository (tests/benchmarks/), not an installed package")
    sys.path.insert(0, str(root))
    from tests.benchmarks.bench import app

    app(args=context.args, prog_name=context.command_path, standalone_mode=False)


def _workbench(
    model: str,
    edits: "Edits",
    capability: "Capability",
    dtype: str,
    device: str,
    threads: int | None,
    trust_remote_code: bool,
    fingerprint: str | None,
) -> "Workbench":
    """Everything loaded, and the unedited model measured. fingerprint: of the only model it may be, None for any."""
    import torch

    from locft.data.suites import load_suite
    from locft.model.models import load_model
    from locft.data.requests import load_edits
    from locft.workbench import Workbench

    torch.set_num_threads(threads or os.cpu_count() or 1)
    requests = load_edits(edits.source, limit=edits.limit, sample_seed=edits.sample_seed)
    measured = capability.suite or capability.tasks
    suite = load_suite(capability.suite, capability.tasks, capability.limit, capability.prose) if measured else None
    loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if fingerprint not in (None, loaded.fingerprint):
        raise InputError(
            f"model {model!r} has fingerprint {loaded.fingerprint}, but the edit was made on one with {fingerprint}; "
            "give the model it was made on, unedited"
        )
    for sentence in requests.findings.sentences():
        err.print(Text(sentence))
    return Workbench.prepare(loaded, requests, suite, capability.prose_tokens)


def _delta(source: str, tracking_uri: str | None) -> "EditDelta":
    """From a file, a folder, or the model registry."""
    from locft.model.delta import EditDelta
    from sweeps.tracking.address import resolve_uri
    from sweeps.tracking.registry import PREFIX, fetch_edit

    if not source.startswith(PREFIX):
        return EditDelta.load(Path(source))
    with tempfile.TemporaryDirectory() as folder:
        return EditDelta.load(fetch_edit(source, resolve_uri(tracking_uri), Path(folder)))
