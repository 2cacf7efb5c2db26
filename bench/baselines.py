"""What a merge costs in stock torch: the formulas as usually written, and as fast as torch lets them be.

Every TIES here is trim at density, elect by unweighted mass (zero votes plus), mean over those who agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_CHUNK = 2**18  # 1 MiB of float32 per scratch row: in the second-level cache of current server cores


def n_kept(density: float, n_elements: int) -> int:
    """Entries that a trim keeps: truncated."""
    return int(density * n_elements)


def task_arithmetic_float32(base: Tensor, models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """θ₀ + Σ_k w_k (θ_k - θ₀) on whole float32 copies, rounded once."""
    origin = base.float()
    merged = origin.clone()
    for model, weight in zip(models, weights, strict=True):
        merged.add_(model.float().sub_(origin), alpha=weight)
    return merged.to(base.dtype)


def task_arithmetic_bfloat16(base: Tensor, models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The same in the storage type: half the memory, and a rounding at every step."""
    merged = base.clone()
    for model, weight in zip(models, weights, strict=True):
        merged.add_(model - base, alpha=weight)
    return merged


def ties_kthvalue(base: Tensor, models: Sequence[Tensor], density: float) -> Tensor:
    """TIES on whole float32 copies; the threshold is torch.kthvalue, and entries equal to it are kept."""
    origin = base.float()
    taus = torch.stack([model.float().sub_(origin) for model in models])
    n = base.numel()
    for tau in taus:
        magnitude = tau.abs()
        threshold = torch.kthvalue(magnitude.view(-1), n - n_kept(density, n) + 1).values
        tau.mul_(magnitude >= threshold)
    sign = torch.where(taus.sum(0) >= 0, 1.0, -1.0)
    agree = taus * sign > 0
    merged = (taus * agree).sum(0).div_(agree.sum(0).clamp_(min=1))
    return merged.add_(origin).to(base.dtype)


def ties_argsort(base: Tensor, models: Sequence[Tensor], density: float) -> Tensor:
    """TIES as mergekit runs it in bfloat16: the mask is scattered from a full argsort of the magnitudes."""
    n = base.numel()
    taus = torch.empty((len(models), *base.shape), dtype=base.dtype, device=base.device)
    for tau, model in zip(taus, models, strict=True):
        torch.sub(model, base, out=tau)
        order = torch.argsort(tau.abs().view(-1).float(), descending=True)
        mask = torch.zeros(n, dtype=tau.dtype, device=tau.device)
        mask[order[: n_kept(density, n)]] = 1
        tau.mul_(mask.view_as(tau))
    elected = (taus.sum(0) >= 0).to(taus.dtype) * 2 - 1
    agree = taus.sign() == elected
    n_agree = agree.to(taus.dtype).sum(0)
    n_agree[n_agree == 0] = 1
    return base + (taus * agree).sum(0) / n_agree


@dataclass(slots=True)
class Chunked:
    """Merges in chunks that stay in cache, all scratch allocated and touched beforehand.

    The strongest form that stock torch and NumPy allow: no page faults, no pass over memory but the necessary
    ones, and NumPy's vectorised quickselect instead of torch's.
    """

    n_elements: int
    n_models: int
    _origin: Tensor = field(init=False, repr=False)
    _total: Tensor = field(init=False, repr=False)
    _scratch: Tensor = field(init=False, repr=False)
    _taus: Tensor = field(init=False, repr=False)
    _signed: Tensor = field(init=False, repr=False)
    _agree: Tensor = field(init=False, repr=False)
    _magnitudes: Tensor | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        chunk = min(_CHUNK, self.n_elements)
        self._origin, self._total, self._scratch = (torch.zeros(chunk) for _ in range(3))
        self._taus, self._signed = (torch.zeros(self.n_models, chunk) for _ in range(2))
        self._agree = torch.zeros(self.n_models, chunk, dtype=torch.bool)

    def task_arithmetic(
        self, base: Tensor, models: Sequence[Tensor], weights: Sequence[float], out: Tensor
    ) -> None:
        """Write θ₀ + Σ_k w_k (θ_k - θ₀), float32 arithmetic, to `out`."""
        flat_base, flat_out, flat = base.view(-1), out.view(-1), [m.view(-1) for m in models]
        for place, n in self._places():
            origin, total, tau = self._origin[:n], self._total[:n], self._scratch[:n]
            origin.copy_(flat_base[place])
            total.copy_(origin)
            for model, weight in zip(flat, weights, strict=True):
                torch.sub(tau.copy_(model[place]), origin, out=tau)
                total.add_(tau, alpha=weight)
            flat_out[place].copy_(total)

    def thresholds(self, base: Tensor, models: Sequence[Tensor], density: float) -> list[float]:
        """[K] the magnitude of the last entry that a trim keeps, by `ndarray.partition` in place."""
        if self._magnitudes is None:
            self._magnitudes = torch.zeros(self.n_elements)
        flat_base, magnitudes = base.view(-1), self._magnitudes
        array = magnitudes.numpy()
        first = self.n_elements - n_kept(density, self.n_elements)
        found = []
        for model in models:
            flat = model.view(-1)
            for place, n in self._places():
                origin, tau = self._origin[:n], self._scratch[:n]
                torch.sub(tau.copy_(flat[place]), origin.copy_(flat_base[place]), out=tau)
                torch.abs(tau, out=magnitudes[place])
            array.partition(first)
            found.append(float(array[first]))
        return found

    def ties(self, base: Tensor, models: Sequence[Tensor], density: float, out: Tensor) -> None:
        """Write TIES, entries equal to a threshold kept, float32 arithmetic, to `out`."""
        thresholds = self.thresholds(base, models, density)
        flat_base, flat_out, flat = base.view(-1), out.view(-1), [m.view(-1) for m in models]
        for place, n in self._places():
            origin, total, scratch = self._origin[:n], self._total[:n], self._scratch[:n]
            taus, signed, agree = self._taus[:, :n], self._signed[:, :n], self._agree[:, :n]
            origin.copy_(flat_base[place])
            for tau, model, threshold in zip(taus, flat, thresholds, strict=True):
                torch.sub(tau.copy_(model[place]), origin, out=tau)
                tau.mul_(torch.abs(tau, out=scratch) >= threshold)
            torch.sum(taus, 0, out=total)
            torch.mul(taus, torch.where(total >= 0, 1.0, -1.0), out=signed)
            torch.gt(signed, 0, out=agree)
            torch.sum(torch.mul(taus, agree, out=signed), 0, out=total)
            torch.sum(agree, 0, dtype=torch.float32, out=scratch)
            total.div_(scratch.clamp_(min=1)).add_(origin)
            flat_out[place].copy_(total)

    def _places(self) -> list[tuple[slice, int]]:
        step = self._origin.numel()
        ends = [min(begin + step, self.n_elements) for begin in range(0, self.n_elements, step)]
        return [(slice(begin, end), end - begin) for begin, end in zip([0, *ends], ends, strict=False)]
