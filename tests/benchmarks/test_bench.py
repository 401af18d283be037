"""The measurement: its shape, that both sides compute the same, that bad options are told. No time is judged."""

import json
import sys
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from locft.data.requests import load_edits
from locft.data.suites import load_suite
from locft.engine.packing import pack_rows
from locft.engine.tail_engine import TailEngine
from locft.errors import InputError
from locft.model.models import model_fingerprint
from locft.model.positions import TuningPosition
from locft.train.encoding import encode_edits
from locft.train.examples import TrainingExamples
from locft.train.pipelines import TrainingSettings, finetune
from tests.benchmarks import bench, bench_stages
from tests.benchmarks.bench import COLUMNS, STAGES, read_settings, report_lines, report_rows, run_bench
from tests.benchmarks.bench_stages import LEARNING_RATE, drawn_batches, step_flops, trainer_of
from tests.benchmarks.machine_speed import added_memory, matrix_speed
from tests.benchmarks.random_weights import configuration, random_loaded, random_model, texts_of
from tests.tiny import tiny_loaded

N = 6


@pytest.fixture(scope="module")
def loaded():
    return tiny_loaded("llama")


@pytest.fixture(scope="module")
def edits():
    return load_edits("atlas", limit=N)


@pytest.fixture(scope="module")
def rows(loaded, edits):
    return encode_edits(loaded.tokenizer, edits.requests)


