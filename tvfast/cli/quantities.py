"""Bytes and seconds as people write them. Prefixes are decimal, as in GB/s; `i` makes them binary."""

from __future__ import annotations

import argparse
import re

_PREFIXES = ("", "K", "M", "G", "T", "P")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGTP]?)(I?)B?", re.IGNORECASE)


def size(text: str) -> int:
    """Bytes of "8G" (8·10⁹), "600M", "8GiB" (8·2³⁰) or "1000000".

    Raises:
        argparse.ArgumentTypeError: anything else, or nothing at all.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or (found[3] and not found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write bytes, or for example 600M, 8G or 8GiB")
    n_bytes = int(float(found[1]) * (1024 if found[3] else 1000) ** _PREFIXES.index(found[2].upper()))
    if n_bytes < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected at least one byte")
    return n_bytes


def bytes_as_text(n_bytes: float) -> str:
    """Three digits with a decimal prefix: "4.81 GB"."""
    prefix = 0
    while round(n_bytes) >= 1000 and prefix < len(_PREFIXES) - 1:
        n_bytes, prefix = n_bytes / 1000, prefix + 1
    digits = 0 if prefix == 0 or n_bytes >= 99.95 else 1 if n_bytes >= 9.995 else 2
    return f"{n_bytes:.{digits}f} {_PREFIXES[prefix]}B"


def seconds_as_text(seconds: float) -> str:
    """ "0.42 s", "38 s", "4:05" or "2:10:05"."""
    if seconds < 59.5:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def counted(n: int, noun: str) -> str:
    """ "1 shard", "3 shards"."""
    return f"{n} {noun}{'' if n == 1 else 'es' if noun.endswith('s') else 's'}"


def whole_number(text: str) -> int:
    """An integer that is not negative, for options such as `--threads`."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def positive(text: str) -> float:
    """A finite number above zero, for options such as `--disk`."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return value


def seed(text: str) -> int:
    """An integer in [0, 2^62)."""
    if not text.isdecimal() or int(text) >= 2**62:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 2^62)")
    return int(text)
