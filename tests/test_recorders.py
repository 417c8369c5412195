"""Recorders: actions[t] takes frames[t] to frames[t+1] in every source, seeds repeat, nothing is littered."""

import itertools
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ahriuwu_cli.cli import main
from ahriuwu_cli.data.recording import RecordConfig
from ahriuwu_cli.errors import DataError, UserError


@pytest.fixture
def echo_world():
    """An environment whose next frame shows the action that led to it as grey levels; its first frame is black."""
    gymnasium = pytest.importorskip("gymnasium")

    class Echo(gymnasium.Env):
        metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

        def __init__(self, space="discrete", pixels=True, length=20, render_mode=None):
            spaces = gymnasium.spaces
            image = spaces.Box(0, 255, (16, 16, 3), np.uint8)
            self.observation_space = image if pixels else spaces.Box(-1, 1, (2,), np.float32)
            self.render_mode, self._pixels, self._length = render_mode, pixels, length
            self.action_space = {
                "discrete": spaces.Discrete(5, start=3),
                "binary": spaces.MultiBinary(4),
                "box": spaces.Box(np.float32([-2, 0]), np.float32([2, 1])),
                "multi": spaces.MultiDiscrete([3, 4]),
                "dict": spaces.Dict({"a": spaces.Discrete(2)}),
                "endless": spaces.Box(-np.inf, np.inf, (2,)),
            }[space]
            self._start = 3 if space == "discrete" else 0

        def _look(self, action):
            self._frame = np.zeros((16, 16, 3), np.uint8)
            for i, value in enumerate(np.atleast_1d(action)):
                self._frame[:, 4 * i : 4 * i + 4] = round(100 + 25 * (float(value) - self._start))
            return self._frame if self._pixels else np.zeros(2, np.float32)

        def reset(self, seed=None, options=None):
            super().reset(seed=seed)
            self._t = 0
            return self._look([]), {}

        def step(self, action):
            assert self.action_space.contains(action), action
            self._t += 1
            return self._look(action), 0.0, self._t >= self._length, False, {}

        def render(self):
            return self._frame

    gymnasium.register("Echo-v0", Echo)
    yield gymnasium
    del gymnasium.registry["Echo-v0"]


def _echo(echo_world, **options):
    """Record two episodes with Echo's options as its registered defaults."""
    from ahriuwu_cli.data.gym import GymWorld, record_episodes

    config = RecordConfig(
        "Echo-v0", 16, 16, options.pop("frame_skip", None), 64, options.pop("min_frames", 2), (1, 3), 5
    )
    echo_world.registry["Echo-v0"].kwargs = options
    world = GymWorld(config)
    try:
        return world, list(itertools.islice(record_episodes(world, config), 2))
    finally:
        world.close()


@pytest.mark.parametrize("pixels", [True, False])
@pytest.mark.parametrize("space", ["discrete", "binary", "box", "multi"])
def test_the_next_frame_of_a_gym_world_shows_the_action(echo_world, space, pixels):
    world, episodes = _echo(echo_world, space=space, pixels=pixels)
    assert world.fps == 20
    for frames, actions, _ in episodes:
        assert len(frames) == 21
        assert len(actions) == 20
        assert frames[0].max() == 0
        world.action_space.validate(actions, "echo")
        shown = frames[1:, 8, 2 : 4 * actions.shape[1] : 4, 0]
        np.testing.assert_array_equal(shown, np.round(100 + 25 * actions.astype(np.float64)))
        assert len(np.unique(actions, axis=0)) > 2


def test_frame_skip_repeats_the_action_and_divides_the_rate(echo_world):
    world, episodes = _echo(echo_world, frame_skip=4)
    assert world.fps == 5
    assert [len(e.frames) for e in episodes] == [6, 6]


