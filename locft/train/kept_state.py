"""A long training that is killed goes on from its last kept epoch or arrival, to bitwise the same result.

What steps change is written to a folder of the cache every few minutes, and removed when the training ends. Short trainings
never write.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError

from locft.cache import cache_folder, content_key, make_room
from locft.errors import InputError
from locft.model.checkpoint import opened, write_tensors

VERSION = 7
"""Of the files. Raise it when the same training would take other steps, or keep other things."""
EVERY_SECONDS = 120.0
"""Between two writings."""
LIMIT_BYTES = 16 * 2**30
"""Disk space for all states together; the least recently written are removed first."""
_log = logging.getLogger(__name__)


class KeptState:
    """The state of one training in a file. A disk that does not take it costs a warning, not the training."""

    def __init__(self, parts: Any, every: float = EVERY_SECONDS):
        """parts: JSON-able, everything that decides the bits of the result. every: seconds between two writings."""
        self.file = cache_folder() / "training" / content_key([VERSION, parts]) / "state.safetensors"
        self.every = every
        self._last = time.monotonic()

    def read(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The tensors and numbers of the last writing; None if there is none that can be read."""
        if not self.file.is_file():
            return None
        try:
            with opened(self.file, "state of a training") as stored:
                names, about = stored.keys(), json.loads(stored.metadata()["about"])
                return {name: stored.get_tensor(name) for name in names}, about
        except (InputError, KeyError, TypeError, ValueError) as error:
            _log.warning("%s: %s; the training begins anew", self.file, error)
            return None

    def due(self) -> bool:
        return time.monotonic() - self._last >= self.every

    def write(self, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
        """about: JSON-able. A process that is killed here leaves the last writing as it was."""
        self._last = time.monotonic()
        held = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        partial = self.file.with_suffix(f".partial-{os.getpid()}")
        try:
            make_room(self.file.parent, sum(tensor.nbytes for tensor in held.values()), LIMIT_BYTES)
            self.file.parent.mkdir(exist_ok=True)
            write_tensors(held, partial, {"about": json.dumps(about)})
            os.replace(partial, self.file)
        except (OSError, SafetensorError) as error:
            _log.warning("%s: %s; the training goes on, but would begin anew if it were killed", self.file, error)
            partial.unlink(missing_ok=True)

    def drop(self) -> None:
        shutil.rmtree(self.file.parent, ignore_errors=True)
