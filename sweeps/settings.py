"""The settings of a single edit, from options or from the trial that is to be repeated."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from locft.errors import InputError

if TYPE_CHECKING:
    from locft.finetune import TrainingSettings

CHOICES = {"pipeline": ("breadth_first", "depth_first"), "loss_average": ("edit", "token")}
AT_LEAST = {"batch_size": 1, "epochs": 1, "seed": 0}


@dataclass(frozen=True)
class EditSettings:
    """Where and how one edit is trained."""

    position: str
    training: "TrainingSettings"
    dtype: str
    model_fingerprint: str | None
    """Of the model that the repeated trial edited; None when no trial is repeated."""


def edit_settings(
    position: str | None,
    given: Mapping[str, Any],
    dtype: str | None,
    from_run: str | None,
    tracking_uri: str | None,
) -> EditSettings:
    """Options over the settings of a trial, over the defaults. `given` maps option names to values, None when not given.

    Raises InputError with every bad option, or when neither a position nor a run is given.
    """
    from locft.finetune import TrainingSettings

    problems = _problems(given)
    if position is None and from_run is None:
        problems.append("--position: expected LAYER.MODULE such as 22.mlp_down, or --from-run RUN_ID")
    if problems:
        raise InputError(problems)
    options = {name: value for name, value in given.items() if value is not None}
    if from_run is None:
        return EditSettings(str(position), TrainingSettings(**options), dtype or "float32", None)
    from sweeps.tracking_lookup import find_run

    config = find_run(from_run, tracking_uri)["config"]
    trained = {name: getattr(config, name) for name in TrainingSettings.__dataclass_fields__}
    training = TrainingSettings(**{**trained, **options})
    return EditSettings(position or config.position, training, dtype or config.dtype, config.model_fingerprint)


def _problems(given: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if name in CHOICES and value not in CHOICES[name]:
            problems.append(f"{option}: got {value!r}, expected {' or '.join(CHOICES[name])}")
        if name in AT_LEAST and value < AT_LEAST[name]:
            problems.append(f"{option}: got {value}, expected at least {AT_LEAST[name]}")
        if name == "learning_rate" and not 0 < value < float("inf"):
            problems.append(f"{option}: got {value}, expected a positive number")
    return problems
