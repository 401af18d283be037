"""The results table: one row per trial, its documented columns, how settings are named, and how far a number can be trusted.

Everything in `analysis` is a pure function of this table. `results_frame` makes it; `by_setting` averages the seeds of a
setting into one row, and fronts and picks are made from these rows. Errors and 95% intervals of such a row:

- reliability, generalization and locality are means over the edits that have such prompts: Wilson's interval with an edit as
  one item, since the prompts of an edit, in all formats, stand or fall together. With several seeds the error of their mean is
  added to each side, in quadrature.
- capability and its change: the bootstrap interval of the change, paired by item.
- drift: its spread over the text is not recorded, so `interval` has none; with several seeds the lowest and highest are known.
  Where a guess is better than nothing, the standard error of a single seed is taken to be `DRIFT_ERROR` times the drift.
"""

import base64
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.stats.axes import AXES, AXIS, SETTING, SWEPT, named_axes
from analysis.stats.formats import FORMATS
from analysis.stats.wording import number, percent, points, points_interval, share_interval

Z95 = 1.959964
"""Half-width of a 95% interval, in standard errors."""
TEXT, INTEGER, NUMBER, LIST = "text", "integer", "number", "list"


@dataclass(frozen=True)
class Column:
    """One column of the results table. Absent values are None for text, pd.NA for integers, NaN for numbers, [] for lists."""

    kind: str
    doc: str


_KINDS = {int: INTEGER, float: NUMBER, str: TEXT}

_MEASURED = {
    # how well the edits took: fractions in [0, 1] of prompts, means over the formats that they were asked in
    "reliability": "edit prompts answered with the target, by generation (also reliability.FORMAT)",
    "generalization": "the same for rephrased prompts (also generalization.FORMAT)",
    "reliability_tf": "reliability by teacher forcing, which reads higher",
    "generalization_tf": "generalization by teacher forcing",
    "portability": "questions that follow from the edits and are answered correctly (also portability.FORMAT)",
    "portability_tf": "portability by teacher forcing, on the main answer",
    "n_edits": "edits asked about: those trained, or a sample (n_edits.generalization: those with such prompts, if fewer)",
    "right": "which edits were answered right, in which formats, packed (`unpack_right`); None if unknown",
    "bits_per_parameter": "information in the edits' targets under the unedited model, -log2 p(target | prompt), per trained "
    "parameter",
    # what else they changed: unrelated prompts, asked raw, compared with the unedited model
    "locality": "tokens of a reference answer whose most likely token is unchanged, fraction in [0, 1]",
    "locality_first": "the same of the answer's first token alone",
    "locality_kl": "mean KL(unedited || edited) at the answer's first token, nats",
    "locality_exact": "prompts whose generated answer is unchanged, word for word, fraction in [0, 1]",
    # what it cost the model
    "capability": "mean accuracy over the tasks of the suite (also capability.TASK)",
    "capability_change": "capability minus that of the unedited model, paired by item",
    "capability_change_low": "lower end of its 95% bootstrap interval over items",
    "capability_change_high": "upper end",
    "drift_kl": "mean KL(unedited || edited) on plain text, nats per token",
    "perplexity": "of the edited model on plain text",
    # what it took
    "train_loss": "the last of `epoch_losses`",
    "trained_loss": "mean loss of all edits at the end, in the precision of training",
    "merged_loss": "the same, merged into the model's dtype: the gap is rounding and `further_steps`",
    "epoch_losses": "mean loss of each epoch (breadth-first), or the last of each batch (depth-first) or arrival",
    "stages": "for a stream, metrics after each tenth of the edits had `arrived`, as JSON; None for other pipelines",
    "epochs_run": "epochs run (breadth-first), else 1",
    "steps": "optimiser steps taken",
    "batch_pieces": "pieces in which a batch was computed: 1 unless memory ran short",
    "train_seconds": "training",
    "evaluate_seconds": "edit metrics",
    "capability_seconds": "capability suite and drift",
    "seconds": "the whole trial",
    "seconds_per_edit": "train_seconds divided by the number of edits trained",
    "arrival_seconds": "median over the arrivals of a stream, from arrival to the end of its training",
    "arrival_seconds_p95": "their 95th percentile",
    "diverged": "1 when the loss stopped being finite, else 0",
    "delta_norm": "Frobenius norm of the weight change",
}
_NO_NUMBERS = {"right": TEXT, "stages": TEXT, "epoch_losses": LIST}

