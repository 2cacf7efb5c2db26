"""Bad input is the same named error on every rank, and no rank waits for another that has given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tvfast
from tests.sharded.cluster import Cluster
from tests.sharded.layouts import Layout, mesh_of, weights
from tvfast.errors import (
    ArgumentError,
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
