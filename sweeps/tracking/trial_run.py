"""How a trial and its inputs are written as an MLflow run and read back. Nothing here makes a request."""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

from analysis.stats.axes import AXIS
from locft.machine import usable_cores
from sweeps.study.trial_types import TrialConfig, TrialResult

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Run

OUTCOMES = [
    "edit_id", "kind", "format", "prompt", "expected", "got", "correct", "correct_tf", "kept", "first_kept", "kl",
]  # fmt: skip
"""Columns of the table of outcomes."""
EPOCH_LOSS, STAGE = "epoch_loss", "stage."
"""Metrics with more than one step: the losses by epoch, and, with the prefix `STAGE`, metrics by the number of edits arrived."""
PACKAGES = ("locft-sweeps", "torch", "transformers", "ray", "optuna", "mlflow", "numpy", "pandas")
"""Packages whose versions are recorded with a study."""
_TYPES: dict[str, Callable[[str], Any]] = {field.name: field.type for field in fields(TrialConfig)}


def dataset_input(name: str, fingerprint: str, source: str, context: str, profile: Mapping[str, Any]) -> "DatasetInput":
    """A data set as an input of runs.

    source: where it came from: a built-in name, a file, a hub id. context: what it is used for: edits or capability. profile:
    counts and findings, shown on the run's page.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=name[:500],
        digest=fingerprint[:36],  # MLflow's limit
        source_type="local",
        source=json.dumps({"uri": source}),
        profile=json.dumps(profile, default=str),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


@dataclass(frozen=True)
class StudyInputs:
    """What every trial of a study starts from: its run is linked to the unedited model and the data sets."""

    model: str
    model_fingerprint: str
    model_facts: Mapping[str, Any]
    """Shown as the model's parameters: layers, dtype."""
    datasets: "tuple[DatasetInput, ...]"
    machine: str
    """Label of the machine on which the trials are timed (`sweeps.study.estimate.machine`)."""

    @property
    def tags(self) -> dict[str, str]:
        """Tags for a trial's run, so that the run itself says what it was made from."""
        sources = {f"locft.{data.tags[0].value}": json.loads(data.dataset.source)["uri"] for data in self.datasets}
        return {"locft.model": self.model, **sources, "locft.machine": self.machine}


def trial_parameters(config: TrialConfig) -> dict[str, str]:
    """The parameters of a trial's run: depth, position, and the axes that have an effect given the others."""
    values = config.to_dict()
    axes = {name: str(values[name]) for name, axis in AXIS.items() if axis.counts(values)}
    return {"depth": f"{config.depth:.3f}", "position": config.position, **axes}


def trial_tags(study_id: str, result: TrialResult, inputs: StudyInputs | None) -> dict[str, str]:
    """The tags of a trial's run: how it is found, how it ended, and the parts of its configuration that are not axes."""
    values = result.config.to_dict()
    tags = {"locft.kind": "trial", "locft.study_id": study_id, "locft.trial_id": result.config.id}
    tags |= {f"locft.{key}": str(value) for key, value in values.items() if key not in AXIS}
    table = json.dumps([{"path": "outcomes.json", "type": "table"}])  # else MLflow's pages show it as text
    found = {
        "locft.status": result.status,
        "locft.error": result.error,
        "locft.retried": "\n".join(result.retried),
        "locft.right": result.right,
        "locft.stages": json.dumps(result.stages) if result.stages else None,
        "mlflow.loggedArtifacts": table if result.outcomes else None,
    }
    return {**tags, **{key: text for key, text in found.items() if text}, **(inputs.tags if inputs else {})}


def config_of(run: "Run") -> TrialConfig:
    """The configuration of a run's trial. Raises ValueError when a field is missing or is not a number."""
    kept = {key.removeprefix("locft."): value for key, value in run.data.tags.items()} | run.data.params
    # absent in older runs and where the axis has no effect: then at the default
    optional = {axis.name for axis in AXIS.values() if axis.only or not axis.in_first_ids}
    if missing := [key for key in _TYPES if key not in kept and key not in optional]:
        raise ValueError(f"no {', '.join(missing)} recorded")
    return TrialConfig(**{key: kind(kept[key]) for key, kind in _TYPES.items() if key in kept})


def result_of(
    run: "Run", config: TrialConfig, status: Literal["done", "failed"], losses: Sequence[float] = ()
) -> TrialResult:
    """The result of a trial as read from its run, without outcomes."""
    tags = run.data.tags
    return TrialResult(
        config,
        status,
        tags.get("locft.error"),
        # for a curve, only the last point is here
        {key: value for key, value in run.data.metrics.items() if key != EPOCH_LOSS and not key.startswith(STAGE)},
        tuple(losses),
        stages=tuple(json.loads(tags.get("locft.stages", "[]"))),
        retried=tuple(tags.get("locft.retried", "").splitlines()),
        packed_right=tags.get("locft.right"),
    )


def curves_of(result: TrialResult) -> dict[str, list[tuple[int, float]]]:
    """The curves of a trial for MLflow's pages, by name: steps and values. Losses by epoch; a stream's stages by edits."""
    curves = {EPOCH_LOSS: list(enumerate(result.epoch_losses))}
    for stage in result.stages:
        for name in stage.keys() - {"arrived"}:
            curves.setdefault(f"{STAGE}{name}", []).append((int(stage["arrived"]), stage[name]))
    return curves


def outcomes_table(outcomes: Sequence[Mapping[str, Any]]) -> str:
    """The JSON that MLflow's pages show as a table. outcomes: at least one."""
    columns = [key for key in OUTCOMES if key in outcomes[0]]
    rows = [[outcome[key] for key in columns] for outcome in outcomes]
    return json.dumps({"columns": columns, "data": rows}, ensure_ascii=False)


def environment() -> dict[str, Any]:
    """Versions and machine, for the record of a study."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {"python": platform.python_version(), "system": platform.platform(), "cpus": usable_cores(), **versions}
