"""Training state on disk: what is saved comes back bit for bit, and what is damaged is refused in a sentence."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from ahriuwu_cli.data.tensors import read_header
from ahriuwu_cli.errors import CheckpointError
from ahriuwu_cli.training.muon import Muon
from ahriuwu_cli.training.state import (
    load_optimizer_tensors,
    load_state,
    optimizer_tensors,
    save_state,
    under_prefix,
    with_prefix,
    write_tensors,
)
from ahriuwu_cli.training.state_check import Expected


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 5, generator=generator)
    return {
        "weights": values,
        "shares.memory": values[:3],
        "not.contiguous": values.T,
        "half": values.bfloat16(),
        "step": torch.tensor(7.0),
        "count": torch.tensor([1, 2**40]),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
    }


def tensors_file(folder: Path) -> Path:
    (file,) = folder.glob("state-*.safetensors")
    return file


def test_a_state_comes_back_bit_for_bit(tmp_path):
    document = {"step": 7, "loss": 0.1 + 0.2, "name": "é", "nothing": None, "nested": {"list": [1, 2.5, "x"]}}
    save_state(tmp_path / "deep" / "folder", tensors(), document)
    loaded, read = load_state(tmp_path / "deep" / "folder")
    assert read == document
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


def test_saving_again_replaces_the_state_and_leaves_other_files_alone(tmp_path):
    (tmp_path / "model.safetensors").write_text("somebody else's")
    save_state(tmp_path, {"a": torch.zeros(2)}, {"step": 1})
    save_state(tmp_path, {"a": torch.ones(2)}, {"step": 2})
    loaded, document = load_state(tmp_path)
    assert document == {"step": 2}
    assert torch.equal(loaded["a"], torch.ones(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model.safetensors",
        tensors_file(tmp_path).name,
        "state.json",
    ]


def test_a_save_that_dies_before_the_last_rename_leaves_the_state_before_it(tmp_path, monkeypatch):
    save_state(tmp_path, {"a": torch.zeros(2)}, {"step": 1})
    rename = Path.rename

    def dies(self: Path, target: Path) -> Path:
        if self.name == "state.json.partial":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        save_state(tmp_path, {"a": torch.ones(2)}, {"step": 2})
    monkeypatch.undo()
    loaded, document = load_state(tmp_path)
    assert document == {"step": 1}
    assert torch.equal(loaded["a"], torch.zeros(2))
    save_state(tmp_path, {"a": torch.ones(2)}, {"step": 2})
    assert load_state(tmp_path)[1] == {"step": 2}
    assert len(list(tmp_path.iterdir())) == 2  # the orphan of the dead save is gone


def test_a_document_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        save_state(tmp_path / "new", {}, {"best": float("nan")})
    assert not (tmp_path / "new").exists()


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "state.json").unlink(), "cannot read a training state"),
        (lambda f: (f / "state.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "state.json").write_bytes(b"\xff\xfe\x00"), "is not JSON"),
        (lambda f: (f / "state.json").write_text("[1]"), "is not a training state"),
        (lambda f: (f / "state.json").write_text('{"format": "other"}'), "is not a training state"),
        (lambda f: (f / "state.json").write_text((f / "state.json").read_text().replace("17", "18")), "was altered"),
        (lambda f: tensors_file(f).unlink(), "has no sound tensors .cannot read"),
        (lambda f: flip_a_byte(tensors_file(f)), "was altered"),
        (lambda f: tensors_file(f).write_bytes(tensors_file(f).read_bytes()[:40]), "or is cut short"),
    ],
)
def test_a_damaged_state_is_refused_in_one_sentence(tmp_path, damage, sentence):
    save_state(tmp_path, tensors(), {"seventeen": 17})
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load_state(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_state_that_names_a_file_elsewhere_is_refused(tmp_path):
    save_state(tmp_path, tensors(), {})
    facts = json.loads((tmp_path / "state.json").read_text())
    facts["tensors_sha256"] = "../" * 20 + "etcx"
    (tmp_path / "state.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="names no tensors file"):
        load_state(tmp_path)


def small_model(width: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9))


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2)


def muon_in_bfloat16(model: nn.Module) -> torch.optim.Optimizer:
    return Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2, state=torch.bfloat16)


def adafactor(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.9
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


MAKES = pytest.mark.parametrize("make", [adamw, muon, muon_in_bfloat16, adafactor])


@MAKES
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_an_optimizer_that_is_saved_before_its_next_step_is_saved_as_it_was_loaded(make, kind):
    model = small_model().to(kind)
    optimizer = make(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved, document = optimizer_tensors(optimizer)
    again = make(small_model().to(kind))
    load_optimizer_tensors(again, saved, document)
    loaded, described = optimizer_tensors(again)
    assert described == document
    assert {n: (t.dtype, t.tolist()) for n, t in loaded.items()} == {n: (t.dtype, t.tolist()) for n, t in saved.items()}


@MAKES
def test_an_optimizer_that_was_saved_goes_on_as_if_it_never_stopped(tmp_path, make):
    unbroken = small_model()
    train(unbroken, make(unbroken), range(6))

    first = small_model()
    optimizer = make(first)
    train(first, optimizer, range(3))
    flat, document = optimizer_tensors(optimizer)
    save_state(tmp_path, with_prefix("model", first.state_dict()) | with_prefix("optimizer", flat), document)

    loaded, document = load_state(tmp_path)
    second = small_model()
    second.load_state_dict(under_prefix("model", loaded))
    optimizer = make(second)
    load_optimizer_tensors(optimizer, under_prefix("optimizer", loaded), document)
    train(second, optimizer, range(3, 6))
    for a, b in zip(unbroken.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_optimizer_of_another_kind_or_model_or_with_a_tensor_missing_is_refused(tmp_path):
    model = small_model()
    optimizer = adamw(model)
    train(model, optimizer, range(2))
    flat, document = optimizer_tensors(optimizer)
    groups = document["groups"]
    for expected, tensors, changes, words in [
        (adamw(small_model()), flat, {}, None),
        (adamw(small_model()), {}, {"tensors": []}, None),  # before its first step
        (adafactor(small_model()), {}, {"tensors": []}, "'AdamW', this run uses Adafactor"),
        (adamw(small_model(5)), {}, {"tensors": []}, "the shapes of AdamW differ"),
        (adamw(small_model(5)), flat, {}, r"is float32 \[\S+ \S+\] instead of float32 \[\S+ \S+\]"),
        (adamw(model), {k: v for k, v in flat.items() if k != "0.exp_avg"}, {}, r"no tensor optimizer0\.0\.exp_avg"),
        (adamw(model), flat | {"9.extra": torch.zeros(1)}, {}, r"no such run has a tensor optimizer0\.9\.extra"),
        (adamw(model), flat, {"zz": 1}, "not described"),
        (adamw(model), flat, {"groups": [{**g, "eps": 1.0} for g in groups]}, "groups of AdamW differ"),
        (adamw(model), flat, {"groups": [{k: v for k, v in g.items() if k != "eps"} for g in groups]}, "groups"),
    ]:
        write_tensors(tmp_path / "a", with_prefix("optimizer0", tensors))
        check = Expected({}, [expected]).check
        with nullcontext() if words is None else pytest.raises(ValueError, match=words):
            check({"optimizers": [document | changes]}, read_header(tmp_path / "a"))
