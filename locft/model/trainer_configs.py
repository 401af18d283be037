"""A position written for other trainers: a configuration that trains exactly its parameters.

Each tool has its own rule for which parameters train; the source consulted is named in each function.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
import yaml
from transformers import PreTrainedModel

from locft.errors import InputError
from locft.model.positions import TuningPosition, n_layers, parameter_names

_AFTER_BOS = "after BOS if the tokenizer puts it before every text"


@dataclass(frozen=True)
class Recipe:
    """What to train, and how."""

    base: str
    """Hub id or folder of the model."""
    position: TuningPosition
    learning_rate: float
    batch_size: int
    epochs: int
    seed: int
    bfloat16: bool
    """Whether products are computed in bfloat16; the trained weights are float32."""
    data: str
    """Name of the file with the edits, next to the configuration."""
    about: tuple[str, ...] = ()
    """Human-readable lines, put into the comments at the top of the file."""


def trainer_config(trainer: str, recipe: Recipe, model: PreTrainedModel) -> str:
    """The text of the file that a trainer takes.

    trainer: axolotl, trl or llamafactory. model: the base or its structure on the meta device. Raises InputError for a position that the model does not have or
    that the tool cannot train alone.
    """
    names = parameter_names(model, recipe.position)
    return {"axolotl": _axolotl, "trl": _trl, "llamafactory": _llamafactory}[trainer](recipe, model, names)


def _arguments(recipe: Recipe) -> dict[str, Any]:
    """The settings that all trainers share, by their names in transformers' `TrainingArguments`."""
    return {
        "learning_rate": recipe.learning_rate,
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": recipe.epochs,
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "bf16": recipe.bfloat16,
        "seed": recipe.seed,
        "output_dir": "./edited-model",
    }


_IN_AXOLOTL = {
    "per_device_train_batch_size": "micro_batch_size",
    "num_train_epochs": "num_epochs",
    "optim": "optimizer",
    "lr_scheduler_type": "lr_scheduler",
}
"""Axolotl's names where they differ."""


def _axolotl(recipe: Recipe, model: PreTrainedModel, names: Collection[str]) -> str:
    """Source: `freeze_layers_except` and `LayerNamePattern` in axolotl's src/axolotl/utils/freeze.py: a parameter trains if
    `re.match` finds a pattern at the beginning of its name. Axolotl escapes the dots of a pattern itself: an escaped one
    would require a backslash, so they are left as they are, and all else is escaped. The "$" ends the match.

    If axolotl computes in bfloat16, it also loads the model in bfloat16, where small steps are lost; hence float32.
    """
    shared = {_IN_AXOLOTL.get(name, name): value for name, value in _arguments(recipe).items()}
    config = {
        "base_model": recipe.base,
        "unfrozen_parameters": [f"^{'.'.join(map(re.escape, name.split('.')))}$" for name in names],
        "datasets": [{"path": recipe.data, "ds_type": "json", "type": "input_output"}],
        "train_on_inputs": False,
        "val_set_size": 0,
        "sequence_len": 512,
        "sample_packing": False,
        "gradient_checkpointing": False,
        **shared,
        "bf16": False,
        "fp16": False,
        "tf32": False,
    }
    data = (
        'Each line of the data: {"segments": [{"label": false, "text": prompt}, {"label": true, "text": answer with EOS}]}, '
        f"the prompt {_AFTER_BOS}"
    )
    return _yaml(recipe, names, config, data)


