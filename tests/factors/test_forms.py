"""Every form of a factor is the matrix that it stands for."""

from __future__ import annotations

import pytest
import torch

from tests.factors.inputs import FORMS, explicit, factor
from tvfast.errors import ArgumentError, ShapeError
from tvfast.factors import Blocks, Dense, Root, add_kron, kron_value, pack, unpack

SIZES = (1, 2, 3, 7, 9)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", SIZES)
def test_products_and_parts(form: str, n: int) -> None:
    found, matrix = factor(form, n, 1), explicit(form, n, 1)
    x = torch.randn(4, n, dtype=torch.float64)
    assert found.size == n
    close(found.dense(), matrix)
    close(found.diagonal(), matrix.diagonal())
    close(found.right(x), x @ matrix)
    close(found.left(x.T), matrix @ x.T)
    close(found.scaled(0.3).dense(), 0.3 * matrix)
    close(found.plus(factor(form, n, 2)).dense(), matrix + explicit(form, n, 2))
    for share in (0.0, 0.25, 1.0):
        diagonal = torch.diag(matrix.diagonal())
        close(found.shrunk(share).dense(), share * matrix + (1 - share) * diagonal)
    for k in range(1, n + 1):
        close(found.leading(k).dense(), matrix[:k, :k])
    if form != "root":
        close(found.plus(factor(form, n, 2)).minus(found).dense(), explicit(form, n, 2))
    assert found.n_bytes == sum(part.numel() for part in found.parts()) * 8


@pytest.mark.parametrize("a", FORMS)
@pytest.mark.parametrize("b", FORMS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (9, 4), (2, 3)])
def test_kron_is_the_explicit_kronecker_product(a: str, b: str, shape: tuple[int, int]) -> None:
    o, i = shape
    x = torch.randn(o, i, dtype=torch.float64)
    whole = torch.kron(explicit(b, o, 3), explicit(a, i, 4))
    product, value = kron_value(x, factor(a, i, 4), factor(b, o, 3))
    close(product.reshape(-1), whole @ x.reshape(-1))
    close(value, x.reshape(-1) @ whole @ x.reshape(-1))
    out = torch.ones(o, i, dtype=torch.float64)
    close(add_kron(x, factor(a, i, 4), factor(b, o, 3), out, 0.3), value)
    close(out, 1.0 + 0.3 * product)


def test_blocks_of_two_sizes_and_other_dtypes() -> None:
    x = torch.randn(6, 8, dtype=torch.float64)
    a, b = factor("block", 8, 1, block=4), factor("block", 6, 2, block=5)
    product, _ = kron_value(x, a, b)
    close(product, explicit("block", 6, 2, block=5) @ x @ explicit("block", 8, 1, block=4))
    half, value = kron_value(x.bfloat16(), a.to(dtype=torch.bfloat16), b.to(dtype=torch.bfloat16))
    assert (half.dtype, value.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(half.double(), product, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_packing_is_exact(n: int) -> None:
    matrix = torch.randn(3, n, n)
    matrix = matrix + matrix.mT
    packed = pack(matrix)
    assert packed.shape == (3, n * (n + 1) // 2)
    assert torch.equal(unpack(packed, n), matrix)
    with pytest.raises(ShapeError, match="expected"):
        unpack(packed, n + 1)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="Diagonal factor of side 3"):
        factor("dense", 3, 1).plus(factor("diagonal", 3, 1))  # type: ignore[type-var]
    with pytest.raises(ShapeError, match="of side 4"):
        Dense(torch.eye(3)).plus(Dense(torch.eye(4)))
    with pytest.raises(ShapeError, match="blocks of 2"):
        factor("block", 12, 1, block=3).plus(factor("block", 12, 1, block=2))
    with pytest.raises(ArgumentError, match="cannot be subtracted"):
        Root(torch.eye(2)).minus(Root(torch.eye(2)))
    assert isinstance(factor("block", 7, 1), Blocks)
    assert not Dense(torch.tensor([[float("nan")]])).is_finite()
