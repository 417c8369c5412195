"""What an evaluation writes passes its check, whatever happened in it; what contradicts itself does not."""

import json
import re
from copy import deepcopy
from unittest.mock import ANY

import numpy as np
import pytest
from worlds import NO_ACTIONS, breaks_at, moving_pictures, puppet_world, tiny_world

from ahriuwu_cli.data.episode_writer import EpisodeWriter
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.errors import DataError
from ahriuwu_cli.evaluation.cell_check import check_result
from ahriuwu_cli.evaluation.cells import FOLDER, run_plan
from ahriuwu_cli.evaluation.evaluate import EvaluationConfig, evaluate, ready
from ahriuwu_cli.evaluation.merge import as_finished, read_cells
from ahriuwu_cli.evaluation.page import page
from ahriuwu_cli.evaluation.plan import read_plan
from ahriuwu_cli.evaluation.prepare import NO_MEAN
from ahriuwu_cli.evaluation.report import evaluation_text
from ahriuwu_cli.evaluation.saved import save_rollouts, score_rollouts
from ahriuwu_cli.evaluation.shards import Shards
from ahriuwu_cli.training.checkpoint import save_world

ASKED = {"windows": 6, "context": 3, "horizon": 5}
# What nothing else in a result tells: it may be another number within its range.
FREE = re.compile(
    r"horizons\.\d+\.((ceiling_)?motion_ratio|\w*sharpness_ratio|teacher_forced_\w+)|curves\.(psnr_\w+|mean_frame)\.[1-2]"
    r"|curves\.(floor|ceiling)\.2|action_delta_moving_db\.\w+\.\d\.\w+|drift_db_per_frame\.\w+\.(lo|hi)|timing\.\w+"
    r"|settings\.(checkpoint|checkpoint_git|dataset|torch|evaluation\.(context|horizons\.2|seed|batch|delta_at)|window_seed|ahriuwu|k_max)"
    r"|settings\.(generation\.tau_ctx|\w*fingerprint|manifest_hash)|windows\.\d\.(episode|start|delta_\w+_1)|names\.\w+"
)


def plain(result):
    return json.loads(json.dumps(result))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return moving_pictures(tmp_path_factory.mktemp("cells") / "data")


@pytest.fixture(scope="module")
def result(store):
    world = tiny_world(store)
    return plain(evaluate(world, store, EvaluationConfig(**ASKED), world.generation))


@pytest.mark.parametrize(
    "asked",
    [{"horizon": 1}, {"horizon": 4}, {"delta_at": 3}, {"noise_seeds": 2}, {"windows": 2}, {"horizons": (2, 3)}, {}],
    ids=str,
)
def test_what_an_evaluation_writes_passes(store, asked):
    for world in (tiny_world(store), puppet_world(store, breaks_at(5))):
        check_result(plain(evaluate(world, store, EvaluationConfig(**ASKED | asked), world.generation)))


def test_what_an_evaluation_without_actions_or_of_still_frames_writes_passes(tmp_path):
    store = moving_pictures(tmp_path / "data", episodes=3, space=NO_ACTIONS)
    world = tiny_world(store)
    check_result(plain(evaluate(world, store, EvaluationConfig(windows=1, context=3, horizon=3), world.generation)))


def test_without_a_train_split_there_is_no_mean_frame_which_is_said_and_held_to(tmp_path):
    store = moving_pictures(tmp_path / "data", episodes=6, split="test")
    world = tiny_world(store)
    config, manifest = ready(world, store, EvaluationConfig(**ASKED), world.generation)
    found = plain(evaluate(world, store, config, world.generation, manifest))
    assert found["status"] == "ok"
    assert found["warnings"] == [NO_MEAN]
    assert found["curves"]["mean_frame"] == [None] * 5
    for row in found["horizons"].values():
        assert {name for name, value in row.items() if value is None} == {n for n in row if n.startswith("mean_frame_")}
    check_result(found)
    assert NO_MEAN in evaluation_text(found)
    assert "sharp of the ceiling" in evaluation_text(found)
    assert NO_MEAN in page(found)
    save_rollouts(world, store, config, world.generation, manifest, tmp_path / "saved")
    assert plain(score_rollouts(tmp_path / "saved", store)) == found | {"timing": ANY}
    for path in (
        ("curves", "mean_frame", 1),
        ("horizons", "4", "mean_frame_ssim"),
        ("horizons", "4", "mean_frame_motion_ratio"),
    ):
        assert refused(changed(found, path, 0.5))
    assert refused(changed(found, ("warnings",), []))


