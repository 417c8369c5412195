"""The metrics' self-test holds on our metrics, and a line falls when a metric is broken as others shipped it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ahriuwu_cli.cli import app
from ahriuwu_cli.evaluation import (
    distances,
    gaussian_world,
    levels,
    measure,
    metrics,
    protocol,
    question,
    selftest,
    selftest_bench,
    selftest_lines,
    spread,
    step_sizes,
    summary,
)
from ahriuwu_cli.evaluation.blind import SENSES, blind_copy
from ahriuwu_cli.rollout import KeyedNoise, rollout

EXACT = gaussian_world.exact_world()


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return selftest_bench.Bench.build(tmp_path_factory.mktemp("selftest") / "data", 0)


@pytest.fixture(scope="module")
def whole(bench):
    """The unbroken rows."""
    return bench.videos() | bench.models()


def failed(lines) -> list[str]:
    return [name for name, _, _, ok in lines if not ok]


PARTS = {part.__name__: part for part in selftest_lines.PARTS}


@pytest.mark.parametrize("name", PARTS)
def test_every_line_holds_on_our_own_metrics(bench, whole, name):
    lines = list(PARTS[name](bench, whole))
    assert lines
    assert failed(lines) == []


# Metrics of frames, broken


def _with(module, name, new):
    return lambda patch: patch.setattr(module, name, new)


mse = metrics.mse_per_frame
by_horizon, score = summary.by_horizon, selftest_bench.scores.score


def _late(tables, episodes, h):
    return by_horizon(tables, episodes, h - 1)


def _seen(frames, truth, **options):
    """The first generated frame's score for all."""
    table = score(frames, truth, **options)
    return {name: np.repeat(values[:, :1], values.shape[1], axis=1) for name, values in table.items()}


def _unit(frames):
    return np.asarray(frames) / 255


def _signed_motion(clips):
    return np.diff(_unit(clips), axis=-4).mean((-3, -2, -1))


def _distance_to_start(clips):
    return np.abs(_unit(clips)[..., 1:, :, :, :] - _unit(clips)[..., :1, :, :, :]).mean((-3, -2, -1))


def _even_energy(frames, before):
    return {
        "motion": metrics.motion_per_frame(np.concatenate([before[:, None], frames], 1)),
        "energy": mse(frames, frames) + 1,
    }


def _brightness(a, b):
    return np.abs(_unit(a).mean((-3, -2, -1)) - _unit(b).mean((-3, -2, -1)))


def _decline(tables, who, episodes):
    psnr = tables[who]["psnr"]
    return protocol.Interval(np.abs(psnr[:, -1] - psnr[:, 0]).mean() / (psnr.shape[1] - 1), 0, 0)


def _likeness(gg, gt, tt):
    return min(gg, tt) / max(gg, tt)


BROKEN_FRAMES = [
    ("peak of 2", "PSNR of a tint", _with(metrics, "mse_per_frame", lambda a, b: mse(a, b) / 4)),
    ("PSNR upside down", "PSNR: oracle", _with(metrics, "psnr_from_mse", lambda m, cap=60: 10 * np.log10(m + 1e-9))),
    ("SSIM always 1", "SSIM: oracle", _with(metrics, "ssim", lambda a, b: np.ones(a.shape[:-3]))),
    ("SSIM of the mean colour", "SSIM", _with(metrics, "ssim", lambda a, b: 1 - metrics.colour_shift(a, b))),
    ("motion with its sign", "motion ratio", _with(metrics, "motion_per_frame", _signed_motion)),
    ("motion from the start", "noise and of shuffled", _with(metrics, "motion_per_frame", _distance_to_start)),
    ("cosine of how much moves", "motion cosine of what", _with(summary, "motion_cosine", _likeness)),
    ("sharpness of anything", "sharpness ratio of blur", _with(selftest_bench.scores, "look", _even_energy)),
    ("colour as brightness", "colour shift of that tint", _with(metrics, "colour_shift", _brightness)),
    ("drift without its sign", "drift of a fading", _with(summary, "drift", _decline)),
    ("the first frame for all", "oracle minus the best", _with(selftest_bench.scores, "score", _seen)),
]


@pytest.mark.parametrize(("how", "line", "broken"), BROKEN_FRAMES, ids=[how for how, *_ in BROKEN_FRAMES])
def test_a_broken_metric_of_frames_fails_its_line(bench, whole, monkeypatch, how, line, broken):
    monkeypatch.setattr(selftest_bench, "DISTANT", ())  # the distances take most of the time, and are broken below
    broken(monkeypatch)
    lines = failed(PARTS["frames"](bench, whole | bench.videos()))
    assert any(line in name for name in lines), lines


