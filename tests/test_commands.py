"""The commands as a person types them: train, rollout, info; and what they answer to nonsense."""

import json
import os
import re
import shutil
from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from small import SPACE, small_dataset, small_world

from ahriuwu_cli import cli
from ahriuwu_cli.data.episode_writer import EpisodeWriter
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.video import read_video
from ahriuwu_cli.data.video_writing import write_mp4
from ahriuwu_cli.imagine import GIF_PIXELS
from ahriuwu_cli.models.dynamics import Dynamics
from ahriuwu_cli.models.linear_tokenizer import LinearTokenizer
from ahriuwu_cli.training.checkpoint import save_world
from ahriuwu_cli.training.describe import as_text


@pytest.fixture
def run(capfd):
    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return stop.value.code, out, err

    return call


@pytest.fixture
def place(tmp_path):
    small_dataset(tmp_path / "data")
    save_world(small_world(), tmp_path / "world")
    return tmp_path


def snapshot(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and "latents" not in p.parts}


def mean_psnr(made, truth):
    return np.mean(-10 * np.log10((((made.astype(float) - truth) / 255) ** 2).mean((1, 2, 3))))


def test_a_rollout_writes_a_video_that_plays_and_arrays_that_match_it(run, place):
    code, out, _ = run(
        "rollout", place / "world", place / "data", "--out", place / "out", "--length", 12, "--context", 4, "--json"
    )
    assert code == 0
    result = json.loads(out)
    frames = iio.imread(place / "out" / "rollout.mp4", plugin="pyav")
    assert len(frames) == 16
    arrays = load_file(place / "out" / "arrays.safetensors")
    assert arrays["frames"].shape == (1, 12, 16, 16, 3)
    assert arrays["context"].shape == (4, 16, 16, 3)
    assert arrays["truth"].shape == (12, 16, 16, 3)
    assert result["psnr_db"] == pytest.approx(mean_psnr(arrays["frames"][0], arrays["truth"]), abs=1e-3)


@pytest.mark.parametrize(("length", "followed"), [(5, 5), (20, 8)])
def test_a_rollout_of_a_film_with_its_actions_is_scored_by_what_followed_in_it(run, place, length, followed):
    write_mp4(place / "v.mp4", np.random.default_rng(0).integers(0, 255, (12, 16, 16, 3), np.uint8), 10)
    (place / "a.csv").write_text("LEFT,RIGHT\n" + "1,0\n" * 23)
    words = ("rollout", place / "world", place / "v.mp4", "--out", place / "o", "--context", 4, "--length", length)
    code, out, err = run(*words, "--actions", place / "a.csv", "--json")
    assert code == 0, err
    result, arrays = json.loads(out), load_file(place / "o" / "arrays.safetensors")
    film, made = read_video(place / "v.mp4")[0], arrays["frames"][0]
    np.testing.assert_array_equal(arrays["context"], film[:4])
    np.testing.assert_array_equal(arrays["truth"], film[4 : 4 + length])
    assert result["psnr_frames"] == followed
    assert result["psnr_db"] == pytest.approx(mean_psnr(made[:followed], film[4 : 4 + followed]), abs=1e-3)


@pytest.mark.parametrize("prompt", ["data", "v.mp4"])
def test_a_rollout_of_other_actions_than_the_true_ones_has_no_score(run, place, prompt):
    write_mp4(place / "v.mp4", np.full((9, 16, 16, 3), 90, np.uint8), 10)
    words = ("rollout", place / "world", place / prompt, "--out", place / "o", "--context", 1, "--length", 2)
    code, out, err = run(*words, "--actions", "repeat:LEFT", "--json")
    assert code == 0, err
    assert len(load_file(place / "o" / "arrays.safetensors")["truth"]) == 2
    assert (json.loads(out)["psnr_db"], json.loads(out)["psnr_frames"]) == (None, 0)


