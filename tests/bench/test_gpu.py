"""The rows of GPUs on the backends' stand-ins, what is made of their figures, and the script around them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tvfast
from bench.baselines import ties_kthvalue
from bench.buffers import N_MODELS
from bench.gpu import baselines, checkpoints, merges, suite
from bench.gpu.clock import FEWEST, MOST, Clock
from bench.gpu.inputs import DeviceBuffers, fitting
from bench.gpu.limits import Cost, Limits
from bench.gpu.registry import FULL, TINY, Goal, GpuRow, Place, Ready
from bench.gpu.table import disagreements, judged, table
from bench.gpu.tables import _room, _sharing, _sizes
from bench.registry import LIMIT, TIES_DENSITY, UnavailableError
from tvfast.ops import cuda

CPU = torch.device("cpu")
LIMITS = Limits(2e12, 1e12, 5e10, 4e10, 5e13, 8e14)
ROOT = suite.checkpoints.running.ROOT
SCRIPT = ROOT / "bench" / "gpu_check.sh"


@pytest.fixture
def buffers() -> DeviceBuffers:
    return DeviceBuffers(64 * TINY.columns, CPU, TINY.columns)


def _run(out: Path, *arguments: str) -> dict[str, Any]:
    assert suite.main([str(out), "--device", "cpu", "--elements", "256", *arguments]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def _missing_verb(record: dict[str, Any]) -> bool:
    return " in this build" in record.get("unavailable", "") or "no LiveMerge" in record.get(
        "unavailable", ""
    )


# -- rows -----------------------------------------------------------------------------------------------


def test_every_row_of_cuda_runs_on_its_host_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tvfast._C_simt")
    monkeypatch.setenv("TVFAST_SIMT", "1")
    cuda.backend.cache_clear()
    groups = ["merges", "layers", "table", "live"]
    result = _run(tmp_path / "r.json", "--backends", "cuda", "--group", *groups, "--show")
    cuda.backend.cache_clear()
    expected = [(group, row.name) for group in groups for row in suite.GROUPS[group]]
    assert sorted((r["group"], r["row"]) for r in result["rows"]) == sorted(expected)
    shown = capsys.readouterr().out
    for record in result["rows"]:
        assert "error" not in record, record
        assert _missing_verb(record) or record["median_s"] > 0
        assert record["device"] == result["device"]["name"]
        if record["backend"] == "cuda" and "median_s" in record:
            assert record["limit_s"] > 0
            assert record["limit"] in ("copy", "read", "float32 matrix product")
        assert record["row"] in shown
    assert {"torch", "python", "commit", "cores"} <= result["environment"].keys()


def test_rows_of_triton_run_in_its_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    command = [sys.executable, "-m", "bench.gpu", str(out), "--device", "cpu", "--elements", "64"]
    command += ["--backends", "triton", "--group", "merges", "--row", "task arithmetic", "accumulated"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    rows = {record["row"]: record for record in json.loads(out.read_text())["rows"]}
    for name in ("task arithmetic", "|g θ| accumulated"):
        assert rows[name]["backend"] == "triton"
        assert rows[name]["median_s"] > 0
    assert rows["torch task arithmetic, float32"]["backend"] == "torch"
    assert "thresholds" not in rows


@pytest.mark.slow
def test_every_row_of_triton_runs_in_its_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    command = [sys.executable, "-m", "bench.gpu", str(out), "--device", "cpu", "--elements", "64"]
    command += ["--backends", "triton", "--group", "merges", "layers", "table", "live"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    for record in json.loads(out.read_text())["rows"]:
        assert _missing_verb(record) or record["median_s"] > 0, record


def test_rows_are_added_to_a_result(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    first = _run(out, "--group", "merges", "--row", "torch slerp")
    second = _run(out, "--group", "layers", "--row", "torch products")
    assert [record["row"] for record in second["rows"]] == ["torch slerp", "torch products and dot"]
    assert second["limits"] == first["limits"], "measured once"


def test_a_row_that_fails_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffers: DeviceBuffers
) -> None:
    def fails(place: Place) -> Ready:
        raise RuntimeError("no such luck")

    def too_large(place: Place) -> Ready:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    def unwritten(place: Place) -> Ready:
        return Ready(lambda: None, written=torch.zeros(3))

    def here(place: Place) -> Ready:
        raise UnavailableError("not here")

    rows = [GpuRow(name, make, baseline=True) for name, make in (("a", fails), ("b", unwritten), ("c", here))]
    rows += [GpuRow("d", lambda place: Ready(lambda: None), baseline=True)]
    rows += [GpuRow("f", too_large, baseline=True), GpuRow("g", too_large)]
    monkeypatch.setitem(suite.GROUPS, "layers", tuple(rows[:6]))
    out = tmp_path / "r.json"
    assert suite.main([str(out), "--device", "cpu", "--group", "layers", "--backends", "cuda"]) == 1
    a, b, c, d, f, g = json.loads(out.read_text())["rows"]
    assert a["error"] == "RuntimeError: no such luck"
    assert f["unavailable"] == g["error"] == "out of memory: tried to allocate 80 GiB"
    assert "not written" in b["error"]
    assert c["unavailable"] == "not here"
    assert d["median_s"] >= 0
    slow = GpuRow("e", fails, baseline=True, most_elements=buffers.n_elements - 1)
    late = suite.timed(slow, Place(CPU, TINY, buffers), Clock(CPU), LIMITS)
    assert "takes too long" in late["unavailable"]


def test_without_a_gpu_its_rows_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        suite.main([str(tmp_path / "r.json"), "--group", "merges"])
    assert stopped.value.code == 2
    assert "--device cpu runs the rows on stand-ins" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "n_rounds"), [(1e-4, MOST), (0.04, 10), (0.3, FEWEST), (2.5, 1)])
def test_the_call_that_compiles_is_no_sample(
    monkeypatch: pytest.MonkeyPatch, seconds: float, n_rounds: int
) -> None:
    pairs = iter([(60.0, 60.0), *[(seconds, 1e-5)] * MOST])
    monkeypatch.setattr(Clock, "_once", lambda self, run: next(pairs))
    clock = Clock(CPU)
    clock.device = torch.device("cuda")
    record = clock.time(lambda: None)
    assert record["samples_s"] == [seconds] * n_rounds
    assert (record["median_s"], record["host_s"]) == (seconds, 1e-5)


# -- baselines and inputs -------------------------------------------------------------------------------


def test_torch_ties_equal_ties(buffers: DeviceBuffers) -> None:
    expected = tvfast.merge(buffers.base, buffers.models, method="ties", density=TIES_DENSITY, tie="ge")
    assert ties_kthvalue(buffers.base, buffers.models, TIES_DENSITY).equal(expected)
    assert baselines.ties_topk(buffers.base, buffers.models, TIES_DENSITY).equal(expected)
    found = baselines.topk_thresholds(buffers.base, buffers.models, TIES_DENSITY)
    assert baselines.ties_trimmed(buffers.base, buffers.models, found).equal(expected)
    near = baselines.ties_peft(buffers.base, buffers.models, TIES_DENSITY)
    assert float((near == expected).float().mean()) > 0.8, "other ties, and roundings in bfloat16"


def test_torch_merges_are_those_of_tvfast(buffers: DeviceBuffers) -> None:
    weights = merges.WEIGHTS
    expected = tvfast.merge(buffers.base, buffers.models, method="task_arithmetic", weights=weights)
    for formula in (baselines.task_arithmetic, baselines.stacked_task_arithmetic):
        found = formula(buffers.base, buffers.models, weights)
        assert torch.allclose(found.float(), expected.float(), rtol=2**-6, atol=1e-4)
    expected = tvfast.merge(buffers.base, buffers.models[:1], method="slerp", t=0.5)
    found = baselines.slerp(buffers.base, buffers.models[0], 0.5)
    assert torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=1e-6)
    exact = torch.stack([(model.double() - buffers.base.double()).view(-1) for model in buffers.models])
    found = baselines.gram(buffers.base, buffers.models).double()
    assert torch.allclose(found, exact @ exact.T, rtol=1e-4, atol=1e-8)
    for formula in (lambda *a: baselines.dare(*a, 0.5), lambda *a: baselines.della(*a, 0.5, 0.1)):
        masked = formula(buffers.base, buffers.models)
        assert bool(masked.isfinite().all())
        assert not masked.equal(buffers.base)


def test_sizes_are_whole_rows() -> None:
    assert fitting(10**9, CPU) == 999_997_440
    assert fitting(1, CPU) == 8192
    assert fitting(130, CPU, 64) == 128


def test_the_table_has_the_tensors_of_llama_70b() -> None:
    sizes = _sizes(FULL.large)
    assert len(sizes) == len(_sizes(FULL.narrow)) == 723
    assert sum(sizes) == 70_553_706_496
    assert _room(sizes) == 128256 * 8192


def test_tensors_that_share_memory_stay_inside_it() -> None:
    pools = [torch.zeros(256, dtype=torch.bfloat16) for _ in range(N_MODELS + 2)]
    entries = list(_sharing([100, 100, 100, 256, 1], pools))
    starts = [(entry.base.address - pools[0].data_ptr()) // 2 for entry in entries if entry.base]
    assert starts == [0, 128, 0, 0, 0]
    assert [entry.n_elements for entry in entries] == [100, 100, 100, 256, 1]


# -- judgement ------------------------------------------------------------------------------------------


def test_the_limit_is_what_takes_longer() -> None:
    assert Cost(10**12).seconds(LIMITS) == 1.0
    assert Cost(10**12, 10**12).seconds(LIMITS) == 1.0
    product = Cost(10**9, 10**9, 10**14)
    assert product.seconds(LIMITS) == 2.0
    assert [cost.name(LIMITS) for cost in (Cost(1), Cost(1, 1), product)] == [
        "read",
        "copy",
        "float32 matrix product",
    ]


def _record(row: str, backend: str, median: float, **more: Any) -> dict[str, Any]:
    common = {"group": "merges", "n_elements": 8192, "spread": 0.0, "n_bytes": 10**9, "limit_s": 0.5}
    return {"row": row, "backend": backend, "median_s": median, **common, **more}


def test_rows_are_compared_with_their_backend_and_with_torch() -> None:
    goals = {"ours": [Goal(LIMIT, 0.6), Goal("theirs", 5), Goal("big", 0.85, by_rate=True), Goal("absent")]}
    records = [
        _record("theirs", "torch", 6.0),
        _record("big", "cuda", 2.0, n_bytes=2 * 10**9),
        _record("big", "triton", 1.0),
        _record("ours", "cuda", 1.0, checksum=1),
        _record("ours", "triton", 0.5, checksum=2),
        _record("ours", "cuda", 9.0, n_elements=64),
    ]
    *_, first, second, other = judged(records, goals)
    ratios = {c["against"]: (c.get("ratio"), c.get("met")) for c in first["comparisons"]}
    assert ratios == {
        LIMIT: (0.5, False),
        "theirs": (6.0, True),
        "big": (1.0, True),
        "absent": (None, None),
    }
    assert first["gb_per_s"] == 1.0
    assert [c.get("met") for c in second["comparisons"]] == [True, True, True, None]
    assert "missing" in other["comparisons"][1], "of another size"
    (difference,) = disagreements(records)
    assert "ours (8192): outputs differ" in difference


def test_the_table_says_what_is_missing() -> None:
    failed = {"row": "kron", "backend": "cuda", "group": "layers", "error": "RuntimeError: no"}
    goals = {"ours": [Goal(LIMIT, 0.6), Goal("absent", 20)]}
    result = {
        "device": {"name": "a device"},
        "environment": {"tvfast": "0.1"},
        "commit": "abc",
        "limits": LIMITS.record(),
        "rows": judged([failed, _record("ours", "cuda", 1.0)], goals),
    }
    text = table(result)
    assert "a device, tvfast 0.1, abc" in text
    assert "copied 2000 G/s" in text
    assert "! kron (cuda): RuntimeError: no" in text
    (line,) = (line for line in text.splitlines() if line.startswith("ours"))
    assert " ".join(line.split()) == "ours 8.19e+03 cuda 1000.000 0 % 1 500.000 50 % limit 50 % 60 % NO"
    assert "missing" in text


# -- checkpoints ----------------------------------------------------------------------------------------


def test_whole_merges_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(checkpoints, "METHODS", ("ties",))
    monkeypatch.setattr(checkpoints, "ROUNDS", 1)
    (record,) = checkpoints.records(CPU, "tiny", LIMITS)
    assert "error" not in record, record
    assert record["row"] == "tvfast merge --device cpu, ties"
    assert record["median_s"] > record["report"]["seconds"] > 0
    assert record["limit_s"] == record["limits_s"]["cat + cp"] > 0
    assert list(tmp_path.iterdir()) == [], "the family is removed"


def test_a_device_is_compared_with_the_cpu() -> None:
    name = checkpoints._name("ties", "cuda")
    (goal,) = suite.goals()[name]
    assert goal.against == checkpoints._name("ties", "cpu")


# -- the script -----------------------------------------------------------------------------------------


def _script(
    tmp_path: Path, python: str, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{python}\n')
    stub.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stub), "OUT": str(tmp_path / "out"), **variables}
    return subprocess.run(
        [str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, check=False
    )


ROW_STAGES = ["merges-1e8", "merges-1e9", "layers", "table", "live"]
STAGES = ["build", "tests", *ROW_STAGES, "memcheck", "racecheck", "checkpoints"]


def _results(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    lines = [line for line in done.stdout.splitlines() if line.split(" ")[0] in STAGES]
    return {line.split()[0]: line[17:39].strip() for line in lines}


def test_the_script_runs_every_stage(tmp_path: Path) -> None:
    done = _script(tmp_path, "exit 0", "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert _results(done) == dict.fromkeys(STAGES, "passed")
    calls = (tmp_path / "calls").read_text()
    assert "--device cpu --group layers" in calls
    assert "-m bench.gpu.small cpu" in calls
    (log,) = (tmp_path / "out").glob("gpu-dry-run-*.log")
    assert "== racecheck" in log.read_text()


def test_a_stage_that_fails_is_reported_and_the_others_run(tmp_path: Path) -> None:
    python = 'case "$*" in *"--group layers"*) echo broken; exit 3;; *"--group live"*) exit 77;; esac'
    done = _script(tmp_path, python, "--dry-run")
    assert done.returncode == 1
    expected = {**dict.fromkeys(STAGES, "passed"), "layers": "FAILED, status 3", "live": "skipped"}
    assert _results(done) == expected
    assert "broken" in done.stdout


def test_the_script_keeps_its_time(tmp_path: Path) -> None:
    done = _script(tmp_path, 'case "$*" in *pytest*) sleep 30;; esac', "--dry-run", GPU_CHECK_SECONDS="2")
    assert done.returncode == 1
    assert _results(done)["tests"] == "out of time"
    assert _results(done)["checkpoints"] == "no time left"


def test_the_script_takes_one_argument(tmp_path: Path) -> None:
    done = _script(tmp_path, "exit 0", "--dry")
    assert done.returncode == 2
    assert "unknown argument '--dry'" in done.stderr
    assert not (tmp_path / "out").exists()
