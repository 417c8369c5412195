"""What an action is: named components laid side by side as the columns of a float32 row.

`actions[t]` takes `frames[t]` to `frames[t+1]`, so a clip of T frames has T-1 rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ahriuwu_cli.data.action_component import MAX_SIZE, ActionComponent, component_from_json
from ahriuwu_cli.errors import DataError, UserError

if TYPE_CHECKING:
    import numpy as np

MAX_VALUES = 65_536  # of all components together: each value of a discrete one has a share, and a row in a model
CAPTION = 400  # characters of a described row: what fits under two thousand pixels
_OPPOSITES = {"LEFT": "RIGHT", "FORWARD": "BACKWARD", "UP": "DOWN", "NEXT": "PREV"}
_OPPOSITES |= {b: a for a, b in _OPPOSITES.items()}
_NOTHING = ("none", "noop", "-")


@dataclass(frozen=True)
class ActionSpace:
    """The components of an action, in column order. No component at all means video without actions."""

    components: tuple[ActionComponent, ...] = ()
    column_names: tuple[str, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        width = sum(c.width for c in self.components)  # names take memory, so they are counted before there are any
        if width > MAX_SIZE:
            raise DataError(f"the action space has {width} columns, above the limit of {MAX_SIZE}")
        values = sum(c.size for c in self.components)
        if values > MAX_VALUES:
            raise DataError(f"the action space has {values} values in all, above the limit of {MAX_VALUES}")
        names = tuple(name for c in self.components for name in c.column_names)
        for what, given in (("component", [c.name for c in self.components]), ("column", names)):
            repeated = sorted(n for n, count in Counter(given).items() if count > 1)
            if repeated:
                raise DataError(f"the action space names the {what} {repeated[0]!r} twice: rename one")
        object.__setattr__(self, "column_names", names)

    @property
    def width(self) -> int:
        """How many columns an action row has (A)."""
        return len(self.column_names)

    def slices(self) -> list[tuple[ActionComponent, slice]]:
        """Each component with its columns."""
        at, out = 0, []
        for component in self.components:
            out.append((component, slice(at, at + component.width)))
            at += component.width
        return out

    def to_json(self) -> dict[str, Any]:
        """A dict that `from_json` reads back to an equal space."""
        return {
            "components": [
                {
                    "name": c.name,
                    "kind": c.kind,
                    "size": c.size,
                    "labels": list(c.labels),
                    "low": list(c.low),
                    "high": list(c.high),
                }
                for c in self.components
            ]
        }

    @staticmethod
    def from_json(document: Any, where: str = "the action space") -> ActionSpace:
        """Read `to_json`'s dict; labels, low and high may be left out. Raises DataError on anything else."""
        if not isinstance(document, dict) or set(document) != {"components"}:
            raise DataError(f'{where} must be an object with the one key "components"')
        if not isinstance(document["components"], list):
            raise DataError(f'{where}: "components" must be a list of objects')
        return ActionSpace(tuple(component_from_json(c, where) for c in document["components"]))

    def validate(self, actions: np.ndarray, where: str, first: int = 0) -> None:
        """Refuse (DataError) actions (T, A) float32 that this space does not allow: shape, NaN, range, fractions.

        first: the step that the first row is of, for the sentence.
        """
        import numpy as np

        if actions.dtype != np.float32 or actions.ndim != 2 or actions.shape[1] != self.width:
            raise DataError(
                f"{where}: actions are {actions.dtype} of shape {tuple(actions.shape)}, not float32 (T, {self.width})"
            )
        allowed = self.allows(actions)
        if allowed.all():
            return
        t, a = np.argwhere(~allowed)[0]
        component, columns = next((c, columns) for c, columns in self.slices() if a < columns.stop)
        if component.kind == "continuous":
            wanted = f"within {component.low[a - columns.start]:g} to {component.high[a - columns.start]:g}"
        else:
            wanted = f"a whole number 0 to {component.size - 1 if component.kind == 'discrete' else 1}"
        name = self.column_names[a]
        raise DataError(f"{where}: the action at step {first + t}, column {name!r} is {actions[t, a]:g}, not {wanted}")

    def allows(self, actions: np.ndarray) -> np.ndarray:
        """Which values of actions (..., A) this space allows, bool likewise; never a NaN."""
        import numpy as np

        allowed = np.empty(actions.shape, bool)
        for component, columns in self.slices():
            values = actions[..., columns]
            if component.kind == "continuous":
                low, high = (np.float64(np.float32(ends)) for ends in (component.low, component.high))
                slack = 1e-5 * (np.abs(low) + np.abs(high))  # what others computed in another order
                allowed[..., columns] = (values >= low - slack) & (values <= high + slack)
            else:
                top = component.size - 1 if component.kind == "discrete" else 1
                allowed[..., columns] = (values >= 0) & (values <= top) & (values == np.round(values))
        return allowed

    def random(self, steps: int, hold: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """Random actions (steps, A) float32, each held for a number of steps drawn from hold, ends included.

        binary: none, one button, or two that are not opposites, all equally likely; discrete and continuous: uniform.
        """
        import numpy as np

        if not 1 <= hold[0] <= hold[1]:
            raise UserError(f"actions cannot be held for {hold[0]} to {hold[1]} steps: give 1 <= shortest <= longest")
        presses = {c.name: _button_choices(c.labels, c.size) for c in self.components if c.kind == "binary"}
        rows = np.zeros((steps, self.width), np.float32)
        t = 0
        while t < steps:
            until = t + int(rng.integers(hold[0], hold[1] + 1))
            for component, columns in self.slices():
                if component.kind == "discrete":
                    rows[t:until, columns] = rng.integers(component.size)
                elif component.kind == "continuous":
                    rows[t:until, columns] = rng.uniform(component.low, component.high)
                else:
                    choices = presses[component.name]
                    for button in choices[rng.integers(len(choices))]:
                        rows[t:until, columns.start + button] = 1
            t = until
        return rows

    def describe(self, row: np.ndarray) -> str:
        """Short text for one row (A,), such as 'TURN_LEFT+ATTACK'; '-' for no button. Cut, with dots, where it would be
        longer than CAPTION."""
        text = ""
        for word in self._words(row):
            text += f"+{word}" if text else word
            if len(text) > CAPTION:
                return f"{text[:CAPTION]}.."
        return text or "-"

    def _words(self, row: np.ndarray) -> Iterator[str]:
        for component, columns in self.slices():
            named = zip(self.column_names[columns], row[columns], strict=True)
            if component.kind == "binary":
                yield from (n for n, v in named if v >= 0.5)
            elif component.kind == "discrete":
                value = int(row[columns.start])
                label = component.labels[value] if component.labels else str(value)
                yield label if len(self.components) == 1 else f"{component.name}={label}"
            else:
                yield from (f"{n}={v:.2f}" for n, v in named)

    def parse(self, text: str) -> np.ndarray:
        """The row (A,) float32 for a user's text: labels joined by '+', an index, column=value, or 'none'.

        'none' and columns that are not named mean: no button, the label NOOP, and zero (or the nearest value allowed).
        Raises UserError on an unknown name, and where a discrete component without NOOP gets no value.
        """
        import numpy as np

        row = np.zeros(self.width, np.float32)
        missing = set()
        for component, columns in self.slices():
            if component.kind == "continuous":
                row[columns] = np.clip(0, component.low, component.high)
            elif component.kind == "discrete":
                nothing = [i for i, label in enumerate(component.labels) if label.lower() in _NOTHING]
                row[columns] = nothing[0] if nothing else 0
                missing |= set() if nothing else {component.name}
        for word in [] if text.strip().lower() in ("none", "-") else text.split("+"):
            missing.discard(self._parse_word(word.strip(), row))
        if missing:
            raise UserError(f"the action {text!r} leaves {min(missing)!r} open: {self._known_words()}")
        try:
            self.validate(row[None], f"the action {text!r}")
        except DataError as error:  # a value of the command line, not of a file
            raise UserError(str(error)) from None
        return row

    def _parse_word(self, word: str, row: np.ndarray) -> str:
        """Write what one word says into row; returns the name of its component."""
        for form in (str, str.lower):  # as it is written first: buttons may differ in nothing else
            for component, columns in self.slices():
                found = component.read(word, len(self.components) == 1, form)
                if found is not None:
                    row[columns.start + found[0]] = found[1]
                    return component.name
        raise UserError(f"unknown action {word[:40]!r}: {self._known_words()}")

    def _known_words(self) -> str:
        words = ["none"]
        for c in self.components:
            prefix = f"{c.name}=" if c.kind == "discrete" and len(self.components) > 1 else ""
            if c.kind == "continuous":
                words += [f"{n}=VALUE" for n in c.column_names]
            elif c.kind == "binary":
                words += c.column_names
            else:
                words += [prefix + w for w in (c.labels or (f"0..{c.size - 1}",))]
        return f"choose from {', '.join(words)} (join several with '+')"


def _button_choices(labels: tuple[str, ...], size: int) -> list[tuple[int, ...]]:
    """Nothing, every single button, and every pair that does not pull both ways."""
    choices: list[tuple[int, ...]] = [(), *((i,) for i in range(size))]
    names = [label.upper() for label in labels] or [""] * size
    opposites = ["_".join(_OPPOSITES.get(word, word) for word in name.split("_")) for name in names]
    for i in range(size):
        choices += [(i, j) for j in range(i + 1, size) if opposites[i] == names[i] or opposites[i] != names[j]]
    return choices
