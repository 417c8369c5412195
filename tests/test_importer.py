"""The importer: a video whose next frame is its action, and every way in which files can fail to fit together."""

import json
import os
import time
import tracemalloc
import weakref
from fractions import Fraction

import av
import numpy as np
import pytest

from ahriuwu_cli.data import action_files, importer
from ahriuwu_cli.data.action_component import ActionComponent
from ahriuwu_cli.data.action_files import infer_space, read_actions
from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.importer import ImportConfig, import_videos, plan_import
from ahriuwu_cli.data.video_writing import write_mp4
from ahriuwu_cli.errors import DataError, UserError

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
    with pytest.raises(DataError, match="below the 20 asked for: leave --fps away, or give one up to 10"):
        _load(tmp_path, fps=20)
    _csv(tmp_path / "a.csv")
    with pytest.raises(DataError, match="has actions"):
        _load(tmp_path, fps=5)


@pytest.mark.parametrize(
    ("rates", "labelled", "fps", "advice"),
    [
        ((30, 25), "", None, "give --fps 25, or import them apart"),
        ((30, 25), "", 30, "give --fps 25, or import them apart"),
        ((30, 25), "b", None, "give --fps 25, or import them apart"),
        ((30, 25), "b", 20, "give --fps 25, or import them apart"),
        ((30, 25), "a", None, "import them apart, or resample them beforehand"),
        ((30, 25), "a", 25, "import them apart, or resample them beforehand"),
        ((30, 25), "a", 30, "import them apart, or resample them beforehand"),
        ((30, 25), "ab", None, "import them apart, or resample them beforehand"),
        ((30, 30), "ab", 15, "leave --fps away, or resample video and actions together"),
        ((30, 30), "a", 60, "leave --fps away, or resample video and actions together"),
        ((30, 30), "", 60, "leave --fps away, or give one up to 30"),
    ],
)
def test_what_brings_videos_to_one_rate_is_advised_only_where_it_does(tmp_path, rates, labelled, fps, advice):
    for name, rate in zip("ab", rates, strict=True):
        write_mp4(tmp_path / f"{name}.mp4", np.zeros((24, 16, 16, 3), np.uint8), rate)
        if name in labelled:
            _csv(tmp_path / f"{name}.csv", "gear", [(0,)] * 23)
    with pytest.raises(DataError, match=f": {advice}"):
        _load(tmp_path, fps=fps)
    if advice.startswith("give --fps"):
        assert _load(tmp_path, fps=25)[0].fps == 25
    if advice.startswith("leave"):
        assert _load(tmp_path)[0].fps == 30


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
        ({"a.mp4": 10, "a.csv": "x\n1e39\n"}, "line 2: .* not a finite number"),
        ({"a.mp4": 10, "a.csv": "x\n1\n1_5\n"}, "line 3: .*'1_5', not a finite number"),
        ({"a.mp4": 10, "a.jsonl": '{"x_y": "1_5"}\n'}, "line 1: .*'1_5', not a finite number"),
        ({"a.mp4": 10, "a.csv": "x\n-3e38\n3e38\n"}, "the range -3e.38 to 3e.38"),
        ({"a.mp4": 10, "a.csv": b"\xff\xfe\x00"}, "UTF-8"),
        ({"a.mp4": 10, "a.jsonl": '{"a": 1}\n{"b": 1}\n'}, "line 2"),
        ({"a.mp4": 10, "a.jsonl": "[1]\n[1, 2]\n"}, "line 2"),
        ({"a.mp4": 10, "a.jsonl": "[1]\nleft\n"}, "line 2: not JSON"),
        ({"a.mp4": 10, "a.jsonl": "[[1]]\n"}, "finite number"),
        ({"a.mp4": 10, "a.jsonl": "[1]\n[2],[3]\n"}, "line 2: not JSON"),
        ({"a.mp4": 10, "a.jsonl": "[1]\n[2\n,3]\n"}, "line 2: not JSON"),
        ({"a.mp4": 10, "a.jsonl": '{"a": 1}\n{"a": 2}, {"a": 3}\n{"a": 4, "b}\n{": 5}\n'}, "line 2: not JSON"),
        ({"a.mp4": 10, "a.jsonl": '[1]\n{"a": 1}\n'}, "line 2: .* on every line"),
        ({"a.mp4": 10, "a.jsonl": '{"a": 1}\n\n{"a": null}\n'}, "line 3: the value of 'a' is None"),
        ({"a.mp4": 10, "a.jsonl": f"{[1] * 513}\n"}, "513 columns: give 1 to 512"),
        ({"a.mp4": 10, "a.jsonl": "[]\n"}, "0 columns"),
        ({"a.mp4": 10, "a.csv": ",".join(f"x{i}" for i in range(513))}, "513 columns: give 1 to 512"),
        (
            {"a.mp4": 10, "a.csv": f"x,{'n' * 201}\n1,2\n"},
            r"a\.csv has the name 'nn.* of 201 characters: give at most 200",
        ),
        ({"a.mp4": 10, "a.jsonl": f'{{"{"n" * 10_000}": 1}}\n'}, r"a\.jsonl has the name 'nn.* of 10000 characters"),
        ({"a.mp4": 10, "a.csv": 'x,y\n1,2\n\n1,"2\n3,4\n'}, "line 4: a quoted text does not end"),
        ({"a.mp4": 10, "a.csv": 'x,y\n1,2\n1,"2'}, "line 3: a quoted text does not end"),
        ({"a.mp4": 10, "a.csv": "x\n" + "1" * 65_537}, "line 2: longer than"),
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


