"""Benchmarks in their published layouts to items, and what is said about files that are wrong."""

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from locft.data.suites import load_suite
from locft.errors import InputError
from tests.locft.data.test_requests import write

REAL = Path(__file__).resolve().parents[3] / ".." / "shared" / "data" / "capability"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real benchmark files are not beside the repository")
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# fmt: off
RECORDS = {
    "arc": {"question": "Why?", "choices": {"text": ["Sun", "Moon", "Star"], "label": ["1", "2", "3"]}, "answerKey": "2"},
    "openbookqa": {
        "question_stem": "Frogs", "choices": {"text": ["swim", "fly"], "label": ["A", "B"]}, "answerKey": "B",
    },
    "mmlu": {"question": "2 + 2?", "choices": ["3", "4", "5", "6"], "answer": 1, "subject": "arithmetic"},
    "mmlu_pro": {"question": "2 + 2?", "options": ["3", "4", "5"], "answer": "B", "category": "arithmetic"},
    "lambada": {"text": 'He shook his head. "No," he said'},
    "blimp": {"sentence_good": "Cats sleep.", "sentence_bad": "Cats sleeps.", "UID": "agreement"},
    "piqa": {"goal": "To cool soup,", "sol1": "blow on it.", "sol2": "boil it.", "label": 0},
    "hellaswag": {
        "activity_label": "Baking", "ctx_a": "[header] How to bake [title] Mix the flour.", "ctx_b": "then she",
        "ctx": "unused", "endings": ["bakes [step] it.", "flies."], "label": "1",
    },
    "sciq": {
        "support": "Ice is cold.", "question": "What is cold?", "distractor1": "fire", "distractor2": "lava",
        "distractor3": "steam", "correct_answer": "ice",
    },
    "own": {"id": "x1", "context": "The sky is", "choices": [" blue", " green"], "answer": 0},
    "own_last_word": {"context": "Once upon a", "choices": [" time"], "answer": 0},
}
# fmt: on
EXPECTED = {  # context, choices, answer, rule
    "arc": ("Question: Why?\nAnswer:", (" Sun", " Moon", " Star"), 1, "sum"),
    "openbookqa": ("Frogs", (" swim", " fly"), 1, "mean"),
    "mmlu": ("2 + 2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:", (" A", " B", " C", " D"), 1, "sum"),
    "mmlu_pro": ("2 + 2?\nA. 3\nB. 4\nC. 5\nAnswer:", (" A", " B", " C"), 1, "sum"),
    "lambada": ('He shook his head. "No," he', (" said",), 0, "exact"),
    "blimp": ("", ("Cats sleep.", "Cats sleeps."), 0, "sum"),
    "piqa": ("Question: To cool soup,\nAnswer:", (" blow on it.", " boil it."), 0, "sum"),
    "hellaswag": ("Baking: How to bake. Mix the flour. Then she", (" bakes it.", " flies."), 1, "mean"),
    "sciq": ("Ice is cold.\nQuestion: What is cold?\nAnswer:", (" fire", " lava", " steam", " ice"), 3, "sum"),
    "own": ("The sky is", (" blue", " green"), 0, "sum"),
    "own_last_word": ("Once upon a", (" time",), 0, "exact"),
}


def one_task(path, **settings):
    (task,) = load_suite(None, {"task": path}, **settings).tasks
    return task


def problems_of(tasks, suite=None, **settings):
    with pytest.raises(InputError) as caught:
        load_suite(suite, tasks, **settings)
    return caught.value.problems


@pytest.mark.parametrize("layout", RECORDS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_every_layout_in_every_file_form(tmp_path, layout, name):
    if name == "a.parquet":
        import pyarrow
        import pyarrow.parquet

        path = str(tmp_path / name)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([RECORDS[layout]]), path)
    else:
        path = write(tmp_path, [RECORDS[layout]], name)
    (item,) = one_task(path).items
    assert (item.context, item.choices, item.answer, item.rule) == EXPECTED[layout]
    assert item.task == "task"
    assert item.id == RECORDS[layout].get("id", "a:1")


