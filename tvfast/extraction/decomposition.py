"""The best approximation of a matrix by one of low rank, found by random projections."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLING = 16
"""Random directions beyond the rank, at least; half of the rank if that is more."""

MOST_ITERATIONS = 24

_ROWS = 256  # in float64 at a time

_RESOLUTION = 4e-7
"""Share of a matrix's squared norm below which float32 sums of squares say nothing."""


class Decomposition(NamedTuple):
    """Δ is about U diag(s) Vᵀ.

    Attributes:
        u: [m, rank], orthonormal columns.
        s: [rank], descending.
        vt: [rank, n], orthonormal rows.
        iterations: of the subspace; 0 where everything was computed.
    """

    u: Tensor
    s: Tensor
    vt: Tensor
    iterations: int


def truncated_svd(
    matrix: Tensor, rank: int, *, tolerance: float = 2e-3, generator: torch.Generator | None = None
) -> Decomposition:
    """The leading singular triplets of a matrix, float32.

    A random projection Y = Δ Ω spans most of the range of Δ; each iteration multiplies by Δ Δᵀ, which raises
    the singular values outside of the span to a higher power (subspace iteration), and orthonormalises. With
    Q the basis, the triplets are those of Qᵀ Δ.

    Args:
        matrix: Δ, [m, n], float32, on any device.
        rank: at least 1; no more than min(m, n) triplets are returned.
        tolerance: relative excess of the reconstruction error at which the iteration ends, as the gains of
            the last two steps predict it. The expected excess of the first step alone is at most
            sqrt(1 + rank / (p - 1)) for p further directions.
        generator: of Ω; the result's last bits depend on it.

    Notes:
        4 m n (rank + p) operations a step, usually 2 to 4 steps; (rank + p) (m + n) floats beside Δ. Where
        rank + p is not well below min(m, n), the full decomposition is cheaper and is used.

    Source: Halko, Martinsson, Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1, theorem 10.5.
    """
    m, n = matrix.shape
    width = rank + max(OVERSAMPLING, rank // 2)
    if 2 * width >= min(m, n):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        return Decomposition(u[:, :rank], s[:rank], vt[:rank], 0)
    omega = torch.randn(n, width, generator=generator, dtype=torch.float32).to(matrix.device)
    basis = _orthonormal(matrix @ omega)
    progress = _Progress(_squared_norm(matrix), tolerance)
    for iteration in range(1, MOST_ITERATIONS + 1):
        rows = matrix.T @ basis  # [n, width]: what the basis holds of Δ
        right, small = torch.linalg.qr(rows)
        u, s, vt = torch.linalg.svd(small.T, full_matrices=False)  # Qᵀ Δ = smallᵀ rightᵀ
        if progress.ends(float(s[:rank].double().square().sum())) or iteration == MOST_ITERATIONS:
            return Decomposition(basis @ u[:, :rank], s[:rank], vt[:rank] @ right.T, iteration)
        basis = _orthonormal(matrix @ right)
    raise AssertionError("the last iteration returns")


class _Progress:
    """Whether another step would lower the error by a share that matters."""

    def __init__(self, total: float, tolerance: float) -> None:
        self._total = total
        self._tolerance = tolerance
        self._captured: list[float] = []

    def ends(self, captured: float) -> bool:
        """
        Args:
            captured: sum of the leading squared singular values; the error's square is what is left of Δ's.
        """
        self._captured.append(captured)
        if len(self._captured) < 2:
            return self._total - captured <= _RESOLUTION * self._total
        gain = captured - self._captured[-2]
        error = self._total - captured
        if gain <= _RESOLUTION * self._total or error <= 0.0:
            return True
        ratio = 0.5
        if len(self._captured) > 2:
            before = self._captured[-2] - self._captured[-3]
            ratio = min(gain / before, 0.9) if before > 0.0 else 0.9
        remaining = gain * ratio / (1.0 - ratio)  # gains fall geometrically
        return remaining <= 2.0 * self._tolerance * error


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns)[0]
    return basis


def _squared_norm(matrix: Tensor) -> float:
    """The sum of squares in float64, by rows, without a copy of the matrix."""
    total = 0.0
    for begin in range(0, len(matrix), _ROWS):
        total += float(matrix[begin : begin + _ROWS].double().square().sum())
    return total
