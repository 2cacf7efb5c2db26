"""What hooks on a module add to its sums: inputs in the forward pass, gradients in the backward pass."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tvfast.curvature.sites import EMBEDDING, LINEAR, NORM, Site, normalised
from tvfast.curvature.sums import DiagonalSum, Form, Sum, make_sum, sum_bytes
from tvfast.errors import ArgumentError
from tvfast.factors.records import BLOCK, DRAWS, KFAC, SAMPLES, TOKEN_DRAWS, TOKENS
from tvfast.statistics import Array, Record, Shared
from tvfast.statistics.tensors import array_of


@dataclass(frozen=True)
class Convention:
    """How tokens and samples enter a factor.

    Attributes:
        a_over_tokens, b_over_tokens: each sample's sum over its R tokens is divided by R.
        a_count, b_count: what the whole sum is divided by; b_count None: no B.
        bias: whether A has a column for a bias, where the layer has one.
        kinds: of modules that are collected.
        source: whose reading.
    """

    a_over_tokens: bool
    b_over_tokens: bool
    a_count: str
    b_count: str | None
    bias: bool
    kinds: tuple[str, ...]
    source: str


CONVENTIONS = {
    "tak": Convention(
        True, True, SAMPLES, DRAWS, True, (LINEAR, NORM), "Porrello et al. 2026, arXiv:2602.17385, their code"
    ),
    "kfac_expand": Convention(
        True, False, SAMPLES, DRAWS, True, (LINEAR, NORM), "Eschenhagen et al. 2023, arXiv:2311.00636"
    ),
    "mats": Convention(
        False, False, TOKENS, TOKEN_DRAWS, False, (LINEAR,), "Tam et al. 2023, arXiv:2312.04339, their code"
    ),
    "regmean": Convention(False, False, TOKENS, None, False, (LINEAR,), "Jin et al. 2023, arXiv:2212.09849"),
}
"""By name, as a caller chooses."""


@dataclass
class Step:
    """Where a collection is: what hooks need to know of the batch at hand.

    Attributes:
        first: number of the batch's first sample in the whole data.
        masks: of real tokens, [N, R] each, bool; empty: all are.
        probe: number of the backward pass.
        active: hooks count.
    """

    n_samples: int = 0
    first: int = 0
    masks: Sequence[Tensor] = ()
    batch_first: bool = True
    probe: int = 0
    n_draws: int = 1
    active: bool = False


@dataclass(frozen=True, eq=False)
class Tokens:
    """A layer's rows of one call.

    Attributes:
        rows: [T, n], masked ones left out, float32 or float64.
        sample: [T], which sample of the batch; None where the layer does not see whole samples.
        keys: [T], distinct over the whole data.
        over_tokens: 1 / R for all rows, or [T]; None where the layer does not see whole samples.
    """

    rows: Tensor
    sample: Tensor | None
    keys: Tensor
    over_tokens: float | Tensor | None


def tokens_of(x: Tensor, step: Step, where: str) -> Tokens:
    """Activations or gradients as rows.

    Args:
        x: [N, ..., n], or [R, N, n] where the step says so.

    Raises:
        ArgumentError: a mask fits neither this layer nor another.
    """
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    n = step.n_samples
    if wide.dim() >= 3 and wide.shape[1] == n and (wide.shape[0] != n or not step.batch_first):
        wide = wide.transpose(0, 1)
    rows = wide.reshape(-1, wide.shape[-1])
    number = torch.arange(len(rows), device=x.device)
    if len(rows) % n:
        return Tokens(rows, None, (step.first << 24) + number, None)
    n_tokens = len(rows) // n
    sample = number // n_tokens
    keys = ((step.first + sample) << 24) + number % n_tokens
    if n_tokens == 1 or not step.masks:
        return Tokens(rows, sample, keys, 1.0 / n_tokens)
    mask = next((m for m in step.masks if m.shape[1] == n_tokens), None)
    if mask is None:
        raise ArgumentError(
            f"{where}: the layer sees {n_tokens} tokens per sample, the masks have "
            f"{', '.join(str(m.shape[1]) for m in step.masks)}; expected a mask of [N, {n_tokens}]. Pass "
            "mask= a function that returns one for every length, or None."
        )
    kept = mask.to(x.device).reshape(-1)
    per_sample = mask.to(x.device).sum(1).clamp_min(1).double()
    return Tokens(rows[kept], sample[kept], keys[kept], (1.0 / per_sample)[sample[kept]].to(rows.dtype))


@dataclass(eq=False)
class Tracker:
    """The sums of one site.

    Attributes:
        bias: whether A has a column for the bias.
        leader: whose A this site shares; None: its own.
    """

    site: Site
    convention: Convention
    form: Form
    bias: bool
    step: Step
    leader: Tracker | None = None
    sums: dict[str, Sum] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    seen: tuple[weakref.ref[Tensor], int] | None = None
    _input: Tensor | None = None
    _called: bool = False

    @property
    def name(self) -> str:
        return self.site.weight

    @property
    def n_a(self) -> int:
        """Side of A."""
        return self.site.n_in + self.bias

    @property
    def n_bytes(self) -> int:
        """Memory of the sums."""
        site = self.site
        if site.kind == NORM:
            return sum_bytes(site.n_out, self.form) * (1 + (site.bias is not None))
        b = sum_bytes(site.n_out, self.form) if self.convention.b_count else 0
        if site.kind == EMBEDDING:
            return 8 * site.n_in + b
        return b + (0 if self.leader else sum_bytes(self.n_a, self.form))

    def open(self, seed: int) -> None:
        """Allocate the sums."""
        site, device = self.site, self.site.module.weight.device
        assert isinstance(device, torch.device)
        self.counts = dict.fromkeys((SAMPLES, TOKENS, DRAWS, TOKEN_DRAWS), 0)
        if site.kind == NORM:
            for role in ("weight", "bias")[: 1 + (site.bias is not None)]:
                self.sums[role] = make_sum(site.n_out, self.form, seed, device)
            return
        if site.kind == EMBEDDING:
            self.sums["A"] = DiagonalSum(site.n_in, device)
        elif self.leader is None:
            self.sums["A"] = make_sum(self.n_a, self.form, seed, device)
        if self.convention.b_count:
            self.sums["B"] = make_sum(site.n_out, self.form, seed + 1, device)

    # -- the forward pass ---------------------------------------------------------------------------

    def forward(self, x: Tensor) -> None:
        """The input of a call."""
        if not self._called:
            self.counts[SAMPLES] += self.step.n_samples
            self.counts[DRAWS] += self.step.n_samples * self.step.n_draws
            self._called = True
        elif self.site.kind == NORM:
            raise ArgumentError(
                f"{self.name}: the norm is used twice in one forward pass; expected once. Exclude it."
            )
        if self.site.kind == NORM:
            self._input = x.detach()
            return
        if self.site.kind == EMBEDDING:
            self._count(self._indices(x))
            return
        self.seen = weakref.ref(x), x._version
        tokens = self._tokens(x)
        self._count(len(tokens.rows))
        if self.leader is None:
            if self.bias:
                ones = tokens.rows.new_ones(len(tokens.rows), 1)
                tokens = Tokens(
                    torch.cat([tokens.rows, ones], 1), tokens.sample, tokens.keys, tokens.over_tokens
                )
            self._add("A", tokens, self.convention.a_over_tokens)
        elif not self.leader.saw(x):
            raise ArgumentError(
                f"{self.name}: its input is not that of {self.leader.name}, as it was in the first batch; "
                "expected layers that always share it. Pass share=False."
            )

    def saw(self, x: Tensor) -> bool:
        """Whether the last input is this very tensor."""
        return self.seen is not None and self.seen[0]() is x and self.seen[1] == x._version

    def _tokens(self, x: Tensor) -> Tokens:
        tokens = tokens_of(x, self.step, self.name)
        needs_samples = self.convention.a_over_tokens or self.convention.b_over_tokens
        if tokens.sample is None and needs_samples:
            raise ArgumentError(
                f"{self.name}: got {len(tokens.rows)} rows for {self.step.n_samples} samples, so the tokens "
                "of a sample are not known; expected a multiple. Use convention='mats', or exclude the "
                "layer."
            )
        return tokens

    def _indices(self, indices: Tensor) -> int:
        """Count the rows of an embedding that were looked up."""
        as_rows = tokens_of(indices[..., None], self.step, self.name)
        over = as_rows.over_tokens if self.convention.a_over_tokens else 1.0
        ones = torch.ones(len(as_rows.rows), dtype=torch.float64, device=indices.device)
        weights = ones * (1.0 if over is None else over)
        total = self.sums["A"]
        assert isinstance(total, DiagonalSum)
        total.add_indices(as_rows.rows[:, 0].long(), weights)
        return len(as_rows.rows)

    def _count(self, n_tokens: int) -> None:
        self.counts[TOKENS] += n_tokens
        self.counts[TOKEN_DRAWS] += n_tokens * self.step.n_draws

    def _add(self, role: str, tokens: Tokens, over_tokens: bool) -> None:
        rows, scale = tokens.rows, 1.0
        if over_tokens and isinstance(tokens.over_tokens, Tensor):
            rows = rows * tokens.over_tokens.sqrt()[:, None]
        elif over_tokens and tokens.over_tokens is not None:
            scale = float(tokens.over_tokens)
        self.sums[role].add(rows, scale, tokens.keys ^ (self.step.probe << 56))

    # -- the backward pass --------------------------------------------------------------------------

    def backward(self, e: Tensor) -> None:
        """The gradient at the output of a call."""
        if self.site.kind != NORM:
            self._add("B", self._tokens(e), self.convention.b_over_tokens)
            return
        assert self._input is not None
        gradient = tokens_of(e, self.step, self.name)
        inputs = tokens_of(normalised(self.site.module, self._input), self.step, self.name)
        if gradient.sample is None:
            raise ArgumentError(f"{self.name}: the tokens of a sample are not known; exclude the norm.")
        for role, rows in (("weight", gradient.rows * inputs.rows), ("bias", gradient.rows)):
            if role in self.sums:
                summed = rows.new_zeros(self.step.n_samples, rows.shape[1])
                summed.index_add_(0, gradient.sample, rows)
                keys = torch.arange(self.step.n_samples, device=e.device) + self.step.first
                self.sums[role].add(summed, 1.0, keys ^ (self.step.probe << 56))

    def end_batch(self) -> None:
        """Forget the batch."""
        self._input, self._called, self.seen = None, False, None

    # -- results ------------------------------------------------------------------------------------

    @property
    def reached(self) -> bool:
        """Whether any data came by."""
        return self.counts.get(TOKENS, 0) > 0 or (self.site.kind == NORM and self.counts.get(SAMPLES, 0) > 0)

    def records(self, storage: str) -> list[Record]:
        """The sums as records."""
        site = self.site
        if site.kind == NORM:
            names = {"weight": site.weight, "bias": site.bias or ""}
            return [
                vector_record(names[role], site.shape, found, self.counts, storage)
                for role, found in self.sums.items()
            ]
        tensors: dict[str, Array | Shared] = {}
        options: dict[str, object] = {"transposed": site.transposed, "bias": site.bias if self.bias else None}
        if self.leader is not None:
            tensors["A"] = Shared(self.leader.name, self.convention.a_count)
            options["A"] = describe_sum(self.leader.sums["A"], self.form)
        for role, found in self.sums.items():
            count = self.convention.a_count if role == "A" else self.convention.b_count
            tensors[role] = _array(found, f"parameter {self.name!r}: {role}", storage, str(count))
            options[role] = describe_sum(found, self.form)
        return [Record(site.weight, KFAC, site.shape, tensors, dict(self.counts), options)]


def vector_record(
    name: str, shape: tuple[int, ...], found: Sum, counts: dict[str, int], storage: str
) -> Record:
    """The full block of a vector of parameters."""
    tensors = {"F": _array(found, f"parameter {name!r}: F", storage, DRAWS)}
    options = {"F": describe_sum(found, None)}
    return Record(name, BLOCK, shape, tensors, dict(counts), options)


def describe_sum(found: Sum, form: Form | None) -> dict[str, object]:
    """How the sums of a role are stored."""
    said: dict[str, object] = {"form": found.form, "size": found.size}
    if found.form == "block":
        said["block"] = found.whole.shape[-1]  # type: ignore[attr-defined]
    return said


def _array(found: Sum, where: str, storage: str, count: str) -> Array:
    concatenate = 1 if found.form == "root" else None
    return array_of(found.stored(), where, dtype=storage, count=count, concatenate=concatenate)


def group(trackers: Sequence[Tracker], n_bytes: float) -> list[list[Tracker]]:
    """Neighbours together as long as their sums fit; layers that share A stay together."""
    groups: list[list[Tracker]] = []
    used = math.inf
    for leader in trackers:
        if leader.leader is not None:
            continue
        family = [leader, *(t for t in trackers if t.leader is leader)]
        size = sum(t.n_bytes for t in family)
        if used + size > n_bytes or not groups:
            groups.append([])
            used = 0
        groups[-1] += family
        used += size
    return groups
