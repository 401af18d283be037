"""What must stay as it is while code moves: ids, deltas, layouts, commands, the store, rungs, figures and the pick.

The values are in `tests/golden`, made by `tests.golden.produce`; `python -m tests.golden.make` writes them anew.
"""

import json
import math
import os
from typing import Any

import pytest

from sweeps.study.reader import load_study
from sweeps.study.resolve import prepare
from tests.golden import produce
from tests.golden.make import WRITE
from tests.heard import Heard

WRITING = bool(os.environ.get(WRITE))
TOLERANCE = 1e-4
"""Of what is computed with a model on another CPU; and of sums, whose last bits are of no interest, far less."""


def differences(found: Any, kept: Any, tolerance: float, place: str = "") -> list[str]:
    """Where the two differ, each place in one line. Numbers may by the tolerance, absolutely and relatively."""
    if isinstance(found, dict) and isinstance(kept, dict):
        odd = [f"{place}/{key}: {'new' if key in found else 'gone'}" for key in sorted(found.keys() ^ kept.keys())]
        shared = (
            differences(found[key], kept[key], tolerance, f"{place}/{key}")
            for key in sorted(found.keys() & kept.keys())
        )
        return odd + [line for lines in shared for line in lines]
    if isinstance(found, list) and isinstance(kept, list) and len(found) == len(kept):
        shared = (
            differences(a, b, tolerance, f"{place}/{i}") for i, (a, b) in enumerate(zip(found, kept, strict=True))
        )
        return [line for lines in shared for line in lines]
    if isinstance(found, float) and isinstance(kept, int | float):
        same = math.isclose(found, kept, rel_tol=tolerance, abs_tol=tolerance)
        return [] if same or (found != found and kept != kept) else [f"{place}: {found!r}, kept {kept!r}"]
    return [] if type(found) is type(kept) and found == kept else [f"{place}: {found!r}, kept {kept!r}"]


def read(name: str) -> Any:
    return json.loads((produce.FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def write(name: str, value: Any) -> None:
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False)
    (produce.FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def check(name: str, found: Any, tolerance: float = 1e-9) -> None:
    found = json.loads(json.dumps(found))
    if WRITING:
        write(name, found)
    wrong = differences(found, read(name), tolerance)
    assert not wrong, f"{len(wrong)} differences from tests/golden/{name}.json\n" + "\n".join(wrong[:40])


def test_edit_layouts():
    check("edit_layouts", produce.edit_layouts())


def test_capability_layouts():
    check("capability_layouts", produce.capability_layouts())


def test_survey_rungs():
    check("survey_rungs", produce.survey_rungs())


def test_figure_infos():
    check("figure_infos", produce.figure_infos())


def test_pick():
    check("pick", produce.pick())


@pytest.mark.model
def test_planned_ids():
    check("planned_ids", produce.planned_ids())


def test_deltas(record_property):
    """To the bit where a CPU with these kernels was there before, else the metrics within the tolerance."""
    found, kernels = json.loads(json.dumps(produce.tiny_grid())), produce.kernels()
    exact = {key: trial.pop("delta") for key, trial in found["trials"].items()}
    exact["all else"] = produce.sha256(found)
    hashes = read("delta_hashes") if (produce.FOLDER / "delta_hashes.json").exists() else {}
    if WRITING:
        write("delta_hashes", hashes | {kernels: exact})
        if "ATEN_CPU_CAPABILITY" not in os.environ:
            write("deltas", found)
    kept = read("deltas")
    if known := read("delta_hashes").get(kernels):
        assert differences(exact, known, 0.0) == []
    else:
        record_property(
            "said", f"golden deltas: no hashes are kept for this CPU ({kernels}), the metrics are compared only"
        )
    assert found["model"] == kept["model"]
    for key, trial in found["trials"].items():
        tolerance = 100 * TOLERANCE if "bfloat16" in key else TOLERANCE  # that many digits it has
        assert differences(trial["metrics"], kept["trials"][key]["metrics"], tolerance) == [], key


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return produce.save_model(tmp_path_factory.mktemp("models") / "golden")


@pytest.fixture
def swept(workplace, model, trials_here):
    """The folder of a study that has run."""
    file, heard = produce.study_file(workplace, model), Heard()
    assert produce.sweep_study(file, heard).ending == "complete" and len(heard.results) == 6
    return file


def test_commands_and_runs(swept, model, locft):
    """What the commands say of a finished study, and what MLflow holds of it."""

    def call(*arguments):
        said = locft(*arguments)
        assert said.code == 0, said.err
        return said.json

    check("runs", produce.mlflow_runs(swept.parent, model), TOLERANCE)
    check("commands", produce.commands(call, swept, model), TOLERANCE)


def test_an_old_store_is_gone_on_with(workplace, model, trials_here):
    """A study that an earlier version left unfinished: what it finished is not run again."""
    if WRITING and not produce.OLD_STORE.exists():
        return produce.make_old_store(workplace, model)
    (workplace / "mlflow.db").unlink()
    produce.unpack_old_store(workplace, model)
    file, before, heard = produce.study_file(workplace, model), produce.trial_runs(workplace), Heard()
    planned = [trial.id for trial in prepare(load_study(str(file))).plan.trials]
    assert 0 < len(before) < 6 and set(before) < set(planned)
    done = produce.sweep_study(file, heard)
    assert done.ending == "complete" and (done.state.done, done.state.failed, done.state.left) == (6, 0, 0)
    assert sorted(result.config.id for result in heard.results) == sorted(set(planned) - set(before))
    after = produce.trial_runs(workplace)
    assert sorted(after) == sorted(planned) and len({run["run"] for run in after.values()}) == 6
    assert {key: after[key] for key in before} == before
    assert done.answer.recommendation is not None
