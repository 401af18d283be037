"""The types of a study: what is swept, on which model and edits, how it is searched and with what resources.

They are the keys of the study file, which `sweeps.study.reader` reads. A value of these types is valid and free of
contradictions; what only the model can tell, `sweeps.study.reader.check_against_model` checks.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_TRIALS = 100_000
"""More trials than this in one study is taken for a slip of the pen: the driver keeps all of them in memory."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
"""Safe as MLflow experiment, metric and file name."""

T = TypeVar("T")


def _bad(expected: str, **context: Any) -> PydanticCustomError:
    """An error that says what was expected. A context `item` is the index of the value at fault."""
    return PydanticCustomError("expected", "{expected}", {"expected": expected, **context})


def _number(value: Any) -> float:
    """Whatever YAML reader was used, 1e-4 is a number: readers of YAML 1.1 hand it over as text."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    raise _bad("a number such as 0.001 or 1e-3")


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, (bool, int, float, str)) else value


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise _bad("every value once", item=index)
    return values


def _name(value: str) -> str:
    if not NAME.match(value):
        raise _bad("1 to 100 letters, digits, '.', '_' or '-', beginning with a letter or digit")
    return value


def _device(value: str) -> str:
    if not re.match(r"(auto|cpu|mps|cuda(:\d+)?)\Z", value):
        raise _bad("auto, cpu, cuda, cuda:N or mps")
    return value


def _gpus(value: float) -> float:
    if value > 1 and value != int(value):
        raise _bad("a fraction of one GPU or a whole number of GPUs")
    return value


def _concurrent(value: Any) -> int | str:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise _bad("auto or a whole number of at least 1")


def _minutes(value: Any) -> float | str | None:
    if value in (None, "auto"):
        return value
    minutes = _number(value)
    if not 0 < minutes < math.inf:
        raise _bad("auto, null, or a number of minutes above 0")
    return minutes


def _form(value: Any) -> str:
    """Which way of writing an axis this is; the brackets tell it from a key in an error's location."""
    return "<rule>" if isinstance(value, (Mapping, BaseModel)) else "<list>"


def _layer_form(value: Any) -> str:
    return "<word>" if isinstance(value, str) else _form(value)


