"""Finished trials on their way to the tracking store: written to disk first, and kept there until the store has them.

The study goes on while the store is unreachable or the disk is full, and the next run of the same command delivers what is
missing. A result that the store refuses does not hold up the others.
"""

import hashlib
import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from platformdirs import user_state_path

from analysis.stats.wording import plural
from sweeps.study.trial_types import TrialConfig, TrialResult, pack_result, unpack_result
from sweeps.tracking.address import without_credentials
from sweeps.tracking.store import Refused, TrackingError

if TYPE_CHECKING:
    from sweeps.run.dispatch import Reporter

T = TypeVar("T")

PATIENCE_SECONDS = 120.0
"""How long a driver that has nothing else to do waits for an unreachable store."""
GRACE_SECONDS = 5.0
"""How long it waits when the study ended with an error."""
PAUSES = (1.0, 2.0, 5.0, 10.0, 20.0)
"""Seconds between attempts; the last one repeats."""

_log = logging.getLogger(__name__)


def _retry(call: Callable[[], T], say: Callable[[str], None], give_up: Callable[[float], bool]) -> T:
    """Call a function that needs the store until the store answers; returns what the function does.

    say: called with a message when the store goes away and when it is back. give_up: waits the given seconds; True ends the
    attempts with the last TrackingError. Refused is raised at once.
    """
    away_since, pauses = None, chain(PAUSES, repeat(PAUSES[-1]))
    while True:
        try:
            found = call()
        except Refused:
            raise
        except TrackingError as error:
            if away_since is None:
                away_since = time.monotonic()
                say(f"not recorded yet, retrying: {error}")
            if give_up(next(pauses)):
                raise
        else:
            if away_since is not None:
                say(f"recording works again, after {time.monotonic() - away_since:.0f} s")
            return found


def with_retries(call: Callable[[], T]) -> T:
    """Call a function that needs the store; while the store is unreachable, retry for `PATIENCE_SECONDS`, and log a warning.

    For a driver that has nothing else to do. Raises TrackingError.
    """
    until = time.monotonic() + PATIENCE_SECONDS

    def give_up(pause: float) -> bool:
        over = time.monotonic() + pause > until
        time.sleep(0 if over else pause)
        return over

    return _retry(call, _log.warning, give_up)


def study_folder(study_id: str, store: str) -> Path:
    """Where this machine keeps a study's lock and undelivered results: one folder for each study and store, in the user's
    state folder (XDG_STATE_HOME). It need not exist. store: the tracking address, resolved."""
    address = hashlib.sha256(without_credentials(store).encode()).hexdigest()[:12]
    return user_state_path("locft") / "studies" / f"{study_id}-{address}"


def open_outbox(study_id: str, store: str) -> "Outbox":
    """The outbox of a study for a store, on this machine. Creates no folder."""
    return Outbox(study_folder(study_id, store) / "undelivered")


class Outbox:
    """A folder of results that the store does not have yet, one file each."""

    def __init__(self, folder: Path):
        self.folder = folder

    def keep(self, result: TrialResult) -> None:
        """Write a result, unless it is there, atomically and so that it survives a power failure. Raises OSError."""
        if self._file(result).exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=self.folder, suffix=".partial")
        try:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(pack_result(result))
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, self._file(result))
            names = os.open(self.folder, os.O_RDONLY)  # the file's name has to reach the disk, too
            os.fsync(names)
            os.close(names)
        finally:
            Path(unfinished).unlink(missing_ok=True)

    def drop(self, result: TrialResult) -> None:
        """Forget a result that the store has."""
        self._file(result).unlink(missing_ok=True)

    def set_aside(self, result: TrialResult) -> Path:
        """Take out a result that the store refuses for good; returns the file in which it stays."""
        return self._file(result).replace(self._file(result).with_suffix(".refused"))

    def kept(self) -> list[TrialResult]:
        """All results, the oldest first. A file that cannot be read (a disk that failed) is logged and left out."""
        found = []
        for file in sorted(self.folder.glob("*.result"), key=lambda path: path.stat().st_mtime_ns):
            try:
                found.append(unpack_result(file.read_text(encoding="ascii")))
            except Exception as error:  # zlib, base85, JSON and missing keys raise six kinds of error
                aside = file.replace(file.with_suffix(".unreadable"))
                _log.warning("%s is not a readable result: %s", aside, error)
        return found

    def __len__(self) -> int:
        return sum(1 for _ in self.folder.glob("*.result"))

    def _file(self, result: TrialResult) -> Path:
        return self.folder / f"{result.config.id}.result"


