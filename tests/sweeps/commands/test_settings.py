"""The settings of one edit: options over a repeated trial's over the defaults."""

import json

import pytest

from locft.errors import InputError
from locft.model.precision import training_precision
from locft.train.pipelines import TrainingSettings
from sweeps.commands.settings import EDIT_ITEMS, edit_settings
from sweeps.study.reader import load_study, study_to_yaml
from sweeps.study.schema import Capability, Edits
from sweeps.tracking.address import resolve_uri
from sweeps.tracking.study_run import Tracker
from tests.mlflow_store import config, open_study, result

ATLAS = Edits(source="atlas", limit=5)
DEFAULTS = {"method": "natural_gradient", "train_formats": "raw,qa,chat", "epochs": 100, "rest_below": 0.05}
CHANGES = ["edits.limit=7", "edits.sample_seed=3", "capability.limit=4", "resources.cpus=2", "device=cpu"]


@pytest.fixture
def run_id(workplace):
    """The MLflow run of a trial, and of its study in the default store."""
    tracker = Tracker.open(resolve_uri(None), "layer-sweep", "study-1")
    open_study(tracker)
    tracker.write_file("study.yaml", study_to_yaml(load_study("layer-sweep", CHANGES)))
    trial = config(7, "attn", batch_size=3, learning_rate=1e-05, pipeline="depth_first", seed=4, dtype="bfloat16")
    return tracker.log_trial(result(trial))


def settings(position=None, edits=None, from_run=None, dtype=None, ask=None, **given):
    return edit_settings(position, given | {"ask_formats": ask}, dtype, edits, from_run, resolve_uri(None))


def test_defaults():
    chosen = settings("22.mlp_down", ATLAS, batch_size=None)
    assert chosen.position == "22.mlp_down"
    assert chosen.training == TrainingSettings(precision=training_precision("auto"), **DEFAULTS)
    assert chosen.ask_formats == ("raw", "qa", "chat")
    assert (chosen.edits, chosen.capability) == (ATLAS, Capability(limit=EDIT_ITEMS))
    assert (chosen.dtype, chosen.device, chosen.threads, chosen.model_fingerprint) == ("float32", "auto", None, None)


def test_options_over_defaults():
    chosen = settings("1.mlp", ATLAS, dtype="bfloat16", batch_size=4, learning_rate=0.1, pipeline="depth_first")
    given = {"batch_size": 4, "learning_rate": 0.1, "pipeline": "depth_first"}
    assert chosen.training == TrainingSettings(precision=training_precision("auto"), **DEFAULTS, **given)
    assert chosen.dtype == "bfloat16"


def test_a_trial_is_repeated_with_everything_that_decides_its_numbers(run_id):
    chosen = settings(from_run=run_id)
    assert chosen.position == "7.attn"
    assert chosen.training == TrainingSettings(
        pipeline="depth_first", batch_size=3, learning_rate=1e-05, epochs=25, seed=4, skip_below=0.01, stop_below=0.01
    )
    assert (chosen.dtype, chosen.device, chosen.threads) == ("bfloat16", "cpu", 2)
    assert chosen.edits == Edits(source="atlas", limit=7, sample_seed=3)
    assert chosen.capability == Capability(limit=4)
    assert chosen.model_fingerprint == config().model_fingerprint


def test_options_over_a_trial(run_id):
    chosen = settings("9.mlp", ATLAS, run_id, batch_size=1)
    assert (chosen.position, chosen.edits) == ("9.mlp", ATLAS)
    assert chosen.training.batch_size == 1 and chosen.training.pipeline == "depth_first"


def test_a_trial_is_asked_as_its_study_was(run_id):
    assert settings(from_run=run_id).ask_formats == ("raw", "qa", "chat"), "so does layer-sweep"
    assert settings(from_run=run_id).training.train_formats == "raw", "and this one trial was trained so"
    again = settings(from_run=run_id, ask="raw", train_formats="qa, raw", method="lora", rank=4)
    assert again.ask_formats == ("raw",) and again.training.train_formats == "raw,qa"
    assert (again.training.method, again.training.rank) == ("lora", 4)


