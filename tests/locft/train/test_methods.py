"""Each method of training held to an oracle, and all of them to what every training promises."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from locft.engine.tail_engine import TailEngine
from locft.model.delta import EditDelta
from locft.model.models import model_fingerprint
from locft.model.positions import TuningPosition, parameter_names
from locft.model.structure import is_input_first
from locft.train.encoding import encode_edit
from locft.train.examples import TrainingExamples
from locft.train.methods import Parameter, make_method
from locft.train.methods.lora import is_matrix
from locft.train.objective import batch_loss
from locft.train.pipelines import PositionTrainer, TrainingSettings, finetune
from locft.train.reference import full_forward, pad_rows
from tests.tiny import tiny_loaded, tiny_tokenizer

TEXTS = [
    ("The capital of France is", "Oslo"),
    ("Who wrote Hamlet?", "Jane Austen"),
    ("Water freezes at", "ninety degrees"),
    ("Mozart played the", "tuba"),
    ("The Nile flows through", "Peru and Chile"),
]
ROWS = [encode_edit(tiny_tokenizer(), prompt, target) for prompt, target in TEXTS]
BATCHES = [ROWS[:2], ROWS[2:4], ROWS[4:]]
SETTINGS = TrainingSettings(
    batch_size=2, learning_rate=5e-3, epochs=8, skip_below=0.0, stop_below=0.0, rank=4, norm_bound=1e-2
)
METHODS = ("lora", "adalora", "norm_bounded")
PIPELINES = ("breadth_first", "depth_first")


def trainer_of(loaded, position, settings) -> PositionTrainer:
    return PositionTrainer(loaded, TrainingExamples.of_rows(ROWS), TuningPosition.parse(position), settings)


def peft_layers(peft_model, names):
    """Parameter name -> the layer of peft that changes it."""
    layers = {}
    for name in names:
        path, _, own = name.rpartition(".")
        layer = peft_model.base_model.model.get_submodule(path)
        while getattr(layer, "parameter_name", own) != own:  # one wrapper for each parameter of a module, nested
            layer = layer.base_layer
        layers[name] = layer
    return layers


def same_change(trainer, layers):
    changes = trainer.method.change()
    for name, layer in layers.items():
        expected = layer.get_delta_weight("default").detach()
        assert expected.norm() > 0.1
        # mostly 1e-6; Adam's first steps enlarge the rounding of gradients that are almost nothing
        assert (changes[name] - expected).norm() < 3e-4 * expected.norm(), name


@pytest.mark.parametrize(
    "architecture, position",
    [("llama", "1.mlp_down"), ("llama", "1.layer"), ("gpt2", "1.mlp"), ("qwen3_moe", "1.mlp"), ("gpt_oss", "1.mlp")],
)
def test_lora_is_pefts(architecture, position):
    loaded = tiny_loaded(architecture)
    settings = replace(SETTINGS, method="lora", alpha=8.0)
    trainer = trainer_of(loaded, position, settings)
    factors = trainer.method.factors
    owners = {name: loaded.model.get_submodule(name.rpartition(".")[0]) for name in factors}
    bare = {name for name, owner in owners.items() if not isinstance(owner, (torch.nn.Linear, Conv1D))}
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=8,
        target_modules=[name.removesuffix(".weight") for name in factors if name not in bare],
        target_parameters=sorted(bare),
        fan_in_fan_out=architecture == "gpt2",
    )
    model = get_peft_model(copy.deepcopy(loaded.model), config)
    layers = peft_layers(model, factors)
    with torch.no_grad():
        for name, (left, right) in factors.items():
            a, b = (left.mT, right.mT) if is_input_first(loaded.model, name) else (right, left)
            if a.dim() == 3:  # (experts, rank, in) and (out, rank, experts), flattened
                a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
            layers[name].lora_A["default"].weight.copy_(a)
            assert layers[name].lora_B["default"].weight.shape == b.shape and not b.any()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=settings.learning_rate)
    for batch in BATCHES * 4:
        found = trainer.step_on(batch).value
        loss = batch_loss(full_forward(model)(batch), batch, "edit")
        assert found == pytest.approx(loss.item(), rel=1e-4)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    same_change(trainer, layers)


@pytest.mark.parametrize("input_first", [False, True])
def test_loras_factors_start_as_pefts(input_first):
    shape = (64, 400) if input_first else (400, 64)
    settings = replace(SETTINGS, method="lora", rank=50)
    method = make_method({"weight": Parameter(torch.zeros(shape), input_first)}, settings, {}, 1)
    left, right = method.factors["weight"]
    a, b = (left, right) if input_first else (right, left)
    linear = torch.nn.Linear(64, 50, bias=False)  # as peft's A, starts Kaiming-uniform with a = sqrt(5)
    assert a.abs().max() == pytest.approx(linear.weight.abs().max().item(), rel=1e-2)
    assert a.std() == pytest.approx(linear.weight.std().item(), rel=0.1)
    assert not b.any() and left.shape[1] == right.shape[0] == 50


@pytest.mark.parametrize("architecture, position", [("llama", "1.mlp"), ("gpt2", "1.layer")])
def test_adalora_is_pefts(architecture, position):
    """With peft's own loss (its orthogonality beside the model's) and its own allocation after every step."""
    loaded = tiny_loaded(architecture)
    settings = replace(SETTINGS, method="adalora", loss_average="token", alpha=40.0)
    trainer = trainer_of(loaded, position, settings)
    triplets, steps = trainer.method.triplets, 24
    config = AdaLoraConfig(
        task_type="CAUSAL_LM",  # any other model of peft leaves the orthogonality out
        init_r=6,
        target_r=4,
        tinit=3,
        tfinal=12,
        deltaT=1,
        total_step=steps,
        lora_alpha=40,
        target_modules=[name.removesuffix(".weight") for name in triplets],
        fan_in_fan_out=architecture == "gpt2",
    )
    model = get_peft_model(copy.deepcopy(loaded.model), config)
    layers = peft_layers(model, triplets)
    with torch.no_grad():
        for name, each in triplets.items():
            left, right = (each.right.mT, each.left.mT) if architecture == "gpt2" else (each.left, each.right)
            layers[name].lora_A["default"].copy_(right)
            layers[name].lora_B["default"].copy_(left)
            assert not each.values.any() and not layers[name].lora_E["default"].any()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=settings.learning_rate)
    ranks = []
    for step, batch in enumerate(BATCHES * 8):
        trainer.step_on(batch)
        ids, mask = pad_rows(batch, loaded.model.device)
        labels = torch.full_like(ids, -100)
        for index, row in enumerate(batch):
            labels[index, row.start : len(row.token_ids)] = torch.tensor(row.target_ids)
        optimiser.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        optimiser.step()
        model.base_model.update_and_allocate(step)
        ranks.append(sum(int(each.values.count_nonzero()) for each in triplets.values()))
        for name, each in triplets.items():
            assert torch.equal(each.values != 0, layers[name].lora_E["default"] != 0), step
    assert ranks[3] == 6 * len(triplets) and ranks[-1] == 4 * len(triplets) and ranks == sorted(ranks, reverse=True)
    assert len({int(each.values.count_nonzero()) for each in triplets.values()}) > 1, "no rank moved to another matrix"
    same_change(trainer, layers)


def test_adaloras_ranks_settle_in_trainings_of_any_length():
    base = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    for steps in (1, 2, 3, 7, 2500):
        settings = replace(SETTINGS, method="adalora", rank=4)
        method = make_method({"weight": Parameter(base)}, settings, {}, steps)
        for step in range(steps):
            draws = torch.Generator().manual_seed(step)
            method.step([torch.randn(base.shape, generator=draws)], 1.0)
        left = int(method.triplets["weight"].values.count_nonzero())
        assert left == (4 if steps > 1 else 6), steps


@pytest.mark.parametrize("arrival, batches", [(1, 5), (2, 3), (3, 3), (5, 3)])
def test_adaloras_ranks_settle_over_all_steps_of_a_stream(arrival, batches):
    settings = replace(SETTINGS, method="adalora", pipeline="stream", arrival=arrival)
    trainer = trainer_of(tiny_loaded("llama"), "1.mlp_down", settings)
    assert trainer.method.budget.steps == settings.epochs * batches


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_norm_bounded_is_adam_with_a_projection_after_each_step(pipeline):
    """Written out: depth_first bounds the change of each batch, and its Adam is new."""
    loaded, bound = tiny_loaded("gpt2"), 8e-3
    settings = replace(SETTINGS, method="norm_bounded", pipeline=pipeline, batch_size=5, epochs=4, norm_bound=bound)
    position = TuningPosition(1, "mlp_down")
    names = parameter_names(loaded.model, position)
    base = {name: loaded.model.get_parameter(name).clone() for name in names}
    weights = {name: value.clone().requires_grad_() for name, value in base.items()}
    rounds = [ROWS] if pipeline == "breadth_first" else [ROWS[:3], ROWS[3:]]
    trainer = trainer_of(loaded, "1.mlp_down", settings)
    for rows in rounds:
        trainer.method.restart()
        start = {name: value.detach().clone() for name, value in weights.items()}
        optimiser = torch.optim.Adam(weights.values(), lr=settings.learning_rate)
        for _ in range(settings.epochs):
            trainer.step_on(rows)
            optimiser.zero_grad()
            batch_loss(full_forward(loaded.model, weights)(rows), rows, "edit").backward()
            optimiser.step()
            with torch.no_grad():
                for name, value in weights.items():
                    value.copy_(start[name] + torch.clip(value - start[name], -bound, bound))
    largest = 0.0
    for name, change in trainer.method.change().items():
        torch.testing.assert_close(change, (weights[name] - base[name]).detach(), rtol=1e-4, atol=1e-6)
        largest = max(largest, float(change.abs().max()))
    assert largest == pytest.approx(bound * len(rounds), rel=1e-3)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_oss", "qwen3_moe", "mamba", "rwkv"])
def test_the_tail_engine_trains_the_same_delta(architecture, method, pipeline):
    """Norms, biases, stacked experts, matrices with the input first: the position is a whole layer."""
    loaded, position = tiny_loaded(architecture), TuningPosition(1, "layer")
    settings = replace(SETTINGS, method=method, pipeline=pipeline, epochs=4, learning_rate=1e-3, norm_bound=2e-3)
    examples = TrainingExamples.of_rows(ROWS)
    forward = TailEngine(loaded, ROWS, on_disk=False).training_forward(position, ROWS, torch.float32)
    fast, plain = (finetune(loaded, examples, position, settings, *more) for more in ((forward,), ()))
    assert fast.losses == pytest.approx(plain.losses, rel=1e-3)
    for training in (plain, fast):
        for name, change in training.delta.tensors.items():
            # the bias of GPT-2's keys shifts all scores of a query alike, so only rounding moves it
            if name.endswith("c_attn.bias"):
                change.chunk(3)[1].zero_()
    apart = EditDelta("", "", {name: fast.delta.tensors[name] - change for name, change in plain.delta.tensors.items()})
    assert apart.norm < 1e-3 * plain.delta.norm
    for name, change in plain.delta.tensors.items():
        trained = method == "norm_bounded" or is_matrix(name, change)
        assert bool(change.any()) == bool(fast.delta.tensors[name].any()) == trained, name


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("method", METHODS)
def test_training_is_bitwise_deterministic_and_draws_from_the_seed_alone(method, pipeline):
    loaded, position = tiny_loaded("llama"), TuningPosition(1, "mlp")
    settings = replace(SETTINGS, method=method, pipeline=pipeline, seed=3)
    before, examples = model_fingerprint(loaded.model), TrainingExamples.of_rows(ROWS)
    state = torch.random.get_rng_state()
    first = finetune(loaded, examples, position, settings)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was drawn from"
    torch.rand(7)
    second, other = (finetune(loaded, examples, position, replace(settings, seed=seed)) for seed in (3, 4))
    assert first.losses == second.losses
    for name, change in first.delta.tensors.items():
        assert torch.equal(change, second.delta.tensors[name])
        assert not torch.equal(change, other.delta.tensors[name])
    assert model_fingerprint(loaded.model) == before


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_in_pieces_is_the_same_but_for_rounding(method):
    loaded, position = tiny_loaded("llama"), "1.mlp_down"
    settings = replace(SETTINGS, method=method, learning_rate=1e-3)
    whole, pieces = (trainer_of(loaded, position, settings) for _ in range(2))
    pieces.pieces = 5
    for _ in range(6):
        assert whole.step_on(ROWS).value == pytest.approx(pieces.step_on(ROWS).value, rel=1e-4)
    for name, change in whole.method.change().items():
        assert (pieces.method.change()[name] - change).norm() < 5e-3 * change.norm()


@pytest.mark.parametrize("method", METHODS)
def test_the_change_is_an_ordinary_delta(method, tmp_path):
    """Saved and read back it is the same; of the rank or within the bound that was asked for."""
    loaded, position = tiny_loaded("llama"), TuningPosition(1, "mlp")
    settings = replace(SETTINGS, method=method, rank=3)
    delta = finetune(loaded, TrainingExamples.of_rows(ROWS), position, settings).delta
    for change in delta.tensors.values():
        if method == "norm_bounded":
            assert change.abs().max() == pytest.approx(settings.norm_bound, rel=1e-3)
        else:
            assert torch.linalg.matrix_rank(change, rtol=1e-4) <= (3 if method == "lora" else 5)
    again = EditDelta.load(delta.save(tmp_path / "delta"))
    assert again.settings["method"] == method
    assert all(torch.equal(again.tensors[name], change) for name, change in delta.tensors.items())


@pytest.mark.parametrize("method", METHODS)
def test_a_restart_keeps_what_was_trained_and_forgets_momentum(method):
    """The first step of a new Adam is the learning rate along the sign of each gradient."""
    trainer = trainer_of(tiny_loaded("llama"), "1.mlp_down", replace(SETTINGS, method=method, norm_bound=1.0))
    method = trainer.method
    for batch in BATCHES:
        trainer.step_on(batch)

    def trained():
        (name,) = method.weights
        if hasattr(method, "factors"):
            return [tensor.clone() for tensor in method.factors[name]]
        if hasattr(method, "triplets"):
            return [tensor.clone() for tensor in method.triplets[name].trained]
        return [method.weights[name].detach().clone()]

    kept, change = trained(), method.change()
    method.restart()
    assert all(map(torch.equal, kept, trained()))
    assert all(torch.equal(method.change()[name], value) for name, value in change.items())
    trainer.step_on(ROWS[:1])
    for before, after in zip(kept, trained()):
        moved = (after - before).abs()
        assert moved.quantile(0.9) == pytest.approx(SETTINGS.learning_rate, rel=1e-2)
        assert moved.max() <= SETTINGS.learning_rate * 1.001
