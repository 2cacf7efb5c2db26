"""Searching coefficients of merges: grids, random draws, CMA-ES, and AdaMerging by gradients.

Strategies propose points and are told values, so they serve a `LiveMerge` in Python and `tvfast sweep` alike.
Importing this imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvfast.search.running import Found, Trial, maximise, minimise
from tvfast.search.strategies import CMA, Grid, Interval, Random, Strategy

if TYPE_CHECKING:
    from tvfast.search.learning import Learned, adamerging, entropy

__all__ = [
    "CMA",
    "Found",
    "Grid",
    "Interval",
    "Learned",
    "Random",
    "Strategy",
    "Trial",
    "adamerging",
    "entropy",
    "maximise",
    "minimise",
]


def __getattr__(name: str) -> Any:
    if name in ("Learned", "adamerging", "entropy"):
        from tvfast.search import learning as home

        return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}.")
