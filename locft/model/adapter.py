"""An edit as a LoRA adapter in PEFT's file format: the change of each matrix, cut to its largest singular values.

By the Eckart-Young theorem, no other change of that rank is nearer to the edit's. PEFT is not needed to write it; the
file format is that of `PeftModel.save_pretrained` (peft/utils/save_and_load.py).

Legend: O outputs of a matrix, I inputs, R rank.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from locft.errors import InputError, listed
from locft.model.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, write_tensors
from locft.model.delta import EditDelta
from locft.model.merge import appears_whole
from locft.model.models import is_hub_id, model_folder
from locft.model.structure import is_input_first


@dataclass(frozen=True)
class MatrixChange:
    """The change of the weight of one linear layer, as the product `up @ down`."""

    path: str
    """Path of the layer inside the model."""
    up: torch.Tensor
    """(O, R) in float32, in order of falling singular values."""
    down: torch.Tensor
    """(R, I) in float32."""
    input_first: bool
    """The weight is stored (I, O), as in GPT-2."""

    def at(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Both factors cut to a rank, or padded with zeros if it is above the matrix's own."""
        more = max(0, rank - self.up.shape[1])
        up, down = self.up[:, :rank], self.down[:rank]
        return nn.functional.pad(up, (0, more)), nn.functional.pad(down, (0, 0, 0, more))


@dataclass(frozen=True)
class LowRank:
    """An edit's change, ready to be cut to any rank."""

    delta: EditDelta
    matrices: tuple[MatrixChange, ...]
    left_out: tuple[str, ...]
    """Norms and biases that the edit changes, and that a LoRA adapter cannot hold."""

    @classmethod
    def of(cls, model: PreTrainedModel, delta: EditDelta) -> "LowRank":
        """The singular value decomposition of each matrix's change.

        model: the base or its structure on the meta device. Raises InputError, with names, if the edit changes stacked
        experts or other tensors that are not of a linear layer, changes no matrix, or changes nothing at all.
        """
        changed = {name: change for name, change in delta.tensors.items() if change.any()}
        if not changed:
            raise InputError(f"delta at {delta.position}: it changes nothing")
        matrices, left_out, problems = [], [], []
        for name, change in changed.items():
            path, _, kind = name.rpartition(".")
            owner = model.get_submodule(path)
            if change.dim() == 1:
                left_out.append(name)
            elif change.dim() == 2 and kind == "weight" and isinstance(owner, nn.Linear | Conv1D):
                matrices.append(_decomposed(path, change, is_input_first(model, name)))
            else:
                stacked = change.dim() == 3 and "expert" in name
                what = "stacked experts" if stacked else f"part of {type(owner).__name__}"
                problems.append(f"{name} {tuple(change.shape)} ({what})")
        if problems or not matrices:
            raise InputError(
                f"delta at {delta.position}: a LoRA adapter changes linear layers only, and this edit changes "
                f"{', '.join(problems or left_out)}; `locft apply` writes the whole edited model"
            )
        return cls(delta, tuple(matrices), tuple(left_out))

    @property
    def full_rank(self) -> int:
        """The rank at which every matrix's change is kept whole."""
        return max(matrix.up.shape[1] for matrix in self.matrices)

    def sentences(self) -> Iterator[str]:
        """What the user should know."""
        if self.left_out:
            share = 100 * math.sqrt(max(0.0, 1 - self.kept(self.full_rank) ** 2))
            yield f"a LoRA adapter cannot hold norms and biases: {listed(self.left_out, 4)} stay unedited ({share:.2g}% of the change's norm)"

    def at(self, rank: int) -> EditDelta:
        """The edit as an adapter of this rank reproduces it."""
        tensors = {}
        for matrix in self.matrices:
            up, down = matrix.at(rank)
            product = up @ down
            tensors[f"{matrix.path}.weight"] = product.T.contiguous() if matrix.input_first else product
        return replace(self.delta, tensors=tensors)

    def size(self, rank: int) -> int:
        """Number of values in an adapter of this rank."""
        return sum(rank * (len(matrix.up) + matrix.down.shape[1]) for matrix in self.matrices)

    def kept(self, rank: int) -> float:
        """Norm of what an adapter of this rank changes, as a share of the edit's; what is left out counts as lost."""
        # The columns of `up` are orthogonal, with the roots of the singular values as their norms.
        squares = sum(float(matrix.up[:, :rank].double().square().sum(0).square().sum()) for matrix in self.matrices)
        return min(1.0, math.sqrt(squares) / self.delta.norm)

    def save(self, rank: int, folder: Path, base: str) -> None:
        """Write adapter_model.safetensors and adapter_config.json into a folder that does not exist or is empty.

        base: where PEFT finds the model, by `base_address`. The scale (lora_alpha / r) is 1. The target modules are whole
        paths, which PEFT compares with the paths in the model, so that layer 1 does not match layer 10 or 11. Raises InputError
        if the folder cannot be written.
        """
        tensors = {}
        for matrix in self.matrices:
            up, down = matrix.at(rank)
            tensors[f"base_model.model.{matrix.path}.lora_A.weight"] = down
            tensors[f"base_model.model.{matrix.path}.lora_B.weight"] = up
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": any(matrix.input_first for matrix in self.matrices),
            "target_modules": [matrix.path for matrix in self.matrices],
            "modules_to_save": None,
            "use_rslora": False,
            "inference_mode": True,
        }
        with appears_whole(folder.absolute()) as partial:
            write_tensors(tensors, partial / ADAPTER_WEIGHTS, {"format": "pt"})
            (partial / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def base_address(name: str) -> str:
    """How other libraries find a model: a hub id as it is, otherwise the absolute path of its folder of safetensors."""
    return name if is_hub_id(name) else str(model_folder(name).absolute())


def _decomposed(path: str, change: torch.Tensor, input_first: bool) -> MatrixChange:
    left, values, right = torch.linalg.svd(change.float().T if input_first else change.float(), full_matrices=False)
    roots = values.sqrt()
    return MatrixChange(path, left * roots, roots[:, None] * right, input_first)
