"""A merged model is its base with the edited tensors exchanged: by names, dtypes, files, and to the byte in all else."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from locft.errors import InputError
from locft.model import merge as merging
from locft.model.delta import EditDelta
from locft.model.merge import merge
from locft.model.models import folder_fingerprint, load_model, load_structure
from locft.model.positions import TuningPosition, list_positions, parameter_names
from tests.every_type import tiny_config
from tests.tiny import ARCHITECTURES, RELATED, chat_tokenizer, tiny_model, tiny_tokenizer

SIZES = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4)
TEXT = SIZES | dict(num_key_value_heads=2, head_dim=8, num_hidden_layers=3, vocab_size=400, eos_token_id=0)
EYE = SIZES | dict(image_size=28, patch_size=14)


def saved(folder: Path, model, **options) -> Path:
    model.save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def delta_at(folder: Path, position: str, size: float = 0.1) -> EditDelta:
    """A random change of everything that the position trains."""
    structure, where = load_structure(str(folder)), TuningPosition.parse(position)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = {
            name: size * torch.randn(structure.get_parameter(name).shape) for name in parameter_names(structure, where)
        }
    return EditDelta(position, folder_fingerprint(folder), tensors)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("model*.safetensors")) for key, value in load_file(file).items()}


def described(folder: Path) -> dict[str, tuple]:
    return {key: (value.dtype, value.shape) for key, value in stored(folder).items()}


def assert_loads_edited(base: Path, delta: EditDelta, folder: Path) -> None:
    """What is loaded from the merged folder is what base and delta give together, to the bit."""
    before, after = load_model(str(base), device="cpu").model, load_model(str(folder), device="cpu").model
    expected = delta.weights(before)
    for name, value in after.named_parameters():
        assert torch.equal(value, expected.get(name, before.get_parameter(name))), name


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *RELATED])
def test_every_position_of_every_architecture(architecture, tmp_path):
    """Whole layers reach everything: renamed, stacked, split and joined tensors."""
    base = saved(tmp_path / "base", tiny_model(architecture, layers=2))
    delta = delta_at(base, "1.layer")
    merged = merge(str(base), delta, tmp_path / "merged")
    assert described(tmp_path / "merged") == described(base)
    before, after = stored(base), stored(tmp_path / "merged")
    assert {key for key in before if not torch.equal(before[key], after[key])} == set(merged.tensors)
    assert merged.kept == pytest.approx(1, abs=1e-5) and merged.error < 1e-5 and not [*merged.sentences()]
    assert_loads_edited(base, delta, tmp_path / "merged")


def by_expert(folder: Path) -> None:
    """Rewrites stacked experts as the hub has them, one tensor for each."""
    tensors = {}
    for key, value in load_file(folder / "model.safetensors").items():
        if key.endswith("experts.down_proj"):
            tensors |= {f"{key[:-9]}{n}.down_proj.weight": one.clone() for n, one in enumerate(value)}
        elif key.endswith("experts.gate_up_proj"):
            for n, one in enumerate(value):
                for part, half in zip(("gate", "up"), one.chunk(2)):
                    tensors[f"{key[:-12]}{n}.{part}_proj.weight"] = half.clone()
        else:
            tensors[key] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("position", ["1.experts_down", "1.experts_gate_up"])
def test_experts_are_stored_one_by_one(position, tmp_path):
    base = saved(tmp_path / "base", tiny_model("qwen3_moe"))
    by_expert(base)
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in stored(base)
    delta = delta_at(base, position)
    (name,) = delta.tensors
    delta.tensors[name][2] = 0  # an expert that the edit leaves alone
    merged = merge(str(base), delta, tmp_path / "merged")
    assert described(tmp_path / "merged") == described(base)
    assert merged.tensors and not any(".experts.2." in key for key in merged.tensors)
    assert_loads_edited(base, delta, tmp_path / "merged")


def test_a_base_stored_without_the_prefix_of_the_causal_model(tmp_path):
    """As gpt2 is on the hub."""
    base = saved(tmp_path / "base", tiny_model("gpt2"))
    tensors = {key.removeprefix("transformer."): value for key, value in stored(base).items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    delta = delta_at(base, "1.mlp_down")
    assert merge(str(base), delta, tmp_path / "m").tensors == ("h.1.mlp.c_proj.bias", "h.1.mlp.c_proj.weight")
    assert_loads_edited(base, delta, tmp_path / "m")


def gemma3(vision_layers: int) -> Gemma3ForConditionalGeneration:
    text = TEXT | dict(sliding_window=8, query_pre_attn_scalar=8, bos_token_id=0, pad_token_id=0)
    places = dict(mm_tokens_per_image=4, boi_token_index=390, eoi_token_index=391, image_token_index=392)
    eye = EYE | dict(num_hidden_layers=vision_layers)
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=eye, **places))


def llava(vision_layers: int) -> LlavaForConditionalGeneration:
    text = TEXT | dict(model_type="llama")
    eye = EYE | dict(num_hidden_layers=vision_layers, model_type="clip_vision_model", projection_dim=32)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=eye, image_token_index=392))


def qwen3_vl(vision_layers: int) -> Qwen3VLForConditionalGeneration:
    text = TEXT | dict(rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4})
    eye = dict(
        hidden_size=32, intermediate_size=48, num_heads=4, depth=vision_layers, out_hidden_size=32, patch_size=14
    )
    eye |= dict(deepstack_visual_indexes=[0], num_position_embeddings=16)
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=eye, image_token_id=392))


@pytest.mark.parametrize("make", [gemma3, llava, qwen3_vl])
@pytest.mark.parametrize("vision_layers", [2, 3])
def test_vision_language_models_are_edited_in_their_text_half(make, vision_layers, tmp_path):
    base = saved(tmp_path / "base", make(vision_layers))
    found = list_positions(load_structure(str(base)))
    assert {info.position.layer for info in found} == {0, 1, 2}
    assert {"mlp_down", "mlp_gate", "attn_q", "attn", "layer"} <= {info.position.module for info in found}
    assert all("language_model" in name for info in found for name in info.names)
    delta = delta_at(base, "2.mlp_down")
    merge(str(base), delta, tmp_path / "merged")
    assert described(tmp_path / "merged") == described(base)
    config, other = (json.loads((place / "config.json").read_text()) for place in (base, tmp_path / "merged"))
    assert config == other and config["architectures"] == [type(make(2)).__name__]
    assert_loads_edited(base, delta, tmp_path / "merged")


def test_shards_index_and_every_other_file_stay_as_they_are(tmp_path):
    base = saved(tmp_path / "base", tiny_model(), max_shard_size="40KB")
    chat_tokenizer().save_pretrained(base)
    generation = {"do_sample": False, "temperature": 0.9, "repetition_penalty": 1.3, "eos_token_id": [0, 5]}
    (base / "generation_config.json").write_text(json.dumps(generation))  # contradicts itself, as many do
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (base / "pytorch_model.bin").write_bytes(b"the unedited weights once more")
    (base / ".git").mkdir()
    (base / ".git" / "config").write_text("[core]")
    delta = delta_at(base, "1.mlp_down")
    merged = merge(str(base), delta, tmp_path / "merged")
    assert merged.left_out == ("pytorch_model.bin",) and "pytorch_model.bin" in next(merged.sentences())

    def files(folder):
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    before, after = files(base), files(tmp_path / "merged")
    assert before.keys() - after.keys() == {"pytorch_model.bin", ".git/config"} and not after.keys() - before.keys()
    changed = [name for name in after if after[name] != before[name]]
    assert len(changed) == 1 and changed[0].startswith("model-0000")
    with safe_open(tmp_path / "merged" / changed[0], "pt") as tensors, safe_open(base / changed[0], "pt") as unedited:
        assert list(tensors.keys()) == list(unedited.keys()) and tensors.metadata() == unedited.metadata()
    assert_loads_edited(base, delta, tmp_path / "merged")


def test_the_stored_dtype_stays_and_what_rounding_takes_is_told(tmp_path):
    base = saved(tmp_path / "base", tiny_model().to(torch.bfloat16))
    large, small = (merge(str(base), delta_at(base, "1.mlp_down", s), tmp_path / str(s)) for s in (0.5, 1e-4))
    assert described(tmp_path / "0.0001") == described(base) and large.dtype == small.dtype == "bfloat16"
    assert large.kept == pytest.approx(1, abs=1e-3) and large.error < 0.01 and not [*large.sentences()]
    assert small.kept < 0.6 < small.error
    (sentence,) = small.sentences()
    assert f"{100 * small.kept:.0f}% of the edit's change is left" in sentence and "bfloat16" in sentence


def test_the_cached_snapshot_of_the_hub_is_copied_as_files(tmp_path):
    """The hub's cache holds links to its blobs."""
    blobs = saved(tmp_path / "blobs", tiny_model())
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    merge(str(snapshot), delta_at(snapshot, "1.mlp_down"), tmp_path / "merged")
    assert not any(file.is_symlink() for file in (tmp_path / "merged").iterdir())
    shutil.rmtree(blobs)
    assert load_model(str(tmp_path / "merged"), device="cpu")