def test_a_position_file_carries_settings_and_formats(tmp_path):
    found = {
        "format": "locft-position/1", "model": "tiny", "model_fingerprint": "0" * 16, "dtype": "float32", "depth": 0.5,
        "position": "1.mlp", "settings": {"method": "lora", "rank": 2, "train_formats": "chat,raw"},
        "ask_formats": ["raw", "chat"],
    }  # fmt: skip
    file = tmp_path / "position.json"
    file.write_text(json.dumps(found))
    chosen = settings(str(file), ATLAS)
    assert (chosen.training.method, chosen.training.rank, chosen.training.train_formats) == ("lora", 2, "raw,chat")
    assert chosen.ask_formats == ("raw", "chat") and settings(str(file), ATLAS, ask="qa").ask_formats == ("qa",)
    del found["ask_formats"], found["settings"]["train_formats"]
    file.write_text(json.dumps(found))
    older = settings(str(file), ATLAS)
    assert (older.training.train_formats, older.ask_formats) == ("raw", ("raw",)), "what an older file was found with"
    found["settings"] |= {"adam_basis": "weights", "curvature_share": 0.0}  # gone axes, where they changed nothing
    file.write_text(json.dumps(found))
    assert settings(str(file), ATLAS) == older
    found["settings"]["curvature_share"] = 0.3
    file.write_text(json.dumps(found))
    with pytest.raises(InputError, match=r"settings\.curvature_share: unknown"):
        settings(str(file), ATLAS)
    del found["settings"]["adam_basis"], found["settings"]["curvature_share"]
    file.write_text(json.dumps(found | {"ask_formats": ["chta"], "settings": {"train_formats": "unseen"}}))
    with pytest.raises(InputError) as caught:
        settings(str(file), ATLAS)
    told = "\n".join(caught.value.problems)
    assert "ask_formats: got 'chta'" in told and "settings.train_formats: got 'unseen'" in told


def test_a_trial_of_a_study_that_is_gone_needs_the_edits_named(workplace):
    run_id = Tracker.open(resolve_uri(None), "orphans", "gone").log_trial(result(config(7)))
    with pytest.raises(InputError, match="--edits"):
        settings(from_run=run_id)
    assert settings(from_run=run_id, edits=ATLAS).edits == ATLAS


def test_an_unknown_run(workplace):
    with pytest.raises(InputError, match="nonsense"):
        settings(from_run="nonsense")


def test_every_bad_option_at_once():
    bad = dict(pipeline="sideways", batch_size=0, epochs=-1, learning_rate=float("nan"), loss_average="median", seed=-1)
    bad |= dict(method="ful", train_formats="unseen", ask="chta")
    with pytest.raises(InputError) as caught:
        settings(**bad)
    told = "\n".join(caught.value.problems)
    for option in ("--pipeline", "--batch-size", "--epochs", "--learning-rate", "--loss-average", "--seed", "--method"):
        assert option in told
    assert "--train-formats: got 'unseen'" in told and "--ask-formats: got 'chta'" in told
    assert "--position" in told and "--edits" in told and len(caught.value.problems) == 11


@pytest.mark.parametrize("rate", [-0.1, 0.0, float("inf")])
def test_a_learning_rate_is_positive(rate):
    with pytest.raises(InputError, match="--learning-rate: got .* expected a (finite )?number above 0"):
        settings("1.mlp", ATLAS, learning_rate=rate)


def test_a_position_is_checked_with_the_options():
    with pytest.raises(InputError) as caught:
        settings("mlp.3", ATLAS, batch_size=0)
    assert "'mlp.3'" in caught.value.problems[1] and "--batch-size" in caught.value.problems[0]
