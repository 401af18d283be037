"""`locft ask`: answers before and after an edit, as the prompt is and through the chat template."""

import json

import pytest
import torch

from locft.model.delta import EditDelta
from locft.model.models import folder_fingerprint

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def edit(tmp_path):
    """A delta of a model that changes what it says."""

    def of(folder):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            delta = EditDelta("1.mlp_down", folder_fingerprint(folder), {NAME: torch.randn(32, 48)})
        delta.save(tmp_path / "edit")
        return tmp_path / "edit"

    return of


def test_before_and_after_in_every_format(locft, chat_folder, edit):
    prompts = ["The capital of France is", "Who played the trumpet?"]
    said = locft(
        "ask", chat_folder, *prompts, "--delta", edit(chat_folder), "--tokens", 8, "--threads", 1, "--json"
    ).json
    assert said["position"] == "1.mlp_down"
    answers = said["answers"]
    assert [(a["prompt"], a["format"]) for a in answers] == [(p, form) for p in prompts for form in ("raw", "chat")]
    assert any(answer["before"] != answer["after"] for answer in answers)
    again = locft("ask", chat_folder, *prompts, "--tokens", 8, "--threads", 1, "--json").json
    assert [a["before"] for a in again["answers"]] == [a["before"] for a in answers], "the model is as it was"
    assert again["position"] is None and {a["after"] for a in again["answers"]} == {None}


def test_in_words(locft, tiny_folder, edit):
    said = locft(
        "ask", tiny_folder, "The capital of France is", "--delta", edit(tiny_folder), "--tokens", 4, "--threads", 1
    )
    first, before, after = said.out.splitlines()[:3]
    assert said.code == 0 and first == "The capital of France is"
    assert before.split()[:2] == ["raw", "before"] and after.split()[:2] == ["raw", "after"]
    plain = locft("ask", tiny_folder, "The capital of France is", "--tokens", 4, "--threads", 1)
    assert plain.out.splitlines()[1].startswith("  raw ") and "before" not in plain.out


def test_what_cannot_be_asked(locft, tiny_folder, chat_folder, edit, tmp_path):
    assert "PROMPT 2" in locft("ask", tiny_folder, "a", " ").err
    assert locft("ask", tiny_folder).code == 2
    foreign = locft("ask", tiny_folder, "a", "--delta", edit(chat_folder))
    assert foreign.code == 2 and "fingerprint" in foreign.err
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "b"}))
    for call in (("ask", tiny_folder, "a", "--delta", adapter), ("ask", adapter, "a")):
        assert "PEFT adapter (LORA) for b" in locft(*call).err
