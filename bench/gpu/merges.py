"""Rows of one tensor of `--elements` parameters: base and three models in bfloat16, merged into a fourth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import baselines as plain
from bench.buffers import N_MODELS
from bench.gpu import baselines
from bench.gpu.limits import Cost
from bench.gpu.registry import Goal, GpuRow, Place, Ready, against_limit
from bench.registry import DELLA, TIES_DENSITY, WEIGHTS, threshold_queries
from tvfast.methods import TableStatistics, make_method
from tvfast.ops._views import view
from tvfast.ops.raw import Wants
from tvfast.program import (
    Entry,
    Keep,
    ModelScalars,
    Program,
    RankQuery,
    TensorScalars,
    Tie,
    WorkTable,
)

Make = Callable[[Place], Ready]

_DARE_DENSITY = 0.5
_SLOWEST = 2 * 10**8
_TIES: dict[str, Any] = {"density": TIES_DENSITY}

# -- what must be moved -----------------------------------------------------------------------------------


def _read_all(place: Place) -> int:
    return (N_MODELS + 1) * place.inputs.n_bytes


def merge_cost(place: Place) -> Cost:
    return Cost(_read_all(place), place.inputs.n_bytes)


def two_pass_cost(place: Place) -> Cost:
    """4N + 6 bytes per parameter: everything once to select, once to merge."""
    return Cost(2 * _read_all(place), place.inputs.n_bytes)


# -- through a backend ------------------------------------------------------------------------------------


def _resolved(place: Place, table: WorkTable, method: str, parameters: dict[str, Any]) -> Any:
    statistics = TableStatistics(place.backend, table, place.inputs.plane, 0)
    return make_method(method, **parameters).resolve(statistics)


def merge_pass(method: str, **parameters: Any) -> Make:
    """The merge alone: thresholds and every other scalar are found before."""

    def make(place: Place) -> Ready:
        if method == "ties":
            place.verb("thresholds")
        table = place.inputs.table()
        program, scalars = _resolved(place, table, method, parameters)
        combine = place.verb("combine")
        return Ready(lambda: combine(table, program, scalars), merge_cost(place), place.inputs.out)

    return make


def two_passes(tie: str) -> Make:
    """Exact thresholds, which the host waits for, and the merge."""

    def make(place: Place) -> Ready:
        place.verb("thresholds")
        table, combine = place.inputs.table(), place.verb("combine")

        def run() -> None:
            combine(table, *_resolved(place, table, "ties", {"tie": tie, **_TIES}))

        return Ready(run, two_pass_cost(place), place.inputs.out)

    return make


def _trimmed(place: Place, tie: str) -> Any:
    """The same merge prepared to run without waiting for the device."""
    trimmed = place.verb("trimmed")
    table = place.inputs.table()
    method = make_method("ties", tie=tie, **_TIES)
    queries = threshold_queries(place.inputs.n_elements)
    return trimmed(table, method.program(), method.plain_scalars(table), queries)


def without_waiting(tie: str) -> Make:
    def make(place: Place) -> Ready:
        prepared = _trimmed(place, tie)
        return Ready(prepared.run, two_pass_cost(place), place.inputs.out)

    return make


def as_a_graph(place: Place) -> Ready:
    """The launches of `without_waiting`, captured once and replayed."""
    prepared = _trimmed(place, "hash")
    if place.device.type != "cuda":
        return Ready(prepared.run, two_pass_cost(place), place.inputs.out)
    prepared.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepared.run()
    return Ready(graph.replay, two_pass_cost(place), place.inputs.out)


def thresholds(place: Place) -> Ready:
    search, table = place.verb("thresholds"), place.inputs.table()
    queries = threshold_queries(place.inputs.n_elements)
    return Ready(lambda: search(table, Keep.BAND, queries), Cost(_read_all(place)))


def verify(place: Place) -> Ready:
    """The counts that prove a right guess."""
    count, table = place.verb("verify"), place.inputs.table()
    found = place.verb("thresholds")(table, Keep.BAND, threshold_queries(place.inputs.n_elements))
    queries = [(0, k, threshold.value) for k, threshold in enumerate(found)]
    return Ready(lambda: count(table, queries), Cost(_read_all(place)))


def della(place: Place) -> Ready:
    """All of it: ranks of every row, draws into bit planes, and the merge."""
    combine = place.verb("combine")

    def run() -> None:
        table = place.inputs.table(row=place.inputs.columns)  # of its own, as its bit planes are
        combine(table, *_resolved(place, table, "della", DELLA))

    return Ready(run, two_pass_cost(place), place.inputs.out)


def slerp(place: Place) -> Ready:
    """Norms and the inner product, which the host waits for, and the merge of two tensors."""
    table, combine = place.inputs.pair(), place.verb("combine")

    def run() -> None:
        combine(table, *_resolved(place, table, "slerp", {"t": 0.5}))

    n_bytes = place.inputs.n_bytes
    return Ready(run, Cost(4 * n_bytes, n_bytes), place.inputs.out)


def gram(place: Place) -> Ready:
    measure, table = place.verb("measure"), place.inputs.table()
    scalars = [TensorScalars(models=[ModelScalars() for _ in range(N_MODELS)])]
    run = lambda: measure(table, Program(), scalars, Wants.GRAM)  # noqa: E731
    return Ready(run, Cost(_read_all(place)))


def score(place: Place) -> Ready:
    """|g θ| of bfloat16 gradient and weight, added to float32."""
    inputs = place.inputs
    total = torch.zeros(inputs.base.shape, device=place.device)
    entry = Entry(
        name="tensor",
        models=(view(inputs.models[1], "tensor", "weight"),),
        scores=(view(inputs.models[0], "tensor", "gradient"),),
        out=view(total, "tensor", "out"),
    )
    table = WorkTable([entry], 1)
    accumulate = place.verb("score")
    scalars = [TensorScalars(models=[ModelScalars()])]
    n = inputs.n_bytes
    return Ready(lambda: accumulate(table, scalars), Cost(4 * n, 2 * n))


def masked(place: Place) -> Ready:
    """Task vectors where their float32 importance is in the top fifth, the thresholds found before."""
    inputs = place.inputs
    table = inputs.table(scores=True)
    found = _score_thresholds(inputs.scores)
    models = [ModelScalars(lo=float(threshold)) for threshold in found]
    program = Program(keep=Keep.SCORE, tie=Tie.GE)
    combine, scalars = place.verb("combine"), [TensorScalars(models=models)]
    cost = Cost(_read_all(place) + N_MODELS * 2 * inputs.n_bytes, inputs.n_bytes)
    return Ready(lambda: combine(table, program, scalars), cost, inputs.out)


def score_thresholds(place: Place) -> Ready:
    """The exact threshold of each of three float32 importances."""
    search, table = place.verb("thresholds"), place.inputs.table(scores=True)
    k = plain.n_kept(TIES_DENSITY, place.inputs.n_elements)
    queries = [RankQuery(0, model, k) for model in range(N_MODELS)]
    cost = Cost(N_MODELS * 2 * place.inputs.n_bytes)
    return Ready(lambda: search(table, Keep.SCORE, queries), cost)


def _score_thresholds(scores: list[Tensor]) -> list[Tensor]:
    """Of a sample: what the value is does not matter to the time of the merge."""
    return [torch.quantile(score.view(-1)[: 2**20], 1 - TIES_DENSITY) for score in scores]


# -- in torch ---------------------------------------------------------------------------------------------


def torch_merge(merge: Callable[..., Tensor], *arguments: Any, compiled: bool = False) -> Make:
    def make(place: Place) -> Ready:
        inputs = place.inputs
        function = baselines.compiled(merge, place.device) if compiled else merge
        return Ready(lambda: function(inputs.base, inputs.models, *arguments))

    return make


def compiled_ties_pass(place: Place) -> Ready:
    inputs = place.inputs
    found = baselines.topk_thresholds(inputs.base, inputs.models, TIES_DENSITY)
    function = baselines.compiled(baselines.ties_trimmed, place.device)
    return Ready(lambda: function(inputs.base, inputs.models, found))


def compiled_masked(place: Place) -> Ready:
    inputs = place.inputs
    found = _score_thresholds(inputs.scores)
    function = baselines.compiled(baselines.masked_by_scores, place.device)
    return Ready(lambda: function(inputs.base, inputs.models, inputs.scores, found))


def torch_score(compiled: bool) -> Make:
    def make(place: Place) -> Ready:
        gradient, weight = place.inputs.models[:2]
        total = torch.zeros(weight.shape, device=place.device)
        function: Any = baselines.importance
        if compiled:
            function = baselines.compiled(function, place.device)
        return Ready(lambda: function(total, gradient, weight))

    return make


def torch_slerp(place: Place) -> Ready:
    inputs = place.inputs
    return Ready(lambda: baselines.slerp(inputs.base, inputs.models[0], 0.5))


# -- the rows ---------------------------------------------------------------------------------------------

TA_FLOAT32, TA_BFLOAT16 = "torch task arithmetic, float32", "torch task arithmetic, bfloat16"
TA_COMPILED, TA_MERGEKIT = "torch.compile task arithmetic", "mergekit's formulas, task arithmetic"
KTHVALUE, TOPK = "torch TIES, kthvalue", "torch TIES, topk"
TIES_COMPILED, TIES_COMPILED_PASS = "torch.compile TIES, topk", "torch.compile TIES, thresholds given"
ARGSORT, PEFT = "mergekit's formulas, TIES by argsort", "peft's formulas, TIES by topk"
DARE, DELLA_TORCH, SLERP, GRAM = "torch DARE", "torch DELLA, argsort", "torch slerp", "torch Gram matrix"
SCORE, SCORE_COMPILED = "torch |g θ|", "torch.compile |g θ|"
MASKED_COMPILED = "torch.compile score mask, thresholds given"

_TA_PASS = (against_limit(0.88), *map(Goal, (TA_FLOAT32, TA_BFLOAT16, TA_COMPILED, TA_MERGEKIT)))
_TIES_PASS = (against_limit(0.88), Goal(TIES_COMPILED_PASS))
_EXACT = (
    against_limit(0.75),
    Goal(KTHVALUE, 20),
    Goal(TOPK, 20),
    Goal(TIES_COMPILED, 5),
    Goal(ARGSORT),
    Goal(PEFT),
)

ROWS: tuple[GpuRow, ...] = (
    GpuRow(TA_FLOAT32, torch_merge(plain.task_arithmetic_float32, WEIGHTS), baseline=True),
    GpuRow(TA_BFLOAT16, torch_merge(plain.task_arithmetic_bfloat16, WEIGHTS), baseline=True),
    GpuRow(TA_COMPILED, torch_merge(baselines.task_arithmetic, WEIGHTS, compiled=True), baseline=True),
    GpuRow(TA_MERGEKIT, torch_merge(baselines.stacked_task_arithmetic, WEIGHTS), baseline=True),
    GpuRow(TIES_COMPILED_PASS, compiled_ties_pass, baseline=True),
    GpuRow(TIES_COMPILED, torch_merge(baselines.ties_topk, TIES_DENSITY, compiled=True), baseline=True),
    GpuRow(DARE, torch_merge(baselines.dare, _DARE_DENSITY), baseline=True),
    GpuRow(DELLA_TORCH, torch_merge(baselines.della, *DELLA.values()), baseline=True, most_elements=_SLOWEST),
    GpuRow(SLERP, torch_slerp, baseline=True),
    GpuRow(GRAM, torch_merge(baselines.gram), baseline=True),
    GpuRow(SCORE, torch_score(False), baseline=True),
    GpuRow(SCORE_COMPILED, torch_score(True), baseline=True),
    GpuRow(MASKED_COMPILED, compiled_masked, baseline=True),
    GpuRow("task arithmetic", merge_pass("task_arithmetic", weights=WEIGHTS), _TA_PASS),
    GpuRow("ties, thresholds given, tie=ge", merge_pass("ties", tie="ge", **_TIES), _TIES_PASS),
    GpuRow("ties, thresholds given, tie=hash", merge_pass("ties", tie="hash", **_TIES), _TIES_PASS),
    GpuRow("ties, exact, tie=ge", two_passes("ge"), _EXACT),
    GpuRow("ties, exact, tie=hash", two_passes("hash"), _EXACT),
    GpuRow("ties, exact, without waiting", without_waiting("hash"), _EXACT),
    GpuRow("ties, exact, guessed, tie=ge", without_waiting("ge"), _EXACT),
    GpuRow("ties, exact, as a CUDA graph", as_a_graph, _EXACT),
    GpuRow("thresholds", thresholds, (against_limit(),)),
    GpuRow("verify", verify, (against_limit(),)),
    GpuRow("dare", merge_pass("dare_linear", density=_DARE_DENSITY), (against_limit(), Goal(DARE))),
    GpuRow("della", della, (against_limit(), Goal(DELLA_TORCH))),
    GpuRow("slerp", slerp, (against_limit(), Goal(SLERP))),
    GpuRow("compare (Gram)", gram, (against_limit(), Goal(GRAM))),
    GpuRow("|g θ| accumulated", score, (against_limit(0.80), Goal(SCORE), Goal(SCORE_COMPILED))),
    GpuRow("|g θ| mask, thresholds given", masked, (against_limit(0.80), Goal(MASKED_COMPILED))),
    GpuRow("|g θ| mask, thresholds", score_thresholds, (against_limit(),)),
    # Seconds each, so last: what runs out of time is these.
    GpuRow(TOPK, torch_merge(baselines.ties_topk, TIES_DENSITY), baseline=True),
    GpuRow(PEFT, torch_merge(baselines.ties_peft, TIES_DENSITY), baseline=True),
    GpuRow(ARGSORT, torch_merge(plain.ties_argsort, TIES_DENSITY), baseline=True),
    GpuRow(
        KTHVALUE,
        torch_merge(plain.ties_kthvalue, TIES_DENSITY),
        baseline=True,
        most_elements=_SLOWEST,
    ),
)
