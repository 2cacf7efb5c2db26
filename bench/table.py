"""From samples to figures: bandwidth, share of the limit, ratios, and whether a target is met."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.registry import LIMIT, ROWS, Goal


def judged(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records with GB/s, share of the limit, and one comparison per goal; errors pass through."""
    goals = {row.name: row.goals for row in ROWS}
    medians = {(r["row"], r["threads"]): r["median_s"] for r in records if "median_s" in r}
    errors = {r["row"]: r["error"] for r in records if "error" in r}
    result = []
    for record in records:
        figures = dict(record)
        if "median_s" in record:
            if "n_bytes" in record:
                figures["gb_per_s"] = record["n_bytes"] / record["median_s"] / 1e9
            if "limit_s" in record:
                figures["limit_gb_per_s"] = record["n_bytes"] / record["limit_s"]["median_s"] / 1e9
                figures["share_of_limit"] = record["limit_s"]["median_s"] / record["median_s"]
            figures["comparisons"] = [
                _comparison(goal, figures, medians, errors)
                for goal in goals.get(record["row"], ())
                if goal.threads == record["threads"]
            ]
        result.append(figures)
    return result


def _comparison(
    goal: Goal,
    figures: dict[str, Any],
    medians: dict[tuple[str, int], float],
    errors: dict[str, str],
) -> dict[str, Any]:
    """`ratio` is the share of the limit, or how many times faster than the baseline on one thread."""
    target = goal.at_least or None  # 0: compared, nothing asked
    found: dict[str, Any] = {"against": goal.against, "target": target}
    if goal.against == LIMIT:
        ratio = figures["share_of_limit"]
    elif (goal.against, 1) in medians:
        ratio = medians[goal.against, 1] / figures["median_s"]
    else:
        return found | {"error": f"baseline missing: {errors.get(goal.against, 'it did not run')}"}
    return found | {"ratio": ratio, "met": None if target is None else ratio >= target}


_ENOUGH_HUGE_PAGES = 0.95

_HEAD = (
    "row",
    "threads",
    "median ms",
    "spread",
    "GB/s",
    "limit GB/s",
    "share",
    "against",
    "ratio",
    "target",
    "met",
)


def table(result: dict[str, Any]) -> str:
    """The result as aligned text."""
    lines: list[tuple[str, ...]] = [_HEAD]
    notes: list[str] = []
    for record in result["rows"]:
        name = (record["row"], str(record["threads"]))
        if "error" in record:
            notes.append(f"{name[0]} ({name[1]}): {record['error']}")
            continue
        figures = (
            f"{1e3 * record['median_s']:.1f}",
            f"{100 * record['spread']:.0f} %",
            _number(record, "gb_per_s", "{:.1f}"),
            _number(record, "limit_gb_per_s", "{:.1f}"),
            f"{100 * record['share_of_limit']:.0f} %" if "share_of_limit" in record else "",
        )
        compared = [_compared(comparison) for comparison in record["comparisons"]] or [("",) * 4]
        lines.append((*name, *figures, *compared[0]))
        lines += [("",) * 7 + more for more in compared[1:]]
        notes += [
            f"{name[0]} against {c['against']}: {c['error']}" for c in record["comparisons"] if "error" in c
        ]
    parts = []
    if len(lines) > 1:
        parts.append(aligned(lines))
    if result["memory"]:
        parts.append(_memory(result["memory"]))
    parts += [f"! {note}" for note in notes]
    share = (result["inputs"] or {}).get("huge_page_share")
    if share is not None and share < _ENOUGH_HUGE_PAGES:
        parts.append(f"! Only {100 * share:.0f} % of the inputs lie on huge pages: bandwidths are too low.")
    if not result["full_size"]:
        parts.append("Targets are stated for 67108864 elements: at this size `met` is no verdict.")
    before, after = (
        ", ".join(f"{load:.2f}" for load in result[key]) for key in ("load_before", "load_after")
    )
    parts.append(f"Load average before {before}; after {after}.")
    return "\n".join(parts)


def _number(record: dict[str, Any], key: str, form: str) -> str:
    return form.format(record[key]) if key in record else ""


def _compared(comparison: dict[str, Any]) -> tuple[str, str, str, str]:
    against, target = comparison["against"], comparison["target"]
    if "error" in comparison:
        return against, "missing", "", ""

    def shown(value: float | None) -> str:
        if value is None:
            return ""
        return f"{100 * value:.0f} %" if against == LIMIT else f"{value:.1f} x"

    met = {None: "", True: "yes", False: "NO"}[comparison["met"]]
    return against, shown(comparison["ratio"]), shown(target), met


def _memory(records: Sequence[dict[str, Any]]) -> str:
    lines: list[tuple[str, ...]] = [("peak extra memory", "threads", "MiB", "allowed MiB", "met")]
    for record in records:
        if "error" in record:
            lines.append((record["row"], str(record["threads"]), record["error"], "", ""))
            continue
        mib = [f"{record[key] / 2**20:.1f}" for key in ("extra_bytes", "allowed_bytes")]
        lines.append((record["row"], str(record["threads"]), *mib, "yes" if record["met"] else "NO"))
    return aligned(lines)


def aligned(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
