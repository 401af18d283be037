"""The `locft` command from end to end on a tiny model: what it prints, writes and returns."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sweeps.session import DRIVER_TAG
from sweeps.study.reader import load_study
from sweeps.study.resolve import prepare
from sweeps.tracking.address import resolve_uri
from sweeps.tracking.study_run import Tracker
from tests.conftest import write_study
from tests.heard import TIMINGS


@pytest.fixture(scope="module")
def place(tmp_path_factory, empty_store, tiny_folder):
    """A folder with a store and a study of three trials."""
    folder = tmp_path_factory.mktemp("cli")
    shutil.copy(empty_store, folder / "mlflow.db")
    write_study(folder, tiny_folder, space__layer="all", resources={"cpus": 1, "concurrent": 1})
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def swept(here, locft, trials_here):
    """The folder after `locft sweep` has run in it (the first test to ask for it waits)."""
    if not (here / "tiny.html").exists():
        said = locft("sweep", "tiny.yaml")
        assert said.code == 0, said.err
    return here


def files(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def same(metrics):
    return {name: value for name, value in metrics.items() if name not in TIMINGS}


# before anything has run


def test_help_answers_without_the_heavy_libraries():
    code = (
        "import sys, sweeps.commands.cli as c; sys.argv = ['locft', '--help']\ntry: c.main()\nexcept SystemExit: pass\n"
    )
    code += "print({'torch', 'ray', 'mlflow', 'transformers', 'optuna', 'plotly', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "sweep" in done.stdout and done.stdout.endswith("set()\n")


def test_every_command_has_a_help_text(locft):
    commands = ("positions", "plan", "sweep", "status", "report", "select", "edit", "apply", "evaluate", "ui", "bench")
    for command in commands:
        said = locft(command, "--help")
        assert said.code == 0 and f"locft {command}" in said.out


def test_no_command_shows_the_commands(locft):
    said = locft()
    assert said.code == 2 and said.out == "" and "sweep" in said.err


def test_positions(locft, tiny_folder):
    said = locft("positions", tiny_folder)
    assert said.code == 0 and "2.mlp_down" in said.out and "model.layers.2.mlp.down_proj.weight" in said.out
    rows = {row["position"]: row for row in locft("positions", tiny_folder, "--json").json["positions"]}
    assert rows["1.mlp_down"] == {
        "position": "1.mlp_down",
        "parameters": {"model.layers.1.mlp.down_proj.weight": [32, 48]},
        "size": 32 * 48,
    }
    assert {position.split(".")[0] for position in rows} == {"0", "1", "2"}


def test_plan_lists_the_trials_and_writes_nothing(locft, tmp_path, monkeypatch, tiny_folder):
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path, tiny_folder, space__layer="all")
    before = files(tmp_path)
    said = locft("plan", "tiny.yaml", "--set", "space.seed=[0, 1]")
    assert said.code == 0 and "6 trials" in said.out and said.out.count("mlp_down") == 6
    planned = locft("plan", "tiny.yaml", "--json").json
    assert len(planned["trials"]) == 3 and len({trial["id"] for trial in planned["trials"]}) == 3
    assert planned["study"]["edits"]["count"] == 4 and planned["estimate"]["seconds"] > 0
    assert all(trial["id"] in said.out for trial in planned["trials"]), "more seeds leave the first trials as they are"
    assert files(tmp_path) == before


def test_a_plan_shows_the_axes_that_are_away_from_their_defaults(locft, tmp_path, monkeypatch, tiny_folder):
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path, tiny_folder, space__method=["full", "lora"], space__rank=4, space__guard_weight=2.0)
    said = locft("plan", "tiny.yaml", "--set", "ask_formats=[raw, chat]", "--set", "space.layer=0")
    assert said.code == 0, said.err
    for title in ("batch size", "learning rate", "method", "rank"):
        assert title in said.out, title
    for title in ("alpha", "guard", "curvature", "shrink", "trained formats"):
        assert title not in said.out, title
    (plain,) = [line for line in said.out.splitlines() if "full" in line]
    assert "\N{EN DASH}" in plain, "rank changes nothing there"
    assert f"ask_formats: the tokenizer of {tiny_folder} has no chat template, so chat is left out" in said.err
    assert "space.guard_weight has no effect: it needs space.guard same_relation or locality_like or prose" in said.err
    told = locft("plan", "tiny.yaml", "--set", "ask_formats=[raw, chat]", "--json").json["study"]
    assert told["ask_formats"] == ["raw"] and len(told["notices"]) == 2


def test_plan_looks_at_a_store_that_is_not_there_and_makes_none(locft, tmp_path, monkeypatch, tiny_folder):
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path, tiny_folder)
    before = files(tmp_path)
    plan = locft("plan", "tiny.yaml", "--tracking-uri", "sqlite:///new/folder/m.db", "--json").json
    assert plan["estimate"]["left"] == 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///new/folder/m.db")
    assert locft("status", "tiny.yaml", "--json").json["left"] == 2
    assert files(tmp_path) == before


def test_plan_says_how_far_the_budget_goes(locft, tmp_path, monkeypatch, tiny_folder):
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path, tiny_folder, space__layer="all", space__seed=list(range(20)))
    said = locft("plan", "tiny.yaml", "--set", "budget.trials=10")
    assert "10 trials of 60 planned (the budget ends the study after 10), on this machine 2 at a time" in said.out
    said = locft("plan", "tiny.yaml", "--set", "budget.minutes=0.001")
    assert "about 0 trials of 60 planned (the budget ends the study after 0.06 s)" in said.out
    assert "GiB of memory" in said.out and "GiB of disk" in said.out and "warning" not in said.err


def test_plan_warns_of_more_memory_than_there_is(locft, tmp_path, monkeypatch, tiny_folder):
    import psutil

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=2**30, available=2**30))
    write_study(tmp_path, tiny_folder)
    said = locft("plan", "tiny.yaml")
    assert said.code == 0 and "this machine has 1.0 GiB" in said.err and "resources.concurrent" in said.err
    (told,) = locft("plan", "tiny.yaml", "--json").json["warnings"]
    assert told in said.err.replace("\n", " ")


def test_plan_of_a_search(locft, tmp_path, monkeypatch, tiny_folder):
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path, tiny_folder, space__seed=list(range(5)), search={"method": "optuna", "trials": 9})
    said = locft("plan", "tiny.yaml")
    assert said.code == 0 and "chosen while the study runs (search: optuna)" in said.out and "9 trials" in said.out
    assert locft("plan", "tiny.yaml", "--json").json["trials"] == []


def test_status_before_anything_ran_makes_no_store(locft, tmp_path, monkeypatch, tiny_folder):
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path, tiny_folder)
    before = files(tmp_path)
    said = locft("status", "tiny.yaml")
    assert said.code == 0 and "0 of 2 done, 0 failed, 2 left" in said.out and "not running" in said.out
    told = locft("status", "tiny.yaml", "--json").json
    assert told["left"] == 2 and told["driver"] is None
    assert files(tmp_path) == before


def test_status_in_a_store_of_other_studies_adds_nothing_to_it(locft, workplace, tiny_folder):
    from mlflow import MlflowClient

    write_study(workplace, tiny_folder)
    assert locft("status", "tiny.yaml", "--json").json["done"] == 0
    names = [found.name for found in MlflowClient(f"sqlite:///{workplace}/mlflow.db").search_experiments()]
    assert names == ["Default"]


def test_a_search_that_finds_nothing_more(locft, workplace, tiny_folder, trials_here):
    write_study(workplace, tiny_folder, search={"method": "optuna", "trials": 9})
    said = locft("sweep", "tiny.yaml", "--no-register")
    assert said.code == 0 and "2 of 2 trials done" in said.out and "budget" not in said.err, "the space has no more"
    assert "0 left" in (told := locft("status", "tiny.yaml").out) and "continues it" not in told
    narrow = ("--set", "space.learning_rate={log_uniform: [0.02, 0.0201]}")
    said = locft("sweep", "tiny.yaml", "--no-register", *narrow)
    assert "the search proposed nothing new, with 5 trials left" in said.err and "budget" not in said.err
    said = locft("sweep", "tiny.yaml", "--no-register", *narrow, "--set", "search.trials=5", "--set", "budget.trials=4")
    assert "the budget ended the study with 1 trial left; the same command with a larger budget" in said.err


# a study


def test_sweep_says_what_it_found(swept, locft):
    """The second call runs nothing; it prints the same answer and writes the dashboard again."""
    dashboard = swept / "tiny.html"
    assert "<html" in dashboard.read_text(encoding="utf-8")
    dashboard.write_text("old", encoding="utf-8")
    said = locft("sweep", "tiny.yaml")
    assert said.code == 0 and "Edit at " in said.out and "3 of 3 trials done, 0 failed" in said.out
    assert "--from-run" in said.out and "[1/3]" not in said.err
    assert "<html" in dashboard.read_text(encoding="utf-8")


def test_sweep_json(swept, locft):
    told = locft("sweep", "tiny.yaml", "--json").json
    assert told["trials"] == {"planned": 3, "done": 3, "failed": 0, "left": 0}
    assert told["ending"] == "complete" and told["causes"] == {}
    assert told["pick"]["position"] in ("0.mlp_down", "1.mlp_down", "2.mlp_down")
    assert told["pick"]["trial_id"] in {row["trial_id"] for row in told["front"]} | set(told["pick"]["trial_ids"])
    assert told["report"] == "tiny.html" and told["tracking_uri"] == f"sqlite:///{swept}/mlflow.db"
    assert 0 <= told["unedited"]["capability"] <= 1


def test_status_json(swept, locft):
    said = locft("status", "tiny.yaml", "--json").json
    assert (said["planned"], said["done"], said["failed"], said["left"], said["causes"]) == (3, 3, 0, 0, {})
    assert said["diverged"] == 0 and said["seconds_left"] is None
    wider = locft("status", "tiny.yaml", "--set", "space.seed=[0, 1]", "--json").json
    assert (wider["done"], wider["left"]) == (3, 3)
    assert "3 of 3 done" in locft("status", "tiny.yaml").out


def test_sweep_status_and_report_name_the_one_setting_to_change(swept, locft):
    """A tiny random model keeps nothing in place."""
    found = {name: locft(name, "tiny.yaml", "--json").json["signatures"] for name in ("sweep", "status", "report")}
    assert found["sweep"] == found["status"] == found["report"]
    (lost,) = [signature for signature in found["sweep"] if signature["name"] == "locality lost"]
    assert lost["command"] == "locft sweep tiny.yaml --set space.method=natural_gradient"
    page = (swept / "tiny.html").read_text(encoding="utf-8")
    for text in (page, *(locft(name, "tiny.yaml").out for name in ("sweep", "status", "report"))):
        assert lost["command"] in text
    narrower = locft("status", "tiny.yaml", "--set", "space.method=full", "--json").json["signatures"]
    (again,) = [signature for signature in narrower if signature["name"] == "locality lost"]
    assert again["command"].endswith("--set space.method=full --set space.method=natural_gradient"), "the last holds"


def test_status_says_who_runs_it(swept, locft):
    tracker = Tracker.open(resolve_uri(None), "tiny", prepare(load_study("tiny.yaml")).id)
    driver = {"host": "node-7", "process": 41, "began": "2026-11-25T18:00:00+00:00"}
    tracker.set_tag(DRIVER_TAG, json.dumps(driver))
    try:
        assert "process 41 on node-7 since 2026-11-25T18:00" in locft("status", "tiny.yaml").out
        assert locft("status", "tiny.yaml", "--json").json["driver"] == driver
        wider = ("status", "tiny.yaml", "--set", "space.seed=[0, 1]")
        assert "s left" in locft(*wider).out and locft(*wider, "--json").json["seconds_left"] > 0
    finally:
        tracker.set_tag(DRIVER_TAG, None)


def test_report(swept, locft):
    said = locft("report", "tiny.yaml", "--out", "pages/answer.html", "--json")
    assert said.json["report"] == "pages/answer.html" and said.json["front"]
    assert "<html" in (swept / "pages" / "answer.html").read_text(encoding="utf-8")
    shutil.rmtree(swept / "pages")
    assert "Pareto front" in locft("report", "tiny.yaml").out


def test_a_sweep_without_capability_has_null_where_nothing_was_measured(swept, locft):
    """Another study (its data is another) in the same store."""
    changes = ["--set", "capability.suite=null", "--set", "space.layer=1", "--json"]
    said = locft("sweep", "tiny.yaml", "--out", "other.html", "--no-register", *changes)
    assert said.code == 0 and said.json["front"] == [] and "capability" not in said.json["unedited"]
    assert said.json["pick"]["position"] == "1.mlp_down" and said.json["trials"]["done"] == 1
    compared = ["--compare", "tiny.yaml", *(part.replace("--set", "--compare-set") for part in changes)]
    told = locft("report", "tiny.yaml", "--out", "other.html", *compared).json["comparison"]
    other = told["with"]
    assert other == "tiny (other run)"
    assert told["picks"]["there"] == "1.mlp_down" and told["shared_positions"] == 1
    assert told["moved"][0].startswith("The pick ") and told["agreement"]["reliability"]["difference"][0] is not None
    capability, drift = told["cautions"]
    assert capability.startswith("Capability was measured on different items")
    assert drift.startswith(
        "Drift was measured on different prose (here up to 64 tokens of the built-in prose; there none)"
    )
    said = locft("report", "tiny.yaml", "--out", "other.html", *compared[:-1])
    assert said.code == 0 and f"Compared with {other}:" in said.out and told["moved"][0] in said.out
    assert "Capability was measured on different items" in (swept / "other.html").read_text(encoding="utf-8")
    (swept / "other.html").unlink()
    said = locft("report", "tiny.yaml", "--compare", "tiny.yaml")
    assert said.code == 2 and "got STUDY itself" in said.err
    shutil.copy(swept / "mlflow.db", swept / "older.db")  # the same study as it was in another store
    older = ["--compare", "tiny.yaml", "--compare-uri", "sqlite:///older.db", "--json"]
    told = locft("report", "tiny.yaml", "--out", "other.html", *older).json["comparison"]
    assert told["picks"]["here"] == told["picks"]["there"] and told["shared_positions"] == 3
    said = locft("report", "tiny.yaml", "--compare-uri", "sqlite:///older.db")
    assert said.code == 2 and "--compare-uri: needs --compare OTHER" in said.err


def picked(locft):
    """The MLflow run of the pick, and what `locft sweep` says of the study."""
    from mlflow import MlflowClient

    told = locft("sweep", "tiny.yaml", "--json").json
    runs = MlflowClient(told["tracking_uri"]).search_runs(["1"], "tags.`locft.kind` = 'trial'")
    return next(run for run in runs if run.data.tags["locft.trial_id"] == told["pick"]["trial_id"]), told


def test_a_trial_is_repeated_to_the_bit(swept, locft, tmp_path):
    run, told = picked(locft)
    model = told["study"]["model"]
    said = locft("edit", model, "--from-run", run.info.run_id, "--out", tmp_path / "edited", "--json")
    assert said.code == 0
    again, trial = same(said.json["metrics"]), run.data.metrics
    assert {name: trial[name] for name in again} == again and len(again) > 12
    assert said.json["losses"][-1] == trial["train_loss"] and said.json["position"] == told["pick"]["position"]
    assert said.json["edits"] == {"source": "atlas", "count": 4}


# one edit


@pytest.fixture
def edited(locft, tmp_path, tiny_folder, few_probes, monkeypatch):
    """An edit in the folder `delta`, and what the command said."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--limit", 4, "--position", "1.mlp", "--batch-size", 2, "--epochs", 6]
    said = locft("edit", tiny_folder, "--edits", "atlas", *arguments, "--out", "delta", "--threads", 1, "--json")
    assert said.code == 0, said.err
    return said


