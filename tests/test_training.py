"""Training does what it says: exact resume, true step counts, features that stay on, worlds that learn."""

import itertools
import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from killing import differing_bytes
from small import LEARNERS, SPACE, gradients_of, small_dataset, small_world

from ahriuwu_cli import stopping
from ahriuwu_cli.commands import train as command
from ahriuwu_cli.commands.progress import training_bar
from ahriuwu_cli.config import ADDED, PRECISIONS, TrainConfig
from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.documents import read_object
from ahriuwu_cli.data.episode_writer import EpisodeWriter
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.latents import open_pack
from ahriuwu_cli.errors import CheckpointError, DataError, Interrupted, TrainingError, UserError
from ahriuwu_cli.evaluation.cells import weights_hash
from ahriuwu_cli.lock import refuse_alive
from ahriuwu_cli.models.dynamics import Dynamics
from ahriuwu_cli.models.linear_tokenizer import LinearTokenizer
from ahriuwu_cli.training import assemble as assemble_module
from ahriuwu_cli.training import loop
from ahriuwu_cli.training import preview as training_preview
from ahriuwu_cli.training import run as training_run
from ahriuwu_cli.training.assemble import assemble, fit_linear_tokenizer
from ahriuwu_cli.training.batches import draw_batch, share_of
from ahriuwu_cli.training.checkpoint import load_tokenizer, load_world, save_tokenizer
from ahriuwu_cli.training.clip_loss import denoiser
from ahriuwu_cli.training.config_json import identity, seal
from ahriuwu_cli.training.distributed import Group
from ahriuwu_cli.training.finite import check_finite, not_finite
from ahriuwu_cli.training.loop import DynamicsTrainer
from ahriuwu_cli.training.optimiser import rate
from ahriuwu_cli.training.preview import choose_sampler, stands_still
from ahriuwu_cli.training.resampling import resampled
from ahriuwu_cli.training.run import Run
from ahriuwu_cli.training.signals import StopRequest
from ahriuwu_cli.training.state import read_document
from ahriuwu_cli.training.states import SAVE_SECONDS, States

TINY = {"width": 16, "depth": 2, "heads": 2, "kv_heads": 2, "mlp_hidden": 32, "window": 6, "time_every": 2, "k_max": 8}
CONFIG = TrainConfig(size="test", steps=6, budget=None, batch=4, frames=6, log_every=1, preview_windows=2, warmup=2)


@pytest.fixture
def data(tmp_path, monkeypatch):
    from ahriuwu_cli.models.sizes import SIZES

    monkeypatch.setitem(SIZES, "test", TINY)
    store = small_dataset(tmp_path / "data")
    return store, fit_linear_tokenizer(store, (8, 8), 6, 0.5)


def run(data, out, config=CONFIG, stop_at=None, **options):
    store, tokenizer = data
    trainer = assemble(store, tokenizer, config, out, "train", device=torch.device("cpu"), **options)
    trainer.train(lambda line: None, StopRequest(), stop_at)
    return trainer


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


VARIANTS = {
    "plain": CONFIG,
    "accumulated": replace(CONFIG, accumulate=2),
    "long and short": replace(CONFIG, long_frames=12, long_every=2),
    "images": replace(CONFIG, single_image_share=0.5),
    "adamw": replace(CONFIG, optimizer="adamw"),
    "adafactor": replace(CONFIG, optimizer="adafactor"),
    "momentum in bfloat16": replace(CONFIG, optimizer_state="bfloat16"),
    "rates of their own": replace(CONFIG, muon_momentum=0.8, adamw_lr_scale=0.3),
    "activations again": replace(CONFIG, checkpoint_activations=True),
    "horizon": replace(CONFIG, forcing="horizon", single_image_share=1.0),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(data, tmp_path, config):
    whole = run(data, tmp_path / "whole", config)
    run(data, tmp_path / "broken", config, stop_at=3)
    resumed = run(data, tmp_path / "broken", config, resume=True)
    assert resumed.step == whole.step == 6
    for part in ("model", "average"):
        a, b = getattr(whole, part).state_dict(), getattr(resumed, part).state_dict()
        assert all(torch.equal(a[n], b[n]) for n in a), part
    losses = [[(x["step"], x["loss"]) for x in lines(tmp_path / r) if "loss" in x] for r in ("whole", "broken")]
    assert losses[0] == losses[1]
    assert [s for s, _ in losses[0]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("optimizer", "state"), LEARNERS)
def test_a_state_that_is_saved_before_the_next_step_is_the_one_that_was_loaded(
    data, tmp_path, optimizer, state, precision
):
    config = replace(CONFIG, optimizer=optimizer, optimizer_state=state, precision=precision, log_every=5)
    run(data, tmp_path / "r", config, stop_at=2)
    trainer = assemble(*data, config, tmp_path / "r", "train", device=torch.device("cpu"))
    before = {path: path.read_bytes() for path in (tmp_path / "r" / "state").rglob("*.*")}
    trainer.run.save(trainer)
    trainer.run.release()
    assert len(before) == 2
    assert {path: path.read_bytes() for path in (tmp_path / "r" / "state").rglob("*.*")} == before


def test_a_tokenizer_fitted_to_some_frames_takes_them_at_other_times_of_other_episodes(tmp_path, monkeypatch):
    with EpisodeWriter(tmp_path / "d", height=16, width=16, fps=10.0, action_space=ActionSpace(), seed=0) as writer:
        clip = np.zeros((20, 16, 16, 3), np.uint8)
        clip[1::2] = 255  # it blinks
        for _ in range(4):
            writer.add(clip, None, split="train")
    store = EpisodeStore.open(tmp_path / "d")
    means = []
    for frames in (80, 40):
        monkeypatch.setattr(assemble_module, "FIT_FRAMES", frames)
        means.append(fit_linear_tokenizer(store, (8, 8), 2, 0.5).mean)
    assert torch.allclose(*means)


def test_a_copy_of_a_run_by_hard_links_keeps_its_log(data, tmp_path):
    run(data, tmp_path / "r", stop_at=3)
    shutil.copytree(tmp_path / "r", tmp_path / "backup", copy_function=os.link)
    before = (tmp_path / "backup" / "metrics.jsonl").read_bytes()
    run(data, tmp_path / "r")
    assert (tmp_path / "backup" / "metrics.jsonl").read_bytes() == before
    run(data, tmp_path / "whole")
    assert differing_bytes(tmp_path / "whole", tmp_path / "r") == {}


def test_a_line_of_metrics_that_a_kill_cut_short_is_gone_after_a_resume(data, tmp_path):
    run(data, tmp_path / "r", stop_at=3)
    with open(tmp_path / "r" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 0.1')
    run(data, tmp_path / "r", resume=True)
    assert [line["step"] for line in lines(tmp_path / "r") if "loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("config", [replace(CONFIG, **ADDED), replace(CONFIG, optimizer="adamw")])
def test_a_run_from_before_some_settings_were_is_gone_on_with_where_they_are_as_they_were(data, tmp_path, config):
    assert not ADDED.keys() & config.to_json().keys()  # a state is known by a hash of these
    assert TrainConfig.from_json(config.to_json() | {"optimizer": "muon"}) == replace(config, optimizer="muon", **ADDED)
    old = TrainConfig.from_json(config.to_json())
    assert (old.muon_momentum, old.adamw_lr_scale) == (0.95, 1.0)  # of the versions without these settings
    run(data, tmp_path / "r", config, stop_at=2)
    assert not ADDED.keys() & json.loads((tmp_path / "r" / "run.json").read_text())["config"].keys()
    for name, value in ADDED.items() if config.optimizer == "muon" else []:
        with pytest.raises(UserError, match=f"{name} {value} -> {value / 2}"):
            run(data, tmp_path / "r", replace(config, **{name: value / 2}), resume=True)
    assert run(data, tmp_path / "r", config, resume=True).step == 6
    said = json.loads((tmp_path / "r" / "last" / "config.json").read_text())["facts"]["train"]
    assert {name: said[name] for name in ADDED} == {name: getattr(config, name) for name in ADDED}


def test_a_resume_with_other_settings_is_refused_and_names_them(data, tmp_path):
    run(data, tmp_path / "r", stop_at=2)
    with pytest.raises(UserError, match=r"lr 0\.003 -> 0\.001"):
        run(data, tmp_path / "r", replace(CONFIG, lr=1e-3), resume=True)


class Ended(BaseException):
    """Stands for the end of the process where a signal or a kill finds it."""


def replaced_by_a_file(world):
    shutil.rmtree(world)
    world.touch()


def left_with_its_tokenizer_alone(world):
    (world / "config.json").unlink()
    (world / "model.safetensors").unlink()


def stating(change):
    """A world that states something else, under a hash that fits."""

    def replaced(world):
        path = world / "config.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(seal(document)))

    return replaced


def given_another_tokenizer(world):
    tokenizer = load_tokenizer(world)
    tokenizer.mean += 1
    save_tokenizer(tokenizer, world / "tokenizer", {})


LOSSES = [
    shutil.rmtree, replaced_by_a_file, left_with_its_tokenizer_alone, given_another_tokenizer,
    stating(lambda d: d["facts"]["train"].update(seed=7)), stating(lambda d: d["facts"].update(init_from="/a/world")),
    *(stating(lambda d, start=start: d["facts"].update(init_from=start)) for start in (7, ["a"], {}, "a\0b")),
    stating(lambda d: d["facts"]["train"].update(muon_momentum=0.5)),
    stating(lambda d: d["facts"].update(averaged_with={})), stating(lambda d: d.update(fps=2 * d["fps"])),
    stating(lambda d: d["action_space"]["components"][0].update(labels=["A", "B"])),
    lambda world: (world / "model.safetensors").write_bytes(b""),
    lambda world: (world / "model.safetensors").unlink(), lambda world: (world / "config.json").unlink(),
]  # fmt: skip


@pytest.mark.parametrize("damage", LOSSES)
def test_a_world_that_was_lost_is_made_anew_and_said(data, tmp_path, damage):
    run(data, tmp_path / "r")
    last = load_world(tmp_path / "r" / "last", "cpu")
    for name in ("best", "last"):
        damage(tmp_path / "r" / name)
    again = run(data, tmp_path / "r")
    anew = "best and last is missing, damaged or another run's, and made anew"
    assert f"is finished: all 6 steps are done; {anew}" in again.run.found
    for name in ("best", "last"):
        assert weights_hash(load_world(tmp_path / "r" / name, "cpu")) == weights_hash(last)
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "r").rglob("*") if p.name != ".lock")
    assert run(data, tmp_path / "r").run.lacking == []
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "r").rglob("*") if p.name != ".lock") == before
    shutil.rmtree(tmp_path / "r" / "state" / "step-00000006")  # an unfinished run makes them with its next previews
    for name in ("best", "last"):
        damage(tmp_path / "r" / name)
    assert run(data, tmp_path / "r").finished
    for name in ("best", "last"):
        assert weights_hash(load_world(tmp_path / "r" / name, "cpu")) == weights_hash(last)
    run(data, tmp_path / "b", stop_at=3)
    damage(tmp_path / "b" / "best")
    assert "best is missing" in run(data, tmp_path / "b").run.found
    assert load_world(tmp_path / "b" / "best", "cpu").facts["step"] >= 4


