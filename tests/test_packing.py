"""Making packs: the same bytes however they were made, whoever was killed on the way, and whatever the disk did."""

import errno
import fcntl
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from small import small_dataset
from typer.testing import CliRunner

from ahriuwu_cli.cli import app
from ahriuwu_cli.data import pack_encode, pack_format, pack_journal, packing
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.latents import open_pack
from ahriuwu_cli.data.pack_check import check_packs
from ahriuwu_cli.errors import CheckpointError, DataError, DiskError
from ahriuwu_cli.models.transformer_tokenizer import TransformerTokenizer, TransformerTokenizerConfig
from ahriuwu_cli.training.assemble import fit_linear_tokenizer
from ahriuwu_cli.training.checkpoint import save_tokenizer

PART = 8
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(pack_format, "PART", PART)
    return small_dataset(tmp_path / "data", episodes=10, frames=36)


@pytest.fixture
def tokenizer(store):
    return fit_linear_tokenizer(store, (8, 8), 6, 0.5)


@pytest.fixture
def whole(store, tokenizer, tmp_path):
    """The bytes of a pack that was made in one go."""
    path = open_pack(store, tokenizer, workers=1).path
    data = path.read_bytes()
    path.unlink()
    return data


def _stopped(store, tokenizer, after):
    """A packer in this process, interrupted after some parts."""
    parts = iter(range(after))

    def progress(done, total):
        if next(parts, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_pack(store, tokenizer, progress=progress, workers=1)


def _hidden(store, kind):
    found = list((store.path / "latents").glob(f".*.{kind}"))
    assert len(found) <= 1
    return found[0] if found else None


def _pack(store):
    (path,) = (store.path / "latents").glob("*.safetensors")
    return path


def _packer(store, folder, workers, pause, *more):
    command = [
        sys.executable,
        str(ROOT / "tests/packer.py"),
        *map(str, (store.path, folder, workers, PART, pause, *more)),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def _wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def _noted(store):
    journal = _hidden(store, "journal")
    return len(journal.read_bytes().splitlines()) - 1 if journal else 0


def _lock_is_free(store):
    with open(_hidden(store, "lock"), "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_the_bytes_are_the_same_for_one_worker_and_for_two(store, tokenizer, whole, tmp_path):
    assert open_pack(store, tokenizer, workers=2).path.read_bytes() == whole
    torch.manual_seed(0)
    architecture = TransformerTokenizerConfig(height=16, width=16, model_width=32, heads=2, kv_heads=2, window=3)
    looking_back = TransformerTokenizer(architecture).eval()
    first = open_pack(store, looking_back, workers=1).path
    data = first.read_bytes()
    first.unlink()
    assert open_pack(store, looking_back, workers=2).path.read_bytes() == data


def test_processes_are_started_only_when_the_rest_takes_longer_than_starting_them(store, tokenizer, monkeypatch):
    monkeypatch.setattr(pack_encode, "_cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    started = []

    class Noted:
        def __init__(self, count, *args):
            started.append(count)
            raise KeyboardInterrupt

    monkeypatch.setattr("ahriuwu_cli.data.pack_worker.Workers", Noted)
    pack = open_pack(store, tokenizer)  # a moment's work
    assert not started
    pack.path.unlink()
    seconds = iter(range(1000))
    monkeypatch.setattr(pack_encode.time, "perf_counter", lambda: float(next(seconds)))  # one second a part
    with pytest.raises(KeyboardInterrupt):
        open_pack(store, tokenizer)
    assert started == [4]


def test_a_packer_killed_at_any_moment_goes_on_to_the_identical_file(store, tokenizer, whole, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "tokenizer", {})
    rng, before = random.Random(0), 0
    for workers in (1, 2, 1):
        process = _packer(store, tmp_path / "tokenizer", workers, 0.01)
        _wait_for(lambda: _noted(store) > before)  # noqa: B023
        time.sleep(rng.uniform(0, 0.15))
        os.kill(process.pid, signal.SIGKILL)  # that one alone: its workers must find out for themselves
        process.communicate()
        _wait_for(lambda: _lock_is_free(store), 10)
        assert not list((store.path / "latents").glob("train*"))
        assert _noted(store) > before
        before = _noted(store)
    said = []
    assert before < len(list(pack_format.parts_of(pack_format.new_facts(store, "0" * 64, "train"))))
    path = open_pack(store, tokenizer, announce=said.append).path
    assert path.read_bytes() == whole
    assert said[0].endswith("parts are there")
    assert not said[0].endswith(": 0 of 40 parts are there")
    assert [p.name for p in path.parent.iterdir() if p.suffix != ".lock"] == [path.name]


def test_ctrl_c_and_a_killed_worker_leave_no_process_behind(store, tokenizer, whole, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "tokenizer", {})
    process = _packer(store, tmp_path / "tokenizer", 2, 0.05)
    _wait_for(lambda: _noted(store) > 0)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert _lock_is_free(store)  # the workers hold it too, as long as they live

    process = _packer(store, tmp_path / "tokenizer", 2, 0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    noted = _noted(store)
    _wait_for(lambda: _noted(store) > noted)
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "was ended by signal 9" in said
    assert _lock_is_free(store)
    assert open_pack(store, tokenizer).path.read_bytes() == whole


def test_a_pack_is_on_the_disk_before_it_has_its_name_and_its_name_after(store, tokenizer, flushed):
    name = open_pack(store, tokenizer, workers=1).path.name
    assert flushed[-3:] == [f"sync .{name}.partial", f".{name}.partial -> {name}", "sync latents"]


def test_a_second_packer_waits_and_uses_what_the_first_one_made(store, tokenizer, whole, tmp_path, monkeypatch):
    save_tokenizer(tokenizer, tmp_path / "tokenizer", {})
    processes = [_packer(store, tmp_path / "tokenizer", 1, 0.02) for _ in range(2)]
    _wait_for(lambda: _noted(store) > 0)
    monkeypatch.setattr(packing, "encode_parts", None)  # a third one here: must not encode
    said = []
    path = open_pack(store, tokenizer, announce=said.append).path
    assert said == [f"another process is packing {path}: waiting for it"]
    assert path.read_bytes() == whole
    answers = [p.communicate(timeout=30)[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    assert sum("waiting for it" in answer for answer in answers) == 1


def test_a_torn_journal_is_believed_up_to_its_tear(store, tokenizer, whole):
    _stopped(store, tokenizer, 20)
    journal = _hidden(store, "journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:10]) + lines[10][:30])
    said = []
    assert open_pack(store, tokenizer, announce=said.append).path.read_bytes() == whole
    assert "9 of 40 parts" in said[0]
    assert len(said) == 1


def test_a_packer_that_is_stopped_twice_loses_nothing_of_what_the_first_had_finished(store, tokenizer, whole):
    _stopped(store, tokenizer, 20)
    first = set(_hidden(store, "journal").read_bytes().splitlines())
    _stopped(store, tokenizer, 25)
    second = _hidden(store, "journal").read_bytes().splitlines()
    assert first < set(second)
    said = []
    assert open_pack(store, tokenizer, announce=said.append).path.read_bytes() == whole
    assert f"{len(second) - 1} of 40 parts" in said[0]


def test_rows_that_do_not_match_the_journal_are_encoded_again_and_said(store, tokenizer, whole):
    _stopped(store, tokenizer, 20)
    partial = _hidden(store, "partial")
    data = bytearray(partial.read_bytes())
    data[-(36 * 8 * 6 * 8) - 2000] ^= 1  # an action row lies near the end; this is a latent row or none that is noted
    for at in (len(data) // 4, len(data) // 4 + 1):
        data[at] ^= 1
    partial.write_bytes(data)
    said = []
    assert open_pack(store, tokenizer, announce=said.append).path.read_bytes() == whole
    assert "parts do not have the hash that was noted" in said[1]


@pytest.mark.parametrize("damage", ["tokenizer", "dataset", "size", "journal", "nesting"])
def test_a_partial_pack_of_something_else_is_begun_anew(store, tokenizer, whole, damage):
    _stopped(store, tokenizer, 20)
    journal, partial = _hidden(store, "journal"), _hidden(store, "partial")
    lines = journal.read_text().splitlines(keepends=True)
    if damage in ("tokenizer", "dataset"):
        lines[0] = json.dumps(json.loads(lines[0]) | {damage: "1" * 64}) + "\n"
    elif damage == "nesting":
        lines[0] = "[" * 100_000 + "\n"
    elif damage == "size":
        partial.write_bytes(partial.read_bytes()[:-1])
    if damage == "journal":
        journal.unlink()
    else:
        journal.write_text("".join(lines))
    said = []
    assert open_pack(store, tokenizer, announce=said.append).path.read_bytes() == whole
    assert len(said) == 1
    assert {
        "size": f"{partial} does not have the size that it should have: beginning anew",
        "journal": f"nothing says what is finished in {partial}: beginning anew",
    }.get(damage, f"what {partial} holds is for other data or another tokenizer: beginning anew") == said[0]


def test_a_journal_with_strange_lines_is_read_for_what_is_sound_in_it(tmp_path):
    good, purpose = {"part": 3, "sha256": "a" * 64}, {"split": "train"}
    strange = [
        b"",
        b"[]",
        b"1",
        b'{"part": true, "sha256": "' + b"a" * 64 + b'"}',
        b"\xff",
        b'{"part": 1, "sha256": "a"}',
        b'{"part": 2, "sha256": "' + b"a" * 63,
    ]
    first = json.dumps({"format": pack_journal.FORMAT, **purpose}).encode()
    (tmp_path / "j").write_bytes(b"\n".join([first, *strange, json.dumps(good).encode()]))
    assert pack_journal.read_journal(tmp_path / "j", purpose) == {3: "a" * 64}
    assert pack_journal.read_journal(tmp_path / "j", {"split": "val"}) is None
    (tmp_path / "j").write_bytes(b"\n".join([first, *strange[:3] * 700_000, json.dumps(good).encode()]))
    begun = time.process_time()
    assert pack_journal.read_journal(tmp_path / "j", purpose) == {3: "a" * 64}
    assert time.process_time() - begun < 1  # 0.02; it was 8 where each line was parsed


def test_a_disk_that_fills_up_stops_with_a_sentence_and_what_was_finished_stays(store, tokenizer, whole, monkeypatch):
    write, calls = os.pwrite, iter(range(30))

    def full(descriptor, data, offset):
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DiskError, match=r"no room for .* make room and run the same command again"):
        open_pack(store, tokenizer, workers=1)
    monkeypatch.setattr(os, "pwrite", write)
    assert not list((store.path / "latents").glob("train*"))
    assert _noted(store) == 15
    assert open_pack(store, tokenizer).path.read_bytes() == whole


def test_a_disk_that_fills_up_before_the_first_part_is_noted_is_left_empty(store, tokenizer, whole, monkeypatch):
    write = pack_journal.write_all
    for full in range(2):  # the journal's first line, the line of the first part
        calls = iter(range(full))

        def no_room(descriptor, data, offset=None, calls=calls):
            if offset is None and next(calls, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, data, offset)

        monkeypatch.setattr(pack_journal, "write_all", no_room)
        with pytest.raises(DiskError, match="no room for"):
            open_pack(store, tokenizer, workers=1)
        assert {p.suffix for p in (store.path / "latents").iterdir()} == {".lock"}
    monkeypatch.setattr(pack_journal, "write_all", write)
    said = []
    assert open_pack(store, tokenizer, announce=said.append).path.read_bytes() == whole
    assert said == []


def test_no_room_for_temporary_files_is_not_said_of_the_dataset(store, tokenizer, whole, monkeypatch):
    temporary = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(DiskError, match=r"no temporary file of 0\.\d MB .*No space left.*or set TMPDIR to another"):
        open_pack(store, tokenizer, workers=2)
    assert {p.suffix for p in (store.path / "latents").iterdir()} == {".lock"}
    monkeypatch.setattr(tempfile, "TemporaryFile", temporary)
    assert open_pack(store, tokenizer, workers=2).path.read_bytes() == whole


@pytest.mark.parametrize("workers", [1, 2])
def test_a_pack_that_cannot_have_its_room_is_refused_before_the_first_frame(store, tokenizer, tmp_path, workers):
    save_tokenizer(tokenizer, tmp_path / "tokenizer", {})
    process = _packer(store, tmp_path / "tokenizer", workers, 0, 4096)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.startswith("no room for")
    assert "Traceback" not in said
    assert not _hidden(store, "partial")


def test_a_folder_that_cannot_be_written_is_a_sentence(store, tokenizer, monkeypatch):
    (store.path / "latents").write_text("a file, where the folder should be")
    with pytest.raises(DataError, match="is no folder: remove it"):
        open_pack(store, tokenizer)
    (store.path / "latents").unlink()

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)  # who runs the tests may be root, whom no mode keeps out
    with pytest.raises(DataError, match=r"cannot write .*make it writable"):
        open_pack(store, tokenizer)


def test_a_disk_without_locks_is_said_and_packed_without_a_trace(store, tokenizer, whole, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    said = []
    path = open_pack(store, tokenizer, announce=said.append).path
    assert "has no file locks" in said[0]
    assert path.read_bytes() == whole
    path.unlink()
    _stopped(store, tokenizer, 20)
    assert not [p for p in path.parent.iterdir() if p.suffix != ".lock"]


@pytest.mark.parametrize(
    ("stopped", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.EIO, "fails"), DiskError)]
)
def test_a_journal_that_outlived_its_partial_pack_is_named_by_info_and_removed_by_the_next_opening(
    store, tokenizer, monkeypatch, stopped, raised
):
    def stop(*_):
        raise stopped

    with monkeypatch.context() as patch:
        patch.setattr(packing, "sync", stop)  # the pack has its name by then
        with pytest.raises(raised):
            open_pack(store, tokenizer)
    left = [_hidden(store, "journal")]
    left += [
        left[0].with_name(f"{left[0].name}.new"),
        left[0].with_name(left[0].name.replace("journal", "host-7.journal")),
    ]
    for path in left[1:]:
        path.touch()
    _, packs = check_packs(store)
    assert not packs.ok
    assert all(f"{path} is left of a killed packer: delete it" in packs.detail for path in left)
    monkeypatch.setattr(packing, "encode_parts", None)
    with pack_journal.locked(_pack(store), print):  # somebody is at work
        open_pack(store, tokenizer)
        assert all(path.exists() for path in left)
    open_pack(store, tokenizer)
    assert {p.name for p in (store.path / "latents").iterdir()} == {_pack(store).name, _hidden(store, "lock").name}
    assert len(check_packs(store)) == 1


def test_what_was_packed_of_something_else_and_what_lies_behind_a_link_is_left(store, tokenizer, tmp_path):
    path = open_pack(store, tokenizer).path
    unfinished = {path.with_name(f".{path.name}.{kind}") for kind in ("partial", "journal", "journal.new")}
    for name in unfinished:
        name.touch()
    open_pack(store, tokenizer)
    assert unfinished < set(path.parent.iterdir())
    path.with_name(f".{path.name}.partial").unlink()
    path.parent.rename(tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")
    open_pack(store, tokenizer)
    assert len(list((tmp_path / "elsewhere").glob(".*journal*"))) == 2


@pytest.mark.parametrize("which", [0, 3])
def test_an_episode_that_changed_since_it_was_recorded_is_not_packed(store, tokenizer, which):
    file = store.file(store.episodes("train")[which].id)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=f"{file.name} is not what was recorded"):
        open_pack(EpisodeStore.open(store.path), tokenizer)
    left = [path for path in (store.path / "latents").iterdir() if "partial" in path.name]
    assert bool(left) == (which > 0)  # where nothing was finished, the room that was reserved is given back


@pytest.mark.parametrize("workers", [1, 2])
def test_a_tokenizer_whose_latents_float16_does_not_hold_is_named_and_no_pack_is_left(store, tokenizer, workers):
    tokenizer.scale[:] = 1e-6
    with pytest.raises(CheckpointError, match="the tokenizer gives latents that do not fit float16"):
        open_pack(store, tokenizer, workers=workers)
    assert {p.suffix for p in (store.path / "latents").iterdir()} == {".lock"}


def test_safetensors_reads_a_pack_and_hashlib_its_hashes(store, tokenizer):
    path = open_pack(store, tokenizer).path
    with safe_open(path, framework="np") as file:
        facts = json.loads(file.metadata()["ahriuwu"])
        latents, actions = file.get_tensor("latents"), file.get_tensor("actions")
    row = 0
    for entry, episode in zip(facts["episodes"], store.episodes("train"), strict=True):
        assert entry["source"] == hashlib.sha256(store.file(episode.id).read_bytes()).hexdigest()
        for i, digest in enumerate(entry["parts"]):
            rows = slice(row + i * PART, row + min(i * PART + PART, episode.frames))
            assert hashlib.sha256(latents[rows].tobytes() + actions[rows].tobytes()).hexdigest() == digest
        row += episode.frames
    assert row == len(latents)


def test_one_flipped_bit_is_found_when_a_pack_is_opened_and_named_by_info(store, tokenizer):
    path = open_pack(store, tokenizer).path
    assert check_packs(store)[0].ok
    sound = path.read_bytes()
    begin = 8 + int.from_bytes(sound[:8], "little")
    rng = np.random.default_rng(0)
    for at in [begin, len(sound) - 1, *rng.integers(begin, len(sound), 8).tolist()]:
        data = bytearray(sound)
        data[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"is damaged at episode 0000\d\d, frames \d+..\d+ .*delete it"):
            open_pack(store, tokenizer)
        assert not check_packs(store)[0].ok
    shown = CliRunner().invoke(app, ["info", str(store.path), "--check"])
    assert shown.exit_code == 1
    assert "FAIL  latent packs match their hashes" in shown.output
    path.write_bytes(sound)
    assert open_pack(store, tokenizer).ids
    assert CliRunner().invoke(app, ["info", str(store.path), "--check"]).exit_code == 0


def test_a_large_pack_is_checked_by_another_sample_every_time(store, tokenizer, monkeypatch):
    path = open_pack(store, tokenizer).path
    monkeypatch.setattr("ahriuwu_cli.data.pack_check.OPENING", path.stat().st_size // 4)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    outcomes = set()
    for _ in range(60):
        try:
            open_pack(store, tokenizer)
            outcomes.add("passed")
        except DataError:
            outcomes.add("found")
    assert outcomes == {"passed", "found"}


def _edited(facts, **changes):
    return facts | changes


def _episode(facts, **changes):
    return facts | {"episodes": [facts["episodes"][0] | changes, *facts["episodes"][1:]]}


@pytest.mark.parametrize(
    "edit",
    [
        lambda f: _edited(f, extra=1),
        lambda f: {k: f[k] for k in f if k != "split"},
        lambda f: _edited(f, episodes=[]),
        lambda f: _edited(f, episodes={}),
        lambda f: _edited(f, episodes=[1]),
        lambda f: _edited(f, split="everything"),
        lambda f: _edited(f, dataset=["x"]),
        lambda f: _episode(f, frames=35),
        lambda f: _episode(f, frames=-36),
        lambda f: _episode(f, frames=True),
        lambda f: _episode(f, frames=10**30),
        lambda f: _episode(f, labelled=1),
        lambda f: _episode(f, labelled=False),
        lambda f: _episode(f, source="no hash"),
        lambda f: _episode(f, source="0" * 64),
        lambda f: _episode(f, parts=[]),
        lambda f: _episode(f, parts=[None] * 5),
        lambda f: _episode(f, id=f["episodes"][1]["id"]),
        lambda f: [f],
        lambda f: "text",
    ],
)
def test_a_header_that_is_not_exactly_a_packs_is_refused_with_a_sentence(store, tokenizer, edit):
    path = open_pack(store, tokenizer).path
    facts, layout = pack_format.read_pack_header(path)
    data = path.read_bytes()[layout.offsets["latents"] :]
    path.write_bytes(pack_format.pack_header(path, layout.shapes, edit(facts)) + data)
    with pytest.raises(DataError, match="delete it"):
        open_pack(store, tokenizer)


@pytest.mark.parametrize("shapes", [
    lambda s: {"latents": ("F32", s["latents"][1]), "actions": s["actions"]},
    lambda s: {"latents": ("F16", (s["latents"][1][0], 24)), "actions": s["actions"]},
    lambda s: {"latents": ("F16", (s["latents"][1][0], 3, 8)), "actions": s["actions"]},
    lambda s: {"latents": s["latents"]},
    lambda s: s | {"more": ("F16", (1,))},
])  # fmt: skip
def test_tensors_of_another_form_are_refused(store, tokenizer, shapes):
    path = open_pack(store, tokenizer).path
    facts, layout = pack_format.read_pack_header(path)
    pack_format.write_header(path, shapes(layout.shapes), facts)
    with pytest.raises(DataError, match="delete it"):
        open_pack(store, tokenizer)


def test_a_pack_of_latents_without_numbers_is_named_though_its_hashes_fit(store, tokenizer):
    path = open_pack(store, tokenizer).path
    facts, layout = pack_format.read_pack_header(path)
    shapes = layout.shapes | {"latents": ("F16", (layout.shapes["latents"][1][0], 0, 8))}
    for part in pack_format.parts_of(facts):
        rows = bytes((part.stop - part.start) * layout.row_bytes["actions"])
        parts = next(e["parts"] for e in facts["episodes"] if e["id"] == part.episode)
        parts[part.start // pack_format.PART] = hashlib.sha256(rows).hexdigest()
    pack_format.write_header(path, shapes, facts)
    assert "its latents have no numbers" in check_packs(store)[0].detail


def test_a_pack_of_other_data_or_of_an_earlier_version_is_made_again_and_said(store, tokenizer, whole):
    path = open_pack(store, tokenizer).path
    facts, layout = pack_format.read_pack_header(path)
    for change, sentence in (({"dataset": "0" * 64}, "other data"), ({"format": "ahriuwu-latents/1"}, "latents/1")):
        rows = path.read_bytes()[layout.offsets["latents"] :]
        path.write_bytes(pack_format.pack_header(path, layout.shapes, facts | change) + rows)
        said = []
        assert check_packs(store)[-1].warning
        assert open_pack(store, tokenizer, announce=said.append).path.read_bytes() == whole
        assert len(said) == 1
        assert sentence in said[0]
