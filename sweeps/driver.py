"""What a driver keeps on its machine of a study that it runs: a lock against a second driver, and undelivered results.

Both lie in the user's state folder (XDG_STATE_HOME), one folder a study and tracking store.
"""

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import filelock
from platformdirs import user_state_path

from locft.errors import InputError
from sweeps.tracking.address import resolve_uri, without_credentials


def driver_folder(study_id: str, tracking_uri: str | None) -> Path:
    """The folder of a study in a store; it need not be there."""
    store = hashlib.sha256(without_credentials(resolve_uri(tracking_uri)).encode()).hexdigest()[:12]
    return user_state_path("locft") / "studies" / f"{study_id}-{store}"


@contextmanager
def only_driver(folder: Path, name: str) -> Iterator[None]:
    """Hold the study against other drivers on this machine. A killed driver's hold ends with it.

    Raises InputError when another process has it, or the folder cannot be written.
    """
    lock, owner = folder / "driver.lock", folder / "driver.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(lock, timeout=0)
        held.acquire()
    except filelock.Timeout:
        by = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
        raise InputError(
            f"study {name!r} is being run already, by {by}: wait for it or end it (Ctrl-C there keeps what is finished)"
        ) from None
    except OSError as error:
        raise InputError(f"cannot write {folder} ({error.strerror or error}); set XDG_STATE_HOME") from None
    try:
        began = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {began}", encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        held.release()
