"""The settings of one edit: options override a position file, an earlier edit or a trial, which override the defaults."""

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
    model_fingerprint: str | None = None
    """Fingerprint of the trial's or the position file's model; None if there is neither."""
    run_id: str | None = None
    """MLflow run of the trial or of the position file; None if there is neither."""
    capability: Capability = field(default_factory=lambda: Capability(limit=EDIT_ITEMS))
    device: str = "auto"
    threads: int | None = None
    """CPU threads; None takes all cores. Another number can change the last digits of a result."""
    edit_count: int = 0
    """Number of edits to make, counted from the first; 0 for all."""

    def overridden(
        self, position: str | None, options: Mapping[str, Any], dtype: str | None, edits: Edits | None
    ) -> "EditSettings":
        """These settings with what is given in place of their own. options: checked values of axes and of ask_formats."""
        training = {name: value for name, value in options.items() if name != "ask_formats"}
        return replace(
            self,
            position=position or self.position,
            training=replace(self.training, **training),
            dtype=dtype or self.dtype,
            edits=edits or self.edits,
            ask_formats=options.get("ask_formats", self.ask_formats),
            edit_count=0 if edits else self.edit_count,
        )


def edit_settings(
    position: str | None,
    given: Mapping[str, Any],
    dtype: str | None,
    edits: Edits | None,
    from_run: str | None,
    tracking_uri: str,
) -> EditSettings:
    """Where and how to edit.

    position: LAYER.MODULE or a position file. given: values by axis name, and of ask_formats, None where an option is not given.
    edits: None takes those of the trial. from_run: the MLflow run of a trial to repeat. Raises InputError with every bad option,
    or when neither a run nor both a position and edits are given.
    """
    options, problems = _checked(given)
    found = None
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
        own = _of_trial(from_run, tracking_uri, edits)
    else:
        settings = {name: read_value(name, value) for name, value in found.settings.items()} if found else ONE_EDIT
        training = TrainingSettings(**{"precision": training_precision("auto"), **settings})
        own = EditSettings(position, training, "float32", edits, read_formats(ONE_EDIT["train_formats"]))
        if found:
            carried = {name: getattr(found, name) for name in ("dtype", "ask_formats", "model_fingerprint", "run_id")}
            own = replace(own, **carried)
    return own.overridden(position, options, dtype, edits)


def continued_settings(
    delta: EditDelta, about: Mapping[str, Any], given: Mapping[str, Any], dtype: str | None, edits: Edits | None
) -> EditSettings:
    """The settings of an earlier edit, overridden by what is given, as for `edit_settings`. about: its edit.json. Capability is
    not measured, so that a new edit can go live soon. Raises InputError."""
    options, problems = _checked(given)
    if problems:
        raise InputError(problems)
    known = {one.name for one in fields(TrainingSettings)}  # some axes of earlier versions are gone
    own = EditSettings(
        delta.position,
        TrainingSettings(**{name: value for name, value in delta.settings.items() if name in known}),
        about.get("dtype", "float32"),
        Edits(source=str(about.get("edits", {}).get("source", ""))),
        tuple(about.get("ask_formats") or (RAW,)),
        delta.base_fingerprint,
        about.get("run_id"),
        Capability(suite=None),
    )
    return own.overridden(None, options, dtype, edits)


def idle_options(given: Mapping[str, Any], training: TrainingSettings) -> Iterator[str]:
    """A sentence for each option that is given but has no effect with these settings. given: values by axis name."""
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


def _of_trial(run_id: str, uri: str, edits: Edits | None) -> EditSettings:
    """The settings of a trial. edits: those to make instead of its own, which only its study names. Raises InputError."""
    config, study_yaml = find_trial(run_id, uri)
    if study_yaml is None and edits is None:
        raise InputError(f"run {run_id!r}: its study's run is gone, so its edits are not known; give --edits")
    training, count = TrainingSettings(**config.training), config.edit_count
    own = EditSettings(
        config.position, training, config.dtype, Edits(), (RAW,), config.model_fingerprint, run_id, edit_count=count
    )
    if study_yaml is None:
        return own
    study = study_from_yaml(study_yaml)
    return replace(
        own,
        edits=study.edits,
        ask_formats=study.ask_formats,
        capability=study.capability,
        device=study.device,
        threads=study.resources.cpus,
    )
