"""Outcomes and metrics are what the definition says, and teacher forcing first changes none of them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from locft.data.edit_request import EditRequest, LocalityPrompt
from locft.measure.evaluation import (
    EditOutcome,
    ask,
    edit_metrics,
    edit_questions,
    follow,
    locality_prompts,
)
from locft.measure.generation import BATCH, NEW_TOKENS, ModelAnswer, greedy_answers
from locft.model.delta import applied
from locft.model.models import LoadedModel, model_fingerprint
from locft.model.positions import TuningPosition
from locft.train.encoding import encode_edits, encode_prompt
from locft.train.examples import TrainingExamples
from locft.train.pipelines import TrainingSettings, finetune
from locft.train.reference import full_forward
from tests.locft.measure.decoding import EOS, PROMPTS, exact_model, scripted
from tests.tiny import tiny_loaded


def edit(identity: str, prompt: str, target: str, rephrases=(), locality=()) -> EditRequest:
    return EditRequest(
        identity, "", prompt, target, None, tuple(rephrases), tuple(LocalityPrompt(text, None) for text in locality)
    )


EDITS = (
    edit("a", "The capital of France is", "Oslo", ["France has the capital", "Paris? No:"], ["Water freezes at", "x"]),
    edit("b", "Who wrote Hamlet?", "Jane Austen", [], ["Mozart played the"]),
    edit("c", "The Gateway Arch stands in", "St. Louis", ["One sees the Gateway Arch in"]),
    edit("d", "The seat of government is", "Washington D.C.", ["It governs from"], ["The Nile flows through"]),
    edit("e", "Water freezes at", "ninety degrees"),
    edit("f", "The song goes", "la " * 40 + "la", ["They sing"], ["One, two,"]),
)


def questions_of(loaded: LoadedModel, edits=EDITS):
    return edit_questions(loaded.tokenizer, edits, greedy_answers(loaded, locality_prompts(edits)))


def test_questions_are_asked_in_order_with_what_is_expected():
    loaded = exact_model("llama")
    unedited = greedy_answers(loaded, locality_prompts(EDITS))
    questions = edit_questions(loaded.tokenizer, EDITS, unedited)
    kinds = {"a": "rggll", "b": "rl", "c": "rg", "d": "rgl", "e": "r", "f": "rgl"}
    assert [(q.edit_id, q.kind[0]) for q in questions] == [(i, kind) for i, row in kinds.items() for kind in row]
    assert [q.prompt for q in questions if q.kind == "locality"] == locality_prompts(EDITS)
    assert [q.expected for q in questions if q.kind == "locality"] == [answer.text for answer in unedited]
    for question in questions:
        assert question.row.token_ids[: question.row.start] == encode_prompt(loaded.tokenizer, question.prompt)
        if question.kind != "locality":
            assert loaded.tokenizer.decode(question.row.target_ids[:-1]) == f" {question.expected}"
            assert question.row.target_ids[-1] == loaded.tokenizer.eos_token_id


def test_answers_to_the_prompts_of_other_edits_are_refused():
    loaded = exact_model("llama")
    for answers in ([], [ModelAnswer("Oslo", (5, 0))] * 6):
        with pytest.raises(ValueError, match=f"{len(answers)} answers .* to 5 unrelated prompts"):
            edit_questions(loaded.tokenizer, EDITS, answers)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "qwen2_moe", "rwkv"])
def test_an_unedited_model_answers_unrelated_prompts_as_itself(architecture):
    loaded = exact_model(architecture)
    questions = questions_of(loaded)
    for generate_all in (False, True):
        outcomes = ask(loaded, full_forward(loaded.model), questions, generate_all=generate_all)
        metrics = edit_metrics(outcomes)
        assert (metrics["locality"], metrics["locality_tf"]) == (1.0, 1.0)


PARTIAL = {"llama": 25, "gpt2": 30, "gemma2": 20}
"""Epochs after which some of the edits are learnt and some are not."""


@pytest.mark.parametrize("architecture", PARTIAL)
def test_teacher_forcing_first_gives_the_outcomes_of_generating_everything(architecture):
    """Where every expected token and the end are most likely, greedy generation cannot say anything else; and an answer that
    can no longer become the expected one is wrong however it goes on."""
    loaded = tiny_loaded(architecture)
    questions = questions_of(loaded)
    settings = TrainingSettings(batch_size=3, learning_rate=1e-2, epochs=PARTIAL[architecture])
    delta = finetune(
        loaded, TrainingExamples.of_rows(encode_edits(loaded.tokenizer, EDITS)), TuningPosition(1, "layer"), settings
    ).delta
    with applied(loaded, delta):
        logits = full_forward(loaded.model)
        quick, plain = (ask(loaded, logits, questions, generate_all=everything) for everything in (False, True))
    assert agree(quick, plain)
    learnt = sum(outcome.correct for outcome in quick if outcome.kind == "reliability")
    assert 0 < learnt < len(EDITS), "no mixture of learnt and unlearnt edits: the comparison would say little"
    for outcome in plain:
        assert outcome.correct or not outcome.correct_tf
        assert not outcome.correct_tf or outcome.got == outcome.expected


def agree(quick, plain) -> bool:
    """The same outcomes, where the quick way may leave a wrong answer unfinished."""
    for one, other in zip(quick, plain, strict=True):
        if one.got.endswith("…") and not one.correct:
            one = replace(one, got=other.got) if other.got.startswith(one.got[:-1].rstrip()) else one
        if one != other:
            return False
    return True


def test_long_targets_do_not_change_what_unrelated_prompts_are_held_to():
    """The unedited model's answers have at most 32 tokens, so an edited model's to the same prompts have too."""
    loaded = exact_model("gpt2")
    without, with_long = questions_of(loaded, EDITS[:2]), questions_of(loaded, (*EDITS[:2], EDITS[-1]))
    assert max(len(q.row.target_ids) for q in with_long) > NEW_TOKENS
    assert any(len(q.row.target_ids) == NEW_TOKENS for q in without if q.kind == "locality"), "one that ran on"
    logits = full_forward(loaded.model)
    outcomes = ask(loaded, logits, with_long, generate_all=True)
    assert outcomes[: len(without)] == ask(loaded, logits, without, generate_all=True)
    assert all(outcome.correct for outcome in outcomes if outcome.kind == "locality")


def test_long_answers_are_heard_to_their_end():
    long = " ".join(["la"] * 40)
    loaded = scripted(f" {long}", EOS)
    request = edit("a", "Q", long)
    (question,) = edit_questions(loaded.tokenizer, [request], [])
    assert len(question.row.target_ids) > NEW_TOKENS
    for generate_all in (False, True):
        (outcome,) = ask(loaded, full_forward(loaded.model), [question], generate_all=generate_all)
        assert outcome == EditOutcome("a", "reliability", "Q", long, long, True, True)


@pytest.mark.parametrize(
    ("script", "target", "got", "correct", "correct_tf"),
    [
        ([" Oslo", EOS], "Oslo", "Oslo", True, True),
        ([" Oslo. It is"], "Oslo", "Oslo", True, False),
        ([" the Oslo!\n"], "Oslo", "the Oslo!", True, False),
        ([" OSLO", EOS], "Oslo", "OSLO", True, False),
        ([" Oslo is", EOS], "Oslo", "Oslo is", False, False),
        ([" Bergen", EOS], "Oslo", "Bergen", False, False),
        ([" St. Louis", EOS], "St. Louis", "St. Louis", True, True),
        ([" St. Louis. It"], "St. Louis", "St. Louis", True, False),
        ([" St. Paul", EOS], "St. Louis", "St. Paul", False, False),
        ([EOS], "Oslo", "", False, False),
    ],
)
def test_outcomes_hold_what_was_expected_and_what_was_got(script, target, got, correct, correct_tf):
    loaded = scripted(*script)
    questions = edit_questions(loaded.tokenizer, [edit("a", "Q", target)], [])
    for generate_all in (False, True):
        outcomes = ask(loaded, full_forward(loaded.model), questions, generate_all=generate_all)
        assert agree(outcomes, [EditOutcome("a", "reliability", "Q", target, got, correct, correct_tf)])


def test_teacher_forcing_flatters():
    """An answer that goes wrong at its first token is wrong; the tokens after it, given the right first one, are not."""
    loaded = scripted(" Bergen", EOS)
    tokenizer = loaded.tokenizer
    assert len(tokenizer(" Bergen")["input_ids"]) > 2
    row = edit_questions(tokenizer, [edit("a", "Q", "Bergen")], [])[0].row
    logits = full_forward(loaded.model)
    wrong_first = replace(row, token_ids=(row.token_ids[0], 9, *row.token_ids[2:]))
    whole, broken = follow(logits, [row, wrong_first])
    assert (whole.matched, whole.instead) == (len(row.target_ids), None) and broken.instead is not None
    assert follow(logits, []) == []


def rows_to_follow(loaded):
    unedited = greedy_answers(loaded, PROMPTS * 12)
    edits = [edit(str(i), prompt, "Oslo", [], [prompt]) for i, prompt in enumerate(PROMPTS * 12)]
    return [question.row for question in edit_questions(loaded.tokenizer, edits, unedited)]


def test_followings_are_those_of_single_rows():
    loaded = exact_model("llama")
    rows = rows_to_follow(loaded)
    assert len(rows) > 2 * BATCH
    logits = full_forward(loaded.model)
    found = follow(logits, rows)
    for row, following in zip(rows, found, strict=True):
        alone, matched, token = logits([row]), following.matched, following.instead
        best = tuple(alone.argmax(-1).tolist())
        assert best[:matched] == row.target_ids[:matched]
        assert token is None if matched == len(best) else token == best[matched] != row.target_ids[matched]
        assert following.loss == pytest.approx(float(F.cross_entropy(alone, torch.tensor(row.target_ids))), rel=1e-5)
    exact = [following.instead is None for following in found]
    assert exact[1::2] == [True] * len(PROMPTS * 12), "what the model says itself is most likely, token by token"
    assert not all(exact[0::2])


def test_ways_found_coarsely_first_are_the_exact_ones():
    loaded = exact_model("llama")
    exact, asked = full_forward(loaded.model), []
    rows = list(dict.fromkeys(rows_to_follow(loaded)))
    rows += [
        replace(row, token_ids=(*row.token_ids[: row.start], *ids)) for row in rows for ids in ((7, 8), (9,), (4, 5, 6))
    ]

    def watched(batch):
        asked.extend(batch)
        return exact(batch)

    def coarse(batch):
        logits = exact(batch)
        noise = torch.Generator().manual_seed(len(batch))
        return logits + 0.05 * logits.std() * torch.randn(logits.shape, generator=noise)

    expected = [(f.matched, f.instead) for f in follow(exact, rows)]
    assert [(f.matched, f.instead) for f in follow(coarse, rows)] != expected, "the noise decides nothing"
    assert [(f.matched, f.instead) for f in follow(watched, rows, coarse)] == expected
    assert 0 < len(asked) < len(rows)


def test_asking_leaves_the_model_as_it_was():
    loaded = exact_model("rwkv")
    before = model_fingerprint(loaded.model)
    ask(loaded, full_forward(loaded.model), questions_of(loaded), generate_all=True)
    assert model_fingerprint(loaded.model) == before


# Metrics


def outcome(identity: str, kind: str, correct: bool, correct_tf: bool = False) -> EditOutcome:
    return EditOutcome(identity, kind, "prompt", "expected", "got", correct, correct_tf)


def test_metrics_are_means_over_edits_not_over_prompts():
    metrics = edit_metrics(
        [
            outcome("a", "reliability", True, True),
            outcome("a", "generalization", True, True),
            outcome("a", "generalization", True),
            outcome("a", "generalization", True),
            outcome("a", "generalization", False),
            outcome("b", "reliability", True),
            outcome("b", "generalization", False),
            outcome("c", "reliability", False),
            outcome("c", "locality", True, True),
            outcome("c", "locality", False),
        ]
    )
    assert metrics == {
        "reliability": pytest.approx(2 / 3),
        "reliability_tf": pytest.approx(1 / 3),
        "generalization": pytest.approx((3 / 4 + 0) / 2),
        "generalization_tf": pytest.approx((1 / 4 + 0) / 2),
        "locality": 0.5,
        "locality_tf": 0.5,
    }


def test_kinds_that_were_not_asked_are_absent():
    assert edit_metrics([outcome("a", "reliability", True)]).keys() == {"reliability", "reliability_tf"}
    assert edit_metrics([]) == {}


kinds = st.sampled_from(["reliability", "generalization", "locality"])
outcome_lists = st.lists(st.builds(outcome, st.sampled_from("abcd"), kinds, st.booleans(), st.booleans()), max_size=30)


@given(outcome_lists, st.randoms())
def test_metrics_are_shares_whatever_the_order(outcomes, random):
    metrics = edit_metrics(outcomes)
    assert all(0 <= value <= 1 for value in metrics.values())
    shuffled = random.sample(outcomes, len(outcomes))
    assert edit_metrics(shuffled) == pytest.approx(metrics)
    assert {name for name in metrics if not name.endswith("_tf")} == {o.kind for o in outcomes}
