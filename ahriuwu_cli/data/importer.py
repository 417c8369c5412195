"""Video files with optional action files beside them, as a dataset: row t takes frame t to frame t+1.

`clip.mp4` takes its actions from `clip.csv` (a header of column names) or `clip.jsonl` (an object or array a line).
A video without an action file is stored unlabelled. `actions.json` in the folder declares the action space.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahriuwu_cli.data.action_files import infer_space, read_actions
from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.documents import as_text, read_json
from ahriuwu_cli.data.metadata import MAX_FPS, MIN_FPS
from ahriuwu_cli.data.resize import area_resize, centre_crop
from ahriuwu_cli.data.video import MAX_PIXELS, timed_frames, video_fps
from ahriuwu_cli.errors import DataError, UserError

if TYPE_CHECKING:
    import numpy as np

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif")
ACTION_SUFFIXES = (".csv", ".jsonl")
DECLARED = "actions.json"
MAX_EPISODE_BYTES = 8_000_000_000  # of one video's frames, which are all in memory before they are written
EARLY = 0.4  # of a frame of the video: so much before its time a frame is taken for it, since times are rounded
ROUNDING = 2e-3  # seconds; Matroska counts in milliseconds
SAME_RATE = 1.001e-3  # of the larger one; 29.97 and 30 differ by a thousandth


@dataclass(frozen=True)
class ImportConfig:
    """What to import: size in pixels; fps in frames per second (None keeps the videos'); limits for one video."""

    folder: Path
    height: int = 64
    width: int = 64
    fps: float | None = None
    max_frames: int = 100_000
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.fps is not None and not MIN_FPS <= self.fps <= MAX_FPS:
            raise UserError(
                f"a rate of {self.fps} frames per second cannot be stored: give one from {MIN_FPS} to {MAX_FPS:g}"
            )
        if self.max_frames < 2:
            raise UserError(f"a limit of {self.max_frames} frames a video leaves no transition: give at least 2")


@dataclass(frozen=True)
class ImportPlan:
    """What will be imported, made before a frame is decoded; notes are sentences that the user should see.

    action_files: by video. They are looked at here and read again with their video, so that one is in memory at a time.
    """

    config: ImportConfig
    videos: tuple[Path, ...]
    action_files: dict[Path, Path]
    action_space: ActionSpace
    fps: float
    notes: list[str] = field(default_factory=list)


def plan_import(config: ImportConfig) -> ImportPlan:
    """Look at the folder, its rates and its action files. Raises DataError on whatever does not fit together."""
    folder = config.folder
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give the folder that holds the videos")
    files = _files(folder)
    videos = tuple(p for p in files if p.suffix.lower() in VIDEO_SUFFIXES)
    if not videos:
        raise DataError(f"{folder} holds no video file ({', '.join(VIDEO_SUFFIXES)}): subfolders are not searched")
    action_files = _action_files(files, videos)
    tables = map(read_actions, action_files.values())
    notes: list[str] = []
    declared = folder / DECLARED
    if declared in files:
        space = ActionSpace.from_json(_read_json(declared), str(declared))
        for table in tables:
            table.order_in(space)
    else:
        space, found = infer_space(tables)
        notes += found
    unlabelled = len(videos) - len(action_files)
    if unlabelled:
        notes.append(f"{unlabelled} of {len(videos)} videos have no action file and are stored unlabelled")
    return ImportPlan(config, videos, action_files, space, _common_rate(config, videos, action_files), notes)


def import_videos(plan: ImportPlan) -> Iterator[tuple[np.ndarray, np.ndarray | None, str]]:
    """Yield (frames uint8 (T, H, W, 3), actions float32 (T-1, A) or None, file name), one video after the other.

    Notes about a video are added to plan.notes. Raises DataError when its action rows do not fit its frames.
    """
    for video in plan.videos:
        frames = _read_frames(video, plan)
        actions = None
        if file := plan.action_files.get(video):
            actions = read_actions(file).rows_for(plan.action_space)
            if len(actions) == len(frames):
                plan.notes.append(
                    f"{file.name} has a row for each of the {len(frames)} frames: the last row, which leads to "
                    "no frame, was dropped"
                )
                actions = actions[:-1]
            if len(actions) != len(frames) - 1:
                raise DataError(
                    f"{file} has {len(actions)} rows and {video.name} has {len(frames)} frames: give "
                    f"{len(frames) - 1} rows, row t for the step from frame t to frame t+1"
                )
            plan.action_space.validate(actions, str(file))
        yield frames, actions, as_text(video.name)
        del frames, actions  # before the next video is decoded: they may be gigabytes


def _files(folder: Path) -> list[Path]:
    """What an import reads, by name. DataError where such a name is a folder, a pipe, a device or a link to nothing."""
    names = (*VIDEO_SUFFIXES, *ACTION_SUFFIXES)
    files = sorted(
        p for p in folder.iterdir() if p.name == DECLARED or (p.suffix.lower() in names and not p.name.startswith("."))
    )
    for path in files:
        if not path.is_file():
            raise DataError(f"{path} is no regular file: move it away, or put the file itself there")
    return files


def _action_files(files: list[Path], videos: tuple[Path, ...]) -> dict[Path, Path]:
    """The action file of each video that has one. DataError where they do not pair."""
    stems: dict[str, Path] = {}
    for video in videos:
        other = stems.setdefault(video.stem, video)
        if other != video:
            raise DataError(f"{other.name} and {video.name} differ only in their endings: rename one of them")
    found: dict[Path, Path] = {}
    for file in files:
        if file.suffix.lower() not in ACTION_SUFFIXES:
            continue
        video = stems.get(file.stem)
        if video is None:
            raise DataError(
                f"{file} has no video of the same name beside it: rename it to its video's, or move it away"
            )
        if video in found:
            raise DataError(f"{video.name} has two action files, {found[video].name} and {file.name}: keep one")
        found[video] = file
    return found


def _common_rate(config: ImportConfig, videos: tuple[Path, ...], labelled: Container[Path]) -> float:
    """The one rate of the dataset."""
    rates = {video: video_fps(video) for video in videos}
    target = config.fps or rates[videos[0]]
    for video, rate in rates.items():
        if math.isclose(rate, target, rel_tol=SAME_RATE):
            continue
        if config.fps is None:
            raise DataError(
                f"{video.name} runs at {rate:g} frames per second and {videos[0].name} at {target:g}: "
                f"{_to_one_rate(rates, labelled)}"
            )
        if video in labelled:
            raise DataError(
                f"{video.name} runs at {rate:g} frames per second and has actions, so it cannot be brought to "
                f"{target:g}: {_to_one_rate(rates, labelled)}"
            )
        if rate < target:
            raise DataError(
                f"{video.name} runs at {rate:g} frames per second, below the {target:g} asked for: "
                f"{_to_one_rate(rates, labelled)}"
            )
    return target


def _to_one_rate(rates: dict[Path, float], labelled: Container[Path]) -> str:
    """What brings videos to one rate: frames can be left out where no actions are between them."""
    lowest = min(rates.values())
    if all(math.isclose(rate, lowest, rel_tol=SAME_RATE) for rate in rates.values()):
        if any(video in labelled for video in rates):
            return "leave --fps away, or resample video and actions together beforehand"
        return f"leave --fps away, or give one up to {lowest:g}"
    if all(video not in labelled or math.isclose(rate, lowest, rel_tol=SAME_RATE) for video, rate in rates.items()):
        return f"give --fps {lowest:g}, or import them apart"
    return "import them apart, or resample them beforehand, actions together with their video"


def _read_frames(video: Path, plan: ImportPlan) -> np.ndarray:
    """Decoded, thinned to the plan's rate, cropped to its aspect and resized: uint8 (T, H, W, 3)."""
    import numpy as np

    config = plan.config
    rate = video_fps(video)
    thin = not math.isclose(rate, plan.fps, rel_tol=SAME_RATE)
    pixels = bytearray()  # one piece from the start: arrays in a list would be there twice in the end
    times: list[float] = []  # of the frames that are kept, seconds from the first
    begin, wanted = 0.0, 0  # wanted: counts the times at the plan's rate that a frame was found for
    for i, (time, frame) in enumerate(timed_frames(video, config.max_pixels)):
        if i == config.max_frames:
            raise DataError(f"{video} has more than {config.max_frames} frames: cut it, or raise --max-frames")
        time = i / rate if time is None else time
        begin = begin if i else time
        due = int((time - begin + EARLY / rate) * plan.fps) + 1
        if not thin or due > wanted:
            frame = centre_crop(frame, config.height, config.width)
            pixels += area_resize(frame, config.height, config.width).tobytes()
            times.append(time - begin)
            wanted = due
        if len(pixels) > MAX_EPISODE_BYTES:
            raise DataError(
                f"{video} takes more than {MAX_EPISODE_BYTES / 1e9:g} GB as one episode: cut it, or lower --size"
            )
    if len(times) < 2:
        raise DataError(f"{video} has {len(times)} frame(s) at {plan.fps:g} frames per second: at least 2 are needed")
    if uneven := _uneven(times, plan.fps):
        plan.notes.append(f"{video.name} {uneven}: bring it to one rate first, or give a lower --fps")
    return np.frombuffer(pixels, np.uint8).reshape(-1, config.height, config.width, 3)


def _uneven(times: list[float], fps: float) -> str:
    """How frames at these times, in seconds, are other than so many a second, by more than a frame; or nothing."""
    gap, length = max(b - a for a, b in itertools.pairwise(times)), times[-1] - times[0]
    even = (len(times) - 1) / fps
    if gap > 2 / fps + ROUNDING:
        return f"is stored as {fps:g} frames per second, but stands still for up to {gap:.2f} s"
    if abs(length - even) > 1 / fps + 0.1 * even + ROUNDING:  # a rate that the file states and does not have
        return f"is stored as {fps:g} frames per second, but its {len(times)} frames take {length:.2f} s"
    return ""


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not JSON ({error}): see `ahriuwu import --help` for its form") from None
