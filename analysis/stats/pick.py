"""The pick: which of several measured settings to use. Sweep, report, status, registry and select all follow this rule.

1. Reliable: not shown to be less reliable than the best. Both answered the same edits, so an exact sign test compares them
   on the edits that only one of them got right (one-sided, 5%); a difference of one edit says nothing. A small study can show
   little, so a setting more than 5 points below the best fails as well, unless that is a single edit.
2. Harmless: the items show no loss of capability (zero is not above the 95% interval of the paired change), and drift is
   within 0.01 nats per token of the least. A gain in capability is not a goal: an edit that shakes a model enough raises some
   accuracies by chance.
3. The highest generalization. Ties go to the lower cost (seconds per edit), then to the lower drift.

If no setting passes a step, those that come closest go on. Capability that was not measured counts as no loss;
generalization, drift or cost that was not measured loses against one that was.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import bdtr

from analysis.stats.axes import SETTING
from analysis.stats.formats import by_format, format_title
from analysis.stats.pareto import SAME, comparable
from analysis.stats.table import METRICS, SPREADS, by_setting, is_part, position_of, standard_error, with_interval
from analysis.stats.wording import number, percent, plural, points

_RULE = (
    "Keep the settings that are {} and show no loss of capability, then those whose drift is within 0.01 nats per token of"
    " the least. Of these, pick the one that generalizes most; ties go to the cheaper one."
)
RULE = _RULE.format(
    "about as reliable as the best (at most 5 points below it, and not significantly worse on the same edits)"
)
"""The rule in two sentences, worded the same everywhere."""
DRIFT_MARGIN = 0.01
"""Nats per token that are not worth losing generalization for: about one per cent of perplexity."""
RELIABILITY_MARGIN = 0.05
"""How far below the best a reliable setting may be, where that is more than one edit."""
LEVEL = 0.05
"""One-sided significance level of the sign test."""


@dataclass(frozen=True)
class Evidence:
    """What the rule looks at: arrays of shape (..., S), one value per setting, for one table or for many at once; NaN for what
    was not measured."""

    reliability: np.ndarray
    """Never NaN."""
    generalization: np.ndarray
    change: np.ndarray
    """Capability minus that of the unedited model, paired by item."""
    change_high: np.ndarray
    """Upper end of its 95% interval; the change itself where that is not known."""
    drift: np.ndarray
    """Nats per token."""
    cost: np.ndarray
    """Seconds of training per edit."""
    edits: np.ndarray
    """Number of edits over which reliability is measured."""
    right: np.ndarray
    """(S, E): the share of seeds and formats that got each edit right; rows of NaN where the answers are not known. For
    many tables at once (S, 0)."""
    counts: np.ndarray
    """(E,): how often each edit counts: once, or as often as a bootstrap drew it."""


@dataclass(frozen=True)
class Verdict:
    """What the rule says about every setting: masks of shape (..., S), each a subset of the one before, and the order of use."""

    reliable: np.ndarray
    able: np.ndarray
    """Reliable, and no loss of capability is shown."""
    gentle: np.ndarray
    """Able, and drift within the margin of the least."""
    order: np.ndarray
    """Indices of all settings, the one to use first."""


@dataclass(frozen=True)
class Recommendation:
    """The setting to use. With several seeds it names the group: `trial_ids` are all, `trial_id` the lowest seed's."""

    trial_id: str
    position: str
    """Such as "22.mlp_down"."""
    settings: dict[str, Any]
    """The value on every axis, and `seeds`."""
    metrics: dict[str, float]
    """Means over the seeds, finite ones only; also `reliability_se`, `SPREADS` (for several seeds) and `n_seeds`."""
    rule: str
    """The rule by which it was chosen, as text to show next to it."""
    runner_up: str | None
    """trial_id of the setting that the rule puts second, None when there is only one."""
    reasons: tuple[str, ...]
    """What speaks for it and what to know about it, one sentence each."""
    trial_ids: tuple[str, ...]


def evidence_of(settings: pd.DataFrame) -> Evidence:
    """The evidence in rows of `by_setting(results)`."""

    def column(name: str) -> np.ndarray:
        found = settings[name].to_numpy("float64")
        return np.where(np.isfinite(found), found, math.nan)

    change, high = column("capability_change"), column("capability_change_high")
    right = _aligned(settings["right_by_edit"])
    return Evidence(
        reliability=column("reliability"),
        generalization=column("generalization"),
        change=change,
        change_high=np.where(np.isnan(high), change, high),
        drift=column("drift_kl"),
        cost=column("seconds_per_edit"),
        edits=column("n_edits"),
        right=right,
        counts=np.ones(right.shape[1]),
    )


