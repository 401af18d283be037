"""Drivers of one study on several machines that share a tracking store."""

import json
import os
import socket
import subprocess
import threading
import time

import pytest

from locft.errors import InputError
from sweeps.tracking import heartbeat
from sweeps.tracking.heartbeat import GONE_SECONDS, TAG, at_work, driver_at_work, refuse_second_driver
from sweeps.tracking.study_run import Tracker


@pytest.fixture
def tracker(workplace):
    opened = Tracker.open(None, "shared")
    opened.open_study("study", "shared", study_yaml="", description="", environment={})
    return opened


def announce(tracker, host, process=1, age=0.0):
    tracker.tag_study("study", TAG, json.dumps({"host": host, "process": process, "at": time.time() - age}))


def test_while_one_works_another_machine_is_refused(tracker, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.05)
    with at_work(tracker, "study") as alive:
        while not (first := tracker.study_tag("study", TAG)):
            time.sleep(0.02)
        while tracker.study_tag("study", TAG) == first:
            time.sleep(0.02)
        alive.heard(running=2)
        while (driver := driver_at_work(tracker, "study")) and driver.running != 2:
            time.sleep(0.02)
        assert (driver.host, driver.process) == (socket.gethostname(), os.getpid()) and driver.silent < 30
        refuse_second_driver(tracker, "study", "shared")  # this very process may begin again
        with monkeypatch.context() as other:
            other.setattr(socket, "gethostname", lambda: "other")
            with pytest.raises(InputError, match=f"'shared' is being run already, by process {os.getpid()} on .*takes over in"):
                refuse_second_driver(tracker, "study", "shared")
    assert tracker.study_tag("study", TAG) is None and driver_at_work(tracker, "study") is None
    refuse_second_driver(tracker, "study", "shared")


def test_a_driver_that_was_killed_is_followed_by_another(tracker):
    announce(tracker, "gone", age=GONE_SECONDS + 1)
    refuse_second_driver(tracker, "study", "shared")
    announce(tracker, socket.gethostname(), process=2**22 + 1)  # on this machine it is known at once
    refuse_second_driver(tracker, "study", "shared")
    announce(tracker, socket.gethostname(), process=os.getppid())
    with pytest.raises(InputError, match="being run already"):
        refuse_second_driver(tracker, "study", "shared")
    tracker.tag_study("study", TAG, "no announcement")
    refuse_second_driver(tracker, "study", "shared")
    refuse_second_driver(None, "study", "shared")


def test_a_later_process_with_its_number_is_not_taken_for_it(tracker):
    with subprocess.Popen(["sleep", "60"]) as other:
        announce(tracker, socket.gethostname(), process=other.pid, age=30)
        refuse_second_driver(tracker, "study", "shared")
        announce(tracker, socket.gethostname(), process=other.pid)
        with pytest.raises(InputError, match="being run already"):
            refuse_second_driver(tracker, "study", "shared")
        other.kill()


def test_of_two_that_begin_at_once_one_goes_on(tracker, monkeypatch):
    """On a server; each in a thread of its own, whose name is its machine's. Both have looked before either says anything."""
    monkeypatch.setattr(socket, "gethostname", lambda: threading.current_thread().name)
    monkeypatch.setattr(tracker, "uri", "http://shared:5000")
    looked, over = threading.Barrier(2, timeout=20), threading.Barrier(2, timeout=20)
    tag, first, ends = tracker.tag_study, threading.local(), []

    def both_looked(study_id, key, value):
        if not hasattr(first, "said"):
            first.said = looked.wait()
        tag(study_id, key, value)

    def drive():
        try:
            with at_work(tracker, "study"):
                ends.append("at work")
                over.wait()
        except InputError as error:
            ends.append(str(error))
            over.wait()

    monkeypatch.setattr(tracker, "tag_study", both_looked)
    machines = [threading.Thread(target=drive, name=name) for name in ("one", "other")]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.join()
    assert len(ends) == 2 and "at work" in ends
    assert any("'shared' is being run already" in end for end in ends)
    assert tracker.study_tag("study", TAG) is None


def test_the_first_trial_is_told_at_once(tracker):
    with at_work(tracker, "study") as alive:
        while driver_at_work(tracker, "study") is None:
            time.sleep(0.02)
        alive.heard(running=1)  # the next beat would come in a minute
        limit = time.monotonic() + 20
        while driver_at_work(tracker, "study").running != 1:
            assert time.monotonic() < limit
            time.sleep(0.02)
