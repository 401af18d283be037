"""The edit of a study's pick in MLflow's model registry. Trials keep no deltas, so the picked one is trained once more: the
same numbers give the same delta."""

import json
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sweeps.study.trial_types import TrialConfig, TrialInputs
from sweeps.tracking.registry import register_edit, registered_edit, study_alias
from sweeps.run.runner import alone
from sweeps.run.trial import Basis, resident_workbench, train

if TYPE_CHECKING:
    from locft.model.delta import EditDelta
    from locft.workbench import Baseline
    from sweeps.study.schema import Study

TOLERANCE = 1e-3
"""By which the size of the delta may differ from the trial's, relatively: hardware that sums in another order."""


class PickError(RuntimeError):
    """The pick cannot be registered; the study's results are unharmed."""


def is_registered(study: "Study", run_id: str, tracking_uri: str | None) -> bool:
    """Whether the study's registered edit is that of this trial."""
    return registered_edit(study.model, study_alias(study.name), tracking_uri) == run_id


def register_pick(
    study: "Study",
    basis: Basis,
    config: TrialConfig,
    run_id: str,
    metrics: dict[str, float],
    tracking_uri: str | None,
    *,
    here: bool,
) -> str:
    """Train a trial once more and register what comes of it; returns "models:/NAME@ALIAS".

    run_id, metrics: of the trial. here: as of `sweeps.run.runner.alone`. Raises PickError where another delta comes out,
    InputError where the store does not take it.
    """
    again = partial(train_again, basis.inputs, basis.baseline, config)
    delta = alone(again, study.resources, here=here)
    if not math.isclose(delta.norm, metrics["delta_norm"], rel_tol=TOLERANCE):
        raise PickError(
            f"training {config.position} again gave a change of size {delta.norm:.6g}, and {metrics['delta_norm']:.6g} in the"
            f" trial (other hardware?); `locft edit --from-run {run_id} --register` measures it anew"
        )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        delta.save(folder)
        about = {"model": study.model, "position": config.position, "settings": config.to_dict(), "metrics": metrics}
        (folder / "edit.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        about_edits = f"{study.edits.source}, study {study.name}"
        alias = study_alias(study.name)
        return register_edit(folder, run_id, study.model, config.position, metrics, tracking_uri, alias, about_edits)


def train_again(inputs: TrialInputs, baseline: "Baseline", config: TrialConfig) -> "EditDelta":
    """The delta of a trial; on a CPU bitwise that which was measured."""
    return train(resident_workbench(inputs, baseline), config).delta