@pytest.mark.parametrize(("taken", "place"), [("best", "last"), ("last", "best")])
def test_one_world_of_a_run_in_the_place_of_its_other_is_noticed(data, tmp_path, taken, place):
    config = replace(CONFIG, preview_every=1, lr=1.0)  # it gets worse: the best world is not the last
    first = run(data, tmp_path / "r", config)
    places = {name: tmp_path / "r" / name for name in ("best", "last")}
    hashes = {name: weights_hash(load_world(path, "cpu")) for name, path in places.items()}
    assert first.finished
    assert hashes["best"] != hashes["last"]
    shutil.rmtree(places[place])
    shutil.copytree(places[taken], places[place])
    again = run(data, tmp_path / "r", config)
    assert f"; {place} is missing, damaged or another run's, and made anew" in again.run.found
    assert weights_hash(load_world(places[place], "cpu")) == hashes["last"]  # of the state that is there


def _ever_better(look):
    gains = itertools.count()

    def preview(*arguments):
        seen = look(*arguments)
        return seen | {"gain_db": dict.fromkeys(seen["gain_db"], float(next(gains)))}

    return preview


def test_a_best_that_is_newer_than_the_state_stays_and_another_one_of_its_step_does_not(data, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "preview", _ever_better(loop.preview))
    config = replace(CONFIG, steps=8, preview_every=2, save_every=4)
    run(data, tmp_path / "r", config, stop_at=6)
    shutil.rmtree(tmp_path / "r" / "state" / "step-00000006")  # as if it had been killed between its best and its state
    assert load_world(tmp_path / "r" / "best", "cpu").facts["step"] == 6
    again = run(data, tmp_path / "r", config, stop_at=5)
    assert again.run.lacking == []
    assert again.run.written == {"best": identity(read_object(tmp_path / "r" / "best" / "config.json"))}
    run(data, tmp_path / "b", config, stop_at=4)
    stating(lambda d: d.update(frame_skip=d["frame_skip"] + 1))(tmp_path / "b" / "best")
    assert run(data, tmp_path / "b", config, stop_at=5).run.lacking == ["best"]


def test_worlds_of_a_last_preview_that_was_killed_are_the_runs_own(data, tmp_path, monkeypatch):
    config = replace(CONFIG, preview_every=100, keep=2)
    run(data, tmp_path / "r", config)
    state = tmp_path / "r" / "state" / "step-00000006"

    def killed(self, trainer, save=Run.save):
        if trainer.finished:
            raise Ended
        save(self, trainer)

    with monkeypatch.context() as dying:
        dying.setattr(Run, "save", killed)
        with pytest.raises(Ended):
            run(data, tmp_path / "k", config)
    assert (tmp_path / "k" / "last").exists()
    again = run(data, tmp_path / "k", config)
    assert again.run.found.endswith("after step 6 of 6: its last preview is left")
    before, after = (read_document(f / "state" / state.name)[0] for f in (tmp_path / "r", tmp_path / "k"))
    assert before["worlds"] == after["worlds"]


