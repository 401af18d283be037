"""A copy of the frozen model in the dtype that training computes in, kept once per machine.

Training in bfloat16 reads a bfloat16 copy of a float32 model. The copy lies in a file that every worker of a machine
maps into memory: it is there once however many workers train, and the operating system drops and rereads its pages.
"""

import copy

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from locft.cache import made_once

WEIGHTS_FILE = "weights.safetensors"
ROTARY_ANGLES = "inv_freq"
"""Last part of the names of the buffers of rotary embeddings."""


def cast_model(model: PreTrainedModel, dtype: torch.dtype, fingerprint: str, *, on_disk: bool) -> PreTrainedModel:
    """The model with its floating-point weights and buffers in `dtype`; the model itself if it has that dtype already.

    fingerprint: of the model's weights. on_disk: keep the copy in a file for other processes and later calls (on a CPU;
    elsewhere the copy is in memory). The module tree is copied too, so that nothing done to the copy reaches the model.
    """
    if dtype == model.dtype:
        return model
    if on_disk and model.device.type == "cpu":
        key = f"{fingerprint}-{model.dtype}-{dtype}".replace("torch.", "")
        folder = made_once("weights", key, lambda folder: save_file(_cast_weights(model, dtype), folder / WEIGHTS_FILE))
        weights = load_file(folder / WEIGHTS_FILE)
    else:
        weights = _cast_weights(model, dtype)
    memo = {
        id(parameter): nn.Parameter(weights[name], requires_grad=False) for name, parameter in model.named_parameters()
    }
    twin = copy.deepcopy(model, memo)
    nn.Module.to(twin, dtype)
    for name, value in model.named_buffers():
        if name.endswith(ROTARY_ANGLES):  # rounding would turn distant tokens elsewhere; they are computed in float32
            owner, _, last = name.rpartition(".")
            setattr(twin.get_submodule(owner), last, value)
    return twin


def _cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Parameter name -> value, contiguous; floating-point ones in `dtype`."""
    return {
        name: (parameter.detach().to(dtype) if parameter.is_floating_point() else parameter.detach()).contiguous()
        for name, parameter in model.named_parameters()
    }
