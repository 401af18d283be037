"""The commands about studies: plan, sweep, status, report, select. Registered in `sweeps.commands.cli`."""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from locft.errors import InputError
from sweeps.commands.console import (
    about,
    err,
    expectation,
    failure_causes,
    new_table,
    out,
    plain,
    print_answer,
    print_json,
    print_selection,
    print_wide,
    say_study,
    writable,
    write,
)
from sweeps.commands.options import (
    INTERRUPTED,
    AddressOption,
    EditsOption,
    JsonOption,
    LimitOption,
    ModelArgument,
    SetOption,
    StudyArgument,
    UriOption,
    edits_of,
)
from sweeps.tracking.address import resolve_uri

if TYPE_CHECKING:
    from sweeps.study.plan import PreparedStudy
    from sweeps.answer import StudyState
    from sweeps.tracking.study_run import Tracker


def plan(
    study: StudyArgument, overrides: SetOption = None, tracking_uri: UriOption = None, as_json: JsonOption = False
) -> None:
    """Show the trials of STUDY, their number and what they will take. Nothing is run or written."""
    from sweeps.answer import foresee

    prepared, store = _prepared(study, overrides), resolve_uri(tracking_uri)
    forecast = foresee(prepared, store)
    if as_json:
        trials = [{"id": trial.id, **trial.to_dict()} for trial in prepared.plan.trials]
        expected = {"estimate": asdict(forecast.estimate), "warnings": forecast.warnings}
        return print_json({"study": about(prepared), "trials": trials, **expected})
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
    out.print(expectation(forecast), highlight=False, soft_wrap=True)
    for warning in forecast.warnings:
        err.print(Text(f"warning: {warning}"))


