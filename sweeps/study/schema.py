"""The types of a study: what is swept, on which model and edits, how it is searched and with what resources.

They are the keys of the study file (`sweeps.study.reader` reads it). A value of these types is valid and free of
contradictions; what depends on the model is checked by `sweeps.study.plan.check_against_model`.

`Space` and the settings of a study that are not swept derive from `analysis.stats.axes`, which also says what a valid
value of an axis is. The other fields are checked by the same rules, so there is one wording for every wrong value.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    PlainValidator,
    Tag,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from analysis.stats.axes import AXES, AXIS, SWEPT, Axis
from locft.data.field_map import read_field_map
from locft.errors import InputError, did_you_mean
from locft.train.formats import EXPECTED as FORMATS_EXPECTED
from locft.train.formats import NAMES as FORMATS
from locft.train.formats import RAW, parse_formats

if TYPE_CHECKING:
    from locft.data.requests import EditSet
    from locft.data.suites import Suite

MAX_TRIALS = 100_000
"""A study with more trials than this is taken for a mistake: the driver keeps all of them in memory."""
LIKE = 0.5
"""How like a valid word a wrong one must be for the message to name it: fp32 is like float32."""


def read_value(name: str, value: Any) -> Any:
    """A value for an axis in the form that trials hold. Raises InputError ("got 0, expected a whole number of at least 1")."""
    axis = AXIS[name]
    if not axis.accepts(value):
        raise InputError(wrong_value(value, axis.expected(), axis.choices))
    return _formats_text(value) if name == "train_formats" else value


def _formats_text(text: str) -> str:
    """Trained formats in one canonical spelling, so that ids do not depend on it: the known ones first, in a fixed order."""
    given = parse_formats(text, trained=True)
    spellings = (",".join(formats) for formats in (_in_order(given), given))
    return next(one for one in spellings if set(parse_formats(one)) == set(given))


def read_formats(value: Any) -> tuple[str, ...]:
    """The formats to ask in, from a text or a list of texts, in a fixed order. Raises InputError."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(wrong_value(value, FORMATS_EXPECTED))
    return _in_order(parse_formats(texts))


def _in_order(formats: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(formats, key=[*FORMATS, *formats].index))


def wrong_value(got: Any, expected: str, choices: Iterable[str] = ()) -> str:
    """The message about a wrong value, with the nearest of the choices if one is near."""
    if isinstance(got, float) and not math.isfinite(got):
        expected = expected.replace("a number", "a finite number", 1)
    near = did_you_mean(got.lower(), choices, LIKE) if isinstance(got, str) else ""
    return f"got {show(got)}, expected {expected}{near}"


def show(value: Any) -> str:
    """A value as it would be written in a study file, shortened."""
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(got: str, valid: Iterable[str]) -> str:
    """The end of a message about a wrong word: the nearest valid one, if any is near, and all of them."""
    words = list(valid)
    return f"{did_you_mean(got.lower(), words, LIKE)} (valid: {', '.join(words)})"


def _problem(text: str, item: int | None = None) -> PydanticCustomError:
    """item: index of the value at fault in a list."""
    return PydanticCustomError("problem", "{text}", {"text": text, "item": item})


def _number(value: Any) -> Any:
    """A number as float, including one that a YAML 1.1 reader takes for text, such as 1e-4. Anything else is unchanged."""
    try:
        return value if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return value


def read_by(read: Callable[[Any], Any]) -> Any:
    """The type of a field whose value is read by a function that may raise InputError."""

    def check(value: Any) -> Any:
        try:
            return read(value)
        except InputError as error:
            raise _problem(str(error)) from None

    return Annotated[Any, PlainValidator(check)]


def _checked(
    accepts: Callable[[Any], bool], expected: str, *, number: bool = False, choices: Sequence[str] = ()
) -> Any:
    """The type of a field that takes what the function `accepts` allows. number: convert to float first."""

    def read(value: Any) -> Any:
        found = _number(value) if number else value
        if not accepts(found):
            raise InputError(wrong_value(value, expected, choices))
        return found

    return read_by(read)


def _matching(pattern: str, expected: str) -> Any:
    """The type of a field that takes text of this form."""
    return _checked(lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None, expected)


def _type_of(axis: Axis) -> Any:
    """The type of one value of an axis."""
    return _checked(axis.accepts, axis.expected(), number=axis.type is float, choices=axis.choices)


