"""Recording from ViZDoom, whose wheel carries engine, free art and scenarios: real game video without a download."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from ahriuwu_cli.data.action_component import ActionComponent
from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.calls import Calls, Lost
from ahriuwu_cli.data.doom_guard import SHARED, SHARES, Guard, engines
from ahriuwu_cli.data.recording import RecordConfig, Recorded, record_episodes
from ahriuwu_cli.disk import random_digits
from ahriuwu_cli.errors import DataError, DiskError, UserError, did_you_mean
from ahriuwu_cli.stopping import HANDLED

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
TICS_PER_SECOND = 35
DEFAULT_FRAME_SKIP = 4
MULTIPLAYER = ("cig", "multi")
# Per tic, in degrees for turning and looking and in the engine's own units for moving (50 is a run).
_DELTA_RANGES = {"TURN": 5.0, "LOOK": 2.0, "MOVE": 50.0}


def scenario_names() -> list[str]:
    """The scenarios that can be recorded: for one player, with a map in the wheel. Raises UserError without ViZDoom."""
    folder = Path(_vizdoom().scenarios_path)
    return sorted(p.stem for p in folder.glob("*.cfg") if _can_play_alone(p))


class DoomWorld:
    """One scenario as a `recording.World`: 160 x 120 RGB, no window, no sound, buttons as the scenario lists them."""

    def __init__(self, config: RecordConfig) -> None:
        """Raises UserError on an unknown scenario or without ViZDoom, DataError when the engine does not start.

        DiskError where there is no room for what it shares with us.
        """
        vizdoom = _vizdoom()
        names = scenario_names()
        if config.name not in names:
            raise UserError(f"unknown ViZDoom scenario {config.name!r}: {did_you_mean(config.name, names)}")
        _check_shared()
        self.frame_skip = config.frame_skip or DEFAULT_FRAME_SKIP
        self.fps = TICS_PER_SECOND / self.frame_skip
        self.facts: dict[str, Any] = {"kind": "doom", "scenario": config.name, "vizdoom": vizdoom.__version__}
        self._game = game = vizdoom.DoomGame()
        game.load_config(os.path.join(vizdoom.scenarios_path, f"{config.name}.cfg"))
        game.set_mode(vizdoom.Mode.PLAYER)
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        self.action_space, self._order = _action_space([b.name for b in game.get_available_buttons()])
        self._folder = litter = Path(tempfile.gettempdir()) / f"ahriuwu-doom-{random_digits()}"
        self._guard, self._calls = Guard(litter), Calls(self._has_ended)
        home = Path.cwd()
        try:
            litter.mkdir(mode=0o700)
            os.chdir(litter)  # the engine writes _vizdoom/ and _vizdoom.ini where it is started
            self._calls.do(game.init)
        except OSError:
            self._end()
            raise
        except Exception as error:
            self._end()
            raise DataError(f"ViZDoom could not start {config.name!r}: {error}") from None
        finally:
            os.chdir(home)
            _take_signals_back()

    def reset(self, seed: int) -> np.ndarray:
        """Start an episode; the first picture, uint8 (120, 160, 3)."""
        return self._ask(lambda game: (game.set_seed(seed), game.new_episode(), game.get_state().screen_buffer)[2])

    def step(self, action: np.ndarray) -> tuple[np.ndarray | None, bool]:
        """Hold the buttons for frame_skip tics; the picture after them, or None when the episode ended meanwhile."""

        def play(game: Any) -> tuple[np.ndarray | None, bool]:
            game.make_action(action[self._order].tolist(), self.frame_skip)
            over = game.is_episode_finished()
            return None if over else game.get_state().screen_buffer, over

        return self._ask(play)

    def _ask(self, work: Callable[[Any], T]) -> T:
        """What comes of a call of the engine. DataError where that, a process of its own, has ended: it was killed."""
        ended = ("ViZDoomUnexpectedExit", "ViZDoomIsNotRunning", "ViZDoomError", "MessageQueue", "SharedMemory")
        raised = (Lost, *(getattr(_vizdoom(), f"{name}Exception") for name in ended))
        try:
            return self._calls.do(lambda: work(self._game))
        except raised as error:
            raise DataError(f"the game's engine has ended by itself ({error}): see why, and record again") from None

    def _has_ended(self) -> bool:
        """Whether there is no engine. Where there is no /proc nobody knows."""
        there = set(engines(os.path.realpath(self._folder))) - {os.getpid()}
        return Path("/proc/self/cwd").exists() and not there

    def close(self) -> None:
        """Stop the engine and remove its files."""
        with suppress(Lost):
            if not self._calls.lost:
                self._calls.do(self._game.close)
        _take_signals_back()
        self._end()

    def _end(self) -> None:
        self._guard.end()
        self._calls.end()


def record_doom(config: RecordConfig) -> Iterator[Recorded]:
    """Yield episodes of a scenario without end (`recording.record_episodes`). Closing the generator ends the engine."""
    world = DoomWorld(config)
    try:
        yield from record_episodes(world, config)
    finally:
        world.close()


def _take_signals_back() -> None:
    """The library puts its own handlers in while the engine runs and none when it ends: neither would clean up."""
    if threading.current_thread() is threading.main_thread():
        for number in HANDLED:
            signal.signal(number, signal.getsignal(number))  # Python's list does not know of the library's


def _vizdoom() -> ModuleType:
    try:
        import vizdoom
    except ImportError:
        raise UserError("recording from ViZDoom needs the package vizdoom: pip install -e '.[doom]'") from None
    return vizdoom


def _can_play_alone(config: Path) -> bool:
    """Whether it has a map of its own in the wheel, for one player (without a host the others end the process)."""
    settings = dict(
        [part.strip() for part in line.split("=", 1)] for line in config.read_text().splitlines() if "=" in line
    )
    map_file = settings.get("doom_scenario_path", "")
    return not config.stem.startswith(MULTIPLAYER) and bool(map_file) and (config.parent / map_file).is_file()


def _action_space(buttons: list[str]) -> tuple[ActionSpace, list[int]]:
    """Plain buttons, then deltas; and for each of the game's buttons the column that holds it."""
    plain = [b for b in buttons if not b.endswith("_DELTA")]
    deltas = [b for b in buttons if b.endswith("_DELTA")]
    components = []
    if plain:
        components.append(ActionComponent("buttons", "binary", len(plain), tuple(plain)))
    if deltas:
        high = tuple(_DELTA_RANGES[b.split("_")[0]] for b in deltas)
        low = tuple(-x for x in high)
        components.append(ActionComponent("deltas", "continuous", len(deltas), tuple(deltas), low, high))
    return ActionSpace(tuple(components)), [[*plain, *deltas].index(b) for b in buttons]


def _check_shared() -> None:
    """DiskError where there is no room for the memory of an engine, which would end us by SIGBUS, without a word."""
    if not SHARED.is_dir():
        return
    needed = f"ViZDoom needs {SHARES / 1e6:.0f} MB"
    if (free := shutil.disk_usage(SHARED).free) < SHARES:
        raise DiskError(
            f"{needed} in {SHARED}, which has {free / 1e6:.1f} MB free: make room there (--shm-size of docker)"
        )
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if 0 <= limit < SHARES:
        raise DiskError(
            f"{needed} in one file of {SHARED}, and files are limited to {limit / 1e6:.3g} MB: raise ulimit -f"
        )
