"""`merge_` and `merge`: structures, names, autograd, memory, dtypes, work tables and the registry."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tvfast
from tests.methods.inputs import scores_for
from tvfast import errors, merging
from tvfast.errors import (
    BackendError,
    LayoutError,
    StateDictError,
)
from tvfast.methods import METHODS, make_method, staged_methods


class Block(nn.Module):
    """A layer with parameters, a float buffer and an integer buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(3)


class Tied(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight


def state(seed: int, **dtypes: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (6, 10), "b": (3,), "c": ()}
    return {
        k: torch.randn(s, generator=generator).to(dtypes.get(k, torch.float32)) for k, s in shapes.items()
    }


def same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.equal(right)


# -- structures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "della"])
def test_tensors_lists_dicts_and_tuples_agree(method: str) -> None:
    base, models = state(0), [state(1), state(2)]
    options: dict[str, Any] = {"method": method} | ({} if method == "task_arithmetic" else {"density": 0.5})
    expected = tvfast.merge(
        {"0": base["a"], "1": base["b"]}, [{"0": m["a"], "1": m["b"]} for m in models], **options
    )
    as_list = tvfast.merge([base["a"], base["b"]], [[m["a"], m["b"]] for m in models], **options)
    as_tuple = tvfast.merge((base["a"], base["b"]), [(m["a"], m["b"]) for m in models], **options)
    assert isinstance(as_list, list)
    assert isinstance(as_tuple, tuple)
    for found in (as_list, as_tuple):
        assert all(same(found[i], expected[str(i)]) for i in range(2))
    bare = tvfast.merge(base["a"], [m["a"] for m in models], **options)
    named = tvfast.merge({"tensor": base["a"]}, [{"tensor": m["a"]} for m in models], **options)
    assert same(bare, named["tensor"])


@pytest.mark.parametrize("method", staged_methods())
def test_in_place_equals_out_of_place(method: str) -> None:
    n = min(3, METHODS[method].n_models[1] or 3)
    base, models = state(0, b=torch.bfloat16), [state(k + 1, a=torch.float16) for k in range(n)]
    before = copy.deepcopy((base, models))
    scores = scores_for(method, base, n)
    expected = tvfast.merge(base, models, method=method, **scores)
    assert all(same(base[k], before[0][k]) for k in base)
    addresses = {k: v.data_ptr() for k, v in base.items()}
    assert tvfast.merge_(base, models, method=method, **scores) is base
    assert {k: v.data_ptr() for k, v in base.items()} == addresses
    assert all(same(base[k], expected[k]) for k in base)
    assert all(same(m[k], old[k]) for m, old in zip(models, before[1], strict=True) for k in m)


def test_modules_merge_parameters_and_float_buffers() -> None:
    base, models = Block(0), [Block(1), Block(2)]
    base.norm.num_batches_tracked += 7
    for k, model in enumerate(models):
        model.norm.running_mean += k + 1.0
    expected = tvfast.merge(
        dict(base.state_dict()), [m.state_dict() for m in models], method="ties", density=0.5
    )
    merged = tvfast.merge(base, models, method="ties", density=0.5)
    assert merged is not base
    assert isinstance(merged, Block)
    assert all(p.requires_grad for p in merged.parameters())
    parameters = list(base.parameters())
    assert tvfast.merge_(base, models, method="ties", density=0.5) is base
    assert all(p is q for p, q in zip(base.parameters(), parameters, strict=True))
    for name, value in expected.items():
        assert same(base.state_dict()[name], value)
        assert same(merged.state_dict()[name], value)
    assert int(base.norm.num_batches_tracked) == 7


def test_modules_mix_with_state_dicts() -> None:
    base, model = Block(0), Block(1)
    expected = tvfast.merge(base, [model], method="task_arithmetic").state_dict()
    found = tvfast.merge(dict(base.state_dict()), [model], method="task_arithmetic")
    assert all(same(found[name], expected[name]) for name in expected)


def test_dicts_keep_their_kind_and_keys() -> None:
    base = OrderedDict(state(0))
    out = tvfast.merge(base, [state(1)], method="linear")
    assert type(out) is OrderedDict
    assert list(out) == list(base)
    assert type(tvfast.merge(dict(base), [state(1)], method="linear")) is dict


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "module._orig_mod."])
@pytest.mark.parametrize("wrapped", ["base", "model"])
def test_wrapper_prefixes_are_no_part_of_a_name(prefix: str, wrapped: str) -> None:
    base, model = state(0), state(1)
    options: dict[str, Any] = {"method": "dare_linear", "density": 0.5}
    expected = tvfast.merge(base, [model], **options)
    if wrapped == "base":
        found = tvfast.merge({prefix + k: v for k, v in base.items()}, [model], **options)
        assert all(same(found[prefix + k], expected[k]) for k in base)
    else:
        found = tvfast.merge(base, [{prefix + k: v for k, v in model.items()}], **options)
        assert all(same(found[k], expected[k]) for k in base)


