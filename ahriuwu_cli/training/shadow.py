"""A training step on tensors without storage: every operation runs, nothing is computed, every byte is counted.

PyTorch's FakeTensorMode gives tensors that know shape, format and device alone. The step of the training loop runs on
them as it is written, so what is counted follows the code. tau and d are real: the objective decides by their values.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from ahriuwu_cli.config import TrainConfig
from ahriuwu_cli.diffusion.objective import Denoise, shortcut_forcing_loss
from ahriuwu_cli.models.dynamics import Dynamics, DynamicsConfig
from ahriuwu_cli.training.batches import Batch
from ahriuwu_cli.training.loop import denoiser
from ahriuwu_cli.training.optimiser import apply, build_optimizers, update_average

aten = torch.ops.aten
PARTS = ("weights", "averaged", "optimizer", "gradients", "batch", "activations", "temporaries")
PHASES = ("forward", "teacher", "backward", "optimizer")
FORMULAS = {  # PyTorch's own, which leave out its attention kernel for CPUs
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


@dataclass(frozen=True)
class Trace:
    """What one step did. bytes (operations, parts): alive after every operation; flops by phase."""

    bytes: np.ndarray
    flops: dict[str, int]
    kept: int  # bytes that the forward pass leaves for the backward pass, of one micro-batch
    largest: tuple[int, str]  # the largest single temporary: bytes and the operation that made it

    @property
    def peak(self) -> dict[str, int]:
        """Bytes of every part at the operation where most are alive."""
        at = int(self.bytes.sum(1).argmax())
        return dict(zip(PARTS, map(int, self.bytes[at]), strict=True))


class Ledger(TorchDispatchMode):
    """Books every storage that an operation makes until it dies, and the FLOPs of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[str, int]] = {}  # storage -> part and bytes
        self.totals = dict.fromkeys(PARTS, 0)
        self.lines: list[tuple[int, ...]] = []
        self.flops = dict.fromkeys(PHASES, 0)
        self.phase = "optimizer"
        self.largest = (0, "none")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0  # a norm that scales an update; no branch depends on it
        if func is aten.index.Tensor:
            args = (args[0], [_places(i) for i in args[1]])
        out = func(*args, **kwargs)
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops[self.phase] += formula(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._book(leaf, str(func._overloadpacket))
        self.lines.append(tuple(self.totals.values()))
        return out

    def own(self, part: str, tensors: Iterable[Tensor | None]) -> None:
        """Book tensors, new or known, under a part."""
        for tensor in tensors:
            if tensor is not None:
                self._book(tensor, part)
                self._move(tensor.untyped_storage()._cdata, part)

    def keep(self) -> int:
        """Book all temporaries that are alive as activations: the forward pass has left them. Returns their bytes."""
        for key, (part, _) in list(self.alive.items()):
            if part == "temporaries":
                self._move(key, "activations")
        return self.totals["activations"]

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """FLOPs inside belong to this phase."""
        before, self.phase = self.phase, phase
        yield
        self.phase = before

    def _book(self, tensor: Tensor, origin: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive or not size:
            return
        self.alive[key] = ("temporaries", size)
        self.totals["temporaries"] += size
        if origin not in PARTS:
            self.largest = max(self.largest, (size, origin))
        weakref.finalize(storage, self._forget, key)

    def _move(self, key: int, part: str) -> None:
        if key in self.alive:
            before, size = self.alive[key]
            self.totals[before] -= size
            self.totals[part] += size
            self.alive[key] = (part, size)

    def _forget(self, key: int) -> None:
        part, size = self.alive.pop(key)
        self.totals[part] -= size


def trace_step(config: TrainConfig, architecture: DynamicsConfig, clips: int, frames: int, device: str) -> Trace:
    """One whole optimiser step of micro-batches of `clips` x `frames`, once the optimisers have their state."""
    fake, ledger = FakeTensorMode(allow_non_fake_inputs=True), Ledger()
    with fake, torch.device(device):
        average = Dynamics(architecture).requires_grad_(False)
        model = Dynamics(architecture).train()
        model.checkpoint_activations = config.checkpoint_activations
        optimizers = build_optimizers(model, config)
        for p in model.parameters():
            p.grad = torch.empty_like(p)
    with ledger:
        apply(optimizers)  # their state comes with the first step
    ledger.own("weights", model.state_dict().values())
    ledger.own("averaged", average.state_dict().values())
    for optimizer in optimizers:
        ledger.own("optimizer", (v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)))
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: ledger.own("gradients", [p.grad]))
    ledger.lines.clear()
    ledger.flops, ledger.largest = dict.fromkeys(PHASES, 0), (0, "none")

    micro = min(config.accumulate, 2)  # the later ones are as the second
    seen, kept = [], 0
    with ledger:
        for _ in range(micro):
            batch = _batch(config, architecture, clips, frames, fake, device)
            ledger.own("batch", (batch.z_clean, batch.noise))
            with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16"):
                loss = _loss(model, batch, config, architecture.k_max, ledger)
            kept = ledger.keep()
            with ledger.during("backward"):
                (loss / config.accumulate).backward()
            seen.append((batch, loss))
        once = {p: config.accumulate * n // micro for p, n in ledger.flops.items()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        apply(optimizers)
        update_average(average, model, config.ema, 0)
    flops = {p: once[p] or ledger.flops[p] for p in PHASES}
    lines = np.array(ledger.lines, dtype=np.float64)
    waiting = (config.accumulate - micro) * _bytes(seen[0][0])  # the loop keeps what it has seen until the step is done
    lines[:, PARTS.index("batch")] += waiting
    return Trace(lines, flops, kept, ledger.largest)


def _loss(model: Dynamics, batch: Batch, config: TrainConfig, k_max: int, ledger: Ledger) -> Tensor:
    """The loss as the training loop asks for it, with the FLOPs of the teacher's passes told apart."""

    def teacher(rows: int) -> Denoise:
        inner = denoiser(model, batch, rows)

        def told(*inputs: Tensor) -> Tensor:
            with ledger.during("teacher"):
                return inner(*inputs)

        return told

    with ledger.during("forward"):
        return shortcut_forcing_loss(
            denoiser(model, batch), batch.z_clean, batch.noise, batch.tau, batch.d, k_max=k_max, ramp=config.ramp,
            teacher=teacher, bootstrap_rows=batch.bootstrap_rows,
        ).loss  # fmt: skip


def bootstrap_rows(config: TrainConfig, clips: int) -> float:
    """Clips of a micro-batch that the teacher looks at, on average."""
    return 0.0 if config.forcing == "horizon" else config.bootstrap_share * clips


def _batch(config: TrainConfig, c: DynamicsConfig, clips: int, frames: int, fake: FakeTensorMode, device: str) -> Batch:
    """Clips without contents; shares are rounded up, so that no step has more to do."""
    rows = math.ceil(bootstrap_rows(config, clips))
    images = min(math.ceil(config.single_image_share * clips), clips - rows)
    tau, d = torch.ones(clips, frames), torch.full((clips, frames), 1 / c.k_max)
    d[:rows] = 1.0
    columns = sum(1 if kind == "discrete" else size for kind, size, _, _ in c.action_space)
    actions, known = torch.zeros(clips, frames, columns), torch.ones(clips, frames, dtype=torch.bool)
    with fake:
        z_clean, noise = (torch.empty(clips, frames, c.tokens, c.latent_dim, device=device) for _ in range(2))
    return Batch(z_clean, noise, tau, d, actions, known, rows, images, ())


def _bytes(batch: Batch) -> int:
    return sum(t.untyped_storage().nbytes() for t in (batch.z_clean, batch.noise))


def _places(index: Tensor | None) -> Tensor | None:
    """A real mask as the places where it is true: their number must be known to index by them."""
    is_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
    return index.nonzero().squeeze(1) if is_mask else index
