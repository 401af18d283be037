"""Reading a study file: every problem at once, each with the file, the line and the field.

`load_study` reads a ready study or a file and lays overrides over it; `check_against_model` adds what only the model
can tell; `study_to_yaml` writes a study in one canonical form.
"""

import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from locft.errors import InputError
from sweeps.study.schema import EveryLayer, Study
from sweeps.study.study_errors import OVERRIDES, Draft, in_order, nearest, show, validated
from sweeps.study.yaml_lines import Place, YamlError, dump_yaml, parse_yaml

__all__ = ["Study", "check_against_model", "load_study", "nearest", "ready_studies", "selected_layers", "study_to_yaml"]

MAX_BYTES = 1_000_000
"""A larger file is no study: most likely data or weights were given in its place."""

_BUILT_IN = ("atlas", "smollm2-135m")
"""Names that are never taken for a path."""
_DATA_SUFFIXES = (".json", ".jsonl", ".txt", ".gguf", ".parquet", ".csv", ".tsv", ".arrow", ".md")


def ready_studies() -> tuple[str, ...]:
    """Names of the studies that come with the package."""
    files = resources.files("sweeps.studies").iterdir()
    return tuple(sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")))


def load_study(name_or_path: str, overrides: Sequence[str] = ()) -> Study:
    """Read a ready study (by name) or a study file (by path), with overrides laid over it.

    overrides: "space.layer=[3, 7]": a dotted field, and a value in YAML. A later one wins. Relative paths in a file
    are relative to its folder, those in an override to the working directory; in the result they are absolute.

    Raises `InputError` with every problem: of the file, of the overrides, and of what they make together.
    """
    text, label, folder = _read(str(name_or_path))
    draft = Draft()
    try:
        document = parse_yaml(text)
    except YamlError as error:
        draft.problems.append((error.line, f"{label}:{error.line}: this is not YAML: {error.message}"))
        document = None
    if document is not None:
        draft.problems += [(line, f"{label}:{line}: {message}") for line, message in document.problems]
        draft.origins.update({path: (line, f"{label}:{line}") for path, line in document.lines.items()})
        if isinstance(document.tree, dict):
            draft.tree = _with_paths(document.tree, folder)
        else:
            message = f"got {show(document.tree)}, expected a mapping with keys such as name, model, edits and space"
            draft.problems.append((1, f"{label}:1: {message}"))
            document = None
    for override in overrides:
        _override(draft, override)
    if document is None:
        raise InputError(in_order(draft.problems))
    for place, path in _missing_files(draft.tree):
        draft.add(place, f"no such file: {path}{_nearest_file(path)}")
    study = validated(draft)
    if draft.problems or study is None:
        raise InputError(in_order(draft.problems))
    return study


def selected_layers(study: Study, n_layers: int) -> tuple[int, ...]:
    """The layer axis for a model of so many layers, in ascending order. Layers out of range are left in."""
    layer = study.space.layer
    if isinstance(layer, EveryLayer):
        return tuple(range(0, n_layers, layer.every))
    return tuple(range(n_layers)) if layer == "all" else tuple(sorted(layer))


def check_against_model(study: Study, n_layers: int, modules_by_layer: Mapping[int, Sequence[str]]) -> None:
    """Raise `InputError` with every layer and module of the space that this model does not have.

    modules_by_layer: for each layer index, the modules that can be trained there (in a hybrid model they differ).
    """
    problems = []
    chosen = selected_layers(study, n_layers)
    for layer in chosen:
        if layer >= n_layers:
            problems.append(f"space.layer: layer {layer}: {study.model} has layers 0 to {n_layers - 1}")
    if isinstance(study.space.layer, EveryLayer) and study.space.layer.every >= n_layers > 1:
        problems.append(f"space.layer.every: got {study.space.layer.every}: {study.model} has only {n_layers} layers")
    known = tuple(dict.fromkeys(module for layer in sorted(modules_by_layer) for module in modules_by_layer[layer]))
    for module in study.space.module:
        having = [layer for layer in sorted(modules_by_layer) if module in modules_by_layer[layer]]
        in_range = [layer for layer in chosen if layer < n_layers]
        if not having:
            problems.append(f"space.module: {study.model} has no module {module!r}{nearest(module, known)}")
        elif in_range and not set(having) & set(in_range):
            where = f"layer {_span(in_range)} of {study.model}"
            problems.append(f"space.module: {where} has no {module!r}; it is in layer {_span(having)}")
    if problems:
        raise InputError(problems)


def study_to_yaml(study: Study) -> str:
    """The study with every default written out, in one canonical form; `load_study` reads it back as an equal study."""
    return dump_yaml(study.model_dump(mode="json"))


def _span(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) if len(layers) <= 8 else f"{', '.join(map(str, layers[:7]))}, ... {layers[-1]}"


def _read(name_or_path: str) -> tuple[str, str, Path]:
    """The text, the file as the user is told, and the folder that relative paths start from."""
    if name_or_path in ready_studies():
        text = resources.files("sweeps.studies").joinpath(f"{name_or_path}.yaml").read_text(encoding="utf-8")
        return text, f"ready study {name_or_path}", Path.cwd()
    path = Path(name_or_path).expanduser()
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
    """A file of nearly that name comes first: whoever writes a path means a file."""
    close = difflib.get_close_matches(path.name, _study_files(path.parent), n=1, cutoff=0.6)
    ready = difflib.get_close_matches(name, ready_studies(), n=1, cutoff=0.4)
    near = [str(path.with_name(close[0]))] if close else ready
    suggestion = f"; did you mean {near[0]}?" if near else ""
    return f"{name}: no such file and no ready study{suggestion} (ready studies: {', '.join(ready_studies())})"


def _study_files(folder: Path) -> list[str]:
    try:
        return [file.name for file in folder.iterdir() if file.suffix in (".yaml", ".yml")]
    except OSError:
        return []


def _override(draft: Draft, override: str) -> None:
    """Lay one "field=value" over the draft."""
    key, equals, text = override.partition("=")
    keys = tuple(part.strip() for part in key.split("."))
    label = f"--set {key.strip()}"
    if not equals or not all(keys):
        draft.problems.append((OVERRIDES, f"--set {override}: expected field=value, such as space.layer=[3,7]"))
        return
    try:
        document = parse_yaml(text)
    except YamlError as error:
        draft.problems.append((OVERRIDES, f"{label}: {show(text)} is not YAML: {error.message}"))
        return
    draft.problems += [(OVERRIDES, f"{label}: {message}") for _, message in document.problems]
    nested = document.tree
    for part in reversed(keys):
        nested = {part: nested}
    value = _with_paths(nested, Path.cwd())
    at = draft.tree
    for depth, part in enumerate(keys[:-1], start=1):
        if not isinstance(at.get(part), dict):  # such as layer: all, when space.layer.every is set
            at[part] = {}
            draft.origins[keys[:depth]] = (OVERRIDES, label)
        at, value = at[part], value[part]
    at[keys[-1]] = value[keys[-1]]
    for path in [path for path in draft.origins if path[: len(keys)] == keys]:
        del draft.origins[path]
    draft.origins[keys] = (OVERRIDES, label)


def _with_paths(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A copy in which every relative path is absolute. Built-in names and hub ids stay as they are."""

    def absolute(value: Any, certain: bool = False) -> Any:
        if not isinstance(value, str) or not value or value in _BUILT_IN:
            return value
        path = folder / Path(value).expanduser()
        return str(path) if certain or _is_path(value) or _exists(path) else value

    copy = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    if "model" in copy:
        copy["model"] = absolute(copy["model"])
    for section, key in (("edits", "source"), ("capability", "prose")):
        if isinstance(copy.get(section), dict) and key in copy[section]:
            copy[section][key] = absolute(copy[section][key], certain=key == "prose")
    capability = copy.get("capability")
    if isinstance(capability, dict) and isinstance(capability.get("tasks"), dict):
        capability["tasks"] = {name: absolute(source) for name, source in capability["tasks"].items()}
    return copy


def _is_path(value: str) -> bool:
    return value.startswith(("./", "../", "/", "~")) or value.lower().endswith(_DATA_SUFFIXES)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _missing_files(tree: Mapping[str, Any]) -> list[tuple[Place, Path]]:
    """The files that the study names by their path and that do not exist, and where it names them."""
    named: list[tuple[Place, Any]] = [(("model",), tree.get("model"))]
    for section, key in (("edits", "source"), ("capability", "prose")):
        if isinstance(tree.get(section), dict):
            named.append(((section, key), tree[section].get(key)))
    tasks = tree["capability"].get("tasks") if isinstance(tree.get("capability"), dict) else None
    if isinstance(tasks, dict):
        named += [(("capability", "tasks", name), source) for name, source in tasks.items()]
    named = [(place, value) for place, value in named if isinstance(value, str) and _is_path(value)]
    return [(place, Path(value)) for place, value in named if not _exists(Path(value))]


def _nearest_file(path: Path) -> str:
    try:
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=1, cutoff=0.6)
    except OSError:
        return f"; the folder {path.parent} does not exist either"
    return f"; did you mean {near[0]}?" if near else ""