def test_a_rate_that_no_dataset_may_have_is_no_rate_of_an_import(tmp_path):
    for fps in (0.001, 0.00999, 1001, float("nan")):
        with pytest.raises(UserError, match=r"from 0.01 to 1000"):
            ImportConfig(tmp_path, fps=fps)
    assert [ImportConfig(tmp_path, fps=fps).fps for fps in (0.01, 1000)] == [0.01, 1000]


def test_a_column_that_moves_by_less_than_float32_holds_does_not_move(tmp_path):
    _csv(tmp_path / "a.csv", "x", [1, 1.00000000001])
    space, [note] = infer_space([read_actions(tmp_path / "a.csv")])
    assert (space.components[0].low, space.components[0].high) == ((0.0,), (1.00000000001,))
    assert "x 0 to 1" in note


BARE = {  # bare arrays, a file with names, and how the space that both give would order the columns
    "a button among axes": ("[0.5, 1]", "axis0,axis1\n0.2,0\n", "axis1, axis0"),
    "a button in that file alone": ("[1, 0]", "axis0,axis1\n0.2,0\n", "axis1, axis0"),
    "axes": ("[0.5, 0.2]", "axis1,axis0\n0.2,0.4\n", "axis1, axis0"),
    "buttons": ("[1, 0]", "axis1,axis0\n1,0\n", "axis1, axis0"),
}


@pytest.mark.parametrize("bare_first", [False, True])
@pytest.mark.parametrize("name", BARE)
def test_bare_arrays_are_never_taken_for_columns_in_another_order(tmp_path, name, bare_first):
    bare, named, order = BARE[name]
    (tmp_path / "bare.jsonl").write_text(bare + "\n")
    (tmp_path / "named.csv").write_text(named)
    tables = [read_actions(tmp_path / "named.csv"), read_actions(tmp_path / "bare.jsonl")]
    if bare_first and name in ("axes", "buttons"):  # whose order counts is named first
        space, _ = infer_space(tables[::-1])
        assert space.column_names == ("axis0", "axis1")
        assert tables[1].order_in(space) == [0, 1]
        assert tables[0].order_in(space) == [1, 0]
        return
    with pytest.raises(DataError, match=rf"bare.jsonl gives bare arrays, and .* \({order}; buttons come first\)"):
        infer_space(tables[::-1] if bare_first else tables)


