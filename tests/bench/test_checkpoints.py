"""Whole-merge benchmark on the smallest family: families are as stated, runs measured, goals judged."""

from __future__ import annotations

import itertools
import json
import mmap
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tvfast
from bench.checkpoints import device, loads, ranks, reports, suite
from bench.checkpoints.family import PRESETS, Family
from bench.checkpoints.limits import cold_reads, direct_write, moved, warm_limit
from bench.checkpoints.peer import Peer, find_peer
from bench.checkpoints.rows import LIMIT, PEER, ROWS, Goal, MethodRow
from bench.checkpoints.running import RunError, back_memory, evict, run, shards, total_bytes, warm
from bench.checkpoints.running import tvfast as command
from bench.checkpoints.suite import Place
from bench.checkpoints.table import judged, table
from tests.parity.shards import read

TINY = PRESETS["tiny"]
NORM_CHECKSUM = 3572041349  # of model.norm.weight of ft2


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    Family(TINY, shard_bytes=100_000).write(folder)
    return folder


# -- families -------------------------------------------------------------------------------------------


def test_bytes_depend_on_seed_and_name_only(family: Path, tmp_path: Path) -> None:
    Family(TINY).write_member(tmp_path / "whole", 2)
    assert len(shards(family / "ft2")) > len(shards(tmp_path / "whole")) == 1
    mine, other = read(family / "ft2"), read(tmp_path / "whole")
    assert all(np.array_equal(mine[name].bits, other[name].bits) for name in mine)
    # As on every machine: NumPy's Philox streams are part of what result files rest on.
    assert zlib.crc32(other["model.norm.weight"].bits.tobytes()) == NORM_CHECKSUM
    Family(TINY, seed=1).write_member(tmp_path / "seed", 2)
    assert not np.array_equal(read(tmp_path / "seed")["lm_head.weight"].bits, mine["lm_head.weight"].bits)


def test_distinct_families_have_no_ties(tmp_path: Path) -> None:
    Family(TINY, dtype="f32", distinct=True).write(tmp_path)
    base = read(tmp_path / "base")
    for member in ("ft1", "ft2", "ft3"):
        for name, saved in read(tmp_path / member).items():
            change = np.abs(saved.values() - base[name].values())
            assert np.unique(change).size == change.size, f"{member}, {name}"
            assert change.min() > 0
            assert change.astype(np.float64).std() < 2e-3


def test_a_family_that_cannot_be_distinct_is_refused(tmp_path: Path) -> None:
    family = Family(PRESETS["60m"], dtype="f32", distinct=True)
    with pytest.raises(ValueError, match="too many for distinct float32 changes"):
        next(family.chunks("lm_head.weight", 32000 * 512, 1))


# -- runs -----------------------------------------------------------------------------------------------


def test_a_run_is_timed_and_its_peak_is_its_own() -> None:
    ballast = mmap.mmap(-1, 256 << 20)
    ballast.write(b"x" * len(ballast))  # the caller's memory is none of the child's
    small = run([sys.executable, "-S", "-c", "print('done')"])
    assert small.stdout == "done\n"
    assert small.peak_bytes < 64 << 20
    large = run([sys.executable, "-S", "-c", "x = b'x' * (200 << 20); import time; time.sleep(0.1)"])
    assert large.peak_bytes > 200 << 20
    assert large.seconds > 0.1
    ballast.close()


def test_a_run_that_fails_is_an_error() -> None:
    with pytest.raises(RunError, match=r"status 3: because"):
        run([sys.executable, "-c", "import sys; print('because', file=sys.stderr); sys.exit(3)"])
    with pytest.raises(RunError, match="could not be started"):
        run(["/no/such/program"])


def test_limits_move_all_bytes(family: Path, tmp_path: Path) -> None:
    files = [shard for member in ("base", "ft1") for shard in shards(family / member)]
    warm(files)
    found = warm_limit(files, shards(family / "base"), tmp_path / "scratch")
    assert found["seconds"] == found["cat_s"] + found["cp_s"] > 0
    cold = cold_reads(files, depths=(1, 2))
    assert cold["n_bytes"] == total_bytes(files)
    assert set(cold["gb_per_s"]) == {"cat", "1", "2"}
    assert cold["gb_per_s"][cold["best"]] == max(cold["gb_per_s"].values())
    assert direct_write(tmp_path / "scratch", 20 << 20) > 0
    assert not (tmp_path / "scratch").exists(), "nothing is left behind"
    evict(files)
    assert total_bytes(files) == cold["n_bytes"]


