"""What pictures have in common."""

from __future__ import annotations


def verbatim(text: object) -> str:
    """A text that matplotlib shows as it is: between two dollar signs it would read mathematics."""
    return str(text).replace("$", r"\$")
