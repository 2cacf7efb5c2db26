"""`score`: elementwise, of linear layers in factored form, of embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.bounds import factored_error
from tests.conftest import load
from tests.memory import peak_growth
from tests.strategies import (
    DTYPES,
    assert_same_bits,
    bit_values,
    grid_values,
    normal_values,
    placed,
    view_of,
)
from tvfast import ops
from tvfast.errors import ArgumentError, DTypeError, LayoutError, ShapeError, TvfastError
from tvfast.factored import FactoredSample, FactoredScore
from tvfast.ops.raw import ProductBackend
from tvfast.ops.reference import backend as reference
from tvfast.program import Entry, ModelScalars, TensorScalars, WorkTable

REFERENCE = reference(torch.float32)
EXACT = reference(torch.float64)
KINDS = ("product", "delta", "square")


# -- elementwise ----------------------------------------------------------------------------------------


def scored(
    backend: ProductBackend,
    gradients: list[Tensor],
    models: list[Tensor],
    base: Tensor | None,
    start: Tensor,
    weights: list[float],
    n_threads: int = 0,
) -> Tensor:
    out = start.clone()
    entry = Entry(
        name="t",
        models=tuple(map(view_of, models)),
        scores=tuple(map(view_of, gradients)),
        base=None if base is None else view_of(base),
        out=view_of(out),
    )
    scalars = TensorScalars(models=[ModelScalars(weight=weight) for weight in weights])
    backend.score(WorkTable([entry], len(models)), [scalars], n_threads)
    return out


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.sampled_from([0, 1, 7, 16, 63, 300, 1025, 3000]),
    n_models=st.integers(1, 3),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    has_base=st.booleans(),
    lead=st.integers(0, 3),
)
def test_every_instruction_set_has_the_bits_of_the_reference(
    natives: dict[str, ProductBackend],
    seed: int,
    n: int,
    n_models: int,
    dtypes: tuple[torch.dtype, ...],
    has_base: bool,
    lead: int,
) -> None:
    rng = np.random.default_rng(seed)
    gradients = [placed(bit_values(rng, n, dtypes[0]), lead) for _ in range(n_models)]
    models = [placed(bit_values(rng, n, dtypes[1]), lead) for _ in range(n_models)]
    base = placed(bit_values(rng, n, dtypes[2]), lead) if has_base else None
    start = placed(bit_values(rng, n, torch.float32), lead)
    weights = [float(w) for w in rng.normal(size=n_models)]
    expected = scored(REFERENCE, gradients, models, base, start, weights)
    for name, native in natives.items():
        assert_same_bits([scored(native, gradients, models, base, start, weights)], [expected], name)


def test_threads_and_tiles_do_not_change_a_bit(native_with: Callable[..., ProductBackend]) -> None:
    rng = np.random.default_rng(0)
    g, theta = normal_values(rng, 5000, torch.bfloat16), normal_values(rng, 5000, torch.float16)
    start = torch.rand(5000)
    expected = scored(native_with(), [g], [theta], None, start, [1.0], 1)
    for tile, n_threads in ((64, 1), (192, 3), (0, 2)):
        found = scored(native_with(tile=tile), [g], [theta], None, start, [1.0], n_threads)
        assert_same_bits([found], [expected])


def test_scale_multiplies_each_score() -> None:
    g, theta = torch.randn(5, 7), torch.randn(5, 7)
    found = ops.score(g, theta, scale=0.3)
    assert torch.equal(found, (g * theta).abs() * torch.tensor(0.3))


# -- linear layers --------------------------------------------------------------------------------------


def layer_case(
    n_out: int,
    n_in: int,
    lengths: list[int],
    kind: str,
    make: Callable[[int, torch.dtype], Tensor],
    dtypes: Any,
) -> dict[str, Any]:
    """Arguments of `ops.score` for one layer."""
    e_dtype, a_dtype, theta_dtype = dtypes
    case: dict[str, Any] = {
        "gradient": [make(r * n_out, e_dtype).view(r, n_out) for r in lengths],
        "activations": [make(r * n_in, a_dtype).view(r, n_in) for r in lengths],
        "kind": kind,
    }
    if kind != "square":
        case["weight"] = make(n_out * n_in, theta_dtype).view(n_out, n_in)
    if kind == "delta":
        case["base"] = make(n_out * n_in, torch.float32).view(n_out, n_in)
    return case


def plain_scores(case: dict[str, Any], scale: list[float]) -> tuple[Tensor, Tensor]:
    """The formula at float64, and the error that float32 may have."""
    samples = [(e.double(), a.double()) for e, a in zip(case["gradient"], case["activations"], strict=True)]
    factors = []
    for e, a in samples:
        gradient = e.T @ a
        if case["kind"] == "square":
            factors.append(gradient)
        elif case["kind"] == "product":
            factors.append(case["weight"].double())
        else:
            factors.append((case["weight"].float() - case["base"].float()).double())
    total = sum(
        w * ((e.T @ a) * factor).abs() for (e, a), factor, w in zip(samples, factors, scale, strict=True)
    )
    assert isinstance(total, Tensor)
    return total, factored_error(samples, factors, scale)


@pytest.fixture(params=("reference", "cpp-scalar", "cpp-avx2", "cpp-avx512", "cpp-emulated512"))
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Public functions run on this backend."""
    load(request.param)
    name, _, isa = request.param.partition("-")
    monkeypatch.setenv("TVFAST_BACKEND", name)
    if isa:
        monkeypatch.setenv("TVFAST_ISA", isa)
    return str(request.param)


