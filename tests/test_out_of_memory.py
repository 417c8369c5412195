"""Memory that runs out is one sentence that says what to ask less of, and in a run where it stands."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from small import small_dataset, small_place

from ahriuwu_cli import cli, memory
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.latents import open_pack
from ahriuwu_cli.data.video_writing import write_mp4
from ahriuwu_cli.errors import TrainingError, UserError
from ahriuwu_cli.training.assemble import fit_linear_tokenizer
from ahriuwu_cli.training.run_folder import RunFolder


def raised(call) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011  whatever a library raises
        call()
    return caught.value


def fail(error: Exception):
    raise error


SHORT = {
    "numpy": lambda: np.empty(1 << 60, np.uint8),
    "torch": lambda: torch.empty(1 << 55, dtype=torch.uint8),
    "a GPU": lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
    "cuBLAS": lambda: fail(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
    "oneDNN": lambda: fail(RuntimeError("could not create a primitive")),
    "a thread": lambda: fail(RuntimeError("can't start new thread")),
    "an engine": lambda: fail(RuntimeError("Not enough resources to create thread.")),
    "the loader": lambda: fail(ImportError("libx.so: failed to map segment from shared object")),
    "the system": lambda: fail(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))),
}


@pytest.mark.parametrize("who", SHORT)
def test_memory_that_ran_out_is_a_sentence_whoever_says_it(who, tmp_path, monkeypatch, capsys):
    from ahriuwu_cli.training import describe

    error = raised(SHORT[who])
    monkeypatch.setattr(describe, "describe_sizes", lambda: fail(error))
    with pytest.raises(SystemExit) as stop:
        cli.main(["info"])
    assert stop.value.code == 1
    of_threads = "thread" in who or who == "an engine"
    said = "there is not enough memory for this: ask for something smaller, or make memory free"
    said = "no thread more could be started: raise the limit (`ulimit -u`), or make memory free" if of_threads else said
    assert capsys.readouterr().err == f"error: {said}\n"

    run = RunFolder(tmp_path / "run", {"kind": "dynamics", "config": {}, "facts": {}}, "train", 2, ())
    run.begin(False, print)
    run.save_state(3, {"a": torch.zeros(1)}, {"step": 3, "total": 9})
    told = "ulimit -u" if of_threads else "a larger --accumulate"
    with pytest.raises(TrainingError, match=f"{told}.* the last good state is .*3, go on with: train"), run.training():
        fail(error)


def test_a_process_that_cannot_be_started_is_a_sentence(tmp_path, monkeypatch, capsys):
    error = OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: fail(error))
    with pytest.raises(SystemExit) as stop:
        cli.main(["record", "doom:basic", "--out", str(tmp_path / "d"), "--episodes", "1"])
    assert stop.value.code == 1
    said = "no process more could be started: raise the limit (`ulimit -u`), or end others"
    assert capsys.readouterr().err == f"error: {said}\n"
    small_dataset(tmp_path / "small")
    store = EpisodeStore.open(tmp_path / "small")
    with pytest.raises(BlockingIOError):
        open_pack(store, fit_linear_tokenizer(store, patch=(8, 8), latent_dim=4, whitening=0.5), workers=2)


def test_other_errors_are_not_of_memory():
    for error in (
        RuntimeError("shapes differ"),
        ImportError("no such module"),
        OSError(errno.ENOENT, "no"),
        ValueError("out of memory"),
    ):
        assert not memory.ran_out(error)


def test_a_limit_of_memory_ends_a_command_in_a_sentence(tmp_path):
    small_place(tmp_path, {})
    words = "train dynamics data --tokenizer world/tokenizer --steps 1 --out run --size xlarge --preview-windows 2"
    line = f"ulimit -v 2000000; {sys.executable} -m ahriuwu_cli {words}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: there is not enough memory for this: ask for a smaller --si")


LIMITED = """
import resource, sys, av
from ahriuwu_cli import cli
near = sys.argv.pop() == "near"
def again(*_, **__):
    if near:
        lines = open("/proc/self/status").readlines()
        peak = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmPeak"))
        resource.setrlimit(resource.RLIMIT_AS, (peak + (1 << 26), resource.RLIM_INFINITY))
    raise av.error.BlockingIOError(11, "Resource temporarily unavailable")
av.open = again
cli.main()
"""


@pytest.mark.parametrize("near", [True, False])
def test_a_video_is_not_called_damaged_for_want_of_memory(tmp_path, near):
    (tmp_path / "v").mkdir()
    write_mp4(tmp_path / "v" / "a.mp4", np.zeros((4, 16, 16, 3), np.uint8), 10)
    words = ["import", tmp_path / "v", "--out", tmp_path / "out", "--size", "16", "near" if near else "far"]
    done = subprocess.run([sys.executable, "-c", LIMITED, *map(str, words)], capture_output=True, text=True)
    if near:
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert done.stderr.startswith("error: there is not enough memory for this: ask for a smaller --size")
    else:
        assert done.returncode == 3, done.stderr
        assert "a.mp4 cannot be read as video (Resource temporarily unavailable)" in done.stderr


def test_whatever_fails_near_the_limit_of_memory_is_of_that(monkeypatch, capsys):
    from ahriuwu_cli.training import describe

    monkeypatch.setattr(describe, "describe_sizes", lambda: fail(ValueError("quantization error")))
    for near, code, said in ((True, 1, "there is not enough memory"), (False, 70, "internal error: ValueError")):
        monkeypatch.setattr(memory, "at_limit", lambda near=near: near)
        with pytest.raises(SystemExit) as stop:
            cli.main(["info"])
        assert stop.value.code == code
        assert capsys.readouterr().err.startswith(f"error: {said}")


NEAR = """
import mmap, resource
from ahriuwu_cli import memory
print(memory.at_limit())
resource.setrlimit(resource.RLIMIT_AS, (1 << 31, resource.RLIM_INFINITY))
print(memory.at_limit())
mmap.mmap(-1, (1 << 31) - (1 << 28)).close()
print(memory.at_limit())
"""


def test_a_process_is_near_its_limit_of_memory_by_what_it_had_at_most():
    assert subprocess.run([sys.executable, "-c", NEAR], capture_output=True).stdout.split() == [
        b"False",
        b"False",
        b"True",
    ]


def test_patches_whose_covariance_cannot_be_held_are_refused_before_a_frame_is_read(tmp_path, monkeypatch):
    store = small_dataset(tmp_path / "data")
    monkeypatch.setattr(store, "frames", lambda *_: fail(AssertionError("read")))
    monkeypatch.setattr(memory, "most", lambda: 20_000_000)
    with pytest.raises(UserError, match=r"16x16, 768 values, takes 0.02359 GB, and there are 0.02: choose a smaller"):
        fit_linear_tokenizer(store, (16, 16), 3, 0.5)
    with pytest.raises(AssertionError, match="read"):
        fit_linear_tokenizer(store, (8, 8), 3, 0.5)


def test_the_memory_that_there_is_at_most_is_that_of_the_strictest_limit():
    code = "from ahriuwu_cli import memory; print(memory.most())"
    done = subprocess.run(["bash", "-c", f"ulimit -v 500000; {sys.executable} -c '{code}'"], capture_output=True)
    assert int(done.stdout) == 500000 * 1024
