"""The records that flow through a study: facts about the model and the data, a trial's configuration, and its result.

A trial is identified by its content: `TrialConfig.id` hashes everything that can change the result (position, settings, the
fingerprints of model and data, the version of the method) and nothing else. So finished trials are recognised, and the same
command resumes a study.
"""

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from statistics import fmean
from typing import Any, Literal

from analysis.stats.axes import AXES, AXIS
from analysis.stats.table import pack_right
from locft.cache import digest
from locft.train.formats import UNSEEN, parse_formats

METHOD_VERSION = 1
"""Raised whenever the same configuration would give another result, so that old results are not taken for new ones."""
METHOD_VERSIONS = {"natural_gradient": 6, "low_curvature": 4}
"""The same for single values of the axis `method`, if only their results changed."""
BACKGROUND_VERSION = 3
"""The lowest version of trials that put background text before prompts, use it as guards or train the model on it."""


def method_version(values: Mapping[str, Any]) -> int:
    """The version of the method for a trial with these values of its axes; absent axes are at their defaults. One higher where
    guards that are prompts, shrinking, AdaLoRA in a stream, or a stream with replay gave other results before."""
    method, guard = values.get("method", AXIS["method"].default), values.get("guard")
    version = METHOD_VERSIONS.get(method, METHOD_VERSION)
    if values.get("prefix_share") or guard == "prose" or values.get("further_steps"):
        version = max(version, BACKGROUND_VERSION)
    in_stream = values.get("pipeline") == "stream"
    replays = in_stream and values.get("replay", AXIS["replay"].default) != 0
    changed = (
        guard in ("same_relation", "locality_like")
        or values.get("shrink") == "yes"
        or (in_stream and method == "adalora")
    )
    return version + changed + replays


class _TrialConfigMethods:
    """What is derived from the fields of a trial's configuration."""

    @property
    def id(self) -> str:
        """The content id: 16 hexadecimal digits. A newer axis counts only where it is not at its default."""
        values = self.to_dict()
        for axis in AXES:
            if not axis.in_first_ids and values[axis.name] == axis.default:
                del values[axis.name]
        return digest(json.dumps(values, sort_keys=True, separators=(",", ":")))

    @property
    def position(self) -> str:
        """The tuning position as users write it, such as "22.mlp_down"."""
        return f"{self.layer}.{self.module}"

    @property
    def depth(self) -> float:
        """Relative depth of the layer, 0 for the first and 1 for the last."""
        return self.layer / max(1, self.layers - 1)

    @property
    def training(self) -> dict[str, Any]:
        """The fields of `locft.train.pipelines.TrainingSettings`: the axes that say how to train."""
        return {axis.name: getattr(self, axis.name) for axis in AXES if axis.trained}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


TrialConfig = make_dataclass(
    "TrialConfig",
    [
        ("model_fingerprint", str),  # hash of the unedited model's weights (`LoadedModel.fingerprint`)
        ("data_fingerprint", str),  # hash of edits and capability items together: all that the metrics are computed on
        ("layers", int),  # number of the model's layers, for the relative depth
        *((axis.name, axis.type) for axis in AXES if axis.default is None),
        *((axis.name, axis.type, field(default=axis.default)) for axis in AXES if axis.default is not None),
        ("method_version", int, field(default=METHOD_VERSION)),
    ],
    bases=(_TrialConfigMethods,),
    frozen=True,
    kw_only=True,
)
TrialConfig.__module__ = __name__  # pickle looks for it here
TrialConfig.__doc__ = """One edit of one model at one position with one setting, fully specified: fingerprints of model
and data, the number of layers, a value for each of `analysis.stats.axes.AXES`, and the version of the method."""


