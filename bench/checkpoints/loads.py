"""Merge a family with every method, load each result with transformers, and run it.

    TVFAST_MERGEKIT_PYTHON=PEER/bin/python python -m bench.checkpoints.loads --family FOLDER [--method ties]

The environment is that of tests/parity/make_env.sh, with transformers. Writes bench/results/loads-N.json,
N being the parameters of the family.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.checkpoints.options import family_parser, parsed
from bench.checkpoints.peer import VARIABLE
from bench.checkpoints.rows import ROWS, MethodRow
from bench.checkpoints.running import RunError, remove, run, tvfast
from bench.checkpoints.suite import Place, working_in
from bench.environment import environment

_SCRIPT = Path(__file__).with_name("load_in_transformers.py")


def loaded(place: Place, row: MethodRow, python: str) -> dict[str, Any]:
    """What was found of one method's output; `problems` is empty where all is well."""
    remove(place.out)
    try:
        tvfast("merge", str(place.recipe(row)), str(place.out))
        done = run([python, str(_SCRIPT), str(place.out)], environment={"HF_HUB_OFFLINE": "1"})
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        del found["folder"]
    except RunError as error:
        found = {"problems": [str(error)]}
    finally:
        remove(place.out)
    return {"method": row.method, **found}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 all load and give finite logits; 1 one does not; 2 wrong arguments."""
    parser = family_parser("bench.checkpoints.loads", __doc__, rounds=False)
    options = parsed(parser, arguments)
    python = os.environ.get(VARIABLE)
    if not python:
        parser.error(f"{VARIABLE} is not set; tests/parity/make_env.sh makes an environment")
    family = options.family
    record = json.loads((family / "family.json").read_text())
    rows = [row for row in ROWS if not options.method or row.method in options.method]
    with working_in(family) as work:
        place = Place(family, work)
        found = []
        for row in rows:
            found.append(loaded(place, row, python))
            print(f"{row.method}: {'; '.join(found[-1]['problems']) or 'loads, finite logits'}", flush=True)
    result = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "what": "merged checkpoints in transformers",
        "environment": environment(),
        "family": record,
        "methods": found,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"loads-{record['parameters']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)
    return int(any(entry["problems"] for entry in found))


if __name__ == "__main__":
    sys.exit(main())
