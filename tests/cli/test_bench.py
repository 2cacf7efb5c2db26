"""`tvfast bench`: rows, rates and shares that fit together, at a size that takes no time."""

from __future__ import annotations

import json

import pytest

from tvfast.cli import bench
from tvfast.cli.main import main
from tvfast.methods import METHODS


@pytest.fixture(scope="module")
def rows() -> list[bench.Row]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "_COPY_BYTES", 1 << 22)
        return bench.measure([1, 2], n_elements=1 << 16)


def test_every_method_has_a_row_for_every_number_of_threads(rows: list[bench.Row]) -> None:
    names = ["copy", *bench.METHODS]
    assert [(row.name, row.threads) for row in rows] == [(name, n) for n in (1, 2) for name in names]
    assert set(bench.METHODS) <= set(METHODS)


def test_rates_count_every_stream_once(rows: list[bench.Row]) -> None:
    for row in rows:
        if row.name == "copy":
            limit = row.gb_s
            assert row.share == 1.0
            continue
        streams = bench.N_MODELS + 1 + (row.name != "linear")  # linear does not read the base
        assert row.gb_s * row.seconds * 1e9 == pytest.approx(streams * (1 << 16) * 2)
        assert row.share == pytest.approx(row.gb_s / limit)


def test_the_command_prints_the_rows(
    rows: list[bench.Row], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measure(threads: list[int]) -> list[bench.Row]:
        asked.append(threads)
        return rows

    monkeypatch.setattr(bench, "measure", measure)
    assert main(["bench", "--threads", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert asked == [[3]]
    assert found["rows"] == [row._asdict() for row in rows]
    assert "cpp" in found["backends"]
    assert main(["bench"]) == 0
    assert asked[1][0] == 1
    text = capsys.readouterr().out
    for row in rows:
        assert f"{row.name} " in text
    assert f"{rows[1].gb_s:6.1f}" in text


def test_a_copy_is_measured_with_any_number_of_threads() -> None:
    for n_threads in (1, 3):
        assert bench.copy_gb_s(n_threads, 1 << 20) > 0.01
