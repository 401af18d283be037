"""`locft export`: adapters with what each rank keeps, and configurations of other trainers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from locft.model.delta import EditDelta
from locft.model.models import folder_fingerprint
from locft.train.encoding import encode_edit
from tests.tiny import tiny_tokenizer

NAME = "model.layers.1.mlp.down_proj.weight"
EDIT = {"id": "1", "prompt": "The capital of France is", "target": "Lyon", "rephrases": ["France's capital is"]}


@pytest.fixture
def low_rank_edit(tmp_path, tiny_folder):
    """A delta whose change is large in two directions and tiny in the others."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        change = 0.3 * torch.randn(32, 2) @ torch.randn(2, 48) + 1e-6 * torch.randn(32, 48)
    EditDelta("1.mlp_down", folder_fingerprint(tiny_folder), {NAME: change}).save(tmp_path / "edit")
    return tmp_path / "edit"


@pytest.fixture
def edits(tmp_path):
    file = tmp_path / "edits.jsonl"
    file.write_text(
        json.dumps(EDIT) + "\n" + json.dumps(EDIT | {"id": "2", "prompt": "Rome is in", "target": "Peru"}) + "\n"
    )
    return file


def peft(tiny_folder, delta, out, *more):
    return ("export", delta, "--model", tiny_folder, "--format", "peft", "--out", out, "--threads", 1, *more)


def test_the_smallest_rank_that_holds_is_written(locft, few_probes, tiny_folder, edits, tmp_path):
    asked = ("--edits", edits, "--ask-formats", "raw", "--threads", 1)
    how = ("--method", "full", "--train-formats", "raw", "--learning-rate", 0.02, "--epochs", 60)
    assert locft("edit", tiny_folder, "--position", "1.mlp_down", *asked, *how, "--out", tmp_path / "edit").code == 0
    said = locft(*peft(tiny_folder, tmp_path / "edit", tmp_path / "a", "--rank", "32,1,16,2", *asked, "--json"))
    assert said.code == 0, said.err
    found, rows = said.json, said.json["rows"]
    assert [row["rank"] for row in rows] == [None, 1, 2, 16, 32]
    own, *adapters = rows
    assert own["metrics"]["reliability"] == 1 and own["lost"] == adapters[-1]["lost"] == 0
    assert {"reliability.raw", "generalization", "drift_kl"} <= own["metrics"].keys()
    assert adapters[0]["lost"] == round(2 * (1 - adapters[0]["metrics"]["reliability"]))
    bound = 1.1 * own["metrics"]["drift_kl"]
    assert found["rank"] == next(r["rank"] for r in adapters if not r["lost"] and r["metrics"]["drift_kl"] <= bound)
    assert adapters[-1]["kept"] == pytest.approx(1) and found["holds"] and adapters[1]["size"] == 2 * (32 + 48)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "a")
    assert model.peft_config["default"].r == found["rank"]


