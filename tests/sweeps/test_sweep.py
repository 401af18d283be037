"""A study from end to end, with a real MLflow store and, where it is interrupted or out of time, real Ray workers, on a model
that trains in milliseconds. `tests/sweeps/run` has more of Ray."""

import dataclasses
import json
import math
import shutil
import signal
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

from locft.errors import InputError
from sweeps import sweep as sweep_module
from sweeps.answer import baseline_file, read_state
from sweeps.run.search import OptunaSearch
from sweeps.run.trial import _resident as resident
from sweeps.run.trial import resident_workbench, train_and_measure
from sweeps.study.reader import load_study
from sweeps.study.resolve import prepare
from sweeps.sweep import _open_trials, run_sweep
from sweeps.tracking.address import resolve_uri
from sweeps.tracking.outbox import open_outbox
from sweeps.tracking.store import Refused, TrackingError
from sweeps.tracking.study_run import Tracker, find_tracker
from tests.conftest import write_study
from tests.heard import TIMINGS, Heard, comparable
from tests.mlflow_store import result as stored_result
from tests.trials_here import in_this_process


def prepared(file, *overrides):
    return prepare(load_study(str(file), overrides))


def sweep(study, reporter=None):
    """Runs the study in the working directory; returns the Sweep and the ids of the trials that were run for it."""
    heard = reporter or Heard()
    return run_sweep(study, resolve_uri(None), show=lambda _: heard), [result.config.id for result in heard.results]


def client_here():
    """MLflow keeps one connection an address, whatever the working directory: give the whole path."""
    return MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")


def trial_runs(name="tiny", kind="trial"):
    client = client_here()
    experiment = client.get_experiment_by_name(name)
    return client.search_runs([experiment.experiment_id], f"tags.`locft.kind` = '{kind}'", max_results=1000)


def numbers(state):
    """Trial id -> its metrics but the timings."""
    rows = state.results.drop(columns=[*TIMINGS, "run_id"]).to_dict("records")
    return {row["trial_id"]: {key: repr(value) for key, value in row.items()} for row in rows}