def test_actions_before_a_films_last_context_frame_are_known_from_a_file_alone(run, place):
    save_world(replace(small_world(), trained_unlabelled=True), place / "open")
    write_mp4(place / "v.mp4", np.full((9, 32, 32, 3), 90, np.uint8), 10)
    (place / "a.csv").write_text("LEFT,RIGHT\n" + "1,0\n" * 6)
    made = []
    for name, source in (("asked", "repeat:LEFT"), ("told", place / "a.csv")):
        words = ("rollout", place / "open", place / "v.mp4", "--context", 4, "--length", 3, "--out", place / name)
        code, _, err = run(*words, "--actions", source)
        assert code == 0, err
        made.append(load_file(place / name / "arrays.safetensors"))
    asked, told = made
    np.testing.assert_array_equal(asked["actions"], told["actions"])
    assert not np.array_equal(asked["frames"], told["frames"])


def test_an_episode_without_actions_takes_them_from_a_file_for_its_context_too(run, place):
    small_dataset(place / "silent", silent=8)
    (place / "a.csv").write_text("LEFT,RIGHT\n" + "1,0\n" * 6)
    (place / "b.csv").write_text("LEFT,RIGHT\n" + "0,1\n" * 3 + "1,0\n" * 3)
    words = ("rollout", place / "world", place / "silent", "--episode", "000001", "--length", 3, "--context")
    code, _, err = run(*words, 4, "--out", place / "x")
    assert code == 3
    assert "has no actions: give --actions FILE, or --context 1 with --actions random" in err
    for window in (("--start", 36), ("--start", 39), ("--context", 40)):  # before anything that a file would mend too
        code, _, err = run(*words, 4, *window, "--out", place / "x")
        assert code == 3
        assert "has no actions: give --actions FILE, or --context 1 with --actions random" in err
    for source, advice in {
        "random": "give --actions FILE, whose first row leaves the first context frame and which has 6 rows, or",
        "none": "give --actions FILE, or --context 1 with --actions random",
    }.items():
        code, _, err = run(*words, 4, "--out", place / "x", "--actions", source)
        assert code == 4
        assert advice in err
    of_split = ("rollout", place / "world", place / "silent", "--length", 3, "--out", place / "x")
    code, _, err = run(*of_split)
    assert code == 3
    assert "no episode of the test split has actions: give --actions FILE, or --context 1 with --actions random" in err
    assert "give --actions random or FILE, or another --split" in run(*of_split, "--context", 1)[2]
    assert run(*of_split, "--context", 1, "--actions", "random")[0] == 0
    made = []
    for name in "ab":
        code, out, err = run(*words, 4, "--out", place / name, "--actions", place / f"{name}.csv", "--json")
        assert code == 0, err
        assert json.loads(out)["psnr_frames"] == 3  # what was pressed there, by the file
        made.append(load_file(place / name / "arrays.safetensors"))
    assert [list(m["actions"][:, 0]) for m in made] == [[1] * 6, [0] * 3 + [1] * 3]
    assert not np.array_equal(made[0]["frames"], made[1]["frames"])
    assert run(*words, 1, "--out", place / "y", "--actions", "random")[0] == 0


