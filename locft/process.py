"""The process that computes: its device, PyTorch's vector maths, and its machine."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from locft.errors import InputError, one_line
from locft.machine import usable_cores

VECTOR_FUNCTIONS = (
    torch.acos, torch.asin, torch.atan, torch.cos, torch.erf, torch.erfc, torch.erfinv, torch.exp, torch.expm1,
    torch.lgamma, torch.log, torch.log10, torch.log1p, torch.log2, torch.rsqrt, torch.sigmoid, torch.sin, torch.sqrt,
    torch.tan, torch.tanh, torch.trunc,
)  # fmt: skip


def torch_device(device: str) -> torch.device:
    """The device that a setting names; `auto` is the first GPU, or the CPU if there is none.

    Raises InputError for a name that torch does not know or a device that does not work here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device {device!r}: expected auto, cpu, cuda or cuda:N") from error
    try:
        if torch.zeros(1, device=target).item() != 0:  # torch accepts names of devices that are not there
            raise RuntimeError("a test computation failed")
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        count = torch.cuda.device_count()
        raise InputError(
            f"device {device!r}: torch cannot use it here ({one_line(error)}); use auto or cpu"
            + (f", or cuda:0 to cuda:{count - 1}" if count else "")
        ) from error
    return target


def runs_ahead(device: torch.device) -> bool:
    """Whether this process only queues work for the device and goes on.

    If so, reading a number back waits until everything that was queued is done, and the device then idles until more work
    arrives. So whatever a training step decides is decided on the device (`locft.train.pipelines`).
    """
    return device.type == "cuda"


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor moved to a device; the same tensor if that is the CPU. Nothing waits for a copy to a GPU."""
    if not runs_ahead(device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # a copy from memory that is not pinned would block


@cache
def settle_vector_math() -> None:
    """Make elementary functions give the same bits in every call of this process, the first one included.

    On CPUs PyTorch computes cos, exp and the like with MKL's vector functions, and MKL chooses a kernel for each of
    them in its first call. If that call runs on several threads, one of them can get a kernel of lower accuracy (errors
    of 1e-4) for its part; in one process in ten, the first forward pass then differs from all later ones
    (pytorch/pytorch issue 188792). So each function is called once here, on so few numbers that one thread does it.
    """
    for dtype in (torch.float32, torch.float64):
        numbers = torch.full((16,), 0.5, dtype=dtype)
        for function in VECTOR_FUNCTIONS:
            function(numbers)


@contextmanager
def every_core() -> Iterator[None]:
    """Inside the block, PyTorch computes on all cores: for what is made once on a machine while its other workers wait for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe_machine() -> dict[str, Any]:
    """CPU, cores, threads in use, instruction set and versions; JSON-able."""
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers")}},
    }


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
