"""Distributed checkpoints written by hand: places that are none, and what reads pieces beside merges."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tvfast
from tests.cli.families import load, write_checkpoint
from tvfast.checkpoint import dcp_entry, dcp_layout
from tvfast.checkpoint.dcp import read_dcp
from tvfast.checkpoint.reading import open_checkpoint
from tvfast.cli.main import main
from tvfast.engine import reading
from tvfast.errors import CheckpointError
from tvfast.inspection.measuring import task_vectors


def write_pieces(folder: Path, tensors: Mapping[str, Tensor], n: int) -> Path:
    """Rows in `n` pieces of a file each, as so many processes save them."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    folder.mkdir()
    files = [bytearray() for _ in range(n)]
    metadata = Metadata({}, {}, {}, StorageMeta(), "1.0.0")
    for name, tensor in tensors.items():
        chunks, start = [], 0
        for number, piece in enumerate(torch.chunk(tensor, n)):
            first = torch.Size([start, *[0] * (tensor.ndim - 1)])
            chunks.append(ChunkStorageMetadata(first, piece.shape))
            archive = io.BytesIO()
            torch.save(piece.clone(), archive)
            place = _StorageInfo(f"__{number}_0.distcp", len(files[number]), len(archive.getvalue()))
            metadata.storage_data[MetadataIndex(name, first, number)] = place
            files[number] += archive.getvalue()
            start += piece.shape[0]
        properties = TensorProperties(dtype=tensor.dtype)
        metadata.state_dict_metadata[name] = TensorStorageMetadata(properties, tensor.shape, chunks)
        metadata.planner_data[name] = (name,)
    for number, raw in enumerate(files):
        (folder / f"__{number}_0.distcp").write_bytes(raw)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


@pytest.mark.parametrize(
    "first",
    [
        dcp_entry.integer(5),
        dcp_entry.tuple_of((b"]",)),  # which has no hash
        b")" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(60)),  # 2^60 tuples, were they all looked at
    ],
    ids=["a number", "a list", "a bomb"],
)
@pytest.mark.parametrize("field", ["offset", "fqn"])
def test_places_that_are_none(field: str, first: bytes, tmp_path: Path) -> None:
    """What torch cannot be made to write: opcode by opcode."""
    size = dcp_layout._size((1,))
    chunk = dcp_layout._object("ChunkStorageMetadata", offsets=dcp_layout._size((0,)), sizes=size)
    tensor = dcp_layout._object("TensorStorageMetadata", size=size, chunks=b"](" + chunk + b"e")
    fields = {"fqn": dcp_entry.text("t"), "offset": dcp_layout._size((0,)), field: first}
    info = dcp_layout._instance(
        "torch.distributed.checkpoint.filesystem", "_StorageInfo", dcp_layout._dict({})
    )
    metadata = dcp_layout._object(
        "Metadata",
        state_dict_metadata=dcp_layout._mapping([dcp_entry.text("t") + tensor]),
        storage_data=dcp_layout._mapping([dcp_layout._object("MetadataIndex", **fields) + info]),
    )
    (tmp_path / ".metadata").write_bytes(b"\x80\x02" + metadata + b".")
    with pytest.raises(CheckpointError, match=r"tensor 't', piece at .* has no place in storage_data"):
        read_dcp(str(tmp_path))


# -- beside merges --------------------------------------------------------------------------------------


def state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (70, 64), "model.layers.0.mlp.up_proj.weight": (48, 64)}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def described(capsys: pytest.CaptureFixture[str], *paths: Path) -> dict[str, Any]:
    assert main(["inspect", *map(str, paths), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_inspect_measures_pieces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it does whole tensors; also where a tensor is never whole in memory."""
    base = write_checkpoint(tmp_path / "base", state(0))
    whole = write_checkpoint(tmp_path / "whole", state(1))
    pieces = write_pieces(tmp_path / "pieces", state(1), 3)
    expected = described(capsys, base, whole)
    found = described(capsys, base, pieces)
    assert found["task_vectors"] == expected["task_vectors"]
    alone = described(capsys, pieces)
    assert [(one["name"], one["tensors"]) for one in alone["files"]] == [
        (".metadata", 0),
        *((f"__{number}_0.distcp", 2) for number in range(3)),
    ]
    models, told = [open_checkpoint(base), open_checkpoint(pieces)], list[int]()
    measured = task_vectors(models, list(state(0)), read=told.append, chunk_bytes=2000)
    assert json.loads(json.dumps(measured.as_json())) == expected["task_vectors"]
    assert sum(told) >= 2 * sum(t.numel() * t.element_size() for t in state(0).values())
    page = tmp_path / "page.html"
    assert main(["inspect", str(pieces), str(whole), "--html", str(page)]) == 0
    assert "embed_tokens" in page.read_text()


def test_bytes_of_pieces_come_as_those_of_whole_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a tensor of one checkpoint can be compared with one of the other."""
    monkeypatch.setattr(reading, "_REQUEST", 1000)
    whole = open_checkpoint(write_checkpoint(tmp_path / "whole", state(1)))
    pieces = open_checkpoint(write_pieces(tmp_path / "pieces", state(1), 3))
    for name in state(1):
        assert list(reading.bytes_of(pieces.tensors[name])) == list(reading.bytes_of(whole.tensors[name]))


def test_a_report_tells_of_pieces(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", state(0))
    models = [
        write_checkpoint(tmp_path / "model-1", state(1)),
        write_pieces(tmp_path / "model-2", state(1), 3),
    ]
    told = []
    for model in models:
        recipe = {
            "merge_method": "ties",
            "base_model": str(base),
            "models": [{"model": str(model), "parameters": {"weight": 1.0, "density": 0.5}}],
            "dtype": "bfloat16",
        }
        out, report = tmp_path / f"out-{model.name}", tmp_path / f"report-{model.name}"
        tvfast.merge_checkpoints(recipe, out, report=report)
        assert (report / "report.html").exists()
        found = json.loads((report / "tensors.json").read_text())
        told.append(_without_seconds(found["tensors"]))
    assert told[0] == told[1]
    assert "embed_tokens" in json.dumps(told[0])


def _without_seconds(found: object) -> object:
    if isinstance(found, dict):
        return {key: _without_seconds(value) for key, value in found.items() if key != "seconds"}
    return list(map(_without_seconds, found)) if isinstance(found, list) else found


@pytest.mark.parametrize("unit_bytes", [2**25, 2**16])
def test_scales_in_pieces_are_those_of_their_codes(
    unit_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8-bit codes and a factor for each block of 128 x 128, both of them sharded."""
    from tvfast.engine import plan

    monkeypatch.setattr(plan, "UNIT_BYTES", unit_bytes)
    name, generator = "model.layers.0.mlp.up_proj.weight", torch.Generator().manual_seed(4)
    coded = {
        name: torch.randn((700, 256), generator=generator).to(torch.float8_e4m3fn),
        f"{name}_scale_inv": torch.rand((6, 2), generator=generator) + 0.5,
    }
    other = write_checkpoint(
        tmp_path / "other", {name: torch.randn((700, 256), generator=generator).bfloat16()}
    )
    models = [write_checkpoint(tmp_path / "whole", coded), write_pieces(tmp_path / "pieces", coded, 3)]
    found = []
    for model in models:
        listed = [{"model": str(one), "parameters": {"weight": 0.5}} for one in (other, model)]
        out = tmp_path / f"out-{model.name}"
        tvfast.merge_checkpoints({"merge_method": "linear", "models": listed, "dtype": "bfloat16"}, out)
        found.append(load(out)[name])
    assert torch.equal(found[0], found[1])
