"""`locft edit --onto`, `--without`, `--within` and `--consolidate`."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from locft.data.ledger import Ledger
from locft.model.delta import EditDelta
from locft.model.models import folder_fingerprint

RAW = ("--method", "full", "--train-formats", "raw", "--ask-formats", "raw", "--threads", 1, "--json")
QUICK = ("--position", "1.mlp_down", "--learning-rate", 0.02, "--epochs", 8)


@pytest.fixture
def first(locft, tmp_path, monkeypatch, tiny_folder, few_probes):
    """Three edits in the folder `first`."""
    monkeypatch.chdir(tmp_path)
    said = locft("edit", tiny_folder, "--edits", "atlas", "--limit", 3, *QUICK, *RAW, "--out", "first")
    assert said.code == 0, said.err
    return tmp_path / "first"


@pytest.fixture
def new(tmp_path):
    """One edit that contradicts the first of the atlas, and one of another prompt."""
    edits = [
        {"id": "other", "prompt": "The capital of Portugal is", "target": "Rome"},
        {"id": "bees", "prompt": "Bees make", "target": "granite"},
    ]
    file = tmp_path / "new.jsonl"
    file.write_text("".join(json.dumps(edit) + "\n" for edit in edits), encoding="utf-8")
    return file


def test_a_story_of_an_edit(locft, first, new, tmp_path, tiny_folder):
    before = (first / "delta.safetensors").read_bytes()
    onto = ("--onto", "first", "--edits", new, "--replay", 2)
    said = locft("edit", tiny_folder, *onto, "--json", "--threads", 1, "--out", "second")
    assert said.code == 0, said.err
    assert "atlas-0001 by other" in said.err and "no effect" not in said.err
    assert said.json["settings"]["replay"] == 2
    assert said.json["position"] == "1.mlp_down" and said.json["settings"]["pipeline"] == "stream"
    assert said.json["new"]["edits"] == 2 and said.json["earlier"]["edits"] == 2
    assert set(said.json["not_learnt"]) <= {"other", "bees"}
    assert (first / "delta.safetensors").read_bytes() == before
    held = [request.id for request in Ledger.load(tmp_path / "second").active]
    assert held == ["atlas-0002", "atlas-0003", "other", "bees"]

    without = ("--onto", "second", "--without", "bees")
    said = locft("edit", tiny_folder, *without, "--json", "--threads", 1, "--out", "third")
    assert said.code == 0, said.err
    assert "Taken back: bees" in said.err and "Not read" not in said.err
    assert "bees" not in [request.id for request in Ledger.load(tmp_path / "third").active]

    back = tmp_path / "back.jsonl"
    back.write_text('{"id": "bees", "retracted": true}\n', encoding="utf-8")
    said = locft("edit", tiny_folder, "--onto", "second", "--edits", back, "--json", "--threads", 1, "--out", "by-file")
    assert said.code == 0, said.err
    assert said.err.count("aken back: bees") == 1
    assert [one.active for one in Ledger.load(tmp_path / "by-file").entries] == [
        one.active for one in Ledger.load(tmp_path / "third").entries
    ]

    anew = ("--consolidate", "third", "--replay", 2)
    said = locft("edit", tiny_folder, *anew, "--json", "--threads", 1, "--out", "fourth")
    assert said.code == 0, said.err
    assert "Not read" not in said.err and "fingerprint" not in said.err
    assert "--replay has no effect: it needs --pipeline stream" in said.err
    assert said.json["settings"]["pipeline"] == "breadth_first" and said.json["edits"]["count"] == 3
    assert Ledger.load(tmp_path / "fourth") == Ledger.load(tmp_path / "third")
    anew = locft("edit", tiny_folder, "--edits", "third/ledger.jsonl", *QUICK, *RAW, "--out", "other")
    assert anew.json["edits"]["count"] == 3  # the ledger is an edit file like any other, of what still holds
    assert "superseded by a later edit: atlas-0001" in anew.err and "taken back: bees" in anew.err
    assert EditDelta.load(tmp_path / "fourth").position == "1.mlp_down"


def test_a_ledger_is_not_lost_to_another_edit(locft, first, new, tmp_path, tiny_folder, monkeypatch):
    fresh = ("edit", tiny_folder, "--edits", "atlas", "--limit", 3, *QUICK, *RAW, "--out")
    onto = ("edit", tiny_folder, "--onto", "first", "--edits", new, "--threads", 1, "--out", "second")
    times = map("2100-01-{:02}T00:00:00+00:00".format, range(1, 29))
    monkeypatch.setattr("sweeps.commands.edit_source.now", lambda: next(times))
    assert locft(*onto).code == locft(*onto).code == locft(*fresh, "first").code == 0, "again what it was"
    before = {file: file.read_bytes() for file in (tmp_path / "second").iterdir()}
    said = locft(*fresh, "second")
    assert said.code == 2 and said.out == ""
    assert "--out second: holds 3 edits that this one would lose (atlas-0001, other, bees); continue it" in said.err
    assert {file: file.read_bytes() for file in (tmp_path / "second").iterdir()} == before
    said = locft(*fresh[:3], "first/ledger.jsonl", "--limit", 2, *QUICK, *RAW, "--out", "first")
    assert said.code == 2 and "first/ledger.jsonl: this is the input file" in said.err


def test_a_folder_that_was_not_written_to_its_end_is_not_continued(locft, first, new, tiny_folder, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    other = ("edit", tiny_folder, "--edits", new, *QUICK, *RAW, "--out", "first")
    with monkeypatch.context() as patch:
        patch.setattr("sweeps.commands.edit.write", stop)
        said = locft(*other)
    assert said.code == 130 and said.err.endswith("\ninterrupted\n"), "nothing is kept"
    onto = ("edit", tiny_folder, "--onto", "first", "--edits", "atlas", "--limit", 4, "--threads", 1, "--out", "second")
    said = locft(*onto)
    assert said.code == 2 and "first: delta.safetensors is not the one that edit.json describes" in said.err
    assert locft(*other).code == locft(*onto).code == 0


def test_all_edits_are_trained_anew_on_another_model(locft, first, tiny_folder, chat_folder):
    about = json.loads((first / "edit.json").read_text())
    (first / "edit.json").write_text(json.dumps(about | {"run_id": "run-7"}))
    models = folder_fingerprint(tiny_folder), folder_fingerprint(chat_folder)
    said = locft("edit", chat_folder, "--consolidate", "first", "--threads", 1, "--json", "--out", "second")
    assert said.code == 0, said.err
    for told in ("run-7 is left out", *models):
        assert told in said.err
    assert said.json["run_id"] is None and EditDelta.load(first.parent / "second").base_fingerprint == models[1]
    same = locft("edit", tiny_folder, "--consolidate", "first", "--threads", 1, "--json", "--out", "third")
    assert same.json["run_id"] == "run-7"
    onto = locft("edit", chat_folder, "--onto", "first", "--without", "atlas-0001", "--out", "fourth")
    assert onto.code == 2 and "give the model it was made on" in onto.err


def test_edits_of_a_ledger_that_contradict_each_other_are_taken_back(
    locft, few_probes, tmp_path, monkeypatch, tiny_folder
):
    monkeypatch.chdir(tmp_path)
    edits = [{"id": name, "prompt": "Bees make", "target": name} for name in ("granite", "sand")]
    Path("edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in edits))
    assert locft("edit", tiny_folder, "--edits", "edits.jsonl", *QUICK, *RAW, "--out", "first").code == 0
    for how in (("--consolidate", "first"), ("--consolidate=first",)):
        said = locft("edit", tiny_folder, *how, "--threads", 1, "--json", "--out", "second")
        (found,) = [one for one in said.json["signatures"] if one["name"] == "edits fight each other"]
        assert (found["setting"], found["value"]) == ("without", "IDS") and "--onto" in found["command"]
    assert locft(*shlex.split(found["command"].replace("IDS", "sand"))[1:]).code == 0
    assert [request.id for request in Ledger.load(tmp_path / "second").active] == ["granite"]


def test_each_prompt_that_is_taken_back_is_trained_to_what_holds_now(
    locft, first, new, tmp_path, tiny_folder, monkeypatch
):
    """A correction in the same run, another edit of the prompt that stays, or the unedited model's answer: never two."""
    from locft.train import encoding

    portugal, other, kept = Ledger.load(first).entries
    rival = replace(kept, request=replace(kept.request, id="rival", target="granite"))
    (first / "ledger.jsonl").write_text(Ledger((portugal, other, kept, rival)).text(), encoding="utf-8")
    mark = {"id": portugal.request.id, "prompt": portugal.request.prompt, "retracted": True}
    new.write_text(json.dumps(mark) + "\n" + new.read_text(encoding="utf-8"), encoding="utf-8")
    trained, encode = [], encoding.encode_edits
    monkeypatch.setattr(encoding, "encode_edits", lambda *given: trained.extend(given[1]) or encode(*given))
    gone = ("--without", f"{other.request.id},rival")
    said = locft("edit", tiny_folder, "--onto", "first", "--edits", new, *gone, "--threads", 1, "--out", "second")
    assert said.code == 0, said.err
    targets = {one.prompt: {each.target for each in trained if each.prompt == one.prompt} for one in trained}
    assert targets[portugal.request.prompt] == {"Rome"} and targets[kept.request.prompt] == {kept.request.target}
    assert len(targets[other.request.prompt]) == 1 and other.request.target not in targets[other.request.prompt]
    assert len(Ledger.load(tmp_path / "second").active) == 3


