"""Where trials compute and in which precision, when the study leaves it open."""

import pytest

from locft.model import precision
from locft.model.precision import training_precision
from sweeps.study.reader import load_study
from sweeps.study.resolve import prepare


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """What measurements of this CPU come out with from now on, in a process that has not made one; and those made."""
    made = []

    def start(faster):
        precision._cpu_precision.cache_clear()
        monkeypatch.setattr(
            precision, "_faster_precision", lambda: made.append(faster) or ("bfloat16" if faster else "float32")
        )
        return made

    monkeypatch.setattr("locft.cache.cache_folder", lambda: tmp_path)
    yield start
    precision._cpu_precision.cache_clear()


def test_a_cpu_is_measured_once_and_not_in_every_process(measured, tmp_path):
    made = measured(True)
    assert training_precision("cpu") == "bfloat16"
    measured(False)
    assert training_precision("cpu") == "bfloat16" and made == [True]
    (note,) = (tmp_path / "precision").iterdir()
    note.write_bytes(b"\xff")
    measured(False)
    assert training_precision("cpu") == "float32" == note.read_text() and made == [True, False]


def test_without_a_cache_the_cpu_is_measured_again(measured, tmp_path):
    (tmp_path / "precision").write_text("a file where the folder should be")
    measured(True)
    assert training_precision("cpu") == "bfloat16"
    measured(False)
    assert training_precision("cpu") == "float32"


def test_another_kind_of_cpu_is_measured_for_itself(measured, monkeypatch):
    made = measured(True)
    training_precision("cpu")
    described = precision.describe_machine()
    monkeypatch.setattr(precision, "describe_machine", lambda: described | {"cpu": "another"})
    measured(False)
    assert training_precision("cpu") == "float32" and made == [True, False]


def test_a_driver_without_a_gpu_does_not_ask_its_cpu_for_the_gpus_of_trials(measured, study_file):
    made = measured(False)
    prepared = prepare(load_study(str(study_file(resources__gpus=1))))
    assert prepared.facts.precision == "bfloat16" and prepared.study.trial_device == "cuda" and made == []


def test_trials_without_a_gpu_leave_that_of_the_machine_alone(measured, study_file, monkeypatch):
    measured(False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **given: True)
    prepared = prepare(load_study(str(study_file())))
    assert prepared.study.trial_device == "cpu" and prepared.facts.precision == "float32"
