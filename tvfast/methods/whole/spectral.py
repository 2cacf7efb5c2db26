"""Merges of matrices by their singular vectors; other tensors get the mean of the task vectors."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvfast.errors import SolveError
from tvfast.methods.base import (
    ProgramMethod,
    TensorJob,
    TensorResult,
    parameter,
    register_method,
)
from tvfast.methods.task_arithmetic import TaskArithmetic
from tvfast.methods.whole.base import WholeMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class _Spectral(WholeMethod):
    """θ = θ₀ + λ M, M a matrix made of the D_t = θ_t - θ₀."""

    unused = frozenset({"weights"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_weights()

    def fallback(
        self, shape: Sequence[int], kinds: Sequence[str | None], n_models: int
    ) -> tuple[ProgramMethod, str] | None:
        if len(shape) == 2 and min(shape) > 0:
            return None
        return TaskArithmetic(normalize=True, scale=self.scale), "no matrices"

    @abstractmethod
    def merged(self, deltas: Sequence[Tensor]) -> Tensor:
        """M."""

    def merge(self, jobs: Sequence[TensorJob]) -> list[TensorResult]:
        return [self._one(job) for job in jobs]

    def _one(self, job: TensorJob) -> TensorResult:
        import torch

        assert job.base is not None
        wide = torch.promote_types(job.base.dtype, torch.float32)
        for model in job.models:
            wide = torch.promote_types(wide, model.dtype)
        base = job.base.to(wide)
        deltas = [model.to(wide) - base for model in job.models]
        if not all(bool(torch.isfinite(delta).all()) for delta in deltas):
            return TensorResult(torch.full_like(base, math.nan), f"{job.name} holds NaN or infinity")
        try:
            found = self.merged(deltas)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise SolveError(f"tensor {job.name!r}: {error} Merge it with another method.") from error
        return TensorResult(base + found * self.scale)

    def scratch_bytes(self, shape: Sequence[int], n_models: int, record_bytes: int) -> int:
        """Task vectors in float32, their decompositions, and one matrix of all in float64."""
        return (20 * n_models + 40) * math.prod(shape) + 24 * min(shape, default=0) ** 2 + 64 * 2**20


@register_method("tsv_m", source="Gargiulo et al. 2024, arXiv:2412.00081", dialects=("paper",))
@dataclass(frozen=True, kw_only=True)
class TsvM(_Spectral):
    """θ = θ₀ + λ U⊥ diag(s) V⊥ᵀ of the leading singular triplets of every task, made orthogonal together."""

    def merged(self, deltas: Sequence[Tensor]) -> Tensor:
        from tvfast.matrices import spectral

        return spectral.tsv_m(deltas)


@register_method("iso_c", source="Marczak et al. 2025, arXiv:2502.04959", dialects=("paper", "mean"))
@dataclass(frozen=True, kw_only=True)
class IsoC(_Spectral):
    """θ = θ₀ + λ mean(s) U Vᵀ of Σ_t D_t = U diag(s) Vᵀ."""

    def merged(self, deltas: Sequence[Tensor]) -> Tensor:
        import torch

        from tvfast.matrices import spectral

        total = torch.stack(list(deltas)).sum(dim=0)
        return spectral.iso_c(total / len(deltas) if self.dialect == "mean" else total)


@register_method("iso_cts", source="Marczak et al. 2025, arXiv:2502.04959", dialects=("paper",))
@dataclass(frozen=True, kw_only=True)
class IsoCts(_Spectral):
    """θ = θ₀ + λ isotropic merge of a common subspace and of every task's own."""

    common_space_fraction: float = parameter(0.8, "share of the rank that is common, in [0, 1]")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_fractions("common_space_fraction")
        self._normalise("common_space_fraction", per_model=False)

    def merged(self, deltas: Sequence[Tensor]) -> Tensor:
        from tvfast.matrices import spectral

        return spectral.iso_cts(deltas, self.common_space_fraction)


@register_method("knots", source="Stoica et al. 2024, arXiv:2410.19735", dialects=("paper",))
@dataclass(frozen=True, kw_only=True)
class Knots(_Spectral):
    """θ = θ₀ + λ U TIES(diag(s) V_t), [D_1 ... D_T] = U diag(s) [V_1 ... V_T]."""

    density: float = parameter(0.2, "share of every task's aligned matrix that TIES keeps, in [0, 1]")
    smallest: float = parameter(1e-5, "singular values up to it are left out, 0 or more")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_fractions("density")
        self._normalise("density", per_model=False)
        self._check_least("smallest")

    def merged(self, deltas: Sequence[Tensor]) -> Tensor:
        from tvfast.matrices import spectral

        return spectral.knots(deltas, self.density, self.smallest)


@register_method("wudi", source="Cheng et al. 2025, arXiv:2503.08099, in closed form", dialects=("paper",))
@dataclass(frozen=True, kw_only=True)
class Wudi(_Spectral):
    """θ = θ₀ + λ M, M of least Σ_t |(M - D_t) D_tᵀ|² / |D_t|²."""

    ridge: float = parameter(1e-8, "added to the diagonal of the normalised Gram matrix, above 0")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least("ridge", zero=False)

    def merged(self, deltas: Sequence[Tensor]) -> Tensor:
        from tvfast.matrices import spectral

        return spectral.wudi(deltas, self.ridge)
