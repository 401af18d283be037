"""Hidden states of the unedited model at the layers where trials begin: computed once, used by every trial.

Legend: U unique tokens (nodes of the prefix tree), D hidden, G sequences of a pack, N tokens of each.

The states are kept in files that every worker on a machine maps into memory: they take up memory only once, no matter how
many workers read them, and the operating system drops and rereads pages as memory allows. Each machine computes its own
states, since one forward pass is cheaper than shipping gigabytes.
"""

import logging
import math
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from filelock import FileLock
from transformers import PreTrainedModel

from locft.cache import cache_folder, content_key, lock_of, make_room
from locft.engine.packing import STEP, PrefixTree, pack_rows
from locft.engine.tail import capture_boundary
from locft.model.models import computed_with
from locft.model.positions import n_layers
from locft.process import moved, runs_ahead
from locft.train.token_rows import batches

VERSION = 3
"""Version of the files. Raise it when the same key would hold different numbers."""
TOKENS_AT_ONCE = 2048
"""Tokens per forward pass when states are computed."""
LIMIT_BYTES = int(os.environ.get("LOCFT_STATES_BYTES", 16 * 2**30))
"""Disk space for all stored states together. The least recently used are removed first."""
SCRATCH_BYTES = 2**27
"""States of a single training that take more than this are in a file."""
KEPT_NEAR, NEAR_SHARE = 2, 0.1
"""Number of layers whose states are also kept on a GPU (a trial's and the last), and the share of its free memory for each."""

