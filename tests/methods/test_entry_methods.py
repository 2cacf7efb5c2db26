"""Methods that decide entry by entry or row by row, against their formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import tvfast
from tests.methods.inputs import bound, exact_bits, grid, normal
from tvfast.errors import ArgumentError
from tvfast.matrices.fusion import divergence
from tvfast.program import Keep, Members, ModelScalars, Program, TensorScalars, Weighting


def changes(*shape: int, n: int = 3, share: float = 0.3) -> tuple[Tensor, list[Tensor]]:
    """Models that have changed a share of the base's entries each; on the dyadic grid, so that τ is exact."""
    base = grid(*shape)
    models = []
    for k in range(n):
        changed = torch.rand(shape, generator=torch.Generator().manual_seed(40 + k)) < share
        models.append(base + torch.where(changed, grid(*shape, seed=k + 1), torch.zeros(shape)))
    return base, models


def ram(base: Tensor, models: list[Tensor], epsilon: float, rescale: list[float] | None = None) -> Tensor:
    """One active model: its τ (times its factor); several: their mean."""
    taus = torch.stack([(m - base).double() for m in models])
    active = taus.abs() > epsilon
    count = active.sum(dim=0)
    factors = torch.tensor(rescale or [1.0] * len(models), dtype=torch.float64)
    factors = factors.reshape(-1, *[1] * base.dim())
    lone = (taus * active * factors * (count == 1)).sum(dim=0)
    shared = (taus * active * (count > 1)).sum(dim=0) / count.clamp(min=1)
    return base.double() + lone + shared


@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.25])
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_ram(epsilon: float, n: int) -> None:
    base, models = changes(13, 17, n=n)
    out = tvfast.merge(base, models, method="ram", epsilon=epsilon)
    assert bool(((out.double() - ram(base, models, epsilon)).abs() <= bound(base, models, out)).all())


def test_ram_counts_an_entry_as_changed_above_epsilon_in_float32() -> None:
    epsilon = float(np.float32(1e-5))
    up = float(np.nextafter(np.float32(1e-5), np.float32(1)))
    base = torch.zeros(4)
    models = [torch.tensor([epsilon, up, -epsilon, -up]), torch.tensor([1.0, 1.0, 1.0, 1.0])]
    out = tvfast.merge(base, models, method="ram")
    assert out.tolist() == [1.0, float(np.float32(np.float32(1 + up) / 2)), 1.0, pytest.approx(0.5, abs=1e-4)]


@pytest.mark.parametrize("alpha", [0.2, 100.0])
@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
def test_ramplus(alpha: float, epsilon: float) -> None:
    base, models = changes(23, 17)
    out = tvfast.merge(base, models, method="ramplus_tl", r=0.5, alpha=alpha, epsilon=epsilon)
    active = torch.stack([(m - base).abs() > epsilon for m in models])
    count = active.sum(dim=0)
    lone, shared = (active & (count == 1)).sum(dim=(1, 2)), (active & (count > 1)).sum(dim=(1, 2))
    factors = [1 + 0.5 * min(s / max(one, epsilon), alpha) for one, s in zip(lone, shared, strict=True)]
    assert len(set(factors)) == (1 if alpha == 0.2 else 3)
    expected = ram(base, models, epsilon, [float(f) for f in factors])
    assert bool(((out.double() - expected).abs() <= bound(base, models, out)).all())


def test_ramplus_where_every_change_is_shared() -> None:
    base, model = grid(50), grid(50, seed=1)
    out = tvfast.merge(base, [model, model], method="ramplus_tl", epsilon=0.0)
    assert exact_bits(out, model)


def test_ramplus_measures_each_tensor_by_itself() -> None:
    one, two = changes(40, 40), changes(30, 30, share=0.9)
    both = tvfast.merge(
        {"a": one[0], "b": two[0]},
        [{"a": a, "b": b} for a, b in zip(one[1], two[1], strict=True)],
        method="ramplus_tl",
        alpha=100.0,
    )
    assert exact_bits(both["a"], tvfast.merge(one[0], one[1], method="ramplus_tl", alpha=100.0))
    assert exact_bits(both["b"], tvfast.merge(two[0], two[1], method="ramplus_tl", alpha=100.0))


@pytest.mark.parametrize("t", [0.0, 1e-7, 1e-4, 0.1, 3.0, -1.0])
def test_nearswap_is_the_peers_arithmetic(t: float) -> None:
    base = normal(4096)
    model = base + torch.cat([torch.zeros(96), 10.0 ** torch.linspace(-8, 1, 4000)]) * normal(4096, seed=1)
    out = tvfast.merge(base, [model], method="nearswap", t=t)
    weight = (t / (base - model).abs().clamp(min=1e-6)).clamp(min=0, max=1)
    assert exact_bits(out, weight * model + (1 - weight) * base)


def test_nearswap_takes_the_model_where_it_is_near() -> None:
    base, model = torch.zeros(3), torch.tensor([0.05, -0.1, 1.0])
    out = tvfast.merge(base, [model], method="nearswap", t=0.1)
    assert out.tolist() == pytest.approx([0.05, -0.1, 0.1])


def test_magmax_takes_the_largest_change() -> None:
    base, models = torch.zeros(4), [torch.tensor([1.0, -3.0, 2.0, 0.0]), torch.tensor([-2.0, 1.0, -2.0, 0.0])]
    assert tvfast.merge(base, models, method="magmax").tolist() == [-2.0, -3.0, -2.0, 0.0]
    assert tvfast.merge(base, models, method="magmax", weights=[3, 1], scale=0.5).tolist() == [
        1.5,
        -4.5,
        3,
        0,
    ]


