"""The transformer tokenizer: a block-causal masked autoencoder with learned latent tokens and a tanh bottleneck.

Dreamer 4 (arXiv 2509.24527), section 3.1. A frame is P patch tokens and N latent tokens:

    encoder   patches attend to patches, latents to all            (space layers)
              every token to its own place in earlier frames       (time layers, every time_every-th)
    bottleneck   latents (B, T, N, C) -> tanh(linear) (B, T, N, D) in (-1, 1)
    decoder   latents attend to latents, patches to all; patches start as learned queries

In training a share p ~ U(0, mask_max) of every image's patches is replaced by a learned token (`draw_patch_mask`).
Departure: only frames and latents are tokens here, the paper's other modalities are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor, nn

from ahriuwu_cli.models import needs
from ahriuwu_cli.models.kernels import Tables
from ahriuwu_cli.models.layers import Attention, RMSNorm, SwiGLU, as_bias, rotary, window_mask
from ahriuwu_cli.models.products import Linear
from ahriuwu_cli.models.tokenizer import MAX_SIDE, Tokenizer, as_pixels

LIMITS = {"model_width": 65_536, "mlp_hidden": 1_048_576, "latent_dim": 65_536, "depth_encoder": 1024,
          "depth_decoder": 1024}  # the other fields: MAX_SIDE  # fmt: skip
MAX_LINE = 8192  # patches and latents that one frame's attention looks over: its mask is this squared
CHUNK = 64  # frames that encode and decode work on at a time, at most


@dataclass(frozen=True)
class TransformerTokenizerConfig:
    """Architecture. Sizes in pixels, tokens, channels, layers or frames. ValueError for one that cannot be built."""

    height: int = 64
    width: int = 64
    patch: int = 8  # side of a square patch: P = (height / patch) * (width / patch)
    model_width: int = 128  # C
    depth_encoder: int = 4
    depth_decoder: int = 4
    heads: int = 4
    kv_heads: int = 4
    mlp_hidden: int = 256
    time_every: int = 4  # every time_every-th layer attends over time, the others over space
    tokens: int = 16  # N, learned latent tokens of a frame
    latent_dim: int = 32  # D, channels of a latent token
    window: int = 8  # frames that a time layer looks at, the frame itself included
    mask_max: float = 0.9  # largest share of an image's patches that training hides

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            most = LIMITS.get(field.name, MAX_SIDE)
            if field.name != "mask_max" and (type(value) is not int or not 1 <= value <= most):
                raise ValueError(f"{field.name} must be a whole number from 1 to {most}, got {value!r}")
        head_dim, rest = divmod(self.model_width, self.heads)
        shallow = min(self.depth_encoder, self.depth_decoder)
        divides = self.height % self.patch == 0 and self.width % self.patch == 0
        number = isinstance(self.mask_max, (int, float)) and not isinstance(self.mask_max, bool)
        line = self.patches + self.tokens
        problems = [
            (line > MAX_LINE, f"{line} tokens of a frame are above the limit of {MAX_LINE}: use larger patches"),
            (not divides, f"frames of {self.height}x{self.width} do not divide into patches of {self.patch}"),
            (rest != 0, f"model_width {self.model_width} is not a multiple of heads {self.heads}"),
            (head_dim % 2 != 0, f"head width {head_dim} is odd"),
            (self.heads % self.kv_heads != 0, f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}"),
            (self.time_every == 1, "time_every 1 leaves no space layer: latents would never see a patch"),
            (
                self.time_every > shallow,
                f"time_every {self.time_every} exceeds the depth {shallow}: no layer sees time",
            ),
            (not number or not 0 <= self.mask_max < 1, f"mask_max {self.mask_max!r} is not in [0, 1)"),
        ]
        for wrong, sentence in problems:
            if wrong:
                raise ValueError(sentence)
        needs.check(self.needed, self.stored)

    @property
    def patches(self) -> int:
        """P, patch tokens of a frame."""
        return (self.height // self.patch) * (self.width // self.patch)

    @property
    def stored(self) -> int:
        """How many numbers a checkpoint of this architecture holds; known before any of them is made."""
        w, head, values = self.model_width, self.model_width // self.heads, self.patch * self.patch * 3
        block = 2 * w + 2 * w * w + 2 * w * self.kv_heads * head + 2 * head + 3 * w * self.mlp_hidden
        places = (2 * self.patches + 2 * self.tokens + 1) * w
        ends = 2 * values * w + values + 2 * self.latent_dim * w + self.latent_dim + 4 * w
        return (self.depth_encoder + self.depth_decoder) * block + places + ends + 2 * self.tokens * self.latent_dim

    @property
    def needed(self) -> int:
        """Bytes at work besides the weights: a frame, those before it that it can see, and what may look at what."""
        return needs.of_a_clip(self, 1 + self.reach(max(self.depth_encoder, self.depth_decoder)))

    def reach(self, depth: int) -> int:
        """Earlier frames that so many layers look back at: every time layer adds window - 1."""
        return (self.window - 1) * (depth // self.time_every)

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict) -> TransformerTokenizerConfig:
        """Strict: a missing or unknown field is a ValueError."""
        wrong = sorted(set(document) ^ {f.name for f in fields(cls)})
        if wrong:
            raise ValueError(f"transformer tokenizer: missing or unknown fields: {', '.join(wrong)}")
        return cls(**document)


def draw_patch_mask(batch: int, frames: int, patches: int, mask_max: float, generator: torch.Generator) -> Tensor:
    """(B, T, P) bool, True where a patch is hidden: a share p ~ U(0, mask_max) for every image, patches independent."""
    share = torch.rand(batch, frames, 1, generator=generator, device=generator.device) * mask_max
    return torch.rand(batch, frames, patches, generator=generator, device=generator.device) < share


class TokenizerBlock(nn.Module):
    """x + attention(norm x), then x + MLP(norm x); attention over space under a mask, or over time."""

    def __init__(self, config: TransformerTokenizerConfig, over_time: bool) -> None:
        super().__init__()
        self.over_time = over_time
        self.attention_norm = RMSNorm(config.model_width)
        self.attention = Attention(config.model_width, config.heads, config.kv_heads)
        self.mlp_norm = RMSNorm(config.model_width)
        self.mlp = SwiGLU(config.model_width, config.mlp_hidden)

    def forward(self, x: Tensor, space_bias: Tensor, time_bias: Tensor, positions: Tables) -> Tensor:
        """x (B, T, S, C); space_bias (S, S) and time_bias (T, T) are 0 where a row may look at a column, else -inf."""
        h = self.attention_norm(x)
        over_time = ("place", positions, time_bias)
        h = self.attention(h, *over_time) if self.over_time else self.attention(h, bias=space_bias)
        x = x + h
        return x + self.mlp(self.mlp_norm(x))


class TransformerTokenizer(Tokenizer):
    """See the module's first lines. `window` counts the frames that a latent depends on, over all layers together.

    Clips of any length: `encode` and `decode` work in chunks of 64 frames, each with all the earlier frames that it can
    see, so memory is bounded per clip and the result is that of the whole clip (to float32 rounding). They keep no
    gradients; `forward` does. Latents are (tanh output - latent_mean) / latent_scale: see `set_scale`.
    """

    kind = "transformer"

    def __init__(self, config: TransformerTokenizerConfig) -> None:
        super().__init__()
        self.config = c = config
        self.height, self.width, self.tokens, self.latent_dim = c.height, c.width, c.tokens, c.latent_dim
        values = c.patch * c.patch * 3
        self.embed = Linear(values, c.model_width)
        self.mask_token = nn.Parameter(torch.randn(c.model_width) * 0.02)
        self.patch_places = nn.Parameter(torch.randn(c.patches, c.model_width) * 0.5)
        self.latent_tokens = nn.Parameter(torch.randn(c.tokens, c.model_width) * 0.5)
        self.bottleneck_norm = RMSNorm(c.model_width)
        self.bottleneck = Linear(c.model_width, c.latent_dim)
        self.unpack = Linear(c.latent_dim, c.model_width)
        self.latent_places = nn.Parameter(torch.randn(c.tokens, c.model_width) * 0.5)
        self.patch_queries = nn.Parameter(torch.randn(c.patches, c.model_width) * 0.5)
        depths = [*range(c.depth_encoder), *range(c.depth_decoder)]  # the encoder's layers, then the decoder's
        self.blocks = nn.ModuleList(TokenizerBlock(c, (i + 1) % c.time_every == 0) for i in depths)
        self.final_norm = RMSNorm(c.model_width)
        self.head = Linear(c.model_width, values)
        self.register_buffer("latent_mean", torch.zeros(c.tokens, c.latent_dim))
        self.register_buffer("latent_scale", torch.ones(c.tokens, c.latent_dim))
        is_latent = torch.arange(c.patches + c.tokens) >= c.patches  # patches come first
        self.register_buffer("encoder_sees", is_latent[:, None] | ~is_latent[None, :], persistent=False)
        self.register_buffer("decoder_sees", ~is_latent[:, None] | is_latent[None, :], persistent=False)
        for block in self.blocks:  # the residual stream starts as little more than its input
            for linear in (block.attention.out, block.mlp.down):
                linear.weight.data.mul_((2 * max(c.depth_encoder, c.depth_decoder)) ** -0.5)
        self.head.weight.data.mul_(0.1)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def from_json(cls, architecture: dict) -> TransformerTokenizer:
        return cls(TransformerTokenizerConfig.from_json(architecture))

    @classmethod
    def stored(cls, architecture: dict) -> int:
        return TransformerTokenizerConfig.from_json(architecture).stored

    def to_json(self) -> dict:
        return self.config.to_json()

    @property
    def window(self) -> int:
        """Frames that a latent depends on, its own included: every time layer of the encoder adds window - 1."""
        return 1 + self.config.reach(self.config.depth_encoder)

    @property
    def decoder_window(self) -> int:
        """Frames of latents that a decoded frame depends on, its own included."""
        return 1 + self.config.reach(self.config.depth_decoder)

    def forward(self, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        """Frames (B, T, H, W, 3) in [0, 1], hidden patches (B, T, P) bool -> reconstruction likewise, unclamped.

        T is not cut into chunks here: memory grows with it. Without a mask this is what encode and decode do.
        """
        return self._from_bottleneck(self._to_bottleneck(frames, mask))

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """uint8 frames (B, T, H, W, 3) -> latents (B, T, N, D) float32. ValueError for frames of another kind."""
        if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[2:] != (self.height, self.width, 3):
            wanted = f"uint8 (B, T, {self.height}, {self.width}, 3)"
            raise ValueError(f"the tokenizer wants frames {wanted}, got {frames.dtype} {tuple(frames.shape)}")

        def run(part: Tensor) -> Tensor:
            return self._to_bottleneck(part.to(self.latent_mean.device).float() / 255, None).float()

        return (self._in_chunks(run, frames, self.window - 1) - self.latent_mean) / self.latent_scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, T, N, D) -> frames (B, T, H, W, 3) float32 in [0, 1]. ValueError for latents of another shape."""
        return self._decoded(latents, lambda frames: frames)

    @torch.no_grad()
    def show(self, latents: Tensor) -> Tensor:
        return self._decoded(latents, as_pixels)

    def _decoded(self, latents: Tensor, kept: Callable[[Tensor], Tensor]) -> Tensor:
        """kept(frames in [0, 1]) of latents (B, T, N, D), chunk by chunk."""
        if latents.ndim != 4 or latents.shape[2:] != (self.tokens, self.latent_dim):
            wanted = f"(B, T, {self.tokens}, {self.latent_dim})"
            raise ValueError(f"the tokenizer wants latents {wanted}, got {tuple(latents.shape)}")

        def run(part: Tensor) -> Tensor:
            z = part.to(self.latent_mean.device).float() * self.latent_scale + self.latent_mean
            return self._from_bottleneck(z).float().clamp(0, 1)

        return self._in_chunks(run, latents, self.decoder_window - 1, kept)

    def set_scale(self, mean: Tensor | float, std: Tensor | float) -> None:
        """Make latents (tanh output - mean) / std; each a number or a tensor that broadcasts to (N, D).

        Set once after training, from the training data, so that latents have about unit spread and noise at tau means
        the same for every world. ValueError for a std that is not above 0, or anything not finite.
        """
        mean, std = (torch.as_tensor(v, dtype=torch.float32) for v in (mean, std))
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
            raise ValueError(f"latents cannot be scaled by mean {mean.tolist()} and std {std.tolist()}")
        self.latent_mean.copy_(mean)
        self.latent_scale.copy_(std)

    def _to_bottleneck(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        """Frames (B, T, H, W, 3) in [0, 1] -> (B, T, N, D) in (-1, 1)."""
        batch, count = frames.shape[:2]
        patches = self.embed(_to_patches(frames * 2 - 1, self.config.patch))  # (B, T, P, C)
        if mask is not None:
            patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
        latents = self.latent_tokens.expand(batch, count, -1, -1)
        x = torch.cat([patches + self.patch_places, latents], dim=2)  # (B, T, P + N, C)
        x = self._layers(x, self.blocks[: self.config.depth_encoder], self.encoder_sees)
        return torch.tanh(self.bottleneck(self.bottleneck_norm(x[:, :, self.config.patches :])))

    def _from_bottleneck(self, z: Tensor) -> Tensor:
        """(B, T, N, D) in (-1, 1) -> frames (B, T, H, W, 3)."""
        batch, count = z.shape[:2]
        queries = self.patch_queries.expand(batch, count, -1, -1)
        x = torch.cat([queries, self.unpack(z) + self.latent_places], dim=2)  # (B, T, P + N, C)
        x = self._layers(x, self.blocks[self.config.depth_encoder :], self.decoder_sees)
        pixels = self.head(self.final_norm(x[:, :, : self.config.patches]))
        return _to_frames((pixels + 1) / 2, self.config)

    def _layers(self, x: Tensor, blocks: nn.ModuleList, space_mask: Tensor) -> Tensor:
        frames = x.shape[1]
        positions = rotary(torch.arange(frames, device=x.device), self.config.model_width // self.config.heads)
        space_bias, time_bias = as_bias(space_mask), as_bias(window_mask(frames, self.config.window, x.device))
        for block in blocks:
            x = block(x, space_bias, time_bias, positions)
        return x

    def _in_chunks(
        self, run: Callable[[Tensor], Tensor], x: Tensor, reach: int, kept: Callable[[Tensor], Tensor] = lambda y: y
    ) -> Tensor:
        """kept(run(x)) over axis 1 in chunks of frames; each also gets `reach` earlier frames, whose results go.

        Some clips at a time where a chunk of all would take too much memory; short chunks where one clip's would.
        """
        size, whole = needs.frames_at_once(self.config, min(reach, x.shape[1] - 1), CHUNK), None
        for start in range(0, max(x.shape[1], 1), size):
            lead = min(start, reach)
            chunk = x[:, start - lead : start + size]
            clips = chunk.split(needs.in_parts(needs.of_a_clip(self.config, chunk.shape[1])))
            first = 0
            for part in clips:
                made = kept(run(part)[:, lead:])
                whole = made.new_empty(*x.shape[:2], *made.shape[2:]) if whole is None else whole
                whole[first : first + len(part), start : start + size] = made
                first += len(part)
        return whole


def _to_patches(frames: Tensor, patch: int) -> Tensor:
    """(B, T, H, W, 3) -> (B, T, P, patch * patch * 3)."""
    b, t, height, width, _ = frames.shape
    grid = frames.reshape(b, t, height // patch, patch, width // patch, patch, 3)
    return grid.permute(0, 1, 2, 4, 3, 5, 6).flatten(4).flatten(2, 3)


def _to_frames(patches: Tensor, config: TransformerTokenizerConfig) -> Tensor:
    """(B, T, P, patch * patch * 3) -> (B, T, H, W, 3)."""
    b, t = patches.shape[:2]
    p = config.patch
    grid = patches.reshape(b, t, config.height // p, config.width // p, p, p, 3)
    return grid.permute(0, 1, 2, 4, 3, 5, 6).reshape(b, t, config.height, config.width, 3)