_STORED = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.int16}  # numpy has no bfloat16
_PARTIAL = ".partial"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BoundaryStates:
    """Hidden states entering some layers, for every node of a prefix tree."""

    layers: dict[int, torch.Tensor]  # layer -> (U, D)
    stride: int = 1
    """Only the layers 0, stride, 2 * stride, ... may be kept."""
    _near: dict[int, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def below(self, layer: int) -> int:
        """The layer whose states a trial at `layer` starts from: `layer` itself, or the nearest one below it that may be kept.

        This must not depend on what else is stored, since the last bits of a trial's results depend on it.
        """
        return layer // self.stride * self.stride

    def near(self, layer: int, device: torch.device) -> torch.Tensor:
        """States (U, D) entering a stored layer, on the device that computes on them. Copies to a GPU are kept for the
        `KEPT_NEAR` most recently used layers; states that take more than `NEAR_SHARE` of its free memory stay where they are."""
        states = self.layers[layer]
        if states.device == device:
            return states
        if layer not in self._near:
            fits = not runs_ahead(device) or states.nbytes <= NEAR_SHARE * torch.cuda.mem_get_info(device)[0]
            while len(self._near) >= KEPT_NEAR:
                del self._near[next(iter(self._near))]
            self._near[layer] = states.to(device) if fits else states
        self._near[layer] = self._near.pop(layer)  # now the most recently used
        return self._near[layer]

    def gather(self, layer: int, nodes: torch.Tensor, device: torch.device) -> torch.Tensor:
        """States (G, N, D), on a device, of a pack's nodes (G, N, on the CPU) entering a stored layer; zeros past the ends of
        sequences (node -1)."""
        states, places = self.near(layer, device), nodes.numpy()
        found = states[moved(torch.from_numpy(np.maximum(places, 0)), states.device)]
        if (places < 0).any():
            found = found * moved(torch.from_numpy(places >= 0), states.device)[..., None]
        return found if found.device == device else moved(found, device)


def boundary_states(
    model: PreTrainedModel, fingerprint: str, tree: PrefixTree, layers: Iterable[int], limit: int, *, on_disk: bool
) -> BoundaryStates:
    """States of all nodes entering the given layers, read from files of an earlier call if there are any.

    limit: as for `pack_rows`. on_disk: False keeps the states in this process's memory, for a single edit; so does a full
    disk, with a warning. If the states of all layers of the model would not fit into `LIMIT_BYTES`, only evenly spaced
    layers are kept, the lowest one included (`BoundaryStates.below`).
    """
    one = torch.ones(1, 1, dtype=torch.long, device=model.device)
    state = capture_boundary(model, 0, one, one)[0]  # may be wider than the hidden size, and of another dtype
    shape = (len(tree), state.shape[-1])
    layer_bytes, count = math.prod(shape) * state.dtype.itemsize, n_layers(model)
    stride = -(-count // max(1, min(count, LIMIT_BYTES // layer_bytes)))
    if stride > 1:
        _log.warning(
            "keeping hidden states of only one layer in %d: those of all layers would take more than %d bytes",
            stride,
            LIMIT_BYTES,
        )
    wanted = sorted({layer // stride * stride for layer in layers})
    if not on_disk:
        return BoundaryStates(_computed(model, tree, wanted, limit, None) if wanted else {}, stride)
    folder = cache_folder() / "states" / _key(model, fingerprint, tree, limit)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock_of(folder)):
        folder.mkdir(exist_ok=True)
        states: dict[int, torch.Tensor] = {}
        for layer in wanted:
            with suppress(OSError):
                states[layer] = _read(_file(folder, layer), shape)
        if missing := [layer for layer in wanted if layer not in states]:
            make_room(folder, len(missing) * layer_bytes, LIMIT_BYTES)
            try:
                states |= _computed(model, tree, missing, limit, folder)
            except OSError as error:
                _log.warning("%s: %s; keeping hidden states in memory instead", folder, error.strerror or error)
                for layer in missing:
                    _file(folder, layer).with_suffix(_PARTIAL).unlink(missing_ok=True)
                states |= _computed(model, tree, missing, limit, None)
        os.utime(folder)
    return BoundaryStates(states, stride)


def scratch(count: int, like: torch.Tensor, *, on_disk: bool) -> torch.Tensor:
    """An empty tensor (count, D) for states of a single training, with the width D, dtype and device of `like`, (..., D).

    If it is large and on a CPU, it is mapped from a file without a name, which goes when the tensor does: the operating system can
    then drop its pages. on_disk: False keeps it in memory; so does a disk without enough space, with a warning.
    """
    shape, size = (count, like.shape[-1]), count * like.shape[-1] * like.element_size()
    if on_disk and like.device.type == "cpu" and size > SCRATCH_BYTES:
        try:
            with tempfile.TemporaryFile(dir=cache_folder()) as file:
                _reserve(file, size)
                return torch.from_numpy(np.memmap(file, _STORED[like.dtype], "r+", shape=shape)).view(like.dtype)
        except OSError as error:
            _log.warning("%s: %s; keeping the states of a training in memory", cache_folder(), error.strerror or error)
    return like.new_empty(shape)


def _key(model: PreTrainedModel, fingerprint: str, tree: PrefixTree, limit: int) -> str:
    """Hash of everything that decides the bits of the states: weights, rows in their order, and what computes them."""
    rows = [row.token_ids for row in tree.rows]
    parts = [VERSION, TOKENS_AT_ONCE, limit, STEP, fingerprint, *computed_with(model), rows]
    return content_key(parts)


def _computed(
    model: PreTrainedModel, tree: PrefixTree, layers: list[int], limit: int, folder: Path | None
) -> dict[int, torch.Tensor]:
    """States (U, D) per layer, in memory or in files, which appear only once they are complete. Raises OSError."""
    states: dict[int, torch.Tensor] = {}
    files: dict[Path, np.memmap] = {}
    rows = sorted(tree.rows, key=lambda row: tree.path(row).tolist())
    for part in batches(rows, tokens=TOKENS_AT_ONCE, supervised=math.inf):
        pack = pack_rows(tree, rows[part], limit)
        mask, position_ids, token_ids = pack.inputs(model.dtype, model.device)
        inside = pack.nodes >= 0
        for layer, hidden in capture_boundary(model, layers, token_ids, mask, position_ids).items():
            if layer not in states:
                shape, dtype = (len(tree), hidden.shape[-1]), hidden.dtype
                if folder:
                    file = _file(folder, layer)
                    files[file] = _empty(shape, dtype, file.with_suffix(_PARTIAL))
                    states[layer] = torch.from_numpy(files[file]).view(dtype)
                else:
                    states[layer] = torch.empty(shape, dtype=dtype)
            states[layer][pack.nodes[inside]] = hidden.cpu()[inside]
    for file, array in files.items():
        array.flush()  # so that a file with its final name is complete, whatever happens to the machine
        os.replace(file.with_suffix(_PARTIAL), file)
    return {layer: _read(_file(folder, layer), one.shape) for layer, one in states.items()} if folder else states


def _file(folder: Path, layer: int) -> Path:
    return folder / f"{layer:03d}.npy"


def _empty(shape: tuple[int, int], dtype: torch.dtype, file: Path) -> np.memmap:
    """A mapped file with its space on disk reserved: writing to a page without space would kill the process."""
    array = np.lib.format.open_memmap(file, mode="w+", dtype=_STORED[dtype], shape=shape)
    with file.open("r+b") as stream:
        _reserve(stream, file.stat().st_size)
    return array


def _reserve(file: BinaryIO, size: int) -> None:
    """Give an open file this many bytes of the disk. Raises OSError if there is no space."""
    file.truncate(size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)


def _read(file: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """The file's states, mapped copy-on-write. Raises OSError if the file is missing or damaged."""
    try:
        array = np.load(file, mmap_mode="c")
    except (ValueError, EOFError) as error:
        raise OSError(f"{file} is damaged") from error
    tensor = torch.from_numpy(array)
    if tensor.dtype == torch.int16:
        tensor = tensor.view(torch.bfloat16)
    if tuple(tensor.shape) != tuple(shape):
        raise OSError(f"{file} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    return tensor
