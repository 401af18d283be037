"""Levels of fidelity of a selection: the same study on a part of its edits and capability items."""

from dataclasses import dataclass

from sweeps.study.plan import trial_config
from sweeps.study.resolve import PreparedStudy, prepare
from sweeps.select.race import Run
from sweeps.study.trial_types import TrialConfig

FRACTIONS = ((0.1, 10, 0.03, 5), (0.3, 30, 0.12, 20))
"""Of the lower levels: share of the edits and at least so many, share of each task's items and at least so many."""
LEAST_PROSE = 512
"""Tokens."""


@dataclass(frozen=True)
class Levels:
    """A study at rising fidelity; the last level is the study itself."""

    studies: tuple[PreparedStudy, ...]

    @property
    def full(self) -> PreparedStudy:
        return self.studies[-1]

    @property
    def edits(self) -> tuple[int, ...]:
        """Number of edits at each level."""
        return tuple(len(study.edits.requests) for study in self.studies)

    @property
    def positions(self) -> list[tuple[int, str]]:
        """Layer and module of every position of the grid."""
        return [(trial.layer, trial.module) for trial in self.full.plan.trials]

    def config(self, run: Run) -> TrialConfig:
        """The trial that a run of a race is."""
        study = self.studies[run.level].study
        point = {
            "layer": run.layer,
            "module": run.module,
            "pipeline": study.space.pipeline[0],
            "batch_size": study.space.batch_size[0],
            "learning_rate": run.learning_rate,
            "loss_average": study.space.loss_average[0],
            "seed": run.seed,
        }
        return trial_config(study, self.studies[run.level].facts, point)

    def run(self, config: TrialConfig) -> Run | None:
        """The run that a trial was, None for one of other data or settings."""
        for level, prepared in enumerate(self.studies):
            if prepared.facts.data_fingerprint == config.data_fingerprint:
                run = Run(config.layer, config.module, config.learning_rate, level, config.seed)
                return run if self.config(run) == config else None
        return None


def make_levels(full: PreparedStudy, seed: int) -> Levels:
    """The lower levels are samples of the edits, drawn with the seed; those that would be half of the next are left out."""
    study, count = full.study, len(full.edits.requests)
    largest = max((len(task.items) for task in full.suite.tasks), default=0) if full.suite else 0
    prose = study.capability.prose_tokens
    lower = []
    for share, least, item_share, least_items in FRACTIONS:
        edits = max(least, round(share * count))
        if edits > count / 2:
            continue
        capability = study.capability.model_copy(
            update={
                "limit": min(largest, max(least_items, round(item_share * largest))) or None,
                "prose_tokens": min(prose, max(LEAST_PROSE, round(2 * share * prose))),
            }
        )
        smaller = study.model_copy(update={"capability": capability})
        lower.append(prepare(smaller, full.edits.sample(edits, seed)))
    return Levels((*lower, full))
