"""Faults while a study runs, for real: real Ray, a real MLflow server, real kills, at moments drawn with a seed.

Whatever dies, the same command goes on: every trial finished once, one run of each in MLflow, none left open, and every
number that of an undisturbed study.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress

import pandas as pd
import psutil
import pytest
from mlflow import MlflowClient

from sweeps.answer import read_state
from sweeps.commands import ui
from sweeps.run.trial import resident_workbench, run_trial
from sweeps.study.reader import load_study
from sweeps.study.resolve import prepare
from sweeps.sweep import run_sweep
from sweeps.tracking.outbox import open_outbox
from sweeps.tracking.study_run import find_tracker
from tests.conftest import write_study
from tests.heard import TIMINGS, Heard
from tests.links import Links, possible
from tests.ray_nodes import TOKEN, Nodes

SEED = int(os.environ.get("LOCFT_FAULT_SEED", "1"))
DEATHS = ("driver", "server and driver", "terminate", "interrupt")
"""Faults that end the command by its process; the command is then given again."""
FAULTS = ("worker", *DEATHS, "server", "second driver", "node")
COUNT = max(2, int(os.environ.get("LOCFT_FAULTS", "2")))
"""So many kinds; 7 and more mean all. These take minutes: each driver and node is started again."""
EVERYTHING = COUNT >= 7
FINISHED = re.compile(r"^\[\d+/\d+\] (\d+\.\w+, .* seed \d+): reliability", re.MULTILINE)
TIMEOUT = 420


class Server:
    """An MLflow server on one port that can be killed and started again."""

    def __init__(self, store: str):
        self.store = store
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._stack = ExitStack()

    def start(self) -> None:
        _, self.process = self._stack.enter_context(ui.running(self.store, self.port))

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self._stack.close()

    def restart_after(self, seconds: float) -> threading.Thread:
        self.kill()
        thread = threading.Thread(target=lambda: (time.sleep(seconds), self.start()))
        thread.start()
        return thread


class Command:
    """`locft sweep` as a process of its own, its lines collected while it runs."""

    def __init__(self, folder, uri, *more, beside=(), **environment):
        """beside: what the command begins with, to run in another place."""
        command = [*beside, sys.executable, "-c", "from sweeps.commands.cli import main; main()", "sweep", "tiny.yaml"]
        arguments = [*command, "--no-register", "--json", "--tracking-uri", uri, *more]
        self._out = tempfile.TemporaryFile("w+")  # noqa: SIM115 it is read when the process has ended
        self.process = subprocess.Popen(
            arguments,
            cwd=folder,
            text=True,
            stdout=self._out,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        self.folder = folder
        self.text = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.text += line

    def wait(self, seconds: float = TIMEOUT) -> int:
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code

    @property
    def answer(self) -> dict:
        """What it printed: one JSON object, and nothing else."""
        self._out.seek(0)
        out = self._out.read()
        assert out.count("\n") == 1 and out.endswith("\n"), out
        return json.loads(out)

    @property
    def finished(self) -> int:
        """Trials, as it says."""
        return len(FINISHED.findall(self.text))

    def wait_for(self, finished: int) -> bool:
        """Wait until `finished` trials have finished here; False when the command ended before."""
        return self.until(lambda: self.finished >= finished)

    def until(self, holds) -> bool:
        """Until something holds; False when the command ended before."""
        until = time.monotonic() + TIMEOUT
        while not holds():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < until, self.text
            time.sleep(0.1)
        return True

    def children(self, name: str) -> list[psutil.Process]:
        found = []
        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        for process in family:
            try:
                if name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                pass
        return found

    def end(self) -> None:
        for process in [*self.children(""), self.process]:
            with suppress(psutil.Error, ProcessLookupError):
                process.kill()


def drawn(draw: random.Random, count: int) -> list[str]:
    """So many kinds of faults in an order of their own; the death of a worker and that of a driver are always among them."""
    kinds = ["worker", draw.choice(DEATHS)]
    others = [kind for kind in FAULTS if kind not in kinds]
    return draw.sample([*kinds, *draw.sample(others, count - 2)], count)


def strike(fault: str, command: Command, server: Server, draw: random.Random) -> list[threading.Thread]:
    """Do it; threads that still bring something back."""
    restarting = []
    if "server" in fault:
        restarting.append(server.restart_after(draw.uniform(0, 4)))
        time.sleep(draw.uniform(0, 2))
    if fault in ("driver", "server and driver"):
        command.process.kill()
    if fault == "terminate":
        command.process.terminate()
    if fault == "interrupt":
        command.process.send_signal(signal.SIGINT)  # of the process alone: Ray's own hear nothing
    if fault == "worker":
        workers = command.children("TrialWorker.train")
        if workers:
            draw.choice(workers).kill()
    if fault == "node":
        for process in command.children("raylet/raylet"):
            process.kill()
    if fault == "second driver":
        second = Command(command.folder, server.address)
        assert second.wait() == 2 and "is already being run" in second.text, second.text
        assert command.process.poll() is None, "the first goes on"
    return restarting


@pytest.mark.timeout(900)
def test_a_study_survives_everything(tmp_path, tiny_folder, empty_store, monkeypatch, record_property):
    monkeypatch.chdir(tmp_path)
    store = tmp_path / "mlflow.db"
    store.write_bytes(empty_store.read_bytes())
    write_study(
        tmp_path, tiny_folder, space__layer="all", space__module=["mlp_down", "attn"],
        space__seed=list(range(30 if EVERYTHING else 2)), epochs=200 if EVERYTHING else 100, skip_below=0.0, stop_below=0.0,
        resources={"cpus": 1, "concurrent": 2 if EVERYTHING else 1},
    )  # fmt: skip
    # its node gone, a driver can go on for half a minute with the workers it has: 180 trials leave enough for the other faults
    study = prepare(load_study("tiny.yaml"))
    draw, server = random.Random(SEED), Server(f"sqlite:///{store}")
    faults = drawn(draw, len(FAULTS) if EVERYTHING else COUNT)
    server.start()
    survived, texts, threads = [], [], []
    command = Command(tmp_path, server.address)
    try:
        for fault in faults:
            if not command.wait_for(draw.choice((1, 1, 2))):
                break
            time.sleep(draw.uniform(0, 1))
            threads += strike(fault, command, server, draw)
            survived.append(fault)
            if fault in (*DEATHS, "node"):
                code = command.wait()
                assert code != 0, fault
                texts.append(command.text)
                for thread in threads:
                    thread.join()
                command = Command(tmp_path, server.address)
        code = command.wait()
        texts.append(command.text)
        assert code == 0, command.text
        assert command.answer["trials"]["left"] == 0
        for thread in threads:
            thread.join()
        check(study, server.address, "".join(texts), compared=60 if EVERYTHING else 6)
    finally:
        command.end()
        server.kill()
        record_property("said", f"{len(survived)} faults survived (seed {SEED}): {', '.join(survived)}")
    assert survived == faults, texts


@pytest.mark.timeout(900)
def test_a_cluster_loses_and_gains_nodes(tmp_path, tiny_folder, empty_store, monkeypatch, record_property):
    """A node with one worker; a second joins late and is used, the first is killed in the middle of a trial; with more
    faults asked for, there are two at first, and the link to the other is cut for longer than Ray waits and comes back."""
    monkeypatch.chdir(tmp_path)
    store = tmp_path / "mlflow.db"
    store.write_bytes(empty_store.read_bytes())
    write_study(
        tmp_path, tiny_folder, space__layer="all", space__module=["mlp_down", "attn"],
        space__seed=list(range(12 if EVERYTHING else 2)), resources__concurrent="auto", epochs=300 if EVERYTHING else 100,
        skip_below=0.0, stop_below=0.0,
    )  # fmt: skip
    study, uri = prepare(load_study("tiny.yaml")), f"sqlite:///{store}"
    draw, happened = random.Random(SEED), []
    with ExitStack() as stack:
        links = stack.enter_context(Links()) if EVERYTHING and possible() else None
        nodes = stack.enter_context(Nodes(links=links))
        first = [nodes.add(wait=last) for last in ((False, True) if EVERYTHING else (True,))]

        def sweep(token: str | None) -> Command:
            given = {name: value for name, value in nodes.environment.items() if value != TOKEN}
            given |= {"RAY_AUTH_TOKEN": token} if token else {}
            return Command(tmp_path, uri, "--address", nodes.address, beside=nodes.beside, **given)

        if EVERYTHING:
            for token in (None, "0" * 32):
                refused = sweep(token)
                assert refused.wait() == 2 and "token" in refused.text, refused.text
            happened.append("no token and a wrong one were refused")
        command = sweep(TOKEN)
        try:
            assert command.wait_for(1), command.text
            late = nodes.add(wait=False)
            assert command.until(lambda: all(map(nodes.workers, first))), command.text
            held = [worker for node in first for worker in nodes.workers(node, "TrialWorker")]
            for worker in held:  # else the study could be over before a slow machine has started the node
                worker.suspend()
            assert command.until(lambda: nodes.workers(late)), command.text
            happened.append("a node that joined late was used")
            time.sleep(draw.uniform(0, 0.5))
            lost = first.pop(draw.randrange(len(first)))
            nodes.kill(lost)
            happened.append("a node was killed")
            for worker in held:
                if worker.is_running():
                    worker.resume()
            if EVERYTHING:
                assert command.wait_for(command.finished + 2), command.text
                time.sleep(draw.uniform(0, 0.5))
                how = nodes.cut(first[0])
                time.sleep(20)  # more than HEALTH grants
                nodes.join(first[0])
                assert first[0].wait(60) != 0, "it is told that the others gave it up, and ends"
                happened.append(f"{how} and came back")
            assert command.wait() == 0, command.text
            assert "its worker died; trying again" in command.text
            assert command.answer["trials"]["left"] == 0, (
                "Ray announces a death on standard output; there it may not be"
            )
        finally:
            command.end()
            record_property(
                "said", f"{len(happened)} faults of a cluster survived (seed {SEED}): {', '.join(happened)}"
            )
    check(study, uri, command.text, compared=4)


def check(study, uri: str, said: str, compared: int) -> None:
    """Everything is recorded once; trials that lost a worker, and a few drawn at random, are compared with the same run here,
    undisturbed."""
    state = read_state(study, find_tracker(uri, study.study.name, study.id))
    assert (state.done, state.failed, state.left) == (len(study.plan.trials), 0, 0)
    assert len(open_outbox(study.id, uri)) == 0
    told = FINISHED.findall(said)
    assert len(told) == len(set(told)), "a finished trial was run again"
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(study.study.name)
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    trials = [run.data.tags["locft.trial_id"] for run in runs if run.data.tags["locft.kind"] == "trial"]
    assert sorted(trials) == sorted(trial.id for trial in study.plan.trials), "one run a trial"
    assert {run.info.status for run in runs} == {"FINISHED"}
    bench = resident_workbench(study.inputs)
    drawn_rows = state.results.sample(compared, random_state=SEED)
    retried = state.results[state.results["retried"].fillna("") != ""]
    for row in pd.concat([drawn_rows, retried]).drop_duplicates("trial_id").to_dict("records"):
        trial = next(trial for trial in study.plan.trials if trial.id == row["trial_id"])
        expected = run_trial(bench, trial)
        for name, value in expected.metrics.items():
            if name not in TIMINGS:
                assert row[name] == value, (trial.position, name)
        assert tuple(row["epoch_losses"]) == expected.epoch_losses


def test_a_full_disk_is_told_and_what_fits_again_goes_on(tmp_path, tiny_folder, trials_here):
    """A file system of six megabytes holds the store; it is filled while the study runs."""
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("mounting a small file system needs root on Linux")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    filler = disk / "filler"

    def fill(result):
        """With the first result, and for good: what is written next does not fit."""
        with suppress(OSError), open(filler, "ab", buffering=0) as file:
            while not heard.notes:
                file.write(b"0" * 4096)

    class Freeing(Heard):
        def note(self, text):
            super().note(text)
            filler.unlink(missing_ok=True)

    heard = Freeing(then=fill)
    try:
        uri = f"sqlite:///{disk}/mlflow.db"
        study = prepare(load_study(str(write_study(tmp_path, tiny_folder, space__layer="all"))))
        run_sweep(study, uri, show=lambda _: heard)
        assert "not recorded yet" in heard.notes[0] and "disk is full" in heard.notes[0]
        assert "recording works again" in heard.notes[-1]
        state = read_state(study, find_tracker(uri, study.study.name, study.id))
        assert (state.done, state.left) == (3, 0)
    finally:
        subprocess.run(["umount", "-l", disk], check=False)


OUT_OF_MEMORY = """
import time
from locft.errors import InputError
from sweeps.run.cluster import on_workers, ray_cluster
from sweeps.study.schema import Resources
with ray_cluster(None, Resources(cpus=1)):
    try:
        on_workers([lambda: time.sleep(600)], Resources(cpus=1))
    except InputError as error:
        print(error)
"""


@pytest.mark.skipif(not EVERYTHING, reason="20 seconds of waiting for Ray's memory monitor: with LOCFT_FAULTS=7")
def test_work_that_never_fits_into_memory_ends_with_the_reason():
    """Ray would try it again without end."""
    tight = {**os.environ, "RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
    command = [sys.executable, "-c", OUT_OF_MEMORY]
    done = subprocess.run(command, env=tight, capture_output=True, text=True, timeout=120, check=True)
    assert "ran out of memory 3 times" in done.stdout and "low on memory" in done.stdout
