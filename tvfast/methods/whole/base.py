"""What the methods on whole tensors share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvfast.methods.base import ProgramMethod, TensorMethod


@dataclass(frozen=True, kw_only=True)
class WholeMethod(TensorMethod):
    """A function of a tensor's values alone, without statistics."""

    def fallback(
        self, shape: Sequence[int], kinds: Sequence[str | None], n_models: int
    ) -> tuple[ProgramMethod, str] | None:
        return None

    def scratch_bytes(self, shape: Sequence[int], n_models: int, record_bytes: int) -> int:
        """The result in float32, and blocks in float64."""
        return 4 * math.prod(shape) + 64 * 2**20