@pytest.fixture(scope="module")
def place(tmp_path_factory, empty_store):
    """A working directory for the tests of one study, in which each goes on where the one before left it."""
    folder = tmp_path_factory.mktemp("sweep")
    shutil.copy(empty_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def grid(place, tiny_folder):
    """A finished grid study of four trials."""
    file = write_study(place, tiny_folder, space__module=["mlp_down", "attn"])
    study = prepared(file)
    with pytest.MonkeyPatch.context() as patch:
        in_this_process(patch)
        done, ran = sweep(study)
    assert len(ran) == 4
    return file, study, done


def test_every_trial_is_in_mlflow_once_with_parameters_and_metrics(grid):
    _, study, done = grid
    assert (done.ending, done.state.done, done.state.failed, done.state.left) == ("complete", 4, 0, 0)
    found = trial_runs()
    assert sorted(run.data.tags["locft.trial_id"] for run in found) == sorted(t.id for t in study.plan.trials)
    for run in found:
        assert run.info.status == "FINISHED"
        assert run.data.params["position"] in ("0.mlp_down", "2.mlp_down", "0.attn", "2.attn")
        settings = {"batch_size": "2", "learning_rate": "0.02", "pipeline": "breadth_first"}
        assert settings.items() <= run.data.params.items()
        measured = run.data.metrics
        assert {"reliability", "generalization", "locality", "capability", "drift_kl", "epoch_loss"} <= set(measured)
        assert all(math.isfinite(value) for value in measured.values())
        assert {data.dataset.name for data in run.inputs.dataset_inputs} == {"atlas", "probes"}
    (whole,) = trial_runs(kind="study")
    assert whole.info.status == "FINISHED" and whole.data.tags["locft.status"] == "done"
    client = client_here()
    files = {file.path for file in client.list_artifacts(whole.info.run_id)}
    assert {"dashboard.html", "results.parquet", "study.yaml", "environment.json", "baseline.json"} <= files


def test_the_answer_names_a_trial_of_the_study(grid):
    _, study, done = grid
    ids = {trial.id for trial in study.plan.trials}
    assert done.answer.recommendation.trial_id in ids and set(done.answer.front.trial_ids) <= ids
    assert "<html" in done.answer.report_html and done.answer.recommendation.position in done.answer.report_html
    assert set(done.state.baseline) >= {"capability", "perplexity", "reliability"}


def test_the_same_command_again_runs_nothing_and_says_the_same(grid, monkeypatch):
    file, _, done = grid
    monkeypatch.setattr("sweeps.session.ray_cluster", lambda *_: pytest.fail("there is nothing to run"))
    again, ran = sweep(prepared(file))
    assert ran == [] and len(trial_runs()) == 4 and len(trial_runs(kind="study")) == 1
    assert numbers(again.state) == numbers(done.state)
    assert again.answer.recommendation == done.answer.recommendation and again.answer.front == done.answer.front


def test_a_wider_space_runs_only_what_is_new_and_a_failing_trial_stops_nothing(grid, trials_here, monkeypatch):
    """One of the new trials cannot be trained: its cause is recorded, and only it is open afterwards."""
    file, study, done = grid
    monkeypatch.setattr(sweep_module, "measure_baseline", lambda *_: pytest.fail("it is stored with the study"))
    wider = prepared(file, "space.layer=[0, 1, 2]")
    impossible = dataclasses.replace(study.plan.trials[0], layer=99)
    trials = (impossible, *wider.plan.trials)
    wider = dataclasses.replace(wider, plan=dataclasses.replace(wider.plan, trials=trials, count=len(trials)))
    assert wider.id == study.id
    before = read_state(wider, find_tracker(resolve_uri(None), "tiny", wider.id))
    assert (before.done, before.failed, before.left) == (4, 0, 3)

    more, ran = sweep(wider)
    assert {trial.position for trial in trials if trial.id in ran} == {"99.mlp_down", "1.mlp_down", "1.attn"}
    assert len(ran) == 3 and len(trial_runs()) == 7 and more.ending == "complete"
    assert (more.state.done, more.state.failed, more.state.left) == (6, 1, 1)
    assert numbers(done.state).items() <= numbers(more.state).items()
    assert more.answer.recommendation is not None
    failed = [run for run in trial_runs() if run.info.status == "FAILED"]
    assert [run.data.tags["locft.trial_id"] for run in failed] == [impossible.id]
    assert "layer 99 is out of range" in failed[0].data.tags["locft.error"]
    assert trial_runs(kind="study")[0].data.tags["locft.status"] == "stopped"
    assert _open_trials(wider, more.state) == [impossible]


def test_a_narrower_space_answers_from_what_it_has(grid):
    file, _, _ = grid
    narrow, ran = sweep(prepared(file, "space.layer=[0]", "space.module=attn"))
    assert ran == [] and narrow.state.done == 1 and narrow.answer.recommendation.position == "0.attn"


def test_other_edits_are_another_study(grid):
    file, study, _ = grid
    other = prepared(file, "edits.limit=3")
    assert other.id != study.id
    assert read_state(other, find_tracker(resolve_uri(None), "tiny", other.id)).left == 4


def test_when_every_trial_fails_the_study_stops_early_and_says_why(workplace, study_file, tiny_folder, trials_here):
    """The weights vanish after the study was planned."""
    model = workplace / "model"
    shutil.copytree(tiny_folder, model)
    study = prepared(study_file(model=str(model), space__layer="all", space__seed=[0, 1, 2, 3]))
    resident_workbench(study.inputs)
    (model / "model.safetensors").unlink()
    done, ran = sweep(study)
    assert done.ending == "same_failure" and 3 <= len(ran) <= 5
    assert done.state.done == 0 and done.state.left == 12
    assert all(str(model) in error for error in done.state.results["error"])
    assert trial_runs(kind="study")[0].data.tags["locft.status"] == "failed"
    assert done.answer.recommendation is None and "safetensors" in done.answer.report_html


def test_when_the_unedited_model_cannot_be_measured_nothing_is_run(workplace, study_file, tiny_folder, trials_here):
    model = workplace / "model"
    shutil.copytree(tiny_folder, model)
    study = prepared(study_file(model=str(model)))
    (model / "model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors") as caught:
        sweep(study)
    assert "Traceback" not in str(caught.value) and str(model) in str(caught.value)
    assert trial_runs() == [] and trial_runs(kind="study")[0].data.tags["locft.status"] == "stopped"


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(workplace, study_file, ray_running, monkeypatch):
    """A random search without capability tasks; more trials go on from the same beginning."""
    file = study_file(
        capability__suite=None,
        space__layer="all",
        space__seed=[0, 1, 2],
        search={"method": "random", "trials": 5},
        resources={"concurrent": 1},
    )
    heard = Heard(then=lambda result: signal.raise_signal(signal.SIGINT) if len(heard.results) == 2 else None)
    done, first = sweep(prepared(file), heard)
    assert done.ending == "interrupted" and len(first) == 2
    assert (done.state.done, done.state.failed, done.state.left) == (2, 0, 3)
    assert trial_runs(kind="study")[0].data.tags["locft.status"] == "stopped"
    more = prepared(file, "search.trials=7")
    in_this_process(monkeypatch)  # what ran on Ray goes on without
    done, second = sweep(more)
    assert done.ending == "complete" and done.state.left == 0
    assert [*first, *second] == [trial.id for trial in more.plan.trials] and len(trial_runs()) == 7
    assert done.answer.recommendation is not None and "capability" not in done.answer.recommendation.metrics


def test_optuna_proposes_no_trial_twice_and_learns_from_earlier_runs(workplace, study_file, trials_here, monkeypatch):
    told = []
    monkeypatch.setattr("sweeps.run.search.OptunaSearch", lambda *args: told.append(args[-1]) or OptunaSearch(*args))
    changes = {"space__layer": "all", "space__learning_rate": {"log_uniform": [0.001, 0.1]}}
    file = study_file(**changes, search={"method": "optuna", "trials": 4, "seed": 1})
    done, first = sweep(prepared(file))
    assert len(set(first)) == 4 and (done.state.done, done.state.left) == (4, 0) and told == [{}]
    assert sweep(prepared(file))[1] == []
    done, second = sweep(prepared(file, "search.trials=7"))
    assert len(second) == 3 and len({*first, *second}) == 7
    earlier = told[1]
    assert set(earlier) == set(first)
    rows = {row["trial_id"]: row for row in done.state.results.to_dict("records")}
    for trial_id, (point, values) in earlier.items():
        row = rows[trial_id]
        assert point["layer"] == row["layer"] and point["learning_rate"] == row["learning_rate"]
        assert values == (row["reliability"], row["capability"]) and all(math.isfinite(value) for value in values)


def test_an_optuna_study_counts_what_lies_in_its_space(workplace, study_file, trials_here):
    file = study_file(space__layer="all", search={"method": "optuna", "trials": 3})
    assert len(sweep(prepared(file))[1]) == 3
    other = prepared(file, "space.layer=[0]", "space.seed=[0, 1]")
    done, more = sweep(other)
    assert len(more) == 1 and (done.state.done, done.state.left) == (2, 0)
    assert set(done.state.results["layer"]) == {0}
    assert sweep(prepared(file))[1] == [] and sweep(prepared(file, "epochs=3"))[0].state.done == 3


def test_trials_that_always_fail_do_not_keep_a_study_from_being_widened(
    workplace, study_file, trials_here, monkeypatch
):
    """What was never tried comes first, and gets the budget; trials that fail again end nothing."""

    def no_attention(config, **given):
        if config.module == "attn":
            raise ValueError("no attention here")
        return train_and_measure(config, **given)

    monkeypatch.setattr("sweeps.session.train_and_measure", no_attention)
    file = study_file(space__layer="all", space__module=["mlp_down", "attn"], capability__suite=None, epochs=1)
    done, ran = sweep(prepared(file))
    assert len(ran) == 6 and (done.state.done, done.state.failed) == (3, 3)
    wider = prepared(file, "space.seed=[0, 1]")
    old, new = ([one for one in wider.plan.trials if one.seed == seed] for seed in (0, 1))
    assert sweep(prepared(file, "space.seed=[0, 1]", "budget.trials=6"))[1] == [one.id for one in new[:3]]
    done, ran = sweep(wider)
    failed = [one.id for one in (*old, new[1]) if one.module == "attn"]
    assert new[1].module == "attn" and ran == [*(one.id for one in new[3:]), *failed]
    assert done.ending == "complete" and (done.state.done, done.state.failed, done.state.left) == (6, 6, 6)


def test_locality_is_compared_with_the_answers_to_the_edits_that_are_asked(workplace, study_file, trials_here):
    """For other numbers of edits another sample is asked about, and the unedited model's answers are to be those to it."""
    edits = {"source": "fictitious", "limit": 6, "asked": 2}
    changes = {"space__layer": [0], "space__edit_count": [4], "capability__suite": None}
    file = study_file(edits=edits, **changes)
    assert sweep(prepared(file))[0].state.done == 1
    heard, alone = Heard(), Heard()
    sweep(prepared(file, "space.edit_count=[0]"), heard)
    resident.clear()
    sweep(prepared(file, "space.edit_count=[0]", "name=alone"), alone)
    assert comparable(heard.results[0]) == comparable(alone.results[0])
    done, ran = sweep(prepared(file, "space.edit_count=[4, 0]", "space.seed=[0, 1]"))
    assert len(ran) == 2 and (done.state.done, done.state.failed) == (4, 0)


def test_unedited_answers_of_an_earlier_version_are_used_where_they_fit(workplace, study_file, trials_here):
    """It had one file for them, whatever was asked about."""
    file = study_file(edits={"source": "fictitious", "limit": 6}, space__edit_count=[3], capability__suite=None)
    few = prepared(file)
    sweep(few)
    tracker = find_tracker(resolve_uri(None), "tiny", few.id)
    stored = tracker.read_file(baseline_file(few))
    tracker.write_file("baseline.json", stored)
    done, _ = sweep(prepared(file, "space.edit_count=[3, 0]"))
    assert (done.state.done, done.state.failed) == (4, 0)
    assert len(json.loads(tracker.read_file("baseline.json"))["answers"]) == 6
    assert read_state(few, tracker).baseline == json.loads(stored)["metrics"]


def instant_trials(source, work, *, reporter, **_):
    """In the place of `run_trials`, where what they measure does not matter."""
    for trial in source:
        reporter.finished(stored_result(trial), 0)
    return "complete"


@pytest.fixture
def instant(trials_here, monkeypatch):
    """Trials take no time."""
    monkeypatch.setattr("sweeps.run.runner.run_trials", instant_trials)


def test_a_budget_of_trials_counts_those_of_earlier_runs(workplace, study_file, instant):
    file = study_file(space__layer="all", space__seed=[0, 1], budget={"trials": 2})
    done, first = sweep(prepared(file))
    assert len(first) == 2 and (done.state.done, done.state.left) == (2, 4) and done.ending == "complete"
    assert trial_runs(kind="study")[0].data.tags["locft.status"] == "stopped"
    assert sweep(prepared(file))[1] == []
    done, second = sweep(prepared(file, "budget.trials=5"))
    assert len(second) == 3 and len({*first, *second}) == 5


def test_a_budget_of_minutes_ends_a_study_cleanly(workplace, study_file, ray_running):
    file = study_file(
        space__seed=[0, 1, 2],
        budget={"minutes": 0.12},
        resources={"concurrent": 1},
        epochs=10**6,
        skip_below=0.0,
        stop_below=0.0,
    )
    began = time.monotonic()
    done, ran = sweep(prepared(file))
    assert 7 < time.monotonic() - began < 120
    assert done.ending == "out_of_time" and ran == [] and done.state.left == 6
    assert trial_runs() == [] and trial_runs(kind="study")[0].info.status == "KILLED"


def test_a_store_that_goes_away_loses_nothing(workplace, study_file, instant, monkeypatch):
    """It takes the first trial and then nothing; later the same command records what was kept, and runs nothing again."""
    monkeypatch.setattr("sweeps.tracking.outbox.PAUSES", (0.05,))
    monkeypatch.setattr("sweeps.tracking.outbox.PATIENCE_SECONDS", 0.3)
    real, taken = Tracker.log_trial, []

    def sometimes(self, result, inputs=None):
        if taken:
            raise TrackingError("tracking of a trial: connection refused")
        taken.append(result.config.id)
        return real(self, result, inputs)

    file, heard = study_file(space__module=["mlp_down", "attn"]), Heard()
    with monkeypatch.context() as away:
        away.setattr(Tracker, "log_trial", sometimes)
        with pytest.raises(TrackingError, match="connection refused; 3 finished trials are kept in .*same command"):
            sweep(prepared(file), heard)
    assert len(heard.results) == 4 and len(heard.notes) == 1 and "retrying" in heard.notes[0]
    study = prepared(file)
    assert len(open_outbox(study.id, resolve_uri(None))) == 3
    done, ran = sweep(study)
    assert ran == [] and (done.state.done, done.state.left) == (4, 0) and len(trial_runs()) == 4
    assert len(open_outbox(study.id, resolve_uri(None))) == 0
    expected = {result.config.id: result.metrics["reliability"] for result in heard.results}
    assert dict(zip(done.state.results["trial_id"], done.state.results["reliability"], strict=True)) == expected


def test_a_result_that_the_store_refuses_blocks_nothing_and_its_trial_is_tried_again(
    workplace, study_file, instant, monkeypatch, caplog
):
    real, study, heard = Tracker.log_trial, prepared(study_file()), Heard()
    bad = study.plan.trials[0]

    def picky(self, result, inputs=None):
        if result.config == bad:
            raise Refused("tracking of a trial: a name is too long")
        return real(self, result, inputs)

    with monkeypatch.context() as refusing:
        refusing.setattr(Tracker, "log_trial", picky)
        done, _ = sweep(study, heard)
        assert done.ending == "complete" and (done.state.done, done.state.left) == (1, 1)
        assert (
            len(heard.notes) == 1
            and "the store refuses its result" in heard.notes[0]
            and len(open_outbox(study.id, resolve_uri(None))) == 1
        )
        done, ran = sweep(study)
        assert ran == [bad.id] and "will be run again" in caplog.text
    outbox = open_outbox(study.id, resolve_uri(None))
    assert len(outbox) == 1 and (outbox.folder / f"{bad.id}.refused").exists()
    done, ran = sweep(study)
    assert ran == [] and (done.state.done, done.state.left) == (2, 0), "the store takes it now: nothing is run again"


def test_a_cluster_that_cannot_be_had_leaves_no_open_run(workplace, study_file, ray_running, monkeypatch):
    """Kept results are delivered before the cluster is asked."""
    file = study_file()
    study = prepared(file)
    open_outbox(study.id, resolve_uri(None)).keep(stored_result(study.plan.trials[0]))
    with pytest.raises(InputError, match="64 CPUs"):
        sweep(prepared(file, "resources.cpus=64"))
    (whole,) = trial_runs(kind="study")
    assert (whole.info.status, whole.data.tags["locft.status"]) == ("KILLED", "stopped")
    assert len(trial_runs()) == 1 and len(open_outbox(study.id, resolve_uri(None))) == 0


def test_the_end_of_a_study_waits_for_the_store(grid, monkeypatch):
    """It is away when everything is done: for a moment, then for good."""
    file, _, _ = grid
    monkeypatch.setattr("sweeps.tracking.outbox.PAUSES", (0.01,))
    real, asked = Tracker.finish, []

    def away(self, *args, **kwargs):
        asked.append(args)
        if len(asked) < 3:
            raise TrackingError("connection refused")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Tracker, "finish", away)
    done, _ = sweep(prepared(file, "space.layer=[0]"))
    assert done.state.left == 0 and len(asked) == 3 and trial_runs(kind="study")[0].info.status == "FINISHED"
    asked.clear()
    monkeypatch.setattr("sweeps.tracking.outbox.PATIENCE_SECONDS", 0.0)
    with pytest.raises(
        TrackingError, match="connection refused; all finished trials are recorded; run the same command again"
    ):
        sweep(prepared(file, "space.layer=[0]"))
    assert trial_runs(kind="study")[0].info.status == "KILLED"