COLUMNS: dict[str, Column] = {
    "trial_id": Column(TEXT, "content id of the trial"),
    "status": Column(TEXT, "done or failed"),
    "error": Column(TEXT, "cause of a failure in one line, None for a trial that is done"),
    "retried": Column(TEXT, "why earlier attempts at the trial were lost, one cause per line; None if there were none"),
    # what was tried
    "layers": Column(INTEGER, "layers of the model"),
    "depth": Column(NUMBER, "relative depth of the trained layer, 0 for the first and 1 for the last"),
    **{axis.name: Column(_KINDS[axis.type], axis.doc) for axis in AXES},
    "model_fingerprint": Column(TEXT, "hash of the unedited weights"),
    "data_fingerprint": Column(TEXT, "hash of edits and capability items"),
    "method_version": Column(INTEGER, "version of the method"),
    "run_id": Column(TEXT, "MLflow run of the trial, None when it was not tracked"),
    **{name: Column(_NO_NUMBERS.get(name, NUMBER), doc) for name, doc in _MEASURED.items()},
}
"""The documented columns, in order. After them come the parts of some metrics: accuracy by task (`capability.TASK`), and
reliability, generalization and portability by format (`reliability.FORMAT`). The format `unseen`, a wording never trained, is
left out of every mean. Where targets are long, the columns in `OF_LONG` are present as well; where a metric is a mean over fewer
than `n_edits` edits, so is their number (`locft.measure.evaluation.asked_counts`), which older results lack."""

OF_LONG = {
    "reliability_f1": "F1 of the words of answer and target, over the edits with targets of more than 8 words",
    "reliability_contains": "answers that hold such a target, word for word",
    "generalization_f1": "the same F1 of rephrased prompts",
    "generalization_contains": "rephrased prompts whose answers hold the target",
}
"""Fractions in [0, 1] that are reported in addition to exact match."""

MAX_PACKED = 5000
"""Maximum length of a packed `right`, in characters."""

SETTING_AXES = ("layers", "depth", *SETTING, "model_fingerprint", "data_fingerprint", "method_version")
"""What identifies a setting: every axis but the seed, and the model, data and method version it was run with."""

METRICS = tuple(name for name in _MEASURED if name not in (*_NO_NUMBERS, "batch_pieces", "diverged"))
"""The columns that are averaged over seeds (besides the `part_columns`)."""

FRACTIONS = ("reliability", "generalization", "locality")
"""The metrics of how well the edits did: means over edits, in [0, 1]."""

TITLES = {
    **{name: name for name in (*FRACTIONS, "capability")},
    "capability_change": "capability change",
    "drift_kl": "drift",
}
"""Metrics as figures and tables name them; any other is shown by the name of its column."""

_PARTED = ("reliability", "generalization", "portability", "capability", "n_edits")

DRIFT_ERROR = 0.1
"""Standard error of a single seed's drift, as a share of that drift: about as much as seeds differ with the built-in model."""

SPREADS = (*(f"{name}_sd" for name in FRACTIONS), "drift_kl_low", "drift_kl_high")
"""The columns in which `by_setting` reports the spread over the seeds of a setting."""


