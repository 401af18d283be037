"""What a selection is asked for (a model, edits and a budget, checked and resolved), and what it finds."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from analysis.stats.axes import AXIS, SWEPT
from analysis.stats.pick import ranked
from analysis.stats.table import by_setting, done
from locft.errors import InputError
from locft.model.models import load_structure
from locft.model.positions import TuningPosition, modules_of
from sweeps.run.dispatch import Ending
from sweeps.select.policy import USUAL_STEPS, Candidate, Run, Rung, start_rate
from sweeps.select.position_file import read_position
from sweeps.study.plan import Plan, PreparedStudy, trial_config
from sweeps.study.reader import as_override, load_study
from sweeps.study.resolve import prepare
from sweeps.study.schema import Study
from sweeps.study.trial_types import METHOD_VERSION, TrialConfig

MODULES = ("mlp_down", "mlp_up", "mlp", "attn", "layer")
"""Tried where the model has them; a model with none of them tries all it has."""
DEFAULT_SHARE, DEFAULT_RUNS = 0.1, 8
"""The default budget: a share of the full grid's cost, and at most the cost of this many average runs: in replays more find little
that is better."""
COMPARED_ON = 40
"""Edits on which positions are compared where there are at least twice as many: a random sample. The tables on which the
survey was judged have 40 edits."""
ASKED = 200
"""Edits that the run with all of them is measured on, at most: a random sample as well."""
METHOD = "survey"
"""Part of the id of every selection's study since the first ones."""
FIXED = tuple(axis.name for axis in SWEPT if axis.name not in Run.__dataclass_fields__)
"""The swept axes that a selection takes a single value of; it chooses the others itself."""
BASE = "select"
"""The ready study that a selection starts from."""


@dataclass(frozen=True, kw_only=True)
class SelectionRequest(PreparedStudy):
    """The study of the full grid, which the selection spares, and what may be spent instead."""

    share: float | None
    """What the selection may cost, of the estimated cost of the full grid; None where it has minutes."""
    minutes: float | None
    """The same as wall-clock time, everything included."""
    seed: int = 0
    """Of the probe's samples and of the bootstrap."""
    priors: tuple[tuple[float, str], ...] = ()
    """Relative depth and module of positions that served in other models."""
    compared_on: int = 0
    """Edits on which positions are compared; 0 for all."""
    chosen_axes = tuple(Run.__dataclass_fields__)

    @property
    def id(self) -> str:
        """Of the study that holds all trials. Budget and seed are left out, because trials of several overlap."""
        parts = ["selection", self.study.name, METHOD, self.facts.model_fingerprint, self.facts.data_fingerprint]
        return hashlib.sha256(json.dumps([*parts, self.study.dtype, METHOD_VERSION]).encode()).hexdigest()[:12]

    @cached_property
    def positions(self) -> tuple[tuple[int, str], ...]:
        """Layer and module of each planned trial, in the plan's order."""
        return tuple((trial.layer, trial.module) for trial in self.plan.trials)

    @property
    def fixed(self) -> dict[str, Any]:
        """The values of the axes in `FIXED`."""
        return {axis: getattr(self.study.space, axis)[0] for axis in FIXED}

    @property
    def has_rate(self) -> bool:
        """Whether the study's method takes a learning rate, which each position then gets from the probe."""
        return AXIS["learning_rate"].counts(self.fixed)

    def start_rate(self, candidate: Candidate) -> float:
        """The learning rate of a position's first run."""
        if not self.has_rate:
            return AXIS["learning_rate"].default
        return start_rate(candidate, steps_of(self.study, self.compared_on or self.facts.n_edits))

    def config(self, run: Run) -> TrialConfig:
        """The trial of a run."""
        return trial_config(self.study, self.facts, {**self.fixed, **asdict(run)})

    def run(self, config: TrialConfig) -> Run | None:
        """The run of a trial; None if the trial has other data or settings, or a position that is not planned."""
        run = Run(config.layer, config.module, config.learning_rate, config.seed, config.edit_count)
        return run if (run.layer, run.module) in self.positions and self.config(run) == config else None


@dataclass(frozen=True)
class Selection:
    """What a selection found."""

    request: SelectionRequest
    results: pd.DataFrame
    """The results table of all trials of the request, failed ones and those of earlier calls with another budget included."""
    baseline: dict[str, float]
    """Metrics of the unedited model."""
    candidates: tuple[Candidate, ...]
    best_guess: Candidate
    """The most likely pick before anything was run."""
    rungs: tuple[Rung, ...]
    """Of this call, in order."""
    ending: Ending
    chance_elsewhere: float
    """That the rule would pick a position which was not run, by what the runs let one expect of it."""
    grid_seconds: float
    """What the full grid would take one worker: the estimate, corrected by what the trials took."""
    wall_seconds: float
    concurrent: int
    """Trials at a time."""

    @property
    def compared(self) -> pd.DataFrame:
        """The trials on which positions are compared."""
        return self.results[self.results["edit_count"] == self.request.compared_on].reset_index(drop=True)

    @cached_property
    def ranking(self) -> pd.DataFrame:
        """Their settings, the one to use first (`analysis.stats.pick.ranked`)."""
        return ranked(by_setting(self.compared))

    @cached_property
    def pick(self) -> Mapping[str, Any] | None:
        """What to expect of the first of the ranking: its setting with all edits, if it was run so; None if nothing was run."""
        if self.ranking.empty:
            return None
        whole = ranked(by_setting(self._with_all_edits))
        return (self.ranking if whole.empty else whole).iloc[0].to_dict()

    @property
    def all_edits_ended(self) -> Literal["diverged", "failed"] | None:
        """How the first of the ranking ended with all edits, where positions are compared on fewer; None if that told what
        to expect, or was not run."""
        if self.pick is None or not self.pick["edit_count"] or self._with_all_edits.empty:
            return None
        return "diverged" if (self._with_all_edits["diverged"] == 1).any() else "failed"

    @cached_property
    def _with_all_edits(self) -> pd.DataFrame:
        """The trials of the first of the ranking with all edits."""
        keys = ["layer", "module", "learning_rate"]
        same = (self.results[keys] == self.ranking.iloc[0][keys]).all(axis=1) & (self.results["edit_count"] == 0)
        return self.results[same]

    @property
    def done(self) -> int:
        """Trials that are done."""
        return len(done(self.results))

    @property
    def spent_seconds(self) -> float:
        """Seconds of one worker that comparing positions took."""
        return float(done(self.compared)["seconds"].sum())


