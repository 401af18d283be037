"""Network links of their own for processes on one machine, which can be cut and joined again: namespaces with a virtual cable each.

All addresses lie in these namespaces, and no cable leads out of them: nothing else on the machine is touched. Needs root and
iproute2 on Linux.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

_NETWORK = "10.213.77"


class Links:
    """A hub with a switch, and any number of places linked to it. A context manager: at the end nothing of it is left."""

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
            # by its route to elsewhere a process finds its own address; there is nothing at the end of it
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
        """Of the hub."""
        return f"{_NETWORK}.1"

    @property
    def inside(self) -> list[str]:
        """What a command begins with, to run at the hub."""
        return _inside(self._hub)

    def add(self) -> tuple[str, list[str]]:
        """One more place: its address, and what a command begins with, to run there."""
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
        """No packet passes between the place and all others, and neither side is told."""
        self._in(self._hub, "link", "set", f"cable{address.rpartition('.')[2]}", "nomaster")

    def join(self, address: str) -> None:
        """The end of `cut`."""
        self._in(self._hub, "link", "set", f"cable{address.rpartition('.')[2]}", "master", "switch")

    def _in(self, namespace: str, *arguments: str) -> None:
        _ip("-netns", namespace, *arguments)


def possible() -> bool:
    """Whether such links can be made here: tried out."""
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
    command: Sequence[str] = ["ip", *arguments]
    subprocess.run(command, check=check, capture_output=True, text=True)
