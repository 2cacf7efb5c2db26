"""Σ_m c_m B_m X A_m + ρ X = R by conjugate gradients with a Kronecker-factored preconditioner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tvfast.errors import SolveError
from tvfast.factors.forms import Blocks, Dense, Diagonal, Factor
from tvfast.factors.solving import RIDGES, Solved, check_finite


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
    """(V_B (x) V_A) D⁻¹ (V_B (x) V_A)ᵀ, D the diagonal of the operator in the basis V_B (x) V_A.

    V_A makes the mean of the A_m the identity, and the combination of them that differs most from the mean
    diagonal; V_B does the same for the B_m. Of two models that is all there is: the preconditioner is the
    inverse itself, but for damping. Of more it leaves what is not diagonal in their common basis.

    Args:
        system: its factors have the dtype and device of R.
        like: a matrix or batch of R's shape.
        where: the layer, for messages.

    Raises:
        SolveError: a mean factor is indefinite beyond the largest ridge.
    """

    def __init__(self, system: KroneckerSum, like: Tensor, where: str) -> None:
        ridge = torch.as_tensor(system.ridge, dtype=like.dtype, device=like.device)
        n_out, n_in = like.shape[-2:]
        scale = system.mean_curvature(n_out).to(like.dtype)
        flat = ridge.reshape(-1) if scale.dim() else ridge.reshape(())
        damping = (flat / scale).sqrt().nan_to_num(0.0, 0.0, 0.0)
        a = _basis(system.a, system.coefficients, damping, like, n_in, f"{where}: A")
        b = _basis(system.b, system.coefficients, damping, like, n_out, f"{where}: B")
        diagonal = ridge * b.squares[..., :, None] * a.squares[..., None, :]
        for mine, theirs, c in zip(b.diagonals, a.diagonals, system.coefficients, strict=True):
            diagonal = diagonal + c * mine[..., :, None] * theirs[..., None, :]
        self._a, self._b = a.vectors, b.vectors
        self._inverse = torch.where(diagonal > 0, diagonal, 1.0).reciprocal_()

    def __call__(self, residual: Tensor) -> Tensor:
        """D⁻¹ in the basis; in the preconditioner's own dtype, whatever that of the residual."""
        size = torch.linalg.vector_norm(residual, dim=(-2, -1), keepdim=True)
        unit = residual / torch.where(size > 0, size, 1.0)  # float32 holds it, however small it is
        x = unit.to(self._inverse.dtype)
        x = x if self._b is None else _transposed(self._b).left(x)
        x = (x if self._a is None else self._a.right(x)) * self._inverse
        x = x if self._b is None else self._b.left(x)
        x = x if self._a is None else _transposed(self._a).right(x)
        found: Tensor = x.to(residual.dtype) * size
        return found


@dataclass(frozen=True, eq=False)
class _Basis:
    """V, and what the factors S_m are in it.

    Attributes:
        vectors: V, as a factor that multiplies from either side; None: the unit vectors.
        diagonals: of Vᵀ S_m V, at least of the size of the damping; by model.
        squares: of Vᵀ V.
    """

    vectors: Dense | Blocks | None
    diagonals: Sequence[Tensor]
    squares: Tensor


def _basis(
    factors: Sequence[Factor | None],
    coefficients: Sequence[float],
    damping: Tensor,
    like: Tensor,
    size: int,
    where: str,
) -> _Basis:
    """The common basis of factors of one side; None is the identity."""
    ones = torch.ones(size, dtype=like.dtype, device=like.device)
    found = [Diagonal(ones) if factor is None else factor for factor in factors]
    diagonals = [factor.values for factor in found if isinstance(factor, Diagonal)]
    if len(diagonals) == len(found):
        mean = sum((c * d for c, d in zip(coefficients, diagonals, strict=True)), 0 * ones) / sum(
            coefficients
        )
        least = mean.mean() * damping.amax().clamp_min(RIDGES[1])
        return _Basis(None, [d + least for d in diagonals], ones)
    blocks = [factor for factor in found if isinstance(factor, Blocks)]
    if len(blocks) == len(found) and len({factor.block for factor in blocks}) == 1:
        parts = [[factor.whole for factor in blocks], [factor.rest for factor in blocks]]
    else:
        parts = [[factor.dense() for factor in found]]
    shares = [c / sum(coefficients) for c in coefficients]
    mean = sum(
        (c * f.diagonal().mean(-1) for c, f in zip(shares, found, strict=True)), torch.zeros_like(damping)
    )
    joint = [_joint_basis(part, shares, mean, damping, where) for part in parts]
    if len(joint) == 1:
        return _Basis(Dense(joint[0].matrix), joint[0].diagonals, joint[0].squares)
    whole, rest = joint
    return _Basis(
        Blocks(whole.matrix, rest.matrix),
        [
            torch.cat([one.flatten(), other])
            for one, other in zip(whole.diagonals, rest.diagonals, strict=True)
        ],
        torch.cat([whole.squares.flatten(), rest.squares]),
    )


@dataclass(frozen=True, eq=False)
class _Joint:
    """As `_Basis`, of one batch of matrices."""

    matrix: Tensor
    diagonals: Sequence[Tensor]
    squares: Tensor


def _joint_basis(
    matrices: Sequence[Tensor], shares: Sequence[float], mean: Tensor, damping: Tensor, where: str
) -> _Joint:
    """V of S_m, [..., n, n] each, damped in units of `mean`."""
    if not matrices[0].numel():
        empty = matrices[0].new_zeros(matrices[0].shape[:-1])
        return _Joint(matrices[0], [empty for _ in matrices], empty)
    average = sum((c * one for c, one in zip(shares[1:], matrices[1:], strict=True)), shares[0] * matrices[0])
    lower, added = _damped_cholesky(average, mean, damping, where)
    rotation = _most_different(matrices, shares, lower)
    matrix = torch.linalg.solve_triangular(lower.mT, rotation, upper=True)
    squares = matrix.square().sum(-2)
    least = squares * (added[..., None] if added.dim() else added)
    diagonals = [(matrix * (one @ matrix)).sum(-2).clamp_min_(0.0) + least for one in matrices]
    return _Joint(matrix, diagonals, squares)


