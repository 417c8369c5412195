"""Rollouts saved once and scored many times give what `eval` gives, to the bit; damaged or foreign ones are refused."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace

import pytest
from safetensors.numpy import load_file, save_file
from worlds import NO_ACTIONS, breaks_at, moving_pictures, puppet_world, tiny_world

from ahriuwu_cli.cli import main
from ahriuwu_cli.data.documents import document_hash
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.tensors import checksum, read_arrays
from ahriuwu_cli.errors import DataError
from ahriuwu_cli.evaluation.evaluate import EvaluationConfig, evaluate, ready
from ahriuwu_cli.evaluation.protocol import WindowManifest, make_manifest
from ahriuwu_cli.evaluation.saved import save_rollouts, score_rollouts
from ahriuwu_cli.training.checkpoint import load_world, save_world

QUICK = ("--windows", 7, "--context", 4, "--horizon", 5, "--batch", 3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    store = moving_pictures(root / "data")
    moving_pictures(root / "other", seed=1)
    save_world(tiny_world(store), root / "world")
    return root


@pytest.fixture
def run(capsys):
    def call(*arguments) -> tuple[int, str, str]:
        code = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as stopped:
            code = stopped.code or 0
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def without_times(result: dict) -> dict:
    kept = {k: v for k, v in result.items() if k not in ("timing", "files", "settings")}
    return kept | {"settings": {k: v for k, v in result["settings"].items() if k != "evaluation"}}


def without_looks(result: dict) -> dict:
    return {k: v for k, v in result.items() if k not in ("step_sizes", "consistency", "spread", "distances", "levels")}


@pytest.mark.parametrize("seeds", [1, 2])
def test_scores_of_saved_rollouts_are_those_of_eval_to_the_bit(place, run, tmp_path, seeds):
    both = (*QUICK, "--noise-seeds", seeds)
    code, whole, err = run(
        "eval", place / "world", place / "data", "--out", tmp_path / "e", *both, "--looks", "none", "--json"
    )
    assert code == 0, err
    assert run("eval", "generate", place / "world", place / "data", "--out", tmp_path / "r", *both)[0] == 0
    code, scored, err = run("eval", "score", tmp_path / "r", place / "data", "--out", tmp_path / "s", "--json")
    assert code == 0, err
    assert without_times(json.loads(scored)) == without_looks(without_times(json.loads(whole)))
    assert json.loads(scored)["settings"]["evaluation"] == json.loads(whole)["settings"]["evaluation"]


def test_scoring_needs_no_world_and_can_ask_for_another_delta(place, run, tmp_path):
    run("eval", "generate", place / "world", place / "data", "--out", tmp_path / "r", *QUICK)
    (place / "world").rename(place / "gone")
    try:
        asked = ("--delta-at", 2, "--json")
        code, out, err = run("eval", "score", tmp_path / "r", place / "data", "--out", tmp_path / "s", *asked)
    finally:
        (place / "gone").rename(place / "world")
    assert code == 0, err
    assert set(json.loads(out)["action_delta_db"]["shuffled"]) == {"2", "5"}
    code, _, err = run("eval", "score", tmp_path / "r", place / "data", "--out", tmp_path / "t", "--delta-at", 6)
    assert code == 2
    assert "--delta-at 6 is beyond the 5 frames" in err
    assert not (tmp_path / "t").exists()


def test_a_world_without_actions_is_saved_and_scored_too(tmp_path):
    store = moving_pictures(tmp_path / "data", space=NO_ACTIONS)
    world = tiny_world(store)
    config, manifest = ready(world, store, EvaluationConfig(windows=4, context=4, horizon=5), world.generation)
    save_rollouts(world, store, config, world.generation, manifest, tmp_path / "r")
    whole = evaluate(world, store, config, world.generation, manifest)
    assert without_times(score_rollouts(tmp_path / "r", store)) == without_times(whole)


def test_two_shards_write_what_one_process_writes_and_finished_parts_are_skipped(place, run, tmp_path):
    ask = ("eval", "generate", place / "world", place / "data", "--out", tmp_path / "r", *QUICK, "--json", "--shard")
    said = [json.loads(run(*ask, share)[1]) for share in ("2/2", "1/2", "1/2")]
    assert [(s["windows"], s["written"], s["skipped"]) for s in said] == [(4, 2, 0), (3, 1, 0), (3, 0, 1)]
    run("eval", "generate", place / "world", place / "data", "--out", tmp_path / "one", *QUICK)
    a, b = (
        json.loads(run("eval", "score", tmp_path / r, place / "data", "--out", tmp_path / f"s{r}", "--json")[1])
        for r in ("r", "one")
    )
    assert without_times(a) == without_times(b)


def test_frames_that_are_not_finite_are_counted_from_the_saved_ones_as_well(tmp_path):
    store = moving_pictures(tmp_path / "data")
    world = puppet_world(store, breaks_at(6))
    config, manifest = ready(world, store, EvaluationConfig(windows=4, context=4, horizon=5), world.generation)
    whole = evaluate(world, store, config, world.generation, manifest)
    from ahriuwu_cli.evaluation import saved

    saved.weights_hash, kept = (lambda world: "0" * 64), saved.weights_hash
    try:
        save_rollouts(world, store, config, world.generation, manifest, tmp_path / "r")
    finally:
        saved.weights_hash = kept
    found = score_rollouts(tmp_path / "r", store)
    assert found["status"] == "nan"
    assert without_times(found) == without_times(whole)


def _truncate(folder):
    file = sorted(folder.glob("part-*"))[1]
    file.write_bytes(file.read_bytes()[:-100])


def _misshape(folder):
    file = sorted(folder.glob("part-*"))[0]
    tensors = load_file(file)
    tensors["model.0.frames"] = tensors["model.0.frames"][:, :-1].copy()
    save_file(tensors, file, {"format": "ahriuwu-rollouts/3", "seconds": "{}"})


def _lose(folder):
    sorted(folder.glob("part-*"))[1].unlink()


def _no_metadata(folder):
    file = sorted(folder.glob("part-*"))[0]
    save_file(load_file(file), file)


def _seconds(value):
    """Other seconds, under a checksum that fits."""

    def spoil(folder):
        file = sorted(folder.glob("part-*"))[0]
        tensors, metadata = read_arrays(file)
        seconds = json.loads(metadata["seconds"])
        seconds["model"] = [value] if value != [] else value
        metadata["seconds"] = json.dumps(seconds)
        words = [metadata["of"], metadata["seconds"]]
        save_file(tensors, file, metadata | {"checksum": checksum(tensors, words)})

    return spoil


def _rename(folder):
    file = sorted(folder.glob("part-*"))[0]
    file.rename(folder / "part-²-³.safetensors")


def _index(text):
    return lambda folder: (folder / "saved.json").write_text(text)


DAMAGE = [
    (_truncate, "part-000003"), (_misshape, "model.0.frames differs"),
    (_lose, "windows 3..5"), (_no_metadata, "part-000000-000003.safetensors holds other rollouts than saved.json says"),
    (_index("{"), "cannot be used"), (_index("[" * 5000), "cannot be used"), (_index('{"format": 1}'), "format"),
    (lambda folder: (folder / "windows.json").unlink(), "windows.json does not exist: run the same `ahriuwu eval gene"),
    (lambda folder: (folder / "windows.json").write_text("{}"), "run the same `ahriuwu eval generate` again"),
    *((_seconds(value), "is no number of seconds") for value in ("nan", "5", -1, True, None, 1e308)),
    (_seconds([]), "damaged"), (_rename, "windows 0..2"),
    (lambda folder: (folder / "saved.json").unlink(), "holds no rollouts"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_damaged_rollouts_are_one_sentence_and_exit_3(place, run, tmp_path, damage, words):
    run("eval", "generate", place / "world", place / "data", "--out", tmp_path / "r", *QUICK)
    damage(tmp_path / "r")
    code, out, err = run("eval", "score", tmp_path / "r", place / "data", "--out", tmp_path / "s", "--json")
    assert (code, out) == (3, "")
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("foreign", ["of another tau_ctx", "of another seed", "of other windows"])
def test_a_part_of_other_rollouts_is_never_taken_for_one(place, run, tmp_path, foreign):
    ask = ("eval", "generate", place / "world", place / "data", *QUICK, "--windows", 6)
    other = ("--tau-ctx", 0.3) if "tau" in foreign else ("--seed", 3)
    run(*ask, "--out", tmp_path / "r")
    run(*ask, "--out", tmp_path / "o", *other)
    parts = sorted(p.name for p in (tmp_path / "r").glob("part-*"))
    assert len(parts) == 2
    wrong = tmp_path / "r" / parts[1] if foreign == "of other windows" else tmp_path / "o" / parts[0]
    good = (tmp_path / "r" / parts[0]).read_bytes()
    (tmp_path / "r" / parts[0]).write_bytes(wrong.read_bytes())
    code, _, err = run("eval", "score", tmp_path / "r", place / "data", "--out", tmp_path / "s")
    assert (code, err.count("\n")) == (3, 1)
    assert f"{parts[0]} holds other rollouts than saved.json says: delete it and generate again" in err
    code, out, _ = run(*ask, "--out", tmp_path / "r", "--json")
    assert (code, json.loads(out)["written"], json.loads(out)["skipped"]) == (0, 1, 1)
    arrays, again = read_arrays(tmp_path / "r" / parts[0])[0], tmp_path / "good"
    again.write_bytes(good)
    assert all((arrays[n] == v).all() for n, v in read_arrays(again)[0].items())
    assert run("eval", "score", tmp_path / "r", place / "data", "--out", tmp_path / "s")[0] == 0


@pytest.fixture(scope="module")
def saved_once(place):
    store = EpisodeStore.open(place / "data")
    world = load_world(place / "world", "cpu")
    config, manifest = ready(world, store, EvaluationConfig(windows=4, context=4, horizon=5), world.generation)
    save_rollouts(world, store, config, world.generation, manifest, place / "once")
    return place / "once"


def reseal(folder, changes: dict) -> None:
    """Change entries, named by dots, of a copy's saved.json and make its checksum fit."""
    index = json.loads((folder / "saved.json").read_text())
    index.pop("checksum")
    for name, value in changes.items():
        *above, last = name.split(".")
        entry = index
        for key in above:
            entry = entry[key]
        entry[last] = value
    (folder / "saved.json").write_text(json.dumps(index | {"checksum": document_hash(index)}))


