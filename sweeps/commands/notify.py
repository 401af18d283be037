"""Telling somebody that a study ended: a command is run, an address is posted to. Neither is recorded with the study."""

import http.client
import json
import shlex
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from locft.errors import InputError

COMMAND_SECONDS = 60
WEBHOOK_SECONDS = 10


@dataclass(frozen=True)
class Hooks:
    """Who is told. Create with `Hooks.checked`."""

    command: tuple[str, ...] = ()
    """Words; no shell is between."""
    webhook: str | None = None

    @classmethod
    def checked(cls, command: str | None, webhook: str | None) -> "Hooks":
        """InputError with what is wrong with either."""
        problems, words = [], ()
        try:
            words = tuple(shlex.split(command or ""))
        except ValueError as error:
            problems.append(f"--on-end: got {command!r}, expected a command ({error})")
        if webhook and not _is_address(webhook):  # it may hold a secret: it is not repeated
            problems.append("--webhook: expected an address such as https://HOST/PATH or http://HOST:PORT/PATH")
        if problems:
            raise InputError(problems)
        return cls(words, webhook)

    def tell(self, event: dict[str, Any], warn: Callable[[str], None]) -> None:
        """Run the command with the event as JSON on its standard input, and post it. A failure is a warning."""
        text = json.dumps(event, allow_nan=False).encode()
        if self.command:
            try:
                done = subprocess.run(self.command, input=text, timeout=COMMAND_SECONDS, stdout=subprocess.DEVNULL)
                if done.returncode:
                    warn(f"--on-end: {self.command[0]} ended with exit code {done.returncode}")
            except (OSError, subprocess.TimeoutExpired) as error:
                warn(f"--on-end: {error}")
        if self.webhook:
            request = urllib.request.Request(self.webhook, text, {"Content-Type": "application/json"})
            try:
                urllib.request.urlopen(request, timeout=WEBHOOK_SECONDS).close()
            except (OSError, ValueError, http.client.HTTPException) as error:
                warn(f"--webhook: not delivered ({getattr(error, 'reason', None) or type(error).__name__})")

    @contextmanager
    def at_the_end(self, study: str, warn: Callable[[str], None]) -> Iterator[dict[str, Any]]:
        """Tells how the block ended. The value is the event, to be filled; an error is told and goes on."""
        event: dict[str, Any] = {"study": study, "event": "finished"}
        try:
            yield event
        except BaseException as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            event |= {"event": "failed", "error": lines[0][:500]}
            raise
        finally:
            self.tell(event, warn)


def _is_address(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False
