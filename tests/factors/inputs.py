"""Random factors, and the explicit matrices that they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from tvfast.factors import Blocks, Dense, Diagonal, Factor, Root

FORMS = ("dense", "block", "diagonal", "root")


def moment(n: int, seed: int, *, rank: int | None = None) -> Tensor:
    """A second moment of `rank` vectors (2 n by default), float64 [n, n]."""
    rows = rank or 2 * n
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / rows


def factor(form: str, n: int, seed: int, block: int = 3) -> Factor:
    """A factor of a form, float64."""
    matrix = moment(n, seed)
    if form == "dense":
        return Dense(matrix)
    if form == "diagonal":
        return Diagonal(matrix.diagonal().clone())
    if form == "root":
        return Root(torch.linalg.cholesky(matrix))
    n_whole = n // block
    whole = [matrix[k * block : (k + 1) * block, k * block : (k + 1) * block] for k in range(n_whole)]
    rest = matrix[n_whole * block :, n_whole * block :].clone()
    return Blocks(torch.stack(whole) if whole else matrix.new_zeros(0, block, block), rest)


def explicit(form: str, n: int, seed: int, block: int = 3) -> Tensor:
    """The matrix of `factor`, element by element."""
    matrix = moment(n, seed)
    if form == "diagonal":
        return torch.diag(matrix.diagonal())
    if form == "block":
        same = torch.arange(n)[:, None] // block == torch.arange(n)[None] // block
        return matrix * same
    return matrix
