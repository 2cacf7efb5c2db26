"""Small networks with every way in which a parameter can be used, and plain per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

Batch = dict[str, Tensor]


class Scale(nn.Module):
    """As the norms of language models: a weight that is no layer of torch's."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Shift(nn.Module):
    """Holds a parameter that a module inside holds, too, as heads of masked language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.bias = self.inner.bias

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x)
        return found


class Network(nn.Module):
    """Embeddings, linear layers, norms, a convolution, a layer called twice, in-place work, a tied head."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 9)
        self.activation = nn.ReLU(inplace=True)
        self.scale = Scale(9)
        self.down = nn.Linear(9, 6, bias=False)
        self.twice = nn.Linear(6, 6)
        self.mix = nn.Conv1d(6, 5, 3, padding=1)
        self.back = nn.Linear(5, 6)
        self.unused = nn.Linear(3, 2)
        self.outside = nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.shift = Shift()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(self.scale(self.activation(self.up(self.norm(x)))))
        x = x + torch.tanh(self.twice(torch.tanh(self.twice(x))))
        x = x + self.back(self.mix(x.transpose(1, 2)).transpose(1, 2))
        return self.head(self.shift(x * self.outside))


def batch_of(n: int, n_tokens: int = 5, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "tokens": torch.randint(0, 11, (n, n_tokens), generator=generator),
        "labels": torch.randint(0, 11, (n, n_tokens), generator=generator),
    }


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """Sum over tokens of each sample's cross entropy, [N]."""
    logits = model(batch["tokens"])
    return functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none").sum(1)


def class_logits(model: nn.Module, batch: Batch) -> Tensor:
    """[N, C]"""
    return model(batch["tokens"]).mean(1)


def sample_gradients(
    model: nn.Module, batch: Batch, objective: Callable[[nn.Module, Any], Tensor]
) -> list[dict[str, Tensor]]:
    """Gradients of each sample's objective by torch.func, every sample alone, in float64."""
    double = {n: p.detach().double() for n, p in model.named_parameters()}
    buffers = {n: b.detach() for n, b in model.named_buffers()}

    def of_one(parameters: dict[str, Tensor], one: Batch) -> Tensor:
        def run(tokens: Tensor) -> Tensor:
            found: Tensor = functional_call(model, {**parameters, **buffers}, (tokens,))
            return found

        return objective(run, one).sum()  # type: ignore[arg-type]

    ones = {key: value.unsqueeze(1) for key, value in batch.items()}
    found = vmap(grad(of_one), in_dims=(None, 0))(double, ones)
    return [{name: g[k] for name, g in found.items()} for k in range(len(batch["tokens"]))]
