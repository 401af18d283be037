"""The curvature of drift against second moments, gradients and divergences computed the plain way."""

import pytest
import torch

import locft.curvature as module
from locft.curvature import measure_curvature, measured_once
from locft.measure.capability import EncodedSuite, measure_drift
from locft.model.models import LoadedModel
from locft.model.positions import TuningPosition, parameter_names
from locft.model.structure import is_input_first
from locft.train.methods.curvature import Curvature
from locft.train.reference import full_forward
from locft.train.token_rows import TokenRow
from tests.every_type import tiny_model_of
from tests.tiny import tiny_loaded, tiny_tokenizer, turned_faster

LAYER = 1
WINDOWS = [TokenRow(tuple(range(3 + start, 15 + start)), 1) for start in range(0, 60, 5)]


@pytest.fixture
def likeliest(monkeypatch):
    """Labels that need no luck: the most likely ones."""
    monkeypatch.setattr(module, "drawn_tokens", lambda logits, generator: logits.argmax(-1))


def curvature_of(*given, **options) -> dict[str, Curvature]:
    return measure_curvature(*given, **options)[0]


def layer_names(loaded) -> tuple[str, ...]:
    return parameter_names(loaded.model, TuningPosition(LAYER, "layer"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "gemma2"])
def test_factors_are_second_moments_of_output_gradients_and_of_inputs_weighted_by_them(architecture, likeliest):
    """With the gradient G'X of a window as autograd has it, the traces are no less than those of its square."""
    loaded = tiny_loaded(architecture)
    model = loaded.model
    found = curvature_of(loaded, LAYER, layer_names(loaded), WINDOWS)
    matrices = [name for name in found if name.endswith("weight") and model.get_parameter(name).dim() == 2]
    assert len(matrices) >= 4
    inputs, gradients, squared = {}, {}, {}
    hooks = []
    for name in matrices:
        owner = model.get_submodule(name.rpartition(".")[0])

        def keep(_module, given, output, name=name):
            inputs.setdefault(name, []).append(given[0].detach()[0])
            output.register_hook(lambda g: gradients.setdefault(name, []).append(g[0]))

        hooks.append(owner.register_forward_hook(keep))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for window in WINDOWS:
        logits = model(torch.tensor([window.token_ids])).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, logits.argmax(-1), reduction="sum").backward()
        for name in matrices:
            squared[name] = squared.get(name, 0.0) + float(model.get_parameter(name).grad.square().sum())
        model.zero_grad()
    for hook in hooks:
        hook.remove()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    predicted = sum(len(window.target_ids) for window in WINDOWS)
    for name in matrices:
        g = torch.cat(gradients[name])
        together = [g.T @ x for x, g in zip(inputs[name], gradients[name], strict=True)]
        of_inputs = sum(gradient.T @ gradient for gradient in together) / g.square().sum()
        weight = torch.stack([g[0].square().sum() for g in gradients[name]])
        if weight.sum() > 1e-9 * g.square().sum():
            first = sum(w * x[0] for w, x in zip(weight, inputs[name], strict=True)) / weight.sum()
            of_inputs += (1 - weight.sum() / g.square().sum()) * torch.outer(first, first)
        of_outputs = (g.T @ g) / predicted
        rows, columns = (of_inputs, of_outputs) if is_input_first(model, name) else (of_outputs, of_inputs)
        torch.testing.assert_close(found[name].rows, rows, rtol=1e-3, atol=1e-5 * float(rows.abs().max()))
        torch.testing.assert_close(found[name].columns, columns, rtol=1e-3, atol=1e-5 * float(columns.abs().max()))
        traces = float(found[name].rows.trace() * found[name].columns.trace())
        assert traces >= squared[name] / predicted * (1 - 1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "qwen3_moe", "gpt_oss", "bloom", "mamba"])
