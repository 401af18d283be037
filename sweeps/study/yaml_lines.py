"""YAML that remembers the line of every value, so that a message can say where a setting was written.

Plain scalars follow YAML 1.2 rather than PyYAML's 1.1: `1e-4` is a number, `no` and `2024-01-01` are text, and `010`
is ten. Tags and aliases are refused: a study file is plain data, read safely and in linear time.
"""

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

Place = tuple[str | int, ...]
"""Keys and list indices from the top of the document to a value."""

_CORE = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?[0-9]+\Z")
_FLOAT = re.compile(
    r"[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))\Z|\.(?:nan|NaN|NAN)\Z"
)
_RESOLVERS = (
    ("null", re.compile(r"(?:~|null|Null|NULL|)\Z")),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")),
    ("int", _INT),
    ("float", _FLOAT),
)


class YamlError(Exception):
    """Text that is not YAML, with the line (1 is the first) at which reading it failed."""

    def __init__(self, line: int, message: str):
        self.line, self.message = line, message
        super().__init__(f"line {line}: {message}")


@dataclass(frozen=True)
class Document:
    """Plain data with its origin."""

    tree: Any
    """None, bool, int, float, str, lists and dicts with text keys."""
    lines: Mapping[Place, int]
    """The line, counted from 1, of every value; of its key, where it has one."""
    problems: tuple[tuple[int, str], ...]
    """Line and message of what is YAML but no plain data: keys given twice, tags, keys that are not text."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not accepted: write the value out", mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes text that this reader or a YAML 1.1 reader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern in _RESOLVERS:
    _Loader.add_implicit_resolver(_CORE + _name, _pattern, None)
    _Dumper.add_implicit_resolver(_CORE + _name, _pattern, None)


def parse_yaml(text: str) -> Document:
    """Read one YAML document. Raises `YamlError` where the text is not YAML."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = ", ".join(part for part in (error.context, error.problem) if part)
        raise YamlError(mark.line + 1 if mark else 1, message) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(line, f"character #x{error.character:04x} is not allowed in YAML") from None
    except RecursionError:
        raise YamlError(1, "nested too deeply") from None
    lines: dict[Place, int] = {}
    problems: list[tuple[int, str]] = []
    tree = None if node is None else _plain(node, (), lines, problems)
    return Document(tree, lines, tuple(problems))


def dump_yaml(tree: Any) -> str:
    """YAML text that `parse_yaml` and YAML 1.1 readers read back as `tree`; keys keep their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)


def _plain(node: yaml.Node, place: Place, lines: dict[Place, int], problems: list[tuple[int, str]]) -> Any:
    """The node as plain data; fills `lines` and `problems` (both belong to the one reading in progress)."""
    line = node.start_mark.line + 1
    lines.setdefault(place, line)
    if isinstance(node, yaml.MappingNode) and node.tag == _CORE + "map":
        return _plain_mapping(node, place, lines, problems)
    if isinstance(node, yaml.SequenceNode) and node.tag == _CORE + "seq":
        return [_plain(item, (*place, i), lines, problems) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        try:
            return _scalar(node.tag.removeprefix(_CORE), node.value)
        except ValueError as error:
            problems.append((line, str(error)))
            return node.value
    problems.append((line, f"the tag {_tag(node.tag)} is not accepted: a study file is plain data"))
    return None


def _plain_mapping(node: yaml.MappingNode, place: Place, lines: dict[Place, int], problems: list) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or not isinstance(key_node.value, Hashable):
            problems.append((line, "a key must be text, got a list or a mapping"))
            continue
        key = key_node.value
        if key in plain:
            where = ".".join(map(str, (*place, key)))
            problems.append((line, f"{where}: given twice, first in line {lines[(*place, key)]}"))
            continue
        lines[(*place, key)] = line
        plain[key] = _plain(value_node, (*place, key), lines, problems)
    return plain


def _scalar(kind: str, text: str) -> Any:
    """Raises ValueError where an explicit tag does not fit, for an unknown one, and for a number of too many digits."""
    if kind == "str":
        return text
    pattern = dict(_RESOLVERS).get(kind)
    if pattern is None:
        raise ValueError(f"the tag {_tag(kind)} is not accepted: a study file is plain data")
    if not pattern.match(text):
        raise ValueError(f"{text!r} is not of the type {_tag(kind)} that its tag says")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        if len(text) > 40:
            raise ValueError(f"a whole number of {len(text)} digits is too long")
        return int(text)
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _tag(tag: str) -> str:
    return "!!" + tag.removeprefix(_CORE) if not tag.startswith("!") else tag
