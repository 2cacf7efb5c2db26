"""Sentences that people rated, of four domains: Hutto and Gilbert, ICWSM 2014, from a Python package."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

DATA = Path(__file__).resolve().parents[2] / "build" / "data"
DOMAINS = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "news": "nytEditorialSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
}

_SOURCE = "vaderSentiment-3.3.2"

Sentence = tuple[str, int]
"""A text, and whether its mean rating is positive."""


def archive() -> bytes:
    """The ratings, out of the source distribution of PyPI vaderSentiment, fetched by pip into build/data."""
    path = DATA / f"{_SOURCE}.tar.gz"
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "-d", str(DATA), _SOURCE.replace("-", "==")], check=True)
    with tarfile.open(path) as source:
        member = source.extractfile(f"{_SOURCE}/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert member is not None
        return member.read()


def sentences(packed: bytes, domain: str) -> Sequence[Sentence]:
    """All sentences of a domain but those rated 0, in the order of the file."""
    with tarfile.open(fileobj=io.BytesIO(packed)) as source:
        member = source.extractfile(f"hutto_ICWSM_2014/{DOMAINS[domain]}")
        assert member is not None
        lines = member.read().decode("latin-1").splitlines()
    rows = [line.split("\t") for line in lines]
    return [(row[2], int(float(row[1]) > 0)) for row in rows if len(row) == 3 and float(row[1]) != 0]
