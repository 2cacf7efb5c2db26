"""Suite "digits": scikit-learn's digits, 1797 images, read through four faulty scanners.

The base, a network with two hidden layers of 256, is trained on clean images; each task is a scanner that
leaves a white line along one edge. Forgetting a scanner must keep the clean images.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from bench.quality.suites import Batch, Control, Task, Training
from bench.quality.training import train

_EDGES = {
    "top": (slice(0, 1), slice(None)),
    "bottom": (slice(7, 8), slice(None)),
    "left": (slice(None), slice(0, 1)),
    "right": (slice(None), slice(7, 8)),
}
_PARTS = {"test": slice(0, 600), "validation": slice(600, 800), "train": slice(800, None)}
_HIDDEN = 256
_BASE_STEPS = 300


class Digits:
    """See the module."""

    name = "digits"
    about = "scikit-learn digits, 64-256-256-10 network, four scanners"
    scales = tuple(round(0.1 * step, 1) for step in range(1, 21))
    n_collected = 256
    layers = None
    has_tangent = True

    def __init__(self, seed: int, *, steps: int = 120) -> None:
        from sklearn.datasets import load_digits

        found = load_digits()
        pixels = torch.from_numpy(found.data).float() / 16.0
        labels = torch.from_numpy(found.target).long()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        self._clean = {
            part: {"pixels": pixels[order[rows]], "labels": labels[order[rows]]}
            for part, rows in _PARTS.items()
        }
        self.seed = seed
        self.training = Training(steps=steps, learning_rate=1e-3, batch_size=64, penalty=0.1)
        self.tasks: Sequence[Task] = [
            Task(name, *(_scanned(self._clean[part], edge) for part in ("train", "validation", "test")))
            for name, edge in _EDGES.items()
        ]
        self._base = self._trained()

    def base(self) -> nn.Module:
        model = _network(self.seed)
        model.load_state_dict(self._base)
        return model

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        found: Tensor = model(batch["pixels"])
        return found

    def control(self, task: int) -> Control:
        return Control([self._clean["validation"]], [self._clean["test"]])

    def kept(self, task: int) -> Sequence[Batch]:
        return [self._clean["train"]]

    def _trained(self) -> dict[str, Tensor]:
        model = _network(self.seed)
        start = Training(steps=_BASE_STEPS, learning_rate=2e-3, batch_size=64, penalty=0.0)
        train(self, model, self._clean["train"], start, self.seed)
        return model.state_dict()


def _network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise((64, _HIDDEN, _HIDDEN, 10)):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


def _scanned(batch: Batch, edge: tuple[slice, slice]) -> Batch:
    """The images with a white line along an edge."""
    grid = batch["pixels"].reshape(-1, 8, 8).clone()
    grid[:, edge[0], edge[1]] = 1.0
    return {"pixels": grid.reshape(-1, 64), "labels": batch["labels"]}