def selection_request(
    model: str,
    edits: str,
    overrides: Sequence[str] = (),
    *,
    limit: int | None = None,
    share: float | None = None,
    minutes: float | None = None,
    seed: int = 0,
    prior: Path | None = None,
) -> SelectionRequest:
    """Check and resolve everything a selection needs; nothing is run or written.

    overrides: of the ready study `select`, as `load_study` takes them. share, minutes: at most one of them; without, see
    `DEFAULT_SHARE`. prior: position file of another model; its position at the same relative depth is tried early. Raises
    InputError with every problem.
    """
    problems = []
    if share is not None and not 0 < share <= 1:
        problems.append(
            f"--budget-share: got {share:g}, expected a share of the full grid's cost, above 0 and at most 1"
        )
    if minutes is not None and not 0 < minutes < math.inf:
        problems.append(f"--budget-minutes: got {minutes:g}, expected a positive number")
    if share is not None and minutes is not None:
        problems.append("--budget-share, --budget-minutes: got both, expected one of them")
    if problems:
        raise InputError(problems)
    priors = ()
    if prior is not None:
        elsewhere = read_position(prior)
        priors = ((elsewhere.depth, TuningPosition.parse(elsewhere.position).module),)
    there = modules_of(load_structure(model))
    modules = [module for module in MODULES if module in there] or list(there)
    settings = {"model": model, "edits.source": edits, "edits.limit": limit, "space.module": modules}
    study = load_study(BASE, [*map(as_override, settings, settings.values()), *overrides])
    if problems := list(_study_problems(study)):
        raise InputError(problems)
    if study.name == BASE:
        study = study.model_copy(update={"name": f"select-{_short(study.model)}-{_short(study.edits.source)}"})
    study, compared_on = _compared_on_few(study)
    prepared = prepare(study)
    trials = tuple(trial for trial in prepared.plan.trials if trial.edit_count == compared_on)
    if minutes is None and share is None:
        share = min(DEFAULT_SHARE, DEFAULT_RUNS / len(trials))
    said = prepared.notices
    if compared_on:
        sample = f"a random sample of {compared_on} of the {prepared.facts.n_edits:,} edits"
        said += (f"positions are compared on {sample}; the leader is run with all",)
    found = vars(replace(prepared, plan=Plan(trials, len(trials), trials), notices=said))
    return SelectionRequest(**found, share=share, minutes=minutes, seed=seed, priors=priors, compared_on=compared_on)


def _compared_on_few(study: Study) -> tuple[Study, int]:
    """The study whose first edits positions are compared on, and how many; 0 where that is all. A sample is enough where it
    is at most half of the edits and takes as many steps as a learning rate is told from."""
    try:
        count = len(study.edits.load().requests)
    except InputError:  # `prepare` tells it with all other problems
        return study, 0
    if count < 2 * COMPARED_ON or steps_of(study, COMPARED_ON) < USUAL_STEPS:
        return study, 0
    asked = min(study.edits.asked or count, ASKED)
    edits = study.edits.model_copy(update={"order_seed": study.edits.order_seed or 0, "asked": asked})
    space = study.space.model_copy(update={"edit_count": (COMPARED_ON, 0)})
    return study.model_copy(update={"edits": edits, "space": space}), COMPARED_ON


def steps_of(study: Study, edits: int) -> int:
    """Optimiser steps of a training that takes all its epochs, by its number of edits."""
    return study.epochs * math.ceil(edits / study.space.batch_size[0])


def _study_problems(study: Study) -> Iterator[str]:
    """What a selection chooses itself, or takes a single value of."""
    for axis in FIXED:
        if len(values := getattr(study.space, axis)) > 1:
            yield f"space.{axis}: got {len(values)} values; a selection takes one"
    if study.space.edit_count != (0,):
        yield f"space.edit_count: got {', '.join(map(str, study.space.edit_count))}; a selection takes edits.limit (--limit)"
    if study.space.learning_rate != (AXIS["learning_rate"].default,):
        yield "space.learning_rate: a selection chooses it itself; leave it out"
    if study.space.seed != (AXIS["seed"].default,):
        yield "space.seed: a selection chooses seeds itself; leave it out"
    for limit in ("minutes", "trials"):
        if (value := getattr(study.budget, limit)) is not None:
            own = "budgets of its own, see --budget-share and --budget-minutes"
            yield f"budget.{limit}: got {value:g}; a selection has {own}"
    if study.search.method != "grid":
        yield f"search.method: got {study.search.method}; a selection searches in its own way"


def _short(source: str) -> str:
    """The end of a model's or data set's name, in characters that a study's name may have."""
    base = source.rstrip("/").rpartition("/")[2]
    for suffix in (".jsonl", ".json", ".gguf"):
        base = base.removesuffix(suffix)
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in base)[:30]