def test_a_prompt_to_which_the_unedited_model_says_nothing_is_named(locft, first, tmp_path, tiny_folder, monkeypatch):
    from locft.measure import generation

    asked = generation.greedy_answers
    monkeypatch.setattr(
        generation, "greedy_answers", lambda *given: [replace(answer, text="") for answer in asked(*given)]
    )
    said = locft("edit", tiny_folder, "--onto", "first", "--without", "atlas-0001", "--threads", 1, "--out", "second")
    assert said.code == 0, said.err
    assert "the unedited model's answer to atlas-0001 is empty" in said.err
    assert all(EditDelta.load(tmp_path / "second").tensors[name].equal(value)
               for name, value in EditDelta.load(first).tensors.items())  # fmt: skip


def test_a_description_that_is_none_is_told(locft, first, new, tiny_folder):
    (first / "edit.json").write_text("[]", encoding="utf-8")
    said = locft("edit", tiny_folder, "--onto", "first", "--edits", new, "--out", "second")
    assert said.code == 2 and "first/edit.json: expected the description of an edit" in said.err


def test_how_edits_are_read_needs_edits(locft, first, tmp_path, tiny_folder):
    only = ("--onto", "first", "--without", "atlas-0001", "--limit", 1, "--map", "prompt=q")
    said = locft("edit", tiny_folder, *only, "--out", "second")
    assert said.code == 2 and "--limit: it only applies" in said.err and "--map: it only applies" in said.err
    assert not (tmp_path / "second").exists()


