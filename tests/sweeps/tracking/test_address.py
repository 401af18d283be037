"""Stores in odd places: folders with signs that addresses use, older tables, proxies, artifacts nobody can write."""

import os
import shutil
import sqlite3
import time
from contextlib import closing

import pytest

from locft.errors import InputError
from sweeps.tracking import address
from sweeps.tracking.store import connect
from sweeps.tracking.study_run import Tracker, find_tracker
from tests.mlflow_store import STUDY, open_study, web_server

ODD = ["with space", "Été (données)", "50% #1", "100%25", "a%20b", "why?", "Été 50%41 #1 (données)?"]


@pytest.mark.parametrize("name", ODD)
def test_a_study_in_a_folder_of_any_name(name, tmp_path, empty_store, monkeypatch):
    """Its store and its files are there and nowhere else, and found again."""
    folder, file = tmp_path / name, f"{ODD.index(name)}.db"  # names of their own: MLflow keeps what it opened by name
    folder.mkdir()
    shutil.copy(empty_store, folder / file)
    monkeypatch.chdir(folder)
    uri = address.resolve_uri(f"sqlite:///{file}")
    assert address.sqlite_path(uri) == folder / file and address.resolve_uri(uri) == uri
    tracker = Tracker.open(uri, "study", STUDY)
    open_study(tracker)
    tracker.write_file("answer.json", '{"größe": 1}')
    assert find_tracker(uri, "study", STUDY).read_file("answer.json") == '{"größe": 1}'
    assert os.listdir(tmp_path) == [name] and sorted(os.listdir(folder)) == [file, "mlruns"]


def test_a_new_store_in_a_folder_of_odd_name(tmp_path, monkeypatch):
    for name in ("a%20b?", "a%20c?"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "a%20b?")
    assert connect(address.resolve_uri("sqlite:///new.db"), create=True).find_experiment("none") is None
    assert len(os.listdir(tmp_path)) == 2 and os.listdir() == ["new.db"]
    monkeypatch.chdir(tmp_path / "a%20c?")
    with pytest.raises(InputError, match="already uses another store of that name"):
        connect(address.resolve_uri("sqlite:///new.db"), create=True)
    assert not os.listdir()


@pytest.mark.parametrize(("name", "sign"), [("why%3F/m.db", "%"), ("50%41.db", "%")])
def test_a_name_that_cannot_be_had_is_told_before_anything_is_written(name, sign, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"its path contains '{sign}'"):
        address.resolve_uri(f"sqlite:///{name}")
    assert not os.listdir(tmp_path)


def test_tables_of_an_older_version_are_refused_and_left_alone(tmp_path, empty_store):
    file = tmp_path / "old.db"
    shutil.copy(empty_store, file)
    with closing(sqlite3.connect(file)) as store, store:
        store.execute("UPDATE alembic_version SET version_num = 'bd07f7e963c5'")
    before, began = file.read_bytes(), time.monotonic()
    for create in (False, True):
        with pytest.raises(InputError) as caught:
            connect(f"sqlite:///{file}", create=create)
        assert f"copy the file, then run `mlflow db upgrade 'sqlite:///{file}'`" in str(caught.value)
        assert "was made by an older MLflow than" in str(caught.value)
        assert "bd07f7e963c5" in str(caught.value) and "--tracking-uri" in str(caught.value)
    assert time.monotonic() - began < 10 and file.read_bytes() == before and os.listdir(tmp_path) == ["old.db"]


def test_tables_of_a_newer_version_are_told_from_older_ones(tmp_path, empty_store):
    shutil.copy(empty_store, tmp_path / "new.db")
    with closing(sqlite3.connect(tmp_path / "new.db")) as store, store:
        store.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    with pytest.raises(InputError, match="by a newer MLflow than .*: use that MLflow"):
        address.check_reachable(f"sqlite:///{tmp_path}/new.db")


def test_an_empty_file_becomes_a_store(tmp_path):
    (tmp_path / "m.db").touch()
    address.check_reachable(f"sqlite:///{tmp_path}/m.db")


@pytest.mark.parametrize("proxy_answers", [False, True])
def test_a_proxy_in_between_is_named(proxy_answers, monkeypatch):
    with web_server(403, "<html>not allowed</html>") as proxy:
        port = proxy if proxy_answers else 9
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://ann:s3cret@127.0.0.1:{port}")
        with pytest.raises(InputError, match=r"http_proxy=.*set no_proxy=tracking\.example") as caught:
            address.check_reachable("http://tracking.example:5000")
    assert "s3cret" not in str(caught.value)


def test_artifacts_that_nobody_can_write_are_found_before_the_first_trial(tmp_path, empty_store, monkeypatch):
    """Whatever the store: a server without a proxy for artifacts gives clients a folder of their own machine."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    store = connect(address.resolve_uri(None))
    store.client.create_experiment("study", "/proc/none/1")
    with pytest.raises(
        InputError, match="keeps its artifacts in a folder of this machine: cannot write artifacts in /proc"
    ):
        Tracker.open(address.resolve_uri(None), "study", STUDY)


@pytest.mark.parametrize("uri", ["databricks://profile", "databricks", "databricks-uc"])
def test_databricks_is_refused(uri):
    with pytest.raises(InputError, match="does not write to Databricks; expected sqlite"):
        address.resolve_uri(uri)


def test_a_full_disk_leaves_no_half_store(tmp_path, monkeypatch):
    def full(*_, **__):
        (tmp_path / "new.db").write_text("half")
        raise RuntimeError("(sqlite3.OperationalError) database or disk is full\n[SQL: \nCREATE TABLE tags (\n)\n]")

    monkeypatch.setattr("mlflow.MlflowClient", full)
    with pytest.raises(InputError) as caught:
        connect(address.resolve_uri(f"sqlite:///{tmp_path / 'new.db'}"), create=True)
    assert str(caught.value).endswith("database or disk is full") and not list(tmp_path.iterdir())
