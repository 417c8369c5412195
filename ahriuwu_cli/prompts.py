"""Where a rollout starts: context frames, truth and actions, from a dataset window, a video file or an image."""

from __future__ import annotations

import math
import os
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ahriuwu_cli import memory
from ahriuwu_cli.data.action_files import read_actions
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.resize import area_resize, centre_crop
from ahriuwu_cli.data.upright import upright_image
from ahriuwu_cli.data.video import MAX_PIXELS, iter_video, video_fps
from ahriuwu_cli.data.whole_video import MOST_SCANS, SCAN
from ahriuwu_cli.data.windows import draw_windows
from ahriuwu_cli.errors import CheckpointError, DataError, UserError, did_you_mean
from ahriuwu_cli.evaluation.metrics import gradient_energy
from ahriuwu_cli.evaluation.prepare import of_rates, trained_at
from ahriuwu_cli.places import is_run

if TYPE_CHECKING:
    from ahriuwu_cli.world import World

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")  # no other decoder is tried, whatever a file claims to be
# What Pillow raises for files that are damaged or meant to be; UnidentifiedImageError is an OSError.
_BAD_IMAGE = (OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError, KeyError, OverflowError, MemoryError,
              struct.error, zlib.error, Warning)  # fmt: skip
PICKS = ("random", "busiest")
MOST_BYTES = 64 << 20  # of an image file
SAME_RATE = 0.01  # of a rate: 29.97 and 30 frames/s are one, and so is what a short video's clock makes of either
CANDIDATES = 64  # windows among which the busiest is looked for
ACTION_SOURCES = ("data", "random", "none", "repeat:NAME", "a .csv or .jsonl file")


@dataclass(frozen=True)
class Request:
    """What the person asked for; see `ahriuwu rollout --help` for each."""

    prompt: Path
    episode: str | None = None
    start: int | None = None
    split: str = "test"
    pick: str = "random"
    context: int = 8
    length: int = 32
    actions: tuple[str, ...] = ()  # sources of actions, each a rollout of its own; empty: the prompt's default
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
        if self.pick not in PICKS:
            raise UserError(f"unknown --pick {self.pick!r}: {did_you_mean(self.pick, PICKS)}")
        if self.pick != "random" and (self.episode is not None or self.start is not None):
            raise UserError(f"--pick {self.pick} chooses the window itself: leave out --episode and --start")
        if len(set(self.actions)) < len(self.actions):
            raise UserError(f"--actions {' and '.join(self.actions)}: give each source once")
        if not self.prompt.exists():
            raise DataError(f"there is no dataset, video or image at {self.prompt}")


@dataclass(frozen=True)
class Prompt:
    """Context frames uint8 (P, H, W, 3) and what followed (T, H, W, 3; may be fewer frames than asked, or none).

    actions (P + L - 1, A) with known (P + L - 1,): actions[t] takes frame t to t + 1. same_actions: whether they are
    those that led to `truth`; otherwise what followed is something else, not the truth of this rollout. warnings: what
    a reader of its numbers must know.
    """

    name: str
    context: np.ndarray
    truth: np.ndarray
    actions: np.ndarray
    known: np.ndarray
    same_actions: bool
    warnings: list[str]


def shipped_prompt(checkpoint: Path) -> Path:
    """The prompts inside a world that was exported with some. UserError where there are none."""
    if not checkpoint.exists():
        raise CheckpointError(f"there is no checkpoint at {checkpoint}")
    worlds = [checkpoint / name for name in ("config.json", "best/config.json")]
    if not is_run(checkpoint) and not any(path.is_file() for path in worlds):
        raise CheckpointError(f"{checkpoint} is not a checkpoint: it has no config.json")
    folder = checkpoint / "prompt"
    if not (folder / "dataset.json").is_file():
        raise UserError(f"{checkpoint} brings no prompts of its own: name a dataset, video or image after it")
    return folder


def read_prompts(world: World, request: Request) -> list[Prompt]:
    """A prompt for each source of actions, all of one window. DataError or CheckpointError when it does not fit."""
    sources = request.actions or (None,)
    if request.prompt.is_dir():
        store = EpisodeStore.open(request.prompt)
        world.check_dataset(store)
        window = _window(world, store, request, any(_from_data(store, source) for source in sources))
        return [_checked(world, request, _from_dataset(world, store, request, window, s)) for s in sources]
    if request.pick != "random":
        raise UserError(f"--pick {request.pick} chooses among windows of a dataset, and {request.prompt} is none")
    return [_checked(world, request, _from_file(world, request, source)) for source in sources]


def _checked(world: World, request: Request, prompt: Prompt) -> Prompt:
    past = prompt.known[: len(prompt.context) - 1]
    if world.action_space.width and not past.all() and not world.trained_unlabelled:
        rows = (0 if request.prompt.is_dir() else request.start or 0) + len(prompt.context) + request.length - 1
        raise CheckpointError(
            "this model never saw video without actions: give --actions FILE, whose first row leaves "
            f"{'the first context frame' if request.prompt.is_dir() else 'the first frame'} and which has {rows} rows, "
            "or --context 1"
        )
    return prompt


