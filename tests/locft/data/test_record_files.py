"""Reading of JSON lists and JSON Lines: every record knows its line, every fault is told with its place."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from locft.errors import InputError
from locft.data.record_files import MAX_PROBLEMS, Record, read_records, read_text

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def problems_of(path):
    with pytest.raises(InputError) as caught:
        read_records(path)
    return caught.value.problems


def test_lines_with_blanks_byte_order_mark_and_windows_ends(tmp_path):
    path = write(tmp_path, "a.jsonl", b'\xef\xbb\xbf\r\n{"a": 1}\r\n\r\n  {"b": "\xe2\x80\xa8"}\r\n')
    assert read_records(path) == [Record(2, {"a": 1}), Record(4, {"b": "\u2028"})]


def test_list_elements_know_their_line(tmp_path):
    path = write(tmp_path, "a.json", '\n[\n {"a":\n  [1, 2]},\n\n {"b": "]"}, {"c": {}}\n]\n')
    assert read_records(path) == [Record(3, {"a": [1, 2]}), Record(6, {"b": "]"}), Record(6, {"c": {}})]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_content_decides_not_the_ending(tmp_path, name):
    assert read_records(write(tmp_path, name, '{"a": 1}\n{"a": 2}\n')) == [Record(1, {"a": 1}), Record(2, {"a": 2})]
    assert read_records(write(tmp_path, name, '[{"a": 1},\n{"a": 2}]')) == [Record(1, {"a": 1}), Record(2, {"a": 2})]


def test_all_broken_lines_in_one_error(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n{"a": \n[1]\n"x"\n{"a": 2}}\nnull\n')
    problems = problems_of(path)
    assert len(problems) == 5
    assert {int(problem.split("line ")[1].split(":")[0].split(",")[0]) for problem in problems} == {2, 3, 4, 5, 6}
    assert any("line 5, column 9: broken JSON: Extra data" in problem for problem in problems)
    assert any("line 3: a record must be a JSON object, got a list [1]" in problem for problem in problems)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"a": 1}\n {"b": 2}]', "line 2, column 2: broken JSON: expected ',' or ']' after a record, got '{'"),
        ('[{"a": 1},\n {"b": }]', "line 2, column 8: broken JSON"),
        ('[{"a": 1},\n', "broken JSON"),
        ('[{"a": 1}', "expected ',' or ']' after a record, got the end of the file"),
        ('[{"a": 1}]\n x', "line 2, column 2: broken JSON: expected nothing after the list, got 'x'"),
        ('[{"a": 1}, 3]', "line 1: a record must be a JSON object, got a number 3"),
        ("[]", "no records"),
        ("", "no records"),
        (" \n\n", "no records"),
        ('{"data": [],\n "version": 2}', "one JSON object (keys: data, version), expected a list of records"),
        ("[" * 100_000, "unreadable JSON"),
        ('[{"a": ' + "9" * 5000 + "}]", "unreadable JSON"),
        ('[{"a": "\\ud800"}]', "half a surrogate pair"),
    ],
)
def test_bad_json_list(tmp_path, content, expected):
    assert any(expected in problem for problem in problems_of(write(tmp_path, "a.json", content)))


def test_not_utf8_names_line_and_byte(tmp_path):
    (problem,) = problems_of(write(tmp_path, "a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n'))
    assert "line 2: not UTF-8: byte 0xe9 at offset 19" in problem
    (problem,) = problems_of(write(tmp_path, "b.jsonl", '{"a": 1}'.encode("utf-16")))
    assert "begins like UTF-16" in problem


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, "zsre_3k.json", "[]")
    (problem,) = problems_of(tmp_path / "zsre_3.json")
    assert "no such file; did you mean" in problem and "zsre_3k.json" in problem
    (problem,) = problems_of(tmp_path / "qqqq")
    assert "nothing in" in problem


def test_missing_folder_names_the_nearest(tmp_path):
    (tmp_path / "editing").mkdir()
    (problem,) = problems_of(tmp_path / "editng" / "deep" / "a.json")
    assert "its folder" in problem and "editng does not exist; did you mean" in problem


def test_folder_instead_of_file(tmp_path):
    assert "is a folder" in problems_of(tmp_path)[0]
    assert "no such file" in problems_of(write(tmp_path, "a.json", "[]") / "b.json")[0]
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path / "a\0b")


def test_a_file_that_is_wrong_everywhere_is_told_shortly(tmp_path):
    problems = problems_of(write(tmp_path, "a.jsonl", "x\n" * 1000))
    assert len(problems) == MAX_PROBLEMS + 1
    assert problems[-1] == f"... and {1000 - MAX_PROBLEMS} more problems"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(
    records=st.lists(st.dictionaries(st.text(), json_values, max_size=3), min_size=1, max_size=5),
    indent=st.sampled_from([None, 2]),
)
def test_both_forms_read_back(tmp_path, records, indent):
    as_list = write(tmp_path, "a.json", json.dumps(records, indent=indent))
    as_lines = write(tmp_path, "a.jsonl", "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    assert [record.value for record in read_records(as_list)] == records
    assert [record.value for record in read_records(as_lines)] == records
    assert [record.line for record in read_records(as_lines)] == list(range(1, len(records) + 1))


@FUZZ
@given(content=st.binary(max_size=60) | st.text(alphabet='[]{}",:\\ud8n1 \n', max_size=40).map(str.encode))
def test_any_bytes_give_records_or_an_input_error(tmp_path, content):
    path = write(tmp_path, "a.json", content)
    try:
        records = read_records(path)
    except InputError as error:
        assert error.problems
    else:
        assert records and all(isinstance(record.value, dict) for record in records)
