"""Every row of the benchmark: what runs, what it moves, what it is compared with and what is asked of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

import tvfast
from bench import baselines, layers
from bench.buffers import N_MODELS, Buffers
from bench.limit import stream_pass
from bench.live import LIVE_PASS, live_set
from bench.traffic import Traffic
from tvfast.methods import TableStatistics, make_method
from tvfast.ops._views import view
from tvfast.ops.raw import Backend, backend_for
from tvfast.program import Entry, Keep, RankQuery, View, WorkTable

WEIGHTS = (0.5, 0.3, 0.2)
TIES_DENSITY = 0.2
SHARD_RUN = 2048
DELLA: dict[str, Any] = {"density": 0.5, "epsilon": 0.1}


class UnavailableError(RuntimeError):
    """A row cannot be measured with what is installed here."""


READ_4 = Traffic(N_MODELS + 1, 0)
MERGE = Traffic(N_MODELS + 1, 1)

LIMIT = "limit"


@dataclass(frozen=True, slots=True)
class Goal:
    """`against` is `LIMIT` (a share of it) or the name of another row (how many times faster)."""

    against: str
    at_least: float
    threads: int = 1


Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `make(buffers, n_threads)` prepares, outside the timing, what is timed."""

    name: str
    op: str
    make: Callable[[Buffers, int], Run]
    traffic: Traffic | None = MERGE  # None: the row is bound by arithmetic, not by memory
    goals: tuple[Goal, ...] = ()
    rounds: int = 7
    single_thread: bool = False
    in_place: bool = False  # the base is restored before every round, outside the timing


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """Peak memory of a call on top of its inputs; `new_tensors` outputs are allowed besides `SLACK`."""

    name: str
    function: str
    method: str
    new_tensors: int


@dataclass(frozen=True, slots=True)
class PeerRow:
    """A method of mergekit, run in its own environment."""

    name: str
    method: str


SLACK_BYTES = 64 * 2**20

# -- passes over a work table ---------------------------------------------------------------------------


def merge_table(buffers: Buffers) -> tuple[WorkTable, Backend]:
    """The inputs as a table of one tensor that is merged into `buffers.out`, and its backend."""
    entry = Entry(
        name="tensor",
        models=tuple(view(model, "tensor", "models") for model in buffers.models),
        base=view(buffers.base, "tensor", "base"),
        out=view(buffers.out, "tensor", "out"),
    )
    table = WorkTable([entry], N_MODELS)
    return table, backend_for(table)


def no_planes(n_bits: int) -> View:
    raise UnavailableError(f"a plane of {n_bits} bits was asked for; these rows run methods that need none")


def combine_row(method: str, **parameters: Any) -> Callable[[Buffers, int], Run]:
    """The merge pass alone: thresholds and every other scalar are found before the timing."""

    def make(buffers: Buffers, n_threads: int) -> Run:
        table, backend = merge_table(buffers)
        statistics = TableStatistics(backend, table, no_planes, n_threads)
        program, scalars = make_method(method, **parameters).resolve(statistics)
        return lambda: backend.combine(table, program, scalars, n_threads)

    return make


def shard_row(method: str, **parameters: Any) -> Callable[[Buffers, int], Run]:
    """The merge pass of a shard that has `SHARD_RUN` columns of a tensor of four times as many."""

    def make(buffers: Buffers, n_threads: int) -> Run:
        table, backend = merge_table(buffers)
        statistics = TableStatistics(backend, table, no_planes, n_threads)
        program, scalars = make_method(method, **parameters).resolve(statistics)
        entries = [replace(entry, run=SHARD_RUN, run_step=4 * SHARD_RUN) for entry in table.entries]
        shard = WorkTable(entries, N_MODELS)
        return lambda: backend.combine(shard, program, scalars, n_threads)

    return make


def threshold_queries(n_elements: int) -> list[RankQuery]:
    """The cut of TIES at its density, one per model."""
    return [RankQuery(0, k, baselines.n_kept(TIES_DENSITY, n_elements)) for k in range(N_MODELS)]


def thresholds_row(buffers: Buffers, n_threads: int) -> Run:
    table, backend = merge_table(buffers)
    queries = threshold_queries(buffers.n_elements)
    return lambda: backend.thresholds(table, Keep.BAND, queries, n_threads)