def test_worlds_that_cannot_be_recorded_are_refused_with_a_sentence(echo_world):
    with pytest.raises(DataError, match="Dict"):
        _echo(echo_world, space="dict")
    with pytest.raises(DataError, match="Box"):
        _echo(echo_world, space="endless")
    with pytest.raises(DataError, match=r"20 episodes .* before 32 frames .*had 21"):
        _echo(echo_world, min_frames=32)
    from ahriuwu_cli.data.gym import GymWorld

    with pytest.raises(UserError, match="did you mean 'Echo-v0'"):
        GymWorld(RecordConfig("Ecko-v0"))


def test_what_an_environment_raises_is_a_sentence_with_its_name(echo_world, monkeypatch):
    from ahriuwu_cli.data.gym import GymWorld, record_episodes

    needs = echo_world.error.DependencyNotInstalled("pygame is not installed")
    config = RecordConfig("Echo-v0", 16, 16)
    for pixels, call, error, kind, said in (
        (True, "step", ConnectionError("closed"), DataError, r"failed in step \(ConnectionError: closed\): see what"),
        (True, "reset", KeyError("a"), DataError, r"failed in reset \(KeyError: 'a'\)"),
        (False, "render", needs, UserError, "'Echo-v0' needs another package: pygame is not installed"),
        (True, "reset", ImportError("no module"), UserError, "'Echo-v0' needs another package: no module"),
        (True, "step", MemoryError("no"), MemoryError, "^no$"),
        (True, "step", SystemExit(0), DataError, r"failed in step \(SystemExit: 0\)"),
    ):
        echo_world.registry["Echo-v0"].kwargs = {"pixels": pixels}
        world = GymWorld(config)

        def fails(*_, error=error, **__):
            raise error

        monkeypatch.setattr(type(world._env.unwrapped), call, fails)
        with pytest.raises(kind, match=said):
            list(record_episodes(world, config))
        monkeypatch.undo()
        world.close()


def _odd(**named):
    def change(world, named=named):
        vars(world).update(named)

    return change


def _raising(error):
    def fails(*_, **__):
        raise error

    return fails


def _without(name):
    return lambda world: delattr(world, name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_raising(KeyError("rom")), r"failed in its start with its defaults \(KeyError: 'rom'\)"),
        (_raising(FileNotFoundError(2, "No such file", "/rom.bin")), r"failed in its start .*rom\.bin"),
        (_raising(SystemExit(0)), r"failed in its start .*SystemExit"),
        (_without("observation_space"), "failed in what it shows"),
        (_without("action_space"), "failed in what actions it takes"),
        (_odd(get_action_meanings=_raising(KeyError("a"))), "failed in what actions it takes"),
        (_odd(get_action_meanings=lambda: [1, 2, 3, 4, 5]), "failed in what actions it takes"),
        (_odd(get_action_meanings=lambda: None), "failed in what actions it takes"),
        (_odd(metadata=None), r"frame rate.*render_fps'\] is None"),
        (_odd(metadata={"render_fps": "fast"}), "is fast"),
        (_odd(metadata={"render_fps": float("nan")}), "is nan"),
        (_odd(metadata={"render_fps": 1e9}), "none from 0.01 to 1000 a second"),
        (_odd(reset=lambda **_: 7), "failed in reset"),
        (_odd(step=lambda _: (0, 0)), "failed in step"),
        (_odd(step=lambda _: (0, 0.0, np.array([1, 0]), False, {})), "failed in step"),
        (_odd(reset=lambda **_: (np.zeros((0, 16, 3), np.uint8), {})), r"shows uint8 \(0, 16, 3\)"),
        (_odd(reset=lambda **_: (None, {})), "shows NoneType"),
    ],
)
def test_whatever_is_wrong_with_an_environment_is_a_sentence(echo_world, change, said):
    with pytest.raises(DataError, match=said):
        _odd_world(echo_world, change)


def _odd_world(echo_world, change):
    made = echo_world.registry["Echo-v0"].entry_point

    def make(**options):
        world = made(**options)
        change(world)
        return world

    echo_world.registry["Echo-v0"].entry_point = make
    return _echo(echo_world)