def test_actions_of_a_file_never_take_the_place_of_recorded_ones_before_the_rollout(run, place):
    (place / "a.csv").write_text("LEFT,RIGHT\n" + "1,0\n" * 6)
    words = ("rollout", place / "world", place / "data", "--episode", "000001", "--length", 3, "--context", 4)
    code, out, err = run(*words, "--out", place / "x", "--actions", place / "a.csv", "--json")
    assert code == 0, err
    assert json.loads(out)["psnr_frames"] == 0
    made = load_file(place / "x" / "arrays.safetensors")["actions"]
    np.testing.assert_array_equal(made[:3], EpisodeStore.open(place / "data").actions("000001", 0, 3))
    assert made[3:].tolist() == [[1, 0]] * 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: os.mkfifo(path), "is no regular file: give CSV or JSON lines"),
        (lambda path: path.mkdir(), "is no regular file"),
        (lambda path: None, "there is no action file at"),
        (lambda path: path.write_text("[1,1e999]\n"), r"line 1: not JSON \(it holds the number 1e999"),
        (lambda path: path.write_text('{"LEFT":1,"LEFT":0}\n'), r"line 1: not JSON \(a key stands twice in it: 'LEFT'"),
        (lambda path: path.write_bytes(b"[1,0]\n" * 3_400_000), r"cannot be taken \(it is larger than 20 MB\): give a"),
        (lambda path: path.write_bytes(b"\xff\xff"), "is not UTF-8 text"),
    ],
    ids=["pipe", "folder", "missing", "too large a number", "key twice", "20 MB", "bytes"],
)
def test_an_action_file_that_cannot_be_taken_says_why(run, place, make, words):
    make(place / "a.jsonl")
    code, _, err = run(
        "rollout", place / "world", place / "data", "--length", 3, "--out", place / "x", "--actions", place / "a.jsonl"
    )
    assert code == 3
    assert re.search(words, err), err


def test_an_image_is_never_advised_a_context(run, place):
    iio.imwrite(place / "p.png", np.full((16, 16, 3), 90, np.uint8))
    words = ("rollout", place / "world", place / "p.png", "--length", 3, "--out", place / "x")
    code, _, err = run(*words, "--actions", "none")
    assert code == 4
    assert "give --actions random or FILE" in err
    assert "--context" not in err
    assert run(*words, "--actions", "random")[0] == 0


def test_a_film_says_how_many_rows_of_actions_a_rollout_of_it_needs(run, place):
    write_mp4(place / "v.mp4", np.full((20, 16, 16, 3), 90, np.uint8), 10)
    words = ("rollout", place / "world", place / "v.mp4", "--context", 4, "--length", 3, "--start", 5)
    code, _, err = run(*words, "--out", place / "x")
    assert code == 4
    assert "give --actions FILE, whose first row leaves the first frame and which has 11 rows, or --context 1" in err
    for rows, expected in ((10, 3), (11, 0)):
        (place / "a.csv").write_text("LEFT,RIGHT\n" + "1,0\n" * rows)
        assert run(*words, "--out", place / f"x{rows}", "--actions", place / "a.csv")[0] == expected


def test_a_rollout_is_the_same_twice_and_changes_with_seed_actions_and_tau_ctx(run, place):
    def frames(name, *options):
        base = ("rollout", place / "world", place / "data", "--length", 4, "--context", 4, "--episode", "000000")
        assert run(*base, "--out", place / name, *options)[0] == 0
        return load_file(place / name / "arrays.safetensors")["frames"]

    first = frames("a")
    assert np.array_equal(first, frames("b"))
    for name, options in {
        "c": ("--seed", 1), "d": ("--actions", "repeat:LEFT"), "e": ("--tau-ctx", 0.5), "f": ("--ctx-mode", "renoise"),
        "g": ("--steps", 4), "h": ("--sampler", "euler"),
    }.items():  # fmt: skip
        assert not np.array_equal(first, frames(name, *options)), options


def test_a_rollout_goes_far_beyond_window_and_data_and_makes_several_samples(run, place):
    code, out, _ = run(
        "rollout", place / "world", place / "data", "--out", place / "out", "--length", 60, "--actions", "random",
        "--samples", 3, "--json",
    )  # fmt: skip
    assert code == 0, out
    frames = load_file(place / "out" / "arrays.safetensors")["frames"]
    assert frames.shape == (3, 60, 16, 16, 3)
    assert not np.array_equal(frames[0], frames[1])


def test_a_context_may_end_with_its_episode_when_no_recorded_action_is_needed(run, place):
    options = ("--episode", "000000", "--context", 40, "--length", 2, "--actions", "random")
    code, _, err = run("rollout", place / "world", place / "data", "--out", place / "out", *options)
    assert code == 0, err
    assert len(load_file(place / "out" / "arrays.safetensors")["truth"]) == 0