def results_frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The results table of these rows (`TrialResult.to_row()`, or what a tracking server kept of it: numbers may come
    as text). Every documented column is there with its dtype, even if there are no rows; the parts of metrics follow
    (`is_part`); anything else is kept at the end unchanged.
    """
    rows = [_with_todays_locality(row) for row in rows]
    seen = list(dict.fromkeys(name for row in rows for name in row))
    parts = sorted(filter(is_part, seen), key=_place_of_part)
    others = [name for name in seen if name not in COLUMNS and name not in parts]
    newer = {axis.name: axis.default for axis in AXES if not axis.in_first_ids}  # absent in older rows: at the default
    columns = {
        name: _typed([row.get(name, newer.get(name)) for row in rows], column.kind) for name, column in COLUMNS.items()
    }
    columns |= {name: _typed([row.get(name) for row in rows], NUMBER) for name in parts}
    columns |= {name: pd.Series([row.get(name) for row in rows], dtype=object) for name in others}
    frame = pd.DataFrame(columns)
    relative = frame["layer"].astype("float64") / (frame["layers"].astype("float64") - 1).clip(lower=1)
    frame["depth"] = frame["depth"].fillna(relative)
    return frame


def _with_todays_locality(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """In rows that have `locality_tf`, `locality` is what is called `locality_exact` now: renames it and drops `locality_tf`."""
    if "locality_tf" not in row:
        return row
    kept = {name: value for name, value in row.items() if name not in ("locality", "locality_tf")}
    return {**kept, "locality_exact": row.get("locality")}


def _place_of_part(name: str) -> tuple:
    """Sort key for parts: by metric, then tasks by name and formats in their order."""
    if name in OF_LONG:
        return len(_PARTED), list(OF_LONG).index(name)
    metric, _, part = name.partition(".")
    last = part == "unseen" and metric != "capability"
    known = FORMATS.index(part) if part in FORMATS and metric != "capability" else len(FORMATS)
    return _PARTED.index(metric), last, known, part


def _absent(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def _typed(values: list[Any], kind: str) -> pd.Series:
    if kind == LIST:
        return pd.Series([[] if _absent(value) else [float(x) for x in value] for value in values], dtype=object)
    if kind == TEXT:
        return pd.Series([None if _absent(value) else str(value) for value in values], dtype=object)
    numbers = pd.Series([math.nan if _absent(value) else float(value) for value in values], dtype="float64")
    return numbers.astype("Int64") if kind == INTEGER else numbers


def pack_right(right: Sequence[bool] | Sequence[Sequence[bool]]) -> str | None:
    """Which edits were answered right, (E,) or by format (E, F), as one short text: "E:" or "ExF:" and the packed bits,
    compressed, in base 85. None where the text would be longer than a tag of a tracking store may be."""
    bits = np.array(right, dtype=bool)
    packed = base64.b85encode(zlib.compress(np.packbits(bits).tobytes(), 9)).decode()
    text = f"{'x'.join(map(str, bits.shape))}:{packed}"
    return text if len(text) <= MAX_PACKED else None


def unpack_right(text: str) -> np.ndarray:
    """(E,) float64: the share of formats in which each edit was answered right. Undoes `pack_right`, averaging over formats."""
    shape, _, packed = text.partition(":")
    edits, _, formats = shape.partition("x")
    bits = np.frombuffer(zlib.decompress(base64.b85decode(packed)), dtype=np.uint8)
    counted = int(formats or 1)
    return np.unpackbits(bits, count=int(edits) * counted).reshape(int(edits), counted).mean(axis=1)


def done(results: pd.DataFrame) -> pd.DataFrame:
    """The trials that finished, diverged ones included (a diverged trial is a result)."""
    return results[results["status"] == "done"].reset_index(drop=True)


def failed(results: pd.DataFrame) -> pd.DataFrame:
    """The trials that did not finish."""
    return results[results["status"] == "failed"].reset_index(drop=True)


def causes(results: pd.DataFrame, column: str) -> dict[str, int]:
    """Each cause in `error` or `retried` and how often it occurred, the most frequent first."""
    texts = results[column].dropna()
    return dict(Counter(cause for text in texts for cause in text.splitlines()).most_common())


def task_columns(results: pd.DataFrame) -> tuple[str, ...]:
    """The `capability.TASK` columns."""
    return tuple(name for name in results.columns if name.startswith("capability."))


def is_part(name: str) -> bool:
    """Whether a column is a part of a metric: `capability.TASK`, or `reliability.FORMAT`, `generalization.FORMAT` and
    `portability.FORMAT`, the number of edits that a metric is over, `n_edits.METRIC`, or one of `OF_LONG`."""
    metric, dot, _ = name.partition(".")
    return (bool(dot) and metric in _PARTED) or name in OF_LONG


def is_fraction(name: str) -> bool:
    """True if a metric is a mean over edits, in [0, 1]."""
    return _kind(name) in (*FRACTIONS, "portability") and name != "locality_kl"


def _kind(name: str) -> str:
    """What a metric or a part of one measures: "reliability" for reliability_tf and reliability.chat."""
    return re.split("[._]", name)[0]


def part_columns(results: pd.DataFrame) -> tuple[str, ...]:
    """The columns that are parts of a metric, by task or by format."""
    return tuple(filter(is_part, results.columns))


def has_values(results: pd.DataFrame, column: str) -> bool:
    """True if any trial has a finite value of this metric."""
    return bool(np.isfinite(results[column]).any())


def proportion_se(fraction: float, n: float) -> float:
    """Standard error of a fraction of `n` items: the standard deviation of its posterior under a uniform prior,
    Beta(1 + n p, 1 + n (1 - p)). It is sqrt(p (1 - p) / n) for large n, and stays above zero at p = 0 and p = 1, where
    the plain formula claims a certainty that no finite sample gives (100 of 100 right: 0.0097). NaN when n is absent.
    """
    if not (math.isfinite(fraction) and math.isfinite(n) and n > 0):
        return math.nan
    shrunk = (n * fraction + 1) / (n + 2)
    return math.sqrt(shrunk * (1 - shrunk) / (n + 3))


def wilson_interval(fraction: float, n: float) -> tuple[float, float]:
    """Wilson's 95% score interval of a fraction of `n` items. (NaN, NaN) when n is absent."""
    if not (math.isfinite(fraction) and math.isfinite(n) and n > 0):
        return math.nan, math.nan
    centre = fraction + Z95**2 / (2 * n)
    half = Z95 * math.sqrt(fraction * (1 - fraction) / n + Z95**2 / (4 * n * n))
    scale = 1 + Z95**2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def by_setting(results: pd.DataFrame) -> pd.DataFrame:
    """One row per setting: the finished trials that differ only in their seed are averaged. The columns are the same, where

    - a metric is the mean over the seeds that have it (the ends of an interval too, which errs on the wide side: the
      seeds share their items); an infinite value counts as absent;
    - `trial_id`, `run_id`, `seed`, `epoch_losses` and `stages` are those of the lowest seed, which represents the group;
    - `diverged` is 1 when any seed diverged;
    - new columns: `trial_ids` and `seeds` (tuples, by seed), `n_seeds`, `n_failed` (seeds of the setting that failed),
      `right_by_edit` ((E,) array, the share of seeds and formats that got each edit right; None where not known),
      `reliability_sd`, `generalization_sd`, `locality_sd` (between seeds, NaN for one), `drift_kl_low` and `drift_kl_high`
      (lowest and highest of the seeds, NaN for one).
    """
    rows = results.sort_values(["seed", "trial_id"], kind="stable").reset_index(drop=True)
    names = [*METRICS, *part_columns(rows)]
    rows[names] = rows[names].where(np.isfinite(rows[names]))
    setting = rows.groupby(list(SETTING_AXES), dropna=False, sort=False).ngroup()  # one key takes less time than many
    lost = setting[rows["status"] == "failed"].value_counts()
    finished = rows[rows["status"] == "done"]
    groups = finished.groupby(setting, sort=False)
    table = groups.head(1)  # in the order of the groups
    settings = setting[table.index]
    table = table.reset_index(drop=True)
    table[names] = groups[names].mean().reset_index(drop=True)
    table["diverged"] = groups["diverged"].max().fillna(0.0).to_numpy()
    members = [groups.indices[number] for number in settings]  # places in `finished`
    trials, seeds, right = (finished[name].to_numpy() for name in ("trial_id", "seed", "right"))
    table["trial_ids"] = [tuple(trials[places]) for places in members]
    table["seeds"] = [tuple(map(int, seeds[places])) for places in members]
    table["right_by_edit"] = [mean_right(right[places]) for places in members]
    table["n_seeds"] = groups.size().to_numpy()
    table["n_failed"] = lost.reindex(settings, fill_value=0).to_numpy()
    for name in FRACTIONS:
        table[f"{name}_sd"] = groups[name].std(ddof=1).to_numpy()
    several = (groups["drift_kl"].count() > 1).to_numpy()
    table["drift_kl_low"] = np.where(several, groups["drift_kl"].min(), np.nan)
    table["drift_kl_high"] = np.where(several, groups["drift_kl"].max(), np.nan)
    return table