@pytest.mark.parametrize("show", ["black", "flat"])
def test_what_an_evaluation_of_frames_without_errors_or_motion_writes_passes(tmp_path, show):
    """Black: nothing moves, and all is at the cap. Flat: the reconstruction is the picture itself."""
    rng = np.random.default_rng(0)
    with EpisodeWriter(tmp_path / "data", height=16, width=16, fps=10.0, action_space=NO_ACTIONS, seed=0) as writer:
        for split in ["train", "test"] * 2:
            colours = rng.integers(0, 256, (12, 1, 1, 3)) * (show == "flat")
            writer.add(np.broadcast_to(colours, (12, 16, 16, 3)).astype(np.uint8), None, split=split)
    store = EpisodeStore.open(tmp_path / "data")
    for world in (tiny_world(store), puppet_world(store, breaks_at(5))):
        found = plain(evaluate(world, store, EvaluationConfig(**ASKED, noise_seeds=2), world.generation))
        assert found["horizons"]["5"]["ceiling_psnr_of_mse"] == 60
        assert (found["horizons"]["5"]["floor_motion_ratio"] is None) == (show == "black")
        check_result(found)


def leaves(value, path=()):
    """Every value that holds no others; of the windows those of one."""
    if path[:1] == ("windows",) and path[1:2] > (0,):
        return
    if isinstance(value, dict | list) and value:
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(each, (*path, key))
    else:
        yield path, value


def changed(document, path, value):
    document = deepcopy(document)
    entry = document
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    return document


def refused(document):
    try:
        check_result(document)
    except ValueError:
        return True
    return False


def test_no_number_that_others_tell_can_be_another(result):
    found = set()
    for path, value in leaves(result):
        more = 9 if path[-1] in ("lo", "hi") else 1  # other draws give other ends
        other = value + more if type(value) in (int, float) else "x" * 8
        if not refused(changed(result, path, other)):
            found.add(".".join(map(str, path)))
    assert found
    assert not {name for name in found if not FREE.fullmatch(name)}


@pytest.mark.parametrize("value", [True, "12.5", 2**63, -(2**62), [], {}, {"value": 1}], ids=str)
def test_no_leaf_can_be_of_another_kind(result, value):
    for path, was in leaves(result):
        if type(was) is not type(value):
            assert refused(changed(result, path, value)) or (type(value), was) == (str, None), path


def test_no_entry_can_be_added_or_left_out(result):
    def objects(value, path=()):
        if isinstance(value, dict):
            yield path
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(each, dict | list):
                yield from objects(each, (*path, key))

    for path in objects({"": result}):
        for change in (lambda entry: entry.update(more=1), lambda entry: entry.popitem()):
            document = {"": deepcopy(result)}
            entry = document
            for key in path:
                entry = entry[key]
            if path:
                change(entry)
                assert path == ("",) or refused(document[""]), path


def nothing(result):
    for row in result["windows"]:
        row.update({name: None for name in row if name.startswith("psnr_")})


def nothing_consistently(result):
    """All that the model's frames decide is null, and still the status is ok."""
    for row in result["windows"]:
        row.update({name: None for name in row if re.match("psnr|gain|ssim|delta", name)})


def alike(result):
    """SSIM is 1 everywhere, whatever PSNR says."""
    for h, row in result["horizons"].items():
        row["ssim"] = result["curves"]["ssim"][int(h) - 1] = 1.0
        for window in result["windows"]:
            window[f"ssim_{h}"] = 1.0


def one_alike(result):
    """One window's SSIM is 1, and another makes up for it."""
    one, other, *_ = result["windows"]
    more = 1 - one["ssim_4"]
    one["ssim_4"] += more
    other["ssim_4"] -= more


