"""Recording from any world: random actions in, episodes out, with one alignment for every source.

frames[0] is the first observation; actions[t] is what the world was told between frames[t] and frames[t+1].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.resize import area_resize
from ahriuwu_cli.errors import DataError, UserError

if TYPE_CHECKING:
    import numpy as np

PATIENCE = 20  # episodes in a row that may be too short before we give up


@dataclass(frozen=True)
class RecordConfig:
    """What to record: name is the scenario or environment, height and width are in pixels, max_frames and min_frames in
    stored frames; frame_skip is in steps of the world (None: the source's own default); hold in stored frames."""

    name: str
    height: int = 64
    width: int = 64
    frame_skip: int | None = None
    max_frames: int = 512
    min_frames: int = 32
    hold: tuple[int, int] = (2, 8)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.min_frames <= self.max_frames:
            raise UserError(
                f"episodes of {self.min_frames} to {self.max_frames} frames cannot be recorded: give 2 <= min <= max"
            )
        if not 1 <= self.hold[0] <= self.hold[1]:
            raise UserError(f"actions cannot be held for {self.hold[0]} to {self.hold[1]} frames: give 1 <= min <= max")
        if self.frame_skip is not None and self.frame_skip < 1:
            raise UserError(f"a frame skip of {self.frame_skip} shows no frame: give 1 or more")


class Recorded(NamedTuple):
    """One finished episode: frames uint8 (T, H, W, 3), actions float32 (T-1, A), and where it comes from."""

    frames: np.ndarray
    actions: np.ndarray
    info: dict[str, Any]


class World(Protocol):
    """Something that can be recorded. fps is the rate of the frames that step returns; facts go into dataset.json."""

    action_space: ActionSpace
    fps: float
    frame_skip: int
    facts: dict[str, Any]

    def reset(self, seed: int) -> np.ndarray:
        """Start an episode; the first picture, uint8 (h, w, 3)."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray | None, bool]:
        """Apply one action row (A,); the picture after it (None where there is none left to see), and "it is over"."""

    def close(self) -> None:
        """End the world and remove what it left on disk."""


@dataclass
class Shortfall:
    """Counts what was dropped for being too short, for the person who waits."""

    episodes: int = 0


def record_episodes(world: World, config: RecordConfig, shortfall: Shortfall | None = None) -> Iterator[Recorded]:
    """Yield episodes without end, each seeded by (config.seed, its number); the world is left open.

    An episode is cut at max_frames and dropped below min_frames. Raises DataError after 20 too short ones in a row.
    """
    import numpy as np

    shortfall = shortfall or Shortfall()
    number, short = 0, []
    while True:
        seeds = np.random.SeedSequence([config.seed, number])
        world_seed = int(seeds.generate_state(1)[0]) & 0x7FFFFFFF
        actions = world.action_space.random(config.max_frames - 1, config.hold, np.random.default_rng(seeds))
        frames = [area_resize(world.reset(world_seed), config.height, config.width)]
        for action in actions:
            picture, over = world.step(action)
            if picture is not None:
                frames.append(area_resize(picture, config.height, config.width))
            if over:
                break
        if len(frames) >= config.min_frames:
            info = {"episode": number, "seed": world_seed, "source": f"{config.name} seed {world_seed}"}
            yield Recorded(np.stack(frames), actions[: len(frames) - 1], info)
            short = []
        else:
            short.append(len(frames))
            shortfall.episodes += 1
            if len(short) == PATIENCE:
                raise DataError(
                    f"{PATIENCE} episodes of {config.name!r} in a row ended before {config.min_frames} frames (the "
                    f"longest had {max(short)}): lower --min-frames or --frame-skip"
                )
        number += 1
