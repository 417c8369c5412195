"""The episode store: exact round trips, honest splits, nothing left behind, nothing read that was not checked."""

import json
import pickle
import shutil
import time
import tracemalloc

import numpy as np
import pytest

from ahriuwu_cli.data.action_component import ActionComponent
from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.episode_writer import EpisodeWriter
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.resize import area_resize
from ahriuwu_cli.data.splits import split_episodes
from ahriuwu_cli.data.tensors import read_header, read_rows
from ahriuwu_cli.data.windows import draw_windows, enumerate_windows
from ahriuwu_cli.errors import DataError, UserError

SPACE = ActionSpace((ActionComponent("action", "discrete", 4),))


def _episode(seed, frames=12):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (frames, 16, 16, 3), np.uint8), rng.integers(0, 4, (frames - 1, 1)).astype(np.float32)


def _write(path, episodes, **options):
    options = {"height": 16, "width": 16, "fps": 10.0, "action_space": SPACE} | options
    with EpisodeWriter(path, **options) as writer:
        for frames, actions in episodes:
            writer.add(frames, actions)
    return EpisodeStore.open(path)


def test_windows_of_frames_and_actions_come_back_bit_for_bit(tmp_path):
    episodes = [_episode(i) for i in range(5)] + [(_episode(9)[0], None)]
    store = _write(tmp_path / "d", episodes)
    assert [e.labelled for e in store.episodes()] == [True] * 5 + [False]
    for entry, (frames, actions) in zip(store.episodes(), episodes, strict=True):
        np.testing.assert_array_equal(store.frames(entry.id, 3, 9), frames[3:9])
        if actions is not None:
            np.testing.assert_array_equal(store.actions(entry.id), actions)
            assert len(store.actions(entry.id)) == entry.frames - 1
    with pytest.raises(DataError, match="no actions"):
        store.actions("000005")
    with pytest.raises(IndexError):
        store.frames("000000", 0, 13)
    assert pickle.loads(pickle.dumps(store)).fingerprint == store.fingerprint


def test_a_dataset_may_be_written_through_a_link_to_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    store = _write(tmp_path / "link", [_episode(0)])
    np.testing.assert_array_equal(store.frames("000000", 0, 12), _episode(0)[0])
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "lost").symlink_to("nowhere")
    for name, sentence in (("lost", "lost exists and is not a folder"), ("lost/below", "is a link that leads nowhere")):
        with pytest.raises(UserError, match=sentence):
            _write(tmp_path / name, [_episode(0)])


def test_safetensors_itself_reads_the_same(tmp_path):
    from safetensors.numpy import load_file

    store = _write(tmp_path / "d", [_episode(0)])
    file = store.file("000000")
    for name, tensor in load_file(file).items():
        info = read_header(file)[name]
        np.testing.assert_array_equal(read_rows(file, info, 0, len(tensor)), tensor)
        np.testing.assert_array_equal(read_rows(file, info, 1, len(tensor), every=3), tensor[1::3])


def test_the_fingerprint_tells_contents_apart(tmp_path):
    same = _write(tmp_path / "a", [_episode(0)], name="x").fingerprint
    assert _write(tmp_path / "b", [_episode(0)], name="x").fingerprint == same
    assert _write(tmp_path / "c", [_episode(1)], name="x").fingerprint != same


@pytest.mark.parametrize("n", [3, 4, 10, 64, 101])
def test_every_split_gets_an_episode_and_the_shares_hold(n):
    splits = split_episodes(n, (0.8, 0.1, 0.1), seed=0)
    counts = [splits.count(s) for s in ("train", "val", "test")]
    assert sum(counts) == n
    assert min(counts) >= 1
    assert abs(counts[0] - 0.8 * n) <= 1.5
    assert splits == split_episodes(n, (0.8, 0.1, 0.1), seed=0)
    assert n < 10 or splits != split_episodes(n, (0.8, 0.1, 0.1), seed=1)


def test_a_single_episode_is_for_training_and_a_share_of_zero_gets_nothing():
    assert split_episodes(1, (0.8, 0.1, 0.1), 0) == ["train"]
    assert sorted(split_episodes(2, (0.8, 0.1, 0.1), 0)) == ["train", "val"]
    assert "test" not in split_episodes(20, (0.9, 0.1, 0.0), 0)


