"""The precision in which training computes if nobody chooses one."""

import hashlib
import json
import math
import time
from contextlib import suppress
from functools import cache

import torch

from locft.cache import cache_folder, write_atomically
from locft.process import describe_machine, torch_device


def training_precision(device: str) -> str:
    """The faster precision at equal quality: bfloat16 on GPUs that have it and on CPUs that multiply it faster, else
    float32. (With AMX bfloat16 is 3 to 6 times faster; with Intel's AVX512-BF16 alone it takes twice as long.)

    device: as for `torch_device`. A GPU of another machine, asked for on one without, is taken to have bfloat16.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        return "bfloat16"
    if torch_device(device).type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if _faster_in_bfloat16() else "float32"


@cache
def _faster_in_bfloat16() -> bool:
    """Measured once for every kind of CPU and kept in the cache folder, because the precision is part of a trial's
    identity: a measurement with another outcome would make a study start anew."""
    machine = describe_machine()
    kind = [machine["cpu"], machine["instructions"], machine["versions"]["torch"]]
    note = cache_folder() / "precision" / f"{hashlib.sha256(json.dumps(kind).encode()).hexdigest()[:16]}.txt"
    with suppress(OSError, ValueError):
        kept = note.read_text(encoding="utf-8").strip()
        if kept in ("float32", "bfloat16"):
            return kept == "bfloat16"
    faster = _multiplies_bfloat16_faster()
    with suppress(OSError):  # without a cache, the next process measures again
        write_atomically(note, "bfloat16" if faster else "float32")
    return faster


def _multiplies_bfloat16_faster() -> bool:
    """Takes some hundredths of a second. The two precisions take turns, so that other work on the machine slows both;
    the ratios that hardware has (a half, or two and more) are far from the bound of 1.2."""
    factors = {dtype: torch.ones(512, 512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    seconds = dict.fromkeys(factors, math.inf)
    for _ in range(6):
        for dtype, factor in factors.items():
            began = time.perf_counter()
            factor @ factor.T
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - began)
    return seconds[torch.bfloat16] < seconds[torch.float32] / 1.2
