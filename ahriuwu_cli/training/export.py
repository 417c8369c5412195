"""A world made ready to ship: weights in 16 bits, a few prompts to start from, and a model card, in one small folder.

world/            a checkpoint as `training.checkpoint` writes it, weights in 16 bits (read back as float32)
  prompt/         a dataset of a few short clips, all of the split `test`; `ahriuwu rollout WORLD` starts from them
  README.md       the model card: what it is, how it was made, what it scores, what it cannot do
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ahriuwu_cli.data.documents import MAX_RESULT, as_text, read_object
from ahriuwu_cli.data.episode_writer import EpisodeWriter
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.windows import draw_windows
from ahriuwu_cli.errors import CheckpointError, DataError, UserError, did_you_mean
from ahriuwu_cli.evaluation.cell_check import check_scores
from ahriuwu_cli.evaluation.cells import weights_hash
from ahriuwu_cli.evaluation.metrics import gradient_energy
from ahriuwu_cli.evaluation.report import in_markdown
from ahriuwu_cli.folders import replacing
from ahriuwu_cli.models.dynamics import count_parameters
from ahriuwu_cli.models.tokenizer import Tokenizer
from ahriuwu_cli.prompts import CANDIDATES, PICKS
from ahriuwu_cli.training.checkpoint import fill_with_world, load_world
from ahriuwu_cli.training.finite import first_not_finite
from ahriuwu_cli.world import World

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROMPT, CARD = "prompt", "README.md"


def export(
    world: World,
    out: Path,
    *,
    weights: str = "bfloat16",
    prompts: EpisodeStore | None = None,
    clips: int = 3,
    frames: int = 40,
    split: str = "test",
    pick: str = "random",
    seed: int = 0,
    generation: dict[str, Any] | None = None,
    evidence: Path | None = None,
    notes: str = "",
    overwrite: bool = True,
    then: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write the folder, whole or not at all, and return its facts.

    With weights in 16 bits the tokenizer's matrices are float16: small numbers, kept three bits finer than by bfloat16.
    It is another tokenizer then, by its hash, than the one that the world was trained with.

    prompts: a dataset from which `clips` clips of `frames` frames of a split are taken, at random or those with most
    edges in view (`busiest`). generation: other defaults for rollouts, such as {"sampler": "shortcut"}. evidence: a
    folder of `ahriuwu eval`, whose table goes into the card. notes: the card's first words. overwrite False: what
    came to `out` meanwhile stays. then: as of `replacing`. UserError or DataError.
    """
    if weights not in FORMATS:
        raise UserError(f"unknown --weights {weights!r}: {did_you_mean(weights, tuple(FORMATS))}")
    world = replace(world, generation=world.generation_with(generation or {}))
    world.check_generation(world.generation)
    windows = [] if prompts is None else _windows(world, prompts, clips, frames, split, pick, seed)
    before = {name: tensor.cpu().clone() for name, tensor in world.dynamics.state_dict().items()}
    slim = replace(
        world,
        dynamics=deepcopy(world.dynamics).to(FORMATS[weights]),
        tokenizer=world.tokenizer if weights == "float32" else _halved(world.tokenizer),
        facts=_shareable(world.facts) | {"weights": weights},
    )
    _check_held(slim, weights)
    scores = None if evidence is None else _scores(evidence, world, slim)
    with replacing(out, overwrite, then, own=("world",)) as folder:
        if windows:  # before the folder is a checkpoint, among whose files nobody else may write
            _write_prompts(folder / PROMPT, prompts, windows, frames)
        fill_with_world(slim, folder)
        text = card(as_text(out.absolute().name), world, weights, scores, notes)
        (folder / CARD).write_text(text, encoding="utf-8")
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    again = load_world(out, "cpu")
    after = again.dynamics.state_dict()
    rounding = max(float((after[n].double() - t.double()).abs().max()) for n, t in before.items() if t.numel())
    return {
        "world": str(out),
        "weights": weights,
        "megabytes": round(size / 1e6, 2),
        "parameters": count_parameters(again.dynamics.requires_grad_(True)),
        "prompts": len(windows),
        "largest_rounding": rounding,
    }


