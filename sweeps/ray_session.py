"""The Ray that a study runs on: this machine's or a cluster, reached within seconds or told why not."""

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from locft.errors import InputError

if TYPE_CHECKING:
    from sweeps.schema import Resources

CONNECT_SECONDS = 5
"""How long a cluster may take to accept a connection."""


@contextmanager
def ray_session(address: str | None, resources: "Resources", trial_bytes: int = 0) -> Iterator[int]:
    """Connect to the cluster at `address` (auto finds one), or start Ray on this machine and stop it afterwards.

    A Ray that is already running in this process is used and left alone. The value is the number of trials at a time.
    trial_bytes: predicted memory of one.
    Raises InputError when the cluster does not answer, or cannot hold a single trial.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is not None:
        _check_reachable(address)
    import ray

    if ray.is_initialized():
        yield concurrent_trials(resources, ray.cluster_resources(), trial_bytes)
        return
    if address is None:  # told at once, not after Ray's seconds
        import torch

        concurrent_trials(resources, {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()})
    quiet = {"include_dashboard": False} if address is None else {}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **quiet)
    except (ConnectionError, RuntimeError, ValueError, ImportError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(_no_cluster(address, cause)) from error
    try:
        yield concurrent_trials(resources, ray.cluster_resources(), trial_bytes)
    finally:
        ray.shutdown()


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


def _no_cluster(address: str | None, cause: str) -> str:
    if address is None:
        return f"Ray does not start on this machine: {cause}"
    return (
        f"Ray cluster {address!r}: {cause.rstrip('.')}; start one with `ray up ray_cluster.yaml` or "
        "`ray start --head`, or leave --address away to run on this machine"
    )


def concurrent_trials(resources: "Resources", have: Mapping[str, float], trial_bytes: int = 0) -> int:
    """Trials at a time that fit into the CPU and GPU there are; InputError when not even one does.

    have: Ray's resources; its "memory", in bytes, limits the number as well, but to no less than one, since the prediction
    is rough. A number that the study names is taken at its word there.
    """
    cpus, gpus = have.get("CPU", 0), have.get("GPU", 0)
    if resources.cpus > cpus or resources.gpus > gpus:
        raise InputError(
            f"resources: a trial wants {resources.cpus:g} CPUs and {resources.gpus:g} GPUs, but there are {cpus:g} "
            f"CPUs and {gpus:g} GPUs in all; ask for less, or give --address of a larger cluster"
        )
    fit = int(cpus // resources.cpus)
    if resources.gpus:
        fit = min(fit, int(gpus / resources.gpus + 1e-9))
    if resources.concurrent != "auto":
        return min(fit, resources.concurrent)
    if trial_bytes and "memory" in have:
        fit = min(fit, max(1, int(have["memory"] // trial_bytes)))
    return fit
