"""A small network and its training loop."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import nn

from tvfast.demo.digits import Images

N_HIDDEN = 512
_BATCH = 64


def network(seed: int) -> nn.Sequential:
    """Two hidden layers, ten outputs, initialised by `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    # made without values first, so that torch's own generator is not advanced
    layers = [
        nn.Linear(n_in, n_out, device="meta").to_empty(device="cpu")
        for n_in, n_out in pairwise((64, N_HIDDEN, N_HIDDEN, 10))
    ]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    with torch.no_grad():
        for layer in layers:
            bound = 1.0 / math.sqrt(layer.in_features)
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)
    return model


def train(model: nn.Module, images: Images, *, steps: int, learning_rate: float, seed: int) -> None:
    """Adam on cross-entropy over all ten digits, in random batches; modifies the model."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for _ in range(steps):
        batch = torch.randint(len(images.digits), (_BATCH,), generator=generator)
        loss = nn.functional.cross_entropy(model(images.pixels[batch]), images.digits[batch])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


def accuracy(model: nn.Module, images: Images) -> float:
    """Share of images whose largest output is their digit, in percent."""
    with torch.inference_mode():
        right = model(images.pixels).argmax(dim=1) == images.digits
    return 100.0 * float(right.to(torch.float64).mean())
