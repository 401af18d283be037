"""Arguments and options that several commands of `locft` share."""

from typing import TYPE_CHECKING, Annotated

import typer

from locft.errors import InputError

if TYPE_CHECKING:
    from sweeps.study.schema import Edits

INTERRUPTED = 130
"""Exit code after Ctrl-C."""
StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="A ready study (quickstart, ...) or a study file.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Built-in name, hub id, folder or .gguf file.")]
EDITS = "atlas, an edit file, or a data set's hub id."
EditsOption = Annotated[str, typer.Option("--edits", help=EDITS)]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Use the first N edits.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field: space.layer=[3,7]. Repeatable."),
]
UriOption = Annotated[
    str | None,
    typer.Option("--tracking-uri", help="MLflow store; default MLFLOW_TRACKING_URI, else sqlite:///mlflow.db here."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
AddressOption = Annotated[str | None, typer.Option(help="Ray cluster: auto, or HOST:PORT. Default: this machine.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="Of the frozen weights: float32, bfloat16, float16.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default all cores.")]
RemoteCodeOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model. Off unless asked for.")
]


def edits_of(source: str, limit: int | None) -> "Edits":
    """The edits that two options name. Raises InputError for none."""
    from sweeps.study.schema import Edits

    if not source.strip():
        raise InputError(f"--edits: got nothing, expected {EDITS.rstrip('.')}")
    return Edits(source=source, limit=limit)
