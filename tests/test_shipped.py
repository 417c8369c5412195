"""Every world in `checkpoints/` loads, is small, answers to actions from its own prompts, and has an honest card."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from ahriuwu_cli.data.tensors import read_header
from ahriuwu_cli.evaluation.verify import verify_world
from ahriuwu_cli.imagine import Request, imagine
from ahriuwu_cli.training.checkpoint import load_world
from ahriuwu_cli.training.export import card

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
    assert re.search(r"(\bahriuwu|-m ahriuwu_cli) train dynamics\b.* --out ", card)  # torchrun starts the module
    assert folder.name in (ROOT / "README.md").read_text()
    assert [c.name for c in verify_world(load_world(folder)) if not c.ok] == []


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[+-]?\d*\.?\d+", text)]


def row(file: Path, name: str) -> list[list[float]]:
    """The numbers in the cells of a table's row, by what stands in its first cell."""
    (line,) = [line for line in file.read_text().splitlines() if re.match(rf"\| \[?`?{name}\b", line)]
    return [numbers(cell) for cell in line.split("|")[2:-1]]


@pytest.mark.parametrize("folder", WORLDS, ids=lambda p: p.name)
def test_the_facts_of_a_card_are_those_of_the_world_beside_it(folder):
    world, text = load_world(folder), (folder / "README.md").read_text()
    rows = [line for line in card(folder.name, world, "bfloat16", None, "").splitlines() if line.startswith("| ")]
    assert [line for line in rows if line not in text.splitlines()] == []
    assert len(rows) > 8
    assert {info.dtype for info in read_header(folder / "model.safetensors").values()} == {"BF16"}
    g = world.generation
    assert f"8 context frames; {g.sampler}, K = {g.steps}, tau_ctx {g.tau_ctx} (0 clean, 1 noise)." in text


@pytest.mark.parametrize("folder", WORLDS, ids=lambda p: p.name)
def test_the_scores_of_a_card_agree_with_each_other_and_with_every_table_that_repeats_them(folder):
    """What is told with fewer digits is the card's number, rounded."""
    file = folder / "README.md"
    scores = {frame: row(file, frame) for frame in (1, 4, 16)}
    for gain, psnr, floor, ceiling, *ratios in scores.values():
        assert gain[0] == pytest.approx(psnr[0] - floor[0], abs=0.011)
        assert floor[0] < psnr[0] < ceiling[0]
        assert all(lo < value < hi for value, lo, hi in (gain, psnr, floor, ceiling))
        assert all(0 < ratio < 1.5 for (ratio,) in ratios)
    (delta,) = re.findall(r"Action delta against shuffled actions, dB: (.*\]) at 4,", file.read_text())
    gains, delta = [scores[frame][0] for frame in (1, 4, 16)], numbers(delta)
    assert row(ROOT / "README.md", folder.name) == [rounded(gains[2]), rounded(delta)]
    assert row(ROOT.parent / "README.md", folder.name)[:4] == [rounded(each) for each in (*gains, delta)]
    plan = tomllib.loads((ROOT.parent / "scripts" / "expected.toml").read_text())["worlds"][folder.name]["full"]
    told = {name: value for name, (value, _) in plan["scores"].items()}
    wanted = dict(zip(("gain_1", "gain_4", "gain_16", "delta_4"), (g[0] for g in (*gains, delta)), strict=True))
    wanted |= {"motion_16": scores[16][5][0], "sharpness_16": scores[16][6][0]}
    assert [told[name] for name in wanted] == rounded(list(wanted.values()))


def rounded(values: list[float]):
    return pytest.approx(values, abs=0.0551)  # of a number that was rounded to two digits before


@pytest.mark.parametrize("folder", WORLDS, ids=lambda p: p.name)
def test_a_shipped_world_answers_to_actions_from_its_own_prompt(folder, tmp_path):
    from safetensors.numpy import load_file

    world = load_world(folder)
    buttons = tuple(f"repeat:{name}" for name in world.action_space.column_names[:2])
    imagine(world, Request(folder / "prompt", length=4, actions=buttons), {}, tmp_path / "out", 1, lambda *_: None)
    frames = load_file(tmp_path / "out" / "arrays.safetensors")["frames"].astype(np.int16)
    assert np.abs(frames[0] - frames[1]).mean() > 1