Text = Annotated[str, Field(strict=True, min_length=1)]
Name = Annotated[str, Field(strict=True), AfterValidator(_name)]
Index = Annotated[int, Field(strict=True, ge=0)]
Count = Annotated[int, Field(strict=True, ge=1)]
Trials = Annotated[int, Field(strict=True, ge=1, le=MAX_TRIALS)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
NotNegative = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
Axis = Annotated[tuple[T, ...], BeforeValidator(_listed), Field(min_length=1), AfterValidator(_distinct)]
"""A list of distinct values; a single value stands for a list of one."""


class Section(BaseModel):
    """Every part of the file: fixed once read, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Edits(Section):
    """The edits every trial makes."""

    source: Text = "atlas"
    """`atlas` (built in), an edit file, or the id of a data set on the hub."""
    limit: Count | None = None
    """Edits used at most; null uses all."""
    sample_seed: Seed | None = None
    """Seed of the sample of `limit` edits; null takes the first ones."""


class Capability(Section):
    """What is measured beside the edits: what the model could do before."""

    suite: Literal["probes"] | None = "probes"
    """The built-in tasks; null leaves them out."""
    tasks: dict[Name, Text] = Field(default_factory=dict)
    """Further tasks: a name of one's choice and the benchmark file or hub id."""
    limit: Count | None = None
    """Items per task at most; null uses all."""
    prose: Text | None = None
    """Plain text file for drift_kl and perplexity; null takes the built-in prose."""
    prose_tokens: Index = 2048
    """Tokens of that text used at most; 0 leaves drift_kl and perplexity out."""


class EveryLayer(Section):
    """Layers 0, every, 2 * every, ..."""

    every: Count
    """Distance between two layers."""


class LogUniform(Section):
    """Any value between the bounds, every order of magnitude alike. For search random and optuna."""

    log_uniform: tuple[Rate, Rate]
    """Lowest and highest value."""

    @model_validator(mode="after")
    def _ordered(self) -> "LogUniform":
        if self.log_uniform[0] >= self.log_uniform[1]:
            raise _bad("the lower bound first: {log_uniform: [low, high]}")
        return self


Layers = Annotated[
    Annotated[Axis[Index], Tag("<list>")]
    | Annotated[EveryLayer, Tag("<rule>")]
    | Annotated[Literal["all"], Tag("<word>")],
    Discriminator(_layer_form),
]
Rates = Annotated[
    Annotated[Axis[Rate], Tag("<list>")] | Annotated[LogUniform, Tag("<rule>")],
    Discriminator(_form),
]


class Space(Section):
    """The axes. Each is a list of values, or one value."""

    layer: Layers = "all"
    """all, a list of layer indices (0 is the first), or {every: k}."""
    module: Axis[Text] = ("mlp_down",)
    """What is trained in the layer: mlp_down, mlp_up, mlp, attn, layer, ... (`locft positions MODEL` lists them)."""
    pipeline: Axis[Literal["breadth_first", "depth_first"]] = ("breadth_first",)
    """breadth_first: epochs over all edits. depth_first: each batch to its end before the next."""
    batch_size: Axis[Count] = (32,)
    """Edits per optimiser step."""
    learning_rate: Rates = (0.004,)
    """Of Adam: a list, or {log_uniform: [low, high]}."""
    loss_average: Axis[Literal["edit", "token"]] = ("edit",)
    """edit: mean over the tokens of an edit, then over edits. token: mean over all tokens of the batch."""
    seed: Axis[Seed] = (0,)
    """Of the order of the edits."""


class Search(Section):
    """How the space is searched."""

    method: Literal["grid", "random", "optuna"] = "grid"
    """grid: every combination. random: a sample. optuna: chosen while running, for reliability and capability."""
    trials: Trials | None = None
    """Number of trials for random and optuna; a grid's follows from its axes."""
    seed: Seed = 0
    """Of the sample."""


class Resources(Section):
    """What a trial takes."""

    cpus: Count = 1
    """CPU threads of one trial."""
    gpus: Annotated[NotNegative, AfterValidator(_gpus)] = 0.0
    """GPUs of one trial; a fraction lets several trials share one."""
    concurrent: Annotated[int | str, PlainValidator(_concurrent)] = "auto"
    """Trials at a time; auto runs as many as the cores, GPUs and memory of the machine or cluster hold."""
    minutes: Annotated[float | str | None, PlainValidator(_minutes)] = "auto"
    """A trial that takes longer is given up and counts as failed. auto: half an hour, or thirty times what a slow machine
    should need where that is longer, so that only what hangs is ended; null lets a trial take what it takes."""


class Limits(Section):
    """Where a study ends before its plan does. The same command with higher limits goes on."""

    minutes: Rate | None = None
    """By the clock, for one run of the command; the trials that are running then are given up."""
    trials: Trials | None = None
    """Finished trials of the study at most, those of earlier runs counted."""


class Study(Section):
    """A whole study, checked: no field contradicts another."""

    name: Name
    """Names the study everywhere, and is its MLflow experiment."""
    model: Text = "smollm2-135m"
    """A built-in name, a hub id, a local folder, or a GGUF file."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen weights; the trained ones are float32 always."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """In which training computes; auto is bfloat16 where the device multiplies it natively. Metrics are measured in dtype."""
    device: Annotated[Text, AfterValidator(_device)] = "auto"
    """auto takes a GPU where a trial has one, cpu otherwise."""
    edits: Edits = Edits()
    capability: Capability = Capability()
    space: Space = Space()
    epochs: Count = 25
    """At most so many passes over all edits (breadth-first) or steps per batch (depth-first)."""
    skip_below: NotNegative = 0.01
    """A batch whose loss is below takes no step; 0 never skips."""
    stop_below: NotNegative = 0.01
    """An epoch (breadth-first) or a batch (depth-first) whose loss is below ends; 0 never stops early."""
    search: Search = Search()
    resources: Resources = Resources()
    budget: Limits = Limits()

    @model_validator(mode="after")
    def _consistent(self) -> "Study":
        found = tuple(_contradictions(self))
        if found:
            text = "; ".join(message for _, _, message in found)
            raise PydanticCustomError("contradictions", "{text}", {"text": text, "found": found})
        return self


def _contradictions(study: Study) -> Iterable[tuple[str, tuple[str, ...], str]]:
    """For each: the field to point at, all fields that have a part in it (dotted), and what is wrong."""
    search, resources, rate = study.search, study.resources, study.space.learning_rate
    if search.method == "grid" and search.trials is not None:
        fields = ("search.trials", "search.method")
        yield (
            *_at(fields),
            (
                f"got {search.trials} with search.method grid, whose number of trials follows from its axes; "
                "leave trials out (null), or take random or optuna"
            ),
        )
    if search.method != "grid" and search.trials is None:
        fields = ("search.method", "search.trials")
        yield *_at(fields), f"{search.method} needs search.trials, the number of trials; expected e.g. trials: 30"
    if search.method == "grid" and isinstance(rate, LogUniform):
        fields = ("space.learning_rate", "search.method")
        yield *_at(fields), "log_uniform has no grid; expected a list of values, or search.method random or optuna"
    if resources.gpus > 0 and study.device in ("cpu", "mps"):
        fields = ("resources.gpus", "device")
        yield *_at(fields), f"got {resources.gpus:g} with device {study.device}; expected 0, or device cuda or auto"
    if resources.gpus == 0 and study.device.startswith("cuda"):
        fields = ("device", "resources.gpus")
        yield *_at(fields), f"{study.device} needs resources.gpus above 0: a trial without sees no GPU"
    own, index = max(1, math.ceil(resources.gpus)), int(study.device.partition(":")[2] or 0)
    if resources.gpus > 0 and index >= own:
        fields = ("device", "resources.gpus")
        seen = "its GPU as cuda:0" if own == 1 else f"its {own} GPUs as cuda:0 to cuda:{own - 1}"
        yield *_at(fields), f"got {study.device}, but a trial sees {seen}, whichever of the machine; expected cuda"


def _at(fields: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    return fields[0], fields