def test_only_an_experiment_that_is_not_there_means_that_nothing_is(grid, monkeypatch):
    _, _study, _ = grid
    assert find_tracker(resolve_uri(None), "other", "other") is None

    def busy(*_):
        raise MlflowException("the server restarts", error_code=TEMPORARILY_UNAVAILABLE)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", busy)
    with pytest.raises(InputError, match="the server restarts"):
        find_tracker(resolve_uri(None), "tiny", "tiny")


def test_why_trials_were_tried_again_is_kept(workplace, study_file, trials_here, monkeypatch):
    study = prepared(study_file())
    one, other = study.plan.trials

    def run_trials(source, work, *, reporter, **_):
        for trial, cause in ((one, "killed"), (other, "killed"), (one, "node lost")):
            reporter.retried(trial, cause)
        return instant_trials(source, work, reporter=reporter)

    monkeypatch.setattr("sweeps.run.runner.run_trials", run_trials)
    done, _ = sweep(study)
    assert dict(zip(done.state.results["trial_id"], done.state.results["retried"], strict=True)) == {
        one.id: "killed\nnode lost", other.id: "killed"
    }  # fmt: skip
    assert done.state.retried == {"killed": 2, "node lost": 1}
    assert read_state(study, None).retried == {}


def test_looking_at_a_study_that_never_ran_makes_no_store(tmp_path, monkeypatch, study_file):
    monkeypatch.chdir(tmp_path)
    study = prepared(study_file())
    before = sorted(tmp_path.iterdir())
    assert find_tracker(resolve_uri(None), "tiny", study.id) is None
    state = read_state(study, None)
    assert (state.done, state.failed, state.left, state.baseline) == (0, 0, 2, {})
    assert sorted(tmp_path.iterdir()) == before


def test_too_few_resources_are_told_before_anything_is_written(tmp_path, monkeypatch, study_file, ray_running):
    monkeypatch.chdir(tmp_path)
    study = prepared(study_file(resources={"cpus": 64}))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="64 CPUs"):
        sweep(study)
    assert sorted(tmp_path.iterdir()) == before


def test_the_baseline_is_of_the_unedited_model_and_computed_once(grid):
    _, study, _ = grid
    (whole,) = trial_runs(kind="study")
    path = client_here().download_artifacts(whole.info.run_id, "baseline.json")
    with open(path, encoding="utf-8") as file:
        stored = json.load(file)
    assert stored == json.loads(json.dumps(resident_workbench(study.inputs).baseline.to_dict()))
