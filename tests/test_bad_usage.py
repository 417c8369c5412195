"""Bad usage of every command: one sentence, the right exit code, and nothing on disk changes.

The tables below are held against the command tree itself: a new command, option or argument without a row fails.
"""

import io
import itertools
import os
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout

import pytest
import typer
from PIL import Image
from small import SPACE, small_dataset, small_world
from typer.main import get_command
from typer.utils import get_params_from_function

from ahriuwu_cli import cli
from ahriuwu_cli.commands.values import Name, Number, Text, Whole
from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.training.checkpoint import save_tokenizer, save_world

# What a command needs to be understood; {name} is a path that `place` makes, {out} one that is not there.
COMMANDS = {
    "record": ["doom:basic", "--out", "{out}"],
    "import": ["{films}", "--out", "{out}"],
    "train tokenizer": ["{data}", "--out", "{out}"],
    "train dynamics": ["{data}", "--out", "{out}"],
    "rollout": ["{world}", "{data}", "--out", "{out}"],
    "eval": ["{world}", "{data}", "--out", "{out}"],
    "eval plan": ["{plan}", "--out", "{out}"],
    "eval merge": ["{full}"],
    "eval generate": ["{world}", "{data}", "--out", "{out}"],
    "eval score": ["{full}", "{data}", "--out", "{out}"],
    "sweep-tau": ["{world}", "{data}", "--out", "{out}"],
    "verify": [],
    "export": ["{world}", "--out", "{out}"],
    "info": [],
}

HUGE, DIGITS, LONG = "x" * 10**6, "9" * 10**6, "n" * 300  # longer than a name may be
STRANGE = ("🌀🦀", "e\u0301\u0301\u0301", "\u202eabc\u202d", "\x1b[31mred\x07", "\udcff", HUGE)
NOT_WHOLE = (
    "x",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e3",
    "0x10",
    "1_0",
    "١٢",
    str(10**30),
    str(-(10**30)),
    DIGITS,
    *STRANGE,
)
NOT_A_NUMBER = ("x", "nan", "inf", "-inf", "1e999", "-1e999", "0,5", "1_0e-1", "١", str(10**30), DIGITS, *STRANGE)

# Texts that a parser reads (Text): what it must refuse, beside all of STRANGE.
TEXTS = {
    "device": ["gpu", "cuda:", "cuda:-1", "cuda:9999", "CPU", "cuda:0,1"],
    "size": ["0", "7", "-64", "64x", "x64", "64x64x3", "100000x100000", "1025", "６４", str(10**30)],
    "splits": [
        "1",
        "0.8,0.2",
        "0.8,0.2,0.2",
        "0,0.5,0.5",
        "nan,0.1,0.1",
        "inf,0,0",
        "-0.2,0.6,0.6",
        "a,b,c",
        "0.8,0.1,0.1_0",
    ],
    "patch": ["0", "0x0", "-8", "8x", "big", "999999", str(10**30)],
    "budget": ["0s", "0", "-1m", "soon", "nan", "inf", "1e3s", "99999999h", "5 weeks", str(10**30)],
    "shard": ["0/4", "5/4", "1/0", "1", "1/", "a/b", "١/٤", "-1/4", "1/99999999"],
    "taus": ["1", "-0.1", "0,nan", "0,inf", "0,x", "0,,1", "0,0", ",", ",".join(f"0.{i:04d}" for i in range(700))],
    "steps": ["0", "3.5", "4,0", "4,x", "4,4", str(10**30)],
    "sampler": ["eulr", "euler,", "euler,euler"],
    "ctx_mode": ["stp", "stop,stop"],
    "ctx_label": ["honnest", "clean,"],
}

