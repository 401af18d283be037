"""Failure signatures: what goes wrong at the pick of a study, the likeliest cause going by its own numbers, and the one setting
to change: first something that is not in use yet (another pipeline, method, format), then more of what is."""

import json
import math
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from analysis.stats.axes import AXIS
from analysis.stats.comparison import Measured
from analysis.stats.formats import FORMATS, by_format, format_title
from analysis.stats.pareto import comparable
from analysis.stats.pick import Recommendation
from analysis.stats.table import by_setting, done, value_text
from analysis.stats.wording import number, percent, plural

CAPABILITY_FALL = 0.10
"""Largest fall that is not reported, as a share of the unedited model's capability."""
RELIABLE = 0.80
GENERAL = 0.5
"""Generalization below this counts as low, as a share of reliability."""
FORMAT_GAP = 0.20
LOCAL = 0.5
LEARNT = 0.1
"""Nats per token: a mean loss below this is low enough for the model to give the answers."""
FEWEST = 3
"""Minimum number of settings before an edit can count as wrong in all of them."""
ALL = ",".join(FORMATS)
STEADIER = "With more than {} edits in a step, its gradient is less noisy."
WORDING = "Answer briefly: {prompt}"
"""One more format to train, where the three above do not carry over to another wording."""
CORRECTED = "edits-without-contradictions.jsonl"
"""Placeholder for the file that the user makes."""


@dataclass(frozen=True)
class Signature:
    """Something that went wrong, and what to do about it."""

    name: str
    """Such as "one format lost"."""
    seen: str
    """The numbers, in a sentence."""
    cause: str
    """The cause that they make likely, in a sentence."""
    setting: str
    """The one to change: an axis, or another field of the study file."""
    value: Any
    """What to set it to."""

    @property
    def sentences(self) -> str:
        """Name, numbers and cause."""
        return f"{self.name.capitalize()}: {self.seen} {self.cause}"

    def command(self, words: Sequence[str]) -> str:
        """The change as a command; the last --set wins. words: the command that runs the study, such as locft sweep quickstart."""
        axis = AXIS.get(self.setting)
        place = f"space.{self.setting}=" if axis and axis.swept else f"{self.setting}="
        return shlex.join([*words, "--set", f"{place}{_yaml(self.value)}"])

    def edit_command(self, words: Sequence[str]) -> str:
        """The same for the command of one edit, which has an option per axis. words: such as locft edit MODEL --edits FILE."""
        option = "--edits" if self.setting == "edits.source" else f"--{self.setting.replace('_', '-')}"
        return shlex.join([*words, option, str(self.value)])

    def to_dict(self, command: str) -> dict[str, Any]:
        """A JSON-serialisable dict that includes the command."""
        return {**asdict(self), "command": command}


def _yaml(value: Any) -> str:
    """The value as the study file's reader expects it after "=": text that contains YAML's special characters is quoted."""
    return value if isinstance(value, str) and not re.search(r"[:#{}\[\]]", value) else json.dumps(value)


@dataclass(frozen=True)
class _Case:
    """What the signatures look at."""

    results: pd.DataFrame
    pick: Recommendation
    baseline: Mapping[str, float]
    findings: Mapping[str, float]
    fixed: Collection[str]

    def metric(self, name: str) -> float:
        return self.pick.metrics.get(name, math.nan)

    def value(self, axis: str) -> Any:
        return self.pick.settings.get(axis, AXIS[axis].default)

    @property
    def formats(self) -> dict[str, float]:
        """Reliability by format, where several were asked."""
        return by_format(self.pick.metrics, "reliability")

    @property
    def untrained(self) -> list[str]:
        """The formats that are asked but not trained, except the wording held out for measuring."""
        trained = self.value("train_formats").split(",")
        return [name for name in self.formats if name in FORMATS and name not in trained]

    @property
    def row(self) -> pd.Series:
        """The trial of the pick's lowest seed."""
        return self.results[self.results["trial_id"] == self.pick.trial_id].iloc[0]

    @property
    def losses(self) -> list[float]:
        """Its finite losses."""
        return [loss for loss in self.row["epoch_losses"] if math.isfinite(loss)]

    def first(self, *changes: tuple[str, str, Any]) -> tuple[str, str, Any]:
        """The first (cause, setting, value) whose setting may be changed."""
        return next(change for change in changes if change[1] not in self.fixed)


