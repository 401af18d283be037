"""The command `locft ui`: MLflow's web pages on this machine. Registered in `sweeps.commands.cli`."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from locft.errors import InputError
from sweeps.commands.console import print_json, say
from sweeps.commands.options import JsonOption, UriOption
from sweeps.tracking.address import check_reachable, mlflow_address, redact, resolve_uri, sqlite_path, take_credentials

HOST = "127.0.0.1"
PORT = 5000
"""Port that is tried first when the user names none."""
START_SECONDS = 120
"""Time limit for the server to answer; its first start on a small machine takes half a minute."""
_STOP_SECONDS = 10


def ui(
    tracking_uri: UriOption = None,
    port: Annotated[int | None, typer.Option(help="Default 5000, or any free port when that is taken.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Serve MLflow's pages on 127.0.0.1 and print the links to those that matter. Ctrl-C stops it."""
    from sweeps.tracking.study_run import list_studies

    def announce(address: str) -> None:
        studies = list_studies(address, base=address)
        if as_json:
            return print_json({"address": address, "studies": studies})
        say(f"MLflow: {address}")
        for found in studies:
            links = (f"  {name}: {link}" for name, link in found["links"].items())
            say(f"\n{found['name']} ({found['status']})", *links)

    serve(resolve_uri(tracking_uri), port, announce)


def serve(uri: str, port: int | None = None, announce: Callable[[str], None] = print) -> None:
    """Serve the pages of a store until Ctrl-C, or SIGTERM, which `locft` treats the same.

    uri: a resolved address. announce: called once with the address of the server, when it answers; if the store is itself
    a server, nothing else happens. Raises InputError when the named port is taken, or when the server does not start.
    """
    uri = take_credentials(uri)
    check_reachable(uri)
    if uri.startswith("http"):
        return announce(uri)
    with suppress(KeyboardInterrupt), running(uri, port) as (address, process):
        announce(address)
        raise InputError(f"the MLflow server exited unexpectedly with exit code {process.wait()}")


@contextmanager
def running(uri: str, port: int | None = None) -> Iterator[tuple[str, subprocess.Popen]]:
    """Run a server for a resolved sqlite or database address during the block; yields its address and its process.

    port: None takes 5000 or any free one. Raises InputError when the named port is taken, or with the server's last lines of
    output when it does not start.
    """
    port = _free_port(port)
    address = f"http://{HOST}:{port}"
    store = sqlite_path(uri)
    where = store.parent if store else Path.cwd()
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    environment = {
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": mlflow_address(uri, where),  # on the command line anyone could read its password
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # its processes would outlive the server
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    if store:
        store.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=where,  # where MLflow keeps the artifacts of new experiments
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group of its own, which the terminal's Ctrl-C does not reach
        )
        try:
            _wait_until_healthy(address, process, log)
            yield address, process
        finally:
            _end(process)


def _free_port(named: int | None) -> int:
    """The port that the user named; otherwise PORT, or any free one. Raises InputError if the named port is unusable."""
    if named is not None and not 1 <= named <= 65535:
        raise InputError(f"port {named} is not between 1 and 65535")
    for port in (PORT, 0) if named is None else (named,):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the last server may leave it in TIME_WAIT
            probe.bind((HOST, port))
            return probe.getsockname()[1]
    raise InputError(f"port {named} of {HOST} is in use; name another one, or leave out --port to use a free one")


def _wait_until_healthy(address: str, process: subprocess.Popen, log: BinaryIO) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach this machine
    until = time.monotonic() + START_SECONDS
    while True:
        time.sleep(0.2)
        with suppress(OSError):  # not up yet
            return opener.open(f"{address}/health", timeout=5).close()
        if process.poll() is not None or time.monotonic() > until:
            ended = f"start (exit code {process.returncode})"
            why = f"answer within {START_SECONDS} s" if process.returncode is None else ended
            log.seek(0)
            last_lines = "\n".join(log.read().decode(errors="replace").splitlines()[-15:])
            raise InputError(f"the MLflow server did not {why}:\n{redact(last_lines)}")


def _end(process: subprocess.Popen) -> None:
    """End the server and its children, which hold the port until the last of them is gone."""
    until = time.monotonic() + 2 * _STOP_SECONDS
    with suppress(ProcessLookupError):  # raised when none of them is left
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        while time.monotonic() < until:
            os.killpg(process.pid, 0)
            time.sleep(0.02)
