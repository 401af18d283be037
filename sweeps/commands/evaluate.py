"""The commands `locft evaluate` and `locft ask`: measure a model, edited or not, on edits and capability items, and show how it
answers prompts. Registered in `sweeps.commands.cli`."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis.stats.wording import number, seconds
from locft.errors import InputError
from sweeps.commands.console import notice, print_json, print_table, say
from sweeps.commands.options import (
    DELTA_HELP,
    EDITS,
    EditsOptions,
    FormatsOption,
    JsonOption,
    LoadOptions,
    ModelArgument,
    UriOption,
    comma_separated,
    idle_without,
)
from sweeps.commands.summaries import print_metrics
from sweeps.commands.workbench import asked_formats, workbench

if TYPE_CHECKING:
    from locft.harness import TaskScore
    from locft.model.models import LoadedModel
    from sweeps.study.schema import Capability, Edits

PROBES = "probes"


@dataclass(frozen=True)
class Measured(EditsOptions):
    """What to measure: edits, capability, and tasks of lm-evaluation-harness."""

    ask_formats: FormatsOption = None
    capability: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ITEMS",
            help="Also measure capability, drift and perplexity: on probes (the 701 built-in items), or on a benchmark file or "
            "hub id. Repeatable.",
        ),
    ] = None

    lm_eval: Annotated[
        str | None,
        typer.Option(
            metavar="TASKS",
            help="Also run lm-evaluation-harness tasks, separated by commas, such as arc_easy,gsm8k; paper: the paper's five. "
            "Needs the extra `harness`.",
        ),
    ] = None
    lm_eval_limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Use the first N items of each of these tasks.")
    ] = None
    lm_eval_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="More task files of lm-evaluation-harness (YAML).")
    ] = None

    def named(self) -> "Edits | None":
        """The edits, if any. Raises InputError with every option that lacks one it needs, or if there is nothing to measure."""
        problems = []
        if self.edits is None and self.capability:
            problems.append("--capability: it is only measured together with edits; give --edits as well")
        if self.edits is None:
            problems += idle_without("--edits", {"--ask-formats": self.ask_formats})
        if not self.tasks:
            of_tasks = {"--lm-eval-limit": self.lm_eval_limit, "--lm-eval-path": self.lm_eval_path}
            problems += idle_without("--lm-eval", of_tasks)
        if self.lm_eval is not None and not self.tasks:
            problems.append("--lm-eval: got nothing, expected names of tasks, separated by commas")
        if self.edits is None and self.lm_eval is None:
            problems.append(f"nothing to measure: expected --edits ({EDITS}), --lm-eval TASKS, or both")
        if problems:
            raise InputError(problems)
        return self.named_edits()

    @property
    def tasks(self) -> list[str]:
        return comma_separated(self.lm_eval)

    def wanted_capability(self) -> "Capability":
        """The items that --capability names; a file gives its name without the extension. Raises InputError for a repeated name."""
        from sweeps.study.schema import Capability

        items = self.capability or []
        tasks = {Path(source).stem if Path(source).exists() else source.replace("/", "-").replace(":", "-"): source
                 for source in items if source != PROBES}  # fmt: skip
        if len(tasks) + (PROBES in items) < len(items):
            raise InputError(f"--capability: got {', '.join(items)}, expected every name once")
        return Capability(suite=PROBES if PROBES in items else None, tasks=tasks)


def evaluate(
    model: ModelArgument,
    measured: Measured,
    load: LoadOptions,
    delta: Annotated[str | None, typer.Option(help=f"{DELTA_HELP} Default: the unedited model.")] = None,
    tracking_uri: UriOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure MODEL, with or without a delta, on edits and on any capability items and tasks that you name."""
    from locft.data.suites import harness_tasks
    from sweeps.tracking.registry import load_delta

    formats, capability = asked_formats(measured.ask_formats), measured.wanted_capability()
    named, harness = measured.named(), harness_tasks() if measured.tasks else None
    edits = named.load() if named else None
    change = load_delta(delta, tracking_uri) if delta else None
    tasks = harness.load_tasks(measured.tasks, measured.lm_eval_path) if harness else {}
    position, fingerprint = (change.position, change.base_fingerprint) if change else (None, None)
    found: dict[str, Any] = {"model": model, "position": position}
    loaded = None
    if edits:
        began = time.monotonic()
        bench = workbench(model, load, edits, capability, formats, fingerprint=fingerprint)
        loaded, metrics = bench.loaded, bench.baseline.metrics
        if change:
            notice(f"measuring the edited model (up to about {seconds(time.monotonic() - began)})")
            metrics = bench.measure(change).metrics
        found |= {"metrics": metrics, "unedited": bench.baseline.metrics}
        if not as_json:
            print_metrics(({"edited": metrics} if change else {}) | {"unedited": bench.baseline.metrics})
    if tasks:
        from locft.harness import measure_tasks

        loaded = loaded or load.load(model)
        if change:
            change.require_base(model, loaded.fingerprint)
        what = f"{model} and its edit" if change else model
        notice(f"measuring {what} on {', '.join(measured.tasks)} of lm-evaluation-harness")
        scores = measure_tasks(loaded, change, tasks, measured.lm_eval_limit, notice)
        found["lm_eval"] = [asdict(score) for score in scores]
        if not as_json:
            _print_scores(scores)
    if as_json:
        print_json(found)


