"""The methods that hold drift back, held to their formulas: a price on it, and steps that cost the least of it."""

from dataclasses import replace

import pytest
import torch

from locft.train.methods import MethodSettings, Parameter, make_method
from locft.train.methods.curvature import Curvature
from locft.train.methods.low_curvature import LEARNT
from locft.train.methods.natural_gradient import DAMPING, MOST_DRIFT

SETTINGS = MethodSettings(method="low_curvature", learning_rate=1e-2)
NATURAL = MethodSettings(method="natural_gradient")


def spd(size: int, seed: int, experts: tuple[int, ...] = ()) -> torch.Tensor:
    root = torch.randn(*experts, size, size + 2, generator=torch.Generator().manual_seed(seed))
    return root @ root.mT / size


@pytest.fixture(params=["matrix", "experts", "diagonal"])
def case(request):
    """A parameter's base and curvature."""
    draw = torch.Generator().manual_seed(5)
    if request.param == "matrix":
        return torch.randn(4, 6, generator=draw), Curvature(spd(4, 1), spd(6, 2))
    if request.param == "experts":
        return torch.randn(3, 4, 6, generator=draw), Curvature(spd(4, 1, (3,)), spd(6, 2, (3,)))
    return torch.randn(7, generator=draw), Curvature(diagonal=torch.rand(7, generator=draw))


def trained(base, curvature, settings, steps=30, target=1.0, loss=LEARNT):
    """The change that a quadratic loss, at its least where every weight has moved by `target`, brings about."""
    method = make_method({"w": Parameter(base)}, settings, {"w": curvature}, steps)
    for _ in range(steps):
        method.step([(method.weights["w"].detach() - base - target) / base.numel()], loss)
    return method.change()["w"]


@pytest.mark.parametrize("settings", [SETTINGS, NATURAL], ids=lambda settings: settings.method)
@pytest.mark.parametrize("loss", [0.01, 0.1, 3.0])
def test_a_loss_that_nobody_waits_for_counts_the_same(case, loss, settings):
    base, curvature = case
    waiting, ahead = (trained(base, curvature, settings, 5, loss=one) for one in (loss, torch.tensor(loss).double()))
    torch.testing.assert_close(ahead, waiting, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [SETTINGS, NATURAL], ids=lambda settings: settings.method)
@pytest.mark.parametrize("loss", [0.01, 3.0, float("nan")])
def test_a_step_that_is_left_out_does_nothing(case, loss, settings):
    base, curvature = case
    method = make_method({"w": Parameter(base)}, settings, {"w": curvature}, 3)
    assert method.needs_no_number
    method.step([torch.ones_like(base)], 1.0)
    before = {name: value.clone() for name, value in method.state().items()}
    method.optimiser.found_inf = torch.ones(())
    method.step([torch.ones_like(base)], torch.tensor(loss))
    assert all(torch.equal(value, before[name]) for name, value in method.state().items())


def drift_by_sum(curvature: Curvature, change: torch.Tensor) -> float:
    """1/2 sum of R_ij K_kl C_ik C_jl, index by index."""
    if curvature.diagonal is not None:
        return 0.5 * float((curvature.diagonal * change**2).sum())
    return 0.5 * float(torch.einsum("...ij,...kl,...ik,...jl->", curvature.rows, curvature.columns, change, change))


def test_predicted_drift_and_its_gradient(case):
    base, curvature = case
    change = torch.randn(base.shape, generator=torch.Generator().manual_seed(9), requires_grad=True)
    assert curvature.drift(change.detach()) == pytest.approx(drift_by_sum(curvature, change.detach()), rel=1e-5)
    price = (curvature.gradient(change) * change).sum() / 2
    (gradient,) = torch.autograd.grad(price, change)
    torch.testing.assert_close(curvature.gradient(change.detach()), gradient, rtol=1e-4, atol=1e-5)


def test_one_after_the_other_is_one(case):
    base, curvature = case
    inverse = curvature.inverse(0.3)
    change = torch.randn(base.shape, generator=torch.Generator().manual_seed(7))
    one_by_one = inverse.gradient(curvature.gradient(change))
    assert torch.allclose(curvature.then(inverse).gradient(change), one_by_one, rtol=1e-4, atol=1e-5)


