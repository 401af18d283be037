"""The command `locft edits`: what is understood of an edit file. Registered in `sweeps.commands.cli`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis.stats.wording import plural
from locft.errors import InputError
from sweeps.commands.console import notice, print_json, print_table, say, writable, write
from sweeps.commands.options import EDITS_HELP, JsonOption, LimitOption, MapOption, edits_of

if TYPE_CHECKING:
    from locft.data.requests import EditSet

MOST_SHOWN = 5
"""Contradictory prompts that are spelled out; --json has all of them."""


def edits(
    source: Annotated[str, typer.Argument(metavar="FILE", help=EDITS_HELP)],
    limit: LimitOption = None,
    field_map: MapOption = None,
    fix: Annotated[
        Path | None,
        typer.Option("--fix", metavar="OUT.jsonl", help="Write the edits there in the project's own layout."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is understood of an edit file: layout, counts, the first edit, what is not read, what cannot hold."""
    from locft.data.requests import load_edits, own_record

    named = edits_of(source, limit, field_map)
    if fix and fix.exists() and Path(source).exists() and fix.samefile(source):
        raise InputError(f"--fix {fix}: this is the file that is read; name another one")
    if fix:
        writable(fix)
    found = load_edits(named.source, limit=named.limit, fields=named.map)
    records = [own_record(*pair) for pair in zip(found.requests, found.truths, strict=True)]
    if fix:
        write(fix, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    contradictions = found.contradictions()
    if as_json:
        return print_json(
            {
                "source": source, "layout": found.layout, "records": found.records, "fingerprint": found.fingerprint,
                "counts": _counts(found), "first": records[0], "findings": asdict(found.findings),
                "contradictions": contradictions, "unread": dict(found.unread), "fixed": fix and str(fix),
            }
        )  # fmt: skip
    say(f"{source}: layout {found.layout}, {plural(found.records, 'record')}")
    print_table(("", "count"), [(name, f"{count:,}") for name, count in _counts(found).items()])
    say(f"The first edit:\n{json.dumps(records[0], ensure_ascii=False, indent=2)}")
    for sentence in found.sentences() or ("No problems found.",):
        say(sentence)
    for prompt, targets in list(contradictions.items())[:MOST_SHOWN]:
        say(f"  {prompt!r} is to be answered {' and '.join(map(repr, targets))}")
    if fix:
        notice(f"written: {fix}")


def _counts(found: "EditSet") -> dict[str, Any]:
    requests = found.requests
    return {
        "edits": len(requests),
        "with a subject": sum(bool(request.subject) for request in requests),
        "with a true answer": sum(request.ground_truth is not None for request in requests),
        "rephrases": sum(len(request.rephrases) for request in requests),
        "locality prompts": sum(len(request.locality) for request in requests),
        "with an answer": sum(one.answer is not None for request in requests for one in request.locality),
        "portability questions": sum(len(request.portability) for request in requests),
    }
