"""Every world in `checkpoints/` loads, is small, answers to actions from its own prompts, and has an honest card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ahriuwu_cli.evaluation.verify import verify_world
from ahriuwu_cli.imagine import Request, imagine
from ahriuwu_cli.training.checkpoint import load_world

ROOT = Path(__file__).parents[1] / "checkpoints"
WORLDS = sorted(p.parent for p in ROOT.glob("*/config.json"))


def test_there_is_a_world_to_play_with():
    assert WORLDS


@pytest.mark.parametrize("folder", WORLDS, ids=lambda p: p.name)
def test_a_shipped_world_is_small_and_has_a_card_and_passes_its_questions(folder):
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 8_000_000
    card = (folder / "README.md").read_text()
    for words in ("gain over persistence", "Action delta", "Licence", "ahriuwu train dynamics"):
        assert words in card
    assert folder.name in (ROOT / "README.md").read_text()
    assert [c.name for c in verify_world(load_world(folder)) if not c.ok] == []


@pytest.mark.parametrize("folder", WORLDS, ids=lambda p: p.name)
def test_a_shipped_world_answers_to_actions_from_its_own_prompt(folder, tmp_path):
    from safetensors.numpy import load_file

    world = load_world(folder)
    buttons = tuple(f"repeat:{name}" for name in world.action_space.column_names[:2])
    imagine(world, Request(folder / "prompt", length=4, actions=buttons), {}, tmp_path / "out", 1, lambda *_: None)
    frames = load_file(tmp_path / "out" / "arrays.safetensors")["frames"].astype(np.int16)
    assert np.abs(frames[0] - frames[1]).mean() > 1
