"""The commands about studies: plan, sweep, status, report, select. Registered in `sweeps.commands.cli`.

Commands import what they run: `locft --help` would otherwise load torch, Ray and MLflow.
"""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from analysis.stats.axes import AXIS, named_axes
from analysis.stats.wording import ABSENT, number, plural, seconds
from locft.errors import InputError
from sweeps.commands.console import notice, plain, print_json, print_table, say, writable, write
from sweeps.commands.options import (
    INTERRUPTED,
    AddressOption,
    EditsOption,
    EditsOptions,
    JsonOption,
    LimitOption,
    MapOption,
    ModelArgument,
    SampleSeedOption,
    SetOption,
    StudyOptions,
    UriOption,
    typed,
)
from sweeps.commands.summaries import about, expectation, introduce, print_answer, print_remedies, print_selection
from sweeps.tracking.address import redact, resolve_uri

if TYPE_CHECKING:
    from sweeps.answer import StudyState
    from sweeps.commands.progress import Progress
    from sweeps.run.dispatch import Ending
    from sweeps.select.request import SelectionRequest
    from sweeps.study.estimate import Forecast
    from sweeps.study.plan import PreparedStudy
    from sweeps.tracking.study_run import Tracker


def plan(study: StudyOptions, tracking_uri: UriOption = None, as_json: JsonOption = False) -> None:
    """Show the trials of STUDY and the time, memory and disk they will take. Runs and writes nothing."""
    from sweeps.answer import foresee

    uri, prepared = resolve_uri(tracking_uri), study.prepared()
    forecast, trials = foresee(prepared, uri), prepared.plan.trials
    if as_json:
        listed = [{"id": trial.id, **trial.to_dict()} for trial in trials]
        told = {"notes": forecast.memory_notes, "warnings": forecast.warnings}
        return print_json({"study": about(prepared), "trials": listed, "estimate": asdict(forecast.estimate), **told})
    introduce(prepared)
    if trials:
        axes, rows = named_axes(map(vars, trials)), []
        for trial in trials:
            values = trial.to_dict()
            cells = (number(values[name]) if AXIS[name].counts(values) else ABSENT for name in axes)
            rows.append([trial.id, trial.position, *cells])
        print_table(("id", "position", *(AXIS[name].title for name in axes)), rows)
    else:
        say(f"The trials are chosen while the study runs (search: {prepared.study.search.method}).")
    say(expectation(forecast), *forecast.memory_notes)
    notice(*_warnings(forecast))