def test_an_environment_that_prints_or_cannot_be_closed_is_recorded_all_the_same(echo_world, capsys):
    def speaks(world):
        before = world.reset
        vars(world).update(reset=lambda **options: print("hello") or before(**options), close=_raising(OSError("no")))

    assert len(_odd_world(echo_world, speaks)[1]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "hello\n" in err
    assert "warning: the environment 'Echo-v0' failed in close (OSError: no)" in err


def test_the_atari_paddle_goes_where_it_is_told():
    pytest.importorskip("ale_py")
    from ahriuwu_cli.data.gym import GymWorld

    world = GymWorld(RecordConfig("ALE/Breakout-v5"))
    assert world.fps == 15
    assert world.action_space.components[0].labels == ("NOOP", "FIRE", "RIGHT", "LEFT")

    def paddle(picture):
        return np.flatnonzero(picture[190, 8:152].max(-1) > 60).mean()

    start = paddle(world.reset(0))
    for _ in range(3):
        right, _ = world.step(world.action_space.parse("RIGHT"))
    middle = paddle(right)
    for _ in range(6):
        left, _ = world.step(world.action_space.parse("LEFT"))
    world.close()
    assert middle > start + 10
    assert paddle(left) < middle - 10


def test_an_atari_frame_is_the_brighter_of_the_last_two_raw_ones():
    pytest.importorskip("ale_py")
    from ahriuwu_cli.data.gym import GymWorld

    skipping, raw = (GymWorld(RecordConfig("ALE/SpaceInvaders-v5", frame_skip=n)) for n in (4, 1))
    np.testing.assert_array_equal(skipping.reset(0), raw.reset(0))
    assert raw._env.unwrapped.ale.getFloat("repeat_action_probability") == 0
    differ = 0
    for _ in range(40):
        right = raw.action_space.parse("RIGHT")
        pictures = [np.array(raw.step(right)[0]) for _ in range(4)]
        differ += (pictures[2] != pictures[3]).any()
        np.testing.assert_array_equal(skipping.step(right)[0], np.maximum(pictures[2], pictures[3]))
    assert differ > 0


def test_an_environment_that_leaves_the_folder_takes_the_dataset_nowhere(echo_world, tmp_path, monkeypatch, capsys):
    class Leaves(echo_world.spec("Echo-v0").entry_point):
        def reset(self, **options):
            os.chdir(tmp_path / "elsewhere")
            return super().reset(**options)

    monkeypatch.setitem(echo_world.registry, "Leaves-v0", echo_world.envs.registration.EnvSpec("Leaves-v0", Leaves))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    words = ("record", "gym:Leaves-v0", "--out", "d", "--episodes", "3", "--min-frames", "8", "--size", "16", "--json")
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    out, err = capsys.readouterr()
    assert stop.value.code == 0, err
    assert json.loads(out)["path"] == "d"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "elsewhere"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def _doom(**options):
    pytest.importorskip("vizdoom")
    from ahriuwu_cli.data.doom import record_doom

    return record_doom(RecordConfig("defend_the_center", **({"max_frames": 40} | options)))


def test_doom_recordings_repeat_with_the_seed_and_leave_no_litter(tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    first, again, other = (list(itertools.islice(_doom(seed=s), 2)) for s in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.frames, b.frames)
        np.testing.assert_array_equal(a.actions, b.actions)
    assert (first[0].frames[0] != first[1].frames[0]).any() or (first[0].actions != first[1].actions).any()
    assert (first[0].actions != other[0].actions).any()
    assert first[0].frames.shape == (40, 64, 64, 3)
    assert first[0].actions.shape == (39, 3)
    assert list(tmp_path.iterdir()) == []
    assert Path.cwd() == tmp_path


def test_an_engine_that_was_killed_is_a_sentence(tmp_path, monkeypatch):
    import tempfile

    from ahriuwu_cli.data.doom_guard import engines

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    episodes = _doom(seed=1)
    next(episodes)
    (folder,) = tmp_path.iterdir()
    for pid in set(engines(str(folder))) - {os.getpid()}:
        if b"vizdoom" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]:
            os.kill(pid, signal.SIGKILL)
    with pytest.raises(DataError, match="the game's engine has ended by itself"):
        list(episodes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("looked", [True, False])
def test_memory_shared_with_an_engine_that_is_gone_is_removed_and_that_of_another_stays(tmp_path, looked):
    from ahriuwu_cli.data.doom_guard import SHARED, Guard, instances

    if not SHARED.is_dir():
        pytest.skip("the system has no such folder")
    names = {kind: f"ahriuwutest{os.getpid()}{kind}" for kind in ("before", "mine", "foreign")}
    files, maps = {kind: SHARED / f"ViZDoomMQCtr{name}" for kind, name in names.items()}, []
    try:
        for kind, file in files.items():
            file.write_bytes(bytes(4096))
            if kind == "mine":
                guard = Guard(tmp_path / "litter")
            if kind != "foreign":
                with open(file, "r+b") as opened:
                    maps.append(mmap.mmap(opened.fileno(), 0))
        assert instances(os.getpid()) == {names["before"], names["mine"]}
        strange = Path(os.fsdecode(bytes(tmp_path) + b"/jos\xe9"))
        strange.write_bytes(bytes(4096))
        with open(strange, "r+b") as opened:
            maps.append(mmap.mmap(opened.fileno(), 0))
        assert instances(os.getpid()) == {names["before"], names["mine"]}  # a path is of any bytes
        time.sleep(looked)  # it looks every 10 ms from when its interpreter has started
        guard.end()
        assert {kind for kind, file in files.items() if file.exists()} == {"before", "foreign"}
    finally:
        for file in files.values():
            file.unlink(missing_ok=True)
        for each in maps:
            each.close()


def test_memory_of_an_engine_is_known_from_its_command_line_where_nobody_saw_it_start(tmp_path):
    """As on a machine so busy that recorder and engine are through before the guard's first look."""
    from ahriuwu_cli.data.doom_guard import SHARED, clear_away

    if not SHARED.is_dir():
        pytest.skip("the system has no such folder")
    (litter := tmp_path / "litter").mkdir()
    file = SHARED / f"ViZDoomSMahriuwutest{os.getpid()}"
    words = ["-c", "import time; time.sleep(99)", "+viz_instance_id", f"ahriuwutest{os.getpid()}"]
    engine = subprocess.Popen([sys.executable, *words], cwd=litter)
    try:
        file.write_bytes(bytes(4096))
        while b"+viz_instance_id" not in Path(f"/proc/{engine.pid}/cmdline").read_bytes():
            time.sleep(0.01)
        clear_away(str(litter), os.getpid(), set())
        assert engine.wait(10) == -signal.SIGKILL
        assert not file.exists()
        assert not litter.exists()
    finally:
        engine.kill()
        file.unlink(missing_ok=True)


def _pan(a, b):
    """How far the upper half of the picture moved to the right from a to b, in pixels, by the best match."""
    a, b = (x[10:60].astype(float).mean(-1) for x in (a, b))
    errors = {}
    for shift in range(-40, 41):
        left, right = max(0, shift), 160 + min(0, shift)
        errors[shift] = np.abs(b[:, left:right] - a[:, left - shift : right - shift]).mean()
    return min(errors, key=errors.get)


def test_a_doom_action_shows_in_the_very_next_frame_and_turns_its_own_way():
    pytest.importorskip("vizdoom")
    from ahriuwu_cli.data.doom import DoomWorld

    world = DoomWorld(RecordConfig("my_way_home"))
    plan = ["none", "none", "TURN_LEFT", "TURN_LEFT", "none", "TURN_RIGHT", "none"]
    frames = [np.array(world.reset(3))]
    for word in plan:
        frames.append(np.array(world.step(world.action_space.parse(word))[0]))
    world.close()
    pans = [_pan(a, b) for a, b in itertools.pairwise(frames)]
    # turning left moves the picture to the right
    for word, pan in zip(plan, pans, strict=True):
        assert np.sign(pan) == {"TURN_LEFT": 1, "TURN_RIGHT": -1}.get(word, 0), (plan, pans)


def test_recorded_doom_actions_play_back_to_the_recorded_frames():
    episode = next(_doom(seed=4))
    from ahriuwu_cli.data.doom import DoomWorld
    from ahriuwu_cli.data.resize import area_resize

    world = DoomWorld(RecordConfig("defend_the_center"))
    played = [area_resize(world.reset(episode.info["seed"]), 64, 64)]
    played += [area_resize(world.step(a)[0], 64, 64) for a in episode.actions]
    world.close()
    np.testing.assert_array_equal(np.stack(played), episode.frames)


def test_the_doom_scenarios_are_those_that_one_player_can_start():
    pytest.importorskip("vizdoom")
    from ahriuwu_cli.data.doom import scenario_names

    names = scenario_names()
    assert {"defend_the_center", "basic", "deathmatch", "take_cover"} <= set(names)
    assert not {"cig", "multi", "oblige", "doom2"} & set(names)


def test_deltas_become_an_axis_behind_the_buttons():
    pytest.importorskip("vizdoom")
    from ahriuwu_cli.data.doom import _action_space

    space, order = _action_space(["TURN_LEFT_RIGHT_DELTA", "ATTACK", "LOOK_UP_DOWN_DELTA", "USE"])
    assert space.column_names == ("ATTACK", "USE", "TURN_LEFT_RIGHT_DELTA", "LOOK_UP_DOWN_DELTA")
    assert [space.column_names[i] for i in order] == ["TURN_LEFT_RIGHT_DELTA", "ATTACK", "LOOK_UP_DOWN_DELTA", "USE"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("dom:basic", "did you mean 'doom'"), ("doom:", "names no world"), ("defend_the_centre", "defend_the_center"),
     ("zzzz", "give doom:SCENARIO")],
)  # fmt: skip
def test_an_unknown_source_is_answered_with_the_nearest(text, sentence):
    pytest.importorskip("vizdoom")
    from ahriuwu_cli.data.sources import parse_source

    with pytest.raises(UserError, match=sentence):
        parse_source(text)


def test_pictures_of_an_environment_need_no_screen_and_a_choice_of_the_user_stays(echo_world, monkeypatch):
    for before, after in ((None, "dummy"), ("x11", "x11")):
        monkeypatch.setenv("SDL_VIDEODRIVER", before or "")
        if before is None:
            monkeypatch.delenv("SDL_VIDEODRIVER")
        _echo(echo_world, pixels=False)
        assert os.environ["SDL_VIDEODRIVER"] == after


@pytest.mark.parametrize(
    ("free", "limit", "words"),
    [
        (11_999_999, -1, "12 MB in /dev/shm, which has 12.0 MB free: make room there"),
        (12_000_000, 11_999_999, "12 MB in one file of /dev/shm, and files are limited to 12 MB"),
        (12_000_000, 12_000_000, None),
        (12_000_000, -1, None),
    ],
)
def test_an_engine_without_room_for_what_it_shares_is_not_started(monkeypatch, tmp_path, capsys, free, limit, words):
    pytest.importorskip("vizdoom")
    from ahriuwu_cli.data import doom

    if not doom.SHARED.is_dir():
        pytest.skip("this system has no /dev/shm")
    started = []
    monkeypatch.setattr(doom.shutil, "disk_usage", lambda path: SimpleNamespace(free=free, total=64_000_000))
    monkeypatch.setattr(doom.resource, "getrlimit", lambda which: (limit, -1))
    monkeypatch.setattr(doom, "Guard", lambda folder: started.append(folder) or pytest.fail("started"))
    with pytest.raises((SystemExit, pytest.fail.Exception)) as stop:
        main(["record", "doom:basic", "--out", str(tmp_path / "d"), "--episodes", "1"])
    assert bool(started) == (words is None)
    if words is not None:
        assert stop.value.code == 1
        assert words in capsys.readouterr().err
        assert not (tmp_path / "d").exists()
