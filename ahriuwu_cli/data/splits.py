"""Which episodes are for training, which for choosing and which for the score."""

from __future__ import annotations

from ahriuwu_cli.errors import UserError
from ahriuwu_cli.ranges import as_number


def parse_fractions(text: str) -> tuple[float, float, float]:
    """The shares of train, val and test from "0.8,0.1,0.1". Raises UserError."""
    try:
        train, val, test = (as_number(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"the splits {text!r} are not three shares: give train,val,test such as 0.8,0.1,0.1") from None
    check_fractions((train, val, test))
    return train, val, test


def check_fractions(fractions: tuple[float, ...]) -> None:
    """UserError unless these are three shares that sum to 1 and leave something to train on."""
    if len(fractions) != 3 or not all(0 <= f <= 1 for f in fractions) or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(
            f"splits {fractions} must be three shares (train, val, test) that sum to 1, such as 0.8,0.1,0.1"
        )
    if fractions[0] == 0:
        raise UserError(f"splits {fractions} leave nothing to train on: give train a share above 0")


def split_episodes(n: int, fractions: tuple[float, float, float], seed: int) -> list[str]:
    """The split of each of n episodes, shuffled by the seed. From 3 episodes on, each split with a fraction above zero
    gets at least one; 2 become train and val; 1 is train. Raises UserError on fractions that are not shares of 1."""
    import numpy as np

    check_fractions(fractions)
    wanted = [max(1, round(n * f)) if f > 0 else 0 for f in fractions[1:]]
    while sum(wanted) > n - 1:  # train keeps one; test gives way before val
        wanted[1 if wanted[1] >= wanted[0] else 0] -= 1
    names = ["val"] * wanted[0] + ["test"] * wanted[1]
    names += ["train"] * (n - len(names))
    order = np.random.default_rng([seed, n]).permutation(n)
    return [names[i] for i in order]