def test_a_line_of_json_ends_where_a_line_of_a_file_ends(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"a\u2028b": 1}\r\n{"a\u2028b": 0}\n\n'.encode())
    (tmp_path / "a.csv").write_bytes("a\u2028b\r1\r0\r".encode())
    for name in ("a.jsonl", "a.csv"):
        table = read_actions(tmp_path / name)
        assert (table.columns, table.rows.tolist()) == (("a\u2028b",), [[1.0], [0.0]])


@pytest.mark.parametrize("block", [1, 9, 1 << 15])
def test_lines_that_are_parsed_together_are_the_rows_that_each_is_and_are_named_as_each(tmp_path, monkeypatch, block):
    monkeypatch.setattr(action_files, "BLOCK", block)
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbf\n"x","y"\r1, 2\r\n\n"3",1e1\n-1e-3,3')
    (tmp_path / "a.jsonl").write_text('\n{"x{": 1, "y": true}\n  \n\t{"y": "-2.5", "x{": 0.1}  \n')
    read = {name: read_actions(tmp_path / name) for name in ("a.csv", "a.jsonl")}
    assert (read["a.csv"].columns, read["a.csv"].rows.tolist()) == (("x", "y"), [[1, 2], [3, 10], [-0.001, 3]])
    assert (read["a.jsonl"].columns, read["a.jsonl"].rows.tolist()) == (("x{", "y"), [[1, 1], [0.1, -2.5]])
    for name, text, line in (
        ("a.csv", "x,y\n1,2\n\n1,2\n1,x\n", "line 5: the value of 'y' is 'x'"),
        ("a.csv", "x,y\n1,2\n\n1,2\n1\n", "line 5: 1 values for 2 columns"),
        ("a.jsonl", "[1]\n\n[1]\n[1e39]\n", "line 4: the value of 'action' is 1e[+]39"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=line):
            read_actions(tmp_path / name)


def test_a_header_may_go_over_lines_and_no_row_may(tmp_path):
    (tmp_path / "a.csv").write_text('x,"long\nname"\n1,2\n')
    assert read_actions(tmp_path / "a.csv").columns == ("x", "longname")
    (tmp_path / "a.csv").write_text('x,"long\nname"\n1,"2\n"\n')
    with pytest.raises(DataError, match="line 3: a quoted text"):
        read_actions(tmp_path / "a.csv")


LARGE = {  # how a file begins, and the row that it repeats
    "narrow.csv": ("L,R\n", "0,1\n"),
    "wide.csv": (",".join(f"c{i}" for i in range(500)) + "\n", ",".join("1" * 500) + "\n"),
    "strange.csv": ("x\n", '"1e0"\n'),
    "blank.csv": ("x\n1", "\n"),
    "arrays.jsonl": ("", "[0]\n"),
    "wide.jsonl": ("", f"{[1] * 500}\n"),
    "objects.jsonl": ("", '{"a{": 1}\n'),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_file_of_actions_takes_little_time_and_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(action_files, "MAX_BYTES", 2_000_000)  # so much is taken for a moment, however large a file is
    first, row = LARGE[name]
    (tmp_path / name).write_text(first + row * ((1_600_000 if "wide" in name else 400_000) // len(row)))
    begun = time.process_time()
    infer_space([read_actions(tmp_path / name)])
    assert time.process_time() - begun < 1.5  # 0.1; it was 3 to 5 where each of many columns took a copy of all rows
    (tmp_path / name).write_text(first + row * (400_000 // len(row)))
    tracemalloc.start()
    try:
        read_actions(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 6e6  # it was up to 34e6
    finally:
        tracemalloc.stop()


def test_an_import_holds_the_actions_of_one_file_at_a_time(tmp_path, monkeypatch):
    tables = []

    def read(path):
        assert sum(table() is not None for table in tables) <= 1  # the one before, until this one takes its name
        table = read_actions(path)
        tables.append(weakref.ref(table))
        return table

    monkeypatch.setattr(importer, "read_actions", read)
    for name in "abcd":
        _video(tmp_path / f"{name}.mp4")
        _csv(tmp_path / f"{name}.csv")
    _load(tmp_path)
    (tmp_path / "actions.json").write_text(json.dumps(plan_import(ImportConfig(tmp_path)).action_space.to_json()))
    _csv(tmp_path / "d.csv", "x")
    with pytest.raises(DataError, match=r"d\.csv has the columns x"):  # before the first video is decoded
        plan_import(ImportConfig(tmp_path))
    assert len(tables) == 4 + 4 + 4 + 4


def test_an_import_holds_the_frames_of_one_video_and_once(tmp_path, run):
    (tmp_path / "films").mkdir()
    for name in ("a.mp4", "b.mp4"):
        write_mp4(tmp_path / "films" / name, np.zeros((300, 128, 128, 3), np.uint8), 10)
    import_ = ("import", tmp_path / "films", "--size", 128, "--out")
    assert run(*import_, tmp_path / "first")[0] == 0  # what is imported for it is in memory now
    tracemalloc.start()
    try:
        assert run(*import_, tmp_path / "second")[0] == 0
        assert tracemalloc.get_traced_memory()[1] < 1.5 * 300 * 128 * 128 * 3
    finally:
        tracemalloc.stop()


def _timed(path, times, rate, codec="ffv1"):
    """A frame at each of the times, in ms, as bright as its number."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate)
        stream.height = stream.width = 32
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 2 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


STEADY = [round(i * 1000 / 30) for i in range(60)]


@pytest.mark.parametrize("pair", [(29.97, 30), (30, 29.97), (60, 59.94), (59.94, 60), (119.88, 120), (120, 119.88)])
def test_rates_of_television_are_those_of_computers_in_either_order(tmp_path, pair):
    for name, fps in zip("ab", pair, strict=True):
        _video(tmp_path / f"{name}.mp4", fps=fps)
    plan, clips = _load(tmp_path)
    assert plan.fps == pytest.approx(pair[0], rel=1e-4)
    assert [len(frames) for frames, _, _ in clips] == [10, 10]


@pytest.mark.parametrize(
    ("times", "rate", "fps", "shown", "note"),
    [
        ([0, 10, 20, 30, 500, 510, 520, 530, 1000, 1010], 100, None, range(10), "stands still for up to 0.47 s"),
        ([0, 10, 20, 30, 500, 510, 520, 530, 1000, 1010], 100, 2, (0, 4, 8), None),
        ([0, 10, 20, 30, 3500, 3510], 100, 2, (0, 4), "stands still for up to 3.50 s"),
        ([10 * i for i in range(50)], 10, None, range(50), "its 50 frames take 0.49 s"),
        (STEADY, 30, None, range(60), None),
        (STEADY, 30, 15, range(0, 60, 2), None),
        (STEADY, 30, 20, [i for i in range(60) if i % 3 != 1], None),
        ([t + 3000 for t in STEADY], 30, 10, range(0, 60, 3), None),
        ([0, *STEADY[2:]], 30, None, range(59), None),  # one frame is missing
    ],
)
def test_frames_are_thinned_by_their_times_and_uneven_ones_are_said(tmp_path, times, rate, fps, shown, note):
    _timed(tmp_path / "a.mkv", times, rate)
    plan, [(frames, _, _)] = _load(tmp_path, fps=fps)
    assert (frames[:, 0, 0, 0] // 2).tolist() == list(shown)
    said = [n for n in plan.notes if n.startswith("a.mkv")]
    assert len(said) == (note is not None)
    assert (note or "") in "".join(said)


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.mov", "a.avi", "a.webm"])
def test_an_ordinary_video_of_any_kind_is_even(tmp_path, name):
    with av.open(str(tmp_path / name), "w") as out:
        stream = out.add_stream("libvpx" if name == "a.webm" else "libx264", rate=Fraction(30000, 1001))
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv420p"
        for picture in np.random.default_rng(0).integers(0, 99, (40, 32, 32, 3)).astype(np.uint8):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            out.mux(stream.encode(frame.reformat(format="yuv420p")))
        out.mux(stream.encode(None))
    for fps, count in ((None, 40), (15, 20), (5, 7)):
        plan, [(frames, _, _)] = _load(tmp_path, fps=fps)
        assert (len(frames), [n for n in plan.notes if n.startswith("a.")]) == (count, [])
