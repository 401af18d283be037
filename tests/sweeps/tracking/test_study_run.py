"""The record of studies in MLflow: what is written comes back, once, whatever breaks in between."""

import dataclasses
import json
import math
import os
import shutil
import socket
import time

import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Param
from mlflow.exceptions import MlflowException
from mlflow.protos import databricks_pb2 as error_codes
from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository

from analysis.stats.axes import AXES
from locft.errors import InputError
from sweeps.study.trial_types import pack_result, unpack_result
from sweeps.tracking import address, pages
from sweeps.tracking.store import Refused, TrackingError
from sweeps.tracking.study_run import Tracker, find_tracker, find_trial, list_studies
from sweeps.tracking.trial_run import config_of
from tests.mlflow_store import STUDY, config, failure, finish, open_study, result, web_server


@pytest.fixture(scope="module")
def store(tmp_path_factory, empty_store):
    """The address of an SQLite store that the tests share, its folder being the working directory."""
    folder = tmp_path_factory.mktemp("store")
    shutil.copy(empty_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield f"sqlite:///{folder}/mlflow.db"


@pytest.fixture
def tracker(store, request):
    """A study in an experiment of its own."""
    return Tracker.open(store, request.node.name, STUDY)


def of_study(tracker, study_id):
    """Another study in the same experiment."""
    return Tracker(tracker._store, tracker.experiment_id, study_id)


def finished(tracker):
    """Trial id -> run id of every trial that is done."""
    results = tracker.load_results(curves=False)
    done = results[results["status"] == "done"]
    return dict(zip(done["trial_id"], done["run_id"], strict=True))


def runs(tracker):
    return tracker.client.search_runs([tracker.experiment_id], "tags.`locft.kind` = 'trial'", max_results=1000)


def test_results_come_back_exactly(tracker):
    _, inputs = open_study(tracker)
    done = [result(config(layer, learning_rate=rate)) for layer in (0, 29) for rate in (0.004, 1e-05)]
    lost = failure(config(7))
    ids = {r.config.id: tracker.log_trial(r, inputs) for r in (*done, lost)}

    table = tracker.load_results()
    assert len(table) == 5
    rows = {row["trial_id"]: row for row in table.to_dict("records")}
    for expected in (*done, lost):
        row = rows[expected.config.id]
        for key, value in expected.to_row().items():
            assert row[key] == value and type(row[key]) in (type(value), int, float, bool), key
        assert row["run_id"] == ids[expected.config.id]
    assert math.isnan(rows[lost.config.id]["reliability"]) and rows[lost.config.id]["error"] == lost.error
    assert finished(tracker) == {r.config.id: ids[r.config.id] for r in done}


def test_a_trial_run_shows_what_it_is(tracker):
    _, inputs = open_study(tracker)
    trial = result(config(22))
    run = tracker.client.get_run(tracker.log_trial(trial, inputs))
    assert run.info.run_name == pages.run_name(trial.config) == "22.mlp_down bf b10 lr0.004 s0"
    assert run.info.status == "FINISHED"
    assert run.info.end_time - run.info.start_time == pytest.approx(31_400, abs=5_000)
    shown = {"layer": "22", "depth": "0.759", "position": "22.mlp_down", "learning_rate": "0.004", "dtype": "float32"}
    assert run.data.params.items() >= shown.items()
    tags = {"locft.kind": "trial", "locft.trial_id": trial.config.id, "locft.study_id": STUDY, "locft.status": "done"}
    tags |= {"locft.model": "HuggingFaceTB/SmolLM2-135M", "locft.edits": "atlas", "locft.capability": "probes"}
    assert run.data.tags.items() >= tags.items()
    note = run.data.tags["mlflow.note.content"]
    assert f"locft edit MODEL --from-run {run.info.run_id}" in note
    assert {data.dataset.name for data in run.inputs.dataset_inputs} == {"atlas", "probes"}
    (model,) = tracker.client.search_logged_models([tracker.experiment_id])
    assert [linked.model_id for linked in run.inputs.model_inputs] == [model.model_id]
    assert model.params == {"layers": "30", "dtype": "float32"}
    history = tracker.client.get_metric_history(run.info.run_id, "epoch_loss")
    assert [(point.step, point.value) for point in history] == list(enumerate(trial.epoch_losses))


def test_the_parameters_are_the_axes_that_count(tracker):
    trial = config(22, method="lora", rank=4, train_formats="raw,qa")
    asked = {"reliability": 0.75, "reliability.raw": 1.0, "reliability.qa": 0.5}
    run = tracker.client.get_run(tracker.log_trial(dataclasses.replace(result(trial), metrics=asked)))
    assert run.info.run_name == "22.mlp_down bf b10 lr0.004 s0 lora rank 4 trained raw,qa"
    shown = {"method": "lora", "rank": "4", "alpha": "16.0", "train_formats": "raw,qa", "guard": "none", "shrink": "no"}
    assert run.data.params.items() >= shown.items()
    assert not {"curvature_strength", "norm_bound", "guard_weight"} & run.data.params.keys()
    assert {name: run.data.metrics[name] for name in asked} == asked
    assert config_of(run) == trial
    plain = tracker.client.get_run(tracker.log_trial(result(config(23))))
    assert "rank" not in plain.data.params and config_of(plain) == config(23)
    natural = tracker.client.get_run(tracker.log_trial(result(config(24, method="natural_gradient"))))
    assert natural.info.run_name == "24.mlp_down bf b10 s0 natural_gradient"
    assert "learning_rate" not in natural.data.params and config_of(natural) == config(24, method="natural_gradient")
    for axis in AXES:  # as a run of an earlier version
        if not axis.in_first_ids:
            plain.data.params.pop(axis.name, None)
    assert config_of(plain) == config(23)


def test_outcomes_come_back(tracker):
    open_study(tracker)
    trial = result()
    run_id = tracker.log_trial(trial)
    pd.testing.assert_frame_equal(tracker.load_outcomes(run_id), pd.DataFrame(trial.outcomes))
    empty = tracker.load_outcomes(tracker.log_trial(failure(config(1))))
    assert len(empty) == 0 and "prompt" in empty.columns


def test_a_second_delivery_changes_nothing(tracker):
    _, inputs = open_study(tracker)
    trial = result()
    first = tracker.log_trial(trial, inputs)
    before = tracker.client.get_run(first)
    assert tracker.log_trial(trial, inputs) == first
    assert len(runs(tracker)) == 1
    assert tracker.client.get_run(first).to_dictionary() == before.to_dictionary()


@pytest.mark.parametrize("broken", ["log_batch", "log_text", "log_inputs", "set_terminated"])
def test_a_delivery_that_breaks_off_is_completed_by_the_next(tracker, monkeypatch, broken):
    _, inputs = open_study(tracker)
    trial = result()

    def fail(*args, **kwargs):
        raise ConnectionError("http://user:secret@host is gone")

    with monkeypatch.context() as patch:
        patch.setattr(tracker.client, broken, fail)
        with pytest.raises(TrackingError, match="is gone") as caught:
            tracker.log_trial(trial, inputs)
    assert "secret" not in str(caught.value)
    assert len(tracker.load_results()) == 0
    if broken in ("log_text", "log_inputs"):
        assert runs(tracker)[0].info.status == "FAILED"

    run_id = tracker.log_trial(trial, inputs)
    assert [run.info.run_id for run in runs(tracker)] == [run_id]
    assert finished(tracker) == {trial.config.id: run_id}
    assert tracker.load_results().iloc[0]["epoch_losses"] == list(trial.epoch_losses)
    assert len(tracker.client.get_metric_history(run_id, "epoch_loss")) == len(trial.epoch_losses)
    assert len(tracker.client.get_run(run_id).inputs.dataset_inputs) == 2


def test_a_failed_trial_may_succeed_later(tracker):
    open_study(tracker)
    trial = result()
    first = dataclasses.replace(
        failure(trial.config), metrics={"train_loss": 9.0, "seconds": 99.0}, epoch_losses=(9.0, 9.0)
    )
    run_id = tracker.log_trial(first)
    run = tracker.client.get_run(run_id)
    assert run.info.status == "FAILED" and run.data.tags["locft.error"] == first.error
    time.sleep(0.05)
    assert tracker.log_trial(trial) == run_id
    row = tracker.load_results().iloc[0]
    assert (row["status"], row["error"], row["train_loss"], row["seconds"]) == ("done", None, 0.01, 31.4)
    assert row["epoch_losses"] == list(trial.epoch_losses)


def test_what_the_store_will_not_have_is_told_from_a_store_that_is_away(tracker, monkeypatch):
    open_study(tracker)
    trial = dataclasses.replace(result(), metrics={"x" * 300: 0.5})
    with pytest.raises(Refused, match="x"):
        tracker.log_trial(trial)

    def denied(*args, **kwargs):
        raise MlflowException("not yours", error_code=error_codes.PERMISSION_DENIED)

    monkeypatch.setattr(tracker.client, "log_batch", denied)
    with pytest.raises(TrackingError, match="not yours") as caught:
        tracker.log_trial(result())
    assert not isinstance(caught.value, Refused), "the permission may come, and then it is taken"


@pytest.mark.parametrize("status", [400, 413])
def test_files_that_a_proxy_refuses_cost_nothing_else(tracker, monkeypatch, caplog, status):
    """It limits the size of what is sent."""

    def upload(*_, **__):
        HttpArtifactRepository(f"{server}/api/2.0/mlflow-artifacts/artifacts/1").log_artifact(__file__)

    run_id, inputs = open_study(tracker)
    with web_server(status, "<html>too large</html>") as port:
        server = f"http://127.0.0.1:{port}"
        for name in ("log_text", "log_artifact"):
            monkeypatch.setattr(tracker.client, name, upload)
        trial_run = tracker.log_trial(result(), inputs)
        finish(tracker, tracker.load_results(), "<h1>Report</h1>")
        monkeypatch.setattr(tracker.client, "log_batch", MlflowClient(server).log_batch)
        with pytest.raises(Refused, match="too large"):
            tracker.log_trial(result(config(4)))
    assert finished(tracker) == {config().id: trial_run} and tracker.load_outcomes(trial_run).empty
    assert tracker.client.get_run(run_id).data.tags["locft.status"] == "done"
    for name in (f"outcomes.json of trial {config().id}", "dashboard.html", "results.parquet", "recommendation.json"):
        assert sum(name in said and str(status) in said for said in caplog.messages) == 1


def test_why_a_trial_was_tried_again_comes_back(tracker):
    open_study(tracker)
    trial = dataclasses.replace(result(), retried=("worker died: killed", "node lost"))
    run_id = tracker.log_trial(unpack_result(pack_result(trial)))
    tracker.log_trial(result(config(1)))
    tags = tracker.client.get_run(run_id).data.tags
    assert tags["locft.retried"] == "worker died: killed\nnode lost"
    assert "Retried after: worker died: killed; node lost" in tags["mlflow.note.content"]
    table = tracker.load_results()
    assert list(table["retried"]) == ["worker died: killed\nnode lost", None]
    finish(tracker, table, "")


def test_a_study_that_broke_off_is_not_left_open(tracker):
    run_id, _ = open_study(tracker)
    began, ended = tracker.times()
    assert began is not None and ended is None
    tracker.abandon()
    assert tracker.times()[1] is not None
    run = tracker.client.get_run(run_id)
    assert run.info.status == "KILLED" and run.data.tags["locft.status"] == "stopped"
    open_study(tracker)
    assert tracker.times() == (began, None), "it runs again, so the earlier end is not its end"
    tracker.log_trial(result())
    finish(tracker, tracker.load_results(), "")
    tracker.abandon()
    assert tracker.client.get_run(run_id).info.status == "FINISHED", "it did not break off"
    of_study(tracker, "never ran").abandon()


def test_doubled_runs_are_one_when_the_study_ends(tracker):
    """As two drivers would leave them: both finished, or one of them failed. Or as a lost response would: one is still open."""
    open_study(tracker)
    client = tracker.client
    for trial, status in ((result(), "done"), (result(config(4)), "failed"), (failure(config(5)), "failed")):
        run = client.get_run(tracker.log_trial(trial))
        double = client.create_run(tracker.experiment_id, tags={**run.data.tags, "locft.status": status}).info.run_id
        client.log_batch(double, params=[Param(*pair) for pair in run.data.params.items()])
        client.set_terminated(double, "FINISHED" if status == "done" else "FAILED")
    run_id = tracker.log_trial(result(config(6)))
    client.create_run(tracker.experiment_id, tags=client.get_run(run_id).data.tags)
    assert tracker.log_trial(result(config(6))) == run_id
    table = tracker.load_results()
    assert len(table) == 4 and len(runs(tracker)) == 8
    finish(tracker, table, "")
    assert sorted(run.info.run_id for run in runs(tracker)) == sorted(table["run_id"])


def test_a_killed_driver_leaves_no_open_run(tracker, store):
    study_run, _ = open_study(tracker)
    tags = {"locft.kind": "trial", "locft.study_id": STUDY, "locft.trial_id": config().id, "locft.status": "done"}
    left = tracker.client.create_run(tracker.experiment_id, tags=tags).info.run_id
    closed = tracker.log_trial(result(config(4)))

    again = Tracker.open(store, "test_a_killed_driver_leaves_no_open_run", STUDY)
    assert open_study(again)[0] == study_run
    assert again.client.get_run(left).info.status == "KILLED"
    assert again.client.get_run(closed).info.status == "FINISHED"
    assert finished(again) == {config(4).id: closed}
    assert again.log_trial(result()) == left
    assert again.client.get_run(left).info.status == "FINISHED"


def test_the_study_run_carries_the_answer(tracker):
    run_id, inputs = open_study(tracker)
    for layer in range(3):
        tracker.log_trial(result(config(layer)), inputs)
    table = tracker.load_results()
    finish(tracker, table, "<h1>Report</h1>")
    run = tracker.client.get_run(run_id)
    best = table.sort_values("reliability").iloc[-1]
    assert run.info.status == "FINISHED" and run.data.tags["locft.status"] == "done"
    assert run.data.tags["locft.pick.trial_ids"] == best.trial_id
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith(f"**{best.layer}.mlp_down** edits best.\n\n[Dashboard](#/experiments/")
    assert run.data.metrics == {"best_reliability": best.reliability, "hypervolume": 0.31, "trials_done": 3}
    artifacts = {file.path for file in tracker.client.list_artifacts(run_id)}
    assert artifacts == {
        *("study.yaml", "environment.json", "results.parquet", "dashboard.html", "recommendation.json")
    }
    picked = tracker.client.search_runs([tracker.experiment_id], "tags.`locft.pick` = 'pick'")
    assert [r.info.run_id for r in picked] == [best.run_id]

    # Widened and finished again: another pick takes the tag over.
    first = table.iloc[0 if best.trial_id != table.iloc[0].trial_id else 1]
    assert open_study(tracker)[0] == run_id
    assert tracker.client.get_run(run_id).info.status == "RUNNING"
    tracker.finish(table, "", {"trial_ids": (first.trial_id,)}, {}, "stopped", answer="")
    picked = tracker.client.search_runs([tracker.experiment_id], "tags.`locft.pick` = 'pick'")
    assert [r.info.run_id for r in picked] == [first.run_id]
    assert tracker.client.get_run(run_id).info.status == "KILLED"


def test_loss_curves_of_a_finished_study_are_read_from_its_table(tracker, monkeypatch):
    open_study(tracker)
    for layer in range(3):
        tracker.log_trial(result(config(layer)))
    table = tracker.load_results()
    finish(tracker, table, "")
    late = tracker.log_trial(result(config(9)))
    asked = []
    history = tracker.client.get_metric_history
    monkeypatch.setattr(tracker.client, "get_metric_history", lambda run, key: asked.append(run) or history(run, key))
    bare = tracker.load_results(curves=False)
    assert asked == [] and all(curve == [] for curve in bare["epoch_losses"])
    again = tracker.load_results()
    assert asked == [late]
    pd.testing.assert_frame_equal(again.drop(columns="epoch_losses"), bare.drop(columns="epoch_losses"))
    pd.testing.assert_frame_equal(again.iloc[:3], table)


def test_stages_of_a_stream_are_curves_of_the_run_and_come_back(tracker):
    open_study(tracker)
    stages = tuple({"arrived": float(edits), "reliability": 1 / edits, "first_tenth": 0.5} for edits in (2, 5, 9))
    stream = dataclasses.replace(result(config(pipeline="stream")), stages=stages)
    run_id = tracker.log_trial(stream)
    history = tracker.client.get_metric_history(run_id, "stage.reliability")
    assert [(point.step, point.value) for point in history] == [(2, 0.5), (5, 0.2), (9, pytest.approx(1 / 9))]
    row = tracker.load_results().iloc[0]
    assert tuple(json.loads(row["stages"])) == stages and not any(name.startswith("stage.") for name in row.index)


def test_a_broken_table_artifact_is_not_needed(tracker):
    run_id, _ = open_study(tracker)
    tracker.log_trial(result())
    tracker.client.log_text(run_id, "half a fi", "results.parquet")
    assert tracker.load_results().iloc[0]["epoch_losses"] == list(result().epoch_losses)


def test_long_and_odd_values(tracker):
    open_study(tracker)
    odd = dataclasses.replace(
        result(epochs=2500),
        epoch_losses=(*result(epochs=2500).epoch_losses, math.inf),
        metrics={"capability.my tâsk (v2)": 0.5, "reliability": 0.0, "perplexity": math.inf},
    )
    tracker.log_trial(odd)
    row = tracker.load_results().iloc[0]
    assert row["epoch_losses"] == list(odd.epoch_losses)
    assert row["reliability"] == 0 and row["capability.my tâsk _v2_"] == 0.5 and math.isnan(row["perplexity"])
    tracker.log_trial(failure(config(8), "x" * 20_000))
    assert len(tracker.load_results().iloc[1]["error"]) <= 5000


def test_studies_of_one_experiment_keep_apart(tracker):
    one, other = of_study(tracker, "a"), of_study(tracker, "b")
    for layer, study in ((7, one), (8, other)):
        _, inputs = open_study(study)
        study.log_trial(result(config(layer)), inputs)
    assert set(finished(one)) == {config(7).id} and list(other.load_results()["trial_id"]) == [config(8).id]
    assert len(runs(tracker)) == 2 and len(tracker.client.search_logged_models([tracker.experiment_id])) == 1


def test_empty_study(tracker):
    open_study(tracker)
    table = tracker.load_results()
    assert len(table) == 0 and {"trial_id", "reliability", "epoch_losses", "run_id"} <= set(table.columns)


def test_a_trial_is_found_by_its_run(tracker, store):
    study_run, inputs = open_study(tracker)
    trial = result(config(5, learning_rate=3e-05))
    run_id = tracker.log_trial(trial, inputs)
    found, study_yaml = find_trial(run_id, store)
    assert found == trial.config and study_yaml.startswith("name: layer-sweep")
    with pytest.raises(InputError, match="run of a whole study"):
        find_trial(study_run, store)
    with pytest.raises(InputError, match="not found"):
        find_trial("0" * 32, store)
    with pytest.raises(InputError, match="not a run of locft"):
        find_trial(tracker.client.create_run(tracker.experiment_id).info.run_id, store)


def test_links_and_list_of_studies(tracker, store, tmp_path):
    run_id, inputs = open_study(tracker)
    trial = tracker.log_trial(result(), inputs)
    links = tracker.links("http://127.0.0.1:5000/")
    page = f"http://127.0.0.1:5000/#/experiments/{tracker.experiment_id}/runs/{run_id}/artifacts/dashboard.html"
    assert links["dashboard"].startswith(page)
    experiment = tracker.client.get_experiment(tracker.experiment_id)
    assert f"runs/{run_id}/artifacts/dashboard.html" in experiment.tags["mlflow.note.content"].splitlines()[0]
    assert trial in links["compare"] and links["table"].startswith("http://127.0.0.1:5000/#/experiments/")
    assert len(pages.links("1", run_id, ["r" * 32] * 300)["compare"]) < 5000
    found = next(study for study in list_studies(store) if study["experiment_id"] == tracker.experiment_id)
    assert (found["name"], found["run_id"], found["links"]["dashboard"][0]) == ("layer-sweep", run_id, "#")
    assert list_studies(f"sqlite:///{tmp_path}/none.db") == [] and not (tmp_path / "none.db").exists()


def test_reading_creates_nothing(store, tmp_path):
    assert find_tracker(f"sqlite:///{tmp_path}/new.db", "study", STUDY) is None
    with pytest.raises(InputError, match="no tracking store"):
        find_trial("0" * 32, f"sqlite:///{tmp_path}/new.db")
    assert not (tmp_path / "new.db").exists()
    assert find_tracker(store, "never ran", STUDY) is None
    assert find_tracker(store, "never ran", STUDY) is None, "nor an experiment"


def test_files_of_a_study(tracker, store, request):
    assert tracker.read_file("baseline.json") is None
    with pytest.raises(TrackingError, match="call open_run first"):
        tracker.write_file("baseline.json", "{}")
    open_study(tracker)
    assert tracker.read_file("baseline.json") is None
    tracker.write_file("baseline.json", '{"größe": 1}')
    again = find_tracker(store, request.node.name, STUDY)
    assert again.read_file("baseline.json") == '{"größe": 1}'


def test_a_deleted_experiment_says_how_to_restore_it(tracker, store):
    tracker.client.delete_experiment(tracker.experiment_id)
    with pytest.raises(InputError, match=f"restore --experiment-id {tracker.experiment_id}"):
        Tracker.open(store, "test_a_deleted_experiment_says_how_to_restore_it", STUDY)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("./mlruns", r"plain path.*sqlite:///mlruns/mlflow\.db"),
        ("file:///data/runs", r"plain path.*sqlite:////data/runs/mlflow\.db"),
        ("results.db", r"plain path.*sqlite:///results\.db"),
        ("ftp://host/x", "unknown scheme 'ftp'"),
        ("sqlite://", "names no file"),
        ("http://", "names no host"),
        ("sqlite:////proc/locft/mlflow.db", "cannot write the tracking store in /proc/locft"),
        ("sqlite:///{file}/mlflow.db", "cannot write the tracking store"),
        ("sqlite:///{file}", "not an SQLite file"),
        ("sqlite:///{folder}", "is a folder"),
        ("http://{user}127.0.0.1:{port}", "cannot be reached.*refused"),
        ("postgresql://{user}127.0.0.1:{port}/mlflow", "needs the Python package|cannot be reached"),
    ],
)
def test_stores_that_cannot_be_used_are_refused_at_once(uri, message, tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # so that it is undone
    (tmp_path / "notes.txt").write_text("no database, but long enough for one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = uri.format(file=tmp_path / "notes.txt", folder=tmp_path, port=port, user="ann:s3cret@")
    started = time.monotonic()
    with pytest.raises(InputError, match=message) as caught:
        Tracker.open(address.resolve_uri(given), "study", STUDY)
    assert time.monotonic() - started < 15
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "body", "message"),
    [
        (401, "You are not authenticated", "refuses access.*MLFLOW_TRACKING_USERNAME"),
        (403, "Invalid Host header - possible DNS rebinding attack detected", "allowed-hosts"),
        (200, "<html>a shop</html>", "not an MLflow server"),
        (404, "nothing here", "not an MLflow server"),
        (200, "null", "not an MLflow server"),
    ],
)
def test_servers_that_do_not_let_us_in(code, body, message):
    with web_server(code, body) as port, pytest.raises(InputError, match=message):
        Tracker.open(f"http://127.0.0.1:{port}", "study", STUDY)


