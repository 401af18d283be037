"""Everything that computes, on the device that LOCFT_TEST_DEVICE names (`make test-gpu`), held to the plain loop on the CPU.

Without it they run on a device of its own that is really the CPU (`tests.other_device`). On a GPU sums are taken in another
order, so what is compared is near, and no result is taken bit by bit.
"""

import copy
from dataclasses import replace

import pytest
import torch

from locft.data.requests import load_edits
from locft.data.suites import load_suite
from locft.edit_trainer import EditTrainer
from locft.engine import boundary_states
from locft.engine.tail_engine import TailEngine
from locft.measure.generation import greedy_answers
from locft.model.models import DTYPES, LoadedModel
from locft.model.positions import TuningPosition
from locft.probe import probe_positions
from locft.process import runs_ahead
from locft.train.encoding import encode_edits
from locft.train.examples import TrainingExamples
from locft.train.kept_state import KeptState
from locft.train.methods import MethodName
from locft.train.objective import batch_loss
from locft.train.pipelines import PositionTrainer, TrainingSettings, finetune
from locft.train.reference import full_forward
from locft.train.token_rows import TokenRow
from locft.workbench import Workbench
from tests.killed import killed_after
from tests.tiny import tiny_loaded

pytestmark = pytest.mark.device

ARCHITECTURES = ("llama", "qwen3", "gpt2", "gpt_neox", "gemma2", "qwen3_moe", "mamba")
REQUESTS = load_edits("atlas", limit=4).requests
POSITION = TuningPosition(1, "mlp_down")
SETTINGS = TrainingSettings(batch_size=2, learning_rate=5e-3, epochs=4, skip_below=0.0, stop_below=0.0)


