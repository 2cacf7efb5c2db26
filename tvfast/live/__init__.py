"""Merging of live weights again and again: `LiveMerge`."""

from __future__ import annotations

from tvfast.live.live_merge import LiveMerge

__all__ = ["LiveMerge"]
