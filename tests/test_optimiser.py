"""AdamW, weight decay and the averaged weights by their formulas, one parameter at a time."""

import pytest
import torch

from ahriuwu_cli.config import TrainConfig
from ahriuwu_cli.training.optimiser import apply, build_optimizers, set_rate, update_average

LR = 0.01


def model():
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.blocks, model.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    return model


def steps(optimizer, gradients, weight_decay):
    """The parameters before, and after a step along each of these multiples of one random gradient."""
    it = model()
    config = TrainConfig(steps=1, budget=None, optimizer=optimizer, lr=LR, weight_decay=weight_decay)
    optimizers = build_optimizers(it, config)
    before = [p.detach().clone() for p in it.parameters()]
    one = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for p in it.parameters()]
    for factor in gradients:
        for p, g in zip(it.parameters(), one, strict=True):
            p.grad = factor * g
        set_rate(optimizers, LR)
        apply(optimizers)
    return before, one, [p.detach() for p in it.parameters()]


def test_adamw_is_that_of_its_paper_with_betas_of_9_and_95_hundredths():
    """Loshchilov & Hutter (2019), algorithm 2: m, v, both corrected for their start, and decay apart from them."""
    gradients, decay = (1.0, -0.3, 2.0, 0.1), 0.2
    for p, g, found in zip(*steps("adamw", gradients, decay), strict=True):
        m, v = torch.zeros_like(p), torch.zeros_like(p)
        for t, factor in enumerate(gradients, 1):
            m, v = 0.9 * m + 0.1 * factor * g, 0.95 * v + 0.05 * (factor * g) ** 2
            p = p - LR * ((m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8) + decay * p)
        assert torch.allclose(found, p, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 2.5])
@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adafactor"])
def test_without_gradients_weights_shrink_by_rate_times_weight_decay_a_step(optimizer, decay):
    before, _, after = steps(optimizer, (0.0,) * 3, decay)
    for p, found in zip(before, after, strict=True):
        assert torch.allclose(found, p * (1 - LR * decay) ** 3, atol=1e-7)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.98])
def test_the_average_is_that_of_its_decay_which_warms_up(decay):
    """From the start on (1 + step) / (10 + step) of it stays, and never more than `decay`."""
    average, it = model(), model()
    expected = average.head.weight.detach().clone()
    for step in range(30):
        torch.nn.init.normal_(it.head.weight)
        stays = min(decay, (1 + step) / (10 + step))
        expected = stays * expected + (1 - stays) * it.head.weight.detach()
        update_average(average, it, decay, step)
    assert torch.allclose(average.head.weight, expected, atol=1e-6)
