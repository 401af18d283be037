"""Texts that a model cannot compute are refused before anything is computed."""

import json

import pytest
from tokenizers import AddedToken

from locft.data.requests import load_edits
from locft.errors import InputError
from locft.limits import check_limits
from locft.workbench import Workbench
from tests.tiny import tiny_loaded, tiny_model, tiny_tokenizer


def problem_of(architecture, texts, **settings) -> str | None:
    try:
        check_limits(tiny_model(architecture, **settings), tiny_tokenizer(), "tiny", texts)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gpt_neo", "gptj"])
def test_positions_in_a_table_end(architecture):
    assert problem_of(architecture, [([5] * 256, 0), ([5] * 225, 32)]) is None
    assert "256 positions" in problem_of(architecture, [([5] * 257, 0)])
    assert "230 tokens with an answer of up to 32" in problem_of(architecture, [([5] * 230, 32)])


@pytest.mark.parametrize("architecture", ["llama", "bloom", "mamba"])
def test_computed_positions_do_not(architecture):
    assert problem_of(architecture, [([5] * 3000, 100)]) is None


def test_tokens_beyond_the_embedding_are_named():
    last = len(tiny_tokenizer()) - 1
    assert problem_of("llama", [([5, last], 0)]) is None
    found = problem_of("llama", [([5, last + 7], 0)] + [([last + 1, place], 0) for place in range(5)])
    assert f"it has {last + 1} embeddings" in found and f"token {last + 7} in" in found and "and 3 more" in found


def test_a_workbench_computes_nothing_then(tmp_path, monkeypatch):
    loaded = tiny_loaded("llama")
    loaded.tokenizer.add_tokens([AddedToken("Lyon", special=False)])
    file = tmp_path / "edits.jsonl"
    file.write_text('{"subject": "France", "prompt": "The capital of France is", "target": "Lyon"}\n')
    monkeypatch.setattr(type(loaded.model), "forward", lambda *_, **__: pytest.fail("the model computes"))
    with pytest.raises(InputError, match="its tokenizer produces token ids beyond"):
        Workbench.prepare(loaded, load_edits(str(file)), None)


def test_a_study_is_refused_when_it_is_planned(tmp_path, study_file, locft):
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    edit = {"subject": "France", "prompt": "The capital of France is " * 60, "target": "Lyon"}
    (tmp_path / "edits.jsonl").write_text(json.dumps(edit) + "\n")
    file = study_file(model=str(tmp_path / "model"), edits={"source": str(tmp_path / "edits.jsonl")})
    said = locft("plan", file)
    assert said.code == 2 and "it has 256 positions, and these texts need more" in said.err
