"""What an experiment is about: a base network, tasks with data, and what is to stay when one is forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
"""Inputs by name and the right classes as "labels"; the first dimension is the sample."""


@dataclass(frozen=True, slots=True)
class Task:
    """Data of one task. Validation chooses λ, test is only reported."""

    name: str
    train: Batch
    validation: Batch
    test: Batch


@dataclass(frozen=True, slots=True)
class Control:
    """What must not be lost when a task is forgotten."""

    validation: Sequence[Batch]
    test: Sequence[Batch]


@dataclass(frozen=True, slots=True)
class Training:
    """Adam from the base; `penalty` is TAK's λ, found on a seed that is not reported."""

    steps: int
    learning_rate: float
    batch_size: int
    penalty: float


class Suite(Protocol):
    """One base and its tasks, from one seed."""

    name: str
    about: str
    tasks: Sequence[Task]
    training: Training
    scales: Sequence[float]  # the grid of λ
    n_collected: int  # samples of a task that statistics are of
    layers: Sequence[str] | None  # patterns of weights with Kronecker factors; None: all
    has_tangent: bool  # whether the linearised network is trained, too

    def base(self) -> nn.Module:
        """θ₀: a new module."""

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits, [N, C]."""

    def control(self, task: int) -> Control:
        """What is to stay when a task is forgotten."""

    def kept(self, task: int) -> Sequence[Batch]:
        """Training data of the control, for the curvature that protects it."""


def n_samples(batch: Batch) -> int:
    return len(batch["labels"])


def cut(batch: Batch, rows: slice | Tensor) -> Batch:
    """Some samples."""
    return {name: tensor[rows] for name, tensor in batch.items()}


def batches(batch: Batch, size: int, most: int | None = None) -> Iterator[Batch]:
    """The first `most` samples, `size` at a time."""
    n = n_samples(batch) if most is None else min(most, n_samples(batch))
    for start in range(0, n, size):
        yield cut(batch, slice(start, min(start + size, n)))


def joined(parts: Sequence[Batch]) -> Batch:
    """The samples of all parts."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
