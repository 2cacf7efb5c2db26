"""peft's merge functions, and `add_weighted_adapter` through them.

Results have peft's bits in float32, for up to four adapters and wherever the k largest entries are decided;
bfloat16 and float16 adapters give float32, as in peft. What is pruned is 0 here and `x * 0` there, so calls
with values that are not finite are left to peft. Among entries that tie at the threshold the first ones by
index are kept; peft leaves the choice to `torch.topk`.

Source: peft 0.21.2, `peft.utils.merge_utils` and `peft.tuners.lora.model`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tvfast.integrations import _peft_svd as svd
from tvfast.integrations._patching import Hook, Integration, IntegrationModule, NotServed, same
from tvfast.integrations._tables import (
    Merge,
    check_served,
    entry,
    from_positive_zero,
    number,
    random_keys,
    scalars,
)
from tvfast.methods.scalars import draw_limit, float32
from tvfast.ops import combine
from tvfast.ops._huge_pages import on_huge_pages
from tvfast.program import Divisor, Gain, Keep, Members, Program, Tie, Vote

SMALLEST_PHILOX = 1 << 12
"""Entries from which on draws are Philox's. Fewer are peft's own, which cost nothing then: what a caller has
tuned to a seed, as tests of small models are, stays as it is."""

_VOTES = {"total": Vote.MASS, "frequency": Vote.COUNT}
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, slots=True)
class _Call:
    """The checked operands of one merge."""

    tensors: Sequence[Tensor]
    weights: list[float]
    merge: Merge
    out: Tensor

    @staticmethod
    def of(task_tensors: Any, weights: Any) -> _Call:
        if not isinstance(task_tensors, list | tuple):
            raise NotServed("task tensors are no list")
        check_served(task_tensors)
        first = task_tensors[0]
        own = _weights(weights, len(task_tensors), first)
        out = on_huge_pages(torch.empty(first.shape, dtype=torch.float32, device=first.device))
        return _Call(task_tensors, own, Merge([entry(task_tensors, out)], [scalars(own)]), out)

    def trim(self, density: float) -> Keep:
        """Magnitude pruning: exactly int(density * n) entries of each."""
        if density >= 1:
            self._warn(density)
            return Keep.ALL
        n = self.tensors[0].numel()
        if int(density * n) == 0:
            raise NotServed("nothing is kept")
        self.merge.trim(lambda _, n: int(density * n), Tie.INDEX)
        return Keep.BAND

    def drop(self, density: float) -> tuple[Keep, list[Tensor] | None]:
        """Random pruning; with peft's own draws, one mask for each."""
        if density >= 1:
            self._warn(density)
            return Keep.ALL, None
        if density == 0:
            raise NotServed("nothing is kept")
        self.merge.check_finite()
        whole = self.tensors[0].dtype == torch.float32
        if INTEGRATION.rng == "peer" and not whole:
            raise NotServed("peft's draws in 16 bits")
        models = self.merge.numbers[0].models
        for model in models:
            model.prob = float32(density)
        if INTEGRATION.rng == "peer" or (whole and self.tensors[0].numel() < SMALLEST_PHILOX):
            return Keep.MASK, [
                torch.bernoulli(torch.full_like(tensor, density)).to(torch.bool) for tensor in self.tensors
            ]
        for model, key in zip(models, random_keys("peft", len(models)), strict=True):
            model.key, model.limit = key, draw_limit(density)
        return Keep.RANDOM, None

    def run(self, program: Program, masks: list[Tensor] | None = None) -> Tensor:
        if masks is None:
            self.merge.combine(program, finite=program.keep is Keep.BAND)
        else:
            n_threads = self.merge.statistics.n_threads
            numbers = self.merge.numbers[0]
            combine(
                None, self.tensors, program, numbers, masks=masks, row=0, out=self.out, n_threads=n_threads
            )
        return self.out

    def _warn(self, density: float) -> None:
        for _ in self.tensors:
            warnings.warn(
                f"The density {density} is greater than or equal to 1, no pruning will be performed.",
                stacklevel=2,
            )


