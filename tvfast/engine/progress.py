"""What is told of a merge while it is carried out."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Is told of the work as it is done; called from several threads."""

    def start(self, read_bytes: int, write_bytes: int) -> None:
        """Before the first byte: what is planned, over all passes."""

    def read(self, n_bytes: int) -> None:
        """So many bytes of inputs came in."""

    def wrote(self, n_bytes: int) -> None:
        """So many bytes of the output are with the system."""

    def finish(self) -> None:
        """Done, or failed."""


class Silence:
    """Shows nothing."""

    def start(self, read_bytes: int, write_bytes: int) -> None: ...
    def read(self, n_bytes: int) -> None: ...
    def wrote(self, n_bytes: int) -> None: ...
    def finish(self) -> None: ...


class Unfinished:
    """Tells of work after which more follows."""

    def __init__(self, progress: Progress) -> None:
        self.start, self.read, self.wrote = progress.start, progress.read, progress.wrote

    def finish(self) -> None: ...
