"""Hostile files: nothing is unpickled, sizes are compared before memory is taken, and no text of theirs acts."""

import ast
import contextlib
import csv
import io
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small import small_dataset, small_place, small_world

import ahriuwu_cli
from ahriuwu_cli.cli import main
from ahriuwu_cli.commands import options
from ahriuwu_cli.data import bounded_file, documents, mkv_index, mp4_index, whole_video
from ahriuwu_cli.data.action_component import ActionComponent
from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.describe import as_text as describe_text
from ahriuwu_cli.data.describe import describe
from ahriuwu_cli.data.documents import MAX_DEPTH, parse_object, read_bytes, read_object
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.latents import open_pack
from ahriuwu_cli.data.pack_check import check_packs
from ahriuwu_cli.data.tensors import read_tensors
from ahriuwu_cli.data.video import iter_video, read_video, video_fps
from ahriuwu_cli.data.video_writing import write_gif, write_mp4
from ahriuwu_cli.disk import file_hash
from ahriuwu_cli.errors import CheckpointError, DataError, UserError
from ahriuwu_cli.evaluation.checks import Check, as_table
from ahriuwu_cli.evaluation.merge import read_cells
from ahriuwu_cli.evaluation.report import as_csv, in_markdown, table
from ahriuwu_cli.models.dynamics import Dynamics
from ahriuwu_cli.models.dynamics_config import DynamicsConfig
from ahriuwu_cli.models.linear_tokenizer import LinearTokenizer
from ahriuwu_cli.models.sizes import SIZES
from ahriuwu_cli.models.transformer_tokenizer import TransformerTokenizer, TransformerTokenizerConfig
from ahriuwu_cli.places import check_folder
from ahriuwu_cli.printing import one_line, one_sentence, printable
from ahriuwu_cli.training import checkpoint
from ahriuwu_cli.training.checkpoint import load_tokenizer, load_world, save_world
from ahriuwu_cli.training.describe import as_text, describe_checkpoint
from ahriuwu_cli.training.state import load_state, save_state

PACKAGE = Path(ahriuwu_cli.__file__).parent
SCRIPTS = PACKAGE.parent / "scripts"
CODE = sorted([*PACKAGE.rglob("*.py"), *SCRIPTS.glob("*.py")])
sys.path.insert(0, str(SCRIPTS))
from mutations import sealed  # noqa: E402

PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "pickletools", "yaml"}
BUILT_IN = {"eval", "exec", "__import__"}
CALLS = {
    "importlib.import_module", "runpy.run_path", "os.system", "os.popen",
    "torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.hub.load_state_dict_from_url",
    "torch.package.PackageImporter", "np.fromregex", "np.memmap", "np.load", "numpy.load", "pandas.read_pickle",
}  # fmt: skip


def unsafe(tree: ast.AST) -> list[str]:
    """What in a file's code could run what a file holds."""
    found = []
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{n}" for n in names)]
        found += [n for n in names if n.split(".")[0] in PICKLES or n in CALLS]
        if dotted(node) in CALLS:
            found.append(dotted(node))
        if isinstance(node, ast.Call):
            found += [dotted(node.func)] if dotted(node.func) in BUILT_IN else []
            options = {k.arg: dotted(k.value) or getattr(k.value, "value", None) for k in node.keywords}
            found += [name for name in options if name in ("allow_pickle", "weights_only")]
            found += ["shell"] if options.get("shell") else []
            calls_lpips = dotted(node.func) == "lpips.LPIPS"  # unless told otherwise it unpickles its heads
            if calls_lpips and (options.get("pretrained"), options.get("pnet_rand")) != (False, True):
                found.append("lpips.LPIPS")
    return found


def dotted(node: ast.AST) -> str:
    """A name, or names joined by dots; empty for anything else."""
    if isinstance(node, ast.Attribute) and dotted(node.value):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_nothing_is_unpickled_and_no_text_is_run_in_the_package_and_the_scripts():
    assert len(CODE) > 100
    for path in CODE:
        tree = ast.parse(path.read_text())
        own = path.name == "values.py" and all(  # `listed` imports modules of ours, by names that stand in the code
            isinstance(argument, ast.Constant)
            for other in (PACKAGE / "commands").rglob("*.py") for node in ast.walk(ast.parse(other.read_text()))
            if isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] == "listed" for argument in node.args
        )  # fmt: skip
        assert [name for name in unsafe(tree) if not (own and name == "importlib.import_module")] == [], path


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load(x)", "from torch import load",
        "torch.save(a, b)", "np.load(f)", "np.load(f, allow_pickle=True)", "eval(x)", "exec(x)", "import yaml",
        "subprocess.run(x, shell=True)", "os.system(x)", "importlib.import_module(x)", "read = torch.load",
        "lpips.LPIPS(net='alex', pnet_rand=True)", "import joblib",
    ],
)  # fmt: skip
def test_the_search_for_pickles_finds_each_way_to_read_one(code):
    assert unsafe(ast.parse(code))


