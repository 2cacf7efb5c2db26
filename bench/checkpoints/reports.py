"""What `tvfast merge --report` costs: merges with and without it in turn; print a table and write it as JSON.

    python -m bench.checkpoints.reports --family FOLDER [--method ties] [--rounds 5] [--out bench/results]

FOLDER is what `python -m bench.checkpoints.family FOLDER --preset 0.5b` writes. Inputs are in the page cache;
odd rounds begin with the report. Ratios are medians of the rounds', of time on the clock and of processor
time, start-up and the writing of the page included.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from typing import Any

from bench.checkpoints.options import beginning, family_parser, parsed
from bench.checkpoints.rows import ROWS, TIES, MethodRow
from bench.checkpoints.running import Finished, remove, warm
from bench.checkpoints.suite import Place, merge, working_in
from bench.environment import load_average
from bench.suite import write
from bench.timing import Summary


def measured(place: Place, row: MethodRow, rounds: int) -> dict[str, Any]:
    """One record of a method.

    Raises:
        RunError: a merge fails.
    """
    report = place.work / "report"
    options: dict[bool, tuple[str, ...]] = {False: (), True: ("--report", str(report))}
    runs: dict[bool, list[Finished]] = {False: [], True: []}
    for number in range(rounds):
        for shown in (False, True) if number % 2 == 0 else (True, False):
            warm(place.inputs(row))
            runs[shown].append(merge(place, row, options[shown]))
            remove(report)
    pairs = list(zip(runs[True], runs[False], strict=True))
    return {
        "row": f"{row.method} --report",
        **{
            name: {
                "seconds": Summary(tuple(run.seconds for run in runs[shown])).record(),
                "cpu_s": Summary(tuple(run.cpu_s for run in runs[shown])).record(),
                "peak_bytes": max(run.peak_bytes for run in runs[shown]),
            }
            for name, shown in (("without", False), ("with", True))
        },
        "ratio": statistics.median(one.seconds / other.seconds for one, other in pairs),
        "cpu_ratio": statistics.median(one.cpu_s / other.cpu_s for one, other in pairs),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured, whatever the figures; 2 wrong arguments."""
    options = parsed(family_parser("bench.checkpoints.reports", __doc__), arguments)
    family = options.family
    result = beginning("reports of merges", family)
    rows = [row for row in ROWS if row.method in (options.method or [TIES])]
    with working_in(family) as work:
        records = [measured(Place(family, work), row, options.rounds) for row in rows]
    result |= {"rows": records, "load_after": load_average()}
    print("row                     without      with   ratio   CPU without      with   ratio")
    for record in records:
        clock, cpu = (
            [record[name][kind]["median_s"] for name in ("without", "with")] for kind in ("seconds", "cpu_s")
        )
        print(
            f"{record['row']:<22} {clock[0]:>6.2f} s {clock[1]:>7.2f} s {record['ratio']:>7.3f} "
            f"{cpu[0]:>11.2f} s {cpu[1]:>7.2f} s {record['cpu_ratio']:>7.3f}"
        )
    print(write(result, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
