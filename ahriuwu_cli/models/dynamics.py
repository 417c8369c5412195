"""The dynamics: a block-causal transformer that predicts z_clean of every frame from z_tau, tau, d and actions.

Dreamer 4 (arXiv 2509.24527), sections 3.2 and 3.4. `forward` sees whole clips; `extend` adds frames to a
`ContextCache`. Both give the same numbers: a frame sees itself and the window - 1 frames before it.

    z_tau (B, T, N, D), tau and d (B, T), actions (B, T, A), known (B, T)  ->  z_hat (B, T, N, D)

`actions` are *incoming*: row t is the action that led to frame t. `incoming_actions` makes them from a clip's own
(B, T-1, A), where actions[t] takes frame t to frame t + 1. Frames with known = False get a learned embedding instead.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ahriuwu_cli.diffusion import tau as tau_
from ahriuwu_cli.models.cache import ContextCache
from ahriuwu_cli.models.conditioning import ActionEmbedding, LevelEmbedding
from ahriuwu_cli.models.layers import Attention, SwiGLU, rotary, rotate, window_mask

CONDITIONINGS = ("add", "token", "modulate")
TIME_ATTENTIONS = ("place", "frame")


@dataclass(frozen=True)
class DynamicsConfig:
    """Architecture of the dynamics. Everything here is stored in the checkpoint and read back strictly."""

    tokens: int = 16  # N, latent tokens of a frame
    latent_dim: int = 64  # D, channels of a latent token
    width: int = 128
    depth: int = 4
    heads: int = 4
    kv_heads: int = 4
    mlp_hidden: int = 256
    time_every: int = 2  # every time_every-th layer, the first one included, attends over time, the others over space
    time_attention: str = "place"  # a token looks at its own place in the past, or at every token of past frames
    registers: int = 0
    conditioning: str = "add"  # of (tau, d) and the action: added to tokens, tokens of their own, or modulation
    linear_skip: bool = True  # start from the best linear denoiser of Gaussian latents instead of from zero
    window: int = 12  # frames that a frame may look at, itself included
    k_max: int = 64
    action_space: tuple[tuple[str, int, tuple[float, ...], tuple[float, ...]], ...] = ()  # kind, size, low, high

    def __post_init__(self) -> None:
        problems = [
            (self.width % self.heads != 0, f"width {self.width} is not a multiple of heads {self.heads}"),
            (self.heads % self.kv_heads != 0, f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}"),
            ((self.width // self.heads) % 2 != 0, f"head width {self.width // self.heads} is odd"),
            (self.conditioning not in CONDITIONINGS, f"conditioning {self.conditioning!r} is not in {CONDITIONINGS}"),
            (
                self.time_attention not in TIME_ATTENTIONS,
                f"time_attention {self.time_attention!r}: not in {TIME_ATTENTIONS}",
            ),
            (not 1 <= self.time_every <= self.depth, f"time_every {self.time_every} is not in 1..depth {self.depth}"),
            (self.k_max not in (2**i for i in range(17)), f"k_max {self.k_max} is not a power of two up to 65536"),
            (self.window < 2, f"window {self.window} is below 2"),
        ]
        for wrong, sentence in problems:
            if wrong:
                raise ValueError(sentence)

    @property
    def sequence(self) -> int:
        """S, tokens of a frame inside the trunk: latents, registers and conditioning tokens."""
        return self.tokens + self.registers + (2 if self.conditioning == "token" else 0)

    @property
    def lines(self) -> int:
        """Groups of a frame's tokens that time layers keep apart: every place on its own, or the frame as one."""
        return self.sequence if self.time_attention == "place" else 1

    def to_json(self) -> dict:
        return asdict(self)


class Block(nn.Module):
    """x + attention(norm x), then x + MLP(norm x); attention over space or over time. Modulation is optional."""

    def __init__(self, config: DynamicsConfig, over_time: bool) -> None:
        super().__init__()
        self.over_time = over_time
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.attention = Attention(config.width, config.heads, config.kv_heads)
        self.mlp_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.mlp = SwiGLU(config.width, config.mlp_hidden)
        self.modulation = nn.Linear(config.width, 4 * config.width) if config.conditioning == "modulate" else None

    def forward(self, x: Tensor, condition: Tensor | None, time: TimeContext) -> Tensor:
        scale1 = shift1 = scale2 = shift2 = None
        if self.modulation is not None:
            scale1, shift1, scale2, shift2 = self.modulation(F.silu(condition))[:, :, None].chunk(4, dim=-1)
        h = _modulate(self.attention_norm(x), scale1, shift1)
        x = x + (time.attend(self.attention, h) if self.over_time else self.attention(h))
        return x + self.mlp(_modulate(self.mlp_norm(x), scale2, shift2))


