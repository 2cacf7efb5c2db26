"""ξ against its definition, and no more evaluations than it needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tvfast
from tvfast import analysis
from tvfast.errors import ArgumentError, EvaluationError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 4))


def task_vectors(model: nn.Module) -> list[dict[str, Tensor]]:
    return [{n: 0.4 * torch.randn_like(t) for n, t in model.state_dict().items()} for _ in range(2)]


AXES = ([-1.0, 0.0, 0.5, 2.0], [0.0, 1.0, -0.5])


@pytest.mark.parametrize("scores", [True, False])
def test_it_is_the_definition(scores: bool) -> None:
    model = network()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    deltas, data = task_vectors(model), [torch.randn(40, 5), torch.randn(30, 5)]

    def classes(first: float, second: float, task: int) -> Tensor:
        merged = {n: t + first * deltas[0][n] + second * deltas[1][n] for n, t in base.items()}
        return torch.func.functional_call(network(), merged, (data[task],)).argmax(-1)

    with tvfast.LiveMerge(model, deltas=deltas) as live:
        found = analysis.disentanglement(
            live,
            lambda task: model(data[task]) if scores else model(data[task]).argmax(-1),
            first=AXES[0],
            second=AXES[1],
        )
    for i, one in enumerate(AXES[0]):
        for j, two in enumerate(AXES[1]):
            expected = [
                float((classes(one, 0.0, 0) != classes(one, two, 0)).double().mean()),
                float((classes(0.0, two, 1) != classes(one, two, 1)).double().mean()),
            ]
            assert found.by_task[:, i, j].tolist() == pytest.approx(expected)
            assert float(found.error[i, j]) == pytest.approx(sum(expected))
    assert float(found.error.max()) > 0.1
    assert found.error[1, 0] == 0.0
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())
    assert 0.0 < found.within(0.2) < 1.0


@pytest.mark.parametrize(
    ("first", "second", "n_forward"),
    [(AXES[0], AXES[1], 2 * 12), ([1.0, 2.0], [3.0], 2 + 1 + 2 * 2), ([0.0], [0.0], 2)],
)
def test_only_needed_evaluations_are_made(first: list[float], second: list[float], n_forward: int) -> None:
    model = network()
    calls: list[int] = []
    live = tvfast.LiveMerge(model, deltas=task_vectors(model))

    def predict(task: int) -> Tensor:
        calls.append(task)
        return model(torch.ones(3, 5))

    found = analysis.disentanglement(live, predict, first=first, second=second)
    assert found.n_forward == len(calls) == n_forward
    assert found.n_merges <= len(first) * len(second) + len(first) + len(second)


def test_tasks_that_do_not_meet_do_not_disturb_each_other() -> None:
    """Two vectors, each on rows that only its own data reach."""
    model = nn.Linear(4, 3, bias=False)
    deltas = [{"weight": torch.zeros(3, 4)} for _ in range(2)]
    deltas[0]["weight"][:, :2], deltas[1]["weight"][:, 2:] = torch.randn(3, 2), torch.randn(3, 2)
    data = [
        torch.cat([torch.randn(20, 2), torch.zeros(20, 2)], 1),
        torch.cat([torch.zeros(20, 2), torch.randn(20, 2)], 1),
    ]
    with tvfast.LiveMerge(model, deltas=deltas) as live:
        found = analysis.disentanglement(live, lambda task: model(data[task]), first=[-2.0, 0.0, 3.0])
    assert found.error.tolist() == [[0.0] * 3] * 3


def test_another_distance() -> None:
    model = network()
    with tvfast.LiveMerge(model, deltas=task_vectors(model)) as live:
        found = analysis.disentanglement(
            live, lambda task: model(torch.ones(2, 5)), first=[1.0],
            distance=lambda left, right: float((left - right).abs().max()),
        )  # fmt: skip
    assert float(found.error) > 0.01


def test_wrong_arguments() -> None:
    model = network()
    deltas = task_vectors(model)
    live = tvfast.LiveMerge(model, deltas=deltas)
    with pytest.raises(ArgumentError, match="merges 1 tasks; expected two"):
        analysis.disentanglement(tvfast.LiveMerge(model, deltas=deltas[:1]), lambda task: torch.ones(1))
    for axis in ([], [float("inf")]):
        with pytest.raises(ArgumentError, match="an axis is empty or has a number that is not finite"):
            analysis.disentanglement(live, lambda task: torch.ones(1), first=axis)
    with pytest.raises(
        EvaluationError, match=r"predict\(0\) returned \[N\] of torch.float32; expected classes"
    ):
        analysis.disentanglement(live, lambda task: torch.ones(3), first=[0.0])
    lengths = iter([3, 3, 4, 4])
    with pytest.raises(EvaluationError, match=r"returned \[4\] at \[1.0, 1.0\], and \[3\] first"):
        analysis.disentanglement(live, lambda task: torch.ones(next(lengths), dtype=torch.long), first=[1.0])


def test_pictures_and_json(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = network()
    with tvfast.LiveMerge(model, deltas=task_vectors(model)) as live:
        found = analysis.disentanglement(live, lambda task: model(torch.randn(8, 5)), first=[-1.0, 0.0, 1.0])
    analysis.draw_disentanglement({"one": found, "two": found}, tmp_path / "map.png", names=("a", "b"))
    assert (tmp_path / "map.png").stat().st_size > 10_000
    assert found.as_json()["by_task"] == found.by_task.tolist()
    assert len(analysis.disentanglement.__kwdefaults__["first"]) == 21
    assert 0.0 in analysis.disentanglement.__kwdefaults__["first"]