def _from_file(world: World, request: Request, source: str | None) -> Prompt:
    read = _from_image if _is_image(request.prompt) else _from_video
    name, context, truth, said = read(world, request)
    steps, before = len(context) + request.length - 1, request.start or 0  # an image has no start
    from_file = source is not None and _is_file(source)
    source = source or ("random" if world.action_space.width else "none")
    actions, known = _chosen_actions(world, request, source, steps, before=before)
    if not from_file:
        known[: len(context) - 1] = False  # nobody knows what was pressed in this video
    same = not world.action_space.width or from_file
    return Prompt(name, context, truth, actions, known, same, said)


def _from_data(store: EpisodeStore, source: str | None) -> bool:
    """Whether the actions are the recorded ones, so that the truth is known as far as they go."""
    return source in (None, "data") and store.action_space.width > 0


def _without_data(world: World, request: Request) -> str:
    """Which actions can be given where none were recorded."""
    if request.context > 1 and not world.trained_unlabelled and not _is_image(request.prompt):
        return "give --actions FILE, or --context 1 with --actions random"
    return "give --actions random or FILE"


def _window(world: World, store: EpisodeStore, request: Request, data_actions: bool) -> tuple[str, int]:
    """(episode, first context frame); with recorded actions it must be long enough for all of the rollout."""
    wanted = request.context + (request.length if data_actions else 0)
    if request.episode is None:
        lengths = {e.id: e.frames for e in store.episodes(request.split) if e.labelled or not data_actions}
        if not lengths and store.episodes(request.split):
            other = _without_data(world, request)
            raise DataError(f"no episode of the {request.split} split has actions: {other}, or another --split")
        room = sum(max(0, frames - wanted + 1) for frames in lengths.values())
        count = 1 if request.pick == "random" else max(1, min(CANDIDATES, room))
        windows = draw_windows(lengths, wanted, count, request.seed)
        episode, start = windows[0] if count == 1 else _busiest(store, windows, request.context)
        start = start if request.start is None else request.start
    else:
        episode, start = request.episode, request.start or 0
    if data_actions and not store.episode(episode).labelled:
        raise DataError(f"the episode has no actions: {_without_data(world, request)}")
    frames = store.episode(episode).frames
    if start + wanted > frames:
        room = frames - (request.length if data_actions else 0)  # for the context
        if start + request.context <= frames:
            more = "ask for fewer, or use --actions random"
        elif room <= 0:
            more = "ask for fewer"
        elif request.context <= frames:
            more = "start earlier"
        else:
            more = f"give --context {room} at most"
        raise DataError(
            f"episode {episode} has {frames} frames, but {wanted} are needed from frame {start} "
            f"(--context {request.context}, --length {request.length}): {more}"
        )
    return episode, start


def _busiest(store: EpisodeStore, windows: list[tuple[str, int]], context: int) -> tuple[str, int]:
    """The window whose last context frame has the highest gradient energy: most edges, so most to see moving."""
    edges = [float(gradient_energy(store.frames(e, s + context - 1, s + context))[0]) for e, s in windows]
    return windows[int(np.argmax(edges))]


def _from_dataset(
    world: World, store: EpisodeStore, request: Request, window: tuple[str, int], source: str | None
) -> Prompt:
    (episode, start), data_actions = window, _from_data(store, source)
    frames = store.episode(episode).frames
    stop = min(frames, start + request.context + request.length)
    shown = store.frames(episode, start, stop)
    steps = request.context + request.length - 1
    recorded = np.zeros((0, store.action_space.width), np.float32)
    if store.episode(episode).labelled and store.action_space.width:
        recorded = store.actions(episode, start, min(frames - 1, start + steps))
    source = source or ("data" if store.action_space.width else "none")
    actions, known = _chosen_actions(world, request, source, steps, recorded)
    from_file = _is_file(source) and not len(recorded)  # of video without actions it says what was pressed
    if not from_file:
        past = min(request.context - 1, len(recorded))
        actions[:past], known[: request.context - 1] = recorded[:past], past > 0  # the past is as it was recorded
    same = data_actions or from_file or not store.action_space.width
    context, truth = shown[: request.context], shown[request.context :]
    return Prompt(f"{episode}:{start}", context, truth, actions, known, same, of_rates(world, store))


