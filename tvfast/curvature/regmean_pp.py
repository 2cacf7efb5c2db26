"""RegMean++: RegMean in forward order, each layer's inputs coming from the layers that are merged already."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from tvfast.curvature.sites import LINEAR, Site, find_sites
from tvfast.errors import ArgumentError, StatisticsError
from tvfast.factors import Dense, Factor
from tvfast.factors.merges import regmean
from tvfast.merging import merge_
from tvfast.methods import make_method

Calibration = Iterable[Any]
Run = Callable[[nn.Module, Any], Any]


class _Stop(Exception):
    """The module that was looked for has been reached."""


@dataclass(frozen=True, eq=False)
class _Call:
    """How a module was called."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def regmean_pp(
    base: nn.Module,
    models: Iterable[nn.Module],
    batches: Sequence[Calibration] | None,
    *,
    run: Run | None = None,
    weights: float | Sequence[float] | None = None,
    shrink: float = 0.95,
    blocks: Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    report: list[str] | None = None,
) -> nn.Module:
    """A new module with linear layers merged by RegMean, one after the other as the data pass them.

    All other parameters are averaged first. Then, for each block in the order of the forward pass: the merged
    model is run on each model's data up to the block; each model's own block goes on from there, and the
    second moments of the inputs of its linear layers are taken; these are merged, and take part in what
    follows.

    Args:
        base: a module of the models' architecture; not an operand.
        models: one module per task.
        batches: calibration data of each, iterated once per block.
        run: runs a module on a batch; None: `model(batch)`, or `model(**batch)` where it is a mapping.
        weights: w_k.
        shrink: of the off-diagonals.
        blocks: patterns of module names, as "model.layers.*"; the outermost that fit count. None: every
            linear layer is a block of its own.
        layers, exclude: patterns of weight names, as in `collect`.
        report: lines on ill-conditioned layers and on what was averaged are appended.

    Raises:
        ArgumentError: no modules, data that do not fit, or patterns that fit nothing.
        SolveError: a layer without a solution.

    Notes:
        The forward pass is repeated up to each block, so time grows with the square of the number of blocks,
        and memory is that of one forward pass and one block's second moments, in float64.

    Source: RegMean++, as FusionBench implements it.
    """
    candidates = list(models)
    for role, one in [("base", base), *((f"models[{k}]", m) for k, m in enumerate(candidates))]:
        if not isinstance(one, nn.Module):
            raise ArgumentError(
                f"{role} is a {type(one).__name__}; method 'regmean_pp' runs modules: expected one."
            )
    if batches is None or len(batches) != len(candidates):
        found = "None" if batches is None else f"of length {len(batches)}"
        raise ArgumentError(
            f"batches is {found} for {len(candidates)} models; expected the data of each model."
        )
    for k, one_task in enumerate(batches):
        if isinstance(one_task, Iterator):
            raise ArgumentError(
                f"batches[{k}] is an iterator; expected a list or a loader, to be iterated again."
            )
    chosen = make_method("regmean", weights=weights, shrink=shrink)
    chosen.check_models(len(candidates))
    coefficients = chosen.per_model("weights", len(candidates))
    merged = copy.deepcopy(base)
    merge_(merged, candidates, "linear", weights=coefficients)
    sites, left_out = find_sites(merged, (LINEAR,), layers, exclude)
    call = run or _run
    with torch.no_grad(), _evaluating([merged, *candidates]):
        order = _blocks_in_order(merged, sites, blocks, batches[0], call)
        for name, members in order:
            grams = [
                _second_moments(merged, candidate, name, members, data, call)
                for candidate, data in zip(candidates, batches, strict=True)
            ]
            notes = _merge_block(merged, candidates, members, grams, coefficients, shrink)
            if report is not None:
                report += notes
    if report is not None:
        report += [f"regmean_pp: averaged: {line}" for line in left_out]
    return merged