def test_a_submodule_called_module_keeps_its_name() -> None:
    base = {"module.w": torch.zeros(2), "w": torch.ones(2)}
    out = tvfast.merge(
        base, [{"module.w": torch.full((2,), 3.0), "w": torch.ones(2)}], method="task_arithmetic"
    )
    assert {k: v.tolist() for k, v in out.items()} == {"module.w": [3.0, 3.0], "w": [1.0, 1.0]}
    with pytest.raises(StateDictError, match="wrapper prefixes"):
        tvfast.merge({"_orig_mod.w": torch.zeros(1), "w": torch.zeros(1)}, [{}], method="linear")


def test_extra_state_is_left_alone() -> None:
    out = tvfast.merge(
        {"w": torch.zeros(2), "x._extra_state": b"q"}, [{"w": torch.ones(2)}], method="task_arithmetic"
    )
    assert out["x._extra_state"] == b"q"


# -- autograd --------------------------------------------------------------------------------------


def test_leaves_that_require_grad_are_written_in_place() -> None:
    base = torch.ones(4, requires_grad=True)
    model = torch.full((4,), 3.0, requires_grad=True)
    assert tvfast.merge_(base, [model], method="task_arithmetic") is base
    assert base.tolist() == [3.0] * 4
    assert base.requires_grad
    assert base.is_leaf
    assert not tvfast.merge(base, [model], method="task_arithmetic").requires_grad


def test_a_write_invalidates_saved_tensors() -> None:
    base = torch.ones(4)
    factor = torch.ones(4, requires_grad=True)
    product = (factor * base).sum()
    tvfast.merge_(base, [torch.zeros(4)], method="task_arithmetic")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_tensors_can_be_merged() -> None:
    with torch.inference_mode():
        base = torch.zeros(3)
        tvfast.merge_(base, [torch.ones(3)], method="task_arithmetic")
        assert base.tolist() == [1.0] * 3


# -- aliases and overlap ---------------------------------------------------------------------------


def test_tied_tensors_are_merged_once() -> None:
    base, models = Tied(0), [Tied(1), Tied(2)]
    expected = base.embed.weight.detach().clone()
    for model in models:
        expected += model.embed.weight.detach() - base.embed.weight.detach()
    merged = tvfast.merge(base, models, method="task_arithmetic")
    tvfast.merge_(base, models, method="task_arithmetic")
    assert torch.allclose(base.head.weight, expected, atol=1e-6)
    assert base.head.weight is base.embed.weight
    assert merged.head.weight is merged.embed.weight
    as_dict = tvfast.merge(dict(base.state_dict()), [m.state_dict() for m in models], method="linear")
    assert as_dict["head.weight"] is as_dict["embed.weight"]


def test_untied_models_of_a_tied_base_must_be_equal() -> None:
    shared = torch.zeros(3)
    base = {"a": shared, "b": shared}
    tvfast.merge_(base, [{"a": torch.ones(3), "b": torch.ones(3)}], method="task_arithmetic")
    assert shared.tolist() == [1.0] * 3
    with pytest.raises(StateDictError, match=r"ties 'a' and 'b', but they differ in models\[0\]"):
        tvfast.merge_(base, [{"a": torch.ones(3), "b": torch.zeros(3)}], method="task_arithmetic")


def test_a_model_may_be_the_base() -> None:
    base, other = torch.ones(5), torch.full((5,), 4.0)
    tvfast.merge_(base, [base, other, base], method="task_arithmetic", weights=[9, 1, 9])
    assert base.tolist() == [4.0] * 5


