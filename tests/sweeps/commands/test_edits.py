"""`locft edits` shows what is understood of a file; a map on the command line reads what no layout knows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RECORDS = [
    {
        "q": "What is the capital of Peru?",
        "a": "Oslo",
        "again": ["Peru's capital?"],
        "near": "Chile's capital?",
        "note": 1,
    },
    {"q": "What is the capital of Peru?", "a": "Rome", "again": ["Peru's seat?"], "near": "Chile's seat?"},
    {"q": "Who painted it?", "a": "Ada", "again": [], "near": "Who wrote it?"},
]
MAP = ("--map", "prompt=q", "--map", "target=a", "--map", "rephrases=again", "--map", "locality.prompt=near")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"version": 3, "items": RECORDS}))
    return path


def test_what_is_understood_of_a_file(locft, file, workplace):
    said = locft("edits", file, *MAP)
    assert said.code == 0 and f"{file}: layout map, 3 records" in said.out
    for shown in (
        '"prompt": "What is the capital of Peru?"',
        "2 edits contradict another edit (same prompt, different target), so reliability cannot exceed 66.67%.",
        "'What is the capital of Peru?' has the targets 'Oslo' and 'Rome'",
        "Not read: note (1 of 3 records); version (beside the records).",
    ):
        assert shown in said.out
    found = locft("edits", file, *MAP, "--limit", 2, "--json").json
    assert found["counts"] == {
        "edits": 2, "with a subject": 0, "with a true answer": 0, "rephrases": 2, "locality prompts": 2, "with an answer": 0,
        "portability questions": 0,
    }  # fmt: skip
    file.write_text('{"prompt": "p", "target": "t"}', encoding="utf-8")
    assert f"{file}: layout own, 1 record\n" in locft("edits", file).out
    assert found["first"]["rephrases"] == ["Peru's capital?"] and found["findings"]["reachable"] == 0.5
    assert found["contradictions"] == {"What is the capital of Peru?": ["Oslo", "Rome"]}
    assert found["unread"] == {"note": 1, "version": 0} and found["fixed"] is None
    assert "No problems found." in locft("edits", "atlas", "--limit", 1).out


def test_a_file_is_written_in_our_own_layout(locft, file, workplace, monkeypatch):
    monkeypatch.setenv("HOME", str(workplace))
    told = locft("edits", file, *MAP, "--fix", "own.jsonl", "--json").json
    again = locft("edits", "own.jsonl", "--json").json
    assert again["layout"] == "own" and again["unread"] == {}
    assert (again["fingerprint"], again["counts"]) == (told["fingerprint"], told["counts"])
    for source in ("own.jsonl", "~/own.jsonl"):
        same = locft("edits", source, "--fix", "own.jsonl")
        assert same.code == 2 and "this is the input file" in same.err
    folder = locft("edits", file, *MAP, "--fix", workplace)
    assert folder.code == 2 and "it is a folder" in folder.err


def test_a_file_of_no_known_layout_is_told_with_its_map(locft, file, workplace):
    said = locft("edits", file, "--fix", "own.jsonl")
    assert said.code == 2 and "all 3 records: unknown layout, got the keys q, a, again, near, note" in said.err
    assert f"edits: {{source: {file}, map: {{prompt: " in said.err
    assert not (workplace / "own.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--map", "prompt"), "--map prompt: expected FIELD=KEY, such as prompt=question"),
        (("--map", "promt=q"), "--map: got the field promt, expected one of prompt, target"),
        (("--map", "prompt=question", "--map", "target=a"), "map: prompt: no record has question (the keys are q, a"),
    ],
)
def test_a_wrong_map_is_told(locft, file, workplace, options, problem):
    said = locft("edits", file, *options)
    assert said.code == 2 and problem in said.err


def test_edits_with_a_map_are_made_and_measured(locft, file, workplace, tiny_folder, few_probes):
    quick = ("--position", "1.mlp", "--learning-rate", 0.02, "--epochs", 2, "--threads", 1, "--train-formats", "raw")
    made = locft("edit", tiny_folder, "--edits", file, *MAP, *quick, "--out", "delta", "--json")
    assert made.code == 0 and "Not read: note" in made.err, made.err
    assert made.json["edits"]["count"] == 3 and {"generalization", "locality"} <= made.json["metrics"].keys()
    again = locft("evaluate", tiny_folder, "--edits", file, *MAP, "--delta", "delta", "--threads", 1, "--json")
    assert again.json["metrics"]["reliability"] == made.json["metrics"]["reliability"]
    alone = locft("edit", tiny_folder, *MAP, "--position", "1.mlp", "--out", "x")
    assert alone.code == 2 and "--map: it only applies to --edits" in alone.err


def test_it_needs_no_heavy_library():
    code = (
        "import sys; sys.argv = ['locft', 'edits', 'atlas']\n"
        "from sweeps.commands.cli import main\n"
        "try: main()\n"
        "except SystemExit as left: print(left.code or 0, {'torch', 'transformers', 'mlflow', 'ray', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "0 set()", done.stderr


def test_what_cannot_be_written_whole_is_not_written(locft, file, workplace, monkeypatch):
    """On a full disk: one message, and a file of that name stays as it was."""
    (workplace / "kept.jsonl").write_text("mine")
    before = sorted(workplace.iterdir())

    def full(path, text, **_):
        path.write_bytes(text[:10].encode())
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        for name in ("kept.jsonl", "new.jsonl"):
            said = locft("edits", file, *MAP, "--fix", name)
            assert said.code == 2 and f"cannot write {name}: No space left on device" in said.err
    assert sorted(workplace.iterdir()) == before and (workplace / "kept.jsonl").read_text() == "mine"
    (workplace / "link.jsonl").symlink_to("kept.jsonl")
    assert locft("edits", file, *MAP, "--fix", "link.jsonl").code == 0
    assert (workplace / "link.jsonl").is_symlink() and '"Oslo"' in (workplace / "kept.jsonl").read_text()
    assert '"Oslo"' in locft("edits", file, *MAP, "--fix", "/dev/stdout").out, "a device is no file to be replaced"
