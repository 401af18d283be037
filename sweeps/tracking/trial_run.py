"""How a trial and its inputs are written as an MLflow run, and read from it again. No requests."""

import getpass
import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

from analysis.stats.axes import AXIS
from sweeps.study.trial_types import TrialConfig, TrialResult

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Run

PARAMETERS = tuple(AXIS)
"""Fields of `TrialConfig` shown as parameters, beside `depth` and `position`. The others are tags: they rarely vary."""
OUTCOMES = ["edit_id", "kind", "prompt", "expected", "got", "correct", "correct_tf"]
"""Columns of the table of outcomes."""
PACKAGES = ("locft-sweeps", "torch", "transformers", "ray", "optuna", "mlflow", "numpy", "pandas")
"""Packages whose versions are kept with a study."""
MOST_TAG = 5000
"""Characters of a tag's value (older servers refuse more)."""
_TYPES: dict[str, Callable[[str], Any]] = {field.name: field.type for field in fields(TrialConfig)}


@dataclass(frozen=True)
class DatasetRecord:
    """A data set as an input of runs."""

    name: str
    fingerprint: str
    source: str
    """Where it came from: a built-in name, a file, a hub id."""
    context: str
    """What it is used for: edits or capability."""
    profile: Mapping[str, Any]
    """Counts and findings, shown on the run's page."""


@dataclass(frozen=True)
class ModelRecord:
    """The unedited model as an input of runs."""

    name: str
    fingerprint: str
    facts: Mapping[str, Any]
    """Shown as the model's parameters: layers, dtype, ..."""


@dataclass(frozen=True)
class StudyInputs:
    """What every trial of a study starts from, ready to be linked to a run (`Tracker.create_inputs`)."""

    datasets: tuple["DatasetInput", ...]
    model_id: str
    tags: Mapping[str, str]
    """`locft.model`, `locft.edits`, `locft.capability`: the names, so that a run alone says what it was made from; and
    `locft.machine`, on which its seconds were taken."""


def matching(kind: Literal["study", "trial"], study_id: str | None, trial_id: str | None = None) -> str:
    """The search filter for the runs of one kind; None leaves a condition out."""
    wanted = {"locft.kind": kind, "locft.study_id": study_id, "locft.trial_id": trial_id}
    return " and ".join(f"tags.`{key}` = '{_quotable(value)}'" for key, value in wanted.items() if value is not None)


def _quotable(value: str) -> str:
    # A search filter has no way to escape a quote.
    if not re.fullmatch(r"[\w.\- ]{1,250}", value):
        raise ValueError(f"id {value!r} has characters other than letters, digits, blanks, '_', '.' and '-'")
    return value


def recorded(run: "Run") -> Literal["done", "failed"] | None:
    """What the run says came of its trial: nothing (None) until all of it was logged."""
    state = (run.info.status, run.data.tags.get("locft.status"))
    return {("FINISHED", "done"): "done", ("FAILED", "failed"): "failed"}.get(state)  # type: ignore[return-value]


def trial_parameters(config: TrialConfig) -> dict[str, str]:
    """The parameters of a trial's run."""
    values = config.to_dict()
    shown = {key: str(values[key]) for key in PARAMETERS}
    return {"depth": f"{config.depth:.3f}", "position": config.position, **shown}


def trial_tags(study_id: str, result: TrialResult, given: Mapping[str, str]) -> dict[str, str]:
    """The tags of a trial's run: how it is found, what came of it, and the fields that are no parameters."""
    values = result.config.to_dict()
    tags = {"locft.kind": "trial", "locft.study_id": study_id, "locft.trial_id": result.config.id}
    tags |= {f"locft.{key}": str(value) for key, value in values.items() if key not in PARAMETERS}
    tags["locft.status"] = result.status
    if result.status == "failed":
        tags["locft.error"] = result.error or "unknown"
    if result.retried:
        tags["locft.retried"] = "\n".join(result.retried)
    if result.right:
        tags["locft.right"] = result.right
    if result.outcomes:  # tells MLflow's pages that the file is a table
        tags["mlflow.loggedArtifacts"] = json.dumps([{"path": "outcomes.json", "type": "table"}])
    return {**tags, **given}


def config_of(run: "Run") -> TrialConfig:
    """The trial of a run, its values with their types again.

    Raises:
        ValueError: a field is missing or is no number.
    """
    kept = {key.removeprefix("locft."): value for key, value in run.data.tags.items()} | run.data.params
    newer = {axis.name for axis in AXIS.values() if not axis.in_first_ids}  # absent in older runs: at its default
    if missing := [key for key in _TYPES if key not in kept and key not in newer]:
        raise ValueError(f"no {', '.join(missing)} recorded")
    return TrialConfig(**{key: kind(kept[key]) for key, kind in _TYPES.items() if key in kept})


def result_of(
    run: "Run", config: TrialConfig, status: Literal["done", "failed"], losses: Sequence[float] = ()
) -> TrialResult:
    """What a run says of its trial, without outcomes."""
    tags = run.data.tags
    retried = tuple(tags.get("locft.retried", "").splitlines())
    return TrialResult(
        config,
        status,
        tags.get("locft.error"),
        metrics_of(run),
        tuple(losses),
        retried=retried,
        packed_right=tags.get("locft.right"),
    )


def metrics_of(run: "Run") -> dict[str, float]:
    """The metrics of a run without the last point of its loss curve."""
    return {key: value for key, value in run.data.metrics.items() if key != "epoch_loss"}


def outcomes_table(outcomes: Sequence[Mapping[str, Any]]) -> str:
    """The JSON that MLflow's pages show as a table."""
    extra = [key for outcome in outcomes for key in outcome if key not in OUTCOMES]
    columns = [key for key in OUTCOMES if any(key in outcome for outcome in outcomes)] + list(dict.fromkeys(extra))
    rows = [[outcome.get(key) for key in columns] for outcome in outcomes]
    return json.dumps({"columns": columns, "data": rows}, ensure_ascii=False, default=str)


def metric_name(name: str) -> str:
    """The name with what MLflow does not accept replaced (task names come from the user)."""
    return re.sub(r"[^\w.\-:/ ]", "_", name)


def clipped(tags: Mapping[str, str]) -> dict[str, str]:
    """The tags with values that MLflow accepts."""
    return {key: text if len(text) <= MOST_TAG else text[: MOST_TAG - 1] + "…" for key, text in tags.items()}


def user() -> str:
    """Who runs this."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"  # a container whose user has no name


def now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def environment() -> dict[str, Any]:
    """Versions and machine, for the record of a study."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {"python": platform.python_version(), "system": platform.platform(), "cpus": os.cpu_count(), **versions}