def signatures(
    results: pd.DataFrame,
    pick: Recommendation | None,
    *,
    baseline: Mapping[str, float] = MappingProxyType({}),
    findings: Mapping[str, float] = MappingProxyType({}),
    fixed: Collection[str] = (),
) -> tuple[Signature, ...]:
    """The signatures of a results table, the most serious first; empty if nothing went wrong.

    pick: that of these results. baseline: metrics of the unedited model. findings: numbers about the edits, named as in
    `locft.data.requests.EditFindings`. fixed: axes that the user cannot set, since the command chooses them.
    """
    found = list(_diverged(results, fixed))
    if pick is not None:
        case = _Case(results, pick, baseline, findings, fixed)
        for look in (_capability, _reliability, _one_format, _generalization, _locality, _fights):
            found += look(case)
    return tuple(found)


Remedy = tuple[Signature, str]
"""What went wrong, and the command that changes the one setting."""


def remedies(about: Measured, pick: Recommendation | None) -> tuple[Remedy, ...]:
    """The signatures of a study with their commands. pick: that of its results."""
    study = about.study
    found = signatures(
        about.results,
        pick,
        baseline=about.baseline,
        findings=study.get("edit_counts") or {},
        fixed=study.get("chosen_axes") or (),
    )
    words = study.get("command") or ("locft", "sweep", str(study["name"]))
    return tuple((signature, signature.command(words)) for signature in found)


def _diverged(results: pd.DataFrame, fixed: Collection[str]) -> Iterator[Signature]:
    rows = done(results)
    lost = rows[rows["diverged"] == 1]
    if lost.empty:
        return
    least = float(lost["learning_rate"].min())
    seen = f"{len(lost)} of {plural(len(rows), 'finished trial')} diverged: the loss stopped being finite."
    size = int(lost["batch_size"].max())
    if not AXIS["learning_rate"].counts(lost.iloc[0]):
        return (yield Signature("training diverged", seen, STEADIER.format(size), "batch_size", 2 * size))
    gentle = float(rows["learning_rate"][rows["diverged"] != 1].max())
    setting, value = "learning_rate", _digits(least / 4)
    cause = f"The learning rate is too high for some positions, from {number(least)} on."
    if gentle < least:
        value, cause = gentle, f"All of them had a learning rate of at least {number(least)}, the others less."
    if "learning_rate" in fixed:  # a selection takes the rate from the probe
        setting, value = "batch_size", 2 * size
        cause += " " + STEADIER.format(size)
    yield Signature("training diverged", seen, cause, setting, value)


def _capability(case: _Case) -> Iterator[Signature]:
    change = case.metric("capability_change")
    before = case.baseline.get("capability", case.metric("capability") - change)
    if change < -CAPABILITY_FALL * before:
        fell = f"from {percent(before)} to {percent(before + change)}, by {percent(-change / before)} of it"
        yield Signature("capability fell", f"Capability fell {fell}.", *_held_back(case))


def _locality(case: _Case) -> Iterator[Signature]:
    if (kept := case.metric("locality")) < LOCAL:
        seen = f"Locality is {percent(kept)}: most tokens of the answers to unrelated prompts have changed."
        yield Signature("locality lost", seen, *_held_back(case, case.value("guard") == "none"))


def _held_back(case: _Case, unguarded: bool = False) -> tuple[str, str, Any]:
    """Cause, setting and value where the edit changes more than it should. unguarded: no guard is in use yet."""
    method, strength = case.value("method"), case.value("curvature_strength")
    drift = case.metric("drift_kl")
    so_far = f"; predictions on plain text moved by {number(drift)} nats per token" if math.isfinite(drift) else ""
    if steps := case.value("further_steps"):
        cause = f"The model was trained further before it was measured, for {plural(steps, 'step')}{so_far}."
        return cause, "further_steps", steps // 10
    if not AXIS["curvature_strength"].counts({"method": method}):
        cause = f"Nothing holds the rest of the model in place (method {value_text('method', method)}){so_far}."
        return cause, "method", "natural_gradient"
    if unguarded:
        cause = f"No guard holds answers near the edits in place{so_far}."
        return cause, "guard", "same_relation"
    more = _digits(3 * strength) or AXIS["curvature_strength"].default
    return f"A strength of {number(strength)} is too little here{so_far}.", "curvature_strength", more


