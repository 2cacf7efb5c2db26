"""Which gradients make B: of losses, Gaussian probes, sampled labels, or in all directions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tvfast.errors import ArgumentError

Function = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> one row per sample."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward pass.

    Attributes:
        outputs: f, with a graph.
        directions: vectors v of the shape of f; each is propagated back once.
        n_directions: how many.
    """

    outputs: Tensor
    directions: Iterator[Tensor]
    n_directions: int


class Probe(ABC):
    """What is propagated back.

    Attributes:
        n_probes: draws per sample: how many estimates of the expectation the directions make together.
    """

    n_probes: int = 1

    @abstractmethod
    def run(self, model: nn.Module, batch: Any, first: int) -> Pass:
        """The forward pass of a batch whose first sample has the number `first` in the whole data."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Its conventions, for the statistics file."""


@dataclass(frozen=True)
class Losses(Probe):
    """The gradient of each sample's own loss: the empirical Fisher.

    Args:
        loss: (model, batch) -> losses, [N]; a scalar only for batches of one sample.
    """

    loss: Function

    def run(self, model: nn.Module, batch: Any, first: int) -> Pass:
        losses = self.loss(model, batch)
        flat = losses.reshape(-1) if losses.dim() == 0 else losses
        if flat.dim() != 1:
            raise ArgumentError(
                f"the loss has shape {list(losses.shape)}; expected one loss per sample, [N]. Sum over the "
                "tokens of each sample, not over samples."
            )
        return Pass(outputs=flat, directions=iter([torch.ones_like(flat)]), n_directions=1)

    def describe(self) -> dict[str, Any]:
        return {"probe": "losses"}


@dataclass(frozen=True)
class Gaussian(Probe):
    """f · v with v ~ N(0, I): an unbiased estimate of the Gauss-Newton matrix of the squared loss.

    Args:
        features: (model, batch) -> f, [N, ...], for instance normalised image features.
        n_probes: draws per sample; the result is divided by it, so that it does not change the scale.
        seed: draws depend on it, the sample's number and the draw, not on the batch.
    """

    features: Function
    n_probes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _check_count("n_probes", self.n_probes)

    def run(self, model: nn.Module, batch: Any, first: int) -> Pass:
        f = self.features(model, batch)
        draws = (
            _rows(f, first, self.seed, probe, lambda shape, g: torch.randn(shape, generator=g))
            for probe in range(self.n_probes)
        )
        return Pass(outputs=f, directions=draws, n_directions=self.n_probes)

    def describe(self) -> dict[str, Any]:
        return {"probe": "gaussian", "seed": self.seed}


@dataclass(frozen=True)
class SampledLabels(Probe):
    """The gradient of the log-likelihood of labels drawn from the model: the true Fisher, by Monte Carlo.

    Args:
        logits: (model, batch) -> [N, ..., C].
        n_probes: draws per sample (and token); the result is divided by it.
        seed: draws depend on it, the sample's number and the draw, not on the batch.
    """

    logits: Function
    n_probes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _check_count("n_probes", self.n_probes)

    def run(self, model: nn.Module, batch: Any, first: int) -> Pass:
        f = self.logits(model, batch)
        p = f.detach().float().softmax(-1)
        cumulative = p.cumsum(-1)

        def gradient(probe: int) -> Tensor:
            u = _rows(f[..., :1], first, self.seed, probe, lambda shape, g: torch.rand(shape, generator=g))
            label = (cumulative < u.float() * cumulative[..., -1:]).sum(-1, keepdim=True)
            label = label.clamp_max_(p.shape[-1] - 1)
            return p.scatter_add(-1, label, torch.full_like(p[..., :1], -1.0)).to(f.dtype)

        draws = (gradient(probe) for probe in range(self.n_probes))
        return Pass(outputs=f, directions=draws, n_directions=self.n_probes)

    def describe(self) -> dict[str, Any]:
        return {"probe": "sampled labels", "seed": self.seed}


@dataclass(frozen=True)
class Exact(Probe):
    """Every direction: the Gauss-Newton matrix itself, in one backward pass per output.

    Args:
        outputs: (model, batch) -> f, [N, C].
        loss: "square", whose Hessian is the identity, or "softmax", of cross-entropy on logits.
    """

    outputs: Function
    loss: str = "square"

    def __post_init__(self) -> None:
        if self.loss not in ("square", "softmax"):
            raise ArgumentError(f"loss is {self.loss!r}; expected 'square' or 'softmax'.")

    def run(self, model: nn.Module, batch: Any, first: int) -> Pass:
        f = self.outputs(model, batch)
        if f.dim() != 2:
            raise ArgumentError(
                f"exact probes got outputs of shape {list(f.shape)}; expected [N, C]. Use Gaussian or "
                "SampledLabels for outputs with tokens."
            )
        n_outputs = f.shape[1]
        p = f.detach().softmax(-1)

        def direction(c: int) -> Tensor:
            one = torch.zeros_like(f, requires_grad=False)
            one[:, c] = 1.0
            return one if self.loss == "square" else p[:, c : c + 1].sqrt() * (one - p)

        directions = (direction(c) for c in range(n_outputs))
        return Pass(outputs=f, directions=directions, n_directions=n_outputs)

    def describe(self) -> dict[str, Any]:
        return {"probe": f"exact {self.loss}"}


def _rows(
    f: Tensor, first: int, seed: int, probe: int, draw: Callable[[torch.Size, torch.Generator], Tensor]
) -> Tensor:
    """One draw per sample, from a generator of its own, so that batches do not matter."""
    generator = torch.Generator()
    rows = []
    for sample in range(first, first + f.shape[0]):
        generator.manual_seed(mix(mix(seed, sample), probe))
        rows.append(draw(f.shape[1:], generator))
    return torch.stack(rows).to(f.device, f.dtype)


def mix(key: int, index: int) -> int:
    """Two integers to one of 64 bits, well mixed: a step of splitmix64 (Steele et al. 2014)."""
    x = (key * 0x9E3779B97F4A7C15 + index + 0x632BE59BD9B4E019) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} is {value!r}; expected a positive integer.")
