"""The settings of one edit: options override a position file or the trial to repeat, which override the defaults."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from analysis.stats.axes import AXIS
from analysis.stats.formats import ONE_EDIT
from locft.errors import InputError
from locft.model.delta import EditDelta
from locft.model.positions import TuningPosition
from locft.model.precision import training_precision
from locft.train.formats import RAW
from locft.train.pipelines import TrainingSettings
from sweeps.select.position_file import read_position
from sweeps.study.reader import study_from_yaml
from sweeps.study.schema import Capability, Edits, read_formats, read_value
from sweeps.tracking.study_run import find_trial

EDIT_ITEMS = 50
"""Items of each built-in task: enough to reveal a broken model, in a fifth of the time that a few edits otherwise take."""


@dataclass(frozen=True)
class EditSettings:
    """Where and how one edit is trained and measured."""

    position: str
    training: TrainingSettings
    dtype: str
    edits: Edits
    ask_formats: tuple[str, ...]
    model_fingerprint: str | None
    """Fingerprint of the trial's or the position file's model; None if there is neither."""
    run_id: str | None
    """MLflow run of the trial or of the position file; None if there is neither."""
    capability: Capability = field(default_factory=lambda: Capability(limit=EDIT_ITEMS))
    device: str = "auto"
    threads: int | None = None
    """CPU threads; None takes all cores. Another number can change the last digits of a result."""
    edit_count: int = 0
    """Number of edits to make, counted from the first; 0 for all."""


def edit_settings(
    position: str | None,
    given: Mapping[str, Any],
    dtype: str | None,
    edits: Edits | None,
    from_run: str | None,
    tracking_uri: str,
    ask_formats: str | None = None,
) -> EditSettings:
    """Where and how to edit.

    position: LAYER.MODULE or a position file. given: values by axis name, None where an option is not given. edits: None takes
    those of the trial. ask_formats: None takes those of the trial or position file, else the default. from_run: the MLflow run of a
    trial to repeat. Raises InputError with every bad option, or when neither a run nor both a position and edits are given.
    """
    options, problems = _checked({**given, "ask_formats": ask_formats})
    asked, found = options.pop("ask_formats", None), None
    if position is not None and (position.endswith(".json") or "/" in position or Path(position).is_file()):
        found = read_position(Path(position))
        position = found.position
    if position is None and from_run is None:
        problems.append(
            "--position: expected LAYER.MODULE such as 22.mlp_down or a position file, or --from-run RUN_ID"
        )
    if edits is None and from_run is None:
        problems.append("--edits: expected the edits to make, or --from-run RUN_ID")
    if found and from_run is not None:
        problems.append("--position: a position file and --from-run both provide settings; give only one of them")
    if position is not None:
        try:
            TuningPosition.parse(position)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    if from_run is not None:
        return _repeated(from_run, position, options, dtype, edits, tracking_uri, asked)
    own = {name: read_value(name, value) for name, value in (found.settings if found else {}).items()}
    own |= {} if found else ONE_EDIT
    return EditSettings(
        position,
        TrainingSettings(**{"precision": training_precision("auto"), **own, **options}),
        dtype or (found.dtype if found else "float32"),
        edits,
        asked or (found.ask_formats if found else read_formats(ONE_EDIT["train_formats"])),
        found and found.model_fingerprint,
        found and found.run_id,
    )


def continued_settings(
    delta: EditDelta, about: Mapping[str, Any], given: Mapping[str, Any], dtype: str | None, ask_formats: str | None
) -> EditSettings:
    """The settings of an earlier edit, overridden by the options that are given. about: its edit.json. Capability is not
    measured, so that a new edit can go live soon. Raises InputError."""
    options, problems = _checked({**given, "ask_formats": ask_formats})
    if problems:
        raise InputError(problems)
    asked = options.pop("ask_formats", None) or tuple(about.get("ask_formats") or (RAW,))
    known = {one.name for one in fields(TrainingSettings)}
    own = {name: value for name, value in delta.settings.items() if name in known}
    return EditSettings(
        delta.position,
        TrainingSettings(**{**own, **options}),
        dtype or about.get("dtype", "float32"),
        Edits(source=str(about.get("edits", {}).get("source", ""))),
        asked,
        delta.base_fingerprint,
        about.get("run_id"),
        Capability(suite=None),
    )


def idle_options(given: Mapping[str, Any], training: TrainingSettings) -> Iterator[str]:
    """A sentence for each option that is given but has no effect with these settings. given: as for `edit_settings`."""
    chosen = {name: (value,) for name, value in asdict(training).items()}
    for name, value in given.items():
        for other, values in AXIS[name].unmet(chosen) if value is not None else ():
            yield f"--{name.replace('_', '-')} has no effect: it needs --{other} {values}"


def _checked(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The parsed values of the options that are given, and the problems with them."""
    options: dict[str, Any] = {}
    problems = []
    for name, value in given.items():
        read = read_formats if name == "ask_formats" else partial(read_value, name)
        try:
            options |= {} if value is None else {name: read(value)}
        except InputError as error:
            problems.append(f"--{name.replace('_', '-')}: {error}")
    return options, problems


def _repeated(
    run_id: str,
    position: str | None,
    options: Mapping[str, Any],
    dtype: str | None,
    edits: Edits | None,
    uri: str,
    asked: tuple[str, ...] | None,
) -> EditSettings:
    """The settings of a trial, overridden by the options that are given. Raises InputError."""
    config, study_yaml = find_trial(run_id, uri)
    if study_yaml is None and edits is None:
        raise InputError(f"run {run_id!r}: its study's run is gone, so its edits are not known; give --edits")
    chosen = EditSettings(
        position or config.position,
        TrainingSettings(**{**config.training, **options}),
        dtype or config.dtype,
        edits or Edits(),
        asked or (RAW,),
        config.model_fingerprint,
        run_id,
        edit_count=0 if edits else config.edit_count,
    )
    if study_yaml is None:
        return chosen
    study = study_from_yaml(study_yaml)
    return replace(
        chosen,
        edits=edits or study.edits,
        ask_formats=asked or study.ask_formats,
        capability=study.capability,
        device=study.device,
        threads=study.resources.cpus,
    )
