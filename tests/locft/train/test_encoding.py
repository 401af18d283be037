"""The boundary between prompt and target is exact, whatever the tokenizer does at the ends of a text."""

import json
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from locft.data.answers import space_before_answer
from locft.data.edit_request import EditRequest
from locft.data.requests import load_edits
from locft.train.encoding import encode_continuation, encode_edit, encode_edits, encode_prompt
from locft.train.token_rows import TokenRow
from tests.tiny import SENTENCES, tiny_tokenizer

SHARED = Path(__file__).resolve().parents[3] / ".." / "shared"

PROMPTS = [
    "The capital of France is",
    "Who wrote Hamlet?",
    "He said: “",
    "The price in £ (or €",
    "Die Hauptstadt von Österreich ist",
    "日本の首都は",
    "Der Name 🎺",
    "x",
    "line one\nline two",
    "1999-",
]
TARGETS = ["Paris", "St. Louis", "Zürich", "東京", "a", "🎺 trumpet", "D.C.", "42", "'tis", "New  York"]


def byte_level(before: str = "", after: str = "") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose template puts special tokens around every text."""
    backend = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    backend.add_special_tokens(["<bos>"])
    ids = [(token, backend.token_to_id(token)) for token in ("<bos>", "<eos>")]
    single = " ".join(part for part in (before, "$A", after) if part)
    backend.post_processor = processors.TemplateProcessing(single=single, pair="$A $B", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>" if before else None, eos_token="<eos>", pad_token="<eos>"
    )


def sentence_piece(scheme: str, split_words: bool = True) -> PreTrainedTokenizerFast:
    """Like Llama-2: a space is ▁, one is put before every text, unknown characters are bytes, BOS comes first.

    scheme: prepend (a normaliser, as in Llama-2's files) or metaspace (a pre-tokenizer, as in newer conversions).
    split_words False learns tokens with a ▁ inside, so that one can span the boundary of prompt and target.
    """
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if split_words:
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, max_token_length=12, show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    learnt = json.loads(backend.to_str())
    learnt["added_tokens"] = learnt["added_tokens"][
        :3
    ]  # the trainer made the bytes special too; they are common tokens
    backend = Tokenizer.from_str(json.dumps(learnt))
    if scheme == "metaspace":
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=split_words)
        backend.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=split_words)]
        )
    else:
        backend.pre_tokenizer = None
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "byte-level": byte_level(),
    "byte-level, BOS": byte_level(before="<bos>"),
    "byte-level, appends EOS": byte_level(after="<eos>"),
    "byte-level, BOS and EOS": byte_level(before="<bos>", after="<eos>"),
    "byte-level, EOS is BOS": byte_level(before="<eos>"),
    "sentencepiece, prepend": sentence_piece("prepend"),
    "sentencepiece, metaspace": sentence_piece("metaspace"),
    "sentencepiece, tokens span words": sentence_piece("prepend", split_words=False),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def text(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def assert_exact(tokenizer, prompt: str, target: str, row: TokenRow) -> None:
    """Before the boundary what generation will see, behind it the target with its space, then EOS once."""
    space = space_before_answer(prompt, target)
    before, behind = row.token_ids[: row.start], row.target_ids
    assert before == encode_prompt(tokenizer, prompt)
    assert text(tokenizer, before) == prompt
    assert text(tokenizer, row.token_ids) == f"{prompt}{space}{target}"
    # the same tokens behind a word: a SentencePiece decoder takes the space off the beginning of a text
    anchor = encode_prompt(tokenizer, "x")
    assert text(tokenizer, anchor + behind) == f"x{space}{target}"
    assert behind[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in behind[:-1]
    assert tokenizer.eos_token_id not in before[1:]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_boundary_is_exact(tokenizer, prompt):
    for target in TARGETS:
        assert_exact(tokenizer, prompt, target, encode_edit(tokenizer, prompt, target))


words = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"], exclude_characters="▁�"), min_size=1)
phrases = st.lists(words, min_size=1, max_size=4).map(" ".join)


@given(prompt=phrases, target=phrases, name=st.sampled_from(sorted(TOKENIZERS)))
def test_boundary_is_exact_for_any_text(prompt, target, name):
    tokenizer = TOKENIZERS[name]
    assume(
        not any(token in prompt + target for token in tokenizer.all_special_tokens)
    )  # `</s>` typed out is that token
    assume(not any(f"<0x{byte:02X}>" in prompt + target for byte in range(256)))
    assert_exact(tokenizer, prompt, target, encode_edit(tokenizer, prompt, target))


@pytest.mark.parametrize(
    ("prompt", "target", "space"),
    [
        ("The capital is", "Oslo", " "),
        ("The capital is ", "Oslo", ""),
        ("Столица —", "Осло", " "),
        ("프랑스의 수도는", "리옹", " "),
        ("法国的首都是", "里昂", ""),
        ("法国的首都是：", "《里昂》", ""),
        ("法国的首都是?", "“里昂”", ""),
        ("富士山はどの国にありますか？", "カナダ", ""),
        ("新中国成立于", "1949年", ""),
        ("答案是", "42", ""),
        ("法国的首都是", "Lyon", " "),
        ("The Chinese for cat is", "猫", " "),
        ("Question: 首都是？\nAnswer:", "里昂", " "),
        ("เมืองหลวงของไทยคือ", "กรุงเทพ", ""),
        ("ນະຄອນຫຼວງແມ່ນ", "ວຽງຈັນ", ""),
        ("រាជធានីគឺ", "ភ្នំពេញ", ""),
        ("မြို့တော်မှာ", "ရန်ကုန်", ""),
    ],
)
def test_no_space_is_put_where_the_script_has_none(prompt, target, space):
    assert space_before_answer(prompt, target) == space


def test_start_token_stands_first_and_once():
    for name in ("byte-level, BOS", "byte-level, BOS and EOS", "sentencepiece, prepend", "sentencepiece, metaspace"):
        tokenizer = TOKENIZERS[name]
        row = encode_edit(tokenizer, "Who wrote Hamlet?", "Jane Austen")
        assert row.token_ids[0] == tokenizer.bos_token_id
        assert row.token_ids.count(tokenizer.bos_token_id) == 1


def test_the_target_alone_would_get_a_second_space():
    """The trap that tokenizing the two sides apart falls into, and that the tokenizer of these tests does set."""
    tokenizer = TOKENIZERS["sentencepiece, prepend"]
    row = encode_edit(tokenizer, "The capital of", "France")
    apart = tuple(tokenizer(" France", add_special_tokens=False)["input_ids"])
    assert text(tokenizer, row.token_ids[: row.start] + apart) == "The capital of  France"
    assert text(tokenizer, row.token_ids) == "The capital of France"


def test_a_token_that_spans_the_boundary_is_split():
    """Generation sees the prompt's own tokens, so training has to as well."""
    tokenizer = TOKENIZERS["sentencepiece, tokens span words"]
    pairs = [(s[:cut], s[cut + 1 :]) for s in SENTENCES for cut, letter in enumerate(s) if letter == " "]
    spanned = [
        (prompt, target)
        for prompt, target in pairs
        if encode_prompt(tokenizer, f"{prompt} {target}")[: len(encode_prompt(tokenizer, prompt))]
        != encode_prompt(tokenizer, prompt)
    ]
    assert spanned, "no token of this tokenizer spans a boundary: the test would say nothing"
    for prompt, target in spanned:
        assert_exact(tokenizer, prompt, target, encode_edit(tokenizer, prompt, target))


def test_a_prompt_that_ends_in_a_space_keeps_it(tokenizer):
    row = encode_continuation(tokenizer, "Answer: ", " yen")
    assert row.token_ids[: row.start] == encode_prompt(tokenizer, "Answer: ")
    assert text(tokenizer, row.token_ids) == "Answer:  yen"


def test_a_continuation_within_a_word_is_exact(tokenizer):
    row = encode_continuation(tokenizer, "The telephone was inv", "ented")
    assert row.token_ids[: row.start] == encode_prompt(tokenizer, "The telephone was inv")
    assert text(tokenizer, encode_prompt(tokenizer, "The telephone was inv") + row.target_ids).endswith("ented")


def test_pad_plays_no_part(tokenizer):
    """Where pad is EOS, a span derived from it loses the target's end; where pad is a common token, its middle."""
    rows = [encode_edit(tokenizer, prompt, target) for prompt in PROMPTS for target in TARGETS]
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.convert_ids_to_tokens(rows[0].target_ids[0]),
        padding_side="left",
    )
    assert [encode_edit(other, prompt, target) for prompt in PROMPTS for target in TARGETS] == rows


