"""Checkpoints are written whole, read strictly, and say which convention, tokenizer and actions they belong to."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import small_world

from ahriuwu_cli.errors import CheckpointError
from ahriuwu_cli.evaluation.cells import weights_hash
from ahriuwu_cli.models.dynamics import Dynamics
from ahriuwu_cli.models.dynamics_config import DynamicsConfig
from ahriuwu_cli.training.checkpoint import load_tokenizer, load_world, save_world


@pytest.fixture
def folder(tmp_path):
    save_world(small_world(), tmp_path / "world")
    return tmp_path / "world"


def edit(folder, **changes):
    file = folder / "config.json"
    document = json.loads(file.read_text())
    for name, value in changes.items():
        if value is None:
            del document[name]
        else:
            document[name] = value
    file.write_text(json.dumps(document))


def test_a_saved_world_gives_the_same_output_when_loaded(folder):
    world, again = small_world(), load_world(folder, "cpu")
    inputs = (torch.randn(2, 3, 4, 6), torch.rand(2, 3), torch.full((2, 3), 1 / 8), torch.zeros(2, 3, 2))
    known = torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(world.dynamics(*inputs, known), again.dynamics(*inputs, known))
    assert again.generation == world.generation
    assert again.trained_d == world.trained_d
    assert again.action_space == world.action_space
    assert again.fps == world.fps


@pytest.mark.parametrize(
    "change",
    [
        {"registers": 2}, {"conditioning": "token"}, {"conditioning": "modulate"}, {"kv_heads": 1}, {"window": 7},
        {"k_max": 16}, {"time_every": 1}, {"mlp_hidden": 24}, {"linear_skip": False}, {"depth": 4}, {"heads": 4},
        {"width": 24}, {"predicts": "v"},
    ],
)  # fmt: skip
def test_every_field_of_the_architecture_survives_the_round_trip(tmp_path, change):
    world = small_world()
    config = replace(world.dynamics.config, **change)
    world.dynamics, world.trained_d = Dynamics(config), tuple(0.5**i for i in range(config.k_max.bit_length()))
    save_world(world, tmp_path / "w")
    assert load_world(tmp_path / "w", "cpu").dynamics.config == config


def test_every_field_of_the_architecture_is_in_the_file(folder):
    stored = json.loads((folder / "config.json").read_text())["architecture"]
    assert set(stored) == set(DynamicsConfig().to_json())


@pytest.mark.parametrize("convention", ["tau: 1 clean, 0 noise", "", None])
def test_another_convention_or_none_is_refused(folder, convention):
    edit(folder, tau_convention=convention)
    with pytest.raises(CheckpointError, match=r"convention|fields"):
        load_world(folder)


@pytest.mark.parametrize("name", ["k_max", "heads", "linear_skip", "window"])
def test_a_missing_field_of_the_architecture_is_refused_and_never_defaulted(folder, name):
    architecture = json.loads((folder / "config.json").read_text())["architecture"]
    del architecture[name]
    edit(folder, architecture=architecture)
    with pytest.raises(CheckpointError, match=name):
        load_world(folder)


def test_an_unknown_field_is_refused(folder):
    edit(folder, attention_scale=8)
    with pytest.raises(CheckpointError, match="attention_scale"):
        load_world(folder)


def test_another_tokenizer_of_the_same_shape_is_refused(folder):
    file = folder / "tokenizer" / "model.safetensors"
    tensors = load_file(file)
    tensors["scale"] = tensors["scale"] * 1.01
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="not the tokenizer"):
        load_world(folder)


def test_missing_extra_and_misshapen_weights_are_refused(folder):
    file = folder / "model.safetensors"
    whole = load_file(file)
    for damage in ("missing", "extra", "shape", "prefix"):
        tensors = dict(whole)
        if damage == "missing":
            del tensors["head.weight"]
        elif damage == "extra":
            tensors["head.scale"] = torch.ones(1)
        elif damage == "shape":
            tensors["head.bias"] = torch.ones(7)
        else:
            tensors = {f"_orig_mod.{n}": t for n, t in tensors.items()}
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match="does not fit"):
            load_world(folder)


def test_weights_that_are_not_finite_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["head.bias"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="not finite"):
        load_world(folder)


def test_a_damaged_or_absent_file_is_one_sentence(folder, tmp_path):
    (folder / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(CheckpointError, match="damaged"):
        load_world(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load_world(folder)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_world(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="a dynamics checkpoint is needed"):
        load_world(folder / "tokenizer")


@pytest.mark.parametrize("what", ["the dynamics", "a block", "in place", "the tokenizer"])
def test_a_world_compiled_or_plain_is_saved_alike(folder, tmp_path, what):
    world = small_world()
    if what == "the dynamics":
        world.dynamics = torch.compile(world.dynamics)
    elif what == "a block":
        world.dynamics.blocks[0] = torch.compile(world.dynamics.blocks[0])
    elif what == "in place":
        world.dynamics.compile_blocks()
    else:
        world.tokenizer = torch.compile(world.tokenizer)
    names = [*world.dynamics.state_dict(), *world.tokenizer.state_dict()]
    assert any("_orig_mod" in name for name in names) == (what != "in place")  # it really is wrapped
    save_world(world, tmp_path / "compiled")
    for file in ("model.safetensors", "config.json", "tokenizer/model.safetensors", "tokenizer/config.json"):
        assert (tmp_path / "compiled" / file).read_bytes() == (folder / file).read_bytes()
    assert weights_hash(load_world(tmp_path / "compiled", "cpu")) == weights_hash(load_world(folder, "cpu"))


def test_a_failed_save_leaves_the_old_world_whole(folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()
    world = small_world()
    monkeypatch.setattr(type(world.tokenizer), "to_json", lambda self: {"x": object()})
    with pytest.raises(TypeError):
        save_world(world, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [p.name for p in folder.parent.iterdir()] == ["world"]


def test_a_run_folder_stands_for_its_best_world(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run" / "best")
    assert load_world(tmp_path / "run", "cpu").path == tmp_path / "run" / "best"


def test_the_tokenizer_inside_a_world_can_be_loaded_alone(folder):
    assert load_tokenizer(folder).fingerprint() == small_world().tokenizer.fingerprint()
