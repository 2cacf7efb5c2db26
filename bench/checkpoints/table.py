"""From samples to figures: how many times the limit, how many times faster than mergekit, memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.checkpoints.rows import LIMIT, PEER, ROWS, TIES, Goal
from bench.table import aligned


def judged(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records with ratios, and one verdict per goal; errors pass through."""
    goals = {row.method: row.goals for row in ROWS}
    peers = {r["row"]: r for r in records if r["row"].startswith("mergekit ")}
    ties = next((r for r in records if r["row"] == TIES and r["cache"] == "warm" and "median_s" in r), {})
    result = []
    for record in records:
        figures = dict(record)
        if "at_most_s" in record:
            met = record["median_s"] < record["at_most_s"]
            figures["goals"] = [{"against": CLOCK, "asked": record["at_most_s"], "met": met}]
        if "error" not in record and "limit_s" in record:
            figures["times_limit"] = record["median_s"] / record["limit_s"]["median_s"]
            figures["read_gb_per_s"] = record["read_bytes"] / record["median_s"] / 1e9
            figures["peak_kept"] = record["peak_bytes"] <= record["promised_bytes"]
            if record["cache"] == "warm":
                peer = peers.get(f"mergekit {record['row']}", {})
                if "median_s" in peer:
                    figures["times_mergekit"] = peer["median_s"] / record["median_s"]
                    figures["peak_of_mergekit"] = record["peak_bytes"] / peer["peak_bytes"]
                if ties:
                    figures["times_ties"] = record["median_s"] / ties["median_s"]
                figures["goals"] = [_verdict(goal, figures) for goal in goals[record["row"]]]
        result.append(figures)
    return result


def _verdict(goal: Goal, figures: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"against": goal.against, "asked": goal.ratio, "met": None}
    if goal.against == LIMIT:
        return found | {"ratio": figures["times_limit"], "met": figures["times_limit"] <= goal.ratio}
    if goal.against == TIES:
        ratio = figures.get("times_ties")
        return found | ({} if ratio is None else {"ratio": ratio, "met": ratio <= goal.ratio})
    near = goal.otherwise_limit is not None and figures["times_limit"] <= goal.otherwise_limit
    if "times_mergekit" not in figures:
        return found | {"met": True if near else None}
    ratio = figures["times_mergekit"]
    return found | {"ratio": ratio, "met": ratio >= goal.ratio or near}


CLOCK = "clock"
_UNITS = {PEER: "x faster", LIMIT: "x limit", TIES: "x TIES", CLOCK: "s"}
_HEAD = (
    "row",
    "cache",
    "median s",
    "spread",
    "cat + cp s",
    "times",
    "mergekit s",
    "times faster",
    "asked",
    "met",
    "peak MiB",
    "promised",
    "mergekit's",
)


def table(result: dict[str, Any]) -> str:
    """The result as aligned text."""
    lines: list[tuple[str, ...]] = [_HEAD]
    peers = {r["row"]: r for r in result["rows"] if r["row"].startswith("mergekit ")}
    notes = []
    for record in result["rows"]:
        name = record["row"]
        if "error" in record:
            notes.append(f"! {name} ({record['cache']}): {record['error']}")
            continue
        if name in peers:
            continue
        peer = peers.get(f"mergekit {name}", {}) if record["cache"] == "warm" else {}
        goals = record.get("goals", ())
        asked = ", ".join(f"{goal['asked']:g} {_UNITS[goal['against']]}" for goal in goals)
        met = ", ".join({None: "?", True: "yes", False: "NO"}[g["met"]] for g in goals)
        lines.append(
            (
                name,
                record["cache"],
                f"{record['median_s']:.2f}",
                f"{100 * record['spread']:.0f} %",
                f"{record['limit_s']['median_s']:.2f}" if "limit_s" in record else "",
                _form(record, "times_limit", "{:.2f}"),
                _form(peer, "median_s", "{:.1f}"),
                _form(record, "times_mergekit", "{:.1f}"),
                asked,
                met,
                _mebibytes(record, "peak_bytes"),
                _mebibytes(record, "promised_bytes") + ("" if record.get("peak_kept", True) else " EXCEEDED"),
                _mebibytes(peer, "peak_bytes"),
            )
        )
    before, after = (
        ", ".join(f"{load:.2f}" for load in result[key]) for key in ("load_before", "load_after")
    )
    return "\n".join([aligned(lines), *notes, f"Load average before {before}; after {after}."])


def _form(record: dict[str, Any], key: str, form: str) -> str:
    return form.format(record[key]) if key in record else ""


def _mebibytes(record: dict[str, Any], key: str) -> str:
    return f"{record[key] / 2**20:.0f}" if key in record else ""
