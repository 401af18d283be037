"""What a model's folder holds, found from its configuration and the headers of its weights, before any weights are loaded."""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from locft.errors import InputError, listed, one_line

CONFIG = "config.json"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DELTA, FORMAT = "delta.safetensors", "locft-delta-1"
QUANTIZED_BY = ("quantization_config", "compression_config", "quantization")
"""Keys of a configuration that say how its weights are quantized: transformers', compressed-tensors' and MLX's."""
QUANTIZED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Separate files in which AutoGPTQ, AutoAWQ and ModelOpt say the same."""
_POINTER = b"version https://git-lfs"
CODES = ("weight", "qweight", "packed", "blocks", "codes")
"""Endings of the names of matrices that are stored as integer codes; other integer tensors are masks and positions."""


def require_model(name: str, folder: Path) -> None:
    """Raise InputError unless the folder holds a model of dense weights, as far as file names and configuration show."""
    if (folder / ADAPTER_CONFIG).is_file():
        if (folder / WHOLE).is_file() or (folder / INDEX).is_file():
            raise InputError(
                f"model {name!r}: a PEFT adapter ({ADAPTER_CONFIG}) is in the same folder as the model's weights, and "
                "loading would apply it on top of them; move the adapter into a folder of its own, "
                "or merge it first (merge_and_unload)"
            )
        raise InputError(f"model {name!r}: {_adapter(folder)}, not a whole model; {_MERGE_IT}")
    if not (folder / CONFIG).is_file():
        if (folder / DELTA).is_file():
            raise InputError(
                f"model {name!r}: this is the delta of an edit ({DELTA}), not a whole model; give the model it was made "
                "on, and pass the delta with --delta, or write the edited model with `locft apply`"
            )
        raise InputError(f"model folder {name}: expected a {CONFIG} in it, found none")
    try:
        found = _quantized(_json_object(folder / CONFIG))
    except (ValueError, OSError) as error:
        raise InputError(f"{folder / CONFIG}: expected a JSON object: {one_line(error)}") from error
    told = (f"according to {file}" for file in QUANTIZED_FILES if (folder / file).is_file())
    if found := found or next(told, None):
        raise InputError(_dense_wanted(name, found))


def require_dense_weights(name: str, files: tuple[Path, ...]) -> None:
    """Raise InputError if weights are stored as float8 or as integer codes, which the configuration may fail to mention."""
    for file in files:
        for key, dtype in dtypes(file):
            codes = dtype[0] in "IU" and key.rpartition(".")[2].endswith(CODES)
            if dtype.startswith(("F8", "F6_", "F4")) or codes:  # F64 is dense
                raise InputError(_dense_wanted(name, f"{key} in {file.name} has dtype {dtype}"))


def dtypes(file: Path) -> Iterator[tuple[str, str]]:
    """Name and dtype (as safetensors calls it) of every tensor of a file; reads no values. Raises InputError."""
    with opened(file) as tensors:
        yield from ((key, tensors.get_slice(key).get_dtype()) for key in tensors.keys())  # noqa: SIM118


@contextmanager
def opened(file: Path, what: str = "model file") -> Iterator[Any]:
    """A safetensors file to read from. Raises InputError if it cannot be read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        cause = one_line(error)
        with suppress(OSError), file.open("rb") as start:
            if start.read(len(_POINTER)) == _POINTER:
                cause = "it is a Git LFS pointer; run `git lfs pull` in that folder to fetch the file itself"
        raise InputError(f"{what} {file}: not readable as safetensors: {cause}") from error


def write_tensors(tensors: Mapping[str, torch.Tensor], file: Path, about: dict[str, str]) -> None:
    """Write a safetensors file, which appears whole or not at all. Raises OSError and SafetensorError.

    It has the permissions of any other new file: the library would let only its owner read it.
    """
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        partial.touch()
        readable = partial.stat().st_mode
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial, metadata=about)
        partial.chmod(readable)
        partial.replace(file)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files that transformers loads from a folder; others (a delta, a copy) are ignored."""
    if (whole := folder / WHOLE).is_file():
        return (whole,)
    index = folder / INDEX
    if not index.is_file():
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
        raise InputError(
            f"model folder {folder}: expected {WHOLE} or {INDEX} in it, found {found}; other weight formats are not read "
            "(transformers' save_pretrained writes safetensors)"
        )
    try:
        names = sorted(set(_json_object(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: expected a JSON object with a weight_map: {one_line(error)}") from error
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise InputError(f"{index}: {len(absent)} of {len(names)} files are missing: {listed(absent, 4)}")
    return tuple(folder / name for name in names)


def _json_object(file: Path) -> dict[str, Any]:
    """Raises ValueError or OSError if the file does not hold one."""
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"got {type(found).__name__}")
    return found


def no_delta(path: Path, names: Collection[str] = ()) -> str | None:
    """A message for the user if an adapter or a model lies at a path where a delta is expected, else None.

    names: those of the tensors, if the path is a file.
    """
    folder = path if path.is_dir() else path.parent
    if (path / ADAPTER_CONFIG).is_file() or path.name == ADAPTER_WEIGHTS or any(".lora_" in name for name in names):
        return f"delta {path}: {_adapter(folder)}; {_MERGE_IT}. LocFT's deltas are {DELTA}, which `locft edit` writes"
    if (path / CONFIG).is_file() or (names and (folder / CONFIG).is_file()):
        return (
            f"delta {path}: this is a whole model{' or a part of one' if names else ''}, expected a {DELTA} (format "
            f"{FORMAT}) or a folder that holds one, which `locft edit` writes; pass the model as its own argument"
        )
    return None


_MERGE_IT = "merge it into its base first (PEFT's merge_and_unload, then save_pretrained) and give the merged folder"


def _adapter(folder: Path) -> str:
    """What kind of adapter a folder holds, and for which base."""
    about: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        about = _json_object(folder / ADAPTER_CONFIG)
    kind, base = about.get("peft_type"), about.get("base_model_name_or_path")
    return f"this is a PEFT adapter{f' ({kind})' if kind else ''} for {base or 'an unnamed base model'}"


def _quantized(config: Mapping[str, Any]) -> str | None:
    """How a configuration, or one inside it (of the text model), says that the weights are quantized; None if dense."""
    for key in QUANTIZED_BY:
        if isinstance(about := config.get(key), Mapping) and about:
            method = about.get("quant_method") or about.get("quant_algo") or key.removesuffix("_config")
            details = [f"{about[name]} {label}" for name, label in _DETAILS.items() if about.get(name) is not None]
            return ", ".join([str(method), *details])
    inner = (_quantized(part) for part in config.values() if isinstance(part, Mapping))
    return next((found for found in inner if found), None)


_DETAILS = {"bits": "bits", "w_bit": "bits", "fmt": "format", "format": "format"}


def _dense_wanted(name: str, how: str) -> str:
    return (
        f"model {name!r}: its weights are quantized ({how}), and an edit changes dense weights; give the dense checkpoint "
        "that it was made from (bfloat16, float16 or float32), edit that, and quantize the merged model again"
    )