def test_edit_evaluate_apply(edited, locft, tiny_folder, tmp_path):
    """The delta gives the same metrics when it is read back, and the merged model measures the same."""
    told = edited.json
    assert told["position"] == "1.mlp" and len(told["losses"]) == 6 and told["losses"][-1] < told["losses"][0]
    assert json.loads((tmp_path / "delta/edit.json").read_text(encoding="utf-8"))["metrics"] == told["metrics"]
    outcomes = (tmp_path / "delta/outcomes.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["kind"] for line in outcomes} == {"reliability", "generalization", "locality"}

    few = ("--edits", "atlas", "--limit", 4, "--threads", 1, "--json")
    again = locft("evaluate", tiny_folder, *few, "--capability", "probes", "--delta", "delta")
    assert same(again.json["metrics"]) == same(told["metrics"]) and again.json["unedited"] == told["unedited"]
    assert re.search(r"the unedited .*: 4 edits in raw, qa, unseen and 20 capability items, about 1 s", again.err), (
        again.err
    )
    assert "measuring the edited model (up to about" in again.err

    applied = locft("apply", "delta", "--model", tiny_folder, "--out", "merged", "--json").json
    assert {key: applied[key] for key in ("model", "position", "folder", "dtype", "left_out")} == {
        "model": str(tiny_folder), "position": "1.mlp", "folder": "merged", "dtype": "float32", "left_out": [],
    }  # fmt: skip
    assert applied["kept"] == pytest.approx(1) and len(applied["tensors"]) == 3
    merged = locft("evaluate", "merged", *few, "--capability", "probes").json
    for name, value in merged["metrics"].items():
        assert value == pytest.approx(told["metrics"][name], rel=1e-6), name
    assert merged["position"] is None

    foreign = locft("evaluate", "merged", "--edits", "atlas", "--limit", 4, "--delta", "delta")
    assert foreign.code == 2 and "fingerprint" in foreign.err and foreign.out == ""
    here = locft("apply", "delta", "--model", tiny_folder, "--out", ".")
    assert here.code == 2 and "--out .: this is the current folder; name a new one" in here.err
    foreign = locft("apply", "delta", "--model", "merged", "--out", "twice")
    assert foreign.code == 2 and not (tmp_path / "twice").exists()


def test_edit_and_evaluate_in_words(locft, tmp_path, tiny_folder, few_probes):
    few = ("--edits", "atlas", "--limit", 3, "--threads", 1)
    said = locft("edit", tiny_folder, *few, "--position", "0.attn", "--out", tmp_path / "e")
    assert said.code == 0 and "3 edits at 0.attn" in said.out and "reliability" in said.out
    assert re.search(r"metric \W+ edited \W+ unedited", said.out)
    said = locft("evaluate", tiny_folder, *few)
    assert said.code == 0 and "reliability" in said.out and re.search(r"metric \W+ unedited", said.out)
    assert not any(name in said.out + said.err for name in ("capability", "perplexity")), "nobody asked for it"


def test_evaluate_measures_the_capability_that_is_asked_for(locft, tmp_path, tiny_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    items = [{"context": "One and one is", "choices": [" two", " six"], "answer": 0, "note": "?"}] * 3
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, items)))
    few = ("evaluate", tiny_folder, "--edits", "atlas", "--limit", 2, "--threads", 1, "--json")
    said = locft(*few, "--capability", "sums.jsonl")
    assert said.code == 0 and {"capability.sums", "perplexity"} <= said.json["metrics"].keys(), said.err
    assert "capability task 'sums': not read: note (3 of 3 records)" in said.err
    for wrong, told in (
        (["sums.jsonl", "sums.jsonl"], "expected every name once"),
        (["probe"], "probe"),
        (["missing.jsonl"], "missing.jsonl: no such file"),
    ):
        said = locft(*few, *(word for one in wrong for word in ("--capability", one)))
        assert said.code == 2 and told in said.err and said.out == "", said.err


