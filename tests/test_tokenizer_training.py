"""Training the transformer tokenizer: it learns, it resumes bit for bit, and it refuses what cannot go on."""

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small import LEARNERS, gradients_of, small_dataset
from worlds import SPACE, moving_pictures

from ahriuwu_cli.config import PRECISIONS
from ahriuwu_cli.data.documents import read_object
from ahriuwu_cli.data.episode_writer import EpisodeWriter
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.errors import CheckpointError, DataError, Interrupted, TrainingError, UserError
from ahriuwu_cli.models import products
from ahriuwu_cli.models.transformer_tokenizer import TransformerTokenizerConfig
from ahriuwu_cli.training import losses, tokenizer_loop
from ahriuwu_cli.training.checkpoint import load_tokenizer
from ahriuwu_cli.training.config_json import seal
from ahriuwu_cli.training.losses import LPIPS, RunningRMS, load_lpips, reconstruction_loss
from ahriuwu_cli.training.signals import StopRequest
from ahriuwu_cli.training.state import load_state
from ahriuwu_cli.training.states import SAVE_SECONDS
from ahriuwu_cli.training.tokenizer_config import TokenizerTrainConfig
from ahriuwu_cli.training.tokenizer_loop import train_transformer_tokenizer
from ahriuwu_cli.training.tokenizer_quality import reconstruction

