"""The penalty of TAK: what a task vector costs the other tasks, and its gradient from the same product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from tvfast._leaves import Weights, named_tensors, strip_wrappers
from tvfast.curvature.sharding import Layout, is_sharded, layout_of, product
from tvfast.curvature.tasks import Tasks, tasks_of
from tvfast.errors import ArgumentError, ShapeError, StatisticsError
from tvfast.factors import add_kron, inner
from tvfast.factors.records import Curvature, Source


@dataclass(frozen=True, eq=False)
class _Term:
    """One parameter: its curvature on the parameter's device, and where it started."""

    curvature: Curvature
    weight: Tensor | None
    bias: Tensor | None
    scale: float


@dataclass(frozen=True, eq=False)
class _Result:
    """P of one term and the value, both without the scale."""

    term: _Term
    product: Tensor
    value: Tensor
    layout: Layout
    bias_layout: Layout | None


class KroneckerPenalty:
    """scale · Σ_l <X_l, B_l X_l A_l>, X_l = θ_l - θ₀_l, with a column of the bias where A has one.

    A vector with a full block F adds x F xᵀ. Value and gradient come from one product P = B X A: the value is
    <X, P>, the gradient 2 P.

    ```
    penalty = KroneckerPenalty([stats of every other task], base=model, scale=100.0)
    loss.backward()
    value = penalty.add_gradients(model)     # once per optimiser step, after the last micro-batch
    optimizer.step()
    ```

    Args:
        stats: of one task, or of several, or `Tasks`: statistics of `collect` or their paths.
        base: θ₀: a module, a state dict; copied. None: the parameters are the task vector themselves.
        scale: multiplies everything; TAK's λ.
        scales: further factors by patterns of parameter names, the first that fits; TAK takes 10 for norms
            and the class token, 0.1 for the last projection.
        accumulate: how tasks are added up, see `Tasks`.
        without: a task that does not count.
        dtype: of factors and products: float32, float64 or bfloat16.

    Raises:
        StatisticsError: a parameter that base has not, a convention without B, or sums that are not finite.
        ShapeError: a parameter of another shape.
        ArgumentError: an argument out of its range.

    Notes:
        Every factor is in memory in `dtype`, on the device of its parameter. `add_gradients` takes one matrix
        of the size of the largest layer and panels of 512 columns, or three matrices where A has a column for
        the bias; nothing has the size o x o or i x i. With parameters split over ranks see
        `tvfast.curvature.sharding`: rows stay where they are, and one matrix per layer is gathered.

    Source: Porrello et al. 2026, arXiv:2602.17385.
    """

    def __init__(
        self,
        stats: Source | Sequence[Source] | Tasks,
        base: Weights | None,
        *,
        scale: float = 1.0,
        scales: Mapping[str, float] | None = None,
        accumulate: str = "paper",
        without: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise ArgumentError(f"dtype is {dtype}; expected torch.float32, torch.float64 or torch.bfloat16.")
        self.scale = _factor("scale", scale)
        factors = {pattern: _factor(f"scales[{pattern!r}]", f) for pattern, f in (scales or {}).items()}
        self._dtype = dtype
        tasks = tasks_of(stats, accumulate)
        known = None if base is None else named_tensors(base, "base")
        self._terms = [
            self._term(curvature, known, factors)
            for name in tasks.names()
            for curvature in tasks.terms(name, without)
        ]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that are penalised, biases included."""
        names = [n for t in self._terms for n in (t.curvature.parameter, t.curvature.bias) if n]
        return tuple(dict.fromkeys(names))

    def value(self, model: Weights) -> Tensor:
        """The penalty, float64 [], without a gradient."""
        with torch.no_grad():
            return self._sum(self._results(_parameters(model)))

    def add_gradients(self, model: Weights, *, loss_scale: float = 1.0) -> Tensor:
        """The penalty, with its gradient added to `.grad` in place.

        Args:
            model: the module or the mapping of parameters that is trained. Only parameters that require a
                gradient get one; one without `.grad` gets zeros first.
            loss_scale: what the loss was multiplied by, as by a GradScaler whose gradients are still scaled.

        Returns:
            The value, float64 [], on the device of the parameters; without `loss_scale`.

        Raises:
            StatisticsError: a parameter that the penalty knows is missing.
            ShapeError: one of another shape.

        Notes:
            Sums and products are in the penalty's dtype, at least float32 for bfloat16 parameters; a gradient
            is rounded to its own dtype once.
        """
        parameters = _parameters(model)
        factor = _factor("loss_scale", loss_scale)
        with torch.no_grad():
            values = []
            for term in self._terms:
                alpha = 2.0 * self.scale * term.scale * factor
                value = self._fused(term, parameters, alpha)
                if value is None:
                    result = self._result(term, parameters)
                    value = result.value
                    for name, part, layout in _parts(result):
                        parameter = parameters[name]
                        if parameter.requires_grad:
                            layout.add(_gradient_of(parameter), part, alpha)
                values.append(value.double() * (self.scale * term.scale))
        return sum(values[1:], values[0]) if values else _no_terms()

    def __call__(self, model: Weights) -> Tensor:
        """The penalty as a term of the loss: float64 [], differentiable once.

        Notes:
            The gradient is computed with the value and kept until `backward`: one copy of the parameters.
        """
        parameters = {n: p for n, p in _parameters(model).items() if n in set(self.parameters)}
        value: Tensor = _Term_.apply(self, tuple(parameters), *parameters.values())  # type: ignore[no-untyped-call]
        return value

    # -- one call -----------------------------------------------------------------------------------

    def _results(self, parameters: Mapping[str, Tensor]) -> Any:
        for term in self._terms:
            yield self._result(term, parameters)

    def _fused(self, term: _Term, parameters: Mapping[str, Tensor], alpha: float) -> Tensor | None:
        """The value of a matrix without a bias column, its gradient added to `.grad` as it is multiplied.

        Returns:
            None: P has to be in memory, for a bias, a vector, a parameter that is split or not trained.
        """
        curvature = term.curvature
        a, b = curvature.a, curvature.b
        if curvature.bias is not None or a is None or b is None:
            return None
        weight = self._found(parameters, curvature.parameter, curvature.shape)
        if is_sharded(weight) or not weight.requires_grad:
            return None
        gradient = _gradient_of(weight)
        if not gradient.is_contiguous():
            return None
        x = torch.empty(
            weight.shape, dtype=torch.promote_types(self._dtype, torch.float32), device=weight.device
        )
        x.copy_(weight.detach())
        if term.weight is not None:
            x -= term.weight
        if curvature.transposed:  # (B X A)ᵀ = A Xᵀ B
            a, b = b, a
        return add_kron(x.to(self._dtype), a, b, gradient, alpha)

    def _result(self, term: _Term, parameters: Mapping[str, Tensor]) -> _Result:
        curvature = term.curvature
        weight = self._found(parameters, curvature.parameter, curvature.shape)
        layout = layout_of(weight, by_rows=curvature.block is None and not curvature.transposed)
        wide = torch.promote_types(self._dtype, torch.float32)
        rows = curvature.matrix(layout.local(weight.detach()))
        n_in = rows.shape[1]
        bias_layout = None
        x = torch.empty(rows.shape[0], n_in + (curvature.bias is not None), dtype=wide, device=rows.device)
        x[:, :n_in] = rows
        if term.weight is not None:
            x[:, :n_in] -= curvature.matrix(layout.local(term.weight))
        if curvature.bias is not None:
            bias = self._found(parameters, curvature.bias, (curvature.n_out,))
            bias_layout = layout_of(bias, by_rows=layout.rows is not None)
            if bias_layout.rows != layout.rows and is_sharded(bias):
                raise ArgumentError(
                    f"parameter {curvature.bias!r} is not split over ranks as {curvature.parameter!r} is; "
                    "expected both split by rows. Shard them with one mesh and placement."
                )
            x[:, n_in] = bias_layout.local(bias.detach())
            if term.bias is not None:
                x[:, n_in] -= bias_layout.local(term.bias)
        x = x.to(self._dtype)
        if curvature.block is not None:
            p = curvature.block.right(x)
            return _Result(term, p, inner(x, p), layout, None)
        assert curvature.a is not None
        assert curvature.b is not None
        p, value = product(x, curvature.a, curvature.b, layout, curvature.n_out)
        return _Result(term, p, value, layout, bias_layout)

    def _value_of(self, result: _Result) -> Tensor:
        return result.value.double() * (self.scale * result.term.scale)

    def _sum(self, results: Any) -> Tensor:
        values = [self._value_of(result) for result in results]
        return sum(values[1:], values[0]) if values else _no_terms()

    def _found(self, parameters: Mapping[str, Tensor], name: str, shape: Sequence[int]) -> Tensor:
        if name not in parameters:
            raise StatisticsError(
                f"parameter {name!r} has curvature, and the model has no such parameter; expected the model "
                "that the statistics are of."
            )
        _check_shape(name, parameters[name], shape, "the model")
        return parameters[name]

    # -- making it ----------------------------------------------------------------------------------

    def _term(self, one: Curvature, base: Mapping[str, Tensor] | None, factors: Mapping[str, float]) -> _Term:
        name = one.parameter
        if one.block is None and one.b is None:
            raise StatisticsError(
                f"parameter {name!r} has no B: the statistics were collected with convention 'regmean'; "
                "expected another one. Collect with 'tak', 'kfac_expand' or 'mats'."
            )
        scale = next((f for pattern, f in factors.items() if fnmatchcase(name, pattern)), 1.0)
        if base is None:
            return _Term(one.to(dtype=self._dtype), None, None, scale)
        for wanted, shape in ((name, one.shape), (one.bias, (one.n_out,) if one.bias else ())):
            if wanted is None:
                continue
            if wanted not in base:
                raise StatisticsError(
                    f"parameter {wanted!r} has curvature, and base has no such parameter; expected the model "
                    "that the statistics are of."
                )
            _check_shape(wanted, base[wanted], shape, "base")
        weight = base[name].detach().clone()
        bias = None if one.bias is None else base[one.bias].detach().clone()
        return _Term(one.to(weight.device, self._dtype), weight, bias, scale)


class _Term_(torch.autograd.Function):
    """The penalty in the graph."""

    @staticmethod
    def forward(ctx: Any, penalty: KroneckerPenalty, names: tuple[str, ...], *parameters: Tensor) -> Tensor:
        known = dict(zip(names, parameters, strict=True))
        gradients: dict[str, Tensor] = {}
        values = []
        for result in penalty._results(known):
            values.append(penalty._value_of(result))
            alpha = 2.0 * penalty.scale * result.term.scale
            for name, part, layout in _parts(result):
                found = layout.distributed((part * alpha).to(known[name].dtype))
                gradients[name] = gradients[name] + found if name in gradients else found
        ctx.gradients = [gradients.get(name) for name in names]
        return sum(values[1:], values[0]) if values else _no_terms()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        found = ctx.gradients
        if found is None:
            raise ArgumentError(
                "the penalty was differentiated twice; expected one backward pass per call. Call it again."
            )
        ctx.gradients = None
        factor = float(gradient)
        return None, None, *(None if g is None else g * factor for g in found)


def _parts(result: _Result) -> list[tuple[str, Tensor, Layout]]:
    """P by parameter, in the parameter's shape (this rank's rows of it)."""
    curvature = result.term.curvature
    p = result.product
    if curvature.block is not None:
        return [(curvature.parameter, p.reshape(curvature.shape), result.layout)]
    weight = p[:, : curvature.n_in]
    parts = [(curvature.parameter, weight.T if curvature.transposed else weight, result.layout)]
    if curvature.bias is not None and result.bias_layout is not None:
        parts.append((curvature.bias, p[:, curvature.n_in], result.bias_layout))
    return parts


def _gradient_of(parameter: Tensor) -> Tensor:
    """Its `.grad`, zeros if there was none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _parameters(model: Weights) -> dict[str, Tensor]:
    """Parameters by name without wrapper components."""
    if isinstance(model, nn.Module):
        found = dict(model.named_parameters())
        return {stripped: found[name] for name, stripped in strip_wrappers(found).items()}
    return named_tensors(model, "model")


def _check_shape(name: str, tensor: Tensor, shape: Sequence[int], role: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ShapeError(
            f"parameter {name!r}: {role} has shape {list(tensor.shape)}, the statistics have {list(shape)}; "
            "expected equal ones. These are the statistics of another model."
        )


def _factor(name: str, value: float) -> float:
    found = float(value)
    if not 0.0 <= found < float("inf"):
        raise ArgumentError(f"{name} is {value}; expected a finite number, 0 or more.")
    return found


def _no_terms() -> Tensor:
    return torch.zeros((), dtype=torch.float64)
