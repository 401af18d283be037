"""The edited model as a folder: the base's own files, in which only the edited tensors differ.

The model is not loaded. The change of a parameter is mapped to the names under which the base stores it (another prefix,
a tensor for each expert), added to the stored value, rounded to the stored dtype and written to its place in a copy of the
file. So names, dtypes, shards, tied weights and every other byte are the base's.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key, revert_weight_conversion

from locft.errors import InputError, listed, one_line
from locft.model.checkpoint import INDEX, WHOLE, dtypes, opened, weight_files
from locft.model.delta import EditDelta
from locft.model.models import BUILT_IN, folder_fingerprint, load_structure, model_folder

OTHER_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz",
    ".index.json",
)  # fmt: skip
"""Endings of files that hold, or list, other weights: if copied, they would still be those of the unedited model."""
ROUNDED = 0.01
"""Rounding error, as a share of the change, above which the user gets a notice."""


@dataclass(frozen=True)
class Merged:
    """A folder with an edited model, and how much of the edit is in it."""

    folder: Path
    tensors: tuple[str, ...]
    """The tensors that were edited, by their names in the base's files."""
    dtype: str
    """The dtype they are stored in, as in the base; several are separated by commas."""
    kept: float
    """Share of the edit's change that is left after rounding to that dtype: the component along the change, 1 for all."""
    error: float
    """Rounding error: the norm of the difference from the change, as a share of the change's norm."""
    left_out: tuple[str, ...]
    """Files of the base that hold other, unedited weights."""
    converted: bool
    """True if the base is a GGUF file, as the built-in model is: its dense form is written."""

    def sentences(self) -> Iterator[str]:
        """Notices for the user."""
        if self.converted:
            yield f"the base is a GGUF file, so its dense {self.dtype} conversion was written"
        if self.left_out:
            yield f"not copied, because they hold unedited weights in another format: {listed(self.left_out, 4)}"
        if self.error > ROUNDED:
            yield (
                f"stored as {self.dtype}, as in the base: {100 * self.kept:.0f}% of the edit's change is left after "
                f"rounding, with an error of {100 * self.error:.0f}% of its norm; `locft evaluate {self.folder} --edits "
                "FILE` measures the result, and with --dtype bfloat16 or float16 `locft edit` measures an edit as it will be stored"
            )


def merge(name: str, delta: EditDelta, folder: Path, *, trust_remote_code: bool = False) -> Merged:
    """Write the edited model to `folder`, which must be empty or not exist yet; it appears when it is complete.

    name: that of the base, as for `load_model`. Raises InputError if the base is not the delta's, does not store what the delta
    changes, cannot hold the edited values, or if the folder cannot be written.
    """
    base = model_folder(name, trust_remote_code=trust_remote_code).absolute()
    files = weight_files(base)
    delta.require_base(name, folder_fingerprint(base))
    places = {key: file for file in files for key, _ in dtypes(file)}
    structure = load_structure(name, trust_remote_code=trust_remote_code)
    changes = stored_changes(structure, tuple(places), delta.tensors)
    copied, left_out = _other_files(base, files, folder.absolute())
    copied += [file.relative_to(base) for file in files]
    needed = sum((base / file).stat().st_size for file in copied)
    free = shutil.disk_usage(next(place for place in folder.absolute().parents if place.exists())).free
    if needed > free:
        raise InputError(
            f"cannot write {folder}: it needs {needed / 1e6:,.1f} MB, but only {free / 1e6:,.1f} MB are free there"
        )
    along = off = total = 0.0
    stored_as = set[str]()
    with appears_whole(folder.absolute()) as partial:
        for file in copied:
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base / file, partial / file)
        for key, change in changes.items():
            with opened(places[key]) as tensors:
                stored = tensors.get_tensor(key)
            value = _edited(key, stored, change)
            _overwrite(partial / places[key].relative_to(base), key, value)
            real = value.double() - stored.double()
            along += float((real * change).sum())
            off += float((real - change).square().sum())
            total += float(change.double().square().sum())
            stored_as.add(str(stored.dtype).removeprefix("torch."))
    kept, error = (along / total, math.sqrt(off / total)) if total else (1.0, 0.0)
    converted = name in BUILT_IN or Path(name).expanduser().is_file()
    return Merged(folder, tuple(changes), ", ".join(sorted(stored_as)), kept, error, left_out, converted)