def _run(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _blocks_in_order(
    merged: nn.Module, sites: Sequence[Site], patterns: Sequence[str] | None, data: Calibration, run: Run
) -> list[tuple[str, list[str]]]:
    """Names of the blocks as the first batch passes them, with the names of their linear layers."""
    paths = {id(module): path for path, module in merged.named_modules()}
    by_block: dict[str, list[str]] = {}
    for site in sites:
        path = paths[id(site.module)]
        block = path if patterns is None else _outermost(path, patterns)
        if block is not None:
            by_block.setdefault(block, []).append(path)
    if not by_block:
        raise ArgumentError(
            f"blocks has {', '.join(map(repr, patterns or ()))}, in which no linear layer is."
        )
    seen: list[str] = []
    with ExitStack() as hooks:
        for block in by_block:
            hook = merged.get_submodule(block).register_forward_pre_hook(
                lambda module, args, b=block: None if b in seen else seen.append(b)
            )
            hooks.callback(hook.remove)
        batch = next(iter(data), None)
        if batch is None:
            raise ArgumentError("batches[0] is empty; expected at least one batch.")
        run(merged, batch)
    return [(block, by_block[block]) for block in seen]


def _outermost(path: str, patterns: Sequence[str]) -> str | None:
    parts = path.split(".")
    prefixes = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
    return next((prefix for prefix in prefixes if any(fnmatchcase(prefix, p) for p in patterns)), None)


def _second_moments(
    merged: nn.Module, candidate: nn.Module, block: str, members: Sequence[str], data: Calibration, run: Run
) -> dict[str, Factor]:
    """Second moments of the inputs of a model's layers in a block that gets what merged layers put out."""
    own = candidate.get_submodule(block)
    totals: dict[str, Tensor] = {}
    n_tokens: dict[str, int] = dict.fromkeys(members, 0)

    def add(name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        if name not in totals:
            totals[name] = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
        totals[name] += rows.T @ rows
        n_tokens[name] += len(rows)

    with ExitStack() as hooks:
        for name in members:
            hook = candidate.get_submodule(name).register_forward_pre_hook(
                lambda module, args, kwargs, n=name: add(n, args[0] if args else next(iter(kwargs.values()))),
                with_kwargs=True,
            )
            hooks.callback(hook.remove)
        for batch in data:
            for call in _calls(merged, block, batch, run):
                own(*call.args, **call.kwargs)
    for name in members:
        if not n_tokens[name]:
            raise StatisticsError(
                f"layer {name!r}: no data reached it in block {block!r}; expected inputs. Exclude it, or "
                "add data."
            )
    return {name: Dense(total / n_tokens[name]) for name, total in totals.items()}


def _calls(merged: nn.Module, block: str, batch: Any, run: Run) -> list[_Call]:
    """How the merged model calls a block on a batch; what comes after the block is not run."""
    calls: list[_Call] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(_Call(args, kwargs))
        raise _Stop

    hook = merged.get_submodule(block).register_forward_pre_hook(catch, with_kwargs=True)
    try:
        run(merged, batch)
    except _Stop:
        pass
    finally:
        hook.remove()
    return calls


def _merge_block(
    merged: nn.Module,
    candidates: Sequence[nn.Module],
    members: Sequence[str],
    grams: Sequence[Mapping[str, Factor]],
    coefficients: Sequence[float],
    shrink: float,
) -> list[str]:
    """RegMean of the weights of a block, in place; what there is to say of it."""
    notes = []
    for name in members:
        target: Any = merged.get_submodule(name).weight
        own: list[Any] = [candidate.get_submodule(name).weight for candidate in candidates]
        transposed = not isinstance(merged.get_submodule(name), nn.Linear)
        solved = regmean(
            [weight.T if transposed else weight for weight in own],
            [gram[name] for gram in grams],
            start=target.T if transposed else target,
            coefficients=coefficients,
            shrink=shrink,
            where=f"layer {name!r}",
        )
        target.copy_(solved.x.T if transposed else solved.x)
        notes += [f"regmean_pp: {name}: {solved.note}"] * bool(solved.note)
    return notes


@contextmanager
def _evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