# Metrics of models, broken


def _other_noise(monkeypatch):
    """Controls rolled out with noise of their own: the delta of a model that ignores actions is no longer 0."""
    run, calls = measure._Task.run, []

    def changed(self, frames, actions, windows, seed):
        calls.append(0)
        return run(self, frames, actions, windows, seed + len(calls))

    monkeypatch.setattr(measure._Task, "run", changed)


def _true_actions_after_all(monkeypatch):
    monkeypatch.setattr(measure, "with_future", lambda true, other, context: true)  # the true actions after all


def _dropped(monkeypatch):
    """NaN left out before averaging, as others do."""
    plain = protocol.paired_bootstrap
    monkeypatch.setattr(summary, "paired_bootstrap", lambda v, e, *rest: plain(np.nan_to_num(v), e, *rest))


def _same_pairs(monkeypatch):
    monkeypatch.setattr(spread, "combinations", combinations_with_replacement)


def _no_spread_term(monkeypatch):
    plain = spread.spread_of

    def changed(samples, truth, finite=None):
        table = plain(samples, truth, finite)
        return table | {"energy": np.sqrt(table["error"])}

    monkeypatch.setattr(spread, "spread_of", changed)


def _told_nothing(monkeypatch):
    monkeypatch.setattr(step_sizes, "_verdict", lambda tables, episodes: {"ok": True, "reason": "", "gap_closed": 1.0})


def _small_steps_only(monkeypatch):
    """The naive check: one step of d against the same with d_min told, which a d-blind model passes perfectly."""

    def naive(tables, episodes):
        heard = np.stack([t["heard"] for t in tables]).mean()
        return {"ok": bool(heard < 0.05), "reason": "", "gap_closed": 1.0}

    monkeypatch.setattr(step_sizes, "_verdict", naive)


def _mean_only(monkeypatch):
    """A Frechet distance of means: blur, grain and shuffled frames have the right mean."""
    means = lambda x, y, *rest: (x.mean(-2) - y.mean(-2)).square().sum(-1)  # noqa: E731
    monkeypatch.setattr(distances, "frechet_distance", means)
    monkeypatch.setattr(distances, "kernel_distance", means)


def _at_clean(monkeypatch):
    """The error asked at one level and reported at all of them."""
    ask = levels._errors_of
    monkeypatch.setattr(
        levels, "_errors_of", lambda w, z, a, k, edges, *rest: ask(w, z, a, k, torch.full_like(edges, 0.5), *rest)
    )


BROKEN_MODELS = [
    ("actions", "action- and context-blind", ("perfect model", "action-blind", "context-blind"), _other_noise),
    ("actions", "of the perfect model", ("perfect model",), _true_actions_after_all),
    ("samples", "spread ratio of the perfect", ("perfect model",), _same_pairs),
    ("samples", "energy score", ("perfect model", "mean forecast", "d-blind"), _no_spread_term),
    ("not_finite", "no mean", (), _dropped),
    ("steps", "consistency of the d-blind", (), _told_nothing),
    ("steps", "consistency of the perfect model", (), _small_steps_only),
    ("by_tau", "closed form", (), _at_clean),
]


@pytest.mark.parametrize(
    ("part", "line", "needed", "broken"), BROKEN_MODELS, ids=[b.__name__ for *_, b in BROKEN_MODELS]
)
def test_a_broken_metric_of_models_fails_its_line(bench, whole, monkeypatch, part, line, needed, broken):
    monkeypatch.setattr(selftest_bench, "DISTANT", ())
    broken(monkeypatch)
    again = replace(bench, worlds={name: bench.worlds[name] for name in needed}).models() if needed else {}
    lines = failed(PARTS[part](bench, whole | again))
    assert any(line in name for name in lines), lines


def test_a_distance_of_means_alone_fails(bench, whole, monkeypatch):
    _mean_only(monkeypatch)
    assert failed(PARTS["distributions"](bench, whole | bench.videos()))


def test_questions_that_hear_everything_fail(bench, whole, monkeypatch):
    monkeypatch.setattr(question, "HEARD", -1.0)
    lines = failed(PARTS["senses"](bench, whole))
    assert len([name for name in lines if "its blind copy fails" in name]) >= 3  # a NaN passes no bound at all


