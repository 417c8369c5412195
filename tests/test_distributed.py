"""Several processes train as one does: gradients, weights, clips and files, by real processes over gloo."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from killing import differing_bytes
from processes import CONFIG, RUNS, STEPS, everything, prepare, resumed, train, trainer_for
from safetensors.torch import load_file
from small import small_dataset

from ahriuwu_cli import stopping
from ahriuwu_cli.errors import UserError
from ahriuwu_cli.training.batches import check_shares, draw_batch
from ahriuwu_cli.training.clip_loss import ClipLoss
from ahriuwu_cli.training.distributed import PARALLEL, Group, join, what_changed
from ahriuwu_cli.training.restart import TORCHRUN
from ahriuwu_cli.training.signals import StopRequest
from ahriuwu_cli.training.state import load_state

ALONE = Group(torch.device("cpu"))
CLOSE = dict.fromkeys(RUNS, 1e-5) | {"half a momentum": 1e-3}  # a last bit more or less may round to the next bfloat16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One process did everything in `one`, two processes in `ddp` and then in `fsdp`."""
    folder = tmp_path_factory.mktemp("distributed")
    prepare(folder)
    everything(folder, "one", ALONE)
    for mode, name in product(PARALLEL, RUNS):
        shutil.copytree(folder / "one" / f"{name} half", folder / f"one for {mode}" / f"{name} half")
    for code, output in finish(start([Path(__file__).with_name("processes.py"), folder]), 300):
        assert code == 0, output
    return folder


def start(command: list, count: int = 2) -> list[subprocess.Popen]:
    """Processes that find each other by torchrun's variables, without the seconds that torchrun takes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


def finish(processes: list[subprocess.Popen], patience: float = 60) -> list[tuple[int, str]]:
    """(exit code, what it printed) of each; none is left behind when they hang."""
    try:
        outputs = [p.communicate(timeout=patience)[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]


def newest(run: Path) -> tuple[dict, dict]:
    return load_state(sorted((run / "state").iterdir())[-1])


def assert_close(a: dict, b: dict, tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.shape == b[name].shape, name
        if tensor.numel():
            scale = max(1.0, float(tensor.abs().max()))
            assert float((tensor - b[name]).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("mode", PARALLEL)
@pytest.mark.parametrize("step", STEPS)
def test_the_gradient_of_two_processes_is_that_of_one(folder, mode, step):
    one, two = (load_file(folder / m / "steps" / f"{step}.safetensors") for m in ("one", mode))
    largest = max(float(t.abs().max()) for t in one.values())
    assert one.keys() == two.keys()
    assert largest > 1e-3
    for name, gradient in one.items():
        assert float((gradient - two[name]).abs().max()) < 2e-6 * largest, name


@pytest.mark.parametrize("mode", PARALLEL)
@pytest.mark.parametrize("run", RUNS)
def test_a_run_of_two_processes_ends_at_the_weights_of_one(folder, mode, run):
    (one, said_one), (two, said_two) = newest(folder / "one" / run), newest(folder / mode / run)
    assert_close(one, two, CLOSE[run])
    assert said_one["optimizers"] == said_two["optimizers"]
    assert (said_one["step"], said_two["step"]) == (6, 6)
    assert (said_one["processes"], said_one["parallel"]) == (1, "none")
    assert (said_two["processes"], said_two["parallel"]) == (2, mode)


@pytest.mark.parametrize("mode", PARALLEL)
def test_the_log_of_two_processes_is_that_of_one(folder, mode):
    def losses(m):
        lines = [json.loads(line) for line in (folder / m / "muon" / "metrics.jsonl").read_text().splitlines()]
        names = ("loss", "flow", "bootstrap", "grad_norm")
        rows = [[line[n] for n in names] + line["loss_by_tau_bin"] for line in lines if "loss" in line]
        return [[-1.0 if x is None else x for x in row] for row in rows]

    one, two = losses("one"), losses(mode)
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=2e-6)


def test_processes_read_other_clips_and_together_those_of_one(folder):
    one = json.loads((folder / "one" / "clips-0.json").read_text())
    mine, its = (json.loads((folder / "ddp" / f"clips-{rank}.json").read_text()) for rank in range(2))
    assert len(mine) == len(its) == len(one) // 2
    assert Counter(map(tuple, mine + its)) == Counter(map(tuple, one))
    assert len({row[-1] for row in mine + its}) == len(one)  # no noise is drawn twice


@pytest.mark.parametrize("mode", PARALLEL)
@pytest.mark.parametrize("run", RUNS)
def test_one_process_goes_on_where_two_stopped(folder, mode, run):
    (said,) = resumed(folder, "one", ALONE, folder / mode / f"{run} half")
    assert said.startswith("resuming with 1 process instead of 2")
    assert said.endswith("the global batch stays 8, each process takes 8 clips")
    assert_close(newest(folder / "one" / run)[0], newest(folder / mode / f"{run} half")[0], CLOSE[run])


@pytest.mark.parametrize("mode", PARALLEL)
@pytest.mark.parametrize("run", RUNS)
def test_two_processes_go_on_where_one_stopped(folder, mode, run):
    (said,) = json.loads((folder / mode / f"{run} said.json").read_text())
    assert said.startswith("resuming with 2 processes instead of 1")
    assert said.endswith("the global batch stays 8, each process takes 4 clips")
    assert_close(newest(folder / "one" / run)[0], newest(folder / f"one for {mode}" / f"{run} half")[0], CLOSE[run])


@pytest.mark.slow
def test_three_processes_that_go_on_end_bit_for_bit_where_three_unbroken_ones_do(tmp_path):
    """Two sum in one order alone; of three the order is that of DDP's buckets."""
    prepare(tmp_path)
    for code, output in finish(start([Path(__file__).with_name("processes.py"), tmp_path], count=3), 300):
        assert code == 0, output
    for mode in PARALLEL:
        assert differing_bytes(tmp_path / f"{mode} unbroken", tmp_path / f"{mode} broken") == {}


