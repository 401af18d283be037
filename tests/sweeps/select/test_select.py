"""`locft select` end to end on the tiny model: the answer, the files, MLflow, going on where it was, wrong inputs."""

import html
import json
import re
import shlex
from dataclasses import replace

import mlflow
import pytest

from sweeps.run.trial import train_and_measure
from sweeps.select import request
from sweeps.select.answer import edit_command
from sweeps.select.policy import Candidate, Run
from sweeps.select.request import selection_request
from sweeps.study.schema import Study
from sweeps.tracking.store import TrackingError

SMALL = ("--set", "capability.limit=5", "--set", "capability.prose_tokens=64", "--set", "epochs=6")


@pytest.fixture
def selected_on_ray(locft, workplace, tiny_folder, ray_running):
    """Runs a selection of the tiny model; further arguments after the usual ones."""

    def run(*arguments):
        return locft("select", tiny_folder, "--edits", "atlas", "--limit", 12, *SMALL, *arguments)

    return run


@pytest.fixture
def selected(selected_on_ray, trials_here):
    """The same in this process."""
    return selected_on_ray


def test_a_selection_answers_runs_nothing_again_and_with_a_larger_budget_only_what_is_new(
    selected, locft, workplace, tiny_folder, few_probes
):
    said = selected("--budget-share", 0.6)
    assert said.code == 0, said.err
    assert "Edit at" in said.out and "Chance that it is the best" in said.out
    (command,) = re.findall("Make the edit: (locft edit .*)", said.out)
    assert re.search(
        r"survey: \d position.*: the likeliest to matter for what they cost, apart in depth; about [\d.]+ \w+ of the budget remain",
        said.err,
    )
    file = workplace / "select-tiny-atlas.json"
    content = json.loads(file.read_text())
    assert content["how"]["method"] == "survey" and 0 < content["chance"] <= 1
    assert 0 <= content["chance_elsewhere"] <= 1 and content["runner_up"]["trades"]
    assert 0 < content["how"]["grid_share"] < 0.9
    assert content["measured_on"] == {"edits": 12, "compared_on": 12, "of": 12, "source": "atlas"}
    for name in ("reliability", "generalization", "capability_change", "drift_kl"):
        low, mean, high = (content["predicted"][name][end] for end in ("low", "mean", "high"))
        assert low <= mean <= high
    page = file.with_suffix(".html").read_text()
    assert content["position"] in page and "http://" not in page.split("<script")[0]
    assert command in html.unescape(page)

    client = mlflow.MlflowClient(f"sqlite:///{workplace / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("select-tiny-atlas")
    runs = client.search_runs([experiment.experiment_id])
    studies = [run for run in runs if run.data.tags["locft.kind"] == "study"]
    trials = [run for run in runs if run.data.tags["locft.kind"] == "trial"]
    assert len(studies) == 1 and studies[0].info.status == "FINISHED"
    assert len(trials) == content["how"]["runs"] and all(run.info.status == "FINISHED" for run in trials)
    assert studies[0].data.tags["locft.pick.position"] == content["position"]
    kept = {item.path for item in client.list_artifacts(studies[0].info.run_id)}
    assert {"position.json", "dashboard.html", "results.parquet"} <= kept and "probe.json" not in kept
    name = client.search_registered_models()[0].name
    version = client.get_model_version_by_alias(name, "recommended")
    assert version.tags["locft.position"] == content["position"] and version.run_id == studies[0].info.run_id
    assert content["run_id"] in {run.info.run_id for run in trials if run.data.tags.get("locft.pick")}

    edited = locft(
        "edit", tiny_folder, "--edits", "atlas", "--limit", 12, "--position", file, "--out", "edited", "--json"
    )
    assert edited.code == 0, edited.err
    assert edited.json["position"] == content["position"]
    assert edited.json["settings"]["learning_rate"] == content["settings"]["learning_rate"]
    single = client.get_run(content["run_id"]).data.metrics
    assert edited.json["metrics"]["reliability"] == pytest.approx(single["reliability"])

    again = selected("--budget-share", 0.6, "--json")
    for key in ("position", "settings", "predicted", "chance", "run_id"):
        assert again.json["position"][key] == content[key]
    assert "already known" in again.err and " lr " not in again.err, "no run is reported"
    more = selected("--budget-share", 0.9, "--json").json["position"]["how"]["runs"]
    assert more > content["how"]["runs"]
    trials = client.search_runs([experiment.experiment_id], "tags.`locft.kind` = 'trial'")
    ids = [run.data.tags["locft.trial_id"] for run in trials]
    assert len(set(ids)) == len(ids) == more


def test_of_many_edits_a_sample_is_compared(selected, workplace, tiny_folder, few_probes, monkeypatch):
    """The position is chosen on it, and what to expect is of all edits. The random sample can be had again."""
    monkeypatch.setattr("sweeps.select.request.COMPARED_ON", 5)
    monkeypatch.setattr("sweeps.select.request.USUAL_STEPS", 1)
    said = selected("--budget-share", 0.6, "--json")
    assert said.code == 0 and "compared on a random sample of 5 of the 12 edits; the leader is run with all" in said.err
    content = said.json["position"]
    assert content["measured_on"] == {"edits": 12, "compared_on": 5, "of": 12, "source": "atlas"}
    client = mlflow.MlflowClient(f"sqlite:///{workplace / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("select-tiny-atlas").experiment_id])
    trials = {run.info.run_id: run for run in runs if run.data.tags["locft.kind"] == "trial"}
    counts = {id: run.data.metrics["n_edits"] for id, run in trials.items() if "n_edits" in run.data.metrics}
    assert counts[content["run_id"]] == 12 and list(counts.values()).count(12) == 1 and {*counts.values()} == {5, 12}
    assert trials[content["run_id"]].data.tags.get("locft.pick")
    page = (workplace / "select-tiny-atlas.html").read_text()
    told = re.search(
        r"are from a random sample of 5 of the 12 edits. With all of them, the pick measured: reliability ([\d.]+)%",
        page,
    )
    assert float(told[1]) == pytest.approx(100 * content["predicted"]["reliability"]["mean"], abs=0.1)
    plain = selection_request(str(tiny_folder), "atlas", limit=4)
    request = selection_request(str(tiny_folder), "atlas", limit=12)
    assert (plain.compared_on, request.compared_on) == (0, 5)
    ids = [edit.id for edit in request.edits.requests]
    assert ids != sorted(ids) and ids == [edit.id for edit in request.study.edits.load().requests]
    run = Run(1, "mlp_down", 0.004, 1, 5)
    assert request.run(request.config(run)) == run and request.config(replace(run, edit_count=0)).edit_count == 0


@pytest.mark.parametrize("ended", ["diverged", "failed"])
def test_a_leader_that_all_edits_break_is_told(selected, workplace, few_probes, monkeypatch, ended):
    """What to expect then comes from the sample, and nobody takes it for more."""
    monkeypatch.setattr("sweeps.select.request.COMPARED_ON", 5)
    monkeypatch.setattr("sweeps.select.request.USUAL_STEPS", 1)

    def broken(trial, **given):
        if trial.edit_count == 0 and ended == "failed":
            raise ValueError("no room")
        found = train_and_measure(trial, **given)
        return found if trial.edit_count else replace(found, metrics=found.metrics | {"diverged": 1.0})

    monkeypatch.setattr("sweeps.session.train_and_measure", broken)
    few = ("--set", "space.layer=[1,2]", "--set", "space.module=[mlp_down]", "--set", "epochs=2")
    said = selected("--budget-share", 0.9, *few)
    assert said.code == 0 and f"the leader's run with all edits {ended}" in said.err
    content = json.loads((workplace / "select-tiny-atlas.json").read_text())
    assert content["measured_on"] == {"edits": 5, "compared_on": 5, "of": 12, "source": "atlas", "all_edits": ended}
    told = f"random sample of 5 of the 12 edits; with all of them the run {ended}, so do not expect the same there"
    assert told in said.out and told in (workplace / "select-tiny-atlas.html").read_text()


@pytest.mark.clock
def test_a_budget_in_minutes_is_kept_by_the_clock(selected_on_ray):
    said = selected_on_ray("--budget-minutes", 0.4, "--json")
    assert said.code == 0, said.err
    assert said.json["position"]["how"]["budget"] == {"minutes": 0.4}
    assert said.json["position"]["how"]["wall_seconds"] < 36


@pytest.fixture
def probed_here(monkeypatch):
    """The probe is made in this process, and there is no time for any run."""
    monkeypatch.setattr("sweeps.select.selection.on_workers", lambda works, *_: [work() for work in works])
    monkeypatch.setattr("sweeps.run.runner.run_trials", lambda *_, **__: "out_of_time")


def test_without_time_for_any_run_a_guess_is_given_and_told(
    selected, workplace, locft, tiny_folder, probed_here, few_probes
):
    said = selected("--budget-minutes", 0.001)
    assert said.code == 0 and "the best guess from other models" in said.out
    content = json.loads((workplace / "select-tiny-atlas.json").read_text())
    assert content["predicted"] == {} and content["chance"] is None and content["measured_on"]["edits"] == 0
    assert "the best guess from other models" in (workplace / "select-tiny-atlas.html").read_text()
    options = ["--edits", "atlas", "--limit", "4", "--position", "select-tiny-atlas.json", "--out", "out", "--json"]
    edited = locft("edit", tiny_folder, *options)
    assert edited.code == 0 and edited.json["position"] == content["position"]


def test_positions_and_seed_of_another_call_are_not_those_of_this_one(selected, workplace, probed_here, few_probes):
    """Of all positions that were probed, a call with the same seed takes its own; otherwise it probes anew."""

    def asked(*arguments):
        with_rate = ("--set", "space.method=full")
        said = selected("--budget-minutes", 0.001, "--json", *with_rate, *arguments)
        (total,) = re.findall(r"(\d+) positions; the chance", (workplace / "select-tiny-atlas.html").read_text())
        return said.json["position"]["position"], int(total), "probing every position" in said.err

    one = ("--set", "space.layer=[0]", "--set", "space.module=[attn]")
    assert asked(*one) == ("0.attn", 1, True)
    best, total, probed = asked()
    assert total > 1 and probed
    assert asked(*one) == ("0.attn", 1, False)
    assert asked() == (best, total, False)
    assert asked(*one, "--seed", 1) == ("0.attn", 1, True)
    client = mlflow.MlflowClient(f"sqlite:///{workplace / 'mlflow.db'}")
    (study,) = client.search_runs([client.get_experiment_by_name("select-tiny-atlas").experiment_id])
    old = [{"layer": 0, "module": "attn", "disturbance": 1.0, "gain": 1.0}]
    client.log_text(study.info.run_id, json.dumps(old), "probe.json")
    assert asked(*one) == ("0.attn", 1, True), "the file of an earlier version"


def test_an_answer_that_mlflow_does_not_take_is_given_all_the_same(selected, workplace, probed_here, monkeypatch):
    """Once without a registry, once without the store."""
    monkeypatch.setattr("sweeps.tracking.outbox.PATIENCE_SECONDS", 0.0)

    def away(*_, **__):
        raise TrackingError("connection refused")

    client = mlflow.MlflowClient(f"sqlite:///{workplace / 'mlflow.db'}")
    endings = {"answer.register_position": "FINISHED", "answer.Tracker.finish": "KILLED"}
    for lost, ending in endings.items():
        with monkeypatch.context() as patch:
            patch.setattr(f"sweeps.select.{lost}", away)
            said = selected("--budget-minutes", 0.001, "--json", "--out", workplace / f"{lost}.json")
        assert said.code == 0, said.err
        assert json.loads((workplace / f"{lost}.json").read_text())["position"] == said.json["position"]["position"]
        assert (workplace / f"{lost}.html").exists()
        (study,) = client.search_runs([client.get_experiment_by_name("select-tiny-atlas").experiment_id])
        assert study.info.status == ending


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (("--budget-share", 2), "--budget-share: got 2, expected a share of the full grid's cost"),
        (("--budget-share", 0.1, "--budget-minutes", 5), "--budget-share, --budget-minutes: got both"),
        (("--budget-minutes", -1), "--budget-minutes: got -1, expected a positive number"),
        (("--set", "space.learning_rate=[0.1,0.2]"), "space.learning_rate: a selection chooses it itself"),
        (("--set", "space.learning_rate=0.001"), "space.learning_rate: a selection chooses it itself"),
        (("--set", "space.seed=[1,2]"), "space.seed: a selection chooses seeds itself"),
        (("--set", "space.seed=7"), "space.seed: a selection chooses seeds itself"),
        (("--set", "space.batch_size=[1,2]"), "space.batch_size: got 2 values"),
        (("--set", "space.module=[mlp_sideways]"), "has no module 'mlp_sideways'"),
        (("--set", "space.layer=[99]"), "layer 99"),
        (("--set", "search={method: random, trials: 3}"), "search.method: got random"),
        (("--set", "budget.minutes=3"), "budget.minutes: got 3; a selection has budgets of its own"),
    ],
)
def test_wrong_inputs_are_told_before_anything_runs(selected, workplace, arguments, complaint):
    said = selected(*arguments)
    assert said.code == 2 and complaint in said.err, said.err
    assert {file.name for file in workplace.iterdir()} <= {"mlflow.db"}


