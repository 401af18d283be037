"""The Ray that a study runs on: this machine's or a cluster, reached within seconds or told why not."""

import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from locft.errors import InputError

if TYPE_CHECKING:
    from sweeps.study.schema import Resources

CONNECT_SECONDS = 5
"""How long a cluster may take to accept a connection."""
TOKEN_HINT = (
    "set RAY_AUTH_MODE=token and the cluster's own token (RAY_AUTH_TOKEN, or ~/.ray/auth_token copied from its head)"
)
NODE_SECONDS = 120
"""How long a node may take to start a process and look for the model."""
LOOK_SECONDS = 2.0
"""How often a cluster is asked what it holds."""

WORKER_RESTARTS = 2
"""Work whose worker process died is tried so many times more."""


class Room:
    """How many trials run at a time: as many as the nodes that are there now hold, fewer once memory ran out."""

    def __init__(self, resources: "Resources", trial_bytes: int = 0):
        """trial_bytes: predicted memory of a trial. Raises InputError when not a single one fits."""
        self._resources, self._trial_bytes = resources, trial_bytes
        self.empty = False
        """Every node that could run a trial is gone."""
        self._most = math.inf
        self._fit = self._look()
        self._looked = time.monotonic()

    def trials(self) -> int:
        """At least one, also while a cluster has no node to run it."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            try:
                self._fit, self.empty = self._look(), False
            except InputError:  # another may come
                self._fit, self.empty = 1, True
            self._looked = time.monotonic()
        return min(self._fit, self._most)

    def narrow(self, running: int) -> None:
        """Memory ran out with so many trials running: from now on at most half of them."""
        self._most = min(self._most, max(1, running // 2))

    def _look(self) -> int:
        return self._resources.places(nodes_there(), self._trial_bytes)


def nodes_there() -> list[dict[str, float]]:
    """Ray's resources of each node that is up."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@contextmanager
def ray_session(
    address: str | None, resources: "Resources", trial_bytes: int = 0, model: str | None = None
) -> Iterator[Room]:
    """Connect to the cluster at `address` (auto finds one), or start Ray on this machine and stop it afterwards.

    A Ray that is already running in this process is used and left alone. trial_bytes: predicted memory of a trial. model:
    every node of a cluster has to find it. Raises InputError when the cluster does not answer, refuses our token, cannot hold
    a single trial, or has a node that lacks this package or the model.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_task_oom_retries", str(WORKER_RESTARTS))  # Ray's own number has no end
    if address is not None:
        _check_reachable(address)
    import ray

    if ray.is_initialized():
        yield Room(resources, trial_bytes)
        return
    if address is None:  # told at once, not after Ray's seconds
        import torch

        resources.places([{"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}])
    quiet = {"include_dashboard": False} if address is None else {}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **quiet)
    except ray.exceptions.AuthenticationError as error:
        raise InputError(_no_cluster(address, f"there is no token; {TOKEN_HINT}")) from error
    except (ConnectionError, RuntimeError, ValueError, ImportError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if address is not None and isinstance(error, ConnectionError):  # something listens, but does not let us in
            cause += f", though something listens there: is it Ray, of this version? If so, {TOKEN_HINT}"
        raise InputError(_no_cluster(address, cause)) from error
    try:
        room = Room(resources, trial_bytes)
        if address is not None:
            check_nodes(model)
        yield room
    finally:
        ray.shutdown()


def trials_run_here(address: str | None, resources: "Resources") -> bool:
    """Whether trials run on this machine's processors alone. Then this process can do what a worker could."""
    return address is None and not resources.gpus


def _check_reachable(address: str) -> None:
    """InputError unless something listens at the address: Ray itself would try for minutes, or for ever."""
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")  # one attempt; what does not answer it is no Ray
    given = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host, _, port = given.rpartition("://")[2].rpartition(":")
    if not given or not host or not port.isdigit():
        return  # ray.init finds it, or says what is wrong with it
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(_no_cluster(given, f"nothing answers there ({error})")) from None


def check_nodes(model: str | None) -> None:
    """InputError unless every node that runs trials can import this package and sees the model's files as this machine does.

    model: None, or a name that is no local path, asks for the package alone.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    path = Path(model).expanduser() if model else None
    path = path.absolute() if path is not None and path.exists() else None
    expected, problems = _sizes(path), []
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0)]
    look = ray.remote(num_cpus=0, max_retries=0)(_sizes)
    asked = {
        node["NodeManagerAddress"]: look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(path)
        for node in nodes
    }
    for place, answer in asked.items():
        try:
            found = ray.get(answer, timeout=NODE_SECONDS)
        except ray.exceptions.GetTimeoutError:
            problems.append(f"node {place} does not answer within {NODE_SECONDS} s")
            continue
        except ray.exceptions.RayError as error:
            cause = str(error).strip().splitlines()[-1]
            problems.append(f"node {place} cannot run this package ({cause}); install the same version there")
            continue
        if found != expected:
            what = "it has other files there" if found else "there is nothing"
            problems.append(
                f"model {model!r}: node {place} does not see {path} as this machine does ({what}); put it on storage that all"
                " nodes mount at the same path, or name a hub id"
            )
    if problems:
        raise InputError(problems)


def _sizes(path: Path | None) -> dict[str, int]:
    """File name -> bytes, of a file or of the files of a folder; empty where there is none."""
    if path is None:
        return {}
    files = [path] if path.is_file() else sorted(path.glob("*"))
    return {file.name: file.stat().st_size for file in files if file.is_file()}


def _no_cluster(address: str | None, cause: str) -> str:
    if address is None:
        return f"Ray does not start on this machine: {cause}"
    return (
        f"Ray cluster {address!r}: {cause.rstrip('.')}; start one with `ray up ray_cluster.yaml` or "
        "`ray start --head`, or leave --address away to run on this machine"
    )
