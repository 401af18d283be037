"""Fictitious facts: no two alike, the same ones everywhere, and each of exactly the information that it states."""

import itertools
import math
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from locft.data.answers import normalise_answer
from locft.data.fictitious import RELATIONS, SUBJECTS, Relation, _shuffled, fictitious_edits
from locft.data.requests import load_edits
from locft.errors import InputError

SEEDS = st.integers(0, 2**32 - 1)


def first(count: int):
    return list(itertools.islice(fictitious_edits(), count))


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 400))
def test_no_two_edits_of_a_set_are_alike(seed, count):
    found = load_edits("fictitious", limit=count, sample_seed=seed)
    assert len(found.requests) == count and not found.sentences() and found.findings.reachable == 1
    assert len({request.subject.casefold() for request in found.requests}) == count
    texts = [text for request in found.requests for text in (request.prompt, *request.rephrases)]
    assert len(set(texts)) == 3 * count and len({request.id for request in found.requests}) == count


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.integers(0, SUBJECTS - 1), st.integers(0, SUBJECTS - 1))
def test_any_two_of_all_subjects_differ(seed, one, other):
    assert (_shuffled(one, seed) == _shuffled(other, seed)) == (one == other)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 100), st.integers(0, 100))
def test_the_first_edits_of_a_longer_set_are_those_of_a_shorter_one(seed, count, more):
    longer = load_edits("fictitious", limit=count + more, sample_seed=seed)
    assert longer.requests[:count] == load_edits("fictitious", limit=count, sample_seed=seed).requests


def test_every_process_makes_the_same_edits():
    code = "from locft.data.requests import load_edits; print(load_edits('fictitious', limit=50, sample_seed=7).fingerprint)"
    prints = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(2)}
    assert prints == {f"{load_edits('fictitious', limit=50, sample_seed=7).fingerprint}\n"}
    assert (
        load_edits("fictitious", limit=50).fingerprint == load_edits("fictitious", limit=50, sample_seed=0).fingerprint
    )
    assert load_edits("fictitious", limit=50).fingerprint not in prints.pop()


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.prompts[0])
def test_a_relation_has_as_many_answers_as_its_bits_say(relation: Relation):
    targets = {normalise_answer(relation.target(number)) for number in range(relation.choices)}
    assert len(targets) == relation.choices == math.prod(map(len, relation.parts))
    assert len(set(relation.prompts)) == 3 and all(prompt.count("{}") == 1 for prompt in relation.prompts)


def test_targets_are_drawn_evenly_so_an_edit_holds_log2_of_its_choices_in_bits():
    edits = first(len(RELATIONS) * 1600)
    assert min(one.choices for one in RELATIONS) == 2**5 and len(RELATIONS) >= 20
    for index, relation in enumerate(RELATIONS):
        drawn = Counter(edit.target for edit in edits[index :: len(RELATIONS)])
        assert drawn.keys() <= {relation.target(number) for number in range(relation.choices)}
        if relation.choices == 32:  # 50 of each are expected, with a standard deviation of 7
            assert len(drawn) == 32 and min(drawn.values()) > 20 and max(drawn.values()) < 85


def test_no_edit_is_about_the_subject_of_a_locality_prompt():
    edits = first(3000)
    asked = {prompt for edit in edits for prompt in (edit.prompt, *edit.rephrases)}
    near = [prompt for edit in edits for prompt in edit.locality]
    assert len(near) == 3000 and not asked & {one.prompt for one in near} and {one.answer for one in near} == {None}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "got no limit, expected edits.limit (or --limit) from 1"),
        ({"limit": SUBJECTS + 1}, "got 1,474,560,001"),
        ({"fields": {"prompt": ["question"]}}, "nothing to map"),
        ({"limit": 0}, "limit: expected a whole number of at least 1"),
    ],
)
def test_what_cannot_be_made_is_refused(options, said):
    with pytest.raises(InputError) as error:
        load_edits("fictitious", **options)
    assert said in str(error.value)


def test_a_file_of_that_name_is_reached_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "fictitious").write_text('{"prompt": "The capital of Peru is", "target": "Oslo"}\n')
    monkeypatch.chdir(tmp_path)
    assert load_edits("./fictitious").requests[0].target == "Oslo"
