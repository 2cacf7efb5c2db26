"""Importance of every entry of a model's parameters: |g θ|, |g τ| and the diagonal Fisher, per sample."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from tvfast._leaves import Weights
from tvfast._scores import Scores
from tvfast.importance.collecting import collect
from tvfast.importance.files import Progress
from tvfast.merging import merge as merge_weights

W = TypeVar("W", bound=Weights)

__all__ = ["Progress", "collect", "merge"]


def merge(
    base: W, models: Iterable[Weights], stats: Iterable[Scores], method: str = "sta", **parameters: Any
) -> W:
    """Merge models into new weights by the importance of their entries.

    Args:
        base, models: as in `tvfast.merge`.
        stats: what `collect` returned for each model, or the path of its file.
        method: "sta", "sta_forget" or "fisher".
        **parameters: of the method, and those of `tvfast.merge`.

    Returns, raises:
        As `tvfast.merge`.
    """
    return merge_weights(base, models, method, stats=stats, **parameters)
