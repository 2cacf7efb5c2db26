"""`tvfast.importance.collect` against per-sample gradients by torch.func in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tvfast
from tests.importance.networks import Batch, Network, batch_of, class_logits, losses, sample_gradients
from tvfast.errors import ArgumentError, ShapeError, StateDictError, StatisticsError, UnknownNameError
from tvfast.importance import Progress, collect
from tvfast.importance.collecting import _Adder, _Run
from tvfast.statistics import StatisticsFile, merge_statistics
from tvfast.statistics.tensors import read_mean, read_sum

N = 6


def network(seed: int = 0, **options: bool) -> Network:
    torch.manual_seed(seed)
    return Network(**options)


def means(found: StatisticsFile | dict[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(found, dict):
        return found
    (kind,) = found.kinds
    return {name: read_mean(found, name, kind, "sum") for name in found.parameters(kind)}


def assert_close(found: Any, expected: dict[str, Tensor], rtol: float = 1e-4) -> None:
    result = means(found)
    assert set(result) == set(expected)
    for name, tensor in expected.items():
        assert result[name].shape == tensor.shape
        size = float(tensor.norm())
        assert float((result[name].double() - tensor).norm()) <= rtol * size + 1e-12, name


def split(batch: Batch, *sizes: int) -> list[Batch]:
    parts = {key: value.split(sizes) for key, value in batch.items()}
    return [{key: value[k] for key, value in parts.items()} for k in range(len(sizes))]


def expected_mean(
    model: nn.Module, batch: Batch, score: Callable[[str, Tensor], Tensor], objective: Any = losses
) -> dict[str, Tensor]:
    gradients = sample_gradients(model, batch, objective)
    return {
        name: sum((score(name, one[name]) for one in gradients), torch.zeros(())) / len(gradients)
        for name in gradients[0]
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["weight", "delta", "fisher"])
def test_sums_are_of_single_samples(kind: str, tied: bool) -> None:
    model, base, batch = network(tied=tied), network(1, tied=tied), batch_of(N)
    theta = {n: p.detach().double() for n, p in model.named_parameters()}
    tau = {n: theta[n] - p.detach().double() for n, p in base.named_parameters()}
    score = {
        "weight": lambda name, g: (g * theta[name]).abs(),
        "delta": lambda name, g: (g * tau[name]).abs(),
        "fisher": lambda name, g: g.square(),
    }[kind]
    expected = expected_mean(model, batch, score)
    options: dict[str, Any] = {"kind": kind, "base": base if kind == "delta" else None}
    for batches in ([batch], split(batch, 1, 2, 3), split(batch, *[1] * N)):
        assert_close(collect(model, losses, batches, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["weight", "delta", "fisher"])
def test_cutting_the_data_into_batches_changes_nothing(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """But the rounding of the model's own products, which are of other sizes then."""
    rtol = 1e-6 if dtype == torch.float32 else 1e-13
    options: dict[str, Any] = {"kind": kind, "dtype": str(dtype).removeprefix("torch.")}
    for seed in range(3):
        model, base = (network(s, tied=seed == 0).to(dtype) for s in (seed, 9))
        batch = batch_of(N, seed=seed)
        options["base"] = base if kind == "delta" else None

        def sums(batches: list[Batch], model: Network = model) -> dict[str, Tensor]:
            found = collect(model, losses, batches, tmp_path / "s", **options)
            assert isinstance(found, StatisticsFile)
            return {n: read_sum(found, n, kind, "sum", dtype=None) for n in found.parameters(kind)}

        whole = sums([batch])
        for batches in (split(batch, 1, 2, 3), split(batch, *[1] * N)):
            for name, found in sums(batches).items():
                assert found.dtype == dtype
                assert float((found - whole[name]).norm()) <= rtol * float(whole[name].norm()), name


def test_gradients_of_layers_and_embeddings_are_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    formed: set[str] = set()
    found = _Adder.gradient

    def spy(self: _Adder, name: str, *arguments: Any) -> None:
        formed.add(name)
        found(self, name, *arguments)

    monkeypatch.setattr(_Adder, "gradient", spy)
    model = network(tied=False)
    for options in ({}, {"micro_batch": 2}, {"per_sample": False}):
        formed.clear()
        collect(model, losses, split(batch_of(N), 1, 5), **options)  # type: ignore[arg-type]
        factored = {"embed.weight", "up.weight", "down.weight", "back.weight", "head.weight"}
        assert not formed & factored
        assert formed >= {"twice.weight", "mix.weight", "norm.weight", "up.bias"}


def test_no_parameter_of_the_network_needs_a_pass_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    alone: list[set[str]] = []
    found = _Run.unsplit

    def spy(self: _Run, *arguments: Any) -> Any:
        result = found(self, *arguments)
        alone.append(set(result))
        return result

    monkeypatch.setattr(_Run, "unsplit", spy)
    collect(network(), losses, [batch_of(3)])
    assert alone == [set()]


