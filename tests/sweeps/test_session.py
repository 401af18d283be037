"""Who runs a study, as its run in MLflow says."""

import json
import os
import socket
import subprocess
from datetime import UTC, datetime, timedelta

import pytest

from sweeps.session import DRIVER_TAG, Driver, driver_of, study_session
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
