"""Training as trials call it: what is drawn, held, scaled and kept, on a tiny model."""

from dataclasses import replace

import pytest
import torch

from locft import background
from locft import edit_trainer as module
from locft.background import MOST, PASSAGES, SAMPLES, TOKENS, background_rows, own_rows, prefix_texts
from locft.curvature import measured_once
from locft.data.edit_request import EditRequest, LocalityPrompt, PortabilityPrompt
from locft.data.requests import load_edits
from locft.data.suites import DATA_FOLDER
from locft.edit_trainer import EditTrainer
from locft.engine import boundary_states
from locft.engine.tail_engine import TailEngine
from locft.errors import InputError
from locft.measure.capability import EncodedSuite, measure_drift
from locft.measure.evaluation import follow
from locft.measure.generation import ModelAnswer
from locft.model.positions import TuningPosition
from locft.train.encoding import encode_edits
from locft.train.objective import mean_loss
from locft.train.pipelines import TrainingSettings
from locft.train.reference import full_forward
from tests.tiny import tiny_loaded, tiny_tokenizer, turned_faster

POSITION = TuningPosition(1, "mlp_down")
SETTINGS = TrainingSettings(learning_rate=1e-2, batch_size=4, epochs=6, skip_below=0, stop_below=0)


@pytest.fixture(scope="module")
def loaded():
    return tiny_loaded("llama")


@pytest.fixture(scope="module")
def requests():
    return load_edits("atlas", limit=8).requests


def trainer_of(loaded, requests, layers: tuple[int, ...] | None = None, **options) -> EditTrainer:
    """layers: of an engine; without, everything is computed with the full model."""
    rows = encode_edits(loaded.tokenizer, requests)
    engine = None if layers is None else TailEngine(loaded, rows, layers, on_disk=False)
    return EditTrainer(loaded, requests, rows, engine, **options)


@pytest.fixture(scope="module")
def trainer(loaded, requests):
    return trainer_of(loaded, requests, ())


def edited(loaded, delta):
    """Logits of rows after an edit."""
    return full_forward(loaded.model, delta.weights(loaded.model))


def drift(loaded, delta, rows) -> float:
    return measure_drift(edited(loaded, delta), full_forward(loaded.model), EncodedSuite("", {}, rows)).kl


def same(one, other) -> bool:
    return all(torch.equal(one.delta.tensors[name], other.delta.tensors[name]) for name in one.delta.tensors)


WAYS = [
    {"method": "low_curvature", "curvature_strength": 0.1},
    {"method": "natural_gradient"},
    {"train_formats": "raw,qa,Say briefly: {prompt}"},
    {"prefix_share": 0.5},
    {"guard": "same_relation"},
    {"guard": "locality_like", "guards_per_step": 2},
    {"guard": "prose", "guard_weight": 0.1},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_engine_trains_what_the_full_model_does_and_twice_the_same(trainer, way):
    settings = replace(SETTINGS, **way)
    fast, again = (trainer.train(POSITION, settings) for _ in range(2))
    plain = trainer_of(trainer.loaded, trainer.requests).train(POSITION, settings)
    assert same(fast, again)
    assert fast.losses == pytest.approx(plain.losses, rel=2e-3)
    for name, change in plain.delta.tensors.items():
        assert (fast.delta.tensors[name] - change).norm() < 0.05 * change.norm()
    assert not same(fast, trainer.train(POSITION, SETTINGS)), "the setting changes something"


def test_formats_train_at_every_layer_where_states_fit_only_for_raw_prompts(loaded, requests, monkeypatch):
    rows = encode_edits(loaded.tokenizer, requests)
    states = TailEngine(loaded, rows, on_disk=False).states.layers[2]
    monkeypatch.setattr(boundary_states, "LIMIT_BYTES", 3 * states.nbytes)
    engine, settings = TailEngine(loaded, rows, on_disk=False), replace(SETTINGS, epochs=1, train_formats="raw,qa")
    for layer in range(3):
        position = TuningPosition(layer, "mlp_up")
        fast, plain = (EditTrainer(loaded, requests, rows, e).train(position, settings) for e in (engine, None))
        assert fast.losses == pytest.approx(plain.losses, rel=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "gpt_oss", "mamba", "gemma2"])