def test_evaluate_says_which_options_go_together(locft, tiny_folder, monkeypatch):
    import locft as locft_package

    for options, told in (
        ((), "nothing to measure: expected --edits"),
        (("--lm-eval", " , "), "--lm-eval: got nothing, expected names of tasks"),
        (("--capability", "probes", "--limit", 3, "--lm-eval", "x"), "--capability: it is only measured together"),
        (("--edits", "atlas", "--lm-eval-limit", 3), "--lm-eval-limit: it only applies to --lm-eval"),
    ):
        said = locft("evaluate", tiny_folder, *options)
        assert said.code == 2 and told in said.err and said.out == "", said.err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "locft.harness", raising=False)
    monkeypatch.delattr(locft_package, "harness", raising=False)
    said = locft("evaluate", tiny_folder, "--lm-eval", "arc_easy")
    assert said.code == 2 and "the extra `harness`" in said.err and said.out == "", said.err


def test_evaluate_on_tasks_of_the_harness(edited, locft, tiny_folder, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra `harness`)")
    items = [{"text": f"{one} and {one} is", "right": one % 2} for one in range(8)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "sums.yaml").write_text(
        f"task: sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'items.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_target: right\n"
        "doc_to_choice: [two, six]\nmetric_list: [{metric: acc}]\n"
    )
    tasks = ("--lm-eval", "sums", "--lm-eval-path", tmp_path, "--lm-eval-limit", 6, "--threads", 1)
    said = locft("evaluate", tiny_folder, "--delta", "delta", *tasks, "--json")
    assert said.code == 0, said.err
    (score,) = said.json["lm_eval"]
    assert (score["task"], score["metric"], score["items"]) == ("sums", "acc", 6) and "metrics" not in said.json
    assert score["change"]["mean"] == pytest.approx(score["edited"] - score["unedited"])
    said = locft("evaluate", tiny_folder, "--edits", "atlas", "--limit", 2, *tasks)
    assert said.code == 0 and "sums" in said.out and "reliability" in said.out, said.err


