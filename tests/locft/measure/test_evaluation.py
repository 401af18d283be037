"""Outcomes and metrics are what the definition says, and teacher forcing first changes none of them."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from locft.data.edit_request import EditRequest, LocalityPrompt, PortabilityPrompt
from locft.measure.evaluation import (
    EditOutcome,
    EditQuestion,
    ReferenceChange,
    ask,
    asked_counts,
    edit_metrics,
    edit_questions,
    follow,
    locality_prompts,
    question_rows,
    reference_changes,
)
from locft.measure.generation import BATCH, NEW_TOKENS, ModelAnswer, greedy_answers
from locft.model.delta import applied
from locft.model.models import LoadedModel, model_fingerprint
from locft.model.positions import TuningPosition
from locft.train.encoding import encode_edits, encode_prompt, encode_question
from locft.train.examples import TrainingExamples
from locft.train.pipelines import TrainingSettings, finetune
from locft.train.reference import full_forward
from locft.train.token_rows import TokenRow
from tests.locft.measure.decoding import EOS, PROMPTS, exact_model, scripted
from tests.tiny import chat_loaded, chat_tokenizer, tiny_loaded, watched_and_coarse


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
        assert edit_metrics(outcomes)["locality_exact"] == 1.0


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


@pytest.mark.parametrize(
    ("script", "correct", "correct_tf"),
    [
        ([" Norway", EOS], True, True),
        ([" Kingdom of Norway", EOS], True, False),
        ([" the kingdom of Norway. It is"], True, False),
        ([" Sweden", EOS], False, False),
    ],
)
@pytest.mark.parametrize("generate_all", [False, True])
def test_any_name_of_an_answer_that_follows_is_right(script, correct, correct_tf, generate_all):
    loaded = scripted(*script)
    follows = (PortabilityPrompt("Q", ("Norway", "Kingdom of Norway")), PortabilityPrompt("Q", ("Sweden",)))
    request = replace(edit("a", "Q", "Oslo"), portability=follows)
    questions = edit_questions(loaded.tokenizer, [request], [])
    assert [question.kind for question in questions] == ["reliability", "portability", "portability"]
    outcomes = ask(loaded, full_forward(loaded.model), questions, generate_all=generate_all)
    assert (outcomes[1].correct, outcomes[1].correct_tf) == (correct, correct_tf)
    assert (outcomes[1].expected, outcomes[1].prompt) == ("Norway", "Q")
    metrics = edit_metrics(outcomes)
    assert metrics["portability"] == metrics["portability.raw"] == 0.5 and metrics["reliability"] == 0.0


@pytest.mark.parametrize(
    ("names", "script"),
    [
        (("Missouri", "St. Louis"), [" St. Louis. It is"]),
        (("St. Louis", "Missouri"), [" Missouri. It is"]),
        (("Missouri", "Washington D.C.", "St. Louis"), [" Washington D.C.", EOS]),
    ],
)
@pytest.mark.parametrize("generate_all", [False, True])
def test_each_name_ends_where_its_own_sentence_does(names, script, generate_all):
    loaded = scripted(*script)
    request = replace(edit("a", "Q", "Oslo"), portability=(PortabilityPrompt("Q", names),))
    questions = edit_questions(loaded.tokenizer, [request], [])
    assert ask(loaded, full_forward(loaded.model), questions, generate_all=generate_all)[1].correct


def test_what_follows_from_edits_is_asked_in_every_format_but_the_unseen_one():
    loaded = chat_loaded()
    request = replace(edit("a", "Q?", "Oslo", ["R?"]), portability=(PortabilityPrompt("P?", ("Norway",)),))
    questions = edit_questions(loaded.tokenizer, [request], [], ("raw", "qa", "chat", "unseen"))
    asked = [(question.kind[0], question.format) for question in questions]
    assert asked == [*((kind, form) for form in ("raw", "qa", "chat") for kind in "rgp"), ("r", "unseen")]


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
    exact = full_forward(loaded.model)
    watched, asked, coarse = watched_and_coarse(exact, 0.05)
    rows = list(dict.fromkeys(rows_to_follow(loaded)))
    rows += [
        replace(row, token_ids=(*row.token_ids[: row.start], *ids)) for row in rows for ids in ((7, 8), (9,), (4, 5, 6))
    ]

    expected = [(f.matched, f.instead) for f in follow(exact, rows)]
    assert [(f.matched, f.instead) for f in follow(coarse, rows)] != expected, "the noise decides nothing"
    assert [(f.matched, f.instead) for f in follow(watched, rows, coarse)] == expected
    assert 0 < len(asked) < len(rows)


def test_asking_leaves_the_model_as_it_was():
    loaded = exact_model("rwkv")
    before = model_fingerprint(loaded.model)
    ask(loaded, full_forward(loaded.model), questions_of(loaded), generate_all=True)
    assert model_fingerprint(loaded.model) == before


# Formats


def test_each_format_is_asked_with_its_own_end():
    loaded = chat_loaded()
    tokenizer, forms = loaded.tokenizer, ("raw", "qa", "chat", "unseen")
    questions = edit_questions(tokenizer, EDITS[:1], [ModelAnswer("x", (5, 0))] * 2, forms)
    assert [(q.kind[0], q.format) for q in questions] == [
        *((kind, form) for form in forms[:3] for kind in "rgg"), ("r", "unseen"), ("l", "raw"), ("l", "raw"),
    ]  # fmt: skip
    texts = {q.format: tokenizer.decode(q.row.token_ids) for q in questions if q.kind == "reliability"}
    assert texts == {
        "raw": "The capital of France is Oslo<eos>",
        "qa": "Question: The capital of France is\nAnswer: Oslo<eos>",
        "chat": "[user]: The capital of France is<end>[assistant]: Oslo<end>",
        "unseen": "[user]: I need a short answer, only a few words. The capital of France is<end>[assistant]: Oslo<end>",
    }
    assert {q.prompt for q in questions if q.kind == "reliability"} == {EDITS[0].prompt}


@pytest.mark.parametrize("end", ["<eos>", "<end>"])
@pytest.mark.parametrize("form", ["raw", "chat"])
def test_an_answer_ended_by_eos_or_by_the_end_of_a_turn_is_ended(form, end):
    tokenizer = chat_tokenizer()
    prompt_tokens = len(encode_question(tokenizer, "Q", form))
    answer = [tokenizer(" Oslo")["input_ids"], tokenizer.convert_tokens_to_ids(end)]
    filler = tokenizer("~")["input_ids"] * (prompt_tokens - 1)
    loaded = scripted(*filler, *answer[0], answer[1], tokenizer=tokenizer)
    questions = edit_questions(tokenizer, [edit("a", "Q", "Oslo")], [], [form])
    for generate_all in (False, True):
        (found,) = ask(loaded, full_forward(loaded.model), questions, generate_all=generate_all)
        own_end = end == {"raw": "<eos>", "chat": "<end>"}[form]
        assert found == EditOutcome("a", "reliability", "Q", "Oslo", "Oslo", True, own_end, form)


# Locality


def by_hand(table):
    """The logits of single rows, whose supervised tokens have the given probabilities."""
    return lambda rows: torch.cat([torch.tensor(table[row]).log() for row in rows])


def test_locality_worked_out_by_hand():
    half, even, low = [0.5, 0.25, 0.125, 0.125], [0.25] * 4, [0.125, 0.25, 0.125, 0.5]
    long, short = TokenRow((1, 2, 3, 0, 1), 2), TokenRow((3, 1), 1)
    before = {long: [half, half, low], short: [half]}
    after = {long: [[0.25, 0.125, 0.5, 0.125], half, low], short: [[0.4, 0.3, 0.15, 0.15]]}
    questions = [EditQuestion("a", "locality", "p", "e", long, reference=row) for row in (long, short)]
    changes = reference_changes(by_hand(after), by_hand(before), [*questions, *questions])
    assert changes.keys() == {long, short}
    assert changes[long] == ReferenceChange(
        pytest.approx(2 / 3), False, pytest.approx((0.5 + 0.25 - 0.25) * math.log(2), rel=1e-5)
    )
    expected = 0.5 * math.log(0.5 / 0.4) + 0.25 * math.log(0.25 / 0.3) + 0.25 * math.log(0.125 / 0.15)
    assert changes[short] == ReferenceChange(1.0, True, pytest.approx(expected, rel=1e-5))
    assert reference_changes(by_hand(before), by_hand({**before, short: [even]}), questions[:1])[long].kl == 0.0
    loaded = scripted(" Oslo", EOS)
    outcomes = ask(loaded, full_forward(loaded.model), questions, changes=changes)
    assert [(o.kept, o.first_kept) for o in outcomes] == [(pytest.approx(2 / 3), False), (1.0, True)]


def test_a_model_that_predicts_nothing_keeps_nothing():
    row = TokenRow((3, 1, 2), 1)
    question = EditQuestion("a", "locality", "p", "e", row, reference=row)
    broken = {row: [[math.nan] * 4, [0.25] * 3 + [math.inf]]}
    changes = reference_changes(by_hand(broken), by_hand({row: [[0.4, 0.2, 0.2, 0.2]] * 2}), [question])
    assert changes == {row: ReferenceChange(0.0, False, None)}


def test_references_are_the_answers_of_the_data_set_or_else_the_models_own():
    tokenizer = exact_model("llama").tokenizer
    request = EditRequest(
        "a", "", "Q", "Oslo", None, (), (LocalityPrompt("Spain?", "Madrid"), LocalityPrompt("Peru?", None))
    )
    unedited = [ModelAnswer("No", (5, 0)), ModelAnswer("Yes", (7, 8, 0))]
    given, own = (q for q in edit_questions(tokenizer, [request], unedited) if q.kind == "locality")
    assert tokenizer.decode(given.reference.token_ids) == "Spain? Madrid"
    assert tokenizer.decode(given.reference.target_ids) == " Madrid"
    assert given.row.target_ids == (5, 0) and given.expected == "No"
    assert own.reference == own.row and own.row.target_ids == (7, 8, 0)
    assert set(question_rows([given, own])) == {given.row, given.reference, own.row}


# Metrics


def outcome(identity: str, kind: str, correct: bool, correct_tf: bool = False) -> EditOutcome:
    return EditOutcome(identity, kind, "prompt", "expected", "got", correct, correct_tf)


def unrelated(identity: str, same: bool, kept: float, first: bool, kl: float | None) -> EditOutcome:
    return replace(outcome(identity, "locality", same), kept=kept, first_kept=first, kl=kl)


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
            unrelated("c", True, 1.0, True, 0.0),
            unrelated("c", False, 0.25, True, 0.6),
            unrelated("d", False, 0.5, False, 2.0),
        ]
    )
    assert metrics == {
        "reliability": pytest.approx(2 / 3),
        "reliability.raw": pytest.approx(2 / 3),
        "reliability_tf": pytest.approx(1 / 3),
        "generalization": pytest.approx((3 / 4 + 0) / 2),
        "generalization.raw": pytest.approx((3 / 4 + 0) / 2),
        "generalization_tf": pytest.approx((1 / 4 + 0) / 2),
        "locality": pytest.approx((0.625 + 0.5) / 2),
        "locality_first": 0.5,
        "locality_kl": pytest.approx((0.3 + 2.0) / 2),
        "locality_exact": 0.25,
    }


LONG = "It was founded by Ada Lovelace in London in 1843."


def test_long_targets_have_f1_and_containment_beside_exact_match():
    """By hand: articles and marks do not count. 7 of the 9 words of the answer are among the 10 of the target."""

    def outcome(identity, expected, got, form="raw"):
        return EditOutcome(identity, "reliability", "p", expected, got, got == expected, False, form)

    near, more = "It was founded by Grace Hopper in London in 1943", f"They say: {LONG} And so on"
    metrics = edit_metrics([outcome("a", LONG, near), outcome("b", "Oslo", "The Oslo"), outcome("c", LONG, more)])
    expected = {"a": 2 * 7 / (10 + 10), "c": 2 * 10 / (15 + 10)}
    assert metrics["reliability_f1"] == pytest.approx(sum(expected.values()) / 2)
    assert metrics["reliability_contains"] == 0.5 and metrics["reliability"] == 0
    assert not {name for name in edit_metrics([outcome("b", "Oslo", "Rome")]) if "f1" in name or "contains" in name}
    assert edit_metrics([outcome("a", LONG, LONG), outcome("a", LONG, "", "unseen")])["reliability_f1"] == 1


def test_metrics_over_fewer_edits_say_over_how_many():
    whole = [edit(name, "Q", "Oslo", ["R"], ["L"]) for name in "abc"]
    assert counted(whole) == {"n_edits": 3}
    some = [
        edit("a", "Q", LONG, ["R", "S"]),
        edit("b", "Q", LONG),
        edit("c", "Q", "Oslo", ["R"]),
        edit("d", "Q", "Oslo"),
    ]
    some[3] = replace(some[3], portability=(PortabilityPrompt("P", ("Norway",)),))
    assert counted(some) == {
        "n_edits": 4, "n_edits.generalization": 2, "n_edits.portability": 1,
        "n_edits.reliability_long": 2, "n_edits.generalization_long": 1,
    }  # fmt: skip


def counted(edits):
    tokenizer = chat_loaded().tokenizer
    unedited = [ModelAnswer("x", (5, 0))] * sum(len(one.locality) for one in edits)
    return asked_counts(edit_questions(tokenizer, edits, unedited, ("raw", "chat", "unseen")))


def test_a_wrong_answer_to_a_long_target_is_heard_in_full():
    loaded = scripted(" It was made by Grace Hopper in London in 1943", EOS)
    edits = (edit("a", "Q", LONG), edit("b", "Q", "It was founded in 1843"))
    long, short = ask(loaded, full_forward(loaded.model), edit_questions(loaded.tokenizer, edits, []))
    assert long.got == "It was made by Grace Hopper in London in 1943" and long.f1 == pytest.approx(2 * 6 / 20)
    assert short.got.endswith("…") and short.f1 is None


def test_the_unseen_wording_has_a_metric_and_does_not_count():
    asked = [("a", "raw", True), ("a", "chat", False), ("a", "unseen", False), ("b", "raw", True), ("b", "chat", True)]
    outcomes = [replace(outcome(edit, "reliability", right, right), format=form) for edit, form, right in asked]
    assert edit_metrics(outcomes) == {
        "reliability": 0.75, "reliability_tf": 0.75,
        "reliability.raw": 1.0, "reliability.chat": 0.5, "reliability.unseen": 0.0,
    }  # fmt: skip


def test_what_has_no_finite_value_is_absent():
    assert "locality_kl" not in edit_metrics([unrelated("a", False, 0.0, False, None)])


def test_kinds_that_were_not_asked_are_absent():
    alone = edit_metrics([outcome("a", "reliability", True)])
    assert alone.keys() == {"reliability", "reliability.raw", "reliability_tf"}
    assert edit_metrics([]) == {}


kinds = st.sampled_from(["reliability", "generalization", "portability", "locality"])
outcome_lists = st.lists(st.builds(outcome, st.sampled_from("abcd"), kinds, st.booleans(), st.booleans()), max_size=30)


@given(outcome_lists, st.randoms())
def test_metrics_are_shares_whatever_the_order(outcomes, random):
    metrics = edit_metrics(outcomes)
    assert all(0 <= value <= 1 for value in metrics.values())
    shuffled = random.sample(outcomes, len(outcomes))
    assert edit_metrics(shuffled) == pytest.approx(metrics)
    names = {name: name for name in ("reliability", "generalization", "portability")} | {"locality": "locality_exact"}
    assert set(names.values()) & metrics.keys() == {names[o.kind] for o in outcomes}
