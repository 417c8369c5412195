"""One request to imagine, from a world and a prompt to files: mp4, GIF, PNG strip and the raw arrays.

Frames are written as they are decoded, CHUNK at a time, so a rollout of 10,000 frames takes no more memory than one of
100; held whole are only the truth that it is compared with, which is never longer than its episode or video, and the
pictures of the GIF, which are smaller than the film's where they would be more than GIF_PIXELS. All is made in a hidden
folder beside `out` and gets its name at the end: a rollout that stops, by a signal or by a frame that is not finite,
leaves `out` as it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ahriuwu_cli.data.documents import MAX_RESULT, to_json
from ahriuwu_cli.data.panels import MAX_SIDE, Page, largest_scale, page_size
from ahriuwu_cli.data.tensor_writer import TensorWriter
from ahriuwu_cli.data.video import MAX_PIXELS
from ahriuwu_cli.data.video_writing import gif_picture, mp4_writer, save_gif, write_strip
from ahriuwu_cli.diffusion.tau import LABEL
from ahriuwu_cli.errors import TrainingError, UserError
from ahriuwu_cli.evaluation.metrics import psnr_per_frame
from ahriuwu_cli.folders import replacing
from ahriuwu_cli.models.dynamics import incoming_actions
from ahriuwu_cli.prompts import Prompt, Request, read_prompts
from ahriuwu_cli.rollout import KeyedNoise, RolloutConfig, rollout
from ahriuwu_cli.world import World

Progress = Callable[[int, int], None]
CHUNK, CHUNK_BYTES = 64, 256 << 20  # frames decoded at a time at most, of all rollouts together in bytes
STRIP = 12  # frames of the PNG strip at most
GIF = 128  # frames of the GIF at most
GIF_PIXELS = 1 << 25  # of all frames of the GIF, which are in memory together until it is written


def imagine(
    world: World,
    request: Request,
    given: dict,
    out: Path,
    scale: int | None,
    progress: Progress,
    overwrite: bool = True,
    then: Callable[[], None] = lambda: None,
) -> dict:
    """Generate and write everything into `out`; returns what `rollout.json` holds. given: overrides, None is unset.

    overwrite False: UserError when another process filled `out` meanwhile. then: as of `replacing`. TrainingError names
    the frame from which on a rollout is not finite.
    """
    config = world.generation_with(given)
    world.check_generation(config)
    prompts = read_prompts(world, request)
    with replacing(out, overwrite, then, own=()) as folder:
        with Film(world, request, prompts, folder, scale) as film:
            for first, frames in _generate(world, request, prompts, config, progress):
                film.add(first, frames)
        result = {
            "prompt": prompts[0].name,
            "context": len(prompts[0].context),
            "length": request.length,
            "samples": request.samples,
            "seed": request.seed,
            "actions": list(request.actions) or ["default"],
            "generation": asdict(config),
            "tau": LABEL,
            "precision": world.precision,
            "frames_per_s": round(len(prompts) * request.samples * request.length / max(film.waited, 1e-9), 2),
            "psnr_db": float(np.mean(film.psnr)) if film.psnr else None,
            "psnr_frames": len(film.psnr),
            "warnings": prompts[0].warnings,
            "checkpoint": str(world.path),
            "files": {name: str(out / path.name) for name, path in film.files.items()},
        }
        (folder / "rollout.json").write_text(to_json(result, 1, MAX_RESULT))
    return result


def _generate(
    world: World, request: Request, prompts: list[Prompt], config: RolloutConfig, progress: Progress
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (number of its first frame, uint8 (sources of actions * samples, up to CHUNK, H, W, 3)).

    All sources share context and noise, so that what differs comes from the actions.
    """
    n, device = request.samples, world.device
    rows = len(prompts) * n
    latents = world.encode(torch.from_numpy(prompts[0].context)[None]).expand(rows, -1, -1, -1)
    given = torch.from_numpy(np.stack([p.actions for p in prompts])).repeat_interleave(n, dim=0)
    actions, known = incoming_actions(given, torch.ones(rows, dtype=torch.bool))
    known[:, 1:] = torch.from_numpy(np.stack([p.known for p in prompts])).repeat_interleave(n, dim=0)
    keys = [f"{prompts[0].name}/{i}" for i in range(n)] * len(prompts)
    noise, passes = KeyedNoise(request.seed, keys, latents.shape[2:], device), []
    imagined = rollout(
        world.dynamics, latents, actions.to(device), known.to(device), config, noise, world.k_max, passes
    )
    at_once = min(CHUNK, max(1, CHUNK_BYTES // (rows * 3 * world.tokenizer.height * world.tokenizer.width)))
    lead = world.tokenizer.decoder_window - 1  # latents that a tokenizer looks back at
    waiting, past = [], latents[:, max(0, latents.shape[1] - lead) :] if lead else latents[:, :0]
    finite: list[Tensor] = []  # (K + 1,) bool of every waiting frame: its passes, itself; read with its chunk alone
    for t, z_hat in enumerate(imagined):
        waiting.append(z_hat)
        finite.append(torch.stack([*passes, torch.isfinite(z_hat).all()]))
        if len(waiting) == at_once or t + 1 == request.length:
            _check_finite(t + 1 - len(waiting), torch.stack(finite).cpu().numpy())
            clip = torch.cat([past, torch.stack(waiting, dim=1)], dim=1)
            yield t + 1 - len(waiting), world.decode(clip).numpy()[:, past.shape[1] :]
            waiting, finite, past = [], [], clip[:, max(0, clip.shape[1] - lead) :] if lead else past
        progress(t + 1, request.length)


def _check_finite(first: int, finite: np.ndarray) -> None:
    """finite (frames, K + 1): whether each pass of frames first, first + 1, ... is, and the frame. TrainingError."""
    if finite[:, -1].all():
        return
    row = int(np.argmin(finite[:, -1]))
    bad, steps = np.flatnonzero(~finite[row, :-1]), finite.shape[1] - 1
    where = f"at pass {bad[0] + 1} of {steps}" if len(bad) else "after its last pass"
    raise TrainingError(
        f"the rollout is not finite from generated frame {first + row} on ({where}), so nothing was written: "
        "try another --tau-ctx or --steps, or a shorter --length"
    )


class Film:
    """Writes frames as they come: context manager, `add` every chunk in order. `psnr` has a number a known frame."""

    def __init__(self, world: World, request: Request, prompts: list[Prompt], folder: Path, scale: int | None) -> None:
        self.prompts, self.length = prompts, request.length
        prompt, alone = prompts[0], len(prompts) == 1
        self._samples, self._alone = request.samples, alone
        true = [i for i, each in enumerate(prompts) if each.same_actions and len(each.truth)]
        self._scored = true[-1] if true else None  # the source of actions whose rollout the truth is known of
        self._difference = alone and bool(true)
        titles = _titles(request)
        if len(prompt.truth):
            titles.insert(0, "truth" if self._difference else "recorded, with its own actions")
        titles += ["difference"] if self._difference else []
        captions = [""] + [
            f"action {world.action_space.describe(row)}" if seen else "action unknown"
            for row, seen in zip(prompt.actions, prompt.known, strict=True)
        ]
        if not world.action_space.width or not alone:
            captions = []  # with several sources of actions their names are the titles
        height, width, context = world.tokenizer.height, world.tokenizer.width, len(prompt.context)
        grid = (len(titles), height, width, 4)
        wanted = scale or max(1, min(8, 256 // height))
        fits = largest_scale(wanted, *grid)
        if not fits or (scale and fits < scale):
            raise UserError(
                f"{len(titles)} panels of {height}x{width}, enlarged {wanted} times, are more than {MAX_PIXELS} pixels "
                f"or {MAX_SIDE} in a row: give a smaller --scale, or fewer --samples and --actions"
            )
        small = largest_scale(fits, *grid, GIF_PIXELS // min(GIF, context + self.length)) or 1
        self._gif_frames = min(GIF, max(1, GIF_PIXELS // math.prod(page_size(*grid, small))))
        film = {"columns": 4, "context": context, "captions": captions}
        self._page = Page(titles, height, width, scale=fits, **film)
        self._gif_page = Page(titles, height, width, scale=small, **film) if small < fits else self._page
        side = max(1, min(128 // height, 256 // width))
        self._column = Page(titles, height, width, columns=1, scale=side, context=context)
        self._every = -(-(context + self.length) // STRIP)
        self._gif, self._strip = [], []
        self._fps = world.fps
        names = {"mp4": "rollout.mp4", "gif": "rollout.gif", "strip": "strip.png", "arrays": "arrays.safetensors"}
        self.files = {kind: folder / name for kind, name in names.items()}
        self.psnr: list[float] = []
        self.waited, self._since = 0.0, time.monotonic()  # seconds in which frames were made, not written

    def __enter__(self) -> Film:
        prompt, frame = self.prompts[0], self.prompts[0].context.shape[1:]
        actions = np.stack([p.actions for p in self.prompts]).astype(np.float32)
        actions = actions[0] if self._alone else actions
        rows = (self._samples,) if self._alone else (len(self.prompts), self._samples)
        tensors = {
            "frames": ("U8", (*rows, self.length, *frame)),
            "context": ("U8", prompt.context.shape),
            "truth": ("U8", prompt.truth.shape),
            "actions": ("F32", actions.shape),
        }
        with ExitStack() as stack:
            self._arrays = stack.enter_context(TensorWriter(self.files["arrays"], tensors))
            self._show = stack.enter_context(mp4_writer(self.files["mp4"], *self._page.shape[:2], self._fps))
            for name, values in (("context", prompt.context), ("truth", prompt.truth), ("actions", actions)):
                self._arrays.write(name, values)
            for t, picture in enumerate(prompt.context):
                self._draw(t, picture, [picture] * (len(self.prompts) * self._samples))
            self._stack = stack.pop_all()
        self._since = time.monotonic()
        return self

    def add(self, first: int, frames: np.ndarray) -> None:
        """uint8 (sources * samples, T, H, W, 3): generated frames first..first + T - 1."""
        self.waited += time.monotonic() - self._since
        prompt = self.prompts[0]
        for row, clip in enumerate(frames):
            place = (row,) if self._alone else divmod(row, self._samples)
            self._arrays.write("frames", clip, *place, first)
        if self._scored is not None:
            known = prompt.truth[first : first + frames.shape[1]]
            made = frames[self._scored * self._samples, : len(known)]
            self.psnr += psnr_per_frame(made, known).tolist() if len(known) else []
        for i in range(frames.shape[1]):
            t = first + i
            truth = prompt.truth[t] if t < len(prompt.truth) else None
            self._draw(len(prompt.context) + t, truth, list(frames[:, i]))
        self._since = time.monotonic()

    def __exit__(self, *error) -> None:
        try:
            if error[0] is None:
                save_gif(self.files["gif"], self._gif, self._fps)
                write_strip(self.files["strip"], np.stack(self._strip))
        finally:
            self._stack.__exit__(*error)

    def _draw(self, t: int, truth: np.ndarray | None, made: list[np.ndarray]) -> None:
        """One frame of the film; truth is None where nobody knows it."""
        panels, blank = list(made), np.zeros_like(made[0])
        if len(self.prompts[0].truth):
            panels.insert(0, blank if truth is None else truth)
        if self._difference:
            difference = np.abs(made[0].astype(np.int16) - (made[0] if truth is None else truth))
            panels.append(difference.astype(np.uint8))
        picture = self._page.picture(t, panels)
        self._show(picture)
        if t < self._gif_frames:
            small = picture if self._gif_page is self._page else self._gif_page.picture(t, panels)
            self._gif.append(gif_picture(small))
        if t % self._every == 0:
            self._strip.append(self._column.picture(t, panels))


def _titles(request: Request) -> list[str]:
    """Of every rollout: its source of actions where there are several, and the number of its sample likewise."""
    sources = request.actions if len(request.actions) > 1 else ("rollout",)
    numbers = [""] if request.samples == 1 else [f" {i + 1}" for i in range(request.samples)]
    return [source + number for source in sources for number in numbers]
