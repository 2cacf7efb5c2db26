"""Sizes and times as people write and read them."""

from __future__ import annotations

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvfast.cli.quantities import (
    bytes_as_text,
    counted,
    positive,
    seconds_as_text,
    seed,
    size,
    whole_number,
)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("1", 1),
        ("1000000", 1_000_000),
        ("600M", 600_000_000),
        ("8G", 8_000_000_000),
        ("8g", 8_000_000_000),
        ("8GB", 8_000_000_000),
        ("8GiB", 8 * 2**30),
        ("1.5K", 1500),
        ("0.5KiB", 512),
        ("2T", 2 * 10**12),
        ("7B", 7),
    ],
)
def test_sizes(text: str, n_bytes: int) -> None:
    assert size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "G", "-1", "0", "0.1", "8X", "8 G B", "1e9", "nan", "iB", "8iB", "٣"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        size(text)


@given(st.integers(1, 10**17))
def test_a_printed_size_is_within_its_three_digits(n_bytes: int) -> None:
    text = bytes_as_text(n_bytes)
    assert len(text.split()[0].replace(".", "")) <= 3
    assert abs(size(text.replace(" ", "")) - n_bytes) <= 0.006 * n_bytes


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.424, "0.42 s"), (9.999, "10 s"), (59.4, "59 s"), (59.6, "1:00"), (245, "4:05"), (7805, "2:10:05")],
)
def test_seconds(seconds: float, text: str) -> None:
    assert seconds_as_text(seconds) == text


def test_counts_have_the_plural_of_their_noun() -> None:
    assert [counted(n, "shard") for n in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]
    assert counted(2, "pass") == "2 passes"


@pytest.mark.parametrize(("check", "text"), [(whole_number, "-1"), (whole_number, "1.5"), (seed, str(2**62))])
def test_numbers_out_of_range_are_refused(check: object, text: str) -> None:
    assert callable(check)
    with pytest.raises(argparse.ArgumentTypeError):
        check(text)


@pytest.mark.parametrize("text", ["0", "-2", "inf", "nan", "fast"])
def test_rates_are_finite_and_above_zero(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="above zero"):
        positive(text)
    assert positive("1.5") == 1.5
