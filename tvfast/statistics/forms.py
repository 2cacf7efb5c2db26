"""How a Kronecker factor is stored: what `options` of a record say of a role."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from tvfast.errors import StatisticsError

FORMS = ("dense", "block", "diagonal", "root")


@dataclass(frozen=True, slots=True)
class StoredForm:
    """A symmetric matrix of side `size`.

    Attributes:
        name: one of `FORMS`.
        block: side of diagonal blocks; 0 for other forms.
    """

    name: str
    size: int
    block: int = 0

    @classmethod
    def of(cls, options: Mapping[str, Any], role: str, where: str) -> StoredForm:
        """What a record's options say of a role.

        Raises:
            StatisticsError: nothing, or what this release does not know.
        """
        said = options.get(role)
        if not isinstance(said, Mapping):
            raise StatisticsError(
                f"{where}: {role} has no form; expected an object in the record's options. Collect it again."
            )
        name, size, block = said.get("form"), said.get("size"), said.get("block", 0)
        if name not in FORMS:
            raise StatisticsError(f"{where}: {role} has the form {name!r}, which this release does not know.")
        if not _is_count(size) or not _is_count(block) or (name == "block" and not block):
            raise StatisticsError(
                f"{where}: {role} has size {size!r} and block {block!r}; expected positive integers. The "
                "file is damaged; collect it again."
            )
        return cls(name, size, block)

    def holds(self, shape: Sequence[int]) -> bool:
        """Whether a stored tensor of a shape can be this matrix."""
        if self.name == "root":
            return len(shape) == 2 and shape[0] == self.size
        n_whole, rest = divmod(self.size, self.block) if self.name == "block" else (0, self.size)
        packed = n_whole * _triangle(self.block) + _triangle(rest)
        return math.prod(shape) == (self.size if self.name == "diagonal" else packed)

    @property
    def n_entries(self) -> int:
        """Entries of the matrix as equations take it: roots as squares."""
        if self.name == "diagonal":
            return self.size
        return self.size * (self.block if self.name == "block" else self.size)


def _triangle(side: int) -> int:
    return side * (side + 1) // 2


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