def test_default_address(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert address.resolve_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000/")
    assert address.resolve_uri(None) == address.resolve_uri("HTTP://host:5000") == "http://host:5000"
    assert address.resolve_uri("sqlite:///other.db") == f"sqlite:///{tmp_path}/other.db"


def test_passwords_leave_the_address(monkeypatch):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
    assert address.take_credentials("https://ann:p%40ss@host:5000/x") == "https://host:5000/x"
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("ann", "p@ss")
    redacted = address.redact("to postgresql://u:p@h/db and http://a:b@c")
    assert redacted == "to postgresql://***@h/db and http://***@c"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("postgresql://me:pa/ss@host/db", "postgresql://***@host/db"),
        ("postgresql://me:it's@host/db", "postgresql://***@host/db"),
        ("mysql+pymysql://me:p@s/s?#@host/db", "mysql+pymysql://***@host/db"),
        ("postgresql://host/db?user=me&password=se/cr@et", "postgresql://host/db?user=***&password=***"),
        ("postgresql://host:5432/db?sslpassword=secret&a=b", "postgresql://host:5432/db?sslpassword=***&a=b"),
        ("http://me:pa/ss@host:5000", "http://***@host:5000"),
        ("http://me@host:5000", "http://***@host:5000"),
        ("sqlite:////home/me@here/mlflow.db", "sqlite:////home/me@here/mlflow.db"),
        ("models:/name@alias", "models:/name@alias"),
        ("http://host:5000/api", "http://host:5000/api"),
    ],
)
def test_no_password_is_shown(given, shown):
    for text in ("{}", "store {} is away", "store '{}' is away", 'stores "{0}" and {0} are away'):
        assert address.redact(text.format(given)) == text.format(shown)


@pytest.mark.parametrize(
    "uri", ["http://me:pa/ss@host:5000", "http://me:p#ss@host:5000", "http://[::1:5000", "http://h:x"]
)
def test_an_http_address_that_cannot_be_read_is_told_without_its_password(uri):
    with pytest.raises(InputError, match=r"http\(s\)://HOST:PORT.*%2F") as caught:
        address.resolve_uri(uri)
    assert uri.count("@") == 0 or "'http://***@host:5000'" in str(caught.value)


def test_the_outcomes_file_has_the_form_of_a_table(tracker):
    open_study(tracker)
    run = tracker.client.get_run(tracker.log_trial(result()))
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "outcomes.json", "type": "table"}]
    assert len(tracker.client.load_table(tracker.experiment_id, "outcomes.json", [run.info.run_id])) == 60
