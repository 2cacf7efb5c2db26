"""The table of a sweep: rows kept as they finish, for runs that go on, and shown as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tvfast.errors import OutputError

ROWS, CSV, JSON, PICTURE, BEST = "rows.jsonl", "table.csv", "table.json", "table.png", "best.yml"

NEW, REUSED, FILES = "new", "reused", "files"
"""How a merge was made: live and measured anew, live by what an earlier point measured, or as files."""

_OPENING = b'{"sweep": '


@dataclass(frozen=True, slots=True)
class Row:
    """One finished point.

    Attributes:
        point: its number, from 0.
        parameters: by axis.
        metrics: by name; empty where the function failed.
        measured: "new", "reused" or "files".
        merge_s, evaluate_s: seconds.
        error: why there are no metrics.
    """

    point: int
    parameters: Mapping[str, float]
    metrics: Mapping[str, float]
    measured: str
    merge_s: float
    evaluate_s: float
    error: str | None = None


class Table:
    """The rows of one sweep in one folder. Use it as a context; leaving it closes the file.

    Args:
        folder: made if need be.
        described: what the sweep is, as plain data.
        resume: go on with what is there.
        overwrite: replace what is there.

    Raises:
        OutputError: rows, tables, picture or recipe are there and neither was asked for, rows are another
            sweep's, or it cannot be written.
    """

    def __init__(self, folder: Path, described: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        self._path = folder / ROWS
        self._described = json.loads(json.dumps(described))
        self.rows: list[Row] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            existing = [
                folder / name for name in (ROWS, CSV, JSON, PICTURE, BEST) if (folder / name).exists()
            ]
            if existing and not overwrite:
                if not resume or not self._path.exists():
                    raise OutputError(
                        f"{existing[0]}: is there already; expected a new folder. Pass "
                        f"{'--resume to go on, ' * self._path.exists()}--overwrite to replace it, or another "
                        "--out."
                    )
                self._file = self._continued()
            else:
                for path in existing:
                    path.unlink()
                self._file = self._begun()
        except OSError as error:
            raise _unusable(self._path, error) from None

    def __enter__(self) -> Table:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def metrics(self) -> list[str]:
        """Names, in the order in which they were first seen."""
        return list(dict.fromkeys(name for row in self.rows for name in row.metrics))

    def append(self, row: Row) -> None:
        """Add a row, on the disk too.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            _write(self._file, _as_json(row))
        except OSError as error:
            raise _unusable(self._path, error) from None
        self.rows.append(row)

    def _begun(self) -> TextIO:
        file = self._path.open("w", encoding="utf-8")
        _write(file, {"sweep": self._described})
        return file

    def _continued(self) -> TextIO:
        """The rows that were finished; a last line that was cut off is not one."""
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if not whole and _OPENING.startswith(
            data[: len(_OPENING)]
        ):  # stopped before the first line was whole
            return self._begun()
        first, *lines = whole.decode().splitlines() or [""]
        try:
            before = json.loads(first)["sweep"]
            self.rows = [_row(json.loads(line)) for line in lines]
        except (ValueError, KeyError, TypeError):
            raise OutputError(
                f"{self._path}: is no table of a sweep; expected one. Pass --overwrite."
            ) from None
        differing = [key for key, value in self._described.items() if before.get(key) != value]
        if differing:
            raise OutputError(
                f"{self._path}: was made with another {', '.join(differing)}; expected the same sweep. Pass "
                "--overwrite, or another --out."
            )
        file = self._path.open("r+", encoding="utf-8")
        file.truncate(len(whole))
        file.seek(0, os.SEEK_END)
        return file


def write_tables(folder: Path, described: Mapping[str, Any], rows: Sequence[Row], best: Row | None) -> None:
    """The rows as CSV and JSON.

    Raises:
        OutputError: they cannot be written.
    """
    found = {
        "sweep": described,
        "best": None if best is None else best.point,
        "rows": [_as_json(row) for row in rows],
    }
    for name, text in ((CSV, as_csv(rows)), (JSON, json.dumps(found, indent=1) + "\n")):
        write_text(folder / name, text)


def write_text(path: Path, text: str) -> None:
    """A file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="")
        partial.replace(path)
    except OSError as error:
        raise _unusable(path, error) from None


def as_csv(rows: Sequence[Row]) -> str:
    """One line per row, numbers in full."""
    axes = list(rows[0].parameters) if rows else []
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["point", *axes, *metrics, "measured", "merge_s", "evaluate_s", "error"])
    for row in rows:
        numbers = [*(row.parameters[axis] for axis in axes), *(row.metrics.get(name, "") for name in metrics)]
        times = [f"{row.merge_s:.6g}", f"{row.evaluate_s:.6g}"]
        writer.writerow([row.point, *numbers, row.measured, *times, row.error or ""])
    return text.getvalue()


def column_clashes(axes: Iterable[str], metrics: Iterable[str]) -> list[str]:
    """Metrics whose names the table has other columns for."""
    taken = {*axes, "point", "measured", "merge_s", "evaluate_s", "error"}
    return [name for name in metrics if name in taken]


def metrics_as_json(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """NaN and infinity, which JSON has not, as texts."""
    return {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}


def _write(file: TextIO, line: Mapping[str, Any]) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _as_json(row: Row) -> dict[str, Any]:
    return {**asdict(row), "parameters": dict(row.parameters), "metrics": metrics_as_json(row.metrics)}


def _row(found: Mapping[str, Any]) -> Row:
    metrics = {name: float(value) for name, value in found["metrics"].items()}
    return Row(**{**found, "metrics": metrics})


def _unusable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path}: {(error.strerror or str(error)).lower()}; expected a folder to write to.")
