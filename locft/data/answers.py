"""When two answers are the same, and where an answer begins and ends.

None of this is limited to ASCII marks, and the value of a number is left alone: the point in "1.2 million" is neither
punctuation nor the end of a sentence.
"""

import re
import string
import unicodedata
from functools import cache

ARTICLES = frozenset({"a", "an", "the"})
_ARTICLES = re.compile(rf"\b({'|'.join(sorted(ARTICLES))})\b(?![+#])")


@cache
def _is_mark(char: str) -> bool:
    return char in string.punctuation or unicodedata.category(char).startswith("P")


def _one_space(between: str) -> str:
    """The characters between two digits, with one space in place of the marks among them; a leading percent sign stays."""
    rest = "".join(char for char in between if not _is_mark(char))
    return between if rest == between else f"{'%' * between.startswith('%')} {rest}"


_INVISIBLE = "\u00ad\u200b\u200e\u200f\u2060\ufeff"
"""Soft hyphens, direction marks and the like."""
_ONE_FORM = {
    **dict.fromkeys(map(ord, _INVISIBLE), ""),
    **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full-width forms of ASCII
    **dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63"), "-"),
    **{0x066A: "%", 0x066B: ".", 0x066C: ","},  # Arabic percent sign and separators
}
_ALONE = r"(?<!\d)(?<!\d[.,'’])"  # no digits of the same number before
_NUMBERS = (
    (r"\d", lambda digit: str(unicodedata.decimal(digit[0]))),
    # 1.234,5 is 1234.5
    (_ALONE + r"(\d{1,3}(?:\.\d{3})+),(\d+)(?![.,'’]?\d)", lambda n: n[1].replace(".", "") + "." + n[2]),
    # 550,000 and 550'000 are 550000, as is 5,50,000 in India; 550.000 may be a decimal
    (
        _ALONE + r"[1-9]\d{0,2}(?:(?:,\d{3})+|(?:['’]\d{3})+|(?:,\d\d)+,\d{3})(?![,'’]?\d)",
        lambda number: re.sub(r"\D", "", number[0]),
    ),
    # 3,14 is 3.14
    (_ALONE + r"(\d+),(\d+)(?![.,'’]?\d)", r"\1.\2"),
    # .5 is 0.5
    (r"(?<![\w.])(-?[$€£¥]?)\.(?=\d)", r" \g<1>0."),
    # a minus sign is set apart from what precedes it, a percent sign is not
    (r"(?<!\w)-(?=[$€£¥]?\d)", " -"),
    (r"(?<=\d)\s%", "%"),
    # no two numbers become one
    (r"(?<=\d)(?:[^\w\s]|_){2,}(?=\d)", lambda marks: _one_space(marks[0])),
)
"""Patterns and replacements that give numbers one form, applied in this order."""
_KEPT = re.compile(r"(?<=\d)(?:[^\w\s]|_)(?=\d)|(?<!\S)-(?=[$€£¥]?\d)|(?<=\d)%|(?<=[^\W\d_])[+#]+")
"""The marks that are kept: one between two digits, a sign, a percent sign, and what tells C++ and C# from C."""
_GROUPS = re.compile(r"(?<!\S)(-?[$€£¥]?[1-9]\d{0,2}(?: \d{3})+)(?=(?:\.\d+)?%?(?!\S))")
"""Digits in groups of three separated by spaces: one number, as most of Europe writes it."""

_SENTENCE_END = re.compile(r"[。｡！？؟۔।॥։።။។៕།]|(?<!\d)[.．]|[.．](?!\d)")
"""A full stop, but not between two digits; in scripts with marks of their own, the marks that end a sentence."""
_PERHAPS_A_POINT = re.compile(r"\d[.．]\Z")

_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u19e0-\u19ff\u2e80-\u312f\u31a0-\u4dbf\u4e00-\u9fff\ua9e0-\ua9ff"
    "\uaa60-\uaa7f\uf900-\ufaff\uff01-\uff9f\U00020000-\U0003ffff]"
)
"""Scripts without spaces between words: Thai, Lao, Myanmar, Khmer, Han and kana, with East Asian punctuation."""


def normalise_answer(text: str) -> str:
    """The form in which two answers are compared, as in SQuAD: lower case, no punctuation, no articles, single spaces.

    Punctuation is what Unicode classifies as such, plus ASCII's symbols. Numbers keep their value: sign, decimal point and
    percent sign stay, thousands separators go ("550,000" and "550 000" are "550000"), and no two other numbers become one.
    The marks after the letter in C++ and C# stay. Unicode is composed first (one é), full-width forms and decimal digits of
    other scripts become ASCII, and ё becomes е, as in ordinary Russian spelling.

    A step that would leave nothing is skipped, so "A" (the letter), "The The" or "!" stay distinct answers instead of
    equalling an empty one. Applying it twice changes nothing.
    """
    whole = _composed(text.translate(_ONE_FORM).lower())
    for pattern, replacement in _NUMBERS:
        whole = re.sub(pattern, replacement, whole)  # type: ignore[call-overload]
    kept = {at for match in _KEPT.finditer(whole) for at in range(*match.span())}
    bare = _composed("".join(char for at, char in enumerate(whole) if at in kept or not _is_mark(char)))
    for candidate in (_ARTICLES.sub(" ", bare), bare):
        if words := candidate.split():
            return _GROUPS.sub(lambda groups: groups[0].replace(" ", ""), " ".join(words))
    return " ".join(whole.split())


def sentence_ends(text: str) -> list[int]:
    """Indices at which sentences end: those of full stops and of their equivalents in other scripts."""
    return [match.start() for match in _SENTENCE_END.finditer(text)]


def may_go_on(text: str) -> bool:
    """True if the full stop at the end of an unfinished text may turn out to be a decimal point."""
    return _PERHAPS_A_POINT.search(text) is not None


def space_before_answer(text: str, answer: str = "") -> str:
    """The separator between a text and its answer: one space, or nothing if the text ends in whitespace.

    It is also nothing if both are in scripts that put no spaces between words. Punctuation and digits are passed over to
    find the script; an answer that consists of them alone counts as in the script of the text.
    """
    if text[-1:].isspace():
        return ""
    before = next((char for char in reversed(text) if _has_script(char)), "")
    behind = next((char for char in answer if _has_script(char)), before if answer else "")
    return "" if _UNSPACED.match(before) and _UNSPACED.match(behind) else " "


def _has_script(char: str) -> bool:
    return unicodedata.category(char)[0] in "LM" or _UNSPACED.match(char) is not None


def _composed(text: str) -> str:
    """The text with accents composed with their letters, and ё without its dots."""
    apart = unicodedata.normalize("NFD", text)
    return unicodedata.normalize("NFC", re.sub("е[\u0300-\u036f]+", lambda yo: yo[0].replace("\u0308", ""), apart))
