"""Rows of `score`, `kron`, the penalty and MaTS: one linear layer, and what torch needs for the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.buffers import SEED, Buffers
from tvfast import ops
from tvfast.curvature import Curvature, KroneckerPenalty
from tvfast.factors import Dense
from tvfast.factors.merges import mats

Run = Callable[[], object]

LARGEST_SIDE = 4096
N_SAMPLES = 64
N_TOKENS = 128
BLOCK = 64
_SAMPLES_AT_ONCE = 8  # of the per-sample gradients that the baseline holds
_PENALTY = 0.1
_MERGED_SIDE = 1024
_MERGED_ITERATIONS = 100  # of the authors' solver, which has no preconditioner


@dataclass(frozen=True, slots=True)
class Layer:
    """A square layer of at most 4096 a side that fits in the buffers, float32, with data of its own."""

    side: int
    n_samples: int

    @classmethod
    def of(cls, buffers: Buffers) -> Layer:
        side = min(LARGEST_SIDE, math.isqrt(buffers.n_elements) // BLOCK * BLOCK)
        return cls(side, N_SAMPLES if side == LARGEST_SIDE else 2)

    def normal(self, *shape: int, seed: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(SEED + seed))

    def weight(self) -> Tensor:
        return self.normal(self.side, self.side, seed=1)

    def gradients(self) -> Tensor:
        return self.normal(self.n_samples, N_TOKENS, self.side, seed=2)

    def activations(self) -> Tensor:
        return self.normal(self.n_samples, N_TOKENS, self.side, seed=3)

    def second_moment(self, seed: int) -> Tensor:
        square = self.normal(self.side, self.side, seed=seed) / self.side
        return square + square.T

    def blocks(self, seed: int) -> Tensor:
        square = self.normal(self.side // BLOCK, BLOCK, BLOCK, seed=seed) / BLOCK
        return square + square.mT


def score_elementwise(buffers: Buffers, n_threads: int) -> Run:
    """bfloat16 gradient and weight of half the buffers' elements, whose float32 scores are as many bytes."""
    half = buffers.n_elements // 2
    gradient, weight = (model.view(-1)[:half] for model in buffers.models[:2])
    total = buffers.out.view(torch.float32).view(-1).zero_()
    return lambda: ops.score(gradient, weight, out=total, n_threads=n_threads)


def score_layer(buffers: Buffers, n_threads: int) -> Run:
    layer = Layer.of(buffers)
    e, a, theta = layer.gradients(), layer.activations(), layer.weight()
    total = torch.zeros_like(theta)
    return lambda: ops.score(e, theta, activations=a, out=total, n_threads=n_threads)


def sample_gemms(buffers: Buffers, n_threads: int) -> Run:
    """The per-sample gradients alone, each into the same memory."""
    layer = Layer.of(buffers)
    e, a = layer.gradients(), layer.activations()
    gradient = torch.zeros(layer.side, layer.side)

    def run() -> None:
        for one, other in zip(e, a, strict=True):
            torch.mm(one.T, other, out=gradient)

    return run


def vmapped_gradients(buffers: Buffers, n_threads: int) -> Run:
    """Per-sample gradients by torch.func, some samples at a time, then |θ G| summed over samples."""
    layer = Layer.of(buffers)
    e, a, theta = layer.gradients(), layer.activations(), layer.weight()
    total = torch.zeros_like(theta)

    def loss(weight: Tensor, inputs: Tensor, cotangent: Tensor) -> Tensor:
        return (torch.nn.functional.linear(inputs, weight) * cotangent).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def run() -> None:
        for start in range(0, layer.n_samples, _SAMPLES_AT_ONCE):
            part = slice(start, start + _SAMPLES_AT_ONCE)
            total.add_((gradients(theta, a[part], e[part]) * theta).abs_().sum(0))

    return run


def kron_blocks(buffers: Buffers, n_threads: int) -> Run:
    layer = Layer.of(buffers)
    x, a, b = layer.weight(), layer.blocks(4), layer.blocks(5)
    out = torch.zeros_like(x)
    return lambda: ops.kron(x, a, b, block=BLOCK, out=out, n_threads=n_threads)


def gemm_of_as_many_operations(buffers: Buffers, n_threads: int) -> Run:
    """One matrix product with the operations of `kron_blocks`: its rate is what the processor can do."""
    layer = Layer.of(buffers)
    left = layer.normal(layer.side, 2 * BLOCK, seed=6)
    right = layer.normal(2 * BLOCK, layer.side, seed=7)
    out = torch.zeros(layer.side, layer.side)
    return lambda: torch.mm(left, right, out=out)


