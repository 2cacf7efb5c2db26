"""sd-mecha's merge methods, behind its own streaming executor.

In float32 results have sd-mecha's bits for up to four models; what follows from norms over a tensor (slerp)
is exact here and a float32 sum there. Values that are not finite are left to sd-mecha. `weighted_sum` is one
`torch.lerp`, as fast as memory, and stays as it is.

Source: sd-mecha 1.1.8, `sd_mecha.extensions.builtin.merge_methods`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tvfast.integrations import _sd_mecha_ties as elected
from tvfast.integrations._chunks import flat_chunks, row_chunks
from tvfast.integrations._patching import Function, Hook, Integration, IntegrationModule, NotServed, same
from tvfast.integrations._tables import Merge, check_served, entry, number, scalars
from tvfast.methods.scalars import float32
from tvfast.ops._huge_pages import on_huge_pages
from tvfast.program import Program


def ties_sum(*models: Tensor, k: float = 1.0, vote_sgn: bool = False) -> Tensor:
    """Σ over the elected members of the trimmed deltas, divided by their number."""
    return elected.summed(elected.Trimmed.of(models, k, vote_sgn))


def ties_sum_extended(
    *models: Tensor,
    k: float = 0.2,
    vote_sgn: bool = False,
    apply_stock: bool = False,
    apply_median: bool = False,
    cos_eps: float = 1e-6,
    eps: float = 1e-6,
    maxiter: int = 100,
    ftol: float = 1e-20,
) -> Tensor:
    """`ties_sum`, multiplied by Model Stock's factor of each row unless `apply_stock`, as sd-mecha has it."""
    if apply_median:
        raise NotServed("a geometric median")
    trimmed = elected.Trimmed.of(models, k, vote_sgn)
    if apply_stock:
        return elected.summed(trimmed)
    return elected.stocked(trimmed, number(cos_eps, "cos_eps"))


def _with_dropout(original: Function) -> Function:
    def ties_sum_with_dropout(
        *deltas: Tensor,
        probability: Any = 0.9,
        della_eps: float = 0.0,
        rescale: bool = True,
        k: float = 0.2,
        vote_sgn: bool = False,
        apply_stock: bool = False,
        cos_eps: float = 1e-6,
        apply_median: bool = False,
        eps: float = 1e-6,
        maxiter: int = 100,
        ftol: float = 1e-20,
        seed: int | None = None,
    ) -> Tensor:
        if apply_median:
            raise NotServed("a geometric median")
        if INTEGRATION.rng == "peer":
            raise NotServed("sd-mecha's own draws")
        kept = _kept_share(probability)
        trimmed = elected.Trimmed.of_dropped(deltas, k, vote_sgn, kept, number(della_eps, "della_eps"), seed)
        out = elected.summed(trimmed) if apply_stock else elected.stocked(trimmed, number(cos_eps, "cos_eps"))
        return out.div_(kept) if rescale else out

    return ties_sum_with_dropout


def _kept_share(probability: Any) -> float:
    """1 - probability, in the precision in which sd-mecha subtracts."""
    kept = 1.0 - probability
    if isinstance(probability, Tensor):
        if probability.numel() != 1 or (probability.requires_grad and torch.is_grad_enabled()):
            raise NotServed("a probability for every entry")
        kept = kept.item()
    found = number(kept, "probability")
    if not 0.0 < found <= 1.0 or math.isclose(1.0 - found, 1.0):
        raise NotServed("everything is dropped")
    return found


def n_average(*models: Any, **kwargs: Any) -> Tensor:
    """The running mean by `torch.lerp`, in parts that stay in the cache."""
    if len(models) < 2:
        raise NotServed("fewer than two models")
    tensors = [model[kwargs["key"]] for model in models]
    check_served(tensors)
    out = on_huge_pages(torch.empty_like(tensors[0]))
    with torch.no_grad():
        for part in flat_chunks(out.numel()):
            mean = out.view(-1)[part]
            mean.copy_(tensors[0].view(-1)[part])
            for i, tensor in enumerate(tensors[1:], start=2):
                mean.lerp_(tensor.view(-1)[part], 1 / i)
    return out


def slerp(a: Tensor, b: Tensor, alpha: Any = 0.5) -> Tensor:
    """Directions on the arc between two tensors, at the length between theirs."""
    check_served([a, b])
    if isinstance(alpha, Tensor):
        if alpha.numel() != 1 or alpha.requires_grad:
            raise NotServed("an alpha for every entry")
        alpha = alpha.item()
    share = number(alpha, "alpha")
    out = on_huge_pages(torch.empty_like(a))
    merge = Merge([entry((a, b), out)], [scalars((1.0, 1.0))])
    gram = merge.statistics.gram(Program(), merge.numbers)[0]
    lengths = [float32(math.sqrt(gram[k][k])) for k in range(2)]
    if a.dtype != torch.float32 or not all(length > 0.0 for length in lengths):
        raise NotServed("no direction, or 16 bits")
    cosine = max(-1.0, min(1.0, gram[0][1] / lengths[0] / lengths[1]))
    angle = float32(math.acos(cosine))
    if math.isnan(angle) or math.sin(angle) == 0.0:
        raise NotServed("parallel tensors")
    first, second = float32(math.sin((1.0 - share) * angle)), float32(math.sin(share * angle))
    sine = float32(math.sin(angle))
    length = torch.lerp(torch.tensor(lengths[0]), torch.tensor(lengths[1]), torch.tensor(share)).item()
    with torch.no_grad():
        for part in flat_chunks(out.numel()):
            mixed = (a.view(-1)[part] / lengths[0]).mul_(first)
            mixed.add_((b.view(-1)[part] / lengths[1]).mul_(second)).div_(sine).mul_(length)
            out.view(-1)[part] = mixed
    return out


def model_stock(*deltas: Tensor, cos_eps: float = 1e-6) -> Tensor:
    """The mean, multiplied by Model Stock's factor of each row."""
    if len(deltas) < 2:
        raise NotServed("fewer than two models")
    check_served(deltas)
    out = on_huge_pages(torch.empty_like(deltas[0]))
    with torch.no_grad():
        for rows in row_chunks(out):
            parts = [elected.as_rows(delta)[rows] for delta in deltas]
            mean = torch.as_tensor(sum(parts)) / len(parts)
            share = elected.stock_share(parts, cos_eps)
            elected.as_rows(out)[rows] = torch.nan_to_num(share * mean)
    return out


_METHODS = "sd_mecha.extensions.builtin.merge_methods"


def _hooks(version: str) -> list[Hook]:
    ties: Sequence[Function] = (ties_sum, ties_sum_extended, model_stock)
    linear: Sequence[Function] = (n_average, slerp)
    dropout = "ties_sum_with_dropout"
    return [
        *(Hook(f.__name__, f"{_METHODS}.ties", f"{f.__name__}.__wrapped__", same(f)) for f in ties),
        Hook(dropout, f"{_METHODS}.ties", f"{dropout}.__wrapped__", _with_dropout),
        *(Hook(f.__name__, f"{_METHODS}.linear", f"{f.__name__}.__wrapped__", same(f)) for f in linear),
    ]


INTEGRATION = Integration("sd-mecha", "sd_mecha", ("1.1.8",), _hooks)
install = INTEGRATION.install
uninstall = INTEGRATION.uninstall
stats = INTEGRATION.stats
fallbacks = INTEGRATION.fallbacks
sys.modules[__name__].__class__ = IntegrationModule
