"""The change that an edit makes, kept apart from the model: save, load, apply, revert.

Training never touches the model; it returns the float32 difference of the trained parameters. Every evaluation adds
this difference to the base, so a delta read back from a file gives bitwise the same metrics.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from locft.errors import InputError, one_line
from locft.model.checkpoint import DELTA, FORMAT, no_delta, opened, write_tensors
from locft.model.models import LoadedModel


@dataclass(frozen=True)
class EditDelta:
    """The difference an edit makes to some parameters of one base model."""

    position: str
    """The tuning position, such as "22.mlp_down"."""
    base_fingerprint: str
    """Fingerprint of the model it was trained on; the delta fits no other."""
    tensors: Mapping[str, torch.Tensor]
    """Parameter name -> float32 difference on the CPU, of the parameter's shape."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How it was trained: for human readers, not needed to apply it."""

    @property
    def norm(self) -> float:
        """Euclidean norm over all parameters."""
        return math.sqrt(math.fsum(float(t.double().square().sum()) for t in self.tensors.values()))  # in any order

    def weights(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """The edited parameters by name, on the model's device. dtype: the model's own by default."""
        edited = {}
        for name, change in self.tensors.items():
            base = model.get_parameter(name).detach()
            edited[name] = (base.float() + change.to(base.device)).to(dtype or base.dtype)
        return edited

    def scaled(self, factor: float) -> "EditDelta":
        """The same change, `factor` times as large."""
        return replace(self, tensors={name: factor * change for name, change in self.tensors.items()})

    def save(self, path: Path) -> Path:
        """Write one safetensors file (`DELTA` in `path` when that is a folder) and return its path. It appears whole or not
        at all. Raises InputError if it cannot be written, as on a full disk."""
        if path.suffix != ".safetensors":
            path = path / DELTA
        about = {
            "format": FORMAT,
            "position": self.position,
            "base_fingerprint": self.base_fingerprint,
            "settings": json.dumps(dict(self.settings), sort_keys=True),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(self.tensors, path, about)
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot write {path}: {one_line(error)}") from error
        return path

    @classmethod
    def load(cls, path: Path) -> "EditDelta":
        """Read a delta from its file or folder. Raises InputError if there is none."""
        file = path / DELTA if path.is_dir() else path
        if not file.is_file():
            missing = f"delta {path}: no such file, expected a {DELTA} or a folder that holds one"
            raise InputError(no_delta(path) or missing)
        with opened(file, "delta") as stored:
            about = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        if about.get("format") != FORMAT:
            other = f"delta {file}: its format is {about.get('format')!r}, expected {FORMAT!r}"
            raise InputError(no_delta(file, tensors) or other)
        return cls(about["position"], about["base_fingerprint"], tensors, json.loads(about["settings"]))

    def require_base(self, name: str, fingerprint: str) -> None:
        """Raise InputError unless the model of that name and fingerprint is the one that the delta was trained on."""
        require_base(f"delta at {self.position}", self.base_fingerprint, name, fingerprint)


def require_base(what: str, wanted: str, name: str, found: str) -> None:
    """Raise InputError unless a model has the fingerprint of the one that something was made on.

    what: the thing made, for the message. wanted: the fingerprint it needs. name, found: name and fingerprint of the given model.
    """
    if found != wanted:
        raise InputError(
            f"{what}: made on a model with fingerprint {wanted}, but {name!r} has {found}; give the model it was made on, "
            "unedited"
        )


def apply_delta(loaded: LoadedModel, delta: EditDelta) -> dict[str, torch.Tensor]:
    """Edit the model in place; returns the original values, which `revert` restores bit for bit.

    Parameters get new tensors instead of new values: the model's own may lie in a file that many processes map, and
    a page that was written to is no longer shared.
    """
    delta.require_base(loaded.name, loaded.fingerprint)
    originals = {name: loaded.model.get_parameter(name).data for name in delta.tensors}
    revert(loaded, delta.weights(loaded.model))
    return originals


def revert(loaded: LoadedModel, originals: Mapping[str, torch.Tensor]) -> None:
    """Put the given values in place of the model's parameters."""
    for name, value in originals.items():
        loaded.model.get_parameter(name).data = value


@contextmanager
def applied(loaded: LoadedModel, delta: EditDelta) -> Iterator[None]:
    """The model is edited inside the block and bitwise unedited after it, whatever happens inside."""
    originals = apply_delta(loaded, delta)
    try:
        yield
    finally:
        revert(loaded, originals)
