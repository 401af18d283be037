"""Greedy answers equal the plainest possible decoding, end where they should, and are given up only when decided."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locft.data.answers import normalise_answer
from locft.measure.generation import (
    BATCH,
    NEW_TOKENS,
    GreedyDecoder,
    ModelAnswer,
    OpenAnswer,
    cannot_become,
    greedy_answers,
)
from locft.model.models import LoadedModel, model_fingerprint
from locft.train.encoding import encode_prompt
from tests.locft.measure.decoding import EOS, PROMPTS, exact_model, scripted
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer


def plain_greedy(loaded: LoadedModel, prompt: str, tokens: int = NEW_TOKENS) -> ModelAnswer:
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
    return ModelAnswer(text.split("\n")[0].split(".")[0].strip(), tuple(said))


def greedy(loaded: LoadedModel, full_stops: list[int], limits: list[int], prompts=None) -> list[ModelAnswer]:
    """Answers with a number of full stops allowed in each, and a limit on its tokens."""
    prompts = prompts or ["Q"] * len(limits)
    decoder = GreedyDecoder(loaded)
    ids = [encode_prompt(loaded.tokenizer, prompt) for prompt in prompts]
    answers = decoder.complete(
        [OpenAnswer(i, (), f, limit) for i, f, limit in zip(ids, full_stops, limits, strict=True)]
    )
    return [ModelAnswer(decoder.text(answer), answer.token_ids) for answer in answers]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batched_answers_are_those_of_plain_greedy_decoding(architecture):
    loaded = exact_model(architecture)
    tokens = 12
    batched = greedy(loaded, [0] * len(PROMPTS), [tokens] * len(PROMPTS), PROMPTS)
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
        ([" about", " 1", ".", "2", " million", ". Or"], 0, "about 1.2 million"),
        ([" in", " 1969", ".", " Then"], 0, "in 1969"),
        ([" in", " 1969", ".", EOS], 0, "in 1969"),
        ([" 1", ".", "5", "\n", "x"], 0, "1.5"),
        (["里昂", "。", "它位于法国"], 0, "里昂"),
        (["天下归仁焉。是", "。"], 1, "天下归仁焉。是"),
        (["カナダ", "！", "です"], 0, "カナダ"),
    ],
)
def test_where_an_answer_ends(script, dots, text):
    (answer,) = greedy(scripted(*script), [dots], [NEW_TOKENS])
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
        ([" 1969", ".", " more"], tokenizer(" 1969")["input_ids"] + tokenizer(".")["input_ids"]),
        (
            [" 1", ".", "5", EOS],
            [*tokenizer(" 1")["input_ids"], *tokenizer(".")["input_ids"], *tokenizer("5")["input_ids"], EOS],
        ),
    ]:
        (answer,) = greedy_answers(scripted(*script), ["Q"])
        assert list(answer.token_ids) == kept


def test_several_end_tokens():
    """Chat models name more than one; the tokenizer need not know all of them as special."""
    (end,) = tiny_tokenizer()("!")["input_ids"]
    (answer,) = greedy_answers(scripted(" Paris", end, " more", eos=[EOS, end]), ["Q"])
    assert answer == ModelAnswer("Paris", (*tiny_tokenizer()(" Paris")["input_ids"], end))
    (answer,) = greedy_answers(scripted(" Paris", EOS, " more", eos=[end, 7]), ["Q"])
    assert answer.text == "Paris", "the tokenizer's own EOS ends an answer too: it is what edits are trained with"
    (answer,) = greedy_answers(scripted(" Paris", end, EOS, eos=EOS), ["Q"])
    assert answer.text == "Paris!", "without that setting it is a token as any other"


def test_every_answer_has_its_own_limit_and_no_other():
    loaded = scripted(" one two three")
    alone = [greedy(loaded, [0], [limit])[0] for limit in (1, 3, 50)]
    assert [len(answer.token_ids) for answer in alone] == [1, 3, 50]
    assert greedy(loaded, [0, 0, 0], [1, 3, 50]) == alone
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


SAID = "ab Osl.o-the?=\u0338\u037e…\n150,%'\u00a0。+"
"""The bar through the sign before it makes one character of both; the Greek question mark is composed to a semicolon."""


@given(said=st.text(SAID, max_size=12), more=st.text(SAID, max_size=8), expected=st.sampled_from(
    ["Oslo", "the Oslo", "St. Louis", "a", "Oslo ab", "bath", "lo", "?", "", "a?", "? =", ";", "-…?", "1 000", "a 15000", "b++",
     "b"]))  # fmt: skip
@settings(max_examples=1500)
def test_an_answer_given_up_could_not_have_become_right(said, more, expected):
    if cannot_become(said, expected):
        assert normalise_answer(said + more) != normalise_answer(expected)


def test_wrong_answers_are_given_up_early():
    assert cannot_become("Paris", "Oslo")
    assert not cannot_become("550 0", "550,000") and cannot_become("551 0", "550,000")
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


def test_tiny_models_of_these_tests_are_random_enough():
    """Answers that were all alike would make the comparisons above empty."""
    answers = [answer.token_ids for answer in greedy_answers(exact_model("llama"), PROMPTS)]
    assert len(set(answers)) == len(PROMPTS)
    assert model_fingerprint(tiny_model("llama", seed=1)) != model_fingerprint(tiny_model("llama", seed=2))


def test_the_head_takes_states_without_gaps():
    """Of a slice with gaps, the bfloat16 product on CPUs would copy the head once a row."""
    loaded, seen = LoadedModel("tiny", tiny_model("llama"), tiny_tokenizer(), "0"), []
    handle = loaded.model.lm_head.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    greedy_answers(loaded, PROMPTS[:3])
    handle.remove()
    assert len(seen[0]) == 3 and all(states.is_contiguous() for states in seen)
    assert not loaded.model.lm_head._forward_pre_hooks
