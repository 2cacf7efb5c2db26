"""Merges of matrices by singular vectors: known results, and their formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import tvfast
from tests.methods.inputs import exact_bits, normal
from tvfast.errors import ArgumentError
from tvfast.methods import METHODS

SPECTRAL = ("tsv_m", "iso_c", "iso_cts", "knots", "wudi")
SHAPES = [(12, 20), (20, 12), (16, 16)]


def family(shape: tuple[int, int], n: int = 3) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A base, models, and their task vectors in float64."""
    base = normal(*shape)
    models = [base + 0.1 * normal(*shape, seed=10 + k) for k in range(n)]
    return base, models, [(m - base).double() for m in models]


def merged(method: str, base: Tensor, models: list[Tensor], **parameters: object) -> Tensor:
    """The change of the base, in float64."""
    return (tvfast.merge(base, models, method=method, **parameters) - base).double()


def polar(x: Tensor) -> Tensor:
    """X (Xᵀ X)^(-1/2) by eigenvalues, for tall X; the transpose for wide ones."""
    if x.shape[0] < x.shape[1]:
        return polar(x.T).T
    values, vectors = torch.linalg.eigh(x.T @ x)
    return x @ vectors @ torch.diag(values.rsqrt()) @ vectors.T


def triplets(delta: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :n], s[:n], vh[:n]


