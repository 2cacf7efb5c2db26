"""Points in the span of K vectors, known by their dot products alone.

A point is K coefficients a; its product with another is aᵀ G b, G the Gram matrix of the vectors. Means that
others find by iterating over tensors are found here without reading a tensor again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Gram = Sequence[Sequence[float]]
"""[K][K] dot products."""

Point = list[float]
"""[K] coefficients."""


def product(gram: Gram, a: Sequence[float], b: Sequence[float]) -> float:
    """⟨a, b⟩."""
    return math.fsum(x * y * g for x, row in zip(a, gram, strict=True) for y, g in zip(b, row, strict=True))


def norm(gram: Gram, a: Sequence[float]) -> float:
    """‖a‖; a square that rounding has made negative counts as 0."""
    return math.sqrt(max(0.0, product(gram, a, a)))


def norms(gram: Gram) -> list[float]:
    """Of the K vectors."""
    return [math.sqrt(row[k]) for k, row in enumerate(gram)]


def is_finite(gram: Gram) -> bool:
    """Whether every dot product is."""
    return all(math.isfinite(value) for row in gram for value in row)


def units(gram: Gram, lengths: Sequence[float]) -> list[list[float]]:
    """The Gram matrix of the vectors divided by `lengths`; those of length 0 are left as they are."""
    by = [1.0 if length == 0.0 else length for length in lengths]
    return [[g / by[j] / by[k] for k, g in enumerate(row)] for j, row in enumerate(gram)]


def combined(*terms: tuple[float, Sequence[float]]) -> Point:
    """Σ c · a over the (c, a)."""
    return [
        math.fsum(c * x for (c, _), x in zip(terms, column, strict=True))
        for column in zip(*(a for _, a in terms), strict=True)
    ]


def unit_vector(k: int, n: int) -> Point:
    """The k-th of n vectors itself."""
    return [float(j == k) for j in range(n)]


def karcher_mean(gram: Gram, shares: Sequence[float], max_iter: int, tol: float) -> Point:
    """The mean of the vectors' directions on the sphere, as a combination of the vectors; of length 1.

    Iterates μ <- exp_μ(Σ share_k log_μ(u_k)) from the normalised mean of the unit vectors, until the step is
    shorter than `tol`, at most `max_iter` times. Vectors no longer than `tol` have no direction and take no
    part. A vector opposite to μ has no logarithm and takes no part in that step.

    Returns:
        K coefficients; all 0 where no vector has a direction.
    """
    n = len(gram)
    lengths = norms(gram)
    valid = [k for k in range(n) if lengths[k] > tol]
    if not valid:
        return [0.0] * n
    sphere = units(gram, lengths)
    total = math.fsum(shares[k] for k in valid)
    share = [shares[k] / total if k in valid else 0.0 for k in range(n)]
    length = norm(sphere, share)
    mean = unit_vector(valid[0], n) if length < tol else [s / length for s in share]
    for _ in range(max_iter):
        step = _mean_logarithm(sphere, mean, share, tol)
        distance = norm(sphere, step)
        if distance < tol:
            break
        mean = combined((math.cos(distance), mean), (math.sin(distance) / distance, step))
        length = norm(sphere, mean)
        if length > tol:
            mean = [a / length for a in mean]
    return [a / lengths[k] if k in valid else 0.0 for k, a in enumerate(mean)]


def _mean_logarithm(sphere: Gram, mean: Point, share: Sequence[float], tol: float) -> Point:
    """Σ share_k log_μ(u_k), a tangent at μ."""
    n = len(mean)
    step = [0.0] * n
    for k, weight in enumerate(share):
        if weight == 0.0:
            continue
        unit = unit_vector(k, n)
        cosine = max(-1.0, min(1.0, product(sphere, mean, unit)))
        angle = math.acos(cosine)
        if angle < tol or math.pi - angle < tol:
            continue
        pull = weight * angle / math.sin(angle)
        step = combined((1.0, step), (pull, unit), (-pull * cosine, mean))
    return step


def geometric_median(gram: Gram, weights: Sequence[float], eps: float, max_iter: int, ftol: float) -> Point:
    """The point of least Σ weight_k ‖x - x_k‖, by Weiszfeld's iteration from the weighted mean.

    Args:
        eps: distances count as at least this.
        ftol: the iteration ends when the sum falls by no more than this share of it.

    Returns:
        K coefficients of sum 1.
    """
    total = math.fsum(weights)
    point = [weight / total for weight in weights]
    distances = _distances(gram, point)
    objective = math.fsum(w * d for w, d in zip(weights, distances, strict=True)) / total
    for _ in range(max_iter):
        pulls = [w / max(eps, d) for w, d in zip(weights, distances, strict=True)]
        together = math.fsum(pulls)
        point = [pull / together for pull in pulls]
        distances = _distances(gram, point)
        before = objective
        objective = math.fsum(w * d for w, d in zip(weights, distances, strict=True)) / total
        if abs(before - objective) <= ftol * objective:
            break
    return point


def _distances(gram: Gram, point: Point) -> list[float]:
    n = len(point)
    return [norm(gram, combined((1.0, point), (-1.0, unit_vector(k, n)))) for k in range(n)]
