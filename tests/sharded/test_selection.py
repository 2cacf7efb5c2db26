"""Thresholds from samples and counts are those of a table in one piece; so are places of equal keys."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tvfast.ops._views import view
from tvfast.ops.raw import Backend, backend_for
from tvfast.ops.reference import Reference
from tvfast.program import Entry, Keep, RankQuery, WorkTable
from tvfast.sharded.communicator import Communicator
from tvfast.sharded.keys import LocalKeys
from tvfast.sharded.selection import nth_equal, select
from tvfast.sharded.shards import _chunk, _split

ALONE = Communicator((0,), 0, (), torch.device("cpu"))


def table_of(base: Tensor, models: list[Tensor]) -> WorkTable:
    views = tuple(view(model, "a", "models") for model in models)
    return WorkTable([Entry(name="a", models=views, base=view(base, "a", "base"))], len(models))


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@given(
    n=st.sampled_from([1, 7, 2047, 2049, 9000, 70000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    shape=st.sampled_from(["near", "half equal", "all equal", "nan", "wide"]),
    density=st.sampled_from([0.0001, 0.1, 0.2, 0.5, 0.97, 1.0]),
    seed=st.integers(0, 50),
)
@settings(max_examples=25)
def test_thresholds(backend: str, n: int, dtype: torch.dtype, shape: str, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = (0.02 * torch.randn(n, generator=generator)).to(dtype)
    delta = 2e-4 * torch.randn(n, generator=generator)
    if shape == "wide":
        delta = torch.randn(n, generator=generator) * 10.0 ** torch.randint(
            -30, 30, (n,), generator=generator
        )
    model = (base.float() + delta).to(dtype)
    if shape == "half equal":
        model[: n // 2] = base[: n // 2]
    if shape == "all equal":
        model = base.clone()
    if shape == "nan":
        model[:: max(1, n // 3)] = math.nan
    table = table_of(base, [model, base])
    answering: Backend = backend_for(table)
    queries = [RankQuery(0, 0, max(1, int(density * n))), RankQuery(0, 0, n), RankQuery(0, 1, 1)]
    keys = LocalKeys(answering if backend == "cpp" else Reference(torch.float32), table, Keep.BAND, False, 1)
    want = answering.thresholds(table, Keep.BAND, queries)
    for found, exact in zip(select(ALONE, keys, queries, [n]), want, strict=True):
        assert (found.n_greater, found.n_equal) == (exact.n_greater, exact.n_equal)
        assert found.value == exact.value or (math.isnan(found.value) and math.isnan(exact.value))
        for rank in {0, exact.n_equal // 2, exact.n_equal - 1}:
            query = (0, 0, exact.value, rank)
            if queries.index(RankQuery(0, 0, n)) == want.index(exact):
                assert nth_equal(ALONE, keys, [query], [n]) == answering.nth_equal(table, Keep.BAND, [query])


@pytest.mark.parametrize("shape", [(7,), (5, 6), (4, 3, 5), (3, 4, 2, 5), (6, 1), (0, 4)], ids=str)
def test_pieces_say_where_every_element_of_a_shard_lies(shape: tuple[int, ...]) -> None:
    dims = range(len(shape))
    for first, second, n, m, factor in product(dims, dims, (1, 2, 3), (1, 2, 3), (1, 2)):
        for at, at_second in product(range(n), range(m)):
            steps = ((first, n, at, factor), (second, m, at_second, 1))
            want = torch.arange(math.prod(shape)).view(shape)
            for dim, count, chosen, split_factor in steps:
                index = _chunk(torch.arange(want.shape[dim]), count, chosen, split_factor)
                want = want.index_select(dim, index)
            found = []
            for piece in _split(shape, steps):
                entry = Entry(name="", models=(), offset=piece.offset, run=piece.run, run_step=piece.run_step)
                assert piece.start == len(found)
                found += [entry.index_of(i) for i in range(piece.n_elements)]
            assert found == want.view(-1).tolist()
