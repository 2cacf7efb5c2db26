"""Methods against re-statements of their formulas in float64, and the random ones against statistics."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import tvfast
from tests.methods.inputs import bound, exact_bits, models_for, normal
from tvfast.errors import ArgumentError
from tvfast.methods import statistics as method_statistics
from tvfast.methods.scalars import draw_limit, model_key
from tvfast.methods.slerp import coefficients
from tvfast.program import ALWAYS

RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


# -- methods against formulas in float64 -----------------------------------------------------------


def trimmed(tau: Tensor, k: int) -> Tensor:
    """The k largest magnitudes of a tie-free vector."""
    kept = torch.zeros_like(tau)
    if k:
        index = tau.abs().view(-1).topk(k).indices
        kept.view(-1)[index] = tau.view(-1)[index]
    return kept


def elected_mean(values: list[Tensor], ballots: list[Tensor], shares: list[float], zero: float) -> Tensor:
    """Σ values / Σ shares over the non-zero ballots of the elected sign."""
    sign = torch.sign(sum(ballots, torch.zeros_like(ballots[0])))
    sign = torch.where(sign == 0, zero, sign)
    total, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for value, ballot, share in zip(values, ballots, shares, strict=True):
        member = (torch.sign(ballot) == sign) & (ballot != 0)
        total += torch.where(member, value, 0.0)
        divisor += torch.where(member, share, 0.0)
    return total / torch.where(divisor == 0, 1.0, divisor)


@pytest.mark.parametrize("density", [0.0, 0.001, 0.3, 0.7, 1.0])
def test_ties_mergekit(density: float) -> None:
    base, weights = normal(40, 13), [0.5, 0.75, 1.0]
    models = models_for("ties", base)
    out = tvfast.merge(base, models, method="ties", density=density, weights=weights, scale=0.5)
    taus = [(m - base).double() for m in models]
    k = 0 if density == 0 else max(1, int(density * base.numel()))
    values = [w * trimmed(tau, k) for w, tau in zip(weights, taus, strict=True)]
    expected = base.double() + 0.5 * elected_mean(values, values, weights, 1.0)
    assert bool(((out.double() - expected).abs() <= bound(base, models, out)).all())


def test_ties_paper_ranks_all_tensors_together() -> None:
    base = {"big": normal(50, 3), "small": 0.01 * normal(90, seed=1)}
    models = [
        {
            "big": base["big"] + normal(50, 3, seed=5 + k),
            "small": base["small"] + 0.1 * normal(90, seed=8 + k),
        }
        for k in range(3)
    ]
    out = tvfast.merge(base, models, method="ties", dialect="paper", density=0.3)
    flat = [torch.cat([(m[n] - base[n]).double().view(-1) for n in sorted(base)]) for m in models]
    kept = [trimmed(tau, int(0.3 * 240) + 1) for tau in flat]
    expected = torch.cat([base[n].double().view(-1) for n in sorted(base)]) + elected_mean(
        kept, kept, [1.0] * 3, 0.0
    )
    found = torch.cat([out[n].view(-1) for n in sorted(base)])
    assert bool(((found.double() - expected).abs() <= 1e-6).all())
    assert [int(tau.count_nonzero()) for tau in kept] == [73] * 3
    assert int((out["small"] != base["small"]).sum()) < 27  # a tensor of its own would keep 27 of each model


@pytest.mark.parametrize(
    ("density", "gamma"), [(0.5, 0.1), (0.5, 0.0), (0.9, 0.3), (0.25, 1.0), (0.0, 0.1), (0.001, 0.001)]
)
@pytest.mark.parametrize("tie", ["ge", "index", "hash"])
def test_breadcrumbs_mergekit_keeps_a_band_of_the_tensor(density: float, gamma: float, tie: str) -> None:
    base, weights = torch.zeros(11, 40), [1.0, -0.5]
    models = [normal(11, 40, seed=k) for k in range(2)]
    out = tvfast.merge(
        base, models, method="breadcrumbs", density=density, gamma=gamma, weights=weights, tie=tie
    )
    n = base.numel()
    n_kept, n_dropped = int(density * n), int(gamma * n)
    first = max(0, n - n_kept - n_dropped)
    expected = torch.zeros(n, dtype=torch.float64)
    for model, weight in zip(models, weights, strict=True):
        index = model.view(-1).abs().argsort()[first : first + n_kept]
        expected[index] += weight * model.view(-1)[index].double()
    assert bool(((out.view(-1).double() - expected).abs() <= bound(base, models, out).view(-1)).all())


def test_breadcrumbs_paper_keeps_a_band_of_each_row() -> None:
    model = normal(11, 40)
    out = tvfast.merge(
        torch.zeros(11, 40), [model], method="breadcrumbs", dialect="paper", density=0.25, gamma=0.1
    )
    for row, values in zip(out, model, strict=True):
        ranked = values.abs().argsort(descending=True)
        assert sorted(row.nonzero().view(-1).tolist()) == sorted(ranked[4:14].tolist())
    assert (
        tvfast.merge(torch.zeros(()), [torch.ones(())], method="breadcrumbs", dialect="paper", density=0.1)
        == 1
    )


@pytest.mark.parametrize("topk", [0.0, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("select_in_merge", [None, True, False])
@pytest.mark.parametrize("dialect", ["mergekit", "paper"])
def test_sce(topk: float, select_in_merge: bool | None, dialect: str) -> None:
    base = normal(100)
    models = models_for("sce", base)
    out = tvfast.merge(
        base, models, method="sce", dialect=dialect, select_topk=topk, select_in_merge=select_in_merge
    )
    taus = torch.stack([(m - base).double() for m in models])
    variance = taus.var(dim=0, correction=0)
    # 100 * 0.29 is 29 in float32 and 28.999... in float64
    k = {0.0: 0, 0.29: 29 if dialect == "mergekit" else 28, 0.5: 50, 1.0: 100}[topk]
    mask = torch.zeros(100, dtype=torch.float64)
    mask[variance.topk(k).indices] = 1
    squares = (taus * mask).square().mean(dim=1)
    weights = squares / squares.sum() if k else torch.full((3,), 1 / 3, dtype=torch.float64)
    in_merge = dialect == "mergekit" if select_in_merge is None else select_in_merge
    merged = list(taus * mask if in_merge else taus)
    values = [w * tau for w, tau in zip(weights, merged, strict=True)]
    expected = base.double() + elected_mean(values, merged, weights.tolist(), 1.0)
    assert bool(((out.double() - expected).abs() <= 2 * bound(base, models, out)).all())


def test_sce_selects_the_same_entries_of_every_model() -> None:
    # The variance is 1 everywhere, so that hashed ties decide alone.
    out = tvfast.merge(
        torch.zeros(4096), [torch.ones(4096), torch.full((4096,), 3.0)], method="sce", select_topk=0.5
    )
    assert out.unique().tolist() == pytest.approx([0.0, 0.1 * 1 + 0.9 * 3])
    assert abs(int(out.count_nonzero()) - 2048) < 5 * math.sqrt(1024)


def test_sce_weights_are_equal_below_mergekits_threshold() -> None:
    base = torch.zeros(64)
    models = [1e-4 * normal(64).abs(), 2e-4 * normal(64, seed=1).abs()]
    out = tvfast.merge(base, models, method="sce")
    assert torch.allclose(out, (models[0] + models[1]) / 2, rtol=1e-6)
    assert not torch.allclose(tvfast.merge(base, models, method="sce", dialect="paper"), out, rtol=1e-2)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.5])
def test_slerp(t: float) -> None:
    base, model = normal(31, 7), normal(31, 7, seed=1)
    out = tvfast.merge(base, [model], method="slerp", t=t)
    b, m = base.double().view(-1), model.double().view(-1)
    angle = torch.acos(b @ m / b.norm() / m.norm())
    expected = (torch.sin((1 - t) * angle) * b + torch.sin(t * angle) * m) / torch.sin(angle)
    assert torch.allclose(out.double().view(-1), expected, rtol=1e-6, atol=1e-6)
    if t in (0.0, 1.0):
        assert torch.allclose(out, model if t else base, rtol=1e-6, atol=1e-7)


def test_slerp_of_zero_and_colinear_vectors() -> None:
    model = torch.tensor([1.0, 2.0, 3.0, 4.0])
    zero = torch.zeros(4)
    half_pi = math.pi / 2
    assert torch.allclose(tvfast.merge(zero, [model], method="slerp", t=0.3), math.sin(0.3 * half_pi) * model)
    assert torch.allclose(tvfast.merge(model, [zero], method="slerp", t=0.3), math.sin(0.7 * half_pi) * model)
    assert tvfast.merge(zero, [zero], method="slerp").equal(zero)
    assert torch.allclose(tvfast.merge(model, [-model], method="slerp", t=0.3), 0.4 * model)
    assert torch.allclose(tvfast.merge(model, [2 * model], method="slerp", t=0.5), 1.5 * model)
    assert all(math.isnan(c) for c in coefficients([[1.0, math.nan], [math.nan, math.nan]], 0.5))


def test_slerp_is_a_line_for_small_angles_only() -> None:
    assert coefficients([[1.0, 0.9996], [0.9996, 1.0]], 0.5) == (0.5, 0.5)
    arc = 0.5 / math.sqrt((1 + 0.9994) / 2)
    assert coefficients([[1.0, 0.9994], [0.9994, 1.0]], 0.5) == pytest.approx((arc, arc), rel=1e-7)


def test_linear_and_passthrough_do_not_read_the_base() -> None:
    base = torch.full((5,), math.nan)
    models = [torch.full((5,), 2.0), torch.full((5,), 8.0)]
    assert tvfast.merge(base, models, method="linear", weights=[1, 3]).tolist() == [6.5] * 5
    assert tvfast.merge(base, models, method="linear", weights=[1, 3], normalize=False).tolist() == [26.0] * 5
    assert tvfast.merge(base, models[:1], method="passthrough", scale=-0.5).tolist() == [-1.0] * 5
    with pytest.raises(ArgumentError, match="sum to 0"):
        tvfast.merge(base, models, method="linear", weights=[1, -1])


def test_task_arithmetic_sums_and_normalises_on_request() -> None:
    base, models = torch.ones(4), [torch.full((4,), 3.0), torch.full((4,), 9.0)]
    assert tvfast.merge(base, models, method="task_arithmetic", scale=0.5).tolist() == [6.0] * 4
    mean = tvfast.merge(base, models, method="task_arithmetic", scale=0.5, normalize=True)
    assert mean.tolist() == [3.5] * 4  # the coefficient is λ or λ / K
    cancelled = tvfast.merge(base, models, method="task_arithmetic", weights=[1, -1], normalize=True)
    assert cancelled.tolist() == [-5.0] * 4  # a sum of weights below 1e-8 counts as 1


# -- random methods --------------------------------------------------------------------------------


def test_keys_are_those_of_the_documentation() -> None:
    digest = hashlib.blake2b(b"7\0layers.0.w\x002", digest_size=8).digest()
    assert model_key(7, "layers.0.w", 2) == int.from_bytes(digest, "little")


def test_limits_hold_their_probability() -> None:
    assert (draw_limit(0.0), draw_limit(0.5), draw_limit(1.0)) == (0, 2**31, ALWAYS)


@pytest.mark.parametrize("dialect", ["mergekit", "paper"])
def test_dare_keeps_the_density_and_rescales_as_its_dialect(dialect: str) -> None:
    n, density = 1 << 15, 0.3
    model = normal(n)
    out = tvfast.merge(torch.zeros(n), [model], method="dare_linear", dialect=dialect, density=density)
    kept = out != 0
    assert abs(int(kept.sum()) - density * n) < 5 * math.sqrt(n * density * (1 - density))
    gain = (
        1 / density
        if dialect == "paper"
        else float(model.double().abs().sum() / model[kept].double().abs().sum())
    )
    assert torch.allclose(out[kept], model[kept] * gain, rtol=1e-6)
    plain = tvfast.merge(
        torch.zeros(n), [model], method="dare_linear", dialect=dialect, density=density, rescale=False
    )
    assert plain.equal(torch.where(kept, model, 0.0))


def test_dare_draws_differ_between_models_seeds_and_tensors() -> None:
    ones = torch.ones(4096)

    def draws(**changes: Any) -> Tensor:
        name = changes.pop("name", "a")
        return (
            tvfast.merge({name: 0 * ones}, [{name: ones}], method="dare_linear", density=0.5, **changes)[name]
            != 0
        )

    reference = draws()
    assert reference.equal(draws())
    for other in (draws(seed=1), draws(name="b")):
        assert 1800 < int((reference == other).sum()) < 2300
    both = tvfast.merge(0 * ones, [ones, 16 * ones], method="dare_linear", density=0.5, rescale=False)
    assert set(both.unique().tolist()) == {0.0, 1.0, 16.0, 17.0}


@pytest.mark.parametrize("dialect", ["mergekit", "paper"])
def test_della_keeps_larger_entries_more_often(dialect: str) -> None:
    rows, row, density, epsilon = 4000, 9, 0.5, 0.4
    model = normal(rows, row)
    out = tvfast.merge(
        torch.zeros(rows, row),
        [model],
        method="della_linear",
        dialect=dialect,
        density=density,
        epsilon=epsilon,
    )
    rank = model.abs().argsort(dim=1).argsort(dim=1)
    kept = out != 0
    for r in range(row):
        p = density - epsilon + r / (row - 1) * 2 * epsilon
        assert abs(int(kept[rank == r].sum()) - p * rows) < 5 * math.sqrt(rows * p * (1 - p))
        if dialect == "paper":
            chosen = kept & (rank == r)
            assert torch.allclose(out[chosen], model[chosen] / p, rtol=1e-5)
    if dialect == "mergekit":
        gain = model.double().abs().sum() / model[kept].double().abs().sum()
        assert torch.allclose(out[kept].double(), model[kept].double() * gain, rtol=1e-6)


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_della_is_the_same_with_and_without_bit_planes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"a": normal(64, 33), "b": normal(100, seed=1)}
    models = [
        {key: value + normal(*value.shape, seed=9 + k) for key, value in base.items()} for k in range(3)
    ]
    planes = tvfast.merge(base, models, method=name, density=0.4)
    monkeypatch.setattr(method_statistics, "PLANE_BYTES", 0)
    direct = tvfast.merge(base, models, method=name, density=0.4)
    assert all(exact_bits(planes[key], direct[key]) for key in base)


def test_della_of_rows_of_one_keeps_the_density() -> None:
    out = tvfast.merge(
        torch.zeros(20000, 1), [torch.ones(20000, 1)], method="della", density=0.5, rescale=False
    )
    assert abs(int(out.sum()) - 10000) < 5 * math.sqrt(5000)


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("dialect", ["mergekit", "paper"])
def test_density_0_gives_the_base(name: str, dialect: str) -> None:
    base = normal(50)
    out = tvfast.merge(base, models_for(name, base), method=name, dialect=dialect, density=0.0)
    assert exact_bits(out, base)


def test_l1_rescale_leaves_tiny_task_vectors_alone() -> None:
    model = torch.full((8,), 1e-9)
    out = tvfast.merge(torch.zeros(8), [model], method="dare_linear", density=0.5)
    assert set(out.tolist()) <= {0.0, float(model[0])}
