"""A pytest plugin for a peer's own test suite: switches an integration on, and records every outcome.

TVFAST_PEER names the integration, or is empty for a run without; TVFAST_RECORD is the JSON file to write.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

_OUTCOMES: dict[str, str] = {}
_PEER = os.environ.get("TVFAST_PEER", "")


def pytest_configure(config: Any) -> None:
    if _PEER:
        importlib.import_module(f"tvfast.integrations.{_PEER}").install()


def pytest_runtest_logreport(report: Any) -> None:
    # A failure or a skip during set-up is the test's outcome too.
    if report.when == "call" or report.outcome != "passed":
        _OUTCOMES[report.nodeid] = report.outcome


def pytest_unconfigure(config: Any) -> None:
    record: dict[str, Any] = {"outcomes": _OUTCOMES}
    if _PEER:
        peer = importlib.import_module(f"tvfast.integrations.{_PEER}")
        record |= {"stats": peer.stats(), "fallbacks": peer.fallbacks()}
    Path(os.environ["TVFAST_RECORD"]).write_text(json.dumps(record, indent=1))
