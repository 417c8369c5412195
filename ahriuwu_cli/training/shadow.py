"""A training step on tensors without storage: every operation runs, nothing is computed, every byte is counted.

PyTorch's FakeTensorMode gives tensors that know shape, format and device alone. The step of the training loop runs on
them as it is written, so what is counted follows the code. tau and d are real: the objective decides by their values.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from ahriuwu_cli.config import TrainConfig
from ahriuwu_cli.diffusion.forcing import BEHIND_COPIES
from ahriuwu_cli.models import kernels, needs, products
from ahriuwu_cli.models.dynamics import Dynamics, Past
from ahriuwu_cli.models.dynamics_config import DynamicsConfig
from ahriuwu_cli.training.batches import Batch, Kinds
from ahriuwu_cli.training.clip_loss import ClipLoss
from ahriuwu_cli.training.muon import Muon
from ahriuwu_cli.training.optimiser import apply, build_optimizers, update_average

aten = torch.ops.aten
PARTS = ("weights", "averaged", "optimizer", "gradients", "batch", "activations", "temporaries")
PHASES = ("forward", "teacher", "backward", "optimizer")


def product_flop(x, weight, *args, out_val=None, **kwargs) -> int:
    """FLOPs of `products.product`: x (..., I), weight (O, I)."""
    return 2 * math.prod(x.shape) * weight.shape[0]


FORMULAS = {  # PyTorch's own, which leave out its attention kernel for CPUs and oneDNN's products
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
    torch.ops.mkldnn._linear_pointwise: product_flop,
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

    def __init__(self, fused: bool = False) -> None:
        """fused: attention runs in one kernel whatever PyTorch would choose here."""
        super().__init__()
        self.fused, self.fake = fused, FakeTensorMode(allow_non_fake_inputs=True)
        self.alive: dict[int, tuple[str, int]] = {}  # storage -> part and bytes
        self.born: dict[int, int] = {}  # storage -> the line it first stands in
        self.totals = dict.fromkeys(PARTS, 0)
        self.phase = "optimizer"
        self.start()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0  # a norm that scales an update; no branch depends on it
        if func is aten._fused_sdp_choice.default:
            return SDPBackend.FLASH_ATTENTION.value if self.fused else func(*args, **kwargs)
        if func is aten.index.Tensor:
            args = (args[0], [_places(i) for i in args[1]])
        from_nothing = not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
        with self.fake if from_nothing else nullcontext():
            out = func(*args, **kwargs)
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops[self.phase] += formula(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._book(leaf, str(func._overloadpacket))
        self.lines.append(list(self.totals.values()))
        return out

    def own(self, part: str, tensors: Iterable[Tensor | None]) -> None:
        """Book tensors, new or known, under a part."""
        for tensor in tensors:
            if tensor is not None:
                self._book(tensor, part)
                self._move(tensor.untyped_storage()._cdata, part)

    def keep(self) -> int:
        """Book what the forward pass has left as activations, from their birth on. Returns their bytes."""
        grown = np.zeros(len(self.lines) + 1)
        for key, (part, size) in list(self.alive.items()):
            if part == "temporaries":
                self._move(key, "activations")
                grown[self.born.get(key, 0)] += size
        for line, size in zip(self.lines, grown.cumsum(), strict=False):
            line[PARTS.index("activations")] += size
            line[PARTS.index("temporaries")] -= size
        return self.totals["activations"]

    def start(self) -> None:
        """Forget what was done so far, but not what is alive."""
        self.lines: list[list[float]] = []
        self.born.clear()
        self.flops = dict.fromkeys(PHASES, 0)
        self.largest = (0, "none")

    def trace(self, kept: int, times: float = 1) -> Trace:
        """What was done since `start`, with `times` the FLOPs."""
        flops = {phase: round(n * times) for phase, n in self.flops.items()}
        return Trace(np.array(self.lines, dtype=np.float64), flops, kept, self.largest)

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
        self.born[key] = len(self.lines)
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


class Shadow:
    """A model, its average and its optimisers without storage, as they are once the first step is done.

    All is counted on fake tensors of the CPU, so it runs anywhere. For `cuda` the formulas are those that GPUs take,
    with attention and RMSNorm in one kernel each, and PyTorch's own optimisers take all parameters at once.
    """

    def __init__(self, config: TrainConfig, architecture: DynamicsConfig, device: str) -> None:
        self.config, self.architecture, self.device = config, architecture, device
        self.ledger = Ledger(fused=device == "cuda")
        with self.ledger.fake:
            self.average = Dynamics(architecture).requires_grad_(False)
            self.model = Dynamics(architecture).train()
            self.model.let_train()
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizers = build_optimizers(self.model, config, config.muon_momentum)
            for p in trained:
                p.grad = torch.empty_like(p)
        self.loss = ClipLoss(self.model, architecture.k_max, config.ramp, walk_to=config.walk_to)
        self._start_optimizers()
        own = self.ledger.own
        own("weights", self.model.state_dict().values())
        own("averaged", self.average.state_dict().values())
        for optimizer in self.optimizers:
            own("optimizer", (v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)))
        for p in trained:
            p.register_post_accumulate_grad_hook(lambda p: own("gradients", [p.grad]))
        self.model.register_forward_pre_hook(lambda *_: self._enter())
        self.model.register_forward_hook(lambda *_: self._leave())
        self.seen: list = []

    def passes(self, clips: int, frames: int, checkpointed: bool, images: int | None = None) -> Trace:
        """Forward and backward of all micro-batches of `clips` x `frames`; their gradients stay for `update`.

        images: how many of the clips are single images (default: what needs most, see `fewest_images`).
        """
        config, ledger = self.config, self.ledger
        self.model.checkpoint_activations = checkpointed
        self.model.zero_grad()
        self.seen = []
        ledger.start()
        micro, kept = min(config.accumulate, 2), 0  # the later ones are as the second
        for _ in range(micro):
            batch = _batch(config, self.architecture, clips, frames, ledger.fake, images)
            ledger.own("batch", (batch.z_clean, batch.noise, *(batch.past or ())[:1]))
            with ledger, formulas_of(self.device):
                with ledger.during("forward"), self._autocast():
                    result = self.loss(batch)
                kept = ledger.keep()
                with ledger.during("backward"):
                    (result.loss / config.accumulate).backward()
            self.seen.append((batch, result))  # the loop keeps what it has seen until the step is done
        trace = ledger.trace(kept, config.accumulate / micro)
        trace.bytes[:, PARTS.index("batch")] *= config.accumulate / micro
        return trace

    def update(self) -> Trace:
        """The optimisers' step and the average's, after `passes`."""
        self.ledger.start()
        with self.ledger:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
            apply(self.optimizers)
            update_average(self.average, self.model, self.config.ema, 0)
        return self.ledger.trace(0)

    def _start_optimizers(self) -> None:
        """Let them make their state, which a run has from its first step on."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if "foreach" in group:
                    group["foreach"] = self.device == "cuda"
        with self.ledger:
            for optimizer in self.optimizers:
                if isinstance(optimizer, Muon):
                    for p in (p for g in optimizer.param_groups for p in g["params"]):
                        optimizer.momentum(p)
                else:
                    optimizer.step()

    def _autocast(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def _enter(self) -> None:
        if self.ledger.phase == "forward" and not torch.is_grad_enabled():
            self.ledger.phase = "teacher"

    def _leave(self) -> None:
        if self.ledger.phase == "teacher":
            self.ledger.phase = "forward"


@contextmanager
def formulas_of(device: str) -> Iterator[None]:
    """The formulas of the model as `device` runs them, whatever runs the shadow."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(needs, "refuse_beyond_machine", lambda *_: None))  # nothing is allocated
        if device == "cuda":
            stack.enter_context(patch.object(kernels, "by_hand", lambda x: False))
            stack.enter_context(patch.object(kernels, "holds_table", lambda q, k: False))
            stack.enter_context(patch.object(products, "ONEDNN", False))
            one = kernels._RMSNorm  # keeps what the kernel of GPUs keeps: the input and a number for every row
            stack.enter_context(patch.object(kernels.F, "rms_norm", lambda x, shape, w, eps: one.apply(x, w)))
        yield


def trace_step(
    config: TrainConfig, architecture: DynamicsConfig, clips: int, frames: int, device: str, images: int | None = None
) -> Trace:
    """One whole optimiser step on micro-batches of `clips` x `frames`. images: as for `Shadow.passes`."""
    shadow = Shadow(config, architecture, device)
    passes, update = shadow.passes(clips, frames, config.checkpoint_activations, images), shadow.update()
    return Trace(
        np.concatenate([passes.bytes, update.bytes]),
        {p: passes.flops[p] + update.flops[p] for p in PHASES},
        passes.kept,
        max(passes.largest, update.largest),
    )


def fewest_images(config: TrainConfig, clips: int) -> int:
    """Single images of a micro-batch, rounded down: they have less to do than video."""
    return min(math.floor(config.single_image_share * clips), clips - math.ceil(config.shortcut_share * clips))


def _batch(
    config: TrainConfig, c: DynamicsConfig, clips: int, frames: int, fake: FakeTensorMode, images: int | None = None
) -> Batch:
    """Clips without contents; bootstrapped ones are rounded up and images down, so that no step has more to do."""
    rows = math.ceil(config.shortcut_share * clips)
    images = fewest_images(config, clips) if images is None else images
    tau, d = torch.ones(clips, frames), torch.full((clips, frames), 1 / c.k_max)
    d[:rows] = 1.0
    columns = sum(1 if kind == "discrete" else size for kind, size, _, _ in c.action_space)
    actions, known = torch.zeros(clips, frames, columns), torch.ones(clips, frames, dtype=torch.bool)
    with fake:
        z_clean, noise = (torch.empty(clips, frames, c.tokens, c.latent_dim) for _ in range(2))
        past = Past(torch.empty_like(z_clean), tau, d) if config.forcing in BEHIND_COPIES else None
    kinds = Kinds(rows > 0, images < clips, images > 0)
    return Batch(z_clean, noise, tau, d, actions, known, rows, images, (), kinds, past)


def _places(index: Tensor | None) -> Tensor | None:
    """A real mask as the places where it is true: their number must be known to index by them."""
    is_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
    return index.nonzero().squeeze(1) if is_mask else index
