"""`kron`: dense, block-diagonal, packed and square-root factors against explicit Kronecker products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.bounds import kron_error, sum_error, ulp
from tests.conftest import load
from tests.memory import peak_growth
from tests.strategies import DTYPES, assert_same_bits, bit_values, grid_values, normal_values, view_of
from tvfast import ops
from tvfast.errors import ArgumentError, DTypeError, ShapeError, TvfastError
from tvfast.factored import LARGEST_BLOCK, BlockDiagonal, KroneckerProduct, ProductPanel
from tvfast.ops._exact_sum_torch import ExactSum
from tvfast.ops.raw import ProductBackend
from tvfast.program import View

VARIANTS = ("reference", "cpp-scalar", "cpp-avx2", "cpp-avx512", "cpp-emulated512")


@pytest.fixture(params=VARIANTS)
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Public functions run on this backend."""
    load(request.param)
    name, _, isa = request.param.partition("-")
    monkeypatch.setenv("TVFAST_BACKEND", name)
    if isa:
        monkeypatch.setenv("TVFAST_ISA", isa)
    return str(request.param)


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal_values(np.random.default_rng(seed), math.prod(shape), dtype, 1.0).view(shape)


def blocks_of(side: int, block: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Diagonal blocks that are not symmetric."""
    sides = [min(block, side - start) for start in range(0, side, block)]
    return [drawn(seed + k, s, s, dtype=dtype) for k, s in enumerate(sides)]


def symmetric(blocks: Sequence[Tensor]) -> list[Tensor]:
    return [(one + one.T) / 2 for one in blocks]


def packed(blocks: Sequence[Tensor]) -> list[Tensor]:
    return [one[tuple(torch.tril_indices(*one.shape))].clone() for one in blocks]


def dense(factor: Tensor | Sequence[Tensor]) -> Tensor:
    return factor.double() if isinstance(factor, Tensor) else torch.block_diag(*[f.double() for f in factor])


def check(found: tuple[Tensor, Tensor], x: Tensor, a: Tensor, b: Tensor) -> None:
    """P by the explicit Kronecker product on vec(X), within the error of float32; the value from P itself."""
    product, value = found
    flat = torch.kron(b, a.T.contiguous()) @ x.double().reshape(-1)
    error = kron_error(x.double(), a, b)
    assert bool(((product.double().reshape(-1) - flat).abs() <= error.reshape(-1)).all())
    addends = (x.double() * product.double()).reshape(-1)
    expected = math.fsum(addends.tolist())
    slack = float(ulp(torch.tensor(expected), torch.float32)) + sum_error(addends.tolist())
    assert abs(float(value) - expected) <= slack


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 2), (7, 5, 9), (17, 33, 16), (30, 19, 10), (3, 40, 13)])
def test_blocks_against_the_explicit_kronecker_product(chosen: str, shape: tuple[int, int, int]) -> None:
    n_out, n_in, s = shape
    x, a, b = drawn(9, n_out, n_in), blocks_of(n_in, s, 1), blocks_of(n_out, s, 50)
    check(ops.kron(x, a, b, block=s), x, dense(a), dense(b))
    check(ops.kron(x, dense(a).float(), b, block=s), x, dense(a), dense(b))
    check(ops.kron(x, a, dense(b).float(), block=s), x, dense(a), dense(b))


def test_dense_factors_against_the_explicit_kronecker_product(chosen: str) -> None:
    x, a, b = drawn(0, 9, 7), drawn(1, 7, 7), drawn(2, 9, 9)
    check(ops.kron(x, a, b), x, a.double(), b.double())


def test_wide_matrices_go_by_panels(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvfast.ops.products._PANEL_COLUMNS", 8)
    monkeypatch.setattr("tvfast.ops.products._CAST_ROWS", 4)
    monkeypatch.setattr("tvfast.ops.products.LARGEST_BLOCK", 0)  # what no kernel fuses
    for s, dtype in ((3, torch.float32), (5, torch.bfloat16), (11, torch.float16)):
        x, a, b = drawn(3, 9, 21, dtype=dtype), blocks_of(21, s, 1), blocks_of(9, s, 9)
        for left in (b, dense(b).float()):
            for right in (a, dense(a).float()):
                check(ops.kron(x, right, left, block=s), x, dense(a), dense(b))


def test_square_roots(chosen: str) -> None:
    x, root_a, root_b = drawn(0, 9, 13), drawn(1, 13, 4), drawn(2, 9, 20)
    product, value = ops.kron(x, root_a, root_b, square_root=True)
    a, b = (root.double() @ root.double().T for root in (root_a, root_b))
    expected = b @ x.double() @ a
    scale = root_b.double().abs() @ root_b.double().abs().T @ x.double().abs()
    scale = scale @ root_a.double().abs() @ root_a.double().abs().T
    assert bool(((product.double() - expected).abs() <= 50 * 2.0**-24 * scale).all())
    exact = float((x.double() * expected).sum())
    assert abs(float(value) - exact) <= 50 * 2.0**-24 * float((x.double().abs() * scale).sum())
    assert float(value) >= 0.0
    taken = torch.ones(9, 13, dtype=torch.bfloat16)
    ops.kron(x, root_a, root_b, square_root=True, out=taken, accumulate=True, scale=0.5)
    assert torch.equal(taken, (1 + product * 0.5).bfloat16())


@pytest.mark.parametrize("s", [1, 4, 7, 12])
def test_packed_blocks_are_the_symmetric_squares(chosen: str, s: int) -> None:
    x, a, b = drawn(0, 23, 29), symmetric(blocks_of(29, s, 1)), symmetric(blocks_of(23, s, 9))
    expected = ops.kron(x, a, b, block=s)
    found = ops.kron(x, packed(a), packed(b), block=s, packed=True)
    assert_same_bits(found, expected)


def test_blocks_of_one_tensor_and_of_mixed_types(chosen: str) -> None:
    x, a, b = drawn(0, 12, 8, dtype=torch.bfloat16), torch.stack(blocks_of(8, 4, 1)), blocks_of(12, 4, 5)
    b[1] = b[1].half()
    expected = ops.kron(x.float(), list(a), [one.float() for one in b], block=4)
    assert_same_bits(ops.kron(x, a, b, block=4), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
def test_output_is_scaled_or_added_to(chosen: str, dtype: torch.dtype, accumulate: bool) -> None:
    x, a, b = drawn(0, 21, 19), blocks_of(19, 5, 1), blocks_of(21, 5, 30)
    for factors in ((a, b), (dense(a).float(), drawn(7, 21, 21))):
        product, value = ops.kron(x, *factors, block=5)
        if not accumulate:
            scaled = torch.full((21, 19), math.nan)
            assert ops.kron(x, *factors, block=5, scale=-0.3, out=scaled)[0] is scaled
            assert torch.equal(scaled, product * torch.tensor(-0.3))
            continue
        start = drawn(8, 21, 19, dtype=dtype)
        out = start.clone()
        found, same = ops.kron(x, *factors, block=5, scale=-0.3, out=out, accumulate=True)
        assert found is out
        assert torch.equal(same, value)
        assert torch.equal(out, (start.float() + product * torch.tensor(-0.3)).to(dtype))


def test_gradient_of_the_penalty_by_autograd(chosen: str) -> None:
    a, b = symmetric(blocks_of(10, 4, 1)), symmetric(blocks_of(7, 4, 9))
    x = drawn(0, 7, 10).double().requires_grad_()
    penalty = torch.trace(dense(b) @ x @ dense(a) @ x.T)
    penalty.backward()
    gradient = torch.zeros(7, 10)
    _, value = ops.kron(x.detach().float(), a, b, block=4, scale=2.0, out=gradient, accumulate=True)
    assert x.grad is not None
    torch.testing.assert_close(gradient.double(), x.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(value.double(), penalty.detach(), rtol=1e-5, atol=1e-4)


def test_computes_in_float64_if_an_operand_is(chosen: str) -> None:
    x, a, b = drawn(0, 6, 9).double(), blocks_of(9, 4, 1), blocks_of(6, 4, 2)
    product, value = ops.kron(x, a, b, block=4)
    expected = dense(b) @ x @ dense(a)
    assert product.dtype == value.dtype == torch.float64
    torch.testing.assert_close(product, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(value, (x * expected).sum(), rtol=1e-13, atol=1e-13)


def dot(x: Tensor, product: Tensor) -> float:
    """The order-independent sum of exact products, by its definition in two passes."""
    addends, total = (x.double() * product.double()).view(-1), ExactSum()
    total.observe(addends)
    total.add(addends)
    return total.value()


def chain(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A matrix product by fused multiply-adds, in extended precision rounded once a step."""
    total = np.zeros((left.shape[0], right.shape[1]), np.float32)
    for k in range(left.shape[1]):
        exact = np.outer(left[:, k].astype(np.longdouble), right[k].astype(np.longdouble))
        total = (exact + total).astype(np.float32)
    return total


def product_of(
    x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], s: int, out: Tensor, scale: float = 1.0
) -> KroneckerProduct:
    n_out, n_in = x.shape

    def factor(blocks: Sequence[Tensor], side: int) -> BlockDiagonal:
        return BlockDiagonal(blocks=tuple(map(view_of, blocks)), side=side, block=s)

    return KroneckerProduct(
        name="t",
        x=view_of(x),
        n_out=n_out,
        n_in=n_in,
        a=factor(a, n_in),
        b=factor(b, n_out),
        out=view_of(out),
        scale=scale,
    )


