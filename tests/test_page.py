"""The page of an evaluation: all numbers in it, nothing that runs, readable by people, printers and screen readers."""

import copy
import io
import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from worlds import moving_pictures, tiny_world

from ahriuwu_cli.data.video import read_video
from ahriuwu_cli.evaluation.evaluate import EvaluationConfig, evaluate
from ahriuwu_cli.evaluation.page import MAX_BYTES, Figure, page, write_page
from ahriuwu_cli.evaluation.page_charts import (
    Film,
    chosen_windows,
    curve_chart,
    films,
    frame_ticks,
    nice_ticks,
    spread_out,
)
from ahriuwu_cli.evaluation.page_style import DARK, LIGHT, block, digits_for, number, tag

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'
FREE = {"meta", "img", "br"}


class Read(HTMLParser):
    """Elements with attributes, text without style; fails where tags are not balanced."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.found, self.text, self.words = [], [], "", {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        assert len(dict(attributes)) == len(attributes), f"an attribute of {name} stands twice"
        self.found.append((name, dict(attributes)))
        if name not in FREE:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += f" {data}"
            self.words.setdefault(self.open[-1], []).append(data)

    def all(self, *names):
        return [attributes for name, attributes in self.found if name in names]


def interval(value, half=0.5):
    return {"value": value, "lo": None if half is None else value - half, "hi": None if half is None else value + half}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    store = moving_pictures(tmp_path_factory.mktemp("data") / "a")
    world = tiny_world(store)
    config = EvaluationConfig(windows=6, context=3, horizon=5, horizons=(1, 4), batch=6)
    return evaluate(world, store, config, world.generation)


@pytest.fixture
def result(measured):
    return copy.deepcopy(measured)


@pytest.fixture(scope="module")
def clips():
    """truth (2, 7, 12, 16, 3) and rollout (2, 5, 12, 16, 3), context 2."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (2, 7, 12, 16, 3), dtype=np.uint8), rng.integers(0, 256, (2, 5, 12, 16, 3), np.uint8)


def filmed(clips, **options):
    truth, rollout = clips
    return films(truth, rollout, context=2, fps=5.0, titles=["one", "two"], **options)


def without_intervals(value):
    if isinstance(value, dict) and set(value) == {"value", "lo", "hi"}:
        return interval(value["value"], None)
    return {k: without_intervals(v) for k, v in value.items()} if isinstance(value, dict) else value


def states(result, clips):
    """Pages of a good run, a failed one, one without actions, of one episode, and of next to nothing."""
    failed = copy.deepcopy(result) | {"status": "nan", "not_finite_frames": {"model": 7, "random": 0}}
    failed["horizons"]["5"] = dict.fromkeys(failed["horizons"]["5"]) | {"gain_db": dict.fromkeys(("value", "lo", "hi"))}
    failed["curves"]["psnr"] = [None] * 5
    still = without_intervals(copy.deepcopy(result)) | {"action_delta_db": None, "action_delta_moving_db": None}
    still["curves"] |= {"psnr_lo": [None] * 5, "psnr_hi": [None] * 5}
    return {
        "good": page(result, command=["ahriuwu", "eval", "a b"], films=filmed(clips)),
        "failed": page(failed),
        "one episode, no actions": page(still | {"action_delta_note": "no action delta: the action space is empty"}),
        "empty": page({}),
        "one horizon": page({"horizons": {"1": {"gain_db": interval(1.0)}}, "n": {"windows": 1}}),
    }


def test_every_state_is_balanced_html_with_headings_in_order_names_for_pictures_and_scopes(result, clips):
    for name, text in states(result, clips).items():
        read = Read(text)
        levels = [int(tag_name[1]) for tag_name, _ in read.found if re.fullmatch(r"h\d", tag_name)]
        assert levels.count(1) == 1, name
        assert levels[0] == 1
        assert all(b <= a + 1 for a, b in pairwise(levels)), levels
        assert all(a.get("alt") for a in read.all("img"))
        assert all(a.get("aria-label") for a in read.all("video", "svg"))
        assert all(a.get("scope") in ("col", "row", "rowgroup") for a in read.all("th"))
        ids = [a["id"] for _, a in read.found if "id" in a]
        assert len(ids) == len(set(ids))
        assert {a["href"][1:] for a in read.all("a") if a["href"].startswith("#")} <= set(ids)
        assert "None" not in read.text, name
        assert any(a.get("name") == "viewport" for a in read.all("meta"))


