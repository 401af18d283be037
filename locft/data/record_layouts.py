"""Layouts of records: which one a file has, and how the fields of its records are read, with every problem told.

A layout is an entry of data: its name, the keys that give it away, and where its fields are. A field is named by a path
into the record, such as "requested_rewrite.target_new.str"; "[]" stands for the elements of a list ("locality[].loc").
What nobody reads is counted by its path, so that a reader can say what it leaves out.
"""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, Strict, TypeAdapter, ValidationError

from locft.data.record_files import FileRecord, describe, shortened
from locft.errors import InputError, did_you_mean, listed

Value = TypeVar("Value")
Layout = TypeVar("Layout", bound="RecordLayout")


@dataclass(frozen=True)
class FieldType(Generic[Value]):
    """What a field holds."""

    expected: str
    """For messages, such as "a list of texts"."""
    adapter: TypeAdapter[Any]
    stand_in: Value
    """Takes the place of a wrong value, so that reading goes on and tells the record's other problems."""


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("blank")
    return text


Text = Annotated[str, Strict(), AfterValidator(_not_blank)]
TEXT = FieldType("text", TypeAdapter(Text), "")


@dataclass(frozen=True, kw_only=True)
class RecordLayout(ABC):
    """A published way to write records, and how to recognise it."""

    name: str
    """Layouts of the same name are variants of one."""
    signs: tuple[str, ...]
    """Each is one or more paths, separated by spaces: a record in which all of them are filled is of this layout. They
    are fewer than the required fields, so that a record that lacks one is told which."""
    never: str = ""
    """A key that no record of this layout has."""
    only: str = ""
    """Keys, separated by spaces; a record with others is not of this layout. Empty: others are ignored."""
    strict: bool = False
    """For this project's own layouts: misspelt keys are told, ids must differ, and a blank text is wrong. In the others
    a blank text in an optional field means that the field is absent."""

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


def top_level(paths: Iterable[str]) -> tuple[str, ...]:
    """The record's own keys at which the paths begin, each once: "locality[].loc" begins at "locality"."""
    return tuple(dict.fromkeys(path.split(".")[0].removesuffix("[]") for path in paths))


@dataclass(frozen=True)
class FieldProblem:
    """What is wrong with a field of a record."""

    place: str
    """Of the record, for messages."""
    path: str
    text: str

    @property
    def kind(self) -> tuple[str, str]:
        """Alike for the same mistake in other records."""
        return _without_indices(self.path), self.text.partition(", got ")[0]

    def __str__(self) -> str:
        return f"{self.place}, field {self.path}: {self.text}"


Problems = list[str | FieldProblem]


