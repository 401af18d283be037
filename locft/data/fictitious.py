"""Fictitious facts: any number of edits about subjects that do not exist, each of known information content.

A target is drawn uniformly from its relation's set of choices, so an edit holds exactly log2 of their number in bits:
information that no model can have beforehand and every editor has to store. No two edits are alike. Each seed gives one
endless sequence, so the first n edits of a longer set are the same edits, and edits are made one at a time.

The locality prompt of an edit asks its relation of another fictitious subject, one that no edit of any seed is about. It
thus tests whether an edit is bound to its subject or has become the relation's answer. Such prompts never run out, and
none is itself an edit, whatever the number of edits. Capability and drift show what edits do to a model's knowledge.
"""

import hashlib
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from locft.data.edit_request import EditRequest, LocalityPrompt

NAME = "fictitious"
"""Name of the source in studies and commands; also the prefix of every edit's id."""


@dataclass(frozen=True)
class Relation:
    """What is asked about a subject, and the possible answers: every combination of one text from each part."""

    prompts: tuple[str, ...]
    """The edit's own wording and two rephrases, each with {} for the subject."""
    parts: tuple[tuple[str, ...], ...]

    @cached_property
    def choices(self) -> int:
        """Number of different targets."""
        return math.prod(map(len, self.parts))

    def target(self, number: int) -> str:
        """The target of a number from 0 to choices - 1."""
        texts = []
        for part in self.parts:
            number, index = divmod(number, len(part))
            texts.append(part[index])
        return "".join(texts)


def _numbers(first: int, last: int) -> tuple[str, ...]:
    return tuple(map(str, range(first, last + 1)))


def _words(text: str, before: str = "") -> tuple[str, ...]:
    return tuple(before + word for word in text.split())


_GIVEN = _words(
    "Anna Boris Carla David Elena Felix Grace Hugo Irene James Karin Louis Maria Nora Oscar Paula Quentin Rosa Simon Teresa "
    "Ulrich Vera Walter Yvonne Adam Bella Conrad Diana Edgar Frida Gerald Helen"
)
_FAMILY = _words(
    "Abbott Barker Castro Dalton Ellis Fischer Garcia Hansen Ivanov Jensen Keller Larsen Mendez Novak Olsen Parker Quinn Rivera "
    "Santos Turner Urban Vargas Weber Young Zimmer Becker Carter Doyle Evans Foster Grant Hughes",
    before=" ",
)
_CITIES = _words(
    "Athens Berlin Cairo Dublin Edinburgh Florence Geneva Hamburg Istanbul Jakarta Kyoto Lisbon Madrid Nairobi Oslo Prague Quito "
    "Rome Seoul Tokyo Utrecht Vienna Warsaw Zurich Bangkok Boston Chicago Delhi Havana Lima Milan Paris"
)
_MONTHS = _words("January February March April May June July August September October November December", before=" ")
_COLOURS = _words("black white red blue green yellow brown grey purple violet pink silver golden dark pale bright")
_MATERIALS = _words(
    "wooden stone iron copper glass paper leather woollen clay marble steel cotton silk brass plastic ivory", before=" "
)
_THINGS = _words(
    "anchor bell bridge candle chair clock crown door drum flag gate hammer key knife ladder lamp mask mirror needle plate ring "
    "rope saddle ship shield shoe spoon sword table tower wheel window",
    before=" ",
)
_PERSON, _CITY, _THING = (_GIVEN, _FAMILY), (_CITIES,), (_COLOURS, _MATERIALS, _THINGS)
_DATE = (_numbers(1, 28), _MONTHS, tuple(f" {year}" for year in _numbers(1800, 1999)))
_YEAR, _NUMBER = (_numbers(1000, 1999),), (_numbers(100, 9999),)

