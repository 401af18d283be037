"""Prompt formats: a prompt as it is, as a question, through the chat template, or in the user's own wording.

An edit that holds in one format may be lost in another, so training and measurement both name the formats they use.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from locft.data.answers import space_before_answer
from locft.errors import InputError, did_you_mean

if TYPE_CHECKING:  # a study file names formats, and is read before anything heavy is loaded
    from transformers import PreTrainedTokenizerBase

RAW, QA, CHAT, UNSEEN = "raw", "qa", "chat", "unseen"
NAMES = (RAW, QA, CHAT, UNSEEN)
PLACE = "{prompt}"
_QUESTION = f"Question: {PLACE}\nAnswer:"
_UNSEEN_WORDING = f"I need a short answer, only a few words. {PLACE}"
_ANSWER = "answer-1905"
"""Placeholder for an answer when a template is inspected; no template writes it itself."""
EXPECTED = f"{RAW}, {QA}, {CHAT} or a text that contains {PLACE}; separate several with commas"


def parse_formats(text: str | Sequence[str], *, trained: bool = False) -> tuple[str, ...]:
    """The formats named in a text such as "raw,qa,Answer briefly: {prompt}", or in a list of such texts, each once.

    A comma inside a wording belongs to it. trained: `unseen` is refused, since training on it would make it seen. Raises
    InputError, which says what was given and what was expected.
    """
    found = [form for entry in ([text] if isinstance(text, str) else text) for form in _formats_of(entry)]
    if trained and UNSEEN in found:
        raise InputError(f"got {UNSEEN!r}, which is reserved for measurement; expected {EXPECTED}")
    return tuple(dict.fromkeys(found))


def _formats_of(text: str) -> list[str]:
    found: list[str] = []
    open_text = ""
    for piece in text.split(","):
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
        raise InputError(f"got {got!r}, expected {EXPECTED}{did_you_mean(got, NAMES)}")
    return found


def available(tokenizer: "PreTrainedTokenizerBase", formats: Sequence[str]) -> tuple[str, ...]:
    """Those of the formats that a tokenizer supports: `chat` needs a template. Never empty: falls back to raw."""
    found = tuple(name for name in formats if name != CHAT or tokenizer.chat_template)
    return found or (RAW,)


def asked(tokenizer: "PreTrainedTokenizerBase", formats: Sequence[str]) -> tuple[str, ...]:
    """The formats in which edits are measured: the available ones, then `unseen` if it is named or they are not raw alone."""
    found = available(tokenizer, [name for name in formats if name != UNSEEN])
    return found if found == (RAW,) and UNSEEN not in formats else (*found, UNSEEN)


def label(form: str) -> str:
    """The format's part of a metric's name: its own name, or for a wording its first words and a hash of the whole."""
    if form in NAMES:
        return form
    words = "-".join(re.findall(r"\w+", form.replace(PLACE, " ").casefold()))[:24].strip("-")
    return f"{words or 'wording'}-{hashlib.sha256(form.encode()).hexdigest()[:4]}"


def is_chat(tokenizer: "PreTrainedTokenizerBase", form: str) -> bool:
    """True if prompts in this format go through the chat template."""
    return form in (CHAT, UNSEEN) and bool(tokenizer.chat_template)


def put(tokenizer: "PreTrainedTokenizerBase", prompt: str, form: str) -> tuple[str, bool]:
    """The text of a prompt in a format, and whether that text already contains its special tokens."""
    if form == UNSEEN:
        prompt = _UNSEEN_WORDING.replace(PLACE, prompt)
    if form == CHAT or is_chat(tokenizer, form):
        return _render(tokenizer, {"user": prompt}, add_generation_prompt=True), True
    if form in (RAW, UNSEEN):
        return prompt, False
    text = (_QUESTION if form == QA else form).replace(PLACE, prompt)
    return text, bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def around_answer(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    """Whitespace that the chat template puts before an answer, and the text that it puts after one.

    A template that puts thinking before the answer, or opens a turn in two ways, is assumed to need only whitespace there.
    """
    begun = _render(tokenizer, {"user": "question"}, add_generation_prompt=True)
    whole = _render(tokenizer, {"user": "question", "assistant": _ANSWER})
    before, found, behind = whole.rpartition(_ANSWER)
    space = before.removeprefix(begun)
    if not found or space.strip():
        space = space_before_answer(begun)
    return space, behind if found else ""


def _render(tokenizer: "PreTrainedTokenizerBase", turns: Mapping[str, str], **settings: bool) -> str:
    messages = [{"role": role, "content": text} for role, text in turns.items()]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **settings))
