"""Where arrays lie on a device, and how few transfers bring them there."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tvfast import dtypes
from tvfast.engine.arrange import Part
from tvfast.engine.device import ALIGNMENT
from tvfast.engine.device_plan import needs
from tvfast.engine.placement import (
    ITEM_BYTES,
    KERNEL_ALIGNMENT,
    bytes_of_element,
    inputs_at,
    inputs_of,
    n_bytes,
    output_dtypes,
    outputs_at,
    piece,
    place,
    placed_table,
    transfers,
)
from tvfast.methods import make_method
from tvfast.program import DType, Entry, View

from .test_plan import tasks_of

KINDS = st.sampled_from(list(DType))


def entries_of(sizes: list[tuple[int, DType, DType]], n_models: int, n_scores: int = 0) -> list[Entry]:
    """Arrays one behind the other in host memory, all of the first model before all of the second."""
    address = 10_000_008
    views: list[list[View]] = [[] for _ in sizes]
    for _ in range(1 + n_models + n_scores):
        for (n, kind, _), found in zip(sizes, views, strict=True):
            found.append(View(address, n, kind))
            address += n * ITEM_BYTES[kind]
    entries = []
    for index, (n, _, out) in enumerate(sizes):
        base, *others = views[index]
        entries.append(
            Entry(
                name=str(index),
                base=base,
                models=tuple(others[:n_models]),
                scores=tuple(others[n_models:]),
                out=View(address, n, out),
            )
        )
        address += n * ITEM_BYTES[out]
    return entries


@given(st.lists(st.tuples(st.integers(0, 300), KINDS, KINDS), max_size=9), st.integers(1, 4))
def test_arrays_are_apart_aligned_and_arrive_whole(
    sizes: list[tuple[int, DType, DType]], n_models: int
) -> None:
    entries = entries_of(sizes, n_models, n_scores=1)
    outputs = output_dtypes(entries)
    placement = place(entries, 512, outputs)
    pairs = [*inputs_at(entries, placement.inputs), *outputs_at(entries, placement.outputs)]
    assert all(at % KERNEL_ALIGNMENT == 0 for _, at in pairs)
    taken = sorted((at, at + n_bytes(view)) for view, at in pairs if view.n_elements)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(taken))
    assert all(begin >= 512 and end <= placement.end for begin, end in taken)
    moved = transfers(pairs)
    host = {one.address + k: one.at + k for one in moved for k in range(one.n_bytes)}
    assert len(host) == sum(n_bytes(view) for view, _ in pairs)
    for view, at in pairs:
        assert all(host[view.address + k] == at + k for k in range(n_bytes(view)))


def test_neighbours_travel_together() -> None:
    sizes = [(64, DType.BF16, DType.BF16), (4096, DType.BF16, DType.BF16), (8, DType.BF16, DType.BF16)]
    entries = entries_of(sizes, 3)
    placement = place(entries, 0, output_dtypes(entries))
    uploads = transfers(inputs_at(entries, placement.inputs))
    # a model's arrays are one transfer; between models there is room for alignment
    assert [one.n_bytes for one in uploads] == [2 * (64 + 4096 + 8)] * 4
    assert len(transfers(outputs_at(entries, placement.outputs))) == 1


def test_a_table_on_the_device_is_the_table() -> None:
    entries = entries_of([(5, DType.BF16, DType.F32), (0, DType.F16, DType.F16)], 2, n_scores=2)
    outputs = output_dtypes(entries)
    placement = place(entries, 256, outputs)

    def view(at: int, n: int, dtype: DType) -> View:
        return View(at, n, dtype, "owner")

    table = placed_table(entries, 2, placement, outputs, view)
    for entry, placed, ats in zip(entries, table.entries, placement.inputs, strict=True):
        assert [v.address for v in inputs_of(placed)] == list(ats)
        assert [(v.n_elements, v.dtype) for v in inputs_of(placed)] == [
            (v.n_elements, v.dtype) for v in inputs_of(entry)
        ]
        assert len(placed.models) == len(placed.scores) == 2
        assert placed.out is not None
        assert entry.out is not None
        assert placed.out.dtype == entry.out.dtype


def test_a_piece_knows_its_place() -> None:
    (entry,) = entries_of([(100, DType.BF16, DType.F32)], 2)
    part = piece(entry, 30, 20)
    assert part.offset == 30
    assert part.base is not None
    assert entry.base is not None
    assert part.base.address == entry.base.address + 60
    assert part.out is not None
    assert entry.out is not None
    assert part.out.address == entry.out.address + 120
    assert {view.n_elements for view in (*inputs_of(part), part.out)} == {20}
    assert bytes_of_element(entry) == 2 * 3 + 4


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=8),
    st.integers(1, 5),
    st.sampled_from(["BF16", "F32"]),
)
def test_what_is_planned_is_enough_for_what_is_placed(
    shapes: list[tuple[int, int]], n_models: int, dtype: str
) -> None:
    method = make_method("della", density=0.5, epsilon=0.1)
    tasks = tasks_of(shapes, method, n_models=n_models, dtype=dtype)
    kind = DType[dtype]
    entries = entries_of([(task.n_elements, kind, kind) for task in tasks], n_models)
    end = place(entries, 0, output_dtypes(entries)).end
    for task in tasks:
        for _ in task.models:
            end = -(-(end + (task.n_elements + 63) // 64 * 8) // ALIGNMENT) * ALIGNMENT
    parts = [Part(task, 0, task.n_elements) for task in tasks]
    assert end <= needs(parts)[0]
    assert needs(parts)[0] <= sum(
        dtypes.n_bytes(dtype, part.n * (n_models + 2)) + ALIGNMENT * 4 * (n_models + 3) + part.n * n_models
        for part in parts
    )