@dataclass(frozen=True)
class StudyFacts:
    """What a plan has to know about the model and the data. Sizes are counts of parameters or tokens."""

    model_fingerprint: str
    data_fingerprint: str
    n_layers: int
    modules_by_layer: Mapping[int, Sequence[str]]
    """For each layer the modules that can be trained in it."""
    n_edits: int
    """Number of edits in the study; a trial may train only the first of them (`trained`)."""
    precision: str
    """Data type in which training computes: float32 or bfloat16."""
    parameters: int
    """Size of the whole model; tied weights count once."""
    layer_parameters: int
    """Size of a layer, as the mean over the layers."""
    head_parameters: int
    """Size of the output projection: vocabulary x hidden, tied or not."""
    vocabulary: int
    trained_parameters: Mapping[str, int]
    """Size by position ("22.mlp_down"); an absent one counts as a whole layer."""
    factor_bytes: Mapping[str, int]
    """Size of the curvature factors by position (`locft.curvature.factor_bytes`)."""
    n_asked: int
    """Number of edits that any trial asks about."""
    edit_tokens: int = 0
    """Tokens of one epoch over all edits."""
    evaluation_tokens: int = 0
    """Tokens read and generated to evaluate the `n_asked` edits, once each."""
    capability_tokens: int = 0
    """Tokens read to measure capability once, prose included."""
    generated_tokens: int = 0
    """Upper bound on the tokens of the answers generated for capability items."""
    most_asked: int | None = None
    """Largest number of edits that a trial's metrics are measured on; None for all."""
    model_setup: str = ""
    """Hash of the model's configuration and tokenizer."""
    row_sizes: Mapping[str, float] = field(default_factory=dict)
    """By trained format: tokens of the edit rows in it, relative to `edit_tokens`; an absent one counts as 1."""

    def trained(self, trial: "TrialConfig") -> int:
        """Edits that a trial trains."""
        return trial.edit_count or self.n_edits

    def asked_share(self, trial: "TrialConfig") -> float:
        """Share of the edits covered by `evaluation_tokens` that a trial asks about."""
        return min(self.trained(trial), self.most_asked or self.n_edits) / self.n_asked

    @property
    def hidden(self) -> int:
        """Size of the hidden states; 1 for a model without an output projection."""
        return max(1, self.head_parameters // self.vocabulary)

    def row_size(self, train_formats: str) -> float:
        """Mean of `row_sizes` over a trial's formats, which training draws evenly."""
        return fmean(self.row_sizes.get(form, 1.0) for form in parse_formats(train_formats))


def asked_places(count: int, most: int | None) -> tuple[int, ...] | None:
    """Places of a random sample of `most` of the first `count` edits; None if all of them are asked about."""
    from locft.data.requests import drawn_places

    return None if most is None or count <= most else tuple(drawn_places(count, most))


def every_asked_place(counts: Sequence[int], total: int, most: int | None) -> tuple[int, ...] | None:
    """Places of the edits that any trial asks about; None for all of them. counts: edits that trials train, 0 for `total`."""
    samples = [asked_places(count or total, most) or range(count or total) for count in counts]
    every = sorted({place for sample in samples for place in sample})
    return None if len(every) == total else tuple(every)


@dataclass(frozen=True)
class TrialResult:
    """The outcome of a trial. `metrics` holds finite numbers only; what could not be measured is absent."""

    config: TrialConfig
    status: Literal["done", "failed"]
    error: str | None = None
    """The cause of a failure in one line."""
    metrics: dict[str, float] = field(default_factory=dict)
    epoch_losses: tuple[float, ...] = ()
    """Mean training loss of each epoch (breadth-first) or of each batch's last step (depth-first)."""
    outcomes: tuple[dict[str, Any], ...] = ()
    """Per question: the fields of `locft.measure.evaluation.EditOutcome`."""
    stages: tuple[dict[str, float], ...] = ()
    """Metrics at stages of a stream and at its end (`sweeps.run.trial.stage_metrics`)."""
    retried: tuple[str, ...] = ()
    """Why earlier attempts at it were lost, each in one line."""
    packed_right: str | None = None
    """`right` as the tracking store kept it, for a result that was read without its outcomes."""

    @property
    def right(self) -> str | None:
        """Which edits were answered right, in which formats, packed (`analysis.stats.table.pack_right`); None where that is not known."""
        by_edit: dict[str, list[bool]] = {}
        for outcome in self.outcomes:
            if outcome["kind"] == "reliability" and outcome.get("format") != UNSEEN:
                by_edit.setdefault(outcome["edit_id"], []).append(bool(outcome["correct"]))
        right = [marks[0] if len(marks) == 1 else marks for marks in by_edit.values()]
        return pack_right(right) if right else self.packed_right

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
            "stages": json.dumps(self.stages) if self.stages else None,
            "retried": "\n".join(self.retried) or None,
            "right": self.right,
        }


def config_of_row(row: Mapping[str, Any]) -> TrialConfig:
    """The trial of a row of the results table."""
    return TrialConfig(**{field.name: row[field.name] for field in fields(TrialConfig)})


def pack_result(result: TrialResult) -> str:
    """A result as one short string: Ray keeps every reported value in the driver's memory and snapshots."""
    parts = {**vars(result), "config": result.config.to_dict()}
    return base64.b85encode(zlib.compress(json.dumps(parts).encode())).decode()


def unpack_result(packed: str) -> TrialResult:
    """The inverse of `pack_result`."""
    parts = json.loads(zlib.decompress(base64.b85decode(packed)))
    parts |= {name: tuple(value) for name, value in parts.items() if isinstance(value, list)}
    return TrialResult(**{**parts, "config": TrialConfig(**parts["config"])})