def test_every_architecture_takes_every_way(architecture, requests):
    loaded = tiny_loaded(architecture)
    trainer = trainer_of(loaded, requests[:4], ())
    way = {"method": "natural_gradient", "train_formats": "raw,qa", "prefix_share": 0.5, "guard": "prose"}
    trained = trainer.train(TuningPosition(1, "layer"), replace(SETTINGS, epochs=2, **way))
    assert trained.steps == 2 and not trained.diverged
    assert all(torch.isfinite(change).all() for change in trained.delta.tensors.values())
    assert trained.delta.norm > 0


def test_a_price_on_drift_leaves_less_of_it(trainer):
    prose = background_rows(trainer.loaded)[:8]
    drifts = []
    for strength in (0.0, 300.0):
        settings = replace(SETTINGS, method="low_curvature", curvature_strength=strength, epochs=20)
        drifts.append(drift(trainer.loaded, trainer.train(POSITION, settings).delta, prose))
    assert drifts[1] < 0.7 * drifts[0]


def test_guards_hold_what_they_name(trainer):
    settings = replace(SETTINGS, epochs=15)
    held = replace(settings, guard="same_relation", guard_weight=3.0, guards_per_step=8)
    guards = trainer.examples(held).guards.rows
    moved, free = (drift(trainer.loaded, trainer.train(POSITION, one).delta, guards) for one in (held, settings))
    assert moved < 0.5 * free


def guard_prompts(trainer, kind) -> list[str]:
    rows = trainer.examples(replace(SETTINGS, guard=kind)).guards.rows
    return [trainer.loaded.tokenizer.decode(row.token_ids[: row.start]) for row in rows]


def test_guards_never_measure_locality_nor_ask_an_edit():
    measured = load_edits("atlas").requests[0].locality[0].prompt
    requests = (
        EditRequest("1", "Peru", "The capital of Peru is", "Oslo", None, (), (LocalityPrompt(measured, None),)),
        EditRequest("2", "Chad", "The capital of Chad is", "Rome", None, (), ()),
        EditRequest("3", "Mali", "The currency of Mali is", "yen", None, (), ()),
    )
    trainer = trainer_of(tiny_loaded("llama"), requests)
    said = {kind: guard_prompts(trainer, kind) for kind in ("same_relation", "locality_like")}
    prompts = {request.prompt for request in requests}
    assert said["same_relation"] and not prompts & set(said["same_relation"])
    assert "The currency of Peru is" in said["same_relation"] or "The currency of Chad is" in said["same_relation"]
    assert said["locality_like"] and measured not in said["locality_like"]


@pytest.fixture
def guards_said(loaded, monkeypatch):
    """A function that gives the prompts of all guards of a kind, however many, for some edits."""
    monkeypatch.setattr(module, "GUARDS", 10**6)
    monkeypatch.setattr(module, "greedy_answers", lambda loaded, prompts: [ModelAnswer("a", (65,)) for _ in prompts])
    return lambda kind, *requests: guard_prompts(trainer_of(loaded, requests), kind)


def about(subject, prompt):
    return EditRequest(subject, subject, prompt, "Oslo", None, (), ())


@pytest.mark.parametrize("kind", ["same_relation", "locality_like"])
def test_no_guard_measures_an_edit(kind, guards_said):
    asked = {"Peru": "capital", "Chad": "currency", "Mali": "anthem", "Togo": "language", "Fiji": "king"}
    edits = [about(subject, f"The {what} of {subject} is") for subject, what in asked.items()]
    every = guards_said(kind, *edits)
    near, far = (LocalityPrompt(every[1], None),), (PortabilityPrompt(every[2], ("x",)),)
    edits[0] = replace(edits[0], rephrases=(every[0],), locality=near, portability=far)
    assert guards_said(kind, *edits) == every[3:]


def test_guards_of_two_edits_swap_their_subjects(guards_said):
    edits = about("Peru", "The capital of Peru is"), about("Chad", "The currency of Chad is")
    assert guards_said("same_relation", *edits) == ["The capital of Chad is", "The currency of Peru is"]


@pytest.mark.parametrize(
    "prompt, named", [("What is Tunisia's capital?", "Tunisia"), ("The symbol for radon:", "radon")]
)
def test_guards_leave_out_what_an_edit_without_a_subject_is_about(prompt, named, guards_said):
    other, found = (guards_said("locality_like", about("", text)) for text in ("Q7: ", prompt))
    assert [text for text in other if named not in text] == found != other


def test_a_guard_without_prompts_is_an_input_error():
    trainer = trainer_of(tiny_loaded("llama"), (EditRequest("1", "", "Water is", "dry", None, (), ()),))
    with pytest.raises(InputError, match="guard: got same_relation"):
        trainer.train(POSITION, replace(SETTINGS, guard="same_relation"))


