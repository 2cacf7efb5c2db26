"""The figures of the penalty's benchmark come from rows that compute the same gradient."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from bench import penalty


def test_rows_agree_and_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    base, model = nn.Linear(24, 32, bias=False), nn.Linear(24, 32, bias=False)
    a, b = penalty.second_moment(24, 1), penalty.second_moment(32, 2)
    penalty.penalty_row(base, model, a, b)()
    weight = model.weight.detach().clone().requires_grad_()
    x = weight - base.weight.detach()
    (0.1 * torch.trace(b @ x @ a @ x.T)).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(model.weight.grad, weight.grad, rtol=1e-4, atol=1e-8)
    assert penalty.main(["--side", "16", "--rounds", "1"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert found["shape"] == [16, 16]
    assert set(found["seconds"]) == {"penalty", "two sgemms", "autograd"}
