"""Layouts of records: which one a file has, and how the fields of its records are read, with every problem told.

A layout is an entry of data: its name, the keys that give it away, and where its fields are. A field is named by a path
into the record, such as "requested_rewrite.target_new.str"; "[]" stands for the elements of a list ("locality[].loc").
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, Strict, TypeAdapter, ValidationError

from locft.data.record_files import FileRecord, describe, shortened
from locft.errors import InputError, did_you_mean

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
_OBJECTS: FieldType[list[Any]] = FieldType("a list of objects", TypeAdapter(list[Any]), [])


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


@dataclass
class RecordFields:
    """One object of a record while it is read: returns usable values and collects what is wrong with them."""

    value: Mapping[str, Any]
    place: str
    """Of the record, for messages."""
    problems: list[str]
    known: Collection[str]
    """Keys that the layout knows."""
    strict: bool
    prefix: str = ""
    """Where the object is in the record, such as "locality[0].", empty for the record itself."""

    def __post_init__(self) -> None:
        """Any key may carry the user's own notes, but one that is nearly a known key is that key, misspelt."""
        for key in self.value if self.strict else ():
            near = get_close_matches(key.lower(), self.known, n=1, cutoff=0.85)
            if key not in self.known and near and near[0] not in self.value:
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
        return self._checked(path, kind, holder)

    def optional(self, path: str, kind: FieldType[Value]) -> Value | None:
        """The value of a field that may be absent; None too if the layout has no such field (path "")."""
        value: Any = self.value if path else None
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None or (not self.strict and isinstance(value, str) and not value.strip()):
            return None
        return self._checked(path, kind, value)

    def each(self, path: str, known: Collection[str]) -> "list[RecordFields]":
        """The objects of a list that may be absent, each to be read in turn; `known` are their keys."""
        objects = []
        items = self.optional(path, _OBJECTS)
        for index, item in enumerate(items or ()):
            at = f"{path}[{index}]"
            if isinstance(item, Mapping):
                prefix = f"{self.prefix}{at}."
                objects.append(RecordFields(item, self.place, self.problems, known, self.strict, prefix))
            else:
                self.wrong(at, "an object", item)
        return objects

    def wrong(self, path: str, expected: str, got: Any) -> None:
        self.tell(path, f"expected {expected}, got {describe(got)}")

    def tell(self, path: str, problem: str) -> None:
        told = f"{self.place}, field {self.prefix}{path}: {problem}"
        if told not in self.problems:
            self.problems.append(told)

    def _checked(self, path: str, kind: FieldType[Value], value: Any) -> Value:
        try:
            return kind.adapter.validate_python(value)
        except ValidationError as error:
            problems = error.errors(include_url=False)
            for problem in [one for one in problems if one["loc"]] or problems:  # a list's elements before its length
                inside = "".join(f"[{index}]" for index in problem["loc"])
                self.wrong(path + inside, TEXT.expected if inside else kind.expected, problem["input"])
            return kind.stand_in


def read_with_layout(
    layouts: Sequence[Layout],
    records: Sequence[FileRecord],
    source: str,
    read: Callable[[Layout, RecordFields], Value],
    earlier_problems: Sequence[str] = (),
) -> tuple[Layout, list[Value]]:
    """The layout of most records of a file, and what `read` makes of each record, in order.

    A record has the first of the layouts that recognises it. Raises InputError with every problem: those found earlier,
    and each wrong field with its place, what was expected and what was got.
    """
    problems = list(earlier_problems)
    recognised = [next((one for one in layouts if one.recognises(record.value)), None) for record in records]
    votes = Counter(one for one in recognised if one is not None)
    if records and not votes:  # one message for all records: they are of a kind
        got, known = _listed(records[0].value), "; ".join(map(str, layouts))
        problems.append(f"{source}, {records[0].place}: unknown layout, got the keys {got}; expected one of: {known}")
    if not votes:
        raise InputError(shortened(problems))
    layout = votes.most_common(1)[0][0]  # of equally frequent ones, the first in the file
    known_keys = top_level((*layout.required, *layout.optional))
    values, places = [], dict[str, str]()
    for record, own_layout in zip(records, recognised, strict=True):
        place = f"{source}, {record.place}"
        variant = own_layout if own_layout is not None and own_layout.name == layout.name else layout
        if variant is not own_layout and (stranger := _stranger(record.value, own_layout, layout)):
            problems.append(f"{place}: {stranger}")
            continue
        fields = RecordFields(record.value, place, problems, known_keys, layout.strict)
        values.append(read(variant, fields))
        identity = record.value.get("id") if layout.strict else None
        if identity is not None and (other := places.setdefault(str(identity), place)) is not place:
            fields.tell("id", f"expected an id of its own, got {describe(identity)}, the id of {other}")
    if problems:
        raise InputError(shortened(problems))
    return layout, values


def _stranger(record: Mapping[str, Any], own: RecordLayout | None, layout: RecordLayout) -> str | None:
    """Says that a record is of another layout than its file; None if it only lacks a field of the file's."""
    required = top_level(layout.required)
    lacks = [key for key in required if key not in record]
    if not lacks or (own is None and len(lacks) < len(required)):
        return None
    got = f"layout {own.name}" if own else f"the keys {_listed(record)}"
    return f"expected layout {layout.name} as elsewhere in the file, got {got} (it has no {', '.join(lacks)})"


def _is_filled(value: Any, path: str) -> bool:
    """Whether something that is not null is at the path; for a path with "[]", in at least one element of the list."""
    list_path, is_list, inside = path.partition("[].")
    for part in list_path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if is_list:
        return isinstance(value, list) and any(_is_filled(element, inside) for element in value)
    return value is not None


def _listed(keys: Iterable[str], most: int = 12) -> str:
    shown = [(key if key.isprintable() else repr(key))[:60] for key in map(str, keys)]
    return (", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")) or "(none)"