def _shareable(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts for other people, without the folders of this machine: of where training started, the name alone."""
    start = facts.get("init_from")
    return facts | {"init_from": os.path.basename(start)} if isinstance(start, str) else facts


def with_decoder(world: World, tokenizer: Tokenizer) -> World:
    """The world with another decoder of the same latents. CheckpointError where the tokenizer encodes otherwise."""
    if not tokenizer.same_latents(world.tokenizer):
        raise CheckpointError(
            f"{world.path} was trained on latents of another encoder: give --tokenizer one that was made of its own by "
            "`ahriuwu train tokenizer --encoder`"
        )
    return replace(world, tokenizer=tokenizer.to(world.device))


def averaged(world: World, other: World) -> World:
    """A world with the mean of the weights of two that were trained one from the other (Wortsman et al. 2022).

    CheckpointError unless both have one architecture, tokenizer, action space, frame rate and forcing. Of step sizes it
    knows those that both were trained on. Its facts are those of the first, but for its preview, with the other's
    command, step and weights under `averaged_with`.
    """
    for each in (world, other):
        if "averaged_with" in each.facts:
            raise CheckpointError(f"{each.path} is a mean already: average worlds that their own runs wrote")
    differs = [
        what
        for what, one, two in (
            ("architecture", world.dynamics.config, other.dynamics.config),
            ("tokenizer", world.tokenizer.fingerprint(), other.tokenizer.fingerprint()),
            ("actions", world.action_space, other.action_space),
            ("frame rate", (world.fps, world.frame_skip), (other.fps, other.frame_skip)),
            ("forcing", world.forcing, other.forcing),
        )
        if one != two
    ]
    if differs:
        remedy = "average worlds that were trained one from the other"
        raise CheckpointError(f"{other.path} has another {differs[0]} than {world.path}: {remedy}")
    dynamics, theirs = deepcopy(world.dynamics), other.dynamics.state_dict()
    dynamics.load_state_dict({n: t / 2 + theirs[n] / 2 for n, t in world.dynamics.state_dict().items()})  # no overflow
    said = {n: other.facts[n] for n in ("command", "step", "train_seconds") if n in other.facts}
    said["weights_sha256"] = weights_hash(other)
    return replace(
        world,
        dynamics=dynamics,
        trained_d=tuple(d for d in world.trained_d if d in other.trained_d),
        trained_unlabelled=world.trained_unlabelled and other.trained_unlabelled,
        facts={n: fact for n, fact in world.facts.items() if n != "preview_gain_db"} | {"averaged_with": said},
    )


def _halved(tokenizer: Tokenizer) -> Tokenizer:
    """The same with its matrices in float16; what is divided by or added stays as it is."""
    half = deepcopy(tokenizer)
    for tensor in (*half.parameters(), *half.buffers()):
        if tensor.dim() > 1:
            tensor.data = tensor.data.to(torch.float16)
    return half


def _check_held(slim: World, weights: str) -> None:
    """UserError where a number format ends before the weights do: they became infinite in it."""
    bad = first_not_finite(slim.tokenizer.state_dict())
    if bad is not None:
        raise UserError(f"the tokenizer's {bad} holds numbers beyond float16: choose --weights float32")
    bad = first_not_finite(slim.dynamics.state_dict())
    if bad is not None:
        most, wider = torch.finfo(FORMATS[weights]).max, "bfloat16" if weights == "float16" else "float32"
        raise UserError(f"--weights {weights} ends at {most:g}, and {bad} holds numbers beyond: choose {wider}")


def card(name: str, world: World, weights: str, scores: dict[str, Any] | None, notes: str) -> str:
    """The model card, Markdown. scores: an eval.json's object."""
    facts, train, tokenizer = world.facts, world.facts.get("train") or {}, world.tokenizer
    parameters = sum(p.numel() for p in world.dynamics.parameters())
    sharp = f", decoded with {tokenizer.sharpness:g} of the gradient energy" if tokenizer.sharpness else ""
    threads, minutes = train.get("threads") or "all", (facts.get("train_seconds") or 0) / 60
    rows = {
        "frames": f"{tokenizer.height} x {tokenizer.width}, {world.fps:g} a second",
        "actions": ", ".join(world.action_space.column_names) or "none",
        "tokenizer": f"{tokenizer.kind}, {tokenizer.tokens} tokens of {tokenizer.latent_dim} channels{sharp}",
        "dynamics": f"{parameters / 1e6:.2f}M parameters, weights in {weights}",
        "trained": f"{facts.get('step', '?')} steps in {minutes:.0f} minutes on {threads} thread(s)",
        "command": facts.get("command", "not recorded"),
        **({"averaged with": facts["averaged_with"].get("command", "?")} if "averaged_with" in facts else {}),
        "data": f"{facts.get('dataset', '?')}, fingerprint {str(facts.get('dataset_fingerprint', '?'))[:12]}",
        "made by": ", ".join(f"{what} {str(facts.get(what, '?'))[:12]}" for what in ("ahriuwu", "torch", "git")),
    }
    lines = [
        f"# {in_markdown(name)}",
        "",
        notes.strip() or "A world model trained with ahriuwu.",
        "",
        "| | |",
        "|---|---|",
    ]
    lines += [f"| {what} | {in_markdown(value)} |" for what, value in rows.items()]
    if scores:
        lines += ["", *_table(scores)]
    return "\n".join(lines) + "\n"


def _table(scores: dict[str, Any]) -> list[str]:
    """Scores by horizon with 95 % intervals over episodes."""

    def cell(value: Any, form: str = "{:.2f}") -> str:
        if isinstance(value, dict) and value["lo"] is not None:
            return f"{form.format(value['value'])} [{form.format(value['lo'])}, {form.format(value['hi'])}]"
        number = value["value"] if isinstance(value, dict) else value
        return "-" if number is None else form.format(number)  # a ratio of what does not move

    s, n, g = scores["settings"], scores["n"], scores["settings"]["generation"]
    columns = {
        "gain over persistence, dB": ("gain_db", "{:+.2f}"),
        "PSNR, dB": ("psnr", "{:.2f}"),
        "floor": ("floor", "{:.2f}"),
        "ceiling": ("ceiling", "{:.2f}"),
        "SSIM": ("ssim", "{:.2f}"),
        "motion": ("motion_ratio", "{:.2f}"),
        "sharpness": ("sharpness_ratio", "{:.2f}"),
        "the ceiling's": ("ceiling_sharpness_ratio", "{:.2f}"),
    }
    how = ", products in bfloat16" if s.get("precision") == "bfloat16" else ""
    label = ", its frames labelled clean" if g.get("ctx_label") == "clean" else ""
    held = (
        f"Held out: {n['windows']} windows of {n['episodes']} episodes (split {s['split']}), "
        f"{s['evaluation']['context']} context frames; {g['sampler']}, K = {g['steps']}, tau_ctx {g['tau_ctx']} "
        f"(0 clean, 1 noise){label}{how}. 95 % intervals over episodes; they leave out the seed of training."
    )
    lines = [
        in_markdown(held),
        "",
        f"| frame | {' | '.join(columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for h, row in scores["horizons"].items():
        lines.append(f"| {in_markdown(h)} | {' | '.join(cell(row[key], form) for key, form in columns.values())} |")
    for control, by in (scores["action_delta_db"] or {}).items():
        told = ", ".join(f"{cell(value, '{:+.2f}')} at {h}" for h, value in by.items())
        lines += ["", in_markdown(f"Action delta against {control} actions, dB: {told}.")]
    return lines


def _scores(folder: Path, *measured: World) -> dict[str, Any]:
    """An evaluation of one of these worlds, what is exported or what it becomes in its number format. DataError."""
    file = folder / "eval.json" if folder.is_dir() else folder
    try:
        scores = read_object(file, MAX_RESULT)
        if scores["kind"] != "eval" or scores["status"] != "ok":
            raise ValueError("it is not the result of an evaluation that went well")
        check_scores(scores)
        of = scores["settings"].get("checkpoint_hash")
    except FileNotFoundError:
        raise DataError(f"there is no {file}: give a folder that `ahriuwu eval` wrote") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} cannot be used ({error}): give a folder that `ahriuwu eval` wrote") from None
    rounded = (
        replace(w, dynamics=deepcopy(w.dynamics).float(), tokenizer=deepcopy(w.tokenizer).float()) for w in measured
    )
    if of not in map(weights_hash, rounded):
        raise DataError(f"{file} was measured with another world, or by an older version: evaluate this one")
    ours, theirs = asdict(measured[0].generation), scores["settings"]["generation"]
    if other := [name for name in ("steps", "sampler", "tau_ctx", "ctx_mode") if ours[name] != theirs.get(name)]:
        way = "evaluate it as it is"
        if set(other) <= {"steps", "sampler"}:  # the other two a world has from its training and from sweep-tau
            way += f", or export it by {' '.join(f'--{name} {theirs.get(name)}' for name in other)}"
        raise UserError(
            f"{file} was measured by {_said(theirs, other)}, and this world would go by {_said(ours, other)}: {way}"
        )
    return scores


def _said(generation: dict[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {generation.get(name)}" for name in names)


def _windows(
    world: World, store: EpisodeStore, clips: int, frames: int, split: str, pick: str, seed: int
) -> list[tuple[str, int]]:
    """(episode, first frame) of every prompt clip."""
    if clips < 1 or frames < 2:
        raise UserError(f"--clips must be at least 1 and --frames at least 2, got {clips} and {frames}")
    if pick not in PICKS:
        raise UserError(f"unknown --pick {pick!r}: {did_you_mean(pick, PICKS)}")
    world.check_dataset(store)
    lengths = {e.id: e.frames for e in store.episodes(split) if e.labelled or not store.action_space.width}
    room = sum(max(0, n - frames + 1) for n in lengths.values())
    drawn = draw_windows(lengths, frames, clips if pick == "random" else max(clips, min(CANDIDATES, room)), seed)
    if pick == "random":
        return drawn
    at = min(8, frames) - 1  # the last context frame of a rollout's default
    energy = {w: float(gradient_energy(store.frames(w[0], w[1] + at, w[1] + at + 1))[0]) for w in drawn}
    chosen: dict[str, tuple[str, int]] = {}  # of every episode the busiest one, so that the clips differ
    ordered = sorted(drawn, key=lambda w: -energy[w])
    for window in ordered:
        chosen.setdefault(window[0], window)
    rest = [w for w in ordered if w not in chosen.values()]
    return [*chosen.values(), *rest][:clips]


def _write_prompts(path: Path, store: EpisodeStore, windows: list[tuple[str, int]], frames: int) -> None:
    with EpisodeWriter(
        path, height=store.height, width=store.width, fps=store.fps, frame_skip=store.frame_skip,
        action_space=store.action_space, source=store.source, seed=0,
    ) as writer:  # fmt: skip
        for episode, start in windows:
            actions = store.actions(episode, start, start + frames - 1) if store.action_space.width else None
            writer.add(
                store.frames(episode, start, start + frames), actions, f"{store.name} {episode}:{start}", split="test"
            )
