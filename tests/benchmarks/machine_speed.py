"""How fast this machine multiplies matrices, and how much memory a piece of work adds."""

import ctypes
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

MATRIX_ROWS = 256
"""Rows of the measured products, about as many as in a training step with ten edits."""


@torch.no_grad()
def matrix_speed(entering: int, leaving: int, dtype: torch.dtype, *, seconds: float = 0.5, rounds: int = 10) -> float:
    """Floating-point operations per second of (256, entering) times (entering, leaving): the median of the rounds.

    The weights stay in the processor's cache between products, as those of a small model do between steps only in part:
    a speed to strive for, not one that a whole model reaches.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(MATRIX_ROWS, entering, generator=generator).to(dtype)
    weight = torch.randn(leaving, entering, generator=generator).to(dtype)
    operations = 2 * MATRIX_ROWS * entering * leaving
    started = time.perf_counter()
    for _ in range(10):
        F.linear(rows, weight)
    count = max(1, round(seconds / rounds / ((time.perf_counter() - started) / 10)))
    speeds = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(count):
            F.linear(rows, weight)
        speeds.append(count * operations / (time.perf_counter() - started))
    return statistics.median(speeds)


def added_memory(work: Callable[[], Any]) -> int | None:
    """Bytes by which the resident memory of this process exceeds, at its peak during `work`, what it was before.

    Freed memory is given back to the system first, so that the work cannot hide in what others left. None where it
    cannot be told (only Linux with glibc lets a process set its peak back).
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        _status_bytes("VmHWM")
    except (OSError, AttributeError):
        return None
    work()
    return max(0, _status_bytes("VmHWM") - before)


def peak_memory() -> int:
    """The largest resident size this process has had since it began, in bytes (ru_maxrss)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")
