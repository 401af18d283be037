"""The built-in capability items hold together: every property that a machine can check, on the files themselves."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[3] / "locft" / "data"
ITEMS = [json.loads(line) for line in (DATA / "probes.jsonl").read_text(encoding="utf-8").splitlines()]
PROSE = (DATA / "prose.txt").read_text(encoding="utf-8")

CHOICES = {"world_facts": 4, "grammar": 2, "everyday": 2, "last_word": 1}
BY_TASK = {task: [item for item in ITEMS if item["task"] == task] for task in CHOICES}

every_task = pytest.mark.parametrize("task", CHOICES)
chosen_from = pytest.mark.parametrize("task", [task for task, count in CHOICES.items() if count > 1])


def label(item):
    return item["id"]


def kinds(task):
    """Of a task whose ids name kinds: "grammar-passive-02" is of the kind "passive"."""
    return Counter(re.fullmatch(rf"{task}-(\w+)-\d\d", item["id"])[1] for item in BY_TASK[task])


def atlas_subjects():
    path = DATA / "atlas.jsonl"
    if not path.exists():
        pytest.skip("locft/data/atlas.jsonl is absent: there are no edited subjects to keep apart from")
    return {json.loads(line)["subject"] for line in path.read_text(encoding="utf-8").splitlines()}


def test_size_and_balance():
    assert len(ITEMS) >= 640
    assert sum(map(len, BY_TASK.values())) == len(ITEMS), "an item has an unknown task"
    assert all(150 <= len(items) <= 200 for items in BY_TASK.values()), {t: len(i) for t, i in BY_TASK.items()}


def test_fields_and_types():
    for item in ITEMS:
        assert list(item) == ["task", "id", "context", "choices", "answer"], label(item)
        assert isinstance(item["context"], str) and type(item["answer"]) is int, label(item)
        assert all(isinstance(choice, str) for choice in item["choices"]), label(item)


def test_ids_and_items_occur_once():
    assert max(Counter(item["id"] for item in ITEMS).values()) == 1
    assert all(item["id"].startswith(item["task"] + "-") for item in ITEMS)
    contents = Counter((item["context"], *sorted(item["choices"])) for item in ITEMS)
    assert [content for content, count in contents.items() if count > 1] == []
    contexts = Counter(item["context"] for item in ITEMS if item["context"])
    assert [context for context, count in contexts.items() if count > 1] == []


@every_task
def test_choices(task):
    for item in BY_TASK[task]:
        assert len(item["choices"]) == CHOICES[task], label(item)
        assert len({choice.strip().casefold() for choice in item["choices"]}) == CHOICES[task], label(item)
        assert 0 <= item["answer"] < CHOICES[task], label(item)


@chosen_from
def test_the_right_one_is_at_every_place_equally_often(task):
    counts = Counter(item["answer"] for item in BY_TASK[task])
    assert set(counts) == set(range(CHOICES[task]))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_place_of_the_right_one_follows_no_cycle():
    for task, count in CHOICES.items():
        if count > 1:
            answers = [item["answer"] for item in BY_TASK[task]]
            for step in range(1, 5):
                repeated = sum(a == b for a, b in zip(answers, answers[step:], strict=False)) / (len(answers) - step)
                assert abs(repeated - 1 / count) < 0.16, (task, step, repeated)


@every_task
def test_spacing(task):
    for item in BY_TASK[task]:
        assert item["context"] == item["context"].strip(), label(item)
        for text in [item["context"], *item["choices"]]:
            assert "  " not in text and not re.search(r"[\n\t]", text) and text == text.rstrip(), label(item)
        for choice in item["choices"]:
            # Text follows the context directly, so the space between them is the choice's.
            assert choice[0].isspace() == bool(item["context"]) and choice.strip(), label(item)


def test_grammar_is_minimal_pairs_of_sentences_over_many_phenomena():
    for item in BY_TASK["grammar"]:
        assert item["context"] == "", label(item)
        one, other = (choice.split() for choice in item["choices"])
        assert all(re.fullmatch(r"[A-Z].*[.?]", choice) for choice in item["choices"]), label(item)
        assert len((Counter(one) - Counter(other)) + (Counter(other) - Counter(one))) <= 7, label(item)
    assert len(kinds("grammar")) >= 10 and min(kinds("grammar").values()) >= 6


def test_everyday_is_of_several_kinds():
    assert len(kinds("everyday")) >= 6 and min(kinds("everyday").values()) >= 10


def test_last_words_are_single_words_and_not_all_repeated_from_the_passage():
    new = 0
    for item in BY_TASK["last_word"]:
        (choice,) = item["choices"]
        assert re.fullmatch(r" [A-Za-z]+", choice), label(item)
        new += choice.strip() not in re.findall(r"\w+", item["context"])
    assert 0.3 < new / len(BY_TASK["last_word"]) < 0.7


@chosen_from
def test_length_does_not_give_the_answer_away(task):
    """In characters: always taking the longest, or the shortest, choice is hardly better than guessing."""
    for sign in (1, -1):
        hits = 0.0
        for item in BY_TASK[task]:
            lengths = [sign * len(choice) for choice in item["choices"]]
            if lengths[item["answer"]] == max(lengths):
                hits += 1 / lengths.count(max(lengths))
        assert abs(hits / len(BY_TASK[task]) - 1 / CHOICES[task]) < 0.1, (task, sign, hits)


def test_world_facts_stay_away_from_the_built_in_edits():
    subjects = atlas_subjects()
    # Case counts: "Apple" is edited, an apple is not. A subject in small letters may begin a sentence.
    names = sorted(subjects | {subject[0].upper() + subject[1:] for subject in subjects})
    edited = re.compile(r"(?<!\w)(" + "|".join(map(re.escape, names)) + r")(?!\w)")
    relations = re.compile(
        "chemical symbol|capital of|currency|official language|invented by|written by|founder|composer"
    )
    for item in BY_TASK["world_facts"]:
        for text in [item["context"], *item["choices"]]:
            assert not edited.search(text), label(item)
            assert not relations.search(text), label(item)


def test_prose():
    passages = PROSE.strip().split("\n\n")
    assert 12_000 <= len(PROSE) <= 15_000
    assert len(passages) >= 10 and len(set(passages)) == len(passages)
    for passage in passages:
        assert passage == passage.strip() and 500 <= len(passage) <= 1500, passage[:40]
    assert PROSE.isascii() and "  " not in PROSE