@pytest.mark.parametrize(("scale", "same"), [(4, True), (32, False)])
def test_the_gif_of_a_large_film_is_a_smaller_film(run, place, scale, same):
    words = ("rollout", place / "world", place / "data", "--out", place / "r", "--actions", "random")
    code, _, err = run(*words, "--length", 60, "--scale", scale, "--steps", 1)
    assert code == 0, err
    with Image.open(place / "r" / "rollout.gif") as gif:
        height, width = iio.imread(place / "r" / "rollout.mp4", plugin="pyav").shape[1:3]
        assert 68 * gif.width * gif.height <= GIF_PIXELS
        assert ((gif.height, gif.width) == (height, width)) == same


def test_frames_of_any_shape_make_a_film_that_can_be_written(run, place):
    noise = np.random.default_rng(0).integers(0, 255, (24, 8, 1024, 3), np.uint8)
    with EpisodeWriter(place / "wide", height=8, width=1024, fps=10.0, action_space=SPACE, name="w", seed=0) as writer:
        writer.add(noise, np.zeros((23, 2), np.float32))
    world = small_world()
    wide = replace(world.dynamics.config, tokens=16)
    save_world(replace(world, tokenizer=LinearTokenizer(8, 1024, 8, 64, 6), dynamics=Dynamics(wide)), place / "flat")
    rollout = ["rollout", place / "flat", place / "wide", "--split", "train", "--length", 4, "--out", place / "made"]
    code, _, err = run(*rollout, "--scale", 8)
    assert (code, (place / "made").exists()) == (2, False)
    assert "give a smaller --scale" in err
    code, _, err = run(*rollout)
    assert code == 0, err
    assert iio.imread(place / "made" / "rollout.mp4", plugin="pyav").shape[2] == 3 * (5 * 1024 + 6)


def test_a_rollout_starts_from_an_image_or_a_video(run, place):
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(place / "p.png")
    assert run("rollout", place / "world", place / "p.png", "--out", place / "o1", "--length", 3)[0] == 0
    iio.imwrite(place / "v.mp4", np.full((9, 32, 32, 3), 90, np.uint8), plugin="pyav", codec="libx264", fps=10)
    code, _, err = run("rollout", place / "world", place / "v.mp4", "--out", place / "o2", "--length", 3)
    assert code == 4  # the context's actions are unknown, and this model never trained that
    assert "--context 1" in err
    options = ("--length", 3, "--context", 1, "--actions", "repeat:RIGHT")
    assert run("rollout", place / "world", place / "v.mp4", "--out", place / "o2", *options)[0] == 0
    (place / "a.csv").write_text("LEFT,RIGHT\n" + "1,0\n" * 10)
    options = ("--length", 3, "--context", 4, "--actions", place / "a.csv")
    assert run("rollout", place / "world", place / "v.mp4", "--out", place / "o3", *options)[0] == 0


def test_the_rows_of_an_action_file_are_those_of_the_videos_frames(run, place):
    iio.imwrite(place / "v.mp4", np.full((12, 32, 32, 3), 90, np.uint8), plugin="pyav", codec="libx264", fps=10)
    rows = np.random.default_rng(0).integers(0, 2, (11, 2))
    (place / "a.csv").write_text("LEFT,RIGHT\n" + "".join(f"{a},{b}\n" for a, b in rows))
    rollout = ("rollout", place / "world", place / "v.mp4", "--length", 3, "--context", 4, "--actions", place / "a.csv")
    for start in (0, 5):
        out = place / f"o{start}"
        assert run(*rollout, "--start", start, "--out", out)[0] == 0
        saved = load_file(out / "arrays.safetensors")["actions"]
        np.testing.assert_array_equal(saved.reshape(-1, 2), rows[start : start + 6])
    code, _, err = run(*rollout, "--start", 6, "--out", place / "o6")
    assert code == 3
    assert "a.csv has 11 actions, but 12 are needed (its rows begin with the video: start, context and length" in err


