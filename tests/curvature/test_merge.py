"""Merges by curvature of tensors, state dicts and modules, and RegMean++ against its steps written out."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tvfast
from tvfast.curvature import Curvature, Gaussian, Statistics, collect, merge
from tvfast.errors import ArgumentError, SolveError, StatisticsError, UnknownNameError
from tvfast.factors import Dense

WEIGHTS = (1.0, 2.0, 0.5)


class Net(nn.Module):
    """Two layers of equal shape, so that they are solved together, a norm, and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 5)
        self.first, self.second, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.norm = nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + torch.tanh(self.second(torch.relu(self.first(self.norm(h)))))
        found: Tensor = self.out(h).mean(1)
        return found


def family() -> tuple[Net, list[Net], list[Tensor]]:
    """Base, three models, and data of each."""
    torch.manual_seed(11)
    base = Net().double()
    models = [copy.deepcopy(base) for _ in WEIGHTS]
    for model in models:
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return base, models, [torch.randint(0, 9, (30, 4)) for _ in WEIGHTS]


def statistics(**settings: Any) -> list[Statistics]:
    _, models, data = family()
    chosen: dict[str, Any] = {"convention": "mats", "kinds": ("linear", "norm"), "storage": "F64", **settings}
    probe = Gaussian(lambda model, batch: model(batch))
    return [collect(model, probe, [x], **chosen) for model, x in zip(models, data, strict=True)]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def factors(found: list[Statistics], name: str) -> list[Curvature]:
    return [one.read(name, torch.float64) for one in found]


@pytest.mark.parametrize("method", ["regmean", "mats", "kfac"])
def test_layers_satisfy_the_normal_equations(method: str) -> None:
    """Relative residual below 1e-6 in float64, of the equations with Kronecker products written out."""
    base, models, _ = family()
    found = statistics()
    report: list[str] = []
    settings: dict[str, Any] = (
        {"shrink": 0.7} if method == "regmean" else {"tolerance": 1e-9, "iterations": 900}
    )
    merged = merge(
        state(base), [state(m) for m in models], found, method, weights=WEIGHTS, report=report, **settings
    )
    for name in ("first.weight", "second.weight", "out.weight"):
        ones = factors(found, name)
        residual: Any = 0.0
        scale: Any = 0.0
        curvature: Any = 0.0
        for c, one, model in zip(WEIGHTS, ones, models, strict=True):
            assert one.a is not None
            assert one.b is not None
            a = one.a.shrunk(settings.get("shrink", 1.0)).dense()
            b = torch.eye(one.n_out).double() if method == "regmean" else one.b.dense()
            whole = c * torch.kron(b, a)
            curvature = curvature + whole
            own = state(model)[name]
            residual = residual + whole @ (merged[name] - own).reshape(-1)
            scale = scale + whole @ (own - (state(base)[name] if method == "kfac" else 0)).reshape(-1)
        if method == "kfac":
            rho = 0.01 * curvature.trace() / len(curvature)
            residual = residual + rho * (merged[name] - state(base)[name]).reshape(-1)
        assert float(residual.norm()) < 1e-6 * float(scale.norm())
    assert not [line for line in report if "averaged" not in line]


@pytest.mark.parametrize("method", ["regmean", "mats", "kfac"])
def test_what_has_no_factors_is_averaged_and_reported(method: str) -> None:
    base, models, _ = family()
    report: list[str] = []
    merged = merge(base, models, statistics(), method, weights=WEIGHTS, report=report)
    mean = {
        name: sum(c * state(m)[name] for c, m in zip(WEIGHTS, models, strict=True)) / sum(WEIGHTS)
        for name in state(base)
    }
    names = ["embed.weight", "first.bias", "out.bias"] + ["norm.weight", "norm.bias"] * (method == "regmean")
    for name in names:
        torch.testing.assert_close(state(merged)[name], mean[name])
    assert f"{method}: averaged, no factors: 1 tensor (embed.weight)" in report
    assert any(line.startswith(f"{method}: averaged, vectors without factors: 3 tensors") for line in report)
    assert any("averaged, vectors: 2 tensors" in line for line in report) == (method == "regmean")
    if method != "regmean":
        assert not torch.allclose(state(merged)["norm.weight"], mean["norm.weight"])