def test_an_edit_is_trained_and_asked_in_formats(locft, tmp_path, tiny_folder, chat_folder, few_probes):
    few = ("--edits", "atlas", "--limit", 3, "--threads", 1)
    quick = (*few, "--position", "1.mlp", "--epochs", 2, "--json")
    said = locft("edit", chat_folder, *quick, "--learning-rate", 0.02, "--momentum", "kept", "--out", tmp_path / "all")
    assert "--learning-rate has no effect: it needs --method full or low_curvature or" in said.err
    assert "--momentum has no effect: it needs --pipeline stream" in said.err
    assert said.code == 0 and "chat template" not in said.err, said.err
    shares = [f"{name}.{form}" for name in ("reliability", "generalization") for form in ("raw", "qa", "chat")]
    assert {*shares, "reliability", "generalization", "locality", "drift_kl"} <= said.json["metrics"].keys()
    assert said.json["settings"]["train_formats"] == "raw,qa,chat"
    assert said.json["ask_formats"] == ["raw", "qa", "chat", "unseen"]
    again = locft("evaluate", chat_folder, *few, "--delta", tmp_path / "all", "--json").json["metrics"]
    assert {name: again[name] for name in shares} == {name: said.json["metrics"][name] for name in shares}
    few_asked = locft("evaluate", chat_folder, *few, "--ask-formats", "raw", "--json").json["metrics"]
    assert "reliability.raw" in few_asked and "reliability.qa" not in few_asked
    plain = locft("edit", tiny_folder, *quick, "--out", tmp_path / "plain")
    assert plain.code == 0 and plain.json["settings"]["train_formats"] == "raw,qa"
    assert plain.json["ask_formats"] == ["raw", "qa", "unseen"] and "reliability.chat" not in plain.json["metrics"]
    for option in ("--train-formats", "--ask-formats"):
        assert f"{option}: the tokenizer of {tiny_folder} has no chat template, so chat is left out" in plain.err
    lora = ("--train-formats", "chat", "--rank", 2, "--method", "lora")
    lora = locft("edit", chat_folder, *quick, *lora, "--out", tmp_path / "x")
    assert lora.code == 0 and lora.json["settings"]["rank"] == 2, lora.err
    wrong = locft("evaluate", chat_folder, *few, "--ask-formats", "qaa")
    assert wrong.code == 2 and "--ask-formats: got 'qaa', expected raw, qa, chat or a text" in wrong.err


