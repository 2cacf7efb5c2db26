"""One model as it is."""

from __future__ import annotations

from dataclasses import dataclass

from tvfast.methods.base import ProgramMethod, register_method
from tvfast.program import Program


@register_method("passthrough", source="mergekit 0.1.5 `passthrough`", needs_base=False, n_models=(1, 1))
@dataclass(frozen=True, kw_only=True)
class Passthrough(ProgramMethod):
    """θ = λ · w θ_1; the base is written, not read."""

    def program(self) -> Program:
        return Program()