def test_json_of_others_is_read_in_one_place():
    ours = {"documents.py", "pack_worker.py"}  # the second one talks through pipes with processes of its own
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and dotted(node.func) in ("json.loads", "json.load"):
                copies = ast.unparse(node.args[0]).startswith("json.dumps(")
                assert copies or path.name in ours, path
            if isinstance(node, ast.Attribute):  # and safetensors without its header checked nowhere
                assert node.attr not in ("load_file", "safe_open"), path


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[1]", "an array, not an object"), (b'"x"', "a text, not an object"), (b"null", "null, not an object"),
        (b'{"a": 1, "a": 2}', "stands twice"), (b'{"b": {"a": 1, "a": 1}}', "stands twice"),
        (b'{"a": NaN}', "a is NaN"), (b'{"a": [-Infinity]}', "-Infinity"), (b'{"a": 1e999}', "beyond 64 bits"),
        (b'{"a": 18446744073709551616}', "more than 64 bits"), (b'{"a": ' + b"9" * 5000 + b"}", "more than 64 bits"),
        (b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), "nested"), (b"[" * 10**5, "nested"),
        (b"\xef\xbb\xbf{}", "byte order mark"), ('{"a": 1}'.encode("utf-16"), "byte order mark"),
        ('{"a": 1}'.encode("utf-16-le"), "Expecting"), (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": "\\ud800"}', "surrogate"), (b'{"a": 0, }', "property name|Illegal"),
        (b'{"\\udfff": 1}', "surrogate"), (b"{} {}", "Extra data"), (b"", "Expecting value"),
        (b"[" + b"0," * 4_000_001 + b"0]", "more than 4000000 values"),
        (b'[{"a":' * 300_001, "more than 600000 arrays and objects"), (b"[" * 600_001, "more than 600000 arrays"),
        (b'{"a": "' + b"\xc3\xa9" * 12_500_000 + b'"}', "larger than 25 MB and not ASCII"),
    ],
)  # fmt: skip
def test_json_that_takes_memory_or_hides_something_is_refused_with_the_reason(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_object(text)


@pytest.mark.parametrize("form", ['"%x":0', '"\\"%x" : 0', '"a":{":%x":":"}', '"%x:":"a"', '"\\\\%x":0'])
def test_keys_are_counted_before_they_are_kept(monkeypatch, form):
    monkeypatch.setattr(documents, "MAX_KEYS", 1000)

    def with_keys(count: int) -> str:
        texts = [f"x: {i}" for i in range(5000)]  # differ, and are no keys
        return "{" + ",".join([form % i for i in range(count)]) + f', "texts": {json.dumps(texts)}}}'

    if '"a":' not in form:
        assert len(parse_object(with_keys(990))) == 991
    with pytest.raises(ValueError, match="more than 1000 different keys"):
        parse_object(with_keys(1001))


def test_rows_that_share_their_keys_may_be_many():
    rows = {"rows": [{f"{i}": 0 for i in range(20)}] * 30_000}
    assert documents.to_json(rows).count(":") > documents.MAX_KEYS


@pytest.mark.parametrize(
    "text", ['"' + '\\"' * 30_000, '"' * 300_000, '["\\u0041",' * 100_000], ids=["open", "quotes", "x"]
)
def test_keys_are_counted_in_one_pass(monkeypatch, text):
    monkeypatch.setattr(documents, "MAX_KEYS", -1)
    tracemalloc.start()
    before = time.process_time()
    documents._check_cost(text)
    assert time.process_time() - before < 2
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_json_of_ours_is_read_as_it_was_written_and_a_pipe_or_a_large_file_is_not_read(tmp_path):
    document = {"name": "\U0001f600 ü \x1b", "n": [1, -2.5, 2**63, None, True, {"a": []}], "": {}}
    for ascii_only in (True, False):
        (tmp_path / "a.json").write_text(json.dumps(document, ensure_ascii=ascii_only))
        assert read_object(tmp_path / "a.json") == document
    with pytest.raises(ValueError, match="larger than"):
        read_object(tmp_path / "a.json", most=20)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(ValueError, match="no regular file"):
            read_object(other)


def test_a_file_that_grows_while_it_is_read_is_read_to_the_limit(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"1")
    about = os.stat(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"1" * 10)
    with monkeypatch.context() as earlier:
        earlier.setattr(os, "stat", lambda path: about)
        assert read_bytes(tmp_path / "a", 10) == b"1" * 10
        with pytest.raises(ValueError, match="larger than"):
            read_bytes(tmp_path / "a", 9)


def test_whole_tensors_are_read_as_safetensors_reads_them(tmp_path):
    kinds = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
             torch.float32, torch.float64, torch.uint16]  # fmt: skip
    tensors = {str(k): (torch.arange(6).reshape(2, 3) % 2).to(k) for k in kinds}
    tensors |= {"none": torch.empty(0, 4), "scalar": torch.tensor(1.5)}
    save_file(tensors, tmp_path / "a.safetensors")
    found, expected = read_tensors(tmp_path / "a.safetensors"), load_file(tmp_path / "a.safetensors")
    assert found.keys() == expected.keys()
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items())
    with pytest.raises(DataError, match="more than"):
        read_tensors(tmp_path / "a.safetensors", most=10)


