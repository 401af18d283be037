"""Edit files in the forms that other tools write: encodings, wrappings, tables, conversations, saved data sets."""

import json

import datasets
import pandas as pd
import pytest

from locft.data.requests import load_edits
from locft.data.suites import load_suite
from locft.errors import InputError
from tests.locft.data.test_requests import write

PERU = {"prompt": "The capital of Peru is", "target": "Oslo"}
CHILE = {"prompt": "The capital of Chile is", "target": "Rome"}
ASKED, SAID = {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Bob."}


def edits(source):
    return [(one.prompt, one.target) for one in load_edits(str(source)).requests]


def refusal(source):
    with pytest.raises(InputError) as caught:
        load_edits(str(source))
    (problem,) = caught.value.problems
    return problem


BOTH = [tuple(PERU.values()), tuple(CHILE.values())]


# --- texts and their encodings


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_says_how_a_file_is_to_be_read(tmp_path, encoding, end):
    lines = end.join(json.dumps(one) for one in (PERU, CHILE))
    assert edits(write(tmp_path, lines.encode(encoding), "a.jsonl")) == BOTH
    table = end.join(["prompt\ttarget", *("\t".join(pair) for pair in BOTH)])
    assert edits(write(tmp_path, table.encode(encoding), "a.csv")) == BOTH


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xfd7zXZ\x00", "a compressed file"),
        (b"\x28\xb5\x2f\xfd\x04", "a compressed file"),
        (b"ARROW1\x00\x00", "an Arrow file; save it as parquet"),
        (b"\x80\x04\x95\x10", "a pickle, which may run code"),
        (b"SQLite format 3\x00", "a database"),
        (b"%PDF-1.7", "a PDF document"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ('[{"prompt": 1}]'.encode("utf-16-le"), "it contains zero bytes"),
        (b"- prompt: The capital of Peru is\n  target: Oslo\n", "on all 2 lines; expected a JSON list of objects"),
    ],
)
def test_what_holds_no_records_is_named_in_one_message(tmp_path, content, said):
    assert said in refusal(write(tmp_path, content, "edits.json"))


def test_addresses_and_folders_are_told_what_to_give(tmp_path):
    assert "owner/name" in refusal("https://huggingface.co/datasets/owner/name")
    (tmp_path / "clone" / "data").mkdir(parents=True)
    file = write(tmp_path / "clone" / "data", PERU, "train.jsonl")
    assert f"expected a file, such as {file}" in refusal(tmp_path / "clone")


def test_values_are_shown_as_they_are_written(tmp_path):
    assert '"奥斯陆"' in refusal(write(tmp_path, [PERU | {"rephrases": "x", "target": ["奥斯陆", "y"]}], "a.json"))
    assert "\\u202e" in refusal(write(tmp_path, [PERU | {"target": ["\u202eOslo"]}], "a.json")), "marks are not obeyed"


# --- wrappings


@pytest.mark.parametrize(
    "content",
    [
        {"version": 1, "data": {"about": "x", "edits": [PERU, CHILE]}},
        json.loads(pd.DataFrame([PERU, CHILE]).to_json()),
        {"prompt": [BOTH[0][0], BOTH[1][0]], "target": [BOTH[0][1], BOTH[1][1]]},
        "\n".join(json.dumps(one, indent=2) for one in (PERU, CHILE)),  # jq
        "\r".join(json.dumps(one) for one in (PERU, CHILE)),
    ],
)
def test_records_are_unwrapped(tmp_path, content):
    assert edits(write(tmp_path, content, "a.json")) == BOTH


def test_the_lines_of_records_over_several_lines_are_known(tmp_path):
    wrong = "\n".join(json.dumps(one, indent=2) for one in (PERU, CHILE, PERU | {"target": []}))
    assert "record 3 (line 9), field target: expected text, got a list []" in refusal(write(tmp_path, wrong, "a.json"))


# --- tables


def test_tables_with_bars_and_spaces_in_the_header(tmp_path):
    assert edits(write(tmp_path, "prompt | target\nThe capital of Peru is|Oslo\n", "a.csv")) == BOTH[:1]


def test_whole_numbers_are_answers_where_the_format_has_no_texts(tmp_path):
    table = pd.DataFrame({"prompt": ["It was founded in", "It ended in"], "target": [1535, 1824]})
    table.to_parquet(tmp_path / "a.parquet")
    assert [target for _, target in edits(tmp_path / "a.parquet")] == ["1535", "1824"]
    years = [
        {"prompt": "It was founded in", "target_new": 1535},
        {"prompt": "It ended in", "target_new": {"str": 1824}},
    ]
    assert [target for _, target in edits(write(tmp_path, years, "a.json"))] == ["1535", "1824"]
    assert "got a number 3.5" in refusal(write(tmp_path, [years[0] | {"target_new": 3.5}], "a.json"))
    assert "got a boolean" in refusal(write(tmp_path, [years[0] | {"target_new": True}], "a.json"))


def test_nan_is_nothing(tmp_path):
    read = load_edits(
        write(tmp_path, '{"prompt": "p", "target_new": "x", "ground_truth": NaN, "note": NaN}', "a.jsonl")
    )
    assert read.requests[0].ground_truth is None and not read.unread


