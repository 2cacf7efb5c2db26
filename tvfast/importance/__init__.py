"""Importance of every entry of a model's parameters: |g θ|, |g τ| and the diagonal Fisher, per sample."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from tvfast._leaves import Weights
from tvfast._scores import Scores
from tvfast.importance.collecting import collect
from tvfast.importance.files import Progress
from tvfast.merging import merge_

W = TypeVar("W", bound=Weights)

__all__ = ["Progress", "collect", "merge"]


def merge(
    base: W, models: Iterable[Weights], scores: Iterable[Scores], method: str = "sta", **parameters: Any
) -> W:
    """`tvfast.merge_` with scores: into the base, in place; returns the base.

    Args:
        base, models: as in `tvfast.merge_`.
        scores: what `collect` returned for each model.
        method: "sta", "sta_forget" or "fisher".
        **parameters: of the method.

    Raises:
        As `tvfast.merge_`.
    """
    return merge_(base, models, method, scores=scores, **parameters)