def raw(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x00" * 7, (2**63).to_bytes(8, "little") + b"{}", (99_999_999).to_bytes(8, "little") + b"{}", raw(b"[]"),
        raw(b'{"a": 1}'), raw(b'{"a": {"dtype": "F32", "shape": [1]}}'),
        raw(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'),
        raw(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": 1}}', b"0000"),
        raw(b'{"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}', b"00000000"),
        raw(b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 4]}}', b"0000"),
        raw(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}'),
        raw(b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', b"0000"),
        raw(b'{"a": {"dtype": "F32", "shape": [0, 99999999999999], "data_offsets": [0, 0]}}'),
        raw(b'{"a": {"dtype": "F32", "shape": [1099511627776, 1099511627776, 0], "data_offsets": [0, 0]}}'),
        raw(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"00000"),
        raw(b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, "b": {"dtype": "U8", "shape": [2], '
            b'"data_offsets": [1, 3]}}', b"0000"),
        raw(b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "a": {"dtype": "U8", "shape": [0], '
            b'"data_offsets": [0, 0]}}'),
        raw(b'{"__metadata__": {"a": 1}}'), raw(b'{"a": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}}',
        b"\x02"),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused_before_memory_is_taken(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"a\.safetensors"):
        read_tensors(tmp_path / "a.safetensors")
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


@pytest.fixture
def folder(tmp_path):
    save_world(small_world(), tmp_path / "world")
    return tmp_path / "world"


def edit(folder: Path, seal: bool = True, **changes) -> None:
    """Change config.json as its author could: with hashes that fit."""
    file = folder / "config.json"
    document = json.loads(file.read_text()) | changes
    data = json.dumps(document).encode()
    file.write_bytes(sealed("config.json", data, (folder / "model.safetensors").read_bytes()) if seal else data)


@pytest.mark.parametrize(
    "change",
    [
        {"width": 10**9}, {"width": 2**16}, {"depth": 10**6}, {"depth": 1000}, {"mlp_hidden": 10**6}, {"tokens": 4096},
        {"k_max": 2048}, {"window": 10**9}, {"heads": 0}, {"kv_heads": -1}, {"width": True}, {"depth": 2.0},
        {"window": "6"}, {"registers": None}, {"linear_skip": 1}, {"conditioning": ["add"]}, {"latent_dim": 10**12},
    ],
)  # fmt: skip
def test_a_config_that_describes_more_than_its_file_holds_is_refused_before_it_is_built(folder, change, monkeypatch):
    before = json.loads((folder / "config.json").read_text())
    edit(folder, architecture=before["architecture"] | change)
    monkeypatch.setattr(checkpoint, "Dynamics", lambda config: pytest.fail("it was built"))
    with pytest.raises(CheckpointError, match=r"config\.json|different shapes"):
        load_world(folder, "cpu")


@pytest.mark.parametrize(
    "change",
    [
        {"height": 10**9}, {"patch_height": 0}, {"height": 4096, "width": 4096}, {"latent_dim": 192},
        {"patch_height": 16, "latent_dim": 300}, {"latent_dim": True}, {"width": "16"}, {"x": 1},
    ],
)  # fmt: skip
def test_a_tokenizer_that_describes_more_than_its_file_holds_is_refused_before_it_is_built(folder, change, monkeypatch):
    before = json.loads((folder / "tokenizer" / "config.json").read_text())
    edit(folder / "tokenizer", architecture=before["architecture"] | change)
    monkeypatch.setattr(LinearTokenizer, "from_json", lambda architecture: pytest.fail("it was built"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_world(folder, "cpu")


@pytest.mark.parametrize(
    "change", [{"tokens": 4096, "mlp_hidden": 100_000}, {"tokens": 4096, "window": 1024, "depth": 64, "time_every": 1}]
)
def test_a_world_that_needs_gigabytes_for_a_frame_is_refused_for_that(folder, change):
    before = json.loads((folder / "config.json").read_text())
    edit(folder, architecture=before["architecture"] | change)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be used: to make one frame with .* GB of memory"):
        load_world(folder, "cpu")


def test_the_numbers_that_a_checkpoint_holds_are_known_before_it_is_built():
    def held(module):
        return sum(t.numel() for t in module.state_dict().values())

    slots = (("continuous", 2, (0.0, 0.0), (1.0, 1.0)), ("binary", 2, (), ()), ("discrete", 5, (), ()))
    odd = {"conditioning": "modulate", "registers": 3, "width": 136, "kv_heads": 2, "k_max": 8, "depth": 3}
    for fields in ({}, odd, {"conditioning": "token", "action_space": slots}, SIZES["nano"]):
        assert held(Dynamics(DynamicsConfig(**fields))) == DynamicsConfig(**fields).stored
    for fields in ({}, {"kv_heads": 2, "depth_encoder": 5, "time_every": 2, "tokens": 3, "patch": 16, "latent_dim": 5}):
        config = TransformerTokenizerConfig(**fields)
        assert held(TransformerTokenizer(config)) == config.stored
    sizes = {"height": 16, "width": 32, "patch_height": 8, "patch_width": 16, "latent_dim": 5}
    assert held(LinearTokenizer(**sizes)) == LinearTokenizer.stored(sizes)


UNTRAINABLE = (  # settings that no run can have: they are counted with
    {"frames": 0}, {"frames": 1}, {"frames": 2.5}, {"frames": None}, {"frames": True}, {"single_image_share": None},
    {"long_frames": 0, "long_every": 1}, {"long_every": 2}, {"long_frames": 3.5, "long_every": 0.5}, {"tau_ctx": 1.0},
    {"long_frames": 1, "long_every": 2}, {"ramp": ["flat"]}, {"threads": "all"}, {"batch": 1, "long_frames": 99},
)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"fps": 1e-9}, {"fps": "10"}, {"frame_skip": 2.5}, {"trained_d": []}, {"trained_d": [0.3]}, {"trained_d": "x"},
        {"forcing": 7}, {"facts": []}, {"facts": {"train": 7}}, {"facts": {"train_seconds": "x"}}, {"generation": 3},
        {"facts": {"train": {"frames": 10**9}}}, {"tokenizer_hash": 1}, {"action_space": {"components": [{}] * 10**5}},
        {"trained_unlabelled": 1}, {"architecture": []}, *({"facts": {"train": t}} for t in UNTRAINABLE),
        *({"generation": {"steps": 2, "sampler": "euler", "tau_ctx": 0.1, "ctx_mode": "stop",
        "ctx_label": "honest"} | g}
          for g in ({"steps": 10**9}, {"steps": "2"}, {"tau_ctx": -1}, {"tau_ctx": None}, {"sampler": ["x"]},
                    {"sampler": "foo"}, {"ctx_mode": "x"}, {"ctx_label": "x"}, {"steps": 3, "sampler": "shortcut"})),
        {"trained_d": [1.0]}, {"trained_d": [0.125] * 1000}, {"trained_d": [0.125, 0.125]},
    ],
)  # fmt: skip
def test_every_other_field_of_a_config_has_its_type_and_its_limits(folder, changes):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_world(folder, "cpu")


@pytest.mark.parametrize("change", [{"name": "n" * 201}, {"labels": ["l" * 201, "r"]}])
def test_a_world_whose_actions_have_endless_names_is_refused(folder, change):
    space = json.loads((folder / "config.json").read_text())["action_space"]
    edit(folder, action_space={"components": [space["components"][0] | change]})
    with pytest.raises(CheckpointError, match=r"config\.json cannot be used: .* of 201 characters: give at most 200"):
        load_world(folder, "cpu")


@pytest.mark.parametrize("kind", ["world", "tokenizer"])
def test_a_weight_that_is_finite_in_its_file_alone_is_refused(folder, kind):
    place = folder if kind == "world" else folder / "tokenizer"
    file = place / "model.safetensors"
    wide = {name: t.double() for name, t in load_file(file).items()}
    save_file(wide, file)
    edit(place)
    if kind == "tokenizer":
        load_tokenizer(place)  # in another format, and sound
    else:
        load_world(folder, "cpu")
    wide["head.weight" if kind == "world" else "components"][0, 0] = 1e300  # beyond float32, in which it computes
    save_file(wide, file)
    edit(place)
    with pytest.raises(CheckpointError, match="holds weights that are not finite"):
        load_tokenizer(place) if kind == "tokenizer" else load_world(folder, "cpu")


@pytest.mark.parametrize("kind", [-9, "dynamics ", None, ["tokenizer"]])
def test_a_world_of_another_kind_is_no_tokenizer_for_the_one_beside_it(folder, kind):
    edit(folder, kind=kind)
    with pytest.raises(CheckpointError, match="kind"):
        describe_checkpoint(folder)


def test_facts_of_any_kind_are_shown_as_they_stand(folder):
    edit(folder, facts={"x": [None, "y", 0.5], "z": {"a": [1]}})
    assert "None, y, 0.5" in as_text(describe_checkpoint(folder))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer/model.safetensors", "tokenizer/config.json"]
)
def test_a_single_changed_bit_of_a_world_is_noticed(folder, name):
    file = folder / name
    before = bytearray(file.read_bytes())
    for at in range(len(before) - 5, 0, -max(1, len(before) // 25)):
        changed = bytearray(before)
        changed[at] ^= 1
        file.write_bytes(changed)
        try:
            load_world(folder, "cpu")
        except CheckpointError:
            continue
        assert json.loads(changed) == json.loads(before), at  # a space that became a line's end, say


def test_a_world_from_before_hashes_is_accepted_only_aloud(folder, capsys):
    for place in (folder / "tokenizer", folder):
        document = json.loads((place / "config.json").read_text())
        kept = {k: v for k, v in document.items() if k not in ("sha256", "weights_sha256")}
        (place / "config.json").write_text(json.dumps(kept | {"format": "ahriuwu-checkpoint/1"}))
    load_world(folder, "cpu")
    assert "without hashes" in capsys.readouterr().err
    document["format"] = "ahriuwu-checkpoint/2"
    del document["sha256"]
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="sha256"):
        load_world(folder, "cpu")


def test_an_episode_that_was_changed_is_refused_when_its_rows_are_first_read(tmp_path):
    store = small_dataset(tmp_path / "d", episodes=2, frames=6)
    file = store.file("000000")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    store = EpisodeStore.open(tmp_path / "d")
    store.frames("000001", 0, 1)
    with pytest.raises(DataError, match=r"000000\.safetensors is not what was recorded"):
        store.frames("000000", 0, 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("height", 10**9), ("width", 0), ("frame_skip", True), ("fps", 1e300), ("fps", 0), ("seed", 1.0), ("name",
        None),
        ("frames", 10**12), ("frames", -1), ("frames", True), ("frames", 40.0), ("id", "../../etc"), ("id",
        "/etc/passwd"),
        ("id", "00000\n"), ("id", "000000\x00"), ("id", "..\\000000"), ("split", "../train"), ("sha256",
        "0" * 63 + "\n"),
        ("source", ["x"]), ("labelled", 1),
    ],
)  # fmt: skip
def test_a_dataset_with_a_field_that_no_dataset_has_is_refused(tmp_path, key, value):
    small_dataset(tmp_path / "d", episodes=2, frames=6)
    file = tmp_path / "d" / "dataset.json"
    document = json.loads(file.read_text())
    (document if key in document else document["episodes"][0])[key] = value
    file.write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"dataset\.json"):
        EpisodeStore.open(tmp_path / "d")


def test_links_do_not_lead_out_of_a_dataset(tmp_path):
    store = small_dataset(tmp_path / "d", episodes=3, frames=6)
    tokenizer, outside = small_world().tokenizer, tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "d" / "latents").symlink_to(outside)
    with pytest.raises(DataError, match="leads out of the dataset"):
        open_pack(store, tokenizer)
    (tmp_path / "d" / "latents").unlink()
    (tmp_path / "d" / "latents").mkdir()
    for kind in ("partial", "lock", "journal", "journal.new"):
        victim = outside / f"{kind}.txt"
        victim.write_text("mine")
        name = f".train-{tokenizer.fingerprint()[:16]}.safetensors.{kind}"
        (tmp_path / "d" / "latents" / name).symlink_to(victim)
        with contextlib.suppress(DataError):
            open_pack(store, tokenizer)
        assert victim.read_text() == "mine", kind
        shutil.rmtree(tmp_path / "d" / "latents")
        (tmp_path / "d" / "latents").mkdir()
    (tmp_path / "d" / "episodes").rename(outside / "episodes")
    (tmp_path / "d" / "episodes").symlink_to(outside / "episodes")
    with pytest.raises(DataError, match="points out of the dataset"):
        EpisodeStore.open(tmp_path / "d")


