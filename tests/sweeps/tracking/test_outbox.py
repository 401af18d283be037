"""Results on their way to a store that is away, full, or killed; and one driver a study."""

import os
import signal
import stat
import subprocess
import sys
import threading

import pytest

from locft.errors import InputError
from sweeps.session import study_lock
from sweeps.tracking import outbox as outbox_module
from sweeps.tracking.address import resolve_uri
from sweeps.tracking.outbox import Outbox, Recorder, open_outbox, study_folder, with_retries
from sweeps.tracking.store import Refused, TrackingError
from tests.heard import Heard
from tests.mlflow_store import config, result


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(outbox_module, "PAUSES", (0.01,))


class Away:
    """A store that takes nothing until it is back."""

    def __init__(self):
        self.taken, self.asked, self.back = [], threading.Event(), threading.Event()

    def __call__(self, found):
        self.asked.set()
        if not self.back.is_set():
            raise TrackingError("no answer")
        self.taken.append(found.config.id)


def results(count):
    return [result(config(layer)) for layer in range(count)]


def test_results_wait_for_a_store_that_is_away_and_arrive_in_order(tmp_path):
    store, heard, found = Away(), Heard(), results(3)
    with Recorder(store, Outbox(tmp_path / "out"), heard) as recorder:
        for each in found:
            recorder.finished(each, 0)
        assert store.asked.wait(10)
        assert [kept.config.id for kept in Outbox(tmp_path / "out").kept()] == [r.config.id for r in found]
        store.back.set()
    assert store.taken == [r.config.id for r in found] and len(Outbox(tmp_path / "out")) == 0
    assert len(heard.notes) == 2 and "no answer" in heard.notes[0] and heard.notes[1].startswith("recording works")
    assert heard.results == found


def test_what_never_arrives_is_kept_whole_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(outbox_module, "PATIENCE_SECONDS", 0.05)
    found, outbox = results(2), Outbox(tmp_path / "out")
    with pytest.raises(TrackingError, match="no answer; 2 finished trials are kept in"):
        with Recorder(Away(), outbox, Heard()) as recorder:
            for each in found:
                recorder.finished(each, 0)
    assert outbox.kept() == found


def test_an_error_of_the_driver_is_not_hidden_by_the_stores(tmp_path, monkeypatch):
    monkeypatch.setattr(outbox_module, "GRACE_SECONDS", 0.05)
    with pytest.raises(KeyError), Recorder(Away(), Outbox(tmp_path / "out"), Heard()) as recorder:
        recorder.finished(results(1)[0], 0)
        raise KeyError("driver")
    assert len(Outbox(tmp_path / "out")) == 1


def test_a_full_disk_costs_only_the_copy_on_it(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    store, heard = Away(), Heard()
    store.back.set()
    monkeypatch.setattr(outbox_module.tempfile, "mkstemp", full)
    with Recorder(store, Outbox(tmp_path / "out"), heard) as recorder:
        recorder.finished(results(1)[0], 0)
    assert len(store.taken) == 1 and "No space left" in heard.notes[0]


@pytest.mark.parametrize(
    ("failures", "said"),
    [
        (2, "; 2 finished trials are kept in .*; run the same command again to deliver them$"),
        (
            3,
            "; 1 finished trials are kept in .*; 1 finished trial could not be saved there .No space left.* run again$",
        ),
        (9, "no answer; 2 finished trials could not be saved there .No space left on device. and will be run again$"),
    ],
)
def test_what_a_full_disk_did_not_take_is_written_at_the_end_or_told(failures, said, tmp_path, monkeypatch):
    """Neither the disk nor the store takes anything at first."""
    monkeypatch.setattr(outbox_module, "PATIENCE_SECONDS", 0.05)
    real, found, outbox, asked = outbox_module.tempfile.mkstemp, results(2), Outbox(tmp_path / "out"), []

    def full(*args, **kwargs):
        asked.append(args)
        if len(asked) <= failures:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(outbox_module.tempfile, "mkstemp", full)
    with pytest.raises(TrackingError, match=said), Recorder(Away(), outbox, Heard()) as recorder:
        for each in found:
            recorder.finished(each, 0)
    assert outbox.kept() == found[max(0, failures - 2) :]


def test_a_refused_result_that_cannot_be_saved_is_said_to_be_lost(tmp_path, monkeypatch):
    found, heard = results(1), Heard()

    def full(self, result):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Outbox, "keep", full)
    with Recorder(Picky(found, times=100), Outbox(tmp_path), heard) as recorder:
        recorder.finished(found[0], 0)
    assert "not saved in" in heard.notes[1] and "will be run again" in heard.notes[1] and "kept" not in heard.notes[1]


