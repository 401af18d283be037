"""What the `locft` command says: answers and tables on standard output, notices and errors on standard error."""

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from locft.errors import InputError

if TYPE_CHECKING:
    from analysis.stats.comparison import Comparison
    from sweeps.answer import StudyAnswer, StudyState
    from sweeps.study.estimate import Forecast
    from sweeps.study.plan import PreparedStudy
    from sweeps.select.answer import Answer as PositionAnswer
    from sweeps.run.dispatch import Ending

out = Console(soft_wrap=False)
err = Console(stderr=True, soft_wrap=True)


def about(prepared: "PreparedStudy") -> dict[str, Any]:
    study = prepared.study
    findings = asdict(prepared.edits.findings)
    return {
        "name": study.name,
        "id": prepared.id,
        "model": study.model,
        "edits": {"source": study.edits.source, "count": len(prepared.edits.requests), **findings},
        "capability": prepared.capability_source,
    }


def say_study(prepared: "PreparedStudy") -> None:
    study = prepared.study
    err.print(Text(f"{study.name}: {study.model}, {len(prepared.edits.requests)} edits of {study.edits.source}"))
    err.print(Text(f"capability: {prepared.capability_source}"))
    for sentence in prepared.edits.findings.sentences():
        err.print(Text(sentence))


def expectation(forecast: "Forecast", where: str = "on this machine") -> str:
    """What is to be run of a study, and what it will take, in words."""
    from analysis.stats.wording import plural, seconds

    expected, budget, planned = forecast.estimate, forecast.prepared.study.budget, forecast.prepared.plan.count
    trials = plural(expected.trials, "trial")
    if expected.ended_by == "trials":
        trials += f" of {planned:,} planned (the budget ends the study after {budget.trials:,})"
    if expected.ended_by == "minutes":
        trials = f"about {trials} of {planned:,} planned (the budget ends the study after {seconds(60 * budget.minutes)})"
    if done := planned - expected.left:
        trials += f" and {done:,} done"
    ranges = ((expected.memory_bytes_low, expected.memory_bytes_high), (expected.disk_bytes_low, expected.disk_bytes_high))
    memory, disk = (f"{low / 2**30:.2g} to {high / 2**30:.2g} GiB" for low, high in ranges)
    return (
        f"{trials}, {where} {expected.concurrent} at a time: about {seconds(expected.seconds)} "
        f"({seconds(expected.seconds_low)} to {seconds(expected.seconds_high)}), {memory} of memory, {disk} of disk "
        f"(from {expected.source})"
    )


def print_answer(
    state: "StudyState",
    answer: "StudyAnswer",
    report_file: Path,
    uri: str,
    as_json: bool,
    *,
    ending: "Ending | None" = None,
    registered: str | None = None,
    comparison: "Comparison | None" = None,
) -> None:
    """ending: of the run that comes to this answer, where there was one. registered: the address of the pick's edit in the
    model registry. comparison: with another study."""
    from analysis.stats.wording import percent
    from sweeps.tracking.address import resolve_uri

    pick = answer.recommendation
    counts = {"planned": state.prepared.plan.count, "done": state.done, "failed": state.failed, "left": state.left}
    by_id = {row["trial_id"]: row for row in state.results.to_dict("records")}
    front = [by_id[trial_id] for trial_id in answer.front.trial_ids]
    names = ("reliability", "generalization", "locality", "capability", "capability_change", "drift_kl")
    if as_json:
        shown = ("trial_id", "layer", "module", "pipeline", "batch_size", "learning_rate", "seed", *names)
        return print_json(
            {
                "study": about(state.prepared),
                "trials": counts,
                "causes": failure_causes(state),
                "ending": ending,
                "front": [{key: plain(row[key]) for key in shown} for row in front],
                "hypervolume": answer.front.hypervolume,
                "pick": asdict(pick) if pick else None,
                "unedited": state.baseline,
                "report": str(report_file),
                "registered": registered,
                "comparison": comparison and compared(comparison),
                "tracking_uri": uri,
            }
        )
    table = new_table("Pareto front of reliability against capability", "position", "setting", *names)
    for row in front:
        setting = f"{row['pipeline']} b{row['batch_size']} lr {row['learning_rate']:g} s{row['seed']}"
        values = [percent(row[name]) if row[name] == row[name] else "-" for name in names[:-1]]
        drift = f"{row['drift_kl']:.3f}" if row["drift_kl"] == row["drift_kl"] else "-"
        chosen = "*" if pick and row["trial_id"] in (pick.trial_id, *pick.trial_ids) else ""
        table.add_row(f"{row['layer']}.{row['module']}{chosen}", setting, *values, drift)
    if front:
        print_wide(table)
    if pick:
        out.print(Text(f"\nEdit at {pick.position}.", style="bold"), Text(pick.rule))
        for reason in pick.reasons:
            out.print(Text(f"  {reason}"))
        run = by_id[pick.trial_id].get("run_id")
        store = "" if uri == resolve_uri(None) else f" --tracking-uri {uri}"
        repeat = f"locft edit {state.prepared.study.model} --from-run {run}{store} --out edited"
        out.print(Text(f"Repeat it: {repeat}"), soft_wrap=True)
        if registered:
            model = state.prepared.study.model
            out.print(Text(f"Apply it: locft apply {registered} --model {model}{store} --out edited-model"), soft_wrap=True)
    if comparison:
        from analysis.stats.comparison import cautions, moved

        out.print(Text(f"\nCompared with {comparison.names[1]}:", style="bold"))
        for sentence in (*moved(comparison), *cautions(comparison)):
            out.print(Text(f"  {sentence}"))
    out.print(f"{counts['done']} of {counts['planned']} trials done, {counts['failed']} failed", highlight=False)
    out.print(Text(f"Dashboard: {report_file}\nMLflow: locft ui --tracking-uri {uri}"), soft_wrap=True)