@dataclass
class RecordFields:
    """One object of a record while it is read: returns usable values and collects what is wrong with them."""

    value: Mapping[str, Any]
    place: str
    """Of the record, for messages."""
    problems: Problems
    known: Collection[str]
    """Keys that the layout knows, or patterns of them ("para_question*")."""
    strict: bool
    prefix: str = ""
    """Where the object is in the record, such as "locality[0].", empty for the record itself."""
    used: set[str] = field(default_factory=set)
    """Paths of the record that were read, without indices. Shared by the objects of a record."""
    lacking: dict[str, str] = field(default_factory=dict)
    """Paths at which something was left out, and what it lacks. Shared, too."""

    def __post_init__(self) -> None:
        """Any key may carry the user's own notes, but one that is nearly a known key is that key, misspelt."""
        for key in self.value if self.strict else ():
            near = get_close_matches(key.lower(), self.known, n=1, cutoff=0.85)
            known = any(fnmatchcase(key, one) for one in self.known)
            if not known and near and near[0] not in self.value:
                self.tell(_listed([key]), f"unknown key, did you mean {near[0]!r}?")

    def get(self, path: str, kind: FieldType[Value]) -> Value:
        """The value of a field that must be there."""
        holder: Any = self.value
        at = ""
        for part in path.split("."):
            if not isinstance(holder, Mapping):
                self.wrong(at, "an object", holder)
                return kind.stand_in
            at = f"{at}.{part}" if at else part
            if part not in holder:
                expected = kind.expected if at == path else "an object"
                near = did_you_mean(part, [key for key in map(str, holder) if key not in self.known])
                self.tell(at, f"expected {expected}, got no such field (the keys are {_listed(holder)}{near})")
                return kind.stand_in
            holder = holder[part]
        return self.checked(path, kind, holder)

    def optional(self, path: str, kind: FieldType[Value]) -> Value | None:
        """The value of a field that may be absent; None too if the layout has no such field (path "")."""
        value = self.look(path)
        if value is None or (not self.strict and isinstance(value, str) and not value.strip()):
            return None
        return self.checked(path, kind, value)

    def look(self, path: str) -> Any:
        """What is at the path, None if nothing is; a list if the path goes through one. It still counts as unread."""
        return value_at(self.value, path) if path else None

    def inside(self, path: str, value: Mapping[str, Any], known: Collection[str]) -> "RecordFields":
        """An object of the record, to be read in turn; `known` are its keys."""
        prefix = f"{self.prefix}{path}." if path else self.prefix
        return RecordFields(value, self.place, self.problems, known, self.strict, prefix, self.used, self.lacking)

    def use(self, path: str) -> None:
        """Count what is at the path as read."""
        place = _without_indices(self.prefix + path)
        self.used |= {place, place.removesuffix("[]")} if "[]." in place else {place}

    def unread(self) -> list[str]:
        """Paths of the record at which something is that nobody has read, each once, and what was left out."""
        lacking = (f"{path} without {what}" for path, what in self.lacking.items() if path in self.used)
        return list(dict.fromkeys((*_unread(self.value, "", self.used), *lacking)))

    def leave_out(self, path: str, lacking: str) -> None:
        """Say that something at the path is not used, because it lacks something, while others like it may be."""
        self.lacking[_without_indices(self.prefix + path)] = lacking

    def wrong(self, path: str, expected: str, got: Any) -> None:
        self.tell(path, f"expected {expected}, got {describe(got)}")

    def tell(self, path: str, problem: str) -> None:
        told = FieldProblem(self.place, self.prefix + path, problem)
        if told not in self.problems:
            self.problems.append(told)

    def checked(self, path: str, kind: FieldType[Value], value: Any) -> Value:
        """The value as the field's type has it; where it is wrong, that is told and a stand-in returned."""
        self.use(path)
        try:
            return kind.adapter.validate_python(value)
        except ValidationError as error:
            problems = error.errors(include_url=False)
            for problem in [one for one in problems if one["loc"]] or problems:  # a list's elements before its length
                inside = "".join(f"[{index}]" for index in problem["loc"])
                self.wrong(path + inside, TEXT.expected if inside else kind.expected, problem["input"])
            return kind.stand_in


@dataclass(frozen=True)
class ReadRecords(Generic[Layout, Value]):
    """What was made of the records of a file."""

    layout: Layout
    """Of most records."""
    values: list[Value]
    """One a record, in order."""
    unread: dict[str, int]
    """Paths that no field was read from, and the number of records that have something there."""