@pytest.mark.parametrize("in_memory", [True, False])
def test_nothing_is_written_where_statistics_have_another_shape(tmp_path: Path, in_memory: bool) -> None:
    base, models, _ = family()
    found: list[Any] = statistics()
    if not in_memory:
        for k, one in enumerate(found):
            one.save(tmp_path / str(k))
        found = [tmp_path / str(k) for k in range(len(found))]
    states = [{**state(one), "out.weight": torch.zeros(4, 5).double()} for one in (base, *models)]
    before = {name: tensor.clone() for name, tensor in states[0].items()}
    with pytest.raises(
        StatisticsError, match=r"'out.weight' has shape \[4, 5\], its statistics have \[3, 5\]"
    ):
        tvfast.merge_(states[0], states[1:], "regmean", stats=found, report=[])
    assert all(torch.equal(before[name], tensor) for name, tensor in states[0].items())


def test_vectors_with_blocks_satisfy_their_equations() -> None:
    base, models, _ = family()
    found = statistics()
    merged = merge(state(base), [state(m) for m in models], found, "mats", report=[])
    for name in ("norm.weight", "norm.bias"):
        residual: Any = 0.0
        scale: Any = 0.0
        for one, model in zip(factors(found, name), models, strict=True):
            assert one.block is not None
            residual = residual + one.block.dense() @ (merged[name] - state(model)[name])
            scale = scale + one.block.dense() @ state(model)[name]
        assert float(residual.norm()) < 1e-6 * float(scale.norm())


def test_regmean_is_mats_with_b_the_identity() -> None:
    base, models, _ = family()
    found = [
        {
            name: one.read(name, torch.float64).replaced(b=Dense(torch.eye(one[name].n_out).double()))
            for name in one
            if one[name].block is None
        }
        for one in statistics()
    ]
    arguments = (state(base), [state(m) for m in models], found)
    left = merge(*arguments, "regmean", shrink=1.0, report=[])
    right = merge(*arguments, "mats", tolerance=1e-12, iterations=500, report=[])
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("form", ["dense", "block", "root"])
@pytest.mark.parametrize("method", ["regmean", "mats", "kfac"])
def test_every_form_and_bias_columns(form: str, method: str) -> None:
    """The bias column is left out: biases are averaged, as the authors do."""
    base, models, _ = family()
    settings: dict[str, Any] = {"form": form, "block": 2, "rank": 200}
    arguments = (state(base), [state(m) for m in models])
    solved: dict[str, Any] = {} if method == "regmean" else {"tolerance": 1e-10, "iterations": 500}
    plain = merge(*arguments, statistics(**settings), method, report=[], **solved)
    with_bias = merge(*arguments, statistics(bias=True, **settings), method, report=[], **solved)
    for name in plain:
        torch.testing.assert_close(plain[name], with_bias[name], rtol=1e-5, atol=1e-6)
    if form == "root":
        dense = merge(*arguments, statistics(), method, report=[], **solved)
        for name in plain:
            torch.testing.assert_close(plain[name], dense[name], rtol=1e-4, atol=1e-5)


def test_transposed_layers_and_embeddings() -> None:
    """An embedding has a diagonal A: rows that one model alone has seen are that model's."""
    torch.manual_seed(2)
    models = [nn.Embedding(4, 3).double() for _ in range(2)]
    data = [torch.tensor([[0, 1], [1, 1]]), torch.tensor([[2, 1], [2, 1]])]
    found = [
        collect(
            m, Gaussian(lambda m, x: m(x).mean(1)), [x], convention="mats", kinds=["embedding"], storage="F64"
        )
        for m, x in zip(models, data, strict=True)
    ]
    weights = [m.weight.detach() for m in models]
    merged = merge({"weight": weights[0]}, [{"weight": w} for w in weights], found, "regmean", report=[])[
        "weight"
    ]
    torch.testing.assert_close(merged[0], weights[0][0])
    torch.testing.assert_close(merged[2], weights[1][2])
    torch.testing.assert_close(
        merged[1], (3 * weights[0][1] + 2 * weights[1][1]) / 5 * 1.0, rtol=0.2, atol=0.2
    )
    torch.testing.assert_close(merged[3], (weights[0][3] + weights[1][3]) / 2)  # seen by none: the mean


def test_containers_dtypes_and_in_place(tmp_path: Path) -> None:
    base, models, _ = family()
    found = statistics(storage="F32")
    for k, one in enumerate(found):
        one.save(tmp_path / str(k))
    halves = [copy.deepcopy(m).bfloat16() for m in (base, *models)]
    module = merge(halves[0], halves[1:], found, "mats", report=[])
    states = merge(
        state(halves[0]),
        [state(h) for h in halves[1:]],
        [tmp_path / str(k) for k in range(3)],
        "mats",
        report=[],
    )
    target = {name: tensor.clone() for name, tensor in state(halves[0]).items()}
    stats = [tmp_path / str(k) for k in range(3)]
    assert tvfast.merge_(target, [state(h) for h in halves[1:]], "mats", stats=stats, report=[]) is target
    assert isinstance(module, Net)
    for name, tensor in state(module).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, states[name])
        assert torch.equal(tensor, target[name])
    exact = merge(state(base), [state(m) for m in models], found, "mats", report=[])
    torch.testing.assert_close(
        state(module)["out.weight"].double(), exact["out.weight"], rtol=0.05, atol=0.02
    )


