"""`tvfast inspect`: what is in a checkpoint, and how several differ."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tvfast.cli.progress import TerminalProgress
from tvfast.cli.quantities import bytes_as_text, counted
from tvfast.errors import ArgumentError

if TYPE_CHECKING:
    from tvfast.checkpoint.reading import Checkpoint
    from tvfast.inspection.figures import TaskVectors
    from tvfast.inspection.headers import HeaderDifferences
    from tvfast.inspection.measuring import Measured

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_CONFIG = (
    "architectures",
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
    "dtype",
    "torch_dtype",
)
_SHOWN = 8  # names of one kind in the text; JSON has all
_PAIRS = 6  # columns of cosines in the text


def add_to(commands: Commands) -> None:
    """Register the subcommand."""
    command = commands.add_parser(
        "inspect",
        help="what is in a checkpoint, and how several differ",
        description=(
            "Print files, tensors and storage types of a checkpoint, from its headers. With several, the "
            "first is the base: print what differs, and norms, cosines, sign conflict, sparsity and tie mass "
            "of the task vectors per layer."
        ),
    )
    command.add_argument(
        "paths", nargs="+", metavar="CHECKPOINT", help="directory or file; the first is the base"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object, with every tensor")
    command.add_argument(
        "--html", metavar="FILE", help="write a page that shows how the models differ, in one file"
    )
    command.add_argument(
        "--png",
        metavar="FILE",
        help="write the main picture; needs tvfast[pictures]",
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print one description, or several and how they differ; write the page and the picture.

    Raises:
        ArgumentError: a page or picture of one checkpoint is asked for.
        OutputError: a file cannot be written.
        ImportError: a picture is asked for, and matplotlib is not installed.
    """
    from tvfast.checkpoint.reading import open_checkpoint

    written = {option: getattr(options, option) for option in ("html", "png") if getattr(options, option)}
    _check(written, options.paths)
    checkpoints = [open_checkpoint(path) for path in options.paths]
    described = [describe(one) for one in checkpoints]
    if len(checkpoints) == 1:
        print(json.dumps(described[0], indent=2) if options.json else as_text(described[0]))
        return 0
    headers, measured = _compared(checkpoints)
    found = {
        "checkpoints": described,
        "differences": headers.as_json(options.paths),
        "task_vectors": measured.as_json(),
    }
    _write(written, found)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for role, one in zip(("base", *range(1, len(described))), described, strict=True):
        print(f"{role:>4}  {_one_line(one)}")
    print()
    print(_headers_as_text(options.paths, headers))
    if measured.tensors:
        print()
        print(_table({**measured.layers(), "all": measured.total()}))
    for path in written.values():
        print(f"\nWritten: {path}")
    return 0


def _compared(checkpoints: Sequence[Checkpoint]) -> tuple[HeaderDifferences, Measured]:
    """Headers, and every tensor that all have, read once."""
    from tvfast.checkpoint.factors import with_factors
    from tvfast.inspection.headers import header_differences
    from tvfast.inspection.measuring import task_vectors

    numbers = [with_factors(one, missing_is_one=True) for one in checkpoints]
    headers = header_differences(numbers)
    progress = TerminalProgress()
    stored = [one.tensors[name] for one in numbers for name in headers.common]
    progress.start(sum(part.n_bytes for one in stored for part in (one, *one.sides)), 0)
    try:
        return headers, task_vectors(numbers, headers.common, read=progress.read)
    finally:
        progress.finish()


def _check(written: dict[str, str], paths: Sequence[str]) -> None:
    """Refuse before anything is read."""
    from tvfast.inspection.page import check_place

    for option, path in written.items():
        if len(paths) == 1:
            raise ArgumentError(
                f"--{option} shows how models differ from their base, and there is one checkpoint; expected "
                "the base and then one model at least."
            )
        check_place(path)
    if "png" in written:
        from tvfast.inspection.picture import check_library

        check_library()


