"""Recording from any Gymnasium environment with pixels: its observation when that is an image, else what it renders."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ahriuwu_cli import memory
from ahriuwu_cli.data.action_component import ActionComponent
from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.metadata import MAX_FPS, MIN_FPS
from ahriuwu_cli.data.recording import RecordConfig, Recorded, record_episodes
from ahriuwu_cli.errors import DataError, UserError, did_you_mean

if TYPE_CHECKING:
    import gymnasium
    import numpy as np

ATARI_FPS = 60.0  # the console's; the metadata's 30 is for a frame skip that we turn off
ATARI_FRAME_SKIP = 4


def environment_names() -> list[str]:
    """The names that Gymnasium knows here, Atari's included when ale-py is installed. Raises UserError without it."""
    return sorted(_gymnasium().registry)


class GymWorld:
    """One environment as a `recording.World`. Atari runs without its own frame skip and without its sticky actions (a
    recorded action is the one that was played), and shows the brighter of the last two raw frames against flicker."""

    def __init__(self, config: RecordConfig) -> None:
        """Raises UserError on an unknown name or a missing package, DataError when it has no pixels or odd actions."""
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pictures are asked for, no window: SDL looks for no screen
        gymnasium = _gymnasium()
        name = config.name
        if ":" not in name and name not in gymnasium.registry:  # "module:Name" is imported by Gymnasium itself
            raise UserError(f"unknown Gymnasium environment {name!r}: {_nearest(name, sorted(gymnasium.registry))}")
        self._name, self._is_atari = name, name.startswith("ALE/")
        options = {"frameskip": 1, "repeat_action_probability": 0.0} if self._is_atari else {}
        self._env = self._open(name, options)
        try:
            with self._asked("what it shows"):
                self._renders = not _is_image(self._env.observation_space)
            if self._renders:
                self.close()
                self._env = self._open(name, options | {"render_mode": "rgb_array"})
            with self._asked("what actions it takes"):
                self.action_space, self._to_env = action_space_of(self._env, name)
            self.frame_skip = config.frame_skip or (ATARI_FRAME_SKIP if self._is_atari else 1)
            self.fps = self._rate() / self.frame_skip
        except BaseException:
            self.close()
            raise
        self.facts: dict[str, Any] = {"kind": "gym", "environment": name, "gymnasium": gymnasium.__version__} | options

    def reset(self, seed: int) -> np.ndarray:
        """Start an episode; the first picture, uint8 (h, w, 3)."""
        with self._asked("reset"):
            observation, _ = self._env.reset(seed=seed)
        return self._picture(observation)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """Apply one action row for frame_skip steps, or until the episode ends; the picture after the last of them."""
        import numpy as np

        value, before = self._to_env(action), None
        for i in range(self.frame_skip):
            with self._asked("step"):
                observation, _, terminated, truncated, _ = self._env.step(value)
                over = bool(terminated) or bool(truncated)
            if over or i == self.frame_skip - 1:
                break
            if self._is_atari and i == self.frame_skip - 2:
                before = self._picture(observation)
        picture = self._picture(observation)
        return (picture if before is None else np.maximum(before, picture)), over

    def close(self) -> None:
        """End the environment. That it fails in this takes nothing from what was recorded: it is said."""
        try:
            with self._asked("close"):
                self._env.close()
        except (DataError, UserError) as error:
            print(f"warning: {error}", file=sys.stderr)

    def _open(self, name: str, options: dict[str, Any]) -> gymnasium.Env:
        with self._asked(f"its start with {options or 'its defaults'}"):
            return _gymnasium().make(name, disable_env_checker=True, **options)

    def _rate(self) -> float:
        """Steps a second. DataError where it says none that a dataset may have."""
        rate = ATARI_FPS if self._is_atari else (self._env.metadata or {}).get("render_fps")
        try:
            fits = MIN_FPS <= float(rate) / self.frame_skip <= MAX_FPS
        except (TypeError, ValueError, OverflowError):
            fits = False
        if not fits:
            raise DataError(
                f"{self._name} does not say its frame rate, or none from {MIN_FPS} to {MAX_FPS:g} a second "
                f"(metadata['render_fps'] is {str(rate)[:40]}): set it in the environment"
            )
        return float(rate)

    @contextlib.contextmanager
    def _asked(self, for_what: str) -> Iterator[None]:
        """An environment is somebody's program: what it raises is said with its name, that it ends ours, too; what it
        prints goes to stderr, since stdout is for results."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except (Exception, SystemExit) as error:
            if memory.ran_out(error) or isinstance(error, DataError):
                raise
            if isinstance(error, (ImportError, _gymnasium().error.DependencyNotInstalled)):
                raise UserError(f"the environment {self._name!r} needs another package: {error}") from None
            said = f"{type(error).__name__}: {error}"
            raise DataError(
                f"the environment {self._name!r} failed in {for_what} ({said}): see what it needs"
            ) from None

    def _picture(self, observation: np.ndarray) -> np.ndarray:
        import numpy as np

        with self._asked("render"):
            picture = self._env.render() if self._renders else observation
        form = picture.shape if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 else ()
        if len(form) not in (2, 3) or min(form) < 1:
            shown = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
            raise DataError(f"{self._name} shows {shown}, not an 8-bit image: choose an environment with pixels")
        if picture.ndim == 2 or picture.shape[2] < 3:  # grey, with or without its opacity
            picture = np.repeat(picture.reshape(*picture.shape[:2], -1)[:, :, :1], 3, axis=2)
        return picture[:, :, :3]


def record_gym(config: RecordConfig) -> Iterator[Recorded]:
    """Yield episodes of an environment without end (`recording.record_episodes`). Closing the generator closes it."""
    world = GymWorld(config)
    try:
        yield from record_episodes(world, config)
    finally:
        world.close()


def action_space_of(env: gymnasium.Env, name: str) -> tuple[ActionSpace, Any]:
    """Our action space for an environment's, and the function from a row (A,) float32 to what `env.step` takes.

    Raises DataError on spaces that are not Discrete, MultiBinary, MultiDiscrete or a bounded one-dimensional Box.
    """
    import numpy as np
    from gymnasium import spaces

    space = env.action_space
    if isinstance(space, spaces.Discrete):
        meanings = tuple(getattr(env.unwrapped, "get_action_meanings", tuple)())
        labels = meanings if len(meanings) == space.n else ()
        component = ActionComponent("action", "discrete", int(space.n), labels)
        return ActionSpace((component,)), lambda row: int(row[0] + space.start)
    if isinstance(space, spaces.MultiBinary) and len(space.shape) == 1:
        component = ActionComponent("buttons", "binary", int(space.shape[0]))
        return ActionSpace((component,)), lambda row: row.astype(np.int8)
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        components = tuple(ActionComponent(f"action{i}", "discrete", int(n)) for i, n in enumerate(space.nvec))
        return ActionSpace(components), lambda row: (row.astype(np.int64) + space.start).astype(space.dtype)
    if isinstance(space, spaces.Box) and len(space.shape) == 1 and space.dtype.kind == "f" and space.is_bounded():
        low, high = (tuple(float(x) for x in bound) for bound in (space.low, space.high))
        component = ActionComponent("axes", "continuous", len(low), (), low, high)
        return ActionSpace((component,)), lambda row: np.clip(row, space.low, space.high).astype(space.dtype)
    raise DataError(
        f"{name} takes actions of {space}, and only Discrete, MultiBinary, MultiDiscrete and a bounded "
        "one-dimensional Box can be recorded: wrap it in one of these"
    )


def _is_image(space: gymnasium.Space) -> bool:
    shape = space.shape or ()
    pixels = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))
    return pixels and str(space.dtype) == "uint8" and min(shape[:2]) >= 8


def _nearest(name: str, known: list[str]) -> str:
    """did_you_mean, but never hundreds of names."""
    hint = did_you_mean(name, known)
    return hint if hint.startswith("did you mean") else "`gymnasium.pprint_registry()` lists the names"


def _gymnasium() -> ModuleType:
    try:
        import gymnasium
    except ImportError:
        raise UserError("recording from Gymnasium needs the package gymnasium: pip install -e '.[gym]'") from None
    with contextlib.suppress(ImportError):  # Atari is an extra
        import ale_py

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        gymnasium.register_envs(ale_py)
    return gymnasium