def test_blocks_are_chains_of_fused_multiply_adds(native: ProductBackend) -> None:
    x, a, b = drawn(0, 20, 35), blocks_of(35, 9, 1), blocks_of(20, 9, 30)
    out = torch.empty(20, 35)
    (value,) = native.kron([product_of(x, a, b, 9, out)])
    expected = np.empty((20, 35), np.float32)
    for r, left in enumerate(b):
        for c, right in enumerate(a):
            place = (slice(9 * r, 9 * r + len(left)), slice(9 * c, 9 * c + len(right)))
            expected[place] = chain(left.numpy(), chain(x.numpy()[place], right.numpy()))
    assert_same_bits([out.view(-1)], [torch.from_numpy(expected).view(-1)])
    assert value == dot(x, out)


@pytest.mark.parametrize("s", [3, 16, 33, 64, LARGEST_BLOCK])
def test_instruction_sets_and_threads_agree_on_every_bit(native: ProductBackend, s: int) -> None:
    n_out, n_in = 2 * s + 1, 150
    rng = np.random.default_rng(s)
    x, a, b = drawn(0, n_out, n_in), blocks_of(n_in, s, 1), blocks_of(n_out, s, 90)
    x[0, :9] = bit_values(rng, 9, torch.float32)
    outs = [torch.empty(n_out, n_in) for _ in range(3)]
    values = load("cpp-scalar").kron([product_of(x, a, b, s, outs[0], 0.7)], 1)
    assert bool(outs[0][-1].isfinite().all())
    for out, n_threads in zip(outs[1:], (1, 3), strict=True):
        assert repr(native.kron([product_of(x, a, b, s, out, 0.7)], n_threads)) == repr(values)
        assert_same_bits([out.view(-1)], [outs[0].view(-1)])