def test_empty_text_gives_a_predecessor(tokenizer):
    (only,) = encode_prompt(tokenizer, "")
    assert only == (tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id)
    row = encode_continuation(tokenizer, "", "Paris")
    assert row.start == 1
    assert text(tokenizer, row.target_ids) == "Paris"


def test_edits_are_encoded_in_order():
    tokenizer = TOKENIZERS["byte-level"]
    edits = list(zip(PROMPTS, TARGETS, strict=True))
    rows = encode_edits(tokenizer, [EditRequest(str(i), "", *edit, None, (), ()) for i, edit in enumerate(edits)])
    assert rows == tuple(encode_edit(tokenizer, *edit) for edit in edits)


def test_a_row_refuses_a_span_without_a_predecessor():
    assert TokenRow((7, 8, 9), 1).target_ids == (8, 9)
    for start in (0, -1, 4):
        with pytest.raises(ValueError, match=f"starts at {start}, expected 1 to 3"):
            TokenRow((7, 8, 9), start)


@pytest.mark.parametrize("file", ["zsre_3k.json", "counterfact_3k.json"])
def test_real_edits_are_exact_with_every_tokenizer(tokenizer, file):
    path = SHARED / "data" / "editing" / file
    if not path.is_file():
        pytest.skip(f"the shared data sets are not here ({file})")
    requests = load_edits(str(path), limit=100).requests
    assert len(requests) == 100
    special = json.dumps(tokenizer.all_special_tokens)
    for request, row in zip(requests, encode_edits(tokenizer, requests), strict=True):
        assert request.target not in special
        assert_exact(tokenizer, request.prompt, request.target, row)
