"""Who runs a study, as its run in MLflow says."""

import json
import os
import shutil
import socket
import subprocess
from datetime import UTC, datetime, timedelta

import pytest

from locft.errors import InputError
from sweeps.session import DRIVER_TAG, SETUP_TAG, Driver, driver_of, study_session
from sweeps.study.reader import load_study
from sweeps.study.resolve import prepare
from sweeps.tracking.address import resolve_uri
from sweeps.tracking.study_run import Tracker, find_tracker


@pytest.fixture
def tracker(workplace):
    opened = Tracker.open(resolve_uri(None), "shared", "study")
    opened.open_run("shared", study_yaml="", description="", environment={})
    return opened


def announce(tracker, host, process=1, age=0.0):
    began = (datetime.now(UTC) - timedelta(seconds=age)).isoformat(timespec="seconds")
    tracker.set_tag(DRIVER_TAG, json.dumps({"host": host, "process": process, "began": began}))


def test_a_study_says_who_runs_it_until_it_ends(workplace, study_file):
    prepared = prepare(load_study(str(study_file())))
    with study_session(prepared, resolve_uri(None), "") as session:
        assert driver_of(session.tracker) is None, "nothing is written yet"
        tracker = session.open_run()
        driver = driver_of(tracker)
        assert driver == Driver(socket.gethostname(), os.getpid(), driver.began)
        assert abs(datetime.now(UTC) - datetime.fromisoformat(driver.began)) < timedelta(seconds=30)
    assert driver_of(find_tracker(resolve_uri(None), "tiny", prepared.id)) is None
    assert tracker.tag(DRIVER_TAG) is None


def test_a_study_does_not_go_on_with_another_configuration_or_tokenizer(workplace, study_file, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config, tokens, template = folder / "config.json", folder / "tokenizer_config.json", folder / "chat_template.jinja"
    before = json.loads(config.read_text())
    assert "rope_parameters" in before

    def begin():
        study = prepare(load_study(str(study_file(model=str(folder)))))
        with study_session(study, resolve_uri(None), "") as session:
            return study.id, [trial.id for trial in study.plan.trials], session.open_run()

    *ids, tracker = begin()
    rotary = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    for file, text in (
        (config, json.dumps(before | rotary)),
        (tokens, json.dumps(json.loads(tokens.read_text()) | {"add_bos_token": True})),
        (template, "{{ messages }}"),
    ):
        old = file.read_text() if file.exists() else None
        file.write_text(text)
        with pytest.raises(InputError, match="study 'tiny': the configuration or the tokenizer of .+ another name"):
            begin()
        file.unlink() if old is None else file.write_text(old)
    config.write_text(json.dumps(before | {"transformers_version": "0.0", "torch_dtype": "float32"}, indent=7))
    assert begin()[:2] == tuple(ids), "that says nothing about what is computed"
    config.write_text(json.dumps(before | rotary))
    tracker.set_tag(SETUP_TAG, None)
    assert begin()[:2] == tuple(ids), "begun by an earlier version"


def test_a_driver_of_this_machine_that_was_killed_is_none(tracker):
    announce(tracker, "other", process=2**22 + 1, age=1e6)
    assert driver_of(tracker).host == "other", "what became of it is not known here"
    announce(tracker, socket.gethostname(), process=2**22 + 1)
    assert driver_of(tracker) is None
    announce(tracker, socket.gethostname(), process=os.getppid())
    assert driver_of(tracker).process == os.getppid()
    for text in ("no driver", json.dumps({"host": "other", "process": 1, "at": 1.7e9, "running": 2})):
        tracker.set_tag(DRIVER_TAG, text)
        assert driver_of(tracker) is None
    assert driver_of(None) is None


def test_a_later_process_with_its_number_is_not_taken_for_it(tracker):
    with subprocess.Popen(["sleep", "60"]) as other:
        announce(tracker, socket.gethostname(), process=other.pid, age=30)
        assert driver_of(tracker) is None
        announce(tracker, socket.gethostname(), process=other.pid)
        assert driver_of(tracker).process == other.pid
        other.kill()
