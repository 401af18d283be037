"""A tracking server behind a password: it lets a study in, and the password shows up nowhere."""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch

from locft.errors import InputError
from locft.model.delta import EditDelta
from sweeps.tracking.registry import fetch_edit, register_edit
from sweeps.tracking.study_run import Tracker, find_tracker
from tests.mlflow_store import STUDY, config, finish, open_study, result

USER, PASSWORD = "owner", "s3cret-and-long"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, empty_store):
    """The address of a server that asks for a name and a password."""
    pytest.importorskip("flask_wtf", reason="MLflow's basic auth needs Flask-WTF (pip install mlflow[auth])")
    folder = tmp_path_factory.mktemp("guarded")
    shutil.copy(empty_store, folder / "mlflow.db")
    settings = folder / "auth.ini"
    settings.write_text(
        "[mlflow]\ndefault_permission = READ\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        f"database_uri = sqlite:///{folder}/users.db\nadmin_username = {USER}\nadmin_password = {PASSWORD}\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "only-for-this-test",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < until, (folder / "log.txt").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False


@pytest.fixture(autouse=True)
def nobody(monkeypatch):
    """Undoes what addresses with a password put into the environment."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")


def test_a_study_is_recorded_with_the_password(guarded, tmp_path, capfd, caplog):
    """Written with the password from the environment, read with the one in the address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", USER)
        patch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        tracker = Tracker.open(guarded, "guarded", STUDY)
        _, inputs = open_study(tracker)
        run_id = tracker.log_trial(result(config(3)), inputs)
        finish(tracker, tracker.load_results(), "<h1>Report</h1>")
        delta = EditDelta("3.mlp_down", "f" * 16, {"weight": torch.ones(2)})
        registered = register_edit(delta.save(tmp_path / "edit").parent, run_id, "tiny", "3.mlp_down", {}, guarded)
    fetched = fetch_edit(registered, guarded.replace("://", f"://{USER}:{PASSWORD}@"), tmp_path / "fetched")
    assert EditDelta.load(fetched).norm == delta.norm
    tracker = find_tracker(guarded.replace("://", f"://{USER}:{PASSWORD}@"), "guarded", STUDY)
    assert len(tracker.load_results()) == 1 and tracker.uri == guarded
    assert {run.info.status for run in tracker.client.search_runs([tracker.experiment_id])} == {"FINISHED"}
    said = "".join(capfd.readouterr()) + caplog.text
    tags = tracker.client.get_experiment(tracker.experiment_id).tags
    runs = tracker.client.search_runs([tracker.experiment_id])
    assert len(runs) == 2
    everything = said + json.dumps(tags) + "".join(json.dumps(run.to_dictionary()) for run in runs)
    for secret in (PASSWORD, base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()):
        assert secret not in everything


@pytest.mark.parametrize("given", ["", f"{USER}:wr0ng-guess@"])
def test_a_wrong_password_is_one_clear_error_before_anything_is_run(guarded, given, study_file, locft):
    address = guarded.replace("://", f"://{given}")
    for command in (("sweep", study_file()), ("status", study_file()), ("plan", study_file())):
        said = locft(*command, "--tracking-uri", address)
        assert said.code == 2 and said.out == ""
        assert "refuses access (HTTP 401" in said.err and "MLFLOW_TRACKING_PASSWORD" in said.err
        assert "wr0ng-guess" not in said.err
    with pytest.raises(InputError, match="refuses access"):
        Tracker.open(address, "guarded-not", STUDY)
