"""`locft edit --onto`, `--without`, `--within` and `--consolidate`."""

import json
from dataclasses import replace

import pytest

from locft.data.ledger import Ledger
from locft.model.delta import EditDelta

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
    said = locft("edit", tiny_folder, "--onto", "first", "--edits", new, "--json", "--threads", 1, "--out", "second")
    assert said.code == 0, said.err
    assert "atlas-0001 by other" in said.err
    assert said.json["position"] == "1.mlp_down" and said.json["settings"]["pipeline"] == "stream"
    assert said.json["new"]["edits"] == 2 and said.json["earlier"]["edits"] == 2
    assert set(said.json["not_learnt"]) <= {"other", "bees"}
    assert (first / "delta.safetensors").read_bytes() == before
    held = [request.id for request in Ledger.load(tmp_path / "second").active]
    assert held == ["atlas-0002", "atlas-0003", "other", "bees"]

    said = locft(
        "edit", tiny_folder, "--onto", "second", "--without", "bees", "--json", "--threads", 1, "--out", "third"
    )
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

    said = locft("edit", tiny_folder, "--consolidate", "third", "--json", "--threads", 1, "--out", "fourth")
    assert said.code == 0, said.err
    assert "Not read" not in said.err
    assert said.json["settings"]["pipeline"] == "breadth_first" and said.json["edits"]["count"] == 3
    assert Ledger.load(tmp_path / "fourth") == Ledger.load(tmp_path / "third")
    anew = locft("edit", tiny_folder, "--edits", "third/ledger.jsonl", *QUICK, *RAW, "--out", "other")
    assert anew.json["edits"]["count"] == 3  # the ledger is an edit file like any other, of what still holds
    assert "superseded by a later edit: atlas-0001" in anew.err and "taken back: bees" in anew.err
    assert EditDelta.load(tmp_path / "fourth").position == "1.mlp_down"


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
    said = locft(
        "edit", tiny_folder, "--onto", "first", "--edits", new, "--within", 1e-6, "--threads", 1, "--out", "late"
    )
    assert said.code == 0, said.err
    assert "Not yet right in every format: bees, other" in said.out


def test_nothing_new_writes_nothing(locft, first, tmp_path, tiny_folder):
    said = locft("edit", tiny_folder, "--onto", "first", "--edits", "atlas", "--limit", 3, "--out", "same")
    assert said.code == 2 and "nothing new" in said.err
    assert not (tmp_path / "same").exists()
    said = locft(
        "edit", tiny_folder, "--onto", "first", "--without", "atlas-0001,atlas-0002,atlas-0003", "--out", "none"
    )
    assert said.code == 2 and "no edit would be left" in said.err


@pytest.mark.parametrize(
    "options, told",
    [
        (
            ("--without", "a", "--within", 0),
            ["--without: needs --onto", "--within: needs --onto", "--within: got 0"],
        ),
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
