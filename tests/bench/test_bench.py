"""The benchmark harness on tiny inputs: what it compares is comparable, and it refuses what it must."""

from __future__ import annotations

import json
import sys
from functools import reduce
from pathlib import Path

import pytest
import torch

import tvfast
from bench import baselines, suite
from bench.buffers import COLUMNS, Buffers, checksum, huge_page_share, plain_inputs
from bench.limit import stream_pass
from bench.registry import GATES, LIMIT, OPS, PEER_ROWS, ROWS, MemoryRow, against, rows_of
from bench.suite import GateError, gate, main
from bench.table import judged, table

N = 4 * COLUMNS
DENSITY = 0.2


@pytest.fixture(scope="module")
def buffers() -> Buffers:
    return Buffers(N)


@pytest.fixture
def passing(tmp_path: Path) -> str:
    """A test file that passes."""
    path = tmp_path / "test_passing.py"
    path.write_text("def test_passes():\n    pass\n")
    return str(path)


@pytest.fixture
def failing(tmp_path: Path) -> str:
    """A test file that fails."""
    path = tmp_path / "test_failing.py"
    path.write_text("def test_fails():\n    assert False\n")
    return str(path)


# -- inputs ---------------------------------------------------------------------------------------------


def test_inputs_depend_on_seed_and_place_only(buffers: Buffers) -> None:
    plain = checksum(*plain_inputs(N))
    assert plain == checksum(buffers.base, buffers.models)
    assert plain != checksum(*plain_inputs(N, seed=1))


def test_inputs_have_the_stated_spread(buffers: Buffers) -> None:
    base = buffers.base.double()
    assert float(base.std()) == pytest.approx(0.02, rel=0.02)
    for model in buffers.models:
        assert float((model.double() - base).std()) == pytest.approx(1e-3, rel=0.02)


def test_tensors_lie_on_huge_page_boundaries(buffers: Buffers) -> None:
    tensors = [buffers.base, buffers.pristine, buffers.out, *buffers.models]
    assert [tensor.data_ptr() % 2**21 for tensor in tensors] == [0] * len(tensors)
    share = huge_page_share(tensors)
    assert share is None or 0 <= share <= 1
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(place, 16) for place in line.split(maxsplit=1)[0].split("-"))
        if any(begin <= tensor.data_ptr() < end for tensor in tensors):
            assert line.split()[1] == "rw-p", "shared memory gets no huge pages"


def test_restore_undoes_an_in_place_merge(buffers: Buffers) -> None:
    before = checksum(buffers.base, buffers.models)
    tvfast.merge_(buffers.base, buffers.models, method="task_arithmetic")
    assert checksum(buffers.base, buffers.models) != before
    buffers.restore()
    assert checksum(buffers.base, buffers.models) == before


@pytest.mark.parametrize("n_elements", [0, 1, COLUMNS + 1, -COLUMNS])
def test_sizes_are_whole_rows(n_elements: int) -> None:
    with pytest.raises(ValueError, match=f"n_elements is {n_elements}; expected"):
        Buffers(n_elements)


# -- the limit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("n_read", [1, 2, 3, 4])
def test_the_limit_reads_and_writes_everything(buffers: Buffers, n_read: int, n_threads: int) -> None:
    inputs = [buffers.base, *buffers.models][:n_read]
    buffers.out.fill_(float("nan"))
    stream_pass(inputs, buffers.out, n_threads)
    expected = reduce(torch.bitwise_xor, [tensor.view(torch.int16) for tensor in inputs])
    assert buffers.out.view(torch.int16).equal(expected)
    before = stream_pass(inputs, None, n_threads)
    for tensor in inputs:
        last = tensor.view(torch.int16).view(-1)[-1:]
        last.bitwise_xor_(1)
        assert stream_pass(inputs, None, n_threads) != before
        last.bitwise_xor_(1)


def test_the_limit_refuses_what_it_would_overrun(buffers: Buffers) -> None:
    odd = torch.zeros(33, dtype=torch.bfloat16)
    for inputs, out, n_threads in [
        ([odd], None, 1),
        ([buffers.base, odd], None, 1),
        ([buffers.base], odd, 1),
        ([], buffers.out, 1),
        ([buffers.base] * 10, None, 1),
        ([buffers.base], None, 0),
    ]:
        with pytest.raises(ValueError, match="expected 1 to 9 inputs"):
            stream_pass(inputs, out, n_threads)
    with pytest.raises(ValueError, match="expected an address"):
        stream_pass([buffers.base[0, :32]], buffers.out.view(-1)[1:33], 1)


# -- baselines ------------------------------------------------------------------------------------------


