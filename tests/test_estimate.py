"""A forecast of a training step is what the step then does: FLOPs, bytes, and what fits on a card."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SLOTS, TINY, make_clip
from small import small_dataset
from torch._subclasses.fake_tensor import FakeTensor

from ahriuwu_cli import cli
from ahriuwu_cli.config import TrainConfig
from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.episode_writer import EpisodeWriter
from ahriuwu_cli.models import needs
from ahriuwu_cli.models.dynamics import Dynamics, count_parameters
from ahriuwu_cli.models.dynamics_config import DynamicsConfig
from ahriuwu_cli.models.kernels import swiglu
from ahriuwu_cli.models.sizes import SIZES
from ahriuwu_cli.training import cards
from ahriuwu_cli.training.estimate import estimate
from ahriuwu_cli.training.shadow import PARTS, Ledger, Shadow, trace_step

SCRIPTS = Path(__file__).parents[1] / "scripts"
SMALL = DynamicsConfig(**{**TINY, "depth": 2, "action_space": (("binary", 3, (), ()),)})
PAPER = DynamicsConfig(**{**TINY, "conditioning": "token", "registers": 2, "kv_heads": 2, "linear_skip": False})
FRAME = DynamicsConfig(**{**TINY, "time_attention": "frame"})
CONFIG = TrainConfig(steps=10, budget=None, batch=8, frames=6, bootstrap_share=0.25)


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gradients(checkpointed, architecture):
    torch.manual_seed(0)
    model = Dynamics(replace(architecture, action_space=SLOTS))
    model.checkpoint_activations = checkpointed
    model(*make_clip().inputs).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", [SMALL, PAPER, FRAME], ids=["small", "paper", "frame"])
def test_gradients_are_the_same_bits_when_activations_are_computed_again(architecture):
    kept, again = gradients(False, architecture), gradients(True, architecture)
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_checkpointed_activations_are_forgotten_and_their_flops_paid_again():
    kept, again = (trace_step(replace(CONFIG, checkpoint_activations=x), SMALL, 8, 6, "cpu") for x in (False, True))
    assert again.kept < 0.25 * kept.kept
    assert again.flops["forward"] == kept.flops["forward"]
    more = again.flops["backward"] - kept.flops["backward"]
    assert 0.7 * kept.flops["forward"] < more <= kept.flops["forward"]  # no block's last product is needed again


VARIANTS = {
    "plain": {},
    "activations again": {"checkpoint_activations": True},
    "accumulated": {"accumulate": 4},
    "adamw": {"optimizer": "adamw"},
    "bfloat16": {"precision": "bfloat16"},
    "images": {"single_image_share": 0.25},
    "no bootstrap": {"bootstrap_share": 0.0},
    "behind a past": {"forcing": "committed"},
    "behind a past of its own": {"forcing": "resampled"},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_the_flops_of_a_forecast_are_those_that_a_real_step_counts(changes):
    config = replace(CONFIG, **changes)
    measured = script("check_memory").measure(config, SMALL, torch.device("cpu"))
    assert sum(estimate(config, SMALL).flops.values()) == pytest.approx(measured["flops"], rel=1e-3)


@pytest.mark.parametrize("architecture", [SMALL, PAPER], ids=["small", "paper"])
def test_forward_flops_agree_with_the_formula_of_the_benchmark(architecture):
    forecast = estimate(CONFIG, architecture)
    with torch.device("meta"):
        model = Dynamics(architecture)
    formula = script("bench").flops_per_frame(model, past=CONFIG.frames, cached=False)
    assert forecast.flops["forward"] / forecast.frames == pytest.approx(formula, rel=0.15)  # embeddings, unread tokens


def test_a_forecast_asks_for_no_memory_of_this_machine(monkeypatch):
    monkeypatch.setattr(needs, "refuse_beyond_machine", lambda *_: (_ for _ in ()).throw(MemoryError))
    assert estimate(replace(CONFIG, forcing="resampled"), SMALL, "cuda").flops["forward"] > 0


def test_the_teacher_costs_two_forward_passes_of_the_bootstrapped_clips():
    flops = estimate(CONFIG, SMALL).flops
    assert flops["teacher"] == pytest.approx(2 * 0.25 * flops["forward"], rel=0.02)
    assert estimate(replace(CONFIG, bootstrap_share=0.03), SMALL).flops["teacher"] == pytest.approx(
        2 * 0.03 * flops["forward"], rel=0.02
    )
    assert estimate(replace(CONFIG, forcing="horizon"), SMALL).flops["teacher"] == 0


@pytest.mark.parametrize(("accumulate", "share"), [(1, 0.03), (8, 0.2), (8, 0.0)])
def test_images_lie_between_their_neighbours_in_flops_and_take_the_bytes_of_the_fewest(accumulate, share):
    config = replace(CONFIG, accumulate=accumulate, bootstrap_share=0.0, single_image_share=share)
    clips = config.batch // accumulate
    few, many = (estimate(replace(config, single_image_share=x / clips), SMALL) for x in (0, 1))
    found, part = estimate(config, SMALL), share * clips
    assert 0 <= part < 1
    for phase in ("forward", "backward"):
        assert many.flops[phase] < few.flops[phase]
        assert found.flops[phase] == pytest.approx((1 - part) * few.flops[phase] + part * many.flops[phase], rel=1e-6)
    assert found.peak == few.peak > many.peak


BYTES_OF_STATE = {"adamw": (8, 8.2), "muon": (4, 5.5), "adafactor": (0, 1.5)}


@pytest.mark.parametrize("optimizer", BYTES_OF_STATE)
def test_owned_memory_is_bytes_times_parameters(optimizer):
    memory = estimate(replace(CONFIG, optimizer=optimizer), FRAME).memory
    count = count_parameters(Dynamics(FRAME))
    assert memory["weights"] == pytest.approx(4 * count, rel=0.01)
    assert memory["averaged"] == memory["weights"]
    least, most = BYTES_OF_STATE[optimizer]
    assert least * count <= memory["optimizer"] <= most * count


def test_a_momentum_in_bfloat16_is_forecast_at_half_the_bytes():
    full, half = (estimate(replace(CONFIG, optimizer_state=x), SMALL).memory for x in ("float32", "bfloat16"))
    matrices = sum(p.numel() for p in Dynamics(SMALL).blocks.parameters() if p.ndim == 2)
    assert full["optimizer"] - half["optimizer"] == 2 * matrices


def test_the_peak_of_a_large_batch_is_its_activations_and_of_one_clip_its_weights():
    many, one = (estimate(replace(CONFIG, batch=b, bootstrap_share=0.0), SMALL).memory for b in (64, 1))
    assert many["activations"] > 0.6 * sum(many.values())
    assert one["weights"] + one["averaged"] + one["optimizer"] > 0.3 * sum(one.values())


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_traces_tell_the_peak_of_any_number_of_clips(checkpointed, accumulate):
    config = replace(CONFIG, bootstrap_share=0.0, accumulate=accumulate, checkpoint_activations=checkpointed)
    growth = cards.growths(Shadow(config, SMALL, "cuda"), 6)[checkpointed]
    for clips in (2, 100):
        assert growth.peak(clips) == pytest.approx(
            sum(trace_step(config, SMALL, clips, 6, "cuda").peak.values()), rel=1e-3
        )


def test_what_is_said_to_fit_fits_and_one_clip_more_does_not():
    growth = cards.growths(Shadow(replace(CONFIG, bootstrap_share=0.0), SMALL, "cuda"), 6)[0]
    room = growth.peak(37) + 10
    assert growth.clips_within(room) == 37
    assert growth.peak(38) > room
    assert growth.clips_within(growth.peak(0) / 2) == 0


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_what_fits_counts_the_teachers_passes_on_wide_latents(share, monkeypatch):
    wide = replace(SMALL, latent_dim=512)
    config = replace(CONFIG, batch=40, bootstrap_share=share, checkpoint_activations=True)
    peak = sum(trace_step(config, wide, 40, 6, "cuda").peak.values())
    monkeypatch.setattr(cards, "usable", lambda card: peak + 10)
    again = next(row for row in cards.what_fits(config, {"wide": wide}) if row["checkpointed"])
    assert again["clips"] == dict.fromkeys(("16 GB", "24 GB", "80 GB"), 40)


def test_an_operation_that_writes_into_a_tensor_makes_no_new_bytes():
    ledger = Ledger()
    with ledger.fake:
        x = torch.empty(4096, 512, requires_grad=True)
    with ledger:
        assert isinstance(torch.empty(3), FakeTensor)  # or it would be memory
        swiglu(x).sum().backward()  # works through x in four parts, each written into the result
    whole, part = 4 * x.numel(), x.numel()
    assert ledger.largest[0] == whole
    assert max(sum(line) for line in ledger.lines) < 2 * whole + whole / 2 + 4 * part  # x, its gradient, y, parts


def test_what_the_forward_pass_keeps_is_booked_as_kept_from_its_birth_on():
    trace = Shadow(CONFIG, SMALL, "cpu").passes(8, 6, False)
    kept = trace.bytes[:, PARTS.index("activations")]
    growing = kept[: kept.argmax() + 1]
    assert kept.max() == trace.kept
    assert (np.diff(growing) >= 0).all()
    assert (growing > trace.kept / 2).sum() > 20


def test_a_long_clip_now_and_then_makes_the_peak_but_not_the_mean():
    short = estimate(replace(CONFIG, bootstrap_share=0.0), FRAME)
    mixed = estimate(replace(CONFIG, bootstrap_share=0.0, long_frames=24, long_every=4), FRAME)
    assert mixed.shape == (2, 24)
    assert mixed.peak > short.peak
    assert mixed.frames == short.frames == 48
    assert short.flops["forward"] < mixed.flops["forward"] < 1.5 * short.flops["forward"]


def test_a_number_format_of_the_state_that_only_muon_has_is_refused_elsewhere():
    with pytest.raises(ValueError, match="is for muon's momentum"):
        TrainConfig(optimizer="adamw", optimizer_state="bfloat16")


@pytest.fixture
def dry(tmp_path, monkeypatch, capfd):
    small_dataset(tmp_path / "data")
    tiny = {k: v for k, v in TINY.items() if k not in ("tokens", "latent_dim", "action_space")}
    for name in reversed(list(SIZES)):  # put back in reverse, that is in order
        monkeypatch.delitem(SIZES, name)
    monkeypatch.setitem(SIZES, "test", tiny)

    def call(*options):
        command = ["train", "dynamics", tmp_path / "data", "--out", tmp_path / "run", "--size", "test", "--dry-run"]
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in (*command, *options)])
        return stop.value.code, *capfd.readouterr()

    call.folder, call.said = tmp_path, capfd.readouterr
    return call


def files(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_a_dry_run_forecasts_in_json_and_writes_nothing(dry):
    before = files(dry.folder)
    code, out, _ = dry("--json", "--batch", 4)
    assert code == 0
    assert files(dry.folder) == before
    result = json.loads(out)
    for part, whole in (("parameters", "total"), ("flops", "total"), ("memory_bytes", "peak")):
        values = dict(result[part])
        assert values.pop(whole) == sum(values.values()) > 0
    assert {row["checkpointed"] for row in result["fits"]} == {False, True}
    assert result["micro_batch"] == {"clips": 4, "frames": 12}
    columns = count_parameters(Dynamics(DynamicsConfig(**{**TINY, "tokens": 1, "latent_dim": 64, "action_space": ()})))
    assert result["parameters"]["total"] == columns + 2 * TINY["width"]  # the dataset's two buttons


def test_a_dry_run_for_people_says_what_fits_and_what_was_assumed(dry, monkeypatch):
    monkeypatch.setitem(SIZES, "vast", SIZES["test"] | {"registers": 4096, "time_attention": "frame"})
    code, out, _ = dry()
    assert code == 0
    assert out.splitlines()[-1].startswith("size vast does not suit 1 token(s) a frame (attention over ")
    code, _, err = dry("--size", "vast")
    assert code == 2
    assert err == f"error: {out.splitlines()[-1]}\n"
    for words in ("nothing is written", "24 GB", "at the peak", "computed, with 10%", "as a GPU chooses"):
        assert words in out


def test_a_dry_run_is_of_one_process(dry, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = dry("--json")
    assert (code, out) == (2, "")
    assert err == "error: --dry-run is a forecast of one process: run it without torchrun\n"


def test_a_dry_run_refuses_what_the_run_would_refuse(dry):
    code, _, err = dry("--batch", 4, "--accumulate", 4, "--long-frames", 24, "--long-every", 2)
    assert code == 2
    assert "do not divide" in err
    code, _, err = dry("--size", "tset")
    assert code == 2
    assert "did you mean 'test'?" in err
    before = files(dry.folder)
    for options, code, said in (
        (("--frames", 400), 3, "no training episode of"),
        (("--init-from", dry.folder / "nowhere"), 4, "there is no checkpoint at"),
        (("--init-from", dry.folder / "data"), 4, "is not a checkpoint"),
        (("--resume",), 2, "holds no run to resume"),
        (("--out", dry.folder / "data"), 2, "choose another --out"),
    ):
        ended, _, err = dry(*options)
        assert (ended, err.count("error: ")) == (code, 1), err
        assert said in err
    assert files(dry.folder) == before


@pytest.mark.parametrize("again", [("--dry-run",), ()], ids=["dry", "run"])
def test_frames_that_the_default_tokenizer_does_not_suit_are_refused_in_a_dry_run_as_in_the_run(dry, again):
    with EpisodeWriter(dry.folder / "odd", height=40, width=16, fps=10.0, action_space=ActionSpace()) as writer:
        for i in range(3):
            writer.add(np.full((24, 40, 16, 3), i, np.uint8), None)
    with pytest.raises(SystemExit) as stop:
        cli.main(
            ["train", "dynamics", str(dry.folder / "odd"), "--out", str(dry.folder / "run"), "--size", "test", *again]
        )
    assert stop.value.code == 2
    assert dry.said()[1] == (
        "error: frames of 40x16 do not divide into patches of 16x16: choose another --patch or --latent-dim of "
        "`ahriuwu train tokenizer`\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_memory_of_a_forecast_is_what_a_real_process_holds_at_its_peak(checkpointed):
    case = {"size": "nano", "batch": 16, "frames": 12, "checkpointed": checkpointed, "precision": "float32",
            "optimizer": "muon", "accumulate": 1}  # fmt: skip
    found = subprocess.run(
        [sys.executable, SCRIPTS / "check_memory.py", "--one", json.dumps(case)],
        env={**os.environ, **script("check_memory").RETURNING}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    row = json.loads(found.stdout)
    assert row["memory_ratio"] == pytest.approx(1, abs=0.1)
    assert row["flops_ratio"] == pytest.approx(1, abs=1e-3)
