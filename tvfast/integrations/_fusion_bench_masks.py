"""EMR and TALL masks as FusionBench computes them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tvfast.integrations._chunks import flat_chunks
from tvfast.integrations._fusion_bench_leaves import Leaf, leaves
from tvfast.integrations._fusion_bench_models import negative_zeros_
from tvfast.integrations._patching import NotServed
from tvfast.integrations._tables import Merge, check_served, entry, number, scalars
from tvfast.methods.scalars import float32
from tvfast.ops._huge_pages import on_huge_pages
from tvfast.ops.raw import Wants
from tvfast.program import Members, Program, Reduce, Vote, ZeroSign

_UNIFIED = Program(vote=Vote.MASS, zero_sign=ZeroSign.MINUS, members=Members.STRICT, reduce=Reduce.MAX_ABS)


def emr_merge(
    task_vectors: list[Mapping[str, Tensor]],
) -> tuple[dict[str, Tensor], dict[str, list[Tensor]], Tensor]:
    """(largest entries of the elected sign, masks of those who agree, ratios of mean magnitudes)."""
    if not task_vectors:
        raise NotServed("no task vectors")
    found = leaves(task_vectors[0], task_vectors)  # left to the library where gradients are recorded
    with torch.no_grad():
        return _emr_merged(found, len(task_vectors))


def _emr_merged(
    found: Sequence[Leaf], n_models: int
) -> tuple[dict[str, Tensor], dict[str, list[Tensor]], Tensor]:
    if any(leaf.base.dtype != torch.float32 for leaf in found):
        raise NotServed("16 bits")
    unified = {leaf.name: on_huge_pages(torch.empty_like(leaf.base)) for leaf in found}
    entries = [entry(leaf.models, unified[leaf.name], name=leaf.name) for leaf in found]
    merge = Merge(entries, [scalars((1.0,) * n_models) for _ in found])
    merge.combine(_UNIFIED, finite=True)
    moments = merge.statistics.measure(Program(), merge.numbers, Wants.L1)
    masks: dict[str, list[Tensor]] = {}
    before, after = torch.zeros(n_models), torch.zeros(n_models)
    for leaf, sums in zip(found, moments, strict=True):
        out = unified[leaf.name]
        masks[leaf.name] = [
            torch.empty(out.shape, dtype=torch.bool, device=out.device) for _ in range(n_models)
        ]
        for model, (tensor, mask) in enumerate(zip(leaf.models, masks[leaf.name], strict=True)):
            kept = _agreeing(tensor, out, mask)
            before[model] += float32(sums.l1[model] / out.numel())
            after[model] += float32(kept / out.numel())
        negative_zeros_(out)  # where nothing was elected: 0 times a sign of -1
    return unified, masks, before / after


def _agreeing(tensor: Tensor, unified: Tensor, mask: Tensor) -> float:
    """Write which entries have the sign of the unified ones; the L1 norm of the unified ones there."""
    total = 0.0
    for part in flat_chunks(tensor.numel()):
        own, common = tensor.view(-1)[part], unified.view(-1)[part]
        agree = mask.view(-1)[part]
        torch.logical_and(torch.signbit(own) == torch.signbit(common), (own != 0) & (common != 0), out=agree)
        total += float((common.abs() * agree).sum(dtype=torch.float64))
    return total


@torch.no_grad()
def flat_task_masks(
    tv_flat_checks: Tensor,
    flat_ft: Tensor,
    flat_ptm: Tensor,
    tv: Tensor | None = None,
    tall_mask_lambda: float = 1.0,
) -> Tensor:
    """|θ₀ - θ_t| > λ |θ₀ + τ - θ_t| for the rows of all models."""
    if tv is None:
        raise NotServed("no multi-task vector")
    if flat_ft.dim() != 2 or flat_ft.shape != tv_flat_checks.shape:
        raise NotServed("fine-tuned models that are no matrix")
    rows = list(flat_ft)
    check_served([*rows, flat_ptm, tv])
    factor = number(tall_mask_lambda, "lambda")
    mask = torch.empty(flat_ft.shape, dtype=torch.bool, device=flat_ft.device)
    for part in flat_chunks(flat_ptm.numel()):
        base = flat_ptm[part]
        multi = base + tv[part]
        for row, own in zip(rows, mask, strict=True):
            own[part] = (base - row[part]).abs_() > (multi - row[part]).abs_().mul_(factor)
    return mask


@torch.no_grad()
def task_masks(
    multi_task_vector: Mapping[str, Tensor],
    ft_task_vector: Mapping[str, Tensor],
    pretrained_task_vector: Mapping[str, Tensor],
    tall_mask_lambda: float = 1.0,
) -> OrderedDict[str, Tensor]:
    """The same of state dicts, as float32 ones and zeros."""
    found = leaves(pretrained_task_vector, [multi_task_vector, ft_task_vector])
    factor = number(tall_mask_lambda, "lambda")
    masks = OrderedDict()
    for leaf in found:
        if leaf.base.dtype != torch.float32:
            raise NotServed("16 bits")
        masks[leaf.name] = on_huge_pages(torch.empty_like(leaf.base))
        base, multi, own = (tensor.view(-1) for tensor in (leaf.base, *leaf.models))
        for part in flat_chunks(base.numel()):
            kept = (base[part] - own[part]).abs_() > (multi[part] - own[part]).abs_().mul_(factor)
            masks[leaf.name].view(-1)[part] = kept
    return masks
