"""The built-in edits hold together: every property that a machine can check, on the file itself and as it is loaded."""

import itertools
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from locft.data.answers import normalise_answer
from locft.data.requests import load_edits

FILE = Path(__file__).resolve().parents[3] / "locft" / "data" / "atlas.jsonl"
RECORDS = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
SUBJECTS = [record["subject"] for record in RECORDS]
EDITED = re.compile(r"(?<!\w)(" + "|".join(map(re.escape, SUBJECTS)) + r")(?!\w)", re.IGNORECASE)

RELATIONS = {record["relation"]: [r for r in RECORDS if r["relation"] == record["relation"]] for record in RECORDS}

every_relation = pytest.mark.parametrize("records", RELATIONS.values(), ids=RELATIONS.keys())


def prompts(record):
    return [record["prompt"], *record["rephrases"]]


def all_texts(record):
    locality = [text for item in record["locality"] for text in (item["prompt"], item["answer"])]
    return [record["subject"], *prompts(record), record["target"], record["ground_truth"], *locality]


def words(text):
    return re.findall(r"\w+", text.casefold())


def test_size_and_balance():
    assert 260 <= len(RECORDS) <= 300
    assert len(RELATIONS) >= 10
    assert all(20 <= len(records) <= 30 for records in RELATIONS.values())


def test_numbered_in_the_order_of_the_file():
    assert [record["id"] for record in RECORDS] == [f"atlas-{i:04d}" for i in range(1, len(RECORDS) + 1)]


def test_a_limit_takes_a_bit_of_every_relation():
    for start in range(0, len(RECORDS) - 29, 30):
        assert {record["relation"] for record in RECORDS[start : start + 30]} == set(RELATIONS)


def test_no_target_dominates_its_relation():
    for relation, records in RELATIONS.items():
        targets = Counter(record["target"] for record in records)
        assert len(targets) >= 5
        assert max(targets.values()) <= 0.3 * targets.total(), (relation, targets)


def test_each_relation_is_asked_in_several_ways():
    for records in RELATIONS.values():
        wordings = {record["prompt"].replace(record["subject"], "_") for record in records}
        assert len(wordings) >= 3, wordings


def test_each_subject_prompt_and_rephrase_occurs_once():
    assert len({subject.casefold() for subject in SUBJECTS}) == len(RECORDS)
    asked = Counter(" ".join(words(prompt)) for record in RECORDS for prompt in prompts(record))
    assert [prompt for prompt, count in asked.items() if count > 1] == []


def test_locality_has_variety():
    used = Counter(item["prompt"] for record in RECORDS for item in record["locality"])
    assert len(used) >= 400
    assert max(used.values()) <= 4


@every_relation
def test_fields(records):
    for record in records:
        assert set(record) == {
            "id", "subject", "relation", "prompt", "target", "ground_truth", "rephrases", "locality",
        }, record["id"]  # fmt: skip
        assert len(record["rephrases"]) >= 2, record["id"]
        assert len({item["prompt"] for item in record["locality"]}) == len(record["locality"]) >= 2, record["id"]
        assert all(set(item) == {"prompt", "answer"} for item in record["locality"]), record["id"]


@every_relation
def test_texts_are_clean(records):
    for text in itertools.chain.from_iterable(map(all_texts, records)):
        assert text and text == " ".join(text.split()), text
        assert text == unicodedata.normalize("NFC", text), text
        # Straight quotes, and letters of the Latin script only: no mojibake, nothing invisible.
        odd = [c for c in text if not c.isascii() and not (c.isalpha() and "LATIN" in unicodedata.name(c))]
        assert not odd and text.isprintable(), text


@every_relation
def test_prompts_can_be_continued_after_one_space(records):
    for record in records:
        for prompt in [*prompts(record), *(item["prompt"] for item in record["locality"])]:
            assert prompt[0].isupper(), prompt
            assert prompt[-1].isalnum() or prompt[-1] == "?", prompt
            assert not re.search(r"\b(a|an|the) (a|an|the)\b", prompt, re.IGNORECASE), prompt
        # An indefinite article would have to agree with the target's first letter.
        assert not any(re.search(r"\b(a|an)$", prompt) for prompt in prompts(record)), record["id"]


@every_relation
def test_target_is_short_and_false(records):
    for record in records:
        target = record["target"]
        assert 1 <= len(target.split()) <= 3, target
        assert not set(target) & set(".,;:!?"), f"{target}: generation stops at a full stop"
        assert normalise_answer(target) != normalise_answer(record["ground_truth"]), record["id"]
        assert not EDITED.search(target), f"{target} is itself an edited subject"
        assert all(f" {target.casefold()} " not in f" {prompt.casefold()} " for prompt in prompts(record)), record["id"]


@every_relation
def test_rephrases_are_paraphrases(records):
    for record in records:
        assert all(record["subject"] in prompt for prompt in prompts(record)), record["id"]
        texts = [words(prompt) for prompt in prompts(record)]
        for one, other in itertools.permutations(texts, 2):
            assert " ".join(one) not in " ".join(other), f"{record['id']}: the same words with something around them"
        # At least one rephrase brings three words that the prompt lacks, or lacks three that the prompt has.
        plain = set(texts[0]) - set(words(record["subject"]))
        assert any(
            max(len(set(text) - set(texts[0])), len(plain - set(text))) >= 3 for text in texts[1:]
        ), prompts(record)  # fmt: skip


@every_relation
def test_locality_is_about_something_no_edit_touches(records):
    for item in itertools.chain.from_iterable(record["locality"] for record in records):
        assert not EDITED.search(item["prompt"]), item
        assert not EDITED.search(item["answer"]), item


def test_loads_without_findings():
    edits = load_edits("atlas")
    assert [request.id for request in edits.requests] == [record["id"] for record in RECORDS]
    assert [request.target for request in edits.requests] == [record["target"] for record in RECORDS]
    assert edits.findings.contradictions == 0
    assert edits.findings.duplicates == 0
    assert edits.findings.already_true == 0
    assert edits.findings.repeated_subjects == 0
    assert edits.findings.reachable == 1.0


def test_the_passages_state_nothing_that_is_edited_or_asked():
    """Curvature is measured on them, so that an edit of what they state would be held back."""
    text = (FILE.parent / "passages.txt").read_text(encoding="utf-8")
    asked = [
        prompt for record in RECORDS for prompt in (*prompts(record), *(one["prompt"] for one in record["locality"]))
    ]
    assert not [prompt for prompt in asked if prompt in text]
    for sentence in re.split(r"(?<=[.?!])\s+|\n", text):
        stated = {subject.casefold() for subject in EDITED.findall(sentence)}
        assert not [r for r in RECORDS if r["subject"].casefold() in stated and r["ground_truth"] in sentence], sentence


def test_the_passages_are_other_text_than_drift_is_measured_on():
    def runs(name):
        told = words((FILE.parent / name).read_text(encoding="utf-8"))
        return {tuple(told[at : at + 6]) for at in range(len(told) - 5)}

    assert not runs("passages.txt") & runs("prose.txt")
