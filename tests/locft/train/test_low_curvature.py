"""The price on drift and the directions that are frozen, held to their formulas."""

from dataclasses import replace

import pytest
import torch

from locft.train.methods import MethodSettings, Parameter, make_method
from locft.train.methods.curvature import Curvature
from locft.train.methods.low_curvature import LEARNT

SETTINGS = MethodSettings(method="low_curvature", learning_rate=1e-2)


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


@pytest.mark.parametrize("loss", [0.01, 0.1, 3.0])
def test_a_loss_that_nobody_waits_for_counts_the_same(case, loss):
    base, curvature = case
    waiting, ahead = (trained(base, curvature, SETTINGS, loss=one) for one in (loss, torch.tensor(loss).double()))
    torch.testing.assert_close(ahead, waiting, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [0.01, 3.0, float("nan")])
def test_a_step_that_adam_leaves_out_does_nothing(case, loss):
    base, curvature = case
    method = make_method({"w": Parameter(base)}, SETTINGS, {"w": curvature}, 3)
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


def test_the_basis_is_orthogonal_and_diagonal(case):
    base, curvature = case
    change = torch.randn(base.shape, generator=torch.Generator().manual_seed(9))
    basis = curvature.eigenbasis()
    found = basis.coordinates(change)
    torch.testing.assert_close(basis.change(found), change, rtol=1e-4, atol=1e-5)
    assert 0.5 * float((basis.curvature * found**2).sum()) == pytest.approx(curvature.drift(change), rel=1e-4)


def test_without_a_price_it_is_plain_fine_tuning(case):
    base, curvature = case
    plain = trained(base, curvature, replace(SETTINGS, method="full"))
    assert torch.equal(trained(base, curvature, replace(SETTINGS, curvature_strength=0.0)), plain)


@pytest.mark.parametrize("basis", ["weights", "curvature"])
def test_a_price_leaves_less_drift_the_higher_it_is(case, basis):
    base, curvature = case
    changes = [
        trained(base, curvature, replace(SETTINGS, adam_basis=basis, curvature_strength=strength), steps=300)
        for strength in (0.0, 0.1, 1.0)
    ]
    drifts = [curvature.drift(change) for change in changes]
    assert drifts[0] > drifts[1] > drifts[2] > 0


@pytest.mark.parametrize("basis", ["weights", "curvature"])
def test_at_the_end_the_price_balances_the_loss(basis):
    """The least of |C - 1|^2 / 2n + strength x drift solves a linear system."""
    curvature = Curvature(spd(4, 1), spd(6, 2))
    settings = replace(SETTINGS, adam_basis=basis, curvature_strength=0.3, learning_rate=3e-3)
    found = trained(torch.zeros(4, 6), curvature, settings, steps=4000)
    system = torch.eye(24) / 24 + 0.3 * torch.kron(curvature.rows, curvature.columns)
    expected = torch.linalg.solve(system, torch.ones(24) / 24).reshape(4, 6)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=5e-3)


@pytest.mark.parametrize("basis", ["weights", "curvature"])
def test_frozen_directions_do_not_change_at_all(case, basis):
    base, curvature = case
    settings = replace(SETTINGS, adam_basis=basis, curvature_strength=0.0, curvature_share=0.6)
    change = trained(base, curvature, settings)
    directions = curvature.eigenbasis()
    frozen = directions.steepest(0.6)
    held = directions.curvature[frozen].sum() / directions.curvature.sum()
    least = directions.curvature[frozen].min()
    assert 0.6 <= held <= 1 and frozen.any() and not frozen.all()
    assert held - least / directions.curvature.sum() < 0.6, "no more than are needed"
    found = directions.coordinates(change)
    assert found[frozen].abs().max() < 1e-5 < found[~frozen].abs().max()


@pytest.mark.parametrize("basis", ["weights", "curvature"])
def test_what_is_not_learnt_lowers_the_price_in_proportion(case, basis):
    base, curvature = case
    settings = replace(SETTINGS, adam_basis=basis, curvature_strength=1.0)
    dear, cheap = trained(base, curvature, settings, loss=5 * LEARNT), replace(settings, curvature_strength=0.2)
    torch.testing.assert_close(dear, trained(base, curvature, cheap), rtol=1e-4, atol=1e-5)
    assert torch.equal(trained(base, curvature, settings, loss=0.0), trained(base, curvature, settings))


def test_damping_adds_to_every_direction_and_stands_in_for_experts_never_reached():
    rows = torch.stack([spd(4, 1), torch.zeros(4, 4)])
    columns = torch.stack([spd(6, 2), torch.zeros(6, 6)])
    damped = Curvature(rows, columns).damped(0.1)
    mean = rows[0].diagonal().mean()
    torch.testing.assert_close(damped.rows[0], rows[0] + 0.1 * mean * torch.eye(4))
    torch.testing.assert_close(damped.rows[1], 0.1 * mean / 2 * torch.eye(4))
    assert Curvature(diagonal=torch.tensor([0.0, 2.0])).damped(0.1).diagonal.tolist() == pytest.approx([0.1, 2.1])


def test_bfloat16_products_price_nearly_the_same():
    base, curvature = torch.zeros(4, 6), Curvature(spd(4, 1), spd(6, 2))
    fine, coarse = (
        trained(base, curvature, replace(SETTINGS, curvature_strength=1.0, precision=precision), steps=300)
        for precision in ("float32", "bfloat16")
    )
    assert (fine - coarse).norm() < 0.02 * fine.norm()
