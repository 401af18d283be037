"""Hidden states of the unedited model at the layers where trials begin: computed once, used by every trial.

Legend: U unique tokens (nodes of the prefix tree), D hidden.

The states are kept in files that every worker of a node maps into memory, so that they are there once per node however
many workers read them, and the operating system drops and rereads pages as memory allows. Another node computes its
own: one forward pass is cheaper than shipping gigabytes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from transformers import PreTrainedModel

from locft.encoding import TokenRow
from locft.models import cache_folder
from locft.packing import PrefixTree, pack_rows
from locft.tail import capture_boundary

VERSION = 2
"""Of the files; raised when the same key would hold other numbers."""
TOKENS_AT_ONCE = 2048
"""Tokens of one forward pass while states are computed."""
NOT_COMPUTED_WITH = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Entries of a configuration that change no hidden state."""
LIMIT_BYTES = int(os.environ.get("LOCFT_STATES_BYTES", 16 * 2**30))
"""Disk that all stored states may take together; the least recently used go first."""

_STORED = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.int16}  # numpy has no bfloat16


@dataclass(frozen=True)
class BoundaryStates:
    """Hidden states entering some layers, for every node of a tree."""

    layers: Mapping[int, torch.Tensor]  # layer -> (U, D)
    thinned: bool = False
    """Not all layers asked for could be stored."""

    def below(self, layer: int) -> int:
        """The highest stored layer that is not above `layer`: the nearest place to start from."""
        return max(stored for stored in self.layers if stored <= layer)

    def gather(self, layer: int, nodes: torch.Tensor) -> torch.Tensor:
        """States of a pack's nodes (G, N) entering a stored layer, (G, N, D); zeros behind the ends (node -1)."""
        states = self.layers[layer][nodes.clamp(min=0)]
        return states * (nodes >= 0)[..., None] if (nodes < 0).any() else states


def boundary_states(
    model: PreTrainedModel,
    fingerprint: str,
    tree: PrefixTree,
    rows: Iterable[TokenRow],
    layers: Iterable[int],
    limit: int,
    *,
    on_disk: bool = True,
) -> BoundaryStates:
    """States of all nodes entering the given layers, from files of an earlier call where there are some.

    rows: those of the tree. limit: as of `pack_rows`. on_disk: False keeps the states in this process's memory, for a
    single edit. When the layers do not fit into `LIMIT_BYTES`, evenly spaced ones are stored, always the lowest; a trial
    between them starts from the next one below (`BoundaryStates.below`).
    """
    wanted = sorted(set(layers))
    rows = list(rows)
    if not on_disk:
        return BoundaryStates(_computed(model, tree, rows, wanted, limit, None))
    config = {name: value for name, value in model.config.to_dict().items() if name not in NOT_COMPUTED_WITH}
    tokens = [tree.token_ids.tolist(), tree.depths.tolist(), limit > 0]
    computed_by = [torch.__version__, torch.get_num_threads()]  # either can change the last bits
    key = json.dumps([VERSION, fingerprint, config, str(model.dtype), tokens, computed_by], sort_keys=True, default=str)
    folder = cache_folder() / "states" / hashlib.sha256(key.encode()).hexdigest()[:20]
    kept = _affordable(wanted, len(tree) * model.config.get_text_config().hidden_size * model.dtype.itemsize)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        missing = [layer for layer in kept if not _file(folder, layer).is_file()]
        if missing:
            _make_room(folder)
            _computed(model, tree, rows, missing, limit, folder)
        os.utime(folder)
    return BoundaryStates({layer: _mapped(_file(folder, layer)) for layer in kept}, thinned=len(kept) < len(wanted))


def _computed(
    model: PreTrainedModel, tree: PrefixTree, rows: list[TokenRow], layers: list[int], limit: int, folder: Path | None
) -> dict[int, torch.Tensor]:
    """Fill (U, D) per layer chunk by chunk, in memory or into files that appear when they are complete."""
    states: dict[int, torch.Tensor] = {}
    for nodes, captured in _passes(model, tree, rows, layers, limit):
        inside = nodes >= 0
        for layer, hidden in captured.items():
            if layer not in states:
                shape = (len(tree), hidden.shape[-1])
                partial = folder and _partial(folder, layer)
                states[layer] = _empty(shape, hidden.dtype, partial) if partial else torch.empty(shape, dtype=hidden.dtype)
            states[layer][nodes[inside]] = hidden.cpu()[inside]
    if folder:
        for layer in layers:
            os.replace(_partial(folder, layer), _file(folder, layer))
    return states


def _passes(model: PreTrainedModel, tree: PrefixTree, rows: list[TokenRow], layers: list[int], limit: int):
    """Forward passes over all rows: nodes (G, N), and for each layer the states (G, N, D)."""
    ordered = sorted({row.token_ids: row for row in rows}.values(), key=lambda row: tree.path(row).tolist())
    chunk: list[TokenRow] = []
    tokens = 0
    for row in [*ordered, None]:
        if chunk and (row is None or tokens + len(row.token_ids) > TOKENS_AT_ONCE):
            pack = pack_rows(tree, chunk, limit)
            ids = torch.from_numpy(tree.token_ids)[pack.nodes.clamp(min=0)]
            mask = pack.attention_mask(model.dtype)
            device = model.device
            captured = capture_boundary(model, layers, ids.to(device), mask.to(device), pack.position_ids.to(device))
            yield pack.nodes, captured
            chunk, tokens = [], 0
        if row is not None:
            chunk.append(row)
            tokens += len(row.token_ids)


def _affordable(layers: list[int], bytes_per_layer: int) -> list[int]:
    fit = max(1, LIMIT_BYTES // max(1, bytes_per_layer))
    return layers if fit >= len(layers) else [layers[index * len(layers) // fit] for index in range(fit)]


def _make_room(keep: Path) -> None:
    """Remove the least recently used states until what stays takes at most half of the limit."""
    folders = sorted((f for f in keep.parent.iterdir() if f.is_dir() and f != keep), key=lambda f: f.stat().st_mtime)
    sizes = {folder: sum(file.stat().st_size for file in folder.glob("*.npy")) for folder in folders}
    total = sum(sizes.values())
    for folder in folders:
        if total <= LIMIT_BYTES // 2:
            return
        shutil.rmtree(folder, ignore_errors=True)  # processes that have it mapped keep their pages
        total -= sizes[folder]


def _file(folder: Path, layer: int) -> Path:
    return folder / f"{layer:03d}.npy"


def _partial(folder: Path, layer: int) -> Path:
    return folder / f"{layer:03d}.partial"


def _empty(shape: tuple[int, int], dtype: torch.dtype, file: Path) -> torch.Tensor:
    array = np.lib.format.open_memmap(file, mode="w+", dtype=_STORED[dtype], shape=shape)
    return torch.from_numpy(array).view(dtype)


def _mapped(file: Path) -> torch.Tensor:
    array = np.load(file, mmap_mode="c")  # copy on write: nothing can change the file
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
