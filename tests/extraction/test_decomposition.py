"""Truncated decompositions against torch.linalg.svd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tvfast.extraction.decomposition import truncated_svd


def with_spectrum(m: int, n: int, s: Tensor) -> Tensor:
    """A matrix with given singular values and random directions."""
    k = s.numel()
    u = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q
    return (u * s.double()) @ v.T


def error(matrix: Tensor, u: Tensor, s: Tensor, vt: Tensor) -> float:
    return float(torch.linalg.norm(matrix - (u.double() * s.double()) @ vt.double()))


PLACE = torch.arange(300, dtype=torch.float64)
SPECTRA = {
    "noise": torch.ones(300, dtype=torch.float64) + 0.5 * torch.rand(300, dtype=torch.float64),
    "slow": 1 / (1 + PLACE) ** 0.25,
    "power": 1 / (1 + PLACE),
    "fast": 2.0 ** -(PLACE / 3),
    "step": torch.where(PLACE < 20, 1.0, 0.9),
    "low rank and noise": torch.where(PLACE < 16, 1.0, 1e-3),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("m", "n"), [(400, 240), (240, 300)])
def test_the_error_is_the_least_within_one_percent(name: str, m: int, n: int) -> None:
    matrix = with_spectrum(m, n, SPECTRA[name][:240])
    s = torch.linalg.svdvals(matrix)
    resolution = 2e-6 * float(s.square().sum().sqrt())  # of float32
    for rank in (1, 16, 32):
        found = truncated_svd(matrix.float(), rank, generator=torch.Generator().manual_seed(1))
        least = float(s[rank:].square().sum().sqrt())
        assert error(matrix, found.u, found.s, found.vt) <= 1.01 * least + resolution
        assert found.iterations > 0
        identity = torch.eye(rank)
        assert torch.allclose(found.u.T @ found.u, identity, atol=1e-5)
        assert torch.allclose(found.vt @ found.vt.T, identity, atol=1e-5)
        assert bool((found.s[:-1] >= found.s[1:]).all())


def test_the_random_choice_does_not_matter() -> None:
    """Five projections, all within the tolerance of the least error."""
    matrix = with_spectrum(300, 240, SPECTRA["slow"][:240])
    least = float(torch.linalg.svdvals(matrix)[32:].square().sum().sqrt())
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        found = truncated_svd(matrix.float(), 32, tolerance=2e-3, generator=generator)
        assert error(matrix, found.u, found.s, found.vt) <= 1.004 * least


def test_a_smaller_tolerance_costs_iterations_and_lowers_the_error() -> None:
    matrix = with_spectrum(300, 240, SPECTRA["slow"][:240]).float()
    found = [
        truncated_svd(matrix, 16, tolerance=tolerance, generator=torch.Generator().manual_seed(0))
        for tolerance in (0.5, 1e-5)
    ]
    errors = [error(matrix.double(), one.u, one.s, one.vt) for one in found]
    assert found[0].iterations < found[1].iterations
    assert errors[1] < errors[0]


@pytest.mark.parametrize(("m", "n", "rank"), [(40, 30, 8), (5, 300, 3), (30, 30, 60), (1, 7, 1)])
def test_small_matrices_are_decomposed_in_full(m: int, n: int, rank: int) -> None:
    matrix = torch.randn(m, n)
    found = truncated_svd(matrix, rank)
    s = torch.linalg.svdvals(matrix.double())[:rank]
    assert found.iterations == 0
    assert torch.allclose(found.s.double(), s, rtol=1e-5)
    assert found.u.shape == (m, len(s))
    assert found.vt.shape == (len(s), n)


def test_equal_arguments_give_equal_bits() -> None:
    matrix = torch.randn(300, 200)
    one, other = (truncated_svd(matrix, 8, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