def test_without_a_price_it_is_plain_fine_tuning(case):
    base, curvature = case
    plain = trained(base, curvature, replace(SETTINGS, method="full"))
    assert torch.equal(trained(base, curvature, replace(SETTINGS, curvature_strength=0.0)), plain)


@pytest.mark.parametrize("settings", [SETTINGS, NATURAL], ids=lambda settings: settings.method)
def test_a_price_leaves_less_drift_the_higher_it_is(case, settings):
    base, curvature = case
    changes = [
        trained(base, curvature, replace(settings, curvature_strength=strength), steps=300)
        for strength in (0.0, 0.1, 1.0)
    ]
    drifts = [curvature.drift(change) for change in changes]
    assert drifts[0] > drifts[1] > drifts[2] > 0


@pytest.mark.parametrize("settings", [SETTINGS, NATURAL], ids=lambda settings: settings.method)
def test_at_the_end_the_price_balances_the_loss(settings):
    """The least of |C - 1|^2 / 2n + strength x drift solves a linear system."""
    curvature = Curvature(spd(4, 1), spd(6, 2))
    settings = replace(settings, curvature_strength=0.3, learning_rate=3e-3)
    found = trained(torch.zeros(4, 6), curvature, settings, steps=4000)
    system = torch.eye(24) / 24 + 0.3 * torch.kron(curvature.rows, curvature.columns)
    expected = torch.linalg.solve(system, torch.ones(24) / 24).reshape(4, 6)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=5e-3)


def test_what_is_not_learnt_lowers_the_price_in_proportion(case):
    base, curvature = case
    settings = replace(SETTINGS, curvature_strength=1.0)
    dear, cheap = trained(base, curvature, settings, loss=5 * LEARNT), replace(settings, curvature_strength=0.2)
    torch.testing.assert_close(dear, trained(base, curvature, cheap), rtol=1e-4, atol=1e-5)
    assert torch.equal(trained(base, curvature, settings, loss=0.0), trained(base, curvature, settings))


def test_damping_adds_to_every_direction_and_stands_in_for_experts_never_reached():
    rows = torch.stack([spd(4, 1), torch.zeros(4, 4)])
    columns = torch.stack([spd(6, 2), torch.zeros(6, 6)])
    damped = Curvature(rows, columns).damped(0.1)
    usual = rows[0].diagonal().sort().values[1]
    torch.testing.assert_close(damped.rows[0], rows[0] + 0.1 * usual * torch.eye(4))
    torch.testing.assert_close(damped.rows[1], 0.1 * usual * torch.eye(4))
    assert Curvature(diagonal=torch.tensor([0.0, 2.0])).damped(0.1).diagonal.tolist() == pytest.approx([0.2, 2.2])
    assert Curvature(diagonal=torch.zeros(2)).damped(0.1).diagonal.gt(0).all()


def test_a_few_huge_channels_do_not_decide_the_damping():
    rows, columns = spd(4, 1), spd(7, 2)
    huge = columns.clone()
    huge[0, 0] += 1e6
    plain, damped = (Curvature(rows, one).damped(0.1).columns - one for one in (columns, huge))
    assert damped[1, 1] < 3 * plain[1, 1]


def test_bfloat16_products_price_nearly_the_same():
    base, curvature = torch.zeros(4, 6), Curvature(spd(4, 1), spd(6, 2))
    fine, coarse = (
        trained(base, curvature, replace(SETTINGS, curvature_strength=1.0, precision=precision), steps=300)
        for precision in ("float32", "bfloat16")
    )
    assert (fine - coarse).norm() < 0.02 * fine.norm()


def first_step(base, curvature, gradient, loss, beside=0.0, precision="float32"):
    """The change of the first step of a training by natural gradients."""
    method = make_method({"w": Parameter(base)}, replace(NATURAL, precision=precision), {"w": curvature}, 1)
    method.step([gradient.clone()], loss, beside)
    return method.change()["w"]


