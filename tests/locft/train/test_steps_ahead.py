"""Steps that are decided on the device: bitwise those of a training that waits for every loss."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from locft import process
from locft.data.requests import load_edits
from locft.edit_trainer import EditTrainer
from locft.engine import boundary_states, llama_kernel
from locft.engine.boundary_states import BoundaryStates
from locft.engine.model_views import ModelViews
from locft.engine.tail_engine import TailEngine
from locft.model.positions import TuningPosition, parameter_names
from locft.train import pipelines
from locft.train.encoding import encode_edits
from locft.train.examples import TrainingExamples
from locft.train.methods.curvature import Curvature
from locft.train.pipelines import Earlier, PositionTrainer, TrainingSettings, finetune
from tests.tiny import FFN, HIDDEN

POSITION = TuningPosition(1, "mlp_down")
BASIS = TrainingSettings(batch_size=2, learning_rate=1e-2, epochs=6, skip_below=0.0, stop_below=0.0, seed=3)


@pytest.fixture
def ahead(monkeypatch):
    """Decides on the device from now on, which is the CPU."""
    return lambda: monkeypatch.setattr(pipelines, "runs_ahead", lambda device: True)


def outcome(training):
    return training.losses, training.steps, training.diverged, training.trained_loss, training.pieces


SETTINGS = {
    "every step": BASIS,
    "skipped ones": replace(BASIS, epochs=40, skip_below=3.0),
    "stops": replace(BASIS, epochs=40, skip_below=2.0, stop_below=3.0),
    "rests": replace(BASIS, epochs=12, rest_below=1.0),
    "token": replace(BASIS, loss_average="token"),
    "last token": replace(BASIS, loss_average="last_token"),
    "depth first": replace(BASIS, pipeline="depth_first", epochs=30, skip_below=0.05, stop_below=0.2),
    "stream": replace(BASIS, pipeline="stream", arrival=2, replay=2, epochs=8, skip_below=1.0),
    "lora": replace(BASIS, method="lora", rank=2, epochs=40, skip_below=4.5),
    "norm bounded": replace(BASIS, method="norm_bounded", norm_bound=5e-3, epochs=20, skip_below=6.3),
    "adalora": replace(BASIS, method="adalora", rank=2),
    "diverges": replace(BASIS, learning_rate=1e38, epochs=20),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_result_is_bitwise_that_of_waiting(loaded, rows, ahead, name):
    settings, examples = SETTINGS[name], TrainingExamples.of_rows(rows)
    position = TuningPosition(1, "layer") if name == "diverges" else POSITION
    expected = finetune(loaded, examples, position, settings)
    ahead()
    found = finetune(loaded, examples, position, settings)
    assert outcome(found) == outcome(expected)
    for tensor, change in expected.delta.tensors.items():
        assert torch.equal(found.delta.tensors[tensor], change)
    assert expected.diverged == (name == "diverges")
    if settings.skip_below and settings.pipeline == "breadth_first":
        assert 0 < expected.steps < settings.epochs * 3


def test_a_stream_goes_on_and_its_time_ends_it(loaded, rows, ahead):
    settings, examples = SETTINGS["stream"], TrainingExamples.of_rows(rows)
    before = finetune(loaded, TrainingExamples.of_rows(rows[:3]), POSITION, settings)
    expected = finetune(loaded, examples, POSITION, settings, earlier=Earlier(before.delta, 3))
    ahead()
    found = finetune(loaded, examples, POSITION, settings, earlier=Earlier(before.delta, 3))
    assert outcome(found) == outcome(expected)
    ended = finetune(loaded, examples, POSITION, settings, earlier=Earlier(before.delta, 3, seconds=0.0))
    assert ended.steps <= 1 and not ended.diverged and ended.losses == ()


def test_unlikely_targets_give_the_same_loss_and_gradient(loaded, rows):
    """Some whose probability a float32 cannot hold."""
    logits = 60 * torch.randn(sum(len(row.target_ids) for row in rows), 400, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 0.05):
        given = (scale * logits).requires_grad_()
        found = [
            pipelines.loss_and_gradients(lambda part, own=given: own, [given], rows, "edit", ahead=ahead)
            for ahead in (False, True)
        ]
        assert torch.equal(found[0].numbers, found[1].numbers) and (found[0].value > 80) == (scale == 1.0)
        assert torch.equal(*(one.gradients[0] for one in found))


def test_pieces_give_the_same(loaded, rows, ahead):
    def trained(pieces):
        trainer = PositionTrainer(loaded, TrainingExamples.of_rows(rows), POSITION, BASIS)
        trainer.pieces = pieces
        losses = [trainer.step_on(rows) for _ in range(3)]
        trainer.settle()
        return [loss.value for loss in losses], [loss.by_edit for loss in losses], trainer.steps

    expected = [trained(pieces) for pieces in (1, 2, 5)]
    ahead()
    assert [trained(pieces) for pieces in (1, 2, 5)] == expected


@pytest.fixture
def trainer(loaded):
    requests = load_edits("atlas", limit=3).requests
    rows = tuple(encode_edits(loaded.tokenizer, requests))
    return EditTrainer(loaded, requests, rows, TailEngine(loaded, rows, on_disk=False))


@pytest.mark.parametrize("method, skip_below", [("low_curvature", 5.2), ("natural_gradient", 6.0)])
@pytest.mark.parametrize("pipeline", ["breadth_first", "stream"])
def test_what_holds_drift_back_is_the_same_but_for_rounding(trainer, ahead, method, skip_below, pipeline):
    settings = replace(BASIS, method=method, pipeline=pipeline, epochs=12, skip_below=skip_below)
    expected = trainer.train(POSITION, settings)
    ahead()
    found = trainer.train(POSITION, settings)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert (found.steps, found.diverged) == (expected.steps, False) and 0 < found.steps < 24


def test_guards_wait_for_the_loss(trainer, ahead):
    """They are drawn where a step is taken."""
    settings = replace(BASIS, guard="prose")
    expected = trainer.train(POSITION, settings)
    ahead()
    found = trainer.train(POSITION, settings)
    assert outcome(found) == outcome(expected)


FUSED_SGD = torch.library.Library("aten", "IMPL", "Meta")


class Devices(TorchDispatchMode):
    """Notes the operations that mix devices: on a GPU they fail, or wait for a copy of what is on the CPU."""

    def __init__(self):
        super().__init__()
        self.mixed = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.dim() or tensor.device.type != "cpu"}
        if len(devices) > 1 and "copy" not in str(func):
            self.mixed.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_numbers(monkeypatch):
    """A device without numbers stands for a GPU: asking a tensor there for one is an error, as `item`, `tolist`, `nonzero`,
    a boolean index or a copy to the CPU is."""
    for module in (process, pipelines, boundary_states):
        monkeypatch.setattr(module, "runs_ahead", lambda device: device.type == "meta")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    for optimiser in (torch.optim.Adam, torch.optim.SGD):
        module = sys.modules[optimiser.__module__]
        monkeypatch.setattr(module, "_device_dtype_check_for_fused", lambda *_, **__: None)
    monkeypatch.setattr(llama_kernel, "_agrees", lambda layer: True)
    if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_sgd_", "Meta"):  # as Adam's has
        FUSED_SGD.impl("_fused_sgd_", lambda *_, **__: None)
    return torch.device("meta")


def test_asking_for_a_number_is_an_error_there(no_numbers):
    tensor = torch.ones(3, device=no_numbers)
    for ask in (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.nonzero, lambda t: t[t > 0], lambda t: bool(t[0])):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask(tensor)


def engine_there(loaded, rows, device):
    """The engine over a model without numbers, and the model."""
    engine, model = TailEngine(loaded, rows, range(3), on_disk=False), copy.deepcopy(loaded.model).to(device)
    engine.model, engine._views = model, {model.dtype: ModelViews(model, packed=True)}
    engine.states = BoundaryStates({layer: states.to(device) for layer, states in engine.states.layers.items()})
    return engine, replace(loaded, model=model)


def curvature_there(there, name):
    sizes = there.model.get_parameter(name).shape
    if len(sizes) < 2:
        return Curvature(diagonal=torch.ones(sizes))
    return Curvature(torch.eye(sizes[0]), torch.eye(sizes[1]))


POSITIONS_THERE = ("0.layer", "1.mlp_up", "1.mlp_down", "2.mlp_down", "2.attn_q")
OPTIONS_THERE = (
    {"loss_average": "token"},
    {"loss_average": "last_token"},
    {"method": "lora"},
    {"method": "norm_bounded"},
    {"method": "low_curvature"},
    {"method": "low_curvature", "precision": "bfloat16"},
    {"method": "natural_gradient"},
)


@pytest.mark.parametrize(
    "position, options",
    [*((at, {}) for at in POSITIONS_THERE), *(("1.mlp_down", one) for one in OPTIONS_THERE)],
    ids=str,
)
def test_no_step_asks_for_a_number_or_mixes_devices(loaded, rows, no_numbers, monkeypatch, position, options):
    position = TuningPosition.parse(position)
    engine, there = engine_there(loaded, rows, no_numbers)
    kept = (
        torch.empty(len(engine.tree), HIDDEN, device=no_numbers),
        torch.empty(len(engine.tree), FFN, device=no_numbers),
    )
    behind = position.module == "mlp_down"  # tried on numbers when a training begins, not in its steps
    monkeypatch.setattr(TailEngine, "_pass_layer", lambda *_: kept if behind else None)
    forward = engine.training_forward(position, rows, torch.float32)
    curvature = {name: curvature_there(there, name) for name in parameter_names(there.model, position)}
    settings, examples = replace(BASIS, **options), TrainingExamples.of_rows(rows)
    trainer = PositionTrainer(there, examples, position, settings, forward, curvature)
    with Devices() as devices:
        for pieces in (1, 2):
            trainer.pieces = pieces
            loss = trainer.step_on(rows, replay=rows[:2])
    assert devices.mixed == []
    with pytest.raises(RuntimeError, match="meta"):
        assert loss.value
