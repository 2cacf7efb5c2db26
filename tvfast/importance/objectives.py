"""What is differentiated: one number per sample, from what the caller's function returns."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from tvfast.errors import ArgumentError, ShapeError

KINDS = MappingProxyType({"weight": "product", "delta": "delta", "fisher": "square"})
"""Kinds of statistics, and what `tvfast.ops.score` calls them."""


@dataclass(frozen=True, slots=True)
class FisherReading:
    """One reading of the diagonal Fisher.

    Attributes:
        needs_logits: the function returns logits, not losses.
        chunk: samples whose gradients are summed before they are squared; 0: all of a batch.
        meaning: for the statistics file.
    """

    needs_logits: bool
    chunk: int
    meaning: str


FISHERS = MappingProxyType(
    {
        "mats": FisherReading(False, 1, "empirical: squared gradient of the loss of each sample"),
        "mats_true": FisherReading(True, 1, "squared gradient of log p(y|x), y drawn from the model"),
        "matena_raffel": FisherReading(True, 1, "sum over all labels of p(y|x) (d log p(y|x))^2"),
        "mergelm": FisherReading(
            True, 0, "squared gradient of the sum over batch and labels of sqrt(p) log p, sqrt(p) fixed"
        ),
    }
)
"""By source: MaTS with given and with drawn labels, Matena & Raffel 2021, MergeLM."""


def objectives(
    found: object, reading: FisherReading | None, name: str, seed: int, first: int
) -> Iterator[Tensor]:
    """The objectives of one batch, each [N]; gradients are taken of one after the other.

    Args:
        found: what the caller's function returned: losses [N] or one number, or logits [N, ..., C].
        reading: of the Fisher; None: losses.
        name: of the reading.
        seed: of drawn labels, which depend on it and on the index of the sample only.
        first: index of the batch's first sample among all.

    Raises:
        ArgumentError: no tensor, or one without a gradient.
        ShapeError: another shape.
    """
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise ArgumentError(
            f"loss_fn returned a {type(found).__name__}; expected a float tensor: the loss of each sample."
        )
    if reading is None or not reading.needs_logits:
        if found.dim() > 1:
            raise ShapeError(
                f"loss_fn returned shape {list(found.shape)}; expected [N], one loss per sample, or one "
                "number for a batch that counts as one sample. Sum over tokens, not over samples."
            )
        yield found.reshape(-1)
        return
    if found.dim() < 2 or (found.dim() > 2 and name == "matena_raffel"):
        expected = "[N, C]" if name == "matena_raffel" else "[N, ..., C]"
        raise ShapeError(
            f"loss_fn returned shape {list(found.shape)}; fisher={name!r} reads logits {expected}."
        )
    logp = torch.log_softmax(found.float() if found.dtype != torch.float64 else found, dim=-1)
    root = logp.detach().mul(0.5).exp()
    if name == "matena_raffel":
        for label in range(logp.shape[-1]):
            yield root[:, label] * logp[:, label]
    elif name == "mats_true":
        labels = _drawn(logp.detach(), seed, first)
        yield logp.gather(-1, labels.unsqueeze(-1)).reshape(len(logp), -1).sum(1)
    else:
        yield (root * logp).reshape(len(logp), -1).sum(1)


def generator_of(seed: int, sample: int) -> torch.Generator:
    """Random numbers of one sample, whatever batch it is in."""
    digest = hashlib.blake2b(f"{seed}\0{sample}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))  # reads 32 bits


def _drawn(logp: Tensor, seed: int, first: int) -> Tensor:
    """A label for every position, from the model's own distribution."""
    drawn = torch.empty(logp.shape[:-1], dtype=torch.float64)
    for n in range(len(logp)):
        generator = generator_of(seed, first + n)
        drawn[n] = torch.rand(logp.shape[1:-1], dtype=torch.float64, generator=generator)
    cumulated = logp.double().exp().cumsum(-1).cpu()
    drawn = (drawn * cumulated[..., -1]).unsqueeze(-1)
    return torch.searchsorted(cumulated, drawn).squeeze(-1).clamp(max=logp.shape[-1] - 1).to(logp.device)