def test_a_run_of_an_older_version_does_not_say_what_it_wrote_and_goes_on(data, tmp_path, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(Run, "save_state", _without_worlds(Run.save_state))
        run(data, tmp_path / "r", stop_at=4)
    again = run(data, tmp_path / "r")
    assert again.run.lacking == []
    assert "last" in again.run.written


def test_a_best_of_a_last_preview_that_was_killed_is_the_runs_own(data, tmp_path, monkeypatch):
    def killed(self, trainer, save=Run.save):
        if trainer.finished:
            raise Ended
        save(self, trainer)

    monkeypatch.setattr(loop, "preview", _ever_better(loop.preview))
    config = replace(CONFIG, steps=2, preview_every=1)
    with monkeypatch.context() as dying:
        dying.setattr(Run, "save", killed)
        with pytest.raises(Ended):
            run(data, tmp_path / "k", config)
    assert load_world(tmp_path / "k" / "best", "cpu").facts["step"] == 2
    says = read_document(tmp_path / "k" / "state" / "step-00000002")[0]["worlds"]["best"]
    assert says != identity(read_object(tmp_path / "k" / "best" / "config.json"))  # of the preview before
    again = run(data, tmp_path / "k", config)
    assert again.run.lacking == []
    assert again.run.found.endswith("after step 2 of 2: its last preview is left")


@pytest.mark.parametrize(("taken", "place"), [("best", "last"), ("last", "best")])
def test_a_finished_run_of_an_older_version_knows_its_worlds_by_gain_and_step(
    data, tmp_path, monkeypatch, taken, place
):
    config = replace(CONFIG, preview_every=1, lr=1.0)  # it gets worse: the best world is not the last
    with monkeypatch.context() as older:
        older.setattr(Run, "save_state", _without_worlds(Run.save_state))
        run(data, tmp_path / "r", config)
    assert run(data, tmp_path / "r", config).run.lacking == []
    shutil.rmtree(tmp_path / "r" / place)
    shutil.copytree(tmp_path / "r" / taken, tmp_path / "r" / place)
    assert run(data, tmp_path / "r", config).run.lacking == [place]


def _without_worlds(save_state):
    def save(self, step, tensors, document):
        del document["worlds"]
        save_state(self, step, tensors, document)

    return save


AT_ONCE = "all 6 steps are done and saved, the worlds come of: train --resume"


@pytest.mark.parametrize(
    ("place", "name", "lost", "said"),
    [
        (Run, "save", False, "stopped by signal 10 at step 6; state saved, go on with: train --resume"),
        (loop, "choose_sampler", False, f"stopped by signal 10; {AT_ONCE}"),
        (Run, "save_world", False, f"stopped by signal 10; {AT_ONCE}"),
        (loop, "choose_sampler", True, f"stopped by signal 10; {AT_ONCE}"),
        (Run, "save_world", True, f"stopped by signal 10; {AT_ONCE}"),
    ],
)
def test_a_signal_in_the_last_preview_ends_the_run_and_only_the_preview_is_done_again(
    data, tmp_path, monkeypatch, place, name, lost, said
):
    config = replace(CONFIG, optimizer_state="bfloat16")  # the state is saved again, with no step between
    run(data, tmp_path / "whole", config)
    if lost:
        shutil.copytree(tmp_path / "whole", tmp_path / "r")
        shutil.rmtree(tmp_path / "r" / "last")
    before = getattr(place, name)

    def signalled(*arguments, **named):
        if place is loop or next(a for a in arguments if isinstance(a, DynamicsTrainer)).step == 6:
            os.kill(os.getpid(), signal.SIGUSR1)
        return before(*arguments, **named)

    def ended(number, sentence):
        raise Ended(sentence)

    store, tokenizer = data
    with monkeypatch.context() as patch, StopRequest() as stop:
        patch.setattr(place, name, signalled)
        patch.setattr(stopping, "end", ended)
        trainer = assemble(store, tokenizer, config, tmp_path / "r", "train", device=torch.device("cpu"))
        with pytest.raises((Interrupted, Ended)) as stopped:
            trainer.train(lambda line: None, stop)
    assert str(stopped.value) == said
    updates = []
    monkeypatch.setattr(DynamicsTrainer, "_update", updates.append)
    again = run(data, tmp_path / "r", config, resume=True)
    assert lost or again.run.found.endswith("after step 6 of 6: its last preview is left")
    assert (updates, differing_bytes(tmp_path / "whole", tmp_path / "r")) == ([], {})


@pytest.mark.parametrize(("compiled", "step", "ends"), [(True, 0, True), (True, 1, False), (False, 0, False)])
def test_a_signal_while_the_first_step_is_compiled_does_not_wait_for_it(
    data, tmp_path, monkeypatch, compiled, step, ends
):
    def ended(number, sentence):
        raise Ended(sentence)

    update = DynamicsTrainer._update

    def signalled(trainer):
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGUSR1)
        return update(trainer)

    monkeypatch.setattr(Dynamics, "compile_blocks", lambda self: None)  # seconds of a compiler are not what counts here
    monkeypatch.setattr(DynamicsTrainer, "_update", signalled)
    monkeypatch.setattr(stopping, "end", ended)
    store, tokenizer = data
    with StopRequest(at_once="start again with: this") as stop:
        config = replace(CONFIG, compile=compiled)
        trainer = assemble(store, tokenizer, config, tmp_path / "r", "train", device=torch.device("cpu"))
        with pytest.raises((Interrupted, Ended)) as stopped:
            trainer.train(lambda line: None, stop)
    assert isinstance(stopped.value, Ended) == ends
    assert ("start again with: this" in str(stopped.value)) == ends
    assert (trainer.run.states.newest() is None) == ends


def test_a_signal_once_all_is_written_says_that_the_run_is_complete(data, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(StopRequest, "end_at_once", lambda stop, sentence: said.append(sentence))
    for _ in range(2):  # trained, and found finished
        run(data, tmp_path / "r")
        assert said[-1] == f"{tmp_path / 'r'} is complete"


def test_a_preview_that_is_not_finite_says_the_step_and_what_is_saved(data, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise TrainingError("the rollouts of 1 of 2 windows are not finite")

    monkeypatch.setattr("ahriuwu_cli.training.preview.quick_gain", broken)
    with pytest.raises(TrainingError, match=r"after step 2 the rollouts .* not finite; no state is saved yet"):
        run(data, tmp_path / "r")


def test_weights_to_start_from_are_the_same_by_whatever_path(data, tmp_path, monkeypatch):
    run(data, tmp_path / "r", stop_at=3)
    run(data, tmp_path / "again", stop_at=1, init_from=tmp_path / "r" / "best")
    monkeypatch.chdir(tmp_path / "r")
    assert run(data, tmp_path / "again", stop_at=2, init_from=Path("best")).step == 2
    document = read_object(tmp_path / "again" / "run.json")
    del document["init_from_here"]
    document["facts"]["init_from"] = "best"  # as runs of older versions say it
    (tmp_path / "again" / "run.json").write_text(json.dumps(document))
    assert run(data, tmp_path / "again", stop_at=3, init_from=tmp_path / "r" / "best").step == 3
    with pytest.raises(UserError, match="other settings"):
        run(data, tmp_path / "again", init_from=tmp_path / "r" / "last")


def test_a_run_goes_on_where_a_link_leads_to_the_world_it_started_from_though_that_lies_elsewhere(data, tmp_path):
    run(data, tmp_path / "a", stop_at=3)
    start = tmp_path / "a" / "best"
    run(data, tmp_path / "b", stop_at=2, init_from=start)
    (tmp_path / "big").mkdir()
    (tmp_path / "a").rename(tmp_path / "big" / "a")
    (tmp_path / "a").symlink_to(tmp_path / "big" / "a")
    assert run(data, tmp_path / "b", stop_at=3, init_from=start).step == 3
    assert run(data, tmp_path / "b", stop_at=4, init_from=tmp_path / "big" / "a" / "best").step == 4
    shutil.rmtree(tmp_path / "big")
    finished = run(data, tmp_path / "b", init_from=start)  # once a state is saved that world may be gone
    assert finished.finished
    assert run(data, tmp_path / "b", init_from=start).run.lacking == []
    with pytest.raises(UserError, match="other settings"):
        run(data, tmp_path / "b", init_from=tmp_path / "a" / "last")


def test_a_run_whose_run_json_was_altered_to_name_another_start_goes_on_by_its_states(data, tmp_path):
    run(data, tmp_path / "a", stop_at=3)
    run(data, tmp_path / "b", stop_at=2, init_from=tmp_path / "a" / "best")
    path = tmp_path / "b" / "run.json"
    whole = path.read_bytes()
    document = json.loads(whole)
    document["facts"]["init_from"] = "elsewhere"
    path.write_text(json.dumps(document))
    assert run(data, tmp_path / "b", stop_at=3, init_from=tmp_path / "a" / "best").step == 3
    assert path.read_bytes() == whole


@pytest.mark.parametrize("saved", [True, False])
def test_a_run_goes_on_after_it_was_moved_together_with_the_world_it_starts_from(data, tmp_path, saved):
    project = tmp_path / "project"
    run(data, project / "r", stop_at=3)
    run(data, project / "again", stop_at=1, init_from=project / "r" / "best")
    if not saved:
        shutil.rmtree(project / "again" / "state")
        document = read_object(project / "again" / "run.json")
        del document["state_saved"]  # as a kill before the first state leaves it
        (project / "again" / "run.json").write_text(json.dumps(document))
    moved = project.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="other settings"):
        run(data, moved / "again", stop_at=2, init_from=moved / "r" / "last")
    assert run(data, moved / "again", stop_at=2, init_from=moved / "r" / "best").step == 2
    (moved / "again").rename(tmp_path / "again")
    assert run(data, tmp_path / "again", init_from=moved / "r" / "best", overwrite=True).step == 6
    facts = read_object(tmp_path / "again" / "run.json")["facts"]
    assert facts["init_from"] == str(moved / "r" / "best")


def test_weights_to_start_from_are_not_missed_once_a_state_is_saved(data, tmp_path):
    run(data, tmp_path / "r")
    run(data, tmp_path / "again", stop_at=3, init_from=tmp_path / "r" / "last")
    shutil.move(tmp_path / "r", tmp_path / "gone")
    assert run(data, tmp_path / "again", init_from=tmp_path / "r" / "last").step == 6
    with pytest.raises(CheckpointError, match="no checkpoint"):
        run(data, tmp_path / "new", init_from=tmp_path / "r" / "last")


@pytest.fixture
def fits(data, monkeypatch):
    """fits(out, ...) is the command without --tokenizer, to its end; only_begin() lets it end before the first step.

    other_bits() has each tokenizer that is fitted from now on differ a little, as on another number of threads.
    """
    store, count = data[0], iter(range(1, 1000))
    given = {"dataset": store.path, "tokenizer": None, "resume": False, "overwrite": False, "init_from": None}

    def fits(out, **options):
        group = Group(torch.device("cpu"))
        return command._train(group, CONFIG, StopRequest(), {**given, "out": out, **options}, quiet=True)

    def only_begin():
        monkeypatch.setattr(DynamicsTrainer, "train", lambda trainer, *_: trainer.run.release())

    def nudged(*arguments):
        tokenizer = fit_linear_tokenizer(*arguments)
        tokenizer.mean += next(count) * 1e-6
        return tokenizer

    fits.only_begin = only_begin
    fits.other_bits = lambda: monkeypatch.setattr(assemble_module, "fit_linear_tokenizer", nudged)
    return fits


def left_by_kills(work, out, monkeypatch):
    """Copies of a folder as a kill would leave it, before each thing that `work` renames, makes or removes."""
    left = []

    def before(act):
        def copied(*arguments, **named):
            if out.exists() and not copying:
                copying.append(True)
                left.append(out.with_name(f"{out.name} {len(left)}"))
                shutil.copytree(out, left[-1])
                copying.clear()
            return act(*arguments, **named)

        return copied

    copying = []
    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, before(getattr(os, name)))
        work()
    return left


