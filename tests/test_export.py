"""A world that ships: small weights that load everywhere, prompts of its own, a card that says what was measured."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
from small import small_dataset, small_world

from ahriuwu_cli.data.episode_writer import EpisodeWriter
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.training.checkpoint import load_world, read_tensors, save_world
from ahriuwu_cli.training.export import card


@pytest.fixture
def place(tmp_path):
    save_world(small_world(), tmp_path / "world")
    small_dataset(tmp_path / "data")
    return tmp_path


@pytest.mark.parametrize(("weights", "bits"), [("bfloat16", 8), ("float16", 11), ("float32", 24)])
def test_weights_are_rounded_to_their_format_and_no_further(place, run, weights, bits):
    code, out, _ = run("export", place / "world", "--out", place / "small", "--weights", weights, "--json")
    assert code == 0
    stored = read_tensors(place / "small" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {getattr(torch, weights)}
    exact, shipped = small_world().dynamics.state_dict(), load_world(place / "small").dynamics.state_dict()
    for name, tensor in exact.items():
        assert shipped[name].dtype == torch.float32
        assert bool(((shipped[name] - tensor).abs() <= tensor.abs() * 2.0**-bits + 1e-7).all())
    assert json.loads(out)["largest_rounding"] == pytest.approx(
        max(float((shipped[n] - t).abs().max()) for n, t in exact.items() if t.numel())
    )
    assert (json.loads(out)["largest_rounding"] == 0) == (weights == "float32")


@pytest.mark.parametrize(("weights", "wider"), [("float16", "bfloat16"), ("bfloat16", "float32")])
def test_weights_beyond_a_number_format_are_refused_and_what_was_there_stays(tmp_path, run, weights, wider):
    world = small_world()
    world.dynamics.head.bias.fill_({"float16": 1e10, "bfloat16": 3.4e38}[weights])
    save_world(world, tmp_path / "world")
    assert run("export", tmp_path / "world", "--out", tmp_path / "out", "--weights", wider)[0] == 0
    before = read_tensors(tmp_path / "out" / "model.safetensors")
    words = ("export", tmp_path / "world", "--out", tmp_path / "out", "--weights", weights, "--overwrite")
    code, _, err = run(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert f"--weights {weights} ends at" in err
    assert f"head.bias holds numbers beyond: choose {wider}" in err
    after = read_tensors(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("weights", ["bfloat16", "float32"])
def test_the_tokenizer_is_rounded_with_them_and_gives_the_same_pictures_but_for_that(place, run, weights):
    assert run("export", place / "world", "--out", place / "small", "--weights", weights)[0] == 0
    stored = read_tensors(place / "small" / "tokenizer" / "model.safetensors")
    matrices = {name: t.dtype for name, t in stored.items() if t.dim() > 1}
    assert set(matrices.values()) == {torch.float32 if weights == "float32" else torch.float16}
    assert {t.dtype for t in stored.values() if t.dim() < 2} == {torch.float32}
    exact, shipped = load_world(place / "world").tokenizer, load_world(place / "small").tokenizer
    assert (shipped.fingerprint() == exact.fingerprint()) == (weights == "float32")
    frames = EpisodeStore.open(place / "data").frames("000000")[None]
    pictures, latents = torch.from_numpy(frames), exact.encode(torch.from_numpy(frames))
    assert float((shipped.encode(pictures) - latents).abs().max()) < 2e-3 * float(latents.abs().max())
    assert float((shipped.decode(latents) - exact.decode(latents)).abs().max()) < 1 / 255


def test_a_tokenizer_beyond_float16_is_refused(tmp_path, run):
    world = small_world()
    world.tokenizer.components[0, 0] = 1e5
    save_world(world, tmp_path / "world")
    code, _, err = run("export", tmp_path / "world", "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert "components holds numbers beyond float16: choose --weights float32" in err


def test_the_world_that_was_exported_is_not_changed(place, run):
    before = read_tensors(place / "world" / "model.safetensors")
    run("export", place / "world", "--out", place / "small")
    after = read_tensors(place / "world" / "model.safetensors")
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_rollout_needs_no_dataset_and_starts_from_the_prompts(place, run):
    asked = ("--prompts", place / "data", "--clips", 2, "--frames", 12)
    assert run("export", place / "world", "--out", place / "small", *asked)[0] == 0
    store, whole = EpisodeStore.open(place / "small" / "prompt"), EpisodeStore.open(place / "data")
    assert [(e.split, e.frames) for e in store.episodes()] == [("test", 12), ("test", 12)]
    for clip in store.episodes():
        episode, start = clip.source.split()[1].split(":")
        assert whole.episode(episode).split == "test"
        assert (store.frames(clip.id) == whole.frames(episode, int(start), int(start) + 12)).all()
        assert (store.actions(clip.id) == whole.actions(episode, int(start), int(start) + 11)).all()
    code, out, _ = run("rollout", place / "small", "--out", place / "ro", "--context", 4, "--length", 8, "--json")
    assert code == 0
    assert json.loads(out)["psnr_frames"] == 8
    code, _, err = run("rollout", place / "world", "--out", place / "ro2")
    assert code == 2
    assert "brings no prompts" in err


def test_the_card_holds_the_scores_of_the_evaluation(place, run):
    asked = ("--windows", 4, "--context", 4, "--horizon", 4, "--looks", "none", "--out", place / "ev")
    code, said, _ = run("eval", place / "world", place / "data", *asked, "--ctx-label", "clean")
    assert code == 0
    assert "stop, labelled clean: a lie" in said
    (place / "notes.txt").write_text("The art is nobody's.\n")
    asked = ("--evidence", place / "ev", "--notes", place / "notes.txt")
    assert run("export", place / "world", "--out", place / "small", *asked)[0] == 0
    card = (place / "small" / "README.md").read_text()
    row = json.loads((place / "ev" / "eval.json").read_text())["horizons"]["4"]
    assert f"{row['gain_db']['value']:+.2f}" in card
    assert f"{row['sharpness_ratio']:.2f}" in card
    assert "The art is nobody's." in card
    assert "4 windows" in card
    assert "(0 clean, 1 noise), its frames labelled clean." in card
    assert "bfloat16" in card


def test_scores_by_another_sampler_than_the_worlds_do_not_get_into_its_card(place, run):
    asked = ("--windows", 4, "--context", 4, "--horizon", 4, "--looks", "none", "--out", place / "ev")
    assert run("eval", place / "world", place / "data", *asked, "--sampler", "euler", "--steps", 3)[0] == 0
    export = ("export", place / "world", "--out", place / "small", "--evidence", place / "ev")
    code, _, err = run(*export)
    assert code == 2
    assert "was measured by steps 3, sampler euler, and this world would go by steps 2, sampler shortcut: " in err
    assert err.endswith("evaluate it as it is, or export it by --steps 3 --sampler euler\n")
    assert not (place / "small").exists()
    assert run(*export, "--sampler", "euler", "--steps", 3)[0] == 0
    assert "euler, K = 3" in (place / "small" / "README.md").read_text()
    for option, said in {"--tau-ctx 0.3": "tau_ctx 0.3", "--ctx-mode renoise": "ctx_mode renoise"}.items():
        assert run("eval", place / "world", place / "data", *asked, *option.split(), "--overwrite")[0] == 0
        code, _, err = run(*export, "--overwrite")
        assert code == 2
        assert f"was measured by {said}, and this world would go by" in err
        assert err.endswith(": evaluate it as it is\n")  # `export` has no such options


def test_the_busiest_prompts_have_the_most_edges_and_come_from_different_episodes(place, run):
    from ahriuwu_cli.evaluation.metrics import gradient_energy

    energies = {}
    for pick in ("random", "busiest"):
        asked = ("--prompts", place / "data", "--clips", 1, "--frames", 12, "--pick", pick, "--split", "train")
        assert run("export", place / "world", "--out", place / pick, *asked)[0] == 0
        store = EpisodeStore.open(place / pick / "prompt")
        energies[pick] = float(gradient_energy(store.frames("000000", 7, 8))[0])
    assert energies["busiest"] > energies["random"]
    asked = ("--prompts", place / "data", "--clips", 3, "--frames", 12, "--pick", "busiest", "--split", "train")
    assert run("export", place / "world", "--out", place / "three", *asked)[0] == 0
    clips = EpisodeStore.open(place / "three" / "prompt").episodes()
    assert len({c.source.split()[1].split(":")[0] for c in clips}) == 3
    few = len(EpisodeStore.open(place / "data").episodes("train"))
    asked = ("--prompts", place / "data", "--clips", few + 9, "--frames", 12, "--pick", "busiest", "--split", "train")
    assert run("export", place / "world", "--out", place / "more", *asked)[0] == 0
    store = EpisodeStore.open(place / "more" / "prompt")
    rest = [float(gradient_energy(store.frames(e.id, 7, 8))[0]) for e in store.episodes()[few:]]
    assert rest == sorted(rest, reverse=True)  # beyond one an episode, too


def test_other_defaults_for_rollouts_are_stored_and_refused_where_they_cannot_be(place, run):
    assert run("export", place / "world", "--out", place / "a", "--sampler", "euler", "--steps", 3)[0] == 0
    assert load_world(place / "a").generation.steps == 3
    assert run("export", place / "world", "--out", place / "b", "--sampler", "shortcut", "--steps", 3)[0] == 2
    assert not (place / "b").exists()


BAD = [
    (("--prompts", "{data}", "--pick", "busyest"), 2, "did you mean 'busiest'"),
    (("--weights", "bfloat61"), 2, "did you mean 'bfloat16'"),
    (("--prompts", "{data}", "--frames", "1"), 2, "--frames"),
    (("--prompts", "{data}", "--clips", "0"), 2, "--clips"),
    (("--prompts", "{data}", "--frames", "4000"), 3, "4000"),
    (("--prompts", "{data}", "--split", "tets"), 2, "test"),
    (("--prompts", "{world}"), 3, "dataset"),
    (("--evidence", "{data}"), 3, "ahriuwu eval"),
    (("--evidence", "{broken}"), 3, "ahriuwu eval"),
    (("--notes", "{data}"), 2, "text"),
]


@pytest.mark.parametrize(("options", "code", "words"), BAD)
def test_a_bad_request_is_one_sentence_and_writes_nothing(place, run, options, code, words):
    (place / "eval.json").write_text('{"kind": "eval", "status": "nan"}')
    names = {"data": place / "data", "world": place / "world", "broken": place / "eval.json"}
    found, _, err = run("export", place / "world", "--out", place / "small", *(o.format(**names) for o in options))
    assert found == code, err
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert not (place / "small").exists()


def test_an_episode_keeps_the_split_that_it_was_given(tmp_path):
    import numpy as np
    from small import SPACE

    with EpisodeWriter(tmp_path / "d", height=16, width=16, fps=1.0, action_space=SPACE) as writer:
        for i in range(9):
            frames = np.full((3, 16, 16, 3), i, np.uint8)
            writer.add(frames, np.zeros((2, 2), np.float32), split="test" if i < 4 else None)
    splits = [e.split for e in EpisodeStore.open(tmp_path / "d").episodes()]
    assert splits[:4] == ["test"] * 4
    assert set(splits[4:]) == {"train", "val", "test"}


def test_notes_that_never_end_or_are_no_text_are_refused_at_once(place, run):
    os.mkfifo(place / "pipe")
    (place / "large.txt").write_bytes(b"x" * 1_000_001)
    (place / "latin.txt").write_bytes(b"caf\xe9")
    for name in ("/dev/zero", place / "pipe", place / "large.txt", place / "latin.txt", place):
        code, out, said = run("export", place / "world", "--out", place / "small", "--notes", name)
        assert (code, out, said.count("\n")) == (2, "", 1), said
        assert said.startswith(f"error: {name} cannot be read as text (")
    assert not (place / "small").exists()


def test_scores_of_another_world_do_not_get_into_the_card_and_those_of_the_exported_one_do(place, run):
    asked = ("--windows", 4, "--context", 4, "--horizon", 4, "--looks", "none")
    assert run("export", place / "world", "--out", place / "small")[0] == 0
    save_world(small_world(seed=1), place / "other")
    for world, code in (("world", 0), ("small", 0), ("other", 3)):
        assert run("eval", place / world, place / "data", *asked, "--out", place / f"ev_{world}")[0] == 0
        evidence = ("--evidence", place / f"ev_{world}")
        found, _, err = run("export", place / "world", "--out", place / f"out_{world}", *evidence)
        assert (found, "another world" in err) == (code, bool(code)), err
    generate = ("eval", "generate", place / "other", place / "data", *asked[:-2], "--out", place / "ro")
    assert run(*generate)[0] == 0
    assert run("eval", "score", place / "ro", place / "data", "--out", place / "scored")[0] == 0
    assert run("export", place / "other", "--out", place / "out", "--evidence", place / "scored")[0] == 0


EDITS = {
    "split": lambda d: d["settings"].update(split="test)\n\n# Certified\n<script>alert(1)</script>"),
    "sampler": lambda d: d["settings"]["generation"].update(sampler="<b>"),
    "count": lambda d: d["n"].update(windows="<img src=x>"),
    "frame": lambda d: d["horizons"].update({"1 | 99 |\n<script>": d["horizons"].pop("1")}),
    "control": lambda d: d["action_delta_db"].update({"<b>": d["action_delta_db"]["random"]}),
    "gain": lambda d: d["horizons"]["4"]["gain_db"].update(value=55.0, lo=54.0, hi=56.0),
}  # fmt: skip


def test_scores_that_were_edited_into_a_text_or_a_contradiction_do_not_get_into_the_card(place, run):
    asked = ("--windows", 4, "--context", 4, "--horizon", 4, "--out", place / "ev")
    assert run("eval", place / "world", place / "data", *asked)[0] == 0  # with all looks
    file, export = place / "ev" / "eval.json", ("export", place / "world", "--evidence", place / "ev", "--out")
    good = file.read_text()
    for name, change in EDITS.items():
        document = json.loads(good)
        change(document)
        file.write_text(json.dumps(document))
        code, _, err = run(*export, place / name)
        assert (code, err.count("\n"), (place / name).exists()) == (3, 1, False), name
    file.write_text(good)
    assert run(*export, place / "good")[0] == 0


def test_facts_of_a_world_and_of_its_scores_are_text_in_its_card():
    def scores(text):
        names = (
            "gain_db",
            "psnr",
            "floor",
            "ceiling",
            "ssim",
            "motion_ratio",
            "sharpness_ratio",
            "ceiling_sharpness_ratio",
        )
        generation = dict.fromkeys(("sampler", "steps", "tau_ctx"), text)
        return {
            "settings": {"split": text, "evaluation": {"context": text}, "generation": generation},
            "n": {"windows": text, "episodes": text}, "horizons": {text: dict.fromkeys(names, 1.0)},
            "action_delta_db": {text: {text: 1.0}},
        }  # fmt: skip

    world, text = small_world(), "a\n\n# Certified\n<script> ![a](http://b)"
    plain = card("x", world, "float32", scores("x"), "")
    world.facts |= dict.fromkeys(("command", "dataset", "dataset_fingerprint", "git", "torch", "step"), text)
    forged = card(text, world, "float32", scores(text), "")
    assert len(forged.splitlines()) == len(plain.splitlines())
    assert "<" not in forged
    assert "](" not in forged.replace("\\](", "")


def test_the_card_of_a_world_that_was_scored_on_still_frames_says_so_and_is_written(tmp_path, run):
    save_world(small_world(), tmp_path / "world")
    small_dataset(tmp_path / "data", still=True)
    asked = ("--windows", 4, "--context", 4, "--horizon", 4, "--looks", "none", "--out", tmp_path / "ev")
    assert run("eval", tmp_path / "world", tmp_path / "data", *asked)[0] == 0
    assert run("export", tmp_path / "world", "--out", tmp_path / "small", "--evidence", tmp_path / "ev")[0] == 0
    assert "| - |" in (tmp_path / "small" / "README.md").read_text()


def test_two_stages_are_averaged_and_others_are_refused(place, run):
    def other(change):
        world = small_world()
        change(world)
        save_world(world, place / "other")
        return place / "other"

    def moved(world):
        for parameter in world.dynamics.parameters():
            parameter.add_(0.5)

    words = ("export", place / "world", "--out", place / "mean", "--weights", "float32", "--average")
    assert run(*words, other(moved))[0] == 0
    mean, first = load_world(place / "mean"), small_world().dynamics.state_dict()
    names = dict(mean.dynamics.named_parameters())
    for name, tensor in mean.dynamics.state_dict().items():
        expected = first[name] + 0.25 if name in names else first[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)
    assert set(mean.facts["averaged_with"]) >= {"weights_sha256"}
    assert "| averaged with |" in (place / "mean" / "README.md").read_text()

    def turned(world):
        world.tokenizer.mean += 1

    code, _, err = run(*words, other(turned), "--overwrite")
    assert (code, err.count("\n")) == (4, 1)
    assert "has another tokenizer than" in err
    assert run(*words, place / "mean", "--overwrite")[0] == 2  # it is read


def test_a_mean_states_what_holds_for_both(place, run):
    def stated(**fields):
        world = replace(small_world(), **fields)
        for parameter in world.dynamics.parameters():
            parameter.fill_(3e38)  # twice as much is infinite
        save_world(world, place / "other")
        return run(*words, place / "other", "--overwrite")

    words = ("export", place / "world", "--out", place / "mean", "--weights", "float32", "--average")
    both = small_world().trained_d
    assert len(both) > 1
    assert stated(trained_d=both[1:])[0] == 0
    assert load_world(place / "mean").trained_d == both[1:]
    assert stated(facts={"preview_gain_db": 2.0})[0] == 0
    assert "preview_gain_db" not in load_world(place / "mean").facts
    code, _, err = stated(facts={"averaged_with": {}})
    assert (code, err.count("\n")) == (4, 1)
    assert "is a mean already" in err
    for fields, what in (
        ({"fps": 3.0}, "frame rate"),
        ({"frame_skip": 9}, "frame rate"),
        ({"forcing": "x"}, "forcing"),
    ):
        code, _, err = stated(**fields)
        assert (code, err.count("\n")) == (4, 1)
        assert f"has another {what} than" in err


def test_no_folder_of_this_machine_goes_out_with_a_world(place, run):
    world = small_world()
    world.facts = {"init_from": "/home/somebody/worlds/first"}
    save_world(world, place / "second")
    assert run("export", place / "second", "--out", place / "small")[0] == 0
    assert load_world(place / "small").facts["init_from"] == "first"
    assert "somebody" not in "".join(f.read_text() for f in (place / "small").glob("*.*") if f.suffix != ".safetensors")


@pytest.mark.parametrize("said", ["a text", [1], {"command": 7}])
def test_a_world_whose_facts_of_its_mean_are_none_is_refused(place, run, said):
    world = small_world()
    world.facts = {"averaged_with": said}
    save_world(world, place / "odd")
    code, _, err = run("export", place / "odd", "--out", place / "small")
    assert (code, err.count("\n")) == (4, 1)
    assert "averaged_with" in err
