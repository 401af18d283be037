"""The settings of a single edit: from options, a position file, or the trial that is to be repeated."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locft.errors import InputError

if TYPE_CHECKING:
    from locft.train.pipelines import TrainingSettings
    from sweeps.study.schema import Capability, Edits, Study

@dataclass(frozen=True)
class EditSettings:
    """Where and how one edit is trained and measured."""

    position: str
    training: "TrainingSettings"
    dtype: str
    edits: "Edits"
    capability: "Capability"
    device: str
    threads: int | None
    """CPU threads; None takes all cores. Another number can change the last digits of a result."""
    model_fingerprint: str | None
    """Of the model that the trial edited, or that the position file is for; None when there is neither."""
    run_id: str | None
    """The MLflow run of that trial, or of the position file's; None when there is neither."""


def edit_settings(
    position: str | None,
    given: Mapping[str, Any],
    dtype: str | None,
    edits: "Edits | None",
    from_run: str | None,
    tracking_uri: str | None,
) -> EditSettings:
    """Options over the settings of a position file or a trial, over the defaults.

    position: LAYER.MODULE or a position file. given: option names and values, None when not given. edits: None takes
    those of the trial. Raises InputError with every bad option, or when there is neither a run nor a position and edits.
    """
    from locft.train.pipelines import TrainingSettings
    from locft.model.positions import TuningPosition
    from locft.model.precision import training_precision
    from sweeps.study.schema import Capability

    problems = option_problems(given)
    named = None
    if position is not None and _is_file(position):
        from sweeps.select.position_file import read_position

        named = read_position(Path(position))
        position = named.position
    if position is None and from_run is None:
        problems.append("--position: expected LAYER.MODULE such as 22.mlp_down or a position file, or --from-run RUN_ID")
    if edits is None and from_run is None:
        problems.append("--edits: expected atlas, an edit file or a data set's hub id, or --from-run RUN_ID")
    if named and from_run is not None:
        problems.append("--position: a position file and --from-run both bring settings; give one of them")
    if position is not None:
        try:
            TuningPosition.parse(position)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    options = {name: value for name, value in given.items() if value is not None}
    if from_run is None:
        brought = dict(named.settings) if named else {}
        training = TrainingSettings(**{"precision": training_precision("auto"), **brought, **options})
        dtype, fingerprint = (dtype or named.dtype, named.model_fingerprint) if named else (dtype or "float32", None)
        run_id = named.run_id if named else None
        return EditSettings(str(position), training, dtype, edits, Capability(), "auto", None, fingerprint, run_id)
    from sweeps.tracking.address import resolve_uri
    from sweeps.tracking.study_run import find_trial

    config, study_yaml = find_trial(from_run, resolve_uri(tracking_uri))
    study = _study(study_yaml)
    if study is None and edits is None:
        raise InputError(f"run {from_run!r}: its study is gone, and with it the name of the edits; add --edits")
    return EditSettings(
        position or config.position,
        TrainingSettings(**{**config.training, **options}),
        dtype or config.dtype,
        edits or study.edits,
        study.capability if study else Capability(),
        study.device if study else "auto",
        study.resources.cpus if study else None,
        config.model_fingerprint,
        from_run,
    )


def _is_file(position: str) -> bool:
    return position.endswith(".json") or "/" in position or Path(position).is_file()


def _study(text: str | None) -> "Study | None":
    """A study from its canonical text, as it is kept with the study's run."""
    from sweeps.study.reader import study_from_yaml

    return None if text is None else study_from_yaml(text)


def option_problems(given: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values of options that are named like axes; None stands for an option that is not given."""
    from sweeps.study.schema import value_problem

    found = [(name, value_problem(name, value)) for name, value in given.items() if value is not None]
    return [f"--{name.replace('_', '-')}: {problem}" for name, problem in found if problem]
