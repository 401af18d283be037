"""The workbench: the unedited model measured once, every trial measured fully, and no trial leaving a trace."""

import json
import math
from dataclasses import replace

import pytest
import torch

from locft import workbench
from locft.data.edit_request import EditRequest, LocalityPrompt
from locft.data.requests import EditSet, load_edits
from locft.data.suites import load_suite
from locft.errors import InputError
from locft.measure.evaluation import edit_metrics, locality_prompts
from locft.measure.generation import greedy_answers
from locft.model.delta import EditDelta
from locft.model.models import model_fingerprint
from locft.model.positions import TuningPosition
from locft.train.encoding import encode_edit
from locft.train.examples import TrainingExamples
from locft.train.formats import label
from locft.train.pipelines import TrainingSettings, finetune
from locft.workbench import Baseline, Workbench, diverged_metrics, in_memory
from tests.tiny import chat_loaded, tiny_loaded

POSITION = TuningPosition(1, "mlp_down")
SETTINGS = TrainingSettings(batch_size=2, learning_rate=1e-2, epochs=6)
PROSE_TOKENS = 64

LEARNT = {f"{kind}{end}" for kind in ("reliability", "generalization") for end in ("", ".raw", "_tf")}
KEPT = {"locality", "locality_first", "locality_exact"}
EDIT_METRICS = LEARNT | KEPT
"""The shares; `locality_kl` is in nats."""
SUITE_METRICS = {
    "capability", "capability_change", "capability_change_low", "capability_change_high", "drift_kl", "perplexity",
    "capability_seconds",
}  # fmt: skip
ALWAYS = {"n_edits", "delta_norm", "merged_loss", "evaluate_seconds"}
SECONDS = {"evaluate_seconds", "capability_seconds"}


def edit_set(*requests: EditRequest) -> EditSet:
    return EditSet.made(requests, "test")


def without_times(measurement) -> tuple:
    return {name: value for name, value in measurement.metrics.items() if name not in SECONDS}, measurement.outcomes


@pytest.fixture(scope="module")
def edits():
    return load_edits("atlas", limit=4)


@pytest.fixture(scope="module")
def suite():
    return load_suite("probes", limit=3)


@pytest.fixture(scope="module")
def bench(edits, suite):
    return Workbench.prepare(tiny_loaded("llama"), edits, suite, PROSE_TOKENS)


@pytest.fixture(scope="module")
def delta(bench):
    return bench.train(POSITION, SETTINGS).delta


@pytest.fixture(scope="module")
def measured(bench, delta):
    return bench.measure(delta)


def test_all_metrics_of_the_results_table_are_there_and_finite(bench, edits, suite, measured, delta):
    tasks = {f"capability.{task.name}" for task in suite.tasks}
    assert len(tasks) == 4
    assert measured.metrics.keys() == EDIT_METRICS | {"locality_kl"} | SUITE_METRICS | tasks | ALWAYS
    assert all(isinstance(value, float) and math.isfinite(value) for value in measured.metrics.values())
    for name in EDIT_METRICS | tasks | {"capability"}:
        assert 0 <= measured.metrics[name] <= 1, name
    assert measured.metrics["n_edits"] == len(edits.requests) == 4
    assert measured.metrics["delta_norm"] == pytest.approx(delta.norm) and delta.norm > 0
    assert measured.metrics["drift_kl"] > 0
    assert measured.metrics["capability"] == pytest.approx(sum(measured.metrics[task] for task in tasks) / len(tasks))
    change = measured.metrics["capability"] - bench.baseline.metrics["capability"]
    assert measured.metrics["capability_change"] == pytest.approx(change)
    assert measured.metrics["capability_change_low"] <= change <= measured.metrics["capability_change_high"]


def test_there_is_an_outcome_for_every_question(bench, edits, measured):
    asked = [(o.edit_id, o.kind, o.prompt, o.expected) for o in measured.outcomes]
    expected = []
    answers = iter(bench.baseline.locality_answers)
    for request in edits.requests:
        expected.append((request.id, "reliability", request.prompt, request.target))
        expected += [(request.id, "generalization", prompt, request.target) for prompt in request.rephrases]
        expected += [(request.id, "locality", other.prompt, next(answers).text) for other in request.locality]
    assert asked == expected


def test_the_outcomes_are_those_of_the_edited_model(bench, delta, measured):
    """Asked by hand: the edited weights in another copy of the model, and its greedy answers."""
    edited = tiny_loaded("llama")
    for name, value in delta.weights(edited.model).items():
        edited.model.get_parameter(name).data.copy_(value)
    texts = [answer.text for answer in greedy_answers(edited, [o.prompt for o in measured.outcomes])]
    checked = [(o.got, text) for o, text in zip(measured.outcomes, texts, strict=True) if "." not in o.expected]
    assert len(checked) > 10
    assert all(got == text or (got.endswith("…") and text.startswith(got[:-1].rstrip())) for got, text in checked)
    whole = bench.measure(delta, whole_answers=True)
    assert [o.got for o in whole.outcomes if "." not in o.expected] == [text for _, text in checked]
    assert edit_metrics(whole.outcomes) == edit_metrics(measured.outcomes)