def test_select_reads_the_edits_that_a_map_names(locft, tmp_path, tiny_folder, monkeypatch):
    from sweeps.select import selection

    class Stopped(Exception):
        pass

    def stop(request, *_, **__):
        found.append(request)
        raise Stopped

    found: list = []
    monkeypatch.setattr(selection, "run_selection", stop)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.csv").write_text("frage,neu,anders\nWho?,Ann,By whom?\nWhere?,Rome,In which town?\n")
    maps = [word for one in ("prompt=frage", "target=neu", "rephrases=anders") for word in ("--map", one)]
    locft("select", tiny_folder, "--edits", "own.csv", *maps)
    assert [edit.rephrases for edit in found[0].edits.requests] == [("By whom?",), ("In which town?",)]
    assert found[0].command == ("locft", "select", str(tiny_folder), "--edits", "own.csv", *maps)
    said = locft("select", tiny_folder, "--edits", "own.csv", "--map", "promt=frage")
    assert said.code == 2 and "--map: got the field promt" in said.err


def test_an_edit_says_what_went_wrong_and_the_one_option_to_change(locft, tmp_path, tiny_folder, few_probes):
    few = ("--edits", "atlas", "--limit", 3, "--threads", 1, "--position", "1.mlp", "--train-formats", "raw")
    few += ("--method", "full")
    said = locft("edit", tiny_folder, *few, "--learning-rate", 1e-7, "--epochs", 2, "--out", tmp_path / "a b", "--json")
    (found,) = [one for one in said.json["signatures"] if one["name"] == "low reliability"]
    assert (found["setting"], found["value"]) == ("learning_rate", 2e-7)
    assert found["command"].startswith("locft edit ") and found["command"].endswith("--learning-rate 2e-07")
    again = locft(*shlex.split(found["command"])[1:])
    assert again.code == 0 and "Low reliability: Reliability is 0% at 1.mlp." in again.out
    assert "Change one thing: locft edit" in again.out
    assert json.loads((tmp_path / "a b" / "edit.json").read_text())["settings"]["learning_rate"] == 2e-7


