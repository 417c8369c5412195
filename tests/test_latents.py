"""Latent packs: encoded once per tokenizer, never mixed up, windows that stay within an episode."""

import gc
import resource
import warnings

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from small import small_dataset

from ahriuwu_cli.data.latents import open_pack
from ahriuwu_cli.errors import DataError
from ahriuwu_cli.training.assemble import fit_linear_tokenizer


@pytest.fixture
def store(tmp_path):
    return small_dataset(tmp_path / "data", episodes=6, frames=20)


def test_a_pack_holds_the_tokenizers_latents_and_the_actions_that_leave_each_frame(store):
    tokenizer = fit_linear_tokenizer(store, (8, 8), 6, 0.5)
    pack = open_pack(store, tokenizer)
    for i, episode in enumerate(pack.ids):
        latents, actions, labelled = pack.read([(i, 0)], 20)
        whole = tokenizer.encode(torch.from_numpy(store.frames(episode))[None])
        assert torch.allclose(latents, whole, atol=2e-3 * float(whole.abs().max()))
        assert np.array_equal(actions[0].numpy(), store.actions(episode))
        assert bool(labelled[0])


def test_a_second_opening_does_not_encode_again_and_another_tokenizer_does(store, monkeypatch):
    first, second = fit_linear_tokenizer(store, (8, 8), 6, 0.5), fit_linear_tokenizer(store, (8, 8), 6, 0.0)
    path = open_pack(store, first).path
    stamp = path.stat().st_mtime_ns
    assert open_pack(store, first).path.stat().st_mtime_ns == stamp
    assert open_pack(store, second).path != path  # equal shapes, another hash


def test_windows_are_uniform_over_all_starts_and_never_cross_an_episodes_end(store):
    pack = open_pack(store, fit_linear_tokenizer(store, (8, 8), 6, 0.5))
    drawn = pack.draw(20_000, 8, np.random.default_rng(0))
    assert max(s for _, s in drawn) == 12
    counts = np.unique(np.array(drawn), axis=0, return_counts=True)[1]
    assert len(counts) == len(pack.ids) * 13
    expected = 20_000 / len(counts)
    assert ((counts - expected) ** 2 / expected).sum() < len(counts) + 5 * (2 * len(counts)) ** 0.5  # chi-square


def test_a_pack_is_closed_when_nobody_has_it_any_more(store):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        open_pack(store, fit_linear_tokenizer(store, (8, 8), 6, 0.5))
        gc.collect()
    assert [str(warning.message) for warning in said] == []


def test_windows_longer_than_every_episode_are_refused(store):
    pack = open_pack(store, fit_linear_tokenizer(store, (8, 8), 6, 0.5))
    with pytest.raises(DataError, match="longest has 20"):
        pack.draw(1, 21, np.random.default_rng(0))


def test_only_the_split_asked_for_is_packed(store):
    pack = open_pack(store, fit_linear_tokenizer(store, (8, 8), 6, 0.5))
    assert set(pack.ids) == {e.id for e in store.episodes("train")}


def test_a_damaged_pack_is_named(store):
    tokenizer = fit_linear_tokenizer(store, (8, 8), 6, 0.5)
    path = open_pack(store, tokenizer).path
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=path.name):
        open_pack(store, tokenizer)


def test_unlabelled_episodes_are_packed_and_marked(tmp_path):
    store = small_dataset(tmp_path / "silent", episodes=4, labelled=False)
    pack = open_pack(store, fit_linear_tokenizer(store, (8, 8), 6, 0.5))
    assert not pack.labelled.any()


def test_windows_read_are_the_rows_that_safetensors_reads(store):
    pack = open_pack(store, fit_linear_tokenizer(store, (8, 8), 6, 0.5))
    whole = load_file(pack.path)
    windows = pack.draw(50, 7, np.random.default_rng(0))
    latents, actions, _ = pack.read(windows, 7)
    assert (latents.dtype, actions.dtype) == (torch.float32, torch.float32)
    for i, (episode, start) in enumerate(windows):
        row = int(pack.lengths[:episode].sum()) + start
        assert np.array_equal(latents[i].numpy(), whole["latents"][row : row + 7].astype(np.float32))
        assert np.array_equal(actions[i].numpy(), whole["actions"][row : row + 6])
    every = torch.from_numpy(whole["latents"].astype(np.float32)).flatten(0, 1).std(0)
    assert torch.equal(pack.spread(), every)


def test_drawing_does_not_look_at_every_episode_every_time_and_draws_as_ever(store, monkeypatch):
    pack = open_pack(store, fit_linear_tokenizer(store, (8, 8), 6, 0.5))
    pack.lengths = np.random.default_rng(1).integers(2, 60, 100_000)

    def slow(count, frames, rng):
        room = np.maximum(pack.lengths - frames + 1, 0)
        ends = np.cumsum(room)
        flat = rng.integers(0, ends[-1], count)
        episodes = np.searchsorted(ends, flat, side="right")
        return [(int(e), int(f - (ends[e] - room[e]))) for e, f in zip(episodes, flat, strict=True)]

    for frames in (2, 12, 59):
        expected = slow(64, frames, np.random.default_rng(frames))
        assert pack.draw(64, frames, np.random.default_rng(frames)) == expected
        with monkeypatch.context() as patch:
            patch.setattr(np, "cumsum", None)
            patch.setattr(np, "maximum", None)
            assert pack.draw(64, frames, np.random.default_rng(frames)) == expected


def test_a_pack_that_is_cut_short_while_training_reads_is_a_sentence_and_no_crash(store):
    pack = open_pack(store, fit_linear_tokenizer(store, (8, 8), 6, 0.5))
    with open(pack.path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(DataError, match="cut short"):
        pack.read([(len(pack.ids) - 1, 0)], 20)


def test_many_episodes_do_not_need_as_many_open_files(tmp_path):
    store = small_dataset(tmp_path / "many", episodes=150, frames=4)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, before[1]))
    try:
        pack = open_pack(store, fit_linear_tokenizer(store, (8, 8), 6, 0.5))
        frames = [store.frames(e.id) for e in store.episodes()]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(frames) == 150
    assert len(pack.ids) == len(store.episodes("train"))
