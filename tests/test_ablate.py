"""The ablation study: its plan holds together, its lies are lies, and its tables say what the results say."""

import json
import sys
import tomllib
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from worlds import moving_pictures, tiny_world

from ahriuwu_cli.evaluation.blind import CleanContextTold
from ahriuwu_cli.evaluation.evaluate import EvaluationConfig, evaluate
from ahriuwu_cli.evaluation.protocol import make_manifest
from ahriuwu_cli.training.checkpoint import load_world, save_tokenizer

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import ablate  # noqa: E402
import ablation_tables  # noqa: E402


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    store = moving_pictures(tmp_path_factory.mktemp("ablate") / "data")
    return store, tiny_world(store), make_manifest(store, "test", 3, 6, 4, 0)


def test_every_row_of_every_table_is_an_arm_and_a_view_that_the_plan_has():
    document, plan = tomllib.loads(ablate.PLAN.read_text()), ablate.read_plan()
    there = {(arm.name, view) for arm in plan.arms for view in arm.views}
    for table in document["table"]:
        asked = {tuple(row) for row in table["rows"]} | ({tuple(table["reference"])} if "reference" in table else set())
        assert asked <= there, asked - there
        known = {*ablation_tables.BY_WINDOW, *ablation_tables.PLACES}
        assert set(table.get("columns", ())) <= known
        assert f"<!-- table {table['name']} -->" in (SCRIPTS.parent / "docs" / "results.md").read_text()


@pytest.mark.parametrize("wrong", ['[[arm]]\nname = "x"\nseeds_ = [1]', '[[arm]]\nname = "x"\nviews = ["plane"]'])
def test_a_plan_with_a_word_that_means_nothing_is_refused(wrong, tmp_path):
    text = ablate.PLAN.read_text()
    (tmp_path / "plan.toml").write_text(text[: text.index("[[arm]]")] + wrong + "\n")
    with pytest.raises((TypeError, AssertionError)):
        ablate.read_plan(tmp_path / "plan.toml")