def test_overlap_is_refused_in_place_and_harmless_out_of_place() -> None:
    memory = torch.arange(12.0)
    base, model = memory[:8], memory[4:]
    with pytest.raises(LayoutError, match="overlaps the memory"):
        tvfast.merge_(base, [model], method="task_arithmetic")
    assert memory.equal(torch.arange(12.0))
    assert tvfast.merge(base, [model], method="task_arithmetic").equal(torch.arange(4.0, 12.0))


def test_overlap_between_tensors_is_refused() -> None:
    memory = torch.zeros(10)
    with pytest.raises(LayoutError, match="both are written"):
        tvfast.merge_([memory[:6], memory[4:]], [[torch.ones(6), torch.ones(6)]], method="linear")
    base = {"a": torch.zeros(3), "b": torch.ones(3)}
    with pytest.raises(LayoutError, match=r"'a': models\[0\] overlaps the memory of tensor 'b': base"):
        tvfast.merge_(base, [{"a": base["b"], "b": torch.ones(3)}], method="linear")


def test_neighbours_in_memory_do_not_overlap() -> None:
    memory = torch.zeros(10)
    tvfast.merge_(
        [memory[:5], memory[5:]], [[torch.ones(5), torch.full((5,), 2.0)]], method="task_arithmetic"
    )
    assert memory.tolist() == [1.0] * 5 + [2.0] * 5


# -- dtypes ----------------------------------------------------------------------------------------


