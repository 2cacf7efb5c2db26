"""RegMean and MaTS of one layer: the minimum of Σ_m c_m (θ - θ_m)ᵀ C_m (θ - θ_m)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tvfast.errors import ArgumentError, ShapeError
from tvfast.factors.conjugate import KroneckerSum, conjugate_gradients, stacked
from tvfast.factors.forms import Blocks, Dense, Factor
from tvfast.factors.solving import Solved, solve, total

_ROUNDING = 4 * 2.0**-24
"""Of float32 sums of float32 products, relative."""


def regmean(
    weights: Sequence[Tensor],
    grams: Sequence[Factor],
    *,
    start: Tensor,
    coefficients: Sequence[float],
    shrink: float = 1.0,
    where: str = "layer",
) -> Solved:
    """W* = (Σ_m c_m W_m Ĝ_m) (Σ_m c_m Ĝ_m)⁻¹, Ĝ = shrink · G + (1 - shrink) · diag(G).

    Args:
        weights: W_m, [o, i], of one float dtype.
        grams: G_m = E[x xᵀ], of side i.
        start: [o, i]: what W* is where no input says anything: in directions without inputs, and what a
            ridge pulls towards.
        coefficients: c_m.
        shrink: in [0, 1]; off-diagonals are multiplied by it.
        where: the layer, for messages.

    Raises:
        SolveError: Σ c Ĝ is zero, not finite, or singular beyond repair.
        ShapeError: a factor does not have the side of the weights.

    Source: Jin et al. 2023, arXiv:2212.09849; the dead inputs as in MaTS.
    """
    _check(weights, [*grams], 1, where)
    dtype = _dtype(weights)
    base = start.to(dtype)
    hats = [gram.shrunk(shrink).scaled(c) for gram, c in zip(grams, coefficients, strict=True)]
    rhs = torch.zeros_like(base)
    for weight, hat in zip(weights, hats, strict=True):
        rhs += hat.to(dtype=dtype).right(weight.to(dtype) - base)
    solved = solve(total(hats), rhs, where)
    return Solved(solved.x.add_(base), solved.residual, solved.note)


def mats(
    weights: Sequence[Tensor],
    a: Sequence[Factor],
    b: Sequence[Factor | None],
    *,
    start: Tensor,
    coefficients: Sequence[float],
    shrink: float = 1.0,
    ridge: float = 0.0,
    iterations: int = 100,
    tolerance: float | None = None,
    preconditioned: bool = True,
    where: str = "layer",
) -> Solved:
    """W* with Σ_m c_m B_m (W* - W_m) A_m + ρ (W* - start) = 0, by conjugate gradients.

    Args:
        weights: W_m, [o, i].
        a, b: A_m of side i, B_m of side o; None: the identity.
        start: [o, i]: where the iterations start; the base, where there is a ridge.
        coefficients: c_m.
        shrink: of the off-diagonals of A_m and B_m.
        ridge: ρ, in mean eigenvalues of Σ_m c_m B_m (x) A_m.
        iterations, tolerance, preconditioned: see `conjugate_gradients`.
        where: the layer, for messages.

    Raises:
        SolveError: factors are not finite or indefinite.
        ShapeError: a factor does not have the side of the weights.

    Source: Tam, Bansal and Raffel 2023, arXiv:2312.04339. The preconditioner and the ridge are ours.
    """
    _check(weights, [*a], 1, where)
    _check(weights, [*b], 0, where)
    dtype = _dtype(weights)
    base = start.to(dtype)
    left = [None if f is None else _prepared(f, shrink, dtype) for f in b]
    right = [_prepared(f, shrink, dtype) for f in a]
    system = _system(right, left, base, coefficients, ridge)
    return _mats(system, weights, base, where, iterations, tolerance, preconditioned)


def mats_batch(
    layers: Sequence[Sequence[Tensor]],
    a: Sequence[Sequence[Factor]],
    b: Sequence[Sequence[Factor]],
    *,
    starts: Sequence[Tensor],
    coefficients: Sequence[float],
    shrink: float = 1.0,
    ridge: float = 0.0,
    iterations: int = 100,
    tolerance: float | None = None,
    preconditioned: bool = True,
    where: str = "layers",
) -> Solved:
    """`mats` of several layers of one shape at once; the result is [L, o, i].

    Args:
        layers, a, b: by layer, then by model.
        starts: by layer. The rest as in `mats`.
    """
    for weights, right, left in zip(layers, a, b, strict=True):
        _check(weights, [*right], 1, where)
        _check(weights, [*left], 0, where)
    dtype = _dtype([weight for weights in layers for weight in weights])
    models = [torch.stack([w.to(dtype) for w in by_model]) for by_model in zip(*layers, strict=True)]
    right_batch = [stacked([_prepared(f, shrink, dtype) for f in fs]) for fs in zip(*a, strict=True)]
    left_batch = [stacked([_prepared(f, shrink, dtype) for f in fs]) for fs in zip(*b, strict=True)]
    base = torch.stack([start.to(dtype) for start in starts])
    system = _system(right_batch, left_batch, base, coefficients, ridge)
    return _mats(system, models, base, where, iterations, tolerance, preconditioned)


def vector(
    weights: Sequence[Tensor],
    blocks: Sequence[Factor],
    *,
    start: Tensor,
    coefficients: Sequence[float],
    shrink: float = 1.0,
    ridge: float = 0.0,
    where: str = "vector",
) -> Solved:
    """x* with Σ_m c_m F_m (x* - x_m) + ρ (x* - start) = 0, for vectors with a full block.

    Args:
        weights: x_m, as rows [1, n].
        blocks: F_m, of side n.
        ridge: ρ, in means of the diagonal of Σ_m c_m F_m.
        start, coefficients, shrink, where: as in `regmean`.

    Raises:
        SolveError, ShapeError: as `regmean`.
    """
    _check(weights, [*blocks], 1, where)
    dtype = _dtype(weights)
    base = start.to(dtype)
    hats = [block.shrunk(shrink).scaled(c) for block, c in zip(blocks, coefficients, strict=True)]
    rhs = torch.zeros_like(base)
    for weight, hat in zip(weights, hats, strict=True):
        rhs += hat.to(dtype=dtype).right(weight.to(dtype) - base)
    matrix = total(hats)
    if ridge:
        diagonal = matrix.diagonal()
        matrix = Dense(matrix.dense() + torch.diag(torch.full_like(diagonal, ridge * float(diagonal.mean()))))
    solved = solve(matrix, rhs, where)
    return Solved(solved.x.add_(base), solved.residual, solved.note)


def _system(
    a: Sequence[Factor],
    b: Sequence[Factor | None],
    base: Tensor,
    coefficients: Sequence[float],
    ridge: float,
) -> KroneckerSum:
    """The operator, with ρ in units of its mean eigenvalue."""
    system = KroneckerSum(a, b, coefficients)
    if not ridge:
        return system
    rho = ridge * system.mean_curvature(base.shape[-2])
    return KroneckerSum(a, b, coefficients, rho.reshape(-1, 1, 1) if base.dim() == 3 else float(rho))


def _mats(
    system: KroneckerSum,
    weights: Sequence[Tensor],
    base: Tensor,
    where: str,
    iterations: int,
    tolerance: float | None,
    preconditioned: bool,
) -> Solved:
    deltas = [weight.to(base.dtype) - base for weight in weights]
    solved = conjugate_gradients(
        system,
        system.apply_each(deltas),
        where,
        iterations=iterations,
        tolerance=tolerance,
        preconditioned=preconditioned,
        exact=lambda wide: wide.apply_each([delta.double() for delta in deltas]),
    )
    return Solved(solved.x.add_(base), solved.residual, solved.note)


def _prepared(factor: Factor, shrink: float, dtype: torch.dtype) -> Factor:
    """A factor as the equations take it: shrunk, and positive semidefinite in spite of rounding.

    Float32 sums are off by a rounding error of each entry, so by at most its unit times their Frobenius norm
    in any direction: with few samples, directions without curvature come out negative, and the minimum would
    lie at infinity. That bound, with a margin for the products in the sums, is added to the diagonal.
    """
    found = factor.shrunk(shrink).to(dtype=dtype)
    if factor.dtype == torch.float64 or not isinstance(found, Dense | Blocks):
        return found
    squares = sum(float(part.double().square().sum()) for part in found.parts())
    return found.lifted(_ROUNDING * squares**0.5)


def _dtype(weights: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32


def _check(weights: Sequence[Tensor], factors: Sequence[Factor | None], axis: int, where: str) -> None:
    if len(factors) != len(weights):
        raise ArgumentError(
            f"{where}: {len(factors)} factors for {len(weights)} models; expected one per model."
        )
    for k, (weight, factor) in enumerate(zip(weights, factors, strict=True)):
        if factor is not None and factor.size != weight.shape[axis]:
            raise ShapeError(
                f"{where}: models[{k}] has a weight of shape {list(weight.shape)} and a factor of side "
                f"{factor.size}; expected {weight.shape[axis]}. These are the statistics of another model."
            )
