"""Which part of the house may import which, read from the imports of every file, those inside functions included."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweeps.study.trial_types import METHOD_VERSION

ROOT = Path(__file__).resolve().parents[1]
HOUSE = {"locft": (), "analysis": (), "sweeps": ("locft", "analysis")}
"""Package -> the other packages that it may import."""
FOREIGN = {"locft": ("ray", "mlflow", "optuna", "plotly")}
"""Package -> libraries that it does without."""
FLOORS: dict[str, tuple[str, ...]] = {
    "locft.data": ("locft",),
    "locft.model": ("locft",),
    "locft.train.methods": ("locft", "locft.model"),
    "locft.train": ("locft", "locft.data", "locft.model", "locft.train.methods"),
    "locft.engine": ("locft", "locft.model", "locft.train"),
    "locft.measure": ("locft", "locft.data", "locft.model", "locft.train"),
    "analysis.figures": ("analysis.stats",),
    "analysis.page": ("analysis.stats", "analysis.figures"),
    "sweeps.run": ("sweeps.study",),
    "sweeps.tracking": ("sweeps.study", "sweeps.run"),
    "sweeps.select": ("sweeps", "sweeps.study", "sweeps.run", "sweeps.tracking"),
    "sweeps.commands": ("sweeps", "sweeps.study", "sweeps.run", "sweeps.tracking", "sweeps.select"),
}
"""Sub-folder -> the folders of its package that it may import beside itself ("locft" stands for the files that lie in the
package itself). One that is not listed may import none."""

FILES = [file.relative_to(ROOT) for package in HOUSE for file in sorted((ROOT / package).rglob("*.py"))]


def folder_of(file: Path) -> str:
    return ".".join(file.parent.parts)


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports; of `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = file.parent.parts[: len(file.parent.parts) - node.level + 1] if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else ())))
            yield from ((node.lineno, name) for name in (module, *(f"{module}.{name.name}" for name in node.names)))


def house_folder(name: str) -> str | None:
    """The folder of the house in which the module of that name lies, or that it is; None for all else."""
    place = Path(*name.split("."))
    if name.split(".")[0] not in HOUSE:
        return None
    if (ROOT / place).is_dir():
        return name
    return folder_of(place) if (ROOT / place).with_suffix(".py").is_file() else None


@pytest.mark.parametrize("package", HOUSE)
def test_packages_import_only_what_is_below_them(package):
    barred = {*HOUSE, *FOREIGN.get(package, ())} - {package, *HOUSE[package]}
    files = [file for file in FILES if file.parts[0] == package]
    wrong = {f"{file}:{line}: {name}" for file in files for line, name in imports(file) if name.split(".")[0] in barred}
    assert files and not wrong, "\n".join(sorted(wrong))


def test_folders_import_only_those_that_their_floor_allows():
    wrong = set()
    for file in FILES:
        package, own = file.parts[0], folder_of(file)
        if own == package:
            continue
        for line, name in imports(file):
            folder = house_folder(name) if name != package else None  # `from package import folder` names both
            if folder and folder.split(".")[0] == package and folder not in (own, *FLOORS.get(own, ())):
                wrong.add(f"{file}:{line}: {name} is in {folder}")
    assert not wrong, "\n".join(sorted(wrong))


def test_every_floor_is_there():
    known = {folder_of(file) for file in FILES}
    named = {*FLOORS, *(folder for allowed in FLOORS.values() for folder in allowed)}
    assert named <= known, sorted(named - known)


def test_old_results_stay_valid():
    """Raised only when the same configuration gives another result: every stored trial would be run again."""
    assert METHOD_VERSION == 1


UNSEEN = {"accelerate"}
"""Declared and never imported here: transformers needs it to spread a model and to load a GGUF file."""
INSTALLED_AS = {"yaml": "pyyaml", "pydantic_core": "pydantic"}
"""Module -> the package that brings it, where the names differ."""


def test_declared_dependencies_are_the_imported_ones():
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["harness"]]
    declared = {re.match(r"[\w-]+", line)[0].lower() for line in declared}
    modules = {name.partition(".")[0] for file in FILES for _, name in imports(file)}
    foreign = modules - set(sys.stdlib_module_names) - {*HOUSE, "tests"}
    assert {INSTALLED_AS.get(name, name).replace("_", "-") for name in foreign} == declared - UNSEEN
