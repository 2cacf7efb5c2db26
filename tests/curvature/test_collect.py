"""Collected factors against explicit sums over samples, tokens and directions in float64."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.curvature.networks import Recorded, features, network, per_sample_gradients, tokens
from tvfast.curvature import (
    CONVENTIONS,
    Curvature,
    Exact,
    Gaussian,
    Losses,
    SampledLabels,
    Statistics,
    collect,
    load,
)
from tvfast.errors import StatisticsError
from tvfast.factors import Blocks, Dense, Diagonal, Root
from tvfast.statistics import merge_statistics

ALL = ("linear", "norm", "embedding")
X = tokens()


def squares(model: nn.Module, batch: Any) -> Tensor:
    return features(model, batch).square().sum(-1)


def read(found: Statistics, name: str) -> Curvature:
    return found.read(name, torch.float64)


def matrices(found: Statistics, name: str) -> list[Tensor]:
    return [factor.dense() for factor in read(found, name).factors]


def assert_same(one: Statistics, other: Statistics, rtol: float = 1e-12) -> None:
    assert sorted(one) == sorted(other)
    for name in one:
        for left, right in zip(matrices(one, name), matrices(other, name), strict=True):
            assert float((left - right).norm()) <= rtol * float(right.norm()), name


def explicit(convention: str, layer: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of a layer: one sample and one direction after the other."""
    model = network()
    recorded = Recorded(model, [layer])
    chosen = CONVENTIONS[convention]
    bias = chosen.bias and model.get_submodule(layer).bias is not None
    a_sum, b_sum, n_tokens = 0.0, 0.0, 0
    for sample in x:
        for c in range(5):
            e = recorded.gradients(sample[None], torch.eye(5).double()[c : c + 1])[layer][0]
            b_sum = b_sum + e.T @ e / (len(e) if chosen.b_over_tokens else 1)
        a = recorded.inputs[layer][0]
        a = torch.cat([a, torch.ones(len(a), 1).double()], 1) if bias else a
        a_sum = a_sum + a.T @ a / (len(a) if chosen.a_over_tokens else 1)
        n_tokens += len(a)
    a_count = len(x) if chosen.a_count == "samples" else n_tokens
    b_count = len(x) if chosen.b_count == "draws" else n_tokens
    return torch.as_tensor(a_sum) / a_count, torch.as_tensor(b_sum) / b_count


