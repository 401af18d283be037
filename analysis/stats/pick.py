"""The pick: which of several measured settings to use. The one rule that sweep, report, status, registry and select follow.

Step by step, where a step that no setting passes keeps those that come closest:

1. Reliable: not shown to be less reliable than the best. Both answered the same edits, so an exact sign test compares
   them on the edits that only one of them got right (one-sided, 5%), and a difference of a few edits says nothing. As a
   small study shows little, a reliability of more than 5 points and more than one edit below the best fails as well.
2. Harmless: no loss of capability that the items show (zero is not above the 95% interval of the paired change), and
   drift within 0.01 nats per token of the least. A gain in capability is no aim: an edit that shakes a model enough
   raises some accuracies by chance.
3. The highest generalization. Ties go to the lower cost (seconds per edit), then to the lower drift.

What was not measured counts as no loss; where nobody measured it, the step is left out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binom

from analysis.stats.pareto import comparable
from analysis.stats.table import METRICS, SPREADS, by_setting
from analysis.stats.wording import change_with_interval, percent, plural, points

RULE = (
    "Among the settings that are not shown to be less reliable than the best, compared over the same edits, and that lose"
    " no capability the items show, those whose drift is within 0.01 nats per token of the least are kept. The pick is the"
    " one of them that generalizes most; ties go to the cheaper one."
)
"""The rule in two sentences, the same ones everywhere."""
DRIFT_MARGIN = 0.01
"""Nats per token that are not worth losing generalization for: about one per cent of perplexity."""
RELIABILITY_MARGIN = 0.05
"""How far a reliable setting may lie below the best, where that is more than one edit."""
LEVEL = 0.05
"""One-sided error of the sign test."""
SAME = 1e-9
"""Values closer than this are ties: means over seeds differ in their last bits for no reason."""


@dataclass(frozen=True)
class Evidence:
    """What the rule looks at: arrays of shape (S,), one value a setting; NaN for what was not measured."""

    reliability: np.ndarray
    generalization: np.ndarray
    change: np.ndarray
    """Capability minus that of the unedited model, paired by item."""
    change_high: np.ndarray
    """Upper end of its 95% interval."""
    drift: np.ndarray
    """Nats per token."""
    cost: np.ndarray
    """Seconds of training per edit."""
    edits: np.ndarray
    """Number of edits that reliability is a fraction of."""
    right: np.ndarray
    """(S, E): the share of seeds that got each edit right; rows of NaN where the answers are not known."""


@dataclass(frozen=True)
class Verdict:
    """What the rule says of every setting: masks of shape (S,), each a part of the one before, and the order of use."""

    reliable: np.ndarray
    able: np.ndarray
    """Reliable, and no capability loss is shown."""
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
    """Every axis of the setting, and `seeds`."""
    metrics: dict[str, float]
    """Means over the seeds, finite ones only; with `reliability_se`, `SPREADS` (several seeds), `n_seeds`."""
    rule: str
    """How it was chosen, in the words to show next to it."""
    runner_up: str | None
    """trial_id of the setting the rule puts second, None when there is only one."""
    reasons: tuple[str, ...]
    """What speaks for it and what to know about it, one sentence each."""
    trial_ids: tuple[str, ...] = field(default=())


def evidence_of(settings: pd.DataFrame) -> Evidence:
    """From the rows of `by_setting(results)`."""

    def column(name: str) -> np.ndarray:
        found = settings[name].to_numpy("float64") if name in settings else np.full(len(settings), math.nan)
        return np.where(np.isfinite(found), found, math.nan)

    change, high = column("capability_change"), column("capability_change_high")
    return Evidence(
        reliability=column("reliability"),
        generalization=column("generalization"),
        change=change,
        change_high=np.where(np.isnan(high), change, high),
        drift=column("drift_kl"),
        cost=column("seconds_per_edit"),
        edits=column("n_edits"),
        right=_aligned(settings["right_by_edit"] if "right_by_edit" in settings else [None] * len(settings)),
    )


def judge(evidence: Evidence, floor: float | None = None) -> Verdict:
    """Apply the rule. floor: the reliability asked for, in place of the comparison with the best.

    Every setting has a reliability. Ties that the rule leaves open go by the order of the settings.
    """
    drift = np.nan_to_num(evidence.drift, nan=math.inf)
    if floor is None:
        reliable = ~_less_reliable(evidence, drift)
    else:
        reliable = evidence.reliability >= floor - SAME
    able = _able(evidence, reliable)
    least = drift[able].min(initial=math.inf)
    gentle = able & (drift <= least + DRIFT_MARGIN + SAME)
    generalization = np.nan_to_num(evidence.generalization, nan=-1.0)
    last = np.select([gentle, reliable], [-generalization, drift], -evidence.reliability)
    cost = np.nan_to_num(evidence.cost, nan=math.inf)
    passed = 3 - reliable.astype(int) - able - gentle
    keys = (-evidence.reliability, -generalization, drift, cost, last)
    order = np.lexsort((*(key.round(9) for key in keys), passed))
    return Verdict(reliable, able, gentle, order)


def ranked(settings: pd.DataFrame, floor: float | None = None) -> pd.DataFrame:
    """The settings that can be picked (done, not diverged, with a reliability), the one to use first, with the columns
    `reliable`, `able` and `gentle` of the rule. settings: `by_setting(results)`."""
    rows = comparable(settings, ("reliability",)).sort_values("trial_id").reset_index(drop=True)
    if rows.empty:
        return rows.assign(reliable=False, able=False, gentle=False)
    verdict = judge(evidence_of(rows), floor)
    rows = rows.assign(reliable=verdict.reliable, able=verdict.able, gentle=verdict.gentle)
    return rows.iloc[verdict.order].reset_index(drop=True)


def recommend(results: pd.DataFrame, floor: float | None = None) -> Recommendation | None:
    """The pick of a results table by the rule of this module, over settings (`by_setting`: seeds are averaged).

    floor: the reliability asked for, in place of the comparison with the best. None when no trial is done with a finite
    reliability, or none has as much as the floor asks for.
    """
    rows = ranked(by_setting(results), floor)
    if rows.empty or not rows["reliable"].any():
        return None
    pick = rows.iloc[0].to_dict()
    rule = RULE if floor is None else RULE.replace(_BEST, f"at least {percent(floor)} reliable")
    return Recommendation(
        trial_id=pick["trial_id"],
        position=f"{pick['layer']}.{pick['module']}",
        settings={name: _plain(pick[name]) for name in SETTINGS_SHOWN if not pd.isna(pick[name])}
        | {"seeds": pick["seeds"]},
        metrics=_metrics_of(pick),
        rule=rule,
        runner_up=None if len(rows) < 2 else rows["trial_id"][1],
        reasons=_reasons(rows, floor),
        trial_ids=pick["trial_ids"],
    )


_BEST = "not shown to be less reliable than the best, compared over the same edits,"

SETTINGS_SHOWN = (
    "layer", "module", "pipeline", "batch_size", "learning_rate", "loss_average", "epochs", "skip_below", "stop_below",
    "dtype",
)  # fmt: skip


def _less_reliable(evidence: Evidence, drift: np.ndarray) -> np.ndarray:
    """(S,): whether the setting is shown to be less reliable than the best; of equally reliable ones the best drifts least.

    Where the answers to single edits are not known, the two are taken to differ on as few edits as their reliability
    allows. That is exact where the best got all of them right, and strict elsewhere.
    """
    reliability = evidence.reliability
    best = np.lexsort((drift, -reliability.round(9)))[0]
    gap = reliability[best] - reliability
    difference = evidence.right - evidence.right[best]  # (S, E)
    paired = ~np.isnan(difference).any(axis=1) if difference.size else np.zeros(len(gap), dtype=bool)
    counted = np.where(np.isnan(evidence.edits), 0, np.round(gap * np.nan_to_num(evidence.edits)))
    worse = np.where(paired, (difference < -SAME).sum(axis=1), counted)
    better = np.where(paired, (difference > SAME).sum(axis=1), 0)
    shown = binom.cdf(better, worse + better, 0.5) < LEVEL
    one_edit = np.where(np.isnan(evidence.edits), 0.0, 1 / np.maximum(np.nan_to_num(evidence.edits), 1))
    margin = np.where(np.isnan(evidence.edits), 0.0, np.maximum(RELIABILITY_MARGIN, one_edit))
    return shown | (gap > margin + SAME)


def _able(evidence: Evidence, reliable: np.ndarray) -> np.ndarray:
    """Reliable, and no loss of capability is shown, or none that is shown to be larger than the least."""
    change = evidence.change[reliable]
    if np.isnan(change).all():
        return reliable
    least_loss = min(0.0, np.nanmax(change))
    return reliable & (np.nan_to_num(evidence.change_high, nan=math.inf) >= least_loss - SAME)


def _aligned(right: Any) -> np.ndarray:
    """(S, E) of the answers by edit; no columns where too few settings have them on the same number of edits."""
    known = [np.asarray(row, dtype="float64") if row is not None else None for row in right]
    edits = max((len(row) for row in known if row is not None), default=0)
    return np.array(
        [row if row is not None and len(row) == edits else np.full(edits, math.nan) for row in known]
    ).reshape(len(known), edits)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _metrics_of(row: Mapping[str, Any]) -> dict[str, float]:
    tasks = [name for name in row if name.startswith("capability.")]
    names = [*METRICS, *tasks, "reliability_se", *SPREADS, "n_seeds"]
    return {name: float(row[name]) for name in names if math.isfinite(row[name])}


def _reasons(rows: pd.DataFrame, floor: float | None) -> tuple[str, ...]:
    """rows: as `ranked` gives them, the pick first."""
    pick, n = rows.iloc[0], len(rows)
    reasons = []
    if n == 1:
        reasons.append("It is the only setting with a result.")
    else:
        reliable, able, gentle = (int(rows[name].sum()) for name in ("reliable", "able", "gentle"))
        asked = "not shown to be less reliable than the best" if floor is None else "as reliable as that"
        reasons.append(
            f"Of {n} settings, {reliable} {'is' if reliable == 1 else 'are'} {asked},"
            f" {able} of these {'loses' if able == 1 else 'lose'} no capability that the items show, and {gentle}"
            f" {'drifts' if gentle == 1 else 'drift'} about as little as the calmest."
        )
        best = rows.loc[rows["reliability"].idxmax()]
        if pick["reliability"] >= best["reliability"] - SAME:
            reasons.append("The pick has the best reliability as well.")
        else:
            reasons.append(
                f"The best reliability, {percent(best['reliability'])}, is at {best['layer']}.{best['module']}"
                + (f" with drift {best['drift_kl']:.3f} nats" if math.isfinite(best["drift_kl"]) else "")
                + (f" against {pick['drift_kl']:.3f} here." if math.isfinite(pick["drift_kl"]) else ".")
            )
    if math.isfinite(pick["capability_change"]):
        low, high = pick["capability_change_low"], pick["capability_change_high"]
        change = change_with_interval(pick["capability_change"], low, high)
        verdict = ""
        if math.isfinite(low) and math.isfinite(high):
            verdict = ", which chance explains" if low <= 0 <= high else ", more than chance explains"
        reasons.append(f"Capability changed by {change}{verdict}.")
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