def read_with_layout(
    layouts: Sequence[Layout],
    records: Sequence[FileRecord],
    source: str,
    read: Callable[[Layout, RecordFields], Value],
    earlier_problems: Sequence[str] = (),
    advice: Callable[[FileRecord], str] = lambda record: "",
) -> ReadRecords[Layout, Value]:
    """What `read` makes of each record, each with the first of the layouts that recognises it.

    advice: what to do about records like this one if their required fields are not found. Raises InputError with every
    problem: those found earlier, and each wrong field with its place, what was expected and what was got; a problem that
    all records share is one.
    """
    problems: Problems = list(earlier_problems)
    recognised = [next((one for one in layouts if one.recognises(record.value)), None) for record in records]
    votes = Counter(one for one in recognised if one is not None)
    if records and not votes:  # one message for all records: they are of a kind
        where = records[0].place if len(records) == 1 else f"all {len(records):,} records"
        got, known = _listed(records[0].value), "; ".join(dict.fromkeys(map(str, layouts)))
        told = f"{source}, {where}: unknown layout, got the keys {got}; expected one of: {known}"
        problems.append(told + advice(records[0]))
    if not votes:
        raise InputError(shortened([str(problem) for problem in problems]))
    layout = votes.most_common(1)[0][0]  # of equally frequent ones, the first in the file
    known_keys = top_level((*layout.required, *layout.optional))
    values, places, unread = [], dict[str, str](), Counter[str]()
    for record, own_layout in zip(records, recognised, strict=True):
        place = f"{source}, {record.place}"
        variant = own_layout if own_layout is not None and own_layout.name == layout.name else layout
        if variant is not own_layout and (stranger := _stranger(record.value, own_layout, layout)):
            problems.append(f"{place}: {stranger}")
            continue
        fields = RecordFields(record.value, place, problems, known_keys, layout.strict)
        values.append(read(variant, fields))
        unread.update(fields.unread())
        identity = record.value.get("id") if layout.strict else None
        if identity is not None and (other := places.setdefault(str(identity), place)) is not place:
            fields.tell("id", f"expected an id of its own, got {describe(identity)}, the id of {other}")
    if problems:
        raise InputError(shortened(_in_common(problems, records, source, advice)))
    return ReadRecords(layout, values, dict(unread))


def _in_common(
    problems: Problems, records: Sequence[FileRecord], source: str, advice: Callable[[FileRecord], str]
) -> list[str]:
    """The problems as they are told: what is wrong in the same way in every one of several records is one."""
    of_fields = [problem for problem in problems if isinstance(problem, FieldProblem)]
    counts = Counter(kind for kind, _ in {(problem.kind, problem.place) for problem in of_fields})
    shared = {kind for kind, count in counts.items() if count == len(records) > 1}
    told: dict[Any, str] = {}
    for problem in problems:
        if isinstance(problem, str) or problem.kind not in shared:
            told.setdefault(problem, str(problem))
        elif problem.kind not in told:
            hint = advice(records[0]) if "no such field" in problem.text else ""
            path = _without_indices(problem.path)
            told[problem.kind] = f"{source}, all {len(records):,} records, field {path}: {problem.text}{hint}"
    return list(told.values())


def _stranger(record: Mapping[str, Any], own: RecordLayout | None, layout: RecordLayout) -> str | None:
    """Says that a record is of another layout than its file; None if it only lacks a field of the file's."""
    required = top_level(layout.required)
    lacks = [key for key in required if key not in record]
    if not lacks or (own is None and len(lacks) < len(required)):
        return None
    got = f"layout {own.name}" if own else f"the keys {_listed(record)}"
    return f"expected layout {layout.name} as elsewhere in the file, got {got} (it has no {', '.join(lacks)})"


def value_at(value: Any, path: str) -> Any:
    """What is at a path, None if nothing is. For a path with "[]" a list, with None for the elements that lack it."""
    list_path, is_list, inside = path.partition("[].")
    for part in list_path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if is_list:
        return [value_at(element, inside) for element in value] if isinstance(value, list) else None
    return value


def _is_filled(value: Any, path: str) -> bool:
    """Whether something that is not null is at the path; for a path with "[]", in at least one element of the list."""
    found = value_at(value, path)
    return any(element is not None for element in found) if found is not None and "[]." in path else found is not None


def _without_indices(path: str) -> str:
    return re.sub(r"\[\d+\]", "[]", path)


def _unread(value: Any, at: str, used: Collection[str]) -> Iterator[str]:
    """The paths in a value at `at` of which no part was read, those that hold nothing left out."""
    if at in used or value is None or value in ("", [], {}):
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
