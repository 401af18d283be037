"""An axis is declared once: one more declaration, and everything between a study file and the results table knows it."""

import json
import subprocess
import sys

import pytest

from analysis.stats.axes import AXES
from locft.errors import InputError
from sweeps.study.schema import read_value

WITH_MOMENTUM = """
import json
import analysis.stats.axes as axes

warmth = axes.Axis("warmth", float, 0.9, "warmth", "of the optimiser", at_least=0, below=1)
axes.AXES += (warmth,)
axes.SWEPT += (warmth,)
axes.SETTING += ("warmth",)
axes.AXIS["warmth"] = warmth

from analysis.stats.table import results_frame
from locft.errors import InputError
from sweeps.study.plan import make_plan, optuna_space
from sweeps.study.reader import load_study
from sweeps.study.trial_types import TrialResult
from tests.sweeps.study.test_plan import FACTS

def plan(*overrides):
    study = load_study("pipeline-check", ["space.layer=3", *overrides])
    return make_plan(study, FACTS).trials, optuna_space(study, FACTS)

try:
    plan("space.warmth=[0.5, 1.5]")
except InputError as error:
    problems = error.problems
trials, space = plan("space.warmth=[0.5, 0.9]")
rows = results_frame([TrialResult(trial, "done").to_row() for trial in trials])
print(json.dumps({
    "problems": problems,
    "plain": sorted(trial.id for trial in plan()[0]),
    "trials": {trial.id: trial.warmth for trial in trials},
    "trained": trials[0].training["warmth"],
    "space": space["warmth"],
    "column": sorted(set(rows["warmth"])),
}))
"""


def test_a_new_axis_is_declared_and_nothing_else():
    from sweeps.study.plan import make_plan
    from sweeps.study.reader import load_study
    from tests.sweeps.study.test_plan import FACTS

    done = subprocess.run([sys.executable, "-c", WITH_MOMENTUM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    without = [trial.id for trial in make_plan(load_study("pipeline-check", ["space.layer=3"]), FACTS).trials]
    assert found["plain"] == sorted(without), "at its default it changes no id"
    assert sorted(id for id, warmth in found["trials"].items() if warmth == 0.9) == sorted(without)
    assert len(found["trials"]) == 2 * len(without)
    assert found["trained"] in (0.5, 0.9) and found["space"] == found["column"] == [0.5, 0.9]
    (problem,) = found["problems"]
    assert problem.endswith("space.warmth[1]: got 1.5, expected a number of at least 0 and below 1")


@pytest.mark.parametrize("axis", [axis for axis in AXES if axis.default is not None], ids=lambda axis: axis.name)
def test_a_value_is_checked_by_its_axis(axis):
    assert read_value(axis.name, axis.default) == axis.default
    with pytest.raises(InputError) as caught:
        read_value(axis.name, None)
    assert str(caught.value) == f"got nothing, expected {axis.expected()}"
