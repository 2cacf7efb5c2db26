"""`LiveMerge`: new coefficients for live weights, in place, one fused pass over one table each time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tvfast._leaves import Leaf, Weights, any_sharded, match, model_list, named_tensors
from tvfast._scores import LeafScores, Scores, one_of, scores_of
from tvfast.errors import ArgumentError, LayoutError
from tvfast.live.coefficients import Coefficients, Columns, Grouping, columns_of, group_of
from tvfast.live.gradient import TableGradient, check_differentiable
from tvfast.live.remembering import RememberingBackend
from tvfast.merging import Planes, work_tables
from tvfast.methods import ProgramMethod, TableStatistics, make_method
from tvfast.methods.base import own_values
from tvfast.ops._check import threads
from tvfast.ops._views import check_overlap, span, view
from tvfast.ops.raw import Backend
from tvfast.program import Program, TensorScalars, WorkTable, ZeroSign

if TYPE_CHECKING:
    from tvfast.sharded.agreement import Description
    from tvfast.sharded.live import LiveShards


@dataclass(slots=True)
class _Part:
    """One work table, what was measured of it, and the group of each of its entries."""

    table: WorkTable
    backend: Backend
    statistics: TableStatistics
    groups: list[int]
    program: Program
    scalars: list[TensorScalars]


class LiveMerge:
    """Merges tasks into live weights again and again, in place: `set` is one pass over memory.

    θ = merge(θ₀, θ_1 … θ_T) with the coefficients w of the last `set`, written into the tensors of `model`
    themselves; θ₀ is kept. Leaving the `with` block puts θ₀ back bit for bit, unless `keep()` was called.

        with tvfast.LiveMerge(model, deltas=[math, code]) as live:
            live.set([0.3, 0.5])

    Args:
        model: tensor, list or dict of tensors, or module, whose floating-point tensors are overwritten. They
            must stay where they are in memory while the object is in use.
        deltas: T task vectors τ_k of the same names and shapes, of any of the dtypes: τ_k is read as it is
            stored, nothing is subtracted.
        models: T fine-tuned weights θ_k instead: τ_k = θ_k - θ₀ in float32, in every pass. Exactly one of
            `deltas` and `models` is given. Neither may share memory with `model`.
        method: a name of `tvfast.methods.METHODS`; with `deltas` one that reads the base. Thresholds and
            other statistics that do not depend on the coefficients are measured here, once.
        scale: λ, until a `set` brings another.
        base: θ₀, of the names and shapes of `model`; never written, and no copy is made: it must not change
            or share memory with `model`. None: a copy of what `model` holds now, the one large allocation.
        stats: of methods on importances, one per task, as for `merge_`; `scores` is another word for it.
        by: how `set` groups tensors where coefficients are per group: "layer" ("model.layers.3" for
            "model.layers.3.mlp.up_proj.weight"; tensors outside any layer by the first component of their
            name), "tensor", or a function from a tensor's name to its group's.
        n_threads: 0 is all cores that the process may use. Does not change the result.
        **parameters: of the method, also `seed`, `tie` and `dialect`; not `weights`, which `set` gives.

    Raises:
        ArgumentError, UnknownNameError: as `merge_` does, or not exactly one of `deltas` and `models`.
        StateDictError, ShapeError, DTypeError, DeviceError, LayoutError: weights that do not fit together, or
            memory that is written overlaps memory that is read.
        BackendError: no backend can run the call.

    Notes:
        The result of `set(w)` has the bits of `tvfast.merge(θ₀, models, method, weights=w, ...)`. Task
        vectors that were subtracted in float32 and stored in float32 give these bits too; stored in 16 bits
        they are rounded once before. Memory: a copy of the model's floating-point tensors (none with `base`),
        and one bit per entry and task for methods that draw by rank. After construction only scalars are
        allocated, and by rare programs and mixed dtypes a few hundred KiB per thread while they run.
        Not safe while another thread reads or writes the weights.
    """

    def __init__(
        self,
        model: Weights,
        *,
        deltas: Iterable[Weights] | None = None,
        models: Iterable[Weights] | None = None,
        method: str = "task_arithmetic",
        scale: float = 1.0,
        base: Weights | None = None,
        stats: Iterable[Scores] | None = None,
        scores: Iterable[Scores] | None = None,
        by: Grouping = "layer",
        n_threads: int = 0,
        **parameters: Any,
    ) -> None:
        tasks = models if deltas is None else deltas
        tasks = list(tasks) if isinstance(tasks, Iterator) else tasks
        role = "models" if deltas is None else "deltas"
        self._shards: LiveShards | None = None
        with _agreed(model, base, tasks) as said:
            self._n_threads = threads(n_threads)
            if (deltas is None) == (models is None):
                given = "neither" if deltas is None else "both"
                raise ArgumentError(
                    f"deltas and models: {given} given; expected exactly one: task vectors or fine-tuned "
                    "weights."
                )
            operands = model_list(tasks)
            self._method = _chosen(method, scale, parameters, len(operands), deltas is not None)
            self._n_tasks = len(operands)
            if said is None:
                self._live, leaves = _leaves(model, base, operands, role)
            else:
                self._shards = _shards(said, self._method, role, model, base, operands)
                self._live, leaves = self._shards.live, self._shards.rows
            _check_memory(self._live, leaves, role)
            self._base = [leaf.base for leaf in leaves]
            self._addresses = [leaf.base.data_ptr() for leaf in self._live]
            name_group = group_of(by)
            group_names = [str(name_group(leaf.name)) for leaf in leaves]
            self.groups: tuple[str, ...] = tuple(dict.fromkeys(group_names))
            numbers = {name: number for number, name in enumerate(self.groups)}
            in_group = {leaf.name: numbers[name] for leaf, name in zip(leaves, group_names, strict=True)}
            given_scores = one_of(stats, scores)
            with torch.no_grad():
                if said is None or self._shards is None:
                    found = scores_of(self._method, leaves, given_scores, n_threads)
                else:
                    of_shards = self._shards.scores(said, self._method, given_scores, n_threads)
        with torch.no_grad():
            if self._shards is not None:
                found = of_shards.completed(self._shards.team, n_threads)
            self._parts = self._measured(leaves, found, in_group, deltas is not None)
        self._scale = self._method.scale
        self._columns: Columns | None = None
        self._kept = False
        self._open = True

    def _measured(
        self,
        leaves: Sequence[Leaf],
        scores: Sequence[LeafScores],
        in_group: Mapping[str, int],
        deltas: bool,
    ) -> list[_Part]:
        """The tables with everything measured that coefficients do not change."""
        tables: Iterable[tuple[WorkTable, Backend]]
        if self._shards is None:
            outs = [leaf.base for leaf in self._live]
            tables = work_tables(self._method, leaves, scores, outs, task_vectors=deltas)
        else:
            tables = self._shards.tables(self._method, scores, task_vectors=deltas)
        parts = []
        for table, backend in list(tables):
            remembering = RememberingBackend(backend)
            new_plane = Planes(table).new if self._shards is None else None
            statistics = TableStatistics(remembering, table, new_plane, self._n_threads)
            program, scalars = self._method.resolve(statistics)
            groups = [in_group[entry.name] for entry in table.entries]
            parts.append(_Part(table, backend, statistics, groups, program, scalars))
        return parts

    @property
    def n_tasks(self) -> int:
        """T."""
        return self._n_tasks

    @property
    def coefficients(self) -> Coefficients | None:
        """Those of the last `set`, as they were given; None while the weights are the base."""
        return None if self._columns is None else self._columns.form

    def set(self, coefficients: Coefficients, *, scale: float | None = None) -> None:
        """Overwrite the live weights with the merge by these coefficients.

        Args:
            coefficients: w: T numbers; or [T, G], one per task and group, in the order of `groups`; or a dict
                from every name of `groups` to T numbers. One number stands for T. Tensors are read, whatever
                their device, and not modified.
            scale: λ from now on; None: as before.

        Raises:
            ArgumentError: wrong shape or names, a number that is not finite, or `keep` or the end of the
                block came before; one coefficient per group of a method that elects signs over the
                whole model.
            LayoutError: a live tensor is no longer where it was, as after `model.to(...)`.

        Notes:
            Reads θ₀ and every task once and writes once. Errors come before anything is written.
        """
        self._check_usable()
        columns = columns_of(coefficients, self._n_tasks, self.groups)
        lambda_now = self._scale if scale is None else replace(self._method, scale=scale).scale
        resolved = [self._scalars(part, columns, lambda_now) for part in self._parts]
        with torch.no_grad():
            for part, (program, scalars) in zip(self._parts, resolved, strict=True):
                part.statistics.backend.combine(part.table, program, scalars, self._n_threads)
        self._scale, self._columns = lambda_now, columns
        self._touch()

    def gradient(self, grads: Weights | None = None) -> Any:
        """dL/dw of the last `set`, from the gradients dL/dθ of the live weights.

        dL/dw_k = λ Σ_i (dL/dθ)_i t_k,i for sums of kept task vectors t_k, over the entries of a group where
        coefficients are per group: λ<dL/dθ, τ_k> for task arithmetic. Where the method normalises, D = Σ w:
        dL/dw_k = λ Σ_i (dL/dθ)_i (t_k,i - R_i / D) / D, R = Σ w_k t_k.

        Args:
            grads: what `model` is, of float32, bfloat16 or float16; a dict may leave out tensors, a missing
                gradient is zero. None: the `.grad` of the live tensors, as `loss.backward()` leaves them.

        Returns:
            In the form of the last coefficients: a tensor [], [T] or [T, G], or a dict of [T]; of the dtype
            and device of a coefficient tensor, otherwise float64 on the CPU. `w.grad = live.gradient()` fits.

        Raises:
            ArgumentError: no `set` yet, no gradient at all, or a method whose derivative is no such sum
                (elected signs, largest magnitudes, entries divided by their own probability).
            ShapeError, DTypeError, DeviceError: a gradient that does not fit its tensor.
            BackendError: the backend has no products with scores.

        Notes:
            Exact products in the order-independent accumulator: the same for any number of threads; the error
            is that of docs/numerics.md, Sums. One pass over gradients and tasks. Gradients that are not
            contiguous are copied.
        """
        if self._columns is None:
            raise ArgumentError("no coefficients are set; expected live.set(...) before live.gradient().")
        check_differentiable(self._method, self._parts[0].program if self._parts else Program())
        find = partial(self._gradients, grads)
        found = find() if self._shards is None else self._shards.gradients(find)
        totals = [[0.0] * self._n_tasks for _ in self.groups]
        with torch.no_grad():
            for part in self._parts:
                program, scalars = self._scalars(part, self._columns, self._scale)
                dots = None if self._shards is None else partial(self._shards.dots, part.backend)
                one = TableGradient(part.backend, part.table, program, scalars, dots)
                for group, row in zip(part.groups, one.rows(found, self._n_threads), strict=True):
                    totals[group] = [a + b for a, b in zip(totals[group], row, strict=True)]
        return self._columns.alike(totals, self.groups)

    def zero_grad(self) -> None:
        """Drop the gradients of the live tensors, as `torch.optim.Optimizer.zero_grad` does."""
        for tensor in self._tensors.values():
            tensor.grad = None

    def restore(self) -> None:
        """Put θ₀ back, bit for bit (rounded once where `base` has a wider dtype), wherever tensors are."""
        self._check_open()
        with torch.no_grad():
            for leaf, base in zip(self._live, self._base, strict=True):
                leaf.base.detach().copy_(base)
        self._columns = None
        self._touch()

    def keep(self) -> None:
        """Make the present weights permanent: the end of the block leaves them, and `set` is over."""
        self._check_usable()
        self._kept = True

    def __enter__(self) -> LiveMerge:
        self._check_usable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._open and not self._kept:
                self.restore()
        finally:
            self._open = False
            self._parts, self._base = [], []  # the copy of the base and the caller's tasks

    def _scalars(self, part: _Part, columns: Columns, scale: float) -> tuple[Program, list[TensorScalars]]:
        """Stages and numbers with these coefficients: rewritten, or resolved anew from what is remembered."""
        if self._method.plain_weights and part.program.zero_sign is not ZeroSign.MAJORITY:
            for group, tensor in zip(part.groups, part.scalars, strict=True):
                tensor.scale = scale
                for model, weight in zip(tensor.models, columns.of(group), strict=True):
                    model.weight = weight
            return part.program, part.scalars
        if self._method.whole_model and not columns.shared:
            raise ArgumentError(
                f"method {self._method.info.name!r}, dialect {self._method.dialect!r} elects signs over the "
                "whole model; expected one coefficient per task, found one per group."
            )
        by_column: list[list[TensorScalars]] = []
        program = part.program
        for column in columns.values:
            method = replace(self._method, weights=tuple(column), scale=scale)
            method.check_models(self._n_tasks)
            program, scalars = method.resolve(part.statistics)
            by_column.append(scalars)
        if columns.shared:
            return program, by_column[0]
        return program, [by_column[group][place] for place, group in enumerate(part.groups)]

    def _gradients(self, grads: Weights | None) -> dict[str, Tensor]:
        """Gradients by the name of their leaf; those of tied tensors are added up."""
        if grads is None:
            found = {name: g for name, tensor in self._tensors.items() if (g := tensor.grad) is not None}
            if not found:
                raise ArgumentError(
                    "no live tensor has a .grad; expected gradients of the loss: call loss.backward() first, "
                    "or pass grads."
                )
            return found
        if isinstance(grads, Mapping):
            grads = {name: gradient for name, gradient in grads.items() if gradient is not None}
        given = named_tensors(grads, "grads")
        found = {}
        for leaf in self._live:
            own = [given.pop(name) for name in (leaf.name, *leaf.aliases) if name in given]
            if own:
                found[leaf.name] = own[0] if len(own) == 1 else torch.stack(own).sum(0)
        unknown = [name for name in given if given[name].is_floating_point()]
        if unknown or not found:
            raise ArgumentError(
                f"grads has {unknown[:5]}, which are no live floating-point tensors; expected names of the "
                "model."
                if unknown
                else "grads is empty; expected the gradient of at least one live tensor."
            )
        return found

    def _check_open(self) -> None:
        if not self._open or self._kept:
            why = "keep() made the weights permanent" if self._open else "the with block has ended"
            raise ArgumentError(f"this LiveMerge is over: {why}. Make a new one.")

    def _check_usable(self) -> None:
        self._check_open()
        for leaf, address in zip(self._live, self._addresses, strict=True):
            if leaf.base.data_ptr() != address:
                raise LayoutError(
                    f"tensor {leaf.name!r}: the live tensor has moved in memory since LiveMerge was made; "
                    "expected it where it was. Make a new LiveMerge after model.to(...) or the like."
                )

    @property
    def _tensors(self) -> dict[str, Tensor]:
        """The live tensors as they were given, by the name of their leaf."""
        if self._shards is not None:
            return self._shards.tensors
        return {leaf.name: leaf.base for leaf in self._live}

    def _touch(self) -> None:
        """Tells autograd that the tensors were written: kernels write past it."""
        for tensor in (*self._tensors.values(), *(leaf.base for leaf in self._live)):
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)


def _chosen(
    name: str, scale: float, parameters: Mapping[str, Any], n_tasks: int, deltas: bool
) -> ProgramMethod:
    """The method with weights of 1, which `set` replaces."""
    if "weights" in parameters:
        raise ArgumentError("LiveMerge takes no weights; expected them in set([...]).")
    method = make_method(name, scale=scale, **parameters)
    if not isinstance(method, ProgramMethod):
        raise ArgumentError(
            f"method {name!r} solves equations for whole tensors, which is no pass; expected another method."
        )
    if "weights" in method.unused:
        raise ArgumentError(
            f"method {name!r} has no weights that set([...]) could give; expected another method."
        )
    if method.info.needs_instruct:
        raise ArgumentError(
            f"method {name!r} compares with an instruct model, which LiveMerge does not take; expected "
            "another method, or tvfast.merge_ for each merge."
        )
    if deltas and not method.info.needs_base:
        raise ArgumentError(
            f"method {name!r} merges the models themselves, and deltas are task vectors; pass models=[...]."
        )
    method.check_models(n_tasks)
    return method


def _agreed(*weights: Any) -> AbstractContextManager[Description | None]:
    """Where ranks hold shards, the check that all make the same call; nothing otherwise."""
    if not any_sharded(*weights):
        return nullcontext()
    from tvfast.sharded.agreement import agreement_of

    return agreement_of(*weights)


def _shards(
    said: Description,
    method: ProgramMethod,
    role: str,
    model: Weights,
    base: Weights | None,
    tasks: Sequence[Weights],
) -> LiveShards:
    from tvfast.sharded.live import LiveShards

    beside = "a copy of the model" if base is None else "a base"
    said.add(
        "the method",
        f"LiveMerge of {len(tasks)} {role} and {beside} by {method.info.name}, {own_values(method)}",
    )
    return LiveShards.of(said, method, model, base, tasks)


def _leaves(
    model: Weights, base: Weights | None, operands: Sequence[Weights], role: str
) -> tuple[list[Leaf], list[Leaf]]:
    """The live tensors, and the rows to merge: the base's values with the tasks."""
    roles = [f"{role}[{k}]" for k in range(len(operands))]
    if base is not None:
        live = match(model, [base, *operands], ["base", *roles], first="model")
        rows = [
            replace(
                leaf,
                base=leaf.models[0],
                base_view=leaf.model_views[0],
                models=leaf.models[1:],
                model_views=leaf.model_views[1:],
            )
            for leaf in live
        ]
        return live, rows
    live = match(model, operands, roles)
    rows = []
    for leaf in live:
        copy = leaf.base.detach().clone(memory_format=torch.contiguous_format)
        rows.append(replace(leaf, base=copy, base_view=view(copy, leaf.name, "base", float64=True)))
    return live, rows


def _check_memory(live: Sequence[Leaf], rows: Sequence[Leaf], role: str) -> None:
    """Raise if a live tensor shares memory with another, or with the base or a task."""
    outs = [span(leaf.base, leaf.name, "model", row) for row, leaf in enumerate(live)]
    read = [span(leaf.base, leaf.name, "base", -1) for leaf in rows]
    read += [span(m, leaf.name, f"{role}[{k}]", -1) for leaf in rows for k, m in enumerate(leaf.models)]
    check_overlap(outs, read)
