"""Long lists are cut in every sentence alike, and say by how much."""

import pytest

from ahriuwu_cli.printing import some_of


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([], ""),
        (["a"], "a"),
        (["a", "b"], "a; b"),
        (["a", "b", "c"], "a; b and 1 more"),
        (list("abcde"), "a; b and 3 more"),
    ],
)
def test_a_list_names_its_first_and_says_how_many_more_there_are(parts, said):
    assert some_of(parts, 2, "; ") == said
