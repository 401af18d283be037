"""The precision in which training computes: what is faster here, and a copy of the frozen model in it.

Training in bfloat16 reads a bfloat16 copy of a float32 model. The copy lies in a file that every worker of a machine
maps into memory: all workers share one copy, and the operating system drops and rereads its pages.
"""

import copy
import json
import math
import time
from functools import cache

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from locft.cache import made_once, remembered
from locft.process import describe_machine, torch_device

_WEIGHTS = "weights.safetensors"
_ROTARY_ANGLES = "inv_freq"
"""Last part of the names of the buffers of rotary embeddings."""


def training_precision(device: str) -> str:
    """The faster precision at equal quality: bfloat16 on GPUs that have it and on CPUs that multiply it faster, else
    float32. (With AMX bfloat16 is 3 to 6 times faster; with Intel's AVX512-BF16 alone it takes twice as long.)

    device: as for `torch_device`. If it names a GPU and this machine has none, that GPU is assumed to have bfloat16.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        return "bfloat16"
    if torch_device(device).type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return _cpu_precision()


@cache
def _cpu_precision() -> str:
    """Measured once for every kind of CPU and kept in the cache folder, because the precision is part of a trial's
    identity: a measurement with another outcome would make a study start over."""
    machine = describe_machine()
    kind = [machine["cpu"], machine["instructions"], machine["versions"]["torch"]]
    return remembered("precision", json.dumps(kind), _faster_precision)


def _faster_precision() -> str:
    """Takes a few hundredths of a second. The two precisions take turns, so that other work on the machine slows both;
    the ratios that hardware shows (a half, or two and more) are far from the threshold of 1.2."""
    factors = {dtype: torch.ones(512, 512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    seconds = dict.fromkeys(factors, math.inf)
    for _ in range(6):
        for dtype, factor in factors.items():
            began = time.perf_counter()
            factor @ factor.T
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - began)
    return "bfloat16" if seconds[torch.bfloat16] < seconds[torch.float32] / 1.2 else "float32"


def cast_model(model: PreTrainedModel, dtype: torch.dtype, fingerprint: str, *, on_disk: bool) -> PreTrainedModel:
    """The model with its weights and floating-point buffers in `dtype`; the model itself if it has that dtype already.

    fingerprint: of the model's weights. on_disk: keep the copy in a file for other processes and later calls (on a CPU;
    elsewhere the copy is in memory). The module tree is copied too, so that nothing done to the copy reaches the model.
    """
    if dtype == model.dtype:
        return model
    if on_disk and model.device.type == "cpu":
        key = f"{fingerprint}-{model.dtype}-{dtype}".replace("torch.", "")
        folder = made_once("weights", key, lambda folder: save_file(_cast_weights(model, dtype), folder / _WEIGHTS))
        weights = load_file(folder / _WEIGHTS)
    else:
        weights = _cast_weights(model, dtype)
    memo = {
        id(parameter): nn.Parameter(weights[name], requires_grad=False) for name, parameter in model.named_parameters()
    }
    twin = copy.deepcopy(model, memo)
    nn.Module.to(twin, dtype)
    for name, value in model.named_buffers():
        if name.endswith(_ROTARY_ANGLES):  # rounding would give distant tokens other angles; float32 is kept
            owner, _, last = name.rpartition(".")
            setattr(twin.get_submodule(owner), last, value)
    return twin


def _cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().to(dtype).contiguous() for name, parameter in model.named_parameters()}