def both(**changes):
    """In the settings and in the identity, so that they agree."""
    return {f"{before}{name.replace('__', '.')}": v for name, v in changes.items() for before in ("", "identity.")}


SAYS = [
    *({f"generation.{n}": v} for n, v in (("steps", 1), ("tau_ctx", 0.5), ("sampler", "euler"))),
    *({f"evaluation.{n}": v} for n, v in (("seed", 5), ("horizons", [1]), ("delta_at", 2), ("noise_seeds", 2))),
    *({f"world.{n}": v} for n, v in (("k_max", 64), ("tokenizer", "0" * 64), ("precision", "bfloat16"))),
    *({f"identity.{n}": v} for n, v in (("window_seed", 1), ("split", "val"), ("manifest_hash", "0" * 64))),
    *(both(**{f"evaluation__{n}": v}) for n, v in (("context", 5), ("windows", 5), ("horizon", 4), ("split", "val"))),
]  # fmt: skip
IMPOSSIBLE = [
    *(both(**{f"generation__{n}": v}) for n, v in (
        ("steps", -5), ("steps", 3), ("steps", True), ("steps", 10**6), ("tau_ctx", 7), ("tau_ctx", 1.0),
        ("tau_ctx", False), ("sampler", "bogus"), ("sampler", 1), ("ctx_mode", "x"), ("ctx_label", []), ("more", 1))),
    *(both(**{f"evaluation__{n}": v}) for n, v in (
        ("split", 7), ("split", "x"), ("delta_at", 0), ("seed", -1), ("seed", 2**63), ("noise_seeds", 0),
        ("horizons", [0]), ("horizons", 4), ("context", True), ("windows", 10**6), ("horizon", 0), ("more", 1))),
    {"evaluation.batch": 0}, {"evaluation.batch": 32.0},
    *({f"world.{n}": v} for n, v in (
        ("k_max", True), ("k_max", 0), ("fps", -1), ("fps", True), ("frame_skip", -3), ("precision", "bogus"),
        ("tokenizer", "x"), ("path", 3), ("git", []), ("device", "bogus"), ("more", 1))),
    *({f"identity.{n}": v} for n, v in (
        ("checkpoint_hash", "x"), ("psnr_cap_db", 50.0), ("interval", "none"), ("tau", "x"), ("ahriuwu", "<b>"),
        ("random_action_hold", [1, 2]), ("more", 1))),
    {"more": 1}, {"world": []}, {"identity": {}}, {"generation": None}, {"manifest": 3},
]  # fmt: skip