def test_a_prompt_of_another_shape_says_that_it_is_cropped(run, place):
    Image.fromarray(np.full((120, 160, 3), 90, np.uint8)).save(place / "wide.png")
    Image.fromarray(np.full((161, 160, 3), 90, np.uint8)).save(place / "square.png")
    write_mp4(place / "wide.mp4", np.full((9, 48, 64, 3), 90, np.uint8), 10)
    for prompt, said in (("wide.png", "of 160x120"), ("wide.mp4", "of 64x48"), ("square.png", None)):
        asked = ("--context", 1) if prompt == "wide.mp4" else ()
        code, out, err = run(
            "rollout", place / "world", place / prompt, "--out", place / f"of {prompt}", "--length", 2, "--json", *asked
        )
        assert code == 0, err
        warnings = json.loads(out)["warnings"]
        assert [f"pictures {said} are cropped" in line and "bring it to 16x16 first" in line for line in warnings] == (
            [True] if said else []
        )


def test_a_rollout_of_a_prompt_of_another_rate_says_so(run, place):
    Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(place / "p.png")
    for fps in (10, 240):
        write_mp4(place / f"{fps}.mp4", np.full((9, 32, 32, 3), 90, np.uint8), fps)
    trained = "the world was trained at 10 (frame skip 4)"
    for prompt, said in (
        ("p.png", []),
        ("10.mp4", []),
        ("240.mp4", [f"the video runs at 240 frames/s, {trained}"]),
        ("data", [f"the dataset runs at 10 frames/s (frame skip 1), {trained}"]),
    ):
        asked = ("--out", place / f"of {prompt}", "--length", 2, "--json")
        context = () if prompt == "p.png" else ("--context", 1)
        code, out, err = run("rollout", place / "world", place / prompt, *asked, *context)
        assert code == 0, err
        assert json.loads(out)["warnings"] == said
        assert [line for line in err.splitlines() if line.startswith("note: ")] == [f"note: {line}" for line in said]


def test_a_context_without_actions_is_refused_by_a_model_that_never_saw_one(run, place):
    small_dataset(place / "silent", labelled=False)
    base = (
        "rollout",
        place / "world",
        place / "silent",
        "--out",
        place / "o",
        "--length",
        3,
        "--actions",
        "repeat:LEFT",
    )
    code, _, err = run(*base)
    assert code == 4
    assert "--context 1" in err
    assert not (place / "o").exists()
    assert run(*base, "--context", 1)[0] == 0


def test_a_world_is_trained_from_the_command_line(run, place):
    train = (
        "train", "dynamics", place / "data", "--tokenizer", place / "tok", "--out", place / "run", "--steps", 3,
        "--batch", 2, "--frames", 4, "--preview-windows", 2,
    )  # fmt: skip
    code, out, _ = run("train", "tokenizer", place / "data", "--out", place / "tok", "--patch", "8", "--json")
    assert code == 0
    assert json.loads(out)["tokens"] == 4
    code, out, err = run(*train, "--json")
    assert code == 0, err
    assert json.loads(out)["steps"] == 3
    before = snapshot(place / "run")
    code, again, err = run(*train, "--json")
    assert (code, json.loads(again)) == (0, json.loads(out))
    assert "is finished: all 3 steps are done" in err
    assert snapshot(place / "run") == before
    code, _, err = run(*train, "--lr", 0.001)
    assert code == 2
    assert "lr 0.003 -> 0.001" in err
    code, out, _ = run("info", place / "run", "--json")
    assert code == 0
    assert json.loads(out)["trained_d"] == [2.0**-i for i in range(7)]
    shutil.copytree(place / "run" / "best", place / "bare")
    (place / "bare" / "tokenizer").rename(place / "elsewhere")
    code, _, err = run("info", place / "bare")
    assert code == 4
    assert "there is no checkpoint at" in err
    document = json.loads((place / "run" / "run.json").read_text())
    assert document["config"]["batch"] == 2
    assert "train dynamics" in document["command"] or document["command"]


