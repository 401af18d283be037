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
from typing import TYPE_CHECKING

import psutil

from locft.errors import InputError
from sweeps.tracking_store import TrackingError

if TYPE_CHECKING:
    from sweeps.tracking import Tracker

TAG = "locft.driver"
BEAT_SECONDS = 60.0
GONE_SECONDS = 300.0
"""A driver of which nothing was heard for so long is taken to be dead, and another may take over."""


def refuse_second_driver(tracker: "Tracker | None", study_id: str, name: str) -> None:
    """Raises InputError when a driver elsewhere works on the study; call it before anything is written.

    tracker: None where nothing of the study is recorded yet. One that was killed counts as working for `GONE_SECONDS`,
    unless it was on this machine.
    """
    said = tracker.study_tag(study_id, TAG) if tracker else None
    try:
        driver = json.loads(said or "{}")
        host, process, at = str(driver["host"]), int(driver["process"]), float(driver["at"])
    except (ValueError, KeyError, TypeError):
        return
    silent = max(0.0, time.time() - at)
    here = host == socket.gethostname()
    if silent > GONE_SECONDS or here and (process == os.getpid() or not psutil.pid_exists(process)):
        return
    raise InputError(
        f"study {name!r} is being run already, by process {process} on {host}, heard of {silent:.0f} s ago: wait for it or"
        f" end it there; if it was killed, this command takes over in {GONE_SECONDS - silent:.0f} s"
    )


@contextmanager
def at_work(tracker: "Tracker", study_id: str) -> Iterator[None]:
    """Says so in the store while the block runs. A store that is away hears it later; nothing fails for it."""
    over = threading.Event()

    def say(now: dict[str, object] | None) -> None:
        with suppress(TrackingError):
            tracker.tag_study(study_id, TAG, now and json.dumps(now))

    def beat() -> None:
        while True:
            say({"host": socket.gethostname(), "process": os.getpid(), "at": time.time()})
            if over.wait(BEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        say(None)
