"""Processes that encode parts of a pack: the side that starts them, and the side that works (`main`).

Each is a fresh interpreter with one thread. It inherits the open pack, the lock, and the tokenizer's weights in a
nameless file, so nothing large passes a pipe; jobs come in by stdin, answers go out by stdout, a JSON line each. When
stdin ends, because all is done, or because whoever started it is gone, the process ends at once: no orphan stays.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ahriuwu_cli.data.pack_format import Layout, Part
from ahriuwu_cli.errors import CheckpointError, DataError, DiskError

if TYPE_CHECKING:
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.data.pack_encode import Target
    from ahriuwu_cli.models.tokenizer import Tokenizer

AHEAD = 2  # jobs that a process holds: one that it works on and one that waits


class Workers:
    """`with Workers(...) as others`: processes that live as long as the block, and not a moment longer."""

    def __init__(self, count: int, store: EpisodeStore, tokenizer: Tokenizer, target: Target) -> None:
        from safetensors.torch import save

        self._answers: queue.SimpleQueue[tuple[int, dict[str, Any] | None]] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._listeners: list[threading.Thread] = []
        weights = {name: t.detach().cpu().contiguous() for name, t in tokenizer.state_dict().items()}
        with _nameless(save(weights)) as file:
            setup = {
                "dataset": str(Path(store.path).absolute()),
                "fingerprint": store.fingerprint,
                "kind": tokenizer.kind,
                "architecture": tokenizer.to_json(),
                "tokenizer": tokenizer.fingerprint(),
                "weights": file.fileno(),
                "descriptor": target.descriptor,
                "layout": asdict(target.layout),
            }
            lock = () if target.lock is None else (target.lock,)
            try:
                for _ in range(count):
                    self._start(setup, (file.fileno(), target.descriptor, *lock))
            except BaseException:
                self._end()
                raise

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, parts: list[Part], tick: Callable[[int], None]) -> Iterator[tuple[Part, str]]:
        """Yields (part, hash of its rows) as they are finished. DataError, CheckpointError or OSError when a
        process met one."""
        waiting, by_index = iter(parts), {part.index: part for part in parts}
        for _ in range(AHEAD):
            for number in range(len(self._processes)):
                self._give(number, waiting)
        while by_index:
            number, answer = self._answers.get()
            if answer is None:
                self._explain_end(number)
            elif "frames" in answer:
                tick(answer["frames"])
            elif "errno" in answer:
                raise OSError(answer["errno"], answer["sentence"])
            elif "sentence" in answer:
                raise (CheckpointError if answer["of_tokenizer"] else DataError)(answer["sentence"])
            else:
                self._give(number, waiting)
                yield by_index.pop(answer["part"]), answer["sha256"]

    def _start(self, setup: dict[str, Any], descriptors: tuple[int, ...]) -> None:
        number = len(self._processes)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ahriuwu_cli.data.pack_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            pass_fds=descriptors,
        )
        self._processes.append(process)
        self._listeners.append(threading.Thread(target=self._listen, args=(number, process), daemon=True))
        self._listeners[number].start()
        self._tell(process, setup)

    def _give(self, number: int, waiting: Iterator[Part]) -> None:
        part = next(waiting, None)
        if part is not None:
            self._tell(self._processes[number], asdict(part))

    def _tell(self, process: subprocess.Popen[bytes], line: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):  # it has ended; its last answer says why
            os.write(process.stdin.fileno(), json.dumps(line).encode() + b"\n")

    def _listen(self, number: int, process: subprocess.Popen[bytes]) -> None:
        try:
            for line in process.stdout:
                self._answers.put((number, json.loads(line)))
        except ValueError:
            pass  # it was ended in the middle of a line
        self._answers.put((number, None))

    def _explain_end(self, number: int) -> None:
        code = self._processes[number].wait()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise DataError(
            f"a process that encodes {how} (out of memory?): what is finished is kept, run the same command again, "
            f"with fewer --threads if it happens again"
        )

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
        for process, listener in zip(self._processes, self._listeners, strict=True):
            process.wait()
            listener.join()
            process.stdin.close()
            process.stdout.close()


def _nameless(content: bytes) -> BinaryIO:
    """A file of this content without a name, for the caller to close. DiskError where temporary files have no room."""
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115
        file.write(content)
        file.flush()
    except OSError as error:
        raise DiskError(
            f"no temporary file of {len(content) / 1e6:.1f} MB can be written ({error.strerror}): make room in "
            f"{os.environ.get('TMPDIR', '/tmp')}, or set TMPDIR to another folder"
        ) from None
    return file


def main() -> None:
    """Be such a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; who started this one ends it
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    setup = json.loads(sys.stdin.buffer.readline() or b"null")
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(jobs,), daemon=True).start()

    def answer(**line: Any) -> None:
        os.write(answers, json.dumps(line).encode() + b"\n")

    try:
        _work(setup, jobs, answer)
    except (DataError, CheckpointError) as error:
        answer(sentence=str(error), of_tokenizer=isinstance(error, CheckpointError))
    except OSError as error:
        answer(sentence=error.strerror or str(error), errno=error.errno)
    except Exception:
        traceback.print_exc()
        os._exit(1)
    signal.pause()  # the answer is read; then stdin ends


def _receive(jobs: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in sys.stdin.buffer:
        jobs.put(json.loads(line))
    os._exit(0)


def _work(setup: dict[str, Any], jobs: queue.SimpleQueue[dict[str, Any]], answer: Callable[..., None]) -> None:
    import torch
    from safetensors.torch import load

    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.data.metadata import read_document
    from ahriuwu_cli.data.pack_encode import Target, encode_part
    from ahriuwu_cli.models.tokenizer import build_tokenizer

    torch.set_num_threads(1)
    store = EpisodeStore(Path(setup["dataset"]), read_document(Path(setup["dataset"])))  # files: as they are read
    if store.fingerprint != setup["fingerprint"]:
        raise DataError(f"{store.path} was replaced while it was packed: run the same command again")
    tokenizer = build_tokenizer(setup["kind"], setup["architecture"])
    weights = os.pread(setup["weights"], os.fstat(setup["weights"]).st_size, 0)
    tokenizer.load_state_dict(load(weights), strict=True)
    tokenizer.eval()
    assert tokenizer.fingerprint() == setup["tokenizer"], setup["tokenizer"]
    layout = setup["layout"]
    shapes = {name: (dtype, tuple(shape)) for name, (dtype, shape) in layout["shapes"].items()}
    target = Target(setup["descriptor"], Layout(shapes, layout["offsets"], layout["size"]), None)
    while True:
        part = Part(**jobs.get())
        digest = encode_part(store, tokenizer, target, part, lambda frames: answer(frames=frames))
        answer(part=part.index, sha256=digest)


if __name__ == "__main__":
    main()
