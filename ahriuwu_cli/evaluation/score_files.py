"""Tables of scores on disk, with the settings that they were measured with and a checksum over everything.

A checksum says "as it was written", not that it makes sense: names, types and shapes are held to what the same work
would write, and numbers to what a score, a clock or a count can be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ahriuwu_cli.data.documents import parse_object, to_json
from ahriuwu_cli.data.tensors import checksum, read_arrays, read_header_and_metadata
from ahriuwu_cli.disk import write_whole
from ahriuwu_cli.errors import DataError
from ahriuwu_cli.evaluation.metrics import CAP_DB

MOST = 1e15  # of a score, seconds or a count: far above any of ours, and its powers do not overflow
_SLACK = 1e-6  # means of float64 may miss an end by less
_RANGES = {  # of a metric (`metrics`); of any other array as far as its powers do not overflow
    "mse": (0, 1), "psnr": (0, CAP_DB), "floor": (0, CAP_DB), "ssim": (-1, 1), "colour": (0, 1), "motion": (0, 1),
    "energy": (0, 2), "motion_gg": (0, 1), "motion_gt": (-1, 1), "motion_tt": (0, 1),
}  # fmt: skip
Shapes = Mapping[str, tuple[int, ...]]


def write_scores(
    path: Path, form: str, arrays: Mapping[str, np.ndarray], identity: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Write a file whole or not at all. form: which format this is."""
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    metadata = {"format": form, "identity": to_json(identity), "facts": to_json(facts)}
    metadata["checksum"] = checksum(arrays, [metadata["identity"], metadata["facts"]])
    write_whole(path, save(arrays, metadata))


def read_scores(
    path: Path,
    form: str,
    identity: dict[str, Any],
    expected: Shapes,
    facts: Mapping[str, type],
    sound: Callable[[dict[str, np.ndarray], dict[str, Any]], bool],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and facts of a file. DataError when it is damaged or is another than expected.

    expected: the shape of every array; one of more than two axes holds pictures (uint8), others scores (float64, NaN
    where a frame was not finite). facts: float (seconds), int (a count) or dict (counts by name), by name. sound:
    whether its counts are those of its arrays; ValueError where these contradict each other.
    """
    try:
        found, metadata = read_header_and_metadata(path)
        if metadata["format"] != form:
            raise ValueError(f"it is not of the format {form!r}")
        if parse_object(metadata["identity"]) != identity:
            raise ValueError("it holds other settings than its name says")
        shapes = {name: ("U8" if len(shape) > 2 else "F64", tuple(shape)) for name, shape in expected.items()}
        present = {name: (info.dtype, tuple(info.shape)) for name, info in found.items()}
        if wrong := sorted(n for n in shapes.keys() | present.keys() if shapes.get(n) != present.get(n)):
            raise ValueError(f"{wrong[0]!r} is not what these settings give")
        arrays, _ = read_arrays(path)
        if metadata["checksum"] != checksum(arrays, [metadata["identity"], metadata["facts"]]):
            raise ValueError("its checksum does not fit its content")
        for name, values in arrays.items():
            low, high = _RANGES.get(name.rpartition("/")[2], (-MOST, MOST))
            if ((values < low - _SLACK) | (values > high + _SLACK)).any():  # NaN is neither
                raise ValueError(f"{name!r} holds a number that no score is")
        told = parse_object(metadata["facts"])
        if told.keys() != facts.keys():
            raise ValueError(f"it tells {', '.join(sorted(told))}")
        for name, kind in facts.items():
            if kind is dict and type(told[name]) is not dict:
                raise ValueError(f"its {name} are no counts by name")
            for value in told[name].values() if kind is dict else (told[name],):
                amount(value, int if kind is dict else kind)
        if not sound(arrays, told):
            raise ValueError("its counts are not those of its scores")
    except (DataError, ValueError, KeyError) as error:
        raise DataError(f"{path} is damaged ({error})") from None
    return arrays, told


def amount(value: Any, kind: type = float) -> Any:
    """The value, where it is a number of seconds (float) or a count (int). ValueError."""
    if type(value) not in (int, kind) or not 0 <= value <= MOST:
        raise ValueError(f"{str(value)[:40]!r} is no {'count' if kind is int else 'number of seconds'}")
    return value


def tables_of(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """{who: {metric: values}} of arrays that are called who/metric."""
    tables: dict[str, dict[str, np.ndarray]] = {}
    for name, values in arrays.items():
        who, metric = name.split("/")
        tables.setdefault(who, {})[metric] = values
    return tables


def flat(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The other way round."""
    return {f"{who}/{metric}": values for who, table in tables.items() for metric, values in table.items()}
