"""What `tvfast sweep` does: a recipe at many points, a function on each merge, a table and a picture.

Importing it imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvfast.sweeping.configuration import Objective, Sweep, SweepAxis, read_sweep

if TYPE_CHECKING:
    from tvfast.sweeping.running import Outcome, Preview, preview, run
    from tvfast.sweeping.table import Row

__all__ = ["Objective", "Outcome", "Preview", "Row", "Sweep", "SweepAxis", "preview", "read_sweep", "run"]

_HOMES = {"Outcome": "running", "Preview": "running", "preview": "running", "run": "running", "Row": "table"}


def __getattr__(name: str) -> Any:
    if name == "Row":
        from tvfast.sweeping.table import Row

        return Row
    if name in _HOMES:
        from tvfast.sweeping import running

        return getattr(running, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}.")