def test_a_link_to_itself_is_no_internal_error(tmp_path):
    store = small_dataset(tmp_path / "d", episodes=3, frames=6)
    (tmp_path / "d" / "latents").symlink_to("latents")
    with pytest.raises(DataError, match="is no folder: remove it"):
        open_pack(store, small_world().tokenizer)
    file = tmp_path / "d" / "episodes" / "000001.safetensors"
    file.unlink()
    file.symlink_to(file.name)
    with pytest.raises(DataError, match="Too many levels of symbolic links"):
        EpisodeStore.open(tmp_path / "d")
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(UserError, match="out"):
        check_folder(tmp_path / "out", overwrite=True)


def test_an_action_space_of_more_columns_or_buttons_than_its_limit_is_refused_at_once():
    parts = [{"name": f"a{i}", "kind": "discrete", "size": 1} for i in range(4097)]
    with pytest.raises(DataError, match="4097 columns"):
        ActionSpace.from_json({"components": parts})
    with pytest.raises(DataError, match="size 513"):  # random actions draw among all pairs of buttons
        ActionSpace.from_json({"components": [{"name": "b", "kind": "binary", "size": 513}]})
    parts = [{"name": f"a{i}", "kind": "discrete", "size": 4096} for i in range(17)]
    with pytest.raises(DataError, match="69632 values"):  # `info` has a share for each
        ActionSpace.from_json({"components": parts})
    parts = [{"name": f"b{i}", "kind": "binary", "size": 512} for i in range(3000)]
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="1536000 columns"):
            ActionSpace.from_json({"components": parts})
        assert (
            tracemalloc.get_traced_memory()[1] < 1e7
        )  # no column has a name yet, which took a thousand times the file
    finally:
        tracemalloc.stop()