@pytest.mark.parametrize(
    ("tables", "words"), [(SAYS, r"contradicts itself or its windows \("), (IMPOSSIBLE, "saved.json cannot be used")]
)
def test_an_index_that_contradicts_itself_or_says_what_no_option_allows_is_refused(place, saved_once, tables, words):
    store, good = EpisodeStore.open(place / "data"), (saved_once / "saved.json").read_text()
    for changes in tables:
        reseal(saved_once, changes)
        with pytest.raises(DataError, match=words):
            pytest.fail(f"{changes} was scored: {score_rollouts(saved_once, store)['settings']}")
        (saved_once / "saved.json").write_text(good)
    score_rollouts(saved_once, store)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: reseal(folder, {"generation.tau_ctx": 0.5}), "contradicts itself or its windows"),
        (lambda folder: (folder / "saved.json").write_text("{"), "cannot be used"),
        (lambda folder: (folder / "saved.json").write_text("{}"), "cannot be used"),
    ],
)
def test_an_index_that_cannot_be_used_is_set_aside_by_who_generates_again_as_its_reader_advises(
    place, run, tmp_path, damage, words
):
    ask = ("eval", "generate", place / "world", place / "data", "--out", tmp_path / "r", *QUICK)
    run(*ask)
    whole = (tmp_path / "r" / "saved.json").read_bytes()
    damage(tmp_path / "r")
    broken = (tmp_path / "r" / "saved.json").read_bytes()
    code, _, err = run("eval", "score", tmp_path / "r", place / "data", "--out", tmp_path / "s")
    assert code == 3
    assert words in err
    assert "run the same `ahriuwu eval generate` again" in err
    code, out, err = run(*ask, "--json")
    assert (code, err.count("\n")) == (0, 1), err
    assert f"{words}" in err
    assert "set aside as saved.json.damaged" in err
    assert json.loads(out)["written"] == 0
    assert (tmp_path / "r" / "saved.json").read_bytes() == whole
    assert (tmp_path / "r" / "saved.json.damaged").read_bytes() == broken
    assert run("eval", "score", tmp_path / "r", place / "data", "--out", tmp_path / "s")[0] == 0
    before = sorted((tmp_path / "r").iterdir())
    damage(tmp_path / "r")  # the parts beside it still say what they are of
    code, _, err = run(*ask, "--steps", 1)
    assert code == 2
    assert "holds rollouts of other settings" in err
    assert sorted((tmp_path / "r").iterdir()) == before
    assert run(*ask)[0] == 0
    reseal(tmp_path / "r", {"identity.checkpoint_hash": "0" * 64})  # sound, and of another world than all parts
    code, _, err = run("eval", "score", tmp_path / "r", place / "data", "--out", tmp_path / "t")
    assert code == 3
    assert "holds other rollouts than saved.json says" in err
    code, _, err = run(*ask)
    assert code == 0
    assert "saved.json is of other rollouts than the parts beside it: set aside as saved.json.damaged-3" in err
    assert run("eval", "score", tmp_path / "r", place / "data", "--out", tmp_path / "t")[0] == 0
    reseal(tmp_path / "r", {"identity.checkpoint_hash": "0" * 64})
    for part in (tmp_path / "r").glob("part-*"):
        part.unlink()
    code, _, err = run(*ask)  # nothing says whose the folder is but its index
    assert code == 2
    assert "holds rollouts of other settings" in err


