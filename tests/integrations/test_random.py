"""Draws of our own generator where the peers draw: shares, independence, repetition."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.integrations.ours import PerInput, group
from tvfast.integrations import _mergekit_0_1_5 as mergekit
from tvfast.integrations import mergekit as mergekit_module
from tvfast.integrations import peft, sd_mecha
from tvfast.integrations._fusion_bench_models import drop
from tvfast.integrations._magnitudes import _draw_on_device, draw_by_magnitude
from tvfast.methods.scalars import draw_limit
from tvfast.program import ALWAYS, ModelScalars

N = 200_000


def within(found: float, expected: float, n: int = N) -> bool:
    """Five standard deviations of a share of n draws."""
    return abs(found - expected) < 5 * math.sqrt(expected * (1 - expected) / n)


def ones(count: int) -> list[Tensor]:
    return [torch.full((N,), float(2**k)) for k in range(count)]


def kept(total: Tensor, count: int) -> Tensor:
    """Which models an entry of Σ_k 2^k m_k has kept, from its binary digits."""
    digits = total.round().to(torch.int64)
    return torch.stack([(digits >> k) & 1 for k in range(count)]).to(torch.float64)


def of_peft(density: float) -> Tensor:
    return peft.dare_linear(ones(3), torch.ones(3), density) * density


def of_mergekit(density: float) -> Tensor:
    parameters = {"weight": PerInput([1.0] * 3), "density": PerInput([density] * 3)}
    method = SimpleNamespace(sparsification_method="random", consensus_method=None)
    shared = {"normalize": False, "rescale": False, "lambda": 1.0}
    merge = mergekit._merge_group(mergekit_module.INTEGRATION)
    found: Tensor = merge(method, group(torch.zeros(N), ones(3)), **parameters, **shared)
    return found


@pytest.mark.parametrize("draw", [of_peft, of_mergekit])
@pytest.mark.parametrize("density", [0.1, 0.53, 0.9])
def test_dare_keeps_the_share_of_each_model_independently(
    draw: Callable[[float], Tensor], density: float
) -> None:
    torch.manual_seed(5)
    masks = kept(draw(density), 3)
    assert all(within(float(mask.mean()), density) for mask in masks)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert within(float((masks[a] * masks[b]).mean()), density**2)
    assert within(float((masks[0, 1:] * masks[0, :-1]).mean()), density**2)


@pytest.mark.parametrize("draw", [of_peft, of_mergekit])
def test_torchs_seed_decides(draw: Callable[[float], Tensor]) -> None:
    torch.manual_seed(5)
    first, second = draw(0.5), draw(0.5)
    torch.manual_seed(5)
    assert torch.equal(draw(0.5), first)
    assert not torch.equal(first, second)


def test_fusion_benchs_drop_rescales() -> None:
    torch.manual_seed(5)
    parameter = torch.nn.Parameter(torch.ones(N))
    before = parameter.data
    drop(SimpleNamespace(rng="tvfast"))(parameter, 0.7, True)  # type: ignore[arg-type]
    assert within(float((parameter.data != 0).double().mean()), 0.3)
    assert parameter.data.max() == torch.tensor(1.0) / torch.tensor(1 - 0.7)
    assert torch.equal(before, torch.ones(N))


def test_della_keeps_larger_entries_more_often() -> None:
    """p rises linearly with the rank of the whole tensor's magnitudes, from 0.4 to 0.6 here."""
    (tensor,) = (torch.linspace(1, 2, N)[torch.randperm(N, generator=torch.Generator().manual_seed(3))],)
    dropout = sd_mecha._with_dropout(lambda: None)
    out = dropout(tensor, probability=torch.tensor(0.5), della_eps=0.2, k=1.0, apply_stock=True, seed=11)
    survived = (out != 0).double()
    assert torch.equal(out[out != 0], (tensor / 0.5)[out != 0])
    deciles = survived[tensor.argsort()].view(10, -1).mean(dim=1)
    for decile, share in enumerate(deciles.tolist()):
        assert within(share, 0.4 + 0.2 * (decile + 0.5) / 10, N // 10)
    again = dropout(tensor, probability=torch.tensor(0.5), della_eps=0.2, k=1.0, apply_stock=True, seed=11)
    assert torch.equal(out, again)


def test_dropped_entries_count_as_zeros_in_the_trim() -> None:
    """k = 0.2 of all entries, of which half are dropped: four tenths of the survivors are kept."""
    tensor = torch.linspace(1, 2, N)
    dropout = sd_mecha._with_dropout(lambda: None)
    out = dropout(tensor, probability=0.5, k=0.2, apply_stock=True, seed=1)
    assert int((out != 0).sum()) == N - int(0.8 * N) + 1
    assert within(float((out[tensor > 1.62] != 0).double().mean()), 0.5, int(0.38 * N))


@pytest.mark.parametrize("n", [1, 7, N - 1, N + 300_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("draw", [draw_by_magnitude, _draw_on_device])
def test_draws_from_counts_of_magnitudes(n: int, dtype: torch.dtype, draw: Callable[..., None]) -> None:
    """As by exact ranks, but for half a bin; in parts, the last of odd length."""
    generator = torch.Generator().manual_seed(3)
    tensor = torch.randn(n, generator=generator).to(dtype)
    drawn = ModelScalars(limit=draw_limit(0.4), limit_step=round(0.2 / n * 2.0**64))
    out = torch.empty(n)
    draw(tensor, out, drawn, 1234)
    survived = out != 0
    assert torch.equal(out[survived], tensor[survived].float())
    assert not torch.signbit(out[~survived]).any()
    again = torch.empty(n)
    draw(tensor, again, drawn, 1234)
    assert torch.equal(out, again)
    if n < N - 1:
        return
    by_rank = survived[tensor.float().abs().argsort()][: n // 10 * 10].double().view(10, -1).mean(dim=1)
    for decile, share in enumerate(by_rank.tolist()):
        assert within(share, 0.4 + 0.2 * (decile + 0.5) / 10, n // 10)
    neighbours = float((survived[1:] & survived[:-1]).double().mean())
    assert within(neighbours, float(survived.double().mean()) ** 2)


@pytest.mark.parametrize("draw", [draw_by_magnitude, _draw_on_device])
def test_every_entry_or_none_is_drawn(draw: Callable[..., None]) -> None:
    tensor = torch.linspace(1, 2, N)
    out = torch.empty(N)
    draw(tensor, out, ModelScalars(limit=ALWAYS), 5)
    assert torch.equal(out, tensor)
    draw(tensor, out, ModelScalars(limit=0), 5)
    assert not out.any()
