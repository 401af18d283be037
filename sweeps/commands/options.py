"""Arguments and options that several commands of `locft` share, and the grouping of options into dataclasses."""

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass, make_dataclass, replace
from functools import wraps
from inspect import Parameter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis.stats.axes import AXES, Axis
from analysis.stats.formats import ONE_EDIT
from locft.errors import InputError
from locft.machine import usable_cores

if TYPE_CHECKING:
    from locft.model.models import LoadedModel
    from sweeps.study.plan import PreparedStudy
    from sweeps.study.schema import Edits

INTERRUPTED = 130
"""Exit code after Ctrl-C."""
EDITS = "atlas, fictitious (with --limit), an edit file, or the hub id of a data set"
EDITS_HELP = f"Edits: {EDITS}."
FORMATS = ONE_EDIT["train_formats"]
"""Formats that a single edit is asked in by default: those it is trained in."""

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Built-in name, hub id, folder or .gguf file.")]
DELTA_HELP = "A delta file, the folder `locft edit` wrote, or models:/NAME@ALIAS."
FormatsOption = Annotated[
    str | None,
    typer.Option(
        help="Formats in which edits are asked: raw, qa, chat or a text with {prompt}, separated by commas"
        f" (default {FORMATS})."
    ),
]
EditsOption = Annotated[str, typer.Option(help=EDITS_HELP)]
MapOption = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="FIELD=KEY",
        help="Keys of an edit file in no known layout: prompt=question, rephrases=q1,q2, locality.prompt=near. Repeatable.",
    ),
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Use the first N edits.")]
SampleSeedOption = Annotated[
    int | None, typer.Option(min=0, help="Draw the N edits at random with this seed instead of taking the first N.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field, such as space.layer=[3,7]. Repeatable."),
]
UriOption = Annotated[
    str | None,
    typer.Option(help="MLflow store; default MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the current folder."),
]
AddressOption = Annotated[str | None, typer.Option(help="Ray cluster: auto or HOST:PORT. Default: this machine.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads; default all cores.")]
RemoteCodeOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model. Off by default.")
]


@dataclass(frozen=True)
class LoadOptions:
    """How the model is loaded and where it runs; None where an option is not given."""

    dtype: Annotated[
        str | None, typer.Option(help="Data type of the frozen weights: float32 (default), bfloat16 or float16.")
    ] = None
    device: Annotated[str | None, typer.Option(help="auto (default), cpu, cuda or cuda:N.")] = None
    threads: ThreadsOption = None
    trust_remote_code: RemoteCodeOption = False

    def load(self, model: str) -> "LoadedModel":
        """Load the model, and let PyTorch use the requested number of CPU threads. Raises InputError as `load_model` does."""
        import torch

        from locft.model.models import load_model

        torch.set_num_threads(self.threads or usable_cores())
        return load_model(
            model, dtype=self.dtype or "float32", device=self.device or "auto", trust_remote_code=self.trust_remote_code
        )


@dataclass(frozen=True)
class StudyOptions:
    """Which study a command is about."""

    study: Annotated[str, typer.Argument(metavar="STUDY", help="A ready study (quickstart, ...) or a study file.")]
    overrides: SetOption = None

    def prepared(self) -> "PreparedStudy":
        """The study, checked and resolved. Raises InputError with everything that is wrong with it."""
        from sweeps.study.reader import load_study
        from sweeps.study.resolve import prepare

        overrides = self.overrides or ()
        changes = [word for change in overrides for word in ("--set", change)]
        return replace(prepare(load_study(self.study, overrides)), command=("locft", "sweep", self.study, *changes))


def typed() -> tuple[str, ...]:
    """The command as it was typed, without --json."""
    return ("locft", *(word for word in sys.argv[1:] if word != "--json"))


def comma_separated(text: str | None) -> list[str]:
    """The names in an option that takes several, separated by commas."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def idle_without(option: str, given: Mapping[str, Any]) -> list[str]:
    """A problem for each option that is given (neither None nor an empty list), since it means nothing without `option`."""
    names = (name for name, value in given.items() if value not in (None, []))
    return [f"{name}: it only applies to {option}; give {option} as well" for name in names]


@dataclass(frozen=True)
class EditsOptions:
    """Which edits a command is about, if any."""

    edits: Annotated[str | None, typer.Option(help=EDITS_HELP)] = None
    limit: LimitOption = None
    sample_seed: SampleSeedOption = None
    field_map: MapOption = None

    def named_edits(self) -> "Edits | None":
        """The edits; None without --edits. Raises InputError for an empty name, a wrong map, and other options given without
        --edits."""
        from locft.data.field_map import read_field_map
        from sweeps.study.schema import Edits

        if self.edits is None:
            others = {"--limit": self.limit, "--sample-seed": self.sample_seed, "--map": self.field_map}
            if problems := idle_without("--edits", others):
                raise InputError(problems)
            return None
        if not self.edits.strip():
            raise InputError(f"--edits: got nothing, expected {EDITS}")
        keys = self._keys()
        try:
            fields = read_field_map(keys)
        except InputError as error:
            raise InputError(f"--map: {problem}" for problem in error.problems) from None
        return Edits(source=self.edits, limit=self.limit, sample_seed=self.sample_seed, map=fields)

    def _keys(self) -> dict[str, list[str]]:
        """The keys that --map gives for each field. Raises InputError."""
        found: dict[str, list[str]] = {}
        for option in self.field_map or ():
            name, _, keys = option.partition("=")
            if not name.strip() or not keys.strip():
                raise InputError(f"--map {option}: expected FIELD=KEY, such as prompt=question")
            found.setdefault(name.strip(), []).extend(key.strip() for key in keys.split(","))
        return found


DEFAULTS = {"learning_rate": 0.0005, "precision": "whichever is faster here", **ONE_EDIT}
"""Defaults of `locft edit`'s options that differ from those of the axes."""


def _training_option(axis: Axis) -> tuple[str, Any, None]:
    """Name, type and default of the field for an axis."""
    text, valid = axis.doc[0].upper() + axis.doc[1:], f"{axis.expected()}; "
    if axis.doc.startswith(axis.choices):  # the text already explains the choices
        text, valid = axis.doc, ""
    help_text = f"{text} ({valid}default {DEFAULTS.get(axis.name, axis.default)})."
    return axis.name, Annotated[axis.type | None, typer.Option(help=help_text)], None


TrainingOptions = make_dataclass(
    "TrainingOptions", [_training_option(axis) for axis in AXES if axis.trained], frozen=True
)
TrainingOptions.__doc__ = "How to train: an option for each axis that training takes, None where it is not given."


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer takes it: a parameter that is a dataclass becomes one option for each of its fields."""
    groups: dict[str, list[str]] = {}
    parameters: list[Parameter] = []
    declared = inspect.signature(command).parameters
    for name, parameter in declared.items():
        if is_dataclass(parameter.annotation):
            fields = inspect.signature(parameter.annotation).parameters
            groups[name] = list(fields)
            parameters += fields.values()
        else:
            parameters.append(parameter)

    @wraps(command)
    def flat(**given: Any) -> None:
        for name, fields in groups.items():
            given[name] = declared[name].annotation(**{field: given.pop(field) for field in fields})
        command(**given)

    # Keyword-only, since a group may hold options with a default and precede a parameter without one.
    flat.__signature__ = inspect.Signature([p.replace(kind=Parameter.KEYWORD_ONLY) for p in parameters])
    return flat