@pytest.mark.parametrize("layout", ["arc", "piqa", "blimp", "sciq", "hellaswag", "mmlu", "mmlu_pro", "lambada"])
def test_csv_with_json_in_the_cells_of_lists(tmp_path, layout):
    import csv

    record = RECORDS[layout]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(record)
        writer.writerow([value if isinstance(value, str) else json.dumps(value) for value in record.values()])
    (item,) = one_task(str(tmp_path / "a.csv")).items
    assert (item.context, item.choices, item.answer, item.rule) == EXPECTED[layout]
    assert item.id == "a:2"


@pytest.mark.parametrize("cell", ["[' blue' ' green']", "[' blue'\n ' green']"])
def test_a_list_without_commas_is_no_single_choice(tmp_path, cell):
    (problem,) = problems_of({"t": write(tmp_path, f'context,choices,answer\nThe sky is,"{cell}",0\n', "a.csv")})
    assert (
        "record 1 (line 2), field choices: expected a list of 1 or more texts, got a list or an object that" in problem
    )


@pytest.mark.parametrize(
    ("questions", "answers"),
    [
        ([(["12", "24", "36"], "24")], [1]),
        ([(["0", "1", "2"], "2")], [2]),
        ([(["1", "2", "3", "4"], "2"), (["red", "blue"], "red")], [1, 0]),  # all can be texts, not all indices
        ([(["1", "2", "3", "4"], "2"), (["12", "24"], "24")], [1, 1]),
        ([(["1", "2", "3", "4"], "2"), (["red", "blue"], "0")], [2, 0]),  # all can be indices, not all texts
        ([(["1", "2", "3", "4"], 2), (["1", "2", "3", "4"], "2")], [2, 2]),
        ([(["A", "B", "AB", "O"], "AB")], [2]),
        ([(["1", "2", "3", "4"], "2")], None),
        ([(["1", "2", "3", "4"], "2"), (["red", "blue"], "0"), (["red", "blue"], "red")], None),
    ],
)
@pytest.mark.parametrize("lettered", [True, False])
def test_digits_are_an_index_or_a_text_as_the_file_has_it(tmp_path, questions, answers, lettered):
    choices, answer, question = ("choices", "answer", "question") if lettered else ("endings", "label", "ctx")
    records = [{question: "q", choices: given, answer: right} for given, right in questions]
    path = write(tmp_path, records, "a.jsonl")
    if answers is not None:
        assert [item.answer for item in one_task(path).items] == answers
        return
    (problem,) = problems_of({"t": path})
    wanted = "the letter of the right choice (" if lettered else "the number of the right choice as a JSON number ("
    assert f"record 1 (line 1), field {answer}: expected {wanted}" in problem


MMLU_ROWS = [
    ["How many, about?", "55,000", "550,000", "5,500,000", "2", "B"],
    ["What was it?", "80%", "40%", "-40%", "-80%", "C"],
]
MMLU_ITEMS = [
    ("How many, about?\nA. 55,000\nB. 550,000\nC. 5,500,000\nD. 2\nAnswer:", 1),
    ("What was it?\nA. 80%\nB. 40%\nC. -40%\nD. -80%\nAnswer:", 2),
]


@pytest.mark.parametrize(
    ("header", "number"),
    [
        (None, False),
        (None, True),
        (["", "Question", "A", "B", "C", "D", "Answer"], True),
        (["question", "A", "B", "C", "D", "answer"], False),
        (["id", "question", "A", "B", "C", "D", "answer"], True),
    ],
)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_mmlu_as_a_table_with_and_without_a_header(tmp_path, header, number, delimiter):
    import csv

    rows = [[str(index), *row] if number else row for index, row in enumerate(MMLU_ROWS)]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows] if header else rows)
    items = one_task(str(tmp_path / "a.csv")).items
    assert [(item.context, item.answer) for item in items] == MMLU_ITEMS
    assert all(item.choices == (" A", " B", " C", " D") for item in items)
    assert items[0].id == ("a:2" if header else "a:1")