@pytest.fixture(autouse=True)
def exact_products():
    """Products of float32 in float32, as on a CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on(device: torch.device, loaded: LoadedModel) -> LoadedModel:
    return replace(loaded, model=copy.deepcopy(loaded.model).to(device))


def edit_trainer(loaded: LoadedModel, engine: bool = True) -> EditTrainer:
    rows = tuple(encode_edits(loaded.tokenizer, REQUESTS))
    return EditTrainer(loaded, REQUESTS, rows, TailEngine(loaded, rows, on_disk=False) if engine else None)


def near(found: torch.Tensor, expected: torch.Tensor, share: float) -> bool:
    return bool((found.detach().cpu() - expected.detach()).norm() <= share * expected.detach().norm())


@pytest.mark.parametrize("dtype, share", [("float32", 1e-3), ("bfloat16", 0.2)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_gradients_are_those_of_the_plain_loop(device, architecture, dtype, share):
    plain = tiny_loaded(architecture)
    loaded, rows = on(device, plain), encode_edits(plain.tokenizer, REQUESTS)
    engine = TailEngine(loaded, rows, on_disk=False)
    for text in ("0.layer", "1.layer", "2.layer"):
        position = TuningPosition.parse(text)
        names = [name for name, _ in plain.model.named_parameters() if f".{position.layer}." in name]
        given = {name: plain.model.get_parameter(name).detach().float() * 1.05 for name in names}
        sides = []
        for forward, where in (
            (lambda weights: full_forward(plain.model, weights), torch.device("cpu")),
            (engine.training_forward(position, rows, DTYPES[dtype]), device),
        ):
            weights = {name: value.clone().to(where).requires_grad_() for name, value in given.items()}
            logits = forward(weights)(rows)
            gradients = torch.autograd.grad(batch_loss(logits, rows, "edit"), list(weights.values()), allow_unused=True)
            sides.append(
                (logits, torch.cat([torch.zeros(1, device=where), *(g.flatten() for g in gradients if g is not None)]))
            )
        (expected, wanted), (logits, gradient) = sides
        assert logits.device == loaded.model.device and near(logits, expected, share), text
        if dtype == "float32" or architecture != "qwen3_moe":  # rounding sends tokens to other experts
            assert near(gradient, wanted, share), text


@pytest.mark.parametrize("pipeline", ["breadth_first", "depth_first", "stream"])
@pytest.mark.parametrize("method", MethodName.__args__)
def test_every_method_and_pipeline_trains_as_the_plain_loop(device, method, pipeline):
    options = {"method": method, "pipeline": pipeline, "rank": 2, "norm_bound": 5e-3, "arrival": 2, "replay": 2}
    settings = replace(SETTINGS, **options)
    plain = edit_trainer(tiny_loaded("llama"), engine=False).train(POSITION, settings)
    found = edit_trainer(on(device, tiny_loaded("llama"))).train(POSITION, settings)
    assert found.losses == pytest.approx(plain.losses, rel=2e-2) and found.steps == plain.steps
    assert found.trained_loss == pytest.approx(plain.trained_loss, rel=2e-2)
    for name, change in plain.delta.tensors.items():
        assert found.delta.tensors[name].device.type == "cpu" and near(found.delta.tensors[name], change, 0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"skip_below": 6.0, "epochs": 12},
        {"rest_below": 6.0, "epochs": 12},
        {"loss_average": "last_token"},
        {"guard": "prose", "guards_per_step": 2},
        {"train_formats": "raw,qa", "prefix_share": 0.5},
        {"method": "low_curvature"},
        {"method": "natural_gradient"},
        {"noise": 0.1},
        {"precision": "bfloat16"},
        {"shrink": "yes"},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_trains_as_on_the_cpu(device, options):
    settings = replace(SETTINGS, **options)
    expected = edit_trainer(tiny_loaded("llama")).train(POSITION, settings)
    found = edit_trainer(on(device, tiny_loaded("llama"))).train(POSITION, settings)
    share = 0.1 if settings.precision == "bfloat16" else 2e-2
    assert found.losses == pytest.approx(expected.losses, rel=share) and not found.diverged


@pytest.mark.parametrize("position", ["0.layer", "1.mlp_down", "1.mlp_up", "2.mlp_down"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_step_waits(device, position, precision):
    """`test_steps_ahead` shows the same without a GPU; here the driver says so."""
    if not runs_ahead(device):
        pytest.skip(f"work on {device} is not queued")
    loaded, position = on(device, tiny_loaded("llama")), TuningPosition.parse(position)
    rows = encode_edits(loaded.tokenizer, REQUESTS)
    forward = TailEngine(loaded, rows, on_disk=False).training_forward(position, rows, DTYPES[precision])
    trainer = PositionTrainer(loaded, TrainingExamples.of_rows(rows), position, SETTINGS, forward)
    trainer.step_on(rows)  # allocates, and compiles what it needs
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step_on(rows, replay=rows[:2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.settle()
    assert trainer.steps == 2


def test_a_divergence_is_known_and_leaves_finite_weights(device):
    loaded = on(device, tiny_loaded("llama"))
    examples = TrainingExamples.of_rows(encode_edits(loaded.tokenizer, REQUESTS))
    trained = finetune(loaded, examples, TuningPosition(1, "layer"), replace(SETTINGS, learning_rate=1e30, epochs=20))
    assert trained.diverged and all(change.isfinite().all() for change in trained.delta.tensors.values())


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["from the cpu", "kept near"])
def test_boundary_states_are_those_of_the_cpu(device, monkeypatch, share):
    monkeypatch.setattr(boundary_states, "NEAR_SHARE", share)
    plain = tiny_loaded("llama")
    rows = encode_edits(plain.tokenizer, REQUESTS)
    engines = [TailEngine(loaded, rows, range(3)) for loaded in (plain, on(device, plain))]
    nodes = torch.tensor([[0, 1, 2, -1], [5, 4, -1, -1]])
    for layer in range(3):
        expected, found = (engine.states.gather(layer, nodes, engine.model.device) for engine in engines)
        assert found.device == engines[1].model.device and near(found, expected, 1e-4)
        assert not found[nodes.to(device) < 0].any() and len(engines[1].states._near) <= boundary_states.KEPT_NEAR


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_an_edit_is_measured_as_by_the_plain_loop(device, architecture, dtype):
    edits, suite = replace(load_edits("atlas", limit=3)), load_suite("probes", limit=4)
    plain = tiny_loaded(architecture)
    model = on(device, replace(plain, model=copy.deepcopy(plain.model).to(DTYPES[dtype])))
    reference = Workbench.prepare(plain, edits, suite, 64, engine=None)
    bench = Workbench.prepare(model, edits, suite, 64)
    delta = reference.train(POSITION, replace(SETTINGS, epochs=8)).delta
    expected, found = reference.measure(delta).metrics, bench.measure(delta).metrics
    assert found.keys() == expected.keys()
    exact = dtype == "float32"
    for name in (name for name in expected if not name.endswith("seconds")):
        apart = abs(found[name] - expected[name])
        assert apart <= (1e-3 if exact else 0.3) * max(1.0, abs(expected[name])), (name, found[name], expected[name])
    if exact:
        assert greedy_answers(model, [r.prompt for r in REQUESTS]) == greedy_answers(
            plain, [r.prompt for r in REQUESTS]
        )


def test_positions_are_scored_as_on_the_cpu(device):
    plain = tiny_loaded("llama")
    rows = encode_edits(plain.tokenizer, REQUESTS)
    positions = [TuningPosition(layer, module) for layer in range(3) for module in ("mlp_down", "layer")]
    prose = [TokenRow(tuple(token for row in rows for token in row.token_ids), 1)]
    sides = [probe_positions(loaded, rows, prose, positions) for loaded in (plain, on(device, plain))]
    for expected, found in zip(*sides):
        assert found.gain == pytest.approx(expected.gain, rel=1e-3)
        assert found.disturbance == pytest.approx(expected.disturbance, rel=0.3)  # labels are drawn


@pytest.mark.parametrize("method", MethodName.__args__)
def test_a_training_that_was_killed_goes_on_there(device, tmp_path, monkeypatch, method):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trainer, settings = edit_trainer(on(device, tiny_loaded("llama"))), replace(SETTINGS, method=method, rank=2)
    monkeypatch.setattr(EditTrainer, "_kept_state", lambda *_: KeptState(["a training"], 0.0))
    whole = trainer.train(POSITION, settings)
    with killed_after(5, monkeypatch):
        trainer.train(POSITION, settings)
    assert KeptState(["a training"]).read() is not None
    again = trainer.train(POSITION, settings)
    assert again.losses == pytest.approx(whole.losses, rel=1e-3) and again.steps == whole.steps
