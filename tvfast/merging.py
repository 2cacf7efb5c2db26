"""`merge_` and `merge`: from tensors, lists, state dicts and modules to a work table and back."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from tvfast._leaves import Leaf, Weights, any_sharded, match, model_list, named_tensors, strip_wrappers
from tvfast._scores import LeafScores, Scores, one_of, scores_of
from tvfast.errors import ArgumentError, BackendError, DeviceError
from tvfast.merging_tensors import check_statistics, merge_tensors
from tvfast.methods import Method, ProgramMethod, TableStatistics, TensorMethod, make_method
from tvfast.methods.base import PerModel, share_groups
from tvfast.methods.merging import merge_table
from tvfast.methods.passthrough import Passthrough
from tvfast.methods.statistics import PLANE_BYTES
from tvfast.ops._check import threads
from tvfast.ops._huge_pages import on_huge_pages
from tvfast.ops._views import check_overlap, span, view
from tvfast.ops.raw import Backend, backend_for
from tvfast.program import DType, Entry, View, WorkTable

W = TypeVar("W", bound=Weights)


def merge_(
    base: W,
    models: Iterable[Weights],
    method: str,
    *,
    weights: PerModel | None = None,
    scale: float = 1.0,
    seed: int = 0,
    tie: str | None = None,
    dialect: str = "mergekit",
    stats: Iterable[Any] | None = None,
    scores: Iterable[Scores] | None = None,
    instruct: Weights | None = None,
    report: list[str] | None = None,
    redistribute: bool = False,
    n_threads: int = 0,
    **parameters: Any,
) -> W:
    """Merge models into the base, in place; returns the base.

    θ₀ is overwritten with θ₀ + λ · merged(w_k, θ_k - θ₀), or with what `method` says instead; formulas are
    in `docs/methods.md`.

    Args:
        base: tensor, list or dict of tensors (state dict), or module. Its floating-point tensors are
            overwritten, integers and booleans left as they are. Contiguous; float32, bfloat16, float16 or
            float64. DTensors are merged shard by shard, in a call that every rank of their mesh makes
            (`docs/sharded.md`).
        models: K of the same names and shapes, on the same devices; dtypes may differ. Not modified.
        method: a name of `tvfast.methods.METHODS`.
        weights: w_k: one, or one per model; 1 by default.
        scale: λ.
        seed: key of random draws and of `tie="hash"`. Draws depend on seed, tensor name, model index and
            element index, and on nothing else. A bare tensor's name is "tensor", a list's the index; wrapper
            prefixes of FSDP, DDP and torch.compile are not part of a name.
        tie: which entries equal to a threshold survive: "ge" all, "index" exactly the asked number, lowest
            index first, "hash" each by a hash of its index, in the right share; None: as the dialect does.
        dialect: whose reading of the method; "mergekit" is release 0.1.5.
        stats: for methods that read statistics of each model's data, as `stats:` of a recipe; one per model:
            what `tvfast.importance.collect` or `tvfast.curvature.collect` returned, or the path of the file.
            Importances (of "sta", "sta_forget" and "fisher") may also be tensors: means, 0 or more, by the
            base's names and in its shapes.
        scores: another word for `stats` of methods that read importances.
        instruct: for "lata", the instruct model of the base: what `models` are one of. Not modified.
        report: lines are appended on what such a method averaged for want of factors, and on systems that it
            solved otherwise than asked. None: matrices without factors give a warning.
        redistribute: of DTensors whose models are not laid out as the base, and of methods that need whole
            tensors: bring them together, one tensor at a time. False: such a tensor is an error.
        n_threads: 0 is all cores that the process may use. Does not change the result. Methods that weigh by
            curvature take torch's threads instead, and their last bits depend on them.
        **parameters: of the method, as `density=0.2`; a number is one value or one per model.

    Returns:
        `base`.

    Raises:
        UnknownNameError: method, parameter, tie or dialect does not exist.
        ArgumentError: a value outside its range, or a wrong number of weights or models.
        StatisticsError: a statistics file is damaged, or of another model.
        StateDictError, ShapeError, DTypeError, DeviceError, LayoutError: models do not fit the base, or
            memory that is written overlaps other memory. All is checked before anything is written.
        BackendError: no backend can run the call.
        MergeError: what a tensor's numbers show: `SolveError` for equations that have no solution, or NaN in
            a model or its factors; directions that cancel. Tensors before it are merged already.

    Notes:
        float32 arithmetic, rounded once per output; float64 tensors are merged in float64 by the reference
        backend. NaN propagates. The same bytes for any number of threads. Tied tensors are merged once. Extra
        memory: at most 64 MiB; where a method ranks rows, 20 + 8 K bytes per entry of a row of up to 131072
        for each thread; for longer rows 64 MiB, and in the `paper` dialect the size of the tensor. On a GPU
        at most 320 MiB of its memory for thresholds, and where a method ranks rows 512 MiB, or what the ranks
        of one tensor take, 4 or 8 bytes per entry and model, if that is more. Not safe while another thread
        writes the tensors.
    """
    choose = partial(
        make_method, method, weights=weights, scale=scale, seed=seed, tie=tie, dialect=dialect, **parameters
    )
    models = list(models) if isinstance(models, Iterator) else models
    if any_sharded(base, models, instruct):
        from tvfast.sharded import merging as sharded

        return sharded.merge_(
            base, models, sharded.Call(choose, instruct, stats, scores, report, n_threads, redistribute)
        )
    chosen = choose()
    leaves = _checked(base, models, instruct, chosen, n_threads)
    extra = _Extra.of(chosen, leaves, stats, scores, report, n_threads)
    roles = roles_of(chosen, len(leaves[0].models)) if leaves else []
    spans = [
        (
            span(leaf.base, leaf.name, "base", row),
            [span(m, leaf.name, role, row) for role, m in zip(roles, leaf.models, strict=True)],
        )
        for row, leaf in enumerate(leaves)
    ]
    check_overlap([out for out, _ in spans], [item for _, inputs in spans for item in inputs])
    _run(chosen, leaves, extra, [leaf.base for leaf in leaves], n_threads)
    for leaf in leaves:
        if not leaf.base.is_inference():
            torch.autograd.graph.increment_version(leaf.base)  # the write went past autograd
    return base


def merge(
    base: W,
    models: Iterable[Weights],
    method: str,
    *,
    weights: PerModel | None = None,
    scale: float = 1.0,
    seed: int = 0,
    tie: str | None = None,
    dialect: str = "mergekit",
    stats: Iterable[Any] | None = None,
    scores: Iterable[Scores] | None = None,
    instruct: Weights | None = None,
    report: list[str] | None = None,
    redistribute: bool = False,
    n_threads: int = 0,
    **parameters: Any,
) -> W:
    """Merge models into new tensors; arguments, errors and values are those of `merge_`.

    Returns:
        What `base` is, with the base's dtypes and devices: a tensor, a list or tuple, a dict, or for a module
        a deep copy of it with merged weights. Integer and boolean tensors are copies of the base's; tensors
        that the base ties are tied. New tensors require no gradient; a module's parameters do as in the
        base.

    Notes:
        Extra memory: the result and what `merge_` takes.
    """
    choose = partial(
        make_method, method, weights=weights, scale=scale, seed=seed, tie=tie, dialect=dialect, **parameters
    )
    models = list(models) if isinstance(models, Iterator) else models
    if any_sharded(base, models, instruct):
        from tvfast.sharded import merging as sharded

        call = sharded.Call(choose, instruct, stats, scores, report, n_threads, redistribute)
        return sharded.merge(base, models, call, _like)
    chosen = choose()
    leaves = _checked(base, models, instruct, chosen, n_threads)
    extra = _Extra.of(chosen, leaves, stats, scores, report, n_threads)
    if isinstance(base, nn.Module):
        merged = copy.deepcopy(base)
        targets = named_tensors(merged, "base")
        _run(chosen, leaves, extra, [targets[leaf.name] for leaf in leaves], n_threads)
        return merged
    outs = [on_huge_pages(torch.empty_like(leaf.base, requires_grad=False)) for leaf in leaves]
    _run(chosen, leaves, extra, outs, n_threads)
    by_name = {
        name: out for leaf, out in zip(leaves, outs, strict=True) for name in (leaf.name, *leaf.aliases)
    }
    return cast(W, _like(base, by_name))


def _like(base: Any, merged: Mapping[str, Tensor]) -> Any:
    """`base` rebuilt with merged tensors; what was not merged is cloned."""
    if isinstance(base, Tensor):
        return merged["tensor"]
    if isinstance(base, Mapping):
        names = strip_wrappers(base)
        rebuilt = {key: _leaf_like(value, merged.get(names[key])) for key, value in base.items()}
        return OrderedDict(rebuilt) if isinstance(base, OrderedDict) else rebuilt
    parts = [_leaf_like(value, merged.get(str(index))) for index, value in enumerate(base)]
    return tuple(parts) if isinstance(base, tuple) else parts


def _leaf_like(value: Any, merged: Tensor | None) -> Any:
    if merged is not None:
        return merged
    return value.detach().clone() if isinstance(value, Tensor) else value


def _checked(
    base: Weights, models: Iterable[Weights], instruct: Weights | None, method: Method, n_threads: int
) -> list[Leaf]:
    """The leaves of a call whose arguments fit the method; an instruct model is the last of their models."""
    threads(n_threads)
    found = operand_list(models, instruct, method)
    return match(base, found, roles_of(method, len(found)))


def operand_list(models: Iterable[Weights], instruct: Weights | None, method: Method) -> list[Weights]:
    """The models of a method, and the instruct model as the last of them if it needs one.

    Raises:
        ArgumentError: too few or too many, or an instruct model where there should be none, or none.
    """
    found = model_list(models)
    method.check_models(len(found))
    if method.info.needs_instruct != (instruct is not None):
        raise ArgumentError(
            f"method {method.info.name!r} takes no instruct model; expected instruct=None."
            if instruct is not None
            else f"method {method.info.name!r} compares task vectors with that of an instruct model, and "
            "instruct is None; expected it in the form of the base."
        )
    return found if instruct is None else [*found, instruct]


def roles_of(method: Method, n_models: int) -> list[str]:
    """What messages call the operands beside the base."""
    named = ["instruct"] * method.info.needs_instruct
    return [f"models[{k}]" for k in range(n_models - len(named))] + named


@dataclass(frozen=True, slots=True)
class _Extra:
    """What a method reads beside weights: scores of every leaf, or statistics of every model."""

    scores: Sequence[LeafScores]
    stats: Sequence[Any] | None
    report: list[str] | None

    @staticmethod
    def of(
        method: Method,
        leaves: Sequence[Leaf],
        stats: Iterable[Any] | None,
        scores: Iterable[Scores] | None,
        report: list[str] | None,
        n_threads: int,
    ) -> _Extra:
        """Checked before anything is written."""
        if isinstance(method, ProgramMethod):
            return _Extra(scores_of(method, leaves, one_of(stats, scores), n_threads), None, None)
        if scores is not None:
            raise ArgumentError(f"method {method.info.name!r} reads no scores; expected stats.")
        return _Extra(
            [LeafScores()] * len(leaves),
            check_statistics(method, stats, len(leaves[0].models) if leaves else None),
            report,
        )


def _run(
    method: Method, leaves: Sequence[Leaf], extra: _Extra, outs: Sequence[Tensor], n_threads: int
) -> None:
    """Merge leaves into `outs`; every table has its backend before the first one is written."""
    with torch.no_grad():
        if isinstance(method, TensorMethod):
            pairs = list(zip(leaves, outs, strict=True))
            rest, average = merge_tensors(method, pairs, extra.stats, extra.report)
            if average is None:
                return
            plain = _Extra([LeafScores()] * len(rest), None, None)
            _run(average, [leaf for leaf, _ in rest], plain, [out for _, out in rest], n_threads)
            return
        assert isinstance(method, ProgramMethod)
        for chosen, table, backend in list(_tables(method, leaves, extra.scores, outs)):
            planes = Planes(table)
            statistics = TableStatistics(backend, table, planes.new, n_threads)
            merge_table(chosen, statistics)
            for entry in table.entries:
                entry.masks = ()


def _tables(
    method: ProgramMethod, leaves: Sequence[Leaf], scores: Sequence[LeafScores], outs: Sequence[Tensor]
) -> Iterator[tuple[ProgramMethod, WorkTable, Backend]]:
    """Work tables with what merges them: leaves that the method sets aside have others.

    Raises:
        ArgumentError: it sets all of them aside.
    """
    by_method: dict[ProgramMethod, list[tuple[Leaf, LeafScores, Tensor]]] = {}
    for leaf, own, out in zip(leaves, scores, outs, strict=True):
        chosen, mine = set_aside(method, leaf)
        by_method.setdefault(chosen, []).append((mine, own, out))
    if by_method and method not in by_method:
        raise ArgumentError(method.nothing_ranked())
    for chosen, rows in by_method.items():
        of_chosen, own_scores, own_outs = zip(*rows, strict=True)
        for table, backend in work_tables(chosen, of_chosen, own_scores, own_outs):
            yield chosen, table, backend


def set_aside(method: ProgramMethod, leaf: Leaf) -> tuple[ProgramMethod, Leaf]:
    """What merges a leaf, and its operands: the method itself, or what it has for tensors without a rule."""
    aside = method.aside(leaf.name, len(leaf.models))
    if aside is None or aside.copied is None:
        return (method if aside is None else aside.method), leaf
    operands = zip((leaf.base, *leaf.models), (leaf.base_view, *leaf.model_views), strict=True)
    tensor, seen = list(operands)[aside.copied]
    return Passthrough(), replace(leaf, models=(tensor,), model_views=(seen,))


def work_tables(
    method: ProgramMethod,
    leaves: Sequence[Leaf],
    scores: Sequence[LeafScores],
    outs: Sequence[Tensor],
    *,
    task_vectors: bool = False,
) -> Iterator[tuple[WorkTable, Backend]]:
    """Work tables: one per device and arithmetic, and as few as the memory for bit planes allows."""
    rows: dict[tuple[torch.device, bool], list[Entry]] = {}
    double = any(leaf.float64 for leaf in leaves)
    for leaf, own, out in zip(leaves, scores, outs, strict=True):
        if leaf.base.numel() == 0:
            continue
        operand, operands = method.operands(leaf.base_view, leaf.model_views)
        entry = Entry(
            name=leaf.name,
            models=operands,
            base=operand,
            out=leaf.base_view if out is leaf.base else view(out, leaf.name, "out", float64=True),
            row=method.row_elements(leaf.base.shape),
            scores=method.score_operands(own.views),
            score_summaries=method.score_operands(own.summaries),
            task_vectors=task_vectors,
        )
        # tensors that are ranked together need one table, in the widest arithmetic that any tensor needs
        together = method.group_of(leaf.name) is not None
        rows.setdefault((leaf.base.device, double if together else leaf.float64), []).append(entry)
    check_devices(method, rows)
    for (_, float64), entries in rows.items():
        for batch in _batches(method, entries):
            share_groups(method, batch)
            table = WorkTable(batch, len(batch[0].models))
            yield table, float64_backend() if float64 else backend_for(table)


def check_devices(method: ProgramMethod, rows: Mapping[tuple[torch.device, bool], list[Entry]]) -> None:
    """Raise if tensors that are ranked together are on several devices."""
    places: dict[str, set[str]] = {}
    for (device, _), entries in rows.items():
        for entry in entries:
            group = method.group_of(entry.name)
            if group is not None:
                places.setdefault(group, set()).add(str(device))
    for group, devices in places.items():
        if len(devices) > 1:
            raise DeviceError(
                f"method {method.info.name!r}, dialect {method.dialect!r} ranks all tensors "
                f"{f'of {group!r} ' if group else ''}together; found them on {', '.join(sorted(devices))}, "
                "expected one device. Move them, or use a dialect or scope that ranks each tensor by itself."
            )


def _batches(method: ProgramMethod, entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Runs of entries whose bit planes fit `PLANE_BYTES`; one that alone does not is a run of its own."""
    batch: list[Entry] = []
    used = 0
    for entry in entries:
        wanted = method.plane_bytes(entry.n_elements, len(entry.models))
        if batch and used + wanted > PLANE_BYTES:
            yield batch
            batch, used = [], 0
        batch.append(entry)
        used += wanted
    if batch:
        yield batch


class Planes:
    """Allocates bit planes on the device of a table; words are zero."""

    def __init__(self, table: WorkTable) -> None:
        self.device = table.entries[0].models[0].owner.device

    def new(self, n_bits: int) -> View:
        words = torch.zeros((n_bits + 63) // 64, dtype=torch.int64, device=self.device)
        return View(words.data_ptr(), n_bits, DType.F32, words)


def float64_backend() -> Backend:
    forced = os.environ.get("TVFAST_BACKEND")
    if forced not in (None, "", "reference"):
        raise BackendError(
            f"backend {forced!r} was forced but cannot run: float64 tensors are merged by the reference "
            "backend. Unset TVFAST_BACKEND, or cast to float32."
        )
    from tvfast.ops.reference import backend

    return backend(torch.float64)