def test_nothing_comes_from_outside_and_nothing_runs(result, clips):
    text = page(result, films=filmed(clips), figures={"levels": Figure(b"\x89PNG", "error")})
    read = Read(text)
    assert not read.all("script", "link", "iframe", "object", "base", "form")
    assert all(a["src"].startswith("data:") for _, a in read.found if "src" in a)
    assert all(a["href"].startswith(("#", "https://arxiv.org/")) for a in read.all("a"))
    assert not re.search(r"url\(|@import|@font-face", text)
    assert "default-src 'none'" in next(a["content"] for a in read.all("meta") if "http-equiv" in a)
    assert all(a.keys() >= {"autoplay", "loop", "muted", "playsinline", "controls"} for a in read.all("video"))
    assert len(read.all("video")) == 2


def test_names_paths_notes_and_keys_come_out_as_text(result, clips):
    result["settings"] |= {"checkpoint": EVIL, "dataset": EVIL, EVIL: EVIL}
    result |= {"warnings": [EVIL], "action_delta_note": EVIL, EVIL: {EVIL: [EVIL]}, "spread": {EVIL: {EVIL: EVIL}}}
    result["distances"] = {"note": EVIL, "verdict": {"ok": None, "reason": EVIL}, "list": [{EVIL: EVIL, "b": 1}]}
    result["action_delta_db"][EVIL] = {EVIL: interval(1.0)}
    result["horizons"][EVIL] = {EVIL: 1.0, "nested": {EVIL: {EVIL: 1}}}
    result["windows"][0]["episode"] = EVIL
    film = Film(EVIL, b"", b"", (EVIL,), EVIL)
    text = page(result, name=EVIL, command=EVIL, films=[film], figures={EVIL: Figure("<svg/>", EVIL)})
    read = Read(text)
    assert not read.all("script")
    assert not [key for _, attributes in read.found for key in attributes if key.startswith("on")]
    assert "<script" not in text
    assert read.text.count("<script>alert(1)</script>") > 15
    assert EVIL in read.words["h1"]
    assert "&amp;amp;" in text  # what looks like a reference already is not taken for one


def test_no_text_of_a_result_adds_an_element_or_an_attribute(result):
    def with_text(value, text):
        if isinstance(value, dict):
            return {key: with_text(inner, text) for key, inner in value.items()}
        if isinstance(value, list):
            return [with_text(inner, text) for inner in value]
        return text if isinstance(value, str) and value not in ("ok", "eval") else value

    def structure(text):
        shown = Read(
            page(with_text(result, text), name=text, command=[text], films=[Film(text, b"", b"", (text,), text)])
        )
        return [(name, sorted(attributes)) for name, attributes in shown.found]

    assert structure(EVIL) == structure("harmless")
    assert structure("' onclick=alert(1) x='") == structure("harmless")


def test_the_headline_says_gain_interval_numbers_and_what_the_interval_leaves_out(result):
    result["horizons"]["5"]["gain_db"] = {"value": -1.234, "lo": -2.0, "hi": -0.5}
    result["horizons"]["4"]["gain_db"] = {"value": 2.345, "lo": 1.0, "hi": 3.5}
    result["horizons"]["1"]["gain_db"] = {"value": 0.1, "lo": -0.4, "hi": 0.6}
    head = " ".join(Read(page(result)).text.split("PSNR by generated frame")[0].split())
    assert "Frame 5, the last −1.23 dB −2.00 to −0.50 worse than persistence" in head
    assert "Frame 4 +2.35 dB +1.00 to +3.50 better than persistence" in head
    assert "Frame 1 +0.10 dB −0.40 to +0.60 not told apart from persistence" in head
    assert "6 windows of 4 episodes, 1 noise seed." in head
    assert result["settings"]["interval"] in head
    assert "Student's t below 8 episodes; leaves out training seeds" in head


