"""8-bit checkpoints: which tensor holds the factors of which codes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from tvfast.checkpoint.files import shown
from tvfast.checkpoint.reading import Checkpoint, aliases_of
from tvfast.checkpoint.stored import Blocks, Stored, matrix_of
from tvfast.dtypes import FACTORS, FP8
from tvfast.errors import CheckpointError

_SUFFIXES = ("_scale_inv", "_scale")
"""DeepSeek's and Qwen's, by 128 x 128 blocks; that of compressed-tensors and others, by tensor, row or block.
Both are what a code is multiplied by."""

CALIBRATION = ("input_scale", "output_scale")
"""Of a module's activations; they say nothing of its weight."""

_BLOCK = (128, 128)


def with_factors(checkpoint: Checkpoint, *, missing_is_one: bool = False) -> Checkpoint:
    """The checkpoint with the factors of its 8-bit tensors at these tensors, and no more among them.

    Args:
        missing_is_one: codes without factors are numbers as they are.

    Raises:
        CheckpointError: an 8-bit tensor has no factors, or their type or shape is another.
    """
    coded = [stored for stored in checkpoint.tensors.values() if stored.dtype in FP8]
    if not coded:
        return checkpoint
    tensors = dict(checkpoint.tensors)
    calibration: dict[str, Stored] = {}
    declared = _Declared(checkpoint.config)
    for stored in coded:
        factors = _factors_of(stored, checkpoint.tensors)
        if factors is not None:
            tensors[stored.name] = replace(stored, blocks=_blocks(stored, factors, declared))
            tensors.pop(factors.name, None)  # tied tensors may share theirs
        elif missing_is_one:
            tensors[stored.name] = replace(stored, blocks=Blocks(None, *matrix_of(stored.shape)))
        else:
            raise _missing(stored)
        module = stored.name.rpartition(".")[0]
        for word in CALIBRATION:
            name = f"{module}.{word}"
            if name in tensors:
                calibration[name] = tensors.pop(name)
    return replace(checkpoint, tensors=tensors, aliases=aliases_of(tensors), calibration=calibration)


class _Declared:
    """What `config.json` says of the blocks."""

    def __init__(self, config: Mapping[str, Any] | None) -> None:
        found = (config or {}).get("quantization_config")
        self._config: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
        self.power_of_two = self._config.get("scale_fmt") == "ue8m0"
        self.block = next((block for block in self._candidates() if _is_block(block)), _BLOCK)

    def _candidates(self) -> Iterator[Any]:
        yield self._config.get("weight_block_size")
        groups = self._config.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            yield weights.get("block_structure") if isinstance(weights, Mapping) else None


def _is_block(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value)


def _factors_of(stored: Stored, tensors: Mapping[str, Stored]) -> Stored | None:
    names = (stored.name + suffix for suffix in _SUFFIXES)
    return next((tensors[name] for name in names if name in tensors), None)


def _blocks(stored: Stored, factors: Stored, declared: _Declared) -> Blocks:
    """
    Raises:
        CheckpointError: factors of another type, or not as many as there are blocks.
    """
    if factors.dtype not in FACTORS:
        raise CheckpointError(
            f"{factors.path}: tensor {shown(factors.name)}, the factors of {shown(stored.name)}, is stored "
            f"as {factors.dtype}; expected one of {', '.join(FACTORS)}."
        )
    rows, columns = matrix_of(stored.shape)
    power_of_two = declared.power_of_two or factors.dtype == "F8_E8M0"
    by_block = _grid(stored.shape, *declared.block)
    if factors.n_elements == 1 and len(stored.shape) < 3:
        return Blocks(factors, rows, columns, power_of_two)
    if factors.shape == by_block:
        return Blocks(factors, declared.block[0], declared.block[1], power_of_two)
    of_rows = stored.shape[:-1]
    if factors.shape in (of_rows, (*of_rows, 1)):
        return Blocks(factors, 1, columns, power_of_two)
    if len(stored.shape) == 3 and factors.shape in (stored.shape[:1], (stored.shape[0], 1, 1)):
        return Blocks(factors, rows, columns, power_of_two)
    block = " x ".join(map(str, declared.block))
    raise CheckpointError(
        f"{factors.path}: tensor {shown(factors.name)} has shape {list(factors.shape)}; expected one factor "
        f"for tensor {shown(stored.name)} of shape {list(stored.shape)}, {rows} for its rows, or "
        f"{list(by_block)} for blocks of {block}. If the blocks are others, give weight_block_size in the "
        "quantization_config of config.json."
    )


def _grid(shape: tuple[int, ...], rows: int, columns: int) -> tuple[int, ...]:
    """Shape of the factors of blocks over the last two dimensions."""
    if len(shape) < 2:
        return ()
    return (*shape[:-2], math.ceil(shape[-2] / rows), math.ceil(shape[-1] / columns))


def _missing(stored: Stored) -> CheckpointError:
    expected = " or ".join(shown(stored.name + suffix) for suffix in _SUFFIXES)
    return CheckpointError(
        f"{stored.path}: tensor {shown(stored.name)} is {stored.dtype} and has no scales: there is no "
        f"tensor {expected}. Codes alone are no numbers. Restore the missing tensor; or if nothing was "
        "scaled when the model was cast to 8 bits, write tvfast: {on_missing_scale: one} in the recipe."
    )