def test_videos_without_actions_go_the_whole_way(run, tmp_path):
    (tmp_path / "films").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        write_mp4(tmp_path / "films" / f"{i}.mp4", rng.integers(0, 256, (10, 16, 16, 3)).astype(np.uint8), 10)
    films, data, tok, made, out = (tmp_path / name for name in ("films", "data", "tok", "run", "out"))
    few = ("--windows", 2, "--context", 2, "--horizon", 2)
    train = ("--steps", 2, "--batch", 2, "--frames", 4, "--preview-windows", 2)
    for words in (
        ("import", films, "--out", data, "--size", 16),
        ("train", "tokenizer", data, "--out", tok, "--patch", "8", "--latent-dim", 6),
        ("train", "dynamics", data, "--tokenizer", tok, "--out", made, *train),
        ("info", data, "--check"),
        ("rollout", made, data, "--out", out / "dream", "--context", 2, "--length", 2),
        ("rollout", made, films / "0.mp4", "--out", out / "other", "--context", 2, "--length", 2),
        ("eval", made, data, "--out", out / "eval", "--looks", "none", *few),
        ("eval", "generate", made, data, "--out", out / "saved", *few),
    ):  # fmt: skip
        code, _, err = run(*words)
        assert code == 0, (words, err)
    assert load_file(out / "dream" / "arrays.safetensors")["actions"].shape[-1] == 0


def test_info_writes_parameters_in_millions_and_no_other_number():
    text = as_text({"parameters": 1_234_567, "train": {"seed": 12345, "steps": 20000}, "step": 54321})
    assert text.split() == ["parameters", "1.23M", "train", "seed", "12345,", "steps", "20000", "step", "54321"]


def test_info_lists_sizes_from_one_million_to_one_point_six_billion(run):
    code, out, _ = run("info", "--json")
    sizes = {row["size"]: row["parameters"] for row in json.loads(out)["sizes"]}
    assert code == 0
    assert list(sizes) == ["nano", "mini", "tiny", "small", "medium", "large", "xlarge"]
    assert 0.5e6 < sizes["nano"] < 1.5e6
    assert 1.5e9 < sizes["xlarge"] < 1.7e9