def test_an_edit_goes_through_the_model_registry(swept, locft, tmp_path, tiny_folder):
    """Registered with the run of the trial it repeats, applied by its alias: the same model as from the folder."""
    run, _ = picked(locft)
    again = ("--from-run", run.info.run_id, "--register", "--json")
    made = locft("edit", tiny_folder, *again, "--out", tmp_path / "edited")
    assert made.code == 0, made.err
    address = made.json["registered"]
    assert address == "models:/locft-edit-" + str(tiny_folder).strip("/").replace("/", "-") + "@chosen"
    for source, folder in ((address, "one"), (address.replace("@chosen", "/1"), "two"), (tmp_path / "edited", "three")):
        said = locft("apply", source, "--model", tiny_folder, "--out", tmp_path / folder, "--json")
        assert said.code == 0 and said.json["position"] == made.json["position"], said.err
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("one", "two", "three")]
    assert weights[0] == weights[1] == weights[2]
    wrong = locft("apply", "models:/nothing@chosen", "--model", tiny_folder, "--out", tmp_path / "four")
    assert wrong.code == 2 and "nothing" in wrong.err and not (tmp_path / "four").exists()
    assert "models:/NAME@ALIAS" in locft("apply", "models:/x", "--model", tiny_folder, "--out", tmp_path / "five").err
    few = ("--edits", "atlas", "--limit", 4, "--position", "1.mlp_down")
    loose = locft("edit", tiny_folder, *few, "--out", tmp_path / "six", "--register")
    assert loose.code == 2 and "--register: there is no MLflow run" in loose.err and not (tmp_path / "six").exists()