def _most_different(matrices: Sequence[Tensor], shares: Sequence[float], lower: Tensor) -> Tensor:
    """Eigenvectors of the first principal component of the share_m (L⁻¹ S_m L⁻ᵀ - I)."""
    white = []
    for one in matrices:
        half = torch.linalg.solve_triangular(lower, one, upper=False)
        white.append(torch.linalg.solve_triangular(lower, half.mT, upper=False))
    for one, share in zip(white, shares, strict=True):
        one.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        one.mul_(share)
    products = torch.stack([torch.stack([(x * y).sum((-2, -1)) for y in white], -1) for x in white], -1)
    weights = torch.linalg.eigh(products.double()).eigenvectors[..., -1].to(lower.dtype)
    combined = torch.zeros_like(lower)
    for k, one in enumerate(white):
        combined += weights[..., k, None, None] * one
    white.clear()
    vectors: Tensor = torch.linalg.eigh((combined + combined.mT) / 2).eigenvectors
    return vectors


def _damped_cholesky(matrix: Tensor, mean: Tensor, damping: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """L of a damped matrix, and what was added to its diagonal.

    Raises:
        SolveError: it is indefinite even with the largest ridge.
    """
    # Directions without curvature are all rounding: 1e-4 keeps what float32 leaves there from being blown up.
    for ridge in RIDGES[3:] if matrix.dtype == torch.float32 else RIDGES[1:]:
        system = matrix.clone()
        scale = torch.where(mean > 0, mean, torch.ones_like(mean))
        added = scale * damping.clamp_min(ridge)
        system.diagonal(dim1=-2, dim2=-1).add_(added[..., None] if added.dim() else added)
        lower: Tensor
        lower, info = torch.linalg.cholesky_ex(system)
        if not bool(info.any()):
            return lower, added
    raise SolveError(
        f"{where}, of side {matrix.shape[-1]}, is indefinite even with a ridge of {RIDGES[-1]:g} of its mean "
        "diagonal; expected second moments, which are positive semidefinite. Collect it again."
    )


def _transposed(factor: Dense | Blocks) -> Dense | Blocks:
    if isinstance(factor, Dense):
        return Dense(factor.matrix.mT)
    return Blocks(factor.whole.mT, factor.rest.mT)


def conjugate_gradients(
    system: KroneckerSum,
    rhs: Tensor,
    where: str,
    *,
    iterations: int = 100,
    tolerance: float | None = None,
    preconditioned: bool = True,
    exact: Callable[[KroneckerSum], Tensor] | None = None,
) -> Solved:
    """X with Σ_m c_m B_m X A_m + ρ X = R, from X = 0.

    Args:
        system: its factors have the dtype and device of R.
        rhs: R, [o, i] or [L, o, i], float32 or float64.
        where: the layer, for messages.
        iterations: at most.
        preconditioned: False: plain conjugate gradients. In as many iterations they change directions of
            large curvature only, and leave X near 0 in the others.
        exact: R by the operator in float64, should that be needed; None: R is widened.
        tolerance: on |residual| / |R| of each matrix; None: 1e-5 in float32, 1e-10 in float64.

    Returns:
        Of a batch the largest residual. A note where preconditioned iterations ended first, or where float32
        lost its way, which the residual itself tells from what the iteration believes: then all but the
        preconditioner is done again in float64.

    Raises:
        SolveError: the operator is indefinite, or something is not finite.

    Notes:
        Two products per model and iteration and four of the preconditioner, which costs about 25 products to
        make. Two models take two or three iterations, more models tens. One matrix of a batch is as if alone:
        a converged one does not move any more. In a singular system X stays in the range of the operator.
    """
    if tolerance is None:
        tolerance = 1e-10 if rhs.dtype == torch.float64 else 1e-5
    check_finite(where, all(f.is_finite() for f in (*system.a, *system.b) if f is not None), _finite(rhs))
    precondition = Preconditioner(system, rhs, where) if preconditioned else torch.clone
    x, claimed, steps = _iterate(system, precondition, rhs, iterations, tolerance)
    worst = _residual(system, rhs, x)
    note = ""
    lost = (
        steps < iterations or not worst <= 3 * claimed
    )  # stopped in a null direction, or rounding took over
    if rhs.dtype == torch.float32 and not worst <= 10 * tolerance and lost:
        wide = system.to(torch.float64)
        target = rhs.double() if exact is None else exact(wide)
        x, _, steps = _iterate(wide, precondition, target, iterations, tolerance)
        worst, x, note = _residual(wide, target, x), x.to(rhs.dtype), "solved in float64"
    if not worst <= 1.0:
        raise SolveError(
            f"{where}: conjugate gradients diverged (residual {worst:.1e} of the right-hand side after "
            f"{steps} iterations); expected positive semidefinite factors. Collect the statistics again, or "
            "add a ridge."
        )
    if worst > 10 * tolerance and preconditioned:  # plain ones are meant to end first
        note += f"{', ' * bool(note)}residual {worst:.0e} after {steps} iterations"
    return Solved(x, worst, note)


def _iterate(
    system: KroneckerSum,
    precondition: Callable[[Tensor], Tensor],
    rhs: Tensor,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, float, int]:
    """X, the largest residual as the recurrence has it, and how many iterations that took."""
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
