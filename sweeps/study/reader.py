"""Reading a study file: every problem at once, each with the file, the line and the field.

YAML is read as plain data: no tags, no aliases, and plain scalars by YAML 1.2 rather than PyYAML's 1.1, so that `1e-4`
is a number, `no` and `2024-01-01` are text, and `010` is ten.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from os import PathLike, fspath
from os.path import exists, expanduser
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import ValidationError

from analysis.stats.axes import without_retired
from locft.errors import InputError, did_you_mean
from sweeps.study.schema import EveryLayer, LogUniform, Section, Study, nearest, wrong_value

Place = tuple[str | int, ...]
"""Keys and list indices from the top of the file to a value."""

MAX_BYTES = 1_000_000
"""A larger file is not a study: most likely data or weights were given instead."""
OVERRIDES = 10**9
"""A line number that sorts overrides after every line of the file."""

_BUILT_IN = ("atlas", "smollm2-135m")
"""Names that are never taken for a path."""
_FILES = (("model",), ("edits", "source"), ("capability", "prose"), ("capability", "lm_eval_path"))
"""Fields that may name a file, besides the tasks."""
_DATA_SUFFIXES = (".json", ".jsonl", ".txt", ".gguf", ".parquet", ".csv", ".tsv", ".arrow", ".md")
_SECTIONS: dict[Place, type[Section]] = {
    (): Study,
    **{(name,): type(part.default) for name, part in Study.model_fields.items() if isinstance(part.default, Section)},
    ("space", "layer"): EveryLayer,
    ("space", "learning_rate"): LogUniform,
}

_SCALARS = {
    "null": (re.compile(r"(?:~|null|Null|NULL|)\Z"), lambda text: None),
    "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), lambda text: text.lower() == "true"),
    "int": (re.compile(r"[-+]?[0-9]{1,18}\Z"), int),  # with more digits it is read as float, and refused as such
    "float": (
        re.compile(
            r"[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))\Z|\.(?:nan|NaN|NAN)\Z"
        ),
        lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    ),
    "str": (None, str),
}
"""Plain scalars of YAML 1.2, by the last part of their tag: pattern, and the function that converts the text to a value."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        refused = f"the alias *{event.anchor}" if isinstance(event, yaml.AliasEvent) else None
        if tag := getattr(event, "tag", None):
            refused = f"the tag {tag.replace('tag:yaml.org,2002:', '!!')}"
        if refused:
            message = f"{refused} is not allowed, since a study file is plain data: write the value out"
            raise yaml.composer.ComposerError(None, None, message, event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes text that this reader or a YAML 1.1 reader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind, (_pattern, _) in _SCALARS.items():
    if _pattern is not None:
        _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, None)
        _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, None)


class _Draft:
    """A study while it is being read."""

    def __init__(self) -> None:
        self.tree: dict[str, Any] = {}
        self.origins: dict[Place, tuple[int, str]] = {}
        """For each value: the line to sort by (`OVERRIDES` for overrides), and a human-readable label of where it was written."""
        self.problems: list[tuple[int, str]] = []
        """Line to sort by, and message."""

    def add(self, place: Place, message: str) -> None:
        """Record a problem at a value, or at the nearest enclosing value that was written out."""
        known = next((place[:n] for n in range(len(place), -1, -1) if place[:n] in self.origins), None)
        line, label = self.origins[known] if known is not None else (1, "study")
        where = _dotted(place)
        named = not where or label.endswith(f" {where}")  # "--set space.layer" names the field already
        self.problems.append((line, f"{label}: {message}" if named else f"{label}: {where}: {message}"))

    def read(self, text: str, label: str, *, override: bool = False) -> Any:
        """The YAML document as plain data; None, with a problem recorded, if it cannot be read.

        label: names the source in messages; a file's line follows it.
        """

        def origin(line: int) -> tuple[int, str]:
            return (OVERRIDES, label) if override else (line + 1, f"{label}:{line + 1}")

        def refuse(line: int, message: str) -> None:
            order, where = origin(line)
            self.problems.append((order, f"{where}: {message}"))

        def plain(node: yaml.Node, place: Place) -> Any:
            if not override:
                self.origins.setdefault(place, origin(node.start_mark.line))
            if isinstance(node, yaml.ScalarNode):
                return _SCALARS[node.tag.rpartition(":")[2]][1](node.value)
            if isinstance(node, yaml.SequenceNode):
                return [plain(item, (*place, i)) for i, item in enumerate(node.value)]
            found: dict[str, Any] = {}
            for key, value in node.value:
                inside, line = (*place, key.value), key.start_mark.line
                if not isinstance(key, yaml.ScalarNode):
                    refuse(line, "a key must be text, got a list or a mapping")
                elif key.value in found:
                    first = "" if override else f", first on line {self.origins[inside][0]}"
                    refuse(line, f"{_dotted(inside)}: given twice{first}")
                else:
                    if not override:
                        self.origins[inside] = origin(line)
                    found[key.value] = plain(value, inside)
            return found

        try:
            node = yaml.compose(text, Loader=_Loader)
            return None if node is None else plain(node, ())
        except yaml.MarkedYAMLError as error:
            message = ", ".join(filter(None, (error.context, error.problem)))
            refuse(error.problem_mark.line, f"not plain YAML: {message}")
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position)
            refuse(line, f"not plain YAML: character #x{error.character:04x} is not allowed")
        except RecursionError:
            refuse(0, "not plain YAML: nested too deeply")
        return None