class Recorder:
    """Passes trials on to a reporter, and finished ones, in their order and from a thread of its own, to the store.

    A reporter itself (`sweeps.run.dispatch.Reporter`), and a context manager. Leaving it waits for pending results, at most
    `PATIENCE_SECONDS` (less after an error), and raises TrackingError if the store stayed unreachable until then. Undelivered
    results stay in the outbox, and so do those that the store refused: the next run offers them once more, since a passing
    fault may look like a refusal.
    """

    def __init__(self, deliver: Callable[[TrialResult], Any], outbox: Outbox, reporter: "Reporter"):
        """deliver: raises TrackingError when the store does not take a result."""
        self._deliver, self._outbox, self._reporter = deliver, outbox, reporter
        self._queue: queue.SimpleQueue[TrialResult | None] = queue.SimpleQueue()
        self._open: dict[str, TrialResult] = {}
        """By trial id: results that are neither delivered nor refused."""
        self._lost: dict[str, tuple[str, ...]] = {}
        """Trial id -> why attempts at it were lost."""
        self._cause = ""
        self._give_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)

    def note(self, text: str) -> None:
        self._reporter.note(text)

    def started(self, running: int) -> None:
        self._reporter.started(running)

    def retried(self, config: TrialConfig, cause: str) -> None:
        self._lost[config.id] = (*self._lost.get(config.id, ()), cause)
        self._reporter.retried(config, cause)

    def finished(self, result: TrialResult, running: int) -> None:
        """Returns at once. A result that cannot be written to disk stays in memory, and the reporter is told."""
        result = replace(result, retried=self._lost.pop(result.config.id, ()))
        self._open[result.config.id] = result
        if reason := self._unsaved_because(result):
            self.note(f"cannot save a result in {self._outbox.folder} while it waits to be recorded: {reason}")
        self._queue.put(result)
        self._reporter.finished(result, running)

    def __enter__(self) -> "Recorder":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._queue.put(None)
        self._thread.join(PATIENCE_SECONDS if kind is None else GRACE_SECONDS)
        if self._thread.is_alive():
            self._give_up.set()
            self._thread.join()
        reasons = [reason for result in self._open.values() if (reason := self._unsaved_because(result))]
        if self._open and kind is None:
            said = [self._cause]
            if kept := len(self._open) - len(reasons):
                again = "run the same command again to deliver them"
                said.append(f"{kept} finished trials are kept in {self._outbox.folder}; {again}")
            if reasons:
                lost = plural(len(reasons), "finished trial")
                said.append(f"{lost} could not be saved there ({reasons[0]}) and will be run again")
            raise TrackingError("; ".join(said))

    def _work(self) -> None:
        try:
            for result in iter(self._queue.get, None):
                self._pass_on(result)
                self._open.pop(result.config.id, None)
        except TrackingError as error:
            self._cause = str(error)

    def _pass_on(self, result: TrialResult) -> None:
        """Deliver one result. Raises TrackingError when the attempts are given up before the store answers."""
        try:
            _retry(partial(self._deliver, result), self.note, self._give_up.wait)
        except Refused as error:
            where = f"kept in {self._outbox.folder}, and the next run offers it again"
            if reason := self._unsaved_because(result):
                where = f"not saved in {self._outbox.folder}: {reason}; the trial will be run again"
            self.note(f"{result.config.position} is finished, but the store refuses its result ({where}): {error}")
        else:
            self._outbox.drop(result)

    def _unsaved_because(self, result: TrialResult) -> str | None:
        """Why a result is not on disk and cannot be written there; None if it is there."""
        try:
            self._outbox.keep(result)
        except OSError as error:
            return error.strerror or str(error)
        return None
