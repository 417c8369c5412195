"""From a dataset and a configuration to a trainer that is ready to go: the train flow, read from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ahriuwu_cli import memory
from ahriuwu_cli.config import TrainConfig
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.latents import open_pack
from ahriuwu_cli.errors import CheckpointError, DataError, UserError, did_you_mean
from ahriuwu_cli.models.dynamics import Dynamics
from ahriuwu_cli.models.dynamics_config import DynamicsConfig
from ahriuwu_cli.models.linear_tokenizer import LinearTokenizer, check_sizes
from ahriuwu_cli.models.sizes import SIZES
from ahriuwu_cli.models.tokenizer import Tokenizer
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.training.batches import check_shares, trained_sizes
from ahriuwu_cli.training.checkpoint import action_slots, load_world
from ahriuwu_cli.training.distributed import Group, what_changed
from ahriuwu_cli.training.loop import DynamicsTrainer
from ahriuwu_cli.training.preview import preview_manifest
from ahriuwu_cli.training.run import Run, from_here, known_start, run_goes_on
from ahriuwu_cli.world import World

Progress = Callable[[int, int], None]
DEFAULT = (16, 16), 64  # patch and latent_dim of the tokenizer that a run without one gets
FIT_FRAMES = 4096  # frames that principal components are fitted to, spread over all episodes
FIT_BYTES = 1 << 20  # bytes of frames, uint8, taken into memory at a time; fitting needs some forty times as many
FIT_COVARIANCE = 5 * 8  # bytes for each pair of values of a patch: matrices in float64 at the end of fitting
FIT_WEIGHED = 9 * 8  # the same with a gradient weight


def fit_linear_tokenizer(
    store: EpisodeStore,
    patch: tuple[int, int],
    latent_dim: int,
    whitening: float,
    progress: Progress | None = None,
    gradient_weight: float = 0.0,
    sharpness: float = 0.0,
) -> LinearTokenizer:
    """Fit the linear tokenizer to the train split. UserError for a patch or latent_dim that does not fit the frames.

    sharpness: the gradient energy that decoded frames shall have, as a share; 0 for the least squared error.
    """
    tokenizer = _unfitted(store, patch, latent_dim, gradient_weight)
    if not 0 <= whitening <= 1:
        raise UserError(f"--whitening must be in [0, 1], got {whitening}")
    tokenizer.fit(_frames_to_fit(store, progress), whitening)
    return (fit_decoder(store, tokenizer, sharpness, progress) if sharpness else tokenizer).eval()


def fit_decoder(
    store: EpisodeStore, tokenizer: Tokenizer, sharpness: float, progress: Progress | None = None
) -> LinearTokenizer:
    """The tokenizer with another decoder, fitted to the train split for this share of its gradient energy."""
    if not isinstance(tokenizer, LinearTokenizer):
        raise UserError(f"--sharpness is about decoders of linear tokenizers, this is a {tokenizer.kind} one")
    if (tokenizer.height, tokenizer.width) != (store.height, store.width):
        raise UserError(
            f"the tokenizer is for frames of {tokenizer.height}x{tokenizer.width}, {store.path} has "
            f"{store.height}x{store.width}: fit its decoder to frames of its own size"
        )
    try:
        return tokenizer.sharpened(_frames_to_fit(store, progress), sharpness)
    except ValueError as error:
        raise UserError(f"--sharpness {sharpness}: {error}") from None


def _frames_to_fit(store: EpisodeStore, progress: Progress | None) -> Iterator[torch.Tensor]:
    """Some 4,096 frames of the train split, uint8 (F, H, W, 3), a few at a time. DataError where it is empty."""
    episodes = store.episodes("train")
    if not episodes:
        raise DataError(f"{store.path} has no episodes in its train split: record or import more episodes")

    every = max(1, sum(e.frames for e in episodes) // FIT_FRAMES)
    most = every * max(1, FIT_BYTES // (store.height * store.width * 3))  # frames of an episode looked at together

    for i, episode in enumerate(episodes):
        for start in range(i % every, episode.frames, most):
            chosen = store.frames(episode.id, start, min(start + most, episode.frames), every)
            yield torch.from_numpy(chosen)
        if progress is not None:
            progress(i + 1, len(episodes))


def fit_for_all(group: Group, store: EpisodeStore, progress: Progress | None = None) -> LinearTokenizer:
    """The tokenizer that a run without one gets: fitted by the lead, the same on every process."""
    tokenizer = group.together(
        lambda: fit_linear_tokenizer(store, *DEFAULT, 0.5, progress) if group.leads else default_tokenizer(store)
    )
    group.copy_from_lead(tokenizer.state_dict())
    return tokenizer


def default_tokenizer(store: EpisodeStore) -> LinearTokenizer:
    """The same before it is fitted. UserError for frames that it does not suit."""
    return _unfitted(store, *DEFAULT)


def assemble(
    store: EpisodeStore,
    tokenizer: Tokenizer,
    config: TrainConfig,
    out: Path,
    command: str,
    *,
    device: torch.device,
    resume: bool = False,
    overwrite: bool = False,
    init_from: Path | None = None,
    progress: Progress | None = None,
    group: Group | None = None,
    announce: Callable[[str], None] | None = None,
    fits: bool = False,
) -> DynamicsTrainer:
    """A trainer for a new run in `out`, or for the same run where it is there already, to go on with it.

    resume insists on a run being there. All is checked before anything is written. group: the processes that train
    together, this one alone by default. announce gets what a resume changed, and states that are set aside.
    fits: no tokenizer was given but the run's own, fitted for it now or by an earlier start; the run keeps it.
    """
    group = group or Group(device)
    announce = announce or (lambda sentence: None)
    facts = group.together(lambda: _facts(store, tokenizer, config, known_start(init_from, out, overwrite)))
    group.check_agreed(facts)
    there = group.together(lambda: run_goes_on(out, config, facts, resume, overwrite, fits))
    world = group.together(lambda: _new_world(store, tokenizer, config, group))
    dynamics, run, found = world.dynamics, Run(out, config, facts, command, writes=group.leads), None
    if init_from is not None and not (there and run.states.newest()):
        start = group.together(lambda: start_from(init_from, dynamics.config, tokenizer))
        for differs in _differences(start, store) if group.leads else ():
            announce(f"{init_from} {differs}")
        dynamics.load_state_dict(start.dynamics.state_dict(), strict=True)
    pack = group.together(lambda: open_pack(store, tokenizer, "train", progress), lead_first=True)
    if init_from is None:
        dynamics.channel_scale.copy_(pack.spread())
    trainer = DynamicsTrainer(world, pack, store, run, group)
    said = {**group.facts(config), "fits_tokenizer": fits, "init_from_here": from_here(init_from, out)}
    if there:
        expected = run.expected(trainer)
        found = group.together(lambda: run.go_on(announce, expected, **said), lead_first=True)
        group.check_same_step(found[2]["step"] if found else 0, out)
    else:
        group.together(lambda: run.begin(overwrite, announce, **said))
    if fits:
        group.together(lambda: run.keep_tokenizer(tokenizer, announce))
    if found is not None:
        changed = what_changed(run.restore(trainer, found), group, config)
        if changed and group.leads and not trainer.finished:
            announce(changed)
    return trainer


def _differences(start: World, store: EpisodeStore) -> Iterator[str]:
    """What a run's start is used to and its data have otherwise, though the shapes fit."""
    if start.action_space != store.action_space:
        its, mine = (
            ", ".join(name for c in space.components for name in c.labels or [c.name])
            for space in (start.action_space, store.action_space)
        )
        yield f"knows the actions {its}, and {store.path} has {mine}"
    if start.fps != store.fps:
        yield f"imagines {start.fps:g} frames a second, and {store.path} has {store.fps:g}"