def penalty_of_module(buffers: Buffers, n_threads: int) -> Run:
    """`KroneckerPenalty.add_gradients`: the value, and the gradient added to `.grad`."""
    layer = Layer.of(buffers)
    base, model = (nn.Linear(layer.side, layer.side, bias=False) for _ in range(2))
    a, b = (Dense(layer.second_moment(seed)) for seed in (4, 5))
    one = Curvature("weight", tuple(base.weight.shape), a, b, None, None, False, 1.0)
    found = KroneckerPenalty({"weight": one}, base, scale=_PENALTY)
    model.weight.grad = torch.zeros_like(model.weight)
    return lambda: found.add_gradients(model)


def penalty(buffers: Buffers, n_threads: int) -> Run:
    """Value and gradient of the penalty, the gradient added to a bfloat16 one."""
    layer = Layer.of(buffers)
    x, a, b = layer.weight(), layer.second_moment(4), layer.second_moment(5)
    gradient = torch.zeros(x.shape, dtype=torch.bfloat16)
    return lambda: ops.kron(x, a, b, out=gradient, accumulate=True, scale=2 * _PENALTY, n_threads=n_threads)


def two_gemms(buffers: Buffers, n_threads: int) -> Run:
    layer = Layer.of(buffers)
    x, a, b = layer.weight(), layer.second_moment(4), layer.second_moment(5)
    half, product = torch.zeros_like(x), torch.zeros_like(x)

    def run() -> None:
        torch.mm(x, a, out=half)
        torch.mm(b, half, out=product)

    return run


def penalty_by_autograd(buffers: Buffers, n_threads: int) -> Run:
    """trace(B X A Xᵀ) and its gradient, as the authors' code has it."""
    layer = Layer.of(buffers)
    x, a, b = layer.weight().requires_grad_(), layer.second_moment(4), layer.second_moment(5)

    def run() -> None:
        x.grad = None
        (_PENALTY * torch.trace(b @ x @ a @ x.T)).backward()  # type: ignore[no-untyped-call]

    return run


@dataclass(frozen=True, slots=True)
class _Merged:
    """Two models of a layer with the factors of each, eigenvalues falling as 1 / k."""

    weights: list[Tensor]
    a: list[Dense]
    b: list[Dense]

    @classmethod
    def of(cls, buffers: Buffers) -> _Merged:
        layer = Layer.of(buffers)
        side = min(layer.side, _MERGED_SIDE)

        def moment(seed: int) -> Dense:
            turned = torch.linalg.qr(layer.normal(side, side, seed=seed))[0]
            rows = layer.normal(2 * side, side, seed=seed + 100) @ (
                turned * torch.arange(1.0, side + 1).rsqrt()[:, None]
            )
            return Dense(rows.T @ rows / len(rows))

        weights = [layer.normal(side, side, seed=seed) for seed in (10, 11)]
        return cls(weights, [moment(12), moment(13)], [moment(14), moment(15)])


def mats_layer(buffers: Buffers, n_threads: int) -> Run:
    """MaTS of two models, to a residual of 1e-5."""
    given = _Merged.of(buffers)
    start = (given.weights[0] + given.weights[1]) / 2
    return lambda: mats(given.weights, given.a, given.b, start=start, coefficients=[1.0, 1.0])


def mats_without_preconditioner(buffers: Buffers, n_threads: int) -> Run:
    """The authors' way: so many conjugate gradients from the mean, whatever the residual."""
    given = _Merged.of(buffers)
    pairs = list(zip(given.a, given.b, strict=True))

    def apply(x: Tensor) -> Tensor:
        return sum((b.matrix @ (x @ a.matrix) for a, b in pairs), torch.zeros_like(x))

    def run() -> Tensor:
        x = (given.weights[0] + given.weights[1]) / 2
        residual = sum(
            (b.matrix @ ((w - x) @ a.matrix) for w, (a, b) in zip(given.weights, pairs, strict=True)),
            torch.zeros_like(x),
        )
        direction, squares = residual.clone(), (residual * residual).sum()
        for _ in range(_MERGED_ITERATIONS):
            product = apply(direction)
            step = squares / (direction * product).sum()
            x = x + step * direction
            residual = residual - step * product
            renewed = (residual * residual).sum()
            direction, squares = residual + renewed / squares * direction, renewed
        return x

    return run
