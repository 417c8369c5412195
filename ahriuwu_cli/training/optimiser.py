"""Optimisers, the learning-rate schedule, and the averaged weights that are sampled from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ahriuwu_cli.errors import UserError
from ahriuwu_cli.models.products import at_best
from ahriuwu_cli.training.muon import Muon
from ahriuwu_cli.training.sharding import is_sharded, local

if TYPE_CHECKING:
    from ahriuwu_cli.config import TrainConfig
    from ahriuwu_cli.training.tokenizer_config import TokenizerTrainConfig


def build_optimizers(
    model: nn.Module, config: TrainConfig | TokenizerTrainConfig, momentum: float = 0.95
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks and AdamW for the rest, or AdamW for all, or Adafactor for all.

    Bytes of state a parameter: AdamW 8, Muon 4 (2 in bfloat16), Adafactor about 0: a row and a column of each matrix.
    momentum: Muon's.
    Adafactor's rate is relative to the size of the weights, so it wants one ten times as large.
    """
    if config.optimizer == "adafactor":
        if any(is_sharded(p) for p in model.parameters()):
            raise UserError("--optimizer adafactor is not for --parallel fsdp: choose muon or adamw, or --parallel ddp")
        return [torch.optim.Adafactor(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)]
    matrices: list[Tensor] = []
    if config.optimizer == "muon":
        matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    adamw = torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    if not matrices:
        return [adamw]
    formats = {"state": getattr(torch, config.optimizer_state), "products": at_best(config.precision)}
    return [Muon(matrices, lr=config.lr, momentum=momentum, weight_decay=config.weight_decay, **formats), adamw]


def set_rate(optimizers: list[torch.optim.Optimizer], lr: float, beside_muon: float = 1.0) -> None:
    """The learning rate of the coming step; for what AdamW trains beside Muon, `beside_muon` times that."""
    for i, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            group["lr"] = lr * (beside_muon if i else 1.0)  # Muon is the first of two


def apply(optimizers: list[torch.optim.Optimizer]) -> None:
    """One step of every optimiser, then the gradients are gone."""
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def rate(step: int, total: int | None, config: TrainConfig) -> float:
    """Share of the full learning rate at a step: linear warm-up, constant, linear decay to 0 over the last part.

    total is None while a time budget has not yet decided how many steps there will be: then there is no decay.
    """
    up = min(1.0, (step + 1) / max(config.warmup, 1))
    if total is None or not config.decay:
        return up
    return up * min(1.0, max(0.0, (total - step) / (total * config.decay)))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """average <- decay * average + (1 - decay) * model; the decay itself warms up, so early averages are not stale."""
    decay = min(decay, (1 + step) / (10 + step))
    mine, its = ([local(p) for p in m.parameters()] for m in (average, model))
    torch._foreach_lerp_(mine, its, 1 - decay)
