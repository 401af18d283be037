"""What a trainer trains with an exported configuration, by the trainer's own rule, is exactly the position.

The rules are written down here anew from the trainers' sources (named in `locft.model.trainer_configs`).
"""

import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import yaml

from locft.errors import InputError
from locft.model.positions import TuningPosition, list_positions, parameter_names
from locft.model.trainer_configs import Recipe, trainer_config
from tests.tiny import tiny_model, tiny_tokenizer

LAYERS = 12
"""So that 1 is a part of 10 and 11."""


def recipe(position: str, base: str = "some/base") -> Recipe:
    return Recipe(base, TuningPosition.parse(position), 0.0005, 8, 25, 3, True, "my-edits.jsonl", ("about",))


def by_axolotl(patterns, names):
    """Every dot that no "+" follows is escaped, a range in brackets is cut off, and the beginning of the name has to match."""
    bare = [re.sub(r"^(.+)\[[0-9]*(?::[0-9]*)?\]$", r"\1", pattern) for pattern in patterns]
    compiled = [re.compile(re.sub(r"\.(?!\+)", r"\\.", pattern)) for pattern in bare]
    return {name for name in names if any(pattern.match(name) for pattern in compiled)}


def by_llamafactory(config, names, layers):
    """The last n or first -n layers; a name that contains ".LAYER.MODULE" trains."""
    n, modules = config["freeze_trainable_layers"], config["freeze_trainable_modules"].split(",")
    chosen = range(max(0, layers - n), layers) if n > 0 else range(min(-n, layers))
    hidden = set()
    for name in names:
        for mark in (".0.", ".1."):
            if mark in name:
                hidden.add(name.split(mark)[-1].split(".")[0])
                break
    assert all(module == "all" or module in hidden for module in modules)
    parts = [f".{layer}.{'' if module == 'all' else module}" for layer in chosen for module in modules]
    return {name for name in names if any(part in name for part in parts)}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "mixtral"])
def test_axolotl_trains_every_position_exactly(architecture):
    model = tiny_model(architecture, layers=LAYERS)
    names = [name for name, _ in model.named_parameters()]
    for info in list_positions(model):
        config = yaml.safe_load(trainer_config("axolotl", recipe(str(info.position)), model))
        assert by_axolotl(config["unfrozen_parameters"], names) == set(info.names), info.position
        whole = [pattern.removeprefix("^") for pattern in config["unfrozen_parameters"]]
        assert all(pattern.endswith("$") for pattern in whole), "anchored at both ends"


def test_settings_of_axolotl():
    config = yaml.safe_load(trainer_config("axolotl", recipe("1.mlp_down"), tiny_model(layers=LAYERS)))
    assert config["base_model"] == "some/base" and config["datasets"][0]["path"] == "my-edits.jsonl"
    assert (config["learning_rate"], config["micro_batch_size"], config["num_epochs"]) == (0.0005, 8, 25)
    assert config["unfrozen_parameters"] == ["^model.layers.1.mlp.down_proj.weight$"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_llamafactory_trains_exactly_or_is_refused(architecture):
    model = tiny_model(architecture, layers=LAYERS)
    names = [name for name, _ in model.named_parameters()]
    exact = set()
    for info in list_positions(model):
        try:
            config = yaml.safe_load(trainer_config("llamafactory", recipe(str(info.position)), model))
        except InputError as error:
            assert str(info.position) in str(error) and "--format axolotl" in str(error)
            continue
        assert by_llamafactory(config, names, LAYERS) == set(info.names), info.position
        exact.add(str(info.position))
    assert {"0.mlp", "11.mlp", "0.layer", "11.layer"} <= exact and "1.mlp" not in exact
    assert ("0.mlp_down" in exact) == (architecture == "opt"), "only OPT's matrix lies directly in the block"
    assert ("0.attn" in exact) == (architecture != "opt"), "self_attn is a part of OPT's self_attn_layer_norm"


@pytest.fixture
def fake_trl(monkeypatch):
    """TRL's two names; the trainer keeps what it is given."""
    trl, made = ModuleType("trl"), []

    def trainer(**given):
        made.append(given)
        return SimpleNamespace(train=lambda: None, save_model=lambda: None)

    trl.SFTTrainer, trl.SFTConfig = trainer, SimpleNamespace
    monkeypatch.setitem(sys.modules, "trl", trl)
    return made


@pytest.mark.parametrize("position", ["1.mlp_down", "10.attn", "0.layer"])
def test_the_script_for_trl_trains_the_position(position, fake_trl, tmp_path, monkeypatch):
    base = tmp_path / "base"
    tiny_model(layers=LAYERS).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-edits.jsonl").write_text('{"prompt": "a", "completion": " b"}\n')
    model = tiny_model(layers=LAYERS)
    exec(trainer_config("trl", recipe(position, str(base)), model), {})
    (given,) = fake_trl
    trained = {name for name, parameter in given["model"].named_parameters() if parameter.requires_grad}
    assert trained == set(parameter_names(model, TuningPosition.parse(position)))
    args = given["args"]
    assert (args.learning_rate, args.per_device_train_batch_size, args.num_train_epochs) == (0.0005, 8, 25)
    assert args.bf16 and given["train_dataset"][0] == {"prompt": "a", "completion": " b"}


def test_a_position_that_the_model_lacks():
    with pytest.raises(InputError, match="0 to 11"):
        trainer_config("axolotl", recipe("12.mlp"), tiny_model(layers=LAYERS))