def mean_right(packed: Sequence[str | None]) -> np.ndarray | None:
    """(E,): `unpack_right` averaged over the seeds of a setting; None unless all seeds have it, for the same number of edits."""
    known = [unpack_right(text) for text in packed if text is not None]
    complete = len(known) == len(packed) and len({len(one) for one in known}) == 1
    return np.mean(known, axis=0) if complete else None


def value_text(name: str, value: Any) -> str:
    """A value on an axis as text: "0.004", "breadth-first"."""
    return value.replace("_", "-") if AXIS[name].choices and isinstance(value, str) else number(value)


def axis_text(name: str, value: Any) -> str:
    """The same, prefixed with what it is if the value alone does not show that: "rate 0.004"."""
    axis = AXIS[name]
    return (axis.short or ("" if axis.type is str else f"{axis.title} ")) + value_text(name, value)


def position_of(row: Mapping[str, Any]) -> str:
    """ "22.mlp_down"."""
    return f"{row['layer']}.{row['module']}"


def setting_text(row: Mapping[str, Any], names: Iterable[str] | None = None) -> str:
    """A setting without its position and seed: "breadth-first, batch 32, rate 0.004, loss by edit". By default its
    `named_axes`; an axis that is absent, or has no effect there, is left out."""
    if names is None:
        names = named_axes([row])
    known = (name for name in names if name not in ("layer", "module", "seed") and not _absent(row.get(name)))
    return ", ".join(axis_text(name, row[name]) for name in known if AXIS[name].counts(row))


