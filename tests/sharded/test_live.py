"""Live weights on many ranks: FSDP2, `LiveMerge`, `compare`, redistribution, and what a merge allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tvfast
from tests.sharded.cluster import Cluster, failures, same_bits
from tests.sharded.layouts import Layout, mesh_of, weights
from tests.sharded.test_merging import BOTH, FSDP, SHAPES, local
from tvfast.errors import ArgumentError, LayoutError


def module(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    tied = torch.nn.Linear(7, 33, bias=False)
    stack = torch.nn.Sequential(torch.nn.Embedding(33, 7), torch.nn.Linear(7, 7), torch.nn.LayerNorm(7), tied)
    tied.weight = stack[0].weight  # type: ignore[assignment]
    return stack


def trained(model: torch.nn.Module, seed: int) -> float:
    tokens = torch.randint(0, 33, (6, 5), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def fsdp(rank: int, mesh_shape: tuple[int, ...]) -> list[str]:
    """Fine-tunes two sharded copies, merges them in place as whole copies would be, and trains on."""
    from torch.distributed.fsdp import fully_shard

    mesh, wrong = mesh_of(mesh_shape), []
    made = [module(0) for _ in range(3)]
    for one in made:
        fully_shard(one[1], mesh=mesh)  # type: ignore[index]
        fully_shard(one, mesh=mesh)
    for seed, one in enumerate(made[1:]):
        trained(one, seed)
    whole = [{name: t.full_tensor() for name, t in one.state_dict().items()} for one in made]
    for state in whole:
        state["3.weight"] = state["0.weight"]  # tied, as in the module
    for method, parameters in (
        ("ties", {"density": 0.4}),
        ("dare_ties", {"density": 0.5}),
        ("slerp", {"t": 0.5}),
    ):
        models = slice(1, 2 if method == "slerp" else 3)
        tvfast.merge_(made[0], made[models], method, **parameters)
        want = tvfast.merge_(whole[0], whole[models], method, **parameters)
        state = made[0].state_dict()
        wrong += [
            f"{method} {name} on {mesh_shape}"
            for name, tensor in state.items()
            if not same_bits(tensor.full_tensor(), want[name])
        ]
    before = trained(made[0], 1)
    if not trained(made[0], 1) < before:
        wrong.append("training does not go on")
    with pytest.raises(ArgumentError, match="fully_shard, which cannot be copied"):
        tvfast.merge(made[0], made[1:], "linear")
    return wrong


@pytest.mark.parametrize("mesh", [(3,), (2, 2)], ids=str)
def test_fsdp_modules_are_merged_in_place_and_train_on(cluster: Cluster, mesh: tuple[int, ...]) -> None:
    assert failures(cluster.run(torch.Size(mesh).numel(), fsdp, mesh)) == []


def evaluated(rank: int) -> list[str]:
    """A forward pass without a backward pass leaves the parameters of the root gathered."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    mesh = mesh_of((2,))
    made = [fully_shard(torch.nn.Linear(5, 3), mesh=mesh) for _ in range(3)]
    whole = [{name: tensor.full_tensor() for name, tensor in one.state_dict().items()} for one in made]
    want = tvfast.merge(whole[0], whole[1:], "linear")
    with torch.no_grad():
        for one in made:
            one(torch.ones(2, 5))
    tvfast.merge_(made[0], made[1:], "linear")
    state = made[0].state_dict()
    return [name for name, tensor in want.items() if not same_bits(state[name].full_tensor(), tensor)]


def test_a_module_that_was_evaluated_is_merged(cluster: Cluster) -> None:
    assert failures(cluster.run(2, evaluated)) == []


