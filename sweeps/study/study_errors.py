"""What is wrong with a study, in the user's words: pydantic's findings with file, line, field, got and expected."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError

from sweeps.study.schema import Capability, Edits, EveryLayer, Limits, LogUniform, Resources, Search, Space, Study
from sweeps.study.yaml_lines import Place

_SECTIONS: dict[Place, type[BaseModel]] = {
    (): Study,
    ("edits",): Edits,
    ("capability",): Capability,
    ("space",): Space,
    ("search",): Search,
    ("resources",): Resources,
    ("budget",): Limits,
    ("space", "layer"): EveryLayer,
    ("space", "learning_rate"): LogUniform,
}
_EXPECTED = {
    "space.layer": "all, a layer, a list of layers such as [3, 7], or {every: k}",
    "space.learning_rate": "a number, a list of numbers, or {log_uniform: [low, high]}",
    "space.learning_rate.log_uniform": "two numbers, [low, high]",
}
_PLAIN_EXPECTATIONS = {
    "int_type": "a whole number",
    "string_type": "text",
    "string_too_short": "text",
    "tuple_type": "a value or a list of values",
    "too_short": "at least one value",
    "dict_type": "a mapping",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "of at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "of at most"),
}

OVERRIDES = 10**9
"""Sorts overrides after every line of the file."""


@dataclass
class Draft:
    """A study while it is being read; lives within one `load_study`."""

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[Place, tuple[int, str]] = field(default_factory=dict)
    """For each value: the line to sort by (`OVERRIDES` for overrides), and where it was written, for the user."""
    problems: list[tuple[int, str]] = field(default_factory=list)

    def add(self, place: Place, message: str) -> None:
        """Note a problem at the value, or at the nearest thing around it that was written down."""
        known = next((place[:n] for n in range(len(place), -1, -1) if place[:n] in self.origins), None)
        line, label = self.origins[known] if known is not None else (1, "study")
        where = _dotted(place)
        said = not where or label.endswith(f" {where}")  # "--set space.layer" names the field already
        self.problems.append((line, f"{label}: {message}" if said else f"{label}: {where}: {message}"))


def nearest(got: str, valid: Iterable[str]) -> str:
    """The end of a message about a wrong word: the nearest valid one, if any is near, and all of them."""
    words = list(valid)
    return f"{did_you_mean(got, words)} (valid: {', '.join(words)})"


def did_you_mean(got: str, valid: Iterable[str]) -> str:
    """The end of a message about a wrong word: the nearest valid one; empty when none is near."""
    close = difflib.get_close_matches(got.lower(), list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def validated(draft: Draft) -> Study | None:
    """The study, or None; adds its problems to the draft.

    Contradictions show only once every field is valid, so the fields at fault are left out and what remains is checked
    again; a contradiction that one of them has a part in is not told: it may go away with the correction.
    """
    try:
        return Study.model_validate(draft.tree)
    except ValidationError as error:
        faults = error.errors(include_url=False)
    places = [_place(fault["loc"]) for fault in faults if fault["type"] != "contradictions"]
    for fault in faults:
        _tell(draft, fault, faults)
    if places:
        try:
            Study.model_validate(_without(draft.tree, places))
        except ValidationError as error:
            for fault in error.errors(include_url=False):
                if fault["type"] == "contradictions":
                    _tell_contradictions(draft, fault, {_dotted(place) for place in places})
    return None


def _tell(draft: Draft, fault: Mapping[str, Any], faults: Sequence[Mapping[str, Any]]) -> None:
    """Add one of pydantic's findings to the draft, in our words."""
    place, kind, context, got = _place(fault["loc"]), fault["type"], fault.get("ctx", {}), fault["input"]
    if kind == "contradictions":
        _tell_contradictions(draft, fault, set())
    elif kind == "extra_forbidden":
        draft.add(place, f"unknown key{_nearest_key(place)}")
    elif kind == "missing":
        misspelt = [other for other in map(_unknown_key, faults) if other and other[:-1] == place[:-1]]
        if not any(difflib.get_close_matches(str(other[-1]), [str(place[-1])]) for other in misspelt):
            draft.add(place, "required, and missing")
    elif kind == "expected":
        if "item" in context:
            got, place = got[context["item"]] if isinstance(got, (list, tuple)) else got, (*place, context["item"])
            draft.add(place, f"got {show(got)} twice, expected {context['expected']}")
        else:
            draft.add(place, f"got {show(got)}, expected {context['expected']}")
    elif kind == "literal_error" and _dotted(place) not in _EXPECTED:
        words = [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
        expected = " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
        draft.add(place, f"got {show(got)}, expected {expected}{did_you_mean(str(got), words)}")
    else:
        draft.add(place, f"got {show(got)}, expected {_expected(place, kind, context, fault['msg'])}")


def _unknown_key(fault: Mapping[str, Any]) -> Place | None:
    return _place(fault["loc"]) if fault["type"] == "extra_forbidden" else None


def _tell_contradictions(draft: Draft, fault: Mapping[str, Any], invalid: set[str]) -> None:
    for at, fields, message in fault["ctx"]["found"]:
        if not any(_touches(bad, name) for bad in invalid for name in fields):
            draft.add(tuple(at.split(".")), message)


def _touches(bad: str, name: str) -> bool:
    return (bad + ".").startswith(name + ".") or (name + ".").startswith(bad + ".") or bad.startswith(name + "[")


def _expected(place: Place, kind: str, context: Mapping[str, Any], fallback: str) -> str:
    if _dotted(place) in _EXPECTED:
        return _EXPECTED[_dotted(place)]
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        bound = f"{context[key]:g}" if isinstance(context[key], float) else context[key]
        return f"a number {words} {bound}"
    return _PLAIN_EXPECTATIONS.get(kind, fallback)


def _nearest_key(place: Place) -> str:
    """The valid keys in this section; a key that belongs to another section is sent there."""
    section, key = place[:-1], str(place[-1])
    elsewhere = [home for home, model in _SECTIONS.items() if len(home) < 2 and key in model.model_fields]
    if elsewhere:
        return f"; did you mean {_dotted((*elsewhere[0], key))}?"
    model = _SECTIONS.get(section)
    return nearest(key, model.model_fields) if model else ""


def _without(tree: dict[str, Any], places: Iterable[Place]) -> dict[str, Any]:
    """A copy of the tree without the fields at these places, and with a name, the one field that is required.

    A list goes as a whole where an item is at fault.
    """
    copy = json.loads(json.dumps(tree))
    for place in places:
        at = copy
        for depth, key in enumerate(place, start=1):
            if depth == len(place) or not isinstance(at.get(key), dict):
                at.pop(key, None)
                break
            at = at[key]
    return {"name": "study", **copy}


def _place(loc: Sequence[str | int]) -> Place:
    """pydantic's location without the marks that say which form of a value was tried."""
    return tuple(part for part in loc if part not in ("<list>", "<rule>", "<word>", "[key]"))


def _dotted(place: Place) -> str:
    """("space", "layer", 1) as space.layer[1]."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def show(value: Any) -> str:
    """A value as it would be written in the file, shortened."""
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def in_order(problems: Iterable[tuple[int, str]]) -> list[str]:
    """In the order of the lines; those of overrides come last."""
    return [message for _, message in sorted(problems, key=lambda problem: problem[0])]