def stacked(found: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.cat([u for u, _, _ in found], dim=1),
        torch.cat([s for _, s, _ in found]),
        torch.cat([vh for _, _, vh in found]),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_tsv_m(shape: tuple[int, int]) -> None:
    base, models, deltas = family(shape)
    u, s, vh = stacked([triplets(delta, min(shape) // 3) for delta in deltas])
    expected = polar(u) @ torch.diag(s) @ polar(vh)
    assert torch.allclose(merged("tsv_m", base, models), expected, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_c_has_one_singular_value(shape: tuple[int, int]) -> None:
    base, models, deltas = family(shape)
    total = sum(deltas, torch.zeros_like(deltas[0]))
    found = merged("iso_c", base, models)
    level = torch.linalg.svdvals(total).mean()
    assert torch.allclose(torch.linalg.svdvals(found), level.expand(min(shape)), atol=5e-6)
    assert torch.allclose(found, level * polar(total), atol=5e-6)
    mean = merged("iso_c", base, models, dialect="mean", scale=3.0)
    assert torch.allclose(mean, found, atol=5e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.8, 1.0])
def test_iso_cts(shape: tuple[int, int], fraction: float) -> None:
    base, models, deltas = family(shape)
    size = min(shape)
    n_own = min(round((size - int(size * fraction)) / 3), size // 3)
    common = triplets(sum(deltas, torch.zeros_like(deltas[0])), size - 3 * n_own)
    outside = [delta - common[0] @ common[0].T @ delta for delta in deltas]
    u, s, vh = stacked([*(triplets(delta, n_own) for delta in outside), common])
    expected = s.mean() * polar(u) @ polar(vh)
    found = merged("iso_cts", base, models, common_space_fraction=fraction)
    assert torch.allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_knots(shape: tuple[int, int], density: float) -> None:
    base, models, deltas = family(shape)
    u, s, vh = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    parts = (torch.diag(s) @ vh).split(shape[1], dim=1)
    trimmed = []
    for part in parts:
        kept = torch.zeros_like(part).reshape(-1)
        index = part.reshape(-1).abs().topk(int(density * part.numel())).indices
        kept[index] = part.reshape(-1)[index]
        trimmed.append(kept.view_as(part))
    sign = sum(trimmed, torch.zeros_like(parts[0])).sign()
    agree = [(part.sign() == sign) & (part != 0) for part in trimmed]
    total = sum((part * a for part, a in zip(trimmed, agree, strict=True)), torch.zeros_like(parts[0]))
    count = sum((a.double() for a in agree), torch.zeros_like(parts[0]))
    expected = u @ (total / count.clamp(min=1))
    assert torch.allclose(merged("knots", base, models, density=density), expected, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_wudi_is_where_the_gradient_vanishes(shape: tuple[int, int]) -> None:
    base, models, deltas = family(shape)
    found = merged("wudi", base, models)
    gradient = sum(
        ((found - delta) @ delta.T @ delta / delta.square().sum() for delta in deltas),
        torch.zeros_like(base, dtype=torch.float64),
    )
    assert float(gradient.abs().max()) < 2e-6


@pytest.mark.parametrize("method", ["tsv_m", "wudi", "knots"])
def test_one_task_is_itself(method: str) -> None:
    base, models, deltas = family((12, 20), 1)
    parameters = {"density": 1.0} if method == "knots" else {}
    assert torch.allclose(merged(method, base, models, **parameters), deltas[0], atol=2e-6)


def test_wudi_of_tasks_that_share_no_inputs_is_their_sum() -> None:
    base = torch.zeros(6, 8)
    models = [torch.zeros(6, 8), torch.zeros(6, 8)]
    models[0][:, :4], models[1][:, 4:] = normal(6, 4), normal(6, 4, seed=1)
    assert torch.allclose(merged("wudi", base, models), (models[0] + models[1]).double(), atol=2e-6)


@pytest.mark.parametrize("method", SPECTRAL)
@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4), (0, 5)], ids=str)
def test_what_is_no_matrix_is_averaged(method: str, shape: tuple[int, ...]) -> None:
    base = normal(*shape)
    models = [base + normal(*shape, seed=k + 1) for k in range(3)]
    report: list[str] = []
    out = tvfast.merge(base, models, method=method, scale=0.5, report=report)
    expected = tvfast.merge(base, models, method="task_arithmetic", scale=0.5, normalize=True)
    assert exact_bits(out, expected)
    assert report == [f"{method}: averaged, no matrices: 1 tensor (tensor)"]


@pytest.mark.parametrize("method", SPECTRAL)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (3, 2)], ids=str)
def test_small_matrices_give_finite_values(method: str, shape: tuple[int, int]) -> None:
    base, models, _ = family(shape)
    assert bool(torch.isfinite(tvfast.merge(base, models, method=method)).all())
    assert bool(torch.isfinite(tvfast.merge(base, [base] * 3, method=method)).all())


@pytest.mark.parametrize("method", SPECTRAL)
def test_nan_makes_the_matrix_nan(method: str) -> None:
    base, models, _ = family((4, 5))
    models[1][2, 3] = math.nan
    report: list[str] = []
    out = tvfast.merge(base, models, method=method, report=report)
    assert bool(torch.isnan(out).all())
    assert report == [f"{method}: tensor holds NaN or infinity"]


@pytest.mark.parametrize("method", SPECTRAL)
def test_types_mix_and_float64_stays(method: str) -> None:
    base, models, _ = family((6, 9))
    out = tvfast.merge(base.bfloat16(), [m.bfloat16() for m in models], method=method)
    assert out.dtype is torch.bfloat16
    assert tvfast.merge(base.double(), models, method=method).dtype is torch.float64


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("tsv_m", {"weights": 1.0}, "does not take 'weights'"),
        ("iso_cts", {"common_space_fraction": 1.5}, "common_space_fraction is 1.5"),
        ("knots", {"density": [0.1, 0.2]}, "density is a sequence"),
        ("wudi", {"ridge": 0.0}, "ridge is 0.0; expected a number above 0"),
    ],
)
def test_bad_numbers(method: str, parameters: dict[str, object], message: str) -> None:
    base, models, _ = family((4, 5))
    with pytest.raises(ArgumentError, match=message):
        tvfast.merge(base, models, method=method, **parameters)


def test_every_spectral_method_is_tested() -> None:
    from tvfast.methods.whole.spectral import _Spectral

    assert {name for name, info in METHODS.items() if issubclass(info.cls, _Spectral)} == set(SPECTRAL)
