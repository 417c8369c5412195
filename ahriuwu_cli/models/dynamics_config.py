"""The architecture of the dynamics: its fields, their limits, and how many numbers it has."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ahriuwu_cli.models import needs

PREDICTS = ("x", "v")
CONDITIONINGS = ("add", "token", "modulate")
TIME_ATTENTIONS = ("place", "frame")
LIMITS = {  # far above every size of ours; what is beyond them is no model but a damaged file
    "tokens": (1, 4096), "latent_dim": (1, 65_536), "width": (1, 65_536), "depth": (1, 1024), "heads": (1, 1024),
    "kv_heads": (1, 1024), "mlp_hidden": (1, 1_048_576), "time_every": (1, 1024), "registers": (0, 4096),
    "window": (2, 1024), "k_max": (1, 1024),
}  # fmt: skip
MAX_LINE = 16_384  # tokens that one attention looks over: its mask is this squared


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
    predicts: str = "x"  # what the trunk gives: z_clean, or the velocity v that z_hat is computed from (paper, table 2)
    window: int = 12  # frames that a frame may look at, itself included
    k_max: int = 64
    action_space: tuple[tuple[str, int, tuple[float, ...], tuple[float, ...]], ...] = ()  # kind, size, low, high

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int:
                raise ValueError(f"{name} {value!r} is not a whole number")
            if not low <= value <= high:
                raise ValueError(f"{name} {value} is " + (f"below {low}" if value < low else f"above {high}"))
        line = self.sequence * self.window if self.time_attention == "frame" else self.window
        problems = [
            (type(self.linear_skip) is not bool, f"linear_skip {self.linear_skip!r} is neither true nor false"),
            (line > MAX_LINE, f"attention over {line} tokens of a window is above the limit of {MAX_LINE}"),
            (self.width % self.heads != 0, f"width {self.width} is not a multiple of heads {self.heads}"),
            (self.heads % self.kv_heads != 0, f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}"),
            ((self.width // self.heads) % 2 != 0, f"head width {self.width // self.heads} is odd"),
            (self.conditioning not in CONDITIONINGS, f"conditioning {self.conditioning!r} is not in {CONDITIONINGS}"),
            (
                self.time_attention not in TIME_ATTENTIONS,
                f"time_attention {self.time_attention!r}: not in {TIME_ATTENTIONS}",
            ),
            (self.predicts not in PREDICTS, f"predicts {self.predicts!r} is not in {PREDICTS}"),
            (not 1 <= self.time_every <= self.depth, f"time_every {self.time_every} is not in 1..depth {self.depth}"),
            (self.k_max not in (2**i for i in range(11)), f"k_max {self.k_max} is not a power of two up to 1024"),
        ]
        for wrong, sentence in problems:
            if wrong:
                raise ValueError(sentence)
        needs.check(needs.to_roll_out(self), self.stored)

    @property
    def sequence(self) -> int:
        """S, tokens of a frame inside the trunk: latents, registers and conditioning tokens."""
        return self.tokens + self.registers + (2 if self.conditioning == "token" else 0)

    @property
    def lines(self) -> int:
        """Groups of a frame's tokens that time layers keep apart: every place on its own, or the frame as one."""
        return self.sequence if self.time_attention == "place" else 1

    @property
    def stored(self) -> int:
        """How many numbers a checkpoint of this architecture holds; known before any of them is made."""
        w, half, head = self.width, self.width // 2, self.width // self.heads
        block = 2 * w + 2 * w * w + 2 * w * self.kv_heads * head + 2 * head + 3 * w * self.mlp_hidden
        block += (4 * w * w + 4 * w) if self.conditioning == "modulate" else 0
        level = (self.k_max + 1 + self.k_max.bit_length()) * half + 2 * half * w + w + w * w + w
        action = w + w * sum(size for _, size, _, _ in self.action_space)
        ends = 2 * self.latent_dim * w + 2 * w + 2 * self.latent_dim + (self.tokens + self.registers) * w
        return self.depth * block + level + action + ends

    def to_json(self) -> dict:
        return asdict(self)
