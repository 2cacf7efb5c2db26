"""Numbers of what files hold as codes or as parts of an adapter, and codes of results."""

from __future__ import annotations

from collections.abc import Sequence

from tvfast.checkpoint.stored import Stored, matrix_of
from tvfast.dtypes import FACTORS, FP8
from tvfast.engine.arrange import Arrangement, Narrowing, Part, Widening
from tvfast.ops.storage import (
    ScaledBlocks,
    ThinFactor,
    add_low_rank,
    narrow_fp8,
    narrow_scaled,
    widen_fp8,
    widen_scaled,
)
from tvfast.program import DType


def widen_inputs(parts: Sequence[Part], arrangement: Arrangement, address: int, n_threads: int = 0) -> None:
    """Make the numbers that kernels read, when everything is in the block at `address`."""
    for widening in arrangement.widenings:
        part = parts[widening.part]
        stored = part.task.inputs[widening.input]
        if not part.n:
            continue
        sides = list(widening.sides)
        if stored.blocks is not None:
            row = sides.pop(0) if stored.blocks.factors is not None else None
            _scale(stored, part, widening, row, address, n_threads)
        if stored.update is not None:
            _update(stored, part, widening, sides, address, n_threads)


def narrow_results(parts: Sequence[Part], arrangement: Arrangement, address: int, n_threads: int = 1) -> None:
    """Make the codes that are written, when every result is in the block at `address`."""
    for narrowing in arrangement.narrowings:
        part = parts[narrowing.part]
        if part.n:
            _encode(part, narrowing, address, n_threads)


def _scale(
    stored: Stored,
    part: Part,
    widening: Widening,
    factors: tuple[int, int] | None,
    address: int,
    n_threads: int,
) -> None:
    blocks = stored.blocks
    assert blocks is not None
    codes, out = address + widening.stored, address + widening.at
    if factors is None or blocks.factors is None:
        widen_fp8(codes, part.n, FP8.index(stored.dtype), out)
        return
    form = ScaledBlocks(
        FP8.index(stored.dtype),
        *matrix_of(stored.shape),
        blocks.rows,
        blocks.columns,
        FACTORS.index(blocks.factors.dtype),
    )
    at, first = factors
    widen_scaled(form, codes, address + at, first, part.start, part.start + part.n, out, n_threads)


def _update(
    stored: Stored,
    part: Part,
    widening: Widening,
    sides: Sequence[tuple[int, int]],
    address: int,
    n_threads: int,
) -> None:
    update = stored.update
    assert update is not None
    (a, _), (b, first) = sides
    n_columns = stored.n_elements // stored.shape[0]
    kind_a, kind_b = DType[update.a.dtype], DType[update.b.dtype]
    if update.transposed:
        left = ThinFactor(address + a, kind_a, 1, update.a.n_elements // update.rank)
        right = ThinFactor(address + b, kind_b, update.rank, 1)
    else:
        left = ThinFactor(address + b, kind_b, update.rank, 1)
        right = ThinFactor(address + a, kind_a, 1, n_columns)
    if stored.blocks is not None:
        matrix = address + widening.at, DType.F32
    else:
        matrix = address + widening.stored, DType[stored.dtype]
    add_low_rank(
        matrix,
        (address + widening.at, DType[update.dtype]),
        part.start,
        part.start + part.n,
        n_columns,
        update.rank,
        update.factor,
        left,
        first,
        right,
        n_threads,
    )


def _encode(part: Part, narrowing: Narrowing, address: int, n_threads: int) -> None:
    task, encoding = part.task, part.task.encoding
    assert encoding is not None
    values, codes = address + narrowing.at, address + narrowing.codes
    if encoding.factors is None:
        narrow_fp8(values, part.n, FP8.index(task.dtype), True, codes)
        return
    form = ScaledBlocks(
        FP8.index(task.dtype),
        *matrix_of(task.shape),
        encoding.rows,
        encoding.columns,
        FACTORS.index(encoding.factors[1]),
    )
    narrow_scaled(
        form,
        values,
        part.start,
        part.start + part.n,
        encoding.power_of_two,
        codes,
        address + narrowing.factors,
        n_threads,
    )
