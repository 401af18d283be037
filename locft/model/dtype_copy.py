"""The frozen model in the dtype that training computes in, its weights once per machine.

Training in bfloat16 reads a bfloat16 copy of a float32 model. The copy lies in a file that every worker of a machine maps
into memory: it is there once however many workers train, and the operating system drops and rereads its pages.
"""

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from locft.model.models import made_once

FILE = "weights.safetensors"
ANGLES = "inv_freq"
"""Buffers of rotary embeddings."""


def cast_model(model: PreTrainedModel, dtype: torch.dtype, fingerprint: str, *, on_disk: bool) -> PreTrainedModel:
    """The model with its floating-point weights and buffers in `dtype`; itself when it has that dtype already.

    The rest of the tree is a copy, so what is done to it does not reach the model. fingerprint: of the model's weights.
    on_disk: keep the copy in a file for other processes and later calls; for a model on a CPU, else it is in memory.
    """
    if dtype == model.dtype:
        return model
    if on_disk and model.device.type == "cpu":
        key = f"{fingerprint}-{_name(model.dtype)}-{_name(dtype)}"
        weights = load_file(made_once("weights", key, lambda folder: _save(model, dtype, folder)) / FILE)
    else:
        weights = _cast(model, dtype)
    memo = {
        id(parameter): nn.Parameter(weights[name], requires_grad=False) for name, parameter in model.named_parameters()
    }
    twin = copy.deepcopy(model, memo).to(dtype)
    for name, value in model.named_buffers():
        if name.endswith(ANGLES):  # rounded, they would turn distant tokens elsewhere; their own code computes in float32
            owner, _, last = name.rpartition(".")
            setattr(twin.get_submodule(owner), last, value)
    return twin


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().to(dtype) if parameter.is_floating_point() else parameter.detach()
        for name, parameter in model.named_parameters()
    }


def _save(model: PreTrainedModel, dtype: torch.dtype, folder: Path) -> None:
    save_file({name: weight.contiguous() for name, weight in _cast(model, dtype).items()}, folder / FILE)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
