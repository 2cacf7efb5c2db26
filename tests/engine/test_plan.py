"""Plans: everything once, within the memory, in as few passes as the method allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tvfast import dtypes
from tvfast.checkpoint.layout import make_layout
from tvfast.checkpoint.stored import Stored
from tvfast.engine.arrange import Part, arrange
from tvfast.engine.binding import Binding
from tvfast.engine.cuts import CUT
from tvfast.engine.memory import PAGE
from tvfast.engine.passes import count_passes
from tvfast.engine.plan import METADATA_PEAK, PROGRAM_BYTES, MiB, Plan, make_plan
from tvfast.engine.tasks import Task
from tvfast.errors import ArgumentError, RecipeError
from tvfast.methods import make_method
from tvfast.methods.base import ProgramMethod

TIES = make_method("ties", density=0.2)
SUM = make_method("task_arithmetic")


def tasks_of(
    shapes: Sequence[tuple[int, ...]],
    method: ProgramMethod | None,
    n_models: int = 3,
    dtype: str = "BF16",
    header: int = 72,
) -> tuple[Task, ...]:
    """Tensors that follow each other in one file per model."""
    tasks = []
    offset = header
    for index, shape in enumerate(shapes):
        n = 1
        for size in shape:
            n *= size
        n_bytes = dtypes.n_bytes(dtype, n)
        inputs = [Stored(f"t{index}", f"m{k}", offset, n_bytes, dtype, shape) for k in range(n_models + 1)]
        tasks.append(Task(f"t{index}", f"t{index}", dtype, shape, method, inputs[0], tuple(inputs[1:])))
        offset += n_bytes
    return tuple(tasks)


def plan_of(tasks: tuple[Task, ...], **arguments: Any) -> Plan:
    layout = make_layout([(t.name, t.dtype, t.shape) for t in tasks], 2**40, {})
    binding = Binding(tasks=tasks, config=None, donor="m0", tokenizer=None, warnings=(), ties={})
    return make_plan(binding, layout, **arguments)


def check_complete(plan: Plan, tasks: Sequence[Task]) -> None:
    """Every element of every tensor is in just one part."""
    seen: dict[str, list[tuple[int, int]]] = {task.name: [] for task in tasks}
    for unit in plan.units:
        for part in unit.parts:
            seen[part.task.name].append((part.start, part.n))
    for task in tasks:
        at = 0
        for start, n in sorted(seen[task.name]):
            assert start == at
            at += n
        assert at == task.n_elements


@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 3000)), min_size=1, max_size=12),
    st.sampled_from([TIES, SUM, make_method("della", density=0.5, epsilon=0.1), None]),
    st.integers(256, 2000),
    st.integers(1, 8),
)
def test_every_element_is_merged_once_within_the_memory(
    shapes: list[tuple[int, int]], method: ProgramMethod | None, memory: int, threads: int
) -> None:
    tasks = tasks_of(shapes, method)
    try:
        plan = plan_of(tasks, memory=memory * MiB, n_threads=threads)
    except ArgumentError as error:
        assume("needs at least" not in str(error))
        raise
    check_complete(plan, tasks)
    assert plan.peak_bytes <= memory * MiB
    for unit in plan.units:
        assert unit.n_bytes <= plan.arena_bytes
        if not unit.chunk_bytes:
            assert arrange(unit.parts, plan.layout).n_bytes <= unit.n_bytes


def test_the_least_memory_that_is_named_is_enough() -> None:
    tasks = tasks_of([(40000, 4096), (4096,)], TIES)
    with pytest.raises(ArgumentError, match="needs at least") as found:
        plan_of(tasks, memory=50 * MiB, n_threads=2)
    least = int(str(found.value).split("at least ")[1].split()[0])
    check_complete(plan_of(tasks, memory=least, n_threads=2), tasks)
    with pytest.raises(ArgumentError):
        plan_of(tasks, memory=least - 1, n_threads=2)


def test_little_memory_means_fewer_workers_on_a_machine_with_many_cores() -> None:
    tasks = tasks_of([(128256, 2048), (2048, 2048)], TIES)
    plan = plan_of(tasks, memory=600 * MiB, n_threads=64)
    assert plan.peak_bytes <= 600 * MiB
    assert 1 <= plan.n_workers < 65
    check_complete(plan, tasks)


def test_a_tensor_that_does_not_fit_is_streamed_with_a_reason() -> None:
    tasks = tasks_of([(128256, 2048), (2048, 2048)], TIES)
    plan = plan_of(tasks, memory=600 * MiB, n_threads=2)
    assert plan.n_passes == 2
    assert "2 passes over 't0'" in plan.reasons[0]
    n_sampled = 126 * 32768  # runs, one in every 64
    assert plan.read_bytes == 4 * 2 * (2 * 128256 * 2048 + n_sampled + 2048 * 2048)
    assert plan_of(tasks, memory=8192 * MiB, n_threads=2).n_passes == 1


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_what_is_not_ranked_has_room_beside_a_model_that_is(threads: int) -> None:
    ranked = make_method("ties", density=0.2, dialect="paper")
    tasks = tasks_of([(2048, 8192)] * 12, ranked)
    others = [
        replace(task, name=f"o{task.name}", key=f"o{task.key}") for task in tasks_of([(128256, 2048)], SUM)
    ]
    plan = plan_of((*tasks, *others), n_threads=threads)
    streamed, *beside = plan.units
    assert streamed.chunk_bytes
    assert streamed.n_bytes + (plan.n_workers - 1) * max(unit.n_bytes for unit in beside) <= plan.arena_bytes
    check_complete(plan, (*tasks, *others))
    little = plan_of((*tasks, *others), n_threads=threads, memory=plan.peak_bytes - 64 * MiB)
    assert little.peak_bytes <= plan.peak_bytes - 64 * MiB
    check_complete(little, (*tasks, *others))


def test_a_method_without_statistics_never_needs_a_second_pass() -> None:
    plan = plan_of(tasks_of([(128256, 8192)], SUM), memory=400 * MiB, n_threads=2)
    assert plan.n_passes == 1
    assert not plan.reasons
    assert all(part.start % CUT == 0 for unit in plan.units for part in unit.parts)


@pytest.mark.parametrize(
    ("name", "parameters", "n_passes"),
    [
        ("task_arithmetic", {}, 1),
        ("linear", {}, 1),
        ("ties", {"density": 0.2}, 2),
        ("ties", {"density": 1.0}, 1),
        ("ties", {"density": 0.2, "rescale": True}, 3),
        ("ties", {"density": 0.2, "dialect": "paper"}, 2),
        ("ties", {"density": 0.2, "tie": "index"}, 4),
        ("dare_linear", {"density": 0.5}, 2),
        ("sce", {"select_topk": 0.5}, 4),
        ("dare_linear", {"density": 0.5, "rescale": False}, 1),
        ("della", {"density": 0.5, "epsilon": 0.1}, 2),
        ("breadcrumbs", {"density": 0.5}, 2),
    ],
)
def test_passes_are_what_the_method_asks(name: str, parameters: dict[str, Any], n_passes: int) -> None:
    assert count_passes(tasks_of([(100, 100)], make_method(name, **parameters))) == n_passes


def test_majority_votes_of_float32_models_take_a_pass_of_their_own() -> None:
    method = make_method("ties", density=0.2, dialect="paper")
    assert count_passes(tasks_of([(100, 100)], method, dtype="F32")) == 3


def test_a_whole_model_method_is_one_unit() -> None:
    method = make_method("ties", density=0.2, dialect="paper")
    copied = tasks_of([(7,)], None, dtype="I64")[0]
    tasks = tasks_of([(3000, 3000)] * 5, method)
    named = Task("buffer", "buffer", copied.dtype, copied.shape, None, None, copied.models)
    plan = plan_of((*tasks, named), memory=400 * MiB, n_threads=2)
    assert [len(unit.parts) for unit in plan.units] == [5, 1]
    assert "ranks the whole model" in plan.reasons[0]


def test_a_whole_model_method_with_different_numbers_is_refused() -> None:
    first = tasks_of([(10,)], make_method("ties", density=0.2, dialect="paper"))[0]
    other = tasks_of([(10,), (10,)], make_method("ties", density=0.3, dialect="paper"))[1]
    with pytest.raises(RecipeError, match="its numbers differ between tensors"):
        plan_of((first, other))


def test_neighbours_in_a_file_are_read_and_written_together() -> None:
    tasks = tasks_of([(100, 50), (3, 7), (64,)], SUM)
    layout = make_layout([(t.name, t.dtype, t.shape) for t in tasks], 2**40, {})
    found = arrange([Part(t, 0, t.n_elements) for t in tasks], layout)
    assert [(e.path, e.offset, e.n_bytes) for e in found.extents] == [
        (f"m{k}", 72, 2 * (5000 + 21 + 64)) for k in range(4)
    ]
    assert len(found.spans) == 1
    assert all(e.at % PAGE == e.offset % PAGE for e in found.extents)
    assert all(s.at % PAGE == s.offset % PAGE for s in found.spans)
    taken = sorted((array.at, array.at + array.n_bytes) for array in (*found.extents, *found.spans))
    assert all(end <= begin for (_, end), (begin, _) in pairwise(taken))


def test_a_plan_says_what_it_does_as_json() -> None:
    plan = plan_of(tasks_of([(1000, 100)] * 3, TIES), n_threads=2).as_json()
    assert plan["tensors"] == 3
    assert plan["methods"] == [{"tensors": 3, "method": "ties density=0.2"}]
    assert plan["read_bytes"] == 4 * 3 * 2 * 100_000
    assert plan["shards"][0]["name"] == "model.safetensors"


def test_a_plan_counts_what_reading_the_metadata_of_many_pieces_takes() -> None:
    tasks = tasks_of([(1000, 100)], TIES)
    layout = make_layout([(t.name, t.dtype, t.shape) for t in tasks], 2**40, {})
    binding = Binding(tasks=tasks, config=None, donor="m0", tokenizer=None, warnings=(), ties={})
    n_bytes = 40 * MiB  # 280 000 pieces
    larger = replace(binding, metadata_bytes=n_bytes)
    opening = PROGRAM_BYTES + METADATA_PEAK * n_bytes
    assert make_plan(larger, layout).peak_bytes >= opening > 2 * make_plan(binding, layout).peak_bytes
    with pytest.raises(ArgumentError, match=rf"it needs at least {opening} "):
        make_plan(larger, layout, memory=opening - 1)
    assert make_plan(larger, layout, memory=opening).peak_bytes == opening
