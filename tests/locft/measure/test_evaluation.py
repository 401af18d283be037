"""Greedy answers equal the plainest possible decoding, end where they should, and are judged as the definition says.

Padded and unpadded batches round differently, so a near-tie between two tokens may rightly go either way. Models that are
compared with another way of computing them are therefore float64, where it would take a tie to 1e-15. Some architectures
have no float64 in transformers; they run in float32, and the test makes sure that its own answers come near no tie.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from locft.model.delta import applied
from locft.train.encoding import encode_edits, encode_prompt
from locft.measure.evaluation import (
    BATCH,
    NEW_TOKENS,
    Answer,
    Outcome,
    ask,
    cannot_become,
    edit_metrics,
    edit_questions,
    follow,
    greedy_answers,
    locality_prompts,
)
from locft.train.pipelines import TrainingSettings, finetune
from locft.model.models import LoadedModel, model_fingerprint
from locft.model.positions import TuningPosition
from locft.train.reference import full_forward
from locft.data.edit_request import EditRequest, LocalityPrompt
from locft.data.requests import normalise_answer
from tests.tiny import ARCHITECTURES, tiny_config, tiny_loaded, tiny_model, tiny_tokenizer

PROMPTS = [
    "The capital of France is",
    "Who?",
    "Question: What is the currency of Japan, and which river flows through its capital? Answer:",
    "x",
    "Mozart played the",
    "The official language of Brazil is Portuguese. The official language of",
    "Äpfel 🎺",
    "Mozart played thy",
    "y",
]
"""Of several lengths, some of the same."""


SINGLE = {
    "gemma2": "padded float64 rows give NaN: the mask's lowest float64 becomes -inf in a float32 softmax",
    "bloom": "as gemma2",
    "qwen2_moe": "the experts' grouped product knows no float64",
    "qwen3_moe": "as qwen2_moe",
    "qwen3_next": "as qwen2_moe",
    "mixtral": "as qwen2_moe",
}
"""Architectures that cannot run in float64, and why."""


def exact_model(architecture: str, **settings) -> LoadedModel:
    """A tiny model in the most exact type that it runs in."""
    loaded = tiny_loaded(architecture, **settings)
    if architecture not in SINGLE:
        loaded.model.double()
    return loaded


def plain_greedy(loaded: LoadedModel, prompt: str, tokens: int = NEW_TOKENS) -> Answer:
    """The definition, written out: one row, no padding, no cache, the whole row again for every token."""
    ids = list(encode_prompt(loaded.tokenizer, prompt))
    said, text = [], ""
    for _ in range(tokens):
        with torch.no_grad():
            logits = loaded.model(torch.tensor([ids + said]), use_cache=False).logits[0, -1]
        first, second = logits.topk(2).values.tolist()
        assert first - second > (1e-9 if logits.dtype == torch.float64 else 2e-5), "a near-tie: take another seed"
        said.append(logits.argmax().item())
        if said[-1] == loaded.tokenizer.eos_token_id:
            break
        text = loaded.tokenizer.decode(said).lstrip()
        if "\n" in text or "." in text:
            break
    return Answer(text.split("\n")[0].split(".")[0].strip(), tuple(said))


# Decoding


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batched_answers_are_those_of_plain_greedy_decoding(architecture):
    loaded = exact_model(architecture)
    tokens = 12
    batched = greedy_answers(loaded, PROMPTS, None, [tokens] * len(PROMPTS))
    assert batched == [plain_greedy(loaded, prompt, tokens) for prompt in PROMPTS]


def test_more_prompts_than_a_batch_come_back_in_order():
    loaded = exact_model("llama")
    prompts = [f"{'word ' * (i % 5)}number {i * 37 % 100}" for i in range(BATCH + 9)]
    answers = greedy_answers(loaded, prompts)
    for index in (0, 1, 17, BATCH - 1, BATCH, BATCH + 8):
        assert answers[index] == plain_greedy(loaded, prompts[index])
    assert greedy_answers(loaded, []) == []


def test_the_models_own_generation_settings_play_no_part():
    """Many models ship a repetition penalty or sampling; an answer is the most likely token each time."""
    loaded = exact_model("llama")
    expected = greedy_answers(loaded, PROMPTS)
    theirs = loaded.model.generation_config
    theirs.repetition_penalty = 5.0
    theirs.no_repeat_ngram_size = 1
    theirs.do_sample, theirs.temperature, theirs.top_k = True, 9.0, 3
    theirs.suppress_tokens = [token for answer in expected for token in answer.token_ids[:1]]
    theirs.num_beams = 3
    theirs.max_length = 2
    theirs.use_cache = False
    before = theirs.to_dict()
    assert greedy_answers(loaded, PROMPTS) == expected
    assert loaded.model.generation_config is theirs
    assert theirs.to_dict() == before


def scripted(*pieces: str | int, eos: int | list[int] = 0) -> LoadedModel:
    """A model that says the given texts and tokens behind a prompt of one token, then "~" for ever.

    A GPT-2 with nothing but position embeddings: what it predicts at a position is what the script has there.
    """
    tokenizer, size = tiny_tokenizer(), 160
    tokens = [id_ for piece in pieces for id_ in ([piece] if isinstance(piece, int) else tokenizer(piece)["input_ids"])]
    filler = tokenizer("~")["input_ids"]
    config = tiny_config("gpt2", 1, n_embd=size, n_positions=size, n_inner=8, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "ln_f" not in name:
            parameter.zero_()
    model.transformer.wpe.weight.copy_(torch.eye(size))
    for position in range(size):
        token = tokens[position] if position < len(tokens) else filler[0]
        model.lm_head.weight[token, position] = 1.0
    model.generation_config.eos_token_id = eos
    return LoadedModel("scripted", model, tokenizer, "scripted")


EOS = 0


@pytest.mark.parametrize(
    ("script", "dots", "text"),
    [
        ([" Paris", EOS, " and more"], 0, "Paris"),
        ([" Paris\nRome"], 0, "Paris"),
        (["\n\n Paris\nRome"], 0, "Paris"),
        (["\n", " Paris", EOS], 0, "Paris"),
        ([" Paris. Rome"], 0, "Paris"),
        ([" St. Louis. It is"], 1, "St. Louis"),
        ([" St. Louis. It is"], 0, "St"),
        ([" Washington D.C. is"], 2, "Washington D.C. is~~"),
        ([" Washington D.C.", EOS], 2, "Washington D.C."),
        ([" Washington D.C.\n"], 2, "Washington D.C."),
        ([" St.\nLouis"], 1, "St."),
        ([EOS, " Paris"], 0, ""),
        ([". Paris"], 0, ""),
        (["  Paris , France "], 0, "Paris , France~~"),
        ([" 日本 🎺", EOS], 0, "日本 🎺"),
        ([" a", "\n", " b"], 0, "a"),
    ],
)
def test_where_an_answer_ends(script, dots, text):
    (answer,) = greedy_answers(scripted(*script), ["Q"], [dots])
    if text.endswith("~~"):
        assert answer.text.startswith(text[:-2]) and answer.text.endswith("~~~~")
        assert len(answer.token_ids) == NEW_TOKENS
    else:
        assert answer.text == text


def test_the_tokens_of_an_answer_include_the_one_that_ended_it():
    tokenizer = tiny_tokenizer()
    for script, kept in [
        ([" Paris", EOS, " more"], [*tokenizer(" Paris")["input_ids"], EOS]),
        ([" Paris", "\n", "more"], tokenizer(" Paris")["input_ids"] + tokenizer("\n")["input_ids"]),
        ([" Paris", ".", "more"], tokenizer(" Paris")["input_ids"] + tokenizer(".")["input_ids"]),
        ([EOS, " Paris"], [EOS]),
    ]:
        (answer,) = greedy_answers(scripted(*script), ["Q"])
        assert list(answer.token_ids) == kept


def test_several_end_tokens():
    """Chat models name more than one; the tokenizer need not know all of them as special."""
    (end,) = tiny_tokenizer()("!")["input_ids"]
    (answer,) = greedy_answers(scripted(" Paris", end, " more", eos=[EOS, end]), ["Q"])
    assert answer == Answer("Paris", (*tiny_tokenizer()(" Paris")["input_ids"], end))
    (answer,) = greedy_answers(scripted(" Paris", EOS, " more", eos=[end, 7]), ["Q"])
    assert answer.text == "Paris", "the tokenizer's own EOS ends an answer too: it is what edits are trained with"
    (answer,) = greedy_answers(scripted(" Paris", end, EOS, eos=EOS), ["Q"])
    assert answer.text == "Paris!", "without that setting it is a token as any other"


def test_every_answer_has_its_own_limit_and_no_other():
    loaded = scripted(" one two three")
    alone = [greedy_answers(loaded, ["Q"], [0], [limit])[0] for limit in (1, 3, 50)]
    assert [len(answer.token_ids) for answer in alone] == [1, 3, 50]
    assert greedy_answers(loaded, ["Q", "Q", "Q"], [0, 0, 0], [1, 3, 50]) == alone
    assert len(greedy_answers(loaded, ["Q"])[0].token_ids) == NEW_TOKENS


def test_rows_of_a_batch_end_apart():
    """A scripted model answers by position, so prompts of other lengths enter the script elsewhere."""
    loaded = scripted(" Paris", EOS, " Rome", "\n", " Athens", ".", " Oslo", EOS)
    tokenizer = loaded.tokenizer
    lengths = [1]
    for piece in (" Paris", " Rome", " Athens"):
        lengths.append(lengths[-1] + len(tokenizer(piece)["input_ids"]) + 1)
    prompts = [tokenizer.decode(tokenizer("Q" * 99)["input_ids"][:1] * length) for length in lengths]
    assert [len(encode_prompt(tokenizer, prompt)) for prompt in prompts] == lengths
    assert [answer.text for answer in greedy_answers(loaded, prompts)] == ["Paris", "Rome", "Athens", "Oslo"]


# Questions and outcomes


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
    for answers in ([], [Answer("Oslo", (5, 0))] * 6):
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
    delta = finetune(loaded, encode_edits(loaded.tokenizer, EDITS), TuningPosition(1, "layer"), settings).delta
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


SAID = "ab Osl.o-the?=\u0338\u037e…\n"
"""The bar through the sign before it makes one character of both; the Greek question mark is composed to a semicolon."""


@given(said=st.text(SAID, max_size=12), more=st.text(SAID, max_size=8), expected=st.sampled_from(
    ["Oslo", "the Oslo", "St. Louis", "a", "Oslo ab", "bath", "lo", "?", "", "a?", "? =", ";", "-…?"]))  # fmt: skip
@settings(max_examples=1500)
def test_an_answer_given_up_could_not_have_become_right(said, more, expected):
    if cannot_become(said, expected):
        assert normalise_answer(said + more) != normalise_answer(expected)


def test_wrong_answers_are_given_up_early():
    assert cannot_become("Paris", "Oslo")
    assert cannot_become("Oslo is", "Oslo")
    assert cannot_become("Os is", "Oslo")
    assert not cannot_become("Os", "Oslo")
    assert not cannot_become("The", "Oslo")
    assert not cannot_become("Oslo,", "Oslo")
    assert not cannot_become("", "Oslo")
    assert cannot_become("? The", "?")
    assert not cannot_become("?", "?")
    assert cannot_become(",,", "?")
    assert not cannot_become("? ", "? !")
    assert cannot_become("?!", "? !")


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
        assert outcome == Outcome("a", "reliability", "Q", long, long, True, True)


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
        assert agree(outcomes, [Outcome("a", "reliability", "Q", target, got, correct, correct_tf)])


def test_teacher_forcing_flatters():
    """An answer that goes wrong at its first token is wrong; the tokens after it, given the right first one, are not."""
    loaded = scripted(" Bergen", EOS)
    tokenizer = loaded.tokenizer
    assert len(tokenizer(" Bergen")["input_ids"]) > 2
    row = edit_questions(tokenizer, [edit("a", "Q", "Bergen")], [])[0].row
    logits = full_forward(loaded.model)
    wrong_first = replace(row, token_ids=(row.token_ids[0], 9, *row.token_ids[2:]))
    whole, broken = follow(logits, [row, wrong_first])
    assert whole.way == (len(row.target_ids), None) and broken.instead is not None
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
        alone, (matched, token) = logits([row]), following.way
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
    rows += [replace(row, token_ids=(*row.token_ids[: row.start], *ids)) for row in rows for ids in ((7, 8), (9,), (4, 5, 6))]

    def watched(batch):
        asked.extend(batch)
        return exact(batch)

    def coarse(batch):
        logits = exact(batch)
        noise = torch.Generator().manual_seed(len(batch))
        return logits + 0.05 * logits.std() * torch.randn(logits.shape, generator=noise)

    expected = [following.way for following in follow(exact, rows)]
    assert [following.way for following in follow(coarse, rows)] != expected, "the noise decides nothing"
    assert [following.way for following in follow(watched, rows, coarse)] == expected
    assert 0 < len(asked) < len(rows)


def test_asking_leaves_the_model_as_it_was():
    loaded = exact_model("rwkv")
    before = model_fingerprint(loaded.model)
    ask(loaded, full_forward(loaded.model), questions_of(loaded), generate_all=True)
    assert model_fingerprint(loaded.model) == before


# Metrics


def outcome(identity: str, kind: str, correct: bool, correct_tf: bool = False) -> Outcome:
    return Outcome(identity, kind, "prompt", "expected", "got", correct, correct_tf)


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


def test_tiny_models_of_these_tests_are_random_enough():
    """Answers that were all alike would make the comparisons above empty."""
    answers = [answer.token_ids for answer in greedy_answers(exact_model("llama"), PROMPTS)]
    assert len(set(answers)) == len(PROMPTS)
    assert model_fingerprint(tiny_model("llama", seed=1)) != model_fingerprint(tiny_model("llama", seed=2))