@pytest.fixture(autouse=True, scope="module")
def short_waits():
    """The speed of matrix products is measured in milliseconds here, and nothing warms up for seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "matrix_speed", partial(matrix_speed, seconds=0.01))
        patch.setattr(bench_stages, "WARM_UP_SECONDS", 0.1)
        yield


def settings_of(loaded, **options):
    few = {"threads": 1, "batch_size": "2", "repeats": 2, "epochs": 2, "precision": "float32"}
    return read_settings(loaded.model, N, **few | options)


def run(loaded, edits, **options):
    return run_bench(loaded, edits, load_suite("probes", limit=3), settings_of(loaded, **options))


@pytest.fixture(scope="module")
def whole(loaded, edits):
    return run(loaded, edits, layers="2,0", batch_size="2,6")


def test_the_object_has_its_shape_and_is_json(whole):
    assert list(json.loads(json.dumps(whole, allow_nan=False))) == ["machine", "layers", "mean_ratio", "study"]
    assert list(whole["layers"]) == ["2", "0"]
    steps = ["training_step", "training_step_batch_6"]
    stages = [*steps, "edit_metrics", "capability", "edit_metrics_and_capability"]
    for found in whole["layers"].values():
        assert list(found) == stages
        for entry in found.values():
            assert entry["reference_seconds"] > 0 and entry["engine_seconds"] > 0
            assert 0 < entry["ratio_low"] <= entry["ratio"] <= entry["ratio_high"]
        assert [found[name]["batch_size"] for name in steps] == [2, 6]
        assert all(
            found[name]["engine_tokens_per_second"] > 0 and found[name]["share_of_matrix_speed"] > 0 for name in steps
        )
    for name in stages:
        ratios = [found[name]["ratio"] for found in whole["layers"].values()]
        assert whole["mean_ratio"][name] == pytest.approx(sum(ratios) / 2)
    assert set(whole["machine"]["matrix_gflops"]) == {"float32", "bfloat16"} and whole["machine"]["threads"] == 1


def test_both_sides_compute_the_same(whole):
    for found in whole["layers"].values():
        for name in ("training_step", "training_step_batch_6"):
            assert found[name]["loss_difference"] < 1e-3 and found[name]["first_loss_difference_float32"] < 1e-5
        assert found["edit_metrics"]["questions"] >= 3 * N and found["capability"]["items"] == 12
        assert found["edit_metrics"]["questions_differing"] == found["capability"]["items_differing"] == 0


def test_the_study_says_that_it_is_estimated(whole):
    study = whole["study"]
    assert study["estimated"] is True and study["reference_measured_at_layers"] == [0, 2]
    assert study["positions"] == 2 and study["edits"] == N and study["ratio"] > 0
    assert study["boundary"]["seconds"] > 0 and study["boundary"]["tokens"] > 0 and study["boundary"]["bytes"] > 0
    fixed = study["boundary"]["seconds"] + study["unedited"]["engine_seconds"]
    assert study["engine_seconds"] == pytest.approx(fixed + sum(t["engine_seconds"] for t in study["trials"]))
    assert "estimated" in report_lines(whole)[-1]


def test_a_whole_study_runs_the_reference_and_gets_the_same_metrics(loaded, edits):
    study = run(loaded, edits, layers="all", stages="study", whole_study=True)["study"]
    assert study["estimated"] is False and [trial["layer"] for trial in study["trials"]] == [0, 1, 2]
    for trial in study["trials"]:
        assert trial["reference_seconds"] > 0
        assert trial["reliability_difference"] == trial["capability_difference"] == 0


@pytest.mark.parametrize("stage", STAGES)
def test_one_stage_alone(loaded, edits, stage):
    before = model_fingerprint(loaded.model)
    result = run(loaded, edits, layers="1", stages=stage, precision="bfloat16")
    assert list(result["layers"]["1"]) == ([stage] if stage != "study" else [])
    assert ("ratio" in result["study"]) == (stage == "study")
    assert model_fingerprint(loaded.model) == before


def test_threads_are_those_asked_for_and_put_back(loaded, edits):
    before = torch.get_num_threads()
    result = run(loaded, edits, layers="2", stages="training_step", threads=2)
    assert result["machine"]["threads"] == 2 and torch.get_num_threads() == before


def test_what_a_step_launches_is_counted(whole):
    for found in whole["layers"].values():
        entry = found["training_step"]
        assert 0 < entry["engine_launches"] < entry["reference_launches"]
        assert sum(entry["engine_longest"].values()) <= entry["engine_launches"]
    assert any("operations" in line for line in report_lines(whole))


CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 2000,
}  # fmt: skip


@pytest.mark.device
def test_a_shape_alone_is_measured(device, tmp_path):
    """As on a GPU: random weights made there, the plain loop in both precisions, a whole trial."""
    edits, suite = load_edits("atlas", limit=N), load_suite("probes", limit=3)
    (tmp_path / "shape.json").write_text(json.dumps(CONFIG))
    config = configuration(str(tmp_path / "shape.json"))
    structure = random_model(config, torch.float32, torch.device("meta"))
    options = {"layers": "1", "dtype": "bfloat16", "precision": "bfloat16", "beside": "float32,bfloat16", "epochs": 2}
    settings = read_settings(structure, N, threads=1, batch_size="2", repeats=2, learning_rate=1e-4, **options)
    loaded = random_loaded(config, "bfloat16", device, texts_of(edits, suite))
    assert loaded.model.device.type == device.type and loaded.model.dtype == torch.bfloat16
    again = random_loaded(config, "bfloat16", device, texts_of(edits, suite))
    assert model_fingerprint(again.model) == model_fingerprint(loaded.model)
    result = run_bench(loaded, edits, suite, settings)
    entry = result["layers"]["1"]["training_step"]
    assert entry["engine_seconds"] > 0 and entry["first_loss_difference"] < 0.05
    assert list(entry["beside"]) == ["float32"] and all(value > 0 for value in entry["beside"]["float32"])
    assert result["study"]["model"] == "random-llama" and result["study"]["learning_rate"] == 1e-4
    assert any("the plain loop in float32" in line for line in report_lines(result))
    json.dumps(result, allow_nan=False)


def test_memory_that_does_not_hold_the_plain_loop_is_said(loaded, edits, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_stages, "cast_model", full)
    found = run(loaded, edits, layers="2", stages="training_step", beside="bfloat16")
    assert found["layers"]["2"]["training_step"]["beside"] == {"bfloat16": (None, None)}
    assert any("no memory for it" in line for line in report_lines(found))


@pytest.mark.parametrize("source", ["no-such-folder", "shape.json"])
def test_a_shape_that_is_none_is_told(tmp_path, source):
    (tmp_path / "shape.json").write_text('{"model_type": "no such type"}')
    with pytest.raises(
        InputError, match="--random-weights .*expected a folder with config.json, a .json file or a hub id"
    ):
        configuration(str(tmp_path / source))


def test_the_table_has_a_cell_for_every_column(whole):
    table = report_rows(whole)
    assert len(table) == 10 and all(len(row) == len(COLUMNS) for row in table)


def test_a_step_is_one_of_finetune(loaded, rows):
    """The steps that are timed here are those of training."""
    position = TuningPosition(1, "mlp_down")
    settings = TrainingSettings(batch_size=2, learning_rate=LEARNING_RATE, epochs=1, skip_below=0, stop_below=0, seed=0)
    trained = finetune(loaded, TrainingExamples.of_rows(rows), position, settings)
    trainer = trainer_of(loaded, position)
    losses = [trainer.step_on(batch).value for batch in drawn_batches(rows, 2, N // 2)]
    assert trained.losses == (pytest.approx(sum(losses) / len(losses), rel=1e-6),)
    for name, change in trained.delta.tensors.items():
        torch.testing.assert_close(loaded.model.get_parameter(name) + change, trainer.method.weights[name].detach())


@pytest.mark.parametrize("position", ["2.mlp_down", "0.mlp_down"])
def test_arithmetic_is_not_counted_twice(loaded, rows, position):
    """Against what torch counts while the engine runs, padding and attention included: no more than that, nor far less."""
    position = TuningPosition.parse(position)
    engine = TailEngine(loaded, rows, [position.layer], on_disk=False)
    trainer = trainer_of(loaded, position, engine.training_forward(position, rows, torch.float32))
    tokens = int((pack_rows(engine.tree, rows, engine.limit).nodes >= 0).sum())
    counted = step_flops(loaded.model, position, tokens, sum(len(row.target_ids) for row in rows))
    with FlopCounterMode(display=False) as counter:
        trainer.step_on(rows)
    assert 0.3 * counter.get_total_flops() < counted <= counter.get_total_flops()


def test_batches_are_the_same_in_every_run_and_whole(rows):
    batches = drawn_batches(rows, 4, 3)
    assert batches == drawn_batches(rows, 4, 3) and [len(batch) for batch in batches] == [4, 4, 4]
    assert batches[0] != batches[1]


def test_layers_are_chosen_over_the_depth():
    assert settings_of(tiny_loaded("llama", layers=30)).layers == (29, 22, 15, 6)
    assert settings_of(tiny_loaded("llama", layers=1)).layers == (0,)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"layers": "1,7"}, "layer 7 is out of range"),
        ({"layers": "last"}, "--layers 'last': expected all, or layer numbers"),
        ({"module": "mlp_dwn"}, "nearest: mlp_down"),
        ({"batch_size": "0"}, "--batch-size 0: there are 6 edits; expected 1 to 6"),
        ({"batch_size": "2,100"}, "--batch-size 100: there are 6 edits"),
        ({"batch_size": "ten"}, "--batch-size 'ten'"),
        ({"repeats": 0}, "--repeats 0"),
        ({"precision": "float8"}, "--precision 'float8': expected one of float32, bfloat16"),
        ({"stages": "training_step,lunch"}, "there is no stage 'lunch'; stages are training_step"),
        ({"stages": "capability", "whole_study": True}, "--whole-study"),
    ],
)
def test_bad_options(loaded, options, told):
    with pytest.raises(InputError, match=".*") as caught:
        settings_of(loaded, **options)
    assert told in str(caught.value)


def test_all_problems_are_told_at_once(loaded):
    with pytest.raises(InputError) as caught:
        settings_of(loaded, layers="9", batch_size="0", stages="lunch", precision="int4")
    assert len(caught.value.problems) == 4


def test_matrix_speed_is_a_speed():
    assert matrix_speed(32, 48, torch.float32, seconds=0.01) > 0


def test_added_memory_counts_what_the_work_adds():
    added = added_memory(lambda: torch.ones(16 * 2**20).sum())
    if added is None:
        pytest.skip("this system does not let a process set its peak back")
    assert 60 * 2**20 < added < 100 * 2**20


def test_a_model_or_a_shape(locft, tiny_folder):
    said = locft("bench", tiny_folder, "--random-weights", tiny_folder)
    assert said.code == 2 and "expected one of them" in said.err


def test_the_command(tiny_folder, monkeypatch, capsys):
    from sweeps.commands import cli

    monkeypatch.setattr(bench, "load_suite", lambda suite: load_suite(suite, limit=3))

    def call(*options):
        few = f"--limit {N} --batch-size 2 --repeats 1 --threads 1".split()
        monkeypatch.setattr(sys, "argv", ["locft", "bench", str(tiny_folder), *few, *map(str, options)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code or 0, *capsys.readouterr()

    code, out, err = call("--layers", "2,1", "--stages", "training_step,edit_metrics", "--json")
    assert code == 0 and out.count("\n") == 1 and "2.mlp_down training_step" in err
    assert list(json.loads(out)["layers"]) == ["2", "1"]
    code, out, err = call("--layers", 2, "--stages", "training_step")
    assert code == 0 and "training_step" in out and "mean ratio of training_step" in out
    on_cpu = ("--device", "cpu", "--dtype", "bfloat16")
    code, out, err = call("--layers", 2, "--stages", "training_step", *on_cpu, "--json")
    assert code == 0 and json.loads(out)["machine"]["device"] == "cpu"
    code, out, err = call("--layers", 3, "--stages", "lunch")
    assert code == 2 and out == "" and "layer 3 is out of range" in err and "lunch" in err


def test_the_command_needs_a_checkout(locft, monkeypatch, tmp_path):
    from sweeps.commands import edit

    monkeypatch.setattr(edit, "__file__", str(tmp_path / "sweeps" / "commands" / "edit.py"))
    said = locft("bench")
    assert said.code == 2 and "needs a checkout of the repository" in said.err
