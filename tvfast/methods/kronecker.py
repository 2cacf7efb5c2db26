"""Merges that weigh models by their curvature: RegMean, MaTS, and MaTS with a ridge towards the base.

They minimise Σ_k w_k (θ - θ_k)ᵀ C_k (θ - θ_k) layer by layer, C_k = B_k (x) A_k for a matrix and F_k for a
vector, from statistics of each model. What has no factors is averaged, and reported.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from tvfast.errors import ArgumentError
from tvfast.methods.base import (
    ProgramMethod,
    TensorJob,
    TensorMethod,
    TensorResult,
    parameter,
    register_method,
)
from tvfast.methods.linear import Linear
from tvfast.methods.task_arithmetic import TaskArithmetic

if TYPE_CHECKING:
    from torch import Tensor

    from tvfast.factors.records import Curvature

T = TypeVar("T")

KFAC, BLOCK = "kfac", "block"

BATCH_ELEMENTS = 2**22
"""Layers of one shape are solved together up to so many elements of factors: small ones are all overhead."""


@dataclass(frozen=True, kw_only=True)
class _Curved(TensorMethod):
    """What the three share."""

    statistics = (KFAC, BLOCK)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None:
            given = self.weights if isinstance(self.weights, tuple) else (self.weights,)
            if any(weight < 0 for weight in given) or not any(given):
                raise ArgumentError(
                    f"method {self.info.name!r}: weights are {self.weights}; expected numbers of 0 or more, "
                    "one of them positive."
                )

    def _check_count(self, name: str) -> None:
        """Normalise an integer that may come as a float, as numbers of a recipe do."""
        self._normalise(name, finite=True, per_model=False)
        value = getattr(self, name)
        if value < 1 or value != int(value):
            raise ArgumentError(f"method {self.info.name!r}: {name} is {value}; expected a positive integer.")
        object.__setattr__(self, name, int(value))

    def _check_at_least_0(self, name: str) -> None:
        self._normalise(name, finite=True, per_model=False)
        if getattr(self, name) < 0:
            raise ArgumentError(
                f"method {self.info.name!r}: {name} is {getattr(self, name)}; expected a number of 0 or more."
            )

    def fallback(
        self, shape: Sequence[int], kinds: Sequence[str | None], n_models: int
    ) -> tuple[ProgramMethod, str] | None:
        found = set(kinds)
        if found == {KFAC} or (found == {BLOCK} and self._takes_blocks):
            return None
        if found == {BLOCK}:
            reason = "vectors"
        elif found == {None}:
            reason = "no factors" if len(shape) > 1 else "vectors without factors"
        else:
            reason = "no factors of some of the models"
        return self._average(n_models), reason

    @property
    def _takes_blocks(self) -> bool:
        return True

    def _average(self, n_models: int) -> ProgramMethod:
        return Linear(weights=self.per_model("weights", n_models), scale=self.scale)

    def scratch_bytes(self, shape: Sequence[int], n_models: int, n_entries: int) -> int:
        """Factors as float32 squares, as the equations take them, and in float64 should that be needed; ten
        of one model's besides: their sum, its Cholesky factor and its eigenvectors; copies of the tensor."""
        n_elements = math.prod(shape)
        return 4 * (5 * n_entries + 10 * n_entries // n_models + n_elements * (n_models + 12))


def _coefficients(method: _Curved, job: TensorJob) -> tuple[float, ...]:
    return method.per_model("weights", len(job.models))


def _mean(job: TensorJob, coefficients: Sequence[float]) -> Tensor:
    """The weighted mean of the models, at least float32."""
    import torch

    wide = torch.promote_types(job.models[0].dtype, torch.float32)
    total = torch.zeros_like(job.models[0], dtype=wide)
    for model, c in zip(job.models, coefficients, strict=True):
        total.add_(model, alpha=c)
    return total.div_(sum(coefficients))


@register_method("regmean", source="Jin et al. 2023, arXiv:2212.09849", needs_base=False, dialects=("paper",))
@dataclass(frozen=True, kw_only=True)
class RegMean(_Curved):
    """θ = λ (Σ_k w_k W_k Ĝ_k) (Σ_k w_k Ĝ_k)⁻¹, Ĝ_k the second moment of inputs, off-diagonals · shrink."""

    shrink: float = parameter(0.95, "multiplies the off-diagonals of G_k; 1 is none; in [0, 1]")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_fractions("shrink")

    @property
    def _takes_blocks(self) -> bool:
        return False

    def merge(self, jobs: Sequence[TensorJob]) -> list[TensorResult]:
        from tvfast.factors.merges import regmean

        results = []
        for job in jobs:
            found = [one.without_bias() for one in _present(job)]
            c = _coefficients(self, job)
            solved = regmean(
                [one.matrix(w) for one, w in zip(found, job.models, strict=True)],
                [_needed(one.a, job) for one in found],
                start=found[0].matrix(_mean(job, c)),
                coefficients=c,
                shrink=self.shrink,
                where=f"tensor {job.name!r}",
            )
            results.append(_result(job, solved.x * self.scale, solved.note))
        return results


@dataclass(frozen=True, kw_only=True)
class _Solved(_Curved):
    """MaTS with and without a ridge."""

    shrink: float = parameter(1.0, "multiplies the off-diagonals of A_k and B_k; 1 is none; in [0, 1]")
    iterations: int = parameter(100, "of conjugate gradients, at most")
    tolerance: float = parameter(1e-5, "relative residual at which they stop")
    preconditioned: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_fractions("shrink")
        self._check_count("iterations")
        self._check_at_least_0("tolerance")
        self._check_flag("preconditioned")

    @property
    def _ridge(self) -> float:
        return 0.0

    def _start(self, job: TensorJob) -> Tensor:
        return _mean(job, _coefficients(self, job))

    def _finished(self, job: TensorJob, x: Tensor) -> Tensor:
        return x * self.scale

    def merge(self, jobs: Sequence[TensorJob]) -> list[TensorResult]:
        from tvfast.factors.merges import mats, mats_batch, vector

        results: dict[int, TensorResult] = {}
        for indices in _alike(jobs):
            some = [jobs[index] for index in indices]
            curvature = [[one.without_bias() for one in _present(job)] for job in some]
            first, c = curvature[0][0], _coefficients(self, some[0])
            starts = [found[0].matrix(self._start(job)) for job, found in zip(some, curvature, strict=True)]
            weights = [
                [one.matrix(w) for one, w in zip(found, job.models, strict=True)]
                for job, found in zip(some, curvature, strict=True)
            ]
            where = f"tensor {some[0].name!r}" + (f" and {len(some) - 1} like it" if len(some) > 1 else "")
            common = {"coefficients": c, "shrink": self.shrink, "ridge": self._ridge, "where": where}
            limits = {
                "iterations": self.iterations,
                "tolerance": self.tolerance,
                "preconditioned": self.preconditioned,
            }
            if first.block is not None:
                blocks = [_needed(one.block, some[0]) for one in curvature[0]]
                solved = vector(weights[0], blocks, start=starts[0], **common)  # type: ignore[arg-type]
            elif len(some) == 1:
                a = [_needed(one.a, some[0]) for one in curvature[0]]
                b = [one.b for one in curvature[0]]
                solved = mats(weights[0], a, b, start=starts[0], **common, **limits)  # type: ignore[arg-type]
            else:
                a_batch = [[_needed(one.a, some[0]) for one in found] for found in curvature]
                b_batch = [[_needed(one.b, some[0]) for one in found] for found in curvature]
                solved = mats_batch(weights, a_batch, b_batch, starts=starts, **common, **limits)  # type: ignore[arg-type]
            found_x = solved.x if len(some) > 1 else solved.x[None]
            for index, job, x in zip(indices, some, found_x, strict=True):
                merged = _result(job, x, solved.note)
                results[index] = TensorResult(self._finished(job, merged.tensor), merged.note)
        return [results[index] for index in range(len(jobs))]


@register_method(
    "mats", source="Tam, Bansal and Raffel 2023, arXiv:2312.04339", needs_base=False, dialects=("paper",)
)
@dataclass(frozen=True, kw_only=True)
class Mats(_Solved):
    """θ = λ W, Σ_k w_k B_k W A_k = Σ_k w_k B_k W_k A_k, by conjugate gradients from the mean."""

    preconditioned: bool = parameter(
        False, "solve to the tolerance; False: as its authors, who leave what little curvature says"
    )


@register_method("kfac", source="MaTS (arXiv:2312.04339) with a ridge, which is ours", dialects=("paper",))
@dataclass(frozen=True, kw_only=True)
class Kfac(_Solved):
    """θ = θ₀ + λ (W - θ₀), Σ_k w_k B_k (W - W_k) A_k + ρ (W - θ₀) = 0: MaTS, ridge towards the base."""

    preconditioned: bool = parameter(True, "False: plain conjugate gradients")
    ridge: float = parameter(0.01, "ρ, in mean eigenvalues of Σ_k w_k B_k (x) A_k; 0 or more")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_at_least_0("ridge")

    @property
    def _ridge(self) -> float:
        return self.ridge

    def _average(self, n_models: int) -> ProgramMethod:
        weights = self.per_model("weights", n_models)
        return TaskArithmetic(weights=tuple(w / sum(weights) for w in weights), scale=self.scale)

    def _start(self, job: TensorJob) -> Tensor:
        assert job.base is not None
        return job.base

    def _finished(self, job: TensorJob, x: Tensor) -> Tensor:
        assert job.base is not None
        base = job.base.to(x.dtype)
        return x if self.scale == 1.0 else base + (x - base) * self.scale


def _present(job: TensorJob) -> list[Curvature]:
    return [one for one in job.curvature if one is not None]


def _needed(factor: T | None, job: TensorJob) -> T:
    if factor is None:
        raise ArgumentError(
            f"tensor {job.name!r}: a model's statistics have no such factor, another's have; expected "
            "statistics of one convention. Collect all models alike."
        )
    return factor


def _result(job: TensorJob, x: Tensor, note: str) -> TensorResult:
    """X as the tensor is."""
    one = _present(job)[0]
    tensor = x.T if one.transposed else x
    return TensorResult(tensor.reshape(one.shape), f"{job.name}: {note}" if note else "")


def _alike(jobs: Sequence[TensorJob]) -> Iterator[list[int]]:
    """Jobs that are solved together: dense factors of one shape, up to `BATCH_ELEMENTS`."""
    from tvfast.factors.forms import Dense

    waiting: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, job in enumerate(jobs):
        found = _present(job)
        dense = all(isinstance(one.a, Dense) and isinstance(one.b, Dense) for one in found)
        size = sum(part.numel() for one in found for f in one.factors for part in f.parts())
        if not dense or 2 * size > BATCH_ELEMENTS:
            yield [index]
            continue
        key = found[0].n_in, found[0].n_out, job.models[0].device, job.models[0].dtype
        waiting[key].append(index)
        if (len(waiting[key]) + 1) * size > BATCH_ELEMENTS:
            yield waiting.pop(key)
    yield from waiting.values()
