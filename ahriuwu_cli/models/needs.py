"""What a model holds in memory besides its weights, by its architecture alone: known before any of it is taken.

Products such as tokens * mlp_hidden or layers * window * tokens let a file of some kilobytes ask for terabytes. So what
needs more than FREE bytes for one frame of one clip, and more than TIMES its weights, is no model but a damaged file:
each of our sizes stays below, with any number of tokens. Below that, many frames at once are worked on in parts
(`in_parts`), and what is beyond the machine ends in a sentence (`refuse_beyond_machine`). Numbers count as float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ahriuwu_cli import memory
from ahriuwu_cli.models.cache import AHEAD
from ahriuwu_cli.models.kernels import SHORT

if TYPE_CHECKING:
    from ahriuwu_cli.models.dynamics_config import DynamicsConfig
    from ahriuwu_cli.models.tokenizer import Tokenizer
    from ahriuwu_cli.models.transformer_tokenizer import TransformerTokenizerConfig

FREE, TIMES = 2 << 30, 32
AT_ONCE = 1 << 30  # bytes of the frames that are worked on at a time
NUMBER = 4  # bytes of a float32


def check(needed: int, stored: int) -> None:
    """ValueError for bytes that no model of so many stored numbers needs to make one frame."""
    if needed > max(FREE, TIMES * NUMBER * stored):
        raise ValueError(
            f"to make one frame with {NUMBER * stored / 1e6:.3g} MB of weights takes {needed / 1e9:.3g} GB of memory, "
            f"more than {FREE / 1e9:.3g} GB and {TIMES} times the weights"
        )


def in_parts(each: int) -> int:
    """How many things of so many bytes are worked on at a time, one at least."""
    return max(1, AT_ONCE // each)


def refuse_beyond_machine(needed: int, device: torch.device) -> None:
    """MemoryError for bytes that this machine does not have at all, where the system would end the process in silence.

    A GPU says so itself.
    """
    if device.type == "cpu":
        memory.refuse_beyond(needed)


def to_roll_out(c: DynamicsConfig, clips: int = 1) -> int:
    """Bytes while a frame of each clip is made: cache, rotary tables, and the pass that also commits the last frame."""
    head = c.width // c.heads
    layers = -(-c.depth // c.time_every)  # that look over time
    cache = 2 * layers * (c.window + 1) * c.sequence * c.kv_heads * head
    rotary = AHEAD * (c.sequence // c.lines) * head
    return NUMBER * (clips * cache + rotary) + 2 * of_a_frame(c, clips)


def of_a_frame(c: DynamicsConfig, clips: int = 1) -> int:
    """Bytes of a pass for each frame of all clips: a block's activations, attention's weights, what may be seen."""
    each = c.sequence // c.lines
    line = (c.window + 1) * each
    weights = max(c.sequence * length for length in (line, c.sequence, 0) if length <= SHORT)
    return NUMBER * (clips * (_wide(c.sequence, c.width, c) + 2 * c.heads * weights) + 2 * each * line)


def of_an_image(c: TransformerTokenizerConfig) -> int:
    """Bytes for each of the frames that a tokenizer works on, its pixels among them."""
    line = c.patches + c.tokens
    weights = line**2 if line <= SHORT else 0
    return NUMBER * (_wide(line, c.model_width, c) + 2 * c.heads * weights + 4 * 3 * c.height * c.width)


def of_pixels(tokenizer: Tokenizer) -> int:
    """Bytes for each of the frames of a tokenizer that looks at one at a time: its pixels, four times over."""
    return NUMBER * 4 * 3 * tokenizer.height * tokenizer.width


def of_a_clip(c: TransformerTokenizerConfig, frames: int) -> int:
    """Bytes for so many frames of one clip at once: its images, attention's weights over time, what may be seen."""
    line = c.patches + c.tokens
    over_time = 2 * c.heads * line * frames**2 if frames <= SHORT else 0
    return frames * of_an_image(c) + NUMBER * (over_time + 2 * frames**2 + 2 * line**2)


def frames_at_once(c: TransformerTokenizerConfig, earlier: int, most: int) -> int:
    """How many frames, 1 to `most`, a tokenizer works on at a time that looks back at so many earlier ones."""
    fits = (frames for frames in range(most, 1, -1) if of_a_clip(c, earlier + frames) <= AT_ONCE)
    return next(fits, 1)


def _wide(line: int, width: int, c: DynamicsConfig | TransformerTokenizerConfig) -> int:
    """Numbers of a block's activations for the tokens of one frame, and of its latents."""
    return line * (10 * width + 4 * c.mlp_hidden) + 4 * c.tokens * c.latent_dim