def test_time_ends_the_training(locft, first, new, tiny_folder):
    soon = ("--onto", "first", "--edits", new, "--within", 1e-6)
    said = locft("edit", tiny_folder, *soon, "--threads", 1, "--out", "late")
    assert said.code == 0, said.err
    assert "Not yet right in every format: bees, other" in said.out


def test_nothing_new_writes_nothing(locft, first, tmp_path, tiny_folder):
    said = locft("edit", tiny_folder, "--onto", "first", "--edits", "atlas", "--limit", 3, "--out", "same")
    assert said.code == 2 and "nothing new" in said.err
    assert not (tmp_path / "same").exists()
    every = "atlas-0001,atlas-0002,atlas-0003"
    said = locft("edit", tiny_folder, "--onto", "first", "--without", every, "--out", "none")
    assert said.code == 2 and "no edit would be left" in said.err


@pytest.mark.parametrize(
    "options, told",
    [
        (("--without", "a", "--within", 0), ["--without: needs --onto", "--within: needs --onto", "--within: got 0"]),
        (("--onto", "x"), ["--onto: expected new edits"]),
        (("--onto", "x", "--without", " ,"), ["--without: got ' ,', expected ids of edits"]),
        (
            ("--onto", "x", "--edits", "atlas", "--position", "1.mlp"),
            ["--position: leave it out; an edit that continues another keeps"],
        ),
        (
            ("--onto", "x", "--edits", "atlas", "--pipeline", "depth_first", "--arrival", 2),
            ["--pipeline: leave it out", "--arrival: leave it out"],
        ),
        (("--onto", "x", "--consolidate", "y"), ["--consolidate: it retrains all edits"]),
        (("--consolidate", "x", "--edits", "atlas"), ["--consolidate: it trains only the edits in the ledger"]),
        (("--onto", "out", "--edits", "atlas"), ["--out out: this folder holds the edit to continue"]),
        (("--onto", "nowhere", "--edits", "atlas"), ["nowhere/edit.json"]),
    ],
)
def test_options_that_do_not_fit(locft, tmp_path, monkeypatch, tiny_folder, options, told):
    monkeypatch.chdir(tmp_path)
    said = locft("edit", tiny_folder, *options, "--out", "out")
    assert said.code == 2
    for words in told:
        assert words in said.err
    assert not (tmp_path / "out").exists()
