"""What a selection is asked: a model, edits and a budget, checked and resolved."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from analysis.stats.axes import SWEPT
from locft.errors import InputError
from locft.model.positions import TuningPosition
from sweeps.select.policy import Run
from sweeps.select.position_file import read_position
from sweeps.study.plan import trial_config
from sweeps.study.plan import PreparedStudy
from sweeps.study.resolve import prepare
from sweeps.study.trial_types import METHOD_VERSION, TrialConfig
from sweeps.study.schema import LogUniform, Study
from sweeps.study.reader import load_study

MODULES = ("mlp_down", "mlp_up", "mlp", "attn", "layer")
"""Tried where the model has them; of a model with none of them, all it has."""
DEFAULT_SHARE = 0.1
METHOD = "survey"
"""In the id of a selection's study, since the first ones."""
FIXED = tuple(axis.name for axis in SWEPT if axis.name not in Run.__dataclass_fields__)
"""The axes of which a selection takes one value; it chooses the others itself."""
BASE = "select"
"""The ready study that a selection starts from."""


@dataclass(frozen=True)
class Budget:
    """What a selection may cost: one of the two."""

    share: float | None = DEFAULT_SHARE
    """Of the estimated cost of the full grid."""
    minutes: float | None = None
    """Of the clock, everything included."""


@dataclass(frozen=True)
class Question:
    """What a selection is asked, resolved."""

    prepared: PreparedStudy
    """The grid that is spared."""
    budget: Budget
    seed: int
    priors: tuple[tuple[float, str], ...] = ()
    """Relative depth and module of positions that served elsewhere."""

    @property
    def study(self) -> Study:
        return self.prepared.study

    @property
    def positions(self) -> list[tuple[int, str]]:
        """Layer and module of every position of the grid."""
        return [(trial.layer, trial.module) for trial in self.prepared.plan.trials]

    @property
    def id(self) -> str:
        """Of the study that holds all trials; without budget and seed, whose trials overlap."""
        facts = self.prepared.facts
        parts = ["selection", self.study.name, METHOD, facts.model_fingerprint, facts.data_fingerprint]
        return hashlib.sha256(json.dumps([*parts, self.study.dtype, METHOD_VERSION]).encode()).hexdigest()[:12]

    @property
    def steps(self) -> int:
        """Optimiser steps of a trial that takes all its epochs."""
        return self.study.epochs * math.ceil(self.prepared.facts.n_edits / self.study.space.batch_size[0])

    def config(self, run: Run) -> TrialConfig:
        """The trial that a policy's run is."""
        space = self.study.space
        fixed = {axis: getattr(space, axis)[0] for axis in FIXED}
        return trial_config(self.study, self.prepared.facts, {**fixed, **asdict(run)})

    def run(self, config: TrialConfig) -> Run | None:
        """The run that a trial was; None for one with other data or settings."""
        run = Run(config.layer, config.module, config.learning_rate, config.seed)
        return run if self.config(run) == config else None


def ask(
    model: str,
    edits: str,
    overrides: Sequence[str] = (),
    *,
    limit: int | None = None,
    budget: Budget | None = None,
    seed: int = 0,
    prior: Path | None = None,
) -> Question:
    """Check and resolve everything that a selection needs; nothing is run or written.

    prior: position file of another model; its position at the same relative depth is tried here early. overrides: of the
    ready study `select`, as of `load_study`. Raises InputError with what is wrong.
    """
    from locft.model.models import load_structure
    from locft.model.positions import modules_of

    budget = budget or Budget()
    if problems := list(_problems(budget)):
        raise InputError(problems)
    priors = ()
    if prior is not None:
        elsewhere = read_position(prior)
        priors = ((elsewhere.depth, TuningPosition.parse(elsewhere.position).module),)
    there = modules_of(load_structure(model))
    modules = [module for module in MODULES if module in there] or list(there)
    settings = {"model": model, "edits.source": edits, "edits.limit": limit, "space.module": modules}
    study = load_study(BASE, [*(f"{key}={json.dumps(value)}" for key, value in settings.items()), *overrides])
    if problems := list(_not_to_choose(study)):
        raise InputError(problems)
    if study.name == BASE:
        study = study.model_copy(update={"name": _name(study)})
    return Question(prepare(study), budget, seed, priors)


def _problems(budget: Budget) -> Iterator[str]:
    if budget.share is not None and not 0 < budget.share <= 1:
        yield f"--budget-share: got {budget.share:g}, expected a share of the full grid's cost, above 0 and at most 1"
    if budget.minutes is not None and not 0 < budget.minutes < float("inf"):
        yield f"--budget-minutes: got {budget.minutes:g}, expected a positive number"


def _not_to_choose(study: Study) -> Iterator[str]:
    """What a selection chooses itself, or needs a single value of."""
    for axis in FIXED:
        if len(values := getattr(study.space, axis)) > 1:
            yield f"space.{axis}: got {len(values)} values; a selection takes one"
    rate = study.space.learning_rate
    if isinstance(rate, LogUniform) or len(rate) > 1:
        yield "space.learning_rate: a selection chooses it itself; leave it out"
    if len(study.space.seed) > 1:
        yield "space.seed: a selection chooses seeds itself; leave it out"
    for limit in ("minutes", "trials"):
        if (value := getattr(study.budget, limit)) is not None:
            yield f"budget.{limit}: got {value:g}; a selection has budgets of its own, see --budget-share and --budget-minutes"
    if study.search.method != "grid":
        yield f"search.method: got {study.search.method}; a selection searches in its own way"


def _name(study: Study) -> str:
    """select-MODEL-EDITS, in the characters that a study's name may have."""

    def short(text: str) -> str:
        base = text.rstrip("/").rpartition("/")[2]
        for suffix in (".jsonl", ".json", ".gguf"):
            base = base.removesuffix(suffix)
        return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in base)[:30]

    return f"select-{short(study.model)}-{short(study.edits.source)}"
