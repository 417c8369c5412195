"""Where a rollout starts: context frames, truth and actions, from a dataset window, a video file or an image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ahriuwu_cli.data.action_files import read_actions
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.resize import area_resize, centre_crop
from ahriuwu_cli.data.video import iter_video
from ahriuwu_cli.data.windows import draw_windows
from ahriuwu_cli.errors import CheckpointError, DataError, UserError, did_you_mean

if TYPE_CHECKING:
    from ahriuwu_cli.world import World

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
ACTION_SOURCES = ("data", "random", "none", "repeat:NAME", "a .csv or .jsonl file")


@dataclass(frozen=True)
class Request:
    """What the person asked for; see `ahriuwu rollout --help` for each."""

    prompt: Path
    episode: str | None = None
    start: int | None = None
    split: str = "test"
    context: int = 8
    length: int = 32
    actions: str | None = None
    samples: int = 1
    seed: int = 0

    def check(self) -> None:
        """UserError for numbers that make no sense, DataError for a prompt that is not there."""
        for name, value, low, high in (
            ("--context", self.context, 1, 10_000),
            ("--length", self.length, 1, 1_000_000),
            ("--samples", self.samples, 1, 256),
            ("--start", 0 if self.start is None else self.start, 0, 10**9),
        ):
            if not low <= value <= high:
                raise UserError(f"{name} must be from {low} to {high}, got {value}")
        if not self.prompt.exists():
            raise DataError(f"there is no dataset, video or image at {self.prompt}")


@dataclass(frozen=True)
class Prompt:
    """Context frames uint8 (P, H, W, 3) and what followed (T, H, W, 3; may be fewer frames than asked, or none).

    actions (P + L - 1, A) with known (P + L - 1,): actions[t] takes frame t to t + 1. same_actions: whether they are
    those that led to `truth`; otherwise what followed is something else, not the truth of this rollout.
    """

    name: str
    context: np.ndarray
    truth: np.ndarray
    actions: np.ndarray
    known: np.ndarray
    same_actions: bool


def read_prompt(world: World, request: Request) -> Prompt:
    """The prompt of a request. DataError or CheckpointError where it does not fit the world."""
    prompt = _from_dataset(world, request) if request.prompt.is_dir() else _from_file(world, request)
    past = prompt.known[: len(prompt.context) - 1]
    if world.action_space.width and not past.all() and not world.trained_unlabelled:
        raise CheckpointError(
            "this model never saw video without actions: give --actions FILE with a row for every frame of "
            f"{request.prompt}, or --context 1"
        )
    return prompt


def _from_file(world: World, request: Request) -> Prompt:
    if request.prompt.suffix.lower() in IMAGES:
        name, context, truth = _from_image(world, request)
    else:
        name, context, truth = _from_video(world, request)
    steps = len(context) + request.length - 1
    actions, known = _chosen_actions(world, request, "random" if world.action_space.width else "none", steps)
    if request.actions is None or not _is_file(request.actions):
        known[: len(context) - 1] = False  # nobody knows what was pressed in this video
    same = not world.action_space.width or (request.actions is not None and _is_file(request.actions))
    return Prompt(name, context, truth, actions, known, same)


def _from_dataset(world: World, request: Request) -> Prompt:
    store = EpisodeStore.open(request.prompt)
    world.check_dataset(store)
    data_actions = request.actions in (None, "data") and store.action_space.width > 0
    wanted = request.context + request.length if data_actions else request.context + 1
    if request.episode is None:
        lengths = {e.id: e.frames for e in store.episodes(request.split) if e.labelled or not data_actions}
        episode, start = draw_windows(lengths, wanted, 1, request.seed)[0]
        start = start if request.start is None else request.start
    else:
        episode, start = request.episode, request.start or 0
    frames = store.episode(episode).frames
    if start + wanted > frames:
        more = "ask for fewer, or use --actions random" if data_actions else "start earlier"
        raise DataError(
            f"episode {episode} has {frames} frames, but {wanted} are needed from frame {start} "
            f"(--context {request.context}, --length {request.length}): {more}"
        )
    stop = min(frames, start + request.context + request.length)
    shown = store.frames(episode, start, stop)
    default = "data" if store.action_space.width else "none"
    steps = request.context + request.length - 1
    recorded = np.zeros((0, store.action_space.width), np.float32)
    if store.episode(episode).labelled and store.action_space.width:
        recorded = store.actions(episode, start, min(frames - 1, start + steps))
    actions, known = _chosen_actions(world, request, default, steps, recorded)
    past = min(request.context - 1, len(recorded))
    actions[:past], known[: request.context - 1] = recorded[:past], past > 0  # the past is as it was recorded
    same = data_actions or not store.action_space.width
    return Prompt(f"{episode}:{start}", shown[: request.context], shown[request.context :], actions, known, same)


def _from_video(world: World, request: Request) -> tuple[str, np.ndarray, np.ndarray]:
    first, height, width = request.start or 0, world.tokenizer.height, world.tokenizer.width
    frames = []
    for i, frame in enumerate(iter_video(request.prompt)):
        if i >= first:
            frames.append(area_resize(centre_crop(frame, height, width), height, width))
        if len(frames) == request.context + request.length:
            break
    if len(frames) < request.context:
        raise DataError(f"{request.prompt} has {len(frames)} frames from {first} on, --context is {request.context}")
    clip = np.stack(frames)
    return f"{request.prompt.name}:{first}", clip[: request.context], clip[request.context :]


def _from_image(world: World, request: Request) -> tuple[str, np.ndarray, np.ndarray]:
    from PIL import Image, UnidentifiedImageError

    height, width = world.tokenizer.height, world.tokenizer.width
    try:
        with Image.open(request.prompt) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{request.prompt} cannot be read as an image ({error})") from None
    frame = area_resize(centre_crop(pixels, height, width), height, width)
    return request.prompt.name, frame[None], np.zeros((0, height, width, 3), np.uint8)


def _is_file(source: str) -> bool:
    return source.lower().endswith((".csv", ".jsonl"))


def _chosen_actions(
    world: World, request: Request, default: str, steps: int, recorded: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(steps, A) actions and (steps,) known, by the request's source of actions."""
    space, source = world.action_space, request.actions or default
    known = np.ones(steps, bool)
    if source == "none" or not space.width:
        if space.width and not world.trained_unlabelled:
            raise CheckpointError(
                "--actions none asks for the embedding of video without actions, which this model never trained: "
                "use random, repeat:NAME or a file"
            )
        return np.zeros((steps, space.width), np.float32), ~known
    if source == "data":
        if recorded is None:
            raise UserError("--actions data needs a dataset as the prompt: use random, repeat:NAME or a file")
        if len(recorded) < steps:
            raise DataError(f"the episode has {len(recorded)} of the {steps} actions that are needed: use random")
        return recorded[:steps].copy(), known
    if source == "random":
        return space.random(steps, (2, 8), np.random.default_rng(request.seed)), known
    if source.startswith("repeat:"):
        return np.tile(space.parse(source.removeprefix("repeat:")), (steps, 1)), known
    if _is_file(source):
        rows = read_actions(_existing(source)).rows_for(space)
        space.validate(rows, source)
        if len(rows) < steps:
            raise DataError(f"{source} has {len(rows)} actions, but {steps} are needed (context and length, less one)")
        return rows[:steps], known
    raise UserError(f"unknown --actions {source!r}: {did_you_mean(source, ACTION_SOURCES)}")


def _existing(source: str) -> Path:
    path = Path(source)
    if not path.is_file():
        raise DataError(f"there is no action file at {path}")
    return path
