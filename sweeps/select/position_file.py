"""The position file: what `locft select` writes and `locft edit --position FILE` takes.

JSON: the position with its settings, the model and data it was found on, what to expect, and how it was found.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.stats.axes import AXES
from locft.errors import InputError
from locft.model.positions import TuningPosition
from sweeps.study.schema import value_problem

FORMAT = "locft-position/1"
UNMEASURED = "by the probe alone: the budget ended before any run finished, so nothing was measured there"
"""How a position without predicted metrics was found."""
SETTINGS = tuple(axis.name for axis in AXES if axis.trained)
"""Of a trial that the file repeats, besides its position; fields of `TrialConfig` and `TrainingSettings`."""


@dataclass(frozen=True)
class PositionFile:
    """What `locft edit` needs of a position file."""

    position: str
    settings: Mapping[str, Any]
    """Fields of `TrainingSettings`."""
    dtype: str
    model: str
    model_fingerprint: str
    depth: float
    """Relative depth of the layer, 0 for the first and 1 for the last."""
    run_id: str | None = None
    """The MLflow run that measured it."""


def read_position(file: Path) -> PositionFile:
    """Read a position file. Raises InputError with all that is wrong with it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot read it: {getattr(error, 'strerror', None) or error}") from None
    except ValueError as error:
        raise InputError(f"{file}: this is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{file}: not a position file: expected the key format with {FORMAT!r}, as `locft select` writes it")
    problems = []
    for key in ("position", "dtype", "model", "model_fingerprint"):
        if not isinstance(content.get(key), str):
            problems.append(f"{file}: {key}: got {content.get(key)!r}, expected text")
    if not isinstance(content.get("depth"), int | float) or not 0 <= content["depth"] <= 1:
        problems.append(f"{file}: depth: got {content.get('depth')!r}, expected a number from 0 to 1")
    settings = content.get("settings")
    if not isinstance(settings, dict):
        problems.append(f"{file}: settings: got {settings!r}, expected a mapping")
        settings = {}
    for key, value in settings.items():
        if key not in SETTINGS:
            problems.append(f"{file}: settings.{key}: unknown, expected one of {', '.join(SETTINGS)}")
        elif problem := value_problem(key, value):
            problems.append(f"{file}: settings.{key}: {problem}")
    if isinstance(content.get("position"), str):
        try:
            TuningPosition.parse(content["position"])
        except InputError as error:
            problems += [f"{file}: {problem}" for problem in error.problems]
    if problems:
        raise InputError(problems)
    run_id = content.get("run_id")
    return PositionFile(
        content["position"],
        settings,
        content["dtype"],
        content["model"],
        content["model_fingerprint"],
        content["depth"],
        run_id if isinstance(run_id, str) else None,
    )
