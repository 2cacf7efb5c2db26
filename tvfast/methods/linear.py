"""Weighted average of the models themselves."""

from __future__ import annotations

from dataclasses import dataclass

from tvfast.errors import ArgumentError
from tvfast.methods.base import ProgramMethod, float32, parameter, register_method
from tvfast.program import Divisor, Program, Reduce


@register_method(
    "linear", source="Wortsman et al. 2022, arXiv:2203.05482; mergekit 0.1.5 `linear`", needs_base=False
)
@dataclass(frozen=True, kw_only=True)
class Linear(ProgramMethod):
    """θ = λ · Σ_k w_k θ_k / Σ_k w_k; the base is written, not read."""

    normalize: bool = parameter(True, "divide by the sum of the weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_flag("normalize")

    def check_models(self, n_models: int) -> None:
        super().check_models(n_models)
        total = 0.0
        for weight in self.per_model("weights", n_models):
            total = float32(total + float32(weight))
        if self.normalize and total == 0.0:
            raise ArgumentError(
                "method 'linear': the weights sum to 0; expected another sum, or normalize=False."
            )

    def program(self) -> Program:
        # mergekit 0.1.5 accumulates with a fused multiply-add; an unfused sum is not within 1 ulp of it.
        return Program(reduce=Reduce.FUSED_SUM, divisor=Divisor.WEIGHT if self.normalize else Divisor.NONE)