SHAPES = [
    (1, 1, [1]),
    (3, 5, [2, 7]),
    (15, 33, [4, 0, 1]),
    (141, 20, [9]),
    (13, 258, [3, 3]),
    (9, 17, [130, 300]),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_is_within_the_error_of_the_formula(
    chosen: str, shape: tuple[int, int, list[int]], kind: str
) -> None:
    rng = np.random.default_rng(sum(shape[2]))
    dtypes = [DTYPES[k] for k in rng.integers(0, 3, 3)]
    case = layer_case(*shape, kind, lambda n, dtype: normal_values(rng, n, dtype), dtypes)
    scale = [float(w) for w in rng.random(len(shape[2]))]
    start = torch.rand(shape[0], shape[1])
    found = ops.score(**case, scale=scale, out=start.clone()).double() - start.double()
    expected, error = plain_scores(case, scale)
    # adding to what is there rounds at its size
    assert bool(((found - expected).abs() <= error + len(scale) * 2.0**-23).all())


@pytest.mark.parametrize("kind", KINDS)
def test_layer_is_exact_on_dyadic_numbers(chosen: str, kind: str) -> None:
    rng = np.random.default_rng(3)
    case = layer_case(20, 35, [5, 0, 140], kind, lambda n, d: grid_values(rng, n, d, 4), [torch.float16] * 3)
    if kind == "square":  # G² needs twice the bits: keep G small
        case["gradient"] = [e[:3] for e in case["gradient"]]
        case["activations"] = [a[:3] for a in case["activations"]]
    expected, _ = plain_scores(case, [1.0] * 3)
    assert torch.equal(ops.score(**case).double(), expected)


def chain(e: Tensor, a: Tensor) -> np.ndarray[Any, Any]:
    """G by fused multiply-adds over the tokens, in extended precision rounded once a step."""
    left, right = e.float().numpy().astype(np.longdouble), a.float().numpy().astype(np.longdouble)
    total = np.zeros((left.shape[1], right.shape[1]), np.float32)
    for r in range(len(left)):
        total = (np.outer(left[r], right[r]) + total).astype(np.float32)
    return total


@pytest.mark.parametrize("lengths", [[1, 3], [128], [129, 257]], ids=str)
def test_gradients_are_chains_of_fused_multiply_adds(native: ProductBackend, lengths: list[int]) -> None:
    rng = np.random.default_rng(1)
    case = layer_case(17, 40, lengths, "product", lambda n, d: normal_values(rng, n, d), [torch.float32] * 3)
    expected = torch.zeros(17, 40)
    for e, a in zip(case["gradient"], case["activations"], strict=True):
        expected += (torch.from_numpy(chain(e, a)) * case["weight"]).abs()
    assert_same_bits([layer_scores(native, case)], [expected.view(-1)])


def layer_scores(backend: ProductBackend, case: dict[str, Any], n_threads: int = 0) -> Tensor:
    pairs = list(zip(case["gradient"], case["activations"], strict=True))
    n_out, n_in = pairs[0][0].shape[1], pairs[0][1].shape[1]
    out = torch.zeros(n_out * n_in)
    layer = FactoredScore(
        name="t",
        samples=tuple(
            FactoredSample(gradients=view_of(e), activations=view_of(a), n_tokens=len(e)) for e, a in pairs
        ),
        n_out=n_out,
        n_in=n_in,
        out=view_of(out),
        model=view_of(case["weight"]) if "weight" in case else None,
        base=view_of(case["base"]) if "base" in case else None,
    )
    backend.score_factored([layer], n_threads)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_instruction_sets_and_threads_agree_on_every_bit(native: ProductBackend, kind: str) -> None:
    rng = np.random.default_rng(5)
    case = layer_case(150, 270, [3, 131], kind, lambda n, d: bit_values(rng, n, d), [torch.bfloat16] * 3)
    for one in [*case["gradient"], *case["activations"], case.get("weight"), case.get("base")]:
        if one is not None:  # special numbers meet ordinary ones in the first columns
            one[:, 9:] = torch.randn(one[:, 9:].shape)
    expected = layer_scores(load("cpp-scalar"), case, 1)
    assert 0.5 < float(expected.isfinite().float().mean()) < 1.0
    for n_threads in (1, 3):
        assert_same_bits([layer_scores(native, case, n_threads)], [expected])


def test_order_of_calls_is_the_order_of_samples(chosen: str) -> None:
    rng = np.random.default_rng(6)
    case = layer_case(
        20, 30, [4, 5, 6], "product", lambda n, d: normal_values(rng, n, d), [torch.float32] * 3
    )
    at_once = ops.score(**case)
    total = torch.zeros_like(at_once)
    for e, a in zip(case["gradient"], case["activations"], strict=True):
        ops.score(e, case["weight"], activations=a, out=total)
    assert torch.equal(total, at_once)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_with_bias_against_per_sample_gradients(chosen: str, kind: str) -> None:
    """A layer inside a network: torch.func gives each sample's gradient of weight and bias."""
    torch.manual_seed(0)
    n, r, i, o = 5, 4, 7, 6
    layer, head = torch.nn.Linear(i, o).double(), torch.randn(o, dtype=torch.float64)
    x, target = torch.randn(n, r, i, dtype=torch.float64), torch.randn(n, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], one: Tensor, wanted: Tensor) -> Tensor:
        hidden = torch.func.functional_call(layer, parameters, (one,))
        return ((torch.tanh(hidden) @ head).mean() - wanted) ** 2

    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, target)
    hidden = layer(x).detach().requires_grad_()
    per_sample = ((torch.tanh(hidden) @ head).mean(1) - target) ** 2
    (e,) = torch.autograd.grad(per_sample.sum(), hidden)

    theta = torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], 1)
    g = torch.cat([gradients["weight"], gradients["bias"][:, :, None]], 2)
    base = torch.randn_like(theta)
    factor = {"product": theta, "delta": theta - base, "square": g}[kind]
    arguments = {"weight": theta.float()} if kind != "square" else {}
    arguments |= {"base": base.float()} if kind == "delta" else {}
    found = ops.score(e.float(), activations=x.float(), bias_column=True, kind=kind, **arguments)
    assert found.shape == (o, i + 1)
    torch.testing.assert_close(found.double(), (g * factor).abs().sum(0), rtol=1e-5, atol=1e-9)