LIVES = {  # what is there before the life in which the kills fall
    "the first": lambda out: shutil.rmtree(out),
    "another": lambda out: None,
    "without its tokenizer": lambda out: shutil.rmtree(out / "tokenizer"),
    "with a damaged one": lambda out: (out / "tokenizer" / "model.safetensors").write_bytes(b"x"),
    "with a file": lambda out: replaced_by_a_file(out / "tokenizer"),
    "overwritten": lambda out: None,
}


@pytest.mark.parametrize("life", LIVES)
def test_a_run_has_the_tokenizer_that_it_says_wherever_a_start_of_it_was_killed(
    data, fits, tmp_path, monkeypatch, life
):
    fits.only_begin()
    fits.other_bits()
    out = tmp_path / "r"
    fits(out)
    first = load_tokenizer(out / "tokenizer").fingerprint()
    LIVES[life](out)
    left = left_by_kills(lambda: fits(out, overwrite=life == "overwritten"), out, monkeypatch)
    assert len(left) > (1 if life == "another" else 3)
    for folder in (out, *left):
        if folder is not out:
            fits(folder)
        kept = load_tokenizer(folder / "tokenizer").fingerprint()
        assert read_object(folder / "run.json")["facts"]["tokenizer_hash"] == kept
        names = {p.name for p in folder.iterdir()} - {"tokenizer.damaged"}
        assert names == {".lock", "run.json", "tokenizer"}, folder
    assert (load_tokenizer(out / "tokenizer").fingerprint() == first) == (life == "another")


@pytest.mark.parametrize("fitted", [True, False])
@pytest.mark.parametrize("stop_at", [None, 3])
@pytest.mark.parametrize("damage", [shutil.rmtree, replaced_by_a_file])
def test_a_run_that_lost_its_tokenizer_copies_or_fits_it_again_and_goes_on_with_no_other(
    fits, tmp_path, monkeypatch, capfd, damage, stop_at, fitted
):
    fits(tmp_path / "whole")
    with monkeypatch.context() as patch:
        before = DynamicsTrainer.train
        patch.setattr(DynamicsTrainer, "train", lambda trainer, *more: before(trainer, *more, stop_at))
        fits(tmp_path / "r")
    damage(tmp_path / "r" / "tokenizer")
    if fitted:
        monkeypatch.setattr(training_run, "copy_of_tokenizer", lambda folder: None)
    shutil.copytree(tmp_path / "r", tmp_path / "other")

    def held(tokenizer, folder, facts):
        with pytest.raises(UserError, match="alive"):
            refuse_alive(folder.parent)
        save_tokenizer(tokenizer, folder, facts)

    monkeypatch.setattr(training_run, "save_tokenizer", held)
    fits(tmp_path / "r")
    way = "fitted anew" if fitted else f"copied from {tmp_path / 'r' / 'best' / 'tokenizer'}"
    assert f"{tmp_path / 'r' / 'tokenizer'} is missing or damaged, and {way}" in capfd.readouterr().err
    (tmp_path / "r" / "tokenizer.damaged").unlink(missing_ok=True)
    assert differing_bytes(tmp_path / "whole", tmp_path / "r") == {}
    fits(tmp_path / "r")
    assert "missing or damaged" not in capfd.readouterr().err
    fits.other_bits()
    if fitted:
        with pytest.raises(UserError, match="tokenizer_hash differs"):
            fits(tmp_path / "other")
    else:
        fits(tmp_path / "other")


@pytest.mark.parametrize("path", ["r/tokenizer", "r", "r/best", "run/tokenizer", "r/../fitted"])
def test_a_run_keeps_its_own_tokenizer_by_whatever_path_it_is_given_back(fits, tmp_path, monkeypatch, capfd, path):
    fits.only_begin()
    fits(tmp_path / "r")
    first = load_tokenizer(tmp_path / "r" / "tokenizer").fingerprint()
    shutil.copytree(tmp_path / "r" / "tokenizer", tmp_path / "r" / "best" / "tokenizer")  # a preview's world
    (tmp_path / "run").symlink_to("r")
    (tmp_path / "fitted").symlink_to("r/tokenizer")
    fits.other_bits()
    monkeypatch.chdir(tmp_path)
    for out in ("r", tmp_path / "r", "run"):
        fits(Path(out), tokenizer=Path(path))
        assert load_tokenizer(tmp_path / "r" / "tokenizer").fingerprint() == first
        assert read_object(tmp_path / "r" / "run.json")["fits_tokenizer"] is True
    shutil.rmtree(tmp_path / "r" / "tokenizer")
    fits(Path("r"), tokenizer=Path(path))
    assert "r/tokenizer is missing or damaged, and fitted anew" in capfd.readouterr().err
    assert load_tokenizer(tmp_path / "r" / "tokenizer").fingerprint() != first  # nothing was trained on it