def _from_video(world: World, request: Request) -> tuple[str, np.ndarray, np.ndarray, list[str]]:
    first, height, width = request.start or 0, world.tokenizer.height, world.tokenizer.width
    pixels, count, said = bytearray(), 0, _of_rate(world, request.prompt)  # arrays in a list would be there twice
    for i, frame in enumerate(iter_video(request.prompt)):
        said += [] if i else _of_shape(frame, height, width)
        if i >= first:
            pixels += area_resize(centre_crop(frame, height, width), height, width).tobytes()
            count += 1
            memory.refuse_beyond(2 * len(pixels))  # a bytearray that grows may be there twice
        if count == request.context + request.length:
            break
    if count < request.context:
        raise DataError(f"{request.prompt} has {count} frames from {first} on, --context is {request.context}")
    clip = np.frombuffer(pixels, np.uint8).reshape(count, height, width, 3)
    return f"{request.prompt.name}:{first}", clip[: request.context], clip[request.context :], said


def _of_shape(picture: np.ndarray, height: int, width: int) -> list[str]:
    """The warning of a picture (h, w, 3) of another shape than the world's frames, whose edges are cut off."""
    h, w = picture.shape[:2]
    kept = centre_crop(picture, height, width)
    if kept.size > 0.98 * picture.size:
        return []
    return [
        f"pictures of {w}x{h} are cropped to their middle {kept.shape[1]}x{kept.shape[0]}; `ahriuwu record` squeezes "
        f"those of a game instead: if this is one, bring it to {width}x{height} first"
    ]


def _of_rate(world: World, path: Path) -> list[str]:
    """The warning of a video that runs at another rate than the world, as `of_rates` gives it of a dataset."""
    try:
        fps = video_fps(path)
    except DataError as error:  # no rate is stated, which is no reason not to look at the frames
        return [str(error)]
    if math.isclose(fps, world.fps, rel_tol=SAME_RATE):
        return []
    return [f"the video runs at {fps:g} frames/s, {trained_at(world)}"]


def _from_image(world: World, request: Request) -> tuple[str, np.ndarray, np.ndarray, list[str]]:
    from PIL import Image

    height, width = world.tokenizer.height, world.tokenizer.width
    if not request.prompt.is_file():
        raise DataError(f"{request.prompt} is no regular file: give an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            _check_scans(request.prompt)
            with Image.open(request.prompt, formats=IMAGE_FORMATS) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise ValueError(f"{picture.width} x {picture.height} is above the limit of {MAX_PIXELS} pixels")
                pixels = upright_image(picture)
    except (*_BAD_IMAGE, Image.DecompressionBombError) as error:
        raise DataError(f"{request.prompt} cannot be read as an image ({error}): give a PNG or JPEG") from None
    frame = area_resize(centre_crop(pixels, height, width), height, width)
    said = _of_shape(pixels, height, width)
    return request.prompt.name, frame[None], np.zeros((0, height, width, 3), np.uint8), said


def _check_scans(path: Path) -> None:
    """ValueError for an image of too many bytes, or a JPEG of more scans than any camera writes: each is a pass over
    the whole picture."""
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES >> 20} MB")
    if data.startswith(b"\xff\xd8") and data.count(SCAN) > MOST_SCANS:
        raise ValueError(f"more than {MOST_SCANS} scans")


def _is_image(prompt: Path) -> bool:
    return prompt.suffix.lower() in IMAGES and not prompt.is_dir()


def _is_file(source: str) -> bool:
    return source.lower().endswith((".csv", ".jsonl"))


def _chosen_actions(
    world: World, request: Request, source: str, steps: int, recorded: np.ndarray | None = None, before: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(steps, A) actions and (steps,) known, from a source of actions; a file has so many rows `before` them."""
    space = world.action_space
    known = np.ones(steps, bool)
    if not space.width and source not in ("none", "data"):
        raise UserError(f"--actions {source} says nothing to this world, which has no actions: leave it out")
    labelled = recorded is not None and len(recorded) > 0
    if source == "none" or not space.width:
        if space.width and not world.trained_unlabelled:
            raise CheckpointError(
                "--actions none asks for the embedding of video without actions, which this model never trained: "
                f"{'use random, repeat:NAME or a file' if labelled else _without_data(world, request)}"
            )
        return np.zeros((steps, space.width), np.float32), ~known
    if source == "data":
        if recorded is None:
            raise UserError(f"--actions data needs a dataset as the prompt: {_without_data(world, request)}")
        if not labelled:
            raise DataError(f"the episode has no actions: {_without_data(world, request)}")
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
        if len(rows) < before + steps:
            parts = "its rows begin with the video: start, context and length" if before else "context and length"
            raise DataError(f"{source} has {len(rows)} actions, but {before + steps} are needed ({parts}, less one)")
        return rows[before : before + steps], known
    raise UserError(f"unknown --actions {source!r}: {did_you_mean(source, ACTION_SOURCES)}")


def _existing(source: str) -> Path:
    path = Path(source)
    if not path.is_file():
        said = f"{path} is no regular file" if os.path.lexists(path) else f"there is no action file at {path}"
        raise DataError(f"{said}: give CSV or JSON lines")
    return path
