"""`merge`: models by their curvature, from tensors, state dicts and modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from torch import nn

from tvfast._leaves import Weights
from tvfast.curvature.regmean_pp import Calibration, regmean_pp
from tvfast.errors import ArgumentError
from tvfast.factors.records import Source
from tvfast.merging import merge as merge_weights
from tvfast.methods import METHODS, TensorMethod

W = TypeVar("W", bound=Weights)

REGMEAN_PP = "regmean_pp"


def merge(
    base: W,
    models: Iterable[Weights],
    stats: Sequence[Source] | None = None,
    method: str = "regmean",
    *,
    weights: float | Sequence[float] | None = None,
    report: list[str] | None = None,
    batches: Sequence[Calibration] | None = None,
    run: Callable[[nn.Module, Any], Any] | None = None,
    **parameters: Any,
) -> W:
    """Merge models into new weights, each weighed by the curvature of its own loss.

    - "regmean": W (Σ w_k G_k) = Σ w_k W_k G_k, G_k the second moment of a layer's inputs;
    - "mats": Σ w_k B_k W A_k = Σ w_k B_k W_k A_k, by conjugate gradients;
    - "kfac": "mats" with a ridge towards the base;
    - "regmean_pp": "regmean" layer by layer, inputs coming from the layers that are merged already; it takes
      modules and data instead of statistics.

    Args:
        base: θ₀: tensor, list or dict of tensors, or module. An operand of "kfac" only.
        models: θ_k, of the same names and shapes.
        stats: of each model, from `collect`, or the paths of statistics files.
        method: one of the four.
        weights: w_k; 1 by default.
        report: lines are appended on what was averaged for want of factors, and on ill-conditioned layers.
            None: matrices without factors give a warning.
        batches: "regmean_pp": calibration data of each model, to be iterated several times.
        run: "regmean_pp": runs a module on a batch; None: `model(batch)`, or `model(**batch)` for mappings.
        **parameters: `shrink`, and for "mats" and "kfac" `iterations`, `tolerance`, `ridge`; see
        docs/methods.md.

    Returns:
        As `base` is; see `tvfast.merge`.

    Raises:
        UnknownNameError, ArgumentError: a method or parameter.
        StatisticsError: statistics of another model, not finite, or without data.
        SolveError: a layer without a solution.

    Notes:
        float32 (float64 where a model is). Results depend on torch's products, so they may differ in the last
        bits between devices and numbers of threads.
    """
    if method == REGMEAN_PP:
        if stats is not None:
            raise ArgumentError(
                "method 'regmean_pp' collects while it merges and takes no stats; pass batches."
            )
        return regmean_pp(base, models, batches, run=run, weights=weights, report=report, **parameters)  # type: ignore[return-value,arg-type]
    curved = sorted([name for name, info in METHODS.items() if _reads_factors(info.cls)] + [REGMEAN_PP])
    if method not in curved:
        raise ArgumentError(f"method is {method!r}; expected one of {', '.join(curved)}.")
    if batches is not None or run is not None:
        raise ArgumentError(f"method {method!r} takes stats, not batches; expected None.")
    return merge_weights(base, models, method, weights=weights, stats=stats, report=report, **parameters)


def _reads_factors(method: type) -> bool:
    return issubclass(method, TensorMethod) and bool(method.statistics)