W, D, TO = "{world}", "{data}", ("--out", "{out}")
ROLLOUT, TRAIN = ("rollout", W, D, *TO), ("train", "dynamics", D, *TO)
BAD = [
    (("rollout", "nowhere", D, *TO), 4, "no checkpoint"),
    (("rollout", D, D, *TO), 4, "not a checkpoint"),
    (("rollout", W, "nowhere", *TO), 3, "nowhere"),
    (("rollout", W, "{text}", *TO), 3, "video"),
    (("rollout", W, "{other}", *TO), 3, "32x32"),
    (("rollout", W, "{foreign}", *TO), 3, "actions"),
    ((*ROLLOUT, "--steps", "3"), 2, "power of two"),
    ((*ROLLOUT, "--steps", "0"), 2, "steps"),
    ((*ROLLOUT, "--steps", "x"), 2, "steps"),
    ((*ROLLOUT, "--sampler", "eulr"), 2, "did you mean 'euler'"),
    ((*ROLLOUT, "--ctx-mode", "stp"), 2, "did you mean 'stop'"),
    ((*ROLLOUT, "--tau-ctx", "1.0"), 2, "1 is noise"),
    ((*ROLLOUT, "--tau-ctx", "nan"), 2, "tau-ctx"),
    ((*ROLLOUT, "--length", "0"), 2, "--length"),
    ((*ROLLOUT, "--length", "500"), 3, "frames"),
    ((*ROLLOUT, "--context", "-1"), 2, "--context"),
    ((*ROLLOUT, "--episode", "000000", "--context", "41", "--actions", "random"), 3, "give --context 40 at most"),
    ((*ROLLOUT, "--episode", "000000", "--context", "9", "--start", "32", "--actions", "random"), 3, "start earlier"),
    ((*ROLLOUT, "--episode", "000000", "--context", "9", "--start", "32", "--length", "1"), 3, "start earlier"),
    ((*ROLLOUT, "--episode", "000000", "--context", "9", "--start", "31", "--length", "1"), 3, "ask for fewer, or use"),
    ((*ROLLOUT, "--episode", "000000", "--context", "41", "--length", "4"), 3, "give --context 36 at most"),
    ((*ROLLOUT, "--episode", "000000", "--context", "41", "--length", "40"), 3, "ask for fewer"),
    ((*ROLLOUT, "--episode", "zzz"), 3, "zzz"),
    ((*ROLLOUT, "--split", "tset"), 2, "test"),
    ((*ROLLOUT, "--actions", "repeat:UP"), 2, "UP"),
    ((*ROLLOUT, "--actions", "rndom"), 2, "did you mean 'random'"),
    ((*ROLLOUT, "--actions", "none"), 4, "never trained"),
    ((*ROLLOUT, "--actions", "nowhere.csv"), 3, "nowhere.csv"),
    ((*ROLLOUT, "--device", "cuda:99"), 2, "--device cpu"),
    (("rollout", W, D, "--out", "{full}"), 2, "not empty"),
    (("rollout", W, D, "--out", "{text}"), 2, "is a file"),
    (("train", "dynamics", "nowhere", *TO), 3, "nowhere"),
    ((*TRAIN, "--tokenizer", "nowhere"), 4, "no checkpoint"),
    ((*TRAIN, "--tokenizer", "{bigtok}"), 4, "32x32"),
    ((*TRAIN, "--size", "nanoo"), 2, "did you mean 'nano'"),
    ((*TRAIN, "--forcing", "independant"), 2, "did you mean 'independent'"),
    ((*TRAIN, "--ramp", "papr"), 2, "did you mean 'paper'"),
    ((*TRAIN, "--optimizer", "sgd"), 2, "muon"),
    ((*TRAIN, "--steps", "5", "--budget", "5m"), 2, "not both"),
    ((*TRAIN, "--budget", "soon"), 2, "4m"),
    ((*TRAIN, "--batch", "0"), 2, "batch"),
    ((*TRAIN, "--frames", "1"), 2, "frames"),
    ((*TRAIN, "--tokenizer", "{tok}", "--frames", "500"), 3, "--frames"),
    ((*TRAIN, "--lr", "-1"), 2, "lr"),
    ((*TRAIN, "--bootstrap-share", "2"), 2, "--bootstrap-share"),
    ((*TRAIN, "--tokenizer", "{tok}", "--resume"), 2, "no run to resume"),
    ((*TRAIN, "--tokenizer", "{tok}", "--init-from", "nowhere"), 4, "no checkpoint"),
    (("train", "tokenizer", D, *TO, "--kind", "conv"), 2, "linear"),
    (("train", "tokenizer", D, *TO, "--patch", "5"), 2, "--patch"),
    (("train", "tokenizer", D, *TO, "--patch", "big"), 2, "16x32"),
    (("train", "tokenizer", D, *TO, "--patch", "8", "--whitening", "3"), 2, "whitening"),
    (("train", "tokenizer", D, *TO, "--patch", "8", "--latent-dim", "999"), 2, "latent_dim"),
    (("info", "nowhere"), 3, "nowhere"),
    (("info", "{full}"), 3, "not a dataset"),
    (("infoo",), 2, "infoo"),
    ((), 2, ""),
]


