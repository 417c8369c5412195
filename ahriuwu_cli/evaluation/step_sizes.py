"""Step-size honesty: what more passes a frame buy, and whether one step of d does the work of the steps it stands for.

Comparing one step of d = 16/64 with one of d = 1/64 proves nothing: a model that ignores d passes it perfectly. Here
every number has a d-blind copy of the same model beside it, which is told d_min always, and must beat it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.diffusion import tau as tau_
from ahriuwu_cli.diffusion.objective import Denoise, bootstrap_target
from ahriuwu_cli.errors import UserError
from ahriuwu_cli.evaluation.generate import Tick, generate
from ahriuwu_cli.evaluation.levels import asked_levels
from ahriuwu_cli.evaluation.measure import batches
from ahriuwu_cli.evaluation.metrics import ratio
from ahriuwu_cli.evaluation.prepare import EvaluationConfig, prepare
from ahriuwu_cli.evaluation.protocol import WindowManifest, paired_bootstrap
from ahriuwu_cli.evaluation.question import HEARD
from ahriuwu_cli.evaluation.scores import Table, join, references, score
from ahriuwu_cli.evaluation.summary import gain, jsonable, pick_horizons
from ahriuwu_cli.models.dynamics import incoming_actions
from ahriuwu_cli.rollout import KeyedNoise, RolloutConfig
from ahriuwu_cli.world import World

STEPS = (1, 2, 4, 8, 16, 64)
WINDOWS = 16
CLOSES = 0.05  # of a d-blind copy's gap: what closes less hardly hears d


def step_size_curve(
    world: World,
    store: EpisodeStore,
    manifest: WindowManifest,
    rollout_config: RolloutConfig | None = None,
    *,
    steps: Sequence[int] = STEPS,
    windows: int = WINDOWS,
    horizons: Sequence[int] = (1, 4, 16),
    seed: int = 0,
    batch: int = 32,
    tick: Tick | None = None,
) -> dict[str, Any]:
    """Free-running scores by K (passes a frame) and sampler, on the manifest's first `windows` windows.

    rollout_config (default: the world's own) gives tau_ctx and ctx_mode, and its sampler and K are the reference, which
    is added when it is not among `steps`. Samplers: euler, shortcut, and the reference's own. All cells share windows
    and noise. A cell that the world cannot do stands in `skipped` with the reason. Each row has `gain_db` over
    persistence, `difference_db` to the reference (paired by window, both with 95 % intervals over episodes), and beside
    them `sharpness_ratio` and `motion_ratio`: PSNR alone prefers blur, and with it fewer passes. A frame that is not
    finite is counted and makes what it touches null. UserError, DataError or CheckpointError as `evaluate`.
    """
    reference = world.generation if rollout_config is None else rollout_config
    manifest = _first(world, store, manifest, reference, windows, seed, batch)
    if not steps or min(steps) < 1:
        raise UserError(f"the passes a frame must be at least 1 each, got {', '.join(map(str, steps)) or 'none'}")
    cells, skipped = _cells(world, reference, steps)
    fixed, made = _roll_out(world, store, manifest, cells, seed, batch, tick)
    at = pick_horizons(horizons, manifest.horizon)
    base = made[cells.index(reference)]["model"]["psnr"]
    rows = []
    for cell, tables in zip(cells, made, strict=True):
        everything, (asked, end) = fixed | tables, asked_levels(cell, world.k_max)
        model, truth = tables["model"], fixed["truth"]
        energy, motion = ((model[n], truth[n]) for n in ("energy", "motion"))
        rows.append(
            {
                "sampler": cell.sampler,
                "steps": cell.steps,
                "passes": len(asked),  # less than K where the grid of `shortcut` goes on below tau_ctx
                "tau_end": end,
                "reference": cell == reference,
                "psnr": {h: model["psnr"][:, h - 1].mean() for h in at},
                "gain_db": {h: gain(everything, manifest.episodes, h) for h in at},
                "difference_db": {h: paired_bootstrap((model["psnr"] - base)[:, h - 1], manifest.episodes) for h in at},
                "sharpness_ratio": {h: ratio(*(e[:, h - 1].mean() for e in energy)) for h in at},
                "motion_ratio": {h: ratio(*(m[:, :h].mean() for m in motion)) for h in at},
                "not_finite_frames": int(np.isnan(model["psnr"]).sum()),
            }
        )
    return jsonable(
        {
            "tau": tau_.LABEL,
            "tau_ctx": reference.tau_ctx,
            "n": _counted(manifest),
            "seed": seed,
            "reported": at,
            "reference": {"sampler": reference.sampler, "steps": reference.steps},
            "floor": {h: fixed["floor"]["psnr"][:, h - 1].mean() for h in at},
            "ceiling": {h: fixed["ceiling"]["psnr"][:, h - 1].mean() for h in at},
            "rows": rows,
            "skipped": skipped,
        }
    )


def _cells(world, reference, steps) -> tuple[list[RolloutConfig], list[dict[str, Any]]]:
    """(what the world can do, what it cannot and why), by sampler and K."""
    cells, skipped = [], []
    for sampler in dict.fromkeys(("euler", "shortcut", reference.sampler)):
        for k in sorted({*steps, reference.steps}):
            cell = replace(reference, sampler=sampler, steps=k)
            try:
                world.check_generation(cell)
                cells.append(cell)
            except UserError as error:
                skipped.append({"sampler": sampler, "steps": k, "reason": str(error)})
    return cells, skipped


def _roll_out(world, store, manifest, cells, seed, batch, tick) -> tuple[dict[str, Table], list[dict[str, Table]]]:
    """Tables of floor, ceiling and truth, and those of every cell's rollouts."""
    fixed, made = [], [[] for _ in cells]
    for here, frames, actions in batches(store, manifest, batch):
        tables, before = references(world, frames, manifest.context, batch)
        fixed.append(tables)
        for parts, cell in zip(made, cells, strict=True):
            result = generate(
                world, frames, actions, manifest.keys[here], cell,
                seed=seed, context=manifest.context, batch=batch, tick=tick,
            )  # fmt: skip
            table = score(result.frames, frames[:, manifest.context :], before=before, finite=result.finite)
            parts.append({"model": table})
    return join(fixed), [join(parts) for parts in made]


@torch.no_grad()
def consistency(
    world: World,
    store: EpisodeStore,
    manifest: WindowManifest,
    *,
    windows: int = WINDOWS,
    levels: int = 4,
    seed: int = 0,
    batch: int = 32,
) -> dict[str, Any]:
    """One step of d against the smaller steps that it stands for, for every trained d above d_min, in latents.

    As in a rollout: context at tau_ctx (as much of it as the window holds), and the first generated frame at tau: up to
    `levels` places of d's own grid above tau_ctx, pure noise included. Distances are between the states that steps land
    on, RMS over values and taus of a window, relative to how far the steps they are compared with go; then the mean
    over windows, with a 95 % interval over episodes.

    - `halves`: one step of d against two of d/2, the model's own as eq. 7 forms them (`bootstrap_target`). 0 is best.
    - `fine`: one step of d against all the steps of d_min that lead as far. A chain of d that agrees with its halves
      but has left the flow shows here. 0 is best.
    - `halves_blind`, `fine_blind`: the same for the d-blind copy; `halves_gain` and `fine_gain`: the copy's distance
      minus the model's own, paired by window. A model that ignores d gains exactly 0.
    - `heard`: one step of d against the same length with d_min told: how much d changes the output. Not a score: it is
      what a naive check calls an error, and a d-blind model has none.

    `verdict`: ok is True, False, or None where it cannot be told; the reason in words; and `gap_closed`, the share of
    the d-blind copy's distance (`fine`, mean over d) that the model does away with: 1 is a perfect shortcut, 0 a blind
    one. Windows whose predictions are not finite are counted, and make what they touch null.
    """
    if levels < 1:
        raise UserError(f"the levels for every step size must be at least 1, got {levels}")
    manifest = _first(world, store, manifest, world.generation, windows, seed, batch)
    sizes = [d for d in sorted(world.trained_d, reverse=True) if d > 1 / world.k_max]
    asked = [d for d in sizes if d / 2 in world.trained_d]
    parts: list[list[Table]] = [[] for _ in asked]
    for here, frames, actions in batches(store, manifest, batch):
        denoise, z_clean, noise = _last_frame(world, frames, actions, manifest.keys[here], manifest.context, seed)
        for part, d in zip(parts, asked, strict=True):
            taus = _grid(d, levels, world.generation.tau_ctx, z_clean)
            part.append(_distances(denoise, z_clean, noise, d, taus, world.k_max))
    tables = [{name: np.concatenate([p[name] for p in part]) for name in part[0]} for part in parts]
    return jsonable(
        {
            "tau": tau_.LABEL,
            "tau_ctx": world.generation.tau_ctx,
            "n": _counted(manifest),
            "seed": seed,
            "k_max": world.k_max,
            "rows": [_row(d, table, manifest.episodes) for d, table in zip(asked, tables, strict=True)],
            "skipped": [{"d": d, "reason": f"d/2 = {d / 2:g} was not trained"} for d in sizes if d not in asked],
            "verdict": _verdict(tables, manifest.episodes),
        }
    )


def _last_frame(world, frames, actions, keys, context, seed) -> tuple[Denoise, Tensor, Tensor]:
    """(denoise of one frame behind committed context, its clean latents (B, 1, N, D), its noise as a rollout's)."""
    cache = world.dynamics.new_cache(len(frames))
    first = max(0, context - cache.window)
    latents = world.encode(torch.from_numpy(frames[:, first : context + 1]))  # (B, P + 1, N, D)
    labelled = torch.full((len(frames),), actions.shape[2] > 0)
    incoming, known = (
        x[:, first : context + 1].to(world.device) for x in incoming_actions(torch.from_numpy(actions), labelled)
    )
    noise = KeyedNoise(seed, keys, tuple(latents.shape[2:]), world.device)
    past = context - first
    tau = torch.full((len(frames), past), world.generation.tau_ctx, device=world.device)
    d = torch.full_like(tau, 1 / world.k_max)
    drawn = torch.stack([noise(first + t, "prompt") for t in range(past)], dim=1)
    committed = tau_.add_noise(latents[:, :past], drawn, tau)
    world.dynamics.extend(committed, tau, d, incoming[:, :past], known[:, :past], cache, keep=past)

    def denoise(z: Tensor, tau: Tensor, d: Tensor) -> Tensor:
        return world.dynamics.extend(z, tau, d, incoming[:, past:], known[:, past:], cache, keep=0)

    return denoise, latents[:, past:], noise(context, "start")[:, None]


def _distances(denoise: Denoise, z_clean: Tensor, noise: Tensor, d: float, taus: list[Tensor], k_max: int) -> Table:
    """Every distance of `consistency` for one d, (W,) each: RMS over the values and taus of a window, relative."""
    squares: dict[str, np.ndarray] = {}
    for tau in taus:
        z_tau = tau_.add_noise(z_clean, noise, tau)
        for name, value in _landings(denoise, z_tau, tau, torch.full_like(tau, d), k_max).items():
            squares[name] = squares.get(name, 0) + value.double().square().flatten(1).mean(1).cpu().numpy()
    sizes = {"halves": "two", "halves_blind": "two_blind", "fine": "walk", "fine_blind": "walk", "heard": "walk"}
    return {name: _share(squares[name], squares[size]) for name, size in sizes.items()}


def _grid(d: float, levels: int, tau_ctx: float, like: Tensor) -> list[Tensor]:
    """Up to `levels` taus, (B, 1) each, spread evenly over {d, 2d, ..., 1} above tau_ctx, pure noise included."""
    taus = tau_.on_grid(torch.linspace(1 - 1e-6, tau_ctx, levels), torch.tensor(d)).unique()
    return [torch.full(like.shape[:2], float(tau), device=like.device) for tau in taus]


def _landings(denoise: Denoise, z: Tensor, tau: Tensor, d: Tensor, k_max: int) -> dict[str, Tensor]:
    """Differences of the states where different steps from (z, tau) land, and how far the steps go, (B, 1, N, D)."""
    fine = torch.full_like(d, 1 / k_max)

    def blind(z: Tensor, tau: Tensor, d: Tensor) -> Tensor:
        return denoise(z, tau, fine)

    def land(z_hat: Tensor) -> Tensor:
        return tau_.step(z, z_hat, tau, d)[0]

    one, one_blind = land(denoise(z, tau, d)), land(blind(z, tau, d))
    two, two_blind = (land(bootstrap_target(model, z, tau, d)) for model in (denoise, blind))
    end, level = z, tau
    for _ in range(round(d.flatten()[0].item() * k_max)):
        end, level = tau_.step(end, denoise(end, level, fine), level, fine)
    compared = {"halves": one - two, "halves_blind": one_blind - two_blind, "heard": one - one_blind}
    compared |= {"fine": one - end, "fine_blind": one_blind - end}
    return compared | {"two": two - z, "two_blind": two_blind - z, "walk": end - z}


def _share(difference: np.ndarray, size: np.ndarray) -> np.ndarray:
    """RMS over RMS from sums of squares; NaN where nothing moves."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sqrt(np.where(size > 0, difference / size, np.nan))


def _row(d: float, table: Table, episodes: list[str]) -> dict[str, Any]:
    finite = np.isfinite(np.stack(list(table.values()))).all(axis=0)
    table = {name: np.where(finite, values, np.nan) for name, values in table.items()}
    row: dict[str, Any] = {"d": d, "not_finite_windows": int((~finite).sum())}
    row |= {name: paired_bootstrap(values, episodes) for name, values in table.items()}
    for name in ("halves", "fine"):
        row[f"{name}_gain"] = paired_bootstrap(table[f"{name}_blind"] - table[name], episodes)
    return row


def _verdict(tables: list[Table], episodes: list[str]) -> dict[str, Any]:
    """Does this model use d? By `fine`, since its yardstick is the same for the model and for its d-blind copy."""
    if not tables:
        return _said(None, "no step size above d_min can be asked, so there is nothing to tell apart")
    own, blind, heard = (np.stack([t[name] for t in tables]) for name in ("fine", "fine_blind", "heard"))
    if not np.isfinite(np.stack([own, blind, heard])).all():
        return _said(False, "some predictions are not finite, or do not move at all")
    if heard.mean(axis=1).max() < HEARD and blind.mean(axis=1).max() < HEARD:
        return _said(None, "every step size lands at the same place, so d does not matter here: a straight path")
    if heard.mean(axis=1).max() < HEARD:
        return _said(False, "blind to d: the output is the same whatever step size is told")
    gained = paired_bootstrap((blind - own).mean(axis=0), episodes)
    closed = gained.value / float(blind.mean())
    if gained.lo > 0 and closed < CLOSES:
        return _said(False, "hears d, but hardly lands nearer to its small steps than a d-blind copy", closed)
    if gained.lo > 0:
        return _said(True, "one step of d lands nearer to its small steps than a d-blind copy's does", closed)
    if gained.value <= 0:
        return _said(False, "hears d, but lands no nearer to its small steps than a d-blind copy", closed)
    return _said(None, "nearer to its small steps than a d-blind copy, but it may be chance on these episodes", closed)


def _said(ok: bool | None, reason: str, gap_closed: float | None = None) -> dict[str, Any]:
    return {"ok": ok, "reason": reason, "gap_closed": gap_closed}


def _first(world, store, manifest, config, windows, seed, batch) -> WindowManifest:
    """The first windows of a manifest (they come in turns of the episodes), after every check."""
    if windows < 1:
        raise UserError(f"the number of windows must be at least 1, got {windows}")
    prepare(world, store, EvaluationConfig(seed=seed, batch=batch), config, manifest)
    return replace(manifest, windows=manifest.windows[:windows])


def _counted(manifest: WindowManifest) -> dict[str, int]:
    return {"windows": len(manifest.windows), "episodes": len(set(manifest.episodes)), "noise_seeds": 1}