def test_a_run_with_a_tokenizer_of_others_is_not_the_run_that_fits_its_own(data, fits, tmp_path):
    fits.only_begin()
    save_tokenizer(data[1], tmp_path / "tok", {})
    fits(tmp_path / "r", tokenizer=tmp_path / "tok")
    assert not (tmp_path / "r" / "tokenizer").exists()
    with pytest.raises(UserError, match=r"other settings \(tokenizer_hash differs"):
        fits(tmp_path / "r")
    fits(tmp_path / "own")
    with pytest.raises(UserError, match=r"other settings \(tokenizer_hash differs"):
        fits(tmp_path / "own", tokenizer=tmp_path / "tok")
    for mine in ("tokenizer", "best"):
        with pytest.raises(CheckpointError, match="no checkpoint at"):  # none of its own, and none is fitted unasked
            fits(tmp_path / "r", tokenizer=tmp_path / "r" / mine)
    shutil.move(tmp_path / "tok", tmp_path / "r" / "mine")
    fits(tmp_path / "r", tokenizer=tmp_path / "r" / "mine")  # what lies in a run's folder beside its own is the user's
    assert {p.name for p in (tmp_path / "r").iterdir()} == {".lock", "run.json", "mine"}


def test_the_tokenizer_in_the_worlds_of_a_run_that_was_given_one_does_not_become_its_own(data, fits, tmp_path):
    save_tokenizer(data[1], tmp_path / "tok", {})
    fits(tmp_path / "r", tokenizer=tmp_path / "tok")
    before = {p.name for p in (tmp_path / "r").iterdir()}
    fits(tmp_path / "r", tokenizer=tmp_path / "r" / "best")  # finished: nothing changes
    assert (
        {p.name for p in (tmp_path / "r").iterdir()}
        == before
        == {".lock", "run.json", "metrics.jsonl", "state", "best", "last"}
    )
    with pytest.raises(UserError, match=r"other settings \(tokenizer_hash differs"):
        fits(tmp_path / "r")


def test_a_used_folder_is_never_overwritten_unasked(data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for options in ({}, {"resume": True}):
        with pytest.raises(UserError, match=r"not empty|no run to resume but other files"):
            run(data, tmp_path / "mine", **options)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    run(data, tmp_path / "r", stop_at=1)
    with pytest.raises(UserError, match=r"lr 0\.003 -> 0\.001.*--overwrite"):
        run(data, tmp_path / "r", replace(CONFIG, lr=1e-3))
    assert run(data, tmp_path / "r", replace(CONFIG, lr=1e-3), overwrite=True).step == 6


def test_the_run_saves_a_world_that_can_be_loaded_and_logs_its_gain(data, tmp_path):
    trainer = run(data, tmp_path / "r")
    world = load_world(tmp_path / "r", "cpu")
    assert world.facts["preview_gain_db"] == trainer.best
    last = load_world(tmp_path / "r" / "last", "cpu").facts["preview_gain_db"]
    previews = [line["preview"] for line in lines(tmp_path / "r") if "preview" in line]
    assert len(previews) == 3
    gains = [list(p["gain_db"].values())[-1] for p in previews]
    assert trainer.best == max(gains)
    assert last == gains[-1]
    assert (tmp_path / "r" / "last" / "config.json").is_file()
    assert len(list((tmp_path / "r" / "state").iterdir())) == CONFIG.keep


@pytest.mark.parametrize("ramp", ["paper", "inverted", "flat"])
@pytest.mark.parametrize("forcing", ["independent", "prefix", "horizon", "committed", "resampled"])
@pytest.mark.parametrize("batch", [1, 4])
def test_bootstrap_stays_on_with_every_other_flag(data, tmp_path, ramp, forcing, batch):
    config = replace(CONFIG, ramp=ramp, forcing=forcing, batch=batch, steps=12, bootstrap_share=0.5)
    run(data, tmp_path / "r", config)
    seen = [line["bootstrap"] is not None for line in lines(tmp_path / "r") if "loss" in line]
    assert any(seen) == (forcing != "horizon")  # the review's horizon schedule has no d > d_min


def test_the_same_step_draws_the_same_batch_and_other_steps_others(data, tmp_path):
    trainer = run(data, tmp_path / "r", stop_at=1)

    def draw(step, **kw):
        return draw_batch(trainer.pack, replace(CONFIG, accumulate=2), 8, step, **kw)

    a, b = draw(3), draw(3)
    assert a.windows == b.windows
    assert torch.equal(a.noise, b.noise)
    assert torch.equal(a.tau, b.tau)
    for other in (draw(4), draw(3, micro=1), draw(3, rank=1, world=2)):
        assert not torch.equal(a.noise[0], other.noise[0])


def test_a_batch_lines_up_latents_and_actions(data, tmp_path):
    store, tokenizer = data
    trainer = run(data, tmp_path / "r", stop_at=1)
    batch = draw_batch(trainer.pack, CONFIG, 8, 0)
    for i, window in enumerate(batch.windows):
        episode, start = window.split(":")
        start = int(start)
        frames = torch.from_numpy(store.frames(episode, start, start + 6))[None]
        assert torch.allclose(batch.z_clean[i], tokenizer.encode(frames)[0], atol=2e-2)
        # incoming: the action beside frame t is the one that led to it
        assert np.array_equal(batch.actions[i, 1:].numpy(), store.actions(episode, start, start + 5))
        assert batch.known[i].tolist() == [False] + [True] * 5


def test_the_past_of_committed_forcing_is_the_clip_at_tau_ctx_with_noise_of_its_own(data, tmp_path):
    trainer = run(data, tmp_path / "r", stop_at=1)
    config = replace(CONFIG, forcing="committed", tau_ctx=0.3, batch=64, bootstrap_share=0.25)
    batch = draw_batch(trainer.pack, config, 8, 0)
    assert draw_batch(trainer.pack, replace(config, forcing="context"), 8, 0).past is None
    assert bool((batch.past.tau == torch.tensor(0.3)).all())
    assert bool((batch.past.d == 1 / 8).all())
    noise = (batch.past.z - 0.7 * batch.z_clean) / 0.3
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    corner = torch.corrcoef(torch.stack([noise.flatten(), batch.noise.flatten(), noise.roll(1, 0).flatten()]))
    assert (corner - torch.eye(3)).abs().max() < 0.05
    plain = draw_batch(trainer.pack, replace(config, forcing="independent"), 8, 0)
    assert torch.equal(batch.tau, plain.tau)  # eq. 4 for what is trained, and all else as it is there
    assert torch.equal(batch.noise, plain.noise)
    halves = [draw_batch(trainer.pack, config, 8, 0, rank=rank, world=2) for rank in range(2)]
    assert torch.equal(torch.stack([h.past.z for h in halves], dim=1).flatten(0, 1), batch.past.z)


def test_the_past_of_resampled_forcing_is_walked_by_the_model_before_anything_is_trained_behind_it(data, tmp_path):
    config = replace(CONFIG, forcing="resampled", tau_ctx=0.25, batch=64, bootstrap_share=0.25)
    trainer = run(data, tmp_path / "r", replace(config, batch=8), stop_at=1)
    batch, plain = (draw_batch(trainer.pack, replace(config, forcing=f), 8, 0) for f in ("resampled", "independent"))
    assert torch.equal(batch.tau, plain.tau)
    assert torch.equal(batch.noise, plain.noise)
    level = batch.past.tau[..., None, None]
    noise = (batch.past.z - (1 - level) * batch.z_clean) / level
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    assert 0.1 < (batch.past.tau == 0.25).float().mean() < 0.9
    halves = [draw_batch(trainer.pack, config, 8, 0, rank=rank, world=2) for rank in range(2)]
    for name in ("z", "tau"):
        both = torch.stack([getattr(h.past, name) for h in halves], dim=1).flatten(0, 1)
        assert torch.equal(both, getattr(batch.past, name))
    seen, walked = [], resampled(trainer.model, batch.past, batch.actions, batch.known, 0.25)
    hook = trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[-1]))
    trainer.loss(batch)
    hook.remove()
    assert len(seen) == 3  # two teachers and the student, all behind the same past
    for past in seen:
        assert torch.equal(past.z, walked.z[: len(past.z)])
        assert bool((past.tau == 0.25).all())


