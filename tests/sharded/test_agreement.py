"""Bad input is the same named error on every rank, and no rank waits for another that has given up."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import tvfast
from tests.methods.test_scored import stats_file
from tests.sharded.cluster import Cluster
from tests.sharded.layouts import Layout, factors_of, mesh_of, weights
from tvfast.errors import (
    ArgumentError,
    DTypeError,
    LayoutError,
    ShapeError,
    StateDictError,
    TvfastError,
    UnknownNameError,
)

SHAPES = {"a.weight": (12, 8), "b.weight": (9,)}
ROWS, COLUMNS = Layout((("shard", 0, 0),)), Layout((("shard", 1, 0),))
REPLICAS, SUMS = Layout((("replicate", 0, 0),)), Layout((("partial", 0, 0),))


def spread(n_models: int = 2, layout: Layout = ROWS) -> list[dict[str, Any]]:
    """Base and models on a mesh of all ranks."""
    import torch.distributed as dist

    mesh = mesh_of((dist.get_world_size(),))
    found = weights(SHAPES, "float32", 0, n_models)
    return [
        {name: (layout if tensor.dim() > 1 else ROWS).place(tensor, mesh) for name, tensor in one.items()}
        for one in found
    ]


def other_method(rank: int) -> None:
    base, *models = spread()
    tvfast.merge_(base, models, "ties" if rank == 2 else "task_arithmetic")


def other_seed(rank: int) -> None:
    base, *models = spread()
    tvfast.merge_(base, models, "dare_linear", density=0.5, seed=int(rank == 1))


def other_parameter(rank: int) -> None:
    base, *models = spread()
    tvfast.merge_(base, models, "ties", density=0.5 if rank else 0.4)


def other_number_of_models(rank: int) -> None:
    base, *models = spread(2 + (rank == 3))
    tvfast.merge_(base, models, "linear")


def unknown_method(rank: int) -> None:
    base, *models = spread()
    tvfast.merge_(base, models, "tise" if rank == 1 else "ties")


def bad_parameter(rank: int) -> None:
    base, *models = spread()
    tvfast.merge_(base, models, "ties", density=2.0)


def missing_name(rank: int) -> None:
    base, *models = spread()
    if rank == 2:
        del models[0]["b.weight"]
    tvfast.merge_(base, models, "ties")


def no_iterable(rank: int) -> None:
    base, *models = spread()
    tvfast.merge_(base, models if rank else models[0], "ties")


def other_shape(rank: int) -> None:
    mesh = mesh_of((4,))
    base, *models = spread()
    if rank == 3:
        models[1]["a.weight"] = ROWS.place(torch.zeros(12, 9), mesh)
    tvfast.compare(base, models)


def other_names(rank: int) -> None:
    found = spread()
    if rank == 1:
        found = [{name.replace("b.", "c."): tensor for name, tensor in one.items()} for one in found]
    base, *models = found
    tvfast.merge(base, models, "ties")


def other_dtype(rank: int) -> None:
    base, *models = spread()
    if rank == 1:
        models = [{name: tensor.bfloat16() for name, tensor in model.items()} for model in models]
    tvfast.merge_(base, models, "ties")


def model_split_otherwise(rank: int) -> None:
    base, *models = spread()
    models[1] = spread(layout=COLUMNS)[2]
    tvfast.merge_(base, models, "ties")


def model_not_summed(rank: int) -> None:
    base, *models = spread()
    models[0] = spread(layout=SUMS)[1]
    tvfast.merge_(base, models, "ties")


def plain_model(rank: int) -> None:
    base, *models = spread()
    tvfast.merge_(base, [*models, weights(SHAPES, "float32", 0, 1)[1]], "ties")


def whole_method(rank: int) -> None:
    base, *models = spread()
    tvfast.merge_(base, models, "tsv_m")


def base_is_a_model(rank: int) -> None:
    base, *models = spread()
    models[0]["a.weight"] = base["b.weight"] = base["a.weight"]
    models[0]["b.weight"] = models[0]["a.weight"]
    tvfast.merge_({"a": base["a.weight"]}, [{"a": models[1]["a.weight"]}] * 2 + [{"a": 1}], "ties")


def other_order_of_dtypes(rank: int) -> None:
    base, *models = spread()
    models[rank == 1] = {name: tensor.bfloat16() for name, tensor in models[rank == 1].items()}
    tvfast.merge_(base, models, "linear")


def other_world_size(rank: int) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    base, _ = spread(1)
    half = DeviceMesh("cpu", [0, 1])
    shard = torch.zeros(6 if rank < 2 else 0, 8)
    model = DTensor.from_local(shard, half, [Shard(0)], run_check=False, shape=(12, 8), stride=(8, 1))
    tvfast.merge_({"w": base["a.weight"]}, [{"w": model}], "linear")


def rank_outside_a_mesh(rank: int) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    base, _ = spread(1)
    most = DeviceMesh("cpu", [0, 1, 2])
    shard = torch.zeros(4 if rank < 3 else 0, 8)
    model = DTensor.from_local(shard, most, [Shard(0)], run_check=False, shape=(12, 8), stride=(8, 1))
    tvfast.merge_({"w": base["a.weight"]}, [{"w": model}], "linear", redistribute=True)


def no_backend(rank: int) -> None:
    base, *models = spread()
    with mock.patch.dict(os.environ, {"TVFAST_BACKEND": "none" if rank == 3 else ""}):
        tvfast.merge_(base, models, "ties", density=0.5)


def other_statistics(rank: int) -> None:
    """Factors of one tensor more, which that rank alone would gather."""
    base, *models = spread()
    names = ["a.weight", "c.weight"][: 1 + (rank == 1)]
    for one in (base, *models):
        one["c.weight"] = one["a.weight"] + 0
    stats = [{name: factors_of(name, SHAPES["a.weight"], k) for name in names} for k in range(2)]
    tvfast.merge_(base, models, "regmean", stats=stats, report=[], redistribute=True)


def other_scores(rank: int) -> None:
    """Tensors on one rank, a file of the same on the others."""
    base, *models = spread()
    whole = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    with tempfile.TemporaryDirectory() as directory:
        path = stats_file(Path(directory) / "file", whole, "weight")
        tvfast.merge_(base, models, "sta", density=0.5, stats=[whole if rank == 1 else path, path])


def other_file_of_scores(rank: int) -> None:
    base, *models = spread()
    whole = {name: torch.full(shape, 1.0 + (rank == 1)) for name, shape in SHAPES.items()}
    with tempfile.TemporaryDirectory() as directory:
        path = stats_file(Path(directory) / "file", whole, "weight")
        tvfast.merge_(base, models, "sta", density=0.5, stats=[path, path])


def dtype_that_is_not_merged(rank: int) -> None:
    base, *models = spread()
    models[1] = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in spread(layout=COLUMNS)[2].items()}
    tvfast.merge_(base, models, "linear", redistribute=True)


def tied_base_only(rank: int) -> None:
    base, *models = spread()
    models = [{"v": model["b.weight"], "w": model["b.weight"] + 1} for model in models]
    mesh = mesh_of((4,))
    models[1] = {name: REPLICAS.place(tensor.full_tensor(), mesh) for name, tensor in models[1].items()}
    tvfast.merge_({"v": base["b.weight"], "w": base["b.weight"]}, models, "linear", redistribute=True)


def deltas_for_models(rank: int) -> None:
    base, *models = spread()
    tasks: dict[str, Any] = {"models" if rank else "deltas": models}
    tvfast.LiveMerge(base, **tasks)


def base_of_live(rank: int) -> None:
    live, base, model = spread()
    tvfast.LiveMerge(live, models=[model], base=base if rank == 2 else None)


def no_gradient(rank: int) -> None:
    base, *models = spread()
    with tvfast.LiveMerge(base, models=models) as merge:
        merge.set([0.5, 0.5])
        merge.gradient(models[0] if rank else {})


def other_gradients(rank: int) -> None:
    base, *models = spread()
    with tvfast.LiveMerge(base, models=models) as merge:
        merge.set([0.5, 0.5])
        merge.gradient({name: tensor for name, tensor in models[0].items() if rank or name == "a.weight"})


CASES: list[tuple[Callable[[int], None], type[TvfastError], str]] = [
    (
        other_method,
        ArgumentError,
        "ranks do not agree on the method: rank 0 has merge_ task_arithmetic of 2 models",
    ),
    (other_seed, ArgumentError, "'seed': 1"),
    (other_parameter, ArgumentError, "'density': 0.4"),
    (other_number_of_models, ArgumentError, "of 3 models"),
    (unknown_method, UnknownNameError, "did you mean 'ties'"),
    (bad_parameter, ArgumentError, "expected a number in [0, 1]"),
    (missing_name, StateDictError, "lacks the tensor 'b.weight'"),
    (no_iterable, ArgumentError, "expected a list of models"),
    (other_shape, ShapeError, "'a.weight': models[1] has shape [12, 9], base has [12, 8]"),
    (other_names, ArgumentError, "rank 1 has tensor 'c.weight'"),
    (other_dtype, ArgumentError, "rank 1 has [12, 8] float32/bfloat16"),
    (model_split_otherwise, LayoutError, "'a.weight': models[1] has placements [S(1)] on a mesh of 4 dp"),
    (model_not_summed, LayoutError, "sums that are not finished"),
    (plain_model, LayoutError, "has placements none (a plain tensor)"),
    (whole_method, LayoutError, "'a.weight': method 'tsv_m' needs whole tensors"),
    (base_is_a_model, ArgumentError, "models[2]['a'] is a int; expected a tensor"),
    (other_order_of_dtypes, ArgumentError, "rank 1 has [12, 8] float32/float32/bfloat16"),
    (other_world_size, LayoutError, "has placements [S(0)] on a mesh of 2, base has [S(0)] on a mesh of 4"),
    (rank_outside_a_mesh, LayoutError, "lies on a mesh that does not have rank 3"),
    (no_backend, ArgumentError, "TVFAST_BACKEND='none' is not a backend"),
    (other_statistics, ArgumentError, "rank 1 has stats[0] of 'c.weight': kfac"),
    (other_scores, ArgumentError, "ranks do not agree on stats[0]: rank 0 has a statistics file"),
    (other_file_of_scores, ArgumentError, "ranks do not agree on stats[0]: rank 0 has a statistics file"),
    (dtype_that_is_not_merged, DTypeError, "'a.weight': models[1] has dtype float8_e4m3fn"),
    (tied_base_only, StateDictError, "base ties 'v' and 'w', but they differ in models[0]"),
    (deltas_for_models, ArgumentError, "rank 1 has LiveMerge of 2 models"),
    (base_of_live, ArgumentError, "rank 2 has LiveMerge of 1 models and a base"),
    (no_gradient, ArgumentError, "grads is empty"),
    (other_gradients, ArgumentError, "ranks do not agree on gradients: rank 0 has ['a.weight'], rank 1"),
]


def raises(rank: int, work: Callable[[int], None], kind: type[TvfastError]) -> str:
    """The message of the error that a call raises."""
    with pytest.raises(kind) as error:
        work(rank)
    assert error.type is kind
    return str(error.value)


@pytest.mark.parametrize(("work", "kind", "text"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_every_rank_raises_the_same_error(
    cluster: Cluster, work: Callable[[int], None], kind: type[TvfastError], text: str
) -> None:
    messages = cluster.run(4, raises, work, kind)
    for message in messages:
        assert text in message
    assert (
        len({message.split(": ", 1)[1] if message.startswith("rank ") else message for message in messages})
        == 1
    )


def untouched(rank: int) -> bool:
    base, *models = spread()
    before = {name: tensor.to_local().clone() for name, tensor in base.items()}
    with pytest.raises(TvfastError):
        tvfast.merge_(base, models, "ties" if rank else "linear")
    return all(torch.equal(before[name], tensor.to_local()) for name, tensor in base.items())


def test_nothing_is_written_where_ranks_do_not_agree(cluster: Cluster) -> None:
    assert all(cluster.run(3, untouched))
