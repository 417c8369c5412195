"""States whose author made the hashes fit: what no run writes is damaged, whatever it would have done later."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import small_dataset
from test_tokenizer_training import CONFIG as TOKENIZER
from test_tokenizer_training import stop_after
from test_training import CONFIG, TINY

from ahriuwu_cli.errors import CheckpointError, Interrupted
from ahriuwu_cli.models.sizes import SIZES
from ahriuwu_cli.training.assemble import assemble, fit_linear_tokenizer
from ahriuwu_cli.training.signals import StopRequest
from ahriuwu_cli.training.state import load_state, save_state
from ahriuwu_cli.training.tokenizer_loop import train_transformer_tokenizer

NAN = float("nan")
TWO = replace(CONFIG, log_every=3, save_every=1)  # after step 2 a line is begun, and two states are kept
GoOn = Callable[[Path, Callable[[str], None]], int]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[Path, GoOn]]:
    """By kind: a run with states of steps 1 and 2, and what goes on with a copy of it. It gives the step it came to."""
    folder = tmp_path_factory.mktemp("runs")
    store = small_dataset(folder / "data", frames=14)
    tokenizer = fit_linear_tokenizer(store, (8, 8), 6, 0.5)
    begun = {}

    def dynamics(config):
        def go_on(out, announce, stop_at=None):
            trainer = assemble(store, tokenizer, config, out, "train", device=torch.device("cpu"), announce=announce)
            found = trainer.step
            trainer.train(lambda line: None, StopRequest(), stop_at or max(found, 2) + 1)
            return found

        return go_on

    def transformer(config):
        def go_on(out, announce):
            said = []
            train_transformer_tokenizer(store, config, out, announce=lambda s: (said.append(s), announce(s)))
            return int(said[-2].split("after step ")[1].split()[0])

        return go_on

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "test", TINY)
        patch.setitem(SIZES, "paper", {**TINY, "conditioning": "token", "registers": 2, "linear_skip": False})
        for name, config in {
            "dynamics": TWO,
            "adamw": replace(TWO, optimizer="adamw"),
            "adafactor": replace(TWO, optimizer="adafactor"),
            "bfloat16": replace(TWO, optimizer_state="bfloat16"),
            "budget": replace(TWO, steps=None, budget=1e6),
            "a weight without gradient": replace(TWO, size="paper"),
        }.items():
            begun[name] = folder / name, dynamics(config)
            begun[name][1](begun[name][0], print, stop_at=2)
        stop, progress = stop_after(2)
        config = replace(TOKENIZER, save_every=1)
        with pytest.raises(Interrupted):
            train_transformer_tokenizer(store, config, folder / "tokenizer", stop=stop, progress=progress)
        begun["tokenizer"] = folder / "tokenizer", transformer(config)
        yield begun


KINDS = ("dynamics", "adamw", "adafactor", "bfloat16", "budget", "a weight without gradient", "tokenizer")


def silent(sentence: str) -> None:
    assert "damaged" not in sentence, sentence


def copied(runs, kind: str, out: Path) -> tuple[Path, GoOn]:
    """A copy of the run, and its newest state."""
    folder, go_on = runs[kind]
    shutil.copytree(folder, out)
    newest = sorted((out / "state").iterdir())[-1]
    assert newest.name == "step-00000002"
    return newest, go_on


def sealed_again(state: Path, change: Callable[[dict, dict], object]) -> None:
    tensors, document = load_state(state)
    change(tensors, document)
    shutil.rmtree(state)
    save_state(state, tensors, document)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_saves_is_what_it_expects(runs, tmp_path, kind):
    state, go_on = copied(runs, kind, tmp_path / "run")
    sealed_again(state, lambda tensors, document: None)
    assert go_on(tmp_path / "run", silent) == 2


def tensors(part: str, change: Callable[[torch.Tensor], torch.Tensor]):
    """Change the tensors whose names have this part."""

    def damage(held, document):
        names = [name for name in held if part in name and held[name].numel()]
        assert names
        held.update({name: change(held[name]).clone() for name in names})

    return damage


def field(name: str, value: object):
    return lambda held, document: document.update({name: value})


def without(name: str):
    return lambda held, document: document.pop(name)


def group(name: str, value: object, optimizer: int = 1):
    """Change a setting of an optimiser: 0 is Muon, 1 is AdamW."""
    return lambda held, document: document["optimizers"][optimizer]["groups"][0].update({name: value})


def described(**fields):
    return lambda held, document: document["optimizers"][0].update(fields)


DAMAGE = {
    "weights in int32": tensors("model.", lambda t: t.int()),
    "weights in bfloat16": tensors("model.", lambda t: t.bfloat16()),
    "weights that are not finite": tensors("model.", lambda t: t * NAN),
    "weights of another shape": tensors("model.", lambda t: t[None]),
    "a weight that is missing": lambda held, _: held.pop(next(n for n in held if n.startswith("model."))),
    "a tensor of nobody": lambda held, _: held.update({"model.zz": torch.zeros(2)}),
    "momentum that is not finite": tensors("momentum_buffer", lambda t: t / 0),
    "momentum of one number": tensors("momentum_buffer", lambda t: t.reshape(-1)[:1]),
    "momentum in int8": tensors("momentum_buffer", lambda t: t.to(torch.int8)),
    "no step of AdamW": lambda held, _: held.pop(next(n for n in held if n.endswith(".step"))),
    "a step of AdamW below 0": tensors(".step", lambda t: t * 0 - 1),
    "a mean of squares below 0": tensors("exp_avg_sq", lambda t: -t - 1),
    "a state of no parameter": lambda held, _: held.update({"optimizer0.99999.momentum_buffer": torch.zeros(2)}),
    "one step in all": field("total", 1),
    "a step more than was asked for": field("total", 7),
    "a text for a total": field("total", "x"),
    "no total": without("total"),
    "a text for the last line": field("logged", "x"),
    "a text for what was asked": field("run_json", "x"),
    "no settings in what was asked": lambda _, document: document["run_json"].pop("config"),
    "a list for the facts that were asked": lambda _, document: document["run_json"].update(facts=[]),
    "a line after its step": field("logged", 3),
    "no optimizers": without("optimizers"),
    "a text for optimizers": field("optimizers", "xyz"),
    "one optimizer": lambda _, document: document["optimizers"].pop(),
    "another optimizer": described(kind="SGD"),
    "an optimizer without a kind": lambda _, document: document["optimizers"][0].pop("kind"),
    "parameters of other shapes": described(shapes=[[[1]]]),
    "other tensors than are named": described(tensors=[]),
    "no groups": described(groups=[]),
    "nothing for groups": described(groups=None),
    "scalars": described(scalars={"0.zz": 5}),
    "scalars of strange names": described(scalars={"x.y": 5}),
    "a list of scalars": described(scalars=[1]),
    "betas": group("betas", [5, 5]),
    "a list for a momentum": group("momentum", [1], optimizer=0),
    "a text for a weight decay": group("weight_decay", "x"),
    "a text for a learning rate": group("lr", "x"),
    "a setting that it has not": group("zz", 1),
}
OF_DYNAMICS = {
    "an average that is not finite": tensors("average.", lambda t: t / 0),
    "an average in int32": tensors("average.", lambda t: t.int()),
    "sums of another shape": tensors("log", lambda t: t.reshape(-1)),
    "sums in int16": tensors("log", lambda t: t.to(torch.int16)),
    "sums that are not finite": tensors("log", lambda t: t * NAN),
    "half a count": tensors("log", lambda t: t / 1e300),
    "a text for a norm": field("grad_norms", ["x"]),
    "an object for norms": field("grad_norms", {"a": 1}),
    "norms whose sum is infinite": field("grad_norms", [1e308, 1e308]),
    "more norms than steps": field("grad_norms", [1.0] * 3),
    "time below 0": field("elapsed", -1e300),
    "no time at all": field("elapsed", 0),
    "no sums of the line that is begun": lambda held, _: held.pop("log"),
    "neither sums nor norms": lambda held, document: (held.pop("log"), document.pop("grad_norms")),
    "more time than there is": field("elapsed", 1e300),
    "a text for the time": field("elapsed", "x"),
    "a preview that took less than no time": field("looked", -1),
    "a best beyond all pictures": field("best", 1e308),
    "no best": without("best"),
    "a text for processes": field("processes", "x"),
    "no process": field("processes", 0),
    "a list for threads": field("threads", [1]),
    "true for accumulate": field("accumulate", True),
    "a number for a library": field("products", 5),
}
OF_TOKENIZERS = {
    "a running mean that is not finite": tensors("rms.", lambda t: t * NAN),
    "a running mean below 0": tensors("rms.", lambda t: -t.abs() - 1),
    "a running mean in float64": tensors("rms.", lambda t: t.double()),
}
ROWS = [("dynamics", name, damage) for name, damage in {**DAMAGE, **OF_DYNAMICS}.items()]
ROWS += [("tokenizer", name, damage) for name, damage in {**DAMAGE, **OF_TOKENIZERS}.items()]
ROWS += [
    ("adafactor", "a row of squares below 0", tensors("row_var", lambda t: -t - 1)),
    ("adafactor", "squares of a vector below 0", tensors("variance", lambda t: -t - 1)),
    ("adafactor", "a column of another length", tensors("col_var", lambda t: t[..., :1])),
    ("bfloat16", "momentum in float32", tensors("momentum_buffer", lambda t: t.float())),
    ("budget", "fewer steps than are done", field("total", 1)),
    ("budget", "a text for a total", field("total", "x")),
]


@pytest.mark.parametrize(("kind", "damage"), [(k, d) for k, _, d in ROWS], ids=[f"{k}: {n}" for k, n, _ in ROWS])
def test_what_no_run_writes_is_set_aside_and_the_state_before_it_is_used(runs, tmp_path, kind, damage):
    state, go_on = copied(runs, kind, tmp_path / "run")
    sealed_again(state, damage)
    said = []
    assert go_on(tmp_path / "run", said.append) == 1
    assert f"{state} is damaged (" in said[0]
    assert "set aside as step-00000002.damaged, going on from " in said[0]


@pytest.mark.parametrize("kind", ["dynamics", "tokenizer"])
def test_where_no_other_state_is_left_the_sentence_says_what_to_do(runs, tmp_path, kind):
    state, go_on = copied(runs, kind, tmp_path / "run")
    shutil.rmtree(state.with_name("step-00000001"))
    sealed_again(state, tensors("momentum_buffer", lambda t: t.to(torch.int8)))
    words = (
        r"2 is no state of this run \(optimizer0\.\S+ is int8 \[.*\] instead of float32 \[.*: start with --overwrite$"
    )
    with pytest.raises(CheckpointError, match=words):
        go_on(tmp_path / "run", silent)
    assert load_state(state)[1]["step"] == 2  # it stays


def test_states_from_before_some_fields_existed_are_gone_on_with(runs, tmp_path):
    state, go_on = copied(runs, "dynamics", tmp_path / "run")

    def older(held, document):
        held.pop("log")
        for name in ("grad_norms", "processes", "parallel", "accumulate", "threads", "products", "logged"):
            document.pop(name)
        for name in ("run", "run_json"):
            document.pop(name)

    sealed_again(state, older)
    assert go_on(tmp_path / "run", silent) == 2