def test_an_edit_that_diverges_is_work_that_failed(locft, tmp_path, tiny_folder, few_probes):
    wild = ("--limit", 4, "--position", "1.mlp", "--method", "full", "--learning-rate", "3e38", "--threads", 1)
    said = locft("edit", tiny_folder, "--edits", "atlas", *wild, "--out", tmp_path / "e", "--json")
    assert said.code == 1 and "diverged" in said.err and said.out == "" and not (tmp_path / "e").exists()
    assert "Change one thing: locft edit" in said.err and "--learning-rate 7.5e+37" in said.err


def test_a_benchmark_ends_with_its_own_exit_code(locft, tiny_folder, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tests.benchmarks.bench.run_bench", stop)
    said = locft("bench", tiny_folder, "--limit", 2, "--layers", 1, "--batch-size", 2)
    assert said.code == 130 and said.err.endswith("interrupted\n")


# processes


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[3])}


def start(*arguments, **options):
    command = [sys.executable, "-c", "from sweeps.commands.cli import main; main()", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), **options
    )


def test_exit_codes_of_a_real_process(tmp_path, tiny_folder):
    good, bad = start("positions", tiny_folder, "--json"), start("plan", tmp_path / "nothing.yaml", "--json")
    out, err = good.communicate(timeout=120)
    assert good.returncode == 0 and json.loads(out)["positions"] and err == ""
    out, err = bad.communicate(timeout=120)
    assert bad.returncode == 2 and out == "" and err.startswith("error: ") and "nothing.yaml" in err


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(workplace, tiny_folder, locft, trials_here):
    """SIGINT to a sweep and everything it started, as a terminal sends it; the same command then finishes the rest."""
    write_study(workplace, tiny_folder, space__seed=list(range(200)), epochs=60, resources={"concurrent": 1})
    process = start("sweep", "tiny.yaml", "--json", cwd=workplace, start_new_session=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("[3/"):
            break
    os.killpg(process.pid, signal.SIGINT)
    began = time.monotonic()
    out, rest = process.communicate(timeout=90)
    assert time.monotonic() - began < 30
    assert process.returncode == 130, (lines, rest)
    assert "interrupted; finished work is kept, and the same command continues from there" in rest
    assert "Traceback" not in rest, rest
    kept = json.loads(out)["trials"]
    assert 3 <= kept["done"] < 400 and kept["failed"] == 0

    seeds = f"space.seed={list(range(kept['done'] // 2 + 1))}"  # finishing all of them would take long
    assert locft("status", "tiny.yaml", "--json").json["done"] == kept["done"]
    before = locft("status", "tiny.yaml", "--set", seeds, "--json").json
    done = locft("sweep", "tiny.yaml", "--set", seeds, "--no-register", "--json")
    assert done.code == 0 and done.json["trials"]["done"] == done.json["trials"]["planned"] == before["planned"]
    after = locft("status", "tiny.yaml", "--json").json
    assert after["done"] == kept["done"] + before["left"], "nothing was run twice"
