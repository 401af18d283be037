"""When two answers are the same."""

import re
import string
import unicodedata

_PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = frozenset({"a", "an", "the"})
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise_answer(text: str) -> str:
    """The form in which two answers are compared, as in SQuAD: lower case, no punctuation, no articles, single spaces.

    A step that would leave nothing is not taken, so "A" (the letter), "The The" or "!" stay distinct answers instead of
    equalling an empty one. Unicode is composed first (one é). Applying it twice changes nothing.
    """
    lower = unicodedata.normalize("NFC", text.lower())
    bare = unicodedata.normalize("NFC", lower.translate(_PUNCTUATION))
    for candidate in (_ARTICLES.sub(" ", bare), bare):
        if words := candidate.split():
            return " ".join(words)
    return " ".join(lower.split())
