"""The importer: a video whose next frame is its action, and every way in which files can fail to fit together."""

import json
import os

import numpy as np
import pytest

from ahriuwu_cli.data.actions import ActionComponent, ActionSpace
from ahriuwu_cli.data.importer import ImportConfig, import_videos, plan_import
from ahriuwu_cli.data.video import write_mp4
from ahriuwu_cli.errors import DataError

ACTIONS = [3, 0, 1, 2, 2, 0, 3, 1, 0]


def _video(path, fps=10, h=32, w=32, t=10):
    """Grey frames: black first, then frame t+1 is as bright as action t says."""
    levels = np.array([20] + [60 + 50 * a for a in ACTIONS])[:t]
    frames = np.broadcast_to(levels[:, None, None, None], (t, h, w, 3)).astype(np.uint8)
    write_mp4(path, frames, fps)


def _csv(path, columns="action", rows=ACTIONS):
    lines = [columns, *(",".join(map(str, np.atleast_1d(r))) for r in rows)]
    path.write_text("\n".join(lines) + "\n")


def _jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def _load(folder, **options):
    plan = plan_import(ImportConfig(folder, 16, 16, **options))
    return plan, list(import_videos(plan))


def test_the_next_frame_of_an_imported_video_is_its_action(tmp_path):
    _video(tmp_path / "a.mp4")
    _csv(tmp_path / "a.csv")
    plan, [(frames, actions, name)] = _load(tmp_path)
    assert plan.action_space == ActionSpace((ActionComponent("action", "discrete", 4),))
    assert (plan.fps, name) == (10, "a.mp4")
    assert frames.shape == (10, 16, 16, 3)
    assert any("inferred one discrete action" in note for note in plan.notes)
    shown = np.round((frames[1:].mean((1, 2, 3)) - 60) / 50)
    np.testing.assert_array_equal(shown, actions[:, 0])


def test_one_row_too_many_is_dropped_at_the_end_and_announced(tmp_path):
    _video(tmp_path / "a.mp4")
    _csv(tmp_path / "a.csv", rows=[*ACTIONS, 1])
    plan, [(_, actions, _)] = _load(tmp_path)
    np.testing.assert_array_equal(actions[:, 0], ACTIONS)
    assert any("last row" in note for note in plan.notes)


@pytest.mark.parametrize("rows", [ACTIONS[:-1], [*ACTIONS, 0, 0]])
def test_any_other_number_of_rows_is_refused_with_both_counts(tmp_path, rows):
    _video(tmp_path / "a.mp4")
    _csv(tmp_path / "a.csv", rows=rows)
    with pytest.raises(DataError, match=f"{len(rows)} rows and a.mp4 has 10 frames: give 9"):
        _load(tmp_path)


def test_json_lines_give_buttons_and_axes_and_videos_without_a_file_stay_unlabelled(tmp_path):
    for name in ("a", "b"):
        _video(tmp_path / f"{name}.mp4")
    rows = [{"steer": round(a / 3 - 0.5, 3), "fire": a % 2} for a in ACTIONS]
    _jsonl(tmp_path / "a.jsonl", rows)
    plan, episodes = _load(tmp_path)
    assert plan.action_space.column_names == ("fire", "steer")
    assert [c.kind for c in plan.action_space.components] == ["binary", "continuous"]
    np.testing.assert_allclose(episodes[0][1], [[r["fire"], r["steer"]] for r in rows], atol=1e-6)
    assert episodes[1][1] is None
    assert any("1 of 2 videos have no action file" in note for note in plan.notes)


def test_a_declared_action_space_orders_the_columns_and_bounds_the_values(tmp_path):
    _video(tmp_path / "a.mp4")
    space = ActionSpace(
        (ActionComponent("steer", "continuous", 1, ("steer",), (-1,), (1,)), ActionComponent("gear", "discrete", 9))
    )
    (tmp_path / "actions.json").write_text(json.dumps(space.to_json()))
    _csv(tmp_path / "a.csv", "gear,steer", [(a, -0.25) for a in ACTIONS])
    plan, [(_, actions, _)] = _load(tmp_path)
    assert plan.action_space == space
    np.testing.assert_array_equal(actions, [(-0.25, a) for a in ACTIONS])
    _csv(tmp_path / "a.csv", "gear,steer", [(a, -1.25) for a in ACTIONS])
    with pytest.raises(DataError, match="steer"):
        _load(tmp_path)
    _csv(tmp_path / "a.csv", "gear,wheel", [(a, 0) for a in ACTIONS])
    with pytest.raises(DataError, match="columns gear, wheel"):
        _load(tmp_path)


