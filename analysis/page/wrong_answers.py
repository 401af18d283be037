"""Which edits fail: for each setting, the prompts that it answers wrongly, and what the model says instead."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.stats.table import setting_names

TOP_WRONG = 12
"""Maximum number of prompts of one kind listed for a setting; their total is given."""
PICK_WRONG = 100
"""The same for the first setting, the pick."""


@dataclass(frozen=True)
class WrongOfKind:
    """The prompts of one kind that a setting does not answer as expected."""

    kind: str
    words: tuple[str, str, str]
    """From `KINDS`."""
    wrong: int
    """Number of prompts that at least one seed gets wrong."""
    total: int
    shown: tuple[dict[str, Any], ...]
    """At most `TOP_WRONG` (`PICK_WRONG`), those that most seeds get wrong first; for locality, changes in substance come first.
    Each has prompt, format, expected, got (the different wrong answers of its seeds) and seeds (how many get it wrong)."""


KINDS = {
    "reliability": ("edit prompts", "get the new answer", "do not get the new answer"),
    "generalization": ("rephrased prompts", "get the new answer", "do not get the new answer"),
    "portability": (
        "questions that follow from an edit",
        "get the answer that follows",
        "do not get the answer that follows",
    ),
    "unseen": ("prompts in a wording never trained", "get the new answer", "do not get the new answer"),
    "locality": (
        "unrelated prompts",
        "are answered as before",
        "are not answered word for word as before (answers that changed in substance come first)",
    ),
}
"""Which prompts these are, what all of them do when none is wrong, and what the wrong ones do. Edit prompts and rephrases in
the format `unseen` are a kind of their own."""


@dataclass(frozen=True)
class WrongAnswers:
    """What one setting gets wrong."""

    trial_id: str
    name: str
    """Its name in `analysis.stats.table.setting_names`."""
    seeds: tuple[str, ...]
    """The seeds whose answers are known."""
    n_seeds: int
    """Number of seeds that finished."""
    groups: tuple[WrongOfKind, ...]


def wrong_answers(
    outcomes: pd.DataFrame | None, settings: pd.DataFrame, trial_ids: Sequence[str], most: int
) -> list[WrongAnswers]:
    """What these settings (trial_ids of rows of `settings`) get wrong, over all seeds whose outcomes are given; at most
    `most` settings, skipping those with no outcomes. The first is listed at greater length."""
    if outcomes is None or outcomes.empty:
        return []
    places, names = settings.set_index("trial_id"), setting_names(settings)
    by_trial = dict(iter(outcomes.groupby("trial_id", sort=False)))
    found = []
    for place, trial in enumerate(dict.fromkeys(trial_ids)):
        row = places.loc[trial]
        known = [pair for pair in zip(row["trial_ids"], map(str, row["seeds"]), strict=True) if pair[0] in by_trial]
        if not known:
            continue
        answers = pd.concat([by_trial[one] for one, _ in known], ignore_index=True)
        groups = _by_kind(answers, PICK_WRONG if place == 0 else TOP_WRONG)
        if groups:
            seeds = tuple(seed for _, seed in known)
            found.append(WrongAnswers(trial, names[trial], seeds, int(row["n_seeds"]), groups))
        if len(found) == most:
            break
    return found


def _by_kind(rows: pd.DataFrame, most: int) -> tuple[WrongOfKind, ...]:
    rows = _told_apart(rows)
    prompt = ["edit_id", "prompt", "format", "nth"]
    found = []
    for kind, words in KINDS.items():
        of_kind = rows[rows["kind"] == kind]
        if of_kind.empty:
            continue
        wrong = of_kind[~of_kind["correct"].astype(bool)]
        pairs = zip(wrong["expected"], wrong["got"], strict=True)
        other = [kind == "locality" and not _one_holds_the_other(*pair) for pair in pairs]
        groups = wrong.assign(other=other).groupby(prompt, sort=False, dropna=False)
        first = groups.agg(other=("other", "max"), kept=("kept", "mean"), seeds=("other", "size"))
        first = first.sort_values(["other", "kept", "seeds"], ascending=[False, True, False], kind="stable")
        shown = tuple(
            {
                **{name: _text(part[name].iloc[0]) for name in ("prompt", "format", "expected")},
                "got": " / ".join(dict.fromkeys(map(_text, part["got"]))),
                "seeds": len(part),
            }
            for part in (groups.get_group(key) for key in first.index[:most])
        )
        total = len(of_kind[prompt].drop_duplicates())
        found.append(WrongOfKind(kind, words, len(first), total, shown))
    return tuple(found)


def _told_apart(rows: pd.DataFrame) -> pd.DataFrame:
    """Outcomes with their kind as in `KINDS`; with `format` and `kept`, which earlier versions did not record; and with
    `nth`, the place among equal prompts: together with edit, text and format it identifies the same prompt in another seed."""
    absent = pd.Series(index=rows.index, dtype=object)
    form = rows.get("format", absent).fillna("raw").astype(str)
    kept = rows.get("kept", absent).astype("float64")
    rows = rows.assign(format=form, kept=kept, kind=rows["kind"].mask(form == "unseen", "unseen"))
    return rows.assign(nth=rows.groupby(["trial_id", "kind", "edit_id", "prompt", "format"], dropna=False).cumcount())


def _one_holds_the_other(one: Any, other: Any) -> bool:
    """True if one answer contains the words of the other: "Leonardo" and "Leonardo da Vinci"."""
    short, long = sorted((re.findall(r"\w+", _text(text).casefold()) for text in (one, other)), key=len)
    return bool(short) and f" {' '.join(short)} " in f" {' '.join(long)} "


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value)
