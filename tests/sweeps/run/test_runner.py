"""Ray Tune under the study: what comes back from workers, from failures and from killed processes."""

import dataclasses
import math
import os
import signal
import time
from functools import partial
from types import SimpleNamespace

import pytest
import ray

from locft.errors import InputError
from sweeps.run.cluster import on_workers, ray_cluster
from sweeps.run.dispatch import Dispatch, ListedTrials
from sweeps.run.runner import TrialListener, failed_trial, interrupt_calls, run_trials
from sweeps.run.trial import measure_baseline, resident_workbench, run_trial, train_and_measure
from sweeps.study.reader import load_study
from sweeps.study.resolve import prepare
from sweeps.study.schema import Resources
from sweeps.study.trial_types import TrialResult, pack_result, unpack_result
from tests.conftest import write_study
from tests.heard import ENDLESS, Heard, comparable, sleep_or_finish
from tests.mlflow_store import config
from tests.tiny import chat_tokenizer, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def study(tiny_folder, tmp_path_factory):
    """A prepared study of six trials."""
    file = write_study(tmp_path_factory.mktemp("study"), tiny_folder, space__layer="all", space__seed=[0, 1])
    return prepare(load_study(str(file)))


@pytest.fixture(scope="module")
def baseline(study, ray_running):
    return on_workers([partial(measure_baseline, study.inputs)], study.study.resources)[0]


def run(trials, work, reporter, resources=None, **more):
    resources = resources or Resources(concurrent=2)
    with ray_cluster(None, resources) as room:  # that of the fixture
        return run_trials(trials, work, resources=resources, room=room, reporter=reporter, **more)


def training(study, baseline, inputs=None):
    """The work of a study's trials."""
    return partial(train_and_measure, inputs=inputs or study.inputs, baseline=baseline)


def test_results_do_not_depend_on_order_company_or_process(study, baseline, tmp_path):
    """One after the other, two at a time in another order between failures, and each alone: the same to the bit."""
    trials = list(study.plan.trials)
    one_by_one, in_pairs = Heard(), Heard()
    assert run(trials, training(study, baseline), one_by_one, Resources(concurrent=1)) == "complete"
    impossible = [dataclasses.replace(trials[0], layer=layer) for layer in (97, 98, 99)]

    train = training(study, baseline)

    def in_company(config):
        (tmp_path / str(os.getpid())).touch()
        while len(list(tmp_path.iterdir())) < 2:  # the other worker has not started yet
            time.sleep(0.02)
        return train(config)

    assert run([*impossible, *trials[::-1]], in_company, in_pairs) == "complete"
    assert one_by_one.most_running == 1 and in_pairs.most_running == 2
    assert [result.config for result in one_by_one.results] == trials
    assert len({comparable(result)[2] for result in one_by_one.results}) == len(trials), "the trials differ"
    bench = resident_workbench(study.inputs, baseline)
    for trial in trials:
        alone = comparable(run_trial(bench, trial))
        assert comparable(one_by_one.by_id[trial.id]) == alone == comparable(in_pairs.by_id[trial.id])
        assert {"reliability", "locality", "capability", "drift_kl", "train_loss"} <= set(alone[1])
    # failures are results, and three different ones stop nothing
    assert len(in_pairs.results) == len(trials) + 3
    for trial in impossible:
        failed = in_pairs.by_id[trial.id]
        assert failed.status == "failed" and failed.metrics == {}
        assert f"layer {trial.layer} is out of range" in failed.error and "\n" not in failed.error


def test_the_baseline_of_a_worker_is_that_of_this_process(study, baseline):
    assert measure_baseline(study.inputs) == baseline