def test_thinning_keeps_every_second_frame_and_is_refused_where_there_are_actions(tmp_path):
    _video(tmp_path / "a.mp4")
    plan, [(frames, _, _)] = _load(tmp_path, fps=5)
    whole = _load(tmp_path)[1][0][0]
    np.testing.assert_array_equal(frames, whole[::2])
    assert plan.fps == 5
    with pytest.raises(DataError, match="lower --fps"):
        _load(tmp_path, fps=20)
    _csv(tmp_path / "a.csv")
    with pytest.raises(DataError, match="has actions"):
        _load(tmp_path, fps=5)


def test_a_wide_video_is_cropped_in_the_middle_not_squeezed(tmp_path):
    frames = np.zeros((3, 32, 96, 3), np.uint8)
    frames[:, :, 32:64] = 200
    write_mp4(tmp_path / "a.mp4", frames, 10)
    [(cropped, _, _)] = _load(tmp_path)[1]
    assert cropped[:, :, 2:-2].min() > 180


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "no video file"),
        ({"a.mp4": 10, "b.csv": "action\n1\n"}, "no video of the same name"),
        ({"a.mp4": 10, "a.csv": "action\n1\n", "a.jsonl": "[1]\n"}, "two action files"),
        ({"a.mp4": 10, "b.mp4": 20}, "give --fps"),
        ({"a.mp4": 10, "a.csv": ""}, "empty"),
        ({"a.mp4": 10, "a.csv": "action\n"}, "no action"),
        ({"a.mp4": 10, "a.csv": "1\n2\n"}, "header"),
        ({"a.mp4": 10, "a.csv": "x,x\n1,2\n"}, "repeated"),
        ({"a.mp4": 10, "a.csv": "x,y\n1,2\n3\n"}, "line 3"),
        ({"a.mp4": 10, "a.csv": "action\n1\nleft\n"}, "line 3: .*'left'"),
        ({"a.mp4": 10, "a.csv": "action\nnan\n"}, "finite"),
        ({"a.mp4": 10, "a.csv": b"\xff\xfe\x00"}, "UTF-8"),
        ({"a.mp4": 10, "a.jsonl": '{"a": 1}\n{"b": 1}\n'}, "line 2"),
        ({"a.mp4": 10, "a.jsonl": "[1]\n[1, 2]\n"}, "line 2"),
        ({"a.mp4": 10, "a.jsonl": "[1]\nleft\n"}, "line 2: not JSON"),
        ({"a.mp4": 10, "a.jsonl": "[[1]]\n"}, "finite number"),
        ({"a.mp4": 10, "b.mp4": 10, "a.csv": "x\n1\n", "b.csv": "y\n1\n"}, "columns y"),
        ({"a.mp4": 10, "actions.json": "["}, "not JSON"),
        ({"a.mp4": 10, "actions.json": "[]"}, "components"),
        ({"a.mp4": "not a video"}, "cannot be read"),
        ({"a.mp4": 10, "a.gif": 10}, "only in their endings"),
    ],
)
def test_a_folder_that_does_not_fit_together_is_refused_with_a_sentence(tmp_path, files, sentence):
    for name, content in files.items():
        if isinstance(content, int):
            _video(tmp_path / name, fps=content)
        elif isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=sentence):
        _load(tmp_path)


def test_limits_on_length_hold(tmp_path):
    _video(tmp_path / "a.mp4")
    with pytest.raises(DataError, match="more than 9 frames"):
        _load(tmp_path, max_frames=9)
    _video(tmp_path / "a.mp4", t=1)
    with pytest.raises(DataError, match=r"1 frame\(s\)"):
        _load(tmp_path)


@pytest.mark.parametrize("name", ["actions.json", "a.csv", "a.jsonl", "b.mp4"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "nothing"])
def test_what_would_be_read_and_is_no_regular_file_is_refused(tmp_path, name, kind):
    _video(tmp_path / "a.mp4")
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else tmp_path / "gone")
    with pytest.raises(DataError, match=f"{name} is no regular file"):
        plan_import(ImportConfig(tmp_path))


def test_other_names_in_the_folder_are_left_alone(tmp_path):
    _video(tmp_path / "a.mp4")
    (tmp_path / "raw").mkdir()
    os.mkfifo(tmp_path / "control")
    (tmp_path / ".b.csv").symlink_to("/dev/zero")
    assert plan_import(ImportConfig(tmp_path)).videos == (tmp_path / "a.mp4",)