def live(rank: int, mesh_shape: tuple[int, ...], layouts: dict[str, Layout]) -> list[str]:
    """`LiveMerge` with every way of using coefficients, beside that of whole tensors."""
    mesh, wrong = mesh_of(mesh_shape), []
    base, *tasks = weights(SHAPES, "float32", 4, 2)

    def spread(one: dict[str, Any]) -> dict[str, Any]:
        return {name: layouts[name].place(tensor, mesh) for name, tensor in one.items()}

    for method, parameters in (
        ("task_arithmetic", {}),
        ("ties", {"density": 0.4}),
        ("ties", {"density": 0.4, "dialect": "paper"}),
        ("breadcrumbs", {"density": 0.6, "gamma": 0.1}),
        ("dare_linear", {"density": 0.5}),
    ):
        whole, shards = {name: t.clone() for name, t in base.items()}, spread(base)
        before = spread(base)
        with (
            tvfast.LiveMerge(whole, models=tasks, method=method, **parameters) as one,
            tvfast.LiveMerge(shards, models=[spread(t) for t in tasks], method=method, **parameters) as many,
        ):
            for coefficients in ([0.3, 0.6], [0.1, -0.2]):
                one.set(coefficients)
                many.set(coefficients)
                for name, tensor in spread(whole).items():
                    if not same_bits(local(tensor), local(shards[name])):
                        wrong.append(f"{method} {parameters} {name}")
            if method in ("task_arithmetic", "breadcrumbs", "dare_linear"):
                grads = {name: torch.sin(tensor) for name, tensor in tasks[0].items()}
                found, want = many.gradient(spread(grads)), one.gradient(grads)
                if not torch.equal(torch.as_tensor(found), torch.as_tensor(want)):
                    wrong.append(f"gradient of {method}")
                shards["embed.weight"].grad = spread(grads)["embed.weight"]
                many.zero_grad()
                if shards["embed.weight"].grad is not None:
                    wrong.append(f"gradient left by {method}")
        wrong += [n for n, t in before.items() if not same_bits(local(t), local(shards[n]))]
    return wrong


@pytest.mark.parametrize("mesh", [(3,), (2, 2)], ids=str)
def test_live_merge(cluster: Cluster, mesh: tuple[int, ...]) -> None:
    layouts = FSDP if len(mesh) == 1 else BOTH
    assert failures(cluster.run(torch.Size(mesh).numel(), live, mesh, layouts)) == []


def live_rows(rank: int) -> None:
    mesh = mesh_of((2,))
    columns = Layout((("shard", 1, 0),))
    base, task = ({"w": columns.place(one["w"], mesh)} for one in weights({"w": (4, 6)}, "float32", 0, 1))
    with pytest.raises(LayoutError, match="'w': method 'della' ranks rows"):
        tvfast.LiveMerge(base, models=[task], method="della", density=0.5)


def test_live_merge_refuses_split_rows_that_are_ranked(cluster: Cluster) -> None:
    cluster.run(2, live_rows)