def test_a_run_that_goes_on_with_other_micro_batches_or_threads_says_so(folder, tmp_path):
    out, said, threads = tmp_path / "run", [], torch.get_num_threads()
    train(trainer_for(folder, CONFIG, out, ALONE), stop_at=1)
    train(trainer_for(folder, CONFIG, out, ALONE, resume=True, announce=said.append), stop_at=2)
    assert said == []
    more = replace(CONFIG, accumulate=2)
    try:
        torch.set_num_threads(threads + 1)
        trainer_for(folder, more, out, ALONE, resume=True, announce=said.append).run.release()
    finally:
        torch.set_num_threads(threads)
    assert said == [
        f"resuming with --accumulate 2 instead of 1, {threads + 1} threads instead of {threads}: "
        "steps stay the same up to rounding, the global batch stays 8, each process takes 8 clips"
    ]
    assert what_changed({"processes": 1, "parallel": "none"}, ALONE, more) is None  # as older versions wrote it
    train(trainer_for(folder, CONFIG, out, ALONE))
    trainer_for(folder, more, out, ALONE, announce=said.append)
    assert len(said) == 1  # a finished run does nothing in any other way


@pytest.mark.parametrize(("first", "then"), [(1, 4), (4, 1), (2, 4)])
def test_the_means_of_a_line_are_those_of_its_steps_whatever_micro_batches_they_had(folder, tmp_path, first, then):
    config = replace(CONFIG, log_every=6, accumulate=first)
    losses = []
    for name, change, stop in (("whole", {}, 6), ("changed", {"accumulate": then}, 2)):
        train(trainer_for(folder, config, tmp_path / name, ALONE), stop_at=stop)
        train(trainer_for(folder, replace(config, **change), tmp_path / name, ALONE))
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses += [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2
    assert abs(losses[0] - losses[1]) < 2e-6


@pytest.mark.parametrize("mode", PARALLEL)
def test_files_are_written_once_and_are_those_of_one_process(folder, mode):
    def names(run: Path) -> list[str]:
        found = (p.relative_to(run) for p in run.rglob("*"))
        return sorted("/".join("state.safetensors" if n.startswith("state-") else n for n in p.parts) for p in found)

    assert names(folder / "one" / "muon") == names(folder / mode / "muon")
    for world in ("best", "last"):
        one, two = (load_file(folder / m / "muon" / world / "model.safetensors") for m in ("one", mode))
        assert_close(one, two, 1e-5)
    steps = [json.loads(line)["step"] for line in (folder / mode / "muon" / "metrics.jsonl").read_text().splitlines()]
    assert [s for s, n in Counter(steps).items() if n > 3] == []
    assert len(list((folder / "data" / "latents").glob("*.safetensors"))) == 1


def test_sharded_processes_take_equally_many_forwards_whatever_clips_they_got(folder):
    """Of four processes with one clip each, few have a bootstrap clip or single images; unequal forwards would hang."""
    config = replace(CONFIG, batch=4, bootstrap_share=0.3, single_image_share=0.3)
    trainer = trainer_for(folder, config, folder / "one" / "forwards", ALONE)
    unequal = 0
    for step in range(12):
        counts = {True: set(), False: set()}
        for lockstep, rank in product(counts, range(4)):
            batch, calls = draw_batch(trainer.pack, config, 8, step, 0, rank, 4), []
            hook = trainer.model.register_forward_pre_hook(lambda *_, c=calls: c.append(torch.is_grad_enabled()))
            assert ClipLoss(trainer.model, 8, "paper", lockstep)(batch).loss.isfinite()
            hook.remove()
            counts[lockstep].add(tuple(calls))
        assert len(counts[True]) == 1, (step, counts)
        unequal += len(counts[False]) > 1
    assert unequal  # or this test shows nothing


def test_a_forward_that_only_keeps_step_changes_no_loss_and_no_gradient(folder):
    config = replace(CONFIG, batch=4, bootstrap_share=0.3, single_image_share=0.3)
    trainer = trainer_for(folder, config, folder / "one" / "dummies", ALONE)
    for step, rank in product(range(3), range(4)):
        found = []
        for lockstep in (False, True):
            trainer.model.zero_grad()
            loss = ClipLoss(trainer.model, 8, "paper", lockstep)(
                draw_batch(trainer.pack, config, 8, step, 0, rank, 4)
            ).loss
            loss.backward()
            found.append([loss.detach(), *(p.grad.clone() for p in trainer.model.parameters() if p.grad is not None)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_clips_that_cannot_be_dealt_out_evenly_are_refused():
    check_shares(replace(CONFIG, batch=8, accumulate=2), 4)
    with pytest.raises(UserError, match="--batch 8 does not divide by 3 processes x --accumulate 1 = 3 shares"):
        check_shares(CONFIG, 3)
    with pytest.raises(UserError, match="a step has 2 clips of --long-frames 24, which do not divide by 4 processes"):
        check_shares(replace(CONFIG, long_frames=24, long_every=2), 4)


def test_one_gpu_for_several_processes_of_a_box_is_refused_before_they_meet(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--device cuda:1 would put all processes"), join("cuda:1", None):
        pass


def test_a_signal_that_a_launcher_repeats_is_one_request(monkeypatch):
    ends = []
    monkeypatch.setattr(stopping, "end", lambda number, sentence: ends.append(number))
    patient, plain = StopRequest(echo=60), StopRequest()
    for _ in range(2):
        patient._note(signal.SIGTERM, None)
    assert patient.number == signal.SIGTERM
    plain._note(signal.SIGINT, None)
    assert ends == []
    plain._note(signal.SIGINT, None)
    assert ends == [signal.SIGINT]


AGREES = """
from ahriuwu_cli.training.distributed import join
with join("cpu", None) as group:
    first, last = group.rank == 0, group.rank == 1
    print([group.agree(*told) for told in ((7.5 if first else 5.25, 0), (2.0 if first else 1e5, 15 * last))])
"""


def test_processes_agree_on_the_fewest_seconds_of_all_and_on_a_signal_that_one_got():
    assert finish(start(["-c", AGREES])) == [(0, "[(5.25, 0), (2.0, 15)]\n")] * 2
    assert ALONE.agree(7.5, 15) == (7.5, 15)


def test_a_signal_to_one_process_ends_all_after_one_save_with_its_exit_code(folder, tmp_path):
    out = tmp_path / "run"
    command = ["-m", "ahriuwu_cli", "train", "dynamics", folder / "data", "--out", out, "--steps", "100000"]
    processes = start([*command, "--preview-windows", "2", "--log-every", "1", "--device", "cpu"])
    while not (out / "metrics.jsonl").exists() and all(p.poll() is None for p in processes):
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs = zip(*finish(processes), strict=True)
    assert codes == (143, 143), outputs
    assert "stopped by signal 15" in outputs[0]
    assert "error" not in outputs[1]
    (state,) = (out / "state").iterdir()
    assert load_state(state)[1]["processes"] == 2
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 1 + load_state(state)[1]["step"]))


def test_what_does_not_fit_is_refused_once_before_anything_is_written(folder, tmp_path):
    command = ["-m", "ahriuwu_cli", "train", "dynamics", folder / "data", "--out", tmp_path / "run", "--steps", "9"]
    processes = start([*command, "--batch", "9", "--device", "cpu"])
    codes, outputs = zip(*finish(processes), strict=True)
    assert codes == (2, 2), outputs
    assert outputs[0].startswith("error: --batch 9 does not divide by 2 processes x --accumulate 1 = 2 shares")
    assert outputs[1] == ""
    assert not (tmp_path / "run").exists()


def test_processes_that_see_other_files_in_the_folder_of_a_run_end_with_a_sentence(folder, tmp_path):
    """A folder on each node's own disk: the lead finds its run, the others none. They would wait for one another."""
    command = ["train", "dynamics", folder / "data", "--out", tmp_path / "node@" / "run", "--steps", "2"]
    command += ["--preview-windows", "2", "--device", "cpu", "--batch", "2", "--save-every", "1"]
    for rank in "01":
        (tmp_path / f"node{rank}").mkdir()
    alone = [sys.executable, "-c", BY_RANK, *command]
    subprocess.run(list(map(str, alone)), env=os.environ | {"RANK": "0", "WORLD_SIZE": "1"}, check=True)
    before = sorted((tmp_path / "node0").rglob("*"))
    codes, outputs = zip(*finish(start(["-c", BY_RANK, *command])), strict=True)
    assert codes == (4, 4), outputs
    place = f"{tmp_path}/node0/run"
    said = f"error: the processes found a run, and no run, in {place}: put it where all nodes see the same files\n"
    assert outputs[0] == said
    assert outputs[1] == ""
    assert sorted((tmp_path / "node0").rglob("*")) == before
    assert not list((tmp_path / "node1").iterdir())


OTHER_OPTIONS = """
from ahriuwu_cli.training.distributed import join
with join("cpu", None) as group:
    group.check_agreed({"lr": 3e-3, "seed": 5, "data": {"a": [1, None]}})
    try:
        group.check_agreed({"lr": 3e-3, "seed": 5 + group.rank, "data": {"a": [1, None][group.rank]}})
    except Exception as error:
        print(type(error).__name__, error)
        raise
"""


def test_processes_that_were_asked_for_other_things_end_with_their_names():
    (code, said), other = finish(start(["-c", OTHER_OPTIONS]))
    assert code == 1
    assert said.startswith("UserError the processes disagree on data, seed: give all the same options")
    assert other == (2, "")


BY_RANK = """
import os, sys
from ahriuwu_cli.cli import main
sys.argv = [word.replace("@", os.environ["RANK"]) for word in sys.argv]
main()
"""


@pytest.mark.parametrize(
    ("words", "names"),
    [("data0 --lr 3e-@ --seed 5@", "lr, seed"), ("data@", "dataset_fingerprint")],
)
def test_a_process_with_other_options_or_data_is_refused_before_anything_is_written(tmp_path, words, names):
    """Each would train on its own, and the gradients of both be averaged."""
    data, *options = words.split()
    for seed in (0, 1):
        small_dataset(tmp_path / f"data{seed}", episodes=8 + seed)
    command = ["-c", BY_RANK, "train", "dynamics", tmp_path / data, *options, "--out", tmp_path / "run", "--steps", "2"]
    codes, outputs = zip(*finish(start([*command, "--device", "cpu"])), strict=True)
    assert codes == (2, 2), outputs
    assert outputs[0] == f"error: the processes disagree on {names}: give all the same options and the same files\n"
    assert outputs[1] == ""
    assert not (tmp_path / "run").exists()


OTHER_STEPS = """
from ahriuwu_cli.training.distributed import join
with join("cpu", None) as group:
    group.check_same_step(3, "run")
    group.check_same_step(None, "run")
    try:
        group.check_same_step(3 + 2 * group.rank, "run")
    except Exception as error:
        print(error)
        raise SystemExit(error.exit_code)
"""


def test_processes_that_found_other_states_end_with_a_sentence():
    (code, said), other = finish(start(["-c", OTHER_STEPS]))
    assert code == 4
    assert said == "the processes found states of steps 3 to 5 in run: put it where all nodes see the same files\n"
    assert other == (4, "")


LAST_WORDS = """
import sys
import torch
from ahriuwu_cli.training.distributed import join
sys.setswitchinterval(100)  # gloo's threads get Python only where this one lets go of it
with join("cpu", None) as group:
    kept_as_ddp_does = torch.distributed.group.WORLD
    for _ in range(50):
        group.sum(torch.ones(1))
    if sys.argv[1] == "agreed":
        raise SystemExit(1)
"""


@pytest.mark.parametrize(("end", "code"), [("agreed", 1), ("plain", 0)])
def test_threads_of_the_last_decision_are_waited_for(end, code):
    """One that needs Python while Python ends makes it abort: in one of seven such ends before they were waited for."""
    for _ in range(8):
        assert finish(start(["-c", LAST_WORDS, end])) == [(code, "")] * 2


BROKEN = """
import math, sys
sys.path.insert(0, sys.argv[4])
from processes import CONFIG, Path, StopRequest, join, replace, trainer_for
folder, out, broken = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
with join("cpu", None) as group:
    trainer = trainer_for(folder, CONFIG, out, group)
    plain = trainer.loss.forward
    def spoilt(batch):
        result = plain(batch)
        if broken == "gradient":
            result.loss.register_hook(lambda gradient: gradient * math.nan)
        return replace(result, loss=result.loss * math.nan) if broken == str(group.rank) else result
    trainer.loss.forward = spoilt
    try:
        trainer.train(lambda line: None, StopRequest())
    except Exception as error:
        print(group.rank, [w for w in str(error).split("windows ")[1].split(");")[0].split(", ")])
        raise SystemExit(error.exit_code)
"""


@pytest.mark.parametrize(("broken", "names"), [("1", [1]), ("gradient", [0, 1])])
def test_clips_of_a_loss_that_is_not_finite_are_named_by_the_process_that_had_them(folder, tmp_path, broken, names):
    found = finish(start(["-c", BROKEN, folder, tmp_path / "run", broken, Path(__file__).parent]))
    assert [code for code, _ in found] == [1, 1], found
    assert [rank for rank, (_, said) in enumerate(found) if said] == names
    for rank in names:
        assert found[rank][1].startswith(f"{rank} ['0")


def test_a_process_that_is_killed_does_not_leave_the_others_hanging(folder, tmp_path):
    out = tmp_path / "run"
    command = ["-m", "ahriuwu_cli", "train", "dynamics", folder / "data", "--out", out, "--steps", "100000"]
    processes = start([*command, "--parallel", "fsdp", "--log-every", "1", "--preview-windows", "2", "--device", "cpu"])
    while not (out / "metrics.jsonl").exists() and all(p.poll() is None for p in processes):
        time.sleep(0.1)
    processes[1].kill()
    (code, output), _ = finish(processes)
    assert code == 1, output
    assert "process 0 of 2 lost the others" in output


@pytest.mark.slow
@pytest.mark.parametrize(("options", "number", "said"), [("", signal.SIGKILL, 15), (TORCHRUN, signal.SIGUSR1, 10)])
def test_what_ends_torchrun_ends_its_processes_after_one_save(folder, tmp_path, options, number, said):
    """What torchrun does not pass on kills it: its processes must not train on without it."""
    out = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "ahriuwu_cli", "train", "dynamics", folder / "data", "--out", out, "--steps", "100000"]
    torchrun = subprocess.Popen(
        [*launcher, *options.split(), *command, "--preview-windows", "2", "--log-every", "1", "--device", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while not (out / "metrics.jsonl").exists() and torchrun.poll() is None:
        time.sleep(0.1)
    torchrun.send_signal(number)
    output = torchrun.communicate(timeout=60)[0]  # to the end of all that write to it
    (sentence,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert f"error: stopped by signal {said} at step" in sentence
    assert f"state saved, go on with: torchrun --standalone --nproc-per-node 2 {TORCHRUN} -m ahriuwu_cli" in sentence
    assert len(list((out / "state").iterdir())) == 1