def refused(*arguments) -> str:
    with pytest.raises(InputError) as caught:
        merge(*arguments)
    return str(caught.value)


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    base = saved(tmp_path / "base", tiny_model())
    delta = delta_at(base, "1.mlp_down")
    before = sorted(tmp_path.rglob("*"))

    for error in (OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")):

        def full(*_, error=error):
            raise error

        monkeypatch.setattr(merging, "_overwrite", full)
        message = refused(str(base), delta, tmp_path / "m")
        assert "cannot write" in message and "No space left on device" in message
    monkeypatch.setattr(merging, "_overwrite", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        merge(str(base), delta, tmp_path / "m")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    assert "0.0 MB are free" in refused(str(base), delta, tmp_path / "m")
    assert sorted(tmp_path.rglob("*")) == before


def test_into_the_base_itself_and_over_an_empty_folder(tmp_path):
    base = saved(tmp_path / "base", tiny_model())
    (base / "edited").mkdir()
    merge(str(base), delta_at(base, "1.mlp_down"), base / "edited")
    assert sorted(os.listdir(base / "edited")) == sorted(set(os.listdir(base)) - {"edited"})


def test_into_an_empty_folder_behind_a_link(tmp_path):
    base = saved(tmp_path / "base", tiny_model())
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    merge(str(base), delta_at(base, "1.mlp_down"), tmp_path / "link")
    assert (tmp_path / "disk" / "config.json").is_file() and (tmp_path / "link").is_symlink()


def test_what_does_not_fit_is_refused(tmp_path):
    base = saved(tmp_path / "base", tiny_model())
    delta = delta_at(base, "1.mlp_down")
    assert "fingerprint" in refused(str(base), EditDelta("1.mlp_down", "0" * 16, delta.tensors), tmp_path / "m")
    other = EditDelta("1.mlp_down", delta.base_fingerprint, {"model.layers.1.mlp.absent.weight": torch.ones(2, 2)})
    assert "stores no tensor model.layers.1.mlp.absent.weight" in refused(str(base), other, tmp_path / "m")
    half = saved(tmp_path / "half", tiny_model().to(torch.float16))
    assert "overflow" in refused(str(half), delta_at(half, "1.mlp_down", 1e6), tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("model_type", ["qwen3_5", "llama4"])
def test_a_vision_language_model_whose_text_half_is_loaded_alone_is_saved_whole(model_type, tmp_path):
    config = tiny_config(model_type)
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]._from_config(config)
    base = saved(tmp_path / "base", whole)
    delta = delta_at(base, "1.attn_o")
    merged = merge(str(base), delta, tmp_path / "merged")
    assert described(tmp_path / "merged") == described(base) and any(
        "vision" in key or "visual" in key for key in stored(base)
    )
    assert len(merged.tensors) == 1 and "language_model" in merged.tensors[0]
    assert_loads_edited(base, delta, tmp_path / "merged")
