"""A Ray cluster of several nodes on one machine: each a `ray start` of its own, with an address, ports and a token.

The head runs no trials, as in the cluster files. Every process is known by its parent, so that nodes can be killed, cut
off and ended without touching any other Ray of the machine. With links of their own (`tests.links`) nodes are on a network
that leads nowhere else; without, each has another address of the loopback interface.
"""

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.links import Links

TOKEN = secrets.token_hex(16)
"""Ray reads it once a process."""
STARTED = 90
"""Seconds until a node is up on a busy machine."""
HEALTH = {"initial_delay_ms": 1000, "period_ms": 1000, "timeout_ms": 2000, "failure_threshold": 4}
"""A node that does not answer is given up after some seconds; Ray's own settings take a minute."""


class Nodes:
    """A context manager: the head at first, then as many nodes as are added; none is left behind."""

    def __init__(self, head_cpus: int = 0, links: Links | None = None, **environment: str):
        """links: for the nodes, the head at their hub. environment: further settings of Ray for all nodes."""
        self.folder = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))  # sockets need short paths
        self._health = {f"RAY_health_check_{name}": str(value) for name, value in HEALTH.items()}
        self._more = environment
        self._head_cpus = head_cpus
        self._links = links
        self._nodes: list[subprocess.Popen] = []
        self._places: dict[int, str] = {}
        """Address by process of the node."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"{links.address if links else '127.0.0.1'}:{probe.getsockname()[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """What whoever connects needs."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}

    @property
    def beside(self) -> list[str]:
        """What a command begins with, to run where the head is."""
        return self._links.inside if self._links else []

    def __enter__(self) -> "Nodes":
        try:
            port = self.address.rpartition(":")[2]
            self._start(self._head_cpus, "--head", f"--port={port}", "--include-dashboard=false")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self._nodes:
            self.kill(node)
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, cpus: int = 1, *, wait: bool = True) -> subprocess.Popen:
        """One more node."""
        return self._start(cpus, f"--address={self.address}", wait=wait)

    def kill(self, node: subprocess.Popen) -> None:
        """kill -9 of everything on it."""
        for process in processes(node):
            try:
                process.kill()
            except psutil.Error:
                pass
        node.wait()

    def cut(self, node: subprocess.Popen) -> str:
        """Nothing of it reaches the others any more, though it is there; says how. Without links all of it is stopped: the
        others see the same of it, and it sees nothing of them."""
        if self._links:
            self._links.cut(self._places[node.pid])
            return "a link was cut"
        self._signal(node, signal.SIGSTOP)
        return "a node was stopped (no link to cut here)"

    def join(self, node: subprocess.Popen) -> None:
        """The end of `cut`."""
        if self._links:
            self._links.join(self._places[node.pid])
        else:
            self._signal(node, signal.SIGCONT)

    def workers(self, node: subprocess.Popen, title: str = "TrialWorker.train") -> list[psutil.Process]:
        """Its processes that run trials now; with the title "TrialWorker" those that wait for one as well."""
        return [process for process in processes(node) if title in _title(process)]

    def _signal(self, node: subprocess.Popen, number: int) -> None:
        for process in processes(node):
            try:
                process.send_signal(number)
            except psutil.Error:
                pass

    def _start(self, cpus: int, *arguments: str, wait: bool = True) -> subprocess.Popen:
        if not self._links:
            place, inside = f"127.0.0.{len(self._nodes) + 1}", []
        elif not self._nodes:
            place, inside = self._links.address, self._links.inside
        else:
            place, inside = self._links.add()
        log = self.folder / f"{place}.log"
        ports = [f"--{name}=0" for name in ("node-manager-port", "object-manager-port", "min-worker-port", "max-worker-port")]
        memory = ["--object-store-memory=100000000", "--disable-usage-stats"]
        node = subprocess.Popen(
            [*inside, Path(sys.executable).parent / "ray", "start", "--block", f"--num-cpus={cpus}", f"--node-ip-address={place}",
             f"--temp-dir={self.folder / str(len(self._nodes))}", *ports, *memory, *arguments],
            env={**os.environ, **self.environment, **self._health, **self._more, "OMP_NUM_THREADS": "1"},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )  # fmt: skip
        self._nodes.append(node)
        self._places[node.pid] = place
        until = time.monotonic() + STARTED
        while wait and "Ray runtime started" not in log.read_text():
            assert node.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        return node


def processes(node: subprocess.Popen) -> list[psutil.Process]:
    """Of a node, its own first."""
    try:
        parent = psutil.Process(node.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _end_with_parent() -> None:
    """SIGTERM when whoever started the node is killed: `ray start --block` then ends all of it. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
