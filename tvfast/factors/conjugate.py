"""Σ_m c_m B_m X A_m + ρ X = R by conjugate gradients with a Kronecker-factored preconditioner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tvfast.errors import SolveError
from tvfast.factors.forms import Blocks, Dense, Diagonal, Factor
from tvfast.factors.solving import RIDGES, Solved, total


@dataclass(frozen=True, eq=False)
class KroneckerSum:
    """The operator X -> Σ_m c_m B_m X A_m + ρ X on matrices [o, i], or on a batch of them, [L, o, i].

    Attributes:
        a: A_m, of side i. In a batch all factors are dense, [L, i, i].
        b: B_m, of side o; None: the identity.
        coefficients: c_m >= 0.
        ridge: ρ; in a batch [L, 1, 1].
    """

    a: Sequence[Factor]
    b: Sequence[Factor | None]
    coefficients: Sequence[float]
    ridge: float | Tensor = 0.0

    def apply(self, x: Tensor) -> Tensor:
        """The operator at X."""
        return self.apply_each([x] * len(self.a)) + self.ridge * x

    def apply_each(self, xs: Sequence[Tensor]) -> Tensor:
        """Σ_m c_m B_m X_m A_m, without the ridge."""
        result = torch.zeros_like(xs[0])
        for x, a, b, c in zip(xs, self.a, self.b, self.coefficients, strict=True):
            product = a.right(x)
            result.add_(product if b is None else b.left(product), alpha=c)
        return result

    def to(self, dtype: torch.dtype) -> KroneckerSum:
        """In another dtype."""
        a = [factor.to(dtype=dtype) for factor in self.a]
        b = [None if factor is None else factor.to(dtype=dtype) for factor in self.b]
        ridge = self.ridge.to(dtype) if isinstance(self.ridge, Tensor) else self.ridge
        return KroneckerSum(a, b, self.coefficients, ridge)

    def mean_curvature(self, n_out: int) -> Tensor:
        """Mean eigenvalue of Σ_m c_m B_m (x) A_m: Σ_m c_m tr A_m tr B_m / (o i); [L] in a batch."""
        means = [
            c * a.diagonal().mean(-1) * (1.0 if b is None else b.diagonal().mean(-1))
            for a, b, c in zip(self.a, self.b, self.coefficients, strict=True)
        ]
        return torch.stack([torch.as_tensor(mean) for mean in means]).sum(0)


class Preconditioner:
    """(Σ c A ⊗ Σ c B / Σ c)⁻¹ by two Cholesky factors, each damped so that ρ and singular directions are
    covered.

    ρ is split between the two as in K-FAC: π δ and δ / π, δ = √(ρ / Σ c), π² the ratio of the mean
    eigenvalues.

    Raises:
        SolveError: a factor is indefinite beyond the largest ridge.
    """

    def __init__(self, system: KroneckerSum, where: str) -> None:
        mass = sum(system.coefficients)
        a = total([f.scaled(c / mass) for f, c in zip(system.a, system.coefficients, strict=True)])
        found = [f for f in system.b if f is not None]
        b = (
            total([f.scaled(c / mass) for f, c in zip(found, system.coefficients, strict=True)])
            if len(found) == len(system.b)
            else None
        )
        mean_a = a.diagonal().mean(-1)
        mean_b = torch.ones_like(mean_a) if b is None else b.diagonal().mean(-1)
        ridge = torch.as_tensor(system.ridge, dtype=mean_a.dtype, device=mean_a.device).flatten()
        ridge = ridge.reshape(mean_a.shape) if ridge.numel() == mean_a.numel() else ridge
        damping = (ridge / (mass * mean_a * mean_b)).sqrt().nan_to_num(0.0, 0.0, 0.0)  # relative to each mean
        self._mass = mass
        self._a = _Inverse(a, damping, f"{where}: A")
        self._b = None if b is None else _Inverse(b, damping, f"{where}: B")

    def __call__(self, residual: Tensor) -> Tensor:
        left = residual if self._b is None else self._b.left(residual)
        return self._a.right(left) / self._mass


class _Inverse:
    """S⁻¹ of a damped factor: applied from either side."""

    def __init__(self, factor: Factor, damping: Tensor, where: str) -> None:
        self._diagonal: Tensor | None = None
        self._lower: list[Tensor] = []
        if isinstance(factor, Diagonal):
            least = factor.values.mean() * max(float(damping), RIDGES[1])
            self._diagonal = factor.values + (least if bool(least > 0) else 1.0)
            return
        blocks = [factor.whole, factor.rest] if isinstance(factor, Blocks) else [factor.dense()]
        mean = factor.diagonal().mean(-1)
        for matrix in blocks:
            self._lower.append(_damped_cholesky(matrix, mean, damping, where))

    def right(self, x: Tensor) -> Tensor:
        return self.left(x.mT).mT

    def left(self, x: Tensor) -> Tensor:
        if self._diagonal is not None:
            quotient: Tensor = x / self._diagonal[:, None]
            return quotient
        if len(self._lower) == 1:
            return torch.cholesky_solve(x, self._lower[0])
        whole, rest = self._lower
        n_whole, b = whole.shape[:2]
        upper = torch.cholesky_solve(x[: n_whole * b].reshape(n_whole, b, x.shape[-1]), whole).flatten(0, 1)
        return torch.cat([upper, torch.cholesky_solve(x[n_whole * b :], rest)])


def _damped_cholesky(matrix: Tensor, mean: Tensor, damping: Tensor, where: str) -> Tensor:
    if not matrix.numel():
        return matrix
    # Directions without curvature are all rounding: 1e-4 keeps what float32 leaves there from being blown up.
    for ridge in RIDGES[3:] if matrix.dtype == torch.float32 else RIDGES[1:]:
        system = matrix.clone()
        scale = torch.where(mean > 0, mean, torch.ones_like(mean))
        added = scale * damping.clamp_min(ridge)
        system.diagonal(dim1=-2, dim2=-1).add_(added[..., None] if added.dim() else added)
        lower: Tensor
        lower, info = torch.linalg.cholesky_ex(system)
        if not bool(info.any()):
            return lower
    raise SolveError(
        f"{where}, of side {matrix.shape[-1]}, is indefinite even with a ridge of {RIDGES[-1]:g} of its mean "
        "diagonal; expected second moments, which are positive semidefinite. Collect it again."
    )


def conjugate_gradients(
    system: KroneckerSum,
    rhs: Tensor,
    where: str,
    *,
    iterations: int = 100,
    tolerance: float | None = None,
    exact: Callable[[KroneckerSum], Tensor] | None = None,
) -> Solved:
    """X with Σ_m c_m B_m X A_m + ρ X = R, from X = 0.

    Args:
        system: its factors have the dtype and device of R.
        rhs: R, [o, i] or [L, o, i], float32 or float64.
        where: the layer, for messages.
        iterations: at most.
        exact: R by the operator in float64, should that be needed; None: R is widened.
        tolerance: on |residual| / |R| of each matrix; None: 1e-5 in float32, 1e-10 in float64.

    Returns:
        Of a batch the largest residual. A note where iterations ended first, or where float32 lost its way,
        which
        the residual itself tells from what the iteration believes: then all is done again in float64.

    Raises:
        SolveError: the operator is indefinite, or something is not finite.

    Notes:
        Two products per model and iteration, and four triangular solves. One matrix of a batch is as if
        alone: a converged one does not move any more. In a singular system X stays in the range of the
        operator.
    """
    if tolerance is None:
        tolerance = 1e-10 if rhs.dtype == torch.float64 else 1e-5
    if not all(f.is_finite() for f in (*system.a, *system.b) if f is not None) or not _finite(rhs):
        raise SolveError(
            f"{where}: factors or weights hold NaN or infinity; expected finite ones. "
            "Collect the statistics again, in float32, and look at the data."
        )
    x, claimed, steps = _iterate(system, rhs, where, iterations, tolerance)
    worst = _residual(system, rhs, x)
    note = ""
    lost = (
        steps < iterations or not worst <= 3 * claimed
    )  # stopped in a null direction, or rounding took over
    if rhs.dtype == torch.float32 and not worst <= 10 * tolerance and lost:
        wide = system.to(torch.float64)
        target = rhs.double() if exact is None else exact(wide)
        x, _, steps = _iterate(wide, target, where, iterations, tolerance)
        worst, x, note = _residual(wide, target, x), x.to(rhs.dtype), "solved in float64"
    if not worst <= 1.0:
        raise SolveError(
            f"{where}: conjugate gradients diverged (residual {worst:.1e} of the right-hand side after "
            f"{steps} "
            "iterations); expected positive semidefinite factors. Collect the statistics again, or add a "
            "ridge."
        )
    if worst > 10 * tolerance:
        note += f"{', ' * bool(note)}residual {worst:.0e} after {steps} iterations"
    return Solved(x, worst, note)


def _iterate(
    system: KroneckerSum, rhs: Tensor, where: str, iterations: int, tolerance: float
) -> tuple[Tensor, float, int]:
    """X, the largest residual as the recurrence has it, and how many iterations that took."""
    precondition = Preconditioner(system, where)
    x, residual = torch.zeros_like(rhs), rhs.clone()
    target = tolerance * _norm(rhs)
    z = precondition(residual)
    direction = z.clone()
    rz = _dot(residual, z)
    steps = 0
    while steps < iterations and bool((_norm(residual) > target).any()):
        product = system.apply(direction)
        curvature = _dot(direction, product)
        active = (_norm(residual) > target) & (curvature > 0)
        if not bool(active.any()):
            break
        alpha = torch.where(active, rz / torch.where(active, curvature, 1.0), 0.0)
        x += alpha * direction
        residual -= alpha * product
        z = precondition(residual)
        renewed = _dot(residual, z)
        beta = torch.where(active, renewed / torch.where(active, rz, 1.0), 0.0)
        direction = z + beta * direction
        rz = renewed
        steps += 1
    norms = _norm(rhs)
    return x, float((_norm(residual) / torch.where(norms > 0, norms, 1.0)).max()), steps


def _residual(system: KroneckerSum, rhs: Tensor, x: Tensor) -> float:
    """The largest |R - operator(X)| / |R|."""
    norms = _norm(rhs)
    return float((_norm(rhs - system.apply(x)) / torch.where(norms > 0, norms, 1.0)).max())


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum((-2, -1), keepdim=True)


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return norm


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def stacked(factors: Sequence[Factor]) -> Dense:
    """Factors of several layers as a batch."""
    return Dense(torch.stack([factor.dense() for factor in factors]))
