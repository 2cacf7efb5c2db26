"""X S = R for a symmetric positive semidefinite S: Cholesky, in float64 or with a ridge where it must be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tvfast.errors import SolveError
from tvfast.factors.forms import Blocks, Dense, Diagonal, Factor, Root

RIDGES = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3)
"""Tried in turn, times the mean of the diagonal."""

_LARGEST_RESIDUAL = {torch.float32: 1e-5, torch.float64: 1e-8}


@dataclass(frozen=True, eq=False)
class Solved:
    """A solution.

    Attributes:
        x: of the dtype of the right-hand side.
        residual: |X S - R| / |R|, Frobenius norms, of the system that was solved; 0 for R = 0.
        note: what was done beside the plain solve; "" for nothing.
    """

    x: Tensor
    residual: float
    note: str = ""


def solve(matrix: Factor, rhs: Tensor, where: str) -> Solved:
    """X with X S = R.

    Rows and columns of zeros, inputs that were never active, leave X zero there. Where Cholesky does not
    succeed to the accuracy of the dtype, it is done in float64, and where S is singular to the accuracy of
    its own dtype, a multiple of the identity is added: the smallest of `RIDGES` times the mean of its
    diagonal.

    Args:
        matrix: S, of side n.
        rhs: R, [m, n], float32 or float64.
        where: the layer, for messages.

    Raises:
        SolveError: S is zero, not finite, or singular beyond the largest ridge; with its condition.
    """
    check_finite(where, matrix.is_finite(), bool(torch.isfinite(rhs).all()))
    if isinstance(matrix, Diagonal):
        return _solve_diagonal(matrix, rhs, where)
    if not isinstance(matrix, Blocks):
        return _solve_dense(matrix.dense(), rhs, where)
    parts = [*matrix.whole, *([matrix.rest] if matrix.rest.shape[0] else [])]
    x, start, notes, squares = torch.empty_like(rhs), 0, [], 0.0
    for number, part in enumerate(parts):
        columns = slice(start, start + part.shape[0])
        target = rhs[:, columns]
        if bool((part.diagonal() == 0).all()):
            x[:, columns] = 0.0
        else:
            solved = _solve_dense(part, target, f"{where}, block {number}")
            x[:, columns] = solved.x
            squares += (solved.residual * float(target.norm())) ** 2
            notes += [f"block {number}: {solved.note}"] * bool(solved.note)
        start = columns.stop
    if bool((matrix.diagonal() == 0).all()):
        raise _zero(where)
    norm = float(rhs.norm())
    shown = "; ".join(notes[:2]) + (f"; {len(notes) - 2} more blocks" if len(notes) > 2 else "")
    return Solved(x, math.sqrt(squares) / norm if norm else 0.0, shown)


def check_finite(where: str, factors: bool, weights: bool) -> None:
    """Raise unless factors are finite, and so are weights times factors.

    Raises:
        SolveError: which of them hold NaN or infinity.
    """
    if not factors:
        raise SolveError(
            f"{where}: the factors hold NaN or infinity; expected finite ones. Collect the statistics again, "
            "in float32, and look at the data."
        )
    if not weights:
        raise SolveError(
            f"{where}: a model's weights hold NaN or infinity, or are too large for their factors; expected "
            "finite ones. Give another model."
        )


def _solve_diagonal(matrix: Diagonal, rhs: Tensor, where: str) -> Solved:
    values = matrix.values.to(rhs.dtype)
    if not bool((values > 0).any()):
        raise _zero(where)
    return Solved(torch.where(values > 0, rhs / torch.where(values > 0, values, 1.0), 0.0), 0.0)


def _solve_dense(matrix: Tensor, rhs: Tensor, where: str) -> Solved:
    diagonal = matrix.diagonal()
    if bool((diagonal == 0).all()):
        raise _zero(where)
    own = torch.finfo(matrix.dtype).eps
    dtypes = [torch.float64] if rhs.dtype == torch.float64 else [torch.float32, torch.float64]
    best = 0.0
    for dtype in dtypes:
        eps = max(own, torch.finfo(dtype).eps)
        tried = _attempt(matrix.to(dtype), rhs.to(dtype), 0.0, eps)
        best = max(best, tried.reciprocal_condition)
        if tried.x is not None and tried.residual <= _LARGEST_RESIDUAL[dtype]:
            note = "solved in float64" if dtype != rhs.dtype else ""
            return Solved(tried.x.to(rhs.dtype), tried.residual, note)
    for ridge in RIDGES:
        tried = _attempt(matrix.double(), rhs.double(), ridge, own)
        if tried.x is not None and tried.residual <= _LARGEST_RESIDUAL[torch.float64]:
            note = f"singular (reciprocal condition {best:.0e}): ridge of {ridge:g} of the mean diagonal"
            return Solved(tried.x.to(rhs.dtype), tried.residual, note)
    raise SolveError(
        f"{where}: the matrix of side {matrix.shape[0]} is singular or indefinite (reciprocal condition "
        f"{best:.0e}) even with a ridge of {RIDGES[-1]:g} of its mean diagonal; expected second moments, "
        "which are positive semidefinite. Collect on more data, or set shrink below 1."
    )


@dataclass(frozen=True, eq=False)
class _Attempt:
    x: Tensor | None
    residual: float
    reciprocal_condition: float


def _attempt(matrix: Tensor, rhs: Tensor, ridge: float, eps: float) -> _Attempt:
    """X by Cholesky; None where the matrix is singular to `eps`, its own accuracy.

    The condition is estimated from the extreme diagonal entries of the factor.
    """
    system = (matrix + matrix.mT) / 2  # products of roots are symmetric up to rounding
    diagonal = system.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean()
    diagonal += ridge * mean
    diagonal[dead] = mean
    lower, info = torch.linalg.cholesky_ex(system)
    if int(info) != 0:
        return _Attempt(None, math.inf, 0.0)
    pivots = lower.diagonal().square()
    reciprocal = float(pivots.min() / pivots.max())
    if not reciprocal >= 4 * eps * math.sqrt(len(pivots)):
        return _Attempt(None, math.inf, reciprocal)
    x = torch.cholesky_solve(rhs.mT, lower).mT
    norm = float(rhs.norm())
    residual = float((x @ system - rhs).norm()) / norm if norm else 0.0
    return _Attempt(x.contiguous() if math.isfinite(residual) else None, residual, reciprocal)


def _zero(where: str) -> SolveError:
    return SolveError(
        f"{where}: the matrix is zero: nothing ever reached this layer; expected at least one input that is "
        "not zero. Collect on other data, or leave the layer out of the statistics."
    )


def total(factors: list[Factor]) -> Factor:
    """The sum; dense where forms differ, or where roots side by side would be wider than a square."""
    first = factors[0]
    alike = all(
        type(other) is type(first)
        and [p.shape[:-1] for p in other.parts()] == [p.shape[:-1] for p in first.parts()]
        for other in factors
    )
    if not alike or isinstance(first, Root):
        return Dense(sum((other.dense() for other in factors[1:]), factors[0].dense()))
    summed: Any = first
    for other in factors[1:]:
        summed = summed.plus(other)
    found: Factor = summed
    return found