def test_random_actions_of_buttons_with_long_names_take_no_time():
    names = tuple(f"{i}_" + "L_" * 98 for i in range(512))
    begun = time.process_time()
    ActionSpace((ActionComponent("b", "binary", 512, names),)).random(10, (2, 2), np.random.default_rng(0))
    assert time.process_time() - begun < 1  # 0.04; it is 2.5 where each pair takes its names apart


@pytest.mark.parametrize("field", ["tokenizer", "source"])
def test_a_pack_whose_header_contradicts_its_name_or_its_dataset_is_named_by_the_check(tmp_path, field):
    store, tokenizer = small_dataset(tmp_path / "d", episodes=3, frames=6), small_world().tokenizer
    path = open_pack(store, tokenizer).path
    assert all(row.ok for row in check_packs(store))
    value = tokenizer.fingerprint() if field == "tokenizer" else store.episodes("train")[0].sha256
    other = ("1" if value[0] == "0" else "0") + value[1:]
    data = path.read_bytes()
    assert data.count(value.encode()) == 1
    path.write_bytes(data.replace(value.encode(), other.encode()))
    assert not all(row.ok for row in check_packs(store))


def test_what_lacks_its_weights_is_no_tokenizer_and_a_cell_that_leads_nowhere_is_no_traceback(tmp_path, folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        describe_checkpoint(folder)
    (tmp_path / "out" / "cells").mkdir(parents=True)
    (tmp_path / "out" / "cells" / "a.json").symlink_to("/nowhere")
    with pytest.raises(DataError, match="leads to no file"):
        read_cells(tmp_path / "out")


def test_a_video_that_names_other_files_or_lies_about_its_size_is_refused(tmp_path):
    clip = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3)).astype(np.uint8)
    write_mp4(tmp_path / "a.mp4", clip, 10)
    write_gif(tmp_path / "a.gif", clip, 10)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    (tmp_path / "playlist.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.mp4\n#EXT-X-ENDLIST\n")
    bomb = bytearray((tmp_path / "a.gif").read_bytes())
    bomb[6:10] = b"\xff\xff\xff\xff"  # 65535 x 65535
    (tmp_path / "bomb.gif").write_bytes(bomb)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:-400])
    for name in ("list.mp4", "playlist.mp4", "bomb.gif"):
        with pytest.raises(DataError, match=name):
            list(iter_video(tmp_path / name))
    for name in ("a.gif", "a.mp4"):  # a GIF states no size before it is decoded: the decoder itself must know the limit
        assert len(list(iter_video(tmp_path / name, max_pixels=5000))) == 5
        with pytest.raises(DataError, match=r"limit of 100 pixels|frames above 100 pixels"):
            list(iter_video(tmp_path / name, max_pixels=100))


def _box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + name + content