def failure_causes(state: "StudyState") -> dict[str, int]:
    """How many trials failed for each cause, the most frequent first."""
    failed = state.results.loc[state.results["status"] == "failed", "error"]
    return dict(Counter(failed).most_common())


def compared(comparison: "Comparison") -> dict[str, Any]:
    """Two studies side by side: intervals are [value, low, high] at 95%, differences are there - here."""
    from analysis.page.sentences import differing
    from analysis.stats.comparison import cautions, moved

    return {
        "with": comparison.names[1],
        "differing": {what: {"here": here, "there": there} for what, here, there in differing(comparison)},
        "picks": {side: pick and pick.position for side, pick in zip(("here", "there"), comparison.picks, strict=True)},
        "moved": moved(comparison),
        "shared_positions": len(comparison.shared),
        "agreement": {
            item.metric: {"rank_correlation": item.rank, "difference": item.difference} for item in comparison.agreements
        },
        "cautions": cautions(comparison),
    }


def print_selection(answer: "PositionAnswer", file: Path, page: Path, uri: str, edits: str) -> None:
    from analysis.page.selection_page import expectations
    from analysis.stats.wording import number, percent
    from sweeps.select.answer import UNMEASURED

    content = answer.position
    if content is None:
        out.print("No run finished, so there is no position to recommend.")
    else:
        rate = content["settings"]["learning_rate"]
        out.print(Text(f"Edit at {content['position']} with learning rate {number(rate)}.", style="bold"))
        for ranked in answer.ranking[:1]:
            for name, value in expectations(ranked.outcome, content["measured_on"]["edits"]):
                out.print(Text(f"  {name}: {value}"), soft_wrap=True)
            second = content["runner_up"]
            line = f"  Chance that it is the best of those measured: {percent(round(ranked.chance, 3))}"
            out.print(Text(line + (f"; runner-up {second['position']}" if second else "")), soft_wrap=True)
        if not answer.ranking:
            out.print(Text(f"  {UNMEASURED}"), soft_wrap=True)
        how = content["how"]
        line = f"  {how['runs']} runs, {percent(how['grid_share'])} of the full grid's cost, {how['wall_seconds']:.0f} s"
        out.print(Text(line), soft_wrap=True)
        command = f"locft edit {content['model']} --edits {edits} --position {file} --out edited"
        out.print(Text(f"Make the edit: {command}"), soft_wrap=True)
    out.print(Text(f"Page: {page}\nMLflow: locft ui --tracking-uri {uri}"), soft_wrap=True)


def print_metrics(metrics: dict[str, float], unedited: dict[str, float]) -> None:
    from analysis.stats.wording import number

    table = new_table(None, "metric", "edited", "unedited")
    for name, value in metrics.items():
        if not name.endswith("_seconds"):
            table.add_row(name, number(value), number(unedited[name]) if name in unedited else "")
    out.print(table)


def new_table(title: str | None, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    return table


def print_wide(table: Table) -> None:
    """On a terminal at its width; in a file or a pipe as wide as it wants to be."""
    if out.is_terminal:
        out.print(table)
    else:
        Console(width=Console(width=10_000).measure(table).maximum).print(table)


def print_json(value: Any) -> None:
    print(json.dumps(plain(value), allow_nan=False), flush=True)  # `ui` goes on behind it


def plain(value: Any) -> Any:
    """As JSON has it: numpy and pandas scalars as numbers, NaN, infinities and NA as null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else _text_or_null(value)


def _text_or_null(value: Any) -> str | None:
    return None if repr(value) == "<NA>" else str(value)


def writable(file: Path) -> Path:
    """The path, if a file can be made there; asked before the work, not after it. Nothing is made yet."""
    folder = next(parent for parent in file.absolute().parents if os.path.exists(parent))
    if file.is_dir():
        raise InputError(f"cannot write {file}: it is a folder")
    try:
        if file.exists():
            file.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=folder).close()  # only writing tells whether writing works
    except OSError as error:
        raise InputError(f"cannot write {file}: {folder}: {error.strerror}") from error
    return file


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def complain(problems: Sequence[str]) -> None:
    if len(problems) > 1:
        err.print(Text(f"error: {len(problems)} problems"))
        for problem in problems:
            err.print(Text(f"  {problem}"))
    else:
        err.print(Text(f"error: {problems[0]}"))
