"""10,000 frames: memory is flat, positions do not drift, and a frame that is not finite is named."""

import errno
import gc
import json
import os
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_actions
from safetensors.numpy import load_file
from small import small_dataset, small_world
from worlds import moving_pictures, tiny_world

from ahriuwu_cli import cli, disk
from ahriuwu_cli.data.tensor_writer import TensorWriter
from ahriuwu_cli.diffusion.samplers import SAMPLERS
from ahriuwu_cli.errors import TrainingError
from ahriuwu_cli.imagine import imagine
from ahriuwu_cli.models.block import TimeContext, time_tables
from ahriuwu_cli.models.layers import as_bias, window_mask
from ahriuwu_cli.models.transformer_tokenizer import TransformerTokenizer, TransformerTokenizerConfig
from ahriuwu_cli.prompts import Request
from ahriuwu_cli.rollout import CTX_MODES, KeyedNoise, RolloutConfig, rollout
from ahriuwu_cli.training.checkpoint import save_world

LENGTH = 10_000


def resident_mb():
    """Megabytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class Watcher:
    """A model that remembers the inputs of the last committed frames, and the last pass."""

    def __init__(self, model, frames):
        self.model, self.committed, self.last = model, deque(maxlen=frames), None

    def new_cache(self, batch):
        return self.model.new_cache(batch)

    def extend(self, z_tau, tau, d, actions, known, cache, keep, unread=0):
        inputs = (z_tau, tau, d, actions, known)
        z_hat = self.model.extend(*inputs, cache, keep, unread)
        for i in range(keep):
            self.committed.append([x[:, i : i + 1] for x in inputs])
        self.last = ([x[:, keep:] for x in inputs], cache.frames, z_hat)
        return z_hat


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("attention", ["place", "frame"])
def test_frame_10000_is_what_recomputing_its_window_gives_and_memory_stays_flat(make_dynamics, attention):
    length = LENGTH if attention == "place" else 1_000
    model = make_dynamics(depth=2, time_every=1, time_attention=attention)  # so that a frame hangs on two windows
    reach = model.time_layers * (model.config.window - 1)
    watcher, generator = Watcher(model, reach), torch.Generator().manual_seed(0)
    prompt = torch.randn(1, 3, 4, 8, generator=generator)
    actions = random_actions(1, 3 + length, generator)
    known = torch.ones(1, 3 + length, dtype=torch.bool)
    config, noise = RolloutConfig(steps=1, sampler="euler"), KeyedNoise(0, ["a"], (4, 8))
    held = {}
    for t, _ in enumerate(rollout(watcher, prompt, actions, known, config, noise, 8), 1):
        if t in (500, length):
            held[t] = resident_mb()
    draft, frames, said = watcher.last
    assert frames == length + 2
    assert torch.isfinite(said).all()
    again = model(*(torch.cat(parts, dim=1) for parts in zip(*watcher.committed, draft, strict=True)))[:, -1:]
    assert (again - said).abs().max() < 1e-4 * max(1.0, float(again.abs().max()))
    assert held[length] - held[500] < 8, held


def tensors():
    """All tensors that are alive, by type: a weak reference to a dead object answers `isinstance` with an error."""
    gc.collect()
    return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]


def tensor_bytes(before):
    """Bytes of all tensors made since `before`, a list of `tensors` that keeps them alive: what a compiler left behind
    in another test (tensors without storage, or of a packed kind) is not ours to ask. Unlike the memory of the process
    this shows nothing that was freed."""
    known = {id(x) for x in before}
    storages = [x.untyped_storage() for x in tensors() if id(x) not in known]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


@pytest.mark.parametrize("ctx_mode", CTX_MODES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_rollout_keeps_nothing_of_the_frames_that_it_gave_away(make_dynamics, sampler, ctx_mode):
    model, actions = make_dynamics(depth=2), random_actions(1, 53, torch.Generator().manual_seed(0))
    config, noise = RolloutConfig(steps=2, sampler=sampler, ctx_mode=ctx_mode), KeyedNoise(0, ["a"], (4, 8))
    held, before = {}, tensors()
    for t, _ in enumerate(rollout(model, torch.zeros(1, 3, 4, 8), actions, torch.ones(1, 53).bool(), config, noise, 8)):
        if t in (20, 49):  # the window of 5 is full
            held[t] = tensor_bytes(before)
    assert held[49] == held[20] > 0  # one frame of latents is 128


@pytest.mark.parametrize("attention", ["place", "frame"])
def test_a_window_is_the_same_at_position_0_and_at_a_million(make_dynamics, tiny_clip, attention):
    model = make_dynamics(time_attention=attention)
    c, frames = model.config, tiny_clip.tau.shape[1]
    each = c.sequence // c.lines
    mask = window_mask(frames, c.window, "cpu").repeat_interleave(each, 0).repeat_interleave(each, 1)
    far = TimeContext(c, time_tables(c, torch.arange(frames) + 10**6), as_bias(mask))
    at_zero, at_million = model(*tiny_clip.inputs), model._run(*tiny_clip.inputs, far)
    assert (at_zero - at_million).abs().max() < 1e-4
    shifted = TimeContext(c, time_tables(c, 2 * torch.arange(frames)), as_bias(mask))
    assert (at_zero - model._run(*tiny_clip.inputs, shifted)).abs().max() > 1e-2  # positions do matter


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_the_command_writes_frames_as_they_are_made_and_keeps_none(tmp_path):
    """1,500 pictures of the film are 100 MB: holding them, or the panels, would show."""
    small_dataset(tmp_path / "data")
    world, held = small_world(), {}

    def progress(done, total):
        if done in (640, total):
            held[done] = resident_mb()

    request = Request(tmp_path / "data", context=4, length=1_500, actions=("random",))
    result = imagine(world, request, {"steps": 1, "sampler": "euler"}, tmp_path / "out", 8, progress)
    assert held[1_500] - held[640] < 20, held
    arrays = load_file(tmp_path / "out" / "arrays.safetensors")
    assert arrays["frames"].shape == (1, 1_500, 16, 16, 3)
    assert arrays["frames"].reshape(1_500, -1).any(axis=1).all()  # none was left out
    assert result["files"]["mp4"] == str(tmp_path / "out" / "rollout.mp4")
    import av

    with av.open(result["files"]["mp4"]) as film:
        assert film.streams.video[0].frames == 1_504


def test_the_score_is_of_the_actions_that_were_taken_wherever_they_stand(tmp_path):
    world, found = tiny_world(moving_pictures(tmp_path / "data")), []
    for actions in (("data",), ("repeat:RIGHT", "data")):
        request = Request(tmp_path / "data", context=4, length=9, actions=actions)
        imagine(world, request, {}, tmp_path / str(len(found)), 1, lambda *_: None)
        arrays = load_file(tmp_path / str(len(found)) / "arrays.safetensors")["frames"]
        found.append(json.loads((tmp_path / str(len(found)) / "rollout.json").read_text())["psnr_db"])
    assert (arrays[0] != arrays[1]).any()  # or this test shows nothing
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_what_is_written_in_chunks_is_what_is_written_at_once(tmp_path, monkeypatch):
    small_dataset(tmp_path / "data")
    request = Request(tmp_path / "data", context=4, length=9, actions=("data", "repeat:LEFT"), samples=2)
    for chunk in (64, 2):
        monkeypatch.setattr("ahriuwu_cli.imagine.CHUNK", chunk)
        imagine(small_world(), request, {}, tmp_path / str(chunk), 1, lambda *_: None)
    whole, pieces = (json.loads((tmp_path / n / "rollout.json").read_text()) for n in ("64", "2"))
    assert whole["psnr_db"] == pieces["psnr_db"] is not None
    for name in ("arrays.safetensors", "rollout.gif", "strip.png"):
        assert (tmp_path / "64" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.parametrize(("length", "shown"), [(8, 12), (9, 7), (19, 12), (21, 9)])
def test_the_strip_shows_every_nth_frame_and_12_at_most(tmp_path, monkeypatch, length, shown):
    small_dataset(tmp_path / "data")
    request, strips = Request(tmp_path / "data", context=4, length=length, actions=("random",)), []
    monkeypatch.setattr("ahriuwu_cli.imagine.write_strip", lambda path, frames: strips.append(len(frames)))
    imagine(small_world(), request, {"steps": 1, "sampler": "euler"}, tmp_path / "out", 1, lambda *_: None)
    assert strips == [shown]


def test_a_decoder_that_looks_back_beyond_the_clip_so_far_sees_all_of_it_in_chunks_too(tmp_path, monkeypatch):
    small_dataset(tmp_path / "data")
    fields = {"model_width": 16, "heads": 2, "kv_heads": 2, "mlp_hidden": 16, "time_every": 2, "depth_encoder": 2}
    torch.manual_seed(0)
    tokenizer = TransformerTokenizer(
        TransformerTokenizerConfig(16, 16, 8, tokens=4, latent_dim=6, window=6, depth_decoder=4, **fields)
    ).eval()
    for p in tokenizer.parameters():
        p.data.mul_(2)  # so that what lies behind is seen
    assert tokenizer.decoder_window == 11  # of a clip of 4, 6, 8, ... frames
    world, found = replace(small_world(), tokenizer=tokenizer.requires_grad_(False)), []
    for chunk in (64, 2):
        monkeypatch.setattr("ahriuwu_cli.imagine.CHUNK", chunk)
        request = Request(tmp_path / "data", context=4, length=20, actions=("random",))
        imagine(world, request, {}, tmp_path / str(chunk), 1, lambda *_: None)
        found.append(load_file(tmp_path / str(chunk) / "arrays.safetensors")["frames"].astype(int))
    assert abs(found[0] - found[1]).max() <= 1  # a rounding


def test_many_passes_a_frame_hold_no_more_than_one(tmp_path):
    model, held = small_world().dynamics, []
    config, noise = RolloutConfig(steps=64, sampler="euler"), KeyedNoise(0, ["a"], (4, 6))
    for _ in rollout(
        model, torch.zeros(1, 1, 4, 6), torch.zeros(1, 3, 2), torch.ones(1, 3).bool(), config, noise, 8, held
    ):
        assert [(each.shape, bool(each)) for each in held] == [((), True)] * 64


def _breaking(world, frame, at_pass):
    """The world, its dynamics NaN from one pass of one generated frame on (2 passes a frame, none before them)."""
    real, calls = world.dynamics.extend, []

    def extend(*inputs, **more):
        z_hat = real(*inputs, **more)
        calls.append(1)  # the one frame of context is committed with the first pass
        return z_hat * float("nan") if len(calls) >= 2 * frame + at_pass else z_hat

    world.dynamics.extend = extend
    return world


@pytest.mark.parametrize(("frame", "at_pass"), [(0, 1), (7, 2), (70, 1)])
def test_a_rollout_that_is_not_finite_names_frame_and_pass_and_leaves_the_folder_as_it_was(tmp_path, frame, at_pass):
    small_dataset(tmp_path / "data")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("of an earlier rollout")
    request = Request(tmp_path / "data", context=1, length=90, actions=("random",))
    with pytest.raises(TrainingError, match=rf"generated frame {frame} on \(at pass {at_pass} of 2\)") as stop:
        imagine(_breaking(small_world(), frame, at_pass), request, {}, tmp_path / "out", 1, lambda *_: None)
    assert stop.value.exit_code == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["old"]


def test_a_tensor_file_written_in_any_order_is_what_safetensors_reads(tmp_path):
    rng = np.random.default_rng(0)
    numbers, bytes_ = rng.normal(size=(3, 5)).astype(np.float32), rng.integers(0, 255, (2, 7, 3), np.uint8)
    with TensorWriter(
        tmp_path / "a", {"b": ("U8", bytes_.shape), "n": ("F32", (3, 5)), "none": ("U8", (0, 4))}
    ) as file:
        file.write("b", bytes_[1, 4:], 1, 4)
        file.write("n", numbers)
        file.write("b", bytes_[0], 0)
        file.write("b", bytes_[1, :4], 1)
        file.write("none", np.zeros((0, 4), np.uint8))
    found = load_file(tmp_path / "a")
    assert np.array_equal(found["b"], bytes_)
    assert np.array_equal(found["n"], numbers)
    assert found["none"].shape == (0, 4)


@pytest.mark.parametrize("known", [True, False])
def test_a_rollout_that_has_no_room_on_the_disk_is_refused_before_its_first_frame(tmp_path, monkeypatch, capsys, known):
    small_dataset(tmp_path / "data")
    save_world(small_world(), tmp_path / "world")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(total=9_000 * known, free=4_321 * known))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["rollout", "world", "data", "--split", "train", "--length", "9", "--device", "cpu", "--out", "h"])
    said = capsys.readouterr().err
    assert stop.value.code == (1 if known else 0), said
    assert ("no room for h (2.039e-05 GB are needed, 4.321e-06 GB are free): make room there" in said) == known
    assert (tmp_path / "h").exists() != known


def test_room_is_looked_for_beside_the_file_to_the_byte(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda p: asked.append(p) or SimpleNamespace(total=9e9, free=3e9))
    disk.check_room(tmp_path / "x", 3_000_000_000)
    with pytest.raises(OSError, match=r"3 GB are needed, 3 GB are free") as error:
        disk.check_room(tmp_path / "x", 3_000_000_001)
    assert asked == [tmp_path, tmp_path]
    assert error.value.errno == errno.ENOSPC
