"""`localize`: one task vector for all tasks, and for each task a mask of a bit per entry and one factor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tvfast._leaves import Leaf, Weights, match, model_list, named_tensors
from tvfast.errors import ArgumentError, ShapeError, StateDictError
from tvfast.methods.base import PerModel, check_name, numbers
from tvfast.ops import combine
from tvfast.ops._planes import pack, unpack
from tvfast.program import Members, Program, Reduce, Vote, ZeroSign

KINDS = ("emr", "tall")
RESCALES = ("tensors", "entries")

_ELECTED_MAXIMUM = Program(
    vote=Vote.MASS, zero_sign=ZeroSign.MINUS, members=Members.STRICT, reduce=Reduce.MAX_ABS
)


@dataclass(frozen=True, slots=True)
class Localized:
    """What `localize` found.

    Attributes:
        kind: "emr" or "tall".
        task_vector: by name, in float32, or float64 where an input is.
        masks: by name, a plane of 64-bit words for every task, lowest bit first.
        factors: of every task.
        aliases: names of tensors that share memory with another, by whose name they are found above.
    """

    kind: str
    task_vector: Mapping[str, Tensor]
    masks: Mapping[str, tuple[Tensor, ...]]
    factors: tuple[float, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def mask(self, name: str, task: int) -> Tensor:
        """Which entries of a tensor belong to a task; bool, in its shape.

        Raises:
            ArgumentError: there is no such tensor or task.
        """
        task = self._checked(task)
        name = self.aliases.get(name, name)
        if name not in self.task_vector:
            raise ArgumentError(f"there is no tensor {name!r}; expected one that was localized.")
        shared = self.task_vector[name]
        bits = torch.empty(shared.numel(), dtype=torch.bool, device=shared.device)
        unpack(self.masks[name][task], bits)
        return bits.view(shared.shape)

    def model(self, base: Weights, task: int) -> dict[str, Tensor]:
        """θ₀ + factor · mask ∘ τ of one task, by name, in the base's types; what is not localized stays.

        Args:
            base: what was localized, or tensors of these names and shapes.

        Raises:
            ArgumentError: there is no such task.
            StateDictError, ShapeError: the base lacks a tensor, or has it in another shape.
        """
        task = self._checked(task)
        merged = named_tensors(base, "base")
        for name, shared in self.task_vector.items():
            if name not in merged:
                raise StateDictError(
                    f"base lacks the tensor {name!r}; expected the names that were localized."
                )
            start = merged[name].detach()
            if start.shape != shared.shape:
                raise ShapeError(
                    f"tensor {name!r}: base has shape {list(start.shape)}, the task vector has "
                    f"{list(shared.shape)}; expected equal ones."
                )
            own = torch.where(self.mask(name, task), shared, 0.0) * self.factors[task]
            merged[name] = (start.to(shared.dtype) + own).to(start.dtype)
        for alias, name in self.aliases.items():
            merged[alias] = merged[name]
        return merged

    def _checked(self, task: int) -> int:
        if not isinstance(task, int) or not 0 <= task < len(self.factors):
            raise ArgumentError(f"task is {task!r}; expected 0 to {len(self.factors) - 1}.")
        return task


def localize(
    base: Weights,
    models: Iterable[Weights],
    kind: str = "emr",
    *,
    threshold: PerModel = 0.4,
    rescale: str = "tensors",
) -> Localized:
    """Compress fine-tunes of one base: a shared task vector, and a bit per entry for every task.

    "emr": the shared vector has at every entry the sign of Σ_t τ_t (0 counts as negative) and the largest
    magnitude among the τ_t of that sign; a task's mask is where its τ_t has that sign, its factor restores
    its mean magnitude. "tall": the shared vector is Σ_t τ_t, a task's mask is where
    |τ_t| > threshold · |Σ τ - τ_t|, its factor is 1.

    Args:
        base: tensor, list or dict of tensors, or module.
        models: T of the same names and shapes.
        threshold: of "tall": one, or one per model, 0 or more; the authors choose 0.2 to 0.6 on data.
        rescale: of "emr": factors from the sum of mean magnitudes over "tensors", or from all "entries".

    Raises:
        UnknownNameError: no such kind or rescale.
        ArgumentError: no model, a threshold that is negative, or not one per model.
        StateDictError, ShapeError, DTypeError, DeviceError, LayoutError: models do not fit the base.

    Notes:
        T + 1 tensors of one name are in float32 at a time. NaN belongs to no mask, counts in no factor and
        stays in the shared vector.

    Source: Huang et al. 2024, arXiv:2405.17461 (EMR); Wang et al. 2024, arXiv:2405.07813 (TALL).
    """
    check_name("kind", kind, KINDS, "localize")
    check_name("rescale", rescale, RESCALES, "localize")
    found = model_list(models)
    if not found:
        raise ArgumentError("models is empty; expected at least one.")
    thresholds = _per_model(threshold, len(found))
    task_vector: dict[str, Tensor] = {}
    masks: dict[str, tuple[Tensor, ...]] = {}
    aliases: dict[str, str] = {}
    own = [0.0] * len(found)
    shared = [0.0] * len(found)
    for leaf in match(base, found):
        taus = _task_vectors(leaf)
        one = _elected(taus) if kind == "emr" else torch.stack(taus).sum(dim=0)
        planes = []
        for t, tau in enumerate(taus):
            if kind == "emr":
                mask = (tau.sign() == one.sign()) & (one != 0) & ~one.isnan()  # the sign of NaN is 0
                by = float(max(1, one.numel())) if rescale == "tensors" else 1.0
                own[t] += float(tau.abs().nansum(dtype=torch.float64)) / by
                shared[t] += float(torch.where(mask, one.abs(), 0.0).sum(dtype=torch.float64)) / by
            else:
                mask = tau.abs() > thresholds[t] * (one - tau).abs()
            planes.append(pack(mask.contiguous()))
        task_vector[leaf.name], masks[leaf.name] = one, tuple(planes)
        aliases |= dict.fromkeys(leaf.aliases, leaf.name)
    factors = [1.0 if kind == "tall" or s == 0.0 else o / s for o, s in zip(own, shared, strict=True)]
    return Localized(kind, task_vector, masks, tuple(factors), aliases)


def _per_model(threshold: PerModel, n_models: int) -> tuple[float, ...]:
    value = numbers("threshold", threshold)
    values = value if isinstance(value, tuple) else (value,) * n_models
    if len(values) != n_models or not all(math.isfinite(v) and v >= 0 for v in values):
        raise ArgumentError(
            f"threshold is {threshold!r} for {n_models} models; expected a number of 0 or more, or one per "
            "model."
        )
    return values


def _task_vectors(leaf: Leaf) -> list[Tensor]:
    wide = torch.float64 if leaf.float64 else torch.float32
    start = leaf.base.detach().to(wide)
    return [model.detach().to(wide) - start for model in leaf.models]


def _elected(taus: list[Tensor]) -> Tensor:
    """The entry of largest magnitude among those of the elected sign."""
    if taus[0].dtype is torch.float32 and taus[0].numel():
        return combine(None, taus, _ELECTED_MAXIMUM)
    stacked = torch.stack(taus)
    sign = torch.where(stacked.sum(dim=0) > 0, 1.0, -1.0).to(stacked.dtype)
    return torch.where(stacked * sign > 0, stacked.abs(), 0.0).amax(dim=0) * sign