def test_a_layer_that_is_used_past_its_module_is_found() -> None:
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(6, 6)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.embed = nn.Embedding(11, 6)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            x = self.one(x) + torch.tanh(x @ self.one.weight)
            x = x + self.attention(x, x, x)[0]
            flat = x.reshape(
                -1, 6
            )  # tokens of all samples in one dimension, as mixtures of experts have them
            return self.one(flat).reshape(x.shape) @ self.embed.weight.t()

    torch.manual_seed(0)
    model, batch = Bypass(), batch_of(4)
    theta = {n: p.detach().double() for n, p in model.named_parameters()}
    expected = expected_mean(model, batch, lambda name, g: (g * theta[name]).abs())
    assert_close(collect(model, losses, split(batch, 3, 1)), expected)


def test_exact_fisher_is_the_expectation_over_labels() -> None:
    model, batch = network(), batch_of(3)
    expected: dict[str, Tensor] = {}
    p = torch.softmax(class_logits(model.double(), batch), -1).detach()
    model = network()
    for label in range(11):

        def logp(run: Any, one: Batch, label: int = label) -> Tensor:
            return torch.log_softmax(class_logits(run, one), -1)[:, label]

        for n, gradient in enumerate(sample_gradients(model, batch, logp)):
            for name, g in gradient.items():
                expected[name] = expected.get(name, 0) + p[n, label] * g.square() / 3
    for batches in ([batch], split(batch, 2, 1)):
        assert_close(collect(model, class_logits, batches, kind="fisher", fisher="matena_raffel"), expected)


def test_drawn_labels_are_the_model_s_and_keyed_by_sample() -> None:
    model, batch = network(), batch_of(N)
    first = means(collect(model, class_logits, [batch], kind="fisher", fisher="mats_true", seed=3))
    assert_close(
        collect(model, class_logits, split(batch, 2, 4), kind="fisher", fisher="mats_true", seed=3),
        {name: tensor.double() for name, tensor in first.items()},
    )
    other = means(collect(model, class_logits, [batch], kind="fisher", fisher="mats_true", seed=4))
    assert not torch.allclose(first["up.weight"], other["up.weight"])
    many = {key: value[:1].repeat(400, 1) for key, value in batch.items()}
    drawn = means(
        collect(model, class_logits, [many], kind="fisher", fisher="mats_true", parameters=["back.bias"])
    )
    exact = means(collect(model, class_logits, split(batch, 1, 5)[:1], kind="fisher", fisher="matena_raffel",
                          parameters=["back.bias"]))  # fmt: skip
    torch.testing.assert_close(drawn["back.bias"], exact["back.bias"], rtol=0.25, atol=0)
    tokens = collect(model, lambda m, b: m(b["tokens"]), [batch], kind="fisher", fisher="mats_true")
    assert set(means(tokens)) == set(first)


def test_mergelm_squares_the_gradient_of_a_batch() -> None:
    model, batch = network(), batch_of(N)

    def objective(run: Any, one: Batch) -> Tensor:
        logp = torch.log_softmax(class_logits(run, one), -1)
        return (logp.detach().mul(0.5).exp() * logp).sum(1)

    gradients = sample_gradients(model, batch, objective)

    def squared(*ranges: range) -> dict[str, Tensor]:
        return {
            name: sum(sum(gradients[k][name] for k in one).square() for one in ranges) / N  # type: ignore[misc]
            for name in gradients[0]
        }

    options: dict[str, Any] = {"kind": "fisher", "fisher": "mergelm"}
    assert_close(collect(model, class_logits, [batch], **options), squared(range(N)))
    assert_close(collect(model, class_logits, split(batch, 4, 2), **options), squared(range(4), range(4, 6)))


@pytest.mark.parametrize("kind", ["weight", "fisher"])
def test_micro_batches_are_an_approximation_from_below(kind: str) -> None:
    model, batch = network(), batch_of(N)
    theta = {n: p.detach().double() for n, p in model.named_parameters()}
    gradients = sample_gradients(model, batch, losses)
    expected = {}
    for name in gradients[0]:
        pairs = [gradients[k][name] + gradients[k + 1][name] for k in (0, 2, 4)]
        scores = [(g * theta[name]).abs() if kind == "weight" else g.square() / 2 for g in pairs]
        expected[name] = sum(scores) / N
    found = collect(model, losses, [batch], kind=kind, micro_batch=2)
    assert_close(found, expected)  # type: ignore[arg-type]
    assert_close(collect(model, losses, split(batch, 2, 2, 2), kind=kind, per_sample=False), expected)  # type: ignore[arg-type]
    exact = means(collect(model, losses, [batch], kind=kind))
    assert all(bool((means(found)[name] <= exact[name] * 1.001 + 1e-9).all()) for name in exact)


