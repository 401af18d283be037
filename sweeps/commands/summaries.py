"""What the commands print about studies and selections: expected costs, the answer, metrics.

Functions import what they need: pandas and the like would delay `locft --help`.
"""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.stats.axes import SWEPT
from analysis.stats.wording import change_with_interval, number, percent, plural, points, seconds, share_interval
from sweeps.commands.console import notice, print_json, print_table, say
from sweeps.tracking.address import resolve_uri

if TYPE_CHECKING:
    from analysis.stats.comparison import Comparison
    from analysis.stats.pick import Recommendation
    from analysis.stats.signatures import Remedy
    from sweeps.answer import StudyAnswer, StudyState
    from sweeps.run.dispatch import Ending
    from sweeps.study.estimate import Forecast
    from sweeps.study.plan import PreparedStudy


def about(prepared: "PreparedStudy") -> dict[str, Any]:
    """The study for JSON output."""
    study, edits = prepared.study, prepared.edits
    return {
        "name": study.name,
        "id": prepared.id,
        "model": study.model,
        "edits": {"source": study.edits.source, "count": len(edits.requests), **asdict(edits.findings)},
        "ask_formats": prepared.study.ask_formats,
        "capability": prepared.capability_source,
        "notices": prepared.notices,
    }


def introduce(prepared: "PreparedStudy") -> None:
    """Say on standard error what the study is about, and which parts of its file have no effect."""
    study, edits = prepared.study, prepared.edits
    notice(f"{study.name}: {study.model}, {len(edits.requests)} edits from {study.edits.source}")
    notice(f"capability: {prepared.capability_source}", *edits.sentences(), *prepared.notices)


def expectation(forecast: "Forecast", where: str = "on this machine") -> str:
    """The remaining trials of a study, and the time, memory and disk space they will take."""
    expected, budget, planned = forecast.estimate, forecast.prepared.study.budget, forecast.prepared.plan.count
    trials = plural(expected.trials, "trial")
    if expected.ended_by:
        by_trials = expected.ended_by == "trials"
        end = f"{budget.trials:,}" if by_trials else seconds(60 * budget.minutes)
        rough = "" if by_trials else "about "
        trials = f"{rough}{trials} of {planned:,} planned (the budget ends the study after {end})"
    if done := planned - expected.left:
        trials += f", {done:,} already done"
    memory = f"{expected.memory_bytes_low / 2**30:.2g} to {expected.memory_bytes_high / 2**30:.2g} GiB of memory"
    disk = f"{expected.disk_bytes_low / 2**30:.2g} to {expected.disk_bytes_high / 2**30:.2g} GiB of disk"
    time = f"{seconds(expected.seconds)} ({seconds(expected.seconds_low)} to {seconds(expected.seconds_high)})"
    return f"{trials}, {where} {expected.concurrent} at a time: about {time}, {memory}, {disk} (from {expected.source})"


def print_answer(
    state: "StudyState",
    answer: "StudyAnswer",
    report_file: Path,
    tracking_uri: str,
    as_json: bool,
    *,
    ending: "Ending | None" = None,
    registered: str | None = None,
) -> None:
    """Print a study's front and pick, and how to repeat or apply the pick.

    ending: how the sweep ended; None if none ran. registered: address of the pick's edit in the model registry.
    """
    from analysis.stats.table import causes
    from sweeps.tracking.pages import SHOWN_METRICS

    pick, comparison = answer.recommendation, answer.comparison
    counts = {"planned": state.prepared.plan.count, "done": state.done, "failed": state.failed, "left": state.left}
    by_id = {row["trial_id"]: row for row in state.results.to_dict("records")}
    front = [by_id[trial_id] for trial_id in answer.front.trial_ids]
    if as_json:
        shown = ("trial_id", *(axis.name for axis in SWEPT), *SHOWN_METRICS)
        return print_json(
            {
                "study": about(state.prepared), "trials": counts, "causes": causes(state.results, "error"), "ending": ending,
                "front": [{key: row[key] for key in shown} for row in front], "hypervolume": answer.front.hypervolume,
                "pick": asdict(pick) if pick else None,
                "signatures": [signature.to_dict(command) for signature, command in answer.remedies],
                "unedited": state.baseline, "report": str(report_file), "registered": registered,
                "comparison": comparison and _compared(comparison), "tracking_uri": tracking_uri,
            }
        )  # fmt: skip
    if front:
        _print_front(front, pick)
    if pick:
        model, store = state.prepared.study.model, _store_option(tracking_uri)
        say(f"\nEdit at {pick.position}. {pick.rule}", style="bold")
        say(*(f"  {reason}" for reason in pick.reasons))
        say(
            f"Repeat it: locft edit {shlex.quote(model)} --from-run {by_id[pick.trial_id]['run_id']}{store} --out edited"
        )
        if registered:
            say(f"Apply it: locft apply {registered} --model {shlex.quote(model)}{store} --out edited-model")
    print_remedies(answer.remedies, tracking_uri)
    if comparison:
        from analysis.stats.comparison import cautions, moved

        say(f"\nCompared with {comparison.names[1]}:", style="bold")
        say(*(f"  {sentence}" for sentence in (*moved(comparison), *cautions(comparison))))
    say(f"{state.done} of {counts['planned']} trials done, {state.failed} failed")
    say(f"Dashboard: {report_file}\nMLflow: locft ui --tracking-uri {shlex.quote(tracking_uri)}")