def _weights(weights: Any, n_models: int, like: Tensor) -> list[float]:
    """One float per model; those that make torch's result something else than float32 are not served."""
    if not isinstance(weights, Tensor) or weights.shape != (n_models,) or weights.device != like.device:
        raise NotServed("weights are no vector of one per task tensor")
    whole = weights.dtype in _INTEGERS and like.dtype == torch.float32
    if (weights.dtype != torch.float32 and not whole) or weights.requires_grad:
        raise NotServed(f"weights of dtype {str(weights.dtype).removeprefix('torch.')}")
    found = [float(weight) for weight in weights.to(torch.float32).tolist()]
    return [number(weight, "a weight") for weight in found]


def _density(density: Any) -> float:
    found = number(density, "density")
    if found < 0:
        raise NotServed("a negative density")
    return found


def _vote(majority_sign_method: str) -> Vote:
    if majority_sign_method not in _VOTES:
        raise NotServed("an unknown majority sign method")
    return _VOTES[majority_sign_method]


def _voting(task_tensors: list[Tensor], weights: Tensor, density: float, method: str) -> tuple[_Call, float]:
    """The call and its density; peft makes NaN of an infinity that is voted out."""
    call, share = _Call.of(task_tensors, weights), _density(density)
    _vote(method)
    if share >= 1:
        call.merge.check_finite()
    return call, share


def _elected(call: _Call, keep: Keep, method: str, gain: Gain, masks: list[Tensor] | None) -> Tensor:
    """The weighted members of the elected sign, divided by how many they are."""
    program = Program(
        keep=keep,
        tie=Tie.INDEX,
        gain=gain,
        vote=_vote(method),
        members=Members.STRICT,
        divisor=Divisor.COUNT,
    )
    return from_positive_zero(call.run(program, masks), call.weights)


def _summed(call: _Call, program: Program, masks: list[Tensor] | None = None) -> Tensor:
    return call.run(program, masks).add_(0.0)  # a sum of nothing but -0 is +0 in torch


def task_arithmetic(task_tensors: list[Tensor], weights: Tensor) -> Tensor:
    """Σ_k w_k τ_k."""
    return _summed(_Call.of(task_tensors, weights), Program())


def magnitude_prune(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """Σ_k w_k trim(τ_k)."""
    call, share = _Call.of(task_tensors, weights), _density(density)
    return _summed(call, Program(keep=call.trim(share), tie=Tie.INDEX))


def ties(
    task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total"
) -> Tensor:
    """Σ w_k trim(τ_k) over the models of the elected sign, divided by their number."""
    call, share = _voting(task_tensors, weights, density, majority_sign_method)
    return _elected(call, call.trim(share), majority_sign_method, Gain.MODEL, None)


def dare_linear(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """Σ_k w_k (m_k ∘ τ_k) / density, m_k ~ Bernoulli(density)."""
    call, share = _Call.of(task_tensors, weights), _density(density)
    keep, masks = call.drop(share)
    return _summed(call, Program(keep=keep, gain=Gain.INVERSE_PROBABILITY), masks)


def dare_ties(
    task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total"
) -> Tensor:
    """As `ties`, with (m_k ∘ τ_k) / density for the trimmed task vectors."""
    call, share = _voting(task_tensors, weights, density, majority_sign_method)
    keep, masks = call.drop(share)
    return _elected(call, keep, majority_sign_method, Gain.INVERSE_PROBABILITY, masks)


_MERGES = "peft.utils.merge_utils"
_LORA = "peft.tuners.lora.model"


def _hooks(version: str) -> list[Hook]:
    functions = (task_arithmetic, magnitude_prune, ties, dare_linear, dare_ties)
    merges = [Hook(f.__name__, _MERGES, f.__name__, same(f)) for f in functions]
    adapter = "LoraModel._svd_generalized_task_arithmetic_weighted_adapter"
    return [
        *merges,
        Hook("svd", _LORA, adapter, svd.weighted_adapter),
        Hook("add_weighted_adapter", _LORA, "LoraModel.add_weighted_adapter", svd.without_gradients),
    ]


INTEGRATION = Integration("peft", "peft", ("0.21.2",), _hooks)
install = INTEGRATION.install
uninstall = INTEGRATION.uninstall
stats = INTEGRATION.stats
fallbacks = INTEGRATION.fallbacks
sys.modules[__name__].__class__ = IntegrationModule