def test_one_number_is_one_sample() -> None:
    model, batch = network(), batch_of(3)
    expected = means(collect(model, losses, [batch], per_sample=False))
    found = means(collect(model, lambda m, b: losses(m, b).sum(), [batch]))
    for name in expected:
        torch.testing.assert_close(found[name], 3 * expected[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype: torch.dtype) -> None:
    model, batch = network().to(dtype), batch_of(4)
    theta = {n: p.detach().double() for n, p in model.named_parameters()}
    expected = expected_mean(model, batch, lambda name, g: (g * theta[name]).abs())
    rtol = 1e-6 if dtype == torch.float64 else 0.1
    assert_close(collect(model, losses, [batch]), expected, rtol)


def test_the_model_is_left_as_it_was() -> None:
    model = network()
    model.train()
    model.norm.eval()
    model.up.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    collect(model, losses, [batch_of(2)])
    assert model.training
    assert not model.norm.training
    assert not model.up.weight.requires_grad
    assert model.down.weight.requires_grad
    assert model.down.weight.grad is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_memory_does_not_grow_with_samples() -> None:
    n, o, i = 48, 256, 256
    model = nn.Sequential(nn.Linear(i, o), nn.Tanh(), nn.Linear(o, 3))
    batch = {"x": torch.randn(n, 4, i)}

    def loss(one: nn.Module, of: Batch) -> Tensor:
        found: Tensor = one(of["x"]).square().sum((1, 2))
        return found

    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=False) as profile:
        collect(model, loss, [batch])
    largest = max(event.cpu_memory_usage for event in profile.function_events)
    activations, gradients = 4 * n * 4 * i, 4 * o * i
    assert largest < 2 * activations + 2 * gradients < 4 * n * o * i / 10


# -- files ----------------------------------------------------------------------------------------


def test_groups_of_layers_and_choices(tmp_path: Path) -> None:
    model, batches = network(), split(batch_of(N), 2, 4)
    whole = collect(model, losses, batches, tmp_path / "whole")
    seen: list[Progress] = []
    cut = collect(
        model, losses, batches, tmp_path / "cut", layers_at_a_time=3, progress=seen.append,
        data={"path": "x"}, name="tiny", content=True,
    )  # fmt: skip
    assert isinstance(cut, StatisticsFile)
    assert isinstance(whole, StatisticsFile)
    assert {one.group for one in seen} == set(range(seen[0].n_groups))
    assert seen[-1] == Progress(seen[0].n_groups - 1, seen[0].n_groups, 2, N)
    assert cut.parameters("weight") == whole.parameters("weight")
    for name in cut.parameters("weight"):
        assert torch.equal(read_sum(cut, name, "weight", "sum"), read_sum(whole, name, "weight", "sum"))
        assert cut.entry(name, "weight").counts == {"samples": N}
    assert cut.document.data == ({"path": "x"},)
    assert cut.document.model.name == "tiny"
    assert cut.document.model.content != ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]
    few = collect(model, losses, batches, parameters=lambda name: "norm" in name)
    assert sorted(means(few)) == ["norm.bias", "norm.weight"]
    with pytest.raises(ArgumentError, match="can be iterated once"):
        collect(model, losses, iter(batches), layers_at_a_time=1)
    again = collect(model, losses, lambda: iter(batches), layers_at_a_time=4)
    assert torch.equal(means(again)["up.weight"], means(whole)["up.weight"])


def test_files_of_parts_of_the_data_add_up(tmp_path: Path) -> None:
    model, batches = network(), split(batch_of(N), 2, 4)
    for k, batch in enumerate(batches):
        collect(model, losses, [batch], tmp_path / str(k))
    merge_statistics([tmp_path / "0", tmp_path / "1"], tmp_path / "sum")
    whole = means(collect(model, losses, batches))
    assert_close(
        tvfast.statistics.open_statistics(tmp_path / "sum"),
        {name: tensor.double() for name, tensor in whole.items()},
        1e-6,
    )


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    model, batches = network(), split(batch_of(N), 1, 1, 1, 1, 2)
    expected = means(collect(model, losses, batches, layers_at_a_time=4))
    path = tmp_path / "s"
    for stop in (4, 8, 9):  # counted over all passes of all attempts
        n_left = stop

        def failing(one: nn.Module, batch: Batch) -> Tensor:
            nonlocal n_left
            n_left -= 1
            if n_left < 0:
                raise KeyboardInterrupt
            return losses(one, batch)

        failing.__qualname__ = "losses"
        with pytest.raises(KeyboardInterrupt):
            collect(model, failing, batches, path, layers_at_a_time=4, checkpoint_every=2, resume=stop > 4)
        assert not path.exists()
    counted: list[Progress] = []
    options: dict[str, Any] = {"layers_at_a_time": 4, "resume": True}
    with pytest.raises(StatisticsError, match="the same arguments"):
        collect(network(), losses, batches, path, kind="fisher", **options)
    found = collect(model, losses, batches, path, progress=counted.append, **options)
    assert len(counted) < counted[0].n_groups * len(batches)
    for name, tensor in expected.items():
        assert torch.equal(means(found)[name], tensor), name
    assert list(tmp_path.iterdir()) == [path]


