"""Rows as tests: `pytest bench --benchmark-enable` times them, without it each runs once, untimed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.buffers import FULL_SIZE, Buffers, checksum, huge_page_share
from bench.registry import OPS, Row, rows_of
from bench.timing import time_row

_LITTLE = 2**18
_RECORDS = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tvfast bench")
    group.addoption("--elements", type=int, help=f"per tensor; {FULL_SIZE}, or {_LITTLE} without timing")
    group.addoption("--threads", type=int, nargs="+", default=[1, 2])
    group.addoption("--op", action="append", choices=OPS, help="all if none is given")
    group.addoption("--records", type=Path, help="write every row's samples or error to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RECORDS] = {"rows": []}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "time_it" not in metafunc.fixturenames:
        return
    config = metafunc.config
    chosen = rows_of(config.getoption("--op") or OPS)
    threads = config.getoption("--threads")
    pairs = [
        pytest.param(row, n, id=f"{row.name}-{n}")
        for row in chosen
        if row.op in metafunc.module.OPS_HERE
        for n in ([1] if row.single_thread else threads)
    ]
    metafunc.parametrize(("row", "n_threads"), pairs)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Limits first, slow baselines last. A file none of whose rows was chosen has one test without a row."""
    order = {"limit": 0, "baseline": 2}
    rows = [(row, item) for item in items if (row := _row(item)) is not None]
    items[:] = [item for row, item in sorted(rows, key=lambda pair: order.get(pair[0].op, 1))]


def _row(item: pytest.Item) -> Row | None:
    callspec = getattr(item, "callspec", None)
    row = None if callspec is None else callspec.params.get("row")
    return row if isinstance(row, Row) else None


@pytest.fixture(scope="session")
def buffers(pytestconfig: pytest.Config) -> Buffers:
    n_elements = pytestconfig.getoption("--elements")
    if n_elements is None:
        n_elements = _LITTLE if pytestconfig.getoption("--benchmark-disable") else FULL_SIZE
    made = Buffers(n_elements)
    tensors = [made.base, *made.models, made.out]
    pytestconfig.stash[_RECORDS]["inputs"] = {
        "n_elements": n_elements,
        "seed": made.seed,
        "checksum": checksum(made.base, made.models),
        "huge_page_share": huge_page_share(tensors),
    }
    return made


@pytest.fixture
def time_it(
    benchmark: Any, buffers: Buffers, row: Row, n_threads: int, pytestconfig: pytest.Config
) -> Callable[[], None]:
    def timed() -> None:
        benchmark.group = row.op
        pytestconfig.stash[_RECORDS]["rows"].append(time_row(benchmark, row, buffers, n_threads))

    return timed


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome: Any = yield
    row = _row(item)
    if row is not None and outcome.get_result().failed and call.excinfo is not None:
        error = f"{call.excinfo.type.__name__}: {call.excinfo.value}"
        threads = item.callspec.params["n_threads"]  # type: ignore[attr-defined]
        failed = {"row": row.name, "op": row.op, "threads": threads, "error": error}
        item.config.stash[_RECORDS]["rows"].append(failed)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--records")
    if path is not None:
        path.write_text(json.dumps(session.config.stash[_RECORDS]))
