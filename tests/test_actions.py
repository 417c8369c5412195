"""Action spaces: what they refuse, what they draw, and that text and rows agree."""

import json
import warnings

import numpy as np
import pytest
import torch

from ahriuwu_cli.data.action_component import ActionComponent
from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.errors import DataError, UserError
from ahriuwu_cli.models.conditioning import ActionEmbedding

BUTTONS = ActionComponent("buttons", "binary", 3, ("TURN_LEFT", "TURN_RIGHT", "ATTACK"))
MOVE = ActionComponent("move", "discrete", 4, ("NOOP", "FIRE", "RIGHT", "LEFT"))
GEAR = ActionComponent("gear", "discrete", 3)
STEER = ActionComponent("steer", "continuous", 2, ("wheel", "gas"), (-1.0, 0.0), (1.0, 2.0))
SPACES = {"buttons": ActionSpace((BUTTONS,)), "move": ActionSpace((MOVE,)), "all": ActionSpace((BUTTONS, GEAR, STEER))}


def test_a_range_allows_its_own_ends_however_small_or_large_they_are():
    for low, high in ((0.0, 1.2e-44), (-1e-30, 1e-45), (3.3e38, 3.4e38), (0.1, 0.3)):
        space = ActionSpace((ActionComponent("a", "continuous", 1, (), (low,), (high,)),))
        assert space.allows(np.float32([[low], [high]])).all(), (low, high)
        assert not space.allows(np.float32([[np.nan], [-3.4e38]])).any()


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_a_space_survives_json(space):
    assert ActionSpace.from_json(json.loads(json.dumps(space.to_json()))) == space


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_random_actions_are_valid_held_and_repeat_with_the_seed(space):
    rows = space.random(500, (3, 5), np.random.default_rng(1))
    space.validate(rows, "drawn")
    np.testing.assert_array_equal(rows, space.random(500, (3, 5), np.random.default_rng(1)))
    changes = np.flatnonzero((rows[1:] != rows[:-1]).any(1)) + 1
    assert np.diff([0, *changes]).min() >= 3


def test_random_buttons_never_pull_both_ways_and_every_choice_appears_equally():
    space = SPACES["buttons"]
    rows = space.random(6000, (1, 1), np.random.default_rng(0))
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    assert {space.describe(k) for k in kinds} == {
        "-", "TURN_LEFT", "TURN_RIGHT", "ATTACK", "TURN_LEFT+ATTACK", "TURN_RIGHT+ATTACK",
    }  # fmt: skip
    assert counts.min() > 850
    assert counts.max() < 1150


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_parse_reads_back_what_describe_says(space):
    for row in space.random(50, (1, 1), np.random.default_rng(2)).round(2):
        np.testing.assert_allclose(space.parse(space.describe(row)), row, atol=1e-6)


def test_parse_knows_labels_indices_and_none():
    np.testing.assert_array_equal(SPACES["buttons"].parse("turn_left+ATTACK"), [1, 0, 1])
    np.testing.assert_array_equal(SPACES["buttons"].parse("2"), [0, 0, 1])
    np.testing.assert_array_equal(SPACES["buttons"].parse("none"), [0, 0, 0])
    np.testing.assert_array_equal(SPACES["move"].parse("2"), [2])
    np.testing.assert_array_equal(SPACES["move"].parse("none"), [0])
    np.testing.assert_allclose(SPACES["all"].parse("gear=2+gas=1.5"), [0, 0, 0, 2, 0, 1.5])


@pytest.mark.parametrize(
    ("space", "text", "sentence"),
    [("buttons", "JUMP", "unknown action 'JUMP'"), ("move", "7", "unknown action '7'"),
     ("move", "9" * 5000, "unknown action '999"), ("all", "none", "'gear' open"),
     ("all", "gear=1+wheel=9", "within"), ("all", "gear=1+wheel=nan", "nan"), ("all", "gear=1+wheel=x", "number")],
)  # fmt: skip
def test_parse_refuses_with_a_sentence(space, text, sentence):
    with pytest.raises(UserError, match=sentence):
        SPACES[space].parse(text)


@pytest.mark.parametrize(
    ("space", "row", "sentence"),
    [("buttons", [0, 0.5, 0], "TURN_RIGHT"), ("buttons", [0, 0, 2], "ATTACK"), ("move", [4], "0 to 3"),
     ("move", [-1], "0 to 3"), ("move", [np.nan], "nan"), ("buttons", [0, 0], "float32"),
     ("all", [0, 0, 0, 0, 1.1, 0], "wheel")],
)  # fmt: skip
def test_validate_names_the_column_that_is_wrong(space, row, sentence):
    with pytest.raises(DataError, match=sentence):
        SPACES[space].validate(np.array([row], np.float32), "here")