def test_a_training_that_diverges_is_a_result_with_finite_metrics(study, baseline):
    wild = dataclasses.replace(study.plan.trials[0], learning_rate=3e38)
    result = run_trial(resident_workbench(study.inputs, baseline), wild)
    assert result.status == "done" and result.metrics["diverged"] == 1
    assert all(value == value and abs(value) < 1e308 for value in result.metrics.values())
    assert result.metrics["reliability"] == result.metrics["capability"] == 0
    after = run_trial(resident_workbench(study.inputs, baseline), study.plan.trials[0])
    assert after.metrics["diverged"] == 0 and after.metrics["reliability"] <= 1


def endless(study, seed=0):
    return dataclasses.replace(study.plan.trials[0], epochs=ENDLESS, seed=seed)


def test_a_trial_whose_worker_always_dies_is_a_failure(study, ray_running, tmp_path):
    def work(config):
        (tmp_path / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)

    heard = Heard()
    assert run([study.plan.trials[0]], work, heard) == "complete"
    (result,) = heard.results
    assert result.status == "failed" and "worker died" in result.error and "\n" not in result.error
    assert len(list(tmp_path.iterdir())) == 3 and len(heard.deaths) == 2, "one try and two more"


@pytest.mark.clock
def test_sigterm_ends_the_run_and_keeps_what_is_finished(study, ray_running):
    """Ctrl-C for real is in test_sweep."""
    interrupted = []

    def interrupt(result):
        interrupted.append(time.monotonic())
        signal.raise_signal(signal.SIGTERM)

    heard, before = Heard(then=interrupt), signal.getsignal(signal.SIGTERM)
    trials = [study.plan.trials[0], *(endless(study, seed) for seed in range(4))]
    assert run(trials, sleep_or_finish, heard) == "interrupted"
    assert len(heard.results) == 1 and heard.results[0].status == "done"
    assert time.monotonic() - interrupted[0] < 5, "it waits for no endless trial"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_and_the_second_does_what_it_did_before(number, monkeypatch):
    stopped, handled = [], []
    before = signal.signal(number, lambda *_: handled.append(number))
    try:
        handler = signal.getsignal(number)
        with interrupt_calls(lambda: stopped.append(number)):
            signal.raise_signal(number)
            assert stopped == [number] and handled == []
            signal.raise_signal(number)
            assert stopped == handled == [number]
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, before)


def test_a_failure_is_one_line():
    assert failed_trial(config(), ValueError("first\nsecond")).error == "ValueError: first"
    assert failed_trial(config(), KeyError()).error == "KeyError: KeyError"
    assert len(failed_trial(config(), ValueError("x" * 9999)).error) == 500


def test_results_survive_the_way_to_the_driver(study, baseline):
    result = run_trial(resident_workbench(study.inputs, baseline), study.plan.trials[0])
    assert unpack_result(pack_result(result)) == result


def test_a_trial_that_hangs_is_timed_out_and_the_others_go_on(study, ray_running):
    heard, began = Heard(), time.monotonic()
    trials = [endless(study), *study.plan.trials[1:4]]
    ending = run(trials, sleep_or_finish, heard, patience=lambda trial: 9)
    assert ending == "complete" and time.monotonic() - began < 90 and heard.deaths == []
    late = heard.by_id[trials[0].id]
    assert late.status == "failed" and late.error == "TimeoutError: not finished after 0.15 minutes (resources.minutes)"
    assert [heard.by_id[trial.id].status for trial in trials[1:]] == ["done"] * 3 and len(heard.results) == 4


