"""Options of mergekit's commands that have no meaning here: accepted, and named once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Flag:
    """One of mergekit's options that changes nothing here.

    Attributes:
        name: with its dashes.
        why: it has no effect.
        takes: what stands for its value; None: it is a switch, which has a form with `--no-`.
    """

    name: str
    why: str
    takes: str | None = None

    @property
    def field(self) -> str:
        """Where argparse puts its value."""
        return self.name.removeprefix("--").replace("-", "_")


WITHOUT_EFFECT = (
    Flag("--allow-crimes", "tensors are found by their names, whatever the architecture is called"),
    Flag("--lora-merge-cache", "nothing is merged into a cache", "PATH"),
    Flag("--low-cpu-memory", "memory is bounded anyway; see `tvfast merge --memory`"),
    Flag("--clone-tensors", "repeated layers need no copy"),
    Flag("--trust-remote-code", "no code of a model is run"),
    Flag("--lazy-unpickle", "tensors of .bin files are read one by one anyway"),
    Flag("--read-to-gpu", "reading, uploading and merging overlap anyway"),
    Flag("--async-write", "writing overlaps with merging anyway"),
    Flag("--write-threads", "writing overlaps with merging anyway", "N"),
)


def accept(command: argparse.ArgumentParser, flags: Iterable[Flag]) -> None:
    """Let a command take them."""
    for flag in flags:
        if flag.takes is None:
            switch = argparse.BooleanOptionalAction
            command.add_argument(flag.name, action=switch, default=None, help=argparse.SUPPRESS)
        else:
            command.add_argument(flag.name, metavar=flag.takes, help=argparse.SUPPRESS)


def say_what_has_no_effect(options: argparse.Namespace, flags: Iterable[Flag]) -> None:
    """Name those that were given, on stderr."""
    for flag in flags:
        if getattr(options, flag.field) is not None:
            print(f"tvfast: note: {flag.name} has no effect: {flag.why}.", file=sys.stderr)
