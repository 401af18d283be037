"""The commands about one model or edit file: positions, edits, edit, apply, bench. Registered in `sweeps.commands.cli`.

Commands import what they run: `locft --help` would otherwise load torch and MLflow.
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis.stats.wording import plural
from locft.cache import file_sha256
from locft.errors import InputError, listed
from sweeps.commands.console import new_folder, notice, print_json, print_table, say, writable, write
from sweeps.commands.edit_source import DIGEST, Batch, ContinueOptions, SourceOptions
from sweeps.commands.options import (
    DELTA_HELP,
    EDITS_HELP,
    EditsOptions,
    JsonOption,
    LimitOption,
    LoadOptions,
    MapOption,
    ModelArgument,
    RemoteCodeOption,
    SampleSeedOption,
    TrainingOptions,
    UriOption,
    typed,
)
from sweeps.commands.summaries import print_metrics, print_remedies
from sweeps.commands.workbench import workbench
from sweeps.tracking.address import resolve_uri

if TYPE_CHECKING:
    from analysis.stats.signatures import Signature
    from locft.data.ledger import Ledger, LedgerEntry
    from locft.data.requests import EditSet
    from locft.train.pipelines import Training, TrainingSettings
    from locft.workbench import Measurement, Workbench
    from sweeps.commands.settings import EditSettings


MOST_SHOWN = 5
"""Number of contradictory prompts (--json has all of them), or of edits that would be lost, that are spelled out."""


def positions(model: ModelArgument, as_json: JsonOption = False, trust_remote_code: RemoteCodeOption = False) -> None:
    """List every tuning position of MODEL: layer, module, parameters, shapes, size."""
    from locft.model.models import load_structure
    from locft.model.positions import has_parts, list_positions, no_row

    structure = load_structure(model, trust_remote_code=trust_remote_code)
    found = list_positions(structure)
    if not has_parts(structure):
        notice(f"whole layers only: {no_row(structure)}")
    if as_json:
        listed = []
        for info in found:
            parameters = dict(zip(info.names, info.shapes, strict=True))
            listed.append({"position": str(info.position), "parameters": parameters, "size": info.size})
        return print_json({"model": model, "positions": listed})
    rows = []
    for info in found:
        shapes = "\n".join(" x ".join(map(str, shape)) for shape in info.shapes)
        rows.append([str(info.position), f"{info.size:,}", "\n".join(info.names), shapes])
    print_table(("position", "size", "parameter", "shape"), rows, f"{model}: {len(found)} tuning positions")


def edit(
    model: ModelArgument,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the delta and its metrics.")],
    source: SourceOptions,
    training: TrainingOptions,
    load: LoadOptions,
    going_on: ContinueOptions,
    register: Annotated[
        bool, typer.Option("--register", help="Store the delta with its MLflow run, as a registered edit.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make the edits at one position, or continue an earlier edit; write the delta and its metrics."""
    from locft.model.models import load_structure
    from locft.model.positions import TuningPosition, parameter_names
    from sweeps.commands.settings import idle_options

    uri = resolve_uri(source.tracking_uri) if source.from_run or register else None
    earlier = going_on.earlier(folder, source, training)
    writable(folder / "edit.json")
    chosen = earlier.settings(model, training, load, source) if earlier else source.settings(training, load.dtype, uri)
    where = TuningPosition.parse(chosen.position)
    if register and chosen.run_id is None:
        raise InputError(
            "--register: there is no MLflow run to store the delta with; give --from-run or a position file"
        )
    notice(*idle_options(asdict(training), chosen.training))
    parameter_names(load_structure(model, trust_remote_code=load.trust_remote_code), where)
    device, threads = load.device or chosen.device, load.threads or chosen.threads
    load = replace(load, dtype=chosen.dtype, device=device, threads=threads)
    batch = going_on.batch(earlier, source, chosen)
    _keep_ledger(folder, batch.ledger, source.edits)
    bench = workbench(
        model, load, batch.measured, chosen.capability, chosen.ask_formats, fingerprint=chosen.model_fingerprint
    )
    chosen = replace(chosen, training=_available(model, bench, chosen.training))
    notice(f"training {batch.counted()} at {chosen.position}")
    trained = batch.train(bench, where, chosen.training)
    if trained.diverged:
        notice(f"the training diverged after {trained.steps} steps")
        print_remedies(_remedies(bench, chosen, trained, {}, batch), failed=True)
        raise typer.Exit(1)
    notice(f"measuring the edited model, after {trained.seconds:.0f} s of training")
    measured = bench.measure(trained.delta, whole_answers=True)
    summary = _summary(model, folder, bench, chosen, trained, measured, batch)
    if register:
        from sweeps.tracking.registry import register_edit

        summary["registered"] = register_edit(folder, chosen.run_id, model, chosen.position, measured.metrics, uri)
    remedies = _remedies(bench, chosen, trained, measured.metrics, batch)
    if as_json:
        signatures = [signature.to_dict(command) for signature, command in remedies]
        return print_json({**summary, "signatures": signatures})
    say(f"{batch.counted()} at {chosen.position} in {trained.seconds:.1f} s: {summary['delta']}", *batch.told(summary))
    print_metrics({"edited": measured.metrics, "unedited": bench.baseline.metrics})
    print_remedies(remedies)
    if register:
        say(f"Registered: {summary['registered']}")


