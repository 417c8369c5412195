"""Latent packs: encoded once per tokenizer, never mixed up, windows that stay within an episode."""

import numpy as np
import pytest
import torch
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