def _modulate(h: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    return h if scale is None else h * (1 + scale) + shift


class TimeContext:
    """What time layers need besides activations: rotary tables, a mask, and in a rollout the cache with its slots."""

    def __init__(self, config: DynamicsConfig, positions: Tensor, mask: Tensor) -> None:
        """positions (T,) of the new frames; mask (T, slots) bool, slots being frames or places of the cache."""
        self.lines, each = config.lines, config.sequence // config.lines  # tokens of a frame in one line
        pairs = config.width // config.heads // 2
        in_space = pairs // 2 if config.time_attention == "frame" else 0  # pairs that turn with the token's index
        over_time = rotary(positions, 2 * (pairs - in_space))
        over_space = rotary(torch.arange(each, device=positions.device), 2 * in_space)
        self.cos, self.sin = (
            torch.cat([a[:, None].expand(-1, each, -1), b.expand(len(a), -1, -1)], dim=-1).flatten(0, 1)
            for a, b in zip(over_time, over_space, strict=True)
        )  # (T * each, head_dim / 2)
        self.mask = mask.repeat_interleave(each, dim=0).repeat_interleave(each, dim=1)
        self.cache: ContextCache | None = None
        self.slots: Tensor | None = None
        self.layer = 0  # which time layer comes next; counts up within one pass

    def attend(self, attention: Attention, h: Tensor) -> Tensor:
        """Attention of h (B, T, S, C) over T and over the tokens of a line, causal within the window."""
        frames = h.shape[1]
        q, k, v = attention.project(h.unflatten(2, (self.lines, -1)).transpose(1, 2).flatten(2, 3))
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)  # (B, lines, heads, T * each, head_dim)
        if self.cache is not None:
            new = (frames, -1)
            keys, values = self.cache.keys[self.layer], self.cache.values[self.layer]
            k = keys.index_copy_(-3, self.slots, k.unflatten(-2, new)).flatten(-3, -2)
            v = values.index_copy_(-3, self.slots, v.unflatten(-2, new)).flatten(-3, -2)
            self.layer += 1
        y = attention.attend(q, k, v, self.mask)  # (B, lines, T * each, C)
        return y.unflatten(2, (frames, -1)).transpose(1, 2).flatten(2, 3)


class Dynamics(nn.Module):
    """See the module's first lines. Raises ValueError for a config that cannot be built."""

    def __init__(self, config: DynamicsConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # keep each block's input alone; its backward pass computes the rest again
        c = config
        self.embed = nn.Linear(c.latent_dim, c.width)
        self.places = nn.Parameter(torch.randn(c.tokens, c.width) * 0.5)  # a position in space for every latent token
        self.registers = nn.Parameter(torch.randn(c.registers, c.width) * 0.5)
        self.level = LevelEmbedding(c.k_max, c.width)
        self.action = ActionEmbedding(c.action_space, c.width)
        self.blocks = nn.ModuleList(Block(c, i % c.time_every == 0) for i in range(c.depth))
        self.final_norm = nn.RMSNorm(c.width, eps=1e-6)
        self.head = nn.Linear(c.width, c.latent_dim)
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

    @property
    def time_layers(self) -> int:
        return sum(block.over_time for block in self.blocks)

    def forward(self, z_tau: Tensor, tau: Tensor, d: Tensor, actions: Tensor, known: Tensor) -> Tensor:
        """z_hat (B, T, N, D) for whole clips, causal in time, each frame within its window."""
        frames, device = z_tau.shape[1], z_tau.device
        mask = window_mask(frames, self.config.window, device)
        time = TimeContext(self.config, torch.arange(frames, device=device), mask)
        return self._run(z_tau, tau, d, actions, known, time)

    def new_cache(self, batch: int) -> ContextCache:
        """An empty context window for `batch` rollouts on this model's device, in its number format."""
        c = self.config
        head_dim, like = c.width // c.heads, self.embed.weight
        return ContextCache(batch, c.window, self.time_layers, c.sequence, c.lines, c.kv_heads, head_dim, like)

    def extend(
        self, z_tau: Tensor, tau: Tensor, d: Tensor, actions: Tensor, known: Tensor, cache: ContextCache, keep: int
    ) -> Tensor:
        """z_hat of the next F frames after the cache; the first `keep` of them are committed to it, at their own level.

        F - keep is 0 or 1: the frame that is being denoised rides behind the one that is being committed. More than
        one frame can be committed at once only while the window is not yet full.
        """
        count = z_tau.shape[1]
        assert keep <= 1 or cache.frames + keep <= cache.window, (keep, cache.frames, cache.window)
        device = z_tau.device
        positions = torch.arange(cache.frames, cache.frames + count, device=device)
        time = TimeContext(self.config, positions, cache.mask(count, keep, device))
        time.cache, time.slots = cache, torch.tensor(cache.slots(count, keep), device=device)
        z_hat = self._run(z_tau, tau, d, actions, known, time)
        cache.frames += keep
        return z_hat

    def _run(
        self,
        z_tau: Tensor,
        tau: Tensor,
        d: Tensor,
        actions: Tensor,
        known: Tensor,
        time: TimeContext,
    ) -> Tensor:
        c = self.config
        level, action = self.level(tau, d), self.action(actions, known)  # (B, T, C) each
        x = self.embed(z_tau) + self.places  # (B, T, N, C)
        if c.conditioning == "add":
            x = x + (level + action)[:, :, None]
        batch, frames = tau.shape
        extra = [self.registers.expand(batch, frames, -1, -1)] if c.registers else []
        if c.conditioning == "token":
            extra += [level[:, :, None], action[:, :, None]]
        if extra:
            x = torch.cat([x, *extra], dim=2)  # (B, T, S, C)
        again = self.checkpoint_activations and torch.is_grad_enabled()
        for block in self.blocks:
            inputs = (x, level + action, time)
            x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False) if again else block(*inputs)
        z_hat = self.head(self.final_norm(x[:, :, : c.tokens]))
        if c.linear_skip:
            z_hat = z_hat + tau_.gaussian_gain(tau[..., None, None], self.channel_scale) * z_tau
        return z_hat


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