def _write(written: dict[str, str], found: dict[str, Any]) -> None:
    if "html" in written:
        from tvfast.inspection.page import write_page

        write_page(written["html"], "inspect", found)
    if "png" in written:
        from tvfast.inspection.picture import draw

        draw(found, written["png"])


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint as plain data; tied tensors count once in parameters and bytes."""
    own = [stored for name, stored in checkpoint.tensors.items() if name not in checkpoint.aliases]
    dtypes: dict[str, dict[str, int]] = {}
    for stored in own:
        row = dtypes.setdefault(stored.dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
        row["tensors"] += 1
        row["parameters"] += stored.n_elements
        row["bytes"] += stored.n_bytes
    config = checkpoint.config or {}
    n_tensors = _tensors_by_file(checkpoint)
    return {
        "path": checkpoint.path,
        "files": [
            {
                "name": os.path.basename(header.path),
                "bytes": header.n_bytes,
                "tensors": n_tensors[header.path],
            }
            for header in checkpoint.headers
        ],
        "tensors": len(checkpoint.tensors),
        "parameters": sum(row["parameters"] for row in dtypes.values()),
        "bytes": sum(row["bytes"] for row in dtypes.values()),
        "dtypes": dtypes,
        "scales": _scales(checkpoint),
        "layers": _layers(checkpoint.tensors),
        "config": {key: config[key] for key in _CONFIG if key in config},
        "aliases": dict(checkpoint.aliases),
        "metadata": _metadata(checkpoint),
    }


def as_text(found: dict[str, Any]) -> str:
    """One description as lines."""
    lines = [
        f"path        {found['path']}",
        f"files       {len(found['files'])}, {bytes_as_text(sum(one['bytes'] for one in found['files']))}",
        *(
            f"  {one['name']}  {counted(one['tensors'], 'tensor')}, {bytes_as_text(one['bytes'])}"
            for one in found["files"][:_SHOWN]
        ),
    ]
    if len(found["files"]) > _SHOWN:
        lines.append(f"  and {len(found['files']) - _SHOWN} more")
    lines += [
        f"tensors     {found['tensors']}",
        f"parameters  {found['parameters']:,}",
        *(
            f"  {name:6} {counted(row['tensors'], 'tensor')}, {row['parameters']:,} parameters, "
            f"{bytes_as_text(row['bytes'])}"
            for name, row in found["dtypes"].items()
        ),
    ]
    scales = found["scales"]
    lines += [f"scales      of {counted(n, 'tensor')}: {what}" for what, n in scales["by"].items()]
    lines += _list("8-bit without scales:", scales["missing"])
    lines += [f"layers      {count} in {prefix}" for prefix, count in found["layers"].items()]
    lines += [f"config      {key} {_value(value)}" for key, value in found["config"].items()]
    lines += [f"tied        {name} is {first}" for name, first in found["aliases"].items()]
    lines += [f"metadata    {key} {value}" for key, value in found["metadata"].items()]
    return "\n".join(lines)


def _tensors_by_file(checkpoint: Checkpoint) -> Counter[str]:
    """How many tensors each file holds, or has pieces of."""
    found: Counter[str] = Counter()
    for stored in checkpoint.tensors.values():
        found.update({piece.path for piece in stored.pieces} or {stored.path})
    return found


def _scales(checkpoint: Checkpoint) -> dict[str, Any]:
    """How the 8-bit tensors are scaled: how many by tensor, row or block, and which are not."""
    from tvfast.checkpoint.factors import with_factors

    by: dict[str, int] = {}
    missing = []
    for stored in with_factors(checkpoint, missing_is_one=True).tensors.values():
        blocks = stored.blocks
        if blocks is None:
            continue
        if blocks.factors is None:
            missing.append(stored.name)
            continue
        what = f"one per block of {blocks.rows} x {blocks.columns}"
        if blocks.factors.n_elements == 1:
            what = "one per tensor"
        elif blocks.rows == 1:
            what = "one per row"
        by[what] = by.get(what, 0) + 1
    return {"by": by, "missing": missing}


def _layers(names: Sequence[str] | dict[str, Any]) -> dict[str, int]:
    """How many numbers follow a prefix: {"model.layers": 24}; numbers deeper in a name are not looked at."""
    numbers: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        index = next((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), 0)
        if index:
            numbers.setdefault(".".join(parts[:index]), set()).add(parts[index])
    return {prefix: len(found) for prefix, found in numbers.items()}


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """Metadata of all headers; where shards disagree, the first one's."""
    found: dict[str, str] = {}
    for header in reversed(checkpoint.headers):
        found |= header.metadata
    return found


def _one_line(found: dict[str, Any]) -> str:
    dtypes = ", ".join(found["dtypes"])
    return (
        f"{found['path']}: {counted(found['tensors'], 'tensor')}, {found['parameters']:,} parameters, "
        f"{bytes_as_text(found['bytes'])}, {dtypes}"
    )


def _headers_as_text(paths: Sequence[str], found: HeaderDifferences) -> str:
    lines = []
    for path, names in zip(paths, found.missing, strict=True):
        lines += _list(f"{path} lacks", names)
    for name, shapes in list(found.shapes.items())[:_SHOWN]:
        lines.append(f"shapes differ: {name}: {', '.join(str(list(one)) if one else '-' for one in shapes)}")
    for name, dtypes in list(found.dtypes.items())[:_SHOWN]:
        lines.append(f"types differ: {name}: {', '.join(one or '-' for one in dtypes)}")
    hidden = max(0, len(found.shapes) - _SHOWN) + max(0, len(found.dtypes) - _SHOWN)
    if hidden:
        lines.append(f"and {hidden} more shapes and types; --json has all")
    lines += _list("not compared:", [f"{name} ({why})" for name, why in found.not_compared.items()])
    return "\n".join(lines) or "The sets of tensors, their shapes and types are equal."


def _list(title: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{title} {', '.join(names[:_SHOWN])}{more}"]


def _table(rows: dict[str, TaskVectors]) -> str:
    """One line per layer; shares are means over the models."""
    n_models = len(next(iter(rows.values())).gram)
    pairs = [(j, k) for k in range(n_models) for j in range(k)]
    shown = pairs if len(pairs) <= _PAIRS else []
    width = max(len("task vectors"), *(len(name) for name in rows))
    header = [f"{'task vectors':{width}}"]
    header += [f"{f'norm {k + 1}':>10}" for k in range(n_models)]
    header += [f"{f'cos {j + 1},{k + 1}':>8}" for j, k in shown]
    header += ["mean cos" for _ in pairs[: len(pairs) > len(shown)]]
    header += [f"{'conflict':>8}", f"{'zero':>7}", f"{'tied':>7}"]
    lines = ["  ".join(header)]
    for name, row in rows.items():
        cells = [f"{name:{width}}"]
        cells += [f"{norm:10.4g}" for norm in row.norms]
        cosines = [row.cosine(j, k) for j, k in pairs]
        if shown:
            cells += [f"{cosine:8.4f}" for cosine in cosines]
        elif pairs:
            cells.append(f"{math.fsum(cosines) / len(cosines):8.4f}")
        cells.append(f"{row.share(row.n_conflict):8.2%}")
        cells += [f"{row.share(sum(counts)) / n_models:7.2%}" for counts in (row.n_zero, row.n_tied)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