def setting_names(settings: pd.DataFrame) -> dict[str, str]:
    """trial_id -> the name of the setting: its position, "22.mlp_down", and, if several were tried there, what tells them
    apart: "22.mlp_down at rate 0.002". settings: `by_setting(results)`."""
    names = {}
    for _, group in settings.groupby(["layer", "module"], sort=False):
        varied = [axis.name for axis in SWEPT if group[axis.name].nunique(dropna=False) > 1]
        for row in group.to_dict("records"):
            names[row["trial_id"]] = " at ".join(filter(None, (position_of(row), setting_text(row, varied))))
    return names


def seed_error(row: Mapping[str, Any], name: str) -> float:
    """Standard error of a fraction's mean over the seeds; 0 for a single seed."""
    spread = row.get(f"{name}_sd", math.nan)
    return float(spread) / math.sqrt(row["n_seeds"]) if math.isfinite(spread) else 0.0


def _n_edits(row: Mapping[str, Any], name: str) -> float:
    """Number of edits that a fraction is the mean over; NaN if it is not known."""
    fewer = row.get(f"n_edits.{_kind(name)}{'_long' if name in OF_LONG else ''}", math.nan)
    return fewer if math.isfinite(fewer) else row.get("n_edits", math.nan)


def standard_error(row: Mapping[str, Any], name: str) -> float:
    """Standard error of a metric; NaN if it is not known.

    That of a fraction is sqrt(items^2 + sd^2 / seeds): the seeds are measured on the same edits, so more of them do not
    shrink the error that comes from the choice of edits (`proportion_se` of the mean), only that of the training order.
    """
    if is_fraction(name):
        return math.hypot(proportion_se(row.get(name, math.nan), _n_edits(row, name)), seed_error(row, name))
    if name in ("capability", "capability_change"):
        low, high = (row.get(f"capability_change_{end}", math.nan) for end in ("low", "high"))
        return float(high - low) / (2 * Z95)
    if name == "drift_kl":
        return DRIFT_ERROR * row.get(name, math.nan) / math.sqrt(row.get("n_seeds", 1))
    return math.nan


def interval(row: Mapping[str, Any], name: str) -> tuple[float, float]:
    """95% interval of a metric; (NaN, NaN) where it is not known. For capability it is that of the change, shifted."""
    value = row.get(name, math.nan)
    if is_fraction(name):
        low, high = wilson_interval(value, _n_edits(row, name))
        if not math.isfinite(low):
            return math.nan, math.nan
        more = Z95 * seed_error(row, name)
        return max(0.0, value - math.hypot(value - low, more)), min(1.0, value + math.hypot(high - value, more))
    if name in ("capability", "capability_change"):
        change, low, high = (row.get(f"capability_change{end}", math.nan) for end in ("", "_low", "_high"))
        return low + (value - change), high + (value - change)
    return math.nan, math.nan


def expected(row: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Metric -> (value, low, high): what to expect of an edit at this setting, with 95% intervals, for the metrics measured."""
    found = {name: (row[name], *interval(row, name)) for name in ("reliability", "generalization", "capability_change")}
    drift, more = row["drift_kl"], Z95 * standard_error(row, "drift_kl")
    found["drift_kl"] = (drift, max(0.0, drift - more), drift + more)
    known = {name: values for name, values in found.items() if all(map(math.isfinite, values))}
    return {name: (float(value), float(low), float(high)) for name, (value, low, high) in known.items()}


def interval_text(row: Mapping[str, Any], name: str) -> str:
    """The interval of a fraction or of the change of capability, to follow its value: "[93.0, 99.4]"; empty if not known."""
    ends = interval(row, name)
    return share_interval(*ends) if is_fraction(name) else points_interval(*ends) if name == "capability_change" else ""


def with_interval(row: Mapping[str, Any], name: str) -> str:
    """The same with its value: "98.0% [93.0, 99.4]", "−0.4 points [−1.2, +0.3]"."""
    value = percent(row[name]) if is_fraction(name) else f"{points(row[name])} points"
    return f"{value} {interval_text(row, name)}".rstrip()


def drift_text(row: Mapping[str, Any]) -> str:
    """Drift as text: "0.0125 nats per token", with its range over the seeds where there are several."""
    low, high = (row.get(f"drift_kl_{end}", math.nan) for end in ("low", "high"))
    span = f" ({number(low)} to {number(high)} over the seeds)" if math.isfinite(low) else ""
    return f"{number(row['drift_kl'])} nats per token{span}"
