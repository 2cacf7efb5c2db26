"""Sums of outer products in float64: dense, in diagonal blocks, on the diagonal, or as a square root."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tvfast.curvature.probes import mix
from tvfast.errors import ArgumentError
from tvfast.factors.forms import block_shapes, pack

ROWS = 4096
"""Rows of one product in float32, so that its rounding does not grow with the batch."""

FORMS = ("dense", "block", "root")


@dataclass(frozen=True)
class Form:
    """How factors are held.

    Attributes:
        name: one of `FORMS`.
        block: side of diagonal blocks.
        rank: columns of a square root, at most; rows beyond it are sampled.
    """

    name: str = "dense"
    block: int = 64
    rank: int = 1024

    def __post_init__(self) -> None:
        if self.name not in FORMS:
            raise ArgumentError(f"form is {self.name!r}; expected one of {', '.join(FORMS)}.")
        for name in ("block", "rank"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name} is {value!r}; expected a positive integer.")


class Sum(ABC):
    """Σ r rᵀ over rows r [n]."""

    form: str
    size: int

    @abstractmethod
    def add(self, rows: Tensor, scale: float, keys: Tensor) -> None:
        """Add scale · Σ r rᵀ.

        Args:
            rows: [T, n], float32 or float64.
            keys: [T] int64, distinct: what samples rows where not all are kept.
        """

    @abstractmethod
    def stored(self) -> Tensor:
        """What a file holds: packed triangles, a diagonal, or L [n, S]."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Float64 tensors from which `restore` goes on with the same bits."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the state of an earlier run."""


class DenseSum(Sum):
    form = "dense"

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.total = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, rows: Tensor, scale: float, keys: Tensor) -> None:
        for part in torch.split(rows, ROWS):
            self.total.add_(part.T @ part, alpha=scale)

    def stored(self) -> Tensor:
        return pack(self.total.cpu())

    def state(self) -> dict[str, Tensor]:
        return {"total": self.total}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.total.copy_(state["total"])


class BlockSum(Sum):
    form = "block"

    def __init__(self, size: int, block: int, device: torch.device) -> None:
        self.size = size
        whole, rest = block_shapes(size, block)
        self.whole = torch.zeros(whole, dtype=torch.float64, device=device)
        self.rest = torch.zeros(rest, dtype=torch.float64, device=device)

    def add(self, rows: Tensor, scale: float, keys: Tensor) -> None:
        n_whole, b = self.whole.shape[:2]
        for part in torch.split(rows, ROWS):
            split = part[:, : n_whole * b].reshape(-1, n_whole, b).transpose(0, 1)
            last = part[:, n_whole * b :]
            self.whole.add_(split.mT @ split, alpha=scale)
            self.rest.add_(last.T @ last, alpha=scale)

    def stored(self) -> Tensor:
        return torch.cat([pack(self.whole.cpu()).flatten(), pack(self.rest.cpu())])

    def state(self) -> dict[str, Tensor]:
        return {"whole": self.whole, "rest": self.rest}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.whole.copy_(state["whole"])
        self.rest.copy_(state["rest"])


class DiagonalSum(Sum):
    """Of rows that are unit vectors: how often each of n was seen."""

    form = "diagonal"

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.total = torch.zeros(size, dtype=torch.float64, device=device)

    def add(self, rows: Tensor, scale: float, keys: Tensor) -> None:
        self.total.add_(rows.double().square().sum(0), alpha=scale)

    def add_indices(self, indices: Tensor, weights: Tensor) -> None:
        """Unit vectors by the position of their one, each times √weight."""
        self.total.index_add_(0, indices, weights.double())

    def stored(self) -> Tensor:
        return self.total.cpu()

    def state(self) -> dict[str, Tensor]:
        return {"total": self.total}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.total.copy_(state["total"])


class RootSum(Sum):
    """The rows themselves; of more than `rank` those whose hashed keys are smallest, scaled up: unbiased."""

    form = "root"

    def __init__(self, size: int, rank: int, seed: int, device: torch.device) -> None:
        self.size = size
        self.rank = rank
        self._salt = mix(seed, size) >> 1
        self.rows = torch.zeros(0, size, dtype=torch.float64, device=device)
        self.priorities = torch.zeros(0, dtype=torch.int64, device=device)
        self.n_seen = 0

    def add(self, rows: Tensor, scale: float, keys: Tensor) -> None:
        self.n_seen += rows.shape[0]
        priorities = _hash52(keys ^ self._salt)
        if len(self.priorities) == self.rank:
            near = priorities < self.priorities[-1]
            rows, priorities = rows[near], priorities[near]
        found = torch.cat([self.priorities, priorities])
        order = found.argsort(stable=True)[: self.rank]
        self.rows = torch.cat([self.rows, rows.double() * scale**0.5])[order]
        self.priorities = found[order]

    def stored(self) -> Tensor:
        kept = len(self.rows)
        stretched: Tensor = self.rows.T * (self.n_seen / max(kept, 1)) ** 0.5
        return stretched.cpu().contiguous()

    def state(self) -> dict[str, Tensor]:
        seen = torch.tensor([self.n_seen], dtype=torch.float64)
        return {"rows": self.rows, "priorities": self.priorities.double(), "seen": seen}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.rows = state["rows"].to(self.rows.device)
        self.priorities = state["priorities"].to(self.priorities.device, torch.int64)
        self.n_seen = int(state["seen"])


def _hash52(keys: Tensor) -> Tensor:
    """Int64 keys to 52 mixed bits, which float64 holds."""
    x = keys * -0x61C8864680B583EB  # wraps around, as does the rest
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    mixed: Tensor = (x ^ (x >> 31)) & ((1 << 52) - 1)
    return mixed


def make_sum(size: int, form: Form, seed: int, device: torch.device) -> Sum:
    """An empty sum of the form; a block as large as the matrix is dense."""
    if form.name == "root":
        return RootSum(size, form.rank, seed, device)
    if form.name == "block" and form.block < size:
        return BlockSum(size, form.block, device)
    return DenseSum(size, device)


def sum_bytes(size: int, form: Form) -> int:
    """Memory of a sum, bytes."""
    if form.name == "root":
        return 8 * form.rank * (size + 1)
    if form.name == "block" and form.block < size:
        return 8 * size * form.block
    return 8 * size * size