def _unfitted(
    store: EpisodeStore, patch: tuple[int, int], latent_dim: int, gradient_weight: float = 0.0
) -> LinearTokenizer:
    sizes = (store.height, store.width, *patch, latent_dim, gradient_weight)
    try:
        check_sizes(*sizes)
        values = patch[0] * patch[1] * 3
        need = values**2 * (FIT_WEIGHED if gradient_weight else FIT_COVARIANCE)
        if need > memory.most():
            raise UserError(
                f"to fit a tokenizer to patches of {patch[0]}x{patch[1]}, {values} values, takes "
                f"{need / 1e9:.4g} GB, and there are {memory.most() / 1e9:.4g}: choose a smaller "
                "--patch, or --kind transformer"
            )
        return LinearTokenizer(*sizes).eval()
    except ValueError as error:
        raise UserError(f"{error}: choose another --patch or --latent-dim of `ahriuwu train tokenizer`") from None


def _facts(store: EpisodeStore, tokenizer: Tokenizer, config: TrainConfig, init_from: str | None) -> dict:
    """What must be the same when the run is gone on with, besides its configuration."""
    architecture = architecture_for(config.size, tokenizer, store, config.predicts).to_json()
    return {
        "dataset": store.name,
        "dataset_fingerprint": store.fingerprint,
        "tokenizer_hash": tokenizer.fingerprint(),
        "architecture": architecture | {"action_space": store.action_space.to_json()},
        "init_from": init_from,
    }