@pytest.mark.parametrize(
    "document",
    [
        None,
        {},
        {"components": {}},
        {"components": [3]},
        {"components": [{"name": "a", "kind": "discrete"}]},
        {"components": [{"name": "a", "kind": "analog", "size": 1}]},
        {"components": [{"name": "a", "kind": "discrete", "size": 0}]},
        {"components": [{"name": "a", "kind": "discrete", "size": True}]},
        {"components": [{"name": "a", "kind": "discrete", "size": 2, "labels": ["x"]}]},
        {"components": [{"name": "a", "kind": "continuous", "size": 1, "low": [1], "high": [1]}]},
        {"components": [{"name": "a", "kind": "continuous", "size": 1}]},
        {"components": [{"name": "a", "kind": "discrete", "size": 2, "extra": 1}]},
        {"components": [{"name": "a", "kind": "discrete", "size": 2}] * 2},
    ],
)
def test_a_space_that_makes_no_sense_is_refused(document):
    with pytest.raises(DataError):
        ActionSpace.from_json(document)


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ([{"labels": ["LEFT"]}, {"labels": ["RIGHT"]}], "the component 'k' twice"),  # shares and presses go by name
        ([{"labels": ["LEFT"]}, {"kind": "discrete"}], "the component 'k' twice"),
        ([{"labels": ["LEFT"]}, {"name": "l", "labels": ["LEFT"]}], "the column 'LEFT' twice"),
        ([{"name": "n" * 201}], "'nn.* of 201 characters: give at most 200"),
        ([{"labels": ["l" * 10_000]}], "'ll.* of 10000 characters: give at most 200"),
    ],
)
def test_names_that_are_taken_or_endless_are_refused(parts, sentence):
    with pytest.raises(DataError, match=sentence):
        ActionSpace.from_json({"components": [{"name": "k", "kind": "binary", "size": 1} | part for part in parts]})


def test_names_of_the_most_letters_are_taken():
    space = ActionSpace((ActionComponent("n" * 200, "binary", 1, ("l" * 200,)),))
    assert ActionSpace.from_json(space.to_json()) == space


def test_buttons_that_differ_in_case_alone_are_pressed_as_they_are_written():
    space = ActionSpace(
        (ActionComponent("a", "binary", 2, ("fire", "Fire")), ActionComponent("b", "binary", 1, ("FIRE",)))
    )
    rows = {text: space.parse(text).tolist() for text in ("fire", "Fire", "FIRE", "fIRE")}
    assert rows == {"fire": [1, 0, 0], "Fire": [0, 1, 0], "FIRE": [0, 0, 1], "fIRE": [1, 0, 0]}


def test_a_row_of_thousands_of_columns_is_described_in_a_line():
    space = ActionSpace((ActionComponent("axes", "continuous", 4096, low=(-1.0,) * 4096, high=(1.0,) * 4096),))
    text = space.describe(np.zeros(4096, np.float32))
    assert (len(text), text[:24], text[-2:]) == (402, "axes0=0.00+axes1=0.00+ax", "..")


@pytest.mark.parametrize(
    ("low", "high"), [(-1.7e308, 1.7e308), (-3e38, 3e38), (-1e38, 1e38), (1, 1 + 1e-10), (0, 1e-46), (0, 1e39), (2, 1)]
)
def test_a_range_that_float32_cannot_hold_or_scale_by_is_refused(low, high):
    with pytest.raises(DataError, match="in float32"):
        ActionComponent("s", "continuous", 1, (), (low,), (high,))


def test_every_value_of_the_widest_and_the_narrowest_range_is_scaled_to_a_finite_number():
    for low, high in ((-8e37, 8e37), (1.0, 1.0 + 2e-7), (0.0, 1e-45)):
        space = ActionSpace((ActionComponent("s", "continuous", 1, (), (low,), (high,)),))
        rows = torch.tensor([[[low]], [[high]]])
        scaled = ActionEmbedding((("continuous", 1, (low,), (high,)),), 4)(rows, torch.ones(2, 1, dtype=torch.bool))
        assert torch.isfinite(scaled).all()
        assert np.isfinite(space.random(9, (1, 1), np.random.default_rng(0))).all()


@pytest.mark.parametrize("value", ["1e39", "-1e39", "nan", "inf", "9"])
def test_a_value_of_the_command_line_is_a_mistake_of_usage_and_never_a_warning(value):
    with warnings.catch_warnings(action="error"), pytest.raises(UserError) as refused:
        SPACES["all"].parse(f"gear=1+wheel={value}")
    assert refused.value.exit_code == 2
