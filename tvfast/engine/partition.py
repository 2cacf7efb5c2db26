"""Which rank writes which bytes: a pure function of the tasks and the number of ranks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from tvfast.engine.arrange import Part
from tvfast.engine.cuts import CUT
from tvfast.engine.passes import count_passes
from tvfast.engine.tasks import Task, step_elements

BULKY = 32
"""What cannot be cut and is above this fraction of a rank's share goes to whoever has least; the rest follows
the order of the files."""


@dataclass(frozen=True, slots=True)
class _Item:
    """Work for one rank; `weight` is what it reads and writes, bytes, over all passes."""

    parts: tuple[Part, ...]
    weight: int
    divisible: bool


def partition(
    tasks: Sequence[Task], n_ranks: int, is_done: Callable[[Part], bool] = lambda part: False
) -> tuple[tuple[Part, ...], ...]:
    """Divide tensors over ranks so that the bytes which each reads and writes are about equal.

    Tensors that are measured before they are written, or solved, stay whole, and tensors that are ranked
    together stay together; all others are cut where a share ends. Ranks get neighbours in the files' order.

    Args:
        tasks: in the order of the output.
        is_done: whether nothing of a part has to be written any more.

    Returns:
        For each rank what it writes, in the order of the output; every element of every task that is not done
        exactly once.
    """
    items = [item for item in _items(tasks) if item.weight and not all(map(is_done, item.parts))]
    share = sum(item.weight for item in items) // n_ranks
    shares: list[list[Part]] = [[] for _ in range(n_ranks)]
    loads = [0] * n_ranks
    bulky = [item for item in items if not item.divisible and item.weight * BULKY > share]
    for item in sorted(bulky, key=lambda item: -item.weight):
        rank = loads.index(min(loads))
        loads[rank] += item.weight
        shares[rank] += item.parts
    chosen = {id(item) for item in bulky}
    _deal([item for item in items if id(item) not in chosen], loads, shares)
    order = {task.name: number for number, task in enumerate(tasks)}
    return tuple(
        tuple(sorted(found, key=lambda part: (order[part.task.name], part.start))) for found in shares
    )


def weight_of(part: Part) -> int:
    """Bytes that are read and written for a part in one pass."""
    return part.input_bytes + part.output_bytes


def _items(tasks: Sequence[Task]) -> Iterator[_Item]:
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        group = None if task.method is None else task.method.group_of(task.key)
        whole = Part(task, 0, task.n_elements)
        if group is not None:
            groups.setdefault(group, []).append(task)
        else:
            divisible = task.tensor is None and count_passes([task]) == 1
            yield _Item((whole,), weight_of(whole), divisible)
    for members in groups.values():
        parts = tuple(Part(task, 0, task.n_elements) for task in members)
        method = members[0].method
        n_passes = count_passes(members) if method is not None and method.whole_model else 1
        yield _Item(parts, sum(n_passes * part.input_bytes + part.output_bytes for part in parts), False)


def _deal(items: Sequence[_Item], loads: Sequence[int], shares: Sequence[list[Part]]) -> None:
    """Lay the items on a line and cut it into ranges that raise all loads to one level."""
    ends = list(accumulate(_rooms(loads, sum(item.weight for item in items))))
    position = 0
    for item in items:
        if not item.divisible:
            shares[bisect_right(ends, position + item.weight // 2)].extend(item.parts)
        else:
            (part,) = item.parts
            step = step_elements(part.task) or CUT
            inside = [end - position for end in ends if position < end < position + item.weight]
            cuts = sorted({_nearest(at * part.n // item.weight, step) for at in inside} - {0})
            edges = [0, *(cut for cut in cuts if cut < part.n), part.n]
            for begin, end in pairwise(edges):
                middle = position + (begin + end) * item.weight // (2 * part.n)
                shares[bisect_right(ends, middle)].append(Part(part.task, begin, end - begin))
        position += item.weight


def _rooms(loads: Sequence[int], n_bytes: int) -> list[int]:
    """How much each rank takes of `n_bytes`, so that the smallest loads become equal."""
    level, filled = 0, 0
    for count, load in enumerate(sorted(loads), 1):
        filled += load
        next_level = -(-(n_bytes + filled) // count)
        if count > 1 and load >= level:
            break
        level = next_level
    return [max(0, level - load) for load in loads]


def _nearest(n: int, multiple: int) -> int:
    return (n + multiple // 2) // multiple * multiple
