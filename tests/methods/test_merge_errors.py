"""Every way to call `merge_` and `merge` wrongly: a named error, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tvfast
from tvfast.errors import (
    ArgumentError,
    DeviceError,
    DTypeError,
    LayoutError,
    ShapeError,
    StateDictError,
    UnknownNameError,
)

ONE, TWO = torch.ones(4), torch.full((4,), 2.0)

WRONG_ARGUMENTS: list[tuple[dict[str, Any], type[ArgumentError], str]] = [
    ({"method": "tise"}, UnknownNameError, "method 'tise' does not exist; did you mean 'ties'?"),
    ({"method": "ties", "densty": 0.2}, UnknownNameError, "'densty' does not exist; did you mean 'density'?"),
    ({"method": "ties", "nonsense": None}, UnknownNameError, "'nonsense' does not exist"),
    ({"method": "linear", "density": 0.2}, ArgumentError, "does not take 'density'.*della.*ties"),
    ({"method": "ties", "gamma": 0.2}, ArgumentError, "take 'gamma': breadcrumbs, breadcrumbs_ties"),
    ({"method": "slerp", "weights": [1]}, ArgumentError, "'slerp' does not take 'weights'"),
    ({"method": "ties", "tie": "hsah"}, UnknownNameError, "tie 'hsah' does not exist; did you mean 'hash'?"),
    ({"method": "ties", "dialect": "mergkit"}, UnknownNameError, "did you mean 'mergekit'?"),
    ({"method": "slerp", "dialect": "paper"}, UnknownNameError, "expected one of mergekit"),
    ({"method": "ties", "density": -0.1}, ArgumentError, r"density is -0.1; expected a number in \[0, 1\]"),
    ({"method": "ties", "density": 1.5}, ArgumentError, "density is 1.5"),
    ({"method": "dare_ties", "density": math.nan}, ArgumentError, "density is nan"),
    ({"method": "ties", "density": [0.1, math.nan]}, ArgumentError, "density is nan"),
    ({"method": "ties", "density": "half"}, ArgumentError, "density is 'half'; expected a number"),
    ({"method": "ties", "density": True}, ArgumentError, "density is True"),
    ({"method": "breadcrumbs", "gamma": 1.01}, ArgumentError, "gamma is 1.01"),
    ({"method": "breadcrumbs", "gamma": math.nan}, ArgumentError, "gamma is nan"),
    ({"method": "sce", "select_topk": 2}, ArgumentError, "select_topk is 2"),
    ({"method": "sce", "select_topk": [0.5, 0.5]}, ArgumentError, "select_topk is a sequence"),
    ({"method": "slerp", "t": math.inf}, ArgumentError, "t is inf; expected a finite number"),
    ({"method": "della", "density": 0.9}, ArgumentError, r"from 0.75 to 1.05; expected both inside \(0, 1\)"),
    ({"method": "della", "density": 0.5, "epsilon": math.nan}, ArgumentError, "epsilon is nan"),
    ({"method": "ties", "weights": [1, 2, 3]}, ArgumentError, "weights has 3 values for 2 models"),
    ({"method": "ties", "weights": []}, ArgumentError, "weights has 0 values for 2 models"),
    ({"method": "ties", "density": [0.5]}, ArgumentError, "density has 1 values for 2 models"),
    ({"method": "ties", "weights": [1, math.inf]}, ArgumentError, "weights is inf; expected a finite"),
    ({"method": "ties", "weights": "ab"}, ArgumentError, "weights is 'ab'"),
    ({"method": "ties", "scale": math.nan}, ArgumentError, "scale is nan; expected a finite"),
    ({"method": "ties", "scale": [1, 2]}, ArgumentError, "scale is a sequence; expected one number"),
    ({"method": "ties", "seed": 1.5}, ArgumentError, "seed is 1.5; expected an integer"),
    ({"method": "ties", "normalize": 1}, ArgumentError, "normalize is 1; expected True or False"),
    ({"method": "ties", "n_threads": -1}, ArgumentError, "n_threads is -1"),
    ({"method": "ties", "n_threads": 2.0}, ArgumentError, "n_threads is 2.0"),
    ({"method": "ties", "n_threads": 2**40}, ArgumentError, r"expected an integer in \[0, 65536\]"),
    ({"method": "ties", "weights": 1e39}, ArgumentError, "weights is 1e.39; expected a finite number that"),
    (
        {"method": "ties", "scale": -1e39},
        ArgumentError,
        "scale is -1e.39; expected a finite number that float32",
    ),
    ({"method": "ties", "lambda": 0.5}, UnknownNameError, "'lambda' does not exist; did you mean 'scale'?"),
    ({"method": "ties", "weight": 1}, UnknownNameError, "'weight' does not exist; did you mean 'weights'?"),
    ({"method": "ties", "seed": True}, ArgumentError, "seed is True; expected an integer"),
    ({"method": "slerp"}, ArgumentError, "got 2 models; expected 1 besides the base"),
    ({"method": "passthrough"}, ArgumentError, "got 2 models; expected 1"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG_ARGUMENTS, ids=lambda v: str(v)[:60])
def test_wrong_arguments(arguments: dict[str, Any], error: type[ArgumentError], message: str) -> None:
    if arguments["method"] == "slerp" and len(arguments) > 1:
        models = [ONE]
    else:
        models = [ONE, TWO]
    base = torch.zeros(4)
    with pytest.raises(error, match=message) as caught:
        tvfast.merge_(base, models, **arguments)
    assert isinstance(caught.value, ValueError)
    assert base.tolist() == [0.0] * 4


def bad_views() -> list[tuple[str, Callable[[], Any], Callable[[], list[Any]], type[ArgumentError], str]]:
    wide = torch.zeros(4, 4)
    return [
        (
            "shape",
            lambda: ONE.clone(),
            lambda: [torch.ones(5)],
            ShapeError,
            r"'tensor': models\[0\] has shape \[5\], base has \[4\]",
        ),
        ("rank", lambda: ONE.clone(), lambda: [torch.ones(4, 1)], ShapeError, r"\[4, 1\]"),
        (
            "int base",
            lambda: torch.arange(4),
            lambda: [torch.arange(4)],
            DTypeError,
            "int64; expected a floating",
        ),
        (
            "int model",
            lambda: ONE.clone(),
            lambda: [torch.arange(4)],
            DTypeError,
            "torch.int64, base has torch.float32",
        ),
        (
            "complex",
            lambda: ONE.clone(),
            lambda: [torch.ones(4, dtype=torch.complex64)],
            DTypeError,
            "complex64",
        ),
        (
            "float8",
            lambda: ONE.clone(),
            lambda: [ONE.to(torch.float8_e4m3fn)],
            DTypeError,
            "float8_e4m3fn; expected float32",
        ),
        (
            "meta",
            lambda: torch.ones(4, device="meta"),
            lambda: [torch.ones(4, device="meta")],
            LayoutError,
            "meta device",
        ),
        (
            "device",
            lambda: ONE.clone(),
            lambda: [torch.ones(4, device="meta")],
            DeviceError,
            "on meta, base on cpu",
        ),
        (
            "sparse",
            lambda: ONE.clone(),
            lambda: [ONE.to_sparse()],
            LayoutError,
            r"sparse_coo; .*to_dense\(\)",
        ),
        (
            "transposed",
            lambda: torch.zeros(4, 4),
            lambda: [wide.t()[:, ::1]],
            LayoutError,
            r"not contiguous.*\.contiguous\(\)",
        ),
        ("expanded", lambda: torch.zeros(1).expand(4), lambda: [ONE], LayoutError, "base is not contiguous"),
        ("no models", lambda: ONE.clone(), list, ArgumentError, "got 0 models; expected at least 1"),
        (
            "one model",
            lambda: ONE.clone(),
            lambda: ONE,
            ArgumentError,
            r"models is a Tensor; .*Pass \[model\]",
        ),
        ("number", lambda: ONE.clone(), lambda: 3, ArgumentError, "models is a int; expected a list"),
        ("string", lambda: "base", lambda: [ONE], ArgumentError, "base is a str; expected a tensor"),
        ("no tensor", lambda: {"a": 1.0}, lambda: [{"a": ONE}], ArgumentError, r"base\['a'\] is a float"),
        (
            "structure",
            lambda: [ONE.clone()],
            lambda: [ONE],
            StateDictError,
            "lacks the tensor '0' and has the tensor 'tensor'",
        ),
        (
            "lengths",
            lambda: [ONE.clone()],
            lambda: [[ONE, ONE]],
            StateDictError,
            "has the tensor '1' that base lacks",
        ),
        (
            "names",
            lambda: {f"w{i}": ONE.clone() for i in range(9)},
            lambda: [{"w0": ONE, "x": ONE}],
            StateDictError,
            r"models\[0\] lacks 8 tensors \('w1', 'w2', 'w3', 'w4', 'w5' and 3 more\) and has the tensor 'x'",
        ),
    ]


@pytest.mark.parametrize(
    ("base", "models", "error", "message"),
    [case[1:] for case in bad_views()],
    ids=[c[0] for c in bad_views()],
)
def test_wrong_tensors(
    base: Callable[[], Any], models: Callable[[], Any], error: type[ArgumentError], message: str
) -> None:
    for verb in (tvfast.merge_, tvfast.merge):
        with pytest.raises(error, match=message):
            verb(base(), models(), method="task_arithmetic")


def test_everything_is_checked_before_anything_is_written() -> None:
    base = {"a": torch.zeros(4), "b": torch.zeros(4), "c": torch.zeros(2, 2)}
    model = {"a": ONE, "b": ONE, "c": torch.ones(2, 2).t()}
    with pytest.raises(LayoutError, match="'c'"):
        tvfast.merge_(base, [model], method="task_arithmetic")
    model["c"] = torch.ones(4)
    with pytest.raises(ShapeError, match="'c'"):
        tvfast.merge_(base, [model], method="task_arithmetic")
    assert all(v.count_nonzero() == 0 for v in base.values())


def test_integers_must_have_the_shape_of_the_base() -> None:
    base = {"w": torch.zeros(2), "ids": torch.arange(3)}
    with pytest.raises(ShapeError, match=r"'ids': models\[0\] has shape \[4\], base has \[3\]"):
        tvfast.merge_(base, [{"w": torch.ones(2), "ids": torch.arange(4)}], method="linear")


def test_negated_views_are_refused() -> None:
    """Their memory holds the other sign."""
    negated = torch._neg_view(torch.ones(3))
    with pytest.raises(LayoutError, match=r"models\[0\] is a view with a pending negation"):
        tvfast.merge(torch.zeros(3), [negated], method="linear")
    merged = tvfast.merge(torch.zeros(3), [negated.resolve_neg()], method="linear")
    assert merged.equal(torch.full((3,), -1.0))


class Wrapper(Tensor):
    """A tensor subclass without memory of its own, as quantised tensors are."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made: Wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


def test_tensor_subclasses_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"models\[0\] is a Wrapper, a tensor subclass"):
        tvfast.merge(torch.zeros(3), [Wrapper(torch.zeros(3))], method="linear")


def test_primitives_refuse_distributed_tensors_by_name() -> None:
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        leaf = DTensor.from_local(torch.zeros(3), mesh, [Replicate()])
        with pytest.raises(LayoutError, match="is a DTensor; expected a local tensor"):
            tvfast.ops.threshold(leaf, 0.5)
    finally:
        distributed.destroy_process_group()
