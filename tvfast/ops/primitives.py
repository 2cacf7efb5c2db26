"""Primitives that are views of `measure` and `combine`: a work table of one or more tensors, one call."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from tvfast.errors import ArgumentError, DTypeError
from tvfast.ops import _check as check
from tvfast.ops._planes import CHUNK, pack, plane_view, unpack
from tvfast.ops._tracing import traceable
from tvfast.ops._views import DTYPES, check_plain, check_same, view
from tvfast.ops.raw import Backend, Wants, backend_for
from tvfast.program import (
    OPEN_CUT,
    Cross,
    Entry,
    Keep,
    ModelScalars,
    Moments,
    Program,
    RankQuery,
    ScoreMap,
    TensorScalars,
    Threshold,
    Tie,
    Weighting,
    WorkTable,
)

EVERYTHING = Wants.L1_BEFORE | Wants.L1 | Wants.GRAM | Wants.COUNTS | Wants.VOTES
"""All fields of `Moments` that need no scores."""

_TIES = {"hash": Tie.HASH, "index": Tie.INDEX, "ge": Tie.GE}
_VOTES = {"mass": False, "count": True}
_ZERO_SIGNS = {"plus": 1, "minus": -1, "none": 0}


@traceable
def threshold(
    tensor: Tensor | Sequence[Tensor],
    density: float,
    *,
    base: Tensor | Sequence[Tensor] | None = None,
    out: Tensor | None = None,
    n_threads: int = 0,
) -> Tensor:
    """The exact magnitude that the share `density` of largest entries reaches.

    t such that #(a > t) < k <= #(a >= t), k = int(density * n); a = |tensor|, or |tensor - base| in float32.

    Args:
        tensor: any shape, contiguous, float32, bfloat16 or float16; not modified. A list asks for each of its
            tensors by itself, in one call.
        density: share of entries kept, in [0, 1].
        base: subtracted first; one tensor, or one per tensor of the list, of the same shapes. Any of the
            dtypes.
        out: float32 of the result's shape; overwritten.
        n_threads: 0 is all cores that the process may use.

    Returns:
        float32, on the tensor's device: shape [], or [number of tensors] for a list; `out` if given.
        +inf where k = 0, so also for an empty tensor.

    Raises:
        ArgumentError: density outside [0, 1]; an empty list.
        ShapeError, DTypeError, DeviceError, LayoutError: `base` or `out` does not fit, or a tensor is not
            contiguous.
        BackendError: no backend can run the call.

    Notes:
        Exact: no sampling error, no rounding beyond the one subtraction. Independent of threads. A NaN ranks
        above infinity, so t is NaN where k or more entries are.

    Source: docs/numerics.md, Thresholds.
    """
    share = check.fraction("density", density)
    check.threads(n_threads)
    single = isinstance(tensor, Tensor)
    tensors = [tensor] if isinstance(tensor, Tensor) else check.models_of("tensor", tensor)
    bases: list[Tensor | None] = [None] * len(tensors)
    if base is not None:
        bases[:] = [base] if isinstance(base, Tensor) else check.models_of("base", base)
        if len(bases) != len(tensors):
            raise ArgumentError(f"base has {len(bases)} tensors for {len(tensors)}; expected one per tensor.")
    entries = []
    for group, (one, origin) in enumerate(zip(tensors, bases, strict=True)):
        suffix = "" if single else f"[{group}]"
        entry = _entry(origin, [one], name="", roles=(f"tensor{suffix}",), base_role=f"base{suffix}")
        entry.group = group
        entries.append(entry)
    result = torch.empty([] if single else [len(tensors)], dtype=torch.float32, device=tensors[0].device)
    if out is not None:
        inputs = [("tensor", one) for one in tensors] + [("base", one) for one in bases if one is not None]
        check.output(out, result, "the result", inputs, dtypes=[torch.float32])
        result = out.detach()
    counts = [int(share * entry.n_elements) for entry in entries]
    queries = [RankQuery(group, 0, k) for group, k in enumerate(counts) if k > 0]
    values = [math.inf] * len(entries)
    if queries:
        table = WorkTable(entries, n_models=1)
        answers = backend_for(table).thresholds(table, Keep.BAND, queries, n_threads)
        for query, answer in zip(queries, answers, strict=True):
            values[query.group] = answer.value
    result.copy_(torch.tensor(values[0] if single else values, dtype=torch.float32))
    return result if out is None else out


@traceable
def topk_mask(
    tensor: Tensor,
    density: float,
    *,
    base: Tensor | None = None,
    tie: str = "hash",
    seed: int = 0,
    name: str = "tensor",
    out: Tensor | None = None,
    n_threads: int = 0,
) -> Tensor:
    """Which entries belong to the share `density` of largest magnitude.

    a > t, or a = t and the tie rule says so; a = |tensor|, or |tensor - base| in float32, t = `threshold`.

    Args:
        tensor: any shape, contiguous, float32, bfloat16 or float16; not modified.
        density: share of entries kept, in [0, 1]; k = int(density * n).
        base: subtracted first; same shape, any of the dtypes.
        tie: what happens to entries equal to t. "hash": each is kept by a counter-based hash of its index, so
            that the kept share is k / n within sampling error and no region is favoured; "index": the first
            ones by flat index, exactly k in all; "ge": all of them.
        seed, name: key of the hash; `name` is the tensor's. Read for tie="hash" only. With the seed and name
            of a merge, and the model's index 0, the mask is that merge's.
        out: bool of the tensor's shape; overwritten.
        n_threads: 0 is all cores that the process may use.

    Returns:
        bool, the tensor's shape and device; `out` if given.

    Raises:
        ArgumentError: density outside [0, 1], a seed that is no integer. UnknownNameError: `tie`.
        ShapeError, DTypeError, DeviceError, LayoutError: `base` or `out` does not fit, or a tensor is not
            contiguous.
        BackendError: no backend can run the call.

    Notes:
        The same bits for any thread count. A NaN is always kept, beyond k if need be. Reads the tensor once
        for the mask and usually once or twice for the threshold; scratch is n / 8 bytes.

    Source: docs/numerics.md, Keep and Thresholds.
    """
    share = check.fraction("density", density)
    rule = check.choice("tie", tie, _TIES)
    check.threads(n_threads)
    seed = check.integer("seed", seed)
    check.instance("name", name, str)
    entry = _entry(base, [check.tensor("tensor", tensor)], name="", roles=("tensor",))
    if out is None:
        result = torch.empty(tensor.shape, dtype=torch.bool, device=tensor.device)
    else:
        inputs = [("tensor", tensor)] + ([] if base is None else [("base", base)])
        check.output(out, tensor, "tensor", inputs, dtypes=[torch.bool])
        result = out.detach()
    n = entry.n_elements
    k = int(share * n)
    if n > 0:
        words = torch.zeros(-(-n // 64), dtype=torch.int64, device=tensor.device)
        entry.masks = (plane_view(words, n),)
        table = WorkTable([entry], n_models=1)
        backend = backend_for(table)
        model = ModelScalars(key=_key(seed, name, 0))
        if k == 0:
            # below every magnitude, infinity included, so that nothing but NaN is in the band
            model.lo, model.hi, model.lo_cut = math.inf, -1.0, 0
        elif k < n:
            answer = backend.thresholds(table, Keep.BAND, [RankQuery(0, 0, k)], n_threads)[0]
            if math.isnan(answer.value):
                model.lo, model.hi, model.lo_cut = math.inf, -1.0, 0
            else:
                model.lo = answer.value
                model.lo_cut = _low_cut(backend, table, answer, k, rule, n_threads)
        program = Program(keep=Keep.BAND, tie=rule)
        backend.row_masks(table, program, [TensorScalars(models=[model])], n_threads)
        unpack(words, result.view(-1))
    return result if out is None else out


@traceable
def elect(
    deltas: Tensor | Sequence[Tensor],
    *,
    weights: float | Sequence[float] | None = None,
    vote: str = "mass",
    zero_sign: str = "plus",
    out: Tensor | None = None,
    n_threads: int = 0,
) -> Tensor:
    """The elected sign of every entry: the sign consensus of K task vectors.

    sign(sum_k x_k) for vote="mass", sign(sum_k sign(x_k)) for "count"; x_k = weights_k * deltas_k.

    Args:
        deltas: K tensors of one shape, or one tensor [K, ...]; contiguous, float32, bfloat16 or float16, also
            mixed; not modified.
        weights: finite; one, or one per task vector, to weigh its ballot; 1 by default.
        vote: "mass" or "count".
        zero_sign: the sign where the vote is zero, or NaN: "plus", "minus" or "none", which is 0.
        out: int8 of the shape of one task vector; overwritten.
        n_threads: 0 is all cores that the process may use. Read for vote="mass" only.

    Returns:
        int8 in {-1, 0, 1}, the shape and device of one task vector; `out` if given.

    Raises:
        ArgumentError: no task vector, wrong count of weights, a weight that is not finite.
        UnknownNameError: `vote` or `zero_sign`.
        ShapeError, DTypeError, DeviceError, LayoutError: the task vectors or `out` do not fit together.
        BackendError: no backend can run the call.

    Notes:
        The same decisions as inside `combine`: ballots and their sum are float32, in order. Scratch is at
        most 4 MiB. A mass vote is `combine` of the ballots with the default program, a count is torch.

    Source: Yadav et al. 2023, arXiv:2306.01708, section 3.1 (mass); the majority of signs is the count.
    """
    models = check.models_of("deltas", deltas)
    own = check.weights_of(weights, len(models))
    check.threads(n_threads)
    counting = check.choice("vote", vote, _VOTES)
    sign_of_zero = check.choice("zero_sign", zero_sign, _ZERO_SIGNS)
    roles = tuple(f"deltas[{k}]" for k in range(len(models)))
    _entry(None, models, name="", roles=roles)
    if out is None:
        result = torch.empty(models[0].shape, dtype=torch.int8, device=models[0].device)
    else:
        check.output(out, models[0], "deltas[0]", list(zip(roles, models, strict=True)), dtypes=[torch.int8])
        result = out.detach()
    flat = [model.detach().view(-1) for model in models]
    signs = result.view(-1)
    for start in range(0, signs.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        ballots = [model[part] for model in flat]
        total = _count(ballots, own) if counting else _mass(ballots, own, n_threads)
        sign = signs[part]
        sign.copy_(total > 0)
        sign.sub_((total < 0).to(torch.int8))
        if sign_of_zero:
            sign.masked_fill_(sign == 0, sign_of_zero)
    return result if out is None else out


@traceable
def combine(
    base: Tensor | None,
    models: Tensor | Sequence[Tensor],
    program: Program | None = None,
    scalars: TensorScalars | None = None,
    *,
    scores: Sequence[Tensor] | None = None,
    masks: Sequence[Tensor] | None = None,
    offset: int = 0,
    row: int | None = None,
    name: str = "",
    task_vectors: bool = False,
    out: Tensor | None = None,
    n_threads: int = 0,
) -> Tensor:
    """One merged tensor, in one pass over the base and every model.

    θ = θ₀ + scale * reduce_k(weight_k * gain_k * keep_k(θ_k - θ₀)) / divisor, with the stages that `program`
    names; without a base, the models themselves stand for the differences and nothing is added.

    Args:
        base: θ₀, any shape, contiguous, float32, bfloat16 or float16; or None. Modified only if it is `out`.
        models: K tensors θ_k of the base's shape, or one tensor [K, ...]; any of the dtypes, also mixed.
        program: one choice per stage; `Program()` keeps all and sums.
        scalars: the numbers of the stages, one `ModelScalars` per model; all defaults if None.
        scores: K float tensors of the base's shape, 0 or more: ranked in place of |θ_k - θ₀| by Keep.SCORE,
            multiplied into the weights by Weighting.SCORE.
        masks: K bool tensors of the base's shape, for Keep.MASK; packed into n / 8 bytes each.
        offset: index of the first element within the tensor that this one is a contiguous part of; it keys
            random draws and tie ranks, so that parts give the bytes of the whole.
        row: elements per row for the stages that rank; 0: the whole tensor is one row. Default: the last
            dimension of a matrix or higher, otherwise 0.
        name: the tensor's name, for messages only.
        task_vectors: the models are θ_k - θ₀ already: the base is added and not subtracted.
        out: the base's shape, any of the dtypes; overwritten. May be `base` or one of `models`, exactly.
        n_threads: 0 is all cores that the process may use.

    Returns:
        The base's dtype, or the first model's without a base; the base's shape and device; `out` if given.

    Raises:
        ArgumentError: counts that do not match, scores or masks that the keep stage wants and did not get,
            a scalar that is not finite or does not fit.
        ShapeError, DTypeError, DeviceError, LayoutError: tensors that do not fit together, are not
            contiguous, or overlap `out` in part.
        BackendError: no backend can run the call.

    Notes:
        float32 inside, each output rounded once. The same bytes for any thread count and any split by
        `offset`. Moves (K + 1) * n inputs and n outputs.

    Source: docs/numerics.md.
    """
    program = Program() if program is None else program
    check.threads(n_threads)
    entry, everything = _operands(base, models, program, scores, masks, offset, row, name)
    entry.task_vectors = task_vectors
    numbers = check.scalars_of(scalars, len(entry.models))
    like, like_role = everything[0][1], everything[0][0]
    if out is None:
        result = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    else:
        n_operands = len(entry.models) + (base is not None)
        replaceable = [one for _, one in everything[:n_operands]]
        check.output(out, like, like_role, everything, dtypes=list(DTYPES), may_be=replaceable, name=name)
        result = out
    entry.out = view(result, name, "out")
    if entry.n_elements > 0:
        table = WorkTable([entry], n_models=len(entry.models))
        backend_for(table).combine(table, program, [numbers], n_threads)
    if not result.is_inference():
        # backends write through the address, which autograd does not see
        torch.autograd.graph.increment_version(result)
    return result


@traceable
def measure(
    base: Tensor | None,
    models: Tensor | Sequence[Tensor],
    wants: Wants = EVERYTHING,
    program: Program | None = None,
    scalars: TensorScalars | None = None,
    *,
    scores: Sequence[Tensor] | None = None,
    masks: Sequence[Tensor] | None = None,
    offset: int = 0,
    row: int | None = None,
    name: str = "",
    task_vectors: bool = False,
    out: Moments | None = None,
    n_threads: int = 0,
) -> Moments:
    """Sums and counts over the task vectors of one tensor, after a keep stage.

    With t_k = keep_k(θ_k - θ₀): Σ|t_k|, Σ t_j t_k, the L1 norm before the stage, counts of kept, non-zero and
    non-finite entries, the sum of elected signs and the number of sign conflicts.

    Args:
        base, models, scores, masks, offset, row, name, task_vectors, n_threads: as in `combine`. Nothing
            is modified.
        wants: which fields to fill; the others are zero. `Wants.SQUARES` is the diagonal of the Gram matrix
            only.
        program: the keep stage and, for `elected`, the vote; the rest is not read.
        scalars: bands, keys and limits of the keep stage; gain and weight count only in a weighted vote.
        out: a `Moments` whose fields are overwritten.

    Returns:
        `Moments`: numbers on the host; `out` if given.

    Raises:
        As `combine`.

    Notes:
        Sums are float64 in an order-independent accumulator: the same bits for any thread count.

    Source: docs/numerics.md, Sums.
    """
    program = Program() if program is None else program
    check.threads(n_threads)
    check.instance("wants", wants, int)
    if out is not None:
        check.instance("out", out, Moments)
    entry, _ = _operands(base, models, program, scores, masks, offset, row, name)
    entry.task_vectors = task_vectors
    if wants & Wants.DOTS and not scores:
        raise ArgumentError(
            "wants asks for DOTS, products with scores, and there are none; pass one per model."
        )
    numbers = check.scalars_of(scalars, len(entry.models))
    table = WorkTable([entry], n_models=len(entry.models))
    moments = backend_for(table).measure(table, program, [numbers], wants, n_threads)[0]
    if out is None:
        return moments
    for one in fields(Moments):
        setattr(out, one.name, getattr(moments, one.name))
    return out


def _entry(
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    name: str,
    roles: Sequence[str],
    base_role: str = "base",
) -> Entry:
    """A row of a work table after the checks of shape, device, dtype and layout."""
    like, like_role = (models[0], roles[0]) if base is None else (check.tensor(base_role, base), base_role)
    base_view = None if base is None else view(base, name, base_role)
    views = []
    for model, role in zip(models, roles, strict=True):
        views.append(view(model, name, role))
        check_same(name, role, model, like_role, like)
    return Entry(name=name, models=tuple(views), base=base_view)


def _operands(
    base: Tensor | None,
    models: Tensor | Sequence[Tensor],
    program: Program,
    scores: Sequence[Tensor] | None,
    masks: Sequence[Tensor] | None,
    offset: int,
    row: int | None,
    name: str,
) -> tuple[Entry, list[tuple[str, Tensor]]]:
    """The checked row of `combine` and `measure`, and its tensors by role, base and models first."""
    check.instance("program", program, Program)
    found = check.models_of("models", models)
    roles = [f"models[{k}]" for k in range(len(found))]
    entry = _entry(base, found, name=name, roles=roles)
    everything = ([] if base is None else [("base", base)]) + list(zip(roles, found, strict=True))
    like_role, like = everything[0]
    weighs = program.weighting is Weighting.SCORE
    if program.weighting is Weighting.NEARNESS and len(found) != 2:
        raise ArgumentError(f"weighting=NEARNESS is of 2 models; found {len(found)}.")
    for what, reads, stage, given in (
        ("scores", program.reads_scores, "weighting=SCORE" if weighs else "keep=SCORE", scores),
        ("masks", program.keep is Keep.MASK, "keep=MASK", masks),
    ):
        if given is None and reads:
            raise ArgumentError(f"{stage} reads {what}, and there are none; pass one per model.")
        if given is not None and len(given) != len(found):
            raise ArgumentError(
                f"{what} has {len(given)} tensors for {len(found)} models; expected one per model."
            )
        for k, one in enumerate(given or ()):
            check_same(name, f"{what}[{k}]", check.tensor(f"{what}[{k}]", one), like_role, like)
            everything.append((f"{what}[{k}]", one))
    entry.scores = tuple(view(one, name, f"scores[{k}]") for k, one in enumerate(scores or ()))
    if weighs or program.cross is not Cross.NONE:
        entry.score_maps = (ScoreMap(),) * len(entry.scores)
    for k, one in enumerate(masks or ()):
        if one.dtype != torch.bool:
            raise DTypeError(f"masks[{k}] has dtype {str(one.dtype).removeprefix('torch.')}; expected bool.")
        check_plain(one, name, f"masks[{k}]")
    entry.masks = tuple(plane_view(pack(one), entry.n_elements) for one in masks or ())
    entry.offset = check.index("offset", offset)
    entry.row = (like.shape[-1] if like.dim() > 1 else 0) if row is None else check.index("row", row)
    return entry, everything


def _key(seed: int, name: str, model: int) -> int:
    """The key of docs/numerics.md; `methods` has its own copy, because neither layer may import the other."""
    digest = hashlib.blake2b(f"{seed}\0{name}\0{model}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _low_cut(backend: Backend, table: WorkTable, found: Threshold, k: int, tie: Tie, n_threads: int) -> int:
    """The tie cut that keeps k - n_greater of the entries equal to the threshold."""
    n_before = k - found.n_greater
    if tie is Tie.GE or n_before >= found.n_equal:
        return OPEN_CUT
    if tie is Tie.HASH:
        return (n_before << 32) // found.n_equal
    return backend.nth_equal(table, Keep.BAND, [(0, 0, found.value, n_before)], n_threads)[0]


def _mass(ballots: Sequence[Tensor], weights: Sequence[float], n_threads: int) -> Tensor:
    """sum_k w_k x_k, float32 [n]."""
    scalars = TensorScalars(models=[ModelScalars(weight=weight) for weight in weights])
    total = torch.empty(ballots[0].shape, dtype=torch.float32, device=ballots[0].device)
    return combine(None, ballots, scalars=scalars, out=total, n_threads=n_threads)


def _count(ballots: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_k sign(w_k x_k), int16 [n], or int32 for many models; the sign of a NaN is 0."""
    dtype = torch.int16 if len(ballots) < 2**15 else torch.int32
    total = torch.zeros(ballots[0].shape, dtype=dtype, device=ballots[0].device)
    for ballot, weight in zip(ballots, weights, strict=True):
        weighted = ballot if weight == 1.0 else ballot.to(torch.float32) * weight
        total += weighted > 0
        total -= (weighted < 0).to(dtype)
    return total
