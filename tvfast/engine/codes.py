"""What belongs to 8-bit tensors in an output: their factors, and those of activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tvfast.checkpoint.factors import CALIBRATION
from tvfast.checkpoint.reading import Checkpoint
from tvfast.checkpoint.stored import Stored
from tvfast.dtypes import FP8
from tvfast.engine.rows import Row
from tvfast.engine.tasks import Encoding, Task

_KEYS = ("quantization_config", "compression_config")


def with_quantisation(
    config: dict[str, Any] | None, tasks: Sequence[Task], checkpoints: Mapping[str, Checkpoint]
) -> dict[str, Any] | None:
    """The configuration of an output with what it says of 8-bit tensors, or without if there are none."""
    coded = [
        checkpoint.config or {}
        for checkpoint in checkpoints.values()
        if any(stored.dtype in FP8 for stored in checkpoint.tensors.values())
    ]
    if config is None or not coded:
        return config
    if all(task.dtype not in FP8 for task in tasks):
        return {key: value for key, value in config.items() if key not in _KEYS}
    if not config.keys().isdisjoint(_KEYS):
        return config
    found = ({key: one[key] for key in _KEYS if key in one} for one in coded)
    return config | next(filter(None, found), {})


def encoding_of(row: Row) -> Encoding | None:
    """How the result of a row is stored: in blocks like those of its reference; None: as it is."""
    blocks = row.reference.blocks
    if blocks is None:
        return None
    factors = None
    if blocks.factors is not None:
        suffix = blocks.factors.name.removeprefix(row.reference.name)
        factors = (row.name + suffix, blocks.factors.dtype, blocks.factors.shape)
    return Encoding(blocks.rows, blocks.columns, factors, blocks.power_of_two)


class Codes:
    """Completes tasks whose results, or whose copies, are 8-bit.

    Attributes:
        warnings: of what is copied though models may differ in it.
    """

    def __init__(self, checkpoints: Mapping[str, Checkpoint]) -> None:
        self._checkpoints = checkpoints
        self.warnings: list[str] = []

    def stored_as(self, row: Row) -> str:
        """The storage type of a row's result, where the recipe gives none."""
        reference = row.reference
        return self._reference(row).stored_as.get(reference.name, reference.dtype)

    def completed(self, task: Task, row: Row) -> list[Task]:
        """The task, with copies of factors that it does not write itself."""
        if task.dtype not in FP8:
            return [task]
        tasks = [task]
        (first, *_) = task.models or (task.base,)
        blocks = None if first is None else first.blocks
        if not task.is_merged and first is not None and blocks is not None:
            tasks = [replace(task, models=(replace(first, blocks=None),))]
            if blocks.factors is not None:
                suffix = blocks.factors.name.removeprefix(first.name)
                tasks.append(_copy(row.name + suffix, blocks.factors))
        return tasks + self._calibration(row)

    def _calibration(self, row: Row) -> list[Task]:
        """Factors of activations: those of the reference."""
        checkpoint = self._reference(row)
        source, target = (name.rpartition(".")[0] for name in (row.reference.name, row.name))
        found = [
            _copy(f"{target}.{word}", checkpoint.calibration[f"{source}.{word}"])
            for word in CALIBRATION
            if f"{source}.{word}" in checkpoint.calibration
        ]
        if found and not self.warnings:
            self.warnings.append(
                f"scales of activations ({', '.join(CALIBRATION)}) are those of {checkpoint.path}; "
                "calibrate the merged model anew if its activations are larger."
            )
        return found

    def _reference(self, row: Row) -> Checkpoint:
        return self._checkpoints[row.part.sources[row.part.reference].model]


def _copy(name: str, stored: Stored) -> Task:
    return Task(name, name, stored.dtype, stored.shape, None, None, (stored,))