def judge(evidence: Evidence, floor: float | None = None) -> Verdict:
    """Apply the rule. floor: the reliability asked for, in place of the comparison with the best.

    Ties that the rule leaves open are broken by the order of the settings.
    """
    drift = np.nan_to_num(evidence.drift, nan=math.inf)
    reliable = _reliable(evidence, drift) if floor is None else evidence.reliability >= floor - SAME
    able = _able(evidence, reliable)
    least = np.where(able, drift, math.inf).min(axis=-1, keepdims=True)
    gentle = able & (drift <= least + DRIFT_MARGIN + SAME)
    rank = preference(evidence).argsort(axis=-1)
    last = np.select([gentle, reliable], [rank, drift], -evidence.reliability).round(9)
    steps = reliable.astype(int) + able + gentle
    return Verdict(reliable, able, gentle, np.lexsort((rank, last, -steps)))


def preference(evidence: Evidence) -> np.ndarray:
    """(..., S) indices in the order of the last step: the highest generalization, then the lower cost, then the lower drift."""
    generalization = np.nan_to_num(evidence.generalization, nan=-1.0)
    cost, drift = (np.nan_to_num(found, nan=math.inf) for found in (evidence.cost, evidence.drift))
    keys = (-evidence.reliability, drift, cost, -generalization)
    return np.lexsort([key.round(9) for key in keys])


def ranked(settings: pd.DataFrame, floor: float | None = None) -> pd.DataFrame:
    """The settings that can be picked (done, not diverged, with a reliability), the one to use first, with the columns
    `reliable`, `able` and `gentle` of the rule. settings: `by_setting(results)`."""
    rows = comparable(settings, ("reliability",)).sort_values("trial_id").reset_index(drop=True)
    if rows.empty:
        return rows.assign(reliable=False, able=False, gentle=False)
    verdict = judge(evidence_of(rows), floor)
    rows = rows.assign(reliable=verdict.reliable, able=verdict.able, gentle=verdict.gentle)
    return rows.iloc[verdict.order].reset_index(drop=True)


def best_by_position(settings: pd.DataFrame) -> dict[tuple[int, str], dict[str, Any]]:
    """(layer, module) -> the setting that the rule would use first of those tried there. settings: `by_setting(results)`."""
    rows = ranked(settings).drop_duplicates(["layer", "module"])
    return {(int(row["layer"]), row["module"]): row for row in rows.to_dict("records")}


def recommend(results: pd.DataFrame, floor: float | None = None) -> Recommendation | None:
    """The pick of a results table, over settings (`by_setting`: seeds are averaged).

    floor: the reliability asked for, in place of the comparison with the best. None when no trial is done with a finite
    reliability, or none reaches the floor.
    """
    rows = ranked(by_setting(results), floor)
    if rows.empty or not rows["reliable"].any():
        return None
    pick = rows.to_dict("records")[0]
    settings = {name: pick[name] for name in SETTING if not pd.isna(pick[name])}
    pick["reliability_se"] = standard_error(pick, "reliability")
    measured = [*METRICS, *filter(is_part, pick), "reliability_se", *SPREADS, "n_seeds"]
    return Recommendation(
        trial_id=pick["trial_id"],
        position=position_of(pick),
        settings=settings | {"seeds": pick["seeds"]},
        metrics={name: float(pick[name]) for name in measured if math.isfinite(pick[name])},
        rule=RULE if floor is None else _RULE.format(f"at least {percent(floor)} reliable"),
        runner_up=rows["trial_id"].get(1),
        reasons=_reasons(rows, floor),
        trial_ids=pick["trial_ids"],
    )


def capability_text(row: Mapping[str, Any]) -> str:
    """The change of capability with its interval, and whether chance could explain it."""
    low, high = (row.get(f"capability_change_{end}", math.nan) for end in ("low", "high"))
    verdict = ", which chance could explain" if low <= 0 <= high else ", more than chance would explain"
    return with_interval(row, "capability_change") + (verdict if math.isfinite(high - low) else "")


