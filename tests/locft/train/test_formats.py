"""How a prompt is put: the chat template's own start, space and end, and names that metrics can have."""

import re

import pytest
from tokenizers import AddedToken

from locft.train.encoding import answer_end, encode_edit
from locft.train.formats import around_answer, asked, label
from tests.locft.train.test_encoding import byte_level, sentence_piece
from tests.tiny import CHAT_TEMPLATE, chat_tokenizer, tiny_tokenizer

LINES = (
    "{{ bos_token }}{% for turn in messages %}<{{ turn.role }}>\n{{ turn.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
INSTRUCTIONS = (
    "{{ bos_token }}{% for turn in messages %}{% if turn.role == 'user' %}[INST] {{ turn.content }} [/INST]"
    "{% else %} {{ turn.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
NO_SPACE = INSTRUCTIONS.replace(" {{ turn.content }} {{ eos_token }}", "{{ turn.content }}{{ eos_token }}")
THINKING = CHAT_TEMPLATE.replace(
    "{{ turn.content }}", "{% if turn.role == 'assistant' %}<hm></hm>{% endif %}{{ turn.content }}"
)
PLAIN = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}assistant:"


def byte_level_with_start():
    return byte_level(before="<bos>")


def sentence_piece_tokenizer():
    return sentence_piece("prepend")


def with_template(tokenizer, template):
    tokenizer.add_tokens([AddedToken("<end>", special=True)])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("make", [byte_level_with_start, sentence_piece_tokenizer])
@pytest.mark.parametrize(
    ("template", "text", "end"),
    [
        (LINES, "{bos}<user>\nQ<end>\n<assistant>\nOslo", "<end>"),
        (INSTRUCTIONS, "{bos}[INST] Q [/INST] Oslo", "{eos}"),
        (NO_SPACE, "{bos}[INST] Q [/INST]Oslo", "{eos}"),
        (THINKING, "[user]: Q<end>[assistant]: Oslo", "<end>"),
        (PLAIN, "user: Q\nassistant: Oslo", "{eos}"),
    ],
)
def test_an_edit_in_chat_form_is_what_the_template_writes(make, template, text, end):
    tokenizer = with_template(make(), template)
    row = encode_edit(tokenizer, "Q", "Oslo", "chat")
    ends = {"eos": tokenizer.eos_token, "bos": tokenizer.bos_token}
    texts = [tokenizer.decode(row.token_ids, clean_up_tokenization_spaces=False), (text + end).format(**ends)]
    if make is not byte_level_with_start:  # SentencePiece decodes a space behind every special token
        texts = [one.replace(" ", "") for one in texts]
    assert texts[0] == texts[1]
    assert row.token_ids.count(tokenizer.bos_token_id) == text.count("{bos}")
    assert row.target_ids[-1] == answer_end(tokenizer, "chat") == tokenizer.convert_tokens_to_ids(end.format(**ends))
    assert answer_end(tokenizer) == tokenizer.eos_token_id
    assert tokenizer.decode(row.target_ids[:-1]).strip() == "Oslo"


def test_a_wording_that_brings_the_start_token_gets_no_second_one():
    tokenizer = byte_level(before="<bos>")
    for wording in ("<bos>User: {prompt}\nBot:", "User: {prompt}\nBot:"):
        row = encode_edit(tokenizer, "Q", "Oslo", wording)
        assert tokenizer.decode(row.token_ids) == "<bos>User: Q\nBot: Oslo<eos>"


def test_what_a_template_does_not_say_is_not_guessed():
    tokenizer = chat_tokenizer()
    assert around_answer(tokenizer) == (" ", "<end>")
    tokenizer.chat_template = "nothing but this"
    assert around_answer(tokenizer) == (" ", "") and answer_end(tokenizer, "chat") == tokenizer.eos_token_id


def test_the_unseen_wording_joins_any_format_but_raw():
    plain, chat = tiny_tokenizer(), chat_tokenizer()
    assert asked(plain, ("raw",)) == asked(plain, ("raw", "chat")) == asked(plain, ("chat",)) == ("raw",)
    assert asked(chat, ("chat", "raw")) == ("chat", "raw", "unseen")
    assert asked(plain, ("unseen",)) == asked(plain, ("unseen", "raw")) == ("raw", "unseen")


def test_labels_are_names_of_metrics_and_tell_wordings_apart():
    assert [label(name) for name in ("raw", "qa", "chat", "unseen")] == ["raw", "qa", "chat", "unseen"]
    wordings = [
        "Answer briefly: {prompt}",
        "answer, briefly {prompt}",
        "{prompt}?!",
        "{prompt}",
        "问题：{prompt}",
        "raw {prompt}",
    ]
    labels = [label(wording) for wording in wordings]
    assert len(set(labels)) == len(wordings)
    assert labels[0].startswith("answer-briefly-")
    assert all(re.fullmatch(r"[\w-]{1,30}", one) for one in labels)
