"""Connects to the Ray that a study runs on, this machine's or a cluster's: within seconds, or else an error says why not.

Ray takes seconds to import; `locft status` and a study with nothing left to run do without it.
"""

import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from locft.errors import InputError, one_line
from locft.machine import usable_cores
from sweeps.run.dispatch import WORKER_RESTARTS, Room
from sweeps.study.footprint import this_machine
from sweeps.study.schema import Resources

T = TypeVar("T")

CONNECT_SECONDS = 5
"""How long a cluster may take to accept a connection."""
NODE_SECONDS = 120
"""How long a node may take to start a process and look for the model."""
_SOCKET_BYTES = 103
"""Longest path of a socket, in bytes, that every system accepts."""
_SOCKET = "/ray/session_2026-11-28_12-00-00_123456_1234567/sockets/plasma_store.1"
"""The longest of Ray's paths below the temporary folder."""
_SHORT = "/tmp"
TOKEN_HINT = (
    "set RAY_AUTH_MODE=token and the cluster's own token (RAY_AUTH_TOKEN, or ~/.ray/auth_token copied from its head)"
)


@contextmanager
def ray_cluster(address: str | None, resources: Resources, trial_bytes: int = 0, model: str = "") -> Iterator[Room]:
    """Connect to the cluster at `address` ("auto" finds one), or start Ray on this machine and stop it afterwards.

    If Ray already runs in this process, it is used and left running. trial_bytes: predicted memory of a trial. model: must be
    visible to every node of a cluster. Raises InputError when the cluster does not answer, refuses our token, cannot hold a
    single trial, or has a node that lacks this package or the model.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_task_oom_retries", str(WORKER_RESTARTS))  # by default Ray retries without end
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # a model's relative path means the same folder in workers
    if address is not None:
        _check_reachable(address)
    import ray

    def trials_that_fit() -> int:
        return resources.places(nodes_there(), trial_bytes)

    if ray.is_initialized():
        yield Room(trials_that_fit)
        return
    if address is None:  # fails at once, not after the seconds that Ray needs to start
        resources.places([this_machine()])
    _start(address)
    try:
        room = Room(trials_that_fit)
        if address is not None:
            check_nodes(model)
        yield room
    finally:
        ray.shutdown()


def _start(address: str | None) -> None:
    import ray

    own = {} if address is not None else {"include_dashboard": False, **_short_folder()}
    if address is None and usable_cores() < (os.cpu_count() or 1):
        own["num_cpus"] = usable_cores()  # Ray would count all cores of the machine
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **own)
    except ray.exceptions.AuthenticationError as error:
        raise InputError(_no_cluster(address, f"there is no token; {TOKEN_HINT}")) from error
    except Exception as error:  # a node that is too busy to start in time is a bare one
        cause = one_line(error)
        if address is not None and isinstance(error, ConnectionError):  # something listens, but does not let us in
            cause += f", although something is listening there: is it Ray, of this version? If so, {TOKEN_HINT}"
        raise InputError(_no_cluster(address, cause)) from error


def _short_folder() -> dict[str, str]:
    """Ray's option for a short folder, where the usual path is too long for its sockets. Raises InputError if there is none."""
    usual = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(usual)) + len(_SOCKET) <= _SOCKET_BYTES:
        return {}
    try:
        tempfile.TemporaryFile(dir=_SHORT).close()
    except OSError as error:
        raise InputError(
            f"the temporary folder {usual} has a path of {len(os.fsencode(usual))} bytes, too long for Ray's sockets, and "
            f"{_SHORT} cannot be written ({error.strerror or error}); set RAY_TMPDIR to a folder with a path of at most "
            f"{_SOCKET_BYTES - len(_SOCKET)} bytes"
        ) from None
    return {"_temp_dir": f"{_SHORT}/ray"}


def _check_reachable(address: str) -> None:
    """Raises InputError unless something listens at the address: Ray itself would try for minutes, or for ever."""
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")  # one attempt; if nothing answers it, this is not Ray
    given = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host, _, port = given.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return  # ray.init finds it, or says what is wrong with it
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(_no_cluster(given, f"nothing answers there ({error})")) from None


def _no_cluster(address: str | None, cause: str) -> str:
    if address is None:
        return f"Ray could not be started on this machine: {cause}"
    return (
        f"Ray cluster {address!r}: {cause.rstrip('.')}; start one with `ray up ray_cluster.yaml` or "
        "`ray start --head`, or omit --address to run on this machine"
    )


def check_nodes(model: str) -> None:
    """Raises InputError unless every node that runs trials can import this package and sees the same model files as this machine
    (none, if the model is not a local path)."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    path = Path(model).absolute()
    expected, problems, answers = _file_sizes(path), [], {}
    look = ray.remote(num_cpus=0, max_retries=0)(_file_sizes)
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU", 0):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            answers[node["NodeManagerAddress"]] = look.options(scheduling_strategy=there).remote(path)
    for place, answer in answers.items():
        try:
            found = ray.get(answer, timeout=NODE_SECONDS)
        except ray.exceptions.GetTimeoutError:
            problems.append(f"node {place} did not answer within {NODE_SECONDS} s")
        except ray.exceptions.RayError as error:
            cause = str(error).strip().splitlines()[-1]
            problems.append(f"node {place} cannot run this package ({cause}); install the same version there")
        else:
            if found != expected:
                what = "its files there differ" if found else "there are no files there"
                problems.append(
                    f"model {model!r}: node {place} does not see {path} as this machine does ({what}); put it on storage that"
                    " all nodes mount at the same path, or name a hub id"
                )
    if problems:
        raise InputError(problems)


def _file_sizes(path: Path) -> dict[str, int]:
    """File name -> bytes, for a file or for the files in a folder; empty when there is none."""
    files = [path] if path.is_file() else path.glob("*")
    return {file.name: file.stat().st_size for file in files if file.is_file()}


def on_workers(works: Sequence[Callable[[], T]], resources: Resources) -> list[T]:
    """Run functions on workers, in parallel where there is room; returns their results in the same order.

    Raises whatever the first one that fails raises; InputError when Ray killed every attempt because a node ran out of memory.
    """
    import ray

    options = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_retries": WORKER_RESTARTS}
    task = ray.remote(**options)(lambda work: work())
    try:
        return ray.get([task.remote(work) for work in works])
    except ray.exceptions.RayTaskError as error:  # its own text is the worker's whole traceback
        raise error.cause from error
    except ray.exceptions.OutOfMemoryError as error:
        tries = f"measuring on a worker ran out of memory {WORKER_RESTARTS + 1} times"
        raise InputError(f"{tries}: {str(error).splitlines()[0]}") from error


def nodes_there() -> list[dict[str, float]]:
    """Ray's resources of each node that is up."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
