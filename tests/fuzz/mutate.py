"""Mutations that know what they mutate: bytes, msgpack and JSON trees, text; all from one `random.Random`."""

from __future__ import annotations

import functools
import json
import random
from typing import Any

import msgpack

NUMBERS = (-(2**63), -1, 0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**64 - 1)
FLOATS = (0.0, -0.0, -1.0, 1e308, 5e-324, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    *("", "..", "../../etc/passwd", "/", "a" * 65, "A", "site\n", "site\0", "0" * 32),
    *("\u202esite", "\u00e9", "\u0435", "\ufeff", "\U0001f600"),
)
BLOBS = (b"", b"\0", b"\xff" * 32, bytes(64), b"\x28\xb5\x2f\xfd" + bytes(12), b"MB\x01\0")


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Some bytes turned over, cut, doubled, moved or replaced."""
    out = bytearray(memoryview(data))  # a number, where an earlier mutation left one, would become as many zeros
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(7):
            case 0 if out:
                out[at % len(out)] ^= 1 << rng.randrange(8)
            case 1 if out:
                out[at % len(out)] = rng.randrange(256)
            case 2:
                del out[at : at + rng.choice((1, 2, 8, 64))]
            case 3:
                out[at:at] = rng.randbytes(rng.choice((1, 4, 16)))
            case 4:
                out[at:at] = out[at : at + rng.choice((1, 8, 64))]
            case 5:
                out = out[:at]
            case _:
                out[at : at + 4] = rng.choice((0, 1, 2**31, 2**32 - 1)).to_bytes(4, "big")
    return bytes(out)


def mutated_value(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """One place of a tree of maps, lists and scalars made into something else."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                return {name: each for name, each in value.items() if name != key}
            case 1:
                return {**value, odd(rng): odd(rng)} if rng.random() < 0.5 else {**value, rng.choice(TEXTS): odd(rng)}
            case _:
                return {**value, key: mutated_value(value[key], rng, depth + 1)}
    if isinstance(value, list | tuple) and value and rng.random() < 0.8:
        items = list(value)
        at = rng.randrange(len(items))
        match rng.randrange(5):
            case 0:
                del items[at]
            case 1:
                items.insert(at, odd(rng))
            case 2 if len(items) < 4096:
                items *= 2
            case _:
                items[at] = mutated_value(items[at], rng, depth + 1)
        return items
    if isinstance(value, bytes) and rng.random() < 0.7:
        return mutated_bytes(value, rng)
    if isinstance(value, str) and value and rng.random() < 0.5:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(("", "0", "g", "\0", "/", "\u0130")) + value[at + 1 :]
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 2**31, 2**63))
    return odd(rng)


def odd(rng: random.Random, depth: int = 0) -> Any:
    """A value that nobody expects there."""
    match rng.randrange(9):
        case 0:
            return rng.choice(NUMBERS)
        case 1:
            return rng.choice(FLOATS)
        case 2:
            return rng.choice(TEXTS)
        case 3:
            return rng.choice(BLOBS)
        case 4:
            return None
        case 5:
            return rng.random() < 0.5
        case 6 if depth < 3:
            return [odd(rng, depth + 1) for _ in range(rng.randrange(4))]
        case 7 if depth < 3:
            return {rng.choice(TEXTS): odd(rng, depth + 1) for _ in range(rng.randrange(3))}
        case _:
            return _nested(rng.choice((2, 40, 600, 2000)))


@functools.cache
def _nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def mutated_msgpack(data: bytes, rng: random.Random) -> bytes:
    """The bytes of a tree with one place changed; now and then the bytes themselves."""
    if rng.random() < 0.25:
        return mutated_bytes(data, rng)
    tree = msgpack.unpackb(data, raw=False, strict_map_key=False)
    return packed(mutated_value(tree, rng), data, rng)


def packed(tree: Any, otherwise: bytes, rng: random.Random) -> bytes:
    """The tree as msgpack; what msgpack cannot say (too deep, too large a number) becomes spoilt bytes."""
    try:
        out: bytes = msgpack.packb(tree, use_bin_type=True)
    except (ValueError, OverflowError, TypeError):
        return b"\x91" * 5000 + mutated_bytes(otherwise, rng)
    return out


def mutated_json(data: bytes, rng: random.Random) -> bytes:
    """The same for a JSON document."""
    if rng.random() < 0.4:
        return mutated_bytes(data, rng)
    tree = mutated_value(json.loads(data), rng)
    try:
        return json.dumps(tree, default=lambda raw: raw.hex()).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError, TypeError):
        return b"[" * 5000 + data
