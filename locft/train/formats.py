"""How a prompt is put to a model: as it is, as a question, through the chat template, or in a wording of the user's.

An edit that holds in one form may be lost in another, so training and measuring both name the forms they use.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from locft.errors import InputError, did_you_mean

RAW, QA, CHAT, UNSEEN = "raw", "qa", "chat", "unseen"
NAMES = (RAW, QA, CHAT, UNSEEN)
PLACE = "{prompt}"
_QUESTION = f"Question: {PLACE}\nAnswer:"
_UNSEEN_WORDING = f"I need a short answer, only a few words. {PLACE}"
EXPECTED = f"{RAW}, {QA}, {CHAT} or a text with {PLACE} in it, several separated by commas"


def parse_formats(text: str | Sequence[str], *, trained: bool = False) -> tuple[str, ...]:
    """The formats of a text such as "raw,qa,Answer briefly: {prompt}", or of a list of them, each once.

    A comma inside a wording belongs to it. trained: `unseen` is refused, since training on it would make it seen. Raises
    InputError with what was got and expected.
    """
    found: list[str] = []
    open_text = ""
    for entry in [text] if isinstance(text, str) else text:
        for piece in entry.split(","):
            known = piece.strip() in NAMES
            if PLACE in piece or (known and not open_text):
                found.append((open_text + piece).strip() if PLACE in piece else piece.strip())
                open_text = ""
            elif found and PLACE in found[-1] and not open_text:
                found[-1] += "," + piece
            else:
                open_text += piece + ","
        if open_text:
            got = open_text.removesuffix(",").strip()
            near = did_you_mean(got, NAMES)
            raise InputError(f"got {got!r}, expected {EXPECTED}{near}")
    if trained and UNSEEN in found:
        raise InputError(f"got {UNSEEN!r}, which is kept for measuring; expected {EXPECTED}")
    return tuple(dict.fromkeys(found))


def available(tokenizer: PreTrainedTokenizerBase, formats: Sequence[str]) -> tuple[str, ...]:
    """Those of the formats that a tokenizer has: `chat` needs a template. Never empty: raw stands in for all."""
    found = tuple(name for name in formats if name != CHAT or tokenizer.chat_template)
    return found or (RAW,)


def put(tokenizer: PreTrainedTokenizerBase, prompt: str, form: str) -> tuple[str, bool]:
    """The text of a prompt in a format, and whether it brings its special tokens along."""
    if form == RAW:
        return prompt, False
    if form == QA:
        return _QUESTION.replace(PLACE, prompt), False
    if form == UNSEEN:
        prompt = _UNSEEN_WORDING.replace(PLACE, prompt)
        return put(tokenizer, prompt, CHAT if tokenizer.chat_template else RAW)
    if form == CHAT:
        turn = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)), True
    return form.replace(PLACE, prompt), False