def test_a_damaged_file_hides_no_other_and_counts_once(tmp_path):
    outbox, found = Outbox(tmp_path), results(2)
    for each in found:
        outbox.keep(each)
    (tmp_path / f"{found[0].config.id}.result").write_text("half of")
    assert outbox.kept() == found[1:] and len(outbox) == 1
    assert (tmp_path / f"{found[0].config.id}.unreadable").read_text() == "half of"


def test_a_kept_result_survives_a_power_failure(tmp_path, monkeypatch):
    """Its content is on the disk before it has its name, and its name before it is counted on."""
    happened, fsync, replace = [], os.fsync, os.replace

    def synced(handle):
        found = os.fstat(handle)
        happened.append("folder" if stat.S_ISDIR(found.st_mode) else f"file with content: {found.st_size > 0}")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *names: (happened.append("named"), replace(*names)))
    Outbox(tmp_path).keep(results(1)[0])
    assert happened == ["file with content: True", "named", "folder"]


class Picky(Away):
    """A store that refuses some results `times` times and takes the others."""

    def __init__(self, refused, times):
        super().__init__()
        self.refused = {found.config.id: times for found in refused}

    def __call__(self, found):
        if self.refused.get(found.config.id, 0):
            self.refused[found.config.id] -= 1
            raise Refused("a name is too long")
        self.taken.append(found.config.id)


def test_a_result_that_the_store_refuses_stands_in_the_way_of_no_other(tmp_path):
    found, heard = results(3), Heard()
    store, outbox = Picky(found[:2], times=100), Outbox(tmp_path)
    with Recorder(store, outbox, heard) as recorder:
        for each in found:
            recorder.finished(each, 0)
    assert store.taken == [found[2].config.id]
    assert outbox.kept() == found[:2] and store.refused[found[0].config.id] == 99, "asked once; the next run asks again"
    assert len(heard.notes) == 2
    assert all("the store refuses its result" in text and "name is too long" in text for text in heard.notes)
    assert outbox.set_aside(found[0]).exists() and len(outbox) == 1


def test_a_driver_that_has_nothing_else_to_do_waits_for_the_store(monkeypatch, caplog):
    answers = iter([TrackingError("no answer"), TrackingError("no answer"), "here"])

    def work():
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    assert with_retries(work) == "here" and "no answer" in caplog.text and "recording works again" in caplog.text
    monkeypatch.setattr(outbox_module, "PATIENCE_SECONDS", 0.0)
    answers = iter([TrackingError("no answer")])
    with pytest.raises(TrackingError, match="no answer"):
        with_retries(work)


def test_an_outbox_belongs_to_one_study_and_store_whatever_the_password():
    one = open_outbox("study", "http://me:secret@127.0.0.1:5000").folder
    assert one == open_outbox("study", resolve_uri("http://127.0.0.1:5000/")).folder
    assert (
        one
        != open_outbox("study", "http://127.0.0.1:5001").folder
        != open_outbox("other", "http://127.0.0.1:5001").folder
    )
    assert "secret" not in str(one) and not one.exists()
    bare = open_outbox("study", "postgresql://host/db").folder
    for login in ("me@", "me:secret@", "me:pa/ss@", "me:it's@", "me:a?b#c[d@"):
        assert open_outbox("study", f"postgresql://{login}host/db").folder == bare, login
    logins = ("user=me&password=secret", "user=you&password=other")
    assert len({open_outbox("study", f"postgresql://host/db?{login}").folder for login in logins}) == 1


def test_a_second_driver_is_refused_with_the_reason_and_a_killed_one_holds_nothing(tmp_path):
    code = (
        "import sys, time, pathlib; from sweeps.session import study_lock\n"
        "with study_lock(pathlib.Path(sys.argv[1]), 'mine'): print('holds', flush=True); time.sleep(60)"
    )
    first = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "holds\n"
        with pytest.raises(InputError, match="'mine' is already being run by another process"):
            with study_lock(tmp_path, "mine"):
                pass
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        with study_lock(tmp_path, "mine"):
            pass
    finally:
        first.kill()


def test_a_state_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="XDG_STATE_HOME"):
        with study_lock(study_folder("study", "sqlite:///mlflow.db"), "mine"):
            pass