def test_examples_draw_every_format_and_as_many_prefixes_as_asked(trainer):
    examples = trainer.examples(replace(SETTINGS, train_formats="raw,qa", prefix_share=0.25))
    draws = torch.Generator().manual_seed(0)
    drawn = [examples.draw(0, draws) for _ in range(800)]
    plain = examples.plain[0]
    assert len(plain) == 2 and len(examples.prefixed[0]) == 4
    share = sum(row not in plain for row in drawn) / len(drawn)
    assert share == pytest.approx(0.25, abs=0.05)
    assert drawn.count(plain[0]) / drawn.count(plain[1]) == pytest.approx(1, abs=0.25)
    assert {row for row in drawn if row not in plain} == set(examples.prefixed[0])
    target = plain[0].target_ids
    assert all(row.target_ids == target for row in examples.prefixed[0])


def test_one_format_draws_nothing(trainer, loaded, requests):
    examples = trainer.examples(SETTINGS)
    draws = torch.Generator().manual_seed(0)
    before = draws.get_state()
    assert [examples.draw(index, draws) for index in range(len(examples))] == list(trainer.rows)
    assert torch.equal(draws.get_state(), before)


def test_a_chat_format_without_a_template_is_left_out(trainer):
    assert trainer.examples(replace(SETTINGS, train_formats="raw,chat")).plain == trainer.examples(SETTINGS).plain


def test_noise_changes_training_and_needs_states(trainer):
    noisy = replace(SETTINGS, noise=0.05)
    assert same(trainer.train(POSITION, noisy), trainer.train(POSITION, noisy))
    assert not same(trainer.train(POSITION, noisy), trainer.train(POSITION, SETTINGS))
    with pytest.raises(InputError, match="noise: this model is computed as a whole"):
        trainer_of(trainer.loaded, trainer.requests).train(POSITION, noisy)


def test_shrinking_scales_the_change_as_far_as_all_edits_hold(trainer):
    settings = replace(SETTINGS, epochs=40)
    whole, shrunk = (trainer.train(POSITION, replace(settings, shrink=shrink)) for shrink in ("no", "yes"))
    (name,) = whole.delta.tensors
    scale = float(shrunk.delta.tensors[name].norm() / whole.delta.tensors[name].norm())
    assert 0.5 <= scale <= 1
    torch.testing.assert_close(shrunk.delta.tensors[name], scale * whole.delta.tensors[name])

    def learnt(delta):
        return sum(f.instead is None for f in follow(edited(trainer.loaded, delta), trainer.rows))

    assert learnt(shrunk.delta) >= learnt(whole.delta)
    if scale > 0.5:
        assert learnt(whole.delta.scaled(scale - 0.05)) < learnt(whole.delta)


def test_shrinking_loses_no_format_and_measures_what_is_left(loaded, requests):
    rows = encode_edits(loaded.tokenizer, requests)
    trainer = EditTrainer(
        loaded, requests, rows, TailEngine(loaded, rows[6:], on_disk=False)
    )  # earlier edits are not measured
    settings = replace(SETTINGS, learning_rate=5e-3, epochs=60, train_formats="raw,qa")
    position = TuningPosition(1, "mlp")
    whole, shrunk = (trainer.train(position, replace(settings, shrink=shrink)) for shrink in ("no", "yes"))
    formats = [row for form in ("raw", "qa") for row in encode_edits(loaded.tokenizer, requests, form)]

    def held(delta):
        found = follow(edited(loaded, delta), formats)
        return {row for row, following in zip(formats, found, strict=True) if following.instead is None}

    wanted, scale = held(whole.delta), shrunk.delta.norm / whole.delta.norm
    assert wanted <= held(shrunk.delta) and not wanted <= held(whole.delta.scaled(scale - 0.05)) and 0.5 < scale < 0.99
    found = mean_loss(edited(loaded, shrunk.delta), rows)
    assert shrunk.trained_loss == pytest.approx(found, rel=1e-4) != whole.trained_loss


