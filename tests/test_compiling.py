"""torch's cache of compiled code: what a killed compiler left half-written goes before it can do harm."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ahriuwu_cli.errors import UserError
from ahriuwu_cli.models import compiling
from ahriuwu_cli.models.compiling import check_compile, cut_short, remove_if

LIBRARY = next(Path(torch.__file__).parent.glob("_C*.so")).read_bytes()
TABLE = int.from_bytes(LIBRARY[0x28:0x30], "little")  # of sections; what a linker writes last
COMPILE = "from ahriuwu_cli.models.compiling import check_compile; check_compile('cpu')"
NAME = "cab" + "x" * 49


@pytest.mark.parametrize("kept", [0, 1, 63, 64, 1000, TABLE, TABLE + 100, len(LIBRARY)])
def test_a_library_that_is_cut_short_is_known_by_its_own_table(tmp_path, kept):
    (tmp_path / "a.so").write_bytes(LIBRARY[:kept])
    assert cut_short(tmp_path / "a.so") == (kept < len(LIBRARY))


def test_a_library_of_zeros_is_cut_short_and_one_of_another_system_is_left_alone(tmp_path):
    (tmp_path / "a.so").write_bytes(bytes(5000))
    (tmp_path / "b.so").write_bytes(b"\xcf\xfa\xed\xfe" + bytes(500))
    assert cut_short(tmp_path / "a.so")
    assert not cut_short(tmp_path / "b.so")


def half(tmp_path) -> tuple[Path, Path]:
    path, locks = tmp_path / "ab" / f"{NAME}.main.so", tmp_path / "locks"
    path.parent.mkdir()
    locks.mkdir()
    path.write_bytes(LIBRARY[:100])
    return path, locks


def test_what_somebody_is_compiling_right_now_stays(tmp_path):
    path, locks = half(tmp_path)
    with open(locks / f"{NAME}.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        remove_if(path, locks, cut_short)
        assert path.exists()
    remove_if(path, locks, cut_short)
    assert not path.exists()


def test_what_was_finished_between_the_look_and_the_lock_stays(tmp_path):
    path, locks = half(tmp_path)

    def look(path: Path) -> bool:
        short = cut_short(path)
        path.write_bytes(LIBRARY)
        return short

    remove_if(path, locks, look)
    assert path.exists()


def test_on_a_disk_without_locks_all_stays(tmp_path, monkeypatch):
    path, locks = half(tmp_path)
    monkeypatch.setattr(compiling, "lock", lambda descriptor: False)
    remove_if(path, locks, cut_short)
    assert path.exists()


def test_only_what_the_compiler_names_is_looked_at_and_what_is_odd_is_left_alone(tmp_path, monkeypatch):
    path, _ = half(tmp_path)
    (tmp_path / "ab" / "mine.so").write_bytes(b"")
    (tmp_path / "cd").mkdir()
    (tmp_path / "cd" / f"{NAME}.so").write_bytes(b"")  # not where the compiler puts it
    (tmp_path / "ab" / f"cab{'y' * 49}.so").mkdir()
    (tmp_path / "ab" / f"cab{'z' * 49}.so").symlink_to("nowhere")
    before = {p for p in tmp_path.rglob("*") if p.suffix == ".so"}
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiling, "_compile_a_little", lambda device: None)
    check_compile("cpu")
    assert before - {p for p in tmp_path.rglob("*") if p.suffix == ".so"} == {path}


@pytest.mark.parametrize(("said", "tries"), [("cannot read PCH file: Success", 2), ("no such function", 1)])
def test_headers_go_where_the_compiler_cannot_read_one(tmp_path, monkeypatch, said, tries):
    from torch._inductor import codecache

    header = tmp_path / "precompiled_headers" / "cabc.h.gch"
    (header.parent / "locks").mkdir(parents=True)
    header.write_bytes(b"half")
    tried = []

    def compile_a_little(device):
        tried.append(1)
        if header.exists():
            raise RuntimeError(said)

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(codecache, "_HEADER_DIR", str(header.parent), raising=False)
    monkeypatch.setattr(compiling, "_compile_a_little", compile_a_little)
    if tries == 1:
        with pytest.raises(UserError, match=r"does not work on this machine \(no such function"):
            check_compile("cpu")
    else:
        check_compile("cpu")
    assert (len(tried), header.exists()) == (tries, tries == 1)


@pytest.mark.slow
def test_half_written_files_of_a_killed_compiler_are_no_reason_to_refuse(tmp_path):
    """The real cache: every library cut, and what headers there are."""
    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"} | {"TMPDIR": str(tmp_path)}

    def compile_a_little() -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)

    assert compile_a_little().returncode == 0
    libraries = sorted(tmp_path.glob("*/??/*.so"))
    assert libraries
    whole = [path.stat().st_size for path in libraries]
    for path in libraries:
        os.truncate(path, 0)
    for path in tmp_path.glob("*/precompiled_headers/*.gch"):
        os.truncate(path, path.stat().st_size // 2)
    ended = compile_a_little()
    assert ended.returncode == 0, ended.stderr
    assert [path.stat().st_size for path in libraries] == whole