def _rule(kind: type, **rule: Any) -> Axis:
    """A rule for fields that are not axes, in the same terms."""
    return Axis("", kind, None, "", "", **rule)


def _list_of(item: Any, expected: str = "a value or a list of values", *, least: int = 1) -> Any:
    """A list of distinct values, by default at least one; a single value stands for a list of one."""

    def listed(value: Any) -> Any:
        if value is None or isinstance(value, Mapping):
            raise _problem(wrong_value(value, expected))
        if isinstance(value, list | tuple) and len(value) < least:
            raise _problem(wrong_value(value, "at least one value"))
        return value if isinstance(value, list | tuple) else (value,)

    return Annotated[tuple[item, ...], BeforeValidator(listed), AfterValidator(_distinct)]


def _distinct(values: tuple) -> tuple:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise _problem(f"got {show(value)} twice, expected every value once", index)
    return values


_COUNT, _POSITIVE = _rule(int, at_least=1), _rule(float, above=0)
Text, Count, Positive = _type_of(_rule(str)), _type_of(_COUNT), _type_of(_POSITIVE)
Index, Seed = (_type_of(_rule(int, at_least=0)), _type_of(_rule(int, at_least=0, below=2**32)))
Trials = _type_of(_rule(int, at_least=1, below=MAX_TRIALS + 1))
Name = _matching(
    "[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "1 to 100 letters, digits, '.', '_' or '-', beginning with a letter or digit"
)
"""Safe as the name of an MLflow experiment, a metric and a file."""
Formats = read_by(read_formats)
Device = _matching(r"auto|cpu|mps|cuda(:\d+)?", "auto, cpu, cuda, cuda:N or mps")
Gpus = _checked(
    lambda value: value == 0.0 or (_POSITIVE.accepts(value) and (value <= 1 or value == int(value))),
    "a fraction of one GPU or a whole number of GPUs",
    number=True,
)
Concurrent = _checked(lambda value: value == "auto" or _COUNT.accepts(value), "auto or a whole number of at least 1")
Minutes = _checked(
    lambda value: value in (None, "auto") or _POSITIVE.accepts(value),
    "auto, null, or a number of minutes above 0",
    number=True,
)


class Section(BaseModel):
    """Base of every part of the file: immutable once read, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Edits(Section):
    """The edits that every trial makes."""

    source: Text = "atlas"
    """`atlas` or `fictitious` (built in), an edit file, or the id of a data set on the hub."""
    limit: Count | None = None
    """Use at most this many edits; null uses all."""
    sample_seed: Seed | None = None
    """Seed of the sample of `limit` edits, or of fictitious ones; null takes the first ones, or seed 0."""
    order_seed: Seed | None = None
    """Seed of a random order of the edits; null keeps the order of the file. It matters for streams and space.edit_count."""
    asked: Count | None = 1000
    """Measure at most this many edits, a random sample of them; null measures all."""
    map: read_by(read_field_map) = {}
    """Keys of a file in no known layout, such as {prompt: question, target: answer, rephrases: [q1, q2]}."""

    def load(self, *, only_marked: bool = False) -> "EditSet":
        """only_marked: the source may hold nothing but edits that are taken back. Raises InputError with every problem of
        the source."""
        from locft.data.requests import load_edits

        found = load_edits(
            self.source, limit=self.limit, sample_seed=self.sample_seed, fields=self.map, only_marked=only_marked
        )
        return found if self.order_seed is None else found.shuffled(self.order_seed)


class Capability(Section):
    """The tasks that show whether the model can still do what it could before the edit."""

    suite: _type_of(_rule(str, choices=("probes",))) | None = "probes"
    """The built-in tasks; null leaves them out."""
    tasks: dict[Name, Text] = {}
    """More tasks: any name, and the benchmark file or hub id."""
    lm_eval: _list_of(Text, "a task or a list of tasks", least=0) = ()
    """Tasks of lm-evaluation-harness, such as [arc_easy, mmlu] (extra `harness`)."""
    lm_eval_path: Text | None = None
    """Folder with more task files of lm-evaluation-harness (YAML)."""
    limit: Count | None = None
    """Use at most this many items per task; null uses all."""
    prose: Text | None = None
    """Plain text file for drift_kl and perplexity; null takes the built-in prose."""
    prose_tokens: Index = 2048
    """Use at most this many tokens of that text; 0 leaves drift_kl and perplexity out."""

    def load(self) -> "Suite | None":
        """None where nothing is to be measured. Raises InputError with the problems of all tasks and of the prose."""
        from locft.data.suites import load_suite

        if not (self.suite or self.tasks or self.lm_eval):
            return None
        return load_suite(
            self.suite, self.tasks, self.limit, self.prose, lm_eval=self.lm_eval, lm_eval_path=self.lm_eval_path
        )


class EveryLayer(Section):
    """Layers 0, every, 2 * every, ..."""

    every: Count
    """Distance between neighbouring layers."""


def _two(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _problem(wrong_value(value, "two numbers, [low, high]"))
    return value


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] >= bounds[1]:
        raise _problem(wrong_value(bounds, "the lower bound first: [low, high]"))
    return bounds


class LogUniform(Section):
    """Any value between two bounds, uniform in its logarithm. For the search methods random and optuna."""

    log_uniform: Annotated[tuple[Positive, Positive], BeforeValidator(_two), AfterValidator(_ordered)]
    """Lowest and highest value."""


def _forms(axis: str, expected: str, rule: type[Section], word: str | None = None) -> Any:
    """The type of an axis that takes a list, a rule or, optionally, a word for all values."""

    def form(value: Any) -> str:
        """The brackets distinguish it from a key in an error's location."""
        if word and isinstance(value, str):
            return "<word>"
        return "<rule>" if isinstance(value, Mapping | BaseModel) else "<list>"

    forms = Annotated[_list_of(_type_of(AXIS[axis]), expected), Tag("<list>")] | Annotated[rule, Tag("<rule>")]
    forms |= Annotated[_checked(lambda value: value == word, expected), Tag("<word>")]
    return Annotated[forms, Discriminator(form)]


