"""Tensors of more than 2^31 elements: offsets, counts and positions are 64 bits wide from end to end."""

from __future__ import annotations

import pytest
import torch

import tvfast
from tvfast import ops

N = 2**31 + 4099


@pytest.mark.slow
def test_more_than_two_billion_elements() -> None:
    base = torch.zeros(N, dtype=torch.bfloat16)
    model = torch.zeros(N, dtype=torch.bfloat16)
    model[: 2**20] = 0.5
    model[-5:] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    model[2**31 - 1 : 2**31 + 1] = 6.0
    # The 2^20 + 7 non-zero entries, of which the seven largest lie at and past 2^31.
    assert ops.threshold(model, 7 / N + 1e-12).item() == 1.0
    tvfast.merge_(base, [model], method="ties", density=(7 + 2**19) / N + 1e-12, tie="index")
    assert base[-5:].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert base[2**31 - 1 : 2**31 + 2].tolist() == [6.0, 6.0, 0.0]
    assert base[: 2**19].eq(0.5).all()
    assert not base[2**19 : 2**20 + 64].any()