def sweep(
    study: StudyOptions,
    tracking_uri: UriOption = None,
    address: AddressOption = None,
    report_file: Annotated[
        Path | None, typer.Option("--out", help="Dashboard file; default NAME.html in the current folder.")
    ] = None,
    register: Annotated[
        bool, typer.Option(help="At the end, register the delta of the study's pick in MLflow's model registry.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Run STUDY. Running the same command again resumes it."""
    from analysis.stats.table import done
    from sweeps.answer import foresee
    from sweeps.commands.progress import Progress

    tracking_uri, prepared = resolve_uri(tracking_uri), study.prepared()
    from sweeps.sweep import run_sweep  # imports PyTorch, for which a mistake in the study need not wait

    report_file = _page(report_file, prepared, study.study)
    introduce(prepared)
    forecast = foresee(prepared, tracking_uri)
    if forecast.estimate.left and address is None:
        notice(f"to run: {expectation(forecast)}", *_warnings(forecast))

    def show(state: "StudyState") -> "Progress":
        expected = forecast
        if address is not None:
            from sweeps.run.cluster import nodes_there

            expected = forecast.on(nodes_there())
            notice(f"to run: {expectation(expected, 'on the cluster')}")
        return Progress(prepared.study.name, expected, done(state.results)["trial_id"])

    with redirect_stdout(sys.stderr):  # Ray prints on standard output
        ran = run_sweep(prepared, tracking_uri, address=address, show=show, register=register)
    state, ending = ran.state, ran.ending
    write(report_file, ran.answer.report_html)
    print_answer(state, ran.answer, report_file, ran.tracking_uri, as_json, ending=ending, registered=ran.registered)
    if ran.not_registered:
        notice(f"the pick's edit is not in the model registry: {ran.not_registered}")
    left, most = plural(state.left, "trial"), prepared.study.budget.trials
    untried = ending == "complete" and state.left > state.failed
    if ending == "out_of_time" or (untried and most is not None and most < prepared.plan.count):
        notice(f"the budget ended the study with {left} left; the same command with a larger budget continues it")
    elif untried and not prepared.plan.trials:
        notice(f"the search proposed nothing new, with {left} left; the same command lets it try again")
    _end(ending, "trials", failed=state.done == 0)


def status(study: StudyOptions, tracking_uri: UriOption = None, as_json: JsonOption = False) -> None:
    """Show the progress of STUDY: trials done, diverged, failed (with causes) and left, who runs it, and the time left."""
    from analysis.stats.table import causes
    from sweeps.answer import read_state, remedies_so_far
    from sweeps.tracking.outbox import open_outbox
    from sweeps.tracking.store import connect
    from sweeps.tracking.study_run import find_tracker

    uri, prepared = resolve_uri(tracking_uri), study.prepared()
    from sweeps.session import driver_of  # imports PyTorch, for which a mistake in the study need not wait

    if tracking_uri:  # a store that is named must exist; the default one may be created later
        connect(uri)
    tracker = find_tracker(uri, prepared.study.name, prepared.id)
    state, driver = read_state(prepared, tracker, curves=False), driver_of(tracker)
    undelivered = len(open_outbox(prepared.id, uri))
    failed, diverged = causes(state.results, "error"), int((state.results["diverged"] == 1).sum())
    left = _seconds_left(prepared, uri) if driver else None
    found = remedies_so_far(state, tracker)
    if as_json:
        counts = {"planned": prepared.plan.count, "done": state.done, "failed": state.failed, "left": state.left}
        counts |= {"diverged": diverged, "undelivered": undelivered, "causes": failed, "retried": state.retried}
        signatures = [signature.to_dict(command) for signature, command in found]
        by = {"driver": driver and asdict(driver), "seconds_left": left}
        return print_json({"study": about(prepared), **counts, **by, "signatures": signatures})
    done = f"{state.done} of {prepared.plan.count} done" + (f" ({diverged} diverged)" if diverged else "")
    say(f"{prepared.study.name}: {done}, {state.failed} failed, {state.left} left")
    if driver:
        by = f"  run by process {driver.process} on {driver.host} since {driver.began}"
        say(by + (f", about {seconds(left)} left" if left else ""))
    elif state.left:
        say("  not running; `locft sweep` continues it")
    say(*(f"  {count} failed: {cause}" for cause, count in failed.items()))
    say(*(f"  {count} retried: {cause}" for cause, count in state.retried.items()))
    print_remedies(found, redact(uri))
    if undelivered:
        say(f"  {undelivered} finished trials are kept on this machine; `locft sweep` records them in the store")


def report(
    study: StudyOptions,
    compare: Annotated[
        str | None, typer.Option(metavar="OTHER", help="A second study to compare with STUDY in the same file.")
    ] = None,
    compare_set: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Like --set, for OTHER. Repeatable.")
    ] = None,
    compare_uri: Annotated[
        str | None, typer.Option(metavar="URI", help="The store that holds OTHER; default that of STUDY.")
    ] = None,
    tracking_uri: UriOption = None,
    report_file: Annotated[Path | None, typer.Option("--out", help="Default NAME.html in the current folder.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the dashboard of STUDY as one HTML file, from what is finished so far."""
    from sweeps.answer import answer_of, measured

    for name, given in (("--compare-set", compare_set), ("--compare-uri", compare_uri)):
        if given and compare is None:
            raise InputError(f"{name}: needs --compare OTHER, the study it applies to")
    uri, prepared = resolve_uri(tracking_uri), study.prepared()
    second = None if compare is None else StudyOptions(compare, compare_set).prepared()
    second_uri = resolve_uri(compare_uri or tracking_uri)
    if second is not None and (second.id, second_uri) == (prepared.id, uri):
        raise InputError(
            f"--compare {compare}: got STUDY itself, expected another study (--compare-set changes fields) or the same"
            " study in another store (--compare-uri)"
        )
    report_file = _page(report_file, prepared, study.study, compare)
    state, tracker = _recorded(prepared, study.study, uri)
    other = None if second is None else measured(*_recorded(second, compare, second_uri))
    answer = answer_of(state, tracker, other)
    write(report_file, answer.report_html)
    print_answer(state, answer, report_file, tracker.uri, as_json)


@dataclass(frozen=True)
class SelectionOptions:
    """What a position is selected for, and what that may cost."""

    model: ModelArgument
    edits: EditsOption
    limit: LimitOption = None
    sample_seed: SampleSeedOption = None
    field_map: MapOption = None
    budget_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the full grid's estimated cost; default 0.1, or the cost of 8 average runs if that is less.",
            metavar="SHARE",
        ),
    ] = None
    budget_minutes: Annotated[float | None, typer.Option(help="Wall-clock minutes, everything included.")] = None
    seed: Annotated[int, typer.Option(min=0, help="Seed of samples and draws.")] = 0
    prior: Annotated[
        Path | None, typer.Option(help="Position file of another model; its relative depth is tried early.")
    ] = None
    overrides: SetOption = None

    def request(self) -> "SelectionRequest":
        """The selection, checked and resolved. Raises InputError with everything that is wrong with it."""
        from sweeps.select.request import selection_request
        from sweeps.study.reader import as_override

        edits = EditsOptions(self.edits, self.limit, self.sample_seed, self.field_map).named_edits()
        fields = {"edits.map": edits.map, "edits.sample_seed": edits.sample_seed}
        request = selection_request(
            self.model,
            edits.source,
            [*(as_override(*field) for field in fields.items()), *(self.overrides or ())],
            limit=self.limit,
            share=self.budget_share,
            minutes=self.budget_minutes,
            seed=self.seed,
            prior=self.prior,
        )
        return replace(request, command=typed())


def select(
    wanted: SelectionOptions,
    position_file: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Position file; default NAME.json in the current folder. The page NAME.html is written next to it.",
        ),
    ] = None,
    tracking_uri: UriOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the position to edit in MODEL without a full sweep. Running the same command again resumes it."""
    from sweeps.commands.progress import Progress
    from sweeps.select.answer import conclude
    from sweeps.select.selection import run_selection

    uri, request = resolve_uri(tracking_uri), wanted.request()
    file = writable(position_file or Path(f"{request.study.name}.json"), wanted.edits, wanted.prior)
    page = writable(file.with_suffix(".html"))
    if page == file:
        raise InputError(f"--out {file}: expected another ending than .html, which the page next to it gets")
    introduce(request)
    running = run_selection(request, uri, address=address, reporter=Progress(request.study.name))
    with redirect_stdout(sys.stderr), running as (found, tracker):  # Ray prints on standard output
        answer = conclude(found, tracker, str(file))
    write(page, answer.html)
    if answer.position:
        write(file, json.dumps(plain(answer.position), indent=2) + "\n")
    if as_json:
        written = {"file": str(file), "page": str(page), "tracking_uri": tracker.uri}
        print_json({"position": answer.position, **written, "not_recorded": answer.not_recorded})
    else:
        print_selection(answer.position, answer.command, page, tracker.uri)
    if answer.not_recorded:
        notice(
            f"MLflow is missing part of this result ({answer.not_recorded}); run the same command again to record it"
        )
    _end(found.ending, "runs", failed=answer.position is None)


def _page(file: Path | None, prepared: "PreparedStudy", *studies: str | None) -> Path:
    """The dashboard's file, checked as by `writable`. studies: names or files of those that are read."""
    return writable(file or Path(f"{prepared.study.name}.html"), *studies, prepared.study.edits.source)


def _end(ending: "Ending", what: str, *, failed: bool) -> None:
    """Say why no further trial ran, and end the command with its exit code."""
    if ending == "same_failure":
        notice(f"stopped: the first {what} all failed for the same reason, so the others would as well")
    if ending == "interrupted":
        raise typer.Exit(INTERRUPTED)
    if failed:
        raise typer.Exit(1)


def _warnings(forecast: "Forecast") -> list[str]:
    return [f"warning: {warning}" for warning in forecast.warnings]


def _seconds_left(prepared: "PreparedStudy", tracking_uri: str) -> float | None:
    """Time left in a running study, estimated from its trials in the store, since timing steps would slow it down."""
    from sweeps.answer import foresee
    from sweeps.commands.progress import Pace

    forecast = foresee(prepared, tracking_uri, timed=False)
    if not forecast.costs.measured:
        return None
    open_trials = forecast.estimate.trials
    return Pace(forecast, forecast.done, open_trials).seconds_left(open_trials, forecast.concurrent)


def _recorded(prepared: "PreparedStudy", name: str, tracking_uri: str) -> "tuple[StudyState, Tracker]":
    """What the store holds of a study. name: the study as the user named it. Raises InputError when nothing is finished."""
    from sweeps.answer import read_state
    from sweeps.tracking.study_run import find_tracker

    tracker = find_tracker(tracking_uri, prepared.study.name, prepared.id)
    state = read_state(prepared, tracker)
    if tracker is None or state.results.empty:
        where = redact(tracking_uri)
        raise InputError(f"study {prepared.study.name!r}: no finished trials in {where}; run `locft sweep {name}`")
    return state, tracker
