"""The Triton kernels of `score` and `kron` in their interpreter, against the reference and the CPU's."""

from __future__ import annotations

import mmap
import platform
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import load
from tests.ops.test_kron import blocks_of, check, dense, drawn, packed, product_of, symmetric
from tests.ops.test_kron import dot as exact_dot
from tests.ops.test_scores import KINDS, layer_case, plain_scores, scored
from tests.strategies import DTYPES, assert_same_bits, bit_values, grid_values, normal_values, placed
from tvfast import ops
from tvfast.ops.raw import ProductBackend

REFERENCE = load("reference")
_MAP_32BIT = 0x40  # of Linux; a name in mmap from Python 3.13 on


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lead", [0, 3])
def test_scores_have_the_bits_of_the_reference(gpu: ProductBackend, dtype: torch.dtype, lead: int) -> None:
    rng = np.random.default_rng(lead)
    for n, n_models, has_base in ((0, 1, False), (70, 1, True), (2**14 + 1100, 1, False), (1030, 3, True)):
        gradients = [placed(bit_values(rng, n, DTYPES[k % 3]), lead) for k in range(n_models)]
        models = [placed(bit_values(rng, n, dtype), lead) for _ in range(n_models)]
        base = placed(bit_values(rng, n, dtype), lead) if has_base else None
        start = placed(bit_values(rng, n, torch.float32), lead)
        weights = [float(w) for w in rng.normal(size=n_models)]
        found = scored(gpu, gradients, models, base, start, weights)
        assert_same_bits([found], [scored(REFERENCE, gradients, models, base, start, weights)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, [1]), (70, 33, [4, 0, 19]), (5, 130, [3])], ids=str)
def test_layer_is_within_the_error_of_the_formula(
    gpu: ProductBackend, shape: tuple[int, int, list[int]], kind: str
) -> None:
    rng = np.random.default_rng(sum(shape[2]))
    for dtypes in ([torch.float32] * 3, [torch.bfloat16] * 3, [torch.float16, torch.float32, torch.bfloat16]):
        case = layer_case(*shape, kind, lambda n, dtype: normal_values(rng, n, dtype), dtypes)
        scale = [float(w) for w in rng.random(len(shape[2]))]
        expected, error = plain_scores(case, scale)
        found = ops.score(**case, scale=scale).double()
        assert bool(((found - expected).abs() <= error).all())


@pytest.mark.parametrize("kind", KINDS)
def test_layer_with_bias_is_exact_on_dyadic_numbers(gpu: ProductBackend, kind: str) -> None:
    rng = np.random.default_rng(3)
    case = layer_case(20, 35, [3, 2], kind, lambda n, d: grid_values(rng, n, d, 4), [torch.float16] * 3)
    expected, _ = plain_scores(case, [1.0] * 2)
    assert torch.equal(ops.score(**case).double(), expected)
    ones = {
        **case,
        "activations": [torch.cat([a[:, :-1], torch.ones(len(a), 1)], 1) for a in case["activations"]],
    }
    expected, _ = plain_scores(ones, [1.0] * 2)
    short: Any = {**case, "activations": [a[:, :-1].contiguous() for a in case["activations"]]}
    assert torch.equal(ops.score(**short, bias_column=True).double(), expected)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="mmap gives memory below 2^31 on x86-64 alone")
def test_addresses_below_two_to_the_31(gpu: ProductBackend) -> None:
    """Triton takes so small an argument for an int32."""
    x = drawn(0, 12, 10)
    low = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_32BIT)
    there = torch.frombuffer(low, dtype=x.dtype, count=x.numel()).view_as(x)
    assert there.copy_(x).data_ptr() < 2**31
    a, b = blocks_of(10, 5, 1), blocks_of(12, 5, 60)
    assert_same_bits([ops.kron(there, a, b, block=5)[0]], [ops.kron(x, a, b, block=5)[0]])


@pytest.mark.parametrize("s", [1, 5, 16, 40, 128])
def test_blocks_against_the_explicit_product(gpu: ProductBackend, s: int) -> None:
    n_out, n_in = (2 * s + 1, 11) if s < 40 else (s + 1, 17)
    x, a, b = drawn(0, n_out, n_in), blocks_of(n_in, s, 1), blocks_of(n_out, s, 60)
    product, value = ops.kron(x, a, b, block=s)
    check((product, value), x, dense(a), dense(b))
    assert float(value) == torch.tensor(exact_dot(x, product)).float()


def test_exact_numbers_have_the_bits_of_the_cpu(gpu: ProductBackend) -> None:
    rng = np.random.default_rng(4)

    def grid(*shape: int) -> Tensor:
        return grid_values(rng, int(np.prod(shape)), torch.float32, 6).view(shape)

    x, a, b = grid(21, 19), [grid(8, 8), grid(8, 8), grid(3, 3)], [grid(8, 8), grid(8, 8), grid(5, 5)]
    outs = [torch.empty(21, 19), torch.empty(21, 19)]
    values = [
        backend.kron([product_of(x, a, b, 8, out, 0.3)])
        for backend, out in zip((gpu, load("cpp-scalar")), outs, strict=True)
    ]
    assert values[0] == values[1]
    assert_same_bits([outs[0].view(-1)], [outs[1].view(-1)])


def test_packed_blocks_mixed_types_and_accumulation(gpu: ProductBackend) -> None:
    x = drawn(0, 13, 21, dtype=torch.bfloat16)
    a, b = symmetric(blocks_of(21, 9, 1)), symmetric(blocks_of(13, 9, 9))
    a[1] = a[1].half()
    plain, value = ops.kron(x, a, b, block=9)
    check((plain, value), x, dense(a), dense(b))
    for dtype in DTYPES:
        out = torch.ones(13, 21, dtype=dtype)
        found = ops.kron(x, packed(a), packed(b), block=9, packed=True, out=out, accumulate=True, scale=0.3)
        assert torch.equal(found[1], value)
        assert torch.equal(out, (1 + plain * torch.tensor(0.3)).to(dtype))


def test_dense_factors_and_roots_are_finished_by_the_kernel(
    gpu: ProductBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tvfast.ops.products.LARGEST_BLOCK", 0)
    monkeypatch.setattr("tvfast.ops.products._PANEL_COLUMNS", 200)
    x, a, b = drawn(0, 9, 300), drawn(1, 300, 300), drawn(2, 9, 9)
    product, value = ops.kron(x, a, b)
    assert float(value) == torch.tensor(exact_dot(x, product)).float()
    out = torch.ones(9, 300, dtype=torch.bfloat16)
    assert torch.equal(ops.kron(x, a, b, out=out, accumulate=True, scale=0.3)[1], value)
    assert torch.equal(out, (1 + product * torch.tensor(0.3)).bfloat16())
    roots = (drawn(1, 300, 4), drawn(2, 9, 3))
    taken = torch.ones(9, 300)
    product, value = ops.kron(x, *roots, square_root=True)
    again = ops.kron(x, *roots, square_root=True, out=taken, accumulate=True, scale=2.0)
    assert torch.equal(again[1], value)
    assert torch.equal(taken, 1 + product * 2.0)


def test_nan_and_infinity(gpu: ProductBackend) -> None:
    x = torch.ones(6, 9)
    x[1, 4] = float("nan")
    product, value = ops.kron(x, blocks_of(9, 3, 1), blocks_of(6, 3, 9), block=3)
    assert bool(product[:3, 3:6].isnan().all())
    assert int(product.isnan().sum()) == 9
    assert bool(value.isnan())