def test_wrong_position_files_are_told(locft, workplace, tiny_folder):
    def edit(text):
        (workplace / "p.json").write_text(text)
        said = locft("edit", tiny_folder, "--edits", "atlas", "--limit", 4, "--position", "p.json", "--out", "out")
        assert said.code == 2 and not (workplace / "out").exists()
        return said.err

    good = {
        "format": "locft-position/1", "model": "tiny", "model_fingerprint": "0" * 16, "dtype": "float32",
        "position": "1.mlp_down", "depth": 0.5, "settings": {"learning_rate": 0.01},
    }  # fmt: skip
    assert "this is not JSON" in edit("{")
    assert "not a position file" in edit("{}")
    assert "fingerprint" in edit(json.dumps(good)), "another model's position is refused"
    bad = edit(json.dumps({**good, "position": "x", "depth": 7, "settings": {"epochs": "many", "speed": 1}}))
    many = 'settings.epochs: got "many", expected a whole number'
    for part in (many, "settings.speed: unknown", "LAYER.MODULE", "depth: got 7"):
        assert part in bad, bad
    missing = locft("edit", tiny_folder, "--edits", "atlas", "--position", "none.json", "--out", "out")
    assert missing.code == 2 and "none.json: cannot be read" in missing.err


def test_by_default_a_share_of_the_grid_may_be_spent_but_no_more_than_some_runs(tiny_folder, monkeypatch):
    asked = str(tiny_folder), "atlas"
    assert selection_request(*asked, limit=4).share == 0.1
    assert selection_request(*asked, limit=4, minutes=3).share is None
    monkeypatch.setattr(request, "DEFAULT_RUNS", 1)
    small = selection_request(*asked, limit=4)
    assert small.share == 1 / len(small.positions) < 0.1
    assert selection_request(*asked, limit=4, share=0.5).share == 0.5