def _llamafactory(recipe: Recipe, model: PreTrainedModel, names: Collection[str]) -> str:
    """Source: `_setup_freeze_tuning` in LLaMA-Factory's src/llamafactory/model/adapter.py: freeze_trainable_layers takes the
    last n layers (n > 0) or the first -n; a parameter trains if its name contains ".LAYER.MODULE", where a module is what
    follows a layer's number, or ".LAYER." for `all`. So most positions cannot be named; those that can are found by trying.
    """
    layer, count = recipe.position.layer, n_layers(model)
    parts = tuple(dict.fromkeys(name.split(f".{layer}.", 1)[1].split(".")[0] for name in names))  # mlp, self_attn, ...
    tried = [(n, modules) for modules in (parts, ("all",)) for n in (-(layer + 1), count - layer)]
    trained = {(n, modules): _freeze_trains(model, count, n, modules) for n, modules in tried}
    exact = next((choice for choice, found in trained.items() if found == set(names)), None)
    if exact is None:
        least = min((len(found) for found in trained.values() if found), default=0)
        raise InputError(
            f"--format llamafactory: its freeze type trains whole parts of the first or of the last layers (here "
            f"{', '.join(parts)}) by what their names contain; to reach {recipe.position} it would train {least} parameters "
            f"in place of {len(names)}. --format axolotl and --format trl train exactly this position"
        )
    config = {
        "model_name_or_path": recipe.base,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "freeze",
        "freeze_trainable_layers": exact[0],
        "freeze_trainable_modules": ",".join(exact[1]),
        "dataset_dir": ".",
        "dataset": "edits",
        "template": "empty",
        "cutoff_len": 512,
        "disable_gradient_checkpointing": True,
        **_arguments(recipe),
    }
    entry = {"edits": {"file_name": recipe.data, "columns": {"prompt": "prompt", "response": "completion"}}}
    data = f"dataset_info.json next to this file must contain {json.dumps(entry)}"
    lines = f'Each line of the data: {{"prompt": prompt, "completion": answer with EOS}}, the prompt {_AFTER_BOS}'
    return _yaml(recipe, names, config, data, lines)


def _freeze_trains(model: PreTrainedModel, count: int, layers: int, modules: Collection[str]) -> set[str]:
    """The parameters that LLaMA-Factory trains; none where it refuses the modules.

    count: number of layers. layers, modules: freeze_trainable_layers and freeze_trainable_modules.
    """
    names = [name for name, _ in model.named_parameters()]
    split = [(name, next((mark for mark in (".0.", ".1.") if mark in name), None)) for name in names]
    known = {"all", *(name.split(mark)[-1].split(".")[0] for name, mark in split if mark)}
    if not known.issuperset(modules):
        return set()
    numbers = range(max(0, count - layers), count) if layers > 0 else range(min(-layers, count))
    parts = [f".{number}.{'' if module == 'all' else module}" for module in modules for number in numbers]
    return {name for name in names if any(part in name for part in parts)}


_SCRIPT = """\
from datasets import load_dataset
from transformers import AutoTokenizer, {loader}
from trl import SFTConfig, SFTTrainer

MODEL = {base}
DATA = {data}  # each line: {{"prompt": ..., "completion": ...}}
TRAINED = {{
{names}
}}

model = {loader}.from_pretrained(MODEL, dtype="float32")
parameters = dict(model.named_parameters())
if missing := TRAINED - parameters.keys():
    raise SystemExit(f"{{MODEL}} has no parameters {{sorted(missing)}}")
for name, parameter in parameters.items():
    parameter.requires_grad_(name in TRAINED)

trainer = SFTTrainer(
    model=model,
    processing_class=AutoTokenizer.from_pretrained(MODEL),
    train_dataset=load_dataset("json", data_files=DATA, split="train"),
    args=SFTConfig(
{arguments}
        completion_only_loss=True,
        gradient_checkpointing=False,
        save_strategy="no",
    ),
)
trainer.train()
trainer.save_model()
"""


def _trl(recipe: Recipe, model: PreTrainedModel, names: Collection[str]) -> str:
    """Source: TRL's trl/trainer/sft_trainer.py, which trains what has `requires_grad` and appends an EOS to a completion
    that has none. bf16 there is mixed precision: the weights stay float32."""
    loader = type(model).__name__
    script = _SCRIPT.format(
        base=json.dumps(recipe.base, ensure_ascii=False),
        data=json.dumps(recipe.data, ensure_ascii=False),
        names="\n".join(f"    {json.dumps(name)}," for name in names),
        loader=loader if hasattr(transformers, loader) else "AutoModelForCausalLM",
        arguments="\n".join(f"        {name}={value!r}," for name, value in _arguments(recipe).items()),
    )
    return _comments(recipe, names) + script


def _yaml(recipe: Recipe, names: Collection[str], config: Mapping[str, Any], *data: str) -> str:
    """data: human-readable lines about the file with the edits."""
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=1000)
    return _comments(recipe, names, *data) + text


def _comments(recipe: Recipe, names: Collection[str], *more: str) -> str:
    trained = f"Trains {recipe.position} alone: {', '.join(names) if len(names) < 4 else f'{len(names)} parameters'}."
    return "".join(f"# {line}\n" for line in (trained, *recipe.about, *more))
