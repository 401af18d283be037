"""A study's driver, as drivers on other machines see it: a tag of the study's run that is renewed while it is at work.

The lock of `sweeps.driver` keeps a second driver of this machine away; where a tracking server is shared, this does it
for the others.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import psutil

from locft.errors import InputError
from sweeps.tracking.store import TrackingError
from sweeps.tracking.address import sqlite_path

if TYPE_CHECKING:
    from sweeps.tracking.study_run import Tracker

TAG = "locft.driver"
BEAT_SECONDS = 60.0
GONE_SECONDS = 300.0
"""A driver of which nothing was heard for so long is taken to be dead, and another may take over."""
CLAIM_SECONDS = 2.0
"""After which a driver looks whether the tag still names it: others that began in the same moment have set it by then."""


@dataclass(frozen=True)
class Driver:
    """What a driver says of itself: where it runs, when it said so (seconds since the epoch), trials under way then."""

    host: str
    process: int
    at: float
    running: int = 0

    @property
    def silent(self) -> float:
        """Seconds since it was heard of."""
        return max(0.0, time.time() - self.at)


def driver_at_work(tracker: "Tracker | None", study_id: str) -> Driver | None:
    """The driver that works on a study; None where there is none, or nothing was heard of it for `GONE_SECONDS`.

    tracker: None where nothing of the study is recorded yet. One that was killed counts as working for so long, unless it
    was on this machine.
    """
    said = tracker.study_tag(study_id, TAG) if tracker else None
    try:
        told = json.loads(said or "{}")
        driver = Driver(str(told["host"]), int(told["process"]), float(told["at"]), int(told.get("running", 0)))
    except (ValueError, KeyError, TypeError):
        return None
    return None if _ended(driver) or driver.silent > GONE_SECONDS else driver


def _ended(driver: Driver) -> bool:
    """Whether it is known to be gone: it was on this machine, and its number is nobody's or that of a later process."""
    if driver.host != socket.gethostname():
        return False
    try:
        return psutil.Process(driver.process).create_time() > driver.at + 2  # it is known to the second
    except psutil.NoSuchProcess:
        return True


def refuse_second_driver(tracker: "Tracker | None", study_id: str, name: str) -> None:
    """Raises InputError when another driver works on the study (`driver_at_work`); call it before anything is written."""
    driver = driver_at_work(tracker, study_id)
    if driver is None or driver.host == socket.gethostname() and driver.process == os.getpid():
        return
    raise InputError(
        f"study {name!r} is being run already, by process {driver.process} on {driver.host}, heard of {driver.silent:.0f} s"
        " ago: wait for it or end it there; if it was killed, this command takes over in"
        f" {GONE_SECONDS - driver.silent:.0f} s"
    )


class Heartbeat:
    """What the tag says besides where the driver runs; written by the driver, read by the thread that says it."""

    def __init__(self) -> None:
        self.running = 0
        self._news = threading.Event()
        self._over = False

    def heard(self, running: int) -> None:
        """So many trials are under way. Told with the next beat; that it has begun, at once."""
        if running and not self.running:
            self._news.set()
        self.running = running

    def stop(self) -> None:
        self._over = True
        self._news.set()

    def wait(self, seconds: float) -> bool:
        """Until there is something to say; False when it is over."""
        self._news.wait(seconds)
        self._news.clear()
        return not self._over


@contextmanager
def at_work(tracker: "Tracker", study_id: str) -> Iterator[Heartbeat]:
    """Says so in the store while the block runs. A store that is away hears it later; nothing fails for it.

    Raises InputError when another driver works on the study. Of several that begin in the same moment on different machines
    one goes on: whose tag is the last.
    """
    heartbeat = Heartbeat()

    def refuse_others() -> None:
        with suppress(TrackingError):
            refuse_second_driver(tracker, study_id, tracker.study_tag(study_id, "mlflow.runName") or study_id)

    def say(driver: Driver | None) -> None:
        with suppress(TrackingError):
            tracker.tag_study(study_id, TAG, driver and json.dumps(asdict(driver)))

    def beat() -> None:
        while heartbeat.wait(BEAT_SECONDS):
            say(Driver(socket.gethostname(), os.getpid(), time.time(), heartbeat.running))

    refuse_others()
    say(Driver(socket.gethostname(), os.getpid(), time.time()))
    if sqlite_path(tracker.uri) is None:  # in a file of this machine, its lock has decided already
        time.sleep(CLAIM_SECONDS)
        refuse_others()
    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield heartbeat
    finally:
        heartbeat.stop()
        thread.join()
        say(None)