def verify_row(buffers: Buffers, n_threads: int) -> Run:
    """The counting pass that proves a threshold; its answer is compared with the search's before timing.

    Raises:
        UnavailableError: the build has no such entry point.
    """
    from tvfast import _C_cpu
    from tvfast.ops import cpp

    count = getattr(_C_cpu, "verify", None)
    if count is None:
        raise UnavailableError("tvfast._C_cpu.verify is not available in this build")
    table, backend = merge_table(buffers)
    found = backend.thresholds(table, Keep.BAND, threshold_queries(buffers.n_elements), n_threads)
    native = cpp._native_table(table)
    queries = [(0, k, threshold.value) for k, threshold in enumerate(found)]
    counted = [tuple(pair) for pair in count(native, queries, "", n_threads, 0)]
    expected = [(threshold.n_greater, threshold.n_equal) for threshold in found]
    if counted != expected:
        raise RuntimeError(f"verify counted {counted}; the threshold search says {expected}")
    return lambda: count(native, queries, "", n_threads, 0)


# -- whole calls ----------------------------------------------------------------------------------------


def merge_in_place(method: str, n_models: int = N_MODELS, **parameters: Any) -> Callable[[Buffers, int], Run]:
    def make(buffers: Buffers, n_threads: int) -> Run:
        models = buffers.models[:n_models]
        return lambda: tvfast.merge_(buffers.base, models, method=method, n_threads=n_threads, **parameters)

    return make


def merge_new(method: str, **parameters: Any) -> Callable[[Buffers, int], Run]:
    def make(buffers: Buffers, n_threads: int) -> Run:
        return lambda: tvfast.merge(
            buffers.base, buffers.models, method=method, n_threads=n_threads, **parameters
        )

    return make


def compare_row(buffers: Buffers, n_threads: int) -> Run:
    return lambda: tvfast.compare(buffers.base, buffers.models, n_threads=n_threads)


# -- baselines and the limit ----------------------------------------------------------------------------


def limit_row(traffic: Traffic) -> Callable[[Buffers, int], Run]:
    def make(buffers: Buffers, n_threads: int) -> Run:
        inputs, out = traffic.streams(buffers)
        return lambda: stream_pass(inputs, out, n_threads)

    return make


def torch_row(merge: Callable[..., Tensor], argument: Any) -> Callable[[Buffers, int], Run]:
    def make(buffers: Buffers, n_threads: int) -> Run:
        return lambda: merge(buffers.base, buffers.models, argument)

    return make


def chunked_task_arithmetic(buffers: Buffers, n_threads: int) -> Run:
    chunked = baselines.Chunked(buffers.n_elements, N_MODELS)
    return lambda: chunked.task_arithmetic(buffers.base, buffers.models, WEIGHTS, buffers.out)


def chunked_ties(buffers: Buffers, n_threads: int) -> Run:
    chunked = baselines.Chunked(buffers.n_elements, N_MODELS)
    return lambda: chunked.ties(buffers.base, buffers.models, TIES_DENSITY, buffers.out)


def method_rows() -> Iterator[Row]:
    """Methods without a target of their own, through `merge_`; parameters are those of typical recipes."""
    recipes: dict[str, dict[str, Any]] = {
        "task_arithmetic": {"weights": WEIGHTS},
        "dare_ties": {"density": 0.5},
        "dare_linear": {"density": 0.5},
        "breadcrumbs": {"density": 0.9, "gamma": 0.01},
        "sce": {"select_topk": 0.3},
    }
    for method, parameters in recipes.items():
        yield Row(f"{method} merge_", "methods", merge_in_place(method, **parameters), in_place=True)
    linear = merge_in_place("linear", weights=WEIGHTS)
    yield Row("linear merge_", "methods", linear, Traffic(N_MODELS, 1), in_place=True)
    slerp = merge_in_place("slerp", n_models=1, t=0.5)
    yield Row("slerp merge_", "methods", slerp, Traffic(2, 1), in_place=True)


SAMPLE_GEMMS = "torch sgemms of 64 samples"
VMAP = "torch.func.vmap, per-sample gradients"
BLOCK_GEMM = "torch sgemm of as many operations"
TWO_GEMMS = "torch, two sgemms"
AUTOGRAD = "torch autograd of trace(B X A X')"
PLAIN_GRADIENTS = "torch, 100 conjugate gradients"


