"""Where the elements of a local shard lie in the whole tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive elements of a shard whose places in the whole tensor follow one rule.

    Element i has the global index offset + i // run * run_step + i % run; offset + i if run is 0.
    """

    start: int  # within the shard
    n_elements: int
    offset: int
    run: int = 0
    run_step: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank holds of one tensor.

    Attributes:
        shape: of the whole tensor.
        pieces: of the local shard, in its order; none if it is empty.
        whole: every rank holds all of it.
        counted: this rank speaks for these elements; among replicas, and terms of a sum, the first does.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    whole: bool
    counted: bool

    @property
    def n_elements(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape)


def is_shard(placement: Any) -> TypeGuard[Shard | _StridedShard]:
    """Whether a placement splits a tensor dimension."""
    return isinstance(placement, Shard | _StridedShard)


def part_of(tensor: Tensor, first_rank: int, rank: int) -> Part:
    """The part of a tensor that this rank holds.

    Args:
        tensor: a DTensor whose mesh has this rank, or a plain tensor, which every rank holds.
        first_rank: of the ranks that merge together; it speaks for what all of them hold.
        rank: this one.
    """
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Part(shape, _pieces(shape, _everything(shape)), True, rank == first_rank)
    mesh = tensor.device_mesh
    coordinates = tuple(mesh.get_coordinate() or ())
    steps = tuple(
        (placement.dim % len(shape), n, at, getattr(placement, "split_factor", 1))
        for placement, n, at in zip(tensor.placements, mesh.shape, coordinates, strict=True)
        if is_shard(placement)
    )
    replicas = (
        at for placement, at in zip(tensor.placements, coordinates, strict=True) if not is_shard(placement)
    )
    return Part(
        shape,
        _split(shape, steps),
        all(n == 1 for _, n, _, _ in steps),
        not any(replicas) and first_rank in mesh.mesh,
    )


def local_slice(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Any]) -> Tensor:
    """The elements of a whole tensor that this rank has under placements on a mesh, contiguous."""
    coordinates = mesh.get_coordinate() or ()
    for placement, n, at in zip(placements, mesh.shape, coordinates, strict=True):
        if is_shard(placement):
            dim = placement.dim % whole.dim()
            index = _chunk(torch.arange(whole.shape[dim]), n, at, getattr(placement, "split_factor", 1))
            whole = whole.index_select(dim, index.to(whole.device))
    return whole.contiguous()


Interval = tuple[int, int]
"""First index and how many follow one another."""


def _everything(shape: Sequence[int]) -> tuple[tuple[Interval, ...], ...]:
    return tuple(((0, n),) for n in shape)


@cache
def _split(shape: tuple[int, ...], steps: tuple[tuple[int, int, int, int], ...]) -> tuple[Piece, ...]:
    """The pieces left by splits (dimension, into how many, which one, split factor), taken in turn."""
    indices = {dim: torch.arange(shape[dim]) for dim, *_ in steps}
    for dim, n, at, factor in steps:
        indices[dim] = _chunk(indices[dim], n, at, factor)
    held = list(_everything(shape))
    for dim, index in indices.items():
        held[dim] = tuple(_intervals(index))
    return _pieces(shape, tuple(held))


def _chunk(index: Tensor, n: int, at: int, split_factor: int) -> Tensor:
    """What chunk `at` of n is left of a dimension: as DTensor does it, strided shards too."""
    placement = Shard(0) if split_factor == 1 else _StridedShard(0, split_factor=split_factor)
    chunks, _ = placement._split_tensor(index, n, with_padding=False, contiguous=False)
    return chunks[at]


def _intervals(index: Tensor) -> Iterator[Interval]:
    """Runs of consecutive indices."""
    if index.numel() == 0:
        return
    ends = torch.nonzero(index[1:] != index[:-1] + 1).view(-1).tolist()
    starts = [0, *(end + 1 for end in ends)]
    for start, stop in zip(starts, [*starts[1:], index.numel()], strict=True):
        yield int(index[start]), stop - start


def _pieces(shape: Sequence[int], held: Sequence[Sequence[Interval]]) -> tuple[Piece, ...]:
    """The pieces of a product of intervals, one list for each dimension."""
    if not all(held):
        return ()
    if not shape:
        return (Piece(0, 1, 0),)
    if math.prod(shape) == 0:
        return ()
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    cut = [dim for dim, n in enumerate(shape) if tuple(held[dim]) != ((0, n),)]
    if not cut:
        return (Piece(0, math.prod(shape), 0),)
    inner = cut[-1]  # what follows it is contiguous
    # The dimensions from `outer` to the one before `inner` count up in equal steps.
    outer = cut[-2] if len(cut) > 1 else 0
    if len(held[inner]) > 1 or inner == 0:
        outer = inner
    ahead = [[start + i for start, n in held[dim] for i in range(n)] for dim in range(outer)]
    pieces: list[Piece] = []
    place = 0
    for before in product(*ahead):
        base = sum(index * strides[dim] for dim, index in enumerate(before))
        for first, n in held[outer]:
            if outer == inner:
                piece = Piece(place, n * strides[inner], base + first * strides[inner])
            else:
                start, width = held[inner][0]
                n_runs = n * math.prod(shape[outer + 1 : inner])
                piece = Piece(
                    place,
                    n_runs * width * strides[inner],
                    base + first * strides[outer] + start * strides[inner],
                    width * strides[inner] if n_runs > 1 else 0,
                    strides[inner - 1] if n_runs > 1 else 0,
                )
            pieces.append(piece)
            place += piece.n_elements
    return tuple(pieces)