def test_an_index_that_is_a_link_to_nothing_is_set_aside(place, run, tmp_path):
    ask = ("eval", "generate", place / "world", place / "data", "--out", tmp_path / "r", *QUICK)
    run(*ask)
    (tmp_path / "r" / "saved.json").unlink()
    (tmp_path / "r" / "saved.json").symlink_to("nowhere")
    words = "saved.json is a link that leads to nothing: "
    code, _, err = run("eval", "score", tmp_path / "r", place / "data", "--out", tmp_path / "s")
    assert code == 3
    assert words + "run the same" in err
    code, _, err = run(*ask)
    assert code == 0
    assert words + "set aside as saved.json.damaged" in err


def test_parts_that_lost_their_index_are_not_another_world_s_to_set_aside(place, run, tmp_path):
    ask = ("eval", "generate", place / "world", place / "data", "--out", tmp_path / "r", *QUICK)
    run(*ask)
    (tmp_path / "r" / "saved.json").unlink()
    before = sorted((tmp_path / "r").iterdir())
    code, _, err = run(*ask, "--steps", 1)
    assert code == 2
    assert "holds rollouts of other settings" in err
    assert sorted((tmp_path / "r").iterdir()) == before
    (tmp_path / "r" / "windows.json").unlink()
    (tmp_path / "r" / "windows.json").mkdir()
    code, out, err = run(*ask, "--json")
    assert code == 0
    assert json.loads(out)["written"] == 0
    assert "windows.json is a folder: set aside as windows.json.damaged" in err