def test_every_number_of_every_horizon_is_shown(result):
    place = 1000.0
    for row in result["horizons"].values():
        for key in row:
            place += 1
            row[key] = interval(place) if isinstance(row[key], dict) else place
    text = Read(page(result)).text
    shown = {round(float(x)) for x in re.findall(r"\b\d{4}\.\d", text)}
    assert shown >= set(range(1001, int(place) + 1))
    for setting in ("manifest_hash", "tokenizer_fingerprint", "dataset_fingerprint", "torch", "ahriuwu"):
        assert str(result["settings"][setting]) in text


def test_a_failed_run_says_so_first_and_nulls_are_shown_as_nan(result, clips):
    read = Read(states(result, clips)["failed"])
    assert read.words["h2"][0] == "This run failed"
    assert "model 7" in read.text
    assert "random" not in read.text.split("Gain over persistence")[0]
    assert read.words["span"].count("nan") > 10
    assert "nothing can be concluded" in read.text
    assert "This run failed" not in page(result)


def test_warnings_stand_above_the_numbers(result):
    text = Read(page(result | {"warnings": ["only 3 episodes: rough"]})).text
    assert 0 < text.index("only 3 episodes") < text.index("Gain over persistence")


def test_one_episode_has_no_intervals_and_no_verdict(result, clips):
    read = Read(states(result, clips)["one episode, no actions"])
    assert "better than persistence" not in read.text
    assert read.text.count("no interval") == 3
    assert "No action delta: the action space is empty." in read.text
    assert not read.all("polygon")
    assert not [a for a in read.all("span") if a.get("class") in ("ends", "nan")]


def test_unknown_entries_are_shown_as_json_and_known_blocks_as_tables(result):
    result |= {
        "brand_new": {"deep": [{"er": {"still": [1, {"x": float("nan")}]}}], "odd": {1, 2}},
        "spread": {"n": {"windows": 3}, "horizons": {"1": {"spread_ratio": interval(0.512)}}, "seeds": [0, 1]},
        "distances": {"latent_frechet": {"generated": 3.21, "excess": None}, "latent_kernel": {"generated": 0.0123}},
        "step_sizes": {
            "rows": [{"sampler": "euler", "steps": k, "psnr": {"1": 20.0 + k}, "ok": True} for k in (1, 2)],
            "skipped": [{"d": 0.5, "reason": "not trained"}],
        },
        "consistency": [1, [2], {"a": [[]]}],
        "levels": {"tau": [0.1, 0.2], "grid": [[1.5] * 20] * 20},
    }
    read = Read(page(result))
    for title in ("Spread of samples", "Distances between sets of clips", "Step sizes", "Error by noise level"):
        assert title in read.words["h2"]
    assert {"brand new", "grid"} <= set(read.words["summary"])
    assert {"euler, 1", "euler, 2", "0.5"} <= set(read.words["th"])
    assert {"21.00", "22.00", "not trained"} <= set(read.words["td"])
    assert "frame 1" in read.words["th"]
    assert "0.512" in read.text
    assert "3.21" in read.text
    assert '"still"' in read.text


