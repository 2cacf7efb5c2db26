"""Every row of a backend once on little data, for tools that slow it down.

python -m bench.gpu.small DEVICE
"""

from __future__ import annotations

import sys

import torch

from bench.gpu.inputs import DeviceBuffers
from bench.gpu.merges import as_a_graph
from bench.gpu.registry import TINY, Place
from bench.gpu.suite import GROUPS, forced
from bench.registry import UnavailableError


def run(device: torch.device, backend: str = "cuda") -> list[str]:
    """Names of the rows that ran; what this build lacks is left out."""
    buffers = DeviceBuffers(96 * TINY.columns, device, TINY.columns)
    ran: list[str] = []
    for group, rows in GROUPS.items():
        place = Place(device, TINY, buffers if group == "merges" else None, backend)
        for row in rows:
            if row.baseline or row.make is as_a_graph:  # whose launches are those of another row
                continue
            try:
                with forced(backend), torch.no_grad():
                    row.make(place).run()
            except UnavailableError as error:
                print(f"{row.name}: {error}")
                continue
            ran.append(row.name)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return ran


if __name__ == "__main__":
    print(f"{len(run(torch.device(sys.argv[1])))} rows ran")
