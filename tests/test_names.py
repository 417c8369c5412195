"""Names that are no UTF-8: refused on the command line, written as text elsewhere, so all output can be read again."""

import ast
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small import small_dataset, small_world

import ahriuwu_cli
from ahriuwu_cli.data.documents import as_text, parse_json, read_object, to_json
from ahriuwu_cli.data.episode_writer import EpisodeWriter
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.video_writing import write_mp4
from ahriuwu_cli.errors import DataError
from ahriuwu_cli.training import restart
from ahriuwu_cli.training.checkpoint import save_world

PACKAGE = Path(ahriuwu_cli.__file__).parent
LATIN = os.fsdecode(b"d\xe9")  # a name from a system in Latin-1
NO_FILES = {"typer.echo", "hashlib.sha256", "json.loads"}  # what may be given JSON of another make
BY_THEMSELVES = {  # functions that make it for more, and why they may
    "data/pack_journal.py __init__": "lines, read back by `read_journal`; one that is torn is made anew",
    "data/pack_journal.py add": "likewise: a number and a hash",
    "data/pack_worker.py _tell": "a line to a process of ours",
    "data/pack_worker.py answer": "a line from it",
    "data/pack_format.py pack_header": "metadata in a header, whose length must not change",
    "data/tensors.py make_header": "the header of a safetensors file, read with its own limits",
    "training/state.py _in_order": "a header that was just read, in another order",
    "evaluation/page_style.py as_json": "text on a page, for people",
}


@pytest.fixture
def latin(tmp_path, monkeypatch):
    """The current folder has a name that is no UTF-8."""
    folder = tmp_path / LATIN
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ("train", "dynamics", "data", "--out", f"{LATIN}-run"), ("train", "dynamics", f"{LATIN}-data", "--out", "run"),
        ("info", LATIN), ("import", "videos", f"--out={LATIN}"), ("eval", "plan", LATIN, "--out", "x"),
    ],
)  # fmt: skip
def test_a_word_that_is_no_text_is_refused_before_anything_is_read_or_written(tmp_path, monkeypatch, run, command):
    monkeypatch.chdir(tmp_path)
    code, out, said = run(*command)
    assert (code, out, said.count("\n")) == (2, "", 1)
    assert r"d\udce9" in said.replace("\\\\", "\\")
    assert said.endswith("is not text in utf-8, so no result could name it: rename it\n")
    assert list(tmp_path.iterdir()) == []


def test_where_names_are_read_as_ascii_the_remedy_is_another_setting(tmp_path):
    setting = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-m", "ahriuwu_cli", "info", "ünï 漢".encode()]
    for more, code, remedy in (({}, 2, b"PYTHONUTF8=1\n"), ({"PYTHONUTF8": "1"}, 3, b"")):
        done = subprocess.run(command, env=os.environ | setting | more, cwd=tmp_path, capture_output=True, check=False)
        assert (done.returncode == 2) == (code == 2), done.stderr
        assert done.stderr.count(b"\n") == 1
        assert done.stderr.endswith(remedy)


def test_an_import_from_folders_and_files_with_such_names_can_be_read_again(latin, run):
    (latin / "films").mkdir()
    write_mp4(latin / "films" / os.fsdecode(b"v\xff.mp4"), np.zeros((4, 16, 16, 3), np.uint8), 10)
    os.chdir(latin / "films")
    assert run("import", ".", "--out", "../data", "--size", "16")[0] == 0
    store = EpisodeStore.open(latin / "data")
    assert [e.source for e in store.episodes()] == [r"v\xff.mp4"]
    assert read_object(latin / "data" / "dataset.json")["source"]["folder"] == "films"
    os.chdir(latin)
    with EpisodeWriter(Path(LATIN), height=16, width=16, fps=10, action_space=store.action_space) as writer:
        writer.add(np.zeros((2, 16, 16, 3), np.uint8), None)
    assert EpisodeStore.open(Path(LATIN)).name == r"d\xe9"


def test_what_is_made_in_such_a_folder_can_be_read_again(latin, run):
    small_dataset(Path("data"))
    save_world(small_world(), Path("world"))
    assert run("train", "tokenizer", "data", "--out", "tok", "--patch", "8", "--latent-dim", "6")[0] == 0
    assert run("export", "world", "--out", "shipped")[0] == 0
    settings = ("--windows", "2", "--context", "2", "--horizon", "2", "--looks", "none", "--device", "cpu")
    assert run("eval", "shipped", "data", "--out", "scores", *settings)[0] == 0
    for path in latin.rglob("*.json"):
        read_object(path)


