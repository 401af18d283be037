"""Network links between processes on one machine, which tests can cut and join: namespaces joined by virtual cables.

No cable leads out of the namespaces, so nothing else on the machine is touched. Needs root and iproute2 on Linux.
"""

import os
import shutil
import subprocess
import sys

_NETWORK = "10.213.77"


class Links:
    """A hub with a switch, and places linked to it. A context manager: leaving it removes all of it."""

    def __init__(self) -> None:
        self._hub = f"locft{os.getpid()}"
        self._places: list[str] = []

    def __enter__(self) -> "Links":
        try:
            _ip("netns", "add", self._hub)
            self._in(self._hub, "link", "set", "lo", "up")
            self._in(self._hub, "link", "add", "switch", "type", "bridge")
            self._in(self._hub, "address", "add", f"{self.address}/24", "dev", "switch")
            self._in(self._hub, "link", "set", "switch", "up")
            # A process finds its own address through its default route; nothing is at the other end.
            self._in(self._hub, "route", "add", "default", "dev", "switch")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for namespace in (*self._places, self._hub):
            _ip("netns", "delete", namespace, check=False)  # takes its cables with it

    @property
    def address(self) -> str:
        """The hub's address."""
        return f"{_NETWORK}.1"

    @property
    def inside(self) -> list[str]:
        """The beginning of a command line that runs at the hub."""
        return _inside(self._hub)

    def add(self) -> tuple[str, list[str]]:
        """Adds a place: its address, and the beginning of a command line that runs there."""
        number = len(self._places) + 2
        place, cable, address = f"{self._hub}n{number}", f"cable{number}", f"{_NETWORK}.{number}"
        _ip("netns", "add", place)
        self._places.append(place)
        self._in(self._hub, "link", "add", cable, "type", "veth", "peer", "name", "cable", "netns", place)
        self._in(self._hub, "link", "set", cable, "master", "switch", "up")
        self._in(place, "link", "set", "lo", "up")
        self._in(place, "address", "add", f"{address}/24", "dev", "cable")
        self._in(place, "link", "set", "cable", "up")
        self._in(place, "route", "add", "default", "dev", "cable")
        return address, _inside(place)

    def cut(self, address: str) -> None:
        """Stops every packet between the place at `address` and all others; neither side is told."""
        self._in(self._hub, "link", "set", f"cable{address.rpartition('.')[2]}", "nomaster")

    def join(self, address: str) -> None:
        """Undoes `cut`."""
        self._in(self._hub, "link", "set", f"cable{address.rpartition('.')[2]}", "master", "switch")

    def _in(self, namespace: str, *arguments: str) -> None:
        _ip("-netns", namespace, *arguments)


def possible() -> bool:
    """Whether such links can be made here, found out by making some."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        with Links() as links:
            links.add()
    except subprocess.CalledProcessError:
        return False
    return True


def _inside(namespace: str) -> list[str]:
    return ["ip", "netns", "exec", namespace]


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)