def ready_studies() -> tuple[str, ...]:
    """Names of the studies that come with the package."""
    files = resources.files("sweeps.studies").iterdir()
    return tuple(sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")))


def load_study(name_or_path: str, overrides: Sequence[str] = ()) -> Study:
    """Read a ready study (by name) or a study file (by path), with overrides applied to it.

    overrides: each a dotted field and a value in YAML, such as "space.layer=[3, 7]"; later ones win. Relative paths in a file
    are relative to its folder, those in an override to the working directory; in the result they are absolute.

    Raises `InputError` with every problem of the file, of the overrides, and of their combination.
    """
    text, label, folder = _read(str(name_or_path))
    draft, study = _Draft(), None
    tree = draft.read(text, label)
    if isinstance(tree, dict):
        draft.tree = _with_paths(tree, folder)
    elif not draft.problems:
        expected = "a mapping with keys such as name, model, edits and space"
        draft.problems.append((1, f"{label}:1: {wrong_value(tree, expected)}"))
    for override in overrides:
        _lay_over(draft, override)
    if isinstance(tree, dict):
        for place, holder in _named_files(draft.tree):
            if _is_path(holder[place[-1]]) and not exists(path := Path(holder[place[-1]])):
                draft.add(place, f"no such file: {path}{_nearest_file(path)}")
        study = _validated(draft)
    if draft.problems or study is None:
        raise InputError([message for _, message in sorted(draft.problems, key=lambda problem: problem[0])])
    return study


def as_override(field: str, value: Any) -> str:
    """The override of `load_study` that gives a dotted field this value, such as 'edits.limit=20'.

    value: what JSON can hold, paths, ranges, and numpy's numbers and arrays. Raises InputError for anything else.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, default=_plain_data)
    except (TypeError, ValueError) as error:  # a ValueError for a list within itself
        expected = "text, numbers, true or false, None, paths, and lists and mappings of them"
        raise InputError(f"{field}: got {value!r}, expected {expected} ({error})") from None
    return f"{field}=" + "".join(sign if sign.isprintable() else f"\\U{ord(sign):08x}" for sign in text)


def _plain_data(value: Any) -> Any:
    """For `json.dumps`: the data of a value that JSON does not know."""
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, range):
        return list(value)
    if hasattr(value, "tolist"):  # numpy's, pandas' and torch's
        return value.tolist()
    raise TypeError(f"its {type(value).__name__} is none of these")


def study_to_yaml(study: Study) -> str:
    """The study with every default written out, in one canonical form; `load_study` reads it back as an equal study."""
    tree = study.model_dump(mode="json")
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)


def study_from_yaml(text: str) -> Study:
    """The inverse of `study_to_yaml`; paths stay as they are written."""
    tree = _Draft().read(text, "study")
    return Study.model_validate({**tree, "space": without_retired(tree.get("space", {}))})


def _validated(draft: _Draft) -> Study | None:
    """The study; None, with problems recorded, if it is not valid.

    Contradictions are only found once every field is valid, so the rest is checked again without the fields at fault. Those that
    involve a field at fault are left out, since they may go away with its correction.
    """
    try:
        return Study.model_validate(draft.tree)
    except ValidationError as error:
        faults = error.errors(include_url=False)
    wrong = [_place(fault["loc"]) for fault in faults if fault["type"] != "contradictions"]
    for fault in faults:
        _tell(draft, fault, faults)
    if wrong:
        try:
            Study.model_validate(_without(draft.tree, wrong))
        except ValidationError as error:
            for fault in error.errors(include_url=False):
                if fault["type"] == "contradictions":
                    _tell(draft, fault, [], wrong)
    return None


def _tell(draft: _Draft, fault: Any, faults: Sequence[Any], wrong: Iterable[Place] = ()) -> None:
    """Record one of pydantic's errors. faults: all of them. wrong: fields whose contradictions are not reported."""
    place, kind, context = _place(fault["loc"]), fault["type"], fault.get("ctx", {})
    if kind == "contradictions":
        for fields, message in context["found"]:
            places = [tuple(field.split(".")) for field in fields]
            if not any(bad[: len(at)] == at[: len(bad)] for bad in wrong for at in places):
                draft.add(places[0], message)
    elif kind == "problem":
        draft.add(place if context["item"] is None else (*place, context["item"]), context["text"])
    elif kind == "extra_forbidden":
        draft.add(place, f"unknown key{_nearest_key(place)}")
    elif kind == "missing":
        unknown = [_place(other["loc"]) for other in faults if other["type"] == "extra_forbidden"]
        misspelt = [str(other[-1]) for other in unknown if other[:-1] == place[:-1]]
        if not difflib.get_close_matches(str(place[-1]), misspelt):
            draft.add(place, "required, but missing")
    else:  # a section, or the tasks
        draft.add(place, wrong_value(fault["input"], "a mapping of keys to values"))


def _nearest_key(place: Place) -> str:
    """Hint at the valid keys of this section, or at the section in which the key is valid."""
    section, key = place[:-1], str(place[-1])
    for home, model in _SECTIONS.items():
        if len(home) < 2 and key in model.model_fields:
            return f"; did you mean {_dotted((*home, key))}?"
    return nearest(key, _SECTIONS[section].model_fields) if section in _SECTIONS else ""


def _without(tree: dict[str, Any], places: Iterable[Place]) -> dict[str, Any]:
    """A copy of the tree without the values at these places (a list is dropped as a whole), and with the required name."""
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


def _lay_over(draft: _Draft, override: str) -> None:
    """Apply one "field=value" to the draft."""
    key, equals, text = override.partition("=")
    keys = tuple(part.strip() for part in key.split("."))
    label = f"--set {key.strip()}"
    if not equals or not all(keys):
        draft.problems.append((OVERRIDES, f"--set {override}: expected field=value, such as space.layer=[3,7]"))
        return
    known = len(draft.problems)
    new: Any = draft.read(text, label, override=True)
    if len(draft.problems) > known:
        return
    for part in reversed(keys):
        new = {part: new}
    new, at = _with_paths(new, Path.cwd()), draft.tree
    for depth, part in enumerate(keys[:-1], start=1):
        if not isinstance(at.get(part), dict):  # such as layer: all, when space.layer.every is set
            at[part] = {}
            draft.origins[keys[:depth]] = (OVERRIDES, label)
        at, new = at[part], new[part]
    at[keys[-1]] = new[keys[-1]]
    for place in [place for place in draft.origins if place[: len(keys)] == keys]:
        del draft.origins[place]
    draft.origins[keys] = (OVERRIDES, label)


def _read(name_or_path: str) -> tuple[str, str, Path]:
    """The text, the file's name for messages, and the folder that relative paths start from."""
    if name_or_path in ready_studies():
        text = resources.files("sweeps.studies").joinpath(f"{name_or_path}.yaml").read_text(encoding="utf-8")
        return text, f"ready study {name_or_path}", Path.cwd()
    path = Path(expanduser(name_or_path))
    try:
        if path.is_dir():
            raise InputError(f"{name_or_path}: this is a folder, expected a study file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(_no_such_study(name_or_path, path)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{name_or_path}: cannot read the study file: {reason}") from None
    if len(data) > MAX_BYTES:
        raise InputError(f"{name_or_path}: larger than {MAX_BYTES:,} bytes, expected a study file")
    try:
        return data.decode("utf-8-sig"), name_or_path, path.absolute().parent
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise InputError(f"{name_or_path}:{line}: {byte} is not UTF-8; save the file as UTF-8") from None


def _no_such_study(name: str, path: Path) -> str:
    """The message, which suggests a file with nearly that name, or else a ready study."""
    files = [file.name for file in path.parent.glob("*.y*ml")]
    near = [str(path.with_name(file)) for file in difflib.get_close_matches(path.name, files, n=1)]
    near += difflib.get_close_matches(name, ready_studies(), n=1, cutoff=0.4)
    suggestion = f"; did you mean {near[0]}?" if near else ""
    return f"{name}: no such file and no ready study{suggestion} (ready studies: {', '.join(ready_studies())})"


def _named_files(tree: dict[str, Any], section: Place = ()) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The texts that may be paths: the place of each, and the mapping that holds it."""
    for key, value in tree.items():
        place = (*section, key)
        if isinstance(value, dict):
            yield from _named_files(value, place)
        elif isinstance(value, str) and (place in _FILES or section == ("capability", "tasks")):
            yield place, tree


def _with_paths(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The tree with its relative paths made absolute, in place. Built-in names and hub ids stay as they are."""
    for place, holder in _named_files(tree):
        value = holder[place[-1]]
        path, always = folder / expanduser(value), place[:-1] == ("capability",)
        if value and value not in _BUILT_IN and (always or _is_path(value) or exists(path)):
            holder[place[-1]] = str(path)
    return tree


def _is_path(value: str) -> bool:
    return value.startswith(("./", "../", "/", "~")) or value.lower().endswith(_DATA_SUFFIXES)


def _nearest_file(path: Path) -> str:
    if not exists(path.parent):
        return f"; the folder {path.parent} does not exist either"
    return did_you_mean(path.name, [file.name for file in path.parent.glob("*")])
