"""The MLflow server started by `locft ui`: it serves what a study recorded, and it ends with everything it started."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from analysis.page.report import render_report
from analysis.stats.pick import recommend
from locft.errors import InputError
from sweeps.commands import ui
from sweeps.tracking.registry import register_edit
from sweeps.tracking.store import TrackingError
from sweeps.tracking.study_run import Tracker, find_trial, list_studies
from tests.browsing import browser  # noqa: F401
from tests.mlflow_store import STUDY, config, failure, finish, open_study, result, web_server


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished study in an SQLite store with its report and a registered edit: address, tracker and a trial's run."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("served")
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        uri = f"sqlite:///{folder}/mlflow.db"
        tracker = Tracker.open(uri, "layer-sweep", STUDY)
        _, inputs = open_study(tracker)
        for layer in (0, 9, 18, 27):
            for module in ("mlp_down", "attn"):
                trial = tracker.log_trial(result(config(layer, module)), inputs)
        tracker.log_trial(failure(config(5)), inputs)
        table = tracker.load_results()
        finish(tracker, table[table["status"] == "done"], report_of(tracker, table))
        best = recommend(table)
        delta = folder / "delta"
        delta.mkdir()
        (delta / "delta.safetensors").write_bytes(b"a delta")
        run_id = table.set_index("trial_id")["run_id"][best.trial_id]
        register_edit(delta, run_id, "smollm2-135m", best.position, best.metrics, uri, edits="20 edits from atlas")
        yield uri, tracker, trial


def report_of(tracker, table):
    """The report of these trials, as `sweeps.answer` makes it."""
    finished = table[table["status"] == "done"]
    outcomes = [
        tracker.load_outcomes(run_id).assign(trial_id=trial)
        for trial, run_id in zip(finished["trial_id"], finished["run_id"], strict=True)
    ]
    about = {"name": "layer-sweep", "model": "smollm2-135m", "edits_source": "atlas", "n_edits": 20, "n_items": 640}
    return render_report(about, table, baseline={"capability": 0.55}, outcomes=pd.concat(outcomes, ignore_index=True))


@pytest.fixture(scope="module")
def server(study):
    """The address of a running server and its process."""
    with ui.running(study[0]) as started:
        yield started


def test_a_study_through_a_server(server, study, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    address, _ = server
    tracker = Tracker.open(address, "over-http", STUDY)
    _, inputs = open_study(tracker)
    trials = [result(config(layer, learning_rate=1e-05), epochs=1100) for layer in (1, 2)]
    ids = [tracker.log_trial(trial, inputs) for trial in (*trials, trials[0])]
    assert ids[0] == ids[2]
    finish(tracker, tracker.load_results(), "<title>Report</title>")
    tracker.log_trial(failure(config(3)), inputs)
    again = Tracker.open(address, "over-http", STUDY).load_results()
    assert list(again["trial_id"]) == [*(trial.config.id for trial in trials), config(3).id]
    assert again.iloc[0]["epoch_losses"] == list(trials[0].epoch_losses)
    assert again.iloc[0]["reliability"] == trials[0].metrics["reliability"]
    assert len(tracker.load_outcomes(ids[0])) == 60
    assert find_trial(ids[1], address)[0] == trials[1].config
    assert {found["name"] for found in list_studies(address)} == {"layer-sweep"}


def test_the_command_says_where_everything_is_as_json(server, study, locft):
    address, _ = server
    said = locft("ui", "--tracking-uri", address, "--json").json
    assert said["address"] == address
    links = [link for found in said["studies"] if found["name"] == "layer-sweep" for link in found["links"].values()]
    assert links and all(link.startswith(address) for link in links)


def test_a_named_port_that_is_taken(study):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} of 127.0.0.1 is in use"):
            ui.serve(study[0], port)
    with pytest.raises(InputError, match="not between"):
        ui.serve(study[0], 70_000)


def test_a_server_that_cannot_start_says_why(tmp_path):
    (tmp_path / "mlflow.db").write_text("no database")
    with pytest.raises(InputError, match="(?s)did not start.*"), ui.running(f"sqlite:///{tmp_path}/mlflow.db"):
        pass


def test_a_store_that_is_a_server_is_only_announced():
    heard = []
    with web_server(200, '{"experiment": {}}') as port:
        ui.serve(f"http://127.0.0.1:{port}", announce=heard.append)
    assert heard == [f"http://127.0.0.1:{port}"]


def test_a_signal_ends_the_server_and_its_children(study):
    """SIGTERM is to the command what Ctrl-C is."""
    script = f"""