def test_under_committed_forcing_a_frame_is_denoised_behind_the_past_alone(data, tmp_path):
    trainer = run(data, tmp_path / "r", stop_at=1)
    batch = draw_batch(trainer.pack, replace(CONFIG, forcing="committed", bootstrap_share=0.0), 8, 0)
    model = trainer.world.dynamics
    denoise = denoiser(model, batch)
    with torch.no_grad():
        z_hat = denoise(batch.noise, batch.tau, batch.d)
        moved = denoiser(model, replace(batch, past=batch.past._replace(z=batch.past.z + 1)))
        unseen = moved(batch.noise, batch.tau, batch.d)
        early = batch.noise.clone()
        early[:, :-1] += 1
        late = denoise(early, batch.tau, batch.d)
    assert torch.equal(late[:, -1], z_hat[:, -1])  # frames of the clip itself are seen by no later one
    assert not torch.allclose(late[:, :-1], z_hat[:, :-1])
    assert torch.equal(unseen[:, 0], z_hat[:, 0])  # the first frame has no past
    assert not torch.allclose(unseen[:, 1:], z_hat[:, 1:])


def test_flow_rows_are_labelled_with_the_finest_step(data, tmp_path):
    trainer = run(data, tmp_path / "r", stop_at=1)
    batch = draw_batch(trainer.pack, replace(CONFIG, batch=64, bootstrap_share=0.25), 8, 0)
    assert batch.bootstrap_rows == 16
    assert bool((batch.d[16:] == 1 / 8).all())
    assert bool((batch.d[:16] > 1 / 8).any())
    assert float((batch.tau[16:] == 1).float().mean()) > 0.3  # eq. 4 at k_max 8: (1 + 1/2 + 1/4 + 1/8) / 4 = 0.47


def test_shares_hold_on_average_however_small_the_batch():
    for share, count in ((0.25, 1), (0.25, 4), (0.3, 5)):
        mean = np.mean([share_of(share, count, step, 0) for step in range(4000)])
        assert mean == pytest.approx(share * count, abs=0.05)


def test_runs_of_other_seeds_round_a_share_up_at_other_steps():
    up = {tuple(share_of(0.5, 1, step, seed) for step in range(40)) for seed in range(8)}
    assert len(up) == 8


@pytest.mark.parametrize(
    ("count", "bootstrap", "images"), [(1, 0.125, 0.3), (3, 0.5, 0.5), (1, 0.5, 0.5), (3, 0.125, 0.875)]
)
def test_both_shares_hold_on_average_in_what_a_step_draws(data, count, bootstrap, images):
    store, tokenizer = data
    config = replace(CONFIG, batch=count, frames=2, bootstrap_share=bootstrap, single_image_share=images)
    pack = open_pack(store, tokenizer, "train")
    drawn = [draw_batch(pack, config, 8, step) for step in range(1500)]
    assert np.mean([batch.bootstrap_rows for batch in drawn]) == pytest.approx(bootstrap * count, abs=0.05)
    assert np.mean([batch.image_rows for batch in drawn]) == pytest.approx(images * count, abs=0.05)


@pytest.mark.parametrize(("share", "trained"), [(0.5, True), (1e-6, False), (0.0, False)])
def test_a_world_says_the_step_sizes_that_were_drawn_for_it(data, tmp_path, share, trained):
    run(data, tmp_path / "r", replace(CONFIG, bootstrap_share=share))
    sizes = load_world(tmp_path / "r" / "last", "cpu").trained_d
    assert sizes == ((1.0, 0.5, 0.25, 0.125) if trained else (0.125,))


def test_single_images_teach_no_world_to_go_without_actions(data, tmp_path):
    run(data, tmp_path / "r", replace(CONFIG, single_image_share=0.5))
    assert not load_world(tmp_path / "r" / "last", "cpu").trained_unlabelled


@pytest.mark.parametrize("forcing", ["independent", "context"])
def test_frames_that_never_change_can_be_trained_on(tmp_path, forcing, data):
    with EpisodeWriter(tmp_path / "flat", height=16, width=16, fps=10.0, action_space=SPACE, seed=0) as writer:
        for i in range(8):
            writer.add(np.full((30, 16, 16, 3), 90, np.uint8), SPACE.random(29, (2, 5), np.random.default_rng(i)))
    store = EpisodeStore.open(tmp_path / "flat")
    config = replace(CONFIG, forcing=forcing, tau_ctx=0.0)
    run((store, fit_linear_tokenizer(store, (8, 8), 6, 0.5)), tmp_path / "r", config)


def test_single_images_see_no_past_and_no_action(data, tmp_path):
    trainer = run(data, tmp_path / "r", stop_at=1)
    config = replace(CONFIG, single_image_share=0.5, bootstrap_share=0.0)
    batch = draw_batch(trainer.pack, config, 8, 0)
    assert batch.image_rows == 2
    denoise = denoiser(trainer.model, batch)
    with torch.no_grad():
        z_hat = denoise(batch.z_clean, batch.tau, batch.d)
        changed = batch.z_clean.clone()
        changed[:, 0] += 1
        moved = (denoise(changed, batch.tau, batch.d) - z_hat).abs().amax(dim=(2, 3))
        batch.actions.add_(1.0)
        steered = (denoise(batch.z_clean, batch.tau, batch.d) - z_hat).abs().amax(dim=(2, 3))
    assert bool((moved[-2:, 1:] == 0).all())
    assert bool((moved[:2, 1:] > 0).all())
    assert bool((steered[-2:] == 0).all())
    assert bool((steered[:2, 1:] > 0).all())


@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize("shares", [(0.5, 0.0), (0.25, 0.5)], ids=["bootstrap", "bootstrap and images"])
def test_the_gradient_of_a_step_is_the_same_in_any_number_of_micro_batches(data, tmp_path, accumulate, shares):
    gradients = []
    for parts in (1, accumulate):
        config = replace(CONFIG, batch=8, accumulate=parts, bootstrap_share=shares[0], single_image_share=shares[1])
        store, tokenizer = data
        trainer = assemble(store, tokenizer, config, tmp_path / f"r{parts}", "train", device=torch.device("cpu"))
        for optimizer in trainer.optimizers:  # look at the gradient, do not move
            optimizer.step = lambda: None
            optimizer.zero_grad = lambda set_to_none: None
        trainer._update()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, rtol=0, atol=1e-6 * float(gradients[0].abs().max()) * 10)


def test_a_loss_that_is_not_finite_stops_the_run_with_a_sentence(data, tmp_path, monkeypatch):
    store, tokenizer = data
    trainer = assemble(store, tokenizer, CONFIG, tmp_path / "r", "train", device=torch.device("cpu"))
    with torch.no_grad():
        trainer.model.head.bias[0] = math.nan
    with pytest.raises(TrainingError, match=r"not finite at step 0.*none: try a lower --lr in another --out$"):
        trainer.train(lambda line: None, StopRequest())


@pytest.mark.parametrize("precision", ["float32", "bfloat16", None])
def test_what_is_not_finite_advises_another_precision_only_where_there_is_one(tmp_path, precision):
    ends = (
        "try a lower --lr or --precision float32 in another --out"
        if precision == "bfloat16"
        else ("none: try a lower --lr in another --out")
    )
    assert str(not_finite("loss nan", 3, ["a:0"], States(tmp_path, 2), precision)).endswith(ends)
    with pytest.raises(TrainingError, match=f"{ends}$"):
        check_finite({"w": torch.tensor(math.nan)}, 3, None, precision)