def test_tables_with_other_numbers_of_options(tmp_path):
    path = write(tmp_path, "Question,A,B,C,D,E,Answer\nq,1,2,3,4,5,E\nr,1,2,3,,,C\n", "a.csv")
    assert [(len(item.choices), item.answer) for item in one_task(path).items] == [(5, 4), (3, 2)]
    (problem,) = problems_of({"t": write(tmp_path, "question,A,B,answer\nq,1,2,C\n", "b.csv")})
    assert "field answer: expected the number of the right choice, 0 to 1" in problem
    assert "unknown layout" in problems_of({"t": write(tmp_path, "Question,A,B,C,D\nq,1,2,3,4\n", "c.csv")})[0]
    (problem,) = problems_of({"t": write(tmp_path, "What is it?,x,y\nAnd this?,x,y\n", "d.csv")})
    assert (
        "unknown layout, got the keys What is it?, x, y" in problem and "header line with the column names" in problem
    )


def test_variants_of_layouts(tmp_path):
    letter = RECORDS["mmlu"] | {"answer": "D"}
    assert one_task(write(tmp_path, [letter], "a.jsonl")).items[0].answer == 3
    no_support = RECORDS["sciq"] | {"support": ""}
    assert one_task(write(tmp_path, [no_support], "a.jsonl")).items[0].context == "Question: What is cold?\nAnswer:"
    whole = {"ctx": "She", "endings": ["runs.", "[x]"], "label": 0}
    item = one_task(write(tmp_path, [whole], "a.jsonl")).items[0]
    assert (item.context, item.choices) == ("She", (" runs.", " [x]"))
    own_line = {"text": '"Go," he said.\n\nShane'}
    item = one_task(write(tmp_path, [own_line], "a.jsonl")).items[0]
    assert (item.context, item.choices) == ('"Go," he said.\n\n', ("Shane",))


def test_variants_of_one_layout_may_be_mixed(tmp_path):
    whole = {"ctx": "She", "endings": ["runs.", "flies."], "label": 0}
    items = one_task(write(tmp_path, [whole, RECORDS["hellaswag"]], "a.jsonl")).items
    assert [item.context for item in items] == ["She", EXPECTED["hellaswag"][0]]