def test_a_metric_that_raises_is_a_failed_line_and_the_others_still_count(monkeypatch):
    def broken(bench, rows):
        raise ZeroDivisionError("nothing to divide by")

    fine = lambda bench, rows: iter([("fine", 1.0, "1", True)])  # noqa: E731
    monkeypatch.setattr(selftest_lines, "PARTS", (broken, fine, fine))
    monkeypatch.setattr(selftest_bench.Bench, "videos", lambda self: {})
    monkeypatch.setattr(selftest_bench.Bench, "models", lambda self: {})
    found = selftest.self_test()
    assert [c.ok for c in found.checks] == [False, True, True]
    assert "ZeroDivisionError" in found.checks[0].name


# The closed-form world itself


def test_the_exact_denoiser_is_the_conditional_mean_of_what_was_drawn():
    """Against a regression over many clips: no linear function of state and last frame predicts better."""
    draw = torch.Generator().manual_seed(0)
    world, count = gaussian_world.exact_world(0.1), 20000
    size = world.dynamics.config.latent_dim
    first, fresh, e0, e1 = torch.randn(4, count, size, generator=draw).double()
    actions = torch.randint(0, 2, (count, 2, 2), generator=draw).float()
    turned = gaussian_world._pan(first, actions[:, 1].double(), gaussian_world._turns())
    second = gaussian_world.KEPT * turned + (1 - gaussian_world.KEPT**2) ** 0.5 * fresh
    for tau in (0.3, 0.8):
        seen = [0.9 * first + 0.1 * e0, (1 - tau) * second + tau * e1]
        z = torch.stack(seen, dim=1)[:, :, None].float()
        levels_ = torch.tensor([0.1, tau]).expand(count, 2)
        known = torch.tensor([False, True]).expand(count, 2)
        z_hat = world.dynamics(z, levels_, torch.full((count, 2), 1 / 64), actions, known)[:, 1, 0].double()
        error = (z_hat - second).square().mean()
        panned = gaussian_world._pan(seen[0], actions[:, 1].double(), gaussian_world._turns())
        given = torch.stack([panned, seen[1]], dim=-1).flatten(0, 1)  # every latent value alone
        fit = torch.linalg.lstsq(given, second.flatten()[:, None]).solution
        best = ((given @ fit)[:, 0] - second.flatten()).square().mean()
        assert error == pytest.approx(float(best), rel=0.01)
        variance = gaussian_world.KEPT**2 * gaussian_world.exact_error(0.9, 1.0) + 1 - gaussian_world.KEPT**2
        assert error == pytest.approx(gaussian_world.exact_error(1 - tau, variance), rel=0.02)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_the_exact_shortcut_lands_where_a_thousand_euler_steps_do(steps):
    world, draw = EXACT, torch.Generator().manual_seed(1)
    z = torch.randn(4, 1, 1, world.dynamics.config.latent_dim, generator=draw)
    context = torch.randn(4, 3, 1, world.dynamics.config.latent_dim, generator=draw)
    actions, known = torch.ones(4, 4, 2), torch.ones(4, 4, dtype=torch.bool)
    cache = world.dynamics.new_cache(4)
    zero = torch.zeros(4, 3)
    world.dynamics.extend(context, zero, zero + 1 / 64, actions[:, :3], known[:, :3], cache, keep=3)

    def walk(count, told):
        state = z.double()
        for i in range(count):
            tau = torch.full((4, 1), 1 - i / count)
            d = torch.full((4, 1), told)
            z_hat = world.dynamics.extend(state.float(), tau, d, actions[:, 3:], known[:, 3:], cache, keep=0)
            state = state + (z_hat - state) / (tau[..., None, None] * count)
        return state

    assert (walk(steps, 1 / steps) - walk(1000, 1 / 64)).abs().max() < 5e-3


def test_frames_at_a_time_or_all_at_once_are_the_same_belief():
    draw = torch.Generator().manual_seed(2)
    z = torch.randn(3, 6, 1, EXACT.dynamics.config.latent_dim, generator=draw)
    tau, d = torch.rand(3, 6, generator=draw), torch.full((3, 6), 1 / 64)
    actions, known = torch.randint(0, 2, (3, 6, 2), generator=draw).float(), torch.ones(3, 6, dtype=torch.bool)
    whole_ = EXACT.dynamics(z, tau, d, actions, known)
    cache, parts = EXACT.dynamics.new_cache(3), []
    for t in range(6):
        here = slice(t, t + 1)
        parts.append(
            EXACT.dynamics.extend(z[:, here], tau[:, here], d[:, here], actions[:, here], known[:, here], cache, keep=1)
        )
    assert torch.equal(torch.cat(parts, dim=1), whole_)


