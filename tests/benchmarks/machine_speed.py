"""How fast a device multiplies matrices; how long a piece of work takes there, what memory it adds, what it launches.

A GPU is waited for before a clock is read. Memory there is what PyTorch allocates.
"""

import ctypes
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

SHOWN = 15
"""Kernels or operations of a step that are named."""
_CPU = torch.device("cpu")


def wait(device: torch.device) -> None:
    """Until the device has done what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], device: torch.device = _CPU) -> tuple[Any, float]:
    """What the work returns, and its seconds."""
    wait(device)
    started = time.perf_counter()
    result = work()
    wait(device)
    return result, time.perf_counter() - started


class Marks:
    """Points between pieces of work that follow each other: on a GPU in the queue, which nobody waits for."""

    def __init__(self, device: torch.device):
        self._device, self._marks = device, []
        self.mark()

    def mark(self) -> None:
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Between each two."""
        wait(self._device)
        pairs = zip(self._marks, self._marks[1:])
        return [a.elapsed_time(b) / 1e3 if self._device.type == "cuda" else b - a for a, b in pairs]


def device_facts(device: torch.device) -> dict[str, Any]:
    """What computes: the name of a GPU, its memory, and the version of CUDA."""
    if device.type != "cuda":
        return {"device": device.type}
    properties = torch.cuda.get_device_properties(device)
    return {"device": properties.name, "device_bytes": properties.total_memory, "cuda": torch.version.cuda}


def launches(work: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """What a piece of work launches. launches: kernels and copies on a GPU; on a CPU operations of PyTorch that compute.
    longest: on a GPU name -> number and milliseconds of the kernels that take the most time together; else the operations
    that are the most, name -> number."""
    if device.type != "cuda":
        with _Counter() as counter:
            work()
        return {"launches": counter.counts.total(), "longest": dict(counter.counts.most_common(SHOWN))}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        work()
        wait(device)
    there = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    longest = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)[:SHOWN]
    times = {event.key[:80]: [event.count, event.self_device_time_total / 1e3] for event in longest}
    return {"launches": len(there), "longest": times}


class _Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def matrix_rows(device: torch.device) -> int:
    """Rows of the measured products: on a CPU about as many as in a training step with ten edits; on a GPU enough to keep all of
    it busy."""
    return 8192 if device.type == "cuda" else 256


@torch.no_grad()
def matrix_speed(
    entering: int,
    leaving: int,
    dtype: torch.dtype,
    *,
    seconds: float = 0.5,
    rounds: int = 10,
    device: torch.device = _CPU,
) -> float:
    """Floating-point operations per second of a matrix with `matrix_rows` times one (entering, leaving): the median of the rounds.

    On a CPU the weights stay in the processor's cache between products, as those of a small model do between steps only in part:
    a speed to strive for, not one that a whole model reaches.
    """
    generator = torch.Generator().manual_seed(0)
    height = matrix_rows(device)
    rows = torch.randn(height, entering, generator=generator).to(device, dtype)
    weight = torch.randn(leaving, entering, generator=generator).to(device, dtype)

    def products(count: int) -> float:
        def multiply() -> None:
            for _ in range(count):
                F.linear(rows, weight)

        return timed(multiply, device)[1]

    products(3)  # the first ones choose a kernel
    count = max(1, round(seconds / rounds / (products(10) / 10)))
    return statistics.median(count * 2 * height * entering * leaving / products(count) for _ in range(rounds))


def added_memory(work: Callable[[], Any], device: torch.device = _CPU) -> int | None:
    """Bytes that `work` adds at its peak: on a GPU to what PyTorch allocates, on a CPU to this process's resident memory.

    Freed memory is given back to the system first, so that the work cannot hide in what others left. None where it
    cannot be told (only Linux with glibc lets a process set its peak back).
    """
    if device.type == "cuda":
        wait(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
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
