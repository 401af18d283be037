"""The two records that flow through a study: what a trial is, and what came of it.

A trial's identity is its content: `TrialConfig.id` hashes everything that can change the result (the trained position,
the settings, the fingerprints of model and data, the version of the method) and nothing else. So a finished trial is
recognised wherever it is met again, and the same command resumes a study.
"""

import base64
import hashlib
import json
import zlib
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

METHOD_VERSION = 1
"""Raised whenever the same configuration would give another result: old results are then not taken for new ones."""


@dataclass(frozen=True)
class TrialConfig:
    """One edit of one model at one position with one setting, fully specified."""

    model_fingerprint: str
    """Hash of the unedited model's weights (`LoadedModel.fingerprint`)."""
    data_fingerprint: str
    """Hash of edits and capability items together: everything the metrics are computed on."""
    layers: int
    """Layers of the model, for the relative depth."""
    layer: int
    """Index of the trained layer, 0 is the first."""
    module: str
    """What is trained in that layer: mlp_down, mlp, attn, layer, ..."""
    pipeline: str
    """breadth_first or depth_first."""
    batch_size: int
    """Edits per optimiser step."""
    learning_rate: float
    """Of Adam."""
    seed: int
    """Of the order of the edits."""
    loss_average: str
    """edit: mean over the tokens of an edit, then over edits. token: mean over all tokens of the batch."""
    epochs: int
    """At most so many passes over all edits (breadth-first) or steps per batch (depth-first)."""
    skip_below: float
    """A batch whose loss is below takes no step."""
    stop_below: float
    """An epoch (breadth-first) or a batch (depth-first) whose loss is below ends."""
    dtype: str = "float32"
    """Of the frozen weights. The trained ones are float32 always."""
    precision: str = "float32"
    """In which training computes: float32 or bfloat16. The metrics are those of the edit merged into `dtype`."""
    method_version: int = METHOD_VERSION

    @property
    def id(self) -> str:
        """The content id: 16 hexadecimal digits."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def position(self) -> str:
        """The tuning position as users write it, such as "22.mlp_down"."""
        return f"{self.layer}.{self.module}"

    @property
    def depth(self) -> float:
        """Relative depth of the layer, 0 for the first and 1 for the last."""
        return self.layer / max(1, self.layers - 1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TrialResult:
    """What came of a trial. `metrics` holds finite numbers only; what could not be measured is absent."""

    config: TrialConfig
    status: Literal["done", "failed"]
    error: str | None = None
    """The cause of a failure in one line."""
    metrics: dict[str, float] = field(default_factory=dict)
    epoch_losses: tuple[float, ...] = ()
    """Mean training loss of each epoch (breadth-first) or of each batch's last step (depth-first)."""
    outcomes: tuple[dict[str, Any], ...] = ()
    """Per prompt: edit_id, kind (reliability, generalization, locality), prompt, expected, got, correct, correct_tf."""
    retried: tuple[str, ...] = ()
    """Why earlier attempts at it were lost, each in one line."""

    def to_row(self) -> dict[str, Any]:
        """One row of the results table (its columns are documented in `analysis.stats.table`)."""
        return {
            "trial_id": self.config.id,
            "status": self.status,
            "error": self.error,
            "depth": self.config.depth,
            **self.config.to_dict(),
            **self.metrics,
            "epoch_losses": list(self.epoch_losses),
            "retried": "\n".join(self.retried) or None,
        }


def pack_result(result: TrialResult) -> str:
    """A result as one short string: Ray keeps every reported value in the driver's memory and snapshots."""
    parts = {
        "config": result.config.to_dict(),
        "status": result.status,
        "error": result.error,
        "metrics": result.metrics,
        "epoch_losses": result.epoch_losses,
        "outcomes": result.outcomes,
        "retried": result.retried,
    }
    return base64.b85encode(zlib.compress(json.dumps(parts).encode())).decode()


def unpack_result(packed: str) -> TrialResult:
    """The inverse of `pack_result`."""
    parts = json.loads(zlib.decompress(base64.b85decode(packed)))
    return TrialResult(
        TrialConfig(**parts["config"]),
        parts["status"],
        parts["error"],
        parts["metrics"],
        tuple(parts["epoch_losses"]),
        tuple(parts["outcomes"]),
        tuple(parts.get("retried", ())),  # one that an earlier version kept has none
    )