# Texts that are free until something is opened: (options that go with it, value, exit code).
FREE = {
    ("record", "source"): [([], "dom:basic", 2), ([], "doom:", 2), ([], "doom:basik", 2), ([], "gym:🌀", 2)],
    ("rollout", "episode"): [([], v, 3) for v in ("zzz", "-1", "999999", "../000000", *STRANGE[:-1])],
    ("rollout", "actions"): [
        ([], v, 2) for v in ("rndom", "repeat:", "repeat:UP", "repeat:nan", "repeat:١", *STRANGE[:-1])
    ],
    ("eval", "looks"): [([], v, 2) for v in ("spred", "all,none", ",", "spread,", *STRANGE[:-1])],
    ("eval", "lpips_hash"): [(["--lpips-weights", "{text}"], v, 2) for v in ("12", "g" * 64, *STRANGE[:-1])],
    ("eval", "fvd_hash"): [(["--fvd-weights", "{text}"], v, 2) for v in ("12", "g" * 64, *STRANGE[:-1])],
    ("eval merge", "reference"): [([], v, 3) for v in ("zzz", *STRANGE[:-1])],  # there are no cells to refer to
}

# Paths: the exit code for one that is not there (None: it may be made), for a file and for a folder (None: allowed).
OUT = (None, 2, None)
WORLD, DATA, FILE3 = (4, 4, 4), (3, 3, 3), (3, 3, 3)
PATHS = {
    **{(c, "out"): OUT for c in COMMANDS if c.split()[-1] not in ("merge", "verify", "info")},
    **{(c, "checkpoint"): WORLD for c in ("rollout", "eval", "eval generate", "sweep-tau", "export", "verify")},
    **{(c, "dataset"): DATA for c in ("train tokenizer", "train dynamics", "eval", "eval generate", "eval score",
                                     "sweep-tau", "verify")},
    **{(c, "manifest"): FILE3 for c in ("eval", "eval generate", "sweep-tau")},
    ("import", "folder"): DATA,
    ("train tokenizer", "lpips_weights"): (2, 2, 2),
    ("train tokenizer", "encoder"): WORLD,
    ("train dynamics", "tokenizer"): WORLD,
    ("train dynamics", "init_from"): WORLD,
    ("rollout", "prompt"): (3, 3, 3),
    ("eval", "features_weights"): WORLD,
    ("eval", "lpips_weights"): (2, 2, 2),  # its hash is missing
    ("eval", "fvd_weights"): (2, 2, 2),
    ("eval plan", "plan"): (2, 2, 2),
    ("eval merge", "folder"): (3, 3, 3),
    ("eval merge", "plan"): (2, 2, 2),
    ("eval merge", "out"): (2, 2, 2),  # not a .csv
    ("eval score", "rollouts"): (3, 3, 3),
    ("export", "prompts"): DATA,
    ("export", "average"): WORLD,
    ("export", "tokenizer"): WORLD,
    ("export", "evidence"): DATA,
    ("export", "notes"): (2, None, 2),
    ("info", "path"): (3, 3, 3),
}  # fmt: skip
WITH = {  # options that a path needs beside it to be looked at
    ("train tokenizer", "encoder"): ["--sharpness", "1"],
    ("train tokenizer", "lpips_weights"): ["--kind", "transformer", "--patch", "8"],
    ("train dynamics", "init_from"): ["--tokenizer", "{tok}"],
    ("verify", "dataset"): ["{world}"],
}