def test_a_run_and_its_trial_are_found_from_each_other(tiny_folder):
    natural = selection_request(str(tiny_folder), "atlas", limit=12)
    request = selection_request(str(tiny_folder), "atlas", ["space.method=low_curvature"], limit=12)
    assert request.has_rate and not natural.has_rate
    candidate = Candidate(1, "mlp_down", disturbance=1.0, gain=50.0)
    assert natural.start_rate(candidate) == 0.004 != request.start_rate(candidate), "its default, which is not used"
    without = natural.config(Run(1, "mlp_down", 0.02, 1))
    assert natural.run(without) == Run(1, "mlp_down", 0.004, 1)
    run = Run(1, "mlp_down", 0.02, 1)
    trial = request.config(run)
    assert request.run(trial) == run and trial.position == "1.mlp_down" and trial.learning_rate == 0.02
    assert request.run(replace(trial, epochs=trial.epochs + 1)) is None, (
        "a trial with other settings is none of its runs"
    )
    assert request.run(replace(trial, data_fingerprint="other")) is None
    elsewhere = ["space.method=low_curvature", "space.module=[attn]"]
    narrow = selection_request(str(tiny_folder), "atlas", elsewhere, limit=12)
    assert narrow.id == request.id and narrow.run(trial) is None, "nor is one at a position that is not asked for"


def test_the_next_command_reads_the_same_edits():
    """Also of a file that only a map makes readable, whose name a shell would take apart."""
    fields = {"prompt": "frage", "locality": {"prompt": "nah[].text"}}
    edits = {"source": "meine Fragen.csv", "limit": 2, "sample_seed": 0, "map": fields}
    study = Study(name="select", model="a model", edits=edits)
    assert shlex.split(edit_command(study, "position 1.json")) == [
        "locft", "edit", "a model", "--edits", "meine Fragen.csv", "--limit", "2", "--sample-seed", "0", "--map",
        "prompt=frage",
        "--map", "locality.prompt=nah[].text", "--position", "position 1.json", "--out", "edited",
    ]  # fmt: skip