def test_which_windows_are_missing_is_said_and_no_others(place, run, tmp_path):
    run("eval", "generate", place / "world", place / "data", "--out", tmp_path / "r", *QUICK[:-1], 1)
    parts = sorted((tmp_path / "r").glob("part-*"))
    parts[1].unlink()
    code, _, err = run("eval", "score", tmp_path / "r", place / "data", "--out", tmp_path / "s")
    assert code == 3
    assert "lacks the rollouts of windows 1..1:" in err


@pytest.mark.parametrize("change", [{"seed": -1}, {"seed": 2**63}, {"context": 20_000}, {"horizon": 200_000}])
def test_windows_with_numbers_that_no_option_allows_are_refused(place, tmp_path, change):
    store = EpisodeStore.open(place / "data")
    replace(make_manifest(store, "test", 4, 5, 4, 0), **change).save(tmp_path / "windows.json")
    with pytest.raises(DataError, match=f"its {next(iter(change))} is"):
        WindowManifest.load(tmp_path / "windows.json", store)


def test_generating_again_writes_the_windows_that_who_began_was_stopped_before(place, run, tmp_path):
    ask = ("eval", "generate", place / "world", place / "data", "--out", tmp_path / "r", *QUICK)
    run(*ask)
    before = (tmp_path / "r" / "windows.json").read_bytes()
    (tmp_path / "r" / "windows.json").unlink()
    assert run(*ask)[0] == 0
    assert (tmp_path / "r" / "windows.json").read_bytes() == before


@pytest.mark.parametrize("batches", [(1, 2), (2, 1), (7, 3), (1, 2, 3)])
def test_rollouts_that_were_stopped_and_gone_on_with_by_another_batch_are_scored_the_same(
    place, run, tmp_path, batches
):
    ask = ("eval", "generate", place / "world", place / "data", *QUICK)
    for number, batch in enumerate(batches, 1):
        assert run(*ask[:-1], batch, "--out", tmp_path / "r")[0] == 0
        if number < len(batches):
            for part in sorted((tmp_path / "r").glob("part-*"))[1:]:
                part.unlink()
    scores = []
    run(*ask, "--out", tmp_path / "one")
    for name in ("r", "one"):
        code, out, err = run("eval", "score", tmp_path / name, place / "data", "--out", tmp_path / f"s{name}", "--json")
        assert code == 0, err
        scores.append(json.loads(out)["windows"])
    assert scores[0] == scores[1]


def test_a_truncated_part_is_set_aside_and_made_again(place, run, tmp_path):
    ask = ("eval", "generate", place / "world", place / "data", "--out", tmp_path / "r", *QUICK, "--json")
    run(*ask)
    _truncate(tmp_path / "r")
    assert json.loads(run(*ask)[1])["written"] == 1
    assert list((tmp_path / "r").glob("*.damaged"))
    assert run("eval", "score", tmp_path / "r", place / "data", "--out", tmp_path / "s")[0] == 0


def test_rollouts_of_other_settings_or_data_are_refused(place, run, tmp_path):
    ask = ("eval", "generate", place / "world", place / "data", "--out", tmp_path / "r", *QUICK)
    run(*ask)
    code, _, err = run(*ask, "--steps", 1)
    assert code == 2
    assert "other settings" in err
    code, _, err = run("eval", "score", tmp_path / "r", place / "other", "--out", tmp_path / "s")
    assert code == 3
    assert "another dataset" in err


@pytest.mark.parametrize("command", ["generate", "plan"])
def test_a_full_disk_leaves_no_empty_folders(place, run, tmp_path, monkeypatch, command):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "plan.toml").write_text(
        f'[defaults]\ncheckpoint = "{place / "world"}"\ndataset = "{place / "data"}"\nwindows = 2\ncontext = 4\n'
        "horizon = 5\n[[cell]]\nsteps = 1\n"
    )
    given = [tmp_path / "plan.toml"] if command == "plan" else [place / "world", place / "data", *QUICK]
    monkeypatch.setattr(f"ahriuwu_cli.evaluation.{'cells' if command == 'plan' else 'saved'}.write_whole", full)
    code, _, err = run("eval", command, *given, "--out", tmp_path / "deep" / "out")
    assert code == 1
    assert "No space left" in err
    assert [p.name for p in tmp_path.iterdir()] == ["plan.toml"]
