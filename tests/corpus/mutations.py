"""Damage at random: valid files with bytes, numbers, tokens and entries changed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from random import Random

from tests.corpus.headers import entry, packed

TOKENS = (
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b" ", b"\n", b"\0", b"\xff", b"\xed\xa0\x80"),
    *(
        b"null",
        b"true",
        b"NaN",
        b"Infinity",
        b"-1",
        b"-0",
        b"1.5",
        b"1e9",
        b"00",
        b'""',
        b"[]",
        b"{}",
        b"[[",
        b"]]",
    ),
    *(b'"F32"', b'"BF16"', b'"F4"', b'"Q4"', b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"'),
    *(b"\\u0000", b"\\ud800", b"\\udc00", b"\\u0078", b"\\n", '"☃"'.encode(), '"😀"'.encode()),
)
NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    255,
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**61,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
    10**40,
)
LENGTHS = (0, 1, 2, 7, 8, 100, 99_999_999, 100_000_000, 100_000_001, 2**31, 2**32, 2**60, 2**63, 2**64 - 1)
SEEDS = (
    packed({}, 0),
    packed({"x": entry()}),
    packed({"x": entry(), "y": entry("BF16", [2, 3], [8, 20]), "z": entry("U8", [], [20, 21])}, 21),
    packed({"__metadata__": {"format": "pt", "note": "naïve ☃ 😀"}, "x": entry()}),
    packed(json.dumps({"x": entry(), "e": entry("F64", [0, 3], [8, 8])}, separators=(",", ":")).encode()),
    packed(
        json.dumps({"x": entry(), "é\n": entry("F4", [8], [8, 12])}, indent=1, ensure_ascii=False).encode(),
        12,
    ),
    packed({f"model.layers.{k}.weight": entry("I8", [2, 2], [4 * k, 4 * k + 4]) for k in range(6)}, 24),
)
LARGE = packed(
    {f"model.layers.{k}.weight": entry("I8", [2, 2], [4 * k, 4 * k + 4]) for k in range(300)}, 1200
)

_NUMBER = re.compile(rb"[0-9]+")
_ENTRY = re.compile(rb'"[^"]*": ?\{[^{}]*\}')


def _flip(raw: bytearray, random: Random) -> None:
    raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)


def _overwrite(raw: bytearray, random: Random) -> None:
    raw[random.randrange(len(raw))] = random.randrange(256)


def _insert(raw: bytearray, random: Random) -> None:
    place = random.randrange(len(raw))
    raw[place:place] = random.choice(TOKENS)


def _replace(raw: bytearray, random: Random) -> None:
    place = random.randrange(len(raw))
    raw[place : place + random.randrange(8)] = random.choice(TOKENS)


def _delete(raw: bytearray, random: Random) -> None:
    place = random.randrange(len(raw))
    del raw[place : place + 1 + random.randrange(16)]


def _truncate(raw: bytearray, random: Random) -> None:
    del raw[random.randrange(len(raw)) :]


def _extend(raw: bytearray, random: Random) -> None:
    raw += bytes(random.randrange(16))


def _repeat(raw: bytearray, random: Random) -> None:
    place = random.randrange(len(raw))
    raw[place:place] = raw[place : place + random.randrange(40)] * random.choice((1, 1, 2, 30))


def _splice(raw: bytearray, random: Random) -> None:
    other = random.choice(SEEDS)
    start = random.randrange(len(other))
    place = random.randrange(len(raw))
    raw[place : place + random.randrange(40)] = other[start : start + random.randrange(60)]


def _length(raw: bytearray, random: Random) -> None:
    raw[:8] = random.choice((*LENGTHS, max(0, len(raw) - 8), len(raw))).to_bytes(8, "little")


def _number(raw: bytearray, random: Random) -> None:
    found = list(_NUMBER.finditer(raw, 8))
    if found:
        number = random.choice(found)
        value = random.choice((*NUMBERS, int(number[0]) + 1, max(0, int(number[0]) - 1), int(number[0]) * 2))
        raw[number.start() : number.end()] = str(value).encode()


def _entries(raw: bytearray, random: Random) -> None:
    """Two entries change places, or one comes twice, or one goes."""
    found = list(_ENTRY.finditer(raw, 8))
    if found:
        first, second = sorted((random.choice(found), random.choice(found)), key=lambda match: match.start())
        kind = random.randrange(3)
        if kind == 0 and first is not second:
            one, other = bytes(first[0]), bytes(second[0])
            raw[second.start() : second.end()] = one
            raw[first.start() : first.end()] = other
        elif kind == 1:
            raw[first.end() : first.end()] = b"," + first[0]
        else:
            del raw[first.start() : first.end() + 1]


MUTATIONS: tuple[Callable[[bytearray, Random], None], ...] = (
    *(_flip, _overwrite, _insert, _replace, _delete, _truncate, _extend, _repeat, _splice, _length),
    *(_number, _number, _entries),
)


def mutated(random: Random) -> bytes:
    """A valid file, changed one to four times; often its length is made to fit the header again."""
    seed = random.choice(SEEDS) if random.randrange(200) else LARGE
    n_data = len(seed) - 8 - int.from_bytes(seed[:8], "little")
    raw = bytearray(seed)
    for _ in range(random.choice((1, 1, 2, 3, 4))):
        if raw:
            random.choice(MUTATIONS)(raw, random)
    if random.random() < 0.7 and len(raw) >= 8 + n_data:
        raw[:8] = (len(raw) - 8 - n_data).to_bytes(8, "little")
    return bytes(raw)