def _keep_ledger(folder: Path, ledger: "Ledger", source: str | None) -> None:
    """Raise InputError if the folder's ledger is the edit file, or tells of several times and of edits, or of what became of
    them, that the new ledger does not know. source: the edit file."""
    from locft.data.ledger import FILE_NAME, Ledger

    if not writable(folder / FILE_NAME, source).exists():
        return
    there = Ledger.load(folder).entries
    times = {time for entry in there for time in (entry.arrived, entry.retracted) if time}

    def made(entry: "LedgerEntry") -> tuple[str, str]:
        return entry.request.prompt, entry.request.target

    known = {made(entry) for entry in ledger.entries}
    gone = {made(entry) for entry in ledger.entries if not entry.active}
    lost = [entry.request.id for entry in there if made(entry) not in (known if entry.active else gone)]
    if lost and len(times) > 1:
        raise InputError(
            f"--out {folder}: holds {plural(len(lost), 'edit')} that this one would lose ({listed(lost, MOST_SHOWN)}); "
            f"continue it with --onto {folder}, or name another folder"
        )


def _summary(
    model: str,
    folder: Path,
    bench: "Workbench",
    chosen: "EditSettings",
    trained: "Training",
    measured: "Measurement",
    batch: "Batch",
) -> dict[str, Any]:
    """Write the delta, its ledger, the answers and edit.json into the folder; returns the content of edit.json."""
    from locft.data.ledger import FILE_NAME
    from locft.train.formats import asked

    file = trained.delta.save(folder)
    summary = {
        "model": model,
        "edits": {"source": chosen.edits.source, "count": len(bench.rows)},
        "dtype": chosen.dtype,
        "run_id": chosen.run_id,
        "position": chosen.position,
        "settings": dict(trained.delta.settings),
        "ask_formats": list(asked(bench.loaded.tokenizer, chosen.ask_formats)),
        "delta": str(file),
        DIGEST: file_sha256(file),
        "seconds": round(trained.seconds, 3),
        "losses": list(trained.losses),
        "metrics": measured.metrics,
        "unedited": bench.baseline.metrics,
        **batch.came_of_it(measured),
    }
    write(folder / FILE_NAME, batch.ledger.text())
    outcomes = "".join(json.dumps(asdict(outcome), ensure_ascii=False) + "\n" for outcome in measured.outcomes)
    write(folder / "outcomes.jsonl", outcomes)
    write(folder / "edit.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _available(model: str, bench: "Workbench", training: "TrainingSettings") -> "TrainingSettings":
    """The settings without the formats that the model's tokenizer lacks, which a notice names."""
    from locft.train.formats import available, parse_formats
    from sweeps.study.resolve import no_chat

    tokenizer, formats = bench.loaded.tokenizer, parse_formats(training.train_formats)
    notice(*no_chat(model, tokenizer, {"--train-formats": formats}))
    return replace(training, train_formats=",".join(available(tokenizer, formats)))


def _remedies(
    bench: "Workbench", chosen: "EditSettings", trained: "Training", measured: Mapping[str, float], batch: "Batch"
) -> "list[tuple[Signature, str]]":
    """What went wrong with an edit, and the same command with one option changed. measured: metrics of its delta."""
    from analysis.stats.pick import recommend
    from analysis.stats.signatures import signatures
    from analysis.stats.table import results_frame
    from locft.model.positions import TuningPosition, n_layers
    from sweeps.run.trial import training_metrics

    where = TuningPosition.parse(chosen.position)
    row = {
        "trial_id": "edit", "status": "done", "layers": n_layers(bench.loaded.model), "layer": where.layer,
        "module": where.module, **asdict(chosen.training), "dtype": chosen.dtype, "epoch_losses": trained.losses,
        **training_metrics(trained, chosen.training.pipeline, len(bench.rows)), **measured,
    }  # fmt: skip
    findings = asdict(batch.measured.findings)
    results, known = results_frame([row]), {"baseline": bench.baseline.metrics, "findings": findings}
    found = signatures(results, recommend(results), **known, fixed=("layer", "module"))
    return [_with_command(signature, typed()) for signature in found]


def _with_command(signature: "Signature", words: tuple[str, ...]) -> "tuple[Signature, str]":
    """The signature and the command that changes its setting. Edits of a ledger that contradict each other are taken back.
    words: the command as it was typed."""
    continued = {"--onto", "--consolidate"} & {word.partition("=")[0] for word in words}
    if continued and signature.setting == "edits.source":
        signature = replace(signature, setting="without", value="IDS")
        words = tuple(re.sub("^--consolidate", "--onto", word) for word in words)
    return signature, signature.edit_command(words)


def edits(
    source: Annotated[str, typer.Argument(metavar="FILE", help=EDITS_HELP)],
    limit: LimitOption = None,
    sample_seed: SampleSeedOption = None,
    field_map: MapOption = None,
    fix: Annotated[
        Path | None, typer.Option(metavar="OUT.jsonl", help="Write the edits to this file in LocFT's own layout.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show how an edit file is read: layout, counts, the first edit, fields that are ignored, edits that contradict others."""
    from locft.data.requests import own_record

    named = EditsOptions(source, limit, sample_seed, field_map).named_edits()
    if fix:
        writable(fix, source)
    found = named.load()
    records = [own_record(*pair) for pair in zip(found.requests, found.truths, strict=True)]
    if fix:
        write(fix, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    contradictions = found.contradictions()
    if as_json:
        return print_json(
            {
                "source": source, "layout": found.layout, "records": found.records, "fingerprint": found.fingerprint,
                "counts": _counts(found), "first": records[0], "findings": asdict(found.findings),
                "contradictions": contradictions, "unread": dict(found.unread), "fixed": fix and str(fix),
            }
        )  # fmt: skip
    say(f"{source}: layout {found.layout}, {plural(found.records, 'record')}")
    print_table(("", "count"), [(name, f"{count:,}") for name, count in _counts(found).items()])
    say(f"The first edit:\n{json.dumps(records[0], ensure_ascii=False, indent=2)}")
    say(*(found.sentences() or ("No problems found.",)))
    for prompt, targets in list(contradictions.items())[:MOST_SHOWN]:
        say(f"  {prompt!r} has the targets {' and '.join(map(repr, targets))}")
    if fix:
        notice(f"written: {fix}")


def _counts(found: "EditSet") -> dict[str, Any]:
    requests = found.requests
    return {
        "edits": len(requests),
        "with a subject": sum(bool(request.subject) for request in requests),
        "with a true answer": sum(request.ground_truth is not None for request in requests),
        "rephrases": sum(len(request.rephrases) for request in requests),
        "locality prompts": sum(len(request.locality) for request in requests),
        "with an answer": sum(one.answer is not None for request in requests for one in request.locality),
        "portability questions": sum(len(request.portability) for request in requests),
    }


def apply(
    delta: Annotated[str, typer.Argument(metavar="DELTA", help=DELTA_HELP)],
    model: Annotated[str, typer.Option(help="The unedited model it was trained on.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the edited model.")],
    tracking_uri: UriOption = None,
    as_json: JsonOption = False,
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Write the edited model: the files of MODEL, with DELTA merged into the tensors it changes."""
    from locft.model.merge import merge
    from sweeps.tracking.registry import load_delta

    change = load_delta(delta, tracking_uri)
    new_folder(folder, "config.json")
    merged = merge(model, change, folder, trust_remote_code=trust_remote_code)
    notice(*merged.sentences())
    if as_json:
        return print_json({"model": model, "position": change.position, **asdict(merged)})
    say(f"{model} edited at {change.position}: {folder}")


def bench(context: typer.Context) -> None:
    """Compare the engine with the plain full forward pass on this machine. Needs a checkout of the repository."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "tests" / "benchmarks" / "bench.py").is_file():
        raise InputError("locft bench needs a checkout of the repository (tests/benchmarks/), not an installed package")
    sys.path.insert(0, str(root))
    from tests.benchmarks.bench import app

    if code := app(args=context.args, prog_name=context.command_path, standalone_mode=False):
        raise typer.Exit(code)