def _print_scores(scores: "Sequence[TaskScore]") -> None:
    """Scores are on the harness's own scale: shares are fractions, not percentages, and BLEU goes from 0 to 100."""
    rows = []
    for one in scores:
        change = f"{one.change.mean:+.3g} [{one.change.low:+.3g}, {one.change.high:+.3g}]" if one.change else ""
        edited = number(one.edited) if one.change else ""
        rows.append([one.task, one.metric, f"{one.items:,}", edited, number(one.unedited), change])
    print_table(("task", "metric", "items", "edited", "unedited", "change [95% interval]"), rows)


def ask(
    model: ModelArgument,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Texts to continue, or questions.")],
    load: LoadOptions,
    delta: Annotated[str | None, typer.Option(help=f"{DELTA_HELP} Answers are shown side by side.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer.")] = 64,
    tracking_uri: UriOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask MODEL each PROMPT, raw and through the chat template, before and after an edit.

    Answers are greedy and stop at the end of the line.
    """
    from locft.model.delta import applied
    from sweeps.tracking.registry import load_delta

    if empty := [number for number, prompt in enumerate(prompts, 1) if not prompt.strip()]:
        raise InputError(f"PROMPT {', '.join(map(str, empty))}: empty, expected text")
    change = load_delta(delta, tracking_uri) if delta else None
    loaded = load.load(model)
    if change:
        change.require_base(model, loaded.fingerprint)
    answers = _answers(loaded, prompts, tokens, "before")
    if change:
        with applied(loaded, change):
            after = _answers(loaded, prompts, tokens, "after")
        answers = [{**one, **other} for one, other in zip(answers, after, strict=True)]
    if as_json:
        told = [{"after": None, **one} for one in answers]
        return print_json({"model": model, "position": change.position if change else None, "answers": told})
    for place, one in enumerate(answers):
        if place == 0 or answers[place - 1]["prompt"] != one["prompt"]:
            say(("\n" if place else "") + one["prompt"], style="bold")
        for label in ("before", "after") if change else ("before",):
            say("  ".join(["", f"{one['format']:<4}", *([f"{label:<6}"] if change else []), one[label]]))


def _answers(loaded: "LoadedModel", prompts: list[str], tokens: int, label: str) -> list[dict[str, str]]:
    """prompt, format and answer (under `label`), for every prompt and every format that the tokenizer has. Raises InputError
    for prompts that do not fit."""
    from locft.measure.generation import line_answers
    from locft.train.formats import CHAT, RAW, available

    forms = available(loaded.tokenizer, (RAW, CHAT))
    by_form = [line_answers(loaded, prompts, tokens, form) for form in forms]
    return [
        {"prompt": prompt, "format": form, label: answer}
        for prompt, *answers in zip(prompts, *by_form, strict=True)
        for form, answer in zip(forms, answers, strict=True)
    ]
