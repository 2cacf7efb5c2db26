"""Rows of one square linear layer: Kronecker products and scores from per-sample gradients, float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.buffers import SEED
from bench.gpu import baselines
from bench.gpu.limits import Cost
from bench.gpu.registry import Goal, GpuRow, Place, Ready, against_limit
from tvfast import ops

BLOCK = 64
_PENALTY = 0.1


@dataclass(frozen=True, slots=True)
class _Layer:
    """Operands of one layer of `side` x `side`, drawn on the device."""

    place: Place

    @property
    def side(self) -> int:
        return self.place.shapes.side

    def normal(self, *shape: int, seed: int) -> Tensor:
        generator = torch.Generator(self.place.device).manual_seed(SEED + seed)
        return torch.randn(*shape, generator=generator, device=self.place.device)

    def weight(self) -> Tensor:
        return self.normal(self.side, self.side, seed=1)

    def samples(self, seed: int) -> Tensor:
        """[N, R, side]"""
        return self.normal(self.place.shapes.n_samples, self.place.shapes.n_tokens, self.side, seed=seed)

    def blocks(self, seed: int) -> Tensor:
        square = self.normal(self.side // BLOCK, BLOCK, BLOCK, seed=seed) / BLOCK
        return square + square.mT

    def second_moment(self, seed: int) -> Tensor:
        square = self.normal(self.side, self.side, seed=seed) / self.side
        return square + square.T


def _blocks_cost(side: int) -> Cost:
    """X in and P out; two products by blocks and the products of the dot."""
    return Cost(4 * (side**2 + 2 * side * BLOCK), 4 * side**2, side**2 * (4 * BLOCK + 2))


def _dense_cost(side: int) -> Cost:
    """X, A, B in and P out; two products and the dot."""
    return Cost(4 * 3 * side**2, 4 * side**2, 4 * side**3 + 2 * side**2)


def _score_cost(place: Place) -> Cost:
    """Samples and θ in, the scores read and written; every sample's gradient."""
    shapes = place.shapes
    n_pairs = shapes.n_samples * shapes.n_tokens
    n_entries = shapes.side**2
    return Cost(4 * (2 * n_pairs * shapes.side + 2 * n_entries), 4 * n_entries, 2 * n_pairs * n_entries)


def kron_blocks(place: Place) -> Ready:
    place.need_products()
    layer = _Layer(place)
    x, a, b = layer.weight(), layer.blocks(4), layer.blocks(5)
    out = torch.empty_like(x)
    return Ready(lambda: ops.kron(x, a, b, block=BLOCK, out=out), _blocks_cost(layer.side), out)


def kron_dense(place: Place) -> Ready:
    """Value and gradient of the penalty, the gradient added to a bfloat16 one."""
    place.need_products()
    layer = _Layer(place)
    x, a, b = layer.weight(), layer.second_moment(4), layer.second_moment(5)
    gradient = torch.zeros(x.shape, dtype=torch.bfloat16, device=place.device)
    return Ready(
        lambda: ops.kron(x, a, b, out=gradient, accumulate=True, scale=2 * _PENALTY),
        _dense_cost(layer.side),
    )


def score_factored(place: Place) -> Ready:
    place.need_products()
    layer = _Layer(place)
    e, a, theta = layer.samples(2), layer.samples(3), layer.weight()
    total = torch.zeros_like(theta)
    return Ready(lambda: ops.score(e, theta, activations=a, out=total), _score_cost(place))


# -- in torch ---------------------------------------------------------------------------------------------


def _by_blocks(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """P and <X, P> by two batched products."""
    n_out, n_in = x.shape
    half = torch.matmul(x.view(n_out, -1, BLOCK).transpose(0, 1), a).transpose(0, 1).reshape(n_out, n_in)
    product = torch.matmul(b, half.view(-1, BLOCK, n_in)).view(n_out, n_in)
    return product, (x * product).sum()


def torch_blocks(compiled: bool) -> Callable[[Place], Ready]:
    def make(place: Place) -> Ready:
        layer = _Layer(place)
        x, a, b = layer.weight(), layer.blocks(4), layer.blocks(5)
        function = baselines.compiled(_by_blocks, place.device) if compiled else _by_blocks
        return Ready(lambda: function(x, a, b))

    return make


def torch_products(place: Place) -> Ready:
    """P = B X A, <X, P>, and 2 P added to a bfloat16 gradient."""
    layer = _Layer(place)
    x, a, b = layer.weight(), layer.second_moment(4), layer.second_moment(5)
    gradient = torch.zeros(x.shape, dtype=torch.bfloat16, device=place.device)

    def run() -> None:
        product = b @ (x @ a)
        (x * product).sum()
        gradient.add_(product, alpha=2 * _PENALTY)

    return Ready(run)


def torch_autograd(place: Place) -> Ready:
    """trace(B X A Xᵀ) and its gradient, as TAK's authors have it."""
    layer = _Layer(place)
    x, a, b = layer.weight().requires_grad_(), layer.second_moment(4), layer.second_moment(5)

    def run() -> None:
        x.grad = None
        with torch.enable_grad():
            (_PENALTY * torch.trace(b @ x @ a @ x.T)).backward()  # type: ignore[no-untyped-call]

    return Ready(run)


def torch_samples(place: Place) -> Ready:
    """Gradient of one sample after the other, then |θ G| added."""
    layer = _Layer(place)
    e, a, theta = layer.samples(2), layer.samples(3), layer.weight()
    total = torch.zeros_like(theta)

    def run() -> None:
        for one, other in zip(e, a, strict=True):
            total.add_((theta * (one.T @ other)).abs_())

    return Ready(run)


def torch_vmap(place: Place) -> Ready:
    """Per-sample gradients by torch.func, four samples at a time, then |θ G| summed over samples."""
    layer = _Layer(place)
    e, a, theta = layer.samples(2), layer.samples(3), layer.weight()
    total = torch.zeros_like(theta)

    def loss(weight: Tensor, inputs: Tensor, cotangent: Tensor) -> Tensor:
        return (torch.nn.functional.linear(inputs, weight) * cotangent).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def run() -> None:
        for some, others in zip(e.split(4), a.split(4), strict=True):
            total.add_((gradients(theta, others, some) * theta).abs_().sum(0))

    return Ready(run)


BLOCKS, BLOCKS_COMPILED = "torch blocks, batched products", "torch.compile blocks"
PRODUCTS, AUTOGRAD = "torch products and dot", "torch autograd of trace(B X A X')"
SAMPLES, VMAP = "torch |θ G|, sample by sample", "torch.func.vmap |θ G|"

ROWS = (
    GpuRow(BLOCKS, torch_blocks(False), baseline=True),
    GpuRow(BLOCKS_COMPILED, torch_blocks(True), baseline=True),
    GpuRow(PRODUCTS, torch_products, baseline=True),
    GpuRow(AUTOGRAD, torch_autograd, baseline=True),
    GpuRow(SAMPLES, torch_samples, baseline=True),
    GpuRow(VMAP, torch_vmap, baseline=True),
    GpuRow("kron, blocks of 64", kron_blocks, (against_limit(0.70), Goal(BLOCKS, 3), Goal(BLOCKS_COMPILED))),
    GpuRow("kron, penalty, dense", kron_dense, (against_limit(0.70), Goal(AUTOGRAD, 3), Goal(PRODUCTS))),
    GpuRow("score of a layer", score_factored, (against_limit(), Goal(SAMPLES), Goal(VMAP))),
)
