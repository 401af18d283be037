"""The documents: what the README shows runs, links lead somewhere, and the rule of the pick reads the same everywhere."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from analysis.stats.pick import RULE

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = [
    "edits.limit=3",
    "capability.limit=2",
    "capability.prose_tokens=32",
    "space.layer=[0,2]",
    "space.module=mlp_down",
    "space.batch_size=2",
    "space.learning_rate=0.02",
    "epochs=3",
    "search.method=grid",
    "search.trials=null",
]
"""What makes a ready study one of seconds, once its model is tiny."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path, program: str) -> list[list[str]]:
    """The words of every command of this program that a page shows."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words and words[0] == program]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if heading:
            found = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in found], (
                target
            )


def test_the_readme_fits_a_page_and_states_the_rule():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for page in (text, (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")):
        assert RULE in " ".join(page.split())


def test_the_targets_of_make_exist():
    for page in PAGES:
        for _, *words in commands(page, "make"):
            target = next(word for word in words if "=" not in word)
            done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


def test_every_field_of_a_study_is_described():
    from pydantic import BaseModel

    from sweeps.study.schema import Study

    text = (ROOT / "docs" / "study-file.md").read_text(encoding="utf-8")
    for name, field in Study.model_fields.items():
        nested = (
            field.annotation if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel) else None
        )
        for key in nested.model_fields if nested else [name]:
            assert re.search(rf"\b{key}\b", text), f"{name}.{key}"


@pytest.fixture
def place(workplace, tiny_folder):
    """A working directory with a model and an edit file under the names that the README uses."""
    shutil.copytree(tiny_folder, workplace / "ORG" / "MODEL")
    edit = blocks(ROOT / "README.md", "json")[0]
    lines = [edit.replace("Portugal", country) for country in ("Portugal", "Norway", "Peru")]
    (workplace / "my_edits.jsonl").write_text("".join(lines), encoding="utf-8")
    new = {"id": "ID", "prompt": "The capital of Chad is", "target": "Oslo"}
    (workplace / "today.jsonl").write_text(json.dumps(new) + "\n", encoding="utf-8")
    return workplace


def test_every_command_of_the_readme_runs(place, locft, trials_here, few_probes):
    """In the order of the page, on a tiny model: studies are made small, and `locft ui` is asked for its help alone (its own
    tests start it)."""
    small = [word for change in ("model=./ORG/MODEL", *SMALL) for word in ("--set", change)]
    compared = [word for change in ("model=./ORG/MODEL", *SMALL) for word in ("--compare-set", change)]
    assert locft("sweep", "quickstart", *small, "--no-register").code == 0  # what `make demo` did
    shown = commands(ROOT / "README.md", "locft")
    assert {words[1] for words in shown} >= {"plan", "sweep", "status", "select", "edit", "apply", "report", "ui"}
    for _, name, *arguments in shown:
        arguments = ["./ORG/MODEL" if word == "ORG/MODEL" else word.replace("=ORG/", "=./ORG/") for word in arguments]
        if name in ("plan", "sweep", "status", "report"):
            arguments = [arguments[0], *small, *arguments[1:]]
        if "--compare" in arguments:
            arguments += compared
        if name == "select":
            arguments += ["--budget-share", "0.3", "--set", "epochs=2", "--set", "capability.limit=2"]
        if name == "ui":
            arguments = ["--help"]
        done = locft(name, *arguments)
        assert done.code == 0, f"locft {name} {shlex.join(arguments)}\n{done.err}"
    assert (place / "edited-model" / "config.json").exists() and (place / "layer-sweep.html").exists()


@pytest.mark.model
def test_the_single_trial_of_the_methods_page_runs(capsys):
    (code,) = blocks(ROOT / "docs" / "methods.md", "python")
    small = code.replace("limit=20", "limit=2").replace("batch_size=10", "batch_size=2, epochs=1")
    small = small.replace('load_suite("probes", limit=2)', 'load_suite("probes", limit=2), 64')  # tokens of prose
    assert "epochs=1" in small and "), 64" in small
    exec(compile(small, "docs/methods.md", "exec"), {})
    assert "'reliability'" in capsys.readouterr().out