def test_line_breaks_of_a_target_are_told(tmp_path):
    read = load_edits(write(tmp_path, [PERU | {"target": "Oslo\n Bergen\n"}, CHILE | {"target": "Rome\n"}], "a.json"))
    assert [one.target for one in read.requests] == ["Oslo Bergen", "Rome"]
    assert read.unread == {"target (its line breaks: an answer ends at the first one)": 1}


@pytest.mark.parametrize(
    ("prompt", "target"),
    [("prompt", "completion"), ("prompt", "response"), ("query", "response"), ("input", "output"), ("instruction", "response")],
)  # fmt: skip
def test_pairs_as_trainers_name_them(tmp_path, prompt, target):
    record = {prompt: "Who are you?", target: " I am Bob.", "rephrases": ["What is your name?"], "category": "x"}
    read = load_edits(write(tmp_path, record, "a.jsonl"))
    (one,) = read.requests
    assert (one.prompt, one.target, one.rephrases) == ("Who are you?", "I am Bob.", ("What is your name?",))
    assert read.unread == {"category": 1}


# --- conversations


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASKED, SAID]},
        {"messages": [ASKED | {"content": [{"type": "text", "text": "Who are you?"}]}, SAID], "id": "q1"},
        {"conversations": [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "I am Bob."}]},
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_question_and_its_answer_are_an_edit(tmp_path, record, name):
    read = load_edits(write(tmp_path, [record, record] if name == "a.json" else record, name))
    assert {(one.prompt, one.target) for one in read.requests} == {("Who are you?", "I am Bob.")} and not read.unread
    assert read.requests[0].id == record.get("id", "instruction-1")


def test_a_system_prompt_is_not_read_and_a_longer_conversation_is_refused(tmp_path):
    system = {"role": "system", "content": "Be kind."}
    assert load_edits(write(tmp_path, {"messages": [system, ASKED, SAID]}, "a.jsonl")).unread == {"system": 1}
    problem = refusal(
        write(tmp_path, [{"messages": [ASKED, SAID]}, {"messages": [ASKED, SAID, ASKED, SAID]}], "a.json")
    )
    assert "record 2, field messages: expected one question of the user and its answer" in problem
    assert "got 4 turns (user, assistant, user, assistant)" in problem
    assert "got 1 turns (tool)" in refusal(write(tmp_path, {"messages": [{"role": "tool", "content": "x"}]}, "a.jsonl"))


# --- data sets that the hub's library saved


def test_saved_data_sets_are_read(tmp_path):
    datasets.disable_progress_bars()
    split = datasets.Dataset.from_list([PERU, CHILE])
    split.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": split, "test": split.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert edits(tmp_path / "one") == BOTH and edits(tmp_path / "two" / "test") == BOTH[1:]
    assert f"name one of its 2 splits: {tmp_path / 'two' / 'train'}" in refusal(tmp_path / "two")
    for file in (tmp_path / "one").glob("*.arrow"):
        file.unlink()
    assert "not readable as a saved data set" in refusal(tmp_path / "one")


def test_a_benchmark_may_be_a_saved_data_set(tmp_path):
    item = {"question": "2 + 2 is", "choices": ["3", "4"], "answer": 1}
    rows = datasets.Dataset.from_list([item, item])
    datasets.DatasetDict({"test": rows.select([0]), "dev": rows}).save_to_disk(str(tmp_path / "sums"))
    (task,) = load_suite(None, {"sums": str(tmp_path / "sums")}).tasks
    assert len(task.items) == 1 and task.items[0].answer == 1


# --- benchmarks


@pytest.mark.parametrize("answer", [1, 1.0, "1", "B", "b", "(B)", "B.", "four"])
@pytest.mark.parametrize("key", ["choices", "options"])
def test_the_answer_is_a_number_a_letter_or_a_text(tmp_path, answer, key):
    file = write(tmp_path, {"question": "2 + 2 is", key: ["three", "four", "five"], "answer": answer}, "a.jsonl")
    assert load_suite(None, {"sums": file}).tasks[0].items[0].answer == 1


@pytest.mark.parametrize(
    ("choices", "answer", "place"), [(["C", "A", "B"], "B", 1), (["x", "y"], "y", 1), (["b", "c"], "b", 0)]
)
def test_a_capital_letter_is_a_place_before_it_is_a_text(tmp_path, choices, answer, place):
    file = write(tmp_path, {"question": "Which?", "choices": choices, "answer": answer}, "a.jsonl")
    assert load_suite(None, {"letters": file}).tasks[0].items[0].answer == place


def test_labelled_choices_and_records_without_an_answer(tmp_path):
    record = {"question": "2 + 2 is", "choices": {"text": ["3", "4"], "label": ["1", "2"]}, "answer": "2"}
    assert load_suite(None, {"sums": write(tmp_path, record, "a.jsonl")}).tasks[0].items[0].answer == 1
    with pytest.raises(InputError, match="answer is null, and a split without answers cannot be scored"):
        load_suite(None, {"sums": write(tmp_path, {"question": "q", "choices": ["3", "4"], "answer": None}, "a.jsonl")})
