"""The `locft` command: reads arguments, calls the platform, prints. Exit code 0 done, 1 the work failed, 2 bad input.

What a command says goes to standard output; progress, notices and errors go to standard error. With --json, standard
output is one JSON object. Heavy libraries are imported by the commands that need them, so that --help answers at once.
"""

import json
import logging
import os
import sys
import tempfile
import warnings
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from locft.errors import InputError
from sweeps.console import (
    about,
    complain,
    err,
    new_table,
    out,
    plain,
    print_answer,
    print_json,
    print_metrics,
    print_selection,
    print_wide,
    say_study,
    writable,
    write,
)

if TYPE_CHECKING:
    from locft.delta import EditDelta
    from locft.workbench import Workbench
    from sweeps.prepare import PreparedStudy
    from sweeps.schema import Capability, Edits
    from sweeps.sweep import StudyState

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

app = typer.Typer(
    name="locft",
    help="Where should a language model be edited, and what does the edit cost?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="A ready study (quickstart, ...) or a study file.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Built-in name, hub id, folder or .gguf file.")]
EDITS = "atlas, an edit file, or a data set's hub id."
EditsOption = Annotated[str, typer.Option("--edits", help=EDITS)]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Use the first N edits.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field: space.layer=[3,7]. Repeatable."),
]
UriOption = Annotated[
    str | None,
    typer.Option("--tracking-uri", help="MLflow store; default MLFLOW_TRACKING_URI, else sqlite:///mlflow.db here."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
AddressOption = Annotated[
    str | None, typer.Option(help="Ray cluster: auto, or HOST:PORT. Default: this machine.")
]
CommandOption = Annotated[
    str | None,
    typer.Option("--on-end", metavar="COMMAND", help="Run when it ends; gets what came of it as JSON on standard input."),
]
WebhookOption = Annotated[
    str | None,
    typer.Option(metavar="URL", envvar="LOCFT_WEBHOOK", show_envvar=True, help="The same is posted there."),
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="Of the frozen weights: float32, bfloat16, float16.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default all cores.")]
RemoteCodeOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model. Off unless asked for.")
]


def main() -> None:
    """Entry point: turns errors into one clear message and an exit code."""
    _be_quiet()
    try:
        code = app(standalone_mode=False)
    except InputError as error:
        complain(error.problems)
        code = 2
    except Exception as error:
        code = _unexpected(error)
    if code == INTERRUPTED:
        err.print("interrupted; what was finished is kept, and the same command goes on from there")
    sys.exit(code)


@app.command()
def positions(model: ModelArgument, as_json: JsonOption = False, trust_remote_code: RemoteCodeOption = False) -> None:
    """List every tuning position of MODEL: layer, module, parameters, shapes, size."""
    from locft.models import load_structure
    from locft.positions import list_positions

    found = list_positions(load_structure(model, trust_remote_code=trust_remote_code))
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


