"""The cache folder, and files and folders in it that appear whole or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from locft.errors import InputError


def cache_folder() -> Path:
    """Where converted models and computed states are kept (XDG_CACHE_HOME is respected)."""
    return user_cache_path("locft")


def write_atomically(path: Path, text: str) -> None:
    """Write a file that other processes see whole or not at all, even if this one is killed. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as partial:
        partial.write(text)
    os.replace(partial.name, path)


def remembered(kind: str, key: str, find: Callable[[], str]) -> str:
    """A string that takes time to compute, kept in the cache for other processes; without a cache, each computes it again."""
    note = cache_folder() / kind / f"{digest(key)}.txt"
    with suppress(OSError, ValueError):
        return note.read_text(encoding="utf-8")
    found = find()
    with suppress(OSError):
        write_atomically(note, found)
    return found


def digest(text: str) -> str:
    """SHA-256 of the text, cut to 16 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_key(parts: Any) -> str:
    """A hash (20 hexadecimal digits) of JSON-able values, to name what is made from them; other values are hashed as `str`."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def made_once(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """The folder `kind`/`key` of the cache, filled by `make` if it is not there yet.

    One process makes it while the others wait, and it becomes visible only when complete. Raises InputError if the
    cache cannot be written to.
    """
    folder = cache_folder() / kind / key
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock_of(folder)):
            if not folder.is_dir():
                for dead in folder.parent.glob(f"{key}.partial-*"):  # left by a killed process: we hold the lock
                    shutil.rmtree(dead, ignore_errors=True)
                partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{key}.partial-"))
                try:
                    make(partial)
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise InputError(f"cache folder {folder.parent}: {error.strerror or error}; set XDG_CACHE_HOME") from error
    return folder


def lock_of(folder: Path) -> str:
    """Path of the lock that is held while a folder of the cache is filled or removed."""
    return f"{folder}.lock"


def make_room(keep: Path, needed: int, limit: int) -> None:
    """Remove the least recently used neighbours of the folder `keep`, except those whose lock is held, until `needed` more
    bytes fit into the `limit` for all of them together. Raises OSError."""
    keep.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(keep.parent / "room.lock"):
        folders = sorted(
            (f for f in keep.parent.iterdir() if f.is_dir() and ".partial-" not in f.name),
            key=lambda f: f.stat().st_mtime,
        )
        sizes = {folder: sum(file.stat().st_size for file in folder.iterdir()) for folder in folders}
        total = sum(sizes.values())
        for folder in folders:
            if total + needed <= limit:
                return
            try:
                with FileLock(lock_of(folder), timeout=0):
                    shutil.rmtree(folder, ignore_errors=True)  # processes that have it mapped keep their pages
                    total -= sizes[folder]
            except Timeout:
                continue