import signal
from sweeps.commands import ui
signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the command does
ui.serve({study[0]!r}, announce=lambda address: print(address, flush=True))
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[3]
    ) as process:
        address = process.stdout.readline().strip()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        leader = int(children.read_text().split()[0]) if children.exists() else None
        process.terminate()
        assert process.wait(60) == 0
    with socket.socket() as gone:
        assert gone.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))) != 0
    if leader:
        with pytest.raises(ProcessLookupError):
            os.killpg(leader, 0)


@pytest.fixture
def page(browser):  # noqa: F811
    context = browser.new_context(viewport={"width": 1500, "height": 950})
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    yield opened
    context.close()


@pytest.mark.browser
def test_the_report_works_in_the_study_run(server, study, page):
    """MLflow shows it in a frame of its own that may run scripts and nothing else."""
    page.goto(study[1].links(base=server[0])["dashboard"])
    frame = page.frame_locator("iframe")
    pick = recommend(study[1].load_results())
    frame.get_by_text(f"Edit {pick.position}: reliability").wait_for()
    frame.locator("body[data-figures]").wait_for(state="attached")
    assert frame.locator("#plot-front .scatterlayer .point").count() >= 8
    assert frame.locator("#floor-pick").get_attribute("data-pick") == pick.trial_id
    frame.get_by_role("checkbox", name=pick.position.split(".")[1]).uncheck()
    frame.get_by_text("4 of 8 settings shown").wait_for()
    frame.locator("#floor").evaluate("slider => { slider.value = 0; slider.dispatchEvent(new Event('input')); }")
    frame.locator("#floor-pick a").click()  # stays in the frame: the address of the page around it is another one
    wrong = frame.locator("details.trial[open]:visible", has_text="Österby")
    wrong.last.wait_for()
    assert frame.locator("h1").inner_text() == "layer-sweep"


@pytest.mark.browser
def test_the_pages_of_experiment_study_and_registered_edit_say_what_they_are(server, study, page):
    _uri, tracker, _ = study
    pick = recommend(tracker.load_results())

    def read(address, *texts):
        page.goto(address)
        for text in texts:
            page.get_by_text(text).first.wait_for()

    links = tracker.links(base=server[0])
    read(links["study"], "edits best.", "Dashboard", "Charts of the trials", "hypervolume", "locft.pick.position")
    read(links["table"], "Dashboard · Table of the trials", "layer-sweep")
    read(
        f"{server[0]}/#/models/locft-edit-smollm2-135m", "Edits of smollm2-135m, each a safetensors delta", "Version 1"
    )
    read(
        f"{server[0]}/#/models/locft-edit-smollm2-135m/versions/1",
        f"Edited at {pick.position} (20 edits from atlas).", "Apply it:", "chosen", "locft.position",
    )  # fmt: skip


@pytest.mark.browser
def test_the_prepared_table_shows_the_trials(server, study, page):
    page.goto(study[1].links(base=server[0])["table"])
    page.get_by_text("9 matching runs").wait_for()
    for text in ("27.mlp_down bf b10", "reliability", "capability_change"):
        page.get_by_text(text).first.wait_for()


@pytest.mark.browser
def test_the_charts_and_the_comparison(server, study, page):
    links = study[1].links(base=server[0])
    page.goto(links["charts"])
    page.get_by_text("capability vs. reliability").wait_for()
    page.goto(links["compare"])
    page.get_by_text("Comparing 8 Runs").wait_for()
    page.locator(".parcoords, .js-plotly-plot").first.wait_for()


@pytest.mark.browser
def test_the_outcomes_are_a_table(server, study, page):
    number, trial = study[1].experiment_id, study[2]
    page.goto(f"{server[0]}/#/experiments/{number}/runs/{trial}/artifacts/outcomes.json")
    page.get_by_text("View as table").wait_for()
    page.get_by_text("generalization").first.wait_for()


def test_a_server_that_goes_away_is_an_error_soon(server, monkeypatch):
    """The last one, since the server is gone then."""
    for name, value in (("MAX_RETRIES", "1"), ("TIMEOUT", "5"), ("BACKOFF_FACTOR", "1")):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    address, process = server
    tracker = Tracker.open(address, "interrupted", STUDY)
    open_study(tracker)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    started = time.monotonic()
    with pytest.raises(TrackingError, match=r"trial [0-9a-f]{16}"):
        tracker.log_trial(result())
    assert time.monotonic() - started < 30
