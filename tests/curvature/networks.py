"""A small network with every kind of module that has curvature, and explicit factors of it in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Attention(nn.Module):
    """Tokens in, features out; q and k share their input, `out` has no bias, 7 and 5 are odd."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.cls = nn.Parameter(torch.randn(1, 1, 6))
        self.q = nn.Linear(6, 7)
        self.k = nn.Linear(6, 7)
        self.norm = nn.LayerNorm(7)
        self.out = nn.Linear(7, 5, bias=False)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.embed(tokens)
        h = torch.cat([self.cls.expand(len(h), -1, -1), h], 1)
        z = self.norm(self.q(h) * torch.tanh(self.k(h)))
        found: Tensor = self.out(z)
        if mask is None:
            return found.mean(1)
        kept = mask[..., None].to(found.dtype)
        return (found * kept).sum(1) / kept.sum(1)


def network() -> Attention:
    torch.manual_seed(5)
    return Attention().double()


def tokens(n: int = 12, r: int = 4) -> Tensor:
    return torch.randint(0, 11, (n, r), generator=torch.Generator().manual_seed(n))


def features(model: nn.Module, batch: Any) -> Tensor:
    found: Tensor = model(**batch) if isinstance(batch, dict) else model(batch)
    return found


class Recorded:
    """Inputs, and gradients at outputs, of named modules for one sample and direction, by autograd."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = model
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        for name in names:
            model.get_submodule(name).register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self.inputs[name] = args[0].detach()
            self.outputs[name] = output

        return keep

    def gradients(self, batch: Any, direction: Tensor) -> dict[str, Tensor]:
        """Gradients of f · v at each module's output."""
        f = features(self.model, batch)
        found = torch.autograd.grad(f, list(self.outputs.values()), direction)
        return dict(zip(self.outputs, found, strict=True))


def per_sample_gradients(model: nn.Module, x: Tensor, direction: Tensor, name: str) -> Tensor:
    """d (f_n · v_n) / d parameter for every sample n, [N, ...], by torch.func."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def value(one: dict[str, Tensor], sample: Tensor, v: Tensor) -> Tensor:
        return (functional_call(model, {**parameters, **one}, (sample[None],))[0] * v).sum()

    gradient = torch.func.grad(value)
    found = torch.func.vmap(gradient, in_dims=(None, 0, 0))({name: parameters[name]}, x, direction)
    return found[name]