def test_an_edit_that_changes_nothing_costs_nothing(bench, delta):
    nothing = replace(delta, tensors={name: torch.zeros_like(value) for name, value in delta.tensors.items()})
    metrics = bench.measure(nothing).metrics
    assert [metrics[name] for name in sorted(KEPT)] == [1.0] * 3
    assert metrics["locality_kl"] == 0.0, "computed in the same way"
    assert metrics["delta_norm"] == 0.0
    assert metrics["drift_kl"] < 1e-9, "edited and unedited start from different layers: equal up to rounding"
    assert [metrics[f"capability_change{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]
    for name, value in bench.baseline.metrics.items():
        assert metrics[name] == pytest.approx(value), name


def test_an_edit_can_be_learnt(bench):
    settings = replace(SETTINGS, epochs=150)
    metrics = bench.measure(bench.train(TuningPosition(1, "layer"), settings).delta).metrics
    assert metrics["reliability"] == metrics["reliability_tf"] == 1.0
    assert bench.baseline.metrics["reliability"] == 0.0
    assert metrics["locality"] < 1.0


# The unedited model


def test_the_baseline_holds_the_unedited_model(bench, edits, suite):
    tasks = {f"capability.{task.name}" for task in suite.tasks}
    learnt = {name for name in LEARNT if not name.endswith("_tf")}
    assert bench.baseline.metrics.keys() == learnt | tasks | {"capability", "perplexity"}
    answers = greedy_answers(tiny_loaded("llama"), locality_prompts(edits.requests))
    assert bench.baseline.locality_answers == tuple(answers)
    assert bench.baseline.scores.fingerprint == suite.fingerprint


def test_the_baseline_survives_json(bench):
    again = Baseline.from_dict(json.loads(json.dumps(bench.baseline.to_dict())))
    assert again == bench.baseline


def test_a_given_baseline_is_not_measured_again(bench, edits, suite, delta, measured, monkeypatch):
    """Pre-edit numbers taken on an edited model are a classic of editing libraries: they are taken once, before."""
    monkeypatch.setattr(workbench, "measure_unedited", lambda *_: pytest.fail("measured again"))
    handed = Baseline.from_dict(json.loads(json.dumps(bench.baseline.to_dict())))
    other = Workbench.prepare(tiny_loaded("llama"), edits, suite, PROSE_TOKENS, handed)
    assert other.questions == bench.questions
    assert without_times(other.measure(delta)) == without_times(measured)


def test_the_unedited_model_is_measured_before_training_and_never_after(edits, suite, monkeypatch):
    calls = []
    measure = workbench.measure_unedited

    def counted(loaded, *arguments):
        calls.append(model_fingerprint(loaded.model))
        return measure(loaded, *arguments)

    monkeypatch.setattr(workbench, "measure_unedited", counted)
    loaded = tiny_loaded("gpt2")
    unedited = model_fingerprint(loaded.model)
    bench = Workbench.prepare(loaded, edits, suite, PROSE_TOKENS)
    for layer in (0, 2):
        bench.measure(bench.train(TuningPosition(layer, "mlp"), SETTINGS).delta)
    assert calls == [unedited]


def test_a_baseline_of_other_edits_or_another_suite_is_refused(bench, edits, delta):
    with pytest.raises(ValueError, match="unrelated prompts"):
        fewer = edit_set(*edits.requests[:2])
        Workbench.prepare(tiny_loaded("llama"), fewer, None, PROSE_TOKENS, bench.baseline)
    other = Workbench.prepare(tiny_loaded("llama"), edits, load_suite("probes", limit=2), PROSE_TOKENS, bench.baseline)
    with pytest.raises(ValueError, match="different suites"):
        other.measure(delta)


# No traces


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mamba"])
def test_training_and_measuring_leave_the_model_bitwise_as_it_was(architecture, edits):
    loaded = tiny_loaded(architecture)
    before = model_fingerprint(loaded.model)
    objects = dict(loaded.model.named_parameters())
    state = (loaded.model.training, loaded.model.generation_config.to_dict(), loaded.model.config.to_dict())
    bench = Workbench.prepare(loaded, edits, None)
    delta = bench.train(TuningPosition(1, "layer"), SETTINGS).delta
    assert model_fingerprint(loaded.model) == before
    bench.measure(delta)
    assert model_fingerprint(loaded.model) == before
    assert all(parameter is objects[name] for name, parameter in loaded.model.named_parameters())
    assert not any(p.requires_grad or p.grad is not None for p in loaded.model.parameters())
    assert (loaded.model.training, loaded.model.generation_config.to_dict(), loaded.model.config.to_dict()) == state


def test_the_order_of_trials_does_not_matter(edits, suite):
    trials = [
        (TuningPosition(0, "mlp_down"), SETTINGS),
        (TuningPosition(2, "layer"), replace(SETTINGS, learning_rate=0.3, seed=5)),
        (TuningPosition(1, "attn"), replace(SETTINGS, pipeline="depth_first")),
        (TuningPosition(1, "layer"), replace(SETTINGS, learning_rate=1e38)),
    ]

    def run(order):
        bench = Workbench.prepare(tiny_loaded("llama"), edits, suite, PROSE_TOKENS)
        results = {}
        for index in order:
            training = bench.train(*trials[index])
            change = {name: value.numpy().tobytes() for name, value in training.delta.tensors.items()}
            results[index] = (change, training.losses, training.diverged, without_times(bench.measure(training.delta)))
        return results

    forwards, backwards = run([0, 1, 2, 3]), run([3, 2, 1, 0])
    alone = run([2])
    assert forwards == backwards
    assert forwards[2] == alone[2]
    assert forwards[3][2], "the last one is a divergence, which must not leak either"


def test_a_saved_delta_gives_the_same_metrics(bench, delta, measured, tmp_path):
    reloaded = EditDelta.load(delta.save(tmp_path))
    assert without_times(bench.measure(reloaded)) == without_times(measured)


def test_a_delta_of_another_model_is_refused(bench, delta):
    with pytest.raises(InputError, match="fingerprint"):
        bench.measure(replace(delta, base_fingerprint="another"))


# Divergence


def test_a_diverged_training_has_finite_worst_values(bench, measured):
    worst = diverged_metrics(bench.questions, bench.baseline)
    assert all(isinstance(value, float) and math.isfinite(value) for value in worst.values())
    assert EDIT_METRICS <= worst.keys() <= measured.metrics.keys()
    assert all(worst[name] == 0.0 for name in EDIT_METRICS)
    assert {worst[name] for name in worst if name == "capability" or name.startswith("capability.")} == {0.0}
    assert worst["capability_change"] == -bench.baseline.metrics["capability"]
    assert worst["capability_change_low"] <= worst["capability_change"] <= worst["capability_change_high"]


def test_an_edit_that_ruins_the_model_still_has_finite_metrics(bench, delta):
    """Finite weights, so large that the logits are not: searched metrics must exist all the same."""
    ruin = replace(delta, tensors={name: torch.full_like(value, 1e38) for name, value in delta.tensors.items()})
    measured = bench.measure(ruin)
    assert all(math.isfinite(value) for value in measured.metrics.values())
    assert EDIT_METRICS | {"capability", "capability_change"} <= measured.metrics.keys()
    assert measured.metrics["reliability"] == 0.0
    assert measured.metrics["locality"] < 0.5
    assert len(measured.outcomes) == len(bench.questions)


# Formats


def test_edits_are_asked_in_every_format(edits, suite, caplog):
    loaded = chat_loaded()
    wording = "Answer briefly: {prompt}"
    bench = Workbench.prepare(loaded, edits, None, ask_formats=("raw", "qa", "chat", wording))
    assert not caplog.records
    forms = ("raw", "qa", "chat", label(wording))
    names = {f"{kind}.{form}" for kind in ("reliability", "generalization") for form in forms} | {"reliability.unseen"}
    assert bench.baseline.metrics.keys() == names | {"reliability", "generalization"}
    metrics = bench.measure(bench.train(POSITION, SETTINGS).delta).metrics
    assert names | EDIT_METRICS - {"reliability.raw", "generalization.raw"} <= metrics.keys()
    assert diverged_metrics(bench.questions, bench.baseline).keys() == names | EDIT_METRICS
    for kind in ("reliability", "generalization"):
        counted = [metrics[f"{kind}.{form}"] for form in forms]
        assert metrics[kind] == pytest.approx(sum(counted) / len(counted))


def test_an_edit_learnt_in_chat_form_is_heard_to_the_end_of_its_turn(edits):
    """Trained on chat rows alone, a model ends its answers with the template's own token."""
    loaded = chat_loaded()
    bench = Workbench.prepare(loaded, edits, None, ask_formats=("chat",))
    rows = tuple(encode_edit(loaded.tokenizer, edit.prompt, edit.target, "chat") for edit in edits.requests)
    settings = replace(SETTINGS, epochs=150)
    delta = finetune(loaded, TrainingExamples.of_rows(rows), TuningPosition(1, "layer"), settings).delta
    metrics = bench.measure(delta).metrics
    assert metrics["reliability"] == metrics["reliability.chat"] == metrics["reliability_tf"] == 1.0
    assert "reliability.raw" not in metrics and "reliability.unseen" in metrics


def test_a_tokenizer_without_a_template_is_asked_the_rest(edits, caplog):
    bench = Workbench.prepare(tiny_loaded(), edits, None, ask_formats=("raw", "chat"))
    assert {question.format for question in bench.questions} == {"raw"}
    assert [record.getMessage() for record in caplog.records] == [
        "tiny-llama: its tokenizer has no chat template, so edits are not asked in the chat format"
    ]
    with pytest.raises(InputError, match="got 'chats', .*did you mean chat"):
        Workbench.prepare(tiny_loaded(), edits, None, ask_formats=("raw", "chats"))


# Less than everything


def test_without_a_suite(edits):
    bench = Workbench.prepare(tiny_loaded("llama"), edits, None)
    assert bench.baseline.scores is None
    assert bench.baseline.metrics.keys() == {name for name in LEARNT if not name.endswith("_tf")}
    assert Baseline.from_dict(json.loads(json.dumps(bench.baseline.to_dict()))) == bench.baseline
    measured = bench.measure(bench.train(POSITION, SETTINGS).delta)
    assert measured.metrics.keys() == EDIT_METRICS | {"locality_kl"} | ALWAYS
    assert diverged_metrics(bench.questions, bench.baseline) == dict.fromkeys(EDIT_METRICS, 0.0)


@pytest.mark.parametrize(
    ("rephrases", "locality", "kinds"),
    [
        ((), (), {"reliability"}),
        (("France has the capital",), (), {"reliability", "generalization"}),
        ((), (LocalityPrompt("Water freezes at", None),), {"reliability", "locality"}),
    ],
)
def test_without_rephrases_or_locality(rephrases, locality, kinds):
    edits = edit_set(
        EditRequest("a", "France", "The capital of France is", "Oslo", None, rephrases, locality),
        EditRequest("b", "Hamlet", "Who wrote Hamlet?", "Jane Austen", None, (), ()),
    )
    bench = Workbench.prepare(tiny_loaded("llama"), edits, None)
    assert len(bench.baseline.locality_answers) == len(locality)
    metrics = bench.measure(bench.train(POSITION, SETTINGS).delta).metrics
    shares = {name for name in EDIT_METRICS if name.startswith(tuple(kinds))}
    counts = {f"n_edits.{kind}": 1.0 for kind in kinds - {"reliability"}}  # of two edits, one has such prompts
    assert metrics.keys() == ALWAYS | shares | ({"locality_kl"} if "locality" in kinds else set()) | counts.keys()
    assert {name: metrics[name] for name in counts} == counts
    assert diverged_metrics(bench.questions, bench.baseline).keys() == shares


def test_a_single_edit():
    edits = edit_set(EditRequest("a", "France", "The capital of France is", "Oslo", None, (), ()))
    bench = Workbench.prepare(tiny_loaded("gpt2"), edits, None)
    training = bench.train(TuningPosition(1, "layer"), replace(SETTINGS, epochs=60, batch_size=32))
    assert bench.measure(training.delta).metrics["reliability"] == 1.0
    assert bench.measure(training.delta).metrics["n_edits"] == 1.0


@pytest.mark.parametrize("position", ["0.mlp_down", "2.attn"])
def test_a_model_divided_among_devices_trains_and_measures_the_same(position):
    """As accelerate does it for a model larger than one GPU: its hooks move what enters and leaves every part."""
    from accelerate import dispatch_model

    whole, divided = tiny_loaded(), tiny_loaded()
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    parts |= {f"model.layers.{layer}": "cpu" for layer in range(3)}
    dispatch_model(divided.model, parts, main_device="cpu", force_hooks=True)
    assert all(hasattr(layer, "_hf_hook") for layer in divided.model.model.layers)
    edits, suite = load_edits("atlas", limit=4), load_suite("probes", limit=2)
    settings = TrainingSettings(learning_rate=0.02, batch_size=2, epochs=4)
    found = []
    for loaded, full in ((whole, True), (divided, False)):
        bench = Workbench.prepare(loaded, edits, suite, 64, engine=None if full else in_memory)
        assert bench.engine is None, "hooks and tail views do not go together"
        training = bench.train(TuningPosition.parse(position), settings)
        metrics = bench.measure(training.delta).metrics
        found.append((training.losses, {name: value for name, value in metrics.items() if "seconds" not in name}))
    assert found[0] == found[1]
