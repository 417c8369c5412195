"""Rollouts and evaluations whose products are in bfloat16: what is in 16 bits, how far it leads, and who says so."""

import json

import pytest
import torch
from small import small_dataset, small_world

from ahriuwu_cli import cli
from ahriuwu_cli.models.products import Linear
from ahriuwu_cli.training.checkpoint import load_world, save_world

BITS = 2**-8  # bfloat16 keeps 8 bits of a number


def in_bfloat16(model):
    model.multiply_in(torch.bfloat16)
    return model


@pytest.mark.parametrize("conditioning", ["add", "token", "modulate"])
def test_on_a_cpu_products_alone_are_in_16_bits(make_dynamics, tiny_clip, conditioning):
    exact, rounded = (make_dynamics(conditioning=conditioning, registers=1) for _ in range(2))
    in_bfloat16(rounded)
    of_products = {
        f"{name}.{kind}"
        for name, module in rounded.named_modules()
        if isinstance(module, Linear)
        for kind, _ in module.named_parameters()
    }
    assert {name for name, p in rounded.named_parameters() if p.dtype == torch.bfloat16} == of_products
    mine, true = rounded(*tiny_clip.inputs), exact(*tiny_clip.inputs)
    assert mine.dtype == torch.float32
    difference = (mine - true).square().mean().sqrt() / true.square().mean().sqrt()
    assert BITS / 100 < difference < 4 * BITS, difference


def test_on_a_gpu_the_spread_of_latents_and_the_ranges_of_actions_stay_exact(make_dynamics, monkeypatch):
    model = make_dynamics(action_space=(("continuous", 1, (1000.0,), (1001.0,)),))
    before, embedding = model.channel_scale.clone(), model.action
    with monkeypatch.context() as m:
        m.setattr(type(model.embed.weight), "device", property(lambda _: torch.device("cuda")))
        in_bfloat16(model)
    assert {name for name, p in model.named_parameters() if p.dtype != torch.bfloat16} == {"channel_scale"}
    assert torch.equal(model.channel_scale, before)
    values, known = torch.tensor([[[1000.0], [1000.5], [1001.0]]]), torch.ones(1, 3, dtype=torch.bool)
    row = embedding.tables[0][0]
    torch.testing.assert_close(embedding(values, known)[0], torch.stack([-row, 0 * row, row]))


def test_weights_that_were_stored_in_bfloat16_multiply_unchanged(make_dynamics):
    model = make_dynamics()
    stored = {name: p.bfloat16() for name, p in model.state_dict().items()}
    model.load_state_dict(stored)
    in_bfloat16(model)
    for name, p in model.state_dict().items():
        assert torch.equal(p.float(), stored[name].float()), name


def test_the_cache_is_in_float32_and_agrees_with_recomputation(make_dynamics, tiny_clip):
    model = in_bfloat16(make_dynamics())
    cache, parts = model.new_cache(2), []
    assert cache.keys.dtype == torch.float32
    for t in range(tiny_clip.tau.shape[1]):
        parts.append(model.extend(*(x[:, t : t + 1] for x in tiny_clip.inputs), cache, keep=1))
    whole = model(*tiny_clip.inputs)
    # sums run in other orders, and a number that falls on the other side of a rounding edge is a bit away
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 4 * BITS * whole.square().mean().sqrt()


@pytest.fixture
def place(tmp_path):
    small_dataset(tmp_path / "data")
    save_world(small_world(), tmp_path / "world")
    return tmp_path


def call(capfd, *arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    out, err = capfd.readouterr()
    assert stop.value.code == 0, err
    return json.loads(out)


def test_results_say_the_format_and_the_same_world(capfd, place):
    """`checkpoint_hash` is that of the world on disk: `export --evidence` takes no other for its own."""
    windows = ("--windows", 4, "--horizon", 4, "--context", 4, "--looks", "none", "--json")
    found = {}
    for kind in ("float32", "bfloat16"):
        where = (place / "world", place / "data", "--precision", kind, "--out")
        shown = call(capfd, "rollout", *where, place / f"rollout-{kind}", "--length", 8, "--context", 4, "--json")
        scores = call(capfd, "eval", *where, place / f"eval-{kind}", *windows)
        assert shown["precision"] == scores["settings"]["precision"] == kind
        found[kind] = (scores["settings"]["checkpoint_hash"], scores["horizons"]["4"]["psnr"]["value"])
    assert found["float32"][0] == found["bfloat16"][0]
    assert 0 < abs(found["float32"][1] - found["bfloat16"][1]) < 0.5
    evidence = call(
        capfd, "export", place / "world", "--out", place / "out", "--evidence", place / "eval-bfloat16", "--json"
    )
    assert evidence
    card = (place / "out" / "README.md").read_text() if (place / "out" / "README.md").exists() else ""
    assert "products in bfloat16" in card


def test_a_world_in_bfloat16_is_another_world_to_nobody_else(place):
    world = load_world(place / "world", "cpu")
    world.multiply_in("float32")
    assert world.precision == "float32"
    assert world.dynamics.embed.weight.dtype == torch.float32


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("command", ["rollout", "train"])
def test_a_cpu_without_units_for_it_is_named(capfd, place, monkeypatch, tmp_path, command, units):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: units)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    words = {
        "rollout": ("rollout", place / "world", place / "data", "--length", 1),
        "train": ("train", "dynamics", place / "data", "--tokenizer", place / "world", "--steps", 1, "--batch", 2,
                  "--preview-windows", 2),
    }[command]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in (*words, "--out", tmp_path / "out", "--precision", "bfloat16")])
    err = capfd.readouterr().err
    assert stop.value.code == 0, err
    assert err.count("no units for bfloat16") == (not units), err