def test_what_the_model_writes_is_kept_and_the_same_without_a_file(loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.manual_seed(123)
    drawn = torch.rand(2)
    torch.manual_seed(123)
    rows = own_rows(loaded)
    assert torch.equal(torch.rand(2), drawn), "nobody else's draws are touched"
    assert SAMPLES <= len(rows) <= MOST * SAMPLES and len({row.token_ids for row in rows}) > SAMPLES // 2
    assert sum(len(row.token_ids) for row in rows) >= SAMPLES * TOKENS
    assert own_rows(loaded) == rows
    other_end = tiny_tokenizer()
    other_end.eos_token = other_end.convert_ids_to_tokens(300)
    for changed in (turned_faster(loaded), replace(loaded, tokenizer=other_end)):
        assert changed.fingerprint == loaded.fingerprint and own_rows(changed) != rows
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setattr(loaded.model.generation_config, "repetition_penalty", 1.5)  # as many models ship
    assert own_rows(loaded) == rows
    assert all(text.endswith(".") for text in prefix_texts(loaded, rows))


@pytest.mark.parametrize("ends", ["never", "soon"])
def test_what_the_model_writes_has_no_padding_and_begins_in_many_ways(ends, loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    likely = [loaded.tokenizer.eos_token_id, *range(100, 180)] if ends == "soon" else [10**6]
    monkeypatch.setattr(background, "end_tokens", lambda loaded: likely)
    texts = [row.token_ids for row in own_rows(loaded)]
    ended = [text for text in texts if text[-1] in likely]
    assert not any(set(text[1:-1]) & set(likely) for text in texts), "nothing behind an end"
    assert all(len(text) == TOKENS for text in texts if text not in ended)
    assert len({text[0] for text in texts}) > SAMPLES // 2
    assert not {text[0] for text in texts} & set(loaded.tokenizer.all_special_ids)
    if ends == "soon":
        assert SAMPLES < len(texts) == len(ended) <= MOST * SAMPLES
    else:
        assert len(texts) == SAMPLES and not ended


def test_background_is_the_models_own_text_and_the_passages_as_long_as_it_can_read(loaded):
    rows = background_rows(loaded)
    own = own_rows(loaded)
    passages = rows[len(own) :]
    assert rows[: len(own)] == own and len(passages) == len(set(passages)) == PASSAGES
    text = (DATA_FOLDER / "passages.txt").read_text(encoding="utf-8")
    places = [text.find(loaded.tokenizer.decode(row.token_ids[1:-1]).strip()) for row in passages]
    found = [place for place in places if place >= 0]  # a window may begin or end within a character
    assert len(found) > 0.8 * PASSAGES and found == sorted(found)
    assert found[0] < 0.05 * len(text) and found[-1] > 0.9 * len(text)
    short = tiny_loaded("llama", max_position_embeddings=40)
    assert max(len(row.token_ids) for row in background_rows(short)) <= 40


def test_curvature_is_read_back_from_its_file(loaded, requests, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept, again = (trainer_of(loaded, requests).curvature(POSITION, "float32") for _ in range(2))
    assert kept.keys() == again.keys() == {"model.layers.1.mlp.down_proj.weight"}
    for name, one in kept.items():
        for part, value in one.parts.items():
            assert torch.equal(value, again[name].parts[part])


def test_the_layers_that_are_trained_here_share_passes_over_prose(loaded, requests, monkeypatch):
    trainer, asked = trainer_of(loaded, requests, (2, 0)), []
    monkeypatch.setattr(module, "measured_once", lambda *given: asked.append(given) or measured_once(*given))

    def measured(layer):
        position = TuningPosition(layer, "mlp_down")
        (name,) = trainer.curvature(position, "float32")
        _, together, here, _, (wanted,) = asked[-1]
        assert name == wanted == f"model.layers.{layer}.mlp.down_proj.weight" and here == layer
        return min(together), {*together}, len(together[layer]) > 1

    assert measured(2) == measured(0) == (0, {0, 2}, True)
    assert measured(1) == (1, {1}, True), "not known beforehand"
    monkeypatch.setattr(module, "TOGETHER_BYTES", 1)
    assert measured(2) == (2, {2}, True)
    monkeypatch.setattr(module, "CURVATURE_BYTES", 1)
    assert measured(0) == (0, {0}, False)


def test_the_curvature_of_layer_1_leaves_out_layer_10(requests, monkeypatch):
    loaded, asked = tiny_loaded("llama", layers=11), []
    monkeypatch.setattr(module, "measured_once", lambda *given: asked.append(given) or measured_once(*given))
    prose = encode_edits(loaded.tokenizer, requests)
    trainer_of(loaded, requests, prose=prose).curvature(TuningPosition(1, "mlp_down"), "float32")
    assert {name.split(".")[2] for name in asked[0][1][1]} == {"1"}