def test_bytes_are_moved_by_several_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in "abc"]
    for number, file in enumerate(files):
        file.write_bytes(bytes(9_000_000 * number + 5))
    written: list[tuple[int, int]] = []
    whole = os.pwrite

    def pwrite(descriptor: int, data: memoryview, at: int) -> int:
        written.append((at, len(data)))
        return whole(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert moved(files, tmp_path / "scratch" / "moved", 40_000_001) > 0.0
    assert not (tmp_path / "scratch" / "moved").exists()
    ends = [at + n for at, n in sorted(written)]
    assert [0, *ends[:-1]] == [at for at, _ in sorted(written)]
    assert ends[-1] == -(-40_000_001 // 4096) * 4096, "whole pages, past the page cache"


def test_the_first_round_of_ranks_is_not_counted(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    def merge(place: Place, row: MethodRow, n_ranks: int, threads: int) -> ranks.RanksRun:
        steps.append("merge")
        first = steps.count("merge") <= len(ranks.SHAPES)
        works = [{"read_bytes": 30}] * n_ranks if n_ranks > 1 else []
        report = {"seconds": 1.5, "read_bytes": 60, "ranks": works}
        return ranks.RanksRun(100.0 if first else 2.0, 1.0, report)

    def move(*_: object) -> float:
        steps.append("move")
        return 50.0 if steps.count("move") <= len(ranks.SHAPES) else 0.5

    monkeypatch.setattr(ranks, "merge", merge)
    monkeypatch.setattr(ranks, "moved", move)
    monkeypatch.setattr(ranks, "back_memory", lambda n_bytes: steps.append("memory"))
    monkeypatch.setattr(ranks, "predicted_s", lambda *_: 2.2)
    row = next(row for row in ROWS if row.method == "ties")
    records = ranks.measured(Place(family, tmp_path), row, 2, None)
    assert steps == ["move", "memory", "merge"] * len(ranks.SHAPES) * 3
    n_bytes = total_bytes(Place(family, tmp_path).inputs(row)) + total_bytes(shards(family / "base"))
    for record in records:
        assert record["wall_s"]["samples_s"] == [2.0, 2.0]
        assert record["moved_s"]["samples_s"] == [0.5] * len(ranks.SHAPES) * 2
        assert record["disk_gb_per_s"] == n_bytes / 0.5e9
        assert record["planned_error"] == pytest.approx(0.1)
    assert ranks.judged(records) == []


def test_plans_of_ranks_take_the_middle_report_of_a_smaller_family(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.cycle([9.0, 3.0, 1.0, 2.0])  # the first of each shape is not counted
    rates: list[tuple[str, ...]] = []

    def predicted(place: Place, row: MethodRow, n_ranks: int, threads: int, *given: str) -> float:
        rates.append(given)
        if given[0] != "--like":
            return 4.0
        assert json.loads(Path(given[1]).read_text())["seconds"] == 2.0
        return 2.5

    monkeypatch.setattr(
        ranks,
        "merge",
        lambda *_: ranks.RanksRun(2.0, 1.0, {"seconds": next(seconds), "read_bytes": 60, "ranks": []}),
    )
    monkeypatch.setattr(ranks, "moved", lambda *_: 0.5)
    monkeypatch.setattr(ranks, "back_memory", lambda _: None)
    monkeypatch.setattr(ranks, "predicted_s", predicted)
    row = next(row for row in ROWS if row.method == "ties")
    (tmp_path / "smaller").mkdir()
    records = ranks.measured(Place(family, tmp_path), row, 3, Place(family, tmp_path / "smaller"))
    for record in records:
        assert (record["planned_by_table_s"], record["planned_by_sample_s"]) == (4.0, 2.5)
        assert record["planned_error"] == 0.25
    assert len({given[1] for given in rates if given[0] == "--like"}) == len(ranks.SHAPES)


def test_memory_of_any_size_is_touched() -> None:
    back_memory(1)
    back_memory(3 * 2**24 + 5)


# -- rows and judgement ---------------------------------------------------------------------------------


def test_every_method_has_a_row_and_a_valid_recipe(family: Path) -> None:
    listed = json.loads(json.dumps([row.method for row in ROWS]))
    others = {  # they need data, not only files, or mergekit has none of that name
        n
        for n, info in tvfast.methods.METHODS.items()
        if n != "lata" and (info.needs_scores or info.cls.statistics or "mergekit" not in info.dialects)
    }
    assert sorted([*listed, *others]) == sorted(tvfast.methods.METHODS)
    for row in ROWS:
        recipe = tvfast.load_recipe(json.loads(row.recipe(family, "bfloat16")))
        assert recipe.method == row.method
        assert not recipe.warnings


def record(row: str, median: float, limit: float) -> dict[str, Any]:
    return {
        "row": row,
        "cache": "warm",
        "median_s": median,
        "spread": 0.0,
        "limit_s": {"median_s": limit},
        "read_bytes": 10**9,
        "peak_bytes": 10**8,
        "promised_bytes": 2 * 10**8,
    }


def test_goals_are_judged() -> None:
    peers = [
        {"row": f"mergekit {method}", "cache": "warm", "median_s": 100.0, "peak_bytes": 10**9}
        for method in ("ties", "linear", "sce")
    ]
    mine = [record("ties", 2.0, 0.9), record("linear", 11.0, 6.0), record("sce", 11.0, 1.0)]
    ties, linear, sce, *_ = judged([*mine, record("della", 1.0, 1.0), *peers])
    assert ties["times_mergekit"] == 50
    assert [goal["met"] for goal in ties["goals"]] == [True, False], "40 x mergekit, but 2.2 x the limit"
    assert [goal["met"] for goal in linear["goals"]] == [True], "9 x mergekit, but 1.8 x the limit"
    assert [goal["met"] for goal in sce["goals"]] == [False]
    unknown = judged([record("della", 1.0, 1.0)])[0]["goals"]
    assert unknown == [{"against": PEER, "asked": 20, "met": None}]
    assert Goal(LIMIT, 2) in ROWS[0].goals
    lata, *_ = judged([record("lata", 2.9, 1.0), record("ties", 2.0, 1.0)])
    assert lata["goals"] == [{"against": "ties", "asked": 1.5, "met": True, "ratio": 1.45}]
    assert judged([record("lata", 2.9, 1.0)])[0]["goals"][0]["met"] is None
    slow = {"row": "--help", "cache": "warm", "at_most_s": 0.3, "median_s": 0.31}
    assert [goal["met"] for goal in judged([slow])[0]["goals"]] == [False]


def test_a_promise_that_is_not_kept_shows() -> None:
    broken = record("linear", 1.0, 1.0) | {"peak_bytes": 3 * 10**8}
    (judged_row,) = judged([broken])
    assert judged_row["peak_kept"] is False
    text = table({"rows": [judged_row], "load_before": [0, 0, 0], "load_after": [0, 0, 0]})
    assert "EXCEEDED" in text


# -- mergekit's kept results ----------------------------------------------------------------------------


def test_kept_results_depend_on_everything_that_changes_them(tmp_path: Path) -> None:
    peer = Peer(Path("python"), {"mergekit": "0.1.5", "cpu": "a"}, tmp_path / "kept.json")
    key = peer.key("recipe", {"seed": 1})
    assert key == peer.key("recipe", {"seed": 1})
    others = [peer.key("other", {"seed": 1}), peer.key("recipe", {"seed": 2})]
    others.append(
        Peer(Path("python"), {"mergekit": "0.1.5", "cpu": "b"}, tmp_path).key("recipe", {"seed": 1})
    )
    assert key not in others
    assert peer.kept(key) is None
    (tmp_path / "kept.json").write_text(json.dumps({key: {"median_s": 1.0}}))
    assert peer.kept(key) == {"median_s": 1.0}
    (tmp_path / "kept.json").write_text("{")
    with pytest.raises(RunError, match="remove the file"):
        peer.kept(key)


def test_a_missing_peer_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TVFAST_MERGEKIT_PYTHON", raising=False)
    found = find_peer(tmp_path, {"cpu": "", "cores": 1})
    assert isinstance(found, str)
    assert "TVFAST_MERGEKIT_PYTHON is not set" in found
    monkeypatch.setenv("TVFAST_MERGEKIT_PYTHON", "/no/such/python")
    assert "No such file" in str(find_peer(tmp_path, {"cpu": "", "cores": 1}))


def test_loading_needs_transformers(
    monkeypatch: pytest.MonkeyPatch, family: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TVFAST_MERGEKIT_PYTHON", raising=False)
    with pytest.raises(SystemExit):
        loads.main(["--family", str(family)])
    assert "TVFAST_MERGEKIT_PYTHON is not set" in capsys.readouterr().err


def test_what_does_not_load_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TVFAST_MERGEKIT_PYTHON", "/bin/false")
    assert loads.main(["--family", str(family), "--method", "linear", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("loads-*.json")
    (entry,) = json.loads(path.read_text())["methods"]
    assert "/bin/false" in entry["problems"][0]
    assert "linear: " in capsys.readouterr().out


# -- the whole thing ------------------------------------------------------------------------------------


def test_the_suite_measures_and_leaves_nothing(
    family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in family.rglob("*"))
    chosen = ["--method", "linear", "--method", "ties"]
    options = ["--family", str(family), *chosen, "--rounds", "1", "--cold-rounds", "1", "--peer", "none"]
    assert suite.main([*options, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    rows = {(row["row"], row["cache"]): row for row in json.loads(path.read_text())["rows"]}
    started = {("--help", "warm"), ("tiny family", "warm")}
    assert set(rows) == started | {("linear", "warm"), ("ties", "warm"), ("ties", "cold")}
    for row in rows.values():
        assert "error" not in row
        assert row["median_s"] > 0
    assert rows["ties", "warm"]["peak_bytes"] <= rows["ties", "warm"]["promised_bytes"]
    assert rows["ties", "cold"]["limit_parts"][0]["read"]["n_bytes"] == rows["ties", "cold"]["read_bytes"]
    assert sorted(p.name for p in family.rglob("*")) == before
    assert "cat + cp" in capsys.readouterr().out


def test_reports_are_timed_in_turn_with_merges_without(
    family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in family.rglob("*"))
    assert reports.main(["--family", str(family), "--rounds", "2", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["row"] == "ties --report"
    for name in ("without", "with"):
        assert len(row[name]["seconds"]["samples_s"]) == 2
        assert row[name]["cpu_s"]["median_s"] > 0
    pairs = zip(*(row[name]["seconds"]["samples_s"] for name in ("with", "without")), strict=True)
    assert row["ratio"] == pytest.approx(sum(a / b for a, b in pairs) / 2)
    assert sorted(p.name for p in family.rglob("*")) == before
    assert "ties --report" in capsys.readouterr().out


def test_a_merge_that_fails_is_a_record(
    family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--family", str(family), "--method", "linear", "--rounds", "1", "--cold-rounds", "0"]
    assert suite.main([*options, "--peer", "none", "--option=--no-such-option", "--out", str(tmp_path)]) == 1
    assert "no-such-option" in capsys.readouterr().out


def test_a_folder_that_is_no_family_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main(["--family", str(tmp_path)])
    assert "no family.json" in capsys.readouterr().err


def test_the_command_is_that_of_this_tree() -> None:
    assert command("--version").stdout.split()[-1] == tvfast.__version__


# -- devices --------------------------------------------------------------------------------------------


def test_merges_on_devices_are_compared_with_the_first(
    family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["--method", "ties", "--device", "cpu", "--device", "auto", "--rounds", "1"]
    assert device.main(["--family", str(family), *chosen, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["row"] for row in rows] == ["ties cpu", "ties auto"]
    assert all(row["equal"] and row["peaks_kept"] and row["median_s"] > 0 for row in rows)
    assert "share of link" in capsys.readouterr().out


def test_other_bytes_and_broken_promises_show() -> None:
    report = {"seconds": 1.0, "read_bytes": 10**9, "written_bytes": 10**9, "n_passes": 1, "device": "cuda:0"}
    report |= {"device_why": "", "planned_peak_bytes": 9, "device_peak_bytes": 5}
    report |= {"planned_device_peak_bytes": 4}
    rows = [
        device.Row(ROWS[1], name, (), [report], [2.0], 8, checksums)
        for name, checksums in (("cpu", [1]), ("cuda", [2]))
    ]
    found = device.record(rows[1], rows[0], 0.5, {"up": 4.0, "down": 2.0, "both": 6.0})
    assert (found["link_s"], found["share_of_link"]) == (0.5, 0.5)
    assert (found["equal"], found["peaks_kept"]) == (False, False)
    text = device.table({"rows": [found], "link_gb_per_s": {"up": 4.0}})
    assert "EXCEEDED" in text
    assert "NO" in text
    assert "Link, GB/s: up 4.0." in text