@pytest.mark.parametrize("fractions", [(0.5, 0.1, 0.1), (0, 0.5, 0.5), (1.2, -0.1, -0.1), (float("nan"), 0.5, 0.5)])
def test_shares_that_are_not_shares_are_refused(fractions):
    with pytest.raises(UserError, match="splits"):
        split_episodes(10, fractions, 0)


def test_identical_episodes_stay_in_one_split(tmp_path):
    store = _write(tmp_path / "d", [_episode(i % 4) for i in range(12)], fractions=(0.4, 0.3, 0.3))
    homes = {}
    for e in store.episodes():
        homes.setdefault(e.sha256, set()).add(e.split)
    assert len(homes) == 4
    assert all(len(splits) == 1 for splits in homes.values())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_recording_leaves_nothing_and_keeps_the_old_dataset(tmp_path, error):
    old = _write(tmp_path / "d", [_episode(0)]).fingerprint

    def broken():
        yield _episode(1)
        raise error

    with pytest.raises(error):
        _write(tmp_path / "d", broken(), overwrite=True)
    with pytest.raises(error):
        _write(tmp_path / "new" / "deep", broken())
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    assert EpisodeStore.open(tmp_path / "d").fingerprint == old


def test_overwriting_takes_the_flag_and_never_takes_what_is_no_dataset(tmp_path):
    _write(tmp_path / "d", [_episode(0)])
    with pytest.raises(UserError, match="--overwrite"):
        _write(tmp_path / "d", [_episode(1)])
    assert len(_write(tmp_path / "d", [_episode(1)] * 2, overwrite=True).episodes()) == 2
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="left alone"):
        _write(tmp_path / "home", [_episode(1)], overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "home"]


def _with(frames=None, actions=None):
    good = _episode(0)
    return (good[0] if frames is None else frames, good[1] if actions is None else actions)


@pytest.mark.parametrize(
    ("episode", "sentence"),
    [
        (_with(frames=_episode(0)[0][:, :8]), "frames are"),
        (_with(frames=_episode(0)[0].astype(np.float32)), "frames are"),
        (_with(frames=_episode(0)[0][:1]), "at least 2"),
        (_with(actions=_episode(0)[1][:-1]), "need 11 actions, not 10"),
        (_with(actions=np.zeros((12, 1), np.float32)), "need 11 actions, not 12"),
        (_with(actions=np.full((11, 1), 9, np.float32)), "0 to 3"),
    ],
)
def test_the_writer_refuses_what_does_not_fit(tmp_path, episode, sentence):
    with pytest.raises(DataError, match=sentence):
        _write(tmp_path / "d", [episode])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [{"fps": 0.001}, {"fps": 1e9}, {"frame_skip": 0}, {"height": 5000}, {"seed": 1.5}, {"name": 3}]
)
def test_what_a_reader_would_refuse_is_refused_before_the_first_frame_and_replaces_nothing(tmp_path, options):
    old = _write(tmp_path / "d", [_episode(0)]).fingerprint
    with pytest.raises(DataError, match=rf"d/dataset\.json: {next(iter(options))} is"):
        _write(tmp_path / "d", iter(()), overwrite=True, **options)
    broken = EpisodeWriter(tmp_path / "d", height=16, width=16, fps=1.0, action_space=SPACE, overwrite=True)
    with pytest.raises(DataError, match=r"d/dataset\.json: an episode: source is 3"), broken as writer:
        writer.add(*_episode(1), source=3)
    assert EpisodeStore.open(tmp_path / "d").fingerprint == old
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def _edit(key, value):
    def change(path):
        document = json.loads((path / "dataset.json").read_text())
        target = document["episodes"][0] if key in document["episodes"][0] else document
        target[key] = value
        (path / "dataset.json").write_text(json.dumps(document))

    return change


def _cut(path):
    file = path / "episodes" / "000000.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def _huge_header(path):
    file = path / "episodes" / "000000.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + file.read_bytes()[8:])


