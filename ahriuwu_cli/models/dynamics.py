"""The dynamics: a block-causal transformer that predicts z_clean of every frame from z_tau, tau, d and actions.

Dreamer 4 (arXiv 2509.24527), sections 3.2 and 3.4. `forward` sees whole clips; `extend` adds frames to a
`ContextCache`. Both give the same numbers: a frame sees itself and the window - 1 frames before it.

    z_tau (B, T, N, D), tau and d (B, T), actions (B, T, A), known (B, T)  ->  z_hat (B, T, N, D)

`actions` are *incoming*: row t is the action that led to frame t. `incoming_actions` makes them from a clip's own
(B, T-1, A), where actions[t] takes frame t to frame t + 1. Frames with known = False get a learned embedding instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ahriuwu_cli.diffusion import tau as tau_
from ahriuwu_cli.models import needs
from ahriuwu_cli.models.block import Block, TimeContext, time_tables
from ahriuwu_cli.models.cache import ContextCache, Held
from ahriuwu_cli.models.conditioning import ActionEmbedding, LevelEmbedding
from ahriuwu_cli.models.dynamics_config import DynamicsConfig
from ahriuwu_cli.models.kernels import Tables
from ahriuwu_cli.models.layers import RMSNorm, as_bias, window_mask
from ahriuwu_cli.models.products import Linear, constant_weights


class Past(NamedTuple):
    """Frames that a rollout has committed: z (B, T, N, D) at the levels tau and d (B, T) of committed frames."""

    z: Tensor
    tau: Tensor
    d: Tensor


class Dynamics(nn.Module):
    """See the module's first lines. Raises ValueError for a config that cannot be built."""

    def __init__(self, config: DynamicsConfig) -> None:
        super().__init__()
        self.config = config
        self.compiled_pass: Callable[..., Tensor] | None = None  # of `compile_passes`
        self.checkpoint_activations = False  # keep each block's input alone; its backward pass computes the rest again
        c = config
        self.embed = Linear(c.latent_dim, c.width)
        self.places = nn.Parameter(torch.randn(c.tokens, c.width) * 0.5)  # a position in space for every latent token
        self.registers = nn.Parameter(torch.randn(c.registers, c.width) * 0.5)
        self.level = LevelEmbedding(c.k_max, c.width)
        self.action = ActionEmbedding(c.action_space, c.width)
        self.blocks = nn.ModuleList(Block(c, i % c.time_every == 0) for i in range(c.depth))
        self.final_norm = RMSNorm(c.width)
        self.head = Linear(c.width, c.latent_dim)
        self.channel_scale = nn.Parameter(torch.ones(c.latent_dim))  # spread of z_clean by channel, for linear_skip
        self._initialise()

    def _initialise(self) -> None:
        residual = (2 * self.config.depth) ** -0.5
        for block in self.blocks:
            for linear in (block.attention.out, block.mlp.down):
                linear.weight.data.mul_(residual)
            if block.modulation is not None:
                nn.init.normal_(block.modulation.weight, std=0.02)
                nn.init.zeros_(block.modulation.bias)
        self.head.weight.data.mul_(0.1)
        nn.init.zeros_(self.head.bias)

    def let_train(self) -> None:
        """Ask for the gradient of every weight that has a say. DDP would wait for ever for that of another one."""
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.numel() > 0)
        self.channel_scale.requires_grad_(self.config.linear_skip)

    def compile_blocks(self) -> None:
        """torch.compile every block in place. Blocks of one kind share code: it starts sooner than the whole would.

        Every shape gets a graph of its own, so that a step's numbers do not depend on the shapes before it: a graph for
        all shapes is made for those that were seen first, and beyond a limit of graphs a block would not be compiled.
        """
        _compile_every_shape()
        for block in self.blocks:
            block.compile(dynamic=False)

    def compile_passes(self) -> None:
        """torch.compile the passes of a rollout, each as one graph: slow start, faster frames, for fixed weights.

        On a CPU the weights become constants of the graph, packed as its products like them best: change none
        afterwards, it would not be noticed. On a GPU the passes are asked to become CUDA graphs; torch 2.13 makes none
        of those that write the cache, whose keys and values are inputs that change, and runs them as kernels.
        """
        _compile_every_shape()
        if self.embed.weight.device.type != "cpu":
            self.compiled_pass = torch.compile(self._pass, dynamic=False, options={"triton.cudagraphs": True})
            return
        compiled = torch.compile(self._pass, dynamic=False)

        def constant(z_tau: Tensor, *inputs: object) -> Tensor:
            rows = z_tau.shape[0] * z_tau.shape[1] * self.config.sequence
            with constant_weights(rows * self.config.width**2):
                return compiled(z_tau, *inputs)

        self.compiled_pass = constant

    def multiply_in(self, kind: torch.dtype) -> None:
        """Keep the weights of products in a 16-bit format, for rollouts and evaluation: they cannot be trained then.

        On a CPU all else stays in float32: sums, norms, attention, the cache. A GPU's attention kernels want 16 bits,
        so there all is in that format but the spread of the latents, and the ranges of actions, whose ends it would
        move and may join. Latents come and go in float32 either way.
        """
        spread, ranges = self.channel_scale.data, dict(self.named_buffers())
        on_cpu = self.embed.weight.device.type == "cpu"
        for module in [m for m in self.modules() if isinstance(m, Linear)] if on_cpu else [self]:
            module.to(kind)
        self.channel_scale.data = spread
        for name, buffer in ranges.items():
            self.get_buffer(name).data = buffer

    @property
    def time_layers(self) -> int:
        return sum(block.over_time for block in self.blocks)

    @property
    def last_time_layer(self) -> int:
        return max(i for i, block in enumerate(self.blocks) if block.over_time)

    def forward(
        self, z_tau: Tensor, tau: Tensor, d: Tensor, actions: Tensor, known: Tensor, past: Past | None = None
    ) -> Tensor:
        """z_hat (B, T, N, D) for whole clips, causal in time, each frame within its window.

        past: the same clips as a rollout has them behind the frame that it denoises. Then a frame of z_tau sees itself
        and the frames before it in `past`, as in `extend`, and no other frame of z_tau.
        """
        c, device, frames, unread = self.config, z_tau.device, z_tau.shape[1], 0
        positions = torch.arange(frames, device=device)
        mask = window_mask(frames, c.window, device)
        if past is not None:
            unread, itself = frames, torch.eye(frames, dtype=torch.bool, device=device)
            mask = torch.cat([torch.cat([mask, mask & ~itself]), torch.cat([torch.zeros_like(mask), itself])], dim=1)
            z_tau, tau, d = (torch.cat(pair, dim=1) for pair in ((past.z, z_tau), (past.tau, tau), (past.d, d)))
            actions, known, positions = actions.repeat(1, 2, 1), known.repeat(1, 2), positions.repeat(2)
        each = c.sequence // c.lines  # tokens of a frame in one line
        mask = mask.repeat_interleave(each, 0).repeat_interleave(each, 1)
        time = TimeContext(c, time_tables(c, positions), as_bias(mask))
        return self._run(z_tau, tau, d, actions, known, time, unread)

    def new_cache(self, batch: int) -> ContextCache:
        """An empty context window for `batch` rollouts on this model's device, in the format of its activations.

        MemoryError where they need more than the machine has.
        """
        c = self.config
        needs.refuse_beyond_machine(needs.to_roll_out(c, batch), self.places.device)
        shape = (batch, c.lines * c.kv_heads, c.sequence // c.lines, c.width // c.heads)
        device, kind = self.places.device, self.places.dtype
        if device.type != "cpu" and torch.is_autocast_enabled(device.type):
            kind = torch.get_autocast_dtype(device.type)
        like = torch.empty(0, device=device, dtype=kind)  # never a shard, as the places may be
        return ContextCache(c.window, self.time_layers, shape, partial(time_tables, c), like)

    def extend(
        self,
        z_tau: Tensor,
        tau: Tensor,
        d: Tensor,
        actions: Tensor,
        known: Tensor,
        cache: ContextCache,
        keep: int,
        unread: int = 0,
    ) -> Tensor:
        """z_hat of the next F frames after the cache; the first `keep` of them are committed to it, at their own level.

        F - keep is 0 or 1: the frame that is being denoised rides behind the one that is being committed. More than
        one frame can be committed at once only while the window is not yet full. The first `unread` frames' own z_hat
        is not asked for: it is left out of the result, and so is what only it would need.
        """
        count = z_tau.shape[1]
        assert keep <= 1 or cache.frames + keep <= cache.window, (keep, cache.frames, cache.window)
        assert unread < count, (unread, count)
        most = needs.in_parts(needs.of_a_frame(self.config, len(z_tau)))
        if keep == count > most and not unread:  # a long prompt: its frames need not go through together
            parts = zip(*(x.split(most, dim=1) for x in (z_tau, tau, d, actions, known)), strict=True)
            return torch.cat([self.extend(*part, cache, keep=part[0].shape[1]) for part in parts], dim=1)
        places, bias = cache.look(count, keep)
        one_more = count == 1 + keep and keep <= 1  # a frame that is denoised, with or without the last one's commit
        run = self._pass if self.compiled_pass is None or not one_more else self.compiled_pass
        held = (cache.keys, cache.values, places)
        z_hat = run(z_tau, tau, d, actions, known, cache.tables(count), bias, held, unread)
        cache.frames += keep
        return z_hat

    def _pass(
        self,
        z_tau: Tensor,
        tau: Tensor,
        d: Tensor,
        actions: Tensor,
        known: Tensor,
        rotary: Tables,
        bias: Tensor,
        held: Held,
        unread: int,
    ) -> Tensor:
        """One pass of `extend`, as a function of tensors alone; keys and values of `held` are written to."""
        return self._run(z_tau, tau, d, actions, known, TimeContext(self.config, rotary, bias, held), unread)

    def _run(
        self,
        z_tau: Tensor,
        tau: Tensor,
        d: Tensor,
        actions: Tensor,
        known: Tensor,
        time: TimeContext,
        unread: int = 0,
    ) -> Tensor:
        c = self.config
        level, action = self.level(tau, d), self.action(actions, known)  # (B, T, C) each
        condition = level + action
        x = self.embed(z_tau.to(self.places.dtype)) + self.places  # (B, T, N, C)
        if c.conditioning == "add":
            x = x + condition[:, :, None]
        batch, frames = tau.shape
        extra = [self.registers.expand(batch, frames, -1, -1)] if c.registers else []
        if c.conditioning == "token":
            extra += [level[:, :, None], action[:, :, None]]
        if extra:
            x = torch.cat([x, *extra], dim=2)  # (B, T, S, C)
        last = len(self.blocks) - 1
        again = self.checkpoint_activations and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            asked = None
            if unread and i == self.last_time_layer:  # no later layer looks at another frame
                asked = slice(unread, None)
            elif i == last and extra and not block.over_time:  # and none after the last at another token
                asked = slice(c.tokens)
            inputs = (x, condition, time, asked)
            x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False) if again else block(*inputs)
            if unread and i == self.last_time_layer:
                condition, tau, z_tau = condition[:, unread:], tau[:, unread:], z_tau[:, unread:]
        z_hat = self.head(self.final_norm(x[:, :, : c.tokens])).to(z_tau.dtype)
        start = tau_.gaussian_gain(tau[..., None, None], self.channel_scale) * z_tau if c.linear_skip else None
        if c.predicts == "v":  # the head gives a velocity, beyond the one that leads to the start
            return tau_.clean_from_velocity(z_tau if start is None else start, z_hat, tau)
        return z_hat if start is None else start + z_hat


def _compile_every_shape() -> None:
    """Lift torch's limit of graphs, beyond which it leaves a function as it is: a run has few shapes."""
    from torch._dynamo import config as dynamo

    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 1 << 16


def incoming_actions(actions: Tensor, labelled: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T-1, A) actions and (B,) labelled -> incoming (B, T, A) and known (B, T).

    actions[t] takes frame t to t + 1, so frame t gets actions[t - 1]; what led to frame 0 is not known.
    """
    incoming = F.pad(actions, (0, 0, 1, 0))
    known = labelled[:, None].expand(-1, incoming.shape[1]).clone()
    known[:, 0] = False
    return incoming, known


def count_parameters(module: nn.Module) -> int:
    """Trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
