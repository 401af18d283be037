"""The command `locft evaluate`: what a model, or an edit of it, does on edits and capability items. Registered in
`sweeps.commands.cli`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from analysis.stats.wording import seconds
from locft.errors import InputError
from sweeps.commands.console import notice, print_json
from sweeps.commands.options import (
    DELTA_HELP,
    EditsOption,
    FormatsOption,
    JsonOption,
    LimitOption,
    LoadOptions,
    MapOption,
    ModelArgument,
    UriOption,
    edits_of,
)
from sweeps.commands.summaries import print_metrics
from sweeps.commands.workbench import asked_formats, workbench

if TYPE_CHECKING:
    from sweeps.study.schema import Capability, Edits

PROBES = "probes"


@dataclass(frozen=True)
class Measured:
    """What is measured: the edits, and what else is asked for."""

    edits: EditsOption
    limit: LimitOption = None
    field_map: MapOption = None
    ask_formats: FormatsOption = None
    capability: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ITEMS",
            help="Also measure capability, drift and perplexity: on probes (the 701 built-in items), or on a benchmark file or "
            "hub id. Repeatable.",
        ),
    ] = None

    def named(self) -> "Edits":
        """Raises InputError for an empty source or a wrong map."""
        return edits_of(self.edits, self.limit, self.field_map)


def evaluate(
    model: ModelArgument,
    measured: Measured,
    load: LoadOptions,
    delta: Annotated[str | None, typer.Option(help=f"{DELTA_HELP} Default: the model as it is.")] = None,
    tracking_uri: UriOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure MODEL, or MODEL with a delta, on edits and, with --capability, on what else it can do."""
    from sweeps.tracking.registry import load_delta

    formats, capability = asked_formats(measured.ask_formats), capability_of(measured.capability or ())
    edits = measured.named().load()
    change = load_delta(delta, tracking_uri) if delta else None
    began = time.monotonic()
    bench = workbench(model, load, edits, capability, formats, fingerprint=change.base_fingerprint if change else None)
    metrics = bench.baseline.metrics
    if change:
        notice(f"measuring the edited model, in at most about {seconds(time.monotonic() - began)}")
        metrics = bench.measure(change).metrics
    if as_json:
        where = change.position if change else None
        return print_json({"model": model, "position": where, "metrics": metrics, "unedited": bench.baseline.metrics})
    print_metrics(metrics, bench.baseline.metrics)


def capability_of(items: Sequence[str]) -> "Capability":
    """The tasks that --capability names, a file by its name without the ending. Raises InputError for one given twice."""
    from sweeps.study.schema import Capability

    tasks = {Path(source).stem if Path(source).exists() else source.replace("/", "-").replace(":", "-"): source
             for source in items if source != PROBES}  # fmt: skip
    if len(tasks) + (PROBES in items) < len(items):
        raise InputError(f"--capability: got {', '.join(items)}, expected every name once")
    return Capability(suite=PROBES if PROBES in items else None, tasks=tasks)
