"""Run a peer's cases with and without its integration, in the peer's interpreter.

PEER/bin/python live.py NAME OUT.json            compare, case by case
PEER/bin/python live.py NAME OUT.npz --golden    write what the peer gives, for the default suite
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import PEERS, Case, Results, apart, ulps

SEED = 1234


def run(case: Case, api: Any) -> Results:
    torch.manual_seed(SEED)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return case.call(api)


def compared(case: Case, api: Any, integration: Any) -> dict[str, Any]:
    wanted = run(case, api)
    integration.install(rng="peer" if case.seeded else "tvfast")
    try:
        found = run(case, api)
        counts = integration.stats()
        left = integration.fallbacks()
    finally:
        integration.uninstall()
    again = run(case, api)
    same_form = found.keys() == wanted.keys() and all(
        (found[k].shape, found[k].dtype) == (wanted[k].shape, wanted[k].dtype) for k in wanted
    )
    return {
        "name": case.name,
        "form": same_form,
        "apart": max(apart(found[k], wanted[k], case.ulps) for k in wanted) if same_form else -1,
        "allowed": case.ulps,
        "restored": all(ulps(again[k], wanted[k]) == 0 for k in wanted),
        "served": case.hook is None or counts.get(case.hook, 0) > 0,
        "stats": counts,
        "fallbacks": left,
    }


def main() -> None:
    name, target = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    peer = PEERS[name]
    api, found = peer.api(), version(peer.distribution)
    cases = [case for case in peer.cases() if not case.versions or found in case.versions]
    if "--golden" in sys.argv:
        arrays = {
            f"{case.name}|{key}": value.numpy()
            for case in cases
            if not case.seeded
            for key, value in run(case, api).items()
        }
        record = {"peer": peer.distribution, "version": found, "torch": torch.__version__}
        text = np.frombuffer(json.dumps(record).encode(), np.uint8)
        np.savez_compressed(target, record=text, **arrays)
        return
    integration = importlib.import_module(f"tvfast.integrations.{name}")
    results = [compared(case, api, integration) for case in cases]
    target.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