def test_memory_that_runs_out_is_tried_again_with_fewer_beside_it(study, ray_running, tmp_path):
    """One that needs all the memory there is: refused while another runs, done alone. One that never fits is told."""
    trials = [dataclasses.replace(study.plan.trials[0], seed=seed) for seed in range(5)]

    def work(config):
        mine = tmp_path / str(config.seed)
        mine.touch()
        try:
            beside = lambda: len(list(tmp_path.iterdir())) - 1  # noqa: E731
            until = time.monotonic() + 60
            while config.seed < 2 and not (tmp_path.parent / "refused").exists() and not beside():
                assert time.monotonic() < until
                time.sleep(0.02)
            if config.seed == 4 or (config.seed == 1 and beside()):
                (tmp_path.parent / "refused").touch()
                raise MemoryError("cannot allocate")
            while config.seed == 0 and not (tmp_path.parent / "refused").exists():
                time.sleep(0.02)
            return TrialResult(config, "done", None, {"beside": float(beside())})
        finally:
            mine.unlink()

    heard = Heard()
    assert run(trials, work, heard) == "complete"
    assert heard.deaths == [trials[1]], "what fails alone is not tried again"
    assert [heard.by_id[trial.id].status for trial in trials] == ["done"] * 4 + ["failed"]
    assert [heard.by_id[trial.id].metrics["beside"] for trial in trials[1:4]] == [0.0, 0.0, 0.0]
    assert "MemoryError: cannot allocate" in heard.by_id[trials[4].id].error


def test_what_rays_memory_monitor_kills_ran_out_of_memory(study, ray_running, monkeypatch):
    """Ray has an error of its own for it. Here it tells every lost worker with it: for real it takes a machine's memory."""
    from ray.air.execution._internal import event_manager

    class Monitored:
        def __getattr__(self, name):
            return getattr(ray, name)

        def get(self, future):
            try:
                return ray.get(future)
            except ray.exceptions.RayActorError as error:
                raise ray.exceptions.OutOfMemoryError(f"First line.\n{said}\nAdvice follows.") from error

    said = "3 workers were killed due to the node running low on memory."
    killed, after = study.plan.trials[:2]

    def work(config):
        if config == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return TrialResult(config, "done")

    monkeypatch.setattr(event_manager, "ray", Monitored())
    heard = Heard()
    assert run([killed, after], work, heard, Resources(concurrent=1)) == "complete"
    assert heard.deaths == [], "what fails alone is not tried again"
    assert heard.by_id[killed.id].error == f"RuntimeError: worker died: {said}"
    assert heard.by_id[after.id].status == "done"


def test_a_cluster_without_nodes_is_told_once(study):
    room, heard = SimpleNamespace(empty=False), Heard()
    listener = TrialListener(Dispatch(ListedTrials([]), room), room, heard, math.inf, lambda trial: math.inf)
    for room.empty in (False, True, True, False):
        listener.on_step_end(0, [])
    assert heard.notes == ["every node that could run a trial is gone; waiting for another"]


def test_other_weights_than_the_planned_ones_are_refused(study, baseline, tmp_path):
    """A node may have a model of the same name and size, trained further."""
    tiny_model(seed=1).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    trial = study.plan.trials[0]
    there = dataclasses.replace(study.inputs, study=study.study.model_copy(update={"model": str(tmp_path)}))
    with pytest.raises(InputError, match=f"on node .+: got weights .+, expected {trial.model_fingerprint}"):
        train_and_measure(trial, there, baseline)
    tiny_model().save_pretrained(tmp_path)
    chat_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"on node .+: got a configuration or tokenizer .+{study.facts.model_setup}"):
        train_and_measure(trial, there, baseline)


def test_work_gets_the_gpus_that_it_asks_for(study, ray_running, tmp_path):
    """Ray's accounts of GPUs need none to be there."""

    def work(config):
        (tmp_path / str(config.seed)).touch()
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        return TrialResult(config, "done", os.environ["CUDA_VISIBLE_DEVICES"])

    trials = [dataclasses.replace(study.plan.trials[0], seed=seed) for seed in range(2)]
    heard = Heard()
    assert run(trials, work, heard, Resources(gpus=0.5)) == "complete"
    first, second = (result.error for result in heard.results)
    assert first == second in ("0", "1"), "both on one"
    assert on_workers([lambda: os.environ["CUDA_VISIBLE_DEVICES"]], Resources(gpus=2)) == ["0,1"]
