"""A small network, tasks of its own, and a tuning that draws random numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Task = tuple[Tensor, Tensor]


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.25), nn.Linear(9, 3))


def task(seed: int, n: int = 24) -> Task:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=drawn), torch.randint(3, (n,), generator=drawn)


def tasks() -> dict[str, Task]:
    return {"red": task(1), "green": task(2), "blue": task(3)}


def tune(model: nn.Module, data: Task) -> None:
    """Two epochs of AdamW on shuffled batches, with dropout."""
    model.train()
    inputs, labels = data
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        for rows in torch.randperm(len(labels)).split(8):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimiser.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
