"""Reading JSON lists and JSON Lines: every record knows its place, every fault is told with it."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from locft.data.record_files import FileRecord, read_json_records, read_text
from locft.errors import InputError
from tests.locft.data.test_requests import write

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(path, **options):
    records = read_json_records(Path(path), **options)
    assert not any(record.problem for record in records)
    return records


def problems_of(path):
    try:
        problems = [record.problem for record in read_json_records(Path(path)) if record.problem]
    except InputError as error:
        return error.problems
    assert problems
    return problems


def test_lines_with_blanks_byte_order_mark_and_windows_ends(tmp_path):
    path = write(tmp_path, b'\xef\xbb\xbf\r\n{"a": 1}\r\n\r\n  {"b": "\xe2\x80\xa8"}\r\n', "a.jsonl")
    assert read(path) == [FileRecord(1, {"a": 1}, line=2), FileRecord(2, {"b": "\u2028"}, line=4)]
    assert [record.place for record in read(path)] == ["record 1 (line 2)", "record 2 (line 4)"]


def test_list_elements_know_their_number(tmp_path):
    path = write(tmp_path, '\n[\n {"a":\n  [1, 2]},\n\n {"b": "]"}, {"c": {}}\n]\n', "a.json")
    assert read(path) == [FileRecord(1, {"a": [1, 2]}), FileRecord(2, {"b": "]"}), FileRecord(3, {"c": {}})]
    assert read(path)[2].place == "record 3"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_content_decides_not_the_ending(tmp_path, name):
    for content in ('{"a": 1}\n{"a": 2}\n', '[{"a": 1},\n{"a": 2}]'):
        assert [record.value for record in read(write(tmp_path, content, name))] == [{"a": 1}, {"a": 2}]


def test_all_broken_lines_in_one_error(tmp_path):
    path = write(tmp_path, '{"a": 1}\n{"a": \n[1]\n"x"\n{"a": 2}}\nnull\n', "a.jsonl")
    problems = problems_of(path)
    assert len(problems) == 5
    assert {int(re.search(r"line (\d+)", problem)[1]) for problem in problems} == {2, 3, 4, 5, 6}
    assert any("line 5, column 9: broken JSON: Extra data" in problem for problem in problems)
    assert any("record 3 (line 3): expected a JSON object, got a list [1]" in problem for problem in problems)


def test_sound_lines_are_read_beside_broken_ones(tmp_path):
    first, broken, last = read_json_records(Path(write(tmp_path, '{"a": 1}\n{"a": \n{"a": 2}\n', "a.jsonl")))
    assert [first, last] == [FileRecord(1, {"a": 1}, line=1), FileRecord(3, {"a": 2}, line=3)]
    assert broken.problem and not broken.value


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"a": 1}\n {"b": 2}]', "line 2, column 2: broken JSON: Expecting ',' delimiter"),
        ('[{"a": 1},\n {"b": }]', "line 2, column 8: broken JSON"),
        ('[{"a": 1},\n', "broken JSON"),
        ('[{"a": 1}', "line 1, column 10: broken JSON: Expecting ',' delimiter"),
        ('[{"a": 1}]\n x', "line 2, column 2: broken JSON: Extra data"),
        ('[{"a": 1}, 3]', "record 2: expected a JSON object, got a number 3"),
        ("[]", "no records"),
        ("", "no records"),
        (" \n\n", "no records"),
        ('{"data": [],\n "version": 2}', "one JSON object (keys: data, version), expected a list of records"),
        ("[" * 100_000, "unreadable JSON"),
        ('[{"a": ' + "9" * 5000 + "}]", "unreadable JSON"),
        ('[{"a": "\\ud800"}]', "lone surrogate in a string"),
    ],
)
def test_bad_json_list(tmp_path, content, expected):
    assert any(expected in problem for problem in problems_of(write(tmp_path, content, "a.json")))


def test_not_utf8_names_line_and_byte(tmp_path):
    (problem,) = problems_of(write(tmp_path, b'{"a": 1}\n{"a": "caf\xe9"}\n', "a.jsonl"))
    assert "line 2: not UTF-8: byte 0xe9 at offset 19" in problem
    (problem,) = problems_of(write(tmp_path, b'\xff\xfe{\0"', "b.jsonl"))
    assert "line 1: not UTF-16" in problem
    (problem,) = problems_of(write(tmp_path, '{"a": 1}'.encode("utf-16-le"), "c.jsonl"))
    assert "zero bytes" in problem


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, "[]", "zsre_3k.json")
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
    assert "no such file" in problems_of(Path(write(tmp_path, "[]", "a.json"), "b.json"))[0]
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path / "a\0b")


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
    as_list = write(tmp_path, json.dumps(records, indent=indent), "a.json")
    as_lines = write(tmp_path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "a.jsonl")
    numbers = list(range(1, len(records) + 1))
    assert read(as_list) == [FileRecord(n, record) for n, record in zip(numbers, records, strict=True)]
    lines = read(as_lines, is_record=lambda value: True)  # else a file of one line could wrap a list of records
    assert lines == [FileRecord(n, record, line=n) for n, record in zip(numbers, records, strict=True)]


@FUZZ
@given(content=st.binary(max_size=60) | st.text(alphabet='[]{}",:\\ud8n1 \n', max_size=40).map(str.encode))
def test_any_bytes_give_records_or_an_input_error(tmp_path, content):
    path = write(tmp_path, content, "a.json")
    try:
        records = read_json_records(Path(path))
    except InputError as error:
        assert error.problems
    else:
        assert records
        assert all(isinstance(record.value, dict) for record in records)
