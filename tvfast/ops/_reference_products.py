"""`score` and `kron` of the reference backend: torch in any float dtype, in panels of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tvfast.factored import BlockDiagonal, FactoredScore, KroneckerProduct, Operand, ProductPanel
from tvfast.ops import _reference_stages as stages
from tvfast.ops._exact_sum_torch import BinnedSum
from tvfast.program import Entry, TensorScalars, View, WorkTable

_PANEL = 1 << 20  # elements of a matrix that are processed at a time


def _matrix(view: View, n_rows: int, n_columns: int) -> Tensor:
    owner: Tensor = view.owner
    return owner.detach().view(n_rows, n_columns)


class ReferenceProducts:
    """The product verbs of the reference; `n_threads` is not read: torch has its own setting."""

    dtype: torch.dtype

    def why_not_products(self, work: Sequence[Operand]) -> str | None:
        """A reason if some view has no torch tensor as owner, or devices differ."""
        for operand in work:
            devices = set()
            for role, view in operand.views():
                if not isinstance(view.owner, Tensor):
                    return f"tensor {operand.name!r}: {role} has no torch tensor as owner"
                devices.add(str(view.owner.device))
            if len(devices) > 1:
                return f"tensor {operand.name!r} lies on several devices: {', '.join(sorted(devices))}"
        return None

    def score(self, table: WorkTable, scalars: Sequence[TensorScalars], n_threads: int = 0) -> None:
        """|score_k * d_k| * weight_k, models in order, one rounding per operation."""
        for entry, own in zip(table.entries, scalars, strict=True):
            self._score(entry, [model.weight for model in own.models])

    def _score(self, entry: Entry, weights: Sequence[float]) -> None:
        assert entry.out is not None
        n = entry.n_elements
        out = _matrix(entry.out, 1, n)[0]
        base = None if entry.base is None else _matrix(entry.base, 1, n)[0]
        for start in range(0, n, _PANEL):
            part = slice(start, start + _PANEL)
            total = out[part].to(self.dtype)
            for model, score, weight in zip(entry.models, entry.scores, weights, strict=True):
                tau = _matrix(model, 1, n)[0][part].to(self.dtype)
                if base is not None:
                    tau = tau - base[part].to(self.dtype)
                share = torch.tensor(weight, dtype=torch.float32).to(self.dtype)
                total = total + (_matrix(score, 1, n)[0][part].to(self.dtype) * tau).abs() * share
            stages.write(out[part], total)

    def score_factored(self, scores: Sequence[FactoredScore], n_threads: int = 0) -> None:
        """Samples in order; a sample's gradient is torch's matrix product."""
        for score in scores:
            for rows in _parts(score.n_out, max(1, _PANEL // max(1, score.n_in))):
                self._score_rows(score, rows)

    def _score_rows(self, score: FactoredScore, rows: slice) -> None:
        out = _matrix(score.out, score.n_out, score.n_in)[rows]
        total = out.to(self.dtype)
        tau = None
        if score.model is not None:
            tau = _matrix(score.model, score.n_out, score.n_in)[rows].to(self.dtype)
            if score.base is not None:
                tau = tau - _matrix(score.base, score.n_out, score.n_in)[rows].to(self.dtype)
        for sample in score.samples:
            if sample.n_tokens == 0:
                continue
            e = _matrix(sample.gradients, sample.n_tokens, score.n_out)[:, rows].to(self.dtype)
            a = _matrix(sample.activations, sample.n_tokens, score.n_activations).to(self.dtype)
            if score.bias_column:
                a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
            gradient = e.T @ a
            share = torch.tensor(sample.weight, dtype=torch.float32).to(self.dtype)
            total = total + (gradient * (gradient if tau is None else tau)).abs() * share
        stages.write(out.view(-1), total.reshape(-1))

    def kron(self, products: Sequence[KroneckerProduct], n_threads: int = 0) -> list[float]:
        """Blocks by torch's matrix products, rows of one block of B at a time."""
        return [self._kron(product) for product in products]

    def _kron(self, product: KroneckerProduct) -> float:
        x = _matrix(product.x, product.n_out, product.n_in)
        right = list(_blocks(product.a, self.dtype))
        total = BinnedSum()
        for number, left in enumerate(_blocks(product.b, self.dtype)):
            rows = product.b.span(number)
            panel = x[rows].to(self.dtype)
            half = torch.cat([panel[:, product.a.span(k)] @ one for k, one in enumerate(right)], dim=1)
            result = left @ half
            total.add(panel.to(torch.float64) * result.to(torch.float64))
            if product.out is not None:
                out = _matrix(product.out, product.n_out, product.n_in)[rows]
                self._write(out, result, product.scale, product.accumulate)
        return total.value()

    def _write(self, out: Tensor, product: Tensor, scale: float, accumulate: bool) -> None:
        result = product.to(self.dtype) * torch.tensor(scale, dtype=self.dtype)
        result = out.to(self.dtype) + result if accumulate else result
        rounded = torch.empty(result.shape, dtype=out.dtype, device=out.device)
        stages.write(rounded.view(-1), result.reshape(-1))
        out.copy_(rounded)

    def product_sum(self) -> ReferenceProductSum:
        return ReferenceProductSum(self)


class ReferenceProductSum:
    """`ops.raw.ProductSum` in torch."""

    def __init__(self, reference: ReferenceProducts) -> None:
        self._reference = reference
        self._total = BinnedSum()

    def add(self, panel: ProductPanel, n_threads: int = 0) -> None:
        x: Tensor = panel.x.owner
        product: Tensor = panel.product.owner
        for rows in _parts(panel.n_rows, max(1, _PANEL // max(1, panel.n_columns))):
            exact = x[rows].to(torch.float64) * product[rows].to(torch.float64)
            self._total.add(exact)
            if panel.out is not None:
                self._reference._write(panel.out.owner[rows], product[rows], panel.scale, panel.accumulate)

    def value(self) -> float:
        return self._total.value()


def _parts(n: int, length: int) -> Iterator[slice]:
    for start in range(0, n, length):
        yield slice(start, min(start + length, n))


def _blocks(factor: BlockDiagonal, dtype: torch.dtype) -> Iterator[Tensor]:
    """The blocks as square matrices."""
    for number, view in enumerate(factor.blocks):
        span = factor.span(number)
        size = span.stop - span.start
        owner: Tensor = view.owner
        stored = owner.detach().to(dtype)
        yield unpacked(stored, size) if factor.packed else stored.view(size, size)


def unpacked(triangle: Tensor, size: int) -> Tensor:
    """The symmetric matrix [size, size] whose lower triangle, by rows, is `triangle`."""
    rows, columns = torch.tril_indices(size, size, device=triangle.device)
    square = triangle.new_empty(size, size)
    square[rows, columns] = triangle.view(-1)
    square[columns, rows] = triangle.view(-1)
    return square