def test_scale() -> None:
    base, models, _ = family()
    arguments = (state(base), [state(m) for m in models], statistics())
    for method in ("regmean", "mats", "kfac"):
        one = merge(*arguments, method, report=[])
        half = merge(*arguments, method, scale=0.5, report=[])
        for name, theta in state(base).items():
            origin = theta if method == "kfac" else torch.zeros_like(theta)
            torch.testing.assert_close(half[name], origin + 0.5 * (one[name] - origin), rtol=1e-6, atol=1e-7)


def test_matrices_without_factors_warn_unless_reported() -> None:
    base, models, _ = family()
    found = statistics()
    with pytest.warns(
        UserWarning, match=r"'regmean' averaged matrices without factors: 1 tensor \(embed.weight\)"
    ):
        merge(base, models, found, "regmean")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(base, models, found, "regmean", report=[])


# -- RegMean++ ---------------------------------------------------------------------------------------


def test_regmean_pp_layer_by_layer() -> None:
    """Each layer's second moments come from the model whose earlier layers are merged already."""
    base, models, data = family()
    merged = merge(
        base, models, method="regmean_pp", batches=[[x] for x in data], weights=WEIGHTS, shrink=0.8
    )
    mean = {
        name: sum(c * state(m)[name] for c, m in zip(WEIGHTS, models, strict=True)) / sum(WEIGHTS)
        for name in state(base)
    }
    expected = copy.deepcopy(base)
    expected.load_state_dict(mean)
    for layer in ("first", "second", "out"):
        inputs: list[Tensor] = []
        hook = expected.get_submodule(layer).register_forward_hook(lambda m, a, o: inputs.append(a[0]))  # noqa: B023
        grams = []
        with torch.no_grad():
            for x in data:
                inputs.clear()
                expected(x)
                rows = inputs[0].reshape(-1, 5)
                gram = rows.T @ rows / len(rows)
                grams.append(0.8 * gram + 0.2 * torch.diag(gram.diagonal()))
        hook.remove()
        own = [state(m)[f"{layer}.weight"] for m in models]
        left = sum(c * g for c, g in zip(WEIGHTS, grams, strict=True))
        right = sum(c * w @ g for c, w, g in zip(WEIGHTS, own, grams, strict=True))
        expected.get_submodule(layer).weight.data = torch.linalg.solve(left, right.T).T  # type: ignore[union-attr,arg-type]
    for name, tensor in state(merged).items():
        torch.testing.assert_close(tensor, state(expected)[name], rtol=1e-9, atol=1e-11)
    assert all(
        torch.equal(a, b) for a, b in zip(state(base).values(), state(family()[0]).values(), strict=True)
    )