def test_scores_merge(tmp_path: Path) -> None:
    base, batch = network(), batch_of(3)
    models = [network(1), network(2)]
    files = [collect(one, losses, [batch], tmp_path / str(k)) for k, one in enumerate(models)]
    first = tvfast.merge(base, models, method="sta", stats=files, density=0.3)
    held = [collect(one, losses, [batch]) for one in models]
    second = tvfast.merge(base, models, method="sta", scores=held, density=0.3)
    third = tvfast.importance.merge(base, models, files, density=0.3)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
        assert torch.equal(tensor, third.state_dict()[name])
    with pytest.raises(ArgumentError, match="both given"):
        tvfast.merge(base, models, method="sta", stats=files, scores=held)


BATCH = batch_of(2)
REFUSED: dict[str, tuple[Callable[[nn.Module], object], type[Exception], str]] = {
    "kind": (lambda m: collect(m, losses, [BATCH], kind="weights"), UnknownNameError, "'weight'"),
    "fisher": (
        lambda m: collect(m, losses, [BATCH], kind="fisher", fisher="exact"),
        UnknownNameError,
        "matena_raffel",
    ),
    "no base": (lambda m: collect(m, losses, [BATCH], kind="delta"), ArgumentError, "base is None"),
    "base": (lambda m: collect(m, losses, [BATCH], base=m), ArgumentError, "base is given"),
    "base's names": (
        lambda m: collect(m, losses, [BATCH], kind="delta", base={"x": torch.ones(2)}),
        StateDictError,
        "lacks the parameter",
    ),
    "base's shapes": (
        lambda m: collect(
            m, losses, [BATCH], kind="delta", parameters=["up.bias"], base={"up.bias": torch.ones(2)}
        ),
        ShapeError,
        r"\[2\]",
    ),
    "names": (lambda m: collect(m, losses, [BATCH], parameters=["x"]), StateDictError, "names 'x'"),
    "nothing": (
        lambda m: collect(m, losses, [BATCH], parameters=lambda n: False),
        ArgumentError,
        "is chosen",
    ),
    "micro_batch": (lambda m: collect(m, losses, [BATCH], micro_batch=0), ArgumentError, "positive"),
    "mergelm": (
        lambda m: collect(m, losses, [BATCH], kind="fisher", fisher="mergelm", micro_batch=2),
        ArgumentError,
        "no place",
    ),
    "layers": (lambda m: collect(m, losses, [BATCH], layers_at_a_time=0), ArgumentError, "positive"),
    "dtype": (lambda m: collect(m, losses, [BATCH], dtype="int8"), ArgumentError, "float32"),
    "resume": (lambda m: collect(m, losses, [BATCH], resume=True), ArgumentError, "need a path"),
    "no data": (lambda m: collect(m, losses, []), StatisticsError, "no sample came"),
    "loss": (lambda m: collect(m, lambda m, b: 1.0, [BATCH]), ArgumentError, "returned a float"),
    "loss's shape": (lambda m: collect(m, class_logits, [BATCH]), ShapeError, r"\[2, 11\]"),
    "logits": (
        lambda m: collect(m, losses, [BATCH], kind="fisher", fisher="matena_raffel"),
        ShapeError,
        r"\[N, C\]",
    ),
    "not finite": (
        lambda m: collect(m, lambda m, b: losses(m, b) * 1e39, [BATCH]),
        StatisticsError,
        "NaN or",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    act, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        act(network())


@pytest.mark.parametrize("how", ["no_grad", "detach"])
def test_losses_without_a_graph_are_refused(how: str) -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(how != "no_grad"):
            found: Tensor = model(x).pow(2).sum(1)
        return found.detach() if how == "detach" else found

    with pytest.raises(ArgumentError, match="does not depend on any parameter, or loss_fn detached it"):
        collect(nn.Linear(4, 3), loss, [torch.randn(5, 4)])


def test_parameters_that_the_losses_do_not_reach_have_no_importance() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 3)})

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = model["used"](x).pow(2).sum(1)  # type: ignore[index, operator]
        return found

    found = collect(model, loss, [torch.randn(5, 4)], parameters=["unused.weight"])
    assert isinstance(found, dict)
    assert not found["unused.weight"].any()
