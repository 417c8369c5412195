"""How `fuzz.py` damages a file: blind changes of bytes, and changes by somebody who knows the format.

Every mutation is a function (bytes, random) -> bytes. `mutate` picks one that fits the file's name, and seals JSON and
weights anew where asked: a hostile author makes the hashes fit, and then only the other checks are left.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]
TEXTS = (
    "", "../../../../tmp/outside", "/etc/passwd", "..\\..\\outside", "C:\\outside", "a\x00b", "a\nb",
    "\x1b[31mred\x1b]0;t\x07",
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "=1+1", "-2+3", "@SUM(A1)", "\u202egnp", "\ud800",
    "\U0001f600" * 40,
    "x" * 100_000, "nan", "null", "$\\frac{", "%s%n", "{0}", "000000", "train", "float32",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 7, 10**6, 10**9, 10**12, 2**31, 2**63, 2**64, 10**30, -(10**12), 0.5, -0.0, 1e-300, 1e300,
           True, False)  # fmt: skip
LITERALS = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 1000 + "]" * 1000,
'{"a":' * 1000 + "1" + "}" * 1000,
            "01", "1.", "'a'", "undefined", "[1,]", '"\\ud800"', '"\\x"', "[" * 200_000)  # fmt: skip


def mutate(name: str, data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """(what was done, the file's new bytes), other bytes than before."""
    while True:
        how = rng.choice(_fitting(name, data))
        changed = how(data, rng)
        if changed != data:
            return how.__name__, changed


def _fitting(name: str, data: bytes) -> list[Mutation]:
    blind = [flip, flip, truncate, empty, extend, swap, zeros, twice]
    if name.endswith((".json", ".jsonl", ".journal")):
        return [*blind, json_value, json_value, json_value, json_key, json_literal, json_repeat, encoding]
    if name.endswith((".safetensors", ".partial")):
        headers = [header_length, header_entry, header_entry, header_entry, header_literal]
        return [*blind, *headers, not_finite, tensor, tensor, metadata_value, metadata_value]
    if name.endswith((".csv", ".toml", ".md")):
        return [*blind, line_value, line_value, line_order, encoding]
    return [*blind, flip_head, flip_head, lying_number, lying_number]


def flip(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if out else 0):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def flip_head(data: bytes, rng: random.Random) -> bytes:
    return flip(data[:256], rng) + data[256:]


def lying_number(data: bytes, rng: random.Random) -> bytes:
    """Two, four or eight bytes become a number that is too large: sizes, counts and lengths of videos and images."""
    width, at = rng.choice((2, 4, 8)), rng.randrange(max(1, len(data)))
    at = rng.choice((at, min(at, 400)))
    number = rng.choice((0, 1, 2**15, 65_535, 2**31 - 1, 2**32 - 1)) % 2 ** (8 * width)
    return data[:at] + number.to_bytes(width, rng.choice(("little", "big"))) + data[at + width :]


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(max(1, len(data)))]


def empty(data: bytes, rng: random.Random) -> bytes:
    return b""