def test_ties_baselines_equal_ties(buffers: Buffers) -> None:
    expected = tvfast.merge(buffers.base, buffers.models, method="ties", density=DENSITY, tie="ge")
    assert not expected.equal(buffers.base)
    assert baselines.ties_kthvalue(buffers.base, buffers.models, DENSITY).equal(expected)
    chunked = baselines.Chunked(N, 3)
    chunked.ties(buffers.base, buffers.models, DENSITY, buffers.out)
    assert buffers.out.equal(expected)


def test_the_argsort_baseline_trims_as_the_others() -> None:
    base = torch.zeros(2, COLUMNS, dtype=torch.bfloat16)
    patterns = torch.randperm(2 * COLUMNS).to(torch.int16) + 8192  # distinct, positive, finite
    model = patterns.view(torch.bfloat16).view(2, COLUMNS) * (torch.arange(COLUMNS) % 2 * 2 - 1)
    merged = baselines.ties_argsort(base, [model], DENSITY)
    assert int((merged != 0).sum()) == int(DENSITY * model.numel())
    assert merged.equal(baselines.ties_kthvalue(base, [model], DENSITY))


def test_task_arithmetic_baselines_equal_task_arithmetic(buffers: Buffers) -> None:
    weights = (0.5, 0.25, 0.125)
    exact = buffers.base.double() + sum(
        w * (m.double() - buffers.base.double()) for w, m in zip(weights, buffers.models, strict=True)
    )
    ulp = 2.0**-8 * exact.abs() + 2.0**-24  # bfloat16, and float32 cancellation near zero
    ours = tvfast.merge(buffers.base, buffers.models, method="task_arithmetic", weights=weights)
    whole = baselines.task_arithmetic_float32(buffers.base, buffers.models, weights)
    chunked = baselines.Chunked(N, 3)
    chunked.task_arithmetic(buffers.base, buffers.models, weights, buffers.out)
    for merged in (ours, whole, buffers.out):
        assert bool(((merged.double() - exact).abs() <= ulp).all())
    rough = baselines.task_arithmetic_bfloat16(buffers.base, buffers.models, weights)
    assert bool(((rough.double() - exact).abs() <= 4 * 2.0**-8 * (exact.abs() + 0.01)).all())


@pytest.mark.parametrize("n_elements", [COLUMNS, 2**18 + 3 * COLUMNS])
def test_chunks_cover_everything_once(n_elements: int) -> None:
    places = [place for place, _ in baselines.Chunked(n_elements, 1)._places()]
    assert [i for place in places for i in range(place.start, place.stop)] == list(range(n_elements))


# -- the registry ---------------------------------------------------------------------------------------


def test_every_row_is_named_once_and_compared_with_rows_that_exist() -> None:
    names = [row.name for row in ROWS] + [row.name for row in PEER_ROWS]
    assert len(set(names)) == len(names)
    assert against(ROWS) <= set(names)
    assert {row.op for row in ROWS} == {*OPS, "baseline"} - {"memory"}


def test_every_gate_names_tests_that_exist() -> None:
    missing = [test for tests in GATES.values() for test in tests if not (suite.ROOT / test).exists()]
    assert missing == []


def test_an_op_brings_its_baselines() -> None:
    names = {row.name for row in rows_of(["ties"])}
    assert "torch TIES, chunked + np.partition" in names
    assert "compare" not in names


# -- judgement ------------------------------------------------------------------------------------------


def test_figures_follow_from_samples() -> None:
    timed = {"row": "ties merge_, tie=ge", "op": "ties", "threads": 1, "n_bytes": 10**9, "limit": "read 4"}
    limit = {"samples_s": [0.25], "median_s": 0.25, "min_s": 0.25, "spread": 0.0}
    ours = {**timed, "samples_s": [0.5], "median_s": 0.5, "min_s": 0.5, "spread": 0.0, "limit_s": limit}
    slow = {"row": "torch TIES, argsort as in mergekit", "threads": 1, "median_s": 50.0, "spread": 0.0}
    fair = {"row": "torch TIES, chunked + np.partition", "threads": 1, "median_s": 7.0, "spread": 0.0}
    lost = {"row": "torch TIES, kthvalue", "threads": 1, "error": "MemoryError: no"}
    record = judged([ours, slow, fair, lost])[0]
    assert (record["gb_per_s"], record["limit_gb_per_s"], record["share_of_limit"]) == (2.0, 4.0, 0.5)
    compared = {c["against"]: c for c in record["comparisons"]}
    assert compared[slow["row"]] == {"against": slow["row"], "target": 100, "ratio": 100.0, "met": True}
    assert compared[fair["row"]] == {"against": fair["row"], "target": 15, "ratio": 14.0, "met": False}
    assert "ratio" not in compared[lost["row"]]
    assert "MemoryError" in compared[lost["row"]]["error"]
    assert compared["mergekit ties"]["error"] == "baseline missing: it did not run"


