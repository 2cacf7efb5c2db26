"""Who is alive: what a rank tells of itself, and what follows when it no longer does. Imports no torch."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field


class Beat:
    """What a rank tells of itself.

    Attributes:
        steady: it is merging, and bytes come and go all the time.
        left: it has ended.
        read_bytes, written_bytes: so far.
    """

    def __init__(self, number: int = 0, read_bytes: int = 0, written_bytes: int = 0) -> None:
        self.number = number
        self.read_bytes = read_bytes
        self.written_bytes = written_bytes
        self.steady = False
        self.left = False
        self._guard = threading.Lock()

    def add(self, read_bytes: int, written_bytes: int) -> None:
        """From any thread."""
        with self._guard:
            self.read_bytes += read_bytes
            self.written_bytes += written_bytes

    def next(self) -> Beat:
        """Shows that its process runs."""
        self.number += 1
        return self

    def pack(self) -> str:
        return json.dumps([self.number, self.read_bytes, self.written_bytes, self.steady, self.left])

    @staticmethod
    def unpack(raw: bytes) -> Beat:
        number, read_bytes, written_bytes, steady, left = json.loads(raw)
        beat = Beat(number, read_bytes, written_bytes)
        beat.steady, beat.left = steady, left
        return beat


@dataclass(slots=True)
class _Seen:
    """The last beat of a rank, and when it and its counters changed."""

    beat: Beat
    changed: float
    moved: float
    came: bool = False


@dataclass
class Heartbeats:
    """The ranks that one of them watches; times are of its own monotonic clock.

    Attributes:
        ranks: whom.
        timeout_s: without a beat: lost.
        stall_s: of a steady rank without a byte: hangs; 0: never.
    """

    ranks: Iterable[int]
    timeout_s: float
    stall_s: float
    _seen: dict[int, _Seen] = field(default_factory=dict)

    def heard(self, rank: int, raw: bytes | None, now: float) -> tuple[int, int]:
        """Takes what the store holds of a rank, or None; returns bytes read and written since."""
        if rank not in self._seen:
            self._seen[rank] = _Seen(Beat(), now, now)
        seen = self._seen[rank]
        if raw is None:
            return 0, 0
        beat, last = Beat.unpack(raw), seen.beat
        if beat.number == last.number and beat.left == last.left:
            return 0, 0
        read, wrote = beat.read_bytes - last.read_bytes, beat.written_bytes - last.written_bytes
        moved = now if read or wrote or not (beat.steady and last.steady) else seen.moved
        self._seen[rank] = _Seen(beat, now, moved, came=True)
        return read, wrote

    def lost(self, now: float) -> tuple[int, str] | None:
        """The first rank that is lost, and how; None: all are well."""
        for rank, seen in self._seen.items():
            if seen.beat.left:
                continue
            if now - seen.changed > self.timeout_s:
                what = "is lost: it has given no sign for" if seen.came else "has not come within"
                return rank, f"{what} {self.timeout_s:g} s"
            if self.stall_s and seen.beat.steady and now - seen.moved > self.stall_s:
                return rank, f"hangs: it has neither read nor written anything for {self.stall_s:g} s"
        return None