def extend(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice((b"\x00", b" ", b"}", rng.randbytes(1000), b"\x00" * 100_000))


def swap(data: bytes, rng: random.Random) -> bytes:
    size = max(1, len(data) // rng.choice((3, 10, 100)))
    a, b = sorted(rng.randrange(max(1, len(data) - size)) for _ in range(2))
    b = max(b, a + size)
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


def zeros(data: bytes, rng: random.Random) -> bytes:
    return b"\x00" * len(data)


def twice(data: bytes, rng: random.Random) -> bytes:
    return data + data


def encoding(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return b"\xef\xbb\xbf" + data
    return data.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32", "utf-16-be")))


def json_value(data: bytes, rng: random.Random) -> bytes:
    """Another value at a random place: another type, a number that is too large, a text that is no name."""
    return _in_json(data, rng, lambda place, key, _: place.__setitem__(key, _other(place[key], rng)))


def json_key(data: bytes, rng: random.Random) -> bytes:
    """A key is gone, renamed, or new."""

    def change(place: Any, key: Any, _: Any) -> None:
        value = place.pop(key)
        if isinstance(place, dict) and rng.random() < 0.5:
            place[rng.choice((f"{key}x", "__class__", str(key).upper(), "extra"))] = value

    return _in_json(data, rng, change)


def json_literal(data: bytes, rng: random.Random) -> bytes:
    """What JSON does not have, or too much of what it has, in the place of a value."""
    mark = "b7d1c0"
    marked = _in_json(data, rng, lambda place, key, _: place.__setitem__(key, mark))
    return marked.replace(f'"{mark}"'.encode(), rng.choice(LITERALS).encode())


def json_repeat(data: bytes, rng: random.Random) -> bytes:
    """A key stands twice."""
    at = data.find(b"{")
    end = data.find(b",", at)
    return data[: at + 1] + data[at + 1 : end + 1] + data[at + 1 :] if 0 <= at < end else data


def header_length(data: bytes, rng: random.Random) -> bytes:
    rest = max(0, len(data) - 8)
    length = rng.choice((0, 1, len(data), rest, rest + 1, 2**31, 2**63, 2**64 - 1, 99_999_999))
    return length.to_bytes(8, "little") + data[8:]


def header_entry(data: bytes, rng: random.Random) -> bytes:
    """One entry of a safetensors header lies; half of the time the file is long enough for what it says."""

    def change(header: dict) -> None:
        name = rng.choice([n for n in header if n != "__metadata__"] or ["new"])
        entry = header.get(name) or {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        begin, end = entry["data_offsets"]
        which = rng.randrange(11)
        if which == 0:
            entry["dtype"] = rng.choice(
                ("F64", "I8", "U8", "BF16", "F16", "I32", "BOOL", "F8_E4M3", "C64", "", 7, None)
            )
        elif which == 1:
            entry["shape"] = rng.choice(([], [10**9, 10**9], [-1], [1, *entry["shape"]], entry["shape"][::-1], "ab",
            [0.5],
                                         [2**62, 2**62], [True], [0], [1] * 100))  # fmt: skip
        elif which == 2:
            entry["data_offsets"] = rng.choice(([0, 2**62], [end, begin], [-4, 0], [begin + 1, end + 1], [begin], [],
            "ab",
                                                [0, end], [begin, end + 4], [None, None]))  # fmt: skip
        elif which == 3:
            header.pop(name, None)
        elif which == 4:
            header[f"{name}x"] = header.pop(name, entry)
        elif which == 5:
            header["extra"] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
        elif which == 6:
            header[name] = rng.choice((None, [], 7, "x", {}, {"dtype": "F32"}))
        elif which == 7:
            header["__metadata__"] = rng.choice(({"a": 1}, [], "x", {"a": {"b": "c"}}, {"x" * 10_000: "y" * 10_000}))
        elif which == 8:
            header |= {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(2000)}
        elif which == 9 and isinstance(header.get("__metadata__"), dict):
            told = header["__metadata__"]
            key = rng.choice(sorted(told) or ["x"])
            told[key] = json_value(told.get(key, "{}").encode(), rng).decode("utf-8", "replace")
        else:
            entry["extra"] = 1

    return _in_header(data, change)


def header_literal(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = rng.choice((json_literal, json_repeat, encoding, flip))(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def not_finite(data: bytes, rng: random.Random) -> bytes:
    at = 8 + int.from_bytes(data[:8], "little")
    at += 4 * rng.randrange(max(1, (len(data) - at) // 4))
    return data[:at] + rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\xff\xff")) + data[at + 4 :]


def metadata_value(data: bytes, rng: random.Random) -> bytes:
    """Another value in JSON that stands in a header's metadata."""

    def change(header: dict) -> None:
        told = header["__metadata__"]
        key = rng.choice(sorted(told))
        told[key] = rng.choice((json_value, json_value, json_key))(told[key].encode(), rng).decode()

    return _in_header(data, change)


def tensor(data: bytes, rng: random.Random) -> bytes:
    """A sound file in which one array is gone, renamed, doubled, shorter, flat, of another type or beyond measure."""
    import numpy as np
    from safetensors.numpy import load, save

    length = int.from_bytes(data[:8], "little")
    try:
        arrays, told = load(data), json.loads(data[8 : 8 + length]).get("__metadata__")
        name = rng.choice(sorted(arrays))
        values, which = arrays.pop(name), rng.randrange(9)
        if which == 1:
            arrays[f"{name}x"] = values
        elif which == 2:
            arrays |= {name: values, rng.choice(("x", "x/y", "model/x", "a/b/c")): values}
        elif which == 3:
            arrays[name] = values[:-1]
        elif which == 4:
            arrays[name] = values[..., :1]
        elif which == 5:
            arrays[name] = values.reshape(rng.choice((-1, (1, *values.shape), values.shape[::-1])))
        elif which == 6:
            arrays[name] = values.astype(rng.choice((np.float64, np.float32, np.float16, np.int64, np.uint8, np.int8)))
        elif which == 7 and values.dtype.kind == "f":
            arrays[name] = np.full_like(values, rng.choice((np.inf, -np.inf, np.nan, 1e308, -1e308, 1e30, -1, 0)))
        elif which == 8:
            arrays[name] = np.repeat(values, 3, -1)
        return save({n: np.ascontiguousarray(v) for n, v in arrays.items()}, told)
    except Exception:  # damaged before
        return data


def sealed_tensors(data: bytes) -> bytes:
    """A safetensors file whose metadata have a checksum, with one that fits its content; otherwise as it is."""
    from safetensors.numpy import load, save

    length = int.from_bytes(data[:8], "little")
    try:
        arrays, told = load(data), json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except Exception:  # damaged
        return data
    if "checksum" not in told:
        return data
    texts = [told[name] for name in ("identity", "facts", "seconds") if name in told]
    found = hashlib.sha256(json.dumps(texts).encode())
    for name, values in sorted(arrays.items()):
        found.update(f"{name} {values.dtype} {values.shape}".encode())
        found.update(values.tobytes())
    return save(arrays, told | {"checksum": found.hexdigest()})


def line_value(data: bytes, rng: random.Random) -> bytes:
    """A word of a line becomes another number or text."""
    lines = data.decode("utf-8", "replace").split("\n")
    i = rng.randrange(len(lines))
    words = [w for w in lines[i].replace(",", " ").replace("=", " ").split() if w]
    new = rng.choice((*map(str, NUMBERS), *TEXTS, "1e999", '"', "[[", "a." * 3000 + "b = 1", "," * 70_000))
    lines[i] = lines[i].replace(rng.choice(words), new, 1) if words and rng.random() < 0.7 else new
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def line_order(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    i = rng.randrange(len(lines))
    return b"\n".join(rng.choice((lines[:i] + lines[i + 1 :], lines[: i + 1] + lines[i:], lines[::-1])))


def sealed(name: str, data: bytes, weights: bytes | None = None) -> bytes:
    """The file with hashes that fit its content, where it is JSON that has some; otherwise as it is."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return data
    if not isinstance(document, dict):
        return data
    try:
        if "weights_sha256" in document:
            document["weights_sha256"] = hashlib.sha256(weights or b"").hexdigest()
            document["sha256"] = _hash({k: v for k, v in document.items() if k != "sha256"})
        elif "checksum" in document:
            document["checksum"] = _hash({k: v for k, v in document.items() if k != "checksum"})
        elif "document_sha256" in document:
            document["document_sha256"] = hashlib.sha256(json.dumps(document["document"]).encode()).hexdigest()
        elif "hash" in document:
            kept = {k: v for k, v in document.items() if k not in ("hash", "format")}
            document["hash"] = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
        else:
            return data
        return json.dumps(document).encode()
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return data


def _hash(document: dict) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _other(value: Any, rng: random.Random) -> Any:
    if isinstance(value, (int, float)) and rng.random() < 0.7:
        return rng.choice((*NUMBERS, value + 1, -value, float(value), str(value)))
    if isinstance(value, str) and rng.random() < 0.7:
        return rng.choice((*TEXTS, value + "x", value.upper(), value[:-1]))
    if isinstance(value, list) and rng.random() < 0.5:
        return rng.choice((value * 2, value[:-1], value[::-1], [value], value * 1000 if len(value) < 10 else value[:1]))
    return rng.choice((None, [], {}, "x", 7, [[]], {"a": {}}, *NUMBERS, *TEXTS))


def _in_json(data: bytes, rng: random.Random, change: Callable[[Any, Any, Any], None]) -> bytes:
    """Parse (one line of several), change at one place, write."""
    lines = data.split(b"\n")
    several = len(lines) > 1 and not data.lstrip().startswith((b"{\n", b"[\n"))
    i = rng.randrange(len(lines)) if several else 0
    try:
        document = json.loads(lines[i] if several else data)
    except (ValueError, RecursionError):  # damaged before
        return data
    holder = {"root": document}
    places = list(_places(holder))
    place, key = rng.choice(places[1:] or places)
    change(place, key, rng)
    text = json.dumps(holder.get("root"), indent=None if several else 1).encode()
    return b"\n".join([*lines[:i], text, *lines[i + 1 :]]) if several else text


def _places(value: Any) -> Any:
    """(container, key) of every value, outer ones first."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def _in_header(data: bytes, change: Callable[[dict], None]) -> bytes:
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        change(header)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # damaged before
        return data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
