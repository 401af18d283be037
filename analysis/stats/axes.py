"""The axes of a study, each declared once: its name, type, default, check, title, and how it is drawn and sorted.

Everything else derives from here: the fields of a trial's configuration and which of them its id hashes, the `space` of a
study file and its checks, the options of `locft edit`, the settings of a position file, the columns of the results table,
MLflow's parameters, and the names and scales in figures. To add an axis, declare it here and use it where trials train.

The declarations are in `analysis` because figures and tables need them, and `analysis` imports nothing from `sweeps`.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Axis:
    """One setting of a trial. An axis without `swept` has one value for a whole study."""

    name: str
    type: type
    """int, float or str."""
    default: Any
    title: str
    """Name in figures and tables."""
    doc: str
    """What the axis is, for the study file's reference and the columns of the results table."""
    choices: tuple[str, ...] = ()
    """The valid values of a text axis, in the order in which they are sorted and drawn; empty allows any."""
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    log: bool = False
    """Drawn on a logarithmic scale."""
    short: str = ""
    """Prefix of a value when a setting is written as text ("rate 0.004"); a text value may go without."""
    swept: bool = True
    """Set in `space`, where it takes a list; otherwise a field of the study itself."""
    trained: bool = True
    """A field of `locft.train.TrainingSettings`."""
    only: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Axes declared before it, each with the values at which this one has an effect. At others it is set to its default, so
    that a grid over both has no duplicates."""
    in_first_ids: bool = False
    """Part of every trial id, since the first ids hashed it. A newer axis is left out of the id at its default, so that
    old results stay valid."""

    @property
    def head(self) -> str:
        """Its name at a column or an axis, where space is scarce."""
        return self.short.strip() or self.title

    def counts(self, values: Mapping[str, Any]) -> bool:
        """True if this axis has an effect given these values of the others; an absent one is taken to be at its default."""
        others = [(AXIS[name], where) for name, where in self.only]
        return all(values.get(other.name, other.default) in where and other.counts(values) for other, where in others)

    def unmet(self, tried: Mapping[str, Collection[Any]]) -> Iterator[tuple[str, str]]:
        """Yields each other axis that is at none of the values that this one needs to have an effect, with those values as
        text. tried: axis -> the values given."""
        for name, where in self.only:
            if not set(tried[name]) & set(where):
                yield name, " or ".join(where)

    def expected(self) -> str:
        """A description of the valid values."""
        if self.choices:
            *others, last = self.choices
            return f"{', '.join(others)} or {last}" if others else last
        kind = {int: "a whole number", float: "a number", str: "text"}[self.type]
        bounds = (("of at least", self.at_least), ("above", self.above), ("below", self.below))
        said = " and ".join(f"{word} {bound:,}" for word, bound in bounds if bound is not None)
        return f"{kind} {said}".rstrip()

    def accepts(self, value: Any) -> bool:
        """True if the value is valid."""
        if self.choices:
            return value in self.choices
        if self.type is str:
            return isinstance(value, str) and bool(value)
        if isinstance(value, bool) or not isinstance(value, int if self.type is int else (int, float)):
            return False
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


ADAMS = ("full", "low_curvature", "lora", "adalora", "norm_bounded")
"""The methods that use Adam."""

AXES: tuple[Axis, ...] = (
    Axis("layer", int, None, "layer", "trained layer, 0 is the first", at_least=0, trained=False, in_first_ids=True),
    Axis(
        "module", str, "mlp_down", "module", "what is trained in the layer: mlp_down, mlp_up, mlp, attn, layer, ...",
        trained=False, in_first_ids=True,
    ),
    Axis(
        "pipeline", str, "breadth_first", "pipeline",
        "breadth_first: epochs over all edits; depth_first: each batch to its end before the next; stream: edits arrive a few "
        "at a time, in the order of the file, and earlier ones are replayed",
        choices=("breadth_first", "depth_first", "stream"), in_first_ids=True,
    ),
    Axis(
        "edit_count", int, 0, "edits",
        "how many of the study's edits are trained and asked, starting from the first; 0 takes all",
        at_least=0, log=True, trained=False,
    ),
    Axis(
        "batch_size", int, 32, "batch size", "edits per optimiser step",
        at_least=1, log=True, short="batch ", in_first_ids=True,
    ),
    Axis(
        "method", str, "full", "method", "how the change of the weights is parametrised and constrained",
        choices=("full", "low_curvature", "natural_gradient", "lora", "adalora", "norm_bounded"),
    ),
    Axis(
        "learning_rate", float, 0.004, "learning rate", "learning rate of Adam",
        above=0, log=True, short="rate ", only=(("method", ADAMS),), in_first_ids=True,
    ),
    Axis(
        "loss_average", str, "edit", "loss average",
        "edit: mean over the tokens of an edit, then over edits; token: mean over all tokens of the batch; last_token: the "
        "answer's tokens as the prompt's last token predicts them, as FT-L trains it",
        choices=("edit", "token", "last_token"), short="loss by ", in_first_ids=True,
    ),
    Axis(
        "arrival", int, 1, "arrival", "edits that arrive together", at_least=1, log=True, short="arrival ",
        only=(("pipeline", ("stream",)),),
    ),
    Axis(
        "replay", int, 8, "replay", "earlier edits drawn for each step", at_least=0, short="replay ",
        only=(("pipeline", ("stream",)),),
    ),
    Axis(
        "momentum", str, "fresh", "momentum", "fresh: the optimiser is reset at each arrival; kept: it is not",
        choices=("fresh", "kept"), short="momentum ", only=(("pipeline", ("stream",)), ("method", ADAMS)),
    ),
    Axis(
        "curvature_strength", float, 10.0, "curvature strength", "penalty on predicted drift: nats of edit loss per nat of drift",
        at_least=0, log=True, short="strength ", only=(("method", ("low_curvature", "natural_gradient")),),
    ),
    Axis(
        "rank", int, 8, "rank", "rank of the change of each matrix (adalora: on average over the matrices)",
        at_least=1, log=True, short="rank ", only=(("method", ("lora", "adalora")),),
    ),
    Axis(
        "alpha", float, 16.0, "alpha", "the change is scaled by alpha / rank",
        above=0, log=True, short="alpha ", only=(("method", ("lora", "adalora")),),
    ),
    Axis(
        "norm_bound", float, 5e-4, "norm bound", "largest change of a single weight",
        above=0, log=True, short="bound ", only=(("method", ("norm_bounded",)),),
    ),
    Axis(
        "train_formats", str, "raw", "trained formats",
        "format of the prompts in training, drawn again for each edit and epoch: raw, qa, chat or a text with {prompt}, "
        "several separated by commas",
        short="trained ",
    ),
    Axis(
        "prefix_share", float, 0.0, "prefix share", "share of prompts that follow random prose, drawn for each edit and epoch",
        at_least=0, below=1, short="prefix ",
    ),
    Axis(
        "guard", str, "none", "guard",
        "prompts whose answers are kept close to the unedited model's: edit prompts with another edit's subject "
        "(same_relation), prompts like those of locality (locality_like), or prose",
        choices=("none", "same_relation", "locality_like", "prose"), short="guard ",
    ),
    Axis(
        "guard_weight", float, 1.0, "guard weight", "penalty on drift on guards: nats of edit loss per nat of drift",
        above=0, log=True, short="guard weight ", only=(("guard", ("same_relation", "locality_like", "prose")),),
    ),
    Axis(
        "guards_per_step", int, 4, "guards per step", "guards in each optimiser step",
        at_least=1, log=True, short="guards ", only=(("guard", ("same_relation", "locality_like", "prose")),),
    ),
    Axis(
        "noise", float, 0.0, "noise", "noise on the hidden states that training begins with, as a share of their spread",
        at_least=0, short="noise ",
    ),
    Axis(
        "shrink", str, "no", "shrink",
        "yes: the change is scaled down after training as far as possible without losing an edit, raw or in a trained format",
        choices=("no", "yes"), short="shrink ",
    ),
    Axis(
        "rest_below", float, 0.0, "rest below",
        "an edit whose loss is below this skips the next epoch, and, each time it is still below, the next two; 0 skips none",
        at_least=0, short="rest ", only=(("pipeline", ("breadth_first", "stream")),),
    ),
    Axis(
        "further_steps", int, 0, "further steps",
        "steps of ordinary fine-tuning of all weights on prose, between the edit and its measurement",
        at_least=0, short="further ", trained=False, only=(("pipeline", ("breadth_first", "depth_first")),),
    ),
    Axis("seed", int, 0, "seed", "seed of the order of the edits", at_least=0, below=2**32, in_first_ids=True),
    Axis(
        "epochs", int, 25, "epochs",
        "at most this many passes over the edits (of an arrival), or steps per batch (depth_first)",
        at_least=1, swept=False, in_first_ids=True,
    ),
    Axis(
        "skip_below", float, 0.01, "skip below", "a batch whose loss is below this takes no step; 0 never skips",
        at_least=0, swept=False, in_first_ids=True,
    ),
    Axis(
        "stop_below", float, 0.01, "stop below",
        "training (of an arrival or, depth_first, of a batch) ends when its loss is below this; 0 never stops early",
        at_least=0, swept=False, in_first_ids=True,
    ),
    Axis(
        "dtype", str, "float32", "dtype", "data type of the frozen weights; the trained ones are always float32",
        choices=("float32", "bfloat16", "float16"), swept=False, trained=False, in_first_ids=True,
    ),
    Axis(
        "precision", str, "float32", "precision", "data type in which training computes; metrics are measured in dtype",
        choices=("float32", "bfloat16"), swept=False, in_first_ids=True,
    ),
)  # fmt: skip
"""In the order of columns and tables. Layer and module form the position; results are averaged over seeds."""

AXIS = {axis.name: axis for axis in AXES}
RETIRED = {"curvature_share": 0.0, "adam_basis": "weights"}
"""Removed axes, each with the value at which it had no effect: earlier records with that value can still be read."""
SWEPT = tuple(axis for axis in AXES if axis.swept)
SETTING = tuple(axis.name for axis in AXES if axis.name != "seed")
"""The axes that tell settings apart: all but the seed."""
STAGES = 10
"""Number of equal parts of a stream; it is measured after each."""


def without_retired(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without those of removed axes that had no effect; a value may be wrapped in a list."""
    return {
        name: value
        for name, value in values.items()
        if name not in RETIRED or value not in (RETIRED[name], [RETIRED[name]])
    }


def named_axes(rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The swept axes that describe these trials, apart from their position: all of the original ones, and those of the newer
    ones that are not at their default in every trial."""
    newer = [axis for axis in SWEPT if not axis.in_first_ids]
    away = {axis.name for row in rows for axis in newer if row.get(axis.name, axis.default) != axis.default}
    names = (axis.name for axis in SWEPT if axis.in_first_ids or axis.name in away)
    return tuple(name for name in names if name not in ("layer", "module"))
