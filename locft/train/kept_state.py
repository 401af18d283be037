"""A long training that is killed resumes from its last saved epoch or arrival and gives bitwise the same result.

Everything that steps change is written to a folder in the cache every few minutes and removed when the training ends. Short
trainings write nothing.
"""

import json
import logging
import shutil
import time
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError

from locft.cache import cache_folder, content_key, make_room
from locft.errors import InputError
from locft.model.checkpoint import opened, write_tensors

VERSION = 9
"""Version of the files. Raise it when the same training would take different steps or save different things."""
EVERY_SECONDS = 120.0
"""Minimum time between two writes."""
LIMIT_BYTES = 16 * 2**30
"""Limit on disk space for all states together; the least recently written are removed first."""
_log = logging.getLogger(__name__)


class KeptState:
    """The state of one training in a file. If it cannot be written, a warning is logged and training continues."""

    def __init__(self, parts: Any, every: float = EVERY_SECONDS):
        """parts: everything that determines the result's bits, JSON-serialisable. every: minimum seconds between two writes."""
        self.file = cache_folder() / "training" / content_key([VERSION, parts]) / "state.safetensors"
        self.every = every
        self._last = time.monotonic()

    def read(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The tensors and metadata of the last write; None if there are none that can be read."""
        if not self.file.is_file():
            return None
        try:
            with opened(self.file, "saved training state") as stored:
                names, about = stored.keys(), json.loads(stored.metadata()["about"])
                return {name: stored.get_tensor(name) for name in names}, about
        except (InputError, KeyError, TypeError, ValueError) as error:
            _log.warning("%s: %s; training starts from the beginning", self.file, error)
            return None

    def due(self) -> bool:
        return time.monotonic() - self._last >= self.every

    def write(self, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
        """about: JSON-serialisable metadata. A process killed during a write leaves the previously saved state intact."""
        self._last = time.monotonic()
        held = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        try:
            make_room(self.file.parent, sum(tensor.nbytes for tensor in held.values()), LIMIT_BYTES)
            self.file.parent.mkdir(exist_ok=True)
            write_tensors(held, self.file, {"about": json.dumps(about)})
        except (OSError, SafetensorError) as error:
            _log.warning(
                "%s: %s; training continues, but would have to start from the beginning if it were killed",
                self.file,
                error,
            )

    def drop(self) -> None:
        shutil.rmtree(self.file.parent, ignore_errors=True)
