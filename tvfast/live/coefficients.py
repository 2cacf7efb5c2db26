"""Coefficients of a live merge: one per task, or one per task and group of tensors, in any form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tvfast.comparing import layer_of
from tvfast.errors import ArgumentError, UnknownNameError
from tvfast.ops._check import number

Coefficients: TypeAlias = float | Sequence[Any] | Tensor | Mapping[str, Any]
"""One number; T numbers; [T, G] numbers; or a mapping from each group to T numbers."""

Grouping: TypeAlias = str | Callable[[str], str]
"""How tensors share coefficients: "layer", "tensor", or a function from a tensor's name to its group's."""

_LARGEST = torch.finfo(torch.float32).max


def group_of(by: Grouping) -> Callable[[str], str]:
    """The function from tensor names to group names.

    Raises:
        UnknownNameError: a string that names no grouping.
        ArgumentError: neither a string nor callable.
    """
    if by == "layer":
        return layer_of
    if by == "tensor":
        return lambda name: name
    if isinstance(by, str):
        raise UnknownNameError(f"by is {by!r}; expected 'layer', 'tensor', or a function of a tensor's name.")
    if not callable(by):
        raise ArgumentError(f"by is a {type(by).__name__}; expected 'layer', 'tensor', or a function.")
    return by


@dataclass(frozen=True, slots=True)
class Columns:
    """Checked coefficients: `values[g]` are the T of group g; one column where all groups share it."""

    values: list[list[float]]
    form: Coefficients  # as the caller gave them

    @property
    def shared(self) -> bool:
        """Whether there is one coefficient per task."""
        return not isinstance(self.form, Mapping) and _rank(self.form) < 2

    def of(self, group: int) -> list[float]:
        """The T coefficients of a group."""
        return self.values[0] if self.shared else self.values[group]

    def alike(self, gradient: list[list[float]], groups: Sequence[str]) -> Any:
        """Numbers [G][T] in the form of the coefficients; summed over groups where those are shared."""
        if isinstance(self.form, Mapping):
            return {name: _tensor(row, self.form[name]) for name, row in zip(groups, gradient, strict=True)}
        columns = [list(column) for column in zip(*gradient, strict=True)]
        if not self.shared:
            return _tensor(columns, self.form)
        sums = [math.fsum(c) if all(map(math.isfinite, c)) else sum(c) for c in columns]
        return _tensor(
            sums if _rank(self.form) else sums[0] if len(sums) == 1 else math.fsum(sums), self.form
        )


def columns_of(coefficients: Coefficients, n_tasks: int, groups: Sequence[str]) -> Columns:
    """Coefficients as one list of T numbers per group.

    Raises:
        ArgumentError: a shape that is none of [], [T] and [T, G], groups that are missing or unknown, or a
            number that is not finite in float32.
    """
    if isinstance(coefficients, Mapping):
        missing = [name for name in groups if name not in coefficients]
        unknown = [name for name in coefficients if name not in groups]
        if missing or unknown:
            raise ArgumentError(
                f"coefficients lack the groups {missing[:5]} and have {unknown[:5]}, which are none; "
                f"expected exactly the {len(groups)} names of LiveMerge.groups."
            )
        return Columns([_tasks(coefficients[name], n_tasks, name) for name in groups], coefficients)
    if _rank(coefficients) < 2:
        return Columns([_tasks(coefficients, n_tasks, "coefficients")], coefficients)
    rows: list[Any] = _listed(coefficients)
    if len(rows) != n_tasks or any(_rank(row) != 1 or len(row) != len(groups) for row in rows):
        found = [len(rows), *({len(row) for row in rows if _rank(row) == 1})]
        raise ArgumentError(
            f"coefficients have shape {found}; expected [{n_tasks}, {len(groups)}]: one per task and group "
            "of LiveMerge.groups."
        )
    numbers = [_tasks(row, len(groups), f"coefficients[{k}]") for k, row in enumerate(rows)]
    return Columns([list(column) for column in zip(*numbers, strict=True)], coefficients)


def _rank(found: Any) -> int:
    """Dimensions: of a tensor or array its own, of a sequence up to two."""
    if hasattr(found, "ndim"):
        return int(found.ndim)
    if not isinstance(found, Sequence) or isinstance(found, str | bytes):
        return 0
    return 1 + max((min(1, _rank(item)) for item in found), default=0)


def _listed(found: Any) -> Any:
    """Tensors and arrays as nested lists; everything else as it is."""
    return found.detach().tolist() if isinstance(found, Tensor) else getattr(found, "tolist", lambda: found)()


def _tasks(found: Any, n: int, place: str) -> list[float]:
    """n finite numbers; a single one stands for all."""
    values = _listed(found)
    if not isinstance(values, list | tuple):
        values = [values] * n
    if len(values) != n:
        raise ArgumentError(f"{place} has {len(values)} values; expected {n}, or one for all.")
    result = [number(f"{place}[{k}]", value) for k, value in enumerate(values)]
    for k, value in enumerate(result):
        if not abs(value) <= _LARGEST:
            raise ArgumentError(f"{place}[{k}] is {value}; expected a finite number that float32 holds.")
    return result


def _tensor(values: Any, like: Any) -> Tensor:
    """A tensor of the dtype and device of a tensor of coefficients, otherwise float64 on the CPU."""
    if isinstance(like, Tensor) and like.is_floating_point():
        return torch.tensor(values, dtype=torch.float64).to(like)
    return torch.tensor(values, dtype=torch.float64)