# Options that exclude each other, need each other, or would be ignored: (words, a part of the sentence).
TOKENIZER, DYNAMICS = (
    ["train", "tokenizer", "{data}", "--out", "{out}"],
    ["train", "dynamics", "{data}", "--out", "{out}"],
)
ROLLOUT, EVAL = ["rollout", "{world}", "{data}", "--out", "{out}"], ["eval", "{world}", "{data}", "--out", "{out}"]
IMAGE, VIDEO = ["rollout", "{world}", "{image}", "--out", "{out}"], ["rollout", "{world}", "{video}", "--out", "{out}"]
EXPORT, SWEEP = ["export", "{world}", "--out", "{out}"], ["sweep-tau", "{world}", "{data}", "--out", "{out}"]
RECORD = ["record", "doom:basic", "--out", "{out}"]
CONTRADICTIONS = [
    ([*RECORD, "--min-frames", "600"], "600 to 512"),
    ([*RECORD, "--max-frames", "20"], "32 to 20"),
    ([*RECORD, "--hold-min", "9"], "9 to 8"),
    ([*TOKENIZER, "--tokens", "8"], "--tokens is for --kind transformer"),
    ([*TOKENIZER, "--steps", "8"], "--steps is for --kind transformer"),
    ([*TOKENIZER, "--batch", "8"], "--batch is for --kind transformer"),
    ([*TOKENIZER, "--frames", "8"], "--frames is for --kind transformer"),
    ([*TOKENIZER, "--lr", "0.1"], "--lr is for --kind transformer"),
    ([*TOKENIZER, "--log-every", "8"], "--log-every is for --kind transformer"),
    ([*TOKENIZER, "--save-every", "8"], "--save-every is for --kind transformer"),
    ([*TOKENIZER, "--keep", "8"], "--keep is for --kind transformer"),
    ([*TOKENIZER, "--seed", "1"], "--seed is for --kind transformer"),
    ([*TOKENIZER, "--lpips-weights", "{text}"], "--lpips-weights is for --kind transformer"),
    ([*TOKENIZER, "--resume"], "--resume is for --kind transformer"),
    ([*TOKENIZER, "--device", "cpu"], "--device is for --kind transformer"),
    (["eval", "merge", "{full}", "--overwrite"], "--overwrite is for --out"),
    ([*TOKENIZER, "--kind", "transformer", "--whitening", "0.5"], "--whitening is for --kind linear"),
    ([*TOKENIZER, "--kind", "transformer", "--gradient-weight", "1"], "--gradient-weight is for --kind linear"),
    ([*TOKENIZER, "--kind", "transformer", "--sharpness", "0.9"], "--sharpness is for --kind linear"),
    ([*TOKENIZER, "--kind", "transformer", "--encoder", "{world}"], "--encoder is for --kind linear"),
    ([*TOKENIZER, "--encoder", "{world}"], "give --sharpness"),
    ([*TOKENIZER, "--encoder", "{world}", "--sharpness", "1", "--patch", "8"], "--patch is about the encoder"),
    (
        [*TOKENIZER, "--encoder", "{world}", "--sharpness", "1", "--latent-dim", "8"],
        "--latent-dim is about the encoder",
    ),
    ([*TOKENIZER, "--encoder", "{world}", "--sharpness", "1", "--whitening", "0"], "--whitening is about the encoder"),
    (
        [*TOKENIZER, "--encoder", "{world}", "--sharpness", "1", "--gradient-weight", "1"],
        "--gradient-weight is about the encoder",
    ),
    ([*TOKENIZER, "--sharpness", "1.5"], "--sharpness"),
    ([*TOKENIZER, "--kind", "transformer", "--resume", "--overwrite"], "contradicts --resume"),
    ([*TOKENIZER, "--kind", "transformer", "--patch", "8x16"], "not square"),
    ([*DYNAMICS, "--steps", "5", "--budget", "5m"], "not both"),
    ([*DYNAMICS, "--resume", "--overwrite"], "contradicts --resume"),
    ([*DYNAMICS, "--long-frames", "24"], "go together"),
    ([*DYNAMICS, "--long-every", "2"], "go together"),
    ([*DYNAMICS, "--long-every", "2", "--long-frames", "9999"], "larger than a whole batch"),
    ([*DYNAMICS, "--batch", "3", "--accumulate", "2"], "does not divide"),
    ([*DYNAMICS, "--optimizer", "adamw", "--optimizer-state", "bfloat16"], "muon"),
    ([*DYNAMICS, "--optimizer", "adamw", "--muon-momentum", "0.9"], "muon-momentum says nothing to --optimizer adamw"),
    ([*DYNAMICS, "--optimizer", "adafactor", "--adamw-lr-scale", "1"], "says nothing to --optimizer adafactor"),
    ([*DYNAMICS, "--bootstrap-share", "0.6", "--single-image-share", "0.6"], "exceed 1"),
    (
        [*DYNAMICS, "--forcing", "horizon", "--bootstrap-share", "0.5"],
        "share says nothing to --forcing horizon",
    ),
    ([*DYNAMICS, "--forcing", "uniform", "--bootstrap-share", "0", "--bootstrap-target", "second"], "bootstrap-target"),
    (
        [*DYNAMICS, "--forcing", "context", "--tau-ctx", "0", "--ramp", "velocity"],
        "--ramp velocity weighs by 1 / tau^2",
    ),
    ([*DYNAMICS, "--forcing", "prefix", "--tau-ctx", "1e-9", "--ramp", "velocity", "--dry-run"], "1 / tau^2"),
    (
        [*DYNAMICS, "--forcing", "uniform", "--bootstrap-target", "second"],
        "--bootstrap-target says nothing to --forcing",
    ),
    ([*DYNAMICS, "--bootstrap-share", "0", "--bootstrap-target", "second"], "nothing to --bootstrap-share 0"),
    ([*DYNAMICS, "--frames", "8", "--long-frames", "8", "--long-every", "2"], "no clip would be longer"),
    ([*DYNAMICS, "--steps", "2", "--long-frames", "24", "--long-every", "3"], "no clip would be long"),
    ([*DYNAMICS, "--batch", "65536", "--frames", "10000"], "frames a step"),
    ([*ROLLOUT, "--pick", "busiest", "--start", "3"], "leave out --episode and --start"),
    ([*ROLLOUT, "--pick", "busiest", "--episode", "000000"], "leave out --episode and --start"),
    ([*ROLLOUT, "--episode", "000000", "--split", "val"], "--episode names one"),
    ([*ROLLOUT, "--actions", "random", "--actions", "random"], "once"),
    ([*ROLLOUT, "--scale", "64", "--samples", "256", "--actions", "random"], "smaller --scale"),
    ([*VIDEO, "--episode", "000000"], "is for a dataset"),
    ([*VIDEO, "--split", "val"], "is for a dataset"),
    ([*VIDEO, "--pick", "busiest"], "is for a dataset"),
    ([*IMAGE, "--start", "3"], "is one image"),
    ([*IMAGE, "--context", "3"], "is one image"),
    (["rollout", "{silent}", "{mute}", "--out", "{out}", "--actions", "random"], "has no actions"),
    ([*EVAL, "--lpips-weights", "{text}"], "belong together"),
    ([*EVAL, "--lpips-hash", "0" * 64], "belong together"),
    ([*EVAL, "--fvd-weights", "{text}"], "belong together"),
    ([*EVAL, "--fvd-hash", "0" * 64], "belong together"),
    ([*SWEEP, "--resume", "--overwrite", "--windows", "2", "--horizon", "3", "--context", "2"], "give one of them"),
    ([*SWEEP, "--windows", "1"], "--no-delta"),
    ([*SWEEP, "--steps", "1", "--write-back", "--windows", "2", "--horizon", "3"], "add its --steps"),
    ([*EXPORT, "--clips", "2"], "--prompts"),
    ([*EXPORT, "--frames", "9"], "--prompts"),
    ([*EXPORT, "--split", "val"], "--prompts"),
    ([*EXPORT, "--pick", "busiest"], "--prompts"),
    ([*EXPORT, "--seed", "3"], "--prompts"),
    (["verify", "--dataset", "{data}"], "no checkpoint was given"),
    (["verify", "--device", "cpu"], "no checkpoint was given"),
    (["info", "--check"], "--check is for datasets"),
    (["info", "{world}", "--check"], "--check is for datasets"),
]