def test_folder_of_files_is_one_task(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        write(tmp_path, [RECORDS["blimp"]] * 2, name)
    write(tmp_path, "not read", "README")
    task = one_task(str(tmp_path))
    assert [item.id for item in task.items] == ["a:1", "a:2", "b:1", "b:2"]
    write(tmp_path, [RECORDS["piqa"]], "c.jsonl")
    (problem,) = problems_of({"pairs": str(tmp_path)})
    assert "different layouts" in problem and "is BLiMP" in problem and "is PIQA" in problem


@pytest.mark.parametrize("layout", RECORDS)
def test_a_json_file_may_be_one_item(tmp_path, layout):
    """Not a wrapper of records, whatever it holds."""
    items = one_task(write(tmp_path, RECORDS[layout], "a.json")).items
    assert [(item.context, item.choices, item.answer, item.rule) for item in items] == [EXPECTED[layout]]


def test_prose_may_be_one_record(tmp_path):
    task = {"t": write(tmp_path, [RECORDS["blimp"]], "a.jsonl")}
    assert load_suite(None, task, prose=write(tmp_path, {"text": "A b."}, "p.json")).prose == ("A b.",)


def test_limit_is_evenly_spaced_and_repeatable(tmp_path):
    path = write(tmp_path, [RECORDS["blimp"]] * 10, "a.jsonl")
    assert [item.id for item in one_task(path, limit=4).items] == ["a:1", "a:3", "a:6", "a:8"]
    assert one_task(path, limit=4) == one_task(path, limit=4)
    assert len(one_task(path, limit=99).items) == 10


def test_chance_is_that_of_the_items(tmp_path):
    records = [RECORDS["arc"], RECORDS["arc"] | {"choices": {"text": ["a", "b"], "label": ["1", "2"]}}]
    assert one_task(write(tmp_path, records, "a.jsonl")).chance == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert one_task(write(tmp_path, [RECORDS["lambada"]], "a.jsonl")).chance == 0


def test_fingerprint_is_that_of_the_content(tmp_path):
    first = load_suite(None, {"t": write(tmp_path, [RECORDS["blimp"]], "a.jsonl")})
    moved = load_suite(None, {"t": write(tmp_path, [RECORDS["blimp"]], "renamed.json")})
    other = load_suite(None, {"t": write(tmp_path, [RECORDS["blimp"] | {"sentence_bad": "Cat sleep."}], "a.jsonl")})
    text = write(tmp_path, "Hi there.", "p.txt")
    prose = load_suite(None, {"t": write(tmp_path, [RECORDS["blimp"]], "a.jsonl")}, prose=text)
    assert first.fingerprint == moved.fingerprint
    assert len({first.fingerprint, other.fingerprint, prose.fingerprint}) == 3
    alone, of_other, of_prose = (suite.fingerprints for suite in (first, other, prose))
    assert alone["items"] == of_prose["items"] != of_other["items"]
    assert alone["prose"] == of_other["prose"] != of_prose["prose"]


def test_built_in_probes():
    suite = load_suite()
    tasks = {task.name: task for task in suite.tasks}
    assert {"world_facts", "grammar", "everyday", "last_word"} <= set(tasks)
    assert sum(len(task.items) for task in suite.tasks) >= 600
    assert tasks["last_word"].chance == 0 and all(item.rule == "exact" for item in tasks["last_word"].items)
    assert tasks["world_facts"].chance == pytest.approx(0.25)
    assert tasks["grammar"].chance == tasks["everyday"].chance == pytest.approx(0.5)
    assert all(item.context == "" for item in tasks["grammar"].items)
    for name in ("world_facts", "everyday", "last_word"):
        assert all(choice.startswith(" ") for item in tasks[name].items for choice in item.choices)
    assert len(suite.prose[0]) > 5000
    assert {len(task.items) for task in load_suite(limit=7).tasks} == {7}


def test_probes_and_named_tasks_together(tmp_path):
    path = write(tmp_path, [RECORDS["arc"]], "a.jsonl")
    assert [task.name for task in load_suite("probes", {"arc_easy": path}).tasks][-1] == "arc_easy"
    (problem,) = problems_of({"grammar": path}, suite="probes")
    assert "has a task of this name" in problem


def test_prose_from_text_and_from_records(tmp_path):
    path = write(tmp_path, [RECORDS["arc"]], "a.jsonl")
    plain = write(tmp_path, "First line.\nSecond line.\n", "p.txt")
    assert load_suite(None, {"t": path}, prose=plain).prose == ("First line.\nSecond line.\n",)
    records = write(tmp_path, [{"text": "First line.\n"}, {"text": ""}, {"text": "Second."}], "p.jsonl")
    assert load_suite(None, {"t": path}, prose=records).prose == ("First line.\n\nSecond.",)
    assert "no text in it" in problems_of({"t": path}, prose=write(tmp_path, " \n", "e.txt"))[0]
    assert 'prose needs a field "text" that holds text' in problems_of({"t": path}, prose=path)[0]
    assert "no such file; did you mean" in problems_of({"t": path}, prose=str(tmp_path / "pp.txt"))[0]
    assert "is a folder" in problems_of({"t": path}, prose=str(tmp_path))[0]


@pytest.mark.parametrize(
    ("layout", "change", "expected"),
    [
        ("arc", {"answerKey": "E"}, 'field answerKey: expected one of 1, 2, 3, got a string "E"'),
        ("arc", {"choices": {"text": ["a"], "label": ["1", "2"]}}, "choices.text: expected a list of 2 or more texts"),
        (
            "arc",
            {"choices": {"text": ["a", "b", "c"], "label": ["1", "2"]}},
            "choices.label: expected 3 labels, one per choice",
        ),
        ("arc", {"choices": "a"}, 'field choices: expected an object, got a string "a"'),
        ("arc", {"question": ""}, "field question: expected text, got an empty text"),
        ("piqa", {"label": -1}, "0 to 1, or its text (a split without answers cannot be scored), got a number -1"),
        ("hellaswag", {"label": ""}, "a split without answers cannot be scored"),
        ("hellaswag", {"endings": ["one"]}, 'field endings: expected a list of 2 or more texts, got a list ["one"]'),
        (
            "mmlu",
            {"answer": 4},
            "field answer: expected the number of the right choice, 0 to 3, its letter or its text, got a number 4",
        ),
        (
            "mmlu",
            {"answer": True},
            "field answer: expected the number of the right choice, 0 to 3, its letter or its text, got a boolean true",
        ),
        ("mmlu", {"choices": [str(number) for number in range(30)]}, "at most 26 choices, one letter each"),
        ("blimp", {"sentence_bad": 7}, "field sentence_bad: expected text, got a number 7"),
        ("lambada", {"text": "word"}, "two or more words"),
        ("own", {"choices": []}, "field choices: expected a list of 1 or more texts, got a list []"),
        ("own", {"context": None}, "field context: expected text, got null"),
        ("own", {"id": 3}, "field id: expected text, got a number 3"),
    ],
)
def test_a_wrong_field_is_told_with_its_place(tmp_path, layout, change, expected):
    good = RECORDS[layout] | ({"id": "other"} if layout == "own" else {})
    (problem,) = problems_of({"t": write(tmp_path, [good, RECORDS[layout] | change], "a.jsonl")})
    assert "a.jsonl, record 2 (line 2), field" in problem and expected in problem


def test_a_missing_field_names_the_nearest(tmp_path):
    record = {"sentance_bad" if key == "sentence_bad" else key: value for key, value in RECORDS["blimp"].items()}
    (problem,) = problems_of({"t": write(tmp_path, [RECORDS["blimp"], record], "a.jsonl")})
    assert "record 2 (line 2), field sentence_bad: expected text, got no such field" in problem
    assert "did you mean sentance_bad?" in problem


def test_unknown_layout_shows_keys_and_known_layouts(tmp_path):
    (problem,) = problems_of({"t": write(tmp_path, [{"text": "fine", "label": 1}], "a.jsonl")})
    assert "record 1 (line 1): unknown layout, got the keys text, label" in problem
    assert "ARC (question, choices, answerKey)" in problem and "LAMBADA (text)" in problem


def test_all_problems_of_all_tasks_at_once(tmp_path):
    broken = write(tmp_path, '{"question": \n' + json.dumps(RECORDS["arc"]) + "\n[]\n", "broken.jsonl")
    piqa = RECORDS["piqa"]
    wrong = write(tmp_path, [piqa | {"label": 9, "goal": None}, piqa | {"sol1": 3}], "wrong.jsonl")
    latin = write(tmp_path, '{"text": "café au lait"}\n'.encode("latin-1"), "latin.jsonl")
    tasks = {"a": broken, "b": wrong, "c": latin, "d": str(tmp_path / "wrong.jsn"), "e f": wrong, "g": "notes.txt"}
    tasks["h"] = "~nobody-here/arc.jsonl"
    problems = "\n".join(problems_of(tasks, suite="prob", limit=0, prose=str(tmp_path / "none.txt")))
    for expected in (
        "capability limit: got 0",
        "capability suite: got 'prob', expected one of probes, or none; did you mean probes?",
        "broken.jsonl, line 1, column",
        "broken.jsonl, record 3 (line 3): expected a JSON object",
        "wrong.jsonl, record 1 (line 1), field label",
        "wrong.jsonl, record 1 (line 1), field goal",
        "wrong.jsonl, record 2 (line 2), field sol1",
        "latin.jsonl, line 1: not UTF-8: byte 0xe9",
        "wrong.jsn: no such file; did you mean",
        "arc.jsonl: no such file",
        "capability task name: got 'e f'",
        "notes.txt is plain text, which has no right answers; name it as prose",
        "none.txt: no such file",
    ):
        assert expected in problems


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", "", "no records"),
        ("a.csv", "", "no rows below the header"),
        ("a.csv", "goal,sol1,sol2,label\n", "no rows below the header"),
        ("a.csv", 'goal,sol1,sol2,label\na,b,c,0\n"two\nlines",b\n', "line 3: 2 cells, but the header has 4"),
        ("a.csv", 'goal,sol1\n"a"b,c\n', "broken CSV"),
        ("a.parquet", "no parquet", "cannot be read as parquet"),
        ("a.xlsx", "", "got a file ending in '.xlsx', expected one of .jsonl"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, expected):
    assert expected in problems_of({"t": write(tmp_path, content, name)})[0]


GLUED = {"context": "The hat of Anna is", "choices": ["red", "blue"], "answer": 0}
SPACED = GLUED | {"choices": [" red", " blue"]}


@pytest.mark.parametrize(
    "change",
    [
        SPACED,
        {"context": ""},
        {"context": "The hat of Anna is "},
        {"context": "The hat is (", "choices": ["red)", "blue)"]},
        {"choices": ["red", " blue"]},
        {"choices": [", I think, red", ", I think, blue"]},
        {"context": "日本の首都は", "choices": ["東京", "5"]},
    ],
)
def test_choices_need_no_space_of_their_own_here(tmp_path, change):
    assert load_suite(None, {"t": write(tmp_path, [GLUED | change], "a.jsonl")}).notices == ()


def test_choices_without_a_space_before_them_are_refused_or_told(tmp_path):
    hindi = {"context": "भारत की राजधानी का", "choices": ["दिल्ली", "मुंबई"], "answer": 0}
    for record, seam in ((GLUED, "'t of Anna isred'"), (hindi, "दिल्ली'"), (GLUED | {"choices": ["red"]}, "isred'")):
        (problem,) = problems_of({"t": write(tmp_path, [record] * 2, "a.jsonl")})
        assert "a.jsonl: choices follow the context directly, as in" in problem
        assert f"{seam}: begin each with a space" in problem
    (told,) = load_suite(None, {"t": write(tmp_path, [SPACED, GLUED, SPACED], "a.jsonl")}).notices
    assert told.startswith("capability task 't': choices follow") and "in 1 of 3 items, the first being a:2" in told


def test_what_is_not_read_is_told(tmp_path):
    for name in ("a", "b"):
        write(tmp_path, [RECORDS["mmlu"], RECORDS["mmlu"] | {"question_id": 7, "context": ""}], f"{name}.jsonl")
    suite = load_suite(None, {"t": str(tmp_path)})
    assert suite.notices == ("capability task 't': not read: subject (4 of 4 records); question_id (2 of 4 records)",)
    wrapped = {"version": 1, "data": [SPACED | {"question": 3}]}
    suite = load_suite(None, {"t": write(tmp_path, wrapped, "w.json")})
    assert suite.notices == ("capability task 't': not read: question (1 of 1 records); version (beside the records)",)
    assert load_suite().notices == ()


@pytest.mark.parametrize(
    ("layout", "key", "value", "advice"),
    [
        ("own", "question", "Who has the hat?", "put its text into context, or remove the key"),
        ("mmlu_pro", "article", "Anna has a hat.", "put its text into question, or remove the key"),
        ("arc", "Passage", ["Anna has a hat.", "Bo has none."], "put its text into question, or remove the key"),
        ("blimp", "context", "Anna has a hat.", "remove the key"),
    ],
)
def test_a_part_of_the_question_that_is_not_shown_is_refused(tmp_path, layout, key, value, advice):
    (problem,) = problems_of(
        {"t": write(tmp_path, [RECORDS[layout], RECORDS[layout] | {"id": "2", key: value}], "a.jsonl")}
    )
    assert f"record 2 (line 2), field {key}: layout " in problem
    assert problem.endswith(f"does not show it to the model; {advice}")


def test_nothing_to_measure_and_sources_that_are_none(tmp_path):
    assert "nothing would be measured" in problems_of({})[0]
    assert "expected a file, a folder or a hub data set" in problems_of({"t": " "})[0]
    assert "has no file ending in" in problems_of({"t": str(tmp_path)})[0]
    same = [RECORDS["own"], RECORDS["own"]]
    assert 'a unique id, got a string "x1"' in problems_of({"t": write(tmp_path, same, "a.jsonl")})[0]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x" * 5000, "no such file"),
        ("../arc_esy", "no such file"),
        ("https://huggingface.co/datasets/owner/name", "URLs are not supported"),
    ],
)
def test_a_source_that_cannot_be_one_is_no_hub_data_set_and_no_crash(tmp_path, source, said):
    sound = write(tmp_path, [RECORDS["arc"]], "a.jsonl")
    assert said in problems_of({"t": source})[0] and said in problems_of({"t": sound}, prose=source)[0]


