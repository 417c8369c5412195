"""The validator sees tampering, actions out of range, leakage between splits, and pictures without content."""

import hashlib
import json
import time
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small import small_dataset

from ahriuwu_cli.data import describe as describing
from ahriuwu_cli.data import episodes
from ahriuwu_cli.data import validate as validation
from ahriuwu_cli.data.action_component import ActionComponent
from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.describe import as_text, describe
from ahriuwu_cli.data.episode_writer import EpisodeWriter
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.validate import validate
from ahriuwu_cli.errors import DataError

SPACE = ActionSpace((ActionComponent("action", "discrete", 4),))


def _clip(seed, t=40):
    return np.random.default_rng(seed).integers(0, 256, (t, 8, 8, 3), np.uint8)


def _store(path, clips):
    with EpisodeWriter(path, height=8, width=8, fps=10, action_space=SPACE, fractions=(0.4, 0.3, 0.3)) as writer:
        for i, clip in enumerate(clips):
            rng = np.random.default_rng(i)
            writer.add(clip, rng.integers(0, 4, (len(clip) - 1, 1)).astype(np.float32))
    return EpisodeStore.open(path)


def _failed(store):
    return {c.name for c in validate(store) if not c.ok and not c.warning}


def _warned(store):
    return {c.name for c in validate(store) if not c.ok and c.warning}


def test_a_sound_dataset_passes_every_check(tmp_path):
    assert all(c.ok for c in validate(_store(tmp_path / "d", map(_clip, range(6)))))


def test_a_changed_pixel_is_seen_by_its_hash(tmp_path):
    store = _store(tmp_path / "d", map(_clip, range(6)))
    data = bytearray(store.file("000002").read_bytes())
    data[-5] ^= 1
    store.file("000002").write_bytes(data)
    assert _failed(EpisodeStore.open(tmp_path / "d")) == {"contents match their hashes"}


