"""The settings of one edit: options over those of a position file or of the trial to repeat, over the defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locft.errors import InputError
from locft.model.positions import TuningPosition
from locft.model.precision import training_precision
from locft.train.pipelines import TrainingSettings
from sweeps.commands.options import EDITS
from sweeps.select.position_file import read_position
from sweeps.study.reader import study_from_yaml
from sweeps.study.schema import Capability, Edits, value_problem
from sweeps.tracking.study_run import find_trial


@dataclass(frozen=True)
class EditSettings:
    """Where and how one edit is trained and measured."""

    position: str
    training: TrainingSettings
    dtype: str
    edits: Edits
    capability: Capability
    device: str
    threads: int | None
    """CPU threads; None takes all cores. Another number can change the last digits of a result."""
    model_fingerprint: str | None
    """Of the model that the trial or the position file is about; None when there is neither."""
    run_id: str | None
    """MLflow run of the trial or of the position file; None when there is neither."""


def edit_settings(
    position: str | None,
    given: Mapping[str, Any],
    dtype: str | None,
    edits: Edits | None,
    from_run: str | None,
    tracking_uri: str,
) -> EditSettings:
    """Where and how to edit.

    position: LAYER.MODULE or a position file. given: values by the name of an axis, None where an option is not given.
    edits: None takes those of the trial. from_run: the MLflow run of a trial to repeat. Raises InputError with every
    bad option, or when neither a run nor both a position and edits are given.
    """
    options = {name: value for name, value in given.items() if value is not None}
    checked = [(name, value_problem(name, value)) for name, value in options.items()]
    problems = [f"--{name.replace('_', '-')}: {problem}" for name, problem in checked if problem]
    found = None
    if position is not None and _is_file(position):
        found = read_position(Path(position))
        position = found.position
    if position is None and from_run is None:
        problems.append(
            "--position: expected LAYER.MODULE such as 22.mlp_down or a position file, or --from-run RUN_ID"
        )
    if edits is None and from_run is None:
        problems.append(f"--edits: expected {EDITS}, or --from-run RUN_ID")
    if found and from_run is not None:
        problems.append("--position: a position file and --from-run both bring settings; give one of them")
    if position is not None:
        try:
            TuningPosition.parse(position)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    if from_run is not None:
        return _repeated(from_run, position, options, dtype, edits, tracking_uri)
    training = TrainingSettings(
        **{"precision": training_precision("auto"), **(found.settings if found else {}), **options}
    )
    default_dtype, fingerprint, run = (
        (found.dtype, found.model_fingerprint, found.run_id) if found else ("float32", None, None)
    )
    return EditSettings(position, training, dtype or default_dtype, edits, Capability(), "auto", None, fingerprint, run)


def _repeated(
    run_id: str, position: str | None, options: Mapping[str, Any], dtype: str | None, edits: Edits | None, uri: str
) -> EditSettings:
    """The settings of a trial, but for the options that are given."""
    config, study_yaml = find_trial(run_id, uri)
    study = None if study_yaml is None else study_from_yaml(study_yaml)
    if study is None and edits is None:
        raise InputError(f"run {run_id!r}: its study is gone, and with it the name of the edits; add --edits")
    return EditSettings(
        position or config.position,
        TrainingSettings(**{**config.training, **options}),
        dtype or config.dtype,
        edits or study.edits,
        study.capability if study else Capability(),
        study.device if study else "auto",
        study.resources.cpus if study else None,
        config.model_fingerprint,
        run_id,
    )


def _is_file(position: str) -> bool:
    return position.endswith(".json") or "/" in position or Path(position).is_file()