def test_the_rate_warms_up_in_optimiser_steps_and_falls_to_zero():
    config = replace(CONFIG, warmup=4, decay=0.5)
    assert [rate(s, 100, config) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert rate(49, 100, config) == 1.0
    assert rate(75, 100, config) == pytest.approx(0.5)
    assert rate(99, 100, config) == pytest.approx(0.02)
    assert rate(10_000, None, config) == 1.0


def test_a_line_of_metrics_says_the_rate_that_its_step_was_taken_with(data, tmp_path, monkeypatch):
    taken, apply = [], loop.apply

    def noted(optimizers):
        taken.append(optimizers[0].param_groups[0]["lr"])
        apply(optimizers)

    monkeypatch.setattr(loop, "apply", noted)
    run(data, tmp_path / "r")
    assert len(set(taken)) == 4  # one of the warm-up, the whole, two of the decay
    assert [line["lr"] for line in lines(tmp_path / "r") if "loss" in line] == taken


def test_a_line_of_metrics_has_the_means_of_all_frames_of_a_kind_since_the_line_before():
    log, kinds, g = loop._Log(8), ([], []), torch.Generator().manual_seed(0)
    for big in (0, 1, 7, 8):
        d = torch.tensor([1 / 2] * big + [1 / 8] * (8 - big)).view(2, 4)
        tau, per_frame = torch.rand(2, 2, 4, generator=g)
        flow, bootstrap = per_frame[d == 1 / 8], per_frame[d > 1 / 8]
        for frames, more in zip(kinds, (flow, bootstrap), strict=True):
            frames.append(more)
        means = {"loss": per_frame.mean(), "flow": flow.mean(), "bootstrap": bootstrap.mean(), "per_frame": per_frame}
        log.add([(SimpleNamespace(d=d, tau=tau), SimpleNamespace(**means))], torch.tensor(1.0), 8)
    line = log.line(Group(torch.device("cpu")))
    for name, frames in zip(("flow", "bootstrap"), kinds, strict=True):
        assert line[name] == pytest.approx(torch.cat(frames).mean().item(), abs=1e-6)


def test_a_gradient_is_cut_to_the_clip_and_the_log_says_how_long_it_was(data, tmp_path, monkeypatch):
    seen = gradients_of(monkeypatch, loop)
    for clip in (1e9, 0.01):
        run(data, tmp_path / str(clip), replace(CONFIG, clip=clip), stop_at=1)
    whole, cut = seen
    assert whole.norm() > 0.02
    assert torch.allclose(cut, whole * 0.01 / whole.norm(), atol=1e-6)
    assert lines(tmp_path / "0.01")[0]["grad_norm"] == pytest.approx(whole.norm().item(), rel=1e-4)


def test_the_worlds_weights_are_the_average_of_all_steps_that_ema_says(data, tmp_path, monkeypatch):
    """By the formula, over the weights after every step; 0.3 is reached in the middle of the warm-up."""
    config = replace(CONFIG, ema=0.3)
    trainer = assemble(*data, config, tmp_path / "r", "train", device=torch.device("cpu"))
    expected, apply = [p.detach().clone() for p in trainer.model.parameters()], loop.apply

    def averaged(optimizers):
        step = trainer.step
        apply(optimizers)
        stays = min(0.3, (1 + step) / (10 + step))
        for mean, p in zip(expected, trainer.model.parameters(), strict=True):
            mean.mul_(stays).add_(p.detach(), alpha=1 - stays)

    monkeypatch.setattr(loop, "apply", averaged)
    trainer.train(lambda line: None, StopRequest())
    for world in (trainer.world, load_world(tmp_path / "r" / "last", "cpu")):
        found = list(world.dynamics.parameters())
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, found, strict=True))
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(expected, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("euler", "shortcut", "better"),
    [((3.0, 1.0), (2.0, 1.5), "shortcut"), ((1.0, 2.0), (9.0, 1.9), "euler"), ((-2.0, -1.0), (-1.0, -2.0), "euler")],
)
def test_the_better_sampler_at_the_last_horizon_is_chosen_with_its_own_preview(monkeypatch, euler, shortcut, better):
    results = {
        "euler": {"gain_db": dict(zip(("4", "16"), euler, strict=True))},
        "shortcut": {"gain_db": dict(zip(("4", "16"), shortcut, strict=True))},
    }
    monkeypatch.setattr(training_preview, "quick_gain", lambda w, s, m, config, seed: results[config.sampler])
    world = small_world()
    generation, seen, gains = choose_sampler(world, None, None)
    assert generation == replace(world.generation, sampler=better)
    assert seen is results[better]
    assert gains == {name: result["gain_db"] for name, result in results.items()}
    world.trained_d = (1 / world.k_max,)  # never trained for the shortcut's steps
    assert choose_sampler(world, None, None)[0].sampler == "euler"


def test_a_time_budget_ends_the_run_near_its_time(data, tmp_path):
    trainer = run(data, tmp_path / "r", replace(CONFIG, steps=None, budget=3.0))
    assert trainer.step == trainer.total
    assert 1.0 < trainer.elapsed < 12.0


@pytest.fixture
def taking(monkeypatch):
    """taking(trainer, step, look): by the clock of this trainer its steps and previews take so many seconds."""

    def taking(trainer, step: float, look: float = 0.0) -> None:
        at = [0.0]

        def lasting(seconds, act):
            def acts(*arguments):
                at[0] += seconds
                return act(*arguments)

            return acts

        trainer.now = lambda: at[0]
        monkeypatch.setattr(loop, "apply", lasting(step, loop.apply))
        monkeypatch.setattr(loop, "preview", lasting(look, lambda *_: {"gain_db": {"1": 0.0}}))

    return taking


def test_a_run_is_saved_after_so_many_seconds_of_training_too(data, tmp_path, taking):
    config = replace(CONFIG, steps=7, preview_every=100, keep=9)
    trainer = assemble(*data, config, tmp_path / "r", "train", device=torch.device("cpu"))
    taking(trainer, 0.4 * SAVE_SECONDS)
    trainer.train(lambda line: None, StopRequest())
    assert {path.name for path in (tmp_path / "r" / "state").iterdir()} == {f"step-0000000{n}" for n in (3, 6, 7)}


def test_a_time_budget_is_divided_by_what_steps_take_without_the_previews_between_them(data, tmp_path, taking):
    config = replace(CONFIG, steps=None, budget=100.0, decay=0.4, preview_every=5)
    trainer = assemble(*data, config, tmp_path / "r", "train", device=torch.device("cpu"))
    taking(trainer, 2.0, look=10.0)
    trainer.train(lambda line: None, StopRequest())
    assert trainer.total == 15 + 40 / (2 + 10 / 5)  # 15 steps and three previews took 60 s
    assert trainer.elapsed == 25 * 2 + 4 * 10


def _at(config, step, elapsed, warm, looked=0.0, looking=0.0):
    """A run in a time budget that has not decided its steps."""
    fields = {"step": step, "elapsed": elapsed, "warm": warm, "looked": looked, "looking": looking}
    run = SimpleNamespace(config=config, total=None, **fields)
    run._third = lambda: DynamicsTrainer._third(run)
    return run


@pytest.mark.parametrize(
    ("every", "decay", "elapsed", "total"),
    [
        (0, 0.4, 60.0, 20 + 10),  # 20 steps in 40 s and a preview of 20; 40 s are left, the one at 2/3 takes 20
        (0, 0.9, 30.0, 20 + 76),  # 20 steps in 10 s; two previews of 16 are still to come
        (10, 0.4, 60.0, 20 + 10),  # 2 s a step, and 2 of every preview
        (0, 0.4, 90.0, 20 + 3),  # none is to come
    ],
)
def test_a_time_budget_foresees_the_previews_that_are_to_come(every, decay, elapsed, total):
    config = replace(CONFIG, steps=None, budget=100.0, decay=decay, preview_every=every)
    trainer = _at(config, 20, elapsed, (0, 0.0), looked=16.0 if decay == 0.9 else 20.0, looking=20.0)
    assert DynamicsTrainer._decide_total(trainer)
    assert trainer.total == total