def test_the_command_that_goes_on_is_text_whatever_the_interpreter_is_called(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "train", "dynamics", "data"])
    monkeypatch.setattr(sys, "orig_argv", [f"/opt/{LATIN}/python", "-m", "ahriuwu_cli", "train", "dynamics", "data"])
    assert restart.command_line() == r"$'/opt/d\xe9/python' -m ahriuwu_cli train dynamics data"
    assert parse_json(to_json(restart.command_line())) == restart.command_line()


def test_as_text_keeps_what_is_utf8_and_escapes_the_rest():
    assert as_text("ünï 漢") == "ünï 漢"
    assert as_text(Path(LATIN) / "ü") == r"d\xe9/ü"


@pytest.mark.parametrize("value", [LATIN, {LATIN: 0}, [float("nan")], 2**64, -(2**63) - 1, float("inf"), "x" * 10**7])
def test_the_writer_refuses_what_the_reader_would_refuse(value):
    with pytest.raises(ValueError, match=r"surrogate|compliant|64 bits|MB"):
        to_json(value)


def test_the_writer_refuses_what_is_nested_too_deep():
    value = 0
    for _ in range(65):
        value = [value]
    with pytest.raises(ValueError, match="nested"):
        to_json(value)
    assert parse_json(to_json(value[0])) == value[0]


def test_a_dataset_whose_page_could_not_be_read_again_is_not_made(tmp_path):
    store = small_dataset(tmp_path / "data", episodes=1)
    with pytest.raises(DataError, match=r"no dataset\.json can be written \(it holds half of a surrogate pair"):  # noqa: SIM117
        with EpisodeWriter(tmp_path / "bad", height=16, width=16, fps=10, action_space=store.action_space) as writer:
            writer.add(np.zeros((2, 16, 16, 3), np.uint8), None, LATIN)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def _makes_json_by_itself(tree: ast.AST) -> set[str]:
    """Functions ("" outside of one) that use json's own writers for more than the terminal, a hash or a copy."""
    parent = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}

    def above(node: ast.AST) -> list[ast.AST]:
        return [node, *above(parent[node])] if node in parent else [node]

    found = set()
    for node in ast.walk(tree):
        names = {getattr(node, "attr", None), getattr(node, "id", None)}
        if isinstance(node, ast.ImportFrom) and node.module == "json":
            names |= {alias.name for alias in node.names}
        if names & {"dump", "dumps", "JSONEncoder"}:
            line = above(node)
            takers = [up for at, up in itertools.pairwise(line) if isinstance(up, ast.Call) and at in up.args]
            taker = next(iter(takers), None)
            if taker is None or ast.unparse(taker.func) not in NO_FILES or taker.keywords:
                found.add(next((up.name for up in line if isinstance(up, ast.FunctionDef)), ""))
    return found


@pytest.mark.parametrize(
    "line",
    [
        "write_whole(path, json.dumps(x) + '\\n')", "json.dump(x, file)", "text = json.dumps(x)\npath.write_text(text)",
        "from json import dumps\nwrite_whole(p, dumps(x))", "print(json.dumps(x), file=f)", "write = json.dumps",
        "typer.echo(json.dumps(x), file=f)", "from json import dumps as text", "json.JSONEncoder().encode(x)",
        "typer.echo(write_whole(p, json.dumps(x)))", "os.write(f, json.dumps(x).encode())",
    ],
)  # fmt: skip
def test_every_other_way_to_write_json_would_be_found(line):
    assert _makes_json_by_itself(ast.parse(line)) == {""}
    assert _makes_json_by_itself(ast.parse("typer.echo(json.dumps(x) if as_json else y)")) == set()
    assert _makes_json_by_itself(ast.parse("hashlib.sha256(json.dumps(x).encode()).hexdigest()")) == set()


def test_no_json_is_written_but_by_the_writer_that_the_reader_checks():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        file = path.relative_to(PACKAGE).as_posix()
        found |= {f"{file} {name}" for name in _makes_json_by_itself(ast.parse(path.read_text()))}
    assert found - {"data/documents.py to_json"} == set(BY_THEMSELVES)


def test_what_was_written_before_is_written_the_same():
    value = {"a": [1, 2.5, None, "ü"], "b": {"c": True}}
    assert to_json(value) == json.dumps(value)
    assert to_json(value, 1) == json.dumps(value, indent=1)