CONTRADICTIONS = {
    "nothing": nothing,
    "nothing_consistently": nothing_consistently,
    "broken": lambda r: r["not_finite_frames"].update(model=6),
    "broken_and_said": lambda r: (r["not_finite_frames"].update(model=6), r.update(status="nan")),
    "nan": lambda r: r.update(status="nan"),
    "turned": lambda r: r["drift_db_per_frame"]["model"].update(lo=9.0, hi=-9.0),
    "half": lambda r: r["drift_db_per_frame"]["model"].update(lo=None),
    "frame_99": lambda r: r["horizons"].update({"99": r["horizons"]["5"]}),
    "twice": lambda r: r["windows"].__setitem__(0, r["windows"][1]),
    "fewer": lambda r: r["windows"].pop(),
    "lines": lambda r: r["warnings"].append("a\nFAILED: everything"),
    "many": lambda r: r["warnings"].extend(["a", "b"]),
    "curve": lambda r: r["curves"]["psnr"].__setitem__(2, None),
    "floor_curve": lambda r: r["curves"]["floor"].__setitem__(1, None),
    "ends": lambda r: r["curves"].update(psnr_lo=r["curves"]["psnr_hi"], psnr_hi=r["curves"]["psnr_lo"]),
    "steps": lambda r: r["settings"]["generation"].update(sampler="shortcut", steps=3),
    "no_mean": lambda r: r["warnings"].insert(0, NO_MEAN),
    "no_mean_curve": lambda r: r["curves"].update(mean_frame=[None] * 5),
    "split": lambda r: r["settings"]["evaluation"].update(split="val"),
    "one_mean": lambda r: r["horizons"]["4"].update(psnr_of_mse=59.0),  # of PSNRs is never below PSNR of the mean error
    "other_mean": lambda r: r["horizons"]["4"].update(mean_frame_psnr_of_mse=59.0),
    "floor_mean": lambda r: r["horizons"]["4"].update(floor_psnr_of_mse=r["horizons"]["4"]["floor_psnr_of_mse"] - 0.1),
    "alike": lambda r: r["horizons"]["4"].update(mean_frame_ssim=1.0),
    "colour": lambda r: r["horizons"]["4"].update(ceiling_colour_shift=0.5),
    "moving": lambda r: r["horizons"]["4"].update(mean_frame_motion_ratio=0.3),
    "frozen": lambda r: r["horizons"]["4"].update(motion_ratio=0.0, motion_cosine=1.0),
    "no_motion": lambda r: r["horizons"]["4"].update(motion_ratio=None, motion_cosine=None),
    "no_edges": lambda r: r["horizons"]["4"].update(floor_sharpness_ratio=None),
    "all_alike": alike,
    "one_alike": one_alike,
    "between": lambda r: r["curves"]["ssim"].__setitem__(1, 1.0),
    "slope": lambda r: r["drift_db_per_frame"]["ceiling"].update(value=9.0, lo=8.0, hi=10.0),
}


def test_a_result_that_lists_a_window_twice_is_refused_though_its_numbers_fit(result):
    document, seen = deepcopy(result), {}
    for row in document["windows"]:
        row["start"] = seen.setdefault(row["episode"], row["start"])
    assert len(seen) < len(document["windows"])
    with pytest.raises(ValueError, match="it lists a window twice"):
        check_result(document)


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_result_that_contradicts_itself_is_refused(result, name):
    document = deepcopy(result)
    CONTRADICTIONS[name](document)
    assert refused(document)


def test_a_cell_of_other_settings_than_its_result_is_refused(store, tmp_path):
    save_world(tiny_world(store), tmp_path / "a")
    plan = f'[[cell]]\ncheckpoint = "a"\ndataset = "{store.path}"\nwindows = 4\ncontext = 3\nhorizon = 2\n'
    (tmp_path / "plan.toml").write_text(plan)
    run_plan(read_plan(tmp_path / "plan.toml"), tmp_path / "out", Shards(), device="cpu")
    (path,) = (tmp_path / "out" / FOLDER).glob("*.json")
    document = json.loads(path.read_text())
    document.pop("checksum")
    assert read_cells(tmp_path / "out")[0] == [as_finished(path.stem, deepcopy(document))]
    old = deepcopy(document)  # from before there was a choice of precision: another name then
    assert old["identity"].pop("precision") == old["result"]["settings"].pop("precision")
    with pytest.raises(ValueError, match="than its name says"):
        as_finished(path.stem, old)
    document["result"]["settings"]["tokenizer_fingerprint"] = "0" * 64
    with pytest.raises(ValueError, match="the tokenizer_fingerprint of its result is another"):
        as_finished(path.stem, document)
    path.write_text(path.read_text().replace('"format"', '"more": 1, "format"', 1))
    with pytest.raises(DataError):
        read_cells(tmp_path / "out")
