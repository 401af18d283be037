"""The platform as a notebook uses it."""

from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest

import sweeps
from locft.errors import InputError
from sweeps.answer import foresee
from sweeps.study.estimate import machine
from sweeps.study.reader import as_override, load_study
from sweeps.study.resolve import prepare
from sweeps.tracking.address import resolve_uri
from tests.heard import Heard


def test_a_study_runs_its_results_are_drawn_and_tell_what_more_trials_will_take(workplace, study_file, trials_here):
    file, heard = study_file(), Heard()
    assert sweeps.load_results(file).empty
    done = sweeps.run_study(file, {"space.module": ["mlp_down", "attn"]}, reporter=heard)
    assert done.ending == "complete" and len(heard.results) == 4 and done.answer.recommendation is not None
    results = sweeps.load_results(file, {"space.module": ["mlp_down", "attn"]})
    assert sorted(results["trial_id"]) == sorted(result.config.id for result in heard.results)
    assert len(sweeps.load_results(file)) == 2, "the narrower study has two of them"
    found = sweeps.figures(results)
    assert {"front", "reliability", "capability_change", "drift_kl", "losses"} <= set(found)
    assert all(isinstance(figure, go.Figure) and len(figure.data) for figure in found.values())

    wider = prepare(load_study(str(file), ["space.module=[mlp_down, attn]", "space.seed=[0, 1]"]))
    forecast = foresee(wider, resolve_uri(None))
    assert forecast.estimate.trials == 4 and forecast.estimate.source == "4 earlier trials of this model"
    expected = sum(forecast.seconds(trial) for trial in wider.plan.trials if trial.seed == 0)
    assert 1 / 3 < expected / results["seconds"].sum() < 3, "milliseconds each, so only roughly"
    assert foresee(wider, f"sqlite:///{workplace}/absent.db").estimate.trials == 8
    assert not (workplace / "absent.db").exists()
    assert machine(wider.study.resources).endswith(" 1 CPU 0 GPU")


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("space.layer", range(3), "[0, 1, 2]"),
        ("space.layer", np.arange(3), "[0, 1, 2]"),
        ("space.learning_rate", [np.float64(0.004), 1e-05], "[0.004, 0.00001]"),
        ("edits.limit", np.int64(3), "3"),
        ("capability", {"suite": None}, "{suite: null}"),
        ("edits.source", "𠮷 \u2028\x7f\x85.jsonl", '"𠮷 \\u2028\\x7f\\x85.jsonl"'),
        ("edits.source", Path("𠮷.jsonl"), "𠮷.jsonl"),
        ("edits.map", {"prompt": ["👍 f:"]}, '{prompt: ["👍 f:"]}'),
    ],
)
def test_changes_are_those_of_the_command(field, value, text, study_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if field == "edits.source":
        Path(value).touch()
    file = str(study_file())
    assert load_study(file, [as_override(field, value)]) == load_study(file, [f"{field}={text}"])


@pytest.mark.parametrize("value", [{1, 2}, object(), [print], {("a", "b"): 1}])
def test_a_change_that_no_study_file_can_hold_is_told(value, study_file):
    with pytest.raises(InputError, match="^space.layer: got .*, expected text, numbers"):
        sweeps.load_results(study_file(), {"space.layer": value})


def test_wrong_changes_are_told(study_file):
    with pytest.raises(InputError, match="space.modul"):
        sweeps.run_study(study_file(), {"space.modul": "mlp"})
    with pytest.raises(AttributeError):
        sweeps.no_such_thing  # noqa: B018