@pytest.mark.parametrize("sense", SENSES)
def test_a_blind_copy_ignores_its_sense_and_nothing_else(sense):
    """Rolled out: what it cannot hear does not change it, the others do."""
    from ahriuwu_cli.models.dynamics import incoming_actions

    world, draw = blind_copy(EXACT, sense), torch.Generator().manual_seed(3)
    size = EXACT.dynamics.config.latent_dim
    prompt = torch.randn(2, 3, 1, size, generator=draw)
    actions = torch.randint(0, 2, (2, 5, 2), generator=draw).float()

    def run(prompt=prompt, actions=actions):
        incoming, known = incoming_actions(actions, torch.ones(2, dtype=torch.bool))
        noise = KeyedNoise(0, ["a", "b"], (1, size))
        return torch.stack(list(rollout(world.dynamics, prompt, incoming, known, world.generation, noise, 64)))

    base = run()
    assert torch.equal(base, run(prompt=-prompt)) == (sense == "context")
    assert torch.equal(base, run(actions=1 - actions)) == (sense in ("action", "context"))
    assert not torch.equal(
        base,
        torch.stack(
            list(
                rollout(
                    EXACT.dynamics,
                    prompt,
                    *incoming_actions(actions, torch.ones(2, dtype=torch.bool)),
                    EXACT.generation,
                    KeyedNoise(0, ["a", "b"], (1, size)),
                    64,
                )
            )
        ),
    )


def test_an_unknown_sense_is_refused():
    with pytest.raises(ValueError, match="choose one of tau, d, action, context"):
        blind_copy(EXACT, "smell")


# A trained world's own blind copies


def test_a_perfect_world_is_told_from_its_blind_copies_and_a_blind_one_is_not(bench):
    assert [c.name for c in selftest.question_metrics(EXACT, bench.store) if not c.ok] == []
    bad = [c.name for c in selftest.question_metrics(blind_copy(EXACT, "context"), bench.store) if not c.ok]
    assert any("context-blind" in name for name in bad)
    assert any("action delta at 4" in name for name in bad)


@pytest.mark.parametrize("breaks", ["itself", "its copies"])
def test_a_world_that_is_not_finite_is_told_line_by_line(bench, monkeypatch, breaks):
    def broken(world, sense):
        copy = blind_copy(world, sense)
        real = copy.dynamics.extend
        copy.dynamics.extend = lambda *given, **more: real(*given, **more) * torch.nan
        return copy

    if breaks == "its copies":
        monkeypatch.setattr(selftest, "blind_copy", broken)
    world = EXACT if breaks == "its copies" else broken(EXACT, "context")
    bad = [c.name for c in selftest.question_metrics(world, bench.store) if not c.ok]
    assert any("context-blind" in name for name in bad)


# The command


def test_verify_prints_the_table_of_controls_and_its_json_holds_it(monkeypatch, bench, whole):
    found = selftest.SelfTest([selftest.Check("metrics", "a line", 1.0, "1", True)], whole)
    monkeypatch.setattr(selftest, "self_test", lambda seed=0: found)
    result = CliRunner().invoke(app, ["verify"])
    assert result.exit_code == 0
    for name in ("oracle", "context-blind", "mean forecast", "other clip"):
        assert any(line.startswith(name) for line in result.stdout.splitlines())
    document = json.loads(CliRunner().invoke(app, ["verify", "--json"]).stdout)
    assert document["controls"]["noise"]["psnr"] == pytest.approx(whole["noise"]["psnr"], abs=1e-6)
    assert document["controls"]["mean forecast"].keys() <= document["controls"]["perfect model"].keys()
    assert "controls" not in json.loads(CliRunner().invoke(app, ["verify", "--json", "--no-metrics"]).stdout)


def test_a_failed_metric_fails_the_command(monkeypatch):
    found = selftest.SelfTest([selftest.Check("metrics", "a line", 1.0, "2", False)], {})
    monkeypatch.setattr(selftest, "self_test", lambda seed=0: found)
    result = CliRunner().invoke(app, ["verify"])
    assert result.exit_code == 1
    assert "FAIL" in result.stdout


def test_the_oracle_scores_at_the_ceiling(whole):
    assert whole["oracle"]["psnr"] == whole["oracle"]["ceiling"]
