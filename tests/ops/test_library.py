"""The primitives under torch.compile, FakeTensor and opcheck: the operators of `tvfast.ops.library`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from tests.methods.inputs import normal
from tvfast import ops
from tvfast.errors import ArgumentError
from tvfast.ops import library
from tvfast.ops._packing import pack_program, pack_scalars, unpack_program, unpack_scalars
from tvfast.ops.primitives import EVERYTHING
from tvfast.ops.raw import Wants
from tvfast.program import Divisor, Keep, ModelScalars, Program, Reduce, TensorScalars, Tie, Vote

BASE = normal(3, 70)
MODELS = [normal(3, 70, seed=k) for k in (1, 2)]
FACTORS = {"a": torch.eye(6) * 2, "b": [torch.eye(2), 3 * torch.eye(1)]}
X = normal(3, 6)
TIES = Program(keep=Keep.BAND, tie=Tie.HASH, vote=Vote.MASS, divisor=Divisor.COUNT)
NUMBERS = TensorScalars(
    models=[ModelScalars(weight=0.5, lo=0.3, lo_cut=2**31, key=2**64 - 3), ModelScalars(limit=7, gain=-0.25)],
    scale=0.75,
)


@pytest.fixture(autouse=True)
def _compiled_anew() -> None:
    torch.compiler.reset()


CALLS: dict[str, Callable[..., Any]] = {
    "threshold": lambda base, one, two, x: ops.threshold(one, 0.3, base=base),
    "thresholds": lambda base, one, two, x: ops.threshold([one, two], 0.3),
    "topk_mask": lambda base, one, two, x: ops.topk_mask(one, 0.3, base=base, tie="index"),
    "elect": lambda base, one, two, x: ops.elect([one, two], weights=[1.0, -2.0]),
    "stacked elect": lambda base, one, two, x: ops.elect(torch.stack([one, two])),
    "combine": lambda base, one, two, x: ops.combine(base, [one, two], TIES, NUMBERS),
    "plain combine": lambda base, one, two, x: ops.combine(None, [one, two]),
    "combine of task vectors": lambda base, one, two, x: ops.combine(base, [one, two], task_vectors=True),
    "score": lambda base, one, two, x: ops.score(one, two, kind="delta", base=base),
    "score of a layer": lambda base, one, two, x: ops.score(
        one, kind="square", activations=two, bias_column=True, scale=0.5
    ),
    "score of samples": lambda base, one, two, x: ops.score(
        [one, two], kind="square", activations=[base, base], scale=[1.0, 2.0]
    ),
    "root kron": lambda base, one, two, x: ops.kron(
        x, torch.ones(6, 2), torch.ones(3, 1), square_root=True, scale=2.0
    ),
    "kron": lambda base, one, two, x: ops.kron(x, FACTORS["a"], FACTORS["b"], block=2),
}


def outputs(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", CALLS)
def test_compiled_whole(name: str, backend: str) -> None:
    compiled = torch.compile(CALLS[name], fullgraph=True, backend=backend)
    expected = outputs(CALLS[name](BASE, *MODELS, X))
    found = outputs(compiled(BASE, *MODELS, X))
    for left, right in zip(found, expected, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors(name: str) -> None:
    expected = outputs(CALLS[name](BASE, *MODELS, X))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (BASE, *MODELS, X)]
        found = outputs(CALLS[name](*fakes))
    for left, right in zip(found, expected, strict=True):
        assert (left.shape, left.dtype, left.device) == (right.shape, right.dtype, right.device)


INTO: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "threshold": (lambda one, out: ops.threshold(one, 0.3, out=out), torch.zeros([])),
    "topk_mask": (lambda one, out: ops.topk_mask(one, 0.3, out=out), torch.zeros(3, 70, dtype=torch.bool)),
    "elect": (lambda one, out: ops.elect([one, BASE], out=out), torch.zeros(3, 70, dtype=torch.int8)),
    "combine": (lambda one, out: ops.combine(one, MODELS, TIES, NUMBERS, out=out), torch.zeros(3, 70)),
    "combine in place": (lambda one, out: ops.combine(out, [one], out=out), BASE.clone()),
    "score": (lambda one, out: ops.score(one, kind="square", out=out), torch.ones(3, 70)),
    "added kron": (
        lambda one, out: ops.kron(one, torch.eye(70), torch.eye(3), out=out, accumulate=True)[0],
        torch.ones(3, 70),
    ),
    "kron": (lambda one, out: ops.kron(one, torch.eye(70), torch.eye(3), out=out)[0], torch.zeros(3, 70)),
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", INTO)
def test_compiled_into_out(name: str, backend: str) -> None:
    call, out = INTO[name]

    def changed(one: Tensor, target: Tensor) -> Tensor:
        target.add_(0) if target.is_floating_point() else target.zero_()
        found = call(one, target)
        return found.clone() if target.is_floating_point() else found.to(torch.float32)

    expected, found = out.clone(), out.clone()
    wanted = changed(MODELS[0], expected)
    returned = torch.compile(changed, fullgraph=True, backend=backend)(MODELS[0], found)
    assert torch.equal(found, expected)
    assert torch.equal(returned, wanted)


def numbers_of(moments: Any) -> list[float]:
    found: list[float] = []

    def add(value: Any) -> None:
        if isinstance(value, list):
            for one in value:
                add(one)
        else:
            found.append(float(value))

    for one in fields(moments):
        add(getattr(moments, one.name))
    return found


def test_measure_gives_tensors_where_it_is_traced() -> None:
    def asked(base: Tensor, one: Tensor, two: Tensor) -> Any:
        return ops.measure(base, [one, two], EVERYTHING | Wants.DOTS, scores=[two, two])

    def sums(base: Tensor, one: Tensor, two: Tensor) -> Tensor:
        moments = asked(base, one, two)
        return torch.stack([moments.gram[0][1], moments.l1[1], moments.dots[0]])

    plain = asked(BASE, *MODELS)
    compiled = torch.compile(sums, fullgraph=True, backend="aot_eager")(BASE, *MODELS)
    assert compiled.tolist() == [plain.gram[0][1], plain.l1[1], plain.dots[0]]
    traced = library.measure(BASE, MODELS, EVERYTHING | Wants.DOTS, scores=[MODELS[1]] * 2)
    assert numbers_of(traced) == numbers_of(plain)
    with FakeTensorMode() as mode:
        fake = asked(*(mode.from_tensor(tensor) for tensor in (BASE, *MODELS)))
    assert fake.gram[1][1].dtype == torch.float64
    assert fake.n_conflict.dtype == torch.int64
    with pytest.raises(ArgumentError, match="out is given in a traced call"):
        library.measure(BASE, MODELS, out=plain)


def op_arguments() -> list[tuple[Any, tuple[Any, ...]]]:
    op = torch.ops.tvfast
    program, (reals, wholes) = pack_program(TIES), pack_scalars(NUMBERS)
    merge = (BASE, MODELS, program, reals, wholes, [], [], 0, None, "", False, 1)
    a, b = [torch.eye(6)], [torch.eye(3)]
    return [
        (op.threshold, (MODELS, 0.3, [], 1)),
        (op.threshold_out, (MODELS, 0.3, [BASE, BASE], 1, torch.zeros(2))),
        (op.topk_mask, (BASE, 0.3, None, "hash", 0, "tensor", 1)),
        (op.topk_mask_out, (BASE, 0.3, None, "ge", 0, "", 1, torch.zeros(3, 70, dtype=torch.bool))),
        (op.elect, (MODELS, [1.0, 2.0], "count", "none", 1)),
        (op.elect_out, (MODELS, [1.0, 2.0], "mass", "plus", 1, torch.zeros(3, 70, dtype=torch.int8))),
        (op.combine, merge),
        (op.combine_out, (*merge, torch.zeros(3, 70))),
        (op.measure, (BASE, MODELS, int(EVERYTHING), *merge[2:])),
        (op.score, ([BASE], MODELS[0], "product", None, [], False, [], True, [1.0], True, 1)),
        (
            op.score_out,
            ([BASE], None, "square", None, [], False, [], True, [1.0], True, 1, torch.zeros(3, 70)),
        ),
        (op.kron, (X, a, True, b, True, None, 1.0, False, False, 1)),
        (op.kron_out, (X, a, True, b, True, None, 2.0, False, False, 1, True, torch.zeros(3, 6))),
    ]


@pytest.mark.parametrize(("op", "arguments"), op_arguments(), ids=lambda v: str(v)[:30])
def test_opcheck(op: Any, arguments: tuple[Any, ...]) -> None:
    opcheck(op.default, arguments)


def test_every_public_tensor_function_is_an_operator() -> None:
    for name in set(ops.__all__) - {"backend_statuses"}:
        assert hasattr(torch.ops.tvfast, name)


def test_programs_and_scalars_survive_packing() -> None:
    program = Program(keep=Keep.MASK, tie=Tie.INDEX, reduce=Reduce.FUSED_SUM, divisor=Divisor.WEIGHT)
    assert unpack_program(pack_program(program)) == program
    assert unpack_scalars(*pack_scalars(NUMBERS)) == NUMBERS
    open_band = TensorScalars(models=[ModelScalars(hi=math.inf, key=2**63)])
    assert unpack_scalars(*pack_scalars(open_band)) == open_band


def test_errors_of_traced_calls_are_those_of_the_call() -> None:
    compiled = torch.compile(lambda x: ops.threshold(x, 1.5), fullgraph=True, backend="eager")
    # What torch.compile traces under `no_grad` leaves gradients off where the trace ends in an error.
    with (
        torch.enable_grad(),
        pytest.raises(ArgumentError, match=r"density is 1.5; expected a number in \[0, 1\]"),
    ):
        compiled(BASE)


def test_parameters_that_want_gradients_are_not_recorded() -> None:
    weight = torch.nn.Parameter(BASE.clone())
    found = torch.compile(lambda w: ops.combine(w, MODELS), fullgraph=True, backend="aot_eager")(weight)
    assert not found.requires_grad
    assert torch.equal(found, ops.combine(weight, MODELS))