def _rewrite(store, episode_id, **tensors):
    """Change tensors and the recorded hash with them, as a tool that writes wrong data would."""
    file = store.file(episode_id)
    save_file(load_file(file) | tensors, file)
    document = json.loads((store.path / "dataset.json").read_text())
    for entry in document["episodes"]:
        if entry["id"] == episode_id:
            entry["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (store.path / "dataset.json").write_text(json.dumps(document))
    return EpisodeStore.open(store.path)


def test_actions_that_are_nan_or_out_of_range_are_seen(tmp_path):
    for i, value in enumerate((np.nan, 4.0, 1.5)):
        store = _store(tmp_path / str(i), map(_clip, range(3)))
        actions = store.actions("000001")
        actions[7] = value
        assert _failed(_rewrite(store, "000001", actions=actions)) == {"actions"}


def test_an_episode_that_stands_in_two_splits_is_seen(tmp_path):
    store = _store(tmp_path / "d", map(_clip, range(6)))
    here, there = (store.episodes(s)[0].id for s in ("train", "test"))
    twin = _rewrite(store, there, **load_file(store.file(here)))
    assert _failed(twin) == {"no episode in two splits", "no 16 equal frames in two splits"}


def test_a_run_of_frames_shared_by_two_splits_is_seen_but_a_standing_picture_is_not(tmp_path):
    store = _store(tmp_path / "d", map(_clip, range(6)))
    here, there = (store.episodes(s)[0].id for s in ("train", "test"))
    clip = store.frames(there)
    clip[5:25] = store.frames(here)[11:31]
    assert _failed(_rewrite(store, there, frames=clip)) == {"no 16 equal frames in two splits"}

    still = [_clip(i) for i in range(6)]
    for clip in still:
        clip[10:35] = _clip(99, 1)  # all share a long standing title screen
    assert not _failed(_store(tmp_path / "e", still))


@pytest.mark.parametrize("check", [False, True])
def test_a_dataset_that_goes_away_while_it_is_read_is_a_sentence(tmp_path, monkeypatch, check):
    store = small_dataset(tmp_path / "d")
    monkeypatch.setattr(EpisodeStore, "open", lambda *_, **__: store)
    store.file(store.episodes()[0].id).unlink()
    with pytest.raises(DataError, match=r"000000\.safetensors went away while .* was read"):
        describe(tmp_path / "d", check)


def test_black_and_frozen_episodes_are_warnings(tmp_path):
    clips = [_clip(i) for i in range(6)]
    clips[1] = np.zeros_like(clips[1])
    assert _warned(_store(tmp_path / "a", clips)) == {"pictures", "motion"}
    clips[1] = np.repeat(_clip(7, 1), 40, 0)
    assert _warned(_store(tmp_path / "b", clips)) == {"motion"}
    clips[1] = np.repeat(_clip(7, 1), 12, 0)  # a short one, of whose frames the first has none before it
    assert _warned(_store(tmp_path / "short", clips)) == {"motion"}
    assert not _failed(EpisodeStore.open(tmp_path / "b"))
    assert _warned(_store(tmp_path / "c", clips[2:4])) == {"splits"}


def test_a_long_episode_is_looked_at_in_little_memory_and_as_a_short_one_is(tmp_path, monkeypatch):
    space = ActionSpace((ActionComponent("a", "continuous", 200, (), (-1,) * 200, (1,) * 200),))
    with EpisodeWriter(tmp_path / "d", height=1, width=2, fps=10, action_space=space) as writer:
        for seed in range(3):
            rng = np.random.default_rng(seed)
            frames, actions = rng.integers(0, 256, (3000, 1, 2, 3), np.uint8), rng.random((2999, 200), np.float32)
            frames[100:120] = frames[119]  # which stands still
            writer.add(frames, actions)
    store = EpisodeStore.open(tmp_path / "d")
    actions = store.actions("000001")
    actions[2000, 3] = 2
    _rewrite(store, "000001", actions=actions)
    at_once = describe(tmp_path / "d", check=True)
    monkeypatch.setattr(episodes, "BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(validation, "BLOCK_FRAMES", 7)
    tracemalloc.start()
    try:
        in_blocks = describe(tmp_path / "d", check=True)
        assert tracemalloc.get_traced_memory()[1] < actions.nbytes  # a half; it was 5 times
    finally:
        tracemalloc.stop()
    assert in_blocks["checks"] == at_once["checks"]
    assert "at step 2000, column 'a3' is 2" in str(in_blocks["checks"])
    assert in_blocks["actions_outside"] == 1
    for one, other in zip(at_once["actions"]["a"], in_blocks["actions"]["a"], strict=True):
        assert (one["mean"], one["std"]) == pytest.approx((other["mean"], other["std"]), rel=1e-9)


def test_of_many_actions_an_even_sample_is_looked_at_and_that_is_said(tmp_path, monkeypatch):
    space = ActionSpace((ActionComponent("a", "binary", 2, ("x", "y")), ActionComponent("g", "discrete", 3)))
    rows = space.random(7 * 33, (1, 1), np.random.default_rng(0)).reshape(7, 33, 3)
    with EpisodeWriter(tmp_path / "d", height=1, width=2, fps=10, action_space=space) as writer:
        for seed, each in enumerate(rows):
            writer.add(np.random.default_rng(seed).integers(0, 256, (34, 1, 2, 3), np.uint8), each)
    written = np.concatenate([EpisodeStore.open(tmp_path / "d").actions(f"{i:06d}") for i in range(7)])
    monkeypatch.setattr(describing, "RUN", 10)
    monkeypatch.setattr(describing, "FEW", 1)
    for most, every in ((7 * 33 * 3, 1), (7 * 33 * 3 - 1, 2), (7 * 33, 3), (100, 7)):
        monkeypatch.setattr(describing, "MOST_VALUES", most)
        facts = describe(tmp_path / "d")
        taken = np.concatenate([written[i : i + 10] for i in range(0, len(written), 10 * every)])  # across episodes
        assert (facts["actions_read"], facts["actions_stored"]) == (len(taken), 7 * 33)
        assert [row["share"] for row in facts["actions"]["a"]] == pytest.approx(taken[:, :2].mean(0))
        assert [row["share"] for row in facts["actions"]["g"]] == [(taken[:, 2] == i).mean() for i in range(3)]
        assert (f"looked at {len(taken)} of 231 steps, evenly spread" in as_text(facts)) == (every > 1)


def test_a_file_of_sixty_gigabytes_that_takes_none_is_described_at_once(tmp_path, monkeypatch):
    small_dataset(tmp_path / "d", episodes=3, frames=6)
    document = json.loads((tmp_path / "d" / "dataset.json").read_text())
    document["height"] = document["width"] = 8
    entry, steps = document["episodes"][0], 300_000_000
    entry["frames"], document["episodes"] = steps + 1, [entry]
    (tmp_path / "d" / "dataset.json").write_text(json.dumps(document))
    ends = [0, 8 * steps, 8 * steps + 192 * (steps + 1)]
    header = json.dumps({
        "actions": {"dtype": "F32", "shape": [steps, 2], "data_offsets": ends[:2]},
        "frames": {"dtype": "U8", "shape": [steps + 1, 8, 8, 3], "data_offsets": ends[1:]},
    }).encode()  # fmt: skip
    header += b" " * (-len(header) % 8)
    with open(tmp_path / "d" / "episodes" / f"{entry['id']}.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + ends[2])
    monkeypatch.setattr(describing, "MOST_VALUES", 3_200_000)  # a tenth of what is looked at otherwise
    begun = time.process_time()
    assert 10**6 < describe(tmp_path / "d")["actions_read"] < 2 * 10**6
    assert time.process_time() - begun < 2