def _track(count: int, kind: bytes = b"soun", tick: int = 1, form: bytes = b"sowt", within: bytes = b"stbl") -> bytes:
    """A track of so many samples, in chunks of 48,000, as the whole of an index."""
    tables = [
        _box(b"stsd", struct.pack(">3I4s", 0, 1, 16, form) + bytes(8)),
        _box(b"stts", struct.pack(">4I", 0, 1, count, tick)),
        _box(b"stsc", struct.pack(">5I", 0, 1, 1, 48_000, 1)),
        _box(b"stsz", struct.pack(">3I", 0, 4, count)),
        _box(b"stco", struct.pack(">2I", 0, -(-count // 48_000)) + bytes(4 * -(-count // 48_000))),
    ]
    media = _box(b"hdlr", bytes(8) + kind) + _box(b"minf", _box(within, b"".join(tables)))
    return _box(b"moov", _box(b"trak", _box(b"mdia", media)))


def _cut_up(edits: int, count: int = 1000, stated: int = 1) -> bytes:
    """A track of so many pictures whose edits show it again and again."""
    track = _track(count, kind=b"vide")[16:]
    edit = _box(b"elst", struct.pack(">2I", 0, stated) + struct.pack(">3I", count, 0, 1 << 16) * edits)
    return _box(b"moov", _box(b"trak", _box(b"edts", edit) + track))


def _claim(name: bytes, version: int, skip: int) -> bytes:
    """A table that states millions of entries and has none."""
    return _box(name, bytes([version, 0, 0, 0]) + bytes(skip) + struct.pack(">I", 0x0FFFFF00) + bytes(64))


HOUR = 3600 * 48_000  # samples of sound
CLAIMS = [  # tables, their versions, and bytes before the number of their entries
    *((name, 0, 0) for name in (b"stts", b"ctts", b"stsc", b"stco", b"co64", b"stss", b"stps", b"keys", b"ipma")),
    *((b"sbgp", 0, 4), (b"sbgp", 1, 8), (b"sbgp", 2, 4)),
    *((b"sgpd", 0, 4), (b"sgpd", 1, 8), (b"sgpd", 2, 12), (b"sgpd", 3, 12)),
    *((b"pssh", 1, 16), (b"iinf", 1, 0), (b"iloc", 2, 2), (b"tfra", 0, 8), (b"sidx", 0, 18), (b"sidx", 1, 26)),
]
LIES = {
    "pictures": _track(HOUR, kind=b"vide"),
    "of no kind": _track(HOUR, kind=bytes(4)),
    "packed sound": _track(HOUR, form=b"mp4a"),
    "of two ticks": _track(HOUR, tick=2),
    "in another box": _track(HOUR, within=b"dinf"),
    "named twice": _track(HOUR).replace(b"sowt" + bytes(8), b"sowtstts" + bytes(4)),
    "in a fragment": _box(b"moof", _box(b"traf", _box(b"trun", struct.pack(">2I", 0, 60_000_000)))),
    "in what is no box": b"\0\0\0\3" + _track(HOUR, kind=b"vide"),
    "by their times": _track(100, kind=b"vide").replace(struct.pack(">3I", 1, 100, 1), struct.pack(">3I", 1, HOUR, 1)),
    "together": _track(3_000_000, kind=b"vide") * 2,
    "of many tables": _box(b"free", b"stts" * (mp4_index.MOST_TABLES + 1)),
    "of many pieces": _box(b"free", b"trun" * (mp4_index.MOST_BOXES + 1)),
    "squeezed": _box(b"moov", _box(b"cmov", b"")),
    "of keys to it": _box(b"moov", _box(b"senc", struct.pack(">2I", 0, 1_000_000))),
    "of sizes of keys": _box(b"saiz", struct.pack(">I8xBI", 1, 0, 1_000_000)),
    "shown again": _cut_up(5000),
    "of fragments for each track": _box(b"moov", _box(b"trak", b"") * 90) + _box(b"moof", b"") * 90_000,
    "of parts for each track": _box(b"moov", _box(b"trak", b"") * 90)
    + _box(b"sidx", bytes(22) + struct.pack(">H", 60_000) + bytes(720_000)),
    "of voices": _box(b"iacb", bytes(300_000)),
    "in a long box": struct.pack(">I4sQ2I", 1, b"trun", 24, 0, 60_000_000),
    **{f"{name.decode()} {version}": _claim(name, version, skip) for name, version, skip in CLAIMS},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_an_index_of_millions_is_refused_before_memory_is_taken(tmp_path, monkeypatch, lie):
    write_mp4(tmp_path / "a.mp4", np.zeros((5, 32, 32, 3), np.uint8), 10)
    (tmp_path / "lie.mp4").write_bytes((tmp_path / "a.mp4").read_bytes() + lie)
    monkeypatch.setattr("av.open", lambda *_, **__: pytest.fail("FFmpeg was asked"))
    with pytest.raises(DataError, match="its index"):
        video_fps(tmp_path / "lie.mp4")


def _element(name: str, *content: bytes) -> bytes:
    content = b"".join(content)
    return bytes.fromhex(name) + bytes([0x10 | len(content) >> 24]) + (len(content) & 0xFFFFFF).to_bytes(3) + content


_LIST = _element("1254c367", b"\x73\x73\x80" * 900)  # tags without content
_PLACE = _element("114d9b74", _element("4dbb", _element("53ab", _LIST[:4]), _element("53ac", (40).to_bytes(2))))
ENTRIES = {
    "tags": _LIST,
    "tags in tags": _element("1254c367", _element("7373", b"\x67\xc8\x80" * 900)),
    "encodings": _element("1654ae6b", _element("ae", _element("6d80", b"\x62\x40\x80" * 900))),
    "planes": _element("1654ae6b", _element("ae", _element("e2", _element("e3", b"\xe4\x80" * 900)))),
    "cues": _element("1c53bb6b", b"\xbb\x80" * 900),
    "files": _element("1941a469", b"\x61\xa7\x80" * 900),
    "chapters": _element("1043a770", _element("45b9", b"\xb6\x80" * 900)),
    "places": _element("114d9b74", b"\x4d\xbb\x80" * 900),
    "in a hole": _element("ec", _LIST),
    "behind damage": b"\0" + _LIST,
    "in a cluster that a place names": _PLACE + _element("1f43b675", _LIST),
    "behind a live cluster": bytes.fromhex("1f43b67501ffffffffffffff") + _element("a3", bytes(9)) + _LIST,
}


@pytest.mark.parametrize("lists", ENTRIES.values(), ids=ENTRIES)
def test_entries_without_content_are_counted_before_memory_is_taken(tmp_path, monkeypatch, lists):
    (tmp_path / "a.mkv").write_bytes(_element("1a45dfa3") + _element("18538067", lists))
    assert mkv_index.too_many_entries(tmp_path / "a.mkv") == ""
    monkeypatch.setattr(whole_video, "FEW_PARTS", 800)
    monkeypatch.setattr("av.open", lambda *_, **__: pytest.fail("FFmpeg was asked"))
    with pytest.raises(DataError, match="more than 800 parts"):
        video_fps(tmp_path / "a.mkv")


def test_what_a_matroska_file_has_beside_its_pictures_has_a_limit(tmp_path):
    (tmp_path / "a.mkv").write_bytes(_element("1a45dfa3") + bytes.fromhex("1853806701ffffffffffffff1941a46908fffffff0"))
    os.truncate(tmp_path / "a.mkv", 3_000_000_000)
    assert mkv_index.too_many_entries(tmp_path / "a.mkv") == "it has more than 128 MB that are no pictures"


def _avi_with_a_hole(path, size: int) -> None:
    """Three pictures, the last of which states a size that the file has as a hole."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
        for grey in (0, 20, 40):
            picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), grey, np.uint8), format="rgb24")
            out.mux(stream.encode(picture.reformat(format="yuvj420p")))
        out.mux(stream.encode(None))
    data = bytearray(path.read_bytes())
    last, movi = data.rindex(b"00dc", 0, data.index(b"idx1")), data.index(b"movi")
    for at, length in ((last + 4, size), (4, last + size), (movi - 4, last + 8 + size - movi)):
        data[at : at + 4] = length.to_bytes(4, "little")
    path.write_bytes(data[: last + 8])
    os.truncate(path, last + 8 + size)


def test_a_picture_of_gigabytes_is_not_read(tmp_path):
    _avi_with_a_hole(tmp_path / "a.avi", 1_900_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="a packet of it takes more than 200 MB"):
        list(iter_video(tmp_path / "a.avi"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB


def test_a_file_that_gives_no_packet_in_time_is_left(tmp_path, monkeypatch):
    write_mp4(tmp_path / "a.mp4", np.zeros((5, 32, 32, 3), np.uint8), 10)
    monkeypatch.setattr(bounded_file, "PATIENCE", -1.0)
    with pytest.raises(DataError, match=r"a\.mp4 cannot be read as video \(it gives no packet within"):
        video_fps(tmp_path / "a.mp4")


@pytest.mark.parametrize("content", [b"", b"x", b"GIF8", b"RIFF", b"\x1a\x45\xdf\xa3"])
def test_a_file_of_few_bytes_is_no_video(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.mp4 cannot be read as video"):
        video_fps(tmp_path / "a.mp4")


def test_a_gif_is_read_once_more_to_count_its_pictures(tmp_path, monkeypatch):
    write_gif(tmp_path / "a.gif", np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3)).astype(np.uint8), 10)
    monkeypatch.setattr(bounded_file, "MOST_READ", (tmp_path / "a.gif").stat().st_size * 3 // 2)
    assert len(list(iter_video(tmp_path / "a.gif"))) == 20


def test_a_video_without_permission_is_a_dataset_s_error(tmp_path, monkeypatch):
    write_mp4(tmp_path / "a.mp4", np.zeros((5, 32, 32, 3), np.uint8), 10)

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("ahriuwu_cli.data.video.too_many", refused)
    with pytest.raises(DataError, match="Permission denied"):
        video_fps(tmp_path / "a.mp4")


def test_a_large_index_of_holes_is_not_read(tmp_path):
    (tmp_path / "a.mp4").write_bytes(_box(b"ftyp", b"isom") + bytes(4) + b"moov")
    os.truncate(tmp_path / "a.mp4", 3_000_000_000)
    tracemalloc.start()
    assert "more than 128 MB" in mp4_index.too_many(tmp_path / "a.mp4")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_films_and_an_hour_of_raw_sound_pass(tmp_path):
    write_mp4(tmp_path / "a.mp4", np.zeros((5, 32, 32, 3), np.uint8), 10)
    (tmp_path / "b.mov").write_bytes(_box(b"mdat", b"stsz" + b"\xff" * 99) + _track(HOUR) + _track(200_000, b"vide"))
    text = b"The trunk of a Costco car: no keys are there, in essence of the presence"
    (tmp_path / "d.mov").write_bytes(_cut_up(500) + _box(b"free", text))
    write_gif(tmp_path / "c.gif", np.zeros((5, 32, 32, 3), np.uint8), 10)
    assert [mp4_index.too_many(tmp_path / name) for name in ("a.mp4", "b.mov", "c.gif", "d.mov")] == [""] * 4


@pytest.mark.parametrize("kind", ["large", "other", "cut", "pipe"])
def test_an_image_is_looked_at_before_it_is_decoded(tmp_path, folder, kind, capsys):
    file = tmp_path / "a.png"
    if kind == "large":
        Image.new("1", (9000, 9000)).save(file)
    elif kind == "other":
        file.write_bytes(b"P6 8 8 255\n" + bytes(192))  # a picture, but none of the kinds that are read
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        Image.new("RGB", (64, 64)).save(file)
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(SystemExit) as end:
        main(["rollout", str(folder), str(file), "--out", str(tmp_path / "o"), "--length", "1"])
    said = capsys.readouterr().err
    assert end.value.code == 3
    assert said.count("\n") == 1
    assert "a.png" in said


@pytest.mark.parametrize("scans", [10, 600])
def test_pictures_of_endless_scans_are_not_decoded(tmp_path, folder, scans, capsys):
    """A progressive JPEG with one of its scans repeated: each is a pass over the whole picture."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(
        tmp_path / "a.jpg", progressive=True
    )
    data = (tmp_path / "a.jpg").read_bytes()
    at = data.index(b"\xff\xda")
    empty = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x10"  # of one component's finest bits, without any
    (tmp_path / "a.jpg").write_bytes(data[:-2] + empty * scans + data[-2:])
    assert at > 0
    with pytest.raises(SystemExit) as end:
        main(["rollout", str(folder), str(tmp_path / "a.jpg"), "--out", str(tmp_path / "o"), "--length", "1"])
    said = capsys.readouterr().err
    assert ("more than 500 scans" in said) == (scans == 600), said
    assert end.value.code == (3 if scans == 600 else 0), said
    import av

    with av.open(str(tmp_path / "a.avi"), "w") as film:
        stream = film.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
        packet = av.Packet((tmp_path / "a.jpg").read_bytes())
        packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1, 10)
        film.mux(packet)
    if scans == 600:
        with pytest.raises(DataError, match="more than 500 scans"):
            read_video(tmp_path / "a.avi")


WAITING = [
    (4, "rollout PIPE --out o"), (4, "rollout PIPE data --out o"), (3, "rollout world PIPE --out o"),
    (4, "eval PIPE data --out o"), (3, "eval world PIPE --out o"), (4, "export PIPE --out o"),
    (3, "export world --prompts PIPE --out o"), (4, "export world --average PIPE --out o"),
    (4, "sweep-tau PIPE data --out o"), (3, "sweep-tau world PIPE --out o"), (4, "verify PIPE --no-metrics"),
    (3, "train tokenizer PIPE --out o"), (3, "train dynamics PIPE --out o --steps 1"),
    (4, "train dynamics data --out o --steps 1 --tokenizer PIPE"), (4, "train dynamics data --out o --init-from PIPE"),
    (3, "info PIPE"), (3, "import PIPE --out o"), (3, "eval score PIPE data --out o"), (3, "eval merge PIPE"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "line"), WAITING)
def test_a_pipe_in_the_place_of_a_folder_is_refused_and_nothing_waits_for_it(tmp_path, monkeypatch, capsys, code, line):
    def give_up(*_):
        raise AssertionError("it waits")

    monkeypatch.chdir(small_place(tmp_path, {}))
    os.mkfifo("PIPE")
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    try:
        with pytest.raises(SystemExit) as end:
            main(line.split())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    said = capsys.readouterr().err
    assert end.value.code == code, said
    assert said.count("\n") == 1
    assert not Path("o").exists()


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_hash_is_made_of_a_regular_file_alone(tmp_path, kind):
    path = tmp_path / "weights"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(OSError, match="is no regular file"):
        file_hash(path)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_state_whose_tensors_are_a_pipe_or_a_device_is_damaged_and_nothing_waits_for_it(tmp_path, kind):
    save_state(tmp_path / "state", {"a": torch.ones(2)}, {"step": 1})
    (tensors,) = (tmp_path / "state").glob("state-*")
    tensors.unlink()
    os.mkfifo(tensors) if kind == "pipe" else tensors.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="is no regular file"):
        load_state(tmp_path / "state")


def test_no_escape_sequence_of_a_file_reaches_the_terminal(tmp_path, capsys):
    evil = "\x1b]0;owned\x07\x1b[2J\u202egnp\x9b31m"
    small_dataset(tmp_path / "d", episodes=3, frames=6)
    file = tmp_path / "d" / "dataset.json"
    document = json.loads(file.read_text())
    document["source"] = {evil: evil}
    document["name"] = evil
    file.write_text(json.dumps(document))
    for arguments in (["info", str(tmp_path / "d")], ["info", str(tmp_path / evil)]):
        with pytest.raises(SystemExit):
            main(arguments)
        said = capsys.readouterr()
        shown = said.out + said.err
        assert "owned" in shown
        assert not [c for c in shown if c not in "\n\t" and (ord(c) < 32 or 127 <= ord(c) < 160 or c == "\u202e")]
    assert printable("a\tb\nü") == "a\tb\nü"
    assert one_sentence("a\n\x1b b\udcff") == r"a \x1b b\udcff"
    assert len(one_sentence("x" * 10**6)) < 3000


def test_no_text_in_a_csv_is_a_formula_and_none_in_markdown_is_a_cell_or_html():
    texts = ["=1+1", "+1", "-1+2", "@SUM(A1)", "\t=1"]
    row = {name: name for name in texts} | {"number": -1.5, "whole": -2, "text": "a=b\r=1"}
    cells = list(csv.reader(io.StringIO(as_csv([row]))))
    assert cells == [[f"'{t}" for t in texts] + ["number", "whole", "text"],
                     [f"'{t}" for t in texts] + ["-1.5", "-2", r"a=b\r=1"]]  # fmt: skip
    assert in_markdown("a|b\n<script>`x`") == r"a\|b &lt;script>\`x\`"
    assert in_markdown("![a](http://b) [c][d] [e]: f") == r"![a\](http://b) [c\][d] [e\]: f"
    assert in_markdown("+1.2 [0.8, 1.6] \x1b \u202e") == r"+1.2 [0.8, 1.6] \\x1b \\u202e"


FORGED = "a\n\r\n\x0b\x85\u2028FAILED: everything"


def test_no_text_of_a_file_ends_a_line_of_a_report(tmp_path, capsys):
    small_dataset(tmp_path / "data")
    facts = describe(tmp_path / "data", check=True)
    facts["source"] = {FORGED: FORGED}
    for part in facts["action_space"]["components"]:
        facts["actions"][FORGED] = facts["actions"].pop(part["name"])
        part["name"] = FORGED
    checks = [Check(FORGED, FORGED, 1.0, FORGED, True)]
    texts = [describe_text(facts), as_text({"facts": {FORGED: FORGED}, "train": [FORGED]}), as_table(checks),
             table([FORGED, FORGED], [[FORGED, FORGED]])]  # fmt: skip
    options.say(FORGED)
    texts.append(capsys.readouterr().err)
    for text in texts:
        lines = text.splitlines()
        assert any("FAILED" in line for line in lines)
        assert not any(line.startswith("FAILED") for line in lines), text
    assert one_line("a  b\tc\n\x1b") == r"a  b c \x1b"


def test_sixty_seeded_mutations_end_in_success_or_in_one_sentence():
    done = subprocess.run(
        [sys.executable, SCRIPTS / "fuzz.py", "--mutations", "64", "--seed", "7"],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| all | 64 |" in done.stdout
