"""A Ray cluster of several nodes on one machine: each is a `ray start` with its own address and ports, behind a token.

The head runs no trials, as in the cluster files. Every process is found through its parent, so that a node can be
killed or cut off without touching any other Ray on the machine. With links (`tests.links`) the nodes are on a network
that leads nowhere else; without, each has its own address of the loopback interface.
"""

import contextlib
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
"""One for all clusters: Ray reads it once per process."""
STARTED = 90
"""Seconds a node may take to start on a busy machine."""
HEALTH = {"initial_delay_ms": 1000, "period_ms": 1000, "timeout_ms": 2000, "failure_threshold": 4}
"""Ray gives up a node that does not answer after some seconds; its defaults take a minute."""


class Nodes:
    """The nodes of a cluster. A context manager: entering starts the head, leaving ends every node."""

    def __init__(self, links: Links | None = None):
        """links: connect the nodes, with the head at the hub."""
        self.folder = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))  # sockets need short paths
        self._health = {f"RAY_health_check_{name}": str(value) for name, value in HEALTH.items()}
        self._links = links
        self._nodes: list[subprocess.Popen] = []
        self._addresses: dict[int, str] = {}
        """Process id of a node -> its address."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"{links.address if links else '127.0.0.1'}:{probe.getsockname()[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that a client of the cluster needs."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}

    @property
    def beside(self) -> list[str]:
        """The beginning of a command line that runs at the head's place in the network."""
        return self._links.inside if self._links else []

    def __enter__(self) -> "Nodes":
        try:
            port = self.address.rpartition(":")[2]
            self._start(0, "--head", f"--port={port}", "--include-dashboard=false")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self._nodes:
            self.kill(node)
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, cpus: int = 1, *, wait: bool = True) -> subprocess.Popen:
        """Starts one more node. wait: until it is up."""
        return self._start(cpus, f"--address={self.address}", wait=wait)

    def kill(self, node: subprocess.Popen) -> None:
        """Kills (SIGKILL) every process of a node."""
        for process in processes(node):
            with contextlib.suppress(psutil.Error):
                process.kill()
        node.wait()

    def cut(self, node: subprocess.Popen) -> str:
        """Cuts a node off, though it keeps running; returns how.

        Without links its processes are stopped (SIGSTOP), which looks the same to the other nodes.
        """
        if self._links:
            self._links.cut(self._addresses[node.pid])
            return "a link was cut"
        self._signal(node, signal.SIGSTOP)
        return "a node was stopped (no link to cut here)"

    def join(self, node: subprocess.Popen) -> None:
        """Undoes `cut`."""
        if self._links:
            self._links.join(self._addresses[node.pid])
        else:
            self._signal(node, signal.SIGCONT)

    def workers(self, node: subprocess.Popen, title: str = "TrialWorker.train") -> list[psutil.Process]:
        """A node's processes that are training a trial; with the title "TrialWorker", idle workers too."""
        return [process for process in processes(node) if title in _title(process)]

    def _signal(self, node: subprocess.Popen, number: int) -> None:
        for process in processes(node):
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def _start(self, cpus: int, *arguments: str, wait: bool = True) -> subprocess.Popen:
        if not self._links:
            place, inside = f"127.0.0.{len(self._nodes) + 1}", []
        elif not self._nodes:
            place, inside = self._links.address, self._links.inside
        else:
            place, inside = self._links.add()
        log = self.folder / f"{place}.log"
        ports = [f"--{name}-port=0" for name in ("node-manager", "object-manager", "min-worker", "max-worker")]
        memory = ["--object-store-memory=100000000", "--disable-usage-stats"]
        own = [f"--num-cpus={cpus}", f"--node-ip-address={place}", f"--temp-dir={self.folder / str(len(self._nodes))}"]
        ray = Path(sys.executable).parent / "ray"
        node = subprocess.Popen(
            [*inside, ray, "start", "--block", *own, *ports, *memory, *arguments],
            env={**os.environ, **self.environment, **self._health, "OMP_NUM_THREADS": "1"},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )  # fmt: skip
        self._nodes.append(node)
        self._addresses[node.pid] = place
        until = time.monotonic() + STARTED
        while wait and "Ray runtime started" not in log.read_text():
            assert node.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        return node


def processes(node: subprocess.Popen) -> list[psutil.Process]:
    """The processes of a node, `ray start` first."""
    try:
        parent = psutil.Process(node.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _end_with_parent() -> None:
    """Makes a node end when the process that started it is killed (`ray start --block` obeys SIGTERM). Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
