"""Fixtures that test files share: a tiny model in a folder, one Ray for all, copies of an MLflow store, the command."""

import gc
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for all threads; torch.set_num_threads sets it for one
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as `locft` does, which may be imported after PyTorch
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.pop("MLFLOW_TRACKING_URI", None)  # no test writes to the store of whoever runs it
os.environ.pop("RAY_ADDRESS", None)
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="locft-state-")  # nor to their state folder

import pytest
import yaml

import sweeps  # noqa: F401  also sets how often garbage is collected, in tests of the other packages too

LONGEST = "test_faults.py"
"""Its tests take up to two minutes each, most of it waiting."""


def pytest_collection_modifyitems(items) -> None:
    """Begins with the longest tests: at the end each would keep a single core busy."""
    items.sort(key=lambda item: item.path.name != LONGEST)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["XDG_STATE_HOME"], ignore_errors=True)


def pytest_terminal_summary(terminalreporter) -> None:
    """Prints what tests record with `record_property("said", …)`."""
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        for name, text in getattr(report, "user_properties", ()):
            if name == "said" and report.when == "call":
                terminalreporter.write_line(text)


@pytest.fixture
def device():
    """Where tests marked `device` compute: what LOCFT_TEST_DEVICE names; without it a device of its own that is really the CPU
    (`tests.other_device`). Skips where it is not there."""
    from locft.errors import InputError
    from locft.process import torch_device
    from tests.other_device import other_device

    if name := os.environ.get("LOCFT_TEST_DEVICE"):
        try:
            yield torch_device(name)
        except InputError as reason:
            pytest.skip(f"LOCFT_TEST_DEVICE: {reason}")
    else:
        with other_device() as other:
            yield other


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A random three-layer llama with its tokenizer, saved in a folder."""
    from tests.tiny import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory) -> Path:
    """The same with a chat template."""
    from tests.tiny import chat_tokenizer, tiny_model

    folder, tokenizer = tmp_path_factory.mktemp("models") / "chat", chat_tokenizer()
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ray_running():
    """One Ray for all tests, told that it has two CPUs and two GPUs; starting it takes seconds."""
    import ray

    ray.init(
        address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    yield
    ray.shutdown()


@pytest.fixture
def trials_here(monkeypatch):
    """Trials run in this process, without Ray: a worker takes many times as long to start as one of these trials."""
    from tests.trials_here import in_this_process

    in_this_process(monkeypatch)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """An SQLite store with empty tables, to be copied; MLflow takes seconds to create the tables."""
    from sweeps.tracking.store import connect

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{file}", create=True).client.search_experiments()
    return file


@pytest.fixture
def workplace(tmp_path, monkeypatch, empty_store) -> Path:
    """The test's working directory, with an empty store in the default place."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def study_file(tmp_path, tiny_folder):
    """Writes a study file for the tiny model into the test's folder; a trial takes milliseconds."""
    return lambda **changes: write_study(tmp_path, tiny_folder, **changes)


def write_study(folder: Path, tiny_folder: Path, **changes) -> Path:
    """Writes a study file. changes: dotted fields with "__" for the dot, such as space__layer=[0]."""
    study = {
        "name": "tiny",
        "model": str(tiny_folder),
        "edits": {"source": "atlas", "limit": 4},
        "capability": {"suite": "probes", "limit": 3, "prose_tokens": 64},
        "space": {"layer": [0, 2], "module": ["mlp_down"], "batch_size": [2], "learning_rate": [0.02], "seed": [0]},
        "epochs": 8,
        "search": {"method": "grid"},
        "resources": {"cpus": 1, "concurrent": 2},
    }
    for field, value in changes.items():
        *sections, key = field.split("__")
        place = study
        for section in sections:
            place = place[section]
        place[key] = value
    file = folder / f"{study['name']}.yaml"
    file.write_text(yaml.safe_dump(study), encoding="utf-8")
    return file


@pytest.fixture
def few_probes(monkeypatch):
    """Five items a task where a command takes the whole built-in suite: seconds become milliseconds."""
    from locft.data import suites as benchmarks

    whole = benchmarks.load_suite

    def few(suite, tasks=None, limit=None, prose=None, **harness):
        return whole(suite, tasks, min(limit or 5, 5), prose, **harness)

    monkeypatch.setattr(benchmarks, "load_suite", few)


class Said:
    """The outcome of a command: exit code, standard output, standard error."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    @property
    def json(self):
        assert self.out.count("\n") == 1 and self.out.endswith("\n"), "one JSON object, nothing else"
        return json.loads(self.out)


@pytest.fixture
def locft(monkeypatch, capfd):
    """Runs the command in this process."""
    from sweeps.commands import cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["locft", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capfd.readouterr()
        assert "Traceback" not in err, err
        return Said(left.value.code or 0, out, err)

    return call