def test_magnitude_prune_trims_and_adds() -> None:
    base = normal(40)
    models = [base + normal(40, seed=k + 1) for k in range(2)]
    out = tvfast.merge(base, models, method="magnitude_prune", density=[0.29, 0.5], weights=[0.5, -1.0])
    expected = base.double()
    for model, k, weight in zip(models, (11, 20), (0.5, -1.0), strict=True):  # int(0.29 · 40) is 11
        tau = (model - base).double()
        index = tau.abs().topk(k).indices
        expected[index] += weight * tau[index]
    assert bool(((out.double() - expected).abs() <= bound(base, models, out)).all())


# -- Arcee Fusion ----------------------------------------------------------------------------------


def fused(base: Tensor, model: Tensor) -> tuple[Tensor, Tensor, float]:
    """The result, the importance and the threshold, in float64."""
    b, m = base.double(), model.double()
    p, q = m.softmax(dim=-1) + 1e-8, b.softmax(dim=-1) + 1e-8
    importance = (m - b).abs() * (p * (p / q).log()).sum(dim=-1, keepdim=True)
    ranked = importance.reshape(-1).sort().values
    n = ranked.numel()
    q25, median, q75 = (float(ranked[int(share * (n - 1))]) for share in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (q75 - q25)
    return torch.where(importance >= threshold, m, b), importance, threshold


@pytest.mark.parametrize("shape", [(40, 37), (100,), (5, 6, 7), (1, 41), (1,), ()])
@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4])
def test_arcee_fusion(shape: tuple[int, ...], spread: float) -> None:
    base = normal(*shape)
    model = base + spread * normal(*shape, seed=1)
    out = tvfast.merge(base, [model], method="arcee_fusion")
    expected, importance, threshold = fused(base, model)
    sure = (importance - threshold).abs() > 1e-6 * threshold  # float32 products of importance
    assert int((~sure).sum()) <= 3
    assert bool(((out.double() - expected).abs() <= bound(base, [model], out))[sure].all())


def test_arcee_fusion_of_nothing_is_nothing() -> None:
    base = {"none": torch.zeros(0, 4), "some": torch.ones(2, 4)}
    assert tvfast.merge(base, [base], method="arcee_fusion")["none"].shape == (0, 4)


def test_arcee_fusion_of_a_copy_is_the_copy() -> None:
    base = normal(8, 9)
    assert exact_bits(tvfast.merge(base, [base.clone()], method="arcee_fusion"), base)


@pytest.mark.parametrize("shape", [(40, 37), (100,), (5, 6, 7), ()])
def test_arcee_fusion_in_float32_is_the_peers_arithmetic(shape: tuple[int, ...]) -> None:
    base = 0.02 * normal(*shape)
    model = base + 5e-4 * normal(*shape, seed=1)
    out = tvfast.merge(base, [model], method="arcee_fusion", dialect="mergekit_float32")
    p, q = model.softmax(dim=-1) + 1e-8, base.softmax(dim=-1) + 1e-8
    importance = (model - base).abs() * (p * (p / q).log()).sum(dim=-1, keepdim=True)
    ranked = importance.reshape(-1).sort().values
    last = ranked.numel() - 1
    q25, median, q75 = ranked[last // 4], ranked[last // 2], ranked[3 * last // 4]
    kept = importance >= median + 1.5 * (q75 - q25)
    assert exact_bits(out, base + (model - base) * kept)


def test_divergence_of_rows_that_hardly_differ_has_digits() -> None:
    base = 0.02 * normal(4, 512)
    model = base + 1e-6 * normal(4, 512, seed=1)
    delta = (model - base).double()
    q = base.double().softmax(dim=-1)
    # To second order in the change, the divergence is half its variance under q.
    second = 0.5 * ((q * delta**2).sum(dim=-1) - (q * delta).sum(dim=-1) ** 2)
    found = divergence(base, model, torch.float64).reshape(-1)
    assert bool(((found - second).abs() <= 1e-2 * second).all())


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("ram", {"epsilon": -1e-5}, "epsilon is -1e-05; expected a number of 0 or more"),
        ("ram", {"weights": 1.0}, "does not take 'weights'"),
        ("ramplus_tl", {"alpha": -1}, "alpha is -1.0"),
        ("ramplus_tl", {"r": math.inf}, "r is inf; expected a finite number"),
        ("nearswap", {"t": math.nan}, "t is nan; expected a finite number"),
        ("magnitude_prune", {"density": 1.5}, "density is 1.5"),
    ],
)
def test_bad_numbers(method: str, parameters: dict[str, float], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        tvfast.merge(normal(4), [normal(4, seed=1)], method=method, **parameters)


# -- stages ----------------------------------------------------------------------------------------


def test_weights_of_lone_entries_by_combine() -> None:
    base = torch.zeros(4)
    models = [torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 3.0, 0.0])]
    program = Program(keep=Keep.ALL, weighting=Weighting.ALONE, members=Members.ZERO_COUNTS)
    scalars = TensorScalars(models=[ModelScalars(weight=10.0), ModelScalars(weight=100.0)])
    out = tvfast.ops.combine(base, models, program, scalars)
    assert out.tolist() == [2.0, 20.0, 300.0, 0.0]
