"""From records to comparisons and to a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.gpu.registry import BASELINE, Goal
from bench.registry import LIMIT
from bench.table import aligned

_HEAD = (
    "row",
    "elements",
    "by",
    "median ms",
    "spread",
    "GB/s",
    "limit ms",
    "share",
    "against",
    "ratio",
    "asked",
    "met",
)


def judged(records: Sequence[dict[str, Any]], goals: Mapping[str, Sequence[Goal]]) -> list[dict[str, Any]]:
    """Records with bytes per second, share of the limit and a comparison per goal; others pass through.

    A record is compared with one of the same group and number of elements: of its own backend, or torch's.
    """
    known = {_key(record, record["backend"], record["row"]): record for record in records}
    found = []
    for record in records:
        figures = dict(record)
        if "median_s" in record:
            if "n_bytes" in record:
                figures["gb_per_s"] = record["n_bytes"] / record["median_s"] / 1e9
            if "limit_s" in record:
                figures["share_of_limit"] = record["limit_s"] / record["median_s"]
            figures["comparisons"] = [
                _comparison(goal, figures, known) for goal in goals.get(record["row"], ())
            ]
        found.append(figures)
    return found


def _key(record: Mapping[str, Any], backend: str, row: str) -> tuple[Any, ...]:
    return record["group"], record.get("n_elements"), backend, row


def _comparison(
    goal: Goal, figures: Mapping[str, Any], known: Mapping[tuple[Any, ...], Mapping[str, Any]]
) -> dict[str, Any]:
    asked = goal.at_least or None
    result: dict[str, Any] = {"against": goal.against, "asked": asked}
    if goal.against == LIMIT:
        ratio = figures["share_of_limit"]
    else:
        places = [_key(figures, backend, goal.against) for backend in (figures["backend"], BASELINE, "cpu")]
        other = next((known[place] for place in places if place in known), None)
        if other is None or "median_s" not in other:
            return result | {"missing": (other or {}).get("error", "it did not run")}
        ratio = other["median_s"] / figures["median_s"]
        if goal.by_rate:
            ratio *= figures["n_bytes"] / other["n_bytes"]
    return result | {"ratio": ratio, "met": None if asked is None else ratio >= asked}


def disagreements(records: Sequence[dict[str, Any]]) -> list[str]:
    """Rows whose output has other bits on one backend than on another."""
    found: dict[tuple[Any, ...], dict[str, int]] = {}
    for record in records:
        if "checksum" in record:
            key = (record["row"], record.get("n_elements"))
            found.setdefault(key, {})[record["backend"]] = record["checksum"]
    return [
        f"{row} ({n_elements}): outputs differ, checksums {sums}"
        for (row, n_elements), sums in found.items()
        if len(set(sums.values())) > 1
    ]


def table(result: Mapping[str, Any]) -> str:
    """The result as aligned text, and what is missing."""
    lines: list[tuple[str, ...]] = [_HEAD]
    notes = []
    for record in result["rows"]:
        name = f"{record['row']} ({record['backend']})"
        if "median_s" not in record:
            notes.append(f"{name}: {record.get('error') or record.get('unavailable')}")
            continue
        figures = (
            record["row"],
            f"{record['n_elements']:.3g}" if "n_elements" in record else "",
            record["backend"],
            f"{1e3 * record['median_s']:.3f}",
            f"{100 * record['spread']:.0f} %",
            f"{record['gb_per_s']:.0f}" if "gb_per_s" in record else "",
            f"{1e3 * record['limit_s']:.3f}" if "limit_s" in record else "",
            f"{100 * record['share_of_limit']:.0f} %" if "share_of_limit" in record else "",
        )
        compared = [_compared(one) for one in record["comparisons"] if one["against"] != LIMIT]
        own = [_compared(one)[2:] for one in record["comparisons"] if one["against"] == LIMIT]
        first = (LIMIT, figures[-1], *own[0]) if own and own[0][0] else ("",) * 4
        rest = compared if not first[0] else [first, *compared]
        rest = rest or [("",) * 4]
        lines.append((*figures, *rest[0]))
        lines += [("",) * len(figures) + one for one in rest[1:]]
    parts = [f"{result['device']['name']}, tvfast {result['environment']['tvfast']}, {result['commit']}"]
    limits = result["limits"]
    parts.append(", ".join(f"{key} {value / 1e9:.0f} G/s" for key, value in limits.items()))
    if len(lines) > 1:
        parts.append(aligned(lines))
    notes += [f"{note}" for note in disagreements(result["rows"])]
    return "\n".join([*parts, *(f"! {note}" for note in notes)])


def _compared(comparison: Mapping[str, Any]) -> tuple[str, str, str, str]:
    against = comparison["against"]
    if "missing" in comparison:
        return against, "missing", "", ""

    def shown(value: float | None) -> str:
        if value is None:
            return ""
        return f"{100 * value:.0f} %" if against == LIMIT or value < 1 else f"{value:.1f} x"

    met = {None: "", True: "yes", False: "NO"}[comparison["met"]]
    return against, shown(comparison["ratio"]), shown(comparison["asked"]), met