def test_hub_data_set(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split=None):
        asked.append((name, config, split))
        rows = datasets.Dataset.from_list([RECORDS["arc"]] * 3)
        return rows if split else datasets.DatasetDict({"train": rows, "test": rows.select([0])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(one_task("allenai/ai2_arc:ARC-Easy:validation").items) == 3
    assert len(one_task("allenai/ai2_arc:ARC-Easy").items) == 1
    assert one_task("allenai/ai2_arc::train").items[0].choices == EXPECTED["arc"][1]
    assert asked == [
        ("allenai/ai2_arc", "ARC-Easy", "validation"),
        ("allenai/ai2_arc", "ARC-Easy", None),
        ("allenai/ai2_arc", None, "train"),
    ]


def test_hub_data_set_that_cannot_be_had(monkeypatch):
    import datasets

    def load_dataset(name, config, split=None):
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (problem,) = problems_of({"t": "allenai/ai2_arc:ARC-Easy:test"})
    assert "data set 'allenai/ai2_arc' (config ARC-Easy, split test): ConnectionError: Couldn't reach" in problem
    assert "no such file here" in problem and "Without a network, name a local file" in problem


@needs_real
def test_real_files():
    tasks = {"arc": "arc_easy_test.jsonl", "lambada": "lambada_test.jsonl", "blimp": "blimp"}
    sources = {name: str(REAL / path) for name, path in tasks.items()}
    suite = load_suite(None, sources, prose=str(REAL / "wikitext2_valid.txt"))
    assert {task.name: len(task.items) for task in suite.tasks} == {"arc": 2376, "lambada": 2000, "blimp": 2400}
    arc, lambada, blimp = suite.tasks
    assert arc.chance == pytest.approx((2365 / 4 + 7 / 3 + 4 / 5) / 2376)
    assert (lambada.chance, blimp.chance) == (0, 0.5)
    assert suite.prose[0].lstrip().startswith("= Homarus gammarus =")
    for item, line in zip(lambada.items, (REAL / tasks["lambada"]).read_text().splitlines(), strict=True):
        assert item.context + item.choices[0] == json.loads(line)["text"].rstrip()


texts = st.lists(st.text(max_size=3), max_size=3)
values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 5),
    st.text(max_size=8),
    texts,
    st.fixed_dictionaries({"text": texts, "label": texts}),
)