def test_a_step_lowers_the_forecast_for_the_least_drift(case):
    """Of all changes C with <g, C> = -loss, the one of the least drift, solved as a linear system with a multiplier."""
    base, curvature = case
    gradient = 100 * torch.randn(base.shape, generator=torch.Generator().manual_seed(3))
    still = torch.zeros_like(base)  # a base of about 1 would round the change off
    found = first_step(still, curvature, gradient, 0.35, beside=0.07).double().flatten()
    damped = Curvature(**{name: part.double() for name, part in curvature.parts.items()}).damped(DAMPING)
    if damped.diagonal is not None:
        hessian = torch.diag(damped.diagonal)
    elif base.dim() == 3:
        hessian = torch.block_diag(*map(torch.kron, damped.rows, damped.columns))
    else:
        hessian = torch.kron(damped.rows, damped.columns)
    slope = gradient.flatten().double()
    system = torch.cat([torch.cat([hessian, slope[:, None]], 1), torch.cat([slope, torch.zeros(1)])[None]])
    wanted = torch.zeros(len(system), dtype=torch.double)
    wanted[-1] = -0.42
    torch.testing.assert_close(found, torch.linalg.solve(system, wanted)[:-1], rtol=1e-3, atol=1e-7)
    assert float(slope @ found) == pytest.approx(-0.42, rel=1e-4)


def test_a_step_whose_loss_hardly_depends_on_the_weights_is_bounded(case):
    base, curvature = case
    gradient = 1e-3 * torch.randn(base.shape, generator=torch.Generator().manual_seed(3))
    change = first_step(base, curvature, gradient, 5.0)
    assert curvature.damped(DAMPING).drift(change) == pytest.approx(NATURAL.batch_size * MOST_DRIFT, rel=1e-3)
    assert not first_step(base, curvature, torch.zeros_like(base), 5.0).any()


def test_many_parameters_share_one_step(case):
    """Two halves of a matrix are stepped as by one forecast: their drifts add up."""
    base, curvature = case
    draw = torch.Generator().manual_seed(3)
    gradients = [100 * torch.randn(base.shape, generator=draw) for _ in range(2)]
    method = make_method({"a": Parameter(base), "b": Parameter(base)}, NATURAL, {"a": curvature, "b": curvature}, 1)
    method.step([gradient.clone() for gradient in gradients], 1.0)
    forecast = sum(float((g * c).sum()) for g, c in zip(gradients, method.change().values(), strict=True))
    assert forecast == pytest.approx(-1, rel=1e-4)


def test_steps_end_where_the_loss_is_zero():
    """A quadratic loss whose least is 0 is driven there, whatever its scale, without a rate."""
    base, curvature = torch.zeros(4, 6), Curvature(spd(4, 1), spd(6, 2))
    target = 0.05 * torch.randn(4, 6, generator=torch.Generator().manual_seed(7))
    for scale in (1.0, 1000.0):
        free = replace(NATURAL, curvature_strength=0.0)
        method = make_method({"w": Parameter(base)}, free, {"w": curvature}, 1)
        for _ in range(300):
            away = method.weights["w"].detach() - target
            method.step([2 * scale * away], scale * float((away**2).sum()))
        assert (method.change()["w"] - target).norm() < 0.01 * target.norm()


def test_bfloat16_factors_turn_nearly_the_same(case):
    base, curvature = case
    gradient = 100 * torch.randn(base.shape, generator=torch.Generator().manual_seed(3))
    fine, coarse = (first_step(base, curvature, gradient, 0.5, precision=one) for one in ("float32", "bfloat16"))
    assert (fine - coarse).norm() < 0.03 * fine.norm()


@pytest.mark.parametrize(
    "reached",
    [Curvature(torch.zeros(4, 4), torch.zeros(6, 6)), Curvature(diagonal=torch.zeros(4, 6))],
    ids=["matrix", "diagonal"],
)
def test_what_prose_never_reached_is_stepped_as_any_other(reached):
    """The forecast still falls by its share; nothing becomes infinite, and what has no gradient stays."""
    gradient = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    for precision in ("float32", "bfloat16"):
        change = first_step(torch.zeros(4, 6), reached, gradient, 0.5, precision=precision)
        assert float((gradient * change).sum()) == pytest.approx(-0.5, rel=0.02)
        assert not first_step(torch.zeros(4, 6), reached, torch.zeros(4, 6), 0.5, precision=precision).any()