def check_fits(store: EpisodeStore, tokenizer: Tokenizer, config: TrainConfig, processes: int = 1) -> None:
    """UserError, DataError or CheckpointError where dataset, tokenizer and what is asked for do not go together."""
    if (tokenizer.height, tokenizer.width) != (store.height, store.width):
        raise CheckpointError(
            f"the tokenizer is for frames of {tokenizer.height}x{tokenizer.width}, {store.path} has "
            f"{store.height}x{store.width}: train a tokenizer on this dataset"
        )
    check_shares(config, processes)
    preview_manifest(store, config.preview_windows, config.seed)  # a dataset too small for previews is refused now
    longest = max((e.frames for e in store.episodes("train")), default=0)
    clip, option = max((config.frames, "--frames"), (config.long_frames, "--long-frames"))
    if longest < clip:
        raise DataError(
            f"no training episode of {store.path} has {clip} frames (longest: {longest}): train with fewer {option} "
            f"or record longer episodes"
        )


def _new_world(store: EpisodeStore, tokenizer: Tokenizer, config: TrainConfig, group: Group) -> World:
    """An untrained world for this dataset, once all that was asked for fits."""
    architecture = architecture_for(config.size, tokenizer, store, config.predicts)
    check_fits(store, tokenizer, config, group.world)
    torch.manual_seed(config.seed)
    dynamics = Dynamics(architecture)
    return World(
        dynamics=dynamics.to("cpu" if group.sharded else group.device).requires_grad_(False),
        tokenizer=tokenizer.to(group.device),
        action_space=store.action_space,
        fps=store.fps,
        frame_skip=store.frame_skip,
        trained_d=trained_sizes(config, architecture.k_max, 0),
        forcing=config.forcing,
        trained_unlabelled=any(not e.labelled for e in store.episodes("train")),  # an image has no frames before it
        generation=RolloutConfig(sampler="euler", tau_ctx=config.tau_ctx),
    )


def architecture_for(size: str, tokenizer: Tokenizer, store: EpisodeStore, predicts: str = "x") -> DynamicsConfig:
    """The dynamics of a named size for this tokenizer's latents and this dataset's actions. UserError."""
    if size not in SIZES:
        raise UserError(f"unknown size {size!r}: {did_you_mean(size, tuple(SIZES))}")
    try:
        return DynamicsConfig(
            tokens=tokenizer.tokens,
            latent_dim=tokenizer.latent_dim,
            action_space=action_slots(store.action_space),
            predicts=predicts,
            **SIZES[size],
        )
    except ValueError as error:
        raise UserError(
            f"size {size} does not suit {tokenizer.tokens} token(s) a frame ({error}): choose another --size, or a "
            "--tokenizer of larger patches"
        ) from None


def start_from(path: Path, architecture: DynamicsConfig, tokenizer: Tokenizer | None) -> World:
    """A world whose weights can start one of this architecture on this tokenizer's latents (None: not known yet)."""
    world = load_world(path, "cpu")
    if world.dynamics.config != architecture:
        mine, its = architecture.to_json(), world.dynamics.config.to_json()
        differs = ", ".join(f"{k} {its[k]!r}" for k in mine if mine[k] != its[k])
        raise CheckpointError(f"{path} has another architecture ({differs}): --init-from needs the same")
    # another one of the same shape: every number means something else
    if tokenizer is not None and not tokenizer.same_latents(world.tokenizer):
        raise CheckpointError(
            f"{path} was trained on the latents of another tokenizer: give --tokenizer {world.path / 'tokenizer'}"
        )
    return world
