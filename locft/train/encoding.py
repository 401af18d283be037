"""Text to token rows whose supervised span is exact.

Legend: T tokens of a row, K supervised tokens.

Everything that is computed with a model is computed on rows: a training example is (prompt | target + EOS), a choice of
an item is (context | choice), running prose is (first token | the rest). A row stores its tokens and where the
supervised span starts. The span is never derived from pad tokens: if pad is EOS, a mask made that way is off by one, and the
first token of the answer is silently never trained.
"""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from locft.data.answers import space_before_answer
from locft.data.edit_request import EditRequest
from locft.train.formats import RAW, around_answer, is_chat, put
from locft.train.token_rows import TokenRow


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, *, special_tokens: bool = True) -> tuple[int, ...]:
    """Tokens of a text that is to be continued: with the tokenizer's own start token, without an end token.

    special_tokens: False for a text that already contains them, as one from a chat template does.

    If the tokenizer has no start token, an empty text becomes the EOS token, the usual substitute, so that the first real
    token has a predecessor.
    """
    ids = tokenizer(text, add_special_tokens=special_tokens)["input_ids"]
    if not special_tokens:
        return tuple(ids)
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if ids[-1:] == [eos] and ids != [bos]:
        ids = ids[:-1]
    return tuple(ids) or (bos if bos is not None else eos,)


def encode_continuation(
    tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str, *, special_tokens: bool = True
) -> TokenRow:
    """Row of `prompt + continuation` with exactly the continuation supervised, no EOS.

    The whole text is tokenized at once. If its first tokens are those of the prompt alone, the rest is the continuation
    (so SentencePiece adds no second space). If a token spans the boundary, both sides are tokenized separately: the
    prompt must stay what generation will see.
    """
    prompt_ids = encode_prompt(tokenizer, prompt, special_tokens=special_tokens)
    whole = encode_prompt(tokenizer, prompt + continuation, special_tokens=special_tokens)
    if prompt and len(whole) > len(prompt_ids) and whole[: len(prompt_ids)] == prompt_ids:
        return TokenRow(whole, len(prompt_ids))
    return TokenRow(prompt_ids + _continuation_ids(tokenizer, prompt_ids, continuation), len(prompt_ids))


def encode_question(tokenizer: PreTrainedTokenizerBase, prompt: str, form: str = RAW) -> tuple[int, ...]:
    """Tokens of a prompt in a format (`locft.train.formats`), to be answered."""
    text, complete = put(tokenizer, prompt, form)
    return encode_prompt(tokenizer, text, special_tokens=not complete)


def encode_answer(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, form: str = RAW) -> TokenRow:
    """Row of a prompt in a format and its answer, which is supervised, without an end token.

    The answer is preceded by one space, by nothing if the text ends in whitespace or the scripts use no spaces, or by the
    whitespace that a chat template puts there.
    """
    text, complete = put(tokenizer, prompt, form)
    space = around_answer(tokenizer)[0] if is_chat(tokenizer, form) else space_before_answer(text, answer)
    return encode_continuation(tokenizer, text, space + answer, special_tokens=not complete)


def encode_edit(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str, form: str = RAW) -> TokenRow:
    """Training row of an edit: prompt, target and the token that ends an answer in this format (`answer_end`)."""
    row = encode_answer(tokenizer, prompt, target, form)
    return TokenRow((*row.token_ids, answer_end(tokenizer, form)), row.start)


def answer_end(tokenizer: PreTrainedTokenizerBase, form: str = RAW) -> int:
    """The token that ends an answer: the model's EOS, or the special token that its chat template puts after one."""
    eos = tokenizer.eos_token_id
    if not is_chat(tokenizer, form):
        return eos
    behind = around_answer(tokenizer)[1].lstrip()
    first = next(iter(tokenizer(behind, add_special_tokens=False)["input_ids"]), eos)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return first if first in special else eos


def encode_edits(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest], form: str = RAW
) -> tuple[TokenRow, ...]:
    """One training row per edit, in order."""
    return tuple(encode_edit(tokenizer, request.prompt, request.target, form) for request in requests)


def _continuation_ids(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: tuple[int, ...], continuation: str
) -> tuple[int, ...]:
    """Tokens that, after the prompt's, decode to exactly `continuation`. (SentencePiece adds a space before every text.)"""
    said = _text(tokenizer, prompt_ids) + continuation
    candidates = [
        tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (continuation, continuation.removeprefix(" "))
    ]
    exact = [rest for rest in candidates if _text(tokenizer, prompt_ids + rest) == said]
    return (exact or candidates)[0]


def _text(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def text_windows(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], size: int) -> list[TokenRow]:
    """Texts in windows of at most `size` tokens, every token supervised but the first. Each begins with the start token if the
    tokenizer puts one before texts: a model trained with it does badly without."""
    start = tokenizer("a")["input_ids"][:1]
    before = (tokenizer.bos_token_id,) if start == [tokenizer.bos_token_id] else ()
    step = size - len(before)
    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        found += [TokenRow((*before, *ids[at : at + step]), 1) for at in range(0, len(ids), step)]
    return [row for row in found if len(row.token_ids) > 1]