def test_regmean_pp_in_blocks_runs_each_models_own_block() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor, *, gain: float) -> Tensor:
            found: Tensor = x + gain * self.down(torch.relu(self.up(x)))
            return found

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x, gain=0.5)
            return x

    torch.manual_seed(4)
    models = [Stack().double() for _ in range(2)]
    data = [torch.randn(40, 4, dtype=torch.float64) for _ in models]
    merged = merge(
        models[0], models, method="regmean_pp", batches=[[x] for x in data], blocks=["layers.*"], shrink=1.0
    )

    def gram(x: Tensor) -> Tensor:
        return x.T @ x / len(x)

    def solved(name: str, grams: list[Tensor]) -> Tensor:
        own = [state(m)[name] for m in models]
        right = sum(w @ g for w, g in zip(own, grams, strict=True))
        return torch.linalg.solve(sum(grams), right.T).T  # type: ignore[union-attr,arg-type]

    with torch.no_grad():
        inputs = data
        for k in range(2):
            own = [model.layers[k] for model in models]
            up = solved(f"layers.{k}.up.weight", [gram(x) for x in inputs])
            hidden = [torch.relu(block.up(x)) for block, x in zip(own, inputs, strict=True)]
            down = solved(f"layers.{k}.down.weight", [gram(h) for h in hidden])
            torch.testing.assert_close(merged.layers[k].up.weight, up, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(merged.layers[k].down.weight, down, rtol=1e-8, atol=1e-10)
            inputs = [merged.layers[k](x, gain=0.5) for x in inputs]


# -- bad input ---------------------------------------------------------------------------------------


def test_bad_input_is_named(tmp_path: Path) -> None:
    base, models, data = family()
    found = statistics()
    states = [state(m) for m in models]

    def refused(error: type[Exception], match: str, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(error, match=match):
            merge(state(base), states, *args, **{"report": [], **kwargs})

    refused(ArgumentError, "method is 'ties'; expected one of kfac, mats, regmean, regmean_pp", found, "ties")
    refused(ArgumentError, "stats is None; expected one per model", None, "mats")
    refused(ArgumentError, "stats has 2 items for 3 models", found[:2], "mats")
    refused(ArgumentError, "stats has 1 items", found[0], "mats")
    refused(ArgumentError, r"stats\[0\] is a int", [1, 2, 3], "mats")
    refused(StatisticsError, "nothing-here", [tmp_path / "nothing-here", *found[1:]], "mats")
    refused(ArgumentError, "does not take 'ridge'", found, "regmean", ridge=1.0)
    refused(UnknownNameError, "'rigde' does not exist; did you mean 'ridge'", found, "kfac", rigde=1.0)
    refused(ArgumentError, "shrink is 1.5", found, "regmean", shrink=1.5)
    refused(ArgumentError, "iterations is 2.5", found, "mats", iterations=2.5)
    refused(ArgumentError, "tolerance is -1", found, "mats", tolerance=-1.0)
    refused(ArgumentError, "weights are", found, "mats", weights=[1, -1, 1])
    refused(ArgumentError, "takes stats, not batches", found, "mats", batches=[data])
    refused(ArgumentError, "takes no stats", found, "regmean_pp")
    with pytest.raises(ArgumentError, match="takes no stats; expected None"):
        tvfast.merge(state(base), states, "linear", stats=found)
    with pytest.raises(ArgumentError, match="reads no scores"):
        tvfast.merge(state(base), states, "mats", stats=found, scores=states)
    one = found[0].read("out.weight", torch.float64)
    alien = {"other.weight": one}
    refused(
        StatisticsError,
        r"stats\[1\] has parameter 'other.weight', which the models have not",
        [found[0], alien, found[2]],
        "mats",
    )
    wrong = {"out.weight": one.replaced(shape=(3, 6))}
    refused(
        StatisticsError, r"'out.weight' has shape \[3, 5\], its statistics have \[3, 6\]", [wrong] * 3, "mats"
    )
    broken = Dense(torch.full((5, 5), float("nan")).double())
    refused(
        SolveError,
        "tensor 'out.weight'.* NaN or infinity",
        [{"out.weight": one.replaced(a=broken)}] * 3,
        "mats",
    )
    zero = {"out.weight": one.replaced(a=Dense(torch.zeros(5, 5).double()))}
    refused(SolveError, "tensor 'out.weight': the matrix is zero", [zero] * 3, "regmean")
    some = [
        {"out.weight": one},
        {"out.weight": one},
        {"first.weight": found[2].read("first.weight", torch.float64)},
    ]
    report: list[str] = []
    merge(state(base), states, some, "mats", report=report)
    assert any("no factors of some of the models: 2 tensors" in line for line in report)
    with pytest.raises(ArgumentError, match="batches is None for 3 models"):
        merge(base, models, method="regmean_pp")
    with pytest.raises(ArgumentError, match=r"batches\[0\] is an iterator"):
        merge(base, models, method="regmean_pp", batches=[iter([x]) for x in data])
    with pytest.raises(ArgumentError, match=r"batches\[0\] is empty"):
        merge(base, models, method="regmean_pp", batches=[[], [], []])
    with pytest.raises(ArgumentError, match="in which no linear layer is"):
        merge(base, models, method="regmean_pp", batches=[[x] for x in data], blocks=["nowhere"])
    with pytest.raises(ArgumentError, match="runs modules"):
        merge(state(base), states, method="regmean_pp", batches=[[x] for x in data])


def test_singular_layers_are_reported() -> None:
    base, models, _ = family()
    probe = Gaussian(lambda model, batch: model(batch))
    found = [collect(m, probe, [torch.zeros(1, 1, dtype=torch.long)], convention="mats") for m in models]
    report: list[str] = []
    merge(base, models, found, "regmean", shrink=1.0, report=report)
    assert any(line.startswith("regmean: first.weight: singular (reciprocal condition") for line in report)
