"""Layouts of records: which one a file has, and how the fields of its records are read, with every problem reported.

A layout is declared as data: its name, the keys that identify it, and where its fields are. A field is named by a path
into the record, such as "requested_rewrite.target_new.str"; "[]" stands for the elements of a list ("locality[].loc").
Whatever is not read is counted by its path, so that a reader can report what it leaves out.
"""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Generic, NamedTuple, TypeVar

from locft.data.record_files import FileRecord, describe, shortened
from locft.errors import InputError, did_you_mean, listed

Value = TypeVar("Value")
Layout = TypeVar("Layout", bound="RecordLayout")


class FieldType(NamedTuple):
    """What a text field may hold."""

    read: Callable[[Any], str | None]
    """Returns the text of a value, or None if the value is wrong."""
    expected: str = "text"


def _filled(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


TEXT = FieldType(_filled)
VERBATIM = FieldType(lambda value: value if isinstance(value, str) else None)


@dataclass(frozen=True, kw_only=True)
class RecordLayout(ABC):
    """A published way to write records, and how to recognise it."""

    name: str
    """Layouts of the same name are variants of one layout."""
    signs: tuple[str, ...]
    """Each is one or more paths, separated by spaces: a record in which all of them are filled is of this layout. They
    are fewer than the required fields, so that the message for a record that lacks one can say which."""
    never: str = ""
    """A key that no record of this layout has."""
    only: str = ""
    """Keys, separated by spaces; a record with others is not of this layout. Empty: others are ignored."""
    strict: bool = False
    """For this project's own layouts: misspelt keys are reported, ids must be unique, and a blank text is wrong. In the
    others a blank text in an optional field means that the field is absent."""

    @property
    @abstractmethod
    def required(self) -> tuple[str, ...]:
        """Paths of the fields that a record must have."""

    @property
    @abstractmethod
    def optional(self) -> tuple[str, ...]:
        """Paths of the other fields that are read."""

    def recognises(self, record: Mapping[str, Any]) -> bool:
        if self.never and record.get(self.never) is not None:
            return False
        if self.only and not set(record) <= set(self.only.split()):
            return False
        return any(all(_is_filled(record, path) for path in sign.split()) for sign in self.signs)

    def __str__(self) -> str:
        optional = f"; optional {', '.join(top_level(self.optional))}" if self.optional else ""
        return f"{self.name} ({', '.join(top_level(self.required))}{optional})"


def first_that_recognises(record: Mapping[str, Any], layouts: Iterable[Layout]) -> Layout | None:
    return next((layout for layout in layouts if layout.recognises(record)), None)


def top_level(paths: Iterable[str]) -> tuple[str, ...]:
    """The record's own keys at which the paths begin, each once: "locality[].loc" begins at "locality"."""
    return tuple(dict.fromkeys(path.split(".")[0].removesuffix("[]") for path in paths))


class FieldProblem(NamedTuple):
    """What is wrong with a field of a record."""

    place: str
    """Where the record is, for messages."""
    path: str
    text: str


@dataclass
class RecordFields:
    """One object of a record while it is being read: returns usable values and collects the problems with the others."""

    value: Mapping[str, Any]
    place: str
    """Where the record is, for messages."""
    problems: dict[FieldProblem, None] = field(default_factory=dict)
    known: Collection[str] = ()
    """Keys that the layout knows, or patterns of them ("para_question*")."""
    strict: bool = False
    prefix: str = ""
    """Where the object is in the record, such as "locality[0].", empty for the record itself."""
    used: set[str] = field(default_factory=set)
    """Paths of the record that were read, without indices. Shared by the objects of a record."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Paths at which something was left out, and what. Also shared."""

    def __post_init__(self) -> None:
        """Any key may carry the user's own notes, but one that nearly matches a known key is taken for that key, misspelt."""
        for key in self.value if self.strict else ():
            if any(fnmatchcase(key, one) for one in self.known):
                continue
            near = get_close_matches(key.lower(), self.known, n=1, cutoff=0.85)  # slow
            if near and near[0] not in self.value:
                self.tell(_listed([key]), f"unknown key, did you mean {near[0]!r}?")

    def find(self, path: str, expected: str) -> Any:
        """The value of a required field; ... (Ellipsis) if it is absent, which is reported."""
        holder: Any = self.value
        at = ""
        for part in path.split("."):
            if not isinstance(holder, Mapping):
                self.wrong(at, "an object", holder)
                return ...
            at = f"{at}.{part}" if at else part
            if part not in holder:
                near = did_you_mean(part, [key for key in map(str, holder) if key not in self.known])
                wanted = expected if at == path else "an object"
                self.tell(at, f"expected {wanted}, got no such field (the keys are {_listed(holder)}{near})")
                return ...
            holder = holder[part]
        self.use(path)
        return holder

    def text(self, path: str, kind: FieldType = TEXT) -> str:
        """The text of a required field; "" if it is absent or wrong, which is reported."""
        value = self.find(path, kind.expected)
        return "" if value is ... else self.checked(path, value, kind)

    def texts(self, path: str, fewest: int) -> tuple[str, ...]:
        """The texts of a required list; () if it is absent or wrong, which is reported."""
        value = self.find(path, expected := f"a list of {fewest} or more texts")
        if isinstance(value, list) and len(value) >= fewest:
            found = tuple(self.checked(f"{path}[{index}]", one) for index, one in enumerate(value))
            return found if all(found) else ()
        if value is not ...:
            self.wrong(path, expected, value)
        return ()

    def optional(self, path: str, kind: FieldType = TEXT) -> str | None:
        """The text of an optional field, or None; None also if the layout has no such field (path "")."""
        value = self.look(path)
        return None if self.is_absent(value) else self.checked(path, value, kind)

    def is_absent(self, value: Any) -> bool:
        """True for null, for NaN, which pandas writes for null, and, except in our own layouts, for a blank text."""
        return value is None or value != value or (not self.strict and isinstance(value, str) and not value.strip())

    def look(self, path: str) -> Any:
        """The value at the path, None if there is none; a list if the path goes through one. It still counts as unread."""
        return value_at(self.value, path) if path else None

    def inside(self, path: str, value: Mapping[str, Any], known: Collection[str]) -> "RecordFields":
        """An object within the record, to be read in turn; `known` are the keys that it may have."""
        return replace(self, value=value, known=known, prefix=f"{self.prefix}{path}.")

    def use(self, path: str) -> None:
        """Count what is at the path as read."""
        place = _without_indices(self.prefix + path)
        self.used |= {place, place.removesuffix("[]")} if "[]." in place else {place}

    def unread(self) -> list[str]:
        """Paths of the record that hold something nobody has read, each once, and what was left out."""
        left_out = (f"{path} {what}" for path, what in self.left_out.items() if path in self.used)
        return list(dict.fromkeys((*_unread(self.value, "", self.used), *left_out)))

    def leave_out(self, path: str, what: str) -> None:
        """Record that something at the path is not used, although the rest of it, or others like it, are."""
        self.left_out[_without_indices(self.prefix + path)] = what

    def wrong(self, path: str, expected: str, got: Any) -> None:
        self.tell(path, f"expected {expected}, got {describe(got)}")

    def tell(self, path: str, problem: str) -> None:
        self.problems[FieldProblem(self.place, self.prefix + path, problem)] = None

    def checked(self, path: str, value: Any, kind: FieldType = TEXT) -> str:
        """The value as text; "" if it is wrong, which is reported."""
        self.use(path)
        if (text := kind.read(value)) is None:
            self.wrong(path, kind.expected, value)
        return text or ""


@dataclass(frozen=True)
class ReadRecords(Generic[Layout, Value]):
    """The result of reading the records of a file."""

    layout: Layout
    """The layout of most records."""
    values: list[Value]
    """One value per record, in order."""
    unread: dict[str, int]
    """Paths that no field was read from, and the number of records that have something there; 0 for a key of the file
    alongside the list of records."""


def read_with_layout(
    layouts: Sequence[Layout],
    records: Sequence[FileRecord],
    source: str,
    read: Callable[[Layout, RecordFields], Value],
    advice: Callable[[FileRecord], str],
) -> ReadRecords[Layout, Value]:
    """What `read` makes of each record, with the layout that most records have (the variant that recognises it, if any).

    advice: what to do about records like this one if their required fields are not found. Raises InputError with every
    problem: those of whole records, and each wrong field with its place, what was expected and what was got; a problem that
    all records share is reported once.
    """
    problems = [record.problem for record in records if record.problem]
    records = [record for record in records if not record.problem]
    recognised = [first_that_recognises(record.value, layouts) for record in records]
    votes = Counter(one for one in recognised if one is not None)
    if not votes:
        if records:  # one message for all of them: they are alike
            where = records[0].place if len(records) == 1 else f"all {len(records):,} records"
            got, known = _listed(records[0].value), "; ".join(dict.fromkeys(map(str, layouts)))
            told = f"{source}, {where}: unknown layout, got the keys {got}; expected one of: {known}"
            problems.append(told + advice(records[0]))
        raise InputError(shortened(problems))
    layout = votes.most_common(1)[0][0]  # in a tie, the first in the file
    known_keys = top_level((*layout.required, *layout.optional))
    found: dict[FieldProblem, None] = {}
    values, places, unread = [], dict[str, str](), Counter(dict.fromkeys(records[0].beside, 0))
    for record, own_layout in zip(records, recognised, strict=True):
        place = f"{source}, {record.place}"
        variant = own_layout if own_layout is not None and own_layout.name == layout.name else layout
        if variant is not own_layout and (stranger := _stranger(record.value, own_layout, layout)):
            problems.append(f"{place}: {stranger}")
            continue
        fields = RecordFields(record.value, place, found, known_keys, layout.strict)
        values.append(read(variant, fields))
        unread.update(fields.unread())
        identity = record.value.get("id") if layout.strict else None
        if identity is not None and (other := places.setdefault(str(identity), place)) is not place:
            fields.tell("id", f"expected a unique id, got {describe(identity)}, which {other} already has")
    problems += _told(found, records, source, advice)
    if problems:
        raise InputError(shortened(problems))
    return ReadRecords(layout, values, dict(unread))


def told_unread(unread: Mapping[str, int], records: int) -> str:
    """What was not read (as in `ReadRecords.unread`) as the end of a sentence."""
    by_count: dict[int, list[str]] = {}
    for path, count in unread.items():
        by_count.setdefault(count, []).append(path)
    return "; ".join(
        f"{', '.join(paths)} ({f'{count:,} of {records:,} records' if count else 'beside the records'})"
        for count, paths in sorted(by_count.items(), reverse=True)
    )


def _told(
    problems: Iterable[FieldProblem], records: Sequence[FileRecord], source: str, advice: Callable[[FileRecord], str]
) -> Iterator[str]:
    """The problems as messages: what is wrong in the same way in every one of several records is reported once."""
    alike: dict[tuple[str, str], list[FieldProblem]] = {}
    for problem in problems:
        kind = _without_indices(problem.path), problem.text.partition(", got ")[0]
        alike.setdefault(kind, []).append(problem)
    for (path, _), group in alike.items():
        text = group[0].text
        if len({problem.place for problem in group}) == len(records) > 1:
            hint = advice(records[0]) if "no such field" in text else ""
            yield f"{source}, all {len(records):,} records, field {path}: {text}{hint}"
        else:
            yield from (f"{problem.place}, field {problem.path}: {problem.text}" for problem in group)


def _stranger(record: Mapping[str, Any], own: RecordLayout | None, layout: RecordLayout) -> str | None:
    """The message that a record has a different layout from its file; None if it only lacks some of the file's fields."""
    required = top_level(layout.required)
    lacks = [key for key in required if key not in record]
    if not lacks or (own is None and len(lacks) < len(required)):
        return None
    got = f"layout {own.name}" if own else f"the keys {_listed(record)}"
    return f"expected layout {layout.name} as elsewhere in the file, got {got} (it has no {', '.join(lacks)})"


def value_at(value: Any, path: str) -> Any:
    """The value at a path, None if there is none. For a path with "[]" a list, with None for the elements that lack it."""
    list_path, is_list, inside = path.partition("[].")
    for part in list_path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if is_list:
        return [value_at(element, inside) for element in value] if isinstance(value, list) else None
    return value


def _is_filled(value: Any, path: str) -> bool:
    """Whether the path holds something other than null; for a path with "[]", in at least one element of the list."""
    found = value_at(value, path)
    return any(element is not None for element in found) if found is not None and "[]." in path else found is not None


def _without_indices(path: str) -> str:
    return re.sub(r"\[\d+\]", "[]", path)


def _unread(value: Any, at: str, used: Collection[str]) -> Iterator[str]:
    """The paths in a value at `at` of which no part was read, except those that hold nothing."""
    if at in used or value is None or value != value or value in ("", [], {}):
        return
    partly = not at or any(path.startswith((f"{at}.", f"{at}[]")) for path in used)
    if partly and isinstance(value, Mapping):
        for key, inside in value.items():
            yield from _unread(inside, f"{at}.{key}" if at else str(key), used)
    elif partly and isinstance(value, list):
        for inside in value:
            yield from _unread(inside, f"{at}[]", used)
    else:
        yield at


def _listed(keys: Iterable[str]) -> str:
    return listed([(key if key.isprintable() else repr(key))[:60] for key in map(str, keys)], 12) or "(none)"