def test_rows_with_other_columns_stand_in_tables_of_their_own():
    parts = block({"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0, "y": None}, "alone": {"z": 1}, "e": {}, "f": []})
    read = Read("".join(parts))
    assert len(read.all("table")) == 1
    assert {"a", "b", "x", "y"} <= set(read.words["th"])
    assert "alone" in read.words["dt"]
    assert "nan" in read.words["span"]
    assert "none" in read.text


def test_no_shape_of_a_block_fails():
    rng = np.random.default_rng(0)

    def anything(depth):
        kind = rng.integers(0, 9 if depth else 6)
        plain = [None, True, -3, 0.5, "words", interval(0.25)]
        if kind < 6:
            return plain[kind]
        inner = [anything(depth - 1) for _ in range(rng.integers(0, 4))]
        names = rng.permutation(["ok", "reason", "n", "horizons", "rows", "note", "psnr", "1"])
        return inner if kind == 6 else {str(k): v for k, v in zip(names, inner, strict=False)}

    for _ in range(300):
        Read(page({name: anything(4) for name in ("spread", "levels", "distances", "other")}))


def test_a_verdict_is_said_in_words():
    for ok, word in ((True, "passed"), (False, "failed"), (None, "open")):
        text = Read("".join(block({"verdict": {"ok": ok, "reason": "because", "gap_closed": 0.25}}))).text
        assert f"Verdict: {word}" in text
        assert "Because." in text
        assert "0.25" in text


def test_figures_go_to_their_section_and_svg_cannot_reach_the_page(result):
    figures = {"horizons": Figure(b"\x89PNG-1", "at horizons"), "else": Figure("<svg onload='x()'></svg>", "elsewhere")}
    read = Read(page(result, figures=figures))
    assert "Figures" in read.words["h2"]
    assert read.text.index("at horizons") < read.text.rindex("Action following") < read.text.index("elsewhere")
    assert [a["src"][:22] for a in read.all("img")] == ["data:image/png;base64,", "data:image/svg+xml;bas"]
    assert set(figures) == {"horizons", "else"}, "the caller's mapping was emptied"


def test_the_curve_goes_through_the_numbers_and_stops_at_a_null():
    curves = {"frame": [1, 2, 3, 4], "psnr": [30.0, 20.0, None, 25.0], "floor": [10.0] * 4, "ceiling": [40.0] * 4}
    curves |= {"psnr_lo": [29.0, 18.0, None, 24.0], "psnr_hi": [31.0, 21.0, None, 26.0]}
    svg = curve_chart(curves)
    points = {}
    for kind, d in re.findall(r'<path class="(\w+)" d="([^"]+)"', svg):
        points.setdefault(kind, []).append(np.array([p.split() for p in re.split("[ML]", d)[1:]], float))
    axis = np.array(re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', svg), float)  # where each number is written
    scale = np.polyfit(axis[:, 0] - 4.5, axis[:, 1], 1)
    assert scale[0] < 0, "more dB must be higher up"
    expected = {"model": [[30, 20], [25]], "floor": [[10] * 4], "ceiling": [[40] * 4]}
    for kind, runs in expected.items():
        for path, values in zip(points[kind], runs, strict=True):
            np.testing.assert_allclose(np.polyval(scale, path[:, 1]), values, atol=0.1)
    assert points["model"][1][0, 0] == points["floor"][0][3, 0]
    first, second = ([p.split(",") for p in d.split()] for d in re.findall(r'points="([^"]+)"', svg))
    np.testing.assert_allclose(np.polyval(scale, np.array(first, float)[:, 1]), [31, 21, 18, 29], atol=0.1)
    np.testing.assert_allclose(np.polyval(scale, np.array(second, float)[:, 1]), [26, 24], atol=0.1)
    assert svg.count("<circle") == 3


def test_a_curve_of_one_frame_or_of_nothing_is_drawn_without_failing():
    assert "<circle" in curve_chart({"psnr": [30.0], "floor": [30.0], "psnr_lo": [None], "psnr_hi": [None]})
    assert "<polygon" not in curve_chart({"psnr": [30.0, 31.0], "floor": [30.0, 30.0]})
    assert "no value is finite" in curve_chart({"psnr": [None, None], "floor": [None, None]})


def test_ticks_are_round_enclose_the_values_and_are_few():
    for low, high in ((20.2, 37.1), (0.0, 0.0), (-3.0, 4.0), (1e-9, 2e-9), (29.99, 30.01), (5, 60)):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low + 1e-9
        assert ticks[-1] >= high - 1e-9
        assert 2 <= len(ticks) <= 7
        np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0])
    for count in (1, 2, 3, 9, 16, 40, 64, 100, 1000):
        ticks = frame_ticks(count)
        assert (ticks[0], ticks[-1]) == (1, count)
        assert ticks == sorted(set(ticks))
        assert len(ticks) <= 12


def test_labels_are_moved_apart_in_order_and_no_further_than_needed():
    rng = np.random.default_rng(0)
    for _ in range(200):
        places = {str(i): float(v) for i, v in enumerate(rng.uniform(0, 80, 4))}
        moved = spread_out(places, gap=19)
        order = sorted(places, key=places.get)
        assert order == sorted(moved, key=moved.get)
        assert min(np.diff([moved[k] for k in order])) >= 19 - 1e-9
        assert np.mean(list(moved.values())) == pytest.approx(np.mean(list(places.values())))
    assert spread_out({"a": 0.0, "b": 50.0}, gap=19) == {"a": 0.0, "b": 50.0}


def test_a_film_shows_truth_rollout_and_difference_at_the_right_time(clips, tmp_path):
    truth, rollout = (np.repeat(np.repeat(c[..., :1, :1, :1], 12, -3), 16, -2) for c in clips)
    truth, rollout = np.tile(truth, 3), np.tile(rollout, 3)  # grey pictures of one value, which survive a codec
    (film, _) = filmed((truth, rollout), captions=[[f"key {t}" for t in range(7)]] * 2)
    path = tmp_path / "film.mp4"
    path.write_bytes(film.mp4)
    shown, fps = read_video(path)
    assert (len(shown), fps) == (7, 5.0)
    assert shown.shape[2] <= 540
    panels = np.array_split(shown[:, shown.shape[1] // 2].mean(-1), 3, axis=1)
    middle = [p[:, p.shape[1] // 2] for p in panels]
    expected = np.concatenate([truth[0, :2], rollout[0]])[:, 0, 0, 0].astype(float)
    true = truth[0, :, 0, 0, 0].astype(float)
    for seen, wanted in zip(middle, (true, expected, abs(expected - true)), strict=True):
        np.testing.assert_allclose(seen, wanted, atol=6)


def test_the_strip_holds_the_exact_pixels_of_the_frames_that_it_names(clips):
    truth, rollout = clips
    film = filmed(clips)[1]
    assert film.frames == ("given", "1", "2", "3", "4", "5")
    strip = np.asarray(Image.open(io.BytesIO(film.strip)))
    for column, name in enumerate(film.frames):
        t = 1 if name == "given" else 1 + int(name)
        made = truth[1, t] if t < 2 else rollout[1, t - 2]
        rows = [strip[r * 14 : r * 14 + 12, column * 18 : column * 18 + 16] for r in range(3)]
        np.testing.assert_array_equal(rows[0], truth[1, t])
        np.testing.assert_array_equal(rows[1], made)
        np.testing.assert_array_equal(rows[2], abs(made.astype(int) - truth[1, t]))


def test_frames_that_are_not_finite_are_black_and_counted(clips):
    finite = np.ones((2, 5), bool)
    finite[0, 3:] = False
    first, second = filmed(clips, finite=finite)
    strip = np.asarray(Image.open(io.BytesIO(first.strip)))
    assert strip[14:26, 4 * 18 : 4 * 18 + 16].max() == 0
    assert strip[14:26, 3 * 18 : 3 * 18 + 16].max() > 0
    assert "2 generated frames are not finite" in first.note
    assert "not finite" not in second.note


def test_large_frames_are_made_smaller_and_long_windows_keep_few_stills():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 256, (1, 40, 90, 300, 3), dtype=np.uint8)
    (film,) = films(truth, truth[:, 4:], context=4, fps=10.0, titles=["wide"])
    assert film.frames[0] == "given"
    assert film.frames[1] == "1"
    assert film.frames[-1] == "36"
    assert len(film.frames) == 8
    width, height = Image.open(io.BytesIO(film.strip)).size
    assert width <= 8 * 98
    assert height <= 3 * 98


def test_films_that_do_not_fit_are_left_out_in_words_and_the_page_stays_small(result, clips):
    small = filmed(clips)[0]
    large = Film("large", b"x" * 2_300_000, small.strip, small.frames, "")
    text = page(result, films=[small, large, small])
    read = Read(text)
    assert len(text) < MAX_BYTES
    assert len(read.all("video")) == 2
    assert len(read.all("img")) == 3
    assert "1 of 3 videos" in read.text
    assert "videos are left out" not in Read(page(result, films=[small])).text


def test_films_refuse_arrays_that_do_not_fit_together(clips):
    truth, rollout = clips
    with pytest.raises(ValueError, match="context 3"):
        films(truth, rollout, context=3, fps=5.0, titles=["a", "b"])
    with pytest.raises(ValueError, match="1 titles"):
        films(truth, rollout, context=2, fps=5.0, titles=["a"])


def test_best_median_worst_and_broken_windows_are_chosen_not_picked():
    rows = [{"episode": f"e{i}", "start": i, "gain_db_8": g} for i, g in enumerate([3.0, -2.0, None, 9.0, 1.0, 2.0])]
    chosen = chosen_windows({"last": 8, "windows": rows})
    assert list(chosen.values()) == [3, 5, 1, 2]
    assert list(chosen) == [
        "Best gain, +9.0 dB at frame 8 (episode e3 from 3)",
        "Median gain, +2.0 dB at frame 8 (episode e5 from 5)",
        "Worst gain, −2.0 dB at frame 8 (episode e1 from 1)",
        "Not finite (episode e2 from 2)",
    ]
    assert list(chosen_windows({"last": 8, "windows": rows[:1]}).values()) == [0]


def test_the_same_result_gives_the_same_bytes_in_ascii_and_nothing_else_in_the_folder(result, clips, tmp_path):
    for name in ("a", "b"):
        write_page(tmp_path / f"{name}.html", result, name="Größe \udcff", command=["a b", "c"], films=filmed(clips))
    first, second = ((tmp_path / f"{name}.html").read_bytes() for name in ("a", "b"))
    assert first == second
    assert first.isascii()
    read = Read(first.decode())
    assert read.words["h1"][0].startswith("Größe")
    assert "'a b' c" in read.words["code"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_numbers_have_a_true_minus_a_sign_where_asked_and_never_round_to_nothing():
    assert [number(v, 2, sign=True) for v in (1.005, -0.5, 0.0)] == ["+1.00", "−0.50", "0.00"]
    assert number(0.0004, 2) == "4.0e−04"
    assert number(12) == "12"
    assert digits_for([30.123, 0.001], "psnr") == 2
    assert digits_for([interval(0.5), None, 0.0123]) == 3
    assert digits_for([0.5, 1e-9]) == 4
    assert digits_for([]) == 2


def test_a_tag_escapes_children_and_attributes_but_not_what_is_html_already():
    assert tag("p", "a\x1b[31m\0b\tc\n", title="\x1b") == '<p title="\\x1b">a\\x1b[31m\\x00b\tc\n</p>'
    inner = tag("b", "<", 1, None, ["&"])
    assert tag("p", inner, class_='"x"', aria_label=None, hidden=True) == (
        '<p class="&quot;x&quot;" hidden><b>&lt;1&amp;</b></p>'
    )


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(palette):
    """WCAG 2.2: relative luminance, and a ratio of at least 4.5 for text."""
    colours = dict(re.findall(r"--([\w-]+): #(\w+)", palette))

    def luminance(name):
        code = colours[name] if len(colours[name]) == 6 else "".join(c * 2 for c in colours[name])
        parts = [int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    pairs = [(ink, "paper") for ink in ("ink", "soft", "model", "bad")]
    for ink, paper in [*pairs, ("ink", "panel"), ("warn", "warn-panel"), ("bad", "bad-panel"), ("ink", "bad-panel")]:
        dark, light = sorted((luminance(ink), luminance(paper)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper)


def test_the_look_at_components_is_a_table_with_a_row_for_every_frame_and_group():
    names, pairs = ("error", "energy", "floor_error"), [(t, g) for t in (1, 16) for g in (1, 2)]
    rows = [{"frame": t, "group": g, **{n: interval((0.25, 1.375)[g - 1]) for n in names}} for t, g in pairs]
    look = {"n": {"windows": 3}, "channels": [6, 6], "rows": rows}
    text = page({"components": look})
    section = text[text.index('id="components"') : text.index("</section>", text.index('id="components"'))]
    assert "{" not in section  # no JSON
    assert section.count("1.38") + section.count("1.375") == 6
    assert page({"components": {"skipped": "too few windows"}}).count("too few windows") == 1
