"""Muon: orthogonal updates of AdamW's size, the same for stacked and single matrices."""

import math

import pytest
import torch

from ahriuwu_cli.config import TrainConfig
from ahriuwu_cli.models import products
from ahriuwu_cli.training import muon as muon_module
from ahriuwu_cli.training.muon import Muon, orthogonalise
from ahriuwu_cli.training.optimiser import build_optimizers, set_rate


def polynomial(x):
    for a, b, c in muon_module.QUINTICS:
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16)])
def test_singular_values_go_through_the_quintics_and_singular_vectors_stay(shape):
    g = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    u, values, vt = torch.linalg.svd(g.double(), full_matrices=False)
    values = polynomial(values / values.norm(dim=-1, keepdim=True))
    assert torch.allclose(orthogonalise(g).double(), u @ torch.diag_embed(values) @ vt, atol=1e-5)


def test_all_but_the_smallest_singular_values_come_near_one():
    x = torch.logspace(math.log10(muon_module.SMALLEST), 0, 10_000, dtype=torch.float64)
    assert polynomial(x).min() > 0.78
    assert polynomial(x).max() < 1.22


def test_each_quintic_is_the_best_on_the_interval_that_it_is_given():
    """Chebyshev: an odd quintic is the best approximation of 1 if its error reaches its bound 4 times, turn by turn."""
    low, high = muon_module.SMALLEST, 1.0
    for a, b, c in muon_module.QUINTICS:
        x = torch.linspace(low, high, 200_001, dtype=torch.float64)
        error = a * x + b * x**3 + c * x**5 - 1
        inner = [i for i in range(1, len(x) - 1) if (error[i] - error[i - 1]) * (error[i + 1] - error[i]) < 0]
        extremes = error[[0, *inner, -1]]
        assert len(extremes) == 4
        assert (extremes[1:] * extremes[:-1] < 0).all()
        assert torch.allclose(extremes.abs(), extremes.abs().max().expand(4), rtol=0.01)
        low, high = (1 - float(error.abs().max())) / 1.01, (1 + float(error.abs().max())) * 1.01


def test_rounding_to_bfloat16_leads_no_singular_value_astray():
    g = torch.randn(2, 64, 96, generator=torch.Generator().manual_seed(0))
    g[1, 1:] *= 1e-4  # one large singular value, at the very end of the interval
    x = muon_module._through_quintics((g / g.norm(dim=(-2, -1), keepdim=True)).bfloat16())
    assert torch.linalg.svdvals(x.float()).max() < 1.4


@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24)])
def test_products_in_bfloat16_give_the_same_directions_up_to_its_rounding(shape):
    g = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    exact, rounded = orthogonalise(g), orthogonalise(g, torch.bfloat16)
    assert rounded.dtype == torch.float32
    error = (rounded - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
    assert bool(((error > 1e-4) & (error < 0.03)).all()), error


@pytest.mark.parametrize(("precision", "units", "kind"), [
    ("bfloat16", True, torch.bfloat16), ("bfloat16", False, torch.float32), ("float32", True, torch.float32),
])  # fmt: skip
def test_it_multiplies_in_bfloat16_where_that_was_asked_for_and_is_faster(monkeypatch, precision, units, kind):
    monkeypatch.setattr(products, "has_bfloat16_units", lambda: units)
    used = []
    monkeypatch.setattr(muon_module, "orthogonalise", lambda g, kind: (used.append(kind), g)[1])
    model = torch.nn.Module()
    model.blocks = torch.nn.Linear(4, 4)
    muon, _ = build_optimizers(model, TrainConfig(steps=1, budget=None, precision=precision))
    model.blocks(torch.ones(4)).sum().backward()
    muon.step()
    assert used == [kind]
    assert products.library(precision).endswith("and bfloat16 units") == (kind == torch.bfloat16)


def test_muons_momentum_and_the_rate_beside_it_are_the_runs_own():
    model = torch.nn.Module()
    model.blocks = torch.nn.Linear(4, 4)
    both = build_optimizers(model, TrainConfig(steps=1, budget=None), momentum=0.7)
    set_rate(both, 0.1, beside_muon=0.25)
    muon, adamw = (optimizer.param_groups[0] for optimizer in both)
    assert (muon["momentum"], muon["lr"], adamw["lr"]) == (0.7, 0.1, 0.025)
    alone = build_optimizers(model, TrainConfig(steps=1, budget=None, optimizer="adamw"), momentum=0.7)
    set_rate(alone, 0.1, beside_muon=0.25)
    assert [group["lr"] for group in alone[0].param_groups] == [0.1]


def test_the_update_keeps_the_singular_vectors_of_the_gradient():
    g = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    inner = (orthogonalise(g[None])[0] * (u @ v)).sum() / 12
    assert inner > 0.7


def test_updates_have_an_rms_of_a_fifth_of_the_rate_like_adamw():
    for shape in ((32, 32), (32, 96), (96, 32)):
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
        Muon([p], lr=0.01).step()
        assert p.detach().square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.25)


def test_it_agrees_with_pytorchs_own_muon_up_to_how_orthogonal_the_two_are():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(24, 40)) for _ in range(2))
    mine = Muon([ours], lr=0.01)
    reference = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        ours.grad = torch.randn(24, 40)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    moved, expected = ours.detach() - 1, theirs.detach() - 1
    cosine = (moved * expected).sum() / moved.norm() / expected.norm()
    assert cosine > 0.97
    assert moved.norm().item() == pytest.approx(expected.norm().item(), rel=0.15)


def test_it_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def steps(count=20, shapes=((16, 24),), **options):
    """Parameters after some steps on the same random gradients, and their optimiser."""
    g = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = Muon(parameters, lr=0.01, **options)
    for _ in range(count):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
    return [p.detach() for p in parameters], optimizer


def test_a_momentum_in_bfloat16_takes_half_the_bytes_and_leads_to_the_same_place():
    (exact,), _ = steps()
    (rounded,), optimizer = steps(state=torch.bfloat16)
    (state,) = optimizer.state.values()
    assert state["momentum_buffer"].dtype == torch.bfloat16
    assert (rounded - exact).norm() < 0.02 * (exact - 1).norm()


def test_it_does_not_matter_how_many_matrices_are_made_orthogonal_at_once(monkeypatch):
    together, _ = steps(shapes=((16, 24),) * 5)
    monkeypatch.setattr(muon_module, "STACKED", 2 * 16 * 24)
    apart, _ = steps(shapes=((16, 24),) * 5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(together, apart, strict=True))
