"""Bad input of every kind, through the command: one clear error on standard error, exit code 2, nothing written."""

import json
import shutil
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tests.conftest import write_study

EDIT = {"subject": "France", "prompt": "The capital of France is", "target": "Lyon"}
ADAPTER = {"adapter/adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "some/base"}'}
QUANTIZED = {"q/config.json": '{"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}'}
ON_EDITS = "evaluate {model} --edits"


def lines(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@dataclass(frozen=True)
class Bad:
    """A call, what its error has to name, and the files that it finds in the working directory."""

    about: str
    call: str
    """Of the command; {model}, {closed} (an address where nothing listens) and {folder} are filled in."""
    named: tuple[str, ...]
    files: dict[str, str | bytes] = field(default_factory=dict)
    first: bool = True
    """Whether the error is all there is on standard error; otherwise it comes after what the study is."""


CASES = [
    # edits
    Bad("missing edit file", f"{ON_EDITS} nothing.json", ("nothing.json", "no such file")),
    Bad("broken JSON", f"{ON_EDITS} e.jsonl", ("e.jsonl", "line 2"), {"e.jsonl": lines(EDIT) + '{"subject": \n'}),
    Bad("no edits", f"{ON_EDITS} e.jsonl", ("e.jsonl", "no "), {"e.jsonl": "\n"}),
    Bad("missing field", f"{ON_EDITS} e.jsonl", ("target",), {"e.jsonl": lines({**EDIT, "target": None}, EDIT)}),
    Bad("wrong type", f"{ON_EDITS} e.jsonl", ("e.jsonl", "target", "5"), {"e.jsonl": lines({**EDIT, "target": 5})}),
    Bad("unknown layout", f"{ON_EDITS} e.json", ("e.json", "colour"), {"e.json": '[{"colour": "red"}]'}),
    Bad("not UTF-8", f"{ON_EDITS} e.jsonl", ("e.jsonl", "line 1", "UTF-8"), {"e.jsonl": b'{"subject": "\xff\xfe"}\n'}),
    Bad("no name at all", f"{ON_EDITS} ''", ("--edits",)),
    Bad("none of the edits wanted", f"{ON_EDITS} atlas --limit 0", ("--limit",)),
    # models
    Bad("unknown model", "evaluate smollm2-136m --edits atlas", ("smollm2-136m", "smollm2-135m")),
    Bad("folder without a model", "positions empty", ("empty", "config.json"), {"empty/readme.txt": "nothing"}),
    Bad("file that is no model", "positions m.bin", ("m.bin", "gguf"), {"m.bin": "nothing"}),
    Bad("damaged weights", "evaluate damaged --edits atlas", ("damaged", "model.safetensors"), {"damaged/?": ""}),
    Bad("nonsense dtype", f"{ON_EDITS} atlas --dtype float31", ("float31", "float32")),
    Bad("no such device", f"{ON_EDITS} atlas --device tpu", ("tpu",)),
    Bad("no GPU here", f"{ON_EDITS} atlas --device cuda:99", ("cuda:99", "use auto or cpu")),
    Bad("no thread", f"{ON_EDITS} atlas --threads 0", ("--threads",)),
    # one edit
    Bad("layer 99", "edit {model} --edits atlas --position 99.mlp --out o", ("layer 99", "0 to 2")),
    Bad("unknown module", "edit {model} --edits atlas --position 1.mlp_dwon --out o", ("mlp_dwon", "mlp_down")),
    Bad("malformed position", "edit {model} --edits atlas --position mlp.1 --out o", ("mlp.1", "22.mlp_down")),
    Bad("no position", "edit {model} --edits atlas --out o", ("--position", "--from-run")),
    Bad("no edits named", "edit {model} --position 1.mlp --out o", ("--edits",)),
    Bad("no folder named", "edit {model} --edits atlas --position 1.mlp", ("--out",)),
    Bad(
        "several bad options",
        "edit {model} --edits atlas --position 1.mlp --out o --learning-rate -1 --batch-size 0 --pipeline deep",
        ("3 problems", "--learning-rate: got -1.0", "--batch-size: got 0", '"deep"'),
    ),
    Bad("a word for a number", "edit {model} --edits atlas --position 1.mlp --out o --epochs many", ("--epochs",)),
    Bad("folder under a file", "edit {model} --edits atlas --position 1.mlp --out f/o", ("f",), {"f": "text"}),
    Bad("unknown run", "edit {model} --from-run 0123456789abcdef --out o", ("0123456789abcdef",), {"mlflow.db?": ""}),
    Bad("run without a store", "edit {model} --from-run 0123456789abcdef --out o", ("mlflow.db",)),
    # deltas
    Bad("no delta", "apply d --model {model} --out o", ("d", "no such file")),
    Bad("delta that is none", "apply d --model {model} --out o", ("d", "safetensors"), {"d": "text"}),
    Bad("weights that are no delta", "apply w --model {model} --out o", ("w", "locft-delta-1"), {"w?": ""}),
    Bad("foreign delta", "apply foreign --model {model} --out o", ("fingerprint",), {"foreign?": ""}),
    Bad("foreign delta", "evaluate {model} --edits atlas --delta foreign", ("fingerprint",), {"foreign?": ""}),
    Bad("model over something", "apply foreign --model {model} --out full", ("full",), {"foreign?": "", "full/x": ""}),
    Bad(
        "adapter for a delta", "apply adapter --model {model} --out o", ("PEFT adapter (LORA) for some/base",), ADAPTER
    ),
    Bad("adapter for a model", "evaluate adapter --edits atlas", ("PEFT adapter (LORA) for some/base",), ADAPTER),
    Bad("model for a delta", "apply {model} --model {model} --out o", ("whole model", "delta.safetensors")),
    Bad("quantized model", "edit q --edits atlas --position 1.mlp --out o", ("fp8", "dense"), QUANTIZED),
    Bad("quantized model", "plan study.yaml --set model=./q", ("fp8", "dense"), QUANTIZED),
    Bad("nothing to ask", "ask {model}", ("PROMPT",)),
    # studies
    Bad("unknown study", "plan quikstart", ("quikstart", "did you mean quickstart")),
    Bad("file of nearly that name", "plan stdy.yaml", ("stdy.yaml", "study.yaml")),
    Bad("broken YAML", "plan s.yaml", ("s.yaml:3",), {"s.yaml": "name: x\nspace: [1,\n"}),
    Bad("unknown key", "plan study.yaml --set modle=x", ("modle", "model")),
    Bad("override without a value", "plan study.yaml --set space.layer", ("--set space.layer", "field=value")),
    Bad("layer out of range", "plan study.yaml --set space.layer=[1,99]", ("layer 99", "0 to 2")),
    Bad("module it has not", "sweep study.yaml --set space.module=mlp_dwon", ("mlp_dwon", "mlp_down")),
    Bad("negative learning rate", "sweep study.yaml --set space.learning_rate=-1", ("space.learning_rate", "-1")),
    Bad("zero batch", "status study.yaml --set space.batch_size=0", ("space.batch_size", "0")),
    Bad("unknown search", "sweep study.yaml --set search.method=bayes", ("search.method", "bayes", "optuna")),
    Bad("search without trials", "plan study.yaml --set search.method=random", ("search.trials",)),
    Bad("contradiction", "plan study.yaml --set resources.gpus=1 --set device=cpu", ("resources.gpus", "device")),
    Bad("missing task file", "plan study.yaml --set capability.tasks.a=./a.jsonl", ("capability.tasks.a", "a.jsonl")),
    Bad("all at once", "plan bad.yaml", ("3 problems", "space.layer", "e.json", "t.jsonl"), {"bad.yaml?": ""}),
    Bad("results of nothing", "report study.yaml", ("locft sweep study.yaml",)),
    # selections
    Bad("missing edit file", "select {model} --edits nothing.json", ("nothing.json", "no such file")),
    Bad("unknown model", "select smollm2-136m --edits atlas", ("smollm2-136m", "smollm2-135m")),
    Bad(
        "two budgets",
        "select {model} --edits atlas --budget-share 1 --budget-minutes 5",
        ("--budget-minutes", "got both"),
    ),
    Bad("more than the grid", "select {model} --edits atlas --budget-share 2", ("--budget-share", "got 2")),
    Bad("no prior", "select {model} --edits atlas --prior p.json", ("p.json",)),
    Bad("what it chooses", "select {model} --edits atlas --set space.seed=[0,1]", ("space.seed",)),
    Bad(
        "answer over the edits",
        "select {model} --edits e.jsonl --out e.jsonl",
        ("e.jsonl: this is the input file",),
        {"e.jsonl": lines(EDIT)},
    ),
    Bad("answer on a folder", "select {model} --edits atlas --out d", ("it is a folder",), {"d/x": ""}),
    Bad("answer under its page", "select {model} --edits atlas --out a.html", ("--out a.html", "another ending")),
    # stores, machines, clusters
    Bad("no tracking server", "sweep study.yaml --tracking-uri http://{closed}", ("{closed}",), first=False),
    Bad("no tracking server", "status study.yaml --tracking-uri http://{closed}", ("{closed}",)),
    Bad("plain folder as a store", "sweep study.yaml --tracking-uri runs", ("runs", "sqlite:///"), first=False),
    Bad("unknown scheme", "status study.yaml --tracking-uri ftp://x/y", ("ftp",)),
    Bad(
        "store under a file",
        "status study.yaml --tracking-uri sqlite:///f/m.db",
        ("/f: Not a directory",),
        {"f": "text"},
    ),
    Bad("store under a file", "sweep study.yaml --tracking-uri sqlite:///f/m.db", ("f",), {"f": "text"}, first=False),
    Bad("store in no folder", "status study.yaml --tracking-uri sqlite:///new/m.db", ("new/m.db", "locft sweep")),
    Bad("store that is not there", "status study.yaml --tracking-uri sqlite:///typo.db", ("typo.db",)),
    Bad("file that is no store", "status study.yaml --tracking-uri sqlite:///f.db", ("f.db",), {"f.db": "some text"}),
    Bad("dashboard under a file", "sweep study.yaml --out f/x.html", ("f/x.html",), {"f": "text"}),
    Bad("dashboard on a folder", "sweep study.yaml --out d", ("it is a folder",), {"d/x": ""}),
    Bad("dashboard over the study", "sweep study.yaml --out ./study.yaml", ("study.yaml: this is the input file",)),
    Bad("dashboard over the study", "report study.yaml --out study.yaml", ("study.yaml: this is the input file",)),
    Bad(
        "dashboard over the other study",
        "report study.yaml --compare other.yaml --out other.yaml",
        ("other.yaml: this is the input file",),
        {"other.yaml?": ""},
    ),
    Bad("GPU without one", "sweep study.yaml --set resources.gpus=99", ("99 GPUs", "GPUs; request less"), first=False),
    Bad("more CPUs than there are", "sweep study.yaml --set resources.cpus=999", ("999 CPUs",), first=False),
    Bad("no cluster there", "sweep study.yaml --address {closed}", ("{closed}", "ray start"), first=False),
    # the command itself
    Bad("unknown command", "swep study.yaml", ("swep", "sweep")),
    Bad("unknown option", "plan study.yaml --fast", ("--fast",)),
    Bad("missing argument", "sweep", ("STUDY",)),
]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A delta of another model."""
    from locft.model.delta import EditDelta

    delta = EditDelta("1.mlp_down", "0" * 16, {"model.layers.1.mlp.down_proj.weight": torch.zeros(32, 48)})
    return delta.save(tmp_path_factory.mktemp("delta"))


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_folder):
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path, tiny_folder, name="study")
    return tmp_path


@pytest.fixture
def closed():
    """HOST:PORT where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def furnish(folder: Path, bad: Bad, tiny_folder, foreign, empty_store) -> None:
    """The files of a case; a name that ends in ? is of a kind that takes more than a text."""
    for name, content in bad.files.items():
        file = folder / name
        if name == "damaged/?":
            shutil.copytree(tiny_folder, folder / "damaged")
            weights = folder / "damaged" / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:1000])
        elif name == "mlflow.db?":
            shutil.copy(empty_store, folder / "mlflow.db")
        elif name == "w?":
            shutil.copy(tiny_folder / "model.safetensors", folder / "w")
        elif name == "foreign?":
            shutil.copytree(foreign.parent, folder / "foreign")
        elif name == "other.yaml?":
            write_study(folder, tiny_folder, name="other")
        elif name == "bad.yaml?":
            changes = {"edits__source": "./e.json", "capability__tasks": {"arc": "./t.jsonl"}, "space__layer": [-1]}
            write_study(folder, tiny_folder, name="bad", **changes)
        else:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: f"{bad.call.split()[0]}: {bad.about}")
@pytest.mark.parametrize("as_json", [False, True], ids=["words", "json"])
def test_bad_input(bad, as_json, locft, folder, tiny_folder, closed, foreign, empty_store):
    furnish(folder, bad, tiny_folder, foreign, empty_store)
    before = sorted(folder.rglob("*"))
    call = bad.call.format(model=tiny_folder, closed=closed).replace("''", "").split(" ")
    began = time.monotonic()
    said = locft(*call, *(["--json"] if as_json and bad.call != "sweep" else []))
    assert time.monotonic() - began < 20
    assert said.code == 2, said.err
    assert said.out == ""
    told = said.err[said.err.index("error: ") :]
    if bad.first:
        assert told == said.err
    for name in bad.named:
        assert name.format(closed=closed) in told
    assert sorted(folder.rglob("*")) == before, "nothing is written"


def test_there_are_cases_for_every_command():
    commands = {bad.call.split()[0] for bad in CASES}
    assert {"positions", "plan", "sweep", "status", "report", "select", "edit", "apply", "evaluate"} <= commands
