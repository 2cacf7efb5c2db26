"""The bits of a sharded merge are those of one process that holds everything, for every method and layout."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tvfast
from tests.methods.inputs import scores_for
from tests.sharded.cluster import Cluster, failures, same_bits
from tests.sharded.layouts import MESHES, Layout, factors_of, mesh_of, weights
from tvfast.methods import METHODS, make_method
from tvfast.methods.base import TensorMethod

SHAPES = {
    "embed.weight": (37, 19),
    "layers.0.norm.weight": (5,),
    "layers.0.experts": (3, 4, 7),
    "layers.1.mlp.weight": (64, 130),
    "head.bias": (1,),
    "empty": (0, 3),
    "scalar": (),
}

PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "breadcrumbs": [{"density": 0.6, "gamma": 0.05}, {"density": 0.6, "gamma": 0.05, "dialect": "paper"}],
    "breadcrumbs_ties": [{"density": 0.5, "gamma": 0.1, "tie": "index"}],
    "dare_linear": [{"density": 0.4}, {"density": 0.4, "dialect": "paper", "seed": 7}],
    "dare_ties": [{"density": [0.3, 0.5, 1.0]}, {"density": 0.4, "dialect": "paper"}],
    "della": [{"density": 0.5}, {"density": 0.5, "dialect": "paper", "epsilon": 0.2}],
    "della_linear": [{"density": 0.5}],
    "lata": [{}, {"granularity": "module", "drop": "logarithmic"}, {"outside": "target"}],
    "magnitude_prune": [{"density": 0.3}],
    "nearswap": [{"t": 1e-3}],
    "slerp": [{"t": 0.3}],
    "sce": [{"select_topk": 0.4}, {"select_topk": 0.4, "dialect": "paper"}],
    "sta": [{"density": 0.3}],
    "sta_forget": [{"density": 0.3}],
    "ties": [
        {"density": 0.3, "weights": [0.5, 1.0, 0.25]},
        {"density": 0.3, "tie": "index"},
        {"density": [0.2, 0.5, 1.0], "tie": "ge", "rescale": True},
        {"density": 0.2, "dialect": "paper"},
        {"density": 0.2, "tie": "index", "scope": "model"},
        {"density": 0.4, "dialect": "peft"},
        {"density": 0.4, "dialect": "sd_mecha"},
    ],
}
CASES = [(name, p) for name in METHODS for p in PARAMETERS.get(name, [{}])]
PROGRAMS = [(name, p) for name, p in CASES if not isinstance(make_method(name, **p), TensorMethod)]
WHOLE = [
    (name, p)
    for name, p in [*CASES, ("model_stock", {"filter_wise": True})]
    if isinstance(make_method(name, **p), TensorMethod) and not make_method(name, **p).statistics
]
DTYPES = ("float32", "bfloat16", "float16")


def n_models_of(name: str) -> int:
    return min(3, METHODS[name].n_models[1] or 3)


def merges(
    rank: int,
    mesh_shape: tuple[int, ...],
    layouts: dict[str, Layout],
    cases: list[Any],
    dtype: str,
    seed: int,
) -> list[str]:
    """Merges in place and into new tensors on every rank; what is not as in one process."""
    mesh, wrong = mesh_of(mesh_shape), []
    for name, parameters in cases:
        base, *models = weights({key: SHAPES[key] for key in layouts}, dtype, seed, n_models_of(name))
        extra = {**scores_for(name, base, len(models)), **parameters}
        want = tvfast.merge(base, models, name, **extra)

        def spread(one: dict[str, Any]) -> dict[str, Any]:
            return {key: layouts[key].place(tensor, mesh) for key, tensor in one.items()}

        shards = dict(extra)
        if "scores" in extra:
            shards["scores"] = [spread(one) for one in extra["scores"]]
        if "instruct" in extra:
            shards["instruct"] = spread(extra["instruct"])
        target, others = spread(base), [spread(model) for model in models]
        fresh = tvfast.merge(target, others, name, redistribute=True, **shards)
        tvfast.merge_(target, others, name, redistribute=True, **shards)
        expected = spread(want)
        for key, tensor in expected.items():
            for verb, found in (("merge", fresh[key]), ("merge_", target[key])):
                if type(found) is not type(tensor) or not same_bits(local(found), local(tensor)):
                    wrong.append(f"{verb} {name} {parameters} {dtype} {key} {layouts[key]} on {mesh_shape}")
    return wrong


def local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@st.composite
def layouts_of(draw: Any, mesh: tuple[int, ...]) -> dict[str, Layout]:
    """A layout of every tensor on a mesh: plain, replicated, or split along any dimensions."""
    found = {}
    for name, shape in SHAPES.items():
        if not shape or draw(st.integers(0, 5)) == 0:
            found[name] = Layout(None)
            continue
        dims = st.integers(0, len(shape) - 1)
        splits = [
            draw(st.one_of(st.just(("replicate", 0, 0)), dims.map(lambda dim: ("shard", dim, 0))))
            for _ in mesh
        ]
        if (
            len(mesh) == 2
            and mesh[1] > 1
            and splits[0] == splits[1] != ("replicate", 0, 0)
            and draw(st.booleans())
        ):
            splits[0] = ("strided", splits[0][1], mesh[1])  # what FSDP2 makes of tensor parallel weights
        found[name] = Layout(tuple(splits))
    return found


@given(data=st.data())
@settings(max_examples=10)
def test_every_program_method_on_any_layout(cluster: Cluster, data: st.DataObject) -> None:
    mesh = data.draw(st.sampled_from(MESHES), "mesh")
    layouts = data.draw(layouts_of(mesh), "layouts")
    cases = data.draw(st.lists(st.sampled_from(PROGRAMS), min_size=8, max_size=8, unique_by=repr), "methods")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    seed = data.draw(st.integers(0, 100), "seed")
    found = cluster.run(torch.Size(mesh).numel(), merges, mesh, layouts, cases, dtype, seed)
    assert failures(found) == []


FSDP = {name: Layout((("shard", 0, 0),) if shape else None) for name, shape in SHAPES.items()}
BOTH = {
    "embed.weight": Layout((("strided", 0, 2), ("shard", 0, 0))),
    "layers.0.norm.weight": Layout((("shard", 0, 0), ("replicate", 0, 0))),
    "layers.0.experts": Layout((("shard", 1, 0), ("shard", 2, 0))),
    "layers.1.mlp.weight": Layout((("shard", 0, 0), ("shard", 1, 0))),
    "head.bias": Layout((("shard", 0, 0), ("shard", 0, 0))),
    "empty": Layout((("shard", 1, 0), ("replicate", 0, 0))),
    "scalar": Layout(None),
}


@pytest.mark.parametrize("mesh", [(2, 2), pytest.param((4,), marks=pytest.mark.slow)], ids=str)
def test_every_program_method(cluster: Cluster, mesh: tuple[int, ...]) -> None:
    layouts = BOTH if len(mesh) == 2 else FSDP
    assert failures(cluster.run(4, merges, mesh, layouts, PROGRAMS, "bfloat16", 3)) == []


def test_float64_tensors(cluster: Cluster) -> None:
    cases = [("ties", {"density": 0.3}), ("dare_linear", {"density": 0.5}), ("slerp", {"t": 0.4})]
    cases += [("ties", {"density": 0.3, "tie": "index", "dialect": "paper"}), ("della", {"density": 0.5})]
    assert failures(cluster.run(4, merges, (2, 2), BOTH, cases, "float64", 1)) == []


def merges_with(rank: int, environment: dict[str, str], *arguments: Any) -> list[str]:
    with mock.patch.dict(os.environ, environment):
        return merges(rank, *arguments)


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"TVFAST_BACKEND": "reference"}, id="reference"),
        pytest.param({"TVFAST_BACKEND": "cuda", "TVFAST_SIMT": "1"}, id="cuda", marks=pytest.mark.slow),
    ],
)
def test_backends_that_know_no_runs_or_partitions(cluster: Cluster, environment: dict[str, str]) -> None:
    """The kernels for GPUs run on the host here; torch counts keys and adds up."""
    cases = [("ties", {"density": 0.3}), ("dare_linear", {"density": 0.5})]
    if environment["TVFAST_BACKEND"] == "cuda":
        pytest.importorskip("tvfast._C_simt")
    found = cluster.run(4, merges_with, environment, (2, 2), BOTH, cases, "bfloat16", 6)
    assert failures(found) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@given(data=st.data())
@settings(max_examples=40)
def test_all_methods_on_any_layout(cluster: Cluster, dtype: str, data: st.DataObject) -> None:
    mesh = data.draw(st.sampled_from(MESHES), "mesh")
    layouts = data.draw(layouts_of(mesh), "layouts")
    seed = data.draw(st.integers(0, 100), "seed")
    found = cluster.run(torch.Size(mesh).numel(), merges, mesh, layouts, PROGRAMS, dtype, seed)
    assert failures(found) == []


def curvature(rank: int, layouts: dict[str, Layout]) -> list[str]:
    """Methods that solve equations, where only some tensors have factors and are gathered."""
    mesh, wrong = mesh_of((2,)), []
    base, *models = weights(SHAPES, "float32", 8, 2)
    names = ["embed.weight", "layers.1.mlp.weight"]
    stats = [{name: factors_of(name, SHAPES[name], k) for name in names} for k in range(2)]
    for method in ("regmean", "mats", "kfac"):
        want = tvfast.merge(base, models, method, stats=stats, report=[])
        target, *others = (
            {name: layouts[name].place(tensor, mesh) for name, tensor in one.items()}
            for one in (base, *models)
        )
        tvfast.merge_(target, others, method, stats=stats, report=[], redistribute=True)
        wrong += [
            f"{method} {name}"
            for name, tensor in want.items()
            if not same_bits(local(target[name]), local(layouts[name].place(tensor, mesh)))
        ]
    return wrong


def test_methods_on_curvature_gather_when_asked(cluster: Cluster) -> None:
    assert failures(cluster.run(2, curvature, FSDP)) == []


def test_methods_of_whole_tensors_gather_when_asked(cluster: Cluster) -> None:
    layouts = {name: layout for name, layout in FSDP.items() if name != "empty"}
    assert failures(cluster.run(3, merges, (3,), layouts, WHOLE, "float32", 2)) == []
