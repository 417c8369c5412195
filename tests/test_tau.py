"""The convention and its arithmetic, against formulas typed in the paper's own direction (0 noise, 1 clean)."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch

import ahriuwu_cli
from ahriuwu_cli.diffusion import tau as tau_

PACKAGE = Path(ahriuwu_cli.__file__).parent


@pytest.fixture
def latents():
    g = torch.Generator().manual_seed(1)
    z_clean, noise, z_hat = torch.randn(3, 2, 5, 4, 3, generator=g)
    tau = torch.rand(2, 5, generator=g) * 0.9 + 0.1
    return z_clean, noise, z_hat, tau


def paper_mix(noise, clean, paper_tau):
    """Eq. 1 as printed: x_tau = (1 - tau) x_0 + tau x_1, x_0 noise and x_1 data."""
    return (1 - paper_tau) * noise + paper_tau * clean


def check_mixing(add_noise, latents):
    z_clean, noise, _, tau = latents
    expected = torch.stack(
        [torch.stack([paper_mix(noise[b, t], z_clean[b, t], 1 - tau[b, t].item()) for t in range(5)]) for b in range(2)]
    )
    torch.testing.assert_close(add_noise(z_clean, noise, tau), expected)
    torch.testing.assert_close(add_noise(z_clean, noise, 0.1), paper_mix(noise, z_clean, 0.9))


def test_tau_0_is_clean_and_tau_1_is_noise(latents):
    z_clean, noise, _, tau = latents
    assert torch.equal(tau_.add_noise(z_clean, noise, torch.zeros(2, 5)), z_clean)
    assert torch.equal(tau_.add_noise(z_clean, noise, torch.ones(2, 5)), noise)
    assert tau_.signal(0.25) == 0.75
    assert torch.equal(tau_.signal(tau), 1 - tau)
    assert torch.equal(tau_.noisiest(z_clean), torch.ones(2, 5))


def test_mixing_is_the_papers_equation_1_read_backwards(latents):
    check_mixing(tau_.add_noise, latents)


def test_the_papers_direction_copied_without_turning_is_rejected(latents):
    with pytest.raises(AssertionError):
        check_mixing(lambda z, n, t: paper_mix(n, z, tau_.expand(t, z)), latents)


def test_one_level_per_clip_is_broadcast_over_its_frames(latents):
    z_clean, noise, _, _ = latents
    per_clip = torch.tensor([0.2, 0.7])
    mixed = tau_.add_noise(z_clean, noise, per_clip)
    for b in range(2):
        torch.testing.assert_close(mixed[b], paper_mix(noise[b], z_clean[b], 1 - per_clip[b].item()))


def test_going_to_the_paper_and_back_changes_nothing_and_swaps_the_ends():
    tau = torch.tensor([0.0, 0.1, 0.5, 1.0])
    assert tau_.to_paper(0.0) == 1.0
    assert tau_.from_paper(1.0) == 0.0
    torch.testing.assert_close(tau_.to_paper(tau), torch.tensor([1.0, 0.9, 0.5, 0.0]))
    torch.testing.assert_close(tau_.from_paper(tau_.to_paper(tau)), tau)
    assert tau_.CONVENTION == "tau: 0 clean, 1 noise"
    assert tau_.LABEL == "tau (0 clean, 1 noise)"
    assert tau_.TAU_CTX == 0.1


def test_the_velocity_of_the_true_path_is_noise_minus_clean(latents):
    z_clean, noise, _, tau = latents
    z_tau = tau_.add_noise(z_clean, noise, tau)
    torch.testing.assert_close(tau_.velocity(z_tau, z_clean, tau), noise - z_clean, atol=1e-5, rtol=1e-5)


def test_the_velocity_is_the_papers_turned_round(latents):
    z_tau, _, z_hat, tau = latents
    signal = tau_.to_paper(tau)[..., None, None]
    paper_velocity = (z_hat - z_tau) / (1 - signal)  # the paper's flow from noise to data
    torch.testing.assert_close(tau_.velocity(z_tau, z_hat, tau), -paper_velocity)


def test_a_velocity_points_back_at_its_clean_latent(latents):
    z_tau, _, z_hat, tau = latents
    v = tau_.velocity(z_tau, z_hat, tau)
    torch.testing.assert_close(tau_.clean_from_velocity(z_tau, v, tau), z_hat, atol=1e-6, rtol=1e-5)


def test_the_implied_noise_of_the_true_clean_latent_is_the_noise_that_was_mixed_in(latents):
    z_clean, noise, z_hat, tau = latents
    z_tau = tau_.add_noise(z_clean, noise, tau)
    torch.testing.assert_close(tau_.implied_noise(z_tau, z_clean, tau), noise, atol=1e-5, rtol=1e-5)
    again = tau_.add_noise(z_hat, tau_.implied_noise(z_tau, z_hat, tau), tau)
    torch.testing.assert_close(again, z_tau, atol=1e-5, rtol=1e-5)


def check_step(step, latents):
    z_clean, noise, z_hat, tau = latents
    z_tau = paper_mix(noise, z_clean, 1 - tau[..., None, None])
    s = tau * torch.linspace(0.1, 1, 5)
    z, level = step(z_tau, z_hat, tau, s)
    torch.testing.assert_close(level, tau - s)
    level = level[..., None, None]
    kept = (z_tau - (1 - tau[..., None, None]) * z_hat) / tau[..., None, None]  # the noise that state and z_hat imply
    torch.testing.assert_close(z, (1 - level) * z_hat + level * kept, atol=1e-5, rtol=1e-5)
    z, level = step(z_tau, z_hat, tau, tau)
    torch.testing.assert_close(z, z_hat, atol=1e-6, rtol=1e-5)


def test_a_step_keeps_the_implied_noise_and_a_step_of_tau_lands_on_the_prediction(latents):
    check_step(tau_.step, latents)
    z, level = tau_.step(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0.5, 0.125)
    assert z.item() == 0.75
    assert level == 0.375


@pytest.mark.parametrize(
    "wrong",
    [
        lambda z, z_hat, tau, s: (tau_.add_noise(z_hat, torch.randn_like(z), tau - s), tau - s),
        lambda z, z_hat, tau, s: (z + tau_.expand(s, z) * tau_.velocity(z, z_hat, tau), tau - s),
        lambda z, z_hat, tau, s: (z - tau_.expand(s, z) * (z - z_hat), tau - s),
        lambda z, z_hat, tau, s: (z - tau_.expand(s, z) * tau_.velocity(z, z_hat, 1 - tau), tau - s),
        lambda z, z_hat, tau, s: (tau_.step(z, z_hat, tau, s)[0], tau + s),
        lambda z, z_hat, tau, s: (tau_.step(z, z_hat, tau, s)[0], tau),
    ],
    ids=["fresh noise", "uphill", "not divided by tau", "divided by signal", "label uphill", "label kept"],
)
def test_a_wrong_step_is_rejected(wrong, latents):
    with pytest.raises(AssertionError):
        check_step(wrong, latents)


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("tau", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_the_gaussian_gain_is_the_least_squares_slope_of_clean_on_noisy(tau, spread):
    g = torch.Generator().manual_seed(2)
    clean, noise = torch.randn(2, 400_000, 1, 1, 1, generator=g)
    clean = clean * spread
    z = tau_.add_noise(clean, noise, tau)
    slope = (clean * z).mean() / z.square().mean()
    assert tau_.gaussian_gain(tau, torch.tensor(spread)).item() == pytest.approx(slope.item(), abs=0.01)


def test_uniform_draws_become_the_grid_d_2d_up_to_1_in_equal_shares():
    for k in (1, 2, 8, 64):
        u = (torch.arange(64) + 0.5) / 64
        tau = tau_.on_grid(u, torch.full_like(u, 1 / k))
        values, counts = tau.unique(return_counts=True)
        assert torch.equal(values, torch.arange(1, k + 1) / k)
        assert (counts == 64 // k).all()
    ends = torch.tensor([0.0, 1 - 2.0**-24])
    assert tau_.on_grid(ends, torch.tensor([0.25, 0.25])).tolist() == [0.25, 1.0]


def test_every_level_lies_between_its_two_grid_neighbours_in_the_right_share():
    tau = torch.tensor([0.0, 0.05, 0.1, 0.125, 0.3, 0.5, 0.77, 0.999, 1.0])
    for k_max in (1, 8, 64):
        lower, upper, share = tau_.grid_neighbours(tau, k_max)
        assert lower.min() >= 0
        assert upper.max() <= k_max
        assert ((upper - lower == 1) | ((lower == k_max) & (upper == k_max))).all()
        assert ((share >= 0) & (share < 1)).all()
        torch.testing.assert_close((lower * (1 - share) + upper * share) / k_max, tau)
    lower, upper, share = tau_.grid_neighbours(torch.tensor([0.1]), 8)
    assert (lower.item(), upper.item()) == (0, 1)
    assert share.item() == pytest.approx(0.8)


def test_the_step_sizes_are_the_powers_of_two_from_1_down_to_d_min():
    assert tau_.levels(1) == [1.0]
    assert tau_.levels(8) == [1.0, 0.5, 0.25, 0.125]
    assert len(tau_.levels(64)) == 7
    for k_max in (0, -4, 3, 48):
        with pytest.raises(ValueError, match="power of two"):
            tau_.levels(k_max)


@pytest.mark.parametrize("tau_ctx", [0.0, 0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_the_equal_walk_goes_from_1_to_tau_ctx_in_equal_steps(steps, tau_ctx):
    walk = tau_.equal_walk(steps, tau_ctx)
    assert len(walk) == steps
    assert walk[0][0] == 1.0
    for i, (tau, s) in enumerate(walk):
        assert s == pytest.approx((1 - tau_ctx) / steps)
        assert tau == pytest.approx(1 - i * (1 - tau_ctx) / steps)
    assert walk[-1][0] - walk[-1][1] == pytest.approx(tau_ctx, abs=1e-12)


def test_the_grid_walk_stays_on_its_grid_and_cuts_only_the_step_that_would_pass_tau_ctx():
    def close(steps, tau_ctx, expected):
        walk = tau_.grid_walk(steps, tau_ctx, 64)
        assert len(walk) == len(expected)
        for pair, wanted in zip(walk, expected, strict=True):
            assert pair == pytest.approx(wanted)

    close(4, 0.0, [(1.0, 0.25), (0.75, 0.25), (0.5, 0.25), (0.25, 0.25)])
    close(4, 0.1, [(1.0, 0.25), (0.75, 0.25), (0.5, 0.25), (0.25, 0.15)])
    close(4, 0.25, [(1.0, 0.25), (0.75, 0.25), (0.5, 0.25)])
    close(4, 0.3, [(1.0, 0.25), (0.75, 0.25), (0.5, 0.2)])
    close(4, 0.9, [(1.0, 0.1)])
    close(1, 0.1, [(1.0, 0.9)])
    assert len(tau_.grid_walk(64, 0.0, 64)) == 64


@pytest.mark.parametrize("steps", [3, 128, 6])
def test_the_grid_walk_refuses_step_counts_that_the_model_was_never_told(steps):
    with pytest.raises(ValueError, match="power of two up to k_max"):
        tau_.grid_walk(steps, 0.1, 64)


@pytest.mark.parametrize("walk", [tau_.equal_walk, lambda k, t: tau_.grid_walk(k, t, 64)], ids=["equal", "grid"])
@pytest.mark.parametrize(("steps", "tau_ctx"), [(0, 0.1), (-1, 0.1), (4, 1.0), (4, -0.1), (4, float("nan"))])
def test_impossible_walks_are_refused(walk, steps, tau_ctx):
    with pytest.raises(ValueError, match=r"steps|tau_ctx"):
        walk(steps, tau_ctx)


# How the code is laid out: checked on the syntax tree, not on text.


def _trees(folder: str = ""):
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())


def _imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_mathematics_imports_nothing_of_ours_but_itself():
    for name, tree in _trees("diffusion"):
        ours = [i for i in _imports(tree) if i.startswith("ahriuwu_cli") and "ahriuwu_cli.diffusion" not in i]
        assert not ours, (name, ours)
        foreign = {i.split(".")[0] for i in _imports(tree)} - {"torch", "ahriuwu_cli"} - sys.stdlib_module_names
        assert not foreign, (name, foreign)


def test_models_use_only_tau_of_the_mathematics():
    for name, tree in _trees("models"):
        used = {i for i in _imports(tree) if i.startswith("ahriuwu_cli.diffusion")}
        assert all(i == "ahriuwu_cli.diffusion.tau" or i.startswith("ahriuwu_cli.diffusion.tau.") for i in used), name


def test_nothing_pickled_is_read_or_written_anywhere():
    for name, tree in _trees():
        packages = {i.split(".")[0] for i in _imports(tree)}
        assert not packages & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, name
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert ast.unparse(node.func) not in ("torch.load", "torch.save", "eval", "exec"), name
            assert options.get("allow_pickle", "False") == "False", name


def test_only_tau_py_does_arithmetic_on_tau():
    # evaluation/oracles.py is the second opinion: it types the formulas again on purpose, in the paper's direction.
    for name, tree in _trees():
        if name in ("diffusion/tau.py", "evaluation/oracles.py"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.BinOp):
                operands = [node.left, node.right]
            elif isinstance(node, ast.AugAssign):
                operands = [node.target, node.value]
            elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
                operands = [node.operand]
            else:
                continue
            for operand in operands:
                assert _name(operand) not in _LEVELS, f"{name}:{node.lineno} {ast.unparse(node)}"


_LEVELS = {"tau", "taus", "tau_ctx", "tau_mid", "tau_max", "tau_end", "next_tau", "pending_tau"}


def _name(node):
    """The variable behind tau, tau[...], config.tau_ctx, tau.float() or -tau."""
    while True:
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node, ast.Attribute):
            if node.attr in _LEVELS:
                return node.attr
            node = node.value
        elif isinstance(node, ast.Subscript):
            node = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            node = node.func.value
        elif isinstance(node, ast.UnaryOp):
            node = node.operand
        else:
            return None


def test_no_division_is_hidden_behind_a_clamp_an_epsilon_or_a_nan_to_number():
    # Two clamps are formulas and stay: the horizon's max(T-1-h, 1) and rise, and whole-number indices into a grid.
    allowed = {"horizon": 2, "grid_neighbours": 2, "coverage": 1, "bin_index": 1}
    hiding = {"clamp", "clamp_", "clip", "maximum", "nan_to_num", "nan_to_num_", "finfo", "eps", "isnan", "nanmean"}
    for name, tree in _trees("diffusion"):
        for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            used = [n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute) and n.attr in hiding]
            assert set(used) <= {"clamp"}, (name, function.name, used)
            assert len(used) <= allowed.get(function.name, 0), (name, function.name, used)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, float):
                assert node.value == 0 or node.value >= 0.01, (name, node.value)
