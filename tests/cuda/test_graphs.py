"""Merges that a CUDA graph can hold: no memory from elsewhere, no word from the host, no wait.

The host build shows that nothing of the kind is asked for. That a captured merge can be replayed on other
data is shown on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import missing
from tests.cuda.test_selection import on_device
from tests.cuda.test_trimming import TIES, banded, case_of, queries_of, tuned
from tests.strategies import Case, assert_same_bits, combined, pack_plane, plane_view
from tvfast.errors import ArgumentError
from tvfast.methods import ProgramMethod, make_method
from tvfast.methods.statistics import TableStatistics
from tvfast.ops import cpp
from tvfast.program import Keep, Program, Tie


class _Operations(TorchDispatchMode):
    """Names of the torch operations that were called: a copy or a value for the host would be one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@contextmanager
def unasked(
    backend: Any, *, uploads: bool = False, torch_operations: frozenset[str] = frozenset()
) -> Iterator[None]:
    """Fails if the device was waited for or read, if `uploads` is false written, or torch used otherwise."""
    before = backend._module.runtime_calls()
    with _Operations() as operations:
        yield
    to_device, to_host, waits = np.subtract(backend._module.runtime_calls(), before)
    assert (to_host, waits) == (0, 0), "the device was read, or waited for"
    assert uploads or to_device == 0, "memory of the host was copied"
    assert operations.names <= torch_operations, operations.names


ALLOCATES = frozenset({"aten::empty.memory_format"})


def della_case(rng: np.random.Generator) -> Case:
    """The scalars of a whole DELLA, in the paper's reading, which measures nothing."""
    part = tuned(rng, 6 * 150, 3, torch.bfloat16)
    part.row = 150
    method = make_method("della", density=0.5, epsilon=0.2, dialect="paper", weights=[1.0, 0.5, 0.25])
    assert isinstance(method, ProgramMethod)
    statistics = TableStatistics(cpp.backend(), case_of([part]).table(), None)
    return Case(method.program(), [part], method.scalars(statistics))


def ties_merge(backend: Any, case: Case, outs: list[torch.Tensor]) -> Any:
    return backend.trimmed(
        on_device(case.parts, outs), case.program, case.scalars, queries_of(case.parts, 0.15)
    )


def della_merge(backend: Any, case: Case, outs: list[torch.Tensor]) -> Any:
    return backend.prepared(on_device(case.parts, outs), case.program, case.scalars)


@pytest.mark.parametrize("tie", Tie)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_prepared_merge_asks_the_host_for_nothing(emulated: Any, tie: Tie, in_place: bool) -> None:
    part = tuned(np.random.default_rng(0), 3000, 3, torch.bfloat16)
    emulated.limits = (500, 1 << 20, 2)
    case = case_of([part], replace(TIES, tie=tie))
    expected = banded(case, queries_of([part], 0.15))
    assert part.base is not None
    outs = [part.base if in_place else torch.empty_like(part.base)]
    if torch.cuda.is_available():
        if in_place:
            pytest.skip("tables of CPU tensors are copied there")
        outs = [out.cuda() for out in outs]
    merge = ties_merge(emulated, case, outs)
    with unasked(emulated):
        merge.run()
    assert_same_bits([out.cpu() for out in outs], expected)


def test_a_prepared_merge_by_ranks_asks_the_host_for_nothing(emulated: Any) -> None:
    case = della_case(np.random.default_rng(1))
    where = "cuda" if torch.cuda.is_available() else "cpu"
    outs = [torch.empty(case.parts[0].n, dtype=torch.bfloat16, device=where)]
    merge = della_merge(emulated, case, outs)
    with unasked(emulated):
        merge.run()
    assert_same_bits([out.cpu() for out in outs], combined(cpp.backend(), case))