# -- the sums ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["tak", "kfac_expand", "mats"])
def test_factors_are_explicit_sums(convention: str) -> None:
    found = collect(network(), Exact(features), [X[:5], X[5:]], convention=convention, storage="F64")
    for layer in ("q", "k", "out"):
        one = read(found, f"{layer}.weight")
        a, b = explicit(convention, layer, X)
        assert one.a is not None
        assert one.b is not None
        torch.testing.assert_close(one.a.dense(), a, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(one.b.dense(), b, rtol=1e-10, atol=1e-14)
        assert one.bias == (f"{layer}.bias" if convention != "mats" and layer != "out" else None)
        assert one.n_samples == len(X)


def test_one_token_makes_the_kronecker_product_exact() -> None:
    """With R = 1 and equal inputs, B (x) A is the Gauss-Newton matrix: per-sample gradients by torch.func."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(1, 3, dtype=torch.float64).expand(6, 3).contiguous()
    found = collect(model, Exact(features), [x], storage="F64", convention="tak")
    whole = torch.zeros(12, 12, dtype=torch.float64)
    for c in range(2):
        g = per_sample_gradients(model, x, torch.eye(2).double()[c].expand(6, 2), "0.weight").reshape(6, 12)
        whole += g.T @ g / 6
    one = read(found, "0.weight").without_bias()
    assert one.a is not None
    assert one.b is not None
    torch.testing.assert_close(torch.kron(one.b.dense(), one.a.dense()), whole, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["norm.weight", "norm.bias", "cls"])
def test_blocks_of_vectors_are_sums_over_per_sample_gradients(name: str) -> None:
    found = collect(network(), Exact(features), [X[:7], X[7:]], storage="F64", vectors=["cls"])
    n = 6 if name == "cls" else 7
    whole = torch.zeros(n, n, dtype=torch.float64)
    for c in range(5):
        directions = torch.eye(5).double()[c].expand(len(X), 5)
        g = per_sample_gradients(network(), X, directions, name).reshape(len(X), n)
        whole += g.T @ g / len(X)
    one = read(found, name)
    assert one.block is not None
    torch.testing.assert_close(one.block.dense(), whole, rtol=1e-10, atol=1e-14)
    assert one.shape == tuple(dict(network().named_parameters())[name].shape)


def test_embeddings_count_their_rows() -> None:
    found = collect(network(), Exact(features), [X[:7], X[7:]], storage="F64", kinds=ALL)
    one = read(found, "embed.weight")
    assert isinstance(one.a, Diagonal)
    counts = torch.bincount(X.flatten(), minlength=11).double()
    torch.testing.assert_close(one.a.values, counts / X.shape[1] / len(X))
    assert (one.transposed, one.n_in, one.n_out) == (True, 11, 6)


def test_conv1d_of_gpt2_is_a_transposed_linear_layer() -> None:
    class Conv1D(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.weight = nn.Parameter(linear.weight.detach().T.clone())
            self.bias = nn.Parameter(linear.bias.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + self.bias

    plain = nn.Linear(3, 4).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    both = [
        collect(m, lambda m, b: m(b).square().sum((1, 2)), [x], storage="F64") for m in (Conv1D(plain), plain)
    ]
    assert_same(*both)
    assert [read(found, "weight").transposed for found in both] == [True, False]
    assert read(both[0], "weight").matrix(torch.zeros(3, 4)).shape == (4, 3)


def test_rms_norms() -> None:
    class LlamaRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(4).double() + 0.5)
            self.variance_epsilon = 1e-3

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    builtin = nn.RMSNorm(4, eps=1e-3).double()
    builtin.weight.data.uniform_(0.5, 1.5)
    for norm in (LlamaRMSNorm(), builtin):
        model = nn.Sequential(nn.Linear(3, 4).double(), norm)
        x = torch.randn(6, 3, dtype=torch.float64)
        found = collect(model, Exact(features), [x], storage="F64")
        whole = torch.zeros(4, 4, dtype=torch.float64)
        for c in range(4):
            g = per_sample_gradients(model, x, torch.eye(4).double()[c].expand(6, 4), "1.weight")
            whole += g.T @ g / 6
        torch.testing.assert_close(matrices(found, "1.weight")[0], whole, rtol=1e-10, atol=1e-14)


# -- traps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["tak", "kfac_expand", "mats"])
@pytest.mark.parametrize("probe", [Gaussian(features, 2), SampledLabels(features, 2), Losses(squares)])
def test_batches_do_not_matter(convention: str, probe: Any) -> None:
    """In float32, as models are: 1e-6 relative."""
    model = network().float()
    kinds = ("linear", "norm")
    settings: dict[str, Any] = {
        "convention": convention,
        "storage": "F64",
        "vectors": ["cls"],
        "kinds": kinds,
    }
    whole = collect(model, probe, [X], **settings)
    assert_same(collect(model, probe, [X[:1], X[1:8], X[8:]], **settings), whole, rtol=1e-6)


@pytest.mark.parametrize("convention", ["tak", "kfac_expand", "mats"])
def test_probes_do_not_change_the_scale(convention: str) -> None:
    """The mean of many probes is the exact factor; a sum would be as many times as large."""
    exact = collect(network(), Exact(features), [X], convention=convention, storage="F64", vectors=["cls"])
    many = collect(
        network(), Gaussian(features, 32), [X], convention=convention, storage="F64", vectors=["cls"]
    )
    for name in ("q.weight", "out.weight", "cls"):
        traces = [float(matrices(found, name)[-1].trace()) for found in (exact, many)]
        assert traces[1] == pytest.approx(traces[0], rel=0.3)
    assert torch.equal(matrices(exact, "q.weight")[0], matrices(many, "q.weight")[0])


def test_sampled_labels_estimate_the_softmax_curvature() -> None:
    exact = collect(network(), Exact(features, "softmax"), [X], storage="F64")
    many = collect(network(), SampledLabels(features, 48), [X], storage="F64")
    for name in ("q.weight", "out.weight"):
        left, right = matrices(many, name)[1], matrices(exact, name)[1]
        assert float((left - right).norm() / right.norm()) < 0.35
    # the exact one is Σ_c p_c (e_c - p) (e_c - p)ᵀ = diag(p) - p pᵀ at the outputs
    linear = nn.Linear(3, 4).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    b = matrices(collect(linear, Exact(features, "softmax"), [x], storage="F64"), "weight")[1]
    p = linear(x).softmax(-1).detach()
    torch.testing.assert_close(b, (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0))


def test_the_extra_division_by_tokens_is_an_option() -> None:
    """TAK divides B by R, textbook K-FAC does not: R times apart, R = 5 with the class token."""
    tak = collect(network(), Exact(features), [X], convention="tak", storage="F64")
    expand = collect(network(), Exact(features), [X], convention="kfac_expand", storage="F64")
    for name in ("q.weight", "out.weight"):
        torch.testing.assert_close(5 * matrices(tak, name)[1], matrices(expand, name)[1])
        torch.testing.assert_close(matrices(tak, name)[0], matrices(expand, name)[0])


def test_bias_column_is_an_option() -> None:
    with_bias = collect(network(), Exact(features), [X], convention="mats", bias=True, storage="F64")
    without = collect(network(), Exact(features), [X], convention="mats", storage="F64")
    a = matrices(with_bias, "q.weight")[0]
    torch.testing.assert_close(a[:6, :6], matrices(without, "q.weight")[0])
    assert float(a[6, 6]) == pytest.approx(1.0)
    assert with_bias["out.weight"].bias is None
    stripped = read(with_bias, "q.weight").without_bias()
    assert stripped.a is not None
    torch.testing.assert_close(stripped.a.dense(), matrices(without, "q.weight")[0])


@pytest.mark.parametrize("convention", ["tak", "kfac_expand", "mats"])
def test_masked_tokens_enter_nothing(convention: str) -> None:
    """Padding, whatever is in it, gives the sums of the samples without padding."""
    lengths = [3, 5, 2, 4]
    mask = torch.tensor([[1] * n + [0] * (6 - n) for n in lengths])
    padded = tokens(4, 5)

    def own(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return features(model, {"tokens": batch["tokens"], "mask": batch["mask"]})

    batch = {"tokens": padded, "mask": mask}
    settings: dict[str, Any] = {"convention": convention, "storage": "F64", "kinds": ("linear", "norm")}
    found = collect(network(), Exact(own), [batch], mask="mask", **settings)
    cut = [{"tokens": padded[k : k + 1, : n - 1], "mask": mask[k : k + 1, :n]} for k, n in enumerate(lengths)]
    assert_same(found, collect(network(), Exact(own), cut, mask=None, **settings), rtol=1e-10)
    unmasked = collect(network(), Exact(own), [batch], mask=None, **settings)
    assert not torch.allclose(matrices(unmasked, "q.weight")[0], matrices(found, "q.weight")[0])


def test_tokens_first() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.norm(self.linear(x.transpose(0, 1))).mean(0)
            return found

    class Straight(Turned):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.norm(self.linear(x)).mean(1)
            return found

    torch.manual_seed(1)
    turned = Turned().double()
    straight = Straight().double()
    straight.load_state_dict(turned.state_dict())
    for r in (2, 5):  # 5 tokens of 5 samples: only the caller knows which is which
        x = torch.randn(5, r, 3, dtype=torch.float64)
        expected = collect(straight, Exact(features), [x], storage="F64")
        assert_same(collect(turned, Exact(features), [x], batch_first=False, storage="F64"), expected)


# -- forms -------------------------------------------------------------------------------------------


def test_blocks_are_the_blocks_of_the_dense_factors() -> None:
    dense = collect(network(), Gaussian(features), [X[:5], X[5:]], storage="F64")
    block = collect(network(), Gaussian(features), [X[:5], X[5:]], storage="F64", form="block", block=4)
    for name in ("q.weight", "out.weight", "norm.weight"):
        for whole, factor in zip(matrices(dense, name), read(block, name).factors, strict=True):
            assert isinstance(factor, Blocks)
            n = len(whole)
            same = torch.arange(n)[:, None] // 4 == torch.arange(n)[None] // 4
            torch.testing.assert_close(factor.dense(), whole * same)
    assert isinstance(
        collect(network(), Gaussian(features), [X], form="block", block=7)["out.weight"].a, Dense
    )


def test_roots_are_exact_until_rows_are_sampled() -> None:
    settings: dict[str, Any] = {"storage": "F64", "form": "root"}
    dense = collect(network(), Gaussian(features), [X[:5], X[5:]], storage="F64")
    root = collect(network(), Gaussian(features), [X[:5], X[5:]], rank=60, **settings)
    assert_same(root, dense, rtol=1e-10)
    few = collect(network(), Gaussian(features), [X[:5], X[5:]], rank=20, **settings)
    factor = few["q.weight"].a
    assert isinstance(factor, Root)
    assert factor.root.shape == (7, 20)
    assert_same(collect(network(), Gaussian(features), [X[:1], X[1:]], rank=20, **settings), few, rtol=1e-10)
    means = torch.stack(
        [
            matrices(collect(network(), Gaussian(features), [X], rank=20, seed=seed, **settings), "q.weight")[
                0
            ]
            for seed in range(40)
        ]
    ).mean(0)
    exact = matrices(dense, "q.weight")[0]
    assert float((means - exact).norm() / exact.norm()) < 0.12


def test_shared_inputs_have_one_a() -> None:
    found = collect(network(), Gaussian(features), [X[:5], X[5:]], storage="F64")
    apart = collect(network(), Gaussian(features), [X[:5], X[5:]], storage="F64", share=False)
    assert_same(found, apart)


def test_shared_inputs_are_stored_once(tmp_path: Path) -> None:
    collect(network(), Gaussian(features), [X], tmp_path / "one")
    collect(network(), Gaussian(features), [X], tmp_path / "two", share=False)
    saved = os.path.getsize(tmp_path / "two") - os.path.getsize(tmp_path / "one")
    assert saved >= 0
    file = load(tmp_path / "one")
    assert file._source.entries["k.weight", "kfac"].roles["A"].shared == "q.weight"  # type: ignore[union-attr]
    assert_same(file, load(tmp_path / "two"))


def test_regmean_takes_no_gradients() -> None:
    calls = []

    def run(model: nn.Module, batch: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return features(model, batch)

    found = collect(network(), run, [X[:5], X[5:]], convention="regmean", storage="F64")
    assert not any(calls)
    expected = collect(network(), Exact(features), [X], convention="mats", storage="F64")
    assert found["q.weight"].b is None
    torch.testing.assert_close(matrices(found, "q.weight")[0], matrices(expected, "q.weight")[0])


# -- files, groups, resume ---------------------------------------------------------------------------


def test_groups_of_layers_and_files_give_the_same(tmp_path: Path) -> None:
    whole = collect(network(), Gaussian(features, 2), [X[:5], X[5:]], storage="F64", vectors=["cls"])
    passes = []

    def batches() -> list[Tensor]:
        passes.append(1)
        return [X[:5], X[5:]]

    found = collect(
        network(), Gaussian(features, 2), batches, tmp_path / "s", storage="F64", vectors=["cls"], memory=1000
    )
    assert len(passes) > 3
    assert list(found) == list(load(tmp_path / "s"))
    assert_same(found, whole)
    half = [
        collect(network(), Gaussian(features), [x], tmp_path / f"{k}") for k, x in enumerate((X[:5], X[5:]))
    ]
    assert half[0].path == str(tmp_path / "0")
    merge_statistics([tmp_path / "0", tmp_path / "1"], tmp_path / "both")
    both = load(tmp_path / "both")
    assert both["q.weight"].n_samples == 12
    torch.testing.assert_close(
        both["q.weight"].a.dense(),  # type: ignore[union-attr]
        collect(network(), Gaussian(features), [X])["q.weight"].a.dense(),  # type: ignore[union-attr]
    )
    in_memory = collect(network(), Gaussian(features), [X])
    in_memory.save(tmp_path / "saved")
    assert_same(load(tmp_path / "saved"), in_memory)


@pytest.mark.parametrize("form", ["dense", "block", "root"])
@pytest.mark.parametrize("stop", [2, 4])
def test_a_killed_collection_goes_on(tmp_path: Path, form: str, stop: int) -> None:
    """The same bytes as a run that was not interrupted, wherever it stopped."""
    model, data = network().float(), list(X.split(4))
    settings: dict[str, Any] = {
        "form": form, "block": 3, "rank": 30, "vectors": ["cls"], "memory": 1000, "checkpoint_every": 1,
    }  # fmt: skip
    probe = Gaussian(features, 2)
    collect(model, probe, data, tmp_path / "whole", **settings)

    class Killed(Exception):
        pass

    def progress(done: int, planned: int) -> None:
        if done == stop:
            raise Killed

    with pytest.raises(Killed):
        collect(model, probe, data, tmp_path / "s", progress=progress, **settings)
    assert not (tmp_path / "s").exists()
    with pytest.raises(StatisticsError, match="another model, data or settings"):
        collect(model, probe, data, tmp_path / "s", resume=True, **{**settings, "rank": 31})
    done: list[tuple[int, int]] = []
    collect(model, probe, data, tmp_path / "s", resume=True, progress=lambda *n: done.append(n), **settings)
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()
    assert done[0][0] >= stop
    assert sorted(os.listdir(tmp_path)) == ["s", "whole"]


def test_the_model_is_as_before() -> None:
    model = network().train()
    model.q.weight.requires_grad_(False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    collect(model, Gaussian(features), [X], vectors=["cls"])
    assert model.training
    assert not model.q.weight.requires_grad
    assert model.k.weight.requires_grad
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not model.q._forward_hooks
    assert not model.q._forward_pre_hooks
    with pytest.raises(ZeroDivisionError):
        collect(model, lambda m, b: 1 / 0, [X])  # type: ignore[arg-type,return-value]
    assert model.training
    assert not model.q.weight.requires_grad


def test_in_place_activations_after_a_layer() -> None:
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU()).double()
    eager = nn.Sequential(plain[0], nn.ReLU(inplace=True), plain[2], nn.ReLU(inplace=True))
    x = torch.randn(6, 3, dtype=torch.float64)
    both = [collect(m, Exact(features), [x], storage="F64") for m in (plain, eager)]
    assert_same(*both)
