"""Streams checkpoints through a merge: bind a recipe to files, plan, read, merge, write, resume."""

from __future__ import annotations
