"""torch's cache of compiled code: what a killed compiler left half-written goes before it can do harm."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ahriuwu_cli.models.compiling import _remove, cut_short

LIBRARY = next(Path(torch.__file__).parent.glob("_C*.so")).read_bytes()
TABLE = int.from_bytes(LIBRARY[0x28:0x30], "little")  # of sections; what a linker writes last
COMPILE = "from ahriuwu_cli.models.compiling import check_compile; check_compile('cpu')"


@pytest.mark.parametrize("kept", [0, 1, 63, 64, 1000, TABLE, TABLE + 100, len(LIBRARY)])
def test_a_library_that_is_cut_short_is_known_by_its_own_table(tmp_path, kept):
    (tmp_path / "a.so").write_bytes(LIBRARY[:kept])
    assert cut_short(tmp_path / "a.so") == (kept < len(LIBRARY))


def test_a_library_of_zeros_is_cut_short_and_one_of_another_system_is_left_alone(tmp_path):
    (tmp_path / "a.so").write_bytes(bytes(5000))
    (tmp_path / "b.so").write_bytes(b"\xcf\xfa\xed\xfe" + bytes(500))
    assert cut_short(tmp_path / "a.so")
    assert not cut_short(tmp_path / "b.so")


@pytest.mark.parametrize("name", ["ab/cabc.main.so", "ab/cabc.so", "precompiled_headers/cabc.h.gch"])
def test_what_somebody_is_compiling_right_now_stays(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir()
    path.write_bytes(b"half")
    locks = (path.parent if name.endswith("gch") else tmp_path) / "locks"
    locks.mkdir()
    with open(locks / "cabc.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert not _remove([path])
        assert path.exists()
    assert _remove([path])
    assert not path.exists()


@pytest.mark.slow
def test_half_written_files_of_a_killed_compiler_are_no_reason_to_refuse(tmp_path):
    """The real cache: every library cut, and a header whose half a kill left, which the compiler cannot read."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    def compile_a_little() -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)

    assert compile_a_little().returncode == 0
    libraries = sorted(tmp_path.glob("*/*.so"))
    assert libraries
    whole = [path.stat().st_size for path in libraries]
    for path in libraries:
        os.truncate(path, 0)
    for path in tmp_path.glob("precompiled_headers/*.gch"):
        os.truncate(path, path.stat().st_size // 2)
    ended = compile_a_little()
    assert ended.returncode == 0, ended.stderr
    assert [path.stat().st_size for path in libraries] == whole