def print_remedies(remedies: "Iterable[Remedy]", tracking_uri: str | None = None, *, failed: bool = False) -> None:
    """Print what went wrong and the one setting to change. tracking_uri: the study's store, which is added to the commands
    unless it is the default. failed: print on standard error, since there is no answer."""
    store = _store_option(tracking_uri)
    for signature, command in remedies:
        (notice if failed else say)(f"{signature.sentences}\n  Change one thing: {command}{store}")


def _store_option(tracking_uri: str | None) -> str:
    return "" if tracking_uri in (None, resolve_uri(None)) else f" --tracking-uri {shlex.quote(tracking_uri)}"


def _print_front(front: list[dict[str, Any]], pick: "Recommendation | None") -> None:
    from analysis.stats.table import setting_text
    from sweeps.tracking.pages import SHOWN_METRICS

    picked = (pick.trial_id, *pick.trial_ids) if pick else ()
    rows = []
    for row in front:
        position = f"{row['layer']}.{row['module']}" + ("*" if row["trial_id"] in picked else "")
        *fractions, drift = (row[name] for name in SHOWN_METRICS)
        setting = f"{setting_text(row)}, seed {row['seed']}"
        rows.append([position, setting, *map(percent, fractions), number(drift)])
    print_table(("position", "setting", *SHOWN_METRICS), rows, "Pareto front of reliability against capability")


def _compared(comparison: "Comparison") -> dict[str, Any]:
    """Two studies side by side for JSON. Differences are `there - here`, as [value, low, high] with a 95% interval."""
    from analysis.page.sentences import differing
    from analysis.stats.comparison import cautions, moved

    return {
        "with": comparison.names[1],
        "differing": {what: {"here": here, "there": there} for what, here, there in differing(comparison)},
        "picks": {side: pick and pick.position for side, pick in zip(("here", "there"), comparison.picks, strict=True)},
        "moved": moved(comparison),
        "shared_positions": len(comparison.shared),
        "agreement": {
            item.metric: {"rank_correlation": item.rank, "difference": item.difference}
            for item in comparison.agreements
        },
        "cautions": cautions(comparison),
    }


def print_selection(position: dict[str, Any] | None, command: str, page: Path, tracking_uri: str) -> None:
    """Print the selected position, what to expect of it, and the command that makes the edit.

    position: content of the position file. page: the HTML page.
    """
    from sweeps.select.position_file import with_rate

    if position is None:
        say("No run finished, so there is no position to recommend.")
    else:
        say(f"Edit at {with_rate(position['position'], position['settings'])}.", style="bold")
        say(*(f"  {line}" for line in _selected(position)), f"Make the edit: {command}")
    say(f"Page: {page}\nMLflow: locft ui --tracking-uri {shlex.quote(tracking_uri)}")


def _selected(position: Mapping[str, Any]) -> Iterator[str]:
    """What a position file says, in lines: recipe, predictions with 95% intervals, how sure they are, and the cost."""
    from analysis.stats.pick import by_format_text
    from analysis.stats.table import setting_text
    from sweeps.select.position_file import UNMEASURED, measured_sentence

    settings, predicted, how = position["settings"], position["predicted"], position["how"]
    yield f"Recipe: {setting_text(settings)}, at most {plural(settings['epochs'], 'epoch')}"
    for name, title, of in (("reliability", "Reliability", "edits"), ("generalization", "Generalization", "rephrased")):
        if value := predicted.get(name):
            yield f"{title}: {percent(value['mean'])} of the {of} {share_interval(value['low'], value['high'])}"
    if value := predicted.get("capability_change"):
        yield f"Capability change: {change_with_interval(value['mean'], value['low'], value['high'])}"
    if value := predicted.get("drift_kl"):
        yield f"Drift: {number(value['mean'])} nats per token [{number(value['low'])}, {number(value['high'])}]"
    if position["formats"]:
        yield f"Reliability by prompt format: {by_format_text(position['formats'])}"
    if predicted:
        if sentence := measured_sentence(position["measured_on"]):
            yield sentence
        best, elsewhere = (percent(round(position[name], 3)) for name in ("chance", "chance_elsewhere"))
        yield f"Chance that it is the best position measured: {best}; that an unmeasured one is clearly better: {elsewhere}"
    else:
        yield UNMEASURED
    if other := position["runner_up"]:
        rate = "" if other["learning_rate"] is None else f" at rate {number(other['learning_rate'])}"
        yield f"Runner-up: {other['position']}{rate}: {_traded(other['trades'])}"
    spent = f"{percent(how['grid_share'])} of the full grid's cost, {seconds(how['wall_seconds'])}"
    yield f"{plural(how['runs'], 'run')}, {spent}"


def _traded(trades: Mapping[str, float]) -> str:
    """How a runner-up differs from the pick, measured on the edits that positions are compared on."""
    drift = trades.get("drift_kl")
    shares = (f"{name.replace('_', ' ')} {points(trades[name])} points" for name in trades if name != "drift_kl")
    return ", ".join([*shares, *([f"drift {drift:+.4f} nats".replace("-", "−")] if drift is not None else [])])


def print_metrics(columns: Mapping[str, Mapping[str, float]]) -> None:
    """Print the metrics of models side by side, by the title of their column, without times."""
    shown = [name for name in next(iter(columns.values())) if not name.endswith("_seconds")]
    rows = [[name, *(number(of[name]) if name in of else "" for of in columns.values())] for name in shown]
    print_table(("metric", *columns), rows)