def test_integers_and_booleans_stay_those_of_the_base() -> None:
    base = {"w": torch.zeros(2), "n": torch.tensor(3), "flag": torch.tensor([True, False])}
    model = {"w": torch.ones(2), "n": torch.tensor(9), "flag": torch.tensor([False, False])}
    out = tvfast.merge(base, [model], method="task_arithmetic")
    assert (int(out["n"]), out["flag"].tolist(), out["w"].tolist()) == (3, [True, False], [1.0, 1.0])
    assert out["n"] is not base["n"]
    tvfast.merge_(base, [model], method="task_arithmetic")
    assert (int(base["n"]), base["w"].tolist()) == (3, [1.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_mix_and_the_base_decides(dtype: torch.dtype, model_dtype: torch.dtype) -> None:
    base = (torch.arange(-30.0, 35.0) / 8).to(dtype)
    model = (torch.arange(65.0) / 8).to(model_dtype)
    out = tvfast.merge(base, [model, model], method="ties", density=0.5, scale=0.5, tie="index")
    assert out.dtype == dtype
    tau = model.double() - base.double()
    kept = torch.zeros_like(tau)
    index = tau.abs().sort(descending=True, stable=True).indices[: int(0.5 * 65)]
    kept[index] = tau[index]
    assert same(out, (base.double() + 0.5 * kept).to(dtype))


def test_float64_leaves_are_merged_in_float64() -> None:
    base = {"x": torch.full((3,), 1.0, dtype=torch.float64), "y": torch.ones(3)}
    model = {"x": torch.full((3,), 1.0 + 2.0**-50, dtype=torch.float64), "y": torch.ones(3)}
    assert tvfast.merge(base, [model], method="task_arithmetic")["x"].equal(model["x"])
    out = tvfast.merge(base, [model], method="ties", dialect="paper", density=0.5)  # one table for both
    assert out["x"].equal(model["x"])


def test_float64_under_another_forced_backend_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVFAST_BACKEND", "cpp")
    base = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(BackendError, match="float64 tensors are merged by the reference"):
        tvfast.merge_(base, [base + 1], method="linear")


# -- one table -------------------------------------------------------------------------------------


def test_many_small_tensors_share_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.norm": torch.randn(i % 7, generator=generator) for i in range(600)}
    models = [{k: v + torch.randn(v.shape, generator=generator) for k, v in base.items()} for _ in range(3)]
    tables = []
    original = merging.backend_for

    def counted(table: Any, *more: Any) -> Any:
        tables.append(len(table.entries))
        return original(table, *more)

    monkeypatch.setattr(merging, "backend_for", counted)
    out = tvfast.merge(base, models, method="ties", density=0.5)
    assert tables == [sum(v.numel() > 0 for v in base.values())]
    for name in list(base)[:20]:
        alone = tvfast.merge(
            {name: base[name]}, [{name: m[name]} for m in models], method="ties", density=0.5
        )
        assert same(out[name], alone[name])


def test_batches_for_bit_planes_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {str(i): torch.randn(40 + i, 3) for i in range(9)}
    models = [{k: v + torch.randn(v.shape) for k, v in base.items()} for _ in range(2)]
    expected = tvfast.merge(base, models, method="della", density=0.5)
    monkeypatch.setattr(merging, "PLANE_BYTES", 100)
    found = tvfast.merge(base, models, method="della", density=0.5)
    assert all(same(found[k], expected[k]) for k in base)


def test_nothing_to_merge_is_no_error() -> None:
    assert tvfast.merge({}, [{}, {}], method="ties", density=0.5) == {}
    base = torch.zeros(0, 4)
    assert tvfast.merge_(base, [torch.zeros(0, 4)], method="slerp") is base


# -- registry and package --------------------------------------------------------------------------


def test_every_method_is_described() -> None:
    for name, info in METHODS.items():
        assert info.formula.startswith(("θ =", "θ ="))
        assert info.source
        assert "mergekit" not in info.dialects[1:], "it is the default where it exists"
        assert all(p.meaning for p in info.parameters), name
        assert {"scale", "seed", "tie", "dialect"} <= {p.name for p in info.parameters}


def test_the_registry_knows_what_every_module_registers_before_it_is_imported() -> None:
    """In a process of its own, in which no test has registered a method."""
    script = """
import pkgutil, sys
from importlib import import_module
import tvfast.methods
from tvfast.methods import METHODS
from tvfast.recipe.keys import WORDS

names = set(METHODS)
assert len(METHODS) == len(names) == 37
assert "tvfast.methods.ties" not in sys.modules
assert METHODS["ties"].cls.__module__ == "tvfast.methods.ties"
for module in pkgutil.walk_packages(tvfast.methods.__path__, "tvfast.methods."):
    import_module(module.name)
assert set(METHODS) == names == {info.name for info in METHODS.values()}
assert sorted({p.name for info in METHODS.values() for p in info.parameters if p.words}) == list(WORDS)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_methods_are_frozen_and_numbers_may_be_arrays() -> None:
    method = make_method("ties", weights=torch.tensor([1, 2]), density=torch.tensor(0.5))
    assert (method.weights, method.density) == ((1.0, 2.0), 0.5)
    with pytest.raises(AttributeError):
        method.scale = 2.0


def test_numbers_of_other_libraries_are_numbers() -> None:
    base, models = torch.zeros(64), [torch.ones(64), -torch.ones(64)]
    keywords: dict[str, Any] = {"density": 0.5, "weights": [1.0, 0.5]}
    plain = tvfast.merge(base, models, "ties", seed=3, **keywords)
    keywords = {"density": np.float32(0.5), "weights": np.array([1.0, 0.5])}
    assert tvfast.merge(base, models, method="ties", seed=np.int64(3), **keywords).equal(plain)


def test_the_only_model_may_bring_its_number_in_a_list() -> None:
    base, model = torch.zeros(3), torch.ones(3)
    assert tvfast.merge(base, [model], method="passthrough", scale=[2.0]).tolist() == [2.0] * 3  # type: ignore[arg-type]
    assert tvfast.merge(base, [model], method="slerp", t=[1.0]).equal(model)


@pytest.mark.parametrize("n_models", [1, 17, 40])
def test_any_number_of_copies_averages_to_the_model(n_models: int) -> None:
    base, model = torch.zeros(257), torch.arange(257.0) - 128
    for method in ("ties", "linear", "della"):
        assert tvfast.merge(base, [model] * n_models, method=method).equal(model), method


def test_public_names() -> None:
    assert tvfast.merge_ is merging.merge_
    assert tvfast.errors is errors
    assert {"merge_", "merge", "compare", "ops", "methods", "program"} <= set(dir(tvfast))
    with pytest.raises(AttributeError, match="has no attribute 'mrege'"):
        _ = tvfast.mrege
