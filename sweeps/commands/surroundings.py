"""Supplies what libraries expect of the environment: a user name, a home folder, direct access to this machine's servers.

In a container, a process may run under a user id without a name and with a read-only home; company machines send every request
through a proxy. What is supplied here is inherited by the processes that a command starts. The command line and the
notebook functions both call `settle` first.
"""

import getpass
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from locft.cache import cache_folder
from locft.errors import InputError
from sweeps.tracking.address import LOCAL_HOSTS, check_writable

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def settle() -> list[str]:
    """Supply what the environment lacks; returns notices for the user. Raises InputError if there is no place for a home."""
    _have_a_name()
    _reach_this_machine()
    return _have_a_home()


def _have_a_name() -> None:
    """`getpass.getuser`, which MLflow, Ray and PyTorch call, fails if the user id has no passwd entry."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = "unknown"  # the first variable that `getuser` reads


def _reach_this_machine() -> None:
    """Exempt this machine from the proxies, in both variables: a library that finds one of them does not read the other."""
    if any(os.environ.get(name) for name in PROXIES):
        small, capital = os.environ.get("no_proxy", ""), os.environ.get("NO_PROXY", "")
        for name, listed in (("no_proxy", small or capital), ("NO_PROXY", capital or small)):
            given = [host.strip() for host in listed.split(",") if host.strip()]
            if "*" not in given:
                os.environ[name] = ",".join(dict.fromkeys([*given, *LOCAL_HOSTS]))


def _have_a_home() -> list[str]:
    """Use a folder under the temporary directory as home if the real one does not exist or cannot be written."""
    given = os.environ.get("XDG_CACHE_HOME")
    home = Path(os.path.expanduser("~"))
    with suppress(InputError):
        if home.is_absolute():
            if given or not cache_folder().is_dir():  # one that is there may be read-only, filled by others
                check_writable(home, "the cache")
            return []
    place = Path(tempfile.gettempdir()) / f"locft-{os.getuid()}"
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        check_writable(place, "the cache")
        if place.stat().st_uid != os.getuid():
            raise InputError(f"{place} belongs to another user")
    except (OSError, InputError) as error:
        raise InputError(f"there is no writable home folder, and {error}; set HOME and XDG_CACHE_HOME") from None
    os.environ["HOME"] = str(place)
    return [] if given else [f"no writable home folder, using {place}; set XDG_CACHE_HOME to keep the cache"]
