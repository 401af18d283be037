"""The ledger of an edit: what arrives, what it supersedes, what is taken back, and its file."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locft.data import record_files
from locft.data.edit_request import EditRequest, LocalityPrompt
from locft.data.ledger import FILE_NAME, Ledger
from locft.data.requests import load_edits
from locft.errors import InputError

MONDAY, TUESDAY = "2026-01-05T08:00:00+00:00", "2026-01-06T08:00:00+00:00"


def edit(name, prompt, target, rephrases=()):
    return EditRequest(name, "", prompt, target, None, tuple(rephrases), ())


FIRST = (edit("a", "The capital of France is", "Oslo", ["France's capital:"]), edit("b", "Water boils at", "80"))


@pytest.fixture
def ledger():
    return Ledger.of(FIRST, MONDAY)


def test_new_edits_are_added(ledger):
    arrival = ledger.add([edit("c", "Mozart played the", "tuba")], TUESDAY)
    assert [request.id for request in arrival.ledger.active] == ["a", "b", "c"]
    assert [request.id for request in arrival.new] == ["c"]
    assert arrival.ledger.entries[-1].arrived == TUESDAY
    assert arrival.sentences == ()


@pytest.mark.parametrize("prompt", ["The capital of France is", "France's capital:"])
def test_a_later_edit_of_the_same_prompt_supersedes(ledger, prompt):
    arrival = ledger.add([edit("c", prompt, "Rome")], TUESDAY)
    assert [request.id for request in arrival.ledger.active] == ["b", "c"]
    assert arrival.ledger.entries[0].superseded_by == "c"
    assert "a by c" in arrival.sentences[0]


def test_a_rephrase_with_the_same_target_stays_beside_it(ledger):
    arrival = ledger.add([edit("c", "France's capital:", "oslo")], TUESDAY)
    assert [request.id for request in arrival.ledger.active] == ["a", "b", "c"] and arrival.sentences == ()


def test_one_of_two_answers_sent_again_takes_the_place_of_both():
    both = Ledger.of([edit("x", "p", "t"), edit("y", "p", "u"), edit("z", "q", "u")], MONDAY)
    arrival = both.add([edit("c", "p", "t"), edit("d", "q", "u")], TUESDAY)
    assert [request.id for request in arrival.new] == ["c"]
    assert [request.id for request in arrival.ledger.active] == ["z", "c"]
    assert "x by c, y by c" in arrival.sentences[0] and "Already learnt, not trained again: d." in arrival.sentences


def test_another_capital_letter_is_another_question(ledger):
    assert len(ledger.add([edit("c", "the capital of france is", "Rome")], TUESDAY).ledger.active) == 3


def test_what_is_known_is_not_trained_again(ledger):
    arrival = ledger.add([edit("z", "The capital of France is", "oslo")], TUESDAY)
    assert arrival.new == ()
    assert arrival.ledger == ledger
    assert "z" in arrival.sentences[0]


def test_an_id_that_is_taken_gets_a_number(ledger):
    """Files without ids number their edits alike, so an equal id alone says nothing."""
    arrival = ledger.add([edit("a", "Mozart played the", "tuba"), edit("a", "Bach played the", "drums")], TUESDAY)
    assert [request.id for request in arrival.ledger.active] == ["a", "b", "a#2", "a#3"]
    assert arrival.sentences == ("Added under another id, because the ledger has theirs: a as a#2, a as a#3.",)


@pytest.mark.parametrize(
    ("mark", "gone", "told"),
    [
        (("a", "Mozart played the"), ["a#2"], "Taken back: a#2."),
        (("a", "The capital of France is"), ["a"], "Taken back: a."),
        (("a", ""), ["a"], "Taken back: a."),
        (("a", "Haydn played the"), [], "not active in the ledger: a (there with another prompt)."),
        (("x", "Haydn played the"), [], "not active in the ledger: x."),
    ],
)
def test_a_mark_with_a_prompt_means_the_edit_of_this_prompt(ledger, mark, gone, told):
    second = ledger.add([edit("a", "Mozart played the", "tuba")], TUESDAY).ledger
    arrival = second.add([], TUESDAY, marked=[mark])
    assert [request.id for request in arrival.retracted] == gone
    assert told in " ".join(arrival.sentences)


def test_what_repeats_an_edit_is_taken_back_with_it():
    first = [edit("a", "p", "Oslo"), edit("b", "p", "oslo"), edit("c", "p", "Rome"), edit("d", "q", "Oslo")]
    arrival = Ledger.of(first, MONDAY).add([], TUESDAY, without=["a"])
    assert [request.id for request in arrival.retracted] == ["a", "b"]
    assert [request.id for request in arrival.ledger.active] == ["c", "d"]
    assert "Taken back: a." in arrival.sentences and arrival.sentences[-1].endswith("are the same: b.")


def test_an_edit_is_taken_back_and_may_come_again(ledger):
    arrival = ledger.add([], TUESDAY, without=["a"])
    assert [request.id for request in arrival.retracted] == ["a"]
    assert [request.id for request in arrival.ledger.active] == ["b"]
    again = arrival.ledger.add([replace(FIRST[0], id="c")], TUESDAY)
    assert [request.id for request in again.ledger.active] == ["b", "c"]


def test_every_wrong_id_is_told(ledger):
    gone = ledger.add([edit("c", "Water boils at", "70")], TUESDAY).ledger
    with pytest.raises(InputError) as error:
        gone.add([], TUESDAY, without=["x", "b"])
    assert len(error.value.problems) == 2
    assert "already superseded by c" in str(error.value)


def test_the_file_is_an_edit_file(ledger, tmp_path):
    changed = ledger.add([edit("c", "Water boils at", "70")], TUESDAY, without=["a"]).ledger
    (tmp_path / FILE_NAME).write_text(changed.text(), encoding="utf-8")
    assert Ledger.load(tmp_path) == changed
    edits = load_edits(str(tmp_path / FILE_NAME))
    assert [request.id for request in edits.requests] == ["c"]  # what holds no more is not made again
    assert edits.fingerprint == load_edits_of(tmp_path, edit("c", "Water boils at", "70")).fingerprint
    told = " ".join(edits.sentences())
    assert "Left out, marked as taken back: a." in told and "Left out, marked as superseded by a later edit: b." in told


def load_edits_of(folder, *requests):
    file = folder / "alone.jsonl"
    file.write_text(Ledger.of(requests, MONDAY).text(), encoding="utf-8")
    return load_edits(str(file))


@pytest.mark.parametrize("value", [True, "2026-01-06", "yes", 1])
def test_an_edit_is_marked_as_taken_back_in_a_file(ledger, tmp_path, value):
    file = tmp_path / "marked.jsonl"
    records = [{"id": "b", "retracted": value}, {"prompt": "France's capital:", "target": "Oslo", "retracted": value}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    with pytest.raises(InputError, match="every record is marked as taken back"):
        load_edits(str(file))
    marked = load_edits(str(file), only_marked=True)
    assert marked.requests == () and marked.retracted == (("b", ""), ("", "France's capital:"))
    arrival = ledger.add(marked.requests, TUESDAY, marked=marked.retracted)
    assert [request.id for request in arrival.retracted] == ["b"]  # of "a" this is a rephrase, which asks the same
    assert "but not active in the ledger: France's capital:" in " ".join(arrival.sentences)


def test_marks_in_another_layout_have_their_prompt_as_edits_are_read(tmp_path):
    file = tmp_path / "marked.jsonl"
    prompt = {"prompt": " The capital of {} is", "subject": "Peru", "target_new": {"str": "Oslo"}}
    records = [
        {"case_id": 7, "requested_rewrite": prompt, "retracted": True},
        {"instruction": "q", "input": "more", "output": "t", "retracted": True},
        {"note": "n", "retracted": True},
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    marks = (("7", "The capital of Peru is"), ("", "q\nmore"), ("record 3 (line 3)", ""))
    assert load_edits(str(file), only_marked=True).retracted == marks


NO_MARK = [False, None, "", "no", "false", 0, 0.0, float("nan"), "0.0", "NaN", "None", "f", "N", "null"]


@pytest.mark.parametrize("value", NO_MARK)
def test_an_empty_mark_is_none(ledger, tmp_path, value):
    file = tmp_path / "unmarked.jsonl"
    file.write_text(json.dumps({"prompt": "p", "target": "t", "retracted": value}) + "\n", encoding="utf-8")
    edits = load_edits(str(file))
    assert len(edits.requests) == 1 and edits.sentences() == ()
    record = ledger.entries[0].to_record() | {"retracted": value}
    (tmp_path / FILE_NAME).write_text(json.dumps(record) + "\n", encoding="utf-8")
    assert Ledger.load(tmp_path).active == FIRST[:1]


@pytest.mark.parametrize("name", ["0", "no", 0])
def test_an_edit_is_superseded_by_one_of_any_id(tmp_path, name):
    file = tmp_path / "marked.jsonl"
    records = [{"prompt": "p", "target": "t", "superseded_by": name}, {"id": name, "prompt": "p", "target": "u"}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    assert [request.target for request in load_edits(str(file)).requests] == ["u"]


def test_a_single_edit_with_locality_prompts_is_not_taken_for_a_wrapper_of_them(tmp_path):
    one = Ledger.of([replace(FIRST[0], locality=(LocalityPrompt("The capital of Spain is", "Madrid"),))], MONDAY)
    (tmp_path / FILE_NAME).write_text(one.text(), encoding="utf-8")
    assert Ledger.load(tmp_path) == one


def test_the_file_is_read_once(ledger, tmp_path, monkeypatch):
    (tmp_path / FILE_NAME).write_text(ledger.text(), encoding="utf-8")
    whole, times = record_files.read_text, []
    monkeypatch.setattr(record_files, "read_text", lambda path: times.append(path) or whole(path))
    assert Ledger.load(tmp_path) == ledger and times == [tmp_path / FILE_NAME]


def test_a_folder_without_one_is_told(tmp_path):
    with pytest.raises(InputError, match=FILE_NAME):
        Ledger.load(tmp_path)
    (tmp_path / FILE_NAME).write_text('{"id": "1", "prompt": "p", "target": "t"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="arrived"):
        Ledger.load(tmp_path)


PROMPTS = st.sampled_from(["p", "q", "r", "s"])


PAIRS = st.lists(st.tuples(PROMPTS, st.sampled_from("xyz")), max_size=4)


@given(PAIRS, PAIRS)
def test_what_arrives_has_one_active_target_whatever_the_first_file_held(first, pairs):
    ledger = Ledger.of([edit(f"{number}", *pair) for number, pair in enumerate(first)], MONDAY)
    ledger = ledger.add([edit("new", *pair) for pair in pairs], TUESDAY).ledger
    for prompt, target in dict(pairs).items():
        assert {request.target for request in ledger.active if request.prompt == prompt} == {target}


@given(st.lists(PAIRS, max_size=5))
def test_no_prompt_has_two_active_targets(arrivals):
    ledger = Ledger()
    for number, pairs in enumerate(arrivals):
        arrival = ledger.add([edit(f"{number}", prompt, target) for prompt, target in pairs], f"day {number}")
        ledger = arrival.ledger
        prompts = [request.prompt for request in ledger.active]
        assert len(set(prompts)) == len(prompts)
        assert set(arrival.new) <= set(ledger.active)
        assert len({entry.request.id for entry in ledger.entries}) == len(ledger.entries)
        latest = dict(pairs)  # the last one of a prompt wins
        assert {request.prompt: request.target for request in ledger.active}.items() >= latest.items()
