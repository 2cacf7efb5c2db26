"""How checkpoints differ in their headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvfast.dtypes import FP8, MERGEABLE

if TYPE_CHECKING:
    from tvfast.checkpoint.reading import Checkpoint
    from tvfast.checkpoint.stored import Stored


@dataclass(frozen=True, slots=True)
class HeaderDifferences:
    """What headers alone tell; the first checkpoint is the base.

    Attributes:
        missing: per checkpoint, names that another one has and it lacks.
        shapes, dtypes: per name that differs, the value of every checkpoint that has it, or None.
        common: names of numbers that all have in one shape, in the base's order, tied ones once.
        not_compared: other names that all have, with the reason.
    """

    missing: tuple[tuple[str, ...], ...]
    shapes: dict[str, tuple[tuple[int, ...] | None, ...]]
    dtypes: dict[str, tuple[str | None, ...]]
    common: tuple[str, ...]
    not_compared: dict[str, str]

    def as_json(self, paths: Sequence[str]) -> dict[str, Any]:
        """Plain data; `paths` are those of the checkpoints."""
        return {
            "missing": [
                {"path": path, "tensors": list(names)}
                for path, names in zip(paths, self.missing, strict=True)
            ],
            "shapes": {name: [one and list(one) for one in row] for name, row in self.shapes.items()},
            "dtypes": {name: list(row) for name, row in self.dtypes.items()},
            "not_compared": self.not_compared,
        }


def header_differences(checkpoints: Sequence[Checkpoint]) -> HeaderDifferences:
    """Compare sets of names, shapes and storage types.

    Args:
        checkpoints: with the factors of their codes (`checkpoint.factors.with_factors`).
    """
    names = list(dict.fromkeys(name for one in checkpoints for name in one.tensors))
    shapes, dtypes, not_compared = {}, {}, {}
    common = []
    for name in names:
        found = [one.tensors.get(name) for one in checkpoints]
        stored = [one for one in found if one is not None]
        if len({one.shape for one in stored}) > 1:
            shapes[name] = tuple(None if one is None else one.shape for one in found)
        if len({one.dtype for one in stored}) > 1:
            dtypes[name] = tuple(None if one is None else one.dtype for one in found)
        if len(stored) < len(checkpoints) or name in shapes:
            continue
        odd = sorted({one.dtype for one in stored if one.operand not in MERGEABLE or _lacks_scales(one)})
        if odd:
            scales = " without scales" if any(dtype in FP8 for dtype in odd) else ""
            not_compared[name] = f"stored as {', '.join(odd)}{scales}"
        elif not all(name in one.aliases for one in checkpoints):  # tied everywhere: counted once
            common.append(name)
    missing = tuple(tuple(name for name in names if name not in one.tensors) for one in checkpoints)
    return HeaderDifferences(missing, shapes, dtypes, tuple(common), not_compared)


def _lacks_scales(stored: Stored) -> bool:
    return stored.blocks is not None and stored.blocks.factors is None