@pytest.mark.parametrize("decay", [0.0, 0.2, 1 / 3, 0.4, 0.9])
@pytest.mark.parametrize("steps", [132, 133, 134])
def test_a_run_has_three_previews_by_steps_and_by_time(decay, steps):
    config = replace(CONFIG, steps=None, budget=100.0, decay=decay)
    due, third = [], 0
    trainer = SimpleNamespace(config=config, total=None, step=0, elapsed=0.0, crossed=False)
    while trainer.step != trainer.total:
        if trainer.total is None and trainer.elapsed >= 100 * config.open_share:
            trainer.total = max(steps, trainer.step + 1)
        trainer.step, trainer.elapsed = trainer.step + 1, 100 * (trainer.step + 1) / steps
        before, third = third, DynamicsTrainer._third(trainer)
        trainer.crossed = third > before
        if DynamicsTrainer._due(trainer, 0):
            due.append(trainer.step)
    assert [round(3 * step / steps, 1) for step in due] == [1.0, 2.0, 3.0]
    assert DynamicsTrainer._due(SimpleNamespace(config=CONFIG, total=6, step=2), 0)  # of so many steps, by steps alone


@pytest.mark.parametrize(
    ("decay", "step", "elapsed", "total"),
    [
        (0.4, 5, 50.0, None),
        (0.4, 6, 60.0, 10),
        (0.4, 6, 300.0, 7),  # a save took all that was left
        (0.0, 9, 99.0, None),
        (0.0, 10, 100.0, 11),
        (0.9, 1, 10.0, 10),
        (1.0, 0, 0.0, None),
        (1.0, 1, 2.0, None),  # all of the run is decay, but its first step says little of the others
        (1.0, 10, 12.0, 83),
        (0.9995, 10, 10.0, 100),
    ],
)
def test_a_time_budget_decides_as_many_steps_as_the_rest_of_it_gives(decay, step, elapsed, total):
    config = replace(CONFIG, steps=None, budget=100.0, decay=decay)
    trainer = _at(config, step, elapsed, (0, 0.0))
    assert DynamicsTrainer._decide_total(trainer) == (total is not None)
    assert trainer.total == total


def test_a_time_budget_is_not_divided_by_steps_that_waited_for_a_compiler():
    config = replace(CONFIG, steps=None, budget=100.0, decay=0.9)

    def decided(step, elapsed, warm):
        trainer = _at(config, step, elapsed, warm)
        DynamicsTrainer._decide_total(trainer)
        return trainer.total

    assert decided(2, 60.0, None) is None
    assert decided(3, 60.5, (3, 60.5)) is None
    assert decided(4, 61.0, (3, 60.5)) == 4 + 78
    assert decided(1, 130.0, None) == 2  # the budget is over


@pytest.mark.slow
def test_training_learns_the_bar_world_better_than_at_its_start(data, tmp_path, monkeypatch):
    """At its start the model is the best linear denoiser of each frame alone, so to win it must use past and action."""
    from ahriuwu_cli.models.sizes import SIZES

    monkeypatch.setitem(SIZES, "test", {**TINY, "width": 64, "depth": 4, "mlp_hidden": 128})
    run(data, tmp_path / "r", replace(CONFIG, steps=150, batch=16, ramp="flat", log_every=10, bootstrap_share=0.0))
    losses = [line["loss"] for line in lines(tmp_path / "r") if "loss" in line]
    assert np.mean(losses[-3:]) < 0.75 * losses[0]


def test_weights_of_a_world_of_other_latents_are_no_start_and_those_of_the_same_are(data, tmp_path):
    run(data, tmp_path / "r")
    store = data[0]
    run(data, tmp_path / "again", stop_at=1, init_from=tmp_path / "r" / "last")
    other = fit_linear_tokenizer(store, (8, 8), 6, 1.0)
    with pytest.raises(CheckpointError, match="latents of another tokenizer"):
        run((store, other), tmp_path / "other", stop_at=1, init_from=tmp_path / "r" / "last")
    assert not (tmp_path / "other").exists()
    sharp = data[1].sharpened((torch.from_numpy(store.frames(e.id)) for e in store.episodes("train")), 1.0)
    assert sharp.fingerprint() != data[1].fingerprint()  # another decoder, and the same latents
    run((store, sharp), tmp_path / "sharp", init_from=tmp_path / "r" / "last")
    assert load_world(tmp_path / "sharp" / "last", "cpu").tokenizer.sharpness == 1


def test_a_run_on_other_data_starts_with_all_tensors_of_the_world_that_it_starts_from(data, tmp_path):
    run(data, tmp_path / "r")
    start, tokenizer = load_world(tmp_path / "r" / "last", "cpu").dynamics, data[1]
    still = small_dataset(tmp_path / "still", still=True)
    assert not torch.allclose(open_pack(still, tokenizer, "train").spread(), start.channel_scale)
    options = {"device": torch.device("cpu"), "init_from": tmp_path / "r" / "last"}
    trainer = assemble(still, tokenizer, CONFIG, tmp_path / "again", "train", **options)
    trainer.run.release()
    for model in (trainer.model, trainer.average):
        held = model.state_dict()
        assert all(torch.equal(held[name], tensor) for name, tensor in start.state_dict().items())


def test_a_start_whose_actions_have_other_names_is_said(data, tmp_path):
    store, tokenizer = data
    run(data, tmp_path / "r")
    said = []
    run(data, tmp_path / "same", stop_at=1, init_from=tmp_path / "r" / "best", announce=said.append)
    assert said == []
    shutil.copytree(store.path, tmp_path / "turned")
    told = json.loads((tmp_path / "turned" / "dataset.json").read_text())
    (component,) = told["action_space"]["components"]
    component["labels"] = component["labels"][::-1]
    (tmp_path / "turned" / "dataset.json").write_text(json.dumps(told))
    turned = EpisodeStore.open(tmp_path / "turned")
    run((turned, tokenizer), tmp_path / "t", stop_at=1, init_from=tmp_path / "r" / "best", announce=said.append)
    before, here = ", ".join(store.action_space.column_names), ", ".join(turned.action_space.column_names)
    assert before != here
    assert said == [f"{tmp_path / 'r' / 'best'} knows the actions {before}, and {turned.path} has {here}"]


def test_frames_too_small_to_be_scored_are_refused_before_anything_is_written(data, tmp_path):
    frames = np.zeros((40, 6, 6, 3), np.uint8)
    with EpisodeWriter(tmp_path / "few", height=6, width=6, fps=10.0, action_space=ActionSpace(), seed=0) as writer:
        for _ in range(8):
            writer.add(frames, None)
    store = EpisodeStore.open(tmp_path / "few")
    with pytest.raises(DataError, match="at least 7 pixels"):
        run((store, LinearTokenizer(6, 6, 6, 6, 4)), tmp_path / "r", stop_at=1)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("clips", [{"frames": 64}, {"batch": 16, "long_frames": 64, "long_every": 100}])
def test_a_dataset_too_short_for_the_clips_is_refused_before_anything_is_written(data, tmp_path, clips):
    option = "--long-frames" if "long_frames" in clips else "--frames"
    with pytest.raises(DataError, match=rf"no training episode .* has 64 frames \(longest: 40\): .* fewer {option} or"):
        run(data, tmp_path / "r", replace(CONFIG, **clips))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("lr", "dead"), [(1e-9, True), (3e-3, False)])
def test_previews_that_do_not_move_are_told_of(data, tmp_path, lr, dead, capsys):
    config = replace(CONFIG, lr=lr, preview_every=2)
    trainer = assemble(*data, config, tmp_path / "r", "train", device=torch.device("cpu"))
    with training_bar(config, quiet=True) as report:
        trainer.train(report, StopRequest())
    said = [x.partition(":")[0] for x in capsys.readouterr().err.splitlines() if "learns nothing" in x]
    assert said[:1] == (["step 4"] if dead else [])  # the last preview may choose another sampler
    assert sum("preview" in line for line in lines(tmp_path / "r")) == 3


def test_a_preview_that_stands_still_is_alike_at_every_horizon_and_worse_than_persistence():
    dead = {"gain_db": {"1": -0.5, "16": 1.0}}
    assert stands_still(dead, {"gain_db": {"1": -0.504, "16": 1.004}})
    assert not stands_still(None, dead)
    assert not stands_still(dead, {"gain_db": {"1": -0.5, "16": 1.01}})
    assert not stands_still(*[{"gain_db": {"1": 0.5, "16": 1.0}}] * 2)