def _reliability(case: _Case) -> Iterator[Signature]:
    if (reliability := case.metric("reliability")) < RELIABLE:
        seen = f"Reliability is {percent(reliability)} at {case.pick.position}."
        yield Signature("low reliability", seen, *_not_learnt(case))


def _not_learnt(case: _Case) -> tuple[str, str, Any]:
    """Cause, setting and value where edits are answered wrongly."""
    losses, epochs = case.losses, case.value("epochs")
    trained, merged = case.metric("trained_loss"), case.metric("merged_loss")
    trained = losses[-1] if math.isnan(trained) and losses else trained
    if _overwritten(case):
        return _one_after_the_other(case)
    if trained < LEARNT:
        loss = f"the loss is {number(trained)} before and {number(merged)} after"
        undone, dtype, steps = merged > max(LEARNT, 2 * trained), case.value("dtype"), case.value("further_steps")
        if undone and steps:
            cause = f"Training the model further, for {plural(steps, 'step')}, undoes the edits: {loss}."
            return cause, "further_steps", steps // 10
        if undone and dtype != "float32":
            return f"Rounding to {dtype} undoes the edits: {loss}.", "dtype", "float32"
        if case.untrained:
            return _format_change(case, min(case.untrained, key=case.formats.__getitem__))
        return f"The loss is low ({number(trained)}), but not for every prompt in every format.", "epochs", 2 * epochs
    if len(losses) >= 4 and losses[-1] < 0.9 * losses[3 * len(losses) // 4 - 1] and case.metric("epochs_run") >= epochs:
        fell = f"from {number(losses[3 * len(losses) // 4 - 1])} to {number(losses[-1])} in the last quarter"
        return f"The loss was still falling when the {epochs} epochs ended ({fell}).", "epochs", 2 * epochs
    at = f"the loss ends at {number(trained)}"
    if held := _HELD_BACK.get(case.value("method")):
        axis, factor, cause = held
        if value := case.value(axis):
            more = factor * value if isinstance(value, int) else _digits(factor * value)
            return f"{cause.format(number(value))}: {at}.", axis, more
    longer = f"The edits are not learnt: {at}.", "epochs", 2 * epochs
    if not AXIS["learning_rate"].counts(case.pick.settings):
        return longer
    rate, cause, factor = case.value("learning_rate"), f"The steps are too short: {at}.", 2.0
    if len(losses) >= 2 and losses[-1] > 1.5 * min(losses):
        cause, factor = f"The loss went up again, from {number(min(losses))}: the steps are too long.", 0.5
    return case.first((cause, "learning_rate", _digits(factor * rate)), longer)


_HELD_BACK: dict[str, tuple[str, Any, str]] = {
    "low_curvature": ("curvature_strength", 1 / 3, "The penalty of strength {} holds the edits back"),
    "natural_gradient": ("curvature_strength", 1 / 3, "The penalty of strength {} holds the edits back"),
    "norm_bounded": ("norm_bound", 10, "The bound of {} on each weight leaves too little room"),
    "lora": ("rank", 4, "A change of rank {} is too small"),
    "adalora": ("rank", 4, "A change of rank {} is too small"),
}
"""What keeps a method from learning: the axis, the factor on its value that loosens it, and the cause."""


def _one_format(case: _Case) -> Iterator[Signature]:
    formats = case.formats
    worst, best = (end(formats, key=formats.__getitem__, default="") for end in (min, max))
    if formats and formats[worst] < formats[best] - FORMAT_GAP:
        shares = (f"{percent(formats[form])} in {format_title(form)}" for form in (worst, best))
        yield Signature("one format lost", f"Reliability is {', and '.join(shares)}.", *_format_change(case, worst))


def _format_change(case: _Case, lost: str) -> tuple[str, str, Any]:
    """Cause, setting and value where prompts in a format are answered worse."""
    trained = case.value("train_formats")
    forms = trained.split(",")
    if lost in case.untrained:
        return f"One asked format is not trained (only {trained}).", "train_formats", f"{trained},{lost}"
    if lost not in FORMATS and not set(FORMATS) <= set(forms):
        return f"Prompts are trained as {trained} only, so other wordings are unfamiliar.", "train_formats", ALL
    if lost not in FORMATS and WORDING not in forms:
        return f"The wordings trained ({trained}) are too alike.", "train_formats", f"{trained},{WORDING}"
    share = f"in 1 of {len(forms)} epochs on average, over at most {case.value('epochs')} epochs"
    form = "this format" if lost in FORMATS else "each wording"
    return f"Each edit is trained in {form} {share}.", "epochs", 2 * case.value("epochs")


def _generalization(case: _Case) -> Iterator[Signature]:
    reliability, general = case.metric("reliability"), case.metric("generalization")
    if not (reliability >= RELIABLE and general < GENERAL * reliability):
        return
    seen = f"Generalization is {percent(general)} at a reliability of {percent(reliability)}."
    trained, size = case.value("train_formats"), int(case.value("batch_size"))
    changes: list[tuple[str, str, Any]] = []
    if "," not in trained:
        changes.append((f"Each edit is trained in one form only ({trained}).", "train_formats", ALL))
    if not case.value("prefix_share"):
        changes.append(("Each edit is trained at the beginning of a text only.", "prefix_share", 0.5))
    tried, layers = case.results["layer"].nunique(), int(case.row["layers"])
    if tried < layers:
        changes.append((f"Only {tried} of {layers} layers were tried, and others may be better.", "layer", "all"))
    cause = f"A step sees {plural(size, 'edit')}: larger batches leave less room to memorise each edit."
    changes.append((cause, "batch_size", 2 * size))
    yield Signature("low generalization", seen, *case.first(*changes))


def _fights(case: _Case) -> Iterator[Signature]:
    name = "edits fight each other"
    if against := int(case.findings.get("contradictions", 0)):
        seen = f"{against} edits have the same prompt as another edit but a different target."
        cause = f"They cannot all be learnt: at most {percent(case.findings['reachable'])} of the edits can."
        yield Signature(name, seen, cause, "edits.source", CORRECTED)
    elif _overwritten(case):
        yield Signature(name, "Edits that were learnt are lost again.", *_one_after_the_other(case))
    elif lost := _always_wrong(case):
        wrong, edits, settings = lost
        seen = f"The same {plural(wrong, 'edit')} of {edits} {'is' if wrong == 1 else 'are'} answered wrong in all {settings} settings."
        size, epochs = int(case.value("batch_size")), case.value("epochs")
        changes = [("They may need more steps than the others.", "epochs", 2 * epochs)]
        if size < edits:
            cause = f"With {plural(size, 'edit')} in a step, a step that helps others can undo them."
            changes.insert(0, (cause, "batch_size", min(2 * size, edits)))
        yield Signature(name, seen, *case.first(*changes))


def _overwritten(case: _Case) -> bool:
    """True if edits that were learnt one batch after the other are lost in the end."""
    trained, losses = case.metric("trained_loss"), case.losses
    learnt = bool(losses) and float(np.mean(losses)) < LEARNT
    return case.value("pipeline") == "depth_first" and learnt and trained > LEARNT and len(losses) > 1


def _one_after_the_other(case: _Case) -> tuple[str, str, Any]:
    left, ended = number(float(np.mean(case.losses))), number(case.metric("trained_loss"))
    cause = f"Depth-first leaves each batch at a loss of {left}, and at the end it is {ended}: later edits overwrite earlier ones."
    return cause, "pipeline", "breadth_first"


def _always_wrong(case: _Case) -> tuple[int, int, int] | None:
    """The numbers of edits that no setting gets right, of edits and of settings; None if unknown, or unless the first is small."""
    rows = comparable(by_setting(case.results), ("reliability",))
    answers = [right for right in rows["right_by_edit"] if isinstance(right, np.ndarray)]
    if len(answers) < max(FEWEST, len(rows)) or len({len(right) for right in answers}) > 1:
        return None
    wrong, edits = int((np.max(answers, axis=0) == 0).sum()), len(answers[0])
    return (wrong, edits, len(answers)) if 0 < wrong <= (1 - RELIABLE) * edits else None


def _digits(value: float) -> float:
    """Rounded to two significant digits."""
    return float(f"{value:.2g}")
