"""What `tvfast collect` does: statistics of transformers models. Importing it imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvfast.collection.configuration import read_configuration
    from tvfast.collection.running import run

__all__ = ["read_configuration", "run"]


def __getattr__(name: str) -> Any:
    if name == "run":
        from tvfast.collection.running import run

        return run
    if name == "read_configuration":
        from tvfast.collection.configuration import read_configuration

        return read_configuration
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