def compared(rank: int, mesh_shape: tuple[int, ...], layouts: dict[str, Layout], dtype: str) -> bool:
    mesh = mesh_of(mesh_shape)
    whole = weights(SHAPES, dtype, 4, 3)
    whole[2]["embed.weight"][3, 4] = float("inf")
    base, *models = ({name: layouts[name].place(t, mesh) for name, t in one.items()} for one in whole)
    return repr(tvfast.compare(base, models)) == repr(tvfast.compare(whole[0], whole[1:]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_compare_has_the_very_numbers(cluster: Cluster, dtype: str) -> None:
    assert all(cluster.run(4, compared, (2, 2), BOTH, dtype))
    assert all(cluster.run(3, compared, (3,), FSDP, dtype))


OTHERWISE = {
    "other dimension": Layout((("shard", 1, 0), ("replicate", 0, 0))),
    "replicas": Layout((("replicate", 0, 0), ("replicate", 0, 0))),
    "sums": Layout((("partial", 0, 0), ("shard", 0, 0))),
    "plain": Layout(None),
}


def redistributed(rank: int, base_layout: Layout, model_layout: Layout, flat: bool) -> list[str]:
    """A model that lies otherwise, on another mesh if `flat`, beside one that lies as the base."""
    wrong = []
    mesh = mesh_of((2, 2))
    base, *models = weights({"w": (9, 10), "v": (5, 4)}, "float32", 2, 2)
    other = Layout(model_layout.splits[:1]) if flat and model_layout.splits else model_layout
    for method, parameters in (
        ("ties", {"density": 0.4}),
        ("ties", {"density": 0.4, "scope": "model"}),
        ("della", {"density": 0.5}),
        ("linear", {}),
    ):
        want = tvfast.merge(base, models, method, **parameters)
        target = {name: base_layout.place(t, mesh) for name, t in base.items()}
        given = [
            {name: base_layout.place(t, mesh) for name, t in models[0].items()},
            {name: other.place(t, mesh_of((4,)) if flat else mesh) for name, t in models[1].items()},
        ]
        tvfast.merge_(target, given, method, redistribute=True, **parameters)
        for name, tensor in target.items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if not same_bits(whole, want[name]):
                wrong.append(f"{method} {parameters} {name} {base_layout} {other}")
    return wrong


@pytest.mark.parametrize("flat", [False, True], ids=["one mesh", "two meshes"])
@pytest.mark.parametrize("kind", OTHERWISE)
def test_models_that_lie_otherwise_are_redistributed_when_asked(
    cluster: Cluster, kind: str, flat: bool
) -> None:
    rows = Layout((("shard", 0, 0), ("shard", 1, 0)))
    assert failures(cluster.run(4, redistributed, rows, OTHERWISE[kind], flat)) == []


@pytest.mark.parametrize("kind", ["sums", "plain"])
def test_a_base_that_lies_otherwise(cluster: Cluster, kind: str) -> None:
    rows = Layout((("shard", 0, 0), ("shard", 1, 0)))
    assert failures(cluster.run(4, redistributed, OTHERWISE[kind], rows, False)) == []


def unfinished(rank: int) -> list[str]:
    """A base of unfinished sums, by a method on whole tensors and one that reads norms of scores."""
    mesh, wrong = mesh_of((2, 2)), []
    shapes = {"w": (9, 10), "v": (5, 4)}
    base, *models = weights(shapes, "float32", 2, 3)
    sums, rows = Layout((("partial", 0, 0), ("shard", 0, 0))), Layout((("replicate", 0, 0), ("shard", 0, 0)))
    scores = [{name: tensor.abs() for name, tensor in model.items()} for model in models]
    scores[1] = {name: 3.0 * tensor for name, tensor in scores[1].items()}
    for method, extra in (("model_stock", {"filter_wise": True}), ("fisher", {"scores": scores})):
        want = tvfast.merge(base, models, method, **extra)
        target, *others = (
            {name: (rows if k or name == "v" else sums).place(t, mesh) for name, t in one.items()}
            for k, one in enumerate((base, *models))
        )
        tvfast.merge_(target, others, method, redistribute=True, **extra)
        wrong += [
            f"{method} {name}" for name, t in target.items() if not same_bits(t.full_tensor(), want[name])
        ]
    return wrong


def test_the_result_of_a_base_of_unfinished_sums_adds_up(cluster: Cluster) -> None:
    assert failures(cluster.run(4, unfinished)) == []


def emptied(rank: int) -> None:
    empty = {"w": Layout((("shard", 0, 0),)).place(torch.zeros(0, 3), mesh_of((2,)))}
    assert tvfast.merge(empty, [empty, empty], "sta", scores=[empty, empty])["w"].shape == (0, 3)


def test_scores_of_nothing_but_empty_tensors(cluster: Cluster) -> None:
    cluster.run(2, emptied)


ELEMENTS = 2**25


def growth(rank: int, columns: bool, method: str, parameters: dict[str, Any], in_place: bool) -> int:
    """Bytes by which this rank's memory grows beyond its shards of the result."""
    import ctypes
    import pathlib
    import re

    from torch.distributed.tensor import DTensor, Shard

    def status(field: str) -> int:
        text = pathlib.Path("/proc/self/status").read_text()
        return 1024 * int(re.search(field + r":\s+(\d+) kB", text)[1])  # type: ignore[index]

    mesh = mesh_of((4,))
    shape = (8192, ELEMENTS // 8192 // 4) if columns else (8192 // 4, ELEMENTS // 8192)
    shards = [torch.randn(shape, generator=torch.Generator().manual_seed(9 * rank + k)) for k in range(3)]
    base, *models = (
        {"w": DTensor.from_local(s, mesh, [Shard(int(columns))], run_check=False)} for s in shards
    )
    small = {"w": DTensor.from_local(torch.randn(3, 3), mesh, [Shard(0)], run_check=False)}
    tvfast.merge(small, [small, small], method, **parameters)  # code that loads on first use
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    kept = (tvfast.merge_ if in_place else tvfast.merge)(base, models, method, **parameters)
    grown = status("VmHWM") - before
    assert kept["w"].shape == (8192, ELEMENTS // 8192)
    return grown - (0 if in_place else shards[0].numel() * 4)


WORKSPACE = 24 * 2**20


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize(
    ("method", "parameters", "in_place"),
    [("ties", {"density": 0.2}, True), ("dare_ties", {"density": 0.3}, False)],
    ids=["ties", "dare_ties"],
)
def test_a_rank_allocates_its_shards_of_the_result_and_little_more(
    cluster: Cluster, columns: bool, method: str, parameters: dict[str, Any], in_place: bool
) -> None:
    for n_bytes in cluster.run(4, growth, columns, method, parameters, in_place):
        assert n_bytes < WORKSPACE  # a whole tensor is 128 MiB, a shard 32