def sweep(
    study: StudyArgument,
    overrides: SetOption = None,
    tracking_uri: UriOption = None,
    address: AddressOption = None,
    report_file: Annotated[Path | None, typer.Option("--out", help="Dashboard file; default NAME.html here.")] = None,
    register: Annotated[
        bool, typer.Option(help="At the end put the delta of the study's pick into MLflow's model registry.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Run STUDY. The same command again runs only what is not done yet."""
    from sweeps.answer import foresee
    from sweeps.commands.progress import Progress
    from sweeps.sweep import run_sweep

    prepared, store = _prepared(study, overrides), resolve_uri(tracking_uri)
    report_file = writable(report_file or Path(f"{prepared.study.name}.html"))
    say_study(prepared)
    forecast = foresee(prepared, store)
    if forecast.estimate.left and address is None:
        err.print(Text(f"to run: {expectation(forecast)}"))
        for warning in forecast.warnings:
            err.print(Text(f"warning: {warning}"))

    def show(state: "StudyState") -> Progress:
        done, expected = state.results[state.results["status"] == "done"], forecast
        if address is not None:
            from sweeps.run.cluster import nodes_there

            expected = forecast.on(nodes_there())
            err.print(Text(f"to run: {expectation(expected, 'on the cluster')}"))
        return Progress(expected, done.to_dict("records"))

    with redirect_stdout(sys.stderr):  # Ray prints on standard output
        done = run_sweep(prepared, store, address=address, show=show, register=register)
    write(report_file, done.answer.report_html)
    print_answer(
        done.state,
        done.answer,
        report_file,
        done.tracking_uri,
        as_json,
        ending=done.ending,
        registered=done.registered,
    )
    if done.not_registered:
        err.print(Text(f"the pick's edit is not in the model registry: {done.not_registered}"))
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


def status(
    study: StudyArgument, overrides: SetOption = None, tracking_uri: UriOption = None, as_json: JsonOption = False
) -> None:
    """Say how far STUDY is: done, diverged, failed (with causes), left, who runs it and how long that will take."""
    from analysis.stats.wording import seconds
    from sweeps.tracking.outbox import open_outbox
    from sweeps.answer import read_state
    from sweeps.session import driver_of
    from sweeps.tracking.store import connect
    from sweeps.tracking.study_run import find_tracker

    prepared, store = _prepared(study, overrides), resolve_uri(tracking_uri)
    if tracking_uri:  # a store that is named should be there; the one that is not named may be still to come
        connect(store)
    tracker = find_tracker(store, prepared.study.name, prepared.id)
    state, driver = read_state(prepared, tracker, curves=False), driver_of(tracker)
    waiting = len(open_outbox(prepared.id, store))
    causes, diverged = failure_causes(state), int((state.results["diverged"] == 1).sum())
    left = _seconds_left(prepared, store) if driver else None
    if as_json:
        counts = {"planned": prepared.plan.count, "done": state.done, "failed": state.failed, "left": state.left}
        seen = None if driver is None else asdict(driver)
        more = {"diverged": diverged, "driver": seen, "seconds_left": left, "undelivered": waiting, "causes": causes}
        more["retried"] = dict(state.retried)
        return print_json({"study": about(prepared), **counts, **more})
    out.print(
        f"{prepared.study.name}: {state.done} of {prepared.plan.count} done"
        + (f" ({diverged} diverged)" if diverged else "")
        + f", {state.failed} failed, {state.left} left",
        highlight=False,
    )
    if driver:
        line = f"  run by process {driver.process} on {driver.host} since {driver.began}"
        out.print(Text(line + (f", about {seconds(left)} left" if left else "")))
    elif state.left:
        out.print("  not being run; `locft sweep` goes on")
    for cause, count in causes.items():
        out.print(Text(f"  {count} x {cause}"))
    for cause, count in state.retried.most_common():
        out.print(Text(f"  tried again {count} x: {cause}"))
    if waiting:
        out.print(f"  {waiting} more are finished and wait on this machine for the store; `locft sweep` delivers them")


def _seconds_left(prepared: "PreparedStudy", store: str) -> float | None:
    """Of a study that runs now, as far as the trials in the store tell: timing steps would slow it down."""
    from sweeps.answer import foresee
    from sweeps.commands.progress import Pace

    forecast = foresee(prepared, store, timed=False)
    open_trials = forecast.estimate.trials
    return Pace(forecast, forecast.done, open_trials).seconds_left(open_trials, forecast.concurrent) if forecast.costs.measured else None


def report(
    study: StudyArgument,
    overrides: SetOption = None,
    compare: Annotated[
        str | None, typer.Option(metavar="OTHER", help="A second study, to be compared with STUDY in the same file.")
    ] = None,
    compare_set: Annotated[
        list[str] | None, typer.Option("--compare-set", metavar="KEY=VALUE", help="As --set, for OTHER. Repeatable.")
    ] = None,
    compare_uri: Annotated[
        str | None,
        typer.Option("--compare-uri", metavar="URI", help="The store that holds OTHER; default that of STUDY."),
    ] = None,
    tracking_uri: UriOption = None,
    report_file: Annotated[Path | None, typer.Option("--out", help="Default NAME.html here.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the dashboard of STUDY as one HTML file, from what is finished so far."""
    from analysis.stats.comparison import compare as compared_with
    from sweeps.answer import answer_of, measured

    for name, given in (("--compare-set", compare_set), ("--compare-uri", compare_uri)):
        if given and compare is None:
            raise InputError(f"{name}: got it without --compare OTHER, the study it is for")
    prepared = _prepared(study, overrides)
    second = None if compare is None else _prepared(compare, compare_set)
    store, elsewhere = resolve_uri(tracking_uri), resolve_uri(compare_uri or tracking_uri)
    if second is not None and second.id == prepared.id and elsewhere == store:
        raise InputError(
            f"--compare {compare}: got STUDY itself, expected another study (--compare-set changes fields) or the same one of"
            " another date in another store (--compare-uri)"
        )
    report_file = writable(report_file or Path(f"{prepared.study.name}.html"))
    state, tracker = _recorded(prepared, study, store)
    other = None if second is None else measured(*_recorded(second, compare, elsewhere))
    answer = answer_of(state, tracker, other)
    write(report_file, answer.report_html)
    comparison = compared_with(measured(state, tracker), other) if other else None
    print_answer(state, answer, report_file, tracker.uri, as_json, comparison=comparison)


def _recorded(prepared: "PreparedStudy", named: str, store: str) -> "tuple[StudyState, Tracker]":
    """What the store holds of a study. Raises InputError when that is nothing."""
    from sweeps.answer import read_state
    from sweeps.tracking.address import redact
    from sweeps.tracking.study_run import find_tracker

    tracker = find_tracker(store, prepared.study.name, prepared.id)
    state = read_state(prepared, tracker)
    if tracker is None or state.results.empty:
        where = redact(store)
        raise InputError(f"study {prepared.study.name!r}: nothing finished in {where}; run `locft sweep {named}`")
    return state, tracker


def select(
    model: ModelArgument,
    edits: EditsOption,
    limit: LimitOption = None,
    budget_share: Annotated[
        float | None, typer.Option(help="Of the estimated cost of the full grid; default 0.1.", metavar="SHARE")
    ] = None,
    budget_minutes: Annotated[float | None, typer.Option(help="By the clock, everything included.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of samples and draws.")] = 0,
    prior: Annotated[
        Path | None, typer.Option(help="Position file of another model: that relative depth is tried early.")
    ] = None,
    overrides: SetOption = None,
    position_file: Annotated[
        Path | None,
        typer.Option("--out", help="Position file; default NAME.json here, with the page NAME.html beside it."),
    ] = None,
    tracking_uri: UriOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the position to edit in MODEL without sweeping it. The same command again goes on where it was."""
    from sweeps.commands.progress import RaceProgress
    from sweeps.select.request import DEFAULT_SHARE, Budget, ask
    from sweeps.select.answer import conclude
    from sweeps.select.selection import run_selection

    if budget_share is not None and budget_minutes is not None:
        raise InputError("--budget-share, --budget-minutes: got both, expected one of them")
    share = DEFAULT_SHARE if budget_share is None and budget_minutes is None else budget_share
    budget = Budget(share, budget_minutes)
    question = ask(
        model,
        edits_of(edits, limit).source,
        overrides or (),
        limit=limit,
        budget=budget,
        seed=seed,
        prior=prior,
    )
    file = writable(position_file or Path(f"{question.study.name}.json"))
    page = writable(file.with_suffix(".html"))
    say_study(question.prepared)
    running = run_selection(question, resolve_uri(tracking_uri), address=address, progress=RaceProgress())
    with redirect_stdout(sys.stderr), running as (found, tracker):  # Ray prints on standard output
        answer = conclude(found, tracker, str(file))
    write(page, answer.html)
    if answer.position:
        write(file, json.dumps(plain(answer.position), indent=2) + "\n")
    if as_json:
        written = {"file": str(file), "page": str(page), "tracking_uri": tracker.uri}
        print_json({"position": answer.position, **written, "not_recorded": answer.not_recorded})
    else:
        print_selection(answer, file, page, tracker.uri, edits if limit is None else f"{edits} --limit {limit}")
    if answer.not_recorded:
        err.print(Text(f"MLflow does not have all of this ({answer.not_recorded}); the same command records it"))
    if found.ending == "same_failure":
        err.print("stopped: the first runs all failed for the same reason, so the others would as well")
    if found.ending == "interrupted":
        raise typer.Exit(INTERRUPTED)
    if answer.position is None:
        raise typer.Exit(1)


def _prepared(study: str, overrides: list[str] | None) -> "PreparedStudy":
    from sweeps.study.resolve import prepare
    from sweeps.study.reader import load_study

    return prepare(load_study(study, overrides or []))