def stored_changes(
    model: PreTrainedModel, stored: Sequence[str], changes: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The changes in float32, by the names under which a checkpoint stores the changed tensors.

    model: its structure, on the meta device. stored: all names of the checkpoint. changes: by the model's own names. Where
    transformers joins or splits stored tensors while loading, the same tables, reversed, split or join the changes; what
    was not changed is left out. Raises InputError if the checkpoint has no such tensor.
    """
    there = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    for name in stored:  # this marks the entries of the table that are used
        rename_source_key(name, renamings, converters, model.base_model_prefix, there)
    model._weight_conversions = [entry for entry in transforms if entry.was_used()]  # type: ignore[assignment]
    # A stored tensor may be made of several parameters, so the others of the block are passed along unchanged.
    blocks = {_block_of(name) for name in changes}
    unchanged = {
        name: torch.zeros(()).expand(value.shape) for name, value in there.items() if _block_of(name) in blocks
    }
    found = {}
    known, prefix = set(stored), f"{model.base_model_prefix}."
    for name, change in revert_weight_conversion(model, unchanged | dict(changes)).items():
        if not change.any():
            continue
        names = (name, name.removeprefix(prefix), prefix + name)
        place = next((candidate for candidate in names if candidate in known), None)
        if place is None:
            raise InputError(f"the delta changes {', '.join(changes)}, but the base stores no tensor {name}")
        found[place] = change.contiguous()
    norms = [sum(float(t.double().square().sum()) for t in group.values()) for group in (found, changes)]
    if not math.isclose(*norms, rel_tol=1e-6):
        raise InputError(f"cannot tell from transformers how the base stores {', '.join(changes)}")
    return found


def _block_of(name: str) -> str:
    """The part of a parameter's name up to the number of its block; all of it where there is none."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name


def _edited(key: str, stored: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """The stored tensor with the change added, in its dtype. Raises InputError if the dtype cannot hold the values."""
    if stored.shape != change.shape:
        raise InputError(f"the base stores {key} as {tuple(stored.shape)}, the delta changes {tuple(change.shape)}")
    value = (stored.to(torch.promote_types(stored.dtype, torch.float32)) + change).to(stored.dtype)
    if not value.isfinite().all() and stored.isfinite().all():
        raise InputError(f"{key} is stored as {stored.dtype}, which cannot hold the edited values: they overflow")
    return value


def _overwrite(file: Path, key: str, value: torch.Tensor) -> None:
    """Overwrite a tensor in a safetensors file with one of the same dtype and shape."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        begin, end = json.loads(stream.read(size))[key]["data_offsets"]
        raw = value.contiguous().reshape(-1).view(torch.uint8).numpy()
        assert len(raw) == end - begin, f"{key} has {len(raw)} bytes, its place {end - begin}"
        stream.seek(8 + size + begin)
        stream.write(raw.data)


def _other_files(base: Path, files: Sequence[Path], folder: Path) -> tuple[list[Path], tuple[str, ...]]:
    """Files copied in addition to the weights, and files left out because they hold other weights; paths inside the base."""
    copied, left_out = [], []
    for place, folders, names in os.walk(base):
        folders[:] = [name for name in folders if not name.startswith(".") and Path(place, name) != folder]
        for file in (Path(place, name) for name in sorted(names)):
            if file in files or file.name.startswith("."):
                continue
            index = file == base / INDEX and base / WHOLE not in files
            if file.name.endswith(OTHER_WEIGHTS) and not index:
                left_out.append(str(file.relative_to(base)))
            else:
                copied.append(file.relative_to(base))
    return copied, tuple(left_out)


@contextmanager
def appears_whole(folder: Path) -> Iterator[Path]:
    """A folder next to `folder` that takes its place at the end of the block; nothing is left of it if the block fails."""
    folder = folder.resolve()  # a folder cannot replace a link
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {folder}: {getattr(error, 'strerror', None) or one_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