UNKNOWN = [
    (["train", "--json", "dynamics"], "unknown option --json: a command's options follow the command"),
    (["--json", "info"], "unknown option --json: a command's options follow the command"),
    (["--versoin"], "did you mean '--version'?"),
    ([], "name a command"),
    (["train"], "name a command"),
    (["rolout"], "did you mean 'rollout'"),
    (["sweep"], "did you mean 'sweep-tau'"),
    (["train", "dynamic"], "did you mean 'dynamics'"),
    (["eval", "mrege", "{out}"], "did you mean `eval merge`"),
    (["🌀"], "No such command"),
    (["--verson"], "did you mean '--version'"),
    (["rollout", "{world}", "{data}", "{data}", "--out", "{out}"], "extra argument"),
]


def _registered(app, before=""):
    """(words, function) of every command of a typer application."""
    for info in app.registered_commands:
        name = info.name or info.callback.__name__
        yield before if name == before else f"{before} {name}".strip(), info.callback
    for group in app.registered_groups:
        yield from _registered(group.typer_instance, f"{before} {group.name}".strip())


TREE = dict(_registered(cli.app))
PARAMETERS = [
    (command, name, meta.default)
    for command, function in TREE.items()
    for name, meta in get_params_from_function(function).items()
    if meta.annotation is not typer.Context
]
KINDS = {
    (c, n): get_params_from_function(TREE[c])[n].annotation for c, n, _ in PARAMETERS
}  # the annotation: bool, Path, str, ...