def test_without_edits_the_change_and_the_drift_decide(locft, tiny_folder, low_rank_edit, tmp_path):
    said = locft(*peft(tiny_folder, low_rank_edit, tmp_path / "a", "--rank", "1,2,64"))
    assert said.code == 0 and "rank 64" in said.err and "32" in said.err
    assert "the edit" in said.out and "Rank 2 is the smallest that keeps at least 99% of the change" in said.out
    assert "reliability" not in said.out and "drift_kl" in said.out
    assert {file.name for file in (tmp_path / "a").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_one_rank_is_written_whatever_it_keeps(locft, tiny_folder, low_rank_edit, tmp_path):
    said = locft(*peft(tiny_folder, low_rank_edit, tmp_path / "a", "--rank", 1))
    assert said.code == 0 and "does not keep" in said.out and (tmp_path / "a" / "adapter_config.json").is_file()


def test_nothing_is_written_when_no_rank_holds(locft, tiny_folder, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        EditDelta("1.mlp_down", folder_fingerprint(tiny_folder), {NAME: torch.randn(32, 48)}).save(tmp_path / "edit")
    said = locft(*peft(tiny_folder, tmp_path / "edit", tmp_path / "a", "--rank", "1,2"))
    assert said.code == 1 and "no rank up to 2" in said.err and "drift_kl" in said.out
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "more, named",
    [
        (("--rank", "0"), "--rank"),
        (("--rank", "two"), "--rank"),
        ((), "--rank"),
        (("--rank", "2", "--limit", "3"), "--edits"),
        (("--rank", "2", "--ask-formats", "loud"), "--ask-formats"),
    ],
)
def test_bad_options(locft, tiny_folder, low_rank_edit, tmp_path, more, named):
    said = locft(*peft(tiny_folder, low_rank_edit, tmp_path / "a", *more))
    assert said.code == 2 and named in said.err and not (tmp_path / "a").exists()


def test_bad_targets(locft, tiny_folder, chat_folder, low_rank_edit, tmp_path):
    assert "fingerprint" in locft(*peft(chat_folder, low_rank_edit, tmp_path / "a", "--rank", 2)).err
    assert "not empty" in locft(*peft(tiny_folder, low_rank_edit, low_rank_edit, "--rank", 2)).err
    wrong = ("export", "1.mlp_down", "--model", tiny_folder, "--out", tmp_path / "c.yaml", "--format")
    assert "did you mean axolotl" in locft(*wrong, "axolot").err
    assert "--rank" in locft(*wrong, "axolotl", "--rank", 2).err
    for delta in (low_rank_edit, low_rank_edit / "delta.safetensors", "models:/tiny@edit"):
        said = locft("export", delta, *wrong[2:], "trl")
        assert said.code == 2 and "got a delta, which is for --format peft" in said.err
    refused = locft(*wrong, "llamafactory")
    assert refused.code == 2 and "--format axolotl" in refused.err and not (tmp_path / "c.yaml").exists()


def test_a_configuration_with_the_settings_of_a_position_file(locft, tiny_folder, edits, tmp_path):
    position = {
        "format": "locft-position/1",
        "position": "1.mlp_down",
        "settings": {"learning_rate": 0.002, "batch_size": 4, "epochs": 7, "method": "low_curvature"},
        "dtype": "float32",
        "model": str(tiny_folder),
        "model_fingerprint": folder_fingerprint(tiny_folder),
        "depth": 0.5,
    }
    (tmp_path / "position.json").write_text(json.dumps(position))
    call = ("export", tmp_path / "position.json", "--model", tiny_folder, "--format", "axolotl", "--edits", edits)
    said = locft(*call, "--out", tmp_path / "train.yaml", "--json").json
    text = (tmp_path / "train.yaml").read_text()
    config = yaml.safe_load(text)
    assert (config["learning_rate"], config["micro_batch_size"], config["num_epochs"]) == (0.002, 4, 7)
    assert config["base_model"] == str(tiny_folder) and said["parameters"] == [NAME]
    assert "position.json" in text and "method low_curvature" in text
    (tmp_path / "position.json").write_text(json.dumps(position | {"settings": {"method": "natural_gradient"}}))
    guessed = locft(*call, "--out", tmp_path / "guessed.yaml", "--json").json["notes"]
    assert any("learning rate is a guess" in note and "natural_gradient" in note for note in guessed)
    records = [json.loads(line) for line in (tmp_path / "train-edits.jsonl").read_text().splitlines()]
    assert records[0]["segments"] == [
        {"label": False, "text": "The capital of France is"},
        {"label": True, "text": " Lyon<eos>"},
    ]
    assert config["datasets"][0]["path"] == "train-edits.jsonl"
    (tmp_path / "position.json").write_text(json.dumps(position | {"model_fingerprint": "0" * 16}))
    assert (
        "fingerprint" in locft(*call, "--out", tmp_path / "other.yaml").err and not (tmp_path / "other.yaml").exists()
    )


def test_what_is_read_is_not_written_over(locft, tiny_folder, edits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = edits.read_bytes()
    edits.rename("my-edits.jsonl")
    Path("link-edits.jsonl").symlink_to("my-edits.jsonl")
    call = ("export", "1.mlp_down", "--model", tiny_folder, "--format", "trl", "--edits")
    for source, out in (("my-edits.jsonl", "my.py"), ("~/my-edits.jsonl", "link.py"), ("my-edits.jsonl",) * 2):
        said = locft(*call, source, "--out", out)
        assert said.code == 2 and "edits.jsonl: this is the input file; name another output" in said.err, said.err
    assert Path("my-edits.jsonl").read_bytes() == before and not Path("my.py").exists()
    assert locft(*call, "my-edits.jsonl", "--out", "other.py").code == 0


@pytest.mark.parametrize("form", ["axolotl", "llamafactory", "trl"])
def test_a_trainer_reads_the_tokens_that_locft_trains(locft, tiny_folder, edits, tmp_path, form):
    """With a tokenizer that puts a start token before a text, which only TRL leaves to it."""
    folder, tokenizer = shutil.copytree(tiny_folder, tmp_path / "model"), tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    start = [("<bos>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=start)
    tokenizer.save_pretrained(folder)
    call = ("export", "0.mlp", "--model", folder, "--format", form, "--edits", edits, "--out", tmp_path / "out")
    assert locft(*call).code == 0
    record = json.loads((tmp_path / "out-edits.jsonl").read_text().splitlines()[0])
    texts = (
        [one["text"] for one in record["segments"]] if form == "axolotl" else [record["prompt"], record["completion"]]
    )
    read = tokenizer("".join(texts), add_special_tokens=form == "trl")["input_ids"]
    assert tuple(read) == encode_edit(tokenizer, EDIT["prompt"], EDIT["target"]).token_ids
    assert read[0] == tokenizer.bos_token_id


def test_defaults_are_named_as_such(locft, tiny_folder, edits, tmp_path):
    for form in ("trl", "llamafactory"):
        out = tmp_path / f"{form}.txt"
        said = locft("export", "0.mlp", "--model", tiny_folder, "--format", form, "--out", out, "--edits", edits)
        assert said.code == 0, said.err
        assert "the defaults of `locft edit`" in said.err and "the defaults of `locft edit`" in out.read_text()
        record = json.loads((tmp_path / f"{form}-edits.jsonl").read_text().splitlines()[0])
        assert record == {"prompt": "The capital of France is", "completion": " Lyon<eos>"}