def layer_rows() -> Iterator[Row]:
    """A layer of 4096 x 4096: 64 samples of 128 tokens, blocks of 64, dense factors; MaTS of 1024 x 1024."""
    yield Row("score", "score", layers.score_elementwise, Traffic(2, 1), goals=(Goal(LIMIT, 0),), rounds=9)
    goals = (Goal(SAMPLE_GEMMS, 1 / 1.5), Goal(VMAP, 3))
    yield Row("score layer", "score", layers.score_layer, None, goals, rounds=3)
    yield Row("kron, blocks of 64", "kron", layers.kron_blocks, None, (Goal(BLOCK_GEMM, 0.6),), rounds=9)
    goals = (Goal(TWO_GEMMS, 1 / 1.25), Goal(AUTOGRAD, 2.5))
    yield Row("kron, penalty", "kron", layers.penalty, None, goals, rounds=3, single_thread=True)
    goals = (Goal(TWO_GEMMS, 1 / 1.25), Goal(AUTOGRAD, 2.5))
    yield Row("penalty", "curvature", layers.penalty_of_module, None, goals, rounds=3, single_thread=True)
    yield Row(
        "mats, two models", "curvature", layers.mats_layer, None, (Goal(PLAIN_GRADIENTS, 3),), rounds=3,
        single_thread=True,
    )  # fmt: skip
    baseline: dict[str, Any] = {"op": "baseline", "traffic": None, "single_thread": True}
    yield Row(SAMPLE_GEMMS, make=layers.sample_gemms, rounds=3, **baseline)
    yield Row(VMAP, make=layers.vmapped_gradients, rounds=2, **baseline)
    yield Row(BLOCK_GEMM, make=layers.gemm_of_as_many_operations, rounds=9, **baseline)
    yield Row(TWO_GEMMS, make=layers.two_gemms, rounds=3, **baseline)
    yield Row(AUTOGRAD, make=layers.penalty_by_autograd, rounds=2, **baseline)
    yield Row(PLAIN_GRADIENTS, make=layers.mats_without_preconditioner, rounds=2, **baseline)


TA_FLOAT32 = "torch task arithmetic, float32"
TA_BFLOAT16 = "torch task arithmetic, bfloat16"
TA_CHUNKED = "torch task arithmetic, chunked"
TIES_KTHVALUE = "torch TIES, kthvalue"
TIES_ARGSORT = "torch TIES, argsort as in mergekit"
TIES_CHUNKED = "torch TIES, chunked + np.partition"
MERGEKIT_TIES = "mergekit ties"
MERGEKIT_DELLA = "mergekit della"

_TIES_PASS = (Goal(LIMIT, 0.36), Goal(LIMIT, 0.50, threads=2))
_TIES_WHOLE = (
    Goal(TIES_ARGSORT, 100),
    Goal(TIES_CHUNKED, 15),
    Goal(TIES_KTHVALUE, 0),
    Goal(MERGEKIT_TIES, 0),
)
_TIES: dict[str, Any] = {"density": TIES_DENSITY}