@pytest.mark.parametrize(("arguments", "code", "word"), BAD, ids=[" ".join(map(str, b[0])) for b in BAD])
def test_nonsense_gets_one_sentence_the_right_code_and_changes_nothing(run, tmp_path, arguments, code, word):
    from ahriuwu_cli.data.action_component import ActionComponent
    from ahriuwu_cli.data.actions import ActionSpace
    from ahriuwu_cli.models.linear_tokenizer import LinearTokenizer
    from ahriuwu_cli.training.checkpoint import save_tokenizer

    place = tmp_path
    small_dataset(place / "data")
    save_world(small_world(), place / "world")
    save_tokenizer(LinearTokenizer(32, 32, 8, 8, 6), place / "bigtok", {})
    save_tokenizer(small_world().tokenizer, place / "tok", {})
    foreign = ActionSpace((ActionComponent("keys", "binary", 3, ("A", "B", "C")),))
    small_dataset(place / "foreign", space=foreign)
    if "{other}" in arguments:
        _larger_dataset(place / "other")
    (place / "text").write_text("not a video")
    (place / "full").mkdir()
    (place / "full" / "file").write_text("precious")
    before = snapshot(place)
    names = ("world", "data", "out", "text", "full", "other", "foreign", "bigtok", "tok")
    paths = {name: place / name for name in names}
    status, out, err = run(*(str(a).format(**paths) for a in arguments))
    assert status == code, err
    assert word in (err if arguments else out + err)
    if arguments:
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        assert "Traceback" not in err
    assert snapshot(place) == before


def _larger_dataset(path):
    from ahriuwu_cli.data.episode_writer import EpisodeWriter

    with EpisodeWriter(path, height=32, width=32, fps=10.0, action_space=SPACE, name="big", seed=0) as writer:
        for seed in range(4):
            frames = np.random.default_rng(seed).integers(0, 255, (30, 32, 32, 3)).astype(np.uint8)
            writer.add(frames, np.zeros((29, 2), np.float32))


def test_several_sources_of_actions_share_prompt_and_noise_and_each_is_the_rollout_it_is_alone(run, place):
    from safetensors.numpy import load_file

    def frames(name, *options):
        code, _, err = run("rollout", place / "world", place / "data", "--out", place / name, "--length", 3, *options)
        assert code == 0, err
        return load_file(place / name / "arrays.safetensors")

    both = frames("both", "--actions", "repeat:LEFT", "--actions", "repeat:RIGHT", "--pick", "busiest")
    window = json.loads((place / "both" / "rollout.json").read_text())["prompt"].split(":")
    where = ("--episode", window[0], "--start", window[1])
    for i, action in enumerate(("repeat:LEFT", "repeat:RIGHT")):
        alone = frames(f"alone{i}", "--actions", action, *where)
        assert np.array_equal(both["context"], alone["context"])
        assert np.array_equal(both["actions"][i], alone["actions"])
        assert np.array_equal(both["frames"][i], alone["frames"])
    assert not np.array_equal(both["actions"][0], both["actions"][1])


def test_the_busiest_window_has_the_most_edges_in_its_last_context_frame(run, place):
    from safetensors.numpy import load_file

    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.evaluation.metrics import gradient_energy

    options = ("--length", 1, "--context", 2, "--actions", "random", "--pick", "busiest")
    assert run("rollout", place / "world", place / "data", "--out", place / "o", *options)[0] == 0
    chosen = load_file(place / "o" / "arrays.safetensors")["context"][-1]
    store = EpisodeStore.open(place / "data")
    clips = [
        store.frames(e.id)[1:-1] for e in store.episodes("test")
    ]  # frame 1 on ends a context of 2, and one follows
    assert sum(map(len, clips)) <= 64, "all windows are candidates here"
    assert gradient_energy(chosen) == max(gradient_energy(clip).max() for clip in clips)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--pick", "busyest"), "busiest"),
        (("--pick", "busiest", "--start", 1), "--start"),
        (("--actions", "random", "--actions", "random"), "once"),
    ],
)
def test_a_pick_or_actions_that_make_no_sense_are_refused(run, place, options, word):
    code, _, err = run("rollout", place / "world", place / "data", "--out", place / "o", "--length", 2, *options)
    assert code == 2
    assert word in err
    assert not (place / "o").exists()