def _reliable(evidence: Evidence, drift: np.ndarray) -> np.ndarray:
    """(..., S): whether the setting is not shown to be less reliable than the best. Among equally reliable ones, the best
    is the one that drifts least.

    Where the answers to single edits are not known, the two are taken to differ on as few edits as their reliability
    allows. That is exact where the best got all of them right, and strict elsewhere.
    """
    reliability, edits = evidence.reliability, np.nan_to_num(evidence.edits)
    best = np.lexsort((drift, -reliability.round(9)))[..., :1]
    gap = np.take_along_axis(reliability, best, axis=-1) - reliability
    margin = np.where(edits > 0, np.maximum(RELIABILITY_MARGIN, 1 / np.maximum(edits, 1)), 0.0)
    near = gap <= margin + SAME
    worse, better = np.round(gap * edits), np.zeros(gap.shape)
    if evidence.right.shape[1]:
        difference = evidence.right - evidence.right[best]  # (S, E)
        paired = ~np.isnan(difference).any(axis=1)
        worse[paired] = ((difference < -SAME) @ evidence.counts)[paired]
        better[paired] = ((difference > SAME) @ evidence.counts)[paired]
    differ = worse + better
    # if fewer edits differ, the test shows nothing, even if the best got all of them right
    telling = near & (differ > -math.log2(LEVEL))
    reliable = near.copy()
    # the probability of this few or fewer better ones among those that differ
    reliable[telling] = bdtr(better[telling], differ[telling], 0.5) >= LEVEL
    return reliable


def _able(evidence: Evidence, reliable: np.ndarray) -> np.ndarray:
    """Reliable, and no loss of capability is shown; if all show one, those whose loss is not shown to exceed the least."""
    high = np.nan_to_num(evidence.change_high, nan=math.inf)
    able = reliable & (high >= -SAME)
    some = able.any(axis=-1, keepdims=True) | ~reliable.any(axis=-1, keepdims=True)
    least_loss = np.where(reliable, evidence.change, -math.inf).max(axis=-1, keepdims=True)
    return np.where(some, able, reliable & (high >= least_loss - SAME))


def _aligned(right: Iterable[np.ndarray | None]) -> np.ndarray:
    """(S, E): the answers by edit; NaN for settings without answers, or with answers to fewer edits than others."""
    known = [row if isinstance(row, np.ndarray) else np.empty(0) for row in right]
    edits = max((len(row) for row in known), default=0)
    rows = [row if len(row) == edits else np.full(edits, math.nan) for row in known]
    return np.array(rows).reshape(len(rows), edits)


def _reasons(rows: pd.DataFrame, floor: float | None) -> tuple[str, ...]:
    """rows: as `ranked` returns them, the pick first."""
    pick, reasons = rows.iloc[0], ["It is the only setting with a result."]
    if len(rows) > 1:
        reliable, able, gentle = (int(rows[name].sum()) for name in ("reliable", "able", "gentle"))
        if floor is None:
            meet = f"{'is' if reliable == 1 else 'are'} about as reliable as the best"
        else:
            meet = f"{'reaches' if reliable == 1 else 'reach'} the reliability asked for"
        left = f", and {gentle} of those {'is' if gentle == 1 else 'are'} within the margin of drift"
        harmless = f"{able} of them {'shows' if able == 1 else 'show'} no loss of capability{left}"
        if (evidence_of(rows).change_high[rows["reliable"]] < -SAME).all():
            least = f"{able} of them {'loses' if able == 1 else 'lose'} least, as far as the items show{left}"
            harmless = f"all show a loss of capability; {least}" if reliable > 1 else "it shows a loss of capability"
        reasons = [f"Of {len(rows)} settings, {reliable} {meet}; {harmless}."]
        best = rows.loc[rows["reliability"].idxmax()]
        if pick["reliability"] >= best["reliability"] - SAME:
            reasons.append("The pick has the best reliability as well.")
        else:
            drifts = [number(row["drift_kl"]) for row in (best, pick) if math.isfinite(row["drift_kl"])]
            reasons.append(
                f"The best reliability, {percent(best['reliability'])}, is at {position_of(best)}"
                + (f", where drift is {drifts[0]} nats against {drifts[1]} here." if len(drifts) == 2 else ".")
            )
    if formats := by_format(pick.to_dict(), "reliability"):
        reasons.append(f"Reliability by prompt format: {by_format_text(formats)}.")
    if math.isfinite(pick["capability_change"]):
        reasons.append(f"Capability changed by {capability_text(pick)}.")
    if pick["n_seeds"] > 1:
        spread = points(pick["reliability_sd"]).lstrip("+")
        reasons.append(
            f"Mean of {plural(int(pick['n_seeds']), 'seed')}; reliability varies by {spread} points"
            " (standard deviation) between them."
        )
    else:
        reasons.append("One seed only: the effect of another order of the edits is not known.")
    if pick["n_failed"]:
        reasons.append(f"{plural(int(pick['n_failed']), 'further seed')} of this setting failed.")
    return tuple(reasons)


def by_format_text(shares: Mapping[str, float]) -> str:
    """The shares of `by_format` as text: "98.0% raw, 95.0% Q/A"."""
    return ", ".join(f"{percent(share)} {format_title(name)}" for name, share in shares.items())