_FORMS: dict[str, tuple[Any, Any]] = {
    "layer": (
        _forms("layer", "all, a layer, a list of layers such as [3, 7], or {every: k}", EveryLayer, "all"),
        "all",
    ),
    "learning_rate": (
        _forms("learning_rate", "a number, a list of numbers, or {log_uniform: [low, high]}", LogUniform),
        (AXIS["learning_rate"].default,),
    ),
    "train_formats": (_list_of(read_by(partial(read_value, "train_formats"))), (AXIS["train_formats"].default,)),
    "precision": (_type_of(_rule(str, choices=("auto", *AXIS["precision"].choices))), "auto"),
}
"""Type and default of the axes that have more forms in a study file than in a trial. A precision of auto is bfloat16
where the device multiplies it natively."""


def _field(axis: Axis) -> tuple[Any, Any]:
    """Type and default of an axis: a list in `space`, a single value in the study itself."""
    plain = (_list_of(_type_of(axis)), (axis.default,)) if axis.swept else (_type_of(axis), axis.default)
    return _FORMS.get(axis.name, plain)


Space: Any = create_model("Space", __base__=Section, __module__=__name__, **{axis.name: _field(axis) for axis in SWEPT})
Space.__doc__ = """The swept axes (`analysis.stats.axes.SWEPT`). Each is a list of values, or one value."""


class Search(Section):
    """How the space is searched."""

    method: _type_of(_rule(str, choices=("grid", "random", "optuna"))) = "grid"
    """grid: every combination. random: a sample. optuna: chosen while running, for reliability and capability."""
    trials: Trials | None = None
    """Number of trials for random and optuna; that of a grid follows from its axes."""
    seed: Seed = 0
    """Seed of the sample."""


