"""docs/parity.md, from bench/results/parity.json. A test compares the two."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.parity.recipe_sources import REPOSITORY, SOURCES, Source

_TEMPLATE = Path(__file__).with_name("page.md")


def page(result: Mapping[str, Any]) -> str:
    """The whole page."""
    environment, peer = result["environment"], result["peer"]
    sources = {source.name: source for source in SOURCES}
    exact, random, remarks = [], [], []
    for record in result["comparisons"]:
        source = sources[record["recipe"]]
        if record.get("statistics"):
            random.append(_random_row(record, source))
        elif "method" in record:
            exact.append(_exact_row(record, source))
        remarks += [f"- {record['recipe']} on {record['family']}: {d}" for d in record["differences"]]
    return _TEMPLATE.read_text().format(
        version=peer["version"],
        torch=peer["torch"],
        tvfast=environment["tvfast"],
        commit=(environment["commit"] or "no commit")[:12],
        cpu=environment["cpu"],
        repository=REPOSITORY,
        exact="\n".join(exact),
        random="\n".join(random),
        differences="\n".join(remarks) or "None.",
        sources="\n".join(f"| {s.name} | {s.path} | {s.commit[:12]} | {s.mapped} |" for s in SOURCES),
    )


def _exact_row(record: Mapping[str, Any], source: Source) -> str:
    cells = (
        record["recipe"],
        source.path,
        record["method"],
        record["family"],
        record["dtype"],
        f"{record['n_elements']:,}",
        f"{record['n_tied']:,}",
        f"{record['n_differing']:,}",
        f"{record['n_over']:,}",
        f"{record['max_steps']:,}",
        f"{record['max_bfloat16_steps']:,}",
        f"{record['max_units']:.1f}" if record["n_over"] else "",
    )
    return f"| {' | '.join(cells)} |"


def _random_row(record: Mapping[str, Any], source: Source) -> str:
    found = record["statistics"]
    cells = [record["recipe"], source.path, record["method"], record["family"], record["dtype"]]
    for what, form in (("changed", "{:.5f}"), ("mean_change", "{:.4e}")):
        cells += [form.format(found[f"{what}_ours"]), form.format(found[f"{what}_mergekit"])]
        cells.append(f"{found[f'{what}_sigmas']:.1f}")
    return f"| {' | '.join(cells)} |"
