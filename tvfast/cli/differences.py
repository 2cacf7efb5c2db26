"""How checkpoints differ: in their headers, and in their task vectors, one tensor at a time."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import tvfast
from tvfast.errors import CheckpointError
from tvfast.ops.raw import Wants, backend_for

if TYPE_CHECKING:
    from tvfast.checkpoint.reading import Checkpoint
    from tvfast.checkpoint.stored import Stored
    from tvfast.program import View

TIE_DENSITY = 0.2
"""The tie mass is counted at the threshold of this density, the default of TIES."""

_WANTS = Wants.GRAM | Wants.VOTES | Wants.COUNTS
_PIECE = 1 << 26  # bytes per read: large enough for the disk, small enough to stop between two


@dataclass(frozen=True, slots=True)
class HeaderDifferences:
    """What headers alone tell; the first checkpoint is the base.

    Attributes:
        missing: per checkpoint, names that another one has and it lacks.
        shapes, dtypes: per name that differs, the value of every checkpoint that has it, or None.
        common: floating-point names that all have in one shape, in the base's order, tied ones once.
        not_compared: other names that all have, with the reason.
    """

    missing: tuple[tuple[str, ...], ...]
    shapes: dict[str, tuple[tuple[int, ...] | None, ...]]
    dtypes: dict[str, tuple[str | None, ...]]
    common: tuple[str, ...]
    not_compared: dict[str, str]


def header_differences(checkpoints: Sequence[Checkpoint]) -> HeaderDifferences:
    """Compare sets of names, shapes and storage types."""
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
        odd = sorted({one.dtype for one in stored} - {"F32", "BF16", "F16"})
        if odd:
            not_compared[name] = f"stored as {', '.join(odd)}"
        elif not all(name in one.aliases for one in checkpoints):  # tied everywhere: counted once
            common.append(name)
    missing = tuple(tuple(name for name in names if name not in one.tensors) for one in checkpoints)
    return HeaderDifferences(missing, shapes, dtypes, tuple(common), not_compared)


@dataclass(slots=True)
class TaskVectors:
    """Sums over the task vectors τ_k = θ_k - θ₀ of some tensors; K models.

    Attributes:
        gram: [K][K] dot products.
        n_zero: [K] entries of τ_k that are 0.
        n_tied: [K] entries whose magnitude equals the threshold at `TIE_DENSITY`.
        n_conflict: entries where one task vector is positive and another negative.
        n_elements: entries of one task vector.
    """

    gram: list[list[float]]
    n_zero: list[int]
    n_tied: list[int]
    n_conflict: int
    n_elements: int

    @property
    def norms(self) -> list[float]:
        return [math.sqrt(self.gram[k][k]) for k in range(len(self.gram))]

    def cosine(self, j: int, k: int) -> float:
        """NaN where one of the norms is zero, since no angle is defined."""
        length = math.sqrt(self.gram[j][j] * self.gram[k][k])
        if length == 0.0:
            return math.nan
        cosine = self.gram[j][k] / length
        return cosine if math.isnan(cosine) else max(-1.0, min(1.0, cosine))

    def share(self, count: int) -> float:
        return count / self.n_elements if self.n_elements else 0.0

    def as_json(self) -> dict[str, Any]:
        models = range(len(self.gram))
        cosines = [[self.cosine(j, k) for k in models] for j in models]
        return {
            "n_elements": self.n_elements,
            "norms": [_number(norm) for norm in self.norms],
            "cosines": [[_number(cosine) for cosine in row] for row in cosines],
            "sign_conflict": self.share(self.n_conflict),
            "sparsity": [self.share(n) for n in self.n_zero],
            "tie_mass": [self.share(n) for n in self.n_tied],
        }


def together(parts: Sequence[TaskVectors]) -> TaskVectors:
    """Several tensors as if they were one vector; sums are rounded once."""
    models = range(len(parts[0].gram))
    return TaskVectors(
        gram=[[_sum([part.gram[j][k] for part in parts]) for k in models] for j in models],
        n_zero=[sum(part.n_zero[k] for part in parts) for k in models],
        n_tied=[sum(part.n_tied[k] for part in parts) for k in models],
        n_conflict=sum(part.n_conflict for part in parts),
        n_elements=sum(part.n_elements for part in parts),
    )


def by_layer(tensors: dict[str, TaskVectors]) -> dict[str, TaskVectors]:
    """Tensors of one layer together; a layer is the name up to its first number, or its first component."""
    layers: dict[str, list[TaskVectors]] = {}
    for name, row in tensors.items():
        layers.setdefault(layer_of(name), []).append(row)
    return {name: together(rows) for name, rows in layers.items()}


def layer_of(name: str) -> str:
    """ "model.layers.3" for "model.layers.3.mlp.up_proj.weight", "lm_head" for "lm_head.weight"."""
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return ".".join(parts[: index + 1])
    return parts[0]


def task_vectors(
    checkpoints: Sequence[Checkpoint],
    names: Iterable[str],
    *,
    read: Callable[[int], None] = lambda n_bytes: None,
) -> dict[str, TaskVectors]:
    """Measure tensors one after the other; the first checkpoint is the base.

    Args:
        names: that all checkpoints have, in one shape and floating-point.
        read: told how many bytes were read; called from several threads.

    Raises:
        CheckpointError: a file ends early, because it changed after its header was read.

    Notes:
        Memory: the largest tensor, once per checkpoint. Every byte is read once from the files.
    """
    wanted = list(names)
    largest = max((one.tensors[name].n_bytes for one in checkpoints for name in wanted), default=0)
    found = {}
    with ThreadPoolExecutor(len(checkpoints)) as pool, _Files() as files:
        buffers = [mmap.mmap(-1, max(largest, 1)) for _ in checkpoints]
        for name in wanted:
            stored = [one.tensors[name] for one in checkpoints]
            jobs = [pool.submit(files.read, *job, read) for job in zip(stored, buffers, strict=True)]
            for job in jobs:
                job.result()
            views = [_view(*pair) for pair in zip(stored, buffers, strict=True)]
            found[name] = _measured(name, views)
    return found


@dataclass(slots=True)
class _Files:
    """Open files by path, closed together."""

    opened: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self.opened.values():
            os.close(descriptor)

    def read(self, stored: Stored, buffer: mmap.mmap, told: Callable[[int], None]) -> None:
        """The bytes of one tensor to the start of a buffer."""
        if stored.pieces:
            raise CheckpointError(
                f"{stored.path}: tensor {stored.name!r} is in {len(stored.pieces)} pieces; expected one. To "
                "compare this checkpoint, merge it by passthrough into safetensors first."
            )
        if stored.path not in self.opened:
            self.opened[stored.path] = os.open(stored.path, os.O_RDONLY | os.O_CLOEXEC)
        done = 0
        with memoryview(buffer) as whole:
            while done < stored.n_bytes:
                with whole[done : min(done + _PIECE, stored.n_bytes)] as piece:
                    n = os.preadv(self.opened[stored.path], [piece], stored.offset + done)
                if n == 0:
                    raise CheckpointError(
                        f"{stored.path}: tensor {stored.name!r} ends after {done} of {stored.n_bytes} bytes; "
                        "the file became shorter while it was read. Restore it and try again."
                    )
                done += n
                told(n)


def _view(stored: Stored, buffer: mmap.mmap) -> View:
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    return tvfast.program.View(address, stored.n_elements, tvfast.program.DType[stored.dtype], buffer)


def _measured(name: str, views: Sequence[View]) -> TaskVectors:
    base, models = views[0], tuple(views[1:])
    program = tvfast.program
    k = len(models)
    n = base.n_elements
    if n == 0:
        return TaskVectors([[0.0] * k for _ in range(k)], [0] * k, [0] * k, 0, 0)
    table = program.WorkTable([program.Entry(name=name, models=models, base=base)], k)
    backend = backend_for(table)
    scalars = [program.TensorScalars(models=[program.ModelScalars() for _ in models])]
    moments = backend.measure(table, program.Program(), scalars, _WANTS)[0]
    rank = max(1, int(TIE_DENSITY * n))
    queries = [program.RankQuery(0, model, rank) for model in range(k)]
    thresholds = backend.thresholds(table, program.Keep.BAND, queries)
    return TaskVectors(
        gram=moments.gram,
        n_zero=[n - nonzero for nonzero in moments.n_nonzero],
        n_tied=[one.n_equal for one in thresholds],
        n_conflict=moments.n_conflict,
        n_elements=n,
    )


def _sum(values: list[float]) -> float:
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
