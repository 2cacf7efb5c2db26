"""Device memory of the CUDA backend: what was packed on the host, and the stream that it was made on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tvfast.ops._native import native_table
from tvfast.program import WorkTable


@dataclass(frozen=True, slots=True)
class Resident:
    """What was packed on the host, and the device memory that it names."""

    native: Any
    alive: tuple[Tensor, ...]


class Home:
    """The stream that device memory was made on, for memory that outlives the call that made it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            self._stream = torch.cuda.current_stream(device)
            self._made = self._stream.record_event()

    def share(self, memory: Iterable[Tensor]) -> None:
        """Lets the present stream use the memory: it waits for the uploads, and the memory for it.

        A stream that is being captured does neither: whoever keeps a graph keeps what it works on.
        """
        if self._device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return
        stream = torch.cuda.current_stream(self._device)
        if stream == self._stream:
            return
        stream.wait_event(self._made)
        for one in memory:
            one.record_stream(stream)


def native_of(module: Any, table: WorkTable) -> Any:
    """The table as the module reads it."""
    native = table.cache.get("cuda native")
    if native is None:
        native = native_table(module, table)
        table.cache["cuda native"] = native
    return native


def device_of(table: WorkTable) -> torch.device:
    """Where a table with entries is."""
    owner: Tensor = table.entries[0].models[0].owner
    return owner.device