ROWS: tuple[Row, ...] = (
    Row("read 4", "limit", limit_row(READ_4), READ_4),
    Row("read 4 + write 1", "limit", limit_row(MERGE), MERGE),
    Row(
        "task_arithmetic pass",
        "combine",
        combine_row("task_arithmetic", weights=WEIGHTS),
        goals=(Goal(LIMIT, 0.90), Goal(TA_FLOAT32, 0), Goal(TA_BFLOAT16, 0), Goal(TA_CHUNKED, 0)),
        rounds=15,
    ),
    Row("ties pass, tie=ge", "combine", combine_row("ties", tie="ge", **_TIES), goals=_TIES_PASS, rounds=15),
    Row(
        "ties pass, tie=hash",
        "combine",
        combine_row("ties", tie="hash", **_TIES),
        goals=_TIES_PASS,
        rounds=15,
    ),
    Row("ties pass, tie=hash, columns", "combine", shard_row("ties", tie="hash", **_TIES), rounds=15),
    Row("verify pass", "thresholds", verify_row, READ_4, goals=(Goal(LIMIT, 0.85),), rounds=15),
    Row("thresholds", "thresholds", thresholds_row, READ_4, rounds=9),
    Row(
        "ties merge_, tie=ge",
        "ties",
        merge_in_place("ties", tie="ge", **_TIES),
        goals=_TIES_WHOLE,
        in_place=True,
    ),
    Row(
        "ties merge_, tie=hash",
        "ties",
        merge_in_place("ties", tie="hash", **_TIES),
        goals=_TIES_WHOLE,
        in_place=True,
    ),
    Row("ties merge, tie=hash", "ties", merge_new("ties", tie="hash", **_TIES)),
    Row(
        "della merge_",
        "della",
        merge_in_place("della", **DELLA),
        goals=(Goal(MERGEKIT_DELLA, 20),),
        rounds=5,
        in_place=True,
    ),
    *method_rows(),
    Row("compare", "compare", compare_row, READ_4),
    *layer_rows(),
    Row(
        "live set, 8 tasks, float32",
        "live",
        live_set("task_arithmetic"),
        LIVE_PASS,
        goals=(Goal(LIMIT, 0.85), Goal(LIMIT, 0.85, threads=2)),
        rounds=9,
    ),
    Row("live set, 8 tasks, ties", "live", live_set("ties", **_TIES), LIVE_PASS, rounds=5),
    Row(
        TA_FLOAT32,
        "baseline",
        torch_row(baselines.task_arithmetic_float32, WEIGHTS),
        rounds=3,
        single_thread=True,
    ),
    Row(
        TA_BFLOAT16,
        "baseline",
        torch_row(baselines.task_arithmetic_bfloat16, WEIGHTS),
        rounds=3,
        single_thread=True,
    ),
    Row(TA_CHUNKED, "baseline", chunked_task_arithmetic, rounds=5, single_thread=True),
    Row(TIES_CHUNKED, "baseline", chunked_ties, rounds=2, single_thread=True),
    Row(
        TIES_KTHVALUE,
        "baseline",
        torch_row(baselines.ties_kthvalue, TIES_DENSITY),
        rounds=1,
        single_thread=True,
    ),
    Row(
        TIES_ARGSORT,
        "baseline",
        torch_row(baselines.ties_argsort, TIES_DENSITY),
        rounds=1,
        single_thread=True,
    ),
)

PEER_ROWS = (PeerRow(MERGEKIT_TIES, "ties"), PeerRow(MERGEKIT_DELLA, "della"))

MEMORY_ROWS = tuple(
    MemoryRow(f"{method} {function}", function, method, new_tensors=function == "merge")
    for method in ("task_arithmetic", "ties", "della")
    for function in ("merge_", "merge")
)

_METHODS = ("tests/methods/test_formulas.py", "tests/methods/test_methods.py")
_TIES_TESTS = ("tests/methods/test_dialect_traps.py", "tests/methods/test_ties_rows.py")
_COMBINE = ("tests/ops/test_combine.py", "tests/ops/test_random.py")
_THRESHOLDS = ("tests/ops/test_thresholds.py",)
_MEASURE = ("tests/ops/test_measure.py",)

GATES: dict[str, tuple[str, ...]] = {
    "limit": ("tests/bench",),
    "combine": (*_COMBINE, *_TIES_TESTS),
    "thresholds": _THRESHOLDS,
    "ties": (*_COMBINE, *_THRESHOLDS, *_METHODS, *_TIES_TESTS),
    "della": (*_COMBINE, *_MEASURE, *_METHODS),
    "methods": (*_COMBINE, *_THRESHOLDS, *_MEASURE, *_METHODS),
    "compare": (*_MEASURE, "tests/methods/test_compare.py"),
    "score": ("tests/ops/test_scores.py",),
    "kron": ("tests/ops/test_kron.py",),
    "curvature": ("tests/curvature/test_penalty.py", "tests/factors"),
    "live": (*_COMBINE, "tests/live"),
    "memory": (*_METHODS, "tests/methods/test_merge_api.py"),
}
"""The tests that must pass before an op is timed."""

LEFT_TO_MAKE_TEST = ("tests/ops/test_combine.py::test_every_combination_of_stages",)
"""Minutes of programs that no row runs."""

OPS = tuple(GATES)


def rows_of(ops: Sequence[str]) -> list[Row]:
    """The rows of these ops, in table order, with the torch baselines that they are compared with."""
    chosen = [row for row in ROWS if row.op in ops]
    wanted = against(chosen)
    return [row for row in ROWS if row in chosen or row.name in wanted]


def peers_of(ops: Sequence[str]) -> list[PeerRow]:
    """The mergekit rows that the rows of these ops are compared with."""
    wanted = against([row for row in ROWS if row.op in ops])
    return [row for row in PEER_ROWS if row.name in wanted]


def against(rows: Sequence[Row]) -> set[str]:
    return {goal.against for row in rows for goal in row.goals} - {LIMIT}
