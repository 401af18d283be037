"""In which precision training computes, where nobody says."""

import hashlib
import json
import math
import time
from functools import cache

import torch

from locft.machine import describe_machine
from locft.model.models import cache_folder, torch_device, write_atomically


def training_precision(device: str) -> str:
    """The precision in which training is fastest there at equal quality: bfloat16 on GPUs that have it and on CPUs that
    multiply it faster (with AMX 3 to 6 times, while Intel's AVX512-BF16 alone takes twice as long), else float32.

    A GPU of another machine, where this one has none, is taken to have it.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        return "bfloat16"
    if torch_device(device).type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if _faster_in_bfloat16() else "float32"


@cache
def _faster_in_bfloat16() -> bool:
    """Measured once on every kind of CPU, and kept in the cache folder: the precision is part of a trial's identity, and a
    measurement that came out otherwise would make a study start anew."""
    machine = describe_machine()
    kind = [machine["cpu"], machine["instructions"], machine["versions"]["torch"]]
    note = cache_folder() / "precision" / f"{hashlib.sha256(json.dumps(kind).encode()).hexdigest()[:16]}.txt"
    try:
        kept = note.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        kept = ""
    if kept in ("float32", "bfloat16"):
        return kept == "bfloat16"
    faster = _multiplies_bfloat16_faster()
    try:
        write_atomically(note, "bfloat16" if faster else "float32")
    except OSError:
        pass  # it is measured again then
    return faster


def _multiplies_bfloat16_faster() -> bool:
    """Within some hundredths of a second. Both precisions take turns, so that other work on the machine slows them alike,
    and the ratios that hardware has (a half, or two and more) are far from the bound."""
    factors = {dtype: torch.ones(512, 512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    seconds = dict.fromkeys(factors, math.inf)
    for _ in range(6):
        for dtype, factor in factors.items():
            began = time.perf_counter()
            factor @ factor.T
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - began)
    return seconds[torch.bfloat16] < seconds[torch.float32] / 1.2