def test_of_a_single_token_every_matrix_has_the_factors_of_its_gradient(architecture, likeliest):
    """Then the gradient of a matrix is one outer product, whichever module, expert or layout the matrix is in."""
    loaded = tiny_loaded(architecture)
    model, window = loaded.model, TokenRow((5, 9), 1)
    names = layer_names(loaded)
    found = curvature_of(loaded, LAYER, names, [window])
    weights = {name: model.get_parameter(name).detach().clone().requires_grad_() for name in names}
    logits = full_forward(model, weights)([window])
    loss = torch.nn.functional.cross_entropy(logits, logits.argmax(-1), reduction="sum")
    gradients = dict(zip(names, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True))
    largest = max(float(gradient.norm()) for gradient in gradients.values() if gradient is not None)
    factored = [name for name in names if found[name].diagonal is None]
    assert factored
    for name in factored:
        gradient = gradients[name]
        if gradient is None or not gradient.any():
            continue
        for index in range(gradient.shape[0]) if gradient.dim() == 3 else [...]:
            here, rows, columns = gradient[index], found[name].rows[index], found[name].columns[index]
            input_first = is_input_first_of(here, rows)
            side, outer = (columns, here.T @ here) if input_first else (rows, here @ here.T)
            if here.norm() > 1e-4 * largest:  # with a single key, the gradient in attention is rounding
                torch.testing.assert_close(side / side.trace(), outer / outer.trace(), rtol=1e-3, atol=1e-5)


def is_input_first_of(gradient: torch.Tensor, rows: torch.Tensor) -> bool:
    """Which side holds the output's factor: that of the rows has rank one only there."""
    outer = gradient @ gradient.T
    return not torch.allclose(rows / rows.trace(), outer / outer.trace(), rtol=1e-3, atol=1e-5)


def test_what_is_in_no_product_has_the_squared_gradient_of_its_window(likeliest):
    loaded = tiny_loaded("llama")
    name = f"model.layers.{LAYER}.input_layernorm.weight"
    window = WINDOWS[0]
    found = curvature_of(loaded, LAYER, [name], [window])[name]
    weight = loaded.model.get_parameter(name).detach().clone().requires_grad_()
    logits = full_forward(loaded.model, {name: weight})([window])
    loss = torch.nn.functional.cross_entropy(logits, logits.argmax(-1), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(found.diagonal, gradient**2 / len(window.target_ids), rtol=1e-3, atol=1e-7)


def test_labels_are_drawn_from_the_models_distribution():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).repeat(20000, 1)
    drawn = module.drawn_tokens(logits, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, logits[0].softmax(-1), rtol=0, atol=0.015)


def drift_of(part, changed) -> tuple[float, float]:
    """Predicted and measured. changed: from the parameter and its curvature to a change of it."""
    loaded = tiny_loaded("llama")
    name = f"model.layers.{LAYER}.{part}.weight"
    windows = [TokenRow(tuple((7 * start + 3 * step) % 90 + 3 for step in range(24)), 1) for start in range(60)]
    found = curvature_of(loaded, LAYER, [name], windows)[name]
    base = loaded.model.get_parameter(name).detach()
    change = changed(base, found)
    suite = EncodedSuite("", {}, tuple(windows))
    measured = measure_drift(full_forward(loaded.model, {name: base + change}), full_forward(loaded.model), suite).kl
    return found.drift(change), measured


def test_predicted_drift_is_about_the_measured_one():
    """The model is small and random, so the Kronecker product is a rough picture; its scale must be right."""
    drawn = torch.Generator().manual_seed(1)
    predicted, measured = drift_of("mlp.down_proj", lambda base, _: 0.02 * torch.randn(base.shape, generator=drawn))
    assert predicted == pytest.approx(measured, rel=0.5)


def test_what_many_tokens_share_costs_as_much_as_it_does():
    """Attention averages values: what tells them apart averages out, what they share does not."""

    def shared(base, found):
        along = torch.linalg.eigh(found.columns).eigenvectors[:, -1]
        change = torch.outer(torch.randn(len(base), generator=torch.Generator().manual_seed(1)), along)
        return change * (0.1 * base.norm() / change.norm())

    predicted, measured = drift_of("self_attn.v_proj", shared)
    assert predicted == pytest.approx(measured, rel=0.5)


def test_the_same_twice_and_another_seed_draws_other_labels():
    loaded = tiny_loaded("llama")
    name = f"model.layers.{LAYER}.mlp.down_proj.weight"
    one, again, other = (curvature_of(loaded, LAYER, [name], WINDOWS, seed=seed)[name] for seed in (0, 0, 1))
    assert torch.equal(one.rows, again.rows) and torch.equal(one.columns, again.columns)
    assert not torch.equal(one.rows, other.rows) and not torch.equal(one.columns, other.columns)


