"""What the compiled modules take and return: tuples of numbers for tables, programs, scalars and moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tvfast.errors import ArgumentError
from tvfast.program import Keep, Moments, Program, RankQuery, TensorScalars, View, WorkTable

if TYPE_CHECKING:
    from tvfast.factored import BlockDiagonal, FactoredScore, KroneckerProduct, ProductPanel


def _pair(view: View | None) -> tuple[int, int]:
    return (0, 0) if view is None else (view.address, int(view.dtype))


def native_table(module: Any, table: WorkTable) -> Any:
    """The `Table` of a compiled module with the entries of a work table."""
    native = module.Table(table.n_models)
    for entry in table.entries:
        native.add(
            _pair(entry.base),
            [_pair(view) for view in entry.models],
            _pair(entry.out),
            [_pair(view) for view in entry.scores],
            [(m.scale, m.shift, m.floor) for m in entry.score_maps],
            [view.address for view in entry.masks],
            entry.n_elements,
            entry.row,
            entry.offset,
            entry.run,
            entry.run_step,
            entry.group,
            entry.group_offset,
            entry.task_vectors,
        )
    return native


def program_tuple(program: Program) -> tuple[int, ...]:
    """The choices of a program, in the order of its fields."""
    return (
        int(program.keep),
        int(program.tie),
        int(program.gain),
        int(program.vote),
        int(program.ballot),
        int(program.zero_sign),
        int(program.members),
        int(program.reduce),
        int(program.divisor),
        int(program.cross),
        int(program.weighting),
    )


def scalar_tuples(scalars: Sequence[TensorScalars]) -> tuple[list[Any], list[Any]]:
    """The scalars of every tensor, and those of every model of every tensor."""
    tensors = [(s.scale, s.majority, s.divisor_floor, s.divisor_fill) for s in scalars]
    models = [
        (
            m.weight,
            m.gain,
            m.lo,
            m.hi,
            m.lo_cut,
            m.hi_cut,
            m.limit,
            m.limit_step,
            m.prob,
            m.prob_step,
            m.rank_lo,
            m.rank_hi,
            m.key,
        )
        for s in scalars
        for m in s.models
    ]
    return tensors, models


def moments_of(answer: Any, n_models: int) -> Moments:
    """Moments from the tuple that a compiled module gives for one entry."""
    l1_before, l1, upper, n_kept, n_nonzero, n_nonfinite = answer[:6]
    n_base_nonfinite, elected, n_conflict, dots, n_alone = answer[6:]
    gram = [[upper[min(a, b) * n_models + max(a, b)] for b in range(n_models)] for a in range(n_models)]
    return Moments(
        l1_before=l1_before,
        l1=l1,
        gram=gram,
        n_kept=n_kept,
        n_nonzero=n_nonzero,
        n_nonfinite=n_nonfinite,
        n_base_nonfinite=n_base_nonfinite,
        elected=elected,
        n_conflict=n_conflict,
        dots=dots,
        n_alone=n_alone,
    )


def native_score(module: Any, score: FactoredScore) -> Any:
    """The `FactoredScore` of a compiled module."""
    samples = [
        (_pair(one.gradients), _pair(one.activations), one.n_tokens, one.weight) for one in score.samples
    ]
    return module.FactoredScore(
        _pair(score.model),
        _pair(score.base),
        score.out.address,
        score.n_out,
        score.n_in,
        score.bias_column,
        samples,
    )


def native_product(module: Any, product: KroneckerProduct) -> Any:
    """The `KroneckerProduct` of a compiled module."""
    return module.KroneckerProduct(
        _pair(product.x),
        _pair(product.out),
        product.n_out,
        product.n_in,
        _factor_tuple(product.a),
        _factor_tuple(product.b),
        product.scale,
        product.accumulate,
    )


def panel_tuple(panel: ProductPanel) -> tuple[Any, ...]:
    """A panel's rows of X, of the product and of the output, its size, and what becomes of it."""
    return (
        (*_pair(panel.x), panel.x_stride),
        (*_pair(panel.product), panel.product_stride),
        (*_pair(panel.out), panel.out_stride),
        panel.n_rows,
        panel.n_columns,
        panel.scale,
        panel.accumulate,
    )


def _factor_tuple(factor: BlockDiagonal) -> tuple[list[tuple[int, int]], int, int, bool]:
    return [_pair(block) for block in factor.blocks], factor.side, factor.block, factor.packed


def check_outputs(table: WorkTable) -> None:
    """Raises ArgumentError unless every entry has an output."""
    for entry in table.entries:
        if entry.out is None:
            raise ArgumentError(f"tensor {entry.name!r}: combine needs an output; found out=None.")


def check_ranked(keep: Keep) -> None:
    """Raises ArgumentError unless keys of the stage can be ranked."""
    if keep not in (Keep.BAND, Keep.SCORE, Keep.VARIANCE):
        raise ArgumentError(f"keep must be BAND, SCORE or VARIANCE to rank; found {keep.name}.")


def check_ranks(table: WorkTable, queries: Sequence[RankQuery]) -> None:
    """Raises ArgumentError for a k that is not in [1, number of entries of the group]."""
    sizes = [0] * table.n_groups
    for entry in table.entries:
        sizes[entry.group] += entry.n_elements
    for query in queries:
        n = sizes[query.group] if 0 <= query.group < len(sizes) else 0
        if not 1 <= query.k <= n:
            raise ArgumentError(
                f"group {query.group}, model {query.model}: k must be in [1, {n}]; found {query.k}."
            )
