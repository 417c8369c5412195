"""Every closer look is of what was asked for: settings, seed, windows, clips of other windows, and what is finite."""

import numpy as np
import pytest
import torch
from small import small_dataset, small_world

from ahriuwu_cli.evaluation import looks, standard
from ahriuwu_cli.evaluation.generate import Generated
from ahriuwu_cli.evaluation.prepare import EvaluationConfig
from ahriuwu_cli.evaluation.protocol import make_manifest
from ahriuwu_cli.rollout import RolloutConfig

ASKED = RolloutConfig(steps=2, sampler="euler", tau_ctx=0.3)
CONFIG = EvaluationConfig(windows=16, context=4, split="train", seed=7)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """(world, store, config, rollout config, manifest) as a look gets them."""
    store = small_dataset(tmp_path_factory.mktemp("looks") / "a", episodes=24, frames=80)
    return small_world(), store, CONFIG, ASKED, make_manifest(store, "train", 4, 16, 16, 0)


def heard(monkeypatch, where, name, answer=None) -> list:
    """What a function of a module is called with from now on: [(arguments, options)]."""
    calls = []
    monkeypatch.setattr(where, name, lambda *a, **options: calls.append((a, options)) or answer)
    return calls


@pytest.mark.parametrize(
    ("look", "does"),
    [
        ("step_sizes", "step_size_curve"), ("consistency", "consistency"), ("spread", "sample_spread"),
        ("levels", "error_by_level"), ("components", "error_by_component"),
    ],
)  # fmt: skip
def test_a_look_is_of_the_settings_seed_and_windows_that_were_asked_for(monkeypatch, asked, look, does):
    calls = heard(monkeypatch, looks, does)
    looks.LOOKS[look](*asked)
    ((arguments, options),) = calls
    given = [*arguments, *options.values()]
    assert ASKED in given or any(getattr(each, "generation", None) == ASKED for each in given)
    assert options["seed"] == 7
    assert any(each is asked[-1] for each in given)


def broken(windows: int = 16, length: int = 16) -> Generated:
    """A frame of the first window is not finite."""
    finite = np.ones((windows, length), bool)
    finite[0, length - 1] = False
    return Generated(np.zeros((windows, length, 16, 16, 3), np.uint8), finite, 1.0)


def test_distances_are_to_clips_of_other_windows_and_know_what_is_not_finite(monkeypatch, asked):
    made, clips = broken(), np.zeros((16, 16, 16, 16, 3), np.uint8)
    given = heard(monkeypatch, looks, "generate", made)
    drawn = heard(monkeypatch, looks, "reference_clips", (clips, ["a"] * 16))
    measured = heard(monkeypatch, looks, "latent_distances")
    looks.LOOKS["distances"](*asked)
    assert given[0][0][4] == ASKED
    assert given[0][1]["seed"] == 7
    assert [(options["split"], options["seed"]) for _, options in drawn] == [("train", 7)] * 2
    assert all(options["avoid"].windows == asked[-1].windows for _, options in drawn)
    assert measured[0][1]["finite"] is made.finite


def test_fvd_and_lpips_know_what_is_not_finite_and_what_is_real(monkeypatch, asked):
    made, other = broken(), np.full((16, 16, 16, 16, 3), 9, np.uint8)
    monkeypatch.setattr(standard, "LPIPS_SIDE", 16)
    judge = torch.nn.Module()
    judge.backbone, judge.sha256 = "alex", "0"
    monkeypatch.setattr(standard, "load_lpips", lambda weights: judge)
    monkeypatch.setattr(standard, "load_i3d", lambda weights: torch.nn.Module())
    monkeypatch.setattr(standard, "lpips_distance", lambda judge, a, b, n: np.ones(a.shape[:2]))
    monkeypatch.setattr(standard, "i3d_logits", lambda network, clips: torch.from_numpy(clips[:, -1].mean((1, 2))))
    given = heard(monkeypatch, standard, "generate", made)
    drawn = heard(monkeypatch, standard, "reference_clips", (other, ["a"] * 16))
    weights = type("Weights", (), {"hash": "0"})()
    found = standard.standard_distances(*asked, lpips=weights, fvd=weights)
    assert given[0][0][4] == ASKED
    assert (drawn[0][1]["split"], drawn[0][1]["seed"]) == ("train", 7)
    assert drawn[0][1]["avoid"] is asked[-1]
    assert found["lpips"]["horizons"]["4"]["model"] == 1
    assert found["lpips"]["horizons"]["16"]["model"] is None
    assert found["lpips"]["horizons"]["16"]["persistence"] == 1
    assert found["fvd"]["generated"] is None
    assert found["fvd"]["not_finite_clips"] == 1
    assert found["fvd"]["real_floor"] > 1  # of the windows' own truth, not of the clips that it is compared with