def test_what_all_layers_begin_with_is_computed_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded, calls, computed = tiny_loaded("llama"), [], module._label_gradient
    monkeypatch.setattr(module, "_label_gradient", lambda *given: calls.append(1) or computed(*given))
    found = {}
    for layer in (0, LAYER):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        (found[name],) = measured_once(loaded, {layer: [name]}, layer, WINDOWS).values()
        assert len(calls) == 1, "for both layers"
    begun = None
    for layer, (name, one) in zip((0, LAYER), found.items(), strict=True):
        same, begun = measure_curvature(loaded, layer, [name], WINDOWS, begun)
        assert torch.equal(one.rows, same[name].rows) and torch.equal(one.columns, same[name].columns)
        alone = curvature_of(loaded, layer, [name], WINDOWS)[name]
        torch.testing.assert_close(one.rows, alone.rows, rtol=1e-5, atol=1e-6 * float(alone.rows.abs().max()))
        assert torch.equal(one.columns, alone.columns)


def test_a_cache_that_takes_nothing_costs_no_curvature(monkeypatch):
    loaded = tiny_loaded("llama")
    name = f"model.layers.{LAYER}.mlp.down_proj.weight"
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    found = measured_once(loaded, {LAYER: [name, *layer_names(loaded)]}, LAYER, WINDOWS, [name])
    assert found.keys() == {name} and torch.equal(
        found[name].rows, curvature_of(loaded, LAYER, [name], WINDOWS)[name].rows
    )


def test_layers_measured_together_are_as_each_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded, passes = tiny_loaded("llama"), []
    monkeypatch.setattr(
        module, "measure_curvature", lambda *given: passes.append(given[1]) or measure_curvature(*given)
    )
    names = {layer: parameter_names(loaded.model, TuningPosition(layer, "layer")) for layer in (0, 1, 2)}
    for layer, own in names.items():
        found = measured_once(loaded, names, layer, WINDOWS, own)
        alone = curvature_of(loaded, layer, own, WINDOWS)
        assert found.keys() == set(own)
        for name in own:
            for part, value in alone[name].parts.items():
                torch.testing.assert_close(
                    found[name].parts[part], value, rtol=1e-5, atol=1e-6 * float(value.abs().max())
                )
        assert measured_once(loaded, {layer: own}, layer, WINDOWS).keys() == set(own), "as one that asks for it alone"
    assert passes == [0]
    other = turned_faster(loaded)
    assert other.fingerprint == loaded.fingerprint
    found = measured_once(other, names, LAYER, WINDOWS, names[LAYER])
    expected = curvature_of(other, LAYER, names[LAYER], WINDOWS)
    assert passes == [0, 0], "another configuration of the same weights"
    for name in names[LAYER]:
        for part, value in expected[name].parts.items():
            torch.testing.assert_close(found[name].parts[part], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()))


@pytest.mark.parametrize("layer", [0, 1])
def test_a_model_without_a_tail_is_measured_whole(layer, likeliest, monkeypatch):
    loaded = tiny_loaded("llama")
    names = parameter_names(loaded.model, TuningPosition(layer, "layer"))
    expected = curvature_of(loaded, layer, names, WINDOWS)
    monkeypatch.setattr(module, "supports_tail", lambda model: "a reason")
    found = curvature_of(loaded, layer, names, WINDOWS)
    for name in names:
        assert found[name].parts.keys() == expected[name].parts.keys()
        for part, value in expected[name].parts.items():
            torch.testing.assert_close(found[name].parts[part], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize("model_type", ["zaya", "xlnet", "inkling2_text", "hy_v4"])
def test_architectures_without_a_tail_have_a_curvature(model_type):
    loaded = LoadedModel(model_type, tiny_model_of(model_type), tiny_tokenizer(), model_type)
    found = curvature_of(loaded, 1, parameter_names(loaded.model, TuningPosition(1, "layer")), WINDOWS)
    assert any(one.diagonal is None for one in found.values())
    assert all(value.isfinite().all() for one in found.values() for value in one.parts.values())