@FUZZ
@given(layout=st.sampled_from(sorted(RECORDS)), data=st.data())
def test_any_record_gives_sound_items_or_an_input_error(tmp_path, layout, data):
    changes = st.dictionaries(st.sampled_from(sorted(RECORDS[layout])), values, max_size=2)
    records = [RECORDS[layout] | data.draw(changes) | {"id": str(number)} for number in range(2)]
    try:
        (task,) = load_suite(None, {"t": write(tmp_path, records, "a.jsonl")}).tasks
    except InputError as error:
        assert error.problems and all(problem.strip() for problem in error.problems)
        return
    for item in task.items:
        assert 0 <= item.answer < len(item.choices)
        assert all(choice.strip() for choice in item.choices)
        assert (item.rule == "exact") == (len(item.choices) == 1)


@FUZZ
@given(content=st.binary(max_size=80) | st.text(alphabet='goal,"sol1\n\r\0{[]}:0', max_size=60).map(str.encode),
       name=st.sampled_from(["a.csv", "a.jsonl", "a.json", "a.parquet"]))  # fmt: skip
def test_any_bytes_give_an_input_error_or_a_suite(tmp_path, content, name):
    try:
        load_suite(None, {"t": write(tmp_path, content, name)})
    except InputError as error:
        assert error.problems


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-evaluation-harness is installed")
def test_tasks_of_the_harness_without_it_are_told_with_the_other_problems(tmp_path):
    with pytest.raises(InputError) as told:
        load_suite(None, lm_eval=["arc_easy"], prose=str(tmp_path / "none.txt"))
    assert "lm-evaluation-harness is not installed here" in told.value.problems[0] and len(told.value.problems) == 2