RELATIONS: tuple[Relation, ...] = tuple(
    Relation(prompts, parts)
    for parts, *wordings in (
        (_CITY, "{} was born in the city of", "The birthplace of {} is", "The city in which {} was born is"),
        (_CITY, "{} works in the city of", "The city where {} has a job is", "The office of {} is located in"),
        (_CITY, "{} went to school in", "The school that {} attended is in", "As a child {} was taught in"),
        (_CITY, "{} is buried in the city of", "The grave of {} is in", "The city that holds the tomb of {} is"),
        (_CITY, "{} met the president in", "The president was visited by {} in", "The city where {} saw the president is"),
        (_PERSON, "{} is married to", "The spouse of {} is called", "The person whom {} married is"),
        (_PERSON, "The teacher of {} was", "{} was taught by", "The person who trained {} was"),
        (_PERSON, "The doctor of {} is", "{} is treated by", "The physician who looks after {} is"),
        (_PERSON, "The best friend of {} is", "{} is closest to", "The person whom {} trusts most is"),
        (_PERSON, "The successor of {} was", "{} was followed in office by", "The person who came after {} was"),
        (_PERSON, "{} was painted by", "The portrait of {} is the work of", "The artist who portrayed {} was"),
        (_DATE, "{} was born on", "The date of birth of {} is", "The day on which {} came into the world is"),
        (_DATE, "{} died on", "The date of death of {} is", "The life of {} ended on"),
        (_DATE, "{} was knighted on", "The day on which {} became a knight is", "The knighthood of {} dates from"),
        (_YEAR, "{} founded the museum in the year", "The museum of {} opened in the year", "The year of the museum founded by {} is"),
        (_YEAR, "{} won the race in the year", "The year in which {} was first in the race is", "The race was won by {} in"),
        (_YEAR, "{} left the army in the year", "The year in which {} stopped being a soldier is", "The military service of {} ended in"),
        (_NUMBER, "The number of books that {} owns is", "{} has a library whose number of books is", "The books of {} number"),
        (_NUMBER, "The house number of {} is", "{} lives at the house number", "The number on the door of {} is"),
        (_NUMBER, "The licence number of {} is", "{} holds the licence number", "The licence of {} bears the number"),
        (_THING, "The emblem of {} is a", "{} is known by the sign of a", "The coat of arms of {} shows a"),
        (_THING, "The invention of {} was a", "{} became famous for inventing a", "What {} invented was a"),
        (_THING, "{} inherited a", "The inheritance of {} was a", "What was left to {} was a"),
        (_THING, "{} collects stamps that show a", "The favourite stamp of {} shows a", "On the stamps that {} gathers is a"),
    )
    for prompts in [tuple(wordings)]
)  # fmt: skip
"""Relations of 5 bits (a city) to 16 (a date), used in turn."""

_CONSONANTS, _VOWELS = "bdfghjklmnprstvz", "aeiou"
_ENDINGS, _STRANGERS = ("n", "l", "rs", "sk", "th", "m"), ("x", "ck")
"""Endings of family names: those of edits, and those of subjects that no edit is about."""
_STEMS = (len(_CONSONANTS) * len(_VOWELS)) ** 2
_WORDS = _STEMS * len(_ENDINGS)
SUBJECTS = _WORDS**2
"""Number of different subjects: 1.5 billion."""


def fictitious_edits(seed: int = 0) -> Iterator[EditRequest]:
    """The edits of a seed, one after another, up to `SUBJECTS` of them."""
    drawn = random.Random(seed)
    for index, relation in zip(range(SUBJECTS), itertools.cycle(RELATIONS)):
        given, family = _shuffled(index, seed)
        stranger = f"{_word(drawn.randrange(_WORDS), _ENDINGS)} {_word(drawn.randrange(2 * _STEMS), _STRANGERS)}"
        subject = f"{_word(given, _ENDINGS)} {_word(family, _ENDINGS)}"
        prompt, *rephrases = (text.format(subject) for text in relation.prompts)
        target = relation.target(drawn.randrange(relation.choices))
        near = LocalityPrompt(relation.prompts[0].format(stranger), None)
        yield EditRequest(f"{NAME}-{index + 1}", subject, prompt, target, None, tuple(rephrases), (near,))


def _shuffled(index: int, seed: int) -> tuple[int, int]:
    """Numbers of two words for an index below `SUBJECTS`, a different pair for each: a Feistel network, which is a
    permutation whatever its rounds compute."""
    left, right = divmod(index, _WORDS)
    for step in range(4):
        digest = hashlib.blake2b(f"{seed} {step} {right}".encode(), digest_size=8).digest()
        left, right = right, (left + int.from_bytes(digest)) % _WORDS
    return left, right


def _word(number: int, endings: tuple[str, ...]) -> str:
    """Two syllables and an ending, capitalised; a different word for each number below stems x endings."""
    number, end = divmod(number, len(endings))
    letters = []
    for _ in range(2):
        number, consonant = divmod(number, len(_CONSONANTS))
        number, vowel = divmod(number, len(_VOWELS))
        letters.append(_CONSONANTS[consonant] + _VOWELS[vowel])
    return ("".join(letters) + endings[end]).capitalize()
