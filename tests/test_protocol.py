"""Windows are fixed, hashed and refused for other data; intervals cover what they claim to cover."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from worlds import NO_ACTIONS, SPACE, moving_pictures

from ahriuwu_cli import memory
from ahriuwu_cli.errors import DataError, UserError
from ahriuwu_cli.evaluation.controls import partners, random_actions, with_future
from ahriuwu_cli.evaluation.protocol import WindowManifest, make_manifest, paired_bootstrap, read_windows, student_975


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return moving_pictures(tmp_path_factory.mktemp("data") / "a")


def test_the_same_seed_draws_the_same_windows_of_held_out_episodes(store):
    one, same, other = (make_manifest(store, "test", 4, 6, 10, seed) for seed in (0, 0, 1))
    assert one == same
    assert one.hash == same.hash
    assert other.hash != one.hash
    assert {store.episode(e).split for e in one.episodes} == {"test"}
    assert one.keys[0] == f"{one.windows[0][0]}:{one.windows[0][1]}"


def test_a_manifest_comes_back_from_disk_as_it_was(store, tmp_path):
    manifest = make_manifest(store, "val", 4, 6, 10, 3)
    manifest.save(tmp_path / "windows.json")
    assert WindowManifest.load(tmp_path / "windows.json", store) == manifest
    assert [p.name for p in tmp_path.iterdir()] == ["windows.json"]


def test_windows_hold_their_episode_s_frames_and_actions(store):
    manifest = make_manifest(store, "test", 4, 6, 5, 0)
    frames, actions = read_windows(store, manifest)
    assert (frames.shape, actions.shape) == ((5, 10, 16, 16, 3), (5, 9, 2))
    episode, start = manifest.windows[3]
    np.testing.assert_array_equal(frames[3], store.frames(episode, start, start + 10))
    np.testing.assert_array_equal(actions[3], store.actions(episode, start, start + 9))
    part, _ = read_windows(store, manifest, 2, 4)
    np.testing.assert_array_equal(part, frames[2:4])


def test_a_manifest_of_other_data_is_refused(store, tmp_path):
    other = moving_pictures(tmp_path / "other", seed=1)
    make_manifest(store, "test", 4, 6, 5, 0).save(tmp_path / "windows.json")
    with pytest.raises(DataError, match="another dataset"):
        WindowManifest.load(tmp_path / "windows.json", other)


def test_an_edited_manifest_is_refused(store, tmp_path):
    file = tmp_path / "windows.json"
    make_manifest(store, "test", 4, 6, 5, 0).save(file)
    document = json.loads(file.read_text())
    document["windows"][0][1] += 1
    file.write_text(json.dumps(document))
    with pytest.raises(DataError, match="was edited"):
        WindowManifest.load(file, store)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("hash"),
        lambda d: d.update(format="other"),
        lambda d: d.update(windows=[]),
        lambda d: d.update(windows=[["000000", 1.5]]),
        lambda d: d.update(context=True),
        lambda d: d.update(surplus=1),
        lambda d: d.update(split="tset"),
    ],
)
def test_a_damaged_manifest_is_refused_in_a_sentence(store, tmp_path, damage):
    file = tmp_path / "windows.json"
    make_manifest(store, "test", 4, 6, 5, 0).save(file)
    document = json.loads(file.read_text())
    damage(document)
    file.write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"windows\.json is no window manifest"):
        WindowManifest.load(file, store)


def test_windows_outside_their_split_are_refused_even_with_a_fitting_hash(store, tmp_path):
    good = make_manifest(store, "test", 4, 6, 2, 0)
    train = store.episodes("train")[0].id
    for windows in (((train, 0),), ((good.windows[0][0], 25),)):
        WindowManifest(store.fingerprint, "test", 0, 4, 6, windows).save(tmp_path / "windows.json")
        with pytest.raises(DataError, match="does not have"):
            WindowManifest.load(tmp_path / "windows.json", store)


def test_a_window_that_is_listed_twice_is_refused_even_with_a_fitting_hash(store, tmp_path):
    good = make_manifest(store, "test", 4, 6, 2, 0)
    replace(good, windows=(*good.windows, good.windows[0])).save(tmp_path / "windows.json")
    with pytest.raises(DataError, match="it lists a window twice"):
        WindowManifest.load(tmp_path / "windows.json", store)


def test_impossible_wishes_for_windows_are_refused(store):
    with pytest.raises(DataError, match="ask for fewer"):
        make_manifest(store, "test", 4, 6, 1000, 0)
    with pytest.raises(DataError, match="no episode is long enough"):
        make_manifest(store, "test", 20, 20, 1, 0)
    with pytest.raises(UserError, match="did you mean 'test'"):
        make_manifest(store, "tset", 4, 6, 1, 0)
    with pytest.raises(UserError, match="--context must be at least 1, got 0"):
        make_manifest(store, "test", 0, 6, 1, 0)


def test_a_dataset_without_actions_gives_actions_of_no_width(tmp_path):
    store = moving_pictures(tmp_path / "mute", space=NO_ACTIONS)
    _, actions = read_windows(store, make_manifest(store, "test", 4, 6, 3, 0))
    assert actions.shape == (3, 9, 0)


def test_the_interval_covers_the_true_mean_95_times_in_100_with_clusters_of_any_number():
    rng = np.random.default_rng(0)
    for clusters in (2, 3, 5, 7, 8, 12, 40):
        episodes = np.repeat(np.arange(clusters), 6)
        hits = 0
        for trial in range(300):
            values = rng.normal(0, 1, clusters)[episodes] + rng.normal(0, 0.5, len(episodes))
            found = paired_bootstrap(values, episodes, resamples=1000, seed=trial)
            hits += found.lo <= 0 <= found.hi
        assert 0.91 <= hits / 300 <= 0.99, (clusters, hits)


def test_the_percentiles_of_many_episodes_are_expanded_as_published():
    """Hesterberg 2015, section 5.3: the tail is Phi(-sqrt(n / (n - 1)) t_(n-1)); t of 7 degrees of freedom by table."""
    values = np.array([3.0, 1, 4, 1, 5, 9, 2, 6])
    found = paired_bootstrap(values, list("abcdefgh"), seed=3)
    means = np.random.default_rng(3).multinomial(8, [1 / 8] * 8, size=2000) @ values / 8
    tail = 0.5 * math.erfc(math.sqrt(8 / 7) * 2.364624 / math.sqrt(2))
    assert (found.lo, found.hi) == pytest.approx(tuple(np.quantile(means, [tail, 1 - tail])), abs=1e-4)


def test_few_episodes_of_unequal_size_get_the_interval_of_a_ratio():
    values, episodes = np.array([1.0, 2, 3, 7, 9]), list("aabcc")
    found = paired_bootstrap(values, episodes)
    apart = np.array([3.0, 3, 16]) - found.value * np.array([2, 1, 2])  # sums of the episodes less what they should be
    half = 4.2706 * np.sqrt(3 / 2 * (apart**2).sum()) / 5  # Student's t with 2 degrees of freedom, by its expansion
    assert (found.value, found.lo, found.hi) == pytest.approx((4.4, 4.4 - half, 4.4 + half), abs=1e-3)
    assert student_975(1) == pytest.approx(12.7062, abs=1e-4)


def test_windows_of_one_episode_do_not_make_the_interval_narrower():
    values = np.array([0.0, 1, 2, 3, 4, 5])
    few = paired_bootstrap(values, np.arange(6))
    many = paired_bootstrap(np.repeat(values, 50), np.repeat(np.arange(6), 50))
    assert (many.lo, many.hi) == pytest.approx((few.lo, few.hi))


def test_nan_makes_the_whole_interval_nan_and_one_episode_has_no_ends():
    broken = paired_bootstrap(np.array([1.0, np.nan, 2]), ["a", "b", "c"])
    assert np.isnan([broken.value, broken.lo, broken.hi]).all()
    with np.errstate(all="raise"):
        endless = paired_bootstrap(np.array([1.0, np.inf] * 5), list("abcdefghij"))
    assert np.isnan([endless.value, endless.lo, endless.hi]).all()
    alone = paired_bootstrap(np.array([1.0, 3.0]), ["a", "a"])
    assert alone.value == 2
    assert np.isnan([alone.lo, alone.hi]).all()


def test_partners_are_a_derangement_and_of_other_episodes_where_possible():
    for episodes in (list("aabbcc"), list("abcabcabc"), list("aaab"), list("aaaa"), list("ab")):
        found = partners(episodes)
        assert sorted(found) == list(range(len(episodes)))
        assert all(found != np.arange(len(episodes)))
        if max(map(episodes.count, episodes)) * 2 <= len(episodes):
            assert all(episodes[i] != episodes[p] for i, p in enumerate(found))


def test_random_actions_belong_to_a_window_and_a_seed():
    a = random_actions(SPACE, ["x:1", "y:2"], 20, seed=0)
    assert a.shape == (2, 20, 2)
    np.testing.assert_array_equal(a[1:], random_actions(SPACE, ["y:2"], 20, seed=0))
    assert (a[0] != a[1]).any()
    assert (a != random_actions(SPACE, ["x:1", "y:2"], 20, seed=1)).any()


def test_only_actions_that_lead_to_generated_frames_are_replaced():
    true, other = np.zeros((1, 9, 2), np.float32), np.ones((1, 9, 2), np.float32)
    changed = with_future(true, other, context=4)
    assert changed[0, :, 0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]  # actions[3] leads to frame 4, the first generated
    assert not true.any()


def test_windows_that_this_machine_cannot_hold_are_refused_before_they_are_read(store, monkeypatch):
    manifest = make_manifest(store, "test", 4, 6, 3, 0)
    size = read_windows(store, manifest)[0].nbytes
    monkeypatch.setattr(memory, "ALWAYS", 0)
    monkeypatch.setattr(memory, "most", lambda: size)
    read_windows(store, manifest)
    monkeypatch.setattr(memory, "most", lambda: size - 1)
    with pytest.raises(MemoryError):
        read_windows(store, manifest)