def _link_out(path):
    file = path / "episodes" / "000000.safetensors"
    shutil.move(file, path.parent / "elsewhere.safetensors")
    file.symlink_to(path.parent / "elsewhere.safetensors")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_edit("format", "zarr"), "format"),
        (_edit("fps", 0), "fps"),
        (_edit("fps", float("nan")), "fps"),
        (_edit("height", "16"), "height"),
        (_edit("height", 32), "holds"),
        (_edit("frames", 13), "holds"),
        (_edit("id", "../../000000"), "digits"),
        (_edit("split", "held-out"), "split"),
        (_edit("labelled", False), "holds"),
        (_edit("surprise", 1), "surprise"),
        (_edit("episodes", []), "no episodes"),
        (lambda p: (p / "dataset.json").write_text("{"), "not JSON"),
        (lambda p: (p / "dataset.json").unlink(), "not a dataset"),
        (lambda p: (p / "episodes" / "000000.safetensors").unlink(), "No such file"),
        (_cut, "does not lie within"),
        (_huge_header, "cut short"),
        (_link_out, "points out"),
    ],
)
def test_a_damaged_dataset_is_refused_with_a_sentence(tmp_path, damage, sentence):
    _write(tmp_path / "d", [_episode(0)])
    damage(tmp_path / "d")
    with pytest.raises(DataError, match=sentence):
        EpisodeStore.open(tmp_path / "d")


def test_drawn_windows_are_different_inside_spread_and_the_same_for_a_seed():
    lengths = {"a": 30, "b": 100, "c": 9, "d": 50}
    windows = draw_windows(lengths, 10, 30, seed=3)
    assert len(set(windows)) == 30
    assert set(windows) <= set(enumerate_windows(lengths, 10))
    assert {n: sum(w[0] == n for w in windows) for n in "abd"} == {"a": 10, "b": 10, "d": 10}
    assert {w[0] for w in windows[:3]} == {"a", "b", "d"}
    assert windows == draw_windows(lengths, 10, 30, seed=3)
    assert windows != draw_windows(lengths, 10, 30, seed=4)
    everything = enumerate_windows(lengths, 10)
    assert list(everything) == [(n, s) for n, frames in lengths.items() for s in range(frames - 9)]
    assert everything[-1] == ("d", 40)
    with pytest.raises(IndexError):
        everything[len(everything)]
    assert sorted(draw_windows(lengths, 10, len(everything), 0)) == sorted(everything)


def test_the_first_of_the_drawn_windows_is_of_any_episode_and_of_any_time_in_it():
    lengths = dict.fromkeys("abcdefgh", 109)  # of 100 starts each
    first = [draw_windows(lengths, 10, 32, seed)[0] for seed in range(200)]
    assert {name for name, _ in first} == set(lengths)
    assert np.histogram([start for _, start in first], 4, (0, 100))[0].min() > 30  # of 50


def test_windows_are_drawn_from_many_episodes_in_little_time():
    begun = time.process_time()
    assert len(set(draw_windows(dict.fromkeys(map(str, range(30_000)), 9), 9, 20_000, seed=0))) == 20_000
    many = {"long": 30_000, **dict.fromkeys(map(str, range(3000)), 9)}
    assert len(set(draw_windows(many, 9, 20_000, seed=0))) == 20_000
    assert time.process_time() - begun < 2  # 0.1; in time that grew with the square it was 9


def test_windows_that_cannot_be_had_are_refused_with_the_lengths():
    with pytest.raises(DataError, match="64 frames: the longest of 2 has 30"):
        draw_windows({"a": 30, "b": 12}, 64, 4, 0)
    with pytest.raises(DataError, match="hold 21"):
        draw_windows({"a": 30}, 10, 22, 0)
    with pytest.raises(DataError, match="no episode"):
        draw_windows({}, 10, 1, 0)


def test_area_resize_is_the_exact_mean_of_what_each_pixel_covers():
    frame = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    fine = np.kron(frame.astype(float), np.ones((8, 8, 1)))  # a common multiple, then plain block means
    expected = fine.reshape(8, 12, 16, 10, 3).mean((1, 3))
    assert np.abs(area_resize(frame, 8, 16) - expected).max() <= 0.501


def test_a_large_picture_is_resized_in_little_memory_and_as_its_parts_are():
    frame = np.random.default_rng(0).integers(0, 256, (1536, 1100, 3), np.uint8)
    tracemalloc.start()
    try:
        whole = area_resize(frame, 64, 48)
        assert tracemalloc.get_traced_memory()[1] < frame.nbytes  # half of it; it was 8 times
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(whole[:16], area_resize(frame[:384], 16, 48))