class Resources(Section):
    """What one trial gets."""

    cpus: Count = 1
    """CPU threads."""
    gpus: Gpus = 0.0
    """GPUs; with a fraction several trials share one."""
    concurrent: Concurrent = "auto"
    """Trials at a time; auto: as many as the cores, GPUs and memory of the machine or cluster allow."""
    minutes: Minutes = "auto"
    """A trial that takes longer is cancelled and counts as failed. auto: half an hour, or thirty times what a slow
    machine should need if that is longer, so that only a hanging trial is cancelled; null sets no limit."""

    def places(self, nodes: Sequence[Mapping[str, float]], trial_bytes: int = 0) -> int:
        """Number of trials that fit on these nodes at a time.

        nodes: Ray's resources of each node. Its "memory", in bytes, also limits the number, though to no less than one
        per node, since `trial_bytes` is a rough prediction; a number set in the study (`concurrent`) overrides it.
        Raises InputError if no node holds even one.
        """
        fit = sum(self._held(node, trial_bytes) for node in nodes)
        if not fit:
            sizes = [(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes] or [(0, 0)]
            cpus, gpus = max(sizes, key=lambda size: (size[1], size[0]) if self.gpus else size)
            where = " on the largest node that is up" if len(nodes) > 1 else ""
            raise InputError(
                f"resources: a trial needs {self.cpus:g} CPUs and {self.gpus:g} GPUs, but there are {cpus:g} "
                f"CPUs and {gpus:g} GPUs{where}; request less, or give the --address of a larger cluster"
            )
        return fit if self.concurrent == "auto" else min(fit, self.concurrent)

    def _held(self, node: Mapping[str, float], trial_bytes: int) -> int:
        """Trials that a node holds. One that takes a fraction of a GPU gets it from a single GPU."""
        held, gpus = int(node.get("CPU", 0) // self.cpus), node.get("GPU", 0)
        if self.gpus:
            held = min(held, int(gpus // self.gpus) if self.gpus >= 1 else int(gpus) * int(1 / self.gpus + 1e-9))
        if trial_bytes and "memory" in node and self.concurrent == "auto":
            held = min(held, max(1, int(node["memory"] // trial_bytes)))
        return held


class Limits(Section):
    """Limits that end a study early. The same command with higher limits continues it."""

    minutes: Positive | None = None
    """Wall-clock time of one run of the command; trials still running then are cancelled."""
    trials: Trials | None = None
    """Finished trials of the study, those of earlier runs included."""


class _Subject(Section):
    name: Name
    """Name of the study everywhere, including its MLflow experiment."""
    model: Text = "smollm2-135m"
    """A built-in name, a hub id, a local folder, or a GGUF file."""


_Settings: Any = create_model(
    "_Settings", __base__=_Subject, __module__=__name__, **{axis.name: _field(axis) for axis in AXES if not axis.swept}
)


class Study(_Settings):
    """A whole study, valid and without contradictions. Its first fields are the axes that have one value per study."""

    device: Device = "auto"
    """auto: a GPU if trials get one (`resources.gpus`), else cpu."""
    edits: Edits = Edits()
    ask_formats: Formats = (RAW,)
    """The formats in which every trial asks its questions: raw, qa, chat, unseen or texts with {prompt}, as a list or
    separated by commas."""
    capability: Capability = Capability()
    space: Space = Space()
    search: Search = Search()
    resources: Resources = Resources()
    budget: Limits = Limits()

    @property
    def trial_device(self) -> str:
        """Where trials, and the driver for them, compute: on `device`; with auto, on the CPU unless trials get a GPU."""
        if self.device != "auto":
            return self.device
        return "cuda" if self.resources.gpus else "cpu"

    @model_validator(mode="after")
    def _consistent(self) -> "Study":
        if found := tuple(_contradictions(self)):
            text = "; ".join(message for _, message in found)
            raise PydanticCustomError("contradictions", "{text}", {"text": text, "found": found})
        return self


def _contradictions(study: Study) -> Iterable[tuple[tuple[str, ...], str]]:
    """For each: the (dotted) fields that contradict each other, beginning with the one to point at, and what is wrong."""
    search, gpus, device = study.search, study.resources.gpus, study.device
    if search.method != "grid" and search.trials is None:
        need = f"{search.method} needs search.trials, the number of trials; expected e.g. trials: 30"
        yield ("search.method", "search.trials"), need
    if search.method == "grid" and search.trials is not None:
        own = f"got {search.trials} with search.method grid, whose number of trials follows from its axes"
        yield ("search.trials", "search.method"), f"{own}; leave trials out (null), or use random or optuna"
    if search.method == "grid" and isinstance(study.space.learning_rate, LogUniform):
        need = "expected a list of values, or search.method random or optuna"
        yield ("space.learning_rate", "search.method"), f"log_uniform cannot be searched as a grid; {need}"
    if not gpus:
        if device.startswith("cuda"):
            need = f"{device} needs resources.gpus above 0: without it, a trial sees no GPU"
            yield ("device", "resources.gpus"), need
    elif device in ("cpu", "mps"):
        yield ("resources.gpus", "device"), f"got {gpus:g} with device {device}; expected 0, or device cuda or auto"
    elif int(device.partition(":")[2] or 0) >= (own := math.ceil(gpus)):
        seen = "its GPU as cuda:0" if own == 1 else f"its {own} GPUs as cuda:0 to cuda:{own - 1}"
        text = f"got {device}, but a trial sees {seen}, whichever it gets; expected cuda"
        yield ("device", "resources.gpus"), text