def _word(name, info):
    """How the parameter is written: '--tau-ctx', or None for an argument."""
    if isinstance(info, typer.models.ArgumentInfo):
        return None
    return next((d.split("/")[0] for d in info.param_decls or () if d.startswith("--")), "--" + name.replace("_", "-"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("usage")
    small_dataset(root / "data")
    small_dataset(root / "mute", space=ActionSpace(()), labelled=False)
    save_world(small_world(), root / "world")
    save_tokenizer(small_world().tokenizer, root / "tok", {})
    save_world(_silent(), root / "silent")
    (root / "films").mkdir()
    (root / "text").write_text("not what you think")
    (root / "video").write_text("a file that is no image by its name")
    (root / "plan.jsonl").write_text("{}\n")
    (root / "full").mkdir()
    (root / "full" / "file").write_text("precious")
    Image.new("RGB", (16, 16)).save(root / "image.png")
    return root


def _silent():
    """A world without actions."""
    import torch

    from ahriuwu_cli.models.dynamics import Dynamics

    world = small_world()
    config = dict(world.dynamics.config.to_json(), action_space=())
    torch.manual_seed(0)
    world.dynamics = Dynamics(type(world.dynamics.config)(**config)).eval()
    world.action_space = ActionSpace(())
    return world


@pytest.fixture(scope="module")
def tree():
    return get_command(cli.app)


@pytest.fixture
def refused(place, tree, monkeypatch):
    """refused(words, code): the sentence, after everything that is true of all bad usage was checked."""
    monkeypatch.setattr(cli, "get_command", lambda app: tree)  # built once: it takes longer than all that is tested
    monkeypatch.chdir(place)
    names = {p.name.split(".")[0]: p for p in place.iterdir()} | {"out": place / "out"}
    before, out = _snapshot(place), place / "out"

    def call(words, code=2):
        words = [re.sub(r"^\{(\w+)\}", lambda found: str(names[found[1]]), w) for w in words]
        err, shown = io.StringIO(), [w[:80] for w in words]
        with pytest.raises(SystemExit) as stop, redirect_stdout(io.StringIO()), redirect_stderr(err):
            cli.main(words)
        said = err.getvalue()
        if out.exists():  # or every later test would fail as well
            shutil.rmtree(out)
            pytest.fail(f"{shown} wrote {out}")
        codes = code if isinstance(code, set) else {code, 2} if LONG in words else {code}
        codes = {2} if any("\udcff" in word for word in words) else codes
        assert stop.value.code in codes, (shown, said)
        assert said.startswith("error: "), (shown, said)
        assert said.count("\n") == 1, (shown, said)
        assert said.endswith("\n"), (shown, said)
        assert said[:-1].isprintable(), (shown, said)
        assert len(said) < 1000 + 2 * len(str(place)), (shown, len(said))
        assert "Traceback" not in said, (shown, said)
        assert "internal error" not in said, (shown, said)
        assert _snapshot(place) == before, shown
        return said

    return call


def _snapshot(folder):
    """Names, sizes, times and, for what is small, contents."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        small = path.is_file() and status.st_size < 2000
        found[path] = (status.st_size, status.st_mtime_ns, status.st_ino, path.read_bytes() if small else None)
    return found


def test_the_tables_name_every_command_and_every_option_that_there_is():
    assert set(TREE) == set(COMMANDS)
    for command, name, info in PARAMETERS:
        kind, parser = KINDS[command, name], info.parser
        if kind is bool or isinstance(parser, Whole | Number | Name):
            continue
        if isinstance(parser, Text):
            assert name in TEXTS, f"{command}: {name} has no row in TEXTS"
        elif "Path" in str(kind):
            assert (command, name) in PATHS, f"{command}: {name} has no row in PATHS"
        else:
            assert (command, name) in FREE, f"{command}: {name} has no row in FREE, and no parser either"
    known = {(command, name) for command, name, _ in PARAMETERS}
    assert set(PATHS) | set(FREE) <= known
    assert set(TEXTS) <= {name for _, name, _ in PARAMETERS}


def test_every_option_of_one_mode_has_its_contradiction():
    tested = {(" ".join(words[:2]), w) for words, _ in CONTRADICTIONS for w in words if w.startswith("--")}
    for command, name, info in PARAMETERS:
        mode = re.match(r"(transformer|linear|Dataset prompt): ", info.help or "")
        if mode and isinstance(info, typer.models.OptionInfo):
            words = "rollout {world}" if command == "rollout" else command
            assert (words, _word(name, info)) in tested, f"{command} {name} is for {mode[1]} alone: what elsewhere?"


def _values(command, name, info):
    """(words that go with it, value, code) that this parameter must refuse."""
    parser, kind = info.parser, KINDS[command, name]
    if isinstance(parser, Whole):
        edges = (parser.low - 1, parser.high + 1, parser.high * 10 + 10**12)
        return [([], v, 2) for v in (*map(str, edges), *NOT_WHOLE)]
    if isinstance(parser, Number):
        edges = [parser.low - 0.1, parser.high + 0.1, parser.high + 1e6, -1e-300]
        edges += [end for end, mark in zip((parser.low, parser.high), parser.ends, strict=True) if mark in "()"]
        return [([], v, 2) for v in (*map(str, edges), *NOT_A_NUMBER)]
    if isinstance(parser, Name):
        return [([], v, 2) for v in ("qqqqqq", parser.known()[0].upper(), parser.known()[0] + ",", *STRANGE)]
    if isinstance(parser, Text):
        return [([], v, 2) for v in (*TEXTS[name], *STRANGE)]
    if (command, name) in FREE:
        return [*FREE[command, name], ([], HUGE, 2)]
    if kind is bool:
        return []
    missing, file, folder = PATHS[command, name]
    beside = WITH.get((command, name), [])
    found = [(beside, "{text}", file), (beside, "{full}", folder), (beside, HUGE, 2), (beside, "a\0b", 2)]
    found += [(beside, "\udcff", 2)]
    found += [(beside, v, missing) for v in ("nowhere", "{text}/below", "🌀", "\x1b[31mred", "\u202eabc", LONG)]
    found += [([*beside], "{text}/below", 2)] if (command, name) in PATHS and missing is None else []
    return [(b, v, c) for b, v, c in found if c is not None]


def _words(command, name, info, beside, value):
    """The command with this parameter set to a value. The base gives up its own word for it."""
    base, option = list(COMMANDS[command]), _word(name, info)
    arguments = [n for c, n, i in PARAMETERS if c == command and _word(n, i) is None]
    if option is None:
        given = arguments.index(name)
        head = list(itertools.takewhile(lambda w: not w.startswith("--"), base))
        tail = base[len(head) :]
        value = f"./{value}" if value.startswith("-") else value
        return [*command.split(), *head[:given], value, *head[given + 1 :], *beside, *tail]
    if option in base:
        at = base.index(option)
        del base[at : at + 2]
    return [*command.split(), *base, *beside, f"{option}={value}" if value.startswith("-") else option, *(
        [] if value.startswith("-") else [value])]  # fmt: skip


@pytest.mark.parametrize(("command", "name", "info"), PARAMETERS, ids=[f"{c} {n}" for c, n, _ in PARAMETERS])
def test_a_value_that_does_not_fit_is_refused_with_its_option(refused, command, name, info):
    option = _word(name, info)
    for beside, value, code in _values(command, name, info):
        said = refused(_words(command, name, info, beside, value), code)
        if isinstance(info.parser, Whole | Number) and value not in STRANGE and value != DIGITS:
            assert option in said, (value[:50], said)
    if isinstance(info.parser, Name):
        near = info.parser.known()[0]
        near = near[:1] + near[2:] if len(near) > 3 else near + "s"
        said = refused(_words(command, name, info, [], near))
        assert "did you mean" in said or "choose one of" in said
    flag = KINDS[command, name] is bool
    for nothing in ("", " ", "\t\n", "\u2003"):
        words = [*command.split(), *COMMANDS[command], f"{option}={nothing}"]
        assert "nothing after" in refused(words if flag else _words(command, name, info, [], nothing))
    if flag:
        refused([*command.split(), *COMMANDS[command], f"{option}=3"])
    elif option is not None:
        base = COMMANDS[command]
        refused([*command.split(), *base, option])  # and no value after it
        typo = option[:4] + option[5:] if len(option) > 5 else option + "x"
        if not any(_word(n, i) == typo for c, n, i in PARAMETERS if c == command):
            assert "unknown option" in refused([*command.split(), *base, typo, "1"])


@pytest.mark.parametrize("command", [c for c in COMMANDS if COMMANDS[c]])
def test_what_is_required_is_asked_for_by_its_name(refused, command):
    base = COMMANDS[command]
    for i, word in enumerate(base):
        if word.startswith("--"):
            assert word in refused([*command.split(), *base[:i], *base[i + 2 :]])
    assert "Missing argument" in refused(command.split())


@pytest.mark.parametrize(("words", "part"), CONTRADICTIONS, ids=[" ".join(w) for w, _ in CONTRADICTIONS])
def test_options_that_contradict_each_other_or_would_be_ignored_are_refused(refused, words, part):
    assert part in refused(words)


@pytest.mark.parametrize(("words", "part"), UNKNOWN, ids=[" ".join(w) for w, _ in UNKNOWN])
def test_what_nobody_knows_gets_the_nearest_name(refused, words, part):
    assert part in refused(words)


@pytest.fixture
def locked(place):
    """A folder that nobody may look into; made so before `refused` looks at what is there."""
    folder = place / "full"
    folder.chmod(0)
    if os.access(folder, os.X_OK):
        folder.chmod(0o755)
        pytest.skip("this process may read and write everything, as root does")
    yield folder
    folder.chmod(0o755)


@pytest.mark.parametrize(("command", "name"), PATHS, ids=[" ".join(p) for p in PATHS])
def test_a_path_without_permission_is_refused(locked, refused, command, name):
    info = next(i for c, n, i in PARAMETERS if (c, n) == (command, name))
    beside = WITH.get((command, name), [])
    refused(_words(command, name, info, beside, f"{locked}/below"), {2, PATHS[command, name][0] or 2})


def test_names_that_only_look_strange_are_paths_like_any_other(place, tmp_path, monkeypatch, tree):
    monkeypatch.setattr(cli, "get_command", lambda app: tree)
    out = tmp_path / "мир 🌀 e\u0301"
    with pytest.raises(SystemExit) as stop, redirect_stdout(io.StringIO()):
        cli.main(["rollout", str(place / "world"), str(place / "data"), "--out", str(out), "--length", "2"])
    assert stop.value.code == 0
    assert (out / "rollout.mp4").is_file()
    assert SPACE.width == 2
