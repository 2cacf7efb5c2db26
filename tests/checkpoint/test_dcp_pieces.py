"""Distributed checkpoints written by hand: places that are none, and what reads pieces beside merges."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
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
from tvfast.engine.plan import METADATA_LEFT, METADATA_PEAK
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


_WEIGH = """
import sys
import warnings
from tvfast.checkpoint.dcp_pickle import load_metadata

def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

raw = open(sys.argv[1], "rb").read()
before = kib("VmRSS")
found = load_metadata(raw, "there")
peak = kib("VmHWM") - before
kept = [index.get("fqn") for index in list(found.get("storage_data"))]
del found
print(peak * 1024 / len(raw), (kib("VmRSS") - before) * 1024 / len(raw))
"""


@pytest.mark.parametrize("of_tensor", [1, 4, 64])
def test_what_reading_metadata_takes_is_what_plans_count(of_tensor: int, tmp_path: Path) -> None:
    """10 000 pieces, that many of each tensor; only names are kept."""
    first = pickle.loads(
        (write_pieces(tmp_path / "one", {"a": torch.ones(1, 4)}, 1) / ".metadata").read_bytes()
    )
    (index, place), known = next(iter(first.storage_data.items())), first.state_dict_metadata["a"]
    for number in range(10_000 // of_tensor):
        name, chunks = f"model.layers.{number}.self_attn.q_proj.weight", []
        for k in range(of_tensor):
            at = torch.Size([7 * k, 0])
            chunks.append(type(known.chunks[0])(at, torch.Size([7, 4096])))
            here = type(place)(f"__{k}_0.distcp", 100_000 * number, 60_000)
            first.storage_data[type(index)(name, at, k)] = here
        shape = torch.Size([7 * of_tensor, 4096])
        first.state_dict_metadata[name] = type(known)(known.properties, shape, chunks)
        first.planner_data[name] = (name,)
    path = tmp_path / "many"
    path.write_bytes(pickle.dumps(first))
    done = subprocess.run([sys.executable, "-c", _WEIGH, path], capture_output=True, text=True, check=True)
    peak, left = map(float, done.stdout.split())
    assert METADATA_PEAK / 2 < peak <= METADATA_PEAK
    assert left <= METADATA_LEFT


def test_a_plan_knows_the_metadata_of_its_models(tmp_path: Path) -> None:
    pieces = write_pieces(tmp_path / "pieces", {"weight": torch.ones(6, 4)}, 3)
    plan = tvfast.plan(
        {"merge_method": "linear", "models": [{"model": str(pieces), "parameters": {"weight": 1}}]}
    )
    assert plan.binding.metadata_bytes == (pieces / ".metadata").stat().st_size


class _App:
    """What torch's examples save: an object that tells of model and optimizer when it is asked."""

    def __init__(self, model: Mapping[str, Tensor]) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        moments = {name: {"exp_avg": torch.zeros(4)} for name in self.model}
        return {"model": dict(self.model), "optim": {"state": moments}}

    def load_state_dict(self, found: dict[str, Any]) -> None:
        raise NotImplementedError


def _saved(folder: Path, found: dict[str, Any]) -> Path:
    from torch.distributed import checkpoint

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to save in a single process")
        checkpoint.save(found, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda model: {"app": _App(model)},
        lambda model: {"app": _App(model), "loader": {"state": {"model": torch.zeros(2)}}, "step": 7},
        lambda model: {"train_state": {"state_dict": model, "optim": {"lr": torch.zeros(1)}}},
        lambda model: {"app": dict(model)},
        lambda model: {"model": model, "app": {"model": {"other": torch.zeros(2)}}},
    ],
    ids=["app", "app-and-others", "another-name", "app-of-tensors", "model-first"],
)
def test_the_model_is_found_in_what_was_saved_around_it(
    wrapped: Callable[[dict[str, Tensor]], dict[str, Any]], tmp_path: Path
) -> None:
    model = {"embed.weight": torch.ones(6, 4), "layers.0.up.weight": torch.zeros(3, 4)}
    _, tensors = read_dcp(str(_saved(tmp_path / "dcp", wrapped(model))))
    assert {name: stored.shape for name, stored in tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in model.items()
    }


def test_of_two_models_none_is_taken_for_the_model(tmp_path: Path) -> None:
    found = {name: {"model": {"weight": torch.ones(2)}} for name in ("actor", "critic")}
    _, tensors = read_dcp(str(_saved(tmp_path / "dcp", found)))
    assert set(tensors) == {"actor.model.weight", "critic.model.weight"}


def test_an_average_beside_the_model_is_not_taken_for_it(tmp_path: Path) -> None:
    found = {"net": {"weight": torch.ones(2)}, "ema": {"model": {"weight": torch.zeros(2)}}}
    _, tensors = read_dcp(str(_saved(tmp_path / "dcp", found)))
    assert set(tensors) == {"net.weight", "ema.model.weight"}


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
