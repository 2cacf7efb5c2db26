"""What a row must read and write at least once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bench.buffers import Buffers


@dataclass(frozen=True, slots=True)
class Traffic:
    """Tensors that a row must read and write at least once; also the limit that it is measured against."""

    n_read: int
    n_written: int

    @property
    def limit(self) -> str:
        return f"read {self.n_read}" + (f" + write {self.n_written}" if self.n_written else "")

    def n_bytes(self, buffers: Buffers) -> int:
        return (self.n_read + self.n_written) * buffers.n_bytes

    def streams(self, buffers: Buffers) -> tuple[list[Tensor], Tensor | None]:
        """The tensors of the limit pass: those that the row reads and writes."""
        return [buffers.base, *buffers.models][: self.n_read], buffers.out if self.n_written else None
