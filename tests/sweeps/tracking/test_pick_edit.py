"""The study's pick in the model registry: the delta that was measured, under the study's alias, ready to apply."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient

from locft.errors import InputError
from locft.model.delta import EditDelta
from sweeps import sweep as sweep_module
from sweeps.study.reader import load_study
from sweeps.study.resolve import prepare
from sweeps.sweep import run_sweep
from sweeps.tracking.address import resolve_uri
from sweeps.tracking.registry import fetch_edit, register_edit, registered_edit, registered_name, study_alias
from sweeps.tracking.study_run import Tracker
from tests.conftest import write_study
from tests.heard import Heard
from tests.mlflow_store import STUDY, config, result
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trials_here import in_this_process


def run(file, *overrides):
    return run_sweep(
        prepare(load_study(str(file), overrides)), resolve_uri(None), show=lambda _: Heard(), register=True
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory, empty_store, tiny_folder):
    """A finished study in the working directory: folder, file, and what two runs of it left. At the end of the first its pick
    could not be registered."""

    def other_hardware(*_):
        raise RuntimeError("another delta")

    folder = tmp_path_factory.mktemp("pick")
    shutil.copy(empty_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        in_this_process(here)
        file = write_study(folder, tiny_folder, name="my.study", space__layer=[1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sweep_module, "_register_pick", other_hardware)
            first = run(file)
        yield folder, file, first, run(file)


def test_a_pick_that_cannot_be_registered_leaves_the_study_finished(study):
    _, _, first, second = study
    assert first.state.left == 0 and first.registered is None and first.not_registered == "another delta"
    assert second.registered, "the same command, run again, registers it"


def test_the_pick_is_registered_once_and_can_be_applied(study, tiny_folder, locft, monkeypatch):
    workplace, file, _, done = study
    assert done.registered.startswith("models:/locft-edit-") and done.registered.endswith("@my-study")
    (row,) = done.state.results.to_dict("records")
    delta = EditDelta.load(fetch_edit(done.registered, resolve_uri(None), workplace / "fetched"))
    assert delta.position == "1.mlp_down" and delta.norm == row["delta_norm"], "bitwise what the trial measured"
    client = MlflowClient(f"sqlite:///{workplace}/mlflow.db")
    name = done.registered.removeprefix("models:/").partition("@")[0]
    version = client.get_model_version_by_alias(name, "my-study")
    assert version.run_id == row["run_id"] and version.tags["locft.position"] == "1.mlp_down"
    assert float(version.tags["locft.reliability"]) == pytest.approx(row["reliability"], abs=1e-3)
    assert f"locft apply {done.registered}" in version.description and "atlas, study my.study" in version.description
    _is_the_run_s_model(client, version, row)
    applied = locft("apply", done.registered, "--model", tiny_folder, "--out", workplace / "edited", "--json")
    assert applied.code == 0 and applied.json["position"] == "1.mlp_down"
    experiment = client.get_experiment_by_name("my.study").experiment_id
    (whole,) = client.search_runs([experiment], "tags.`locft.kind` = 'study'")
    assert whole.data.tags["locft.registered"] == done.registered
    assert f"locft apply {done.registered}" in whole.data.tags["mlflow.note.content"]

    monkeypatch.setattr("sweeps.session.ray_cluster", lambda *_: pytest.fail("there is nothing to run"))
    again = run(file)
    assert again.registered == done.registered and len(client.search_model_versions(f"name = '{name}'")) == 1


def _is_the_run_s_model(client, version, row):
    """The version is a logged model of the trial's run, with the run's metrics, each with its data set."""
    (output,) = client.get_run(row["run_id"]).outputs.model_outputs
    logged = client.get_logged_model(output.model_id)
    assert version.source == logged.artifact_location
    assert (logged.source_run_id, logged.status, logged.model_type) == (row["run_id"], "READY", "edited-model")
    trial = client.get_run(row["run_id"])
    assert [one.model_id for one in trial.outputs.model_outputs] == [logged.model_id]
    found = {metric.key: (metric.value, metric.dataset_name) for metric in logged.metrics}
    assert found["reliability"] == (row["reliability"], "atlas") and found["capability"][0] == row["capability"]
    assert found["capability"][1] != "atlas" and len(found) > 8
    assert len(client.get_metric_history(row["run_id"], "epoch_loss")) == 8, "what the run says of itself stays"
    (ranked,) = client.search_logged_models(
        [trial.info.experiment_id],
        "model_type = 'edited-model'",
        order_by=[{"field_name": "metrics.reliability", "ascending": False, "dataset_name": "atlas"}],
    )
    assert ranked.model_id == logged.model_id


def test_a_registered_edit_answers_prompts(study, tiny_folder, locft):
    """Loaded by MLflow as it stands: the unedited model and the delta, nothing pickled. What it says is what `ask` says."""
    import mlflow

    workplace, registered = study[0], study[3].registered
    prompts = ["The capital of France is", "The official language"]
    asked = locft("ask", tiny_folder, *prompts, "--delta", registered, "--tokens", 6, "--json").json["answers"]
    uri = f"sqlite:///{workplace}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    try:
        model = mlflow.pyfunc.load_model(registered, model_config={"tokens": 6, "device": "cpu"})
        expected = [one["after"] for one in asked]
        assert model.predict(prompts) == expected and expected != [one["before"] for one in asked]
        assert model.predict(pd.DataFrame({"prompt": prompts})) == expected
        assert model.predict(np.array(prompts)) == expected
        with pytest.raises(InputError, match="fingerprint"):
            other = tiny_model(seed=3)
            other.save_pretrained(workplace / "other")
            tiny_tokenizer().save_pretrained(workplace / "other")
            mlflow.pyfunc.load_model(registered, model_config={"model": str(workplace / "other")})
    finally:
        mlflow.set_tracking_uri(None)
    folder = fetch_edit(registered, resolve_uri(None), workplace / "kept")
    assert {file.suffix for file in folder.iterdir()} <= {".safetensors", ".json", "", ".yaml"}, "nothing is pickled"


def test_ctrl_c_or_the_budget_ends_the_registering_and_not_the_answer(workplace, study_file, trials_here, monkeypatch):
    def half_a_minute_each(source, work, *, reporter, **_):
        for trial in source:
            found = result(trial)
            reporter.finished(dataclasses.replace(found, metrics={**found.metrics, "train_seconds": 30.0}), 0)
        return "complete"

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sweeps.run.runner.run_trials", half_a_minute_each)

    file = study_file(space__layer=[1])
    monkeypatch.setattr(sweep_module, "_register_pick", interrupted)
    done = run(file)
    assert done.state.left == 0 and done.answer.recommendation.position == "1.mlp_down"
    assert done.registered is None and done.not_registered == "interrupted; run the same command again to register it"
    monkeypatch.setattr(sweep_module, "_register_pick", lambda *_: pytest.fail("there is no time left"))
    assert "would exceed the budget's minutes" in run(file, "budget.minutes=0.4").not_registered


def test_aliases_are_what_mlflow_takes(workplace):
    assert study_alias("layer-sweep") == "layer-sweep" and study_alias("a.b_c") == "a-b_c"
    assert study_alias("v2") == "study-v2" and study_alias("latest") == "study-latest"
    assert registered_edit("nothing", "latest-of-all", resolve_uri(None)) is None


@pytest.mark.parametrize(("file", "model"), [("mlflow.db", "tiny"), ("elsewhere/store.db", "ann@corp/tiny")])
def test_every_registration_of_a_run_keeps_its_own_delta(workplace, file, model):
    """The study's pick, then the same run repeated with another rate, in whichever store: MLflow's default one plays no part."""
    if file != "mlflow.db":
        (workplace / "mlflow.db").unlink()
    uri = resolve_uri(f"sqlite:///{file}")
    tracker = Tracker.open(uri, "registered", STUDY)
    tracker.open_run("registered", study_yaml="", description="", environment={})
    run_id = tracker.log_trial(result(config(1)))

    def saved(size):
        delta = EditDelta("1.mlp_down", "f" * 16, {"weight": torch.full((2,), size)})
        return delta.save(workplace / f"{size:g}").parent

    for size, alias in ((2.0, "study"), (3.0, "chosen")):
        register_edit(saved(size), run_id, model, "1.mlp_down", {}, uri, alias)
    for address, size in {"@study": 2, "@chosen": 3, "/1": 2, "/2": 3}.items():
        folder = fetch_edit(
            f"models:/{registered_name('edit', model)}{address}", uri, workplace / f"fetched{address.strip('/')}"
        )
        assert EditDelta.load(folder).tensors["weight"].tolist() == [size, size], address
    assert [path.name for path in workplace.rglob("*.db")] == [Path(file).name]