@app.command()
def plan(study: StudyArgument, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Show the trials of STUDY, their number and what they will take. Nothing is run or written."""
    from analysis.wording import seconds
    from sweeps.estimate import estimate

    prepared = _prepared(study, overrides)
    resources = prepared.study.resources
    cores = os.cpu_count() or 1
    concurrent = resources.concurrent if isinstance(resources.concurrent, int) else max(1, cores // resources.cpus)
    expected = estimate(prepared.plan, prepared.facts, cpus=resources.cpus, concurrent=concurrent)
    if as_json:
        trials = [{"id": trial.id, **trial.to_dict()} for trial in prepared.plan.trials]
        return print_json({"study": about(prepared), "trials": trials, "estimate": asdict(expected)})
    say_study(prepared)
    table = new_table(None, "id", "position", "pipeline", "batch", "learning rate", "loss", "seed")
    for t in prepared.plan.trials:
        table.add_row(
            t.id, t.position, t.pipeline, str(t.batch_size), f"{t.learning_rate:g}", t.loss_average, str(t.seed)
        )
    if prepared.plan.trials:
        print_wide(table)
    else:
        out.print(f"The trials are chosen while the study runs (search: {prepared.study.search.method}).")
    out.print(
        f"{prepared.plan.count} trials, {concurrent} at a time: about {seconds(expected.seconds)} "
        f"({seconds(expected.seconds_low)} to {seconds(expected.seconds_high)}), "
        f"{expected.peak_memory_bytes / 2**30:.1f} GiB of memory"
    )


@app.command()
def sweep(
    study: StudyArgument,
    overrides: SetOption = None,
    tracking_uri: UriOption = None,
    address: AddressOption = None,
    report_file: Annotated[Path | None, typer.Option("--out", help="Dashboard file; default NAME.html here.")] = None,
    on_end: CommandOption = None,
    webhook: WebhookOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run STUDY. The same command again runs only what is not done yet."""
    from sweeps.notify import Hooks
    from sweeps.progress import Progress
    from sweeps.sweep import run_sweep

    hooks = Hooks.checked(on_end, webhook)
    prepared = _prepared(study, overrides)
    report_file = writable(report_file or Path(f"{prepared.study.name}.html"))
    say_study(prepared)

    def show(state: "StudyState") -> Progress:
        done = state.results[state.results["status"] == "done"]
        return Progress(prepared.study.name, prepared.plan.count, done.to_dict("records"))

    with hooks.at_the_end(prepared.study.name, err.print) as event, redirect_stdout(sys.stderr):  # Ray prints there
        done = run_sweep(prepared, tracking_uri, address=address, show=show)
        pick = done.answer.recommendation
        event |= {"ending": done.ending, "done": done.state.done, "failed": done.state.failed, "left": done.state.left}
        event |= {"position": pick and pick.position, "tracking_uri": done.tracking_uri}
    write(report_file, done.answer.report_html)
    print_answer(done.state, done.answer, report_file, done.tracking_uri, as_json)
    if done.ending == "same_failure":
        err.print("stopped: the first trials all failed for the same reason, so the others would as well")
    if done.ending == "out_of_time" or done.ending == "complete" and done.state.left > done.state.failed:
        err.print(
            f"the budget ended the study with {done.state.left} trials left; the same command with higher limits (budget)"
            " goes on",
            soft_wrap=True,
        )
    if done.ending == "interrupted":
        raise typer.Exit(INTERRUPTED)
    if done.state.done == 0:
        raise typer.Exit(1)


@app.command()
def status(
    study: StudyArgument, overrides: SetOption = None, tracking_uri: UriOption = None, as_json: JsonOption = False
) -> None:
    """Say how far STUDY is: done, failed (with causes), left."""
    from collections import Counter

    from sweeps.delivery import open_outbox
    from sweeps.sweep import find_tracker, read_state
    from sweeps.tracking_store import connect

    prepared = _prepared(study, overrides)
    if tracking_uri:  # a store that is named should be there; the one that is not named may be still to come
        connect(tracking_uri)
    state = read_state(prepared, find_tracker(prepared, tracking_uri))
    waiting = len(open_outbox(prepared.id, tracking_uri))
    causes = Counter(state.results.loc[state.results["status"] == "failed", "error"])
    if as_json:
        numbers = {"planned": prepared.plan.count, "done": state.done, "failed": state.failed, "left": state.left}
        return print_json({"study": about(prepared), **numbers, "undelivered": waiting, "causes": dict(causes)})
    out.print(
        f"{prepared.study.name}: {state.done} of {prepared.plan.count} done, {state.failed} failed, {state.left} left",
        highlight=False,
    )
    for cause, count in causes.most_common():
        out.print(Text(f"  {count} x {cause}"))
    if waiting:
        out.print(f"  {waiting} more are finished and wait on this machine for the store; `locft sweep` delivers them")


@app.command()
def report(
    study: StudyArgument,
    overrides: SetOption = None,
    tracking_uri: UriOption = None,
    report_file: Annotated[Path | None, typer.Option("--out", help="Default NAME.html here.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the dashboard of STUDY as one HTML file, from what is finished so far."""
    from sweeps.sweep import answer_of, find_tracker, read_state
    from sweeps.tracking_uri import redact, resolve_uri

    prepared = _prepared(study, overrides)
    report_file = writable(report_file or Path(f"{prepared.study.name}.html"))
    tracker = find_tracker(prepared, tracking_uri)
    state = read_state(prepared, tracker)
    if tracker is None or state.results.empty:
        where = redact(resolve_uri(tracking_uri))
        raise InputError(f"study {prepared.study.name!r}: nothing finished in {where}; run `locft sweep {study}`")
    answer = answer_of(state, tracker)
    write(report_file, answer.report_html)
    print_answer(state, answer, report_file, tracker.uri, as_json)


@app.command()
def select(
    model: ModelArgument,
    edits: EditsOption,
    limit: LimitOption = None,
    budget_share: Annotated[
        float | None, typer.Option(help="Of the estimated cost of the full grid; default 0.1.", metavar="SHARE")
    ] = None,
    budget_minutes: Annotated[float | None, typer.Option(help="By the clock, everything included.")] = None,
    method: Annotated[
        str, typer.Option(help="race, or a baseline: probe, proportional, late, random, tpe, nsga2.")
    ] = "race",
    seed: Annotated[int, typer.Option(min=0, help="Of samples and draws.")] = 0,
    prior: Annotated[
        Path | None, typer.Option(help="Position file of another model: that relative depth is raced, too.")
    ] = None,
    overrides: SetOption = None,
    position_file: Annotated[
        Path | None, typer.Option("--out", help="Position file; default NAME.json here, with the page NAME.html beside it.")
    ] = None,
    tracking_uri: UriOption = None,
    address: AddressOption = None,
    on_end: CommandOption = None,
    webhook: WebhookOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the position to edit in MODEL without sweeping it. The same command again goes on where it was."""
    from sweeps.notify import Hooks
    from sweeps.progress import RaceProgress
    from sweeps.question import DEFAULT_SHARE, Budget, ask
    from sweeps.recommendation import conclude
    from sweeps.selection import run_selection

    if budget_share is not None and budget_minutes is not None:
        raise InputError("--budget-share, --budget-minutes: got both, expected one of them")
    hooks = Hooks.checked(on_end, webhook)
    share = DEFAULT_SHARE if budget_share is None and budget_minutes is None else budget_share
    budget = Budget(share, budget_minutes)
    question = ask(
        model,
        _edits(edits, limit).source,
        overrides or (),
        limit=limit,
        method=method,
        budget=budget,
        seed=seed,
        prior=prior,
    )
    file = writable(position_file or Path(f"{question.study.name}.json"))
    page = writable(file.with_suffix(".html"))
    say_study(question.levels.full)
    with hooks.at_the_end(question.study.name, err.print) as event, redirect_stdout(sys.stderr):  # Ray prints there
        found, tracker = run_selection(question, tracking_uri, address=address, progress=RaceProgress())
        answer = conclude(found, tracker, str(file))
        picked = answer.position and answer.position["position"]
        event |= {"ending": found.ending, "runs": len(found.scores), "position": picked, "tracking_uri": tracker.uri}
    write(page, answer.html)
    if answer.position:
        write(file, json.dumps(plain(answer.position), indent=2) + "\n")
    if as_json:
        print_json({"position": answer.position, "file": str(file), "page": str(page), "tracking_uri": tracker.uri})
    else:
        print_selection(answer, file, page, tracker.uri, edits if limit is None else f"{edits} --limit {limit}")
    if found.ending == "same_failure":
        err.print("stopped: the first runs all failed for the same reason, so the others would as well")
    if found.ending == "interrupted":
        raise typer.Exit(INTERRUPTED)
    if answer.position is None:
        raise typer.Exit(1)


@app.command()
def edit(
    model: ModelArgument,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the delta and its metrics.")],
    edits: Annotated[str | None, typer.Option("--edits", help=EDITS)] = None,
    position: Annotated[
        str | None, typer.Option("--position", help="LAYER.MODULE, such as 22.mlp_down, or the file `locft select` wrote.")
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
    from locft.models import load_structure
    from locft.positions import TuningPosition, parameter_names
    from sweeps.registry import register_edit
    from sweeps.settings import edit_settings

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
    named = None if edits is None else _edits(edits, limit)
    chosen = edit_settings(position, given, dtype, named, from_run, tracking_uri)
    where = TuningPosition.parse(chosen.position)
    if register and chosen.run_id is None:
        raise InputError("--register: there is no MLflow run to keep the delta with; name one by --from-run or a position file")
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
            folder, chosen.run_id, model, chosen.position, measured.metrics, tracking_uri
        )
    if as_json:
        return print_json(summary)
    out.print(f"{len(bench.rows)} edits at {chosen.position} in {training.seconds:.1f} s: {file}", highlight=False)
    print_metrics(measured.metrics, bench.baseline.metrics)
    if register:
        out.print(f"Registered: {summary['registered']}", highlight=False)


@app.command()
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
    from locft.delta import merge
    from locft.models import load_model

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


@app.command()
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
    from sweeps.schema import Capability

    change = _delta(delta, tracking_uri) if delta else None
    base = change.base_fingerprint if change else None
    bench = _workbench(model, _edits(edits, limit), Capability(), dtype, device, threads, trust_remote_code, base)
    metrics = bench.measure(change).metrics if change else bench.baseline.metrics
    if as_json:
        where = change.position if change else None
        return print_json({"model": model, "position": where, "metrics": metrics, "unedited": bench.baseline.metrics})
    print_metrics(metrics, bench.baseline.metrics)


@app.command()
def bench(
    model: ModelArgument = "smollm2-135m",
    edits: EditsOption = "atlas",
    limit: Annotated[int, typer.Option("--limit", min=1, help="Use the first N edits.")] = 100,
    layers: Annotated[str | None, typer.Option(help="29,22 or all; default four over the depth.")] = None,
    module: Annotated[str, typer.Option(help="What is trained in the layer.")] = "mlp_down",
    batch_size: Annotated[str, typer.Option(help="Edits per step; the first is the study's.")] = "10,100",
    repeats: Annotated[int, typer.Option(help="Pairs of steps; of measurements, at most 2.")] = 5,
    epochs: Annotated[int, typer.Option(help="Of the study's trials, at most.")] = 25,
    threads: ThreadsOption = None,
    precision: Annotated[str | None, typer.Option(help="Of the engine: float32 or bfloat16; default the faster.")] = None,
    stages: Annotated[str, typer.Option(help="Which are measured.")] = "training_step,edit_metrics,capability,study",
    whole_study: Annotated[bool, typer.Option("--whole-study", help="Run the reference's study, too: hours.")] = False,
    as_json: JsonOption = False,
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Measure the engine against the plain full forward on this machine, side by side."""
    from locft.bench import COLUMNS, read_settings, report_lines, report_rows, run_bench
    from locft.benchmarks import load_suite
    from locft.models import load_model, load_structure
    from locft.requests import load_edits

    requests = load_edits(_edits(edits, limit).source, limit=limit)
    settings = read_settings(
        load_structure(model, trust_remote_code=trust_remote_code),
        len(requests.requests),
        threads=threads or os.cpu_count() or 1,
        layers=layers,
        module=module,
        batch_size=batch_size,
        repeats=repeats,
        epochs=epochs,
        precision=precision,
        stages=stages,
        whole_study=whole_study,
    )
    loaded = load_model(model, device="cpu", trust_remote_code=trust_remote_code)
    result = run_bench(loaded, requests, load_suite("probes"), settings, say=lambda line: err.print(Text(line)))
    if as_json:
        return print_json(result)
    table = new_table(None, *COLUMNS)
    for row in report_rows(result):
        table.add_row(*row)
    print_wide(table)
    for line in report_lines(result):
        out.print(Text(line), soft_wrap=True)


@app.command()
def ui(
    tracking_uri: UriOption = None,
    port: Annotated[int | None, typer.Option(help="Default 5000, or the next free port.")] = None,
) -> None:
    """Open MLflow on 127.0.0.1 and print the pages that matter. Ctrl-C stops it."""
    from sweeps.tracking_lookup import list_studies
    from sweeps.ui import serve

    def announce(address: str) -> None:
        out.print(f"MLflow: {address}", highlight=False)
        for found in list_studies(address, base=address):
            out.print(Text(f"\n{found['name']} ({found['status']})"))
            for name, link in found["links"].items():
                out.print(Text(f"  {name}: {link}"), soft_wrap=True)

    serve(tracking_uri, port, announce)


def _prepared(study: str, overrides: list[str] | None) -> "PreparedStudy":
    from sweeps.prepare import prepare
    from sweeps.study import load_study

    return prepare(load_study(study, overrides or []))


def _edits(source: str, limit: int | None) -> "Edits":
    from sweeps.schema import Edits

    if not source.strip():
        raise InputError(f"--edits: got nothing, expected {EDITS.rstrip('.')}")
    return Edits(source=source, limit=limit)


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

    from locft.benchmarks import load_suite
    from locft.models import load_model
    from locft.requests import load_edits
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
    from locft.delta import EditDelta
    from sweeps.registry import PREFIX, fetch_edit

    if not source.startswith(PREFIX):
        return EditDelta.load(Path(source))
    with tempfile.TemporaryDirectory() as folder:
        return EditDelta.load(fetch_edit(source, tracking_uri, Path(folder)))


def _unexpected(error: Exception) -> Literal[1, 2]:
    """Typer's own complaints are bad input; anything else is work that failed, told in one line."""
    if hasattr(error, "format_message"):  # click's exceptions, which typer carries its copy of
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            return 2
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "locft"
        complain([f"{error.format_message().rstrip('.')} (`{command} --help` lists what it takes)"])
        return 2
    lines = str(error).strip().splitlines() or [""]
    complain([f"{type(error).__name__}: {lines[0]}"])
    if os.environ.get("LOCFT_DEBUG"):
        raise error
    err.print(Text("(LOCFT_DEBUG=1 shows where)"))
    return 1


def _be_quiet() -> None:
    """No telemetry, no progress bars or advice of libraries between our lines."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