def test_nan_reaches_its_entries_only(chosen: str) -> None:
    e, a = torch.ones(2, 3, 4), torch.ones(2, 3, 5)
    theta = torch.ones(4, 5)
    e[1, 2, 1] = math.nan
    theta[3, 4] = math.nan
    found = ops.score(e, theta, activations=a)
    expected = torch.full((4, 5), 6.0)
    expected[1], expected[3, 4] = math.nan, math.nan
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0), expected.nan_to_num(0))


def test_a_batch_and_a_list_are_the_same(chosen: str) -> None:
    e, a, theta = torch.randn(3, 4, 5), torch.randn(3, 4, 6), torch.randn(5, 6)
    expected = ops.score(list(e), theta, activations=list(a))
    assert torch.equal(ops.score(e, theta, activations=a), expected)
    padded = ops.score([e[0, :2]], theta, activations=[a[0, :2]])
    assert torch.equal(padded, ops.score(e[0, :2], theta, activations=a[0, :2]))


@pytest.mark.parametrize("backend_name", ["cpp", pytest.param("reference", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_samples(backend_name: str) -> None:
    setup = (
        "e, a, theta = torch.randn({n}, 32, 512), torch.randn({n}, 32, 768), torch.randn(512, 768)\n"
        "out = torch.zeros(512, 768)\n"
    )
    call = "ops.score(e, theta, activations=a, out=out, n_threads=2)"
    few, many = (peak_growth(setup.format(n=n), call, TVFAST_BACKEND=backend_name) for n in (2, 64))
    layer = 4 * 512 * 768
    assert many < few + 2**20
    assert many < 3 * layer + 2**20 if backend_name == "cpp" else 8 * layer


# -- embeddings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_embedding_against_per_sample_gradients(chosen: str, kind: str) -> None:
    torch.manual_seed(1)
    v, width = 11, 3
    ids = [torch.tensor([4, 4, 0]), torch.tensor([10]), torch.tensor([], dtype=torch.int64)]
    e = [torch.randn(len(one), width) for one in ids]
    theta, base = torch.randn(v, width), torch.randn(v, width)
    start = torch.rand(v, width)
    expected = start.double()
    for one, those in zip(e, ids, strict=True):
        g = torch.zeros(v, width, dtype=torch.float64).index_add_(0, those, one.double())
        factor = {"product": theta, "delta": theta - base, "square": g}[kind]
        expected = expected + 0.5 * (g * factor.double()).abs()
    arguments = {"weight": theta} if kind != "square" else {}
    arguments |= {"base": base} if kind == "delta" else {}
    found = ops.score(e, tokens=ids, kind=kind, out=start, scale=0.5, **arguments)
    assert found is start
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    untouched = [row for row in range(v) if row not in (0, 4, 10)]
    assert torch.equal(found[untouched].double(), expected[untouched])


# -- bad arguments --------------------------------------------------------------------------------------

E, A, T = torch.ones(2, 3, 4), torch.ones(2, 3, 5), torch.ones(4, 5)
IDS = torch.zeros(2, 3, dtype=torch.int64)
BAD: dict[str, tuple[Callable[[], Any], type[TvfastError], str]] = {
    "both": (
        lambda: ops.score(E, T, activations=A, tokens=IDS),
        ArgumentError,
        "both activations and tokens",
    ),
    "bias": (lambda: ops.score(T, T, bias_column=True), ArgumentError, "without activations"),
    "samples": (lambda: ops.score(E, T, activations=A[:1]), ShapeError, "2 samples, activations has 1"),
    "tokens": (
        lambda: ops.score([E[0], E[1]], T, activations=[A[0], A[1, :2]]),
        ShapeError,
        r"gradient\[1\] has 3 tokens, activations\[1\] has 2",
    ),
    "width": (
        lambda: ops.score([E[0], E[0, :, :3].contiguous()], T, activations=A),
        ShapeError,
        r"gradient\[1\] has shape \[3, 3\]; expected 2 dimensions.*last 4",
    ),
    "theta": (lambda: ops.score(E, T.T.contiguous(), activations=A), ShapeError, r"\[5, 4\].*\[4, 5\]"),
    "theta bias": (
        lambda: ops.score(E, T, activations=A, bias_column=True),
        ShapeError,
        r"weight has shape \[4, 5\], \[o, i \+ 1\] of gradient and activations has \[4, 6\]",
    ),
    "dtype": (lambda: ops.score(E.double(), T, activations=A), DTypeError, r"gradient\[0\] has dtype"),
    "strides": (
        lambda: ops.score(E, T, activations=[one.T.contiguous().T for one in A]),
        LayoutError,
        r"activations\[0\] is not contiguous",
    ),
    "scale": (lambda: ops.score(E, T, activations=A, scale=[1.0]), ArgumentError, "has 1 values for 2"),
    "scale nan": (lambda: ops.score(T, T, scale=math.nan), ArgumentError, "scale is nan"),
    "out": (
        lambda: ops.score(E, T, activations=A, out=torch.ones(4, 4)),
        ShapeError,
        r"out has shape \[4, 4\]",
    ),
    "out dtype": (
        lambda: ops.score(E, T, activations=A, out=T.bfloat16()),
        DTypeError,
        "out has dtype bfloat16",
    ),
    "overlap": (lambda: ops.score(E, T, activations=A, out=T), LayoutError, "overlaps"),
    "token dtype": (lambda: ops.score(E, T, tokens=IDS.int()), DTypeError, "expected int64"),
    "token range": (
        lambda: ops.score(E, torch.ones(7, 4), tokens=IDS + 7),
        ArgumentError,
        r"tokens\[0\] has ids from 7 to 7; expected \[0, 6\]",
    ),
    "table": (lambda: ops.score(E, T, tokens=IDS), ShapeError, r"shape \[4, 5\]; expected \[V, 4\]"),
    "square rows": (lambda: ops.score(E, tokens=IDS, kind="square"), ArgumentError, "pass out"),
    "threads": (lambda: ops.score(T, T, n_threads=-1), ArgumentError, "n_threads is -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