def test_a_run_can_take_the_steps_that_an_arm_took_in_a_published_report(tmp_path, place):
    rows = [
        {"arm": arm, "view": view, "seed": seed, "steps": steps}
        for arm, seed, steps in (("base", 0, 3), ("base", 1, 6), ("flat", 0, 50)) for view in "pq"[: 2 - seed]
    ]  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    arm = next(arm for arm in ablate.read_plan().arms if arm.name == "base")
    steps = ablate._published_steps(arm, tmp_path / "results.json")
    assert steps == 4  # of 4.5, by seed and not by view
    with pytest.raises(SystemExit, match="knows no arm base2"):
        ablate._published_steps(replace(arm, name="base2"), tmp_path / "results.json")
    (tmp_path / "data").symlink_to(place[0].path)
    save_tokenizer(place[1].tokenizer, tmp_path / "tokenizer", {})
    ablate.train(ablate.read_plan(), replace(arm, steps=steps), 7, tmp_path)
    assert load_world(tmp_path / "worlds" / "base-7" / "last", "cpu").facts["step"] == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "--only", "base,flta"), "--only flta: "),
        (("run", "--only", ""), "--only : "),
        (("report", "--only", "base"), "--only is for `run`"),
        (("report", "--seeds", "3"), "--seeds is for `run`"),
        (("report", "--steps-of", "results.json"), "--steps-of is for `run`"),
        (("run", "--seeds", "one"), "--seeds: invalid seeds value: 'one'"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused_before_anything_is_recorded(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablate.py", *words, "--out", str(tmp_path / "out"), "--docs", str(tmp_path)])
    monkeypatch.setattr(ablate.subprocess, "run", lambda *a, **k: pytest.fail("something is recorded"))
    with pytest.raises(SystemExit) as stop:
        ablate.main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert ("try flat\n" in err) == ("flta" in said)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_is_never_told_d_answers_alike_for_every_d(place):
    world = place[1]
    network = deepcopy(world.dynamics)
    z = torch.randn(1, 4, world.tokenizer.tokens, world.tokenizer.latent_dim)
    actions, known = torch.zeros(1, 4, world.action_space.width), torch.ones(1, 4, dtype=torch.bool)
    answers = lambda: [  # noqa: E731
        network(z, torch.full((1, 4), 0.5), torch.full((1, 4), d), actions, known) for d in (1 / 8, 1 / 2)
    ]
    small, large = answers()
    assert not torch.equal(small, large)
    network.register_forward_pre_hook(ablate._never_told_d)
    told_small, told_large = answers()
    assert torch.equal(told_small, small)
    assert torch.equal(told_large, small)


def test_a_clean_context_that_is_told_to_be_noisy_is_another_forecast_and_nothing_else_is_touched(place):
    store, world, manifest = place
    score = lambda w, tau: evaluate(  # noqa: E731
        w, store, EvaluationConfig(), w.generation_with({"sampler": "euler", "steps": 2, "tau_ctx": tau}), manifest
    )["windows"]
    told = replace(world, dynamics=CleanContextTold(world.dynamics, 0.1))
    assert score(told, 0.0) != score(world, 0.0)
    assert score(told, 0.1) == score(world, 0.1)  # nothing is at tau 0 there
    honest = replace(world, dynamics=CleanContextTold(world.dynamics, 0.0))
    assert score(honest, 0.0) == score(world, 0.0)


def test_the_usual_spread_counts_an_arm_once_however_many_views_it_has():
    def found(arm, view, values):
        results = tuple({"horizons": {"16": {"ssim": v}}, "study": {"seed": i}} for i, v in enumerate(values))
        return ablation_tables.Found(arm, view, results)

    study = ablation_tables.Study(Path("/nowhere"))
    wide, narrow, middle = (0.0, 1.0), (0.0, 0.1), (0.0, 0.5)
    study.found = {
        (f.arm, f.view): f for f in (found("a", "p", wide), found("b", "p", narrow), found("c", "p", middle))
    }
    usual = study.usual("SSIM")
    study.found |= {("a", view): found("a", view, wide) for view in "qrst"}
    assert study.usual("SSIM") == pytest.approx(usual)


def test_two_views_of_an_arm_are_paired_by_seed_and_two_arms_are_not():
    def found(arm, view, values, seeds=(0, 1, 2)):
        results = tuple(
            {"horizons": {"16": {"ssim": v}}, "study": {"seed": s}} for v, s in zip(values, seeds, strict=True)
        )
        return ablation_tables.Found(arm, view, results)

    study = ablation_tables.Study(Path("/nowhere"))
    a, b, c = found("a", "p", (0.1, 0.5, 0.9)), found("a", "q", (0.2, 0.6, 1.0)), found("c", "p", (0.2, 0.6, 1.0))
    study.found = {(f.arm, f.view): f for f in (a, b, c)}
    value, low, high = study.mean(b, "SSIM", a)
    assert (value, low, high) == pytest.approx((0.1, 0.1, 0.1))  # every seed moved by as much
    value, low, high = study.mean(c, "SSIM", a)
    assert value == pytest.approx(0.1)
    assert high - low > 0.5
    late = found("a", "late", (0.7, 1.1), (1, 2))  # its first seed is still to come
    study.found["a", "late"] = late
    assert study.mean(late, "SSIM", a)[0] == pytest.approx(0.2)


def test_a_table_becomes_a_picture_and_one_row_alone_does_not(tmp_path):
    def found(arm, values):
        results = tuple(
            {"horizons": {"16": {"ssim": v}}, "study": {"seed": s, "cpu_seconds": 60.0}} for s, v in enumerate(values)
        )
        return ablation_tables.Found(arm, "p", results)

    study = ablation_tables.Study(Path("/nowhere"))
    study.found = {(arm, "p"): found(arm, (0.1, 0.2)) for arm in "ab"}
    table = {"name": "t", "rows": [["a", "p"], ["b", "p"]], "columns": ["SSIM"], "reference": ["a", "p"]}
    assert ablation_tables.plot_table(study, table, tmp_path).read_bytes().startswith(b"\x89PNG")
    assert ablation_tables.plot_table(study, table | {"over": "seconds"}, tmp_path) is not None
    assert ablation_tables.plot_table(study, table | {"rows": [["a", "p"]]}, tmp_path) is None