# -- gate and whole runs --------------------------------------------------------------------------------


def test_the_gate_lets_passing_tests_through_only(passing: str, failing: str, tmp_path: Path) -> None:
    gate([passing])
    with pytest.raises(GateError, match=r"ended with status 1; expected 0\. Nothing was timed"):
        gate([passing, failing])
    empty = tmp_path / "test_empty.py"
    empty.write_text("")
    with pytest.raises(GateError, match="status 5"):
        gate([str(empty)])


def test_nothing_is_timed_when_tests_fail(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(GATES, "limit", (failing,))
    monkeypatch.setattr(suite, "measure", lambda *_: pytest.fail("measured"))
    assert main(["--op", "limit", "--elements", str(N), "--out", str(tmp_path / "out")]) == 1
    assert "Nothing was timed" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_end_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--elements", "8191"], ["--threads", "0"], ["--op", "no such op"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    assert "expected a positive multiple of 8192" in capsys.readouterr().err


def test_a_run_writes_every_row(
    passing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for op in OPS:
        monkeypatch.setitem(GATES, op, (passing,))
    memory = (MemoryRow("ties merge", "merge", "ties", 1),)
    monkeypatch.setattr(suite, "MEMORY_ROWS", memory)
    monkeypatch.setenv("TVFAST_MERGEKIT_PYTHON", sys.executable)  # has no mergekit: a row with an error
    assert main(["--elements", str(N), "--threads", "1", "2", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    shown = capfd.readouterr().out

    environment = result["environment"]
    assert {
        "cpu",
        "cores",
        "memory",
        "huge_pages",
        "python",
        "torch",
        "numpy",
        "tvfast",
    } <= environment.keys()
    assert {"compiler_of_limit", "isa", "commit", "dirty"} <= environment.keys()
    assert len(result["load_before"]) == len(result["load_after"]) == 3
    assert result["full_size"] is False
    assert result["inputs"]["n_elements"] == N
    assert result["inputs"]["checksum"] == checksum(*plain_inputs(N))

    found = {(record["row"], record["threads"]): record for record in result["rows"]}
    expected = {(row.name, n) for row in ROWS for n in ((1,) if row.single_thread else (1, 2))}
    assert found.keys() == expected | {(row.name, 1) for row in PEER_ROWS}
    for row in ROWS:
        record = found[row.name, 1]
        assert "error" not in record, record
        assert len(record["samples_s"]) == row.rounds
        assert ("limit_s" in record) == (row.traffic is not None)
        assert row.traffic is None or len(record["limit_s"]["samples_s"]) == row.rounds
        assert min(record["samples_s"]) == record["min_s"] <= record["median_s"] <= max(record["samples_s"])
        assert [c["against"] for c in record["comparisons"]] == [
            g.against for g in row.goals if g.threads == 1
        ]
        assert f"\n{row.name} " in shown
    shares = [c for c in found["ties pass, tie=ge", 2]["comparisons"] if c["against"] == LIMIT]
    assert [c["target"] for c in shares] == [0.5]
    assert "mergekit" in found["mergekit della", 1]["error"]
    assert "baseline missing" in found["della merge_", 1]["comparisons"][0]["error"]

    rows = {(record["row"], record["threads"]): record for record in result["memory"]}
    assert rows.keys() == {(row.name, n) for row in memory for n in (1, 2)}
    for record in rows.values():
        assert record["allowed_bytes"] == 64 * 2**20 + 2 * N
        assert record["met"] == (record["extra_bytes"] <= record["allowed_bytes"])
    assert table(result).splitlines()[-1].startswith("Load average")


def test_a_run_of_one_op_times_its_rows_and_their_baselines() -> None:
    found = suite.timed_rows(["limit"], N, [1])["rows"]
    assert [(record["row"], record["threads"]) for record in found] == [
        ("read 4", 1),
        ("read 4 + write 1", 1),
    ]


def test_a_row_that_fails_says_why() -> None:
    found = suite.timed_rows(["limit"], N + 1, [1])["rows"]
    assert ["n_elements is" in record["error"] for record in found] == [True, True]


def test_a_timing_process_that_breaks_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="ended with status 4; expected 0 or 1"):
        suite.timed_rows(["no such op"], N, [1])


def test_without_mergekit_its_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TVFAST_MERGEKIT_PYTHON", raising=False)
    (record,) = suite.peer_rows(["della"], N, 0)
    assert record["error"] == "not measured: TVFAST_MERGEKIT_PYTHON is not set"
    assert "median_s" not in record
