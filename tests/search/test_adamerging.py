"""AdaMerging against the same optimisation through an explicit float64 graph."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import tvfast
from tvfast import search
from tvfast.errors import ArgumentError, EvaluationError

N_TASKS, START, RATE, STEPS = 2, 0.3, 0.02, 25


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))


def task_vectors(model: nn.Module) -> list[dict[str, Tensor]]:
    return [
        {name: 0.5 * torch.randn_like(t) for name, t in model.state_dict().items()} for _ in range(N_TASKS)
    ]


def data() -> list[list[Tensor]]:
    return [list(torch.randn(3, 16, 6)) for _ in range(N_TASKS)]


def by_autograd(
    model: nn.Sequential, deltas: list[dict[str, Tensor]], batches: list[list[Tensor]], layerwise: bool
) -> tuple[Tensor, list[float]]:
    """The definition: θ as a function of w in float64, and Adam on it."""
    groups = ["0", "2"]
    twin = network().double()
    weights = nn.Parameter(
        torch.full((N_TASKS, len(groups)) if layerwise else (N_TASKS,), START, dtype=torch.float64)
    )
    optimiser = torch.optim.Adam([weights], lr=RATE)
    losses = []
    for step in range(STEPS):
        columns = weights if layerwise else weights[:, None].expand(N_TASKS, len(groups))
        merged = {
            name: start.double()
            + sum(columns[k, groups.index(name[0])] * deltas[k][name].double() for k in range(N_TASKS))
            for name, start in model.state_dict().items()
        }
        loss = torch.zeros((), dtype=torch.float64)
        for task in range(N_TASKS):
            inputs = batches[task][step % 3].double()
            probabilities = torch.func.functional_call(twin, merged, (inputs,)).softmax(-1)
            loss = loss - (probabilities * probabilities.log()).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        optimiser.step()
    return weights.detach(), losses


@pytest.mark.parametrize("layerwise", [False, True])
def test_it_follows_autograd(layerwise: bool) -> None:
    model = network()
    deltas, batches = task_vectors(model), data()
    expected, losses = by_autograd(model, deltas, batches, layerwise)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with tvfast.LiveMerge(model, deltas=deltas) as live:
        found = search.adamerging(
            live, lambda task, batch: model(batch), batches, layerwise=layerwise, steps=STEPS,
            learning_rate=RATE,
        )  # fmt: skip
        assert found.coefficients.shape == ((2, 2) if layerwise else (2,))
        torch.testing.assert_close(found.coefficients, expected, rtol=1e-4, atol=1e-5)
        assert found.losses == pytest.approx(losses, rel=1e-5)
        assert found.losses[-1] < found.losses[0]
        assert all(parameter.grad is None for parameter in model.parameters())
        merged = tvfast.merge(
            {n: t for n, t in base.items() if n.startswith("0")},
            [{n: base[n] + d[n] for n in base if n.startswith("0")} for d in deltas],
            "task_arithmetic",
            weights=(found.coefficients[:, 0] if layerwise else found.coefficients).tolist(),
        )
        for name, tensor in merged.items():
            torch.testing.assert_close(model.state_dict()[name], tensor)
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())


def test_what_stops_it() -> None:
    model = network()
    live = tvfast.LiveMerge(model, deltas=task_vectors(model))

    def outputs(task: int, batch: Tensor) -> Tensor:
        return model(batch)

    with pytest.raises(ArgumentError, match="0 steps on 2 tasks"):
        search.adamerging(live, outputs, data(), steps=0)
    with pytest.raises(ArgumentError, match=r"batches\[1\] has no batch"):
        search.adamerging(live, outputs, [data()[0], []])

    def once() -> Iterator[Tensor]:
        yield torch.randn(4, 6)

    with pytest.raises(ArgumentError, match=r"batches\[0\] has no batch"):
        search.adamerging(live, outputs, [once()], steps=2)
    with pytest.raises(EvaluationError, match="step 0: the loss is nan"):
        search.adamerging(live, outputs, [[torch.full((1, 6), torch.nan)]])
    voting = tvfast.LiveMerge(model, deltas=task_vectors(model), method="ties")
    with pytest.raises(ArgumentError, match="elects signs"):
        search.adamerging(voting, outputs, data())


def test_entropy_of_distributions_with_impossible_classes() -> None:
    """0 ln 0 counts 0, in the value and in the gradient."""
    logits = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.5, 0.5]], requires_grad=True)
    few = search.entropy(logits)
    (expected,) = torch.autograd.grad(few, logits)
    masked = torch.tensor([[1.0, -torch.inf, 2.0, -1.0], [0.5, 0.5, -torch.inf, 0.5]], requires_grad=True)
    found = search.entropy(masked)
    assert found == few
    (gradient,) = torch.autograd.grad(found, masked)
    possible = masked.detach() > -torch.inf
    torch.testing.assert_close(gradient[possible].view(2, 3), expected)
    assert not gradient[~possible].any()
    assert search.entropy(torch.tensor([[0.0, -torch.inf]])) == 0.0
    assert search.entropy(torch.tensor([[0.0, -1e6]])) == 0.0
    assert search.entropy(torch.full((1, 2), -torch.inf)).isnan()