def test_several_products_in_one_call(native: ProductBackend) -> None:
    outs = [torch.empty(6, 5), torch.empty(0, 5), torch.empty(4, 9)]
    xs = [drawn(k, *out.shape) for k, out in enumerate(outs)]
    products = [
        product_of(x, blocks_of(x.shape[1], 3, 1), blocks_of(x.shape[0], 3, 9), 3, out)
        for x, out in zip(xs, outs, strict=True)
    ]
    values = native.kron(products)
    for x, out, value in zip(xs, outs, values, strict=True):
        assert value == dot(x, out)


def test_a_product_without_output_has_the_same_value(native: ProductBackend) -> None:
    x, a, b = drawn(0, 20, 35), blocks_of(35, 9, 1), blocks_of(20, 9, 30)
    with_output = product_of(x, a, b, 9, torch.empty(20, 35))
    without = KroneckerProduct(name="t", x=with_output.x, n_out=20, n_in=35, a=with_output.a, b=with_output.b)
    assert native.kron([without]) == native.kron([with_output])


def test_blocks_that_are_too_large_are_refused(native: ProductBackend) -> None:
    s = LARGEST_BLOCK + 1
    x = drawn(0, s, 2)
    with pytest.raises(ValueError, match="blocks of 129 a side; the fused product takes 1 to 128"):
        native.kron([product_of(x, [drawn(1, 2, 2)], [drawn(2, s, s)], s, torch.empty(s, 2))])
    product, _ = ops.kron(x, drawn(1, 2, 2), [drawn(2, s, s)], block=s)
    check(
        (product, (x.double() * product.double()).sum().float()),
        x,
        dense(drawn(1, 2, 2)),
        dense(drawn(2, s, s)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_panels_are_finished_with_the_bits_of_the_reference(
    native: ProductBackend, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(0)
    x = grid_values(rng, 70 * 1030, dtype).view(70, 1030)
    x[0] = bit_values(rng, 1030, dtype)
    product = normal_values(rng, 70 * 1030, torch.float32).view(70, 1030)
    for rows, columns in ((slice(0, 70), slice(3, 20)), (slice(1, 70), slice(0, 1030))):
        found = []
        for backend in (native, load("reference")):
            out = torch.ones(70, 1030, dtype=dtype)
            one = [t[rows, columns] for t in (x, product, out)]
            views = [View(t.data_ptr(), t.numel(), view_of(t[:0]).dtype, t) for t in one]
            total = backend.product_sum()
            panel = ProductPanel(
                name="t", n_rows=one[0].shape[0], n_columns=one[0].shape[1], x=views[0], x_stride=1030,
                product=views[1], product_stride=1030, out=views[2], out_stride=1030, scale=0.3,
                accumulate=True,
            )  # fmt: skip
            total.add(panel, 2)
            total.add(panel, 1)
            found.append((repr(total.value()), out.view(-1)))
        assert found[0][0] == found[1][0]
        assert_same_bits([found[0][1]], [found[1][1]])


def test_nan_reaches_the_rows_and_columns_of_its_blocks(chosen: str) -> None:
    x, a, b = torch.ones(6, 9), blocks_of(9, 3, 1), blocks_of(6, 3, 9)
    x[1, 4] = math.nan
    product, value = ops.kron(x, a, b, block=3)
    expected = torch.zeros(6, 9, dtype=torch.bool)
    expected[:3, 3:6] = True
    assert torch.equal(product.isnan(), expected)
    assert math.isnan(value)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (0, 200), (200, 0)])
def test_nothing_to_multiply(chosen: str, shape: tuple[int, int]) -> None:
    product, value = ops.kron(torch.empty(shape), torch.eye(shape[1]), torch.eye(shape[0]))
    assert product.shape == shape
    assert float(value) == 0.0


@pytest.mark.parametrize("form", ["blocks", "dense"])
def test_nothing_of_the_size_of_the_matrix_is_allocated(form: str) -> None:
    o, i = 2048, 1536
    factors, options = {
        "blocks": (f"torch.randn({i} // 64, 64, 64), torch.randn({o} // 64, 64, 64)", "block=64"),
        "dense": (f"torch.randn({i}, {i}), torch.randn({o}, {o})", "accumulate=True"),
    }[form]
    setup = (
        f"import tvfast.ops.products\ntvfast.ops.products._PANEL_COLUMNS = 64\n"
        f"x, out = torch.randn({o}, {i}), torch.zeros({o}, {i})\nfactors = {factors}\n"
    )
    growth = peak_growth(setup, f"ops.kron(x, *factors, out=out, n_threads=2, {options})")
    panels = {"blocks": 0, "dense": 2 * 4 * o * 64}[form]
    assert growth < panels + 3 * 2**20 < 4 * o * i / 2


# -- bad arguments --------------------------------------------------------------------------------------

X = torch.ones(4, 6)
BAD: dict[str, tuple[Callable[[], Any], type[TvfastError], str]] = {
    "accumulate": (
        lambda: ops.kron(X, torch.eye(6), torch.eye(4), accumulate=True),
        ArgumentError,
        "out is None",
    ),
    "root and block": (
        lambda: ops.kron(X, torch.ones(6, 2), torch.ones(4, 2), square_root=True, block=2),
        ArgumentError,
        "square_root was given with block",
    ),
    "root": (
        lambda: ops.kron(X, torch.ones(4, 2), torch.ones(4, 2), square_root=True),
        ShapeError,
        r"a has shape \[4, 2\]; expected a square root \[6, S\]",
    ),
    "packed": (
        lambda: ops.kron(X, torch.ones(2, 5), torch.eye(4), block=3, packed=True),
        ShapeError,
        r"a has 2 blocks of shapes \[\(5,\)\]; expected 2: \[6\] each, the last \[6\]",
    ),
    "scale": (lambda: ops.kron(X, torch.eye(6), torch.eye(4), scale=math.inf), ArgumentError, "is inf"),
    "out": (
        lambda: ops.kron(X, torch.eye(6), torch.eye(4), out=X.bfloat16()),
        DTypeError,
        "out has dtype bfloat16; expected float32",
    ),
    "out of double": (
        lambda: ops.kron(X, torch.eye(6), torch.eye(4), out=X.int(), accumulate=True),
        DTypeError,
        "expected float32 or bfloat16 or float16",
    ),
    "threads": (
        lambda: ops.kron(X, torch.eye(6), torch.eye(4), n_threads=-2),
        ArgumentError,
        "n_threads is -2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
