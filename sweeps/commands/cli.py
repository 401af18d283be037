"""The `locft` command: reads arguments, calls the platform, prints. Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted.

A command's answer goes to standard output; progress, notices and errors go to standard error. With --json, standard
output is one JSON object. Heavy libraries are imported by the commands that need them, so that --help answers at once.
"""

import logging
import os
import signal
import sys
import warnings
from typing import Literal

import typer

from locft.errors import InputError
from sweeps.commands.console import break_silence, complain, notice
from sweeps.commands.edit import apply, bench, edit, edits, positions
from sweeps.commands.evaluate import ask, evaluate
from sweeps.commands.export import export
from sweeps.commands.options import INTERRUPTED, grouped
from sweeps.commands.study import plan, report, select, status, sweep
from sweeps.commands.surroundings import settle
from sweeps.commands.ui import ui

app = typer.Typer(
    name="locft",
    help="Where should a language model be edited, and what does the edit cost?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


CONTINUED = {"sweep", "select"}
"""Commands that, run again after Ctrl-C, continue from what is finished."""


def main() -> None:
    """Entry point: turns errors into one clear message and an exit code. SIGTERM ends a command as Ctrl-C does."""
    _be_quiet()
    break_silence()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        notice(*settle())
        code = app(standalone_mode=False)
    except InputError as error:
        complain(error.problems)
        code = 2
    except Exception as error:
        code = _unexpected(error)
    if code == INTERRUPTED:
        kept = "; finished work is kept, and the same command continues from there"
        notice(f"interrupted{kept if CONTINUED.intersection(sys.argv[1:2]) else ''}")
    sys.exit(code)


for _command in (positions, plan, sweep, status, report, select, edits, edit, ask, apply, export, evaluate, ui):
    app.command()(grouped(_command))
app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(bench)


def _unexpected(error: Exception) -> Literal[1, 2]:
    """Typer's own errors are bad input; anything else is failed work, reported in one line."""
    if hasattr(error, "format_message"):  # click exceptions; typer has its own copy of click
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            return 2
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "locft"
        complain([f"{error.format_message().rstrip('.')} (see `{command} --help`)"])
        return 2
    lines = str(error).strip().splitlines() or [""]
    said = lines[-1 if lines[0].startswith("Traceback") else 0]  # Ray quotes another process's whole traceback
    complain([f"{type(error).__name__}: {said}"])
    if os.environ.get("LOCFT_DEBUG"):
        raise error
    notice(
        "this is an unexpected error and probably a bug: please report it with the command and its output under LOCFT_DEBUG=1, "
        "which includes the traceback"
    )
    return 1


def _be_quiet() -> None:
    """Turn off telemetry, and the progress bars and advice that libraries print between our lines."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
