"""`add_weighted_adapter` with `svd`: the leading part of a product of factors."""

from __future__ import annotations

import pytest
import torch

from tests.integrations.cases import tensors
from tvfast.integrations._peft_svd import low_rank_svd


@pytest.mark.parametrize(
    ("rows", "columns", "total", "rank"), [(40, 64, 12, 4), (64, 9, 9, 9), (7, 30, 20, 5)]
)
def test_the_leading_part_is_that_of_the_dense_product(
    rows: int, columns: int, total: int, rank: int
) -> None:
    (left,), (right,) = tensors(1, (rows, total), 1), tensors(2, (total, columns), 1)
    lora_a, lora_b = low_rank_svd(left, right, rank)
    assert (lora_a.shape, lora_b.shape) == ((rank, columns), (rows, rank))
    assert lora_a.dtype == lora_b.dtype == torch.float32
    u, s, vh = torch.linalg.svd(left.double() @ right.double(), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    assert torch.allclose(lora_b.double() @ lora_a.double(), best, rtol=0, atol=1e-6 * float(s[0]))
    assert torch.allclose(lora_a @ lora_a.T, torch.eye(rank), atol=1e-6)
    assert torch.allclose(lora_b.norm(dim=0).double(), s[:rank], rtol=1e-6)
