"""Inputs in device memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from bench.buffers import COLUMNS, N_MODELS, SEED, fill
from tvfast.ops._views import view
from tvfast.program import DType, Entry, View, WorkTable

_BYTES_PER_ELEMENT = 48
"""Inputs, scores, an output, and what a row needs besides; baselines that need more say so."""


@dataclass
class DeviceBuffers:
    """base, three models and an output as `bench.buffers.Buffers` has them, on a device."""

    n_elements: int
    device: torch.device
    columns: int = COLUMNS
    base: Tensor = field(init=False, repr=False)
    models: list[Tensor] = field(init=False, repr=False)
    out: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        shape = (self.n_elements // self.columns, self.columns)
        self.base, self.out, *self.models = (
            torch.zeros(shape, dtype=torch.bfloat16, device=self.device) for _ in range(N_MODELS + 2)
        )
        fill(self.base, self.models)

    @property
    def n_bytes(self) -> int:
        """Of one tensor."""
        return 2 * self.n_elements

    @cached_property
    def scores(self) -> list[Tensor]:
        """[K] float32 importances, not negative."""
        generator = torch.Generator(self.device).manual_seed(SEED)
        return [
            torch.randn(self.base.shape, generator=generator, device=self.device).abs_()
            for _ in range(N_MODELS)
        ]

    def plane(self, n_bits: int) -> View:
        """A new bit plane."""
        words = torch.zeros(-(-n_bits // 64), dtype=torch.int64, device=self.device)
        return View(words.data_ptr(), n_bits, DType.F32, words)

    def table(self, *, row: int = 0, scores: bool = False) -> WorkTable:
        """One tensor of every model, merged into `out`."""
        entry = Entry(
            name="tensor",
            models=tuple(view(model, "tensor", "models") for model in self.models),
            base=view(self.base, "tensor", "base"),
            out=view(self.out, "tensor", "out"),
            scores=tuple(view(score, "tensor", "scores") for score in self.scores) if scores else (),
            row=row,
        )
        return WorkTable([entry], N_MODELS)

    def pair(self) -> WorkTable:
        """The base and a model as two models of one tensor, merged into `out`."""
        models = tuple(view(one, "tensor", "models") for one in (self.base, self.models[0]))
        return WorkTable([Entry(name="tensor", models=models, out=view(self.out, "tensor", "out"))], 2)


def fitting(n_elements: int, device: torch.device, columns: int = COLUMNS) -> int:
    """`n_elements` in whole rows, or as many as the device's free memory is good for."""
    most = n_elements
    if device.type == "cuda":
        most = min(most, torch.cuda.mem_get_info(device)[0] // _BYTES_PER_ELEMENT)
    return max(1, most // columns) * columns
