"""`ahriuwu verify` holds on our code, and a line falls when its formula is turned round or an input is ignored."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from ahriuwu_cli.commands import verify as command
from ahriuwu_cli.data.action_component import ActionComponent
from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.episode_writer import EpisodeWriter
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.diffusion import forcing, objective, samplers
from ahriuwu_cli.diffusion import tau as tau_
from ahriuwu_cli.errors import CheckpointError, DataError, UserError
from ahriuwu_cli.evaluation.checks import above, as_table, below, near
from ahriuwu_cli.evaluation.verify import Check, verify_mathematics, verify_world
from ahriuwu_cli.models.linear_tokenizer import LinearTokenizer
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.training.checkpoint import action_slots, save_world
from ahriuwu_cli.world import World

SPACE = ActionSpace(
    (
        ActionComponent("keys", "binary", 2, ("LEFT", "RIGHT")),
        ActionComponent("gear", "discrete", 3),
        ActionComponent("wheel", "continuous", 1, (), (-2.0,), (4.0,)),
    )
)


def failed(checks):
    return {c.finding for c in checks if not c.ok}


# The mathematics


def test_all_seven_findings_are_checked_and_hold():
    checks = verify_mathematics()
    assert failed(checks) == set()
    assert [f[0] for f in dict.fromkeys(c.finding for c in checks)] == list("1234567")
    assert len({(c.finding, c.name) for c in checks}) == len(checks)


def _swap(module, name, new):
    return lambda patch: patch.setattr(module, name, new)


def _entry(table, name, new):
    return lambda patch: patch.setitem(table, name, new)


def _frozen(denoise, noise, steps, *, tau_ctx=0.1, k_max=64, generator=None):
    z = noise
    for tau, s in tau_.equal_walk(steps, tau_ctx):
        z_hat = denoise(z, torch.full(z.shape[:2], tau), torch.full(z.shape[:2], 1 / k_max))
        z = tau_.add_noise(z_hat, noise, tau - s)
    return z_hat, z, tau - s


def _walk_to_clean(denoise, noise, steps, *, tau_ctx=0.1, k_max=64, generator=None):
    return euler(denoise, noise, steps, tau_ctx=0.0, k_max=k_max)


def _next_label(denoise, noise, steps, *, tau_ctx=0.1, k_max=64, generator=None):
    late = lambda z, tau, d: denoise(z, tau - (1 - tau_ctx) / steps, d)  # noqa: E731
    return euler(late, noise, steps, tau_ctx=tau_ctx, k_max=k_max)


def _second_prediction(denoise, z, tau, d, moves=None):
    z_hat = denoise(z, tau, d / 2)
    mid, tau_mid = tau_.step(z, z_hat, tau, d / 2)
    return denoise(mid, tau_mid, d / 2)


def _one_d_per_clip(batch, frames, k_max, tau_ctx=0.1, generator=None):
    d = independent(batch, frames, k_max, tau_ctx, generator)[1]
    d = d[:, :1].expand(-1, frames)
    return tau_.on_grid(torch.rand(batch, 1, generator=generator).expand(-1, frames), d), d


euler, renoise = samplers.SAMPLERS["euler"], samplers.SAMPLERS["renoise"]
independent, horizon = forcing.FORCINGS["independent"], forcing.FORCINGS["horizon"]
mix, ramp, loss = tau_.add_noise, objective.ramp_weight, objective.x_prediction_loss
target, velocity = objective.bootstrap_target, tau_.velocity

TURNED_ROUND = {
    "schedule backwards": ("1", _swap(tau_, "add_noise", lambda z, n, t: mix(n, z, t))),
    "velocity backwards": ("1", _swap(tau_, "velocity", lambda z, h, t: -velocity(z, h, t))),
    "ramp not inverted": ("2", _swap(objective, "ramp_weight", lambda t, kind="paper": ramp(t, "inverted"))),
    "ramp flat": ("2", _swap(objective, "ramp_weight", lambda t, kind="paper": torch.ones_like(t))),
    "loss without ramp": (
        "3",
        _swap(objective, "x_prediction_loss", lambda *a, **k: loss(*a, **{**k, "ramp": "flat"})),
    ),
    "loss summed": (
        "3",
        _swap(objective, "x_prediction_loss", lambda *a, **k: loss(*a, **{"reduce": "none", **k}).sum()),
    ),
    "tau of the grid below": (
        "4",
        _entry(forcing.FORCINGS, "independent", lambda *a: (lambda t, d: (t - d, d))(*independent(*a))),
    ),
    "one d per clip": ("4", _entry(forcing.FORCINGS, "independent", _one_d_per_clip)),
    "horizon for independent": ("4", _entry(forcing.FORCINGS, "independent", horizon)),
    "horizon falling": (
        "4",
        _entry(forcing.FORCINGS, "horizon", lambda *a: (lambda t, d: (1.1 - t, d))(*horizon(*a))),
    ),
    "fresh noise for Euler": ("5", _entry(samplers.SAMPLERS, "euler", renoise)),
    "frozen noise for Euler": ("5", _entry(samplers.SAMPLERS, "euler", _frozen)),
    "first order for multistep": ("5", _entry(samplers.SAMPLERS, "multistep", euler)),
    "implied noise for renoise": ("5", _entry(samplers.SAMPLERS, "renoise", euler)),
    "walk past tau_ctx": ("6", _entry(samplers.SAMPLERS, "euler", _walk_to_clean)),
    "next level as label": ("6", _entry(samplers.SAMPLERS, "euler", _next_label)),
    "shortcut without its d": ("6", _entry(samplers.SAMPLERS, "shortcut", euler)),
    "second prediction": ("7", _swap(objective, "bootstrap_target", _second_prediction)),
    "whole d for a half step": (
        "7",
        _swap(objective, "bootstrap_target", lambda f, z, t, d, m=None: target(f, z, t, 2 * d, m)),
    ),
    "flow at every d": ("7", _swap(objective, "bootstrap_target", lambda f, z, t, d, m=None: mix(z, z, t))),
}


@pytest.mark.parametrize("name", TURNED_ROUND)
def test_a_formula_that_is_turned_round_fails_its_own_finding(name, monkeypatch):
    finding, turn = TURNED_ROUND[name]
    turn(monkeypatch)
    assert finding in {f[0] for f in failed(verify_mathematics())}


def test_code_that_breaks_on_an_oracle_fails_its_finding_and_no_other(monkeypatch):
    monkeypatch.setattr(forcing, "coverage", None)
    checks = verify_mathematics()
    assert failed(checks) == {"4 forcing"}
    assert any(c.name.startswith("broke with TypeError") for c in checks)


def test_a_check_holds_at_its_bound_as_it_says_and_never_on_nan():
    nan = float("nan")
    assert near("", 1.1, 1.0, 0.2)[3]
    assert not near("", 1.3, 1.0, 0.2)[3]
    assert below("", 0.9, 1)[3]
    assert not below("", 1.0, 1)[3]
    assert above("", 1.1, 1)[3]
    assert not above("", 1.0, 1)[3]
    assert not any(line[3] for line in (near("", nan, 1, 1), below("", nan, 1), above("", nan, 1)))


def test_the_table_lines_up_and_names_every_failure():
    checks = [Check("1 schedule", "ends", 0.0, "0 +- 0", True), Check("model", "a long name", 12.5, "above 20", False)]
    header, first, second = as_table(checks).splitlines()
    assert header.split() == ["finding", "check", "measured", "expected", "ok"]
    assert header.index("measured") == first.index("0 ") == second.index("12.5")
    assert first.endswith("ok")
    assert second.endswith("FAIL")


# A world


@pytest.fixture
def world(make_dynamics):
    tokenizer = LinearTokenizer(8, 8, 4, 4, 8)  # 4 tokens of 8 channels
    g = torch.Generator().manual_seed(0)
    tokenizer.fit([torch.randint(0, 256, (40, 8, 8, 3), dtype=torch.uint8, generator=g)])
    return World(
        dynamics=make_dynamics(action_space=action_slots(SPACE)),
        tokenizer=tokenizer.eval(),
        action_space=SPACE,
        fps=10.0,
        frame_skip=1,
        trained_d=(1.0, 0.5, 0.25, 0.125),
        forcing="independent",
        trained_unlabelled=False,
        generation=RolloutConfig(),
    )


@pytest.fixture
def store(tmp_path):
    rng = np.random.default_rng(0)
    with EpisodeWriter(tmp_path / "data", height=8, width=8, fps=10.0, action_space=SPACE) as writer:
        for _ in range(6):
            frames = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
            writer.add(frames, SPACE.random(11, (1, 3), rng))
    return EpisodeStore.open(tmp_path / "data")


class Blind(nn.Module):
    """A copy of a model that is always told the same about one of its inputs."""

    def __init__(self, model, ignores):
        super().__init__()
        self.model, self.ignores = model, ignores
        self.config, self.embed = model.config, model.embed

    def blinded(self, z_tau, tau, d, actions, known):
        if self.ignores == "tau":
            tau = torch.full_like(tau, 0.5)
        if self.ignores == "d":
            d = torch.full_like(d, 1 / 8)
        if self.ignores == "action":
            actions = torch.zeros_like(actions)
        if self.ignores == "one component":
            actions = torch.cat([actions[..., :2], torch.zeros_like(actions[..., 2:3]), actions[..., 3:]], dim=-1)
        if self.ignores == "context":
            z_tau = torch.cat([torch.zeros_like(z_tau[:, :-1]), z_tau[:, -1:]], dim=1)
        return z_tau, tau, d, actions, known

    def forward(self, *inputs):
        out = self.model(*self.blinded(*inputs))
        return out / 0 if self.ignores == "division by zero" else out

    def new_cache(self, batch):
        return self.model.new_cache(batch)

    def extend(self, *inputs_and_cache, keep, unread=0):
        *inputs, cache = inputs_and_cache
        if self.ignores == "cache":
            cache = self.model.new_cache(len(inputs[0]))
        return self.model.extend(*self.blinded(*inputs), cache, keep=keep, unread=unread)


WORDS = {
    "d": "d = 1/",
    "tau": "labelled",
    "action": "another action",
    "one component": "another action (gear)",
    "context": "context",
    "cache": "cache",
    "division by zero": "not finite",
}


def test_a_world_that_hears_everything_passes_with_and_without_a_dataset(world, store):
    for checks in (verify_world(world), verify_world(world, store)):
        assert failed(checks) == set(), as_table(checks)
        assert len(checks) == 11
        assert {c.finding for c in checks} == {"model"}


@pytest.mark.parametrize("ignores", WORDS)
@pytest.mark.parametrize("real", [False, True])
def test_a_blind_copy_is_caught_by_the_check_of_what_it_ignores(world, store, ignores, real):
    blind = dataclasses.replace(world, dynamics=Blind(world.dynamics, ignores))
    checks = verify_world(blind, store if real else None)
    caught = [c for c in checks if WORDS[ignores] in c.name]
    assert caught
    assert not any(c.ok for c in caught), as_table(checks)
    if ignores in ("d", "tau", "action", "one component"):
        assert all(c.ok for c in checks if c not in caught), as_table(checks)


def test_an_input_that_is_all_but_drowned_counts_as_ignored(world):
    world.dynamics.level.d_table.mul_(1e-5)
    lines = [c for c in verify_world(world) if c.name.startswith("d = 1/")]
    assert not lines[0].ok


def test_a_sampler_with_dishonest_labels_is_caught_through_the_rollout(world, monkeypatch):
    monkeypatch.setitem(samplers.SAMPLERS, "shortcut", _next_label)
    assert [c.name for c in verify_world(world) if not c.ok] == [
        "content of every frame of a rollout against its label"
    ]


def test_a_tokenizer_that_shows_the_mean_frame_is_caught_on_a_dataset(world, store):
    world.tokenizer.scale.fill_(1e6)
    world.tokenizer.components.mul_(1e-4)
    assert any("tokenizer" in c.name for c in verify_world(world, store) if not c.ok)


def test_a_world_of_one_step_size_or_without_actions_is_not_blamed_for_it(world, make_dynamics):
    quiet = dataclasses.replace(
        world, dynamics=make_dynamics(action_space=()), action_space=ActionSpace(), trained_d=(0.125,)
    )
    checks = verify_world(quiet)
    assert failed(checks) == set()
    assert not any("another action" in c.name for c in checks)
    assert any("nothing to tell apart" in c.expected for c in checks)


def test_a_dataset_that_does_not_fit_is_refused_in_a_sentence(world, store, tmp_path):
    small = dataclasses.replace(world, tokenizer=LinearTokenizer(16, 16, 8, 8, 8))
    with pytest.raises(DataError, match="frames of 8x8"):
        verify_world(small, store)
    other = dataclasses.replace(world, action_space=ActionSpace((ActionComponent("keys", "binary", 4),)))
    with pytest.raises(DataError, match="other actions"):
        verify_world(other, store)
    with EpisodeWriter(tmp_path / "one", height=8, width=8, fps=1.0, action_space=SPACE) as writer:
        writer.add(np.zeros((5, 8, 8, 3), np.uint8), np.zeros((4, 4), np.float32))
    with pytest.raises(DataError, match="no val episode"):
        verify_world(world, EpisodeStore.open(tmp_path / "one"))


# The command


@pytest.fixture
def run():
    app = typer.Typer()
    app.callback()(lambda: None)
    command.register(app)
    return lambda *arguments: CliRunner().invoke(app, ["verify", "--no-metrics", *map(str, arguments)])


def test_verify_prints_the_table_and_exits_0_when_all_holds(run):
    result = run()
    assert result.exit_code == 0
    assert "renoise, K = 64" in result.stdout
    assert "FAIL" not in result.stdout
    assert result.stdout.splitlines()[-1].endswith("checks hold")


def test_verify_exits_1_when_a_check_fails(run, monkeypatch):
    monkeypatch.setattr(objective, "ramp_weight", lambda t, kind="paper": ramp(t, "inverted"))
    result = run()
    assert result.exit_code == 1
    assert "FAIL" in result.stdout
    document = json.loads(run("--json").stdout)
    assert document["ok"] is False
    assert document["failed"] == sum(not c["ok"] for c in document["checks"]) > 0


def test_verify_questions_a_checkpoint_and_prints_one_json_object(run, world, store, tmp_path):
    save_world(world, tmp_path / "world")
    result = run(tmp_path / "world", "--dataset", store.path, "--device", "cpu", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 0, result.stdout
    assert document["ok"] is True
    assert set(document["checks"][0]) == {"finding", "name", "measured", "expected", "ok"}
    assert sum(c["finding"] == "model" for c in document["checks"]) == 11
    world.dynamics.level.d_table.zero_()
    save_world(world, tmp_path / "deaf")
    assert run(tmp_path / "deaf", "--device", "cpu").exit_code == 1


def test_bad_input_is_refused_with_its_exit_code(run, tmp_path):
    for arguments, kind in (
        (["--dataset", tmp_path], UserError),
        ([tmp_path / "none", "--device", "cpu"], CheckpointError),
        ([tmp_path, "--dataset", tmp_path / "none"], DataError),
    ):
        error = run(*arguments).exception
        assert type(error) is kind, arguments
        assert str(error)