TINY = TransformerTokenizerConfig(
    height=16, width=16, patch=8, model_width=32, depth_encoder=2, depth_decoder=2, heads=2, kv_heads=2, mlp_hidden=64,
    time_every=2, tokens=4, latent_dim=8, window=3,
)  # fmt: skip
CONFIG = TokenizerTrainConfig(architecture=TINY, steps=4, batch=2, frames=4, warmup=2, log_every=1, save_every=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    return small_dataset(tmp_path_factory.mktemp("data") / "bar", episodes=4, frames=12)


def metrics(run: Path) -> list[dict]:
    """The lines of the log without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("frames_per_s", "eta_s")} for line in lines]


def stop_after(steps: int) -> tuple[StopRequest, object]:
    stop = StopRequest()

    def progress(done: int, total: int) -> None:
        stop.number = 15 if done == steps - 1 else stop.number

    return stop, progress


def test_the_tokenizer_is_written_while_no_other_run_may_begin_in_its_folder(store, tmp_path):
    config, kept = CONFIG, []

    def keep(tokenizer, is_there) -> None:
        with pytest.raises(UserError, match="alive"):
            train_transformer_tokenizer(store, dataclasses.replace(config, seed=7), tmp_path / "r", overwrite=True)
        kept.append(tokenizer)

    for _ in range(2):  # the second finds the run finished, and no tokenizer that is whole
        train_transformer_tokenizer(store, config, tmp_path / "r", keep=keep)
    assert len(kept) == 2


def test_a_command_says_its_own_tokenizer_and_makes_a_damaged_one_anew(store, tmp_path, monkeypatch, run):
    words = ("train", "tokenizer", store.path, "--kind", "transformer", "--patch", 8, "--tokens", 4, "--steps", 2)
    words = (
        *words,
        "--latent-dim",
        4,
        "--batch",
        1,
        "--frames",
        2,
        "--device",
        "cpu",
        "--out",
        tmp_path / "r",
        "--json",
    )
    code, first, err = run(*words)
    assert code == 0, err
    weights = tmp_path / "r" / "tokenizer" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    assert run(*words)[:2] == (0, first)
    assert weights.read_bytes() == whole
    released = tokenizer_loop.RunFolder.release

    def other(self) -> None:  # what another run puts there once this one has let go of the folder
        released(self)
        weights.write_bytes(b"")

    monkeypatch.setattr(tokenizer_loop.RunFolder, "release", other)
    assert run(*words)[:2] == (0, first)


def test_a_run_is_saved_after_so_many_seconds_too(store, tmp_path, monkeypatch):
    at = [0.0]

    def later(done: int, total: int) -> None:
        at[0] += 0.4 * SAVE_SECONDS

    monkeypatch.setattr(tokenizer_loop, "time", SimpleNamespace(monotonic=lambda: at[0]))
    config = dataclasses.replace(CONFIG, steps=5, save_every=100)
    train_transformer_tokenizer(store, config, tmp_path / "r", progress=later)
    assert {path.name for path in (tmp_path / "r" / "state").iterdir()} == {"step-00000004", "step-00000005"}


@pytest.mark.parametrize("kind", ["linear", "transformer"])
def test_a_dataset_without_val_episodes_is_refused_before_anything_is_trained(tmp_path, monkeypatch, run, kind):
    data = small_dataset(tmp_path / "data", episodes=1).path
    monkeypatch.setattr(EpisodeStore, "frames", lambda *_: pytest.fail("frames were read"))
    device = ("--device", "cpu") if kind == "transformer" else ()
    code, _, err = run("train", "tokenizer", data, "--kind", kind, *device, "--out", tmp_path / "out")
    assert (code, err) == (3, f"error: {data} has no val episodes to judge a tokenizer by: record more episodes\n")
    assert not (tmp_path / "out").exists()


def test_info_describes_the_tokenizer_of_a_run_once_it_is_there(store, tmp_path, run):
    from ahriuwu_cli.training.checkpoint import save_tokenizer

    tokenizer = train_transformer_tokenizer(store, CONFIG, tmp_path / "r")
    code, _, err = run("info", tmp_path / "r")
    assert (code, "has not saved its tokenizer yet: it does so at its end" in err) == (3, True)
    save_tokenizer(tokenizer, tmp_path / "r" / "tokenizer", {})
    code, said, _ = run("info", tmp_path / "r")
    assert (code, tokenizer.fingerprint() in said) == (0, True)


def test_a_tokenizer_of_another_run_or_kind_is_not_taken_for_a_runs_own(tmp_path, run):
    small_dataset(tmp_path / "data", episodes=6)
    command = [
        "train",
        "tokenizer",
        tmp_path / "data",
        "--kind",
        "transformer",
        "--steps",
        1,
        "--patch",
        8,
        "--batch",
        1,
    ]
    command += ["--frames", 2, "--tokens", 4, "--latent-dim", 8, "--device", "cpu", "--out"]
    for name, more in (("r", ()), ("other", ("--seed", 1)), ("more", ("--steps", 2))):
        assert run(*command, tmp_path / name, *more)[0] == 0
    linear = ["train", "tokenizer", tmp_path / "data", "--patch", 8, "--latent-dim", 6, "--out", tmp_path / "l"]
    assert run(*linear)[0] == 0
    mine, here = load_tokenizer(tmp_path / "r" / "tokenizer").fingerprint(), tmp_path / "r" / "tokenizer"
    for foreign in (tmp_path / "other" / "tokenizer", tmp_path / "more" / "tokenizer", tmp_path / "l"):
        shutil.rmtree(here)
        shutil.copytree(foreign, here)
        code, _, said = run(*command, tmp_path / "r")
        assert (code, "tokenizer is missing, damaged or another run's, and made anew" in said) == (0, True), said
        assert load_tokenizer(here).fingerprint() == mine
    code, _, said = run(*command, tmp_path / "r")
    assert (code, "made anew" in said) == (0, False)
    config = read_object(here / "config.json")  # as an older version wrote it
    del config["facts"]["train"]
    (here / "config.json").write_text(json.dumps(seal(config)))
    assert "made anew" not in run(*command, tmp_path / "r")[2]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_two_steps_and_a_resume_to_four_equal_four_unbroken_bit_for_bit(store, tmp_path, optimizer):
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    whole = train_transformer_tokenizer(store, config, tmp_path / "whole")

    stop, progress = stop_after(2)
    with pytest.raises(Interrupted, match="at step 2; state saved, go on with: train tokenizer --resume"):
        train_transformer_tokenizer(store, config, tmp_path / "parts", progress=progress, stop=stop)
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 0}\n{"step": 3, "lo')  # what a killed run leaves behind
    torch.manual_seed(99)
    sentences = []
    parts = train_transformer_tokenizer(store, config, tmp_path / "parts", resume=True, announce=sentences.append)

    assert "after step 2 of 4" in sentences[0]
    assert whole.fingerprint() == parts.fingerprint()
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    a, b = (load_state(tmp_path / run / "state" / "step-00000004") for run in ("whole", "parts"))
    assert a[1] == b[1]
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(a[0][name], b[0][name]) for name in a[0])
    again = train_transformer_tokenizer(store, config, tmp_path / "parts", resume=True)  # nothing left to do
    assert again.fingerprint() == whole.fingerprint()


def test_a_run_that_goes_on_with_other_threads_or_products_says_so_and_a_finished_one_does_not(
    store, tmp_path, monkeypatch
):
    stop, progress = stop_after(2)
    with pytest.raises(Interrupted):
        train_transformer_tokenizer(store, CONFIG, tmp_path / "r", progress=progress, stop=stop)
    threads, before, said = torch.get_num_threads(), products.library(), []
    monkeypatch.setattr(products, "library", lambda precision: "an abacus")
    try:
        torch.set_num_threads(threads + 1)
        train_transformer_tokenizer(store, CONFIG, tmp_path / "r", announce=said.append)
    finally:
        torch.set_num_threads(threads)
    assert said[0] == (
        f"resuming with {threads + 1} threads instead of {threads} and products by an abacus instead of {before}: "
        "steps stay the same up to rounding"
    )
    train_transformer_tokenizer(store, CONFIG, tmp_path / "r", announce=said.append)
    assert sum("resuming with" in sentence for sentence in said) == 1


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("optimizer", "state"), LEARNERS)
def test_a_state_that_is_saved_before_the_next_step_is_the_one_that_was_loaded(
    store, tmp_path, optimizer, state, precision
):
    config = dataclasses.replace(CONFIG, optimizer=optimizer, optimizer_state=state, precision=precision)
    stop, progress = stop_after(2)
    with pytest.raises(Interrupted):
        train_transformer_tokenizer(store, config, tmp_path, stop=stop, progress=progress)
    before = {path: path.read_bytes() for path in (tmp_path / "state").rglob("*.*")}
    trainer = tokenizer_loop._Trainer(store, config, tmp_path, torch.device("cpu"), "train tokenizer")
    trainer.begin(True, False, lambda sentence: None)
    trainer.save()
    trainer.run.release()
    assert len(before) == 2
    assert {path: path.read_bytes() for path in (tmp_path / "state").rglob("*.*")} == before


def test_the_global_generator_neither_matters_nor_moves(store, tmp_path):
    config = dataclasses.replace(CONFIG, steps=1)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = train_transformer_tokenizer(store, config, tmp_path / "a")
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert train_transformer_tokenizer(store, config, tmp_path / "b").fingerprint() == first.fingerprint()
    other = dataclasses.replace(config, seed=1)
    assert train_transformer_tokenizer(store, other, tmp_path / "c").fingerprint() != first.fingerprint()


def test_it_overfits_a_tiny_clip_and_its_latents_have_unit_spread(tmp_path):
    tiny = small_dataset(tmp_path / "data", episodes=1, frames=4)
    architecture = dataclasses.replace(TINY, latent_dim=16, mask_max=0.0)
    config = TokenizerTrainConfig(
        architecture=architecture, steps=150, batch=2, frames=4, lr=1e-2, warmup=10, clip=10.0, log_every=1, seed=2
    )  # one seed of eight stays on a plateau at a twentieth for so long, whatever the optimiser (docs/log.md)
    tokenizer = train_transformer_tokenizer(tiny, config, tmp_path / "run")
    lines = metrics(tmp_path / "run")
    assert lines[-1]["mse"] < lines[0]["mse"] / 1000
    frames = torch.from_numpy(tiny.frames("000000"))[None]
    latents = tokenizer.encode(frames)
    assert not tokenizer.training
    assert latents.square().mean().sqrt() == pytest.approx(1, abs=1e-3)
    assert latents.mean(dim=(0, 1)).abs().max() < 1e-4
    error = (tokenizer.decode(latents) - frames.float() / 255).square().mean().item()
    assert error == pytest.approx(lines[-1]["mse"], rel=0.2)


def test_a_gradient_is_cut_to_the_clip_and_the_log_says_how_long_it_was(store, tmp_path, monkeypatch):
    seen = gradients_of(monkeypatch, tokenizer_loop)
    for clip in (1e9, 0.01):
        config = dataclasses.replace(CONFIG, steps=1, clip=clip)
        train_transformer_tokenizer(store, config, tmp_path / str(clip))
    whole, cut = seen
    assert whole.norm() > 0.02
    assert torch.allclose(cut, whole * 0.01 / whole.norm(), atol=1e-6)
    assert metrics(tmp_path / "0.01")[0]["grad_norm"] == pytest.approx(whole.norm().item(), rel=1e-4)


def test_the_psnr_of_a_line_is_that_of_its_squared_error(store, tmp_path):
    train_transformer_tokenizer(store, CONFIG, tmp_path / "run")
    for line in metrics(tmp_path / "run"):
        assert 10 ** (-line["masked_psnr_db"] / 10) == pytest.approx(line["mse"], rel=1e-3)


def test_a_tokenizer_is_judged_by_every_frame_of_up_to_sixteen_episodes(tmp_path):
    """One whose error is known: 0.1 on the first episode that it decodes (20 dB), then 0.05, 0.033, ..."""
    store, decoded = moving_pictures(tmp_path / "data", episodes=18, frames=3, split="val"), []

    class Off:
        def encode(self, frames):
            return frames

        def decode(self, frames):
            decoded.append(frames)
            return frames.double() / 255 + 0.1 / len(decoded)

    found = reconstruction(Off(), store, "val")
    assert found["psnr_db"] == pytest.approx(20 + sum(20 * math.log10(k) for k in range(1, 17)) / 16)
    assert found["frames"] == 16 * 3
    assert reconstruction(Off(), store, "val", most=99)["frames"] == 18 * 3


class Pale:
    """Gives frames back with so much of their contrast."""

    def __init__(self, contrast: float) -> None:
        self.contrast = contrast

    def encode(self, frames):
        return frames

    def decode(self, frames):
        return self.contrast * frames.double() / 255


@pytest.mark.parametrize(("contrast", "sharpness"), [(1.0, 1.0), (0.5, 0.25), (0.0, 0.0)])
def test_a_tokenizer_that_halves_the_contrast_keeps_a_quarter_of_the_sharpness(store, contrast, sharpness):
    assert reconstruction(Pale(contrast), store, "val")["sharpness_ratio"] == pytest.approx(sharpness)


def test_flat_frames_have_no_sharpness_that_could_be_kept(tmp_path):
    with EpisodeWriter(tmp_path, height=16, width=16, fps=10.0, action_space=SPACE, seed=0) as writer:
        writer.add(
            np.full((3, 16, 16, 3), 77, np.uint8), SPACE.random(2, (1, 1), np.random.default_rng(0)), split="val"
        )
    assert reconstruction(Pale(1.0), EpisodeStore.open(tmp_path), "val")["sharpness_ratio"] is None


def test_the_run_folder_says_what_was_trained_and_announces_mse_only(store, tmp_path):
    said = []
    train_transformer_tokenizer(store, CONFIG, tmp_path / "run", announce=said.append)
    document = json.loads((tmp_path / "run" / "run.json").read_text())
    assert document["config"] == json.loads(json.dumps(CONFIG.to_json()))
    assert document["facts"]["dataset_fingerprint"] == store.fingerprint
    assert document["facts"]["loss"].startswith("MSE only")
    assert any("MSE only" in sentence for sentence in said)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", "metrics.jsonl", "run.json", "state"]
    assert {"step", "loss", "mse", "grad_norm", "lr"} <= metrics(tmp_path / "run")[0].keys()


def test_a_used_folder_is_refused_and_left_alone_unless_it_may_be_overwritten(store, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        train_transformer_tokenizer(store, CONFIG, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    train_transformer_tokenizer(store, CONFIG, tmp_path, overwrite=True)
    assert not (tmp_path / "mine.txt").exists()


def test_a_resume_with_other_settings_or_nothing_to_resume_is_refused(store, tmp_path):
    with pytest.raises(UserError, match="no run to resume"):
        train_transformer_tokenizer(store, CONFIG, tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    train_transformer_tokenizer(store, CONFIG, tmp_path / "run")
    for change in ({"lr": 0.1}, {"steps": 9}, {"architecture": dataclasses.replace(TINY, tokens=5)}):
        with pytest.raises(UserError, match=f"other settings.*{next(iter(change))}"):
            train_transformer_tokenizer(store, dataclasses.replace(CONFIG, **change), tmp_path / "run", resume=True)
    other = small_dataset(tmp_path / "other", episodes=3, frames=12)
    with pytest.raises(UserError, match="dataset_fingerprint differs"):
        train_transformer_tokenizer(other, CONFIG, tmp_path / "run", resume=True)


def test_a_damaged_state_is_set_aside_for_the_one_before_and_refused_when_none_is_left(store, tmp_path):
    whole = train_transformer_tokenizer(store, CONFIG, tmp_path / "run")
    states = tmp_path / "run" / "state"
    assert sorted(p.name for p in states.iterdir()) == ["step-00000002", "step-00000004"]

    def damage(name):
        (file,) = (states / name).glob("*.safetensors")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 64
        file.write_bytes(content)

    said = []
    damage("step-00000004")
    again = train_transformer_tokenizer(store, CONFIG, tmp_path / "run", resume=True, announce=said.append)
    assert "step-00000004 is damaged" in said[0]
    assert "set aside as step-00000004.damaged, going on from" in said[0]
    assert "step-00000002 instead" in said[0]
    assert again.fingerprint() == whole.fingerprint()
    for name in ("step-00000002", "step-00000004"):
        damage(name)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"was altered.*no other state is left"):
            train_transformer_tokenizer(store, CONFIG, tmp_path / "run", resume=True)


def test_a_loss_that_is_not_finite_stops_with_its_step_and_saves_nothing(store, tmp_path, monkeypatch):
    real, calls = losses.RunningRMS.forward, []

    def breaks(self: RunningRMS, value: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return real(self, value) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(losses.RunningRMS, "forward", breaks)
    named = r"not finite at step 3.*windows 0000\d\d:\d+, 0000\d\d:\d+\).*step-00000002"
    with pytest.raises(TrainingError, match=named):
        train_transformer_tokenizer(store, CONFIG, tmp_path / "run")
    assert load_state(tmp_path / "run" / "state" / "step-00000002")[1]["step"] == 2


def test_data_that_do_not_fit_are_refused_before_anything_is_written(store, tmp_path):
    tall = dataclasses.replace(CONFIG, architecture=dataclasses.replace(TINY, height=32))
    with pytest.raises(DataError, match="32x16"):
        train_transformer_tokenizer(store, tall, tmp_path / "run")
    with pytest.raises(DataError, match="long enough"):
        train_transformer_tokenizer(store, dataclasses.replace(CONFIG, frames=13), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "fields", [{"steps": 0}, {"frames": 2}, {"optimizer": "sgd"}, {"lr": float("nan")}, {"clip": 0}, {"precision": "x"}]
)
def test_settings_that_cannot_train_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        dataclasses.replace(CONFIG, **fields)


def test_a_running_rms_makes_terms_of_any_size_weigh_alike():
    small, large = RunningRMS(0.9), RunningRMS(0.9)
    values = torch.rand(200, generator=torch.Generator().manual_seed(0)) + 0.5
    a = torch.stack([small(v * 1e-4) for v in values])
    b = torch.stack([large(v * 1e4) for v in values])
    assert a[0] == pytest.approx(1)
    assert torch.allclose(a, b, rtol=1e-4)
    assert a[50:].square().mean() == pytest.approx(1, abs=0.1)


def test_a_running_rms_is_the_bias_corrected_average_rests_in_evaluation_and_passes_its_gradient_through():
    rms, values = RunningRMS(0.8), [3.0, 1.0, 2.0]
    results = [rms(torch.tensor(v)) for v in values]
    weights = torch.tensor([0.2 * 0.8**2, 0.2 * 0.8, 0.2])
    expected = (weights * torch.tensor(values).square()).sum() / weights.sum()
    assert results[-1] == pytest.approx(2.0 / expected.sqrt().item())
    rms.eval()
    assert rms(torch.tensor(5.0)) == rms(torch.tensor(5.0)) == pytest.approx(5.0 / expected.sqrt().item())
    value = torch.tensor(4.0, requires_grad=True)
    rms(value).backward()
    assert value.grad == pytest.approx(1 / expected.sqrt().item())
    assert RunningRMS()(torch.tensor(0.0)) == 0


class MeanDistance(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor, normalize: bool) -> torch.Tensor:
        assert normalize  # frames are in [0, 1]
        assert a.shape[1:] == (3, 16, 16)
        return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)


def test_the_loss_is_mse_plus_a_fifth_of_lpips_each_over_its_rms():
    lpips = LPIPS(MeanDistance(), "alex", "0" * 64)
    a, b = torch.rand(2, 2, 3, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    terms_rms = RunningRMS(), RunningRMS()
    loss, terms = reconstruction_loss(a, b, terms_rms[0], lpips, terms_rms[1])
    assert loss.item() == pytest.approx(1.2)  # both terms are 1 in the first step
    assert terms["mse"] == pytest.approx((a - b).square().mean().item())
    assert terms["lpips"] == pytest.approx((a - b).abs().mean().item())
    assert reconstruction_loss(a, b, RunningRMS())[0].item() == pytest.approx(1.0)
    assert not lpips.train().network.training


def test_lpips_without_its_weights_its_package_or_with_other_weights_is_refused(tmp_path, monkeypatch):
    for missing in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UserError, match="cannot read LPIPS backbone weights"):
            load_lpips(missing)
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"a pickle, perhaps")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_lpips(other)
    save_file({"features.0.weight": torch.zeros(8, 3, 5, 5)}, other)
    with pytest.raises(UserError, match="is not LPIPS"):
        load_lpips(other)
    save_file({"features.0.weight": torch.zeros(64, 3, 11, 11)}, other)
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match="needs the package lpips"):
        load_lpips(other)
