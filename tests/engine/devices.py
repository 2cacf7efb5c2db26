"""A family that needs every way of merging on a device, and merges of it on a double."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tvfast
from tests.engine.double import HostDouble
from tvfast.engine import device as devices
from tvfast.engine import device_plan, memory
from tvfast.engine import plan as planning
from tvfast.engine.memory import Block, Slot
from tvfast.statistics import Document, Record, StatisticsWriter
from tvfast.statistics.tensors import array_of

MEMBERS = ("base", "ft1", "ft2", "ft3")
SHAPES = {
    "embed.weight": (401, 1031),
    "norm.weight": (1031,),
    "none.weight": (0, 7),
    "proj.weight": (96, 400),
    "scalar": (),
    "tail.weight": (3, 5),
    "wide.weight": (280, 640),
}
"""The first is seven times 65536 elements, the smallest piece; the last fits a unit."""


def write_family(root: Path, shapes: dict[str, tuple[int, ...]] | None = None) -> Path:
    """A base and three models in bfloat16, and a tensor of three bytes that others follow."""
    drawn = torch.Generator().manual_seed(11)
    base = {
        name: (torch.randn(shape, generator=drawn) * 0.02).bfloat16()
        for name, shape in (SHAPES if shapes is None else shapes).items()
    }
    for member in MEMBERS:
        tensors = {
            name: (t.float() + (member != "base") * 1e-3 * torch.randn(t.shape, generator=drawn)).bfloat16()
            for name, t in base.items()
        }
        tensors["flag"] = torch.tensor([True, False, True])
        (root / member).mkdir(parents=True)
        save_file(tensors, root / member / "model.safetensors", {"format": "pt"})
    return root


def write_statistics(root: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Importances and Fisher of every model of a family: few values, so that thresholds have ties."""
    drawn = torch.Generator().manual_seed(12)
    for member in MEMBERS[1:]:
        with StatisticsWriter(root / f"{member}.stats", Document()) as writer:
            for name, shape in shapes.items():
                sums = torch.randint(0, 40, shape, generator=drawn).float() / 8
                for kind in ("weight", "fisher"):
                    array = array_of(sums, name, summary=True)
                    writer.add(Record(name, kind, shape, {"sum": array}, {"samples": 4}))


def scored_recipe(root: Path, method: str, parameters: dict[str, Any], **own: Any) -> dict[str, Any]:
    """A recipe in which every model has its statistics; of the first model where it is the source itself."""
    found = recipe(root, method, parameters, **own)
    models = found["models"][:1] if own.get("source") == "model" else found["models"]
    found["models"] = [{**one, "stats": f"{one['model']}.stats"} for one in models]
    if method == "fisher":
        del found["base_model"]
    return found


def recipe(root: Path, method: str, parameters: dict[str, Any], **own: Any) -> dict[str, Any]:
    """Of the whole family; methods of two models take one, those without a base take it as a model."""
    models = MEMBERS[1:2] if method in ("slerp", "passthrough") else MEMBERS[1:]
    found = {
        "merge_method": method,
        "models": [{"model": str(root / m), "parameters": {"weight": 0.5}} for m in models],
        "parameters": parameters,
        "tvfast": own,
    }
    if method in ("slerp", "passthrough"):
        found["models"] = [{"model": str(root / m)} for m in models]
    if method not in ("linear", "passthrough"):
        found["base_model"] = str(root / "base")
    return found


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that cut, stream and offload megabytes as real ones do with gigabytes."""
    for name in ("PROGRAM_BYTES", "SCRATCH_BYTES", "RANK_BYTES", "STREAM_BYTES"):
        monkeypatch.setattr(planning, name, 0)
    monkeypatch.setattr(planning, "UNIT_BYTES", 2**20)
    monkeypatch.setattr(device_plan, "UNIT_BYTES", 2**20)
    monkeypatch.setattr(device_plan, "SCRATCH_BYTES", 2**18)


@contextmanager
def using(device: HostDouble) -> Iterator[HostDouble]:
    """The double is the GPU of this machine; host memory that it may still use is not lent again."""

    def checked(kind: type[Block] | type[Slot]) -> Any:
        release = kind.release

        def release_unused(self: Any) -> None:
            device.check_unused(self.address, self.n_bytes)
            release(self)

        return release_unused

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "no_driver", lambda: None)
        patch.setattr(devices, "find", lambda name: device)
        patch.setattr(memory.Block, "release", checked(Block))
        patch.setattr(memory.Slot, "release", checked(Slot))
        yield device


def merge_on(device: HostDouble, config: Any, out: Path, **options: Any) -> tvfast.checkpoints.Report:
    """A merge whose device is the double, which is closed afterwards."""
    with using(device):
        try:
            return tvfast.merge_checkpoints(config, out, device="cuda", **options)
        finally:
            assert not device.is_open