def test_a_merge_in_parts_is_prepared_in_parts(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvfast.ops.cuda.MOST_RANKS", 1)
    one, other = (della_case(np.random.default_rng(seed)) for seed in (1, 2))
    case = Case(one.program, [*one.parts, *other.parts], [*one.scalars, *other.scalars])
    where = "cuda" if torch.cuda.is_available() else "cpu"
    outs = [torch.empty(part.n, dtype=torch.bfloat16, device=where) for part in case.parts]
    merge = della_merge(emulated, case, outs)
    assert len(merge.parts) == 2
    merge.run()
    assert_same_bits([out.cpu() for out in outs], combined(cpp.backend(), case))


def test_rows_longer_than_ranks_are_an_error(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvfast.ops.cuda.LONGEST_ROW", 149)
    case = della_case(np.random.default_rng(1))
    with pytest.raises(ArgumentError, match="'tensor 0' has rows of 150 elements; expected at most 149"):
        combined(emulated, case)


@pytest.mark.parametrize("keep", [Keep.ALL, Keep.RANDOM_BY_RANK])
def test_verbs_without_answers_wait_for_nothing(emulated: Any, keep: Keep) -> None:
    case = della_case(np.random.default_rng(3))
    part = case.parts[0]
    program = replace(case.program, keep=keep)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    table = on_device([part], [torch.empty(part.n, dtype=torch.bfloat16, device=where)])
    with unasked(emulated, uploads=True, torch_operations=ALLOCATES):
        emulated.combine(table, program, case.scalars)
    if where == "cpu":
        planes = tuple(plane_view(pack_plane(np.zeros(part.n, bool)), part.n) for _ in part.models)
        table.entries[0].masks = planes
        table.cache.clear()
        with unasked(emulated, uploads=True, torch_operations=ALLOCATES):
            emulated.row_masks(table, program, case.scalars)


def test_what_a_graph_cannot_hold_is_noticed(emulated: Any) -> None:
    part = tuned(np.random.default_rng(4), 300, 2, torch.bfloat16)
    case, table = case_of([part]), on_device([part])
    table.entries[0].out = table.entries[0].base
    with pytest.raises(AssertionError, match="was read, or waited for"), unasked(emulated, uploads=True):
        emulated.thresholds(table, Keep.BAND, queries_of([part], 0.15))
    with pytest.raises(AssertionError, match="memory of the host"), unasked(emulated):
        emulated.combine(table, Program(), case.scalars)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), unasked(emulated):
        torch.zeros(1).item()


def guessed(rng: np.random.Generator) -> Case:
    return case_of([tuned(rng, 70_001, 3, torch.bfloat16)])


def hashed(rng: np.random.Generator) -> Case:
    return case_of([tuned(rng, 70_001, 3, torch.bfloat16)], replace(TIES, tie=Tie.HASH))


@pytest.mark.parametrize("make", [guessed, hashed, della_case])
def test_a_captured_merge_is_replayed_on_other_data(
    emulated: Any, make: Callable[[np.random.Generator], Case]
) -> None:
    if not torch.cuda.is_available():
        missing("cuda", "a graph needs a GPU")
    case, other = (make(np.random.default_rng(seed)) for seed in (1, 2))
    (part,) = case.parts
    assert part.base is not None
    base, *models = (tensor.cuda() for tensor in (part.base, *part.models))
    out = torch.empty_like(base)
    resident = replace(case, parts=[replace(part, base=base, models=models)])
    merge = (della_merge if make is della_case else ties_merge)(emulated, resident, [out])
    merge.run()  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merge.run()
    for one in (other, case):
        (new,) = one.parts
        assert new.base is not None
        for old, tensor in zip((base, *models), (new.base, *new.models), strict=True):
            old.copy_(tensor)
        out.fill_(-7.0)
        graph.replay()
        torch.cuda.synchronize()
        expected = (
            combined(cpp.backend(), one) if make is della_case else banded(one, queries_of(one.parts, 0.15))
        )
        assert_same_bits([out.cpu()], expected)
