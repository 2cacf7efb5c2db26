"""Streaming a table in parts: the bytes of the resident run, in as many passes as promised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import load
from tests.strategies import (
    DTYPES,
    assert_same_bits,
    bit_values,
    grid_values,
    normal_values,
    placed,
    view_of,
)
from tvfast.engine.streamed import Chunk, StreamedBackend
from tvfast.errors import BackendError, MergeError
from tvfast.methods import METHODS, ProgramMethod, TableStatistics, make_method, staged_methods
from tvfast.ops import reference
from tvfast.ops.raw import Wants
from tvfast.program import (
    DType,
    Entry,
    Keep,
    ModelScalars,
    Program,
    RankQuery,
    TensorScalars,
    View,
    Vote,
    WorkTable,
)

# Those on scores stream in `tests/engine/test_scored.py`, with the files that scores come from.
CASES = [
    (name, dialect)
    for name in staged_methods()
    for dialect in METHODS[name].dialects
    if not METHODS[name].needs_scores
]
SETTINGS: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.4},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.25},
    "della_linear": {"density": 0.5, "epsilon": 0.25},
    "breadcrumbs": {"density": 0.5, "gamma": 0.125},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.125},
    "sce": {"select_topk": 0.5},
    "slerp": {"t": 0.25},
    "nearswap": {"t": 0.25},
    "ram": {"epsilon": 0.25},
    "ramplus_tl": {"epsilon": 0.25, "alpha": 4.0},
    "magnitude_prune": {"density": 0.4},
    "lata": {"outside": "ranked", "drop": "logarithmic"},
}


@dataclass
class Item:
    """One tensor of a model, its counterparts and where its result goes."""

    name: str
    shape: tuple[int, ...]
    base: Tensor
    models: list[Tensor]
    out: Tensor

    @property
    def n(self) -> int:
        return self.base.numel()


def entry_of(item: Item, method: ProgramMethod, start: int = 0, stop: int | None = None) -> Entry:
    part = slice(start, item.n if stop is None else stop)
    base, models = method.operands(view_of(item.base[part]), tuple(view_of(m[part]) for m in item.models))
    return Entry(
        name=item.name,
        models=models,
        base=base,
        out=view_of(item.out[part]),
        row=method.row_elements(item.shape),
        offset=start,
    )


def table_of(items: Sequence[Item], method: ProgramMethod, *, resident: bool) -> WorkTable:
    """The table of whole tensors; one that is not resident has true lengths and no addresses."""
    entries = [entry_of(item, method) for item in items]
    for group, entry in enumerate(entries):
        entry.group = 0 if method.whole_model else group
    if method.whole_model:
        position = 0
        for entry in sorted(entries, key=lambda e: e.name):
            entry.group_offset = position
            position += entry.n_elements
    if not resident:
        for entry in entries:
            entry.models = tuple(View(0, v.n_elements, v.dtype) for v in entry.models)
            entry.base = entry.base and View(0, entry.base.n_elements, entry.base.dtype)
            entry.out = None
    return WorkTable(entries, len(entries[0].models))


@dataclass
class TensorSource:
    """Parts of tensors in memory of their own, which is overwritten when the next part is asked for."""

    items: list[Item]
    method: ProgramMethod
    logical: WorkTable
    cuts: list[list[tuple[int, int, int]]]  # of each chunk: (row, start, stop) of its entries
    samples: list[list[tuple[int, int, int]]] = field(default_factory=list)

    looked: list[bool] = field(default_factory=list)  # of each pass
    unseen: bool = True

    def chunks(self, *, write: bool, look: bool = True) -> Iterator[Chunk]:
        self.looked.append(look and self.unseen)
        self.unseen = self.unseen and not look
        yield from self._resident(self.cuts, write)

    def vouch(self) -> None:
        self.unseen = False

    def sample(self) -> Iterator[Chunk]:
        yield from self._resident(self.samples, False)

    def _resident(self, chunks: list[list[tuple[int, int, int]]], write: bool) -> Iterator[Chunk]:
        for lead, pieces in enumerate(chunks):
            loaded, entries = [], []
            for row, start, stop in pieces:
                item, logical = self.items[row], self.logical.entries[row]
                part = Item(
                    item.name,
                    item.shape,
                    placed(item.base[start:stop], lead % 3),
                    [placed(model[start:stop], lead % 2) for model in item.models],
                    torch.full((stop - start,), -7.0, dtype=item.out.dtype),
                )
                entry = entry_of(part, self.method)
                entry.offset, entry.row = start, logical.row
                entry.group, entry.group_offset = logical.group, logical.group_offset
                entry.out = entry.out if write else None
                loaded.append(part)
                entries.append(entry)
            yield Chunk(WorkTable(entries, self.logical.n_models), tuple(row for row, _, _ in pieces))
            for (row, start, stop), part in zip(pieces, loaded, strict=True):
                if write:
                    self.items[row].out[start:stop] = part.out
                for tensor in (part.base, *part.models, part.out):
                    tensor.fill_(float("nan"))


def values(rng: np.random.Generator, kind: str, n: int, dtype: torch.dtype) -> Tensor:
    if kind == "grid":
        return grid_values(rng, n, dtype)
    if kind == "ties":
        return grid_values(rng, n, dtype, int(rng.integers(1, 4)))
    return bit_values(rng, n, dtype) if kind == "bits" else normal_values(rng, n, dtype)


def pieces_of(
    items: Sequence[Item], rng: np.random.Generator, by_rows: bool
) -> list[list[tuple[int, int, int]]]:
    """Every element once, in chunks of one to three pieces, in any order."""
    pieces = []
    for row, item in enumerate(items):
        unit = 1
        if by_rows:
            unit = item.shape[-1] if len(item.shape) > 1 else max(1, item.n)
        n_units = item.n // unit
        n_cuts = int(rng.integers(0, 5))
        cuts = sorted({0, n_units, *(int(rng.integers(0, n_units + 1)) for _ in range(n_cuts))})
        pieces += [(row, unit * a, unit * b) for a, b in pairwise(cuts)]
    rng.shuffle(pieces)
    chunks, used = [], 0
    while used < len(pieces):
        n = int(rng.integers(1, 4))
        chunks.append([(int(r), int(a), int(b)) for r, a, b in pieces[used : used + n]])
        used += n
    return chunks


def samples_of(items: Sequence[Item], rng: np.random.Generator, how: str) -> list[list[tuple[int, int, int]]]:
    whole = [(row, 0, item.n) for row, item in enumerate(items) if item.n]
    if how == "nothing" or not whole:
        return []
    if how == "everything":
        return [whole]
    if how == "start":
        return [[(row, 0, min(5, n))] for row, _, n in whole]
    starts = [(row, int(rng.integers(0, n))) for row, _, n in whole for _ in range(3)]
    return [[(row, at, min(at + 20, items[row].n))] for row, at in starts]


def resident_run(items: Sequence[Item], method: ProgramMethod) -> list[Tensor]:
    table = table_of(items, method, resident=True)

    def plane(n: int) -> View:
        words = torch.zeros((n + 63) // 64, dtype=torch.int64)
        return View(words.data_ptr(), n, DType.F32, words)

    backend = load("cpp")
    program, scalars = method.resolve(TableStatistics(backend, table, plane))
    backend.combine(table, program, scalars)
    found = [item.out.clone() for item in items]
    for item in items:
        item.out.fill_(-7.0)
    return found


def streamed_run(
    items: list[Item],
    method: ProgramMethod,
    cuts: list[list[tuple[int, int, int]]],
    samples: list[list[tuple[int, int, int]]],
    n_threads: int = 1,
) -> int:
    """Fills every `out`; the number of passes."""
    table = table_of(items, method, resident=False)
    source = TensorSource(items, method, table, cuts, samples)
    backend = StreamedBackend(load("cpp"), source, foresee=method.program())
    program, scalars = method.resolve(TableStatistics(backend, table, None, n_threads))
    backend.combine(table, program, scalars, n_threads)
    return backend.n_passes


@st.composite
def models(draw: st.DrawFn, name: str) -> list[Item]:
    """One to four tensors of dyadic numbers, of special bit patterns or of continuous values."""
    fewest, most = METHODS[name].n_models
    n_models = draw(st.integers(fewest, min(4, most or 4))) + METHODS[name].needs_instruct
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtypes = [draw(st.sampled_from(DTYPES))] * (n_models + 1)
    if draw(st.booleans()):
        dtypes = [draw(st.sampled_from(DTYPES)) for _ in dtypes]
    items = []
    for i in range(draw(st.integers(1, 4))):
        shape = draw(
            st.one_of(
                st.tuples(st.integers(0, 300)),
                st.tuples(st.integers(1, 40), st.integers(1, 33)),
                st.sampled_from([(1,), (2000,), (3, 1100), (64, 64), (2, 3, 5)]),
            )
        )
        n = int(np.prod(shape))
        kinds = [draw(st.sampled_from(["grid", "ties", "normal", "bits"]))] * (n_models + 1)
        tensors = [values(rng, kind, n, dtype) for kind, dtype in zip(kinds, dtypes, strict=True)]
        out = torch.full((n,), -7.0, dtype=dtypes[0])
        # In the order of names, groups run backwards through the files.
        items.append(Item(f"tensor {9 - i}", shape, tensors[0], tensors[1:], out))
    return items


@pytest.mark.parametrize(("name", "dialect"), CASES)
@settings(max_examples=25)
@given(data=st.data())
def test_every_method_gives_the_bytes_of_the_resident_run(
    name: str, dialect: str, data: st.DataObject
) -> None:
    items = data.draw(models(name))
    parameters = dict(SETTINGS.get(name, {}))
    known = {parameter.name for parameter in METHODS[name].parameters}
    if "rescale" in known and data.draw(st.booleans()):
        parameters["rescale"] = data.draw(st.booleans())
    tie = data.draw(st.sampled_from([None, "ge", "index", "hash"]))
    if name == "multislerp":  # no sum of these with any signs is 0
        parameters["weights"] = [2.0**-k for k in range(len(items[0].models))]
    method = make_method(name, dialect=dialect, tie=tie, seed=3, scale=0.5, **parameters)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    cuts = pieces_of(items, rng, method.program().ranks_rows)
    samples = samples_of(items, rng, data.draw(st.sampled_from(["nothing", "everything", "start", "some"])))
    expected = resident_run(items, method)
    streamed_run(items, method, cuts, samples, n_threads=int(rng.integers(1, 3)))
    assert_same_bits([item.out for item in items], expected, (name, dialect, tie, cuts))


def ordinary_model(dtype: torch.dtype, n_models: int = 3, n: int = 40_000) -> list[Item]:
    """What a checkpoint looks like: a normal base, fine-tuned by a hundredth of its deviation."""
    rng = np.random.default_rng(11)
    items = []
    for i, shape in enumerate([(n // 200, 200), (n // 100, 200), (301,)]):
        size = int(np.prod(shape))
        base = normal_values(rng, size, torch.float32, 0.02)
        tensors = [base + normal_values(rng, size, torch.float32, 2e-4) for _ in range(n_models)]
        items.append(
            Item(
                f"t{i}", shape, base.to(dtype), [t.to(dtype) for t in tensors], torch.empty(size, dtype=dtype)
            )
        )
    return items


def blocks_of(items: Sequence[Item], size: int) -> list[list[tuple[int, int, int]]]:
    return [
        [(row, at, min(at + size, item.n))] for row, item in enumerate(items) for at in range(0, item.n, size)
    ]


@pytest.mark.parametrize(
    ("name", "parameters", "dtype", "n_passes"),
    [
        ("linear", {}, torch.bfloat16, 1),
        ("passthrough", {}, torch.bfloat16, 1),
        ("slerp", {}, torch.bfloat16, 2),
        ("ties", {"density": 1.0}, torch.bfloat16, 1),
        ("ties", {"density": 0.2}, torch.bfloat16, 2),
        ("ties", {"density": 0.2}, torch.float32, 2),
        ("ties", {"density": [0.2, 0.5, 0.9]}, torch.float16, 2),
        ("ties", {"density": 0.2, "rescale": True}, torch.bfloat16, 3),
        ("ties", {"density": 0.2, "tie": "index"}, torch.bfloat16, 4),
        ("ties", {"density": 0.2, "dialect": "paper"}, torch.bfloat16, 2),
        ("ties", {"density": 0.2, "dialect": "mergelm"}, torch.bfloat16, 2),
        ("ties", {"density": 0.2, "dialect": "paper"}, torch.float32, 3),
        ("ties", {"density": 1.0, "dialect": "paper"}, torch.float32, 2),
        ("ties", {"density": [0.2, 1.0, 0.2], "dialect": "paper"}, torch.bfloat16, 2),
        ("ties", {"density": 0.2, "dialect": "paper", "rescale": True}, torch.bfloat16, 4),
        ("breadcrumbs", {"density": 0.8, "gamma": 0.01}, torch.bfloat16, 2),
        ("breadcrumbs", {"density": 0.8, "dialect": "paper"}, torch.bfloat16, 1),
        ("dare_ties", {"density": 0.5}, torch.bfloat16, 2),
        ("dare_ties", {"density": 0.5, "dialect": "paper"}, torch.bfloat16, 2),
        ("della", {"density": 0.5}, torch.bfloat16, 2),
        ("sce", {"select_topk": 0.5}, torch.float32, 4),
    ],
    ids=str,
)
def test_passes_over_an_ordinary_model(
    name: str, parameters: dict[str, Any], dtype: torch.dtype, n_passes: int
) -> None:
    method = make_method(name, **parameters)
    items = ordinary_model(dtype, min(3, METHODS[name].n_models[1] or 3))
    samples = blocks_of(items, 256)[::8]
    expected = resident_run(items, method)
    assert streamed_run(items, method, blocks_of(items, 1600), samples) == n_passes
    assert_same_bits([item.out for item in items], expected, name)


def test_the_thresholds_of_twenty_models_take_one_pass() -> None:
    """Continuous float32 task vectors, whose scale differs between tensors: no window of keys is sure."""
    n, n_models, run = 8_000_000, 20, 32768
    rng = np.random.default_rng(0)
    tau = torch.from_numpy(rng.standard_normal(n, dtype=np.float32))
    for tensor in tau.split(n // 16):
        tensor *= float(np.exp(0.5 * rng.standard_normal()))

    def part(start: int, length: int) -> WorkTable:  # every model is the same memory
        view = view_of(tau[start : start + length])
        return WorkTable([Entry(name="t", models=(view,) * n_models, base=None, offset=start)], n_models)

    queries = [RankQuery(0, k, int((0.1 + 0.03 * k) * n)) for k in range(n_models)]
    selection = load("cpp").select(Keep.BAND, queries, [n])
    for start in range(0, n, 8 * run):
        selection.sample(part(start, run))
    for start in range(0, n, 2**20):
        selection.count(part(start, 2**20))
    answers = selection.finish()
    assert answers is not None
    ordered = tau.abs().sort(descending=True).values
    assert [answer.value for answer in answers] == [float(ordered[query.k - 1]) for query in queries]


def test_a_sample_that_misleads_costs_passes_and_nothing_else() -> None:
    """The sample is sure of a threshold, of the votes with it, and wrong."""
    method = make_method("ties", density=0.2, dialect="paper")
    items = ordinary_model(torch.bfloat16)
    for model in items[0].models:
        model[:4000] = items[0].base[:4000] + 1.0
    expected = resident_run(items, method)
    n_passes = streamed_run(items, method, blocks_of(items, 1600), [[(0, 0, 4000)]])
    assert 3 < n_passes <= 6
    assert_same_bits([item.out for item in items], expected)


def test_votes_are_answered_from_the_forecast_only_for_the_scalars_it_was_made_with() -> None:
    method = make_method("ties", density=0.2, dialect="paper")
    items = ordinary_model(torch.bfloat16)
    table = table_of(items, method, resident=False)
    source = TensorSource(items, method, table, blocks_of(items, 1600), blocks_of(items, 256)[::8])
    backend = StreamedBackend(load("cpp"), source, foresee=method.program())
    scalars = method.scalars(TableStatistics(backend, table, None))
    assert backend.n_passes == 1
    program = method.program()
    known = backend.measure(table, program, scalars, Wants.VOTES)
    assert backend.n_passes == 1
    resident = table_of(items, method, resident=True)
    assert repr(known) == repr(load("cpp").measure(resident, program, scalars, Wants.VOTES))
    scalars[1].models[2].gain = 2.0
    assert repr(backend.measure(table, program, scalars, Wants.VOTES)) == repr(
        load("cpp").measure(resident, program, scalars, Wants.VOTES)
    )
    assert backend.n_passes == 2
    scalars[1].models[2].gain = 1.0
    backend.measure(table, replace(program, vote=Vote.COUNT), scalars, Wants.VOTES)
    backend.measure(table, program, scalars, Wants.VOTES | Wants.L1)
    assert backend.n_passes == 4


def one_tensor(n: int = 60, shape: tuple[int, ...] = (6, 10)) -> list[Item]:
    rng = np.random.default_rng(0)
    tensors = [grid_values(rng, n, torch.float32) for _ in range(3)]
    return [Item("weight", shape, tensors[0], tensors[1:], torch.empty(n))]


@pytest.mark.parametrize("keep", [Keep.BAND, Keep.SCORE, Keep.VARIANCE])
@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 400))
def test_thresholds_and_positions_of_every_key(keep: Keep, seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    method = make_method("linear")
    items = one_tensor(n, (n,))
    scores = [normal_values(rng, n, torch.float32), grid_values(rng, n, torch.float32, 2)]
    items[0].models += scores
    resident, logical = (table_of(items, method, resident=r) for r in (True, False))
    resident.entries[0].scores = resident.entries[0].models[::-1]
    source = TensorSource(items, method, logical, pieces_of(items, rng, False))
    resident_parts = source.chunks

    def with_scores(*, write: bool, look: bool = True) -> Iterator[Chunk]:
        for chunk in resident_parts(write=write, look=look):
            for entry in chunk.table.entries:
                entry.scores = entry.models[::-1]
            yield chunk

    source.chunks = with_scores  # type: ignore[method-assign]
    backend, inner = StreamedBackend(load("cpp"), source), load("cpp")
    queries = [
        RankQuery(0, model, int(k))
        for model in range(1 if keep is Keep.VARIANCE else 4)
        for k in (1, n, rng.integers(1, n + 1))
    ]
    found = backend.thresholds(logical, keep, queries)
    assert repr(found) == repr(inner.thresholds(resident, keep, queries))
    asked = [
        (query.group, query.model, answer.value, int(rng.integers(answer.n_equal)))
        for query, answer in zip(queries, found, strict=True)
    ]
    asked.append((*asked[0][:3], n + 1))  # there are not so many
    backend.n_passes = 0
    assert backend.nth_equal(logical, keep, asked) == inner.nth_equal(resident, keep, asked)
    assert backend.n_passes == 2


def plain_scalars(table: WorkTable) -> list[TensorScalars]:
    return [TensorScalars(models=[ModelScalars() for _ in entry.models]) for entry in table.entries]


def test_parts_that_are_not_the_whole_are_refused() -> None:
    method = make_method("linear")
    items = one_tensor()
    table = table_of(items, method, resident=False)
    backend = StreamedBackend(load("cpp"), TensorSource(items, method, table, [[(0, 0, 20)], [(0, 30, 60)]]))
    with pytest.raises(MergeError, match="'weight': a pass over its parts gave 50 elements, expected 60"):
        backend.measure(table, Program(), plain_scalars(table), Wants.L1)
    with pytest.raises(MergeError, match="50 elements"):
        backend.combine(table, Program(), plain_scalars(table))
    with pytest.raises(MergeError, match="50 elements"):
        backend.thresholds(table, Keep.BAND, [RankQuery(0, 0, 3)])


@pytest.mark.parametrize(("shape", "cut"), [((6, 10), 25), ((60,), 30)])
def test_a_cut_through_a_ranked_row_is_refused(shape: tuple[int, ...], cut: int) -> None:
    method = make_method("della", density=0.5)
    items = one_tensor(60, shape)
    table = table_of(items, method, resident=False)
    cuts = [[(0, 0, cut)], [(0, cut, 60)]]
    backend = StreamedBackend(load("cpp"), TensorSource(items, method, table, cuts))
    with pytest.raises(MergeError, match=f"elements 0 to {cut}, which cuts a row of {shape[-1]}"):
        backend.combine(table, method.program(), plain_scalars(table))


def test_a_backend_without_a_resumable_form_is_refused() -> None:
    method = make_method("linear")
    items = one_tensor()
    table = table_of(items, method, resident=False)
    with pytest.raises(BackendError, match="'reference' cannot process a table in parts"):
        StreamedBackend(reference.backend(), TensorSource(items, method, table, []))
