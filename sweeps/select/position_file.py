"""The position file: what `locft select` writes and `locft edit --position FILE` takes.

JSON: the position with its settings, the model and data it was found on, what to expect, and how it was found.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from analysis.stats.axes import AXES, AXIS, without_retired
from locft.errors import InputError
from locft.model.positions import TuningPosition
from locft.train.formats import RAW
from sweeps.study.schema import Formats, Text, read_by, read_value, show

FORMAT = "locft-position/1"
UNMEASURED = "the best guess from other models: the budget ended before any run finished, so nothing was measured there"
"""How a position without predicted metrics was found."""
SETTINGS = tuple(axis.name for axis in AXES if axis.trained)
"""What the file repeats of a trial's configuration besides the position: the fields of `TrainingSettings`."""


def measured_sentence(measured_on: Mapping[str, Any]) -> str | None:
    """Says how many edits a position file's predictions are based on; None if it has none, or positions were compared on all."""
    edits, compared_on, of = (measured_on[name] for name in ("edits", "compared_on", "of"))
    if not edits or compared_on == of:
        return None
    if edits == of:
        return f"These figures are for all {of:,} edits; positions were compared on a random sample of {compared_on} of them."
    to_expect = ", expect more drift"
    if ended := measured_on.get("all_edits"):
        to_expect = f" the run {ended}, so do not expect the same there"
    return f"These figures are for a random sample of {edits} of the {of:,} edits; with all of them{to_expect}."


def _position(value: Any) -> str:
    return str(TuningPosition.parse(value if isinstance(value, str) else show(value)))


def with_rate(position: str, settings: Mapping[str, Any]) -> str:
    """A position, with its learning rate if the method takes one, in human-readable form."""
    rate = f" with learning rate {settings['learning_rate']:g}" if AXIS["learning_rate"].counts(settings) else ""
    return f"{position}{rate}"


class PositionFile(BaseModel):
    """What `locft edit` needs from a position file."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    position: read_by(_position)
    settings: dict[str, Any]
    """Fields of `TrainingSettings`; an absent one is at its axis's default."""
    ask_formats: Formats = (RAW,)
    """The formats that reliability and generalization are predicted for, as a study file takes them."""
    dtype: Text
    model: Text
    model_fingerprint: Text
    depth: float = Field(ge=0, le=1)
    """Relative depth of the layer, 0 for the first and 1 for the last."""
    run_id: str | None = None
    """The MLflow run that measured it."""


def read_position(file: Path) -> PositionFile:
    """Read a position file. Raises InputError with everything that is wrong with it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except ValueError as error:
        raise InputError(f"{file}: this is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(
            f"{file}: not a position file: expected the key format with {FORMAT!r}, as `locft select` writes it"
        )
    problems, settings = [], content.get("settings")
    if isinstance(settings, dict):
        content["settings"] = settings = without_retired(settings)
    try:
        found = PositionFile.model_validate(content)
    except ValidationError as error:
        for fault in error.errors():
            got = "" if fault["type"] in ("problem", "missing") else f"got {show(fault['input'])}: "
            problems.append(f"{'.'.join(map(str, fault['loc']))}: {got}{fault['msg']}")
    for key, value in settings.items() if isinstance(settings, dict) else ():
        try:
            if key not in SETTINGS:
                raise InputError(f"unknown, expected one of {', '.join(SETTINGS)}")
            read_value(key, value)
        except InputError as error:
            problems.append(f"settings.{key}: {error}")
    if problems:
        raise InputError([f"{file}: {problem}" for problem in problems])
    return found
