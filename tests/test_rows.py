"""Rows that no recorder and no encoder of ours wrote, under hashes that fit them, are refused by name, not learned."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small import small_dataset, small_world

from ahriuwu_cli.data import pack_format
from ahriuwu_cli.data.action_component import ActionComponent
from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.latents import LatentPack, open_pack
from ahriuwu_cli.data.pack_check import check_packs
from ahriuwu_cli.disk import file_hash
from ahriuwu_cli.errors import DataError
from ahriuwu_cli.training.checkpoint import save_world

SPACE = ActionSpace(
    (
        ActionComponent("gear", "discrete", 3),
        ActionComponent("keys", "binary", 1, ("FIRE",)),
        ActionComponent("axes", "continuous", 1, ("steer",), (1.0,), (3.0,)),
    )
)
OUTSIDE = [(0, 7), (0, -1), (0, 0.5), (0, 1e30), (0, np.nan), (1, 5), (1, np.inf), (2, 0), (2, 9), (2, -np.inf)]


def reseal(path, change) -> None:
    """Change the actions of every episode, and write the hashes that fit."""
    document = json.loads((path / "dataset.json").read_text())
    for entry in document["episodes"]:
        file = path / "episodes" / f"{entry['id']}.safetensors"
        tensors = load_file(file)
        change(tensors["actions"])
        save_file(tensors, file)
        entry["sha256"] = file_hash(file)
    (path / "dataset.json").write_text(json.dumps(document))


def reseal_pack(path, change) -> None:
    """Change the rows of a pack, latents and actions as they lie in the file, and write the hashes that fit."""
    facts, layout = pack_format.read_pack_header(path)
    tensors = load_file(path)
    change(tensors["latents"], tensors["actions"])
    with open(path, "r+b") as file:
        for name, rows in tensors.items():
            file.seek(layout.offsets[name])
            file.write(rows.tobytes())
        file.flush()
        hashes = [pack_format.hash_part(file.fileno(), layout, part) for part in pack_format.parts_of(facts)]
        for entry in facts["episodes"]:
            entry["parts"] = [hashes.pop(0) for _ in entry["parts"]]
        file.seek(0)
        file.write(pack_format.pack_header(path, layout.shapes, facts))


@pytest.mark.parametrize(("column", "value"), OUTSIDE)
def test_actions_outside_the_space_are_refused_where_they_are_read(tmp_path, column, value):
    small_dataset(tmp_path / "d", episodes=3, frames=12, space=SPACE)
    reseal(tmp_path / "d", lambda actions: actions.__setitem__((5, column), value))
    store = EpisodeStore.open(tmp_path / "d")
    assert len(store.actions("000000", 0, 5)) == 5
    with pytest.raises(DataError, match=rf"000000\.safetensors: the action at step 5, .*{SPACE.column_names[column]}"):
        store.actions("000000", 3, 8)
    with pytest.raises(DataError, match=r"the action at step 5"):
        open_pack(store, small_world().tokenizer)


def test_info_counts_what_lies_outside_apart_and_its_check_names_it(tmp_path, run, recwarn):
    small_dataset(tmp_path / "d", episodes=3, frames=12, space=SPACE)
    sound = json.loads(run("info", tmp_path / "d", "--json")[1])
    assert sound["actions_outside"] == 0
    for value in (np.nan, np.inf, 1e30):
        reseal(tmp_path / "d", lambda actions: actions.__setitem__((5, 2), value))  # noqa: B023
        code, out, err = run("info", tmp_path / "d", "--json")
        facts = json.loads(out, parse_constant=pytest.fail)
        assert (code, err, facts["actions_outside"]) == (0, "", 3)
        assert 1 <= facts["actions"]["axes"][0]["mean"] <= 3
        assert "3 steps lie outside the action space" in run("info", tmp_path / "d")[1]
        code, out, _ = run("info", tmp_path / "d", "--check")
        assert (code, "FAIL  actions" in out) == (1, True)
    assert not list(recwarn)


def test_the_prompts_that_a_world_brings_are_held_to_its_space_as_well(tmp_path, run):
    small_dataset(tmp_path / "d")
    save_world(small_world(), tmp_path / "w")
    options = ("--prompts", tmp_path / "d", "--frames", 6, "--clips", 2)
    code, _, err = run("export", tmp_path / "w", "--out", tmp_path / "x", *options)
    assert code == 0, err
    reseal(tmp_path / "x" / "prompt", lambda actions: actions.__setitem__((1, 0), 5))
    code, _, err = run("rollout", tmp_path / "x", "--out", tmp_path / "o", "--context", 4, "--length", 2)
    assert (code, err.count("\n"), "the action at step 1, column 'LEFT' is 5" in err) == (3, 1, True), err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda latents, actions: actions.__setitem__((5, 0), -1), "step 5, column 'gear' is -1, not a whole number"),
        (lambda latents, actions: actions.__setitem__((5, 0), 7), "step 5, column 'gear' is 7"),
        (lambda latents, actions: actions.__setitem__((5, 2), np.nan), "step 5, column 'steer' is nan"),
        (lambda latents, actions: actions.__setitem__((-1, 0), 7), "actions where the episode has none"),
        (lambda latents, actions: latents.__setitem__((5, 1, 2), np.nan), "latents that are not finite"),
        (lambda latents, actions: latents.__setitem__((5, 1, 2), -np.inf), "latents that are not finite"),
    ],
)
def test_a_pack_of_such_rows_is_refused_when_it_is_opened_and_fails_the_check(tmp_path, run, change, sentence):
    store, tokenizer = small_dataset(tmp_path / "d", episodes=4, frames=12, space=SPACE), small_world().tokenizer
    path = open_pack(store, tokenizer).path
    reseal_pack(path, lambda latents, actions: None)
    assert open_pack(store, tokenizer).ids
    reseal_pack(path, change)
    with pytest.raises(DataError, match=rf"is damaged at episode 0000\d\d, frames 0..11 \(.*{sentence}.*delete it"):
        open_pack(store, tokenizer)
    assert sentence in check_packs(store)[0].detail
    code, out, _ = run("info", tmp_path / "d", "--check")
    assert (code, "FAIL  latent packs" in out) == (1, True)


def test_what_the_sample_of_a_large_pack_missed_is_refused_when_it_is_read(tmp_path):
    store = small_dataset(tmp_path / "d", episodes=6, frames=12, space=SPACE, silent=3)
    path = open_pack(store, small_world().tokenizer).path
    facts, _ = pack_format.read_pack_header(path)
    labelled = [e["labelled"] for e in facts["episodes"]].index(True)
    silent = [e["labelled"] for e in facts["episodes"]].index(False)
    for episode, change, sentence in (
        (labelled, lambda z, a, row: a.__setitem__((row, 0), -1), "outside the action space"),
        (silent, lambda z, a, row: a.__setitem__((row, 0), 1), "outside the action space"),
        (labelled, lambda z, a, row: z.__setitem__((row, 0, 0), np.nan), "latents that are not finite"),
    ):
        whole = path.read_bytes()
        reseal_pack(path, lambda z, a: change(z, a, 12 * episode + 3))  # noqa: B023
        pack = LatentPack(path, pack_format.read_pack_header(path)[0], SPACE)
        pack.read([(e, 4) for e in range(len(pack.ids))], 6)
        with pytest.raises(DataError, match=f"{sentence}.*delete it"):
            pack.read([(e, 2) for e in range(len(pack.ids))], 6)
        if "latents" in sentence:
            with pytest.raises(DataError, match=sentence):
                pack.spread()
        path.write_bytes(whole)
